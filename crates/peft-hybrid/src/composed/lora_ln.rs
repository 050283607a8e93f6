//! LoRA plus LN tuning: low-rank updates of the matrices, the norms trained along.
//!
//! # Paper
//! LoRA: arXiv 2106.09685; LN tuning beside other methods: Parameter-Efficient Tuning on Layer Normalization for
//! Pre-trained Language Models, arXiv 2211.08682, section 4.4 (the unified framework).
//!
//! # Formula
//! `y = W x + s B A x` at linear layers; norms `y = g' n(x) + b'` with g', b' trained from the model's own.
//!
//! # Saved keys
//! Member i's keys behind `members.<i>.`.
//!
//! # Defaults and their source
//! LoRA of rank 8, alpha 16 on all linear layers, and every norm of the model: the pairing survey articles recommend.
//! An entry of `members` without a `peft_type` changes single fields of the default in its place: `members = [{r = 4},
//! {}]`. A learning rate of 2e-4 to 1e-3 suits it.
//!
//! # Differences from HF
//! HF's LoRA reaches the same with `modules_to_save`, which copies whole modules.
//!
//! # Limits
//! None of its own.

use peft_core::{Injector, PeftMethod, Result, register};
use serde::{Deserialize, Serialize};

use crate::members::{Members, composition};

/// LoRA plus LN tuning's fields of `adapter_config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub struct LoraLn {
    /// The low-rank updates and the norms.
    pub members: Members,
}

fn defaults() -> Members {
    Members::parse(include_str!("lora_ln.json"))
}

impl Default for LoraLn {
    fn default() -> Self {
        Self {
            members: defaults(),
        }
    }
}

register!(
    LoraLn,
    id = "lora_ln",
    title = "LoRA + LN tuning",
    family = Hybrid,
    subfamily = "composed",
    peft_type = "LORA_LN",
    paper = "arXiv 2211.08682",
    example = r#"{"members": [{"r": 2, "target_modules": ["q_proj", "v_proj"]}, {}]}"#,
);

impl PeftMethod for LoraLn {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.members.inject(&self.members.over(&defaults())?, cx)
    }

    composition!(defaults());
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::serde_json::Value;

    #[test]
    fn the_defaults_are_two_methods() {
        let all = defaults();
        let types: Vec<_> = all
            .configs
            .iter()
            .filter_map(|c| c["peft_type"].as_str())
            .collect();
        assert_eq!(types.len(), 2);
        let given = Members::parse(r#"[{"r": 4}]"#);
        let filled = given.over(&all).expect("fills");
        assert_eq!(
            (&filled[0]["r"], &filled[0]["lora_alpha"]),
            (&Value::from(4), &Value::from(16))
        );
    }
}
