//! Tensors in memory, by name, and one safetensors file of them.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use crate::stage::{Stage, parent};
use crate::{Checkpoint, Error, Result, header};

/// Shape and row-major values of each tensor, by name.
pub type NamedTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Checks that every value is a number.
///
/// # Errors
/// [`Error::NonFinite`] with the tensor's name and the index of the first NaN or infinity.
pub fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    if peft_tensor::all_finite(values) {
        return Ok(());
    }
    match values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((index, &value)) => Err(Error::NonFinite {
            name: name.to_owned(),
            index,
            value,
        }),
        None => Ok(()),
    }
}

/// Every tensor of a safetensors file in f32.
///
/// # Errors
/// As [`Checkpoint::open`] and [`Checkpoint::f32`].
pub fn read_tensors(path: &Path) -> Result<NamedTensors> {
    let file = Checkpoint::open(path)?;
    file.names()
        .map(|name| Ok((name.to_owned(), file.f32(name)?)))
        .collect()
}

/// Writes tensors in f32 to one safetensors file, atomically.
///
/// # Errors
/// When a shape disagrees with its values or the file cannot be written.
pub fn write_tensors(
    path: &Path,
    tensors: &NamedTensors,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return Err(Error::Usage(format!(
            "{}: not the path of a file",
            path.display()
        )));
    };
    let mut stage = Stage::new(parent(path))?;
    stage_tensors(&mut stage, name, tensors, &[], metadata)?;
    stage.commit()
}

/// As [`write_tensors`], as one of several files that are put in place together; `integers` names those whose values
/// are whole numbers, which are written as I32.
pub(crate) fn stage_tensors(
    stage: &mut Stage,
    name: &str,
    tensors: &NamedTensors,
    integers: &[String],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    use std::io::Write as _;
    let path = stage.target(name);
    let mut plan = Vec::with_capacity(tensors.len());
    for (key, (shape, values)) in tensors {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if elements != Some(values.len()) {
            return Err(Error::tensor(
                &path,
                key,
                format!(
                    "shape {shape:?} does not hold the {} values given",
                    values.len()
                ),
            ));
        }
        let dtype = if integers.contains(key) {
            if let Some(bad) = values.iter().find(|v| !is_whole(**v)) {
                let detail = format!("{bad} is no whole number of at most 2^24");
                return Err(Error::tensor(&path, key, detail));
            }
            Dtype::I32
        } else {
            Dtype::F32
        };
        plan.push((key.clone(), dtype, shape.clone()));
    }
    let (head, _) = header::build(&path, &plan, metadata)?;
    let temp = stage.temp(name)?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, temp);
    let written = out.write_all(&head).and_then(|()| {
        tensors.iter().try_for_each(|(key, (_, values))| {
            if !integers.contains(key) {
                return write_le(&mut out, values);
            }
            values
                .iter()
                .try_for_each(|v| out.write_all(&(*v as i32).to_le_bytes()))
        })
    });
    written.map_err(|e| Error::io("write", &path, e))?;
    let temp = out
        .into_inner()
        .map_err(|e| Error::io("write", &path, e.into_error()))?;
    stage.push(name, temp)
}

/// Whether f32 holds this whole number exactly, its neighbours too.
fn is_whole(value: f32) -> bool {
    value.fract() == 0.0 && value.abs() <= 16_777_216.0
}

fn write_le(out: &mut impl std::io::Write, values: &[f32]) -> std::io::Result<()> {
    if cfg!(target_endian = "little") {
        out.write_all(bytemuck::cast_slice(values))
    } else {
        values
            .iter()
            .try_for_each(|v| out.write_all(&v.to_le_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_value_is_found_wherever_it_is() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (len, at) in [(1, 0), (4096, 4095), (10_000, 4096), (10_000, 9_999)] {
                let mut values = vec![f32::MAX; len];
                check_finite("w", &values).unwrap();
                values[at] = bad;
                *values.last_mut().unwrap() = bad;
                let error = check_finite("w", &values).unwrap_err();
                let Error::NonFinite { name, index, .. } = &error else {
                    panic!("{error}")
                };
                assert_eq!((name.as_str(), *index), ("w", at));
            }
        }
    }

    #[test]
    fn a_shape_that_lies_is_refused_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("new/t.safetensors");
        let tensors = BTreeMap::from([("w".to_owned(), (vec![2, 3], vec![0.0; 5]))]);
        let error = write_tensors(&path, &tensors, &BTreeMap::new())
            .unwrap_err()
            .to_string();
        assert!(error.contains("`w`") && error.contains("[2, 3]"), "{error}");
        assert!(!root.path().join("new").exists());
    }
}
