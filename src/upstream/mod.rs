//! Speaks each provider's dialect, and tries accounts until one answers.
//!
//! A provider is one file and one row of [`ADAPTERS`]. Another account is tried only before content: until then nothing
//! of the answer has reached the client.

mod azure;
mod client;
pub mod demo;
mod frames;
pub mod openai;
pub mod qianwen;
pub mod translate;
mod wakes;
mod whole;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Request, Response};
use tokio::time::error::Elapsed;

pub use client::{Broken, Client, Pieces, Rest, Source, Stopped};
pub use frames::{Editing, Frame, Frames, Place};
use translate::{Names, Translated, Translation};
pub use whole::Whole;

use crate::catalog::{Model, Offer};
use crate::config::{Retry, UpstreamBounds};
use crate::error::Error;
use crate::pool::{Permit, Pool};
use crate::request::{Api, Form, Head};
use crate::store::now_ms;

/// A provider's dialect.
#[derive(Debug)]
pub struct Adapter {
    pub dialect: &'static str,
    /// What can be called in it.
    pub forms: &'static [Form],
    /// Its endpoints need no account of the operator's.
    pub keyless: bool,
    via: Via,
}

/// How a dialect's answers are had.
#[derive(Debug)]
enum Via {
    /// From a request over HTTP, whose answer is in OpenAI's shape.
    Http(fn(&Ask, &Permit) -> Result<Request<Pieces>, Error>),
    /// From a request over HTTP, whose answer is made into OpenAI's shape.
    Translated(fn(&Ask, &Permit) -> Result<Request<Pieces>, Error>, Translation),
    /// From this process.
    Local(fn(&Ask) -> demo::Local),
}

/// Every dialect.
pub static ADAPTERS: [&Adapter; 4] = [&openai::ADAPTER, &azure::ADAPTER, &qianwen::ADAPTER, &demo::ADAPTER];

/// The names of all dialects, for the configuration.
pub fn dialects() -> Vec<&'static str> {
    ADAPTERS.iter().map(|adapter| adapter.dialect).collect()
}

/// Whether a dialect's endpoints need no account of the operator's.
pub fn is_keyless(dialect: &str) -> bool {
    ADAPTERS.iter().any(|adapter| adapter.dialect == dialect && adapter.keyless)
}

/// Whether an endpoint that serves the model speaks a dialect in which `api` can be called.
pub fn serves(model: &Model, api: &Api) -> bool {
    model.offers.iter().any(|offer| is_suited(offer, api))
}

fn is_suited(offer: &Offer, api: &Api) -> bool {
    adapter(&offer.endpoint.dialect).is_some_and(|found| found.forms.contains(&api.form))
}

/// The model with those offers alone at which `api` can be called; nearly always the model itself.
fn suited(model: &Arc<Model>, api: &Api) -> Arc<Model> {
    if model.offers.iter().all(|offer| is_suited(offer, api)) {
        return model.clone();
    }
    let mut suited = Model::clone(model);
    suited.offers.retain(|offer| is_suited(offer, api));
    Arc::new(suited)
}

fn adapter(dialect: &str) -> Option<&'static Adapter> {
    ADAPTERS.into_iter().find(|adapter| adapter.dialect == dialect)
}

/// What is asked of an upstream.
#[derive(Debug)]
pub struct Ask {
    pub model: Arc<Model>,
    pub head: Box<Head>,
    pub body: Bytes,
    /// What `max_tokens` has to be lowered to.
    pub clamp: Option<u64>,
    pub user_id: i64,
    /// The body is a form, of which `body` is the beginning.
    pub upload: Option<Upload>,
}

impl Ask {
    /// What is the same in all chunks of a translated answer.
    fn names(&self) -> Names {
        Names { model: self.head.model.clone(), created_s: now_ms() / 1000, n: self.head.n }
    }
}

/// A form on its way.
#[derive(Debug)]
pub struct Upload {
    pub boundary: String,
    /// What is still arriving, until a try takes it.
    rest: Mutex<Option<Rest>>,
    /// It is not all here: a try that sends it is the only one.
    once: bool,
    /// Why the rest stopped coming, once it has: the client's own fault.
    failure: Arc<OnceLock<Error>>,
}

impl Upload {
    pub fn new(boundary: String, rest: Option<Rest>, failure: Arc<OnceLock<Error>>) -> Upload {
        Upload { boundary, once: rest.is_some(), rest: Mutex::new(rest), failure }
    }

    fn take_rest(&self) -> Option<Rest> {
        self.rest.lock().expect("no holder of this lock panics").take()
    }

