//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use peft::ops::{Compose, MergeDType};

/// Fine-tune large pretrained models by training few parameters.
#[derive(Debug, Parser)]
#[command(name = "peft", version, about, arg_required_else_help = true, after_help = AFTER)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
    /// Print the result as JSON on stdout
    #[arg(long, global = true, display_order = 900)]
    pub(crate) json: bool,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true, display_order = 901)]
    pub(crate) quiet: bool,
}

const AFTER: &str = "MODEL is a folder in Hugging Face's layout, a .gguf file, or a hub id (owner/name[@revision]); \
an adapter is a folder in Hugging Face PEFT's layout or a hub id.\n\
Exit codes: 0 done, 1 failed, 2 bad usage.";

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Train as a configuration file says
    Train(Train),
    /// Measure loss and accuracy on a dataset
    Eval(Eval),
    /// Generate text
    Generate(Generate),
    /// Write a model's logits for given token ids
    Logits(Logits),
    /// Merge adapters into a full checkpoint
    Merge(Merge),
    /// Write a model with its linear layers quantised
    Quantize(Quantize),
    /// Show a model's modules, and what an adapter changes or would
    Inspect(Inspect),
    /// List the methods, or show one
    Methods(Methods),
    /// Write a fresh adapter
    Init(Init),
    /// Write an adapter in another library's layout
    Export(Export),
    /// List the devices of this build and machine
    Devices(Devices),
}

/// A model with adapters stacked on it.
#[derive(Args, Debug)]
pub(crate) struct Subject {
    /// Model folder, .gguf file or hub id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folder or hub id, or NAME=ADAPTER; repeat it to stack several, the first innermost
    #[arg(long)]
    pub(crate) adapter: Vec<String>,
    /// Where to run: cpu, wgpu where the build has it, or auto for the best there is
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
}

/// How the model's weights are kept.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Kept {
    /// Quantise the linear layers of the blocks on loading: nf4, nf4_single, int8, q8_0, q5_1, q5_0, q4_1 or q4_0
    #[arg(long, value_name = "FORMAT", value_parser = quantize)]
    pub(crate) quantize: Option<peft::models::Quantize>,
    /// f32, or bf16: weights that are stored in single precision are kept in half of it
    #[arg(long, default_value = "f32", value_parser = precision)]
    pub(crate) precision: peft::tensor::Precision,
}

/// How several adapters combine.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Combine {
    /// How several adapters combine: stack, fuse (by an AdapterHub fusion that is among them), average, or parallel (each on
    /// its own, a result for each)
    #[arg(long, default_value = "stack", value_parser = compose)]
    pub(crate) compose: Compose,
}

#[derive(Args, Debug)]
pub(crate) struct Train {
    /// Configuration: .toml, .yaml or .json
    pub(crate) config: PathBuf,
    /// Override a key: --set train.steps=100
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Most resident memory, such as 2GiB: what is predicted to be more keeps the optimizer's moments on disk, or is refused
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory_limit: Option<u64>,
    /// Where to run, whatever the configuration says: cpu, wgpu where the build has it, or auto
    #[arg(long)]
    pub(crate) device: Option<String>,
    /// Go on from the newest checkpoint in the output folder
    #[arg(long)]
    pub(crate) resume: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Devices {
    /// Measure how fast this one multiplies: cpu, wgpu where the build has it, or auto
    #[arg(long, value_name = "DEVICE", num_args = 0..=1, default_missing_value = "auto")]
    pub(crate) bench: Option<String>,
    /// With --bench: rows and columns of the matrices, a multiple of 64
    #[arg(long, default_value_t = 1024, value_parser = positive)]
    pub(crate) size: usize,
}

#[derive(Args, Debug)]
pub(crate) struct Eval {
    #[command(flatten)]
    pub(crate) subject: Subject,
    #[command(flatten)]
    pub(crate) combine: Combine,
    #[command(flatten)]
    pub(crate) kept: Kept,
    /// Rows: .jsonl or .csv
    #[arg(long)]
    pub(crate) data: PathBuf,
    /// Rows of one forward pass
    #[arg(long, default_value_t = 8, value_parser = positive)]
    pub(crate) batch_size: usize,
    /// Longest row in tokens; longer ones are cut
    #[arg(long, default_value_t = 512, value_parser = positive)]
    pub(crate) max_length: usize,
    /// Only the first rows
    #[arg(long, value_name = "ROWS", value_parser = positive)]
    pub(crate) limit: Option<usize>,
    /// Let the adapters vote: the majority of their answers (prompt ensembling)
    #[arg(long, requires = "adapter")]
    pub(crate) vote: bool,
    /// Also choose among the completions the data has (done by itself where they are few)
    #[arg(long)]
    pub(crate) choices: bool,
    /// The task of rows that do not say theirs, for methods that learn several
    #[arg(long, value_name = "NUMBER")]
    pub(crate) task: Option<u32>,
}

#[derive(Args, Debug)]
pub(crate) struct Generate {
    #[command(flatten)]
    pub(crate) subject: Subject,
    #[command(flatten)]
    pub(crate) combine: Combine,
    #[command(flatten)]
    pub(crate) kept: Kept,
    /// What to go on from, or what the user says in a chat
    #[arg(long)]
    pub(crate) prompt: String,
    /// Use the chat template, and fail if the model has none (the default is to use it where there is one)
    #[arg(long, conflicts_with = "raw")]
    pub(crate) chat: bool,
    /// Leave the chat template aside
    #[arg(long)]
    pub(crate) raw: bool,
    /// What the system says in a chat
    #[arg(long, conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Tokens at most
    #[arg(long, default_value_t = 128, value_parser = positive)]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the likeliest token; higher is wilder
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_parser = temperature)]
    pub(crate) temperature: f32,
    /// Draw from this many likeliest tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_parser = share)]
    pub(crate) top_p: f32,
    /// Make tokens that have occurred less likely; 1 is off
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_parser = factor)]
    pub(crate) repetition_penalty: f32,
    /// Decides the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// End where this text comes; may be repeated
    #[arg(long)]
    pub(crate) stop: Vec<String>,
    /// The task, for methods that learn several
    #[arg(long, value_name = "NUMBER")]
    pub(crate) task: Option<u32>,
}

