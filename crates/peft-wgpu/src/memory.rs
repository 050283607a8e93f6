//! Device memory: buffers that are used again, values up and down.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use peft_tensor::{Buffer, Result, TensorError};

use crate::gpu::{Gpu, OUT_OF_MEMORY, fail, locked};
use crate::record::Bind;

/// Idle bytes that are kept at least.
const IDLE: u64 = 256 << 20;

/// Bytes that one upload stages at a time.
const STAGED: usize = 64 << 20;

const USAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_DST)
    .union(wgpu::BufferUsages::COPY_SRC);

/// Words on the device: the values of a tensor, or ids and packed codes.
pub(crate) struct Data {
    pub(crate) buffer: wgpu::Buffer,
    /// In words of four bytes.
    pub(crate) len: usize,
    pool: Arc<Pool>,
}

impl Drop for Data {
    fn drop(&mut self) {
        self.pool.give(self.buffer.clone());
    }
}

impl Data {
    /// All of it.
    pub(crate) fn bind(&self) -> Bind<'_> {
        self.part(0, self.len)
    }

    /// `len` words from `first` on, which is a multiple of [`Gpu::ALIGN`] bytes. Not empty: a binding may not be.
    pub(crate) fn part(&self, first: usize, len: usize) -> Bind<'_> {
        Bind {
            buffer: &self.buffer,
            offset: first as u64 * 4,
            size: len.max(1) as u64 * 4,
        }
    }
}

/// Buffers nobody holds any more.
#[derive(Default)]
pub(crate) struct Pool {
    idle: Mutex<Idle>,
    /// Batches of work handed over so far.
    pub(crate) submits: AtomicU64,
    /// Bytes of all buffers there are, idle ones included.
    pub(crate) bytes: AtomicU64,
}

#[derive(Default)]
struct Idle {
    by_size: BTreeMap<u64, Vec<(wgpu::Buffer, u64)>>,
    bytes: u64,
}

impl Pool {
    fn give(&self, buffer: wgpu::Buffer) {
        let size = buffer.size();
        let mut idle = locked(&self.idle);
        idle.bytes += size;
        let now = self.submits.load(Ordering::Acquire);
        idle.by_size.entry(size).or_default().push((buffer, now));
    }

    /// A buffer of that size; `cold` if no work that is still being recorded may touch it.
    fn take(&self, size: u64, cold: bool) -> Option<wgpu::Buffer> {
        let mut idle = locked(&self.idle);
        let now = self.submits.load(Ordering::Acquire);
        let list = idle.by_size.get_mut(&size)?;
        let at = if cold {
            list.iter().position(|(_, since)| *since < now)?
        } else {
            list.len().checked_sub(1)?
        };
        let (buffer, _) = list.swap_remove(at);
        idle.bytes -= size;
        Some(buffer)
    }

    /// Gives back what is idle beyond as much as is in use.
    pub(crate) fn trim(&self) {
        let mut idle = locked(&self.idle);
        let in_use = self.bytes.load(Ordering::Relaxed) - idle.bytes;
        if idle.bytes > IDLE.max(in_use) {
            self.clear_locked(&mut idle);
        }
    }

    fn clear(&self) {
        self.clear_locked(&mut locked(&self.idle));
    }

    fn clear_locked(&self, idle: &mut Idle) {
        self.bytes.fetch_sub(idle.bytes, Ordering::Relaxed);
        *idle = Idle::default();
    }
}

/// Sizes come in steps of at most a quarter, so that tensors of nearly one size share buffers.
fn class(bytes: u64) -> u64 {
    let bytes = bytes.max(Gpu::ALIGN);
    let step = (bytes.next_power_of_two() / 8).max(Gpu::ALIGN);
    bytes.next_multiple_of(step)
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
        Ok(Data {
            buffer,
            len,
            pool: self.pool.clone(),
        })
    }

    fn fresh(&self, size: u64) -> Result<wgpu::Buffer> {
        // Faults of before are not this buffer's.
        self.check()?;
        let make = || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size,
                usage: USAGE,
                mapped_at_creation: false,
            })
        };
        let mut buffer = make();
        if self.check().is_err() {
            // Once more, with everything that is idle given back and all work done.
            self.flush()?;
            self.pool.clear();
            self.wait()?;
            buffer = make();
            if self.check().is_err() {
                let held = self.pool.bytes.load(Ordering::Relaxed) >> 20;
                return fail(format!(
                    "{}: {size} bytes more than the {held} MiB in use: {OUT_OF_MEMORY}",
                    self.name
                ));
            }
        }
        self.pool.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(buffer)
    }

    /// Words onto the device.
    pub(crate) fn upload(&self, words: &[u8]) -> Result<Data> {
        let data = self.allocate(words.len() / 4, true)?;
        for (i, piece) in words.chunks(STAGED).enumerate() {
            if i > 0 {
                self.queue.submit([]);
                self.wait()?;
            }
            self.queue
                .write_buffer(&data.buffer, (i * STAGED) as u64, piece);
        }
        Ok(data)
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
        Ok(self.download_all(&[data])?.pop().unwrap_or_default())
    }

    /// As [`Gpu::download`] for many, in groups that one buffer of staging holds.
    pub(crate) fn download_all(&self, all: &[&Data]) -> Result<Vec<Vec<f32>>> {
        self.flush()?;
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
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for data in group.iter().filter(|data| data.len > 0) {
            let bytes = data.len as u64 * 4;
            encoder.copy_buffer_to_buffer(&data.buffer, 0, &staging, at, bytes);
            at += bytes;
        }
        self.queue.submit([encoder.finish()]);
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
    use super::class;

    #[test]
    fn sizes_have_steps() {
        assert_eq!(class(0), 256);
        assert_eq!(class(257), 512);
        assert_eq!(class(1 << 20), 1 << 20);
        assert_eq!(class((1 << 20) + 4), (1 << 20) + (1 << 18));
        for n in [5, 1000, 12_345, 1 << 24, (1 << 24) + 1] {
            let size = class(n);
            assert!(
                size >= n && size.is_multiple_of(256) && (n < 1024 || size <= n + n / 4 + 256),
                "{n}"
            );
        }
    }
}
