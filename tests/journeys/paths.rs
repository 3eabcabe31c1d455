//! Calls beside chat: completions, embeddings, images, sound; what they cost, and what is refused.

use std::time::Duration;

use serde_json::{Value, json};

use crate::node::{INPUT_NANO, KEY, Node, OUTPUT_NANO, Setup, asking, get};
use crate::upstream::{self, Act, DONE, Seen, Upstream, chunk, stream_end, stream_head, whole};
use gpt_cat::store::{Billed, EndReason, Line};

/// A request with this body, as bytes.
fn post_to(path: &str, content_type: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {KEY}\r\ncontent-type: {content_type}\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn post_json(path: &str, body: Value) -> Vec<u8> {
    post_to(path, "application/json", body.to_string())
}

/// One call, and its line.
async fn called(node: &Node, request: &[u8]) -> (crate::node::Reply, Line) {
    let reply = node.send(request).await.read().await;
    let line = node.lines(1).await.pop().unwrap();
    (reply, line)
}

fn path_of(seen: &Seen) -> String {
    seen.head.split(' ').nth(1).unwrap().to_owned()
}

fn text_completion(choices: Value, usage: Value) -> String {
    json!({ "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": choices, "usage": usage })
        .to_string()
}

/// `m` at 1.00 and 2.00 a million; `each` for 0.01 a call.
fn setup(upstream: &Upstream) -> Setup {
    Setup::at(upstream)
        .replacing(r#"models = ["m", "mapped", "hidden"]"#, r#"models = ["m", "mapped", "hidden", "each", "dall-e-2"]"#)
        .with("[models.each]\nper_call = \"0.01\"\n[models.\"dall-e-2\"]\nper_call = \"0.02\"\n")
}

const EACH_NANO: i64 = 10_000_000;

#[tokio::test]
async fn a_completion_passes_and_is_charged_by_its_usage() {
    let answer = text_completion(
        json!([{ "text": " there was a cat.", "index": 0, "logprobs": null, "finish_reason": "stop" }]),
        json!({ "prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9 }),
    );
    let body = answer.clone();
    let upstream = Upstream::start(move |_, _| whole(200, &body)).await;
    let node = setup(&upstream).start().await;
    let asked =
        json!({ "model": "m", "prompt": "Once upon a time", "max_tokens": 16, "logit_bias": { "50256": -100 } });
    let (reply, line) = called(&node, &post_json("/v1/completions", asked.clone())).await;
    assert_eq!((reply.status, reply.text()), (200, answer));
    let seen = &upstream.seen()[0];
    assert_eq!((path_of(seen), seen.json()), ("/v1/completions".into(), asked));
    assert_eq!((line.billed, line.charged_nano), (Billed::Usage, 4 * INPUT_NANO + 5 * OUTPUT_NANO));
    node.finish().await;
}

#[tokio::test]
async fn a_streamed_completion_is_counted_choice_by_choice_and_its_usage_chunk_stays_here() {
    let event = |index: u32, text: &str, finish: Value| {
        let choice = json!({ "text": text, "index": index, "logprobs": null, "finish_reason": finish });
        format!(
            "data: {}\n\n",
            json!({ "id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [choice] })
        )
    };
    let events = [
        event(0, "one two", Value::Null),
        event(1, "three", Value::Null),
        event(0, " four", "stop".into()),
        event(1, "", "stop".into()),
    ]
    .concat();
    let expected = format!("{events}{DONE}");
    let sent = format!("{events}{}{DONE}", upstream::usage(3, 4).replace("chat.completion.chunk", "text_completion"));
    let upstream = Upstream::start(move |_, _| upstream::stream(&sent)).await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "m", "prompt": ["a b c", [1, 2, 3]], "stream": true });
    let (reply, line) = called(&node, &post_json("/completions", asked)).await;
    assert_eq!((reply.status, reply.text(), reply.whole), (200, expected, true));
    assert_eq!(upstream.seen()[0].json()["stream_options"]["include_usage"], true);
    assert_eq!((line.billed, line.usage_output, line.counted_output), (Billed::Usage, Some(4), Some(4)));
    node.finish().await;
}

#[tokio::test]
async fn an_echoed_prompt_is_no_output() {
    let prompt = "the quick brown fox jumps over the lazy dog ".repeat(100);
    let answer = |usage: Value| {
        let text = format!("{prompt} and sleeps");
        text_completion(json!([{ "text": text, "index": 0, "finish_reason": "stop" }]), usage)
    };
    let answers =
        [answer(json!({ "prompt_tokens": 901, "completion_tokens": 3, "total_tokens": 904 })), answer(Value::Null)];
    let upstream = Upstream::start(move |number, _| whole(200, &answers[number])).await;
    let node = setup(&upstream).start().await;
    for _ in 0..2 {
        let asked = json!({ "model": "m", "prompt": prompt, "echo": true });
        node.send(&post_json("/v1/completions", asked)).await.read().await;
    }
    let lines = node.lines(2).await;
    assert_eq!((lines[0].billed, lines[0].output, lines[0].flagged), (Billed::Usage, 3, false));
    assert_eq!((lines[1].billed, lines[1].output), (Billed::Count, 2));
    node.finish().await;
}

#[tokio::test]
async fn several_echoed_prompts_are_each_taken_off_once() {
    let prompts: Vec<String> = (0..10).map(|n| format!("prompt {n} of several words")).collect();
    let choices: Vec<Value> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| json!({ "text": format!("{prompt} and more"), "index": index, "finish_reason": "stop" }))
        .collect();
    let answer = text_completion(choices.into(), Value::Null);
    let upstream = Upstream::start(move |_, _| whole(200, &answer)).await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "m", "prompt": prompts, "echo": true });
    let (_, line) = called(&node, &post_json("/v1/completions", asked)).await;
    assert_eq!((line.billed, line.output), (Billed::Count, 20));
    node.finish().await;
}

#[tokio::test]
async fn the_usage_of_the_best_of_several_is_billed_in_full() {
    let usage = json!({ "prompt_tokens": 4, "completion_tokens": 2000, "total_tokens": 2004 });
    let answer = text_completion(json!([{ "text": " word".repeat(100), "index": 0, "finish_reason": "stop" }]), usage);
    let upstream = Upstream::start(move |_, _| whole(200, &answer)).await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "m", "prompt": "Once upon a time", "max_tokens": 100, "best_of": 20 });
    let (_, line) = called(&node, &post_json("/v1/completions", asked)).await;
    assert_eq!((line.billed, line.output, line.flagged), (Billed::Usage, 2000, false));
    node.finish().await;
}

