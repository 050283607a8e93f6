//! What the decompositions promise, whichever provider is behind them.
//!
//! Run with `--features lapack` for the other provider. Tolerances are in units of the f32 rounding error times the
//! matrix' size and norm; a random wrong digit is four orders above them.

use ndarray::{Array1, Array2, s};
use peft_tensor::linalg::{Svd, eigh, qr, randomized_svd, svd};
use peft_tensor::{RngKey, TensorError};
use proptest::prelude::*;

fn random(m: usize, n: usize, seed: u64) -> Array2<f32> {
    let mut a = Array2::zeros((m, n));
    RngKey::new(seed).fill_normal(0.0, 1.0, a.as_slice_mut().unwrap());
    a
}

/// The largest absolute difference of two matrices.
fn gap(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max)
}

fn norm(a: &Array2<f32>) -> f32 {
    a.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32
}

fn tolerance(a: &Array2<f32>) -> f32 {
    let (m, n) = a.dim();
    4.0 * f32::EPSILON * ((m + n) as f32).sqrt().max(4.0)
}

fn check_orthonormal(what: &str, q: &Array2<f32>, of: &Array2<f32>) {
    let (off, allowed) = (
        gap(&q.t().dot(q), &Array2::eye(q.ncols())),
        4.0 * tolerance(of),
    );
    assert!(
        off <= allowed,
        "{what} is {off:e} from orthonormal, {allowed:e} allowed: {q}"
    );
}

fn check_equal(what: &str, got: &Array2<f32>, want: &Array2<f32>) {
    let (off, allowed) = (gap(got, want), tolerance(want) * norm(want));
    assert!(
        off <= allowed,
        "{what} is off by {off:e}, {allowed:e} allowed: {got} for {want}"
    );
}

fn rebuild(f: &Svd) -> Array2<f32> {
    (&f.u * &f.s).dot(&f.vt)
}

fn check_svd(a: &Array2<f32>) {
    let f = svd(a).unwrap();
    let (m, n) = a.dim();
    let k = m.min(n);
    assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((m, k), k, (k, n)));
    assert!(f.s.iter().all(|&x| x >= 0.0), "{}", f.s);
    assert!(f.s.windows(2).into_iter().all(|w| w[0] >= w[1]), "{}", f.s);
    check_equal("u s vt", &rebuild(&f), a);
    check_orthonormal("u", &f.u, a);
    check_orthonormal("v", &f.vt.t().to_owned(), a);
}

fn check_qr(a: &Array2<f32>) {
    let (q, r) = qr(a).unwrap();
    let (m, n) = a.dim();
    let k = m.min(n);
    assert_eq!((q.dim(), r.dim()), ((m, k), (k, n)));
    assert!(
        r.indexed_iter().all(|((i, j), &x)| i <= j || x == 0.0),
        "{r}"
    );
    check_equal("q r", &q.dot(&r), a);
    check_orthonormal("q", &q, a);
}

fn check_eigh(a: &Array2<f32>) {
    let (values, vectors) = eigh(a).unwrap();
    let n = a.nrows();
    assert_eq!((values.len(), vectors.dim()), (n, (n, n)));
    assert!(
        values.windows(2).into_iter().all(|w| w[0] <= w[1]),
        "{values}"
    );
    let symmetric = Array2::from_shape_fn((n, n), |(i, j)| a[(i.max(j), i.min(j))]);
    let back = (&vectors * &values).dot(&vectors.t());
    check_equal("v diag(w) vt", &back, &symmetric);
    check_orthonormal("v", &vectors, a);
}

