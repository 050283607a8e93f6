//! Rows, tokens and batches, with a tokenizer of bytes.

use std::path::{Path, PathBuf};

use peft_core::Result;
use peft_tensor::{IGNORE, RngKey};
use serde_json::Value;

use super::*;
use crate::config::{DataFormat, TaskKind};
use peft_models::Labels;

mod batches;
mod files;

/// Bytes as tokens, 256 in front of every text, 257 at its end; the assistant's turns are what is said.
pub(crate) struct Bytes {
    /// Put after a text like BERT's `[SEP]`.
    pub(crate) back: Option<u32>,
}

impl Encoder for Bytes {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let plain = text.bytes().map(u32::from);
        Ok(match special {
            true => std::iter::once(256).chain(plain).chain(self.back).collect(),
            false => plain.collect(),
        })
    }

    fn eos(&self) -> Option<u32> {
        Some(257)
    }

    fn pad(&self) -> Option<u32> {
        None
    }

    fn chat(&self, messages: &[Value]) -> Result<Vec<(u32, bool)>> {
        let text = |m: &Value| m["content"].as_str().unwrap_or_default().to_owned();
        let said = messages.iter().map(|m| (text(m), m["role"] == "assistant"));
        Ok(said
            .flat_map(|(t, s)| t.into_bytes().into_iter().map(move |b| (u32::from(b), s)))
            .collect())
    }
}

const PLAIN: Bytes = Bytes { back: None };

