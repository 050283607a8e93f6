//! What a method sees of a model: modules by path, their kinds and sizes.

use std::collections::HashMap;

use serde_json::Value;

use crate::matcher::{self, Candidate, MatchSpec};
use crate::{Common, Error, Result, Targets};

/// A module of one [`ModuleTree`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ModuleId(pub usize);

/// What a module computes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ModuleKind {
    /// `y = x Wᵀ + b`, W stored `[out, in]`
    Linear,
    /// GPT-2's linear layer, W stored `[in, out]`
    Conv1d,
    /// A table of rows
    Embedding,
    /// LayerNorm or RMSNorm
    Norm,
    /// A sublayer's output meeting its residual: `norm(x + residual)` or `x + residual`
    Junction,
    /// A layer's attention, where prefixes go
    Attention,
    /// A place that hidden states pass, unchanged: behind the embeddings, behind a block, in front of the head
    Stream,
    /// A module that only holds others
    Container,
}

impl ModuleKind {
    /// Whether it multiplies by a matrix.
    pub fn is_linear(self) -> bool {
        matches!(self, Self::Linear | Self::Conv1d)
    }

    /// The word used in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "Linear",
            Self::Conv1d => "Conv1D",
            Self::Embedding => "Embedding",
            Self::Norm => "Norm",
            Self::Junction => "Junction",
            Self::Attention => "Attention",
            Self::Stream => "Stream",
            Self::Container => "Container",
        }
    }
}

/// One module.
#[derive(Clone, Debug)]
pub struct ModuleInfo {
    /// Dotted path, as in the Hugging Face model of that class.
    pub path: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Width of its input; rows of an embedding.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// Full name of its weight among the base parameters; another module's where they are tied.
    pub weight: Option<String>,
    /// Full name of its bias.
    pub bias: Option<String>,
    /// Index of the layer it is in: the first number in its path.
    pub layer: Option<usize>,
    /// What a norm adds to its stored weight (Gemma's 1).
    pub offset: f32,
}

impl ModuleInfo {
    fn sized(
        path: &str,
        kind: ModuleKind,
        in_features: usize,
        out_features: usize,
        weight: bool,
        bias: bool,
    ) -> Self {
        let named = |wanted: bool, what: &str| wanted.then(|| format!("{path}.{what}"));
        Self {
            path: path.to_owned(),
            kind,
            in_features,
            out_features,
            weight: named(weight, "weight"),
            bias: named(bias, "bias"),
            layer: path.split('.').find_map(|part| part.parse().ok()),
            offset: 0.0,
        }
    }

    /// A module without parameters of its own.
    pub fn new(path: &str, kind: ModuleKind) -> Self {
        Self::sized(path, kind, 0, 0, false, false)
    }

    /// `y = x Wᵀ + b` with W `[out, in]`.
    pub fn linear(path: &str, in_features: usize, out_features: usize, bias: bool) -> Self {
        Self::sized(
            path,
            ModuleKind::Linear,
            in_features,
            out_features,
            true,
            bias,
        )
    }

    /// GPT-2's linear layer, W stored `[in, out]`.
    pub fn conv1d(path: &str, in_features: usize, out_features: usize, bias: bool) -> Self {
        Self::sized(
            path,
            ModuleKind::Conv1d,
            in_features,
            out_features,
            true,
            bias,
        )
    }

    /// A table `[rows, dim]`.
    pub fn embedding(path: &str, rows: usize, dim: usize) -> Self {
        Self::sized(path, ModuleKind::Embedding, rows, dim, true, false)
    }

    /// A norm over `dim`.
    pub fn norm(path: &str, dim: usize, bias: bool) -> Self {
        Self::sized(path, ModuleKind::Norm, dim, dim, true, bias)
    }

    /// A sublayer's output meeting its residual, `dim` wide.
    pub fn junction(path: &str, dim: usize) -> Self {
        Self::sized(path, ModuleKind::Junction, dim, dim, false, false)
    }

    /// A layer's attention, `dim` wide.
    pub fn attention(path: &str, dim: usize) -> Self {
        Self::sized(path, ModuleKind::Attention, dim, dim, false, false)
    }

    /// A place that hidden states pass, `dim` wide.
    pub fn stream(path: &str, dim: usize) -> Self {
        Self::sized(path, ModuleKind::Stream, dim, dim, false, false)
    }

    /// With the weight of another module (a tied head).
    #[must_use]
    pub fn with_weight(mut self, name: impl Into<String>) -> Self {
        self.weight = Some(name.into());
        self
    }

    /// A norm that adds `offset` to its stored weight.
    #[must_use]
    pub fn with_offset(mut self, offset: f32) -> Self {
        self.offset = offset;
        self
    }

    /// In layer `layer`, where the path does not say it first.
    #[must_use]
    pub fn in_layer(mut self, layer: usize) -> Self {
        self.layer = Some(layer);
        self
    }

