//! AdapterHub's folders of additive methods: their configurations and keys as ours, and back.

use peft_core::hub::{self, Hub, HubModel};
use peft_core::peft_tensor::concat;
use peft_core::serde_json::{Map, Value, json};
use peft_core::{Error, Result, Tensor, Tensors};

use crate::activation::activation;
use crate::virtual_tokens::PROMPT;

/// AdapterHub's own configuration of a kind, all fields at their defaults.
fn default_of(kind: &str) -> Value {
    let all: Value =
        peft_core::serde_json::from_str(include_str!("adapterhub.json")).unwrap_or_default();
    all[kind].clone()
}

/// Whether a configuration of theirs is of that kind.
fn is_kind(kind: &str, config: &Value) -> bool {
    config["architecture"] == default_of(kind)["architecture"]
}

/// A configuration of that kind with these fields.
fn with_fields<const N: usize>(kind: &str, fields: [(&str, Value); N]) -> Value {
    let mut config = default_of(kind);
    for (field, value) in fields {
        config[field] = value;
    }
    config
}

/// What sets the methods apart that AdapterHub keeps in one kind of configuration.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Behind one sublayer of a layer.
    Single,
    /// Behind both.
    Double,
    /// Beside a sublayer, its factor fixed.
    Beside,
    /// Beside a sublayer, its factor trained.
    BesideTrained,
    /// A factor for each feature.
    Channel,
    /// Kronecker products behind both sublayers.
    DoubleProducts,
    /// Kronecker products behind one.
    SingleProducts,
    /// Only behind the embeddings.
    Coupling,
}

/// Whether a configuration of theirs is a bottleneck of that form.
pub(crate) fn is(form: Form, config: &Value) -> bool {
    let bottleneck = config["architecture"].is_null() || config["architecture"] == "bottleneck";
    if !bottleneck || config.get("reduction_factor").is_none() {
        return false;
    }
    let yes = |field: &str| config[field] == true;
    let found = match () {
        () if !yes("mh_adapter") && !yes("output_adapter") => Form::Coupling,
        () if yes("phm_layer") && yes("mh_adapter") => Form::DoubleProducts,
        () if yes("phm_layer") => Form::SingleProducts,
        () if yes("is_parallel") && config["scaling"].is_string() => Form::BesideTrained,
        () if yes("is_parallel") => Form::Beside,
        () if config["scaling"] == "channel" => Form::Channel,
        () if yes("mh_adapter") => Form::Double,
        () => Form::Single,
    };
    found == form
}

/// A bottleneck's form there.
pub(crate) const fn bottleneck(claims: fn(&Value) -> bool) -> Hub {
    Hub {
        claims,
        owns: owns_bottleneck,
        read: |config, tensors| Ok((known(config), hub::our_keys(tensors))),
        write: write_bottleneck,
    }
}

/// Their fields, in the order of their class; ours have the same names.
const FIELDS: &str = "mh_adapter output_adapter reduction_factor non_linearity original_ln_before original_ln_after ln_before \
    ln_after init_weights init_weights_seed is_parallel scaling use_gating residual_before_ln adapter_residual_before_ln \
    inv_adapter inv_adapter_reduction_factor cross_adapter leave_out dropout phm_layer phm_dim factorized_phm_W shared_W_phm \
    shared_phm_rule factorized_phm_rule phm_c_init phm_init_range learn_phm hypercomplex_nonlinearity phm_rank phm_bias \
    stochastic_depth";

fn known(config: &Value) -> Value {
    let kept = FIELDS.split_whitespace().filter_map(|field| {
        let value = config.get(field).filter(|v| !v.is_null())?;
        Some((field.to_owned(), value.clone()))
    });
    Value::Object(kept.collect())
}

const ADAPTERS: &str = ".adapters.";
const COUPLING: &str = "invertible_adapters.";

/// Whether a path is behind attention rather than behind the feed-forward sublayer.
fn behind_attention(path: &str) -> bool {
    path.ends_with("attention.output") || path.ends_with("attention_adapters")
}

fn owns_bottleneck(config: &Value, key: &str) -> bool {
    if key.contains("shared_parameters.") {
        return config["phm_layer"] == true;
    }
    if key.contains(COUPLING) {
        return !config["inv_adapter"].is_null();
    }
    let Some(at) = key.find(ADAPTERS) else {
        return false;
    };
    let place = match behind_attention(&key[..at]) {
        true => "mh_adapter",
        false => "output_adapter",
    };
    config[place] == true
}

