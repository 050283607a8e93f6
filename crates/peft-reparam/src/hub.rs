//! AdapterHub's folders of low-rank updates: their configurations and keys as ours, and back.

use peft_core::hub::{self, Hub, HubModel};
use peft_core::serde_json::{Value, json};
use peft_core::{Error, Result, Tensors};

/// Two factors on linear layers.
pub(crate) const LOW_RANK: Hub = Hub {
    claims: |config| {
        let plain = ["use_dora", "use_gating"]
            .iter()
            .all(|field| config[*field] != true);
        config["architecture"] == "lora"
            && config["composition_mode"] == "add"
            && config["vera_d"].is_null()
            && plain
    },
    owns: |_, key| key.contains(".loras."),
    read,
    write,
};

const PAIRS: [(&str, &str); 2] = [
    (".loras.lora_A", ".lora_A.weight"),
    (".loras.lora_B", ".lora_B.weight"),
];

fn read(config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let targets = hub::paths(&tensors, ".loras.");
    let renamed = tensors.into_iter().map(|(key, value)| {
        let key = PAIRS
            .iter()
            .fold(key, |key, (theirs, ours)| key.replace(theirs, ours));
        (hub::our_key(&key), value)
    });
    let ours = json!({
        "r": config["r"],
        "lora_alpha": config["alpha"],
        "lora_dropout": config["dropout"],
        "target_modules": targets,
    });
    Ok((ours, renamed.collect()))
}

fn write(model: &HubModel, config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let set = |v: &Value| {
        !matches!(v, Value::Null | Value::Bool(false)) && *v != json!({}) && *v != json!("none")
    };
    for field in ["rank_pattern", "alpha_pattern", "lora_bias", "bias"] {
        if set(&config[field]) {
            let detail = "AdapterHub has one rank and factor for all modules, and no biases";
            return Err(Error::config(field, detail));
        }
    }
    let (rank, alpha) = (
        config["r"].as_f64().unwrap_or(8.0),
        config["lora_alpha"].as_f64().unwrap_or(8.0),
    );
    let alpha = match config["use_rslora"] == true {
        true => alpha * rank.sqrt(),
        false => alpha,
    };
    let mut out = Tensors::new();
    for (key, value) in hub::plain_keys(model, tensors)? {
        let Some((theirs, ours)) = PAIRS.iter().find(|(_, ours)| key.ends_with(ours)) else {
            let detail = format!("`{key}` has no place in AdapterHub's folders");
            return Err(Error::config("target_modules", detail));
        };
        out.insert(key.replace(ours, theirs), value);
    }
    let mut theirs = hub::linear_places(model, &hub::paths(&out, ".loras."))?;
    let alpha = match alpha.fract() == 0.0 {
        true => json!(alpha as i64),
        false => json!(alpha),
    };
    for (field, value) in [
        ("architecture", json!("lora")),
        ("r", config["r"].clone()),
        ("alpha", alpha),
        ("dropout", config["lora_dropout"].clone()),
        ("composition_mode", json!("add")),
        ("init_weights", json!("lora")),
        ("init_weights_seed", Value::Null),
        ("use_gating", json!(false)),
        ("use_dora", json!(false)),
        ("vera_d", Value::Null),
        ("vera_b", Value::Null),
        ("dtype", Value::Null),
    ] {
        theirs.insert(field.to_owned(), value);
    }
    Ok((Value::Object(theirs), out))
}
