//! MAM: the mix-and-match adapter, a prefix in attention and a parallel bottleneck beside the feed-forward sublayer.
//!
//! # Paper
//! Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 4.6.
//!
//! # Formula
//! Attention over `[P_k; K]`, `[P_v; V]`; `y = LN(h + s U f(D x) + x)` behind the feed-forward sublayer, with h its
//! output and x its residual. Members act each on its own: see their pages.
//!
//! # Saved keys
//! Member i's keys behind `members.<i>.`.
//!
//! # Defaults and their source
//! The paper's: 30 prefix positions made by a network 800 wide, a parallel adapter with s = 4 and half the model's width.
//! An entry of `members` without a `peft_type` changes single fields of the default in its place:
//! `members = [{num_virtual_tokens = 10}, {}]`. A learning rate of 3e-4 suits it (the paper's is
//! 5e-5); it learns nothing at 1e-3 on MiniLM.
//!
//! # Differences from HF
//! HF PEFT has no MAM. AdapterHub's folders of it are read (as the union they are) and written.
//!
//! # Limits
//! Cannot be merged.

use peft_core::hub::Hub;
use peft_core::{Error, Injector, PeftMethod, Result, register};
use serde::{Deserialize, Serialize};

use crate::members::{self, Members, composition};

/// MAM's fields of `adapter_config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub struct Mam {
    /// The prefix and the bottleneck.
    pub members: Members,
}

fn defaults() -> Members {
    Members::parse(include_str!("mam.json"))
}

impl Default for Mam {
    fn default() -> Self {
        Self {
            members: defaults(),
        }
    }
}

register!(
    Mam,
    id = "mam",
    title = "MAM adapter",
    family = Hybrid,
    subfamily = "composed",
    peft_type = "MAM",
    paper = "arXiv 2110.04366",
    example = r#"{"members": [{"num_virtual_tokens": 3, "encoder_hidden_size": 5}, {"reduction_factor": 4}]}"#,
    identity_at_init = false,
    mergeable = false,
    hub = Hub {
        claims: |_| false,
        owns: |_, _| false,
        read: |_, _| Err(Error::other("folders of it are unions")),
        write: |model, config, tensors| members::to_hub(
            model,
            &members::listed(config, &defaults())?,
            tensors
        ),
    },
);

impl PeftMethod for Mam {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.members.inject(&self.members.over(&defaults())?, cx)
    }

    composition!(defaults());
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::serde_json::json;

    #[test]
    fn entries_change_single_fields() {
        let given = Members::parse(r#"[{"num_virtual_tokens": 7}, {"reduction_factor": 3}]"#);
        let all = given.over(&defaults()).expect("fills");
        assert_eq!(all[0]["num_virtual_tokens"], 7);
        assert_eq!(all[0]["encoder_hidden_size"], 800);
        assert_eq!(all[1]["reduction_factor"], 3);
        assert_eq!(all[1]["peft_type"], defaults().configs[1]["peft_type"]);
    }

    #[test]
    fn another_method_takes_the_place() {
        let given = Members::parse(r#"[{"peft_type": "OTHER"}, {}, {"peft_type": "MORE"}]"#);
        let all = given.over(&defaults()).expect("fills");
        assert_eq!(all[0], json!({"peft_type": "OTHER"}));
        assert_eq!(all.len(), 3);
        let error = Members::default().over(&defaults()).expect_err("refused");
        assert!(error.to_string().contains("members"), "{error}");
    }
}
