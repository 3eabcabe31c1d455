//! When tokens are counted here, and what a count is worth.

use serde_json::json;

use crate::node::{INPUT_NANO, OUTPUT_NANO, Setup, asking, streaming};
use crate::upstream::{DONE, Upstream, completion, finish, stream, text, usage, whole};
use gpt_cat::store::Billed;

#[tokio::test]
async fn a_foreign_models_count_is_calibrated_where_its_usage_is_missing() {
    let answer =
        json!({ "choices": [{ "index": 0, "message": { "content": "one two three four" }, "finish_reason": "stop" }] });
    let upstream = Upstream::start(move |_, seen| match seen.json()["stream"].as_bool() {
        Some(true) => stream(&[text("one two"), text(" three four"), finish(), DONE.into()].concat()),
        _ => whole(200, &answer.to_string()),
    })
    .await;
    let plain = Setup::at(&upstream).start().await;
    plain.chat(&asking("")).await;
    let counted = plain.lines(1).await.pop().unwrap();
    assert_eq!((counted.output, counted.calibration_micro), (4, 1_000_000));
    plain.finish().await;
    let setup = Setup::at(&upstream).replacing(r#"dialect = "openai""#, "dialect = \"openai\"\ncalibration = \"1.25\"");
    let node = setup.start().await;
    node.chat(&asking("")).await;
    node.chat(&streaming("")).await;
    for line in node.lines(2).await {
        let input = (counted.input * 5).div_ceil(4);
        assert_eq!(
            (line.billed, line.input, line.output, line.calibration_micro),
            (Billed::Count, input, 5, 1_250_000)
        );
        assert_eq!(line.charged_nano, input as i64 * INPUT_NANO + 5 * OUTPUT_NANO);
    }
    node.finish().await;
}

#[tokio::test]
async fn a_calibrated_stream_is_cut_where_its_money_ends_and_never_charged_beyond_it() {
    let words: String = (0..3000).map(|n| text(&format!(" w{}", n % 10))).collect();
    let upstream = Upstream::start(move |_, _| stream(&[words.clone(), finish(), DONE.into()].concat())).await;
    let setup = Setup::at(&upstream).replacing(r#"dialect = "openai""#, "dialect = \"openai\"\ncalibration = \"2\"");
    let balance = 2000 * OUTPUT_NANO;
    let node = setup.balance_nano(balance).start().await;
    let reply = node.chat(&streaming("")).await;
    assert!(reply.whole && reply.text().contains(r#""finish_reason":"length""#));
    let line = node.lines(1).await.pop().unwrap();
    let words = reply.said().split_whitespace().count() as u64;
    // A word is two tokens here, each doubled.
    assert_eq!(line.output, 4 * words);
    assert!(line.charged_nano <= balance && line.absorbed_nano == 0, "{line:?}");
    node.finish().await;
}

#[tokio::test]
async fn a_prompt_is_counted_when_needed_or_always() {
    let upstream = Upstream::start(|_, seen| match seen.json()["stream"].as_bool() {
        Some(true) => stream(&[text("Hello"), finish(), usage(9, 1), DONE.into()].concat()),
        _ => whole(200, &completion("Hello", 9, 1)),
    })
    .await;
    let long = "a long prompt of many words ".repeat(2000);
    for (setting, counts) in [("when_needed\"\ncross_check_each = 0 #", false), ("always", true)] {
        let node = Setup::at(&upstream).with(&format!("[meter]\ncount_prompt = \"{setting}\"\n")).start().await;
        for body in [
            asking(""),
            streaming(""),
            asking("").replace("Say hello.", &long),
            streaming("").replace("Say hello.", &long),
        ] {
            node.chat(&body).await;
        }
        for line in node.lines(4).await {
            assert_eq!((line.counted_input.is_some(), line.counted_output), (counts, Some(1)), "{setting}: {line:?}");
            assert_eq!((line.billed, line.input), (Billed::Usage, 9));
        }
        node.finish().await;
    }
}

#[tokio::test]
async fn one_call_of_so_many_is_counted_beside_its_usage() {
    let upstream = Upstream::start(|_, _| whole(200, &completion("Hello", 9, 1))).await;
    let node = Setup::at(&upstream).with("[meter]\ncross_check_each = 3\n").start().await;
    for _ in 0..7 {
        node.chat(&asking("")).await;
    }
    let counted: Vec<bool> = node.lines(7).await.iter().map(|line| line.counted_input.is_some()).collect();
    assert_eq!(counted, [false, false, true, false, false, true, false]);
    node.finish().await;
}
