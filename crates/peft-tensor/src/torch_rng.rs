//! The random numbers of PyTorch's CPU generator, bit for bit, for files that hold a seed in place of values.
//!
//! The generator is the Mersenne twister MT19937 (Matsumoto and Nishimura, 1998) seeded from the low 32 bits of the
//! seed. Normal numbers come by Box and Muller's transform, in double precision for fewer than sixteen, and from
//! sixteen on eight pairs at a time in single precision with the Cephes library's polynomials for logarithm, sine and
//! cosine, every multiplication fused with the addition that follows it, as PyTorch's x86 builds do it. On other
//! processors PyTorch itself differs from that in the last bits of normal numbers; uniform numbers, permutations and
//! integers are the same everywhere.
//!
//! For everything that is not read from such a file, [`RngKey`](crate::RngKey) is the better generator: it needs no order.

use std::f32::consts::FRAC_1_SQRT_2;
use std::f64::consts::TAU;

const N: usize = 624;
const M: usize = 397;
/// From this many values on, normal numbers are made in single precision, this many at a time.
const FILL: usize = 16;

/// PyTorch's `Generator("cpu")` after `manual_seed`.
///
/// ```
/// use peft_tensor::torch_rng::TorchRng;
/// // torch.randperm(5, generator=torch.Generator().manual_seed(0))
/// assert_eq!(TorchRng::new(0).permutation(5), [4, 0, 1, 3, 2]);
/// ```
#[derive(Clone)]
pub struct TorchRng {
    state: [u32; N],
    at: usize,
    /// The second number of a pair made in double precision.
    kept: Option<f64>,
}

