//! A socket with deadlines: for a request's head, for idleness, and for a client that does not read.
//!
//! One timer a connection, armed for the nearest deadline and looked at lazily, so that a request costs no timer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// How the connection preface of HTTP/2 begins; its frames are no heads to wait for.
const HTTP2_PREFACE: &[u8] = b"PRI ";

/// The deadlines of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// From a head's first byte to its last.
    pub head: Duration,
    /// Between two requests, and before the first.
    pub idle: Duration,
    /// Bytes wait and the client takes none.
    pub write: Duration,
}

/// The requests that a connection has in hand; shared with the service that answers them.
#[derive(Debug, Default)]
pub struct Calls(AtomicU32);

/// One request in hand.
#[derive(Debug)]
pub struct InHand(Arc<Calls>);

impl Calls {
    /// Counts a request until the returned value is dropped.
    pub fn enter(self: &Arc<Calls>) -> InHand {
        self.0.fetch_add(1, Ordering::Relaxed);
        InHand(self.clone())
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The socket.
#[derive(Debug)]
pub struct Guarded<T> {
    io: T,
    /// Read before, to be read again.
    unread: Bytes,
    calls: Arc<Calls>,
    deadlines: Deadlines,
    timer: Pin<Box<Sleep>>,
    /// Whom the timer wakes: until it has elapsed there is no need to ask it again.
    asked_by: Option<Waker>,
    active: Instant,
    head_since: Option<Instant>,
    stalled_since: Option<Instant>,
    first_read: bool,
    http2: bool,
}

impl<T> Guarded<T> {
    pub fn new(io: T, calls: Arc<Calls>, deadlines: Deadlines) -> Guarded<T> {
        let now = Instant::now();
        // The first head of a connection has no idle time before it.
        let timer = Box::pin(tokio::time::sleep_until(now + deadlines.head));
        let head_since = Some(now);
        Guarded {
            io,
            unread: Bytes::new(),
            calls,
            deadlines,
            timer,
            asked_by: None,
            active: now,
            head_since,
            stalled_since: None,
            first_read: true,
            http2: false,
        }
    }

    /// Gives back what was read, to be read again first.
    pub fn unread(&mut self, bytes: Bytes) {
        self.unread = bytes;
    }

    /// The nearest deadline as things stand; `None` with a request in hand and nothing stalled.
    fn due(&self) -> Option<Instant> {
        let in_hand = self.calls.0.load(Ordering::Relaxed) > 0;
        let stalled = self.stalled_since.map(|since| since + self.deadlines.write);
        let head = self.head_since.filter(|_| !in_hand && !self.http2).map(|since| since + self.deadlines.head);
        let idle = (!in_hand).then(|| self.active + self.deadlines.idle);
        [stalled, head, idle].into_iter().flatten().min()
    }

    /// `Ready` when a deadline has passed.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(due) = self.due().filter(|due| *due < self.timer.deadline()) {
                self.timer.as_mut().reset(due);
                self.asked_by = None;
            }
            let asked = self.asked_by.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            if asked && !self.timer.is_elapsed() {
                return Poll::Pending;
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                self.asked_by = Some(cx.waker().clone());
                return Poll::Pending;
            }
            self.asked_by = None;
            let now = Instant::now();
            let due = self.due().unwrap_or_else(|| now + self.deadlines.idle); // without one it looks again later
            if due <= now {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(due);
        }
    }

    fn note_read(&mut self, read: &[u8]) {
        self.active = Instant::now();
        if std::mem::take(&mut self.first_read) {
            self.http2 = read.starts_with(HTTP2_PREFACE);
        }
        let in_hand = self.calls.0.load(Ordering::Relaxed) > 0;
        self.head_since = if in_hand { None } else { self.head_since.or(Some(self.active)) };
    }

    fn note_write(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.active = Instant::now();
            self.stalled_since = None;
            self.head_since = None; // a reply to the head that was waited for
            return written;
        }
        self.stalled_since.get_or_insert_with(Instant::now);
        match self.poll_due(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.unread.is_empty() {
            let count = self.unread.len().min(buffer.remaining());
            buffer.put_slice(&self.unread.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => {
                let read = &buffer.filled()[before..];
                if !read.is_empty() {
                    self.note_read(read);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => match self.poll_due(cx) {
                Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                Poll::Pending => Poll::Pending,
            },
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.note_write(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.note_write(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const DEADLINES: Deadlines =
        Deadlines { head: Duration::from_secs(10), idle: Duration::from_secs(75), write: Duration::from_secs(60) };

    fn guarded() -> (Guarded<tokio::io::DuplexStream>, tokio::io::DuplexStream, Arc<Calls>) {
        let (ours, theirs) = tokio::io::duplex(64);
        let calls = Arc::new(Calls::default());
        (Guarded::new(ours, calls.clone(), DEADLINES), theirs, calls)
    }

    async fn seconds_until_timeout(socket: &mut Guarded<tokio::io::DuplexStream>) -> u64 {
        let begun = Instant::now();
        let mut buffer = [0; 64];
        let error = loop {
            match socket.read(&mut buffer).await {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        begun.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_drips_in_is_cut_off_after_its_deadline() {
        let (mut socket, mut client, _) = guarded();
        tokio::spawn(async move {
            for _ in 0..60 {
                client.write_all(b"x").await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        assert_eq!(seconds_until_timeout(&mut socket).await, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answered_connection_may_idle_and_is_closed_then() {
        let (mut socket, mut client, calls) = guarded();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut buffer = [0; 64];
        assert!(socket.read(&mut buffer).await.unwrap() > 0);
        let call = calls.enter();
        socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        drop(call);
        assert_eq!(seconds_until_timeout(&mut socket).await, 75);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_is_cut_off_and_a_slow_answer_is_not() {
        let (mut socket, mut client, calls) = guarded();
        client.write_all(b"x").await.unwrap();
        assert_eq!(socket.read(&mut [0; 8]).await.unwrap(), 1);
        let _call = calls.enter();
        let waited = tokio::time::timeout(Duration::from_secs(500), socket.read(&mut [0; 8])).await;
        assert!(waited.is_err(), "a request in hand has no deadline of the socket's");
        let begun = Instant::now();
        let error = socket.write_all(&[0; 1000]).await.unwrap_err();
        assert_eq!((error.kind(), begun.elapsed().as_secs()), (io::ErrorKind::TimedOut, 60));
    }
}
