//! LoReFT: hidden states of some tokens are moved within a few orthonormal directions.
//!
//! # Paper
//! ReFT: Representation Finetuning for Language Models, arXiv 2404.03592, section 3.2 (LoReFT, DiReFT).
//!
//! # Formula
//! h behind a block, at the first prefix_positions and the last suffix_positions tokens of a row: `h' = h + Rᵀ (f(W h +
//! b) - R h)`, W and R `[r, d]`, the rows of R orthonormal. `orthogonality = false` lets R be anything (NoReFT),
//! `subtract_projection = false` leaves out R h (DiReFT). Training projects the gradient by keeping R = orth(P), P what
//! is trained, and sets P to R after each step.
//!
//! # Saved keys
//! `<layer>.refts.units.<i>.learned_source.weight [r, d]`, `.learned_source.bias [r]`, `.projection.weight [r, d]` (R
//! itself); unit 0 for the first tokens, 1 for the last, 0 for both with tied_weights.
//!
//! # Defaults and their source
//! AdapterHub's LoReftConfig: all layers, 3 first tokens, r 1, dropout 0.05; W and b as PyTorch's linear layers start,
//! R random. A learning rate of 4e-3 suits it, 1e-2 with r 1 on small models (the paper: 4e-4 to 4e-3).
//!
//! # Differences from HF
//! HF PEFT has no ReFT. AdapterHub keeps R by Householder reflections of a saved `[d, d]` basis and trains a second
//! unit even where there are no tokens for it.
//!
//! # Limits
//! A text's last tokens are those of the first call: while generating, new tokens are not moved. Where a row is shorter
//! than both lengths together, a token that is among the first and the last is moved as one of the last. Dropout acts
//! on the whole moved state, as in the paper's code.

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Call, Common, Error, Init, ModuleKind, ModuleTree, Param, PeftMethod, Result,
    Site, Targets, Tensor, Tensors, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::activation::{Activation, activation};
use crate::fields::Layers;
use crate::inserted::{Linear, Place};
use crate::orthonormal::{Retract, orthonormal, settled};

/// LoReFT's fields of `adapter_config.json`, named as AdapterHub names them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Loreft {
    /// Places; behind the blocks of `layers` if not given.
    pub target_modules: Option<Value>,
    /// `all`, or indices of layers.
    pub layers: Layers,
    /// First tokens that are moved.
    pub prefix_positions: usize,
    /// Last tokens that are moved.
    pub suffix_positions: usize,
    /// Directions.
    pub r: usize,
    /// Whether the directions are kept orthonormal.
    pub orthogonality: bool,
    /// Whether first and last tokens are moved by the same unit.
    pub tied_weights: bool,
    /// Whether what is there already along the directions is taken away.
    pub subtract_projection: bool,
    /// Dropout on a moved state.
    pub dropout: f32,
    /// Activation of `W h + b`; none if not given.
    pub non_linearity: Option<String>,
    /// AdapterHub's number type of the parameters, kept for the file.
    pub dtype: Option<String>,
    /// Seed of its initial values, the same at every place; the run's if not given.
    pub init_weights_seed: Option<u64>,
}

impl Default for Loreft {
    fn default() -> Self {
        Self {
            target_modules: None,
            layers: Layers::default(),
            prefix_positions: 3,
            suffix_positions: 0,
            r: 1,
            orthogonality: true,
            tied_weights: false,
            subtract_projection: true,
            dropout: 0.05,
            non_linearity: None,
            dtype: None,
            init_weights_seed: None,
        }
    }
}

register!(
    Loreft,
    id = "loreft",
    title = "LoReFT",
    family = Additive,
    subfamily = "adapters",
    peft_type = "LOREFT",
    paper = "arXiv 2404.03592",
    example = r#"{"r": 2, "prefix_positions": 1, "suffix_positions": 1}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::REFT,
);

/// Where parameters are in keys, and which of them is P.
const UNITS: &str = ".refts.units.";
const PROJECTION: &str = "projection.weight";

