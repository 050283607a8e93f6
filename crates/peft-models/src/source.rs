//! Base weights from a checkpoint, whatever its names and formats, or fresh ones from a seed.

use std::collections::HashSet;
use std::sync::Arc;

use peft_core::{Base, BaseWeight, Error, ModuleKind, ModuleTree, Originals, Result, RngKey};
use peft_io::Checkpoint;
use peft_tensor::{Bytes, Device, FrozenWeight, Precision, Tensor, WeightFormat, encode};

use crate::config::ModelConfig;
use crate::gguf::{self, Change};
use crate::model::LoadOptions;
use crate::quantize::Quantize;
use crate::rope::{RopeConfig, RopeScaling};

/// An error about a file in this workspace's terms.
pub(crate) fn io(error: peft_io::Error) -> Error {
    Error::other(error.to_string())
}

/// Prefixes of the classes that put a head on a base model; a base model saved alone has none.
const PREFIXES: [&str; 3] = ["model.", "transformer.", "bert."];

/// Where a parameter is in a checkpoint.
struct Place {
    name: String,
    change: Change,
}

/// A checkpoint seen under the names of one model.
pub(crate) struct Source<'a> {
    checkpoint: &'a Checkpoint,
    architecture: Option<String>,
    prefix: &'static str,
    heads: (usize, usize),
}

impl<'a> Source<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        config: &ModelConfig,
        features: bool,
    ) -> Result<Self> {
        let architecture = match checkpoint.gguf() {
            Some(gguf) => Some(gguf.architecture().map_err(io)?.to_owned()),
            None => None,
        };
        let prefix = match config.model_type.as_str() {
            _ if features => "",
            "gpt2" => "transformer.",
            "bert" => "bert.",
            _ => "model.",
        };
        Ok(Self {
            checkpoint,
            architecture,
            prefix,
            heads: (config.num_heads, config.num_kv_heads),
        })
    }

    /// Where `name` is stored: under this name, with or without a class's prefix, or under old names.
    fn find(&self, name: &str) -> Option<Place> {
        if let Some(architecture) = &self.architecture {
            let (name, change) = gguf::stored(architecture, name, self.prefix, self.heads)?;
            return self.checkpoint.meta(&name).map(|_| Place { name, change });
        }
        let mut names = vec![name.to_owned()];
        names.extend(
            PREFIXES
                .iter()
                .filter_map(|p| name.strip_prefix(p))
                .map(str::to_owned),
        );
        names.extend(PREFIXES.iter().map(|p| format!("{p}{name}")));
        // BERT checkpoints converted from TensorFlow call a norm's parameters gamma and beta.
        let old: Vec<String> = names
            .iter()
            .filter(|n| n.contains("LayerNorm."))
            .map(|n| {
                n.replace("LayerNorm.weight", "LayerNorm.gamma")
                    .replace("LayerNorm.bias", "LayerNorm.beta")
            })
            .collect();
        names.extend(old);
        let name = names
            .into_iter()
            .find(|n| self.checkpoint.meta(n).is_some())?;
        Some(Place {
            name,
            change: Change::None,
        })
    }

    /// Whether the output embedding has values of its own that differ from the input embedding's, which unties them as
    /// it does in transformers 5.
    pub(crate) fn head_differs(&self, embedding: &str) -> Result<bool> {
        let (Some(head), Some(tokens)) = (self.find("lm_head.weight"), self.find(embedding)) else {
            return Ok(false);
        };
        let (head, tokens) = (&head.name, &tokens.name);
        let format = |name: &str| self.checkpoint.meta(name).map(|m| m.format);
        let bytes = |name: &str| self.checkpoint.bytes(name).map_err(io);
        Ok(format(head) != format(tokens) || *bytes(head)? != *bytes(tokens)?)
    }

    /// Llama 3's frequency divisions, which llama.cpp keeps as a tensor.
    pub(crate) fn rope(&self, rope: Option<RopeConfig>) -> Result<Option<RopeConfig>> {
        let stored =
            self.architecture.is_some() && self.checkpoint.meta("rope_freqs.weight").is_some();
        let Some(mut rope) = rope.filter(|_| stored) else {
            return Ok(None);
        };
        let (_, factors) = self.checkpoint.f32("rope_freqs.weight").map_err(io)?;
        if factors.len() != rope.dim / 2 {
            let detail = format!("{} entries, {} are needed", factors.len(), rope.dim / 2);
            return Err(Error::config("rope_freqs.weight", detail));
        }
        rope.scaling = RopeScaling::Factors(factors.into_iter().map(f64::from).collect());
        Ok(Some(rope))
    }

    fn matrix(
        &self,
        place: &Place,
        transposed: bool,
        quantize: Option<Quantize>,
        compact: bool,
        device: &Device,
    ) -> Result<BaseWeight> {
        let mut weight = self.checkpoint.weight(&place.name).map_err(io)?;
        if let Change::Heads(heads) = place.change {
            weight = weight.permute_rows(&gguf::head_order(weight.rows(), heads))?;
        }
        // llama.cpp and bitsandbytes store GPT-2's matrices as everybody else's.
        let transposed =
            transposed && self.architecture.is_none() && !self.checkpoint.is_quantised(&place.name);
        if let Some(quantize) = quantize {
            let made = quantize.apply(&weight, transposed);
            let made = made.map_err(|e| e.context(format!("tensor `{}`", place.name)))?;
            return Ok(BaseWeight::frozen(made, false, device));
        }
        if weight.format() == WeightFormat::F32 {
            let rounded = device.backend().precision() == Precision::Bf16;
            if (rounded || compact)
                && let Some(half) = halved(&weight, rounded)?
            {
                weight = half;
            }
        }
        Ok(BaseWeight::frozen(weight, transposed, device))
    }

    fn vector(&self, place: &Place, device: &Device) -> Result<BaseWeight> {
        let (shape, mut values) = self.checkpoint.f32(&place.name).map_err(io)?;
        match place.change {
            Change::None => {}
            Change::PlusOne => values.iter_mut().for_each(|v| *v -= 1.0),
            Change::Heads(heads) => {
                values = gguf::head_order(values.len(), heads)
                    .into_iter()
                    .map(|i| values[i])
                    .collect();
            }
        }
        Ok(BaseWeight::dense(
            Tensor::from_vec(values, &shape, device)?,
            false,
        ))
    }
}

