//! A module's call on its way through the adapters stacked on it.

use std::sync::Arc;

use peft_tensor::{BaseWeight, RngKey, Tensor};

use crate::{Adapter, Error, Result, Site};

/// One run of the model.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Whether dropout acts.
    pub train: bool,
    /// Where this step's randomness comes from; each module forks it by its path.
    pub key: RngKey,
    /// Whether layers are recomputed in the backward pass.
    pub checkpoint: bool,
    /// Task of each row, for methods that learn several.
    pub task_ids: Option<Arc<Vec<u32>>>,
}

impl Pass {
    /// Without dropout.
    pub fn eval() -> Self {
        Self {
            train: false,
            key: RngKey::new(0),
            checkpoint: false,
            task_ids: None,
        }
    }

    /// With dropout, its masks decided by `key`.
    pub fn train(key: RngKey) -> Self {
        Self {
            train: true,
            key,
            ..Self::eval()
        }
    }
}

/// Maps a sublayer's sum to what the next one sees.
pub(crate) type NormFn<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;

#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    Rows(&'a Tensor),
    Ids(&'a [u32]),
    Junction {
        x: &'a Tensor,
        residual: &'a Tensor,
        norm: Option<NormFn<'a>>,
    },
}

/// One adapter of a module's stack, innermost first.
pub(crate) struct Stacked {
    pub(crate) name: String,
    pub(crate) site: Site,
    pub(crate) adapter: Arc<dyn Adapter>,
    /// Whether this adapter is the other side of a tied pair and merges along with it.
    pub(crate) mirrored: bool,
}

/// A call of one module, seen by one of the adapters on it: what is below is [`Call::base`].
pub struct Call<'a> {
    pub(crate) input: Input<'a>,
    pub(crate) below: &'a [Stacked],
    pub(crate) current: Option<&'a Stacked>,
    pub(crate) weight: Option<&'a BaseWeight>,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) pass: &'a Pass,
}

impl<'a> Call<'a> {
    /// The input `[.., in]` of a linear layer, or the sublayer's output of a junction.
    ///
    /// # Errors
    /// If the module is an embedding.
    pub fn x(&self) -> Result<&'a Tensor> {
        match self.input {
            Input::Rows(x) | Input::Junction { x, .. } => Ok(x),
            Input::Ids(_) => Err(self.wrong("takes ids, not a tensor")),
        }
    }

    /// The ids of an embedding's call.
    ///
    /// # Errors
    /// If the module is no embedding.
    pub fn ids(&self) -> Result<&'a [u32]> {
        match self.input {
            Input::Ids(ids) => Ok(ids),
            _ => Err(self.wrong("takes a tensor, not ids")),
        }
    }

    /// Whether the module is called with ids.
    pub fn is_embedding(&self) -> bool {
        matches!(self.input, Input::Ids(_))
    }

    /// The residual of a junction.
    ///
    /// # Errors
    /// If the module is none.
    pub fn residual(&self) -> Result<&'a Tensor> {
        match self.input {
            Input::Junction { residual, .. } => Ok(residual),
            _ => Err(self.wrong("has no residual")),
        }
    }

    /// The model's norm of a junction; None where it has none there.
    ///
    /// # Errors
    /// Whatever the norm returns.
    pub fn norm(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match self.input {
            Input::Junction {
                norm: Some(norm), ..
            } => norm(x).map(Some),
            _ => Ok(None),
        }
    }

    fn wrong(&self, what: &str) -> Error {
        let path = self.current.map_or("", |s| &s.site.path);
        Error::module(path, format!("its call {what}"))
    }

    /// The base weight, in whatever format it is stored.
    ///
    /// # Errors
    /// If the module has none.
    pub fn weight(&self) -> Result<&'a BaseWeight> {
        self.weight.ok_or_else(|| self.wrong("has no weight"))
    }

    /// The base bias.
    pub fn bias(&self) -> Option<&'a Tensor> {
        self.bias
    }

    /// The pass.
    pub fn pass(&self) -> &'a Pass {
        self.pass
    }

    /// What the module gives without this adapter.
    ///
    /// # Errors
    /// Whatever the layers below return.
    pub fn base(&self) -> Result<Tensor> {
        if let Some((top, below)) = self.below.split_last() {
            return top.adapter.forward(&Self {
                below,
                current: Some(top),
                ..*self
            });
        }
        match self.input {
            Input::Rows(x) => with_bias(self.weight()?.linear(x)?, self.bias),
            Input::Ids(ids) => Ok(self.weight()?.gather(ids)?),
            Input::Junction { x, residual, norm } => {
                let sum = x.add(residual)?;
                match norm {
                    Some(norm) => norm(&sum),
                    None => Ok(sum),
                }
            }
        }
    }

    /// What the module gives for another input, without this adapter.
    ///
    /// # Errors
    /// Whatever the layers below return.
    pub fn base_with(&self, x: &Tensor) -> Result<Tensor> {
        let input = match self.input {
            Input::Junction { residual, norm, .. } => Input::Junction { x, residual, norm },
            _ => Input::Rows(x),
        };
        Call { input, ..*self }.base()
    }

    /// `x` with dropout while training, its mask decided by the step, this module and this adapter.
    ///
    /// # Errors
    /// If `p` is not in `[0, 1)`.
    pub fn dropout(&self, x: &Tensor, p: f32) -> Result<Tensor> {
        if !self.pass.train || p == 0.0 {
            return Ok(x.clone());
        }
        let mut key = self.pass.key;
        if let Some(s) = self.current {
            key = key.fork(&s.site.path).fork(&s.name);
        }
        Ok(x.dropout(p, key)?)
    }

    /// The slow forward: the module with the dense weight [`Adapter::weight`] makes. Correct for every adapter that
    /// has that facet; one without it leaves the module as it is.
    ///
    /// # Errors
    /// Whatever the adapters return.
    pub fn through_weight<A: Adapter + ?Sized>(&self, adapter: &A) -> Result<Tensor> {
        let Some(weight) = self.weight else {
            return self.base();
        };
        let below = fold_weight(self.below, weight.to_dense()?)?;
        let Some(changed) = adapter.weight(&below)? else {
            return self.base();
        };
        let mut bias = self.bias.cloned();
        for stacked in self.below {
            bias = stacked.adapter.bias(bias)?;
        }
        bias = adapter.bias(bias)?;
        match self.input {
            Input::Rows(x) => with_bias(x.matmul_t(&changed)?, bias.as_ref()),
            Input::Ids(ids) => Ok(changed.gather_rows(ids)?),
            Input::Junction { .. } => self.base(),
        }
    }
}

/// W as the stacked adapters leave it.
pub(crate) fn fold_weight(stack: &[Stacked], mut w: Tensor) -> Result<Tensor> {
    for stacked in stack {
        if let Some(changed) = stacked.adapter.weight(&w)? {
            w = changed;
        }
    }
    Ok(w)
}

pub(crate) fn with_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(y.add(bias)?),
        None => Ok(y),
    }
}
