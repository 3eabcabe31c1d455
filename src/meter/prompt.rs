//! Counts the tokens of a request's body by OpenAI's documented rules, within a budget of CPU time.
//!
//! Messages: platform.openai.com's cookbook, "How to count tokens with tiktoken". The same page gives the overhead of
//! tools, which is an approximation, as is all that is not documented: those counts are marked estimated.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use simd_json::Buffers;
use simd_json::prelude::*;
use simd_json::tape::{Object, Value};

use super::Vocabulary;
use super::chunk::DEPTH_MAX;
pub use super::image::{IMAGE_TOKENS_MAX, image_tokens_max};
use super::image::{ImagePrice, size_of_data_url};
use super::vocabulary::OLD_TEXT_BYTES_MAX;

/// What frames each message, beside its role and its texts.
pub const MESSAGE_TOKENS: u64 = 3;
/// What a message's `name` costs beside its text.
pub const NAME_TOKENS: u64 = 1;
/// What begins the answer, once a request.
pub const PRIMING_TOKENS: u64 = 3;
/// What ends the list of tools, once a request.
pub const TOOLS_TOKENS: u64 = 12;

/// The bytes that are counted between two looks at the clock: 10 to 100 µs of text, a look costs 0.2 µs.
const CLOCK_BYTES: usize = 1 << 10;

/// The longest piece that is counted whole. Longer ones, which no human text has, are counted in parts, so that a look
/// at the clock falls between them; each part may cut one token in two.
const PIECE_BYTES_MAX: usize = 4 << 10;

/// The tokens of a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub tokens: u64,
    /// The number is not exact: tools, an image of unknown size, audio, a file, or the budget was spent.
    pub estimated: bool,
}

/// Counts the prompt in the body of a chat, completions or embeddings request.
///
/// `budget` is CPU time of this thread, reading the JSON included; when it is spent each further byte of text counts as a
/// token, which is never too little. Audio, files and the provider's own tools are counted as nothing and marked: a
/// request with them is to be held at the model's context. A body that is not JSON counts as its bytes.
pub fn count_prompt(body: &[u8], vocabulary: Vocabulary, budget: Duration) -> Prompt {
    count_by_clock(body, vocabulary, budget, thread_time)
}

