//! Sparse differences: `W' = W + D` where D has few entries, which is what the methods that train single entries of
//! weights have in common.
//!
//! One form, on disk and in memory: per module the entries' values `[k]` and their places `[2, k]` (rows, then columns, of
//! the weight as `[out, in]` or `[rows, dim]`; a vector is one row). Until a method has chosen its entries all of them
//! train: the values are the whole of D row by row, and there are no places. Choosing shortens both, so that the
//! optimiser's moments and weight decay never see an entry that is not trained.

use std::sync::{Arc, Mutex, PoisonError};

use peft_core::peft_tensor::{TensorError, checkpoint};
use peft_core::{
    Adapter, Attach, BaseWeight, Call, Error, Grads, Init, ModuleKind, Param, Result, RngKey, Site,
    Tensor, Tensors, TrainData,
};

use crate::places::{Entries, Places};
use crate::select::select;

/// Most elements of the sparse product's intermediate result; above, the dense weight is cheaper.
const PRODUCT: usize = 1 << 24;
/// The dense weight is used where more than one entry in this many is trained.
const DENSITY: usize = 32;

/// Names of the two tensors on disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    pub(crate) values: &'static str,
    pub(crate) indices: &'static str,
}

/// Those of this library.
pub(crate) const SPARSE: Names = Names {
    values: "sparse_values",
    indices: "sparse_indices",
};

/// Kinds of modules whose weights can have a sparse difference.
pub(crate) const KINDS: &[ModuleKind] = &[
    ModuleKind::Linear,
    ModuleKind::Conv1d,
    ModuleKind::Embedding,
    ModuleKind::Norm,
];

/// The difference of one module's weight.
pub(crate) struct Difference {
    names: Names,
    path: String,
    values: Param,
    places: Places,
    /// A vector is one row.
    rows: usize,
    cols: usize,
    vector: bool,
    base: BaseWeight,
    key: RngKey,
}

impl Difference {
    /// Path of the module.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The trained values: of all entries row by row, or of the chosen ones.
    pub(crate) fn values(&self) -> &Param {
        &self.values
    }

    /// Entries the weight has.
    pub(crate) fn size(&self) -> usize {
        self.rows * self.cols
    }

    /// Rows and columns.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Whether the weight is a vector.
    pub(crate) fn is_vector(&self) -> bool {
        self.vector
    }

    /// Randomness of this module's own.
    pub(crate) fn key(&self) -> RngKey {
        self.key
    }

    /// Whether all entries train, because none were chosen yet.
    pub(crate) fn is_dense(&self) -> bool {
        self.places.is_empty() && self.size() > 0 && self.values.numel() == self.size()
    }

    /// The base weight's entries, row by row.
    pub(crate) fn base(&self) -> Result<Vec<f32>> {
        Ok(self.base.to_dense()?.to_vec()?)
    }

    /// Absolute values of the base weight, row by row.
    pub(crate) fn base_magnitudes(&self) -> Result<Vec<f32>> {
        Ok(self.base()?.iter().map(|w| w.abs()).collect())
    }

    /// Absolute values of the difference, row by row, while it is dense.
    pub(crate) fn magnitudes(&self) -> Result<Vec<f32>> {
        Ok(self
            .values
            .tensor()
            .to_vec()?
            .iter()
            .map(|d| d.abs())
            .collect())
    }

    fn wrong(&self, detail: String) -> Error {
        Error::module(&self.path, detail)
    }

    /// The places, as the file or the choice has them; None while the difference is dense.
    fn entries(&self) -> Result<Option<Arc<Entries>>> {
        if self.is_dense() {
            return Ok(None);
        }
        let found = self.places.entries(self.dims(), |detail| {
            self.wrong(format!("{}: {detail}", self.names.indices))
        })?;
        if found.len() != self.values.numel() {
            return Err(self.wrong(counts(self.names, "", self.values.numel(), found.len())));
        }
        Ok(Some(found))
    }

    /// D, as large as the weight: `[rows, cols]`.
    fn dense(&self, entries: Option<&Entries>) -> Result<Tensor> {
        let values = self.values.tensor();
        let Some(at) = entries else {
            return Ok(values.reshape(&[self.rows, self.cols])?);
        };
        let flat = at.flat(self.cols);
        let column = values.reshape(&[at.len(), 1])?;
        Ok(column
            .scatter_rows(&flat, self.size())?
            .reshape(&[self.rows, self.cols])?)
    }

