//! Activations by the names that AdapterHub and Transformers give them.

use peft_core::peft_tensor::Result as Made;
use peft_core::{Error, Result, Tensor};

/// An elementwise function.
pub(crate) type Activation = fn(&Tensor) -> Made<Tensor>;

/// Every activation that has no parameters of its own.
const KNOWN: &[(&str, Activation)] = &[
    ("relu", Tensor::relu),
    ("gelu", Tensor::gelu),
    ("gelu_new", Tensor::gelu_tanh),
    ("gelu_10", gelu_10),
    ("gelu_accurate", Tensor::gelu_tanh),
    ("gelu_fast", Tensor::gelu_tanh),
    ("gelu_orig", Tensor::gelu_tanh),
    ("gelu_python", Tensor::gelu),
    ("gelu_python_tanh", Tensor::gelu_tanh),
    ("gelu_pytorch_tanh", Tensor::gelu_tanh),
    ("hardswish", hardswish),
    ("leaky_relu", leaky_relu),
    ("leakyrelu", leaky_relu),
    ("linear", |x| Ok(x.clone())),
    ("mish", mish),
    ("quick_gelu", |x| x.mul(&x.scale(1.702)?.sigmoid()?)),
    ("relu2", |x| x.relu()?.square()),
    ("relu6", relu6),
    ("sigmoid", Tensor::sigmoid),
    ("silu", Tensor::silu),
    ("swish", Tensor::silu),
    ("tanh", Tensor::tanh),
];

/// The activation of that name, upper and lower case alike.
///
/// # Errors
/// If there is none; names `field` and all there are.
pub(crate) fn activation(field: &str, name: &str) -> Result<Activation> {
    let lower = name.to_ascii_lowercase();
    let found = KNOWN.iter().find(|(known, _)| *known == lower);
    found.map(|(_, f)| *f).ok_or_else(|| {
        let known: Vec<_> = KNOWN.iter().map(|(known, _)| *known).collect();
        Error::config(
            field,
            format!("{name:?} is not one of {}", known.join(", ")),
        )
    })
}

fn leaky_relu(x: &Tensor) -> Made<Tensor> {
    x.scale(0.01)?.add(&x.relu()?.scale(0.99)?)
}

/// x between 0 and 6.
fn relu6(x: &Tensor) -> Made<Tensor> {
    x.relu()?.sub(&x.affine(1.0, -6.0)?.relu()?)
}

fn hardswish(x: &Tensor) -> Made<Tensor> {
    x.mul(&relu6(&x.affine(1.0, 3.0)?)?.scale(1.0 / 6.0)?)
}

/// gelu, at most 10 (it never comes near -10).
fn gelu_10(x: &Tensor) -> Made<Tensor> {
    let y = x.gelu()?;
    y.sub(&y.affine(1.0, -10.0)?.relu()?)
}

/// `x tanh(ln(1 + e^x))`, the logarithm in the form that cannot overflow.
fn mish(x: &Tensor) -> Made<Tensor> {
    let small = x.abs()?.neg()?.exp()?.affine(1.0, 1.0)?.ln()?;
    x.mul(&x.relu()?.add(&small)?.tanh()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::Device;

    #[test]
    fn values_of_pytorch() {
        // torch 2.15: act(tensor([-7, -1, 0.5, 4, 12]))
        let wanted: &[(&str, [f32; 5])] = &[
            ("leakyrelu", [-0.07, -0.01, 0.5, 4.0, 12.0]),
            ("relu6", [0.0, 0.0, 0.5, 4.0, 6.0]),
            ("hardswish", [0.0, -0.333_333_34, 0.291_666_66, 4.0, 12.0]),
            (
                "mish",
                [-0.006_380_264, -0.303_401_44, 0.375_245_24, 3.997_413, 12.0],
            ),
            (
                "gelu_10",
                [0.0, -0.158_655_26, 0.345_731_2, 3.999_873_2, 10.0],
            ),
            ("relu2", [0.0, 0.0, 0.25, 16.0, 144.0]),
            (
                "Quick_GELU",
                [-4.687_167e-5, -0.154_204_23, 0.350_388_44, 3.995_585, 12.0],
            ),
        ];
        let x = Tensor::from_vec(vec![-7.0, -1.0, 0.5, 4.0, 12.0], &[5], &Device::cpu())
            .expect("a tensor");
        for (name, values) in wanted {
            let f = activation("f", name).expect("known");
            let got = f(&x).expect("runs").to_vec().expect("values");
            for (got, want) in got.iter().zip(values) {
                assert!((got - want).abs() < 2e-6, "{name}: {got} is not {want}");
            }
        }
    }
}
