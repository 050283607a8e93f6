//! How fast the kernels of products are, beside what the device can do: known from nowhere, so measured in the same run.

use std::time::Instant;

use bytemuck::NoUninit;
use peft_tensor::{FrozenWeight, KernelSpeed, Precision, Result, RngKey, WeightFormat};

use crate::frozen::packed_of;
use crate::gpu::{Gpu, Kernel};
use crate::matmul::{Form, Product, Shape, dense_right};
use crate::memory::Data;

/// Rounds, of which the best counts, after one that compiles.
const ROUNDS: usize = 3;

/// Formats whose few rows are measured.
const FORMATS: [WeightFormat; 5] = [
    WeightFormat::F32,
    WeightFormat::BF16,
    WeightFormat::NF4,
    WeightFormat::INT8,
    WeightFormat::Q4_0,
];

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct PeakParams {
    rounds: u32,
    n: u32,
}

const PEAK: &[&str] = &[include_str!("wgsl/peak.wgsl")];

impl Gpu {
    /// Each form of a product of `size x size` matrices, and a few rows of each format.
    pub(crate) fn kernel_speeds(&self, size: usize) -> Result<Vec<KernelSpeed>> {
        let x = self.random(size * size, 1)?;
        let y = self.random(size * size, 2)?;
        let peak = self.peak_fma(&x)?;
        let bandwidth = self.peak_read()?;
        let mut all = Vec::new();
        let mut say = |kernel: String, done: f64, seconds: f64, unit, peak| {
            let speed = done / seconds / 1e9;
            all.push(KernelSpeed {
                kernel,
                speed,
                unit,
                peak,
            });
        };
        let product = |m, k, n, half| Product {
            batch: 1,
            m,
            k,
            n,
            a_batched: false,
            b_batched: false,
            ta: false,
            tb: false,
            scale: 1.0,
            half,
        };
        let flops = 2.0 * (size as f64).powi(3);
        let chosen = self.form([size; 3], 1);
        let mut forms = vec![Form::Tiles(4, 4), Form::Tiles(8, 8)];
        if self.is_wide() {
            forms.push(Form::Wide(32, 4));
        }
        let (square, binds) = (Shape::whole(&product(size, size, size, false)), [y.bind()]);
        let right = dense_right(&binds);
        for form in forms {
            let c = self.room(size * size)?;
            let seconds = self.best(|| {
                self.product_as(form, square, 1, (false, false), x.bind(), &right, c.bind())
            })?;
            let name = match form {
                Form::Tiles(rows, cols) => format!("tiles, {rows} x {cols} a thread"),
                Form::Wide(rows, cols) => format!("wide, {rows} x {cols} a lane"),
            };
            let mark = if form == chosen { ", chosen" } else { "" };
            say(format!("{name}{mark}"), flops, seconds, "GFLOP/s", peak);
        }
        // A gradient of a low-rank matrix: few tiles, and a sum as long as there are rows.
        let (m, k, n) = (
            8,
            (size * size / 8).min(16 * size),
            size.min(size * size / 8),
        );
        let n = n.min(size * size / k);
        let seconds = self.best(|| self.matmul(&x, &y, product(m, k, n, false), None).map(drop))?;
        let done = 2.0 * (m * k * n) as f64;
        say(
            format!("{m} x {n} from {k} rows"),
            done,
            seconds,
            "GFLOP/s",
            peak,
        );
        if self.units_work()? {
            let peak = self.peak_units(&x)?;
            let c = self.room(size * size)?;
            let seconds = self.best(|| {
                let most = [
                    self.most(x.bind(), 0, x.len)?,
                    self.most(y.bind(), 0, y.len)?,
                ];
                let most = [most[0].bind(), most[1].bind()];
                self.by_units(square, 1, (false, false), x.bind(), &right, most, c.bind())
            })?;
            say(
                "matrix units (bf16)".to_owned(),
                flops,
                seconds,
                "GFLOP/s",
                peak,
            );
        } else if self.has.block.is_some() {
            say(
                "matrix units: WRONG, not used".to_owned(),
                0.0,
                1.0,
                "GFLOP/s",
                peak,
            );
        }
        let mut values = vec![0.0; size * size];
        RngKey::new(3).fill_uniform(-1.0, 1.0, &mut values);
        for format in FORMATS {
            let weight = FrozenWeight::quantize(size, size, &values, format)?;
            let held = self.packed(&weight, Precision::F32)?;
            let bytes = packed_of(&held)?.bytes() as f64;
            for rows in [1, 16.min(size)] {
                let seconds = self.best(|| {
                    self.frozen_matmul(&x, rows, &weight, Precision::F32, true, None)
                        .map(drop)
                })?;
                let name = format!("{rows} rows, {} weight", format.name());
                say(name, bytes, seconds, "GB/s", bandwidth);
            }
        }
        Ok(all)
    }