#[tokio::test]
async fn what_cannot_be_counted_is_held_for_by_its_bytes_however_little_money_there_is() {
    let upstream = Upstream::start(|_, _| whole(200, "{}")).await;
    let node = setup(&upstream).replacing("per_call = \"0.02\"", "input = \"1.00\"\noutput = \"0.00\"");
    let node = node.balance_nano(100 * INPUT_NANO).start().await;
    let asked = json!({ "model": "dall-e-2", "query": "x", "documents": ["a long document ".repeat(1000)] });
    let reply = node.send(&post_json("/v1/rerank", asked)).await.read().await;
    assert_eq!((reply.status, upstream.seen().len()), (429, 0));
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_behind_the_usage_pays_by_it() {
    let done = "event: transcript.text.done\ndata: {\"type\":\"transcript.text.done\",\"text\":\"Hello\",\"usage\":\
                {\"type\":\"tokens\",\"input_tokens\":14,\"output_tokens\":10,\"total_tokens\":24}}\n\n";
    let upstream = Upstream::start(move |_, _| vec![stream_head(), chunk(done), Act::AwaitClose]).await;
    let node = setup(&upstream).start().await;
    let form = form(&[("model", None, b"m"), ("file", Some("a.wav"), &[0; 1000])]);
    let mut connection = node.send(&post_to("/v1/audio/transcriptions", FORM, form)).await;
    connection.read_until("total_tokens").await;
    drop(connection);
    upstream.saw_close().await;
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.end_reason, line.billed), (EndReason::ClientGone, Billed::Usage));
    assert_eq!(line.charged_nano, 14 * INPUT_NANO + 10 * OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn a_stream_of_events_that_begins_with_an_error_costs_nothing() {
    let upstream = Upstream::start(|_, _| {
        upstream::stream("event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"overloaded\"}}\n\n")
    })
    .await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "each", "prompt": "a cat", "stream": true });
    let (reply, line) = called(&node, &post_json("/v1/images/generations", asked)).await;
    assert!(reply.text().contains("overloaded"));
    assert_eq!((line.billed, line.charged_nano), (Billed::Nothing, 0));
    node.finish().await;
}

