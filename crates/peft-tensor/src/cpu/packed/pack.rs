//! Bringing both sides of a product into panels.
//!
//! A panel side is cut into strips of as many rows (of `x`) or columns (of the result) as a tile has; in a strip, the units
//! of one step along the inner dimension stand together. What is missing at the end of the inner dimension is zero; what is
//! missing of a last strip is anything. Of values that are sums of several parts, all are made at once.

use super::lanes::{Lanes, WIDTH, Work};
use super::side::Side;
use crate::cpu::par;
use crate::cpu::pool::Floats;
use crate::{FrozenWeight, WeightFormat};

/// Units that are worth waking a thread to pack.
pub(super) const TASK: usize = 16 * 1024;

/// Values or units of which registers are made.
pub(super) trait Item: Copy + Default + Sync {
    /// Items of a register.
    const REGISTER: usize;
    /// The register of the first of them, in so many parts.
    fn registers<L: Lanes, const PARTS: usize>(l: L, items: &[Self]) -> [L::V; PARTS];
}

impl Item for f32 {
    const REGISTER: usize = 2 * WIDTH;

    #[inline(always)]
    fn registers<L: Lanes, const PARTS: usize>(l: L, items: &[Self]) -> [L::V; PARTS] {
        if PARTS == 1 {
            return [l.units(items); PARTS];
        }
        let all = l.parts(items);
        let mut some = [all[0]; PARTS];
        some.copy_from_slice(&all[..PARTS]);
        some
    }
}

/// Units that are stored as such: values of one part.
impl Item for u32 {
    const REGISTER: usize = WIDTH;

    #[inline(always)]
    fn registers<L: Lanes, const PARTS: usize>(l: L, items: &[Self]) -> [L::V; PARTS] {
        debug_assert_eq!(PARTS, 1);
        [l.load(items); PARTS]
    }
}

/// Does work in as many parts as a side has.
macro_rules! in_parts {
    ($l:expr, $side:expr, $work:ident { $($field:tt)* }) => {
        match $side.parts {
            1 => $l.run($work::<_, 1> { $($field)* }),
            2 => $l.run($work::<_, 2> { $($field)* }),
            _ => $l.run($work::<_, 3> { $($field)* }),
        }
    };
}

/// One strip of rows that are contiguous along the inner dimension: a transpose, square by square.
struct Strip<'a, T, const PARTS: usize> {
    /// Rows `stride` apart, of which the first `inside` items count.
    rows: &'a [T],
    stride: usize,
    inside: usize,
    /// How many there are, and how many a full strip has.
    count: usize,
    take: usize,
    /// From a part to the next.
    apart: usize,
    out: &'a mut [u32],
}

impl<L: Lanes, T: Item, const PARTS: usize> Work<L> for Strip<'_, T, PARTS> {
    #[inline(always)]
    fn on(self, l: L) {
        let (take, wide) = (self.take, T::REGISTER);
        for group in (0..take).step_by(WIDTH) {
            // Where the rows begin. Instead of one that is not there the last is taken: nobody looks at what comes of it.
            let mut starts = [0; WIDTH];
            for (i, start) in starts.iter_mut().enumerate() {
                *start = (group + i).min(self.count - 1) * self.stride;
            }
            for at in (0..self.inside).step_by(wide) {
                // Registers for one part; squares of several go by way of the first-level cache.
                let mut squares = [[[0; WIDTH]; WIDTH]; PARTS];
                let mut square = [l.zero(); WIDTH];
                for i in 0..WIDTH {
                    let row: [L::V; PARTS] =
                        registers(l, &self.rows[starts[i]..][..self.inside], at);
                    square[i] = row[0];
                    for part in 1..PARTS {
                        l.store(row[part], &mut squares[part][i]);
                    }
                }
                for part in 0..PARTS {
                    if part > 0 {
                        for i in 0..WIDTH {
                            square[i] = l.load(&squares[part][i]);
                        }
                    }
                    transpose(l, &mut square);
                    let first = part * self.apart + group + at / wide * WIDTH * take;
                    let end = (part + 1) * self.apart;
                    let out = &mut self.out[first..end];
                    // A strip narrower than a register is overwritten by the step after it, but for the last steps.
                    if out.len() >= (WIDTH - 1) * take + WIDTH {
                        for i in 0..WIDTH {
                            l.store(square[i], &mut out[i * take..]);
                        }
                    } else {
                        cut(l, square, take, out);
                    }
                }
            }
        }
    }
}

/// Stores what there is room for.
#[inline(never)]
fn cut<L: Lanes>(l: L, square: [L::V; WIDTH], take: usize, out: &mut [u32]) {
    for (register, out) in square.into_iter().zip(out.chunks_mut(take)) {
        let mut whole = [0; WIDTH];
        l.store(register, &mut whole);
        let len = out.len().min(WIDTH);
        out[..len].copy_from_slice(&whole[..len]);
    }
}

