//! Stored integers, booleans and f64 as f32.

use safetensors::Dtype;

/// Values of `bytes` in f32, or what is in the way.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    match dtype {
        Dtype::BOOL => each(bytes, |[b]| match b {
            0 => Ok(0.0),
            1 => Ok(1.0),
            other => Err(format!("the byte {other} is not a boolean")),
        }),
        Dtype::U8 => each(bytes, |[b]| Ok(f32::from(b))),
        Dtype::I8 => each(bytes, |b| Ok(f32::from(i8::from_le_bytes(b)))),
        Dtype::I16 => each(bytes, |b| Ok(f32::from(i16::from_le_bytes(b)))),
        Dtype::U16 => each(bytes, |b| Ok(f32::from(u16::from_le_bytes(b)))),
        Dtype::I32 => each(bytes, |b| exact(i32::from_le_bytes(b).into())),
        Dtype::U32 => each(bytes, |b| exact(u32::from_le_bytes(b).into())),
        Dtype::I64 => each(bytes, |b| exact(i64::from_le_bytes(b).into())),
        Dtype::U64 => each(bytes, |b| exact(u64::from_le_bytes(b).into())),
        Dtype::F64 => each(bytes, |b| {
            let wide = f64::from_le_bytes(b);
            let value = wide as f32;
            if value.is_infinite() && wide.is_finite() {
                return Err(format!("{wide} is beyond the range of f32"));
            }
            Ok(value)
        }),
        other => Err(format!("is stored as {other}, which is not read")),
    }
}

fn each<const N: usize>(
    bytes: &[u8],
    read: impl Fn([u8; N]) -> Result<f32, String>,
) -> Result<Vec<f32>, String> {
    bytes
        .as_chunks::<N>()
        .0
        .iter()
        .map(|&chunk| read(chunk))
        .collect()
}

fn exact(integer: i128) -> Result<f32, String> {
    let value = integer as f32;
    if value as i128 == integer {
        Ok(value)
    } else {
        Err(format!("{integer} cannot be held in f32"))
    }
}
