//! The body of a streamed reply: hands frames on, holds money for them, and settles the call at whichever end comes.
//!
//! It owns the answer, the permit within it and the open line; hang-up, error and normal end all go through its drop.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame as BodyFrame};
use serde_json::json;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};

use super::body::Weight;
use super::in_chat;
use super::journey::Opened;
use super::stop::Stop;
use crate::config::Language;
use crate::error::Error;
use crate::ledger::{Ended, OpenLine, Slices};
use crate::request::{Api, Form};
use crate::store::EndReason;
use crate::upstream::openai::{DONE, chunk_event};
use crate::upstream::{Answer, Frame, Frames, Place};

/// Goes out between two events of a silent stream. One line feed: a blank line behind a comment breaks a few old SDKs.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n");
const BROKEN_OFF: Error = Error::UpstreamFailed { reason: "its stream broke off" };
const JOURNAL_FULL: Error = Error::NodeUnavailable { reason: "its journal is full", retry_after_s: 5 };
const SILENT: Error = Error::UpstreamTimeout { reason: "it fell silent" };
const TOO_LONG: Error = Error::UpstreamTimeout { reason: "its answer took too long" };

/// Breaks the connection: what the client has is not the whole answer.
#[derive(Debug)]
pub struct Broke;

impl std::fmt::Display for Broke {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the answer is not whole")
    }
}

impl std::error::Error for Broke {}

/// What a relay has to know beside the answer.
#[derive(Debug)]
pub struct Terms {
    pub request_id: String,
    /// The model's name as the client knows it.
    pub model: String,
    /// What was called: a completion of either kind.
    pub api: &'static Api,
    pub keep_alive: Duration,
    pub silence_max: Duration,
    pub total_max: Duration,
    /// When the call began.
    pub begun: Instant,
    /// Errors break the connection: HTTP/1.1.
    pub breaks: bool,
    /// Errors are told as text of the answer, which then ends well, in this language.
    pub in_chat: Option<Language>,
    /// Notified when the node's patience with open streams is over.
    pub stop: Arc<Stop>,
    /// Counts the request's body as in flight for as long as the relay lives.
    pub _weight: Weight,
}

type Opening = Pin<Box<dyn Future<Output = Opened> + Send>>;
type Asking = Pin<Box<dyn Future<Output = Option<Slices>> + Send>>;
type Preparing = Pin<Box<dyn Future<Output = OpenLine> + Send>>;

/// The streamed reply.
pub struct Relay {
    phase: Phase,
    terms: Terms,
    out: VecDeque<Bytes>,
    /// A span of the chunk at hand that grows as long as untouched frames follow each other.
    span: Option<Range<usize>>,
    content: bool,
    /// Something was handed over that the server may not have written yet.
    unwritten: bool,
    /// Output tokens handed over, as of the last exact count.
    output: u64,
    begun: Instant,
    last_chunk: Instant,
    last_comment: Instant,
    stop: Pin<Box<OwnedNotified>>,
    quiet: Pin<Box<Sleep>>,
    /// Whom `stop` and `quiet` wake: while neither has anything new, asking them again would cost a chunk more than its
    /// frame.
    asked_by: Option<Waker>,
}

enum Phase {
    /// The head went out before the answer began.
    Opening(Opening),
    Streaming(Box<Frames>, OpenLine),
    /// A frame waits for the money of its tokens.
    Asking(Box<Frames>, Asking, OpenLine, Frame),
    /// A frame that ends the answer waits until what came before it is written: its MARK charges that.
    Pausing(Box<Frames>, OpenLine, Frame),
    /// A long prompt is counted before the last bytes go out.
    Preparing(Box<Frames>, Preparing, EndReason),
    /// What is in `out` goes out, then the body ends well.
    Ending,
    /// What is in `out` goes out, is flushed, then the connection breaks.
    Breaking {
        flushed: bool,
    },
    Over,
}

