//! Texts that share rows.

use super::*;

/// Run once for all, what the texts of a batch begin with changes neither losses nor steps; nothing is run once where the
/// adapter drops some of it.
#[test]
fn shared_prompts_change_no_loss() {
    let place = Place::new(1);
    let row = |i: usize| {
        let ids: Vec<usize> = [5, 9, 2, 7]
            .into_iter()
            .chain((0..3 + i % 4).map(|j| (i * i + 3 * j + 1) % 31))
            .collect();
        let labels = ids.iter().enumerate();
        let labels: Vec<i64> = labels
            .map(|(j, &id)| if j < 5 { -100 } else { id as i64 })
            .collect();
        serde_json::json!({"input_ids": ids, "labels": labels}).to_string() + "\n"
    };
    place.write("train.jsonl", &(0..12).map(row).collect::<String>());
    let sets = ["adapter.start=0.03", "train.steps=3"];
    let run = |out: &str, more: &[&str]| {
        let dir = format!("output.dir=DIR/{out}");
        let all = [&sets[..], more, &[dir.as_str()]].concat();
        let config = place.config(&all);
        let trainer = crate::trainer::prepare(&config).unwrap();
        let rows: Vec<_> = trainer.examples().iter().collect();
        let shared = trainer.shared(&rows);
        let mut watcher = Watcher::default();
        train(&config, false, &mut watcher).unwrap();
        let losses = watcher.steps.iter().map(|s| (s.loss, s.grad_norm));
        (shared, losses.collect::<Vec<_>>())
    };
    let (none, apart) = run("apart", &["adapter.dropout=0", "data.shared_prompts=false"]);
    let (four, once) = run("once", &["adapter.dropout=0"]);
    assert_eq!((none, four), (0, 4));
    // Sums over other blocks of keys, three steps long.
    for (a, b) in apart.iter().zip(&once) {
        let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * b.abs();
        assert!(near(a.0, b.0) && near(a.1, b.1), "{apart:?} {once:?}");
    }
    assert_eq!(run("dropped", &["adapter.dropout=0.1"]).0, 0);
}

/// Packed into common rows, the same texts have the same loss, gradient and step.
#[test]
fn packing_changes_no_loss() {
    let place = Place::new(12);
    let sets = [
        "adapter.dropout=0",
        "adapter.start=0.03",
        "train.steps=1",
        "train.batch_size=12",
        "data.shuffle=false",
        "data.max_length=24",
    ];
    let mut steps = Vec::new();
    for (out, more) in [
        ("plain", vec!["data.padding_free=false"]),
        ("joined", vec![]),
        ("packed", vec!["data.packing=true"]),
        (
            "again",
            vec!["data.packing=true", "train.gradient_checkpointing=true"],
        ),
    ] {
        let dir = format!("output.dir=DIR/{out}");
        let all = [&sets[..], &more[..], &[dir.as_str()]].concat();
        let mut watcher = Watcher::default();
        train(&place.config(&all), false, &mut watcher).unwrap();
        if out == "packed" {
            // Rows of 3 to 9 tokens, 72 in all; the best fit is not the best there is.
            assert!(
                watcher.messages[0].contains("12 texts are packed into 4 rows"),
                "{:?}",
                watcher.messages
            );
        }
        steps.push(watcher.steps.remove(0));
    }
    for (step, out) in steps[1..].iter().zip(["joined", "packed", "again"]) {
        let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * b.abs();
        assert!(
            near(step.loss, steps[0].loss),
            "{} {}",
            step.loss,
            steps[0].loss
        );
        assert!(
            near(step.grad_norm, steps[0].grad_norm),
            "{} {}",
            step.grad_norm,
            steps[0].grad_norm
        );
        assert_eq!(step.tokens, steps[0].tokens);
        for (key, (_, plain)) in place.adapter("plain") {
            let packed = &place.adapter(out)[&key].1;
            // The first step of AdamW is the rate times the gradient's sign, wherever that is not about 0.
            let off = plain
                .iter()
                .zip(packed)
                .filter(|(a, b)| (*a - *b).abs() > 1e-4)
                .count();
            assert!(off * 100 <= plain.len(), "{key}: {off} of {}", plain.len());
        }
    }
}
