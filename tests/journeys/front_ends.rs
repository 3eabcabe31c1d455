//! What front ends send, as their sources have it: headers, preflights, balance and title calls; and how errors and
//! answers reach them.

use std::io::Read;

use serde_json::{Value, json};

use crate::node::{KEY, Node, Reply, Setup, USER, asking, get, post, streaming};
use crate::upstream::{self, Act, DONE, Upstream, completion, finish, stream, stream_head, text, usage, whole};

/// A request as a front end writes it; the key goes where `KEY` stands.
async fn sent(node: &Node, head: &str, body: &str) -> Reply {
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    let head = head.trim_start().replace('\n', "\r\n").replace("KEY", KEY);
    node.send(format!("{head}\r\n{length}\r\n{body}").as_bytes()).await.read().await
}

async fn answering() -> Upstream {
    Upstream::start(|_, seen| match seen.json()["stream"].as_bool() {
        Some(true) => stream(&[text("Hello there"), finish(), usage(5, 2), DONE.into()].concat()),
        _ => whole(200, &completion("Hello there", 5, 2)),
    })
    .await
}

#[tokio::test]
async fn nextchat_talks_from_a_browser_and_shows_the_balance() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let preflight = sent(
        &node,
        "OPTIONS /v1/chat/completions HTTP/1.1
host: gateway
origin: https://app.nextchat.club
access-control-request-method: POST
access-control-request-headers: accept,authorization,content-type,x-requested-with",
        "",
    )
    .await;
    assert_eq!(preflight.status, 204);
    assert_eq!(
        preflight.header("access-control-allow-headers"),
        Some("accept,authorization,content-type,x-requested-with")
    );
    assert_eq!(preflight.header("access-control-allow-origin"), Some("*"));
    let chat = sent(
        &node,
        "POST /v1/chat/completions HTTP/1.1
host: gateway
origin: https://app.nextchat.club
content-type: application/json
accept: application/json, text/event-stream
x-requested-with: XMLHttpRequest
authorization: Bearer KEY",
        r#"{"messages":[{"role":"system","content":"\nYou are ChatGPT, a large language model trained by OpenAI.\n"},{"role":"user","content":"hi"}],"stream":true,"model":"m","temperature":0.5,"presence_penalty":0,"frequency_penalty":0,"top_p":1}"#,
    )
    .await;
    assert_eq!((chat.status, chat.said()), (200, "Hello there".into()));
    assert!(chat.header("content-type").unwrap().starts_with("text/event-stream"));
    assert_eq!(chat.header("access-control-allow-origin"), Some("*"));
    let balance = "HTTP/1.1\nhost: gateway\norigin: https://app.nextchat.club\nauthorization: Bearer KEY";
    node.lines(1).await;
    let used =
        sent(&node, &format!("GET /dashboard/billing/usage?start_date=2026-11-01&end_date=2026-11-24 {balance}"), "")
            .await;
    let limit = sent(&node, &format!("GET /dashboard/billing/subscription {balance}"), "").await;
    let (used, limit) =
        (used.json()["total_usage"].as_f64().unwrap(), limit.json()["hard_limit_usd"].as_f64().unwrap());
    // What it shows as left is the balance: 1.00 less 5 tokens at 1.00 and 2 at 2.00 a million.
    assert!((limit - used / 100.0 - 0.999_991).abs() < 1e-9, "{limit} {used}");
    node.finish().await;
}

#[tokio::test]
async fn nextchat_is_told_of_a_wrong_key_from_a_browser() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let refused = sent(
        &node,
        "POST /v1/chat/completions HTTP/1.1
host: gateway
origin: https://app.nextchat.club
content-type: application/json
authorization: Bearer nk-an-access-code",
        &streaming(""),
    )
    .await;
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (401, Some("*")));
    assert!(refused.header("access-control-expose-headers").unwrap().contains("x-request-id"));
    assert!(!refused.text().contains("nk-an-access-code"));
    node.finish().await;
}

