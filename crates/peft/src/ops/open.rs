//! Opening a model, runnable or not, with adapters on it.

use std::path::{Path, PathBuf};

use peft_core::serde_json::Value;
use peft_core::{Base, BaseWeight, Device, Error, ModuleKind, ModuleTree, Network, Result};
use peft_io::{AdapterFiles, Checkpoint, StoredFormat};
use peft_models::{LoadOptions, MODEL_TYPES, Model, Task};
use peft_tensor::WeightFormat;

use super::adapterhub::reroot;
use super::adapters::tensors_of;
use super::compose::{Compose, Named, combine, read_all};

/// An adapter that was put on a model.
#[derive(Clone, Debug)]
pub struct OpenedAdapter {
    /// Its name on the network.
    pub name: String,
    /// The folder it was read from.
    pub folder: PathBuf,
    /// Its `adapter_config.json`.
    pub config: Value,
}

/// A model to run, with adapters stacked on it in the order given. Without a `task` in `options`, the adapters'
/// `task_type` decides, then the checkpoint.
///
/// # Errors
/// If the model or an adapter cannot be found, read, or does not fit.
pub fn open(
    model: &str,
    adapters: &[String],
    options: &LoadOptions,
) -> Result<(Model, Vec<OpenedAdapter>)> {
    open_composed(model, adapters, Compose::Stack, options)
}

/// As [`open`], with the adapters combined in another way.
///
/// # Errors
/// As there, or if they do not combine like that.
pub fn open_composed(
    model: &str,
    adapters: &[String],
    compose: Compose,
    options: &LoadOptions,
) -> Result<(Model, Vec<OpenedAdapter>)> {
    let path = peft_io::resolve_model(model)?;
    let files = read_all(adapters, compose)?;
    let mut model_options = options.clone();
    if model_options.task.is_none() {
        model_options.task = task_of_adapters(
            files.iter().map(|(_, files)| files),
            config_json(&path).as_ref(),
        )?;
    }
    let mut loaded = Model::load(&path, &model_options)?;
    let opened = stack(loaded.network_mut()?, files, model, &options.device, false)?;
    combine(loaded.network_mut()?, &opened, compose)?;
    warn_of_random_heads(&loaded, &path)?;
    Ok((loaded, opened))
}

/// Loads adapters onto a network, each under the name its specification gives it, or its folder's path.
fn stack(
    network: &mut Network,
    files: Vec<Named>,
    model: &str,
    device: &Device,
    trainable: bool,
) -> Result<Vec<OpenedAdapter>> {
    let mut opened: Vec<OpenedAdapter> = Vec::new();
    for (given, files) in files {
        let AdapterFiles {
            folder,
            mut config,
            tensors,
            metadata,
            ..
        } = files;
        let shown = folder.display().to_string();
        let again = opened.iter().filter(|o| o.folder == folder).count();
        let name = match given {
            Some(name) => name,
            None if again == 0 => shown.clone(),
            None => format!("{shown} #{}", again + 1),
        };
        let mut tensors = tensors_of(tensors, device)?;
        if metadata.get("format").map(String::as_str) == Some("adapterhub") {
            tensors = reroot(network.tree(), &mut config, tensors);
        }
        network
            .load(&name, &config, tensors, trainable)
            .map_err(|e| {
                let made_for = match config["base_model_name_or_path"].as_str() {
                    Some(base) if !base.is_empty() => format!(" (made for {base})"),
                    _ => String::new(),
                };
                e.context(format!("adapter {shown}{made_for} on model {model}"))
            })?;
        opened.push(OpenedAdapter {
            name,
            folder,
            config,
        });
    }
    Ok(opened)
}

/// The task that adapters were trained for, where they say one; `model` is the model's `config.json`. A
/// classification head's size is read from the head an adapter brings.
///
/// # Errors
/// If two adapters are for different tasks.
pub fn task_of_adapters<'a>(
    adapters: impl IntoIterator<Item = &'a AdapterFiles>,
    model: Option<&Value>,
) -> Result<Option<Task>> {
    let mut found: Option<(Task, &Path)> = None;
    for adapter in adapters {
        let task = match adapter.config["task_type"].as_str() {
            Some("CAUSAL_LM") => Task::CausalLm,
            Some("FEATURE_EXTRACTION") => Task::Features,
            Some("SEQ_CLS") => match labels_of(adapter).or_else(|| labels_of_config(model?)) {
                Some(num_labels) => Task::SequenceClassification { num_labels },
                None => Task::SequenceClassification { num_labels: 2 },
            },
            _ => continue,
        };
        match found {
            Some((other, folder)) if other != task => {
                let detail = format!(
                    "is for {task:?}, {} for {other:?}: they cannot be stacked",
                    folder.display()
                );
                return Err(Error::file(&adapter.folder, detail));
            }
            _ => found = Some((task, &adapter.folder)),
        }
    }
    Ok(found.map(|(task, _)| task))
}

