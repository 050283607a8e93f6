//! A module's call on its way through the adapters stacked on it.

use std::ops::Range;
use std::sync::Arc;

use peft_tensor::{Attention, BaseWeight, RngKey, Tensor};

use crate::{Adapter, Error, Result, Site};

/// One run of the model.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Whether dropout acts.
    pub train: bool,
    /// Where this step's randomness comes from; each module forks it by its path.
    pub key: RngKey,
    /// Blocks in front of the one of this number are computed again in the backward pass: 0 is none, `usize::MAX` all.
    pub checkpoint: usize,
    /// Task of each row, for methods that learn several.
    pub task_ids: Option<Arc<Vec<u32>>>,
    /// The adapter that acts on each row of the batch, None being the base model; without it, all active ones act on all
    /// rows.
    pub adapter_names: Option<Arc<Vec<Option<String>>>>,
    /// Where the rows' tokens are; models set it.
    pub tokens: Option<Arc<Tokens>>,
    /// Whether gradients are to be the true slopes also where a method's paper takes something as constant:
    /// [`Call::stop`].
    pub exact: bool,
}

/// The tokens of one run.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Rows.
    pub batch: usize,
    /// Positions of a row in this run, virtual ones included.
    pub seq: usize,
    /// Positions of a row that were run before and are cached.
    pub seen: usize,
    /// Virtual tokens at the start of this run's positions.
    pub virtual_tokens: usize,
    /// Which positions are no padding, `[batch * (seen + seq)]`; None = all.
    pub mask: Option<Arc<Vec<bool>>>,
    /// Which of several texts in its row each position belongs to, `[batch * seq]`; None = one text a row.
    pub segments: Option<Arc<Vec<u32>>>,
}

impl Tokens {
    /// The real tokens of a row, neither virtual nor padding, as a range of this run's positions. Padding between tokens
    /// is taken as part of them.
    pub fn span(&self, row: usize) -> Range<usize> {
        let first = self.virtual_tokens.min(self.seq);
        let Some(mask) = &self.mask else {
            return first..self.seq;
        };
        let width = self.seen + self.seq;
        let row = mask
            .get(row * width + self.seen..(row + 1) * width)
            .unwrap_or(&[]);
        let real = |&at: &usize| at >= first && row[at];
        match ((0..row.len()).find(real), (0..row.len()).rev().find(real)) {
            (Some(start), Some(last)) => start..last + 1,
            _ => first..first,
        }
    }
}

impl Pass {
    /// For methods that treat a row as one text, that count its positions or average over it.
    ///
    /// # Errors
    /// If several texts share a row.
    pub fn whole_rows(&self) -> Result<()> {
        let packed = self.tokens.as_ref().is_some_and(|t| t.segments.is_some());
        if packed {
            return Err(Error::other(
                "the method treats a row as one text; several packed into one do not work with it",
            ));
        }
        Ok(())
    }

