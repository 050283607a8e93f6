//! UniPELT: prefix, bottleneck and LoRA together, each weighed by a gate of its own.
//!
//! # Paper
//! UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, arXiv 2110.07577, section 3.2.
//!
//! # Formula
//! Every member adds `g` times what it adds alone: `y = W x + g s B A x`; `y = LN(h + g U f(D z) + x)` at a junction;
//! prefix keys and values times g. `g = mean over positions of sigmoid(w z + b)`, one a row, from what the member reads
//! there: a linear layer's input, a bottleneck's, the normed input of attention.
//!
//! # Saved keys
//! Member i's keys behind `members.<i>.`; its gates `members.<i>.base_model.model.<module>.gate.weight [1, in]`, `.bias
//! [1]` (a prefix: at every layer's attention, `[2, hidden]` with `shared_gating = false`, keys first).
//!
//! # Defaults and their source
//! The paper's and AdapterHub's members: prefix of 10 made by a network 512 wide, bottleneck with reduction_factor 16,
//! LoRA of rank 8. Gates: weights normal with deviation 0.02, biases zero. An entry of `members` without a `peft_type`
//! changes single fields of the default in its place. A learning rate of 5e-4 suits it.
//!
//! # Differences from HF
//! HF PEFT has no UniPELT. AdapterHub's folders are read and written; a gated LoRA has no alpha / r there, so that ours
//! has alpha = r by default.
//!
//! # Limits
//! Members have to work by adding, or be prefixes. Padding counts in a gate's mean, as in AdapterHub. Cannot be merged.

use std::sync::Arc;

use peft_core::hub::{self, Hub, HubModel};
use peft_core::serde_json::{Value, json};
use peft_core::{
    Adapter, Error, Injector, ModuleKind, PeftMethod, Result, Site, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::gate::{Gate, Gated, GatedPrefix};
use crate::members::{self, Members, composition, scope, taken};

/// UniPELT's fields of `adapter_config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub struct UniPelt {
    /// The prefix, the bottleneck, the low-rank updates.
    pub members: Members,
    /// Whether one gate weighs a prefix's keys and values.
    pub shared_gating: bool,
}

fn defaults() -> Members {
    Members::parse(include_str!("unipelt.json"))
}

impl Default for UniPelt {
    fn default() -> Self {
        Self {
            members: defaults(),
            shared_gating: true,
        }
    }
}

register!(
    UniPelt,
    id = "unipelt",
    title = "UniPELT",
    family = Hybrid,
    subfamily = "composed",
    peft_type = "UNIPELT",
    paper = "arXiv 2110.07577",
    example = r#"{"members": [
        {"num_virtual_tokens": 3, "encoder_hidden_size": 5},
        {"reduction_factor": 4},
        {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    ]}"#,
    identity_at_init = false,
    mergeable = false,
    hub = Hub {
        claims: crate::all_gated,
        owns: |_, _| false,
        read: read_hub,
        write: write_hub,
    },
);

impl PeftMethod for UniPelt {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let mut methods = Vec::new();
        for (i, config) in self.members.over(&defaults())?.iter().enumerate() {
            let scope = scope(i);
            let mut method = None;
            let config = members::as_saved(config, cx);
            let placed = cx.capture(|cx| {
                method = Some(cx.member(&config, &scope)?);
                Ok(())
            })?;
            methods.extend(method);
            cx.scoped(&scope, |cx| {
                for (site, inner) in placed {
                    let gated = self.gated(&site, inner, cx)?;
                    cx.place(site, gated, false);
                }
                Ok(())
            })?;
        }
        self.members.set(methods);
        Ok(())
    }

    composition!(defaults());
}

