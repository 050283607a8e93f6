//! Dense products: all transposes, batched and not, few rows and many.

use peft_tensor::{Result, Tensor};
use proptest::prelude::*;

use crate::check::{Tolerance, check, input};

/// A running sum of k random terms has size sqrt(k / 9) and is rounded k times, to half a unit in the last place at
/// random: k * 1.2e-8 in the mean, of which six times is allowed.
fn tolerance(k: usize) -> Tolerance {
    let t = 7e-8 * (k as f64).max(25.0);
    Tolerance {
        forward: t,
        backward: 4.0 * t,
    }
}

fn product(which: usize) -> impl Fn(&[Tensor]) -> Result<Tensor> {
    move |x| match which {
        0 => x[0].matmul(&x[1]),
        1 => x[0].matmul_t(&x[1]),
        _ => x[0].t_matmul(&x[1]),
    }
}

/// The stored shapes of both sides.
fn sides(which: usize, m: usize, k: usize, n: usize) -> ([usize; 2], [usize; 2]) {
    (
        if which == 2 { [k, m] } else { [m, k] },
        if which == 1 { [n, k] } else { [k, n] },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn small(m in 1..10usize, k in 1..40usize, n in 1..40usize, lead in prop::collection::vec(1..5usize, 0..3), batched in 0..3, which in 0..3usize, seed in 0..1000u64) {
        let (a, b) = sides(which, m, k, n);
        let with_lead = |shape: &[usize], on: bool| if on { [&lead, shape].concat() } else { shape.to_vec() };
        let (a, b) = (with_lead(&a, batched != 1), with_lead(&b, batched != 2));
        let inputs = [input(seed, -1.0, 1.0, &a), input(seed + 1, -1.0, 1.0, &b)];
        let terms = k.max(m * n) * lead.iter().product::<usize>();
        check(&inputs, tolerance(terms), product(which));
    }
}

#[test]
fn large() {
    // Threads, packed panels, and the paths for few rows, with sizes that fill no tile.
    for which in 0..3 {
        for (m, k, n) in [
            (67, 301, 129),
            (1, 300, 701),
            (3, 517, 611),
            (130, 65, 8),
            (8, 700, 131),
            (4, 2100, 33),
            (5, 64, 2000),
        ] {
            let (a, b) = sides(which, m, k, n);
            check(
                &[input(1, -1.0, 1.0, &a), input(2, -1.0, 1.0, &b)],
                tolerance(k.max(m).max(n)),
                product(which),
            );
        }
        for batch in [3, 12] {
            let (a, b) = sides(which, 33, 70, 65);
            let inputs = [
                input(1, -1.0, 1.0, &[batch, a[0], a[1]]),
                input(2, -1.0, 1.0, &[batch, b[0], b[1]]),
            ];
            check(&inputs, tolerance(70), product(which));
        }
    }
}

#[test]
fn a_low_rank_change_adds_to_what_is_there() {
    for (rows, r, n) in [(2, 3, 5), (70, 8, 33), (3, 1, 600)] {
        let inputs = [
            input(1, -1.0, 1.0, &[2, rows, n]),
            input(2, -1.0, 1.0, &[2, rows, r]),
            input(3, -1.0, 1.0, &[n, r]),
        ];
        check(&inputs, tolerance(2 * rows * n), |x| {
            x[0].clone().plus_matmul_t(&x[1], &x[2], 0.7)
        });
        // Beside another use of the same inputs, so that gradients meet where they stand.
        check(&inputs, tolerance(4 * rows * n), |x| {
            let y = x[1].matmul_t(&x[2])?.plus_matmul_t(&x[1], &x[2], -1.3)?;
            y.add(&x[0])?.plus_matmul_t(&x[1], &x[2], 0.5)
        });
    }
    let x = |shape: &[usize]| Tensor::zeros(shape, &peft_tensor::Device::cpu()).unwrap();
    for (y, low, w) in [([4, 5], [4, 3], [6, 3]), ([4, 5], [3, 3], [5, 3])] {
        assert!(x(&y).plus_matmul_t(&x(&low), &x(&w), 1.0).is_err());
    }
}
