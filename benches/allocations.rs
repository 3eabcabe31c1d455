//! Allocations of a pass-through stream, a chunk: what the gateway makes beside a proxy of bare hyper.
//!
//! Each proxy runs in a process of its own whose allocator counts. The upstream sends a chunk when the client has the
//! one before it, so every chunk is read, judged, counted and written by itself, and the figures are the same in each
//! run. Fails when the gateway makes one for each chunk, or for a few of them, that the bare proxy does not make.

#[path = "load/bare.rs"]
mod bare;
mod support;

use std::alloc::System;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Duration;

use gpt_cat::config::Config;
use gpt_cat::server::{Doors, Server};
use gpt_cat::upstream::dialects;
use memchr::memmem;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const KEY: &str = "sk-allocations";
/// Chunks until everything has the size that it keeps.
const WARM: usize = 2000;
const CHUNKS: usize = 8000;
/// What holding the next slice of 256 tokens takes, some thirty allocations, and what a node does once a second.
const SHARE_MAX: f64 = 0.2;
/// Whatever hangs must be seen to.
const PATIENCE: Duration = Duration::from_secs(20);

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Outcome<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("bare"), Some(upstream)) => serve_bare(upstream.parse()?).map(|()| ExitCode::SUCCESS),
        (Some("gateway"), Some(upstream)) => serve_gateway(upstream.parse()?).map(|()| ExitCode::SUCCESS),
        _ => compare(),
    }
}

fn compare() -> Outcome<ExitCode> {
    let measured =
        [("bare hyper", "bare", false), ("gpt-cat", "gateway", false), ("gpt-cat, mapped model", "gateway", true)];
    let mut counts = Vec::new();
    println!("| a chunk of a stream | allocations | reallocations |\n| --- | --- | --- |");
    for (name, kind, mapped) in measured {
        let (allocations, reallocations) = Proxy::start(kind)?.count(mapped)?;
        println!("| {name} | {allocations:.3} | {reallocations:.3} |");
        counts.push(allocations + reallocations);
    }
    let more = counts[1].max(counts[2]) - counts[0];
    if more > SHARE_MAX {
        println!("the gateway makes {more:.3} more a chunk than a bare proxy");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// A proxy in a process of its own, and the upstream that it calls.
struct Proxy {
    child: Child,
    asked: ChildStdin,
    told: BufReader<ChildStdout>,
    address: SocketAddr,
    upstream: TcpListener,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    fn start(kind: &str) -> Outcome<Proxy> {
        let upstream = TcpListener::bind("127.0.0.1:0")?;
        let mut child = Command::new(std::env::current_exe()?)
            .args([kind, &upstream.local_addr()?.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let asked = child.stdin.take().ok_or("no standard input")?;
        let mut told = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        let mut line = String::new();
        told.read_line(&mut line)?;
        Ok(Proxy { child, asked, told, address: line.trim().parse()?, upstream })
    }

    /// Allocations and reallocations a chunk.
    fn count(mut self, mapped: bool) -> Outcome<(f64, f64)> {
        let mut client = patient(TcpStream::connect(self.address)?)?;
        client.write_all(&request(if mapped { "mapped" } else { "m" }))?;
        let mut upstream = patient(self.upstream.accept()?.0)?;
        let mut buffer = Vec::new();
        until(&mut upstream, &mut buffer, b"}]}")?;
        upstream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")?;
        buffer.clear();
        send(&mut upstream, &mut client, &mut buffer, 0..WARM)?;
        let before = self.so_far()?;
        send(&mut upstream, &mut client, &mut buffer, WARM..WARM + CHUNKS)?;
        let after = self.so_far()?;
        let each = |of: fn((u64, u64)) -> u64| (of(after) - of(before)) as f64 / CHUNKS as f64;
        Ok((each(|(allocations, _)| allocations), each(|(_, reallocations)| reallocations)))
    }

    fn so_far(&mut self) -> Outcome<(u64, u64)> {
        writeln!(self.asked)?;
        let mut line = String::new();
        self.told.read_line(&mut line)?;
        let (allocations, reallocations) = line.trim().split_once(' ').ok_or("no counts")?;
        Ok((allocations.parse()?, reallocations.parse()?))
    }
}

fn patient(socket: TcpStream) -> io::Result<TcpStream> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn request(model: &str) -> Vec<u8> {
    let body = format!(r#"{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Count."}}]}}"#);
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    format!("{head}authorization: Bearer {KEY}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Sends chunks, each when the client has the one before it.
fn send(
    upstream: &mut TcpStream,
    client: &mut TcpStream,
    buffer: &mut Vec<u8>,
    numbers: std::ops::Range<usize>,
) -> io::Result<()> {
    for number in numbers {
        let event = format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,\"model\":\"m\",\
             \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word\"}},\"logprobs\":null,\"finish_reason\":null}}],\
             \"usage\":null,\"obfuscation\":\"{number:08}\"}}\n\n"
        );
        upstream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes())?;
        until(client, buffer, format!("{number:08}\"}}\n\n\r\n").as_bytes())?;
        buffer.clear();
    }
    Ok(())
}

fn until(socket: &mut TcpStream, buffer: &mut Vec<u8>, last: &[u8]) -> io::Result<()> {
    let mut part = [0; 4096];
    while memmem::find(buffer, last).is_none() {
        let read = socket.read(&mut part)?;
        if read == 0 {
            return Err(io::Error::other(format!("ended after {}", String::from_utf8_lossy(buffer))));
        }
        buffer.extend_from_slice(&part[..read]);
    }
    Ok(())
}

/// Tells where it listens, then the counts so far for each line that is asked; ends with its parent.
fn answer(address: SocketAddr) {
    println!("{address}");
    std::thread::spawn(|| {
        for _ in io::stdin().lines().map_while(Result::ok) {
            let stats = COUNTING.stats();
            println!("{} {}", stats.allocations, stats.reallocations);
        }
        std::process::exit(0);
    });
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn serve_bare(upstream: SocketAddr) -> Outcome<()> {
    runtime()?.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        answer(listener.local_addr()?);
        Ok(bare::serve(listener, upstream).await?)
    })
}

fn serve_gateway(upstream: SocketAddr) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let toml = format!(
        "database_url = \"sqlite:{}\"\n[server]\nhttp = \"127.0.0.1:0\"\nhttps = \"off\"\nworkers = 1\n[admin]\n\
         listen = \"off\"\n[endpoints.up]\ndialect = \"openai\"\nbase_url = \"http://{upstream}/v1\"\n\
         models = [\"m\", \"mapped\"]\nmapping = {{ mapped = \"m\" }}\n[models.m]\ninput = \"1\"\noutput = \"2\"\n\
         [models.mapped]\ninput = \"1\"\noutput = \"2\"\n",
        folder.path().join("x.db").display(),
    );
    runtime()?.block_on(async {
        let config = Config::load(Some(toml.as_str()), [], &dialects())?;
        let (store, master) = support::filled(&config.database_url, folder.path(), KEY, "up", 1).await;
        let doors = Doors::open(&config.server).await?;
        let address = doors.http_address().ok_or("no address")?;
        let server = Server::start(config, store, master, doors).await?;
        answer(address);
        server.run(std::future::pending()).await?;
        Ok(())
    })
}
