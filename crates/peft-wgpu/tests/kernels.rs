//! Forms of kernels that only some devices use: each against the reference, in odd sizes, with and without what the driver has
//! beyond the plain ones.

use peft_tensor::{
    BaseWeight, Device, FrozenWeight, Precision, Result, RngKey, Tensor, WeightFormat,
};
use peft_wgpu::Options;

mod common;
use common::{open as device, random};

/// With all that the driver has, with the plain kernels alone, and with pieces: bindings of `bytes`.
fn forms(bytes: u64) -> Vec<Device> {
    let one = |plain, max_binding| Options {
        plain,
        max_binding,
        ..Options::default()
    };
    let all = [
        one(false, None),
        one(true, None),
        one(false, Some(bytes)),
        one(true, Some(bytes)),
    ];
    all.iter().filter_map(device).collect()
}

fn close(what: &str, f: impl Fn(&Device) -> Result<Tensor>, devices: &[Device], tolerance: f64) {
    let want = f(&Device::reference()).unwrap().to_f64().unwrap();
    for (form, device) in devices.iter().enumerate() {
        let got = f(device).unwrap().to_f64().unwrap();
        assert_eq!(got.len(), want.len(), "{what}");
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!(
                (g - w).abs() <= tolerance * (1.0 + w.abs()) || (g.is_nan() && w.is_nan()),
                "form {form}: {what}[{i}]: {g}, not {w}"
            );
        }
    }
}

fn product(which: usize, [batch, m, k, n]: [usize; 4]) -> impl Fn(&Device) -> Result<Tensor> {
    move |d| {
        let lead = |r, c| [batch, r, c];
        let a = random(1, &if which == 2 { lead(k, m) } else { lead(m, k) }, d);
        let b = random(2, &if which == 1 { lead(n, k) } else { lead(k, n) }, d);
        match which {
            0 => a.matmul(&b),
            1 => a.matmul_t(&b),
            _ => a.t_matmul(&b),
        }
    }
}

#[test]
fn products_of_every_form() {
    let devices = forms(16384);
    for sizes in [
        [1, 8, 968, 37],
        [1, 7, 2100, 130],
        [3, 33, 70, 65],
        [1, 130, 65, 8],
        [2, 40, 9, 33],
        [1, 257, 33, 129],
    ] {
        for which in 0..3 {
            // Sums of k terms of size 1/3; see the suite's own.
            close(
                &format!("{which}: {sizes:?}"),
                product(which, sizes),
                &devices,
                2e-4,
            );
        }
    }
}

const FORMATS: [WeightFormat; 8] = [
    WeightFormat::F32,
    WeightFormat::BF16,
    WeightFormat::F16,
    WeightFormat::NF4,
    WeightFormat::INT8,
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q8_0,
];

fn frozen(rows: usize, cols: usize, format: WeightFormat) -> FrozenWeight {
    let mut values = vec![0.0; rows * cols];
    RngKey::new(3).fill_uniform(-1.0, 1.0, &mut values);
    FrozenWeight::quantize(rows, cols, &values, format).unwrap()
}

#[test]
fn few_rows_of_every_format() {
    let devices = forms(8192);
    for format in FORMATS {
        let weight = frozen(45, 192, format);
        for m in [1, 3, 16] {
            let f = |d: &Device| {
                let base = BaseWeight::frozen(weight.clone(), false, d);
                base.linear(&random(4, &[m, 192], d))
            };
            close(&format!("{} {m}", format.name()), f, &devices, 1e-5);
        }
        // Rows that are no multiple of 32 values: another kernel.
        if matches!(
            format,
            WeightFormat::NF4 | WeightFormat::INT8 | WeightFormat::F16
        ) {
            let weight = frozen(64, 50, format);
            let f = |d: &Device| {
                let base = BaseWeight::frozen(weight.clone(), false, d);
                base.linear(&random(4, &[3, 50], d))
            };
            close(&format!("{} of 50", format.name()), f, &devices, 1e-5);
        }
    }
}

#[test]
fn sums_and_rows_of_every_form() {
    let devices: Vec<Device> = [false, true]
        .into_iter()
        .filter_map(|plain| {
            device(&Options {
                plain,
                ..Options::default()
            })
        })
        .collect();
    for cols in [1, 7, 31, 130, 1000, 5000] {
        let what = format!("{cols}");
        close(
            &what,
            |d| random(1, &[3, cols], d).softmax(),
            &devices,
            1e-6,
        );
        close(
            &what,
            |d| random(1, &[3, cols], d).sum_axis(1),
            &devices,
            1e-5,
        );
        close(
            &what,
            |d| random(1, &[5, cols], d).max_rows(),
            &devices,
            0.0,
        );
        let norm = |d: &Device| {
            let w = random(2, &[cols], d);
            random(1, &[3, cols], d).layer_norm(&w, None, 1e-5)
        };
        close(&what, norm, &devices, 2e-5);
    }
    // A NaN is larger than everything, wherever it is.
    for at in [0, 5, 100, 299] {
        let rows = |d: &Device| {
            let mut values = vec![1.0f32; 300];
            values[at] = f32::NAN;
            Tensor::from_vec(values, &[1, 300], d)?.max_rows()
        };
        for device in &devices {
            assert!(rows(device).unwrap().to_vec().unwrap()[0].is_nan(), "{at}");
        }
    }
}

