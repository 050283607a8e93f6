//! P-Tuning: virtual tokens that a small network makes while training.
//!
//! # Paper
//! GPT Understands, Too, arXiv 2103.10385, section 3.2 (equation 3 and the LSTM before it).
//!
//! # Formula
//! `[P; E(x)]` with `P = f(e)`, e `[num_virtual_tokens, d]` trained along. `MLP`:
//! `f = W3 relu(W2 relu(W1 e + b1) + b2) + b3`, h wide inside. `LSTM`: `f = W2 relu(W1 u + b1) + b2`, u `[V, 2h]` what
//! a bidirectional LSTM of `encoder_num_layers` layers, h wide each way, makes of the rows of e in order.
//!
//! # Saved keys
//! `prompt_embeddings [num_virtual_tokens, d]`: the evaluated prompt, without any prefix.
//!
//! # Defaults and their source
//! `MLP`, 2 LSTM layers and no dropout, as HF PEFT 0.21; h = d, which HF fills in. Start: e standard normal, linear
//! layers and the LSTM uniform by PyTorch's rules (bounds `1 / sqrt(inputs)` and `1 / sqrt(h)`). `num_virtual_tokens` 8:
//! HF has no default; the paper's LAMA templates have 9. A learning rate of 1e-2 suits MiniLM (200 steps of 16 rows:
//! accuracy 0.74 on 500 held-out reviews); at 3e-3 nothing was learned in 100 steps. The LSTM wants 1e-3: 1e-2 stays at
//! chance (docs/comparison.md).
//!
//! # Differences from HF
//! A saved prompt can be trained further, without its network. HF's MLP has three layers where the paper has two behind
//! its LSTM; ours are HF's. With a single virtual token an LSTM has nothing to hand on: its recurrent weights, which
//! would never get a gradient, are left out.
//!
//! # Limits
//! Virtual tokens come in front of the text, not inside a template. The file holds the evaluated prompt only; training
//! checkpoints keep the network. `encoder_num_layers` says nothing for `MLP`.

use std::collections::BTreeMap;

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Error, Init, ModuleTree, Param, PeftMethod, PromptCx, PromptPlace, Result,
    RngKey, Site, Tensor, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::ModelFields;
use crate::lstm::BiLstm;
use crate::model_fields::kept_for_hf;
use crate::virtual_tokens::{PROMPT, Prompt, check_count, soft_prompt};

/// P-Tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PTuning {
    /// Virtual tokens.
    pub num_virtual_tokens: usize,
    /// `MLP` or `LSTM`.
    pub encoder_reparameterization_type: String,
    /// Width inside the network; by default that of a token.
    pub encoder_hidden_size: Option<usize>,
    /// Layers of the LSTM.
    pub encoder_num_layers: usize,
    /// Dropout between the layers of the LSTM.
    pub encoder_dropout: f32,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for PTuning {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 8,
            encoder_reparameterization_type: "MLP".to_owned(),
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
            model: ModelFields::default(),
            others: kept_for_hf(),
        }
    }
}

register!(
    PTuning,
    id = "p_tuning",
    title = "P-Tuning",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "P_TUNING",
    paper = "arXiv 2103.10385",
    example = r#"{"num_virtual_tokens": 3}"#,
    identity_at_init = false,
    mergeable = false,
);

const EMBEDDING: &str = "prompt_encoder.embedding.weight";
const MLP: &str = "prompt_encoder.mlp_head";
const LSTM: &str = "prompt_encoder.lstm_head";

