//! The formats of bitsandbytes: NF4 and FP4 with their doubly quantised scales, and LLM.int8's rows.
//!
//! A 4-bit matrix is one run of values cut into blocks of 64, row after row: a block may end in the next row, and the
//! last one may be part filled. Each block has a scale, its largest magnitude; a value is a number of a table of 16
//! times the scale. Source: bitsandbytes 0.50.2, `functional.py`, `backends/default/ops.py` and `backends/cpu/ops.py`
//! (MIT); NF4: arXiv 2305.14314, section 3; LLM.int8: arXiv 2208.07339.

mod decode;
mod four;
mod int8;
mod nested;

use super::FrozenWeight;
use crate::error::{Result, TensorError};
use crate::{Bytes, WeightFormat};

pub(super) use four::{Fp4, Nf4};
pub(super) use int8::Int8;
pub(crate) use int8::{INT8_HEAD, int8_step};
pub use nested::{Nested, dynamic_map};

/// Values that share a scale.
pub const BLOCK: usize = 64;

/// Bytes of a block in memory: the scale, then the packed values.
const BYTES: usize = 4 + BLOCK / 2;

/// The numbers that the 16 codes of a 4-bit format stand for; None for other formats.
pub fn table(format: WeightFormat) -> Option<&'static [f32; 16]> {
    match format {
        WeightFormat::NF4 => Some(&four::NF4),
        WeightFormat::FP4 => Some(&four::FP4),
        _ => None,
    }
}

/// A 4-bit matrix from its parts as bitsandbytes stores them: two codes a byte, the first in the high half, and one
/// scale for each `blocksize` values.
///
/// # Errors
/// If the format is not a 4-bit one, the block size is not a multiple of [`BLOCK`], the parts are not of the matrix's
/// size, or a scale is negative or not finite.
pub fn pack(
    format: WeightFormat,
    rows: usize,
    cols: usize,
    codes: &[u8],
    scales: &[f32],
    blocksize: usize,
) -> Result<FrozenWeight> {
    let fail = |detail: String| Err(TensorError::Format(detail));
    if table(format).is_none() {
        return fail(format!("{} is not a 4-bit format", format.name()));
    }
    if blocksize == 0 || !blocksize.is_multiple_of(BLOCK) {
        return fail(format!(
            "blocks of {blocksize} values; multiples of {BLOCK} are read"
        ));
    }
    let Some(n) = rows.checked_mul(cols) else {
        return fail(format!("a {rows} x {cols} matrix is too large"));
    };
    let (bytes, blocks) = (n.div_ceil(2), n.div_ceil(blocksize));
    if codes.len() != bytes || scales.len() != blocks {
        return fail(format!(
            "a {rows} x {cols} matrix takes {bytes} bytes of codes and {blocks} scales, there are {} and {}",
            codes.len(),
            scales.len()
        ));
    }
    if let Some(at) = scales.iter().position(|s| !s.is_finite()) {
        return fail(format!("scale {at} is {}", scales[at]));
    }
    let mut out = Vec::with_capacity(n.div_ceil(BLOCK) * BYTES);
    for (i, codes) in codes.chunks(BLOCK / 2).enumerate() {
        out.extend(scales[i / (blocksize / BLOCK)].to_le_bytes());
        out.extend(codes);
        out.resize((i + 1) * BYTES, four::zero_byte(format));
    }
    FrozenWeight::new(rows, cols, format, Bytes::from_vec(out))
}

/// The parts of a 4-bit matrix as bitsandbytes stores them: codes and one scale for each [`BLOCK`] values.
///
/// # Errors
/// If the matrix is in another format.
pub fn unpack(weight: &FrozenWeight) -> Result<(Vec<u8>, Vec<f32>)> {
    four_bit(weight)?;
    let n = weight.rows() * weight.cols();
    let blocks = weight.bytes().as_chunks::<BYTES>().0;
    let mut codes = Vec::with_capacity(blocks.len() * BLOCK / 2);
    codes.extend(blocks.iter().flat_map(|b| &b[4..]));
    codes.truncate(n.div_ceil(2));
    Ok((codes, blocks.iter().map(scale).collect()))
}

/// The matrix with its scales as they come back from 8 bits, and their parts: bitsandbytes' double quantisation.
///
/// # Errors
/// If the matrix is not in a 4-bit format.
pub fn double_quantized(weight: &FrozenWeight) -> Result<(FrozenWeight, Nested)> {
    four_bit(weight)?;
    let mut bytes = weight.bytes().to_vec();
    let scales: Vec<f32> = bytes.as_chunks::<BYTES>().0.iter().map(scale).collect();
    let nested = Nested::quantize(&scales);
    for (block, scale) in bytes
        .as_chunks_mut::<BYTES>()
        .0
        .iter_mut()
        .zip(nested.decode())
    {
        block[..4].copy_from_slice(&scale.to_le_bytes());
    }
    let (rows, cols) = (weight.rows(), weight.cols());
    let again = FrozenWeight::new(rows, cols, weight.format(), Bytes::from_vec(bytes))?;
    Ok((again, nested))
}

/// An INT8 matrix from its parts: `rows * cols` signed bytes and the largest magnitude of each row.
///
/// # Errors
/// If the parts are not of the matrix's size, or a scale is not finite.
pub fn pack_int8(rows: usize, cols: usize, codes: &[u8], scales: &[f32]) -> Result<FrozenWeight> {
    let fits = rows.checked_mul(cols) == Some(codes.len()) && scales.len() == rows;
    if !fits {
        return Err(TensorError::Format(format!(
            "a {rows} x {cols} matrix in INT8 takes a byte a value and {rows} scales, there are {} and {}",
            codes.len(),
            scales.len()
        )));
    }
    if let Some(at) = scales.iter().position(|s| !s.is_finite()) {
        return Err(TensorError::Format(format!("scale {at} is {}", scales[at])));
    }
    let mut out = Vec::with_capacity(codes.len() + 4 * rows);
    for (i, scale) in scales.iter().enumerate() {
        out.extend(scale.to_le_bytes());
        out.extend(&codes[i * cols..(i + 1) * cols]);
    }
    FrozenWeight::new(rows, cols, WeightFormat::INT8, Bytes::from_vec(out))
}

/// The parts of an INT8 matrix: signed bytes and the scale of each row.
///
/// # Errors
/// If the matrix is in another format.
pub fn unpack_int8(weight: &FrozenWeight) -> Result<(Vec<u8>, Vec<f32>)> {
    if weight.format() != WeightFormat::INT8 {
        return Err(not(weight, "INT8"));
    }
    let mut codes = Vec::with_capacity(weight.rows() * weight.cols());
    let mut scales = Vec::with_capacity(weight.rows());
    for row in weight.bytes().chunks(4 + weight.cols()) {
        if let Some((scale, row)) = row.split_first_chunk::<4>() {
            scales.push(f32::from_le_bytes(*scale));
            codes.extend(row);
        }
    }
    Ok((codes, scales))
}

fn scale(block: &[u8; BYTES]) -> f32 {
    f32::from_le_bytes([block[0], block[1], block[2], block[3]])
}

fn four_bit(weight: &FrozenWeight) -> Result<()> {
    match table(weight.format()) {
        Some(_) => Ok(()),
        None => Err(not(weight, "NF4 or FP4")),
    }
}

fn not(weight: &FrozenWeight, wanted: &str) -> TensorError {
    let name = weight.format().name();
    TensorError::Format(format!("a matrix in {name}, {wanted} is needed"))
}

#[cfg(test)]
mod tests;
