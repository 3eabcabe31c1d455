//! Logs, metrics and request ids. Nothing of a prompt, an answer or a key is ever logged.

mod log;
mod metrics;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

pub use log::Guard;
pub use metrics::{Metrics, Tokens};
use tracing_subscriber::EnvFilter;

/// Days of log files that are kept.
const LOG_FILES_MAX: usize = 14;

/// Starts logging, to standard error or to files that change daily; lines are written by a thread of their own.
///
/// The guard writes what is left when it is dropped. `RUST_LOG` wins over `level`. Fails with what is wrong with either.
pub fn start(level: &str, json: bool, file: Option<&Path>) -> Result<Guard, String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => EnvFilter::try_new(filter),
        _ => EnvFilter::try_new(level),
    };
    let filter = filter.map_err(|error| format!("log level: {error}"))?;
    let gathered = match file {
        None => log::gather(std::io::stderr()),
        Some(file) => {
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let name = file.file_name().and_then(|name| name.to_str()).ok_or("log.file: it must name a file")?;
            let appender = tracing_appender::rolling::Builder::new()
                .rotation(tracing_appender::rolling::Rotation::DAILY)
                .filename_prefix(name)
                .max_log_files(LOG_FILES_MAX)
                .build(folder)
                .map_err(|error| format!("log.file: {error}"))?;
            log::gather(appender)
        }
    };
    let (lines, guard) = gathered.map_err(|error| format!("log: {error}"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines);
    let started = match json {
        true => tracing::subscriber::set_global_default(subscriber.json().flatten_event(true).finish()),
        false => tracing::subscriber::set_global_default(subscriber.with_ansi(false).with_target(false).finish()),
    };
    started.map_err(|error| error.to_string())?;
    Ok(guard)
}

/// Gives every request an id of its own: a random prefix for the process, and a number.
#[derive(Debug)]
pub struct RequestIds {
    /// With its dash.
    prefix: String,
    next: AtomicU64,
}

impl RequestIds {
    /// `prefix` is random, so that ids of two processes do not meet.
    pub fn new(prefix: [u8; 8]) -> RequestIds {
        RequestIds { prefix: format!("{:016x}-", u64::from_be_bytes(prefix)), next: AtomicU64::new(1) }
    }

    /// The next id: 16 hexadecimal digits, a dash, a number.
    pub fn next(&self) -> String {
        const NUMBER_BYTES_MAX: usize = 20;
        let mut id = String::with_capacity(self.prefix.len() + NUMBER_BYTES_MAX);
        id.push_str(&self.prefix);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        write!(id, "{number}").expect("a string takes every write");
        id
    }
}