    /// Its stored weight's shape: `[out, in]`, `[in, out]` for Conv1D, `[rows, dim]`, `[dim]` for a norm.
    pub fn weight_shape(&self) -> Vec<usize> {
        match self.kind {
            ModuleKind::Conv1d | ModuleKind::Embedding => vec![self.in_features, self.out_features],
            ModuleKind::Norm => vec![self.out_features],
            _ => vec![self.out_features, self.in_features],
        }
    }
}

/// Sizes and names of a model as a whole.
#[derive(Clone, Debug, Default)]
pub struct ModelFacts {
    /// `model_type` of its config.json.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the input embedding.
    pub vocab_size: usize,
    /// Longest text the model was made for, in tokens; 0 = not known.
    pub max_positions: usize,
    /// Path of the input embedding.
    pub input_embedding: Option<String>,
    /// Path of the output embedding (`lm_head`).
    pub output_embedding: Option<String>,
    /// Whether both share one weight.
    pub tied: bool,
    /// Whether queries and keys are rotated by position.
    pub rotary: bool,
    /// Heads that a classification task trains along (`classifier`, `score`).
    pub task_heads: Vec<String>,
}

/// The modules of a model, in the order the model registers them.
#[derive(Clone, Debug, Default)]
pub struct ModuleTree {
    facts: ModelFacts,
    modules: Vec<ModuleInfo>,
    by_path: HashMap<String, ModuleId>,
}

impl ModuleTree {
    /// An empty tree.
    pub fn new(facts: ModelFacts) -> Self {
        Self {
            facts,
            ..Self::default()
        }
    }

    /// Adds a module; one of the same path is replaced.
    pub fn push(&mut self, module: ModuleInfo) -> ModuleId {
        if let Some(&id) = self.by_path.get(&module.path) {
            self.modules[id.0] = module;
            return id;
        }
        let id = ModuleId(self.modules.len());
        self.by_path.insert(module.path.clone(), id);
        self.modules.push(module);
        id
    }

    /// The module at `path`.
    pub fn get(&self, path: &str) -> Option<ModuleId> {
        self.by_path.get(path).copied()
    }

    /// A module's facts.
    ///
    /// # Panics
    /// If the id is another tree's.
    pub fn info(&self, id: ModuleId) -> &ModuleInfo {
        &self.modules[id.0]
    }

