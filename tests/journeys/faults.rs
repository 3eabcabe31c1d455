//! What the old gpt-cat did wrong, one by one (product.md): these must never come back.

use std::time::Duration;

use crate::node::{INPUT_NANO, KEY, OUTPUT_NANO, Setup, USER, asking, get, post, streaming};
use crate::upstream::{
    Act, DONE, Upstream, chunk, completion, delta, event, finish, stream, stream_end, stream_head, text, usage, whole,
};
use serde_json::json;

// Fault 1: `stream:false` with a wrong key or a slash command hangs for ever.

#[tokio::test]
async fn a_wrong_key_without_streaming_is_answered_at_once() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    for body in [asking(r#","stream":false"#), asking(""), streaming("")] {
        let reply = node.send(&post("sk-wrong", &body)).await.read().await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (401, Some("invalid_api_key")));
        assert_eq!(reply.header("x-should-retry"), Some("false"));
    }
    assert!(upstream.seen().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn a_slash_command_is_answered_with_and_without_streaming_and_without_charge() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    let command = |text: &str, stream: bool| {
        json!({ "model": "m", "stream": stream, "messages": [{ "role": "user", "content": text }] }).to_string()
    };
    let whole = node.chat(&command("/bi", false)).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], "Balance: 1.00 USD");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["usage"]["total_tokens"], 0);
    let streamed = node.chat(&command("/balance_inquiry", true)).await;
    assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert!(streamed.text().ends_with(DONE));
    assert_eq!(streamed.said(), "Balance: 1.00 USD");
    assert!(node.chat(&command(" /h ", false)).await.text().contains("/balance_inquiry"));
    assert!(upstream.seen().is_empty());
    assert_eq!(node.balance_nano().await, 1_000_000_000);
    node.finish().await;
}

#[tokio::test]
async fn what_only_looks_like_a_command_goes_to_the_model() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("hi", 5, 1))).await;
    let node = Setup::at(&upstream).start().await;
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "/usr/bin/env what is this" }] });
    assert_eq!(node.chat(&body.to_string()).await.status, 200);
    // Fault 10: an older command in the history is no command.
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "/bi" },
        { "role": "assistant", "content": "Balance: 1" }, { "role": "user", "content": "thanks" }] });
    assert_eq!(node.chat(&body.to_string()).await.status, 200);
    assert_eq!(upstream.seen().len(), 2);
    node.finish().await;
}

// Fault 2: a failed request is billed; a retry after partial output duplicates text and bills twice.

#[tokio::test]
async fn a_failed_request_costs_nothing() {
    let upstream = Upstream::start(|_, _| whole(500, "{}")).await;
    let node = Setup::at(&upstream).start().await;
    for body in [asking(""), streaming("")] {
        let reply = node.chat(&body).await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (502, Some("upstream_failed")));
    }
    let lines = node.lines(2).await;
    assert!(lines.iter().all(|line| line.charged_nano == 0 && line.end_reason.name() == "failed"), "{lines:?}");
    assert_eq!(node.balance_nano().await, 1_000_000_000);
    node.finish().await;
}

#[tokio::test]
async fn a_stream_that_breaks_after_content_is_not_retried_and_says_that_it_broke() {
    let upstream = Upstream::start(|_, _| {
        vec![stream_head(), chunk(text("Hello")), Act::Pause(Duration::from_millis(50)), Act::Close]
    })
    .await;
    let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).start().await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!((reply.status, reply.whole, reply.said().as_str()), (200, false, "Hello"));
    assert!(reply.text().contains(r#"data: {"error":"#), "{}", reply.text());
    assert!(!reply.text().contains("[DONE]"));
    assert_eq!(upstream.seen().len(), 1);
    let line = &node.lines(1).await[0];
    assert_eq!((line.end_reason.name(), line.output, line.tries), ("upstream_error", 1, 1));
    assert_eq!(line.charged_nano, line.input as i64 * INPUT_NANO + OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn a_retry_before_content_is_billed_once() {
    let upstream = Upstream::start(|number, _| match number {
        0 => whole(500, "{}"),
        1 => vec![stream_head(), chunk(delta(json!({ "role": "assistant", "content": "" }))), Act::Close],
        _ => stream(&[text("Hello"), finish(), usage(9, 1), DONE.into()].concat()),
    })
    .await;
    let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9), ("third", 9)]).start().await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!((reply.status, reply.said().as_str()), (200, "Hello"));
    assert_eq!(reply.text().matches("role").count(), 0, "the preamble of the try that failed is not shown");
    let line = &node.lines(1).await[0];
    assert_eq!((line.tries, line.charged_nano), (3, 9 * INPUT_NANO + OUTPUT_NANO));
    node.finish().await;
}