impl Relay {
    /// A relay whose answer has begun.
    pub fn streaming(frames: Box<Frames>, line: OpenLine, terms: Terms) -> Relay {
        Relay::new(Phase::Streaming(frames, line), terms)
    }

    /// A relay whose answer has not begun, although the head must go out.
    pub fn opening(opening: Opening, terms: Terms) -> Relay {
        let mut relay = Relay::new(Phase::Opening(opening), terms);
        relay.out.push_back(KEEP_ALIVE);
        relay
    }

    fn new(phase: Phase, terms: Terms) -> Relay {
        let now = Instant::now();
        Relay {
            phase,
            out: VecDeque::new(),
            span: None,
            content: false,
            unwritten: false,
            output: 0,
            begun: terms.begun,
            last_chunk: now,
            last_comment: now,
            stop: Box::pin(terms.stop.wait()),
            asked_by: None,
            quiet: Box::pin(tokio::time::sleep(terms.keep_alive)),
            terms,
        }
    }

    /// Does what can be done; `Ready` when there is something in `out` or the body is over.
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(polled) = self.stream(cx) {
                return polled;
            }
            // What a stream that ended has left to say comes before what its end does.
            if !self.out.is_empty() && !matches!(self.phase, Phase::Preparing(..)) {
                return Poll::Ready(());
            }
            match std::mem::replace(&mut self.phase, Phase::Over) {
                Phase::Opening(mut opening) => match opening.as_mut().poll(cx) {
                    Poll::Ready(opened) => self.opened(opened),
                    Poll::Pending => {
                        self.phase = Phase::Opening(opening);
                        return self.keep_alive(cx, true);
                    }
                },
                streaming @ Phase::Streaming(..) => self.phase = streaming, // `stream` goes on with it
                Phase::Asking(frames, mut asking, line, frame) => match asking.as_mut().poll(cx) {
                    Poll::Pending => {
                        let at_boundary = !frames.is_passing();
                        self.phase = Phase::Asking(frames, asking, line, frame);
                        return self.keep_alive(cx, at_boundary);
                    }
                    Poll::Ready(slices) => self.take_after_asking(cx, frames, line, frame, slices),
                },
                Phase::Pausing(frames, line, frame) => {
                    if self.unwritten {
                        self.phase = Phase::Pausing(frames, line, frame);
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    self.release(cx, frames, line, frame);
                }
                Phase::Preparing(frames, mut preparing, reason) => match preparing.as_mut().poll(cx) {
                    Poll::Pending => {
                        self.phase = Phase::Preparing(frames, preparing, reason);
                        return Poll::Pending;
                    }
                    Poll::Ready(line) => self.end(frames, line, reason),
                },
                Phase::Ending => return Poll::Ready(()),
                Phase::Breaking { flushed } => {
                    self.phase = Phase::Breaking { flushed: true };
                    if flushed {
                        return Poll::Ready(());
                    }
                    // A pause of one poll, in which the server writes what it has; an error at once would throw it away.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Phase::Over => return Poll::Ready(()),
            }
        }
    }

    fn opened(&mut self, opened: Opened) {
        let Opened { answer, line } = opened;
        self.last_chunk = Instant::now();
        match answer {
            Ok(Answer::Stream(frames)) => self.phase = Phase::Streaming(frames, line),
            // A stream of a completion was asked for, so nothing else is ever opened.
            Ok(Answer::Whole(_) | Answer::Other(_)) => self.fail(line, &Error::Internal),
            Err(error) => self.fail(line, &error),
        }
    }

