//! Runs that must not go on.

use super::*;

fn refused(config: &TrainConfig, resume: bool) -> String {
    train(config, resume, &mut ()).unwrap_err().to_string()
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_rows_and_leaves_no_adapter() {
    let place = Place::new(5);
    let message = refused(
        &place.config(&[
            "train.learning_rate=1e38",
            "train.max_grad_norm=0",
            "train.schedule=constant",
            "train.batch_size=2",
            "data.shuffle=false",
        ]),
        false,
    );
    assert!(
        message.contains("step 2") && message.contains("line 3, 4"),
        "{message}"
    );
    assert!(!place.path("out/adapter_model.safetensors").exists());
    assert!(!place.path("out/adapter_config.json").exists());
}

#[test]
fn another_run_is_not_overwritten_unless_asked() {
    let place = Place::new(5);
    place.train(&["train.steps=1", "train.save_every=1"]);
    let before = place.adapter("out");
    let message = refused(&place.config(&["train.seed=9"]), false);
    assert!(
        message.contains("output.dir") && message.contains("overwrite"),
        "{message}"
    );
    assert_eq!(place.adapter("out"), before);
    place.train(&["train.seed=9", "train.steps=2", "output.overwrite=true"]);
    assert_ne!(place.adapter("out"), before);
    assert_eq!(place.metrics("out").len(), 2);
    assert_eq!(
        peft_io::list_states(&place.path("out/checkpoints")).unwrap(),
        Vec::<String>::new()
    );
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let place = Place::new(5);
    place.train(&["train.save_every=2"]);
    let message = refused(
        &place.config(&["train.learning_rate=0.5", "train.steps=7"]),
        true,
    );
    assert!(
        message.contains("train.learning_rate, train.steps")
            || message.contains("train.steps, train.learning_rate"),
        "{message}"
    );
    let text = std::fs::read_to_string(place.path("train.jsonl")).unwrap();
    place.write("train.jsonl", &text.replacen("-100", "1", 1));
    let message = refused(&place.config(&[]), true);
    assert!(message.contains("other rows"), "{message}");
    place.write("train.jsonl", &text);
    // A damaged state is named, and nothing else is touched.
    let adapter = place.adapter("out");
    let state = place.path("out/checkpoints/step-6/state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let message = refused(&place.config(&[]), true);
    assert!(message.contains("state.safetensors"), "{message}");
    assert_eq!(place.adapter("out"), adapter);
}

#[test]
fn mistakes_are_found_before_anything_is_written() {
    let place = Place::new(5);
    place.write(
        "bad.jsonl",
        "{\"input_ids\":[1,2]}\n{\"input_ids\":[1,\"x\"]}\n",
    );
    place.write("text.jsonl", "{\"text\":\"abc\"}\n");
    place.write("classes.jsonl", "{\"input_ids\":[1,2],\"label\":1}\n");
    for (sets, parts) in [
        (
            &["data.train=DIR/bad.jsonl"][..],
            &["bad.jsonl:2", "input_ids[1]"][..],
        ),
        (&["data.eval=DIR/bad.jsonl"], &["bad.jsonl:2"]),
        (&["data.train=DIR/none.jsonl"], &["none.jsonl"]),
        (&["data.train=DIR/text.jsonl"], &["tokenizer"]),
        (
            &["data.train=DIR/classes.jsonl", "model.task=causal_lm"],
            &["model.task", "label"],
        ),
        (
            &["model.task=sequence_classification"],
            &["model.task", "label"],
        ),
        (&["model.path=DIR/nowhere"], &["nowhere"]),
        (&["model.init=pretrained"], &["model"]),
        (&["adapter.peft_type=LARO"], &["peft_type", "LARO"]),
        (
            &["adapter.target_modules=[\"q_porj\"]"],
            &["q_porj", "q_proj"],
        ),
        (&["adapter.start=abc"], &["start"]),
        (
            &["train.lr_multipliers=[{\"pattern\":\"layers.7\",\"multiplier\":2}]"],
            &["layers.7"],
        ),
        (&["data.eval_split=5"], &["data.eval_split"]),
        (
            &["output.dir=DIR/model/config.json"],
            &["output.dir", "is a file"],
        ),
    ] {
        let message = refused(&place.config(sets), false);
        for part in parts {
            assert!(message.contains(part), "{sets:?}: {message}");
        }
        assert!(!place.path("out").exists(), "{sets:?}");
    }
}

#[test]
fn packing_is_for_language_models() {
    let place = Place::new(4);
    place.write(
        "train.jsonl",
        "{\"input_ids\":[1,2],\"label\":0}\n{\"input_ids\":[3],\"label\":1}\n",
    );
    let message = refused(&place.config(&["data.packing=true"]), false);
    assert!(
        message.contains("data.packing") && message.contains("classifier"),
        "{message}"
    );
    assert!(!place.path("out").exists());
}
