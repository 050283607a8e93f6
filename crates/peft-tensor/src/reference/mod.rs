//! Every operation as the plainest loop that computes it, in f64: slow, obviously right, for tests.
//!
//! Nothing here is shared with the processor's backend, so that a mistake there has no twin here.

mod layers;

use crate::backend::{Attention, Backend, Binary, Buffer, Glu, Rope, Unary};
use crate::{FrozenWeight, Result, RngKey, TensorError};

/// Plain loops.
pub(crate) struct ReferenceBackend;

/// What a test runs on, where `name` has opened; None, said so that nobody overlooks it, where it has not.
///
/// # Panics
/// If it has not, and `PEFT_REQUIRE_GPU` is 1.
pub fn tested<T>(name: &str, opened: Result<T>) -> Option<T> {
    let why = match opened {
        Ok(device) => return Some(device),
        Err(why) => why,
    };
    let required = std::env::var("PEFT_REQUIRE_GPU").is_ok_and(|v| v == "1");
    assert!(
        !required,
        "PEFT_REQUIRE_GPU=1, and {name} does not open: {why}"
    );
    eprintln!("NOTHING IS TESTED ON {name}: {why}");
    None
}

fn put(values: Vec<f64>) -> Buffer {
    Buffer::new(values)
}

fn get(buffer: &Buffer) -> Result<&[f64]> {
    let values = buffer.get::<Vec<f64>>().map(Vec::as_slice);
    values.ok_or_else(|| {
        TensorError::Unsupported("a tensor of another device was given to the reference".into())
    })
}

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The standard normal distribution function.
fn phi(x: f64) -> f64 {
    0.5 * (1.0 + libm::erf(x / 2f64.sqrt()))
}

fn gelu_tanh_inner(x: f64) -> f64 {
    ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()
}

fn value(op: Unary, x: f64) -> f64 {
    match op {
        Unary::Neg => -x,
        Unary::Exp => x.exp(),
        Unary::Ln => x.ln(),
        Unary::Sqrt => x.sqrt(),
        Unary::Rsqrt => 1.0 / x.sqrt(),
        Unary::Recip => 1.0 / x,
        Unary::Square => x * x,
        Unary::Abs => x.abs(),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => sigmoid(x),
        Unary::Relu => {
            if x > 0.0 {
                x
            } else {
                0.0
            }
        }
        Unary::Silu => x * sigmoid(x),
        Unary::Gelu => x * phi(x),
        Unary::GeluTanh => 0.5 * x * (1.0 + gelu_tanh_inner(x)),
        Unary::Sin => x.sin(),
        Unary::Cos => x.cos(),
    }
}

fn slope(op: Unary, x: f64) -> f64 {
    match op {
        Unary::Neg => -1.0,
        Unary::Exp => x.exp(),
        Unary::Ln => 1.0 / x,
        Unary::Sqrt => 0.5 / x.sqrt(),
        Unary::Rsqrt => -0.5 * x.powf(-1.5),
        Unary::Recip => -1.0 / (x * x),
        Unary::Square => 2.0 * x,
        Unary::Abs => {
            if x == 0.0 {
                0.0
            } else {
                x.signum()
            }
        }
        Unary::Tanh => 1.0 - x.tanh().powi(2),
        Unary::Sigmoid => sigmoid(x) * (1.0 - sigmoid(x)),
        Unary::Relu => {
            if x > 0.0 {
                1.0
            } else {
                0.0
            }
        }
        Unary::Silu => sigmoid(x) + x * sigmoid(x) * (1.0 - sigmoid(x)),
        Unary::Gelu => phi(x) + x * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt(),
        Unary::GeluTanh => {
            let t = gelu_tanh_inner(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
        }
        Unary::Sin => x.cos(),
        Unary::Cos => -x.sin(),
    }
}

/// The gate's function.
fn act(kind: Glu) -> Unary {
    match kind {
        Glu::Silu => Unary::Silu,
        Glu::Gelu => Unary::Gelu,
        Glu::GeluTanh => Unary::GeluTanh,
    }
}

/// Where element `index` of `shape` lies in an array of `arg` that broadcasts to it.
fn locate(index: usize, shape: &[usize], arg: &[usize]) -> usize {
    let (mut index, mut step, mut at) = (index, 1, 0);
    for d in (0..shape.len()).rev() {
        if arg[d] != 1 {
            at += index % shape[d] * step;
        }
        index /= shape[d];
        step *= arg[d];
    }
    at
}

fn decoded(w: &FrozenWeight) -> Vec<f64> {
    let mut values = vec![0.0; w.rows() * w.cols()];
    for row in 0..w.rows() {
        w.decode_rows(
            row..row + 1,
            &mut values[row * w.cols()..(row + 1) * w.cols()],
        );
    }
    to_f64(&values)
}

/// `op(a) [m, k] x op(b) [k, n]`
fn product(a: &[f64], b: &[f64], m: usize, k: usize, n: usize, ta: bool, tb: bool) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                let a = a[if ta { l * m + i } else { i * k + l }];
                let b = b[if tb { j * k + l } else { l * n + j }];
                out[i * n + j] += a * b;
            }
        }
    }
    out
}

