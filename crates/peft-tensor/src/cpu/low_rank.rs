//! Gradients of a product of low rank: three thin products that read dy and x once between them.
//!
//! A task takes some rows, piece by piece: what it has read of dy and x is in the first- or second-level cache when the next
//! product wants it. Tasks are cut by the shapes alone, and their sums are added in their order.

use std::ops::Range;

use super::few;
use super::matmul::transpose;
use super::par;
use super::pool::Floats;
use super::simd::add_into;
use super::source::{BLOCK, Source};

/// Largest rank; beyond it, the products are worth packing for.
pub(super) const MOST: usize = 64;

/// Rows of a piece, about.
const PIECE: usize = 16;
/// Rows of a task at least, and tasks at most: each has sums of its own, of which there are about as many as `SUMS` at most.
const ROWS: usize = 64;
const TASKS: usize = 16;
const SUMS: usize = 8 << 20;

/// Values of sums that are added at a time, by one thread.
const CHUNK: usize = 4096;

/// See [`LowRankBack`](crate::LowRankBack).
pub(super) struct Back<'a> {
    pub(super) dy: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) x: Option<Source<'a>>,
    pub(super) low: Option<&'a [f32]>,
    pub(super) m: usize,
    pub(super) inside: usize,
    pub(super) out: usize,
    pub(super) r: usize,
    pub(super) scale: f32,
}

/// Gradients of `x At` `[m, r]`, of A `[r, inside]` and of B `[out, r]`.
pub(super) fn low_rank_grad(back: &Back<'_>) -> (Floats, Option<Floats>, Option<Floats>) {
    let Back {
        m, inside, out, r, ..
    } = *back;
    let mut dlow = Floats::dirty(m * r);
    let lens = [
        back.x.map_or(0, |_| r * inside),
        back.low.map_or(0, |_| r * out),
    ];
    let whole = whole_blocks(inside);
    let piece = PIECE.next_multiple_of(whole);
    let most = (SUMS / (r * (inside + out)).max(1)).clamp(1, TASKS);
    let rows = ROWS.max(m.div_ceil(most)).next_multiple_of(piece);
    let tasks = m.div_ceil(rows).max(1);
    let mut sums = Floats::dirty(tasks * (lens[0] + lens[1]));
    if m * r == 0 {
        sums.fill(0.0);
    } else {
        let mut columns = Floats::dirty(r * out);
        transpose(back.b, r, out, &mut columns);
        let task = |i: usize, dlow: &mut [f32], sums: &mut [f32]| {
            sums.fill(0.0);
            let (da, db) = sums.split_at_mut(lens[0]);
            let mut place = Floats::dirty(piece * inside);
            for (n, dlow) in dlow.chunks_mut(piece * r).enumerate() {
                let first = i * rows + n * piece;
                let rows = first..first + dlow.len() / r;
                back.piece(&rows, &columns, dlow, da, db, &mut place);
            }
        };
        let mut left = &mut sums[..];
        let parts = dlow.chunks_mut(rows * r).enumerate().map(|(i, dlow)| {
            let (sums, rest) = std::mem::take(&mut left).split_at_mut(lens[0] + lens[1]);
            left = rest;
            (i, dlow, sums)
        });
        par::share(parts.collect(), |(i, dlow, sums)| task(i, dlow, sums));
    }
    let (sum, rest) = sums.split_at_mut(lens[0] + lens[1]);
    let rest: Vec<_> = rest.chunks(sum.len().max(1)).collect();
    par::chunks(sum, CHUNK, |i, sum| {
        for part in &rest {
            add_into(&part[i * CHUNK..][..sum.len()], sum);
        }
    });
    let (da, db) = sum.split_at(lens[0]);
    let of_b = || {
        let mut by_rows = Floats::dirty(db.len());
        transpose(db, out, r, &mut by_rows);
        by_rows
    };
    (
        dlow,
        back.x.map(|_| Floats::copied(da)),
        back.low.map(|_| of_b()),
    )
}

