//! The formats against what bitsandbytes makes of the same values (`xtask/python/bnb_blocks.py`).

use super::*;
use crate::RngKey;
use crate::frozen::{decode_with_target, encode};

/// Shape and file of a golden.
macro_rules! golden {
    ($format:literal, $rows:literal x $cols:literal) => {
        (
            $rows,
            $cols,
            include_bytes!(concat!(
                "../../../testdata/bnb_",
                $format,
                "_",
                stringify!($rows),
                "x",
                stringify!($cols),
                ".bin"
            )) as &[u8],
        )
    };
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let four = bytes.as_chunks::<4>().0;
    four.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Values, codes, scales and the values that come back.
fn split(
    file: &[u8],
    n: usize,
    codes: usize,
    scales: usize,
) -> (Vec<f32>, Vec<u8>, Vec<f32>, Vec<f32>) {
    assert_eq!(file.len(), 4 * n + codes + 4 * scales + 4 * n);
    let (x, rest) = file.split_at(4 * n);
    let (codes, rest) = rest.split_at(codes);
    let (scales, back) = rest.split_at(4 * scales);
    (floats(x), codes.to_vec(), floats(scales), floats(back))
}

fn four_bit(format: WeightFormat, (rows, cols, file): (usize, usize, &[u8])) {
    let n = rows * cols;
    let (x, codes, scales, back) = split(file, n, n.div_ceil(2), n.div_ceil(64));
    let w = pack(format, rows, cols, &codes, &scales, 64).unwrap();
    assert_eq!(bits(&w.to_f32()), bits(&back), "{rows} x {cols}");
    // Rows one by one, and from the middle on.
    for r in 0..rows {
        let mut row = vec![0.0; cols];
        w.decode_rows(r..r + 1, &mut row);
        assert_eq!(bits(&row), bits(&back[r * cols..(r + 1) * cols]), "row {r}");
    }
    let mut half = vec![0.0; (rows - rows / 2) * cols];
    w.decode_rows(rows / 2..rows, &mut half);
    assert_eq!(bits(&half), bits(&back[rows / 2 * cols..]));
    assert_eq!(unpack(&w).unwrap(), (codes, scales));
    if format.can_encode() {
        let made = FrozenWeight::quantize(rows, cols, &x, format).unwrap();
        assert_eq!(
            unpack(&made).unwrap(),
            unpack(&w).unwrap(),
            "{rows} x {cols}"
        );
        assert_eq!(made.bytes()[..], w.bytes()[..]);
    }
}

#[test]
fn nf4_is_that_of_bitsandbytes() {
    for golden in [
        golden!("nf4", 8 x 64),
        golden!("nf4", 5 x 96),
        golden!("nf4", 7 x 50),
        golden!("nf4", 5 x 7),
        golden!("nf4", 1 x 65),
        golden!("nf4", 3 x 192),
    ] {
        four_bit(WeightFormat::NF4, golden);
    }
}

#[test]
fn fp4_is_that_of_bitsandbytes() {
    four_bit(WeightFormat::FP4, golden!("fp4", 5 x 96));
}

#[test]
fn int8_is_that_of_bitsandbytes() {
    let (rows, cols, file) = golden!("int8", 6 x 75);
    let (x, codes, scales, back) = split(file, rows * cols, rows * cols, rows);
    let w = pack_int8(rows, cols, &codes, &scales).unwrap();
    assert_eq!(bits(&w.to_f32()), bits(&back));
    let made = FrozenWeight::quantize(rows, cols, &x, WeightFormat::INT8).unwrap();
    assert_eq!(unpack_int8(&made).unwrap(), (codes, scales));
    assert_eq!(made.row_bytes(), Some(4 + cols));
}

#[test]
fn nested_scales_are_those_of_bitsandbytes() {
    let file = include_bytes!("../../../testdata/bnb_nested.bin") as &[u8];
    let (scales, rest) = file.split_at(4 * 260);
    let (codes, rest) = rest.split_at(260);
    let rest = floats(rest);
    let (seconds, offset, map, back) = (&rest[..2], rest[2], &rest[3..259], &rest[259..]);
    // `torch.linspace` rounds as its vectors are wide, so a map of another machine differs in the last place; it is in
    // the file for that reason, and what is read is decoded with it.
    for (ours, theirs) in dynamic_map().iter().zip(map) {
        assert!(
            (ours - theirs).abs() <= theirs.abs() * 2f32.powi(-22),
            "{ours} {theirs}"
        );
    }
    let theirs = Nested {
        codes: codes.to_vec(),
        scales: seconds.to_vec(),
        offset,
        map: map.try_into().unwrap(),
        blocksize: 256,
    };
    assert_eq!(bits(&theirs.decode()), bits(back));
    let ours = Nested::quantize(&floats(scales));
    // torch sums in another order than one after another in f64.
    assert!((ours.offset - offset).abs() <= 2e-7 * offset);
    let moved = ours.codes.iter().zip(codes).filter(|(a, b)| a != b).count();
    // Its grid lets it take the other neighbour near a middle, see `Nested::quantize`.
    assert!(moved <= 1, "{moved} of 260 codes differ");
}

/// Every pair of codes through every path: portable, AVX2, AVX-512.
#[test]
fn paths_agree_bit_for_bit() {
    let mut src = vec![0u8; 64 * BYTES];
    for (i, byte) in src.iter_mut().enumerate() {
        *byte = RngKey::new(4).below(i as u64, 256) as u8;
    }
    for (i, block) in src.as_chunks_mut::<BYTES>().0.iter_mut().enumerate() {
        let scale = (i as f32 - 20.0) * 1.7e-3;
        block[..4].copy_from_slice(&scale.to_le_bytes());
    }
    for format in [WeightFormat::NF4, WeightFormat::FP4] {
        let table = table(format).unwrap();
        let mut want = vec![0.0; 64 * BLOCK];
        decode_with_target(format, &src, &mut want);
        assert_eq!(want[1], table[usize::from(src[4] & 15)] * (-20.0 * 1.7e-3));
        #[cfg(target_arch = "x86_64")]
        {
            type Path = unsafe fn(&[f32; 16], &[u8], &mut [f32]);
            let paths: [(bool, Path); 2] = [
                (is_x86_feature_detected!("avx2"), decode::x86::avx2),
                (is_x86_feature_detected!("avx512f"), decode::x86::avx512),
            ];
            for (there, path) in paths {
                let mut out = vec![0.0; 64 * BLOCK];
                if there {
                    // SAFETY: the processor has what the function was compiled for.
                    #[allow(
                        unsafe_code,
                        reason = "calling functions compiled for other processors"
                    )]
                    unsafe {
                        path(table, &src, &mut out);
                    }
                    assert_eq!(bits(&out), bits(&want), "{}", format.name());
                }
            }
        }
    }
}

