//! What methods with virtual tokens share: their number, their initial values, the adapter that puts them in front.

use peft_core::peft_tensor::concat;
use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, Init, Param, PromptCx, PromptPlace, Result, RngKey, Tensor,
};
use serde::{Deserialize, Serialize};

/// Key of an evaluated prompt or prefix, as HF writes it: without anything in front.
pub(crate) const PROMPT: &str = "prompt_embeddings";

/// The field of the start.
const FIELD: &str = "prompt_tuning_init";
/// The field of the labels to start from.
const LABELS: &str = "class_labels";

/// Checks that `count` positions in front leave the model room for at least one token of text.
pub(crate) fn check_count(cx: &Attach<'_>, field: &str, count: usize) -> Result<()> {
    let most = match cx.tree().facts().max_positions {
        0 => usize::MAX,
        positions => positions.saturating_sub(1),
    };
    if (1..=most).contains(&count) {
        return Ok(());
    }
    let range = if most == usize::MAX {
        "has to be at least 1".to_owned()
    } else {
        format!(
            "has to be between 1 and {most}: the model has {} positions",
            most + 1
        )
    };
    Err(Error::config(field, format!("{range}; it is {count}")))
}

/// The parts of a [`peft_core::PeftMethod`] that every method of virtual tokens has: it acts on the model as a whole, which
/// HF wraps once for it.
macro_rules! soft_prompt {
    () => {
        fn sites(
            &self,
            _tree: &peft_core::ModuleTree,
            _common: &peft_core::Common,
        ) -> peft_core::Result<Vec<peft_core::Site>> {
            Ok(vec![peft_core::Site::root()])
        }

        fn module_prefix(&self) -> &'static str {
            "base_model."
        }
    };
}
pub(crate) use soft_prompt;

/// How a prompt's initial values are asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptStart {
    /// `RANDOM`, `SAMPLE_VOCAB`, `TEXT`, `CLASS_LABELS`, or one of the method's own.
    pub prompt_tuning_init: String,
    /// The text to start from.
    pub prompt_tuning_init_text: Option<String>,
    /// The labels to start from.
    pub class_labels: Vec<String>,
    /// HF's, kept for the file: the model's own tokenizer is used.
    pub tokenizer_name_or_path: Option<String>,
    /// HF's, kept for the file.
    pub tokenizer_kwargs: Option<Map<String, Value>>,
}

impl Default for PromptStart {
    fn default() -> Self {
        Self {
            prompt_tuning_init: "RANDOM".to_owned(),
            prompt_tuning_init_text: None,
            class_labels: Vec::new(),
            tokenizer_name_or_path: None,
            tokenizer_kwargs: None,
        }
    }
}

/// The starts that [`PromptStart::init`] knows.
const STARTS: [&str; 4] = ["RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS"];

impl PromptStart {
    /// Initial values of `count` tokens `hidden` wide; `others` are starts that the method sees to itself, for messages. A
    /// saved prompt brings its own values, so that nothing is looked up then.
    pub(crate) fn init(&self, cx: &Attach<'_>, count: usize, others: &[&str]) -> Result<Init> {
        if cx.common().inference_mode {
            return Ok(Init::Zeros);
        }
        match self.prompt_tuning_init.as_str() {
            "RANDOM" => Ok(Init::Normal { std: 1.0 }),
            "SAMPLE_VOCAB" => {
                let table = word_table(cx, FIELD)?;
                let ids = sampled(&table, count, cx.key("sample_vocab"))?;
                Ok(Init::Value(table.gather_rows(&ids)?))
            }
            "TEXT" => self.of_text(cx, count),
            "CLASS_LABELS" => self.of_labels(cx, count),
            other => {
                let known = [&STARTS, others].concat().join(", ");
                Err(Error::config(
                    FIELD,
                    format!("{other:?} is not one of {known}"),
                ))
            }
        }
    }

    /// The text's tokens, repeated or cut to `count`.
    fn of_text(&self, cx: &Attach<'_>, count: usize) -> Result<Init> {
        const TEXT: &str = "prompt_tuning_init_text";
        let text = self
            .prompt_tuning_init_text
            .as_deref()
            .ok_or_else(|| Error::config(TEXT, "has to be given for the start TEXT"))?;
        let ids = cx.tokens(text).map_err(|e| e.context(TEXT.to_owned()))?;
        if ids.is_empty() {
            return Err(Error::config(TEXT, "has no tokens"));
        }
        let ids: Vec<u32> = ids.into_iter().cycle().take(count).collect();
        let table = word_table(cx, FIELD)?;
        check_ids(&table, TEXT, &ids)?;
        Ok(Init::Value(table.gather_rows(&ids)?))
    }