/// What no count of [`count_prompt`] exceeds, without counting: for a body of `body_bytes`, of which the caller may take
/// off the base64 text of its images, with `images` images.
///
/// A token of text has at least one byte of it, escaped or not, and the JSON around a message, a tool or a property is
/// longer than what they cost beside their text.
pub fn prompt_bound(body_bytes: u64, messages: u64, images: u64, model: &str) -> u64 {
    let images = images.saturating_mul(image_tokens_max(model));
    body_bytes.saturating_add(messages.saturating_mul(MESSAGE_TOKENS)).saturating_add(images)
        + PRIMING_TOKENS
        + TOOLS_TOKENS
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

fn count_by_clock(body: &[u8], vocabulary: Vocabulary, budget: Duration, clock: fn() -> Duration) -> Prompt {
    let budget = Budget { end: clock().saturating_add(budget), clock, unchecked: 0, spent: false };
    let mut scratch = body.to_vec();
    let mut buffers = Buffers::with_max_depth(body.len(), DEPTH_MAX);
    let tape = simd_json::to_tape_with_buffers(&mut scratch, &mut buffers);
    let Some(root) = tape.as_ref().ok().and_then(|tape| tape.as_value().as_object()) else {
        return Prompt { tokens: body.len() as u64, estimated: true };
    };
    let image_price = root.get("model").and_then(|model| ImagePrice::of_model(model.as_str()?));
    let mut count = Count { vocabulary, budget, image_price, prompt: Prompt { tokens: 0, estimated: false } };
    count.body(&root);
    count.prompt
}

/// CPU time, looked at now and then.
struct Budget {
    end: Duration,
    clock: fn() -> Duration,
    unchecked: usize,
    spent: bool,
}

impl Budget {
    /// Notes that so many bytes are about to be counted; says whether there is time left for them.
    fn covers(&mut self, bytes: usize) -> bool {
        self.unchecked += bytes;
        if !self.spent && self.unchecked >= CLOCK_BYTES {
            self.unchecked = 0;
            self.spent = (self.clock)() > self.end;
        }
        !self.spent
    }
}

/// One way through a body's tape.
struct Count {
    vocabulary: Vocabulary,
    budget: Budget,
    /// `None` where the model's formula is not known.
    image_price: Option<ImagePrice>,
    prompt: Prompt,
}

impl Count {
    fn body(&mut self, root: &Object) {
        for (key, value) in root.iter() {
            match key {
                "messages" => self.messages(value),
                "tools" => self.tools(value, Some("function")),
                "functions" => self.tools(value, None),
                "response_format" => self.response_format(value),
                "prompt" | "input" => self.texts(value, true),
                "suffix" => self.value(Some(value)),
                _ => {}
            }
        }
    }

    fn messages(&mut self, messages: Value) {
        let Some(messages) = messages.as_array() else { return };
        self.add(PRIMING_TOKENS);
        for message in messages.iter() {
            let Some(fields) = message.as_object() else { continue };
            self.add(MESSAGE_TOKENS);
            for (key, value) in fields.iter() {
                match key {
                    "role" => self.value(Some(value)),
                    "content" if value.is_str() => self.value(Some(value)),
                    "content" => self.parts(value),
                    "name" if value.is_str() => {
                        self.add(NAME_TOKENS);
                        self.value(Some(value));
                    }
                    "refusal" => self.value(Some(value)),
                    "tool_calls" => self.tool_calls(value),
                    "function_call" => self.called(Some(value), "arguments"),
                    // An answer's audio is named by its id, its length is not known here.
                    "audio" if !value.is_null() => self.prompt.estimated = true,
                    _ => {}
                }
            }
        }
    }

    fn parts(&mut self, parts: Value) {
        let Some(parts) = parts.as_array() else { return };
        for part in parts.iter() {
            match part.get("type").as_ref().and_then(|kind| kind.as_str()) {
                Some("text" | "input_text" | "output_text") => self.value(part.get("text")),
                Some("refusal") => self.value(part.get("refusal")),
                Some("image_url" | "input_image") => self.image(part.get("image_url"), part.get("detail")),
                _ => {
                    self.prompt.estimated = true;
                    self.value(part.get("text"));
                }
            }
        }
    }

    /// `image_url` is `{"url", "detail"}`, or the URL with the detail beside it.
    fn image(&mut self, image: Option<Value>, detail: Option<Value>) {
        self.prompt.estimated |= self.image_price.is_none();
        let price = self.image_price.unwrap_or(ImagePrice::usual());
        let url = image.and_then(|image| image.get("url").or(Some(image)));
        let detail = image.and_then(|image| image.get("detail")).or(detail);
        if let (Some("low"), Some(tokens)) = (detail.as_ref().and_then(|detail| detail.as_str()), price.low()) {
            return self.add(tokens);
        }
        let size = url.as_ref().and_then(|url| size_of_data_url(url.as_str()?));
        self.prompt.estimated |= size.is_none();
        self.add(size.map_or(price.max(), |(width, height)| price.tokens(width, height)));
    }

    /// Calls of earlier turns: how they are put before the model is not documented.
    fn tool_calls(&mut self, calls: Value) {
        let Some(calls) = calls.as_array() else { return };
        for call in calls.iter() {
            self.called(call.get("function"), "arguments");
            self.called(call.get("custom"), "input");
        }
    }

    fn called(&mut self, call: Option<Value>, input: &str) {
        if let Some(call) = call.filter(Value::is_object) {
            self.prompt.estimated = true;
            self.add(MESSAGE_TOKENS);
            self.value(call.get("name"));
            self.value(call.get(input));
        }
    }

    fn tools(&mut self, tools: Value, wrapper: Option<&str>) {
        let Some(tools) = tools.as_array().filter(|tools| !tools.is_empty()) else { return };
        self.prompt.estimated = true;
        self.add(TOOLS_TOKENS);
        for tool in tools.iter() {
            let function = wrapper.map_or(Some(tool), |wrapper| tool.get(wrapper).or_else(|| tool.get("custom")));
            self.add(if self.vocabulary == Vocabulary::O200k { 7 } else { 10 });
            let Some(function) = function else { continue };
            self.value(function.get("name"));
            self.value(function.get("description"));
            self.schema(function.get("parameters"));
        }
    }

    fn response_format(&mut self, format: Value) {
        if let Some(schema) = format.get("json_schema") {
            self.prompt.estimated = true;
            self.value(schema.get("name"));
            self.value(schema.get("description"));
            self.schema(schema.get("schema"));
        }
    }

    /// The cookbook's rule for the properties of a function, carried on into the schemas inside; the depth is the
    /// parser's.
    fn schema(&mut self, schema: Option<Value>) {
        let Some(fields) = schema.and_then(|schema| schema.as_object()) else { return };
        for (key, value) in fields.iter() {
            match key {
                "properties" | "$defs" | "definitions" => self.properties(value),
                "anyOf" | "oneOf" | "allOf" => {
                    for schema in value.as_array().iter().flat_map(|schemas| schemas.iter()) {
                        self.property(Some(schema));
                    }
                }
                "items" => self.property(Some(value)),
                _ => {}
            }
        }
    }

    fn properties(&mut self, properties: Value) {
        let Some(properties) = properties.as_object().filter(|properties| !properties.is_empty()) else { return };
        self.add(3);
        for (name, property) in properties.iter() {
            self.add(3);
            self.text(name);
            self.property(Some(property));
        }
    }

    fn property(&mut self, property: Option<Value>) {
        let Some(property) = property.filter(Value::is_object) else { return };
        self.value(property.get("type"));
        self.value(property.get("description"));
        for item in property.get("enum").and_then(|items| items.as_array()).iter().flat_map(|items| items.iter()) {
            self.add(3);
            self.value(Some(item));
        }
        self.schema(Some(property));
    }

    /// A text, an array of texts, of token numbers, or of arrays of those.
    fn texts(&mut self, texts: Value, nested: bool) {
        self.value(Some(texts));
        for text in texts.as_array().iter().flat_map(|texts| texts.iter()) {
            match text {
                _ if text.is_number() => self.add(1),
                _ if nested => self.texts(text, false),
                _ => self.value(Some(text)),
            }
        }
    }

    fn value(&mut self, value: Option<Value>) {
        if let Some(text) = value.as_ref().and_then(|value| value.as_str()) {
            self.text(text);
        }
    }

    fn text(&mut self, text: &str) {
        let Some(encoder) = self.vocabulary.encoder() else {
            let counted = self.budget.covers(text.len()) && text.len() <= OLD_TEXT_BYTES_MAX;
            self.prompt.estimated |= !counted;
            return self.add(if counted { self.vocabulary.count(text) } else { text.len() as u64 });
        };
        let (mut start, mut piece_end) = (0, 0);
        while start < text.len() {
            if start == piece_end {
                piece_end = encoder.piece_end(text, start);
            }
            let mut end = piece_end;
            if end - start > PIECE_BYTES_MAX {
                end = text.floor_char_boundary(start + PIECE_BYTES_MAX);
                self.prompt.estimated = true;
            }
            if !self.budget.covers(end - start) {
                self.prompt.estimated = true;
                return self.add((text.len() - start) as u64);
            }
            self.add(encoder.piece_tokens(text, start, end));
            start = end;
        }
    }

    fn add(&mut self, tokens: u64) {
        self.prompt.tokens += tokens;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const AMPLE: Duration = Duration::from_secs(600);

    fn count(body: &serde_json::Value) -> Prompt {
        count_prompt(body.to_string().as_bytes(), Vocabulary::O200k, AMPLE)
    }

    fn tokens_of(text: &str) -> u64 {
        Vocabulary::O200k.count(text)
    }

    #[test]
    fn the_example_of_the_cookbook_comes_out() {
        let messages = json!([
            {"role": "system", "content": "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."},
            {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
            {"role": "system", "name": "example_assistant", "content": "Things working well together will increase revenue."},
            {"role": "system", "name": "example_user", "content": "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."},
            {"role": "system", "name": "example_assistant", "content": "Let's talk later when we're less busy about how to do better."},
            {"role": "user", "content": "This late pivot means we don't have time to boil the ocean for the client deliverable."}
        ]);
        let body = json!({"model": "gpt-4o", "messages": messages}).to_string();
        let exact = |tokens| Prompt { tokens, estimated: false };
        assert_eq!(count_prompt(body.as_bytes(), Vocabulary::Cl100k, AMPLE), exact(129));
        assert_eq!(count_prompt(body.as_bytes(), Vocabulary::O200k, AMPLE), exact(124));
    }

    #[test]
    fn an_image_costs_its_tiles_and_never_its_text() {
        let png = "iVBORw0KGgoAAAANSUhEUgAABAAAAAQACAYAAAB/HSuDAAAA".to_owned() + &"A".repeat(100_000);
        let image = |url: &str, detail: &str| {
            json!({"model": "gpt-4o", "messages": [{"role": "user", "content": [
            {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url, "detail": detail}}]}]})
        };
        let text = 3 + 3 + tokens_of("user") + tokens_of("What is this?");
        let data = format!("data:image/png;base64,{png}");
        assert_eq!(count(&image(&data, "auto")), Prompt { tokens: text + 765, estimated: false });
        assert_eq!(count(&image(&data, "low")), Prompt { tokens: text + 85, estimated: false });
        assert_eq!(count(&image("https://example.org/a.png", "high")), Prompt { tokens: text + 1445, estimated: true });
    }

    #[test]
    fn what_is_not_documented_is_marked() {
        for part in [
            json!({"type": "input_audio", "input_audio": {"data": "UklGRg".repeat(1000), "format": "wav"}}),
            json!({"type": "file", "file": {"file_data": "JVBERi".repeat(1000), "filename": "a.pdf"}}),
            json!({"type": "hologram"}),
        ] {
            let prompt = count(&json!({"messages": [{"role": "user", "content": [part]}]}));
            assert!(prompt.estimated && prompt.tokens < 10, "{prompt:?}");
        }
    }

    #[test]
    fn the_tools_of_the_cookbook_come_out_near() {
        let parameters = json!({"type": "object", "required": ["location"], "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {"type": "string", "description": "The unit of temperature to return", "enum": ["celsius", "fahrenheit"]}}});
        let function = json!({"name": "get_current_weather", "description": "Get the current weather in a given location", "parameters": parameters});
        let messages = json!([
            {"role": "system", "content": "You are a helpful assistant that can answer to questions about the weather."},
            {"role": "user", "content": "What's the weather like in Pittsburgh?"}]);
        let prompt = count(&json!({"tools": [{"type": "function", "function": function}], "messages": messages}));
        assert!(prompt.estimated);
        assert!(prompt.tokens.abs_diff(101) <= 5, "{prompt:?} where the API says 101");
        assert_eq!(count(&json!({"functions": [function], "messages": messages})), prompt);
    }

    #[test]
    fn a_nested_schema_and_a_call_in_the_history_are_not_free() {
        let prompt = count(&json!({
            "messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"key\": \"many words in an argument\"}"}}]}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"properties": {"list": {"items": {"anyOf": [
                {"description": "a deep description"}]}}}}}}}));
        assert!(
            prompt.estimated
                && prompt.tokens > 3 + 3 + tokens_of("many words in an argument a deep description list answer")
        );
    }

    #[test]
    fn legacy_prompts_and_embeddings_have_no_overhead() {
        let exact = |tokens| Prompt { tokens, estimated: false };
        assert_eq!(count(&json!({"prompt": "Say this is a test"})), exact(5));
        assert_eq!(
            count(&json!({"prompt": ["Say this", "is a test"]})),
            exact(tokens_of("Say this") + tokens_of("is a test"))
        );
        assert_eq!(count(&json!({"input": [1, 2, 3]})), exact(3));
        assert_eq!(count(&json!({"input": [[1, 2, 3], [4]]})), exact(4));
    }

    #[test]
    fn past_the_budget_bytes_are_counted_and_it_is_marked() {
        let text = "some words ".repeat(10_000);
        let body = json!({"messages": [{"role": "user", "content": text}]}).to_string();
        let late = || {
            use std::sync::atomic::{AtomicU64, Ordering};
            static LOOKS: AtomicU64 = AtomicU64::new(0);
            Duration::from_millis(LOOKS.fetch_add(1, Ordering::Relaxed))
        };
        let prompt = count_by_clock(body.as_bytes(), Vocabulary::O200k, Duration::from_millis(20), late);
        // Twenty looks at the clock, one a KiB, were in time.
        let counted = 20 * CLOCK_BYTES as u64;
        assert!(prompt.estimated);
        assert!(
            prompt.tokens > text.len() as u64 - counted && prompt.tokens < text.len() as u64 - counted / 2,
            "{prompt:?}"
        );
    }

    #[test]
    fn a_piece_without_end_is_counted_in_parts() {
        for unit in ["-", "a", "中", " "] {
            let text = unit.repeat(40_000 / unit.len());
            let prompt = count(&json!({"prompt": text}));
            let exact = tokens_of(&text);
            assert!(prompt.estimated && prompt.tokens.abs_diff(exact) <= 10, "{unit:?}: {prompt:?} for {exact}");
        }
    }

    #[test]
    fn a_body_that_is_not_json_counts_as_its_bytes() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
        for body in ["", "not json", "[1]", deep.as_str()] {
            let expected = Prompt { tokens: body.len() as u64, estimated: true };
            assert_eq!(count_prompt(body.as_bytes(), Vocabulary::O200k, AMPLE), expected);
        }
    }

    proptest! {
        #[test]
        fn the_bound_is_never_below_the_count(
            texts in prop::collection::vec("[\\PC\n\"]{0,30}", 0..8), property in any::<String>(), items in prop::collection::vec("[a-z]?", 0..9),
            images in 0..3_usize, vocabulary in prop::sample::select(vec![Vocabulary::O200k, Vocabulary::Cl100k, Vocabulary::P50k]),
        ) {
            let messages: Vec<_> = texts.iter().map(|text| json!({"role": "", "name": text, "content": text, "tool_calls": [{"function": {"name": ""}}]})).collect();
            let image = json!({"role": "user", "content": vec![json!({"type": "image_url", "image_url": ""}); images]});
            let tools = vec![json!({"function": {"name": "", "parameters": {"properties": {property: {"enum": items}, "": {}}}}}); 3];
            let body = json!({"model": "gpt-4o", "messages": ([&messages[..], &[image]].concat()), "tools": tools}).to_string();
            let prompt = count_prompt(body.as_bytes(), vocabulary, AMPLE);
            let bound = prompt_bound(body.len() as u64, messages.len() as u64 + 1, images as u64, "gpt-4o");
            prop_assert!(prompt.tokens <= bound, "{} over {bound}", prompt.tokens);
        }
    }
}
