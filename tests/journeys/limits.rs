//! Limits of keys, allowances of users, requests a minute, codes, and what a key is told of its use.

use std::sync::Arc;
use std::time::Duration;

use gpt_cat::store::{NewGroup, NewLimits};
use gpt_cat::users::hash_key;
use serde_json::{Value, json};

use crate::node::{INPUT_NANO, KEY, Node, OUTPUT_NANO, Setup, USER, asking, get, post, streaming};
use crate::upstream::{Act, DONE, Upstream, chunk, completion, finish, stream, stream_head, text, usage, whole};

/// Another key of the same user.
const LIMITED: &str = "sk-limited-key-of-the-journeys";
/// A prompt of 12 tokens, an answer of 100.
const EACH: i64 = 12 * INPUT_NANO + 100 * OUTPUT_NANO;

async fn add_key(node: &Node, limits: NewLimits) -> i64 {
    let id = node.store.add_key(USER.into(), hash_key(LIMITED), "neys".into(), "limited".into(), limits).await.unwrap();
    node.until_sees(LIMITED, 200).await;
    id
}

impl Node {
    /// Waits until the node answers a key like this: it learns of changes within a second.
    async fn until_sees(&self, key: &str, status: u16) {
        for _ in 0..100 {
            if self.models(key).await.0 == status {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{status} was awaited");
    }

    async fn models(&self, key: &str) -> (u16, Vec<String>) {
        let request = String::from_utf8(get("/v1/models")).unwrap().replace(KEY, key);
        let reply = self.send(request.as_bytes()).await.read().await;
        if reply.status != 200 {
            return (reply.status, Vec::new());
        }
        let listed = reply.json()["data"].as_array().unwrap().clone();
        (200, listed.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect())
    }

    async fn usage(&self, key: &str, query: &str) -> Value {
        let request = String::from_utf8(get(&format!("/v1/usage{query}"))).unwrap().replace(KEY, key);
        self.send(request.as_bytes()).await.read().await.json()
    }

    async fn say(&self, key: &str, text: &str) -> String {
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": text }] }).to_string();
        let reply = self.send(&post(key, &body)).await.read().await;
        match reply.status {
            200 => reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
            status => status.to_string(),
        }
    }
}

fn upstream_of_100_tokens() -> impl Future<Output = Upstream> {
    let words = " word".repeat(100);
    let streamed = [text(&words), finish(), usage(12, 100), DONE.into()].concat();
    let whole_answer = completion(&words, 12, 100);
    Upstream::start(move |_, seen| match seen.json()["stream"] == json!(true) {
        true => vec![Act::Pause(Duration::from_millis(50))].into_iter().chain(stream(&streamed)).collect(),
        false => vec![Act::Pause(Duration::from_millis(50))].into_iter().chain(whole(200, &whole_answer)).collect(),
    })
}

#[tokio::test]
async fn concurrent_calls_never_pass_a_limit_of_a_key() {
    let upstream = upstream_of_100_tokens().await;
    let setup = Setup::at(&upstream).accounts(&[("first", 1000)]);
    let node = Arc::new(setup.with("[ledger]\non_low_balance = \"refuse\"\n").start().await);
    for limits in [
        NewLimits { limit_nano: Some(Some(5 * EACH)), ..NewLimits::default() },
        NewLimits { limit_nano: Some(None), day_nano: Some(Some(8 * EACH)), ..NewLimits::default() },
        NewLimits { day_nano: Some(None), month_nano: Some(Some(10 * EACH)), ..NewLimits::default() },
    ] {
        match node.store.keys(None).await.unwrap().into_iter().find(|key| key.name == "limited") {
            Some(key) => {
                node.store.limit_key(key.id, limits).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1500)).await;
            }
            None => drop(add_key(&node, limits).await),
        }
        let calls: Vec<_> = (0..60)
            .map(|number| {
                let (node, more) = (node.clone(), r#","max_tokens":100"#);
                let body = if number % 2 == 0 { asking(more) } else { streaming(more) };
                tokio::spawn(async move { node.send(&post(LIMITED, &body)).await.read().await })
            })
            .collect();
        for call in calls {
            let reply = call.await.unwrap();
            if reply.status != 200 {
                assert_eq!((reply.status, reply.header("x-should-retry")), (429, Some("false")));
                let error = &reply.json()["error"];
                assert_eq!(error["code"], "insufficient_quota");
                assert!(error["message"].as_str().unwrap().starts_with("This key's limit"), "{error}");
            }
        }
    }
    // 5 by the limit, 3 more within the day's, 2 more within the month's; the last one may miss a few tokens of its hold.
    let calls = upstream.seen().len();
    assert!((8..=10).contains(&calls), "{calls}");
    let charged: i64 = node.lines(calls).await.iter().map(|line| line.charged_nano).sum();
    assert!(charged <= 10 * EACH);
    let usage = node.usage(LIMITED, "").await;
    assert_eq!(usage["key"]["month_limit"], "0.00212");
    assert_eq!(node.chat(&asking(r#","max_tokens":100"#)).await.status, 200, "the user's other key has no limit");
    Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn a_stream_is_cut_where_an_allowance_ends_and_the_next_call_is_refused() {
    let events: Vec<Act> = (0..1000).map(|_| chunk(text(" word"))).collect();
    let upstream =
        Upstream::start(move |_, _| [vec![stream_head()], events.clone(), vec![Act::AwaitClose]].concat()).await;
    let node = Setup::at(&upstream).with("[ledger]\non_low_balance = \"refuse\"\n").start().await;
    let allowance = NewLimits { day_nano: Some(Some(600 * OUTPUT_NANO)), ..NewLimits::default() };
    node.store.limit_user(USER.into(), allowance).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let reply = node.chat(&streaming("")).await;
    assert!(reply.text().contains(r#""finish_reason":"length""#), "{}", reply.text());
    let line = &node.lines(1).await[0];
    assert!((512 * OUTPUT_NANO..=600 * OUTPUT_NANO).contains(&line.charged_nano), "{line:?}");
    let refused = node.chat(&asking(r#","max_tokens":100"#)).await;
    assert_eq!(refused.json()["error"]["message"], "This user's allowance of the day (UTC) does not cover this call.");
    node.finish().await;
}

#[tokio::test]
async fn a_key_may_have_models_of_its_own_and_an_end() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hi", 12, 1))).await;
    let node = Setup::at(&upstream).start().await;
    let models = NewLimits { models: Some(Some(vec!["mapped".into()])), ..NewLimits::default() };
    let id = add_key(&node, models).await;
    assert_eq!(node.models(LIMITED).await.1, ["mapped"]);
    assert_eq!(node.models(KEY).await.1.len(), 3);
    let refused = node.send(&post(LIMITED, &asking(""))).await.read().await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (403, &json!("model_not_allowed")));
    let allowed = asking("").replace(r#""m""#, r#""mapped""#);
    assert_eq!(node.send(&post(LIMITED, &allowed)).await.read().await.status, 200);
    let past = NewLimits { expires_ms: Some(Some(1)), ..NewLimits::default() };
    node.store.limit_key(id, past).await.unwrap();
    node.until_sees(LIMITED, 401).await;
    node.finish().await;
}

#[tokio::test]
async fn a_group_bounds_the_requests_a_minute_of_each_user() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hi", 12, 1))).await;
    let node = Setup::at(&upstream).start().await;
    let group = NewGroup {
        name: "default".into(),
        ratio_micro: None,
        models: None,
        concurrency: None,
        requests_per_minute: Some(Some(3)),
    };
    node.store.put_group(group).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for _ in 0..3 {
        assert_eq!(node.chat(&asking("")).await.status, 200);
    }
    let refused = node.chat(&asking("")).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    let after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=20).contains(&after), "{after}");
    node.finish().await;
}

#[tokio::test]
async fn a_user_redeems_a_code_in_the_chat_once_and_thaws_with_it() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hi", 12, 1))).await;
    let node = Setup::at(&upstream).balance_nano(0).start().await;
    node.store.add_codes(vec![(hash_key("code-x"), "de-x".into())], 500_000_000, None, String::new()).await.unwrap();
    node.store.set_frozen(USER.into(), true, true).await.unwrap();
    for _ in 0..100 {
        if node.say(KEY, "Say hello.").await == "403" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(node.say(KEY, "Say hello.").await, "403", "frozen until the next credit");
    let nothing = "This code is worth nothing: it is unknown, used, expired or revoked.";
    assert_eq!(node.say(KEY, "/redeem code-y").await, nothing);
    assert_eq!(node.say(KEY, "/redeem code-x").await, "Added: 0.50 USD\nBalance: 0.50 USD");
    let again = "You have redeemed this code before; it added: 0.50 USD\nBalance: 0.50 USD";
    assert_eq!(node.say(KEY, "/r code-x").await, again, "as one is told whose first answer was lost");
    assert_eq!(node.say(KEY, "/redeem").await, nothing);
    for _ in 0..100 {
        if node.say(KEY, "Say hello.").await == "Hi" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(node.say(KEY, "Say hello.").await, "Hi");
    node.finish().await;
}

#[tokio::test]
async fn a_key_is_told_its_own_use_and_nobody_elses() {
    let upstream = upstream_of_100_tokens().await;
    let node = Setup::at(&upstream).start().await;
    let day = NewLimits { day_nano: Some(Some(7_000_000)), ..NewLimits::default() };
    let id = add_key(&node, day).await;
    for key in [KEY, LIMITED, LIMITED] {
        node.send(&post(key, &asking(r#","max_tokens":100"#))).await.read().await;
    }
    node.lines(3).await;
    let of_key = node.usage(LIMITED, "").await;
    let charged = json!({ "total": "0.000424", "month": "0.000424", "day": "0.000424" });
    assert_eq!(
        (&of_key["object"], &of_key["user"], &of_key["currency"]),
        (&"usage".into(), &USER.into(), &"USD".into())
    );
    assert_eq!((&of_key["key"]["id"], &of_key["key"]["charged"]), (&id.into(), &charged));
    assert_eq!((&of_key["key"]["day_limit"], &of_key["key"]["limit"]), (&"0.007".into(), &Value::Null));
    assert_eq!(of_key["allowance"]["charged"], json!({ "total": null, "month": null, "day": null }));
    assert_eq!(of_key["balance"], "0.006576", "what its day has left");
    let of_user = node.usage(KEY, "").await;
    assert_eq!(of_user["allowance"]["charged"]["total"], "0.000636", "all keys of the user together");
    assert_eq!(of_user["balance"], "0.999364");
    let days = of_key["days"].as_array().unwrap();
    assert_eq!((days.len(), &days[0]["model"], &days[0]["calls"]), (1, &"m".into(), &2.into()));
    assert_eq!((&days[0]["output_tokens"], &days[0]["charged"]), (&200.into(), &"0.000424".into()));
    assert_eq!(node.usage(LIMITED, "?since=2020-01-01&until=2020-01-31").await["days"], json!([]));
    assert_eq!(node.usage(LIMITED, "?since=soon").await["error"]["param"], "since");
    assert_eq!(node.usage("sk-nobody", "").await["error"]["code"], "invalid_api_key");
    node.finish().await;
}

#[tokio::test]
async fn what_asks_the_database_counts_against_the_requests_a_minute() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hi", 12, 1))).await;
    let node = Setup::at(&upstream).start().await;
    set_group(&node, None, Some(4)).await;
    for path in ["/v1/usage", "/v1/dashboard/billing/subscription", "/v1/dashboard/billing/usage", "/v1/usage"] {
        assert_eq!(node.send(&get(path)).await.read().await.status, 200, "{path}");
    }
    for path in ["/v1/usage", "/v1/dashboard/billing/subscription", "/v1/dashboard/billing/usage"] {
        let refused = node.send(&get(path)).await.read().await;
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")), "{path}");
        assert!(refused.header("retry-after").is_some());
    }
    node.finish().await;
}

async fn set_group(node: &Node, ratio_micro: Option<i64>, requests_per_minute: Option<u32>) {
    let group = NewGroup {
        name: "default".into(),
        ratio_micro,
        models: None,
        concurrency: None,
        requests_per_minute: Some(requests_per_minute),
    };
    node.store.put_group(group).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
}

#[tokio::test]
async fn a_key_with_a_limit_of_its_own_is_told_of_no_more_than_that() {
    let upstream = upstream_of_100_tokens().await;
    let node = Setup::at(&upstream).start().await;
    let limits = NewLimits { limit_nano: Some(Some(10 * EACH)), ..NewLimits::default() };
    add_key(&node, limits).await;
    for key in [KEY, LIMITED] {
        node.send(&post(key, &asking(r#","max_tokens":100"#))).await.read().await;
    }
    node.lines(2).await;
    let told = node.usage(LIMITED, "").await;
    assert_eq!(
        (&told["balance"], &told["allowance"]["charged"]["total"]),
        (&json!("0.001908"), &Value::Null),
        "nine of ten"
    );
    assert_eq!(node.say(LIMITED, "/bi").await, "Balance: 0.001908 USD");
    assert_eq!(node.usage(KEY, "").await["balance"], "0.999576");
    // An allowance of the user counts for this key, too.
    let day = NewLimits { day_nano: Some(Some(5_000_000)), ..NewLimits::default() };
    node.store.limit_user(USER.into(), day).await.unwrap();
    let charged = json!({ "total": null, "month": null, "day": "0.000424" });
    assert_eq!(node.usage(LIMITED, "").await["allowance"]["charged"], charged);
    node.finish().await;
}

#[tokio::test]
async fn a_call_is_clamped_to_what_a_limit_leaves_and_its_charge_counts_once() {
    let upstream = upstream_of_100_tokens().await;
    let node = Setup::at(&upstream).start().await;
    let limits = NewLimits { limit_nano: Some(Some(12 * INPUT_NANO + 300 * OUTPUT_NANO)), ..NewLimits::default() };
    let id = add_key(&node, limits).await;
    // The node has leased nothing yet: what the limit leaves is fetched before it is divided.
    let body = asking(r#","max_tokens":4000"#);
    assert_eq!(node.send(&post(LIMITED, &body)).await.read().await.status, 200);
    let clamped = upstream.seen()[0].json()["max_tokens"].as_u64().unwrap();
    assert!((200..=302).contains(&clamped), "{clamped}"); // the prompt is counted with its bound or exactly
    assert_eq!(node.lines(1).await[0].charged_nano, EACH);
    // With its charge in the store it counts once: two more calls fit within three, and no third.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let wider = NewLimits { limit_nano: Some(Some(3 * EACH)), ..NewLimits::default() };
    node.store.limit_key(id, wider).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for status in [200, 200, 429] {
        let reply = node.send(&post(LIMITED, &asking(r#","max_tokens":100"#))).await.read().await;
        assert_eq!(reply.status, status, "{}", reply.text());
    }
    node.finish().await;
}

#[tokio::test]
async fn a_running_stream_ends_at_its_next_slice_when_its_user_is_frozen_or_its_key_revoked() {
    // Ten words each 20 ms: a slice lasts half a second.
    let events: Vec<Act> =
        (0..600).flat_map(|_| [chunk(text(&" word".repeat(10))), Act::Pause(Duration::from_millis(20))]).collect();
    let upstream =
        Upstream::start(move |_, _| [vec![stream_head()], events.clone(), vec![Act::AwaitClose]].concat()).await;
    let node = Arc::new(Setup::at(&upstream).start().await);
    let id = add_key(&node, NewLimits::default()).await;
    for (key, count) in [(LIMITED, 1), (KEY, 2)] {
        let running = node.clone();
        let stream = tokio::spawn(async move { running.send(&post(key, &streaming(""))).await.read().await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        match key {
            KEY => drop(node.store.set_frozen(USER.into(), true, false).await.unwrap()),
            _ => node.store.revoke_key(id).await.unwrap(),
        }
        let reply = tokio::time::timeout(Duration::from_secs(8), stream).await.expect("long before its end").unwrap();
        assert!(reply.text().contains(r#""finish_reason":"length""#), "{}", reply.text());
        let line = &node.lines(count).await[count - 1];
        assert!(
            (100..=1024).contains(&line.output),
            "what was held for it, at most a second or two of slices: {line:?}"
        );
    }
    node.store.set_frozen(USER.into(), false, false).await.unwrap();
    Arc::into_inner(node).unwrap().finish().await;
}

#[tokio::test]
async fn a_line_is_charged_by_the_ratio_of_its_group_as_it_was_when_the_call_began() {
    let upstream = upstream_of_100_tokens().await;
    let node = Setup::at(&upstream).start().await;
    set_group(&node, Some(1_500_000), None).await;
    let call = asking(r#","max_tokens":100"#);
    assert_eq!(node.chat(&call).await.status, 200);
    set_group(&node, Some(500_000), None).await;
    assert_eq!(node.chat(&call).await.status, 200);
    let lines = node.lines(2).await;
    let charged: Vec<_> = lines.iter().map(|line| (line.ratio_micro, line.charged_nano)).collect();
    assert_eq!(charged, [(1_500_000, EACH * 3 / 2), (500_000, EACH / 2)]);
    assert!(lines.iter().all(|line| line.hold_nano >= line.charged_nano));
    node.finish().await;
}
