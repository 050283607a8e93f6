//! `cargo xtask quickstart`: makes examples/quickstart/ again, from the corpus to the trained base model.
//!
//! The corpus is what Hutto and Gilbert rated for VADER (ICWSM 2014, MIT licence; it comes with `cargo xtask models`):
//! snippets of movie reviews, product reviews, editorials and tweets. From it come
//!
//! - train.jsonl and eval.jsonl: clearly positive and clearly negative movie snippets as prompt and completion;
//! - a byte-level BPE tokenizer;
//! - base/: a Llama of 1.3 million parameters, trained from random weights as examples/quickstart/pretrain.toml says.
//!
//! The base sees text alone, never a rating, and none of the snippets in eval.jsonl.

mod corpus;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use peft::io::{Checkpoint, DType, PlanEntry, ShardPlan, StreamWriter};
use serde_json::{Value, json};

use crate::{models, process, workspace};

const EXAMPLE: &str = "examples/quickstart";
/// Where the parts lie until they are complete.
const WORK: &str = "out/quickstart-base";
const VOCABULARY: usize = 4096;

/// Makes the example's files; with `data_only`, stops before the training.
pub(crate) fn run(root: &Path, data_only: bool) -> Result<()> {
    models::run(root)?;
    let corpus = corpus::read(&corpus::unpack(root)?)?;
    prepare(root, &corpus)?;
    if data_only {
        return Ok(());
    }
    let config = format!("{EXAMPLE}/pretrain.toml");
    process::run(
        root,
        env!("CARGO"),
        &["run", "--release", "-p", "peft-cli", "--", "train", &config],
    )?;
    halve(
        &root.join(WORK).join("trained"),
        &root.join(EXAMPLE).join("base"),
    )
}

/// Everything that the training reads.
fn prepare(root: &Path, corpus: &corpus::Corpus) -> Result<()> {
    let example = root.join(EXAMPLE);
    workspace::write(
        &example.join("train.jsonl"),
        &corpus::as_prompts(&corpus.train),
    )?;
    workspace::write(
        &example.join("eval.jsonl"),
        &corpus::as_prompts(&corpus.eval),
    )?;
    let work = root.join(WORK);
    workspace::write(&work.join("text.jsonl"), &corpus::as_texts(&corpus.text))?;
    workspace::write(
        &work.join("text-eval.jsonl"),
        &corpus::as_texts(&corpus.text_eval),
    )?;
    let fresh = work.join("init");
    workspace::write(
        &fresh.join("config.json"),
        &format!("{:#}\n", model_config()),
    )?;
    workspace::write(
        &fresh.join("tokenizer.json"),
        &tokenizer::train(&corpus.text, VOCABULARY)?,
    )?;
    workspace::write(
        &fresh.join("tokenizer_config.json"),
        &format!("{:#}\n", tokenizer::config()),
    )?;
    eprintln!(
        "{} rows to train on, {} to evaluate on; {} texts for the base, {} held out",
        corpus.train.len(),
        corpus.eval.len(),
        corpus.text.len(),
        corpus.text_eval.len()
    );
    Ok(())
}

/// A small Llama: four layers of width 128, input and output embedding tied.
fn model_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "initializer_range": 0.04,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "bos_token_id": null,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": true
    })
}

/// Copies a model folder with its weights rounded to bf16, half the size.
fn halve(from: &Path, to: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(from)?;
    let entries = checkpoint
        .metas()
        .iter()
        .map(|(name, meta)| PlanEntry {
            name: name.clone(),
            shape: meta.shape.clone(),
            dtype: DType::BF16,
        })
        .collect();
    let writer = StreamWriter::create(
        to,
        &ShardPlan::new(entries, u64::MAX)?,
        &BTreeMap::new(),
        true,
    )?;
    for name in checkpoint.names() {
        let (_, values) = checkpoint.f32(name)?;
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
            .collect();
        writer.write(name, &bytes)?;
    }
    let mut config: Value = serde_json::from_str(&workspace::read(&from.join("config.json"))?)?;
    config["dtype"] = json!("bfloat16");
    writer.add_file("config.json", format!("{config:#}\n").as_bytes())?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        writer.add_file(name, workspace::read(&from.join(name))?.as_bytes())?;
    }
    writer
        .finish()
        .with_context(|| format!("writing {}", to.display()))
}
