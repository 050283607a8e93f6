//! Vector registers as the packed product sees them: units of 32 bits, each an f32 of the result or two bfloat16 that stand
//! next to each other along the inner dimension.
//!
//! A value of an implementation is the proof that the processor has its instructions, so its methods are safe. They are
//! only fast where they are compiled into a function for these instructions, which [`Lanes::run`] enters.

use super::parts::ALL;
#[cfg(test)]
use crate::cpu::half::bf16;

/// Registers of one instruction set.
pub(super) trait Lanes: Copy + Send + Sync + 'static {
    /// A register of [`WIDTH`] units.
    type V: Copy;

    /// All zero.
    fn zero(self) -> Self::V;
    /// `WIDTH` units.
    fn load(self, units: &[u32]) -> Self::V;
    /// `WIDTH` units.
    fn store(self, v: Self::V, out: &mut [u32]);
    /// One unit everywhere.
    fn splat(self, unit: u32) -> Self::V;
    /// `sum + a b` in f32, over the two values of each unit.
    fn dot(self, sum: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `a + b` of f32.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// The units of `2 * WIDTH` values, rounded to bfloat16.
    fn units(self, values: &[f32]) -> Self::V;
    /// The units of all [`parts`](super::parts) of `2 * WIDTH` values.
    fn parts(self, values: &[f32]) -> [Self::V; ALL];
    /// The units of a and b in turns: those of the lower halves, those of the upper halves.
    fn zip(self, a: Self::V, b: Self::V) -> (Self::V, Self::V);
    /// Units of the values of a and b in turns: those of the lower halves, those of the upper halves.
    fn weave(self, a: Self::V, b: Self::V) -> (Self::V, Self::V);
    /// Asks for the cache line at an address, which will be wanted soon; any address will do.
    fn prefetch<T>(self, at: *const T);
    /// Does the work in a function that is compiled for the instructions.
    fn run<W: Work<Self>>(self, work: W);
}

/// Units of a register.
pub(super) const WIDTH: usize = 16;

/// Rows of a tile of the result: as many as leave registers for its two columns of registers.
pub(super) const ROWS: usize = 14;

/// What is done with registers; `on` has to be `#[inline(always)]`.
pub(super) trait Work<L: Lanes> {
    fn on(self, l: L);
}

/// A register in an array: what the others are tested against, on any processor.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(super) struct Plain;

#[cfg(test)]
impl Lanes for Plain {
    type V = [u32; WIDTH];

    fn zero(self) -> Self::V {
        [0; WIDTH]
    }

    fn load(self, units: &[u32]) -> Self::V {
        units[..WIDTH].try_into().unwrap()
    }

    fn store(self, v: Self::V, out: &mut [u32]) {
        out[..WIDTH].copy_from_slice(&v);
    }

    fn splat(self, unit: u32) -> Self::V {
        [unit; WIDTH]
    }

    fn dot(self, sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| {
            let low = |v: u32| f32::from_bits(v << 16);
            let high = |v: u32| f32::from_bits(v & 0xffff_0000);
            let sum = high(a[i]).mul_add(high(b[i]), f32::from_bits(sum[i]));
            low(a[i]).mul_add(low(b[i]), sum).to_bits()
        })
    }

    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| (f32::from_bits(a[i]) + f32::from_bits(b[i])).to_bits())
    }

    fn units(self, values: &[f32]) -> Self::V {
        std::array::from_fn(|i| bf16(values[2 * i]) | bf16(values[2 * i + 1]) << 16)
    }

    fn parts(self, values: &[f32]) -> [Self::V; ALL] {
        let split = |v: f32| super::parts::split(v);
        std::array::from_fn(|part| {
            std::array::from_fn(|i| {
                split(values[2 * i])[part] | split(values[2 * i + 1])[part] << 16
            })
        })
    }

    fn zip(self, a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        let both = |i: usize| {
            if i.is_multiple_of(2) {
                a[i / 2]
            } else {
                b[i / 2]
            }
        };
        (
            std::array::from_fn(both),
            std::array::from_fn(|i| both(WIDTH + i)),
        )
    }

    fn weave(self, a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        let half = |v: &Self::V, i: usize| v[i / 2] >> (i % 2 * 16) & 0xffff;
        let both = |i: usize| half(&a, i) | half(&b, i) << 16;
        (
            std::array::from_fn(both),
            std::array::from_fn(|i| both(WIDTH + i)),
        )
    }

    fn prefetch<T>(self, _at: *const T) {}

    fn run<W: Work<Self>>(self, work: W) {
        work.on(self);
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use x86::microcode;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx512Bf16, products_in_microcode};

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "vector instructions, each behind a type that exists only where they were detected"
)]
mod x86 {
    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::*;

    use super::{ALL, Lanes, Work};

    /// Sixteen pairs of bfloat16, multiplied and added to f32 in one instruction.
    #[derive(Clone, Copy)]
    pub(in crate::cpu) struct Avx512Bf16(());

    impl Avx512Bf16 {
        pub(in super::super) fn detect() -> Option<Self> {
            (has!("avx512f") && has!("avx2") && has!("fma") && has!("avx512bf16"))
                .then_some(Self(()))
        }
    }

