//! Work, recorded and handed over in batches.
//!
//! All kernels go into one compute pass until somebody reads values, a training step is complete or the batch is full:
//! handing over costs tens of microseconds, recording one. `wgpu` puts the barriers between dispatches that touch the same
//! buffer.
//!
//! A batch is full long before a step is where a step takes long: desktop drivers reset a device that is busy with one
//! batch for some seconds (Windows: two). How many kernels that is differs by a thousand between models, so it is found out
//! by the clock: batches grow while they take little time.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peft_tensor::Result;

use crate::gpu::{Gpu, Kernel, fail, locked};

/// Kernels in a batch before it is known how long they take.
const FIRST: u32 = 256;
/// Kernels in a batch at least and at most; a step of a model of thirty layers has some thousands.
const BATCHES: std::ops::RangeInclusive<u32> = 32..=1 << 14;
/// Batches that take longer are made smaller.
const LONG: Duration = Duration::from_millis(400);
/// Batches that take less are made larger.
const SHORT: Duration = Duration::from_millis(100);

/// Groups along one axis that every device takes.
const GROUPS: u64 = 65_535;

/// What has been recorded and not handed over.
pub(crate) struct Recorder {
    /// The pass has to end before its encoder does: fields are dropped in this order.
    open: Option<(wgpu::ComputePass<'static>, wgpu::CommandEncoder)>,
    kernels: u32,
    /// Kernels of a full batch.
    full: u32,
    /// Whether somebody watches how long a batch takes.
    watched: bool,
    /// Batches that were handed over since somebody waited, and when the first of them was.
    handed: u32,
    since: Option<Instant>,
}

impl Recorder {
    /// `watched`: whether a driver may give up on a device that is busy for long.
    pub(crate) fn new(watched: bool) -> Self {
        Self {
            open: None,
            kernels: 0,
            full: if watched { FIRST } else { *BATCHES.end() },
            watched,
            handed: 0,
            since: None,
        }
    }

    /// The device has done all it was given: time to learn from how long that took.
    pub(crate) fn waited(&mut self) {
        if let Some(since) = self.since.take()
            && self.watched
            && self.handed > 0
        {
            self.full = next_full(self.full, since.elapsed() / self.handed);
        }
        self.handed = 0;
    }
}

/// Kernels of a full batch where batches took `each`.
fn next_full(full: u32, each: Duration) -> u32 {
    let next = if each > LONG {
        full / 2
    } else if each < SHORT {
        full * 2
    } else {
        full
    };
    next.clamp(*BATCHES.start(), *BATCHES.end())
}

/// A part of a buffer that a kernel sees.
#[derive(Clone, Copy)]
pub(crate) struct Bind<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    /// In bytes.
    pub(crate) offset: u64,
    /// In bytes.
    pub(crate) size: u64,
}

/// Groups for `n` groups in a row, folded where they are more than fit an axis; kernels skip those beyond the end.
pub(crate) fn in_a_row(n: usize) -> [u32; 3] {
    let n = n as u64;
    if n <= GROUPS {
        [n as u32, 1, 1]
    } else {
        let y = n.div_ceil(GROUPS);
        [n.div_ceil(y) as u32, y as u32, 1]
    }
}

/// Groups of 256 for `n` threads.
pub(crate) fn threads(n: usize) -> [u32; 3] {
    in_a_row(n.div_ceil(256))
}

impl Gpu {
    /// Records a kernel: `binds` are those it reads, then those it writes; `params` is its block of parameters.
    pub(crate) fn run<P: bytemuck::NoUninit>(
        &self,
        kernel: &Kernel,
        binds: &[Bind<'_>],
        params: &P,
        groups: [u32; 3],
    ) -> Result<()> {
        if groups.contains(&0) {
            return Ok(());
        }
        if let Some(large) = binds.iter().find(|b| b.size > self.max_binding) {
            return fail(format!(
                "{}: `{}` on a tensor of {} bytes; a kernel of this device sees at most {}",
                self.name, kernel.entry, large.size, self.max_binding
            ));
        }
        if groups.iter().any(|&n| u64::from(n) > GROUPS) {
            return fail(format!(
                "{}: `{}` would take {groups:?} groups; at most {GROUPS} go along an axis",
                self.name, kernel.entry
            ));
        }
        let made = self.pipeline(kernel)?;
        let entries: Vec<_> = (0..)
            .zip(binds)
            .map(|(binding, bind)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: bind.buffer,
                    offset: bind.offset,
                    size: std::num::NonZeroU64::new(bind.size),
                }),
            })
            .collect();
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &made.layout,
            entries: &entries,
        });
        let mut recorder = locked(&self.recorder);
        let (pass, _) = recorder.open.get_or_insert_with(|| {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            let pass = encoder
                .begin_compute_pass(&Default::default())
                .forget_lifetime();
            (pass, encoder)
        });
        pass.set_pipeline(&made.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.set_immediates(0, bytemuck::bytes_of(params));
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        recorder.kernels += 1;
        if recorder.kernels >= recorder.full {
            self.submit(&mut recorder, None)?;
        }
        Ok(())
    }

    /// Hands over what is recorded.
    pub(crate) fn flush(&self) -> Result<()> {
        self.submit(&mut locked(&self.recorder), None)
    }

    /// Hands over what is recorded, with copies behind it.
    pub(crate) fn flush_with(&self, copy: &dyn Fn(&mut wgpu::CommandEncoder)) -> Result<()> {
        self.submit(&mut locked(&self.recorder), Some(copy))
    }

    fn submit(
        &self,
        recorder: &mut Recorder,
        copy: Option<&dyn Fn(&mut wgpu::CommandEncoder)>,
    ) -> Result<()> {
        recorder.kernels = 0;
        let open = recorder.open.take().map(|(pass, encoder)| {
            drop(pass);
            encoder
        });
        let new = || self.device.create_command_encoder(&Default::default());
        let encoder = match copy {
            Some(copy) => {
                let mut encoder = open.unwrap_or_else(new);
                copy(&mut encoder);
                Some(encoder)
            }
            None => open,
        };
        if let Some(encoder) = encoder {
            self.queue.submit([encoder.finish()]);
            self.pool.submits.fetch_add(1, Ordering::AcqRel);
            recorder.handed += 1;
            recorder.since.get_or_insert_with(Instant::now);
            self.pool.settle();
        }
        self.check()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{in_a_row, next_full};

    #[test]
    fn batches_follow_the_clock() {
        let by = |full, ms| next_full(full, Duration::from_millis(ms));
        assert_eq!((by(256, 10), by(256, 200), by(256, 900)), (512, 256, 128));
        assert_eq!((by(1 << 14, 1), by(32, 5000)), (1 << 14, 32));
    }

    #[test]
    fn groups_are_folded() {
        assert_eq!(in_a_row(0), [0, 1, 1]);
        assert_eq!(in_a_row(65_535), [65_535, 1, 1]);
        for n in [65_536usize, 65_537, 131_071, 10_000_019] {
            let [x, y, _] = in_a_row(n);
            let all = u64::from(x) * u64::from(y);
            assert!(x <= 65_535 && y <= 65_535 && all >= n as u64 && all < n as u64 + u64::from(y));
        }
    }
}
