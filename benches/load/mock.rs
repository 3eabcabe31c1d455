//! The upstream: canned answers with usage, and streams of chunks as OpenAI sends them, at once or paced.
//!
//! It runs in a process of its own and is written on bare sockets, so that the core which it shares with the driver is
//! not the one that limits the measured proxy. Every chunk is one `write`, as an upstream that flushes each token does.

use std::fmt::Write;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memchr::memmem;
use tokio::net::TcpListener;

use crate::hostile::TEXTS;
use crate::wire::Connection;

/// Chunks of a stream for which the request names no number (`"mock_chunks":N`).
pub const CHUNKS: usize = 64;

/// The most chunks that a request may ask for.
const CHUNKS_MAX: usize = 100_000;

/// The model that it says it used.
pub const MODEL: &str = "gpt-4o-2024-08-06";

/// The one answer to a request that does not stream.
pub const ANSWER: &str = concat!(
    r#"{"id":"chatcmpl-CaZ9vIpRUz0Q8yfW2mDk3nX7sLt4b","object":"chat.completion","created":1760000000,"#,
    r#""model":"gpt-4o-2024-08-06","choices":[{"index":0,"message":{"role":"assistant","content":"A proxy takes a "#,
    r#"request from one socket, hands it to another, and brings the answer back. What it adds on the way should be "#,
    r#"small enough that nobody has to ask.","refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"#,
    r#""usage":{"prompt_tokens":212,"completion_tokens":38,"total_tokens":250,"prompt_tokens_details":"#,
    r#"{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"#,
    r#""accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"service_tier":"default","#,
    r#""system_fingerprint":"fp_cbf1785567"}"#
);

const HEAD_FIELDS: &str = "date: Sun, 22 Nov 2026 12:00:00 GMT\r\nserver: mock\r\nopenai-processing-ms: 12\r\n\
                           x-request-id: req_3f1c9a7be0d24c58a6e1f0b2c4d68e90\r\n";

const WORDS: [&str; 16] = [
    "A", " proxy", " takes", " a", " request", " from", " one", " socket", ",", " hands", " it", " to", " another",
    " and", " waits", ".",
];

/// Serves until its parent has gone.
pub async fn serve(listener: TcpListener) -> io::Result<()> {
    let answers = Arc::new(Answers::new());
    loop {
        let (stream, _) = listener.accept().await?;
        let answers = answers.clone();
        // A proxy may close a connection at any time, and the driver sees every answer that is not whole.
        tokio::spawn(async move { converse(Connection::over(stream)?, &answers).await });
    }
}

/// What is sent, made once.
struct Answers {
    whole: Vec<u8>,
    stream_head: Vec<u8>,
    chunks: Vec<Vec<u8>>,
    last_chunk: Vec<u8>,
    usage: Vec<u8>,
    done: Vec<u8>,
    /// The hostile texts that were asked for.
    texts: [OnceLock<Vec<Vec<u8>>>; TEXTS.len()],
}

impl Answers {
    fn new() -> Answers {
        let whole = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{HEAD_FIELDS}\r\n{ANSWER}",
            ANSWER.len()
        );
        let stream_head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\
             {HEAD_FIELDS}\r\n"
        );
        let usage = r#"{"prompt_tokens":212,"completion_tokens":64,"total_tokens":276}"#;
        Answers {
            whole: whole.into_bytes(),
            stream_head: stream_head.into_bytes(),
            chunks: (0..WORDS.len() * 4).map(|at| chunk(&content(at))).collect(),
            last_chunk: chunk(&event(r#"[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]"#, "null", 63)),
            usage: chunk(&event("[]", usage, 64)),
            done: [chunk("data: [DONE]\n\n"), b"0\r\n\r\n".to_vec()].concat(),
            texts: [const { OnceLock::new() }; TEXTS.len()],
        }
    }
}

fn content(at: usize) -> String {
    let role = if at == 0 { r#""role":"assistant","# } else { "" };
    let word = WORDS[at % WORDS.len()];
    let choices =
        format!(r#"[{{"index":0,"delta":{{{role}"content":"{word}"}},"logprobs":null,"finish_reason":null}}]"#);
    event(&choices, "null", at)
}

/// One event of about 230 bytes; `obfuscation` differs in each, as OpenAI's does.
fn event(choices: &str, usage: &str, at: usize) -> String {
    let padding: String = (0..4 + at * 7 % 9).map(|k| char::from(b'a' + ((at * 31 + k * 17) % 26) as u8)).collect();
    format!(
        r#"data: {{"id":"chatcmpl-CaZ9vIpRUz0Q8yfW2mDk3nX7sLt4b","object":"chat.completion.chunk","created":1760000000,"model":"gpt-4o","system_fingerprint":"fp_cbf1785567","choices":{choices},"usage":{usage},"obfuscation":"{padding}"}}"#
    ) + "\n\n"
}

fn chunk(payload: &str) -> Vec<u8> {
    let mut framed = String::new();
    write!(framed, "{:x}\r\n{payload}\r\n", payload.len()).expect("a string takes every write");
    framed.into_bytes()
}

async fn converse(mut connection: Connection, answers: &Answers) -> io::Result<()> {
    let mut body = Vec::new();
    while let Some(head) = connection.head().await? {
        body.clear();
        connection.body(head.body, &mut body).await?;
        if memmem::find(&body, br#""stream":true"#).is_none() {
            connection.write(&answers.whole).await?;
        } else {
            stream(&mut connection, &body, answers).await?;
        }
    }
    Ok(())
}

async fn stream(connection: &mut Connection, body: &[u8], answers: &Answers) -> io::Result<()> {
    let chunks = number(body, br#""mock_chunks":"#).unwrap_or(CHUNKS).clamp(1, CHUNKS_MAX);
    if let Some(text) = number(body, br#""mock_text":"#) {
        return stream_text(connection, text, answers).await;
    }
    let pace = number(body, br#""mock_pace_ms":"#).map(|ms| Duration::from_millis(ms as u64));
    connection.write(&answers.stream_head).await?;
    for at in 0..chunks - 1 {
        connection.write(&answers.chunks[at % answers.chunks.len()]).await?;
        match pace {
            Some(pace) => tokio::time::sleep(pace).await,
            None => tokio::task::yield_now().await,
        }
    }
    connection.write(&answers.last_chunk).await?;
    if memmem::find(body, b"include_usage").is_some() {
        connection.write(&answers.usage).await?;
    }
    connection.write(&answers.done).await
}

/// One of the hostile texts, without a usage, so that what was counted is billed.
async fn stream_text(connection: &mut Connection, number: usize, answers: &Answers) -> io::Result<()> {
    let chunks = answers.texts.get(number).ok_or(io::ErrorKind::InvalidInput)?.get_or_init(|| text_chunks(number));
    connection.write(&answers.stream_head).await?;
    for chunk in chunks {
        connection.write(chunk).await?;
    }
    connection.write(&answers.last_chunk).await?;
    connection.write(&answers.done).await
}

fn text_chunks(number: usize) -> Vec<Vec<u8>> {
    let content = |(at, delta): (usize, &String)| {
        let content = serde_json::Value::from(delta.as_str());
        let choices =
            format!(r#"[{{"index":0,"delta":{{"content":{content}}},"logprobs":null,"finish_reason":null}}]"#);
        chunk(&event(&choices, "null", at))
    };
    TEXTS[number].deltas().iter().enumerate().map(content).collect()
}

fn number(body: &[u8], name: &[u8]) -> Option<usize> {
    let after = &body[memmem::find(body, name)? + name.len()..];
    let digits = after.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&after[..digits]).ok()?.parse().ok()
}
