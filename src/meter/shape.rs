//! Chunks that are like one before: those of a stream differ in a few strings alone.
//!
//! Of a chunk that was parsed its shape is kept: the bytes around those strings, and what they say. A chunk with the same
//! bytes around strings that need no unescaping says the same, whatever the strings are, and is not parsed again.

use std::ops::Range;

use smallvec::SmallVec;

use super::Lane;
use super::chunk::Chunk;

/// Shapes that a worker keeps: an upstream has two or three of its own (content, reasoning, what comes first).
const SHAPES_MAX: usize = 8;
/// A chunk beyond this is no delta of a few tokens.
const SAMPLE_BYTES_MAX: usize = 1024;
/// A longer chunk may have such a shape, and is read in the usual way: its text alone costs more than its parse.
const FOUND_BYTES_MAX: usize = 4 * SAMPLE_BYTES_MAX;
/// Strings of one chunk that may differ.
const GAPS_MAX: usize = 8;
/// Digits of a number that may differ: those of an integer that nobody rounds.
const DIGITS_MAX: usize = 15;

/// What may stand between the bytes that are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The text that is counted; not empty, since an empty one is no content.
    Text,
    /// The top-level `model`.
    Model,
    /// A top-level string that nobody reads.
    Unread,
    /// A top-level integer that nobody reads.
    Number,
}

/// A string's bytes without its quotes, or a number's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub kind: Kind,
    pub span: Range<usize>,
}

/// Where a chunk may differ from the next; filled while it is read.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    gaps: SmallVec<[Gap; GAPS_MAX]>,
    lane: Option<Lane>,
    /// What it says depends on more than the bytes around its gaps.
    fixed: bool,
}

/// A chunk that needs no parse.
pub(super) struct Found<'a> {
    pub chunk: Chunk,
    pub lane: Lane,
    pub text: &'a str,
}

/// The shapes of late.
#[derive(Default)]
pub(super) struct Shapes {
    shapes: Vec<Shape>,
    /// The one that was found last: nearly always the next one, too.
    latest: usize,
    clock: u64,
}

struct Shape {
    sample: Vec<u8>,
    gaps: Gaps,
    chunk: Chunk,
    lane: Lane,
    used: u64,
}

impl Gaps {
    /// None yet; a chunk that is too long to be kept has none ever.
    pub fn of(data: &[u8]) -> Gaps {
        Gaps { fixed: data.len() > SAMPLE_BYTES_MAX, ..Gaps::default() }
    }

    /// Whether there is any use in noting more.
    pub fn are_open(&self) -> bool {
        !self.fixed
    }

    /// Notes a gap; what has none to note (a string that is not where it should be) has no shape.
    pub fn note(&mut self, kind: Kind, span: Option<Range<usize>>) {
        match span {
            Some(span) if self.gaps.len() < GAPS_MAX => self.gaps.push(Gap { kind, span }),
            _ => self.fixed = true,
        }
    }

    /// A text is counted here: a chunk with more than one of them has no shape.
    pub fn counted(&mut self, lane: Lane) {
        self.fixed |= self.lane.replace(lane).is_some();
    }

    /// A text is read in the light of another one: the chunk has no shape.
    pub fn fix(&mut self) {
        self.fixed = true;
    }
}

