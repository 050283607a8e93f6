//! Evaluation against the model's own logits, and classification end to end.

use peft_core::{Device, Pass};
use peft_models::{Batch, Task};

use super::*;
use crate::data::{Dataset, EncodeOptions, Example, Goal, LABELS_FILE, LabelNames, RawData};
use crate::{EvalOptions, evaluate};

/// Logarithms of the probabilities of the next token after every position of one row.
fn log_probs(model: &Model, ids: &[u32]) -> Vec<Vec<f64>> {
    let logits = model
        .logits(&Batch::single(ids.to_vec()), &Pass::eval())
        .unwrap();
    let row = |row: &[f32]| {
        let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
        row.iter().map(|&v| f64::from(v) - sum.ln()).collect()
    };
    logits.to_vec().unwrap().chunks(31).map(row).collect()
}

fn completion(prompt: &[u32], completion: &[u32], line: usize) -> Example {
    let ids = [prompt, completion].concat();
    let labels = crate::data::learned_from(&ids, prompt.len());
    Example {
        ids,
        mask: None,
        goal: Goal::Tokens {
            labels,
            prompt: Some(prompt.len()),
        },
        line,
        file: 0,
        task: None,
        texts: Vec::new(),
    }
}

/// Summed log probability of a completion, and whether every token of it is the likeliest.
fn by_hand(model: &Model, prompt: &[u32], completion: &[u32]) -> (f64, usize) {
    let ids = [prompt, completion].concat();
    let all = log_probs(model, &ids);
    let (mut sum, mut right) = (0.0, 0);
    for (i, &token) in completion.iter().enumerate() {
        let row = &all[prompt.len() + i - 1];
        sum += row[token as usize];
        right += usize::from(row.iter().all(|&v| v <= row[token as usize]));
    }
    (sum, right)
}

#[test]
fn losses_accuracies_and_choices_are_those_by_hand() {
    let model = fresh_model(8);
    let prompts: Vec<Vec<u32>> = (0..12u32)
        .map(|i| (0..2 + i % 4).map(|j| (i * 7 + j * 5) % 31).collect())
        .collect();
    // What the model itself would say to some, so that neither accuracy is 0.
    let likeliest = |prompt: &[u32]| {
        let row = log_probs(&model, prompt).pop().unwrap();
        (0..31u32)
            .max_by(|&a, &b| row[a as usize].total_cmp(&row[b as usize]))
            .unwrap()
    };
    let choices = [
        vec![likeliest(&prompts[0])],
        vec![3, 4],
        vec![likeliest(&prompts[5]), 9],
    ];
    let examples: Vec<Example> = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| completion(p, &choices[i % 3], i + 1))
        .collect();
    let data = Dataset {
        files: Path::new("rows").into(),
        examples,
        pad: 0,
        max_length: 16,
        notes: Vec::new(),
    };
    let report = evaluate(
        &model,
        &data,
        &EvalOptions {
            batch_size: 5,
            choices: None,
        },
        &mut (),
    )
    .unwrap();

    let (mut sum, mut count, mut right, mut whole, mut chosen) = (0.0, 0, 0, 0, 0);
    for (i, prompt) in prompts.iter().enumerate() {
        let own = &choices[i % 3];
        let (log_prob, correct) = by_hand(&model, prompt, own);
        sum += log_prob;
        count += own.len();
        right += correct;
        whole += usize::from(correct == own.len());
        chosen += usize::from(
            choices
                .iter()
                .all(|c| c == own || by_hand(&model, prompt, c).0 < log_prob),
        );
    }
    assert_eq!((report.rows, report.count), (12, count));
    assert!(
        (report.loss + sum / count as f64).abs() < 1e-5,
        "{} {}",
        report.loss,
        -sum / count as f64
    );
    assert_eq!(report.accuracy, right as f64 / count as f64);
    assert_eq!(report.completion_accuracy, Some(whole as f64 / 12.0));
    assert_eq!(report.choice_accuracy, Some(chosen as f64 / 12.0));
    assert!(
        right > 0 && right < count && chosen > 0 && chosen < 12,
        "{report:?}"
    );

    let without = evaluate(
        &model,
        &data,
        &EvalOptions {
            batch_size: 1,
            choices: Some(false),
        },
        &mut (),
    )
    .unwrap();
    assert_eq!(without.choice_accuracy, None);
    assert!((without.loss - report.loss).abs() < 1e-5);
    let mut mixed = data.clone();
    mixed.examples[0].goal = Goal::Tokens {
        labels: vec![1; mixed.examples[0].ids.len()],
        prompt: None,
    };
    let wanted = EvalOptions {
        batch_size: 4,
        choices: Some(true),
    };
    assert!(
        evaluate(&model, &mixed, &wanted, &mut ())
            .unwrap_err()
            .to_string()
            .contains("data.choices")
    );
    let auto = EvalOptions {
        choices: None,
        ..wanted
    };
    assert_eq!(
        evaluate(&model, &mixed, &auto, &mut ())
            .unwrap()
            .choice_accuracy,
        None
    );
}

fn classified(place: &Place, name: &str, rows: usize, label: impl Fn(usize) -> Value) {
    // The class is whether the row ends in an even token.
    let row = |i: usize| {
        json!({"input_ids": [1 + i % 5, 2 + i % 7, 3, 10 + i % 2], "label": label(i % 2)})
            .to_string()
            + "\n"
    };
    place.write(name, &(0..rows).map(row).collect::<String>());
}

