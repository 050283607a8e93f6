//! Broadcasting and the copies that move axes: everything that looks elements up by strides.

use bytemuck::NoUninit;
use peft_tensor::{Binary, Result, TensorError};

use crate::elementwise::binary_code;
use crate::gpu::{Gpu, Kernel};
use crate::matmul::window;
use crate::memory::Data;
use crate::record::threads;

const SOURCES: &[&str] = &[include_str!("wgsl/strided.wgsl")];

/// Axes that the kernels know; more are rare, as neighbours that lie together count as one.
const AXES: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Params {
    n: u32,
    op: u32,
    a_at: u32,
    b_at: u32,
    dims: [u32; AXES],
    a: [u32; AXES],
    b: [u32; AXES],
}

/// An axis: its size, and the steps of two arrays along it.
type Axis = (usize, [usize; 2]);

/// Axes without those of size 1, neighbours joined where both arrays go on from one to the next.
fn joined(axes: impl IntoIterator<Item = Axis>) -> Vec<Axis> {
    let mut out: Vec<Axis> = Vec::new();
    for (n, steps) in axes {
        if n == 1 {
            continue;
        }
        match out.last_mut() {
            Some((size, outer)) if *outer == steps.map(|s| s * n) => {
                *size *= n;
                *outer = steps;
            }
            _ => out.push((n, steps)),
        }
    }
    out
}

/// Steps of a contiguous array of `shape` along each axis; 0 along those of size 1, which repeat.
fn steps(shape: &[usize]) -> Vec<usize> {
    let mut step = 1;
    let mut out: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let here = if n == 1 { 0 } else { step };
            step *= n;
            here
        })
        .collect();
    out.reverse();
    out
}

fn params(axes: &[Axis], op: u32, a_at: usize, b_at: usize) -> Result<Params> {
    if axes.len() > AXES {
        return Err(TensorError::Unsupported(format!(
            "wgpu moves at most {AXES} axes at once; {} do not join",
            axes.len()
        )));
    }
    let mut out = Params {
        n: axes.iter().map(|a| a.0).product::<usize>() as u32,
        op,
        a_at: a_at as u32,
        b_at: b_at as u32,
        dims: [1; AXES],
        a: [0; AXES],
        b: [0; AXES],
    };
    let skip = AXES - axes.len();
    for (d, (n, [a, b])) in axes.iter().enumerate() {
        (out.dims[skip + d], out.a[skip + d], out.b[skip + d]) = (*n as u32, *a as u32, *b as u32);
    }
    Ok(out)
}

impl Gpu {
    pub(crate) fn binary(
        &self,
        op: Binary,
        (a, a_shape): (&Data, &[usize]),
        (b, b_shape): (&Data, &[usize]),
        shape: &[usize],
    ) -> Result<Data> {
        let y = self.room(shape.iter().product())?;
        let kernel = Kernel::new("binary", SOURCES, 2, 1);
        let (a_steps, b_steps) = (steps(a_shape), steps(b_shape));
        let axes = (0..shape.len()).map(|d| (shape[d], [a_steps[d], b_steps[d]]));
        let axes = joined(axes);
        if let [(_, [1, 1])] | [] = axes[..] {
            for (at, n) in self.parts(y.len) {
                let params = params(&[(n, [1, 1])], binary_code(op), 0, 0)?;
                let binds = [a.part(at, n), b.part(at, n), y.part(at, n)];
                self.run(&kernel, &binds, &params, threads(n))?;
            }
            return Ok(y);
        }
        let params = params(&axes, binary_code(op), 0, 0)?;
        let binds = [a.bind(), b.bind(), y.bind()];
        self.run(&kernel, &binds, &params, threads(y.len))?;
        Ok(y)
    }

    /// y[b-place] = x[a-place] over all axes.
    fn copy(
        &self,
        x: &Data,
        x_at: usize,
        y: &Data,
        y_at: usize,
        axes: impl IntoIterator<Item = Axis>,
    ) -> Result<()> {
        let axes = joined(axes);
        let n: usize = axes.iter().map(|a| a.0).product();
        let kernel = Kernel::new("strided_copy", SOURCES, 1, 1);
        let params = params(&axes, 0, x_at, y_at)?;
        self.run(&kernel, &[x.bind(), y.bind()], &params, threads(n))
    }

