//! The fields of `adapter_config.json` that the core reads for every method.

use serde::Deserialize;
use serde_json::Value;

use crate::{Error, ModuleTree, Result, Targets, in_words, matcher};

/// Fields shared by methods. A field a method does not have is simply absent from its configuration.
#[derive(Clone, Debug, Default)]
pub struct Common {
    /// `CAUSAL_LM`, `SEQ_CLS`, ...
    pub task_type: Option<String>,
    /// Where the base model came from.
    pub base_model_name_or_path: Option<String>,
    /// Modules to adapt.
    pub target_modules: Option<Targets>,
    /// Modules to leave alone.
    pub exclude_modules: Option<Targets>,
    /// Layers to adapt.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the list the layers are in.
    pub layers_pattern: Vec<String>,
    /// Ranks that differ, by pattern, in the order given.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas that differ, by pattern, in the order given.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules trained and saved whole.
    pub modules_to_save: Vec<String>,
    /// Rows of embeddings to train: the module's name (None = the input embedding) and the rows.
    pub trainable_token_indices: Vec<(Option<String>, Vec<u32>)>,
    /// Which biases to train.
    pub bias: Bias,
    /// Whether both sides of a tied pair of embeddings are adapted together.
    pub ensure_weight_tying: bool,
    /// Whether the configuration comes from a saved adapter: HF writes true into every file.
    pub inference_mode: bool,
    /// Whether the parameters of a file follow. What it was trained with is settled then: HF writes names and patterns that
    /// meant nothing on the model into the file, so they are told of and not refused.
    pub finished: bool,
    /// Whether a classification task brings its head along.
    pub(crate) implies_head: bool,
}

/// The two usual names of a classification head, which HF adds to `modules_to_save`; a model has one at most.
pub(crate) const HF_HEADS: [&str; 2] = ["classifier", "score"];

/// `bias` of HF's tuners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of adapted modules.
    Adapted,
}

fn field<'a, T: Deserialize<'a>>(config: &'a Value, name: &str) -> Result<Option<T>> {
    match &config[name] {
        Value::Null => Ok(None),
        value => T::deserialize(value)
            .map(Some)
            .map_err(|e| Error::config(name, in_words(&e))),
    }
}

fn one_or_many<T: for<'a> Deserialize<'a>>(config: &Value, name: &str) -> Result<Option<Vec<T>>> {
    match &config[name] {
        Value::Null => Ok(None),
        Value::Array(_) => field(config, name),
        _ => Ok(field(config, name)?.map(|one| vec![one])),
    }
}

/// A JSON object's entries, in the order given.
fn pairs<T: for<'a> Deserialize<'a>>(config: &Value, name: &str) -> Result<Vec<(String, T)>> {
    match &config[name] {
        Value::Null => Ok(Vec::new()),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| match T::deserialize(value) {
                Ok(value) => Ok((key.clone(), value)),
                Err(e) => Err(Error::config(format!("{name}.{key}"), in_words(&e))),
            })
            .collect(),
        other => Err(Error::config(
            name,
            format!("expected a table, got {other}"),
        )),
    }
}

/// Ranks by pattern. HF keeps something else under the same name where ranks are found by training, masks of its triplets:
/// those are the method's.
fn rank_pattern(config: &Value) -> Result<Vec<(String, usize)>> {
    let masks = config["rank_pattern"]
        .as_object()
        .is_some_and(|map| !map.is_empty() && map.values().all(Value::is_array));
    if masks {
        return Ok(Vec::new());
    }
    pairs(config, "rank_pattern")
}

impl Common {
    /// Whether a classification head is trained along: HF adds its two usual names to `modules_to_save` then, of which
    /// a model has one at most.
    pub fn trains_head(&self) -> bool {
        self.implies_head && matches!(self.task_type.as_deref(), Some("SEQ_CLS" | "TOKEN_CLS"))
    }

