//! Frozen weights: packed on the device, decoded inside the kernels.
//!
//! A weight is uploaded at its first use and stays with it (`FrozenWeight::resident`). Formats the kernels do not know are
//! decoded on the way. A matrix larger than a binding is cut into chunks of whole rows.

use std::sync::OnceLock;

use bytemuck::NoUninit;
use peft_tensor::{Buffer, FrozenWeight, Precision, Result, TensorError, WeightFormat, bnb};

use crate::few;
use crate::gpu::{Gpu, Kernel};
use crate::matmul::{OPERANDS, Right, Shape, Sources, TILES, UNITS, WIDE, window};
use crate::memory::{Data, get};
use crate::record::{Bind, threads};

const FORMATS: &str = include_str!("wgsl/formats.wgsl");
const PACKED: &str = include_str!("wgsl/packed.wgsl");
const PRODUCT: Sources = Sources {
    tiles: &[OPERANDS, FORMATS, PACKED, TILES],
    wide: &[OPERANDS, FORMATS, PACKED, WIDE],
    units: &[FORMATS, include_str!("wgsl/packed_half.wgsl"), UNITS],
    few: &[FORMATS, PACKED, include_str!("wgsl/few.wgsl")],
};
const ROWS: &[&str] = &[FORMATS, include_str!("wgsl/rows.wgsl")];

/// A weight on the device.
pub(crate) struct Packed {
    chunks: Vec<Chunk>,
    /// The constant that the kernels are compiled with.
    header: &'static str,
}

struct Chunk {
    first: usize,
    rows: usize,
    codes: Data,
    scales: Data,
    /// The size of its largest value, where matrix units asked for it; see `wgsl/coop.wgsl`.
    most: OnceLock<Data>,
}

/// How a chunk is stored for the kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    F32,
    Bf16,
    F16,
    Four,
    Int8,
    Q40,
    Q41,
    Q80,
}

impl Form {
    /// Decoded where the kernels do not know the format; in bfloat16 where the device keeps large values so.
    fn of(format: WeightFormat, precision: Precision) -> Self {
        match format {
            WeightFormat::BF16 => Self::Bf16,
            WeightFormat::F16 => Self::F16,
            WeightFormat::NF4 | WeightFormat::FP4 => Self::Four,
            WeightFormat::INT8 => Self::Int8,
            WeightFormat::Q4_0 => Self::Q40,
            WeightFormat::Q4_1 => Self::Q41,
            WeightFormat::Q8_0 => Self::Q80,
            WeightFormat::F32 => Self::F32,
            _ if precision == Precision::F32 => Self::F32,
            _ => Self::Bf16,
        }
    }

    fn header(self) -> &'static str {
        match self {
            Self::F32 => "const FORMAT = F32;\n",
            Self::Bf16 => "const FORMAT = BF16;\n",
            Self::F16 => "const FORMAT = F16;\n",
            Self::Four => "const FORMAT = FOUR;\n",
            Self::Int8 => "const FORMAT = INT8;\n",
            Self::Q40 => "const FORMAT = Q4_0;\n",
            Self::Q41 => "const FORMAT = Q4_1;\n",
            Self::Q80 => "const FORMAT = Q8_0;\n",
        }
    }

    /// Bits of a value in `codes`.
    fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::Bf16 | Self::F16 => 16,
            Self::Int8 | Self::Q80 => 8,
            Self::Four | Self::Q40 | Self::Q41 => 4,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct RowParams {
    n: u32,
    cols: u32,
    first: u32,
    rows: u32,
}

/// What bitsandbytes multiplies by instead of dividing by 127; in front of the scales of INT8.
const INT8_PART: f32 = 7.874_016e-3;

