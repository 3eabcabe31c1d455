//! The dialect `qianwen`: Qwen over DashScope's native protocol.
//!
//! Alibaba Cloud Model Studio, "DashScope API reference" (`POST {base}/services/aigc/text-generation/generation` and
//! `…/multimodal-generation/generation`). A request is written anew around the client's own values: tools, schemas, numbers
//! and texts go up as the bytes that they came in. What DashScope cannot represent is a 400 that names the field, unless
//! the endpoint says `lossy = "allow"`.

use hyper::Request;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, HeaderName, HeaderValue};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::client::Pieces;
use super::openai::{self, DONE};
use super::translate::{Names, Translation, Translator};
use super::{Adapter, Ask, Via};
use crate::error::Error;
use crate::pool::Permit;
use crate::request::{Fields, Form, Head};
use crate::sse::Parser;

/// One row of [`super::ADAPTERS`].
pub static ADAPTER: Adapter =
    Adapter { dialect: "qianwen", forms: &[Form::Chat], keyless: false, via: Via::Translated(request, TRANSLATION) };

/// How its answers become OpenAI's.
pub const TRANSLATION: Translation = Translation { whole, refusal, stream: |names| Box::new(Stream::new(names)) };

const SSE: HeaderName = HeaderName::from_static("x-dashscope-sse");
const TEXT_PATH: &str = "/services/aigc/text-generation/generation";
const MULTIMODAL_PATH: &str = "/services/aigc/multimodal-generation/generation";

/// What the names of models contain that are served at the multimodal path, whatever their messages hold.
const MULTIMODAL: [&str; 11] =
    ["-vl", "qvq", "-audio", "-omni", "-ocr", "-asr", "qwen3.5-", "qwen3.6-", "qwen3.7-", "-livetranslate", "gui-"];

/// Where a field of OpenAI's request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// Under `parameters`, by the same name and with the same value.
    Parameter,
    /// Written by us, from what the head says.
    Ours,
    /// Nowhere: it changes nothing in the answer.
    Nowhere,
}

/// Every field that can be represented. What is not here cannot.
static FIELDS: [(&str, To); 45] = [
    ("model", To::Ours),
    ("messages", To::Ours),
    ("stream", To::Ours),
    ("stream_options", To::Ours),
    ("max_tokens", To::Ours),
    ("max_completion_tokens", To::Ours),
    ("n", To::Ours),
    ("parameters", To::Ours),
    ("modalities", To::Ours),
    ("user", To::Nowhere),
    ("store", To::Nowhere),
    ("metadata", To::Nowhere),
    ("service_tier", To::Nowhere),
    ("safety_identifier", To::Nowhere),
    ("prompt_cache_key", To::Nowhere),
    ("temperature", To::Parameter),
    ("top_p", To::Parameter),
    ("top_k", To::Parameter),
    ("presence_penalty", To::Parameter),
    ("repetition_penalty", To::Parameter),
    ("seed", To::Parameter),
    ("stop", To::Parameter),
    ("logit_bias", To::Parameter),
    ("logprobs", To::Parameter),
    ("top_logprobs", To::Parameter),
    ("tools", To::Parameter),
    ("tool_choice", To::Parameter),
    ("parallel_tool_calls", To::Parameter),
    ("response_format", To::Parameter),
    // DashScope's own, as clients of its compatible mode send them beside OpenAI's.
    ("enable_thinking", To::Parameter),
    ("thinking_budget", To::Parameter),
    ("preserve_thinking", To::Parameter),
    ("enable_search", To::Parameter),
    ("search_options", To::Parameter),
    ("enable_code_interpreter", To::Parameter),
    ("translation_options", To::Parameter),
    ("asr_options", To::Parameter),
    ("ocr_options", To::Parameter),
    ("skill", To::Parameter),
    ("max_input_tokens", To::Parameter),
    ("vl_high_resolution_images", To::Parameter),
    ("vl_enable_image_hw_output", To::Parameter),
    ("min_pixels", To::Parameter),
    ("max_pixels", To::Parameter),
    ("fps", To::Parameter),
];

/// Fields of a request, and of its `parameters`; OpenAI and DashScope have some fifty together.
const FIELDS_MAX: usize = 256;

/// Bytes that are kept of an answer's id, which stands in each of its chunks.
const ID_BYTES_MAX: usize = 64;

/// Parameters that this gateway sets itself.
const OWN_PARAMETERS: [&str; 4] = ["result_format", "incremental_output", "max_tokens", "n"];

