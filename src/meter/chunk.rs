//! Reads the JSON of an answer in OpenAI's shape, a chunk of a stream or the whole, and feeds its texts to a meter.

use std::cell::RefCell;
use std::{mem, ops::Range};

use simd_json::prelude::*;
use simd_json::tape::Value;
use simd_json::{Buffers, Tape};
use smallvec::SmallVec;

use super::shape::{self, Gaps, Shapes};
use super::{Kind, Lane, Meter};

/// The deepest nesting that is read, as for request bodies (design: JSON depth 128).
pub(super) const DEPTH_MAX: usize = 128;

/// Scratch buffers that have grown beyond this for one answer are not kept for the next.
const SCRATCH_KEPT_BYTES_MAX: usize = 64 << 10;

thread_local! {
    /// One for all answers of a worker: an answer itself keeps no scratch.
    static READER: RefCell<Reader> = RefCell::new(Reader::new());
}

/// Reads one answer or chunk, as [`Reader::read`] does, on the buffers of this thread.
pub fn read(data: &[u8], meter: &mut Meter) -> Option<Chunk> {
    READER.with_borrow_mut(|reader| reader.read(data, meter))
}

/// Reads chunks on reused buffers.
pub struct Reader {
    scratch: Vec<u8>,
    buffers: Buffers,
    tape: Tape<'static>,
    shapes: Shapes,
}

/// What a chunk, or a whole answer, says beside its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// It carries any of text, reasoning, refusal, tool call, audio, or a `finish_reason`.
    pub content: bool,
    /// The number of entries in `choices`.
    pub choices: usize,
    /// The number of entries in `data`: the vectors of an answer with embeddings.
    pub data: usize,
    /// The indexes of the choices that end here: their `finish_reason` is neither null nor empty.
    pub finished: SmallVec<[u32; 1]>,
    /// The upstream's own count, when it is an object of sane values.
    pub usage: Option<Usage>,
    /// `usage` is there, not null, and cannot be believed: not an object, no prompt tokens, more of them cached than
    /// there are, or a value that is no integer or negative.
    pub usage_invalid: bool,
    /// `usage` is there as an object, believable or not.
    pub usage_object: bool,
    /// Where the value of the top-level `model` stands in the data, both quotes included.
    pub model: Option<Range<usize>>,
    /// It carries a top-level `error`, an object or a text: how a stream that began with 200 fails.
    pub error: bool,
}

/// The tokens of a call by kind, as the upstream counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// All of the prompt, what was cached included.
    pub input: u64,
    pub cached_input: u64,
    /// All that was generated, reasoning included.
    pub output: u64,
    /// The part of the output that is reasoning, seen or not.
    pub reasoning: u64,
    /// The parts of the prompt, and of the output, that are sound or images.
    pub audio_input: u64,
    pub image_input: u64,
    pub audio_output: u64,
    pub image_output: u64,
}

impl Reader {
    pub fn new() -> Self {
        let buffers = Buffers::with_max_depth(0, DEPTH_MAX);
        Self { scratch: Vec::new(), buffers, tape: Tape(Vec::new()), shapes: Shapes::default() }
    }

    /// Reads one answer or chunk and pushes its texts to the meter; `None` when it is no JSON object (`[DONE]`, say).
    ///
    /// What strict JSON forbids in a string (half of a surrogate pair, bad UTF-8, a bare control character) is read as
    /// some other character of the same length: a lenient client shows the chunk, so it must be counted.
    pub fn read(&mut self, data: &[u8], meter: &mut Meter) -> Option<Chunk> {
        if let Some(shape::Found { chunk, lane, text }) = self.shapes.find(data) {
            meter.push(lane, text);
            return Some(chunk);
        }
        let chunk = self.read_strictly(data, false, meter).or_else(|| self.read_strictly(data, true, meter));
        if data.len() > SCRATCH_KEPT_BYTES_MAX {
            *self = Self { shapes: mem::take(&mut self.shapes), ..Self::new() };
        }
        chunk
    }

