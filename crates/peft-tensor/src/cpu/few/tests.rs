use super::*;
use crate::{Bytes, RngKey, encode};

/// The levels this machine has, the plain one first.
fn levels() -> Vec<Level> {
    let mut all = vec![Level::Base];
    #[cfg(target_arch = "x86_64")]
    {
        if level() != Level::Base {
            all.push(Level::Avx2);
        }
        if level() == Level::Avx512 {
            all.push(Level::Avx512);
        }
    }
    all
}

/// What runs and what is tested is the best that the processor has, not something below it.
#[test]
fn the_levels_are_the_processors() {
    let names = ["plain", "AVX2", "AVX-512"];
    eprintln!("levels: {}", names[..levels().len()].join(", "));
    assert!(levels().last() == Some(&level()));
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma") && has!("f16c");
        let wide = has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq");
        assert_eq!(
            levels().len(),
            1 + usize::from(avx2) + usize::from(avx2 && wide)
        );
    }
}

fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut values = vec![0.0; n];
    RngKey::new(seed).fill_normal(0.0, 1.0, &mut values);
    values
}

/// A weight in a format, also in those that nothing encodes: there any bytes are blocks, with a scale that is a number.
fn weight(format: WeightFormat, rows: usize, cols: usize) -> FrozenWeight {
    let values = normal(rows as u64, rows * cols);
    let bytes = encode(format, &values, cols).unwrap_or_else(|_| {
        let n = format.matrix_bytes(rows, cols).unwrap();
        (0..n).map(|i| (i * 37 % 59) as u8).collect()
    });
    FrozenWeight::new(rows, cols, format, Bytes::from_vec(bytes)).unwrap()
}

/// `x Wt` in f64, with the magnitude that an error is measured by.
fn want(x: &[f32], w: &[f32], cols: usize) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for x in x.chunks(cols) {
        for w in w.chunks(cols) {
            let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let size: f64 = products.clone().map(f64::abs).sum();
            out.push((products.sum(), size));
        }
    }
    out
}

fn close(got: &[f32], want: &[(f64, f64)], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, (want, size))) in got.iter().zip(want).enumerate() {
        // A few roundings of a sum of `size`; codes around a zero cancel to a value a few times smaller.
        let error = (f64::from(*got) - want).abs();
        assert!(
            error <= 2e-6 * size + 1e-30,
            "{what}, {i}: {got} for {want}"
        );
    }
}

#[test]
fn every_format_at_every_level_is_the_product_of_the_decoded_rows() {
    for format in WeightFormat::all() {
        let multiple = format.block_len();
        // 27 rows: fours, threes and pairs with one left over.
        for cols in [multiple, 256, 576].map(|c: usize| c.next_multiple_of(multiple)) {
            let w = weight(*format, 27, cols);
            let values = w.to_f32();
            for m in [1, 2, 3, 4, 7, 16] {
                let x = normal(9, m * cols);
                let want = want(&x, &values, cols);
                for level in levels() {
                    let name = format!("{} x {cols}, {m} rows", format.name());
                    close(&frozen_at(level, &x, m, &[&w])[0], &want, &name);
                }
            }
        }
    }
}

/// Small whole numbers have exact sums, so that levels which add in another way must agree to the bit; each place has a
/// value of its own, so that no two can be exchanged.
#[test]
fn levels_agree_to_the_bit_where_sums_are_exact() {
    let mut table = [0.0; 16];
    for (i, value) in table.iter_mut().enumerate() {
        *value = (i * i) as f32 - 7.0;
    }
    let x: Vec<f32> = (0..192).map(|i| (i * 5 % 23) as f32 - 11.0).collect();
    let bytes: Vec<u8> = (0..5 * 3 * 36)
        .map(|i| match i % 36 {
            0 | 1 => 0,
            2 => 0x40,
            3 => 0x40,
            i => (i * 29 % 251) as u8,
        })
        .collect();
    let all = levels().into_iter().map(|level| {
        let mut out = [0.0; 5];
        let sorted = sorted(level, &x);
        at!(level, code_rows(&sorted, &bytes, 108, &mut out, &table));
        out
    });
    let all: Vec<[f32; 5]> = all.collect();
    // Scales are 3.
    let mut want = [0.0; 5];
    for (want, row) in want.iter_mut().zip(bytes.chunks(108)) {
        for (x, block) in x.chunks(64).zip(row.chunks(36)) {
            for (x, byte) in x.chunks(2).zip(&block[4..]) {
                let [high, low] = [byte >> 4, byte & 15].map(|code| table[usize::from(code)]);
                *want += 3.0 * (x[0] * high + x[1] * low);
            }
        }
    }
    for got in all {
        assert_eq!(got, want);
    }
}

