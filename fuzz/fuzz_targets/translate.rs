//! Any request and any answer of DashScope: no panic, no more out than a bound says, and the same however it is cut.
#![no_main]

use gpt_cat::request::Head;
use gpt_cat::sse::Parser;
use gpt_cat::upstream::qianwen::{TRANSLATION, translated};
use gpt_cat::upstream::translate::{Names, finish, read};
use libfuzzer_sys::fuzz_target;

/// The most that a byte becomes: a choice of 15 bytes is a delta of 70, a first event has its frame.
const GROWTH_MAX: usize = 16;
const FRAME_BYTES_MAX: usize = 1024;

fuzz_target!(|input: &[u8]| {
    // The first byte chooses what is translated, and how the stream is cut.
    let Some((&chosen, data)) = input.split_first() else { return };
    let names = || Names { model: "m".to_owned(), created_s: 1, n: 1 };
    if chosen & 1 == 0 {
        let Ok(head) = Head::read(data) else { return };
        for lossy in [false, true] {
            let Ok((_, made)) = translated(data, &head, None, "qwen-plus", lossy) else { continue };
            assert!(made.len() <= GROWTH_MAX * data.len() + FRAME_BYTES_MAX);
            let made: serde_json::Value = serde_json::from_slice(&made).expect("what is sent is JSON");
            assert_eq!(made["input"]["messages"].as_array().map(Vec::len), Some(head.prompt.messages as usize));
        }
        return;
    }
    let stream = |size: usize| {
        let (mut parser, mut translator, mut out) = (Parser::new(), (TRANSLATION.stream)(names()), Vec::new());
        for piece in data.chunks(size) {
            read(&mut parser, &mut *translator, piece, &mut out);
        }
        finish(&mut parser, &mut *translator, &mut out);
        out
    };
    let made = stream(data.len().max(1));
    assert_eq!(made, stream(usize::from(chosen >> 1) + 1));
    let events = data.windows(2).filter(|pair| pair.contains(&b'\n') || pair.contains(&b'\r')).count() + 1;
    assert!(made.len() <= GROWTH_MAX * data.len() + events * FRAME_BYTES_MAX);
    for event in made.split(|byte| *byte == b'\n').filter(|line| !line.is_empty() && *line != b"data: [DONE]") {
        let event = event.strip_prefix(b"data: ").expect("an event has data alone");
        serde_json::from_slice::<serde::de::IgnoredAny>(event).expect("what a client gets is JSON");
    }
    if let Some(whole) = (TRANSLATION.whole)(&names(), data) {
        assert!(whole.len() <= GROWTH_MAX * data.len() + FRAME_BYTES_MAX);
    }
    let _ = (TRANSLATION.refusal)(400, data);
});
