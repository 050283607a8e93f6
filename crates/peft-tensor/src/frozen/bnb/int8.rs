//! LLM.int8's weights: a row of signed bytes with the row's largest magnitude in front.

use crate::frozen::{BlockFormat, Layout};

/// What bitsandbytes multiplies by instead of dividing by 127.
const PART: f32 = 7.874_016e-3;

/// Bytes in front of a row's codes.
pub(crate) const INT8_HEAD: usize = 4;

/// What one step of a row's codes stands for.
pub(crate) fn int8_step(row: &[u8]) -> f32 {
    row.first_chunk()
        .map_or(0.0, |scale| f32::from_le_bytes(*scale) * PART)
}

/// A row: f32 scale, a signed byte a value: `q * scale / 127`.
pub(in crate::frozen) struct Int8;

impl BlockFormat for Int8 {
    const NAME: &'static str = "INT8";
    const LEN: usize = 1;
    const BYTES: usize = 1;
    const LAYOUT: Layout = Layout::Headed(INT8_HEAD);

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        let Some((scale, codes)) = src.split_first_chunk::<4>() else {
            return;
        };
        let scale = f32::from_le_bytes(*scale);
        for (y, q) in out.iter_mut().zip(codes) {
            *y = f32::from(*q as i8) * scale * PART;
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        let scale = values.iter().fold(0.0, |a: f32, v| a.max(v.abs()));
        let factor = if scale == 0.0 { 0.0 } else { 127.0 / scale };
        out.extend(scale.to_le_bytes());
        out.extend(
            values
                .iter()
                .map(|v| (v * factor).round_ties_even() as i8 as u8),
        );
        true
    }
}
