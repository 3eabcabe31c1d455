//! An answer that is not streamed: its bytes as they came, and what they say.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::meter::{self, Chunk, Meter, Usage, Vocabulary, calibrated};
use crate::request::{Api, Form};

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
    /// Its output was counted here.
    pub measured: bool,
}

impl Whole {
    /// Reads an answer; `None` when it is none of what was called. `model` is the name to put in place of the upstream's.
    /// `calibration_micro` are the provider's tokens for one counted here, in millionths.
    pub fn read(
        body: Bytes,
        api: &Api,
        vocabulary: Vocabulary,
        calibration_micro: i64,
        model: Option<&str>,
    ) -> Option<Whole> {
        let mut meter = Meter::new(vocabulary);
        let read = match meter::read(&body, &mut meter) {
            // Some rank without an object around the list.
            None if !api.is_measured() => Chunk::default(),
            read => read?,
        };
        let (is_answer, content) = match api.form {
            Form::Chat | Form::Completion => (read.choices > 0, read.content),
            Form::Embedding => (read.data > 0, read.data > 0),
            Form::Json | Form::Multipart => (true, true),
        };
        if read.error || !is_answer {
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
            output: calibrated(meter.total(), calibration_micro),
            estimated: meter.is_estimated(),
            tool_calls: meter.tool_calls(),
            content,
            measured: api.is_measured(),
        })
    }
}