/// A weight of f32 in bfloat16, rounded or, without that, only if nothing has to be. The pages it was mapped from are given
/// back.
fn halved(weight: &FrozenWeight, rounded: bool) -> Result<Option<FrozenWeight>> {
    /// Values that are decoded at once: large pieces would leave holes among the weights that stay.
    const PIECE: usize = 1 << 16;
    let (rows, cols) = (weight.rows(), weight.cols());
    let step = (PIECE / cols.max(1)).max(1);
    let (mut values, mut half) = (Vec::new(), Vec::new());
    for first in (0..rows).step_by(step) {
        let last = (first + step).min(rows);
        values.resize((last - first) * cols, 0.0);
        weight.decode_rows(first..last, &mut values);
        if !rounded && values.iter().any(|v| v.to_bits() & 0xffff != 0) {
            weight.bytes().release();
            return Ok(None);
        }
        half.reserve_exact(2 * rows * cols - half.len());
        half.extend(encode(WeightFormat::BF16, &values, cols)?);
    }
    weight.bytes().release();
    let half = Bytes::from_vec(half);
    Ok(Some(FrozenWeight::new(
        rows,
        cols,
        WeightFormat::BF16,
        half,
    )?))
}

/// The base of `tree`. Without a source, all of it is fresh; with one, only the parameters of the `fresh` modules that
/// the source lacks are, and any other that it lacks is an error.
pub(crate) fn base(
    tree: ModuleTree,
    config: &ModelConfig,
    source: Option<&Source<'_>>,
    fresh: &[String],
    options: &LoadOptions,
) -> Result<Base> {
    let device = &options.device;
    let key = RngKey::new(options.seed).fork("init");
    let mut made = Vec::new();
    let mut done = HashSet::new();
    for (_, m) in tree.iter() {
        let transposed = m.kind == ModuleKind::Conv1d;
        let vector = m.kind == ModuleKind::Norm;
        for (name, is_bias) in m
            .weight
            .iter()
            .map(|n| (n, false))
            .chain(m.bias.iter().map(|n| (n, true)))
        {
            if !done.insert(name.clone()) {
                continue;
            }
            let place = source.and_then(|s| {
                // A tied pair may be stored under the output embedding's name alone.
                let tied = || {
                    tree.facts()
                        .tied
                        .then(|| s.find("lm_head.weight"))
                        .flatten()
                };
                let embedding = tree.facts().input_embedding.as_deref() == Some(&m.path);
                s.find(name)
                    .or_else(|| if embedding { tied() } else { None })
            });
            let weight = match (source, place) {
                (Some(s), Some(place)) if is_bias || vector => s.vector(&place, device)?,
                (Some(s), Some(place)) => {
                    let quantize = options.quantize.filter(|_| Quantize::covers(m));
                    s.matrix(&place, transposed, quantize, options.compact, device)?
                }
                (Some(_), None) if !fresh.contains(&m.path) => continue,
                _ => {
                    if source.is_some() {
                        tracing::warn!(
                            "{name} is not in the checkpoint: it starts from random values"
                        );
                    }
                    let shape = if is_bias {
                        vec![m.out_features]
                    } else {
                        m.weight_shape()
                    };
                    let std = match config.model_type.as_str() {
                        // The output projections' share of a residual stream of all layers (GPT-2's initialisation).
                        "gpt2" if m.path.ends_with("c_proj") => {
                            config.initializer_range / ((2 * config.num_layers) as f32).sqrt()
                        }
                        _ => config.initializer_range,
                    };
                    let constant = match (is_bias, vector) {
                        (true, _) => Some(0.0),
                        (false, true) => Some(1.0 - config.norm_offset),
                        (false, false) => None,
                    };
                    initial(&shape, constant, std, key.fork(name), transposed, device)?
                }
            };
            made.push((name.clone(), weight));
        }
    }
    let mut base = Base::new(tree, device);
    for (name, weight) in made {
        base.insert(name, weight);
    }
    base.check()?;
    Ok(base)
}

