//! What one proxy costs in one round, in each of the scenarios.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::drive::{self, Question};
use crate::process::{self, Spent};
use crate::proxies::Proxy;
use crate::{MAPPED, MODEL, Outcome};

/// Connections of a closed loop.
const CONNECTIONS: usize = 16;

/// Streams open at once in the paced scenario, and the time between their chunks: 4,000 chunks a second in all.
const PACED_STREAMS: usize = 200;
const PACE_MS: u64 = 50;

/// Requests a second of the latency scenario: far below what any of them can serve.
const LATENCY_RATE: u32 = 200;
/// Requests a second of the scenario of a fixed rate: below what the slowest can serve, so that all of them wait as often.
const FIXED_RATE: u32 = 8000;

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

/// How a scenario asks.
#[derive(Clone, Copy)]
enum How {
    /// Over so many connections, each as soon as its last answer is whole.
    Closed(usize),
    /// So many a second.
    Rate(u32),
}

/// Something that each proxy does in each round, whose CPU time is measured.
pub struct Scenario {
    /// What is done, and what the CPU time is told of.
    pub name: &'static str,
    /// The most CPU that the gateway may take, in terms of nginx's.
    pub gate: Option<f64>,
    question: fn(Size) -> Question,
    how: How,
    /// Questions of a round, and units (requests, streams or chunks) of a question.
    count: fn(Size) -> (usize, usize),
}

/// Every scenario, a row of the table each.
pub static SCENARIOS: [Scenario; 7] = [
    Scenario {
        name: "request, 1 KB prompt",
        gate: Some(1.3),
        question: |_| Question::whole(MODEL, 1024),
        how: How::Closed(CONNECTIONS),
        count: |size| (size.requests, 1),
    },
    Scenario {
        name: "the same, mapped model",
        gate: None,
        question: |_| Question::whole(MAPPED, 1024),
        how: How::Closed(CONNECTIONS),
        count: |size| (size.requests, 1),
    },
    Scenario {
        name: "the same, 8,000 a second",
        gate: None,
        question: |_| Question::whole(MODEL, 1024),
        how: How::Rate(FIXED_RATE),
        count: |size| (size.requests, 1),
    },
    Scenario {
        name: "request, 16 KB prompt",
        gate: Some(1.5),
        question: |_| Question::whole(MODEL, 16 << 10),
        how: How::Closed(CONNECTIONS),
        count: |size| (size.requests / 2, 1),
    },
    Scenario {
        name: "64-chunk stream",
        gate: Some(1.15),
        question: |_| Question::stream(MODEL),
        how: How::Closed(CONNECTIONS),
        count: |size| (size.streams, 1),
    },
    Scenario {
        name: "the same, mapped model",
        gate: None,
        question: |_| Question::stream(MAPPED),
        how: How::Closed(CONNECTIONS),
        count: |size| (size.streams, 1),
    },
    Scenario {
        name: "chunk of 200 paced streams",
        gate: Some(1.1),
        question: |size| Question::paced(size.paced_chunks, PACE_MS),
        how: How::Closed(PACED_STREAMS),
        count: |size| (PACED_STREAMS, size.paced_chunks),
    },
];

/// CPU and speed of one proxy in one scenario of one round.
#[derive(Clone, Copy)]
pub struct Cost {
    /// CPU time of the proxy for each unit, in microseconds.
    pub unit_us: f64,
    pub units_per_s: f64,
    /// Share of its core that the proxy used: near 1 in a closed loop, and it was the bottleneck.
    pub busy: f64,
    /// Share of their core that the driver and its upstream used.
    pub load_busy: f64,
}

/// Two short runs that are not counted: connections, caches, allocators.
pub async fn warm_up(address: SocketAddr, size: Size) -> Outcome<()> {
    drive::closed_loop(address, &Arc::new(Question::whole(MODEL, 1024)), CONNECTIONS, size.requests / 10).await?;
    drive::closed_loop(address, &Arc::new(Question::stream(MODEL)), CONNECTIONS, size.streams / 10).await?;
    Ok(())
}

/// One scenario; `upstream` is the process of the upstream, which belongs to the load.
pub async fn cost(proxy: &Proxy, upstream: u32, scenario: &Scenario, size: Size) -> Outcome<Cost> {
    let question = Arc::new((scenario.question)(size));
    let (count, units) = (scenario.count)(size);
    let read = || Outcome::Ok([Spent::read(proxy.process.id())?, Spent::of(&[std::process::id(), upstream])?]);
    let before = read()?;
    let began = Instant::now();
    match scenario.how {
        How::Closed(connections) => drop(drive::closed_loop(proxy.address, &question, connections, count).await?),
        How::Rate(per_s) => drop(drive::open_loop(proxy.address, &question, per_s, count).await?),
    }
    let took = began.elapsed();
    let after = read()?;
    let [spent, load_spent] = [0, 1].map(|of| after[of].since_ns(&before[of]) as f64);
    let units = (count * units) as f64;
    Ok(Cost {
        unit_us: spent / units / 1e3,
        units_per_s: units / took.as_secs_f64(),
        busy: spent / took.as_nanos() as f64,
        load_busy: load_spent / took.as_nanos() as f64,
    })
}

/// Times of short requests at a fixed rate.
pub async fn latency(address: SocketAddr, size: Size) -> Outcome<Vec<Duration>> {
    let question = Arc::new(Question::whole(MODEL, 1024));
    drive::open_loop(address, &question, LATENCY_RATE, size.latency_requests).await
}

/// Requests a second beside hostile ones, and how many.
const PROBE_RATE: u32 = 100;
const PROBES: usize = 200;

/// Times of small requests while something else is going on.
pub async fn probe(address: SocketAddr) -> Outcome<Vec<Duration>> {
    drive::open_loop(address, &Arc::new(Question::whole(MODEL, 64)), PROBE_RATE, PROBES).await
}

/// KiB of resident memory that each of `count` open streams adds to a proxy that has just been warmed up.
pub async fn resident_per_stream_kib(proxy: &Proxy, count: usize) -> Outcome<f64> {
    let id = proxy.process.id();
    let before = process::resident_kib(id)?;
    let held = drive::hold(proxy.address, &Arc::new(Question::paced(HELD_CHUNKS, HELD_PACE_MS)), count).await?;
    let after = process::resident_kib(id)?;
    drop(held);
    Ok((after as f64 - before as f64) / count as f64)
}
