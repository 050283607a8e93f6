//! Adapters to and from what is on disk: configuration and tensors, no files.

use peft_tensor::no_grad;
use serde_json::{Map, Value, json};

use crate::attach::{Slot, Store};
use crate::config::HF_HEADS;
use crate::network::Attached;
use crate::param::Role;
use crate::{Common, Error, MethodEntry, ModuleId, Network, Param, Parsed, Result, Tensors};

/// The version of HF PEFT whose files these are.
const PEFT_VERSION: &str = "0.21.2";

impl Network {
    /// The configuration as it will be saved: HF's common fields, the method's with defaults filled in, and whatever
    /// else was given, kept as it is.
    pub(crate) fn saved_config(
        &self,
        entry: &MethodEntry,
        parsed: &Parsed,
        common: &Common,
        given: &Value,
        store: &Store,
    ) -> Value {
        let mut out = Map::new();
        for (key, default) in [
            ("auto_mapping", Value::Null),
            ("base_model_name_or_path", Value::Null),
            ("revision", Value::Null),
            ("task_type", Value::Null),
            ("peft_version", json!(PEFT_VERSION)),
        ] {
            out.insert(key.to_owned(), default);
        }
        for fields in [&parsed.fields, given] {
            if let Value::Object(map) = fields {
                // A null given for a field with a default means that default.
                let kept = map
                    .iter()
                    .filter(|(key, value)| !(value.is_null() && out.contains_key(*key)));
                let kept: Vec<_> = kept.map(|(k, v)| (k.clone(), v.clone())).collect();
                out.extend(kept);
            }
        }
        out.insert("peft_type".to_owned(), json!(entry.peft_type));
        out.insert("inference_mode".to_owned(), json!(true));
        let expandable = out
            .get("target_modules")
            .is_none_or(|t| t.is_null() || t.is_string());
        if let Some(paths) = &store.resolved_targets
            && expandable
            && !paths.is_empty()
        {
            out.insert("target_modules".to_owned(), json!(paths));
        }
        if common.trains_head() {
            let given = out.get("modules_to_save").and_then(Value::as_array);
            let mut names = given.cloned().unwrap_or_default();
            for head in HF_HEADS.map(Value::from) {
                if !names.contains(&head) {
                    names.push(head);
                }
            }
            out.insert("modules_to_save".to_owned(), Value::Array(names));
        }
        parsed.method.finish_config(&mut out, self.tree());
        out.sort_keys();
        Value::Object(out)
    }

