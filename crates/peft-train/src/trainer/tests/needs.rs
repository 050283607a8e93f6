//! What a run needs, and what it does when it may not have it.

use super::*;

/// A model large enough for its moments to stand out.
fn wide(place: &Place) {
    let mut config = llama();
    config["vocab_size"] = json!(32_000);
    config["hidden_size"] = json!(128);
    place.write("model/config.json", &config.to_string());
}

#[test]
fn moments_go_to_disk_where_the_limit_is_low() {
    let place = Place::new(4);
    wide(&place);
    let sets = ["adapter=null", "train.steps=3", "train.save_every=2"];
    let forecast = |sets: &[&str]| crate::predict(&place.config(sets)).unwrap();
    let memory = forecast(&sets).memory;
    // Two untied tables of 32,000 x 128, and little besides.
    assert!(
        (2 * 32_000 * 128 * 8..70_000_000).contains(&memory.optimizer),
        "{memory:?}"
    );
    let memory = forecast(&[&sets[..], &["train.optimizer=adamw_8bit"]].concat()).memory;
    assert!(
        (2 * 32_000 * 128 * 2..18_000_000).contains(&memory.optimizer),
        "{memory:?}"
    );
    let parts: u64 = memory.parts().iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(parts, memory.total());

    let whole = [&sets[..], &["output.dir=DIR/whole"]].concat();
    place.train(&whole);
    let low = forecast(&sets).memory;
    let limit = format!("train.memory_limit={}B", low.total() - low.optimizer / 2);
    let paged = [&sets[..], &["output.dir=DIR/paged", &limit]].concat();
    assert!(forecast(&paged).paged);
    let mut watcher = Watcher::default();
    train(&place.config(&paged), false, &mut watcher).unwrap();
    assert!(
        watcher.messages[0].contains("on disk"),
        "{:?}",
        watcher.messages
    );
    let bytes = |out: &str, file: &str| std::fs::read(place.path(out).join(file)).unwrap();
    assert_eq!(
        bytes("whole", "model.safetensors"),
        bytes("paged", "model.safetensors")
    );
    let state = "checkpoints/step-2/state.safetensors";
    assert_eq!(bytes("whole", state), bytes("paged", state));
    // Resumed without the limit, from where the other was saved.
    let resumed = [&sets[..], &["output.dir=DIR/paged"]].concat();
    train(&place.config(&resumed), true, &mut ()).unwrap();
    assert_eq!(
        bytes("whole", "model.safetensors"),
        bytes("paged", "model.safetensors")
    );

    let none = [
        &sets[..],
        &["output.dir=DIR/none", "train.memory_limit=1MB"],
    ]
    .concat();
    let message = train(&place.config(&none), false, &mut ())
        .unwrap_err()
        .to_string();
    for part in [
        "train.memory_limit",
        "predicted",
        "gradients",
        "limit is 1 MB",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!place.path("none").exists());
}

#[test]
fn a_forecast_says_what_there_will_be() {
    let place = Place::new(10);
    let forecast = |sets: &[&str]| crate::predict(&place.config(sets)).unwrap();
    let plain = forecast(&["train.batch_size=5", "data.shuffle=false"]);
    // Rows of 3 to 9 tokens, 6 in the mean, are joined; both batches are in both epochs' six steps.
    assert_eq!((plain.largest, plain.steps), ((5, 6), 6));
    let padded = forecast(&[
        "train.batch_size=5",
        "data.shuffle=false",
        "data.padding_free=false",
    ]);
    assert_eq!(padded.largest, (5, 9));
    assert!(
        plain.step_seconds > 0.0 && plain.step_seconds < 5.0,
        "{}",
        plain.step_seconds
    );
    let again = forecast(&[
        "train.batch_size=5",
        "data.shuffle=false",
        "train.gradient_checkpointing=true",
    ]);
    assert!(again.memory.activations < plain.memory.activations);
    // Two layers keep their inputs and what attention made, with two sums, and the last norm its input: 30 tokens of 5 x 16
    // and 2 x 2 values.
    assert_eq!(again.memory.activations, 4 * 30 * (5 * 16 + 2 * 2));
    assert_eq!((plain.again, again.again), (0, 2));
    let codes = forecast(&[
        "train.batch_size=5",
        "data.shuffle=false",
        "train.gradient_checkpointing=true",
        "train.activations=int8",
    ]);
    // In blocks of 64, each with a scale: 8 for 480 values. The sums are not packed.
    assert_eq!(codes.memory.activations, 5 * 8 * 68 + 4 * 30 * 2 * 2);
    // Two square matrices q_proj 16 x 16 and two down_proj 16 x 20, in f32.
    let values = 2 * (16 * 16 + 16 * 20);
    assert_eq!(plain.memory.adapter, 4 * values);
    // Gradients come as activations go, which are more here.
    assert_eq!(
        (plain.memory.gradients, plain.memory.optimizer),
        (0, 8 * values)
    );
    assert_eq!(
        plain.memory.base,
        4 * (2 * 31 * 16 + 2 * (2 * 256 + 2 * 128 + 3 * 320 + 2 * 16) + 16)
    );
    let json = plain.to_json();
    assert_eq!(json["peak_bytes"], json!(plain.memory.total()));
}

/// With `auto`, as many blocks are computed again as the limit makes necessary and no more; the result is the same.
#[test]
fn blocks_are_computed_again_where_the_limit_is_low() {
    let place = Place::new(6);
    let mut config = llama();
    config["num_hidden_layers"] = json!(5);
    place.write("model/config.json", &config.to_string());
    let forecast = |sets: &[&str]| crate::predict(&place.config(sets)).unwrap();
    // The last of five saves nothing: each is there whole while it is run backward.
    let totals: Vec<u64> = (0..5)
        .map(|blocks| {
            let setting = format!("train.gradient_checkpointing={blocks}");
            forecast(&[&setting]).memory.total()
        })
        .collect();
    assert!(totals.is_sorted_by(|a, b| a > b), "{totals:?}");
    let auto = |limit: u64| {
        let limit = format!("train.memory_limit={limit}B");
        forecast(&["train.gradient_checkpointing=auto", &limit])
    };
    for (blocks, total) in totals.iter().enumerate() {
        let found = auto(*total);
        assert_eq!((found.again, found.paged), (blocks, false));
    }
    assert_eq!(auto(totals[1] - 1).again, 2);
    // Below that only the moments are left.
    let paged = auto(totals[4] - 1);
    assert!(paged.paged && paged.memory.total() < totals[4]);

    place.train(&["output.dir=DIR/plain"]);
    let limit = format!("train.memory_limit={}B", totals[2]);
    place.train(&[
        "output.dir=DIR/auto",
        "train.gradient_checkpointing=auto",
        &limit,
    ]);
    assert_eq!(place.adapter("plain"), place.adapter("auto"));

    let mut open = place.config(&[]);
    open.train.gradient_checkpointing = crate::Checkpointing::Auto;
    let text = open.check().unwrap_err().to_string();
    assert!(text.contains("train.memory_limit"), "{text}");
}