fn write_bottleneck(
    model: &HubModel,
    config: &Value,
    tensors: Tensors,
) -> Result<(Value, Tensors)> {
    let mut plain = hub::plain_keys(model, tensors)?;
    let (attention, output): (Vec<String>, Vec<String>) = hub::paths(&plain, ADAPTERS)
        .into_iter()
        .partition(|p| behind_attention(p));
    let mut theirs = known(config);
    let Some(fields) = theirs.as_object_mut() else {
        return Err(Error::other("a configuration has to be a table"));
    };
    // What is there counts, whatever said where it should be.
    fields.insert("mh_adapter".to_owned(), json!(!attention.is_empty()));
    fields.insert("output_adapter".to_owned(), json!(!output.is_empty()));
    let left_out = match attention.is_empty() && output.is_empty() {
        true => Vec::new(),
        false => hub::left_out(model, &[&attention, &output])?,
    };
    fields.insert("leave_out".to_owned(), json!(left_out));
    // Python tells whole numbers from factors.
    if let Some(factor) = fields.get("scaling").and_then(Value::as_f64) {
        fields.insert("scaling".to_owned(), json!(factor));
    }
    if config["ln_before"] == true {
        let twice: Vec<(String, Tensor)> = plain
            .iter()
            .filter(|(k, _)| k.contains(".adapter_down.0."))
            .map(|(k, t)| {
                (
                    k.replace(".adapter_down.0.", ".adapter_norm_before."),
                    t.clone(),
                )
            })
            .collect();
        plain.extend(twice);
    }
    Ok((theirs, plain))
}

/// An invertible adapter without a bottleneck.
pub(crate) const fn coupling(claims: fn(&Value) -> bool) -> Hub {
    Hub {
        claims,
        owns: |_, key| key.contains(COUPLING),
        read: |config, tensors| {
            let fields = [
                "inv_adapter",
                "inv_adapter_reduction_factor",
                "non_linearity",
            ];
            let kept = fields.iter().filter(|f| !config[**f].is_null());
            let kept = kept.map(|f| ((*f).to_owned(), config[*f].clone()));
            Ok((Value::Object(kept.collect()), hub::our_keys(tensors)))
        },
        write: |model, config, tensors| {
            let mut theirs = known(config);
            for (field, value) in [
                ("mh_adapter", json!(false)),
                ("output_adapter", json!(false)),
                ("reduction_factor", json!(16)),
            ] {
                theirs[field] = value;
            }
            Ok((theirs, hub::plain_keys(model, tensors)?))
        },
    }
}

/// Interventions on hidden states.
pub(crate) const REFT: Hub = Hub {
    claims: |config| config["architecture"] == "reft",
    owns: |_, key| key.contains(".refts."),
    read: read_reft,
    write: write_reft,
};

/// Their fields, whose names are ours.
const REFT_FIELDS: [&str; 10] = [
    "layers",
    "prefix_positions",
    "suffix_positions",
    "r",
    "orthogonality",
    "tied_weights",
    "dropout",
    "non_linearity",
    "dtype",
    "init_weights_seed",
];
const ORIGINAL: &str = "projection.parametrizations.weight.original";
const BASE: &str = "projection.parametrizations.weight.0.base";

fn read_reft(config: &Value, mut tensors: Tensors) -> Result<(Value, Tensors)> {
    let originals: Vec<String> = tensors
        .keys()
        .filter(|k| k.ends_with(ORIGINAL))
        .cloned()
        .collect();
    for key in originals {
        let base = key.replace(ORIGINAL, BASE);
        if let (Some(original), Some(base)) = (tensors.remove(&key), tensors.remove(&base)) {
            let rows = reflected(&original, &base)?;
            tensors.insert(key.replace(ORIGINAL, "projection.weight"), rows);
        }
    }
    let renamed = tensors
        .into_iter()
        .map(|(k, t)| (hub::our_key(&k.replace(".reft_layer.refts.", ".refts.")), t));
    let kept = REFT_FIELDS
        .iter()
        .filter(|f| !config[**f].is_null())
        .map(|f| ((*f).to_owned(), config[*f].clone()));
    Ok((Value::Object(kept.collect()), renamed.collect()))
}

