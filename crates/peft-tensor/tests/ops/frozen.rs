//! Products with frozen weights in every format, against the dense product of what they decode to.

use peft_tensor::{BaseWeight, Bytes, FrozenWeight, Precision, RngKey, WeightFormat, encode};
use proptest::prelude::*;

use crate::check::{Tolerance, check, input};

/// Where a K-quant block keeps its f16 scales.
fn scale_offsets(format: WeightFormat) -> &'static [usize] {
    match format {
        WeightFormat::Q2K => &[80, 82],
        WeightFormat::Q3K => &[108],
        WeightFormat::Q4K | WeightFormat::Q5K => &[0, 2],
        WeightFormat::Q6K => &[208],
        _ => &[],
    }
}

/// A weight of values around one: encoded where there is an encoder, else random blocks with small scales.
pub(crate) fn weight(format: WeightFormat, rows: usize, cols: usize, seed: u64) -> FrozenWeight {
    let mut values = vec![0.0; rows * cols];
    RngKey::new(seed).fill_uniform(-1.0, 1.0, &mut values);
    let bytes = encode(format, &values, cols).unwrap_or_else(|_| {
        let mut bytes = vec![0u8; format.matrix_bytes(rows, cols).unwrap()];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = RngKey::new(seed).below(i as u64, 256) as u8;
        }
        for block in bytes.chunks_mut(format.block_bytes()) {
            // 2^-12 in f16: scales multiply by up to 63 * 31.
            scale_offsets(format)
                .iter()
                .for_each(|at| block[*at..*at + 2].copy_from_slice(&0x0c00u16.to_le_bytes()));
            if format == WeightFormat::FP4 {
                block[..4].copy_from_slice(&0.7f32.to_le_bytes());
            }
        }
        bytes
    });
    FrozenWeight::new(rows, cols, format, Bytes::from_vec(bytes)).unwrap()
}

fn compare(format: WeightFormat, rows: usize, cols: usize, m: usize, seed: u64) {
    let w = weight(format, rows, cols, seed);
    let tolerance = Tolerance {
        forward: 1e-6 * (cols as f64).sqrt(),
        backward: 1e-6 * (rows as f64).sqrt().max(4.0),
    };
    check(&[input(seed, -1.0, 1.0, &[m, cols])], tolerance, |x| {
        BaseWeight::frozen(w.clone(), false, x[0].device()).linear(&x[0])
    });
    // Stored [in, out]: the same two products with their roles exchanged.
    let tolerance = Tolerance {
        forward: tolerance.backward,
        backward: tolerance.forward,
    };
    check(&[input(seed, -1.0, 1.0, &[m, rows])], tolerance, |x| {
        BaseWeight::frozen(w.clone(), true, x[0].device()).linear(&x[0])
    });
    let ids: Vec<u32> = (0..m as u64)
        .map(|i| RngKey::new(seed).below(i, rows as u64) as u32)
        .collect();
    let exact = Tolerance {
        forward: 0.0,
        backward: 0.0,
    };
    check(&[input(seed, -1.0, 1.0, &[1])], exact, |x| {
        BaseWeight::frozen(w.clone(), false, x[0].device()).gather(&ids)
    });
    check(&[input(seed, -1.0, 1.0, &[1])], exact, |x| {
        BaseWeight::frozen(w.clone(), false, x[0].device()).to_dense()
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_format(which in 0..WeightFormat::all().len(), rows in 1..40usize, blocks in 1..4usize, m in 1..12usize, seed in 0..1000u64) {
        let format = WeightFormat::all()[which];
        // Blocks that run through the matrix need not fill rows.
        let free = format.block_len() == 1 || matches!(format, WeightFormat::NF4 | WeightFormat::FP4);
        let cols = if free { blocks * 17 } else { blocks * format.block_len() };
        compare(format, rows, cols, m, seed);
    }
}

#[test]
fn several_slabs() {
    // More than 2^20 elements, so that the weight is decoded in slabs, the last of them shorter.
    compare(WeightFormat::Q8_0, 1100, 1024, 6, 1);
    compare(WeightFormat::BF16, 1200, 999, 5, 2);
    compare(WeightFormat::Q4K, 700, 512, 1, 3);
    compare(WeightFormat::Q4_1, 700, 544, 3, 4);
    compare(WeightFormat::NF4, 1100, 1000, 6, 5);
    compare(WeightFormat::NF4, 1100, 1024, 1, 6);
    compare(WeightFormat::INT8, 1100, 1000, 2, 7);
}

#[test]
fn a_low_rank_beside_a_frozen_weight() {
    for (format, rows, cols, m, r) in [
        (WeightFormat::F32, 7, 5, 3, 2),
        (WeightFormat::BF16, 40, 66, 31, 8),
        (WeightFormat::NF4, 33, 64, 20, 5),
    ] {
        let inputs = [
            input(1, -1.0, 1.0, &[2, m, cols]),
            input(2, -1.0, 1.0, &[r, cols]),
            input(3, -1.0, 1.0, &[rows, r]),
        ];
        // Sums over the rows of x for the factors' gradients.
        let tolerance = Tolerance {
            forward: 2e-5,
            backward: 1e-4,
        };
        for transposed in [false, true] {
            let (rows, cols) = if transposed {
                (cols, rows)
            } else {
                (rows, cols)
            };
            let w = weight(format, rows, cols, 4);
            check(&inputs, tolerance, |x| {
                let w = BaseWeight::frozen(w.clone(), transposed, x[0].device());
                let y = w.linear_low_rank(&x[0], &x[1], &x[2], 0.7)?;
                // Beside another use of the input, so that gradients meet.
                y.add(&w.linear(&x[0])?)
            });
        }
    }
    let cpu = peft_tensor::Device::cpu();
    let zeros = |shape: &[usize]| peft_tensor::Tensor::zeros(shape, &cpu).unwrap();
    let w = BaseWeight::frozen(weight(WeightFormat::F32, 6, 4, 1), false, &cpu);
    for (x, a, b) in [
        ([3, 5], [2, 4], [6, 2]),
        ([3, 4], [2, 5], [6, 2]),
        ([3, 4], [2, 4], [6, 3]),
    ] {
        assert!(
            w.linear_low_rank(&zeros(&x), &zeros(&a), &zeros(&b), 1.0)
                .is_err()
        );
    }
    // No rows, as where nothing is labelled.
    for precision in [Precision::F32, Precision::Bf16] {
        let device = peft_tensor::Device::cpu_in(precision);
        let leaf = |shape: &[usize]| peft_tensor::Tensor::zeros(shape, &device).unwrap().leaf();
        let (x, a, b) = (leaf(&[0, 4]), leaf(&[2, 4]), leaf(&[6, 2]));
        let w = BaseWeight::frozen(weight(WeightFormat::BF16, 6, 4, 1), false, &device);
        let y = w.linear_low_rank(&x, &a, &b, 1.0).unwrap();
        assert_eq!(y.shape(), [0, 6]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&b).unwrap().to_vec().unwrap(), [0.0; 12]);
    }
}
