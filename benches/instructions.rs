//! Instructions of the hot path, counted by valgrind: the same on a busy machine and on an idle one.
//!
//!     cargo bench --bench instructions              counts, and compares with benches/instructions.txt
//!     cargo bench --bench instructions -- --save    counts, and writes what it found there
//!
//! Counts depend on the compiler and on what the CPU that valgrind shows can do (memchr and simd-json choose by it): the
//! file has a key for both. Under a known key a scenario that takes 3 % more than the file says is a failure; under an
//! unknown one the counts are only printed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::process::{Command, ExitCode};

use bytes::Bytes;
use gpt_cat::meter::{Kind, Lane, Meter, Reader, Running, Vocabulary};
use gpt_cat::request::{Edit, Head, splice};
use gpt_cat::sse::Parser;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt");
/// Worse by more than this is a failure, in percent.
const WORSE_MAX: f64 = 3.0;
const FRAMES: usize = 1000;
const FRAME_BYTES: usize = 203;

/// One thing that is counted: what it is called, how often it is done at a time, and how it is set up.
struct Scenario {
    name: &'static str,
    times: u64,
    set_up: fn() -> Box<dyn FnMut()>,
}

static SCENARIOS: [Scenario; 12] = [
    Scenario { name: "sse frame, one a chunk", times: FRAMES as u64, set_up: || frames(FRAME_BYTES) },
    Scenario { name: "sse frame, 16 KB chunks", times: FRAMES as u64, set_up: || frames(16 << 10) },
    Scenario { name: "sse-stream crate, one a chunk", times: FRAMES as u64, set_up: || foreign_frames(FRAME_BYTES) },
    Scenario { name: "sse-stream crate, 16 KB chunks", times: FRAMES as u64, set_up: || foreign_frames(16 << 10) },
    Scenario { name: "head, 1 KB", times: 100, set_up: || head(1 << 10, 0) },
    Scenario { name: "head, 16 KB", times: 10, set_up: || head(16 << 10, 0) },
    Scenario { name: "head, 1 MB with an image", times: 1, set_up: || head(1 << 10, 1 << 20) },
    Scenario { name: "splice of model and usage, 16 KB", times: 100, set_up: spliced },
    Scenario { name: "chunk of a stream, read and counted", times: 1000, set_up: chunks },
    Scenario { name: "delta, counted with a total each", times: 1000, set_up: deltas },
    Scenario { name: "count of chat text, 16 KB", times: 10, set_up: || count(Vocabulary::O200k) },
    Scenario { name: "count of chat text, 16 KB, cl100k", times: 10, set_up: || count(Vocabulary::Cl100k) },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--scenario") {
        return run(&arguments[at + 1]);
    }
    let Some(key) = key() else {
        println!("SKIPPED: valgrind is not here");
        return ExitCode::SUCCESS;
    };
    let known = read_file();
    let mut found = BTreeMap::new();
    let mut worse = 0;
    println!("{key}\n{:<40} {:>12} {:>12} {:>8}", "scenario, each", "instructions", "in the file", "");
    for Scenario { name, times, .. } in &SCENARIOS {
        let Some(counted) = counted(name) else {
            println!("{name}: valgrind counted nothing");
            return ExitCode::FAILURE;
        };
        let each = counted / times;
        let before = known.get(&(key.clone(), (*name).to_owned()));
        let change = before.map(|before| 100.0 * (each as f64 / *before as f64 - 1.0));
        worse += usize::from(change.is_some_and(|change| change > WORSE_MAX));
        let (before, change) = (before.map(u64::to_string), change.map(|change| format!("{change:+.1} %")));
        println!("{name:<40} {each:>12} {:>12} {:>8}", before.unwrap_or_default(), change.unwrap_or_default());
        found.insert((key.clone(), (*name).to_owned()), each);
    }
    if arguments.iter().any(|argument| argument == "--save") {
        write_file(known.into_iter().chain(found).collect());
        return ExitCode::SUCCESS;
    }
    println!("{worse} of {} take more than {WORSE_MAX} % more than the file says", SCENARIOS.len());
    if worse > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs a scenario once to warm it up, and once where valgrind looks.
fn run(name: &str) -> ExitCode {
    if name == "key" {
        println!("{}", features());
        return ExitCode::SUCCESS;
    }
    let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == name) else { return ExitCode::FAILURE };
    let mut work = (scenario.set_up)();
    work();
    measured(&mut *work);
    ExitCode::SUCCESS
}

/// Callgrind counts in here alone.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    black_box(work)();
}

fn valgrind(scenario: &str) -> Option<std::process::Output> {
    let executable = std::env::current_exe().ok()?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
    command.arg("--toggle-collect=*measured*").arg(executable).args(["--scenario", scenario]);
    command.output().ok().filter(|output| output.status.success())
}

fn counted(scenario: &str) -> Option<u64> {
    let output = valgrind(scenario)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().find_map(|line| line.split_once("Collected :"))?;
    line.1.trim().split(' ').next()?.parse().ok()
}

/// The compiler, and what the CPU can do as valgrind shows it.
fn key() -> Option<String> {
    let features = String::from_utf8(valgrind("key")?.stdout).ok()?;
    let rustc = Command::new(std::env::var("RUSTC").unwrap_or("rustc".into())).arg("--version").output().ok()?;
    let rustc = String::from_utf8(rustc.stdout).ok()?;
    Some(format!("{} {}", rustc.split(' ').take(2).collect::<Vec<_>>().join(" "), features.trim()))
}

