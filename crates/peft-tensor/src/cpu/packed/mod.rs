//! Products of many rows with frozen weights on processors that multiply bfloat16: both sides are rounded, or cut into parts
//! that sum to them ([`tiles`]), and brought into panels, where what the innermost loop reads next stands next, and
//! weights are decoded on the way there.
//!
//! The result is cut into tiles of [`lanes::ROWS`] rows and two registers of columns, which stay in registers while the
//! inner dimension goes by (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). A weight
//! slab is packed once for all rows of `x`; threads take tiles by rows, which are disjoint parts of the result. Every
//! element is summed in one order, whatever the threads do.
//!
//! The same loops for f32 (6 rows by 16 columns, AVX2) were 5 to 10 percent slower than the `gemm` crate, which therefore
//! has what vectors multiply in single precision.

mod columns;
mod dense;
mod lanes;
mod pack;
mod parts;
mod side;
mod tile;
mod tiles;

use std::ops::Range;
use std::sync::OnceLock;

pub(super) use self::dense::Sides;
use self::lanes::Lanes;
use self::side::{Panels, Side};
use super::attention::Geometry;
use super::few::FEW;
use super::pool::Floats;
use crate::{FrozenWeight, Precision};

/// Most values of a weight that are packed at a time, about.
const SLAB: usize = 1 << 20;

/// The product that this processor has for inputs rounded to `precision`; None where single precision is as fast.
pub(super) fn kernel(precision: Precision) -> Option<Kernel> {
    static FOUND: [OnceLock<Option<Kernel>>; 2] = [OnceLock::new(), OnceLock::new()];
    *FOUND[precision as usize].get_or_init(|| {
        let right = |kernel: &Kernel| kernel.is_right();
        Kernel::by_tiles(precision)
            .filter(right)
            .or_else(|| Kernel::by_lanes(precision).filter(right))
    })
}

/// See [`Kernel::attention`].
pub(super) type Block<'a> = dyn Fn(usize, &Range<usize>, &mut [f32], &mut [f32]) + Sync + 'a;

/// See [`Kernel::attention_grad`].
pub(super) type Heads<'a> = dyn Fn(usize, &Range<usize>, [&mut [f32]; 3]) + Sync + 'a;

/// Code for instructions that were detected.
#[derive(Clone, Copy)]
pub(super) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(lanes::Avx512Bf16),
    /// And of how many parts values are sums.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx((lanes::Avx512Bf16, tiles::Amx), usize),
}

impl Kernel {
    /// Products of vectors, where they are faster than those of f32.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(unused_variables, reason = "elsewhere there is no kernel to find")
    )]
    fn by_lanes(precision: Precision) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if precision == Precision::Bf16 && !lanes::products_in_microcode() {
            return lanes::Avx512Bf16::detect().map(Self::Avx512Bf16);
        }
        None
    }

    /// Products of tiles.
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        allow(unused_variables, reason = "elsewhere there is no kernel to find")
    )]
    fn by_tiles(precision: Precision) -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if let Some(l) = lanes::Avx512Bf16::detect() {
            let parts = tiles::parts(precision);
            return tiles::Amx::detect().map(|tiles| Self::Amx((l, tiles), parts));
        }
        None
    }

    /// Most rows that are multiplied with a weight sooner by [`few`](super::few) than by this.
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        allow(unused_variables, reason = "elsewhere there are no tiles")
    )]
    pub(super) fn few(self, w: &FrozenWeight) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => FEW,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_, parts) => tiles::few(w, parts),
        }
    }

    /// `out = x Wt`, or `x W` unless `transposed`, and the product of low rank; added to `out` if `add`. x `[m, inside]`,
    /// out `[m, outside]`.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(unused_variables, reason = "elsewhere there is no kernel to call")
    )]
    pub(super) fn matmul(
        self,
        x: &[f32],
        m: usize,
        w: &FrozenWeight,
        transposed: bool,
        low: Low<'_>,
        out: &mut [f32],
        add: bool,
    ) {
        let product = Product { x, m, w, low };
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(l) => product.on(l, transposed, out, add),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(l, parts) if transposed => product.forward_by_tiles(l, parts, out, add),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(l, parts) => product.backward_by_tiles(l, parts, out, add),
        }
    }

    /// What makes a block of queries' part of attention and its log-sum-exps (batch entry, queries, out, lse), where there are
    /// tiles.
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        allow(unused_variables, reason = "elsewhere there are none")
    )]
    pub(super) fn attention<'a>(
        self,
        g: &'a Geometry<'a>,
        [q, k, v]: [&'a [f32]; 3],
    ) -> Option<Box<Block<'a>>> {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(way, 1) => {
                let forward = tiles::Forward::new(way, g, k, v);
                Some(Box::new(move |batch, queries, out, lse| {
                    forward.block(g, q, batch, queries, out, lse)
                }))
            }
            // Sums of parts take longer to pack for products of this size than they save.
            _ => None,
        }
    }

    /// What makes the gradients of some heads (batch entry, query heads, dq, dk, dv) where there are tiles.
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        allow(unused_variables, reason = "elsewhere there are none")
    )]
    pub(super) fn attention_grad<'a>(
        self,
        g: &'a Geometry<'a>,
        [q, k, v]: [&'a [f32]; 3],
        (out, lse, dout): (&'a [f32], &'a [f32], &'a [f32]),
    ) -> Option<Box<Heads<'a>>> {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(way, 1) => {
                let backward = tiles::Backward::new(way, g, k, v);
                Some(Box::new(move |batch, heads, grads| {
                    backward.heads(g, q, out, lse, dout, batch, heads, grads)
                }))
            }
            // Sums of parts take longer to pack for products of this size than they save.
            _ => None,
        }
    }

    /// Whether a small product comes out right: a processor (or one that is simulated) whose instructions do something
    /// else than they say is not to be trusted with training.
    fn is_right(self) -> bool {
        let (m, k, n) = (17, 70, 35);
        let value = |i: usize| ((i * 37 % 61) as f32 - 30.0) / 16.0;
        let x: Vec<f32> = (0..m * k).map(value).collect();
        let values: Vec<f32> = (0..n * k).map(|i| value(i + 7)).collect();
        let Ok(w) = FrozenWeight::from_f32(n, k, values.clone()) else {
            return false;
        };
        let mut out = vec![1.0; m * n];
        self.matmul(&x, m, &w, true, Low::default(), &mut out, true);
        // Sums of small multiples of 2^-8: exact in f32, and every value is one in bfloat16 too.
        (0..m * n).all(|at| {
            let (i, j) = (at / n, at % n);
            let (x, w) = (&x[i * k..][..k], &values[j * k..][..k]);
            let want: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            out[at] == want + 1.0
        })
    }
}