impl Shapes {
    /// What a chunk says whose shape is known.
    pub fn find<'a>(&mut self, data: &'a [u8]) -> Option<Found<'a>> {
        if data.len() > FOUND_BYTES_MAX {
            return None;
        }
        let others = (0..self.shapes.len()).filter(|index| *index != self.latest);
        let mut tried = (self.latest < self.shapes.len()).then_some(self.latest).into_iter().chain(others);
        let (index, model, text) = tried.find_map(|index| {
            let (model, text) = self.shapes[index].fit(data)?;
            Some((index, model, text))
        })?;
        self.clock += 1;
        self.latest = index;
        let shape = &mut self.shapes[index];
        shape.used = self.clock;
        let chunk = Chunk { model, ..shape.chunk.clone() };
        Some(Found { chunk, lane: shape.lane, text })
    }

    /// Keeps the shape of a chunk that was parsed, in the place of the one that was not used for the longest.
    pub fn learn(&mut self, data: &[u8], mut gaps: Gaps, chunk: &Chunk) {
        let Some(lane) = gaps.lane.filter(|_| gaps.are_open()) else { return };
        gaps.gaps.sort_unstable_by_key(|gap| gap.span.start);
        self.clock += 1;
        // One with an escape in its text has a known shape, and is parsed nevertheless.
        if let Some(known) = self.shapes.iter_mut().find(|shape| shape.is_of(data, &gaps)) {
            known.used = self.clock;
            return;
        }
        if self.shapes.len() < SHAPES_MAX {
            self.shapes.push(Shape { sample: data.to_vec(), gaps, chunk: chunk.clone(), lane, used: self.clock });
            return;
        }
        let Some(oldest) = self.shapes.iter_mut().min_by_key(|shape| shape.used) else { return };
        oldest.sample.clear();
        oldest.sample.extend_from_slice(data);
        (oldest.gaps, oldest.chunk, oldest.lane, oldest.used) = (gaps, chunk.clone(), lane, self.clock);
    }
}

impl Shape {
    /// The span of the model with its quotes, and the text, of a chunk of this shape.
    fn fit<'a>(&self, data: &'a [u8]) -> Option<(Option<Range<usize>>, &'a str)> {
        let (mut model, mut text) = (None, None);
        let (mut rest, mut from) = (data, 0);
        for Gap { kind, span } in &self.gaps.gaps {
            rest = rest.strip_prefix(&self.sample[from..span.start])?;
            let start = data.len() - rest.len();
            let length = match kind {
                Kind::Number => digits(rest)?,
                Kind::Text => until_quote(rest, false)?,
                Kind::Model | Kind::Unread => until_quote(rest, true)?,
            };
            match kind {
                Kind::Text if length == 0 => return None,
                Kind::Text => text = Some(std::str::from_utf8(&rest[..length]).ok()?),
                Kind::Model => model = Some(start - 1..start + length + 1),
                Kind::Unread | Kind::Number => {}
            }
            rest = &rest[length..];
            from = span.end;
        }
        (rest == &self.sample[from..]).then_some((model, text?))
    }

    /// Whether a chunk with these gaps has this shape.
    fn is_of(&self, data: &[u8], gaps: &Gaps) -> bool {
        let between = |data: &[u8], gaps: &Gaps, index: usize| {
            let from = index.checked_sub(1).map_or(0, |before| gaps.gaps[before].span.end);
            let to = gaps.gaps.get(index).map_or(data.len(), |gap| gap.span.start);
            from..to
        };
        let same = |index| data[between(data, gaps, index)] == self.sample[between(&self.sample, &self.gaps, index)];
        let kinds = |gaps: &Gaps| gaps.gaps.iter().map(|gap| gap.kind).collect::<SmallVec<[Kind; GAPS_MAX]>>();
        kinds(gaps) == kinds(&self.gaps) && (0..=gaps.gaps.len()).all(same)
    }
}

/// The length of a string up to its quote; `None` where it has none or would have to be unescaped, mended or, outside of
/// ASCII, validated.
fn until_quote(rest: &[u8], ascii: bool) -> Option<usize> {
    let length = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20) || (ascii && *byte >= 0x80))?;
    (rest[length] == b'"').then_some(length)
}

/// The length of an integer as JSON has it.
fn digits(rest: &[u8]) -> Option<usize> {
    let length = rest.iter().take(DIGITS_MAX + 1).take_while(|byte| byte.is_ascii_digit()).count();
    ((1..=DIGITS_MAX).contains(&length) && (rest[0] != b'0' || length == 1)).then_some(length)
}
