//! [`FrozenWeight`]: a matrix of blocks over shared bytes.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::{Layout, WeightFormat, decode};
use crate::error::{Result, TensorError};
use crate::{Buffer, Bytes};

/// Values that one task of [`FrozenWeight::to_f32`] decodes, about.
const CHUNK: usize = 1 << 16;

/// A frozen matrix `[rows, cols]`, row-major, each row a whole number of blocks; in NF4 and FP4 a block may also go on in
/// the next row. A parameter of one dimension has one row.
#[derive(Clone)]
pub struct FrozenWeight {
    rows: usize,
    cols: usize,
    /// Bytes of a row; None where rows do not begin at a block.
    row_bytes: Option<usize>,
    format: WeightFormat,
    bytes: Bytes,
    /// Copies on devices of their own memory, shared by the clones.
    resident: Arc<Mutex<Vec<(u64, Buffer)>>>,
}

impl FrozenWeight {
    /// A matrix over stored bytes.
    ///
    /// # Errors
    /// Where a row is not whole blocks, or the bytes are not exactly those of the matrix.
    pub fn new(rows: usize, cols: usize, format: WeightFormat, bytes: Bytes) -> Result<Self> {
        let row_bytes = match format.layout() {
            Layout::Flat => format.row_bytes(cols).ok(),
            Layout::Rows | Layout::Headed(_) => Some(format.row_bytes(cols)?),
        };
        // The decoded matrix must be addressable too, or a hostile header would overflow a later product.
        let fits = rows
            .checked_mul(cols)
            .is_some_and(|n| n <= isize::MAX as usize / size_of::<f32>());
        match format.matrix_bytes(rows, cols) {
            Ok(want) if fits && want == bytes.len() => Ok(FrozenWeight {
                rows,
                cols,
                row_bytes,
                format,
                bytes,
                resident: Arc::default(),
            }),
            Ok(want) if fits => Err(TensorError::Format(format!(
                "a {rows} x {cols} matrix in {} takes {want} bytes, there are {}",
                format.name(),
                bytes.len()
            ))),
            _ => Err(TensorError::Format(format!(
                "a {rows} x {cols} matrix is too large"
            ))),
        }
    }

    /// A matrix of these values, row-major, in any format that can be written; on all threads.
    ///
    /// # Errors
    /// Where the number of values is not `rows * cols`, one is not finite, a row is not whole blocks or the format can
    /// only be read.
    pub fn quantize(
        rows: usize,
        cols: usize,
        values: &[f32],
        format: WeightFormat,
    ) -> Result<Self> {
        if rows.checked_mul(cols) != Some(values.len()) {
            return Err(TensorError::Format(format!(
                "{} values for a {rows} x {cols} matrix",
                values.len()
            )));
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(TensorError::Format(format!(
                "{} at row {}, column {}: only numbers can be quantised",
                values[at],
                at / cols,
                at % cols
            )));
        }
        // What is encoded at a time is whole rows and whole blocks, so that the pieces are those of the whole.
        let step = match format.layout() {
            Layout::Flat => CHUNK.next_multiple_of(format.block_len()),
            Layout::Rows | Layout::Headed(_) => (CHUNK / cols.max(1)).max(1) * cols.max(1),
        };
        let width = |piece: &[f32]| match format.layout() {
            Layout::Flat => piece.len(),
            Layout::Rows | Layout::Headed(_) => cols,
        };
        let pieces: Result<Vec<Vec<u8>>> = values
            .par_chunks(step)
            .map(|piece| super::encode(format, piece, width(piece)))
            .collect();
        Self::new(rows, cols, format, Bytes::from_vec(pieces?.concat()))
    }