/// The orthonormal rows that PyTorch keeps as reflections: `Rᵀ = base (H_1 .. H_r) E_r diag(signs)`, H_j the reflection along
/// the j-th column of the lower triangle of `originalᵀ` with ones on the diagonal, whose own values are signs.
fn reflected(original: &Tensor, base: &Tensor) -> Result<Tensor> {
    let (r, d) = original.dims2()?;
    if base.shape() != [d, d] || r > d {
        let detail = format!("{:?} for a basis {:?}", original.shape(), base.shape());
        return Err(Error::config(ORIGINAL, detail));
    }
    let (values, basis) = (original.to_f64()?, base.to_f64()?);
    // Columns of the product, applied to unit vectors from the last reflection to the first.
    let mut rows = Vec::with_capacity(r * d);
    for column in 0..r {
        let mut v = vec![0.0; d];
        v[column] = 1.0;
        for j in (0..r).rev() {
            let at = |i: usize| match i.cmp(&j) {
                std::cmp::Ordering::Less => 0.0,
                std::cmp::Ordering::Equal => 1.0,
                std::cmp::Ordering::Greater => values[j * d + i],
            };
            let length: f64 = (0..d).map(|i| at(i) * at(i)).sum();
            let along: f64 = (0..d).map(|i| at(i) * v[i]).sum();
            for (i, v) in v.iter_mut().enumerate() {
                *v -= 2.0 * along / length * at(i);
            }
        }
        let sign = values[column * d + column].trunc();
        rows.extend((0..d).map(|i| {
            let dot: f64 = (0..d).map(|k| basis[i * d + k] * v[k]).sum();
            (dot * sign) as f32
        }));
    }
    Ok(Tensor::from_vec(rows, &[r, d], original.device())?)
}

/// Orthonormal rows and the rest of a basis: the inverse of [`reflected`] with reflections along the axes.
fn basis(rows: &Tensor) -> Result<(Tensor, Tensor)> {
    let (r, d) = rows.dims2()?;
    let mut vectors: Vec<Vec<f64>> = rows.to_f64()?.chunks(d).map(<[f64]>::to_vec).collect();
    for axis in 0..d {
        if vectors.len() == d {
            break;
        }
        let mut v = vec![0.0; d];
        v[axis] = 1.0;
        for _ in 0..2 {
            for known in &vectors {
                let dot: f64 = known.iter().zip(&v).map(|(a, b)| a * b).sum();
                v.iter_mut().zip(known).for_each(|(v, k)| *v -= dot * k);
            }
        }
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        if length > 1e-3 {
            vectors.push(v.iter().map(|x| x / length).collect());
        }
    }
    let (mut base, mut original) = (vec![0.0; d * d], vec![0.0; r * d]);
    for (j, v) in vectors.iter().enumerate().take(d) {
        v.iter()
            .enumerate()
            .for_each(|(i, x)| base[i * d + j] = *x as f32);
    }
    original
        .iter_mut()
        .step_by(d + 1)
        .for_each(|v: &mut f32| *v = -1.0);
    Ok((
        Tensor::from_vec(original, &[r, d], rows.device())?,
        Tensor::from_vec(base, &[d, d], rows.device())?,
    ))
}

fn write_reft(model: &HubModel, config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    if config["subtract_projection"] == false {
        let detail = "false: AdapterHub does not save that, and would load something else";
        return Err(Error::config("subtract_projection", detail));
    }
    let mut out = Tensors::new();
    for (key, value) in hub::plain_keys(model, tensors)? {
        let key = key.replace(".refts.", ".reft_layer.refts.");
        match key.strip_suffix("projection.weight") {
            Some(unit) if config["orthogonality"] == true => {
                let (original, base) = basis(&value)?;
                out.insert(format!("{unit}{ORIGINAL}"), original);
                out.insert(format!("{unit}{BASE}"), base);
            }
            _ => drop(out.insert(key, value)),
        }
    }
    if config["tied_weights"] != true {
        // They have both units, whether there are tokens for them or not.
        for (from, to) in [(".units.0.", ".units.1."), (".units.1.", ".units.0.")] {
            let missing: Vec<(String, Tensor)> = out
                .iter()
                .filter(|(k, _)| k.contains(from) && !out.contains_key(&k.replace(from, to)))
                .map(|(k, t)| (k.replace(from, to), t.clone()))
                .collect();
            out.extend(missing);
        }
    }
    let places = hub::paths(&out, ".reft_layer.");
    let left_out = hub::left_out(model, &[&places])?;
    let mut fields: Map<String, Value> = REFT_FIELDS
        .iter()
        .map(|f| ((*f).to_owned(), config[*f].clone()))
        .collect();
    fields.insert("architecture".to_owned(), json!("reft"));
    fields.insert("output_reft".to_owned(), json!(true));
    let layers: Vec<usize> = (0..model.num_layers)
        .filter(|l| !left_out.contains(l))
        .collect();
    let layers = match left_out.is_empty() {
        true => json!("all"),
        false => json!(layers),
    };
    fields.insert("layers".to_owned(), layers);
    Ok((Value::Object(fields), out))
}