    /// Goes from frame to frame while the answer streams, and leaves the phase where it is for those that are handed on as
    /// they are, nearly all of them. `None`: another phase goes on.
    fn stream(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        loop {
            let Phase::Streaming(frames, line) = &mut self.phase else { return None };
            let covered = line.covered();
            frames.watch(covered);
            if let Some(frame) = frames.next_frame() {
                let is_marked = frame.finish || frame.done || frame.failed || (frame.content && !self.content);
                if !is_marked && frames.output_at_most() <= covered {
                    put(frame.place, frames, &mut self.span, &mut self.out);
                    continue;
                }
                let (frames, line) = self.take_streaming()?;
                self.take(cx, frames, line, frame);
                continue;
            }
            flush(frames, &mut self.span, &mut self.out);
            frames.let_go();
            if !self.out.is_empty() {
                return Some(Poll::Ready(()));
            }
            match frames.poll_chunk(cx) {
                Poll::Ready(Some(Ok(()))) => {
                    self.last_chunk = Instant::now();
                    if self.last_chunk - self.begun >= self.terms.total_max {
                        let (frames, line) = self.take_streaming()?;
                        self.broken(frames, line, &TOO_LONG);
                    }
                }
                Poll::Ready(Some(Err(_))) => {
                    let (frames, line) = self.take_streaming()?;
                    self.broken(frames, line, &BROKEN_OFF);
                }
                Poll::Ready(None) => {
                    let (frames, line) = self.take_streaming()?;
                    self.upstream_ended(frames, line);
                }
                Poll::Pending => {
                    let at_boundary = frames.at_boundary();
                    return Some(self.keep_alive(cx, at_boundary));
                }
            }
        }
    }

