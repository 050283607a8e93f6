//! The optimiser as the loop sees it: AdamW by the processor, or by the device that has the parameters.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;

use peft_core::{Param, Result, Tensor};
use peft_io::{Checkpoint, Scratch};
use peft_tensor::{AdamWMove, Device, DeviceAdamW};

use super::moments::Moments;
use super::{AdamW, Move, Rate, clip_factor, norms, total_norm};

/// AdamW, wherever it is computed.
#[derive(Debug)]
pub struct Optimizer {
    /// Without moments where the device has them.
    host: AdamW,
    device: Option<OnDevice>,
}

/// Moments on the device.
#[derive(Debug)]
struct OnDevice {
    device: Device,
    state: Option<DeviceAdamW>,
    /// Parameters by slot, also those that are frozen for the time being.
    keys: Arc<Vec<String>>,
    slots: HashMap<String, usize>,
    sizes: Vec<usize>,
    /// Steps that each has had a gradient in.
    steps: Vec<u64>,
}

/// The norm of a step's gradients before clipping, perhaps still on its way.
#[derive(Clone, Debug)]
pub enum Norm {
    /// A number, and the first parameter whose gradient is not finite, if one's is.
    Known(f64, Option<String>),
    /// As [`peft_tensor::AdamWMoved::facts`], with the keys of the slots.
    There(Tensor, Arc<Vec<String>>),
}

/// The optimiser with its moments where the processor reaches them.
#[derive(Debug)]
pub enum AtHand<'a> {
    /// They are.
    Here(&'a AdamW),
    /// Read back from a device.
    Copied(AdamW),
}

impl Deref for AtHand<'_> {
    type Target = AdamW;

    fn deref(&self) -> &AdamW {
        match self {
            Self::Here(adamw) => adamw,
            Self::Copied(adamw) => adamw,
        }
    }
}

impl Norm {
    /// The norm, and the first parameter whose gradient is not finite; waits for the device if it has them.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn value(&self) -> Result<(f64, Option<&str>)> {
        match self {
            Self::Known(norm, whose) => Ok((*norm, whose.as_deref())),
            Self::There(facts, keys) => {
                let facts = facts.values()?;
                let [norm, _, whose] = facts[..] else {
                    return Err(peft_core::Error::other("a step without its three facts"));
                };
                let key = (whose > 0.0)
                    .then(|| keys.get(whose as usize - 1))
                    .flatten();
                // A parameter that is named stands for itself, whatever became of the norm.
                let norm = if whose == 0.0 { norm } else { f32::INFINITY };
                Ok((f64::from(norm), key.map(String::as_str)))
            }
        }
    }

    /// The tensor it is in, if it is on a device.
    pub fn tensor(&mut self) -> Option<&mut Tensor> {
        match self {
            Self::Known(..) => None,
            Self::There(facts, _) => Some(facts),
        }
    }
}

impl Optimizer {
    /// Without history, on the device if it moves parameters itself. Moments in 8 bits are the processor's.
    pub fn new(betas: [f64; 2], eps: f64, eight_bit: bool, device: &Device) -> Self {
        let can = !eight_bit && device.backend().has_adamw();
        Self {
            host: AdamW::new(betas, eps, eight_bit),
            device: can.then(|| OnDevice::new(device)),
        }
    }

    /// Keeps moments in `file` from now on, and forgets those there are: the processor's work.
    pub fn page_to(&mut self, file: Scratch) {
        self.device = None;
        self.host.page_to(file);
    }

    /// What a user should know of where it is computed.
    pub fn note(&self, device: &Device) -> Option<String> {
        let could = self.device.is_none() && device.backend().has_adamw();
        could.then(|| {
            format!(
                "moments in 8 bits or on disk are the processor's: each step waits for the gradients from {} and sends \
                 it all parameters",
                device.backend().name()
            )
        })
    }

