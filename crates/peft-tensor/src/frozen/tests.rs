//! The formats against what the `gguf` package makes of the same bytes (`xtask/python/gguf_blocks.py`).

use super::*;
use crate::{Bytes, RngKey};

/// Name of the golden, its bytes.
macro_rules! golden {
    ($($name:literal),*) => { [$(($name, include_bytes!(concat!("../../testdata/gguf_", $name, ".bin")) as &[u8])),*] };
}

fn format(name: &str) -> WeightFormat {
    let lower = |f: &&WeightFormat| f.name().to_lowercase() == name;
    *WeightFormat::all().iter().find(lower).unwrap()
}

/// The blocks and the floats of a golden, whichever of them is first.
fn split(format: WeightFormat, file: &[u8], floats_first: bool) -> (Vec<u8>, Vec<f32>) {
    let blocks = file.len() / (format.block_bytes() + 4 * format.block_len());
    assert_eq!(
        blocks * (format.block_bytes() + 4 * format.block_len()),
        file.len()
    );
    let first = if floats_first {
        4 * format.block_len()
    } else {
        format.block_bytes()
    } * blocks;
    let (a, b) = file.split_at(first);
    let (bytes, floats) = if floats_first { (b, a) } else { (a, b) };
    (
        bytes.to_vec(),
        floats
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
    )
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_format_decodes_to_ggufs_bits() {
    let goldens = golden!(
        "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k",
        "q6_k"
    );
    // bitsandbytes' three have goldens of their own.
    assert_eq!(
        goldens.len() + 4,
        WeightFormat::all().len(),
        "every format but F32 has a golden"
    );
    for (name, file) in goldens {
        let format = format(name);
        let (bytes, want) = split(format, file, false);
        let w = FrozenWeight::new(1, want.len(), format, Bytes::from_vec(bytes.clone())).unwrap();
        assert_eq!(bits(&w.to_f32()), bits(&want), "{name}");
        let mut portable = vec![0.0; want.len()];
        decode_with_target(format, &bytes, &mut portable);
        assert_eq!(bits(&portable), bits(&want), "{name} without AVX2");
    }
}

#[test]
fn every_encoder_gives_ggufs_bytes() {
    for (name, file) in golden!(
        "encode_f16",
        "encode_bf16",
        "encode_q4_0",
        "encode_q4_1",
        "encode_q5_0",
        "encode_q5_1",
        "encode_q8_0"
    ) {
        let format = format(&name["encode_".len()..]);
        let (want, values) = split(format, file, true);
        assert_eq!(encode(format, &values, 32).unwrap(), want, "{name}");
    }
}

#[test]
fn f16_equals_the_half_crate_on_every_value() {
    for h in 0..=u16::MAX {
        let (ours, theirs) = (f16(h.to_le_bytes()), half::f16::from_bits(h).to_f32());
        assert!(
            ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
            "{h:#x}"
        );
    }
}

/// What a block can represent comes back exactly; anything comes back within half a step.
#[test]
fn encoding_then_decoding_stays_within_a_step() {
    for (format, steps) in [
        (WeightFormat::F32, f32::INFINITY),
        (WeightFormat::F16, 1024.0),
        (WeightFormat::BF16, 128.0),
        (WeightFormat::Q4_0, 8.0),
        (WeightFormat::Q4_1, 7.5),
        (WeightFormat::Q5_0, 16.0),
        (WeightFormat::Q5_1, 15.5),
        (WeightFormat::Q8_0, 127.0),
    ] {
        for seed in 0..4 {
            let (rows, cols) = (3, 96);
            let mut x = vec![0.0; rows * cols];
            RngKey::new(seed).fill_uniform(-1.0, 1.0, &mut x);
            let bytes = encode(format, &x, cols).unwrap();
            let w = FrozenWeight::new(rows, cols, format, Bytes::from_vec(bytes)).unwrap();
            let back = w.to_f32();
            let worst = x
                .iter()
                .zip(&back)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            // The one-sided formats may clip the far end by a whole step; 1 % is for the scale's own rounding.
            assert!(
                worst <= 1.01 / steps,
                "{}: {worst} with steps of 1/{steps}",
                format.name()
            );
            // The last bits of the scale aside, decoded values are a fixed point.
            let again = encode(format, &back, cols).unwrap();
            let w = FrozenWeight::new(rows, cols, format, Bytes::from_vec(again)).unwrap();
            let moved = back
                .iter()
                .zip(w.to_f32())
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(moved <= 2e-3, "{}: {moved}", format.name());
        }
    }
}

#[test]
fn floats_round_to_nearest_even_and_keep_nan() {
    // Halfway between two bf16 values: 1 + 2^-8 goes to 1, 1 + 3 * 2^-8 to 1 + 2^-6.
    let x = [
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        f32::NAN,
        f32::NEG_INFINITY,
        -0.0,
    ];
    let b = encode(WeightFormat::BF16, &x, 5).unwrap();
    let y = FrozenWeight::new(1, 5, WeightFormat::BF16, Bytes::from_vec(b))
        .unwrap()
        .to_f32();
    assert_eq!(y[..2], [1.0, 1.0 + 1.0 / 64.0]);
    assert!(y[2].is_nan() && y[3] == f32::NEG_INFINITY && y[4].to_bits() == 1 << 31);
    let h = encode(
        WeightFormat::F16,
        &[1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 65520.0],
        3,
    )
    .unwrap();
    let y = FrozenWeight::new(1, 3, WeightFormat::F16, Bytes::from_vec(h))
        .unwrap()
        .to_f32();
    assert_eq!(y, [1.0, 1.0 + 1.0 / 512.0, f32::INFINITY]);
}

#[test]
fn rows_decode_alone_and_in_any_order() {
    for &format in WeightFormat::all() {
        let (rows, cols) = (5, 512);
        let row_bytes = format.row_bytes(cols).unwrap();
        // A byte in front shifts the rows off their alignment, as a checkpoint's header may.
        let stored: Vec<u8> = (0..rows * row_bytes + 1)
            .map(|i| (RngKey::new(i as u64).u32x4(0)[0] >> 8) as u8 & 0x3b)
            .collect();
        let bytes = Bytes::from_vec(stored)
            .slice(1..rows * row_bytes + 1)
            .unwrap();
        let w = FrozenWeight::new(rows, cols, format, bytes).unwrap();
        assert_eq!(
            (w.rows(), w.cols(), w.format(), w.nbytes()),
            (rows, cols, format, rows * row_bytes)
        );
        let all = w.to_f32();
        assert!(all.iter().all(|v| v.is_finite()), "{}", format.name());
        let mut two = vec![0.0; 2 * cols];
        w.decode_rows(2..4, &mut two);
        assert_eq!(two, all[2 * cols..4 * cols]);
        let order = [3, 0, 4, 2, 1];
        let turned = w.permute_rows(&order).unwrap().to_f32();
        for (to, from) in order.into_iter().enumerate() {
            assert_eq!(
                turned[to * cols..][..cols],
                all[from * cols..][..cols],
                "{}",
                format.name()
            );
        }
        for bad in [
            &[0, 1, 2, 3][..],
            &[0, 1, 2, 3, 3],
            &[0, 1, 2, 3, 5],
            &[0, 1, 2, 3, 4, 0],
        ] {
            assert!(w.permute_rows(bad).is_err());
        }
    }
}

#[test]
fn many_rows_decode_in_parallel_to_the_same() {
    let (rows, cols) = (700, 256);
    let mut x = vec![0.0; rows * cols];
    RngKey::new(1).fill_normal(0.0, 1.0, &mut x);
    let bytes = encode(WeightFormat::Q8_0, &x, cols).unwrap();
    let w = FrozenWeight::new(rows, cols, WeightFormat::Q8_0, Bytes::from_vec(bytes)).unwrap();
    let mut serial = vec![0.0; rows * cols];
    w.decode_rows(0..rows, &mut serial);
    assert_eq!(w.to_f32(), serial);
}

#[test]
fn floats_are_viewed_without_a_copy() {
    let w = FrozenWeight::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    assert_eq!(w.as_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let turned = w.permute_rows(&[1, 0]).unwrap();
    assert_eq!(turned.as_f32().unwrap(), [4.0, 5.0, 6.0, 1.0, 2.0, 3.0]);
    let half = FrozenWeight::new(1, 1, WeightFormat::F16, Bytes::from_vec(vec![0, 0])).unwrap();
    assert!(half.as_f32().is_none());
}

#[test]
fn wrong_sizes_are_errors_that_say_so() {
    let bytes = |n| Bytes::from_vec(vec![0; n]);
    let error = |rows, cols, format, n| {
        FrozenWeight::new(rows, cols, format, bytes(n))
            .unwrap_err()
            .to_string()
    };
    let e = error(2, 64, WeightFormat::Q4_0, 71);
    assert!(
        e.contains("2 x 64") && e.contains("Q4_0") && e.contains("72") && e.contains("71"),
        "{e}"
    );
    let e = error(1, 48, WeightFormat::Q8_0, 51);
    assert!(e.contains("48 columns") && e.contains("32"), "{e}");
    for (rows, cols) in [(usize::MAX, 2), (1 << 40, 1 << 40), (3, usize::MAX / 2)] {
        assert!(error(rows, cols, WeightFormat::F32, 0).contains("too large"));
    }
    // Few bytes a row, but far too many values.
    assert!(error(1 << 56, 256, WeightFormat::Q2K, 0).contains("too large"));
    assert!(FrozenWeight::from_f32(2, 2, vec![0.0; 5]).is_err());
    for (rows, cols) in [(0, 32), (4, 0), (0, 0)] {
        assert!(
            FrozenWeight::new(rows, cols, WeightFormat::Q5_1, bytes(0))
                .unwrap()
                .to_f32()
                .is_empty()
        );
    }
}

#[test]
fn encode_refuses_what_it_cannot_store() {
    assert!(encode(WeightFormat::F32, &[0.0; 5], 2).is_err());
    assert!(encode(WeightFormat::F32, &[0.0; 5], 0).is_err());
    assert!(encode(WeightFormat::Q4_0, &[0.0; 40], 40).is_err());
    assert_eq!(encode(WeightFormat::Q4_0, &[], 32).unwrap(), []);
    for &format in &[
        WeightFormat::Q2K,
        WeightFormat::Q3K,
        WeightFormat::Q4K,
        WeightFormat::Q5K,
        WeightFormat::Q6K,
    ] {
        let e = encode(format, &[0.0; 256], 256).unwrap_err().to_string();
        assert!(
            e.contains(format.name())
                && e.ends_with("F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, NF4, INT8"),
            "{e}"
        );
    }
}