fn request(ask: &Ask, permit: &Permit) -> Result<Request<Pieces>, Error> {
    let offer = &permit.offer;
    let (path, body) = translated(&ask.body, &ask.head, ask.clamp, &offer.upstream_model, offer.endpoint.lossy)?;
    let bearer = format!("Bearer {}", permit.account.key.expose());
    let mut request = openai::request_to(path, AUTHORIZATION, &bearer, ask, permit)?;
    let headers = request.headers_mut();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    if ask.head.stream {
        headers.insert(SSE, HeaderValue::from_static("enable"));
    } else {
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    }
    *request.body_mut() = Pieces::new([body.into()]);
    Ok(request)
}

/// The path and the body of the request that DashScope is sent. `head` must have been read from this very body.
///
/// Fails with [`Error::BodyInvalid`], which names what DashScope cannot represent, unless that may be lost.
pub fn translated(
    body: &[u8],
    head: &Head,
    clamp: Option<u64>,
    model: &str,
    lossy: bool,
) -> Result<(&'static str, Vec<u8>), Error> {
    let fields = Fields::read(body).ok_or_else(unreadable)?;
    if fields.count() > FIELDS_MAX {
        return Err(Error::BodyInvalid { param: None, reason: "has too many fields for this model's provider".into() });
    }
    let mut writer = Writer { lossy, multimodal: is_multimodal(model), parameters: Vec::new() };
    let messages = writer.messages(fields.last("messages").ok_or_else(unreadable)?)?;
    for (name, value) in fields.iter() {
        let is_last = fields.last(name).is_some_and(|last| std::ptr::eq(last, value));
        if is_last && !says_nothing(name, value) {
            writer.field(name, value)?;
        }
    }
    writer.set("result_format", "\"message\"");
    if head.stream {
        writer.set("incremental_output", "true");
    }
    if let Some(max_tokens) = clamp.or(head.max_tokens) {
        writer.set("max_tokens", &max_tokens.to_string());
    }
    if head.n > 1 {
        writer.set("n", &head.n.to_string());
    }
    let parameters: Vec<String> =
        writer.parameters.iter().map(|(name, value)| format!("{}:{value}", Value::from(name.as_str()))).collect();
    let body = format!(
        "{{\"model\":{},\"input\":{{\"messages\":[{}]}},\"parameters\":{{{}}}}}",
        Value::from(model),
        messages.join(","),
        parameters.join(",")
    );
    Ok((if writer.multimodal { MULTIMODAL_PATH } else { TEXT_PATH }, body.into_bytes()))
}

fn unreadable() -> Error {
    Error::BodyInvalid { param: None, reason: "cannot be read for this model".into() }
}

fn is_multimodal(model: &str) -> bool {
    let model = model.to_ascii_lowercase();
    MULTIMODAL.iter().any(|part| model.contains(part))
}

/// Whether a field asks for nothing: then it need not be represented.
fn says_nothing(name: &str, value: &RawValue) -> bool {
    match value.get() {
        "null" | "[]" | "{}" | "\"\"" => true,
        // Some parameters of DashScope are true by default.
        "false" | "0" | "0.0" => !FIELDS.iter().any(|(known, to)| *known == name && *to == To::Parameter),
        _ => false,
    }
}

struct Writer {
    lossy: bool,
    /// At the multimodal path, where a content is a list of parts.
    multimodal: bool,
    /// Names and JSON, in the order in which they came.
    parameters: Vec<(String, String)>,
}

impl Writer {
    /// Refuses what cannot be represented; `Ok` where the operator allows it to be left out.
    fn refuse(&self, param: String, reason: &'static str) -> Result<(), Error> {
        if self.lossy { Ok(()) } else { Err(Error::body(param, reason)) }
    }

    fn set(&mut self, name: &str, json: &str) {
        self.parameters.retain(|(known, _)| known != name);
        self.parameters.push((name.to_owned(), json.to_owned()));
    }

    fn field(&mut self, name: &str, value: &RawValue) -> Result<(), Error> {
        const UNKNOWN: &str = "is not known to this model's provider";
        match (FIELDS.iter().find(|(known, _)| *known == name), name) {
            (Some((_, To::Nowhere)), _) => Ok(()),
            (_, "parameters") => self.pass_through(value),
            (_, "modalities") if value.get().contains("audio") => self.refuse(name.to_owned(), UNKNOWN),
            (Some((_, To::Ours)), _) => Ok(()),
            (_, "tool_choice") if value.get() == "\"required\"" => {
                self.refuse(name.to_owned(), "must be auto, none or a function for this model's provider")
            }
            (Some((_, To::Parameter)), _) => {
                self.set(name, value.get());
                Ok(())
            }
            (None, _) => self.refuse(name.to_owned(), UNKNOWN),
        }
    }

