//! What passes between client and upstream, and how: bytes, heads, failover, waiting, bounds.

use std::time::Duration;

use crate::node::{KEY, Setup, asking, get, post, streaming};
use crate::upstream::{
    Act, DONE, Upstream, chunk, completion, finish, stream, stream_end, stream_head, text, usage, whole, whole_with,
};
use serde_json::json;

#[tokio::test]
async fn the_usage_chunk_reaches_a_client_that_asked_for_it() {
    let events = [text("Hello"), finish(), usage(3, 1), DONE.into()].concat();
    let sent = events.clone();
    let upstream = Upstream::start(move |_, _| stream(&sent)).await;
    let node = Setup::at(&upstream).start().await;
    let body = streaming(r#","stream_options":{"include_usage":true}"#);
    assert_eq!(node.chat(&body).await.text(), events);
    assert_eq!(upstream.seen()[0].body, body.as_bytes(), "nothing had to be spliced in");
    node.finish().await;
}

#[tokio::test]
async fn the_usage_chunk_is_asked_for_and_taken_out_for_a_client_that_did_not() {
    for size in [1, 5, 10_000] {
        let events = [text("Hello"), finish(), usage(3, 1), DONE.into()].concat();
        let upstream = Upstream::start(move |_, _| {
            let chunks = events.as_bytes().chunks(size).map(chunk);
            [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
        })
        .await;
        let node = Setup::at(&upstream).start().await;
        let reply = node.chat(&streaming("")).await;
        assert_eq!(reply.text(), [text("Hello"), finish(), DONE.into()].concat());
        assert_eq!(upstream.seen()[0].json()["stream_options"], json!({ "include_usage": true }));
        assert_eq!(node.lines(1).await[0].billed.name(), "usage");
        node.finish().await;
    }
}

/// Streams `events` and nothing behind them, cut in pieces of `size`.
async fn streamed_in(size: usize, events: String) -> Upstream {
    Upstream::start(move |_, _| {
        let chunks = events.as_bytes().chunks(size).map(chunk);
        [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
    })
    .await
}

#[tokio::test]
async fn a_last_event_without_its_blank_line_is_read_like_any_other() {
    let unended = |events: String| events.trim_end().to_owned();
    let mapped = |text: &str| text.replace(r#""model":"m""#, r#""model":"mapped""#);
    for size in [1, 60, 10_000] {
        // A usage that nobody asked for is billed and taken out.
        let upstream = streamed_in(size, unended([text("Hello"), finish(), usage(3, 1)].concat())).await;
        let node = Setup::at(&upstream).start().await;
        assert_eq!(node.chat(&streaming("")).await.text(), [text("Hello"), finish()].concat());
        assert_eq!(node.lines(1).await[0].billed.name(), "usage");
        node.finish().await;

        // The model's name comes back under its own.
        let theirs = [text("Hello"), finish()].concat().replace(r#""model":"m""#, r#""model":"theirs""#);
        let upstream = streamed_in(size, unended(theirs)).await;
        let node = Setup::at(&upstream).start().await;
        let streamed = node.chat(&mapped(&streaming(""))).await.text();
        assert_eq!(streamed.trim_end(), unended(mapped(&[text("Hello"), finish()].concat())), "cut in {size}");
        node.finish().await;
    }
}

#[tokio::test]
async fn half_of_a_last_event_is_not_handed_over() {
    for size in [1, 60, 10_000] {
        let half = text("never").trim_end().trim_end_matches('}').to_owned();
        let upstream = streamed_in(size, text("Hello") + &half).await;
        let node = Setup::at(&upstream).start().await;
        let reply = node.chat(&streaming("")).await;
        let (answer, error) = reply.text().split_once("\n\n").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        assert_eq!(answer, text("Hello").trim_end());
        assert!(error.starts_with(r#"data: {"error":{"#), "{error}");
        assert!(!error.contains("never"));
        assert_eq!(node.lines(1).await[0].end_reason.name(), "upstream_error");
        node.finish().await;
    }
}

#[tokio::test]
async fn a_mapped_model_goes_up_under_its_other_name_and_comes_back_under_its_own() {
    for size in [1, 60, 10_000] {
        let theirs = |event: String| event.replace(r#""model":"m""#, r#""model":"theirs""#);
        let events = theirs([text("Hello"), text(" \"model\":\"theirs\""), finish()].concat()) + DONE;
        let answer = completion("Hello", 3, 1).replace(r#""model":"m""#, r#""model":"theirs""#);
        let upstream = Upstream::start(move |_, seen| match seen.json()["stream"] == json!(true) {
            true => {
                let chunks = events.as_bytes().chunks(size).map(chunk);
                [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
            }
            false => whole(200, &answer),
        })
        .await;
        let node = Setup::at(&upstream).start().await;
        let mapped = |body: String| body.replace(r#""model":"m""#, r#""model":"mapped""#);
        let streamed = node.chat(&mapped(streaming(""))).await.text();
        let ours = |event: String| event.replace(r#""model":"m""#, r#""model":"mapped""#);
        assert_eq!(
            streamed,
            ours([text("Hello"), text(" \"model\":\"theirs\""), finish()].concat()) + DONE,
            "cut in {size}"
        );
        assert_eq!(node.chat(&mapped(asking(""))).await.text(), ours(completion("Hello", 3, 1)));
        assert!(upstream.seen().iter().all(|seen| seen.json()["model"] == "theirs"));
        let lines = node.lines(2).await;
        assert_eq!((lines[0].model.as_str(), lines[0].model_upstream.as_deref()), ("mapped", Some("theirs")));
        node.finish().await;
    }
}

#[tokio::test]
async fn a_frame_leaves_at_once_and_not_with_the_next() {
    let upstream = Upstream::start(|_, _| {
        vec![stream_head(), chunk(text("first")), chunk(text("second")), Act::Pause(Duration::from_secs(5))]
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let mut connection = node.send(&post(KEY, &streaming(""))).await;
    connection.read_until("second").await; // long before the upstream says more
    drop(connection);
    node.finish().await;
}

#[tokio::test]
async fn client_credentials_stop_here_and_upstream_headers_do_not_travel_back() {
    let upstream = Upstream::start(|_, _| {
        whole_with(200, "set-cookie: a=b\r\nopenai-organization: org-1\r\nx-ratelimit-remaining-requests: 1\r\nx-request-id: theirs\r\n", &completion("hi", 1, 1))
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let body = asking("");
    let request = String::from_utf8(post(KEY, &body))
        .unwrap()
        .replace("host: gateway", "host: gateway\r\ncookie: c=d\r\nx-api-key: k");
    let reply = node.send(request.as_bytes()).await.read().await;
    for header in ["set-cookie", "openai-organization", "x-ratelimit-remaining-requests"] {
        assert_eq!(reply.header(header), None);
    }
    assert_ne!(reply.header("x-request-id").unwrap(), "theirs");
    let head = upstream.seen()[0].head.to_ascii_lowercase();
    assert!(head.contains("authorization: bearer sk-upstream-first") && head.contains("accept-encoding: identity"));
    assert!(!head.contains(KEY) && !head.contains("cookie") && !head.contains("x-api-key"), "{head}");
    node.finish().await;
}

#[tokio::test]
async fn another_account_answers_when_one_is_busy_broken_refused_or_talks_garbage() {
    let failures: [fn() -> Vec<Act>; 6] = [
        || whole_with(429, "retry-after: 1\r\n", "{}"),
        || whole(503, "busy"),
        || whole(401, r#"{"error":{"message":"Incorrect API key provided: sk-up*****rst"}}"#),
        || vec![Act::Close],
        || whole(200, "<html>not an answer</html>"),
        || vec![Act::Write(b"garbage garbage\r\n\r\n".to_vec()), Act::Close],
    ];
    for failure in failures {
        for body in [asking(""), streaming("")] {
            let upstream = Upstream::start(move |_, seen| {
                if seen.head.contains("sk-upstream-first") {
                    return failure();
                }
                match seen.json()["stream"] == json!(true) {
                    true => stream(&[text("hi"), finish(), DONE.into()].concat()),
                    false => whole(200, &completion("hi", 1, 1)),
                }
            })
            .await;
            let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).start().await;
            let reply = node.chat(&body).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            let line = &node.lines(1).await[0];
            assert_eq!((line.tries, line.status), (2, 200));
            node.finish().await;
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_is_a_502() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let address = upstream.address.to_string();
    let node = Setup::at(&upstream).replacing(&address, "127.0.0.1:1").start().await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!(reply.status, 502);
    assert!(!reply.text().contains("127.0.0.1"), "no address of ours or theirs: {}", reply.text());
    node.finish().await;
}

#[tokio::test]
async fn a_pool_that_is_limited_everywhere_says_when_to_come_back() {
    let upstream = Upstream::start(|_, _| whole_with(429, "retry-after: 7\r\n", "{}")).await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&asking("")).await;
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("7")));
    assert_eq!(reply.json()["error"]["code"], "rate_limit_exceeded");
    assert_eq!(reply.header("x-should-retry"), None);
    node.finish().await;
}

#[tokio::test]
async fn a_refusal_of_the_request_itself_comes_back_cleaned_and_is_not_retried() {
    let refusal = r#"{"error":{"message":"The model theirs in org-Ab1 with sk-upstream-first says: bad temperature","type":"invalid_request_error","param":"temperature","code":"bad"}}"#;
    let upstream = Upstream::start(move |_, _| whole(400, refusal)).await;
    let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).start().await;
    let reply = node.chat(&streaming("").replace(r#""model":"m""#, r#""model":"mapped""#)).await;
    assert_eq!((reply.status, upstream.seen().len()), (400, 1));
    let error = &reply.json()["error"];
    assert_eq!(error["message"], "The model mapped in *** with *** says: bad temperature");
    assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some("temperature"), Some("bad")));
    node.finish().await;
}

#[tokio::test]
async fn a_pooled_connection_that_closed_meanwhile_costs_no_try() {
    let upstream = Upstream::start(|_, _| [whole(200, &completion("hi", 1, 1)), vec![Act::Close]].concat()).await;
    let node = Setup::at(&upstream).start().await;
    for _ in 0..5 {
        assert_eq!(node.chat(&asking("")).await.status, 200);
    }
    assert!(node.lines(5).await.iter().all(|line| line.tries == 1));
    node.finish().await;
}

#[tokio::test]
async fn calls_wait_for_an_account_instead_of_failing() {
    let upstream = Upstream::start(|_, _| {
        [vec![Act::Pause(Duration::from_millis(100))], whole(200, &completion("hi", 1, 1))].concat()
    })
    .await;
    let node = std::sync::Arc::new(Setup::at(&upstream).accounts(&[("first", 1)]).start().await);
    let calls: Vec<_> = (0..5)
        .map(|_| {
            let node = node.clone();
            tokio::spawn(async move { node.chat(&asking("")).await.status })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    std::sync::Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn a_silent_stream_gets_comments_and_a_head_before_its_content() {
    let upstream = Upstream::start(|number, _| match number {
        0 => vec![Act::Pause(Duration::from_millis(1500)), Act::Close],
        _ => vec![
            stream_head(),
            chunk(text("Hello")),
            Act::Pause(Duration::from_millis(1500)),
            chunk(text(" world") + &finish() + DONE),
            stream_end(),
        ],
    })
    .await;
    let setup = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]);
    let node = setup.replacing("drain_s = 3", "drain_s = 3\nkeep_alive_s = 1").start().await;
    let reply = node.chat(&streaming("")).await;
    // The first account failed after the head was out; the second one answered as if nothing had been.
    assert_eq!((reply.status, reply.said().as_str(), reply.whole), (200, "Hello world", true));
    assert!(reply.text().starts_with(": keep-alive\n"));
    assert!(reply.text().split("Hello").nth(1).unwrap().contains("\n\n: keep-alive\ndata: "), "{}", reply.text());
    assert_eq!(node.lines(1).await[0].tries, 2);
    node.finish().await;
}

#[tokio::test]
async fn a_failure_after_the_head_is_one_error_event_and_a_broken_connection() {
    let upstream = Upstream::start(|_, _| vec![Act::Pause(Duration::from_millis(1500)), Act::Close]).await;
    let node = Setup::at(&upstream).replacing("drain_s = 3", "drain_s = 3\nkeep_alive_s = 1").start().await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!((reply.status, reply.whole), (200, false));
    assert_eq!(reply.text().matches(r#"data: {"error":"#).count(), 1);
    assert_eq!(node.lines(1).await[0].charged_nano, 0);
    node.finish().await;
}

#[tokio::test]
async fn a_stream_without_done_is_whole_when_every_choice_has_ended() {
    let events = [text("Hello"), finish()].concat();
    let sent = events.clone();
    let upstream = Upstream::start(move |_, _| stream(&sent)).await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!((reply.text(), reply.whole), (events, true));
    assert_eq!(node.lines(1).await[0].end_reason.name(), "complete");
    node.finish().await;
}

#[tokio::test]
async fn an_error_within_a_stream_ends_it_as_an_error() {
    let events = [text("Hello"), "data: {\"error\":{\"message\":\"overloaded\"}}\n\n".into(), DONE.into()].concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(!reply.whole && !reply.text().contains("[DONE]"));
    assert_eq!(node.lines(1).await[0].end_reason.name(), "upstream_error");
    node.finish().await;
}

#[tokio::test]
async fn a_slow_reader_gets_everything() {
    let events = format!("{}{}{}", text(&"long text ".repeat(50)).repeat(2000), finish(), DONE);
    let sent = events.clone();
    let upstream = Upstream::start(move |_, _| stream(&sent)).await;
    let node = Setup::at(&upstream).start().await;
    let connection = node.send(&post(KEY, &streaming(""))).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let reply = connection.read().await;
    assert!(reply.whole && reply.body == events.as_bytes());
    node.finish().await;
}

#[tokio::test]
async fn a_frame_larger_than_what_is_held_passes_on_as_it_comes() {
    let events = [text(&"word ".repeat(60_000)), finish(), DONE.into()].concat();
    let sent = events.clone();
    let upstream = Upstream::start(move |_, _| {
        let chunks = sent.as_bytes().chunks(10_000).map(chunk);
        [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(reply.whole && reply.body == events.as_bytes());
    let line = &node.lines(1).await[0];
    assert!(line.estimated && (50_000..70_000).contains(&line.output), "{line:?}");
    node.finish().await;
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong_and_cost_nothing() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).replacing("drain_s = 3", "drain_s = 3\nbody_bytes_max = 65536").start().await;
    let deep = format!(
        r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}],"x":{}1{}}}"#,
        "[".repeat(200),
        "]".repeat(200)
    );
    for (body, status, param) in [
        ("", 400, None),
        ("not json", 400, None),
        ("[]", 400, None),
        (r#"{"messages":[{"role":"user","content":"x"}]}"#, 400, Some("model")),
        (r#"{"model":"m"}"#, 400, Some("messages")),
        (r#"{"model":"m","messages":"hello"}"#, 400, Some("messages")),
        (r#"{"model":1,"messages":[{"role":"user","content":"x"}]}"#, 400, Some("model")),
        (r#"{"model":"m","model":"hidden","messages":[{"role":"user","content":"x"}]}"#, 400, Some("model")),
        (r#"{"model":"m","n":1000,"messages":[{"role":"user","content":"x"}]}"#, 400, Some("n")),
        (deep.as_str(), 400, None),
        (r#"{"model":"unheard-of","messages":[{"role":"user","content":"x"}]}"#, 404, Some("model")),
    ] {
        let reply = node.chat(body).await;
        assert_eq!(reply.status, status, "{body}: {}", reply.text());
        assert_eq!(reply.json()["error"]["param"].as_str(), param, "{body}: {}", reply.text());
    }
    let large = asking(&format!(r#","x":"{}""#, "x".repeat(70_000)));
    assert_eq!(node.chat(&large).await.status, 413);
    let form =
        String::from_utf8(post(KEY, "a=b")).unwrap().replace("application/json", "application/x-www-form-urlencoded");
    assert_eq!(node.send(form.as_bytes()).await.read().await.status, 415);
    assert!(upstream.seen().is_empty());
    assert_eq!(node.balance_nano().await, 1_000_000_000);
    node.finish().await;
}

#[tokio::test]
async fn other_paths_and_methods_are_told_what_exists() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    let unknown = node.send(&get("/v1/threads")).await.read().await;
    assert_eq!((unknown.status, unknown.json()["error"]["type"].as_str()), (404, Some("invalid_request_error")));
    assert!(unknown.text().contains("/v1/chat/completions"));
    let wrong = node.send(&get("/chat/completions")).await.read().await;
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("POST")));
    for path in ["/healthz", "/readyz"] {
        assert_eq!(node.send(&get(path)).await.read().await.status, 200);
    }
    let model = node.send(&get("/models/m")).await.read().await;
    assert_eq!((model.status, model.json()["id"].as_str()), (200, Some("m")));
    assert_eq!(node.send(&get("/v1/models/nope")).await.read().await.status, 404);
    let list = node.send(&get("/v1/models")).await.read().await.json();
    assert_eq!(list["data"].as_array().unwrap().len(), 3);
    node.finish().await;
}

#[tokio::test]
async fn a_browser_may_ask_and_may_read_errors() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    let preflight = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: https://chat.example\r\naccess-control-request-method: POST\r\naccess-control-request-headers: authorization,x-stainless-os\r\n\r\n";
    let reply = node.send(preflight).await.read().await;
    assert_eq!(
        (reply.status, reply.header("access-control-allow-headers")),
        (204, Some("authorization,x-stainless-os"))
    );
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
    let refused = b"GET /v1/models HTTP/1.1\r\nhost: x\r\norigin: https://chat.example\r\n\r\n";
    let reply = node.send(refused).await.read().await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (401, Some("*")));
    assert!(reply.header("access-control-expose-headers").unwrap().contains("retry-after"));
    assert!(reply.header("x-request-id").is_some());
    node.finish().await;
}

#[tokio::test]
async fn a_head_beyond_its_bounds_is_refused() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    let large = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "x".repeat(100_000));
    assert_eq!(node.send(large.as_bytes()).await.read().await.status, 431);
    let many = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\n{}\r\n", "x-a: b\r\n".repeat(101));
    assert_eq!(node.send(many.as_bytes()).await.read().await.status, 431);
    node.finish().await;
}

#[tokio::test]
async fn an_account_added_and_a_key_revoked_beside_the_server_are_seen_within_a_second() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("hi", 1, 1))).await;
    let node = Setup::at(&upstream).start().await;
    node.store.set_account_enabled("first".into(), false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(node.chat(&asking("")).await.status, 503);
    node.store.set_account_enabled("first".into(), true).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(node.chat(&asking("")).await.status, 200);
    let key = node.store.keys(None).await.unwrap()[0].id;
    node.store.revoke_key(key).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(node.chat(&asking("")).await.status, 401);
    node.finish().await;
}

#[tokio::test]
async fn a_title_call_goes_to_the_model_of_the_configuration() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("A title", 1, 1))).await;
    let node = Setup::at(&upstream).with("[title_catch]\nmodel = \"hidden\"\n").start().await;
    let title = "使用四到五个字直接返回这句话的简要主题，不要解释";
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "Hello" }, { "role": "user", "content": title }] });
    assert_eq!(node.chat(&body.to_string()).await.status, 200);
    assert_eq!(upstream.seen()[0].json()["model"], "hidden");
    let line = &node.lines(1).await[0];
    assert_eq!((line.model_asked.as_str(), line.model.as_str()), ("m", "hidden"));
    node.finish().await;
}

#[tokio::test]
async fn a_connection_whose_end_comes_behind_done_is_used_again() {
    let upstream = Upstream::start(|number, seen| {
        assert!(seen.head.contains("POST"));
        let pause = Act::Pause(Duration::from_millis(30));
        let answer = [text("Hello"), finish(), DONE.into()].concat();
        if number < 2 { vec![stream_head(), chunk(answer), pause, stream_end()] } else { vec![Act::Close] }
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    for _ in 0..2 {
        assert!(node.chat(&streaming("")).await.whole);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(upstream.connections(), 1);
    node.finish().await;
}

#[tokio::test]
async fn a_steady_stream_ends_when_it_has_taken_too_long() {
    let upstream = Upstream::start(|_, _| {
        let steps = (0..100).flat_map(|_| [chunk(text("word ")), Act::Pause(Duration::from_millis(100))]);
        [stream_head()].into_iter().chain(steps).collect()
    })
    .await;
    let node = Setup::at(&upstream).with("[upstream]\ntotal_timeout_s = 1\n").start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(!reply.whole && reply.text().contains("took too long"), "{}", reply.text());
    assert_eq!(node.lines(1).await[0].end_reason.name(), "upstream_error");
    node.finish().await;
}

#[tokio::test]
async fn a_silent_stream_is_no_idle_connection_and_ends_when_the_silence_is_too_long() {
    let upstream = Upstream::start(|_, _| vec![stream_head(), chunk(text("Hello")), Act::AwaitClose]).await;
    let setup = Setup::at(&upstream).replacing("drain_s = 3", "drain_s = 3\nidle_timeout_s = 1\nkeep_alive_s = 1");
    let node = setup.with("[upstream]\nsilence_timeout_s = 3\n").start().await;
    let begun = std::time::Instant::now();
    let reply = node.chat(&streaming("")).await;
    assert!(begun.elapsed() >= Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(!reply.whole && reply.text().contains("fell silent") && reply.text().contains(": keep-alive\n"));
    upstream.saw_close().await;
    node.finish().await;
}

#[tokio::test]
async fn a_compressed_answer_is_no_answer() {
    let upstream = Upstream::start(|_, seen| match seen.head.contains("sk-upstream-first") {
        true => whole_with(200, "content-encoding: gzip\r\n", "\u{1f}\u{8b}"),
        false => whole(200, &completion("hi", 1, 1)),
    })
    .await;
    let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).start().await;
    assert_eq!(node.chat(&asking("")).await.status, 200);
    node.finish().await;
}

#[tokio::test]
async fn a_refusal_in_another_shape_keeps_its_reason() {
    for (body, message) in [
        (
            r#"{"detail":[{"loc":["body","n"],"msg":"too large"}]}"#,
            r#"{"detail":[{"loc":["body","n"],"msg":"too large"}]}"#,
        ),
        ("no such tool", "no such tool"),
        (r#"{"error":{"message":"bad","code":1214}}"#, "bad"),
    ] {
        let upstream = Upstream::start(move |_, _| whole(422, body)).await;
        let node = Setup::at(&upstream).start().await;
        let reply = node.chat(&asking("")).await;
        assert_eq!((reply.status, reply.json()["error"]["message"].as_str()), (422, Some(message)));
        node.finish().await;
    }
}

#[tokio::test]
async fn an_error_that_begins_a_stream_is_the_clients_when_it_says_so() {
    let refusal = "data: {\"error\":{\"message\":\"too long\",\"type\":\"invalid_request_error\",\"code\":\"context_length_exceeded\"}}\n\n";
    let upstream = Upstream::start(move |_, _| stream(refusal)).await;
    let node = Setup::at(&upstream).accounts(&[("first", 9), ("second", 9)]).start().await;
    let reply = node.chat(&streaming("")).await;
    assert_eq!((reply.status, reply.header("x-should-retry"), upstream.seen().len()), (400, Some("false"), 1));
    assert_eq!(reply.json()["error"]["message"], "too long");
    node.finish().await;
}

#[tokio::test]
async fn a_request_goes_up_once_on_a_pooled_connection_and_once_on_a_fresh_one() {
    let upstream = Upstream::start(|number, _| match number {
        0..8 => [vec![Act::Pause(Duration::from_millis(50))], whole(200, &completion("hi", 1, 1))].concat(),
        _ => vec![Act::Close],
    })
    .await;
    let node = std::sync::Arc::new(Setup::at(&upstream).start().await);
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let node = node.clone();
            tokio::spawn(async move { node.chat(&asking("")).await.status })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    assert_eq!(node.chat(&asking("")).await.status, 502);
    assert_eq!(upstream.seen().len(), 8 + 2);
    std::sync::Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn a_body_with_two_lengths_is_refused() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let node = Setup::at(&upstream).start().await;
    let both = String::from_utf8(post(KEY, &asking("")))
        .unwrap()
        .replace("host: gateway", "host: gateway\r\ntransfer-encoding: chunked");
    assert_eq!(node.send(both.as_bytes()).await.read().await.status, 400);
    node.finish().await;
}

#[tokio::test]
async fn a_frame_that_is_passed_on_in_parts_is_held_for_as_it_goes_and_its_error_stands_apart() {
    // 500 KB in one frame that never ends: far more than the balance pays for.
    let upstream = Upstream::start(|_, _| {
        let open = text(&"word ".repeat(100_000));
        let chunks = open.as_bytes()[..500_000].chunks(10_000).map(chunk).collect::<Vec<_>>();
        [vec![stream_head()], chunks, vec![Act::AwaitClose]].concat()
    })
    .await;
    let node = Setup::at(&upstream).balance_nano(100_000_000).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(reply.text().contains("\n\n: gpt-cat: no further money"), "what follows the part stands apart");
    let line = &node.lines(1).await[0];
    assert!(reply.body.len() < 300_000 && line.charged_nano > 50_000_000, "{} {line:?}", reply.body.len());
    node.finish().await;
}
