//! A model's logits for given ids, as a file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use peft_core::serde_json::Value;
use peft_core::{Error, Pass, Result};
use peft_models::{Batch, Model, Task};
use peft_tensor::no_grad;

/// Ids to run: `{"input_ids": [[..]], "attention_mask": [[..]]?, "task_ids": [..]?, "adapter_names": [..]?}`.
#[derive(Clone, Debug)]
pub struct LogitsInput {
    /// The rows, all of one length.
    pub batch: Batch,
    /// The adapter of each row, by its name on the network; None is the base model (`"__base__"` in the file).
    pub adapter_names: Option<Vec<Option<String>>>,
}

/// How a file says that no adapter acts on a row, as in Hugging Face PEFT.
const BASE: &str = "__base__";

/// What was written.
#[derive(Clone, Debug)]
pub struct LogitsReport {
    /// `logits` or `last_hidden_state`.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl LogitsInput {
    /// Reads the JSON file.
    ///
    /// # Errors
    /// If a key is missing, unknown or not of its form, or rows differ in length; names file and key.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&peft_io::read_json(path)?).map_err(|e| e.context(path.display().to_string()))
    }

    /// From the value of such a file.
    ///
    /// # Errors
    /// As [`LogitsInput::read`].
    pub fn parse(value: &Value) -> Result<Self> {
        const KEYS: [&str; 4] = ["input_ids", "attention_mask", "task_ids", "adapter_names"];
        let Some(fields) = value.as_object() else {
            return Err(Error::other("expected an object with the key `input_ids`"));
        };
        if let Some(key) = fields.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(Error::config(
                key,
                format!("is not known; known are {}", KEYS.join(", ")),
            ));
        }
        let (rows, seq, ids) =
            table("input_ids", fields.get("input_ids"), id)?.ok_or_else(|| {
                Error::config("input_ids", "is required: a list of rows of token ids")
            })?;
        let mask = match table("attention_mask", fields.get("attention_mask"), bit)? {
            Some((r, s, mask)) if (r, s) == (rows, seq) => Some(mask),
            Some((r, s, _)) => {
                return Err(Error::config(
                    "attention_mask",
                    format!("is {r} x {s}, input_ids is {rows} x {seq}"),
                ));
            }
            None => None,
        };
        let task_ids = match fields.get("task_ids") {
            None | Some(Value::Null) => None,
            Some(value) => Some(row("task_ids", value, id)?),
        };
        if let Some(tasks) = task_ids.as_ref().filter(|t| t.len() != rows) {
            return Err(Error::config(
                "task_ids",
                format!("has {} entries for {rows} rows", tasks.len()),
            ));
        }
        let adapter_names = match fields.get("adapter_names") {
            None | Some(Value::Null) => None,
            Some(value) => Some(row("adapter_names", value, |name| {
                let name = name.as_str()?;
                Some((name != BASE).then(|| name.to_owned()))
            })?),
        };
        if let Some(names) = adapter_names.as_ref().filter(|n| n.len() != rows) {
            let detail = format!("has {} entries for {rows} rows", names.len());
            return Err(Error::config("adapter_names", detail));
        }
        Ok(Self {
            adapter_names,
            batch: Batch {
                ids,
                batch: rows,
                seq,
                mask,
                task_ids,
                segments: None,
                shared: 0,
            },
        })
    }
}

impl LogitsInput {
    /// The same rows once for each of these adapters, one adapter's rows after another's.
    ///
    /// # Errors
    /// If rows name adapters already, or there is no adapter.
    pub fn through_each(self, adapters: &[&str]) -> Result<Self> {
        if self.adapter_names.is_some() || adapters.is_empty() {
            let detail =
                "has to be absent, and adapters given, where all rows go through each adapter";
            return Err(Error::config("adapter_names", detail));
        }
        let (b, n) = (self.batch, adapters.len());
        let names = adapters
            .iter()
            .flat_map(|name| std::iter::repeat_n(Some((*name).to_owned()), b.batch));
        Ok(Self {
            adapter_names: Some(names.collect()),
            batch: Batch {
                ids: b.ids.repeat(n),
                batch: b.batch * n,
                seq: b.seq,
                mask: b.mask.map(|mask| mask.repeat(n)),
                task_ids: b.task_ids.map(|tasks| tasks.repeat(n)),
                segments: None,
                shared: 0,
            },
        })
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok())
}

fn bit(value: &Value) -> Option<bool> {
    match value.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        _ => value.as_bool(),
    }
}

fn row<T>(key: &str, value: &Value, read: fn(&Value) -> Option<T>) -> Result<Vec<T>> {
    let items = value
        .as_array()
        .ok_or_else(|| Error::config(key, format!("expected a list, got {value}")))?;
    items
        .iter()
        .map(|item| {
            read(item).ok_or_else(|| Error::config(key, format!("{item} is not one of its values")))
        })
        .collect()
}

/// Rows, their length, and the values one after another.
type Table<T> = (usize, usize, Vec<T>);

fn table<T>(
    key: &str,
    value: Option<&Value>,
    read: fn(&Value) -> Option<T>,
) -> Result<Option<Table<T>>> {
    let Some(value) = value.filter(|v| !v.is_null()) else {
        return Ok(None);
    };
    let rows = value
        .as_array()
        .ok_or_else(|| Error::config(key, "expected a list of rows"))?;
    let rows: Vec<Vec<T>> = rows
        .iter()
        .map(|r| row(key, r, read))
        .collect::<Result<_>>()?;
    let seq = rows.first().map_or(0, Vec::len);
    if seq == 0 {
        return Err(Error::config(key, "holds no tokens"));
    }
    if let Some((i, other)) = rows.iter().enumerate().find(|(_, r)| r.len() != seq) {
        let detail = format!(
            "row {i} has {} entries, row 0 has {seq}; pad them to one length",
            other.len()
        );
        return Err(Error::config(key, detail));
    }
    Ok(Some((
        rows.len(),
        seq,
        rows.into_iter().flatten().collect(),
    )))
}

/// Runs the model on the input and writes `logits` (`last_hidden_state` of a model without a head) in f32 to one
/// safetensors file. Virtual tokens of prompt adapters come first, as HF PEFT returns them.
///
/// # Errors
/// If the input does not fit the model, a result is not finite (broken weights), or the file cannot be written.
pub fn write_logits(model: &Model, input: &LogitsInput, output: &Path) -> Result<LogitsReport> {
    let name = if model.task() == Task::Features {
        "last_hidden_state"
    } else {
        "logits"
    };
    let pass = Pass {
        adapter_names: input.adapter_names.clone().map(Arc::new),
        ..Pass::eval()
    };
    let logits = no_grad(|| model.logits(&input.batch, &pass))?;
    let shape = logits.shape().to_vec();
    let values = logits.to_vec()?;
    peft_io::check_finite(name, &values)?;
    let tensors = BTreeMap::from([(name.to_owned(), (shape.clone(), values))]);
    peft_io::write_tensors(output, &tensors, &BTreeMap::new())?;
    Ok(LogitsReport { name, shape })
}