    fn random(&self, n: usize, seed: u64) -> Result<Data> {
        let mut values = vec![0f32; n];
        RngKey::new(seed).fill_uniform(-1.0, 1.0, &mut values);
        self.put(&values)
    }

    /// Seconds of one call, of the best round; as many calls a round as take a while.
    fn best(&self, f: impl Fn() -> Result<()>) -> Result<f64> {
        let timed = |times: usize| -> Result<f64> {
            self.flush()?;
            self.wait()?;
            let begun = Instant::now();
            for _ in 0..times {
                f()?;
            }
            self.flush()?;
            self.wait()?;
            Ok(begun.elapsed().as_secs_f64() / times as f64)
        };
        timed(1)?;
        let once = timed(1)?;
        let times = (0.02 / once.max(1e-6)).clamp(1.0, 200.0) as usize;
        let mut best = once;
        for _ in 0..ROUNDS {
            best = best.min(timed(times)?);
        }
        Ok(best)
    }

    /// Billions of multiplications and additions a second, of values in registers.
    fn peak_fma(&self, x: &Data) -> Result<f64> {
        let y = self.room(1)?;
        let kernel = Kernel::new("peak_fma", PEAK, 1, 1);
        let (groups, rounds) = if self.has.software {
            (16, 1 << 10)
        } else {
            (4096, 1 << 11)
        };
        let params = PeakParams { rounds, n: 0 };
        let binds = [x.bind(), y.bind()];
        let seconds = self.best(|| self.run(&kernel, &binds, &params, [groups, 1, 1]))?;
        Ok(f64::from(groups) * 256.0 * f64::from(rounds) * 128.0 / seconds / 1e9)
    }

    /// The same of matrix units, in the blocks that the kernel of products has.
    fn peak_units(&self, x: &Data) -> Result<f64> {
        let y = self.room(1)?;
        let kernel = Kernel::new("peak_units", &[include_str!("wgsl/peak_units.wgsl")], 1, 1)
            .with(self.unit_types());
        let (groups, rounds) = if self.has.software {
            (16, 1 << 10)
        } else {
            (2048, 1 << 12)
        };
        let params = PeakParams { rounds, n: 0 };
        let binds = [x.bind(), y.bind()];
        let seconds = self.best(|| self.run(&kernel, &binds, &params, [groups, 1, 1]))?;
        // Four subgroups, four products of blocks a round.
        let block = f64::from(self.has.block.unwrap_or(8)).powi(3);
        Ok(f64::from(groups) * 4.0 * f64::from(rounds) * 4.0 * 2.0 * block / seconds / 1e9)
    }

    /// Billions of bytes read a second.
    fn peak_read(&self) -> Result<f64> {
        let bytes = (256u64 << 20).min(self.max_binding);
        let (x, y) = (self.fill(bytes as usize / 4, 0.0)?, self.room(1)?);
        let kernel = Kernel::new("peak_read", PEAK, 1, 1);
        let n = x.len as u32 / 4;
        let params = PeakParams { rounds: 0, n };
        let groups = if self.has.software { 16 } else { 4096 };
        let binds = [x.bind(), y.bind()];
        let seconds = self.best(|| self.run(&kernel, &binds, &params, [groups, 1, 1]))?;
        Ok(f64::from(n) * 16.0 / seconds / 1e9)
    }
}
