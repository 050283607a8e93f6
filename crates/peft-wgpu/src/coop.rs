//! Products on matrix units; see `wgsl/coop.wgsl`.
//!
//! Only where the user chose a 16-bit precision, the adapter offers blocks of f16 added up in f32, and a small product of
//! whole numbers came out exactly at the first use: drivers are young there.

use bytemuck::NoUninit;
use peft_tensor::Result;

use crate::gpu::{Gpu, Kernel};
use crate::matmul::{Product, Right, Shape};
use crate::memory::Data;
use crate::record::Bind;

/// The least of every size that is worth the passes for the largest values.
const LEAST: u32 = 32;

/// Columns of a tile's part of k.
const DEPTH: u32 = 32;

const MOST: &str = include_str!("wgsl/most.wgsl");

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct MostParams {
    n: u32,
    at: u32,
    cols: u32,
}

impl Gpu {
    /// Whether a product is one for matrix units, and there are some that multiply right.
    pub(crate) fn suits_units(&self, shape: &Shape, batch: usize) -> Result<bool> {
        let large = shape.m.min(shape.n).min(shape.k) >= LEAST && batch < 65_536;
        Ok(large && self.units_work()?)
    }

    /// Tries them at the first call.
    pub(crate) fn units_work(&self) -> Result<bool> {
        if self.has.block.is_none() {
            return Ok(false);
        }
        if let Some(known) = self.units.get() {
            return Ok(*known);
        }
        // What went wrong before is not their fault.
        self.flush()?;
        self.wait()?;
        let works = self.try_units().unwrap_or(false);
        Ok(*self.units.get_or_init(|| works))
    }

    /// Whole numbers from -8 to 8, whose products and sums both kinds of float hold, in sizes that fill no tile.
    fn try_units(&self) -> Result<bool> {
        let (m, k, n) = (75, 83, 69);
        let whole = |i: usize, seed: usize| ((i * 7919 + i / 13 * seed) % 17) as f32 - 8.0;
        let a: Vec<f32> = (0..m * k).map(|i| whole(i, 31)).collect();
        let b: Vec<f32> = (0..n * k).map(|i| whole(i, 57)).collect();
        let (left, right, c) = (self.put(&a)?, self.put(&b)?, self.fill(m * n, 1.0)?);
        let shape = Shape {
            add: 1,
            ..Shape::whole(&Product {
                batch: 1,
                m,
                k,
                n,
                a_batched: false,
                b_batched: false,
                ta: false,
                tb: true,
                scale: 0.5,
                half: true,
            })
        };
        let most_a = self.most(left.bind(), 0, left.len)?;
        let most_b = self.most(right.bind(), 0, right.len)?;
        let most = [most_a.bind(), most_b.bind()];
        let binds = [right.bind()];
        let dense = crate::matmul::dense_right(&binds);
        self.by_units(shape, 1, (false, true), left.bind(), &dense, most, c.bind())?;
        let got = self.download(&c)?;
        Ok((0..m * n).all(|i| {
            let (row, col) = (i / n, i % n);
            let sum: f32 = (0..k).map(|l| a[row * k + l] * b[col * k + l]).sum();
            got[i] == 1.0 + 0.5 * sum
        }))
    }

    /// Records the kernel. `most`: the sizes of the largest values of both operands.
    pub(crate) fn by_units(
        &self,
        shape: Shape,
        batch: usize,
        (ta, tb): (bool, bool),
        a: Bind<'_>,
        right: &Right<'_>,
        most: [Bind<'_>; 2],
        c: Bind<'_>,
    ) -> Result<()> {
        let side = self.has.block.unwrap_or(8);
        let large = self.unit_tiles(&shape, batch, 128) >= self.large_tiles
            && self.device.limits().max_compute_workgroup_storage_size >= 24 << 10;
        let tile = match large && shape.m.min(shape.n) > 64 {
            // A software driver writes every block product out; compiling larger tiles takes minutes.
            _ if self.has.software => 32,
            true => 128,
            false => 64,
        };
        let header = format!(
            "{}const BM = {tile}u;\nconst BN = {tile}u;\nconst TA = {ta};\nconst TB = {tb};\n{}",
            self.unit_types(),
            right.header,
        );
        let blocks = (tile / 2 / side) as usize;
        let reads = 3 + right.binds.len() as u32;
        let kernel = Kernel::new("coop", right.sources.units, reads, 1)
            .with(header)
            .rounds(&[
                ("WM", blocks),
                ("WN", blocks),
                ("STEPS", (DEPTH / side) as usize),
            ]);
        let mut binds = vec![a];
        binds.extend(right.binds);
        binds.extend(most);
        binds.push(c);
        let groups = [shape.n.div_ceil(tile), shape.m.div_ceil(tile), batch as u32];
        self.run(&kernel, &binds, &shape, groups)
    }

    /// What kernels for matrix units have in front.
    pub(crate) fn unit_types(&self) -> String {
        let side = self.has.block.unwrap_or(8);
        let subgroup = self.has.subgroup_sizes.1;
        format!(
            "enable f16;\nenable wgpu_cooperative_matrix;\n\
             alias Left = coop_mat{side}x{side}<f16, A>;\n\
             alias Right = coop_mat{side}x{side}<f16, B>;\n\
             alias Sum = coop_mat{side}x{side}<f32, C>;\n\
             const SIDE = {side}u;\nconst SUBGROUP = {subgroup}u;\nconst THREADS = {threads}u;\n",
            threads = 4 * subgroup,
        )
    }

    fn unit_tiles(&self, shape: &Shape, batch: usize, tile: u32) -> usize {
        batch * (shape.m.div_ceil(tile) * shape.n.div_ceil(tile)) as usize
    }

    /// The size of the largest of `n` values from `at` on, as bits.
    pub(crate) fn most(&self, x: Bind<'_>, at: u32, n: usize) -> Result<Data> {
        const KERNEL: Kernel =
            Kernel::new("most", &[MOST, include_str!("wgsl/most_dense.wgsl")], 1, 1);
        let params = MostParams {
            n: n as u32,
            at,
            cols: 1,
        };
        let most = self.fill(1, 0.0)?;
        self.run(&KERNEL, &[x, most.bind()], &params, few_groups(n))?;
        Ok(most)
    }

    /// The same of a packed matrix.
    pub(crate) fn most_packed(
        &self,
        [codes, scales]: [Bind<'_>; 2],
        header: &str,
        n: usize,
        cols: usize,
    ) -> Result<Data> {
        const SOURCES: &[&str] = &[
            MOST,
            include_str!("wgsl/formats.wgsl"),
            include_str!("wgsl/most_packed.wgsl"),
        ];
        let params = MostParams {
            n: n as u32,
            at: 0,
            cols: cols as u32,
        };
        let most = self.fill(1, 0.0)?;
        let kernel = Kernel::new("most", SOURCES, 2, 1).with(header.to_owned());
        self.run(
            &kernel,
            &[codes, scales, most.bind()],
            &params,
            few_groups(n),
        )?;
        Ok(most)
    }
}

/// Groups that go through `n` values several times over: their end costs an atomic operation each.
fn few_groups(n: usize) -> [u32; 3] {
    [n.div_ceil(2048).clamp(1, 1024) as u32, 1, 1]
}
