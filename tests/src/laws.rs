//! The laws every registered method keeps, on every device, on models, batches and configurations that are drawn, with
//! parameters moved away from their initial values (at B = 0 most laws say nothing).

use crate::compare::{Check, close, differ, same_bits, size, slopes};
use crate::descent::descend;
use crate::members::merges_in_part;
use crate::state::{base_bits, exported, running_weights, same_tensors, values};
use crate::subject::{Subject, every_method, example, refused, told};
use peft::core::{Family, Network, Pass, RngKey, Tensor, entry_for};
use serde_json::{Value, json};

/// What is exported is a fixed point: it keeps fields nobody knows, means the same method, and attaches to itself.
pub fn config_round_trip() {
    every_method(4, |s| {
        let mut config = s.config()?;
        let unknown = json!({"kept": [1, 2.5, null, "as is"]});
        config["field_of_a_later_version"] = unknown.clone();
        let found = told("entry_for the example", entry_for(&config))?;
        if found.id != s.entry.id {
            return Err(format!("the example configuration means {}", found.id));
        }
        let mut toy = s.toy()?;
        told(
            "attach with an unknown field",
            toy.network.attach("a", &config, s.case.seed),
        )?;
        let (first, tensors) = told("export", toy.network.export("a"))?;
        if first["field_of_a_later_version"] != unknown {
            return Err(format!(
                "the unknown field came back as {}",
                first["field_of_a_later_version"]
            ));
        }
        for (field, value) in config.as_object().into_iter().flatten() {
            // Saved as the paths it meant, as HF does.
            let expanded = value == "all-linear" && first[field].is_array();
            // With a classification task HF adds the usual names of heads.
            let more = field == "modules_to_save"
                && value
                    .as_array()
                    .zip(first[field].as_array())
                    .is_some_and(|(given, saved)| given.iter().all(|name| saved.contains(name)));
            if first[field] != *value && !expanded && !more {
                return Err(format!("{field} was {value}, saved as {}", first[field]));
            }
        }
        let found = told("entry_for what was exported", entry_for(&first))?;
        if found.id != s.entry.id {
            return Err(format!("the exported configuration means {}", found.id));
        }
        let text = told("JSON", serde_json::to_string_pretty(&first))?;
        let again: Value = told("JSON", serde_json::from_str(&text))?;
        let mut other = s.toy()?;
        told(
            "load from what was exported",
            other.network.load("a", &again, tensors, true),
        )?;
        let (second, _) = told("export again", other.network.export("a"))?;
        if first == second {
            Ok(())
        } else {
            Err(format!("exported first\n{first}\nthen\n{second}"))
        }
    });
}

/// See the module.
pub fn identity_at_initialisation_where_promised() {
    every_method(6, |s| {
        if !s.entry.identity_at_init {
            return Ok(());
        }
        // Initial values are rounded to f32, on every device.
        let tolerance = s.tolerance().max(2e-6);
        close(
            "a fresh adapter",
            &s.run(&s.fresh("a")?)?,
            &s.run(&s.toy()?)?,
            tolerance,
        )
    });
}

/// The same seed makes the same adapter, whatever else is attached.
pub fn initial_values_depend_on_the_seed_alone() {
    every_method(3, |s| {
        let one = s.fresh("a")?;
        let mut two = s.fresh("another")?;
        told("attach", two.network.attach("a", &s.config()?, s.case.seed))?;
        let (one, two) = (exported(&one.network, "a")?, exported(&two.network, "a")?);
        same_tensors(&two, &one)
    });
}

/// Adapted forward = merged forward, from any weight format; unmerge gives everything back bit for bit.
pub fn merging() {
    every_method(8, |s| {
        let mut toy = s.moved("a")?;
        if !s.entry.mergeable {
            let before = s.run(&toy)?;
            if toy.network.merge().is_ok() {
                return Err("is registered as not mergeable, and merges".to_owned());
            }
            return same_bits("after a refused merge", &s.run(&toy)?, &before);
        }
        let stored = base_bits(&toy.network)?;
        let weights = running_weights(&toy.network)?;
        let adapted = s.run(&toy)?;
        differ("the adapter and the base", &adapted, &s.run(&s.toy()?)?)?;
        streamed_merge_is_the_same(&mut s.moved("a")?.network)?;
        told("merge", toy.network.merge())?;
        close(
            "merged against adapted",
            &s.run(&toy)?,
            &adapted,
            s.tolerance(),
        )?;
        let merged = s.run(&toy)?;
        told("merge twice", toy.network.merge())?;
        same_bits("merged twice", &s.run(&toy)?, &merged)?;
        refused(
            "attach while merged",
            "unmerge",
            toy.network.attach("b", &s.config()?, 1),
        )?;
        refused("delete while merged", "unmerge", toy.network.delete("a"))?;
        refused(
            "set_active while merged",
            "unmerge",
            toy.network.set_active(&[]),
        )?;
        toy.network.unmerge();
        same_bits("unmerged against adapted", &s.run(&toy)?, &adapted)?;
        for (path, value) in running_weights(&toy.network)? {
            same_bits(&format!("{path} after unmerge"), &value, &weights[&path])?;
        }
        if base_bits(&toy.network)? != stored {
            return Err("the base's stored weights changed".to_owned());
        }
        told("set_active", toy.network.set_active(&[]))?;
        same_bits("the base after unmerge", &s.run(&toy)?, &s.run(&s.toy()?)?)
    });
}

