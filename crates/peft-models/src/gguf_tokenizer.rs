//! A GGUF's tokenizer metadata as the `tokenizer.json` it was made from.
//!
//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`) keeps its merges in the file and names its way of splitting text
//! in `tokenizer.ggml.pre`. SentencePiece BPE (`llama`) keeps scores instead, from which the merges follow: every cut
//! of a token into two tokens is a merge, the better the token's score the earlier.

use std::collections::HashMap;

use peft_core::{Error, Result};
use peft_io::{Gguf, MetaArray, MetaValue};
use serde_json::{Map, Value, json};

use crate::source::io;

const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Splits of the text before merging, as regular expressions in Oniguruma's syntax.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is split, by `tokenizer.ggml.pre`.
const PRE: &str = "default, gpt-2, gpt2, llama-bpe, llama3, llama-v3, qwen2, smollm";

/// The `tokenizer.json`.
pub(crate) fn tokenizer_json(gguf: &Gguf) -> Result<Value> {
    let model = gguf.str("tokenizer.ggml.model").map_err(io)?;
    let tokens = gguf.strings("tokenizer.ggml.tokens").map_err(io)?;
    let types: Vec<i64> = match gguf
        .get("tokenizer.ggml.token_type")
        .and_then(MetaValue::as_array)
    {
        Some(array) => (0..array.len())
            .map(|i| array.get(i).and_then(|v| v.as_i64()).unwrap_or(NORMAL))
            .collect(),
        None => Vec::new(),
    };
    let ends: Vec<usize> = ["bos", "eos", "padding"]
        .iter()
        .filter_map(|name| {
            gguf.get(&format!("tokenizer.ggml.{name}_token_id"))?
                .as_u64()
        })
        .filter_map(|id| usize::try_from(id).ok())
        .collect();
    let kind = |id: usize| match types.get(id) {
        _ if ends.contains(&id) => CONTROL,
        Some(&kind) => kind,
        None => NORMAL,
    };
    let special = |name: &str| {
        let id = gguf
            .get(&format!("tokenizer.ggml.{name}_token_id"))
            .and_then(MetaValue::as_u64)?;
        tokens
            .get(usize::try_from(id).ok()?)
            .map(|text| (id, text.clone()))
    };
    let flag = |name: &str| {
        gguf.get(&format!("tokenizer.ggml.{name}"))
            .and_then(MetaValue::as_bool)
    };
    let mut parts = match model {
        "gpt2" => byte_level(gguf, tokens, &kind)?,
        "llama" => sentencepiece(
            gguf,
            tokens,
            special("unknown").map(|(_, text)| text),
            flag("add_space_prefix"),
        )?,
        other => {
            let detail = format!(
                "tokenizer.ggml.model is {other:?}, which is not read; known are gpt2, llama"
            );
            return Err(Error::file(gguf.path(), detail));
        }
    };
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter(|&(id, text)| matches!(kind(id), CONTROL | USER_DEFINED) && !text.is_empty())
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind(id) == CONTROL})
        })
        .collect();
    let around = [
        (
            "bos",
            flag("add_bos_token").unwrap_or(model == "llama"),
            true,
        ),
        ("eos", flag("add_eos_token").unwrap_or(false), false),
    ];
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut named = Map::new();
    for (name, wanted, front) in around {
        if let (true, Some((id, text))) = (wanted, special(name)) {
            let piece = json!({"SpecialToken": {"id": text, "type_id": 0}});
            single.insert(if front { 0 } else { single.len() }, piece);
            named.insert(
                text.clone(),
                json!({"id": text, "ids": [id], "tokens": [text]}),
            );
        }
    }
    let post = if named.is_empty() {
        Value::Null
    } else {
        let pair: Vec<Value> = single.clone();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named})
    };
    for (name, value) in [
        ("version", json!("1.0")),
        ("truncation", Value::Null),
        ("padding", Value::Null),
        ("added_tokens", Value::Array(added)),
        ("post_processor", post),
    ] {
        parts.insert(name.to_owned(), value);
    }
    Ok(Value::Object(parts))
}

