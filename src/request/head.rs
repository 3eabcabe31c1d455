//! What a request says about how to serve it.

use std::borrow::Cow;
use std::ops::Range;

use simd_json::ValueType;
use simd_json::prelude::{TypedValue, ValueAsScalar, ValueIntoString};
use simd_json::tape::{Array, Object, Value};
use smallvec::SmallVec;

use super::api::{self, Api, Form};
use super::form;
use super::splice::{MaxSpan, Spans, UsageSpan, value_span};
use super::tape::{self, Document, whole};
use crate::error::Error;

/// Answers to one prompt. OpenAI's own bound is 128.
pub const N_MAX: u64 = 128;

/// Prompts of one completions or embeddings request: OpenAI's own bound of `input`.
pub const PROMPTS_MAX: usize = 2048;

/// Answers to all prompts of one completions request; each is a lane that is counted apart.
pub const ANSWERS_MAX: u64 = 2048;

/// Bytes of a model's name; the longest known (fine-tuned, with organisation and suffix) are about 100.
pub const MODEL_BYTES_MAX: usize = 256;

/// Bytes of `user`; front ends send an id or a hash, never a text.
pub const USER_BYTES_MAX: usize = 1024;

/// Bytes that are kept of a text which commands and the title catch look at. The longest known title prompt is 2 KiB.
pub const TEXT_BYTES_MAX: usize = 4 * 1024;

/// Bytes that are kept of each message's start.
pub const START_BYTES_MAX: usize = 256;

/// Messages whose start is kept, counted from the end: a title call that is told by any message has a handful.
pub const STARTS_MAX: usize = 32;

/// Kinds of `tools` that are a description in the body. Every other kind is run by the provider, whose findings
/// become part of the prompt.
const OWN_TOOLS: [&str; 2] = ["function", "custom"];

/// Fields that make a provider add text of its own to the prompt: OpenAI, Qwen, OpenRouter, Azure, xAI.
const PROVIDER_TEXT: [&str; 8] = [
    "web_search_options",
    "enable_search",
    "plugins",
    "data_sources",
    "search_parameters",
    "parameters",
    "enable_code_interpreter",
    "skill",
];

/// Fields that decide something. Some parsers take a name in any case for it, so one that differs in case alone is
/// refused.
const DECIDING: [&str; 12] = [
    "model",
    "stream",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stream_options",
    "user",
    "prompt",
    "input",
    "best_of",
    "echo",
];

/// Fields that name further models, which would be answered at the price of the one: OpenRouter, LiteLLM.
const FURTHER_MODELS: [&str; 2] = ["models", "fallbacks"];

/// Qwen-Long's way to put a stored file into a system message.
const FILE_SCHEME: &str = "fileid://";

/// The head of a request. Everything else in the body stays unread.
#[derive(Clone, Debug)]
pub struct Head {
    /// What is called.
    pub api: &'static Api,
    /// 1 to [`MODEL_BYTES_MAX`] bytes.
    pub model: String,
    pub stream: bool,
    /// Whether the client itself asked for `stream_options.include_usage`.
    pub include_usage: bool,
    /// Tokens of output for each of the `n` answers, at least 1: `max_completion_tokens` or `max_tokens`. Where both
    /// are given the smaller counts, since an upstream that obeys either one cannot bill more.
    pub max_tokens: Option<u64>,
    /// Answers that come back: 1 to [`N_MAX`], to each of the prompts where there are several.
    pub n: u32,
    /// Answers that are generated and billed: more than come back where the best of several is asked for.
    pub generated: u32,
    /// How often each prompt comes back in front of an answer to it.
    pub echoes: u32,
    /// At most [`USER_BYTES_MAX`] bytes.
    pub user: Option<String>,
    /// The last message whose role is `user`, wherever it stands; empty where it has no text.
    pub last_user: Option<Text>,
    /// Whether that message is the last of all. A command counts only then: an older one has been answered.
    pub ends_with_user: bool,
    /// The last message whose role is `system` or `developer`.
    pub system: Option<Text>,
    /// The starts of the last messages, for prompts that are told by any of them.
    pub starts: Starts,
    pub prompt: PromptShape,
    pub(super) spans: Spans,
}

impl Head {
    /// Reads the head of a chat request.
    pub fn read(body: &[u8]) -> Result<Head, Error> {
        Head::read_as(&api::CHAT, body)
    }

    /// The head of a form whose fields have been read.
    ///
    /// Fails with [`Error::BodyInvalid`] when it names no model, and the call has none by default.
    pub fn of_form(api: &'static Api, fields: &form::Fields) -> Result<Head, Error> {
        let default = || api.model_default.map(str::to_owned);
        let model = fields.model.clone().or_else(default).ok_or_else(|| Error::body("model", "is required"))?;
        let n = fields.n.unwrap_or(1);
        Ok(Head {
            api,
            model,
            stream: false,
            include_usage: false,
            max_tokens: None,
            n,
            generated: n,
            echoes: 0,
            user: None,
            last_user: None,
            ends_with_user: false,
            system: None,
            starts: Starts::default(),
            prompt: PromptShape { opaque: true, ..PromptShape::default() },
            spans: Spans {
                root: 0,
                root_empty: true,
                model: fields.model_at.clone(),
                usage: UsageSpan::Absent,
                max_tokens: None,
                max_completion_tokens: None,
            },
        })
    }

