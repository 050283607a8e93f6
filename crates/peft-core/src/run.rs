//! Running a network module by module, through the adapters stacked on each.

use std::sync::atomic::Ordering;

use peft_tensor::{BaseWeight, Tensor, concat, grad_enabled};

use crate::attach::Slot;
use crate::call::{AttentionCall, Call, Input, NormFn, Stacked};
use crate::{
    Error, ModuleId, ModuleKind, Network, Param, Pass, Prefix, PrefixCx, PromptCx, PromptLabel,
    PromptPlace, Result,
};

/// Rows up to which the products of several modules are worth doing together.
const SWEPT: usize = 16;

impl Network {
    fn base_weight(&self, name: &str) -> Result<BaseWeight> {
        let weight = self
            .base
            .weight(name)
            .ok_or_else(|| Error::other(format!("the base model has no parameter {name:?}")))?;
        Ok(match self.base_params.get(name) {
            Some(param) => BaseWeight::dense(param.tensor(), self.base.is_conv1d(name)),
            None => weight.clone(),
        })
    }

    pub(crate) fn vector(&self, name: &str) -> Result<Tensor> {
        if let Some(param) = self.base_params.get(name) {
            return Ok(param.tensor());
        }
        match self.vectors.get(name) {
            Some(value) => Ok(value.clone()),
            None => self.param(name),
        }
    }

