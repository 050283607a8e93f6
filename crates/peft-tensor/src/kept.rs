//! What the backward pass will want of a tensor, held as cheaply as it can be.
//!
//! The output of a norm, a gate or an activation function is made again from its input, which is kept anyway; what has to
//! be kept is handed to the device, which may pack it. So an operation says what it needs and not how it is stored.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::tape::Target;
use crate::{Buffer, Device, Result, Tensor};

/// Makes a tensor's values again.
pub(crate) type Recipe = Arc<dyn Fn() -> Result<Buffer> + Send + Sync>;

/// A recipe and those that wait for what it makes: the first of several makes it for all.
struct Again {
    recipe: Recipe,
    /// How many wait, and what was made if some still do.
    state: Mutex<(usize, Option<Buffer>)>,
}

impl Again {
    fn wait(self: &Arc<Self>) -> Arc<Self> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        self.clone()
    }

    fn make(&self) -> Result<Buffer> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = state.0.saturating_sub(1);
        let made = match state.1.take() {
            Some(made) => made,
            None => (self.recipe)()?,
        };
        if state.0 > 0 {
            state.1 = Some(made.clone());
        }
        Ok(made)
    }
}

/// How a tensor can be kept; shared by its clones and its views of another shape.
#[derive(Clone, Default)]
pub(crate) struct Keeping {
    again: Option<Arc<Again>>,
    packed: Arc<OnceLock<Buffer>>,
}

impl Keeping {
    /// Not at all, as long as there is a recipe.
    pub(crate) fn again(recipe: Recipe) -> Self {
        Self {
            again: Some(Arc::new(Again {
                recipe,
                state: Mutex::default(),
            })),
            ..Self::default()
        }
    }
}

/// A tensor that waits for the backward pass.
#[derive(Clone)]
pub(crate) struct Kept {
    held: Held,
    shape: Arc<[usize]>,
    device: Device,
    /// Where its gradient goes.
    pub(crate) target: Target,
}

#[derive(Clone)]
enum Held {
    Whole(Buffer),
    Packed(Buffer),
    Again(Arc<Again>),
}

impl Kept {
    pub(crate) fn new(x: &Tensor) -> Self {
        let held = match &x.keeping.again {
            Some(again) => Held::Again(again.wait()),
            // A parameter or a constant is alive elsewhere: packing it would be a second copy.
            None if !x.target.is_step() => Held::Whole(x.data.clone()),
            None => Held::of(&x.data, &x.keeping, x.device()),
        };
        Self {
            held,
            shape: x.shape.clone(),
            device: x.device().clone(),
            target: x.target.clone(),
        }
    }

    /// The result of an operation that wants it for its own backward pass, before there is a tensor of it.
    pub(crate) fn result(data: &Buffer, keeping: &Keeping, like: &Tensor) -> Self {
        Self {
            held: Held::of(data, keeping, like.device()),
            shape: like.shape.clone(),
            device: like.device().clone(),
            target: Target(None),
        }
    }

    /// How a tensor of these values can be kept: as they are.
    pub(crate) fn keeping(&self) -> Keeping {
        let keeping = Keeping::default();
        if let Held::Packed(packed) = &self.held {
            keeping.packed.get_or_init(|| packed.clone());
        }
        keeping
    }

    /// Where it is.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The values, as the device packed them if it did.
    pub(crate) fn packed(&self) -> Result<Buffer> {
        match &self.held {
            Held::Whole(data) | Held::Packed(data) => Ok(data.clone()),
            Held::Again(again) => again.make(),
        }
    }

    /// The values.
    pub(crate) fn data(&self) -> Result<Buffer> {
        match &self.held {
            Held::Whole(data) => Ok(data.clone()),
            Held::Packed(data) => self.device.backend().unpack(data),
            Held::Again(again) => again.make(),
        }
    }

    /// The tensor without history.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        Ok(self.wrap(self.data()?))
    }

    /// The tensor as it was, its place in the graph included.
    pub(crate) fn whole(&self) -> Result<Tensor> {
        let mut tensor = self.tensor()?;
        tensor.target = self.target.clone();
        Ok(tensor)
    }

    /// A tensor of the same shape: its gradient.
    pub(crate) fn wrap(&self, data: Buffer) -> Tensor {
        Tensor::from_buffer(data, self.shape.clone(), &self.device)
    }
}

impl Held {
    fn of(data: &Buffer, keeping: &Keeping, device: &Device) -> Self {
        if let Some(packed) = keeping.packed.get() {
            return Self::Packed(packed.clone());
        }
        match device.backend().pack(data) {
            Some(packed) => Self::Packed(keeping.packed.get_or_init(|| packed).clone()),
            None => Self::Whole(data.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FrozenWeight, Glu, RngKey};

    fn random(seed: u64, shape: &[usize]) -> Tensor {
        Tensor::normal(RngKey(seed), 0.0, 1.0, shape, &Device::cpu()).unwrap()
    }

    /// Holders of a tensor's values beside the tensor itself.
    fn holders(x: &Tensor) -> usize {
        x.data.holders() - 1
    }

    #[test]
    fn what_is_made_again_is_made_once_for_all_that_wait() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let (made, values) = (Arc::new(AtomicUsize::new(0)), random(7, &[6]));
        let (count, data) = (made.clone(), values.data.clone());
        let mut x = random(8, &[6]);
        x.keeping = Keeping::again(Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(data.clone())
        }));
        let holders_before = holders(&values);
        let all = [Kept::new(&x), Kept::new(&x), Kept::new(&x)];
        for kept in &all {
            assert_eq!(
                kept.tensor().unwrap().to_vec().unwrap(),
                values.to_vec().unwrap()
            );
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
        assert_eq!(
            holders(&values),
            holders_before,
            "nobody waits: nothing is held"
        );
        // Who asks later, or again, gets it all the same.
        Kept::new(&x).data().unwrap();
        all[0].data().unwrap();
        assert_eq!(made.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn what_can_be_made_again_is_not_kept() {
        let x = random(0, &[2, 5, 8]).leaf();
        let (w, a) = (random(1, &[8]), random(2, &[3, 8]).leaf());
        let frozen = FrozenWeight::from_f32(8, 8, random(3, &[64]).to_vec().unwrap()).unwrap();
        let base = crate::BaseWeight::frozen(frozen, false, &Device::cpu());
        let normed = x.rms_norm(&w, 1e-6).unwrap();
        let gate = base.linear(&normed).unwrap();
        let up = base
            .linear(&normed.dropout(0.5, RngKey(3)).unwrap())
            .unwrap();
        let low = normed.matmul_t(&a).unwrap();
        let act = gate.glu(Glu::Silu, &up).unwrap();
        let out = act.matmul_t(&a).unwrap().add(&low).unwrap();
        assert_eq!((holders(&normed), holders(&act)), (0, 0));
        assert!(holders(&gate) > 0 && holders(&up) > 0 && holders(&x) > 0);
        let again = Kept::new(&act).tensor().unwrap();
        assert_eq!(again.to_vec().unwrap(), act.to_vec().unwrap());
        drop((normed, act));
        assert!(out.sum_all().unwrap().backward().unwrap().get(&a).is_some());
    }
}