    /// Its rest has been sent, at least in part, and cannot be sent again.
    fn is_sent(&self) -> bool {
        self.once && self.rest.lock().expect("no holder of this lock panics").is_none()
    }
}

/// An answer that has begun (a stream) or is whole.
#[derive(Debug)]
pub enum Answer {
    Stream(Box<Frames>),
    Whole(Whole),
    /// No completion and no JSON: sound, a text, events. It is passed on as it comes.
    Other(Box<Other>),
}

/// An answer that is passed on as it comes.
#[derive(Debug)]
pub struct Other {
    pub content_type: Option<HeaderValue>,
    /// Bytes that are still to come, where its head said so.
    pub left: Option<u64>,
    pub source: Source,
    /// Given back when the connection is idle again, or closed.
    pub permit: Permit,
}

/// Asks upstreams.
#[derive(Debug)]
pub struct Upstream {
    client: Arc<Client>,
    pool: Arc<Pool>,
    bounds: UpstreamBounds,
    retry: Retry,
}

/// A pause for an account whose provider said "too many" without saying for how long.
const REST_DEFAULT: Duration = Duration::from_secs(2);
/// How long a refusal's body is waited for, and what is read of it.
const REFUSAL_MAX: Duration = Duration::from_secs(2);
const REFUSAL_BYTES_MAX: usize = 64 << 10;

/// 401, 402, 403, or what says the same in a stream.
const REFUSED_ACCOUNT: Error = Error::UpstreamFailed { reason: "it refused our account" };

/// A try that failed: what the client is told if it was the last, and whether another account may do better.
struct Failure {
    error: Error,
    again: bool,
    /// The account is not to be used for so long.
    rest: Option<Duration>,
}

impl Upstream {
    pub fn new(client: Arc<Client>, pool: Arc<Pool>, bounds: UpstreamBounds, retry: Retry) -> Upstream {
        Upstream { client, pool, bounds, retry }
    }

    /// Closes idle connections that are too old to be used again.
    pub fn sweep(&self) {
        self.client.sweep();
    }

    /// Silence after which a stream counts as dead.
    pub fn silence_max(&self) -> Duration {
        Duration::from_secs(self.bounds.silence_timeout_s)
    }

    /// The longest that an answer may take in all.
    pub fn total_max(&self) -> Duration {
        Duration::from_secs(self.bounds.total_timeout_s)
    }

    /// Tries accounts, each at most once, until one has an answer: for a stream, until its first content has come.
    ///
    /// `called` is told of every try before it is made.
    pub async fn open(&self, ask: &Ask, mut called: impl FnMut(&Permit)) -> Result<Answer, Error> {
        let model = suited(&ask.model, ask.head.api);
        let deadline = Instant::now() + Duration::from_secs(self.retry.budget_s);
        let waiting = self.pool.deadline(); // one for all tries: a client's own patience does not grow with them
        let mut tried = Vec::new();
        let mut last: Option<Error> = None;
        for _ in 0..self.retry.tries {
            let permit = match self.pool.permit(&model, ask.user_id, &tried, waiting).await {
                Ok(permit) => permit,
                // No further account: what the last one said is the better answer.
                Err(error) => return Err(last.unwrap_or(error)),
            };
            called(&permit);
            let account = permit.account.clone();
            tried.push(account.clone());
            let failure = match self.try_once(ask, permit).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let row = failure.error.row().name;
            tracing::warn!(account = account.name, error = row, again = failure.again, "a try failed");
            if let Some(rest) = failure.rest {
                self.pool.rest(&account, rest);
            }
            if !failure.again || Instant::now() >= deadline || ask.upload.as_ref().is_some_and(Upload::is_sent) {
                return Err(failure.error);
            }
            last = Some(failure.error);
        }
        Err(last.unwrap_or(Error::Internal))
    }

