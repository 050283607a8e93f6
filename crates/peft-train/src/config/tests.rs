//! Names, types, ranges and overrides of a configuration.

use serde_json::json;

use super::*;

fn minimal() -> Value {
    json!({"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "output": {"dir": "out"}})
}

fn error(sets: &[&str]) -> String {
    let mut value = minimal();
    for set in sets {
        apply_set(&mut value, set).unwrap();
    }
    TrainConfig::from_value(&value).unwrap_err().to_string()
}

#[test]
fn the_whole_table_of_the_design_is_read() {
    let text = r#"
        device = "cpu"
        precision = "f32"
        [model]
        path = "models/tiny"
        [adapter]
        peft_type = "LORA"
        r = 8
        target_modules = ["q_proj", "v_proj"]
        [data]
        train = "train.jsonl"
        eval = "eval.jsonl"
        max_length = 128
        shuffle = false
        [train]
        epochs = 2
        batch_size = 4
        gradient_accumulation = 2
        learning_rate = 1e-4
        weight_decay = 0.5
        schedule = "cosine"
        warmup_ratio = 0.03
        max_grad_norm = 0.0
        gradient_checkpointing = true
        seed = 7
        eval_every = 50
        save_every = 25
        [output]
        dir = "out"
    "#;
    let value: Value = toml::from_str(text).unwrap();
    let config = TrainConfig::from_value(&value).unwrap();
    assert_eq!(config.adapter.as_ref().unwrap()["r"], 8);
    assert_eq!((config.data.max_length, config.data.shuffle), (128, false));
    let train = &config.train;
    assert_eq!(
        (
            train.epochs,
            train.batch_size,
            train.gradient_accumulation,
            train.seed
        ),
        (2.0, 4, 2, 7)
    );
    assert_eq!(
        (train.learning_rate, train.weight_decay, train.max_grad_norm),
        (1e-4, 0.5, 0.0)
    );
    assert_eq!(
        (train.schedule, train.eval_every, train.save_every),
        (Schedule::Cosine, 50, 25)
    );
    // 0.03 of 101 steps is 3.03: transformers rounds up.
    assert_eq!(config.warmup(101), 4);
}

#[test]
fn an_unknown_key_names_the_nearest() {
    for (set, field, near) in [
        (
            "train.leraning_rate=1",
            "train.leraning_rate",
            "train.learning_rate",
        ),
        ("train.max_length=1", "train.max_length", "data.max_length"),
        ("optput.dir=x", "optput", "output"),
        ("learning_rate=1", "learning_rate", "train.learning_rate"),
        (
            r#"train.lr_multipliers=[{"patern":"x"}]"#,
            "train.lr_multipliers[0].patern",
            "pattern",
        ),
    ] {
        let message = error(&[set]);
        assert!(
            message.contains(&format!("`{field}`")) && message.contains(near),
            "{set}: {message}"
        );
    }
}

#[test]
fn a_wrong_type_or_value_names_its_field() {
    for (set, parts) in [
        ("train.batch_size=many", &["train.batch_size", "many"][..]),
        ("train.batch_size=0", &["train.batch_size", "at least 1"]),
        (
            "train.schedule=cosin",
            &["train.schedule", "cosin", "linear", "cosine", "constant"],
        ),
        (
            "train.optimizer=sgd",
            &["train.optimizer", "adamw", "adamw_8bit"],
        ),
        ("train.betas=[0.9, 1.0]", &["train.betas", "less than 1"]),
        ("train.learning_rate=-1", &["train.learning_rate", "-1"]),
        ("train.warmup_ratio=1.5", &["train.warmup_ratio", "1.5"]),
        ("train.epochs=0", &["train.epochs", "more than 0"]),
        (
            "train.memory_limit=lots",
            &["train.memory_limit", "lots", "GiB"],
        ),
        ("data.max_length=1", &["data.max_length", "at least 2"]),
        ("data.eval_split=1.5", &["data.eval_split", "1.5"]),
        ("data.format=parquet", &["data.format", "jsonl", "csv"]),
        ("model.path=null", &["model.path", "required"]),
        ("model.path=''", &["model.path", "required"]),
        ("output.dir=3", &["output.dir"]),
        ("data=3", &["`data`", "table"]),
        ("adapter=3", &["`adapter`"]),
        ("adapter.init_from=3", &["adapter.init_from"]),
        ("precision=f64", &["precision", "f64", "f32, bf16"]),
        ("device=wgpu", &["device", "not in this build"]),
        ("device=tpu", &["device", "tpu", "cpu, wgpu, auto"]),
        (
            "model.quantize=int4",
            &["model.quantize", "int4", "nf4, nf4_single, int8"],
        ),
        (
            r#"train.lr_multipliers=[{"pattern":"x"}]"#,
            &["train.lr_multipliers[0]", "multiplier"],
        ),
        (
            r#"train.lr_multipliers=[{"multiplier":2}]"#,
            &["train.lr_multipliers[0].pattern", "required"],
        ),
    ] {
        let message = error(&[set]);
        for part in parts {
            assert!(message.contains(part), "{set}: {message}");
        }
    }
    assert!(error(&["data.eval=e.jsonl", "data.eval_split=0.1"]).contains("data.eval_split"));
    assert!(error(&["train.steps=3", "train.max_steps=4"]).contains("train.max_steps"));
    TrainConfig::from_value(&minimal()).unwrap();
}

#[test]
fn overrides_are_json_then_toml_then_text() {
    let mut value = Value::Null;
    for set in [
        "a.b = 3",
        "a.c=1e-3",
        "a.d=hello world",
        "a.e=[\"x\", \"y\"]",
        "a.f='3'",
        "a.g={ h = 1_000 }",
        "a.i=true",
        "a.j=x=y",
        "k=",
    ] {
        apply_set(&mut value, set).unwrap();
    }
    let want = json!({"a": {"b": 3, "c": 1e-3, "d": "hello world", "e": ["x", "y"], "f": "3", "g": {"h": 1000}, "i": true, "j": "x=y"}, "k": ""});
    assert_eq!(value, want);
    apply_set(&mut value, "a.b=null").unwrap();
    assert!(value["a"].get("b").is_none());
    for bad in ["a.c.x=1", "novalue", ".a=1", "a..b=2"] {
        assert!(apply_set(&mut value, bad).is_err(), "{bad}");
    }
    let message = apply_set(&mut value, "a.c.x=1").unwrap_err().to_string();
    assert!(message.contains("`a.c` is a number"), "{message}");
}

#[test]
fn only_what_changes_the_run_is_a_difference() {
    let mut one = TrainConfig::from_value(&minimal()).unwrap();
    // Numbers that a JSON reader does not always get back to the last bit.
    one.train.eps = 1.234_567_890_123_456_7e-23;
    one.train.weight_decay = 0.1 + 0.2;
    let written = |config: &TrainConfig| -> Value {
        serde_json::from_str(&serde_json::to_string_pretty(config).unwrap()).unwrap()
    };
    let mut two = one.clone();
    two.output.dir = "elsewhere".into();
    two.train.save_every = 9;
    two.train.keep_checkpoints = 5;
    assert_eq!(one.differences(&written(&two)), Vec::<String>::new());
    two.train.learning_rate = 0.5;
    two.adapter = Some(Map::from_iter([("r".to_owned(), json!(4))]));
    assert_eq!(
        one.differences(&written(&two)),
        ["adapter", "train.learning_rate"]
    );
}