#[test]
fn odd_widths_keep_their_tails() {
    for cols in [1, 15, 17, 33, 100] {
        for format in [
            WeightFormat::F32,
            WeightFormat::BF16,
            WeightFormat::F16,
            WeightFormat::INT8,
            WeightFormat::NF4,
        ] {
            let w = weight(format, 11, cols);
            for m in [1, 5] {
                let x = normal(2, m * cols);
                let want = want(&x, &w.to_f32(), cols);
                for level in levels() {
                    let name = format!("{} x {cols}, {m} rows", format.name());
                    close(&frozen_at(level, &x, m, &[&w])[0], &want, &name);
                }
            }
        }
    }
}

#[test]
fn dense_rows_and_sums_of_rows() {
    let (k, n) = (70, 37);
    let w = weight(WeightFormat::F32, n, k);
    let values = w.to_f32();
    let turned: Vec<f32> = (0..k * n).map(|i| values[i % n * k + i / n]).collect();
    for m in [1, 3, 8] {
        let (x, y) = (normal(1, m * k), normal(2, m * n));
        for level in levels() {
            let mut out = vec![0.0; m * n];
            dense_at(level, &x, &values, m, k, &mut out, true);
            close(&out, &want(&x, &values, k), "dense");
            let sums = frozen_t_at(level, &y, m, &w);
            close(&sums, &want(&y, &turned, n), "sums of rows");
        }
    }
    for format in [WeightFormat::NF4, WeightFormat::Q4K, WeightFormat::BF16] {
        let w = weight(format, 300, 256);
        let values = w.to_f32();
        let turned: Vec<f32> = (0..300 * 256)
            .map(|i| values[i % 300 * 256 + i / 300])
            .collect();
        let y = normal(3, 2 * 300);
        close(&frozen_t(&y, 2, &w), &want(&y, &turned, 300), format.name());
    }
}

#[test]
fn results_do_not_depend_on_threads_or_company() {
    let (a, b) = (
        weight(WeightFormat::BF16, 700, 576),
        weight(WeightFormat::NF4, 300, 576),
    );
    let x = normal(4, 5 * 576);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let both = frozen(&x[..576], 1, &[&a, &b]);
            let alone = frozen(&x[..576], 1, &[&b]);
            assert_eq!(both[1][..], alone[0][..]);
            let five = frozen(&x, 5, &[&a]);
            let sums = frozen_t(&x[..2 * 300], 2, &b);
            [
                both[0].to_vec(),
                both[1].to_vec(),
                five[0].to_vec(),
                sums.to_vec(),
            ]
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
    // A row's result is that of the row alone.
    let alone = frozen(&x[..576], 1, &[&a]);
    assert_eq!(one[2][..700], alone[0][..]);
}

#[test]
fn outer_products_at_every_level() {
    for (m, r, k) in [
        (1, 1, 1),
        (5, 3, 16),
        (16, 8, 115),
        (17, 13, 48),
        (3, 20, 64),
    ] {
        let (s, x) = (normal(1, m * r), normal(2, m * k));
        let before = normal(3, r * k);
        let columns = |v: &[f32], n: usize| -> Vec<f32> {
            (0..n)
                .flat_map(|c| v.iter().skip(c).step_by(n).copied())
                .collect()
        };
        let mut sums = want(&columns(&s, r), &columns(&x, k), m);
        for ((sum, size), before) in sums.iter_mut().zip(&before) {
            *sum += f64::from(*before);
            *size += f64::from(before.abs());
        }
        for level in levels() {
            let mut out = before.clone();
            outer_at(level, &s, r, &x, k, &mut out);
            close(&out, &sums, &format!("{m} {r} {k}"));
        }
    }
}
