//! A model to run: loading, forward pass, logits.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use peft_core::serde_json::Value;
use peft_core::{Device, Error, ModuleTree, Network, Pass, Result};
use peft_io::Checkpoint;
use peft_tensor::Tensor;

use crate::arch::{Architecture, layer};
use crate::attend::Rows;
use crate::bert::Bert;
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::gguf;
use crate::gpt2::Gpt2;
use crate::origin::{Origin, Place, other_adapter};
use crate::quantize::Quantize;
use crate::source::{Source, base, io, originals};
use crate::tokenizer::Tokenizer;

/// What a model is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The next token at every position.
    CausalLm,
    /// One label a text.
    SequenceClassification {
        /// How many labels there are.
        num_labels: usize,
    },
    /// The last layer's hidden states.
    Features,
}

/// How to load a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// What for; None = as the class in the checkpoint's `architectures` says.
    pub task: Option<Task>,
    /// Where to run.
    pub device: Device,
    /// Decides the values of a head the checkpoint does not have, and all values of [`Model::from_config`].
    pub seed: u64,
    /// Format to bring the linear layers of the blocks into; None = as they are stored.
    pub quantize: Option<Quantize>,
    /// Whether matrices stored in f32 whose values are all bfloat16's are held as such, which changes no value: published
    /// models are often trained in bfloat16 and stored in f32. It reads them once.
    pub compact: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            task: None,
            device: Device::cpu(),
            seed: 0,
            quantize: None,
            compact: false,
        }
    }
}

/// Rows of token ids, padded to one length on either side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[batch * seq]`, row by row.
    pub ids: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// `[batch * seq]`, true for tokens and false for padding; None = no padding.
    pub mask: Option<Vec<bool>>,
    /// Task of each row, for methods that learn several.
    pub task_ids: Option<Vec<u32>>,
    /// `[batch * seq]`: where several texts share a row, each run of equal numbers is one of them, with positions of its own
    /// and no sight of the others; None = one text a row. Not where text is generated.
    pub segments: Option<Vec<u32>>,
    /// Tokens at the beginning of each row, a run of their own in `segments`, that all texts of the row begin with: they
    /// are run once, and positions of the texts go on behind them. Where [`Model::shares_beginnings`] says so.
    pub shared: usize,
}

impl Batch {
    /// One row.
    pub fn single(ids: Vec<u32>) -> Self {
        let seq = ids.len();
        Self {
            ids,
            batch: 1,
            seq,
            mask: None,
            task_ids: None,
            segments: None,
            shared: 0,
        }
    }

    /// Rows of any lengths, padded on the right with `pad`.
    pub fn padded(rows: &[Vec<u32>], pad: u32) -> Self {
        let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mask: Vec<bool> = rows
            .iter()
            .flat_map(|r| (0..seq).map(move |i| i < r.len()))
            .collect();
        let ids = rows
            .iter()
            .flat_map(|r| (0..seq).map(move |i| r.get(i).copied().unwrap_or(pad)))
            .collect();
        let mask = mask.contains(&false).then_some(mask);
        Self {
            ids,
            batch: rows.len(),
            seq,
            mask,
            task_ids: None,
            segments: None,
            shared: 0,
        }
    }

    /// Where its texts are in `[batch * seq]`: the rows, or in rows with [`segments`](Self::segments) their runs, but for
    /// runs of padding alone.
    pub(crate) fn texts(&self) -> Vec<Range<usize>> {
        let mut texts = Vec::with_capacity(self.batch);
        for row in 0..self.batch {
            let mut first = row * self.seq;
            let Some(segments) = &self.segments else {
                texts.push(first..first + self.seq);
                continue;
            };
            for run in segments[first..first + self.seq].chunk_by(|a, b| a == b) {
                let text = first..first + run.len();
                first = text.end;
                if self
                    .mask
                    .as_ref()
                    .is_none_or(|mask| mask[text.clone()].contains(&true))
                {
                    texts.push(text);
                }
            }
        }
        texts
    }

