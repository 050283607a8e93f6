//! One loop, several instruction sets: the build targets the baseline processor, so a hot function is compiled
//! again for AVX2 + FMA and for AVX-512, and the best the machine has is picked when it is called.
//!
//! Bodies are plain safe loops that the compiler vectorises; what it cannot vectorise, calls into libm, has a
//! polynomial here.

/// Instruction sets with a copy of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// What the target guarantees.
    Base,
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The best level of this machine, found once.
#[inline]
pub(crate) fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 {
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Base
    })
}

/// Declares a function whose body is compiled once per [`Level`]. In the body the constant `FMA` says whether
/// a fused multiply-add is one instruction; [`madd`] and the functions below take it.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[allow(clippy::extra_unused_type_parameters, reason = "a body may not need to know about FMA")]
            #[inline(always)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                match $crate::cpu::simd::level() {
                    #[allow(unsafe_code, reason = "calls into a copy for instructions that were detected")]
                    // SAFETY: level() says Avx512 only where all features of that copy were detected.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    #[allow(unsafe_code, reason = "calls into a copy for instructions that were detected")]
                    // SAFETY: level() says Avx2 only where avx2 and fma were detected.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Level::Base => {}
                }
            }
            body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use simd;

/// a * b + c, fused where that is one instruction (elsewhere it would be a slow library call).
#[inline(always)]
pub(crate) fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about 1e-7 relative; below -87 it is 0, above 88.7 infinite, NaN stays NaN.
///
/// Range reduction to |r| <= ln 2 / 2 and the degree-6 polynomial of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    // Comparisons and not max/min, which would swallow NaN.
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let z = madd::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = z - MAGIC;
    let r = madd::<FMA>(n, -0.693_359_4, x);
    let r = madd::<FMA>(n, 2.121_944_4e-4, r);
    let p = madd::<FMA>(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = madd::<FMA>(p, r, 8.333_452e-3);
    let p = madd::<FMA>(p, r, 4.166_579_6e-2);
    let p = madd::<FMA>(p, r, 1.666_666_5e-1);
    let p = madd::<FMA>(p, r, 5.0e-1);
    let p = madd::<FMA>(p, r * r, r) + 1.0;
    // 2^(n-1), doubled at the end, so that n = 128 does not overflow too early; n = -126 gives 0.
    let half = f32::from_bits(z.to_bits().wrapping_add(126) << 23);
    p * half * 2.0
}

/// tanh x to about 1e-7: Cephes' odd polynomial near 0, through [`exp`] elsewhere.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let z = x * x;
    let p = madd::<FMA>(-5.704_988_7e-3, z, 2.063_909e-2);
    let p = madd::<FMA>(p, z, -5.373_971_6e-2);
    let p = madd::<FMA>(p, z, 1.333_144_2e-1);
    let p = madd::<FMA>(p, z, -3.333_328e-1);
    let near = madd::<FMA>(p * z, x, x);
    let far = 1.0 - 2.0 / (exp::<FMA>(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 {
        near
    } else {
        far.copysign(x)
    }
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// erf x to about 1e-7: an odd polynomial below 0.92, one minus the exponential of a polynomial above.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let r = madd::<FMA>(-1.728_534_7e-5, t, 3.831_971_3e-4);
    let u = madd::<FMA>(-3.883_964_4e-3, t, 2.425_462_2e-2);
    let r = madd::<FMA>(r, s, u);
    let r = madd::<FMA>(r, t, -1.067_778_8e-1);
    let r = madd::<FMA>(r, t, -6.348_467e-1);
    let r = madd::<FMA>(r, t, -1.287_175_1e-1);
    let r = madd::<FMA>(r, t, -t);
    // Beyond 4 the result is 1 in f32 and the polynomial is not meant for it.
    let far = if t > 4.0 { 1.0 } else { 1.0 - exp::<FMA>(r) };
    let p = madd::<FMA>(-5.967_617e-4, s, 4.991_194_2e-3);
    let p = madd::<FMA>(p, s, -2.676_813_5e-2);
    let p = madd::<FMA>(p, s, 1.128_199_2e-1);
    let p = madd::<FMA>(p, s, -3.761_253_4e-1);
    let p = madd::<FMA>(p, s, 1.283_791_7e-1);
    let near = madd::<FMA>(p, x, x);
    if t > 0.921_875 { far.copysign(x) } else { near }
}

/// The standard normal distribution function.
#[inline(always)]
pub(crate) fn phi<const FMA: bool>(x: f32) -> f32 {
    0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// (value, derivative) of the tanh form of GELU share this: tanh(sqrt(2/pi) (x + 0.044715 x^3)).
#[inline(always)]
pub(crate) fn gelu_tanh_inner<const FMA: bool>(x: f32) -> f32 {
    tanh::<FMA>(0.797_884_6 * madd::<FMA>(0.044_715 * x * x, x, x))
}

simd! {
    /// Sum of the products, in a fixed order: 32 lanes, then the lanes, then the tail.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_body::<FMA>(a, b)
    }
}

/// The loop of [`dot`], for use inside other functions of this kind.
#[inline(always)]
pub(crate) fn dot_body<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 32];
    let (a_blocks, a_tail) = a.as_chunks::<32>();
    let (b_blocks, b_tail) = b.as_chunks::<32>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for l in 0..32 {
            acc[l] = madd::<FMA>(x[l], y[l], acc[l]);
        }
    }
    let mut sum = fold(&acc);
    for (x, y) in a_tail.iter().zip(b_tail) {
        sum = madd::<FMA>(*x, *y, sum);
    }
    sum
}

/// Sum of 32 lanes by halves.
#[inline(always)]
pub(crate) fn fold(acc: &[f32; 32]) -> f32 {
    let mut half = [0.0; 16];
    for l in 0..16 {
        half[l] = acc[l] + acc[l + 16];
    }
    sum16(&half)
}

