//! Frozen weights: matrices kept in the format their checkpoint stores them in.
//!
//! A format is a run of blocks, each of a fixed number of values in a fixed number of bytes. One format is
//! one `impl BlockFormat` in a file of its group ([`dense`], [`legacy`], [`kquant`], [`bnb`]) and one line of the
//! table below; nothing else in the workspace lists them.

pub mod bnb;
mod dense;
mod kquant;
mod legacy;
mod weight;

use crate::error::{Result, TensorError};

pub use weight::FrozenWeight;

/// How the blocks of a format lie in a matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Layout {
    /// Every row is whole blocks.
    Rows,
    /// One run of blocks through all rows, the last of them filled up.
    Flat,
    /// Every row is this many bytes of its own in front of its blocks.
    Headed(usize),
}

/// What a storage format has to say about itself.
trait BlockFormat {
    /// Name as GGUF and safetensors print it.
    const NAME: &'static str;
    /// Values in a block.
    const LEN: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// How blocks lie in a matrix.
    const LAYOUT: Layout = Layout::Rows;
    /// Decodes whole blocks; `src` and `out` hold the same number of them. Where rows have bytes in front, one row.
    fn decode(src: &[u8], out: &mut [f32]);
    /// The same with instructions chosen by hand, to the same bits; false where the format or the processor has none.
    fn decode_by_hand(_src: &[u8], _out: &mut [f32]) -> bool {
        false
    }
    /// Appends the blocks of `values`: a whole number of them, one row where rows have bytes in front, or all values of
    /// the matrix where blocks run through it; false where the format has no encoder.
    fn encode(_values: &[f32], _out: &mut Vec<u8>) -> bool {
        false
    }
}

macro_rules! formats {
    ($($(#[$doc:meta])* $name:ident = $format:ty,)*) => {
        /// How the values of a frozen weight are stored, little-endian. The layouts of `Q` formats are ggml's; those of
        /// NF4, FP4 and INT8 hold bitsandbytes' numbers.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum WeightFormat { $($(#[$doc])* $name,)* }

        impl WeightFormat {
            /// Every format there is.
            pub fn all() -> &'static [WeightFormat] {
                &[$(WeightFormat::$name,)*]
            }

            /// The name GGUF and safetensors print: `F32`, `BF16`, `Q4_0`, `Q6_K`, ...
            pub fn name(self) -> &'static str {
                match self { $(WeightFormat::$name => <$format>::NAME,)* }
            }

            /// Values in a block: 1 for the plain floats and INT8, 32, 64 or 256 for the other quantised formats.
            pub fn block_len(self) -> usize {
                match self { $(WeightFormat::$name => <$format>::LEN,)* }
            }

            /// Bytes of a block.
            pub fn block_bytes(self) -> usize {
                match self { $(WeightFormat::$name => <$format>::BYTES,)* }
            }

            fn layout(self) -> Layout {
                match self { $(WeightFormat::$name => <$format>::LAYOUT,)* }
            }
        }

        #[inline(always)]
        fn decode_with_target(format: WeightFormat, src: &[u8], out: &mut [f32]) {
            match format { $(WeightFormat::$name => <$format>::decode(src, out),)* }
        }

        fn decode_by_hand(format: WeightFormat, src: &[u8], out: &mut [f32]) -> bool {
            match format { $(WeightFormat::$name => <$format>::decode_by_hand(src, out),)* }
        }

        fn encode_into(format: WeightFormat, values: &[f32], out: &mut Vec<u8>) -> bool {
            match format { $(WeightFormat::$name => <$format>::encode(values, out),)* }
        }
    };
}

formats! {
    /// IEEE single precision.
    F32 = dense::F32,
    /// IEEE half precision.
    F16 = dense::F16,
    /// The high half of a single.
    BF16 = dense::BF16,
    /// 32 values: f16 scale, 4-bit values around 8.
    Q4_0 = legacy::Q4_0,
    /// 32 values: f16 scale and minimum, 4-bit values.
    Q4_1 = legacy::Q4_1,
    /// 32 values: f16 scale, 5-bit values around 16.
    Q5_0 = legacy::Q5_0,
    /// 32 values: f16 scale and minimum, 5-bit values.
    Q5_1 = legacy::Q5_1,
    /// 32 values: f16 scale, signed bytes.
    Q8_0 = legacy::Q8_0,
    /// 256 values: 2 bits, sixteen 4-bit scales and minima, f16 scales of both.
    Q2K = kquant::Q2K,
    /// 256 values: 3 bits, sixteen 6-bit scales, f16 scale of them.
    Q3K = kquant::Q3K,
    /// 256 values: 4 bits, eight 6-bit scales and minima, f16 scales of both.
    Q4K = kquant::Q4K,
    /// 256 values: 5 bits, eight 6-bit scales and minima, f16 scales of both.
    Q5K = kquant::Q5K,
    /// 256 values: 6 bits, sixteen 8-bit scales, f16 scale of them.
    Q6K = kquant::Q6K,
    /// bitsandbytes' 4-bit codes of a normal distribution, 64 values of the flat matrix: f32 scale, two codes a byte with
    /// the first in the high half.
    NF4 = bnb::Nf4,
    /// As NF4, codes of a 4-bit float.
    FP4 = bnb::Fp4,
    /// LLM.int8's rows: f32 scale, a signed byte a value.
    INT8 = bnb::Int8,
}

