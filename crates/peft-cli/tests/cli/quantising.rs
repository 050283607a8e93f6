//! `quantize`, every verb on what it writes, training on a quantised base and merging onto one.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{
    copy_model, gap, listing, model, peft, read_json, talking_model, tensors, text, write,
};

/// Quantises a model into a folder.
fn quantise(model: &str, to: &Path, format: &str) -> Value {
    peft([
        "quantize",
        model,
        "--out",
        &text(to),
        "--format",
        format,
        "--json",
    ])
    .json()
}

fn logits(folder: &Path, args: &[&str]) -> Vec<f32> {
    let (input, output) = (folder.join("in.json"), folder.join("out.safetensors"));
    write(
        &input,
        &json!({"input_ids": [[3, 9, 4, 1, 22, 7]]}).to_string(),
    );
    let (input, output_text) = (text(&input), text(&output));
    let mut all = vec!["logits"];
    all.extend(args);
    all.extend(["--input", &input, "--output", &output_text]);
    peft(all).ok();
    tensors(output).into_values().next().unwrap().1
}

/// The header of a file of tensors and its data, as they are stored: reading it as a checkpoint would put parts together.
fn stored(file: &Path) -> (Value, Vec<u8>) {
    let bytes = std::fs::read(file).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

/// A configuration of four steps of LoRA on `base`, whose tokenizer is in it.
fn training(folder: &Path, base: &str, quantize: Option<&str>, adapter: Value) -> String {
    let rows: String = (0..16)
        .map(|i| format!("{}\n", json!({"prompt": format!("w{} ", 3 + i % 9), "completion": format!("w{}", 40 + i % 2)})))
        .collect();
    write(folder.join("rows.jsonl"), &rows);
    let config = json!({
        "model": {"path": base, "quantize": quantize}, "adapter": adapter,
        "data": {"train": text(folder.join("rows.jsonl"))},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 0.02},
        "output": {"dir": text(folder.join("adapter"))},
    });
    let file = folder.join("run.json");
    write(&file, &config.to_string());
    text(file)
}

fn lora() -> Value {
    json!({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]})
}

