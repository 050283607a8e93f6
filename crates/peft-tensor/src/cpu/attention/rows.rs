//! The rows of a tile of scores: scaling, masks, softmax and its gradient.
//!
//! A row is whole blocks of [`LANES`], and so are the loops over it: over anything else they run value by value at the end
//! of the row, and most rows end early.

use std::ops::Range;

use crate::cpu::simd::{exp, larger, madd, max16, simd, sum16, tanh};

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

/// Products of a row to scores, but for the mask: one loop over all values, as of nested ones the compiler gathers the
/// values of many blocks one by one.
#[inline(always)]
fn capped_row<const FMA: bool>(row: &mut [f32], scale: f32, softcap: Option<f32>) {
    for s in row {
        *s = capped::<FMA>(*s, scale, softcap);
    }
}

#[inline(always)]
fn add_bias(row: &mut [f32], bias: &[f32]) {
    for (s, bias) in row.iter_mut().zip(bias) {
        *s += bias;
    }
}

/// The largest of a row that is a number.
#[inline(always)]
fn max_of(row: &[[f32; LANES]]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in row {
        for (s, max) in block.iter().zip(&mut largest) {
            *max = larger(*s, *max);
        }
    }
    max16(&largest)
}

simd! {
    /// Raw products of a row to e^(score - max), zero where nothing is to be seen: (max, their sum).
    pub(in crate::cpu) fn weights(row: &mut [f32], columns: &[Range<usize>; 2], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>) -> (f32, f32) {
        let span = span(columns);
        clear_outside(row, &span);
        // Where scores are multiples of the products, so is the largest.
        let multiples = softcap.is_none() && bias.is_none() && scale > 0.0;
        if !multiples {
            capped_row::<FMA>(&mut row[span.clone()], scale, softcap);
            if let Some(bias) = bias {
                add_bias(&mut row[span.clone()], &bias[span.clone()]);
            }
        }
        let scale = if multiples { scale } else { 1.0 };
        hide(row, &span, columns, f32::NEG_INFINITY);
        let row = row[span].as_chunks_mut::<LANES>().0;
        let max = max_of(row) * scale;
        if max == f32::NEG_INFINITY && row.as_flattened().iter().all(|s| !s.is_nan()) {
            row.fill([0.0; LANES]);
            return (f32::NEG_INFINITY, 0.0);
        }
        let mut sums = [0.0f32; LANES];
        for block in row {
            for (s, sum) in block.iter_mut().zip(&mut sums) {
                *s = exp::<FMA>(madd::<FMA>(*s, scale, -max));
                *sum += *s;
            }
        }
        (max, sum16(&sums))
    }
}

simd! {
    /// Raw products of a row to softmax weights, and `slopes` from d weights to d raw products.
    pub(in crate::cpu) fn row_grad(row: &mut [f32], slopes: &mut [f32], columns: &[Range<usize>; 2], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>, lse: f32, delta: f32) {
        if lse == f32::NEG_INFINITY {
            row.fill(0.0);
            slopes.fill(0.0);
            return;
        }
        let span = span(columns);
        clear_outside(row, &span);
        clear_outside(slopes, &span);
        let multiples = softcap.is_none() && bias.is_none() && scale > 0.0;
        let mut delta = delta;
        if !multiples {
            capped_row::<FMA>(&mut row[span.clone()], scale, softcap);
            if let Some(cap) = softcap {
                // The slope of the cap, before the bias is in the way.
                let inverse = 1.0 / cap;
                for (s, d) in row[span.clone()].iter().zip(&mut slopes[span.clone()]) {
                    let part = s * inverse;
                    *d = (*d - delta) * (1.0 - part * part);
                }
                delta = 0.0;
            }
            if let Some(bias) = bias {
                add_bias(&mut row[span.clone()], &bias[span.clone()]);
            }
        }
        let product = if multiples { scale } else { 1.0 };
        hide(row, &span, columns, f32::NEG_INFINITY);
        hide(slopes, &span, columns, 0.0);
        for (s, d) in row[span.clone()].iter_mut().zip(&mut slopes[span]) {
            *s = exp::<FMA>(madd::<FMA>(*s, product, -lse));
            *d = (*d - delta) * scale * *s;
        }
    }
}