#[tokio::test]
async fn the_best_of_several_is_held_for_all_of_them() {
    let upstream = Upstream::start(|_, _| whole(200, "{}")).await;
    // Ten answers of 100 tokens cost 0.002, one of them a tenth.
    let setup = setup(&upstream).with("[ledger]\non_low_balance = \"refuse\"\n");
    let node = setup.balance_nano(1_000_000).start().await;
    let asked = json!({ "model": "m", "prompt": "x", "max_tokens": 100, "best_of": 10 });
    let reply = node.send(&post_json("/v1/completions", asked)).await.read().await;
    assert_eq!((reply.status, reply.json()["error"]["code"].clone()), (429, "insufficient_quota".into()));
    assert!(upstream.seen().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn a_completion_whose_money_runs_out_ends_in_its_own_shape() {
    let word = |n: usize| {
        let choice = json!({ "text": format!(" w{n}"), "index": 0, "finish_reason": null });
        chunk(format!("data: {}\n\n", json!({ "object": "text_completion", "model": "m", "choices": [choice] })))
    };
    let upstream = Upstream::start(move |_, _| {
        let words = (0..5000).map(word);
        std::iter::once(stream_head()).chain(words).chain([Act::AwaitClose]).collect()
    })
    .await;
    let node = setup(&upstream).balance_nano(1_500 * OUTPUT_NANO).start().await;
    let asked = json!({ "model": "m", "prompt": "count", "stream": true });
    let (reply, line) = called(&node, &post_json("/v1/completions", asked)).await;
    let last = reply.text().lines().rev().filter_map(|line| line.strip_prefix("data: ")).nth(1).unwrap().to_owned();
    let last: Value = serde_json::from_str(&last).unwrap();
    assert_eq!((&last["object"], &last["choices"][0]["text"]), (&"text_completion".into(), &"".into()));
    assert_eq!((last["choices"][0]["finish_reason"].as_str(), reply.whole), (Some("length"), true));
    assert_eq!(line.end_reason, EndReason::Length);
    node.finish().await;
}

#[tokio::test]
async fn embeddings_of_any_input_pass_and_cost_their_prompt() {
    let answer = json!({ "object": "list", "model": "m",
        "data": [{ "object": "embedding", "index": 0, "embedding": [0.1, -1e-7, 3] }],
        "usage": { "prompt_tokens": 5, "total_tokens": 5 } });
    let body = answer.to_string();
    let upstream = Upstream::start(move |_, _| whole(200, &body)).await;
    let node = setup(&upstream).start().await;
    let inputs = [json!("hello"), json!(["a", "b"]), json!([1, 2, 3]), json!([[1], [2, 3]])];
    for input in &inputs {
        let asked = json!({ "model": "m", "input": input, "encoding_format": "base64" });
        let reply = node.send(&post_json("/v1/embeddings", asked.clone())).await.read().await;
        assert_eq!((reply.status, reply.json()), (200, answer.clone()));
        assert_eq!(upstream.seen().last().unwrap().json(), asked);
    }
    for line in node.lines(inputs.len()).await {
        assert_eq!((line.billed, line.input, line.charged_nano), (Billed::Usage, 5, 5 * INPUT_NANO));
    }
    node.finish().await;
}

#[tokio::test]
async fn embeddings_without_a_usage_are_counted_here() {
    let answer = json!({ "object": "list", "data": [{ "embedding": "AAAA" }, { "embedding": "AAAA" }] }).to_string();
    let upstream = Upstream::start(move |_, _| whole(200, &answer)).await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "m", "input": ["hello world", [5, 6, 7]] });
    let (reply, line) = called(&node, &post_json("/v1/embeddings", asked)).await;
    assert_eq!(reply.status, 200);
    assert_eq!((line.billed, line.input, line.output, line.charged_nano), (Billed::Count, 5, 0, 5 * INPUT_NANO));
    node.finish().await;
}

