//! What AdamW remembers of a parameter, in f32 or in blocks of 8 bits, in memory or in a file.

use peft_core::Result;
use peft_io::{Checkpoint, DType, PlanEntry, Scratch};
use rayon::prelude::*;

use super::blocks::{BLOCK, SIGNED, UNSIGNED};
use crate::io;

/// Values that are worked on at a time, by one thread; whole blocks of 8 bits.
const CHUNK: usize = 1 << 14;

/// Parameters with fewer values stay in f32, as in bitsandbytes (`min_8bit_size`).
const SMALLEST_IN_BLOCKS: usize = 4096;

/// How moments are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Two f32.
    Full,
    /// Two bytes, and two f32 for each [`BLOCK`].
    Blocks,
}

impl Form {
    pub(super) fn of(numel: usize, eight_bit: bool) -> Self {
        if eight_bit && numel >= SMALLEST_IN_BLOCKS {
            Self::Blocks
        } else {
            Self::Full
        }
    }

    /// Bytes for `n` values.
    pub(super) fn bytes(self, n: usize) -> usize {
        match self {
            Self::Full => 8 * n,
            Self::Blocks => 2 * n + 8 * n.div_ceil(BLOCK),
        }
    }

    /// What checkpoints call the pieces, with their element types, and values to an element.
    fn pieces(self) -> &'static [(&'static str, DType, usize)] {
        match self {
            Self::Full => &[("mean", DType::F32, 1), ("square", DType::F32, 1)],
            Self::Blocks => &[
                ("mean.scales", DType::F32, BLOCK),
                ("square.scales", DType::F32, BLOCK),
                ("mean.codes", DType::U8, 1),
                ("square.codes", DType::U8, 1),
            ],
        }
    }
}

/// The pieces of at most [`CHUNK`] values, each as the bytes a checkpoint has.
#[derive(Clone, Debug, PartialEq)]
struct Stretch {
    pieces: Vec<Vec<u8>>,
}

impl Stretch {
    /// All moments 0: a block whose scale is 0 is, whatever its codes say.
    fn zeros(form: Form, n: usize) -> Self {
        let piece = |&(_, dtype, per): &(_, DType, usize)| vec![0; n.div_ceil(per) * width(dtype)];
        Self {
            pieces: form.pieces().iter().map(piece).collect(),
        }
    }

    /// Calls `update(first value, mean, square)` for runs of values, with the moments in f32.
    fn update(&mut self, form: Form, mut update: impl FnMut(usize, &mut [f32], &mut [f32])) {
        match (form, &mut self.pieces[..]) {
            (Form::Full, [mean, square]) => {
                let all = [&mut *mean, &mut *square].map(|p| bytemuck::try_cast_slice_mut(p));
                if let ([Ok(m), Ok(v)], true) = (all, cfg!(target_endian = "little")) {
                    return update(0, m, v);
                }
                let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
                let size = BLOCK * size_of::<f32>();
                let both = mean.chunks_mut(size).zip(square.chunks_mut(size));
                for (i, (mean, square)) in both.enumerate() {
                    let n = mean.len() / size_of::<f32>();
                    let (m, v) = (&mut m[..n], &mut v[..n]);
                    take(m, mean);
                    take(v, square);
                    update(i * BLOCK, m, v);
                    put(mean, m);
                    put(square, v);
                }
            }
            (Form::Blocks, [m_scales, v_scales, m_codes, v_codes]) => {
                let (mut m_scale, mut v_scale) = (floats(m_scales), floats(v_scales));
                let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
                let codes = m_codes.chunks_mut(BLOCK).zip(v_codes.chunks_mut(BLOCK));
                let scales = m_scale.iter_mut().zip(&mut v_scale);
                for (i, ((m_codes, v_codes), (m_scale, v_scale))) in codes.zip(scales).enumerate() {
                    let (m, v) = (&mut m[..m_codes.len()], &mut v[..m_codes.len()]);
                    SIGNED.decode(m_codes, *m_scale, m);
                    UNSIGNED.decode(v_codes, *v_scale, v);
                    update(i * BLOCK, m, v);
                    *m_scale = SIGNED.encode(m, m_codes);
                    *v_scale = UNSIGNED.encode(v, v_codes);
                }
                put(m_scales, &m_scale);
                put(v_scales, &v_scale);
            }
            _ => {}
        }
    }