    /// Reads the head of `body`.
    ///
    /// Fails with [`Error::BodyInvalid`], which names the field and what was expected, and quotes nothing of a prompt.
    /// A field that decides something and is given twice is refused: which of the two counts depends on the parser.
    pub fn read_as(api: &'static Api, body: &[u8]) -> Result<Head, Error> {
        if body.is_empty() {
            return Err(whole("is empty, a JSON object was expected"));
        }
        tape::parse(body, |document| read_root(api, body, document))
    }
}

impl Head {
    /// Whether the body itself names its model, rather than leave it to the provider.
    pub fn names_model(&self) -> bool {
        self.spans.model.is_some()
    }

    /// How often a price per call is charged: for each image that is asked for, once otherwise.
    pub fn units(&self) -> u64 {
        match self.api.form {
            Form::Json | Form::Multipart => u64::from(self.n),
            Form::Chat | Form::Completion | Form::Embedding => 1,
        }
    }

    /// Whether a bound of its output can be lowered.
    pub fn is_clampable(&self) -> bool {
        self.api.is_completion() && self.echoes == 0
    }
}

/// How large a prompt can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptShape {
    /// Upper bound of the bytes of text that can become tokens: the body without the data of images, audio and files.
    pub text_bytes: u64,
    pub messages: u32,
    pub images: u32,
    /// The size cannot be told from the body: file ids, audio, parts of an unknown kind, the provider's own tools.
    pub opaque: bool,
}

/// The start of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text {
    /// At most [`TEXT_BYTES_MAX`] bytes; the text parts of a message, with a line feed between them.
    pub start: String,
    /// Whether the text went on. Such a text is no command.
    pub cut: bool,
}

/// The starts of the last [`STARTS_MAX`] messages, each of at most [`START_BYTES_MAX`] bytes, in one allocation.
#[derive(Clone, Debug, Default)]
pub struct Starts {
    text: String,
    ends: SmallVec<[u16; STARTS_MAX]>,
}

// `ends` are 16 bits wide.
const _: () = assert!(STARTS_MAX * START_BYTES_MAX <= u16::MAX as usize);

impl Starts {
    /// In the order of the conversation; a message without text is an empty string.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.ends.iter().scan(0, |from, &end| {
            let start = &self.text[*from..usize::from(end)];
            *from = usize::from(end);
            Some(start)
        })
    }
}

fn read_root(api: &'static Api, body: &[u8], document: Document<'_, '_>) -> Result<Head, Error> {
    let Some(root) = document.root.as_object() else {
        return Err(whole(format!("must be a JSON object, found {}", kind(document.root))));
    };
    let mut prompt = PromptShape { text_bytes: body.len() as u64, opaque: api.opaque, ..PromptShape::default() };
    let fields = Fields::collect(&document, &root, &mut prompt)?;

    let (model, model_span) = match (fields.model, api.model_default) {
        (None, Some(model)) => (model.to_owned(), None),
        (field, _) => read_model(body, field).map(|(model, span)| (model, Some(span)))?,
    };
    let conversation = match api.form {
        Form::Chat => Conversation::read(&read_messages(fields.messages)?, &mut prompt)?,
        _ => Conversation::default(),
    };
    let n = read_integer(fields.n, N_MAX)?.unwrap_or(1);
    let (answers, generated) = match api.form {
        Form::Completion => {
            let prompts = read_prompts("prompt", fields.prompt)?;
            let best_of = read_integer(fields.best_of, N_MAX)?.unwrap_or(1);
            (answers("n", prompts, n)?, answers("best_of", prompts, best_of.max(n))?)
        }
        Form::Embedding => {
            read_prompts("input", fields.input)?;
            (1, 1)
        }
        _ => (n as u32, n as u32),
    };
    let (include_usage, usage_span) = read_stream_options(body, &document, fields.stream_options)?;
    let max_tokens = read_integer(fields.max_tokens, u64::MAX)?;
    let max_completion_tokens = read_integer(fields.max_completion_tokens, u64::MAX)?;
    Ok(Head {
        api,
        model,
        stream: api.is_completion() && read_flag(fields.stream)?,
        include_usage,
        max_tokens: [max_tokens, max_completion_tokens].into_iter().flatten().min(),
        n: answers,
        generated,
        echoes: if api.form == Form::Completion && read_flag(fields.echo)? { n as u32 } else { 0 },
        user: read_user(fields.user)?,
        ends_with_user: conversation.ends_with_user,
        last_user: conversation.last_user.map(text),
        system: conversation.system.map(text),
        starts: conversation.starts,
        prompt,
        spans: Spans {
            root: body.iter().position(|b| *b == b'{').map_or(0, |brace| brace + 1),
            root_empty: root.is_empty(),
            model: model_span,
            usage: usage_span,
            max_tokens: max_span(body, fields.max_tokens),
            max_completion_tokens: max_span(body, fields.max_completion_tokens),
        },
    })
}

/// A field of the root that decides something.
#[derive(Clone, Copy)]
struct Field<'t, 'i> {
    name: &'static str,
    value: Value<'t, 'i>,
    /// Where its key starts in the body, behind the quote.
    key_at: usize,
}

/// Null says the same as nothing, as OpenAI has it for optional fields.
fn given<'t, 'i>(field: Option<Field<'t, 'i>>) -> Option<Field<'t, 'i>> {
    field.filter(|field| !is_null(field.value))
}

