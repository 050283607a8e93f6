//! AdapterHub's folders of low-rank updates: their configurations and keys as ours, and back.

use peft_core::hub::{self, Hub, HubModel};
use peft_core::serde_json::{Value, json};
use peft_core::{Error, Result, Tensors};

/// AdapterHub's own configuration, all fields at their defaults.
fn defaults() -> Value {
    peft_core::serde_json::from_str(include_str!("adapterhub.json")).unwrap_or_default()
}

/// Two factors on linear layers.
pub(crate) const LOW_RANK: Hub = Hub {
    claims: |config| {
        let plain = ["use_dora", "use_gating"]
            .iter()
            .all(|field| config[*field] != true);
        config["architecture"] == defaults()["architecture"]
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
    let places = hub::linear_places(model, &hub::paths(&out, ".loras."))?;
    let alpha = match alpha.fract() == 0.0 {
        true => json!(alpha as i64),
        false => json!(alpha),
    };
    let mut theirs = defaults();
    if let Some(fields) = theirs.as_object_mut() {
        fields.extend(places);
        fields.insert("r".to_owned(), config["r"].clone());
        fields.insert("alpha".to_owned(), alpha);
        fields.insert("dropout".to_owned(), config["lora_dropout"].clone());
    }
    Ok((theirs, out))
}