    async fn try_once(&self, ask: &Ask, permit: Permit) -> Result<Answer, Failure> {
        let adapter = adapter(&permit.offer.endpoint.dialect).ok_or(Failure::last(Error::Internal))?;
        let response = match &adapter.via {
            Via::Http(request) | Via::Translated(request, _) => {
                let make = || request(ask, &permit).map(|request| request.map(Box::new));
                self.send(ask, make().map_err(Failure::of_request)?, || make().ok()).await?
            }
            Via::Local(answer) => Response::new(Source::Local(answer(ask))),
        };
        let translation = match &adapter.via {
            Via::Translated(_, translation) => Some(translation),
            Via::Http(_) | Via::Local(_) => None,
        };
        if response.status() != 200 {
            return Err(self.refused(ask, &permit, translation, response).await);
        }
        let encoding = response.headers().get(CONTENT_ENCODING).map(|encoding| encoding.as_bytes());
        if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
            return Err(Failure::elsewhere(Error::UpstreamFailed { reason: "its answer is compressed" }));
        }
        match ask.head.stream {
            true => self.stream(ask, permit, translation, response).await,
            false if ask.head.api.is_measured() || is_json(response.headers()) => {
                self.whole(ask, permit, translation, response).await
            }
            false => Ok(other(permit, response)),
        }
    }

    async fn send(
        &self,
        ask: &Ask,
        mut request: Request<Box<Pieces>>,
        again: impl FnOnce() -> Option<Request<Box<Pieces>>>,
    ) -> Result<Response<Source>, Failure> {
        let first_byte_s =
            if ask.head.stream { self.bounds.first_byte_timeout_s } else { self.bounds.answer_timeout_s };
        if let Some(rest) = ask.upload.as_ref().and_then(Upload::take_rest) {
            request.body_mut().add_rest(rest);
        }
        let sent = self.client.send(request, again, Duration::from_secs(first_byte_s)).await;
        let failed = sent.map_err(|broken| match broken {
            Broken::Connect => Failure::elsewhere(Error::UpstreamFailed { reason: "it cannot be reached" }),
            Broken::NoAnswer => Failure::elsewhere(Error::UpstreamFailed { reason: "it closed the connection" }),
            Broken::Cut => Failure::elsewhere(Error::UpstreamFailed { reason: "its answer is not HTTP" }),
            // It may be billed already.
            Broken::FirstByte => Failure {
                error: Error::UpstreamTimeout { reason: "no first byte" },
                again: self.retry.retry_after_timeout,
                rest: None,
            },
        });
        failed.map_err(|failure| match ask.upload.as_ref().and_then(|upload| upload.failure.get()) {
            Some(error) => Failure::last(error.clone()),
            None => failure,
        })
    }

    async fn stream(
        &self,
        ask: &Ask,
        permit: Permit,
        translation: Option<&Translation>,
        response: Response<Source>,
    ) -> Result<Answer, Failure> {
        let local = matches!(response.body(), Source::Local(_));
        let kind = response.headers().get(CONTENT_TYPE).map(|kind| kind.as_bytes().to_ascii_lowercase());
        if !local && kind.is_some_and(|kind| !kind.starts_with(b"text/event-stream")) {
            return Err(Failure::elsewhere(Error::UpstreamFailed { reason: "it answered without a stream" }));
        }
        let source = match translation {
            Some(translation) => {
                let translator = (translation.stream)(ask.names());
                Source::Translated(Box::new(Translated::new(response.into_body(), translator)))
            }
            None => response.into_body(),
        };
        let mapped = translation.is_none() && permit.offer.upstream_model != ask.head.model;
        let editing = Editing { model: ask.head.model.clone(), mapped, keep_usage: ask.head.include_usage };
        let mut frames = Box::new(Frames::new(source, permit, ask.model.vocabulary, ask.head.n, editing));
        let begun = tokio::time::timeout(self.silence_max(), frames.until_content()).await;
        match begun {
            Ok(Ok(())) => Ok(Answer::Stream(frames)),
            Ok(Err(refusal)) => {
                let reason = match refusal {
                    frames::Refusal::Error(error) => return Err(Failure::in_stream(error)),
                    frames::Refusal::Empty => "its stream ended without an answer",
                    frames::Refusal::Broken => "its stream broke off before an answer",
                };
                Err(Failure::elsewhere(Error::UpstreamFailed { reason }))
            }
            Err(_) => Err(Failure {
                error: Error::UpstreamTimeout { reason: "no content" },
                again: self.retry.retry_after_timeout,
                rest: None,
            }),
        }
    }

    async fn whole(
        &self,
        ask: &Ask,
        permit: Permit,
        translation: Option<&Translation>,
        response: Response<Source>,
    ) -> Result<Answer, Failure> {
        let mut body = self.read(response.into_body(), self.bounds.answer_bytes_max).await?;
        if let Some(translation) = translation {
            // An answer with an error in it stays one.
            let error = |body: &Bytes| (translation.refusal)(200, body).1.into();
            body = (translation.whole)(&ask.names(), &body).map_or_else(|| error(&body), Bytes::from);
        }
        if let Some(error) = ask.upload.as_ref().and_then(|upload| upload.failure.get()) {
            return Err(Failure::last(error.clone())); // an early answer to a form that never came whole
        }
        let mapped = translation.is_none() && permit.offer.upstream_model != ask.head.model;
        let calibration_micro = permit.offer.endpoint.calibration_micro;
        Whole::read(
            body,
            ask.head.api,
            ask.model.vocabulary,
            calibration_micro,
            mapped.then_some(ask.head.model.as_str()),
        )
        .map(Answer::Whole)
        .ok_or_else(|| Failure::elsewhere(Error::UpstreamFailed { reason: "its answer is no completion" }))
    }

    /// Reads a body up to a bound, without a copy where it came in one piece.
    async fn read(&self, mut source: Source, bytes_max: usize) -> Result<Bytes, Failure> {
        let silent = |_| Failure {
            error: Error::UpstreamTimeout { reason: "it fell silent" },
            again: self.retry.retry_after_timeout,
            rest: None,
        };
        let mut pieces: Vec<Bytes> = Vec::new();
        let mut length = 0;
        while let Some(chunk) = timely(self.silence_max(), source.chunk()).await.map_err(silent)? {
            let chunk =
                chunk.map_err(|_| Failure::elsewhere(Error::UpstreamFailed { reason: "its answer broke off" }))?;
            length += chunk.len();
            if length > bytes_max {
                return Err(Failure::last(Error::UpstreamFailed { reason: "its answer is too large" }));
            }
            pieces.push(chunk);
        }
        Ok(if pieces.len() == 1 { pieces.swap_remove(0) } else { pieces.concat().into() })
    }

    /// Tells apart what the request, the account and the provider are to blame for.
    async fn refused(
        &self,
        ask: &Ask,
        permit: &Permit,
        translation: Option<&Translation>,
        response: Response<Source>,
    ) -> Failure {
        let status = response.status().as_u16();
        let retry_after = retry_after(response.headers());
        // Read to its end, so that the connection can be used again; what does not come soon is not worth the wait.
        let reading = tokio::time::timeout(REFUSAL_MAX, self.read(response.into_body(), REFUSAL_BYTES_MAX)).await;
        let body = reading.ok().and_then(Result::ok).unwrap_or_default();
        let (status, body) = match translation {
            Some(translation) => (translation.refusal)(status, &body),
            None => (status, body.into()),
        };
        match status {
            400 | 404 | 413 | 422 => Failure::last(cleaned(status, &body, &ask.head.model, permit)),
            401..=403 => {
                Failure { error: REFUSED_ACCOUNT, again: true, rest: Some(retry_after.unwrap_or(REST_DEFAULT)) }
            }
            429 => {
                let rest = retry_after.unwrap_or(REST_DEFAULT);
                Failure {
                    error: Error::UpstreamBusy { retry_after_s: rest.as_secs().max(1) },
                    again: true,
                    rest: Some(rest),
                }
            }
            408 | 409 | 500.. => Failure {
                error: Error::UpstreamFailed { reason: "it answered with a server error" },
                again: true,
                rest: retry_after,
            },
            _ => Failure::last(Error::UpstreamFailed { reason: "it answered with an unexpected status" }),
        }
    }
}