    /// Takes the answer out of its phase, for a step that decides what the next one is.
    fn take_streaming(&mut self) -> Option<(Box<Frames>, OpenLine)> {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Streaming(frames, line) => Some((frames, line)),
            other => {
                self.phase = other;
                None
            }
        }
    }

    /// Hands a frame on if its tokens are paid for, and if what a crash would charge is written down.
    fn take(&mut self, cx: &mut Context<'_>, mut frames: Box<Frames>, line: OpenLine, frame: Frame) {
        if frames.output_at_most() > line.covered() {
            let output = frames.output();
            if output > line.covered() {
                self.flush_span(&frames);
                // Until the money is there, this is all that was handed over.
                self.output = frames.output_before();
                let slices = line.slices(output);
                let asking = Box::pin(async move {
                    // A pause of one poll, in which the server writes what it has: the MARK of the slice charges it.
                    tokio::task::yield_now().await;
                    slices.await
                });
                self.phase = Phase::Asking(frames, asking, line, frame);
                return;
            }
        }
        self.release(cx, frames, line, frame);
    }

    fn take_after_asking(
        &mut self,
        cx: &mut Context<'_>,
        frames: Box<Frames>,
        mut line: OpenLine,
        frame: Frame,
        slices: Option<Slices>,
    ) {
        self.last_chunk = Instant::now(); // it was we who did not read
        // `output` is the count before this frame.
        match slices.map(|slices| line.add_slices(slices, self.output)) {
            Some(true) => self.release(cx, frames, line, frame),
            Some(false) => self.break_off(frames, line, EndReason::UpstreamError, &JOURNAL_FULL),
            None => self.cut(frames, line),
        }
    }

    fn release(&mut self, cx: &mut Context<'_>, mut frames: Box<Frames>, mut line: OpenLine, frame: Frame) {
        if frame.failed {
            let error = frames.take_failure().unwrap_or(BROKEN_OFF);
            return self.broken(frames, line, &error);
        }
        if frame.finish && self.content && (self.unwritten || self.span.is_some() || !self.out.is_empty()) {
            self.flush_span(&frames);
            self.phase = Phase::Pausing(frames, line, frame);
            return;
        }
        if frame.finish || (frame.content && !self.content) {
            let output = frames.output();
            // Nothing of the first content has been handed over yet.
            if !line.mark(if self.content { output } else { 0 }) {
                return self.break_off(frames, line, EndReason::UpstreamError, &JOURNAL_FULL);
            }
            self.output = output;
            // Whatever ends this call, it is billed for no less than its MARK.
            line.handed_over(output, frames.is_estimated());
        }
        self.content |= frame.content;
        put(frame.place, &frames, &mut self.span, &mut self.out);
        if frame.done {
            self.flush_span(&frames);
            // A stream with CRLF whose last LF is still to come: nobody waits for it, so it is added.
            if self.out.iter().rev().flat_map(|piece| piece.iter().rev()).take(2).eq(b"\r\n") {
                self.out.push_back(Bytes::from_static(b"\n"));
            }
            frames.finish(cx);
            return self.prepare(frames, line, EndReason::Complete);
        }
        self.phase = Phase::Streaming(frames, line);
    }

    /// Ends a frame that went out in part, so that what follows is an event of its own.
    fn end_frame(&mut self, frames: &Frames) {
        if frames.is_passing() {
            self.out.push_back(Bytes::from_static(b"\n\n"));
        }
    }

    fn flush_span(&mut self, frames: &Frames) {
        flush(frames, &mut self.span, &mut self.out);
    }

    /// The upstream's body ended: well, if the answer is whole.
    fn upstream_ended(&mut self, mut frames: Box<Frames>, line: OpenLine) {
        if frames.take_tail() {
            self.phase = Phase::Streaming(frames, line);
            return;
        }
        if !frames.is_complete() {
            return self.broken(frames, line, &BROKEN_OFF);
        }
        self.prepare(frames, line, EndReason::Complete);
    }

    /// The money is used up: ends the stream as a model does that reached its bound, and says why.
    fn cut(&mut self, frames: Box<Frames>, line: OpenLine) {
        self.flush_span(&frames);
        self.end_frame(&frames);
        let (prefix, object) = match self.terms.api.form {
            Form::Completion => ("cmpl", "text_completion"),
            _ => ("chatcmpl", "chat.completion.chunk"),
        };
        let id = format!("{prefix}-{}", self.terms.request_id);
        let chunk = |choice: serde_json::Value| {
            chunk_event(&json!({ "id": id, "object": object, "created": crate::store::now_ms() / 1000,
                                 "model": self.terms.model, "choices": [choice], "usage": null }))
        };
        let ended = |index: u32| match self.terms.api.form {
            Form::Completion => json!({ "index": index, "text": "", "logprobs": null, "finish_reason": "length" }),
            _ => json!({ "index": index, "delta": {}, "finish_reason": "length" }),
        };
        let mut ending = vec![Bytes::from_static(b": gpt-cat: no further money can be held for this stream\n")];
        ending.extend(frames.unfinished().map(|choice| chunk(ended(choice))));
        ending.push([b"data: ", DONE, b"\n\n"].concat().into());
        self.out.extend(ending);
        // What came after the cut is not handed over; `output` is the count before it.
        self.prepare(frames, line, EndReason::Length);
    }

    /// The upstream failed after the head went out: one error event, then the connection breaks.
    fn broken(&mut self, mut frames: Box<Frames>, line: OpenLine, error: &Error) {
        self.output = frames.output();
        self.break_off(frames, line, EndReason::UpstreamError, error);
    }

    /// Ends with an error; `output` has been handed over.
    fn break_off(&mut self, frames: Box<Frames>, line: OpenLine, reason: EndReason, error: &Error) {
        self.flush_span(&frames);
        let ended = self.ended(&frames, reason);
        line.end(ended);
        self.end_frame(&frames);
        self.error_event(error);
        self.phase = self.after_error();
    }

    /// Over HTTP/1.1 the connection breaks, so that nobody takes the stream for whole. Over HTTP/2 a reset may overtake
    /// the error event itself; the event then has to do, with no terminator behind it.
    fn after_error(&self) -> Phase {
        if self.tells_in_chat().is_some() {
            return Phase::Ending;
        }
        if self.terms.breaks { Phase::Breaking { flushed: false } } else { Phase::Ending }
    }

    /// No answer at all, after the head went out.
    fn fail(&mut self, line: OpenLine, error: &Error) {
        line.end(Ended::failed(200, matches!(error, Error::UpstreamTimeout { .. })));
        self.error_event(error);
        self.phase = self.after_error();
    }

    /// The language of errors that are told as text of a chat.
    fn tells_in_chat(&self) -> Option<Language> {
        self.terms.in_chat.filter(|_| self.terms.api.form == Form::Chat)
    }

    fn error_event(&mut self, error: &Error) {
        if let Some(language) = self.tells_in_chat() {
            let gap = if self.content { "\n\n" } else { "" };
            let text = format!("{gap}{}", in_chat::text(error, language));
            let chunk = |delta: serde_json::Value, finish: Option<&str>| {
                let choices = json!([{ "index": 0, "delta": delta, "finish_reason": finish }]);
                chunk_event(&json!({ "id": format!("chatcmpl-{}", self.terms.request_id), "model": self.terms.model,
                                     "object": "chat.completion.chunk", "created": crate::store::now_ms() / 1000,
                                     "choices": choices }))
            };
            let told = chunk(json!({ "role": "assistant", "content": text }), None);
            let ending = [told, chunk(json!({}), Some("stop")), [b"data: ", DONE, b"\n\n"].concat().into()];
            return self.out.extend(ending);
        }
        let body = error.body_json();
        self.out.push_back([b"data: ", &body[..], b"\n\n"].concat().into());
    }

    fn prepare(&mut self, mut frames: Box<Frames>, mut line: OpenLine, reason: EndReason) {
        if reason == EndReason::Complete {
            self.output = frames.output();
        }
        let usage = frames.usage();
        if self.content {
            line.handed_over(self.output, frames.is_estimated()); // should the client leave while the prompt is counted
        }
        if line.needs_time(usage) {
            let preparing = Box::pin(async move {
                line.prepare(usage).await;
                line
            });
            self.phase = Phase::Preparing(frames, preparing, reason);
            return;
        }
        self.end(frames, line, reason);
    }

    /// END is in the kernel before the last bytes leave.
    fn end(&mut self, frames: Box<Frames>, line: OpenLine, reason: EndReason) {
        let ended = self.ended(&frames, reason);
        line.end(ended);
        self.phase = Phase::Ending;
    }

    fn ended(&self, frames: &Frames, reason: EndReason) -> Ended {
        Ended {
            reason,
            status: 200,
            usage: frames.usage().filter(|_| reason == EndReason::Complete),
            usage_invalid: frames.usage_invalid(),
            output: self.output,
            estimated: frames.is_estimated(),
            tool_calls: frames.tool_calls(),
            content: self.content,
            may_be_billed: true,
            unmeasured: false,
        }
    }

    /// Nothing came: a comment when that has lasted, an end when it has lasted too long or the node stops.
    fn keep_alive(&mut self, cx: &mut Context<'_>, at_boundary: bool) -> Poll<()> {
        let asked = self.asked_by.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if asked && !self.quiet.is_elapsed() && !self.terms.stop.is_told() {
            return Poll::Pending;
        }
        self.asked_by = None;
        let polled = self.stop_or_comment(cx, at_boundary);
        if polled.is_pending() {
            self.asked_by = Some(cx.waker().clone());
        }
        polled
    }

    fn stop_or_comment(&mut self, cx: &mut Context<'_>, at_boundary: bool) -> Poll<()> {
        if self.stop.as_mut().poll(cx).is_ready() {
            self.give_up(EndReason::Drained, &Error::Draining);
            return Poll::Ready(());
        }
        ready!(self.quiet.as_mut().poll(cx));
        let now = Instant::now();
        if now - self.begun >= self.terms.total_max {
            self.give_up(EndReason::UpstreamError, &TOO_LONG);
            return Poll::Ready(());
        }
        if now - self.last_chunk >= self.terms.silence_max && matches!(self.phase, Phase::Streaming(..)) {
            self.give_up(EndReason::UpstreamError, &SILENT);
            return Poll::Ready(());
        }
        // Chunks may have come since it was set: setting it again for each of them would cost more than this.
        let due = (self.last_chunk + self.terms.keep_alive).max(self.last_comment + self.terms.keep_alive);
        if now < due {
            self.quiet.as_mut().reset(due);
            return self.quiet.as_mut().poll(cx);
        }
        self.last_comment = now;
        self.quiet.as_mut().reset(now + self.terms.keep_alive);
        if at_boundary {
            self.out.push_back(KEEP_ALIVE);
            return Poll::Ready(());
        }
        self.quiet.as_mut().poll(cx)
    }

    /// Ends whatever is going on with an error.
    fn give_up(&mut self, reason: EndReason, error: &Error) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Streaming(mut frames, line) => {
                self.output = frames.output();
                self.break_off(frames, line, reason, error);
            }
            // The frame that waits is not handed over; `output` is the count before it.
            Phase::Asking(frames, asking, line, _) => {
                drop(asking); // whoever the end of the line wakes must not count this call among those that wait
                self.break_off(frames, line, reason, error);
            }
            // Its line ends with the drop of the opening.
            Phase::Opening(_) => {
                self.error_event(error);
                self.phase = self.after_error();
            }
            other => self.phase = other,
        }
    }
}

