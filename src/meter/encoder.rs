//! Cuts a text into the pieces of a vocabulary's regular expression, and counts the tokens of a piece.
//!
//! A tokenizer first cuts a text into pieces (words, numbers, runs of symbols or white space), then each piece into
//! tokens. Nearly all pieces of nearly all texts are ASCII and are one token, so both steps have a fast path: the end of
//! an ASCII piece is found by hand, and a short piece is looked up among all tokens. As soon as a byte that is not ASCII
//! has a say in where a piece ends, `bpe-openai`'s own expression decides; a piece that is no token goes to its
//! byte-pair encoder. The tests hold all of it against `bpe-openai` and against tiktoken.

use std::sync::LazyLock;

use bpe_openai::Tokenizer;

pub(super) static O200K: LazyLock<Encoder> = LazyLock::new(|| Encoder::new(bpe_openai::o200k_base(), Rules::O200k));
pub(super) static CL100K: LazyLock<Encoder> = LazyLock::new(|| Encoder::new(bpe_openai::cl100k_base(), Rules::Cl100k));

/// Counts tokens of one vocabulary.
pub(super) struct Encoder {
    tokenizer: &'static Tokenizer,
    short_tokens: ShortTokens,
    rules: Rules,
}

impl Encoder {
    fn new(tokenizer: &'static Tokenizer, rules: Rules) -> Self {
        Self { tokenizer, short_tokens: ShortTokens::of(tokenizer), rules }
    }

    pub(super) fn count(&self, text: &str) -> u64 {
        let mut tokens = 0;
        let mut start = 0;
        while start < text.len() {
            let end = self.piece_end(text, start);
            tokens += self.piece_tokens(text, start, end);
            start = end;
        }
        tokens
    }

    /// Where the piece ends that begins at `start`, which must be the end of the last one and not that of the text. No
    /// expression looks behind, so what comes before does not matter.
    pub(super) fn piece_end(&self, text: &str, start: usize) -> usize {
        self.rules.ascii_piece_end(text.as_bytes(), start).unwrap_or_else(|| {
            let rest = &text[start..];
            start + self.tokenizer.split(rest).next().map_or(rest.len(), str::len)
        })
    }

    /// The tokens of the piece `text[start..end]`, at least 1.
    pub(super) fn piece_tokens(&self, text: &str, start: usize, end: usize) -> u64 {
        let bytes = text.as_bytes();
        if end - start <= SHORT_BYTES_MAX && self.short_tokens.contains(pack(bytes, start, end)) {
            return 1;
        }
        self.tokenizer.bpe.count(&bytes[start..end]) as u64
    }
}

/// Which of the two expressions cuts the pieces.
///
/// cl100k: `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|` and white space.
/// o200k: the same, but a contraction belongs to the word before it, a lower-case letter is not followed by an
/// upper-case one, and slashes follow symbols as line ends do. White space is the same in both:
/// `\s*[\r\n]+|\s+$|\s+(?!\S)|\s+`.
#[derive(Clone, Copy, PartialEq)]
enum Rules {
    O200k,
    Cl100k,
}

impl Rules {
    /// The end of the piece at `start`, or `None` when a byte that is not ASCII has a say.
    fn ascii_piece_end(self, bytes: &[u8], start: usize) -> Option<usize> {
        let first = class(bytes, start);
        match first {
            Class::Upper | Class::Lower => return self.word_end(bytes, start),
            Class::Digit => return digits_end(bytes, start),
            Class::Newline => return space_end(bytes, start),
            Class::Wide | Class::End => return None,
            Class::Space | Class::Symbol => {}
        }
        if self == Self::Cl100k && bytes[start] == b'\'' {
            let length = contraction_bytes(bytes, start)?;
            if length > 0 {
                return Some(start + length);
            }
        }
        match class(bytes, start + 1) {
            // Any one character that is no line end, letter or digit goes with the word after it.
            Class::Upper | Class::Lower => self.word_end(bytes, start + 1),
            Class::Wide => None,
            _ if first == Class::Symbol => self.symbols_end(bytes, start),
            Class::Symbol if bytes[start] == b' ' => self.symbols_end(bytes, start + 1),
            _ => space_end(bytes, start),
        }
    }

    fn word_end(self, bytes: &[u8], letters: usize) -> Option<usize> {
        if self == Self::Cl100k {
            let end = run(bytes, letters, |class| matches!(class, Class::Upper | Class::Lower));
            return ascii_end(bytes, end);
        }
        let lower = run(bytes, letters, |class| class == Class::Upper);
        let end = ascii_end(bytes, run(bytes, lower, |class| class == Class::Lower))?;
        if bytes.get(end) == Some(&b'\'') { Some(end + contraction_bytes(bytes, end)?) } else { Some(end) }
    }

    fn symbols_end(self, bytes: &[u8], symbols: usize) -> Option<usize> {
        let end = ascii_end(bytes, run(bytes, symbols, |class| class == Class::Symbol))?;
        let follows = |byte: &u8| matches!(byte, b'\r' | b'\n') || self == Self::O200k && *byte == b'/';
        Some(end + bytes[end..].iter().take_while(|byte| follows(byte)).count())
    }
}

