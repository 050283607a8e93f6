//! Damaged and mismatched files: one clear error, exit code 1, nothing left behind.

use std::path::Path;

use serde_json::json;

use crate::common::{adapter, copy_model, listing, model, peft, read_json, tensors, text, write};

/// `merge` has to fail with these words and leave no output.
#[track_caller]
fn merge_fails(model: &str, adapter: &str, words: &[&str]) {
    let temp = tempfile::tempdir().unwrap();
    let target = temp.path().join("out");
    peft([
        "merge",
        "--model",
        model,
        "--adapter",
        adapter,
        "--output",
        &text(&target),
    ])
    .fails(1, words);
    assert_eq!(listing(&temp), [""; 0], "something was left");
}

fn copy_adapter(case: &str, to: &Path) -> String {
    std::fs::create_dir_all(to).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(&adapter(case)).join(name), to.join(name)).unwrap();
    }
    text(to)
}

#[test]
fn truncated_weights() {
    let temp = tempfile::tempdir().unwrap();
    let base = copy_model("llama", temp.path());
    let file = temp.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for keep in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..keep]).unwrap();
        merge_fails(&base, &adapter("llama-qv"), &["model.safetensors"]);
        peft(["inspect", "--model", &base]).fails(1, &["model.safetensors"]);
    }
    std::fs::write(
        &file,
        [u64::MAX.to_le_bytes().as_slice(), &whole[8..]].concat(),
    )
    .unwrap();
    merge_fails(&base, &adapter("llama-qv"), &["model.safetensors"]);
    let gguf = temp.path().join("model.gguf");
    for bytes in [
        b"GGUF".as_slice(),
        b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"nothing of the kind",
    ] {
        std::fs::write(&gguf, bytes).unwrap();
        merge_fails(&text(&gguf), &adapter("llama-qv"), &["model.gguf"]);
    }
}