impl UniPelt {
    /// One of a member's adapters behind a gate.
    fn gated(
        &self,
        site: &Site,
        inner: Arc<dyn Adapter>,
        cx: &mut Injector<'_>,
    ) -> Result<Arc<dyn Adapter>> {
        if site.id.is_none() && inner.prompt_len() == 0 {
            let gates = if self.shared_gating { 1 } else { 2 };
            return Ok(Arc::new(GatedPrefix::new(inner, gates, cx)?));
        }
        if site.kind != ModuleKind::Junction && !site.kind.is_linear() {
            let detail = format!(
                "a member acts on {}, of kind {}; gates weigh prefixes and what is added to linear layers and junctions",
                if site.path.is_empty() {
                    "the whole model"
                } else {
                    &site.path
                },
                site.kind.name()
            );
            return Err(Error::config("members", detail));
        }
        Ok(Arc::new(Gated {
            gate: Gate::new(&mut cx.at(site), 1, site.in_features)?,
            path: site.path.clone(),
            inner,
        }))
    }
}

/// Where AdapterHub's plain keys have their gates: its infix, and ours.
const GATES: [(&str, &str); 3] = [
    (".loras.gate.", ".gate."),
    (".adapters.gate.", ".gate."),
    (".prefix_tuning.prefix_gates.", ".gate."),
];

fn read_hub(config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let mut config = config.clone();
    let mut shared = true;
    let is_gate = |key: &str| GATES.iter().find(|(theirs, _)| key.contains(theirs));
    let (gates, tensors): (Tensors, Tensors) =
        tensors.into_iter().partition(|(k, _)| is_gate(k).is_some());
    let mut out = Tensors::new();
    if let Some(parts) = config["configs"].as_array_mut() {
        // A member is read without its gate, and a gated LoRA has no alpha / r.
        for part in parts.iter_mut() {
            part["use_gating"] = json!(false);
            if part.get("composition_mode").is_some() {
                part["alpha"] = part["r"].clone();
            }
        }
        for (key, value) in gates {
            let mut owner = None;
            for (i, part) in parts.iter().enumerate() {
                let (_, form) = hub::entry(part)?;
                if (form.owns)(part, &key) {
                    owner = Some((i, part));
                }
            }
            let Some(((theirs, ours), (i, part))) = is_gate(&key).zip(owner) else {
                let detail = format!("`{key}` belongs to none of them");
                return Err(Error::config("config.configs", detail));
            };
            shared &= part["shared_gating"] != false;
            let key = format!(
                "{}{}",
                scope(i),
                hub::our_key(&key.replacen(theirs, ours, 1))
            );
            out.insert(key, value);
        }
    }
    let (members, tensors) = members::from_hub(&config["configs"], tensors)?;
    out.extend(tensors);
    Ok((json!({"members": members, "shared_gating": shared}), out))
}

