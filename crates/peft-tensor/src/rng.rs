//! Deterministic random numbers that are a function of a key and a counter.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
//! maps a 64-bit key and a 128-bit counter to 128 random bits. There is no state, so any element of a
//! stream can be computed alone: results do not depend on the number of threads, and a stopped run resumes
//! with nothing but its key and position. Transcendental functions come from `libm`, so the bits are the
//! same on every platform too.

use rayon::prelude::*;

/// Elements that one task of a parallel fill computes; a multiple of the four words of a block.
const CHUNK: usize = 1 << 14;

/// The key of a random stream. Streams of different keys are independent.
///
/// Use one key for one purpose and [`fork`](RngKey::fork) the others from it: the functions below all draw
/// from the same counter space.
///
/// ```
/// use peft_tensor::RngKey;
/// let mut a = vec![0.0; 8];
/// RngKey::new(7).fork("layers.0.lora_A").fill_normal(0.0, 0.02, &mut a);
/// let again = RngKey::new(7).fork("layers.0.lora_A");
/// let mut b = vec![0.0; 8];
/// again.fill_normal(0.0, 0.02, &mut b);
/// assert_eq!(a, b);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngKey(pub u64);

impl RngKey {
    /// The stream of a user's seed.
    pub fn new(seed: u64) -> Self {
        RngKey(seed)
    }

    /// The stream named `label` under this one (a module path, a purpose). The name's hash is FNV-1a,
    /// which is fixed for ever, so a seed means the same numbers in every version.
    pub fn fork(self, label: &str) -> Self {
        let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
        RngKey(mix(mix(self.0) ^ hash))
    }

    /// The stream of number `n` under this one (a step, a layer, a batch).
    pub fn fork_n(self, n: u64) -> Self {
        RngKey(mix(mix(self.0 ^ 0xa5a5_5a5a_c3c3_3c3c) ^ mix(n)))
    }

    /// Block `counter` of the stream: four random words.
    pub fn u32x4(self, counter: u64) -> [u32; 4] {
        self.block(counter, 0)
    }

    fn block(self, counter: u64, attempt: u32) -> [u32; 4] {
        philox4x32_10(
            [counter as u32, (counter >> 32) as u32, attempt, 0],
            [self.0 as u32, (self.0 >> 32) as u32],
        )
    }

    /// Element `i` of the stream's uniform numbers: a multiple of 2^-24 in [0, 1).
    pub fn uniform_at(self, i: u64) -> f32 {
        unit(self.u32x4(i / 4)[(i % 4) as usize])
    }

    /// Fills `out` with uniform numbers in [lo, hi) (all `lo` where they are equal); element `i` is made
    /// from [`uniform_at`](RngKey::uniform_at)`(i)`. `lo`, `hi` and their difference must be finite.
    pub fn fill_uniform(self, lo: f32, hi: f32, out: &mut [f32]) {
        let below = if lo < hi { hi.next_down() } else { hi };
        self.fill(out, |words| {
            words.map(|w| (lo + (hi - lo) * unit(w)).min(below))
        });
    }

    /// Fills `out` with normal numbers by Box and Muller's transform, two from each pair of words. The
    /// largest distance from the mean is 6.67 `std`.
    pub fn fill_normal(self, mean: f32, std: f32, out: &mut [f32]) {
        self.fill(out, |w| {
            let (a, b) = box_muller(w[0], w[1]);
            let (c, d) = box_muller(w[2], w[3]);
            [a, b, c, d].map(|z| mean + std * z)
        });
    }

    /// Fills `out` four at a time: elements `4c..4c+4` come from block `c`.
    fn fill(self, out: &mut [f32], f: impl Fn([u32; 4]) -> [f32; 4] + Sync) {
        let one = |(chunk, out): (usize, &mut [f32])| {
            let first = (chunk * CHUNK / 4) as u64;
            for (block, four) in out.chunks_mut(4).enumerate() {
                let values = f(self.u32x4(first + block as u64));
                four.copy_from_slice(&values[..four.len()]);
            }
        };
        if out.len() <= CHUNK {
            one((0, out));
        } else {
            out.par_chunks_mut(CHUNK).enumerate().for_each(one);
        }
    }

