//! Moving values about: broadcasting, reductions, permutations, slices, rows by index.

use super::par;
use super::pool::Floats;
use super::simd::{add_into, max_body, simd, sum_body};

/// A run of neighbouring axes that behave as one.
#[derive(Clone)]
pub(super) struct Axis {
    /// How many entries.
    pub(super) size: usize,
    /// Step in each argument, 0 where it is repeated.
    pub(super) strides: Vec<usize>,
}

impl Axis {
    /// An axis of one entry.
    pub(super) fn unit(args: usize) -> Self {
        Self {
            size: 1,
            strides: vec![0; args],
        }
    }
}

/// The axes of `shape` for arguments that broadcast to it, axes of size 1 left out and neighbours merged where
/// every argument allows it.
pub(super) fn merge(shape: &[usize], args: &[&[usize]]) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::new();
    let mut steps = vec![1; args.len()];
    for d in (0..shape.len()).rev() {
        let strides: Vec<usize> = args
            .iter()
            .zip(&steps)
            .map(|(a, step)| if a[d] == 1 { 0 } else { *step })
            .collect();
        for (arg, step) in args.iter().zip(&mut steps) {
            *step *= arg[d];
        }
        if shape[d] == 1 {
            continue;
        }
        match axes.last_mut() {
            // The outer axis continues the inner one if a step of it is the inner axis walked through.
            Some(last)
                if strides
                    .iter()
                    .zip(&last.strides)
                    .all(|(s, l)| *s == l * last.size) =>
            {
                last.size *= shape[d]
            }
            _ => axes.push(Axis {
                size: shape[d],
                strides,
            }),
        }
    }
    axes.reverse();
    axes
}

pub(super) fn sum_to(x: &[f32], from: &[usize], to: &[usize]) -> Floats {
    let axes = merge(from, &[to]);
    let mut sizes: Vec<(usize, bool)> = axes.iter().map(|a| (a.size, a.strides[0] == 0)).collect();
    let mut current: Option<Floats> = None;
    // One summed axis after the other, outermost first so that the rest shrinks early.
    while let Some(i) = sizes.iter().position(|s| s.1) {
        let outer = sizes[..i].iter().map(|s| s.0).product();
        let inner = sizes[i + 1..].iter().map(|s| s.0).product();
        let source = current.as_deref().unwrap_or(x);
        current = Some(sum_axis(source, outer, sizes[i].0, inner));
        sizes.remove(i);
    }
    current.unwrap_or_else(|| Floats::copied(x))
}

/// `[outer, len, inner]` -> `[outer, inner]`, in a fixed tree of partial sums.
fn sum_axis(x: &[f32], outer: usize, len: usize, inner: usize) -> Floats {
    let part = if inner == 1 {
        par::GRAIN
    } else {
        par::rows_per_chunk(inner).max(16)
    };
    let parts = len.div_ceil(part).max(1);
    let mut sums = Floats::zeros(outer * parts * inner);
    let cost = len.min(part) * inner;
    par::rows(&mut sums, inner.max(1), cost, |first, sums| {
        for (i, sum) in sums.chunks_mut(inner.max(1)).enumerate() {
            let (o, p) = ((first + i) / parts, (first + i) % parts);
            let start = (o * len + p * part) * inner;
            let end = (o * len + (p * part + part).min(len)) * inner;
            sum_part(&x[start..end], sum);
        }
    });
    if parts == 1 {
        sums
    } else {
        sum_axis(&sums, outer, parts, inner)
    }
}

simd! {
    /// Adds up rows as wide as `sum`.
    fn sum_part(x: &[f32], sum: &mut [f32]) {
        if let [sum] = sum {
            // Blocks in f32, their sum in f64: as good as pairwise summation and as fast as one pass.
            *sum = x.chunks(4096).map(|block| f64::from(sum_body(block))).sum::<f64>() as f32;
            return;
        }
        for row in x.chunks_exact(sum.len()) {
            for (s, v) in sum.iter_mut().zip(row) {
                *s += *v;
            }
        }
    }
}

