//! One request, from its head to its reply: every stage in the order in which it happens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderMap};
use hyper::http::request::Parts;
use hyper::{Request, Response, Version};

use super::body::Weight;
use super::chat::Shape;
use super::models;
use super::pass::Pass;
use super::receive::{self, Received};
use super::relay::{Relay, Terms};
use super::reply::{self, Reply};
use super::route::{self, Route};
use super::{Gateway, Snapshot, billing, chat, compress, templates, usage};
use crate::error::Error;
use crate::ledger::{Ask, Ended, OpenLine};
use crate::preprocess::{self, Admitted, Call, Decision, World};
use crate::request::Form;
use crate::store::{EndReason, now_ms};
use crate::upstream::{self, Answer, Upload, Whole};

/// What came of asking the upstream, with the line to settle it on.
pub struct Opened {
    pub answer: Result<Answer, Error>,
    pub line: OpenLine,
}

/// Answers one request. Never fails: what goes wrong is a reply.
pub async fn answer(gateway: Arc<Gateway>, request: Request<Incoming>) -> Response<Reply> {
    let begun = Instant::now();
    let request_id = gateway.request_ids.next();
    let (parts, body) = request.into_parts();
    let result = walk(&gateway, &parts, body, &request_id).await;
    let mut response = result.unwrap_or_else(|Refused { error, shape }| {
        tracing::info!(request_id, error = error.row().name, fault = error.row().fault.name(), "refused");
        let config = &gateway.snapshot.load().config;
        match shape.filter(|_| config.errors.in_chat) {
            Some(shape) => chat::error(&error, &shape, config.language, &request_id),
            None => reply::error(&error),
        }
    });
    compress::compress(&mut response, &parts.headers).await;
    reply::finish(&mut response, &parts.headers, &request_id);
    let (status, head_ms) = (response.status().as_u16(), begun.elapsed().as_millis() as u64);
    tracing::info!(request_id, method = %parts.method, path = parts.uri.path(), status, head_ms, "answered");
    response
}

/// A request that failed, and what its answer was to look like where errors are told in the chat.
struct Refused {
    error: Error,
    shape: Option<Shape>,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Refused {
        Refused { error, shape: None }
    }
}

async fn walk(gateway: &Arc<Gateway>, parts: &Parts, body: Incoming, id: &str) -> Result<Response<Reply>, Refused> {
    let snapshot = gateway.snapshot.load_full();
    let world = world(gateway, &snapshot);
    let admit = || preprocess::admit(&world, presented(&parts.headers));
    Ok(match route::of(&parts.method, parts.uri.path())? {
        Route::Preflight => reply::preflight(&parts.headers),
        Route::Health => reply::text(hyper::StatusCode::OK, "ok\n"),
        Route::Ready => gateway.ready().map(|()| reply::text(hyper::StatusCode::OK, "ready\n"))?,
        Route::Models => models::list(&admit()?, &snapshot.catalog, &gateway.pool),
        Route::Model(name) => models::one(&admit()?, &snapshot.catalog, &gateway.pool, &name)?,
        // Boxed: they are rare, and every request would have to keep a place for them.
        Route::Usage => {
            let query = parts.uri.query().unwrap_or_default();
            Box::pin(usage::of_key(gateway, &snapshot, &admit()?, query)).await?
        }
        Route::Subscription => Box::pin(billing::subscription(gateway, &admit()?)).await?,
        Route::Billed => Box::pin(billing::billed(gateway, &admit()?)).await?,
        Route::Call(api) => {
            let in_chat = snapshot.config.errors.in_chat && api.form == Form::Chat;
            let unread = |error| Refused { error, shape: in_chat.then(|| Shape::unread(&parts.headers)) };
            let admitted = admit().map_err(unread)?;
            gateway.ready().map_err(unread)?;
            let received = receive::receive(gateway, &snapshot, api, parts, body).await.map_err(unread)?;
            let shape = in_chat.then(|| Shape::of(&received.head));
            let refused = |error| Refused { error, shape: shape.clone() };
            let named = templates::named(&snapshot, &received);
            let received = match named.is_empty() {
                true => received,
                false => Box::pin(templates::expand(gateway, &snapshot, &admitted, received, named))
                    .await
                    .map_err(refused)?,
            };
            let called = call(gateway, &snapshot, &world, parts, admitted, received, id).await;
            called.map_err(|error| Refused { error, shape })?
        }
    })
}

async fn call(
    gateway: &Arc<Gateway>,
    snapshot: &Snapshot,
    world: &World<'_>,
    parts: &Parts,
    admitted: Admitted,
    received: Received,
    request_id: &str,
) -> Result<Response<Reply>, Error> {
    let Received { head, body, upload, weight } = received;
    let (api, sent) = (head.api, body.clone());
    match preprocess::decide(world, admitted, head, body)? {
        Decision::Answer(command) => Box::pin(chat::command(gateway, snapshot, &command, &sent, request_id)).await,
        Decision::Forward(call) if !upstream::serves(&call.model, api) => {
            Err(Error::ModelUnsuited { model: call.model.name.clone(), path: api.path })
        }
        Decision::Forward(call) => forward(gateway, snapshot, parts, call, upload, weight, request_id).await,
    }
}

