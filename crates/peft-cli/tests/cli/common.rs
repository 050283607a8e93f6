//! Running the command, and the tiny models it runs on.

use std::path::{Path, PathBuf};
use std::process::Command;

use peft::io::NamedTensors;
use serde_json::{Value, json};

/// What a run of the command gave.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// The run, which has to have gone well.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "stderr: {}", self.stderr);
        self
    }

    /// The JSON on stdout of a run that went well.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let run = self.ok();
        serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e} in {}", run.stdout))
    }

    /// The one error of a run that failed with `code`; every word of `words` has to be in it, nothing on stdout.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> String {
        assert_eq!(
            self.code, code,
            "stdout: {}\nstderr: {}",
            self.stdout, self.stderr
        );
        assert_eq!(self.stdout, "");
        assert_eq!(self.stderr.matches("error:").count(), 1, "{}", self.stderr);
        assert!(!self.stderr.contains("internal error"), "{}", self.stderr);
        for word in words {
            assert!(
                self.stderr.contains(word),
                "{word:?} is not in: {}",
                self.stderr
            );
        }
        self.stderr
    }
}

/// Runs `peft` with arguments.
pub(crate) fn peft<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("PEFT_LOG")
        .output()
        .unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

/// The folder of a tiny model.
pub(crate) fn model(name: &str) -> String {
    text(goldens().join("models").join(name))
}

/// The adapter folder of a case.
pub(crate) fn adapter(case: &str) -> String {
    text(goldens().join("cases").join(case).join("adapter"))
}

pub(crate) fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

pub(crate) fn read_json(path: impl AsRef<Path>) -> Value {
    peft::io::read_json(path.as_ref()).unwrap()
}

pub(crate) fn write(path: impl AsRef<Path>, value: &str) {
    std::fs::write(path, value).unwrap();
}

pub(crate) fn tensors(path: impl AsRef<Path>) -> NamedTensors {
    peft::io::read_tensors(path.as_ref()).unwrap()
}

/// Names in a folder, sorted; none if it is not there.
pub(crate) fn listing(folder: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .map(|entries| {
            entries
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    names
}

/// A copy of a tiny model that may be changed.
pub(crate) fn copy_model(name: &str, to: &Path) -> String {
    std::fs::create_dir_all(to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(&model(name)).join(file), to.join(file)).unwrap();
    }
    text(to)
}

/// A copy of a tiny model with a tokenizer of words `w0`, `w1`, ... and a chat template.
pub(crate) fn talking_model(name: &str, to: &Path) -> String {
    let folder = copy_model(name, to);
    let size = read_json(to.join("config.json"))["vocab_size"]
        .as_u64()
        .unwrap();
    let vocab: serde_json::Map<String, Value> =
        (0..size).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    write(to.join("tokenizer.json"), &tokenizer.to_string());
    let template = "{% for m in messages %}{{ m.role | length }} {{ m.content }} {% endfor %}w1";
    let config = json!({"eos_token": "w2", "chat_template": template});
    write(to.join("tokenizer_config.json"), &config.to_string());
    folder
}

/// Largest difference of two lists of equal length.
#[track_caller]
pub(crate) fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max)
}