    fn read(&mut self, file: &Scratch, mut at: u64) -> Result<()> {
        for piece in &mut self.pieces {
            file.read_at(at, piece).map_err(io)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write(&self, file: &Scratch, mut at: u64) -> Result<()> {
        for piece in &self.pieces {
            file.write_at(at, piece).map_err(io)?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

fn width(dtype: DType) -> usize {
    dtype.bitsize() / 8
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let each = bytes.as_chunks::<4>().0.iter();
    each.map(|b| f32::from_le_bytes(*b)).collect()
}

fn take(values: &mut [f32], bytes: &[u8]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}

fn put(bytes: &mut [u8], values: &[f32]) {
    for (bytes, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
}

/// Where the stretches of a parameter are.
#[derive(Clone, Debug, PartialEq)]
enum Place {
    Memory(Vec<Stretch>),
    /// One after the other in the optimiser's file, from this byte.
    File(u64),
}

/// The moments of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Moments {
    pub(super) numel: usize,
    /// Steps it has had a gradient in.
    pub(super) steps: u64,
    form: Form,
    place: Place,
}

impl Moments {
    /// All 0, in the file if there is one.
    pub(super) fn zeros(numel: usize, form: Form, file: Option<&mut Scratch>) -> Result<Self> {
        let place = match file {
            Some(file) => Place::File(file.extend(form.bytes(numel) as u64).map_err(io)?),
            None => Place::Memory(lengths(numel).map(|n| Stretch::zeros(form, n)).collect()),
        };
        Ok(Self {
            numel,
            steps: 0,
            form,
            place,
        })
    }

    /// In f32 and in memory, with these values.
    pub(super) fn full(steps: u64, [mean, square]: &[Vec<f32>; 2]) -> Self {
        let stretches = mean.chunks(CHUNK).zip(square.chunks(CHUNK)).map(|(m, v)| {
            let mut stretch = Stretch::zeros(Form::Full, m.len());
            for (piece, values) in stretch.pieces.iter_mut().zip([m, v]) {
                put(piece, values);
            }
            stretch
        });
        Self {
            numel: mean.len(),
            steps,
            form: Form::Full,
            place: Place::Memory(stretches.collect()),
        }
    }

    /// The inverse of [`Moments::full`]; empty for moments of another form.
    pub(super) fn values(&self) -> [Vec<f32>; 2] {
        let mut values = [Vec::new(), Vec::new()];
        if let (Form::Full, Place::Memory(stretches)) = (self.form, &self.place) {
            for stretch in stretches {
                for (values, piece) in values.iter_mut().zip(&stretch.pieces) {
                    values.extend(floats(piece));
                }
            }
        }
        values
    }

    /// Calls `update(weights, mean, square, gradients)` for runs of values that lie beside each other, on several threads.
    pub(super) fn update(
        &mut self,
        file: Option<&Scratch>,
        weights: &mut [f32],
        grads: &[f32],
        update: impl Fn(&mut [f32], &mut [f32], &mut [f32], &[f32]) + Sync,
    ) -> Result<()> {
        let form = self.form;
        let one = |stretch: &mut Stretch, weights: &mut [f32], grads: &[f32]| {
            stretch.update(form, |first, m, v| {
                let here = first..first + m.len();
                update(&mut weights[here.clone()], m, v, &grads[here]);
            });
        };
        let values = weights.par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK));
        match (&mut self.place, file) {
            (Place::Memory(stretches), _) => {
                values
                    .zip(stretches.par_iter_mut())
                    .for_each(|((w, g), stretch)| one(stretch, w, g));
                Ok(())
            }
            (Place::File(start), Some(file)) => values.enumerate().try_for_each(|(i, (w, g))| {
                let at = *start + (i * form.bytes(CHUNK)) as u64;
                let mut stretch = Stretch::zeros(form, w.len());
                stretch.read(file, at)?;
                one(&mut stretch, w, g);
                stretch.write(file, at)
            }),
            (Place::File(_), None) => Err(lost()),
        }
    }

    /// What a checkpoint holds of them: `mean/KEY` and `square/KEY`, or four tensors of codes and scales.
    pub(super) fn plan<'a>(&'a self, key: &'a str) -> impl Iterator<Item = PlanEntry> + 'a {
        self.form
            .pieces()
            .iter()
            .map(move |&(name, dtype, per)| PlanEntry {
                name: format!("{name}/{key}"),
                shape: vec![self.numel.div_ceil(per)],
                dtype,
            })
    }

    /// Hands the bytes of one planned tensor to `sink`, a stretch at a time.
    pub(super) fn write(
        &self,
        name: &str,
        file: Option<&Scratch>,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(piece) = self.form.pieces().iter().position(|p| p.0 == name) else {
            return Ok(());
        };
        match (&self.place, file) {
            (Place::Memory(stretches), _) => {
                stretches.iter().try_for_each(|s| sink(&s.pieces[piece]))
            }
            (Place::File(start), Some(file)) => {
                let mut at = *start;
                for n in lengths(self.numel) {
                    let mut stretch = Stretch::zeros(self.form, n);
                    stretch.read(file, at)?;
                    sink(&stretch.pieces[piece])?;
                    at += self.form.bytes(n) as u64;
                }
                Ok(())
            }
            (Place::File(_), None) => Err(lost()),
        }
    }

    /// Fills the moments from a checkpoint's tensors.
    pub(super) fn read(
        &mut self,
        key: &str,
        from: &Checkpoint,
        file: Option<&Scratch>,
    ) -> Result<()> {
        let plan: Vec<PlanEntry> = self.plan(key).collect();
        let mut sources = Vec::with_capacity(plan.len());
        for entry in &plan {
            let bytes = from.bytes(&entry.name).map_err(io)?;
            let expected = entry.shape[0] * width(entry.dtype);
            if bytes.len() != expected {
                return Err(peft_core::Error::other(format!(
                    "`{}` has {} bytes, {expected} belong there",
                    entry.name,
                    bytes.len()
                )));
            }
            sources.push(bytes);
        }
        let mut taken = vec![0; sources.len()];
        let mut fill = |stretch: &mut Stretch| {
            for ((piece, source), taken) in stretch.pieces.iter_mut().zip(&sources).zip(&mut taken)
            {
                let len = piece.len();
                piece.copy_from_slice(&source[*taken..*taken + len]);
                *taken += len;
            }
        };
        match (&mut self.place, file) {
            (Place::Memory(stretches), _) => {
                stretches.iter_mut().for_each(fill);
                Ok(())
            }
            (Place::File(start), Some(file)) => {
                let mut at = *start;
                for n in lengths(self.numel) {
                    let mut stretch = Stretch::zeros(self.form, n);
                    fill(&mut stretch);
                    stretch.write(file, at)?;
                    at += self.form.bytes(n) as u64;
                }
                Ok(())
            }
            (Place::File(_), None) => Err(lost()),
        }
    }
}

/// Values of each stretch of a parameter.
fn lengths(numel: usize) -> impl Iterator<Item = usize> {
    (0..numel)
        .step_by(CHUNK)
        .map(move |at| CHUNK.min(numel - at))
}

fn lost() -> peft_core::Error {
    peft_core::Error::other("the optimiser's moments are in a file that is not open")
}
