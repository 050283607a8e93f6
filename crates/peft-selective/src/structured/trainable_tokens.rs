//! Trainable tokens: train the embeddings of some tokens and nothing else.
//!
//! # Paper
//! None: HF PEFT's method for tokens that a vocabulary was extended by.
//!
//! # Formula
//! `E'[t] = R[i]` for the i-th of `token_indices`, t; `E'[t] = E[t]` for every other. On a head that is tied to the
//! embedding the same rows act as outputs.
//!
//! # Saved keys
//! `<embedding>.trainable_tokens_delta [tokens, dim]`: the rows themselves, not a change of them, in the order of
//! `token_indices`; once more under the name of a tied head.
//!
//! # Defaults and their source
//! The input embedding; the rows start at their own values (HF PEFT 0.21). Learning rate: embeddings move little in
//! relation to their size, 1e-3 and above.
//!
//! # Differences from HF
//! Only the positions that hold one of the tokens are touched, where HF copies the whole table at each call. Of two active
//! adapters with a token in common the later one's row counts, where HF refuses. A file with one of the two keys of a
//! tied pair, or with different values under them, is refused.
//!
//! # Limits
//! `init_weights = false` (random rows, for tests of HF's) is refused. `token_indices` has to be given.

use std::sync::OnceLock;

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Error, Injector, ModuleKind, PeftMethod, Result, Site, Targets, Tensors,
    TokenRows, matcher, register,
};
use serde::{Deserialize, Serialize};

/// Its fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainableTokens {
    /// Tokens whose rows are trained.
    pub token_indices: Vec<u32>,
    /// Embeddings; the input embedding if not given.
    pub target_modules: Option<Value>,
    /// Whether rows start at their own values; has to be true.
    pub init_weights: bool,
    /// The key that is saved a second time, and the one it has then, of a tied head.
    #[serde(skip)]
    twins: OnceLock<(String, String)>,
}

impl Default for TrainableTokens {
    fn default() -> Self {
        Self {
            token_indices: Vec::new(),
            target_modules: None,
            init_weights: true,
            twins: OnceLock::new(),
        }
    }
}

register!(
    TrainableTokens,
    id = "trainable_tokens",
    title = "Trainable tokens",
    family = Selective,
    subfamily = "structured",
    peft_type = "TRAINABLE_TOKENS",
    paper = "-",
    example = r#"{"token_indices": [5, 0, 2], "target_modules": ["lm_head"]}"#,
);

const NAME: &str = "trainable_tokens_delta";

