//! `train`, `eval` and `generate` on a model that has a tokenizer.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{listing, peft, read_json, talking_model, tensors, text, write};

/// A model, data and a configuration in a folder.
fn setting(folder: &Path) -> Value {
    let model = talking_model("llama", &folder.join("model"));
    let rows = |range: std::ops::Range<usize>| -> String {
        let row = |i: usize| json!({"prompt": format!("w{} w{} ", 3 + i % 9, 20 + i % 7), "completion": if i.is_multiple_of(2) { "w40" } else { "w41" }});
        range.map(|i| format!("{}\n", row(i))).collect()
    };
    write(folder.join("train.jsonl"), &rows(0..32));
    write(folder.join("eval.jsonl"), &rows(32..44));
    json!({
        "model": {"path": model},
        "adapter": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "data": {"train": text(folder.join("train.jsonl")), "eval": text(folder.join("eval.jsonl"))},
        "train": {"steps": 12, "batch_size": 4, "learning_rate": 0.02, "eval_before": true, "save_every": 5},
        "output": {"dir": text(folder.join("out"))},
    })
}

#[test]
fn train_eval_generate_merge() {
    let temp = tempfile::tempdir().unwrap();
    let config = setting(temp.path());
    let file = temp.path().join("train.json");
    write(&file, &config.to_string());
    let run = peft(["train", &text(&file)]).ok();
    for word in [
        "trainable parameters",
        "next:",
        "peft eval",
        "peft generate",
        "peft merge",
    ] {
        assert!(run.stderr.contains(word), "{word}: {}", run.stderr);
    }
    assert!(
        run.stdout.contains("before") && run.stdout.contains("loss"),
        "{}",
        run.stdout
    );
    let out = temp.path().join("out");
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "checkpoints",
    ] {
        assert!(
            listing(&out).contains(&name.to_owned()),
            "{:?}",
            listing(&out)
        );
    }
    assert!(read_json(out.join("adapter_config.json"))["base_model_name_or_path"].is_string());
    // What is there is not lost by accident.
    peft(["train", &text(&file)]).fails(1, &["output.dir", "overwrite"]);

    let model = text(temp.path().join("model"));
    let eval = |more: &[&str]| {
        let data = text(temp.path().join("eval.jsonl"));
        peft(
            ["eval", "--json", "--model", &model, "--data", &data]
                .into_iter()
                .chain(more.iter().copied()),
        )
        .json()
    };
    let (before, after) = (eval(&[]), eval(&["--adapter", &text(&out)]));
    assert_eq!(before["rows"], 12);
    assert!(
        after["loss"].as_f64() < before["loss"].as_f64(),
        "{before} {after}"
    );
    assert_eq!(eval(&["--limit", "5"])["rows"], 5);

    let next: Vec<&str> = run
        .stderr
        .lines()
        .filter_map(|l| Some(l.split_once("peft ")?.1))
        .collect();
    for line in next {
        let words: Vec<String> = line
            .split(' ')
            .map(|w| w.trim_matches('\'').to_owned())
            .collect();
        if words[0] == "merge" {
            peft(&words).ok();
        }
    }
    let merged = text(temp.path().join("out-merged"));
    assert!(Path::new(&merged).join("tokenizer.json").is_file());
    let data = text(temp.path().join("eval.jsonl"));
    let merged_eval = peft(["eval", "--json", "--model", &merged, "--data", &data]).json();
    let gap = merged_eval["loss"].as_f64().unwrap() - after["loss"].as_f64().unwrap();
    assert!(gap.abs() < 1e-5, "{gap}");
}