#[tokio::test]
async fn a_bad_prompt_or_input_is_refused_by_its_name() {
    let upstream = Upstream::start(|_, _| whole(200, "{}")).await;
    let node = setup(&upstream).start().await;
    for (path, body, param) in [
        ("/v1/completions", json!({ "model": "m" }), "prompt"),
        ("/v1/completions", json!({ "model": "m", "prompt": 7 }), "prompt"),
        ("/v1/completions", json!({ "model": "m", "prompt": ["a", 7] }), "prompt"),
        ("/v1/completions", json!({ "model": "m", "prompt": [{}] }), "prompt[0]"),
        ("/v1/completions", json!({ "model": "m", "prompt": vec!["a"; 100], "n": 100 }), "n"),
        ("/v1/completions", json!({ "model": "m", "prompt": "a", "best_of": 0 }), "best_of"),
        ("/v1/embeddings", json!({ "model": "m", "input": [] }), "input"),
        ("/v1/embeddings", json!({ "model": "m", "input": null }), "input"),
        ("/v1/embeddings", json!({ "model": "m", "input": vec!["a"; 2049] }), "input"),
        ("/v1/images/generations", json!({ "model": "each", "n": 0 }), "n"),
        ("/v1/rerank", json!({ "query": "x" }), "model"),
    ] {
        let reply = node.send(&post_json(path, body)).await.read().await;
        assert_eq!((reply.status, reply.json()["error"]["param"].clone()), (400, param.into()), "{path} {param}");
    }
    assert!(upstream.seen().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn images_cost_their_price_per_call_for_each_of_them() {
    let answer =
        json!({ "created": 1, "data": [{ "b64_json": "AAAA" }, { "b64_json": "BBBB" }, { "b64_json": "CCCC" }] });
    let body = answer.to_string();
    let upstream = Upstream::start(move |_, _| whole(200, &body)).await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "each", "prompt": "a cat", "n": 3 });
    let (reply, line) = called(&node, &post_json("/v1/images/generations", asked)).await;
    assert_eq!((reply.status, reply.json()), (200, answer));
    assert_eq!((line.units, line.charged_nano, line.hold_nano), (3, 3 * EACH_NANO, 3 * EACH_NANO));
    assert_eq!((line.billed, line.flagged), (Billed::Count, false));
    node.finish().await;
}