impl PeftMethod for Loreft {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Stream]
    }

    fn default_targets(&self, _tree: &ModuleTree) -> Option<Targets> {
        Some(Targets::Pattern(r".*\.\d+\.refts".to_owned()))
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("dropout", "has to be in [0, 1)"));
        }
        if self.prefix_positions == 0 && self.suffix_positions == 0 {
            return Err(Error::config(
                "prefix_positions",
                "0, and suffix_positions is 0 as well: one has to be above",
            ));
        }
        let mut sites = tree.matching(common, self.kinds(), self.default_targets(tree))?;
        self.layers.retain("layers", &mut sites)?;
        Ok(sites)
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (dim, r) = (site.out_features, self.r);
        if !(1..=dim).contains(&r) {
            let detail = format!("{r} at `{}`: has to be between 1 and {dim}", site.path);
            return Err(Error::config("r", detail));
        }
        let non_linearity = self.non_linearity.as_deref();
        let activation = non_linearity
            .map(|name| activation("non_linearity", name))
            .transpose()?;
        let at = &mut Place::new(cx, site, self.init_weights_seed);
        let mut unit = |i: usize, used: bool| {
            if !used {
                return Ok(None);
            }
            let init = Init::LinearDefault { fan_in: dim };
            let random = Init::Normal {
                std: 1.0 / (dim as f32).sqrt(),
            };
            let rows = if self.orthogonality { &random } else { &init };
            Ok::<_, Error>(Some(Unit {
                source: at.linear(&format!("units.{i}.learned_source"), dim, r, &init)?,
                projection: at.param(&format!("units.{i}.{PROJECTION}"), &[r, dim], rows)?,
            }))
        };
        let tied = self.tied_weights;
        Ok(Box::new(Moved {
            first: unit(0, tied || self.prefix_positions > 0)?,
            last: unit(1, !tied && self.suffix_positions > 0)?,
            activation,
            fields: self.clone(),
        }))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        if self.orthogonality {
            Box::new(Retract(UNITS, PROJECTION))
        } else {
            Box::new(())
        }
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        if !self.orthogonality {
            return Ok(params);
        }
        let orthonormal = |(key, value): (String, Tensor)| match key.ends_with(PROJECTION) {
            true => Ok((key, settled(&value)?)),
            false => Ok((key, value)),
        };
        params.into_iter().map(orthonormal).collect()
    }

    /// AdapterHub saves units that have no tokens.
    fn load(&self, mut params: Tensors) -> Result<Tensors> {
        let unused = match (self.prefix_positions, self.suffix_positions) {
            _ if self.tied_weights => return Ok(params),
            (0, _) => ".refts.units.0.",
            (_, 0) => ".refts.units.1.",
            _ => return Ok(params),
        };
        params.retain(|key, _| !key.contains(unused));
        Ok(params)
    }
}

struct Unit {
    /// W and b
    source: Linear,
    /// P, `[r, d]`
    projection: Param,
}

struct Moved {
    /// For the first tokens; for both with tied weights.
    first: Option<Unit>,
    last: Option<Unit>,
    activation: Option<Activation>,
    fields: Loreft,
}

impl Moved {
    /// Rows of the flat `[batch * seq, d]` that are moved: the first tokens', the last tokens'.
    fn rows(&self, call: &Call<'_>, batch: usize, seq: usize) -> (Vec<u32>, Vec<u32>) {
        let tokens = call
            .pass()
            .tokens
            .as_deref()
            .filter(|t| t.batch == batch && t.seq == seq);
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for row in 0..batch {
            // The row's tokens in this call, and how many it had in calls before: padding is neither.
            let (span, seen) = match tokens {
                Some(t) => {
                    let cached = t.mask.as_ref().map_or(t.seen, |mask| {
                        let start = row * (t.seen + t.seq);
                        mask.iter()
                            .skip(start)
                            .take(t.seen)
                            .filter(|&&real| real)
                            .count()
                    });
                    (t.span(row), cached)
                }
                None => (0..seq, 0),
            };
            let to = span
                .len()
                .min(self.fields.prefix_positions.saturating_sub(seen));
            // The last tokens of a text are those of its first call.
            let from = match seen {
                0 => span.len().saturating_sub(self.fields.suffix_positions),
                _ => span.len(),
            };
            let flat = |at: usize| (row * seq + span.start + at) as u32;
            first.extend((0..to.min(from)).map(flat));
            last.extend((from..span.len()).map(flat));
        }
        (first, last)
    }

    /// What `unit` adds to these rows of `x [n, d]`, at their places.
    fn moves(&self, call: &Call<'_>, unit: &Unit, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let h = x.gather_rows(rows)?;
        let p = unit.projection.tensor();
        let r = if self.fields.orthogonality {
            orthonormal(&p)?
        } else {
            p
        };
        let mut source = unit.source.apply(&h)?;
        if let Some(f) = self.activation {
            source = f(&source)?;
        }
        if self.fields.subtract_projection {
            source = source.sub(&h.matmul_t(&r)?)?;
        }
        let mut change = source.matmul(&r)?;
        if call.pass().train && self.fields.dropout > 0.0 {
            change = call
                .dropout(&h.add(&change)?, self.fields.dropout)?
                .sub(&h)?;
        }
        let n = x.shape().first().copied().unwrap_or(0);
        Ok(change.scatter_rows(rows, n)?)
    }
}