/// Matrices of every kind: random, of a low rank, with equal or vanishing singular values, badly scaled.
fn matrices() -> impl Strategy<Value = Array2<f32>> {
    (1usize..40, 1usize..40, 0usize..5, any::<u64>()).prop_map(|(m, n, kind, seed)| match kind {
        0 => random(m, n, seed),
        1 => random(m, 2, seed).dot(&random(2, n, seed ^ 1)),
        2 => Array2::from_shape_fn((m, n), |(i, j)| if i == j { 3.0 } else { 0.0 }),
        3 => {
            let mut a = random(m, n, seed);
            for (j, mut column) in a.columns_mut().into_iter().enumerate() {
                column *= 10f32.powi(-(j as i32 % 8));
            }
            a
        }
        // Exactly repeated rows.
        _ => Array2::from_shape_fn((m, n), |(_, j)| (seed % 97) as f32 - j as f32),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn svd_decomposes(a in matrices()) { check_svd(&a); }

    #[test]
    fn qr_decomposes(a in matrices()) { check_qr(&a); }

    #[test]
    fn eigh_decomposes(a in matrices()) {
        // A Gram matrix (rank deficient where tall), one with both signs, and one whose upper triangle lies.
        check_eigh(&a.dot(&a.t()));
        let n = a.nrows();
        let mut lower = random(n, n, a.ncols() as u64);
        for i in 0..n {
            lower.slice_mut(s![i, i + 1..]).fill(1e3);
        }
        check_eigh(&lower);
    }

    #[test]
    fn magnitude_and_layout_do_not_matter(a in matrices(), exponent in -38i32..37) {
        let big = 10f32.powi(exponent);
        let scaled = &a * big;
        prop_assume!(norm(&scaled).is_finite());
        let f = svd(&scaled).unwrap();
        // Subnormal input has lost digits, so compare with the values of what is left of it.
        let plain = svd(&scaled.mapv(|x| (f64::from(x) / f64::from(big)) as f32)).unwrap();
        let close = (&f.s - &(&plain.s * big)).mapv(f32::abs).iter().all(|&e| {
            e <= tolerance(&a) * norm(&scaled) + f32::from_bits(4)
        });
        prop_assert!(close, "{} against {}", f.s, plain.s);
        // The transpose is a view with swapped strides once it is reversed again.
        let turned = a.t().as_standard_layout().into_owned().reversed_axes();
        prop_assert!(!turned.is_standard_layout() || a.nrows() == 1 || a.ncols() == 1);
        prop_assert_eq!(svd(&a).unwrap().s, svd(&turned).unwrap().s);
        check_qr(&turned);
    }

    #[test]
    fn one_bad_value_is_an_error(a in matrices(), at in any::<prop::sample::Index>(), kind in 0usize..3) {
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
        let mut a = a;
        let n = a.ncols();
        let i = at.index(a.len());
        a[(i / n, i % n)] = bad;
        let named = format!("row {}, column {}", i / n, i % n);
        let say = |e: TensorError| e.to_string();
        prop_assert!(say(svd(&a).unwrap_err()).contains(&named));
        prop_assert!(say(qr(&a).unwrap_err()).contains(&named));
        prop_assert!(say(randomized_svd(&a, 1, 2, 1, RngKey::new(0)).unwrap_err()).contains(&named));
        let k = a.nrows().min(n);
        let square = a.slice(s![..k, ..k]).to_owned();
        prop_assert_eq!(eigh(&square).is_err(), square.iter().any(|x| !x.is_finite()));
    }

    #[test]
    fn randomized_svd_is_exact_on_low_rank(m in 8usize..50, n in 8usize..50, rank in 1usize..5, seed in any::<u64>()) {
        let a = random(m, rank, seed).dot(&random(rank, n, seed ^ 7));
        let f = randomized_svd(&a, rank, 3, 1, RngKey::new(seed)).unwrap();
        prop_assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((m, rank), rank, (rank, n)));
        prop_assert!(gap(&rebuild(&f), &a) <= 4.0 * tolerance(&a) * norm(&a));
        check_orthonormal("u", &f.u, &a);
        check_orthonormal("v", &f.vt.t().to_owned(), &a);
    }
}

#[test]
fn odd_shapes_and_zeros_decompose() {
    for (m, n) in [(1, 1), (1, 9), (9, 1), (300, 3), (3, 300), (64, 65)] {
        for a in [random(m, n, 5), Array2::zeros((m, n)), Array2::ones((m, n))] {
            check_svd(&a);
            check_qr(&a);
            check_eigh(&a.dot(&a.t()));
        }
    }
    for (m, n) in [(0, 0), (0, 4), (4, 0)] {
        let a = Array2::zeros((m, n));
        let f = svd(&a).unwrap();
        assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((m, 0), 0, (0, n)));
        let (q, r) = qr(&a).unwrap();
        assert_eq!((q.dim(), r.dim()), ((m, 0), (0, n)));
        assert!(randomized_svd(&a, 1, 0, 0, RngKey::new(0)).is_err());
    }
    assert_eq!(eigh(&Array2::zeros((0, 0))).unwrap().0.len(), 0);
}

/// Large enough for the blocked code paths of both providers.
#[test]
fn larger_matrices_decompose() {
    for (m, n) in [(257, 130), (96, 400), (200, 200)] {
        let a = random(m, n, 11);
        check_svd(&a);
        check_qr(&a);
        check_eigh(&(a.dot(&a.t()) / n as f32));
        // Half of the rank missing.
        check_svd(&random(m, n / 2, 3).dot(&random(n / 2, n, 4)));
    }
}

