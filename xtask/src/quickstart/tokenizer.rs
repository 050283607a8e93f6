//! The example's tokenizer: byte-level BPE learned from the corpus, in the layout of a `tokenizer.json`.

use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, TokenizerBuilder};

/// The one special token, id 0: it ends a text.
const END: &str = "<|endoftext|>";

/// Learns a vocabulary; gives the tokenizer as JSON.
pub(super) fn train(texts: &[String], vocabulary: usize) -> Result<String> {
    let words = ByteLevel::new(false, false, true);
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        ByteLevel,
        PostProcessorWrapper,
        ByteLevelDecoder,
    >::new()
    .with_model(BPE::default())
    .with_normalizer(None)
    .with_pre_tokenizer(Some(words))
    .with_post_processor(None)
    .with_decoder(Some(words))
    .build()
    .map_err(|e| anyhow!("the tokenizer: {e}"))?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocabulary)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END, true)])
        .show_progress(false)
        .build();
    tokenizer
        .train(&mut trainer, texts.iter())
        .map_err(|e| anyhow!("training the tokenizer: {e}"))?;
    let text = tokenizer
        .to_string(false)
        .map_err(|e| anyhow!("the tokenizer: {e}"))?;
    Ok(format!("{text}\n"))
}

/// `tokenizer_config.json`.
pub(super) fn config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": false
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_comes_back_and_frequent_words_are_one_token() {
        let texts: Vec<String> = (0..20).map(|i| format!("the film number {i}")).collect();
        let json = train(&texts, 300).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
        assert_eq!(tokenizer.token_to_id(END), Some(0));
        assert!(tokenizer.get_vocab_size(true) <= 300);
        for text in [
            "the film",
            " Ünseen – words\n\t🎬",
            "Review: x\nSentiment: positive",
        ] {
            let encoding = tokenizer.encode(text, true).unwrap();
            assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text);
        }
        assert_eq!(
            tokenizer.encode("the film", false).unwrap().get_tokens(),
            ["the", "Ġfilm"]
        );
        assert_ne!(json, train(&texts, 262).unwrap());
        assert_eq!(json, train(&texts, 300).unwrap());
    }
}
