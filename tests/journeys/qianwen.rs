//! Qwen over DashScope's native protocol, through the whole gateway.

use serde_json::{Value, json};

use crate::node::{INPUT_NANO, Node, OUTPUT_NANO, Setup, asking, streaming};
use crate::upstream::{Act, Upstream, chunk, stream, stream_end, stream_head, whole};
use gpt_cat::store::{Billed, EndReason};

async fn node(upstream: &Upstream, accounts: &[(&'static str, u32)]) -> Node {
    let setup = Setup::at(upstream).replacing(r#"dialect = "openai""#, r#"dialect = "qianwen""#);
    let setup =
        setup.replacing(&format!("http://{}/v1", upstream.address), &format!("http://{}/api/v1", upstream.address));
    setup
        .replacing(r#"{ mapped = "theirs" }"#, r#"{ m = "qwen-plus", mapped = "qwen-vl-max" }"#)
        .accounts(accounts)
        .start()
        .await
}

fn event(message: Value, finish: &str, usage: (u64, u64)) -> String {
    let data = json!({ "output": { "choices": [{ "message": message, "index": 0, "finish_reason": finish }] },
        "usage": { "input_tokens": usage.0, "output_tokens": usage.1, "total_tokens": usage.0 + usage.1 }, "request_id": "r1" });
    format!("id:1\nevent:result\n:HTTP_STATUS/200\ndata:{data}\n\n")
}

fn said(text: &str, finish: &str, usage: (u64, u64)) -> String {
    event(json!({ "role": "assistant", "content": text }), finish, usage)
}

fn error(status: u16, code: &str) -> String {
    let data = json!({ "code": code, "message": "as it is", "request_id": "r1" });
    format!("id:1\nevent:error\n:HTTP_STATUS/{status}\ndata:{data}\n\n")
}

fn answer(text: &str, input: u64, output: u64) -> String {
    json!({ "output": { "choices": [{ "finish_reason": "stop", "message": { "role": "assistant", "content": text } }] },
        "usage": { "input_tokens": input, "output_tokens": output, "total_tokens": input + output }, "request_id": "r1" })
    .to_string()
}

#[tokio::test]
async fn a_whole_answer_is_openais_and_charged_by_the_mapped_usage() {
    let upstream = Upstream::start(|_, _| whole(200, &answer("Hello there", 9, 2))).await;
    let node = node(&upstream, &[("first", 9)]).await;
    let reply = node.chat(&asking(r#","temperature":0.5,"enable_search":true"#)).await;
    let answer = reply.json();
    assert_eq!((reply.status, &answer["model"], &answer["object"]), (200, &"m".into(), &"chat.completion".into()));
    assert_eq!(answer["choices"][0]["message"], json!({ "role": "assistant", "content": "Hello there" }));
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11 }));
    let seen = &upstream.seen()[0];
    assert!(seen.head.starts_with("POST /api/v1/services/aigc/text-generation/generation HTTP/1.1"), "{}", seen.head);
    assert!(seen.head.contains("authorization: Bearer sk-upstream-first") && !seen.head.contains("x-dashscope-sse"));
    assert_eq!(
        seen.json(),
        json!({ "model": "qwen-plus", "input": { "messages": [{ "role": "user", "content": "Say hello." }] },
        "parameters": { "temperature": 0.5, "enable_search": true, "result_format": "message" } })
    );
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.billed, line.charged_nano), (Billed::Usage, 9 * INPUT_NANO + 2 * OUTPUT_NANO));
    assert_eq!(line.model_upstream.as_deref(), Some("qwen-plus"));
    node.finish().await;
}

#[tokio::test]
async fn a_stream_with_reasoning_and_tools_reads_as_openais() {
    let call = |id: &str, arguments: &str| {
        json!({ "role": "assistant", "content": "",
            "tool_calls": [{ "index": 0, "id": id, "type": "function", "function": { "name": if id.is_empty() { "" } else { "f" }, "arguments": arguments } }] })
    };
    let events = [
        event(json!({ "role": "assistant", "content": "", "reasoning_content": "Two words" }), "null", (9, 2)),
        said("Hello", "null", (9, 3)),
        said(" there", "null", (9, 4)),
        event(call("c1", "{\"a\":"), "null", (9, 8)),
        event(call("", "1}"), "tool_calls", (9, 10)),
    ]
    .concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = node(&upstream, &[("first", 9)]).await;
    let reply = node
        .chat(&streaming(
            r#","stream_options":{"include_usage":true},"tools":[{"type":"function","function":{"name":"f"}}]"#,
        ))
        .await;
    assert_eq!((reply.status, reply.said(), reply.whole), (200, "Hello there".into(), true));
    let text = reply.text();
    assert!(
        text.contains(r#""reasoning_content":"Two words""#) && text.contains(r#""finish_reason":"tool_calls""#),
        "{text}"
    );
    assert!(text.contains(r#""usage":{"completion_tokens":10,"prompt_tokens":9,"total_tokens":19}"#), "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"));
    let seen = &upstream.seen()[0];
    assert!(seen.head.contains("x-dashscope-sse: enable") && seen.head.contains("accept: text/event-stream"));
    let parameters = &seen.json()["parameters"];
    assert_eq!(
        (&parameters["incremental_output"], &parameters["tools"][0]["function"]["name"]),
        (&true.into(), &"f".into())
    );
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.billed, line.output, line.end_reason), (Billed::Usage, 10, EndReason::Complete));
    node.finish().await;
}

#[tokio::test]
async fn a_usage_that_the_client_did_not_ask_for_stays_here() {
    let events = [said("Hello", "null", (9, 1)), said("", "stop", (9, 1))].concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = node(&upstream, &[("first", 9)]).await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!((reply.said(), reply.text().contains("completion_tokens")), ("Hello".into(), false));
    assert_eq!(node.lines(1).await[0].billed, Billed::Usage);
    node.finish().await;
}

#[tokio::test]
async fn an_error_before_content_is_tried_with_another_account_and_one_behind_it_is_told() {
    let upstream = Upstream::start(|number, _| match number {
        0 => stream(&error(429, "Throttling.RateQuota")),
        1 => stream(&[said("Hello", "null", (9, 1)), said("", "stop", (9, 1))].concat()),
        _ => stream(&[said("Hel", "null", (9, 1)), error(500, "InternalError")].concat()),
    })
    .await;
    let node = node(&upstream, &[("first", 9), ("second", 9)]).await;
    assert_eq!(node.chat(&streaming("")).await.said(), "Hello");
    let broken = node.chat(&streaming("")).await;
    assert_eq!((broken.said(), broken.whole), ("Hel".into(), false));
    assert!(broken.text().contains(r#""error":{"#) && !broken.text().contains("[DONE]"), "{}", broken.text());
    // The account that was throttled rests: the third call went to the other one at once.
    let keys: Vec<bool> = upstream.seen().iter().map(|seen| seen.head.contains("sk-upstream-first")).collect();
    assert_eq!(keys, [true, false, false]);
    let lines = node.lines(2).await;
    assert_eq!((lines[0].tries, lines[1].end_reason), (2, EndReason::UpstreamError));
    node.finish().await;
}

#[tokio::test]
async fn a_refusal_of_the_request_itself_reaches_the_client_in_either_framing() {
    let plain = json!({ "code": "InvalidParameter", "message": "as it is", "request_id": "r1" }).to_string();
    let upstream = Upstream::start(move |number, _| match number {
        0 => whole(400, &plain),
        1 => whole(400, &error(400, "InvalidParameter")),
        2 => stream(&error(400, "InvalidParameter")),
        _ => whole(400, &json!({ "code": "DataInspectionFailed", "message": "as it is" }).to_string()),
    })
    .await;
    let node = node(&upstream, &[("first", 9), ("second", 9)]).await;
    for (body, code) in [
        (asking(""), "InvalidParameter"),
        (streaming(""), "InvalidParameter"),
        (streaming(""), "InvalidParameter"),
        (asking(""), "content_policy_violation"),
    ] {
        let reply = node.chat(&body).await;
        let error = reply.json()["error"].clone();
        assert_eq!((reply.status, &error["message"], &error["code"]), (400, &"as it is".into(), &code.into()));
    }
    assert_eq!(upstream.seen().len(), 4);
    for line in node.lines(4).await {
        assert_eq!(line.charged_nano, 0);
    }
    node.finish().await;
}

#[tokio::test]
async fn what_cannot_be_represented_is_a_400_before_anybody_is_called() {
    let upstream = Upstream::start(|_, _| whole(200, &answer("Hello", 9, 1))).await;
    let node = node(&upstream, &[("first", 9)]).await;
    let reply = node.chat(&asking(r#","frequency_penalty":1"#)).await;
    assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &"frequency_penalty".into()));
    assert!(upstream.seen().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn a_picture_goes_to_the_multimodal_path() {
    let upstream = Upstream::start(|_, _| {
        let answer = json!({ "output": { "choices": [{ "finish_reason": "stop", "message": { "role": "assistant", "content": [{ "text": "A cat." }] } }] },
            "usage": { "input_tokens": 800, "output_tokens": 3, "image_tokens": 790 }, "request_id": "r1" });
        whole(200, &answer.to_string())
    })
    .await;
    let node = node(&upstream, &[("first", 9)]).await;
    let body = r#"{"model":"mapped","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://x/y.png"}},{"type":"text","text":"What?"}]}]}"#;
    let reply = node.chat(body).await;
    assert_eq!(
        (&reply.json()["choices"][0]["message"]["content"], &reply.json()["model"]),
        (&"A cat.".into(), &"mapped".into())
    );
    assert!(upstream.seen()[0].head.contains("/multimodal-generation/generation"));
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.input, line.usage_image_input, line.billed), (800, Some(790), Billed::Usage));
    node.finish().await;
}

#[tokio::test]
async fn a_stream_that_breaks_off_or_ends_early_never_looks_complete() {
    let begun = said("Hello", "null", (9, 1));
    let upstream = Upstream::start(move |number, _| match number {
        0 => vec![stream_head(), chunk(&begun), Act::Close],
        _ => vec![stream_head(), chunk(&begun), stream_end()],
    })
    .await;
    let node = node(&upstream, &[("first", 9)]).await;
    for _ in 0..2 {
        let reply = node.chat(&streaming("")).await;
        assert_eq!((reply.said(), reply.whole, reply.text().contains("[DONE]")), ("Hello".into(), false, false));
    }
    for line in node.lines(2).await {
        assert_eq!((line.end_reason, line.output), (EndReason::UpstreamError, 1));
    }
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_the_upstreams_stream_and_pays_for_what_it_got() {
    let begun = said("Hello there", "null", (9, 2));
    let upstream = Upstream::start(move |_, _| vec![stream_head(), chunk(&begun), Act::AwaitClose]).await;
    let node = node(&upstream, &[("first", 9)]).await;
    let mut connection = node.send(&crate::node::post(crate::node::KEY, &streaming(""))).await;
    connection.read_until("Hello there").await;
    drop(connection);
    upstream.saw_close().await;
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.end_reason, line.output, line.billed), (EndReason::ClientGone, 2, Billed::Count));
    node.finish().await;
}