fn write(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn raw(name: &str, text: &str) -> Result<RawData> {
    let (_folder, path) = write(name, text);
    RawData::read(&path, DataFormat::Auto)
}

fn options(max_length: usize) -> EncodeOptions {
    EncodeOptions {
        max_length,
        add_eos: true,
        task: TaskKind::CausalLm,
        vocab_size: 260,
    }
}

fn encode(text: &str, max_length: usize) -> Dataset {
    Dataset::encode(
        &raw("d.jsonl", text).unwrap(),
        Some(&PLAIN),
        None,
        &options(max_length),
    )
    .unwrap()
}

fn labels(example: &Example) -> &[i64] {
    match &example.goal {
        Goal::Tokens { labels, .. } => labels,
        Goal::Class(_) => &[],
    }
}

#[test]
fn every_kind_of_row_is_read() {
    let data = raw(
        "d.jsonl",
        "\u{feff}{\"text\":\"a\",\"id\":7}\n\n{\"prompt\":\"p\",\"completion\":\"c\",\"label\":null}\n\
         {\"messages\":[{\"role\":\"user\",\"content\":\"u\"},{\"role\":\"assistant\",\"content\":\"v\"}]}\n\
         {\"input_ids\":[1,2],\"labels\":[-100,2],\"attention_mask\":[1,0]}\n",
    )
    .unwrap();
    let lines: Vec<usize> = data.rows.iter().map(|r| r.line).collect();
    assert_eq!(lines, [1, 3, 4, 5]);
    assert_eq!(data.rows[0].kind, RowKind::Text("a".into()));
    assert_eq!(
        data.rows[1].kind,
        RowKind::Completion {
            prompt: "p".into(),
            completion: "c".into()
        }
    );
    assert!(matches!(&data.rows[2].kind, RowKind::Messages(m) if m.len() == 2));
    let tokens = RowKind::Tokens {
        ids: vec![1, 2],
        labels: Some(vec![-100, 2]),
        mask: Some(vec![true, false]),
        class: None,
    };
    assert_eq!(data.rows[3].kind, tokens);

    let data = raw("d.csv", "id,text,label\n1,\"a, b\nc\",good\n2,d,bad\n").unwrap();
    let lines: Vec<usize> = data.rows.iter().map(|r| r.line).collect();
    assert_eq!(lines, [2, 4]);
    let first = RowKind::Labelled {
        text: "a, b\nc".into(),
        label: RawLabel::Name("good".into()),
    };
    assert_eq!(data.rows[0].kind, first);
    let data = raw("d.csv", "prompt,completion\np,c\n").unwrap();
    assert_eq!(
        data.rows[0].kind,
        RowKind::Completion {
            prompt: "p".into(),
            completion: "c".into()
        }
    );
}

#[test]
fn every_kind_of_bad_row_is_named_with_its_line() {
    let good = "{\"text\":\"fine\"}";
    for (bad, parts) in [
        ("{\"text\":\"a\"", &["not JSON", "column"][..]),
        ("[1]", &["expected an object", "`text`"]),
        ("\"a\"", &["expected an object"]),
        ("{}", &["none of the fields"]),
        ("{\"txt\":\"a\"}", &["txt", "`text`"]),
        ("{\"text\":3}", &["`text`", "string", "3"]),
        ("{\"text\":\"\"}", &["`text` is empty"]),
        ("{\"prompt\":\"a\"}", &["no `completion`"]),
        ("{\"completion\":\"a\"}", &["no `prompt`"]),
        (
            "{\"prompt\":\"a\",\"completion\":\"\"}",
            &["`completion` is empty"],
        ),
        (
            "{\"prompt\":[],\"completion\":\"b\"}",
            &["`prompt`", "string"],
        ),
        ("{\"label\":1}", &["no `text`"]),
        ("{\"text\":\"a\",\"label\":-1}", &["`label`", "-1"]),
        ("{\"text\":\"a\",\"label\":0.5}", &["`label`", "regression"]),
        ("{\"text\":\"a\",\"label\":[1]}", &["`label`", "[1]"]),
        ("{\"text\":\"a\",\"label\":\" \"}", &["`label` is empty"]),
        ("{\"messages\":\"a\"}", &["`messages`", "list"]),
        (
            "{\"messages\":[{\"content\":\"a\"}]}",
            &["messages[0]", "role"],
        ),
        (
            "{\"messages\":[{\"role\":\"user\"}]}",
            &["messages[0]", "content"],
        ),
        (
            "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}",
            &["assistant"],
        ),
        ("{\"input_ids\":[]}", &["`input_ids` is empty"]),
        ("{\"input_ids\":[1,-2]}", &["input_ids[1]", "-2"]),
        ("{\"input_ids\":[1,2.5]}", &["input_ids[1]", "2.5"]),
        ("{\"input_ids\":[4294967296]}", &["input_ids[0]"]),
        (
            "{\"input_ids\":[1,2],\"labels\":[1]}",
            &["`labels` has 1 entries for 2"],
        ),
        ("{\"input_ids\":[1,2],\"labels\":[1,-7]}", &["-7", "-100"]),
        (
            "{\"input_ids\":[1,2],\"attention_mask\":[1,2]}",
            &["attention_mask[1]"],
        ),
        ("{\"input_ids\":[1,2],\"attention_mask\":[0,0]}", &["no 1"]),
        ("{\"input_ids\":[1],\"labels\":[1],\"label\":1}", &["both"]),
    ] {
        let message = raw("d.jsonl", &format!("{good}\n\n{bad}\n{good}\n"))
            .unwrap_err()
            .to_string();
        assert!(message.contains("d.jsonl:3:"), "{bad}: {message}");
        for part in parts {
            assert!(message.contains(part), "{bad}: {message}");
        }
    }
    for (text, parts) in [
        ("text,label\na,b\nc\n", &[":3:", "1 columns"][..]),
        ("text,label\na,\n", &[":2:", "`label` is empty"]),
        ("text\n\"\"\n", &[":2:", "`text` is empty"]),
        ("prompt,text\na,b\n", &[":1:", "completion"]),
        ("a,b\n1,2\n", &[":1:", "a, b"]),
        ("text\n", &["no rows"]),
    ] {
        let message = raw("d.csv", text).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "{text:?}: {message}");
        }
    }
    assert!(
        raw("d.jsonl", "\n\n")
            .unwrap_err()
            .to_string()
            .contains("no rows")
    );
    assert!(
        RawData::read(Path::new("/no/such/file.jsonl"), DataFormat::Auto)
            .unwrap_err()
            .to_string()
            .contains("file.jsonl")
    );
}