/// Three digits at most.
fn digits_end(bytes: &[u8], start: usize) -> Option<usize> {
    for end in start + 1..start + 3 {
        match class(bytes, end) {
            Class::Digit => {}
            Class::Wide => return None,
            _ => return Some(end),
        }
    }
    Some(start + 3)
}

/// Up to the last line end; without one the run, less its last character, which goes with what follows.
fn space_end(bytes: &[u8], start: usize) -> Option<usize> {
    let end = ascii_end(bytes, run(bytes, start, |class| matches!(class, Class::Space | Class::Newline)))?;
    if let Some(newline) = bytes[start..end].iter().rposition(|byte| matches!(byte, b'\r' | b'\n')) {
        return Some(start + newline + 1);
    }
    Some(if end == bytes.len() || end == start + 1 { end } else { end - 1 })
}

/// The length of the contraction at an apostrophe, 0 for none; `None` where the long s, which folds to s, may follow.
fn contraction_bytes(bytes: &[u8], apostrophe: usize) -> Option<usize> {
    let letter = |index: usize| bytes.get(index).map_or(0, u8::to_ascii_lowercase);
    match (letter(apostrophe + 1), letter(apostrophe + 2)) {
        (b's' | b't' | b'm' | b'd', _) => Some(2),
        (b'r' | b'v', b'e') | (b'l', b'l') => Some(3),
        (0x80.., _) => None,
        _ => Some(0),
    }
}

/// `end`, unless the run could go on with the character there.
fn ascii_end(bytes: &[u8], end: usize) -> Option<usize> {
    (class(bytes, end) != Class::Wide).then_some(end)
}

fn run(bytes: &[u8], start: usize, belongs: impl Fn(Class) -> bool) -> usize {
    let rest = &bytes[start..];
    start + rest.iter().position(|byte| !belongs(CLASSES[*byte as usize])).unwrap_or(rest.len())
}

fn class(bytes: &[u8], index: usize) -> Class {
    bytes.get(index).map_or(Class::End, |byte| CLASSES[*byte as usize])
}

#[derive(Clone, Copy, PartialEq)]
enum Class {
    Upper,
    Lower,
    Digit,
    Newline,
    Space,
    /// Control characters included: for Unicode 0x1c to 0x1f are not white space.
    Symbol,
    /// Not ASCII.
    Wide,
    /// Behind the last byte.
    End,
}

const CLASSES: [Class; 256] = {
    let mut classes = [Class::Symbol; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'A'..=b'Z' => Class::Upper,
            b'a'..=b'z' => Class::Lower,
            b'0'..=b'9' => Class::Digit,
            b'\r' | b'\n' => Class::Newline,
            b' ' | b'\t' | 0x0b | 0x0c => Class::Space,
            0x80.. => Class::Wide,
            _ => Class::Symbol,
        };
        byte += 1;
    }
    classes
};

/// All tokens of at most 15 bytes, which are nearly all tokens, in an open-addressed table: 8 MiB for o200k.
struct ShortTokens {
    slots: Box<[u128]>,
    shift: u32,
}

/// What fits a `u128` beside its length.
const SHORT_BYTES_MAX: usize = 15;

impl ShortTokens {
    fn of(tokenizer: &Tokenizer) -> Self {
        let tokens = 0..tokenizer.bpe.num_tokens() as u32;
        let short = tokens.map(|token| tokenizer.bpe.token_bytes(token)).filter(|bytes| bytes.len() <= SHORT_BYTES_MAX);
        // At most half full, so that a miss ends soon.
        let slots = (2 * tokenizer.bpe.num_tokens()).next_power_of_two();
        let mut table = Self { slots: vec![0; slots].into(), shift: u64::BITS - slots.trailing_zeros() };
        for bytes in short {
            let key = pack(bytes, 0, bytes.len());
            let slot = table.find(key);
            table.slots[slot] = key;
        }
        table
    }

    fn contains(&self, key: u128) -> bool {
        self.slots[self.find(key)] == key
    }

    /// The slot that holds the key, or the empty one where it would go.
    fn find(&self, key: u128) -> usize {
        // Folded multiplication: every bit of the key reaches the upper bits of the hash.
        let product =
            u128::from(key as u64 ^ 0x9e37_79b9_7f4a_7c15) * u128::from((key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03);
        let hash = (product as u64 ^ (product >> 64) as u64).wrapping_mul(0xa076_1d64_78bd_642f);
        let mut slot = (hash >> self.shift) as usize;
        while self.slots[slot] != key && self.slots[slot] != 0 {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        slot
    }
}

/// A piece of 1 to 15 bytes and its length in one number, never 0.
fn pack(bytes: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    let low = match bytes[start..].first_chunk::<16>() {
        Some(chunk) => u128::from_le_bytes(*chunk) & ((1 << (8 * length)) - 1),
        None => {
            let mut chunk = [0; 16];
            chunk[..length].copy_from_slice(&bytes[start..end]);
            u128::from_le_bytes(chunk)
        }
    };
    low | (length as u128) << 120
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tiktoken_rs::CoreBPE;

    use super::*;

    fn both() -> [(&'static Encoder, &'static CoreBPE); 2] {
        [(&O200K, tiktoken_rs::o200k_base_singleton()), (&CL100K, tiktoken_rs::cl100k_base_singleton())]
    }

    fn pieces<'a>(encoder: &Encoder, text: &'a str) -> Vec<&'a str> {
        let mut pieces = Vec::new();
        let mut start = 0;
        while start < text.len() {
            let end = encoder.piece_end(text, start);
            pieces.push(&text[start..end]);
            start = end;
        }
        pieces
    }