    /// `x Dᵀ` from the entries alone; what is computed on the way is not kept for the backward pass.
    fn product(&self, x: &Tensor, at: Arc<Entries>) -> Result<Tensor> {
        let mut shape = x.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.rows;
        }
        let rows = self.rows;
        let y = checkpoint(&[x, &self.values.tensor()], move |inputs| {
            let [x, values] = inputs else {
                return Err(TensorError::Shape {
                    op: "sparse product",
                    detail: "takes two tensors".to_owned(),
                });
            };
            let picked = x.flatten_rows()?.t()?.gather_rows(&at.cols)?;
            let parts = picked.mul(&values.reshape(&[at.len(), 1])?)?;
            parts.scatter_rows(&at.rows, rows)?.t()
        })?;
        Ok(y.reshape(&shape)?)
    }

    /// Rows `ids` of D, `[ids, cols]`; None where they are zero.
    fn looked_up(&self, ids: &[u32], at: &Entries) -> Result<Option<Tensor>> {
        let (mut which, mut flat) = (Vec::new(), Vec::new());
        for (position, id) in ids.iter().enumerate() {
            for entry in at.in_row(*id) {
                which.push(entry as u32);
                flat.push((position * self.cols) as u32 + at.cols[entry]);
            }
        }
        if which.is_empty() {
            return Ok(None);
        }
        let column = self.values.tensor().reshape(&[at.len(), 1])?;
        let rows = column
            .gather_rows(&which)?
            .scatter_rows(&flat, ids.len() * self.cols)?;
        Ok(Some(rows.reshape(&[ids.len(), self.cols])?))
    }

    /// Values at `flat`, entries counted row by row, from values of all.
    fn picked(&self, all: &Tensor, flat: &[u32]) -> Result<(Tensor, Tensor)> {
        let device = all.device();
        let cols = (self.cols as u32).max(1);
        let places = flat
            .iter()
            .map(|i| (i / cols) as f32)
            .chain(flat.iter().map(|i| (i % cols) as f32));
        let places = Tensor::from_vec(places.collect(), &[2, flat.len()], device)?;
        let values = if flat.is_empty() {
            Tensor::zeros(&[0], device)?
        } else {
            all.reshape(&[self.size(), 1])?
                .gather_rows(flat)?
                .reshape(&[flat.len()])?
        };
        Ok((values, places))
    }

    /// Trains these entries and no others from now on, from 0 or from what they are.
    pub(crate) fn keep(&self, flat: &[u32], rewind: bool) -> Result<()> {
        let present = self.values.tensor().detach();
        let all = if self.is_dense() && !rewind {
            present
        } else {
            Tensor::zeros(&[self.size()], present.device())?
        };
        let (values, places) = self.picked(&all, flat)?;
        self.places.set(places)?;
        self.values.set(values)?;
        // No gradient ever comes to a tensor without elements.
        self.values.set_trainable(!flat.is_empty());
        Ok(())
    }

    /// Trains all entries from now on, from 0.
    pub(crate) fn widen(&self) -> Result<()> {
        let device = self.values.tensor().device().clone();
        self.places.set(Tensor::zeros(&[2, 0], &device)?)?;
        self.values.set(Tensor::zeros(&[self.size()], &device)?)
    }

    /// In an exported adapter: the nonzero entries of a dense difference instead of all.
    fn export(&self, params: &mut Tensors) -> Result<()> {
        let find = |name: &str| {
            let key = format!("base_model.model.{}.{name}", self.path);
            params.contains_key(&key).then_some(key)
        };
        let (Some(values), Some(indices)) = (find(self.names.values), find(self.names.indices))
        else {
            return Ok(());
        };
        let (Some(all), Some(places)) = (params.get(&values), params.get(&indices)) else {
            return Ok(());
        };
        if places.numel() > 0 || self.size() == 0 || all.numel() != self.size() {
            return Ok(());
        }
        let nonzero: Vec<u32> = all
            .to_vec()?
            .iter()
            .zip(0..)
            .filter(|(v, _)| **v != 0.0)
            .map(|(_, i)| i)
            .collect();
        let (picked, places) = self.picked(all, &nonzero)?;
        params.insert(values, picked);
        params.insert(indices, places);
        Ok(())
    }
}

fn counts(names: Names, before: &str, values: usize, places: usize) -> String {
    format!(
        "{before}{} has {values} entries, {before}{} has {places}",
        names.values, names.indices
    )
}