/// values + into
fn added(mut values: Vec<f64>, into: Option<Buffer>) -> Result<Buffer> {
    if let Some(into) = &into {
        for (value, into) in values.iter_mut().zip(get(into)?) {
            *value += into;
        }
    }
    Ok(put(values))
}

impl Backend for ReferenceBackend {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        Ok(put(to_f64(&values)))
    }

    fn download(&self, x: &Buffer) -> Result<Vec<f32>> {
        Ok(get(x)?.iter().map(|v| *v as f32).collect())
    }

    fn download_f64(&self, x: &Buffer) -> Result<Vec<f64>> {
        Ok(get(x)?.to_vec())
    }

    fn upload_f64(&self, values: Vec<f64>) -> Result<Buffer> {
        Ok(put(values))
    }

    fn fill(&self, len: usize, value: f32) -> Result<Buffer> {
        Ok(put(vec![f64::from(value); len]))
    }

    fn unary(&self, op: Unary, x: &Buffer) -> Result<Buffer> {
        Ok(put(get(x)?.iter().map(|x| value(op, *x)).collect()))
    }

    fn unary_grad(&self, op: Unary, x: &Buffer, _y: &Buffer, dy: &Buffer) -> Result<Buffer> {
        Ok(put(get(x)?
            .iter()
            .zip(get(dy)?)
            .map(|(x, d)| d * slope(op, *x))
            .collect()))
    }

    fn binary(
        &self,
        op: Binary,
        a: &Buffer,
        a_shape: &[usize],
        b: &Buffer,
        b_shape: &[usize],
        out_shape: &[usize],
    ) -> Result<Buffer> {
        let (a, b) = (get(a)?, get(b)?);
        let one = |i| {
            let (a, b) = (
                a[locate(i, out_shape, a_shape)],
                b[locate(i, out_shape, b_shape)],
            );
            match op {
                Binary::Add => a + b,
                Binary::Sub => a - b,
                Binary::Mul => a * b,
                Binary::Div => a / b,
            }
        };
        Ok(put((0..out_shape.iter().product()).map(one).collect()))
    }

    fn affine(&self, x: &Buffer, mul: f32, add: f32) -> Result<Buffer> {
        Ok(put(get(x)?
            .iter()
            .map(|x| f64::from(mul) * x + f64::from(add))
            .collect()))
    }

    fn accumulate(&self, a: Buffer, b: &Buffer) -> Result<Buffer> {
        Ok(put(get(&a)?
            .iter()
            .zip(get(b)?)
            .map(|(a, b)| a + b)
            .collect()))
    }

    fn glu(&self, kind: Glu, gate: &Buffer, up: &Buffer) -> Result<Buffer> {
        Ok(put(get(gate)?
            .iter()
            .zip(get(up)?)
            .map(|(g, u)| value(act(kind), *g) * u)
            .collect()))
    }

    fn glu_grad(
        &self,
        kind: Glu,
        gate: &Buffer,
        up: &Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, Buffer)> {
        let (gate, up, dy) = (get(gate)?, get(up)?, get(dy)?);
        let dgate = (0..gate.len())
            .map(|i| dy[i] * up[i] * slope(act(kind), gate[i]))
            .collect();
        let dup = (0..gate.len())
            .map(|i| dy[i] * value(act(kind), gate[i]))
            .collect();
        Ok((put(dgate), put(dup)))
    }

    fn dropout(&self, x: &Buffer, p: f32, key: RngKey) -> Result<Buffer> {
        let one = |(i, x): (usize, &f64)| {
            if key.uniform_at(i as u64) >= p {
                x / (1.0 - f64::from(p))
            } else {
                0.0
            }
        };
        Ok(put(get(x)?.iter().enumerate().map(one).collect()))
    }

    fn sum_to(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer> {
        let mut out = vec![0.0; to.iter().product()];
        for (i, x) in get(x)?.iter().enumerate() {
            out[locate(i, from, to)] += x;
        }
        Ok(put(out))
    }

    fn broadcast(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer> {
        let x = get(x)?;
        Ok(put((0..to.iter().product())
            .map(|i| x[locate(i, to, from)])
            .collect()))
    }

    fn max_rows(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        let x = get(x)?;
        let largest = |row: &[f64]| {
            row.iter().fold(
                f64::NEG_INFINITY,
                |m, v| if *v > m || v.is_nan() { *v } else { m },
            )
        };
        Ok(put((0..rows)
            .map(|r| largest(&x[r * cols..(r + 1) * cols]))
            .collect()))
    }

    fn permute(&self, x: &Buffer, shape: &[usize], axes: &[usize]) -> Result<Buffer> {
        let x = get(x)?;
        let mut out = vec![0.0; x.len()];
        for (i, x) in x.iter().enumerate() {
            // The coordinates of element i, then their place with the axes in the new order.
            let (mut rest, mut coordinates) = (i, vec![0; shape.len()]);
            for d in (0..shape.len()).rev() {
                coordinates[d] = rest % shape[d];
                rest /= shape[d];
            }
            let at = axes
                .iter()
                .fold(0, |at, axis| at * shape[*axis] + coordinates[*axis]);
            out[at] = *x;
        }
        Ok(put(out))
    }

    fn narrow(
        &self,
        x: &Buffer,
        outer: usize,
        len: usize,
        inner: usize,
        start: usize,
        take: usize,
    ) -> Result<Buffer> {
        let x = get(x)?;
        let mut out = vec![0.0; outer * take * inner];
        for o in 0..outer {
            for l in 0..take {
                for i in 0..inner {
                    out[(o * take + l) * inner + i] = x[(o * len + start + l) * inner + i];
                }
            }
        }
        Ok(put(out))
    }

    fn narrow_grad(
        &self,
        dy: &Buffer,
        outer: usize,
        len: usize,
        inner: usize,
        start: usize,
        take: usize,
    ) -> Result<Buffer> {
        let dy = get(dy)?;
        let mut out = vec![0.0; outer * len * inner];
        for o in 0..outer {
            for l in 0..take {
                for i in 0..inner {
                    out[(o * len + start + l) * inner + i] = dy[(o * take + l) * inner + i];
                }
            }
        }
        Ok(put(out))
    }

    fn concat(&self, parts: &[(&Buffer, usize)], outer: usize, inner: usize) -> Result<Buffer> {
        let mut out = Vec::new();
        for o in 0..outer {
            for (part, len) in parts {
                out.extend_from_slice(&get(part)?[o * len * inner..(o + 1) * len * inner]);
            }
        }
        Ok(put(out))
    }

    fn gather(&self, x: &Buffer, cols: usize, ids: &[u32]) -> Result<Buffer> {
        let x = get(x)?;
        Ok(put(ids
            .iter()
            .flat_map(|id| x[*id as usize * cols..][..cols].to_vec())
            .collect()))
    }

    fn scatter_add(&self, dy: &Buffer, rows: usize, cols: usize, ids: &[u32]) -> Result<Buffer> {
        let dy = get(dy)?;
        let mut out = vec![0.0; rows * cols];
        for (i, id) in ids.iter().enumerate() {
            for c in 0..cols {
                out[*id as usize * cols + c] += dy[i * cols + c];
            }
        }
        Ok(put(out))
    }

    fn matmul(
        &self,
        a: &Buffer,
        b: &Buffer,
        batch: usize,
        m: usize,
        k: usize,
        n: usize,
        a_batched: bool,
        b_batched: bool,
        ta: bool,
        tb: bool,
        scale: f32,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        let (a, b) = (get(a)?, get(b)?);
        let entry = |i: usize| {
            let a = &a[if a_batched { i * m * k } else { 0 }..][..m * k];
            let b = &b[if b_batched { i * k * n } else { 0 }..][..k * n];
            product(a, b, m, k, n, ta, tb)
        };
        let product: Vec<f64> = (0..batch).flat_map(entry).collect();
        added(product.iter().map(|p| f64::from(scale) * p).collect(), into)
    }

    fn frozen_matmul(
        &self,
        x: &Buffer,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        let (k, n) = if transpose {
            (w.cols(), w.rows())
        } else {
            (w.rows(), w.cols())
        };
        added(
            product(get(x)?, &decoded(w), m, k, n, false, transpose),
            into,
        )
    }

    fn frozen_gather(&self, w: &FrozenWeight, ids: &[u32]) -> Result<Buffer> {
        let (all, cols) = (decoded(w), w.cols());
        Ok(put(ids
            .iter()
            .flat_map(|id| all[*id as usize * cols..][..cols].to_vec())
            .collect()))
    }

    fn frozen_dense(&self, w: &FrozenWeight) -> Result<Buffer> {
        Ok(put(decoded(w)))
    }

    fn softmax(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        Ok(put(layers::softmax(get(x)?, rows, cols)))
    }

    fn softmax_grad(&self, y: &Buffer, dy: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        Ok(put(layers::softmax_grad(get(y)?, get(dy)?, rows, cols)))
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer> {
        Ok(put(layers::norm(
            get(x)?,
            get(w)?,
            None,
            rows,
            cols,
            eps,
            false,
        )))
    }

    fn rms_norm_grad(
        &self,
        x: &Buffer,
        w: &Buffer,
        dy: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
        want_w: bool,
    ) -> Result<(Buffer, Option<Buffer>)> {
        let (dx, dw, _) = layers::norm_grad(get(x)?, get(w)?, get(dy)?, rows, cols, eps, false);
        Ok((put(dx), want_w.then(|| put(dw))))
    }

    fn layer_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        b: Option<&Buffer>,
        rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer> {
        let b = b.map(get).transpose()?;
        Ok(put(layers::norm(
            get(x)?,
            get(w)?,
            b,
            rows,
            cols,
            eps,
            true,
        )))
    }

    fn layer_norm_grad(
        &self,
        x: &Buffer,
        w: &Buffer,
        dy: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
        want_wb: bool,
    ) -> Result<(Buffer, Option<(Buffer, Buffer)>)> {
        let (dx, dw, db) = layers::norm_grad(get(x)?, get(w)?, get(dy)?, rows, cols, eps, true);
        Ok((put(dx), want_wb.then(|| (put(dw), put(db)))))
    }

    fn rope(&self, x: &Buffer, rope: &Rope, inverse: bool) -> Result<Buffer> {
        Ok(put(layers::rope(get(x)?, rope, inverse)))
    }

    fn attention(
        &self,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        b: usize,
        s: usize,
        t: usize,
        spec: &Attention,
    ) -> Result<(Buffer, Buffer)> {
        let (out, lse) = layers::attention(get(q)?, get(k)?, get(v)?, b, s, t, spec);
        Ok((put(out), put(lse)))
    }

    fn attention_grad(
        &self,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        _out: &Buffer,
        _lse: &Buffer,
        dout: &Buffer,
        b: usize,
        s: usize,
        t: usize,
        spec: &Attention,
    ) -> Result<(Buffer, Buffer, Buffer)> {
        let (dq, dk, dv) =
            layers::attention_grad(get(q)?, get(k)?, get(v)?, get(dout)?, b, s, t, spec);
        Ok((put(dq), put(dk), put(dv)))
    }

    fn cross_entropy(
        &self,
        x: &Buffer,
        targets: &[i64],
        rows: usize,
        cols: usize,
    ) -> Result<(Buffer, Buffer)> {
        let (loss, dx) = layers::cross_entropy(get(x)?, targets, rows, cols);
        Ok((put(vec![loss]), put(dx)))
    }
}