    fn read_strictly(&mut self, data: &[u8], mended: bool, meter: &mut Meter) -> Option<Chunk> {
        // simd-json unescapes in place, so it works on a copy; a string begins at the same offset in both.
        self.scratch.clear();
        self.scratch.extend_from_slice(data);
        if mended && !mend(&mut self.scratch) {
            return None;
        }
        let base = self.scratch.as_ptr() as usize;
        let mut tape = mem::replace(&mut self.tape, Tape(Vec::new())).reset();
        let parsed = simd_json::fill_tape(&mut self.scratch, &mut self.buffers, &mut tape);
        let chunk = parsed.ok().and_then(|()| {
            let mut walk = Walk { data, base, chunk: Chunk::default(), gaps: Gaps::of(data), meter };
            walk.answer(tape.as_value())?;
            if !mended {
                self.shapes.learn(data, walk.gaps, &walk.chunk);
            }
            Some(walk.chunk)
        });
        self.tape = tape.reset();
        chunk
    }
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

/// One way through an answer's tape.
struct Walk<'a> {
    data: &'a [u8],
    /// The address of the scratch copy's first byte.
    base: usize,
    chunk: Chunk,
    /// Where the next chunk may differ from this one and still say the same.
    gaps: Gaps,
    meter: &'a mut Meter,
}

impl Walk<'_> {
    fn answer(&mut self, root: Value) -> Option<()> {
        for (key, value) in root.as_object()?.iter() {
            match key {
                "choices" => self.choices(value),
                "data" => self.chunk.data = value.as_array().map_or(0, |data| data.len()),
                "usage" => self.usage(value),
                "model" => self.model(value.as_str()),
                "error" => self.chunk.error = value.is_object() || value.is_str(),
                // What differs between two streams, and OpenAI's padding, which differs between two chunks.
                "id" | "system_fingerprint" | "obfuscation" => {
                    if let Some(unread) = value.as_str() {
                        self.gap(shape::Kind::Unread, unread);
                    }
                }
                "created" if value.is_u64() && self.gaps.are_open() => {
                    self.gaps.note(shape::Kind::Number, self.number_behind(key))
                }
                _ => {}
            }
        }
        Some(())
    }

    fn model(&mut self, model: Option<&str>) {
        self.chunk.model = model.and_then(|model| self.range(model));
        if let Some(model) = model {
            self.gap(shape::Kind::Model, model);
        }
    }

    /// Notes a string that may differ in the next chunk.
    fn gap(&mut self, kind: shape::Kind, string: &str) {
        if self.gaps.are_open() {
            self.gaps.note(kind, self.range(string).map(inside));
        }
    }

    fn choices(&mut self, choices: Value) {
        let Some(choices) = choices.as_array() else { return };
        self.chunk.choices = choices.len();
        for (position, choice) in choices.iter().enumerate() {
            let Some(fields) = choice.as_object() else { continue };
            let index = index_or(&choice, position);
            for (key, value) in fields.iter() {
                match key {
                    "delta" | "message" => self.message(index, value),
                    "text" => self.text(Lane { choice: index, kind: Kind::Content }, &value),
                    // Some upstreams send "" in every chunk.
                    "finish_reason" if !value.is_null() && value.as_str() != Some("") => {
                        self.chunk.finished.push(index);
                        self.chunk.content = true;
                    }
                    _ => {}
                }
            }
        }
    }

    fn message(&mut self, choice: u32, message: Value) {
        let Some(fields) = message.as_object() else { return };
        let lane = |kind| Lane { choice, kind };
        for (key, value) in fields.iter() {
            match key {
                "reasoning" | "reasoning_details" => self.gaps.fix(), // what is counted of them depends on other texts
                _ => {}
            }
            match key {
                "content" => self.parts(choice, value),
                "reasoning_content" => self.text(lane(Kind::Reasoning), &value),
                // Some upstreams send the same reasoning under both names.
                "reasoning" if fields.get("reasoning_content").is_none_or(|other| other.as_str() != value.as_str()) => {
                    self.text(lane(Kind::Reasoning), &value)
                }
                // OpenRouter repeats in parts what `reasoning` says; only a part without it is news.
                "reasoning_details"
                    if !has_text(fields.get("reasoning")) && !has_text(fields.get("reasoning_content")) =>
                {
                    self.reasoning_parts(choice, value)
                }
                "refusal" => self.text(lane(Kind::Refusal), &value),
                "tool_calls" => self.tool_calls(choice, value),
                "function_call" => {
                    self.chunk.content |= value.is_object();
                    self.field(lane(Kind::FunctionName), &value, "name");
                    self.field(lane(Kind::FunctionArguments), &value, "arguments");
                }
                "audio" => {
                    self.chunk.content |= value.is_object();
                    self.field(lane(Kind::Transcript), &value, "transcript");
                }
                _ => {}
            }
        }
    }

    /// Content is a text, or an array of parts: `{"type":"text","text":…}`, Mistral's `{"thinking":[parts]}`, a refusal.
    fn parts(&mut self, choice: u32, content: Value) {
        let lane = |kind| Lane { choice, kind };
        self.text(lane(Kind::Content), &content);
        let Some(parts) = content.as_array() else { return };
        for part in parts.iter() {
            self.field(lane(Kind::Content), &part, "text");
            self.field(lane(Kind::Refusal), &part, "refusal");
            if let Some(thinking) = part.get("thinking") {
                self.text(lane(Kind::Reasoning), &thinking);
                self.reasoning_parts(choice, thinking);
            }
        }
    }

    fn reasoning_parts(&mut self, choice: u32, parts: Value) {
        let lane = Lane { choice, kind: Kind::Reasoning };
        let Some(parts) = parts.as_array() else { return };
        for part in parts.iter() {
            self.field(lane, &part, "text");
            self.field(lane, &part, "summary");
        }
    }

    fn tool_calls(&mut self, choice: u32, calls: Value) {
        let Some(calls) = calls.as_array() else { return };
        for (position, call) in calls.iter().enumerate() {
            self.chunk.content = true;
            let index = index_or(&call, position);
            let (name, arguments) = (Kind::ToolName(index), Kind::ToolArguments(index));
            // A custom tool's input is a text, where a function has arguments.
            for (tool, input) in [("function", "arguments"), ("custom", "input")] {
                if let Some(tool) = call.get(tool) {
                    self.field(Lane { choice, kind: name }, &tool, "name");
                    self.field(Lane { choice, kind: arguments }, &tool, input);
                }
            }
        }
    }

    fn field(&mut self, lane: Lane, object: &Value, name: &str) {
        if let Some(value) = object.get(name) {
            self.text(lane, &value);
        }
    }

    fn text(&mut self, lane: Lane, value: &Value) {
        if let Some(text) = value.as_str().filter(|text| !text.is_empty()) {
            self.chunk.content = true;
            self.gaps.counted(lane);
            self.gap(shape::Kind::Text, text);
            self.meter.push(lane, text);
        }
    }

    fn usage(&mut self, value: Value) {
        // What is billed by its seconds has no tokens.
        if value.is_null() || value.get("type").is_some_and(|kind| kind.as_str() == Some("duration")) {
            return;
        }
        self.chunk.usage_object = value.is_object();
        self.chunk.usage = believable(&value);
        self.chunk.usage_invalid = self.chunk.usage.is_none();
    }

    /// Where the integer stands that is the value of a key of the tape.
    fn number_behind(&self, key: &str) -> Option<Range<usize>> {
        let key = self.range(key)?;
        let is_between = |byte: &u8| matches!(byte, b':' | b' ' | b'\t' | b'\n' | b'\r');
        let start = key.end + self.data[key.end..].iter().take_while(|byte| is_between(byte)).count();
        let length = self.data[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        (length > 0).then_some(start..start + length)
    }

    /// Where a string of the tape stands in the data, quotes included.
    fn range(&self, string: &str) -> Option<Range<usize>> {
        let start = (string.as_ptr() as usize).checked_sub(self.base + 1)?;
        let rest = self.data.get(start..)?.strip_prefix(b"\"")?;
        let mut at = 0;
        loop {
            at += memchr::memchr2(b'"', b'\\', rest.get(at..)?)?;
            if rest[at] == b'"' {
                return Some(start..start + at + 2);
            }
            at += 2;
        }
    }
}