impl PTuning {
    fn encoder(&self, dim: usize) -> Result<Encoder> {
        let (count, hidden) = (
            self.num_virtual_tokens,
            self.encoder_hidden_size.unwrap_or(dim),
        );
        if hidden == 0 {
            return Err(Error::config("encoder_hidden_size", "has to be at least 1"));
        }
        if !(0.0..1.0).contains(&self.encoder_dropout) {
            let detail = format!(
                "has to be at least 0 and below 1, not {}",
                self.encoder_dropout
            );
            return Err(Error::config("encoder_dropout", detail));
        }
        let lstm = match self.encoder_reparameterization_type.as_str() {
            "MLP" => None,
            "LSTM" if self.encoder_num_layers == 0 => {
                return Err(Error::config("encoder_num_layers", "has to be at least 1"));
            }
            "LSTM" => Some(BiLstm {
                path: LSTM.to_owned(),
                inputs: dim,
                hidden,
                layers: self.encoder_num_layers,
                steps: count,
            }),
            other => {
                let detail = format!("{other:?} is not one of MLP, LSTM");
                return Err(Error::config("encoder_reparameterization_type", detail));
            }
        };
        // Places of the linear layers in HF's sequence, and the widths between them.
        let widths = match lstm {
            Some(_) => vec![2 * hidden, 2 * hidden, dim],
            None => vec![dim, hidden, hidden, dim],
        };
        Ok(Encoder {
            count,
            dim,
            lstm,
            widths,
            dropout: self.encoder_dropout,
        })
    }
}

impl PeftMethod for PTuning {
    soft_prompt!();

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (count, dim) = (self.num_virtual_tokens, cx.tree().facts().hidden_size);
        check_count(cx, "num_virtual_tokens", count)?;
        self.model.check(dim)?;
        let encoder = self.encoder(dim)?;
        // A file holds the evaluated prompt: its network is gone.
        if cx.common().inference_mode {
            let tokens = cx.bare(PROMPT, &[count, dim], &Init::Zeros)?;
            let place = PromptPlace::Input;
            return Ok(Box::new(Prompt { tokens, place }));
        }
        let mut params = BTreeMap::new();
        for (name, shape, init) in encoder.shapes() {
            let param = cx.transient(&name, &shape, &init)?;
            params.insert(name, param);
        }
        Ok(Box::new(Encoded { encoder, params }))
    }

    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        if let Some(embedding) = params.get(EMBEDDING) {
            let encoder = self.encoder(embedding.last_dim())?;
            let prompt = encoder.run(&|name| named(params.get(name).cloned(), name), None)?;
            params.insert(PROMPT.to_owned(), prompt);
        }
        Ok(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let facts = tree.facts();
        ModelFields::write(config, facts, facts.hidden_size, facts.num_heads);
        let hidden = self.encoder_hidden_size.unwrap_or(facts.hidden_size);
        config.insert("encoder_hidden_size".to_owned(), json!(hidden));
    }
}

fn named<T>(found: Option<T>, name: &str) -> Result<T> {
    found.ok_or_else(|| Error::other(format!("the prompt encoder has no {name}")))
}

/// The network, without its weights.
struct Encoder {
    count: usize,
    dim: usize,
    lstm: Option<BiLstm>,
    /// Widths from linear layer to linear layer.
    widths: Vec<usize>,
    dropout: f32,
}

impl Encoder {
    /// Names, shapes and initial values of its weights.
    fn shapes(&self) -> Vec<(String, Vec<usize>, Init)> {
        let start = Init::Normal { std: 1.0 };
        let mut all = vec![(EMBEDDING.to_owned(), vec![self.count, self.dim], start)];
        if let Some(lstm) = &self.lstm {
            let init = Init::LinearDefault {
                fan_in: lstm.hidden,
            };
            let weights = lstm.shapes().into_iter();
            all.extend(weights.map(|(name, shape)| (name, shape, init.clone())));
        }
        for (i, pair) in self.widths.windows(2).enumerate() {
            if let &[from, to] = pair {
                let init = Init::LinearDefault { fan_in: from };
                let place = 2 * i;
                all.push((
                    format!("{MLP}.{place}.weight"),
                    vec![to, from],
                    init.clone(),
                ));
                all.push((format!("{MLP}.{place}.bias"), vec![to], init));
            }
        }
        all
    }

    /// The prompt `[count, dim]`, with dropout where a key for it is given.
    fn run(&self, get: &dyn Fn(&str) -> Result<Tensor>, dropout: Option<RngKey>) -> Result<Tensor> {
        let mut x = get(EMBEDDING)?;
        if let Some(lstm) = &self.lstm {
            x = lstm.run(&x, get, &|layer, x| match dropout {
                Some(key) if self.dropout > 0.0 => {
                    Ok(x.dropout(self.dropout, key.fork_n(layer as u64))?)
                }
                _ => Ok(x),
            })?;
        }
        for i in 0..self.widths.len().saturating_sub(1) {
            if i > 0 {
                x = x.relu()?;
            }
            let place = 2 * i;
            x = x
                .matmul_t(&get(&format!("{MLP}.{place}.weight"))?)?
                .add(&get(&format!("{MLP}.{place}.bias"))?)?;
        }
        Ok(x)
    }
}

