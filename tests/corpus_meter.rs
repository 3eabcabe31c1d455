//! Recorded answers of OpenAI-shaped upstreams: what is counted here against what the upstream said.

use std::{collections::BTreeMap, fs, path::PathBuf};

use gpt_cat::meter::{Meter, Reader, Usage, Vocabulary};

/// What the meter makes of one recorded stream.
struct Reading {
    name: String,
    model: String,
    counted: u64,
    usage: Option<Usage>,
    finished: bool,
    content_chunks: usize,
    tool_calls: u64,
}

#[test]
fn recorded_answers_count_as_their_upstream_counted_them() {
    let Some(recordings) = recordings() else { return };
    let readings: Vec<Reading> = recordings.iter().map(|(name, stream)| read(name, stream)).collect();
    println!("{:<70} {:<28} {:>7} {:>7} {:>9}", "recording", "model", "counted", "output", "reasoning");
    for reading in readings.iter().filter(|reading| reading.content_chunks > 0) {
        let usage = reading.usage.map(|usage| (usage.output.to_string(), usage.reasoning.to_string()));
        let (output, reasoning) = usage.unwrap_or(("-".into(), "-".into()));
        println!("{:<70.70} {:<28.28} {:>7} {output:>7} {reasoning:>9}", reading.name, reading.model, reading.counted);
    }
    print_errors(&readings);
    let openai = readings.iter().filter(|reading| reading.name.starts_with("openai") && reading.content_chunks > 0);
    let mut compared = 0;
    for reading in openai.filter(|reading| Vocabulary::of_model(&reading.model).is_some()) {
        let Some(usage) = reading.usage.filter(|usage| usage.reasoning == 0) else { continue };
        compared += 1;
        let frames = reading.tool_calls * TOOL_FRAME_TOKENS_MAX;
        let range = usage.output.saturating_sub(frames + TOLERATED.max(usage.output / 50))..=usage.output + TOLERATED;
        assert!(range.contains(&reading.counted), "{}: {} outside {range:?}", reading.name, reading.counted);
    }
    assert!(compared > 0, "the recordings have OpenAI streams with usage");
}

#[test]
fn every_recorded_answer_that_says_it_is_finished_is_seen_to_be() {
    let Some(recordings) = recordings() else { return };
    for (name, stream) in &recordings {
        let says = ["stop", "length", "tool_calls", "function_call"]
            .iter()
            .any(|reason| stream.replace(' ', "").contains(&format!("\"finish_reason\":\"{reason}\"")));
        if says {
            assert!(read(name, stream).finished, "{name}");
        }
    }
}

/// The table of ARCHITECTURE.md: how far the local count is from what each dialect's upstreams said, over all recordings
/// with a usage. Reasoning that is billed and not shown is in the usage alone.
fn print_errors(readings: &[Reading]) {
    let mut dialects = BTreeMap::<&str, Vec<(u64, Usage)>>::new();
    for reading in readings.iter().filter(|reading| reading.content_chunks > 0) {
        let dialect = reading.name.split("--").next().unwrap_or_default();
        dialects.entry(dialect).or_default().extend(reading.usage.map(|usage| (reading.counted, usage)));
    }
    println!(
        "\n{:<60} {:>10} {:>8} {:>8} {:>10} {:>8}",
        "dialect", "recordings", "counted", "output", "reasoning", "error"
    );
    for (dialect, counts) in dialects.into_iter().filter(|(_, counts)| !counts.is_empty()) {
        let counted: u64 = counts.iter().map(|(counted, _)| counted).sum();
        let output: u64 = counts.iter().map(|(_, usage)| usage.output).sum();
        let reasoning: u64 = counts.iter().map(|(_, usage)| usage.reasoning).sum();
        let error = 100.0 * (counted as f64 - output as f64) / output.max(1) as f64;
        println!("{dialect:<60.60} {:>10} {counted:>8} {output:>8} {reasoning:>10} {error:>7.1}%", counts.len());
    }
}

/// Tokens that a short answer may be off by.
const TOLERATED: u64 = 3;

/// What OpenAI bills for a tool call beside its name and arguments, most of it when calls are made in parallel (seen:
/// 40 tokens for two calls whose texts have 7). None of it passes here.
const TOOL_FRAME_TOKENS_MAX: u64 = 18;

fn read(name: &str, stream: &str) -> Reading {
    let documents: Vec<String> = stream.replace("\r\n", "\n").split("\n\n").map(data_of).collect();
    let model = documents
        .iter()
        .find_map(|json| serde_json::from_str::<serde_json::Value>(json).ok()?["model"].as_str().map(str::to_owned));
    let model = model.unwrap_or_default();
    let mut meter = Meter::new(vocabulary_of(&model));
    let mut reader = Reader::new();
    let mut reading = Reading {
        name: name.to_owned(),
        model,
        counted: 0,
        usage: None,
        finished: false,
        content_chunks: 0,
        tool_calls: 0,
    };
    for chunk in documents.iter().filter_map(|json| reader.read(json.as_bytes(), &mut meter)) {
        assert!(!chunk.usage_invalid, "{name}: {chunk:?}");
        reading.usage = chunk.usage.or(reading.usage);
        reading.finished |= !chunk.finished.is_empty();
        reading.content_chunks += usize::from(chunk.content);
    }
    reading.counted = meter.total();
    reading.tool_calls = stream.replace(' ', "").matches("\"type\":\"function\"").count() as u64;
    reading
}

fn data_of(event: &str) -> String {
    let lines = event.lines().filter_map(|line| line.strip_prefix("data:"));
    lines.map(|data| data.strip_prefix(' ').unwrap_or(data)).collect::<Vec<_>>().join("\n")
}

fn vocabulary_of(model: &str) -> Vocabulary {
    Vocabulary::of_model(model).unwrap_or(Vocabulary::O200k)
}

/// The recordings in OpenAI's chat or completions shape, by name.
fn recordings() -> Option<Vec<(String, String)>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus/sse");
    let Ok(entries) = fs::read_dir(&folder) else {
        eprintln!("SKIPPED: the recorded streams are not at {}", folder.display());
        return None;
    };
    let mut recordings: Vec<(String, String)> = entries
        .filter_map(|entry| {
            let path = entry.expect("a readable folder").path();
            let name = path.file_name()?.to_str()?.strip_suffix(".sse")?.to_owned();
            Some((name, String::from_utf8_lossy(&fs::read(&path).expect("a readable file")).into_owned()))
        })
        // DashScope's native protocol puts choices into `output`.
        .filter(|(name, stream)| stream.contains("\"choices\"") && !name.starts_with("dashscope"))
        .collect();
    recordings.sort();
    Some(recordings)
}
