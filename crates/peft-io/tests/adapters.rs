//! Adapter folders, training states, data files and logs: written, read back, refused, interrupted.

use std::collections::BTreeMap;
use std::path::Path;

use peft_io::{
    LineLog, NamedTensors, SIDE_FILES, atomic_write, copy_side_files, list_states, read_adapter,
    read_json, read_lines, read_state, read_text, remove_state, write_adapter, write_state,
};
use serde_json::{Value, json};

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn tensors(scale: f32) -> NamedTensors {
    BTreeMap::from([
        (
            "base_model.model.q.lora_A.weight".to_owned(),
            (vec![2, 3], (0..6).map(|i| i as f32 * scale).collect()),
        ),
        (
            "base_model.model.q.lora_B.weight".to_owned(),
            (vec![1, 2], vec![f32::MIN_POSITIVE, -0.0]),
        ),
    ])
}

fn config() -> Value {
    json!({
        "r": 8,
        "peft_type": "LORA",
        "base_model_name_or_path": "owner/na\"me",
        "nested": {"z": 1, "a": [{"y": 1, "b": 2}]},
        "unknown_key": null,
    })
}

#[test]
fn an_adapter_reads_back_bit_for_bit() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("out/adapter");
    write_adapter(&folder, &config(), &tensors(0.1)).unwrap();
    assert_eq!(
        listing(&folder),
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors"
        ]
    );

    let read = read_adapter(&folder).unwrap();
    assert_eq!(read.config, config());
    assert_eq!(read.metadata["format"], "pt");
    for (name, (shape, values)) in tensors(0.1) {
        let (got_shape, got) = &read.tensors[&name];
        assert_eq!(got_shape, &shape);
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(got), bits(&values), "{name}");
        assert_eq!(read.formats[&name].to_string(), "F32");
    }

    let text = read_text(&folder.join("adapter_config.json")).unwrap();
    let positions: Vec<_> = [
        "\n  \"base_model",
        "\n  \"nested\": {\n    \"a\": [",
        "\"b\": 2",
        "\"y\": 1",
        "\"z\": 1",
        "\n  \"peft_type\": \"LORA\",",
        "\n  \"r\": 8,",
        "\n  \"unknown_key\": null\n}",
    ]
    .iter()
    .map(|part| {
        text.find(part)
            .unwrap_or_else(|| panic!("{part} not in {text}"))
    })
    .collect();
    assert!(positions.is_sorted(), "{text}");
    let card = read_text(&folder.join("README.md")).unwrap();
    assert!(
        card.starts_with("---\nbase_model: \"owner/na\\\"me\"\nlibrary_name: peft\n---\n"),
        "{card}"
    );
}

#[test]
fn writing_again_replaces_the_adapter_and_keeps_the_card() {
    let root = tempfile::tempdir().unwrap();
    write_adapter(root.path(), &config(), &tensors(0.1)).unwrap();
    std::fs::write(root.path().join("README.md"), "mine").unwrap();
    write_adapter(root.path(), &json!({"r": 4}), &tensors(0.2)).unwrap();
    let read = read_adapter(root.path()).unwrap();
    assert_eq!(read.config, json!({"r": 4}));
    assert_eq!(read.tensors, tensors(0.2));
    assert_eq!(read_text(&root.path().join("README.md")).unwrap(), "mine");
    assert_eq!(listing(root.path()).len(), 3);
}

#[test]
fn a_bad_adapter_is_not_written_and_nothing_remains() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("a/b");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut t = tensors(0.1);
        t.get_mut("base_model.model.q.lora_A.weight").unwrap().1[4] = bad;
        let error = write_adapter(&folder, &config(), &t)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("lora_A") && error.contains("element 4"),
            "{error}"
        );
    }
    let mut t = tensors(0.1);
    t.get_mut("base_model.model.q.lora_B.weight").unwrap().0 = vec![7];
    assert!(
        write_adapter(&folder, &config(), &t)
            .unwrap_err()
            .to_string()
            .contains("lora_B")
    );
    assert!(write_adapter(&folder, &json!([1]), &tensors(0.1)).is_err());
    assert_eq!(listing(root.path()), [""; 0]);

    // A folder in the place of the configuration: the tensors, renamed first, go back.
    std::fs::create_dir_all(folder.join("adapter_config.json")).unwrap();
    assert!(write_adapter(&folder, &config(), &tensors(0.1)).is_err());
    assert_eq!(listing(&folder), ["adapter_config.json"]);
}

