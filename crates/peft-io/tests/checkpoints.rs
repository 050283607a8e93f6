//! Checkpoints written and read back: values, shards, interrupted writes, agreement with the
//! `safetensors` crate's own reader.

use std::collections::BTreeMap;
use std::path::Path;

use peft_io::{
    Checkpoint, DType, GgufBuilder, MetaArray, MetaValue, PlanEntry, ShardPlan, StoredFormat,
    StreamWriter, read_json, read_tensors, write_tensors,
};
use peft_tensor::{WeightFormat, encode};
use proptest::prelude::*;

fn entry(name: &str, shape: &[usize], dtype: DType) -> PlanEntry {
    PlanEntry {
        name: name.into(),
        shape: shape.to_vec(),
        dtype,
    }
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Distinct bytes per tensor, so that a swapped or shifted tensor shows.
fn content(entry: &PlanEntry, seed: u8) -> Vec<u8> {
    let n = entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
    (0..n)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

#[test]
fn weights_of_every_rank_are_matrices() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("t.safetensors");
    let tensors = BTreeMap::from([
        ("scalar".to_owned(), (vec![], vec![1.5])),
        ("vector".to_owned(), (vec![3], vec![1.0, 2.0, 3.0])),
        (
            "matrix".to_owned(),
            (vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ),
        (
            "cube".to_owned(),
            (vec![2, 2, 2], (0..8).map(|i| i as f32).collect()),
        ),
        ("empty".to_owned(), (vec![0, 4], vec![])),
    ]);
    let metadata = BTreeMap::from([
        ("z".to_owned(), "1".to_owned()),
        ("a".to_owned(), "2".to_owned()),
    ]);
    write_tensors(&path, &tensors, &metadata).unwrap();
    assert_eq!(read_tensors(&path).unwrap(), tensors);

    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(file.metadata(), &metadata);
    for (name, rows, cols) in [
        ("scalar", 1, 1),
        ("vector", 1, 3),
        ("matrix", 2, 3),
        ("cube", 2, 4),
        ("empty", 0, 4),
    ] {
        let w = file.weight(name).unwrap();
        assert_eq!((w.rows(), w.cols()), (rows, cols), "{name}");
        assert_eq!(w.to_f32(), tensors[name].1, "{name}");
    }
    let missing = file.weight("matrx").unwrap_err().to_string();
    assert!(
        missing.contains("`matrx`")
            && missing.contains("t.safetensors")
            && missing.contains("matrix"),
        "{missing}"
    );
}

#[test]
fn other_dtypes_become_f32_or_say_why_not() {
    let root = tempfile::tempdir().unwrap();
    let write = |dtype, shape: &[usize], bytes: Vec<u8>| {
        let folder = root.path().join(format!("{dtype}-{}", bytes.len()));
        let plan = ShardPlan::new(vec![entry("t", shape, dtype)], u64::MAX).unwrap();
        let out = StreamWriter::create(&folder, &plan, &BTreeMap::new(), true).unwrap();
        out.write("t", &bytes).unwrap();
        out.finish().unwrap();
        Checkpoint::open(&folder).unwrap()
    };
    let le = |v: &[i64]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let cases = [
        (
            DType::I64,
            le(&[-3, 1 << 40]),
            vec![-3.0, (1u64 << 40) as f32],
        ),
        (DType::I8, vec![255, 128], vec![-1.0, -128.0]),
        (DType::U8, vec![255, 128], vec![255.0, 128.0]),
        (DType::BOOL, vec![1, 0], vec![1.0, 0.0]),
        (
            DType::F64,
            [0.5f64, -1e30]
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect(),
            vec![0.5, -1e30],
        ),
        (DType::F16, vec![0x00, 0x3c, 0x00, 0xc0], vec![1.0, -2.0]),
        (DType::BF16, vec![0x80, 0x3f, 0x00, 0xc0], vec![1.0, -2.0]),
    ];
    for (dtype, bytes, want) in cases {
        let file = write(dtype, &[2], bytes);
        assert_eq!(file.f32("t").unwrap(), (vec![2], want), "{dtype}");
        assert_eq!(file.meta("t").unwrap().format.dtype(), Some(dtype));
    }
    let bad = [
        (DType::I64, le(&[0, 0, (1 << 53) + 1]), "cannot be held"),
        (DType::BOOL, vec![0, 1, 2], "not a boolean"),
        (
            DType::F64,
            [0.0, 0.0, 1e300f64]
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect(),
            "range of f32",
        ),
        (DType::F8_E4M3, vec![0; 3], "not read"),
    ];
    for (dtype, bytes, want) in bad {
        let file = write(dtype, &[3], bytes);
        let error = file.f32("t").unwrap_err().to_string();
        assert!(
            error.contains(want) && error.contains("`t`"),
            "{dtype}: {error}"
        );
        let error = file.weight("t").unwrap_err().to_string();
        assert!(error.contains("cannot be used as a weight"), "{error}");
    }
}

#[test]
fn a_gguf_reads_back_as_written() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.gguf");
    let values: Vec<f32> = (0..4 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    let metadata = [
        ("general.architecture", MetaValue::String("llama".into())),
        ("general.alignment", MetaValue::U32(64)),
        ("u8", MetaValue::U8(200)),
        ("i8", MetaValue::I8(-5)),
        ("u16", MetaValue::U16(60_000)),
        ("i16", MetaValue::I16(-300)),
        ("i32", MetaValue::I32(-70_000)),
        ("f32", MetaValue::F32(1e-5)),
        ("bool", MetaValue::Bool(true)),
        ("u64", MetaValue::U64(u64::MAX)),
        ("i64", MetaValue::I64(i64::MIN)),
        ("f64", MetaValue::F64(0.1)),
        (
            "strings",
            MetaValue::Array(MetaArray::String(vec!["".into(), "Ġthe".into()])),
        ),
        ("floats", MetaValue::Array(MetaArray::F32(vec![0.5, -1.0]))),
        (
            "bools",
            MetaValue::Array(MetaArray::Bool(vec![true, false])),
        ),
        (
            "deep",
            MetaValue::Array(MetaArray::Array(vec![
                MetaArray::U8(vec![]),
                MetaArray::I64(vec![-1]),
            ])),
        ),
    ];
    let mut builder = GgufBuilder::new();
    for (key, value) in &metadata {
        builder = builder.meta(key, value.clone());
    }
    let formats = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Q8_0,
        WeightFormat::Q4_1,
    ];
    for format in formats {
        let bytes = encode(format, &values, 64).unwrap();
        builder = builder.tensor(
            &format!("{}.weight", format.name()),
            &[4, 64],
            format,
            bytes,
        );
    }
    builder.write(&path).unwrap();

    let file = Checkpoint::open(&path).unwrap();
    let gguf = file.gguf().unwrap();
    assert_eq!(
        gguf.metadata,
        metadata
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect()
    );
    assert_eq!(
        (gguf.version, gguf.alignment, gguf.architecture().unwrap()),
        (3, 64, "llama")
    );
    assert_eq!(gguf.u64("u64").unwrap(), u64::MAX);
    assert_eq!(gguf.f64("i8").unwrap(), -5.0);
    assert_eq!(gguf.strings("strings").unwrap()[1], "Ġthe");
    assert!(gguf.bool("bool").unwrap());
    for (error, want) in [
        (
            gguf.u64("i8").unwrap_err(),
            "`i8`: holds i8, not a non-negative integer",
        ),
        (gguf.str("llama.x").unwrap_err(), "`llama.x`: missing"),
        (gguf.strings("floats").unwrap_err(), "holds array of f32"),
    ] {
        assert!(error.to_string().contains(want), "{error}");
    }
    for (format, tolerance) in formats.into_iter().zip([0.0, 5e-4, 8e-3, 0.08]) {
        let name = format!("{}.weight", format.name());
        let meta = file.meta(&name).unwrap();
        assert_eq!(
            (meta.shape.as_slice(), meta.format),
            (&[4, 64][..], StoredFormat::Weight(format))
        );
        assert_eq!(meta.offset % 64, 0);
        let (shape, got) = file.f32(&name).unwrap();
        assert_eq!(shape, [4, 64]);
        let worst = got
            .iter()
            .zip(&values)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= tolerance, "{name}: {worst}");
    }
}