/// Bytes as words, filled up with zeros.
fn words(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// (codes, scales) of rows `first..first + rows`.
fn parts(w: &FrozenWeight, form: Form, first: usize, rows: usize) -> Result<(Vec<u8>, Vec<u8>)> {
    let (cols, n) = (w.cols(), rows * w.cols());
    let bytes: &[u8] = w.bytes();
    let lost = || TensorError::Format(format!("{w:?} has rows that do not begin at a byte"));
    let stored = || -> Result<&[u8]> {
        let row = w.row_bytes().ok_or_else(lost)?;
        Ok(&bytes[first * row..(first + rows) * row])
    };
    let decoded = || {
        let mut values = vec![0f32; n];
        w.decode_rows(first..first + rows, &mut values);
        values
    };
    let as_stored = |format: WeightFormat| w.format() == format;
    Ok(match form {
        Form::F32 if as_stored(WeightFormat::F32) => (stored()?.to_vec(), vec![]),
        Form::F32 => (bytemuck::cast_slice(&decoded()).to_vec(), vec![]),
        Form::Bf16 if as_stored(WeightFormat::BF16) => (words(stored()?.to_vec()), vec![]),
        Form::Bf16 => {
            let halves = decoded().into_iter().map(half::bf16::from_f32);
            (
                words(halves.flat_map(|h| h.to_le_bytes()).collect()),
                vec![],
            )
        }
        Form::F16 => (words(stored()?.to_vec()), vec![]),
        Form::Four => four(w, first * cols, n)?,
        Form::Int8 => {
            let (mut codes, mut scales) = (Vec::with_capacity(n), INT8_PART.to_le_bytes().to_vec());
            for row in stored()?.chunks(4 + cols) {
                scales.extend(&row[..4]);
                codes.extend(&row[4..]);
            }
            (words(codes), scales)
        }
        Form::Q40 => headed(stored()?, 18, 2),
        Form::Q41 => headed(stored()?, 20, 4),
        Form::Q80 => headed(stored()?, 34, 2),
    })
}

/// Blocks of `size` bytes, the first `head` of them scales.
fn headed(bytes: &[u8], size: usize, head: usize) -> (Vec<u8>, Vec<u8>) {
    let blocks = bytes.len() / size;
    let mut codes = Vec::with_capacity(blocks * (size - head));
    let mut scales = Vec::with_capacity(blocks * head + 2);
    for block in bytes.chunks(size) {
        scales.extend(&block[..head]);
        codes.extend(&block[head..]);
    }
    (codes, words(scales))
}

/// `n` values from `first` on, a multiple of a block, of a 4-bit matrix: its codes, and the numbers they mean before the
/// scales.
fn four(w: &FrozenWeight, first: usize, n: usize) -> Result<(Vec<u8>, Vec<u8>)> {
    let size = w.format().block_bytes();
    let blocks = first / bnb::BLOCK..(first + n).div_ceil(bnb::BLOCK);
    let table = bnb::table(w.format())
        .ok_or_else(|| TensorError::Format(format!("{w:?} has no table of codes")))?;
    let mut scales: Vec<u8> = bytemuck::cast_slice(table).to_vec();
    let mut codes = Vec::with_capacity(n / 2);
    for block in w.bytes()[blocks.start * size..blocks.end * size].chunks(size) {
        scales.extend(&block[..4]);
        codes.extend(&block[4..]);
    }
    Ok((codes, scales))
}

impl Gpu {
    /// The weight on this device, uploaded at the first call.
    pub(crate) fn packed(&self, w: &FrozenWeight, precision: Precision) -> Result<Buffer> {
        let key = self.id << 1 | u64::from(precision == Precision::Bf16);
        w.resident(key, || Ok(Buffer::new(self.pack(w, precision)?)))
    }

    fn pack(&self, w: &FrozenWeight, precision: Precision) -> Result<Packed> {
        let form = Form::of(w.format(), precision);
        crate::notes::decoded(w.format(), form.bits());
        // Chunks begin at whole words of codes and, in formats of blocks through the matrix, at whole blocks.
        let unit = if form == Form::Four {
            bnb::BLOCK
        } else {
            32 / form.bits()
        };
        let step = unit / gcd(unit, w.cols().max(1));
        let row_bits = (w.cols() * form.bits()).max(1);
        let fit = (self.max_binding as usize * 8 / row_bits).max(1);
        let rows = if fit >= w.rows() {
            w.rows()
        } else {
            (fit / step).max(1) * step
        };
        let mut chunks = Vec::new();
        for first in (0..w.rows()).step_by(rows.max(1)) {
            let rows = rows.min(w.rows() - first);
            let (codes, scales) = parts(w, form, first, rows)?;
            chunks.push(Chunk {
                first,
                rows,
                codes: self.upload(&codes)?,
                scales: self.upload(&scales)?,
                most: OnceLock::new(),
            });
        }
        // A mapped file's pages are not needed in memory any more.
        w.bytes().release();
        Ok(Packed {
            chunks,
            header: form.header(),
        })
    }

    pub(crate) fn frozen_matmul(
        &self,
        x: &Data,
        m: usize,
        w: &FrozenWeight,
        precision: Precision,
        transpose: bool,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        let (k, n) = if transpose {
            (w.cols(), w.rows())
        } else {
            (w.rows(), w.cols())
        };
        let (out, add) = self.target(into, m * n)?;
        let y = get(&out)?;
        if y.len == 0 {
            return Ok(out);
        }
        let packed = self.packed(w, precision)?;
        let packed = packed_of(&packed)?;
        let room = (self.max_binding - Self::ALIGN) as usize / 4;
        let m_step = (room / k.max(n).max(1)).clamp(1, m);
        for m0 in (0..m).step_by(m_step) {
            let rows = m_step.min(m - m0);
            let (a, a_at) = window(x, m0 * k, rows * k);
            let (c, c_at) = window(y, m0 * n, rows * n);
            for chunk in &packed.chunks {
                // Rows of the weight are columns of the result, or parts of the sum.
                let (first, count) = (chunk.first as u32, chunk.rows as u32);
                let part = if transpose { k as u32 } else { count };
                let shape = Shape {
                    m: rows as u32,
                    n: if transpose { count } else { n as u32 },
                    k: part,
                    lda: k as u32,
                    ldb: w.cols() as u32,
                    ldc: n as u32,
                    a_at: a_at + if transpose { 0 } else { first },
                    b_at: 0,
                    c_at: c_at + if transpose { first } else { 0 },
                    a_step: 0,
                    b_step: 0,
                    c_step: 0,
                    splits: 1,
                    chunk: part,
                    scale: 1.0,
                    add: u32::from(add || (!transpose && first > 0)),
                };
                let binds = [chunk.codes.bind(), chunk.scales.bind()];
                let right = Right {
                    header: packed.header,
                    binds: &binds,
                    sources: &PRODUCT,
                };
                let turned = (false, transpose);
                if transpose && !self.is_wide() && few::suits(&shape) {
                    self.few(shape, a, &right, c)?;
                } else if precision == Precision::Bf16 && self.suits_units(&shape, 1)? {
                    let most_a = self.most(a, a_at, rows * k)?;
                    let most = [most_a.bind(), self.most_of(chunk, packed, w.cols())?.bind()];
                    self.by_units(shape, 1, turned, a, &right, most, c)?;
                } else {
                    self.product(shape, 1, turned, a, &right, c)?;
                }
            }
        }
        Ok(out)
    }

    /// The size of a chunk's largest value, found at the first call.
    fn most_of<'a>(&self, chunk: &'a Chunk, packed: &Packed, cols: usize) -> Result<&'a Data> {
        if let Some(known) = chunk.most.get() {
            return Ok(known);
        }
        let binds = [chunk.codes.bind(), chunk.scales.bind()];
        let found = self.most_packed(binds, packed.header, chunk.rows * cols, cols)?;
        Ok(chunk.most.get_or_init(|| found))
    }

    pub(crate) fn frozen_gather(
        &self,
        w: &FrozenWeight,
        precision: Precision,
        ids: &[u32],
    ) -> Result<Data> {
        let y = self.room(ids.len() * w.cols())?;
        let packed = self.packed(w, precision)?;
        let packed = packed_of(&packed)?;
        for (first, ids) in self.row_parts(ids, w.cols()) {
            let n = ids.len() * w.cols();
            let ids = self.put(ids)?;
            for chunk in &packed.chunks {
                let binds = [
                    chunk.codes.bind(),
                    chunk.scales.bind(),
                    ids.bind(),
                    y.part(first * w.cols(), n),
                ];
                let kernel = Kernel::new("packed_rows", ROWS, 3, 1);
                self.rows(packed, kernel, &binds, n, w.cols(), chunk)?;
            }
        }
        Ok(y)
    }

    pub(crate) fn frozen_dense(&self, w: &FrozenWeight, precision: Precision) -> Result<Data> {
        let y = self.room(w.rows() * w.cols())?;
        let packed = self.packed(w, precision)?;
        let packed = packed_of(&packed)?;
        let align = (Self::ALIGN / 4) as usize;
        for chunk in &packed.chunks {
            let (at, n) = (chunk.first * w.cols(), chunk.rows * w.cols());
            if at % align == 0 && n as u64 * 4 <= self.max_binding {
                let binds = [chunk.codes.bind(), chunk.scales.bind(), y.part(at, n)];
                let kernel = Kernel::new("packed_all", ROWS, 2, 1);
                self.rows(packed, kernel, &binds, n, w.cols(), chunk)?;
                continue;
            }
            // A chunk's packed form fits a binding, its values need not: rows by their numbers, some at a time.
            let step = (self.max_binding as usize / 4 / w.cols().max(1)).max(1);
            for first in (chunk.first..chunk.first + chunk.rows).step_by(step) {
                let rows = step.min(chunk.first + chunk.rows - first) as u32;
                let ids: Vec<u32> = (first as u32..first as u32 + rows).collect();
                let some = self.frozen_gather(w, precision, &ids)?;
                self.insert(&some, &y, first * w.cols())?;
            }
        }
        Ok(y)
    }

    fn rows(
        &self,
        packed: &Packed,
        kernel: Kernel,
        binds: &[Bind<'_>],
        n: usize,
        cols: usize,
        chunk: &Chunk,
    ) -> Result<()> {
        let params = RowParams {
            n: n as u32,
            cols: cols as u32,
            first: chunk.first as u32,
            rows: chunk.rows as u32,
        };
        let kernel = kernel.with(packed.header.to_owned());
        self.run(&kernel, binds, &params, threads(n))
    }
}

impl Packed {
    /// Bytes that a product reads of it.
    pub(crate) fn bytes(&self) -> usize {
        let words = |c: &Chunk| c.codes.len + c.scales.len;
        4 * self.chunks.iter().map(words).sum::<usize>()
    }
}

pub(crate) fn packed_of(buffer: &Buffer) -> Result<&Packed> {
    buffer
        .get::<Packed>()
        .ok_or_else(|| TensorError::Device("a weight's copy is not this backend's".into()))
}

pub(crate) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
