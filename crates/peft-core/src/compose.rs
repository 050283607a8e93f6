//! Active adapters averaged instead of stacked.

use std::sync::Arc;

use peft_tensor::Tensor;

use crate::attach::Slot;
use crate::call::{Call, Stacked, fold_weight};
use crate::{Adapter, Error, ModuleId, Network, Param, Result};

/// How active adapters combine.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Composition {
    /// Later ones around earlier ones.
    #[default]
    Stack,
    /// Each on its own around the base, their outputs weighed; one weight for each active adapter.
    Average(Vec<f64>),
}

impl Network {
    /// Makes these adapters act side by side, each module giving the weighted mean of what it gives with each alone; at a
    /// junction the parts in front of the model's norm are averaged, as AdapterHub does it. Weights sum to 1, or what is
    /// missing is the base's. Trained stand-ins for base parameters are averaged as they are now.
    /// [`Network::set_active`] stacks again.
    ///
    /// # Errors
    /// If an adapter is not attached, acts on the model as a whole, a weight is no number, or the model is merged.
    pub fn set_average(&mut self, weighted: &[(&str, f64)]) -> Result<()> {
        let names: Vec<&str> = weighted.iter().map(|(name, _)| *name).collect();
        if let Some((name, weight)) = weighted.iter().find(|(_, w)| !w.is_finite()) {
            let detail = format!("{weight} for {name:?} is no number");
            return Err(Error::config("weights", detail));
        }
        for name in &names {
            let attached = self.find(name)?;
            if attached.store.sites.iter().any(|p| p.site.id.is_none()) {
                let detail = format!(
                    "{name:?} acts on the model as a whole, not module by module, and cannot be averaged"
                );
                return Err(Error::config("compose", detail));
            }
        }
        self.set_active(&names)?;
        self.composition = Composition::Average(weighted.iter().map(|(_, w)| *w).collect());
        self.restack();
        Ok(())
    }

    /// Whether active adapters are averaged.
    pub fn is_average(&self) -> bool {
        matches!(self.composition, Composition::Average(_))
    }

    /// Turns stacks into averages.
    pub(crate) fn average(&mut self) {
        let Composition::Average(weights) = self.composition.clone() else {
            return;
        };
        let names = self.active().to_vec();
        let weight_of = |name: &str| {
            let at = names.iter().position(|n| n == name);
            at.and_then(|at| weights.get(at)).copied().unwrap_or(0.0)
        };
        for stack in self.stacks.values_mut() {
            let mut parts: Vec<Part> = Vec::new();
            for stacked in stack.drain(..) {
                match parts.last_mut() {
                    Some(part) if part.stack[0].name == stacked.name => part.stack.push(stacked),
                    _ => parts.push(Part {
                        weight: weight_of(&stacked.name) as f32,
                        stack: vec![stacked],
                    }),
                }
            }
            let Some(first) = parts.first() else { continue };
            let whole = Stacked {
                name: first.stack[0].name.clone(),
                site: first.stack[0].site.clone(),
                mirrored: parts.iter().all(|p| p.stack.iter().all(|s| s.mirrored)),
                adapter: Arc::new(Average(parts)),
            };
            stack.push(whole);
        }
        let places: Vec<(ModuleId, Slot)> = self.selected.keys().copied().collect();
        for place in places {
            // The base's own value has the weight that no stand-in has.
            if let Ok(value) = self.average_of(place, &weight_of) {
                self.selected
                    .insert(place, Param::new("average", &value.detach(), false));
            }
        }
    }

    fn average_of(
        &self,
        (id, slot): (ModuleId, Slot),
        weight_of: &dyn Fn(&str) -> f64,
    ) -> Result<Tensor> {
        let (mut sum, mut left): (Option<Tensor>, f64) = (None, 1.0);
        for name in self.active() {
            if let Some(param) = self.find(name)?.store.selected.get(&(id, slot)) {
                let part = param.tensor().scale(weight_of(name) as f32)?;
                left -= weight_of(name);
                sum = Some(match sum {
                    Some(sum) => sum.add(&part)?,
                    None => part,
                });
            }
        }
        let sum = sum.ok_or_else(|| Error::other("nothing stands in there"))?;
        if left.abs() < 1e-9 {
            return Ok(sum);
        }
        let info = self.tree().info(id);
        let name = match slot {
            Slot::Weight => &info.weight,
            Slot::Bias => &info.bias,
        };
        let name = name
            .as_ref()
            .ok_or_else(|| Error::module(&info.path, "has no such parameter"))?;
        Ok(sum.add(&self.base().hf_values(name)?.scale(left as f32)?)?)
    }
}

/// One adapter's places on a module.
struct Part {
    weight: f32,
    stack: Vec<Stacked>,
}

struct Average(Vec<Part>);

impl Average {
    /// `base + sum w_i (part_i - base)`
    fn around(
        &self,
        base: &Tensor,
        mut part: impl FnMut(&Part) -> Result<Option<Tensor>>,
    ) -> Result<Tensor> {
        let mut sum = base.clone();
        for one in &self.0 {
            if let Some(whole) = part(one)? {
                sum = sum.add(&whole.sub(base)?.scale(one.weight)?)?;
            }
        }
        Ok(sum)
    }