/// In a union with a method that merges, what can be merged is, and on the merged base the rest does what it did.
pub fn unions_merge_what_they_can() {
    every_method(3, |s| {
        let partner = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "o_proj"]});
        let own = s.config()?;
        // One behind the other, either way.
        merges_in_part(s, &[partner.clone(), own.clone()], 1)?;
        merges_in_part(s, &[own, partner], 0)
    });
}

/// What the streaming merge gets, one module at a time, is what the merge in memory runs.
fn streamed_merge_is_the_same(network: &mut Network) -> Check {
    let mut streamed = Vec::new();
    for id in network.changed_modules() {
        let info = network.tree().info(id).clone();
        let weight = info.weight.as_ref().and_then(|n| network.base().weight(n));
        let bias = info.bias.as_ref().map(|n| network.param(n)).transpose();
        let merged = told(
            &info.path,
            network.merged(id, weight, told("bias", bias)?.as_ref()),
        )?;
        streamed.push((id, info, merged.weight));
    }
    told("merge", network.merge())?;
    for (id, info, weight) in streamed {
        let Some(weight) = weight else { continue };
        let running = told("weight", network.weight(id))?;
        let logical = if info.kind == peft::core::ModuleKind::Conv1d {
            told("t", weight.t())?
        } else {
            weight
        };
        same_bits(&format!("{} streamed", info.path), &logical, &running)?;
    }
    Ok(())
}

/// Export then load: the same keys and bits, the same outputs, through memory and through files.
pub fn export_then_load() {
    every_method(5, |s| {
        let toy = s.moved("a")?;
        let (config, tensors) = told("export", toy.network.export("a"))?;
        let mut loaded = s.toy()?;
        told(
            "load",
            loaded.network.load("b", &config, tensors.clone(), false),
        )?;
        same_tensors(&exported(&loaded.network, "b")?, &tensors)?;
        close(
            "outputs after loading",
            &s.run(&loaded)?,
            &s.run(&toy)?,
            s.tolerance(),
        )?;
        let first = s.run(&loaded)?;
        if !loaded.network.parameters().is_empty() {
            return Err("an adapter loaded as frozen has trainable parameters".to_owned());
        }
        // A second trip has nothing left to round: the outputs are the same bits.
        let mut again = s.toy()?;
        told(
            "load again",
            again
                .network
                .load("b", &config, exported(&loaded.network, "b")?, true),
        )?;
        same_bits("outputs after a second trip", &s.run(&again)?, &first)?;
        if again.network.parameters().is_empty() {
            return Err("an adapter loaded as trainable has no trainable parameters".to_owned());
        }
        if s.device.backend().name() != "cpu" {
            return Ok(()); // Files hold f32.
        }
        let folder = told("a folder", tempfile::tempdir())?;
        let named = tensors
            .iter()
            .map(|(k, t)| Ok((k.clone(), (t.shape().to_vec(), told("values", t.to_vec())?))));
        told(
            "write",
            peft::io::write_adapter_with(
                folder.path(),
                &config,
                &named.collect::<Result<_, String>>()?,
                &told("integer_keys", toy.network.integer_keys("a"))?,
            ),
        )?;
        let files = told("read", peft::io::read_adapter(folder.path()))?;
        let back = files.tensors.into_iter().map(|(key, (shape, values))| {
            Ok((
                key,
                told("tensor", Tensor::from_vec(values, &shape, s.device))?,
            ))
        });
        let mut from_files = s.toy()?;
        told(
            "load files",
            from_files.network.load(
                "b",
                &files.config,
                back.collect::<Result<_, String>>()?,
                false,
            ),
        )?;
        same_tensors(&exported(&from_files.network, "b")?, &tensors)?;
        same_bits("outputs from files", &s.run(&from_files)?, &first)
    });
}

