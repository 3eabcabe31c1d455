//! Recorded provider streams through the whole gateway: byte for byte, however the upstream cuts them.

use std::path::{Path, PathBuf};

use crate::node::{Setup, streaming};
use crate::upstream::{Upstream, chunk, stream_end, stream_head};

/// Dialects whose streams are chat completions, or near enough to pass as such.
const OPENAI_LIKE: [&str; 6] = ["openai", "azure", "deepseek", "mistral", "openrouter", "xai"];

fn corpus() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus/sse");
    if folder.join("MANIFEST.json").exists() {
        return Some(folder);
    }
    assert!(std::env::var("CI").is_err(), "CI must have the corpus beside the project");
    eprintln!("SKIPPED: there is no corpus in {}", folder.display());
    None
}

/// Chat completions among the recordings: name, bytes, and whether they fail within their stream.
fn recordings(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("MANIFEST.json")).unwrap()).unwrap();
    let manifest = manifest.as_object().unwrap();
    let like = |dialect: &str| OPENAI_LIKE.contains(&dialect) || dialect.starts_with("host:");
    let names = manifest.iter().filter(|(_, entry)| like(entry["dialect"].as_str().unwrap()));
    let read = names.map(|(name, _)| (name.clone(), std::fs::read(folder.join(format!("{name}.sse"))).unwrap()));
    read.filter(|(_, bytes)| {
        let text = String::from_utf8_lossy(bytes);
        text.contains("\"choices\":") && text.contains("\"delta\":") && !text.contains("\"object\":\"response\"")
    })
    .collect()
}

/// Cuts bytes at random places, the same ones each time.
fn cut(bytes: &[u8], mut seed: u64) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let length = (1 + (seed >> 33) as usize % 900).min(rest.len());
        pieces.push(rest[..length].to_vec());
        rest = &rest[length..];
    }
    pieces
}

/// The tokens of the last usage in a recording.
fn last_usage(bytes: &[u8]) -> Option<(u64, u64)> {
    let text = String::from_utf8_lossy(bytes);
    let data = text.lines().filter_map(|line| line.strip_prefix("data:"));
    let mut usages = data.filter_map(|data| {
        let chunk: serde_json::Value = serde_json::from_str(data.trim()).ok()?;
        let usage = chunk.get("usage")?;
        Some((usage["prompt_tokens"].as_u64()?, usage["completion_tokens"].as_u64().unwrap_or(0)))
    });
    usages.next_back()
}

#[tokio::test]
async fn recorded_completions_pass_at_their_own_path() {
    let Some(folder) = corpus() else { return };
    let mut passed = 0;
    for name in ["openai-legacy--completion-streaming-usage", "openai-legacy--openai-completions-post-1dd33b11"] {
        let bytes = std::fs::read(folder.join(format!("{name}.sse"))).unwrap();
        let sent = bytes.clone();
        let upstream = Upstream::start(move |number, _| {
            let chunks = cut(&sent, number as u64).into_iter().map(chunk);
            [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
        })
        .await;
        let node = Setup::at(&upstream).start().await;
        let body = r#"{"model":"m","prompt":"Say hello.","stream":true,"stream_options":{"include_usage":true}}"#;
        let request = String::from_utf8(crate::node::post(crate::node::KEY, body)).unwrap();
        let request = request.replace("/v1/chat/completions", "/v1/completions");
        let reply = node.send(request.as_bytes()).await.read().await;
        assert_eq!((reply.status, reply.text()), (200, String::from_utf8_lossy(&bytes).into_owned()), "{name}");
        let line = node.lines(1).await.pop().unwrap();
        assert_eq!(line.end_reason.name(), "complete", "{name}");
        assert_eq!(line.usage_output, last_usage(&bytes).map(|(_, output)| output), "{name}");
        node.finish().await;
        passed += 1;
    }
    assert_eq!(passed, 2);
}

#[tokio::test]
async fn every_recorded_stream_passes_byte_for_byte_however_it_is_cut() {
    let Some(folder) = corpus() else { return };
    let recordings = recordings(&folder);
    assert!(recordings.len() >= 25, "only {} recordings were found", recordings.len());
    for (name, bytes) in recordings {
        let sent = bytes.clone();
        let upstream = Upstream::start(move |number, _| {
            let pieces = if number == 0 { vec![sent.clone()] } else { cut(&sent, number as u64) };
            let chunks = pieces.into_iter().map(chunk);
            [stream_head()].into_iter().chain(chunks).chain([stream_end()]).collect()
        })
        .await;
        let node = Setup::at(&upstream).start().await;
        for _ in 0..4 {
            let reply = node.chat(&streaming(r#","stream_options":{"include_usage":true}"#)).await;
            assert_eq!(reply.status, 200, "{name}: {}", reply.text());
            assert_eq!(reply.text(), String::from_utf8_lossy(&bytes), "{name}");
            assert!(reply.whole, "{name}");
        }
        let lines = node.lines(4).await;
        // Its own usage is taken where it carries one: the last one.
        if let Some((input, output)) = last_usage(&bytes) {
            assert!(lines.iter().all(|line| line.usage_input == Some(input)), "{name}: {lines:?}");
            // xAI's leaves out its reasoning.
            assert!(lines.iter().all(|line| line.usage_output >= Some(output)), "{name}: {lines:?}");
        }
        assert!(lines.iter().all(|line| line.end_reason.name() == "complete" && line.output > 0), "{name}: {lines:?}");
        node.finish().await;
    }
}
