//! What the gateway costs beside nginx and beside a proxy of bare hyper: CPU, speed, added time, memory.
//!
//! `cargo bench --profile release --bench load` runs all of it in about three minutes and prints its tables (by the release's
//! profile, since a bench builds the gateway again by its own); `-- --quick` is a smoke test of one short round. Each proxy has core 0 to itself while it is measured; this driver
//! and its upstream share core 1. The proxies take turns within each round, so that a machine which slows down slows
//! all of them. Every answer is checked whole. Needs `nginx` and `taskset` on the PATH.

mod bare;
mod drive;
mod hostile;
mod measure;
mod mock;
mod process;
mod proxies;
mod report;
mod wire;
mod workers;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getpid, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use measure::{SCENARIOS, Size};
use process::Process;
use proxies::{KINDS, Place, Proxy};
use report::Row;

/// What everything here returns: an error is told to the person who runs the bench, and ends it.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The user's key, which every proxy is sent and only the gateway reads.
pub const KEY: &str = "sk-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL";

/// A model that every proxy passes on, and one that the gateway knows under another name than the upstream.
pub const MODEL: &str = "gpt-4o";
pub const MAPPED: &str = "mapped";

/// The longest that the whole run may take.
const RUN_TIMEOUT: Duration = Duration::from_secs(30 * 60);

const PROXY_CORE: &str = "0";
const DRIVER_CORE: &str = "1";
/// Where two workers have the first two, and there is a third.
const SPARE_CORE: &str = "2";

const FULL: Size = Size { requests: 8000, streams: 800, paced_chunks: 40, latency_requests: 400 };
const QUICK: Size = Size { requests: 800, streams: 160, paced_chunks: 8, latency_requests: 100 };

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// The gateway's executable; without one its row is left out, and a line says so.
    #[arg(long, global = true, env = "LOAD_GATEWAY", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/release/gpt-cat"))]
    gateway: PathBuf,
    /// One short round: does everything run?
    #[arg(long, global = true)]
    quick: bool,
    /// Rounds of the CPU and latency parts.
    #[arg(long, global = true, default_value_t = 7)]
    rounds: usize,
    /// Streams held open at once in the memory part: two files each in the proxy.
    #[arg(long, global = true, default_value_t = 9000)]
    held: usize,
    /// Cargo passes this to every bench.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand, Clone, Copy, PartialEq)]
enum Part {
    /// CPU time of each scenario, and requests a second.
    Cpu,
    /// Added time at a fixed rate.
    Latency,
    /// Resident memory per open stream.
    Memory,
    /// What hostile texts cost, and what others notice of them; only when it is asked for.
    Hostile,
    /// One worker beside two; only when it is asked for.
    Workers,
    /// The upstream, in a process of its own.
    #[command(hide = true)]
    Mock,
    /// The proxy of bare hyper, in a process of its own.
    #[command(hide = true)]
    Bare { upstream: SocketAddr },
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    raise_file_limit()?;
    match args.part {
        Some(Part::Mock) => in_child(|listener| runtime()?.block_on(async { Ok(mock::serve(listener()?).await?) })),
        Some(Part::Bare { upstream }) => {
            in_child(|listener| runtime()?.block_on(async { Ok(bare::serve(listener()?, upstream).await?) }))
        }
        part => {
            let cores = Cores::assign(part)?;
            runtime()?.block_on(async {
                tokio::select! {
                    outcome = tokio::time::timeout(RUN_TIMEOUT, run(&args, part, cores)) => outcome?,
                    signal = told_to_stop() => Err(signal?.into()),
                }
            })
        }
    }
}

/// Waits for a signal that would otherwise end this process without ending its children.
async fn told_to_stop() -> Outcome<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok("told to stop")
}

/// One thread: what is measured has one worker each.
fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn in_child(serve: impl FnOnce(fn() -> Outcome<TcpListener>) -> Outcome<()>) -> Outcome<()> {
    process::end_with_parent();
    serve(|| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        println!("listening on http://{}", listener.local_addr()?);
        Ok(TcpListener::from_std(listener)?)
    })
}