    /// A base parameter as a tensor in its stored layout: for small ones that are no module's weight.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn param(&self, name: &str) -> Result<Tensor> {
        if let Some(param) = self.base_params.get(name) {
            return Ok(param.tensor());
        }
        crate::attach::stored_values(&self.base_weight(name)?)
    }

    /// A module's weight: the trained or frozen stand-in of an active adapter, or the base's.
    pub(crate) fn weight_of(&self, id: ModuleId) -> Result<Option<BaseWeight>> {
        let info = self.tree().info(id);
        let Some(name) = &info.weight else {
            return Ok(None);
        };
        match self.selected.get(&(id, Slot::Weight)) {
            Some(param) => Ok(Some(self.stand_in(id, param))),
            None => match self.replaced.get(&id) {
                Some(weight) => Ok(Some(weight.clone())),
                None => self.base_weight(name).map(Some),
            },
        }
    }

    /// The base's own weight of a module, whatever stands in for it.
    pub(crate) fn own_weight(&self, id: ModuleId) -> Result<Option<BaseWeight>> {
        let name = self.tree().info(id).weight.as_ref();
        name.map(|name| self.base_weight(name)).transpose()
    }

    /// A trained weight in a module's place. It is kept in the layout of HF's class, whatever the checkpoint's.
    pub(crate) fn stand_in(&self, id: ModuleId, param: &Param) -> BaseWeight {
        BaseWeight::dense(
            param.tensor(),
            self.tree().info(id).kind == ModuleKind::Conv1d,
        )
    }

    pub(crate) fn bias_of(&self, id: ModuleId) -> Result<Option<Tensor>> {
        match (
            self.selected.get(&(id, Slot::Bias)),
            &self.tree().info(id).bias,
        ) {
            (Some(param), _) => Ok(Some(param.tensor())),
            (None, Some(name)) => self.vector(name).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// The adapters on a module, innermost first, as far as they act in its layer.
    pub(crate) fn stack(&self, id: ModuleId) -> &[Stacked] {
        if self.is_skipped(id) {
            return &[];
        }
        self.stacks.get(&id).map_or(&[][..], Vec::as_slice)
    }

    fn is_skipped(&self, id: ModuleId) -> bool {
        let skipped = self.skipped.load(Ordering::Relaxed);
        self.tree()
            .info(id)
            .layer
            .is_some_and(|layer| layer < skipped)
    }

    /// Runs a module through the adapters on it.
    pub(crate) fn call(&self, id: ModuleId, input: Input<'_>, pass: &Pass) -> Result<Tensor> {
        if pass.adapter_names.is_some() {
            return self.call_by_rows(id, input, pass);
        }
        let run = || {
            if let Some(merged) = self.merged.as_ref().and_then(|m| m.get(&id)) {
                return Call {
                    input,
                    below: &[],
                    current: None,
                    weight: Some(&merged.weight),
                    bias: merged.bias.as_ref(),
                    pass,
                }
                .base();
            }
            let (mut weight, bias) = (self.weight_of(id)?, self.bias_of(id)?);
            if matches!(input, Input::Norm { .. }) {
                weight = Some(self.effective_norm(id, &self.norm_weight(id)?)?);
            }
            Call {
                input,
                below: self.stack(id),
                current: None,
                weight: weight.as_ref(),
                bias: bias.as_ref(),
                pass,
            }
            .base()
        };
        run().map_err(|e| self.named(id, e))
    }

    /// A norm's weight as it multiplies.
    pub(crate) fn effective_norm(&self, id: ModuleId, stored: &Tensor) -> Result<BaseWeight> {
        let offset = self.tree().info(id).offset;
        let weight = if offset == 0.0 {
            stored.clone()
        } else {
            stored.affine(1.0, offset)?
        };
        Ok(BaseWeight::dense(weight, false))
    }

    /// A Linear or Conv1D module: `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn linear(&self, id: ModuleId, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.call(id, Input::Rows(x), pass)
    }

    /// Several such modules on the same `x`: what [`linear`](Self::linear) gives for each. Few rows without a gradient, as
    /// in generation, go through all base weights in one sweep.
    ///
    /// # Errors
    /// If `x` does not fit one.
    pub fn linear_all<const N: usize>(
        &self,
        ids: [ModuleId; N],
        x: &Tensor,
        pass: &Pass,
    ) -> Result<[Tensor; N]> {
        let rows = x.numel() / x.last_dim().max(1);
        let mut outs = Vec::with_capacity(N);
        let mut weights = Vec::with_capacity(N);
        if rows <= SWEPT && !grad_enabled() && pass.adapter_names.is_none() {
            for id in ids {
                let merged = self.merged.as_ref().and_then(|m| m.get(&id));
                weights.extend(match merged {
                    Some(merged) => Some(merged.weight.clone()),
                    None => self.weight_of(id)?,
                });
            }
        }
        if weights.len() == N {
            let all: Vec<&BaseWeight> = weights.iter().collect();
            // What does not fit is named below, by its module.
            let products = BaseWeight::linear_all(&all, x).unwrap_or_default();
            for (id, y) in ids.into_iter().zip(&products) {
                outs.push(self.call(id, Input::Product { x, y }, pass)?);
            }
        }
        if outs.is_empty() {
            for id in ids {
                outs.push(self.linear(id, x, pass)?);
            }
        }
        let wrong = |outs: Vec<Tensor>| Error::other(format!("{} of {N} outputs", outs.len()));
        outs.try_into().map_err(wrong)
    }

    /// An Embedding module: `[ids, dim]`.
    ///
    /// # Errors
    /// If an id is out of range.
    pub fn embed(&self, id: ModuleId, ids: &[u32], pass: &Pass) -> Result<Tensor> {
        self.call(id, Input::Ids(ids), pass)
    }

    /// Where a sublayer's output `x` meets its residual: `norm(x + residual)`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn junction(
        &self,
        id: ModuleId,
        x: &Tensor,
        residual: &Tensor,
        norm: Option<NormFn<'_>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        self.call(id, Input::Junction { x, residual, norm }, pass)
    }

    fn norm_weight(&self, id: ModuleId) -> Result<Tensor> {
        let info = self.tree().info(id);
        if let Some(merged) = self.merged.as_ref().and_then(|m| m.get(&id)) {
            return crate::attach::stored_values(&merged.weight);
        }
        match (self.selected.get(&(id, Slot::Weight)), &info.weight) {
            (Some(param), _) => Ok(param.tensor()),
            (None, Some(name)) => self.vector(name),
            (None, None) => Err(Error::module(&info.path, "has no weight")),
        }
    }

    /// A place that hidden states `[batch, seq, dim]` pass.
    ///
    /// # Errors
    /// Whatever the adapters there return.
    pub fn stream(&self, id: ModuleId, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        if self.stacks.contains_key(&id) {
            self.call(id, Input::Stream(x), pass)
        } else {
            Ok(x.clone())
        }
    }

    /// A layer's attention: `[batch, seq, heads * head_dim]`, before the output projection.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn attention(&self, id: ModuleId, at: &AttentionCall<'_>, pass: &Pass) -> Result<Tensor> {
        if self.stacks.contains_key(&id) {
            self.call(id, Input::Attention(at), pass)
        } else {
            Ok(at.q.attention(&at.k, &at.v, at.spec)?)
        }
    }

    /// Whether all active adapters make each row from that row alone ([`crate::Adapter::by_rows`]).
    pub fn by_rows(&self) -> bool {
        let mut placed = self.stacks.values().flatten();
        self.roots.is_empty() && !self.is_average() && placed.all(|s| s.adapter.by_rows())
    }

    /// Whether no adapter is at a module: each row of its output then comes from that row of its input alone.
    pub fn is_bare(&self, id: ModuleId) -> bool {
        !self.stacks.contains_key(&id)
    }

    fn needs_stack(&self, id: ModuleId, pass: &Pass) -> bool {
        pass.adapter_names.is_some() || (self.merged.is_none() && !self.stack(id).is_empty())
    }

    /// An RMSNorm whose weight is `weight + offset` (Gemma's offset is 1).
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn rms_norm(
        &self,
        id: ModuleId,
        x: &Tensor,
        eps: f32,
        offset: f32,
        pass: &Pass,
    ) -> Result<Tensor> {
        let apply = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
            crate::call::with_bias(x.rms_norm(weight, eps)?, bias)
        };
        if self.needs_stack(id, pass) {
            return self.call(id, Input::Norm { x, apply: &apply }, pass);
        }
        let mut weight = self.norm_weight(id)?;
        if offset != 0.0 {
            weight = weight.affine(1.0, offset)?;
        }
        apply(x, &weight, self.merged_bias(id).as_ref()).map_err(|e| self.named(id, e))
    }

    /// A bias that a merge brought to a module without one.
    fn merged_bias(&self, id: ModuleId) -> Option<Tensor> {
        self.merged.as_ref()?.get(&id)?.bias.clone()
    }

    pub(crate) fn named(&self, id: ModuleId, e: Error) -> Error {
        match e {
            Error::Tensor(e) => Error::of_module(&self.tree().info(id).path, e),
            e => e,
        }
    }

    /// A LayerNorm.
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn layer_norm(&self, id: ModuleId, x: &Tensor, eps: f32, pass: &Pass) -> Result<Tensor> {
        if self.needs_stack(id, pass) {
            let apply = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
                Ok(x.layer_norm(weight, bias, eps)?)
            };
            return self.call(id, Input::Norm { x, apply: &apply }, pass);
        }
        let merged = self.merged.as_ref().and_then(|m| m.get(&id));
        let bias = match merged {
            Some(m) => m.bias.clone(),
            None => self.bias_of(id)?,
        };
        let weight = self.norm_weight(id)?;
        x.layer_norm(&weight, bias.as_ref(), eps)
            .map_err(|e| Error::of_module(&self.tree().info(id).path, e))
    }

    /// Any module by its path, for programs without a model: `x [.., in] -> [.., out]`.
    ///
    /// # Errors
    /// If there is no such module, or `x` does not fit.
    pub fn run(&self, path: &str, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let id = self.module(path)?;
        let info = self.tree().info(id);
        match info.kind {
            ModuleKind::Linear | ModuleKind::Conv1d => self.linear(id, x, pass),
            kind => Err(Error::module(
                path,
                format!("is of kind {}; run takes Linear and Conv1D", kind.name()),
            )),
        }
    }

    /// A module's weight as it runs now (merged or not, without adapters beside it), in its logical shape.
    ///
    /// # Errors
    /// If the module has none.
    pub fn weight(&self, id: ModuleId) -> Result<Tensor> {
        let merged = self
            .merged
            .as_ref()
            .and_then(|m| m.get(&id))
            .map(|m| m.weight.clone());
        let weight = match merged {
            Some(weight) => Some(weight),
            None => self.weight_of(id)?,
        };
        let weight =
            weight.ok_or_else(|| Error::module(&self.tree().info(id).path, "has no weight"))?;
        Ok(weight.to_dense()?.detach())
    }

    /// The module at `path`.
    ///
    /// # Errors
    /// If there is none, with the nearest names.
    pub fn module(&self, path: &str) -> Result<ModuleId> {
        self.tree().get(path).ok_or_else(|| {
            let nearest = crate::nearest(path, self.tree().iter().map(|(_, m)| m.path.as_str()));
            Error::NoMatch {
                field: "module".to_owned(),
                name: path.to_owned(),
                nearest,
            }
        })
    }

    fn around(&self, attention: ModuleId) -> impl Iterator<Item = &Stacked> {
        self.roots
            .iter()
            .chain(self.stacks.get(&attention).into_iter().flatten())
    }

    /// Keys and values to put in front of a layer's own, `[P, kv]` or `[batch, P, kv]`; `hidden` is what the layer
    /// projects its own from.
    ///
    /// # Errors
    /// Whatever the adapters return.
    pub fn prefix(
        &self,
        attention: ModuleId,
        hidden: &Tensor,
        pass: &Pass,
    ) -> Result<Option<Prefix>> {
        if self.is_skipped(attention) {
            return Ok(None);
        }
        let layer = self.tree().info(attention).layer.unwrap_or(0);
        let batch = hidden.shape().first().copied().unwrap_or(0);
        let mut all = Vec::new();
        for stacked in self.around(attention) {
            let at = PrefixCx {
                layer,
                facts: self.tree().facts(),
                batch,
                hidden,
                pass,
            };
            all.extend(stacked.adapter.prefix(&at)?);
        }
        if all.is_empty() {
            return Ok(None);
        }
        if pass.adapter_names.is_some() {
            return Err(Error::config(
                "adapter_names",
                "an active adapter puts keys and values in front of every layer, which all rows of a batch share",
            ));
        }
        let k = all.iter().map(|p| p.k.clone()).collect();
        let v = all.iter().map(|p| p.v.clone()).collect();
        Ok(Some(Prefix {
            k: in_a_row(k, batch)?,
            v: in_a_row(v, batch)?,
        }))
    }

    /// Positions [`Network::prefix`] adds to every layer.
    pub fn prefix_len(&self) -> usize {
        self.roots.iter().map(|s| s.adapter.prefix_len()).sum()
    }

    /// What rotary positions are divided by.
    pub fn position_scale(&self) -> f32 {
        let all = self.roots.iter().map(|s| s.adapter.position_scale());
        all.product()
    }

    /// Virtual tokens to put in front of the input embeddings, `[V, hidden]` or `[batch, V, hidden]`.
    ///
    /// # Errors
    /// Whatever the adapters return.
    pub fn prompt(&self, batch: usize, pass: &Pass) -> Result<Option<Tensor>> {
        if let Some(names) = &pass.adapter_names {
            return self.prompt_by_rows(names, pass);
        }
        self.prompts_at(PromptPlace::Input, batch, pass)
    }

    /// Virtual tokens that come in at `place`, `[V, hidden]` or `[batch, V, hidden]`.
    ///
    /// # Errors
    /// Whatever the adapters return, or if rows are given to adapters by name.
    pub fn prompts_at(
        &self,
        place: PromptPlace,
        batch: usize,
        pass: &Pass,
    ) -> Result<Option<Tensor>> {
        let mut all = Vec::new();
        let there = |s: &&Stacked| s.adapter.prompt_place() == place;
        for stacked in self.roots.iter().filter(there) {
            all.extend(self.prompt_of(stacked, batch, pass)?);
        }
        if all.is_empty() {
            return Ok(None);
        }
        if pass.adapter_names.is_some() {
            let detail =
                "virtual tokens behind the embeddings are the same for all rows of a batch";
            return Err(Error::config("adapter_names", detail));
        }
        in_a_row(all, batch).map(Some)
    }

    pub(crate) fn prompt_of(
        &self,
        stacked: &Stacked,
        batch: usize,
        pass: &Pass,
    ) -> Result<Option<Tensor>> {
        stacked.adapter.prompt(&PromptCx {
            facts: self.tree().facts(),
            batch,
            pass,
        })
    }

    /// Tokens to be said inside the virtual tokens of [`Network::prompt`].
    pub fn prompt_labels(&self) -> Vec<PromptLabel> {
        let (mut all, mut first) = (Vec::new(), 0);
        for stacked in &self.roots {
            let labels = stacked.adapter.prompt_labels().into_iter();
            all.extend(labels.map(|label| PromptLabel {
                position: first + label.position,
                ..label
            }));
            first += stacked.adapter.prompt_len();
        }
        all
    }

    /// Positions [`Network::prompt`] adds.
    pub fn prompt_len(&self) -> usize {
        self.roots.iter().map(|s| s.adapter.prompt_len()).sum()
    }
}

/// Parts `[n, dim]` or `[batch, n, dim]` behind each other; if any differs by row, all are given their rows.
fn in_a_row(mut parts: Vec<Tensor>, batch: usize) -> Result<Tensor> {
    if parts.iter().any(|p| p.rank() == 3) {
        for part in &mut parts {
            if let [n, dim] = *part.shape() {
                *part = part.reshape(&[1, n, dim])?.broadcast_to(&[batch, n, dim])?;
            }
        }
    }
    let axis = parts.first().map_or(0, |p| p.rank() - 2);
    Ok(concat(&parts.iter().collect::<Vec<_>>(), axis)?)
}
