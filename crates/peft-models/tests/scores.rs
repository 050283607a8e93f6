//! What a classification head does, and does not.

use peft_core::Pass;
use peft_core::serde_json::{Value, json};
use peft_models::{Batch, LoadOptions, Model, ModelConfig, Task};

/// Gemma 2 caps its language model's logits, not a classifier's scores.
#[test]
fn scores_are_not_capped() {
    let output = |cap: Value, task: Task| {
        let mut json = json!({
            "model_type": "gemma2", "vocab_size": 53, "hidden_size": 16, "intermediate_size": 20, "head_dim": 6,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2
        });
        json["final_logit_softcapping"] = cap;
        let options = LoadOptions {
            task: Some(task),
            seed: 3,
            ..LoadOptions::default()
        };
        let model = Model::from_config(&ModelConfig::from_json(&json).unwrap(), &options).unwrap();
        let logits = model.logits(&Batch::single(vec![5, 2, 9]), &Pass::eval());
        logits.unwrap().to_vec().unwrap()
    };
    let classes = Task::SequenceClassification { num_labels: 3 };
    let (capped, free) = (output(json!(0.1), classes), output(json!(null), classes));
    assert_eq!(capped, free);
    let tokens = output(json!(0.1), Task::CausalLm);
    assert!(tokens.iter().all(|y| y.abs() <= 0.1));
}