impl TorchRng {
    /// After `manual_seed(seed)`; a negative seed of PyTorch's is `seed as u64`.
    pub fn new(seed: u64) -> Self {
        let mut state = [seed as u32; N];
        for i in 1..N {
            let before = state[i - 1];
            state[i] = (before ^ (before >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self {
            state,
            at: N,
            kept: None,
        }
    }

    fn twist(&mut self) {
        for i in 0..N {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (mixed >> 1) ^ odd;
        }
        self.at = 0;
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.at >= N {
            self.twist();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// The next 64 bits, the high half first.
    pub fn next_u64(&mut self) -> u64 {
        let high = u64::from(self.next_u32());
        high << 32 | u64::from(self.next_u32())
    }

    /// A multiple of 2^-24 in [0, 1).
    fn unit(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// A multiple of 2^-53 in [0, 1).
    fn unit_f64(&mut self) -> f64 {
        (self.next_u64() & ((1 << 53) - 1)) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// `tensor.uniform_(from, to, generator=..)` on a contiguous tensor of f32.
    pub fn fill_uniform(&mut self, from: f64, to: f64, out: &mut [f32]) {
        let (from, to) = (from as f32, to as f32);
        for value in out {
            let drawn = self.unit().mul_add(to - from, from);
            *value = if drawn == to { from } else { drawn };
        }
    }

    /// `tensor.normal_(mean, std, generator=..)` on a contiguous tensor of f32; `torch.randn` is mean 0 and std 1.
    pub fn fill_normal(&mut self, mean: f64, std: f64, out: &mut [f32]) {
        if out.len() < FILL {
            for value in out {
                *value = self.normal_f64(mean, std) as f32;
            }
            return;
        }
        out.fill_with(|| self.unit());
        let (mean, std) = (mean as f32, std as f32);
        let (blocks, rest) = out.as_chunks_mut::<FILL>();
        blocks.iter_mut().for_each(|block| pairs(block, mean, std));
        if !rest.is_empty() {
            // The last sixteen are drawn once more, together.
            if let Some(last) = out.last_chunk_mut::<FILL>() {
                last.fill_with(|| self.unit());
                pairs(last, mean, std);
            }
        }
    }

    fn normal_f64(&mut self, mean: f64, std: f64) -> f64 {
        let z = match self.kept.take() {
            Some(z) => z,
            None => {
                let (u, v) = (self.unit_f64(), self.unit_f64());
                let radius = (-2.0 * libm::log1p(-v)).sqrt();
                let (sin, cos) = libm::sincos(TAU * u);
                self.kept = Some(radius * sin);
                radius * cos
            }
        };
        z.mul_add(std, mean)
    }

    /// `torch.randperm(n, generator=..)`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in 0..n.saturating_sub(1) {
            let left = (n - i) as u64;
            // Beyond this size 32 bits would favour some.
            let drawn = if (n as u64) < u64::from(u32::MAX / 20) {
                u64::from(self.next_u32())
            } else {
                self.next_u64()
            };
            order.swap(i, i + (drawn % left) as usize);
        }
        order
    }

    /// `torch.randint(from, to, (n,), generator=..)`: whole numbers in `from..to`; none if that range is empty.
    pub fn integers(&mut self, from: i64, to: i64, n: usize) -> Vec<i64> {
        let range = to.wrapping_sub(from) as u64;
        if to <= from {
            return Vec::new();
        }
        let draw = |_| {
            let drawn = if range >= 1 << 28 {
                self.next_u64()
            } else {
                u64::from(self.next_u32())
            };
            from.wrapping_add((drawn % range) as i64)
        };
        (0..n).map(draw).collect()
    }
}

/// Sixteen uniform numbers to sixteen normal ones: the first eight set the radius, the others the angle.
fn pairs(block: &mut [f32; FILL], mean: f32, std: f32) {
    let (first, second) = block.split_at_mut(FILL / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * ln(1.0 - *a)).sqrt();
        let (sin, cos) = sin_cos(TAU as f32 * *b);
        *a = (radius * cos).mul_add(std, mean);
        *b = (radius * sin).mul_add(std, mean);
    }
}

/// The polynomial with these coefficients, highest power first.
fn horner<const K: usize>(x: f32, coefficients: [f32; K]) -> f32 {
    coefficients
        .into_iter()
        .reduce(|sum, c| sum.mul_add(x, c))
        .unwrap_or(0.0)
}

/// Cephes' `logf` for positive normal numbers.
fn ln(x: f32) -> f32 {
    let x = x.max(f32::MIN_POSITIVE);
    let bits = x.to_bits();
    let mut exponent = (bits >> 23) as f32 - 126.0;
    let mut x = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    if x < FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += x;
    }
    let x = x - 1.0;
    let square = x * x;
    let series = horner(
        x,
        [
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_84e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_4e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ],
    );
    // ln 2 in two parts, the larger exact.
    let low = (series * x).mul_add(square, exponent * -2.121_944_4e-4);
    exponent.mul_add(0.693_359_4, x + square.mul_add(-0.5, low))
}

/// Cephes' `sinf` and `cosf` for angles from 0 to a few turns.
fn sin_cos(x: f32) -> (f32, f32) {
    let octant = (x * (4.0 / std::f32::consts::PI)) as i32;
    let octant = (octant + 1) & !1;
    let turns = octant as f32;
    // Less whole octants, pi/4 in three parts.
    let x = turns.mul_add(-0.785_156_25, x);
    let x = turns.mul_add(-2.418_756_5e-4, x);
    let x = turns.mul_add(-3.774_895e-8, x);
    let square = x * x;
    let cos = horner(square, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2]) * square;
    let cos = cos.mul_add(square, -0.5 * square) + 1.0;
    let sin = horner(square, [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]) * square;
    let sin = sin.mul_add(x, x);
    let (sin, cos) = if octant & 2 == 0 {
        (sin, cos)
    } else {
        (cos, sin)
    };
    let negative = |bit: bool, value: f32| if bit { -value } else { value };
    (
        negative(octant & 4 != 0, sin),
        negative((octant - 2) & 4 == 0, cos),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(n: usize, fill: impl FnOnce(&mut [f32])) -> Vec<f32> {
        let mut out = vec![0.0; n];
        fill(&mut out);
        out
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// FNV-1a over whole words.
    fn hash(values: &[f32]) -> u64 {
        values.iter().fold(0xcbf2_9ce4_8422_2325, |h, v| {
            (h ^ u64::from(v.to_bits())).wrapping_mul(0x0100_0000_01b3)
        })
    }

    /// Printed by PyTorch 2.15 on x86, one generator for all calls: the second of a pair waits for a later call.
    #[test]
    fn a_sequence_of_calls_is_pytorchs() {
        let mut rng = TorchRng::new(42);
        let few = drawn(3, |out| rng.fill_normal(0.5, 2.0, out));
        assert_eq!(bits(&few), [0x3f96_3157, 0x3f41_f34e, 0x3f78_0b73]);
        let uniform = drawn(2, |out| rng.fill_uniform(-0.3, 0.7, out));
        assert_eq!(bits(&uniform), [0x3f24_0999, 0xbe2a_d150]);
        let many = bits(&drawn(18, |out| rng.fill_normal(0.0, 1.0, out)));
        assert_eq!(many[..3], [0xbe78_afef, 0xbf6f_2551, 0xbf8e_3219]);
        assert_eq!(many[15..], [0x3f7e_e202, 0xbf61_39a5, 0xbf19_e472]);
        let one = drawn(1, |out| rng.fill_normal(0.0, 1.0, out));
        assert_eq!(bits(&one), [0x3e6b_dc6c]);
        assert_eq!(rng.permutation(7), [6, 0, 5, 2, 4, 1, 3]);
    }

    /// Hashes of what PyTorch 2.15 drew.
    #[test]
    fn whole_tensors_are_pytorchs() {
        for (seed, n, normal, uniform) in [
            (0, 1003, 0x1cb9_4393_cb70_d1b6, 0xd731_484c_9d00_b785),
            (
                12_345_678_901,
                4096,
                0x1ec2_26c1_9d7f_f4bd,
                0xce30_d698_4229_6118,
            ),
            (1 << 63, 17, 0xbe47_84b6_ae22_e098, 0x3f94_8505_6f81_ec79),
        ] {
            let normals = drawn(n, |out| TorchRng::new(seed).fill_normal(0.5, 0.02, out));
            assert_eq!(hash(&normals), normal, "normal, seed {seed}");
            let uniforms = drawn(n, |out| TorchRng::new(seed).fill_uniform(-0.3, 0.7, out));
            assert_eq!(hash(&uniforms), uniform, "uniform, seed {seed}");
        }
    }

    #[test]
    fn integers_and_orders_are_pytorchs() {
        assert_eq!(TorchRng::new(1).integers(3, 1000, 4), [303, 431, 364, 436]);
        assert_eq!(
            TorchRng::new(1).integers(-5, 1 << 40, 3),
            [163_161_683_746, 605_240_299_608, 1_095_766_941_198]
        );
        assert_eq!(
            TorchRng::new(1).integers(0, 1 << 29, 3),
            [524_779_755, 247_206_984, 13_419_401]
        );
        assert!(TorchRng::new(1).integers(3, 3, 2).is_empty());
        let order = TorchRng::new(3).permutation(1000);
        assert_eq!(order[..5], [986, 114, 871, 894, 140]);
        assert_eq!(order[997..], [154, 17, 341]);
        assert!(TorchRng::new(3).permutation(0).is_empty());
    }
}
