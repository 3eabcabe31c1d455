//! Counts the tokens of one text that comes in deltas, exactly.
//!
//! Tokens join across deltas, so the counts of the deltas do not add up to the count of the text. What can be counted
//! for good is every piece but the last two. Two, because text that is appended changes a piece only if the expression
//! looked at the end of the text when it cut it: a run of white space at the end makes at most two pieces, o200k joins a
//! contraction to the word before it ("don" + "'re"), and its upper-case and lower-case letters give back across two.

use super::encoder::Encoder;
use super::vocabulary::{OLD_TEXT_BYTES_MAX, Vocabulary};

/// The new bytes after which the text is scanned. Each scan looks at the last two pieces again, a dozen bytes.
const SCAN_BYTES: usize = 512;

/// The longest that the last two pieces may get before the text is cut within them, and the count is an estimate (one
/// token may be cut in two). Bounds memory, and what [`Running::total`] costs while a piece has no end: 0.2 ms for
/// letters, 1.3 ms for dashes. A power of two, so that the tokens of a run of one character end where it is cut.
const KEPT_BYTES_MAX: usize = 2 << 10;

/// A piece longer than this is no word: what it costs to count a byte of it depends on the text, up to 1.3 µs for dashes,
/// three hundred times a byte of prose.
const LONG_PIECE_BYTES: usize = 128;

/// Bytes of long pieces that are counted, each time that they are looked at: 20 ms of dashes, and of letters, which cost a
/// ninth at the most, so many times as many. What follows is taken to have as many tokens a byte.
const LONG_BYTES_MAX: usize = 16 << 10;
const LETTERS_CHEAPER: usize = 8;
const TELLING_BYTES: u64 = 1 << 10;

/// The buffer is given back to the allocator when it has grown beyond this.
const BUFFER_BYTES_MAX: usize = 4 << 10;

/// The samples from which a text is estimated that is too long to count: `SAMPLES` spread evenly, of `SAMPLE_BYTES`.
const SAMPLES: usize = 4;
const SAMPLE_BYTES: usize = 1 << 10;

/// The exact count of one text over its deltas.
#[derive(Debug)]
pub struct Running {
    vocabulary: Vocabulary,
    committed: u64,
    /// The text behind what is committed.
    tail: String,
    /// The tokens of the first `tail_counted` bytes of the tail.
    tail_tokens: u64,
    tail_counted: usize,
    estimated: bool,
    long: Long,
}

/// Pieces that are longer than words.
#[derive(Debug)]
struct Long {
    /// Bytes of them that may still be counted; letters are taken to be fewer.
    left: usize,
    /// The last one that was counted and is long enough to tell of others.
    bytes: u64,
    tokens: u64,
}

impl Long {
    /// The tokens of a piece that need not be counted: taken from those that were, once the budget is spent.
    fn known(&mut self, piece: &str) -> Option<u64> {
        let letters = piece.as_bytes().last().is_some_and(|last| last.is_ascii_alphanumeric() || !last.is_ascii());
        let cost = if letters { piece.len() / LETTERS_CHEAPER } else { piece.len() };
        if cost <= self.left {
            self.left -= cost;
            return None;
        }
        // Nothing counted: a token has at least one byte.
        let (bytes, tokens) = if self.bytes == 0 { (1, 1) } else { (self.bytes, self.tokens) };
        Some((piece.len() as u64 * tokens).div_ceil(bytes))
    }

    /// Learns from a piece that was counted.
    fn note(&mut self, bytes: u64, tokens: u64) {
        // One that was cut tells most: its tokens end where it does.
        let is_cut = |bytes: u64| bytes.is_multiple_of(KEPT_BYTES_MAX as u64) && bytes > 0;
        if is_cut(bytes) || (!is_cut(self.bytes) && bytes >= self.bytes.min(TELLING_BYTES)) {
            (self.bytes, self.tokens) = (bytes, tokens);
        }
    }

