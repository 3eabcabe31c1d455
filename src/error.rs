//! Every way a request fails, and what the client is told: one enum, one table.
//!
//! `Display` is what the client reads: no key, prompt, answer or internal address may get into it. What the operator
//! needs to know beyond that goes to the log, beside the request id, never into a variant.

use std::borrow::Cow;
use std::fmt;

/// Whose doing a failure is; decides the log level and, in metrics, the label `fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request or its sender's account must change.
    Client,
    /// The provider, or the way to it.
    Upstream,
    /// This node.
    Node,
}

impl Fault {
    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Client => "client",
            Fault::Upstream => "upstream",
            Fault::Node => "node",
        }
    }
}

/// A failed request. Fields carry only what the message needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// No `Authorization: Bearer …` and no `x-api-key` header.
    KeyMissing,
    /// A key that is unknown, revoked or expired, or a header that is no key at all.
    KeyInvalid,
    /// The key's user is frozen.
    UserFrozen,
    /// The user's group may not call this model.
    ModelForbidden { model: String },
    /// No endpoint serves this model.
    ModelUnknown { model: String },
    /// The model is served, but not at this path.
    ModelUnsuited { model: String, path: &'static str },
    /// No route of ours.
    PathUnknown { path: String },
    /// A route of ours, another method.
    MethodNotAllowed { allowed: &'static str },
    /// A body that is not what the API documents; `param` names the field.
    BodyInvalid { param: Option<Cow<'static, str>>, reason: Cow<'static, str> },
    /// A body larger than the bound.
    BodyTooLarge { bytes_max: usize },
    /// A body that stopped arriving.
    BodyTimeout,
    /// A content type or encoding that is not JSON as it is.
    MediaType { found: String },
    /// The balance does not cover the smallest answer.
    QuotaExceeded,
    /// A limit of the key, or an allowance of its user, does not cover the call; says which.
    LimitReached { which: &'static str },
    /// The group's requests a minute.
    TooManyRequests { retry_after_s: u64 },
    /// No account became free before the deadline of the queue.
    QueueTimeout { retry_after_s: u64 },
    /// The queue is full.
    QueueFull { retry_after_s: u64 },
    /// The key's or user's own limit of calls in flight.
    TooManyCalls { retry_after_s: u64 },
    /// Money exists, but another node holds it at the moment.
    BalanceLocked { retry_after_s: u64 },
    /// The model has a price, but no enabled account serves it.
    NoAccount { model: String },
    /// This node cannot take the call: journal or store out of order, or too many bytes in flight.
    NodeUnavailable { reason: &'static str, retry_after_s: u64 },
    /// The node is draining.
    Draining,
    /// The upstream's own refusal of this very request (400, 404, 413, 422), handed back cleaned.
    UpstreamRefused { status: u16, kind: String, code: Option<String>, param: Option<String>, message: String },
    /// Every account that was tried answered 429.
    UpstreamBusy { retry_after_s: u64 },
    /// No account could be reached, or all answered with a failure.
    UpstreamFailed { reason: &'static str },
    /// No first byte, or silence, past its bound.
    UpstreamTimeout { reason: &'static str },
    /// A bug of ours, contained.
    Internal,
}

/// One row of the table: what every failure of a kind has in common.
#[derive(Debug)]
pub struct Row {
    /// The variant's name in logs and metrics.
    pub name: &'static str,
    pub status: u16,
    /// OpenAI's `error.type`.
    pub kind: &'static str,
    /// OpenAI's `error.code`.
    pub code: Option<&'static str>,
    pub fault: Fault,
    /// False adds `x-should-retry: false`, which stops the SDKs' own two retries.
    pub may_retry: bool,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const LIMIT: &str = "requests";

#[rustfmt::skip]
mod rows {
    use super::{Fault::*, *};
    macro_rules! row { ($id:ident $name:literal $status:literal $kind:expr, $code:expr, $fault:expr, $retry:literal) => {
        pub static $id: Row = Row { name: $name, status: $status, kind: $kind, code: $code, fault: $fault, may_retry: $retry };
    } }
    //  variant              name                 status type                  code                            fault     retry
    row!(KEY_MISSING        "key_missing"          401 INVALID,               Some("invalid_api_key"),          Client,   false);
    row!(KEY_INVALID        "key_invalid"          401 INVALID,               Some("invalid_api_key"),          Client,   false);
    row!(USER_FROZEN        "user_frozen"          403 "permission_error",    Some("user_frozen"),              Client,   false);
    row!(MODEL_FORBIDDEN    "model_forbidden"      403 "permission_error",    Some("model_not_allowed"),        Client,   false);
    row!(MODEL_UNKNOWN      "model_unknown"        404 INVALID,               Some("model_not_found"),          Client,   false);
    row!(MODEL_UNSUITED     "model_unsuited"       400 INVALID,               Some("unsupported_path"),         Client,   false);
    row!(PATH_UNKNOWN       "path_unknown"         404 INVALID,               Some("unknown_url"),              Client,   false);
    row!(METHOD_NOT_ALLOWED "method_not_allowed"   405 INVALID,               Some("method_not_allowed"),       Client,   false);
    row!(BODY_INVALID       "body_invalid"         400 INVALID,               None,                             Client,   false);
    row!(BODY_TOO_LARGE     "body_too_large"       413 INVALID,               Some("request_too_large"),        Client,   false);
    row!(BODY_TIMEOUT       "body_timeout"         408 INVALID,               Some("request_timeout"),          Client,   true);
    row!(MEDIA_TYPE         "media_type"           415 INVALID,               Some("unsupported_media_type"),   Client,   false);
    row!(QUOTA_EXCEEDED     "quota_exceeded"       429 "insufficient_quota",  Some("insufficient_quota"),       Client,   false);
    row!(LIMIT_REACHED      "limit_reached"        429 "insufficient_quota",  Some("insufficient_quota"),       Client,   false);
    row!(TOO_MANY_REQUESTS  "too_many_requests"    429 LIMIT,                 Some("rate_limit_exceeded"),      Client,   true);
    row!(QUEUE_TIMEOUT      "queue_timeout"        429 LIMIT,                 Some("rate_limit_exceeded"),      Node,     true);
    row!(QUEUE_FULL         "queue_full"           429 LIMIT,                 Some("rate_limit_exceeded"),      Node,     true);
    row!(TOO_MANY_CALLS     "too_many_calls"       429 LIMIT,                 Some("rate_limit_exceeded"),      Client,   true);
    row!(BALANCE_LOCKED     "balance_locked"       503 SERVER,                Some("balance_locked"),           Node,     true);
    row!(NO_ACCOUNT         "no_account"           503 SERVER,                Some("no_account"),               Node,     false);
    row!(NODE_UNAVAILABLE   "node_unavailable"     503 SERVER,                Some("service_unavailable"),      Node,     true);
    row!(DRAINING           "draining"             503 SERVER,                Some("service_unavailable"),      Node,     true);
    row!(UPSTREAM_REFUSED   "upstream_refused"     400 INVALID,               None,                             Client,   false);
    row!(UPSTREAM_BUSY      "upstream_busy"        429 LIMIT,                 Some("rate_limit_exceeded"),      Upstream, true);
    row!(UPSTREAM_FAILED    "upstream_failed"      502 SERVER,                Some("upstream_failed"),          Upstream, true);
    row!(UPSTREAM_TIMEOUT   "upstream_timeout"     504 SERVER,                Some("upstream_timeout"),         Upstream, true);
    row!(INTERNAL           "internal"             500 SERVER,                Some("internal_error"),           Node,     true);
}

impl Error {
    /// A 400 that names the field.
    pub fn body(param: impl Into<Cow<'static, str>>, reason: impl Into<Cow<'static, str>>) -> Error {
        Error::BodyInvalid { param: Some(param.into()), reason: reason.into() }
    }

    /// The row of the table that this failure belongs to.
    pub fn row(&self) -> &'static Row {
        match self {
            Error::KeyMissing => &rows::KEY_MISSING,
            Error::KeyInvalid => &rows::KEY_INVALID,
            Error::UserFrozen => &rows::USER_FROZEN,
            Error::ModelForbidden { .. } => &rows::MODEL_FORBIDDEN,
            Error::ModelUnknown { .. } => &rows::MODEL_UNKNOWN,
            Error::ModelUnsuited { .. } => &rows::MODEL_UNSUITED,
            Error::PathUnknown { .. } => &rows::PATH_UNKNOWN,
            Error::MethodNotAllowed { .. } => &rows::METHOD_NOT_ALLOWED,
            Error::BodyInvalid { .. } => &rows::BODY_INVALID,
            Error::BodyTooLarge { .. } => &rows::BODY_TOO_LARGE,
            Error::BodyTimeout => &rows::BODY_TIMEOUT,
            Error::MediaType { .. } => &rows::MEDIA_TYPE,
            Error::QuotaExceeded => &rows::QUOTA_EXCEEDED,
            Error::LimitReached { .. } => &rows::LIMIT_REACHED,
            Error::TooManyRequests { .. } => &rows::TOO_MANY_REQUESTS,
            Error::QueueTimeout { .. } => &rows::QUEUE_TIMEOUT,
            Error::QueueFull { .. } => &rows::QUEUE_FULL,
            Error::TooManyCalls { .. } => &rows::TOO_MANY_CALLS,
            Error::BalanceLocked { .. } => &rows::BALANCE_LOCKED,
            Error::NoAccount { .. } => &rows::NO_ACCOUNT,
            Error::NodeUnavailable { .. } => &rows::NODE_UNAVAILABLE,
            Error::Draining => &rows::DRAINING,
            Error::UpstreamRefused { .. } => &rows::UPSTREAM_REFUSED,
            Error::UpstreamBusy { .. } => &rows::UPSTREAM_BUSY,
            Error::UpstreamFailed { .. } => &rows::UPSTREAM_FAILED,
            Error::UpstreamTimeout { .. } => &rows::UPSTREAM_TIMEOUT,
            Error::Internal => &rows::INTERNAL,
        }
    }

    /// The HTTP status; an upstream's refusal keeps its own.
    pub fn status(&self) -> u16 {
        match self {
            Error::UpstreamRefused { status, .. } => *status,
            _ => self.row().status,
        }
    }

    /// Seconds for `Retry-After`, where waiting helps.
    pub fn retry_after_s(&self) -> Option<u64> {
        match self {
            Error::TooManyRequests { retry_after_s }
            | Error::QueueTimeout { retry_after_s }
            | Error::QueueFull { retry_after_s }
            | Error::TooManyCalls { retry_after_s }
            | Error::BalanceLocked { retry_after_s }
            | Error::NodeUnavailable { retry_after_s, .. }
            | Error::UpstreamBusy { retry_after_s } => Some(*retry_after_s),
            Error::Draining => Some(1),
            _ => None,
        }
    }

    /// The body that every OpenAI SDK reads: `{"error":{"message","type","param","code"}}`.
    pub fn body_json(&self) -> Vec<u8> {
        let row = self.row();
        let (kind, code, param) = match self {
            Error::UpstreamRefused { kind, code, param, .. } => (kind.as_str(), code.as_deref(), param.as_deref()),
            Error::BodyInvalid { param, .. } => (row.kind, row.code, param.as_deref()),
            Error::ModelForbidden { .. } | Error::ModelUnknown { .. } | Error::ModelUnsuited { .. } => {
                (row.kind, row.code, Some("model"))
            }
            _ => (row.kind, row.code, None),
        };
        let body = serde_json::json!({
            "error": { "message": self.to_string(), "type": kind, "param": param, "code": code }
        });
        body.to_string().into_bytes()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::KeyMissing => {
                f.write_str("No API key was sent. Put it in the header 'Authorization: Bearer <key>'.")
            }
            Error::KeyInvalid => f.write_str("The API key is not valid here: unknown, revoked or expired."),
            Error::UserFrozen => f.write_str("This user is frozen. Ask the operator of this gateway."),
            Error::ModelForbidden { model } => write!(f, "The model '{model}' is not allowed for this key."),
            Error::ModelUnknown { model } => {
                write!(f, "The model '{model}' does not exist here. GET /v1/models lists those that do.")
            }
            Error::ModelUnsuited { model, path } => {
                write!(f, "The model '{model}' cannot be called at /v1{path}.")
            }
            Error::PathUnknown { path } => write!(
                f,
                "Unknown path '{path}'. There are: POST /v1/chat/completions, /v1/completions, /v1/embeddings, \
                 /v1/moderations, /v1/rerank, /v1/images/…, /v1/audio/…; GET /v1/models, /v1/models/{{id}}, /v1/usage, \
                 /v1/dashboard/billing/subscription and …/usage (each also without /v1); GET /healthz and /readyz."
            ),
            Error::MethodNotAllowed { allowed } => write!(f, "This path takes {allowed}."),
            Error::BodyInvalid { param: Some(param), reason } => write!(f, "'{param}': {reason}."),
            Error::BodyInvalid { param: None, reason } => write!(f, "The body {reason}."),
            Error::BodyTooLarge { bytes_max } => write!(f, "The body is larger than {bytes_max} bytes."),
            Error::BodyTimeout => f.write_str("The body stopped arriving."),
            Error::MediaType { found } => {
                write!(f, "The body must be application/json without a content encoding, found '{found}'.")
            }
            Error::QuotaExceeded => f.write_str("The balance does not cover this call. Top up, or ask for less."),
            Error::LimitReached { which } => write!(f, "{which} does not cover this call."),
            Error::TooManyRequests { .. } => f.write_str("Too many requests of this user within a minute."),
            Error::QueueTimeout { .. } => f.write_str("No account became free in time. Try again."),
            Error::QueueFull { .. } => f.write_str("Too many requests are waiting already. Try again later."),
            Error::TooManyCalls { .. } => f.write_str("Too many calls of this user are in flight."),
            Error::BalanceLocked { .. } => f.write_str("The balance is locked by another node. Try again."),
            Error::NoAccount { model } => write!(f, "No account serves the model '{model}' at the moment."),
            Error::NodeUnavailable { reason, .. } => write!(f, "This node takes no calls at the moment: {reason}."),
            Error::Draining => f.write_str("This node is shutting down. Try again."),
            Error::UpstreamRefused { message, .. } => f.write_str(message),
            Error::UpstreamBusy { .. } => f.write_str("The provider is limiting requests. Try again."),
            Error::UpstreamFailed { reason } => write!(f, "The provider failed: {reason}."),
            Error::UpstreamTimeout { reason } => write!(f, "The provider did not answer in time: {reason}."),
            Error::Internal => f.write_str("Internal error. The request id helps the operator to find it."),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_the_four_fields_that_sdks_read() {
        let body = Error::body("model", "must be a string").body_json();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["message"], "'model': must be a string.");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert_eq!(body["error"]["param"], "model");
        assert!(body["error"]["code"].is_null());
    }

    #[test]
    fn a_missing_balance_must_not_be_retried() {
        let row = Error::QuotaExceeded.row();
        assert_eq!((row.status, row.code, row.may_retry), (429, Some("insufficient_quota"), false));
    }

    #[test]
    fn an_upstreams_refusal_keeps_its_own_status_type_and_code() {
        let error = Error::UpstreamRefused {
            status: 422,
            kind: "bad".into(),
            code: Some("c".into()),
            param: None,
            message: "m".into(),
        };
        let body: serde_json::Value = serde_json::from_slice(&error.body_json()).unwrap();
        assert_eq!((error.status(), &body["error"]["code"]), (422, &"c".into()));
    }
}
