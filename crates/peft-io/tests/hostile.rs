//! Damaged and hostile files: every one of them gives one clear error, never a panic, and never an
//! allocation in proportion to a number that the file merely states.

use std::path::{Path, PathBuf};

use peft_io::{Checkpoint, GgufBuilder, MetaArray, MetaValue, Result};
use peft_tensor::WeightFormat;
use proptest::prelude::*;

/// Opens bytes as a file of the given extension and reads every tensor of it.
fn read_all(bytes: &[u8], extension: &str) -> Result<usize> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("x.{extension}"));
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path)?;
    let mut values = 0;
    for name in checkpoint.names() {
        // A tensor of a valid file may still be of a kind that is not read.
        values += checkpoint.f32(name).map_or(0, |(_, v)| v.len());
    }
    Ok(values)
}

fn error_of(bytes: &[u8], extension: &str) -> String {
    read_all(bytes, extension)
        .expect_err("the file is damaged")
        .to_string()
}

/// A safetensors file with this header and `data` bytes of data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 7);
    out
}

fn valid_safetensors() -> Vec<u8> {
    safetensors(
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"i":{"dtype":"I64","shape":[1],"data_offsets":[32,40]}}"#,
        40,
    )
}

fn valid_gguf() -> Vec<u8> {
    GgufBuilder::new()
        .meta("general.architecture", MetaValue::String("llama".into()))
        .meta("llama.block_count", MetaValue::U32(2))
        .meta("flag", MetaValue::Bool(true))
        .meta(
            "tokens",
            MetaValue::Array(MetaArray::String(vec!["a".into(), "bé".into()])),
        )
        .meta(
            "nested",
            MetaValue::Array(MetaArray::Array(vec![MetaArray::I16(vec![1, -2])])),
        )
        .tensor("w", &[2, 32], WeightFormat::Q4_1, vec![3; 40])
        .tensor("v", &[5], WeightFormat::F32, vec![0; 20])
        .build()
        .unwrap()
}

#[test]
fn the_undamaged_files_are_read() {
    assert_eq!(
        read_all(&valid_safetensors(), "safetensors").unwrap(),
        6 + 4
    );
    assert_eq!(read_all(&valid_gguf(), "gguf").unwrap(), 64 + 5);
}

#[test]
fn every_truncation_is_an_error() {
    for (bytes, extension) in [(valid_safetensors(), "safetensors"), (valid_gguf(), "gguf")] {
        for len in 0..bytes.len() {
            let error = error_of(&bytes[..len], extension);
            assert!(error.contains(&format!("x.{extension}")), "{len}: {error}");
        }
    }
}

#[test]
fn trailing_bytes_of_safetensors_are_an_error() {
    let mut bytes = valid_safetensors();
    bytes.push(0);
    let error = error_of(&bytes, "safetensors");
    assert!(
        error.contains("describes 40 bytes of data, the file holds 41"),
        "{error}"
    );
}