    /// An adapter as it is saved: `adapter_config.json` and the tensors by key.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn export(&self, name: &str) -> Result<(Value, Tensors)> {
        let attached = self.find(name)?;
        let params = &attached.store.params;
        let live: Tensors = params
            .iter()
            .map(|p| (p.key().to_owned(), p.tensor().detach()))
            .collect();
        let mut saved = no_grad(|| attached.method.save(live))?;
        params
            .iter()
            .filter(|p| !p.is_saved())
            .for_each(|p| drop(saved.remove(p.key())));
        for (key, param) in self.twins(attached) {
            saved.insert(key, param.tensor().detach());
        }
        let mut config = attached.config.clone();
        if let Value::Object(fields) = &mut config {
            // Training may have decided some of them (ranks, who shares).
            attached.method.finish_config(fields, self.tree());
            fields.sort_keys();
        }
        Ok((config, saved))
    }

    /// Keys of an adapter whose values are whole numbers, which a file holds as such.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn integer_keys(&self, name: &str) -> Result<Vec<String>> {
        let params = &self.find(name)?.store.params;
        let whole = params.iter().filter(|p| p.is_integer());
        Ok(whole.map(|p| p.key().to_owned()).collect())
    }

    /// Attaches an adapter with the values a file holds, trainable or frozen; other adapters are left as they are.
    ///
    /// # Errors
    /// If the configuration does not fit the model, or keys are missing, unexpected or misshaped: all of them in one
    /// error. Nothing is attached then.
    pub fn load(
        &mut self,
        name: &str,
        config: &Value,
        tensors: Tensors,
        trainable: bool,
    ) -> Result<()> {
        let mut attached = self.build(name, config, 0, true)?;
        let mut tensors = attached.method.load(tensors)?;
        self.take_embeddings(&mut attached, &mut tensors)?;
        self.fill(&attached, tensors, name)?;
        attached
            .store
            .params
            .iter()
            .for_each(|p| p.set_trainable(trainable));
        self.push(attached);
        Ok(())
    }

    /// Gives an attached adapter the values of a file (a checkpoint of its own training).
    ///
    /// # Errors
    /// As [`Network::load`].
    pub fn restore(&mut self, name: &str, tensors: Tensors) -> Result<()> {
        let attached = self.find(name)?;
        let tensors = attached.method.load(tensors)?;
        self.fill(attached, tensors, name)
    }

    /// Keys under which HF saves a stand-in once more: one that serves both sides of a tied pair.
    fn twins(&self, attached: &Attached) -> Vec<(String, Param)> {
        let prefix = attached.method.module_prefix();
        let mut twins = Vec::new();
        for ((id, slot), param) in &attached.store.selected {
            let key = format!("{prefix}{}.{}", self.tree().info(*id).path, slot.name());
            let shared = attached
                .store
                .selected
                .values()
                .filter(|p| p.key() == param.key())
                .count()
                > 1;
            if shared && key != param.key() {
                twins.push((key, param.clone()));
            }
        }
        twins
    }

    fn fill(&self, attached: &Attached, mut tensors: Tensors, name: &str) -> Result<()> {
        let (mut missing, mut misshaped) = (Vec::new(), Vec::new());
        let mut values = Vec::new();
        // With `bias = "all"` HF's filter, which looks for "bias" anywhere in a key, also takes its wrapper's two copies of
        // a saved module's bias.
        for wrapper in [
            ".modules_to_save.default.",
            ".modules_to_save.",
            ".original_module.",
        ] {
            let copies = tensors
                .keys()
                .filter(|k| tensors.contains_key(&k.replacen(wrapper, ".", 1)));
            let copies: Vec<String> = copies.filter(|k| k.contains(wrapper)).cloned().collect();
            copies.iter().for_each(|key| drop(tensors.remove(key)));
        }
        for (key, param) in self.twins(attached) {
            let Some(twin) = tensors.remove(&key) else {
                continue;
            };
            if let Some(own) = tensors.get(param.key())
                && (own.shape() != twin.shape() || own.to_vec()? != twin.to_vec()?)
            {
                let detail = format!(
                    "{key} and {} are tied, but their values differ",
                    param.key()
                );
                return Err(Error::config("ensure_weight_tying", detail));
            }
        }
        for param in attached.store.params.iter().filter(|p| p.is_saved()) {
            match tensors.remove(param.key()) {
                None => missing.push(param.key().to_owned()),
                Some(t) if param.accepts(t.shape()) => values.push((param, t)),
                Some(t) => misshaped.push(format!(
                    "{}: {:?}, expected {:?}",
                    param.key(),
                    t.shape(),
                    param.shape()
                )),
            }
        }
        let unexpected: Vec<String> = tensors.into_keys().collect();
        if !(missing.is_empty() && misshaped.is_empty() && unexpected.is_empty()) {
            return Err(Error::Load {
                what: format!("adapter {name:?}"),
                missing,
                unexpected,
                misshaped,
            });
        }
        values
            .into_iter()
            .try_for_each(|(param, t)| param.set(t.to_device(self.device())?))
    }

    /// Embeddings that HF saves whole beside what was trained: where the adapter sits on one (`<module>.base_layer.weight`),
    /// or with `save_embedding_layers` (`<module>.weight`). As when HF loads the file, they stand in for the base's, they
    /// are not trained, and they are written back when the adapter is saved.
    fn take_embeddings(&self, attached: &mut Attached, tensors: &mut Tensors) -> Result<()> {
        let keys: Vec<String> = tensors
            .keys()
            .filter(|k| k.ends_with(".weight") && attached.store.get(k).is_none())
            .cloned()
            .collect();
        drop_tied_rows(attached, tensors)?;
        for key in keys {
            let Some((id, value)) = self.embedding_of(&key).zip(tensors.get(&key)) else {
                continue;
            };
            let info = self.tree().info(id);
            let Some(name) = &info.weight else { continue };
            if attached.store.selected.contains_key(&(id, Slot::Weight)) {
                continue;
            }
            if value.shape() != info.weight_shape() {
                let misshaped = format!(
                    "{key}: {:?}, expected {:?}: the adapter was trained on another vocabulary and needs the model \
                     that has it",
                    value.shape(),
                    info.weight_shape()
                );
                return Err(Error::Load {
                    what: format!("adapter {:?}", attached.name),
                    missing: Vec::new(),
                    unexpected: Vec::new(),
                    misshaped: vec![misshaped],
                });
            }
            let value = value.to_device(self.device())?;
            let same = self.base().hf_values(name)?.to_vec()? == value.to_vec()?;
            let param = Param::with_role(key, &value, Role::Frozen);
            let param = attached.store.insert(param)?;
            // What the base has already needs no stand-in, which would untie it.
            if !same {
                attached.store.selected.insert((id, Slot::Weight), param);
            }
        }
        Ok(())
    }

    /// The module whose own weight HF saves under that key.
    fn embedding_of(&self, key: &str) -> Option<ModuleId> {
        let path = key.strip_prefix("base_model.model.")?;
        if let Some(adapted) = path.strip_suffix(".base_layer.weight") {
            let module = adapted.strip_suffix(".token_adapter").unwrap_or(adapted);
            return self.tree().get(module);
        }
        let path = path.strip_suffix(".weight")?;
        let facts = self.tree().facts();
        let sides = [&facts.input_embedding, &facts.output_embedding];
        let embedding = sides.into_iter().flatten().any(|side| side == path);
        embedding.then(|| self.tree().get(path)).flatten()
    }
}

/// With `save_embedding_layers` HF writes trained rows a second time, under the other side of a tied pair.
fn drop_tied_rows(attached: &Attached, tensors: &mut Tensors) -> Result<()> {
    const ROWS: &str = ".token_adapter.trainable_tokens_delta";
    let own = |key: &str| attached.store.get(key).is_some();
    let rows = |mine: bool| {
        let keys = tensors.keys().filter(|key| key.ends_with(ROWS));
        keys.filter(move |key| own(key) == mine).cloned()
    };
    let (copies, kept): (Vec<String>, Vec<String>) = (rows(false).collect(), rows(true).collect());
    let mut same = Vec::new();
    for copy in copies {
        for key in &kept {
            let (a, b) = (&tensors[&copy], &tensors[key]);
            if a.shape() == b.shape() && a.to_vec()? == b.to_vec()? {
                same.push(copy);
                break;
            }
        }
    }
    same.iter().for_each(|key| drop(tensors.remove(key)));
    Ok(())
}
