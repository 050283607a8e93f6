//! Methods whose weight is the base's plus a change that they can work out: `W' = W + D`.

use peft_core::{Adapter, Call, Result, Tensor};

/// A change D of a weight.
pub(crate) trait Change: Send + Sync {
    /// D, `[out, in]`.
    fn dense(&self) -> Result<Tensor>;

    /// `x Dᵀ` for a call's input x, in the cheapest way there is, with the dropout of training.
    fn applied(&self, call: &Call<'_>) -> Result<Tensor> {
        Ok(call.x()?.matmul_t(&self.dense()?)?)
    }

    /// [`Adapter::by_rows`] of the change: no where values of single rows are dropped.
    fn by_rows(&self) -> bool;
}

/// A change as an adapter.
pub(crate) struct Plus<C>(pub(crate) C);

impl<C: Change> Adapter for Plus<C> {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(w.plus(&self.0.dense()?)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        Ok(call.base()?.add(&self.0.applied(call)?)?)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        self.0.applied(call).map(Some)
    }

    fn by_rows(&self) -> bool {
        self.0.by_rows()
    }
}
