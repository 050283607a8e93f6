//! Exit codes and what is said about a wrong command line.

use std::io::Read;
use std::process::{Command, Stdio};

use crate::common::{model, peft, write};

#[test]
fn wrong_arguments_exit_with_2() {
    peft(["merge", "--model", "x", "--output", "y"]).fails(2, &["--adapter"]);
    peft(["frobnicate"]).fails(2, &["frobnicate"]);
    peft(["logits", "--modle", "x"]).fails(2, &["--modle", "--model"]);
    peft([
        "merge",
        "--model",
        "m",
        "--adapter",
        "a",
        "--output",
        "o",
        "--dtype",
        "q4",
    ])
    .fails(2, &["keep, f32, bf16, f16"]);
    peft([
        "merge",
        "--model",
        "m",
        "--adapter",
        "a",
        "--output",
        "o",
        "--max-shard-size",
        "5XB",
    ])
    .fails(2, &["5XB", "MiB"]);
    peft(["eval", "--model", "m", "--data", "d", "--batch-size", "0"]).fails(2, &["from 1"]);
    peft(["eval", "--model", "m", "--data", "d", "--vote"]).fails(2, &["--adapter"]);
    for (option, value) in [
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--repetition-penalty", "nan"),
    ] {
        peft(["generate", "--model", "m", "--prompt", "p", option, value])
            .fails(2, &[option, value, "has to be a number"]);
    }
    peft(["devices", "--bench", "abacus"]).fails(2, &["--bench abacus", "cpu"]);
    assert_eq!(peft::<&str>([]).code, 2);
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [vec!["--help"], vec!["merge", "--help"], vec!["--version"]] {
        let run = peft(args).ok();
        assert!(run.stdout.contains("peft"));
    }
    let help = peft(["--help"]).ok().stdout;
    for verb in [
        "train", "eval", "generate", "logits", "merge", "inspect", "methods", "init",
    ] {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb}");
    }
}

#[test]
fn what_is_not_there_is_named_with_what_was_tried() {
    peft(["inspect", "--model", "no/such-model"])
        .fails(1, &["no/such-model", "tried", "config.json"]);
    peft([
        "inspect",
        "--model",
        &model("llama"),
        "--adapter",
        "/no/adapter",
    ])
    .fails(1, &["/no/adapter"]);
    peft(["train", "/no/such.toml"]).fails(1, &["/no/such.toml"]);
}

#[test]
fn configurations_that_do_not_parse_are_bad_usage() {
    let temp = tempfile::tempdir().unwrap();
    for (name, content, words) in [
        ("a.toml", "[train\n", ["a.toml", "line 1"]),
        ("a.yaml", "train: [1\n", ["a.yaml", "line"]),
        ("a.json", "{\"train\": }", ["a.json", "line 1"]),
        ("a.txt", "", ["a.txt", ".toml"]),
        (
            "b.toml",
            "[train]\nlerning_rate = 1\n",
            ["train.lerning_rate", "learning_rate"],
        ),
        (
            "c.yaml",
            "train:\n  epochs: many\n",
            ["train.epochs", "many"],
        ),
        (
            "d.json",
            "{\"device\": \"wgpu\", \"model\": {\"path\": \"m\"}}",
            ["device", "not in this build"],
        ),
    ] {
        let path = temp.path().join(name);
        write(&path, content);
        peft(["train", path.to_str().unwrap()]).fails(2, &words);
    }
    let path = temp.path().join("b.toml");
    peft(["train", path.to_str().unwrap(), "--set", "nonsense"])
        .fails(2, &["nonsense", "key=value"]);
}

#[test]
fn a_closed_stdout_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(["inspect", "--model", &model("llama")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert!(!said.contains("error"), "{said}");
}