/// Reads the matrices of a model by their names as they were before they were quantised.
pub(crate) fn originals(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    features: bool,
    device: &Device,
) -> Arc<Originals> {
    let (checkpoint, config) = (checkpoint.clone(), config.clone());
    let device = device.clone();
    Arc::new(move |name: &str, transposed: bool| {
        let source = Source::new(&checkpoint, &config, features)?;
        let Some(place) = source.find(name) else {
            return Ok(None);
        };
        source
            .matrix(&place, transposed, None, false, &device)
            .map(Some)
    })
}

/// A constant vector, or a matrix of normal values.
fn initial(
    shape: &[usize],
    constant: Option<f32>,
    std: f32,
    key: RngKey,
    transposed: bool,
    device: &Device,
) -> Result<BaseWeight> {
    match (constant, shape) {
        (Some(value), _) => Ok(BaseWeight::dense(
            Tensor::full(value, shape, device)?,
            false,
        )),
        (None, &[rows, cols]) => {
            let mut values = vec![0.0; rows * cols];
            key.fill_normal(0.0, std, &mut values);
            Ok(BaseWeight::frozen(
                FrozenWeight::from_f32(rows, cols, values)?,
                transposed,
                device,
            ))
        }
        (None, _) => Err(Error::other(format!(
            "no initial values for shape {shape:?}"
        ))),
    }
}
