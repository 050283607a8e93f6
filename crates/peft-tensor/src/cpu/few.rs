//! Products of a few rows with a whole weight, as generation makes them: bound by reading the weight, so its stored bytes
//! are read once, decoded in registers, and nothing else is written.
//!
//! One row is multiplied straight from the common formats; for two rows up to [`FEW`], and for the other formats, a
//! handful of stored rows is decoded into the first-level cache and used there for all rows of the input. Work is cut into
//! small pieces that threads take as they come: nobody waits for a thread that the system gave to somebody else, except
//! for the piece it holds.

use std::ops::Range;

use super::par;
use super::pool::Floats;
use super::simd::{self, Level, add_into};
use crate::frozen::bnb;
use crate::{FrozenWeight, WeightFormat};

/// Calls a kernel compiled for `$level`.
macro_rules! at {
    ($level:expr, $kernel:ident($($arg:expr),* $(,)?)) => {
        match $level {
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code, reason = "calls into a copy for instructions that were detected")]
            // SAFETY: level() says Avx512 only where avx512f, avx2, fma and f16c were detected.
            Level::Avx512 => unsafe { dots::avx512::$kernel($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code, reason = "calls into a copy for instructions that were detected")]
            // SAFETY: level() says Avx2 only where avx2, fma and f16c were detected.
            Level::Avx2 => unsafe { dots::avx2::$kernel($($arg),*) },
            Level::Base => dots::plain::$kernel($($arg),*),
        }
    };
}

mod attend;
mod dots;
mod lanes;

pub(super) use attend::one_query;

/// Most rows of the input; more are worth panels of decoded values.
pub(super) const FEW: usize = 16;

/// Multiply-adds of the least piece: a microsecond or two, so that many threads find something, and taking it costs little.
const PIECE: usize = 32 * 1024;

/// Most partial sums of a product with the weight itself.
const PARTS: usize = 64;

/// Values of the stored rows that are decoded at a time, about.
const DECODED: usize = 4096;

/// The best level of this machine for these kernels.
fn level() -> Level {
    match simd::level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 if !is_x86_feature_detected!("f16c") => Level::Base,
        level => level,
    }
}

/// `x Wt` of `x [m, cols]` with each of the weights: `[m, rows]` for each. The pieces of all of them are shared out
/// together.
pub(super) fn frozen(x: &[f32], m: usize, weights: &[&FrozenWeight]) -> Vec<Floats> {
    frozen_at(level(), x, m, weights)
}

fn frozen_at(level: Level, x: &[f32], m: usize, weights: &[&FrozenWeight]) -> Vec<Floats> {
    // The kernels for codes want the values in another order.
    let codes = |w: &&&FrozenWeight| m == 1 && bnb::table(w.format()).is_some();
    let by_code = weights.iter().find(codes).map(|_| sorted(level, x));
    let by_code = by_code.as_deref().unwrap_or_default();
    let mut outs: Vec<Floats> = weights
        .iter()
        .map(|w| Floats::dirty(m * w.rows()))
        .collect();
    let mut pieces = Vec::new();
    for (w, out) in weights.iter().zip(&mut outs) {
        let least = rows_of_piece(m, w.cols());
        let mut left = &mut out[..];
        for rows in shrinking(w.rows(), least, rayon::current_num_threads()) {
            let (piece, rest) = left.split_at_mut(rows.len() * m);
            pieces.push((*w, rows.start, piece));
            left = rest;
        }
    }
    // Large ones first, those of all weights.
    pieces.sort_by_key(|(_, _, piece)| std::cmp::Reverse(piece.len()));
    par::share(pieces, |(w, first, out)| {
        if m > 1 || !straight(level, x, by_code, w, first, out) {
            through_cache(level, x, m, w, first, out);
        }
    });
    if m > 1 {
        for (w, out) in weights.iter().zip(&mut outs) {
            *out = turned(out, m, w.rows());
        }
    }
    outs
}

