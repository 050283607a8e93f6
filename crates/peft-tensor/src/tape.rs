//! The reverse-mode tape.
//!
//! There is no tape object: a tensor that may need a gradient holds the function that passes its gradient on to
//! what it was made of. Ids grow with creation, so "largest id first" is a valid reverse order, and a heap that is
//! fed while it runs is all the traversal there is. That also lets a recomputed block hand gradients to tensors the
//! outer pass has not met yet: whatever is older than the block goes back to the outer heap.

use std::cell::Cell;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::shape_err;
use crate::kept::{Keeping, Kept, Recipe};
use crate::{Buffer, Device, Result, Tensor, memo};

/// Passes the gradient of one tensor on to its parents.
pub(crate) type Backward = Box<dyn Fn(&Tensor, &mut Grads) -> Result<()> + Send + Sync>;

/// A place a gradient can go to: a leaf, or a step of the graph. It holds no values, so an operation that only needs
/// to know whom to pass a gradient to keeps no activation alive.
pub(crate) struct Var {
    id: u64,
    shape: Vec<usize>,
    node: Option<Backward>,
}

/// A gradient and where it goes.
type Pending = (Arc<Var>, Tensor);

/// Where the gradient of an operand goes; nowhere if it wants none.
#[derive(Clone)]
pub(crate) struct Target(pub(crate) Option<Arc<Var>>);

impl Target {
    /// A new place of that shape.
    pub(crate) fn new(shape: &[usize], node: Option<Backward>) -> Self {
        Self(Some(Arc::new(Var {
            id: next_id(),
            shape: shape.to_vec(),
            node,
        })))
    }

    /// Whether a gradient is wanted.
    pub(crate) fn wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Whether it is the result of an operation, and not a parameter.
    pub(crate) fn is_step(&self) -> bool {
        self.0.as_ref().is_some_and(|var| var.node.is_some())
    }

    fn id(&self) -> u64 {
        self.0.as_ref().map_or(0, |v| v.id)
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static ENABLED: Cell<bool> = const { Cell::new(true) };
    /// Whether an operation saw a tensor that wants a gradient, recording or not.
    static TOUCHED: Cell<bool> = const { Cell::new(false) };
}

pub(crate) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// Whether operations on this thread record their gradients.
pub fn grad_enabled() -> bool {
    ENABLED.get()
}

/// Puts a thread-local switch back when it goes out of scope, also on early return.
struct Restore(&'static std::thread::LocalKey<Cell<bool>>, bool);

impl Drop for Restore {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

fn with_grad<R>(on: bool, f: impl FnOnce() -> R) -> R {
    let _restore = Restore(&ENABLED, ENABLED.replace(on));
    f()
}

/// Runs `f` without recording: for evaluation, generation and weight updates.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    with_grad(false, f)
}

/// Makes the result of an operation; `backward` is only asked for if a parent wants a gradient.
pub(crate) fn record(
    data: Buffer,
    shape: Vec<usize>,
    device: &Device,
    parents: &[&Tensor],
    backward: impl FnOnce() -> Backward,
) -> Tensor {
    let wanted = parents.iter().any(|p| p.requires_grad());
    if wanted {
        TOUCHED.set(true);
    }
    let mut out = Tensor::from_buffer(data, shape, device);
    if wanted && grad_enabled() {
        out.target = Target::new(&out.shape, Some(backward()));
    }
    out
}

/// As [`record`], for a result that is cheaper to make again than to keep.
pub(crate) fn record_again(
    data: Buffer,
    shape: Vec<usize>,
    device: &Device,
    parents: &[&Tensor],
    recipe: impl FnOnce() -> Recipe,
    backward: impl FnOnce() -> Backward,
) -> Tensor {
    let mut out = record(data, shape, device, parents, backward);
    if out.target.is_step() {
        out.keeping = Keeping::again(recipe());
    }
    out
}

/// Gradients by tensor: what [`Tensor::backward`] returns for the leaves.
#[derive(Default)]
pub struct Grads {
    /// Where to, and the gradient so far, by the target's id.
    entries: HashMap<u64, Pending>,
    /// Ids of entries that have something to pass on.
    heap: BinaryHeap<u64>,
    /// Entries older than this are not run here but handed to the pass outside.
    floor: u64,
}

impl Grads {
    fn above(floor: u64) -> Self {
        Self {
            floor,
            ..Self::default()
        }
    }

    /// Adds `grad` to the gradient of `target`, if it wants one.
    pub(crate) fn add(&mut self, target: &Target, grad: Tensor) -> Result<()> {
        match &target.0 {
            Some(var) => self.add_var(var, grad),
            None => Ok(()),
        }
    }

    /// Adds to the gradient of `target`, if it wants one, by a function that takes the sum so far and returns the
    /// new one: a product can add to it where it stands.
    pub(crate) fn add_with(
        &mut self,
        target: &Target,
        f: impl FnOnce(Option<Tensor>) -> Result<Tensor>,
    ) -> Result<()> {
        let Some(var) = &target.0 else { return Ok(()) };
        let before = self.entries.remove(&var.id).map(|(_, sum)| sum);
        let first = before.is_none();
        let sum = f(before)?;
        if var.shape != sum.shape() {
            return shape_err(
                "backward",
                format!("a gradient {:?} for {:?}", sum.shape(), var.shape),
            );
        }
        if first && var.node.is_some() {
            self.heap.push(var.id);
        }
        self.entries.insert(var.id, (var.clone(), sum));
        Ok(())
    }

    fn add_var(&mut self, var: &Arc<Var>, grad: Tensor) -> Result<()> {
        self.add_with(&Target(Some(var.clone())), |sum| match sum {
            Some(sum) if sum.shape() == grad.shape() => sum.accumulated(&grad),
            _ => Ok(grad),
        })
    }

    /// The gradient of a leaf, if anything depended on it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.entries.get(&leaf.target.id()).map(|(_, g)| g)
    }

    /// Takes the gradient of a leaf out.
    pub fn take(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.entries.remove(&leaf.target.id()).map(|(_, g)| g)
    }

    /// Puts a gradient in place of what was there (clipping, projection); nothing happens if `leaf` wants none.
    pub fn set(&mut self, leaf: &Tensor, grad: Tensor) {
        if let Some(var) = &leaf.target.0 {
            self.entries.insert(var.id, (var.clone(), grad));
        }
    }

    /// Number of tensors that have a gradient here.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing has a gradient.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds all gradients of another pass (gradient accumulation).
    ///
    /// # Errors
    /// Whatever the device says of the additions.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        other
            .sorted()
            .into_iter()
            .try_for_each(|(var, grad)| self.add_var(&var, grad))
    }