pub(super) fn broadcast(x: &[f32], from: &[usize], to: &[usize]) -> Floats {
    let mut out = Floats::dirty(to.iter().product());
    let axes = merge(to, &[from]);
    let (inner, outer) = axes
        .split_last()
        .map_or((Axis::unit(1), &[][..]), |(i, o)| (i.clone(), o));
    par::rows(&mut out, inner.size, inner.size, |first, out| {
        for (i, out) in out.chunks_mut(inner.size).enumerate() {
            let (mut row, mut at) = (first + i, 0);
            for axis in outer.iter().rev() {
                at += row % axis.size * axis.strides[0];
                row /= axis.size;
            }
            if inner.strides[0] == 0 {
                out.fill(x[at]);
            } else {
                out.copy_from_slice(&x[at..at + inner.size]);
            }
        }
    });
    out
}

pub(super) fn max_rows(x: &[f32], rows: usize, cols: usize) -> Floats {
    let mut out = Floats::dirty(rows);
    out.fill(f32::NEG_INFINITY);
    par::rows(&mut out, 1, cols, |first, out| {
        max_chunk(&x[first * cols..(first + out.len()) * cols], cols, out)
    });
    out
}

simd! {
    fn max_chunk(x: &[f32], cols: usize, out: &mut [f32]) {
        if cols == 0 {
            return;
        }
        for (row, out) in x.chunks_exact(cols).zip(out) {
            let max = max_body(row);
            // NaN compares as smaller, so look for one where the row's sum says that there may be.
            *out = if sum_body(row).is_nan() && row.iter().any(|v| v.is_nan()) { f32::NAN } else { max };
        }
    }
}

/// Side of the square tiles in which a transpose walks both sides' cache lines.
const TILE: usize = 16;

pub(super) fn permute(x: &[f32], shape: &[usize], axes: &[usize]) -> Floats {
    let mut out = Floats::dirty(x.len());
    if x.is_empty() {
        return out;
    }
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    // Output axes as (size, input stride), neighbours merged.
    let mut dims: Vec<(usize, usize)> = Vec::new();
    for &axis in axes.iter().filter(|a| shape[**a] != 1) {
        match dims.last_mut() {
            Some((size, stride)) if *stride == strides[axis] * shape[axis] => {
                (*size, *stride) = (*size * shape[axis], strides[axis])
            }
            _ => dims.push((shape[axis], strides[axis])),
        }
    }
    let (inner, step) = dims.pop().unwrap_or((1, 1));
    let offset = |mut row: usize, dims: &[(usize, usize)]| {
        let mut at = 0;
        for (size, stride) in dims.iter().rev() {
            at += row % size * stride;
            row /= size;
        }
        at
    };
    if step == 1 {
        par::rows(&mut out, inner, inner, |first, out| {
            for (i, out) in out.chunks_mut(inner).enumerate() {
                let at = offset(first + i, &dims);
                out.copy_from_slice(&x[at..at + inner]);
            }
        });
        return out;
    }
    // The innermost output axis strides through the input: work on tiles of it and of its neighbour.
    let (across, across_step) = dims.pop().unwrap_or((1, 0));
    par::rows(&mut out, inner * across, inner * across, |first, out| {
        for (i, plane) in out.chunks_mut(inner * across).enumerate() {
            let base = offset(first + i, &dims);
            par::rows(plane, inner * TILE, inner * TILE, |tile, rows| {
                transpose_rows(&x[base..], step, across_step, tile * TILE, inner, rows);
            });
        }
    });
    out
}

