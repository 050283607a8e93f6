//! Initial values of a low-rank pair, by HF's `init_lora_weights`.

use peft_core::ndarray::{Array2, Ix2, s};
use peft_core::peft_tensor::linalg;
use peft_core::serde_json::Value;
use peft_core::{Attach, Error, Init, Result, RngKey, Tensor};

/// What a pair starts from.
pub(crate) struct Start {
    /// `[r, in]`
    pub(crate) a: Init,
    /// `[out, r]`
    pub(crate) b: Init,
    /// A product that is taken out of the base at the start, so that the model's function stays: the initial values
    /// themselves (`b0 [out, r]`, `a0 [r, in]`). HF changes the base weight instead; kept apart, the base stays
    /// as it is, in whatever format, and other adapters can use it.
    pub(crate) removed: Option<(Tensor, Tensor)>,
}

/// Sizes and scaling of a pair.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) inside: usize,
    pub(crate) out: usize,
    pub(crate) rank: usize,
    pub(crate) scaling: f32,
}

/// The start that `init_lora_weights` names; `loftq` are the settings of the one of that name.
///
/// # Errors
/// If there is none of that name, or it does not fit the layer.
pub(crate) fn start(
    which: &Value,
    loftq: &Value,
    shape: Shape,
    cx: &mut Attach<'_>,
    module: &str,
) -> Result<Start> {
    const FIELD: &str = "init_lora_weights";
    let plain = |a, b| {
        Ok(Start {
            a,
            b,
            removed: None,
        })
    };
    let name = match which {
        // Both at PyTorch's default: not the identity, for tests. HF reads null as false.
        Value::Null | Value::Bool(false) => {
            return plain(
                Init::LinearDefault {
                    fan_in: shape.inside,
                },
                Init::LinearDefault { fan_in: shape.rank },
            );
        }
        Value::Bool(true) => {
            return plain(
                Init::LinearDefault {
                    fan_in: shape.inside,
                },
                Init::Zeros,
            );
        }
        Value::String(name) => name.to_ascii_lowercase(),
        other => {
            return Err(Error::config(
                FIELD,
                format!("expected true, false or a name, got {other}"),
            ));
        }
    };
    let limit = shape.inside.min(shape.out);
    let fits = || {
        if shape.rank <= limit {
            return Ok(());
        }
        Err(Error::config(
            "r",
            format!(
                "{} at `{module}`: {name} takes its start from the weight and needs 1 to {limit}",
                shape.rank
            ),
        ))
    };
    match name.as_str() {
        "gaussian" => plain(
            Init::Normal {
                std: 1.0 / shape.rank as f32,
            },
            Init::Zeros,
        ),
        "olora" => {
            fits()?;
            olora(shape, cx)
        }
        "orthogonal" => orthogonal(shape, cx),
        // Found from data, it leaves the base alone: a file of it is a plain pair.
        "eva" if cx.loading() => plain(Init::Zeros, Init::Zeros),
        "loftq" => {
            fits()?;
            crate::loftq::start(loftq, shape, cx, module)
        }
        "pissa" => {
            fits()?;
            let svd = linalg::svd(&weight(cx)?)?;
            pissa(svd, shape, cx)
        }
        _ => match name
            .strip_prefix("pissa_niter_")
            .and_then(|n| n.parse::<usize>().ok())
        {
            Some(iterations) => {
                fits()?;
                let svd = linalg::randomized_svd(
                    &weight(cx)?,
                    shape.rank,
                    shape.rank,
                    iterations,
                    cx.key("pissa"),
                )?;
                pissa(svd, shape, cx)
            }
            None => Err(Error::config(
                FIELD,
                format!(
                    "{name:?} is not one of true, false, gaussian, pissa, pissa_niter_<N>, olora, orthogonal, loftq"
                ),
            )),
        },
    }
}

/// Whether a start takes its product out of the base weight.
pub(crate) fn comes_out_of_the_weight(which: &Value) -> bool {
    let name = which.as_str().unwrap_or_default().to_ascii_lowercase();
    name == "olora" || name.starts_with("pissa")
}

/// The base weight, `[out, in]`.
fn weight(cx: &Attach<'_>) -> Result<Array2<f32>> {
    let dense = cx.base_weight()?.to_dense()?.to_array()?;
    dense
        .into_dimensionality::<Ix2>()
        .map_err(|e| Error::other(e.to_string()))
}

fn removed(b: Array2<f32>, a: Array2<f32>, cx: &Attach<'_>) -> Result<Start> {
    let (b, a) = (
        Tensor::from_array(b, &cx.device())?,
        Tensor::from_array(a, &cx.device())?,
    );
    Ok(Start {
        a: Init::Value(a.clone()),
        b: Init::Value(b.clone()),
        removed: Some((b, a)),
    })
}

/// PiSSA (arXiv 2404.02948, eq. 2-4): W = U S Vᵀ; A = sqrt(S) Vᵀ and B = U sqrt(S) of the largest r, with S divided by
/// the scaling so that scaling B A is the principal part.
fn pissa(svd: linalg::Svd, shape: Shape, cx: &Attach<'_>) -> Result<Start> {
    let r = shape.rank;
    let root = svd
        .s
        .slice(s![..r])
        .mapv(|v| (v.max(0.0) / shape.scaling).sqrt());
    let b = &svd.u.slice(s![.., ..r]) * &root;
    let a = &svd.vt.slice(s![..r, ..]) * &root.view().insert_axis(peft_core::ndarray::Axis(1));
    removed(b, a, cx)
}

/// OLoRA (arXiv 2406.01775): W = Q R; B the first r columns of Q, A the first r rows of R.
fn olora(shape: Shape, cx: &Attach<'_>) -> Result<Start> {
    let (q, r) = linalg::qr(&weight(cx)?)?;
    removed(
        q.slice(s![.., ..shape.rank]).to_owned(),
        r.slice(s![..shape.rank, ..]).to_owned(),
        cx,
    )
}

/// Random A and B with B A = 0 from the odd and even rows of one orthogonal matrix; neither is zero, both get gradients
/// from the first step (HF's `orthogonal`).
fn orthogonal(shape: Shape, cx: &Attach<'_>) -> Result<Start> {
    let r = shape.rank;
    if r % 2 == 1 {
        return Err(Error::config(
            "r",
            format!("{r} is odd: the orthogonal start needs an even rank"),
        ));
    }
    let random = |label: &str, rows: usize, cols: usize| {
        let mut values = vec![0.0; rows * cols];
        let key: RngKey = cx.key(label);
        key.fill_normal(0.0, 1.0, &mut values);
        Array2::from_shape_vec((rows, cols), values).map_err(|e| Error::other(e.to_string()))
    };
    let (q, _) = linalg::qr(&random("orthogonal.q", r, r)?)?;
    let (even, odd) = (
        q.slice(s![..;2, ..]).to_owned(),
        q.slice(s![1..;2, ..]).to_owned(),
    );
    let a = random("orthogonal.a", shape.inside, r / 2)?
        .dot(&odd)
        .reversed_axes()
        .mapv(|v| v / 10.0);
    let b = random("orthogonal.b", shape.out, r / 2)?
        .dot(&even)
        .mapv(|v| v / 10.0);
    let to = |m| Ok::<_, Error>(Init::Value(Tensor::from_array(m, &cx.device())?));
    Ok(Start {
        a: to(a)?,
        b: to(b)?,
        removed: None,
    })
}
