//! A model's tokenizer as the data needs it.

use peft_core::Result;
use peft_models::Tokenizer;
use serde_json::Value;

use crate::data::Encoder;

impl Encoder for Tokenizer {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.encode_with(text, special)
    }

    fn eos(&self) -> Option<u32> {
        Tokenizer::eos(self).first().copied()
    }

    fn pad(&self) -> Option<u32> {
        Tokenizer::pad(self)
    }

    fn chat(&self, messages: &[Value]) -> Result<Vec<(u32, bool)>> {
        self.chat_tokens(messages)
    }
}
