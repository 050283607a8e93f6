//! `merge` and `logits` against what HF PEFT computed.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{
    adapter, copy_model, gap, goldens, listing, model, peft, read_json, tensors, text, write,
};

/// Most that the logits of a merged model may differ from HF PEFT's.
const CLOSE: f32 = 1e-4;

/// Entries of a logits file that a case says to compare: those of real tokens.
fn visible(values: &Values, case: &Value) -> Vec<f32> {
    let (shape, data) = values;
    let mask: Option<Vec<bool>> = case["attention_mask"].as_array().map(|rows| {
        rows.iter()
            .flat_map(|r| r.as_array().unwrap())
            .map(|m| m == 1)
            .collect()
    });
    match (mask, &shape[..]) {
        (Some(mask), [rows, len, width]) => {
            let real = mask.len() / rows;
            let skip = len - real;
            let seen = |i: usize| i % len < skip || mask[i / len * real + i % len - skip];
            let rows = data.chunks(*width).enumerate().filter(|(i, _)| seen(*i));
            rows.flat_map(|(_, row)| row).copied().collect()
        }
        _ => data.clone(),
    }
}

type Values = (Vec<usize>, Vec<f32>);

/// Runs a case's input; what stderr said if that fails.
fn logits(args: &[&str], case: &Path, output: &Path) -> Result<Values, String> {
    let case = read_json(case);
    let of = |key: &str| case[key].clone();
    let input = json!({
        "input_ids": of("input_ids"), "attention_mask": of("attention_mask"), "task_ids": of("task_ids"),
    });
    let file = output.with_extension("input.json");
    write(&file, &input.to_string());
    let (file, output_text) = (text(&file), text(output));
    let mut all = vec!["logits"];
    all.extend(args);
    all.extend(["--input", &file, "--output", &output_text]);
    let run = peft(all);
    if run.code != 0 {
        return Err(run.stderr);
    }
    Ok(tensors(output).into_values().next().unwrap())
}

#[test]
fn every_case_runs_and_merges_as_hf_peft_says() {
    let temp = tempfile::tempdir().unwrap();
    let (mut run, mut merged) = (0, 0);
    let mut wrong = Vec::new();
    for name in listing(goldens().join("cases")) {
        let case_file = goldens().join("cases").join(&name).join("case.json");
        let case = read_json(&case_file);
        let base = model(case["model"].as_str().unwrap());
        let expected = tensors(
            goldens()
                .join("cases")
                .join(&name)
                .join("expected.safetensors"),
        );
        let want = |kind: &str| {
            expected
                .iter()
                .find(|(key, _)| key.starts_with(kind))
                .map(|(_, values)| visible(values, &case))
        };
        let folder = adapter(&name);
        let out = temp.path().join(format!("{name}.safetensors"));
        let adapted = match logits(&["--model", &base, "--adapter", &folder], &case_file, &out) {
            Ok(adapted) => adapted,
            Err(said) => {
                wrong.push(format!("{name}: {said}"));
                continue;
            }
        };
        let off = gap(&visible(&adapted, &case), &want("adapted").unwrap());
        if off > CLOSE {
            wrong.push(format!("{name}: adapted, {off}"));
        }
        run += 1;
        if case["merge"] == json!(false) {
            continue;
        }
        let target = temp.path().join(&name);
        let args = [
            "merge",
            "--model",
            &base,
            "--adapter",
            &folder,
            "--output",
            &text(&target),
        ];
        let merge = peft(args);
        if merge.code != 0 {
            wrong.push(format!("{name}: merge: {}", merge.stderr));
            continue;
        }
        let got = logits(&["--model", &text(&target)], &case_file, &out).unwrap();
        // Where HF's own merge is wrong, the merged model has to be what the adapted one was.
        let reference = want("merged").unwrap_or_else(|| want("adapted").unwrap());
        let off = gap(&visible(&got, &case), &reference);
        if off > CLOSE {
            wrong.push(format!("{name}: merged, {off}"));
        }
        let moved = gap(&visible(&got, &case), &want("base").unwrap());
        if moved < 10.0 * CLOSE {
            wrong.push(format!("{name}: the merge changed nothing"));
        }
        merged += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(run > 60 && merged > 50, "{run} run, {merged} merged");
}

#[test]
fn untying_writes_both_sides_and_says_so() {
    let temp = tempfile::tempdir().unwrap();
    for (case, untied) in [
        ("llama-tied-embed", true),
        ("gemma-lm-head", true),
        ("llama-tied-save-tied", false),
        ("llama-tied-qv", false),
    ] {
        let base = model(
            read_json(goldens().join("cases").join(case).join("case.json"))["model"]
                .as_str()
                .unwrap(),
        );
        let target = temp.path().join(case);
        let report = peft([
            "merge",
            "--json",
            "--model",
            &base,
            "--adapter",
            &adapter(case),
            "--output",
            &text(&target),
        ])
        .json();
        assert_eq!(report["untied"], untied, "{case}");
        assert_eq!(
            read_json(target.join("config.json"))["tie_word_embeddings"],
            !untied,
            "{case}"
        );
        assert_eq!(
            tensors(target.join("model.safetensors")).contains_key("lm_head.weight"),
            untied,
            "{case}"
        );
    }
}

#[test]
fn types_shards_and_side_files() {
    let temp = tempfile::tempdir().unwrap();
    let base = copy_model("llama", &temp.path().join("base"));
    write(
        temp.path().join("base/tokenizer_config.json"),
        "{\"kept\": true}",
    );
    let run = |name: &str, more: &[&str]| {
        let target = temp.path().join(name);
        let mut args = vec![
            "merge".to_owned(),
            "--json".into(),
            "--model".into(),
            base.clone(),
        ];
        args.extend([
            "--adapter".to_owned(),
            adapter("llama-qv"),
            "--output".into(),
            text(&target),
        ]);
        args.extend(more.iter().map(|&m| m.to_owned()));
        (peft(args), target)
    };
    let (whole, whole_at) = run("whole", &[]);
    let whole = whole.json();
    assert_eq!(whole["changed_modules"], 6);
    assert_eq!(
        read_json(whole_at.join("tokenizer_config.json"))["kept"],
        true
    );
    let f32s = tensors(whole_at.join("model.safetensors"));
    assert_eq!(
        whole["bytes"],
        f32s.values().map(|(_, v)| v.len() * 4).sum::<usize>()
    );

    let (half, half_at) = run("half", &["--dtype", "bf16", "--max-shard-size", "20KB"]);
    let half = half.json();
    assert_eq!(
        half["bytes"].as_u64().unwrap() * 2,
        whole["bytes"].as_u64().unwrap()
    );
    assert_eq!(
        read_json(half_at.join("config.json"))["torch_dtype"],
        "bfloat16"
    );
    let shards = listing(&half_at)
        .into_iter()
        .filter(|n| n.starts_with("model-000"))
        .count();
    assert!(shards > 2, "{:?}", listing(&half_at));
    let index = read_json(half_at.join("model.safetensors.index.json"));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), f32s.len());
    let checkpoint = peft::io::Checkpoint::open(&half_at).unwrap();
    for (name, (shape, values)) in &f32s {
        let (got_shape, got) = checkpoint.f32(name).unwrap();
        assert_eq!(&got_shape, shape);
        for (a, b) in got.iter().zip(values) {
            // bf16 keeps eight bits.
            assert!(
                (a - b).abs() <= b.abs() / 256.0 + 1e-38,
                "{name}: {a} for {b}"
            );
        }
    }

    let (again, _) = run("whole", &[]);
    again.fails(1, &["already holds a checkpoint"]);
    run("whole", &["--overwrite"]).0.ok();
    assert_eq!(tensors(whole_at.join("model.safetensors")), f32s);
}