/// A string without its quotes.
fn inside(quoted: Range<usize>) -> Range<usize> {
    quoted.start + 1..quoted.end - 1
}

/// The entry's `index`, or its place where it has none.
fn index_or(entry: &Value, position: usize) -> u32 {
    let index = entry.get("index").and_then(|index| index.as_u64()).and_then(|index| u32::try_from(index).ok());
    index.unwrap_or(u32::try_from(position).unwrap_or(u32::MAX))
}

fn has_text(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.as_str().is_some_and(|text| !text.is_empty()))
}

/// Reads a usage object; `None` when one of its values cannot be a number of tokens.
///
/// Images and sound have the names of OpenAI's later interfaces: `input_tokens`, with details of its own name for either.
fn believable(usage: &Value) -> Option<Usage> {
    let total = tokens(usage, "total_tokens")?;
    let Some(input) = tokens(usage, "prompt_tokens")? else { return later(usage, total) };
    let output = tokens(usage, "completion_tokens")?.unwrap_or(0);
    // DeepSeek's own name for cached tokens; where both are sent they agree.
    let hits = tokens(usage, "prompt_cache_hit_tokens")?;
    let cached_input = detail(usage, "prompt_tokens_details", "cached_tokens")?.or(hits).unwrap_or(0);
    let reasoning = detail(usage, "completion_tokens_details", "reasoning_tokens")?.unwrap_or(0);
    let of_prompt = |name| Some(detail(usage, "prompt_tokens_details", name)?.unwrap_or(0));
    let (audio_input, image_input) = (of_prompt("audio_tokens")?, of_prompt("image_tokens")?);
    let of_output = |name| Some(detail(usage, "completion_tokens_details", name)?.unwrap_or(0));
    let (audio_output, image_output) = (of_output("audio_tokens")?, of_output("image_tokens")?);
    if cached_input > input || audio_input.saturating_add(image_input) > input {
        return None;
    }
    // xAI leaves reasoning out of completion_tokens, and puts it into the total.
    let apart = reasoning > 0
        && total.is_some()
        && total == input.checked_add(output).and_then(|sum| sum.checked_add(reasoning));
    let output = if apart { output + reasoning } else { output };
    if audio_output.saturating_add(image_output) > output {
        return None;
    }
    Some(Usage { input, cached_input, output, reasoning, audio_input, image_input, audio_output, image_output })
}