    /// `parameters` of the client's own: options of DashScope that no field here is named for.
    fn pass_through(&mut self, value: &RawValue) -> Result<(), Error> {
        let fields = Fields::of(value).filter(|fields| fields.count() <= FIELDS_MAX);
        let fields = fields.ok_or_else(|| Error::body("parameters", "must be an object of at most 256 fields"))?;
        for (name, value) in fields.iter().filter(|(name, _)| !OWN_PARAMETERS.contains(name)) {
            self.set(name, value.get());
        }
        Ok(())
    }

    fn messages(&mut self, messages: &RawValue) -> Result<Vec<String>, Error> {
        let messages: Vec<&RawValue> = serde_json::from_str(messages.get()).map_err(|_| unreadable())?;
        let messages: Option<Vec<Fields>> = messages.into_iter().map(Fields::of).collect();
        let messages = messages.ok_or_else(unreadable)?;
        // A picture anywhere decides for all of them.
        self.multimodal |= messages.iter().any(|message| {
            let parts = message.last("content").map(parts).unwrap_or_default();
            parts.iter().any(|part| !matches!(part.text("type").as_deref(), Some("text" | "refusal")))
        });
        messages.iter().enumerate().map(|(index, message)| self.message(index, message)).collect()
    }

    fn message(&self, index: usize, message: &Fields) -> Result<String, Error> {
        let param = |name: &str| format!("messages[{index}].{name}");
        let mut written: Vec<String> = Vec::new();
        let mut content = None;
        for (name, value) in message.iter() {
            match name {
                "content" => content = Some(value),
                // OpenAI's later name for the same.
                "role" if value.get() == "\"developer\"" => written.push("\"role\":\"system\"".into()),
                "role" | "name" | "tool_call_id" | "tool_calls" | "reasoning_content" | "partial" => {
                    if value.get() != "null" {
                        written.push(format!("\"{name}\":{}", value.get()));
                    }
                }
                // What an answer carried, sent back with it.
                "annotations" | "reasoning" | "reasoning_details" | "id" => {}
                _ if says_nothing(name, value) => {}
                "refusal" => content = content.or(Some(value)),
                _ => self.refuse(param(name), "is not known to this model's provider")?,
            }
        }
        written.push(format!("\"content\":{}", self.content(&param("content"), content)?));
        Ok(format!("{{{}}}", written.join(",")))
    }

    fn content(&self, param: &str, content: Option<&RawValue>) -> Result<String, Error> {
        let content = content.filter(|content| content.get() != "null");
        let text = content.is_none_or(|content| content.get().starts_with('"'));
        let raw = content.map_or("\"\"", RawValue::get);
        if text {
            return Ok(if self.multimodal { format!("[{{\"text\":{raw}}}]") } else { raw.to_owned() });
        }
        let parts = content.map(parts).unwrap_or_default();
        if !self.multimodal {
            let texts: Vec<String> =
                parts.iter().filter_map(|part| part.text("text").or(part.text("refusal"))).collect();
            return Ok(Value::from(texts.join("\n")).to_string());
        }
        let mut written = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let at = |inner: &str| format!("{param}[{index}]{inner}");
            match part_of(part) {
                Some(json) => written.push(json),
                None => self.refuse(at(""), "is a kind of content that this model's provider does not take")?,
            }
        }
        Ok(format!("[{}]", written.join(",")))
    }
}

/// The parts of a content; none where it is a text.
fn parts(content: &RawValue) -> Vec<Fields<'_>> {
    let parts: Vec<&RawValue> = serde_json::from_str(content.get()).unwrap_or_default();
    parts.into_iter().filter_map(Fields::of).collect()
}