#[test]
fn one_file_is_what_the_reference_reader_reads() {
    let root = tempfile::tempdir().unwrap();
    let plan = ShardPlan::new(
        vec![
            entry("h", &[3], DType::BF16),
            entry("w\"q", &[2, 2], DType::F32),
            entry("n", &[0], DType::U8),
        ],
        1 << 30,
    )
    .unwrap();
    let out = StreamWriter::create(root.path(), &plan, &BTreeMap::new(), false).unwrap();
    for e in plan.entries() {
        out.write(&e.name, &content(e, 1)).unwrap();
    }
    out.add_file("config.json", b"{}").unwrap();
    assert!(!root.path().join("config.json").exists());
    out.finish().unwrap();
    assert_eq!(listing(root.path()), ["config.json", "model.safetensors"]);

    let bytes = std::fs::read(root.path().join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(file.len(), 3);
    for e in plan.entries() {
        let t = file.tensor(&e.name).unwrap();
        assert_eq!(
            (t.dtype(), t.shape(), t.data()),
            (e.dtype, &e.shape[..], &content(e, 1)[..])
        );
    }
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    assert_eq!(checkpoint.folder(), Some(root.path()));
    // The float tensor comes first, so that it is aligned whatever precedes it in the plan.
    assert_eq!(checkpoint.meta("w\"q").unwrap().offset % 4, 0);
    assert!(checkpoint.weight("w\"q").unwrap().as_f32().is_some());
}

#[test]
fn a_writer_refuses_what_was_not_planned() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("new/model");
    let plan = ShardPlan::new(
        vec![entry("a", &[4], DType::U8), entry("b", &[4], DType::U8)],
        4,
    )
    .unwrap();
    let out = StreamWriter::create(&folder, &plan, &BTreeMap::new(), false).unwrap();
    for (name, bytes, want) in [
        ("c", &[0u8; 4][..], "not in the plan"),
        ("a", &[0; 3], "3 bytes given, the plan has 4"),
        ("a", &[0; 5], "5 bytes given"),
    ] {
        let error = out.write(name, bytes).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    out.write("a", &[1; 4]).unwrap();
    assert!(
        out.write("a", &[1; 4])
            .unwrap_err()
            .to_string()
            .contains("already written")
    );
    out.write_part("b", &[2; 3]).unwrap();
    assert!(
        out.write_part("b", &[2; 2])
            .unwrap_err()
            .to_string()
            .contains("1 of 4 are left")
    );
    assert!(
        out.add_file("../x", b"")
            .unwrap_err()
            .to_string()
            .contains("not a file name")
    );
    let error = out.finish().unwrap_err().to_string();
    assert!(
        error.contains("1 planned tensors") && error.ends_with("completely: b"),
        "{error}"
    );
    assert_eq!(listing(root.path()), [""; 0]);

    let twice = vec![entry("a", &[1], DType::U8), entry("a", &[1], DType::U8)];
    assert!(
        ShardPlan::new(twice, 9)
            .unwrap_err()
            .to_string()
            .contains("`a` is planned twice")
    );
    assert!(ShardPlan::new(vec![], 0).is_err());
    let big = vec![entry("a", &[usize::MAX, 2], DType::U8)];
    assert!(
        ShardPlan::new(big, 9)
            .unwrap_err()
            .to_string()
            .contains("overflows")
    );
}

#[test]
fn dropping_a_writer_leaves_the_old_checkpoint_alone() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let write = |n: usize, seed: u8, max: u64, overwrite: bool, finish: bool| {
        let entries: Vec<_> = (0..n)
            .map(|i| entry(&format!("t{i}"), &[8], DType::U8))
            .collect();
        let plan = ShardPlan::new(entries, max).unwrap();
        let out = StreamWriter::create(folder, &plan, &BTreeMap::new(), overwrite)?;
        for e in plan.entries() {
            out.write(&e.name, &content(e, seed))?;
        }
        if finish { out.finish() } else { Ok(()) }
    };
    write(3, 1, 8, false, true).unwrap();
    let sharded = [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ];
    assert_eq!(listing(folder), sharded);
    let index = read_json(&folder.join("model.safetensors.index.json")).unwrap();
    assert_eq!(index["metadata"]["total_size"], 24);
    assert_eq!(
        index["weight_map"]["t1"],
        "model-00002-of-00003.safetensors"
    );

    let refused = write(1, 2, 8, false, true).unwrap_err().to_string();
    assert!(refused.contains("already holds a checkpoint"), "{refused}");
    write(1, 2, 8, true, false).unwrap();
    assert_eq!(listing(folder), sharded);
    let first = |c: &Checkpoint| c.bytes("t0").unwrap().to_vec();
    assert_eq!(
        first(&Checkpoint::open(folder).unwrap()),
        content(&entry("", &[8], DType::U8), 1)
    );

    // An open map outlives the file it maps; the old shards are gone.
    let old = Checkpoint::open(folder).unwrap();
    write(1, 2, 8, true, true).unwrap();
    assert_eq!(listing(folder), ["model.safetensors"]);
    assert_eq!(first(&old), content(&entry("", &[8], DType::U8), 1));
    assert_eq!(
        first(&Checkpoint::open(folder).unwrap()),
        content(&entry("", &[8], DType::U8), 2)
    );
    write(3, 3, 8, true, true).unwrap();
    assert_eq!(listing(folder), sharded);
}

