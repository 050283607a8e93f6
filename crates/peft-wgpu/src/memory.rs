//! Device memory: buffers that are used again, values up and down.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use peft_tensor::{Buffer, Result, TensorError};

use crate::gpu::{Gpu, OUT_OF_MEMORY, fail, locked};
use crate::record::Bind;

/// Batches of work that tell what memory the next will need.
const RECENT: usize = 8;

/// Batches after which an untouched buffer is given back if a larger idle one can stand in for it.
const NEAR: u64 = 2;

/// Bytes that one upload stages at a time.
const STAGED: usize = 64 << 20;

const USAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_DST)
    .union(wgpu::BufferUsages::COPY_SRC);

/// A buffer of the device; with its last holder it goes back to the pool.
struct Block {
    buffer: wgpu::Buffer,
    /// Bytes that were asked for; the buffer may be larger.
    asked: u64,
    pool: Arc<Pool>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give(self.buffer.clone(), self.asked);
    }
}

/// Words on the device: the values of a tensor, or ids and packed codes. All of a buffer, or a window into one that
/// several tensors share.
pub(crate) struct Data {
    block: Arc<Block>,
    /// Where it begins in the buffer, in bytes; a multiple of [`Gpu::ALIGN`].
    offset: u64,
    /// In words of four bytes.
    pub(crate) len: usize,
    /// The value of a single number that was made of numbers the processor has: what a backward pass begins with. Whoever
    /// asks for it need not wait.
    pub(crate) number: Option<f32>,
}

impl Data {
    /// All of it.
    pub(crate) fn bind(&self) -> Bind<'_> {
        self.part(0, self.len)
    }

    /// `len` words from `first` on, which is a multiple of [`Gpu::ALIGN`] bytes. Not empty: a binding may not be.
    pub(crate) fn part(&self, first: usize, len: usize) -> Bind<'_> {
        Bind {
            buffer: &self.block.buffer,
            offset: self.offset + first as u64 * 4,
            size: len.max(1) as u64 * 4,
        }
    }

    /// The `len` words from `first` on, which is a multiple of [`Gpu::ALIGN`] bytes, as data of their own.
    pub(crate) fn window(&self, first: usize, len: usize) -> Self {
        Self {
            block: self.block.clone(),
            offset: self.offset + first as u64 * 4,
            len,
            number: None,
        }
    }

    /// Whether this is what [`Data::window`] of `whole` gives.
    pub(crate) fn is_window_of(&self, whole: &Self, first: usize) -> bool {
        Arc::ptr_eq(&self.block, &whole.block) && self.offset == whole.offset + first as u64 * 4
    }

    /// Whether no other data is in its buffer: a kernel may write into it and read any other.
    pub(crate) fn is_alone(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }
}

/// How memory was used, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Of all buffers there are, idle ones included.
    pub held: u64,
    /// That tensors ask for now.
    pub live: u64,
    /// The most they asked for at once during the last few batches of work.
    pub peak: u64,
}

/// Buffers nobody holds any more.
///
/// Values live as long as the tape or a parameter holds them, and what is given up is used again at once, by the next
/// kernel of the same step if it fits: the allocation by liveness that a planner would do ahead of time, done as it goes.
/// Tensors do not share one large buffer: a dispatch may not read and write the same buffer in `wgpu`, and barriers are
/// between uses of a buffer, so that kernels that have nothing to do with each other would wait for each other.
#[derive(Default)]
pub(crate) struct Pool {
    idle: Mutex<Idle>,
    /// Batches of work handed over so far.
    pub(crate) submits: AtomicU64,
    /// Times somebody waited for the device.
    pub(crate) waits: AtomicU64,
}

#[derive(Default)]
struct Idle {
    by_size: BTreeMap<u64, Vec<Rest>>,
    /// Bytes of `by_size`.
    bytes: u64,
    used: MemoryUse,
    /// The most bytes that were live during each of the last batches of work, the present one first.
    peaks: [u64; RECENT],
}

impl Idle {
    fn peak(&self) -> u64 {
        self.peaks.iter().copied().fold(0, u64::max)
    }
}

/// An idle buffer.
struct Rest {
    buffer: wgpu::Buffer,
    /// Batches handed over when it was given back.
    since: u64,
}

impl Pool {
    fn give(&self, buffer: wgpu::Buffer, asked: u64) {
        let size = buffer.size();
        let mut idle = locked(&self.idle);
        idle.bytes += size;
        idle.used.live -= asked;
        let rest = Rest {
            buffer,
            since: self.submits.load(Ordering::Acquire),
        };
        idle.by_size.entry(size).or_default().push(rest);
    }