    /// Entries in a fixed order, so that sums do not depend on the hash map's.
    fn sorted(self) -> Vec<Pending> {
        let mut entries: Vec<_> = self.entries.into_values().collect();
        entries.sort_by_key(|(var, _)| var.id);
        entries
    }

    fn run(&mut self) -> Result<()> {
        while let Some(id) = self.heap.pop() {
            if id < self.floor {
                self.heap.push(id);
                break;
            }
            let Some((var, grad)) = self.entries.remove(&id) else {
                continue;
            };
            if let Some(backward) = &var.node {
                no_grad(|| backward(&grad, self))?;
            }
        }
        Ok(())
    }
}

pub(crate) fn backward(loss: Tensor) -> Result<Grads> {
    let mut grads = Grads::default();
    let one = Tensor::full(1.0, loss.shape(), loss.device())?;
    grads.add(&loss.target, one)?;
    // The graph is only held by the entries from here on, so activations go as soon as they are used.
    drop(loss);
    grads.run()?;
    Ok(grads)
}

/// Copies of `inputs` that start a graph of their own.
fn fresh_leaves(inputs: &[Tensor]) -> Vec<Tensor> {
    inputs
        .iter()
        .map(|t| {
            if t.requires_grad() {
                t.leaf()
            } else {
                t.clone()
            }
        })
        .collect()
}