impl PeftMethod for TrainableTokens {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Embedding]
    }

    fn attach(&self, site: &Site, _cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Err(Error::module(&site.path, "has rows, not an adapter"))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        const FIELD: &str = "token_indices";
        if !self.init_weights {
            return Err(Error::config(
                "init_weights",
                "has to be true: rows start at their own values",
            ));
        }
        if self.token_indices.is_empty() {
            return Err(Error::config(FIELD, "has to be given: the tokens to train"));
        }
        let besides = &cx.common().trainable_token_indices;
        let again = besides.iter().flat_map(|(_, ids)| ids);
        if let Some(id) = again.into_iter().find(|id| self.token_indices.contains(id)) {
            let detail = format!("token {id} is in {FIELD} already");
            return Err(Error::config("trainable_token_indices", detail));
        }
        let mut modules = match &cx.common().target_modules {
            None => vec![None],
            Some(Targets::Names(names)) => names.iter().cloned().map(Some).collect(),
            Some(_) => {
                let sites = cx.tree().matching(cx.common(), self.kinds(), None)?;
                sites.into_iter().map(|site| Some(site.path)).collect()
            }
        };
        // A tied head has its partner's rows: naming both means the pair.
        if let Some((input, output)) = cx.tied_pair() {
            let names = |site: &Site, name: &Option<String>| match name {
                None => site.path == input.path,
                Some(name) => matcher::matches_name(&site.path, name),
            };
            if modules.iter().any(|m| names(&input, m)) {
                modules.retain(|m| !names(&output, m));
                let key = |site: &Site| format!("base_model.model.{}.{NAME}", site.path);
                let _ = self.twins.set((key(&input), key(&output)));
            }
        }
        for module in &modules {
            TokenRows::attach(cx, module.as_deref(), &self.token_indices, FIELD, NAME)?;
        }
        Ok(())
    }

    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        if let Some((own, twin)) = self.twins.get()
            && let Some(rows) = params.get(own).cloned()
        {
            params.insert(twin.clone(), rows);
        }
        Ok(params)
    }

    fn load(&self, mut params: Tensors) -> Result<Tensors> {
        let Some((own, other)) = self.twins.get() else {
            return Ok(params);
        };
        let missing = |key: &str| Error::Load {
            what: "the adapter".to_owned(),
            missing: vec![key.to_owned()],
            unexpected: Vec::new(),
            misshaped: Vec::new(),
        };
        let twin = params.remove(other).ok_or_else(|| missing(other))?;
        let rows = params.get(own).ok_or_else(|| missing(own))?;
        if rows.shape() != twin.shape() || rows.to_vec()? != twin.to_vec()? {
            let detail = format!("{own} and {other} are tied, but their shapes or values differ");
            return Err(Error::other(detail));
        }
        Ok(params)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{
        Base, BaseWeight, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Tensor,
    };

    fn network() -> Network {
        let table = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        Network::new(Base::custom().embedding("emb", table).expect("a table"))
    }

    /// Tokens 2 and 0, in that order; token 1 stays.
    #[test]
    fn rows_take_the_place_of_tokens() {
        let mut network = network();
        let config = json!({"peft_type": "TRAINABLE_TOKENS", "target_modules": ["emb"], "token_indices": [2, 0]});
        network.attach("a", &config, 0).expect("attaches");
        let rows = network.parameters()[0].clone();
        assert_eq!(rows.key(), "base_model.model.emb.trainable_tokens_delta");
        assert_eq!(
            rows.tensor().to_vec().expect("values"),
            [5.0, 6.0, 1.0, 2.0]
        );
        let moved = Tensor::from_vec(vec![-1.0, -2.0, 7.0, 8.0], &[2, 2], network.device());
        rows.set(moved.expect("a tensor")).expect("fits");
        let id = network.module("emb").expect("there");
        let run = |network: &Network| {
            network
                .embed(id, &[0, 1, 2], &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values")
        };
        assert_eq!(run(&network), [7.0, 8.0, 3.0, 4.0, -1.0, -2.0]);
        network.merge().expect("merges");
        assert_eq!(run(&network), [7.0, 8.0, 3.0, 4.0, -1.0, -2.0]);
    }

    /// A batch without any of the tokens is a step like others: their gradient is zero, and there is one.
    #[test]
    fn tokens_that_do_not_occur() {
        let mut network = network();
        let config = json!({"peft_type": "TRAINABLE_TOKENS", "target_modules": ["emb"], "token_indices": [2, 0]});
        network.attach("a", &config, 0).expect("attaches");
        let rows = network.parameters()[0].clone();
        let id = network.module("emb").expect("there");
        let out = network.embed(id, &[1, 1], &Pass::eval()).expect("runs");
        assert_eq!(out.to_vec().expect("values"), [3.0, 4.0, 3.0, 4.0]);
        let grads = out.sum_all().expect("a sum").backward().expect("goes back");
        let grad = grads.get(&rows.tensor()).expect("a gradient");
        assert_eq!(grad.to_vec().expect("values"), [0.0; 4]);
    }

    #[test]
    fn tokens_that_are_not_there() {
        for (tokens, named) in [
            (json!([3]), "0 to 2"),
            (json!([1, 1]), "different"),
            (json!([]), "token_indices"),
        ] {
            let config = json!({"peft_type": "TRAINABLE_TOKENS", "target_modules": ["emb"], "token_indices": tokens});
            let error = network().attach("a", &config, 0).expect_err("refused");
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    /// One table for tokens and head: one parameter, both of HF's keys, and both are asked for.
    #[test]
    fn a_tied_head_has_the_same_rows() {
        let network = || {
            let mut tree = ModuleTree::new(ModelFacts {
                input_embedding: Some("emb".to_owned()),
                output_embedding: Some("head".to_owned()),
                tied: true,
                ..ModelFacts::default()
            });
            tree.push(ModuleInfo::embedding("emb", 3, 2));
            tree.push(ModuleInfo::linear("head", 2, 3, false).with_weight("emb.weight"));
            let mut base = Base::new(tree, &Device::cpu());
            let table = Tensor::from_vec((1..7u8).map(f32::from).collect(), &[3, 2], base.device());
            base.insert(
                "emb.weight",
                BaseWeight::dense(table.expect("a tensor"), false),
            );
            Network::new(base)
        };
        let mut one = network();
        let config = json!({"peft_type": "TRAINABLE_TOKENS", "target_modules": ["head", "emb"], "token_indices": [1]});
        one.attach("a", &config, 0).expect("attaches");
        assert_eq!(one.parameters().len(), 1);
        let (config, tensors) = one.export("a").expect("exports");
        let keys = ["emb", "head"].map(|m| format!("base_model.model.{m}.trainable_tokens_delta"));
        assert!(tensors.keys().eq(&keys), "{:?}", tensors.keys());
        for key in &keys {
            let mut fewer = tensors.clone();
            fewer.remove(key);
            let error = network()
                .load("b", &config, fewer, true)
                .expect_err("refused");
            assert!(error.to_string().contains(key), "{error}");
        }
        network().load("b", &config, tensors, true).expect("loads");
    }
}
