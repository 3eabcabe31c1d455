//! The client: asks through a proxy in closed and open loops, and checks every answer whole.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memchr::memmem;
use tokio::task::JoinSet;

use crate::wire::Connection;
use crate::{KEY, MAPPED, MODEL, Outcome, mock};

/// The longest that any one measurement may take: past it a proxy has lost an answer.
const MEASUREMENT_TIMEOUT: Duration = Duration::from_secs(120);

/// One request, made once and sent many times, and what a whole answer to it is.
pub struct Question {
    bytes: Vec<u8>,
    answer: Answer,
}

enum Answer {
    Whole { model: String },
    Stream { chunks: usize },
}

impl Question {
    /// A prompt of so many bytes for a model, answered in one piece.
    pub fn whole(model: &str, prompt_bytes: usize) -> Question {
        Question { bytes: request(model, "", prompt_bytes), answer: Answer::Whole { model: model.to_owned() } }
    }

    /// A prompt of 1 KB, answered in [`mock::CHUNKS`] chunks as fast as they go.
    pub fn stream(model: &str) -> Question {
        Question { bytes: request(model, r#""stream":true,"#, 1024), answer: Answer::Stream { chunks: mock::CHUNKS } }
    }

    /// The same prompt, answered in `chunks` chunks, one each `pace_ms`.
    pub fn paced(chunks: usize, pace_ms: u64) -> Question {
        let fields = format!(r#""stream":true,"mock_chunks":{chunks},"mock_pace_ms":{pace_ms},"#);
        Question { bytes: request(MODEL, &fields, 1024), answer: Answer::Stream { chunks } }
    }

    /// A text as the prompt, answered in one piece.
    pub fn prompt(text: &str) -> Question {
        Question { bytes: ask_for("", text), answer: Answer::Whole { model: MODEL.to_owned() } }
    }

    /// A stream of one of the hostile texts, in so many deltas.
    pub fn text(number: usize, deltas: usize) -> Question {
        let fields = format!(r#""stream":true,"mock_text":{number},"#);
        Question { bytes: ask_for(&fields, "Go on."), answer: Answer::Stream { chunks: deltas + 1 } }
    }

    fn check(&self, body: &[u8]) -> io::Result<()> {
        match &self.answer {
            Answer::Whole { .. } if body == mock::ANSWER.as_bytes() => Ok(()),
            // The gateway gives a mapped model's name back.
            Answer::Whole { model }
                if model == MAPPED && body == mock::ANSWER.replace(mock::MODEL, MAPPED).as_bytes() =>
            {
                Ok(())
            }
            Answer::Whole { .. } => Err(wrong("another answer than the upstream gave", body)),
            &Answer::Stream { chunks } => {
                let found = memmem::find_iter(body, b"data: {").count();
                if found == chunks && body.ends_with(b"data: [DONE]\n\n") {
                    return Ok(());
                }
                Err(wrong(&format!("{found} chunks of {chunks}, or no end"), body))
            }
        }
    }
}

fn request(model: &str, fields: &str, prompt_bytes: usize) -> Vec<u8> {
    let sentence = "Explain in plain words what a reverse proxy does between a client and a server. ";
    let prompt = sentence.repeat(prompt_bytes / sentence.len() + 1);
    let body = format!(
        r#"{{"model":"{model}",{fields}"temperature":0.7,"messages":[{{"role":"system","content":"You are brief."}},{{"role":"user","content":"{}"}}]}}"#,
        &prompt[..prompt_bytes]
    );
    post(&body)
}

fn post(body: &str) -> Vec<u8> {
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n\
         content-type: application/json\r\naccept: application/json\r\nuser-agent: load\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [&head, body].concat().into_bytes()
}

fn ask_for(fields: &str, prompt: &str) -> Vec<u8> {
    let prompt = serde_json::Value::from(prompt);
    post(&format!(r#"{{"model":"{MODEL}",{fields}"messages":[{{"role":"user","content":{prompt}}}]}}"#))
}

fn wrong(what: &str, body: &[u8]) -> io::Error {
    let shown = String::from_utf8_lossy(&body[..body.len().min(400)]);
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {shown}"))
}

/// One question on a connection of its own: is the proxy ready?
pub async fn ask_once(address: SocketAddr) -> io::Result<()> {
    ask(&mut Connection::open(address).await?, &Question::whole(MODEL, 1024), &mut Vec::new()).await
}

async fn ask(connection: &mut Connection, question: &Question, body: &mut Vec<u8>) -> io::Result<()> {
    connection.write(&question.bytes).await?;
    let head = connection.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    body.clear();
    connection.body(head.body, body).await?;
    if !head.first.starts_with("HTTP/1.1 200") {
        return Err(wrong(&head.first, body));
    }
    question.check(body)
}

/// Asks `count` times over `connections` connections, each as soon as its last answer is whole; how long it took.
pub async fn closed_loop(
    address: SocketAddr,
    question: &Arc<Question>,
    connections: usize,
    count: usize,
) -> Outcome<Duration> {
    let mut askers = JoinSet::new();
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(Connection::open(address).await?);
    }
    let started = Instant::now();
    for mut connection in open {
        let question = question.clone();
        askers.spawn(async move {
            let mut body = Vec::new();
            for _ in 0..count / connections {
                ask(&mut connection, &question, &mut body).await?;
            }
            Ok(())
        });
    }
    all(askers).await?;
    Ok(started.elapsed())
}

/// Asks `count` times at `per_second`, however long the answers take; the times from request to whole answer.
pub async fn open_loop(
    address: SocketAddr,
    question: &Arc<Question>,
    per_second: u32,
    count: usize,
) -> Outcome<Vec<Duration>> {
    let mut idle = Vec::new();
    let (give_back, mut given_back) = tokio::sync::mpsc::unbounded_channel();
    let mut askers = JoinSet::new();
    let mut clock = tokio::time::interval(Duration::from_secs(1) / per_second);
    for _ in 0..count {
        clock.tick().await;
        while let Ok(connection) = given_back.try_recv() {
            idle.push(connection);
        }
        let mut connection = match idle.pop() {
            Some(connection) => connection,
            None => Connection::open(address).await?,
        };
        let (question, give_back) = (question.clone(), give_back.clone());
        askers.spawn(async move {
            let mut body = Vec::with_capacity(4096);
            let started = Instant::now();
            ask(&mut connection, &question, &mut body).await?;
            let took = started.elapsed();
            give_back.send(connection).ok();
            Ok(took)
        });
    }
    all(askers).await
}

async fn all<T: 'static>(mut askers: JoinSet<io::Result<T>>) -> Outcome<Vec<T>> {
    let mut results = Vec::new();
    let everything = async {
        while let Some(ended) = askers.join_next().await {
            results.push(ended??);
        }
        Outcome::Ok(())
    };
    tokio::time::timeout(MEASUREMENT_TIMEOUT, everything).await.map_err(|_| "answers are missing")??;
    Ok(results)
}

/// Streams that are open; dropped, they are hung up.
pub struct Held {
    _readers: JoinSet<io::Result<()>>,
}

/// Opens `count` streams and reads on from each; returns when every one has had two chunks.
pub async fn hold(address: SocketAddr, question: &Arc<Question>, count: usize) -> Outcome<Held> {
    let flowing = Arc::new(AtomicUsize::new(0));
    let mut readers = JoinSet::new();
    for _ in 0..count {
        let mut connection = Connection::open(address).await?;
        let (question, flowing) = (question.clone(), flowing.clone());
        readers.spawn(async move {
            connection.write(&question.bytes).await?;
            connection.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut body = Vec::new();
            while memmem::find_iter(&body, b"data: {").count() < 2 {
                if !connection.chunk(&mut body).await? {
                    return Err(wrong("a stream that ended early", &body));
                }
            }
            flowing.fetch_add(1, Ordering::Relaxed);
            while connection.chunk(&mut body).await? {
                body.clear();
            }
            Ok(())
        });
    }
    let patience = Instant::now() + MEASUREMENT_TIMEOUT;
    while flowing.load(Ordering::Relaxed) < count {
        if let Some(ended) = readers.try_join_next() {
            ended??;
            return Err("a held stream ended before the others began".into());
        }
        if Instant::now() > patience {
            return Err(format!("{} of {count} streams began", flowing.load(Ordering::Relaxed)).into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(Held { _readers: readers })
}
