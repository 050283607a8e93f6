//! Typed look-ups in a JSON object whose errors name the field.

use peft_core::{Error, Result};
use serde_json::{Map, Value};

/// A JSON object.
pub(crate) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn new(json: &'a Value) -> Result<Self> {
        json.as_object()
            .map(Self)
            .ok_or_else(|| Error::config("config.json", "is not a JSON object"))
    }

    /// The value, unless it is missing or null.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn typed<T>(
        &self,
        field: &str,
        wanted: &str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match take(value) {
                Some(taken) => Ok(Some(taken)),
                None => Err(Error::config(field, format!("{value} is not {wanted}"))),
            },
        }
    }

    fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::config(field, "is missing from the model's configuration"))
    }

    pub(crate) fn opt_count(&self, field: &str) -> Result<Option<usize>> {
        self.typed(field, "a non-negative integer", |v| {
            usize::try_from(v.as_u64()?).ok()
        })
    }

    pub(crate) fn count(&self, field: &str) -> Result<usize> {
        self.required(field, self.opt_count(field)?)
    }

    pub(crate) fn count_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.opt_count(field)?.unwrap_or(default))
    }

    pub(crate) fn opt_float(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number", Value::as_f64)
    }

    pub(crate) fn float(&self, field: &str) -> Result<f64> {
        self.required(field, self.opt_float(field)?)
    }

    pub(crate) fn float_or(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.opt_float(field)?.unwrap_or(default))
    }

    pub(crate) fn floats(&self, field: &str) -> Result<Vec<f64>> {
        let list = self.typed(field, "a list of numbers", |v| {
            v.as_array()?.iter().map(Value::as_f64).collect()
        })?;
        self.required(field, list)
    }

    pub(crate) fn flag_or(&self, field: &str, default: bool) -> Result<bool> {
        Ok(self
            .typed(field, "true or false", Value::as_bool)?
            .unwrap_or(default))
    }

    pub(crate) fn opt_text(&self, field: &str) -> Result<Option<&'a str>> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(crate) fn text(&self, field: &str) -> Result<&'a str> {
        self.required(field, self.opt_text(field)?)
    }

    pub(crate) fn text_or(&self, field: &str, default: &'a str) -> Result<&'a str> {
        Ok(self.opt_text(field)?.unwrap_or(default))
    }

    /// A list of strings; empty where there is none.
    pub(crate) fn texts(&self, field: &str) -> Result<Vec<String>> {
        let take = |v: &'a Value| {
            v.as_array()?
                .iter()
                .map(|s| s.as_str().map(str::to_owned))
                .collect()
        };
        Ok(self
            .typed(field, "a list of strings", take)?
            .unwrap_or_default())
    }

    /// A token id; -1 means none, as some configurations have it.
    pub(crate) fn opt_token(&self, field: &str) -> Result<Option<u32>> {
        if self
            .get(field)
            .and_then(Value::as_i64)
            .is_some_and(|id| id < 0)
        {
            return Ok(None);
        }
        self.typed(field, "a token id", |v| u32::try_from(v.as_u64()?).ok())
    }

    /// One token id or a list of them.
    pub(crate) fn tokens(&self, field: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
        match self.get(field) {
            Some(Value::Array(_)) => {
                let take = |v: &'a Value| v.as_array()?.iter().map(id).collect();
                Ok(self
                    .typed(field, "a list of token ids", take)?
                    .unwrap_or_default())
            }
            _ => Ok(self.opt_token(field)?.into_iter().collect()),
        }
    }
}