/// The usage of images, sound and ranking; a total alone is all input.
fn later(usage: &Value, total: Option<u64>) -> Option<Usage> {
    let (Some(input), output) = (tokens(usage, "input_tokens")?, tokens(usage, "output_tokens")?.unwrap_or(0)) else {
        return Some(Usage { input: total?, ..Usage::default() });
    };
    let of_input = |name| {
        let found = detail(usage, "input_tokens_details", name)?.or(detail(usage, "input_token_details", name)?);
        Some(found.unwrap_or(0))
    };
    let (cached_input, audio_input) = (of_input("cached_tokens")?, of_input("audio_tokens")?);
    let image_input = of_input("image_tokens")?;
    let of_output = |name| Some(detail(usage, "output_tokens_details", name)?.unwrap_or(0));
    let (reasoning, image_output) = (of_output("reasoning_tokens")?, of_output("image_tokens")?);
    let is_sane = cached_input <= input && audio_input.saturating_add(image_input) <= input;
    let is_sane = is_sane && reasoning.saturating_add(image_output) <= output;
    is_sane.then_some(Usage {
        input,
        cached_input,
        output,
        reasoning,
        audio_input,
        image_input,
        image_output,
        ..Usage::default()
    })
}

fn detail(usage: &Value, details: &str, name: &str) -> Option<Option<u64>> {
    match usage.get(details) {
        Some(details) if details.is_object() => tokens(&details, name),
        Some(details) if !details.is_null() => None,
        _ => Some(None),
    }
}

/// `Some(None)` where the number is absent or null, `None` where it is no number of tokens.
fn tokens(object: &Value, name: &str) -> Option<Option<u64>> {
    match object.get(name) {
        Some(value) if !value.is_null() => value.as_u64().map(Some),
        _ => Some(None),
    }
}

/// Replaces, byte for byte, what strict JSON forbids in strings; says whether there was any.
fn mend(json: &mut [u8]) -> bool {
    let mut mended = replace_bad_utf8(json);
    let (mut at, mut in_string) = (0, false);
    while at < json.len() {
        match json[at] {
            b'"' => in_string = !in_string,
            b'\\' if in_string => {
                let escape = surrogate(json, at);
                let pair =
                    matches!(escape, Some(0xd800..=0xdbff)) && matches!(surrogate(json, at + 6), Some(0xdc00..=0xdfff));
                if escape.is_some() && !pair {
                    json[at + 2..at + 6].copy_from_slice(b"fffd");
                    mended = true;
                }
                at += if pair { 11 } else { 1 };
            }
            0..0x20 if in_string => {
                json[at] = b' ';
                mended = true;
            }
            _ => {}
        }
        at += 1;
    }
    mended
}

/// The value of a `\uXXXX` at `at` when it is half of a pair.
fn surrogate(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at + 6)?.strip_prefix(b"\\u")?;
    let digits =
        std::str::from_utf8(digits).ok().filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
    u16::from_str_radix(digits, 16).ok().filter(|value| (0xd800..=0xdfff).contains(value))
}

