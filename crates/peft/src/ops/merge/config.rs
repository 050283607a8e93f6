//! The `config.json` of a merged checkpoint.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{Error, Result};
use peft_io::{DType, ShardPlan};
use peft_models::Task;
use peft_train::LabelNames;

use crate::ops::Subject;

/// Endings of the class names in `architectures`, longest first.
const CLASSES: [&str; 8] = [
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForPreTraining",
    "ForMaskedLM",
    "ForCausalLM",
    "LMHeadModel",
    "Model",
];

/// The model's own configuration with what the merge changed: the tie, the element type, the head.
/// `labels` are the names an adapter brings for its classes.
pub(super) fn merged(
    subject: &Subject,
    plan: &ShardPlan,
    untied: bool,
    labels: Option<LabelNames>,
) -> Result<Value> {
    let mut config = subject.config.as_object().cloned().unwrap_or_default();
    if untied {
        config.insert("tie_word_embeddings".to_owned(), json!(false));
    }
    set_dtype(&mut config, plan);
    if let Some(Task::SequenceClassification { num_labels }) =
        subject.model().map(peft_models::Model::task)
    {
        set_classifier(
            &mut config,
            num_labels,
            labels.filter(|names| names.len() == num_labels),
        );
    }
    set_positions(&mut config, subject.network().position_scale())?;
    config.remove("_name_or_path");
    // What is written are floats.
    config.remove("quantization_config");
    config.sort_keys();
    Ok(Value::Object(config))
}

/// Interpolated positions, which no weight can hold.
fn set_positions(config: &mut Map<String, Value>, scale: f32) -> Result<()> {
    if scale == 1.0 {
        return Ok(());
    }
    let field = ["rope_parameters", "rope_scaling"]
        .into_iter()
        .find(|f| config.get(*f).is_some_and(Value::is_object))
        .unwrap_or("rope_scaling");
    let mut rope = config.get(field).and_then(Value::as_object).cloned();
    let rope = rope.get_or_insert_default();
    let kind = rope.get("rope_type").or(rope.get("type"));
    let factor = match kind.and_then(Value::as_str).unwrap_or("default") {
        "default" => 1.0,
        "linear" => rope.get("factor").and_then(Value::as_f64).unwrap_or(1.0),
        other => {
            let detail = format!(
                "an adapter interpolates positions by {scale}, and the model's own are stretched in the way {other:?}: a \
                 merged configuration cannot say both"
            );
            return Err(Error::config(field, detail));
        }
    };
    rope.remove("type");
    rope.insert("rope_type".to_owned(), json!("linear"));
    rope.insert("factor".to_owned(), json!(factor * f64::from(scale)));
    config.insert(field.to_owned(), json!(rope));
    if let Some(own) = config
        .get("max_position_embeddings")
        .and_then(Value::as_f64)
    {
        let longer = (own * f64::from(scale)).round() as u64;
        config.insert("max_position_embeddings".to_owned(), json!(longer));
    }
    Ok(())
}

/// `dtype` (`torch_dtype` before transformers 5), if all floats are of one type.
fn set_dtype(config: &mut Map<String, Value>, plan: &ShardPlan) {
    let mut kinds: Vec<&str> = plan
        .entries()
        .filter_map(|e| match e.dtype {
            DType::F32 => Some("float32"),
            DType::BF16 => Some("bfloat16"),
            DType::F16 => Some("float16"),
            _ => None,
        })
        .collect();
    kinds.sort_unstable();
    kinds.dedup();
    let [kind] = kinds[..] else { return };
    let key = if config.contains_key("torch_dtype") {
        "torch_dtype"
    } else {
        "dtype"
    };
    config.insert(key.to_owned(), json!(kind));
}

/// The class and labels of a classifier, where the base was something else.
fn set_classifier(config: &mut Map<String, Value>, count: usize, labels: Option<LabelNames>) {
    let class = config
        .get("architectures")
        .and_then(|a| a.get(0))
        .and_then(Value::as_str)
        .unwrap_or_default();
    let family = CLASSES
        .iter()
        .find_map(|ending| class.strip_suffix(ending))
        .unwrap_or(class);
    if !family.is_empty() {
        config.insert(
            "architectures".to_owned(),
            json!([format!("{family}{}", CLASSES[0])]),
        );
    }
    let known = config
        .get("id2label")
        .and_then(Value::as_object)
        .map(Map::len);
    if labels.is_none() && known == Some(count) {
        return;
    }
    let generic = || LabelNames::new((0..count).map(|i| format!("LABEL_{i}")).collect());
    if let Value::Object(names) = labels.unwrap_or_else(generic).to_json() {
        config.extend(names);
    }
    config.remove("num_labels");
}
