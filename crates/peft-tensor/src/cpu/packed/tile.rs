//! The product of two packed sides.

use super::super::par;
use super::lanes::{Lanes, ROWS, WIDTH, Work};
use super::side::Panels;

/// Strips of the left side that a task takes at most: their block stays in the second-level cache.
const STRIPS: usize = 11;

/// Steps of the left side that are asked for ahead; at the end of a strip that is the next one's beginning.
const AHEAD: usize = 48;

/// Multiply-adds from which on a product is worth several threads.
const PARALLEL: usize = 128 * 1024;

/// `out = left right`, added to it if `add`; rows of `out` are `width` apart, its columns are the first of each.
pub(super) fn multiply<L: Lanes>(
    l: L,
    left: &Panels<'_>,
    right: &Panels<'_>,
    out: &mut [f32],
    width: usize,
    add: bool,
) {
    let (m, strips) = (left.side.outside, left.side.strips);
    if m * left.side.units * right.side.outside < PARALLEL {
        return multiply_here(l, left, right, out, width, add);
    }
    // Enough tasks for threads that are not equally fast, and as many for each if they are.
    let threads = rayon::current_num_threads();
    let tasks = strips
        .div_ceil(STRIPS)
        .max(4 * threads)
        .next_multiple_of(threads)
        .min(strips);
    let mut left_over = out;
    let cut = |i| {
        let part = par::part(strips, tasks, i);
        let len = (part.len() * ROWS * width).min(left_over.len());
        let (out, rest) = std::mem::take(&mut left_over).split_at_mut(len);
        left_over = rest;
        (part, out)
    };
    par::share((0..tasks).map(cut).collect(), |(part, out)| {
        l.run(Task {
            left,
            right,
            first: part.start,
            last: part.end,
            out,
            width,
            add,
        });
    });
}

/// [`multiply`] without other threads.
pub(super) fn multiply_here<L: Lanes>(
    l: L,
    left: &Panels<'_>,
    right: &Panels<'_>,
    out: &mut [f32],
    width: usize,
    add: bool,
) {
    l.run(Task {
        left,
        right,
        first: 0,
        last: left.side.strips,
        out,
        width,
        add,
    });
}

/// Some strips of rows against all columns.
struct Task<'a> {
    left: &'a Panels<'a>,
    right: &'a Panels<'a>,
    first: usize,
    last: usize,
    out: &'a mut [f32],
    width: usize,
    add: bool,
}

impl<L: Lanes> Work<L> for Task<'_> {
    #[inline(always)]
    fn on(self, l: L) {
        let Self {
            left,
            right,
            first,
            last,
            out,
            width,
            add,
        } = self;
        let (m, n) = (left.side.outside, right.side.outside);
        let wide = 2 * WIDTH;
        for block in right.side.blocks() {
            let add = add || block.start > 0;
            for column in 0..right.side.strips {
                let cols = (n - column * wide).min(wide);
                for row in first..last {
                    let rows = (m - row * ROWS).min(ROWS);
                    let out = &mut out[(row - first) * ROWS * width + column * wide..];
                    for i in 0..ROWS {
                        // Both ends: rows need not begin at a cache line. Where there is no such row, nothing happens.
                        let row = out.as_ptr().wrapping_add(i * width);
                        l.prefetch(row);
                        l.prefetch(row.wrapping_add(cols - 1));
                    }
                    let mut sums = [[l.zero(); 2]; ROWS];
                    for piece in right.side.pieces(&block) {
                        let (a, b) = (left.strip(row, &piece), right.strip(column, &piece));
                        sums = add_products(l, sums, a, b);
                    }
                    finish(l, &sums, out, width, rows, cols, add);
                }
            }
        }
    }
}

/// A tile, in registers, with the products of one piece added.
#[inline(always)]
fn add_products<L: Lanes>(
    l: L,
    mut sums: [[L::V; 2]; ROWS],
    a: &[u32],
    b: &[u32],
) -> [[L::V; 2]; ROWS] {
    for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(2 * WIDTH)) {
        let (left, right) = (l.load(b), l.load(&b[WIDTH..]));
        l.prefetch(a.as_ptr().wrapping_add(AHEAD * ROWS));
        for i in 0..ROWS {
            let x = l.splat(a[i]);
            sums[i][0] = l.dot(sums[i][0], x, left);
            sums[i][1] = l.dot(sums[i][1], x, right);
        }
    }
    sums
}

/// Writes a tile of `rows` and `cols`.
#[inline(always)]
fn finish<L: Lanes>(
    l: L,
    sums: &[[L::V; 2]; ROWS],
    out: &mut [f32],
    width: usize,
    rows: usize,
    cols: usize,
    add: bool,
) {
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    if cols < 2 * WIDTH {
        // A copy: what is lent to a call does not stay in registers.
        let sums = *sums;
        return cut(l, &sums, out, width, rows, cols, add);
    }
    for i in 0..ROWS {
        if i >= rows {
            break;
        }
        let out = &mut out[i * width..][..2 * WIDTH];
        let (mut low, mut high) = (sums[i][0], sums[i][1]);
        if add {
            low = l.add(low, l.load(out));
            high = l.add(high, l.load(&out[WIDTH..]));
        }
        l.store(low, out);
        l.store(high, &mut out[WIDTH..]);
    }
}

/// [`finish`] at the right edge.
#[inline(never)]
fn cut<L: Lanes>(
    l: L,
    sums: &[[L::V; 2]; ROWS],
    out: &mut [u32],
    width: usize,
    rows: usize,
    cols: usize,
    add: bool,
) {
    for (i, sums) in sums.iter().enumerate().take(rows) {
        let mut whole = [0; 2 * WIDTH];
        l.store(sums[0], &mut whole);
        l.store(sums[1], &mut whole[WIDTH..]);
        for (out, sum) in out[i * width..][..cols].iter_mut().zip(whole) {
            let before = if add { f32::from_bits(*out) } else { 0.0 };
            *out = (before + f32::from_bits(sum)).to_bits();
        }
    }
}
