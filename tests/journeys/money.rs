//! Holds, slices, cuts, charges: what a call costs, whatever its end.

use std::time::Duration;

use crate::node::{INPUT_NANO, KEY, OUTPUT_NANO, Setup, asking, post, streaming};
use crate::upstream::{
    Act, DONE, Upstream, chunk, completion, finish, stream, stream_end, stream_head, text, usage, whole,
};
use serde_json::json;

#[tokio::test]
async fn the_upstreams_usage_is_billed_and_the_count_is_stored_beside_it() {
    let upstream =
        Upstream::start(|_, _| stream(&[text("Hello world"), finish(), usage(12, 3), DONE.into()].concat())).await;
    let node = Setup::at(&upstream).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(!reply.text().contains("usage"), "the client did not ask for it");
    let line = &node.lines(1).await[0];
    assert_eq!((line.billed.name(), line.input, line.output, line.counted_output), ("usage", 12, 3, Some(2)));
    assert_eq!(line.charged_nano, 12 * INPUT_NANO + 3 * OUTPUT_NANO);
    assert!(line.content_after_ms.is_some());
    node.finish().await;
}

#[tokio::test]
async fn a_usage_that_cannot_be_is_not_billed_and_is_flagged() {
    for (input, output) in [(12, 30_000), (1_000_000, 3), (-5, 3)] {
        let events = [text("Hello world"), finish(), usage(input, output), DONE.into()].concat();
        let upstream = Upstream::start(move |_, _| stream(&events)).await;
        let node = Setup::at(&upstream).start().await;
        node.chat(&streaming("")).await;
        let line = &node.lines(1).await[0];
        assert_eq!((line.billed.name(), line.output, line.flagged), ("count", 2, true), "{input} {output}");
        assert!(line.input > 5 && line.input < 30, "{line:?}");
        node.finish().await;
    }
}

