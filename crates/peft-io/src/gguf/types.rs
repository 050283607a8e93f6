//! ggml's tensor types: number in the file, name, and how many values share a block of how many bytes.
//! Source: `ggml.h` (`enum ggml_type`) and `ggml-common.h` (block structs) of
//! <https://github.com/ggml-org/ggml>.

use peft_tensor::WeightFormat;
use safetensors::Dtype;

use crate::StoredFormat;

/// One row of ggml's table.
pub(crate) struct GgmlType {
    pub(crate) id: u32,
    pub(crate) block_len: usize,
    pub(crate) block_bytes: usize,
    pub(crate) format: StoredFormat,
}

const fn weight(id: u32, block_len: usize, block_bytes: usize, format: WeightFormat) -> GgmlType {
    GgmlType {
        id,
        block_len,
        block_bytes,
        format: StoredFormat::Weight(format),
    }
}

const fn plain(id: u32, bytes: usize, dtype: Dtype) -> GgmlType {
    GgmlType {
        id,
        block_len: 1,
        block_bytes: bytes,
        format: StoredFormat::Plain(dtype),
    }
}

const fn other(id: u32, block_len: usize, block_bytes: usize, name: &'static str) -> GgmlType {
    GgmlType {
        id,
        block_len,
        block_bytes,
        format: StoredFormat::Ggml(name),
    }
}

/// Every type whose block size is known, so that a file holding it can at least be inspected.
pub(crate) const GGML_TYPES: &[GgmlType] = &[
    weight(0, 1, 4, WeightFormat::F32),
    weight(1, 1, 2, WeightFormat::F16),
    weight(2, 32, 18, WeightFormat::Q4_0),
    weight(3, 32, 20, WeightFormat::Q4_1),
    weight(6, 32, 22, WeightFormat::Q5_0),
    weight(7, 32, 24, WeightFormat::Q5_1),
    weight(8, 32, 34, WeightFormat::Q8_0),
    other(9, 32, 36, "Q8_1"),
    weight(10, 256, 84, WeightFormat::Q2K),
    weight(11, 256, 110, WeightFormat::Q3K),
    weight(12, 256, 144, WeightFormat::Q4K),
    weight(13, 256, 176, WeightFormat::Q5K),
    weight(14, 256, 210, WeightFormat::Q6K),
    other(15, 256, 292, "Q8_K"),
    other(16, 256, 66, "IQ2_XXS"),
    other(17, 256, 74, "IQ2_XS"),
    other(18, 256, 98, "IQ3_XXS"),
    other(19, 256, 50, "IQ1_S"),
    other(20, 32, 18, "IQ4_NL"),
    other(21, 256, 110, "IQ3_S"),
    other(22, 256, 82, "IQ2_S"),
    other(23, 256, 136, "IQ4_XS"),
    plain(24, 1, Dtype::I8),
    plain(25, 2, Dtype::I16),
    plain(26, 4, Dtype::I32),
    plain(27, 8, Dtype::I64),
    plain(28, 8, Dtype::F64),
    other(29, 256, 56, "IQ1_M"),
    weight(30, 1, 2, WeightFormat::BF16),
    other(34, 256, 54, "TQ1_0"),
    other(35, 256, 66, "TQ2_0"),
    other(39, 32, 17, "MXFP4"),
];

/// The type numbered `id`, if it is known.
pub(crate) fn ggml_type(id: u32) -> Option<&'static GgmlType> {
    GGML_TYPES.iter().find(|t| t.id == id)
}

/// The number of a weight format.
pub(crate) fn ggml_id(format: WeightFormat) -> Option<u32> {
    GGML_TYPES
        .iter()
        .find(|t| t.format == StoredFormat::Weight(format))
        .map(|t| t.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table and the decoders must agree, or a tensor would be cut at the wrong byte.
    #[test]
    fn block_sizes_agree_with_the_decoders() {
        for &format in WeightFormat::all() {
            let Some(row) = ggml_id(format).and_then(ggml_type) else {
                continue;
            };
            assert_eq!(row.block_len, format.block_len(), "{}", format.name());
            assert_eq!(row.block_bytes, format.block_bytes(), "{}", format.name());
        }
        for format in [
            WeightFormat::F32,
            WeightFormat::BF16,
            WeightFormat::Q4_1,
            WeightFormat::Q6K,
        ] {
            assert!(ggml_id(format).is_some(), "{}", format.name());
        }
    }
}
