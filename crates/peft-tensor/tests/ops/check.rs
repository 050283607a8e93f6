//! What all the comparisons share.

use std::sync::OnceLock;

use peft_tensor::{Device, Result, RngKey, Tensor, tested};

/// An input: values that f32 holds exactly, and their shape.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) values: Vec<f64>,
    pub(crate) shape: Vec<usize>,
}

/// Random values in `[lo, hi)`.
pub(crate) fn input(seed: u64, lo: f32, hi: f32, shape: &[usize]) -> Input {
    let mut values = vec![0.0; shape.iter().product()];
    RngKey::new(seed).fill_uniform(lo, hi, &mut values);
    Input {
        values: values.into_iter().map(f64::from).collect(),
        shape: shape.to_vec(),
    }
}

/// Random values in `[-2, 2)`, none closer to 0 than 0.01, so that kinks there are out of a difference's reach.
pub(crate) fn around_zero(seed: u64, shape: &[usize]) -> Input {
    let mut x = input(seed, -2.0, 2.0, shape);
    for v in &mut x.values {
        if v.abs() < 0.01 {
            *v += 0.125;
        }
    }
    x
}

/// Tolerances, relative to 1 + the size of the true value.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    /// Of the processor's values.
    pub(crate) forward: f64,
    /// Of the processor's gradients.
    pub(crate) backward: f64,
}

/// What f32 rounding in a few dozen terms of size one amounts to.
pub(crate) const TIGHT: Tolerance = Tolerance {
    forward: 2e-6,
    backward: 6e-6,
};

/// Differences in f64 with step 1e-5 are good to about 1e-9; some curvature is left in functions like 1 / x.
const DIFFERENCE: f64 = 2e-6;

/// Coordinates of each input that are moved for a difference.
const PROBES: usize = 10;

pub(crate) fn close(got: f64, want: f64, tolerance: f64) -> bool {
    (got - want).abs() <= tolerance * (1.0 + want.abs())
        || (got.is_nan() && want.is_nan())
        || got == want
}

pub(crate) fn assert_all_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            close(*g, *w, tolerance),
            "{what}[{i}]: got {g}, want {w} (tolerance {tolerance})"
        );
    }
}

fn leaves(inputs: &[Input], device: &Device) -> Vec<Tensor> {
    let tensor = |x: &Input| Tensor::from_f64(x.values.clone(), &x.shape, device).unwrap();
    inputs.iter().map(|x| tensor(x).leaf()).collect()
}

/// [`leaves`] of which only one is.
fn one_leaf(inputs: &[Input], which: usize, device: &Device) -> Vec<Tensor> {
    let mut all = leaves(inputs, device);
    for (i, x) in all.iter_mut().enumerate() {
        if i != which {
            *x = x.detach();
        }
    }
    all
}

/// A scalar that depends on every element of `y` with a weight of its own.
fn loss(y: &Tensor) -> Tensor {
    let weights = input(991, -1.0, 1.0, y.shape());
    let weights = Tensor::from_f64(weights.values, y.shape(), y.device()).unwrap();
    y.mul(&weights).unwrap().sum_all().unwrap()
}

/// Values and gradients of `f` on a device.
fn run(leaves: &[Tensor], f: &impl Fn(&[Tensor]) -> Result<Tensor>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let y = f(leaves).unwrap();
    let values = y.to_f64().unwrap();
    if !y.requires_grad() {
        return (values, vec![]);
    }
    let grads = loss(&y).backward().unwrap();
    let grad = |leaf: &Tensor| {
        grads
            .get(leaf)
            .map_or_else(|| vec![0.0; leaf.numel()], |g| g.to_f64().unwrap())
    };
    (values, leaves.iter().map(grad).collect())
}

/// The processor, or the devices that a suite which includes these files has linked in beside it.
pub(crate) fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let others = Device::names().into_iter().filter(|name| *name != "cpu");
        let opened = others.filter_map(|name| tested(name, Device::by_name(name)));
        let opened: Vec<Device> = opened.collect();
        if opened.is_empty() {
            vec![Device::cpu()]
        } else {
            opened
        }
    })
}

/// Values of the device against the reference's, its gradients against the reference's, and those against
/// central differences of the reference's values at some coordinates.
pub(crate) fn check(
    inputs: &[Input],
    tolerance: Tolerance,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let (want, want_grads) = run(&leaves(inputs, &Device::reference()), &f);
    for device in devices() {
        let (got, got_grads) = run(&leaves(inputs, device), &f);
        let name = device.backend().name();
        assert_all_close(&format!("values on {name}"), &got, &want, tolerance.forward);
        assert_eq!(got_grads.len(), want_grads.len());
        for (i, (got, want)) in got_grads.iter().zip(&want_grads).enumerate() {
            let what = format!("gradient of input {i} on {name}");
            assert_all_close(&what, got, want, tolerance.backward);
            // Where it is the only one that is wanted, as beside frozen weights, it is the same.
            let (_, alone) = run(&one_leaf(inputs, i, device), &f);
            if let Some(alone) = alone.get(i) {
                assert_all_close(&format!("{what} alone"), alone, want, tolerance.backward);
            }
        }
    }
    for (i, want) in want_grads.iter().enumerate() {
        probe(inputs, i, want, &f);
    }
}

fn probe(inputs: &[Input], which: usize, grads: &[f64], f: &impl Fn(&[Tensor]) -> Result<Tensor>) {
    let device = Device::reference();
    let n = grads.len();
    let at = |inputs: &[Input]| {
        loss(&f(&leaves(inputs, &device)).unwrap())
            .to_f64()
            .unwrap()[0]
    };
    for p in 0..PROBES.min(n) {
        let i = if n <= PROBES {
            p
        } else {
            RngKey::new(77).below(p as u64, n as u64) as usize
        };
        let step = 1e-5;
        let mut moved = inputs.to_vec();
        let mut side = |by: f64| {
            moved[which].values[i] = inputs[which].values[i] + by;
            at(&moved)
        };
        let difference = (side(step) - side(-step)) / (2.0 * step);
        assert!(
            close(grads[i], difference, DIFFERENCE),
            "input {which}[{i}]: gradient {}, difference {difference}",
            grads[i]
        );
    }
}