/// Values of 9 bits, which f16 holds, times a power of two.
fn short(seed: u64, shape: &[usize], power: i32, device: &Device) -> Tensor {
    let mut values = vec![0.0f32; shape.iter().product()];
    RngKey::new(seed).fill_uniform(-256.0, 256.0, &mut values);
    let short = values.iter().map(|v| v.round() * 2f32.powi(power - 8));
    Tensor::from_vec(short.collect(), shape, device).unwrap()
}

/// f16 holds neither 2^30 nor 2^-60: the values are scaled on the way.
const POWERS: [(i32, i32); 4] = [(0, 0), (30, -60), (-40, 2), (100, -110)];

#[test]
fn matrix_units() {
    let has = peft_wgpu::adapters().iter().any(|a| a.matrix_units);
    let bf16 = |max_binding| Options {
        precision: Precision::Bf16,
        max_binding,
        ..Options::default()
    };
    let devices: Vec<Device> = [bf16(None), bf16(Some(16384))]
        .iter()
        .filter_map(device)
        .collect();
    if !has {
        eprintln!("no adapter with matrix units: products on them are not tested");
    }
    for [m, k, n] in [[33, 32, 47], [130, 65, 131]] {
        for (which, power) in (0..3).zip(POWERS).chain([(0, POWERS[3])]) {
            let f = |d: &Device| {
                let (a, b) = (
                    if which == 2 { [k, m] } else { [m, k] },
                    if which == 1 { [n, k] } else { [k, n] },
                );
                let (a, b) = (short(1, &a, power.0, d), short(2, &b, power.1, d));
                let c = match which {
                    0 => a.matmul(&b),
                    1 => a.matmul_t(&b),
                    _ => a.t_matmul(&b),
                };
                c?.affine(2f32.powi(-power.0 - power.1), 0.0)
            };
            close(
                &format!("{which}: {m} {k} {n}, {power:?}"),
                f,
                &devices,
                1e-6,
            );
        }
    }
    for format in FORMATS {
        let weight = frozen(96, 192, format);
        let m = 70;
        let base = |d: &Device| BaseWeight::frozen(weight.clone(), false, d);
        // Weights are rounded to 11 bits, by 1.4e-4 of them in the mean, in each of 192 products of a third: 6.5e-4,
        // of which six times is allowed.
        let forward = |d: &Device| {
            base(d)
                .linear(&short(4, &[m, 192], -30, d))?
                .affine(2f32.powi(30), 0.0)
        };
        close(&format!("{} {m}", format.name()), forward, &devices, 4e-3);
        let backward = |d: &Device| {
            base(d)
                .linear_t(&short(5, &[m, 96], -30, d))?
                .affine(2f32.powi(30), 0.0)
        };
        close(
            &format!("{} {m} back", format.name()),
            backward,
            &devices,
            2e-3,
        );
    }
    // What goes to them is rounded; without 16 bits in the configuration nothing is.
    let f = |d: &Device| {
        random(1, &[64, 64], d)
            .matmul(&random(2, &[64, 64], d))
            .unwrap()
            .to_vec()
            .unwrap()
    };
    if let (Some(exact), Some(rounded)) = (device(&Options::default()), devices.first()) {
        assert_eq!(f(&exact) != f(rounded), has);
        close(
            "f32",
            |d| random(1, &[64, 64], d).matmul(&random(2, &[64, 64], d)),
            &[exact],
            1e-5,
        );
    }
    // What is no number stays so.
    for bad in [f32::NAN, f32::INFINITY] {
        for d in &devices {
            let mut values = vec![1.0f32; 64 * 64];
            values[65] = bad;
            let a = Tensor::from_vec(values, &[64, 64], d).unwrap();
            let c = a.matmul(&a).unwrap().to_vec().unwrap();
            assert!(!c[64].is_finite() && c[2 * 64].is_finite());
        }
    }
}

#[test]
fn speeds_of_kernels() {
    let Some(device) = device(&Options::default()) else {
        return;
    };
    let all = device.backend().kernel_speeds(64).unwrap();
    assert!(all.len() >= 13, "{all:?}");
    for k in &all {
        assert!(
            k.speed > 0.0 && k.speed.is_finite() && k.peak > 0.0,
            "{k:?}"
        );
    }
}