// Fault 3: only `delta.content` of choice 0 is counted; an image's base64 is counted as text.

#[tokio::test]
async fn tool_calls_reasoning_refusals_and_other_choices_are_counted() {
    let second_choice = event(json!([{ "index": 1, "delta": { "content": "hello world" }, "finish_reason": null }]));
    let deltas = [
        json!({ "reasoning_content": "hello world" }),
        json!({ "refusal": "hello world" }),
        json!({ "tool_calls": [{ "index": 0, "id": "call_1", "type": "function", "function": { "name": "hello", "arguments": "" } }] }),
        json!({ "tool_calls": [{ "index": 0, "function": { "arguments": "hello world" } }] }),
        json!({ "content": "hello world" }),
    ];
    let ends = event(
        json!([{ "index": 0, "delta": {}, "finish_reason": "stop" }, { "index": 1, "delta": {}, "finish_reason": "stop" }]),
    );
    let events = deltas.map(delta).concat() + &second_choice + &ends + DONE;
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).start().await;
    assert_eq!(node.chat(&streaming(r#","n":2"#)).await.status, 200);
    let line = &node.lines(1).await[0];
    // "hello world" is two tokens, five times; "hello" is one.
    assert_eq!((line.output, line.billed.name()), (11, "count"));
    node.finish().await;
}

#[tokio::test]
async fn an_image_is_not_counted_as_text() {
    let upstream = Upstream::start(|_, _| stream(&[text("A cat."), finish(), DONE.into()].concat())).await;
    let node = Setup::at(&upstream).start().await;
    let image = format!("data:image/png;base64,{}", "A".repeat(200_000));
    let body = json!({ "model": "m", "stream": true, "messages": [{ "role": "user", "content": [
        { "type": "text", "text": "What is this?" },
        { "type": "image_url", "image_url": { "url": image, "detail": "low" } }] }] });
    assert_eq!(node.chat(&body.to_string()).await.status, 200);
    let line = &node.lines(1).await[0];
    assert!(line.input < 60_000, "200,000 bytes of base64 came to {} tokens", line.input);
    node.finish().await;
}

// Fault 5: a topped-up user stays locked out.

#[tokio::test]
async fn a_user_without_money_can_call_again_once_topped_up_beside_the_server() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("hi", 5, 1))).await;
    let node = Setup::at(&upstream).balance_nano(0).start().await;
    let refused = node.chat(&asking("")).await;
    assert_eq!((refused.status, refused.header("x-should-retry")), (429, Some("false")));
    assert_eq!(refused.json()["error"]["type"], "insufficient_quota");
    assert!(upstream.seen().is_empty());
    node.store.credit(USER.into(), 1_000_000_000, "top-up".into()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(node.chat(&asking("")).await.status, 200);
    node.finish().await;
}