    /// All of x to y from `at` on, a piece at a time that fits a binding.
    pub(crate) fn insert(&self, x: &Data, y: &Data, at: usize) -> Result<()> {
        let kernel = Kernel::new("strided_copy", SOURCES, 1, 1);
        let step = ((self.max_binding - Self::ALIGN) / 4) as usize;
        for first in (0..x.len).step_by(step) {
            let n = step.min(x.len - first);
            let ((x, x_at), (y, y_at)) = (window(x, first, n), window(y, at + first, n));
            let params = params(&[(n, [1, 1])], 0, x_at as usize, y_at as usize)?;
            self.run(&kernel, &[x, y], &params, threads(n))?;
        }
        Ok(())
    }

    pub(crate) fn broadcast(&self, x: &Data, from: &[usize], to: &[usize]) -> Result<Data> {
        let y = self.room(to.iter().product())?;
        let (a, b) = (steps(from), steps(to));
        self.copy(x, 0, &y, 0, (0..to.len()).map(|d| (to[d], [a[d], b[d]])))?;
        Ok(y)
    }

    pub(crate) fn permute(&self, x: &Data, shape: &[usize], axes: &[usize]) -> Result<Data> {
        let y = self.room(x.len)?;
        let from = steps(shape);
        let out: Vec<usize> = axes.iter().map(|&a| shape[a]).collect();
        let to = steps(&out);
        let axes = axes
            .iter()
            .zip(&to)
            .map(|(&a, &b)| (shape[a], [from[a], b]));
        self.copy(x, 0, &y, 0, axes)?;
        Ok(y)
    }

    pub(crate) fn narrow(
        &self,
        x: &Data,
        [outer, len, inner]: [usize; 3],
        start: usize,
        take: usize,
    ) -> Result<Data> {
        let y = self.room(outer * take * inner)?;
        let axes = [(outer, [len * inner, take * inner]), (take * inner, [1, 1])];
        if y.len > 0 {
            self.copy(x, start * inner, &y, 0, axes)?;
        }
        Ok(y)
    }

    pub(crate) fn narrow_grad(
        &self,
        dy: &Data,
        [outer, len, inner]: [usize; 3],
        start: usize,
        take: usize,
    ) -> Result<Data> {
        let dx = self.fill(outer * len * inner, 0.0)?;
        self.place(dy, &dx, [outer, len, inner], start, take)?;
        Ok(dx)
    }

    /// `x [outer, take, inner]` to `y [outer, len, inner]` from `start` on.
    fn place(
        &self,
        x: &Data,
        y: &Data,
        [outer, len, inner]: [usize; 3],
        start: usize,
        take: usize,
    ) -> Result<()> {
        if x.len == 0 {
            return Ok(());
        }
        let axes = [(outer, [take * inner, len * inner]), (take * inner, [1, 1])];
        self.copy(x, 0, y, start * inner, axes)
    }

    pub(crate) fn concat(
        &self,
        parts: &[(&Data, usize)],
        outer: usize,
        inner: usize,
    ) -> Result<Data> {
        let len = parts.iter().map(|p| p.1).sum();
        let y = self.room(outer * len * inner)?;
        let mut start = 0;
        for (x, take) in parts {
            self.place(x, &y, [outer, len, inner], start, *take)?;
            start += take;
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join() {
        let contiguous = [2, 3, 4].into_iter().zip([[12, 12], [4, 4], [1, 1]]);
        assert_eq!(joined(contiguous), [(24, [1, 1])]);
        // A row that repeats: [5, 7] and [7].
        let (a, b) = (steps(&[5, 7]), steps(&[1, 7]));
        let axes = joined((0..2).map(|d| ([5, 7][d], [a[d], b[d]])));
        assert_eq!(axes, [(5, [7, 0]), (7, [1, 1])]);
        assert_eq!(joined([(1, [9, 9])]), []);
    }
}
