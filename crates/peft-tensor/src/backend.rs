//! The closed set of operations a device implements.
//!
//! A backend works on opaque [`Buffer`]s: contiguous, row-major, shapes passed beside them. Shapes are checked
//! by [`crate::Tensor`] before a backend is called, so an implementation may index freely. Values are f32 by
//! contract; the reference backend keeps f64 inside its buffers, which is why nothing outside looks into one.
//! Every operation that has a gradient has it here too, either as an operation of its own (`*_grad`) or because
//! it is made of the others.

use std::any::Any;
use std::sync::Arc;

use crate::adamw::AdamWState;
use crate::late::Late;
use crate::low_rank::{LowRank, LowRankBack, LowRankGrad};
use crate::{FrozenWeight, Precision, Result, RngKey};

/// Device memory: whatever the backend put in, shared and immutable.
#[derive(Clone)]
pub struct Buffer(Arc<dyn Any + Send + Sync>);

impl Buffer {
    /// Wraps a backend's own storage.
    pub fn new<T: Any + Send + Sync>(value: T) -> Self {
        Self(Arc::new(value))
    }

    /// The storage, if it is a `T`; a backend asks for its own type.
    pub fn get<T: Any + Send + Sync>(&self) -> Option<&T> {
        match self.0.downcast_ref::<Late>() {
            Some(late) => late.read()?.get(),
            None => self.0.downcast_ref(),
        }
    }

    /// Whether it is made when it is read, and nobody has.
    pub(crate) fn is_late(&self) -> bool {
        let late = self.0.downcast_ref::<Late>();
        late.is_some_and(|late| !late.is_made())
    }

    /// How many there are of it.
    #[cfg(test)]
    pub(crate) fn holders(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// The storage for writing, if it is a `T` and nobody else holds it.
    pub fn get_mut<T: Any + Send + Sync>(&mut self) -> Option<&mut T> {
        let storage = Arc::get_mut(&mut self.0)?;
        if storage.is::<Late>() {
            return storage.downcast_mut::<Late>()?.read_mut()?.get_mut();
        }
        storage.downcast_mut()
    }
}

/// Elementwise functions of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    /// -x
    Neg,
    /// e^x
    Exp,
    /// ln x
    Ln,
    /// sqrt x
    Sqrt,
    /// 1 / sqrt x
    Rsqrt,
    /// 1 / x
    Recip,
    /// x^2
    Square,
    /// |x|, with gradient 0 at 0
    Abs,
    /// hyperbolic tangent
    Tanh,
    /// 1 / (1 + e^-x)
    Sigmoid,
    /// max(x, 0)
    Relu,
    /// x sigmoid(x)
    Silu,
    /// x Phi(x) with the error function (HF `gelu`)
    Gelu,
    /// the tanh approximation (HF `gelu_new`, `gelu_pytorch_tanh`)
    GeluTanh,
    /// sin x
    Sin,
    /// cos x
    Cos,
}

impl Unary {
    /// Every function, for tests that go through all of them.
    pub const ALL: [Self; 16] = [
        Self::Neg,
        Self::Exp,
        Self::Ln,
        Self::Sqrt,
        Self::Rsqrt,
        Self::Recip,
        Self::Square,
        Self::Abs,
        Self::Tanh,
        Self::Sigmoid,
        Self::Relu,
        Self::Silu,
        Self::Gelu,
        Self::GeluTanh,
        Self::Sin,
        Self::Cos,
    ];
}

impl Unary {
    /// Whether the derivative is computed from the result; otherwise from the argument alone.
    pub(crate) fn slope_needs_output(self) -> bool {
        matches!(
            self,
            Self::Exp | Self::Sqrt | Self::Rsqrt | Self::Recip | Self::Tanh | Self::Sigmoid
        )
    }
}

/// Elementwise functions of two arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a * b
    Mul,
    /// a / b
    Div,
}

/// The gate of a gated linear unit: `act(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glu {
    /// silu(gate) * up (Llama, Mistral, Qwen)
    Silu,
    /// gelu_tanh(gate) * up (Gemma)
    GeluTanh,
    /// gelu(gate) * up
    Gelu,
}

/// Which keys a query may see, beyond causality.
#[derive(Clone, Debug, Default)]
pub struct Mask {
    /// Per row of the batch and key position, `[B * T]`: true = may be seen. None = all.
    pub keys: Option<Arc<Vec<bool>>>,
    /// Per row of the batch and key position, `[B * T]`: a query sees only keys of its own run of equal numbers, as where
    /// several texts share a row. None = one run. Keys of the prefix are outside of this rule too.
    pub segments: Option<Arc<Vec<u32>>>,
}