#[derive(Default)]
struct Fields<'t, 'i> {
    model: Option<Field<'t, 'i>>,
    stream: Option<Field<'t, 'i>>,
    messages: Option<Field<'t, 'i>>,
    max_tokens: Option<Field<'t, 'i>>,
    max_completion_tokens: Option<Field<'t, 'i>>,
    n: Option<Field<'t, 'i>>,
    stream_options: Option<Field<'t, 'i>>,
    user: Option<Field<'t, 'i>>,
    prompt: Option<Field<'t, 'i>>,
    input: Option<Field<'t, 'i>>,
    best_of: Option<Field<'t, 'i>>,
    echo: Option<Field<'t, 'i>>,
}

impl<'t, 'i> Fields<'t, 'i> {
    fn collect(
        document: &Document<'t, 'i>,
        root: &Object<'t, 'i>,
        prompt: &mut PromptShape,
    ) -> Result<Fields<'t, 'i>, Error> {
        let mut fields = Fields::default();
        for (key, value) in root.iter() {
            let (name, field) = match key {
                "model" => ("model", &mut fields.model),
                "stream" => ("stream", &mut fields.stream),
                "messages" => ("messages", &mut fields.messages),
                "max_tokens" => ("max_tokens", &mut fields.max_tokens),
                "max_completion_tokens" => ("max_completion_tokens", &mut fields.max_completion_tokens),
                "n" => ("n", &mut fields.n),
                "stream_options" => ("stream_options", &mut fields.stream_options),
                "user" => ("user", &mut fields.user),
                "prompt" => ("prompt", &mut fields.prompt),
                "input" => ("input", &mut fields.input),
                "best_of" => ("best_of", &mut fields.best_of),
                "echo" => ("echo", &mut fields.echo),
                "tools" => {
                    prompt.opaque |= has_foreign_tool(value);
                    continue;
                }
                _ if FURTHER_MODELS.contains(&key) && !is_null(value) => {
                    return Err(Error::body(key.to_owned(), "is not supported: a call is priced by one model"));
                }
                _ => {
                    // Of lower-case ASCII alone it is another name.
                    let may_be = key.bytes().any(|byte| byte.is_ascii_uppercase() || !byte.is_ascii());
                    if may_be && DECIDING.iter().any(|name| is_like(key, name)) {
                        return Err(Error::body(key.to_owned(), "is written in lower case"));
                    }
                    prompt.opaque |= PROVIDER_TEXT.contains(&key) && !is_null(value) && value.as_bool() != Some(false);
                    continue;
                }
            };
            if field.replace(Field { name, value, key_at: document.offset(key) }).is_some() {
                return Err(Error::body(name, "is given twice"));
            }
        }
        Ok(fields)
    }
}

/// Whether a name differs from another in case alone, as Unicode folds it: `ſ` and `K` (the Kelvin sign) fold to ASCII.
fn is_like(key: &str, name: &str) -> bool {
    let folded = |character: char| match character {
        'ſ' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    };
    key.len() <= 2 * name.len() + 8 && key.chars().map(folded).eq(name.chars())
}

fn has_foreign_tool(tools: Value<'_, '_>) -> bool {
    let Some(tools) = tools.as_array() else { return false };
    tools.iter().filter_map(|tool| tool.as_object()).any(|tool| {
        let mut kinds = tool.iter().filter(|(key, _)| *key == "type");
        kinds.any(|(_, kind)| !string(kind).is_some_and(|kind| OWN_TOOLS.contains(&kind)))
    })
}

fn read_model(body: &[u8], field: Option<Field<'_, '_>>) -> Result<(String, Range<usize>), Error> {
    let field = field.ok_or_else(|| Error::body("model", "is required"))?;
    let model = string(field.value).ok_or_else(|| wrong("model", "a string", field.value))?;
    match model.len() {
        0 => Err(Error::body("model", "must not be empty")),
        1..=MODEL_BYTES_MAX => Ok((model.to_owned(), value_span(body, field.key_at))),
        bytes => Err(Error::body("model", format!("must have at most {MODEL_BYTES_MAX} bytes, found {bytes}"))),
    }
}

fn read_flag(field: Option<Field<'_, '_>>) -> Result<bool, Error> {
    given(field)
        .map_or(Ok(false), |field| field.value.as_bool().ok_or_else(|| wrong(field.name, "a boolean", field.value)))
}

fn read_user(field: Option<Field<'_, '_>>) -> Result<Option<String>, Error> {
    let Some(field) = given(field) else { return Ok(None) };
    let user = string(field.value).ok_or_else(|| wrong(field.name, "a string", field.value))?;
    if user.len() > USER_BYTES_MAX {
        let reason = format!("must have at most {USER_BYTES_MAX} bytes, found {}", user.len());
        return Err(Error::body(field.name, reason));
    }
    Ok(Some(user.to_owned()))
}

