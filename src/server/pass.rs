//! The body of a reply that is passed on as it comes: sound, texts, events that are no completion.
//!
//! It owns the answer, the permit within it and the open line, as the relay does; hang-up, error and normal end all settle
//! the call by the usage that came along, by the price per call, or by what was held.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use memchr::memmem;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};

use super::relay::{Broke, Terms};
use crate::ledger::{Ended, OpenLine};
use crate::meter::{self, Meter, Usage, Vocabulary};
use crate::sse::Parser;
use crate::store::EndReason;
use crate::upstream::Other;

/// Whether a stream begins with an error and nothing else.
fn is_error(chunk: &Bytes) -> bool {
    let (mut parser, mut at, mut meter) = (Parser::new(), 0, Meter::new(Vocabulary::O200k));
    let first = parser.next(chunk, &mut at).filter(|event| event.dispatched);
    first.is_some_and(|event| {
        event.name == b"error" || meter::read(event.data, &mut meter).is_some_and(|read| read.error)
    })
}

/// A reply on its way.
pub struct Pass {
    /// `None` once nothing more comes.
    answer: Option<Box<Other>>,
    line: Option<OpenLine>,
    /// Reads the events of a stream for the usage in one of them.
    events: Option<Parser>,
    usage: Option<Usage>,
    usage_invalid: bool,
    content: bool,
    /// The connection is to break, once the server has written what it has.
    breaking: bool,
    last_chunk: Instant,
    stop: Pin<Box<OwnedNotified>>,
    quiet: Pin<Box<Sleep>>,
    terms: Terms,
}

impl Pass {
    pub fn new(answer: Box<Other>, line: OpenLine, terms: Terms) -> Pass {
        let kind = answer.content_type.as_ref().map(|kind| kind.as_bytes().to_ascii_lowercase());
        let is_events = kind.is_some_and(|kind| kind.starts_with(b"text/event-stream"));
        Pass {
            answer: Some(answer),
            line: Some(line),
            events: is_events.then(Parser::new),
            usage: None,
            usage_invalid: false,
            content: false,
            breaking: false,
            last_chunk: Instant::now(),
            stop: Box::pin(terms.stop.wait()),
            quiet: Box::pin(tokio::time::sleep(terms.silence_max)),
            terms,
        }
    }

    /// Notes what a chunk says, before it is handed over; false when nothing may be.
    fn note(&mut self, chunk: &Bytes) -> bool {
        if !self.content && self.events.is_some() && is_error(chunk) {
            return true; // no content, no charge
        }
        if let Some(line) = self.line.as_mut().filter(|_| !self.content) {
            // Without a MARK a crash would charge nothing for what goes out now.
            if !line.mark(0) {
                return false;
            }
            line.handed_over(0, false);
            self.content = true;
        }
        if let Some(parser) = &mut self.events {
            let mut at = 0;
            while let Some(event) = parser.next(chunk, &mut at) {
                // An image in its base64 is not worth reading for a usage that it does not have.
                if !event.dispatched || memmem::find(event.data, b"\"usage\"").is_none() {
                    continue;
                }
                let mut meter = Meter::new(Vocabulary::O200k); // its texts are of no interest
                if let Some(read) = meter::read(event.data, &mut meter) {
                    self.usage = read.usage.or(self.usage);
                    self.usage_invalid |= read.usage_invalid;
                }
            }
        }
        true
    }

    /// END is in the kernel when this returns.
    fn settle(&mut self, reason: EndReason) {
        let Some(line) = self.line.take() else { return };
        line.end(Ended {
            reason,
            status: if reason == EndReason::ClientGone { 499 } else { 200 },
            // Whatever ended the call, its provider has said what it bills.
            usage: self.usage,
            usage_invalid: self.usage_invalid,
            output: 0,
            estimated: false,
            tool_calls: 0,
            content: self.content,
            may_be_billed: true,
            unmeasured: true,
        });
    }

    /// Breaks the connection: what the client has is not the whole answer.
    fn fail(&mut self, cx: &mut Context<'_>, reason: EndReason) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        self.answer = None;
        self.settle(reason);
        self.breaking = true;
        // A pause of one poll, in which the server writes what it has; an error at once would throw it away.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Nothing came: an end when that has lasted too long, or when the node stops.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        if self.stop.as_mut().poll(cx).is_ready() {
            return self.fail(cx, EndReason::Drained);
        }
        loop {
            if self.quiet.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let due = (self.last_chunk + self.terms.silence_max).min(self.terms.begun + self.terms.total_max);
            if Instant::now() >= due {
                return self.fail(cx, EndReason::UpstreamError);
            }
            self.quiet.as_mut().reset(due); // chunks have come since it was set
        }
    }
}

impl Drop for Pass {
    /// The client left; a usage that came before that is what the call costs.
    fn drop(&mut self) {
        if self.usage.is_some() {
            self.settle(EndReason::ClientGone);
        }
    }
}

impl Body for Pass {
    type Data = Bytes;
    type Error = Broke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        if std::mem::take(&mut self.breaking) {
            return Poll::Ready(Some(Err(Broke)));
        }
        let Some(answer) = &mut self.answer else { return Poll::Ready(None) };
        let chunk = match answer.source.poll_chunk(cx) {
            Poll::Pending => return self.wait(cx),
            Poll::Ready(Some(Ok(chunk))) => chunk,
            Poll::Ready(None) if answer.left.is_none_or(|left| left == 0) => {
                self.answer = None;
                self.settle(EndReason::Complete);
                return Poll::Ready(None);
            }
            Poll::Ready(_) => return self.fail(cx, EndReason::UpstreamError),
        };
        answer.left = answer.left.map(|left| left.saturating_sub(chunk.len() as u64));
        let is_last = answer.left == Some(0);
        self.last_chunk = Instant::now();
        if self.last_chunk >= self.terms.begun + self.terms.total_max || !self.note(&chunk) {
            return self.fail(cx, EndReason::UpstreamError);
        }
        if is_last {
            // Its end usually came along: then the connection goes back before the client's own end is waited for.
            if let Some(mut answer) = self.answer.take() {
                let _ = answer.source.poll_chunk(cx);
            }
            self.settle(EndReason::Complete);
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.answer.is_none() && !self.breaking
    }

    fn size_hint(&self) -> SizeHint {
        let left = self.answer.as_ref().map_or(Some(0), |answer| answer.left);
        left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