#[tokio::test]
async fn a_freeze_and_its_end_are_seen_within_a_second() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("hi", 5, 1))).await;
    let node = Setup::at(&upstream).start().await;
    node.store.set_frozen(USER.into(), true, false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(node.chat(&asking("")).await.status, 403);
    node.store.credit(USER.into(), 1, String::new()).await.unwrap();
    node.store.set_frozen(USER.into(), false, false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(node.chat(&asking("")).await.status, 200);
    node.finish().await;
}

// Fault 6 is also tested on every cut in `src/sse`; here it goes through the whole gateway.

#[tokio::test]
async fn events_survive_crlf_split_terminators_and_glued_packets() {
    let events = [text("one "), text("two "), text("three"), finish(), DONE.into()].concat();
    let crlf = events.replace('\n', "\r\n");
    for whole in [events, crlf] {
        for size in [1, 2, 3, 7, 150] {
            let sent = whole.clone();
            let upstream = Upstream::start(move |_, _| {
                let chunks = sent.as_bytes().chunks(size).map(chunk);
                [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
            })
            .await;
            let node = Setup::at(&upstream).start().await;
            let reply = node.chat(&streaming("")).await;
            assert_eq!((reply.text(), reply.whole), (whole.clone(), true), "cut in {size}");
            assert_eq!(node.lines(1).await[0].output, 3);
            node.finish().await;
        }
    }
}

#[tokio::test]
async fn three_newlines_and_comments_pass_through() {
    let events = format!(": hello\n\n\n{}\n\n\n: ping\n\n{}{}", text("hi"), finish(), DONE);
    let sent = events.clone();
    let upstream = Upstream::start(move |_, _| stream(&sent)).await;
    let node = Setup::at(&upstream).start().await;
    assert_eq!(node.chat(&streaming("")).await.text(), events);
    node.finish().await;
}

// Fault 7: unknown fields vanish, absent ones are invented, answers are rebuilt.

#[tokio::test]
async fn a_request_and_its_answer_pass_byte_for_byte() {
    let answer = r#"{ "id":"chatcmpl-odd" , "choices":[{"index":0,"message":{"role":"assistant","content":null,"x":-0.0},"finish_reason":"stop"}],
        "model":"m-2024-01-01","system_fingerprint":"fp","service_tier":"odd","usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3},"big":123456789012345678901234567890}"#;
    let upstream = Upstream::start(move |_, _| whole(200, answer)).await;
    let node = Setup::at(&upstream).start().await;
    let body = r#"{ "messages" : [ {"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]},
        {"role":"tool","tool_call_id":"c","content":"ok"},{"role":"user","content":"caf\u00e9 \ud83d\ude00","name":"n"}],
        "model":"m","tool_choice":"auto","response_format":{"type":"json_object"},"stop":["\n"],"seed":18446744073709551617,"unknown":{"a":[1,2,{"b":null}]}}"#;
    let reply = node.chat(body).await;
    assert_eq!(String::from_utf8(upstream.seen()[0].body.clone()).unwrap(), body);
    assert_eq!(reply.text(), answer);
    node.finish().await;
}

// Fault 8: a header shorter than 7 bytes panics; an empty pool panics.

#[tokio::test]
async fn odd_authorization_headers_are_401_and_nothing_worse() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    for header in ["", "B", "Bearer", "Bearer ", "bearer x", "Basic eA==", "sk-test-of-the-journeys", "Bearer \u{e9}"] {
        let request = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: {header}\r\n\r\n");
        let reply = node.send(request.as_bytes()).await.read().await;
        assert_eq!(reply.status, 401, "{header:?}");
    }
    let without = node.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.read().await;
    assert_eq!(without.status, 401);
    let other_name = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n\r\n");
    assert_eq!(node.send(other_name.as_bytes()).await.read().await.status, 200);
    node.finish().await;
}

#[tokio::test]
async fn an_empty_pool_is_a_503_and_its_models_are_not_listed() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).accounts(&[]).start().await;
    let reply = node.chat(&asking("")).await;
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (503, Some("no_account")));
    let models = node.send(&get("/v1/models")).await.read().await.json();
    assert_eq!(models["data"], json!([]));
    node.finish().await;
}

#[tokio::test]
async fn zero_retries_are_one_try() {
    let upstream = Upstream::start(|_, _| whole(500, "{}")).await;
    let setup = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).with("[retry]\ntries = 1\n");
    let node = setup.start().await;
    assert_eq!(node.chat(&asking("")).await.status, 502);
    assert_eq!(upstream.seen().len(), 1);
    node.finish().await;
}

// Fault 14: the user's key is echoed in the error.

#[tokio::test]
async fn a_wrong_key_is_not_echoed() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.send(&post("sk-very-secret-but-wrong", &asking(""))).await.read().await;
    assert!(!reply.text().contains("very-secret") && !reply.head.contains("very-secret"));
    node.finish().await;
}
