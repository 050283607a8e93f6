//! Dot products of stored rows with a row of f32, and of a few decoded rows with several, written once over the functions
//! of [`lanes`](super::lanes).
//!
//! Every sum is taken in sixteen lanes, those by halves, then what is left over of a row, one by one: a result depends on
//! neither the number of threads nor how many rows are taken together. Four stored rows at a time hide the latency of
//! the additions; they are taken from four places far apart, each of which goes on where it was, because the processor
//! foresees a few long streams well, and rows that are read side by side end before it has (measured: 24 and 36 GB/s
//! of bfloat16 rows of 576).

/// `$run` on four rows at a time, one of each quarter of the rows, then on what is left; rows begin `row` elements of `w`
/// apart.
macro_rules! in_quarters {
    ($run:ident, $w:ident, $row:ident, $out:ident, $($arg:expr),*) => {
        let quarter = $out.len() / 4;
        for i in 0..quarter {
            let mut four = [0.0; 4];
            $run::<4>(&$w[i * $row..], quarter * $row, &mut four, $($arg),*);
            for (r, v) in four.into_iter().enumerate() {
                $out[r * quarter + i] = v;
            }
        }
        for i in 4 * quarter..$out.len() {
            $run::<1>(&$w[i * $row..], $row, std::array::from_mut(&mut $out[i]), $($arg),*);
        }
    };
}

