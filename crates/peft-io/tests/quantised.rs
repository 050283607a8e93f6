//! bitsandbytes' checkpoints with something wrong in them: one clear error each.

use std::collections::BTreeMap;
use std::path::Path;

use peft_io::{Checkpoint, DType, PlanEntry, ShardPlan, StreamWriter};
use peft_tensor::bnb::{dynamic_map, table};
use peft_tensor::{FrozenWeight, WeightFormat, bnb};

type Parts = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

const STATE: &str = "w.quant_state.bitsandbytes__nf4";

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn put(parts: &mut Parts, name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) {
    parts.insert(name.to_owned(), (dtype, shape.to_vec(), data));
}

/// The parts of a doubly quantised 3 x 50 matrix, and what it decodes to.
fn nf4() -> (Parts, Vec<f32>) {
    let values: Vec<f32> = (0..150).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
    let weight = FrozenWeight::quantize(3, 50, &values, WeightFormat::NF4).unwrap();
    let (weight, nested) = bnb::double_quantized(&weight).unwrap();
    let (codes, _) = bnb::unpack(&weight).unwrap();
    let json = format!(
        r#"{{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 50], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {}}}"#,
        f64::from(nested.offset)
    );
    let mut parts = Parts::new();
    put(&mut parts, "w", DType::U8, &[75, 1], codes);
    put(&mut parts, "w.absmax", DType::U8, &[3], nested.codes);
    let map = table(WeightFormat::NF4).unwrap();
    put(&mut parts, "w.quant_map", DType::F32, &[16], bytes(map));
    put(
        &mut parts,
        "w.nested_absmax",
        DType::F32,
        &[1],
        bytes(&nested.scales),
    );
    put(
        &mut parts,
        "w.nested_quant_map",
        DType::F32,
        &[256],
        bytes(dynamic_map()),
    );
    put(
        &mut parts,
        STATE,
        DType::U8,
        &[json.len()],
        json.into_bytes(),
    );
    (parts, weight.to_f32())
}

fn write(folder: &Path, parts: &Parts) {
    let entry = |(name, (dtype, shape, _)): (&String, &(DType, Vec<usize>, Vec<u8>))| PlanEntry {
        name: name.clone(),
        shape: shape.clone(),
        dtype: *dtype,
    };
    let plan = ShardPlan::new(parts.iter().map(entry).collect(), 1 << 30).unwrap();
    let writer = StreamWriter::create(folder, &plan, &Default::default(), true).unwrap();
    for (name, (_, _, data)) in parts {
        writer.write(name, data).unwrap();
    }
    writer.finish().unwrap();
}

/// Opens the parts and reads `name`.
fn read(parts: &Parts, name: &str) -> peft_io::Result<Vec<f32>> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), parts);
    let checkpoint = Checkpoint::open(folder.path())?;
    Ok(checkpoint.weight(name)?.to_f32())
}

#[test]
fn parts_make_a_weight() {
    let (parts, want) = nf4();
    assert_eq!(read(&parts, "w").unwrap(), want);
}