    /// Reads the shared fields.
    ///
    /// # Errors
    /// If one has the wrong type or contradicts another.
    pub fn from_config(config: &Value) -> Result<Self> {
        let tokens = match &config["trainable_token_indices"] {
            Value::Object(_) => pairs::<Vec<u32>>(config, "trainable_token_indices")?
                .into_iter()
                .map(|(name, ids)| (Some(name), ids))
                .collect(),
            _ => field::<Vec<u32>>(config, "trainable_token_indices")?
                .map(|ids| vec![(None, ids)])
                .unwrap_or_default(),
        };
        let bias = match field::<String>(config, "bias")?.as_deref() {
            None | Some("none") => Bias::None,
            Some("all") => Bias::All,
            Some(only) if only.ends_with("_only") => Bias::Adapted,
            Some(other) => {
                return Err(Error::config(
                    "bias",
                    format!("{other:?} is not one of none, all, <method>_only"),
                ));
            }
        };
        let mut common = Self {
            task_type: field(config, "task_type")?,
            base_model_name_or_path: field(config, "base_model_name_or_path")?,
            target_modules: field(config, "target_modules")?,
            exclude_modules: field(config, "exclude_modules")?,
            layers_to_transform: one_or_many(config, "layers_to_transform")?,
            layers_pattern: one_or_many(config, "layers_pattern")?.unwrap_or_default(),
            rank_pattern: rank_pattern(config)?,
            alpha_pattern: pairs(config, "alpha_pattern")?,
            modules_to_save: one_or_many(config, "modules_to_save")?.unwrap_or_default(),
            trainable_token_indices: tokens,
            bias,
            ensure_weight_tying: field(config, "ensure_weight_tying")?.unwrap_or(false),
            inference_mode: field(config, "inference_mode")?.unwrap_or(false),
            finished: false,
            implies_head: true,
        };
        // HF's configurations without that field train no head, and their files hold none.
        common.implies_head = !common.inference_mode || config.get("modules_to_save").is_some();
        // HF reads an empty name as none.
        common
            .layers_pattern
            .retain(|name: &String| !name.is_empty());
        if !common.layers_pattern.is_empty() && common.layers_to_transform.is_none() {
            return Err(Error::config("layers_pattern", "needs layers_to_transform"));
        }
        Ok(common)
    }

    /// `modules_to_save` as it applies to a model: with a classification task its own head, and without the other of
    /// HF's two usual names.
    pub(crate) fn saved_modules(&self, tree: &ModuleTree) -> Vec<String> {
        let mut names = self.modules_to_save.clone();
        if self.trains_head() {
            let heads = &tree.facts().task_heads;
            names.retain(|n| heads.contains(n) || !HF_HEADS.contains(&n.as_str()));
            names.extend(heads.iter().cloned());
            names.sort_unstable();
            names.dedup();
        }
        names
    }

    /// The rank at a module: that of the first pattern it matches, or the default.
    ///
    /// # Errors
    /// If a pattern is no regular expression, or the rank is 0.
    pub fn rank_at(&self, path: &str, default: usize) -> Result<usize> {
        match matcher::pattern_value(&self.rank_pattern, path)?
            .copied()
            .unwrap_or(default)
        {
            0 => Err(Error::config(
                "r",
                format!("the rank at `{path}` has to be at least 1"),
            )),
            rank => Ok(rank),
        }
    }

    /// Alpha at a module: that of the first pattern it matches, or the default.
    ///
    /// # Errors
    /// If a pattern is no regular expression.
    pub fn alpha_at(&self, path: &str, default: f64) -> Result<f64> {
        Ok(matcher::pattern_value(&self.alpha_pattern, path)?
            .copied()
            .unwrap_or(default))
    }

    /// What becomes of a part of the configuration that means nothing on the model: an error, or a word about it where the
    /// adapter is finished.
    ///
    /// # Errors
    /// The one given, unless [`Common::finished`].
    pub fn unused(&self, error: Error) -> Result<()> {
        matcher::unused(self.finished, error)
    }

    /// Checks that every pattern is used by one of these modules.
    ///
    /// # Errors
    /// If one is not, with the nearest names; none where the adapter is [finished](Common::finished).
    pub fn check_patterns<'a>(&self, paths: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        let keys = self
            .rank_pattern
            .iter()
            .map(|(key, _)| ("rank_pattern", key));
        for (field, key) in keys.chain(
            self.alpha_pattern
                .iter()
                .map(|(key, _)| ("alpha_pattern", key)),
        ) {
            let single = [(key.clone(), ())];
            let mut used = false;
            for path in paths.clone() {
                used |= matcher::pattern_value(&single, path)?.is_some();
            }
            if !used {
                let nearest = crate::nearest(key, paths.clone());
                self.unused(Error::NoMatch {
                    field: field.to_owned(),
                    name: key.clone(),
                    nearest,
                })?;
            }
        }
        Ok(())
    }
}