impl Failure {
    fn elsewhere(error: Error) -> Failure {
        Failure { error, again: true, rest: None }
    }

    /// A request that could not be made: the client's own where it says so.
    fn of_request(error: Error) -> Failure {
        if matches!(error, Error::BodyInvalid { .. }) { Failure::last(error) } else { Failure::elsewhere(error) }
    }

    /// An error that came where a stream's content was awaited.
    fn in_stream(error: Error) -> Failure {
        match error {
            Error::UpstreamRefused { .. } => Failure::last(error),
            Error::UpstreamBusy { .. } | REFUSED_ACCOUNT => Failure { error, again: true, rest: Some(REST_DEFAULT) },
            _ => Failure::elsewhere(error),
        }
    }

    fn last(error: Error) -> Failure {
        Failure { error, again: false, rest: None }
    }
}

/// A timeout that looks at no clock where the future is ready at once, as what has been read already is.
async fn timely<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    match poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => tokio::time::timeout(limit, future).await,
    }
}

fn other(permit: Permit, response: Response<Source>) -> Answer {
    let header = |name| response.headers().get(name);
    let left = header(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.trim().parse().ok());
    let content_type = header(CONTENT_TYPE).cloned();
    Answer::Other(Box::new(Other { content_type, left, source: response.into_body(), permit }))
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes().to_ascii_lowercase());
    kind.is_some_and(|kind| kind.starts_with(b"application/json"))
}