/// Keys and values in front of every layer's own; `claims` is false for all but one of the methods that save such.
pub(crate) const fn prefix(claims: fn(&Value) -> bool) -> Hub {
    Hub {
        claims,
        owns: |_, key| key.contains(".prefix_tuning.") || key.starts_with("prefix_tuning."),
        read: read_prefix,
        write: write_prefix,
    }
}

/// Whether a configuration of theirs is a prefix without gates.
pub(crate) fn is_prefix(config: &Value) -> bool {
    is_kind("prefix", config) && config["use_gating"] != true
}

fn read_prefix(config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    if config["encoder_prefix"] == false {
        let detail = "has to be true: models here have no other attention";
        return Err(Error::config("encoder_prefix", detail));
    }
    let length = config["prefix_length"].as_u64().unwrap_or(0) as usize;
    if length == 0 {
        return Err(Error::config("prefix_length", "has to be at least 1"));
    }
    let find = |end: &str| {
        let found = tensors
            .iter()
            .find(|(k, _)| k.ends_with(&format!("self_prefix.{end}")));
        found.map(|(_, t)| t)
    };
    let all = (
        find("wte.weight"),
        find("control_trans.0.weight"),
        find("control_trans.0.bias"),
        find("control_trans.2.weight"),
        find("control_trans.2.bias"),
    );
    let prefix = match (find("control_trans"), all) {
        (Some(flat), _) => {
            let width = flat.numel() / length;
            flat.reshape(&[length, width])?
        }
        (None, (Some(e), Some(w1), Some(b1), Some(w2), Some(b2))) => {
            let name = config["non_linearity"].as_str().unwrap_or("tanh");
            let f = activation("non_linearity", name)?;
            f(&e.matmul_t(w1)?.add(b1)?)?.matmul_t(w2)?.add(b2)?
        }
        _ => {
            let keys: Vec<_> = tensors.keys().map(String::as_str).collect();
            let detail = format!("no prefix of self attention among {}", keys.join(", "));
            return Err(Error::config("adapter.safetensors", detail));
        }
    };
    // Their positions count from the text's first token.
    let mut ours =
        json!({"num_virtual_tokens": length, "shift_positions": false, "inference_mode": true});
    if config["leave_out"]
        .as_array()
        .is_some_and(|l| !l.is_empty())
    {
        ours["leave_out"] = config["leave_out"].clone();
    }
    Ok((ours, [(PROMPT.to_owned(), prefix)].into_iter().collect()))
}

fn write_prefix(model: &HubModel, config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    if config["shift_positions"] != false {
        let detail = "AdapterHub's prefixes do not move the positions of the text, this one was trained with moved ones; \
            train it with shift_positions = false";
        return Err(Error::config("shift_positions", detail));
    }
    let Some(prefix) = tensors.get(PROMPT) else {
        return Err(Error::config(PROMPT, "is missing"));
    };
    let (length, _) = prefix.dims2()?;
    let left_out = config.get("leave_out").cloned();
    let theirs = with_fields(
        "prefix",
        [
            ("leave_out", left_out.unwrap_or_else(|| json!([]))),
            ("prefix_length", json!(length)),
        ],
    );
    let key = model.below("prefix_tuning.prefix_tunings.self_prefix.control_trans");
    let flat = prefix.reshape(&[prefix.numel()])?;
    Ok((theirs, [(key, flat)].into_iter().collect()))
}