/// Columns that are nearly, but not, parallel: a threshold for the rank that is too generous loses the difference.
#[test]
fn nearly_parallel_columns_stay_apart() {
    for (m, epsilon) in [(40, 3e-4), (3000, 3e-3)] {
        let (base, other) = (random(m, 1, 1), random(m, 1, 2));
        let (a0, a1) = (
            base.column(0),
            &base.column(0) + &(&other.column(0) * epsilon),
        );
        let a = ndarray::stack![ndarray::Axis(1), a0, a1];
        check_qr(&a);
        check_svd(&a);
        check_svd(&a.t().to_owned());
        let apart = epsilon * norm(&other);
        let (_, r) = qr(&a).unwrap();
        assert!(
            (r[(1, 1)].abs() / apart - 1.0).abs() < 0.05,
            "{r} should end in {apart}"
        );
        let s = svd(&a).unwrap().s;
        assert!(
            (s[1] * 2f32.sqrt() / apart - 1.0).abs() < 0.05,
            "{s} should end in {apart} / sqrt 2"
        );
    }
}

#[test]
fn known_values_come_out() {
    let a = ndarray::arr2(&[[3.0, 0.0], [4.0, 5.0]]);
    let s = svd(&a).unwrap().s;
    assert!(
        (s[0] - 45f32.sqrt()).abs() < 1e-5 && (s[1] - 5f32.sqrt()).abs() < 1e-5,
        "{s}"
    );
    let (values, _) = eigh(&ndarray::arr2(&[[2.0, 1.0], [1.0, 2.0]])).unwrap();
    assert!(
        (values[0] - 1.0).abs() < 1e-6 && (values[1] - 3.0).abs() < 1e-6,
        "{values}"
    );
    let (_, r) = qr(&a).unwrap();
    assert!(
        (r[(0, 0)].abs() - 5.0).abs() < 1e-5 && (r[(1, 1)].abs() - 3.0).abs() < 1e-5,
        "{r}"
    );
}

/// A spectrum that falls fast: the leading part is found, better with more iterations, the same for the same key.
#[test]
fn randomized_svd_finds_the_leading_part() {
    let (m, n, rank) = (120, 80, 6);
    let (u, _) = qr(&random(m, n, 1)).unwrap();
    let (v, _) = qr(&random(n, n, 2)).unwrap();
    let spectrum = Array1::from_shape_fn(n, |i| 0.75f32.powi(i as i32));
    let a = (&u * &spectrum).dot(&v.t());
    let error = |iterations, seed| {
        let f = randomized_svd(&a, rank, 4, iterations, RngKey::new(seed)).unwrap();
        norm(&(&a - &rebuild(&f)))
    };
    let best = spectrum
        .iter()
        .skip(rank)
        .map(|x| x * x)
        .sum::<f32>()
        .sqrt();
    for seed in 0..5 {
        let (none, four) = (error(0, seed), error(4, seed));
        assert!(
            four < none && four < best * 1.001,
            "seed {seed}: {none} {four} {best}"
        );
    }
    let again = |seed| randomized_svd(&a, rank, 4, 2, RngKey::new(seed)).unwrap();
    assert_ne!(again(1).u, again(2).u);
    if cfg!(not(feature = "lapack")) {
        assert_eq!(again(1).u, again(1).u);
    }
}

#[test]
fn impossible_requests_are_errors() {
    let a = random(4, 6, 0);
    assert!(eigh(&a).unwrap_err().to_string().contains("4 x 6"));
    for rank in [0, 5, usize::MAX] {
        let e = randomized_svd(&a, rank, 2, 1, RngKey::new(0))
            .unwrap_err()
            .to_string();
        assert!(e.contains("1 to 4"), "{e}");
    }
    assert!(randomized_svd(&a, 4, usize::MAX, 1, RngKey::new(0)).is_ok());
    // Finite entries whose singular value is not.
    assert!(svd(&Array2::from_elem((2, 2), f32::MAX)).is_err());
    assert!(svd(&Array2::from_elem((1, 1), f32::MAX)).is_ok());
}

#[test]
fn truncate_keeps_the_head() {
    let f = svd(&random(5, 7, 2)).unwrap();
    let t = f.truncate(2);
    assert_eq!((t.u.dim(), t.s.len(), t.vt.dim()), ((5, 2), 2, (2, 7)));
    assert_eq!(t.s, f.s.slice(s![..2]));
    assert_eq!(f.truncate(99).s, f.s);
}
