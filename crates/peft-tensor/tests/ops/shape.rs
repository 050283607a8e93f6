//! Reductions, broadcasting, permutations, slices, rows by index.

use peft_tensor::{Device, RngKey, Tensor, concat, no_grad};
use proptest::prelude::*;

use crate::check::{TIGHT, Tolerance, check, input};
use crate::elementwise::shapes;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sum_and_broadcast(shape in shapes(), cut in any::<[bool; 4]>(), seed in 0..1000u64) {
        let to: Vec<usize> = shape.iter().zip(cut).map(|(n, c)| if c { 1 } else { *n }).collect();
        check(&[input(seed, -2.0, 2.0, &shape)], Tolerance { forward: 5e-6, ..TIGHT }, |x| x[0].sum_to(&to));
        check(&[input(seed, -2.0, 2.0, &to)], Tolerance { backward: 2e-5, ..TIGHT }, |x| x[0].broadcast_to(&shape));
    }

    #[test]
    fn permute(shape in shapes(), seed in 0..1000u64) {
        let axes = RngKey::new(seed).permutation(shape.len());
        check(&[input(seed, -2.0, 2.0, &shape)], TIGHT, |x| x[0].permute(&axes));
    }

    #[test]
    fn narrow(shape in prop::collection::vec(1..7usize, 1..5), axis in 0..4usize, start in 0..7usize, len in 0..7usize, seed in 0..1000u64) {
        let axis = axis % shape.len();
        let start = start % shape[axis];
        let len = (len % (shape[axis] - start + 1)).max(1);
        check(&[input(seed, -2.0, 2.0, &shape)], TIGHT, |x| x[0].narrow(axis, start, len));
    }

    #[test]
    fn join(shape in prop::collection::vec(1..5usize, 1..5), axis in 0..4usize, sizes in prop::collection::vec(1..5usize, 1..5), seed in 0..1000u64) {
        let axis = axis % shape.len();
        let part = |(i, n): (usize, &usize)| {
            let mut shape = shape.clone();
            shape[axis] = *n;
            input(seed + i as u64, -2.0, 2.0, &shape)
        };
        let inputs: Vec<_> = sizes.iter().enumerate().map(part).collect();
        check(&inputs, TIGHT, |x| concat(&x.iter().collect::<Vec<_>>(), axis));
    }

    #[test]
    fn rows_by_index(rows in 1..20usize, cols in 1..12usize, ids in prop::collection::vec(0..1000u32, 0..30), seed in 0..1000u64) {
        let ids: Vec<u32> = ids.into_iter().map(|i| i % rows as u32).collect();
        check(&[input(seed, -2.0, 2.0, &[rows, cols])], TIGHT, |x| x[0].gather_rows(&ids));
        check(&[input(seed, -2.0, 2.0, &[ids.len(), cols])], TIGHT, |x| x[0].scatter_rows(&ids, rows));
    }

    #[test]
    fn largest_of_rows(rows in 1..9usize, cols in 1..80usize, seed in 0..1000u64) {
        check(&[input(seed, -2.0, 2.0, &[rows, cols])], TIGHT, |x| x[0].max_rows());
    }
}

