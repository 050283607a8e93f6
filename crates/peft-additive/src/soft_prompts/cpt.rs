//! CPT: a context of examples in front of the text, its embeddings moved within a small ball by training.
//!
//! # Paper
//! Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods, arXiv 2410.17222, section 3.
//!
//! # Formula
//! `[E(c) + D; E(x)]` for the tokens c of the context. Row i of D stays in a ball of radius
//! `eps_i sqrt(d / 2048)`: `opt_projection_epsilon` for inputs, `opt_projection_format_epsilon` for templates; labels do
//! not move. After each step D goes back to the nearest point of the ball. The loss is the mean over the labels of the
//! text and of the context; with `opt_weighted_loss_type` `decay` those of the last example of the context count
//! `opt_loss_decay_factor`, those of the one before its square, and so on.
//!
//! `cpt_tokens_type_mask` says what a token is: 1 input template, 2 input, 3 output template, 4 label, and 4 more for
//! each further example; 0 is nothing of these.
//!
//! # Saved keys
//! `prompt_embeddings [tokens, d]`: `E(c) + D`, without any prefix.
//!
//! # Defaults and their source
//! D = 0, both epsilons 0.1, no decay, all tokens template (1): HF PEFT 0.21.
//!
//! # Differences from HF
//! A saved prompt can be trained further, within balls around what was saved. All labels of the text count; HF takes
//! types for the text too (`input_type_mask`) and, without them, loses every label where the context's last type is no
//! label. Evaluation asks for the text's labels alone.
//!
//! # Limits
//! Language models only, as in HF. `cpt_mask` is kept for the file; neither HF nor this reads it.

use std::sync::{Arc, OnceLock};

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Error, Init, ModuleTree, Param, PeftMethod, PromptCx, PromptLabel, Result,
    Site, Tensor, Tensors, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::ModelFields;
use crate::balls::{movable, projected};
use crate::virtual_tokens::{PROMPT, check_count, check_ids, soft_prompt, word_table};

/// CPT's fields of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpt {
    /// The context.
    pub cpt_token_ids: Option<Vec<u32>>,
    /// HF's, not read.
    pub cpt_mask: Option<Vec<u8>>,
    /// What each token of the context is.
    pub cpt_tokens_type_mask: Option<Vec<u32>>,
    /// `none` or `decay`.
    pub opt_weighted_loss_type: String,
    /// What the labels of an example of the context count beside those of the next.
    pub opt_loss_decay_factor: f32,
    /// Radius for inputs, in a space of 2048 dimensions.
    pub opt_projection_epsilon: f32,
    /// Radius for templates, in a space of 2048 dimensions.
    pub opt_projection_format_epsilon: f32,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    #[serde(skip)]
    attached: OnceLock<Arc<Moved>>,
}

impl Default for Cpt {
    fn default() -> Self {
        let others = json!({"modules_to_save": null, "num_virtual_tokens": null, "tokenizer_name_or_path": null});
        Self {
            cpt_token_ids: None,
            cpt_mask: None,
            cpt_tokens_type_mask: None,
            opt_weighted_loss_type: "none".to_owned(),
            opt_loss_decay_factor: 1.0,
            opt_projection_epsilon: 0.1,
            opt_projection_format_epsilon: 0.1,
            model: ModelFields::default(),
            others: others.as_object().cloned().unwrap_or_default(),
            attached: OnceLock::new(),
        }
    }
}

register!(
    Cpt,
    id = "cpt",
    title = "CPT",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "CPT",
    paper = "arXiv 2410.17222",
    example = r#"{"cpt_token_ids": [1, 2, 3, 4], "cpt_tokens_type_mask": [1, 2, 3, 4], "task_type": "CAUSAL_LM"}"#,
    identity_at_init = false,
    mergeable = false,
);

const DELTA: &str = "prompt_encoder.delta_embedding.weight";
const TYPES: &str = "cpt_tokens_type_mask";

impl Cpt {
    fn ids(&self) -> &[u32] {
        self.cpt_token_ids.as_deref().unwrap_or_default()
    }

    fn types(&self) -> Vec<u32> {
        let all_template = || vec![1; self.ids().len()];
        self.cpt_tokens_type_mask
            .clone()
            .unwrap_or_else(all_template)
    }

    /// How far each token may move, `[tokens]`; none for those that may not.
    fn radii(&self, dim: usize) -> Vec<f32> {
        let unit = (dim as f32 / 2048.0).sqrt();
        let of = |kind: u32| match kind % 4 {
            1 | 3 => self.opt_projection_format_epsilon * unit,
            2 => self.opt_projection_epsilon * unit,
            _ => 0.0,
        };
        self.types().into_iter().map(of).collect()
    }