#[tokio::test]
async fn an_answer_in_one_piece_is_billed_by_its_usage() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hello world", 12, 2))).await;
    let node = Setup::at(&upstream).start().await;
    assert_eq!(node.chat(&asking("")).await.json()["usage"]["prompt_tokens"], 12);
    let line = &node.lines(1).await[0];
    assert_eq!((line.end_reason.name(), line.charged_nano), ("complete", 12 * INPUT_NANO + 2 * OUTPUT_NANO));
    assert_eq!(line.charged_nano, 1_000_000_000 - node.balance_nano().await);
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_the_upstream_and_pays_for_what_it_got() {
    let upstream =
        Upstream::start(|_, _| vec![stream_head(), chunk(text("Hello")), chunk(text(" world")), Act::AwaitClose]).await;
    let node = Setup::at(&upstream).start().await;
    let mut connection = node.send(&post(KEY, &streaming(""))).await;
    connection.read_until("world").await;
    drop(connection);
    upstream.saw_close().await;
    let line = &node.lines(1).await[0];
    assert_eq!((line.end_reason.name(), line.output, line.billed.name()), ("client_gone", 2, "count"));
    assert_eq!(line.charged_nano, line.input as i64 * INPUT_NANO + 2 * OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_before_content_pays_nothing_and_the_risk_is_shown() {
    let upstream = Upstream::start(|_, _| vec![Act::AwaitClose]).await;
    let node = Setup::at(&upstream).start().await;
    for body in [asking(""), streaming("")] {
        let connection = node.send(&post(KEY, &body)).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
        drop(connection);
        upstream.saw_close().await;
    }
    for line in node.lines(2).await {
        assert_eq!((line.end_reason.name(), line.charged_nano, line.estimated), ("client_gone", 0, true));
        assert!(line.absorbed_nano > 0);
    }
    node.finish().await;
}

#[tokio::test]
async fn concurrent_calls_never_overdraw_a_balance() {
    // Each call: 100 tokens of output at most, all used, and a prompt of 12. The balance is worth exactly ten.
    let each = 12 * INPUT_NANO + 100 * OUTPUT_NANO;
    let words = " word".repeat(100);
    let streamed = [text(&words), finish(), usage(12, 100), DONE.into()].concat();
    let whole_answer = completion(&words, 12, 100);
    let upstream = Upstream::start(move |_, seen| match seen.json()["stream"] == json!(true) {
        true => vec![Act::Pause(Duration::from_millis(100))].into_iter().chain(stream(&streamed)).collect(),
        false => vec![Act::Pause(Duration::from_millis(100))].into_iter().chain(whole(200, &whole_answer)).collect(),
    })
    .await;
    let setup = Setup::at(&upstream).balance_nano(10 * each).accounts(&[("first", 1000)]);
    let node = std::sync::Arc::new(setup.with("[ledger]\non_low_balance = \"refuse\"\n").start().await);
    let calls: Vec<_> = (0..200)
        .map(|number| {
            let node = node.clone();
            let body = if number % 2 == 0 { asking(r#","max_tokens":100"#) } else { streaming(r#","max_tokens":100"#) };
            tokio::spawn(async move { node.chat(&body).await.status })
        })
        .collect();
    let mut completed = 0;
    for call in calls {
        match call.await.unwrap() {
            200 => completed += 1,
            status => assert_eq!(status, 429),
        }
    }
    assert_eq!(upstream.seen().len(), completed, "a refused call never reaches the upstream");
    // A prompt is held by its exact count where its bound does not fit, so the last ones may find a few tokens missing.
    assert!((9..=10).contains(&completed), "{completed} calls completed");
    node.lines(completed).await;
    assert_eq!(node.balance_nano().await, (10 - completed as i64) * each);
    std::sync::Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn a_stream_takes_slices_as_it_flows_and_ends_with_length_when_the_money_does() {
    // 256 tokens are held at first; the balance is worth about 600 of output.
    let events: Vec<Act> = (0..1000).map(|_| chunk(text(" word"))).collect();
    let upstream =
        Upstream::start(move |_, _| [vec![stream_head()], events.clone(), vec![Act::AwaitClose]].concat()).await;
    let node = Setup::at(&upstream).balance_nano(100 * INPUT_NANO + 600 * OUTPUT_NANO).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(reply.whole && reply.text().ends_with(DONE), "a client sees a whole stream");
    assert!(reply.text().contains(r#""finish_reason":"length""#));
    assert!(reply.text().contains(": gpt-cat: no further money can be held for this stream\n"));
    upstream.saw_close().await;
    let line = &node.lines(1).await[0];
    let words = reply.said().matches("word").count() as u64;
    assert_eq!((line.end_reason.name(), line.output), ("length", words));
    assert!((512..=600).contains(&words), "{words}");
    assert_eq!(line.absorbed_nano, 0);
    assert_eq!(node.balance_nano().await, 100 * INPUT_NANO + 600 * OUTPUT_NANO - line.charged_nano);
    node.finish().await;
}

#[tokio::test]
async fn a_call_that_the_balance_covers_in_part_is_clamped_when_it_is_alone() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hello", 12, 1))).await;
    let node = Setup::at(&upstream).balance_nano(50 * INPUT_NANO + 50 * OUTPUT_NANO).start().await;
    assert_eq!(node.chat(&asking(r#","max_tokens":1000"#)).await.status, 200);
    let forwarded = upstream.seen()[0].json()["max_tokens"].as_u64().unwrap();
    assert!((50..80).contains(&forwarded), "{forwarded}");
    node.finish().await;
}

#[tokio::test]
async fn a_call_that_cannot_be_held_is_refused_before_the_upstream_is_called() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let setup = Setup::at(&upstream).balance_nano(50 * INPUT_NANO + 50 * OUTPUT_NANO);
    let node = setup.with("[ledger]\non_low_balance = \"refuse\"\n").start().await;
    let reply = node.chat(&asking(r#","max_tokens":1000"#)).await;
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (429, Some("insufficient_quota")));
    assert!(upstream.seen().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn a_long_prompt_is_counted_when_its_bound_does_not_fit_and_when_there_is_no_usage() {
    let prompt = "All work and no play makes Jack a dull boy. ".repeat(2000); // 88,000 bytes, 22,000 tokens
    let upstream = Upstream::start(|_, _| stream(&[text("Hello"), finish(), DONE.into()].concat())).await;
    let node = Setup::at(&upstream).balance_nano(30_000 * INPUT_NANO).start().await;
    let body =
        json!({ "model": "m", "stream": true, "max_tokens": 20, "messages": [{ "role": "user", "content": prompt }] });
    let reply = node.chat(&body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let line = &node.lines(1).await[0];
    assert!((20_000..25_000).contains(&line.input), "{}", line.input);
    assert_eq!(line.counted_input, Some(line.input));
    node.finish().await;
}

#[tokio::test]
async fn a_model_that_bills_unseen_output_is_held_in_full() {
    let upstream = Upstream::start(|_, _| vec![]).await;
    let setup =
        Setup::at(&upstream).replacing("[models.hidden]", "[models.hidden]\nbills_unseen = true\nmax_output = 10000");
    let node = setup.balance_nano(100 * INPUT_NANO + 9_000 * OUTPUT_NANO).start().await;
    let body = streaming("").replace(r#""model":"m""#, r#""model":"hidden""#);
    assert_eq!(node.chat(&body).await.status, 429);
    assert!(upstream.seen().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn reasoning_that_was_not_shown_is_billed_by_the_upstreams_usage() {
    let last = json!({ "id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
        "usage": { "prompt_tokens": 10, "completion_tokens": 900, "total_tokens": 910,
                   "completion_tokens_details": { "reasoning_tokens": 898 } } });
    let events = [text("Hello world"), finish(), format!("data: {last}\n\n"), DONE.into()].concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).start().await;
    node.chat(&streaming("")).await;
    let line = &node.lines(1).await[0];
    assert_eq!((line.billed.name(), line.output, line.usage_reasoning), ("usage", 900, Some(898)));
    // Learnt: from now on the model is held for all that it may bill.
    node.chat(&streaming("")).await;
    let (before, after) = (line.hold_nano, node.lines(2).await[1].hold_nano);
    assert!(before < 1000 * OUTPUT_NANO && after >= 16_384 * OUTPUT_NANO, "{before} {after}");
    node.finish().await;
}

#[tokio::test]
async fn what_goes_beyond_hold_and_room_is_absorbed() {
    // The upstream bills 40 tokens more than it showed, which the balance does not have.
    let upstream = Upstream::start(|_, _| whole(200, &completion(&" word".repeat(100), 12, 140))).await;
    let setup = Setup::at(&upstream).balance_nano(12 * INPUT_NANO + 110 * OUTPUT_NANO);
    let node = setup.start().await;
    assert_eq!(node.chat(&asking(r#","max_tokens":100"#)).await.status, 200);
    let line = &node.lines(1).await[0];
    assert_eq!(line.charged_nano + line.absorbed_nano, 12 * INPUT_NANO + 140 * OUTPUT_NANO);
    assert_eq!(line.absorbed_nano, 30 * OUTPUT_NANO);
    assert_eq!(node.balance_nano().await, 0);
    node.finish().await;
}

#[tokio::test]
async fn a_node_that_is_told_to_stop_lets_an_open_stream_finish() {
    let upstream = Upstream::start(|_, _| {
        vec![
            stream_head(),
            chunk(text("Hello")),
            Act::Pause(Duration::from_millis(800)),
            chunk(text(" world") + &finish() + DONE),
            stream_end(),
        ]
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let (address, request) = (node.address, post(KEY, &streaming("")));
    let mut connection = node.send(&request).await;
    connection.read_until("Hello").await;
    let (store, running, _folder) = node.ask_to_stop().await;
    let reply = connection.read().await;
    assert!(reply.whole && reply.text().ends_with(DONE));
    running.await.unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "the door is closed");
    crate::node::assert_books(&store).await;
}

#[tokio::test]
async fn a_stream_that_outlasts_the_drain_is_cut_off_and_settled() {
    let upstream = Upstream::start(|_, _| vec![stream_head(), chunk(text("Hello")), Act::AwaitClose]).await;
    let node = Setup::at(&upstream).replacing("drain_s = 3", "drain_s = 1").start().await;
    let mut connection = node.send(&post(KEY, &streaming(""))).await;
    connection.read_until("Hello").await;
    let (store, running, _folder) = node.ask_to_stop().await;
    running.await.unwrap();
    let reply = connection.read().await;
    assert!(!reply.whole && reply.text().contains("shutting down"), "{}", reply.text());
    let lines = store.lines(gpt_cat::store::LineFilter { limit: 9, ..Default::default() }).await.unwrap();
    assert_eq!((lines[0].1.end_reason.name(), lines[0].1.output), ("drained", 1));
    crate::node::assert_books(&store).await;
}

#[tokio::test]
async fn an_answer_that_is_drained_shows_what_the_operator_pays_for_it() {
    let upstream = Upstream::start(|_, _| {
        let rest = [text(&" more".repeat(50)), finish(), usage(20, 52), DONE.into()].concat();
        vec![
            stream_head(),
            chunk(text("Hello world")),
            Act::Pause(Duration::from_millis(300)),
            chunk(rest),
            stream_end(),
        ]
    })
    .await;
    let setup =
        Setup::at(&upstream).replacing("dialect = \"openai\"", "dialect = \"openai\"\non_disconnect = \"drain\"");
    let node = setup.start().await;
    let mut connection = node.send(&post(KEY, &streaming(""))).await;
    connection.read_until("world").await;
    drop(connection);
    let line = &node.lines(1).await[0];
    assert_eq!((line.end_reason.name(), line.output, line.usage_output), ("client_gone", 2, Some(52)));
    assert_eq!(line.charged_nano + line.absorbed_nano, 20 * INPUT_NANO + 52 * OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn streams_of_one_user_that_need_slices_together_all_get_them() {
    // Each takes several slices; what one of them fetches from the store must not be lost to another.
    let events: Vec<Act> = (0..40).map(|_| chunk(text(&" word".repeat(50)))).collect();
    let end = chunk(finish() + DONE);
    let upstream =
        Upstream::start(move |_, _| [vec![stream_head()], events.clone(), vec![end.clone(), stream_end()]].concat())
            .await;
    let setup = Setup::at(&upstream).balance_nano(20 * (100 * INPUT_NANO + 2200 * OUTPUT_NANO));
    let node = std::sync::Arc::new(setup.start().await);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let node = node.clone();
            tokio::spawn(async move { node.chat(&streaming("")).await.said().matches("word").count() })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), 2000);
    }
    assert!(node.lines(20).await.iter().all(|line| line.end_reason.name() == "complete"));
    std::sync::Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn clients_that_leave_while_money_is_fetched_lock_none_of_it() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("hi", 5, 1))).await;
    let node = Setup::at(&upstream).start().await;
    for _ in 0..50 {
        drop(node.send(&post(KEY, &asking(r#","max_tokens":16000"#))).await);
    }
    for _ in 0..50 {
        let connection = node.send(&post(KEY, &streaming(r#","max_tokens":16000"#))).await;
        tokio::task::yield_now().await;
        drop(connection);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Whatever became of them, nothing is held any more: the whole balance can be used again.
    let balance = node.balance_nano().await;
    let output = (balance - 60 * INPUT_NANO) / OUTPUT_NANO;
    assert!(output > 16_000);
    let body = asking(r#","max_tokens":16000,"n":30"#);
    assert_eq!(node.chat(&body).await.status, 200);
    node.finish().await;
}

#[tokio::test]
async fn a_node_that_stops_waits_for_no_answer_that_is_drained() {
    let upstream = Upstream::start(|_, _| vec![stream_head(), chunk(text("Hello world")), Act::AwaitClose]).await;
    let setup =
        Setup::at(&upstream).replacing("dialect = \"openai\"", "dialect = \"openai\"\non_disconnect = \"drain\"");
    let node = setup.start().await;
    let mut connection = node.send(&post(KEY, &streaming(""))).await;
    connection.read_until("world").await;
    drop(connection);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (store, begun) = (node.store.clone(), std::time::Instant::now());
    node.finish().await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let lines = store.lines(gpt_cat::store::LineFilter { limit: 9, ..Default::default() }).await.unwrap();
    assert_eq!((lines[0].1.end_reason.name(), lines[0].1.output), ("client_gone", 2));
}

#[tokio::test]
async fn the_usage_of_many_short_tool_calls_is_believed() {
    // Ten calls of three tokens each show thirty tokens; OpenAI bills some eighteen more for each.
    let calls: Vec<_> = (0..10)
        .map(|index| {
            json!({ "index": index, "id": format!("call_{index}"), "type": "function",
                             "function": { "name": "tick", "arguments": "{}" } })
        })
        .collect();
    let events =
        [crate::upstream::delta(json!({ "tool_calls": calls })), finish(), usage(50, 210), DONE.into()].concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).start().await;
    node.chat(&streaming("")).await;
    let line = &node.lines(1).await[0];
    assert_eq!((line.billed.name(), line.output, line.flagged), ("usage", 210, false), "{line:?}");
    node.finish().await;
}

#[tokio::test]
async fn a_solvent_user_is_never_refused_because_calls_raced_for_a_grant() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("hi", 12, 1))).await;
    let setup = Setup::at(&upstream).balance_nano(1_000_000_000_000).accounts(&[("first", 1000)]);
    let node = std::sync::Arc::new(setup.start().await);
    let callers: Vec<_> = (0..16)
        .map(|caller| {
            let node = node.clone();
            tokio::spawn(async move {
                for call in 0..30 {
                    let body = asking(&format!(r#","max_tokens":{}"#, 1 + (caller * 37 + call * 101) % 900));
                    assert_eq!(node.chat(&body).await.status, 200);
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    std::sync::Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn a_stream_waits_for_money_of_its_users_other_calls_rather_than_being_cut_short() {
    // Both hold 256 tokens of output at first; about 200 more are there. The first gives 156 back, a while later.
    let words = |count: usize| chunk(text(" word").repeat(count));
    let upstream = Upstream::start(move |number, _| match number {
        0 => vec![
            stream_head(),
            words(100),
            Act::Pause(Duration::from_millis(800)),
            chunk(finish() + DONE),
            stream_end(),
        ],
        _ => vec![stream_head(), words(400), chunk(finish() + DONE), stream_end()],
    })
    .await;
    let node = Setup::at(&upstream).balance_nano(150 * INPUT_NANO + (512 + 200) * OUTPUT_NANO).start().await;
    let mut first = node.send(&post(KEY, &streaming(""))).await;
    first.read_until("word").await;
    let second = node.chat(&streaming("")).await;
    assert_eq!(second.said().matches("word").count(), 400);
    assert!(second.text().ends_with(DONE) && !second.text().contains("length"), "{}", second.text());
    first.read().await;
    assert!(node.lines(2).await.iter().all(|line| line.end_reason.name() == "complete"));
    node.finish().await;
}

#[tokio::test]
async fn streams_of_one_user_that_all_wait_for_each_other_are_cut_and_do_not_hang() {
    let events: Vec<Act> =
        (0..600).map(|_| chunk(text(" word"))).chain([chunk(finish() + DONE), stream_end()]).collect();
    let upstream = Upstream::start(move |_, _| [vec![stream_head()], events.clone()].concat()).await;
    let node = Setup::at(&upstream).balance_nano(200 * INPUT_NANO + 1000 * OUTPUT_NANO).start().await;
    let body = streaming("");
    let replies = tokio::join!(node.chat(&body), node.chat(&body), node.chat(&body));
    let all = [replies.0, replies.1, replies.2];
    assert!(all.iter().all(|reply| reply.whole && reply.text().ends_with(DONE)), "each is a whole stream");
    assert!(all.iter().all(|reply| reply.text().contains(r#""finish_reason":"length""#)));
    let words: i64 = all.iter().map(|reply| reply.said().matches("word").count() as i64).sum();
    let inputs: i64 = node.lines(3).await.iter().map(|line| line.input as i64).sum();
    // What the prompts did not need goes to the answers: a fourth slice, and no fifth.
    assert!(words >= 3 * 256 && words * OUTPUT_NANO + inputs * INPUT_NANO <= 200 * INPUT_NANO + 1000 * OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn a_last_event_without_its_blank_line_is_not_handed_over_beyond_the_money() {
    let last = text(&" more".repeat(50_000)).replace(r#""finish_reason":null"#, r#""finish_reason":"stop""#);
    assert!(last.contains(r#""stop""#));
    let events = text("Hello") + last.trim_end();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).balance_nano(2_000 * OUTPUT_NANO).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(!reply.text().contains("more"), "its 50,000 tokens are not paid for");
    let line = &node.lines(1).await[0];
    assert_eq!((line.end_reason.name(), line.output), ("length", 1));
    node.finish().await;
}

#[tokio::test]
async fn a_cut_charges_every_word_that_was_handed_over_however_large_the_frames() {
    let events: Vec<Act> = (0..20).map(|_| chunk(text(&" word".repeat(190)))).collect();
    let upstream =
        Upstream::start(move |_, _| [vec![stream_head()], events.clone(), vec![Act::AwaitClose]].concat()).await;
    let node = Setup::at(&upstream).balance_nano(100 * INPUT_NANO + 700 * OUTPUT_NANO).start().await;
    let reply = node.chat(&streaming("")).await;
    let line = &node.lines(1).await[0];
    let words = reply.said().matches("word").count() as u64;
    assert!(words >= 190, "{words}");
    assert_eq!((line.end_reason.name(), line.output), ("length", words));
    node.finish().await;
}

#[tokio::test]
async fn a_usage_of_zeros_is_a_placeholder_and_the_count_is_billed() {
    let events = [text("Hello world"), finish(), usage(0, 0), DONE.into()].concat();
    let whole_answer = completion("Hello world", 12, 0);
    let upstream =
        Upstream::start(move |number, _| if number == 0 { stream(&events) } else { whole(200, &whole_answer) }).await;
    let node = Setup::at(&upstream).start().await;
    node.chat(&streaming("")).await;
    node.chat(&asking("")).await;
    for line in node.lines(2).await {
        assert_eq!((line.billed.name(), line.output), ("count", 2), "{line:?}");
        assert!(line.charged_nano > 2 * OUTPUT_NANO);
    }
    node.finish().await;
}

#[tokio::test]
async fn reasoning_beyond_what_the_model_can_say_is_not_believed() {
    let last = json!({ "id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
        "usage": { "prompt_tokens": 10, "completion_tokens": 120_000, "total_tokens": 120_010,
                   "completion_tokens_details": { "reasoning_tokens": 119_998 } } });
    let events = [text("Hello world"), finish(), format!("data: {last}\n\n"), DONE.into()].concat();
    let upstream = Upstream::start(move |_, _| stream(&events)).await;
    let node = Setup::at(&upstream).start().await;
    node.chat(&streaming("")).await;
    let line = &node.lines(1).await[0];
    assert_eq!((line.billed.name(), line.output, line.flagged), ("count", 2, true));
    node.finish().await;
}

#[tokio::test]
async fn an_answer_in_one_piece_without_content_costs_nothing() {
    let empty = r#"{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":""},"finish_reason":null}],"usage":{"prompt_tokens":8,"completion_tokens":0,"total_tokens":8}}"#;
    let upstream = Upstream::start(move |_, _| whole(200, empty)).await;
    let node = Setup::at(&upstream).start().await;
    assert_eq!(node.chat(&asking("")).await.status, 200);
    assert_eq!(node.lines(1).await[0].charged_nano, 0);
    node.finish().await;
}

#[tokio::test]
async fn a_prompt_that_cannot_be_sized_is_held_at_the_context_and_not_billed_at_it() {
    let upstream = Upstream::start(|_, _| stream(&[text("A dog barks."), finish(), DONE.into()].concat())).await;
    let node = Setup::at(&upstream).start().await;
    let body = json!({ "model": "m", "stream": true, "messages": [{ "role": "user", "content": [
        { "type": "text", "text": "What is this?" },
        { "type": "input_audio", "input_audio": { "data": "AAAA", "format": "wav" } }] }] });
    assert_eq!(node.chat(&body.to_string()).await.status, 200);
    let line = &node.lines(1).await[0];
    assert!(line.hold_nano >= 128_000 * INPUT_NANO && line.input < 100 && line.estimated, "{line:?}");
    node.finish().await;
}

/// `usage` with parts of its own kinds.
fn usage_of_kinds() -> String {
    let usage = json!({
        "prompt_tokens": 1200, "completion_tokens": 10, "total_tokens": 1210,
        "prompt_tokens_details": { "cached_tokens": 300, "audio_tokens": 200 },
        "completion_tokens_details": { "reasoning_tokens": 4, "audio_tokens": 3 },
    });
    format!("data: {}\n\n", json!({ "id": "c", "object": "chat.completion.chunk", "choices": [], "usage": usage }))
}

#[tokio::test]
async fn every_kind_of_token_and_the_tier_of_the_prompt_are_billed_at_their_own_prices() {
    let below = 700 * 1000 + 300 * 500 + 200 * 5000 + 4 * 3000 + 3 * 7000 + 3 * 2000;
    let above = 1000 * 10_000 + 200 * 50_000 + 4 * 30_000 + 6 * 20_000;
    for (bound, tier, charged) in [(1200, 0, below), (1199, 1, above)] {
        let upstream = Upstream::start(|_, _| {
            stream(&[text("one two three four five"), finish(), usage_of_kinds(), DONE.into()].concat())
        })
        .await;
        let price = format!(
            r#"[models.m]
            audio_input = "5.00"
            cached_input = "0.50"
            reasoning = "3.00"
            audio_output = "7.00"
            tiers = [{{ above = {bound}, input = "10.00", output = "20.00", audio_input = "50.00", reasoning = "30.00" }}]
            "#
        );
        let node = Setup::at(&upstream).replacing("[models.m]", &price).start().await;
        let content = "x".repeat(5000);
        let body = json!({ "model": "m", "stream": true, "messages": [{ "role": "user", "content": content }] });
        node.chat(&body.to_string()).await;
        let line = &node.lines(1).await[0];
        assert_eq!((line.billed.name(), line.tier, line.charged_nano), ("usage", tier, charged), "{line:?}");
        assert_eq!((line.usage_audio_input, line.usage_audio_output), (Some(200), Some(3)));
        assert!(line.hold_nano >= line.charged_nano, "it was held for the dearest that it could come to");
        node.finish().await;
    }
}