/// A held stream is two files here, in the proxy and in the upstream together; children inherit the limit.
fn raise_file_limit() -> Outcome<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// Which core is whose; `None` on a machine with a single one.
#[derive(Clone, Copy)]
struct Cores {
    proxy: Option<&'static str>,
    driver: Option<&'static str>,
}

impl Cores {
    /// Moves this process to the driver's core, before it has a second thread.
    fn assign(part: Option<Part>) -> Outcome<Cores> {
        let driver = match (std::thread::available_parallelism()?.get(), part) {
            (1, _) => {
                println!("One core only: nothing is pinned, and the figures mean little.");
                return Ok(Cores { proxy: None, driver: None });
            }
            (3.., Some(Part::Workers)) => SPARE_CORE,
            _ => DRIVER_CORE,
        };
        let me = getpid().as_raw_nonzero().to_string();
        let status = Command::new("taskset").args(["-a", "-p", "-c", driver, &me]).output()?.status;
        if !status.success() {
            return Err("taskset could not pin the driver".into());
        }
        Ok(Cores { proxy: Some(PROXY_CORE), driver: Some(driver) })
    }
}

async fn run(args: &Args, part: Option<Part>, cores: Cores) -> Outcome<()> {
    let (size, rounds, held) =
        if args.quick { (QUICK, 1, args.held.min(100)) } else { (FULL, args.rounds.clamp(1, 100), args.held) };
    let folder = tempfile::tempdir()?;
    let (mock, upstream) = start_mock(cores, folder.path())?;
    let place =
        Place { folder: folder.path(), upstream, cores: cores.proxy, workers: 1, gateway: &args.gateway, more: "" };
    if part == Some(Part::Hostile) {
        return hostile::run(&place).await;
    }
    if part == Some(Part::Workers) {
        return workers::run(&place, mock.id(), size, rounds, cores.driver == Some(SPARE_CORE)).await;
    }
    let wants = |one: Part| part.is_none() || part == Some(one);

    let mut rows: Vec<Row> = Vec::new();
    let mut running: Vec<Proxy> = Vec::new();
    for kind in &KINDS {
        if kind.name == "gpt-cat" && !args.gateway.exists() {
            println!("No gateway at {}: its row is left out.", args.gateway.display());
            continue;
        }
        let costs = SCENARIOS.iter().map(|_| Vec::new()).collect();
        rows.push(Row { name: kind.name, costs, latencies: vec![], resident_per_stream_kib: None });
        if wants(Part::Memory) {
            let proxy = kind.start(&place).await?;
            measure::warm_up(proxy.address, size).await?;
            let kib = measure::resident_per_stream_kib(&proxy, held).await?;
            rows.last_mut().expect("pushed above").resident_per_stream_kib = Some(kib);
        }
        running.push(kind.start(&place).await?);
    }

    let mut direct = Vec::new();
    for round in 0..rounds {
        if wants(Part::Latency) {
            direct.extend(measure::latency(upstream, size).await?);
        }
        // Another goes first each time: what the one before leaves behind must not always meet the same.
        for turn in 0..running.len() {
            let at = (turn + round) % running.len();
            let (proxy, row) = (&running[at], &mut rows[at]);
            measure::warm_up(proxy.address, size).await?;
            if wants(Part::Cpu) {
                for (scenario, costs) in SCENARIOS.iter().zip(&mut row.costs) {
                    costs.push(measure::cost(proxy, mock.id(), scenario, size).await?);
                }
            }
            if wants(Part::Latency) {
                row.latencies.extend(measure::latency(proxy.address, size).await?);
            }
        }
        println!("round {} of {rounds} done", round + 1);
    }
    println!();
    report::print(&rows, &direct);
    Ok(())
}

fn start_mock(cores: Cores, folder: &Path) -> Outcome<(Process, SocketAddr)> {
    let mut command = process::pinned(&std::env::current_exe()?, cores.driver);
    command.arg("mock");
    process::start_listening(command, &folder.join("mock.log"))
}