/// A prompt still made by its network.
struct Encoded {
    encoder: Encoder,
    params: BTreeMap<String, Param>,
}

impl Adapter for Encoded {
    fn prompt(&self, at: &PromptCx<'_>) -> Result<Option<Tensor>> {
        // One mask for all rows, as HF has it; the key of a parameter tells two prompts apart.
        let own = self.params.get(EMBEDDING).map_or("", Param::key);
        let dropout = at.pass.train.then(|| at.pass.key.fork(own));
        let get = |name: &str| named(self.params.get(name).map(Param::tensor), name);
        self.encoder.run(&get, dropout).map(Some)
    }

    fn prompt_len(&self) -> usize {
        self.encoder.count
    }
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Device, ModelFacts, ModuleTree, Network, Pass, RngKey, Tensor};

    fn network(fields: Value) -> peft_core::Result<Network> {
        let facts = ModelFacts {
            hidden_size: 2,
            ..ModelFacts::default()
        };
        let mut network = Network::new(Base::new(ModuleTree::new(facts), &Device::cpu()));
        let mut config = json!({"peft_type": "P_TUNING"});
        for (key, value) in fields.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        network.attach("a", &config, 3)?;
        Ok(network)
    }

    fn prompt(network: &Network, pass: &Pass) -> Vec<f32> {
        let prompt = network.prompt(1, pass).expect("runs").expect("a prompt");
        prompt.to_vec().expect("values")
    }

    /// One hidden unit: e = (3, -1); relu(e0 + 2 e1 + 1) = 2; relu(2 * 2 - 1) = 3; (3, -3) + (0, 1).
    #[test]
    fn the_mlp_by_hand() {
        let network =
            network(json!({"num_virtual_tokens": 1, "encoder_hidden_size": 1})).expect("attaches");
        let values: [(&str, &[f32]); 7] = [
            ("embedding.weight", &[3.0, -1.0]),
            ("0.weight", &[1.0, 2.0]),
            ("0.bias", &[1.0]),
            ("2.weight", &[2.0]),
            ("2.bias", &[-1.0]),
            ("4.weight", &[1.0, -1.0]),
            ("4.bias", &[0.0, 1.0]),
        ];
        for param in network.parameters() {
            let (_, value) = values
                .iter()
                .find(|(name, _)| param.key().ends_with(name))
                .expect("a known name");
            let value = Tensor::from_vec(value.to_vec(), &param.shape(), network.device());
            param.set(value.expect("a tensor")).expect("fits");
        }
        assert_eq!(prompt(&network, &Pass::eval()), [3.0, -2.0]);
    }

    /// What the network gives is what its file holds, for both kinds; dropout acts in training alone.
    #[test]
    fn a_prompt_is_saved_evaluated() {
        for kind in ["MLP", "LSTM"] {
            let fields = json!({"num_virtual_tokens": 3, "encoder_reparameterization_type": kind,
                "encoder_hidden_size": 4, "encoder_dropout": 0.5});
            let mut network = network(fields).expect("attaches");
            let live = prompt(&network, &Pass::eval());
            let dropped = prompt(&network, &Pass::train(RngKey::new(1)));
            assert_eq!(live != dropped, kind == "LSTM", "{kind}");
            let (config, tensors) = network.export("a").expect("exports");
            assert_eq!(tensors.keys().collect::<Vec<_>>(), ["prompt_embeddings"]);
            network.delete("a").expect("deletes");
            network.load("b", &config, tensors, true).expect("loads");
            assert_eq!(prompt(&network, &Pass::eval()), live, "{kind}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        for (field, value) in [
            ("num_virtual_tokens", json!(0)),
            ("encoder_reparameterization_type", json!("GRU")),
            ("encoder_hidden_size", json!(0)),
            ("encoder_dropout", json!(1.0)),
            ("num_transformer_submodules", json!(2)),
        ] {
            let error = network(json!({field: value}))
                .expect_err("refused")
                .to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
