//! `inspect`, `methods` and `init`: what there is, what would be, and a fresh start.

use serde_json::{Value, json};

use crate::common::{adapter, listing, model, peft, read_json, tensors, text, write};

fn adapted(report: &Value) -> Vec<String> {
    let modules = report["modules"].as_array().unwrap();
    modules
        .iter()
        .filter(|m| m["adapted"] == true)
        .map(|m| m["path"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn inspect_counts_what_is_there() {
    let report = peft(["inspect", "--json", "--model", &model("llama")]).json();
    let stored = tensors(std::path::Path::new(&model("llama")).join("model.safetensors"));
    let parameters: usize = stored.values().map(|(_, v)| v.len()).sum();
    assert_eq!(report["parameters"], parameters);
    assert_eq!(report["base_bytes"], parameters * 4);
    assert_eq!(report["trainable"], 0);
    assert_eq!(report["model_type"], "llama");
    assert!(adapted(&report).is_empty());
    let q = report["modules"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["path"] == "model.layers.1.self_attn.q_proj");
    assert_eq!(q.unwrap()["shape"], json!([32, 32]));
    let tied = peft(["inspect", "--json", "--model", &model("llama-tied")]).json();
    let head = tied["modules"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["path"] == "lm_head")
        .cloned()
        .unwrap();
    assert_eq!(head["shares"], "model.embed_tokens");
}

#[test]
fn inspect_shows_an_adapter_and_what_one_would_change() {
    let report = peft([
        "inspect",
        "--json",
        "--model",
        &model("llama"),
        "--adapter",
        &adapter("llama-qv"),
    ])
    .json();
    let saved: usize =
        tensors(std::path::Path::new(&adapter("llama-qv")).join("adapter_model.safetensors"))
            .values()
            .map(|(_, v)| v.len())
            .sum();
    assert_eq!(report["trainable"], saved);
    assert_eq!(report["adapter_bytes"], saved * 4);
    assert_eq!(report["optimizer_bytes"], saved * 8);
    let by_module: u64 = report["modules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["trainable"].as_u64().unwrap())
        .sum();
    assert_eq!(by_module, saved as u64);
    assert_eq!(adapted(&report).len(), 6);

    let config = format!("{}/adapter_config.json", adapter("llama-qv"));
    let planned = peft([
        "inspect",
        "--json",
        "--model",
        &model("llama"),
        "--config",
        &config,
    ])
    .json();
    assert_eq!(planned["trainable"], saved);
    let doubled = peft([
        "inspect",
        "--json",
        "--model",
        &model("llama"),
        "--config",
        &config,
        "--set",
        "r=2",
    ])
    .json();
    assert_ne!(doubled["trainable"], saved);

    let matched = peft([
        "inspect",
        "--json",
        "--model",
        &model("llama"),
        "--target-modules",
        "v_proj",
    ])
    .json();
    let layers = (0..3)
        .map(|i| format!("model.layers.{i}.self_attn.v_proj"))
        .collect::<Vec<_>>();
    assert_eq!(adapted(&matched), layers);
    let with = |targets: &[&str]| {
        let llama = model("llama");
        let fixed = ["inspect", "--json", "--model", &llama, "--target-modules"];
        adapted(&peft(fixed.iter().chain(targets).copied()).json()).len()
    };
    assert_eq!(with(&["q_proj", "v_proj"]), 6);
    assert_eq!(with(&["q_proj,v_proj"]), 6);
    let regex = peft([
        "inspect",
        "--json",
        "--model",
        &model("llama"),
        "--target-modules",
        r".*\.1\..*v_proj",
    ])
    .json();
    assert_eq!(adapted(&regex), layers[1..2]);
    let all = [
        "inspect",
        "--json",
        "--model",
        &model("llama"),
        "--target-modules",
        "all-linear",
        "--method",
        "lora",
    ];
    let counted = peft(all).json();
    assert_eq!(adapted(&counted).len(), 21);
    assert!(counted["trainable"].as_u64().unwrap() > 0);

    let table = peft([
        "inspect",
        "--model",
        &model("llama"),
        "--adapter",
        &adapter("llama-qv"),
        "--adapted",
    ])
    .ok();
    assert_eq!(
        table.stdout.lines().filter(|l| l.contains(" yes ")).count(),
        6,
        "{}",
        table.stdout
    );
    assert!(table.stdout.contains("trainable"));
}

#[test]
fn methods_lists_the_registry() {
    let all = peft(["methods", "--json"]).json();
    let ids: Vec<&str> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(
        ids,
        peft::methods().iter().map(|e| e.id).collect::<Vec<_>>()
    );
    assert!(ids.contains(&"lora"));
    let table = peft(["methods"]).ok().stdout;
    assert_eq!(table.lines().count(), ids.len() + 1);
    for id in &ids {
        let one = peft(["methods", id, "--json"]).json();
        assert_eq!(one["id"], *id);
        assert!(one["example"]["peft_type"].is_string());
    }
    let shown = peft(["methods", "lora"]).ok().stdout;
    assert!(
        shown.contains("LORA") && shown.contains("adapter_config.json"),
        "{shown}"
    );
    // The examples name a Llama's modules; a BERT gets what the method would choose there.
    for name in ["llama", "bert"] {
        let counted = peft(["methods", "--json", "--model", &model(name)]).json();
        let counted = counted.as_array().unwrap();
        let lora = counted.iter().find(|m| m["id"] == "lora").unwrap();
        assert!(lora["trainable"].as_u64().unwrap() > 0);
        let refused = counted.iter().filter(|m| !m["does_not_apply"].is_null());
        assert!(refused.count() < 10, "{name}");
    }
    peft(["methods", "lorra"]).fails(2, &["lorra", "lora"]);
}

#[test]
fn init_writes_an_adapter_that_loads_and_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let config = temp.path().join("c.toml");
    write(
        &config,
        "peft_type = \"LORA\"\ntask_type = \"CAUSAL_LM\"\nr = 4\ntarget_modules = [\"q_proj\", \"down_proj\"]\n",
    );
    let init = |to: &str, seed: &str, more: &[&str]| {
        let target = text(temp.path().join(to));
        let config = text(&config);
        let base = model("llama");
        let args = [
            "init", "--json", "--model", &base, "--config", &config, "--output", &target, "--seed",
            seed,
        ];
        peft(args.into_iter().chain(more.iter().copied()))
    };
    let made = init("a", "1", &[]).json();
    assert_eq!(made["method"], "lora");
    assert_eq!(
        listing(temp.path().join("a")),
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors"
        ]
    );
    let saved = read_json(temp.path().join("a/adapter_config.json"));
    assert_eq!(saved["base_model_name_or_path"], model("llama"));
    assert_eq!(saved["r"], 4);
    init("b", "1", &[]).ok();
    init("c", "2", &[]).ok();
    let at = |name: &str| tensors(temp.path().join(name).join("adapter_model.safetensors"));
    assert_eq!(at("a"), at("b"));
    assert_ne!(at("a"), at("c"));
    assert_eq!(
        at("a").values().map(|(_, v)| v.len()).sum::<usize>() as u64,
        made["trainable"].as_u64().unwrap()
    );
    init("a", "3", &[]).fails(1, &["already holds an adapter"]);
    init("a", "2", &["--overwrite"]).ok();
    assert_eq!(at("a"), at("c"));

    let input = temp.path().join("i.json");
    write(&input, r#"{"input_ids": [[1, 2, 3, 4]]}"#);
    let logits = |more: &[&str], name: &str| {
        let (input, output, base) = (text(&input), text(temp.path().join(name)), model("llama"));
        peft(
            [
                "logits", "--model", &base, "--input", &input, "--output", &output,
            ]
            .into_iter()
            .chain(more.iter().copied()),
        )
        .ok();
        tensors(output)
    };
    let fresh = text(temp.path().join("a"));
    assert_eq!(logits(&[], "base"), logits(&["--adapter", &fresh], "fresh"));
}