/// Multi-head attention with grouped queries.
///
/// q `[B, S, heads * head_dim]`, k and v `[B, T, kv_heads * head_dim]`, output as q. T >= S; the last query
/// is aligned with the last key, so query i sees key j only if `j <= i + T - S` when `causal`, and only if
/// `j > i + T - S - window` where a window is set; the first `prefix` keys are outside of both rules (they are
/// always seen). A row that sees nothing gets zeros.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on q k before the softmax.
    pub scale: f32,
    /// Whether a query is kept from seeing later keys.
    pub causal: bool,
    /// Sliding window (Mistral, Gemma 2): how many keys back a query sees, itself included.
    pub window: Option<usize>,
    /// Keys at the front that every query sees (prefix tuning), whatever the window and the segments.
    pub prefix: usize,
    /// Keys behind the prefix that segments do not hide: the beginning that the texts of a row have in common. Not where
    /// a window is set.
    pub shared: usize,
    /// Gemma 2's `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
    /// Padding.
    pub mask: Mask,
}

/// Rotary position embedding in the half-split layout of HF models (`rotate_half`).
#[derive(Clone, Debug)]
pub struct Rope {
    /// Heads in the last dimension.
    pub heads: usize,
    /// Width of one head; the first `2 * half` of it are rotated, the rest passes through.
    pub head_dim: usize,
    /// Rotated pairs of a head: element j turns with element j + half.
    pub half: usize,
    /// `[positions, half]`
    pub cos: Arc<Vec<f32>>,
    /// `[positions, half]`
    pub sin: Arc<Vec<f32>>,
    /// For each token of `[B * S]`, its row of the tables.
    pub positions: Arc<Vec<u32>>,
}

/// A measured kernel.
#[derive(Clone, Debug)]
pub struct KernelSpeed {
    /// Which, and of what.
    pub kernel: String,
    /// How fast, in `unit`.
    pub speed: f64,
    /// `GFLOP/s`, multiplications and additions, or `GB/s`, bytes read.
    pub unit: &'static str,
    /// What the device did at most in the same run, in `unit`.
    pub peak: f64,
}

/// What a device can do. Shapes are in elements; `rows` and `cols` describe a buffer as `[rows, cols]`.
pub trait Backend: Send + Sync {
    /// The name users give with `--device`.
    fn name(&self) -> &'static str;