    /// The labels of the context with what they count.
    fn labels(&self) -> Vec<PromptLabel> {
        let types = self.types();
        let is_label = |kind: u32| kind > 0 && kind.is_multiple_of(4);
        // Nothing comes before the first position that could be asked for it.
        let places = types.iter().enumerate().skip(1);
        let places: Vec<_> = places.filter(|&(_, &kind)| is_label(kind)).collect();
        let mut kinds: Vec<u32> = places.iter().map(|&(_, &kind)| kind).collect();
        kinds.sort_unstable_by(|a, b| b.cmp(a));
        kinds.dedup();
        let decays = self.opt_weighted_loss_type == "decay";
        let label = |(position, kind): (usize, &u32)| {
            let age = 1 + kinds.iter().position(|k| k == kind).unwrap_or(0);
            let weight = if decays {
                self.opt_loss_decay_factor.powi(age as i32)
            } else {
                1.0
            };
            let token = *self.ids().get(position)?;
            Some(PromptLabel {
                position,
                token,
                weight,
            })
        };
        places.into_iter().filter_map(label).collect()
    }

    fn check(&self, cx: &Attach<'_>) -> Result<()> {
        let count = self.ids().len();
        check_count(cx, "cpt_token_ids", count)?;
        let lengths = [
            ("cpt_mask", self.cpt_mask.as_ref().map(Vec::len)),
            (TYPES, self.cpt_tokens_type_mask.as_ref().map(Vec::len)),
        ];
        for (field, len) in lengths {
            if let Some(len) = len.filter(|&len| len != count) {
                let detail = format!("has {len} entries, cpt_token_ids has {count}");
                return Err(Error::config(field, detail));
            }
        }
        for (field, radius) in [
            ("opt_projection_epsilon", self.opt_projection_epsilon),
            (
                "opt_projection_format_epsilon",
                self.opt_projection_format_epsilon,
            ),
        ] {
            if !(radius.is_finite() && radius > 0.0) {
                return Err(Error::config(
                    field,
                    format!("has to be above 0, not {radius}"),
                ));
            }
        }
        if self.types().iter().all(|kind| kind % 4 == 0) {
            return Err(Error::config(
                TYPES,
                "has no token that may move: types 1, 2 or 3",
            ));
        }
        if !matches!(self.opt_weighted_loss_type.as_str(), "none" | "decay") {
            let detail = format!(
                "{:?} is not one of none, decay",
                self.opt_weighted_loss_type
            );
            return Err(Error::config("opt_weighted_loss_type", detail));
        }
        match cx.common().task_type.as_deref() {
            None | Some("CAUSAL_LM") => Ok(()),
            Some(other) => Err(Error::config(
                "task_type",
                format!("has to be CAUSAL_LM for this method, not {other}"),
            )),
        }
    }
}

impl PeftMethod for Cpt {
    soft_prompt!();

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (count, dim) = (self.ids().len(), cx.tree().facts().hidden_size);
        self.check(cx)?;
        self.model.check(dim)?;
        // A saved prompt brings its values.
        let words = if cx.common().inference_mode {
            Init::Zeros
        } else {
            let table = word_table(cx, "cpt_token_ids")?;
            check_ids(&table, "cpt_token_ids", self.ids())?;
            Init::Value(table.gather_rows(self.ids())?)
        };
        let moved = Arc::new(Moved {
            words: cx.bare_frozen(PROMPT, &[count, dim], &words)?,
            delta: cx.transient(DELTA, &[count, dim], &Init::Zeros)?,
            radii: self.radii(dim),
            labels: self.labels(),
        });
        let _ = self.attached.set(moved.clone());
        Ok(Box::new(Context(moved)))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Balls(self.attached.get().cloned()))
    }

    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        if let (Some(words), Some(delta)) = (params.get(PROMPT), params.get(DELTA)) {
            let moved = words.add(&projected(delta, &self.radii(delta.last_dim()))?)?;
            params.insert(PROMPT.to_owned(), moved);
        }
        Ok(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let (facts, count) = (tree.facts(), self.ids().len());
        ModelFields::write(config, facts, facts.hidden_size, facts.num_heads);
        let mask = self.cpt_mask.clone().unwrap_or_else(|| vec![1; count]);
        config.insert("num_virtual_tokens".to_owned(), json!(count));
        config.insert("cpt_mask".to_owned(), json!(mask));
        config.insert(TYPES.to_owned(), json!(self.types()));
        // HF refuses the file without it.
        config.insert("task_type".to_owned(), json!("CAUSAL_LM"));
    }
}

/// The context and how far it was moved.
#[derive(Debug)]
struct Moved {
    /// `[tokens, hidden]`: the context's embeddings, or what was saved of it.
    words: Param,
    /// `[tokens, hidden]`
    delta: Param,
    radii: Vec<f32>,
    labels: Vec<PromptLabel>,
}

