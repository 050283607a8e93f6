//! Decoding blocks of 4-bit codes: a loop for every processor, and the same with table look-ups in a vector register,
//! which compilers do not find by themselves.

use super::{BLOCK, BYTES, scale};

/// Whole blocks, value by value.
#[inline(always)]
pub(super) fn blocks(table: &[f32; 16], src: &[u8], out: &mut [f32]) {
    for (block, y) in src
        .as_chunks::<BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<BLOCK>().0)
    {
        let scale = scale(block);
        for (byte, pair) in block[4..].iter().zip(y.as_chunks_mut::<2>().0) {
            pair[0] = table[usize::from(byte >> 4)] * scale;
            pair[1] = table[usize::from(byte & 15)] * scale;
        }
    }
}

/// Whole blocks with the widest vectors the processor has; false where there is no such code for it.
pub(super) fn vectors(table: &[f32; 16], src: &[u8], out: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") {
            // SAFETY: the function needs AVX-512F, and the processor was just asked for it.
            #[allow(unsafe_code, reason = "calling a function compiled for AVX-512")]
            unsafe {
                x86::avx512(table, src, out);
            }
            return true;
        }
        if has!("avx2") {
            // SAFETY: the function needs AVX2, and the processor was just asked for it.
            #[allow(unsafe_code, reason = "calling a function compiled for AVX2")]
            unsafe {
                x86::avx2(table, src, out);
            }
            return true;
        }
    }
    let _ = (table, src, out);
    false
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::super::{BLOCK, BYTES, scale};

    /// The 16 codes of 8 bytes, in order, a byte each.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn codes(bytes: &[u8; 8]) -> __m128i {
        let packed = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes));
        let four = _mm_set1_epi8(15);
        let first = _mm_and_si128(_mm_srli_epi16::<4>(packed), four);
        let second = _mm_and_si128(packed, four);
        _mm_unpacklo_epi8(first, second)
    }

    /// The table is one register, a look-up one instruction for 16 values.
    #[target_feature(enable = "avx512f")]
    pub(in super::super) fn avx512(table: &[f32; 16], src: &[u8], out: &mut [f32]) {
        // SAFETY: 16 floats are read from an array of 16.
        #[allow(unsafe_code, reason = "vector loads take pointers")]
        let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
        let blocks = src.as_chunks::<BYTES>().0;
        for (block, y) in blocks.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
            let scale = _mm512_set1_ps(scale(block));
            let quarters = block[4..].as_chunks::<8>().0;
            for (bytes, y) in quarters.iter().zip(y.as_chunks_mut::<16>().0) {
                let at = _mm512_cvtepu8_epi32(codes(bytes));
                let values = _mm512_mul_ps(_mm512_permutexvar_ps(at, table), scale);
                // SAFETY: 16 floats are written to an array of 16.
                #[allow(unsafe_code, reason = "vector stores take pointers")]
                unsafe {
                    _mm512_storeu_ps(y.as_mut_ptr(), values);
                }
            }
        }
    }

    /// The table is two registers; a code's fourth bit chooses between their look-ups.
    #[target_feature(enable = "avx2")]
    pub(in super::super) fn avx2(table: &[f32; 16], src: &[u8], out: &mut [f32]) {
        // SAFETY: 8 floats are read from each half of an array of 16.
        #[allow(unsafe_code, reason = "vector loads take pointers")]
        let (low, high) = unsafe {
            (
                _mm256_loadu_ps(table.as_ptr()),
                _mm256_loadu_ps(table[8..].as_ptr()),
            )
        };
        let blocks = src.as_chunks::<BYTES>().0;
        for (block, y) in blocks.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
            let scale = _mm256_set1_ps(scale(block));
            let quarters = block[4..].as_chunks::<8>().0;
            for (bytes, y) in quarters.iter().zip(y.as_chunks_mut::<16>().0) {
                let codes = codes(bytes);
                let halves = [codes, _mm_srli_si128::<8>(codes)];
                for (codes, y) in halves.into_iter().zip(y.as_chunks_mut::<8>().0) {
                    let at = _mm256_cvtepu8_epi32(codes);
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(at));
                    let values = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(low, at),
                        _mm256_permutevar8x32_ps(high, at),
                        upper,
                    );
                    // SAFETY: 8 floats are written to an array of 8.
                    #[allow(unsafe_code, reason = "vector stores take pointers")]
                    unsafe {
                        _mm256_storeu_ps(y.as_mut_ptr(), _mm256_mul_ps(values, scale));
                    }
                }
            }
        }
    }
}
