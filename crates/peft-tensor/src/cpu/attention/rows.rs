//! The rows of a tile of scores: scaling, masks, softmax and its gradient.
//!
//! A row is whole blocks of [`LANES`], and so are the loops over it: over anything else they run value by value at the end
//! of the row, and most rows end early.

use std::ops::Range;

use crate::cpu::simd::{exp, larger, max16, simd, sum16, tanh};

/// Values of a block.
pub(super) const LANES: usize = 16;

/// Which part of a row of the tile is computed, in whole blocks: what is seen, and what lies among and beside it.
#[inline(always)]
fn span(columns: &[Range<usize>; 2]) -> Range<usize> {
    let [front, near] = columns;
    let first = if front.is_empty() { near.start } else { 0 };
    let end = near.end.max(front.end);
    first / LANES * LANES..end.next_multiple_of(LANES)
}

/// Fills what lies inside of `span` and outside of the columns that are seen.
#[inline(always)]
fn hide(row: &mut [f32], span: &Range<usize>, columns: &[Range<usize>; 2], value: f32) {
    let [front, near] = columns;
    // Ascending, and all of it inside of the span.
    let middle = front.end.max(span.start)..near.start.max(span.start).min(span.end);
    if middle.start < middle.end {
        row[middle].fill(value);
    }
    row[near.end.max(front.end)..span.end].fill(value);
}

/// Zeroes what lies outside of a span.
#[inline(always)]
fn clear_outside(row: &mut [f32], span: &Range<usize>) {
    row[..span.start].fill(0.0);
    row[span.end..].fill(0.0);
}

/// A score as it goes into the softmax, but for the mask.
#[inline(always)]
fn capped<const FMA: bool>(s: f32, scale: f32, softcap: Option<f32>) -> f32 {
    match softcap {
        None => s * scale,
        Some(cap) => cap * tanh::<FMA>(s * (scale / cap)),
    }
}

#[inline(always)]
fn add_bias(row: &mut [[f32; LANES]], bias: &[f32]) {
    for (block, bias) in row.iter_mut().zip(bias.as_chunks::<LANES>().0) {
        for (s, b) in block.iter_mut().zip(bias) {
            *s += b;
        }
    }
}

simd! {
    /// Raw products of a row to e^(score - max), zero where nothing is to be seen: (max, their sum).
    pub(in crate::cpu) fn weights(row: &mut [f32], columns: &[Range<usize>; 2], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>) -> (f32, f32) {
        let span = span(columns);
        clear_outside(row, &span);
        {
            let part = row[span.clone()].as_chunks_mut::<LANES>().0;
            for block in part.iter_mut() {
                for s in block {
                    *s = capped::<FMA>(*s, scale, softcap);
                }
            }
            if let Some(bias) = bias {
                add_bias(part, &bias[span.clone()]);
            }
        }
        hide(row, &span, columns, f32::NEG_INFINITY);
        let row = &mut row[span];
        let mut largest = [f32::NEG_INFINITY; LANES];
        for block in row.as_chunks::<LANES>().0 {
            for (s, max) in block.iter().zip(&mut largest) {
                *max = larger(*s, *max);
            }
        }
        let max = max16(&largest);
        if max == f32::NEG_INFINITY && row.iter().all(|s| !s.is_nan()) {
            row.fill(0.0);
            return (f32::NEG_INFINITY, 0.0);
        }
        let mut sums = [0.0f32; LANES];
        for block in row.as_chunks_mut::<LANES>().0 {
            for (s, sum) in block.iter_mut().zip(&mut sums) {
                *s = exp::<FMA>(*s - max);
                *sum += *s;
            }
        }
        (max, sum16(&sums))
    }
}

simd! {
    /// Raw products of a row to softmax weights, and `slopes` from d weights to d raw products.
    pub(super) fn row_grad(row: &mut [f32], slopes: &mut [f32], columns: &[Range<usize>; 2], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>, lse: f32, delta: f32) {
        if lse == f32::NEG_INFINITY {
            row.fill(0.0);
            slopes.fill(0.0);
            return;
        }
        let span = span(columns);
        clear_outside(row, &span);
        clear_outside(slopes, &span);
        let inv_cap = softcap.map_or(0.0, |cap| 1.0 / cap);
        {
            let part = row[span.clone()].as_chunks_mut::<LANES>().0;
            for (block, slopes) in part.iter_mut().zip(slopes[span.clone()].as_chunks_mut::<LANES>().0) {
                for (s, d) in block.iter_mut().zip(slopes) {
                    *s = capped::<FMA>(*s, scale, softcap);
                    // The slope of the cap; without one the factor is 1.
                    let part = *s * inv_cap;
                    *d = (*d - delta) * scale * (1.0 - part * part);
                }
            }
            if let Some(bias) = bias {
                add_bias(part, &bias[span.clone()]);
            }
        }
        hide(row, &span, columns, f32::NEG_INFINITY);
        hide(slopes, &span, columns, 0.0);
        let (row, slopes) = (&mut row[span.clone()], &mut slopes[span]);
        for (block, slopes) in row.as_chunks_mut::<LANES>().0.iter_mut().zip(slopes.as_chunks_mut::<LANES>().0) {
            for (s, d) in block.iter_mut().zip(slopes) {
                *s = exp::<FMA>(*s - lse);
                *d *= *s;
            }
        }
    }
}