    /// Whether the first `shared` tokens of each row are its first run.
    fn begins_with_a_run(&self) -> bool {
        let own = |row: &[u32]| {
            let run = row.chunk_by(|a, b| a == b).next();
            run.is_some_and(|run| run.len() == self.shared)
        };
        let mut rows = self.segments.iter().flat_map(|s| s.chunks(self.seq.max(1)));
        self.segments.is_some() && self.mask.is_none() && rows.all(own)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let cells = self.batch.checked_mul(self.seq);
        if self.batch == 0 || self.seq == 0 {
            return Err(Error::config("input_ids", "holds no tokens"));
        }
        if cells != Some(self.ids.len()) {
            let detail = format!(
                "{} ids for {} rows of {}",
                self.ids.len(),
                self.batch,
                self.seq
            );
            return Err(Error::config("input_ids", detail));
        }
        if let Some(mask) = &self.mask
            && mask.len() != self.ids.len()
        {
            return Err(Error::config(
                "attention_mask",
                format!("{} entries for {} ids", mask.len(), self.ids.len()),
            ));
        }
        if self.shared > 0 && !self.begins_with_a_run() {
            let detail = format!(
                "{} tokens that texts have in common have to be the first run of each row of `segments`, of which no key is \
                 masked",
                self.shared
            );
            return Err(Error::config("shared", detail));
        }
        if let Some(segments) = &self.segments
            && segments.len() != self.ids.len()
        {
            return Err(Error::config(
                "segments",
                format!("{} entries for {} ids", segments.len(), self.ids.len()),
            ));
        }
        if let Some(tasks) = &self.task_ids
            && tasks.len() != self.batch
        {
            return Err(Error::config(
                "task_ids",
                format!("{} entries for {} rows", tasks.len(), self.batch),
            ));
        }
        Ok(())
    }
}

/// A model with its weights, adapters and tokenizer.
pub struct Model {
    pub(crate) network: Arc<Network>,
    pub(crate) architecture: Arc<dyn Architecture>,
    config: ModelConfig,
    task: Task,
    origin: Arc<Origin>,
}

impl Model {
    /// Loads a Hugging Face folder, a `.safetensors` file beside its `config.json`, or a `.gguf` file.
    ///
    /// # Errors
    /// If files are missing or damaged, the architecture is unknown, or the weights do not fit the configuration
    /// (everything that does not fit is listed at once).
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self> {
        let name = |e: Error| e.context(path.display().to_string());
        let checkpoint = Checkpoint::open(path).map_err(io)?;
        let folder = match checkpoint.folder() {
            Some(folder) => folder.to_owned(),
            None => path.parent().unwrap_or(Path::new("")).to_owned(),
        };
        let json = match checkpoint.gguf() {
            Some(gguf) => gguf::config(&checkpoint, gguf).map_err(name)?,
            None => peft_io::read_json(&folder.join("config.json")).map_err(io)?,
        };
        let config = ModelConfig::from_json(&json).map_err(name)?;
        check_quantised(&json).map_err(name)?;
        let origin = match checkpoint.gguf() {
            Some(_) => Place::Gguf(checkpoint.clone()),
            None => Place::Folder(folder),
        };
        Self::build(config, Some(&checkpoint), options, origin).map_err(name)
    }

    /// A model of random weights, initialised as Hugging Face does: normal with `initializer_range`, biases 0, norms 1.
    ///
    /// # Errors
    /// If the task and the configuration do not fit.
    pub fn from_config(config: &ModelConfig, options: &LoadOptions) -> Result<Self> {
        Self::build(config.clone(), None, options, Place::None)
    }