#[test]
fn classes_are_learned_saved_and_found_again() {
    let place = Place::new(1);
    classified(&place, "train.jsonl", 24, |class| {
        json!(["no", "yes"][class])
    });
    classified(&place, "eval.jsonl", 9, |class| json!(["no", "yes"][class]));
    let sets = [
        "data.eval=DIR/eval.jsonl",
        "train.eval_before=true",
        "adapter.dropout=0",
        "adapter.penalty=0",
    ];
    let summary = place.train(
        &[
            &sets[..],
            &["train.steps=40", "adapter.modules_to_save=[\"score\"]"],
        ]
        .concat(),
    );
    let (before, after) = (summary.eval_before.unwrap(), summary.eval_after.unwrap());
    assert!(
        after.loss < 0.2 * before.loss && after.accuracy == 1.0,
        "{before:?} {after:?}"
    );
    assert_eq!((after.rows, after.count, after.perplexity), (9, 9, None));
    let names = LabelNames::read(&place.path("out")).unwrap().unwrap();
    assert_eq!(names.names(), ["no", "yes"]);
    assert_eq!(
        peft_io::read_adapter(&place.path("out")).unwrap().config["task_type"],
        "SEQ_CLS"
    );
    // A class of the evaluation rows that training never saw.
    classified(&place, "eval.jsonl", 9, |class| {
        json!(["no", "perhaps"][class])
    });
    let config = place.config(&[&sets[..], &["output.dir=DIR/other"]].concat());
    let message = train(&config, false, &mut ()).unwrap_err().to_string();
    assert!(
        message.contains("eval.jsonl:2")
            && message.contains("perhaps")
            && message.contains("no, yes"),
        "{message}"
    );
}

#[test]
fn a_classifier_trained_in_full_is_a_model_of_its_classes() {
    let place = Place::new(1);
    classified(&place, "train.jsonl", 12, |class| json!(class * 2));
    place.train(&["adapter=null", "train.steps=2"]);
    assert!(place.path("out").join(LABELS_FILE).is_file());
    let model = Model::load(&place.path("out"), &LoadOptions::default()).unwrap();
    assert_eq!(model.task(), Task::SequenceClassification { num_labels: 3 });
    let config = model.config().json();
    assert_eq!(
        config["architectures"],
        json!(["LlamaForSequenceClassification"])
    );
    assert_eq!(config["id2label"]["2"], "LABEL_2");
    let logits = model
        .logits(&Batch::single(vec![1, 2, 3]), &Pass::eval())
        .unwrap();
    assert_eq!(logits.shape(), [1, 3]);
    assert!(logits.device().same(&Device::cpu()));
}

#[test]
fn a_loss_that_is_not_finite_is_an_error_with_its_row() {
    let place = Place::new(6);
    let mut model = fresh_model(2);
    model.network_mut().unwrap().train_base().unwrap();
    let param = model
        .network()
        .parameters()
        .into_iter()
        .find(|p| p.key() == "model.embed_tokens.weight")
        .unwrap();
    let mut values = param.tensor().to_vec().unwrap();
    values[30 * 16] = f32::NAN;
    param
        .set(peft_tensor::Tensor::from_vec(values, &[31, 16], &Device::cpu()).unwrap())
        .unwrap();
    place.write(
        "rows.jsonl",
        "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[1,30,3]}\n",
    );
    let raw = RawData::read(&place.path("rows.jsonl"), Default::default()).unwrap();
    let options = EncodeOptions {
        max_length: 8,
        add_eos: true,
        task: crate::config::TaskKind::CausalLm,
        vocab_size: 31,
    };
    let data = Dataset::encode(&raw, None, None, &options).unwrap();
    let message = evaluate(&model, &data, &EvalOptions::default(), &mut ())
        .unwrap_err()
        .to_string();
    assert!(message.contains("rows.jsonl line 2"), "{message}");
}

/// transformers writes neither names nor a number for its default of two classes.
#[test]
fn a_classifier_without_names_has_two_classes() {
    let place = Place::new(1);
    let mut config = llama();
    config["architectures"] = json!(["LlamaForSequenceClassification"]);
    place.write("model/config.json", &config.to_string());
    classified(&place, "train.jsonl", 4, |_| json!(0));
    place.train(&["adapter.modules_to_save=[\"score\"]", "train.steps=1"]);
    let names = LabelNames::read(&place.path("out")).unwrap().unwrap();
    assert_eq!(names.names(), ["LABEL_0", "LABEL_1"]);
}

/// An adapter whose file has no head, made without a task, is trained on as it is.
#[test]
fn an_adapter_without_a_head_goes_on_without() {
    let place = Place::new(8);
    place.train(&["output.dir=DIR/first"]);
    let file = place.path("first").join(peft_io::ADAPTER_CONFIG);
    let mut saved = peft_io::read_json(&file).unwrap();
    saved["task_type"] = json!(null);
    std::fs::write(&file, saved.to_string()).unwrap();
    classified(&place, "train.jsonl", 4, |class| json!(class));
    place.train(&["adapter={\"init_from\":\"DIR/first\"}", "train.steps=1"]);
    let (before, after) = (place.adapter("first"), place.adapter("out"));
    assert!(before.keys().eq(after.keys()));
}