/// Tokens by their text; the first of equals keeps it.
fn vocabulary(tokens: impl Iterator<Item = String>) -> Map<String, Value> {
    let mut vocab = Map::new();
    for (id, token) in tokens.enumerate() {
        vocab.entry(token).or_insert(json!(id));
    }
    vocab
}

fn byte_level(
    gguf: &Gguf,
    tokens: &[String],
    kind: &dyn Fn(usize) -> i64,
) -> Result<Map<String, Value>> {
    let pre = gguf
        .get("tokenizer.ggml.pre")
        .and_then(MetaValue::as_str)
        .unwrap_or("default");
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let sequence =
        |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    let (pre_tokenizer, whole_words) = match pre {
        "default" | "gpt-2" | "gpt2" => (bytes(true), false),
        "smollm" => (
            sequence(
                json!({"type": "Digits", "individual_digits": true}),
                bytes(true),
            ),
            false,
        ),
        "llama-bpe" | "llama3" | "llama-v3" => (sequence(split(LLAMA3), bytes(false)), true),
        "qwen2" => (sequence(split(QWEN2), bytes(false)), false),
        other => {
            let detail =
                format!("tokenizer.ggml.pre is {other:?}, which is not read; known are {PRE}");
            return Err(Error::file(gguf.path(), detail));
        }
    };
    let merges = gguf.strings("tokenizer.ggml.merges").map_err(io)?;
    let pairs: Option<Vec<Value>> = merges
        .iter()
        .map(|m| m.split_once(' ').map(|(a, b)| json!([a, b])))
        .collect();
    let Some(pairs) = pairs else {
        return Err(Error::file(
            gguf.path(),
            "tokenizer.ggml.merges holds an entry that is no pair",
        ));
    };
    // Tokens a person added are spelt as they are, all others in the byte alphabet.
    let spelt = tokens.iter().enumerate().map(|(id, token)| {
        let plain = matches!(kind(id), CONTROL | USER_DEFINED) || token.chars().all(in_alphabet);
        if plain {
            token.clone()
        } else {
            token.bytes().map(letter).collect()
        }
    });
    let mut parts = Map::new();
    parts.insert("normalizer".into(), Value::Null);
    parts.insert("pre_tokenizer".into(), pre_tokenizer);
    parts.insert("decoder".into(), bytes(true));
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole_words,
        "vocab": vocabulary(spelt), "merges": pairs});
    parts.insert("model".into(), model);
    Ok(parts)
}

/// GPT-2's letter for a byte: itself where it prints, else one of the letters from U+0100 on, in order.
fn letter(byte: u8) -> char {
    let prints = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if prints(byte) {
        return char::from(byte);
    }
    let earlier = (0..byte).filter(|&b| !prints(b)).count() as u32;
    char::from_u32(0x100 + earlier).unwrap_or('\u{FFFD}')
}

fn in_alphabet(c: char) -> bool {
    matches!(c, '!'..='~' | '\u{A1}'..='\u{AC}' | '\u{AE}'..='\u{FF}' | '\u{100}'..='\u{143}')
}