/// Rows of the classification head among an adapter's tensors.
fn labels_of(adapter: &AdapterFiles) -> Option<usize> {
    let head = |key: &str| {
        let mut parts = key
            .rsplit('.')
            .skip_while(|part| matches!(*part, "weight" | "default" | "modules_to_save"));
        key.ends_with("weight") && matches!(parts.next(), Some("classifier" | "score"))
    };
    adapter
        .tensors
        .iter()
        .find(|(key, _)| head(key))
        .and_then(|(_, (shape, _))| shape.first().copied())
}

fn labels_of_config(config: &Value) -> Option<usize> {
    let count = config["num_labels"]
        .as_u64()
        .and_then(|n| usize::try_from(n).ok());
    count
        .or_else(|| {
            config["id2label"]
                .as_object()
                .map(peft_core::serde_json::Map::len)
        })
        .filter(|&n| n > 0)
}

/// The `config.json` of a folder, or beside a file; None where there is none that can be read.
pub(super) fn config_json(path: &Path) -> Option<Value> {
    let folder = if path.is_dir() { path } else { path.parent()? };
    let gguf = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if gguf {
        None
    } else {
        peft_io::read_json(&folder.join("config.json")).ok()
    }
}

/// A checkpoint as a network: by the architecture's own module tree where it is known, by names and shapes alone
/// where it is not. Weights are mapped, none is copied.
pub struct Subject {
    /// Its files.
    pub checkpoint: Checkpoint,
    /// Where it is.
    pub path: PathBuf,
    /// Its `config.json`, or the same made from GGUF metadata; null where there is none.
    pub config: Value,
    kind: Kind,
}

enum Kind {
    Model(Box<Model>),
    Names(Box<Network>),
}

impl Subject {
    /// Opens a model by path or hub id. Adapters that will come onto it decide the task, if they say one.
    ///
    /// # Errors
    /// If it cannot be found or read, or its tensors do not fit its configuration.
    pub fn open(model: &str, adapters: &[AdapterFiles], options: &LoadOptions) -> Result<Self> {
        Self::open_for(model, adapters, options)
    }

    fn open_for<'a>(
        model: &str,
        adapters: impl IntoIterator<Item = &'a AdapterFiles>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let path = peft_io::resolve_model(model)?;
        let checkpoint = Checkpoint::open(&path)?;
        let config = config_json(&path);
        let runnable = match &config {
            Some(config) => config["model_type"]
                .as_str()
                .is_some_and(|t| MODEL_TYPES.contains(&t)),
            None => checkpoint
                .gguf()
                .is_some_and(|g| g.architecture().is_ok_and(|a| MODEL_TYPES.contains(&a))),
        };
        if !runnable {
            let config = config.unwrap_or_default();
            let network = Network::new(base_by_names(&checkpoint, &config, &options.device)?);
            return Ok(Self {
                checkpoint,
                path,
                config,
                kind: Kind::Names(Box::new(network)),
            });
        }
        let mut options = options.clone();
        if options.task.is_none() {
            options.task = task_of_adapters(adapters, config.as_ref())?;
        }
        let model = Model::load(&path, &options)?;
        let config = model.config().json().clone();
        Ok(Self {
            checkpoint,
            path,
            config,
            kind: Kind::Model(Box::new(model)),
        })
    }

    /// As [`Subject::open`], with adapters by path or hub id loaded onto it in order.
    ///
    /// # Errors
    /// As there, or if an adapter cannot be read or does not fit.
    pub fn with_adapters(
        model: &str,
        adapters: &[String],
        trainable: bool,
    ) -> Result<(Self, Vec<OpenedAdapter>)> {
        let files = read_all(adapters, Compose::Stack)?;
        let options = LoadOptions::default();
        let mut subject = Self::open_for(model, files.iter().map(|(_, files)| files), &options)?;
        let opened = stack(
            subject.network_mut()?,
            files,
            model,
            &options.device,
            trainable,
        )?;
        Ok((subject, opened))
    }

    /// The model, where its architecture can be run.
    pub fn model(&self) -> Option<&Model> {
        match &self.kind {
            Kind::Model(model) => Some(model),
            Kind::Names(_) => None,
        }
    }

    /// Modules, mapped weights and adapters.
    pub fn network(&self) -> &Network {
        match &self.kind {
            Kind::Model(model) => model.network(),
            Kind::Names(network) => network,
        }
    }

    /// The same, to attach adapters.
    ///
    /// # Errors
    /// While the model is in use.
    pub fn network_mut(&mut self) -> Result<&mut Network> {
        match &mut self.kind {
            Kind::Model(model) => model.network_mut(),
            Kind::Names(network) => Ok(network),
        }
    }

    /// Whether some of its weights are kept in a quantised format.
    pub fn is_quantised(&self) -> bool {
        let float = [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16];
        let weights = self.network().base().weights().values();
        weights
            .filter_map(BaseWeight::as_frozen)
            .any(|w| !float.contains(&w.format()))
    }

    /// The stored tensor of a base parameter: under its own name, with or without the prefix of a class, or under
    /// names of old. None in a GGUF, whose names are others altogether.
    pub fn stored_name(&self, parameter: &str) -> Option<String> {
        let renamed = self.checkpoint.gguf().is_some() && self.model().is_some();
        if renamed {
            None
        } else {
            find_stored(&self.checkpoint, parameter)
        }
    }
}