    /// The smallest buffer that holds `size` bytes and is not much larger; `cold` if no work that is still being recorded
    /// may touch it.
    fn take(&self, size: u64, cold: bool) -> Option<wgpu::Buffer> {
        let mut idle = locked(&self.idle);
        let now = self.submits.load(Ordering::Acquire);
        let found = idle
            .by_size
            .range(size..=most(size))
            .find_map(|(&size, list)| {
                let at = match cold {
                    true => list.iter().position(|rest| rest.since < now)?,
                    false => list.len().checked_sub(1)?,
                };
                Some((size, at))
            });
        let (size, at) = found?;
        let list = idle.by_size.get_mut(&size)?;
        let rest = list.swap_remove(at);
        if list.is_empty() {
            idle.by_size.remove(&size);
        }
        idle.bytes -= size;
        Some(rest.buffer)
    }

    /// Counts what a block asks for.
    fn asked(&self, bytes: u64) {
        let mut idle = locked(&self.idle);
        idle.used.live += bytes;
        idle.peaks[0] = idle.peaks[0].max(idle.used.live);
    }

    fn made(&self, bytes: u64) {
        locked(&self.idle).used.held += bytes;
    }

    /// After a batch of work: gives back what the last of them did not touch, beyond a quarter of what they had at most.
    pub(crate) fn settle(&self) {
        let mut idle = locked(&self.idle);
        let now = self.submits.load(Ordering::Acquire);
        let spare = idle.peak() / 4;
        let Idle {
            by_size,
            bytes,
            used,
            peaks,
        } = &mut *idle;
        let rests = by_size
            .iter()
            .map(|(&size, list)| (size, list.iter().map(|rest| now - rest.since).collect()));
        let (gone, left) = to_give_back(&rests.collect(), *bytes, spare);
        for (size, list) in by_size.iter_mut() {
            let mut gone = gone[size].iter();
            list.retain(|_| gone.next() != Some(&true));
        }
        by_size.retain(|_, list| !list.is_empty());
        used.held -= *bytes - left;
        *bytes = left;
        peaks.rotate_right(1);
        peaks[0] = used.live;
    }

    pub(crate) fn usage(&self) -> MemoryUse {
        let idle = locked(&self.idle);
        MemoryUse {
            peak: idle.peak(),
            ..idle.used
        }
    }

    fn clear(&self) {
        let mut idle = locked(&self.idle);
        idle.used.held -= idle.bytes;
        idle.bytes = 0;
        idle.by_size.clear();
    }
}

/// Which idle buffers are given back, and the bytes that stay. `ages` has the batches since each was used, by size;
/// `bytes` is their sum, of which `spare` may stay whatever their age.
///
/// Rows get longer and shorter from step to step, and their tensors change size with them. What a shorter step left behind
/// would be touched often enough to stay for ever beside what a longer one made, though the larger can do for both: so a
/// buffer goes early where there are larger ones for its tensors.
fn to_give_back(
    ages: &BTreeMap<u64, Vec<u64>>,
    mut bytes: u64,
    spare: u64,
) -> (BTreeMap<u64, Vec<bool>>, u64) {
    // Buffers that stay, by size.
    let mut stay: BTreeMap<u64, usize> = BTreeMap::new();
    let mut gone = BTreeMap::new();
    // The largest first: few of them are much, and who stands in has to be known to stay.
    for (&size, ages) in ages.iter().rev() {
        let mut larger: usize = stay.range(size + 1..=most(size)).map(|(_, n)| n).sum();
        let goes = ages.iter().map(|&age| {
            let old = age >= RECENT as u64;
            let done_for = !old && age >= NEAR && larger > 0;
            let goes = bytes > spare && (old || done_for);
            if goes {
                bytes -= size;
                larger -= usize::from(done_for);
            }
            goes
        });
        let goes: Vec<bool> = goes.collect();
        stay.insert(size, goes.iter().filter(|&&goes| !goes).count());
        gone.insert(size, goes);
    }
    (gone, bytes)
}

/// Sizes come in steps of at most an eighth, so that tensors of nearly one size share buffers.
fn class(bytes: u64) -> u64 {
    let bytes = bytes.max(Gpu::ALIGN);
    let step = (bytes.next_power_of_two() / 16).max(Gpu::ALIGN);
    bytes.next_multiple_of(step)
}

/// The largest buffer that is used for `size` bytes.
fn most(size: u64) -> u64 {
    size + size / 4
}

/// Host tables that are uploaded once for as long as somebody holds them (rope's, masks).
#[derive(Default)]
pub(crate) struct Shared {
    tables: Mutex<HashMap<(usize, &'static str), Table>>,
}

/// The weak count pins the address, so that it cannot come to mean another table.
struct Table {
    alive: Box<dyn Fn() -> bool + Send>,
    data: Arc<Data>,
}

impl Gpu {
    /// Room for `len` words, with whatever is in them.
    pub(crate) fn room(&self, len: usize) -> Result<Data> {
        self.allocate(len, false)
    }

