//! Providers as they are in the wild: what each does differently, and what the line says of it.

use serde_json::{Value, json};

use crate::node::{INPUT_NANO, OUTPUT_NANO, Reply, Setup, streaming};
use crate::upstream::{self, Act, DONE, Upstream, delta, event, finish, stream, text, usage, whole};
use gpt_cat::store::{Billed, Line};

/// A stream of these events to a client that asks for its usage, and its line.
async fn streamed(events: String) -> (Reply, Line) {
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&streaming(r#","stream_options":{"include_usage":true}"#)).await;
    let line = node.lines(1).await.pop().unwrap();
    node.finish().await;
    (reply, line)
}

fn with_usage(choices: Value, usage: Value) -> String {
    let chunk =
        json!({ "id": "1", "object": "chat.completion.chunk", "model": "m", "choices": choices, "usage": usage });
    format!("data: {chunk}\n\n")
}

fn tokens(input: u64, output: u64) -> Value {
    json!({ "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output })
}

#[tokio::test]
async fn deepseeks_keep_alives_and_reasoning_pass_and_its_cache_hits_are_billed_as_cached() {
    let mut usage = tokens(100, 4);
    usage["prompt_cache_hit_tokens"] = 64.into();
    usage["prompt_cache_miss_tokens"] = 36.into();
    usage["completion_tokens_details"] = json!({ "reasoning_tokens": 2 });
    let events = [
        ": keep-alive\n\n: keep-alive\n\n".into(),
        delta(json!({ "role": "assistant", "content": null, "reasoning_content": "Two words" })),
        delta(json!({ "content": "Hello there", "reasoning_content": null })),
        with_usage(json!([{ "index": 0, "delta": { "content": "" }, "finish_reason": "stop" }]), usage),
        DONE.into(),
    ]
    .concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).replacing("[models.m]", "[models.m]\ncached_input = \"0.10\"").start().await;
    let prompt = "a long prompt of many words ".repeat(20);
    let reply = node.chat(&streaming("").replace("Say hello.", &prompt)).await;
    assert!(reply.text().contains("Two words") && reply.text().contains(": keep-alive"));
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.cached_input, line.usage_reasoning, line.counted_output), (64, Some(2), Some(4)));
    assert_eq!(line.charged_nano, 36 * INPUT_NANO + 64 * INPUT_NANO / 10 + 4 * OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn openrouters_comments_and_second_finish_pass_and_end_the_answer_once() {
    let events = [
        ": OPENROUTER PROCESSING\n\n".into(),
        text("Hello there"),
        finish(),
        with_usage(
            json!([{ "index": 0, "delta": { "role": "assistant", "content": "" }, "finish_reason": "stop" }]),
            tokens(5, 2),
        ),
        DONE.into(),
    ]
    .concat();
    let expected = events.clone();
    let (reply, line) = streamed(events).await;
    assert_eq!(reply.text(), expected);
    assert_eq!((line.billed, line.charged_nano), (Billed::Usage, 5 * INPUT_NANO + 2 * OUTPUT_NANO));
}

#[tokio::test]
async fn openrouters_error_in_a_stream_is_tried_elsewhere_before_content_and_told_behind_it() {
    let error = r#"{"id":"gen-1","error":{"code":502,"message":"Provider returned error"},"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}"#;
    let failed = format!(": OPENROUTER PROCESSING\n\ndata: {error}\n\n");
    let upstream = Upstream::start(move |number, _| match number {
        0 => stream(&failed),
        1 => stream(&[text("Hello"), finish(), usage(5, 1), DONE.into()].concat()),
        _ => stream(&[text("Hel"), failed.clone()].concat()),
    })
    .await;
    let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).start().await;
    assert_eq!(node.chat(&streaming("")).await.said(), "Hello");
    let broken = node.chat(&streaming("")).await;
    assert_eq!((broken.said(), broken.whole), ("Hel".into(), false));
    assert!(broken.text().contains(r#""error":{"#));
    let lines = node.lines(2).await;
    assert_eq!((lines[0].tries, lines[1].end_reason.name()), (2, "upstream_error"));
    node.finish().await;
}

#[tokio::test]
async fn azures_deployments_are_called_with_its_own_header_and_its_first_chunk_has_no_choices() {
    let filtered = json!({ "choices": [], "created": 0, "id": "", "model": "", "object": "",
        "prompt_filter_results": [{ "prompt_index": 0, "content_filter_results": {} }] });
    let events = [format!("data: {filtered}\n\n"), text("Hello there"), finish(), usage(5, 2), DONE.into()].concat();
    let expected = events.replace(&usage(5, 2), "");
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let setup = Setup::at(&upstream).replacing(r#"dialect = "openai""#, r#"dialect = "azure""#);
    let setup = setup.replacing(&format!("http://{}/v1", upstream.address), &format!("http://{}", upstream.address));
    let node =
        setup.replacing(r#"{ mapped = "theirs" }"#, r#"{ m = "my-deployment", mapped = "theirs" }"#).start().await;
    let reply = node.chat(&streaming("")).await;
    // The mapped name is put back where there is one.
    let expected = expected.replace(r#""model":"""#, r#""model":"m""#);
    assert_eq!((reply.status, reply.text()), (200, expected));
    let head = upstream.seen()[0].head.clone();
    let path = "POST /openai/deployments/my-deployment/chat/completions?api-version=2024-10-21 HTTP/1.1";
    assert!(head.starts_with(path), "{head}");
    assert!(head.contains("api-key: sk-upstream-first") && !head.to_lowercase().contains("authorization"), "{head}");
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.billed, line.model_upstream.as_deref()), (Billed::Usage, Some("my-deployment")));
    node.finish().await;
}

#[tokio::test]
async fn vllms_cumulative_usage_in_every_chunk_is_never_summed() {
    let chunk = |content: &str, output: u64, finish: Value| {
        with_usage(json!([{ "index": 0, "delta": { "content": content }, "finish_reason": finish }]), tokens(9, output))
    };
    let events = [
        chunk("", 0, Value::Null),
        chunk("one", 1, Value::Null),
        chunk(" two", 2, Value::Null),
        chunk(" three", 3, "stop".into()),
        with_usage(json!([]), tokens(9, 3)),
        DONE.into(),
    ]
    .concat();
    let (_, line) = streamed(events).await;
    assert_eq!((line.billed, line.charged_nano), (Billed::Usage, 9 * INPUT_NANO + 3 * OUTPUT_NANO));
}

#[tokio::test]
async fn mistrals_usage_comes_with_the_last_choice_and_its_content_may_be_parts() {
    let thinking = json!([{ "type": "thinking", "thinking": [{ "type": "text", "text": "Two words" }] }]);
    let events = [
        delta(json!({ "role": "assistant", "content": thinking })),
        text("Hello there"),
        with_usage(json!([{ "index": 0, "delta": { "content": "" }, "finish_reason": "stop" }]), tokens(5, 4)),
        DONE.into(),
    ]
    .concat();
    let (_, line) = streamed(events).await;
    assert_eq!((line.billed, line.counted_output, line.output), (Billed::Usage, Some(4), 4));
}

#[tokio::test]
async fn groqs_usage_of_its_own_beside_the_standard_one_changes_nothing() {
    let last = json!({ "id": "1", "object": "chat.completion.chunk", "model": "m",
        "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }],
        "x_groq": { "id": "req_1", "usage": { "queue_time": 0.01, "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7 } } });
    let events = [text("Hello there"), format!("data: {last}\n\n"), usage(5, 2), DONE.into()].concat();
    let (reply, line) = streamed(events.clone()).await;
    assert_eq!((reply.text(), line.billed, line.output), (events, Billed::Usage, 2));
}

#[tokio::test]
async fn xais_reasoning_beside_its_completion_tokens_is_output() {
    let mut usage = json!({ "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 107 });
    usage["completion_tokens_details"] = json!({ "reasoning_tokens": 100 });
    let events = [text("Hello there"), finish(), with_usage(json!([]), usage), DONE.into()].concat();
    let (_, line) = streamed(events).await;
    assert_eq!((line.billed, line.output, line.usage_reasoning), (Billed::Usage, 102, Some(100)));
}

#[tokio::test]
async fn ollama_and_llama_cpp_without_a_usage_are_counted_here() {
    let timings = json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }], "model": "m",
        "timings": { "prompt_n": 5, "predicted_n": 2 } });
    for last in [finish(), format!("data: {timings}\n\n")] {
        let (_, line) = streamed([text("Hello"), text(" there"), last, DONE.into()].concat()).await;
        assert_eq!((line.billed, line.output, line.estimated), (Billed::Count, 2, false));
        assert_eq!(line.charged_nano, line.input as i64 * INPUT_NANO + 2 * OUTPUT_NANO);
    }
}

#[tokio::test]
async fn a_usage_that_is_absurd_is_refused_and_the_answer_is_counted_here() {
    for absurd in [
        json!({ "prompt_tokens": -5, "completion_tokens": 2 }),
        json!({ "prompt_tokens": "5", "completion_tokens": 2 }),
        tokens(5, 1_000_000),
        tokens(200_000, 2),
        tokens(0, 0),
        json!([5, 2]),
    ] {
        let events = [text("Hello there"), finish(), with_usage(json!([]), absurd.clone()), DONE.into()].concat();
        let (_, line) = streamed(events).await;
        assert_eq!((line.billed, line.output, line.flagged), (Billed::Count, 2, true), "{absurd}");
    }
}

#[tokio::test]
async fn an_upstream_without_stream_options_is_not_asked_for_its_usage() {
    let upstream = Upstream::start(|_, _| stream(&[text("Hello"), finish(), DONE.into()].concat())).await;
    let setup = Setup::at(&upstream).replacing(r#"dialect = "openai""#, "dialect = \"openai\"\nstream_options = false");
    let node = setup.start().await;
    node.chat(&streaming("")).await;
    assert_eq!(upstream.seen()[0].json().get("stream_options"), None);
    node.lines(1).await;
    node.finish().await;
}

#[tokio::test]
async fn several_choices_that_end_apart_are_one_whole_answer_without_a_terminator() {
    let ended = |index: u32| event(json!([{ "index": index, "delta": {}, "finish_reason": "stop" }]));
    let events = [text("Hello"), ended(1), ended(0)].concat();
    let upstream = Upstream::start(move |_, _| {
        let mut acts = vec![upstream::stream_head(), upstream::chunk(&events), upstream::stream_end()];
        acts.push(Act::Close);
        acts
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&streaming(r#","n":2"#)).await;
    assert!(reply.whole);
    assert_eq!(node.lines(1).await[0].end_reason.name(), "complete");
    node.finish().await;
}

#[tokio::test]
async fn an_upstreams_refusal_in_any_shape_reaches_the_client_with_its_status() {
    for (body, message) in [
        (r#"{"error":{"message":"bad","type":"invalid_request_error"}}"#, "bad"),
        (r#"{"error":"bad"}"#, "bad"),
        (r#"{"object":"error","message":"bad","type":"BadRequestError","code":400}"#, "bad"),
        (r#"{"message":"bad"}"#, "bad"),
        (r#"{"detail":"bad"}"#, r#"{"detail":"bad"}"#),
        ("bad", "bad"),
    ] {
        let upstream = Upstream::start(move |_, _| whole(400, body)).await;
        let node = Setup::at(&upstream).start().await;
        let reply = node.chat(&streaming("")).await;
        assert_eq!((reply.status, reply.json()["error"]["message"].as_str()), (400, Some(message)), "{body}");
        assert!(reply.json()["error"]["type"].is_string());
        node.finish().await;
    }
}