/// Rows `first..` of a plane: `rows[r][c] = x[(first + r) * across + c * step]`.
fn transpose_rows(
    x: &[f32],
    step: usize,
    across: usize,
    first: usize,
    inner: usize,
    rows: &mut [f32],
) {
    let count = rows.len() / inner;
    let mut tile = [[0.0; TILE]; TILE];
    for c0 in (0..inner).step_by(TILE) {
        for r0 in (0..count).step_by(TILE) {
            let (width, height) = (TILE.min(inner - c0), TILE.min(count - r0));
            for (c, line) in tile[..width].iter_mut().enumerate() {
                let at = (first + r0) * across + (c0 + c) * step;
                if across == 1 {
                    // A whole cache line at once: strides of powers of two would throw it out before it is used up.
                    line[..height].copy_from_slice(&x[at..at + height]);
                } else {
                    line[..height]
                        .iter_mut()
                        .enumerate()
                        .for_each(|(r, value)| *value = x[at + r * across]);
                }
            }
            for r in 0..height {
                let out = &mut rows[(r0 + r) * inner + c0..][..width];
                out.iter_mut()
                    .zip(&tile)
                    .for_each(|(out, line)| *out = line[r]);
            }
        }
    }
}

pub(super) fn narrow(
    x: &[f32],
    outer: usize,
    len: usize,
    inner: usize,
    start: usize,
    take: usize,
) -> Floats {
    let mut out = Floats::dirty(outer * take * inner);
    let row = take * inner;
    par::rows(&mut out, row, row, |first, out| {
        for (i, out) in out.chunks_mut(row).enumerate() {
            let at = ((first + i) * len + start) * inner;
            out.copy_from_slice(&x[at..at + row]);
        }
    });
    out
}

pub(super) fn narrow_grad(
    dy: &[f32],
    outer: usize,
    len: usize,
    inner: usize,
    start: usize,
    take: usize,
) -> Floats {
    let mut out = Floats::zeros(outer * len * inner);
    let (row, part) = (len * inner, take * inner);
    par::rows(&mut out, row, row, |first, out| {
        for (i, out) in out.chunks_mut(row).enumerate() {
            let at = (first + i) * part;
            out[start * inner..start * inner + part].copy_from_slice(&dy[at..at + part]);
        }
    });
    out
}

pub(super) fn concat(parts: &[(&[f32], usize)], outer: usize, inner: usize) -> Floats {
    let row = parts.iter().map(|p| p.1).sum::<usize>() * inner;
    let mut out = Floats::dirty(outer * row);
    par::rows(&mut out, row, row, |first, out| {
        for (i, mut out) in out.chunks_mut(row).enumerate() {
            for (part, len) in parts {
                let (here, rest) = out.split_at_mut(len * inner);
                here.copy_from_slice(&part[(first + i) * len * inner..][..len * inner]);
                out = rest;
            }
        }
    });
    out
}

pub(super) fn gather(x: &[f32], cols: usize, ids: &[u32]) -> Floats {
    let mut out = Floats::dirty(ids.len() * cols);
    par::rows(&mut out, cols, cols, |first, out| {
        for (i, out) in out.chunks_mut(cols).enumerate() {
            let id = ids[first + i] as usize;
            out.copy_from_slice(&x[id * cols..(id + 1) * cols]);
        }
    });
    out
}

pub(super) fn scatter_add(dy: &[f32], rows: usize, cols: usize, ids: &[u32]) -> Floats {
    let mut out = Floats::zeros(rows * cols);
    if ids.len() * cols <= par::GRAIN {
        for (id, dy) in ids.iter().zip(dy.chunks(cols.max(1))) {
            add_into(dy, &mut out[*id as usize * cols..][..cols]);
        }
        return out;
    }
    // By output row, within one in the order of the input: the same sums for any number of threads.
    let mut order: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let groups: Vec<&[(u32, usize)]> = order.chunk_by(|a, b| a.0 == b.0).collect();
    let mut targets = Vec::with_capacity(groups.len());
    let (mut rest, mut done) = (&mut out[..], 0);
    for group in &groups {
        let id = group[0].0 as usize;
        let (_, tail) = rest.split_at_mut((id - done) * cols);
        let (row, tail) = tail.split_at_mut(cols);
        targets.push((row, *group));
        (rest, done) = (tail, id + 1);
    }
    par::chunks(&mut targets, par::rows_per_chunk(cols), |_, targets| {
        for (row, group) in targets {
            for (_, i) in *group {
                add_into(&dy[i * cols..(i + 1) * cols], row);
            }
        }
    });
    out
}