    /// What all parts add, weighed; None where one does not work by adding.
    fn sum(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for part in &self.0 {
            let [only] = &part.stack[..] else {
                return Ok(None);
            };
            let own = Call {
                current: Some(only),
                ..*call
            };
            let Some(added) = only.adapter.added(&own)? else {
                return Ok(None);
            };
            let added = added.scale(part.weight)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&added)?,
                None => added,
            });
        }
        Ok(sum)
    }
}

impl Adapter for Average {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        // A merge must not take one part and leave another.
        for stacked in self.0.iter().flat_map(|p| &p.stack) {
            if stacked.adapter.weight(w.clone())?.is_none() {
                return Ok(None);
            }
        }
        self.around(&w, |part| fold_weight(&part.stack, w.clone()).map(Some))
            .map(Some)
    }

    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        let mut sum = b.clone();
        for part in &self.0 {
            let mut own = b.clone();
            for stacked in &part.stack {
                own = stacked.adapter.bias(own)?;
            }
            let change = match (own, &b) {
                (Some(own), Some(b)) => own.sub(b)?,
                (Some(own), None) => own,
                (None, _) => continue,
            };
            let change = change.scale(part.weight)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&change)?,
                None => change,
            });
        }
        Ok(sum)
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if call.is_junction() {
            if let Some(sum) = self.sum(call)? {
                return call.base_with(&call.x()?.add(&sum)?);
            }
        } else if let Some(sum) = self.sum(call)? {
            return Ok(call.base()?.add(&sum)?);
        }
        let base = call.base()?;
        self.around(&base, |part| {
            let own = Call {
                below: &part.stack,
                current: None,
                ..*call
            };
            own.base().map(Some)
        })
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        self.sum(call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attach, Base, Injector, Parsed, Pass, PeftMethod, Site, TrainHooks};
    use ndarray::array;
    use serde_json::{Value, json};

    /// `y + c` on a linear layer; at a junction `(h + c) * c`, so that the order shows.
    struct Plus(f32);

    impl PeftMethod for Plus {
        fn attach(&self, _: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
            cx.param("c", &[1], &crate::Init::Zeros)?;
            Ok(Box::new(Self(self.0)))
        }

        fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
            let sites = ["fc", "layers.0.output_adapters"].map(|path| {
                let id = cx.tree().get(path).expect("there");
                cx.tree().site(id)
            });
            cx.attach_all(sites.to_vec(), |site, cx| self.attach(site, cx))
        }

        fn trainer(&self) -> Box<dyn TrainHooks> {
            Box::new(())
        }
    }

    impl Adapter for Plus {
        fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
            if call.is_junction() {
                return call.base_with(&call.x()?.affine(1.0, self.0)?.scale(self.0)?);
            }
            Ok(call.base()?.affine(1.0, self.0)?)
        }
    }

    fn parse(config: &Value) -> Result<Parsed> {
        Ok(Parsed {
            method: Box::new(Plus(config["c"].as_f64().unwrap_or(0.0) as f32)),
            fields: json!({"c": config["c"]}),
        })
    }

    inventory::submit! {
        crate::MethodEntry {
            id: "plus", title: "Plus", family: crate::Family::Additive, subfamily: "tests", peft_type: "PLUS_FOR_TESTS",
            when: |_| false, paper: "", example: "{}", identity_at_init: false, mergeable: false, moves_base: false,
            file: file!(), hub: None, parse,
        }
    }

    fn network() -> Network {
        let base = Base::custom()
            .linear("fc", array![[2.0]], None)
            .expect("a base")
            .junction("layers.0.output_adapters", 1);
        let mut network = Network::new(base);
        for (name, c) in [("a", 1.0), ("b", 4.0)] {
            let config = json!({"peft_type": "PLUS_FOR_TESTS", "c": c});
            network.attach(name, &config, 0).expect("attaches");
        }
        network
    }

    fn run(network: &Network) -> (f32, f32) {
        let one = |v: f32| Tensor::from_vec(vec![v], &[1, 1], network.device()).expect("a tensor");
        let at = network.module("layers.0.output_adapters").expect("there");
        let pass = Pass::eval();
        let y = network.run("fc", &one(3.0), &pass).expect("runs");
        let j = network
            .junction(at, &one(3.0), &one(10.0), None, &pass)
            .expect("runs");
        (y.item().expect("a number"), j.item().expect("a number"))
    }

    /// 2 * 3 + 1 + 4; ((3 + 1) * 1 + 4) * 4 + 10: the first named is passed first.
    #[test]
    fn stacked_in_the_order_given() {
        let mut network = network();
        assert_eq!(run(&network), (11.0, 42.0));
        network.set_active(&["b", "a"]).expect("both are there");
        // ((3 + 4) * 4 + 1) * 1 + 10
        assert_eq!(run(&network), (11.0, 39.0));
    }

    /// 6 + 0.25 * 1 + 0.75 * 4; 0.25 * (4 + 10) + 0.75 * (28 + 10), the base having no weight; or half of it.
    #[test]
    fn averaged_by_weight() {
        let mut network = network();
        network
            .set_average(&[("a", 0.25), ("b", 0.75)])
            .expect("averages");
        assert_eq!(run(&network), (9.25, 32.0));
        network.set_average(&[("a", 0.5)]).expect("averages");
        assert_eq!(run(&network), (6.5, 13.5));
        network.set_active(&["a"]).expect("there");
        assert_eq!(run(&network), (7.0, 14.0));
        let error = network.set_average(&[("c", 1.0)]).expect_err("refused");
        assert!(error.to_string().contains("\"c\""), "{error}");
    }
}
