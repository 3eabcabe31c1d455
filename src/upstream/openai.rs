//! The dialect `openai`: OpenAI's chat completions, and everybody who is compatible with them.

use bytes::Bytes;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
};
use hyper::{Method, Request, Uri};

use super::client::Pieces;
use super::{Adapter, Ask, Via};
use crate::error::Error;
use crate::pool::Permit;
use crate::request::{Edit, Form, MaxField, rename, splice};

/// One row of [`super::ADAPTERS`].
pub static ADAPTER: Adapter = Adapter {
    dialect: "openai",
    forms: &[Form::Chat, Form::Completion, Form::Embedding, Form::Json, Form::Multipart],
    keyless: false,
    via: Via::Http(request),
};

fn request(ask: &Ask, permit: &Permit) -> Result<Request<Pieces>, Error> {
    let bearer = format!("Bearer {}", permit.account.key.expose());
    request_to(ask.head.api.path, AUTHORIZATION, &bearer, ask, permit)
}

/// The client's body with what differs spliced in, to `path` behind the base URL, with the account's key in a header.
pub(super) fn request_to(
    path: &str,
    key_header: HeaderName,
    key: &str,
    ask: &Ask,
    permit: &Permit,
) -> Result<Request<Pieces>, Error> {
    let misconfigured = || Error::UpstreamFailed { reason: "its address or key is not usable" };
    let base = permit.account.base_url.as_deref().unwrap_or(&permit.offer.endpoint.base_url);
    let uri: Uri = format!("{}{path}", base.trim_end_matches('/')).parse().map_err(|_| misconfigured())?;
    let host = uri.authority().map(|authority| authority.as_str().to_owned()).ok_or_else(misconfigured)?;
    let mut key = HeaderValue::from_str(key).map_err(|_| misconfigured())?;
    key.set_sensitive(true);

    let body = body(ask, permit);
    let mut request = Request::new(Pieces::default());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::from_str(&host).map_err(|_| misconfigured())?);
    headers.insert(key_header, key);
    match &ask.upload {
        // Its length follows from the body, which may still be arriving.
        // Written anew: of what the client sent beside its boundary another parser might read another one.
        Some(upload) => {
            let kind = format!("multipart/form-data; boundary=\"{}\"", upload.boundary);
            headers.insert(CONTENT_TYPE, HeaderValue::from_str(&kind).map_err(|_| misconfigured())?)
        }
        None => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"))
        }
    };
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let accept = match ask.head.api.is_measured() {
        true if ask.head.stream => "text/event-stream",
        true => "application/json",
        false => "*/*",
    };
    headers.insert(ACCEPT, HeaderValue::from_static(accept));
    *request.body_mut() = body;
    Ok(request)
}

fn body(ask: &Ask, permit: &Permit) -> Pieces {
    if let Some(upload) = &ask.upload {
        let named = match permit.offer.upstream_model == ask.head.model && ask.head.names_model() {
            true => ask.body.clone().into(),
            false => rename(&ask.body, &ask.head, &upload.boundary, &permit.offer.upstream_model),
        };
        return Pieces::new(named);
    }
    let mut edits: smallvec::SmallVec<[Edit<'_>; 3]> = smallvec::SmallVec::new();
    // What names none would be a model of the provider's choice, which nobody priced.
    if permit.offer.upstream_model != ask.head.model || !ask.head.names_model() {
        edits.push(Edit::Model(&permit.offer.upstream_model));
    }
    let has_options = ask.head.api.is_completion() && permit.offer.endpoint.stream_options;
    if ask.head.stream && has_options && !ask.head.include_usage {
        edits.push(Edit::IncludeUsage);
    }
    if let Some(value) = ask.clamp {
        // What OpenAI's own reasoning models refuse is `max_tokens`; everybody else knows it best.
        let absent = if ask.model.bills_unseen { MaxField::MaxCompletionTokens } else { MaxField::MaxTokens };
        edits.push(Edit::MaxTokens { value, absent });
    }
    if edits.is_empty() {
        return Pieces::new([ask.body.clone()]);
    }
    Pieces::new(splice(&ask.body, &ask.head, &edits).pieces().iter().cloned())
}

/// The end of a stream.
pub const DONE: &[u8] = b"[DONE]";

/// A chunk of a streamed answer, as an SSE event.
pub fn chunk_event(chunk: &serde_json::Value) -> Bytes {
    format!("data: {chunk}\n\n").into()
}