    /// The tokens of a piece, counted where the budget allows it.
    fn count(&mut self, vocabulary: Vocabulary, piece: &str) -> u64 {
        self.known(piece).unwrap_or_else(|| {
            let tokens = vocabulary.count(piece);
            self.note(piece.len() as u64, tokens);
            tokens
        })
    }
}

impl Running {
    pub fn new(vocabulary: Vocabulary) -> Self {
        Self::after(vocabulary, 0)
    }

    /// One of several texts of an answer, behind so many others: of long pieces it may count half as much as the one before.
    pub(super) fn after(vocabulary: Vocabulary, others: usize) -> Self {
        let long = Long { left: LONG_BYTES_MAX >> others.min(63), bytes: 0, tokens: 0 };
        Self { vocabulary, committed: 0, tail: String::new(), tail_tokens: 0, tail_counted: 0, estimated: false, long }
    }

    /// Adds a delta.
    pub fn push(&mut self, text: &str) {
        self.tail.push_str(text);
        // No sooner than the kept bytes have doubled: the scans of a piece without end stay linear in its length.
        if self.tail.len() - self.tail_counted >= self.tail_counted.max(SCAN_BYTES) {
            self.scan();
        }
    }

    /// Adds a delta that is too long to count.
    pub(super) fn push_estimated(&mut self, text: &str) {
        self.scan();
        self.commit_tail();
        self.committed += estimate(self.vocabulary, text);
        self.estimated = true;
    }

    /// The tokens of the text so far. Costs a scan of what came since the last one, and of the two pieces kept.
    pub fn total(&mut self) -> u64 {
        if self.tail_counted < self.tail.len() {
            self.scan();
        }
        self.committed + self.tail_tokens
    }

    /// A number that [`total`](Self::total) does not exceed: a token has at least one byte.
    pub(super) fn at_most(&self) -> u64 {
        self.committed + self.tail.len() as u64
    }

    /// Whether the last [`total`](Self::total) was not exact: a piece was too long to keep, or a delta too long to count.
    pub fn is_estimated(&self) -> bool {
        self.estimated
    }

    fn scan(&mut self) {
        let settled = match self.vocabulary.encoder() {
            // What is no longer than a word has no long piece.
            Some(encoder) if self.tail.len() <= LONG_PIECE_BYTES => {
                settle::<false>(encoder, &self.tail, &mut self.long)
            }
            Some(encoder) => settle::<true>(encoder, &self.tail, &mut self.long),
            None => settle_old(self.vocabulary, &self.tail),
        };
        self.estimated |= settled.estimated;
        self.estimated |= self.vocabulary.encoder().is_none() && self.tail.len() > OLD_TEXT_BYTES_MAX;
        self.committed += settled.tokens;
        self.tail.drain(..settled.bytes);
        self.tail_tokens = settled.rest_tokens;
        self.tail_counted = self.tail.len();
        if self.tail.len() > KEPT_BYTES_MAX {
            self.cut_tail();
        }
        if self.tail.capacity() > BUFFER_BYTES_MAX {
            self.tail.shrink_to(BUFFER_BYTES_MAX);
        }
    }

    fn cut_tail(&mut self) {
        let cut = self.tail.floor_char_boundary(self.tail.len() / KEPT_BYTES_MAX * KEPT_BYTES_MAX);
        self.committed += self.long.count(self.vocabulary, &self.tail[..cut]);
        self.tail.drain(..cut);
        self.tail_tokens = self.long.count(self.vocabulary, &self.tail);
        self.tail_counted = self.tail.len();
        self.estimated = true;
    }

    fn commit_tail(&mut self) {
        self.committed += self.tail_tokens;
        self.tail.clear();
        self.tail_tokens = 0;
        self.tail_counted = 0;
    }
}

/// What of a text can be counted for good.
struct Settled {
    bytes: usize,
    tokens: u64,
    /// The tokens of the rest as it stands.
    rest_tokens: u64,
    estimated: bool,
}

