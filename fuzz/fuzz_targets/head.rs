//! Any bytes: what `Head::read` accepts is JSON, what it calls no JSON is none, and the bounds of a head hold.
#![no_main]

use gpt_cat::error::Error;
use gpt_cat::request::{Head, MODEL_BYTES_MAX, N_MAX, START_BYTES_MAX, STARTS_MAX, TEXT_BYTES_MAX};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|body: &[u8]| {
    let head = match Head::read(body) {
        Ok(head) => head,
        Err(Error::BodyInvalid { param, reason }) => {
            if param.is_none() && reason.contains("is not valid JSON") {
                assert!(!is_json(body), "refused valid JSON: {reason}");
            }
            return;
        }
        Err(other) => panic!("not a refusal of the body: {other:?}"),
    };
    assert!(is_json(body));
    assert!((1..=MODEL_BYTES_MAX).contains(&head.model.len()));
    assert!((1..=N_MAX).contains(&u64::from(head.n)));
    assert_ne!(head.max_tokens, Some(0));
    assert!(head.prompt.text_bytes <= body.len() as u64 && head.prompt.messages > 0);
    for text in [&head.last_user, &head.system].into_iter().flatten() {
        assert!(text.start.len() <= TEXT_BYTES_MAX);
    }
    assert_eq!(head.starts.iter().count(), STARTS_MAX.min(head.prompt.messages as usize));
    assert!(head.starts.iter().all(|start| start.len() <= START_BYTES_MAX));
    // Another parser reads the same, where it can read the body at all (no lone surrogates, no 1e400).
    if let Ok(value) = serde_json::from_slice::<Value>(body) {
        assert_eq!(value["model"], head.model.as_str());
        assert_eq!(value["stream"].as_bool().unwrap_or(false), head.stream);
        assert_eq!(value["stream_options"]["include_usage"].as_bool().unwrap_or(false), head.include_usage);
        assert_eq!(value["user"].as_str(), head.user.as_deref());
        let bounds = ["max_tokens", "max_completion_tokens"].map(|name| value[name].as_u64());
        assert_eq!(bounds.into_iter().flatten().min(), head.max_tokens);
        assert_eq!(value["messages"].as_array().map(Vec::len), Some(head.prompt.messages as usize));
    }
});

fn is_json(body: &[u8]) -> bool {
    std::str::from_utf8(body).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}
