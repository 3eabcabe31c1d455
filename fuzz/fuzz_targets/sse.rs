//! Any bytes, cut anywhere: the same events as the oracle, and not a byte lost.
//!
//! An input is the number of cuts, the length of each chunk but the last (a byte each), and the stream.

#![no_main]

use gpt_cat::sse::Parser;
use libfuzzer_sys::fuzz_target;

use oracle::{Dispatched, events};

#[path = "../../src/sse/oracle.rs"]
mod oracle;

fuzz_target!(|input: &[u8]| {
    let Some((&cuts, rest)) = input.split_first() else { return };
    let (lengths, stream) = rest.split_at(usize::from(cuts).min(rest.len()));

    let mut parser = Parser::new();
    let (mut dispatched, mut passed) = (Vec::new(), Vec::new());
    for chunk in cut(stream, lengths) {
        let (mut from, mut at) = (0, 0);
        while let Some(event) = parser.next(chunk, &mut at) {
            assert!(event.end > from && event.data_at.is_none_or(|at| chunk[at..].starts_with(event.data)));
            if event.dispatched {
                dispatched.push(owned(event));
            }
            passed.extend_from_slice(&chunk[from..at]);
            from = at;
        }
        passed.extend_from_slice(&chunk[from..at]);
    }
    assert_eq!(passed, stream);
    assert_eq!(dispatched, events(stream));

    dispatched.extend(parser.finish().filter(|event| event.dispatched).map(owned));
    assert_eq!(dispatched, events(&[stream, b"\n\n"].concat()));
});

fn owned(event: gpt_cat::sse::Event<'_>) -> Dispatched {
    Dispatched { name: event.name.to_vec(), data: event.data.to_vec(), id: event.id.to_vec() }
}

fn cut<'a>(stream: &'a [u8], lengths: &[u8]) -> Vec<&'a [u8]> {
    let mut rest = stream;
    let mut chunks = Vec::new();
    for &length in lengths {
        let (chunk, behind) = rest.split_at(usize::from(length).min(rest.len()));
        chunks.push(chunk);
        rest = behind;
    }
    chunks.push(rest);
    chunks
}
