//! `peft generate`

use std::time::Instant;

use peft::models::{Finish, GenerateOptions, LoadOptions, Model};
use peft::ops::{self, Compose};
use serde_json::json;

use crate::args::Generate;
use crate::failure::Failure;
use crate::out::Out;
use crate::progress::Progress;

pub(crate) fn run(args: &Generate, out: &Out) -> Result<(), Failure> {
    let adapters = &args.subject.adapter;
    if args.combine.compose != Compose::Parallel || adapters.len() < 2 {
        return one(args, adapters, out);
    }
    for adapter in adapters {
        out.note(&format!("{adapter}:"));
        one(args, std::slice::from_ref(adapter), out)?;
    }
    Ok(())
}

fn one(args: &Generate, adapters: &[String], out: &Out) -> Result<(), Failure> {
    let waiting = Progress::spinner(out, "loading the model");
    let (model, _) = ops::open_composed(
        &args.subject.model,
        adapters,
        args.combine.compose,
        &LoadOptions {
            device: super::device(&args.subject.device, args.kept.precision, out)?,
            quantize: args.kept.quantize,
            ..LoadOptions::default()
        },
    )?;
    let (prompt, special) = prompt(args, &model)?;
    drop(waiting);
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        stop: args.stop.clone(),
        stop_tokens: Vec::new(),
        seed: args.seed,
        task: args.task,
    };
    let begun = Instant::now();
    let mut printed = Ok(());
    let generated = model.generate(&prompt, special, &options, &mut |text| {
        if !out.json && printed.is_ok() {
            printed = out.text(text);
        }
    })?;
    printed?;
    let took = begun.elapsed().as_secs_f64();
    let speed = generated.tokens.len() as f64 / took.max(1e-9);
    if out.json {
        let finish = match generated.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
        };
        return out.value(&json!({
            "text": generated.text, "tokens": generated.tokens, "finish": finish,
            "prompt_tokens": generated.prompt_tokens, "seconds": took, "tokens_per_second": speed,
        }));
    }
    out.text("\n")?;
    out.note(&format!(
        "{} tokens after {} of the prompt, {speed:.1} tokens/s",
        generated.tokens.len(),
        generated.prompt_tokens
    ));
    Ok(())
}

/// The text to go on from, and whether the tokenizer adds its special tokens (a chat template writes them itself).
fn prompt(args: &Generate, model: &Model) -> Result<(String, bool), Failure> {
    let tokenizer = model.tokenizer()?;
    let has_template = tokenizer.chat_template().is_some();
    if args.raw || !(has_template || args.chat || args.system.is_some()) {
        return Ok((args.prompt.clone(), true));
    }
    if !has_template {
        let option = if args.chat { "--chat" } else { "--system" };
        let detail = "the model has no chat template; without this option the prompt is gone on from as it is";
        return Err(peft::Error::config(option, detail).into());
    }
    let system = args
        .system
        .iter()
        .map(|text| json!({"role": "system", "content": text}));
    let messages: Vec<_> = system
        .chain([json!({"role": "user", "content": args.prompt})])
        .collect();
    Ok((tokenizer.chat_prompt(&messages)?, false))
}