    fn build(
        mut config: ModelConfig,
        checkpoint: Option<&Checkpoint>,
        options: &LoadOptions,
        place: Place,
    ) -> Result<Self> {
        let task = match options.task {
            Some(task) => task,
            None => task_of(&config),
        };
        if task == Task::CausalLm && !config.is_causal() {
            return Err(Error::config(
                "task",
                "BERT predicts no next token; ask for classification or features",
            ));
        }
        if let Task::SequenceClassification { num_labels } = task
            && num_labels == 0
        {
            return Err(Error::config("num_labels", "has to be at least 1"));
        }
        let source = match checkpoint {
            Some(checkpoint) => Some(Source::new(checkpoint, &config, task == Task::Features)?),
            None => None,
        };
        if let Some(source) = &source {
            if let Some(rope) = source.rope(config.rope.clone())? {
                config.rope = Some(rope);
            }
            let (tree, _) = architecture(&config, &task);
            let embedding = tree
                .facts()
                .input_embedding
                .as_ref()
                .map(|path| format!("{path}.weight"));
            if tree.facts().tied
                && let Some(embedding) = embedding
                && source.head_differs(&embedding)?
            {
                tracing::warn!(
                    "the checkpoint says its embeddings are tied but stores two that differ: not tied"
                );
                config = config.with_tied(false);
            }
        }
        let (tree, code) = architecture(&config, &task);
        let mut fresh = tree.facts().task_heads.clone();
        if config.model_type == "bert" {
            fresh.extend(["bert.pooler.dense", "pooler.dense"].map(str::to_owned));
        }
        let base = base(tree, &config, source.as_ref(), &fresh, options)?;
        let origin = Arc::new(Origin::new(place));
        let mut network = Network::new(base);
        if let (Some(checkpoint), Some(_)) = (checkpoint, options.quantize) {
            let features = task == Task::Features;
            network.set_originals(originals(checkpoint, &config, features, &options.device));
        }
        network.set_tokenizer(origin.clone());
        network.set_tensors(Arc::new(other_adapter));
        Ok(Self {
            network: Arc::new(network),
            architecture: code.into(),
            config,
            task,
            origin,
        })
    }

    /// Base weights and adapters.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The same, to attach, load, merge or delete adapters.
    ///
    /// # Errors
    /// While a gradient is still to be taken through this model (a loss that was made with gradient checkpointing and
    /// is still there).
    pub fn network_mut(&mut self) -> Result<&mut Network> {
        let busy = "the model is in use by a loss that is still there; drop it first";
        Arc::get_mut(&mut self.network).ok_or_else(|| Error::other(busy))
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What it was loaded for.
    pub fn task(&self) -> Task {
        self.task
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.network.device()
    }

    /// The folder it was loaded from; None for a GGUF or a fresh model.
    pub fn folder(&self) -> Option<&Path> {
        self.origin.folder()
    }

    /// Its tokenizer, read on first use.
    ///
    /// # Errors
    /// If the model has none, or one that cannot be read.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        self.origin.tokenizer()
    }

    /// Gives up the tokenizer's memory until it is wanted again, some 20 MB for a vocabulary of 50 thousand.
    pub fn forget_tokenizer(&self) {
        self.origin.forget();
    }

    /// Gives the model a tokenizer, if it has not read one yet.
    ///
    /// # Errors
    /// If it has one.
    pub fn set_tokenizer(&mut self, tokenizer: Tokenizer) -> Result<()> {
        self.origin.set(tokenizer)
    }

    /// Whether texts of a row may have a beginning in common ([`Batch::shared`]): nothing behind it changes what the model
    /// and its adapters make of it.
    pub fn shares_beginnings(&self) -> bool {
        let config = &self.config;
        self.task() == Task::CausalLm
            && config.windows.iter().all(Option::is_none)
            && self.network.by_rows()
    }

