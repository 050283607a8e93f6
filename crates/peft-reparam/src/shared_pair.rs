//! A pair of factors of a module's own, and one that it may come to share with others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peft_core::{Adapter, Call, Result, Tensor};

use crate::factors::Pair;

/// One module's pair, or its use of a shared one. Clones share everything.
#[derive(Clone)]
pub(crate) struct Layer {
    /// The module's.
    pub(crate) path: String,
    /// Modules of one kind share a pair.
    pub(crate) kind: String,
    /// None where it is known from the start that it shares.
    own: Option<Pair>,
    /// None where it is known from the start that it does not share.
    shared: Option<Pair>,
    shares: Arc<AtomicBool>,
    /// Sum of its squared outputs and their number; None once it is decided who shares.
    measured: Arc<Mutex<Option<[f32; 2]>>>,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layer({})", self.path)
    }
}

impl Layer {
    /// With both pairs it is open whether it shares.
    pub(crate) fn new(path: &str, kind: String, own: Option<Pair>, shared: Option<Pair>) -> Self {
        let open = own.is_some() && shared.is_some();
        Self {
            path: path.to_owned(),
            kind,
            shares: Arc::new(AtomicBool::new(own.is_none())),
            measured: Arc::new(Mutex::new(open.then_some([0.0; 2]))),
            own,
            shared,
        }
    }

    /// The pair to share.
    pub(crate) fn shared(&self) -> Option<&Pair> {
        self.shared.as_ref()
    }

    /// Whether it shares now.
    pub(crate) fn shares(&self) -> bool {
        self.shares.load(Ordering::Relaxed)
    }

    /// Sum of its squared outputs while training, and their number; None once it is decided who shares.
    pub(crate) fn measured(&self) -> MutexGuard<'_, Option<[f32; 2]>> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mean square of its outputs.
    pub(crate) fn importance(&self) -> f32 {
        let [sum, count] = self.measured().unwrap_or_default();
        sum / count.max(1.0)
    }

    /// From now on one pair acts, and is trained.
    pub(crate) fn decide(&self, shares: bool) {
        self.shares.store(shares, Ordering::Relaxed);
        *self.measured() = None;
        if shares {
            let (own, shared) = (self.own.iter(), self.shared.iter());
            own.flat_map(Pair::params)
                .for_each(|p| p.set_trainable(false));
            shared
                .flat_map(Pair::params)
                .for_each(|p| p.set_trainable(true));
        }
    }

    fn acting(&self) -> Option<&Pair> {
        if self.shares() {
            &self.shared
        } else {
            &self.own
        }
        .as_ref()
    }

    fn change(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        let Some(pair) = self.acting() else {
            return Ok(None);
        };
        let y = pair.change(call)?;
        if let Some([sum, count]) = self.measured().as_mut().filter(|_| call.pass().train) {
            *sum += y.detach().square()?.sum_all()?.item()?;
            *count += (y.numel() / y.last_dim().max(1)) as f32;
        }
        Ok(Some(y))
    }
}

impl Adapter for Layer {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        match self.acting() {
            Some(pair) => pair.weight(w),
            None => Ok(Some(w)),
        }
    }

    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        match self.acting() {
            Some(pair) => pair.bias(b),
            None => Ok(b),
        }
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let base = call.base()?;
        match self.change(call)? {
            Some(change) => Ok(base.add(&change)?),
            None => Ok(base),
        }
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        self.change(call)
    }
}
