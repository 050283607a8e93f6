//! Numbers in blocks of 8 bits: "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), with the code tables
//! and the block size of bitsandbytes. A block of 256 values keeps its largest magnitude in f32; each value is a byte,
//! an index into a table of 256 numbers whose steps grow tenfold seven times between 0 and 1.

use std::sync::LazyLock;

/// Values that share a scale.
pub(super) const BLOCK: usize = 256;

/// Powers of ten of a table, 10^-6 to 1.
const DECADES: u32 = 7;

/// A table in ascending order, with the borders between what rounds to one entry and to the next.
pub(super) struct Table {
    values: [f32; 256],
    borders: [f32; 255],
}

/// For values of either sign: the mean of the gradient.
pub(super) static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));
/// For values of at least 0, with twice the steps: the mean of its square.
pub(super) static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

impl Table {
    /// `bitsandbytes.functional.create_dynamic_map(signed)`: the decade of 10^(i - 6) has the middles of 2^i equal steps
    /// (twice as many without a sign) from a tenth of it to the whole; 0 and 1 complete the 256.
    fn new(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let steps = 1u32 << (decade + u32::from(!signed));
            let power = 10f64.powi(decade as i32 - (DECADES as i32 - 1));
            for step in 0..steps {
                let middle = 0.1 + 0.9 * (f64::from(step) + 0.5) / f64::from(steps);
                values.push((power * middle) as f32);
                if signed {
                    values.push((-power * middle) as f32);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        Self {
            borders: std::array::from_fn(|i| f32::midpoint(values[i], values[i + 1])),
            values: std::array::from_fn(|i| values[i]),
        }
    }

    /// The number a byte stands for.
    #[cfg(test)]
    pub(super) fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The byte of the entry next to `x`: eight halvings without a branch.
    #[inline]
    fn code(&self, x: f32) -> u8 {
        let mut at = 0;
        for half in [128, 64, 32, 16, 8, 4, 2, 1] {
            if x > self.borders[at + half - 1] {
                at += half;
            }
        }
        at as u8
    }

    /// A block's values.
    #[inline]
    pub(super) fn decode(&self, codes: &[u8], scale: f32, out: &mut [f32]) {
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = self.values[usize::from(code)] * scale;
        }
    }

    /// The inverse: writes the bytes and returns the scale.
    #[inline]
    pub(super) fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let scale = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            // A scale too small for its inverse to be finite: everything is as good as 0.
            let x = value * inverse;
            *code = self.code(if x.is_finite() { x } else { 0.0 });
        }
        scale
    }
}