    fn same_as_the_originals(text: &str) {
        for (encoder, tiktoken) in both() {
            assert_eq!(pieces(encoder, text), encoder.tokenizer.split(text).collect::<Vec<_>>(), "{text:?}");
            assert_eq!(encoder.count(text), encoder.tokenizer.count(text) as u64, "{text:?}");
            assert_eq!(encoder.count(text), tiktoken.count_ordinary(text) as u64, "{text:?}");
        }
    }

    #[test]
    fn every_token_counts_one_by_table_and_by_encoder() {
        for (encoder, _) in both() {
            for token in 0..encoder.tokenizer.bpe.num_tokens() as u32 {
                let bytes = encoder.tokenizer.bpe.token_bytes(token);
                let listed = bytes.len() <= SHORT_BYTES_MAX;
                assert!(!listed || encoder.short_tokens.contains(pack(bytes, 0, bytes.len())), "{bytes:?}");
                assert_eq!(encoder.tokenizer.bpe.count(bytes), 1, "{bytes:?}");
            }
        }
    }

    #[test]
    fn every_short_string_over_the_deciding_characters_is_cut_as_the_original_cuts_it() {
        let characters =
            ["a", "B", "7", " ", "\n", "\r", "\t", "'", "s", "L", "/", "-", "\u{1f}", "é", "\u{3000}", "ſ"];
        let mut texts = vec![String::new()];
        for length in 1..=4 {
            let longer = texts.iter().filter(|text| text.chars().count() == length - 1);
            let grown: Vec<_> =
                longer.flat_map(|text| characters.iter().map(move |next| format!("{text}{next}"))).collect();
            texts.extend(grown);
        }
        for text in &texts {
            for (encoder, _) in both() {
                assert_eq!(pieces(encoder, text), encoder.tokenizer.split(text).collect::<Vec<_>>(), "{text:?}");
            }
        }
    }

    #[test]
    fn trailing_white_space_counts_as_tiktoken_counts_it() {
        let spaces = [" ", "\n", "\r", "\t"];
        for number in 0..4_usize.pow(6) {
            let tail: String = (0..6).map(|place| spaces[number >> (2 * place) & 3]).collect();
            for length in 1..=6 {
                let text = format!("a{}", &tail[..length]);
                for (encoder, tiktoken) in both() {
                    assert_eq!(encoder.count(&text), tiktoken.count_ordinary(&text) as u64, "{text:?}");
                }
            }
        }
    }

    #[test]
    fn hostile_texts_are_counted_in_linear_time() {
        let letters: String = (0..64_u32 << 10)
            .map(|index| (b'a' + (index.wrapping_mul(2_654_435_761) >> 27) as u8 % 26) as char)
            .collect();
        for text in ["a", " ", "\n", "\u{1f600}", "-", "=", " \n", "'", "\u{3000}"]
            .map(|unit| unit.repeat((64 << 10) / unit.len()))
        {
            assert!(O200K.count(&text) > 0);
            assert!(CL100K.count(&text) > 0);
        }
        assert!(O200K.count(&letters) > 10_000);
    }

    fn fragments() -> impl Strategy<Value = String> {
        let fragment = prop_oneof![
            4 => "[a-zA-Z]{1,12}",
            2 => "[ \t\r\n\u{b}\u{c}]{1,6}",
            2 => "[0-9]{1,7}",
            2 => "[!-/:-@\\[-`{-~]{1,5}",
            1 => prop::sample::select(vec!["'s", "'re", "'LL", "'ve", "'d", "don't", "<|endoftext|>", "<|im_start|>", "/\n/", "'ſ", "\u{0}", "\u{1c}", "\u{7f}"]).prop_map(str::to_owned),
            1 => "[\u{a0}\u{3000}\u{2028}éßſKǅʰ中文字かな\u{300}\u{1f600}٣Ⅷ]{1,4}",
            1 => "\\PC{1,6}",
        ];
        prop::collection::vec(fragment, 0..40).prop_map(|fragments| fragments.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn texts_of_mixed_fragments_count_as_the_originals_do(text in fragments()) {
            same_as_the_originals(&text);
        }

        #[test]
        fn texts_of_any_characters_count_as_the_originals_do(text in any::<String>()) {
            same_as_the_originals(&text);
        }
    }
}