    /// Whether products of bfloat16 are microcode, at half the rate of products of f32: so it is on Intel's processors since
    /// Alder Lake and Sapphire Rapids, which leave bfloat16 to AMX and are the ones that have AVX512-FP16. Four operations and
    /// two cycles for each in LLVM's model of Sapphire Rapids; "ucoded" and twice as slow as f32 in
    /// <https://github.com/libxsmm/tpp-mlir/pull/1078> and /1025. AMD's since Zen 4 have twice the rate of f32
    /// (<https://github.com/iree-org/iree/pull/15089>).
    pub(in super::super) fn products_in_microcode() -> bool {
        const FP16: u32 = 1 << 23;
        microcode(__cpuid(0).ebx, __cpuid_count(7, 0).edx & FP16 != 0)
    }

    /// Of a vendor, as CPUID begins its name.
    pub(in super::super) fn microcode(vendor: u32, fp16: bool) -> bool {
        vendor == u32::from_le_bytes(*b"Genu") && fp16
    }

    /// Where 16 values begin.
    #[inline(always)]
    fn sixteen<T>(x: &[T]) -> *const T {
        x[..16].as_ptr()
    }

    // SAFETY, for all blocks below: a value of the type is only made where the features were detected, and what is loaded
    // or stored was sliced to its length just before.
    impl Lanes for Avx512Bf16 {
        type V = __m512;

        #[inline(always)]
        fn zero(self) -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        fn load(self, units: &[u32]) -> __m512 {
            unsafe { _mm512_loadu_ps(sixteen(units).cast()) }
        }

        #[inline(always)]
        fn store(self, v: __m512, out: &mut [u32]) {
            unsafe { _mm512_storeu_ps(out[..16].as_mut_ptr().cast(), v) }
        }

        #[inline(always)]
        fn splat(self, unit: u32) -> __m512 {
            unsafe { _mm512_set1_ps(f32::from_bits(unit)) }
        }

        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        fn zip(self, a: __m512, b: __m512) -> (__m512, __m512) {
            // Lane numbers from 16 on are b's.
            unsafe {
                let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                let high =
                    _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
                (
                    _mm512_permutex2var_ps(a, low, b),
                    _mm512_permutex2var_ps(a, high, b),
                )
            }
        }

        #[inline(always)]
        fn weave(self, a: __m512, b: __m512) -> (__m512, __m512) {
            // Bits of the first where the mask has them, else of the second.
            const SELECT: i32 = 0b1110_0100;
            unsafe {
                let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
                let mask = _mm512_set1_epi32(0xffff);
                let even = _mm512_ternarylogic_epi32::<SELECT>(a, _mm512_slli_epi32::<16>(b), mask);
                let odd = _mm512_ternarylogic_epi32::<SELECT>(_mm512_srli_epi32::<16>(a), b, mask);
                self.zip(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
            }
        }

        #[inline(always)]
        fn prefetch<T>(self, at: *const T) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        fn run<W: Work<Self>>(self, work: W) {
            #[target_feature(enable = "avx512f,avx512bf16,avx2,fma")]
            fn inside<L: Lanes, W: Work<L>>(l: L, work: W) {
                work.on(l);
            }
            unsafe { inside(self, work) }
        }
        #[inline(always)]
        fn dot(self, sum: __m512, a: __m512, b: __m512) -> __m512 {
            // SAFETY: both are 64 bytes without invalid patterns.
            unsafe {
                let pairs = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
                _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
            }
        }

        #[inline(always)]
        fn units(self, values: &[f32]) -> __m512 {
            let (low, high) = (sixteen(values), sixteen(&values[16..]));
            // SAFETY: as above.
            unsafe { both(_mm512_loadu_ps(low), _mm512_loadu_ps(high)) }
        }

        #[inline(always)]
        fn parts(self, values: &[f32]) -> [__m512; ALL] {
            // SAFETY: as above.
            unsafe {
                let low = left(_mm512_loadu_ps(sixteen(values)));
                let high = left(_mm512_loadu_ps(sixteen(&values[16..])));
                [
                    both(low[0], high[0]),
                    both(low[1], high[1]),
                    both(low[2], high[2]),
                ]
            }
        }
    }

    // Not closures in `parts`: one that is not inlined is compiled without the instructions.

    /// The bfloat16 of each value, as f32.
    #[inline(always)]
    unsafe fn first(v: __m512) -> __m512i {
        unsafe {
            let bits: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))
        }
    }

    /// Values, what is left of them without their first part, nothing if that is not finite, and without the second.
    #[inline(always)]
    unsafe fn left(v: __m512) -> [__m512; ALL] {
        unsafe {
            let (bits, exponent) = (first(v), _mm512_set1_epi32(0x7f80_0000));
            let finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
            let second = _mm512_maskz_sub_ps(finite, v, _mm512_castsi512_ps(bits));
            let third = _mm512_sub_ps(second, _mm512_castsi512_ps(first(second)));
            [v, second, third]
        }
    }

    /// The units of values that are rounded: the upper half first, as the instruction has it.
    #[inline(always)]
    unsafe fn both(low: __m512, high: __m512) -> __m512 {
        unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) }
    }
}