    /// One token for each label, the mean of the label's own; the rest from the vocabulary.
    fn of_labels(&self, cx: &Attach<'_>, count: usize) -> Result<Init> {
        if !(1..=count).contains(&self.class_labels.len()) {
            let detail = format!(
                "has to list 1 to {count} labels for {count} virtual tokens, not {}",
                self.class_labels.len()
            );
            return Err(Error::config(LABELS, detail));
        }
        let inside = |e: Error| e.context(LABELS.to_owned());
        let table = word_table(cx, FIELD)?;
        let frame = cx.tokens("").map_err(inside)?;
        let mut rows = Vec::with_capacity(count);
        for label in &self.class_labels {
            let ids = cx.tokens(label).map_err(inside)?;
            let ids = unframed(&ids, &frame);
            if ids.is_empty() {
                return Err(Error::config(LABELS, format!("{label:?} has no tokens")));
            }
            check_ids(&table, LABELS, ids)?;
            let sum = table.gather_rows(ids)?.sum_axis(0)?;
            let mean = sum.scale(1.0 / ids.len() as f32)?;
            rows.push(mean.reshape(&[1, table.last_dim()])?);
        }
        let left = count - self.class_labels.len();
        if left > 0 {
            let ids = sampled(&table, left, cx.key("sample_vocab"))?;
            rows.push(table.gather_rows(&ids)?);
        }
        let rows: Vec<&Tensor> = rows.iter().collect();
        Ok(Init::Value(concat(&rows, 0)?))
    }

    /// The last word on what a saved configuration says of the start: HF does not know labels as such, and refuses `TEXT`
    /// without the name of a tokenizer, even where it is not used.
    pub(crate) fn finish(&self, config: &mut Map<String, Value>) {
        if self.class_labels.is_empty() {
            config.shift_remove(LABELS);
        }
        let base = config.get("base_model_name_or_path").cloned();
        if let ("TEXT", None, Some(base @ Value::String(_))) = (
            self.prompt_tuning_init.as_str(),
            &self.tokenizer_name_or_path,
            base,
        ) {
            config.insert("tokenizer_name_or_path".to_owned(), base);
        }
    }
}

/// The input embedding `[vocab, hidden]`; the error is about `field`.
pub(crate) fn word_table(cx: &Attach<'_>, field: &str) -> Result<Tensor> {
    let path =
        cx.tree().facts().input_embedding.clone().ok_or_else(|| {
            Error::config(field, "the model has no input embedding to start from")
        })?;
    cx.base_values(&format!("{path}.weight"))
}

/// Refuses ids that are no rows of `table`.
pub(crate) fn check_ids(table: &Tensor, field: &str, ids: &[u32]) -> Result<()> {
    let (rows, _) = table.dims2()?;
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => Err(Error::config(
            field,
            format!(
                "token {id} is beyond the vocabulary, 0 to {}",
                rows.saturating_sub(1)
            ),
        )),
        None => Ok(()),
    }
}

fn sampled(table: &Tensor, count: usize, key: RngKey) -> Result<Vec<u32>> {
    let (rows, _) = table.dims2()?;
    Ok((0..count)
        .map(|i| key.below(i as u64, rows as u64) as u32)
        .collect())
}

/// `ids` without the special tokens of an empty text around them.
fn unframed<'a>(ids: &'a [u32], frame: &[u32]) -> &'a [u32] {
    let front = ids.iter().zip(frame).take_while(|(a, b)| a == b).count();
    let rest = &ids[front..];
    rest.strip_suffix(&frame[front..]).unwrap_or(ids)
}

/// A trained prompt `[V, hidden]`, the same for every row.
pub(crate) struct Prompt {
    pub(crate) tokens: Param,
    pub(crate) place: PromptPlace,
}

impl Adapter for Prompt {
    fn prompt(&self, _at: &PromptCx<'_>) -> Result<Option<Tensor>> {
        Ok(Some(self.tokens.tensor()))
    }

    fn prompt_len(&self) -> usize {
        self.tokens.shape().first().copied().unwrap_or(0)
    }

    fn prompt_place(&self) -> PromptPlace {
        self.place
    }
}

#[cfg(test)]
mod tests {
    use super::unframed;

    #[test]
    fn special_tokens_around_a_label_are_left_out() {
        assert_eq!(unframed(&[1, 7, 8, 2], &[1, 2]), [7, 8]);
        assert_eq!(unframed(&[1, 7], &[1]), [7]);
        assert_eq!(unframed(&[7], &[]), [7]);
        assert_eq!(unframed(&[1, 2], &[1, 2]), [0_u32; 0]);
        // A label may begin with what comes last.
        assert_eq!(unframed(&[1, 2, 2], &[1, 2]), [2]);
    }
}