/// A key too few, too many or of another shape is an error that names it, and leaves the network as it was.
pub fn loading_is_strict() {
    every_method(3, |s| {
        let toy = s.moved("a")?;
        let (config, tensors) = told("export", toy.network.export("a"))?;
        let mut target = s.toy()?;
        let base = s.run(&target)?;
        for key in tensors.keys() {
            let mut fewer = tensors.clone();
            fewer.remove(key);
            refused(
                "a file without a key",
                key,
                target.network.load("b", &config, fewer, true),
            )?;
            let mut reshaped = tensors.clone();
            let mut shape = tensors[key].shape().to_vec();
            *shape.last_mut().ok_or("a saved scalar")? += 1;
            reshaped.insert(key.clone(), told("zeros", Tensor::zeros(&shape, s.device))?);
            refused(
                "a key of another shape",
                key,
                target.network.load("b", &config, reshaped, true),
            )?;
        }
        let mut more = tensors.clone();
        let extra = "base_model.model.model.layers.0.self_attn.q_proj.nothing_of_the_kind.weight";
        more.insert(
            extra.to_owned(),
            told("zeros", Tensor::zeros(&[2, 2], s.device))?,
        );
        refused(
            "a file with a key too many",
            extra,
            target.network.load("b", &config, more, true),
        )?;
        if !target.network.adapters().is_empty() {
            return Err(format!(
                "a refused adapter is attached: {:?}",
                target.network.adapters()
            ));
        }
        same_bits("after refused loads", &s.run(&target)?, &base)?;
        told("load", target.network.load("b", &config, tensors, true))
    });
}

/// Declared parameters get a gradient, each of them, nothing else does, and it is the slope of the loss.
pub fn gradients() {
    every_method(4, |s| {
        let toy = s.moved("a")?;
        let (params, grads) = s.grads(&toy)?;
        if grads.len() != params.len() {
            return Err(format!(
                "{} tensors got a gradient, {} parameters are declared",
                grads.len(),
                params.len()
            ));
        }
        for (at, param) in params.iter().enumerate() {
            let value = param.tensor();
            let grad = grads
                .get(&value)
                .ok_or_else(|| format!("{} got no gradient", param.key()))?;
            if size(grad)? == 0.0 {
                return Err(format!("{}: the gradient is zero throughout", param.key()));
            }
            // Differences are only sharp in f64.
            if s.device.backend().name() == "reference" {
                let key = RngKey::new(s.case.seed).fork_n(at as u64);
                slopes(param, grad, key, || s.loss(&toy, &s.exact()))?;
            }
        }
        Ok(())
    });
}

/// Steps of gradient descent with the method's hooks move its parameters and not one bit of the base, unless declared.
pub fn training_leaves_the_base_alone() {
    every_method(4, |s| {
        let mut toy = s.moved("a")?;
        let stored = base_bits(&toy.network)?;
        let base = s.run(&s.toy()?)?;
        let before: Vec<_> = values(&toy.network)?;
        let pass = Pass::train(RngKey::new(s.case.seed));
        same_bits(
            "the same step's loss again",
            &s.loss(&toy, &pass)?,
            &s.loss(&toy, &pass)?,
        )?;
        descend(s, &toy, 3)?;
        if values(&toy.network)? == before {
            return Err("training moved no parameter".to_owned());
        }
        if s.entry.moves_base {
            return Ok(());
        }
        if base_bits(&toy.network)? != stored {
            return Err("training changed the base's stored weights".to_owned());
        }
        told("set_active", toy.network.set_active(&[]))?;
        same_bits("the base after training", &s.run(&toy)?, &base)
    });
}

/// Switched off, an adapter is not there; switched on again, it is.
pub fn disabling_gives_the_base() {
    every_method(4, |s| {
        let mut toy = s.moved("a")?;
        let (adapted, base) = (s.run(&toy)?, s.run(&s.toy()?)?);
        differ("the adapter and the base", &adapted, &base)?;
        told("set_active", toy.network.set_active(&[]))?;
        same_bits("switched off", &s.run(&toy)?, &base)?;
        told("set_active", toy.network.set_active(&["a"]))?;
        same_bits("switched on", &s.run(&toy)?, &adapted)?;
        refused(
            "an adapter that is not there",
            "nobody",
            toy.network.set_active(&["nobody"]),
        )?;
        refused(
            "deleting one that is not there",
            "nobody",
            toy.network.delete("nobody"),
        )?;
        refused(
            "the same name again",
            "\"a\"",
            toy.network.attach("a", &s.config()?, 1),
        )?;
        same_bits("after refusals", &s.run(&toy)?, &adapted)?;
        told("delete", toy.network.delete("a"))?;
        same_bits("deleted", &s.run(&toy)?, &base)?;
        if !toy.network.parameters().is_empty() || !toy.network.adapters().is_empty() {
            return Err("something of a deleted adapter is left".to_owned());
        }
        told(
            "attach under the free name",
            toy.network.attach("a", &s.config()?, s.case.seed),
        )
    });
}

