//! Answers that this program gives itself, in the shape of a completion.

use bytes::Bytes;
use hyper::Response;
use hyper::header::{ACCEPT, HeaderMap};
use serde_json::{Value, json};

use super::reply::{self, Reply};
use super::{Gateway, Snapshot, billing, in_chat, templates, unanswered};
use crate::config::Language;
use crate::error::Error;
use crate::preprocess::Command;
use crate::preprocess::command::{Asked, Facts, Needs, Outcome, Redeemed};
use crate::request::Head;
use crate::store::{StoreError, now_ms};
use crate::upstream::Pieces;
use crate::upstream::openai::{DONE, chunk_event};
use crate::users::hash_key;

/// No code is longer.
const CODE_BYTES_MAX: usize = 128;

/// Runs a command and answers with its text: no upstream, no charge.
pub async fn command(
    gateway: &Gateway,
    snapshot: &Snapshot,
    command: &Command,
    body: &Bytes,
    request_id: &str,
) -> Result<Response<Reply>, Error> {
    let config = &snapshot.config;
    let (key, user_id) = (&command.key, command.key.user.id);
    // A command costs no money, but it asks the database.
    key.user.admit(now_ms()).map_err(|retry_after_s| Error::TooManyRequests { retry_after_s })?;
    let mut facts = Facts {
        language: config.language,
        prefix: &config.commands.prefix,
        currency: &config.currency,
        argument: &command.argument,
        ratio_micro: key.user.group().ratio_micro,
        models: Vec::new(),
        templates: Vec::new(),
        outcome: Outcome::Nothing,
        balance_nano: None,
        redeemed: Redeemed::Worthless,
    };
    match command.row.needs {
        Needs::Nothing => {}
        Needs::Balance => {
            facts.balance_nano = Some(billing::account(gateway, key).await.map_err(unanswered)?.left_nano);
        }
        Needs::Redeem => {
            facts.redeemed = redeem(gateway, user_id, &command.argument).await.map_err(unanswered)?;
            // The code is used up by now: that is told whatever becomes of the rest.
            facts.balance_nano = billing::account(gateway, key).await.ok().map(|account| account.left_nano);
        }
        Needs::Models => {
            let models = snapshot.catalog.iter().filter(|model| key.allows(&model.name) && gateway.pool.serves(model));
            facts.models = models.map(|model| (model.name.clone(), model.price.clone())).collect();
        }
        Needs::Templates => {
            let asked = Asked::of(&command.argument);
            facts.outcome = templates::run(&gateway.store, user_id, asked, body).await.map_err(unanswered)?;
            facts.templates = gateway.store.listed_templates(user_id).await.map_err(unanswered)?;
        }
    }
    let text = command.answer(&facts);
    let Command { model, stream, include_usage, .. } = command;
    Ok(completion(&Shape { model: model.clone(), stream: *stream, include_usage: *include_usage }, &text, request_id))
}

/// What a client asked for its answer to look like.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// The model's name, as the client knows it.
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
}

impl Shape {
    /// As a request asks for it.
    pub fn of(head: &Head) -> Shape {
        Shape { model: head.model.clone(), stream: head.stream, include_usage: head.include_usage }
    }

    /// As far as it can be told from the headers of a request whose body was not read.
    pub fn unread(headers: &HeaderMap) -> Shape {
        let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let stream = accept.is_some_and(|accept| accept.contains("text/event-stream"));
        Shape { stream, ..Shape::default() }
    }
}

/// An error as the text of a completion: see [`in_chat`].
pub fn error(error: &Error, shape: &Shape, language: Language, request_id: &str) -> Response<Reply> {
    completion(shape, &in_chat::text(error, language), request_id)
}

async fn redeem(gateway: &Gateway, user_id: i64, code: &str) -> Result<Redeemed, StoreError> {
    if code.is_empty() || code.len() > CODE_BYTES_MAX {
        return Ok(Redeemed::Worthless);
    }
    let (store, hash) = (&gateway.store, hash_key(code));
    match store.redeem(user_id, hash).await {
        Ok(nano) => Ok(Redeemed::Now(nano)),
        // Also one whose answer was lost: a user that tries again is told that the money came.
        Err(StoreError::Absent(_)) => {
            Ok(store.redeemed(user_id, hash).await?.map_or(Redeemed::Worthless, Redeemed::Before))
        }
        Err(error) => Err(error),
    }
}

/// A text as a completion, streamed or not, with a usage of zero.
fn completion(shape: &Shape, text: &str, request_id: &str) -> Response<Reply> {
    let usage = json!({ "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0 });
    let answer = |object: &str, choices: Value| {
        json!({ "id": format!("chatcmpl-{request_id}"), "object": object, "created": now_ms() / 1000,
                "model": shape.model, "choices": choices })
    };
    if !shape.stream {
        let message = json!({ "role": "assistant", "content": text, "refusal": null });
        let mut whole = answer(
            "chat.completion",
            json!([{ "index": 0, "message": message, "logprobs": null, "finish_reason": "stop" }]),
        );
        whole["usage"] = usage;
        return reply::json([whole.to_string().into()]);
    }
    let event = |delta: Value, finish: Value| {
        let choices = json!([{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish }]);
        chunk_event(&answer("chat.completion.chunk", choices))
    };
    let mut events =
        vec![event(json!({ "role": "assistant", "content": text }), Value::Null), event(json!({}), "stop".into())];
    if shape.include_usage {
        let mut last = answer("chat.completion.chunk", json!([]));
        last["usage"] = usage;
        events.push(chunk_event(&last));
    }
    events.push(Bytes::from([b"data: ", DONE, b"\n\n"].concat()));
    reply::stream(Reply::Whole(Pieces::new(events)))
}