    /// The pass with the batch's tasks, if it has some.
    pub(crate) fn pass(&self, batch: &Batch, pass: &Pass) -> Result<Pass> {
        batch.check()?;
        let vocab = self.config.vocab_size;
        if let Some(id) = batch.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::config(
                "input_ids",
                format!("token {id} is beyond the vocabulary of {vocab}"),
            ));
        }
        if batch.shared > 0 && (!self.shares_beginnings() || pass.adapter_names.is_some()) {
            let detail = "model or adapters need each text whole, its beginning included";
            return Err(Error::config("shared", detail));
        }
        let mut pass = pass.clone();
        if let Some(tasks) = &batch.task_ids {
            pass.task_ids = Some(Arc::new(tasks.clone()));
        }
        if let Some(names) = &pass.adapter_names {
            if names.len() != batch.batch {
                let detail = format!("{} entries for {} rows", names.len(), batch.batch);
                return Err(Error::config("adapter_names", detail));
            }
            self.network.check_adapter_names(names)?;
        }
        Ok(pass)
    }

    /// Hidden states after the last norm, `[B, V + S, hidden]`: V virtual tokens of prompt adapters come first.
    /// Positions count from 0 (after a prefix: from its length), also on rows padded on the left, as in a plain
    /// forward pass of `transformers`.
    ///
    /// # Errors
    /// If ids, mask or length do not fit the model.
    pub fn forward(&self, batch: &Batch, pass: &Pass) -> Result<Tensor> {
        let pass = self.pass(batch, pass)?;
        self.architecture.hidden(&self.network, batch, None, &pass)
    }

    /// One block alone on hidden states `[B, S, hidden]` of rows without padding, computed again in the backward
    /// pass if `pass` says so: what it costs can be measured so.
    ///
    /// # Errors
    /// If there is no such block, or whatever its modules say.
    pub fn block(&self, number: usize, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        let rows = Rows {
            batch,
            seq,
            keys: None,
            seen: 0,
            virtual_tokens: 0,
            segments: None,
            shared: 0,
        };
        let (pass, architecture) = (rows.pass(pass), self.architecture.clone());
        layer(number, &self.network, x, &pass, move |network, x, pass| {
            architecture.block(number, network, x, &rows, pass)
        })
    }

    /// Causal: `[B, V + S, vocab]`, virtual tokens included; classification: `[B, labels]`; features: the hidden
    /// states of [`Model::forward`].
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn logits(&self, batch: &Batch, pass: &Pass) -> Result<Tensor> {
        let pass = self.pass(batch, pass)?;
        let (architecture, network) = (&self.architecture, &self.network);
        let hidden = || architecture.hidden(network, batch, None, &pass);
        match self.task {
            Task::Features => hidden(),
            Task::CausalLm => architecture.head(network, &hidden()?, &pass),
            Task::SequenceClassification { .. } => {
                let rows = architecture.texts(network, batch, &pass)?;
                architecture.head(network, &rows, &pass)
            }
        }
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Model({}, {:?}, {:?})",
            self.config.model_type, self.task, self.network
        )
    }
}

fn architecture(config: &ModelConfig, task: &Task) -> (ModuleTree, Box<dyn Architecture>) {
    match config.model_type.as_str() {
        "bert" => {
            let (tree, code) = Bert::build(config, task);
            (tree, Box::new(code))
        }
        "gpt2" => {
            let (tree, code) = Gpt2::build(config, task);
            (tree, Box::new(code))
        }
        _ => {
            let (tree, code) = Decoder::build(config, task);
            (tree, Box::new(code))
        }
    }
}

/// Refuses quantised checkpoints of other libraries, whose tensors have other names and meanings.
fn check_quantised(json: &Value) -> Result<()> {
    let field = "quantization_config.quant_method";
    match json["quantization_config"]["quant_method"].as_str() {
        None | Some("bitsandbytes") => Ok(()),
        Some(other) => Err(Error::config(
            field,
            format!("{other:?} is not read; bitsandbytes is, and GGUF files are"),
        )),
    }
}

/// The task of the class a checkpoint was saved from.
fn task_of(config: &ModelConfig) -> Task {
    let class = config.architectures.first().map_or("", String::as_str);
    if class.ends_with("ForSequenceClassification") {
        return Task::SequenceClassification {
            num_labels: config.num_labels.unwrap_or(2),
        };
    }
    if !config.is_causal() || class.ends_with("Model") && !class.ends_with("LMHeadModel") {
        return Task::Features;
    }
    Task::CausalLm
}
