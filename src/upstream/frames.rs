//! A streamed answer as frames: the bytes as they came, and what they mean.
//!
//! Nothing is copied here (`client` moves short chunks out of hyper's buffer): a frame is a span of the chunk that it
//! arrived in, or the slices of several chunks. It is edited only where it must be: a mapped model's name back, and a usage
//! chunk that the client did not ask for.

use std::collections::VecDeque;
use std::ops::Range;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;

use super::client::{Broken, Source};
use super::error_in_stream;
use super::openai::DONE;
use crate::config::OnDisconnect;
use crate::error::Error;
use crate::meter::{self, Chunk, Meter, Usage, Vocabulary, calibrated};
use crate::pool::Permit;
use crate::request::ANSWERS_MAX;
use crate::sse::Parser;

/// An incomplete frame waits for its end up to this size, then passes on as it comes.
const FRAME_HELD_BYTES_MAX: usize = 64 << 10;
/// How long the end of a body may come behind its terminator.
const END_MAX: Duration = Duration::from_secs(1);
/// How long an answer is read on for nobody, and how far.
const DRAIN_MAX: Duration = Duration::from_secs(120);
const DRAIN_BYTES_MAX: usize = 16 << 20;
/// Bytes of a stream a token stands for, where it cannot be counted: JSON around it included, so rather too many tokens.
const BYTES_PER_TOKEN: u64 = 4;
/// Choices of one answer whose ends are kept apart: what may be asked for is bounded by the same number.
const CHOICES_MAX: usize = ANSWERS_MAX as usize;

/// Where a frame's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the chunk at hand; spans that follow each other may be joined.
    Span(Range<usize>),
    /// In slices of several chunks, or around an edit.
    Pieces(SmallVec<[Bytes; 4]>),
    /// Nowhere: it is not for the client.
    Removed,
}

/// One complete event of the stream, or a part of one that was too long to wait for.
#[derive(Clone, Debug)]
pub struct Frame {
    pub place: Place,
    /// It carries something of the answer.
    pub content: bool,
    /// A choice ends here.
    pub finish: bool,
    /// The stream ends here.
    pub done: bool,
    /// The upstream failed within its stream.
    pub failed: bool,
}

/// How a streamed answer is to be edited.
#[derive(Clone, Debug)]
pub struct Editing {
    /// The name that the client knows the model by.
    pub model: String,
    /// The upstream knows it by another, which is put back.
    pub mapped: bool,
    /// The client asked for the usage chunk.
    pub keep_usage: bool,
}

/// Reads a source, frame by frame.
#[derive(Debug)]
pub struct Frames {
    /// `None` once nothing more is to be read from it.
    source: Option<Source>,
    parser: Parser,
    meter: Meter,
    /// The model's name as a JSON string, where it has to be put back.
    model: Option<Bytes>,
    /// The same as the client knows it.
    name: String,
    /// What the upstream said when it failed within its stream.
    failure: Option<Error>,
    keep_usage: bool,
    /// The provider's tokens for one counted here, in millionths.
    calibration_micro: i64,
    chunk: Bytes,
    /// How far the chunk has been read, and how far its bytes have been given out.
    read: usize,
    given: usize,
    /// The beginning of a frame that did not end in the chunk before.
    held: SmallVec<[Bytes; 2]>,
    held_bytes: usize,
    /// The beginning of the present frame has been passed on already.
    passing: bool,
    /// The chunk at hand is the end of the last event and came from here.
    tail: bool,
    /// Bytes that were passed on and not counted: of the present frame, or since the parser gave up.
    uncounted_bytes: u64,
    /// Frames that were read before the client's head went out.
    preamble: VecDeque<Frame>,
    usage: Option<Usage>,
    usage_invalid: bool,
    finished: SmallVec<[u32; 1]>,
    choices: usize,
    done: bool,
    lost: bool,
    /// Output tokens up to which no count is needed, and the count before the last frame where it may have gone beyond.
    watch: u64,
    before: u64,
    /// Released when the connection is idle again, or closed.
    permit: Option<Permit>,
}