    /// All modules with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (ModuleId, &ModuleInfo)> {
        self.modules
            .iter()
            .enumerate()
            .map(|(i, m)| (ModuleId(i), m))
    }

    /// Sizes and names of the model as a whole.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// The place of an adapter.
    pub fn site(&self, id: ModuleId) -> Site {
        let m = self.info(id);
        Site {
            id: Some(id),
            path: m.path.clone(),
            kind: m.kind,
            in_features: m.in_features,
            out_features: m.out_features,
            layer: m.layer,
        }
    }

    /// Modules of `kinds` that a configuration's targets name, in tree order.
    ///
    /// # Errors
    /// If a name or pattern matches nothing, or matches a module of another kind.
    pub fn matching(
        &self,
        common: &Common,
        kinds: &[ModuleKind],
        defaults: Option<Targets>,
    ) -> Result<Vec<Site>> {
        let targets = common.target_modules.clone().or(defaults);
        if targets.is_none() {
            return Err(Error::config(
                "target_modules",
                format!(
                    "has to be given: this method has no default for model_type {:?}",
                    self.facts.model_type
                ),
            ));
        }
        let candidates: Vec<Candidate<'_>> = self
            .modules
            .iter()
            .map(|m| Candidate {
                path: &m.path,
                adaptable: kinds.contains(&m.kind),
                linear: m.kind.is_linear(),
                output_head: self.is_head(m),
            })
            .collect();
        let saved = common.saved_modules(self);
        let spec = MatchSpec {
            targets: targets.as_ref(),
            exclude: common.exclude_modules.as_ref(),
            layers_to_transform: common.layers_to_transform.as_deref(),
            layers_pattern: &common.layers_pattern,
            modules_to_save: &saved,
            finished: common.finished,
        };
        let picked = matcher::select(&candidates, &spec)?;
        Ok(picked.into_iter().map(|i| self.site(ModuleId(i))).collect())
    }

    fn is_head(&self, m: &ModuleInfo) -> bool {
        self.facts.output_embedding.as_deref() == Some(&m.path)
            || self.facts.task_heads.contains(&m.path)
    }

    /// Every module at or below one whose path ends with one of `names`, as plain text: HF PEFT asks no dot in front, so
    /// that `norm` means `input_layernorm` too.
    ///
    /// # Errors
    /// If a name matches nothing.
    pub fn subtree(&self, field: &str, names: &[String]) -> Result<Vec<ModuleId>> {
        let mut found = Vec::new();
        for name in names {
            let before = found.len();
            found.extend(
                self.iter()
                    .filter(|(_, m)| !name.is_empty() && is_below(&m.path, name))
                    .map(|(id, _)| id),
            );
            if found.len() == before {
                let nearest = crate::nearest(name, self.modules.iter().map(|m| m.path.as_str()));
                return Err(Error::NoMatch {
                    field: field.to_owned(),
                    name: name.clone(),
                    nearest,
                });
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// A tree from a checkpoint's tensor names and stored shapes, for architectures we cannot run: a matrix is a
    /// Linear unless its name says embedding, a vector is a Norm.
    pub fn from_tensors<'a>(
        tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
        config: &Value,
    ) -> Self {
        let tensors: HashMap<&str, &[usize]> = tensors.collect();
        let number = |key: &str| config[key].as_u64().unwrap_or(0) as usize;
        let mut names: Vec<&str> = tensors.keys().copied().collect();
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        let model_type = config["model_type"].as_str().unwrap_or_default().to_owned();
        let heads = number("num_attention_heads");
        let hidden_size = number("hidden_size");
        let mut tree = Self::new(ModelFacts {
            hidden_size,
            num_layers: number("num_hidden_layers"),
            num_heads: heads,
            num_kv_heads: config["num_key_value_heads"]
                .as_u64()
                .map_or(heads, |n| n as usize),
            head_dim: config["head_dim"]
                .as_u64()
                .map_or(hidden_size / heads.max(1), |n| n as usize),
            vocab_size: number("vocab_size"),
            max_positions: number("max_position_embeddings"),
            ..ModelFacts::default()
        });
        for name in names {
            let Some(path) = name.strip_suffix(".weight") else {
                continue;
            };
            let bias = tensors.contains_key(format!("{path}.bias").as_str());
            let leaf = path.rsplit('.').next().unwrap_or(path);
            let module = match *tensors[name] {
                [dim] => ModuleInfo::norm(path, dim, bias),
                [rows, dim]
                    if leaf.contains("embed") || matches!(leaf, "wte" | "wpe" | "shared") =>
                {
                    ModuleInfo::embedding(path, rows, dim)
                }
                [a, b] if model_type == "gpt2" && leaf.starts_with("c_") => {
                    ModuleInfo::conv1d(path, a, b, bias)
                }
                [out, inside] => ModuleInfo::linear(path, inside, out, bias),
                _ => continue,
            };
            tree.push(module);
        }
        let find = |leaves: &[&str]| {
            tree.modules
                .iter()
                .find(|m| leaves.contains(&m.path.rsplit('.').next().unwrap_or("")))
                .map(|m| m.path.clone())
        };
        let input = find(&["embed_tokens", "wte", "word_embeddings", "shared"]);
        let output = find(&["lm_head", "embed_out"]);
        let task_heads = tree
            .modules
            .iter()
            .filter(|m| matches!(m.path.as_str(), "classifier" | "score"))
            .map(|m| m.path.clone())
            .collect();
        if output.is_none()
            && let Some(path) = &input
            && config["tie_word_embeddings"].as_bool() != Some(false)
        {
            let id = tree.by_path[path];
            let (rows, dim) = (
                tree.modules[id.0].in_features,
                tree.modules[id.0].out_features,
            );
            tree.push(
                ModuleInfo::linear("lm_head", dim, rows, false)
                    .with_weight(format!("{path}.weight")),
            );
            tree.facts.output_embedding = Some("lm_head".to_owned());
            tree.facts.tied = true;
        } else {
            tree.facts.output_embedding = output;
        }
        tree.facts.input_embedding = input;
        tree.facts.task_heads = task_heads;
        tree.facts.model_type = model_type;
        tree
    }
}

/// Sort key in which numbers count as numbers.
fn natural(name: &str) -> Vec<(usize, &str)> {
    name.split('.')
        .map(|part| part.parse().map_or((usize::MAX, part), |n| (n, "")))
        .collect()
}

/// Where one adapter sits.
#[derive(Clone, Debug)]
pub struct Site {
    /// The module; None for the model as a whole.
    pub id: Option<ModuleId>,
    /// Its path; empty for the model as a whole.
    pub path: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Width of its input; rows of an embedding.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// Index of its layer.
    pub layer: Option<usize>,
}

impl Site {
    /// The model as a whole: virtual tokens and prefixes.
    pub fn root() -> Self {
        Self {
            id: None,
            path: String::new(),
            kind: ModuleKind::Container,
            in_features: 0,
            out_features: 0,
            layer: None,
        }
    }
}

/// Whether a path, or one of the modules it lies in, ends with `name`.
fn is_below(path: &str, name: &str) -> bool {
    let ends = path.match_indices('.').map(|(at, _)| at);
    ends.chain([path.len()])
        .any(|end| path[..end].ends_with(name))
}