#[tokio::test]
async fn lobechat_lists_models_and_streams_with_usage() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let models = sent(&node, "GET /v1/models HTTP/1.1\nhost: gateway\nauthorization: Bearer KEY\nuser-agent: OpenAI/JS 4.104.0\nx-stainless-lang: js", "").await;
    assert!(
        models.json()["data"].as_array().unwrap().iter().any(|model| model["id"] == "m" && model["object"] == "model")
    );
    let chat = sent(
        &node,
        "POST /v1/chat/completions HTTP/1.1
host: gateway
accept: */*
content-type: application/json
user-agent: OpenAI/JS 4.104.0
x-stainless-retry-count: 0
authorization: Bearer KEY",
        r#"{"messages":[{"content":"hi","role":"user"}],"model":"m","temperature":1,"top_p":1,"stream":true,"stream_options":{"include_usage":true},"user":"user_2x"}"#,
    )
    .await;
    let last = chat.text().lines().rev().filter_map(|line| line.strip_prefix("data: ")).nth(1).unwrap().to_owned();
    let last: Value = serde_json::from_str(&last).unwrap();
    assert_eq!((last["choices"].as_array().map(Vec::len), last["usage"]["total_tokens"].as_u64()), (Some(0), Some(7)));
    node.finish().await;
}

#[tokio::test]
async fn open_webui_gets_models_without_v1_and_errors_by_their_status() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let head = "HTTP/1.1\nhost: gateway\naccept: */*\naccept-encoding: gzip, deflate, br\nuser-agent: Python/3.11 aiohttp/3.11.11\nx-openwebui-user-name: ann\nauthorization: Bearer KEY";
    let models = sent(&node, &format!("GET /models {head}"), "").await;
    assert_eq!((models.status, models.json()["object"].as_str()), (200, Some("list")));
    let body = r#"{"stream":true,"model":"nope","messages":[{"role":"user","content":"hi"}]}"#;
    let refused = sent(&node, &format!("POST /chat/completions {head}\ncontent-type: application/json"), body).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
    node.finish().await;
}

#[tokio::test]
async fn librechat_fetches_models_and_its_chat_passes_untouched() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let models =
        sent(&node, "GET /v1/models HTTP/1.1\nhost: gateway\nauthorization: Bearer KEY\nuser-agent: axios/1.8.2\naccept-encoding: gzip, compress, deflate, br", "").await;
    let ids: Vec<String> = serde_json::from_value::<Vec<Value>>(models.json()["data"].clone())
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap().to_owned())
        .collect();
    assert!(ids.contains(&"m".to_owned()), "{ids:?}");
    let body = r#"{"model":"m","user":"66f0c0ffee","stream":true,"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"stream_options":{"include_usage":true}}"#;
    sent(
        &node,
        "POST /v1/chat/completions HTTP/1.1\nhost: gateway\ncontent-type: application/json\nauthorization: Bearer KEY",
        body,
    )
    .await;
    assert_eq!(String::from_utf8(upstream.seen()[0].body.clone()).unwrap(), body);
    node.finish().await;
}

#[tokio::test]
async fn cherry_studio_asks_for_its_own_headers_and_checks_a_model_by_a_chat() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let headers = "authorization,content-type,http-referer,x-api-key,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout,x-title";
    let preflight = sent(
        &node,
        &format!("OPTIONS /v1/chat/completions HTTP/1.1\nhost: gateway\norigin: file://\naccess-control-request-method: POST\naccess-control-request-headers: {headers}"),
        "",
    )
    .await;
    assert_eq!((preflight.status, preflight.header("access-control-allow-headers")), (204, Some(headers)));
    let checked = sent(
        &node,
        "POST /v1/chat/completions HTTP/1.1
host: gateway
origin: file://
content-type: application/json
authorization: Bearer KEY
x-api-key: KEY
http-referer: https://cherry-ai.com
x-title: Cherry Studio",
        r#"{"model":"m","messages":[{"role":"system","content":"test"},{"role":"user","content":"hi"}],"stream":false,"enable_thinking":false}"#,
    )
    .await;
    assert_eq!(
        (checked.status, checked.json()["choices"][0]["message"]["content"].as_str()),
        (200, Some("Hello there"))
    );
    // Neither the client's credentials nor where it comes from reach the provider.
    let seen = upstream.seen()[0].head.to_ascii_lowercase();
    for own in ["x-api-key", "http-referer", "x-title", "origin", KEY] {
        assert!(!seen.contains(own), "{seen}");
    }
    node.finish().await;
}

