//! The vocabularies of OpenAI's models, and which model uses which.

use tiktoken_rs::tokenizer::{Tokenizer, get_tokenizer};

use super::encoder::{CL100K, Encoder, O200K};

/// The longest text that the older vocabularies count. tiktoken-rs counts them, and it is superlinear on long words and
/// panics on a million spaces; 32 KiB is twice what these models' contexts hold.
pub const OLD_TEXT_BYTES_MAX: usize = 32 << 10;

/// How a model cuts text into tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vocabulary {
    O200k,
    Cl100k,
    P50k,
    R50k,
}

impl Vocabulary {
    /// The vocabulary of a model by tiktoken's table of names, `ft:` names included; `None` for a foreign model.
    pub fn of_model(model: &str) -> Option<Self> {
        Some(match get_tokenizer(model)? {
            // Harmony adds special tokens only, and those are never in an ordinary text.
            Tokenizer::O200kBase | Tokenizer::O200kHarmony => Self::O200k,
            Tokenizer::Cl100kBase => Self::Cl100k,
            Tokenizer::P50kBase | Tokenizer::P50kEdit => Self::P50k,
            Tokenizer::R50kBase | Tokenizer::Gpt2 => Self::R50k,
        })
    }

    /// The tokens of an ordinary text: `<|endoftext|>` in it is thirteen characters, not a token.
    ///
    /// Linear in the text for `O200k` and `Cl100k`, at 10–100 MB/s (1 MB/s for runs of `-`, `=`, `/`). For `P50k` and
    /// `R50k` a text above [`OLD_TEXT_BYTES_MAX`] is not counted: its bytes are returned, which no count exceeds.
    pub fn count(self, text: &str) -> u64 {
        match self.encoder() {
            Some(encoder) => encoder.count(text),
            None => self.count_old(text),
        }
    }

    /// Loads the tables, up to 0.3 s, so that no request has to wait for them.
    pub fn warm(self) {
        self.count("warm");
    }

    /// The encoder of a vocabulary in use today; the older ones have none.
    pub(super) fn encoder(self) -> Option<&'static Encoder> {
        match self {
            Self::O200k => Some(&O200K),
            Self::Cl100k => Some(&CL100K),
            Self::P50k | Self::R50k => None,
        }
    }

    fn count_old(self, text: &str) -> u64 {
        if text.len() > OLD_TEXT_BYTES_MAX {
            return text.len() as u64;
        }
        let tokenizer = match self {
            Self::P50k => tiktoken_rs::p50k_base_singleton(),
            _ => tiktoken_rs::r50k_base_singleton(),
        };
        tokenizer.count_ordinary(text) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_their_vocabulary_and_foreign_ones_none() {
        for (model, vocabulary) in [
            ("gpt-4o-mini", Some(Vocabulary::O200k)),
            ("gpt-5-nano-2025-08-07", Some(Vocabulary::O200k)),
            ("gpt-oss-20b", Some(Vocabulary::O200k)),
            ("gpt-4-turbo", Some(Vocabulary::Cl100k)),
            ("gpt-3.5-turbo-instruct", Some(Vocabulary::Cl100k)),
            ("ft:gpt-4o:org:name:id", Some(Vocabulary::O200k)),
            ("text-davinci-003", Some(Vocabulary::P50k)),
            ("davinci", Some(Vocabulary::R50k)),
            ("qwen-max", None),
            ("", None),
        ] {
            assert_eq!(Vocabulary::of_model(model), vocabulary, "{model}");
        }
    }

    #[test]
    fn special_token_text_is_counted_as_text() {
        let text = "<|endoftext|><|im_start|>user<|fim_prefix|><|endofprompt|>";
        assert_eq!(Vocabulary::O200k.count(text), tiktoken_rs::o200k_base_singleton().count_ordinary(text) as u64);
        assert_eq!(Vocabulary::Cl100k.count(text), tiktoken_rs::cl100k_base_singleton().count_ordinary(text) as u64);
        for vocabulary in [Vocabulary::O200k, Vocabulary::Cl100k, Vocabulary::P50k, Vocabulary::R50k] {
            assert!(vocabulary.count("<|endoftext|>") > 1);
        }
    }

    #[test]
    fn an_old_vocabulary_counts_up_to_its_bound_and_then_bytes() {
        let text = "word ".repeat(OLD_TEXT_BYTES_MAX);
        assert_eq!(Vocabulary::P50k.count("two words"), 2);
        assert_eq!(Vocabulary::R50k.count("two words"), 2);
        assert_eq!(Vocabulary::P50k.count(&text), text.len() as u64);
    }
}