/// A part as DashScope has it; `None` where it has none of this kind.
fn part_of(part: &Fields<'_>) -> Option<String> {
    let kind = part.text("type")?;
    let url = |name: &str| {
        let value = part.last(name)?;
        Fields::of(value).map_or(Some(value), |fields| fields.last("url"))
    };
    let (name, value) = match kind.as_str() {
        "text" => ("text", part.last("text")?.get().to_owned()),
        "refusal" => ("text", part.last("refusal")?.get().to_owned()),
        "image_url" => ("image", url("image_url")?.get().to_owned()),
        "video_url" => ("video", url("video_url")?.get().to_owned()),
        "video" => ("video", part.last("video")?.get().to_owned()),
        "input_audio" => {
            let audio = Fields::of(part.last("input_audio")?)?;
            let (data, format) = (audio.text("data")?, audio.text("format").unwrap_or_else(|| "wav".into()));
            let is_url = ["data:", "http:", "https:"].iter().any(|scheme| data.starts_with(scheme));
            let url = if is_url { data } else { format!("data:audio/{format};base64,{data}") };
            ("audio", Value::from(url).to_string())
        }
        _ => return None,
    };
    value.starts_with(['"', '[']).then(|| format!("{{\"{name}\":{value}}}"))
}

/// What DashScope's codes mean, by how they begin: the status that OpenAI gives in such a case.
const CODES: [(&str, u16); 24] = [
    ("InvalidApiKey", 401),
    ("Arrearage", 402),
    ("AccessDenied", 403),
    ("Model.AccessDenied", 403),
    ("Workspace.AccessDenied", 403),
    ("App.AccessDenied", 403),
    ("AllocationQuota", 429),
    ("Throttling", 429),
    ("LimitRequests", 429),
    ("limit_", 429),
    ("insufficient_quota", 429),
    ("ModelNotFound", 404),
    ("model_not_found", 404),
    ("Model.NotFound", 404),
    ("DataInspectionFailed", 400),
    ("data_inspection_failed", 400),
    ("Invalid", 400),
    ("invalid_", 400),
    ("BadRequest", 400),
    ("Unsupported", 400),
    ("RequestTimeOut", 504),
    ("InternalError", 500),
    ("ServiceUnavailable", 503),
    ("ModelServingError", 503),
];

