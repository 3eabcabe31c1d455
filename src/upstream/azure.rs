//! The dialect `azure`: OpenAI's shapes at Azure's deployment URLs, with Azure's own header for the key.
//!
//! `{base}/openai/deployments/{deployment}/chat/completions?api-version=…`, as Azure's REST reference has it. A deployment
//! is the upstream's name for a model, so a mapping names it. Azure's newer `/openai/v1` is OpenAI's own API: it takes the
//! dialect `openai`.

use hyper::Request;
use hyper::header::HeaderName;

use super::client::Pieces;
use super::{Adapter, Ask, Via, openai};
use crate::error::Error;
use crate::pool::Permit;

/// One row of [`super::ADAPTERS`].
pub static ADAPTER: Adapter =
    Adapter { dialect: "azure", forms: openai::ADAPTER.forms, keyless: false, via: Via::Http(request) };

fn request(ask: &Ask, permit: &Permit) -> Result<Request<Pieces>, Error> {
    let (deployment, version) = (&permit.offer.upstream_model, &permit.offer.endpoint.api_version);
    let path = format!("/openai/deployments/{deployment}{}?api-version={version}", ask.head.api.path);
    openai::request_to(&path, HeaderName::from_static("api-key"), permit.account.key.expose(), ask, permit)
}
