//! What all threads together can do: fused multiply-adds in registers, and reading memory.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod tiles;

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Multiply-adds of one call of the loop.
const STEPS: usize = 2_000_000;

/// Floating-point operations a second with the widest vectors, none of which waits for another.
pub(crate) fn flops() -> f64 {
    let (lanes, run): (usize, fn()) = widest();
    let threads = rayon::current_num_threads();
    let seconds = best(|| {
        rayon::broadcast(|_| run());
    });
    (2 * STEPS * lanes * threads) as f64 / seconds
}

/// Bytes read a second from memory that no cache holds, each thread in four places at once.
pub(crate) fn bandwidth() -> f64 {
    let values: Vec<u64> = (0..48 << 20).collect();
    let sum = |part: &[u64]| {
        let (front, back) = part.split_at(part.len() / 2);
        let ((a, b), (c, d)) = (
            front.split_at(front.len() / 2),
            back.split_at(back.len() / 2),
        );
        let mut sums = [[0u64; 8]; 4];
        let blocks = [a, b, c, d].map(|part| part.as_chunks::<8>().0);
        for i in 0..blocks[0].len() {
            for (sums, blocks) in sums.iter_mut().zip(blocks) {
                for (sum, v) in sums.iter_mut().zip(blocks[i]) {
                    *sum = sum.wrapping_add(v);
                }
            }
        }
        black_box(sums);
    };
    let seconds = best(|| values.par_chunks(1 << 16).for_each(sum));
    (values.len() * 8) as f64 / seconds
}

/// Seconds of the fastest of some runs.
fn best(mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..8).map(time).fold(f64::INFINITY, f64::min)
}

/// Values of a vector, and a loop of [`STEPS`] multiply-adds of such.
fn widest() -> (usize, fn()) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        #[allow(unsafe_code, reason = "calls code for instructions that were detected")]
        if has!("avx512f") {
            // SAFETY: avx512f was just detected.
            return (16, || unsafe { x86::avx512() });
        }
        #[allow(unsafe_code, reason = "calls code for instructions that were detected")]
        if has!("avx2") && has!("fma") {
            // SAFETY: avx2 and fma were just detected.
            return (8, || unsafe { x86::avx2() });
        }
    }
    (4, four)
}

/// Four lanes, fused where the target has that.
fn four() {
    let mut sums = [[0.0f32; 4]; 12];
    let (a, b) = (black_box([1.0f32; 4]), black_box([0.5f32; 4]));
    for _ in 0..STEPS / 12 {
        for sum in &mut sums {
            for l in 0..4 {
                let fused = cfg!(target_arch = "aarch64");
                sum[l] = if fused {
                    a[l].mul_add(b[l], sum[l])
                } else {
                    a[l] * b[l] + sum[l]
                };
            }
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::STEPS;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2() {
        let mut sums = [_mm256_setzero_ps(); 12];
        let (a, b) = black_box((_mm256_set1_ps(1.0), _mm256_set1_ps(0.5)));
        for _ in 0..STEPS / 12 {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512() {
        let mut sums = [_mm512_setzero_ps(); 12];
        let (a, b) = black_box((_mm512_set1_ps(1.0), _mm512_set1_ps(0.5)));
        for _ in 0..STEPS / 12 {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
    }
}