/// An error in OpenAI's shape, with its status; `None` where the body holds none.
fn error_of(status: Option<u16>, body: &[u8]) -> Option<(u16, Value)> {
    let fields: Map<String, Value> = serde_json::from_slice(body).ok()?;
    let text = |name: &str| fields.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let (code, message) = (text("code")?, text("message").unwrap_or_default());
    let known = CODES.iter().find(|(prefix, _)| code.starts_with(prefix)).map(|(_, status)| *status);
    let status = known.or(status.filter(|status| *status != 200)).unwrap_or(502);
    let kind = match status {
        401..=403 => "authentication_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    };
    let is_policy = code.to_ascii_lowercase().replace('_', "").starts_with("datainspection");
    let code = if is_policy { "content_policy_violation" } else { code };
    Some((status, json!({ "error": { "message": message, "type": kind, "param": null, "code": code } })))
}

fn unreadable_result() -> Value {
    let message = "A result of the provider could not be read.";
    json!({ "error": { "message": message, "type": "server_error", "param": null, "code": "unreadable_result" } })
}

fn refusal(status: u16, body: &[u8]) -> (u16, Vec<u8>) {
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    let found = error_of(Some(status), body).or_else(|| {
        // To a request for a stream, errors come as an event of their own.
        let (mut parser, mut at) = (Parser::new(), 0);
        let event = parser.next(body, &mut at).map(|event| event.data.to_vec());
        let event = event.or_else(|| parser.finish().map(|event| event.data.to_vec()))?;
        error_of(Some(status), &event)
    });
    found.map_or_else(|| (status, body.to_vec()), |(status, error)| (status, error.to_string().into_bytes()))
}

fn whole(names: &Names, body: &[u8]) -> Option<Vec<u8>> {
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    let mut answer: Map<String, Value> = serde_json::from_slice(body).ok()?;
    let Some(Value::Object(mut output)) = answer.remove("output") else { return None };
    let mut choices = Vec::new();
    for (position, choice) in choices_of(&mut output).into_iter().enumerate() {
        let Choice { index, mut message, finish, logprobs } = Choice::read(choice, position)?;
        message.insert("role".into(), "assistant".into());
        let calls = message.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
        if calls && message.get("content").and_then(Value::as_str) == Some("") {
            message.insert("content".into(), Value::Null);
        }
        let finish = if calls && finish.as_deref() == Some("stop") { Some("tool_calls".to_owned()) } else { finish };
        choices.push(json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": finish }));
    }
    let mut whole = names.frame("chat.completion", &answer);
    whole.insert("choices".into(), choices.into());
    let usage = answer.get("usage").filter(|usage| usage.is_object());
    whole.insert("usage".into(), usage.map_or(Value::Null, usage_of));
    whole.extend(output.remove("search_info").map(|info| ("search_info".to_owned(), info)));
    Some(Value::Object(whole).to_string().into_bytes())
}

impl Names {
    fn frame(&self, object: &str, answer: &Map<String, Value>) -> Map<String, Value> {
        let id = answer.get("request_id").and_then(Value::as_str).unwrap_or_default();
        let id = &id[..id.floor_char_boundary(ID_BYTES_MAX)];
        let frame = [
            ("id", Value::from(format!("chatcmpl-{id}"))),
            ("object", object.into()),
            ("created", self.created_s.into()),
            ("model", self.model.as_str().into()),
        ];
        frame.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// One choice of an output, in either of its shapes.
struct Choice {
    index: u64,
    message: Map<String, Value>,
    finish: Option<String>,
    logprobs: Value,
}

impl Choice {
    fn read(choice: Value, position: usize) -> Option<Choice> {
        let Value::Object(mut choice) = choice else { return None };
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(position as u64);
        let Value::Object(mut message) = choice.remove("message").unwrap_or_default() else { return None };
        for name in ["content", "reasoning_content"] {
            if let Some(text) = message.get(name).and_then(joined) {
                message.insert(name.to_owned(), text.into());
            }
        }
        let finish = choice.get("finish_reason").and_then(Value::as_str);
        let finish = finish.filter(|reason| !["", "null"].contains(reason)).map(str::to_owned);
        Some(Choice { index, message, finish, logprobs: choice.remove("logprobs").unwrap_or_default() })
    }
}

/// The choices of an output; one made of `text`, where the model knows no messages.
fn choices_of(output: &mut Map<String, Value>) -> Vec<Value> {
    match (output.remove("choices"), output.remove("text")) {
        (Some(Value::Array(choices)), _) => choices,
        (_, Some(text)) => {
            vec![json!({ "message": { "content": text }, "finish_reason": output.remove("finish_reason") })]
        }
        _ => Vec::new(),
    }
}

/// The texts of a list of parts; `None` where it is no list.
fn joined(content: &Value) -> Option<String> {
    let parts = content.as_array()?;
    Some(parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect())
}

/// DashScope's usage under OpenAI's names. A number that is none stays what it is, for the meter to refuse.
fn usage_of(usage: &Value) -> Value {
    let given = |object: &Value, name: &str| object.get(name).filter(|value| !value.is_null()).cloned();
    let detail = |details: &str, name: &str| usage.get(details).and_then(|details| given(details, name));
    let of_input = [
        ("cached_tokens", detail("prompt_tokens_details", "cached_tokens")),
        ("image_tokens", given(usage, "image_tokens").or_else(|| detail("input_tokens_details", "image_tokens"))),
        ("audio_tokens", given(usage, "audio_tokens").or_else(|| detail("input_tokens_details", "audio_tokens"))),
    ];
    let of_output = [
        ("reasoning_tokens", detail("output_tokens_details", "reasoning_tokens")),
        ("audio_tokens", detail("output_tokens_details", "audio_tokens")),
    ];
    let (input, output) = (given(usage, "input_tokens"), given(usage, "output_tokens"));
    let total = given(usage, "total_tokens").or_else(|| {
        let sum = input.as_ref()?.as_u64()?.checked_add(output.as_ref()?.as_u64()?)?;
        Some(sum.into())
    });
    let mut mapped = Map::new();
    mapped.extend(input.map(|tokens| ("prompt_tokens".to_owned(), tokens)));
    mapped.extend(output.map(|tokens| ("completion_tokens".to_owned(), tokens)));
    mapped.extend(total.map(|tokens| ("total_tokens".to_owned(), tokens)));
    for (name, details) in [("prompt_tokens_details", &of_input[..]), ("completion_tokens_details", &of_output[..])] {
        let known = details.iter().filter_map(|(name, tokens)| Some(((*name).to_owned(), tokens.clone()?)));
        let known: Map<String, Value> = known.collect();
        if !known.is_empty() {
            mapped.insert(name.to_owned(), known.into());
        }
    }
    mapped.into()
}

/// More choices are no answer to any request (`n` is bounded by the same number).
const CHOICES_MAX: usize = 128;

/// Translates a stream of results.
#[derive(Debug)]
struct Stream {
    names: Names,
    /// What is known of each choice, by its index.
    choices: Vec<Known>,
    /// The id, and the last usage: cumulative, so the last one counts.
    frame: Map<String, Value>,
    usage: Option<Value>,
    failed: bool,
}

#[derive(Clone, Debug)]
struct Known {
    index: u64,
    finished: bool,
    calls: bool,
}

impl Stream {
    fn new(names: Names) -> Stream {
        Stream { names, choices: Vec::new(), frame: Map::new(), usage: None, failed: false }
    }

    fn chunk(&self, choices: Value, usage: Value, extra: Option<Value>, out: &mut Vec<u8>) {
        let mut chunk = self.frame.clone();
        chunk.insert("choices".into(), choices);
        chunk.insert("usage".into(), usage);
        chunk.extend(extra.map(|info| ("search_info".to_owned(), info)));
        write_event(out, &Value::Object(chunk));
    }

    /// The chunk of one choice; `None` when it says nothing new.
    fn choice(&mut self, choice: Value, position: usize) -> Option<Value> {
        let Choice { index, mut message, finish, logprobs } = Choice::read(choice, position)?;
        let known = self.choices.iter().position(|known| known.index == index);
        let is_new = known.is_none();
        let at = known.unwrap_or(self.choices.len());
        if is_new {
            if self.choices.len() >= CHOICES_MAX {
                return None;
            }
            self.choices.push(Known { index, finished: false, calls: false });
        }
        let known = &mut self.choices[at];
        message.retain(|name, value| match name.as_str() {
            "role" => false,
            "content" | "reasoning_content" => value.as_str().is_some_and(|text| !text.is_empty()),
            _ => !value.is_null(),
        });
        if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
            known.calls |= !calls.is_empty();
            calls.iter_mut().for_each(clean_call);
        }
        let finish = finish.filter(|_| !known.finished);
        known.finished |= finish.is_some();
        let finish = if known.calls && finish.as_deref() == Some("stop") { Some("tool_calls".into()) } else { finish };
        if message.is_empty() && finish.is_none() && !is_new && logprobs.is_null() {
            return None;
        }
        if is_new {
            message.insert("role".into(), "assistant".into());
        }
        let mut choice = json!({ "index": index, "delta": message, "finish_reason": finish });
        if !logprobs.is_null() {
            choice["logprobs"] = logprobs;
        }
        Some(choice)
    }
}

/// A later piece of a call has no id and no name; an empty one would overwrite the first.
fn clean_call(call: &mut Value) {
    let Some(call) = call.as_object_mut() else { return };
    let is_empty = |value: &mut Value| value.as_str() == Some("");
    if call.get_mut("id").is_some_and(is_empty) {
        call.remove("id");
    }
    if let Some(Value::Object(function)) = call.get_mut("function")
        && function.get_mut("name").is_some_and(is_empty)
    {
        function.remove("name");
    }
}

impl Translator for Stream {
    fn event(&mut self, name: &[u8], data: &[u8], out: &mut Vec<u8>) {
        if self.failed {
            return;
        }
        let answer: Option<Map<String, Value>> = serde_json::from_slice(data).ok();
        let answer = answer.filter(|answer| name != b"error" && answer.get("output").is_some_and(Value::is_object));
        // What cannot be read may be a part of the answer: without it the rest must not look whole.
        let Some(mut answer) = answer else {
            self.failed = true;
            return write_event(out, &error_of(None, data).map_or_else(unreadable_result, |(_, error)| error));
        };
        if self.frame.is_empty() {
            self.frame = self.names.frame("chat.completion.chunk", &answer);
        }
        if let Some(usage) = answer.get("usage").filter(|usage| usage.is_object()) {
            self.usage = Some(usage_of(usage));
        }
        let Some(Value::Object(mut output)) = answer.remove("output") else { return };
        let choices = choices_of(&mut output).into_iter().enumerate();
        let choices: Vec<Value> = choices.filter_map(|(position, choice)| self.choice(choice, position)).collect();
        let search = output.remove("search_info").filter(|info| !info.is_null());
        if !choices.is_empty() || search.is_some() {
            self.chunk(choices.into(), Value::Null, search, out);
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        let asked = self.names.n as usize;
        if self.failed || self.choices.len() < asked.max(1) || self.choices.iter().any(|choice| !choice.finished) {
            return;
        }
        if let Some(usage) = self.usage.take() {
            self.chunk(json!([]), usage, None, out);
        }
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(DONE);
        out.extend_from_slice(b"\n\n");
    }
}

fn write_event(out: &mut Vec<u8>, value: &Value) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(value.to_string().as_bytes());
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
#[path = "qianwen_tests.rs"]
mod tests;