#[test]
fn folders_that_are_no_adapter_say_what_to_do() {
    let cases = [
        ("adapter_model.bin", "save_file"),
        ("adapter.safetensors", "adapter_config.json"),
        ("pytorch_adapter.bin", "use_safetensors"),
        ("config.json", "holds a model"),
        (
            "adapter_config.json",
            "adapter_model.safetensors is missing",
        ),
    ];
    for (name, want) in cases {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join(name), "{}").unwrap();
        let error = read_adapter(root.path()).unwrap_err().to_string();
        assert!(error.contains(want), "{name}: {error}");
    }
    let root = tempfile::tempdir().unwrap();
    assert!(read_adapter(&root.path().join("gone")).is_err());
    write_adapter(root.path(), &config(), &tensors(0.1)).unwrap();
    let path = root.path().join("adapter_config.json");
    for (text, want) in [
        ("[]", "not a JSON object"),
        ("{\"r\": }", "line 1 column"),
        ("\u{feff}{}", ""),
    ] {
        std::fs::write(&path, text).unwrap();
        match read_adapter(root.path()) {
            Ok(read) => assert!(want.is_empty() && read.config == json!({})),
            Err(e) => assert!(!want.is_empty() && e.to_string().contains(want), "{e}"),
        }
    }
}

#[test]
fn a_damaged_value_in_an_adapter_is_found_on_reading() {
    let root = tempfile::tempdir().unwrap();
    write_adapter(root.path(), &config(), &tensors(0.1)).unwrap();
    let path = root.path().join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = read_adapter(root.path()).unwrap_err().to_string();
    assert!(
        error.contains("lora_B") && error.contains("NaN at element 1"),
        "{error}"
    );
}

#[test]
fn states_are_whole_or_absent() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("checkpoints");
    assert_eq!(list_states(&dir).unwrap(), [""; 0]);
    let json = |step: u64| json!({"step": step, "rng": u64::MAX - step});
    for step in [9, 10, 100] {
        write_state(
            &dir,
            &format!("step-{step}"),
            &tensors(step as f32),
            &json(step),
        )
        .unwrap();
    }
    assert_eq!(
        list_states(&dir).unwrap(),
        ["step-9", "step-10", "step-100"]
    );
    assert_eq!(
        read_state(&dir, "step-10").unwrap(),
        (tensors(10.0), json(10))
    );
    // NaN moments are the trainer's to judge; bits must survive.
    let odd = NamedTensors::from([("m".to_owned(), (vec![1], vec![f32::from_bits(0x7fc0_1234)]))]);
    write_state(&dir, "step-10", &odd, &json(11)).unwrap();
    let (got, state) = read_state(&dir, "step-10").unwrap();
    assert_eq!((got["m"].1[0].to_bits(), state), (0x7fc0_1234, json(11)));

    // What a kill can leave: a partial state, and a replaced state whose successor never came.
    std::fs::create_dir(dir.join(".partial-step-200")).unwrap();
    std::fs::rename(dir.join("step-9"), dir.join(".replaced-step-9")).unwrap();
    assert_eq!(
        list_states(&dir).unwrap(),
        ["step-9", "step-10", "step-100"]
    );
    assert_eq!(read_state(&dir, "step-9").unwrap().1, json(9));
    remove_state(&dir, "step-100").unwrap();
    remove_state(&dir, "step-100").unwrap();
    assert_eq!(listing(&dir), ["step-10", "step-9"]);

    let error = read_state(&dir, "step-1").unwrap_err().to_string();
    assert!(
        error.contains("step-1") && error.contains("step-9, step-10"),
        "{error}"
    );
    for bad in ["", "..", "a/b", ".hidden"] {
        assert!(write_state(&dir, bad, &odd, &json(1)).is_err(), "{bad}");
    }
    let bad = NamedTensors::from([("m".to_owned(), (vec![2], vec![0.0]))]);
    assert!(write_state(&dir, "step-10", &bad, &json(1)).is_err());
    assert_eq!(read_state(&dir, "step-10").unwrap().1, json(11));
    assert_eq!(listing(&dir), ["step-10", "step-9"]);
}

