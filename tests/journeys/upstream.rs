//! A scripted upstream on a real socket: what it answers, when, and when it dies is written down per request.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// One thing that the upstream does.
#[derive(Clone, Debug)]
pub enum Act {
    /// Writes these bytes and flushes them.
    Write(Vec<u8>),
    Pause(Duration),
    /// Waits until the gateway has closed the connection, and notes it.
    AwaitClose,
    /// Closes the connection.
    Close,
}

/// What reached the upstream.
#[derive(Clone, Debug)]
pub struct Seen {
    pub head: String,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("the gateway forwards JSON")
    }
}

type Script = dyn Fn(usize, &Seen) -> Vec<Act> + Send + Sync;

#[derive(Clone)]
pub struct Upstream {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    closed: Arc<Notify>,
    connections: Arc<AtomicUsize>,
}

impl Upstream {
    /// Answers request number n (from 0) as the script says.
    pub async fn start(script: impl Fn(usize, &Seen) -> Vec<Act> + Send + Sync + 'static) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            closed: Arc::new(Notify::new()),
            connections: Arc::default(),
        };
        let script: Arc<Script> = Arc::new(script);
        let accepting = upstream.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                accepting.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(accepting.clone().serve(socket, script.clone()));
            }
        });
        upstream
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Connections that were made so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Waits until a script's `AwaitClose` was fulfilled.
    pub async fn saw_close(&self) {
        tokio::time::timeout(Duration::from_secs(5), self.closed.notified()).await.expect("the gateway hangs up");
    }

    async fn serve(self, mut socket: TcpStream, script: Arc<Script>) {
        socket.set_nodelay(true).unwrap();
        while let Some(request) = read_request(&mut socket).await {
            let number = {
                let mut seen = self.seen.lock().unwrap();
                seen.push(request.clone());
                seen.len() - 1
            };
            for act in script(number, &request) {
                match act {
                    Act::Write(bytes) => {
                        if socket.write_all(&bytes).await.is_err() {
                            self.closed.notify_one();
                            return;
                        }
                    }
                    Act::Pause(time) => tokio::time::sleep(time).await,
                    Act::AwaitClose => {
                        let mut rest = [0; 256];
                        while matches!(socket.read(&mut rest).await, Ok(1..)) {}
                        self.closed.notify_one();
                        return;
                    }
                    Act::Close => return,
                }
            }
        }
    }
}

async fn read_request(socket: &mut TcpStream) -> Option<Seen> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let length = head
                .lines()
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(str::to_owned))
                .map_or(0, |length| length.trim().parse().unwrap());
            if bytes.len() >= end + 4 + length {
                return Some(Seen { head, body: bytes[end + 4..end + 4 + length].to_vec() });
            }
        }
        let mut chunk = vec![0; 16384];
        match socket.read(&mut chunk).await {
            Ok(0) | Err(_) => return None,
            Ok(read) => bytes.extend_from_slice(&chunk[..read]),
        }
    }
}

/// A whole answer with a content length.
pub fn whole(status: u16, body: &str) -> Vec<Act> {
    whole_with(status, "", body)
}

/// The same with more header lines (each ending in CRLF).
pub fn whole_with(status: u16, headers: &str, body: &str) -> Vec<Act> {
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    vec![Act::Write(text.into_bytes())]
}

/// The head of a chunked event stream.
pub fn stream_head() -> Act {
    Act::Write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec())
}

/// One HTTP chunk.
pub fn chunk(bytes: impl AsRef<[u8]>) -> Act {
    let bytes = bytes.as_ref();
    Act::Write([format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())
}

/// The end of a chunked body.
pub fn stream_end() -> Act {
    Act::Write(b"0\r\n\r\n".to_vec())
}

/// A whole event stream in one go.
pub fn stream(events: &str) -> Vec<Act> {
    vec![stream_head(), chunk(events), stream_end()]
}

/// An SSE event with a delta of choice 0.
pub fn delta(delta: serde_json::Value) -> String {
    event(serde_json::json!([{ "index": 0, "delta": delta, "finish_reason": null }]))
}

pub fn text(text: &str) -> String {
    delta(serde_json::json!({ "content": text }))
}

pub fn finish() -> String {
    event(serde_json::json!([{ "index": 0, "delta": {}, "finish_reason": "stop" }]))
}

pub fn event(choices: serde_json::Value) -> String {
    let chunk = serde_json::json!({ "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
                                    "choices": choices });
    format!("data: {chunk}\n\n")
}

pub fn usage(input: i64, output: i64) -> String {
    let chunk = serde_json::json!({ "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [], "usage": { "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output } });
    format!("data: {chunk}\n\n")
}

pub const DONE: &str = "data: [DONE]\n\n";

/// A whole completion that says `text`.
pub fn completion(text: &str, input: i64, output: i64) -> String {
    serde_json::json!({ "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": "stop" }],
        "usage": { "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output } })
    .to_string()
}
