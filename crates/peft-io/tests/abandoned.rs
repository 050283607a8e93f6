//! A process that is told to end leaves nothing of what it was writing. Alone in its process: nobody writes afterwards.

use peft_io::{DType, PlanEntry, ShardPlan, StreamWriter, abandon_writes, write_json};
use serde_json::json;

#[test]
fn nothing_half_written_stays() {
    let root = tempfile::tempdir().unwrap();
    let entry = |name: &str| PlanEntry {
        name: name.to_owned(),
        dtype: DType::F32,
        shape: vec![2],
    };
    let plan = ShardPlan::new(vec![entry("a"), entry("b")], 1 << 20).unwrap();
    let there = root.path().join("there");
    write_json(&there.join("kept.json"), &json!({})).unwrap();
    let names = |folder: &std::path::Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
        entries.map(|e| name(e).into_string().unwrap()).collect()
    };
    let begun = |folder: &std::path::Path| {
        let writer = StreamWriter::create(folder, &plan, &Default::default(), false).unwrap();
        writer.write("a", &[0; 8]).unwrap();
        writer
    };
    let new = root.path().join("made/for/it");
    let writers = [begun(&new), begun(&there)];
    assert_eq!(names(&new).len(), 1);
    assert_eq!(names(&there).len(), 2);
    abandon_writes();
    assert_eq!(names(root.path()), ["there"]);
    assert_eq!(names(&there), ["kept.json"]);
    drop(writers);
}
