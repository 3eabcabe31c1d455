//! Receives a request: its head, and as much of its body as has to be read before it can be forwarded.

use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use hyper::http::request::Parts;

use super::body::{self, Weight};
use super::{Gateway, Snapshot};
use crate::error::Error;
use crate::request::{Api, Form, Head};
use crate::upstream::Upload;

/// A request that has been received.
pub struct Received {
    pub head: Box<Head>,
    /// All of it; the beginning where a form is still arriving.
    pub body: Bytes,
    /// What makes a body a form.
    pub upload: Option<Upload>,
    pub weight: Weight,
}

/// Reads what is sent to `api`, within the bounds of size and time.
pub async fn receive(
    gateway: &Gateway,
    snapshot: &Snapshot,
    api: &'static Api,
    parts: &Parts,
    body: Incoming,
) -> Result<Received, Error> {
    if parts.headers.contains_key(CONTENT_LENGTH) && parts.headers.contains_key(TRANSFER_ENCODING) {
        // Two lengths: behind a proxy that believes the other one, the rest would be somebody else's request.
        return Err(Error::body("content-length", "must not come together with transfer-encoding"));
    }
    let server = &snapshot.config.server;
    let (progress, bytes_max) = (Duration::from_secs(server.body_timeout_s), server.body_bytes_max);
    let announced = if api.form == Form::Multipart { body::announced_form(&parts.headers)? } else { None };
    let Some(form) = announced else {
        body::check_media_type(&parts.headers)?;
        let (body, weight) = body::read(&gateway.bodies, body, bytes_max, progress).await?;
        return Ok(Received { head: Box::new(Head::read_as(api, &body)?), body, upload: None, weight });
    };
    // Images: how many are asked for decides the price, and may stand behind them.
    let whole = api.model_default.is_some();
    let begun = body::read_form(&gateway.bodies, form, body, bytes_max, progress, whole).await?;
    Ok(Received {
        head: Box::new(Head::of_form(api, &begun.fields)?),
        body: begun.begun,
        upload: Some(Upload::new(begun.boundary, begun.rest, begun.failure)),
        weight: begun.weight,
    })
}
