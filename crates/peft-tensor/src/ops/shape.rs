//! Operations that move or repeat elements.

use crate::error::shape_err;
use crate::tape::{grad_enabled, record};
use crate::tensor::numel;
use crate::{Result, Tensor, TensorError};

/// `shape` with ones in front up to `rank` axes.
pub(crate) fn padded(shape: &[usize], rank: usize) -> Vec<usize> {
    let mut out = vec![1; rank.saturating_sub(shape.len())];
    out.extend_from_slice(shape);
    out
}

/// The shape both broadcast to.
pub(crate) fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    padded(a, rank)
        .into_iter()
        .zip(padded(b, rank))
        .map(|pair| match pair {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => shape_err(
                "broadcast",
                format!("shapes {a:?} and {b:?} do not broadcast"),
            ),
        })
        .collect()
}

impl Tensor {
    /// The same elements under another shape.
    ///
    /// # Errors
    /// If the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if numel(shape) != self.numel() {
            return shape_err(
                "reshape",
                format!("{:?} does not fit {shape:?}", self.shape()),
            );
        }
        let mut out = record(
            self.data.clone(),
            shape.to_vec(),
            self.device(),
            &[self],
            || {
                let (x, from) = (self.target.clone(), self.shape.clone());
                Box::new(move |dy, sink| sink.add(&x, dy.reshape(&from)?))
            },
        );
        out.keeping = self.keeping.clone();
        Ok(out)
    }

    /// All axes but the last folded into one: `[rows, last]`.
    ///
    /// # Errors
    /// Whatever [`Tensor::reshape`] says.
    pub fn flatten_rows(&self) -> Result<Tensor> {
        let last = self.last_dim();
        self.reshape(&[self.numel() / last.max(1), last])
    }

    /// Sum down to `shape`, the transpose of broadcasting.
    ///
    /// # Errors
    /// If `shape` does not broadcast to this one.
    pub fn sum_to(&self, shape: &[usize]) -> Result<Tensor> {
        if shape == self.shape() {
            return Ok(self.clone());
        }
        if broadcast_shape(shape, self.shape())? != self.shape() {
            return shape_err(
                "sum_to",
                format!("{:?} does not sum to {shape:?}", self.shape()),
            );
        }
        let device = self.device();
        let to = padded(shape, self.rank());
        let data = device.backend().sum_to(&self.data, self.shape(), &to)?;
        Ok(record(data, shape.to_vec(), device, &[self], || {
            let (x, from) = (self.target.clone(), self.shape.clone());
            Box::new(move |dy, sink| sink.add(&x, dy.broadcast_to(&from)?))
        }))
    }

    /// Repeated up to `shape`.
    ///
    /// # Errors
    /// If this does not broadcast to `shape`.
    pub fn broadcast_to(&self, shape: &[usize]) -> Result<Tensor> {
        if shape == self.shape() {
            return Ok(self.clone());
        }
        if broadcast_shape(self.shape(), shape)? != shape {
            return shape_err(
                "broadcast_to",
                format!("{:?} does not broadcast to {shape:?}", self.shape()),
            );
        }
        let device = self.device();
        let from = padded(self.shape(), shape.len());
        let data = device.backend().broadcast(&self.data, &from, shape)?;
        Ok(record(data, shape.to_vec(), device, &[self], || {
            let (x, from) = (self.target.clone(), self.shape.clone());
            Box::new(move |dy, sink| sink.add(&x, dy.sum_to(&from)?))
        }))
    }

    /// Axes in another order: `axes[i]` is the input axis that becomes output axis i.
    ///
    /// # Errors
    /// If `axes` is not a permutation of the axes.
    pub fn permute(&self, axes: &[usize]) -> Result<Tensor> {
        let mut seen = axes.to_vec();
        seen.sort_unstable();
        if seen != (0..self.rank()).collect::<Vec<_>>() {
            return shape_err(
                "permute",
                format!("{axes:?} is no order of the axes of {:?}", self.shape()),
            );
        }
        let device = self.device();
        let data = device.backend().permute(&self.data, self.shape(), axes)?;
        let shape = axes.iter().map(|&a| self.shape()[a]).collect();
        Ok(record(data, shape, device, &[self], || {
            let x = self.target.clone();
            let mut inverse = vec![0; axes.len()];
            axes.iter()
                .enumerate()
                .for_each(|(to, &from)| inverse[from] = to);
            Box::new(move |dy, sink| sink.add(&x, dy.permute(&inverse)?))
        }))
    }

    /// The last two axes swapped.
    ///
    /// # Errors
    /// If there are fewer than two axes.
    pub fn t(&self) -> Result<Tensor> {
        let rank = self.rank();
        if rank < 2 {
            return shape_err("t", format!("needs two axes, got shape {:?}", self.shape()));
        }
        let mut axes: Vec<_> = (0..rank).collect();
        axes.swap(rank - 1, rank - 2);
        self.permute(&axes)
    }

    /// Entries `start..start + len` of one axis.
    ///
    /// # Errors
    /// If the axis or the range is not there.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Tensor> {
        let size = self.shape().get(axis).copied().unwrap_or(0);
        if axis >= self.rank() || start.checked_add(len).is_none_or(|end| end > size) {
            return shape_err(
                "narrow",
                format!(
                    "entries {start}.. of {len} on axis {axis} of {:?}",
                    self.shape()
                ),
            );
        }
        if len == size {
            return Ok(self.clone());
        }
        let (outer, inner) = (
            numel(&self.shape()[..axis]),
            numel(&self.shape()[axis + 1..]),
        );
        let device = self.device();
        let data = device
            .backend()
            .narrow(&self.data, outer, size, inner, start, len)?;
        let mut shape = self.shape().to_vec();
        shape[axis] = len;
        Ok(record(data, shape, device, &[self], || {
            let (x, from) = (self.target.clone(), self.shape.clone());
            Box::new(move |dy, sink| {
                let dx = dy
                    .device()
                    .backend()
                    .narrow_grad(&dy.data, outer, size, inner, start, len)?;
                sink.add(&x, Tensor::from_buffer(dx, from.clone(), dy.device()))
            })
        }))
    }

    /// Rows `ids` of a matrix `[rows, cols]`: `[ids, cols]`.
    ///
    /// # Errors
    /// If an id is not a row.
    pub fn gather_rows(&self, ids: &[u32]) -> Result<Tensor> {
        let (rows, cols) = self.dims2()?;
        check_ids("gather_rows", ids, rows)?;
        let device = self.device();
        let data = device.backend().gather(&self.data, cols, ids)?;
        Ok(record(data, vec![ids.len(), cols], device, &[self], || {
            let (x, ids) = (self.target.clone(), ids.to_vec());
            Box::new(move |dy, sink| sink.add(&x, dy.scatter_rows(&ids, rows)?))
        }))
    }

    /// Zeros of `[rows, cols]` with row i of this added to row `ids[i]`.
    ///
    /// # Errors
    /// If there are not as many ids as rows, or one is out of range.
    pub fn scatter_rows(&self, ids: &[u32], rows: usize) -> Result<Tensor> {
        let (n, cols) = self.dims2()?;
        if n != ids.len() {
            return shape_err("scatter_rows", format!("{n} rows and {} ids", ids.len()));
        }
        check_ids("scatter_rows", ids, rows)?;
        let device = self.device();
        let data = device.backend().scatter_add(&self.data, rows, cols, ids)?;
        Ok(record(data, vec![rows, cols], device, &[self], || {
            let (x, ids) = (self.target.clone(), ids.to_vec());
            Box::new(move |dy, sink| sink.add(&x, dy.gather_rows(&ids)?))
        }))
    }
}

