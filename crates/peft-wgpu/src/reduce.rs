//! Sums over axes.

use bytemuck::NoUninit;
use peft_tensor::{Result, TensorError};

use crate::gpu::{Gpu, Kernel};
use crate::memory::Data;
use crate::record::{in_a_row, threads};

const NAN: &str = include_str!("wgsl/nan.wgsl");
const BY_TREE: &str = include_str!("wgsl/group.wgsl");
const BY_SUBGROUP: &str = include_str!("wgsl/group_by_subgroup.wgsl");
const REDUCE: &str = include_str!("wgsl/reduce.wgsl");
const ROWS: &str = include_str!("wgsl/rows_of.wgsl");
const MATH: &str = include_str!("wgsl/math.wgsl");

/// Axes of either kind that the kernels know, after neighbours of one kind are joined.
const AXES: usize = 4;

/// Threads that keep a large device busy.
const BUSY: usize = 1 << 15;

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Params {
    outputs: u32,
    length: u32,
    splits: u32,
    chunk: u32,
    kept: [u32; AXES],
    kept_step: [u32; AXES],
    summed: [u32; AXES],
    summed_step: [u32; AXES],
}

/// Sizes and steps, the innermost axis last.
type Axes = Vec<(usize, usize)>;

/// The axes of `from` that stay in `to` and those that are summed, neighbours of one kind joined; and whether the
/// innermost is summed.
fn split(from: &[usize], to: &[usize]) -> (Axes, Axes, bool) {
    let (mut kept, mut summed): (Axes, Axes) = (vec![], vec![]);
    let (mut step, mut last, mut inner) = (1, None, false);
    for d in (0..from.len()).rev() {
        if from[d] == 1 {
            continue;
        }
        let is_summed = to[d] == 1;
        let axes = if is_summed { &mut summed } else { &mut kept };
        match axes.last_mut() {
            Some((n, _)) if last == Some(is_summed) => *n *= from[d],
            _ => axes.push((from[d], step)),
        }
        if last.is_none() {
            inner = is_summed;
        }
        last = Some(is_summed);
        step *= from[d];
    }
    kept.reverse();
    summed.reverse();
    (kept, summed, inner)
}

fn padded(axes: &Axes) -> Result<([u32; AXES], [u32; AXES])> {
    if axes.len() > AXES {
        return Err(TensorError::Unsupported(format!(
            "wgpu sums over at most {AXES} separate axes; there are {}",
            axes.len()
        )));
    }
    let (mut sizes, mut steps) = ([1; AXES], [0; AXES]);
    let skip = AXES - axes.len();
    for (d, (n, step)) in axes.iter().enumerate() {
        (sizes[skip + d], steps[skip + d]) = (*n as u32, *step as u32);
    }
    Ok((sizes, steps))
}

impl Gpu {
    /// A kernel over rows of `cols`, with as many threads a row as it is worth: a barrier costs each of them.
    pub(crate) fn of_rows(
        &self,
        entry: &'static str,
        cols: usize,
        reads: u32,
        writes: u32,
    ) -> Kernel {
        let width = (cols / 4).next_power_of_two().clamp(32, 256);
        let sources: &[&str] = match self.has.subgroups {
            true => &[MATH, NAN, BY_SUBGROUP, ROWS],
            false => &[MATH, NAN, BY_TREE, ROWS],
        };
        Kernel::new(entry, sources, reads, writes).with(format!("const WIDTH = {width}u;\n"))
    }

    fn sums(&self, entry: &'static str) -> Kernel {
        let sources: &[&str] = match self.has.subgroups {
            true => &[NAN, BY_SUBGROUP, REDUCE],
            false => &[NAN, BY_TREE, REDUCE],
        };
        Kernel::new(entry, sources, 1, 1).with("const WIDTH = 256u;\n".to_owned())
    }

    pub(crate) fn sum_to(&self, x: &Data, from: &[usize], to: &[usize]) -> Result<Data> {
        let (kept, summed, inner) = split(from, to);
        let outputs: usize = to.iter().product();
        let length: usize = summed.iter().map(|a| a.0).product();
        if from.contains(&0) {
            return self.fill(outputs, 0.0);
        }
        let by_group = inner && length > 32;
        let wanted = if by_group { BUSY / 256 } else { BUSY };
        let least = if by_group { 4096 } else { 64 };
        let splits = (wanted / outputs.max(1)).min(length / least).max(1);
        let chunk = length.div_ceil(splits);
        let splits = length.div_ceil(chunk).max(1);
        let ((kept, kept_step), (summed, summed_step)) = (padded(&kept)?, padded(&summed)?);
        let params = Params {
            outputs: outputs as u32,
            length: length as u32,
            splits: splits as u32,
            chunk: chunk as u32,
            kept,
            kept_step,
            summed,
            summed_step,
        };
        let y = self.room(outputs * splits)?;
        let binds = [x.bind(), y.bind()];
        if by_group {
            let kernel = self.sums("sum_by_group");
            self.run(&kernel, &binds, &params, in_a_row(outputs * splits))?;
        } else {
            let kernel = self.sums("sum_by_thread");
            self.run(&kernel, &binds, &params, threads(outputs * splits))?;
        }
        if splits == 1 {
            return Ok(y);
        }
        self.sum_to(&y, &[splits, outputs], &[1, outputs])
    }
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn axes_of_one_kind_join() {
        let (kept, summed, inner) = split(&[2, 3, 1, 4, 5], &[2, 3, 1, 1, 1]);
        assert_eq!((kept, summed, inner), (vec![(6, 20)], vec![(20, 1)], true));
        let (kept, summed, inner) = split(&[7, 3, 5], &[1, 3, 1]);
        assert_eq!(
            (kept, summed, inner),
            (vec![(3, 5)], vec![(7, 15), (5, 1)], true)
        );
        let (_, summed, inner) = split(&[7, 3], &[1, 3]);
        assert_eq!((summed, inner), (vec![(7, 3)], false));
    }
}
