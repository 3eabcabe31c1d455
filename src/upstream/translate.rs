//! Answers of dialects that are not OpenAI's, made into OpenAI's shape before anybody else reads them.
//!
//! A stream is translated at its source, event by event, so that frames, meter, money and relay need not know. What the
//! upstream did not say is not made up: a stream that breaks off or ends early has no end here either.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::client::{Broken, Source};
use crate::sse::Parser;

/// How a dialect's answers become OpenAI's.
#[derive(Debug)]
pub struct Translation {
    /// A whole answer; `None` when it is none.
    pub whole: fn(&Names, &[u8]) -> Option<Vec<u8>>,
    /// The body of a refusal with its status, in OpenAI's shape with the status that OpenAI would have given.
    pub refusal: fn(u16, &[u8]) -> (u16, Vec<u8>),
    pub stream: fn(Names) -> Box<dyn Translator>,
}

/// What is the same in all chunks of an answer.
#[derive(Clone, Debug)]
pub struct Names {
    /// The model's name as the client knows it.
    pub model: String,
    /// Seconds since 1970.
    pub created_s: i64,
    /// Answers that were asked for.
    pub n: u32,
}

/// Translates one stream. Its memory does not grow with the stream.
pub trait Translator: Send {
    /// One event in, any number of OpenAI's events out.
    fn event(&mut self, name: &[u8], data: &[u8], out: &mut Vec<u8>);
    /// The body ended well: what OpenAI sends at the end, if the answer is whole.
    fn end(&mut self, out: &mut Vec<u8>);
}

/// A source whose events are translated.
pub struct Translated {
    source: Source,
    parser: Parser,
    translator: Box<dyn Translator>,
    out: VecDeque<Bytes>,
    ended: bool,
}

impl Translated {
    pub fn new(source: Source, translator: Box<dyn Translator>) -> Translated {
        Translated { source, parser: Parser::new(), translator, out: VecDeque::new(), ended: false }
    }

    /// The next translated chunk; those of one chunk of the upstream come together.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        loop {
            if let Some(chunk) = self.out.pop_front() {
                return Poll::Ready(Some(Ok(chunk)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let mut out = Vec::new();
            match ready!(self.source.poll_chunk(cx)) {
                Some(Ok(chunk)) => {
                    read(&mut self.parser, &mut *self.translator, &chunk, &mut out);
                    if self.parser.overflowed() {
                        return Poll::Ready(Some(Err(Broken::Cut))); // what cannot be read cannot be translated
                    }
                }
                Some(Err(broken)) => return Poll::Ready(Some(Err(broken))),
                None => {
                    self.ended = true;
                    finish(&mut self.parser, &mut *self.translator, &mut out);
                }
            }
            if !out.is_empty() {
                self.out.push_back(out.into());
            }
        }
    }
}

/// Translates what has arrived.
pub fn read(parser: &mut Parser, translator: &mut dyn Translator, chunk: &[u8], out: &mut Vec<u8>) {
    let mut at = 0;
    while let Some(event) = parser.next(chunk, &mut at) {
        if event.dispatched {
            translator.event(event.name, event.data, out);
        }
    }
}

/// Translates the end of a body, and a last event that lacks its blank line.
pub fn finish(parser: &mut Parser, translator: &mut dyn Translator, out: &mut Vec<u8>) {
    if let Some(event) = parser.finish().filter(|event| event.dispatched) {
        translator.event(event.name, event.data, out);
    }
    translator.end(out);
}
