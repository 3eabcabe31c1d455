//! An answer that is not streamed: its bytes as they came, and what they say.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::meter::{Meter, Reader, Usage, Vocabulary};

/// A whole answer in OpenAI's shape.
#[derive(Debug)]
pub struct Whole {
    /// The body, with a mapped model's name put back.
    pub pieces: SmallVec<[Bytes; 3]>,
    pub usage: Option<Usage>,
    pub usage_invalid: bool,
    /// Output tokens as counted here.
    pub output: u64,
    pub estimated: bool,
    pub tool_calls: u64,
    /// It carries anything of an answer: without, it costs nothing.
    pub content: bool,
}

impl Whole {
    /// Reads an answer; `None` when it is no completion. `model` is the name to put in place of the upstream's.
    pub fn read(body: Bytes, vocabulary: Vocabulary, model: Option<&str>) -> Option<Whole> {
        let mut meter = Meter::new(vocabulary);
        let read = Reader::new().read(&body, &mut meter)?;
        if read.error || read.choices == 0 {
            return None;
        }
        let pieces = match read.model.zip(model) {
            Some((found, model)) => SmallVec::from_iter([
                body.slice(..found.start),
                serde_json::Value::from(model).to_string().into(),
                body.slice(found.end..),
            ]),
            None => SmallVec::from_iter([body]),
        };
        Some(Whole {
            pieces,
            usage: read.usage,
            usage_invalid: read.usage_invalid,
            output: meter.total(),
            estimated: meter.is_estimated(),
            tool_calls: meter.tool_calls(),
            content: read.content,
        })
    }
}
