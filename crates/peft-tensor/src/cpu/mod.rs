//! The processor's backend: storage that is used again, threads that stay awake for a moment, vector instructions chosen at run time.
//!
//! A result never depends on the number of threads: work is cut by shapes alone, and sums over cuts are taken
//! in their order.

mod arena;
mod attention;
mod codes;
mod dropout;
mod elementwise;
mod few;
mod frozen;
mod half;
mod loss;
mod low_rank;
mod matmul;
mod norm;
mod packed;
mod par;
mod pool;
mod rope;
mod shape;
pub(crate) mod simd;
mod source;
mod team;

use crate::backend::{Attention, Backend, Binary, Buffer, Glu, Rope, Unary};
use crate::low_rank::{LowRank, LowRankBack, LowRankGrad};
use crate::{FrozenWeight, Keep, Precision, Result, RngKey, TensorError};
use codes::Codes;
use half::Halves;
use pool::Floats;
use source::Source;

/// The processor.
pub(crate) struct CpuBackend {
    precision: Precision,
    keep: Keep,
}

impl CpuBackend {
    /// There is nothing to open.
    pub(crate) fn new(precision: Precision, keep: Keep) -> Self {
        Self { precision, keep }
    }
}

/// Bytes of a tensor of so many values that is kept in that form, with what rounding its block up adds.
pub(crate) fn kept_bytes(keep: Keep, values: usize) -> u64 {
    let places = match keep {
        Keep::F32 => values,
        Keep::Bf16 => Halves::places(values),
        Keep::Int8 => Codes::places(values),
    };
    size_of::<f32>() as u64 * pool::rounded(places) as u64
}

fn put(values: impl Into<Floats>) -> Buffer {
    Buffer::new(values.into())
}

fn get(buffer: &Buffer) -> Result<&[f32]> {
    let values = buffer.get::<Floats>();
    values.map(|v| &v[..]).ok_or_else(|| {
        TensorError::Unsupported("a tensor of another device was given to the cpu".into())
    })
}

/// Values that may be packed.
fn source(buffer: &Buffer) -> Result<Source<'_>> {
    if let Some(halves) = buffer.get::<Halves>() {
        return Ok(Source::Halves(halves));
    }
    match buffer.get::<Codes>() {
        Some(codes) => Ok(Source::Codes(codes)),
        None => Ok(Source::Whole(get(buffer)?)),
    }
}