/// Plain values, sixteen in `$bytes` bytes, read by `$read`.
macro_rules! floats {
    ($name:ident, $read:ident, $bytes:literal $(, $feature:literal)?) => {
        $(#[target_feature(enable = $feature)])?
        pub(in super::super) fn $name(x: &[f32], w: &[u8], row: usize, out: &mut [f32]) {
            $(#[target_feature(enable = $feature)])?
            #[inline]
            fn some<const R: usize>(w: &[u8], row: usize, out: &mut [f32; R], x: &[f32]) {
                let (x, tail) = x.as_chunks::<16>();
                let rows: [&[[u8; $bytes]]; R] = units(w, row, x.len());
                let mut acc = [splat(0.0); R];
                for (i, x) in x.iter().enumerate() {
                    let x = load(x);
                    for r in 0..R {
                        ahead(&rows[r][i], AHEAD);
                        acc[r] = fma($read(&rows[r][i]), x, acc[r]);
                    }
                }
                for r in 0..R {
                    out[r] = sum(acc[r]);
                    if !tail.is_empty() {
                        let left = &w[r * row + x.len() * $bytes..][..tail.len() * ($bytes / 16)];
                        let mut bytes = [0; $bytes];
                        bytes[..left.len()].copy_from_slice(left);
                        for (x, w) in tail.iter().zip(plain::$read(&bytes)) {
                            out[r] += x * w;
                        }
                    }
                }
            }
            in_quarters!(some, w, row, out, x);
        }
    };
}

/// Blocks of 32 values in `$bytes` bytes, read by `$read` as a scale, the minimum if it is `$shifted`, and the values, all of
/// which are `$zero` too large.
macro_rules! blocks {
    ($name:ident, $read:ident, $bytes:literal, $shifted:literal, $zero:literal $(, $feature:literal)?) => {
        $(#[target_feature(enable = $feature)])?
        pub(in super::super) fn $name(x: &[f32], w: &[u8], row: usize, out: &mut [f32]) {
            $(#[target_feature(enable = $feature)])?
            #[inline]
            fn some<const R: usize>(w: &[u8], row: usize, out: &mut [f32; R], x: &[f32]) {
                let x = x.as_chunks::<16>().0.as_chunks::<2>().0;
                let rows: [&[[u8; $bytes]]; R] = units(w, row, x.len());
                let mut acc = [splat(0.0); R];
                for (i, [a, b]) in x.iter().enumerate() {
                    let (a, b) = (load(a), load(b));
                    // What the values are too large by is the same for all rows.
                    let excess = mul(splat(-$zero), add(a, b));
                    for r in 0..R {
                        ahead(&rows[r][i], AHEAD);
                        let (scale, least, [v, w]) = $read(&rows[r][i]);
                        let part = if $zero == 0.0 { mul(v, a) } else { fma(v, a, excess) };
                        acc[r] = fma(scale, fma(w, b, part), acc[r]);
                        if $shifted {
                            acc[r] = fma(least, add(a, b), acc[r]);
                        }
                    }
                }
                for r in 0..R {
                    out[r] = sum(acc[r]);
                }
            }
            in_quarters!(some, w, row, out, x);
        }
    };
}

/// The first `n` units of rows that begin `row` bytes apart.
#[inline(always)]
fn units<const N: usize, const R: usize>(w: &[u8], row: usize, n: usize) -> [&[[u8; N]]; R] {
    let mut all = [&[][..]; R];
    for r in 0..R {
        all[r] = &w[r * row..].as_chunks().0[..n];
    }
    all
}

/// Rows of `k` values, `row` apart, in sixteens, and what is left over.
#[inline(always)]
fn sixteens<const R: usize>(x: &[f32], row: usize, k: usize) -> [(&[[f32; 16]], &[f32]); R] {
    let mut all = [(&[][..], &[][..]); R];
    for r in 0..R {
        all[r] = x[r * row..][..k].as_chunks();
    }
    all
}

macro_rules! kernels {
    ($lanes:ident, $together:literal, $wide:literal $(, $feature:literal)?) => {
        pub(super) mod $lanes {
            use super::super::lanes::{$lanes::*, AHEAD, Codes, PAGE, plain};
            use super::{sixteens, units};

            floats!(f32_rows, f32s, 64 $(, $feature)?);
            floats!(bf16_rows, bf16s, 32 $(, $feature)?);
            floats!(f16_rows, f16s, 32 $(, $feature)?);
            floats!(i8_rows, signed, 16 $(, $feature)?);
            blocks!(q8_0_rows, q8_0, 34, false, 0.0 $(, $feature)?);
            blocks!(q4_0_rows, q4_0, 18, false, 8.0 $(, $feature)?);
            blocks!(q4_1_rows, q4_1, 20, true, 0.0 $(, $feature)?);

            $(#[target_feature(enable = $feature)])?
            #[inline]
            fn q8_0([d0, d1, q @ ..]: &[u8; 34]) -> (F, F, [F; 2]) {
                let q: &[u8; 32] = q;
                let [low, high] = [&q.as_chunks().0[0], &q.as_chunks().0[1]];
                (half([*d0, *d1]), splat(0.0), [signed(low), signed(high)])
            }

            $(#[target_feature(enable = $feature)])?
            #[inline]
            fn q4_0([d0, d1, q @ ..]: &[u8; 18]) -> (F, F, [F; 2]) {
                (half([*d0, *d1]), splat(0.0), nibbles(q))
            }

            $(#[target_feature(enable = $feature)])?
            #[inline]
            fn q4_1([d0, d1, m0, m1, q @ ..]: &[u8; 20]) -> (F, F, [F; 2]) {
                (half([*d0, *d1]), half([*m0, *m1]), nibbles(q))
            }

            /// Blocks of 64 codes of `table` with a scale; `x` as [`sorted`](super::super::sorted) puts it for this level.
            $(#[target_feature(enable = $feature)])?
            pub(in super::super) fn code_rows(x: &[f32], w: &[u8], row: usize, out: &mut [f32], codes: &Codes) {
                $(#[target_feature(enable = $feature)])?
                #[inline]
                fn some<const R: usize>(w: &[u8], row: usize, out: &mut [f32; R], x: &[f32], table: &Table) {
                    let x = x.as_chunks::<16>().0.as_chunks::<4>().0;
                    let rows: [&[[u8; 36]]; R] = units(w, row, x.len());
                    let mut acc = [splat(0.0); R];
                    for (i, [a, b, c, d]) in x.iter().enumerate() {
                        let (a, b, c, d) = (load(a), load(b), load(c), load(d));
                        for r in 0..R {
                            ahead(&rows[r][i], PAGE);
                            let [s0, s1, s2, s3, codes @ ..] = &rows[r][i];
                            let scale = f32::from_le_bytes([*s0, *s1, *s2, *s3]);
                            let [e, f, g, h] = look(table, codes);
                            let part = fma(h, d, fma(g, c, fma(f, b, mul(e, a))));
                            acc[r] = fma(splat(scale), part, acc[r]);
                        }
                    }
                    for r in 0..R {
                    out[r] = sum(acc[r]);
                }
                }
                let table = table(codes);
                for (i, out) in out.iter_mut().enumerate() {
                    some::<1>(&w[i * row..], row, std::array::from_mut(out), x, &table);
                }
            }

            /// Each of `m` rows of `x` with each of `w`'s, `k` wide and `row` apart: `out [rows of w, m]`. As many rows of `w`
            /// are taken together as there are registers for sums with three rows of `x`.
            $(#[target_feature(enable = $feature)])?
            pub(in super::super) fn tile(x: &[f32], w: &[f32], k: usize, row: usize, m: usize, out: &mut [f32]) {
                $(#[target_feature(enable = $feature)])?
                #[inline]
                fn some<const R: usize, const M: usize>(x: &[f32], w: &[f32], k: usize, row: usize, m: usize, out: &mut [f32]) {
                    let xs: [(&[[f32; 16]], &[f32]); M] = sixteens(x, k, k);
                    let ws: [(&[[f32; 16]], &[f32]); R] = sixteens(w, row, k);
                    let mut acc = [[splat(0.0); M]; R];
                    for i in 0..k / 16 {
                        let mut w = [splat(0.0); R];
                        for r in 0..R {
                            w[r] = load(&ws[r].0[i]);
                        }
                        for c in 0..M {
                            let x = load(&xs[c].0[i]);
                            for r in 0..R {
                                acc[r][c] = fma(w[r], x, acc[r][c]);
                            }
                        }
                    }
                    for r in 0..R {
                        for c in 0..M {
                            let left = xs[c].1.iter().zip(ws[r].1);
                            out[r * m + c] = left.fold(sum(acc[r][c]), |sum, (x, w)| sum + x * w);
                        }
                    }
                }
                $(#[target_feature(enable = $feature)])?
                #[inline]
                fn all<const R: usize>(x: &[f32], w: &[f32], k: usize, row: usize, m: usize, out: &mut [f32]) {
                    for c in (0..m).step_by(3) {
                        let (x, out) = (&x[c * k..], &mut out[c..]);
                        match m - c {
                            1 => some::<R, 1>(x, w, k, row, m, out),
                            2 => some::<R, 2>(x, w, k, row, m, out),
                            _ => some::<R, 3>(x, w, k, row, m, out),
                        }
                    }
                }
                let rows = out.len() / m;
                let mut r = 0;
                while r < rows {
                    let (w, out) = (&w[r * row..], &mut out[r * m..]);
                    r += match rows - r {
                        1 => {
                            all::<1>(x, w, k, row, m, out);
                            1
                        }
                        left if left < $together => {
                            all::<2>(x, w, k, row, m, out);
                            2
                        }
                        _ => {
                            all::<$together>(x, w, k, row, m, out);
                            $together
                        }
                    };
                }
            }

            /// `out [r, k] += st x` for as many rows of s, `[.., r]`, as x has, `[.., k]`. As many rows of `out` stay in
            /// registers as there are for `$wide` of their columns of sixteen.
            $(#[target_feature(enable = $feature)])?
            pub(in super::super) fn outer(s: &[f32], r: usize, x: &[f32], k: usize, out: &mut [f32]) {
                $(#[target_feature(enable = $feature)])?
                #[inline]
                fn some<const R: usize, const C: usize>(s: &[f32], r: usize, x: &[f32], k: usize, out: &mut [f32]) {
                    let mut acc = [[splat(0.0); C]; R];
                    for (i, acc) in acc.iter_mut().enumerate() {
                        for (c, acc) in acc.iter_mut().enumerate() {
                            *acc = load(&out[i * k..].as_chunks::<16>().0[c]);
                        }
                    }
                    for (s, x) in s.chunks(r).zip(x.chunks(k)) {
                        let (s, x) = (&s[..R], &x.as_chunks::<16>().0[..C]);
                        let mut row = [splat(0.0); C];
                        for c in 0..C {
                            row[c] = load(&x[c]);
                        }
                        for i in 0..R {
                            for c in 0..C {
                                acc[i][c] = fma(splat(s[i]), row[c], acc[i][c]);
                            }
                        }
                    }
                    for (i, acc) in acc.into_iter().enumerate() {
                        for (c, acc) in acc.into_iter().enumerate() {
                            store(acc, &mut out[i * k..].as_chunks_mut::<16>().0[c]);
                        }
                    }
                }
                $(#[target_feature(enable = $feature)])?
                #[inline]
                fn all<const R: usize>(s: &[f32], r: usize, x: &[f32], k: usize, out: &mut [f32]) {
                    let mut at = 0;
                    while at + 16 * $wide <= k {
                        some::<R, $wide>(s, r, &x[at..], k, &mut out[at..]);
                        at += 16 * $wide;
                    }
                    while at + 16 <= k {
                        some::<R, 1>(s, r, &x[at..], k, &mut out[at..]);
                        at += 16;
                    }
                    for (s, x) in s.chunks(r).zip(x.chunks(k)) {
                        for i in 0..R {
                            for c in at..k {
                                out[i * k + c] += s[i] * x[c];
                            }
                        }
                    }
                }
                let mut i = 0;
                while i < r {
                    let (s, out) = (&s[i..], &mut out[i * k..]);
                    i += match r - i {
                        8.. if $wide > 1 => {
                            all::<8>(s, r, x, k, out);
                            8
                        }
                        4.. => {
                            all::<4>(s, r, x, k, out);
                            4
                        }
                        _ => {
                            all::<1>(s, r, x, k, out);
                            1
                        }
                    };
                }
            }

            /// `out += a w` for rows `w` as wide as `out`, `row` apart, and a factor for each.
            $(#[target_feature(enable = $feature)])?
            pub(in super::super) fn add_rows(a: &[f32], w: &[f32], row: usize, out: &mut [f32]) {
                $(#[target_feature(enable = $feature)])?
                #[inline]
                fn some<const R: usize>(a: &[f32; R], w: &[f32], row: usize, out: &mut [f32]) {
                    let k = out.len();
                    let ws: [(&[[f32; 16]], &[f32]); R] = sixteens(w, row, k);
                    let (out, tail) = out.as_chunks_mut::<16>();
                    for (i, out) in out.iter_mut().enumerate() {
                        let mut sum = load(out);
                        for r in 0..R {
                            sum = fma(splat(a[r]), load(&ws[r].0[i]), sum);
                        }
                        store(sum, out);
                    }
                    for (i, out) in tail.iter_mut().enumerate() {
                        for r in 0..R {
                            *out += a[r] * ws[r].1[i];
                        }
                    }
                }
                let (fours, ones) = a.as_chunks::<4>();
                for (i, a) in fours.iter().enumerate() {
                    some(a, &w[4 * i * row..], row, out);
                }
                for (i, a) in ones.iter().enumerate() {
                    some(&[*a], &w[(4 * fours.len() + i) * row..], row, out);
                }
            }
        }
    };
}

kernels!(plain, 2, 1);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, 2, 1, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(avx512, 8, 3, "avx512f,avx2,fma,f16c");