#[test]
fn a_head_that_the_base_lacks_is_written() {
    let temp = tempfile::tempdir().unwrap();
    let base = temp.path().join("base");
    // MiniLM's way: a base model saved without its class's prefix and without a head.
    std::fs::create_dir_all(&base).unwrap();
    let mut config = read_json(Path::new(&model("bert-cls")).join("config.json"));
    config["architectures"] = json!(["BertModel"]);
    config
        .as_object_mut()
        .unwrap()
        .retain(|key, _| key != "id2label" && key != "label2id");
    write(base.join("config.json"), &config.to_string());
    let bare = tensors(Path::new(&model("bert-cls")).join("model.safetensors"))
        .into_iter()
        .filter_map(|(name, values)| Some((name.strip_prefix("bert.")?.to_owned(), values)))
        .collect();
    peft::io::write_tensors(&base.join("model.safetensors"), &bare, &Default::default()).unwrap();
    let target = temp.path().join("out");
    peft([
        "merge",
        "--model",
        &text(&base),
        "--adapter",
        &adapter("bert-cls-qv"),
        "--output",
        &text(&target),
    ])
    .ok();
    let written = read_json(target.join("config.json"));
    assert_eq!(
        written["architectures"],
        json!(["BertForSequenceClassification"])
    );
    assert_eq!(written["id2label"].as_object().unwrap().len(), 3);
    assert!(
        tensors(target.join("model.safetensors"))
            .contains_key("bert.encoder.layer.0.output.dense.weight")
    );
    let case = goldens().join("cases/bert-cls-qv");
    let got = logits(
        &["--model", &text(&target)],
        &case.join("case.json"),
        &temp.path().join("l.safetensors"),
    )
    .unwrap();
    let want = &tensors(case.join("expected.safetensors"))["merged_logits"];
    assert!(gap(&got.1, &want.1) < CLOSE);
}