#[test]
fn rows_that_do_not_fit_the_model_are_named() {
    let refused = |text: &str,
                   task: TaskKind,
                   names: Option<&LabelNames>,
                   tokenizer: Option<&dyn Encoder>| {
        let options = EncodeOptions { task, ..options(8) };
        Dataset::encode(&raw("d.jsonl", text).unwrap(), tokenizer, names, &options)
            .unwrap_err()
            .to_string()
    };
    let two = LabelNames::new(vec!["no".into(), "yes".into()]);
    let causal = TaskKind::CausalLm;
    let classes = TaskKind::SequenceClassification;
    let message = refused("{\"text\":\"a\",\"label\":1}", causal, None, Some(&PLAIN));
    assert!(
        message.contains("d.jsonl:1") && message.contains("sequence_classification"),
        "{message}"
    );
    let message = refused(
        "{\"text\":\"a\",\"label\":\"yes\"}\n{\"text\":\"a\"}",
        classes,
        Some(&two),
        Some(&PLAIN),
    );
    assert!(
        message.contains("d.jsonl:2") && message.contains("`label`"),
        "{message}"
    );
    let message = refused(
        "{\"text\":\"a\",\"label\":\"maybe\"}",
        classes,
        Some(&two),
        Some(&PLAIN),
    );
    assert!(
        message.contains("maybe") && message.contains("no, yes"),
        "{message}"
    );
    let message = refused("{\"input_ids\":[1,260]}", causal, None, None);
    assert!(
        message.contains("260") && message.contains("d.jsonl:1"),
        "{message}"
    );
    let message = refused(
        "{\"input_ids\":[1,2],\"labels\":[-100,260]}",
        causal,
        None,
        None,
    );
    assert!(message.contains("label 260"), "{message}");
    let message = refused("{\"text\":\"abc\"}", causal, None, None);
    assert!(message.contains("tokenizer"), "{message}");
    let message = refused(
        "{\"input_ids\":[1,2],\"labels\":[-100,-100]}",
        causal,
        None,
        None,
    );
    assert!(message.contains("no row has a token to learn"), "{message}");
}

#[test]
fn text_gets_its_frame_and_is_cut_at_the_end() {
    let data = encode("{\"text\":\"abc\"}\n{\"text\":\"abcdefgh\"}", 6);
    assert_eq!(data.examples[0].ids, [256, 97, 98, 99, 257]);
    assert_eq!(labels(&data.examples[0]), [256, 97, 98, 99, 257]);
    assert_eq!(data.examples[1].ids, [256, 97, 98, 99, 100, 101]);
    assert_eq!(data.notes.len(), 1);
    assert!(
        data.notes[0].contains("1 of 2 rows were cut"),
        "{:?}",
        data.notes
    );
    let raw = raw("d.jsonl", "{\"text\":\"abc\"}").unwrap();
    let bare = EncodeOptions {
        add_eos: false,
        ..options(6)
    };
    assert_eq!(
        Dataset::encode(&raw, Some(&PLAIN), None, &bare)
            .unwrap()
            .examples[0]
            .ids,
        [256, 97, 98, 99]
    );
}

#[test]
fn a_long_prompt_loses_its_beginning_but_not_what_the_tokenizer_puts_in_front() {
    let data = encode("{\"prompt\":\"pqrst\",\"completion\":\"xy\"}", 6);
    let example = &data.examples[0];
    assert_eq!(example.ids, [256, 115, 116, 120, 121, 257]);
    assert_eq!(labels(example), [IGNORE, IGNORE, IGNORE, 120, 121, 257]);
    assert!(matches!(
        example.goal,
        Goal::Tokens {
            prompt: Some(3),
            ..
        }
    ));
    assert!(
        data.notes[0].contains("prompts were cut at their beginning"),
        "{:?}",
        data.notes
    );
    // A completion that is too long by itself is cut at its end and keeps one token to be predicted from.
    let data = encode("{\"prompt\":\"pq\",\"completion\":\"uvwxyz\"}", 4);
    assert_eq!(data.examples[0].ids, [113, 117, 118, 119]);
    assert_eq!(data.examples[0].labelled(false), 3);
    assert!(
        data.notes[0].contains("completions were cut"),
        "{:?}",
        data.notes
    );
    // Exactly as long as allowed: nothing is lost.
    let data = encode("{\"prompt\":\"pq\",\"completion\":\"x\"}", 5);
    assert_eq!(data.examples[0].ids, [256, 112, 113, 120, 257]);
    assert!(data.notes.is_empty());
}

#[test]
fn conversations_and_given_tokens_keep_their_labels() {
    let data = encode(
        "{\"messages\":[{\"role\":\"user\",\"content\":\"ab\"},{\"role\":\"assistant\",\"content\":\"cd\"}]}\n\
         {\"input_ids\":[5,6,7],\"attention_mask\":[1,1,0]}\n{\"input_ids\":[5,6,7],\"labels\":[-100,6,7]}",
        8,
    );
    assert_eq!(labels(&data.examples[0]), [IGNORE, IGNORE, 99, 100]);
    assert_eq!(labels(&data.examples[1]), [5, 6, IGNORE]);
    assert_eq!(labels(&data.examples[2]), [IGNORE, 6, 7]);
    let counts: Vec<usize> = data.examples.iter().map(|e| e.labelled(false)).collect();
    assert_eq!(counts, [2, 1, 2]);
    // Virtual tokens in front predict the first label too.
    assert_eq!(data.examples[1].labelled(true), 2);
    assert_eq!(data.examples[1].tokens(), 2);
}

