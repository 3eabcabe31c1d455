//! What one proxy costs in one round, in each of the scenarios.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::Outcome;
use crate::drive::{self, CONNECTIONS, Question};
use crate::process::{self, Spent};
use crate::proxies::Proxy;

/// Streams open at once in the paced scenario, and the time between their chunks: 3,200 chunks a second in all.
const PACED_STREAMS: usize = 64;
const PACE_MS: u64 = 20;

/// Requests a second of the latency scenario: far below what any of them can serve.
const LATENCY_RATE: u32 = 200;

/// A held stream sends a chunk a second; it is hung up long before its last.
const HELD_CHUNKS: usize = 600;
const HELD_PACE_MS: u64 = 1000;

/// How much is asked in a round.
#[derive(Clone, Copy)]
pub struct Size {
    pub requests: usize,
    pub streams: usize,
    pub paced_chunks: usize,
    pub latency_requests: usize,
}

/// Questions, made once.
pub struct Questions {
    short: Arc<Question>,
    stream: Arc<Question>,
    paced: Arc<Question>,
    held: Arc<Question>,
}

impl Questions {
    pub fn new(size: Size) -> Questions {
        Questions {
            short: Arc::new(Question::short()),
            stream: Arc::new(Question::stream()),
            paced: Arc::new(Question::paced(size.paced_chunks, PACE_MS)),
            held: Arc::new(Question::paced(HELD_CHUNKS, HELD_PACE_MS)),
        }
    }
}

/// CPU and speed of one proxy in one round.
pub struct Cost {
    pub request_us: f64,
    pub stream_us: f64,
    pub paced_chunk_us: f64,
    pub requests_per_s: f64,
    /// Share of its core that the proxy used in the closed loop: near 1, and it was the bottleneck.
    pub busy: f64,
}

/// A tenth of a round that is not counted: connections, caches, allocators.
pub async fn warm_up(address: SocketAddr, questions: &Questions, size: Size) -> Outcome<()> {
    drive::closed_loop(address, &questions.short, CONNECTIONS, size.requests / 10).await?;
    drive::closed_loop(address, &questions.stream, CONNECTIONS, size.streams / 10).await?;
    Ok(())
}

/// Short requests, then streams at once, then paced streams.
pub async fn cost(proxy: &Proxy, questions: &Questions, size: Size) -> Outcome<Cost> {
    let (address, id) = (proxy.address, proxy.process.id());
    let before = Spent::read(id)?;
    let took = drive::closed_loop(address, &questions.short, CONNECTIONS, size.requests).await?;
    let after_short = Spent::read(id)?;
    drive::closed_loop(address, &questions.stream, CONNECTIONS, size.streams).await?;
    let after_stream = Spent::read(id)?;
    drive::closed_loop(address, &questions.paced, PACED_STREAMS, PACED_STREAMS).await?;
    let after_paced = Spent::read(id)?;

    let short_ns = after_short.since_ns(&before) as f64;
    let requests = size.requests as f64;
    let paced_chunks = (PACED_STREAMS * size.paced_chunks) as f64;
    Ok(Cost {
        request_us: short_ns / requests / 1e3,
        stream_us: after_stream.since_ns(&after_short) as f64 / size.streams as f64 / 1e3,
        paced_chunk_us: after_paced.since_ns(&after_stream) as f64 / paced_chunks / 1e3,
        requests_per_s: requests / took.as_secs_f64(),
        busy: short_ns / took.as_nanos() as f64,
    })
}

/// Times of short requests at a fixed rate.
pub async fn latency(address: SocketAddr, questions: &Questions, size: Size) -> Outcome<Vec<Duration>> {
    drive::open_loop(address, &questions.short, LATENCY_RATE, size.latency_requests).await
}

/// KiB of resident memory that each of `count` open streams adds to a proxy that has just been warmed up.
pub async fn resident_per_stream_kib(proxy: &Proxy, questions: &Questions, count: usize) -> Outcome<f64> {
    let id = proxy.process.id();
    let before = process::resident_kib(id)?;
    let held = drive::hold(proxy.address, &questions.held, count).await?;
    let after = process::resident_kib(id)?;
    drop(held);
    Ok((after as f64 - before as f64) / count as f64)
}
