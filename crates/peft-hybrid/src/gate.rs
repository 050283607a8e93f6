//! One part of a composition, weighed by a learned gate.

use std::sync::Arc;

use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleKind, Param, Prefix, PrefixCx, Result,
    Site, Tensor,
};

/// `sigmoid(W x + b)`, averaged over the positions of a row, padding included.
pub(crate) struct Gate {
    /// `[gates, in]`
    weight: Param,
    /// `[gates]`
    bias: Param,
}

impl Gate {
    /// `gates` numbers a row from an input `width` wide.
    pub(crate) fn new(cx: &mut Attach<'_>, gates: usize, width: usize) -> Result<Self> {
        Ok(Self {
            weight: cx.param("gate.weight", &[gates, width], &Init::Normal { std: 0.02 })?,
            bias: cx.param("gate.bias", &[gates], &Init::Zeros)?,
        })
    }

    /// `[batch, 1, gates]` of `x [batch, seq, in]`; `[n, gates]` of rows `[n, in]`.
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        let all = x
            .matmul_t(&self.weight.tensor())?
            .add(&self.bias.tensor())?
            .sigmoid()?;
        match *all.shape() {
            [_, seq, _] => Ok(all.sum_axis(1)?.scale(1.0 / seq.max(1) as f32)?),
            _ => Ok(all),
        }
    }
}

/// An adapter at one module, what it adds weighed.
pub(crate) struct Gated {
    pub(crate) inner: Arc<dyn Adapter>,
    pub(crate) gate: Gate,
    pub(crate) path: String,
}

impl Gated {
    fn part(&self, call: &Call<'_>) -> Result<Tensor> {
        let Some(added) = self.inner.added(call)? else {
            return Err(Error::module(
                &self.path,
                "the method there does not work by adding, so that it cannot be gated",
            ));
        };
        call.pass().whole_rows()?;
        Ok(added.mul(&self.gate.of(&self.inner.reads(call)?)?)?)
    }
}

impl Adapter for Gated {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let part = self.part(call)?;
        if call.is_junction() {
            call.base_with(&call.x()?.add(&part)?)
        } else {
            Ok(call.base()?.add(&part)?)
        }
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        self.part(call).map(Some)
    }
}

/// Keys and values in front of layers, weighed layer by layer.
pub(crate) struct GatedPrefix {
    pub(crate) inner: Arc<dyn Adapter>,
    /// By layer.
    pub(crate) gates: Vec<Gate>,
}

impl GatedPrefix {
    /// Over every layer of the model; `gates` is 1 for keys and values together, 2 for each on its own.
    pub(crate) fn new(
        inner: Arc<dyn Adapter>,
        gates: usize,
        cx: &mut Injector<'_>,
    ) -> Result<Self> {
        let tree = cx.tree();
        let width = tree.facts().hidden_size;
        let layers: Vec<Site> = tree
            .iter()
            .filter(|(_, m)| m.kind == ModuleKind::Attention)
            .map(|(id, _)| tree.site(id))
            .collect();
        let made = layers
            .iter()
            .map(|site| Gate::new(&mut cx.at(site), gates, width));
        Ok(Self {
            gates: made.collect::<Result<_>>()?,
            inner,
        })
    }
}

impl Adapter for GatedPrefix {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        call.base()
    }

    fn prefix(&self, at: &PrefixCx<'_>) -> Result<Option<Prefix>> {
        let (Some(prefix), Some(gate)) = (self.inner.prefix(at)?, self.gates.get(at.layer)) else {
            return Ok(None);
        };
        at.pass.whole_rows()?;
        let g = gate.of(at.hidden)?;
        let last = g.last_dim() - 1;
        let weigh = |t: &Tensor, which: usize| -> Result<Tensor> {
            let t = match *t.shape() {
                [n, width] => t.reshape(&[1, n, width])?,
                _ => t.clone(),
            };
            Ok(t.mul(&g.narrow(2, which, 1)?)?)
        };
        Ok(Some(Prefix {
            k: weigh(&prefix.k, 0)?,
            v: weigh(&prefix.v, last)?,
        }))
    }

    fn prefix_len(&self) -> usize {
        self.inner.prefix_len()
    }

    fn has_prefix(&self) -> bool {
        self.inner.has_prefix()
    }
}
