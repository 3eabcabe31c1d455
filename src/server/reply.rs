//! Makes the replies: status, headers, and a body that is whole, in pieces, or a relay.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::pass::Pass;
use super::relay::{Broke, Relay};
use crate::error::Error;
use crate::upstream::Pieces;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream; charset=utf-8");
const NO_CACHE: HeaderValue = HeaderValue::from_static("no-cache");
const ANY: HeaderValue = HeaderValue::from_static("*");
/// Browsers keep a preflight's answer at most this long (Chromium's bound), in seconds.
const PREFLIGHT_MAX_AGE: HeaderValue = HeaderValue::from_static("7200");

/// A reply's body.
pub enum Reply {
    Whole(Pieces),
    Stream(Box<Relay>),
    Pass(Box<Pass>),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Broke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        match &mut *self {
            Reply::Whole(pieces) => Pin::new(pieces).poll_frame(cx).map_err(|_| Broke),
            Reply::Stream(relay) => Pin::new(&mut **relay).poll_frame(cx),
            Reply::Pass(pass) => Pin::new(&mut **pass).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Whole(pieces) => pieces.is_end_stream(),
            Reply::Stream(relay) => relay.is_end_stream(),
            Reply::Pass(pass) => pass.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Whole(pieces) => pieces.size_hint(),
            Reply::Stream(_) => SizeHint::default(),
            Reply::Pass(pass) => pass.size_hint(),
        }
    }
}

/// A JSON body with status 200.
pub fn json(pieces: impl IntoIterator<Item = Bytes>) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Pieces::new(pieces)));
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// An answer that is passed on as it comes.
pub fn pass(content_type: Option<HeaderValue>, body: Pass) -> Response<Reply> {
    let mut response = Response::new(Reply::Pass(Box::new(body)));
    let bytes = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type.unwrap_or(bytes));
    response
}

/// A short text with a status.
pub fn text(status: StatusCode, text: &'static str) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Pieces::new([Bytes::from_static(text.as_bytes())])));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// A stream of events.
pub fn stream(body: Reply) -> Response<Reply> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, EVENT_STREAM);
    headers.insert(header::CACHE_CONTROL, NO_CACHE);
    // Proxies of nginx's kind in front of us must not gather what we send at once.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// A failure in OpenAI's shape.
pub fn error(error: &Error) -> Response<Reply> {
    let mut response = json([Bytes::from(error.body_json())]);
    *response.status_mut() = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    if let Some(seconds) = error.retry_after_s() {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if !error.row().may_retry {
        headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    if let Error::MethodNotAllowed { allowed } = error {
        headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
    }
    response
}

/// The answer to a browser's preflight: whatever it asks for, without a key.
pub fn preflight(request: &HeaderMap) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Pieces::default()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    // `*` does not cover `Authorization`, so what was asked for is echoed.
    let asked = request.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        asked.unwrap_or_else(|| HeaderValue::from_static("authorization, content-type")),
    );
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, PREFLIGHT_MAX_AGE);
    headers.insert(header::VARY, HeaderValue::from_static("access-control-request-headers"));
    headers.insert(HeaderName::from_static("access-control-allow-private-network"), HeaderValue::from_static("true"));
    response
}

/// What every reply carries: its request id, and what lets a browser read it.
pub fn finish(response: &mut Response<Reply>, request: &HeaderMap, request_id: &str) {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(request_id) {
        headers.insert(REQUEST_ID, id);
    }
    if request.contains_key(header::ORIGIN) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, ANY);
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, retry-after, x-should-retry"),
        );
    }
}