/// The text of an answer, streamed or not, that must look like a whole completion.
fn said_whole(reply: &Reply, streamed: bool) -> String {
    assert_eq!((reply.status, reply.whole), (200, true), "{}", reply.text());
    if streamed {
        assert!(reply.text().ends_with(DONE) && reply.text().contains(r#""finish_reason":"stop""#), "{}", reply.text());
        return reply.said();
    }
    let choice = reply.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "stop");
    choice["message"]["content"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn errors_are_told_in_the_chat_where_the_operator_wants_it() {
    let upstream = Upstream::start(|_, _| whole(500, "{}")).await;
    for (language, no_model, failed) in [("en", "does not exist", "provider failed"), ("zh", "不存在", "上游出错")]
    {
        let toml = "[errors]\nin_chat = true\n";
        let setup =
            Setup::at(&upstream).replacing("[server]", &format!("language = \"{language}\"\n[server]")).with(toml);
        let node = setup.start().await;
        for (more, streamed) in [("", false), (r#","stream":true"#, true)] {
            let unknown = node.chat(&asking(more).replace(r#""m""#, r#""nope""#)).await;
            assert!(said_whole(&unknown, streamed).contains(no_model), "{}", unknown.text());
            let told = node.chat(&asking(more)).await;
            assert!(said_whole(&told, streamed).contains(failed), "{}", told.text());
        }
        // Whose body was not read is told by what it accepts.
        let wrong = String::from_utf8(post("sk-wrong", &streaming(""))).unwrap();
        let wrong = wrong.replace("content-type", "accept: text/event-stream\r\ncontent-type");
        said_whole(&node.send(wrong.as_bytes()).await.read().await, true);
        // What is no chat keeps its status.
        assert_eq!(node.send(&get("/v1/models/nope")).await.read().await.status, 404);
        node.finish().await;
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_says_so_in_the_chat_where_the_operator_wants_it() {
    let broken = upstream::chunk([text("Hello"), text(" there")].concat());
    let upstream = Upstream::start(move |_, _| vec![stream_head(), broken.clone(), Act::Close]).await;
    let node = Setup::at(&upstream).with("[errors]\nin_chat = true\n").start().await;
    let said = said_whole(&node.chat(&streaming("")).await, true);
    assert!(said.starts_with("Hello there\n\n⚠️ The provider failed"), "{said}");
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.end_reason.name(), line.output), ("upstream_error", 2));
    node.finish().await;
}

#[tokio::test]
async fn without_the_setting_an_error_keeps_its_status() {
    let upstream = Upstream::start(|_, _| whole(500, "{}")).await;
    let node = Setup::at(&upstream).start().await;
    assert_eq!(node.chat(&streaming("")).await.status, 502);
    node.finish().await;
}

#[tokio::test]
async fn a_long_json_answer_is_compressed_for_who_accepts_it_and_a_stream_never_is() {
    let said = "the same words again and again ".repeat(500);
    let body = completion(&said, 5, 2000);
    let (answer, event) = (body.clone(), [text(&said), finish(), usage(5, 2000), DONE.into()].concat());
    let upstream = Upstream::start(move |_, seen| match seen.json()["stream"].as_bool() {
        Some(true) => stream(&event),
        _ => whole(200, &answer),
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let asked = |accept: &str, body: &str| {
        let request = String::from_utf8(post(KEY, body)).unwrap();
        request.replace("content-type", &format!("accept-encoding: {accept}\r\ncontent-type")).into_bytes()
    };
    for (accept, encoding) in
        [("gzip, deflate", Some("gzip")), ("gzip, deflate, br, zstd", Some("br")), ("identity", None)]
    {
        let reply = node.send(&asked(accept, &asking(""))).await.read().await;
        assert_eq!((reply.status, reply.header("content-encoding")), (200, encoding));
        assert_eq!(reply.header("vary"), Some("accept-encoding"));
        let mut plain = Vec::new();
        match encoding {
            Some("gzip") => drop(flate2::read::GzDecoder::new(&reply.body[..]).read_to_end(&mut plain).unwrap()),
            Some(_) => drop(brotli::Decompressor::new(&reply.body[..], 4096).read_to_end(&mut plain).unwrap()),
            None => plain.clone_from(&reply.body),
        }
        assert!(plain == body.as_bytes());
        assert!(encoding.is_none() || reply.body.len() < body.len() / 10);
    }
    let streamed = node.send(&asked("gzip, br", &streaming(""))).await.read().await;
    assert_eq!((streamed.header("content-encoding"), streamed.said()), (None, said));
    node.lines(4).await;
    node.finish().await;
}

#[tokio::test]
async fn a_front_ends_short_replies_are_not_compressed() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let request = String::from_utf8(post(KEY, &asking(""))).unwrap();
    let request = request.replace("content-type", "accept-encoding: gzip, br\r\ncontent-type");
    let reply = node.send(request.as_bytes()).await.read().await;
    assert_eq!((reply.status, reply.header("content-encoding"), reply.header("vary")), (200, None, None));
    assert_eq!(node.store.user(USER.into()).await.unwrap().name, USER);
    assert_eq!(reply.json()["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7 }));
    node.finish().await;
}