#[test]
fn what_is_wrong_with_a_4_bit_weight_is_said() {
    let json = |from: &'static str, to: &'static str| {
        move |parts: &mut Parts| {
            let text = String::from_utf8(parts[STATE].2.clone()).unwrap();
            assert!(text.contains(from));
            let text = text.replace(from, to);
            put(parts, STATE, DType::U8, &[text.len()], text.into_bytes());
        }
    };
    let with = |name: &'static str, dtype: DType, values: Vec<f32>| {
        move |parts: &mut Parts| put(parts, name, dtype, &[values.len()], bytes(&values))
    };
    let without = |name: &'static str| {
        move |parts: &mut Parts| {
            parts.remove(name);
        }
    };
    let mut map = *table(WeightFormat::NF4).unwrap();
    map[3] += 0.01;
    let mut nan = *dynamic_map();
    nan[7] = f32::NAN;
    type Break = Box<dyn Fn(&mut Parts)>;
    let cases: Vec<(Break, &[&str])> = vec![
        (
            Box::new(json("bfloat16", "float8")),
            &["dtype", "float8", "float32, float16, bfloat16"],
        ),
        (Box::new(json("[3, 50]", "[3, 51]")), &["`w`", "3 x 51"]),
        (Box::new(json("[3, 50]", "[3, -50]")), &["shape"]),
        (
            Box::new(json("[3, 50]", "[4611686018427387904, 50]")),
            &["`w`", "too large"],
        ),
        (
            Box::new(json("\"blocksize\": 64", "\"blocksize\": 32")),
            &["blocks of 32"],
        ),
        (
            Box::new(json("\"blocksize\": 64", "\"blocksize\": 0")),
            &["blocksize", "above 0"],
        ),
        (
            Box::new(json("\"quant_type\": \"nf4\"", "\"quant_type\": \"fp4\"")),
            &["fp4", "nf4"],
        ),
        (
            Box::new(json("\"nested_offset\"", "\"nested_offset\": \"x\", \"y\"")),
            &["nested_offset"],
        ),
        (Box::new(json("{", "[")), &["not the JSON"]),
        (
            Box::new(with("w.quant_map", DType::F32, map.to_vec())),
            &["w.quant_map", "table of NF4"],
        ),
        (
            Box::new(with("w.quant_map", DType::F32, vec![0.0; 4])),
            &["w.quant_map", "table of NF4"],
        ),
        (
            Box::new(with("w.nested_absmax", DType::F32, vec![f32::NAN])),
            &["`w`", "scale 0 is NaN"],
        ),
        (
            Box::new(with("w.nested_absmax", DType::F32, vec![1.0; 2])),
            &["nested_absmax", "2 values"],
        ),
        (
            Box::new(with("w.nested_absmax", DType::I32, vec![1.0])),
            &["nested_absmax", "I32"],
        ),
        (
            Box::new(with("w.nested_quant_map", DType::F32, nan.to_vec())),
            &["nested_quant_map"],
        ),
        (
            Box::new(with("w.nested_quant_map", DType::F32, vec![0.0; 9])),
            &["256"],
        ),
        (
            Box::new(with("w.absmax", DType::F32, vec![1.0; 3])),
            &["w.absmax", "F32, not U8"],
        ),
        (Box::new(without("w.absmax")), &["w.absmax"]),
        (Box::new(without("w.quant_map")), &["w.quant_map"]),
        (Box::new(without("w")), &["there is no `w`"]),
    ];
    for (damage, says) in cases {
        let (mut parts, _) = nf4();
        damage(&mut parts);
        let text = read(&parts, "w").unwrap_err().to_string();
        assert!(says.iter().all(|s| text.contains(s)), "{says:?}: {text}");
    }
    let (mut parts, _) = nf4();
    let state = parts.remove(STATE).unwrap();
    parts.insert(STATE.replace("nf4", "af4"), state);
    let text = read(&parts, "w").unwrap_err().to_string();
    assert!(
        text.contains("af4") && text.contains("nf4 and fp4"),
        "{text}"
    );
}

#[test]
fn eight_bit_rows() {
    let mut parts = Parts::new();
    put(
        &mut parts,
        "m.weight",
        DType::I8,
        &[2, 2],
        vec![127, 0, 129, 64],
    );
    put(
        &mut parts,
        "m.SCB",
        DType::F32,
        &[2],
        bytes(&[127.0, 254.0]),
    );
    put(&mut parts, "m.weight_format", DType::U8, &[], vec![0]);
    // 127 * 127 / 127, 0; -127 * 254 / 127, 64 * 254 / 127; the factor is a rounded 1 / 127.
    let got = read(&parts, "m.weight").unwrap();
    for (got, want) in got.iter().zip([127.0, 0.0, -254.0, 128.0]) {
        assert!((got - want).abs() < 1e-4, "{got}");
    }
    let says = |parts: &Parts, what: &str| {
        let text = read(parts, "m.weight").unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    };
    let mut other = parts.clone();
    put(&mut other, "m.weight_format", DType::U8, &[], vec![2]);
    says(&other, "m.weight_format");
    let mut other = parts.clone();
    put(&mut other, "m.SCB", DType::F32, &[1], bytes(&[1.0]));
    says(&other, "there are 4 and 1");
    put(
        &mut other,
        "m.SCB",
        DType::F32,
        &[2],
        bytes(&[1.0, f32::INFINITY]),
    );
    says(&other, "scale 1 is inf");
    put(&mut other, "m.weight", DType::U8, &[2, 2], vec![0; 4]);
    says(&other, "stored as U8");
}