pub(crate) fn check_ids(op: &'static str, ids: &[u32], rows: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(&id) => Err(TensorError::Index {
            op,
            index: i64::from(id),
            len: rows,
        }),
        None => Ok(()),
    }
}

impl Tensor {
    /// `self` with `rhs` behind it along an axis: [`concat`] in the memory of `self`, where nobody else holds that, the axes
    /// in front are 1 and no gradient is wanted. So keys and values grow from token to token.
    ///
    /// # Errors
    /// As [`concat`].
    pub fn append(self, rhs: &Tensor, axis: usize) -> Result<Tensor> {
        let same = self.rank() == rhs.rank()
            && axis < self.rank()
            && (0..self.rank()).all(|a| a == axis || self.shape()[a] == rhs.shape()[a]);
        let recorded = grad_enabled() && (self.requires_grad() || rhs.requires_grad());
        if !same || recorded || numel(&self.shape()[..axis]) != 1 {
            return concat(&[&self, rhs], axis);
        }
        self.same_device(rhs, "append")?;
        let mut shape = self.shape().to_vec();
        shape[axis] += rhs.shape()[axis];
        let (device, len) = (self.device().clone(), self.numel());
        let data = device
            .backend()
            .append(self.data, len, &rhs.data, rhs.numel())?;
        Ok(Tensor::from_buffer(data, shape, &device))
    }
}

/// Tensors joined along one axis.
///
/// # Errors
/// If there are none, or they differ in another axis.
pub fn concat(parts: &[&Tensor], axis: usize) -> Result<Tensor> {
    let Some(first) = parts.first() else {
        return shape_err("concat", "nothing to join");
    };
    if axis >= first.rank() {
        return shape_err(
            "concat",
            format!("no axis {axis} in shape {:?}", first.shape()),
        );
    }
    for part in parts {
        first.same_device(part, "concat")?;
        let same = part.rank() == first.rank()
            && (0..first.rank()).all(|a| a == axis || part.shape()[a] == first.shape()[a]);
        if !same {
            return shape_err(
                "concat",
                format!(
                    "{:?} and {:?} along axis {axis}",
                    first.shape(),
                    part.shape()
                ),
            );
        }
    }
    if let [only] = parts {
        return Ok((*only).clone());
    }
    let (outer, inner) = (
        numel(&first.shape()[..axis]),
        numel(&first.shape()[axis + 1..]),
    );
    let sizes: Vec<usize> = parts.iter().map(|p| p.shape()[axis]).collect();
    let pairs: Vec<_> = parts
        .iter()
        .zip(&sizes)
        .map(|(p, &n)| (&p.data, n))
        .collect();
    let device = first.device();
    let data = device.backend().concat(&pairs, outer, inner)?;
    let mut shape = first.shape().to_vec();
    shape[axis] = sizes.iter().sum();
    Ok(record(data, shape, device, parts, || {
        let parts: Vec<_> = parts
            .iter()
            .map(|p| (p.target.clone(), p.shape()[axis]))
            .collect();
        Box::new(move |dy, sink| {
            let mut start = 0;
            for (part, len) in &parts {
                let len = *len;
                if part.wanted() {
                    sink.add(part, dy.narrow(axis, start, len)?)?;
                }
                start += len;
            }
            Ok(())
        })
    }))
}