    /// Moves `params` along their gradients after clipping all of them to `max_norm` (0 = no limit). Also returned, if they
    /// are wanted: the gradients as they were used. Where the processor does it, nothing is moved by gradients that are not
    /// finite; a device finds that out by itself.
    ///
    /// # Errors
    /// If a gradient has another size than its parameter, the device refuses, or the moments' file cannot be used.
    pub fn step(
        &mut self,
        params: &[Param],
        grads: Vec<Option<Tensor>>,
        mut rate: impl FnMut(&str) -> Rate,
        max_norm: f64,
        want_used: bool,
    ) -> Result<(Norm, Vec<Option<Tensor>>)> {
        if let Some(device) = &mut self.device {
            return device.step(&self.host, params, &grads, rate, max_norm, want_used);
        }
        let fetched;
        let taken: Vec<Option<Cow<'_, [f32]>>> = if are_at_hand(&grads)? {
            let values = grads.iter().map(|g| g.as_ref().map(Tensor::values));
            let values = values.map(|v| Ok(v.transpose()?));
            values.collect::<Result<_>>()?
        } else {
            let there: Vec<bool> = grads.iter().map(Option::is_some).collect();
            fetched = Tensor::into_vecs(grads.into_iter().flatten().collect())?;
            let mut values = fetched.iter();
            let next = |there| if there { values.next() } else { None };
            let values = there.into_iter().map(next);
            values.map(|v| v.map(|v| Cow::Borrowed(&v[..]))).collect()
        };
        let each = norms(&taken);
        let norm = total_norm(&each);
        if !norm.is_finite() {
            let worst = each.iter().position(|n| !n.is_finite());
            let key = worst
                .and_then(|i| params.get(i))
                .map(|p| p.key().to_owned());
            return Ok((Norm::Known(norm, key), Vec::new()));
        }
        let factor = clip_factor(norm, max_norm);
        let each = params.iter().zip(&taken);
        let moves: Vec<_> = each
            .filter_map(|(param, grad)| {
                Some(Move {
                    param,
                    grad: grad.as_deref()?,
                    rate: rate(param.key()),
                })
            })
            .collect();
        self.host.step_all(&moves, factor)?;
        let used = match want_used {
            true => used(params, &taken, factor)?,
            false => Vec::new(),
        };
        Ok((Norm::Known(norm, None), used))
    }

    /// Forgets everything: the next step is a first one.
    ///
    /// # Errors
    /// If the moments' file cannot be emptied.
    pub fn reset(&mut self) -> Result<()> {
        if let Some(device) = &mut self.device {
            *device = OnDevice::new(&device.device);
        }
        self.host.reset()
    }

    /// With all moments in reach of the processor, for a checkpoint.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn at_hand(&self) -> Result<AtHand<'_>> {
        match &self.device {
            None => Ok(AtHand::Here(&self.host)),
            Some(device) => device.at_hand(&self.host).map(AtHand::Copied),
        }
    }

    /// Goes on from a checkpoint's moments, wherever it was made; the names of its tensors come back. `numel` tells how
    /// many values a parameter has.
    ///
    /// # Errors
    /// If a moment is missing or has another size.
    pub fn restore(
        &mut self,
        from: &Checkpoint,
        steps: &BTreeMap<String, u64>,
        numel: impl Fn(&str) -> Option<usize>,
    ) -> Result<Vec<String>> {
        self.host.restore(from, steps, numel)?;
        let names = self.host.plan().into_iter().map(|e| e.name).collect();
        if let Some(device) = &mut self.device {
            *device = OnDevice::new(&device.device);
            device.take(&self.host)?;
            self.host.reset()?;
        }
        Ok(names)
    }
}

