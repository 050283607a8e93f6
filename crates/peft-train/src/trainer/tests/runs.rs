//! Runs that go well.

use peft_core::{Grads, Pass};

use super::*;
use crate::data::{Dataset, EncodeOptions, RawData, collate};
use crate::trainer::Trainer;

/// Every step of an uninterrupted run is also what a run gives that stopped after any checkpoint and was resumed.
#[test]
fn a_resumed_run_ends_in_the_same_bytes() {
    let place = Place::new(11);
    let sets = [
        "train.steps=9",
        "train.gradient_accumulation=2",
        "train.save_every=2",
        "train.keep_checkpoints=9",
        "train.eval_every=3",
        "train.eval_before=true",
        "train.schedule=cosine",
        "data.eval=DIR/eval.jsonl",
    ];
    place.train(&[&sets[..], &["output.dir=DIR/whole"]].concat());
    let (adapter, metrics) = (place.adapter("whole"), place.metrics("whole"));
    let bytes =
        |out: &str| std::fs::read(place.path(out).join("adapter_model.safetensors")).unwrap();
    // 9 steps; evaluations before, at 3, 6 and 9.
    assert_eq!(metrics.len(), 13);
    for kept in ["step-2", "step-4", "step-8"] {
        // What a kill leaves: later lines of the log, one of them cut off, and a checkpoint that is not complete.
        let out = format!("from-{kept}");
        let target = place.path(&out).join("checkpoints");
        std::fs::create_dir_all(target.join(".partial-step-9")).unwrap();
        copy_folder(
            &place.path("whole/checkpoints").join(kept),
            &target.join(kept),
        );
        let log = std::fs::read_to_string(place.path("whole/metrics.jsonl")).unwrap();
        std::fs::write(
            place.path(&out).join("metrics.jsonl"),
            format!("{log}{{\"step\":10,\"lo"),
        )
        .unwrap();

        let config = place.config(&[&sets[..], &[&format!("output.dir=DIR/{out}")]].concat());
        let mut watcher = Watcher::default();
        let summary = train(&config, true, &mut watcher).unwrap();
        let done: u64 = kept[5..].parse().unwrap();
        assert_eq!(watcher.started.unwrap().0, done);
        assert_eq!(watcher.steps.len() as u64, 9 - done);
        assert_eq!(place.adapter(&out), adapter);
        assert_eq!(bytes(&out), bytes("whole"));
        assert_eq!(place.metrics(&out), metrics);
        assert!(summary.eval_before.is_some() && summary.eval_after.is_some());
        assert_eq!(summary.first_loss, metrics[1]["loss"].as_f64());
    }
    // Resuming where there is nothing to resume is a run from the start.
    let config = place.config(&[&sets[..], &["output.dir=DIR/none"]].concat());
    train(&config, true, &mut ()).unwrap();
    assert_eq!(place.adapter("none"), adapter);
    // A run that is not resumed from the hook's state, the moments or the step's number would end elsewhere.
    let other = place.config(&[&sets[..], &["output.dir=DIR/other", "train.seed=6"]].concat());
    train(&other, false, &mut ()).unwrap();
    assert_ne!(place.adapter("other"), adapter);
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn full_training_resumes_in_the_same_bytes_and_leaves_a_model() {
    let place = Place::new(7);
    let sets = [
        "adapter=null",
        "train.steps=5",
        "train.save_every=3",
        "train.gradient_checkpointing=true",
    ];
    let summary = place.train(&[&sets[..], &["output.dir=DIR/whole"]].concat());
    assert!(summary.trainable > 2 * 31 * 16);
    copy_folder(
        &place.path("whole/checkpoints/step-3"),
        &place.path("cut/checkpoints/step-3"),
    );
    train(
        &place.config(&[&sets[..], &["output.dir=DIR/cut"]].concat()),
        true,
        &mut (),
    )
    .unwrap();
    let bytes = |out: &str| std::fs::read(place.path(out).join("model.safetensors")).unwrap();
    assert_eq!(bytes("whole"), bytes("cut"));
    // What was written is a model: it loads, and differs from the one it started as.
    let trained = Model::load(&place.path("whole"), &LoadOptions::default()).unwrap();
    let start = fresh_model(5);
    let weight = |m: &Model| {
        m.network()
            .param("model.layers.0.self_attn.q_proj.weight")
            .unwrap()
            .to_vec()
            .unwrap()
    };
    assert_ne!(weight(&trained), weight(&start));
    assert_eq!(
        trained.config().json()["architectures"],
        json!(["LlamaForCausalLM"])
    );
}

#[test]
fn checkpointed_layers_change_nothing() {
    let place = Place::new(8);
    place.train(&["output.dir=DIR/plain"]);
    place.train(&["output.dir=DIR/again", "train.gradient_checkpointing=true"]);
    assert_eq!(place.adapter("plain"), place.adapter("again"));
}

#[test]
fn two_batches_of_four_are_one_of_eight() {
    let place = Place::new(16);
    let sets = [
        "adapter.dropout=0",
        "train.steps=4",
        "data.shuffle=false",
        "train.max_grad_norm=0.5",
    ];
    let run = |out: &str, more: &[&str]| {
        let mut watcher = Watcher::default();
        let dir = format!("output.dir=DIR/{out}");
        train(
            &place.config(&[&sets[..], more, &[&dir]].concat()),
            false,
            &mut watcher,
        )
        .unwrap();
        watcher.steps
    };
    let whole = run("whole", &["train.batch_size=8"]);
    let parts = run(
        "parts",
        &["train.batch_size=4", "train.gradient_accumulation=2"],
    );
    let uneven = run(
        "uneven",
        &[
            "train.batch_size=3",
            "train.gradient_accumulation=3",
            "train.steps=1",
        ],
    );
    assert_eq!(whole.len(), parts.len());
    for (a, b) in whole.iter().zip(&parts) {
        // Rows have 2 to 8 labels: a mean of means would be off in the second digit. Sums in another order are not.
        assert!(
            (a.loss - b.loss).abs() < 1e-5 * a.loss,
            "{} {}",
            a.loss,
            b.loss
        );
        assert!(
            (a.grad_norm - b.grad_norm).abs() < 1e-4 * a.grad_norm,
            "{} {}",
            a.grad_norm,
            b.grad_norm
        );
        assert_eq!(a.tokens, b.tokens);
    }
    assert!(
        (whole[0].loss - uneven[0].loss).abs() > 1e-3,
        "nine rows are not eight"
    );
    for (key, (_, values)) in place.adapter("whole") {
        let other = &place.adapter("parts")[&key].1;
        let far = values
            .iter()
            .zip(other)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // Four steps of 0.02 and 0.06; AdamW divides by the gradient's size, which makes small differences of small
        // gradients large.
        assert!(far < 2e-3, "{key}: {far}");
    }
}

/// The step's loss and gradient norm against a plain loop over rows, one at a time.
#[test]
fn the_loss_is_the_mean_over_all_labels() {
    let place = Place::new(8);
    let config = place.config(&[
        "adapter=null",
        "train.steps=1",
        "train.batch_size=4",
        "train.gradient_accumulation=2",
        "data.shuffle=false",
    ]);
    let mut watcher = Watcher::default();
    train(&config, false, &mut watcher).unwrap();
    let mut model = fresh_model(5);
    model.network_mut().unwrap().train_base().unwrap();
    let data = dataset(&place, "train.jsonl");
    let (mut sum, mut count, mut grads) = (0.0, 0, Grads::default());
    for example in &data.examples {
        let one = collate(&[example], 0);
        let out = model.loss(&one.batch, &one.labels, &Pass::eval()).unwrap();
        sum += out.sum().unwrap();
        count += out.count;
        grads
            .merge(
                out.loss
                    .scale(out.count as f32)
                    .unwrap()
                    .backward()
                    .unwrap(),
            )
            .unwrap();
    }
    let report = &watcher.steps[0];
    assert!(
        (report.loss - sum / count as f64).abs() < 1e-5,
        "{} {}",
        report.loss,
        sum / count as f64
    );
    let square = |g: &[f32]| g.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
    let params = model.network().parameters();
    let total: f64 = params
        .iter()
        .map(|p| square(&grads.get(&p.tensor()).unwrap().to_vec().unwrap()))
        .sum();
    let norm = total.sqrt() / count as f64;
    assert!(
        (report.grad_norm - norm).abs() < 1e-4 * norm,
        "{} {norm}",
        report.grad_norm
    );
}

fn dataset(place: &Place, name: &str) -> Dataset {
    let raw = RawData::read(&place.path(name), Default::default()).unwrap();
    let options = EncodeOptions {
        max_length: 64,
        add_eos: true,
        task: crate::config::TaskKind::CausalLm,
        vocab_size: 31,
    };
    Dataset::encode(&raw, None, None, &options).unwrap()
}

#[test]
fn hooks_are_called_in_their_order() {
    let place = Place::new(8);
    place.train(&[
        "adapter.diary=order",
        "train.steps=2",
        "train.gradient_accumulation=2",
        "train.learning_rate=0.05",
        "train.schedule=linear",
        "train.warmup_steps=0",
    ]);
    // The rate falls; after a step it is still the one the step was taken with.
    let mut want = vec!["prepare 0 true true 0.05".to_owned()];
    for (step, rate) in [(0, 0.05), (1, 0.025)] {
        want.push(format!("before_forward {step} true true {rate}"));
        want.push(format!("penalty {step} false true {rate}"));
        want.push(format!("after_backward {step} false true {rate}"));
        // Gradients were taken by the optimiser, whose step this is after.
        want.push(format!("after_step {} true true {rate}", step + 1));
    }
    assert_eq!(super::probe::diary("order"), want);
    // They are copied for who reads them.
    place.train(&["adapter.diary=used", "train.steps=1", "output.dir=DIR/used"]);
    let last = super::probe::diary("used").pop();
    assert!(last.is_some_and(|note| note.starts_with("after_step 1 true false ")));
}

#[test]
fn rules_of_method_and_user_set_rates_apart() {
    let place = Place::new(8);
    let moved = |out: &str, more: &[&str]| {
        let dir = format!("output.dir=DIR/{out}");
        place.train(
            &[
                &[
                    "train.steps=1",
                    "train.schedule=constant",
                    "train.weight_decay=0",
                    "adapter.penalty=0",
                    &dir,
                ],
                more,
            ]
            .concat(),
        );
        let largest = |part: &str| {
            let all = place.adapter(out);
            all.iter()
                .filter(|(k, _)| k.contains(part))
                .flat_map(|(_, (_, v))| v.clone())
                .map(f32::abs)
                .fold(0.0, f32::max)
        };
        (largest("layers.0."), largest("layers.1."))
    };
    // AdamW's first step is the learning rate itself.
    let near = |got: f32, want: f32| assert!((got - want).abs() < 1e-3 * want, "{got} {want}");
    let (low, high) = moved("method", &[]);
    near(low, 0.02);
    near(high, 0.06);
    let rules = r#"train.lr_multipliers=[{"pattern":"layers.0","multiplier":0.5},{"pattern":"layers.1","learning_rate":0.001}]"#;
    let (low, high) = moved("user", &[rules]);
    near(low, 0.01);
    near(high, 0.001);
}

#[test]
fn the_log_has_what_is_promised_and_old_checkpoints_go() {
    let place = Place::new(9);
    let sets = [
        "train.steps=5",
        "train.save_every=1",
        "train.warmup_ratio=0.3",
        "train.eval_every=2",
        "data.eval=DIR/eval.jsonl",
    ];
    let mut watcher = Watcher::default();
    let summary = train(&place.config(&sets), false, &mut watcher).unwrap();
    let text = std::fs::read_to_string(place.path("out/metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    for field in [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "elapsed_s",
    ] {
        assert!(first[field].is_number(), "{field}: {first}");
    }
    let rates: Vec<f64> = watcher
        .steps
        .iter()
        .map(|s| s.learning_rate / 0.02)
        .collect();
    // Warm-up of ceil(0.3 * 5) = 2 steps, then down to 0 over three.
    for (got, want) in rates.iter().zip([0.0, 0.5, 1.0, 2.0 / 3.0, 1.0 / 3.0]) {
        assert!((got - want).abs() < 1e-12, "{rates:?}");
    }
    // Three batches an epoch.
    assert!((watcher.steps[3].epoch - 4.0 / 3.0).abs() < 1e-12);
    // What steps take is told without what happens between them.
    let each = |s: &StepReport| (s.tokens as f64 / s.tokens_per_second - s.seconds).abs();
    assert!(watcher.steps.iter().all(|s| each(s) < 1e-9 * s.seconds));
    let taken: f64 = watcher.steps.iter().map(|s| s.seconds).sum();
    let beside: f64 = watcher.evals.iter().map(|(_, report)| report.seconds).sum();
    assert!(taken > 0.0 && taken + beside <= summary.elapsed_s);
    let evals: Vec<u64> = watcher.evals.iter().map(|(step, _)| *step).collect();
    assert_eq!(evals, [2, 4, 5]);
    let lines: Vec<Value> = place
        .metrics("out")
        .into_iter()
        .filter(|l| l.get("eval_loss").is_some())
        .collect();
    assert_eq!(lines.len(), 3);
    let last = summary.eval_after.unwrap();
    assert_eq!(lines[2], last.to_json(5));
    assert!((last.perplexity.unwrap() - last.loss.exp()).abs() < 1e-9);
    let states = peft_io::list_states(&place.path("out/checkpoints")).unwrap();
    assert_eq!(states, ["step-4", "step-5"]);
    assert_eq!(watcher.saved.last().unwrap(), &place.path("out"));
}

#[test]
fn training_goes_on_from_an_adapter_on_disk() {
    let place = Place::new(8);
    place.train(&["output.dir=DIR/first", "adapter.start=0.01"]);
    let learned = place.adapter("first");
    place.train(&[
        "adapter={\"init_from\":\"DIR/first\"}",
        "output.dir=DIR/same",
        "train.learning_rate=0",
        "train.weight_decay=0",
    ]);
    assert_eq!(place.adapter("same"), learned);
    let saved = peft_io::read_adapter(&place.path("same")).unwrap().config;
    assert_eq!(saved["peft_type"], "TRAIN_PROBE");
    assert_eq!(saved["task_type"], "CAUSAL_LM");
    assert!(saved.get("init_from").is_none());
    place.train(&[
        "adapter={\"init_from\":\"DIR/first\"}",
        "output.dir=DIR/more",
    ]);
    assert_ne!(place.adapter("more"), learned);
}

#[test]
fn a_loss_falls() {
    let place = Place::new(4);
    let mut watcher = Watcher::default();
    let sets = [
        "train.steps=40",
        "adapter.penalty=0",
        "adapter.dropout=0",
        "train.learning_rate=0.005",
    ];
    train(&place.config(&sets), false, &mut watcher).unwrap();
    let (first, last) = (watcher.steps[0].loss, watcher.steps[39].loss);
    assert!(last < 0.7 * first, "{first} -> {last}");
}

#[test]
fn a_runs_object_reports_its_steps() {
    let place = Place::new(11);
    let config = place.config(&[
        "adapter=null",
        "train.steps=null",
        "train.epochs=1.5",
        "train.gradient_accumulation=2",
    ]);
    let mut model = fresh_model(1);
    model.network_mut().unwrap().train_base().unwrap();
    let trainer = Trainer::new(&config, model, dataset(&place, "train.jsonl"), None, None);
    // 11 rows in batches of 4 are 3, in pairs 2 steps; one and a half epochs are 3.
    assert_eq!(trainer.steps(), (2, 3));
}

/// With checkpointing, a step runs every layer forward twice and no more.
#[test]
fn checkpointing_costs_one_forward() {
    let place = Place::new(4);
    let calls = |name: &str, more: &str| {
        let (diary, out) = (
            format!("adapter.diary={name}"),
            format!("output.dir=DIR/{name}"),
        );
        // A run that joins rows asks the model once whether it can.
        let padded = "data.padding_free=false";
        place.train(&["train.steps=3", &diary, &out, padded, more]);
        super::probe::diary(&format!("{name}: calls")).len()
    };
    // Two modules in each of two layers, three steps of one batch.
    assert_eq!(
        calls("plainly", "train.gradient_checkpointing=false"),
        2 * 2 * 3
    );
    assert_eq!(
        calls("twice", "train.gradient_checkpointing=true"),
        2 * 2 * 2 * 3
    );
    // One of the two layers.
    assert_eq!(
        calls("once more", "train.gradient_checkpointing=1"),
        2 * 3 * 3
    );
}

/// Which blocks are computed again is no part of the result; where the first trained layer is above, they count from it.
#[test]
fn some_checkpointed_blocks_change_nothing() {
    let place = Place::new(8);
    let upper = r#"adapter.target_modules=["layers.1.self_attn.q_proj"]"#;
    for (name, more) in [("all", ""), ("upper", upper)] {
        let train = |out: &str, setting: &str| {
            let out = format!("{name}-{out}");
            let dir = format!("output.dir=DIR/{out}");
            let sets = [dir.as_str(), setting, more];
            place.train(&sets[..2 + usize::from(!more.is_empty())]);
            place.adapter(&out)
        };
        let plain = train("plain", "train.gradient_checkpointing=false");
        assert!(!plain.is_empty());
        assert_eq!(train("one", "train.gradient_checkpointing=1"), plain);
        assert_eq!(train("many", "train.gradient_checkpointing=99"), plain);
    }
}

#[test]
fn bfloat16_follows_single_precision() {
    let place = Place::new(11);
    let losses = |name: &str, setting: &str| -> Vec<f64> {
        let out = format!("output.dir=DIR/{name}");
        place.train(&[setting, &out, "train.steps=8"]);
        let logged = place.metrics(name);
        logged.iter().filter_map(|m| m["loss"].as_f64()).collect()
    };
    let (single, half) = (
        losses("f32", "precision=f32"),
        losses("bf16", "precision=bf16"),
    );
    assert_eq!((single.len(), half.len()), (8, 8));
    // Activations in 8 bits are seen by gradients only: not in the first loss, and little in those that follow.
    let codes = losses("int8", "train.activations=int8");
    assert_eq!(single[0], codes[0]);
    assert_ne!(single, codes);
    for (single, codes) in single.iter().zip(&codes) {
        assert!((single - codes).abs() < 5e-3 * single, "{single} {codes}");
    }
    // Two per cent is what HF PEFT's own bf16 differs by; equal curves would mean that nothing was rounded.
    for (single, half) in single.iter().zip(&half) {
        assert!((single - half).abs() < 2e-2 * single, "{single} {half}");
    }
    assert_ne!(single, half);
}
