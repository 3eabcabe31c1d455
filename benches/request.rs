//! Head and splice of a chat request: 1 KB, 16 KB, and 1 MB with an image.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gpt_cat::request::{Edit, Head, splice};

/// A conversation of about `text_bytes`, its turns of some 400 bytes with the escapes that texts have; an image in the
/// last turn where `image_bytes` is not 0.
fn body(text_bytes: usize, image_bytes: usize) -> Bytes {
    let line = r#"The quick brown fox said \"jump\" and the lazy dog didn't.\nCaf\u00e9 — naïve. "#;
    let turn = |role: &str| format!(r#"{{"role":"{role}","content":"{}"}},"#, line.repeat(5));
    let mut messages = format!(r#"{{"role":"system","content":"{line}"}},"#);
    let mut roles = ["user", "assistant"].into_iter().cycle();
    while messages.len() + turn("assistant").len() < text_bytes {
        messages += &turn(roles.next().unwrap_or("user"));
    }
    let image = format!(
        r#",{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{}"}}}}"#,
        "iVBORw0KGgoAAAAN".repeat(image_bytes / 16)
    );
    let image = if image_bytes == 0 { "" } else { image.as_str() };
    let last = format!(r#"{{"role":"user","content":[{{"type":"text","text":"What is it?"}}{image}]}}"#);
    format!(r#"{{"model":"gpt-4o-mini","stream":true,"temperature":0.7,"messages":[{messages}{last}]}}"#).into()
}

fn request(c: &mut Criterion) {
    for (name, body) in
        [("1_KB", body(1 << 10, 0)), ("16_KB", body(16 << 10, 0)), ("1_MB_image", body(1 << 10, 1 << 20))]
    {
        let head = Head::read(&body).expect("a valid body");
        let mut group = c.benchmark_group("request");
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(format!("head_{name}"), |b| b.iter(|| Head::read(black_box(&body))));
        let edits = [Edit::Model("my-deployment"), Edit::IncludeUsage];
        group.bench_function(format!("splice_{name}"), |b| b.iter(|| splice(black_box(&body), &head, &edits)));
        group.finish();
    }
}

criterion_group!(benches, request);
criterion_main!(benches);