/// `a [m, k] bt` for rows `b [n, k]`, into `out [m, n]`.
pub(super) fn dense(a: &[f32], b: &[f32], m: usize, k: usize, out: &mut [f32], threads: bool) {
    dense_at(level(), a, b, m, k, out, threads);
}

fn dense_at(
    level: Level,
    a: &[f32],
    b: &[f32],
    m: usize,
    k: usize,
    out: &mut [f32],
    threads: bool,
) {
    if m == 1 {
        return by_rows(level, a, b, m, k, out, threads);
    }
    let n = out.len() / m;
    let mut columns = Floats::dirty(m * n);
    by_rows(level, a, b, m, k, &mut columns, threads);
    super::matmul::transpose(&columns, m, n, out);
}

/// `x [m, k] wt` for a few rows `w [n, k]`, into `out [m, n]`: a tall matrix through a thin one, as in front of a low rank.
pub(super) fn thin(x: &[f32], w: &[f32], k: usize, n: usize, out: &mut [f32], threads: bool) {
    by_rows(level(), w, x, n, k, out, threads);
}

/// `out [r, k] += st x` of `s [m, r]` and `x [m, k]`: best for so many rows of x that they stay in a cache, on one thread.
pub(super) fn outer(s: &[f32], r: usize, x: &[f32], k: usize, out: &mut [f32]) {
    outer_at(level(), s, r, x, k, out);
}

fn outer_at(level: Level, s: &[f32], r: usize, x: &[f32], k: usize, out: &mut [f32]) {
    if r * k > 0 {
        at!(level, outer(s, r, x, k, out));
    }
}

/// Each of the rows `b [n, k]` with each of a few rows `a [m, k]`: `out [n, m]`.
fn by_rows(level: Level, a: &[f32], b: &[f32], m: usize, k: usize, out: &mut [f32], threads: bool) {
    let run = |first: usize, out: &mut [f32]| {
        let b = &b[first * k..][..out.len() / m * k];
        if m == 1 {
            at!(level, f32_rows(a, bytemuck::cast_slice(b), 4 * k, out));
        } else {
            at!(level, tile(a, b, k, k, m, out));
        }
    };
    let rows = rows_of_piece(m, k);
    if !threads || out.len() / m <= rows {
        return run(0, out);
    }
    let pieces = out.chunks_mut(rows * m).enumerate();
    par::share(pieces.collect(), |(i, out)| run(i * rows, out));
}

/// `x W` of `x [m, rows]`: `[m, cols]`. Each piece sums some of the weight's rows; the pieces, cut by the shape alone,
/// are added in their order.
pub(super) fn frozen_t(x: &[f32], m: usize, w: &FrozenWeight) -> Floats {
    frozen_t_at(level(), x, m, w)
}

fn frozen_t_at(level: Level, x: &[f32], m: usize, w: &FrozenWeight) -> Floats {
    let (rows, cols) = (w.rows(), w.cols());
    let step = rows_of_piece(m, cols).max(rows.div_ceil(PARTS));
    let mut parts = Floats::zeros(rows.div_ceil(step) * m * cols);
    let pieces = parts.chunks_mut(m * cols).enumerate();
    par::share(pieces.collect(), |(i, part)| {
        let end = rows.min((i + 1) * step);
        in_cache(w, i * step..end, |first, values| {
            let count = values.len() / cols;
            for (x, part) in x.chunks(rows).zip(part.chunks_mut(cols)) {
                at!(
                    level,
                    add_rows(&x[first..first + count], values, cols, part)
                );
            }
        });
    });
    let (sum, rest) = parts.split_at_mut(m * cols);
    for part in rest.chunks(m * cols) {
        add_into(part, sum);
    }
    Floats::copied(sum)
}

