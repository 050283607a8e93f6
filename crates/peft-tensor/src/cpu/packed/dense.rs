//! Products of two dense matrices that are too small to share among threads: those of attention.

use super::lanes::{Lanes, ROWS, WIDTH};
use super::side::{Panels, Side};
use super::{Kernel, columns, pack, tile};
use crate::cpu::matmul::View;

/// Panels of both sides, to be used again by the next product.
#[derive(Default)]
pub(in crate::cpu) struct Sides {
    pub(super) left: Vec<u32>,
    pub(super) right: Vec<u32>,
    pub(super) line: Vec<u32>,
}

impl Kernel {
    /// `out = a b`, added to it if `add`; a `[m, k]`, b `[k, n]`, each with contiguous rows or columns, and rows of `out`
    /// `width` apart. Both sides are rounded to bfloat16.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(unused_variables, reason = "elsewhere there is no kernel to call")
    )]
    pub(in crate::cpu) fn dense(
        self,
        sides: &mut Sides,
        shape: (usize, usize, usize),
        a: View<'_>,
        b: View<'_>,
        out: &mut [f32],
        width: usize,
        add: bool,
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(l) => multiply(l, sides, shape, a, b, out, width, add),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(..) => {
                unreachable!("where there are tiles, attention has functions of its own")
            }
        }
    }
}

/// [`Kernel::dense`] by these lanes.
pub(super) fn multiply<L: Lanes>(
    l: L,
    sides: &mut Sides,
    (m, k, n): (usize, usize, usize),
    a: View<'_>,
    b: View<'_>,
    out: &mut [f32],
    width: usize,
    add: bool,
) {
    let Sides { left, right, line } = sides;
    // Of b, the columns are what a strip is made of: its transpose has them as rows.
    let (left_side, right_side) = (Side::dense(m, ROWS, k), Side::dense(n, 2 * WIDTH, k));
    side(l, &left_side, a, k, left, line);
    side(l, &right_side, b.t(), k, right, line);
    let (left, right) = (
        Panels::new(&left_side, &left[..left_side.len()]),
        Panels::new(&right_side, &right[..right_side.len()]),
    );
    tile::multiply_here(l, &left, &right, out, width, add);
}

/// Packs one side, `x [outside, inside]`.
fn side<L: Lanes>(
    l: L,
    side: &Side,
    x: View<'_>,
    inside: usize,
    out: &mut Vec<u32>,
    line: &mut Vec<u32>,
) {
    let len = side.len();
    if out.len() < len {
        out.resize(len, 0);
    }
    let out = &mut out[..len];
    if x.cs == 1 {
        pack::dense_rows(l, side, x.data, x.rs, inside, out);
    } else {
        assert_eq!(x.rs, 1, "a side without contiguous rows or columns");
        columns::dense_columns(l, side, x.data, x.cs, inside, out, line);
    }
}
