//! The tensor handle: shape, device, values, and its place in the graph.

use std::borrow::Cow;
use std::sync::Arc;

use ndarray::{Array, ArrayD, Dimension, IxDyn};

use crate::error::shape_err;
use crate::kept::Keeping;
use crate::tape::{self, Backward, Grads, Target};
use crate::{Buffer, Device, Result, RngKey};

/// An immutable n-dimensional array of f32, contiguous and row-major; cloning is cheap.
#[derive(Clone)]
pub struct Tensor {
    pub(crate) data: Buffer,
    pub(crate) shape: Arc<[usize]>,
    device: Device,
    pub(crate) target: Target,
    pub(crate) keeping: Keeping,
}

impl Tensor {
    pub(crate) fn from_buffer(
        data: Buffer,
        shape: impl Into<Arc<[usize]>>,
        device: &Device,
    ) -> Self {
        Self {
            data,
            shape: shape.into(),
            device: device.clone(),
            target: Target(None),
            keeping: Keeping::default(),
        }
    }

    /// Values in row-major order.
    ///
    /// # Errors
    /// If there are more or fewer values than `shape` holds.
    pub fn from_vec(values: Vec<f32>, shape: &[usize], device: &Device) -> Result<Self> {
        if values.len() != numel(shape) {
            return shape_err(
                "from_vec",
                format!("{} values do not fill shape {shape:?}", values.len()),
            );
        }
        Ok(Self::from_buffer(
            device.backend().upload(values)?,
            shape,
            device,
        ))
    }

    /// Values in double precision; only the reference device keeps that precision.
    ///
    /// # Errors
    /// If there are more or fewer values than `shape` holds.
    pub fn from_f64(values: Vec<f64>, shape: &[usize], device: &Device) -> Result<Self> {
        if values.len() != numel(shape) {
            return shape_err(
                "from_f64",
                format!("{} values do not fill shape {shape:?}", values.len()),
            );
        }
        Ok(Self::from_buffer(
            device.backend().upload_f64(values)?,
            shape,
            device,
        ))
    }