/// The difference as an adapter.
pub(crate) struct At(pub(crate) Arc<Difference>);

impl Adapter for At {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let entries = self.0.entries()?;
        if entries.as_ref().is_some_and(|e| e.len() == 0) {
            return Ok(Some(w));
        }
        let change = self.0.dense(entries.as_deref())?.reshape(w.shape())?;
        Ok(Some(w.plus(&change)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let Some(at) = self.0.entries()? else {
            return call.through_weight(self);
        };
        if at.len() == 0 {
            return call.base();
        }
        if call.is_embedding() {
            let base = call.base()?;
            return match self.0.looked_up(call.ids()?, &at)? {
                Some(change) => Ok(base.add(&change)?),
                None => Ok(base),
            };
        }
        if self.0.vector {
            return call.through_weight(self);
        }
        let x = call.x()?;
        let tokens = x.numel() / self.0.cols.max(1);
        if at.len() * DENSITY > self.0.size() || at.len() * tokens > PRODUCT {
            return call.through_weight(self);
        }
        Ok(call.base()?.add(&self.0.product(x, at)?)?)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        if self.0.vector || call.is_embedding() {
            return Ok(None);
        }
        let entries = self.0.entries()?;
        Ok(Some(
            call.x()?.matmul_t(&self.0.dense(entries.as_deref())?)?,
        ))
    }
}

/// What one adapter has at its sites, in their order, shared by its method and its hooks.
pub(crate) struct Shared<T>(Arc<Mutex<Vec<Arc<T>>>>);

/// The differences of one adapter.
pub(crate) type Differences = Shared<Difference>;

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> std::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({})", self.all().len())
    }
}

impl<T> Shared<T> {
    /// Those made so far.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// One more, at the end.
    pub(crate) fn add(&self, one: T) -> Arc<T> {
        let one = Arc::new(one);
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(one.clone());
        one
    }
}

impl Shared<Difference> {
    /// Makes the difference of one site: with all entries trained if `dense`, else with none yet. One that is about to be
    /// loaded has none: the file says which.
    pub(crate) fn make(
        &self,
        site: &Site,
        cx: &mut Attach<'_>,
        names: Names,
        dense: bool,
    ) -> Result<Arc<Difference>> {
        let (rows, cols) = match site.kind {
            ModuleKind::Embedding => (site.in_features, site.out_features),
            ModuleKind::Norm => (1, site.out_features),
            _ => (site.out_features, site.in_features),
        };
        let size = rows
            .checked_mul(cols)
            .filter(|n| u32::try_from(*n).is_ok())
            .ok_or_else(|| {
                Error::module(
                    &site.path,
                    "has more than 4294967295 weights, the most that are counted",
                )
            })?;
        let base = cx.base_weight()?.clone();
        let start = if dense && !cx.common().inference_mode {
            size
        } else {
            0
        };
        let made = self.add(Difference {
            names,
            path: site.path.clone(),
            values: cx.ragged(names.values, &[start], &Init::Zeros)?,
            places: Places::new(cx.integers(names.indices, &[2, 0], &Init::Zeros)?),
            rows,
            cols,
            vector: site.kind == ModuleKind::Norm,
            base,
            key: cx.key("entries"),
        });
        if start == 0 {
            made.values.set_trainable(false);
        }
        Ok(made)
    }

    /// Whether there is something that trains all of its entries.
    pub(crate) fn is_dense(&self) -> bool {
        self.all()
            .iter()
            .any(|d| d.values.is_trainable() && d.is_dense())
    }

    /// How many entries a share of all of them is.
    pub(crate) fn budget(&self, field: &str, share: f64) -> Result<usize> {
        let all: usize = self.all().iter().map(|d| d.size()).sum();
        let kept = (share * all as f64).round() as usize;
        if !(share > 0.0 && share <= 1.0) || kept == 0 {
            let least = 0.5 / all.max(1) as f64;
            let detail = format!(
                "is the share of {all} weights to train, from {least:.1e} (one of them) to 1; it is {share}"
            );
            return Err(Error::config(field, detail));
        }
        Ok(kept)
    }

    /// Trains, of all modules together, the `budget` entries with the largest (or smallest) scores.
    pub(crate) fn choose(
        &self,
        budget: usize,
        largest: bool,
        rewind: bool,
        mut scores: impl FnMut(usize, &Difference) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let all = self.all();
        let flat = select(all.len(), budget, largest, |i| {
            let found = scores(i, &all[i])?;
            match found.iter().position(|s| !s.is_finite()) {
                Some(at) => {
                    let detail = format!("the score of weight {at} is not finite");
                    Err(Error::module(all[i].path(), detail))
                }
                None => Ok(found),
            }
        })?;
        all.iter()
            .zip(&flat)
            .try_for_each(|(d, flat)| d.keep(flat, rewind))
    }

