//! AdamW on the device: parameters, gradients and both moments in flat buffers, the clipping factor in a buffer of its own.
//!
//! Parameters are laid out one after the other, each from a multiple of [`UNIT`] elements on, in as few segments as bindings
//! allow; a large one is a segment alone and is worked on where it is. Gradients come from the tape one by one and are
//! gathered by eights. New values go into a new flat buffer, of which parameters become windows: whoever still holds the
//! values of before keeps them. So a step takes a kernel for eight gradients and then three, however many parameters
//! there are, and nothing is read back.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::NoUninit;
use peft_tensor::{AdamWMove, AdamWMoved, AdamWRule, AdamWState, Buffer, Result, TensorError};

use crate::gpu::{Gpu, Kernel};
use crate::memory::{Data, get};
use crate::record::{Bind, in_a_row, threads};

const SOURCES: &[&str] = &[include_str!("wgsl/adamw.wgsl")];
const GATHER: &[&str] = &[include_str!("wgsl/gather.wgsl")];

/// Elements that belong to one parameter: the alignment of bindings.
const UNIT: usize = Gpu::ALIGN as usize / 4;

/// A parameter of so many elements is a segment alone.
const LARGE: usize = 1 << 20;

/// Elements whose squares a group sums; the kernel's `CHUNK`.
const CHUNK: usize = 4096;

/// Arrays that one kernel gathers.
const SOURCES_OF_GATHER: usize = 8;

/// The slot in a kernel's parameters that stands for "of many".
const MANY: u32 = u32::MAX;

/// The flat buffers of a run's parameters.
pub(crate) struct Flat {
    gpu: Arc<Gpu>,
    slots: Vec<Slot>,
    segments: Vec<Segment>,
}

/// Where a parameter is.
struct Slot {
    segment: usize,
    /// In elements.
    at: usize,
    len: usize,
}

struct Segment {
    slots: Range<usize>,
    /// In elements.
    len: usize,
    mean: Data,
    square: Data,
    /// The slot of every [`UNIT`] elements; None where there is one slot.
    places: Option<Data>,
    /// The values that the last step made.
    values: Option<Data>,
}

#[repr(C)]
#[derive(Clone, Copy, Default, NoUninit)]
struct Params {
    n: u32,
    slot: u32,
    out: u32,
    towards: f32,
    keep: f32,
    add: f32,
    eps: f32,
    max_norm: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, NoUninit)]
struct GatherParams {
    begin: [u32; SOURCES_OF_GATHER],
    len: [u32; SOURCES_OF_GATHER],
}

/// What a step does to each slot, if it is in it: its value and its gradient.
type Given<'a> = Vec<Option<(&'a Data, Option<&'a Data>)>>;

impl Flat {
    /// Moments of 0 for parameters of these sizes.
    pub(crate) fn new(gpu: Arc<Gpu>, sizes: &[usize]) -> Result<Self> {
        let most = (gpu.max_binding / 4) as usize / UNIT * UNIT;
        let mut slots: Vec<Slot> = Vec::with_capacity(sizes.len());
        let mut lens: Vec<(Range<usize>, usize)> = Vec::new();
        for (slot, &len) in sizes.iter().enumerate() {
            let room = len.next_multiple_of(UNIT);
            let alone = len >= LARGE || room > most;
            match lens.last_mut() {
                Some((all, filled)) if !alone && *filled + room <= most => {
                    all.end = slot + 1;
                    *filled += room;
                }
                // What is full takes no more.
                _ => lens.push((slot..slot + 1, if alone { usize::MAX / 2 } else { room })),
            }
            let filled = lens.last().map_or(0, |(_, filled)| *filled);
            slots.push(Slot {
                segment: lens.len() - 1,
                at: if alone { 0 } else { filled - room },
                len,
            });
        }
        let segments: Result<Vec<Segment>> = lens
            .into_iter()
            .map(|(range, filled)| {
                let alone = range.len() == 1;
                let len = if alone {
                    slots[range.start].len
                } else {
                    filled
                };
                let places = || {
                    let each = range.clone().flat_map(|slot| {
                        let units = slots[slot].len.div_ceil(UNIT);
                        std::iter::repeat_n(slot as u32, units)
                    });
                    gpu.put(&each.collect::<Vec<u32>>())
                };
                Ok(Segment {
                    len,
                    mean: gpu.fill(len, 0.0)?,
                    square: gpu.fill(len, 0.0)?,
                    places: if alone { None } else { Some(places()?) },
                    values: None,
                    slots: range,
                })
            })
            .collect();
        Ok(Self {
            segments: segments?,
            gpu,
            slots,
        })
    }