#[test]
fn what_is_written_is_bitsandbytes_layout_and_runs() {
    let temp = tempfile::tempdir().unwrap();
    let source = talking_model("llama", &temp.path().join("model"));
    let want = logits(temp.path(), &["--model", &source]);
    let mut last = f32::INFINITY;
    for format in ["nf4", "nf4_single", "int8"] {
        let to = temp.path().join(format);
        let report = quantise(&source, &to, format);
        // 7 linear layers in each of 3 blocks.
        assert_eq!(report["quantised"], 21);
        assert_eq!(
            listing(&to),
            [
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json"
            ]
        );
        let settings = &read_json(to.join("config.json"))["quantization_config"];
        assert_eq!(settings["quant_method"], "bitsandbytes");
        assert_eq!(settings["load_in_4bit"], format != "int8");
        assert_eq!(settings["bnb_4bit_use_double_quant"], format == "nf4");
        assert_eq!(settings["llm_int8_skip_modules"], json!(["lm_head"]));
        let (header, data) = stored(&to.join("model.safetensors"));
        let name = "model.layers.0.mlp.down_proj";
        let shape = |name: String| header.get(name).map(|entry| entry["shape"].clone());
        if format == "int8" {
            assert_eq!(shape(format!("{name}.weight")), Some(json!([32, 44])));
            assert_eq!(shape(format!("{name}.SCB")), Some(json!([32])));
            assert_eq!(shape(format!("{name}.weight_format")), Some(json!([])));
        } else {
            // 32 x 44 = 1408 values = 22 blocks.
            assert_eq!(shape(format!("{name}.weight")), Some(json!([704, 1])));
            assert_eq!(shape(format!("{name}.weight.absmax")), Some(json!([22])));
            assert_eq!(shape(format!("{name}.weight.quant_map")), Some(json!([16])));
            let nested = (format == "nf4").then(|| json!([1]));
            assert_eq!(shape(format!("{name}.weight.nested_absmax")), nested);
            let place =
                &header[format!("{name}.weight.quant_state.bitsandbytes__nf4")]["data_offsets"];
            let at = |i: usize| place[i].as_u64().unwrap() as usize;
            let state: Value = serde_json::from_slice(&data[at(0)..at(1)]).unwrap();
            assert_eq!(
                (&state["shape"], &state["dtype"]),
                (&json!([32, 44]), &json!("float32"))
            );
        }
        let off = gap(&logits(temp.path(), &["--model", &text(&to)]), &want);
        assert!(off > 0.0 && off <= last.max(0.1), "{format}: {off}");
        last = off;
        let seen = peft(["inspect", "--model", &text(&to), "--json"])
            .ok()
            .stdout;
        assert!(
            seen.contains(if format == "int8" {
                "\"INT8\""
            } else {
                "\"NF4\""
            }),
            "{seen}"
        );
    }
    let nf4 = text(temp.path().join("nf4"));
    // Quantising while loading gives the weights that were written, so the same text.
    let generate = |model: &str, more: &[&str]| {
        let args = ["generate", "--json", "--model", model, "--prompt", "w5 w6"];
        peft(
            args.into_iter()
                .chain(["--max-new-tokens", "8"])
                .chain(more.iter().copied()),
        )
    };
    let written = generate(&nf4, &[]).json();
    let loaded = generate(&source, &["--quantize", "nf4", "--precision", "bf16"]).json();
    assert_eq!(written["tokens"], loaded["tokens"]);
    generate(&source, &["--quantize", "int4"]).fails(2, &["nf4, nf4_single, int8, q8_0"]);
    generate(&source, &["--precision", "f64"]).fails(2, &["f32 or bf16"]);
    generate(&nf4, &["--quantize", "nf4"]).fails(1, &["NF4 already"]);
    peft(["quantize", &nf4, "--out", &text(temp.path().join("again"))])
        .fails(1, &["quantised already"]);
    peft(["quantize", &source, "--out", &nf4]).fails(1, &["already holds a checkpoint"]);
    peft(["quantize", &source, "--out", &nf4, "--format", "q4_0"])
        .fails(2, &["nf4, nf4_single, int8"]);
    assert!(listing(temp.path().join("again")).is_empty());
}

/// GPT-2 stores `[in, out]` and bitsandbytes `[out, in]`: there and back is the same model.
#[test]
fn gpt2_is_turned() {
    let temp = tempfile::tempdir().unwrap();
    let source = model("gpt2");
    let to = temp.path().join("int8");
    quantise(&source, &to, "int8");
    let stored = tensors(to.join("model.safetensors"));
    let (name, (shape, _)) = stored
        .iter()
        .find(|(n, _)| n.ends_with("h.0.attn.c_attn.weight"))
        .unwrap();
    assert_eq!(shape, &[72, 24], "{name}");
    let want = logits(temp.path(), &["--model", &source]);
    let got = logits(temp.path(), &["--model", &text(&to)]);
    assert!(gap(&got, &want) < 0.02 * want.iter().fold(0.0f32, |a, v| a.max(v.abs())));
}

