//! Reads a request's body, within bounds of size, time and the node's memory.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};

use crate::error::Error;

/// A body must gain this much within the time that the configuration gives it.
const PROGRESS_BYTES: usize = 64 << 10;
/// What is set aside for a body before its first byte has come.
const CAPACITY_FIRST: usize = 64 << 10;
/// The share of the machine's memory that bodies in flight may take: a quarter.
const MEMORY_SHARE: usize = 4;
/// Where the machine does not tell its memory.
const MEMORY_UNKNOWN: usize = 1 << 30;

/// The bodies in flight on this node.
#[derive(Debug)]
pub struct Bodies {
    bytes: AtomicUsize,
    bytes_max: usize,
}

/// One body's part of them; ends with its drop.
#[derive(Debug)]
pub struct Weight {
    bodies: Arc<Bodies>,
    bytes: usize,
}

impl Bodies {
    /// A quarter of the memory that this process may use.
    pub fn of_machine() -> Arc<Bodies> {
        Arc::new(Bodies { bytes: AtomicUsize::new(0), bytes_max: memory_bytes() / MEMORY_SHARE })
    }

    /// Nothing yet.
    fn weight(self: &Arc<Bodies>) -> Weight {
        Weight { bodies: self.clone(), bytes: 0 }
    }
}

impl Weight {
    fn grow_to(&mut self, bytes: usize) -> Result<(), Error> {
        let more = bytes.saturating_sub(self.bytes);
        let before = self.bodies.bytes.fetch_add(more, Ordering::AcqRel);
        self.bytes += more;
        if before + more > self.bodies.bytes_max {
            return Err(Error::NodeUnavailable { reason: "too many bytes are in flight", retry_after_s: 1 });
        }
        Ok(())
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        self.bodies.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Refuses what is no plain JSON before a byte of it is read.
pub fn check_media_type(headers: &HeaderMap) -> Result<(), Error> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?").trim().to_ascii_lowercase());
    if let Some(encoding) = text(CONTENT_ENCODING).filter(|encoding| encoding != "identity") {
        return Err(Error::MediaType { found: bounded(encoding) });
    }
    match text(CONTENT_TYPE) {
        Some(kind) if !is_json(&kind) => Err(Error::MediaType { found: bounded(kind) }),
        _ => Ok(()),
    }
}

fn is_json(kind: &str) -> bool {
    let essence = kind.split(';').next().unwrap_or_default().trim();
    essence == "application/json" || essence.ends_with("+json")
}

fn bounded(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(64));
    text
}

/// Reads the whole body; without a copy when it came in one piece.
pub async fn read(
    bodies: &Arc<Bodies>,
    mut body: Incoming,
    bytes_max: usize,
    progress_within: Duration,
) -> Result<(Bytes, Weight), Error> {
    let mut weight = bodies.weight();
    let expected = body.size_hint();
    if expected.lower() > bytes_max as u64 {
        return Err(Error::BodyTooLarge { bytes_max });
    }
    let mut whole = Bytes::new();
    let mut joined = BytesMut::new();
    let mut deadline = tokio::time::Instant::now() + progress_within;
    let mut mark = PROGRESS_BYTES;
    loop {
        let next = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx));
        let frame = match tokio::time::timeout_at(deadline, next).await.map_err(|_| Error::BodyTimeout)? {
            None => break,
            Some(frame) => frame.map_err(|_| Error::BodyInvalid { param: None, reason: "broke off".into() })?,
        };
        let Ok(data) = frame.into_data() else { continue };
        let length = whole.len() + joined.len() + data.len();
        if length > bytes_max {
            return Err(Error::BodyTooLarge { bytes_max });
        }
        weight.grow_to(length)?;
        if length >= mark {
            mark = length + PROGRESS_BYTES;
            deadline = tokio::time::Instant::now() + progress_within;
        }
        if whole.is_empty() && joined.is_empty() {
            whole = data;
        } else {
            if joined.is_empty() {
                // Not more ahead than what a stranger's Content-Length may make us keep without sending anything.
                joined.reserve((expected.lower() as usize).clamp(length, length.max(CAPACITY_FIRST)));
                joined.extend_from_slice(&std::mem::take(&mut whole));
            }
            joined.extend_from_slice(&data);
        }
    }
    Ok((if joined.is_empty() { whole } else { joined.freeze() }, weight))
}

/// What this process may use: the control group's bound, else the machine's memory.
fn memory_bytes() -> usize {
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib * 1024)
    });
    match (group, machine) {
        (Some(group), Some(machine)) => std::cmp::min(group, machine),
        (one, other) => one.or(other).unwrap_or(MEMORY_UNKNOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_beyond_the_nodes_memory_are_refused_and_give_back_what_they_took() {
        let bodies = Arc::new(Bodies { bytes: AtomicUsize::new(0), bytes_max: 100 });
        let mut first = bodies.weight();
        first.grow_to(80).unwrap();
        let mut second = bodies.weight();
        assert!(second.grow_to(21).is_err());
        drop(second);
        bodies.weight().grow_to(20).unwrap();
        drop(first);
        assert_eq!(bodies.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_not_json_is_refused_by_its_name() {
        let headers = |name, value: &str| HeaderMap::from_iter([(name, value.parse().unwrap())]);
        assert!(check_media_type(&HeaderMap::new()).is_ok());
        assert!(check_media_type(&headers(CONTENT_TYPE, "Application/JSON; charset=utf-8")).is_ok());
        let form = check_media_type(&headers(CONTENT_TYPE, "application/x-www-form-urlencoded"));
        assert_eq!(form, Err(Error::MediaType { found: "application/x-www-form-urlencoded".into() }));
        assert!(check_media_type(&headers(CONTENT_ENCODING, "gzip")).is_err());
    }
}
