//! Sixteen floats at a time: what the kernels of this folder are written over, once for every processor, once for AVX2
//! and once for AVX-512.
//!
//! The three have the same functions and give the same bits, so that a kernel over one is tested by the same kernel over
//! another (the plain one rounds a product before it is added unless the target has fused multiply-add).

/// Numbers that the 16 codes of a 4-bit format stand for.
pub(super) type Codes = [f32; 16];

/// How far ahead each of four streams of bytes is asked for.
pub(super) const AHEAD: usize = 1024;

/// How far ahead a single stream of bytes is asked for.
pub(super) const PAGE: usize = 4096;

/// The order of 32 bytes as they are stored.
pub(super) const IN_ORDER: [u8; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = i as u8;
        i += 1;
    }
    order
};

pub(super) mod plain {
    use super::Codes;
    use crate::cpu::simd::madd;

    pub(in super::super) type F = [f32; 16];
    pub(in super::super) type Table = Codes;

    const FMA: bool = cfg!(target_arch = "aarch64");

    /// Asks for what is `bytes` behind `at`, where there is an instruction for that.
    #[inline(always)]
    pub(in super::super) fn ahead<const N: usize>(_at: &[u8; N], _bytes: usize) {}

    #[inline(always)]
    pub(in super::super) fn splat(v: f32) -> F {
        [v; 16]
    }

    #[inline(always)]
    pub(in super::super) fn load(x: &[f32; 16]) -> F {
        *x
    }

    /// a b + c
    #[inline(always)]
    pub(in super::super) fn fma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|l| madd::<FMA>(a[l], b[l], c[l]))
    }

    #[inline(always)]
    pub(in super::super) fn mul(a: F, b: F) -> F {
        std::array::from_fn(|l| a[l] * b[l])
    }

    #[inline(always)]
    pub(in super::super) fn add(a: F, b: F) -> F {
        std::array::from_fn(|l| a[l] + b[l])
    }

    #[inline(always)]
    pub(in super::super) fn store(a: F, out: &mut [f32; 16]) {
        *out = a;
    }

    /// The sum, by halves.
    #[inline(always)]
    pub(in super::super) fn sum(mut a: F) -> f32 {
        for width in [8, 4, 2, 1] {
            for l in 0..width {
                a[l] += a[l + width];
            }
        }
        a[0]
    }

    #[inline(always)]
    pub(in super::super) fn f32s(bytes: &[u8; 64]) -> F {
        let words = bytes.as_chunks::<4>().0;
        std::array::from_fn(|l| f32::from_le_bytes(words[l]))
    }

    #[inline(always)]
    pub(in super::super) fn bf16s(bytes: &[u8; 32]) -> F {
        let words = bytes.as_chunks::<2>().0;
        std::array::from_fn(|l| f32::from_bits(u32::from(u16::from_le_bytes(words[l])) << 16))
    }

    #[inline(always)]
    pub(in super::super) fn f16s(bytes: &[u8; 32]) -> F {
        let words = bytes.as_chunks::<2>().0;
        std::array::from_fn(|l| crate::frozen::f16(words[l]))
    }

    /// A number in half precision, everywhere.
    #[inline(always)]
    pub(in super::super) fn half(bytes: [u8; 2]) -> F {
        splat(crate::frozen::f16(bytes))
    }

    #[inline(always)]
    pub(in super::super) fn signed(bytes: &[u8; 16]) -> F {
        std::array::from_fn(|l| f32::from(bytes[l] as i8))
    }

    /// The low halves of bytes, then their high halves.
    #[inline(always)]
    pub(in super::super) fn nibbles(bytes: &[u8; 16]) -> [F; 2] {
        [
            std::array::from_fn(|l| f32::from(bytes[l] & 15)),
            std::array::from_fn(|l| f32::from(bytes[l] >> 4)),
        ]
    }

    #[inline(always)]
    pub(in super::super) fn table(codes: &Codes) -> Table {
        *codes
    }

    /// What the 32 high halves of bytes stand for, then the 32 low halves, in the level's order of bytes.
    #[inline(always)]
    pub(in super::super) fn look(table: &Table, bytes: &[u8; 32]) -> [F; 4] {
        let value = |n: u8| table[usize::from(n)];
        [
            std::array::from_fn(|l| value(bytes[l] >> 4)),
            std::array::from_fn(|l| value(bytes[l + 16] >> 4)),
            std::array::from_fn(|l| value(bytes[l] & 15)),
            std::array::from_fn(|l| value(bytes[l + 16] & 15)),
        ]
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "vector loads and stores take pointers; each has exactly the array it is given"
)]
pub(super) mod avx2 {
    use std::arch::x86_64::*;