/// Training with `quantize`, with what `peft quantize` wrote, and merging in both ways.
#[test]
fn qlora_and_its_merges() {
    let temp = tempfile::tempdir().unwrap();
    let source = talking_model("llama", &temp.path().join("model"));
    let nf4 = temp.path().join("nf4");
    quantise(&source, &nf4, "nf4");
    let nf4 = text(nf4);
    let run = |name: &str, base: &str, quantize: Option<&str>| -> Vec<f32> {
        let folder = temp.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        peft(["train", &training(&folder, base, quantize, lora())]).ok();
        tensors(folder.join("adapter/adapter_model.safetensors"))
            .into_values()
            .flat_map(|(_, v)| v)
            .collect()
    };
    let (loading, stored) = (
        run("loading", &source, Some("nf4")),
        run("stored", &nf4, None),
    );
    let plain = run("plain", &source, None);
    // The same base, whether it is quantised on the way or before.
    assert_eq!(loading, stored);
    assert!(gap(&loading, &plain) > 1e-6);

    let adapter = text(temp.path().join("stored/adapter"));
    let merged = |name: &str, args: &[&str]| {
        let to = text(temp.path().join(name));
        let run = peft(
            ["merge", "--adapter", &adapter, "--output", &to]
                .into_iter()
                .chain(args.iter().copied()),
        )
        .ok();
        let config = read_json(Path::new(&to).join("config.json"));
        assert!(config.get("quantization_config").is_none());
        (logits(temp.path(), &["--model", &to]), run.stderr)
    };
    let want = logits(temp.path(), &["--model", &nf4, "--adapter", &adapter]);
    let (got, said) = merged("default", &["--model", &nf4]);
    assert!(
        gap(&got, &want) < 1e-5 && said.contains("--onto original"),
        "{said}"
    );
    let (got, said) = merged("dequantized", &["--model", &nf4, "--onto", "dequantized"]);
    assert!(
        gap(&got, &want) < 1e-5 && !said.contains("note: the base is quantised"),
        "{said}"
    );
    let want = logits(temp.path(), &["--model", &source, "--adapter", &adapter]);
    let (got, _) = merged(
        "original",
        &["--model", &nf4, "--onto", "original", "--base", &source],
    );
    assert!(gap(&got, &want) < 1e-5);

    let out = text(temp.path().join("no"));
    let fails = |code: i32, args: &[&str], words: &[&str]| {
        let all = ["merge", "--adapter", &adapter, "--output", &out];
        peft(all.into_iter().chain(args.iter().copied())).fails(code, words);
    };
    fails(
        1,
        &["--model", &source, "--onto", "dequantized"],
        &["onto", "this one is not"],
    );
    fails(2, &["--model", &nf4, "--onto", "original"], &["--base"]);
    fails(
        1,
        &["--model", &nf4, "--onto", "original", "--base", &nf4],
        &["quantised themselves"],
    );
    fails(
        1,
        &["--model", &source, "--onto", "original", "--base", &source],
        &["not quantised"],
    );
    let other = copy_model("qwen2", &temp.path().join("other"));
    fails(
        1,
        &["--model", &nf4, "--onto", "original", "--base", &other],
        &[],
    );
}

#[test]
fn loftq_trains_on_the_quantised_base_and_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    let source = talking_model("llama", &temp.path().join("model"));
    let mut adapter = lora();
    adapter["init_lora_weights"] = json!("loftq");
    adapter["loftq_config"] = json!({"loftq_bits": 4, "loftq_iter": 1});
    for (name, quantize) in [("own", Some("nf4_single")), ("standing", None)] {
        let folder = temp.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        peft([
            "train",
            &training(&folder, &source, quantize, adapter.clone()),
        ])
        .ok();
    }
    let weights = |name: &str| {
        let file = temp
            .path()
            .join(name)
            .join("adapter/adapter_model.safetensors");
        tensors(file)
            .into_values()
            .flat_map(|(_, v)| v)
            .collect::<Vec<f32>>()
    };
    assert!(weights("own").iter().any(|v| *v != 0.0) && weights("standing") != weights("own"));
    let adapter = text(temp.path().join("standing/adapter"));
    let want = logits(temp.path(), &["--model", &source, "--adapter", &adapter]);
    let to = text(temp.path().join("merged"));
    peft([
        "merge",
        "--model",
        &source,
        "--adapter",
        &adapter,
        "--output",
        &to,
    ])
    .ok();
    assert!(gap(&logits(temp.path(), &["--model", &to]), &want) < 1e-5);
    // Without the weights from before there is nothing to start from.
    let nf4 = temp.path().join("nf4");
    quantise(&source, &nf4, "nf4");
    let folder = temp.path().join("none");
    std::fs::create_dir(&folder).unwrap();
    let mut fields = lora();
    fields["init_lora_weights"] = json!("loftq");
    peft(["train", &training(&folder, &text(&nf4), None, fields)])
        .fails(1, &["loftq", "NF4", "from before"]);
}