    /// One flat array of those of a segment's slots that are there.
    fn gathered<'a>(
        &self,
        segment: &Segment,
        of: impl Fn(usize) -> Option<&'a Data>,
    ) -> Result<Data> {
        let flat = self.gpu.room(segment.len)?;
        let there: Vec<(usize, &Data)> = segment
            .slots
            .clone()
            .filter_map(|slot| Some((slot, of(slot)?)))
            .filter(|(_, data)| data.len > 0)
            .collect();
        for group in there.chunks(SOURCES_OF_GATHER) {
            let mut params = GatherParams::default();
            let mut binds: Vec<Bind<'_>> = vec![group[0].1.bind(); SOURCES_OF_GATHER];
            let mut longest = 0;
            for (i, (slot, data)) in group.iter().enumerate() {
                params.begin[i] = self.slots[*slot].at as u32;
                params.len[i] = data.len as u32;
                binds[i] = data.bind();
                longest = longest.max(data.len.next_multiple_of(UNIT));
            }
            binds.push(flat.bind());
            let kernel = Kernel::new("gather_flat", GATHER, SOURCES_OF_GATHER as u32, 1);
            let groups = [longest.div_ceil(256) as u32, group.len() as u32, 1];
            self.gpu.run(&kernel, &binds, &params, groups)?;
        }
        Ok(flat)
    }

    /// A segment's gradients as one array; None if none of them is there.
    fn gradients(&self, segment: &Segment, given: &Given<'_>) -> Result<Option<Data>> {
        let of = |slot: usize| given[slot].and_then(|(_, grad)| grad);
        if !segment.slots.clone().any(|slot| of(slot).is_some()) {
            return Ok(None);
        }
        match (&segment.places, of(segment.slots.start)) {
            (None, Some(grad)) => Ok(Some(grad.window(0, grad.len))),
            _ => self.gathered(segment, of).map(Some),
        }
    }

    /// A segment's values as one array: where they are if the last step left them so.
    fn values(&self, segment: &Segment, given: &Given<'_>) -> Result<Data> {
        let of = |slot: usize| given[slot].map(|(value, _)| value);
        if let (None, Some(value)) = (&segment.places, of(segment.slots.start)) {
            return Ok(value.window(0, value.len));
        }
        let at_home = |flat: &&Data| {
            let mut slots = segment.slots.clone();
            slots.all(|slot| of(slot).is_none_or(|v| v.is_window_of(flat, self.slots[slot].at)))
        };
        match segment.values.as_ref().filter(at_home) {
            Some(flat) => Ok(flat.window(0, flat.len)),
            None => self.gathered(segment, of),
        }
    }

    /// The norm of all gradients and what goes with it, as [`AdamWMoved::facts`] has it.
    fn norm(&self, flats: &[Option<Data>], rates: &Data, rule: &AdamWRule) -> Result<Data> {
        let gpu = &self.gpu;
        let count = |len: usize| -> usize { gpu.parts(len).map(|(_, n)| n.div_ceil(CHUNK)).sum() };
        let partials: usize = flats.iter().flatten().map(|flat| count(flat.len)).sum();
        // A pair of words for each.
        let sums = gpu.room(2 * partials.max(1))?;
        let mut out = 0;
        for (segment, flat) in self.segments.iter().zip(flats) {
            let Some(flat) = flat else { continue };
            for (at, n) in gpu.parts(flat.len) {
                let params = Params {
                    n: n as u32,
                    slot: segment.slot(),
                    out: out as u32,
                    ..Params::default()
                };
                let places = segment.places.as_ref().unwrap_or(rates);
                let binds = [flat.part(at, n), places.bind(), rates.bind(), sums.bind()];
                let kernel = Kernel::new("adamw_squares", SOURCES, 3, 1);
                gpu.run(&kernel, &binds, &params, in_a_row(n.div_ceil(CHUNK)))?;
                out += n.div_ceil(CHUNK);
            }
        }
        let facts = gpu.room(3)?;
        let params = Params {
            n: partials as u32,
            max_norm: rule.max_norm,
            ..Params::default()
        };
        let kernel = Kernel::new("adamw_norm", SOURCES, 1, 1);
        gpu.run(&kernel, &[sums.bind(), facts.bind()], &params, [1, 1, 1])?;
        Ok(facts)
    }

    /// The new values of a segment.
    fn moved(
        &self,
        segment: &Segment,
        (old, grad): (&Data, &Data),
        (rates, facts): (&Data, &Data),
        rule: &AdamWRule,
    ) -> Result<Data> {
        let moved = self.gpu.room(segment.len)?;
        for (at, n) in self.gpu.parts(segment.len) {
            let params = Params {
                n: n as u32,
                slot: segment.slot(),
                towards: rule.towards,
                keep: rule.keep,
                add: rule.add,
                eps: rule.eps,
                ..Params::default()
            };
            let places = segment.places.as_ref().unwrap_or(rates);
            let binds = [
                old.part(at, n),
                grad.part(at, n),
                places.bind(),
                rates.bind(),
                facts.bind(),
                moved.part(at, n),
                segment.mean.part(at, n),
                segment.square.part(at, n),
            ];
            let kernel = Kernel::new("adamw_move", SOURCES, 5, 3);
            self.gpu.run(&kernel, &binds, &params, threads(n))?;
        }
        Ok(moved)
    }

    /// The gradients of a segment after clipping.
    fn used(&self, grad: &Data, facts: &Data) -> Result<Data> {
        let used = self.gpu.room(grad.len)?;
        for (at, n) in self.gpu.parts(grad.len) {
            let params = Params {
                n: n as u32,
                ..Params::default()
            };
            let binds = [grad.part(at, n), facts.bind(), used.part(at, n)];
            let kernel = Kernel::new("adamw_used", SOURCES, 2, 1);
            self.gpu.run(&kernel, &binds, &params, threads(n))?;
        }
        Ok(used)
    }
}