impl Frames {
    pub(super) fn new(
        source: Source,
        permit: Permit,
        vocabulary: Vocabulary,
        choices: u32,
        editing: Editing,
    ) -> Frames {
        let name = serde_json::Value::from(editing.model.as_str()).to_string();
        Frames {
            source: Some(source),
            parser: Parser::new(),
            meter: Meter::new(vocabulary),
            model: editing.mapped.then(|| name.into()),
            name: editing.model,
            failure: None,
            keep_usage: editing.keep_usage,
            calibration_micro: permit.offer.endpoint.calibration_micro,
            chunk: Bytes::new(),
            read: 0,
            given: 0,
            held: SmallVec::new(),
            held_bytes: 0,
            passing: false,
            tail: false,
            uncounted_bytes: 0,
            preamble: VecDeque::new(),
            usage: None,
            usage_invalid: false,
            finished: SmallVec::new(),
            choices: choices as usize,
            done: false,
            lost: false,
            watch: u64::MAX,
            before: 0,
            permit: Some(permit),
        }
    }

    /// The next frame of what has arrived; `None`: a further chunk is needed.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if let Some(frame) = self.preamble.pop_front() {
            return Some(frame);
        }
        self.next_read()
    }

    /// Lets go of a chunk that has been given out whole: it is a part of the connection's read buffer, which a stream that
    /// waits must not keep.
    pub fn let_go(&mut self) {
        if self.given == self.chunk.len() {
            self.chunk = Bytes::new();
            (self.read, self.given) = (0, 0);
        }
    }

    /// The bytes of a span of the chunk at hand.
    pub fn slice(&self, span: Range<usize>) -> Bytes {
        self.chunk.slice(span)
    }

    /// Reads the next chunk, once [`Frames::next_frame`] has given all of the last one; `None` at the clean end.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<(), Broken>>> {
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        match source.poll_chunk(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(chunk))) => {
                self.chunk = chunk;
                (self.read, self.given) = (0, 0);
                Poll::Ready(Some(Ok(())))
            }
            Poll::Ready(Some(Err(broken))) => {
                self.end();
                Poll::Ready(Some(Err(broken)))
            }
            Poll::Ready(None) => {
                self.end();
                Poll::Ready(None)
            }
        }
    }

    /// Reads until something of the answer has come, keeping all that comes before it; `Err` is a reason to try elsewhere.
    pub(super) async fn until_content(&mut self) -> Result<(), Refusal> {
        let mut kept_bytes = 0;
        loop {
            while let Some(mut frame) = self.next_read() {
                if frame.failed {
                    return Err(self.failure.take().map_or(Refusal::Broken, Refusal::Error));
                }
                let (content, done) = (frame.content, frame.done);
                frame.place = match frame.place {
                    Place::Span(span) => Place::Pieces(SmallVec::from_iter([self.slice(span)])),
                    place => place,
                };
                if let Place::Pieces(pieces) = &frame.place {
                    kept_bytes += pieces.iter().map(Bytes::len).sum::<usize>();
                }
                self.preamble.push_back(frame);
                if content || kept_bytes > FRAME_HELD_BYTES_MAX {
                    return Ok(());
                }
                if done {
                    return Err(Refusal::Empty);
                }
            }
            match std::future::poll_fn(|cx| self.poll_chunk(cx)).await {
                Some(Ok(())) => {}
                Some(Err(_)) => return Err(Refusal::Broken),
                None if self.take_tail() => {}
                None => return Err(Refusal::Empty),
            }
        }
    }

    /// Reads what an unterminated last event left, once [`Frames::poll_chunk`] has given the end: true if there is such a
    /// one, which [`Frames::next_frame`] gives then. It is given only if the answer is whole with it.
    pub fn take_tail(&mut self) -> bool {
        if self.tail || self.done || self.parser.at_boundary() || self.parser.overflowed() {
            return false;
        }
        self.tail = true;
        self.chunk = Bytes::from_static(b"\n\n"); // the blank line that it lacks
        (self.read, self.given) = (0, 0);
        true
    }

    /// Whether the answer is whole: the dialect's terminator, or an end for every choice.
    pub fn is_complete(&self) -> bool {
        // Past a bound of the parser nobody here can tell; the body's own end has to do.
        self.done || self.finished.len() >= self.choices || self.parser.overflowed()
    }

    /// Whether a comment may be put before what comes next.
    pub fn at_boundary(&self) -> bool {
        self.held_bytes == 0 && !self.passing && self.given == self.chunk.len() && self.parser.at_boundary()
    }

    /// The upstream's own usage: the last one that it sent.
    pub fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// Whether the upstream sent a usage that cannot be believed.
    pub fn usage_invalid(&self) -> bool {
        self.usage_invalid
    }

    /// Output tokens of all frames that were given out.
    pub fn output(&mut self) -> u64 {
        calibrated(self.meter.total() + self.uncounted(), self.calibration_micro)
    }

    /// Says how many output tokens are paid for: from there on each frame is counted before it is read.
    pub fn watch(&mut self, covered: u64) {
        self.watch = covered;
    }

    /// Output tokens before the last frame, if that frame went beyond what is watched: what a cut there has handed over.
    pub fn output_before(&self) -> u64 {
        self.before
    }

    /// Whether a frame has been handed out in part: nothing may be put behind it without ending it first.
    pub fn is_passing(&self) -> bool {
        self.passing
    }

    /// Tokens that uncounted bytes stand for, as an estimate.
    fn uncounted(&self) -> u64 {
        self.uncounted_bytes / BYTES_PER_TOKEN
    }

    /// Tool calls so far.
    pub fn tool_calls(&self) -> u64 {
        self.meter.tool_calls()
    }

    /// A number that [`Frames::output`] does not exceed, for next to nothing.
    pub fn output_at_most(&self) -> u64 {
        calibrated(self.meter.at_most() + self.uncounted(), self.calibration_micro)
    }

    /// Whether the count is not exact.
    pub fn is_estimated(&self) -> bool {
        self.lost || self.meter.is_estimated() || self.parser.overflowed()
    }

    /// What the client is told of a failure within the stream.
    pub fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    /// Whether the endpoint wants its answers read to the end when the client has left.
    pub fn is_drained(&self) -> bool {
        self.permit.as_ref().is_some_and(|permit| permit.offer.endpoint.on_disconnect == OnDisconnect::Drain)
    }

    /// Reads on without handing anything over, to learn what the upstream bills: at most [`DRAIN_MAX`] long and
    /// [`DRAIN_BYTES_MAX`] far.
    pub async fn drain(&mut self) {
        let reading = async {
            let mut bytes = 0;
            while !self.done && bytes < DRAIN_BYTES_MAX {
                while self.next_frame().is_some() {}
                match std::future::poll_fn(|cx| self.poll_chunk(cx)).await {
                    Some(Ok(())) => bytes += self.chunk.len(),
                    Some(Err(_)) | None => break,
                }
            }
        };
        // Past the time the connection is closed: what is not known by then stays unknown.
        let _ = tokio::time::timeout(DRAIN_MAX, reading).await;
    }

    /// Choices that have not ended.
    pub fn unfinished(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.choices as u32).filter(|choice| !self.finished.contains(choice))
    }

    /// Ends a stream whose terminator has been read. The end of the body usually came together with it; where it did
    /// not, it is waited for apart, so that the connection can be used again.
    pub fn finish(&mut self, cx: &mut Context<'_>) {
        if !matches!(self.poll_chunk(cx), Poll::Pending) {
            return self.end(); // anything that comes behind the terminator is not for the client
        }
        let (source, permit) = (self.source.take(), self.permit.take());
        if let Some(mut source) = source {
            tokio::spawn(async move {
                let _ = tokio::time::timeout(END_MAX, source.chunk()).await;
                drop(source); // closed, or given back already
                drop(permit);
            });
        }
    }

    /// The connection was given back at the end of its body, or is closed here; then the permit goes.
    fn end(&mut self) {
        self.source = None;
        self.permit = None;
    }

    fn next_read(&mut self) -> Option<Frame> {
        if self.given == self.chunk.len() {
            return None;
        }
        let mut frame = Frame { place: Place::Removed, content: false, finish: false, done: false, failed: false };
        let mut at = self.read;
        // Field by field: the event borrows the parser and the chunk while the meter counts it.
        let Some(event) = self.parser.next(&self.chunk, &mut at) else {
            self.read = at;
            return self.hold_rest();
        };
        let (data_at, named_error) = (event.data_at, event.name == b"error");
        let mut read = None;
        if event.data == DONE {
            frame.done = true;
            self.done = true;
        } else if event.dispatched {
            // A token has at least one byte of the data; only a frame that may go beyond is worth a count before it.
            let uncounted = self.uncounted_bytes / BYTES_PER_TOKEN;
            let at_most = self.meter.at_most() + uncounted + event.data.len() as u64;
            if calibrated(at_most, self.calibration_micro) > self.watch {
                self.before = calibrated(self.meter.total() + uncounted, self.calibration_micro);
            }
            read = meter::read(event.data, &mut self.meter);
            frame.failed = named_error;
        }
        let failed = frame.failed || read.as_ref().is_some_and(|chunk| chunk.error);
        if failed && let Some(permit) = &self.permit {
            self.failure = Some(error_in_stream(event.data, &self.name, permit));
        }
        self.read = at;
        let (mut remove, mut model) = (false, None);
        if let Some(chunk) = read {
            frame.content = chunk.content;
            frame.finish = !chunk.finished.is_empty();
            frame.failed |= chunk.error;
            remove = chunk.choices == 0 && chunk.usage_object && !chunk.error && !self.keep_usage;
            self.note(&chunk);
            model = chunk.model;
        }
        let span = self.given..at;
        self.given = at;
        frame.place = self.place(span, remove, model, data_at);
        if self.tail && !frame.failed && !self.is_complete() {
            // Half of an event: nobody could read it.
            return Some(Frame { place: Place::Removed, content: false, finish: false, done: false, failed: false });
        }
        Some(frame)
    }

    /// Where the bytes of a complete frame are, after what has to be edited in it.
    fn place(
        &mut self,
        span: Range<usize>,
        remove: bool,
        model: Option<Range<usize>>,
        data_at: Option<usize>,
    ) -> Place {
        let passing = std::mem::take(&mut self.passing);
        self.uncounted_bytes = 0; // the meter has them now
        if remove && !passing {
            self.held.clear();
            self.held_bytes = 0;
            return Place::Removed;
        }
        let edit = model.zip(self.model.clone()).filter(|_| !passing);
        if self.held.is_empty() {
            return match (edit, data_at) {
                (None, _) => Place::Span(span),
                (Some((found, name)), Some(data_at)) => {
                    Place::Pieces(around(&self.chunk, span, data_at + found.start..data_at + found.end, name))
                }
                (Some((_, name)), None) => whole(self.chunk.slice(span), name),
            };
        }
        self.held_bytes = 0;
        let mut pieces: SmallVec<[Bytes; 4]> = self.held.drain(..).collect();
        if !self.tail || edit.is_some() {
            pieces.push(self.chunk.slice(span));
        }
        match edit {
            None => Place::Pieces(pieces),
            // Cut in two and to be edited: the one place where a frame is copied.
            Some((_, name)) => whole(pieces.concat().into(), name),
        }
    }

    /// Keeps the rest of the chunk for the frame that it begins, or passes it on when it is too long to wait for.
    fn hold_rest(&mut self) -> Option<Frame> {
        let rest = self.chunk.slice(self.given..);
        self.given = self.chunk.len();
        if rest.is_empty() {
            return None;
        }
        self.held_bytes += rest.len();
        self.held.push(rest);
        if self.held_bytes <= FRAME_HELD_BYTES_MAX && !self.passing && !self.parser.overflowed() {
            return None;
        }
        self.passing = true;
        self.lost |= self.parser.overflowed();
        let held = calibrated(self.held_bytes as u64, self.calibration_micro);
        if self.output_at_most() + held > self.watch {
            self.before = self.output();
        }
        self.uncounted_bytes += self.held_bytes as u64;
        self.held_bytes = 0;
        let pieces = self.held.drain(..).collect();
        Some(Frame { place: Place::Pieces(pieces), content: true, finish: false, done: false, failed: false })
    }

    fn note(&mut self, chunk: &Chunk) {
        if let Some(usage) = chunk.usage {
            self.usage = Some(usage); // cumulative where it comes more than once: the last counts
        }
        self.usage_invalid |= chunk.usage_invalid;
        for choice in &chunk.finished {
            if !self.finished.contains(choice) && self.finished.len() < CHOICES_MAX {
                self.finished.push(*choice);
            }
        }
    }
}

/// Why a stream that answered 200 is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It carried an error before anything else.
    Error(Error),
    /// It ended without an answer.
    Empty,
    /// It broke off.
    Broken,
}

fn around(chunk: &Bytes, span: Range<usize>, value: Range<usize>, name: Bytes) -> SmallVec<[Bytes; 4]> {
    SmallVec::from_iter([chunk.slice(span.start..value.start), name, chunk.slice(value.end..span.end)])
}

/// Edits a frame whose data is not in one piece of a chunk, by reading it again by itself; one with several data lines
/// stays as it is.
fn whole(frame: Bytes, name: Bytes) -> Place {
    let mut at = 0;
    let mut meter = Meter::new(Vocabulary::O200k); // counted already: this count is thrown away
    let mut parser = Parser::new();
    let found = parser.next(&frame, &mut at).and_then(|event| {
        let chunk = meter::read(event.data, &mut meter)?;
        let (data_at, value) = event.data_at.zip(chunk.model)?;
        Some(data_at + value.start..data_at + value.end)
    });
    Place::Pieces(match found {
        Some(value) => around(&frame, 0..frame.len(), value, name),
        None => SmallVec::from_iter([frame]),
    })
}