/// Money, then an account, then the upstream, then the reply.
async fn forward(
    gateway: &Arc<Gateway>,
    snapshot: &Snapshot,
    parts: &Parts,
    call: Call,
    upload: Option<Upload>,
    weight: Weight,
    request_id: &str,
) -> Result<Response<Reply>, Error> {
    let line = gateway.ledger.open(ask_ledger(&call, parts, request_id)).await?;
    let terms = terms(gateway, snapshot, parts, &call, weight, request_id);
    let (stream, head_within) = (call.head.stream, terms.keep_alive);
    let mut opening = Box::pin(ask_upstream(gateway.clone(), call, upload, line));
    let opened = match stream {
        false => opening.await,
        true => match tokio::time::timeout(head_within, &mut opening).await {
            Ok(opened) => opened,
            // The head goes out; the relay waits on, and tries on.
            Err(_) => return Ok(reply::stream(Reply::Stream(Box::new(Relay::opening(opening, terms))))),
        },
    };
    let Opened { answer, line } = opened;
    match answer {
        Ok(Answer::Stream(frames)) => Ok(reply::stream(Reply::Stream(Box::new(Relay::streaming(frames, line, terms))))),
        Ok(Answer::Whole(whole)) => Ok(settle_whole(whole, line).await),
        Ok(Answer::Other(other)) => {
            let content_type = other.content_type.clone();
            Ok(reply::pass(content_type, Pass::new(other, line, terms)))
        }
        Err(error) => {
            line.end(Ended::failed(error.status(), matches!(error, Error::UpstreamTimeout { .. })));
            Err(error)
        }
    }
}

async fn ask_upstream(gateway: Arc<Gateway>, call: Call, upload: Option<Upload>, mut line: OpenLine) -> Opened {
    let Call { key, head, body, model, output_max } = call;
    let clamp = [line.clamp(), output_max].into_iter().flatten().min();
    let ask = upstream::Ask { clamp, model, head, body, user_id: key.user.id, upload };
    let called = |permit: &crate::pool::Permit| {
        line.called(permit.account.id, &permit.offer.endpoint, &permit.offer.upstream_model);
    };
    let opening = tokio::time::timeout(gateway.upstream.total_max(), gateway.upstream.open(&ask, called)).await;
    let answer = opening.unwrap_or(Err(Error::UpstreamTimeout { reason: "its answer took too long" }));
    Opened { answer, line }
}

async fn settle_whole(whole: Whole, mut line: OpenLine) -> Response<Reply> {
    line.prepare(whole.usage).await;
    line.end(Ended {
        reason: EndReason::Complete,
        status: 200,
        usage: whole.usage,
        usage_invalid: whole.usage_invalid,
        output: whole.output,
        estimated: whole.estimated,
        tool_calls: whole.tool_calls,
        content: whole.content,
        may_be_billed: true,
        unmeasured: !whole.measured,
    });
    reply::json(whole.pieces)
}

fn ask_ledger<'a>(call: &'a Call, parts: &'a Parts, request_id: &str) -> Ask<'a> {
    let theirs = ["x-client-request-id", "x-request-id"].iter().find_map(|name| parts.headers.get(*name));
    Ask {
        key: &call.key,
        model: &call.model,
        model_asked: &call.head.model,
        head: &call.head,
        body: &call.body,
        request_id: request_id.to_owned(),
        client_request_id: theirs.and_then(|id| id.to_str().ok()),
    }
}

fn terms(
    gateway: &Gateway,
    snapshot: &Snapshot,
    parts: &Parts,
    call: &Call,
    weight: Weight,
    request_id: &str,
) -> Terms {
    Terms {
        request_id: request_id.to_owned(),
        model: call.head.model.clone(),
        api: call.head.api,
        keep_alive: Duration::from_secs(snapshot.config.server.keep_alive_s),
        silence_max: gateway.upstream.silence_max(),
        total_max: gateway.upstream.total_max(),
        begun: tokio::time::Instant::now(),
        breaks: parts.version < Version::HTTP_2,
        in_chat: snapshot.config.errors.in_chat.then_some(snapshot.config.language),
        stop: gateway.stop.clone(),
        _weight: weight,
    }
}

fn world<'a>(gateway: &'a Gateway, snapshot: &'a Snapshot) -> World<'a> {
    World {
        config: &snapshot.config,
        catalog: &snapshot.catalog,
        users: &gateway.users,
        pool: &gateway.pool,
        now_ms: now_ms(),
    }
}

/// The key as the client sent it: a bearer token, or `x-api-key` as some front ends do. Anything else in
/// `Authorization` is a key that is not valid, however short.
fn presented(headers: &HeaderMap) -> Option<String> {
    let Some(authorization) = headers.get(AUTHORIZATION).filter(|value| !value.is_empty()) else {
        return headers.get("x-api-key").map(|key| String::from_utf8_lossy(key.as_bytes()).trim().to_owned());
    };
    let given = authorization.to_str().unwrap_or_default();
    let token = match given.split_at_checked("Bearer ".len()) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("Bearer ") => token,
        _ => "",
    };
    Some(token.trim().to_owned())
}

/// A reply in one piece.
pub(super) fn whole(body: impl Into<Bytes>) -> Response<Reply> {
    reply::json([body.into()])
}
