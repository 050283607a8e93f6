//! Rows joined into one without padding: every method either gives the padded batch's loss and gradients, or says that it
//! cannot tell the texts apart; and where it says that it treats all rows alike, also with what they begin with run once.

use peft::core::{Device, Pass, RngKey, Tensor};
use peft::models::{Batch, Labels, LoadOptions, Model, ModelConfig, Task};
use peft::tensor::IGNORE;
use serde_json::{Value, json};

/// Texts of different lengths, so that each but the longest would be padded.
const LENGTHS: [usize; 4] = [5, 2, 9, 4];

fn llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 23, "hidden_size": 12,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false,
        "initializer_range": 0.4, "pad_token_id": 0
    })
}

fn bert() -> Value {
    json!({
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 23, "hidden_size": 12,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12,
        "type_vocab_size": 2, "layer_norm_eps": 1e-7, "hidden_act": "gelu", "initializer_range": 0.4, "pad_token_id": 0
    })
}

fn texts() -> Vec<Vec<u32>> {
    let id = |text: usize, i: usize| 1 + ((text * 7 + i * 5 + i * i) % 22) as u32;
    let text = |(text, len): (usize, &usize)| (0..*len).map(|i| id(text, i)).collect();
    LENGTHS.iter().enumerate().map(text).collect()
}

/// The texts padded, and in one row.
fn batches(task: Task) -> [(Batch, Labels); 2] {
    let texts = texts();
    let padded = Batch::padded(&texts, 0);
    let number = |(n, text): (usize, &Vec<u32>)| vec![n as u32; text.len()];
    let joined = Batch {
        segments: Some(texts.iter().enumerate().flat_map(number).collect()),
        ..Batch::single(texts.concat())
    };
    if let Task::SequenceClassification { num_labels } = task {
        let classes: Vec<u32> = (0..texts.len()).map(|i| (i % num_labels) as u32).collect();
        let labels = Labels::Classes(classes);
        return [(padded, labels.clone()), (joined, labels)];
    }
    let width = padded.seq;
    let labels = |text: &Vec<u32>, width: usize| {
        let own = text.iter().enumerate();
        let mut labels: Vec<i64> = own
            .map(|(i, id)| if i == 0 { IGNORE } else { i64::from(*id) })
            .collect();
        labels.resize(width, IGNORE);
        labels
    };
    let wide = texts.iter().flat_map(|t| labels(t, width)).collect();
    let dense = texts.iter().flat_map(|t| labels(t, t.len())).collect();
    [
        (padded, Labels::Tokens(wide)),
        (joined, Labels::Tokens(dense)),
    ]
}

/// A model with the method, its parameters away from their initial values; None if the method does not fit the model.
fn model(config: &Value, task: Task, adapter: &Value) -> Option<Model> {
    let config = ModelConfig::from_json(config).expect("a configuration");
    let options = LoadOptions {
        task: Some(task),
        ..LoadOptions::default()
    };
    let mut model = Model::from_config(&config, &options).expect("a model");
    let network = model.network_mut().expect("the only holder");
    network.attach("a", adapter, 5).ok()?;
    for (at, param) in network.parameters().iter().enumerate() {
        if param.is_frozen() {
            continue;
        }
        let key = RngKey::new(3).fork_n(at as u64);
        let noise = Tensor::normal(key, 0.0, 0.2, &param.shape(), &Device::cpu()).expect("noise");
        let moved = param.tensor().detach().add(&noise).expect("a sum");
        param.set(moved).expect("the same shape");
    }
    Some(model)
}

/// Gradients by key.
type Gradients = Vec<(String, Vec<f32>)>;

fn outcome(model: &Model, batch: &(Batch, Labels)) -> peft::Result<(f64, Gradients)> {
    outcome_in(&Pass::eval(), model, batch)
}

fn outcome_in(
    pass: &Pass,
    model: &Model,
    batch: &(Batch, Labels),
) -> peft::Result<(f64, Gradients)> {
    let out = model.loss(&batch.0, &batch.1, pass)?;
    let sum = out.sum()?;
    let grads = out.loss.backward()?;
    let mut all = Vec::new();
    for param in model.network().parameters() {
        if let Some(grad) = grads.get(&param.tensor()) {
            all.push((param.key().to_owned(), grad.to_vec()?));
        }
    }
    Ok((sum, all))
}