/// Beside another of its kind and beside others from the registry, an adapter stays what it is.
pub fn two_adapters_side_by_side() {
    every_method(2, |s| {
        let mut configs = vec![s.config()?];
        let others: Vec<_> = peft::methods()
            .into_iter()
            .filter(|e| e.id != s.entry.id)
            .collect();
        for at in RngKey::new(s.case.seed)
            .permutation(others.len())
            .into_iter()
            .take(3)
        {
            configs.push(example(others[at])?);
        }
        configs.iter().try_for_each(|config| {
            beside(s, config).map_err(|e| format!("beside {}: {e}", config["peft_type"]))
        })
    });
}

fn beside(s: &Subject<'_>, other: &Value) -> Check {
    let mut toy = s.moved("a")?;
    let (alone, own) = (s.run(&toy)?, toy.network.parameters().len());
    let tensors = exported(&toy.network, "a")?;
    told(
        "attach the second",
        toy.network.attach("b", other, s.case.seed ^ 1),
    )?;
    s.perturb(&toy, "b")?;
    if toy.network.parameters().len() <= own
        || told("parameters", toy.network.adapter_parameters("a"))?
            .iter()
            .filter(|p| p.is_trainable())
            .count()
            != own
    {
        return Err("attaching a second adapter froze the first".to_owned());
    }
    let both = s.run(&toy)?;
    told("set_active", toy.network.set_active(&["a"]))?;
    same_bits("the first, the second inactive", &s.run(&toy)?, &alone)?;
    told("set_active", toy.network.set_active(&["b"]))?;
    let second = s.run(&toy)?;
    differ("the second and the first", &second, &alone)?;
    told("set_active", toy.network.set_active(&["a", "b"]))?;
    same_bits("both again", &s.run(&toy)?, &both)?;
    // Where both stand in for the same parameters, the later wins: that may hide a selective method, and no other.
    if s.entry.family != Family::Selective {
        differ("both and the second", &both, &second)?;
    }
    same_tensors(&exported(&toy.network, "a")?, &tensors)?;
    told("delete the first", toy.network.delete("a"))?;
    same_bits("the second, the first deleted", &s.run(&toy)?, &second)
}

/// The processor gives what the reference gives: outputs and gradients.
pub fn the_same_on_every_device() {
    every_method(5, |s| {
        if s.device.backend().name() == "reference" {
            return Ok(());
        }
        let device = peft::core::Device::reference();
        let truth = Subject {
            device: &device,
            ..*s
        };
        let (here, there) = (s.moved("a")?, truth.moved("a")?);
        let here_out = s.run(&here)?;
        let there_out = told("to_device", truth.run(&there)?.to_device(s.device))?;
        close("outputs", &here_out, &there_out, s.tolerance())?;
        let ((params, grads), (true_params, true_grads)) = (s.grads(&here)?, truth.grads(&there)?);
        for (param, true_param) in params.iter().zip(&true_params) {
            let (key, value, true_value) = (param.key(), param.tensor(), true_param.tensor());
            if key != true_param.key() {
                return Err(format!(
                    "the parameters are {key} here, {} there",
                    true_param.key()
                ));
            }
            let (Some(got), Some(want)) = (grads.get(&value), true_grads.get(&true_value)) else {
                continue;
            };
            let want = told("to_device", want.to_device(s.device))?;
            close(&format!("the gradient of {key}"), got, &want, s.tolerance())?;
        }
        Ok(())
    });
}

/// Makes one test of each law over every method that is linked in. A crate with methods of its own calls it in a test of
/// its own, after naming itself, and holds them to the same laws.
#[macro_export]
macro_rules! law_suite {
    () => {
        $crate::law_suite!(@ config_round_trip, identity_at_initialisation_where_promised, initial_values_depend_on_the_seed_alone, merging, export_then_load, loading_is_strict, gradients, training_leaves_the_base_alone, unions_merge_what_they_can, disabling_gives_the_base, two_adapters_side_by_side, the_same_on_every_device);
    };
    (@ $($law:ident),*) => {
        $(#[test]
        fn $law() {
            $crate::laws::$law();
        })*
    };
}