/// Sum of 16 lanes by halves. A call of its own: inlined, its last steps, of two lanes, are what the compiler takes as
/// the width of the loop that made the lanes.
#[inline(never)]
pub(crate) fn sum16(acc: &[f32; 16]) -> f32 {
    by_halves(acc, |a, b| a + b)
}

/// Largest of 16 lanes.
#[inline(never)]
pub(crate) fn max16(acc: &[f32; 16]) -> f32 {
    by_halves(acc, larger)
}

#[inline(always)]
fn by_halves(acc: &[f32; 16], join: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut a, mut b) = ([0.0; 8], [0.0; 4]);
    for l in 0..8 {
        a[l] = join(acc[l], acc[l + 8]);
    }
    for l in 0..4 {
        b[l] = join(a[l], a[l + 4]);
    }
    join(join(b[0], b[2]), join(b[1], b[3]))
}

/// Sum in a fixed order, in 32 lanes.
#[inline(always)]
pub(crate) fn sum_body(x: &[f32]) -> f32 {
    let mut acc = [0.0f32; 32];
    let (blocks, tail) = x.as_chunks::<32>();
    for block in blocks {
        for l in 0..32 {
            acc[l] += block[l];
        }
    }
    fold(&acc) + tail.iter().sum::<f32>()
}

/// Largest value (NaN is passed over), -infinity of nothing.
#[inline(always)]
pub(crate) fn max_body(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; 32];
    let (blocks, tail) = x.as_chunks::<32>();
    for block in blocks {
        for l in 0..32 {
            acc[l] = larger(block[l], acc[l]);
        }
    }
    let mut half = [0.0; 16];
    for l in 0..16 {
        half[l] = larger(acc[l], acc[l + 16]);
    }
    let max = max16(&half);
    tail.iter().fold(max, |max, v| larger(*v, max))
}

/// The larger of two, `b` where `a` is NaN.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

simd! {
    /// Whether no value is NaN or infinite.
    pub fn all_finite(x: &[f32]) -> bool {
        // Without their sign, the bits of values are in the values' order, and infinity is above all numbers.
        let (blocks, tail) = x.as_chunks::<32>();
        let mut largest = [0u32; 32];
        for block in blocks {
            for l in 0..32 {
                largest[l] = largest[l].max(block[l].to_bits() & 0x7fff_ffff);
            }
        }
        let infinity = f32::INFINITY.to_bits();
        largest.iter().all(|bits| *bits < infinity) && tail.iter().all(|v| v.is_finite())
    }
}

simd! {
    /// y += a x
    pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = madd::<FMA>(a, *x, *y);
        }
    }
}

simd! {
    /// y += x
    pub(crate) fn add_into(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    simd! {
        fn each(x: &[f32], e: &mut [f32], t: &mut [f32], r: &mut [f32], s: &mut [f32]) {
            for i in 0..x.len() {
                e[i] = exp::<FMA>(x[i]);
                t[i] = tanh::<FMA>(x[i]);
                r[i] = erf::<FMA>(x[i]);
                s[i] = sigmoid::<FMA>(x[i]);
            }
        }
    }

    #[test]
    fn polynomials_are_close_to_libm() {
        let x: Vec<f32> = (-180_000..180_000).map(|i| i as f32 * 4.8e-4).collect();
        let n = x.len();
        let (mut e, mut t, mut r, mut s) = (vec![0.0; n], vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        each(&x, &mut e, &mut t, &mut r, &mut s);
        for i in 0..n {
            let v = f64::from(x[i]);
            let rel = |got: f32, want: f64| (f64::from(got) - want).abs() / want.abs().max(1e-37);
            assert!(rel(e[i], v.exp()) < 3e-7, "exp {v}: {}", e[i]);
            assert!(
                rel(s[i], 1.0 / (1.0 + (-v).exp())) < 4e-7,
                "sigmoid {v}: {}",
                s[i]
            );
            // Both are odd and reach +-1, so near zero what counts is the relative error.
            if v != 0.0 {
                assert!(rel(t[i], v.tanh()) < 5e-7, "tanh {v}: {}", t[i]);
                assert!(rel(r[i], libm::erf(v)) < 5e-7, "erf {v}: {}", r[i]);
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_is() {
        for n in [1, 31, 64, 67] {
            let mut x = vec![-f32::MAX; n];
            assert!(all_finite(&x));
            for i in 0..n {
                for v in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    x[i] = v;
                    assert!(!all_finite(&x), "{v} at {i} of {n}");
                }
                x[i] = f32::MIN_POSITIVE / 2.0;
            }
        }
    }

    #[test]
    fn edges_of_exp() {
        let x = [
            f32::NEG_INFINITY,
            -1e9,
            -87.5,
            f32::NAN,
            89.5,
            f32::INFINITY,
            88.5,
            0.0,
        ];
        let mut out = [[0.0; 8]; 4];
        let [e, t, r, s] = &mut out;
        each(&x, e, t, r, s);
        assert_eq!(e[..3], [0.0, 0.0, 0.0]);
        assert!(e[3].is_nan() && t[3].is_nan() && r[3].is_nan() && s[3].is_nan());
        assert_eq!(e[4..6], [f32::INFINITY, f32::INFINITY]);
        assert!((e[6] / 88.5f32.exp() - 1.0).abs() < 3e-7);
        assert_eq!((e[7], t[7], r[7], s[7]), (1.0, 0.0, 0.0, 0.5));
        assert_eq!((t[0], r[0], s[0]), (-1.0, -1.0, 0.0));
        assert_eq!((t[5], r[5], s[5]), (1.0, 1.0, 1.0));
    }
}
