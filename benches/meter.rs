//! What counting costs: whole texts by kind, deltas as they pass, chunks of JSON, prompts, and texts made to be slow.

use std::{hint::black_box, time::Duration};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use gpt_cat::meter::{Kind, Lane, Meter, Reader, Running, Vocabulary, count_prompt};

const PROSE: &str = "It was a bright cold day in April, and the clocks were striking thirteen. The hallway smelt of boiled \
                     cabbage; nobody had opened a window since the 4th of November. \"Don't they ever air it?\" she asked.\n\n";
const CHINESE: &str =
    "四月里天气晴朗，寒风刺骨，钟敲了十三下。走廊里有一股煮白菜和旧地毯的气味，门边的墙上钉着一张彩色的招贴画。\n";
const CODE: &str = "    for (index, value) in values.iter().enumerate() {\n        if value > &limit[index] { // keep it\n            \
                    total += u64::from(*value);\n        }\n    }\n";
const CHAT: &str = "Sure! Here's how you'd do it:\n\n1. **Install** the package: `pip install requests`\n2. Call `requests.get(url)` \
                    with a timeout of 10 s\n3. Check `response.status_code == 200`\n\nLet me know if that doesn't work. 😊\n\n";

/// The words of a text in no order, so that no branch is foreseen: a text repeated runs at more than twice its speed.
fn shuffled(text: &str, bytes: usize) -> String {
    let words: Vec<&str> = text.split_inclusive([' ', '，', '。', '_', '的', '了', '.']).collect();
    let mut random = 1_u32;
    let mut shuffled = String::with_capacity(bytes + 64);
    while shuffled.len() < bytes {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        shuffled.push_str(words[(random >> 8) as usize % words.len()]);
    }
    shuffled.truncate(shuffled.floor_char_boundary(bytes));
    shuffled
}

fn filled(unit: &str, bytes: usize) -> String {
    let mut text = unit.repeat(bytes / unit.len() + 1);
    text.truncate(text.floor_char_boundary(bytes));
    text
}

fn whole_texts(criterion: &mut Criterion) {
    let texts = [
        ("prose 64 KiB", shuffled(PROSE, 64 << 10)),
        ("chinese 64 KiB", shuffled(CHINESE, 64 << 10)),
        ("code 64 KiB", shuffled(CODE, 64 << 10)),
        ("chat 1 KiB", shuffled(CHAT, 1 << 10)),
        ("chat 16 KiB", shuffled(CHAT, 16 << 10)),
    ];
    measure(criterion, "count", &texts);
}

fn hostile_texts(criterion: &mut Criterion) {
    let mut random = 1_u32;
    let letters: String = (0..64 << 10)
        .map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(b'a' + (random >> 24) as u8 % 26)
        })
        .collect();
    let mut texts = vec![("random a-z", letters)];
    for (name, unit) in [
        ("a", "a"),
        ("spaces", " "),
        ("newlines", "\n"),
        ("dashes", "-"),
        ("equals", "="),
        ("emoji", "😀"),
        ("space newline", " \n"),
    ] {
        texts.push((name, filled(unit, 64 << 10)));
    }
    measure(criterion, "count hostile 64 KiB", &texts);
}

fn measure(criterion: &mut Criterion, name: &str, texts: &[(&str, String)]) {
    let mut group = criterion.benchmark_group(name);
    for (name, text) in texts {
        group.throughput(Throughput::Bytes(text.len() as u64));
        for vocabulary in [Vocabulary::O200k, Vocabulary::Cl100k] {
            vocabulary.warm();
            group.bench_function(format!("{name} {vocabulary:?}"), |bencher| {
                bencher.iter(|| vocabulary.count(black_box(text)))
            });
        }
    }
    group.finish();
}

/// One delta is a word or so; the time shown is for 1,000 of them.
fn running_count(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("1000 deltas");
    group.throughput(Throughput::Elements(1000));
    for (name, unit) in [("prose", PROSE), ("chinese", CHINESE), ("code", CODE), ("dashes", "-")] {
        let text = if unit.len() > 1 { shuffled(unit, 64 << 10) } else { filled(unit, 64 << 10) };
        let words: Vec<&str> = text.split_inclusive([' ', '，', '。']).collect();
        let characters: Vec<char> = text.chars().collect();
        let fours: Vec<String> = characters.chunks(4).map(|delta| delta.iter().collect()).collect();
        let deltas: Vec<&str> = if words.len() > 1000 { words } else { fours.iter().map(String::as_str).collect() };
        let deltas = &deltas[..1000];
        group.bench_function(format!("{name}, total at the end"), |bencher| {
            bencher.iter_batched_ref(
                || Running::new(Vocabulary::O200k),
                |running| {
                    deltas.iter().for_each(|delta| running.push(black_box(delta)));
                    running.total()
                },
                BatchSize::SmallInput,
            )
        });
        group.bench_function(format!("{name}, total after each"), |bencher| {
            bencher.iter_batched_ref(
                || Running::new(Vocabulary::O200k),
                |running| {
                    deltas.iter().fold(0, |sum, delta| {
                        running.push(black_box(delta));
                        sum + running.total()
                    })
                },
                BatchSize::SmallInput,
            )
        });
    }
    group.finish();
}

fn chunks(criterion: &mut Criterion) {
    let chunk = br#"{"id":"chatcmpl-C4HqHBe4xca0k0EzsCnf1t6V3YFXp","object":"chat.completion.chunk","created":1755137933,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":null,"choices":[{"index":0,"delta":{"content":" there"},"finish_reason":null}],"obfuscation":"UC"}"#;
    criterion.bench_function("chunk of 270 bytes, read and counted", |bencher| {
        let (mut reader, mut meter) = (Reader::new(), Meter::new(Vocabulary::O200k));
        bencher.iter(|| reader.read(black_box(chunk), &mut meter));
    });
    criterion.bench_function("delta of one word, four lanes in turn", |bencher| {
        let mut meter = Meter::new(Vocabulary::O200k);
        let mut choice = 0;
        bencher.iter(|| {
            choice = (choice + 1) % 4;
            meter.push(Lane { choice, kind: Kind::Content }, black_box(" there"));
        });
    });
}

fn prompts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prompt");
    for (name, bytes) in [("1 KiB", 1 << 10), ("16 KiB", 16 << 10), ("256 KiB", 256 << 10)] {
        let messages: Vec<_> =
            (0..8).map(|_| serde_json::json!({"role": "user", "content": shuffled(CHAT, bytes / 8)})).collect();
        let body = serde_json::json!({"model": "gpt-4o", "messages": messages}).to_string();
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| count_prompt(black_box(body.as_bytes()), Vocabulary::O200k, Duration::from_millis(20)))
        });
    }
    group.finish();
}

criterion_group!(benches, whole_texts, hostile_texts, running_count, chunks, prompts);
criterion_main!(benches);
