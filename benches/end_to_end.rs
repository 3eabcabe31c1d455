//! A whole call over loopback sockets: client, gateway and a scripted upstream on one thread.

mod support;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use gpt_cat::config::Config;
use gpt_cat::server::{Doors, Server};
use gpt_cat::upstream::dialects;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const KEY: &str = "sk-bench-end-to-end";
const CHUNKS: usize = 64;

/// What the upstream answers: the whole to a request, the stream to one that asks for it.
fn answers() -> (Vec<u8>, Vec<u8>) {
    let usage = r#""usage":{"prompt_tokens":20,"completion_tokens":64,"total_tokens":84}"#;
    let body = format!(
        r#"{{"id":"1","object":"chat.completion","model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"finish_reason":"stop"}}],{usage}}}"#,
        " word".repeat(CHUNKS)
    );
    let whole =
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut stream =
        String::from("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut event = |data: &str| {
        let event = format!("data: {data}\n\n");
        stream += &format!("{:x}\r\n{event}\r\n", event.len());
    };
    let chunk = |delta: &str, finish: &str| {
        format!(
            r#"{{"id":"1","object":"chat.completion.chunk","model":"m","choices":[{{"index":0,"delta":{delta},"finish_reason":{finish}}}]}}"#
        )
    };
    (0..CHUNKS).for_each(|_| event(&chunk(r#"{"content":" word"}"#, "null")));
    event(&chunk("{}", "\"stop\""));
    event(&format!(r#"{{"id":"1","object":"chat.completion.chunk","model":"m","choices":[],{usage}}}"#));
    event("[DONE]");
    stream += "0\r\n\r\n";
    (whole.into_bytes(), stream.into_bytes())
}

async fn upstream() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let (whole, stream) = answers();
            tokio::spawn(async move {
                let mut request = vec![0; 16 << 10];
                // Requests of this bench come in one piece.
                while let Ok(read @ 1..) = socket.read(&mut request).await {
                    let streams = memchr::memmem::find(&request[..read], b"\"stream\":true").is_some();
                    if socket.write_all(if streams { &stream } else { &whole }).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

async fn gateway(folder: &std::path::Path) -> std::net::SocketAddr {
    let toml = format!(
        "database_url = \"sqlite:{}\"\n[server]\nhttp = \"127.0.0.1:0\"\nhttps = \"off\"\n[admin]\nlisten = \"off\"\n[endpoints.up]\n\
         dialect = \"openai\"\nbase_url = \"http://{}/v1\"\nmodels = [\"m\"]\n[models.m]\ninput = \"1\"\noutput = \"2\"\n",
        folder.join("x.db").display(),
        upstream().await
    );
    let config = Config::load(Some(toml.as_str()), [], &dialects()).expect("a configuration");
    let (store, master) = support::filled(&config.database_url, folder, KEY, "up", 1).await;
    let doors = Doors::open(&config.server).await.expect("a port");
    let address = doors.http_address().expect("plain HTTP");
    let server = Server::start(config, store, master, doors).await.expect("a server");
    tokio::spawn(server.run(std::future::pending()));
    address
}

/// Sends a request and reads until its answer is over.
async fn call(socket: &mut TcpStream, request: &[u8], last: &[u8], buffer: &mut Vec<u8>) {
    socket.write_all(request).await.expect("the gateway listens");
    buffer.clear();
    while !buffer.ends_with(last) {
        assert!(socket.read_buf(buffer).await.expect("an answer") > 0, "{}", String::from_utf8_lossy(buffer));
    }
}

fn end_to_end(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let address = runtime.block_on(gateway(folder.path()));
    let prompt = "some words of a prompt ".repeat(40);
    let mut group = c.benchmark_group("end_to_end");
    group.measurement_time(Duration::from_secs(5));
    for (name, more, last) in
        [("whole, 1 KB", "", &b"84}}"[..]), ("64 chunks", ",\"stream\":true", b"[DONE]\n\n\r\n0\r\n\r\n")]
    {
        let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}]{more}}}"#);
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut socket = runtime.block_on(TcpStream::connect(address)).expect("the gateway listens");
        let mut buffer = Vec::new();
        group.bench_function(name, |b| {
            b.iter(|| runtime.block_on(call(&mut socket, request.as_bytes(), last, &mut buffer)));
        });
    }
    group.finish();
}

criterion_group!(benches, end_to_end);
criterion_main!(benches);