/// Puts a frame's bytes behind what is to go out.
fn put(place: Place, frames: &Frames, open: &mut Option<Range<usize>>, out: &mut VecDeque<Bytes>) {
    match place {
        Place::Span(span) => match open {
            Some(open) if open.end == span.start => open.end = span.end,
            _ => {
                flush(frames, open, out);
                *open = Some(span);
            }
        },
        Place::Pieces(pieces) => {
            flush(frames, open, out);
            out.extend(pieces);
        }
        Place::Removed => {}
    }
}

/// Ends the span that grows.
fn flush(frames: &Frames, open: &mut Option<Range<usize>>, out: &mut VecDeque<Bytes>) {
    if let Some(span) = open.take() {
        out.push_back(frames.slice(span));
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Broke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Bytes>, Broke>>> {
        loop {
            // While the end is being prepared `out` has the last bytes: they wait for END.
            if !matches!(self.phase, Phase::Preparing(..))
                && let Some(bytes) = self.out.pop_front()
            {
                if bytes.is_empty() {
                    continue;
                }
                self.unwritten = true;
                return Poll::Ready(Some(Ok(BodyFrame::data(bytes))));
            }
            if self.advance(cx).is_pending() {
                self.unwritten = false; // the server writes what it has before it asks again
                return Poll::Pending;
            }
            if self.out.is_empty() {
                return match self.phase {
                    Phase::Breaking { .. } => {
                        self.phase = Phase::Over;
                        Poll::Ready(Some(Err(Broke)))
                    }
                    _ => Poll::Ready(None),
                };
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.phase, Phase::Over | Phase::Ending) && self.out.is_empty()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The client left. What was handed to its connection is billed; a frame that waits for money was not.
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Streaming(mut frames, mut line) | Phase::Pausing(mut frames, mut line, _) if self.content => {
                line.handed_over(frames.output(), frames.is_estimated());
                // Where the upstream bills the whole answer anyway, what it bills beyond the charge becomes known.
                if frames.is_drained()
                    && let Ok(runtime) = tokio::runtime::Handle::try_current()
                {
                    let stop = std::mem::replace(&mut self.stop, Box::pin(self.terms.stop.wait()));
                    runtime.spawn(async move {
                        // A node that stops waits for no answer that nobody reads.
                        tokio::select! {
                            () = frames.drain() => {}
                            () = stop => {}
                        }
                        line.upstream_bills(frames.usage());
                    });
                }
            }
            Phase::Asking(frames, asking, mut line, _) => {
                drop(asking); // whoever the end of the line wakes must not count this call among those that wait
                if self.content {
                    line.handed_over(self.output, frames.is_estimated());
                }
            }
            _ => {}
        }
    }
}
