//! Union: several methods on one model from one configuration.
//!
//! # Paper
//! Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 4.5 (combining methods
//! that act at different places).
//!
//! # Formula
//! Every member acts where its own configuration says; where several meet, later ones wrap earlier ones.
//!
//! # Saved keys
//! Member i's keys behind `members.<i>.`.
//!
//! # Defaults and their source
//! Each member's own.
//!
//! # Differences from HF
//! HF's mixed models cannot be saved; this is one folder like any other. AdapterHub's `ConfigUnion` folders are read and
//! written.
//!
//! # Limits
//! `peft merge` takes the members that can be merged, and with `--rest FOLDER` writes the others there as a smaller union
//! for the merged model; without, all have to. A member that acts around one that stays, on one module, stays too.

use peft_core::hub::Hub;
use peft_core::serde_json::json;
use peft_core::{Injector, PeftMethod, Result, register};
use serde::{Deserialize, Serialize};

use crate::members::{self, Members, composition};

/// A union's fields of `adapter_config.json`.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Union {
    /// Configurations of the members, each with its `peft_type`.
    pub members: Members,
}

register!(
    Union,
    id = "union",
    title = "Union",
    family = Hybrid,
    subfamily = "composed",
    peft_type = "UNION",
    paper = "arXiv 2110.04366",
    example = r#"{"members": [
        {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]},
        {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}
    ]}"#,
    hub = Hub {
        claims: |config| config["architecture"] == "union" && !crate::all_gated(config),
        owns: |_, _| false,
        read: |config, tensors| {
            let (members, tensors) = members::from_hub(&config["configs"], tensors)?;
            Ok((json!({"members": members}), tensors))
        },
        write: |model, config, tensors| members::to_hub(
            model,
            &members::listed(config, &Members::default())?,
            tensors
        ),
    },
);

impl PeftMethod for Union {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.members
            .inject(&self.members.over(&Members::default())?, cx)
    }

    composition!(Members::default());
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;
    use peft_core::{Base, Network};

    #[test]
    fn a_union_of_none_is_refused() {
        let mut network = Network::new(Base::custom().junction("layers.0.output_adapters", 2));
        let error = network
            .attach("a", &json!({"peft_type": "UNION"}), 0)
            .expect_err("refused");
        assert!(error.to_string().contains("members"), "{error}");
    }

    #[test]
    fn an_unknown_member_is_named() {
        let mut network = Network::new(Base::custom().junction("layers.0.output_adapters", 2));
        let config = json!({"peft_type": "UNION", "members": [{"peft_type": "NONE_SUCH"}]});
        let error = network
            .attach("a", &config, 0)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("members.0") && error.contains("NONE_SUCH"),
            "{error}"
        );
    }
}