/// Checks that two ways to the same loss and gradients differ by no more than sums of a few terms in another order do.
fn agree(what: &str, want: (f64, &Gradients), got: (f64, &Gradients)) {
    let ((want, want_grads), (got, grads)) = (want, got);
    assert!(
        (got - want).abs() <= 2e-5 * want.abs(),
        "{what}: the loss was {want} and is {got}"
    );
    assert_eq!(want_grads.len(), grads.len(), "{what}");
    let size = |values: &[f32]| values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    // Some gradients, as that of a key's bias, are sums of larger terms that cancel.
    let least = 0.01 * want_grads.iter().map(|(_, g)| size(g)).fold(0.0, f32::max);
    for ((key, want), (_, got)) in want_grads.iter().zip(grads) {
        let size = size(want).max(least);
        let gap = want
            .iter()
            .zip(got)
            .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(
            gap <= 1e-4 * size + 2.0 * f32::EPSILON,
            "{what}: {key} differs by {gap} of {size}"
        );
    }
}

/// Ids of the methods that gave the same, and of those that refused.
fn compare(config: &Value, task: Task) -> [Vec<&'static str>; 2] {
    let [padded, joined] = batches(task);
    let (mut same, mut refused) = (Vec::new(), Vec::new());
    for (entry, adapter) in peft_tests::subject::configs() {
        let mut adapter = adapter;
        if task != Task::CausalLm {
            adapter["task_type"] = json!("SEQ_CLS");
        }
        let Some(model) = model(config, task, &adapter) else {
            continue;
        };
        let what = format!("{adapter} on {}", config["model_type"]);
        let Ok((want, want_grads)) = outcome(&model, &padded) else {
            continue;
        };
        let (got, grads) = match outcome(&model, &joined) {
            Ok(found) => found,
            Err(why) => {
                assert!(why.to_string().contains("one text"), "{what}: {why}");
                refused.push(entry.id);
                continue;
            }
        };
        agree(&what, (want, &want_grads), (got, &grads));
        same.push(entry.id);
    }
    [same, refused]
}

#[test]
fn every_method_gives_the_padded_loss_or_refuses() {
    let classes = Task::SequenceClassification { num_labels: 3 };
    for (config, task, least) in [
        (llama(), Task::CausalLm, 40),
        (llama(), classes, 30),
        (bert(), classes, 10),
    ] {
        let [same, refused] = compare(&config, task);
        assert!(same.len() >= least, "only {same:?}; refused: {refused:?}");
        eprintln!(
            "{}: {} the same, refused {refused:?}",
            config["model_type"],
            same.len()
        );
    }
}

/// Texts that begin alike and are learned from behind that: joined, and joined with their beginning once.
fn beginnings() -> [(Batch, Labels); 2] {
    let begin = [3, 9, 4, 17];
    let mut texts = texts();
    for text in &mut texts {
        text.splice(0..0, begin);
    }
    let made = |texts: &[&[u32]], first: usize, once: &[u32]| {
        let (mut ids, mut labels) = (once.to_vec(), vec![IGNORE; once.len()]);
        let mut segments = vec![99; once.len()];
        for (n, text) in texts.iter().enumerate() {
            ids.extend(*text);
            segments.resize(ids.len(), n as u32);
            let own = text.iter().enumerate();
            labels.extend(own.map(|(i, id)| if i < first { IGNORE } else { i64::from(*id) }));
        }
        let batch = Batch {
            segments: Some(segments),
            shared: once.len(),
            ..Batch::single(ids)
        };
        (batch, Labels::Tokens(labels))
    };
    let whole: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let rest: Vec<&[u32]> = texts.iter().map(|t| &t[begin.len()..]).collect();
    [made(&whole, begin.len() + 1, &[]), made(&rest, 1, &begin)]
}