impl Adapter for Moved {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let x = call.x()?;
        let (batch, seq, _) = x.dims3()?;
        call.pass().whole_rows()?;
        let (mut first, mut last) = self.rows(call, batch, seq);
        if self.fields.tied_weights {
            first.append(&mut last);
        }
        let flat = x.flatten_rows()?;
        let mut sum = None;
        for (unit, rows) in [(&self.first, first), (&self.last, last)] {
            let Some(unit) = unit.as_ref().filter(|_| !rows.is_empty()) else {
                continue;
            };
            let moved = self.moves(call, unit, &flat, &rows)?;
            sum = Some(sum.unwrap_or_else(|| flat.clone()).add(&moved)?);
        }
        match sum {
            Some(sum) => call.base_with(&sum.reshape(x.shape())?),
            None => call.base(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use peft_core::serde_json::json;
    use peft_core::{Base, Device, ModelFacts, ModuleInfo, Network, Pass};

    const KEY: &str = "base_model.model.model.layers.0.refts.units";

    fn network(dim: usize) -> Network {
        let mut tree = ModuleTree::new(ModelFacts::default());
        tree.push(ModuleInfo::stream("model.layers.0.refts", dim));
        Network::new(Base::new(tree, &Device::cpu()))
    }

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_vec(values.to_vec(), shape, &Device::cpu()).expect("a tensor")
    }

    fn run(network: &Network, x: &Tensor, pass: &Pass) -> Vec<f32> {
        let id = network.module("model.layers.0.refts").expect("there");
        network
            .stream(id, x, pass)
            .expect("runs")
            .to_vec()
            .expect("values")
    }

    /// d = 2, R = (0.6, 0.8), W = (1, 0), b = 1. h = (5, 0) at the row's first token: W h + b - R h = 6 - 3 = 3:
    /// h' = (5, 0) + 3 R = (6.8, 2.4). The row's first position is padding; its last token is not moved.
    #[test]
    fn the_first_token_by_hand() {
        let mut network = network(2);
        let config = json!({"peft_type": "LOREFT", "prefix_positions": 1});
        let tensors: Tensors = [
            ("0.learned_source.weight", tensor(&[1.0, 0.0], &[1, 2])),
            ("0.learned_source.bias", tensor(&[1.0], &[1])),
            ("0.projection.weight", tensor(&[0.6, 0.8], &[1, 2])),
            // What AdapterHub saves of a unit without tokens.
            ("1.projection.weight", tensor(&[1.0, 0.0], &[1, 2])),
        ]
        .into_iter()
        .map(|(name, value)| (format!("{KEY}.{name}"), value))
        .collect();
        network.load("a", &config, tensors, true).expect("loads");
        let tokens = peft_core::Tokens {
            batch: 1,
            seq: 3,
            seen: 0,
            virtual_tokens: 0,
            mask: Some(Arc::new(vec![false, true, true])),
            segments: None,
        };
        let mut pass = Pass::eval();
        pass.tokens = Some(Arc::new(tokens.clone()));
        let x = tensor(&[9.0, 9.0, 5.0, 0.0, 7.0, 7.0], &[1, 3, 2]);
        let y = run(&network, &x, &pass);
        for (got, want) in y.iter().zip([9.0, 9.0, 6.8, 2.4, 7.0, 7.0]) {
            assert!((got - want).abs() < 1e-5, "{y:?}");
        }
        // A token that follows a cached one is not the first.
        pass.tokens = Some(Arc::new(peft_core::Tokens {
            seen: 1,
            mask: None,
            ..tokens
        }));
        assert_eq!(run(&network, &x, &pass), x.to_vec().expect("values"));
    }

    #[test]
    fn wrong_fields_say_what_would_be_right() {
        let wrong = [
            (json!({"r": 3}), "between 1 and 2"),
            (json!({"layers": [4]}), "some of [0]"),
            (json!({"layers": "some"}), "\"all\""),
            (json!({"prefix_positions": 0}), "suffix_positions"),
        ];
        for (mut config, part) in wrong {
            let field = config
                .as_object()
                .and_then(|m| m.keys().next().cloned())
                .expect("a field");
            config["peft_type"] = json!("LOREFT");
            let error = network(2)
                .attach("a", &config, 0)
                .expect_err("refused")
                .to_string();
            assert!(error.contains(&field) && error.contains(part), "{error}");
        }
    }
}
