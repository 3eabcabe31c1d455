//! What the SSE parser costs for each byte that passes.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gpt_cat::sse::Parser;

/// A chunk of a chat completion as OpenAI sends it.
const FRAME_BYTES: usize = 203;
const FRAMES: usize = 1000;

fn scenarios(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sse");
    let frames = frame().repeat(FRAMES);
    let long_line = [b"data: ", &vec![b'x'; 1_000_000][..], b"\n\n"].concat();
    for (scenario, stream, chunk_bytes, events) in [
        ("1000 frames of 203 bytes, one a chunk", &frames, FRAME_BYTES, FRAMES),
        ("1000 frames of 203 bytes, 16 KB chunks", &frames, 16 << 10, FRAMES),
        ("a line of 1 MB in 1 KB chunks", &long_line, 1 << 10, 1),
    ] {
        assert_eq!(read(&mut Parser::new(), stream, chunk_bytes).0, events);
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(scenario, |bencher| {
            let mut parser = Parser::new();
            bencher.iter(|| black_box(read(&mut parser, black_box(stream), chunk_bytes)));
        });
    }
    group.finish();
}

/// The number of events, and of bytes in their data so that these are really looked for.
fn read(parser: &mut Parser, stream: &[u8], chunk_bytes: usize) -> (usize, usize) {
    let (mut events, mut data_bytes) = (0, 0);
    for chunk in stream.chunks(chunk_bytes) {
        let mut at = 0;
        while let Some(event) = parser.next(chunk, &mut at) {
            events += 1;
            data_bytes += event.data.len();
        }
    }
    (events, data_bytes)
}

fn frame() -> Vec<u8> {
    let head = r#"data: {"id":"chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz012","object":"chat.completion.chunk","#;
    let tail = r#""created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,"delta":{"content":""#;
    let end = "\"}}]}\n\n";
    let content = "x".repeat(FRAME_BYTES - head.len() - tail.len() - end.len());
    [head, tail, &content, end].concat().into_bytes()
}

criterion_group!(benches, scenarios);
criterion_main!(benches);
