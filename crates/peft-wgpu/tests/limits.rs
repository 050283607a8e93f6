//! Tensors larger than a binding are worked on in parts: the same results as on the reference, with a binding of a few
//! hundred elements.

mod common;

use common::{open, random};
use peft_tensor::{BaseWeight, Device, FrozenWeight, Result, RngKey, Tensor, Unary, WeightFormat};
use peft_wgpu::Options;

/// A device whose bindings hold `bytes`.
fn small(bytes: u64) -> Option<Device> {
    open(&Options {
        max_binding: Some(bytes),
        ..Options::default()
    })
}

fn close(what: &str, f: impl Fn(&Device) -> Result<Tensor>, device: &Device, tolerance: f64) {
    let got = f(device).unwrap().to_f64().unwrap();
    let want = f(&Device::reference()).unwrap().to_f64().unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!(
            (g - w).abs() <= tolerance * (1.0 + w.abs()),
            "{what}[{i}]: {g}, not {w}"
        );
    }
}

#[test]
fn products_in_pieces() {
    let Some(device) = small(2048) else { return };
    // 512 elements a binding; odd sizes, so that pieces begin inside of aligned windows.
    for (m, k, n) in [(37, 53, 41), (5, 400, 3), (3, 17, 130), (130, 19, 23)] {
        let what = format!("{m} x {k} x {n}");
        let f = |a: [usize; 3], b: [usize; 3], which: usize| {
            move |d: &Device| {
                let (a, b) = (random(1, &a, d), random(2, &b, d));
                match which {
                    0 => a.matmul(&b),
                    1 => a.matmul_t(&b),
                    _ => a.t_matmul(&b),
                }
            }
        };
        close(&what, f([2, m, k], [2, k, n], 0), &device, 1e-5);
        close(&what, f([2, m, k], [2, n, k], 1), &device, 1e-5);
        close(&what, f([2, k, m], [2, k, n], 2), &device, 1e-5);
    }
}

#[test]
fn frozen_weights_in_chunks() {
    let Some(device) = small(1024) else { return };
    for (format, rows, cols) in [
        (WeightFormat::F32, 45, 33),
        (WeightFormat::BF16, 45, 33),
        (WeightFormat::F16, 45, 33),
        (WeightFormat::NF4, 100, 50),
        (WeightFormat::INT8, 77, 51),
        (WeightFormat::Q4_0, 80, 64),
        (WeightFormat::Q4_1, 80, 64),
        (WeightFormat::Q8_0, 80, 64),
        (WeightFormat::Q5_1, 80, 64),
    ] {
        let mut values = vec![0.0; rows * cols];
        RngKey::new(3).fill_uniform(-1.0, 1.0, &mut values);
        let weight = FrozenWeight::quantize(rows, cols, &values, format).unwrap();
        let base = |d: &Device| BaseWeight::frozen(weight.clone(), false, d);
        let name = format.name();
        let forward = |d: &Device| base(d).linear(&random(4, &[7, cols], d));
        close(name, forward, &device, 1e-5);
        let backward = |d: &Device| base(d).linear_t(&random(5, &[7, rows], d));
        close(name, backward, &device, 1e-5);
        let ids = [0, rows as u32 - 1, 31, 31, 12];
        close(name, |d| base(d).gather(&ids[..3]), &device, 0.0);
        close(name, |d| base(d).gather(&ids), &device, 0.0);
        close(name, |d| base(d).to_dense(), &device, 0.0);
    }
}

#[test]
fn flat_functions_in_parts() {
    let Some(device) = small(1024) else { return };
    let x = |d: &Device| random(1, &[31, 67], d);
    let y = |d: &Device| random(2, &[31, 67], d);
    close("unary", |d| x(d).unary(Unary::Gelu), &device, 2e-6);
    close("binary", |d| x(d).mul(&y(d)), &device, 1e-6);
    close("affine", |d| x(d).affine(2.0, -1.0), &device, 1e-6);
    close(
        "dropout",
        |d| x(d).dropout(0.4, RngKey::new(9)),
        &device,
        1e-6,
    );
}

#[test]
fn what_does_not_fit_is_an_error_and_the_device_goes_on() {
    let Some(device) = small(1024) else { return };
    let x = random(1, &[40, 100], &device);
    let error = x.softmax().unwrap_err().to_string();
    assert!(
        error.contains("softmax") && error.contains("1024"),
        "{error}"
    );
    close(
        "afterwards",
        |d| random(1, &[4, 9], d).softmax(),
        &device,
        1e-6,
    );
}

#[test]
fn a_tensor_of_another_device_is_refused() {
    let Some(device) = small(1 << 20) else { return };
    let (here, there) = (random(1, &[3], &device), random(1, &[3], &Device::cpu()));
    assert!(here.add(&there).is_err());
    let moved = there.to_device(&device).unwrap();
    assert_eq!(here.to_vec().unwrap(), moved.to_vec().unwrap());
}