    fn allocate(&self, len: usize, cold: bool) -> Result<Data> {
        let bytes = len as u64 * 4;
        if bytes > self.max_buffer {
            return fail(format!(
                "{}: a tensor of {bytes} bytes; the device's largest buffer is {}",
                self.name, self.max_buffer
            ));
        }
        let size = class(bytes).min(self.max_buffer / 4 * 4);
        let buffer = match self.pool.take(size, cold) {
            Some(buffer) => buffer,
            None => self.fresh(size)?,
        };
        self.pool.asked(bytes);
        let block = Block {
            buffer,
            asked: bytes,
            pool: self.pool.clone(),
        };
        Ok(Data {
            block: Arc::new(block),
            offset: 0,
            len,
            number: None,
        })
    }

    fn fresh(&self, size: u64) -> Result<wgpu::Buffer> {
        // Faults of before are not this buffer's.
        self.check()?;
        let buffer = match self.made(size)? {
            Some(buffer) => buffer,
            None => {
                // Once more, with everything that is idle given back and all work done.
                self.flush()?;
                self.pool.clear();
                self.wait()?;
                let none = || {
                    TensorError::Device(format!(
                        "{}: {size} bytes more than the {} MiB in use: {OUT_OF_MEMORY}",
                        self.name,
                        self.pool.usage().held >> 20
                    ))
                };
                self.made(size)?.ok_or_else(none)?
            }
        };
        self.pool.made(size);
        Ok(buffer)
    }

    /// A new buffer; None if there is no memory for it.
    fn made(&self, size: u64) -> Result<Option<wgpu::Buffer>> {
        let after = self.pool.usage().held.saturating_add(size);
        if self.max_memory.is_some_and(|most| after > most) {
            return Ok(None);
        }
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage: USAGE,
            mapped_at_creation: false,
        });
        match self.check() {
            Ok(()) => Ok(Some(buffer)),
            Err(lost) if self.is_lost() => Err(lost),
            Err(_) => Ok(None),
        }
    }

    /// Words onto the device.
    pub(crate) fn upload(&self, words: &[u8]) -> Result<Data> {
        let data = self.allocate(words.len() / 4, true)?;
        self.stage(&data, words)?;
        Ok(data)
    }

    /// Puts `values` in place of those of `data`, after everything recorded so far.
    pub(crate) fn write(&self, data: &Data, values: &[f32]) -> Result<()> {
        self.flush()?;
        self.stage(data, bytemuck::cast_slice(values))
    }

    /// What is staged comes before the batch of work that is being recorded.
    fn stage(&self, data: &Data, words: &[u8]) -> Result<()> {
        for (i, piece) in words.chunks(STAGED).enumerate() {
            if i > 0 {
                self.queue.submit([]);
                self.wait()?;
            }
            let at = data.offset + (i * STAGED) as u64;
            self.queue.write_buffer(&data.block.buffer, at, piece);
        }
        Ok(())
    }

    /// Numbers onto the device.
    pub(crate) fn put<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Data> {
        self.upload(bytemuck::cast_slice(values))
    }

    /// A table that others hold, uploaded at its first use; `form` names what `make` makes of it.
    pub(crate) fn table<T: Send + Sync + 'static>(
        &self,
        table: &Arc<T>,
        form: &'static str,
        make: impl FnOnce(&T) -> Result<Data>,
    ) -> Result<Arc<Data>> {
        let key = (Arc::as_ptr(table) as usize, form);
        if let Some(known) = locked(&self.shared.tables).get(&key) {
            return Ok(known.data.clone());
        }
        let data = Arc::new(make(table)?);
        let weak: Weak<T> = Arc::downgrade(table);
        let mut tables = locked(&self.shared.tables);
        tables.retain(|_, t| (t.alive)());
        let entry = Table {
            alive: Box::new(move || weak.strong_count() > 0),
            data: data.clone(),
        };
        tables.insert(key, entry);
        Ok(data)
    }

    /// Words back; waits for everything recorded so far.
    pub(crate) fn download(&self, data: &Data) -> Result<Vec<f32>> {
        if let Some(number) = data.number {
            return Ok(vec![number]);
        }
        Ok(self.download_all(&[data])?.pop().unwrap_or_default())
    }

    /// As [`Gpu::download`] for many, in groups that one buffer of staging holds.
    pub(crate) fn download_all(&self, all: &[&Data]) -> Result<Vec<Vec<f32>>> {
        let mut out = Vec::with_capacity(all.len());
        let mut rest = all;
        while !rest.is_empty() {
            let (mut count, mut len) = (0, 0);
            while count < rest.len() && (count == 0 || len + rest[count].len <= STAGED / 4) {
                len += rest[count].len;
                count += 1;
            }
            let (group, after) = rest.split_at(count);
            let mut values = &self.read(group, len)?[..];
            for data in group {
                let (mine, others) = values.split_at(data.len);
                out.push(mine.to_vec());
                values = others;
            }
            rest = after;
        }
        Ok(out)
    }

    /// The words of a group one after another, `len` in all.
    fn read(&self, group: &[&Data], len: usize) -> Result<Vec<f32>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let size = len as u64 * 4;
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("download"),
            size,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.flush_with(&|encoder| {
            let mut at = 0;
            for data in group.iter().filter(|data| data.len > 0) {
                let (from, bytes) = (data.bind(), data.len as u64 * 4);
                encoder.copy_buffer_to_buffer(from.buffer, from.offset, &staging, at, bytes);
                at += bytes;
            }
        })?;
        let (tell, told) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            // The other side waits below; if it has given up, nobody needs the answer.
            let _ = tell.send(result);
        });
        self.wait()?;
        match told.recv() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return fail(format!("{}: reading values back: {e}", self.name)),
            Err(e) => return fail(format!("{}: reading values back: {e}", self.name)),
        }
        let view = staging
            .get_mapped_range(..)
            .map_err(|e| TensorError::Device(e.to_string()))?;
        let values = bytemuck::pod_collect_to_vec(&view);
        self.check()?;
        Ok(values)
    }

    /// Waits until the device has done what it was given.
    pub(crate) fn wait(&self) -> Result<()> {
        self.pool.waits.fetch_add(1, Ordering::Relaxed);
        self.waited_for()?;
        locked(&self.recorder).waited();
        // Whoever waits can as well wait for this.
        if let Some(kept) = &self.kept {
            kept.save();
        }
        Ok(())
    }

    fn waited_for(&self) -> Result<()> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|e| TensorError::Device(format!("{}: {e}", self.name)))?;
        self.check()
    }
}

