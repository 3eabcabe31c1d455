//! Starts what is measured, pins it, reads its CPU time and memory, and ends it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Outcome;

/// How long a server may take to say where it listens: the gateway's first start creates its database.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A clock tick of `/proc/PID/stat`, the same on every Linux that Rust runs on.
const TICK_NS: u64 = 10_000_000;

/// How long a process may take to end when it is asked to; then it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// A child process; dropped, it is ended.
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Asked first: nginx's master takes its worker with it, which a killed one leaves behind.
        if let Some(id) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            kill_process(id, Signal::TERM).ok();
        }
        let patience = Instant::now() + END_TIMEOUT;
        while Instant::now() < patience {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // Both fail only when it has ended by itself.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// `program` on these cores alone, or unpinned where there is none to spare.
pub fn pinned(program: &Path, cores: Option<&str>) -> Command {
    match cores {
        Some(cores) => {
            let mut command = Command::new("taskset");
            command.args(["-c", cores]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Starts a process with its errors in `log`; its standard input stays open while it lives.
pub fn start(mut command: Command, log: &Path) -> Outcome<Process> {
    let child =
        command.stdin(Stdio::piped()).stdout(File::create(log.with_extension("out"))?).stderr(File::create(log)?);
    Ok(Process(child.spawn().map_err(|error| format!("{:?}: {error}", command.get_program()))?))
}

/// Starts a server that prints `listening on http://ADDRESS`, and waits for that line.
pub fn start_listening(mut command: Command, log: &Path) -> Outcome<(Process, SocketAddr)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(log)?);
    let mut child = command.spawn().map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    let stdout = child.stdout.take().expect("standard output was piped");
    let process = Process(child);
    let (tell, told) = mpsc::channel();
    // Reads on to the end: a server whose pipe is full would stop.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some(address) = line.trim().strip_prefix("listening on http://") {
                tell.send(address.trim_end_matches('/').to_owned()).ok();
            }
        }
    });
    let address = told.recv_timeout(START_TIMEOUT).map_err(|_| {
        let said = fs::read_to_string(log).unwrap_or_default();
        format!("{command:?} did not say where it listens; its errors:\n{said}")
    })?;
    Ok((process, address.parse()?))
}

/// Ends this process when its standard input does: a child must not outlive a bench that was killed.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut nothing = Vec::new();
        std::io::stdin().read_to_end(&mut nothing).ok();
        std::process::exit(0);
    });
}

impl Process {
    /// Its process id; `taskset` has become the program by then.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

/// What a process and its children have used so far.
pub struct Spent {
    by_thread_ns: HashMap<u32, u64>,
    ticks_ns: u64,
}

impl Spent {
    /// Reads the scheduler's count of every thread of a process and of those that it has started.
    pub fn read(process: u32) -> Outcome<Spent> {
        Spent::of(&family(process)?)
    }

    /// Reads the count of these processes alone.
    pub fn of(processes: &[u32]) -> Outcome<Spent> {
        let mut spent = Spent { by_thread_ns: HashMap::new(), ticks_ns: 0 };
        for &id in processes {
            spent.ticks_ns += ticks(id)? * TICK_NS;
            for task in fs::read_dir(format!("/proc/{id}/task"))? {
                let task = task?;
                let Some(thread) = task.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
                // A thread may end between the listing and the reading.
                let Ok(line) = fs::read_to_string(task.path().join("schedstat")) else { continue };
                let on_cpu_ns = line.split(' ').next().and_then(|field| field.parse().ok());
                spent.by_thread_ns.insert(thread, on_cpu_ns.ok_or("schedstat without a time")?);
            }
        }
        Ok(spent)
    }

    /// CPU time since `before`, in nanoseconds: exact, or in ticks of 10 ms when a thread ended in between.
    pub fn since_ns(&self, before: &Spent) -> u64 {
        if before.by_thread_ns.keys().any(|thread| !self.by_thread_ns.contains_key(thread)) {
            return self.ticks_ns - before.ticks_ns;
        }
        let one = |(thread, ns): (&u32, &u64)| ns - before.by_thread_ns.get(thread).copied().unwrap_or(0);
        self.by_thread_ns.iter().map(one).sum()
    }
}

/// Resident memory of a process and its children, in KiB.
pub fn resident_kib(process: u32) -> Outcome<u64> {
    status_kib(process, "VmRSS:")
}

/// The most resident memory that a process and those that it has started ever had, in KiB.
pub fn resident_peak_kib(process: u32) -> Outcome<u64> {
    status_kib(process, "VmHWM:")
}

fn status_kib(process: u32, field: &str) -> Outcome<u64> {
    let mut sum = 0;
    for id in family(process)? {
        let status = fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).ok_or("a status without memory")?;
        sum += line.trim().trim_end_matches(" kB").parse::<u64>()?;
    }
    Ok(sum)
}

/// The process and its direct children: nginx's work is done by its worker.
fn family(process: u32) -> Outcome<Vec<u32>> {
    let mut ids = vec![process];
    for entry in fs::read_dir("/proc")? {
        let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if stat_field(id, 3).is_some_and(|parent| parent == u64::from(process)) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// User and system time, ended threads included.
fn ticks(id: u32) -> Outcome<u64> {
    let field = |at| stat_field(id, at).ok_or("the process has ended");
    Ok(field(13)? + field(14)?)
}

/// A number of `/proc/ID/stat`, counted from 0 as proc(5) does less one; the name before it may hold blanks.
fn stat_field(id: u32, at: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    stat[stat.rfind(')')? + 2..].split(' ').nth(at - 2)?.parse().ok()
}
