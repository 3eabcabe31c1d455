//! Counts tokens as they pass: of the deltas of an answer, and of the body of a request.
//!
//! A count is exact as long as [`Meter::is_estimated`] says so: the same number that OpenAI's tokenizer gives for each
//! text of the answer. What would cost too much to count where it passes is estimated, and marked so.

pub mod chunk;
mod encoder;
mod image;
pub mod prompt;
mod running;
mod shape;
mod vocabulary;

use smallvec::SmallVec;

pub use chunk::{Chunk, Reader, Usage, read};
pub use prompt::{Prompt, count_prompt, prompt_bound};
pub use running::Running;
pub use vocabulary::Vocabulary;

/// The texts of one answer that are counted apart. An answer needs a handful (`n` choices with content, reasoning and a
/// few tool calls each); the bound keeps an upstream that numbers its choices at random from filling memory.
pub const LANES_MAX: usize = 256;

/// The longest delta that is counted where it passes: 16 KiB cost about a millisecond, and up to 16 for a run of dashes.
/// A longer one holds up every other stream of the thread, so it is estimated from samples.
pub const DELTA_BYTES_MAX: usize = 16 << 10;

/// A number of tokens times a factor in millionths, rounded up: what a provider makes of them whose vocabulary is not
/// public.
pub fn calibrated(tokens: u64, calibration_micro: i64) -> u64 {
    if calibration_micro == 1_000_000 {
        return tokens;
    }
    let scaled = u128::from(tokens) * u128::from(calibration_micro.unsigned_abs());
    u64::try_from(scaled.div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// Which text of an answer a delta belongs to: counted apart, since tokens do not join across them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lane {
    pub choice: u32,
    pub kind: Kind,
}

/// The texts that a choice can have; those of a tool call carry the call's index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Content,
    Reasoning,
    Refusal,
    ToolName(u32),
    ToolArguments(u32),
    /// The name in a legacy `function_call`.
    FunctionName,
    /// The arguments in a legacy `function_call`.
    FunctionArguments,
    /// What the answer's audio says.
    Transcript,
}

/// Counts the tokens of one answer over all its texts.
///
/// Memory: at most [`LANES_MAX`] lanes of a few KiB each, one lane of under 2 KiB for the usual answer.
#[derive(Debug)]
pub struct Meter {
    vocabulary: Vocabulary,
    lanes: SmallVec<[(Lane, Running); 1]>,
    /// The lane that the last delta went to: nearly always the next one's too.
    latest: usize,
    /// Lanes had to share, so tokens may have joined across texts.
    lanes_shared: bool,
}

impl Meter {
    pub fn new(vocabulary: Vocabulary) -> Self {
        Self { vocabulary, lanes: SmallVec::new(), latest: 0, lanes_shared: false }
    }

    /// Adds a delta to its text; one above [`DELTA_BYTES_MAX`] is estimated, not counted.
    pub fn push(&mut self, lane: Lane, text: &str) {
        if text.is_empty() {
            return;
        }
        let running = self.running(lane);
        if text.len() > DELTA_BYTES_MAX { running.push_estimated(text) } else { running.push(text) }
    }

    /// The tokens so far. Costs what came since the last call, so it may be asked after every delta.
    pub fn total(&mut self) -> u64 {
        self.lanes.iter_mut().map(|(_, running)| running.total()).sum()
    }

    /// A number that [`total`](Self::total) does not exceed, for the price of a few additions: bytes that are not
    /// counted yet stand for a token each. While this is covered there is no need to count.
    pub fn at_most(&self) -> u64 {
        self.lanes.iter().map(|(_, running)| running.at_most()).sum()
    }

    /// Tool calls so far. Providers bill some tokens that frame each of them and that no text shows.
    pub fn tool_calls(&self) -> u64 {
        let is_call = |kind: Kind| matches!(kind, Kind::ToolName(_) | Kind::FunctionName);
        self.lanes.iter().filter(|(lane, _)| is_call(lane.kind)).count() as u64
    }

    /// Whether the total is not exact: a delta was too long to count, one piece of text had no end, or there were more
    /// than [`LANES_MAX`] texts.
    pub fn is_estimated(&self) -> bool {
        self.lanes_shared || self.lanes.iter().any(|(_, running)| running.is_estimated())
    }

    fn running(&mut self, lane: Lane) -> &mut Running {
        if self.lanes.get(self.latest).is_none_or(|(latest, _)| *latest != lane) {
            self.latest = self.index(lane);
        }
        &mut self.lanes[self.latest].1
    }

    fn index(&mut self, lane: Lane) -> usize {
        if let Some(index) = self.lanes.iter().position(|(known, _)| *known == lane) {
            return index;
        }
        if self.lanes.len() == LANES_MAX {
            self.lanes_shared = true;
            return LANES_MAX - 1;
        }
        self.lanes.push((lane, Running::after(self.vocabulary, self.lanes.len())));
        self.lanes.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(choice: u32, kind: Kind) -> Lane {
        Lane { choice, kind }
    }

    #[test]
    fn interleaved_choices_and_tool_calls_are_counted_apart() {
        let mut meter = Meter::new(Vocabulary::O200k);
        let lanes = [lane(0, Kind::Content), lane(1, Kind::Content), lane(0, Kind::ToolArguments(0))];
        let deltas = ["inter", "national", "ization", " of", " text"];
        for delta in deltas {
            for lane in lanes {
                meter.push(lane, delta);
            }
        }
        assert_eq!(meter.total(), 3 * Vocabulary::O200k.count(&deltas.concat()));
        assert!(!meter.is_estimated());
    }

    #[test]
    fn a_delta_that_is_too_long_is_estimated_near_its_count() {
        let vocabulary = Vocabulary::O200k;
        let text = "The quick brown fox jumps over the lazy dog, 42 times. ".repeat(1000);
        let mut meter = Meter::new(vocabulary);
        meter.push(lane(0, Kind::Content), "before");
        meter.push(lane(0, Kind::Content), &text);
        meter.push(lane(0, Kind::Content), "after");
        let exact = vocabulary.count(&text) as f64;
        assert!(meter.is_estimated());
        assert!((meter.total() as f64 / exact - 1.0).abs() < 0.02, "{} for {exact}", meter.total());
    }

    #[test]
    fn lanes_without_end_share_one_and_the_count_says_so() {
        let mut meter = Meter::new(Vocabulary::O200k);
        for choice in 0..2 * LANES_MAX as u32 {
            meter.push(lane(choice, Kind::Content), "word ");
        }
        assert_eq!(meter.lanes.len(), LANES_MAX);
        assert!(meter.is_estimated());
        assert!(meter.total() >= LANES_MAX as u64);
    }

    #[test]
    fn the_cheap_bound_is_never_below_the_total() {
        let mut meter = Meter::new(Vocabulary::Cl100k);
        for delta in ["", "a", "\u{1f600}", " \n\n ", "word ".repeat(300).as_str(), "日本語"] {
            meter.push(lane(0, Kind::Content), delta);
            let bound = meter.at_most();
            assert!(bound >= meter.total());
        }
    }
}