/// How many prompts there are: a text or an array of token numbers is one, an array of texts or of such arrays several.
fn read_prompts(name: &'static str, field: Option<Field<'_, '_>>) -> Result<usize, Error> {
    let Some(field) = given(field) else {
        return Err(Error::body(name, "is required"));
    };
    let Some(items) = field.value.as_array() else {
        return match string(field.value) {
            Some(_) => Ok(1),
            None => Err(wrong(name, "a string or an array", field.value)),
        };
    };
    let mut numbers = 0;
    for (index, item) in items.iter().enumerate() {
        match item.as_array() {
            _ if string(item).is_some() => {}
            Some(_) => {}
            None if item.as_u64().is_some() => numbers += 1,
            None => {
                let expected = "a string, a token or an array of tokens";
                return Err(wrong(format!("{name}[{index}]"), expected, item));
            }
        }
    }
    match items.len() {
        0 => Err(Error::body(name, "must not be empty")),
        all if all == numbers => Ok(1),
        _ if numbers > 0 => Err(Error::body(name, "must not mix tokens with texts or arrays")),
        several if several > PROMPTS_MAX => {
            Err(Error::body(name, format!("must have at most {PROMPTS_MAX} entries, found {several}")))
        }
        several => Ok(several),
    }
}

/// Answers to all prompts together.
fn answers(name: &'static str, prompts: usize, each: u64) -> Result<u32, Error> {
    let all = each.saturating_mul(prompts as u64);
    if all > ANSWERS_MAX {
        let reason = format!("asks for {all} answers to all prompts together, at most {ANSWERS_MAX} are allowed");
        return Err(Error::body(name, reason));
    }
    Ok(all as u32)
}

/// An integer from 1 to `max`.
fn read_integer(field: Option<Field<'_, '_>>, max: u64) -> Result<Option<u64>, Error> {
    let Some(Field { name, value, .. }) = given(field) else { return Ok(None) };
    if let Some(number) = value.as_u64().filter(|number| (1..=max).contains(number)) {
        return Ok(Some(number));
    }
    let found: Cow<str> = match (value.as_i64(), value.as_u64()) {
        (Some(number), _) => number.to_string().into(),
        (None, Some(number)) => number.to_string().into(),
        (None, None) => kind(value).into(),
    };
    let expected = if max == u64::MAX { "of at least 1".into() } else { format!("from 1 to {max}") };
    Err(Error::body(name, format!("must be an integer {expected}, found {found}")))
}

fn max_span(body: &[u8], field: Option<Field<'_, '_>>) -> Option<MaxSpan> {
    field.map(|field| MaxSpan { value: value_span(body, field.key_at), null: is_null(field.value) })
}

/// Whether usage is asked for, and where to ask for it.
fn read_stream_options(
    body: &[u8],
    document: &Document<'_, '_>,
    field: Option<Field<'_, '_>>,
) -> Result<(bool, UsageSpan), Error> {
    const PARAM: &str = "stream_options.include_usage";
    let Some(field) = field else { return Ok((false, UsageSpan::Absent)) };
    let span = value_span(body, field.key_at);
    if is_null(field.value) {
        return Ok((false, UsageSpan::Null(span)));
    }
    let options = field.value.as_object().ok_or_else(|| wrong(field.name, "an object", field.value))?;
    let mut usages = options.iter().filter(|(key, _)| *key == "include_usage");
    let Some((key, usage)) = usages.next() else {
        return Ok((false, UsageSpan::Object { inside: span.start + 1, empty: options.is_empty() }));
    };
    if usages.next().is_some() {
        return Err(Error::body(PARAM, "is given twice"));
    }
    match usage.as_bool() {
        None if !is_null(usage) => Err(wrong(PARAM, "a boolean", usage)),
        asked => Ok((asked == Some(true), UsageSpan::Value(value_span(body, document.offset(key))))),
    }
}

fn read_messages<'t, 'i>(field: Option<Field<'t, 'i>>) -> Result<Array<'t, 'i>, Error> {
    let field = field.ok_or_else(|| Error::body("messages", "is required"))?;
    let messages = field.value.as_array().ok_or_else(|| wrong("messages", "an array", field.value))?;
    if messages.is_empty() {
        return Err(Error::body("messages", "must not be empty"));
    }
    Ok(messages)
}

/// What is kept of the messages.
#[derive(Default)]
struct Conversation<'t, 'i> {
    last_user: Option<Content<'t, 'i>>,
    system: Option<Content<'t, 'i>>,
    ends_with_user: bool,
    starts: Starts,
}

impl<'t, 'i> Conversation<'t, 'i> {
    fn read(messages: &Array<'t, 'i>, prompt: &mut PromptShape) -> Result<Conversation<'t, 'i>, Error> {
        let mut conversation = Conversation::default();
        let count = messages.len();
        prompt.messages = u32::try_from(count).unwrap_or(u32::MAX);
        for (index, message) in messages.iter().enumerate() {
            let (role, content) = read_message(index, message, prompt)?;
            conversation.ends_with_user = role == "user";
            match role {
                "user" => conversation.last_user = Some(content),
                "system" | "developer" => conversation.system = Some(content),
                _ => {}
            }
            if index + STARTS_MAX >= count {
                let Starts { text, ends } = &mut conversation.starts;
                content.push_start(text, START_BYTES_MAX);
                ends.push(text.len() as u16);
            }
        }
        Ok(conversation)
    }
}

/// Checks a message as far as we rely on it, and adds its parts to the shape of the prompt. Of two equal keys the
/// last counts, as nearly everywhere.
fn read_message<'t, 'i>(
    index: usize,
    message: Value<'t, 'i>,
    prompt: &mut PromptShape,
) -> Result<(&'i str, Content<'t, 'i>), Error> {
    let fields = message.as_object().ok_or_else(|| wrong(format!("messages[{index}]"), "an object", message))?;
    let (mut role, mut content) = (None, Content::Nothing);
    for (key, value) in fields.iter() {
        match key {
            "role" => role = Some(value),
            "content" => content = Content::read(index, value, prompt)?,
            // An earlier spoken answer, by its id.
            "audio" => prompt.opaque |= !is_null(value),
            _ => {}
        }
    }
    let role = role.ok_or_else(|| Error::body(format!("messages[{index}].role"), "is required"))?;
    let role = string(role).ok_or_else(|| wrong(format!("messages[{index}].role"), "a string", role))?;
    Ok((role, content))
}