#[derive(Args, Debug)]
pub(crate) struct Logits {
    #[command(flatten)]
    pub(crate) subject: Subject,
    #[command(flatten)]
    pub(crate) combine: Combine,
    /// JSON: {"input_ids": [[..]], "attention_mask": [[..]]?, "task_ids": [..]?, "adapter_names": [..]?}; names are those of
    /// --adapter NAME=ADAPTER, or "__base__"
    #[arg(long)]
    pub(crate) input: PathBuf,
    /// The safetensors file to write
    #[arg(long)]
    pub(crate) output: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Merge {
    /// Model folder, .gguf file or hub id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folder or hub id; repeat it to merge several in order
    #[arg(long, required = true)]
    pub(crate) adapter: Vec<String>,
    /// Folder of the new checkpoint
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// On a quantised base: dequantized adds the change to the values its codes stand for (the default), original to the
    /// weights from before, which --base has
    #[arg(long, value_name = "WHAT", value_parser = ["dequantized", "original"], requires_if("original", "base"))]
    pub(crate) onto: Option<String>,
    /// With --onto original: the model from before the quantisation
    #[arg(long, value_name = "MODEL", requires = "onto")]
    pub(crate) base: Option<String>,
    /// Element type: keep, f32, bf16 or f16 (keep: each tensor's own; where it is quantised, f32 in a GGUF and the type of
    /// the other tensors in a folder)
    #[arg(long, default_value = "keep", value_parser = dtype)]
    pub(crate) dtype: MergeDType,
    /// Largest file, such as 5GB or 500MiB
    #[arg(long, default_value = "5GB", value_parser = size)]
    pub(crate) max_shard_size: u64,
    /// Folder for an adapter of those members of a union that cannot be merged; without it all have to be
    #[arg(long)]
    pub(crate) rest: Option<PathBuf>,
    /// Replace a checkpoint or a rest that is there already
    #[arg(long)]
    pub(crate) overwrite: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Quantize {
    /// Model folder, .gguf file or hub id
    pub(crate) model: String,
    /// Folder of the new checkpoint, in bitsandbytes' layout
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// nf4 (scales in 8 bits too), nf4_single (scales in f32) or int8
    #[arg(long, default_value = "nf4", value_parser = quantization)]
    pub(crate) format: peft::models::Quantize,
    /// Largest file, such as 5GB or 500MiB
    #[arg(long, default_value = "5GB", value_parser = size)]
    pub(crate) max_shard_size: u64,
    /// Replace a checkpoint that is there already
    #[arg(long)]
    pub(crate) overwrite: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// Model folder, .gguf file or hub id
    #[arg(long, required_unless_present = "train_config")]
    pub(crate) model: Option<String>,
    /// Adapter folder or hub id, or NAME=ADAPTER; repeat it to stack several, the first innermost
    #[arg(long)]
    pub(crate) adapter: Vec<String>,
    /// Instead of a model: predict peak memory and time of a step of the run with this configuration, on this machine
    #[arg(long, value_name = "CONFIG", conflicts_with_all = ["model", "adapter", "config", "target_modules", "adapted"])]
    pub(crate) train_config: Option<PathBuf>,
    /// What an adapter of this configuration would change
    #[arg(long, value_name = "ADAPTER_CONFIG", conflicts_with = "adapter")]
    pub(crate) config: Option<PathBuf>,
    /// What these targets match: names, separated by spaces or commas, a regular expression, or all-linear
    #[arg(long, value_name = "TARGETS", num_args = 1.., conflicts_with_all = ["adapter", "config"])]
    pub(crate) target_modules: Option<Vec<String>>,
    /// Modules to leave alone, written the same way
    #[arg(long, value_name = "TARGETS", requires = "target_modules")]
    pub(crate) exclude_modules: Option<String>,
    /// With --target-modules: count what this method would train there
    #[arg(long, value_name = "ID", requires = "target_modules")]
    pub(crate) method: Option<String>,
    /// Override a field of the configuration: --set r=16
    #[arg(long, value_name = "FIELD=VALUE")]
    pub(crate) set: Vec<String>,
    /// Only the modules that are adapted, and the totals
    #[arg(long)]
    pub(crate) adapted: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Methods {
    /// One method in full
    pub(crate) id: Option<String>,
    /// Count what each method's example would train on this model, on other modules where it has none of the example's
    #[arg(long)]
    pub(crate) model: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Export {
    /// The model the adapter is for: folder, .gguf file or hub id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folder or hub id
    #[arg(long)]
    pub(crate) adapter: String,
    /// adapterhub: folders of AdapterHub's `adapters` library, read there with use_safetensors=True
    #[arg(long, default_value = "adapterhub", value_parser = ["adapterhub"])]
    pub(crate) format: String,
    /// The adapter's name in there
    #[arg(long, default_value = "adapter")]
    pub(crate) name: String,
    /// Folder to write; a fusion makes one folder in it for each member and one for the fusion
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// Replace an adapter that is there already
    #[arg(long)]
    pub(crate) overwrite: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Init {
    /// Model folder, .gguf file or hub id
    #[arg(long)]
    pub(crate) model: String,
    /// The adapter's configuration: adapter_config.json, or the same as .toml or .yaml
    #[arg(long)]
    pub(crate) config: PathBuf,
    /// Folder of the new adapter
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// Decides the initial values
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Override a field of the configuration: --set r=16
    #[arg(long, value_name = "FIELD=VALUE")]
    pub(crate) set: Vec<String>,
    /// Classes, for task_type SEQ_CLS on a model without a head
    #[arg(long, value_parser = positive)]
    pub(crate) num_labels: Option<usize>,
    /// Replace an adapter that is there already
    #[arg(long)]
    pub(crate) overwrite: bool,
}

fn compose(text: &str) -> Result<Compose, String> {
    text.parse()
        .map_err(|_| format!("has to be one of {}", Compose::NAMES.join(", ")))
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("has to be a whole number from 1".to_owned()),
        Ok(n) => Ok(n),
    }
}

fn number(text: &str, fits: impl Fn(f32) -> bool, range: &str) -> Result<f32, String> {
    let number = text
        .parse()
        .ok()
        .filter(|n: &f32| n.is_finite() && fits(*n));
    number.ok_or_else(|| format!("has to be a number {range}"))
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, |n| n >= 0.0, "from 0")
}

fn share(text: &str) -> Result<f32, String> {
    number(text, |n| n > 0.0 && n <= 1.0, "above 0, and at most 1")
}

fn factor(text: &str) -> Result<f32, String> {
    number(text, |n| n > 0.0, "above 0")
}

fn dtype(text: &str) -> Result<MergeDType, String> {
    text.parse()
        .map_err(|_| format!("has to be one of {}", MergeDType::NAMES.join(", ")))
}

fn quantize(text: &str) -> Result<peft::models::Quantize, String> {
    let names = peft::models::Quantize::NAMES.join(", ");
    text.parse()
        .map_err(|_| format!("has to be one of {names}"))
}

fn precision(text: &str) -> Result<peft::tensor::Precision, String> {
    text.parse().map_err(|_| "has to be f32 or bf16".to_owned())
}

fn quantization(text: &str) -> Result<peft::models::Quantize, String> {
    const NAMES: [&str; 3] = ["nf4", "nf4_single", "int8"];
    text.parse()
        .ok()
        .filter(|_| NAMES.contains(&text))
        .ok_or_else(|| format!("has to be one of {}", NAMES.join(", ")))
}

fn size(text: &str) -> Result<u64, String> {
    peft::io::parse_size(text).map_err(|e| e.to_string())
}