/// The words in a buffer of this backend.
pub(crate) fn get(buffer: &Buffer) -> Result<&Data> {
    buffer.get::<Data>().ok_or_else(|| {
        TensorError::Unsupported("a tensor of another device was given to wgpu".into())
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{NEAR, RECENT, class, to_give_back};

    #[test]
    fn what_larger_buffers_do_for_is_given_back() {
        let old = RECENT as u64;
        let given = |ages: &[(u64, &[u64])], spare| {
            let ages: BTreeMap<_, _> = ages.iter().map(|&(n, list)| (n, list.to_vec())).collect();
            let all = ages.iter().map(|(n, list)| n * list.len() as u64).sum();
            let (gone, left) = to_give_back(&ages, all, spare);
            let taken: u64 = gone
                .iter()
                .map(|(n, list)| n * list.iter().filter(|&&gone| gone).count() as u64)
                .sum();
            assert_eq!(left + taken, all, "{ages:?}");
            gone.into_values().flatten().collect::<Vec<_>>()
        };
        // Two of a longer step for three of a shorter one; the third may be wanted beside them.
        let ages: &[(u64, &[u64])] = &[(720, &[NEAR, NEAR, NEAR]), (786, &[1, 0])];
        assert_eq!(given(ages, 0), [true, true, false, false, false]);
        // What was just used, and what is too small to be stood in for.
        let ages: &[(u64, &[u64])] = &[(720, &[NEAR - 1]), (400, &[NEAR]), (786, &[0])];
        assert_eq!(given(ages, 0), [false, false, false]);
        // What goes itself stands in for nothing.
        let ages: &[(u64, &[u64])] = &[(720, &[NEAR]), (786, &[old])];
        assert_eq!(given(ages, 0), [false, true]);
        // Little enough stays as it is.
        assert_eq!(given(&[(720, &[old, old])], 720), [true, false]);
        assert_eq!(given(&[(720, &[NEAR]), (786, &[0])], 2000), [false, false]);
    }

    #[test]
    fn sizes_have_steps() {
        assert_eq!(class(0), 256);
        assert_eq!(class(257), 512);
        assert_eq!(class(1 << 20), 1 << 20);
        assert_eq!(class((1 << 20) + 4), (1 << 20) + (1 << 17));
        for n in [5, 1000, 12_345, 1 << 24, (1 << 24) + 1] {
            let size = class(n);
            assert!(
                size >= n && size.is_multiple_of(256) && (n < 1024 || size <= n + n / 8 + 256),
                "{n}"
            );
        }
    }
}