#[test]
fn a_classified_text_keeps_the_frame_when_it_is_cut() {
    let raw = raw(
        "d.jsonl",
        "{\"text\":\"abcdef\",\"label\":\"pos\"}\n{\"text\":\"a\",\"label\":\"neg\"}",
    )
    .unwrap();
    let names = LabelNames::infer(&raw, None).unwrap();
    assert_eq!(names.names(), ["neg", "pos"]);
    let options = EncodeOptions {
        task: TaskKind::SequenceClassification,
        ..options(5)
    };
    let data = Dataset::encode(
        &raw,
        Some(&Bytes { back: Some(258) }),
        Some(&names),
        &options,
    )
    .unwrap();
    assert_eq!(data.examples[0].ids, [256, 97, 98, 99, 258]);
    assert_eq!(data.examples[0].goal, Goal::Class(1));
    assert_eq!(data.examples[1].goal, Goal::Class(0));
}

#[test]
fn classes_are_numbered_named_and_kept() {
    let numbered = raw(
        "d.jsonl",
        "{\"text\":\"a\",\"label\":2}\n{\"text\":\"b\",\"label\":true}",
    )
    .unwrap();
    let names = LabelNames::infer(&numbered, None).unwrap();
    assert_eq!(names.names(), ["LABEL_0", "LABEL_1", "LABEL_2"]);
    assert_eq!(LabelNames::infer(&numbered, Some(5)).unwrap().len(), 5);
    assert!(
        LabelNames::infer(&numbered, Some(2))
            .unwrap_err()
            .to_string()
            .contains("d.jsonl:1")
    );
    let named = raw("d.csv", "text,label\na,x\nb,y\nc,z\n").unwrap();
    let message = LabelNames::infer(&named, Some(2)).unwrap_err().to_string();
    assert!(
        message.contains("num_labels") && message.contains("x, y, z"),
        "{message}"
    );
    let mixed = raw(
        "d.jsonl",
        "{\"text\":\"a\",\"label\":\"x\"}\n{\"text\":\"b\",\"label\":1}",
    )
    .unwrap();
    assert!(
        LabelNames::infer(&mixed, None)
            .unwrap_err()
            .to_string()
            .contains("d.jsonl:2")
    );
    let some = raw(
        "d.jsonl",
        "{\"text\":\"a\",\"label\":\"x\"}\n{\"text\":\"b\"}",
    )
    .unwrap();
    assert!(
        some.has_classes()
            .unwrap_err()
            .to_string()
            .contains("d.jsonl:2")
    );

    let folder = tempfile::tempdir().unwrap();
    assert_eq!(LabelNames::read(folder.path()).unwrap(), None);
    let names = LabelNames::infer(&named, None).unwrap();
    peft_io::write_json(&folder.path().join(LABELS_FILE), &names.to_json()).unwrap();
    assert_eq!(LabelNames::read(folder.path()).unwrap(), Some(names));
}

#[test]
fn buckets_are_a_function_of_seed_and_epoch_and_hold_every_row_once() {
    for (n, size, seed) in [(1, 4, 0), (103, 4, 1), (1000, 8, 2), (64, 64, 3)] {
        let lengths: Vec<usize> = (0..n).map(|i| 1 + (i * 7919) % 97).collect();
        let key = RngKey::new(seed);
        for (shuffle, bucket) in [(true, true), (true, false), (false, true)] {
            let plan = |epoch| plan_epoch(&lengths, size, shuffle, bucket, key, epoch);
            assert_eq!(plan(0), plan(0));
            assert_eq!(plan(0).len(), n.div_ceil(size));
            let mut rows = plan(1).concat();
            assert_eq!(rows == (0..n).collect::<Vec<_>>(), !shuffle || n == 1);
            rows.sort_unstable();
            assert_eq!(rows, (0..n).collect::<Vec<_>>());
            if n > 64 {
                assert_eq!(plan(0) == plan(1), !shuffle);
                let other = plan_epoch(&lengths, size, shuffle, bucket, RngKey::new(seed + 9), 0);
                assert_eq!(plan(0) == other, !shuffle);
            }
        }
        let padding = |plan: Vec<Vec<usize>>| -> usize {
            let cells = |b: &Vec<usize>| b.len() * b.iter().map(|&i| lengths[i]).max().unwrap_or(0);
            plan.iter().map(cells).sum::<usize>() - lengths.iter().sum::<usize>()
        };
        if n > 64 {
            let with = padding(plan_epoch(&lengths, size, true, true, key, 0));
            let without = padding(plan_epoch(&lengths, size, true, false, key, 0));
            assert!(with * 5 < without, "{with} {without}");
        }
    }
}

