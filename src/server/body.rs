//! Reads a request's body, within bounds of size, time and the node's memory.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use tokio::time::{Instant, Sleep};

use crate::error::Error;
use crate::request::form::{Fields, Form};
use crate::upstream::{Rest, Stopped};

/// A body must gain this much within the time that the configuration gives it.
const PROGRESS_BYTES: usize = 64 << 10;
/// A body up to this long is copied out of the connection's buffer of 8 KiB, which it would keep for as long as its answer
/// streams.
const COPIED_BYTES_MAX: usize = 4096;
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
    /// Counts so many bytes in all; refuses them where the node has no memory for them.
    pub fn grow_to(&mut self, bytes: usize) -> Result<(), Error> {
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

/// The form that the headers announce; `None` when the body is something else.
pub fn announced_form(headers: &HeaderMap) -> Result<Option<Form>, Error> {
    if headers.contains_key(CONTENT_ENCODING) {
        return Ok(None); // refused by `check_media_type`, unless it says nothing
    }
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.map_or(Ok(None), Form::announced)
}

/// As much of a form as had to be read before it can be forwarded.
pub struct Begun {
    pub begun: Bytes,
    pub boundary: String,
    pub fields: Fields,
    /// What is still to come.
    pub rest: Option<Rest>,
    /// Why the rest stopped coming, once it has.
    pub failure: Arc<OnceLock<Error>>,
    pub weight: Weight,
}

/// Reads a form until its model is known, or all of it where `whole` says so; the rest is read when it is sent on.
pub async fn read_form(
    bodies: &Arc<Bodies>,
    mut form: Form,
    mut body: Incoming,
    bytes_max: usize,
    progress_within: Duration,
    whole: bool,
) -> Result<Begun, Error> {
    let mut weight = bodies.weight();
    let expected = body.size_hint();
    if expected.lower() > bytes_max as u64 {
        return Err(Error::BodyTooLarge { bytes_max });
    }
    let mut begun = BytesMut::new();
    let mut deadline = Deadline::new(progress_within);
    let failure = Arc::new(OnceLock::new());
    while whole || form.fields().model.is_none() {
        let data = std::future::poll_fn(|cx| next_data(&mut body, &mut deadline, cx)).await;
        let Some(data) = data.transpose()? else {
            check_is_over(&form)?;
            let (boundary, fields) = (form.boundary().to_owned(), form.fields().clone());
            return Ok(Begun { begun: begun.freeze(), boundary, fields, rest: None, failure, weight });
        };
        if begun.len() + data.len() > bytes_max {
            return Err(Error::BodyTooLarge { bytes_max });
        }
        weight.grow_to(begun.len() + data.len())?;
        begun.extend_from_slice(&data);
        form.read(&data)?;
    }
    let length = expected.exact().map(|length| length.saturating_sub(begun.len() as u64));
    let (boundary, fields) = (form.boundary().to_owned(), form.fields().clone());
    let rest = match body.is_end_stream() {
        true => check_is_over(&form).map(|()| None)?,
        false => {
            let (read, failure) = (begun.len(), failure.clone());
            let passing = FormRest {
                body,
                form,
                read,
                bytes_exact: expected.exact(),
                bytes_max,
                deadline,
                left_at: Some(Instant::now()),
                failure,
            };
            Some(Rest { body: Box::pin(passing), length })
        }
    };
    Ok(Begun { begun: begun.freeze(), boundary, fields, rest, failure, weight })
}

/// The rest of a form, read while it is sent on: what decides something comes in its beginning or not at all.
struct FormRest {
    body: Incoming,
    form: Form,
    /// Bytes of the whole form so far, and at most.
    read: usize,
    bytes_exact: Option<u64>,
    bytes_max: usize,
    deadline: Deadline,
    /// When it was last asked for bytes and had some: what passes until it is asked again is not its sender's.
    left_at: Option<Instant>,
    failure: Arc<OnceLock<Error>>,
}

impl FormRest {
    fn check(&mut self, data: &Bytes) -> Result<(), Error> {
        let had_n = self.form.fields().n.is_some();
        self.read += data.len();
        if self.read > self.bytes_max {
            return Err(Error::BodyTooLarge { bytes_max: self.bytes_max });
        }
        self.form.read(data)?;
        if self.bytes_exact == Some(self.read as u64) {
            check_is_over(&self.form)?; // nobody asks for an end behind the last byte of a known length
        }
        match self.form.fields().n.is_some() == had_n {
            true => Ok(()),
            false => Err(Error::body("n", "must come before the model and the file")),
        }
    }
}

impl Body for FormRest {
    type Data = Bytes;
    type Error = Stopped;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Stopped>>> {
        let this = &mut *self;
        if let Some(left_at) = this.left_at.take() {
            let due = this.deadline.sleep.deadline() + left_at.elapsed();
            this.deadline.sleep.as_mut().reset(due);
        }
        let Poll::Ready(next) = next_data(&mut this.body, &mut this.deadline, cx) else { return Poll::Pending };
        this.left_at = Some(Instant::now());
        let checked = match next {
            Some(Ok(data)) => this.check(&data).map(|()| Some(data)),
            Some(Err(error)) => Err(error),
            None => check_is_over(&this.form).map(|()| None),
        };
        Poll::Ready(match checked {
            Ok(data) => data.map(|data| Ok(Frame::data(data))),
            Err(error) => {
                let _ = this.failure.set(error);
                Some(Err(Stopped))
            }
        })
    }
}

fn check_is_over(form: &Form) -> Result<(), Error> {
    match form.is_over() {
        true => Ok(()),
        false => Err(Error::BodyInvalid { param: None, reason: "ends before its last boundary".into() }),
    }
}

/// A body must gain [`PROGRESS_BYTES`] within its time, again and again.
struct Deadline {
    within: Duration,
    sleep: Pin<Box<Sleep>>,
    gained: usize,
}

impl Deadline {
    fn new(within: Duration) -> Deadline {
        Deadline { within, sleep: Box::pin(tokio::time::sleep(within)), gained: 0 }
    }
}

/// The next bytes of a body that keeps arriving.
fn next_data(body: &mut Incoming, deadline: &mut Deadline, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
    loop {
        let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) else {
            return deadline.sleep.as_mut().poll(cx).map(|()| Some(Err(Error::BodyTimeout)));
        };
        let broke_off = |_| Error::BodyInvalid { param: None, reason: "broke off".into() };
        let data = match frame.map(|frame| frame.map_err(broke_off)) {
            None => return Poll::Ready(None),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            Some(Ok(frame)) => frame.into_data(),
        };
        let Ok(data) = data else { continue }; // trailers
        deadline.gained += data.len();
        if deadline.gained >= PROGRESS_BYTES {
            deadline.gained = 0;
            deadline.sleep.as_mut().reset(Instant::now() + deadline.within);
        }
        return Poll::Ready(Some(Ok(data)));
    }
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
    #[expect(clippy::disallowed_methods, reason = "a short copy is cheaper than the buffer that it frees")]
    let whole = match joined.is_empty() {
        true if whole.len() <= COPIED_BYTES_MAX => Bytes::copy_from_slice(&whole),
        true => whole,
        false => joined.freeze(),
    };
    Ok((whole, weight))
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