/// The stored tensor of a parameter, under any of the names that `transformers` takes for it.
fn find_stored(checkpoint: &Checkpoint, parameter: &str) -> Option<String> {
    const PREFIXES: [&str; 3] = ["model.", "transformer.", "bert."];
    let mut names = vec![parameter.to_owned()];
    names.extend(
        PREFIXES
            .iter()
            .filter_map(|p| parameter.strip_prefix(p))
            .map(str::to_owned),
    );
    names.extend(PREFIXES.iter().map(|p| format!("{p}{parameter}")));
    let old = |n: &String| {
        n.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
    };
    names.extend(
        names
            .iter()
            .filter(|n| n.contains("LayerNorm."))
            .map(old)
            .collect::<Vec<_>>(),
    );
    names.into_iter().find(|n| checkpoint.meta(n).is_some())
}

/// Says so where a task's head is neither in the checkpoint nor brought by an adapter: its answers are random.
fn warn_of_random_heads(model: &Model, path: &Path) -> Result<()> {
    let network = model.network();
    let heads = &network.tree().facts().task_heads;
    let untrained = heads.iter().filter(|head| {
        network
            .tree()
            .get(head)
            .is_some_and(|id| !network.changes(id))
    });
    let untrained: Vec<&String> = untrained.collect();
    if untrained.is_empty() {
        return Ok(());
    }
    let checkpoint = Checkpoint::open(path)?;
    for head in untrained {
        if find_stored(&checkpoint, &format!("{head}.weight")).is_none() {
            tracing::warn!(
                "neither the checkpoint nor an adapter has `{head}`: its values are random"
            );
        }
    }
    Ok(())
}

/// The weights that names and shapes show, mapped; tensors in formats that nothing is computed with are left out.
fn base_by_names(checkpoint: &Checkpoint, config: &Value, device: &Device) -> Result<Base> {
    let shapes = checkpoint
        .metas()
        .iter()
        .map(|(name, meta)| (name.as_str(), meta.shape.as_slice()));
    let tree = ModuleTree::from_tensors(shapes, config);
    let mut weights = Vec::new();
    for (_, module) in tree.iter() {
        for (name, transposed) in [
            (&module.weight, module.kind == ModuleKind::Conv1d),
            (&module.bias, false),
        ] {
            let Some(name) = name else { continue };
            let usable = checkpoint
                .meta(name)
                .is_some_and(|m| matches!(m.format, StoredFormat::Weight(_)));
            if usable {
                weights.push((
                    name.clone(),
                    BaseWeight::frozen(checkpoint.weight(name)?, transposed, device),
                ));
            }
        }
    }
    let mut base = Base::new(tree, device);
    for (name, weight) in weights {
        base.insert(name, weight);
    }
    Ok(base)
}