#[test]
fn stacked_adapters_merge_as_they_run() {
    let temp = tempfile::tempdir().unwrap();
    let (base, first, second) = (model("llama"), adapter("llama-qv"), adapter("llama-rslora"));
    let case = goldens().join("cases/llama-qv/case.json");
    let out = temp.path().join("l.safetensors");
    let both = ["--model", &base, "--adapter", &first, "--adapter", &second];
    let stacked = logits(&both, &case, &out).unwrap();
    let alone = logits(&both[..4], &case, &out).unwrap();
    assert!(
        gap(&stacked.1, &alone.1) > 1e-2,
        "the second adapter does nothing"
    );
    let target = text(temp.path().join("m"));
    peft(
        ["merge"]
            .into_iter()
            .chain(both)
            .chain(["--output", &target]),
    )
    .ok();
    let merged = logits(&["--model", &target], &case, &out).unwrap();
    assert!(gap(&merged.1, &stacked.1) < CLOSE);
}

/// A union of what merges and what does not: an error that tells them apart, then a merged model and a smaller union that
/// together are the union.
#[test]
fn a_union_merges_in_part() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| text(temp.path().join(name));
    let base = model("llama");
    let case = goldens().join("cases/llama-qv/case.json");
    let out = temp.path().join("l.safetensors");
    let lora = json!({
        "peft_type": "LORA", "r": 2, "init_lora_weights": false, "target_modules": ["q_proj", "down_proj"]
    });
    let prefix = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3});
    let make = |name: &str, config: &Value| {
        let (file, folder) = (temp.path().join(format!("{name}.json")), path(name));
        write(&file, &config.to_string());
        let file = text(&file);
        peft([
            "init", "--model", &base, "--config", &file, "--output", &folder,
        ])
        .ok();
        folder
    };
    let union = |members: &[&Value]| json!({"peft_type": "UNION", "members": members});
    let mixed = make("mixed", &union(&[&prefix, &lora]));
    let (target, rest) = (path("merged"), path("rest"));
    let merge = |adapter: &str, target: &str, more: &[&str]| {
        let fixed = ["merge", "--json", "--model", &base, "--adapter", adapter];
        let output = ["--output", target];
        peft(fixed.iter().chain(&output).chain(more).copied())
    };
    merge(&mixed, &target, &[]).fails(
        1,
        &[
            "member 0 (PREFIX_TUNING) stays",
            "member 1 (LORA) can be merged",
            "rest",
        ],
    );
    assert!(!temp.path().join("merged").exists());
    merge(&mixed, &target, &["--rest", &target]).fails(1, &["rest", "another folder"]);
    let report = merge(&mixed, &target, &["--rest", &rest]).json();
    assert_eq!(report["rest"], json!(rest));
    let config = read_json(temp.path().join("rest/adapter_config.json"));
    assert_eq!(config["members"], json!([prefix]));
    assert_eq!(config["base_model_name_or_path"], json!(target));
    let adapted = logits(&["--model", &base, "--adapter", &mixed], &case, &out).unwrap();
    let parted = logits(&["--model", &target, "--adapter", &rest], &case, &out).unwrap();
    assert!(gap(&parted.1, &adapted.1) < CLOSE);
    for alone in [
        logits(&["--model", &target], &case, &out),
        logits(&["--model", &base, "--adapter", &rest], &case, &out),
    ] {
        assert!(gap(&alone.unwrap().1, &adapted.1) > 10.0 * CLOSE);
    }
    merge(&mixed, &path("again"), &["--rest", &rest]).fails(1, &["already holds an adapter"]);

    let both = make("both", &union(&[&lora]));
    let report = merge(&both, &path("whole"), &["--rest", &path("nothing")]).json();
    assert_eq!(report["rest"], Value::Null);
    assert!(report["notes"][0].as_str().unwrap().contains("no rest"));
    assert!(!temp.path().join("nothing").exists());
    let none = make("none", &json!({"peft_type": "MAM"}));
    merge(&none, &path("m"), &["--rest", &path("r")]).fails(
        1,
        &["member 0", "member 1", "none of its members can be merged"],
    );
}

#[test]
fn an_unknown_architecture_merges_by_names() {
    let temp = tempfile::tempdir().unwrap();
    let base = copy_model("llama", &temp.path().join("base"));
    let mut config = read_json(temp.path().join("base/config.json"));
    config["model_type"] = json!("brand-new");
    write(temp.path().join("base/config.json"), &config.to_string());
    let merge = |base: &str, to: &str| {
        let target = temp.path().join(to);
        peft([
            "merge",
            "--model",
            base,
            "--adapter",
            &adapter("llama-all-linear"),
            "--output",
            &text(&target),
        ])
        .ok();
        tensors(target.join("model.safetensors"))
    };
    let (by_names, by_tree) = (merge(&base, "a"), merge(&model("llama"), "b"));
    assert_eq!(by_names, by_tree);
    let inspected = peft(["inspect", "--json", "--model", &base]).json();
    assert_eq!(inspected["runnable"], false);
    peft(["logits", "--model", &base, "--input", "x", "--output", "y"]).fails(1, &["x"]);
}