    /// The gradients of each of `batches`, folded into one number per entry, module by module. All entries have to be
    /// trained at the time.
    pub(crate) fn over_gradients(
        &self,
        data: &dyn TrainData,
        batches: &[Vec<usize>],
        fold: impl Fn(&mut [f32], &[f32]),
    ) -> Result<Vec<Vec<f32>>> {
        let all = self.all();
        let mut sums: Vec<Vec<f32>> = all.iter().map(|d| vec![0.0; d.size()]).collect();
        for rows in batches {
            let (_, grads) = data.gradient(rows)?;
            self.fold_gradients(&grads, &mut sums, &fold)?;
        }
        Ok(sums)
    }

    /// One step's gradients, folded as above, and the entries' own gradients put in place of those of all once `choose`
    /// has run: what a loop without rows to ask about does at its first step.
    pub(crate) fn choose_from_step(
        &self,
        grads: &mut Grads,
        fold: impl Fn(&mut [f32], &[f32]),
        choose: impl FnOnce(&[Vec<f32>]) -> Result<()>,
    ) -> Result<()> {
        let all = self.all();
        let mut sums: Vec<Vec<f32>> = all.iter().map(|d| vec![0.0; d.size()]).collect();
        self.fold_gradients(grads, &mut sums, &fold)?;
        let dense: Vec<_> = all.iter().map(|d| grads.take(&d.values.tensor())).collect();
        choose(&sums)?;
        for (d, dense) in all.iter().zip(dense) {
            if let (Some(dense), Some(at)) = (dense, d.entries()?)
                && at.len() > 0
            {
                let flat = at.flat(d.cols);
                grads.set(&d.values.tensor(), d.picked(&dense, &flat)?.0);
            }
        }
        Ok(())
    }

    fn fold_gradients(
        &self,
        grads: &Grads,
        sums: &mut [Vec<f32>],
        fold: &impl Fn(&mut [f32], &[f32]),
    ) -> Result<()> {
        for (d, sum) in self.all().iter().zip(sums) {
            if let Some(grad) = grads.get(&d.values.tensor()) {
                fold(sum, &grad.to_vec()?);
            }
        }
        Ok(())
    }

    /// [`peft_core::PeftMethod::save`]: a dense difference becomes its nonzero entries.
    pub(crate) fn save(&self, mut params: Tensors) -> Result<Tensors> {
        self.all()
            .iter()
            .try_for_each(|d| d.export(&mut params))
            .map(|()| params)
    }
}

/// [`peft_core::PeftMethod::load`]: there have to be as many values as places.
pub(crate) fn check_pairs(names: Names, params: Tensors) -> Result<Tensors> {
    for (key, values) in &params {
        let Some(module) = key.strip_suffix(names.values) else {
            continue;
        };
        let Some(places) = params.get(&format!("{module}{}", names.indices)) else {
            continue; // Reported with everything else that is missing.
        };
        let pair = (values.shape(), places.shape());
        if !matches!(pair, ([n], [2, m]) if n == m) {
            let (n, m) = (values.numel(), places.numel() / 2);
            return Err(Error::other(counts(names, module, n, m)));
        }
    }
    Ok(params)
}

/// The parts of a [`peft_core::PeftMethod`] that every method of sparse differences has: it acts on all linear layers unless
/// told otherwise, and its files hold `self.found`.
macro_rules! sparse_method {
    () => {
        fn kinds(&self) -> &'static [peft_core::ModuleKind] {
            $crate::sparse::KINDS
        }

        fn default_targets(&self, _tree: &peft_core::ModuleTree) -> Option<peft_core::Targets> {
            Some(peft_core::Targets::AllLinear)
        }

        fn save(&self, params: peft_core::Tensors) -> peft_core::Result<peft_core::Tensors> {
            self.found.save(params)
        }

        fn load(&self, params: peft_core::Tensors) -> peft_core::Result<peft_core::Tensors> {
            $crate::sparse::check_pairs($crate::sparse::SPARSE, params)
        }
    };
}
pub(crate) use sparse_method;

#[cfg(test)]
#[path = "sparse_tests.rs"]
mod tests;