/// The values for writing: taken over from the only holder, else copied.
fn owned(mut buffer: Buffer) -> Result<Floats> {
    match buffer.get_mut::<Floats>() {
        Some(values) => Ok(std::mem::take(values)),
        None => Ok(Floats::copied(get(&buffer)?)),
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn pack(&self, x: &Buffer) -> Option<Buffer> {
        let x = get(x).ok()?;
        match self.keep {
            Keep::F32 => None,
            Keep::Bf16 => Some(Buffer::new(Halves::pack(x))),
            Keep::Int8 => Some(Buffer::new(Codes::pack(x))),
        }
    }

    fn unpack(&self, x: &Buffer) -> Result<Buffer> {
        if let Some(halves) = x.get::<Halves>() {
            return Ok(put(halves.unpack()));
        }
        match x.get::<Codes>() {
            Some(codes) => Ok(put(codes.unpack())),
            None => Ok(x.clone()),
        }
    }

    fn make_room(&self, bytes: usize) {
        pool::make_room(bytes);
    }

    fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        Ok(put(values))
    }

    fn download(&self, x: &Buffer) -> Result<Vec<f32>> {
        Ok(get(x)?.to_vec())
    }

    fn view<'a>(&self, x: &'a Buffer) -> Option<&'a [f32]> {
        get(x).ok()
    }

    fn download_all(&self, all: Vec<Buffer>) -> Result<Vec<Vec<f32>>> {
        let one = |x: Buffer| {
            let values = self.download(&x)?;
            drop(x);
            // Copies lie outside of the pool: the memory they leave behind goes back to the system.
            self.make_room(size_of_val(&values[..]));
            Ok(values)
        };
        all.into_iter().map(one).collect()
    }

    fn download_f64(&self, x: &Buffer) -> Result<Vec<f64>> {
        Ok(get(x)?.iter().map(|v| f64::from(*v)).collect())
    }

    fn upload_f64(&self, values: Vec<f64>) -> Result<Buffer> {
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        Ok(put(values))
    }

    fn fill(&self, len: usize, value: f32) -> Result<Buffer> {
        let mut values = Floats::dirty(len);
        values.fill(value);
        Ok(put(values))
    }

    fn unary(&self, op: Unary, x: &Buffer) -> Result<Buffer> {
        Ok(put(elementwise::unary(op, get(x)?)))
    }

    fn unary_grad(&self, op: Unary, x: &Buffer, y: &Buffer, dy: &Buffer) -> Result<Buffer> {
        Ok(put(elementwise::unary_grad(op, get(x)?, get(y)?, get(dy)?)))
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
        Ok(put(elementwise::binary(
            op,
            get(a)?,
            a_shape,
            get(b)?,
            b_shape,
            out_shape,
        )))
    }

    fn affine(&self, x: &Buffer, mul: f32, add: f32) -> Result<Buffer> {
        Ok(put(elementwise::affine(get(x)?, mul, add)))
    }

    fn accumulate(&self, mut a: Buffer, b: &Buffer) -> Result<Buffer> {
        if let Some(values) = a.get_mut::<Floats>() {
            elementwise::accumulate(values, get(b)?);
            return Ok(a);
        }
        let mut values = Floats::copied(get(&a)?);
        elementwise::accumulate(&mut values, get(b)?);
        Ok(put(values))
    }

    fn glu(&self, kind: Glu, gate: &Buffer, up: &Buffer) -> Result<Buffer> {
        Ok(put(elementwise::glu(
            kind,
            Source::Whole(get(gate)?),
            Source::Whole(get(up)?),
        )))
    }

    fn glu_grad(
        &self,
        kind: Glu,
        gate: &Buffer,
        up: &Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, Buffer)> {
        let (gate, up) = (Source::Whole(get(gate)?), Source::Whole(get(up)?));
        let (dgate, dup) = elementwise::glu_grad(kind, gate, up, get(dy)?);
        Ok((put(dgate), put(dup)))
    }

    fn glu_packed(&self, kind: Glu, gate: Buffer, up: Buffer) -> Result<Buffer> {
        let (gate, up) = (source(&gate)?, source(&up)?);
        Ok(put(elementwise::glu(kind, gate, up)))
    }

    fn glu_grad_packed(
        &self,
        kind: Glu,
        gate: Buffer,
        up: Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, Buffer)> {
        let (gate, up) = (source(&gate)?, source(&up)?);
        let (dgate, dup) = elementwise::glu_grad(kind, gate, up, get(dy)?);
        Ok((put(dgate), put(dup)))
    }

    fn dropout(&self, x: &Buffer, p: f32, key: RngKey) -> Result<Buffer> {
        Ok(put(dropout::dropout(get(x)?, p, key)))
    }

    fn sum_to(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer> {
        Ok(put(shape::sum_to(get(x)?, from, to)))
    }

    fn broadcast(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer> {
        Ok(put(shape::broadcast(get(x)?, from, to)))
    }

    fn max_rows(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        Ok(put(shape::max_rows(get(x)?, rows, cols)))
    }

    fn permute(&self, x: &Buffer, shape: &[usize], axes: &[usize]) -> Result<Buffer> {
        Ok(put(shape::permute(get(x)?, shape, axes)))
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
        Ok(put(shape::narrow(get(x)?, outer, len, inner, start, take)))
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
        Ok(put(shape::narrow_grad(
            get(dy)?,
            outer,
            len,
            inner,
            start,
            take,
        )))
    }

    fn concat(&self, parts: &[(&Buffer, usize)], outer: usize, inner: usize) -> Result<Buffer> {
        let parts = parts
            .iter()
            .map(|(part, len)| Ok((get(part)?, *len)))
            .collect::<Result<Vec<_>>>()?;
        Ok(put(shape::concat(&parts, outer, inner)))
    }

    fn append(&self, a: Buffer, _a_len: usize, b: &Buffer, _b_len: usize) -> Result<Buffer> {
        let mut values = owned(a)?;
        values.append(get(b)?);
        Ok(put(values))
    }

    fn gather(&self, x: &Buffer, cols: usize, ids: &[u32]) -> Result<Buffer> {
        Ok(put(shape::gather(get(x)?, cols, ids)))
    }

    fn scatter_add(&self, dy: &Buffer, rows: usize, cols: usize, ids: &[u32]) -> Result<Buffer> {
        Ok(put(shape::scatter_add(get(dy)?, rows, cols, ids)))
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
        let into = into.map(owned).transpose()?;
        Ok(put(matmul::matmul(
            get(a)?,
            get(b)?,
            batch,
            m,
            k,
            n,
            a_batched,
            b_batched,
            ta,
            tb,
            scale,
            into,
        )))
    }

    fn frozen_matmul(
        &self,
        x: &Buffer,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        let into = into.map(owned).transpose()?;
        Ok(put(frozen::matmul(
            self.precision,
            get(x)?,
            m,
            w,
            transpose,
            packed::Low::default(),
            into,
        )))
    }

    fn frozen_matmul_low_rank(
        &self,
        x: &Buffer,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        low: &LowRank<'_>,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        if !frozen::takes_low_rank(self.precision, m, w) {
            let product = self.frozen_matmul(x, m, w, transpose, into)?;
            return low.add_to(self, m, w, transpose, product);
        }
        let low = packed::Low {
            values: get(low.low)?,
            other: get(low.other)?,
            r: low.r,
        };
        let into = into.map(owned).transpose()?;
        Ok(put(frozen::matmul(
            self.precision,
            get(x)?,
            m,
            w,
            transpose,
            low,
            into,
        )))
    }

    fn low_rank_grad(&self, back: LowRankBack<'_>) -> Result<LowRankGrad> {
        if back.r > low_rank::MOST {
            return back.by_products(self);
        }
        let (low, a, b) = low_rank::low_rank_grad(&low_rank::Back {
            dy: get(back.dy)?,
            b: get(back.b)?,
            x: back.x.as_ref().map(source).transpose()?,
            low: back.low.as_ref().map(get).transpose()?,
            m: back.m,
            inside: back.inside,
            out: back.out,
            r: back.r,
            scale: back.scale,
        });
        Ok(LowRankGrad {
            low: put(low),
            a: a.map(put),
            b: b.map(put),
        })
    }

    fn frozen_matmul_all(
        &self,
        x: &Buffer,
        m: usize,
        weights: &[&FrozenWeight],
    ) -> Result<Vec<Buffer>> {
        let products = frozen::matmul_all(self.precision, get(x)?, m, weights);
        Ok(products.into_iter().map(put).collect())
    }

    fn frozen_gather(&self, w: &FrozenWeight, ids: &[u32]) -> Result<Buffer> {
        Ok(put(frozen::gather(w, ids)))
    }

    fn frozen_dense(&self, w: &FrozenWeight) -> Result<Buffer> {
        Ok(put(frozen::dense(w)))
    }

    fn softmax(&self, x: &Buffer, _rows: usize, cols: usize) -> Result<Buffer> {
        Ok(put(norm::softmax(get(x)?, cols)))
    }

    fn softmax_grad(&self, y: &Buffer, dy: &Buffer, _rows: usize, cols: usize) -> Result<Buffer> {
        Ok(put(norm::softmax_grad(get(y)?, get(dy)?, cols)))
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        _rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer> {
        Ok(put(norm::rms_norm(get(x)?, get(w)?, cols, eps)))
    }

    fn rms_norm_grad(
        &self,
        x: &Buffer,
        w: &Buffer,
        dy: &Buffer,
        _rows: usize,
        cols: usize,
        eps: f32,
        want_w: bool,
    ) -> Result<(Buffer, Option<Buffer>)> {
        let (dx, dw) = norm::rms_norm_grad(get(x)?, get(w)?, get(dy)?, cols, eps, want_w);
        Ok((put(dx), dw.map(put)))
    }

    fn layer_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        b: Option<&Buffer>,
        _rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer> {
        let b = b.map(get).transpose()?;
        Ok(put(norm::layer_norm(get(x)?, get(w)?, b, cols, eps)))
    }

    fn layer_norm_grad(
        &self,
        x: &Buffer,
        w: &Buffer,
        dy: &Buffer,
        _rows: usize,
        cols: usize,
        eps: f32,
        want_wb: bool,
    ) -> Result<(Buffer, Option<(Buffer, Buffer)>)> {
        let (dx, dwb) = norm::layer_norm_grad(get(x)?, get(w)?, get(dy)?, cols, eps, want_wb);
        Ok((put(dx), dwb.map(|(dw, db)| (put(dw), put(db)))))
    }

    fn rope(&self, x: &Buffer, rope: &Rope, inverse: bool) -> Result<Buffer> {
        Ok(put(rope::rope(get(x)?, rope, inverse)))
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
        let (out, lse) =
            attention::attention(self.precision, get(q)?, get(k)?, get(v)?, b, s, t, spec);
        Ok((put(out), put(lse)))
    }

    fn attention_grad(
        &self,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        out: &Buffer,
        lse: &Buffer,
        dout: &Buffer,
        b: usize,
        s: usize,
        t: usize,
        spec: &Attention,
    ) -> Result<(Buffer, Buffer, Buffer)> {
        let (dq, dk, dv) = attention::attention_grad(
            self.precision,
            get(q)?,
            get(k)?,
            get(v)?,
            get(out)?,
            get(lse)?,
            get(dout)?,
            b,
            s,
            t,
            spec,
        );
        Ok((put(dq), put(dk), put(dv)))
    }

    fn cross_entropy(
        &self,
        x: &Buffer,
        targets: &[i64],
        rows: usize,
        cols: usize,
    ) -> Result<(Buffer, Buffer)> {
        self.cross_entropy_owned(put(Floats::copied(get(x)?)), targets, rows, cols)
    }

    fn cross_entropy_owned(
        &self,
        x: Buffer,
        targets: &[i64],
        _rows: usize,
        cols: usize,
    ) -> Result<(Buffer, Buffer)> {
        let mut x = owned(x)?;
        let loss = loss::cross_entropy(&mut x, targets, cols);
        Ok((put(vec![loss]), put(x)))
    }
}