impl WeightFormat {
    /// Bytes of a row of `cols` values.
    ///
    /// # Errors
    /// Where `cols` is not a whole number of blocks, or the row has more bytes than memory addresses.
    pub fn row_bytes(self, cols: usize) -> Result<usize> {
        let (len, bytes) = (self.block_len(), self.block_bytes());
        if !cols.is_multiple_of(len) {
            return Err(TensorError::Format(format!(
                "{} stores rows in blocks of {len} values; {cols} columns are not a multiple of that",
                self.name()
            )));
        }
        let head = match self.layout() {
            Layout::Headed(head) => head,
            Layout::Rows | Layout::Flat => 0,
        };
        (cols / len)
            .checked_mul(bytes)
            .and_then(|n| n.checked_add(head))
            .ok_or_else(|| {
                TensorError::Format(format!(
                    "a row of {cols} columns in {} is too large",
                    self.name()
                ))
            })
    }

    /// Bytes of a matrix.
    ///
    /// # Errors
    /// As [`row_bytes`](Self::row_bytes), but where blocks run through the matrix a row need not be whole ones.
    pub fn matrix_bytes(self, rows: usize, cols: usize) -> Result<usize> {
        let bytes = match self.layout() {
            Layout::Flat => rows
                .checked_mul(cols)
                .and_then(|n| n.div_ceil(self.block_len()).checked_mul(self.block_bytes())),
            Layout::Rows | Layout::Headed(_) => rows.checked_mul(self.row_bytes(cols)?),
        };
        bytes.ok_or_else(|| TensorError::Format(format!("a {rows} x {cols} matrix is too large")))
    }

    /// Whether values can be stored in it, not only read.
    pub fn can_encode(self) -> bool {
        encode_into(self, &[], &mut Vec::new())
    }
}

/// Stores `values`, rows of `cols`, in `format`.
///
/// `F32`, `F16` and `BF16` round to nearest even, as a merged checkpoint needs (a magnitude above the
/// format's largest becomes infinite). `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1` and `Q8_0` use ggml's reference
/// quantisers, `NF4` and `INT8` bitsandbytes', bit for bit on finite values.
///
/// # Errors
/// Where the values are not whole rows, a row is not whole blocks, or the format (a K-quant) has no encoder.
pub fn encode(format: WeightFormat, values: &[f32], cols: usize) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    encode_onto(format, values, cols, &mut out)?;
    Ok(out)
}

/// As [`encode`], behind what `out` holds: a buffer that is used again.
///
/// # Errors
/// As there.
pub fn encode_onto(
    format: WeightFormat,
    values: &[f32],
    cols: usize,
    out: &mut Vec<u8>,
) -> Result<()> {
    let whole = if cols == 0 {
        values.is_empty()
    } else {
        values.len().is_multiple_of(cols)
    };
    if !whole {
        return Err(TensorError::Format(format!(
            "{} values are not rows of {cols} columns",
            values.len()
        )));
    }
    let rows = values.len().checked_div(cols).unwrap_or(0);
    out.reserve(format.matrix_bytes(rows, cols)?);
    let encoded = match format.layout() {
        Layout::Headed(_) if cols > 0 => {
            values.chunks(cols).all(|row| encode_into(format, row, out))
        }
        _ => encode_into(format, values, out),
    };
    if encoded {
        Ok(())
    } else {
        Err(TensorError::Unsupported(format!(
            "{} can be read but not written; formats that can be written: {}",
            format.name(),
            writable().join(", ")
        )))
    }
}

fn writable() -> Vec<&'static str> {
    WeightFormat::all()
        .iter()
        .filter(|f| f.can_encode())
        .map(|f| f.name())
        .collect()
}

/// Decodes whole blocks (one row, where rows have bytes in front) with the widest vectors the processor has. The loops
/// are the same ones compiled again; without fused multiply-add there is one result for all of them.
fn decode(format: WeightFormat, src: &[u8], out: &mut [f32]) {
    if decode_by_hand(format, src, out) {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the function needs AVX2 and nothing else, and the processor was just asked for it.
        #[allow(unsafe_code, reason = "calling a function compiled for AVX2")]
        return unsafe { decode_avx2(format, src, out) };
    }
    decode_with_target(format, src, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn decode_avx2(format: WeightFormat, src: &[u8], out: &mut [f32]) {
    decode_with_target(format, src, out);
}

/// The f16 in two bytes as f32. Written out so that loops over it become vector code on every processor, where the
/// library's conversion asks for F16C value by value; no step meets a subnormal operand, which would be slow.
#[inline(always)]
pub(crate) fn f16(bytes: [u8; 2]) -> f32 {
    const BIAS: u32 = (127 - 15) << 23;
    const SMALLEST: u32 = BIAS + (1 << 23);
    let h = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (h & 0x7fff) << 13;
    // A subnormal is its mantissa above the smallest exponent, less the one that a normal number implies there.
    let subnormal = (f32::from_bits(magnitude + SMALLEST) - f32::from_bits(SMALLEST)).to_bits();
    let finite = if magnitude < 1 << 23 {
        subnormal
    } else {
        magnitude + BIAS
    };
    let bits = if magnitude >= 0x1f << 23 {
        magnitude | 0x7f80_0000
    } else {
        finite
    };
    f32::from_bits(bits | (h & 0x8000) << 16)
}

#[cfg(test)]
mod tests;
