//! What hostile text costs, and what others notice of it: a megabyte of each kind as a prompt and as a stream, with small
//! requests beside it on the gateway's one worker.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::drive::{self, Question};
use crate::measure::probe;
use crate::process;
use crate::proxies::{KINDS, Place};

const TEXT_BYTES: usize = 1 << 20;
/// A line of an event stream may be 8 MiB long; the frame around the text is less than the rest.
const LINE_BYTES: usize = (8 << 20) - 1024;
/// Text of a delta, but for the one that is a line of its own.
const DELTA_BYTES: usize = 4096;
/// How long each is asked again and again.
const ASKED_FOR: Duration = Duration::from_secs(2);

/// A kind of text.
pub struct Text {
    name: &'static str,
    make: fn() -> String,
    delta_bytes: usize,
}

const fn of_deltas(name: &'static str, make: fn() -> String) -> Text {
    Text { name, make, delta_bytes: DELTA_BYTES }
}

/// Every kind, a row of the table each.
pub static TEXTS: [Text; 13] = [
    of_deltas("`a`", || "a".repeat(TEXT_BYTES)),
    of_deltas("space", || " ".repeat(TEXT_BYTES)),
    of_deltas("tab", || "\t".repeat(TEXT_BYTES)),
    of_deltas("newline", || "\n".repeat(TEXT_BYTES)),
    of_deltas("emoji", || "\u{1f600}".repeat(TEXT_BYTES / 4)),
    of_deltas("random CJK", || {
        random(TEXT_BYTES / 3, |number| char::from_u32(0x4e00 + number % 0x5200).unwrap_or('中'))
    }),
    of_deltas("random a–z", || random(TEXT_BYTES, |number| char::from(b'a' + (number % 26) as u8))),
    of_deltas("`-`", || "-".repeat(TEXT_BYTES)),
    of_deltas("`=`", || "=".repeat(TEXT_BYTES)),
    of_deltas("`.`", || ".".repeat(TEXT_BYTES)),
    of_deltas("`[` (deep nesting)", || "[".repeat(TEXT_BYTES)),
    of_deltas("`\\\"` (all escapes)", || "\"".repeat(TEXT_BYTES)),
    Text {
        name: "random a–z, a line of 8 MiB",
        make: || random(LINE_BYTES, |number| char::from(b'a' + (number % 26) as u8)),
        delta_bytes: LINE_BYTES,
    },
];

impl Text {
    /// The text of each delta.
    pub fn deltas(&self) -> Vec<String> {
        let mut deltas = vec![String::new()];
        for one in (self.make)().chars() {
            if deltas.last().is_some_and(|last| last.len() + one.len_utf8() > self.delta_bytes) {
                deltas.push(String::new());
            }
            deltas.last_mut().expect("there is one").push(one);
        }
        deltas
    }
}

/// The same text each time (an LCG, Knuth's constants).
fn random(count: usize, of: fn(u32) -> char) -> String {
    let mut state = 1_u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        of((state >> 33) as u32)
    };
    (0..count).map(next).collect()
}

/// What one kind cost.
struct Seen {
    times: Vec<Duration>,
    beside: Vec<Duration>,
}

/// Runs every kind against a gateway that counts each prompt, and prints a table.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let place = Place { more: "[meter]\ncount_prompt = \"always\"\n", ..*place };
    let gateway = KINDS.last().expect("the gateway is the last one");
    println!(
        "| 1 MB of | as prompt, ms | others p50, ms | p99 | as stream, ms | others p50, ms | p99 | peak RSS, MiB |"
    );
    println!("|{}", " --- |".repeat(8));
    for (at, text) in TEXTS.iter().enumerate() {
        // One for each, so that the peak is its own.
        let proxy = gateway.start(&place).await?;
        probe(proxy.address).await?;
        let before = process::resident_peak_kib(proxy.process.id())?;
        let prompt = seen(&proxy, Question::prompt(&(text.make)())).await?;
        let stream = seen(&proxy, Question::text(at, text.deltas().len())).await?;
        let peak = process::resident_peak_kib(proxy.process.id())?;
        let cells = [prompt, stream].map(|Seen { times, beside }| {
            format!("{} | {} | {}", ms(&times, 0.5), ms(&beside, 0.5), ms(&beside, 0.99))
        });
        println!("| {} | {} | {} (+{}) |", text.name, cells.join(" | "), peak >> 10, (peak - before) >> 10);
    }
    Ok(())
}

/// Asks one question again and again, and small ones beside it.
async fn seen(proxy: &crate::proxies::Proxy, question: Question) -> Outcome<Seen> {
    let question = Arc::new(question);
    let hostile = async {
        let (began, mut times) = (Instant::now(), Vec::new());
        while began.elapsed() < ASKED_FOR || times.is_empty() {
            times.push(drive::closed_loop(proxy.address, &question, 1, 1).await?);
        }
        Outcome::Ok(times)
    };
    let (times, beside) = tokio::join!(hostile, probe(proxy.address));
    Ok(Seen { times: times?, beside: beside? })
}

fn ms(times: &[Duration], share: f64) -> String {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(at).map_or_else(|| "–".to_owned(), |time| format!("{:.1}", time.as_secs_f64() * 1e3))
}