/// Larger blocks than 64 are the same scale several times.
#[test]
fn larger_blocks_repeat_their_scale() {
    let codes = vec![0xf0; 100];
    let w = pack(WeightFormat::NF4, 2, 100, &codes, &[1.0, 3.0], 128).unwrap();
    let values = w.to_f32();
    assert_eq!(
        (values[0], values[127], values[128], values[199]),
        (1.0, -1.0, 3.0, -3.0)
    );
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let says = |result: Result<FrozenWeight>, what: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    };
    let nf4 = WeightFormat::NF4;
    says(pack(nf4, 2, 64, &[0; 63], &[1.0; 2], 64), "63");
    says(pack(nf4, 2, 64, &[0; 64], &[1.0; 3], 64), "and 3");
    says(pack(nf4, 2, 64, &[0; 64], &[1.0; 2], 32), "blocks of 32");
    says(
        pack(nf4, 2, 64, &[0; 64], &[1.0, f32::NAN], 64),
        "scale 1 is NaN",
    );
    says(pack(nf4, usize::MAX, 64, &[0; 64], &[1.0], 64), "too large");
    says(
        pack(WeightFormat::Q4_0, 2, 64, &[0; 64], &[1.0; 2], 64),
        "Q4_0",
    );
    says(pack_int8(2, 3, &[0; 6], &[1.0]), "there are 6 and 1");
    says(pack_int8(1, 3, &[0; 3], &[f32::INFINITY]), "scale 0 is inf");
    says(
        FrozenWeight::quantize(1, 3, &[0.0, f32::NAN, 0.0], nf4),
        "column 1",
    );
    says(FrozenWeight::quantize(1, 3, &[0.0; 2], nf4), "2 values");
    let ragged = FrozenWeight::quantize(2, 5, &[0.5; 10], nf4).unwrap();
    says(ragged.permute_rows(&[1, 0]), "share blocks");
    assert!(unpack_int8(&ragged).is_err());
    assert!(encode(WeightFormat::FP4, &[0.0; 64], 64).is_err());
}

/// The scales of a doubly quantised matrix are what its parts decode to; a code is wrong by less than one step.
#[test]
fn double_quantisation_keeps_codes() {
    let mut x = vec![0.0; 40 * 100];
    RngKey::new(1).fill_normal(0.0, 0.02, &mut x);
    let single = FrozenWeight::quantize(40, 100, &x, WeightFormat::NF4).unwrap();
    let (double, nested) = double_quantized(&single).unwrap();
    let ((a, before), (b, after)) = (unpack(&single).unwrap(), unpack(&double).unwrap());
    assert_eq!((a, &after), (b, &nested.decode()));
    let worst = before
        .iter()
        .zip(&after)
        .fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
    // Largest gap of the map is 0.0141 of the largest second scale.
    assert!(
        worst > 0.0 && worst <= 0.5 * 0.01407 * nested.scales[0],
        "{worst}"
    );
}
