//! A full disk, and being told to end: nothing half-written stays.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{adapter, listing, model, peft, read_json, talking_model, text, write};

/// Runs `peft` where no file may grow beyond so many blocks of 512 bytes.
fn limited(blocks: u32, args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new("sh")
        .arg("-c")
        .arg(format!("ulimit -f {blocks}; exec \"$0\" \"$@\""))
        .arg(env!("CARGO_BIN_EXE_peft"))
        .args(args)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), said)
}

/// Every name under a folder.
fn tree(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for name in listing(folder) {
        let below = folder.join(&name);
        all.extend(tree(&below).into_iter().map(|n| format!("{name}/{n}")));
        all.push(name);
    }
    all
}

#[test]
fn a_file_that_may_not_grow_is_an_error_that_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let llama = model("llama");
    let out = text(temp.path().join("made/out"));
    let config = format!("{}/adapter_config.json", adapter("llama-qv"));
    let input = temp.path().join("i.json");
    write(&input, r#"{"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}"#);
    let input = text(&input);
    let before = tree(temp.path());
    let qv = adapter("llama-qv");
    for args in [
        &[
            "merge",
            "--model",
            &llama,
            "--adapter",
            &qv,
            "--output",
            &out,
        ][..],
        &["quantize", &llama, "--out", &out],
        &[
            "init", "--model", &llama, "--config", &config, "--set", "r=64", "--output", &out,
        ],
        &[
            "logits",
            "--model",
            &llama,
            "--input",
            &input,
            "--output",
            &format!("{out}/l.safetensors"),
        ],
    ] {
        let (code, said) = limited(2, args);
        assert_eq!(code, Some(1), "{args:?}: {said}");
        assert!(said.contains("too large") && said.contains(&out), "{said}");
        assert_eq!(tree(temp.path()), before, "{args:?}");
    }
}

#[test]
fn a_run_that_is_interrupted_can_go_on() {
    let temp = tempfile::tempdir().unwrap();
    let folder = talking_model("llama", &temp.path().join("model"));
    let row = |i: usize| {
        format!(
            "{}\n",
            json!({"prompt": format!("w{} ", 3 + i % 9), "completion": "w40"})
        )
    };
    let data = temp.path().join("train.jsonl");
    write(&data, &(0..32).map(row).collect::<String>());
    let out = temp.path().join("out");
    let config = json!({
        "model": {"path": folder},
        "adapter": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]},
        "data": {"train": text(&data)},
        "train": {"steps": 1_000_000, "batch_size": 4, "save_every": 1, "schedule": "constant"},
        "output": {"dir": text(&out)},
    });
    let file = temp.path().join("t.json");
    write(&file, &config.to_string());
    // Whoever runs the tests in the background of a script has Ctrl-C ignored for all of them, and the command keeps to that.
    let first = if is_ignored(2) { "TERM" } else { "INT" };
    for signal in [first, "TERM"] {
        let mut run = Command::new(env!("CARGO_BIN_EXE_peft"))
            .args(["train", "--resume", &text(&file)])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let first = newest(&out);
        let begun = Instant::now();
        while newest(&out) < first + 3 && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Most of its time goes into checkpoints.
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -{signal} {}", run.id())])
            .status();
        assert!(sent.unwrap().success());
        let ended = run.wait().unwrap();
        let number = if signal == "INT" { 2 } else { 15 };
        assert_eq!(ended.signal(), Some(number), "{ended:?}");
        let left: Vec<String> = tree(&out)
            .into_iter()
            .filter(|n| n.ends_with(".tmp"))
            .collect();
        assert_eq!(left, [""; 0]);
    }
    let done = newest(&out);
    assert!(done >= 6, "{done}");
    let steps = format!("train.steps={}", done + 2);
    // A longer or shorter run is another one, so the rest is told from the checkpoint.
    peft(["train", "--resume", &text(&file), "--set", &steps]).fails(1, &["train.steps"]);
    let last = out.join(format!("checkpoints/step-{done}"));
    assert!(listing(&last).len() >= 2, "{:?}", listing(&last));
    assert!(read_json(last.join("state.json")).is_object());
}

/// Whether this process, and so what it starts, ignores a signal; where that cannot be seen, it does not.
fn is_ignored(signal: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
    mask.is_some_and(|m| m >> (signal - 1) & 1 == 1)
}

/// The step of the newest checkpoint.
fn newest(out: &Path) -> u64 {
    let steps = listing(out.join("checkpoints")).into_iter();
    steps
        .filter_map(|name| name.strip_prefix("step-")?.parse().ok())
        .max()
        .unwrap_or(0)
}