/// Virtual tokens behind the embeddings.
pub(crate) const PROMPTS: Hub = Hub {
    claims: |config| is_kind("prompt", config),
    owns: |_, key| key.contains("prompt_tuning."),
    read: |config, tensors| {
        let tokens: Vec<&Tensor> = tensors.values().collect();
        let tokens = concat(&tokens, 0)?;
        let place = match config["combine"].as_str() {
            Some("prefix_after_bos") => "behind_first",
            _ => "behind_embeddings",
        };
        let (count, _) = tokens.dims2()?;
        let ours =
            json!({"num_virtual_tokens": count, "prompt_place": place, "inference_mode": true});
        Ok((ours, [(PROMPT.to_owned(), tokens)].into_iter().collect()))
    },
    write: |model, config, tensors| {
        let combine = match config["prompt_place"].as_str() {
            Some("behind_embeddings") => "prefix",
            Some("behind_first") => "prefix_after_bos",
            _ => {
                let detail = "AdapterHub's prompts come in behind the embeddings, with no positions of their own: train it \
                    with prompt_place = \"behind_embeddings\"";
                return Err(Error::config("prompt_place", detail));
            }
        };
        let Some(tokens) = tensors.get(PROMPT) else {
            return Err(Error::config(PROMPT, "is missing"));
        };
        let theirs = with_fields(
            "prompt",
            [
                ("combine", json!(combine)),
                ("prompt_length", json!(tokens.dims2()?.0)),
            ],
        );
        let key = model.below("prompt_tuning.prompt_tunings.prompt_embedding.weight");
        Ok((theirs, [(key, tokens.clone())].into_iter().collect()))
    },
};

/// Factors on the outputs of linear layers.
pub(crate) const FACTORS: Hub = Hub {
    claims: |config| {
        is_kind("factors", config)
            && config["composition_mode"] == "scale"
            && config["use_gating"] != true
    },
    owns: |_, key| key.contains(".loras."),
    read: |config, tensors| {
        let targets = hub::paths(&tensors, ".loras.");
        let alpha = config["alpha"].as_f64().unwrap_or(1.0) as f32;
        let renamed = tensors.into_iter().map(|(k, t)| {
            let key = hub::our_key(&k.replace(".loras.lora_B", ".ia3_l"));
            Ok((key, if alpha == 1.0 { t } else { t.scale(alpha)? }))
        });
        let ours = json!({"target_modules": targets, "feedforward_modules": []});
        Ok((ours, renamed.collect::<Result<_>>()?))
    },
    write: |model, _, tensors| {
        let mut out = Tensors::new();
        for (key, value) in hub::plain_keys(model, tensors)? {
            if value.shape().last() != Some(&1) {
                let detail = format!("`{key}` scales an input; AdapterHub scales outputs");
                return Err(Error::config("feedforward_modules", detail));
            }
            out.insert(key.replace(".ia3_l", ".loras.lora_B"), value);
        }
        let mut theirs = default_of("factors");
        if let Some(fields) = theirs.as_object_mut() {
            fields.extend(hub::linear_places(model, &hub::paths(&out, ".loras."))?);
        }
        Ok((theirs, out))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::Device;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_vec(values.to_vec(), shape, &Device::cpu()).expect("a tensor")
    }

    /// Reflections along (1, 1, 0) / sqrt 2 take (1, 0, 0) to (0, -1, 0); a sign of -1 turns it round.
    #[test]
    fn a_reflection_by_hand() {
        let base = tensor(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], &[3, 3]);
        let original = tensor(&[-1.0, 1.0, 0.0], &[1, 3]);
        let rows = reflected(&original, &base).expect("fits");
        let values = rows.to_vec().expect("values");
        for (a, b) in values.iter().zip([0.0, 1.0, 0.0]) {
            assert!((a - b).abs() < 1e-7, "{values:?}");
        }
    }

    #[test]
    fn rows_come_back_from_their_basis() {
        let rows = tensor(&[0.6, 0.8, 0.0, 0.0, -0.8, 0.6, 0.0, 0.0], &[2, 4]);
        let (original, base) = basis(&rows).expect("fits");
        let back = reflected(&original, &base).expect("fits");
        for (a, b) in rows
            .to_vec()
            .expect("values")
            .iter()
            .zip(back.to_vec().expect("values"))
        {
            assert!((a - b).abs() < 1e-6);
        }
    }

    #[test]
    fn a_bottleneck_has_one_form() {
        let all = [
            Form::Single,
            Form::Double,
            Form::Beside,
            Form::BesideTrained,
            Form::Channel,
            Form::DoubleProducts,
            Form::SingleProducts,
            Form::Coupling,
        ];
        let forms = |config: Value| all.iter().filter(|f| is(**f, &config)).count();
        for fields in [
            json!({"reduction_factor": 2, "output_adapter": true}),
            json!({"reduction_factor": 2, "output_adapter": true, "is_parallel": true, "scaling": "channel"}),
            json!({"reduction_factor": 2, "mh_adapter": true, "phm_layer": true}),
            json!({"reduction_factor": 2, "inv_adapter": "nice"}),
        ] {
            assert_eq!(forms(fields.clone()), 1, "{fields}");
        }
        assert_eq!(forms(json!({"architecture": "lora", "r": 2})), 0);
    }
}
