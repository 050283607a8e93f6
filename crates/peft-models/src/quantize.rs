//! Quantising a model while it loads: the linear layers of its blocks, one tensor at a time.

use std::str::FromStr;

use peft_core::{Error, ModuleInfo, ModuleKind, Result};
use peft_tensor::bnb::double_quantized;
use peft_tensor::{FrozenWeight, WeightFormat};

/// Format that the linear layers of the blocks are brought into while a model loads. Embeddings, the output layer, heads,
/// norms and biases stay as they are stored, as in `transformers`' preparation of a quantised model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantize {
    /// How weights are kept.
    pub format: WeightFormat,
    /// Whether NF4's scales are brought into 8 bits and back (QLoRA's double quantisation).
    pub double: bool,
}

impl Quantize {
    /// The names there are.
    pub const NAMES: [&str; 8] = [
        "nf4",
        "nf4_single",
        "int8",
        "q8_0",
        "q5_1",
        "q5_0",
        "q4_1",
        "q4_0",
    ];

    /// QLoRA's: NF4, doubly quantised.
    pub const NF4: Self = Self {
        format: WeightFormat::NF4,
        double: true,
    };

    /// Whether it applies to a module.
    pub fn covers(module: &ModuleInfo) -> bool {
        matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv1d) && module.layer.is_some()
    }

    /// A weight of floats in this format, `[out, in]` also where it is stored `transposed`; the pages it was mapped from
    /// are given back.
    ///
    /// # Errors
    /// If the weight is quantised already, holds what is not a number, or has rows that are not whole blocks.
    pub fn apply(self, weight: &FrozenWeight, transposed: bool) -> Result<FrozenWeight> {
        if !is_float(weight.format()) {
            return Err(Error::config(
                "quantize",
                format!(
                    "the weight is stored as {} already; leave `quantize` out",
                    weight.format().name()
                ),
            ));
        }
        let mut values = weight.to_f32();
        let (mut rows, mut cols) = (weight.rows(), weight.cols());
        if transposed {
            values = (0..rows * cols)
                .map(|i| values[i % rows * cols + i / rows])
                .collect();
            (rows, cols) = (cols, rows);
        }
        weight.bytes().release();
        let made = FrozenWeight::quantize(rows, cols, &values, self.format)?;
        if self.double {
            return Ok(double_quantized(&made)?.0);
        }
        Ok(made)
    }
}

/// Whether values are stored as floats, one by one.
pub(crate) fn is_float(format: WeightFormat) -> bool {
    matches!(
        format,
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16
    )
}

impl FromStr for Quantize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let name = text.to_ascii_lowercase();
        let unknown = || {
            let detail = format!("{text:?} is not one of {}", Self::NAMES.join(", "));
            Error::config("quantize", detail)
        };
        if !Self::NAMES.contains(&name.as_str()) {
            return Err(unknown());
        }
        let plain = name.trim_end_matches("_single");
        let format = WeightFormat::all()
            .iter()
            .find(|f| f.name().eq_ignore_ascii_case(plain))
            .ok_or_else(unknown)?;
        Ok(Self {
            format: *format,
            double: name == "nf4",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_others_refused() {
        for name in Quantize::NAMES {
            let made: Quantize = name.parse().unwrap();
            assert!(made.format.can_encode() && !is_float(made.format), "{name}");
            assert_eq!(made.double, name == "nf4");
        }
        let text = "int4".parse::<Quantize>().unwrap_err().to_string();
        assert!(text.contains("nf4, nf4_single, int8, q8_0"), "{text}");
        assert!("f32".parse::<Quantize>().is_err());
    }

    /// [[1, 2, 3], [4, 5, 6]] stored transposed: rows (1, 4), (2, 5), (3, 6) with largest 4, 5, 6.
    #[test]
    fn transposed_weights_are_turned() {
        let stored = FrozenWeight::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let int8: Quantize = "int8".parse().unwrap();
        let made = int8.apply(&stored, true).unwrap();
        assert_eq!((made.rows(), made.cols()), (3, 2));
        let back = made.to_f32();
        for (got, want) in back.iter().zip([1.0, 4.0, 2.0, 5.0, 3.0, 6.0]) {
            // Half a step of a row's largest through 127.
            assert!((got - want).abs() <= 3.0 / 127.0, "{back:?}");
        }
        let text = int8.apply(&made, false).unwrap_err().to_string();
        assert!(text.contains("INT8 already"), "{text}");
    }
}