    // --- memory ---
    /// Values onto the device.
    fn upload(&self, values: Vec<f32>) -> Result<Buffer>;
    /// Values back.
    fn download(&self, x: &Buffer) -> Result<Vec<f32>>;
    /// Values of many buffers back, each given up as soon as it is read; a device that has to be waited for is waited for once.
    fn download_all(&self, all: Vec<Buffer>) -> Result<Vec<Vec<f32>>> {
        all.into_iter().map(|x| self.download(&x)).collect()
    }
    /// Values back in double precision (the reference backend's true values; others convert).
    fn download_f64(&self, x: &Buffer) -> Result<Vec<f64>>;
    /// The values where they are, if that is memory of the process.
    fn view<'a>(&self, _x: &'a Buffer) -> Option<&'a [f32]> {
        None
    }
    /// Values in double precision onto the device (rounded where it keeps f32).
    fn upload_f64(&self, values: Vec<f64>) -> Result<Buffer>;
    /// `len` times `value`.
    fn fill(&self, len: usize, value: f32) -> Result<Buffer>;

    /// What it keeps large values in.
    fn precision(&self) -> Precision {
        Precision::F32
    }

    /// How fast the kernels are that products have to choose from, at `size x size`, beside what the device can do; none
    /// where there is nothing to choose.
    ///
    /// # Errors
    /// Whatever the device says.
    fn kernel_speeds(&self, _size: usize) -> Result<Vec<KernelSpeed>> {
        Ok(Vec::new())
    }
    /// A smaller form of `x` to keep until the backward pass; None = as it is.
    fn pack(&self, _x: &Buffer) -> Option<Buffer> {
        None
    }
    /// What [`Backend::pack`] packed, in its usual form.
    fn unpack(&self, x: &Buffer) -> Result<Buffer> {
        Ok(x.clone())
    }

    /// Gives about so many bytes of memory that it holds but does not use back to the system, where there are: the caller is
    /// about to take them.
    fn make_room(&self, _bytes: usize) {}

    // --- work that goes on by itself ---
    /// Has the device begin with whatever is recorded, without waiting for it: a training step is complete.
    fn hand_over(&self) -> Result<()> {
        Ok(())
    }
    /// How often somebody has waited for the device so far; None if its values are there when an operation returns, so that
    /// asking for them costs nothing.
    fn waits(&self) -> Option<u64> {
        None
    }
    /// Whether it moves parameters itself: [`Backend::adamw`] gives moments.
    fn has_adamw(&self) -> bool {
        false
    }
    /// Moments of AdamW for parameters of these numbers of values; None = the processor moves the parameters.
    fn adamw(&self, _sizes: &[usize]) -> Result<Option<Box<dyn AdamWState>>> {
        Ok(None)
    }

    // --- elementwise ---
    /// f(x)
    fn unary(&self, op: Unary, x: &Buffer) -> Result<Buffer>;
    /// dy f'(x); y = f(x) is given because some derivatives are cheaper from it.
    fn unary_grad(&self, op: Unary, x: &Buffer, y: &Buffer, dy: &Buffer) -> Result<Buffer>;
    /// a f b, broadcasting numpy's way; `a_shape`, `b_shape` and `out_shape` have the same rank (padded with 1 in front).
    fn binary(
        &self,
        op: Binary,
        a: &Buffer,
        a_shape: &[usize],
        b: &Buffer,
        b_shape: &[usize],
        out_shape: &[usize],
    ) -> Result<Buffer>;
    /// mul * x + add
    fn affine(&self, x: &Buffer, mul: f32, add: f32) -> Result<Buffer>;
    /// a += b in place where the device can, else a new buffer; both the same length. For gradient accumulation.
    fn accumulate(&self, a: Buffer, b: &Buffer) -> Result<Buffer>;
    /// act(gate) * up
    fn glu(&self, kind: Glu, gate: &Buffer, up: &Buffer) -> Result<Buffer>;
    /// (d gate, d up)
    fn glu_grad(
        &self,
        kind: Glu,
        gate: &Buffer,
        up: &Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, Buffer)>;
    /// [`Backend::glu`] of what [`Backend::pack`] made, or of whole tensors.
    fn glu_packed(&self, kind: Glu, gate: Buffer, up: Buffer) -> Result<Buffer> {
        self.glu(kind, &self.unpack(&gate)?, &self.unpack(&up)?)
    }
    /// [`Backend::glu_grad`] of what [`Backend::pack`] made, or of whole tensors.
    fn glu_grad_packed(
        &self,
        kind: Glu,
        gate: Buffer,
        up: Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, Buffer)> {
        self.glu_grad(kind, &self.unpack(&gate)?, &self.unpack(&up)?, dy)
    }
    /// x with each element kept with probability 1 - p and scaled by 1 / (1 - p); element i is kept iff
    /// `key.uniform_at(i) >= p`, so that the same key gives the same mask on every device. Its own gradient.
    fn dropout(&self, x: &Buffer, p: f32, key: RngKey) -> Result<Buffer>;

    // --- shape ---
    /// Sum of `x` (shape `from`) down to `to` (same rank, each dimension equal or 1).
    fn sum_to(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer>;
    /// `x` (shape `from`) repeated up to `to` (same rank, each dimension of `from` equal or 1).
    fn broadcast(&self, x: &Buffer, from: &[usize], to: &[usize]) -> Result<Buffer>;
    /// Largest value of each row.
    fn max_rows(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer>;
    /// Axes in another order; `axes[i]` is the input axis that becomes output axis i.
    fn permute(&self, x: &Buffer, shape: &[usize], axes: &[usize]) -> Result<Buffer>;
    /// `x` seen as `[outer, len, inner]`: entries `start..start + take` of the middle axis.
    fn narrow(
        &self,
        x: &Buffer,
        outer: usize,
        len: usize,
        inner: usize,
        start: usize,
        take: usize,
    ) -> Result<Buffer>;
    /// The transpose of [`Backend::narrow`]: zeros of `[outer, len, inner]` with `dy` at `start`.
    fn narrow_grad(
        &self,
        dy: &Buffer,
        outer: usize,
        len: usize,
        inner: usize,
        start: usize,
        take: usize,
    ) -> Result<Buffer>;
    /// Buffers of `[outer, len_i, inner]` joined along the middle axis.
    fn concat(&self, parts: &[(&Buffer, usize)], outer: usize, inner: usize) -> Result<Buffer>;
    /// `b` behind `a`, in the memory of `a` where nobody else holds it and there is room.
    fn append(&self, a: Buffer, a_len: usize, b: &Buffer, b_len: usize) -> Result<Buffer> {
        self.concat(&[(&a, a_len), (b, b_len)], 1, 1)
    }
    /// Rows `ids` of `[rows, cols]`.
    fn gather(&self, x: &Buffer, cols: usize, ids: &[u32]) -> Result<Buffer>;
    /// Zeros of `[rows, cols]` with row i of `dy` added to row `ids[i]`.
    fn scatter_add(&self, dy: &Buffer, rows: usize, cols: usize, ids: &[u32]) -> Result<Buffer>;

    // --- products ---
    /// Batched product: `batch` times `op(a) [m, k] x op(b) [k, n]`, where op transposes if told so (a is then stored
    /// `[k, m]`, b `[n, k]`). `a_batched` / `b_batched` false: the same matrix for every batch entry. The result is
    /// `into + scale * product`, in the memory of `into` where nobody else holds it.
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
    ) -> Result<Buffer>;
    /// `x [m, cols] Wt -> [m, rows]` if `transpose`, else `x [m, rows] W -> [m, cols]`, straight from the stored format,
    /// added to `into`, in its memory where nobody else holds it.
    fn frozen_matmul(
        &self,
        x: &Buffer,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        into: Option<Buffer>,
    ) -> Result<Buffer>;
    /// [`frozen_matmul`](Self::frozen_matmul) and the product of a low rank: `low [m, r] lt` with l `[rows, r]` if
    /// `transpose`, else `low l` with l `[r, cols]`.
    fn frozen_matmul_low_rank(
        &self,
        x: &Buffer,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        low: &LowRank<'_>,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        let product = self.frozen_matmul(x, m, w, transpose, into)?;
        low.add_to(self, m, w, transpose, product)
    }
    /// The gradients of a product of low rank.
    fn low_rank_grad(&self, back: LowRankBack<'_>) -> Result<LowRankGrad> {
        back.by_products(self)
    }
    /// `x [m, cols] Wt -> [m, rows]` for several weights that take the same rows.
    fn frozen_matmul_all(
        &self,
        x: &Buffer,
        m: usize,
        weights: &[&FrozenWeight],
    ) -> Result<Vec<Buffer>> {
        let product = |w: &&FrozenWeight| self.frozen_matmul(x, m, w, true, None);
        weights.iter().map(product).collect()
    }
    /// Rows `ids` of a frozen matrix, in f32.
    fn frozen_gather(&self, w: &FrozenWeight, ids: &[u32]) -> Result<Buffer>;
    /// A frozen matrix in f32.
    fn frozen_dense(&self, w: &FrozenWeight) -> Result<Buffer>;

    // --- fused layers ---
    /// Softmax of each row.
    fn softmax(&self, x: &Buffer, rows: usize, cols: usize) -> Result<Buffer>;
    /// y (dy - sum(dy y)) a row
    fn softmax_grad(&self, y: &Buffer, dy: &Buffer, rows: usize, cols: usize) -> Result<Buffer>;
    /// x / rms(x) * w (w of `cols`).
    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer>;
    /// (dx, dw if wanted)
    fn rms_norm_grad(
        &self,
        x: &Buffer,
        w: &Buffer,
        dy: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
        want_w: bool,
    ) -> Result<(Buffer, Option<Buffer>)>;
    /// (x - mean) / sqrt(var + eps) * w + b
    fn layer_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        b: Option<&Buffer>,
        rows: usize,
        cols: usize,
        eps: f32,
    ) -> Result<Buffer>;
    /// (dx, dw if wanted, db if wanted)
    fn layer_norm_grad(
        &self,
        x: &Buffer,
        w: &Buffer,
        dy: &Buffer,
        rows: usize,
        cols: usize,
        eps: f32,
        want_wb: bool,
    ) -> Result<(Buffer, Option<(Buffer, Buffer)>)>;
    /// Rotation of `x [tokens, heads * head_dim]`; `inverse` turns back, which is also its gradient.
    fn rope(&self, x: &Buffer, rope: &Rope, inverse: bool) -> Result<Buffer>;
    /// (output `[B, S, heads * head_dim]`, log-sum-exp of the scores `[B, heads, S]`).
    fn attention(
        &self,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        b: usize,
        s: usize,
        t: usize,
        spec: &Attention,
    ) -> Result<(Buffer, Buffer)>;
    /// (dq, dk, dv), scores made again from q, k and the log-sum-exp.
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
    ) -> Result<(Buffer, Buffer, Buffer)>;
    /// Sum over rows of -log softmax(x)[target], rows with a negative target skipped, and its gradient
    /// (softmax - onehot; zeros where skipped): (loss `[1]`, dx).
    fn cross_entropy(
        &self,
        x: &Buffer,
        targets: &[i64],
        rows: usize,
        cols: usize,
    ) -> Result<(Buffer, Buffer)>;
    /// [`Backend::cross_entropy`] of logits that may be overwritten: with the gradient, where the device can.
    fn cross_entropy_owned(
        &self,
        x: Buffer,
        targets: &[i64],
        rows: usize,
        cols: usize,
    ) -> Result<(Buffer, Buffer)> {
        self.cross_entropy(&x, targets, rows, cols)
    }

    /// A kernel of the backend's own for a [`crate::CustomOp`], if it has one; None = use the composed form.
    fn custom(
        &self,
        _name: &str,
        _inputs: &[(&Buffer, &[usize])],
    ) -> Option<Result<(Buffer, Vec<usize>)>> {
        None
    }
}
