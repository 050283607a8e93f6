//! Attention without a matrix of scores; see `wgsl/attention.wgsl`.

use std::sync::Arc;

use bytemuck::NoUninit;
use peft_tensor::{Attention, Mask, Result};

use crate::gpu::{Gpu, Kernel};
use crate::memory::Data;
use crate::record::threads;

const MATH: &str = include_str!("wgsl/math.wgsl");
const COMMON: &str = include_str!("wgsl/attention.wgsl");
const FORWARD: &[&str] = &[MATH, COMMON, include_str!("wgsl/attention_forward.wgsl")];
const BACKWARD: &[&str] = &[MATH, COMMON, include_str!("wgsl/attention_backward.wgsl")];
const DELTA: Kernel = Kernel::new(
    "attention_delta",
    &[include_str!("wgsl/attention_delta.wgsl")],
    2,
    1,
);

/// Queries, and keys, that a group of threads has at a time.
const TILE: usize = 32;

/// Columns of a head that are brought to shared memory at a time.
const DEPTH: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Params {
    s: u32,
    t: u32,
    heads: u32,
    kv_heads: u32,
    prefix: u32,
    causal: u32,
    window: u32,
    marked: u32,
    scale: f32,
    softcap: f32,
    width: u32,
    /// End of the keys at the front that no segment hides.
    open_end: u32,
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct DeltaParams {
    n: u32,
    s: u32,
    heads: u32,
    width: u32,
}

/// Sizes of a call: batch entries, queries, keys.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) b: usize,
    pub(crate) s: usize,
    pub(crate) t: usize,
}

fn params(at: Sizes, spec: &Attention) -> Params {
    Params {
        s: at.s as u32,
        t: at.t as u32,
        heads: spec.heads as u32,
        kv_heads: spec.kv_heads as u32,
        prefix: spec.prefix as u32,
        causal: u32::from(spec.causal),
        // Wider than all keys is none.
        window: spec.window.map_or(0, |w| w.min(at.t) as u32),
        marked: u32::from(spec.mask.keys.is_some() || spec.mask.segments.is_some()),
        scale: spec.scale,
        softcap: spec.softcap.unwrap_or(0.0),
        width: spec.head_dim as u32,
        open_end: (spec.prefix + spec.shared) as u32,
    }
}

/// What `wgsl/attention.wgsl` calls marks. Runs are numbered anew, so that equal numbers are one run.
fn marks(keys: Option<&Vec<bool>>, segments: Option<&Vec<u32>>, t: usize, n: usize) -> Vec<u32> {
    let mut run = 0;
    (0..n)
        .map(|i| {
            if let Some(segments) = segments
                && i % t > 0
                && segments[i] != segments[i - 1]
            {
                run += 1;
            }
            run << 1 | u32::from(keys.is_none_or(|keys| keys[i]))
        })
        .collect()
}

impl Gpu {
    fn marks(&self, mask: &Mask, at: Sizes) -> Result<Arc<Data>> {
        let (t, n) = (at.t, at.b * at.t);
        match (&mask.keys, &mask.segments) {
            (None, None) => Ok(Arc::new(self.room(1)?)),
            (Some(keys), None) => self.table(keys, "marks", |keys| {
                self.put(&marks(Some(keys), None, t, n))
            }),
            (keys, Some(segments)) => {
                let make =
                    |segments: &Vec<u32>| self.put(&marks(keys.as_deref(), Some(segments), t, n));
                match keys {
                    None => self.table(segments, "marks", make),
                    Some(_) => Ok(Arc::new(make(segments)?)),
                }
            }
        }
    }

    pub(crate) fn attention(
        &self,
        [q, k, v]: [&Data; 3],
        at: Sizes,
        spec: &Attention,
    ) -> Result<(Data, Data)> {
        let (out, lse) = (self.room(q.len)?, self.room(at.b * spec.heads * at.s)?);
        let marks = self.marks(&spec.mask, at)?;
        let binds = [
            q.bind(),
            k.bind(),
            v.bind(),
            marks.bind(),
            out.bind(),
            lse.bind(),
        ];
        let kernel = Kernel::new("attention", FORWARD, 4, 2)
            .with(header(spec))
            .rounds(&[("STEPS", spec.head_dim.div_ceil(DEPTH))]);
        let groups = [at.s.div_ceil(TILE) as u32, spec.heads as u32, at.b as u32];
        self.run(&kernel, &binds, &params(at, spec), groups)?;
        Ok((out, lse))
    }

    pub(crate) fn attention_grad(
        &self,
        [q, k, v]: [&Data; 3],
        [out, lse, dout]: [&Data; 3],
        at: Sizes,
        spec: &Attention,
    ) -> Result<(Data, Data, Data)> {
        let delta = self.room(lse.len)?;
        let sizes = DeltaParams {
            n: lse.len as u32,
            s: at.s as u32,
            heads: spec.heads as u32,
            width: spec.head_dim as u32,
        };
        let binds = [out.bind(), dout.bind(), delta.bind()];
        self.run(&DELTA, &binds, &sizes, threads(lse.len))?;
        let (dq, dk, dv) = (self.room(q.len)?, self.room(k.len)?, self.room(v.len)?);
        let marks = self.marks(&spec.mask, at)?;
        let read = [
            q.bind(),
            k.bind(),
            v.bind(),
            marks.bind(),
            dout.bind(),
            lse.bind(),
            delta.bind(),
        ];
        let params = params(at, spec);
        let mut binds = read.to_vec();
        binds.push(dq.bind());
        let kernel = Kernel::new("attention_dq", BACKWARD, 7, 1)
            .with(header(spec))
            .rounds(&[("STEPS", spec.head_dim.div_ceil(DEPTH))]);
        let groups = [at.s.div_ceil(TILE) as u32, spec.heads as u32, at.b as u32];
        self.run(&kernel, &binds, &params, groups)?;
        let mut binds = read.to_vec();
        binds.extend([dk.bind(), dv.bind()]);
        let kernel = Kernel::new("attention_dkv", BACKWARD, 7, 2)
            .with(header(spec))
            .rounds(&[("STEPS", spec.head_dim.div_ceil(DEPTH))]);
        let groups = [
            at.t.div_ceil(TILE) as u32,
            spec.kv_heads as u32,
            at.b as u32,
        ];
        self.run(&kernel, &binds, &params, groups)?;
        Ok((dq, dk, dv))
    }
}

/// One compiled form for all heads that as many rounds of columns cover; a header is what tells forms apart.
fn header(spec: &Attention) -> String {
    format!(
        "// {} times {DEPTH} columns\n",
        spec.head_dim.div_ceil(DEPTH)
    )
}

#[cfg(test)]
mod tests {
    use super::marks;

    #[test]
    fn runs_are_told_apart() {
        // Two rows of four keys; number 7 comes twice in the first, in two runs.
        let segments = vec![7, 7, 2, 7, 7, 7, 7, 7];
        let keys = vec![true, true, true, true, false, true, true, true];
        let got = marks(Some(&keys), Some(&segments), 4, 8);
        assert_eq!(got, [1, 1, 3, 5, 4, 5, 5, 5]);
        assert_eq!(marks(Some(&keys), None, 4, 8), [1, 1, 1, 1, 0, 1, 1, 1]);
    }
}