/// `MAY_BE_LONG`: whether a piece may be long; deltas cost less without a look at each.
fn settle<const MAY_BE_LONG: bool>(encoder: &Encoder, text: &str, long: &mut Long) -> Settled {
    let mut settled = Settled { bytes: 0, tokens: 0, rest_tokens: 0, estimated: false };
    let (mut before_last, mut last) = (0, 0);
    let mut kept = [0, 0];
    while last < text.len() {
        let end = encoder.piece_end(text, last);
        settled.bytes = before_last;
        settled.tokens += kept[0];
        let is_long = MAY_BE_LONG && end - last > LONG_PIECE_BYTES;
        let known = if is_long { long.known(&text[last..end]) } else { None };
        settled.estimated |= known.is_some();
        let tokens = known.unwrap_or_else(|| encoder.piece_tokens(text, last, end));
        if is_long && known.is_none() {
            long.note((end - last) as u64, tokens);
        }
        kept = [kept[1], tokens];
        (before_last, last) = (last, end);
    }
    settled.rest_tokens = kept[0] + kept[1];
    settled
}

/// The older expressions end a piece at the space between two words whatever follows, and begin one there.
fn settle_old(vocabulary: Vocabulary, text: &str) -> Settled {
    let between_words =
        |bytes: &[u8]| bytes[0].is_ascii_alphabetic() && bytes[1] == b' ' && bytes[2].is_ascii_alphabetic();
    let bytes = text.as_bytes().windows(3).rposition(between_words).map_or(0, |word_end| word_end + 1);
    let (before, rest) = text.split_at(bytes);
    Settled { bytes, tokens: vocabulary.count(before), rest_tokens: vocabulary.count(rest), estimated: false }
}