    /// An `ndarray` array of any layout, moved where it is contiguous.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn from_array<D: Dimension>(array: Array<f32, D>, device: &Device) -> Result<Self> {
        let shape = array.shape().to_vec();
        let values = if array.is_standard_layout() {
            let (values, offset) = array.into_raw_vec_and_offset();
            match offset {
                Some(0) | None if values.len() == numel(&shape) => values,
                offset => values
                    .into_iter()
                    .skip(offset.unwrap_or(0))
                    .take(numel(&shape))
                    .collect(),
            }
        } else {
            array.iter().copied().collect()
        };
        Self::from_vec(values, &shape, device)
    }

    /// All elements `value`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn full(value: f32, shape: &[usize], device: &Device) -> Result<Self> {
        Ok(Self::from_buffer(
            device.backend().fill(numel(shape), value)?,
            shape,
            device,
        ))
    }

    /// All zeros.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn zeros(shape: &[usize], device: &Device) -> Result<Self> {
        Self::full(0.0, shape, device)
    }

    /// Uniform on `[lo, hi)`, the same for the same key on every device.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn uniform(
        key: RngKey,
        lo: f32,
        hi: f32,
        shape: &[usize],
        device: &Device,
    ) -> Result<Self> {
        let mut values = vec![0.0; numel(shape)];
        key.fill_uniform(lo, hi, &mut values);
        Self::from_vec(values, shape, device)
    }

    /// Normal with the given mean and standard deviation, the same for the same key on every device.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn normal(
        key: RngKey,
        mean: f32,
        std: f32,
        shape: &[usize],
        device: &Device,
    ) -> Result<Self> {
        let mut values = vec![0.0; numel(shape)];
        key.fill_normal(mean, std, &mut values);
        Self::from_vec(values, shape, device)
    }

    /// Sizes of the axes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        numel(&self.shape)
    }

    /// Size of the last axis; 1 for a scalar.
    pub fn last_dim(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Both sizes of a matrix.
    ///
    /// # Errors
    /// If there are not two axes.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match *self.shape() {
            [a, b] => Ok((a, b)),
            _ => shape_err(
                "dims2",
                format!("expected two axes, got shape {:?}", self.shape()),
            ),
        }
    }

    /// The sizes of three axes.
    ///
    /// # Errors
    /// If there are not three axes.
    pub fn dims3(&self) -> Result<(usize, usize, usize)> {
        match *self.shape() {
            [a, b, c] => Ok((a, b, c)),
            _ => shape_err(
                "dims3",
                format!("expected three axes, got shape {:?}", self.shape()),
            ),
        }
    }

    /// Where the values are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether [`Tensor::backward`] passes here.
    pub fn requires_grad(&self) -> bool {
        self.target.wanted()
    }

    /// The same values as the start of a graph: a parameter.
    #[must_use]
    pub fn leaf(&self) -> Self {
        Self {
            target: Target::new(&self.shape, None),
            // A recipe would keep the graph alive that this one has left.
            keeping: Keeping::default(),
            ..self.clone()
        }
    }

    /// The same values without history.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self {
            target: Target(None),
            keeping: Keeping::default(),
            ..self.clone()
        }
    }

    pub(crate) fn with_node(&self, node: Backward) -> Self {
        Self {
            target: Target::new(&self.shape, Some(node)),
            ..self.clone()
        }
    }

    /// self + other, reusing the buffer if nobody else holds it.
    pub(crate) fn accumulated(self, other: &Self) -> Result<Self> {
        let Self {
            data,
            shape,
            device,
            ..
        } = self;
        Ok(Self::from_buffer(
            device.backend().accumulate(data, &other.data)?,
            shape,
            &device,
        ))
    }

    /// Values in row-major order.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.device().backend().download(&self.data)
    }

    /// The same, without a copy where they are in memory.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn values(&self) -> Result<Cow<'_, [f32]>> {
        match self.device().backend().view(&self.data) {
            Some(values) => Ok(Cow::Borrowed(values)),
            None => self.to_vec().map(Cow::Owned),
        }
    }

    /// Values of many tensors of one device, each given up as soon as it is read. Where values have to be fetched from a
    /// device, this waits for it once.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn into_vecs(all: Vec<Self>) -> Result<Vec<Vec<f32>>> {
        let Some(first) = all.first() else {
            return Ok(Vec::new());
        };
        let device = first.device().clone();
        device
            .backend()
            .download_all(all.into_iter().map(|x| x.data).collect())
    }

    /// Values in double precision (true ones on the reference device).
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        self.device().backend().download_f64(&self.data)
    }

    /// Values as an `ndarray` array.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn to_array(&self) -> Result<ArrayD<f32>> {
        ArrayD::from_shape_vec(IxDyn(self.shape()), self.to_vec()?)
            .or_else(|e| shape_err("to_array", e.to_string()))
    }

    /// The one value of a tensor that has one.
    ///
    /// # Errors
    /// If there is more than one.
    pub fn item(&self) -> Result<f32> {
        match self.to_vec()?[..] {
            [value] => Ok(value),
            _ => shape_err(
                "item",
                format!("expected one element, got shape {:?}", self.shape()),
            ),
        }
    }

    /// The same values on another device, without history.
    ///
    /// # Errors
    /// Whatever the devices say.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same(device) {
            return Ok(self.detach());
        }
        Self::from_f64(self.to_f64()?, self.shape(), device)
    }

    /// Gradients of this scalar for every leaf it depends on. Takes the tensor, so that what the forward pass kept
    /// is freed as the backward pass goes.
    ///
    /// # Errors
    /// If this is not a scalar, or nothing it was made of wants a gradient.
    pub fn backward(self) -> Result<Grads> {
        if self.numel() != 1 {
            return shape_err(
                "backward",
                format!("needs a scalar, got shape {:?}", self.shape()),
            );
        }
        if !self.requires_grad() {
            return shape_err("backward", "nothing this loss was made of is trainable");
        }
        tape::backward(self)
    }

    pub(crate) fn same_device(&self, other: &Self, op: &'static str) -> Result<()> {
        if self.device().same(other.device()) {
            return Ok(());
        }
        shape_err(
            op,
            format!(
                "operands are on {:?} and {:?}",
                self.device(),
                other.device()
            ),
        )
    }
}

/// Number of elements of a shape.
pub(crate) fn numel(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor{:?}@{:?}", self.shape(), self.device())
    }
}