impl OnDevice {
    fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            state: None,
            keys: Arc::default(),
            slots: HashMap::new(),
            sizes: Vec::new(),
            steps: Vec::new(),
        }
    }

    fn step(
        &mut self,
        host: &AdamW,
        params: &[Param],
        grads: &[Option<Tensor>],
        mut rate: impl FnMut(&str) -> Rate,
        max_norm: f64,
        want_used: bool,
    ) -> Result<(Norm, Vec<Option<Tensor>>)> {
        let values: Vec<Tensor> = params.iter().map(Param::tensor).collect();
        self.make_room(params, &values, grads)?;
        let Some(state) = &mut self.state else {
            return Ok((Norm::Known(0.0, None), vec![None; params.len()]));
        };
        let mut moves = Vec::with_capacity(params.len());
        let mut places = Vec::with_capacity(params.len());
        for (i, ((param, value), grad)) in params.iter().zip(&values).zip(grads).enumerate() {
            let known = self.slots.get(param.key()).copied();
            // One that has got another size and no gradient since is left out.
            let Some(slot) = known.filter(|&slot| self.sizes[slot] == value.numel()) else {
                continue;
            };
            self.steps[slot] += u64::from(grad.is_some());
            let [decay, size, root] = host.factors(rate(param.key()), self.steps[slot].max(1));
            places.push(i);
            moves.push(AdamWMove {
                slot,
                value,
                grad: grad.as_ref(),
                decay,
                size,
                root,
            });
        }
        let rule = host.rule(max_norm);
        let moved = state.step(&moves, &rule, want_used)?;
        for (&i, value) in places.iter().zip(moved.values) {
            if let Some(value) = value {
                params[i].set(value)?;
            }
        }
        let mut used = Vec::new();
        if want_used {
            used.resize(params.len(), None);
            for (&i, grad) in places.iter().zip(moved.used) {
                used[i] = grad;
            }
        }
        Ok((Norm::There(moved.facts, self.keys.clone()), used))
    }

    /// Sees that every parameter with a gradient has a slot of its size; moments there are move with their slots.
    fn make_room(
        &mut self,
        params: &[Param],
        values: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<()> {
        let fits = |this: &Self, param: &Param, value: &Tensor| {
            let slot = this.slots.get(param.key());
            slot.is_some_and(|&slot| this.sizes[slot] == value.numel())
        };
        let all = || params.iter().zip(values).zip(grads);
        if all().all(|((param, value), grad)| grad.is_none() || fits(self, param, value)) {
            return Ok(());
        }
        let mut moments = match &self.state {
            Some(state) => state.moments()?,
            None => Vec::new(),
        };
        let mut keys = self.keys.to_vec();
        for ((param, value), grad) in all() {
            match self.slots.get(param.key()) {
                None => {
                    self.slots.insert(param.key().to_owned(), keys.len());
                    keys.push(param.key().to_owned());
                    self.sizes.push(value.numel());
                    self.steps.push(0);
                }
                Some(&slot) if grad.is_some() && self.sizes[slot] != value.numel() => {
                    (self.sizes[slot], self.steps[slot]) = (value.numel(), 0);
                    if let Some(moments) = moments.get_mut(slot) {
                        *moments = [Vec::new(), Vec::new()];
                    }
                }
                Some(_) => {}
            }
        }
        self.keys = Arc::new(keys);
        self.open(moments)
    }

    /// A state for the slots there are, with these moments; empty ones are 0.
    fn open(&mut self, moments: Vec<[Vec<f32>; 2]>) -> Result<()> {
        // First, so that both are never there at once.
        self.state = None;
        let mut state = DeviceAdamW::new(&self.device, &self.sizes)?;
        if let Some(state) = &mut state {
            for (slot, [mean, square]) in moments.iter().enumerate() {
                if !mean.is_empty() && self.steps[slot] > 0 {
                    state.load(slot, [mean, square])?;
                }
            }
        }
        self.state = state;
        Ok(())
    }

    /// The moments as the processor keeps them.
    fn at_hand(&self, host: &AdamW) -> Result<AdamW> {
        let mut all = host.without_history();
        let Some(state) = &self.state else {
            return Ok(all);
        };
        for (slot, moments) in state.moments()?.into_iter().enumerate() {
            if self.steps[slot] > 0 {
                let moments = Moments::full(self.steps[slot], &moments);
                all.put(self.keys[slot].clone(), moments);
            }
        }
        Ok(all)
    }

    /// The inverse of [`OnDevice::at_hand`].
    fn take(&mut self, host: &AdamW) -> Result<()> {
        let mut keys = Vec::new();
        let mut values = Vec::new();
        for (key, moments) in host.moments() {
            self.slots.insert(key.clone(), keys.len());
            keys.push(key.clone());
            self.sizes.push(moments.numel);
            self.steps.push(moments.steps);
            values.push(moments.values());
        }
        self.keys = Arc::new(keys);
        self.open(values)
    }
}

/// Whether gradients can be read where they are, without copies that leave holes in the heap as large as all of them.
fn are_at_hand(grads: &[Option<Tensor>]) -> Result<bool> {
    match grads.iter().flatten().next() {
        Some(grad) => Ok(matches!(grad.values()?, Cow::Borrowed(_))),
        None => Ok(true),
    }
}

/// Gradients as the optimiser took them.
fn used(
    params: &[Param],
    taken: &[Option<Cow<'_, [f32]>>],
    factor: f32,
) -> Result<Vec<Option<Tensor>>> {
    let one = |(param, grad): (&Param, &Option<Cow<'_, [f32]>>)| {
        let Some(grad) = grad else { return Ok(None) };
        let clipped = grad.iter().map(|g| g * factor).collect();
        let value = param.tensor();
        Ok(Some(Tensor::from_vec(
            clipped,
            value.shape(),
            value.device(),
        )?))
    };
    params.iter().zip(taken).map(one).collect()
}