/// Seconds of `Retry-After`, or milliseconds of `retry-after-ms`; a date is not worth a parser for a pause.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    let seconds = number("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| number(RETRY_AFTER.as_str()))?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// What is kept of a provider's message.
const MESSAGE_BYTES_MAX: usize = 2048;

/// A provider's refusal of the request itself, without our account's key and organisation, and with the client's name for
/// the model.
fn cleaned(status: u16, body: &[u8], model: &str, permit: &Permit) -> Error {
    let parsed: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let error = parsed.get("error").unwrap_or(&parsed);
    let text = |name: &str| match error.get(name) {
        Some(serde_json::Value::String(text)) => Some(clean(text, model, permit)),
        Some(serde_json::Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    // Not everybody has OpenAI's shape: then what there is says more than we could.
    let as_it_is = || match error.as_str() {
        Some(text) => clean(text, model, permit),
        None => clean(String::from_utf8_lossy(body).trim(), model, permit),
    };
    let message = text("message").unwrap_or_else(as_it_is);
    Error::UpstreamRefused {
        status,
        kind: text("type").unwrap_or_else(|| "invalid_request_error".into()),
        code: text("code"),
        param: text("param"),
        message: if message.is_empty() {
            format!("The provider refused the request with status {status}.")
        } else {
            message
        },
    }
}

/// An error that a provider sent within a stream, after a status of 200: the request's own fault where it says so.
fn error_in_stream(data: &[u8], model: &str, permit: &Permit) -> Error {
    let refused = cleaned(400, data, model, permit);
    let Error::UpstreamRefused { kind, code, .. } = &refused else { return refused };
    let codes: [&str; 5] = ["400", "404", "413", "422", "context_length_exceeded"];
    let is_request = kind == "invalid_request_error"
        && serde_json::from_slice::<serde_json::Value>(data)
            .is_ok_and(|parsed| parsed["error"]["type"] == "invalid_request_error");
    let code = code.as_deref();
    if is_request || code.is_some_and(|code| codes.contains(&code)) {
        return refused;
    }
    if kind.starts_with("rate_limit") || matches!(code, Some("429" | "rate_limit_exceeded")) {
        return Error::UpstreamBusy { retry_after_s: REST_DEFAULT.as_secs() };
    }
    if kind == "authentication_error" || matches!(code, Some("401" | "402" | "403" | "invalid_api_key")) {
        return REFUSED_ACCOUNT;
    }
    Error::UpstreamFailed { reason: "its stream carried an error" }
}

fn clean(text: &str, model: &str, permit: &Permit) -> String {
    let end = text.floor_char_boundary(MESSAGE_BYTES_MAX);
    let mut text = text[..end].to_owned();
    let key = permit.account.key.expose();
    if !key.is_empty() {
        text = text.replace(key, "***");
    }
    let mapped = &permit.offer.upstream_model;
    if mapped != model {
        text = text.replace(mapped.as_str(), model);
    }
    without_words(&text, &["org-", "proj_", "sk-"])
}

/// Masks words that begin with one of `marks`: organisations, projects and masked keys in a provider's message.
fn without_words(text: &str, marks: &[&str]) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '*' | '.');
    let mut cleaned = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(is_word) {
        let end = rest[start..].find(|c| !is_word(c)).map_or(rest.len(), |length| start + length);
        let word = &rest[start..end];
        cleaned.push_str(&rest[..start]);
        cleaned.push_str(if marks.iter().any(|mark| word.starts_with(mark)) { "***" } else { word });
        rest = &rest[end..];
    }
    cleaned.push_str(rest);
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn organisations_and_keys_are_taken_out_of_a_providers_message() {
        let message = "Limit reached for gpt-4o in organization org-Ab12 on key sk-proj-****abcd. See (proj_77).";
        let cleaned = without_words(message, &["org-", "proj_", "sk-"]);
        assert_eq!(cleaned, "Limit reached for gpt-4o in organization *** on key *** See (***).");
    }

    #[test]
    fn a_pause_is_read_from_either_header_and_garbage_is_none() {
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(hyper::header::HeaderName::from_static(name), value.parse().unwrap())])
        };
        assert_eq!(retry_after(&headers("retry-after", "7")), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(&headers("retry-after-ms", "250")), Some(Duration::from_millis(250)));
        for bad in ["-1", "soon", "NaN", "1e400"] {
            assert_eq!(retry_after(&headers("retry-after", bad)), None, "{bad}");
        }
    }
}