#[test]
fn a_resumed_log_drops_cut_and_repeated_lines() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("out/metrics.jsonl");
    let mut log = LineLog::create(&path).unwrap();
    for step in 1..=4 {
        log.push(&json!({"step": step})).unwrap();
    }
    drop(log);
    let mut cut = read_text(&path).unwrap();
    cut.push_str("{\"step\": 5, \"lo");
    std::fs::write(&path, cut).unwrap();
    let mut log =
        LineLog::resume(&path, |line| line["step"].as_u64().is_some_and(|s| s <= 2)).unwrap();
    log.push(&json!({"step": 3})).unwrap();
    let steps: Vec<_> = read_lines(&path)
        .unwrap()
        .map(|line| line.unwrap())
        .collect();
    let want = [
        (1, "{\"step\":1}"),
        (2, "{\"step\":2}"),
        (3, "{\"step\":3}"),
    ];
    assert_eq!(steps, want.map(|(n, s)| (n, s.to_owned())));
    LineLog::resume(&root.path().join("new.jsonl"), |_| true).unwrap();
    assert!(root.path().join("new.jsonl").exists());
}

#[test]
fn lines_come_with_numbers_and_without_line_ends() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("d.jsonl");
    std::fs::write(&path, b"\xef\xbb\xbfone\r\n\ntwo\nlast").unwrap();
    let lines: Vec<_> = read_lines(&path).unwrap().map(|l| l.unwrap()).collect();
    let want = [(1, "one"), (2, ""), (3, "two"), (4, "last")];
    assert_eq!(lines, want.map(|(n, s)| (n, s.to_owned())));
    std::fs::write(&path, b"ok\n\xff\n").unwrap();
    let error = read_lines(&path)
        .unwrap()
        .nth(1)
        .unwrap()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("d.jsonl") && error.contains("line 2"),
        "{error}"
    );
    assert!(read_lines(&root.path().join("gone")).is_err());
}

#[test]
fn side_files_are_copied_and_named() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("from"), root.path().join("to"));
    std::fs::create_dir(&from).unwrap();
    for name in ["tokenizer.json", "vocab.txt", "secret.txt"] {
        std::fs::write(from.join(name), name).unwrap();
    }
    assert_eq!(
        copy_side_files(&from, &to, SIDE_FILES).unwrap(),
        ["tokenizer.json", "vocab.txt"]
    );
    assert_eq!(listing(&to), ["tokenizer.json", "vocab.txt"]);
    assert!(copy_side_files(&from, &to, &["../from/secret.txt"]).is_err());
}

#[test]
fn an_atomic_write_replaces_or_leaves_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a/b.json");
    atomic_write(&path, b"{\"a\": 1}").unwrap();
    atomic_write(&path, b"{\"a\": 2}").unwrap();
    assert_eq!(read_json(&path).unwrap(), json!({"a": 2}));
    assert_eq!(listing(&root.path().join("a")), ["b.json"]);
    // A file where a folder would have to be.
    let error = atomic_write(&path.join("c"), b"").unwrap_err().to_string();
    assert!(error.contains("b.json"), "{error}");
    assert_eq!(listing(root.path()), ["a"]);
    assert!(atomic_write(Path::new("/"), b"").is_err());
}