#[test]
fn rows_are_filled_up_on_the_right() {
    let data = encode(
        "{\"prompt\":\"p\",\"completion\":\"x\"}\n{\"text\":\"a\"}\n{\"input_ids\":[1,2],\"attention_mask\":[0,1]}",
        9,
    );
    let rows: Vec<&Example> = data.examples.iter().collect();
    let collated = collate(&rows, 0);
    assert_eq!((collated.batch.batch, collated.batch.seq), (3, 4));
    assert_eq!(
        collated.batch.ids,
        [256, 112, 120, 257, 256, 97, 257, 0, 1, 2, 0, 0]
    );
    let mask = [
        true, true, true, true, true, true, true, false, false, true, false, false,
    ];
    assert_eq!(collated.batch.mask.unwrap(), mask);
    let want = [
        IGNORE, IGNORE, 120, 257, 256, 97, 257, IGNORE, IGNORE, 2, IGNORE, IGNORE,
    ];
    assert_eq!(collated.labels, Labels::Tokens(want.to_vec()));
    assert_eq!(collated.tokens, 4 + 3 + 1);
    assert_eq!(collate(&rows[..1], 0).batch.mask, None);
}

#[test]
fn a_split_is_drawn_once_and_keeps_the_order() {
    let text: String = (0..20)
        .map(|i| format!("{{\"input_ids\":[{i},1]}}\n"))
        .collect();
    let data = encode(&text, 8);
    let (train, eval) = data.clone().split(0.25, RngKey::new(3)).unwrap();
    assert_eq!((train.examples.len(), eval.examples.len()), (15, 5));
    for part in [&train, &eval] {
        assert!(part.examples.windows(2).all(|w| w[0].line < w[1].line));
    }
    assert!(
        train
            .examples
            .iter()
            .all(|t| eval.examples.iter().all(|e| e.line != t.line))
    );
    let (_, again) = data.clone().split(0.25, RngKey::new(3)).unwrap();
    assert_eq!(eval.examples, again.examples);
    let (_, other) = data.clone().split(5.0, RngKey::new(4)).unwrap();
    assert_ne!(eval.examples, other.examples);
    assert_ne!(train.fingerprint(), eval.fingerprint());
    for bad in [0.01, 20.0, 0.99] {
        assert!(data.clone().split(bad, RngKey::new(0)).is_err(), "{bad}");
    }
}

#[test]
fn texts_are_packed_whole_and_in_order() {
    let text: String = [5, 3, 4, 6, 2]
        .iter()
        .map(|n| format!("{{\"input_ids\":{:?}}}\n", (10..10 + n).collect::<Vec<_>>()))
        .collect();
    let data = encode(&text, 8).packed();
    // Longest first: 6 (line 4), 5 (1), 4 (3), then 3 goes to 5 where it fits exactly, 2 to 6.
    let lines = |e: &Example| e.texts.iter().map(|t| (t.line, t.len)).collect::<Vec<_>>();
    let rows: Vec<_> = data.examples.iter().map(lines).collect();
    assert_eq!(rows, [vec![(1, 5), (2, 3)], vec![], vec![(4, 6), (5, 2)]]);
    assert_eq!(data.examples[0].ids, [10, 11, 12, 13, 14, 10, 11, 12]);
    let Goal::Tokens { labels, .. } = &data.examples[0].goal else {
        panic!("tokens")
    };
    assert_eq!(labels[..], [IGNORE, 11, 12, 13, 14, IGNORE, 11, 12]);
    assert_eq!(data.examples[0].labelled(false), 4 + 2);
    assert!(data.notes[0].contains("5 texts") && data.notes[0].contains("3 rows"));
    let all: Vec<&Example> = data.examples.iter().collect();
    assert!(
        data.places(&all).contains("line 1, 2, 3, 4, 5"),
        "{}",
        data.places(&all)
    );
    let batch = collate(&all, 0).batch;
    let pad = u32::MAX;
    assert_eq!(
        batch.segments.unwrap(),
        [
            [0, 0, 0, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, pad, pad, pad, pad],
            [0, 0, 0, 0, 0, 0, 1, 1]
        ]
        .concat()
    );
    assert_eq!(batch.seq, 8);
}