#[test]
fn resuming_and_overrides() {
    let temp = tempfile::tempdir().unwrap();
    let config = setting(temp.path());
    let file = temp.path().join("train.json");
    write(&file, &config.to_string());
    let file = text(&file);
    let whole = text(temp.path().join("whole"));
    peft(["train", &file, "--set", &format!("output.dir={whole}")]).ok();
    // A run that was stopped after its first checkpoint.
    let part = temp.path().join("part");
    std::fs::create_dir_all(part.join("checkpoints")).unwrap();
    copy_tree(
        &Path::new(&whole).join("checkpoints/step-5"),
        &part.join("checkpoints/step-5"),
    );
    std::fs::copy(
        Path::new(&whole).join("metrics.jsonl"),
        part.join("metrics.jsonl"),
    )
    .unwrap();
    let resumed = peft([
        "train",
        &file,
        "--resume",
        "--json",
        "--set",
        &format!("output.dir={}", text(&part)),
    ])
    .json();
    assert_eq!(resumed["steps"], 12);
    let at = |folder: &Path| std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert_eq!(at(Path::new(&whole)), at(&part));
    peft([
        "train",
        &file,
        "--resume",
        "--set",
        "train.learning_rate=0.5",
        "--set",
        &format!("output.dir={whole}"),
    ])
    .fails(1, &["train.learning_rate"]);
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in listing(from) {
        std::fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

#[test]
fn a_bad_row_is_named_before_anything_is_written() {
    let temp = tempfile::tempdir().unwrap();
    let config = setting(temp.path());
    let file = temp.path().join("train.json");
    write(&file, &config.to_string());
    let data = temp.path().join("train.jsonl");
    let good = std::fs::read_to_string(&data).unwrap();
    for bad in [
        "{\"prompt\": \"w1\"}",
        "not json",
        "{\"prompt\": 3, \"completion\": \"w1\"}",
    ] {
        write(&data, &format!("{good}{bad}\n"));
        peft(["train", &text(&file)]).fails(1, &["train.jsonl:33"]);
        assert!(!temp.path().join("out").exists());
        let model = text(temp.path().join("model"));
        peft(["eval", "--model", &model, "--data", &text(&data)]).fails(1, &["train.jsonl:33"]);
    }
    write(&data, &good);
    for (set, words) in [
        ("adapter.target_modules=[\"q_porj\"]", ["q_porj", "q_proj"]),
        ("adapter.peft_type=LORRA", ["LORRA", "LORA"]),
    ] {
        let run = peft(["train", &text(&file), "--set", set]);
        let code = run.code;
        assert!(code == 1 || code == 2);
        run.fails(code, &words);
        assert!(!temp.path().join("out").exists());
    }
}

#[test]
fn generation_follows_its_options() {
    let temp = tempfile::tempdir().unwrap();
    let model = talking_model("llama", &temp.path().join("m"));
    let generate = |more: &[&str]| {
        let args = [
            "generate",
            "--json",
            "--model",
            &model,
            "--prompt",
            "w5 w6",
            "--max-new-tokens",
            "6",
        ];
        peft(args.into_iter().chain(more.iter().copied())).json()
    };
    let raw = generate(&["--raw"]);
    assert_eq!(raw["prompt_tokens"], 2);
    // The template writes role lengths, which are unknown words, and w1 at its end.
    let chat = generate(&[]);
    assert_eq!(chat["prompt_tokens"], 4);
    assert_eq!(chat, without_times(generate(&["--chat"]), &chat));
    assert_eq!(generate(&["--system", "w7"])["prompt_tokens"], 6);
    assert_eq!(
        raw["tokens"],
        generate(&["--raw", "--seed", "9"])["tokens"],
        "greedy does not draw"
    );
    let draw =
        |seed: &str| generate(&["--raw", "--temperature", "5", "--seed", seed])["tokens"].clone();
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
    assert_eq!(
        generate(&["--raw", "--temperature", "5", "--top-k", "1"])["tokens"],
        raw["tokens"]
    );

    let printed = peft([
        "generate",
        "--model",
        &model,
        "--prompt",
        "w5 w6",
        "--raw",
        "--max-new-tokens",
        "6",
    ])
    .ok();
    assert_eq!(
        printed.stdout.trim_end(),
        raw["text"].as_str().unwrap().trim_end()
    );
    peft([
        "generate", "--model", &model, "--prompt", "x", "--top-p", "7",
    ])
    .fails(2, &["--top-p", "above 0, and at most 1"]);
    peft([
        "generate", "--model", &model, "--prompt", "x", "--raw", "--chat",
    ])
    .fails(2, &["--raw"]);
    std::fs::remove_file(temp.path().join("m/tokenizer_config.json")).unwrap();
    peft(["generate", "--model", &model, "--prompt", "x", "--chat"])
        .fails(1, &["--chat", "chat template"]);
    std::fs::remove_file(temp.path().join("m/tokenizer.json")).unwrap();
    peft(["generate", "--model", &model, "--prompt", "x"]).fails(1, &["tokenizer.json"]);
}

/// The report with the times of another.
fn without_times(mut report: Value, other: &Value) -> Value {
    for key in ["seconds", "tokens_per_second"] {
        report[key] = other[key].clone();
    }
    report
}

#[test]
fn full_training_writes_a_model() {
    let temp = tempfile::tempdir().unwrap();
    let mut config = setting(temp.path());
    config.as_object_mut().unwrap().remove("adapter");
    let file = temp.path().join("train.json");
    write(&file, &config.to_string());
    let run = peft(["train", &text(&file), "--set", "train.learning_rate=0.001"]).ok();
    assert!(!run.stderr.contains("peft merge"));
    let out = temp.path().join("out");
    let trained = tensors(out.join("model.safetensors"));
    assert_eq!(
        trained.len(),
        tensors(temp.path().join("model/model.safetensors")).len()
    );
    let data = text(temp.path().join("eval.jsonl"));
    peft(["eval", "--model", &text(&out), "--data", &data]).ok();
}

#[test]
fn a_classifier_trains_evaluates_and_merges() {
    let temp = tempfile::tempdir().unwrap();
    let model = talking_model("bert-cls", &temp.path().join("model"));
    let row = |i: usize| {
        let label = ["bad", "good", "mixed"][i % 3];
        json!({"text": format!("w{} w{} w{}", 5 + i % 3, 20 + i % 7, 30 + i % 5), "label": label})
    };
    let rows =
        |range: std::ops::Range<usize>| range.map(|i| format!("{}\n", row(i))).collect::<String>();
    let (train, held_out) = (
        temp.path().join("train.jsonl"),
        temp.path().join("eval.jsonl"),
    );
    write(&train, &rows(0..40));
    write(&held_out, &rows(100..120));
    let out = text(temp.path().join("out"));
    let config = json!({
        "model": {"path": model},
        "adapter": {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value"]},
        "data": {"train": text(&train), "eval": text(&held_out)},
        "train": {"steps": 40, "batch_size": 8, "learning_rate": 0.02},
        "output": {"dir": out},
    });
    let file = temp.path().join("t.json");
    write(&file, &config.to_string());
    let run = peft(["train", &text(&file)]).ok();
    assert!(!run.stderr.contains("peft generate"), "{}", run.stderr);
    let trained = peft([
        "eval",
        "--json",
        "--model",
        &model,
        "--adapter",
        &out,
        "--data",
        &text(&held_out),
    ])
    .json();
    assert!(trained["accuracy"].as_f64().unwrap() > 0.9, "{trained}");
    let merged = text(temp.path().join("merged"));
    peft([
        "merge",
        "--model",
        &model,
        "--adapter",
        &out,
        "--output",
        &merged,
    ])
    .ok();
    let names = read_json(Path::new(&merged).join("config.json"))["id2label"].clone();
    assert_eq!(names, json!({"0": "bad", "1": "good", "2": "mixed"}));
    let again = peft([
        "eval",
        "--json",
        "--model",
        &merged,
        "--data",
        &text(&held_out),
    ])
    .json();
    let gap = again["loss"].as_f64().unwrap() - trained["loss"].as_f64().unwrap();
    assert!(gap.abs() < 1e-5, "{again} {trained}");
}

#[test]
fn a_forecast_is_made_and_a_limit_held_to() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("train.json");
    write(&file, &setting(temp.path()).to_string());
    let shown = peft(["inspect", "--train-config", &text(&file)]).ok();
    for word in ["peak memory", "optimizer", "total", "tokens/s"] {
        assert!(shown.stdout.contains(word), "{word}: {}", shown.stdout);
    }
    let found = peft(["inspect", "--train-config", &text(&file), "--json"]).json();
    let parts = found["parts"].as_object().unwrap().values();
    let sum: u64 = parts.map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(found["peak_bytes"], sum);
    assert_eq!(found["steps"], 12);
    assert!(!temp.path().join("out").exists());
    peft(["train", &text(&file), "--memory-limit", "1MB"]).fails(1, &["train.memory_limit", "MB"]);
    assert!(!temp.path().join("out").exists());
    peft(["train", &text(&file), "--memory-limit", "4GiB"]).ok();
    peft(["train", &text(&file), "--memory-limit", "much"]).fails(2, &["--memory-limit", "GiB"]);
    peft(["inspect"]).fails(2, &["--model"]);
}

#[test]
fn a_wrong_setting_is_told_where_it_was_made() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("train.json");
    write(&file, &setting(temp.path()).to_string());
    let file = text(&file);
    let whole = "a whole number that is not negative";
    for (more, code, words) in [
        (
            vec!["--set", "train.steps=-3"],
            2,
            vec!["--set `train.steps`", "-3", whole],
        ),
        (
            vec!["--set", "train.learning_rate=fast"],
            2,
            vec!["--set `train.learning_rate`", "fast", "expected a number"],
        ),
        (
            vec!["--set", "train.stpes=3"],
            2,
            vec!["--set `train.stpes`", "train.steps"],
        ),
        (
            vec!["--set", "train.schedule=wavy"],
            2,
            vec!["--set `train.schedule`", "wavy", "cosine"],
        ),
        (vec!["--device", "tpu"], 2, vec!["--device", "tpu", "cpu"]),
        (
            vec!["--set", "adapter.r=four"],
            1,
            vec!["`r`", "four", whole],
        ),
        (
            vec!["--set", "adapter.rr=4"],
            1,
            vec!["adapter.rr", "nearest: r"],
        ),
        // Nothing is like it, so all there is is named.
        (
            vec!["--set", "adapter.target_modules=[\"zzz\"]"],
            1,
            vec!["zzz", "there are", "q_proj", "down_proj"],
        ),
        (
            vec!["--set", "data.train=nobody.jsonl"],
            1,
            vec!["nobody.jsonl"],
        ),
        (
            vec!["--set", "model.path=/no/model"],
            1,
            vec!["/no/model", "config.json"],
        ),
        (
            vec!["--set", &format!("model.path={file}")],
            1,
            vec!["train.json", "is no model", ".gguf"],
        ),
    ] {
        let args = ["train", &file].into_iter().chain(more.iter().copied());
        peft(args).fails(code, &words);
        assert!(!temp.path().join("out").exists(), "{more:?}");
    }
    let mut config = setting(temp.path());
    config["train"]["steps"] = json!(-3);
    write(&file, &config.to_string());
    peft(["train", &file]).fails(2, &["train.json: `train.steps`"]);
    let empty = temp.path().join("empty.jsonl");
    write(&empty, "");
    write(&file, &setting(temp.path()).to_string());
    let set = format!("data.train={}", text(&empty));
    peft(["train", &file, "--set", &set]).fails(1, &["empty.jsonl", "no rows"]);
    let set = format!("data.train={}", text(temp.path()));
    peft(["train", &file, "--set", &set]).fails(1, &["directory"]);
    assert!(!temp.path().join("out").exists());
}