/// Rows after which a block of any form ends where a row of so many values does.
fn whole_blocks(inside: usize) -> usize {
    let mut whole = BLOCK;
    while whole > 1 && (whole / 2 * inside).is_multiple_of(BLOCK) {
        whole /= 2;
    }
    whole
}

impl Back<'_> {
    fn piece(
        &self,
        rows: &Range<usize>,
        columns: &[f32],
        dlow: &mut [f32],
        da: &mut [f32],
        db: &mut [f32],
        place: &mut [f32],
    ) {
        let Self { inside, out, r, .. } = *self;
        let dy = &self.dy[rows.start * out..rows.end * out];
        few::thin(dy, columns, out, r, dlow, false);
        for v in dlow.iter_mut() {
            *v *= self.scale;
        }
        if let Some(low) = self.low {
            few::outer(&low[rows.start * r..rows.end * r], r, dy, out, db);
        }
        if let Some(x) = self.x {
            let x = x.read(rows.start * inside..rows.end * inside, place);
            few::outer(dlow, r, x, inside, da);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::codes::Codes;
    use super::super::half::Halves;
    use super::*;
    use crate::RngKey;

    fn normal(seed: u64, n: usize) -> Vec<f32> {
        let mut values = vec![0.0; n];
        RngKey::new(seed).fill_normal(0.0, 1.0, &mut values);
        values
    }

    /// `at b` of a `[m, n]`, b `[m, k]`.
    fn product(a: &[f32], b: &[f32], n: usize, k: usize) -> Vec<f64> {
        let mut out = vec![0.0; n * k];
        for (a, b) in a.chunks(n).zip(b.chunks(k)) {
            for (a, out) in a.iter().zip(out.chunks_mut(k)) {
                for (b, out) in b.iter().zip(out) {
                    *out += f64::from(*a) * f64::from(*b);
                }
            }
        }
        out
    }

    fn close(got: &[f32], want: &[f64], what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let size = want.iter().fold(1.0f64, |m, w| m.max(w.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(error <= 3e-6 * size, "{what}, {i}: {got} for {want}");
        }
    }

    #[test]
    fn gradients_are_the_products_in_every_form_of_x() {
        // Several tasks and pieces, rows that end inside of a block, one row, and none.
        let shapes = [
            (150, 48, 33, 8),
            (1100, 9, 20, 3),
            (1, 64, 7, 1),
            (70, 21, 16, 13),
            (0, 8, 8, 2),
        ];
        for (m, inside, out, r) in shapes {
            let (dy, b, low) = (normal(1, m * out), normal(2, out * r), normal(3, m * r));
            let x = normal(4, m * inside);
            let (halves, codes) = (Halves::pack(&x), Codes::pack(&x));
            let forms = [
                Source::Whole(&x),
                Source::Halves(&halves),
                Source::Codes(&codes),
            ];
            let values = [x.clone(), halves.unpack().to_vec(), codes.unpack().to_vec()];
            for (form, x) in forms.into_iter().zip(&values) {
                let what = format!("{m} {inside} {out} {r}");
                let (dlow, da, db) = low_rank_grad(&Back {
                    dy: &dy,
                    b: &b,
                    x: Some(form),
                    low: Some(&low),
                    m,
                    inside,
                    out,
                    r,
                    scale: 0.7,
                });
                let rows = dy.chunks(out).flat_map(|dy| {
                    let columns = (0..r).map(|j| b.iter().skip(j).step_by(r));
                    columns.map(|column| {
                        let products = dy.iter().zip(column);
                        0.7 * products
                            .map(|(dy, b)| f64::from(*dy) * f64::from(*b))
                            .sum::<f64>()
                    })
                });
                close(&dlow, &rows.collect::<Vec<_>>(), &what);
                close(&da.unwrap(), &product(&dlow, x, r, inside), &what);
                close(&db.unwrap(), &product(&dy, &low, out, r), &what);
            }
            // Only what is wanted.
            let (dlow, da, db) = low_rank_grad(&Back {
                dy: &dy,
                b: &b,
                x: None,
                low: None,
                m,
                inside,
                out,
                r,
                scale: 1.0,
            });
            assert!(dlow.len() == m * r && da.is_none() && db.is_none());
        }
    }
}