fn write_hub(model: &HubModel, config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let is_gate = |key: &str| key.contains(".gate.") && !key.contains(".adapters.gate.");
    let (gates, mut tensors): (Tensors, Tensors) =
        tensors.into_iter().partition(|(k, _)| is_gate(k));
    let mut out = Tensors::new();
    let members = members::listed(config, &defaults())?;
    let mut plain = vec![Tensors::new(); members.len()];
    let mut configs = Vec::new();
    for (i, (member, plain)) in members.iter().zip(&mut plain).enumerate() {
        let (mut theirs, own) = hub::write(model, member, taken(&mut tensors, &scope(i)))?;
        theirs["use_gating"] = json!(true);
        if theirs.get("shared_gating").is_some() {
            theirs["shared_gating"] = config["shared_gating"].clone();
        }
        *plain = own;
        let factor = match (theirs["alpha"].as_f64(), theirs["r"].as_f64()) {
            (Some(alpha), Some(rank)) if rank > 0.0 => alpha / rank,
            _ => 1.0,
        };
        if theirs.get("composition_mode").is_some() && factor != 1.0 {
            // What alpha would have done goes into B.
            for (_, b) in plain.iter_mut().filter(|(k, _)| k.ends_with(".lora_B")) {
                *b = b.scale(factor as f32)?;
            }
            theirs["alpha"] = theirs["r"].clone();
        }
        configs.push(theirs);
    }
    for (key, value) in gates {
        let misplaced = || Error::other(format!("`{key}` has no place in AdapterHub's folders"));
        let (i, ours) = key
            .strip_prefix("members.")
            .and_then(|k| k.split_once('.'))
            .ok_or_else(misplaced)?;
        let i: usize = i.parse().map_err(|_| misplaced())?;
        let config = configs.get(i).ok_or_else(misplaced)?;
        let key = hub::plain_key(model, ours)?;
        let (_, form) = hub::entry(config).or_else(|_| {
            let mut ungated = config.clone();
            ungated["use_gating"] = json!(false);
            hub::entry(&ungated)
        })?;
        let theirs = GATES
            .iter()
            .map(|(theirs, ours)| key.replacen(ours, theirs, 1));
        let theirs = theirs.into_iter().find(|k| (form.owns)(config, k));
        out.insert(theirs.ok_or_else(misplaced)?, value);
    }
    out.extend(plain.into_iter().flatten());
    Ok((crate::union_of(configs), out))
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;
    use peft_core::{Base, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Tensor};

    fn network() -> Network {
        let mut tree = ModuleTree::new(ModelFacts {
            hidden_size: 1,
            num_layers: 1,
            ..ModelFacts::default()
        });
        tree.push(ModuleInfo::attention("layers.0.self_attn", 1));
        tree.push(ModuleInfo::junction("layers.0.output_adapters", 1));
        let mut network = Network::new(Base::new(tree, &Device::cpu()));
        let config = json!({"peft_type": "UNIPELT", "members": [
            {"peft_type": "AHEAD_FOR_TESTS"}, {"peft_type": "ADDS_FOR_TESTS", "c": 8.0}
        ]});
        network.attach("a", &config, 0).expect("attaches");
        for param in network.parameters() {
            if param.key().ends_with("gate.weight") {
                let one = Tensor::full(1.0, &[1, 1], &Device::cpu()).expect("a tensor");
                param.set(one).expect("fits");
            }
        }
        network
    }

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_vec(values.to_vec(), &[1, values.len(), 1], &Device::cpu()).expect("a tensor")
    }

    /// Positions 0 and ln 3: the gate is the mean of 1/2 and 3/4. At the junction h + 5/8 * 8 + x.
    #[test]
    fn gates_by_hand() {
        let network = network();
        let hidden = tensor(&[0.0, 3f32.ln()]);
        let at = network.module("layers.0.self_attn").expect("there");
        let prefix = network
            .prefix(at, &hidden, &Pass::eval())
            .expect("runs")
            .expect("a prefix");
        let (k, v) = (
            prefix.k.to_vec().expect("values"),
            prefix.v.to_vec().expect("values"),
        );
        assert!((k[0] - 2.0 * 0.625).abs() < 1e-6 && (v[0] - 4.0 * 0.625).abs() < 1e-6);
        let at = network.module("layers.0.output_adapters").expect("there");
        let y = network
            .junction(at, &hidden, &tensor(&[1.0, 2.0]), None, &Pass::eval())
            .expect("runs")
            .to_vec()
            .expect("values");
        assert!(
            (y[0] - 6.0).abs() < 1e-6 && (y[1] - 7.0 - 3f32.ln()).abs() < 1e-6,
            "{y:?}"
        );
    }

    #[test]
    fn keys_are_the_members_own() {
        let network = network();
        let params = network.parameters();
        let keys: Vec<&str> = params.iter().map(peft_core::Param::key).collect();
        assert_eq!(
            keys,
            [
                "members.0.kv",
                "members.0.base_model.model.layers.0.self_attn.gate.weight",
                "members.0.base_model.model.layers.0.self_attn.gate.bias",
                "members.1.base_model.model.layers.0.output_adapters.c",
                "members.1.base_model.model.layers.0.output_adapters.gate.weight",
                "members.1.base_model.model.layers.0.output_adapters.gate.bias",
            ]
        );
    }
}