/// A product of low rank that goes along: more of the inner dimension on both sides.
#[derive(Clone, Copy, Default)]
pub(super) struct Low<'a> {
    /// `[m, r]`
    pub(super) values: &'a [f32],
    /// Beside the weight's rows where these are columns of the result, `[rows, r]`, else below them, `[r, cols]`.
    pub(super) other: &'a [f32],
    /// Nothing if 0.
    pub(super) r: usize,
}

/// What is multiplied.
struct Product<'a> {
    x: &'a [f32],
    m: usize,
    w: &'a FrozenWeight,
    low: Low<'a>,
}

impl Product<'_> {
    fn on<L: Lanes>(&self, l: L, transposed: bool, out: &mut [f32], add: bool) {
        if transposed {
            self.forward(l, out, add);
        } else {
            self.backward(l, out, add);
        }
    }

    /// `x [m, cols] Wt`, by slabs of W's rows: columns of the result.
    fn forward<L: Lanes>(&self, l: L, out: &mut [f32], add: bool) {
        let (m, rows, cols, r) = (self.m, self.w.rows(), self.w.cols(), self.low.r);
        let step = (SLAB / cols).max(1).next_multiple_of(2 * lanes::WIDTH);
        let side = Side::rows(m, cols, r);
        let mut left = Floats::dirty(side.len());
        let units = bytemuck::cast_slice_mut(&mut left);
        pack::rows(l, &side, self.x, cols, cols, self.low.values, units);
        let left = Panels::new(&side, units);
        for first in (0..rows).step_by(step) {
            let side = Side::weight_rows(step.min(rows - first), cols, r);
            let other = &self.low.other[first * r..];
            let mut right = Floats::dirty(side.len());
            let units = bytemuck::cast_slice_mut(&mut right);
            pack::weight_rows(l, &side, self.w, first, other, units);
            let right = Panels::new(&side, units);
            tile::multiply(l, &left, &right, &mut out[first..], rows, add);
        }
    }

    /// `x [m, rows] W`, by slabs of W's rows: parts of the sums.
    fn backward<L: Lanes>(&self, l: L, out: &mut [f32], add: bool) {
        let (m, rows, cols) = (self.m, self.w.rows(), self.w.cols());
        let step = (SLAB / cols).max(1).next_multiple_of(2 * side::BLOCK);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            // What goes along does so with the last part.
            let low = if first + count == rows {
                self.low
            } else {
                Low::default()
            };
            let side = Side::rows(m, count, low.r);
            let other = Side::weight_columns(cols, count, low.r);
            let (mut left, mut right) = (Floats::dirty(side.len()), Floats::dirty(other.len()));
            let units = bytemuck::cast_slice_mut(&mut left);
            let x = &self.x[first..];
            pack::rows(l, &side, x, rows, count, low.values, units);
            let left = Panels::new(&side, units);
            let units = bytemuck::cast_slice_mut(&mut right);
            columns::weight_columns(l, &other, self.w, (first, count), 0, low.other, units);
            let right = Panels::new(&other, units);
            tile::multiply(l, &left, &right, out, cols, add || first > 0);
        }
    }
}

#[cfg(test)]
mod tests;