/// Rows in pieces that become smaller, down to `least`: long streams to read at first, and threads that end at one time. A
/// result does not depend on the piece it is in.
fn shrinking(rows: usize, least: usize, threads: usize) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < rows {
        let share = ((rows - at) / (2 * threads.max(1))).next_multiple_of(4);
        let end = rows.min(at + share.max(least));
        pieces.push(at..end);
        at = end;
    }
    pieces
}

/// Rows of a piece when a row has `cols` values.
fn rows_of_piece(m: usize, cols: usize) -> usize {
    (PIECE / (m * cols).max(1)).max(1).next_multiple_of(4)
}

/// One row with the stored rows from `first` on, decoded in registers; false where the format has no kernel.
fn straight(
    level: Level,
    x: &[f32],
    by_code: &[f32],
    w: &FrozenWeight,
    first: usize,
    out: &mut [f32],
) -> bool {
    let Some(row) = w.row_bytes() else {
        return false;
    };
    let bytes = &w.bytes()[first * row..][..out.len() * row];
    match w.format() {
        WeightFormat::F32 => at!(level, f32_rows(x, bytes, row, out)),
        WeightFormat::BF16 => at!(level, bf16_rows(x, bytes, row, out)),
        WeightFormat::F16 => at!(level, f16_rows(x, bytes, row, out)),
        WeightFormat::Q8_0 => at!(level, q8_0_rows(x, bytes, row, out)),
        WeightFormat::Q4_0 => at!(level, q4_0_rows(x, bytes, row, out)),
        WeightFormat::Q4_1 => at!(level, q4_1_rows(x, bytes, row, out)),
        WeightFormat::INT8 => {
            at!(level, i8_rows(x, &bytes[bnb::INT8_HEAD..], row, out));
            for (out, row) in out.iter_mut().zip(bytes.chunks(row)) {
                *out *= bnb::int8_step(row);
            }
        }
        format => match bnb::table(format) {
            Some(table) => at!(level, code_rows(by_code, bytes, row, out, table)),
            None => return false,
        },
    }
    true
}

/// All rows of `x` with the stored rows from `first` on: `out [rows, m]`.
fn through_cache(
    level: Level,
    x: &[f32],
    m: usize,
    w: &FrozenWeight,
    first: usize,
    out: &mut [f32],
) {
    let cols = w.cols();
    in_cache(w, first..first + out.len() / m, |at, values| {
        let out = &mut out[(at - first) * m..][..values.len() / cols * m];
        at!(level, tile(x, values, cols, cols, m, out));
    });
}

/// Calls `f(first row, values)` for a handful of decoded rows at a time.
fn in_cache(w: &FrozenWeight, rows: Range<usize>, mut f: impl FnMut(usize, &[f32])) {
    let cols = w.cols();
    if let Some(values) = w.as_f32() {
        return f(rows.start, &values[rows.start * cols..rows.end * cols]);
    }
    let block = (DECODED / cols.max(1)).clamp(2, 64);
    let mut values = vec![0.0; block.min(rows.len()) * cols];
    for first in rows.clone().step_by(block) {
        let end = rows.end.min(first + block);
        let values = &mut values[..(end - first) * cols];
        w.decode_rows(first..end, values);
        f(first, values);
    }
}

/// `[n, m]` -> `[m, n]`
fn turned(columns: &[f32], m: usize, n: usize) -> Floats {
    let mut out = Floats::dirty(m * n);
    super::matmul::transpose(columns, m, n, &mut out);
    out
}

/// In each 64 values those at even places, then those at odd ones, each in the order in which the level looks up the halves
/// of 32 bytes.
fn sorted(level: Level, x: &[f32]) -> Vec<f32> {
    let order = match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => lanes::avx2::ORDER,
        _ => lanes::IN_ORDER,
    };
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks(64) {
        for half in 0..2 {
            let places = order.iter().map(|byte| 2 * usize::from(*byte) + half);
            out.extend(places.filter_map(|place| block.get(place)));
        }
    }
    out
}

#[cfg(test)]
mod tests;
