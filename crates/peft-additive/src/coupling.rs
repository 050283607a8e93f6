//! Invertible adapters: additive couplings (NICE, arXiv 1410.8516) behind the embeddings, undone in front of the
//! language-model head (MAD-X, arXiv 2005.00052).

use std::sync::Arc;

use peft_core::peft_tensor::concat;
use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleKind, ModuleTree, Result, Site, Tensor,
};

use crate::activation::{Activation, activation};
use crate::inserted::{Linear, Place};

/// Where hidden states pass behind the embeddings, and the name of the place in front of the head.
pub(crate) const PLACE: &str = "invertible_adapters";
const BACK: &str = "_rev";
/// AdapterHub's kinds; the second cannot run there.
const KINDS: &str = "nice glow";

/// The place behind a model's embeddings.
///
/// # Errors
/// If the model has none.
pub(crate) fn place(tree: &ModuleTree) -> Result<Site> {
    let found = tree
        .iter()
        .find(|(_, m)| m.kind == ModuleKind::Stream && m.path.rsplit('.').next() == Some(PLACE));
    match found {
        Some((id, _)) => Ok(tree.site(id)),
        None => Err(Error::config(
            "inv_adapter",
            format!("the model has no place `{PLACE}` behind its embeddings"),
        )),
    }
}

/// An invertible adapter that is to be made.
pub(crate) struct Form {
    reduction: f64,
    activation: Activation,
}

impl Form {
    /// From the fields `inv_adapter`, `inv_adapter_reduction_factor` and `non_linearity`.
    ///
    /// # Errors
    /// If one of them has no valid value.
    pub(crate) fn new(kind: &str, reduction: Option<f64>, non_linearity: &str) -> Result<Self> {
        let mut kinds = KINDS.split(' ');
        if kinds.next() != Some(kind) {
            let why = if kinds.any(|known| known == kind) {
                "does not run in AdapterHub either"
            } else {
                "is unknown"
            };
            let only = KINDS.split(' ').next().unwrap_or_default();
            let detail = format!("{kind:?} {why}; there is {only:?}");
            return Err(Error::config("inv_adapter", detail));
        }
        Ok(Self {
            reduction: reduction.unwrap_or(2.0),
            activation: activation("non_linearity", non_linearity)?,
        })
    }

    /// Puts it at `site`, and its inverse in front of the head where there is one.
    ///
    /// # Errors
    /// If a width has no room for the bottleneck.
    pub(crate) fn attach(&self, site: Site, cx: &mut Injector<'_>) -> Result<()> {
        let back = cx.tree().get(&format!("{}{BACK}", site.path));
        let mut made = None;
        cx.attach_all(vec![site], |site, cx| {
            let coupling = made.insert(Arc::new(self.coupling(site, cx)?));
            Ok(Box::new(Forth(coupling.clone())))
        })?;
        if let (Some(id), Some(coupling)) = (back, made) {
            cx.place(cx.tree().site(id), Arc::new(Back(coupling)), false);
        }
        Ok(())
    }

    /// The forward half alone.
    ///
    /// # Errors
    /// As [`Form::attach`].
    pub(crate) fn forth(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(Forth(Arc::new(self.coupling(site, cx)?))))
    }

    fn coupling(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Coupling> {
        let first = site.out_features / 2;
        let second = site.out_features - first;
        let at = &mut Place::new(cx, site, None);
        let mut net = |name: &str, inside: usize, out: usize| {
            let width = self.width(inside, at.path())?;
            let init = Init::Normal { std: 0.02 };
            Ok::<_, Error>(Net {
                down: at.linear(&format!("{name}.0"), inside, width, &init)?,
                activation: self.activation,
                up: at.linear(&format!("{name}.2"), width, out, &init)?,
            })
        };
        Ok(Coupling {
            f: net("F", second, first)?,
            g: net("G", first, second)?,
            first,
        })
    }

    fn width(&self, inside: usize, path: &str) -> Result<usize> {
        let width = inside as f64 / self.reduction;
        if width.is_finite() && (1.0..=64.0 * inside as f64).contains(&width) {
            return Ok(width as usize);
        }
        let detail = format!(
            "{} at `{path}`: has to be between 1/64 and {inside}, half the width of the model",
            self.reduction
        );
        Err(Error::config("inv_adapter_reduction_factor", detail))
    }
}

/// Two layers with an activation between.
struct Net {
    down: Linear,
    activation: Activation,
    up: Linear,
}

impl Net {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.up.apply(&(self.activation)(&self.down.apply(x)?)?)
    }
}

/// `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)` on the two halves of the last axis.
struct Coupling {
    f: Net,
    g: Net,
    first: usize,
}

impl Coupling {
    fn halves(&self, x: &Tensor) -> Result<(Tensor, Tensor, usize)> {
        let axis = x.rank().saturating_sub(1);
        let second = x.last_dim().saturating_sub(self.first);
        Ok((
            x.narrow(axis, 0, self.first)?,
            x.narrow(axis, self.first, second)?,
            axis,
        ))
    }

    fn forth(&self, x: &Tensor) -> Result<Tensor> {
        let (x1, x2, axis) = self.halves(x)?;
        let y1 = x1.add(&self.f.apply(&x2)?)?;
        let y2 = x2.add(&self.g.apply(&y1)?)?;
        Ok(concat(&[&y1, &y2], axis)?)
    }

    fn back(&self, y: &Tensor) -> Result<Tensor> {
        let (y1, y2, axis) = self.halves(y)?;
        let x2 = y2.sub(&self.g.apply(&y1)?)?;
        let x1 = y1.sub(&self.f.apply(&x2)?)?;
        Ok(concat(&[&x1, &x2], axis)?)
    }
}

struct Forth(Arc<Coupling>);

impl Adapter for Forth {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        call.base_with(&self.0.forth(call.x()?)?)
    }
}

struct Back(Arc<Coupling>);

impl Adapter for Back {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        call.base_with(&self.0.back(call.x()?)?)
    }
}