fn replace_bad_utf8(json: &mut [u8]) -> bool {
    let (mut at, mut replaced) = (0, false);
    while let Err(error) = std::str::from_utf8(&json[at..]) {
        at += error.valid_up_to();
        let bad = error.error_len().unwrap_or(json.len() - at);
        json[at..at + bad].fill(b'?');
        at += bad;
        replaced = true;
    }
    replaced
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::meter::Vocabulary;

    fn read(json: &str) -> (Chunk, u64) {
        let mut meter = Meter::new(Vocabulary::O200k);
        let chunk = Reader::new().read(json.as_bytes(), &mut meter).expect("an object");
        (chunk, meter.total())
    }

    fn tokens_of(text: &str) -> u64 {
        Vocabulary::O200k.count(text)
    }

    #[test]
    fn a_content_delta_is_counted_and_its_model_is_found() {
        let json = r#"{"id":"1","model":"gpt-\"4o\\","choices":[{"index":0,"delta":{"content":"Hello there"},"finish_reason":null}],"usage":null}"#;
        let (chunk, total) = read(json);
        assert!(chunk.content && chunk.finished.is_empty() && !chunk.error);
        assert_eq!((chunk.choices, total), (1, tokens_of("Hello there")));
        assert_eq!(&json[chunk.model.expect("a model")], r#""gpt-\"4o\\""#);
        assert_eq!((chunk.usage, chunk.usage_invalid, chunk.usage_object), (None, false, false));
    }

    #[test]
    fn an_empty_model_is_found_and_one_that_is_no_string_is_not() {
        let json = r#"{"a":"\u00e9\n","model":"","choices":[]}"#;
        assert_eq!(&json[read(json).0.model.expect("a model")], r#""""#);
        assert_eq!(read(r#"{"model":4,"b":"x"}"#).0.model, None);
        assert_eq!(read(r#"{"choices":[{"model":"inner"}]}"#).0.model, None);
    }

    #[test]
    fn a_role_chunk_has_no_content() {
        for delta in [
            r#"{"role":"assistant","content":""}"#,
            r#"{"role":"assistant","content":null,"refusal":null}"#,
            "{}",
            "null",
        ] {
            let (chunk, total) =
                read(&format!(r#"{{"choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]}}"#));
            assert_eq!((chunk.content, total), (false, 0), "{delta}");
        }
    }

    #[test]
    fn parallel_tool_calls_are_counted_by_their_index() {
        let mut meter = Meter::new(Vocabulary::O200k);
        let mut reader = Reader::new();
        for json in [
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"a","function":{"name":"get_weather","arguments":""}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"ci"}},{"index":1,"function":{"name":"now","arguments":"{"}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":1,"function":{"arguments":"}"}},{"index":0,"function":{"arguments":"ty\":1}"}}]}}]}"#,
        ] {
            assert!(reader.read(json.as_bytes(), &mut meter).expect("an object").content);
        }
        let texts = ["get_weather", "{\"city\":1}", "now", "{}"];
        assert_eq!(meter.total(), texts.into_iter().map(tokens_of).sum::<u64>());
    }

    #[test]
    fn several_choices_finish_one_by_one() {
        let (chunk, total) = read(
            r#"{"choices":[{"index":2,"delta":{"content":"two"},"finish_reason":"stop"},{"index":0,"delta":{"content":"zero"},"finish_reason":""},
            {"index":1,"delta":{},"finish_reason":"length"}]}"#,
        );
        assert_eq!(chunk.finished.as_slice(), [2, 1]);
        assert_eq!((chunk.choices, total), (3, 2));
    }

    #[test]
    fn a_whole_answer_is_read_like_a_chunk() {
        let (chunk, total) = read(
            r#"{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi","refusal":"No",
            "tool_calls":[{"id":"x","function":{"name":"f","arguments":"{}"}},{"id":"y","custom":{"name":"g","input":"some text"}}],
            "audio":{"id":"a","data":"UklGRg==","transcript":"spoken"}},"finish_reason":"tool_calls"}],
            "usage":{"prompt_tokens":9,"completion_tokens":7,"total_tokens":16,"prompt_tokens_details":{"cached_tokens":4}}}"#,
        );
        let texts = ["Hi", "No", "f", "{}", "g", "some text", "spoken"];
        assert_eq!(total, texts.into_iter().map(tokens_of).sum::<u64>());
        assert_eq!(chunk.usage, Some(Usage { input: 9, cached_input: 4, output: 7, ..Usage::default() }));
        assert_eq!(chunk.finished.as_slice(), [0]);
    }

    #[test]
    fn legacy_shapes_are_counted() {
        let (chunk, total) =
            read(r#"{"choices":[{"text":" once upon","index":0,"logprobs":null,"finish_reason":"length"}]}"#);
        assert_eq!((chunk.content, total, chunk.finished.as_slice()), (true, tokens_of(" once upon"), &[0][..]));
        let (chunk, total) =
            read(r#"{"choices":[{"index":0,"delta":{"function_call":{"name":"f","arguments":"{\"a\":1}"}}}]}"#);
        assert_eq!((chunk.content, total), (true, tokens_of("f") + tokens_of("{\"a\":1}")));
    }

    #[test]
    fn reasoning_is_counted_once_under_any_of_its_names() {
        for delta in [
            r#"{"content":null,"reasoning_content":"I think"}"#,
            r#"{"content":"","reasoning":"I think"}"#,
            r#"{"reasoning":"I think","reasoning_content":"I think"}"#,
            r#"{"reasoning":"I think","reasoning_details":[{"type":"reasoning.text","text":"I think"}]}"#,
            r#"{"reasoning":null,"reasoning_details":[{"type":"reasoning.text","text":"I think"}]}"#,
            r#"{"content":[{"type":"thinking","thinking":[{"type":"text","text":"I think"}]}]}"#,
            r#"{"content":[{"type":"text","text":"I think"}]}"#,
        ] {
            let (chunk, total) = read(&format!(r#"{{"choices":[{{"index":0,"delta":{delta}}}]}}"#));
            assert_eq!((chunk.content, total), (true, tokens_of("I think")), "{delta}");
        }
    }

    #[test]
    fn usage_that_cannot_be_believed_is_refused() {
        for usage in [
            r#"{"prompt_tokens":-1,"completion_tokens":2}"#,
            r#"{"prompt_tokens":1,"completion_tokens":"2"}"#,
            r#"{"prompt_tokens":1,"completion_tokens":2.5}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1e3}"#,
            r#"{"prompt_tokens":1,"completion_tokens":99999999999999999999999}"#,
            r#"{"prompt_tokens":1,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":5}}"#,
            r#"{"prompt_tokens":1,"completion_tokens":2,"completion_tokens_details":{"reasoning_tokens":-5}}"#,
            r#"{"prompt_tokens":1,"completion_tokens":2,"completion_tokens_details":[]}"#,
            "{}",
        ] {
            let (chunk, _) = read(&format!(r#"{{"choices":[],"usage":{usage}}}"#));
            assert_eq!((chunk.usage, chunk.usage_invalid, chunk.usage_object), (None, true, true), "{usage}");
        }
        let (chunk, _) = read(r#"{"choices":[],"usage":"12"}"#);
        assert_eq!((chunk.usage, chunk.usage_invalid, chunk.usage_object), (None, true, false));
    }

    #[test]
    fn usage_is_read_in_every_dialect() {
        for (usage, expected) in [
            (
                r#"{"prompt_tokens":10,"completion_tokens":20,"total_tokens":30,"prompt_tokens_details":{"cached_tokens":5,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":8}}"#,
                Usage { input: 10, cached_input: 5, output: 20, reasoning: 8, ..Usage::default() },
            ),
            (
                r#"{"prompt_tokens":12,"completion_tokens":89,"total_tokens":101,"prompt_tokens_details":null,"prompt_cache_hit_tokens":3,"prompt_cache_miss_tokens":9}"#,
                Usage { input: 12, cached_input: 3, output: 89, ..Usage::default() },
            ),
            (
                r#"{"prompt_tokens":10,"completion_tokens":9,"total_tokens":119,"completion_tokens_details":{"reasoning_tokens":100}}"#,
                Usage { input: 10, output: 109, reasoning: 100, ..Usage::default() },
            ),
            (r#"{"prompt_tokens":8,"total_tokens":8}"#, Usage { input: 8, ..Usage::default() }),
            (r#"{"total_tokens":8}"#, Usage { input: 8, ..Usage::default() }),
            (
                r#"{"total_tokens":100,"input_tokens":50,"output_tokens":50,"input_tokens_details":{"text_tokens":10,"image_tokens":40}}"#,
                Usage { input: 50, image_input: 40, output: 50, ..Usage::default() },
            ),
            (
                r#"{"type":"tokens","input_tokens":14,"input_token_details":{"text_tokens":4,"audio_tokens":10},"output_tokens":45,"total_tokens":59}"#,
                Usage { input: 14, audio_input: 10, output: 45, ..Usage::default() },
            ),
        ] {
            assert_eq!(read(&format!(r#"{{"choices":[],"usage":{usage}}}"#)).0.usage, Some(expected), "{usage}");
        }
    }

    #[test]
    fn half_a_surrogate_pair_does_not_lose_the_chunk() {
        for half in [r"\ud83d", r"\uDE00", r"\ud83d\ud83d\ude00", r"\ud83d x \\\ude00", r"\ud83d\n"] {
            let json = format!(
                r#"{{"model":"\\m","choices":[{{"index":0,"delta":{{"content":"some words {half}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":1,"completion_tokens":2}}}}"#
            );
            let (chunk, total) = read(&json);
            assert!(total >= 3, "{half}");
            assert_eq!(chunk.finished.as_slice(), [0]);
            assert_eq!(chunk.usage.map(|usage| usage.output), Some(2));
            assert_eq!(&json[chunk.model.expect("a model")], r#""\\m""#);
        }
    }

    #[test]
    fn bad_utf8_and_bare_control_characters_do_not_lose_the_chunk() {
        for bad in [&b"\xff\xfe"[..], b"\xe4\xb8", b"\n\x01"] {
            let json = [br#"{"choices":[{"index":0,"delta":{"content":"some words"#, bad, br#""}}]}"#].concat();
            let mut meter = Meter::new(Vocabulary::O200k);
            assert!(Reader::new().read(&json, &mut meter).expect("an object").content);
            assert!(meter.total() >= 2);
        }
    }

    #[test]
    fn what_is_no_object_is_none() {
        let mut meter = Meter::new(Vocabulary::O200k);
        let mut reader = Reader::new();
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for data in [
            "",
            "[DONE]",
            "[]",
            "12",
            "null",
            "{",
            r#"{"a":}"#,
            "{\"a\":\"",
            "\"\\",
            "{\"\\u",
            deep.as_str(),
            &format!("{{\"a\":{deep}}}"),
        ] {
            assert_eq!(reader.read(data.as_bytes(), &mut meter), None);
        }
        assert_eq!(meter.total(), 0);
        assert!(reader.read(br#"{"choices":[]}"#, &mut meter).is_some());
    }

    #[test]
    fn an_error_inside_a_stream_is_seen() {
        assert!(read(r#"{"error":{"message":"overloaded","code":502},"choices":[]}"#).0.error);
        assert!(read(r#"{"error":"overloaded"}"#).0.error);
        assert!(!read(r#"{"error":null,"choices":[]}"#).0.error);
    }

    #[test]
    fn a_large_answer_does_not_stay_in_the_scratch_buffers() {
        let mut meter = Meter::new(Vocabulary::O200k);
        let mut reader = Reader::new();
        let json = format!(r#"{{"choices":[{{"index":0,"message":{{"content":"{}"}}}}]}}"#, "words ".repeat(100_000));
        assert!(reader.read(json.as_bytes(), &mut meter).expect("an object").content);
        assert!(reader.scratch.capacity() <= SCRATCH_KEPT_BYTES_MAX);
        assert!(meter.is_estimated());
    }

    /// Whether a chunk behind another one was read without a parse.
    fn is_found(first: &str, second: &str) -> bool {
        let (mut reader, mut meter) = (Reader::new(), Meter::new(Vocabulary::O200k));
        reader.read(first.as_bytes(), &mut meter).expect("an object");
        reader.shapes.find(second.as_bytes()).is_some()
    }

    fn like_openai(id: &str, created: &str, delta: &str, rest: &str) -> String {
        format!(
            r#"{{"id":"{id}","object":"chat.completion.chunk","created":{created},"model":"gpt-4o","system_fingerprint":"fp_1","choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":null}}],"usage":null,"obfuscation":"{rest}"}}"#
        )
    }

    #[test]
    fn a_chunk_that_differs_in_its_text_alone_is_not_parsed() {
        let first = like_openai("a", "1760000000", r#"{"content":"Hi"}"#, "xy");
        for (second, found) in [
            (like_openai("another", "1760000001", r#"{"content":" there, 世界"}"#, "q"), true),
            (like_openai("a", "1760000000", r#"{"content":" there"}"#, ""), true),
            (like_openai("a", "1760000000", r#"{"content":""}"#, "q"), false),
            (like_openai("a", "1760000000", r#"{"content":"\n"}"#, "q"), false),
            (like_openai("a", "1760000000", "{\"content\":\"\u{1}\"}", "q"), false),
            (like_openai("a", "017", r#"{"content":"Hi"}"#, "q"), false),
            (like_openai("a", "1.5", r#"{"content":"Hi"}"#, "q"), false),
            (like_openai("a", "-1", r#"{"content":"Hi"}"#, "q"), false),
            (like_openai("a", "1760000000", r#"{"content":"Hi","x":1}"#, "q"), false),
            (like_openai("a", "1760000000", r#"{"refusal":"Hi"}"#, "q"), false),
            (like_openai("é", "1760000000", r#"{"content":"Hi"}"#, "q"), false),
            (first[..first.len() - 1].to_owned(), false),
            (format!("{first} "), false),
        ] {
            assert_eq!(is_found(&first, &second), found, "{second}");
        }
    }

    #[test]
    fn what_depends_on_another_text_has_no_shape() {
        for delta in [
            r#"{"reasoning":"I think","reasoning_content":"I think"}"#,
            r#"{"reasoning":"I think","reasoning_details":[{"type":"reasoning.text","text":"I think"}]}"#,
            r#"{"content":"a","refusal":"b"}"#,
            r#"{"content":null}"#,
        ] {
            let chunk = like_openai("a", "1", delta, "");
            assert!(!is_found(&chunk, &chunk), "{delta}");
        }
    }

    #[test]
    fn a_stream_whose_chunks_all_differ_does_not_push_out_the_shapes_of_others() {
        let (mut reader, mut meter) = (Reader::new(), Meter::new(Vocabulary::O200k));
        let steady = like_openai("a", "1", r#"{"content":"Hi"}"#, "");
        for number in 0..100 {
            reader.read(steady.as_bytes(), &mut meter);
            let differs = steady.replace(r#""usage":null"#, &format!(r#""usage":{{"prompt_tokens":{number}}}"#));
            reader.read(differs.as_bytes(), &mut meter);
            assert!(reader.shapes.find(steady.as_bytes()).is_some());
        }
    }

    /// Chunks of a few shapes, some with a byte that does not belong there.
    fn chunk_like() -> impl Strategy<Value = Vec<u8>> {
        let text = prop::sample::select(vec!["Hi", "", " there", "\\n", "世界", "\\ud83d", "{}", "\\\"", "stop"]);
        let delta = prop::sample::select(vec![
            r#"{"content":"@"}"#,
            r#"{"role":"assistant","content":"@"}"#,
            r#"{"content":null,"reasoning_content":"@"}"#,
            r#"{"reasoning":"@"}"#,
            r#"{"reasoning":"Hi","reasoning_content":"@"}"#,
            r#"{"content":"@","content":"@"}"#,
            r#"{"content":[{"type":"text","text":"@"}]}"#,
            r#"{"tool_calls":[{"index":0,"function":{"name":"@"}}]}"#,
            r#"{"tool_calls":[{"index":0,"function":{"arguments":"@"}}]}"#,
            "{}",
        ]);
        let id = prop::sample::select(vec!["a", "b2", "", "\\u0041"]);
        let created = prop::sample::select(vec!["1", "1760000000", "0", "01", "1e3", "99999999999999999999"]);
        let tail = prop::sample::select(vec!["", "pad", "@"]);
        let wrong = prop::option::weighted(0.2, (any::<prop::sample::Index>(), any::<u8>()));
        (text, delta, id, created, tail, wrong).prop_map(|(text, delta, id, created, tail, wrong)| {
            let mut chunk = like_openai(id, created, &delta.replace('@', text), tail).into_bytes();
            if let Some((at, byte)) = wrong {
                let at = at.index(chunk.len());
                chunk[at] = byte;
            }
            chunk
        })
    }

    proptest! {
        #[test]
        fn any_text_is_counted_as_it_was_before_escaping_and_the_model_is_found(content in any::<String>(), model in any::<String>(), ascii in any::<bool>()) {
            let mut json = serde_json::json!({"x": content, "model": model, "choices": [{"delta": {"content": content}}]}).to_string();
            if ascii {
                let units = json.chars().flat_map(|character| character.encode_utf16(&mut [0; 2]).to_vec());
                json = units.map(|unit| if unit < 0x80 { char::from(unit as u8).to_string() } else { format!("\\u{unit:04x}") }).collect();
            }
            let (chunk, total) = read(&json);
            prop_assert_eq!(total, tokens_of(&content));
            let found: String = serde_json::from_str(&json[chunk.model.expect("a model")]).expect("a string");
            prop_assert_eq!(found, model);
        }

        #[test]
        fn a_chunk_is_read_the_same_behind_any_other_chunks(chunks in prop::collection::vec(chunk_like(), 1..12)) {
            let mut reader = Reader::new();
            for data in &chunks {
                let (mut seen, mut fresh) = (Meter::new(Vocabulary::O200k), Meter::new(Vocabulary::O200k));
                let chunk = reader.read(data, &mut seen);
                prop_assert_eq!(&chunk, &Reader::new().read(data, &mut fresh), "{}", String::from_utf8_lossy(data));
                prop_assert_eq!(seen.total(), fresh.total());
                prop_assert_eq!(seen.tool_calls(), fresh.tool_calls());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(data in prop::collection::vec(prop::sample::select(br#"{}[]":,\u8dcmodelchis 0-e."#.to_vec()), 0..60)) {
            Reader::new().read(&data, &mut Meter::new(Vocabulary::O200k));
        }
    }
}