#[cfg(target_arch = "x86_64")]
fn features() -> String {
    let mut features = String::from("x86_64");
    for (name, has) in [
        ("sse4.2", std::is_x86_feature_detected!("sse4.2")),
        ("pclmulqdq", std::is_x86_feature_detected!("pclmulqdq")),
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
    ] {
        if has {
            let _ = write!(features, "+{name}");
        }
    }
    features
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> String {
    std::env::consts::ARCH.to_owned()
}

type Counts = BTreeMap<(String, String), u64>;

/// `key | scenario | instructions` a line.
fn read_file() -> Counts {
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let read = |line: &str| {
        let mut fields = line.split('|').map(str::trim);
        Some(((fields.next()?.to_owned(), fields.next()?.to_owned()), fields.next()?.parse().ok()?))
    };
    lines.filter_map(read).collect()
}

fn write_file(counts: Counts) {
    let mut text = String::from(
        "# Written by `cargo bench --bench instructions -- --save`: compiler and CPU | scenario | instructions each\n",
    );
    for ((key, scenario), count) in counts {
        let _ = writeln!(text, "{key} | {scenario} | {count}");
    }
    std::fs::write(FILE, text).expect("the file can be written");
}

fn frame() -> Vec<u8> {
    let head = r#"data: {"id":"chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz012","object":"chat.completion.chunk","#;
    let tail = r#""created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,"delta":{"content":""#;
    let end = "\"}}]}\n\n";
    let content = "x".repeat(FRAME_BYTES - head.len() - tail.len() - end.len());
    [head, tail, &content, end].concat().into_bytes()
}

fn pieces(chunk_bytes: usize) -> Vec<Bytes> {
    frame().repeat(FRAMES).chunks(chunk_bytes).map(|chunk| Bytes::from(chunk.to_vec())).collect()
}

fn frames(chunk_bytes: usize) -> Box<dyn FnMut()> {
    let pieces = pieces(chunk_bytes);
    let mut parser = Parser::new();
    Box::new(move || {
        let mut events = 0;
        for chunk in &pieces {
            let mut at = 0;
            while let Some(event) = parser.next(chunk, &mut at) {
                events += usize::from(black_box(event.data).len() > 10);
            }
        }
        assert_eq!(events, FRAMES);
    })
}

fn foreign_frames(chunk_bytes: usize) -> Box<dyn FnMut()> {
    use futures_util::{FutureExt, StreamExt, stream};
    let pieces = pieces(chunk_bytes);
    Box::new(move || {
        let chunks = stream::iter(pieces.iter().cloned().map(Ok::<Bytes, std::convert::Infallible>));
        let mut events = sse_stream::SseStream::from_bytes_stream(chunks);
        let mut count = 0;
        // All of it is there, so nothing is ever pending.
        while let Some(Some(event)) = events.next().now_or_never() {
            count += usize::from(black_box(event).is_ok_and(|event| event.data.is_some_and(|data| data.len() > 10)));
        }
        assert_eq!(count, FRAMES);
    })
}

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

fn head(text_bytes: usize, image_bytes: usize) -> Box<dyn FnMut()> {
    let body = body(text_bytes, image_bytes);
    let times = if image_bytes > 0 { 1 } else { 100 * 1024 / text_bytes.max(1024) };
    let times = if text_bytes > 1024 { 10 } else { times };
    Box::new(move || (0..times).for_each(|_| drop(black_box(Head::read(black_box(&body))).expect("a valid body"))))
}

fn spliced() -> Box<dyn FnMut()> {
    let body = body(16 << 10, 0);
    let head = Head::read(&body).expect("a valid body");
    Box::new(move || {
        for _ in 0..100 {
            black_box(splice(black_box(&body), &head, &[Edit::Model("my-deployment"), Edit::IncludeUsage]));
        }
    })
}

const WORDS: [&str; 10] = [" the", " gateway", " counts", " what", " passes", ",", " word", " by", " word", ".\n"];

fn chunks() -> Box<dyn FnMut()> {
    let chunk = |word: &str| {
        let choices =
            serde_json::json!([{ "index": 0, "delta": { "content": word }, "logprobs": null, "finish_reason": null }]);
        serde_json::json!({ "id": "chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz012", "object": "chat.completion.chunk", "created": 1_700_000_000,
                            "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_0123456789", "choices": choices, "usage": null })
        .to_string()
    };
    let chunks = WORDS.map(chunk);
    let mut reader = Reader::new();
    Box::new(move || {
        let mut meter = Meter::new(Vocabulary::O200k);
        for at in 0..1000 {
            let chunk = reader.read(black_box(chunks[at % chunks.len()].as_bytes()), &mut meter);
            assert!(chunk.is_some_and(|chunk| chunk.content));
        }
        black_box(meter.total());
    })
}

fn deltas() -> Box<dyn FnMut()> {
    Box::new(|| {
        let mut meter = Meter::new(Vocabulary::O200k);
        let lane = Lane { choice: 0, kind: Kind::Content };
        for at in 0..1000 {
            meter.push(lane, black_box(WORDS[at % WORDS.len()]));
            black_box(meter.total());
        }
        black_box(Running::new(Vocabulary::O200k));
    })
}

fn count(vocabulary: Vocabulary) -> Box<dyn FnMut()> {
    let chat = "Sure! Here's how you'd do it:\n\n1. **Install** the package: `pip install requests`\n2. Call `requests.get(url)` \
                with a timeout of 10 s\n3. Check `response.status_code == 200`\n\nLet me know if that doesn't work. 😊\n\n";
    let text: String = chat.repeat((16 << 10) / chat.len());
    Box::new(move || (0..10).for_each(|_| assert!(vocabulary.count(black_box(&text)) > 1000)))
}