/// The content of a message.
#[derive(Clone, Copy)]
enum Content<'t, 'i> {
    Nothing,
    Text(&'i str),
    /// An array of objects.
    Parts(Value<'t, 'i>),
}

impl<'t, 'i> Content<'t, 'i> {
    fn read(index: usize, value: Value<'t, 'i>, prompt: &mut PromptShape) -> Result<Content<'t, 'i>, Error> {
        if is_null(value) {
            return Ok(Content::Nothing);
        }
        if let Some(text) = string(value) {
            prompt.opaque |= text.trim_start().starts_with(FILE_SCHEME);
            return Ok(Content::Text(text));
        }
        let param = || format!("messages[{index}].content");
        let parts = value.as_array().ok_or_else(|| wrong(param(), "a string, an array or null", value))?;
        for (part_index, part) in parts.iter().enumerate() {
            let part = part
                .as_object()
                .ok_or_else(|| wrong(format!("messages[{index}].content[{part_index}]"), "an object", part))?;
            weigh_part(&part, prompt);
        }
        Ok(Content::Parts(value))
    }

    /// Appends at most `bytes_max` bytes of the text, and says whether there was more.
    fn push_start(self, out: &mut String, bytes_max: usize) -> bool {
        let parts = match self {
            Content::Nothing => return false,
            Content::Text(text) => return push_cut(out, text, bytes_max),
            Content::Parts(parts) => parts,
        };
        let end_max = out.len() + bytes_max;
        let mut between = "";
        for part in parts.as_array().iter().flat_map(Array::iter).filter_map(|part| part_text(part)) {
            if push_cut(out, between, end_max - out.len()) || push_cut(out, part, end_max - out.len()) {
                return true;
            }
            between = "\n";
        }
        false
    }
}

fn text(content: Content<'_, '_>) -> Text {
    let mut start = String::new();
    let cut = content.push_start(&mut start, TEXT_BYTES_MAX);
    Text { start, cut }
}

fn push_cut(out: &mut String, text: &str, bytes_max: usize) -> bool {
    out.push_str(&text[..text.floor_char_boundary(bytes_max)]);
    text.len() > bytes_max
}

fn part_text<'i>(part: Value<'_, 'i>) -> Option<&'i str> {
    let part = part.as_object()?;
    part.get("type").filter(|kind| string(*kind) == Some("text"))?;
    part.get("text").and_then(string)
}

/// Counts an image, and takes the data of an image, a sound or a file out of the bytes that can become text.
fn weigh_part(part: &Object<'_, '_>, prompt: &mut PromptShape) {
    let mut kinds = part.iter().filter(|(key, _)| *key == "type").map(|(_, kind)| string(kind));
    let (kind, twice) = (kinds.next().flatten(), kinds.next().is_some());
    // With two kinds it depends on the parser which of them counts.
    let data_at = match kind {
        _ if twice => None,
        Some("text" | "refusal") => return,
        Some("image_url") => Some(("image_url", "url")),
        Some("input_audio") => Some(("input_audio", "data")),
        Some("file") => Some(("file", "file_data")),
        _ => None,
    };
    prompt.opaque |= kind != Some("image_url") || twice;
    let Some((outer, inner)) = data_at else { return };
    let mut found = 0;
    for (_, value) in part.iter().filter(|(key, _)| *key == outer) {
        found += 1;
        // The decoded length: it is never more than what the data takes in the body, so the bound stays one.
        prompt.text_bytes -= data_bytes(value, outer, inner);
    }
    if outer == "image_url" {
        prompt.images = prompt.images.saturating_add(found.max(1));
    }
}

fn data_bytes(value: Value<'_, '_>, outer: &str, inner: &str) -> u64 {
    let is_data = |text: &&str| {
        outer == "input_audio" || text.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
    };
    let bytes = |value: Value<'_, '_>| string(value).filter(is_data).map_or(0, |text| text.len() as u64);
    match value.as_object() {
        Some(object) => object.iter().filter(|(key, _)| *key == inner).map(|(_, value)| bytes(value)).sum(),
        // Some upstreams take the URL itself in place of the object.
        None => bytes(value),
    }
}

fn wrong(param: impl Into<Cow<'static, str>>, expected: &str, found: Value<'_, '_>) -> Error {
    Error::body(param, format!("must be {expected}, found {}", kind(found)))
}

fn string<'i>(value: Value<'_, 'i>) -> Option<&'i str> {
    value.into_string()
}

fn is_null(value: Value<'_, '_>) -> bool {
    value.as_null().is_some()
}

fn kind(value: Value<'_, '_>) -> &'static str {
    match value.value_type() {
        ValueType::Null => "null",
        ValueType::Bool => "a boolean",
        ValueType::I64 | ValueType::U64 => "an integer",
        ValueType::String => "a string",
        ValueType::Array => "an array",
        ValueType::Object => "an object",
        _ => "a number",
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::{Edit, splice};
    use super::*;

    const MESSAGES: &str = r#""messages":[{"role":"user","content":"hi"}]"#;

    /// The head of a body with these fields and one message.
    fn with(fields: &str) -> Result<Head, Error> {
        Head::read(format!(r#"{{"model":"m",{fields},{MESSAGES}}}"#).as_bytes())
    }

    /// The head of a body with these messages.
    fn asked(messages: &str) -> Result<Head, Error> {
        Head::read(format!(r#"{{"model":"m","messages":[{messages}]}}"#).as_bytes())
    }

    fn user(content: &str) -> Head {
        asked(&format!(r#"{{"role":"user","content":{content}}}"#)).unwrap()
    }

    fn assert_refused(head: Result<Head, Error>, param: &str, reason: &str) {
        let found = head.unwrap_err();
        assert_eq!(found, Error::body(param.to_owned(), reason.to_owned()));
    }

    #[test]
    fn a_plain_request_has_the_defaults_of_the_api() {
        let head = Head::read(format!(r#"{{"model":"gpt-4o",{MESSAGES}}}"#).as_bytes()).unwrap();
        assert_eq!((head.model.as_str(), head.stream, head.include_usage, head.n), ("gpt-4o", false, false, 1));
        assert_eq!((head.max_tokens, head.user, head.system), (None, None, None));
        assert_eq!(head.last_user, Some(Text { start: "hi".into(), cut: false }));
        assert!(head.ends_with_user);
    }

    #[test]
    fn null_says_the_same_as_nothing() {
        let head = with(
            r#""stream":null,"n":null,"max_tokens":null,"max_completion_tokens":null,"stream_options":null,"user":null"#,
        );
        let head = head.unwrap();
        assert_eq!(
            (head.stream, head.n, head.max_tokens, head.user, head.include_usage),
            (false, 1, None, None, false)
        );
        assert!(!with(r#""stream_options":{"include_usage":null}"#).unwrap().include_usage);
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        let reason = |body: &str| Head::read(body.as_bytes()).unwrap_err().to_string();
        assert_eq!(reason(""), "The body is empty, a JSON object was expected.");
        assert_eq!(reason("[]"), "The body must be a JSON object, found an array.");
        assert_eq!(reason(" null "), "The body must be a JSON object, found null.");
        assert_eq!(reason("1"), "The body must be a JSON object, found an integer.");
    }

    #[test]
    fn the_model_is_a_name() {
        let model = |value: &str| Head::read(format!(r#"{{"model":{value},{MESSAGES}}}"#).as_bytes());
        assert_refused(Head::read(format!("{{{MESSAGES}}}").as_bytes()), "model", "is required");
        assert_refused(model("null"), "model", "must be a string, found null");
        assert_refused(model("7"), "model", "must be a string, found an integer");
        assert_refused(model(r#""""#), "model", "must not be empty");
        assert!(model(&format!(r#""{}""#, "m".repeat(256))).is_ok());
        assert_refused(model(&format!(r#""{}""#, "m".repeat(257))), "model", "must have at most 256 bytes, found 257");
    }

    #[test]
    fn messages_are_a_list_that_is_not_empty() {
        let messages = |value: &str| Head::read(format!(r#"{{"model":"m","messages":{value}}}"#).as_bytes());
        assert_refused(Head::read(br#"{"model":"m"}"#), "messages", "is required");
        assert_refused(messages("null"), "messages", "must be an array, found null");
        assert_refused(messages("{}"), "messages", "must be an array, found an object");
        assert_refused(messages("[]"), "messages", "must not be empty");
    }

    #[test]
    fn a_wrong_message_is_told_by_its_index() {
        let ok = r#"{"role":"user"}"#;
        assert_refused(asked(&format!("{ok},1.5")), "messages[1]", "must be an object, found a number");
        assert_refused(asked(&format!("{ok},{{}}")), "messages[1].role", "is required");
        assert_refused(asked(r#"{"role":null}"#), "messages[0].role", "must be a string, found null");
        assert_refused(
            asked(r#"{"role":"user","content":false}"#),
            "messages[0].content",
            "must be a string, an array or null, found a boolean",
        );
        assert_refused(
            asked(r#"{"role":"user","content":[{},"x"]}"#),
            "messages[0].content[1]",
            "must be an object, found a string",
        );
    }

    #[test]
    fn wrong_types_are_refused_by_name() {
        assert_refused(with(r#""stream":"true""#), "stream", "must be a boolean, found a string");
        assert_refused(with(r#""stream":1"#), "stream", "must be a boolean, found an integer");
        assert_refused(with(r#""user":{}"#), "user", "must be a string, found an object");
        assert_refused(with(r#""stream_options":true"#), "stream_options", "must be an object, found a boolean");
        assert_refused(
            with(r#""stream_options":{"include_usage":1}"#),
            "stream_options.include_usage",
            "must be a boolean, found an integer",
        );
        let long = format!(r#""user":"{}""#, "u".repeat(1025));
        assert_refused(with(&long), "user", "must have at most 1024 bytes, found 1025");
    }

    #[test]
    fn numbers_have_their_bounds() {
        for (n, found) in [("0", "0"), ("129", "129"), ("-1", "-1"), ("1.0", "a number"), ("\"1\"", "a string")] {
            let reason = format!("must be an integer from 1 to 128, found {found}");
            assert_refused(with(&format!(r#""n":{n}"#)), "n", &reason);
        }
        assert_eq!(with(r#""n":128"#).unwrap().n, 128);
        for name in ["max_tokens", "max_completion_tokens"] {
            for (max, found) in [("0", "0"), ("-0", "0"), ("1e3", "a number"), ("18446744073709551616", "a number")] {
                let reason = format!("must be an integer of at least 1, found {found}");
                assert_refused(with(&format!(r#""{name}":{max}"#)), name, &reason);
            }
            assert_eq!(with(&format!(r#""{name}":18446744073709551615"#)).unwrap().max_tokens, Some(u64::MAX));
        }
    }

    #[test]
    fn of_two_bounds_the_smaller_counts_for_the_hold() {
        assert_eq!(with(r#""max_tokens":5,"max_completion_tokens":9"#).unwrap().max_tokens, Some(5));
        assert_eq!(with(r#""max_tokens":9,"max_completion_tokens":5"#).unwrap().max_tokens, Some(5));
        assert_eq!(with(r#""max_tokens":9,"max_completion_tokens":null"#).unwrap().max_tokens, Some(9));
    }

    #[test]
    fn a_field_that_decides_something_may_not_be_given_twice() {
        for (name, value) in [
            ("model", r#""cheap""#),
            ("stream", "true"),
            ("messages", "[]"),
            ("max_tokens", "1"),
            ("max_completion_tokens", "1"),
            ("n", "1"),
            ("stream_options", "{}"),
            ("user", r#""u""#),
        ] {
            let again = format!(r#""{name}":{value},"x":0,"{name}":{value}"#);
            assert_refused(with(&again), name, "is given twice");
            let escaped = format!(r#""{name}":null,"\u{:04x}{}":{value}"#, name.as_bytes()[0], &name[1..]);
            assert_refused(with(&escaped), name, "is given twice");
        }
        let twice = r#""stream_options":{"include_usage":true,"include\u005fusage":false}"#;
        assert_refused(with(twice), "stream_options.include_usage", "is given twice");
    }

    #[test]
    fn a_field_that_another_parser_takes_for_one_that_decides_is_refused() {
        for name in ["Model", "MODEL", "N", "Max_Tokens", "me\u{17f}\u{17f}ages", "models", "fallbacks"] {
            let refused = with(&format!(r#""{name}":["dear"]"#)).unwrap_err();
            assert!(matches!(&refused, Error::BodyInvalid { param: Some(param), .. } if param == name), "{refused:?}");
        }
        assert!(with(r#""models":null,"modelx":1,"nn":2"#).is_ok());
        assert!(with(r#""parameters":{"enable_search":true}"#).unwrap().prompt.opaque);
    }

    #[test]
    fn a_field_that_nobody_reads_may_be_given_twice() {
        assert!(with(r#""x":1,"x":2,"stream_options":{"y":1,"y":2}"#).is_ok());
    }

    #[test]
    fn an_escaped_key_is_the_key_that_it_decodes_to() {
        let body = r#"{"mod\u0065l":"m\u00e9","str\u0065am":true,"m\u0065ssages":[{"rol\u0065":"us\u0065r","\u0063ontent":"a\nb"}]}"#;
        let head = Head::read(body.as_bytes()).unwrap();
        assert_eq!((head.model.as_str(), head.stream), ("mé", true));
        assert_eq!(head.last_user.unwrap().start, "a\nb");
    }

    #[test]
    fn numbers_that_nobody_reads_may_be_as_long_as_they_like() {
        assert!(with(r#""seed":123456789012345678901234567890,"logit_bias":{"1":-0,"2":1E-400,"3":0.10e+5}"#).is_ok());
    }

    #[test]
    fn unknown_fields_null_content_and_tool_calls_in_history_survive_as_they_are() {
        let body = r#"{ "tool_choice" : {"type":"function","function":{"name":"f"}}, "response_format":{"type":"json_object"},
            "stop":["a","\u0062"], "seed":12345678901234567890123, "temperature":0.10, "model":"gpt-4o", "logprobs":null,
            "messages":[
              {"role":"user","content":"weather?"},
              {"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{\"a\": 1}"}}],"reasoning_content":"…"},
              {"role":"tool","tool_call_id":"c1","content":"{\"t\":\"\\u00e9\"}"},
              {"role":"assistant","tool_calls":[]}
            ], "stream":true}"#;
        let bytes = Bytes::from(body);
        let head = Head::read(&bytes).unwrap();
        assert_eq!((head.ends_with_user, head.prompt.messages, head.prompt.opaque), (false, 4, false));
        let edited = splice(&bytes, &head, &[Edit::Model("mapped"), Edit::IncludeUsage]).to_bytes();
        let expected = body.replace(r#""model":"gpt-4o""#, r#""model":"mapped""#).replacen(
            '{',
            r#"{"stream_options":{"include_usage":true},"#,
            1,
        );
        assert_eq!(edited, expected);
    }

    #[test]
    fn only_the_last_message_can_be_a_command() {
        let head = asked(r#"{"role":"user","content":"/price gpt"},{"role":"assistant","content":"0.1"}"#).unwrap();
        assert_eq!((head.last_user.unwrap().start.as_str(), head.ends_with_user), ("/price gpt", false));
        let head = asked(r#"{"role":"user","content":"/price gpt"},{"role":"user","content":"thanks"}"#).unwrap();
        assert_eq!((head.last_user.unwrap().start.as_str(), head.ends_with_user), ("thanks", true));
    }

    #[test]
    fn the_text_of_parts_is_joined_by_lines() {
        let head = user(
            r#"[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"https://x/y.png"}},{"text":"b","type":"text"}]"#,
        );
        assert_eq!(head.last_user, Some(Text { start: "a\nb".into(), cut: false }));
        assert_eq!(user("[]").last_user, Some(Text::default()));
        assert_eq!(user("null").last_user, Some(Text::default()));
    }

    #[test]
    fn a_long_text_is_kept_up_to_the_bound_and_marked() {
        let fits = "x".repeat(TEXT_BYTES_MAX);
        assert!(!user(&format!(r#""{fits}""#)).last_user.unwrap().cut);
        let text = user(&format!(r#""é{fits}""#)).last_user.unwrap();
        assert_eq!((text.start.len(), text.cut), (TEXT_BYTES_MAX, true));
        // Never within a character, and over the parts together.
        let text = user(&format!(r#"[{{"type":"text","text":"{}"}},{{"type":"text","text":"é"}}]"#, &fits[2..]));
        let text = text.last_user.unwrap();
        assert_eq!((text.start.len(), text.cut), (TEXT_BYTES_MAX - 1, true));
        let text = user(&format!(r#"[{{"type":"text","text":"{fits}"}},{{"type":"text","text":"b"}}]"#));
        assert!(text.last_user.unwrap().cut);
    }

    #[test]
    fn the_system_text_is_that_of_the_last_system_or_developer_message() {
        let head = asked(
            r#"{"role":"system","content":"a"},{"role":"developer","content":"b"},{"role":"user","content":"c"}"#,
        );
        assert_eq!(head.unwrap().system.unwrap().start, "b");
    }

    #[test]
    fn the_starts_are_those_of_the_last_messages() {
        let long = "é".repeat(START_BYTES_MAX);
        let head =
            asked(&format!(r#"{{"role":"user","content":"{long}"}},{{"role":"tool"}},{{"role":"x","content":"z"}}"#));
        let head = head.unwrap();
        let starts: Vec<&str> = head.starts.iter().collect();
        assert_eq!(starts, [&long[..START_BYTES_MAX], "", "z"]);
        let many: Vec<String> = (0..100).map(|i| format!(r#"{{"role":"user","content":"{i}"}}"#)).collect();
        let head = asked(&many.join(",")).unwrap();
        let starts: Vec<&str> = head.starts.iter().collect();
        assert_eq!((starts.len(), starts[0], starts[31]), (STARTS_MAX, "68", "99"));
    }

    #[test]
    fn the_data_of_an_image_is_not_text() {
        let data = format!("data:image/png;base64,{}", "A".repeat(100_000));
        for image in [format!(r#"{{"url":"{data}","detail":"low"}}"#), format!(r#""{data}""#)] {
            let content = format!(r#"[{{"type":"image_url","image_url":{image}}},{{"type":"text","text":"what?"}}]"#);
            let prompt = user(&content).prompt;
            assert_eq!((prompt.images, prompt.opaque), (1, false));
            assert!(prompt.text_bytes < 300, "{prompt:?}");
        }
        let sound = user(&format!(r#"[{{"type":"input_audio","input_audio":{{"data":"{data}"}}}}]"#)).prompt;
        assert!(sound.opaque && sound.text_bytes < 300);
    }

    #[test]
    fn text_that_looks_like_data_stays_text() {
        let data = format!("data:image/png;base64,{}", "A".repeat(1000));
        assert!(user(&format!(r#""{data}""#)).prompt.text_bytes > 1000);
        let text = format!(r#"[{{"type":"text","text":"{data}","image_url":{{"url":"{data}"}}}}]"#);
        assert!(user(&text).prompt.text_bytes > 2000);
        let twice = format!(r#"[{{"type":"image_url","type":"text","text":"x","image_url":{{"url":"{data}"}}}}]"#);
        let prompt = user(&twice).prompt;
        assert!(prompt.opaque && prompt.text_bytes > 1000);
        assert!(user(r#"[{"type":"image_url","image_url":{"url":"https://x/y"}}]"#).prompt.text_bytes > 90);
    }

    #[test]
    fn what_the_provider_adds_by_itself_makes_a_prompt_opaque() {
        for part in [r#"{"type":"file","file":{"file_id":"f"}}"#, r#"{"type":"video"}"#, r#"{"text":"x"}"#] {
            assert!(user(&format!("[{part}]")).prompt.opaque, "{part}");
        }
        assert!(asked(r#"{"role":"system","content":"fileid://file-1"}"#).unwrap().prompt.opaque);
        assert!(asked(r#"{"role":"assistant","audio":{"id":"a"}}"#).unwrap().prompt.opaque);
        for fields in [r#""tools":[{"type":"web_search"}]"#, r#""web_search_options":{}"#, r#""enable_search":true"#] {
            assert!(with(fields).unwrap().prompt.opaque, "{fields}");
        }
        for fields in [
            r#""tools":[{"type":"function","function":{}},{"type":"custom"}]"#,
            r#""tools":null,"web_search_options":null,"enable_search":false"#,
            r#""tools":[7],"tool_choice":"auto""#,
        ] {
            assert!(!with(fields).unwrap().prompt.opaque, "{fields}");
        }
        let parts = r#"[{"type":"text","text":"x"},{"type":"refusal","refusal":"no"}]"#;
        assert!(!user(parts).prompt.opaque);
    }
}