#[test]
fn what_texts_begin_with_may_be_run_once() {
    let [joined, shared] = beginnings();
    let (mut same, mut refused) = (Vec::new(), Vec::new());
    for (entry, adapter) in peft_tests::subject::configs() {
        let Some(model) = model(&llama(), Task::CausalLm, &adapter) else {
            continue;
        };
        let Ok((want, want_grads)) = outcome(&model, &joined) else {
            continue;
        };
        let got = outcome(&model, &shared);
        if !model.shares_beginnings() {
            assert!(got.is_err(), "{adapter}");
            refused.push(entry.id);
            continue;
        }
        let (got, grads) = got.expect("a loss");
        agree(&adapter.to_string(), (want, &want_grads), (got, &grads));
        // What is drawn in training is drawn for all rows alike.
        let pass = Pass::train(RngKey::new(8));
        let [(want, want_grads), (got, grads)] =
            [&joined, &shared].map(|batch| outcome_in(&pass, &model, batch).expect("a loss"));
        let what = format!("{adapter} in training");
        agree(&what, (want, &want_grads), (got, &grads));
        same.push(entry.id);
    }
    eprintln!("once {same:?}, refused {refused:?}");
    assert!(same.len() >= 8, "only {same:?}");
    assert!(refused.len() >= 8, "only {refused:?}");
}

/// A decoder's last block ends for the rows alone that are learned from, where these are few and adapters treat rows alike:
/// one that does nothing and drops some of its input shows what the whole block gives.
#[test]
fn a_decoder_gives_the_same_from_all_rows_of_its_last_block() {
    let nothing =
        json!({"peft_type": "LORA", "r": 1, "lora_dropout": 0.1, "target_modules": ["lm_head"]});
    let mut same = Vec::new();
    for (entry, adapter) in peft_tests::subject::configs() {
        let Some(mut model) = model(&llama(), Task::CausalLm, &adapter) else {
            continue;
        };
        if !model.network().by_rows() {
            continue;
        }
        for (batch, mut labels) in batches(Task::CausalLm) {
            if let Labels::Tokens(labels) = &mut labels {
                for label in labels.iter_mut().step_by(3) {
                    *label = IGNORE;
                }
                for label in labels.iter_mut().skip(1).step_by(3) {
                    *label = IGNORE;
                }
            }
            let batch = (batch, labels);
            let (few, few_grads) = outcome(&model, &batch).expect("a loss");
            let network = model.network_mut().expect("the only holder");
            if network.attach("nothing", &nothing, 0).is_err() {
                continue;
            }
            let frozen = network.set_trainable("nothing", false);
            frozen.expect("is attached");
            assert!(!network.by_rows());
            let whole = outcome(&model, &batch);
            let network = model.network_mut().expect("the only holder");
            network.delete("nothing").expect("is attached");
            let Ok((all, all_grads)) = whole else {
                continue;
            };
            agree(&adapter.to_string(), (all, &all_grads), (few, &few_grads));
            same.push(entry.id);
        }
    }
    assert!(same.len() >= 16, "only {same:?}");
}

/// An encoder's last block ends for the rows alone that a label is read from, unless an adapter is at its end: one that
/// does nothing there shows what the whole block gives.
#[test]
fn an_encoder_gives_the_same_from_all_rows_of_its_last_block() {
    let classes = Task::SequenceClassification { num_labels: 3 };
    let nothing = json!({"peft_type": "LORA", "r": 1, "target_modules": ["layer.1.output.dense"]});
    let mut same = Vec::new();
    for (entry, mut adapter) in peft_tests::subject::configs() {
        adapter["task_type"] = json!("SEQ_CLS");
        let Some(mut model) = model(&bert(), classes, &adapter) else {
            continue;
        };
        for batch in &batches(classes) {
            let Ok((few, few_grads)) = outcome(&model, batch) else {
                continue;
            };
            let network = model.network_mut().expect("the only holder");
            if network.attach("nothing", &nothing, 0).is_err() {
                continue;
            }
            network
                .set_trainable("nothing", false)
                .expect("is attached");
            let whole = outcome(&model, batch);
            let network = model.network_mut().expect("the only holder");
            network.delete("nothing").expect("is attached");
            let Ok((all, all_grads)) = whole else {
                continue;
            };
            agree(&adapter.to_string(), (all, &all_grads), (few, &few_grads));
            same.push(entry.id);
        }
    }
    assert!(same.len() >= 20, "only {same:?}");
}
