//! Functions of one and two arguments, gates, dropout.

use peft_tensor::{Device, Glu, RngKey, Tensor, Unary};
use proptest::prelude::*;

use crate::check::{TIGHT, Tolerance, around_zero, check, input};

/// Shapes of up to four axes, size 1 among them.
pub(crate) fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![Just(1usize), 1..8usize], 0..5)
}

/// Two shapes that broadcast to each other: some axes of either set to 1, some leading ones of either dropped.
fn pairs() -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    (shapes(), any::<[u8; 4]>(), 0..3usize, any::<bool>()).prop_map(|(shape, cut, drop, side)| {
        let kept = |which: u8| -> Vec<usize> {
            shape
                .iter()
                .zip(cut)
                .map(|(n, c)| if c % 4 == which { 1 } else { *n })
                .collect()
        };
        let (a, b) = (kept(1), kept(2));
        let short = |x: Vec<usize>| x[drop.min(x.len())..].to_vec();
        if side { (short(a), b) } else { (a, short(b)) }
    })
}

fn domain(op: Unary) -> (f32, f32) {
    match op {
        Unary::Ln | Unary::Sqrt | Unary::Rsqrt | Unary::Recip => (0.3, 3.0),
        _ => (-3.0, 3.0),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn unary(shape in shapes(), seed in 0..1000u64, which in 0..Unary::ALL.len()) {
        let op = Unary::ALL[which];
        let (lo, hi) = domain(op);
        let mut x = if lo < 0.0 { around_zero(seed, &shape) } else { input(seed, lo, hi, &shape) };
        if !matches!(op, Unary::Exp | Unary::Square) {
            // Tails as well, where approximations change branch.
            x.values.iter_mut().filter(|v| **v > 1.0).for_each(|v| *v = (*v * 3.0) as f32 as f64);
        }
        check(&[x], Tolerance { forward: 2e-6, backward: 2e-5 }, |x| x[0].unary(op));
    }

    #[test]
    fn binary((a, b) in pairs(), seed in 0..1000u64, which in 0..4) {
        let inputs = [around_zero(seed, &a), input(seed + 1, 0.5, 2.0, &b)];
        check(&inputs, Tolerance { forward: 1e-6, backward: 2e-5 }, |x| match which {
            0 => x[0].add(&x[1]),
            1 => x[0].sub(&x[1]),
            2 => x[0].mul(&x[1]),
            _ => x[0].div(&x[1]),
        });
    }

    #[test]
    fn affine(shape in shapes(), seed in 0..1000u64, mul in -3.0f32..3.0, add in -3.0f32..3.0) {
        check(&[input(seed, -2.0, 2.0, &shape)], TIGHT, |x| x[0].affine(mul, add));
    }

    #[test]
    fn glu(shape in shapes(), seed in 0..1000u64, which in 0..3usize) {
        let kind = [Glu::Silu, Glu::Gelu, Glu::GeluTanh][which];
        let inputs = [input(seed, -5.0, 5.0, &shape), input(seed + 1, -2.0, 2.0, &shape)];
        check(&inputs, TIGHT, |x| x[0].glu(kind, &x[1]));
    }

    #[test]
    fn dropout(shape in shapes(), seed in 0..1000u64, p in 0.0f32..0.95) {
        check(&[input(seed, -2.0, 2.0, &shape)], TIGHT, |x| x[0].dropout(p, RngKey::new(seed)));
    }
}

#[test]
fn every_unary_far_out() {
    // 100k elements: several chunks, so that offsets between them are used.
    for op in Unary::ALL {
        let (lo, hi) = domain(op);
        let x = if lo < 0.0 {
            around_zero(5, &[101, 997])
        } else {
            input(5, lo, hi, &[101, 997])
        };
        check(
            &[x],
            Tolerance {
                forward: 2e-6,
                backward: 2e-5,
            },
            |x| x[0].unary(op),
        );
    }
}

#[test]
fn large_broadcasts() {
    for (a, b) in [
        (vec![40, 1000], vec![1000]),
        (vec![40, 1000], vec![40, 1]),
        (vec![9, 1, 700], vec![11, 1]),
        (vec![], vec![50_000]),
    ] {
        let inputs = [around_zero(1, &a), input(2, 0.5, 2.0, &b)];
        // Sums of thousands of terms in the gradients of the smaller side.
        check(
            &inputs,
            Tolerance {
                forward: 1e-6,
                backward: 5e-5,
            },
            |x| x[0].mul(&x[1])?.div(&x[1].square()?),
        );
    }
}

#[test]
fn a_sum_goes_where_its_left_side_was() {
    for shape in [vec![3, 5], vec![70_000]] {
        let inputs = [input(1, -1.0, 1.0, &shape), input(2, -1.0, 1.0, &shape)];
        check(&inputs, TIGHT, |x| x[0].clone().plus(&x[1]));
        // Beside another use of what is written over, which has to keep its values.
        check(&inputs, TIGHT, |x| {
            let y = x[0].square()?;
            y.clone().plus(&x[1])?.mul(&y)
        });
    }
    let cpu = Device::cpu();
    let x = |shape: &[usize]| Tensor::full(1.0, shape, &cpu).unwrap();
    let place = |t: &Tensor| t.values().unwrap().as_ptr();
    let (a, b) = (x(&[4, 5]), x(&[4, 5]));
    let before = place(&a);
    let sum = a.plus(&b).unwrap();
    assert_eq!(place(&sum), before, "nobody else had it");
    let held = sum.clone();
    let more = sum.plus(&b).unwrap();
    assert_ne!(place(&more), before, "`held` has it");
    assert_eq!(held.to_vec().unwrap(), [2.0; 20]);
    assert_eq!(more.to_vec().unwrap(), [3.0; 20]);
    // What would have to be repeated is refused: the result has the shape of the left side.
    assert!(x(&[4, 5]).plus(&x(&[5])).is_err());
}

#[test]
fn dropout_over_many_chunks() {
    // Enough elements that a threshold off by a thousandth drops or keeps some it should not.
    check(&[input(1, -2.0, 2.0, &[101, 997])], TIGHT, |x| {
        x[0].dropout(0.3, RngKey::new(11))
    });
}

#[test]
fn dropout_keeps_the_promised_share() {
    let x = Tensor::full(1.0, &[200_000], &Device::cpu()).unwrap();
    let y = x.dropout(0.3, RngKey::new(3)).unwrap().to_vec().unwrap();
    let kept = y.iter().filter(|v| **v != 0.0).count() as f64 / y.len() as f64;
    assert!((kept - 0.7).abs() < 0.005, "{kept}");
    assert!(y.iter().all(|v| *v == 0.0 || (*v - 1.0 / 0.7).abs() < 1e-6));
}

#[test]
fn infinities_and_nan() {
    let values = vec![
        f32::NEG_INFINITY,
        -200.0,
        0.0,
        200.0,
        f32::INFINITY,
        f32::NAN,
    ];
    let x = Tensor::from_vec(values, &[6], &Device::cpu()).unwrap();
    for op in Unary::ALL {
        let got = x.unary(op).unwrap().to_f64().unwrap();
        let want = x
            .to_device(&Device::reference())
            .unwrap()
            .unary(op)
            .unwrap()
            .to_f64()
            .unwrap();
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let gelu_of_minus_infinity =
                i == 0 && matches!(op, Unary::Silu | Unary::Gelu | Unary::GeluTanh);
            let overflow = w.abs() > f64::from(f32::MAX) && g.is_infinite();
            // The library calls give a reference value a last digit of their own.
            let same = (g.is_nan() && w.is_nan()) || g == w || (g - w).abs() < 1e-6 || overflow;
            assert!(
                same || gelu_of_minus_infinity || (op == Unary::Relu && i == 5),
                "{op:?} [{i}]: {g} and {w}"
            );
        }
    }
}