#[test]
fn weights_of_another_shape_or_not_numbers() {
    let temp = tempfile::tempdir().unwrap();
    let base = copy_model("llama", temp.path());
    let file = temp.path().join("model.safetensors");
    let original = tensors(&file);

    let mut changed = original.clone();
    changed.insert(
        "model.layers.1.mlp.up_proj.weight".into(),
        (vec![3, 5], vec![0.5; 15]),
    );
    changed.remove("model.layers.2.self_attn.o_proj.weight");
    peft::io::write_tensors(&file, &changed, &Default::default()).unwrap();
    let both = [
        "model.layers.1.mlp.up_proj.weight",
        "[3, 5]",
        "model.layers.2.self_attn.o_proj.weight",
    ];
    merge_fails(&base, &adapter("llama-qv"), &both);

    // One in a module that the adapter changes, one in a module that is copied.
    for name in [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ] {
        let mut changed = original.clone();
        changed.get_mut(name).unwrap().1[7] = f32::NAN;
        peft::io::write_tensors(&file, &changed, &Default::default()).unwrap();
        merge_fails(
            &base,
            &adapter("llama-qv"),
            &[name.trim_end_matches(".weight")],
        );
        let input = temp.path().join("i.json");
        write(&input, r#"{"input_ids": [[1, 2, 3]]}"#);
        let out = temp.path().join("l.safetensors");
        peft([
            "logits",
            "--model",
            &base,
            "--input",
            &text(&input),
            "--output",
            &text(&out),
        ])
        .fails(1, &["NaN"]);
        assert!(!out.exists());
    }
}

#[test]
fn adapters_that_do_not_fit() {
    let temp = tempfile::tempdir().unwrap();
    // Another model's: all that does not fit is in one error.
    merge_fails(
        &model("qwen2"),
        &adapter("llama-all-linear"),
        &["llama-all-linear", "wrong shape"],
    );
    merge_fails(
        &model("gpt2"),
        &adapter("llama-qv"),
        &["llama-qv", "v_proj", "target_modules"],
    );

    let folder = copy_adapter("llama-qv", temp.path());
    let weights = temp.path().join("adapter_model.safetensors");
    let original = tensors(&weights);
    let key = original.keys().next().unwrap().clone();
    let mut changed = original.clone();
    changed.insert(
        "base_model.model.nobody.lora_A.weight".into(),
        changed[&key].clone(),
    );
    changed.remove(&key);
    peft::io::write_tensors(&weights, &changed, &Default::default()).unwrap();
    merge_fails(
        &model("llama"),
        &folder,
        &["missing (1)", &key, "unexpected (1)", "nobody"],
    );

    let mut changed = original.clone();
    changed.get_mut(&key).unwrap().1[0] = f32::INFINITY;
    peft::io::write_tensors(&weights, &changed, &Default::default()).unwrap();
    merge_fails(&model("llama"), &folder, &[&key, "inf"]);

    peft::io::write_tensors(&weights, &original, &Default::default()).unwrap();
    let config = temp.path().join("adapter_config.json");
    for (field, value, words) in [
        (
            "target_modules",
            json!(["q_porj", "v_proj"]),
            ["q_porj", "q_proj"],
        ),
        ("peft_type", json!("LORRA"), ["LORRA", "LORA"]),
        ("r", json!("eight"), ["`r`", "eight"]),
    ] {
        let mut changed = read_json(Path::new(&adapter("llama-qv")).join("adapter_config.json"));
        changed[field] = value;
        write(&config, &changed.to_string());
        merge_fails(&model("llama"), &folder, &words);
    }
    // What a finished adapter's file has no values for changes nothing, and is told of.
    let mut changed = read_json(Path::new(&adapter("llama-qv")).join("adapter_config.json"));
    changed["modules_to_save"] = json!(["lm_haed"]);
    write(&config, &changed.to_string());
    let out = text(temp.path().join("out"));
    let model_folder = model("llama");
    let merge = [
        "merge",
        "--model",
        &model_folder,
        "--adapter",
        &folder,
        "--output",
        &out,
    ];
    let told = peft(merge).ok().stderr;
    for word in ["modules_to_save", "lm_haed", "nearest: lm_head"] {
        assert!(told.contains(word), "{word:?} is not in: {told}");
    }
    write(&config, "[]");
    merge_fails(&model("llama"), &folder, &["adapter_config.json", "object"]);
    std::fs::remove_file(&config).unwrap();
    merge_fails(&model("llama"), &folder, &["adapter_config.json"]);
}

#[test]
fn what_cannot_be_merged_is_named() {
    merge_fails(
        &model("llama"),
        &adapter("llama-prompt"),
        &["virtual tokens"],
    );
    merge_fails(&model("gpt2"), &adapter("gpt2-prefix"), &["virtual tokens"]);
    merge_fails(
        &model("llama"),
        &adapter("llama-lora-bias"),
        &["model.layers.0", "bias"],
    );
    merge_fails(
        &adapter("llama-qv"),
        &adapter("llama-qv"),
        &["holds an adapter"],
    );
    merge_fails(&model("llama"), &model("llama"), &["model"]);
    let temp = tempfile::tempdir().unwrap();
    let base = copy_model("llama", temp.path());
    let before = listing(temp.path());
    let onto = [
        "merge",
        "--model",
        &base,
        "--adapter",
        &adapter("llama-qv"),
        "--output",
        &base,
        "--overwrite",
    ];
    peft(onto).fails(1, &["folder of the base model"]);
    assert_eq!(listing(temp.path()), before);
}

#[test]
fn outputs_that_would_replace_something() {
    let temp = tempfile::tempdir().unwrap();
    let folder = copy_adapter("llama-qv", &temp.path().join("adapter"));
    let before = listing(&folder);
    let llama = model("llama");
    let merge = |output: &str, more: &[&str]| {
        let args = [
            "merge",
            "--model",
            &llama,
            "--adapter",
            &folder,
            "--output",
            output,
        ];
        peft(args.iter().chain(more).copied())
    };
    for more in [&[][..], &["--overwrite"]] {
        merge(&folder, more).fails(1, &[&folder, "folder of an adapter"]);
    }
    assert_eq!(listing(&folder), before);
    let out = text(temp.path().join("out"));
    merge(&out, &[]).ok();
    let there = listing(&out);
    merge(&out, &[]).fails(1, &["model.safetensors", "already", "--overwrite"]);
    assert_eq!(listing(&out), there);
    merge(&out, &["--overwrite"]).ok();
    let file = temp.path().join("file");
    write(&file, "");
    merge(&text(&file), &[]).fails(1, &["is a file", "folder"]);
    let below = text(file.join("below"));
    merge(&below, &[]).fails(1, &[&below]);
}

#[test]
fn an_override_of_a_field_that_is_none() {
    let temp = tempfile::tempdir().unwrap();
    let config = format!("{}/adapter_config.json", adapter("llama-qv"));
    let llama = model("llama");
    let out = text(temp.path().join("out"));
    let init = ["init", "--model", &llama, "--output", &out];
    let inspect = ["inspect", "--model", &llama];
    for verb in [&init[..], &inspect] {
        let set = |set: &'static str| {
            let more = ["--config", &config, "--set", set];
            peft(verb.iter().copied().chain(more))
        };
        set("rx=1").fails(2, &["--set `rx`", "nearest: r"]);
        set("r=x").fails(1, &["`r`", "a whole number"]);
        assert!(!Path::new(&out).exists());
    }
}

#[test]
fn inputs_of_logits() {
    let temp = tempfile::tempdir().unwrap();
    let input = temp.path().join("i.json");
    let output = temp.path().join("o.safetensors");
    for (content, words) in [
        ("{", vec!["i.json", "JSON"]),
        ("[]", vec!["i.json", "input_ids"]),
        ("{}", vec!["input_ids", "required"]),
        (r#"{"input_ids": []}"#, vec!["input_ids", "no tokens"]),
        (
            r#"{"input_ids": [[1, 2], [3]]}"#,
            vec!["input_ids", "row 1", "1", "2"],
        ),
        (r#"{"input_ids": [[1, -2]]}"#, vec!["input_ids", "-2"]),
        (r#"{"input_ids": [[1, 67]]}"#, vec!["input_ids", "67"]),
        (
            r#"{"input_ids": [[1, 2]], "attention_mask": [[1]]}"#,
            vec!["attention_mask", "1 x 1"],
        ),
        (
            r#"{"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}"#,
            vec!["attention_mask", "2"],
        ),
        (
            r#"{"input_ids": [[1, 2]], "task_ids": [0, 1]}"#,
            vec!["task_ids", "2 entries"],
        ),
        (
            r#"{"input_ids": [[1, 2]], "input_mask": []}"#,
            vec!["input_mask", "attention_mask"],
        ),
    ] {
        write(&input, content);
        let run = peft([
            "logits",
            "--model",
            &model("llama"),
            "--input",
            &text(&input),
            "--output",
            &text(&output),
        ]);
        run.fails(1, &words);
        assert!(!output.exists(), "{content}");
    }
}
