//! Text to tokens and back: `tokenizer.json` of a Hugging Face folder, or a GGUF's metadata (see
//! [`crate::gguf_tokenizer`]), with the chat template that comes along.

use std::path::Path;

use peft_core::serde_json::{Value, json};
use peft_core::{Error, Result};
use peft_io::{Gguf, MetaValue};

use crate::chat::ChatTemplate;
use crate::gguf_tokenizer;
use crate::source::io;

/// A tokenizer with its special tokens and chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    template: Option<String>,
    /// Names and texts that templates may use (`bos_token`, ...).
    specials: Vec<(String, String)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json` where
    /// they are there.
    ///
    /// # Errors
    /// If there is no `tokenizer.json`, or a file is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::file(
                folder,
                "has no tokenizer.json (save the tokenizer with `save_pretrained`)",
            ));
        }
        let bytes = peft_io::read_bytes(&path).map_err(io)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::file(&path, e.to_string()))?;
        // Some files keep the lengths of the last training run; lengths are the caller's here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(tokenizer_error)?;
        let read = |name: &str| -> Result<Value> {
            let path = folder.join(name);
            if path.is_file() {
                peft_io::read_json(&path).map_err(io)
            } else {
                Ok(Value::Null)
            }
        };
        let config = read("tokenizer_config.json")?;
        let generation = read("generation_config.json")?;
        let separate = folder.join("chat_template.jinja");
        let template = if separate.is_file() {
            Some(peft_io::read_text(&separate).map_err(io)?)
        } else {
            template_of(&config["chat_template"])
        };
        let specials = specials_of(&config);
        let id = |name: &str| {
            specials
                .iter()
                .find(|(n, _)| n == name)
                .and_then(|(_, text)| inner.token_to_id(text))
        };
        let (bos, pad) = (id("bos_token"), id("pad_token"));
        let mut eos: Vec<u32> = id("eos_token").into_iter().collect();
        let stated = &generation["eos_token_id"];
        let more = stated
            .as_array()
            .map_or_else(|| std::slice::from_ref(stated), Vec::as_slice);
        for id in more
            .iter()
            .filter_map(Value::as_u64)
            .filter_map(|id| u32::try_from(id).ok())
        {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        Ok(Self {
            inner,
            bos,
            eos,
            pad,
            template,
            specials,
        })
    }

    /// Builds the tokenizer a GGUF describes.
    ///
    /// # Errors
    /// If its kind is unknown (lists the known ones) or its metadata do not fit together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let json = gguf_tokenizer::tokenizer_json(gguf)?;
        let inner = tokenizers::Tokenizer::from_bytes(json.to_string().as_bytes())
            .map_err(|e| Error::file(gguf.path(), format!("tokenizer: {e}")))?;
        let id = |name: &str| {
            let id = gguf
                .get(&format!("tokenizer.ggml.{name}_token_id"))
                .and_then(MetaValue::as_u64)?;
            u32::try_from(id).ok()
        };
        let mut eos: Vec<u32> = ["eos", "eot", "eom"].into_iter().filter_map(id).collect();
        eos.dedup();
        let mut specials = Vec::new();
        for (name, key) in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ] {
            if let Some(text) = id(key).and_then(|id| inner.id_to_token(id)) {
                specials.push((name.to_owned(), text));
            }
        }
        let template = gguf
            .get("tokenizer.chat_template")
            .and_then(MetaValue::as_str)
            .map(str::to_owned);
        Ok(Self {
            bos: id("bos"),
            pad: id("padding"),
            eos,
            inner,
            template,
            specials,
        })
    }

    /// `tokenizer.json` and `tokenizer_config.json` that make the same tokenizer in a Hugging Face folder: for one that
    /// came out of a GGUF.
    ///
    /// # Errors
    /// Whatever the tokenizer says.
    pub fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        if let Some(map) = config.as_object_mut() {
            map.extend(
                self.specials
                    .iter()
                    .map(|(name, text)| (name.clone(), json!(text))),
            );
            map.extend(
                self.template
                    .iter()
                    .map(|t| ("chat_template".to_owned(), json!(t))),
            );
        }
        let text = self.inner.to_string(false).map_err(tokenizer_error)?;
        Ok(vec![
            ("tokenizer.json", text.into_bytes()),
            (
                "tokenizer_config.json",
                format!("{config:#}\n").into_bytes(),
            ),
        ])
    }

    /// Tokens of a text, with the special tokens (BOS, `[CLS]`, ...) the tokenizer adds.
    ///
    /// # Errors
    /// Whatever the tokenizer says.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// Tokens of a text, with special tokens only if asked for. Special tokens written out in the text count as such.
    ///
    /// # Errors
    /// Whatever the tokenizer says.
    pub fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, special)
            .map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, special ones left out. Bytes that are no whole character come out as U+FFFD.
    ///
    /// # Errors
    /// Whatever the tokenizer says.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(tokenizer_error)
    }

    /// Token that starts a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens that end a text; the first is the one to append in training.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Token to fill rows up with, if there is one of its own.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The id of a token by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of tokens, added ones included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The chat template's source.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// The chat template, ready to render.
    ///
    /// # Errors
    /// If there is none or it does not parse.
    pub fn chat(&self) -> Result<ChatTemplate> {
        let missing = || {
            Error::config(
                "messages",
                "the model has no chat template; use text or prompt and completion",
            )
        };
        ChatTemplate::new(
            self.template.as_deref().ok_or_else(missing)?,
            &self.specials,
        )
    }

    /// A conversation as tokens; those of the assistant's turns, the token that ends them included, are to be learnt.
    ///
    /// # Errors
    /// If there is no template, or it does not take these messages.
    pub fn chat_tokens(&self, messages: &[Value]) -> Result<Vec<(u32, bool)>> {
        let (text, spans) = self.chat()?.spans(messages)?;
        let encoding = self
            .inner
            .encode(text.as_str(), false)
            .map_err(tokenizer_error)?;
        let learnt = |&(start, end): &(usize, usize)| {
            spans
                .iter()
                .any(|s| start >= s.start && end <= s.end && start < end)
        };
        let flags = encoding.get_offsets().iter().map(learnt);
        Ok(encoding.get_ids().iter().copied().zip(flags).collect())
    }

    /// A conversation as the text the model is to go on from.
    ///
    /// # Errors
    /// As [`Tokenizer::chat_tokens`].
    pub fn chat_prompt(&self, messages: &[Value]) -> Result<String> {
        self.chat()?.render(messages, true)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tokenizer({} tokens, bos {:?}, eos {:?})",
            self.len(),
            self.bos,
            self.eos
        )
    }
}

fn tokenizer_error(error: tokenizers::Error) -> Error {
    Error::other(format!("tokenizer: {error}"))
}

/// A template is a string, or a list of named ones of which `default` is meant.
fn template_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let named = list
                .iter()
                .find(|t| t["name"] == "default")
                .or(list.first())?;
            named["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Special tokens of a `tokenizer_config.json`: strings, or objects with a `content`.
fn specials_of(config: &Value) -> Vec<(String, String)> {
    let Some(map) = config.as_object() else {
        return Vec::new();
    };
    map.iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value["content"].as_str())?;
            Some((name.clone(), text.to_owned()))
        })
        .collect()
}

/// Text of tokens that come one by one: gives characters out once they are whole.
pub(crate) struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Tokens before this one are only there because decoders look at what comes before.
    start: usize,
    /// Tokens before this one have been given out.
    read: usize,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            start: 0,
            read: 0,
        }
    }

    /// The text that is complete with this token.
    pub(crate) fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.step(false)
    }

    /// What is left, incomplete characters included.
    pub(crate) fn finish(&mut self) -> Result<String> {
        self.step(true)
    }

    fn step(&mut self, all: bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.start..self.read])?;
        let now = self.tokenizer.decode(&self.ids[self.start..])?;
        if now.ends_with('\u{FFFD}') && !all {
            return Ok(String::new());
        }
        let new = now.strip_prefix(&before).unwrap_or("").to_owned();
        if new.is_empty() && !all {
            return Ok(new);
        }
        (self.start, self.read) = (self.read, self.ids.len());
        Ok(new)
    }
}