#[test]
fn an_empty_checkpoint_is_a_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let plan = ShardPlan::new(vec![], 1).unwrap();
    StreamWriter::create(root.path(), &plan, &BTreeMap::new(), false)
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(Checkpoint::open(root.path()).unwrap().metas().len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any tensors, any shard size, any order and any split of the writes: the same bytes come back.
    #[test]
    fn shards_round_trip(
        shapes in prop::collection::vec(
            (prop::collection::vec(0usize..6, 0..4), prop::sample::select(vec![DType::F32, DType::BF16, DType::U8, DType::I64])),
            1..12,
        ),
        max in 1u64..400,
        order in any::<u64>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let entries: Vec<_> =
            shapes.iter().enumerate().map(|(i, (shape, dtype))| entry(&format!("t{i}"), shape, *dtype)).collect();
        let plan = ShardPlan::new(entries.clone(), max).unwrap();
        let out = StreamWriter::create(root.path(), &plan, &BTreeMap::new(), false).unwrap();
        let mut shuffled: Vec<_> = entries.iter().enumerate().collect();
        shuffled.sort_by_key(|(i, _)| (order >> (i % 60)) & 7);
        for (i, e) in shuffled {
            let bytes = content(e, i as u8);
            let at = cut.index(bytes.len() + 1);
            if at > 0 && at < bytes.len() {
                out.write_part(&e.name, &bytes[..at]).unwrap();
                out.write_part(&e.name, &bytes[at..]).unwrap();
            } else {
                out.write(&e.name, &bytes).unwrap();
            }
        }
        out.finish().unwrap();

        let checkpoint = Checkpoint::open(root.path()).unwrap();
        prop_assert_eq!(checkpoint.metas().len(), entries.len());
        prop_assert_eq!(checkpoint.files().count(), plan.file_names().len());
        for (i, e) in entries.iter().enumerate() {
            let meta = checkpoint.meta(&e.name).unwrap();
            prop_assert_eq!(&meta.shape, &e.shape);
            prop_assert_eq!(meta.format.dtype(), Some(e.dtype));
            prop_assert_eq!(checkpoint.bytes(&e.name).unwrap().to_vec(), content(e, i as u8));
        }
        let total: u64 = checkpoint.metas().values().map(|m| m.nbytes).sum();
        prop_assert_eq!(total, plan.total_size());
        for name in plan.file_names() {
            let bytes = std::fs::read(root.path().join(name)).unwrap();
            prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }
}

/// A real GGUF, where one is at hand: every tensor decodes to finite numbers.
#[test]
#[ignore = "needs a model: set PEFT_TEST_GGUF to the path of a .gguf file"]
fn a_real_gguf_opens_and_decodes() {
    let path = std::env::var("PEFT_TEST_GGUF").expect("PEFT_TEST_GGUF names a .gguf file");
    let file = Checkpoint::open(Path::new(&path)).unwrap();
    let gguf = file.gguf().unwrap();
    println!("version {} alignment {}", gguf.version, gguf.alignment);
    for (key, value) in &gguf.metadata {
        match value {
            MetaValue::Array(a) => {
                println!("{key}: {} x {}: {:?}..", a.len(), a.type_name(), a.get(0))
            }
            other => println!("{key}: {other:?}"),
        }
    }
    for (name, meta) in file.metas() {
        let (_, values) = file.f32(name).unwrap();
        peft_io::check_finite(name, &values).unwrap();
        let square = values
            .iter()
            .map(|v| f64::from(*v) * f64::from(*v))
            .sum::<f64>()
            / values.len() as f64;
        println!(
            "{name}: {} {:?} rms {:.4}",
            meta.format,
            meta.shape,
            square.sqrt()
        );
        file.bytes(name).unwrap().release();
    }
}
