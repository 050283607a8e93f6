//! [`FrozenWeight`]: a matrix of blocks over shared bytes.

use std::fmt;
use std::ops::Range;

use rayon::prelude::*;

use super::{WeightFormat, decode};
use crate::Bytes;
use crate::error::{Result, TensorError};

/// Values that one task of [`FrozenWeight::to_f32`] decodes, about.
const CHUNK: usize = 1 << 16;

/// A frozen matrix `[rows, cols]`, row-major, each row a whole number of blocks. A parameter of one
/// dimension has one row.
#[derive(Clone)]
pub struct FrozenWeight {
    rows: usize,
    cols: usize,
    row_bytes: usize,
    format: WeightFormat,
    bytes: Bytes,
}

impl FrozenWeight {
    /// A matrix over stored bytes.
    ///
    /// # Errors
    /// Where a row is not whole blocks, or the bytes are not exactly those of the matrix.
    pub fn new(rows: usize, cols: usize, format: WeightFormat, bytes: Bytes) -> Result<Self> {
        let row_bytes = format.row_bytes(cols)?;
        // The decoded matrix must be addressable too, or a hostile header would overflow a later product.
        let fits = rows
            .checked_mul(cols)
            .is_some_and(|n| n <= isize::MAX as usize / size_of::<f32>());
        match rows.checked_mul(row_bytes) {
            Some(want) if fits && want == bytes.len() => Ok(FrozenWeight {
                rows,
                cols,
                row_bytes,
                format,
                bytes,
            }),
            Some(want) if fits => Err(TensorError::Format(format!(
                "a {rows} x {cols} matrix in {} takes {want} bytes, there are {}",
                format.name(),
                bytes.len()
            ))),
            _ => Err(TensorError::Format(format!(
                "a {rows} x {cols} matrix is too large"
            ))),
        }
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

    /// Size of the stored bytes.
    pub fn nbytes(&self) -> usize {
        self.bytes.len()
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
        } else {
            decode(
                self.format,
                &self.bytes[r.start * self.row_bytes..r.end * self.row_bytes],
                out,
            );
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
        let row = |r: usize| &self.bytes[r * self.row_bytes..(r + 1) * self.row_bytes];
        let bytes = match self.as_f32() {
            Some(values) => {
                let row = |r: usize| &values[r * self.cols..(r + 1) * self.cols];
                Bytes::from_f32(order.iter().flat_map(|&r| row(r)).copied().collect())
            }
            None => Bytes::from_vec(order.iter().flat_map(|&r| row(r)).copied().collect()),
        };
        Ok(FrozenWeight {
            bytes,
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