impl Segment {
    fn slot(&self) -> u32 {
        match self.places {
            Some(_) => MANY,
            None => self.slots.start as u32,
        }
    }
}

impl AdamWState for Flat {
    fn step(
        &mut self,
        moves: &[AdamWMove<&Buffer>],
        rule: &AdamWRule,
        want_used: bool,
    ) -> Result<AdamWMoved<Buffer>> {
        let mut given: Given<'_> = vec![None; self.slots.len()];
        let mut rates = vec![[0f32; 4]; self.slots.len()];
        for m in moves {
            let (value, grad) = (get(m.value)?, m.grad.map(get).transpose()?);
            let fits = |data: &Data| data.len == self.slots[m.slot].len;
            if m.slot >= self.slots.len() || !fits(value) || !grad.is_none_or(fits) {
                return Err(TensorError::Device(format!(
                    "AdamW's parameter {} has another size than its moments",
                    m.slot
                )));
            }
            given[m.slot] = Some((value, grad));
            rates[m.slot] = [m.decay, m.size, m.root, f32::from(grad.is_some())];
        }
        let rates = self.gpu.put(&rates)?;
        let flats: Result<Vec<Option<Data>>> = self
            .segments
            .iter()
            .map(|segment| self.gradients(segment, &given))
            .collect();
        let flats = flats?;
        let facts = self.norm(&flats, &rates, rule)?;
        let mut used = Vec::with_capacity(flats.len());
        for (i, grad) in flats.iter().enumerate() {
            let (Some(grad), segment) = (grad, &self.segments[i]) else {
                used.push(None);
                continue;
            };
            let old = self.values(segment, &given)?;
            let moved = self.moved(segment, (&old, grad), (&rates, &facts), rule)?;
            self.segments[i].values = Some(moved);
            used.push(match want_used {
                true => Some(self.used(grad, &facts)?),
                false => None,
            });
        }
        let windows = |m: &AdamWMove<&Buffer>, flat: Option<&Data>| {
            let slot = &self.slots[m.slot];
            flat.map(|flat| Buffer::new(flat.window(slot.at, slot.len)))
        };
        let values = moves.iter().map(|m| {
            let segment = self.slots[m.slot].segment;
            let flat = self.segments[segment].values.as_ref();
            windows(m, flat.filter(|_| flats[segment].is_some()))
        });
        let after = moves.iter().map(|m| {
            let flat = used[self.slots[m.slot].segment].as_ref();
            windows(m, flat.filter(|_| m.grad.is_some()))
        });
        Ok(AdamWMoved {
            values: values.collect(),
            used: if want_used {
                after.collect()
            } else {
                Vec::new()
            },
            facts: Buffer::new(facts),
        })
    }

    fn moments(&self) -> Result<Vec<[Vec<f32>; 2]>> {
        let mut windows = Vec::with_capacity(2 * self.slots.len());
        for slot in &self.slots {
            let segment = &self.segments[slot.segment];
            windows.push(segment.mean.window(slot.at, slot.len));
            windows.push(segment.square.window(slot.at, slot.len));
        }
        let windows: Vec<&Data> = windows.iter().collect();
        let values = self.gpu.download_all(&windows)?;
        let mut values = values.into_iter();
        let pairs = std::iter::from_fn(|| Some([values.next()?, values.next()?]));
        Ok(pairs.collect())
    }

    fn load(&mut self, slot: usize, moments: [&[f32]; 2]) -> Result<()> {
        let Some(place) = self.slots.get(slot) else {
            return Err(TensorError::Device(format!(
                "AdamW has no parameter {slot}"
            )));
        };
        let segment = &self.segments[place.segment];
        for (flat, values) in [&segment.mean, &segment.square].into_iter().zip(moments) {
            if values.len() != place.len {
                return Err(TensorError::Device(format!(
                    "{} moments for {} values",
                    values.len(),
                    place.len
                )));
            }
            self.gpu.write(&flat.window(place.at, place.len), values)?;
        }
        Ok(())
    }
}