/// The registers of a row from one item on, zero beyond.
#[inline(always)]
pub(super) fn registers<L: Lanes, T: Item, const PARTS: usize>(
    l: L,
    row: &[T],
    at: usize,
) -> [L::V; PARTS] {
    let items = row.get(at..).unwrap_or(&[]);
    match items.len() >= T::REGISTER {
        true => T::registers(l, items),
        false => remainder(l, items),
    }
}

/// The registers of what is left of a row, zero beyond.
#[inline(never)]
pub(super) fn remainder<L: Lanes, T: Item, const PARTS: usize>(l: L, items: &[T]) -> [L::V; PARTS] {
    let mut padded = [T::default(); 2 * WIDTH];
    padded[..items.len()].copy_from_slice(items);
    T::registers(l, &padded)
}

/// The first `WIDTH` registers as columns: each pass turns the bits of an element's place, its row's before its lane's, by
/// one, and half of all turns swap row and lane.
#[inline(always)]
pub(super) fn transpose<L: Lanes>(l: L, square: &mut [L::V; WIDTH]) {
    let half = WIDTH / 2;
    let mut width = 1;
    while width < WIDTH {
        let before = *square;
        for i in 0..half {
            (square[2 * i], square[2 * i + 1]) = l.zip(before[i], before[i + half]);
        }
        width *= 2;
    }
}

/// Packs `m` rows of `stride` values, the first `inside` of each, and the rows of `low` behind them.
pub(super) fn rows<L: Lanes>(
    l: L,
    side: &Side,
    x: &[f32],
    stride: usize,
    inside: usize,
    low: &[f32],
    out: &mut [u32],
) {
    strips(l, side, x, stride, inside, low, out);
}

/// Packs all strips of a side from its rows and those of `low`.
fn strips<L: Lanes, T: Item>(
    l: L,
    side: &Side,
    rows: &[T],
    stride: usize,
    inside: usize,
    low: &[f32],
    out: &mut [u32],
) {
    let size = (side.parts * side.take * side.units).max(1);
    let together = (TASK / size).max(1);
    par::chunks(out, size * together, |task, out| {
        for (i, out) in out.chunks_mut(size).enumerate() {
            let strip = task * together + i;
            one_strip(l, side, rows, stride, inside, strip, out);
            low_strip(l, side, low, strip, out);
        }
    });
}

fn one_strip<L: Lanes, T: Item>(
    l: L,
    side: &Side,
    rows: &[T],
    stride: usize,
    inside: usize,
    strip: usize,
    out: &mut [u32],
) {
    let take = side.take;
    let first = strip * take;
    in_parts!(
        l,
        side,
        Strip {
            rows: &rows[first * stride..],
            stride,
            inside,
            count: (side.outside - first).min(take),
            take,
            apart: out.len() / side.parts,
            out,
        }
    );
}

/// The end of a strip, after the rest of it: rows of `low`.
fn low_strip<L: Lanes>(l: L, side: &Side, low: &[f32], strip: usize, out: &mut [u32]) {
    if side.low > 0 {
        let out = &mut out[side.own() * side.take..];
        one_strip(l, side, low, side.low, side.low, strip, out);
    }
}

/// Packs rows of a dense matrix, `stride` apart, the first `inside` values of each.
pub(super) fn dense_rows<L: Lanes>(
    l: L,
    side: &Side,
    x: &[f32],
    stride: usize,
    inside: usize,
    out: &mut [u32],
) {
    let size = (side.parts * side.take * side.units).max(1);
    for (strip, out) in out.chunks_mut(size).enumerate() {
        one_strip(l, side, x, stride, inside, strip, out);
    }
}

/// The stored units of a bfloat16 matrix, where they are what the lanes want and can be read as such.
pub(super) fn stored(w: &FrozenWeight) -> Option<&[u32]> {
    let fits = w.format() == WeightFormat::BF16 && w.cols().is_multiple_of(2);
    if !fits || cfg!(target_endian = "big") {
        return None;
    }
    bytemuck::try_cast_slice(w.bytes()).ok()
}

/// Packs rows `first..` of a weight, as many as the side has, as columns of the right side, and behind each a row of `low`.
pub(super) fn weight_rows<L: Lanes>(
    l: L,
    side: &Side,
    w: &FrozenWeight,
    first: usize,
    low: &[f32],
    out: &mut [u32],
) {
    let (take, cols) = (side.take, w.cols());
    if let Some(all) = stored(w) {
        let units = cols / 2;
        return strips(l, side, &all[first * units..], units, units, low, out);
    }
    if let Some(values) = w.as_f32() {
        return strips(l, side, &values[first * cols..], cols, cols, low, out);
    }
    par::chunks(out, side.parts * take * side.units, |strip, out| {
        let count = (side.outside - strip * take).min(take);
        let from = first + strip * take;
        let mut rows = Floats::dirty(count * cols);
        w.decode_rows(from..from + count, &mut rows);
        in_parts!(
            l,
            side,
            Strip {
                rows: &rows[..],
                stride: cols,
                inside: cols,
                count,
                take,
                apart: out.len() / side.parts,
                out,
            }
        );
        low_strip(l, side, low, strip, out);
    });
}
