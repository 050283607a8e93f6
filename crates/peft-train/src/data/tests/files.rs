//! Several files read as one, and the tasks of their rows.

use super::*;
use crate::config::Files;

fn two(first: &str, second: &str) -> (tempfile::TempDir, Files) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let files = Files(vec![path("a.jsonl", first), path("b.csv", second)]);
    (folder, files)
}

#[test]
fn each_file_is_a_task_unless_its_rows_say_another() {
    let (_folder, files) = two(
        "{\"text\":\"ab\"}\n{\"text\":\"cd\",\"task\":7}\n",
        "text,task\nef,\ngh,2\n",
    );
    let raw = RawData::read_all(&files, DataFormat::Auto).unwrap();
    let rows: Vec<_> = raw.rows.iter().map(|r| (r.file, r.line, r.task)).collect();
    assert_eq!(
        rows,
        [
            (0, 1, Some(0)),
            (0, 2, Some(7)),
            (1, 2, Some(1)),
            (1, 3, Some(2))
        ]
    );
    let data = Dataset::encode(&raw, Some(&PLAIN), None, &options(9)).unwrap();
    let examples: Vec<&Example> = data.examples.iter().collect();
    let batch = collate(&examples, 0).batch;
    assert_eq!(batch.task_ids, Some(vec![0, 7, 1, 2]));
    let places = data.places(&examples);
    assert!(
        places.contains("a.jsonl line 1, 2; ") && places.ends_with("b.csv line 2, 3"),
        "{places}"
    );
    // The same rows of another task are other data.
    let (_folder, other) = two(
        "{\"text\":\"ab\"}\n{\"text\":\"cd\",\"task\":6}\n",
        "text,task\nef,\ngh,2\n",
    );
    let other = RawData::read_all(&other, DataFormat::Auto).unwrap();
    let other = Dataset::encode(&other, Some(&PLAIN), None, &options(9)).unwrap();
    assert_ne!(data.fingerprint(), other.fingerprint());
}

#[test]
fn rows_of_one_file_have_no_task_or_all_have_one() {
    let none = encode(
        "{\"text\":\"ab\",\"task\":\"a word\"}\n{\"text\":\"cd\"}\n",
        9,
    );
    let examples: Vec<&Example> = none.examples.iter().collect();
    assert_eq!(collate(&examples, 0).batch.task_ids, None);
    let mut all = raw("d.jsonl", "{\"text\":\"ab\"}\n{\"text\":\"cd\"}\n").unwrap();
    all.set_task(3);
    assert!(all.rows.iter().all(|row| row.task == Some(3)));
    let error = raw(
        "d.jsonl",
        "{\"text\":\"ab\",\"task\":1}\n{\"text\":\"cd\"}\n",
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains("d.jsonl:2") && error.contains("task"),
        "{error}"
    );
}

#[test]
fn an_error_names_the_file_it_is_in() {
    let (_folder, files) = two("{\"text\":\"ab\"}\n", "text,label\nef,1\n");
    let raw = RawData::read_all(&files, DataFormat::Auto).unwrap();
    let error = raw.has_classes().unwrap_err().to_string();
    assert!(error.contains("b.csv:2"), "{error}");
}