#[tokio::test]
async fn a_call_without_a_model_is_priced_as_the_one_that_its_provider_takes() {
    let upstream = Upstream::start(|_, _| whole(200, r#"{"data":[{"url":"https://x/y"}]}"#)).await;
    let setup =
        setup(&upstream).replacing(r#"{ mapped = "theirs" }"#, r#"{ mapped = "theirs", "dall-e-2" = "painter" }"#);
    let node = setup.start().await;
    let (reply, line) = called(&node, &post_json("/v1/images/generations", json!({ "prompt": "a cat" }))).await;
    assert_eq!((reply.status, line.charged_nano), (200, 20_000_000));
    assert_eq!(upstream.seen()[0].json(), json!({ "model": "painter", "prompt": "a cat" }));
    // A model that nobody priced is never free.
    let reply = node.send(&post_json("/v1/moderations", json!({ "input": "x" }))).await.read().await;
    assert_eq!((reply.status, reply.json()["error"]["code"].clone()), (404, "model_not_found".into()));
    node.finish().await;
}

#[tokio::test]
async fn a_provider_does_not_choose_the_model_that_a_request_leaves_out() {
    let upstream = Upstream::start(|_, _| whole(200, r#"{"data":[{"url":"https://x/y"}]}"#)).await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "prompt": "a cat", "background": "transparent" });
    node.send(&post_json("/v1/images/generations", asked)).await.read().await;
    let image = ("image", Some("a.png"), &b"png"[..]);
    node.send(&post_to("/v1/images/variations", FORM, form(&[image]))).await.read().await;
    let seen = upstream.seen();
    assert_eq!(seen[0].json()["model"], "dall-e-2");
    assert!(seen[1].body == form(&[("model", None, b"dall-e-2"), image]));
    node.lines(2).await;
    node.finish().await;
}

#[tokio::test]
async fn sound_streams_through_as_it_comes_and_costs_its_call() {
    let sound: Vec<u8> = (0..=255).cycle().take(50_000).collect();
    let body = sound.clone();
    let upstream = Upstream::start(move |_, _| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n";
        let mut acts = vec![Act::Write(head.as_bytes().to_vec()), chunk(&body[..20_000])];
        acts.extend([Act::Pause(Duration::from_millis(300)), chunk(&body[20_000..]), stream_end()]);
        acts
    })
    .await;
    let node = setup(&upstream).start().await;
    let asked = json!({ "model": "each", "input": "Hello", "voice": "alloy" });
    let mut connection = node.send(&post_json("/v1/audio/speech", asked)).await;
    let begun = connection.read_until("\u{1}").await;
    assert!(begun.body.len() < sound.len(), "the first part arrives before the second was sent");
    let reply = connection.read().await;
    assert_eq!((reply.status, reply.header("content-type"), reply.whole), (200, Some("audio/mpeg"), true));
    assert!(reply.body == sound);
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.charged_nano, line.end_reason, line.flagged), (EACH_NANO, EndReason::Complete, false));
    node.finish().await;
}

#[tokio::test]
async fn sound_of_a_known_length_keeps_it_and_one_that_breaks_off_is_not_whole() {
    let head = |length: usize| {
        Act::Write(
            format!("HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ncontent-length: {length}\r\n\r\n").into_bytes(),
        )
    };
    let upstream = Upstream::start(move |number, _| match number {
        0 => vec![head(4), Act::Write(b"RIFF".to_vec())],
        _ => vec![head(8), Act::Write(b"RIFF".to_vec()), Act::Close],
    })
    .await;
    let node = setup(&upstream).start().await;
    let asked = post_json("/v1/audio/speech", json!({ "model": "each", "input": "Hello" }));
    let reply = node.send(&asked).await.read().await;
    assert_eq!((reply.header("content-length"), reply.text()), (Some("4"), "RIFF".into()));
    let reply = node.send(&asked).await.read().await;
    assert_eq!((reply.status, reply.whole), (200, false));
    let lines = node.lines(2).await;
    assert_eq!((lines[0].end_reason, lines[1].end_reason), (EndReason::Complete, EndReason::UpstreamError));
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_while_sound_comes_pays_for_the_call_and_hangs_up_the_upstream() {
    let upstream = Upstream::start(|_, _| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n";
        vec![Act::Write(head.as_bytes().to_vec()), chunk("sound"), Act::AwaitClose]
    })
    .await;
    let node = setup(&upstream).start().await;
    let mut connection = node.send(&post_json("/v1/audio/speech", json!({ "model": "each", "input": "x" }))).await;
    connection.read_until("sound").await;
    drop(connection);
    upstream.saw_close().await;
    let line = node.lines(1).await.pop().unwrap();
    assert_eq!((line.end_reason, line.charged_nano), (EndReason::ClientGone, EACH_NANO));
    node.finish().await;
}

#[tokio::test]
async fn an_answer_that_nothing_measures_settles_at_its_hold_where_the_price_is_by_tokens() {
    let upstream = Upstream::start(|_, _| {
        vec![Act::Write(b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ncontent-length: 4\r\n\r\nRIFF".to_vec())]
    })
    .await;
    let node = setup(&upstream).with("max_output = 1000\n[models.unused]\ninput = \"1\"\noutput = \"1\"\n");
    let node = node.replacing("per_call = \"0.02\"", "input = \"1.00\"\noutput = \"2.00\"").start().await;
    let (_, line) = called(&node, &post_json("/v1/audio/speech", json!({ "model": "dall-e-2", "input": "x" }))).await;
    assert_eq!((line.billed, line.flagged, line.estimated), (Billed::Hold, true, true));
    assert_eq!(line.charged_nano, line.hold_nano);
    assert!(line.charged_nano > 1000 * OUTPUT_NANO, "{line:?}");
    node.finish().await;
}

#[tokio::test]
async fn events_that_are_no_completion_pass_and_their_usage_is_billed() {
    let events = "event: transcript.text.delta\ndata: {\"type\":\"transcript.text.delta\",\"delta\":\"Hel\"}\n\n\
                  event: transcript.text.done\ndata: {\"type\":\"transcript.text.done\",\"text\":\"Hello\",\"usage\":\
                  {\"type\":\"tokens\",\"input_tokens\":14,\"input_token_details\":{\"text_tokens\":0,\"audio_tokens\":14},\
                  \"output_tokens\":101,\"total_tokens\":115}}\n\n";
    let upstream = Upstream::start(move |_, _| upstream::stream(events)).await;
    let node = setup(&upstream).start().await;
    let form = form(&[("model", None, b"m"), ("stream", None, b"true"), ("file", Some("a.wav"), &[0; 1000])]);
    let (reply, line) = called(&node, &post_to("/v1/audio/transcriptions", FORM, form)).await;
    assert_eq!((reply.status, reply.text()), (200, events.to_owned()));
    assert_eq!((line.billed, line.usage_audio_input), (Billed::Usage, Some(14)));
    assert_eq!(line.charged_nano, 14 * INPUT_NANO + 101 * OUTPUT_NANO);
    node.finish().await;
}

const FORM: &str = "multipart/form-data; boundary=----cat";

fn form(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut form = Vec::new();
    for (name, filename, value) in parts {
        let filename = filename.map_or(String::new(), |filename| format!("; filename=\"{filename}\""));
        form.extend_from_slice(
            format!("------cat\r\nContent-Disposition: form-data; name=\"{name}\"{filename}\r\n\r\n").as_bytes(),
        );
        form.extend_from_slice(value);
        form.extend_from_slice(b"\r\n");
    }
    form.extend_from_slice(b"------cat--\r\n");
    form
}

#[tokio::test]
async fn a_form_reaches_the_upstream_byte_for_byte_wherever_its_model_stands() {
    let sound: Vec<u8> = (0..=255).rev().cycle().take(300_000).collect();
    let upstream =
        Upstream::start(|_, _| whole(200, r#"{"text":"Hello.","usage":{"type":"duration","seconds":3}}"#)).await;
    let node = setup(&upstream).start().await;
    let file = ("file", Some("a.mp3"), &sound[..]);
    for parts in [[("model", None, &b"each"[..]), file], [file, ("model", None, b"each")]] {
        let form = form(&parts);
        let reply = node.send(&post_to("/v1/audio/transcriptions", FORM, &form)).await.read().await;
        assert_eq!((reply.status, reply.json()["text"].clone()), (200, "Hello.".into()));
        let seen = upstream.seen().pop().unwrap();
        assert!(seen.body == form);
        let kind = "content-type: multipart/form-data; boundary=\"----cat\"";
        assert!(seen.head.to_ascii_lowercase().contains(kind), "{}", seen.head);
    }
    for line in node.lines(2).await {
        assert_eq!((line.charged_nano, line.flagged), (EACH_NANO, false));
    }
    node.finish().await;
}

#[tokio::test]
async fn a_form_is_sent_on_while_it_is_still_arriving() {
    let upstream = Upstream::start(|_, _| whole(200, r#"{"text":"Hello."}"#)).await;
    let node = setup(&upstream).start().await;
    let form = form(&[("model", None, b"each"), ("file", Some("a.mp3"), &[7; 200_000])]);
    let request = post_to("/v1/audio/transcriptions", FORM, &form);
    let mut connection = node.send(&request[..request.len() - 1000]).await;
    // The connection to the upstream is there although the form is not whole.
    for _ in 0..100 {
        if upstream.connections() > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!((upstream.connections(), upstream.seen().len()), (1, 0));
    tokio::io::AsyncWriteExt::write_all(&mut connection.socket, &request[request.len() - 1000..]).await.unwrap();
    assert_eq!(connection.read().await.status, 200);
    assert!(upstream.seen()[0].body == form);
    node.lines(1).await;
    node.finish().await;
}

#[tokio::test]
async fn a_mapped_model_is_renamed_in_a_form() {
    let upstream = Upstream::start(|_, _| whole(200, r#"{"created":1,"data":[{"b64_json":"AA"}]}"#)).await;
    let setup = setup(&upstream)
        .replacing(r#"{ mapped = "theirs" }"#, r#"{ each = "their-each", "dall-e-2" = "painter" }"#)
        .replacing(r#""m", "mapped","#, r#""m","#);
    let node = setup.start().await;
    let file = ("image", Some("a.png"), &b"\x89PNG\r\n"[..]);
    let named = form(&[file, ("model", None, b"each"), ("n", None, b"2")]);
    node.send(&post_to("/v1/images/edits", FORM, named)).await.read().await;
    let unnamed = form(&[file]);
    node.send(&post_to("/v1/images/variations", FORM, unnamed)).await.read().await;
    let seen = upstream.seen();
    assert!(seen[0].body == form(&[file, ("model", None, b"their-each"), ("n", None, b"2")]));
    assert!(seen[1].body == form(&[("model", None, b"painter"), file]));
    let lines = node.lines(2).await;
    assert_eq!((lines[0].units, lines[0].charged_nano), (2, 2 * EACH_NANO));
    assert_eq!((lines[1].model_asked.as_str(), lines[1].charged_nano), ("dall-e-2", 20_000_000));
    node.finish().await;
}

#[tokio::test]
async fn a_form_that_names_a_second_model_behind_its_file_never_reaches_an_upstream_whole() {
    let upstream = Upstream::start(|_, _| whole(200, "{}")).await;
    let node = setup(&upstream).start().await;
    let big = [0; 100_000];
    let (model, file) = (("model", None, &b"each"[..]), ("file", Some("a.mp3"), &big[..]));
    for (late, param) in [(("model", None, &b"dear"[..]), json!("model")), (("n", None, b"9"), json!("n"))] {
        let reply =
            node.send(&post_to("/v1/audio/transcriptions", FORM, form(&[model, file, late]))).await.read().await;
        assert_eq!((reply.status, reply.json()["error"]["param"].clone()), (400, param), "{}", reply.text());
    }
    // One that ends before its last boundary.
    let cut = &form(&[model, file])[..100_000];
    let reply = node.send(&post_to("/v1/audio/transcriptions", FORM, cut)).await.read().await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(upstream.seen().is_empty());
    for line in node.lines(3).await {
        assert_eq!(line.charged_nano, 0);
    }
    node.finish().await;
}

#[tokio::test]
async fn a_form_that_is_not_all_here_is_tried_once_and_one_that_is_as_often_as_any() {
    let upstream = Upstream::start(|number, _| match number {
        0 | 1 => whole(500, "{}"),
        _ => whole(200, r#"{"text":"Hello."}"#),
    })
    .await;
    let node = setup(&upstream).accounts(&[("first", 10), ("second", 10)]).start().await;
    let big = [0; 200_000];
    let long = form(&[("model", None, b"each"), ("file", Some("a.mp3"), &big)]);
    let reply = node.send(&post_to("/v1/audio/transcriptions", FORM, long)).await.read().await;
    assert_eq!((reply.status, upstream.seen().len()), (502, 1));
    // Its model stands last, so it was read whole.
    let whole = form(&[("file", Some("a.mp3"), &big), ("model", None, b"each")]);
    let reply = node.send(&post_to("/v1/audio/transcriptions", FORM, whole)).await.read().await;
    assert_eq!((reply.status, upstream.seen().len()), (200, 3));
    node.lines(2).await;
    node.finish().await;
}

#[tokio::test]
async fn a_model_that_cannot_be_called_at_a_path_is_refused_before_money_is_held() {
    let upstream = Upstream::start(|_, _| whole(200, "{}")).await;
    let demo = "[endpoints.demo]\ndialect = \"demo\"\nmodels = [\"demo\"]\n";
    let node = setup(&upstream).with(demo).start().await;
    let asked = json!({ "model": "demo", "input": "x" });
    let reply = node.send(&post_json("/v1/embeddings", asked)).await.read().await;
    assert_eq!((reply.status, reply.json()["error"]["code"].clone()), (400, "unsupported_path".into()));
    let reply = node.send(&post_json("/v1/files", json!({}))).await.read().await;
    assert_eq!(reply.status, 404);
    assert_eq!(
        node.store.lines(gpt_cat::store::LineFilter { limit: 10, ..Default::default() }).await.unwrap().len(),
        0
    );
    node.finish().await;
}

#[tokio::test]
async fn a_model_that_two_dialects_serve_is_called_where_the_path_exists() {
    let answer =
        json!({ "data": [{ "embedding": [1] }], "usage": { "prompt_tokens": 5, "total_tokens": 5 } }).to_string();
    let upstream = Upstream::start(move |_, _| whole(200, &answer)).await;
    // The demo chats only, and is as free as the account that has embeddings.
    let chats = "[endpoints.chats]\ndialect = \"demo\"\nmodels = [\"m\"]\n";
    let node = setup(&upstream).with(chats).start().await;
    for _ in 0..3 {
        let (reply, line) = called(&node, &post_json("/v1/embeddings", json!({ "model": "m", "input": "x" }))).await;
        assert_eq!((reply.status, line.tries, line.endpoint.as_deref()), (200, 1, Some("up")));
    }
    node.finish().await;
}

#[tokio::test]
async fn front_ends_read_the_balance_from_limit_less_usage() {
    let upstream = Upstream::start(|_, _| whole(200, &upstream::completion("Hello there", 1000, 2))).await;
    let node = setup(&upstream).balance_nano(2_500_000_000).start().await;
    let read = async |path: &str| node.send(&get(path)).await.read().await.json();
    let limit = read("/dashboard/billing/subscription").await;
    assert_eq!((limit["hard_limit_usd"].as_f64(), limit["object"].as_str()), (Some(2.5), Some("billing_subscription")));
    node.chat(&asking("")).await;
    let line = node.lines(1).await.pop().unwrap();
    // NextChat's own query.
    let used = read("/v1/dashboard/billing/usage?start_date=2026-01-01&end_date=2026-01-31").await;
    let charged = line.charged_nano as f64 / 1e9;
    assert!((used["total_usage"].as_f64().unwrap() - 100.0 * charged).abs() < 1e-9, "{used}");
    let limit = read("/v1/dashboard/billing/subscription").await["hard_limit_usd"].as_f64().unwrap();
    assert!((limit - 2.5).abs() < 1e-9, "{limit}");
    let unknown = b"GET /dashboard/billing/usage HTTP/1.1\r\nhost: gateway\r\n\r\n";
    assert_eq!(node.send(unknown).await.read().await.status, 401);
    node.finish().await;
}

#[tokio::test]
async fn models_show_their_price_as_the_key_is_charged() {
    let upstream = Upstream::start(|_, _| whole(200, "{}")).await;
    let node = setup(&upstream).start().await;
    let model = node.send(&get("/v1/models/m")).await.read().await.json();
    let pricing =
        json!({ "prompt": "0.000001", "completion": "0.000002", "input_cache_read": "0.000001", "request": "0" });
    assert_eq!((&model["pricing"], &model["context_length"]), (&pricing, &128_000.into()));
    let models = node.send(&get("/v1/models")).await.read().await.json();
    let each = models["data"].as_array().unwrap().iter().find(|model| model["id"] == "each").unwrap();
    assert_eq!(each["pricing"]["request"], "0.01");
    node.finish().await;
}