/// Runs `f` on copies of `inputs`, differentiates its result against what `against` makes of it first, and returns the
/// gradients of the inputs and of whatever else it depends on, which may be older steps of the graph outside, with what else
/// is to stay of the result.
fn differentiate<R>(
    inputs: &[Tensor],
    against: impl FnOnce(&Tensor) -> Result<(Tensor, R)>,
    f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<(R, Vec<Pending>)> {
    let floor = next_id();
    let leaves = fresh_leaves(inputs);
    let value = with_grad(true, || f(&leaves))?;
    let (dy, out) = against(&value)?;
    if !value.requires_grad() {
        return Ok((out, Vec::new()));
    }
    let mut inner = Grads::above(floor);
    inner.add(&value.target, dy)?;
    drop(value);
    inner.run()?;
    let mut kept = Vec::with_capacity(inner.len());
    for (input, leaf) in inputs.iter().zip(&leaves) {
        if let (Some(var), Some(g)) = (&input.target.0, inner.take(leaf)) {
            kept.push((var.clone(), g));
        }
    }
    kept.extend(inner.sorted());
    Ok((out, kept))
}

/// A backward function that runs `f` again for its gradient.
pub(crate) fn rerun(
    inputs: Vec<Tensor>,
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Backward {
    let inputs: Vec<Kept> = inputs.iter().map(Kept::new).collect();
    Box::new(move |dy, outer| {
        let inputs = inputs.iter().map(Kept::whole).collect::<Result<Vec<_>>>()?;
        let ((), grads) = differentiate(&inputs, |_| Ok((dy.clone(), ())), &f)?;
        grads
            .into_iter()
            .try_for_each(|(var, g)| outer.add_var(&var, g))
    })
}

/// Runs `f` without keeping what it computes on the way, but for outputs of attention over many keys
/// ([`Attention::is_kept`](crate::Attention::is_kept)), and runs it again in the backward pass.
///
/// `f` must give the same result both times (dropout takes its mask from a key, so it does). Tensors that `f` holds
/// besides `inputs`, parameters above all, get their gradients too.
///
/// # Errors
/// Whatever `f` returns.
pub fn checkpoint<F>(inputs: &[&Tensor], f: F) -> Result<Tensor>
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
{
    let inputs: Vec<Tensor> = inputs.iter().map(|&t| t.clone()).collect();
    if !grad_enabled() {
        return f(&inputs);
    }
    let before = TOUCHED.replace(false);
    let (out, memo) = memo::first(|| no_grad(|| f(&inputs)));
    let touched = TOUCHED.replace(before) || inputs.iter().any(Tensor::requires_grad);
    let out = out?;
    if !touched {
        return Ok(out);
    }
    TOUCHED.set(true);
    Ok(out.with_node(rerun(inputs, move |inputs| {
        memo::again(&memo, || f(inputs))
    })))
}

/// A loss made in pieces, each differentiated as soon as it is there (a chunk of logits at a time), where neither keeping
/// nor recomputing the pieces is wanted: all that stays of them is the sum of their gradients.
#[derive(Default)]
pub struct Eager(Grads);

impl Eager {
    /// Runs `f` to a scalar and returns its value without history. Its gradient counts `weight` times.
    ///
    /// # Errors
    /// Whatever `f` returns.
    pub fn piece<F>(&mut self, inputs: &[&Tensor], weight: f32, f: F) -> Result<Tensor>
    where
        F: FnOnce(&[Tensor]) -> Result<Tensor>,
    {
        let inputs: Vec<Tensor> = inputs.iter().map(|&t| t.clone()).collect();
        if !grad_enabled() {
            return f(&inputs);
        }
        let against = |value: &Tensor| {
            let dy = Tensor::full(weight, value.shape(), value.device())?;
            Ok((dy, value.detach()))
        };
        let (value, grads) = differentiate(&inputs, against, f)?;
        for (var, grad) in grads {
            self.0.add_var(&var, grad)?;
        }
        Ok(value)
    }

    /// `value`, made of the pieces' values, with the gradients of all of them.
    #[must_use]
    pub fn finish(self, value: &Tensor) -> Tensor {
        let kept = self.0.sorted();
        if kept.is_empty() {
            return value.detach();
        }
        TOUCHED.set(true);
        value.with_node(Box::new(move |dy, outer| {
            let factor = dy.item()?;
            kept.iter()
                .try_for_each(|(var, g)| outer.add_var(var, g.scale(factor)?))
        }))
    }
}

/// Runs `f` to a scalar and differentiates it at once, keeping only gradients: [`Eager`] with one piece.
///
/// # Errors
/// Whatever `f` returns.
pub fn eager<F>(inputs: &[&Tensor], f: F) -> Result<Tensor>
where
    F: FnOnce(&[Tensor]) -> Result<Tensor>,
{
    let mut pieces = Eager::default();
    let value = pieces.piece(inputs, 1.0, f)?;
    Ok(pieces.finish(&value))
}