    /// A random order of `0..n` (Fisher and Yates' shuffle).
    pub fn permutation(self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u64 + 1) as usize);
        }
        order
    }

    /// A number in `0..n` from block `counter`, every one exactly as likely; 0 for `n` = 0.
    ///
    /// Lemire's method ("Fast random integer generation in an interval", 2019): the high half of
    /// `random * n`, drawn again in the rare case that would favour some numbers.
    pub fn below(self, counter: u64, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let reject_below = n.wrapping_neg() % n;
        let mut attempt = 0;
        loop {
            let w = self.block(counter, attempt);
            for random in [
                u64::from(w[0]) | u64::from(w[1]) << 32,
                u64::from(w[2]) | u64::from(w[3]) << 32,
            ] {
                let product = u128::from(random) * u128::from(n);
                if product as u64 >= reject_below {
                    return (product >> 64) as u64;
                }
            }
            attempt = attempt.wrapping_add(1);
        }
    }
}

/// The 24 high bits as a fraction of 2^24.
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Two independent standard normal numbers from two words.
fn box_muller(a: u32, b: u32) -> (f32, f32) {
    // In (0, 1], so that the logarithm is finite; all 32 bits, because they set how far the tail reaches.
    let u = (a as f32 + 1.0) * (1.0 / 4_294_967_296.0);
    let radius = (-2.0 * libm::logf(u)).max(0.0).sqrt();
    let (sin, cos) = libm::sincosf(std::f32::consts::TAU * unit(b));
    (radius * cos, radius * sin)
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection in which every bit depends on every bit.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[inline]
fn philox4x32_10(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [
                key[0].wrapping_add(0x9e37_79b9),
                key[1].wrapping_add(0xbb67_ae85),
            ];
        }
        let a = u64::from(c[0]) * 0xd251_1f53;
        let b = u64::from(c[2]) * 0xcd9e_8d57;
        c = [
            (b >> 32) as u32 ^ c[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ c[3] ^ key[1],
            a as u32,
        ];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The `philox4x32 10` lines of Random123's `kat_vectors`.
    #[test]
    fn philox_gives_the_published_known_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, want) in [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                pi,
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32_10(counter, key), want);
        }
        assert_eq!(
            RngKey(0).u32x4(0),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
    }

    #[test]
    fn the_halves_of_key_and_counter_both_count() {
        let base = RngKey(5).u32x4(9);
        assert_ne!(base, RngKey(5 | 1 << 32).u32x4(9));
        assert_ne!(base, RngKey(5).u32x4(9 | 1 << 32));
        assert_ne!(base, RngKey(6).u32x4(9));
        assert_ne!(base, RngKey(5).u32x4(10));
    }

    /// These numbers are a promise: a seed must mean the same run in every later version.
    #[test]
    fn forks_are_fixed_and_differ() {
        let k = RngKey::new(42);
        let forks = [
            k,
            k.fork(""),
            k.fork("a"),
            k.fork("b"),
            k.fork_n(0),
            k.fork_n(1),
            k.fork("a").fork("b"),
        ];
        for (i, x) in forks.iter().enumerate() {
            assert!(forks[i + 1..].iter().all(|y| x != y), "{forks:x?}");
        }
        assert_ne!(k.fork("a").fork("b"), k.fork("b").fork("a"));
        // FNV-1a of "a" and SplitMix64's first output for seed 0, from their publications.
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(k.fork("a"), RngKey(mix(mix(42) ^ 0xaf63_dc4c_8601_ec8c)));
    }

    #[test]
    fn fills_do_not_depend_on_the_thread_count_or_on_the_length() {
        let key = RngKey::new(3).fork("fill");
        let n = 3 * CHUNK + 7;
        let fill = |threads: usize, n: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let (mut u, mut z) = (vec![0.0; n], vec![0.0; n]);
                key.fill_uniform(-1.0, 1.0, &mut u);
                key.fill_normal(0.5, 2.0, &mut z);
                (u, z)
            })
        };
        let (u1, z1) = fill(1, n);
        let (u3, z3) = fill(3, n);
        assert_eq!(u1, u3);
        assert_eq!(z1, z3);
        let (short, _) = fill(2, CHUNK + 2);
        assert_eq!(short, u1[..CHUNK + 2]);
        for i in [0, 1, CHUNK - 1, CHUNK, n - 1] {
            assert_eq!(u1[i], -1.0 + 2.0 * key.uniform_at(i as u64));
        }
    }

    #[test]
    fn uniform_has_its_moments_and_stays_inside() {
        for seed in [0, 1, 99] {
            let mut u = vec![0.0; 1 << 18];
            RngKey::new(seed).fill_uniform(2.0, 5.0, &mut u);
            assert!(u.iter().all(|x| (2.0..5.0).contains(x)));
            let (mean, var) = moments(&u);
            // Five standard errors: 3/sqrt(12 n) for the mean, about 0.9 * var/sqrt(n) for the variance.
            assert!(
                (mean - 3.5).abs() < 5.0 * 3.0 / (12.0 * u.len() as f64).sqrt(),
                "{mean}"
            );
            assert!(
                (var - 0.75).abs() < 5.0 * 0.75 * 0.9 / (u.len() as f64).sqrt(),
                "{var}"
            );
        }
        // Where the sum would round up to the open end.
        let mut tight = vec![0.0; 1 << 12];
        RngKey::new(1).fill_uniform(1.0, 1.0 + 2.0 * f32::EPSILON, &mut tight);
        assert!(
            tight
                .iter()
                .all(|x| (1.0..1.0 + 2.0 * f32::EPSILON).contains(x))
        );
    }

    #[test]
    fn normal_has_its_moments() {
        for seed in [0, 1, 99] {
            let n = 1 << 18;
            let mut z = vec![0.0; n];
            RngKey::new(seed).fill_normal(0.0, 1.0, &mut z);
            let (mean, var) = moments(&z);
            let fourth = z.iter().map(|&x| f64::from(x).powi(4)).sum::<f64>() / n as f64;
            let neighbours = z.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / n as f64;
            let se = 1.0 / (n as f64).sqrt();
            assert!(mean.abs() < 5.0 * se, "mean {mean}");
            assert!((var - 1.0).abs() < 5.0 * se * 2f64.sqrt(), "variance {var}");
            assert!(
                (fourth - 3.0).abs() < 5.0 * se * 96f64.sqrt(),
                "fourth moment {fourth}"
            );
            assert!(neighbours.abs() < 5.0 * se, "correlation {neighbours}");
            let inside = z.iter().filter(|x| x.abs() < 1.0).count() as f64 / n as f64;
            assert!(
                (inside - 0.682_689).abs() < 5.0 * se * 0.4655,
                "within one sigma {inside}"
            );
        }
    }

    #[test]
    fn extreme_words_stay_finite() {
        for a in [0, 1, u32::MAX] {
            for b in [0, 1 << 31, u32::MAX] {
                let (x, y) = box_muller(a, b);
                assert!(
                    x.is_finite() && y.is_finite() && x.hypot(y) < 6.67,
                    "{a} {b}: {x} {y}"
                );
            }
        }
    }

    #[test]
    fn a_permutation_is_one_and_every_order_comes() {
        for n in [0, 1, 2, 17, 1000] {
            let mut p = RngKey::new(4).permutation(n);
            assert!(n < 17 || p.iter().enumerate().any(|(i, &x)| i != x));
            p.sort_unstable();
            assert!(p.iter().enumerate().all(|(i, &x)| i == x));
        }
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            *counts
                .entry(RngKey::new(8).fork_n(seed).permutation(3))
                .or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // 1000 expected, standard deviation 29.
        assert!(
            counts.values().all(|&c: &i32| (c - 1000).abs() < 150),
            "{counts:?}"
        );
    }

    #[test]
    fn below_is_even_and_bounded() {
        let key = RngKey::new(12);
        let mut counts = [0i32; 7];
        for i in 0..70_000 {
            counts[key.below(i, 7) as usize] += 1;
        }
        assert!(
            counts.iter().all(|c| (c - 10_000).abs() < 500),
            "{counts:?}"
        );
        // Half of all draws are rejected here: the retry is exercised, and the halves stay even.
        let n = (1u64 << 63) + 1;
        let upper = (0..2000).filter(|&i| key.below(i, n) >= n / 2).count();
        assert!((850..1150).contains(&upper), "{upper}");
        assert_eq!((key.below(3, 1), key.below(3, 0)), (0, 0));
    }

    fn moments(x: &[f32]) -> (f64, f64) {
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        (
            mean,
            x.iter()
                .map(|&v| (f64::from(v) - mean).powi(2))
                .sum::<f64>()
                / n,
        )
    }
}