    /// Without dropout.
    pub fn eval() -> Self {
        Self {
            train: false,
            key: RngKey::new(0),
            checkpoint: 0,
            task_ids: None,
            adapter_names: None,
            tokens: None,
            exact: false,
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
    /// Rows `x` whose product `y` with the base weight is known already.
    Product {
        x: &'a Tensor,
        y: &'a Tensor,
    },
    Ids(&'a [u32]),
    Junction {
        x: &'a Tensor,
        residual: &'a Tensor,
        norm: Option<NormFn<'a>>,
    },
    /// A norm: `apply` takes its effective weight and its bias.
    Norm {
        x: &'a Tensor,
        apply: ApplyFn<'a>,
    },
    Stream(&'a Tensor),
    Attention(&'a AttentionCall<'a>),
}

/// A norm's arithmetic on whatever weight and bias it is given.
pub(crate) type ApplyFn<'a> = &'a dyn Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>;

/// Maps the hidden states of some tokens to a layer's keys and values.
pub type ProjectFn<'a> = &'a dyn Fn(&Tensor) -> Result<(Tensor, Tensor)>;

/// A layer's attention as an adapter on it sees it.
#[derive(Clone)]
pub struct AttentionCall<'a> {
    /// Queries `[batch, seq, heads * head_dim]`, rotated.
    pub q: Tensor,
    /// Keys `[batch, total, kv_heads * head_dim]`, rotated, those of prefixes and cached tokens in front.
    pub k: Tensor,
    /// Values of the same shape.
    pub v: Tensor,
    /// Heads, scale and mask.
    pub spec: &'a Attention,
    /// The sublayer's input `[batch, seq, hidden]`, normed where the model norms in front.
    pub hidden: &'a Tensor,
    /// This layer's keys and values for any `[batch, n, hidden]`, not rotated.
    pub project: ProjectFn<'a>,
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
    /// The input `[.., in]` of a linear layer or a norm, the sublayer's output of a junction, the hidden states of a
    /// stream, the input of an attention sublayer.
    ///
    /// # Errors
    /// If the module is an embedding.
    pub fn x(&self) -> Result<&'a Tensor> {
        match self.input {
            Input::Rows(x)
            | Input::Product { x, .. }
            | Input::Junction { x, .. }
            | Input::Norm { x, .. }
            | Input::Stream(x) => Ok(x),
            Input::Attention(call) => Ok(call.hidden),
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

    /// The attention this module is.
    ///
    /// # Errors
    /// If the module is none.
    pub fn attention(&self) -> Result<&'a AttentionCall<'a>> {
        match self.input {
            Input::Attention(call) => Ok(call),
            _ => Err(self.wrong("is no attention")),
        }
    }

    /// What attention gives for other queries, keys and values, without this adapter.
    ///
    /// # Errors
    /// If the module is no attention, or shapes do not fit.
    pub fn base_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spec: &Attention,
    ) -> Result<Tensor> {
        let given = self.attention()?;
        let call = AttentionCall {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            spec,
            ..given.clone()
        };
        Call {
            input: Input::Attention(&call),
            below: self.below,
            current: self.current,
            weight: None,
            bias: None,
            pass: self.pass,
        }
        .base()
    }

    /// `t` as a constant: no gradient flows into it, except where [`Pass::exact`] asks for the true slope.
    pub fn stop(&self, t: &Tensor) -> Tensor {
        if self.pass.exact {
            t.clone()
        } else {
            t.detach()
        }
    }

    /// Whether the module is called with ids.
    pub fn is_embedding(&self) -> bool {
        matches!(self.input, Input::Ids(_))
    }

    /// Whether the module is where a sublayer meets its residual.
    pub fn is_junction(&self) -> bool {
        matches!(self.input, Input::Junction { .. })
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
            Input::Product { y, .. } => with_bias(y.clone(), self.bias),
            Input::Ids(ids) => Ok(self.weight()?.gather(ids)?),
            Input::Junction { x, residual, norm } => {
                let sum = x.add(residual)?;
                match norm {
                    Some(norm) => norm(&sum),
                    None => Ok(sum),
                }
            }
            Input::Norm { x, apply } => apply(x, &self.weight()?.to_dense()?, self.bias),
            Input::Stream(x) => Ok(x.clone()),
            Input::Attention(at) => Ok(at.q.attention(&at.k, &at.v, at.spec)?),
        }
    }

    /// What a linear module gives without this adapter, and `scale * x Aᵀ Bᵀ`, a `[r, in]`, b `[out, r]`: in one pass over the
    /// output where nothing is in between.
    ///
    /// # Errors
    /// Whatever the layers below return.
    pub fn base_and_low_rank(&self, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
        match self.input {
            Input::Rows(x) if self.below.is_empty() => {
                with_bias(self.weight()?.linear_low_rank(x, a, b, scale)?, self.bias)
            }
            _ => {
                let low = self.x()?.matmul_t(a)?;
                Ok(self.base()?.plus_matmul_t(&low, b, scale)?)
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
            Input::Stream(_) => Input::Stream(x),
            Input::Norm { .. } | Input::Attention(_) => {
                return Err(self.wrong("takes no other input"));
            }
            Input::Rows(_) | Input::Product { .. } | Input::Ids(_) => Input::Rows(x),
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
        let Some(changed) = adapter.weight(below)? else {
            return self.base();
        };
        let mut bias = self.bias.cloned();
        for stacked in self.below {
            bias = stacked.adapter.bias(bias)?;
        }
        bias = adapter.bias(bias)?;
        match self.input {
            Input::Rows(x) | Input::Product { x, .. } => {
                with_bias(x.matmul_t(&changed)?, bias.as_ref())
            }
            Input::Ids(ids) => Ok(changed.gather_rows(ids)?),
            Input::Norm { x, apply } => apply(x, &changed, bias.as_ref()),
            Input::Junction { .. } | Input::Stream(_) | Input::Attention(_) => self.base(),
        }
    }
}

/// W as the stacked adapters leave it.
pub(crate) fn fold_weight(stack: &[Stacked], mut w: Tensor) -> Result<Tensor> {
    for stacked in stack {
        if let Some(changed) = stacked.adapter.weight(w.clone())? {
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