fn sentencepiece(
    gguf: &Gguf,
    tokens: &[String],
    unknown: Option<String>,
    space_prefix: Option<bool>,
) -> Result<Map<String, Value>> {
    let architecture = gguf.architecture().map_err(io)?;
    let gemma = architecture.starts_with("gemma");
    // Gemma's files spell runs of spaces as spaces.
    let spelt: Vec<String> = tokens
        .iter()
        .map(|t| {
            if gemma && !t.is_empty() && t.chars().all(|c| c == ' ') {
                "\u{2581}".repeat(t.len())
            } else {
                t.clone()
            }
        })
        .collect();
    let merges = match gguf.get("tokenizer.ggml.merges") {
        Some(_) => {
            let stored = gguf.strings("tokenizer.ggml.merges").map_err(io)?;
            stored
                .iter()
                .filter_map(|m| m.split_once(' '))
                .map(|(a, b)| (a.to_owned(), b.to_owned()))
                .collect()
        }
        None if gemma => {
            // Gemma's scores do not follow its merges; the order of its tokens does.
            let order: Vec<f32> = (0..spelt.len()).map(|id| -(id as f32)).collect();
            merges_of(&spelt, &order)
        }
        None => match gguf
            .get("tokenizer.ggml.scores")
            .and_then(MetaValue::as_array)
        {
            Some(MetaArray::F32(scores)) if scores.len() == spelt.len() => {
                merges_of(&spelt, scores)
            }
            _ => {
                return Err(Error::file(
                    gguf.path(),
                    "tokenizer.ggml.scores does not have one number a token",
                ));
            }
        },
    };
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prefix = space_prefix.unwrap_or(!gemma);
    let (normalizer, pre_tokenizer) = match architecture {
        "phi3" => {
            let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
            (
                json!({"type": "Sequence", "normalizers": [prepend, spaces]}),
                Value::Null,
            )
        }
        _ if gemma => {
            let split = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
            (spaces, split)
        }
        _ => {
            let scheme = if prefix { "first" } else { "never" };
            (
                Value::Null,
                json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false}),
            )
        }
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix && !gemma {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let pairs: Vec<Value> = merges.into_iter().map(|(a, b)| json!([a, b])).collect();
    let model = json!({"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocabulary(spelt.into_iter()), "merges": pairs});
    let mut parts = Map::new();
    parts.insert("normalizer".into(), normalizer);
    parts.insert("pre_tokenizer".into(), pre_tokenizer);
    parts.insert(
        "decoder".into(),
        json!({"type": "Sequence", "decoders": decoders}),
    );
    parts.insert("model".into(), model);
    Ok(parts)
}

/// Merges that a vocabulary with scores implies: best token first, then the shorter left part, then the shorter right
/// part; cuts of one token in the order of their parts' ids.
fn merges_of(tokens: &[String], scores: &[f32]) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| (t.as_str(), id))
        .collect();
    let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let mut cuts: Vec<(usize, usize, &str, &str)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, left, right))
            })
            .collect();
        cuts.sort_by_key(|&(l, r, _, _)| (l, r));
        let score = scores.get(id).copied().unwrap_or(f32::NEG_INFINITY);
        merges.extend(
            cuts.into_iter()
                .map(|(_, _, l, r)| (score, l.chars().count(), r.chars().count(), l, r)),
        );
    }
    // transformers sorts all three keys in reverse, and stably.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    merges
        .into_iter()
        .map(|(_, _, _, l, r)| (l.to_owned(), r.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_gpt2s() {
        assert_eq!(letter(b' '), '\u{120}');
        assert_eq!(letter(b'\n'), '\u{10A}');
        assert_eq!(letter(0), '\u{100}');
        assert_eq!(letter(0xAD), '\u{143}');
        assert_eq!(letter(b'a'), 'a');
        let mut all: Vec<char> = (0..=255).map(letter).collect();
        assert!(all.iter().all(|&c| in_alphabet(c)));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn merges_follow_scores_then_lengths() {
        let tokens = ["a", "b", "ab", "c", "abc", "bc"].map(str::to_owned);
        let merges = merges_of(&tokens, &[0.0, 0.0, -2.0, 0.0, -1.0, -3.0]);
        let merges: Vec<_> = merges
            .iter()
            .map(|(l, r)| (l.as_str(), r.as_str()))
            .collect();
        assert_eq!(merges, [("ab", "c"), ("a", "bc"), ("a", "b"), ("b", "c")]);
    }
}