#[test]
fn large_shapes() {
    // Enough for several chunks, partial sums over more than one level, and transposes larger than a tile.
    let sums: [(&[usize], &[usize]); 5] = [
        (&[700, 100], &[1, 100]),
        (&[100, 700], &[100, 1]),
        (&[1, 90_000], &[1, 1]),
        (&[40_000, 2], &[1, 2]),
        (&[30, 40, 50], &[30, 1, 50]),
    ];
    for (shape, to) in sums {
        check(
            &[input(1, -1.0, 1.0, shape)],
            Tolerance {
                forward: 2e-5,
                ..TIGHT
            },
            |x| x[0].sum_to(to),
        );
    }
    for (shape, axes) in [
        (vec![333, 257], vec![1, 0]),
        (vec![5, 97, 130], vec![2, 0, 1]),
        (vec![3, 50, 6, 40], vec![0, 2, 1, 3]),
    ] {
        check(&[input(2, -1.0, 1.0, &shape)], TIGHT, |x| {
            x[0].permute(&axes)
        });
    }
    let ids: Vec<u32> = (0..3000)
        .map(|i| RngKey::new(4).below(i, 300) as u32)
        .collect();
    check(
        &[input(3, -1.0, 1.0, &[300, 64])],
        Tolerance {
            backward: 2e-5,
            ..TIGHT
        },
        |x| x[0].gather_rows(&ids),
    );
    check(
        &[input(3, -1.0, 1.0, &[3000, 64])],
        Tolerance {
            forward: 2e-5,
            ..TIGHT
        },
        |x| x[0].scatter_rows(&ids, 301),
    );
    check(
        &[
            input(3, -1.0, 1.0, &[200, 7, 60]),
            input(4, -1.0, 1.0, &[200, 3, 60]),
        ],
        TIGHT,
        |x| concat(&[&x[0], &x[1]], 1)?.narrow(1, 2, 6),
    );
}

#[test]
fn sums_stay_exact_over_many_terms() {
    // A running f32 sum of a million times 0.1 is off by hundreds.
    let x = Tensor::full(0.1, &[1000, 1000], &Device::cpu()).unwrap();
    for shape in [[1, 1], [1, 1000], [1000, 1]] {
        let sums = x.sum_to(&shape).unwrap().to_f64().unwrap();
        let want = f64::from(0.1f32) * 1e6 / sums.len() as f64;
        assert!(
            sums.iter().all(|s| (s / want - 1.0).abs() < 3e-6),
            "{shape:?}: {} for {want}",
            sums[0]
        );
    }
}

#[test]
fn nothing_in_nothing_out() {
    for device in [Device::cpu(), Device::reference()] {
        let x = Tensor::zeros(&[0, 5], &device).unwrap();
        assert_eq!(x.sum_to(&[1, 5]).unwrap().to_vec().unwrap(), vec![0.0; 5]);
        assert_eq!(x.permute(&[1, 0]).unwrap().shape(), [5, 0]);
        assert_eq!(x.softmax().unwrap().numel(), 0);
        let w = Tensor::zeros(&[3, 5], &device).unwrap();
        assert_eq!(x.matmul_t(&w).unwrap().shape(), [0, 3]);
        assert_eq!(x.exp().unwrap().add(&x).unwrap().numel(), 0);
        assert_eq!(w.gather_rows(&[]).unwrap().shape(), [0, 5]);
    }
}

/// Growing in place is joining, whoever else holds the values, and with a gradient it is a join on the tape.
#[test]
fn appending_is_joining() {
    let part = |seed: u64, n: usize| input(seed, -2.0, 2.0, &[1, n, 3]);
    let values = |t: &Tensor| t.to_vec().unwrap();
    let tensor = |i: u64| {
        let shape = [1, 1 + i as usize % 3, 300];
        Tensor::normal(RngKey::new(i), 0.0, 1.0, &shape, &Device::cpu()).unwrap()
    };
    let tensors: Vec<Tensor> = (0..40).map(tensor).collect();
    let want = concat(&tensors.iter().collect::<Vec<_>>(), 1).unwrap();
    no_grad(|| {
        let mut all = tensors[0].clone();
        for (i, next) in tensors[1..].iter().enumerate() {
            let holder = (i % 3 == 0).then(|| (all.clone(), values(&all)));
            all = all.append(next, 1).unwrap();
            if let Some((holder, before)) = holder {
                assert_eq!(values(&holder), before);
            }
        }
        assert_eq!((all.shape(), values(&all)), (want.shape(), values(&want)));
        assert!(all.append(&tensors[0], 0).is_err());
    });
    check(&[part(1, 2), part(2, 3)], TIGHT, |x| {
        x[0].clone().append(&x[1], 1)
    });
    let rows = [
        input(3, -2.0, 2.0, &[2, 2, 3]),
        input(4, -2.0, 2.0, &[2, 1, 3]),
    ];
    check(&rows, TIGHT, |x| x[0].clone().append(&x[1], 1));
}
