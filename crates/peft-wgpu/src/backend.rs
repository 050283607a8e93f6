//! The [`Backend`] over [`Gpu`]: buffers unpacked, results wrapped.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use peft_tensor::{
    AdamWState, Attention, Backend, Binary, Buffer, FrozenWeight, Glu, Keep, KernelSpeed,
    Precision, Result, RngKey, Rope, Unary,
};

use crate::adamw::Flat;
use crate::attention::Sizes;
use crate::elementwise::Halves;
use crate::gpu::Gpu;
use crate::layers::Norm;
use crate::matmul::Product;
use crate::memory::{Data, get};

/// A graphics card as a backend.
pub struct WgpuBackend {
    gpu: Arc<Gpu>,
    precision: Precision,
    keep: Keep,
}

impl WgpuBackend {
    pub(crate) fn new(gpu: Arc<Gpu>, precision: Precision, keep: Keep) -> Self {
        Self {
            gpu,
            precision,
            keep,
        }
    }
}

fn put(data: Data) -> Buffer {
    Buffer::new(data)
}

impl Backend for WgpuBackend {
    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn kernel_speeds(&self, size: usize) -> Result<Vec<KernelSpeed>> {
        self.gpu.kernel_speeds(size)
    }

    fn pack(&self, x: &Buffer) -> Option<Buffer> {
        if self.keep == Keep::F32 {
            return None;
        }
        // An activation that cannot be packed is kept as it is; what is wrong with it shows at its next use.
        let halves = self.gpu.halves(get(x).ok()?).ok()?;
        Some(Buffer::new(halves))
    }

    fn unpack(&self, x: &Buffer) -> Result<Buffer> {
        match x.get::<Halves>() {
            Some(halves) => self.gpu.whole(halves).map(put),
            None => Ok(x.clone()),
        }
    }

    fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        self.gpu.put(&values).map(put)
    }

    fn download(&self, x: &Buffer) -> Result<Vec<f32>> {
        self.gpu.download(get(x)?)
    }

    fn download_all(&self, all: Vec<Buffer>) -> Result<Vec<Vec<f32>>> {
        let all: Result<Vec<&Data>> = all.iter().map(get).collect();
        self.gpu.download_all(&all?)
    }

    fn download_f64(&self, x: &Buffer) -> Result<Vec<f64>> {
        Ok(self.download(x)?.into_iter().map(f64::from).collect())
    }

    fn upload_f64(&self, values: Vec<f64>) -> Result<Buffer> {
        self.upload(values.into_iter().map(|v| v as f32).collect())
    }

    fn fill(&self, len: usize, value: f32) -> Result<Buffer> {
        match len {
            1 => self.gpu.number(value).map(put),
            _ => self.gpu.fill(len, value).map(put),
        }
    }

    fn hand_over(&self) -> Result<()> {
        self.gpu.flush()
    }

    fn waits(&self) -> Option<u64> {
        Some(self.gpu.pool.waits.load(Ordering::Relaxed))
    }

    fn has_adamw(&self) -> bool {
        true
    }

    fn adamw(&self, sizes: &[usize]) -> Result<Option<Box<dyn AdamWState>>> {
        let flat = Flat::new(self.gpu.clone(), sizes)?;
        Ok(Some(Box::new(flat)))
    }

    fn unary(&self, op: Unary, x: &Buffer) -> Result<Buffer> {
        self.gpu.unary(op, get(x)?).map(put)
    }

    fn unary_grad(&self, op: Unary, x: &Buffer, y: &Buffer, dy: &Buffer) -> Result<Buffer> {
        self.gpu.unary_grad(op, get(x)?, get(y)?, get(dy)?).map(put)
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
        let (a, b) = ((get(a)?, a_shape), (get(b)?, b_shape));
        self.gpu.binary(op, a, b, out_shape).map(put)
    }

    fn affine(&self, x: &Buffer, mul: f32, add: f32) -> Result<Buffer> {
        self.gpu.affine(get(x)?, mul, add).map(put)
    }

    fn accumulate(&self, a: Buffer, b: &Buffer) -> Result<Buffer> {
        self.gpu.accumulate(a, get(b)?)
    }

    fn glu(&self, kind: Glu, gate: &Buffer, up: &Buffer) -> Result<Buffer> {
        self.gpu.glu(kind, get(gate)?, get(up)?).map(put)
    }

    fn glu_grad(
        &self,
        kind: Glu,
        gate: &Buffer,
        up: &Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, Buffer)> {
        let (dgate, dup) = self.gpu.glu_grad(kind, get(gate)?, get(up)?, get(dy)?)?;
        Ok((put(dgate), put(dup)))
    }

    fn dropout(&self, x: &Buffer, p: f32, key: RngKey) -> Result<Buffer> {
        self.gpu.dropout(get(x)?, p, key).map(put)
    }

    fn sum_to(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer> {
        self.gpu.sum_to(get(x)?, from, to).map(put)
    }

    fn broadcast(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer> {
        self.gpu.broadcast(get(x)?, from, to).map(put)
    }

    fn max_rows(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        self.gpu.max_rows(get(x)?, rows, cols).map(put)
    }

    fn permute(&self, x: &Buffer, shape: &[usize], axes: &[usize]) -> Result<Buffer> {
        self.gpu.permute(get(x)?, shape, axes).map(put)
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
        let sizes = [outer, len, inner];
        self.gpu.narrow(get(x)?, sizes, start, take).map(put)
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
        let sizes = [outer, len, inner];
        self.gpu.narrow_grad(get(dy)?, sizes, start, take).map(put)
    }

    fn concat(&self, parts: &[(&Buffer, usize)], outer: usize, inner: usize) -> Result<Buffer> {
        let parts: Result<Vec<_>> = parts.iter().map(|(x, len)| Ok((get(x)?, *len))).collect();
        self.gpu.concat(&parts?, outer, inner).map(put)
    }

    fn gather(&self, x: &Buffer, cols: usize, ids: &[u32]) -> Result<Buffer> {
        self.gpu.gather(get(x)?, cols, ids).map(put)
    }

    fn scatter_add(&self, dy: &Buffer, rows: usize, cols: usize, ids: &[u32]) -> Result<Buffer> {
        self.gpu.scatter_add(get(dy)?, rows, cols, ids).map(put)
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
        let product = Product {
            batch,
            m,
            k,
            n,
            a_batched,
            b_batched,
            ta,
            tb,
            scale,
            half: self.precision == Precision::Bf16,
        };
        self.gpu.matmul(get(a)?, get(b)?, product, into)
    }

    fn frozen_matmul(
        &self,
        x: &Buffer,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        self.gpu
            .frozen_matmul(get(x)?, m, w, self.precision, transpose, into)
    }

    fn frozen_gather(&self, w: &FrozenWeight, ids: &[u32]) -> Result<Buffer> {
        self.gpu.frozen_gather(w, self.precision, ids).map(put)
    }

    fn frozen_dense(&self, w: &FrozenWeight) -> Result<Buffer> {
        self.gpu.frozen_dense(w, self.precision).map(put)
    }

    fn softmax(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        self.gpu.softmax(get(x)?, rows, cols).map(put)
    }

    fn softmax_grad(&self, y: &Buffer, dy: &Buffer, rows: usize, cols: usize) -> Result<Buffer> {
        self.gpu
            .softmax_grad(get(y)?, get(dy)?, rows, cols)
            .map(put)
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer> {
        let norm = norm(rows, cols, eps, false);
        self.gpu.norm(get(x)?, get(w)?, None, norm).map(put)
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
        let norm = norm(rows, cols, eps, false);
        let (dx, sums) = self
            .gpu
            .norm_grad(get(x)?, get(w)?, get(dy)?, norm, want_w)?;
        Ok((put(dx), sums.map(|(dw, _)| put(dw))))
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
        let norm = norm(rows, cols, eps, true);
        self.gpu.norm(get(x)?, get(w)?, b, norm).map(put)
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
        let norm = norm(rows, cols, eps, true);
        let (dx, sums) = self
            .gpu
            .norm_grad(get(x)?, get(w)?, get(dy)?, norm, want_wb)?;
        Ok((put(dx), sums.map(|(dw, db)| (put(dw), put(db)))))
    }

    fn rope(&self, x: &Buffer, rope: &Rope, inverse: bool) -> Result<Buffer> {
        self.gpu.rope(get(x)?, rope, inverse).map(put)
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
        let qkv = [get(q)?, get(k)?, get(v)?];
        let (out, lse) = self.gpu.attention(qkv, Sizes { b, s, t }, spec)?;
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
        let qkv = [get(q)?, get(k)?, get(v)?];
        let result = [get(out)?, get(lse)?, get(dout)?];
        let sizes = Sizes { b, s, t };
        let (dq, dk, dv) = self.gpu.attention_grad(qkv, result, sizes, spec)?;
        Ok((put(dq), put(dk), put(dv)))
    }

    fn cross_entropy(
        &self,
        x: &Buffer,
        targets: &[i64],
        rows: usize,
        cols: usize,
    ) -> Result<(Buffer, Buffer)> {
        let (loss, dx) = self.gpu.cross_entropy(get(x)?, targets, rows, cols)?;
        Ok((put(loss), put(dx)))
    }
}

fn norm(rows: usize, cols: usize, eps: f32, centre: bool) -> Norm {
    Norm {
        rows,
        cols,
        centre,
        eps,
    }
}