#[test]
fn hostile_safetensors_headers_name_the_tensor() {
    let one = |info: &str| format!(r#"{{"evil":{{{info}}}}}"#);
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"evil":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    let cases = [
        (
            one(r#""dtype":"U8","shape":[4],"data_offsets":[0,4]"#),
            3,
            "past the 3 bytes",
        ),
        (
            one(r#""dtype":"U8","shape":[4],"data_offsets":[4,0]"#),
            4,
            "backwards",
        ),
        (
            one(r#""dtype":"U8","shape":[5],"data_offsets":[0,4]"#),
            4,
            "takes 5 bytes",
        ),
        (
            one(r#""dtype":"F32","shape":[4],"data_offsets":[0,4]"#),
            4,
            "takes 16 bytes",
        ),
        (
            one(r#""dtype":"F4","shape":[3],"data_offsets":[0,2]"#),
            2,
            "overflows",
        ),
        (
            one(r#""dtype":"F99","shape":[4],"data_offsets":[0,4]"#),
            4,
            "F99",
        ),
        (
            one(r#""dtype":"U8","shape":[-4],"data_offsets":[0,4]"#),
            4,
            "-4",
        ),
        (
            one(r#""dtype":"U8","shape":[1e3],"data_offsets":[0,4]"#),
            4,
            "float",
        ),
        (one(r#""dtype":"U8","data_offsets":[0,4]"#), 4, "shape"),
        (
            one(r#""dtype":"U8","shape":[4294967296,4294967296,2],"data_offsets":[0,4]"#),
            4,
            "overflows",
        ),
        (
            one(
                r#""dtype":"U8","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]"#,
            ),
            4,
            "past",
        ),
        (two("[0,4]", "[2,6]"), 6, "overlap"),
        (two("[0,4]", "[6,10]"), 10, "unused"),
        (two("[0,4]", "[0,4]"), 4, "overlap"),
    ];
    for (header, data, want) in cases {
        let error = error_of(&safetensors(&header, data), "safetensors");
        assert!(
            error.contains(want) && error.contains("`evil`"),
            "{header}\n{error}"
        );
    }
}

#[test]
fn hostile_safetensors_frames() {
    let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let nested = "[".repeat(100_000);
    let frames = [
        (u64::MAX.to_le_bytes().to_vec(), "limit 100000000"),
        (100_000_001u64.to_le_bytes().to_vec(), "limit 100000000"),
        (99_999_999u64.to_le_bytes().to_vec(), "truncated"),
        (safetensors("", 0), "bad safetensors header"),
        (safetensors("[]", 0), "bad safetensors header"),
        (safetensors("{} x", 0), "trailing"),
        (
            safetensors(&format!(r#"{{"a":{entry},"a":{entry}}}"#), 1),
            "`a` is named twice",
        ),
        (
            safetensors(r#"{"__metadata__":{"format":1}}"#, 0),
            "__metadata__",
        ),
        (safetensors(&format!(r#"{{"a":{nested}"#), 0), "`a`"),
        (
            safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
            "twice",
        ),
        (
            {
                let mut bytes = safetensors("{}", 0);
                bytes[8] = 0xff;
                bytes
            },
            "UTF-8",
        ),
    ];
    for (bytes, want) in frames {
        let error = error_of(&bytes, "safetensors");
        assert!(error.contains(want), "wanted {want}: {error}");
    }
    // Null metadata and a file without tensors are legal.
    assert_eq!(
        read_all(&safetensors(r#"{"__metadata__":null}"#, 0), "safetensors").unwrap(),
        0
    );
}

/// Raw GGUF bytes, for what the builder would not write.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn head(version: u32, tensors: u64, pairs: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(pairs)
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn str(self, s: &str) -> Self {
        let mut this = self.u64(s.len() as u64);
        this.0.extend(s.as_bytes());
        this
    }
    /// A tensor description; `dims` innermost first, as stored.
    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut this = self.str(name).u32(dims.len() as u32);
        for &d in dims {
            this = this.u64(d);
        }
        this.u32(kind).u64(offset)
    }
    /// Pads to `align` and adds data.
    fn data(mut self, align: usize, bytes: usize) -> Self {
        self.0
            .resize(self.0.len().next_multiple_of(align) + bytes, 0);
        self
    }
}

#[test]
fn hostile_gguf_files() {
    let huge = [u64::MAX, u64::MAX / 8, 1 << 40, 1 << 28];
    let mut cases = vec![
        (Raw(b"GGML".to_vec()).u32(3).u64(0).u64(0), "not a GGUF"),
        (Raw::head(1, 0, 0), "version 1"),
        (Raw::head(4, 0, 0), "version 4"),
        (Raw::head(3u32.swap_bytes(), 0, 0), "big-endian"),
        (
            Raw::head(3, 0, 1).str("k").u32(13).u64(0),
            "`k`: has unknown type number 13",
        ),
        (
            Raw::head(3, 0, 1).str("k").u32(9).u32(99).u64(0),
            "`k`: is an array of unknown type number 99",
        ),
        (Raw::head(3, 0, 1).str("k").u32(7).u64(2), "boolean"),
        (
            Raw::head(3, 0, 2)
                .str("k")
                .u32(4)
                .u32(1)
                .str("k")
                .u32(4)
                .u32(1),
            "`k`: is set twice",
        ),
        (
            Raw::head(3, 0, 1).str(&"k".repeat(65_536)).u32(4).u32(1),
            "limit 65535",
        ),
        (
            Raw::head(3, 0, 1).str("general.alignment").u32(4).u32(0),
            "power of two",
        ),
        (
            Raw::head(3, 0, 1).str("general.alignment").u32(4).u32(48),
            "power of two",
        ),
        (
            Raw::head(3, 0, 1)
                .str("general.alignment")
                .u32(10)
                .u64(1 << 63),
            "power of two",
        ),
        (
            Raw::head(3, 0, 1).str("general.alignment").u32(8).str("32"),
            "power of two",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[4, 1, 1, 1, 1], 0, 0),
            "`w`: has 5 dimensions",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[4], 77, 0),
            "`w`: unknown ggml type number 77",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[33], 2, 0),
            "`w`: rows of 33 values",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[32, 1 << 32, 1 << 32], 2, 0),
            "`w`: shape",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[u64::MAX / 32 * 32], 2, 0),
            "bytes at offset 0 reach past",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[u64::MAX], 0, 0),
            "`w`: shape",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[4], 0, 8).data(32, 64),
            "`w`: offset 8 is not aligned",
        ),
        (
            Raw::head(3, 1, 0)
                .tensor("w", &[4], 0, u64::MAX - 31)
                .data(32, 64),
            "`w`: 16 bytes at offset",
        ),
        (
            Raw::head(3, 1, 0).tensor("w", &[4], 0, 64).data(32, 64),
            "`w`: 16 bytes at offset 64",
        ),
        (
            Raw::head(3, 2, 0)
                .tensor("w", &[4], 0, 0)
                .tensor("w", &[4], 0, 32)
                .data(32, 64),
            "`w`: is described twice",
        ),
        (
            Raw::head(3, 2, 0)
                .tensor("v", &[9], 0, 0)
                .tensor("w", &[4], 0, 32)
                .data(32, 64),
            "`w`: offset 32 overlaps",
        ),
        (
            Raw::head(3, 2, 0)
                .tensor("v", &[4], 0, 0)
                .tensor("w", &[4], 0, 0)
                .data(32, 64),
            "`w`: offset 0 overlaps",
        ),
    ];
    for n in huge {
        cases.push((Raw::head(3, n, 0), "the tensor count"));
        cases.push((Raw::head(3, 0, n), "the metadata count"));
        cases.push((Raw::head(3, 0, 1).u64(n).u64(0), "a metadata key"));
        cases.push((
            Raw::head(3, 0, 1).str("k").u32(8).u64(n),
            "the value of `k`",
        ));
        for element in 0..=12 {
            cases.push((
                Raw::head(3, 0, 1).str("k").u32(9).u32(element).u64(n),
                "the value of `k`",
            ));
        }
        cases.push((Raw::head(3, 1, 0).u64(n).u64(0).u64(0), "a tensor name"));
    }
    let mut deep = Raw::head(3, 0, 1).str("k").u32(9);
    for _ in 0..10_000 {
        deep = deep.u32(9).u64(1);
    }
    cases.push((deep, "`k`: nests arrays"));
    let mut text = Raw::head(3, 0, 1).str("k").u32(8).str("ab");
    *text.0.last_mut().unwrap() = 0xff;
    cases.push((text, "the value of `k` is not UTF-8"));

    for (raw, want) in cases {
        let error = error_of(&raw.0, "gguf");
        let shown: String = error.chars().take(400).collect();
        assert!(error.contains(want), "wanted {want}: {shown}");
        assert!(error.len() < 2_000, "a message of {} bytes", error.len());
    }
}

#[test]
fn a_gguf_of_unknown_blocks_can_be_listed_but_not_decoded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(
        &path,
        Raw::head(2, 1, 0)
            .tensor("w", &[32, 2], 20, 0)
            .data(32, 36)
            .0,
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let meta = checkpoint.meta("w").unwrap();
    assert_eq!((meta.shape.as_slice(), meta.nbytes), (&[2, 32][..], 36));
    assert_eq!(meta.format.to_string(), "IQ4_NL");
    let error = checkpoint.weight("w").unwrap_err().to_string();
    assert!(
        error.contains("IQ4_NL") && error.contains("Q4_1"),
        "{error}"
    );
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn folders_that_are_no_checkpoint_say_what_to_do() {
    let cases: [(&str, &str); 6] = [
        ("pytorch_model.bin", "save_pretrained"),
        ("m.gguf", "give its path"),
        ("consolidated.safetensors", "give its path"),
        ("adapter_model.safetensors", "holds an adapter"),
        ("notes.txt", "no checkpoint"),
        ("tf_model.h5", "no checkpoint"),
    ];
    for (name, want) in cases {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), name, "x");
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(want), "{name}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let pickle = write(folder.path(), "model.pt", "x");
    assert!(
        Checkpoint::open(&pickle)
            .unwrap_err()
            .to_string()
            .contains("pickle")
    );
    let lfs = write(
        folder.path(),
        "l.safetensors",
        "version https://git-lfs.github.com/spec/v1\n",
    );
    assert!(
        Checkpoint::open(&lfs)
            .unwrap_err()
            .to_string()
            .contains("git lfs pull")
    );
    let gone = Checkpoint::open(&folder.path().join("gone"))
        .unwrap_err()
        .to_string();
    assert!(gone.contains("gone"), "{gone}");
}

#[test]
fn hostile_shard_indexes() {
    let shard = |name: &str| {
        safetensors(
            &format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#),
            1,
        )
    };
    let open = |index: &str| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "s1.safetensors", shard("a"));
        write(folder.path(), "s2.safetensors", shard("b"));
        write(folder.path(), "model.safetensors.index.json", index);
        Checkpoint::open(folder.path()).map(|c| c.names().map(str::to_owned).collect::<Vec<_>>())
    };
    let good = r#"{"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}}"#;
    assert_eq!(open(good).unwrap(), ["a", "b"]);
    // An unlisted tensor stays out.
    assert_eq!(
        open(r#"{"weight_map":{"b":"s2.safetensors"}}"#).unwrap(),
        ["b"]
    );
    let cases = [
        (
            r#"{"weight_map":{"a":"s1.safetensors","b":"x.safetensors","c":"y.safetensors"}}"#,
            "2 of 3 shards are missing: x.safetensors, y.safetensors",
        ),
        (
            r#"{"weight_map":{"a":"s2.safetensors","b":"s2.safetensors"}}"#,
            "`a` (in s2.safetensors)",
        ),
        (
            r#"{"weight_map":{"a":"../s1.safetensors"}}"#,
            "not a file beside",
        ),
        (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "not a file beside"),
        (
            r#"{"weight_map":{"a":"sub/s1.safetensors"}}"#,
            "not a file beside",
        ),
        (
            r#"{"weight_map":{"a":"sub\\s1.safetensors"}}"#,
            "not a file beside",
        ),
        (r#"{"weight_map":{"a":".."}}"#, "not a file beside"),
        (r#"{"weight_map":{"a":""}}"#, "not a file beside"),
        (r#"{"weight_map":{"a":7}}"#, "weight_map.a"),
        (r#"{"weight_map":[]}"#, "weight_map"),
        (r#"{"metadata":{}}"#, "weight_map"),
        ("{", "JSON"),
    ];
    for (index, want) in cases {
        let error = open(index).unwrap_err().to_string();
        assert!(error.contains(want), "{index}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever the damage, the answer is a result.
    #[test]
    fn flipped_bits_and_cuts_never_panic(
        gguf: bool,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (mut bytes, extension) =
            if gguf { (valid_gguf(), "gguf") } else { (valid_safetensors(), "safetensors") };
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        let _ = read_all(&bytes, extension);
    }

    /// Eight bytes anywhere replaced by an extreme number: lengths, counts, offsets, dimensions.
    #[test]
    fn extreme_numbers_never_panic(
        at: prop::sample::Index,
        number in prop::sample::select(vec![0, 1, u64::MAX, u64::MAX / 2, 1 << 62, 1 << 48, 1 << 32, 1 << 31]),
    ) {
        let mut bytes = valid_gguf();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        let _ = read_all(&bytes, "gguf");
    }
}