/// The tokens of a long text by the tokens a byte of a few samples: within some percent for a text of one kind.
fn estimate(vocabulary: Vocabulary, text: &str) -> u64 {
    let (mut bytes, mut tokens) = (0, 0);
    for sample in 0..SAMPLES {
        let start = text.floor_char_boundary(text.len() / SAMPLES * sample);
        let end = text.floor_char_boundary(start + SAMPLE_BYTES);
        bytes += (end - start) as u64;
        tokens += vocabulary.count(&text[start..end]);
    }
    (text.len() as u64 * tokens).div_ceil(bytes.max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Vocabulary; 4] = [Vocabulary::O200k, Vocabulary::Cl100k, Vocabulary::P50k, Vocabulary::R50k];

    /// Feeds the text cut at every multiple of `step` characters and asks for the total after every `ask`th delta.
    fn same_as_whole(vocabulary: Vocabulary, text: &str, step: usize, ask: usize) {
        let mut running = Running::new(vocabulary);
        let characters: Vec<char> = text.chars().collect();
        let mut passed = String::new();
        for (index, delta) in characters.chunks(step).enumerate() {
            let delta: String = delta.iter().collect();
            running.push(&delta);
            passed.push_str(&delta);
            if index % ask == 0 {
                assert_eq!(running.total(), vocabulary.count(&passed), "{passed:?} in steps of {step}");
            }
        }
        assert_eq!(running.total(), vocabulary.count(text), "{text:?} in steps of {step}");
        assert!(!running.is_estimated());
    }

    #[test]
    fn a_contraction_that_comes_late_joins_its_word() {
        for vocabulary in ALL {
            for text in [
                "don't don'T we're WE'RE they'll",
                "HELLOworld HelloWorld's iPhone'd",
                "a\n\n \n  b   \r\n c",
                "'''s 's'",
            ] {
                for step in 1..6 {
                    same_as_whole(vocabulary, &text.repeat(60), step, 1);
                }
            }
        }
    }

    #[test]
    fn a_piece_without_end_is_counted_in_bounded_memory_and_marked() {
        for unit in ["a", " ", "\n", "-", "中", "\u{1f600}"] {
            let mut running = Running::new(Vocabulary::O200k);
            let delta = unit.repeat(7);
            let mut passed = String::new();
            while passed.len() < 16 * KEPT_BYTES_MAX {
                running.push(&delta);
                passed.push_str(&delta);
                assert!(running.tail.capacity() <= 4 * KEPT_BYTES_MAX);
            }
            let exact = Vocabulary::O200k.count(&passed);
            assert!(running.is_estimated());
            assert!(running.total().abs_diff(exact) <= 2 + exact / 100, "{unit:?}: {} for {exact}", running.total());
        }
    }

    // A megabyte of dashes took 1.3 s of the worker that streamed it.
    #[test]
    fn a_long_run_costs_no_more_than_its_beginning_and_comes_near() {
        for unit in ["-", "=", "\t", "ab", "\u{1f600}"] {
            let delta = unit.repeat(4096 / unit.len());
            let mut running = Running::new(Vocabulary::O200k);
            let mut passed = String::new();
            for _ in 0..64 {
                running.push(&delta);
                passed.push_str(&delta);
            }
            assert_eq!(running.total(), running.total());
            assert!(running.is_estimated());
            // Each scan looks at 4 KiB at the most.
            assert!(running.long.left < 4096, "{unit:?} is not counted any more: {}", running.long.left);
            let exact = Vocabulary::O200k.count(&passed[..passed.len() / 64 * 64]);
            assert!(running.total().abs_diff(exact) <= exact / 10 + 2, "{unit:?}: {} for {exact}", running.total());
        }
        let mut fourth = Running::after(Vocabulary::O200k, 3);
        fourth.push(&"-".repeat(1 << 16));
        fourth.total();
        assert!(fourth.long.left <= LONG_BYTES_MAX / 8);
    }

    #[test]
    fn a_long_delta_leaves_no_long_buffer() {
        let mut running = Running::new(Vocabulary::O200k);
        running.push(&"some words ".repeat(1400));
        assert!(running.tail.capacity() <= BUFFER_BYTES_MAX);
    }

    #[test]
    fn a_total_asked_for_at_each_character_of_a_long_piece_says_when_it_is_exact_no_more() {
        let (mut running, mut text) = (Running::new(Vocabulary::O200k), String::new());
        let mut exact = 0;
        for character in "<\0>\u{fffd}".repeat(250).chars() {
            text.push(character);
            running.push(character.encode_utf8(&mut [0; 4]));
            let total = running.total();
            if !running.is_estimated() {
                assert_eq!(total, Vocabulary::O200k.count(&text));
                exact += 1;
            }
        }
        assert!(exact > 100 && running.is_estimated(), "its budget was spent after {exact}");
    }

    #[test]
    fn a_sampled_estimate_survives_wide_characters_and_short_texts() {
        for text in ["", "a", "\u{1f600}", &"\u{1f600}é".repeat(5000)] {
            let exact = Vocabulary::O200k.count(text);
            assert!(estimate(Vocabulary::O200k, text).abs_diff(exact) <= exact / 10 + 2);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(800))]

        #[test]
        fn the_total_is_that_of_the_whole_text_at_every_cut(
            fragments in prop::collection::vec(prop_oneof![
                4 => "[a-zA-Z]{1,9}",
                3 => "[ \t\r\n]{1,5}",
                1 => "[0-9]{1,5}",
                1 => "[!-/:-@]{1,4}",
                1 => prop::sample::select(vec!["'s", "'re", "'LL", "don't", "<|endoftext|>", "'ſ"]).prop_map(str::to_owned),
                1 => "[\u{a0}\u{3000}éßſǅʰ中文\u{300}\u{1f600}٣]{1,3}",
            ], 0..200),
            vocabulary in prop::sample::select(ALL.to_vec()),
            step in 1..40_usize,
            ask in 1..30_usize,
        ) {
            same_as_whole(vocabulary, &fragments.concat(), step, ask);
        }
    }
}