    /// A matrix of floats, row-major.
    ///
    /// # Errors
    /// Where the number of values is not `rows * cols`.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Result<Self> {
        if cfg!(target_endian = "little") {
            Self::new(rows, cols, WeightFormat::F32, Bytes::from_f32(values))
        } else {
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            Self::new(rows, cols, WeightFormat::F32, Bytes::from_vec(bytes))
        }
    }

    /// Number of rows (output features of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (input features of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the values are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The stored bytes, rows one after another.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Bytes of a row; None where rows do not begin at a block (NF4 with a number of columns that 64 does not divide).
    pub fn row_bytes(&self) -> Option<usize> {
        self.row_bytes
    }

    /// Size of the stored bytes.
    pub fn nbytes(&self) -> usize {
        self.bytes.len()
    }

    /// The copy of this weight that a device keeps in its own memory, made at the first call; it goes when the last clone of
    /// the weight does. `device` is a number of the device's own.
    ///
    /// # Errors
    /// Whatever `make` returns.
    pub fn resident(&self, device: u64, make: impl FnOnce() -> Result<Buffer>) -> Result<Buffer> {
        let mut copies = self.resident.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, copy)) = copies.iter().find(|(id, _)| *id == device) {
            return Ok(copy.clone());
        }
        let copy = make()?;
        copies.push((device, copy.clone()));
        Ok(copy)
    }

    /// The values without a copy, where they are stored as aligned F32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if self.format != WeightFormat::F32 || cfg!(target_endian = "big") {
            return None;
        }
        bytemuck::try_cast_slice(&self.bytes).ok()
    }

    /// Decodes rows `r` into `out`, row-major, on the calling thread.
    ///
    /// # Panics
    /// Where `r` is not inside the matrix or `out` has not `r.len() * cols` values.
    pub fn decode_rows(&self, r: Range<usize>, out: &mut [f32]) {
        assert!(
            r.start <= r.end && r.end <= self.rows && out.len() == r.len() * self.cols,
            "decode_rows: rows {r:?} of a {} x {} matrix into {} values",
            self.rows,
            self.cols,
            out.len()
        );
        if let Some(all) = self.as_f32() {
            out.copy_from_slice(&all[r.start * self.cols..r.end * self.cols]);
            return;
        }
        match (self.row_bytes, self.format.layout()) {
            (Some(row), Layout::Headed(_)) => {
                let rows = self.bytes[r.start * row..r.end * row].chunks(row.max(1));
                for (src, out) in rows.zip(out.chunks_mut(self.cols.max(1))) {
                    decode(self.format, src, out);
                }
            }
            (Some(row), _) => decode(self.format, &self.bytes[r.start * row..r.end * row], out),
            (None, _) => self.decode_values(r.start * self.cols, out),
        }
    }

    /// Decodes the values from `first` on of a matrix whose blocks run through it.
    fn decode_values(&self, first: usize, out: &mut [f32]) {
        let (len, bytes) = (self.format.block_len(), self.format.block_bytes());
        let block = |i: usize| &self.bytes[i * bytes..(i + 1) * bytes];
        let mut one = vec![0.0; len];
        let mut at = first;
        let mut rest = out;
        while !rest.is_empty() {
            let (skip, whole) = (at % len, rest.len() / len);
            let (here, after) = if skip == 0 && whole > 0 {
                let (here, after) = rest.split_at_mut(whole * len);
                let i = at / len;
                decode(
                    self.format,
                    &self.bytes[i * bytes..(i + whole) * bytes],
                    here,
                );
                (whole * len, after)
            } else {
                let count = (len - skip).min(rest.len());
                let (here, after) = rest.split_at_mut(count);
                decode(self.format, block(at / len), &mut one);
                here.copy_from_slice(&one[skip..skip + count]);
                (count, after)
            };
            at += here;
            rest = after;
        }
    }

    /// All values, row-major, decoded on all threads.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        if out.is_empty() {
            return out;
        }
        let rows = (CHUNK / self.cols).max(1);
        out.par_chunks_mut(rows * self.cols)
            .enumerate()
            .for_each(|(i, chunk)| {
                let first = i * rows;
                self.decode_rows(first..first + chunk.len() / self.cols, chunk);
            });
        out
    }

    /// The matrix whose row `i` is row `order[i]` of this one, made from the stored blocks (GGUF stores
    /// Llama's query and key rows in another order than Hugging Face does).
    ///
    /// # Errors
    /// Where `order` is not a permutation of the rows.
    pub fn permute_rows(&self, order: &[usize]) -> Result<Self> {
        let mut seen = vec![false; self.rows];
        let all_new = order
            .iter()
            .all(|&r| r < self.rows && !std::mem::replace(&mut seen[r], true));
        if order.len() != self.rows || !all_new {
            return Err(TensorError::Shape {
                op: "permute_rows",
                detail: format!(
                    "an order of {} entries that is not a permutation of the {} rows",
                    order.len(),
                    self.rows
                ),
            });
        }
        let Some(row_bytes) = self.row_bytes else {
            return Err(TensorError::Unsupported(format!(
                "rows of {} columns in {} cannot be put in another order: they share blocks",
                self.cols,
                self.format.name()
            )));
        };
        let row = |r: usize| &self.bytes[r * row_bytes..(r + 1) * row_bytes];
        let bytes = match self.as_f32() {
            Some(values) => {
                let row = |r: usize| &values[r * self.cols..(r + 1) * self.cols];
                Bytes::from_f32(order.iter().flat_map(|&r| row(r)).copied().collect())
            }
            None => Bytes::from_vec(order.iter().flat_map(|&r| row(r)).copied().collect()),
        };
        Ok(FrozenWeight {
            bytes,
            resident: Arc::default(),
            ..self.clone()
        })
    }
}

impl fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FrozenWeight({} x {} {}, {:?})",
            self.rows,
            self.cols,
            self.format.name(),
            self.bytes
        )
    }
}