    use super::Codes;

    /// Eight floats, eight floats.
    #[derive(Clone, Copy)]
    pub(in super::super) struct F(__m256, __m256);

    /// The order in which [`look`] takes bytes: unpacking works in each half of a register for itself, and values that are
    /// sorted like that need no shuffle to undo it.
    pub(in super::super) const ORDER: [u8; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            // Four bytes of the first half, four of the second.
            order[i] = (i / 8 * 4 + i / 4 % 2 * 16 + i % 4) as u8;
            i += 1;
        }
        order
    };

    /// Three bytes of a word that a shuffle of bytes leaves zero.
    const EMPTY: i32 = 0x8080_8000_u32 as i32;

    /// The first, second, third and fourth bytes of the table's numbers, each twice.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Table([__m256i; 4]);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn ahead<const N: usize>(at: &[u8; N], bytes: usize) {
        // Nothing is read: an address that is none is passed over.
        _mm_prefetch::<_MM_HINT_T0>(at.as_ptr().wrapping_add(bytes).cast());
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn splat(v: f32) -> F {
        F(_mm256_set1_ps(v), _mm256_set1_ps(v))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn load(x: &[f32; 16]) -> F {
        // SAFETY: two times eight floats of sixteen.
        unsafe {
            F(
                _mm256_loadu_ps(x.as_ptr()),
                _mm256_loadu_ps(x[8..].as_ptr()),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn fma(a: F, b: F, c: F) -> F {
        F(
            _mm256_fmadd_ps(a.0, b.0, c.0),
            _mm256_fmadd_ps(a.1, b.1, c.1),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn mul(a: F, b: F) -> F {
        F(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn add(a: F, b: F) -> F {
        F(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn store(a: F, out: &mut [f32; 16]) {
        // SAFETY: two times eight floats of sixteen.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), a.0);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), a.1);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn sum(a: F) -> f32 {
        let eight = _mm256_add_ps(a.0, a.1);
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sixteen(bytes: &[u8; 16]) -> __m128i {
        // SAFETY: sixteen bytes of sixteen.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sixteens(bytes: &[u8; 32]) -> (__m128i, __m128i) {
        let halves = bytes.as_chunks::<16>().0;
        (sixteen(&halves[0]), sixteen(&halves[1]))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn f32s(bytes: &[u8; 64]) -> F {
        // SAFETY: two times 32 bytes of 64; the loads ask for no alignment.
        unsafe {
            F(
                _mm256_loadu_ps(bytes.as_ptr().cast()),
                _mm256_loadu_ps(bytes[32..].as_ptr().cast()),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn bf16s(bytes: &[u8; 32]) -> F {
        let (a, b) = sixteens(bytes);
        F(
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(a))),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(b))),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn f16s(bytes: &[u8; 32]) -> F {
        let (a, b) = sixteens(bytes);
        F(_mm256_cvtph_ps(a), _mm256_cvtph_ps(b))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn half(bytes: [u8; 2]) -> F {
        // Spread before it is converted, which saves spreading it afterwards.
        let halves = _mm_set1_epi16(i16::from_le_bytes(bytes));
        let all = _mm256_cvtph_ps(halves);
        F(all, all)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn spread(bytes: __m128i) -> F {
        let high = _mm_srli_si128::<8>(bytes);
        F(
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn signed(bytes: &[u8; 16]) -> F {
        spread(sixteen(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn nibbles(bytes: &[u8; 16]) -> [F; 2] {
        // Each half of the register picks four of the bytes and spreads them to words.
        let bytes = _mm256_broadcastsi128_si256(sixteen(bytes));
        let spread = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let pick = |first: i32| {
            let from = _mm256_add_epi32(spread, _mm256_set1_epi32(first));
            _mm256_shuffle_epi8(bytes, _mm256_or_si256(from, _mm256_set1_epi32(EMPTY)))
        };
        let (a, b, four) = (pick(0), pick(8), _mm256_set1_epi32(15));
        let low = |w| _mm256_cvtepi32_ps(_mm256_and_si256(w, four));
        let high = |w| _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(w));
        [F(low(a), low(b)), F(high(a), high(b))]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn table(codes: &Codes) -> Table {
        Table(std::array::from_fn(|plane| {
            let bytes: [u8; 16] = std::array::from_fn(|i| codes[i].to_le_bytes()[plane]);
            // SAFETY: sixteen bytes of sixteen.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
        }))
    }

    /// Look-ups by byte, 32 at a time, in [`ORDER`], put together to floats: three shuffles for eight values, where looking
    /// up floats takes two halves of a table, a choice between them and the codes spread to words.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn look(table: &Table, bytes: &[u8; 32]) -> [F; 4] {
        // SAFETY: 32 bytes of 32.
        let bytes = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
        let four = _mm256_set1_epi8(15);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), four);
        let low = _mm256_and_si256(bytes, four);
        let [a, b] = found(table, high);
        let [c, d] = found(table, low);
        [a, b, c, d]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn found(table: &Table, codes: __m256i) -> [F; 2] {
        let plane = |i: usize| _mm256_shuffle_epi8(table.0[i], codes);
        let (p0, p1, p2, p3) = (plane(0), plane(1), plane(2), plane(3));
        let (low, high) = (_mm256_unpacklo_epi8(p0, p1), _mm256_unpacklo_epi8(p2, p3));
        let first = F(
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high)),
        );
        let (low, high) = (_mm256_unpackhi_epi8(p0, p1), _mm256_unpackhi_epi8(p2, p3));
        let second = F(
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high)),
        );
        [first, second]
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "vector loads and stores take pointers; each has exactly the array it is given"
)]
pub(super) mod avx512 {
    use std::arch::x86_64::*;

    use super::Codes;

    pub(in super::super) type F = __m512;
    pub(in super::super) type Table = __m512;

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn ahead<const N: usize>(at: &[u8; N], bytes: usize) {
        // Nothing is read: an address that is none is passed over.
        _mm_prefetch::<_MM_HINT_T0>(at.as_ptr().wrapping_add(bytes).cast());
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn splat(v: f32) -> F {
        _mm512_set1_ps(v)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn load(x: &[f32; 16]) -> F {
        // SAFETY: sixteen floats of sixteen.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn fma(a: F, b: F, c: F) -> F {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn mul(a: F, b: F) -> F {
        _mm512_mul_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn add(a: F, b: F) -> F {
        _mm512_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn store(a: F, out: &mut [f32; 16]) {
        // SAFETY: sixteen floats of sixteen.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), a) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn sum(a: F) -> f32 {
        let swapped = _mm512_shuffle_f32x4::<0b01_00_11_10>(a, a);
        let eight = _mm512_castps512_ps256(_mm512_add_ps(a, swapped));
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    fn sixteen(bytes: &[u8; 16]) -> __m128i {
        // SAFETY: sixteen bytes of sixteen.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    fn thirty_two(bytes: &[u8; 32]) -> __m256i {
        // SAFETY: 32 bytes of 32.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn f32s(bytes: &[u8; 64]) -> F {
        // SAFETY: 64 bytes of 64; the load asks for no alignment.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn bf16s(bytes: &[u8; 32]) -> F {
        let words = _mm512_cvtepu16_epi32(thirty_two(bytes));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn f16s(bytes: &[u8; 32]) -> F {
        _mm512_cvtph_ps(thirty_two(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn half(bytes: [u8; 2]) -> F {
        // Converted before it is spread: the conversion of sixteen is several operations.
        let mut half = _mm_cvtsi32_si128(i32::from(u16::from_le_bytes(bytes)));
        // Hides that the other lanes are not needed: the compiler would put the half into any register, and have it wait for
        // the sum that is there.
        // SAFETY: there is no instruction.
        unsafe {
            std::arch::asm!("/* {} */", inout(xmm_reg) half, options(pure, nomem, nostack, preserves_flags));
        }
        splat(_mm_cvtss_f32(_mm_cvtph_ps(half)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn signed(bytes: &[u8; 16]) -> F {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(bytes)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn nibbles(bytes: &[u8; 16]) -> [F; 2] {
        let words = _mm512_cvtepu8_epi32(sixteen(bytes));
        let low = _mm512_and_si512(words, _mm512_set1_epi32(15));
        [
            _mm512_cvtepi32_ps(low),
            _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(words)),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn table(codes: &Codes) -> Table {
        load(codes)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(in super::super) fn look(table: &Table, bytes: &[u8; 32]) -> [F; 4] {
        let halves = bytes.as_chunks::<16>().0;
        let a = _mm512_cvtepu8_epi32(sixteen(&halves[0]));
        let b = _mm512_cvtepu8_epi32(sixteen(&halves[1]));
        // A look-up takes the low four bits of its index.
        [
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(a), *table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(b), *table),
            _mm512_permutexvar_ps(a, *table),
            _mm512_permutexvar_ps(b, *table),
        ]
    }
}