struct Context(Arc<Moved>);

impl Adapter for Context {
    fn prompt(&self, at: &PromptCx<'_>) -> Result<Option<Tensor>> {
        let Moved {
            words,
            delta,
            radii,
            ..
        } = &*self.0;
        let delta = delta.tensor();
        let mut change = projected(&delta, radii)?;
        if !at.pass.exact {
            // The paper steps from the projected point as if there were no ball, and projects again.
            let free = delta.sub(&delta.detach())?;
            let free = free.mul(&movable(radii, delta.device())?)?;
            change = change.detach().add(&free)?;
        }
        Ok(Some(words.tensor().add(&change)?))
    }

    fn prompt_len(&self) -> usize {
        self.0.radii.len()
    }

    fn prompt_labels(&self) -> Vec<PromptLabel> {
        self.0.labels.clone()
    }
}

/// Takes what training moved back into its balls.
struct Balls(Option<Arc<Moved>>);

impl TrainHooks for Balls {
    fn after_step(&mut self, _cx: &mut TrainCx<'_>) -> Result<()> {
        let Some(moved) = &self.0 else { return Ok(()) };
        let delta = moved.delta.tensor().detach();
        moved.delta.set(projected(&delta, &moved.radii)?)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{
        Base, BaseWeight, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Result, Tensor,
    };

    /// 2048 wide, so that epsilons are radii; word w is w everywhere.
    fn network(fields: Value) -> Result<Network> {
        let facts = ModelFacts {
            hidden_size: 2048,
            input_embedding: Some("embed".to_owned()),
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        tree.push(ModuleInfo::embedding("embed", 5, 2048));
        let device = Device::cpu();
        let mut base = Base::new(tree, &device);
        let table = Array2::from_shape_fn((5, 2048), |(word, _)| word as f32);
        let table = Tensor::from_array(table, &device)?;
        base.insert("embed.weight", BaseWeight::dense(table, false));
        let mut config = json!({"peft_type": "CPT", "cpt_token_ids": [1, 2, 3, 4, 4],
            "cpt_tokens_type_mask": [1, 2, 4, 6, 8], "opt_projection_epsilon": 3.0,
            "opt_projection_format_epsilon": 0.5});
        for (key, value) in fields.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut network = Network::new(base);
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// Moves of length 2: the template's row is cut to 0.5, inputs keep theirs, labels stay.
    #[test]
    fn moves_stay_in_their_balls() {
        let mut network = network(json!({})).expect("attaches");
        let params = network.parameters();
        let delta = Array2::from_shape_fn((5, 2048), |(_, at)| if at == 7 { 2.0 } else { 0.0 });
        let delta = Tensor::from_array(delta, network.device()).expect("a tensor");
        params[0].set(delta).expect("fits");
        let at_seven = |network: &Network| -> Vec<f32> {
            let prompt = network.prompt(1, &Pass::eval()).expect("runs");
            let values = prompt.expect("a prompt").to_vec().expect("values");
            values.chunks(2048).map(|row| row[7]).collect()
        };
        let wanted = [1.5, 4.0, 3.0, 6.0, 4.0];
        assert_eq!(at_seven(&network), wanted);
        // The file holds the sum, and goes on from there.
        let (config, tensors) = network.export("a").expect("exports");
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["prompt_embeddings"]);
        network.delete("a").expect("deletes");
        network.load("a", &config, tensors, true).expect("loads");
        assert_eq!(at_seven(&network), wanted);
        assert_eq!(network.parameters().len(), 1);
    }

    /// The last example's label counts 0.5, the one before 0.25.
    #[test]
    fn labels_of_the_context_decay() {
        let of = |kind: &str| {
            let fields = json!({"opt_weighted_loss_type": kind, "opt_loss_decay_factor": 0.5});
            let labels = network(fields).expect("attaches").prompt_labels();
            let labels = labels.iter().map(|l| (l.position, l.token, l.weight));
            labels.collect::<Vec<_>>()
        };
        assert_eq!(of("decay"), [(2, 3, 0.25), (4, 4, 0.5)]);
        assert_eq!(of("none"), [(2, 3, 1.0), (4, 4, 1.0)]);
    }

    #[test]
    fn bad_fields_are_named() {
        for (field, value) in [
            ("cpt_token_ids", json!([])),
            ("cpt_token_ids", json!([1, 2, 3, 4, 5])),
            ("cpt_mask", json!([1])),
            ("cpt_tokens_type_mask", json!([4, 4, 4, 4, 4])),
            ("opt_projection_epsilon", json!(0.0)),
            ("opt_weighted_loss_type", json!("later")),
            ("task_type", json!("SEQ_CLS")),
        ] {
            let error = network(json!({field: value}))
                .expect_err("refused")
                .to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
