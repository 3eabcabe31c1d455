//! Talks HTTP to upstreams over pooled connections.
//!
//! An HTTP/1.1 connection has no task of its own: it is polled by the response body that it feeds, so a chunk costs one
//! wake-up instead of two. What follows from that: an idle connection's close is seen only when it is used again, so a
//! request is repeated once on a fresh connection when a pooled one closed before one byte of answer. HTTP/2 connections
//! are shared and keep a task.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::{http1, http2};
use hyper::http::uri::{Authority, Scheme};
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connection as _, HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::translate::Translated;
use super::wakes::Wakes;

/// Idle connections kept to one origin; more than a node's usual concurrency there is waste.
const IDLE_PER_ORIGIN_MAX: usize = 512;
/// Below the usual keep-alive of providers, so that a reused connection is rarely a closed one.
const IDLE_MAX: Duration = Duration::from_secs(50);
/// The head of an answer (design.md §6).
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;

/// Streams that share one HTTP/2 connection; below the 100 that most servers allow, so that none waits unseen.
const STREAMS_MAX: usize = 64;
/// What one stream may have on its way unread: a slow reader must not take the window of the others.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// An HTTP/2 connection that answers no ping is dead.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A chunk up to this long is moved out of its connection's buffer, which hyper could otherwise not use again before the
/// chunk is written: it would make another one, of 8 KiB, for each.
const SHORT_BYTES_MAX: usize = 2048;
/// Short chunks share a buffer of this size, so one that waits for a slow reader keeps no more than it would have kept.
const SHARED_BYTES: usize = 8192;

thread_local! {
    /// What is left of the buffer for the next short chunks of this worker.
    static SHARED: RefCell<BytesMut> = RefCell::new(BytesMut::with_capacity(SHARED_BYTES));
}

type Io = TokioIo<Watched>;

/// Either kind of socket.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A socket that tells whether a byte has come from it since it was last asked.
struct Watched {
    /// In a box: TLS takes a kilobyte, of which a connection without it would keep the place.
    socket: Box<dyn Stream>,
    read: Arc<AtomicBool>,
}

/// A body in pieces, written without joining them, and perhaps a rest that is still arriving.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: SmallVec<[Bytes; 4]>,
    at: usize,
    rest: Option<Rest>,
}

/// The rest of a body that is still arriving.
pub struct Rest {
    pub body: Pin<Box<dyn Body<Data = Bytes, Error = Stopped> + Send>>,
    /// Its bytes, where its sender said how many there are.
    pub length: Option<u64>,
}

/// A body stopped arriving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the body stopped arriving")
    }
}

impl std::error::Error for Stopped {}

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rest({:?} bytes)", self.length)
    }
}

impl Pieces {
    pub fn new(pieces: impl IntoIterator<Item = Bytes>) -> Pieces {
        Pieces { pieces: pieces.into_iter().collect(), at: 0, rest: None }
    }

    /// A rest comes behind the pieces.
    pub fn add_rest(&mut self, rest: Rest) {
        self.rest = Some(rest);
    }

    /// Bytes left of the pieces.
    pub fn len(&self) -> usize {
        self.pieces[self.at..].iter().map(Bytes::len).sum()
    }

    /// The pieces that are left.
    pub fn left(&self) -> &[Bytes] {
        &self.pieces[self.at..]
    }

    pub fn is_empty(&self) -> bool {
        self.at == self.pieces.len() && self.rest.is_none()
    }

    /// Bytes left in all, where they are known.
    fn length(&self) -> Option<u64> {
        let rest = self.rest.as_ref().map_or(Some(0), |rest| rest.length)?;
        Some(self.len() as u64 + rest)
    }

    /// Whether a rest is still arriving, which comes once.
    pub fn comes_once(&self) -> bool {
        self.rest.is_some()
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Stopped;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Stopped>>> {
        let at = self.at;
        if let Some(piece) = self.pieces.get_mut(at).map(std::mem::take) {
            self.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        let polled = rest.body.as_mut().poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
                rest.length = rest.length.map(|length| length.saturating_sub(bytes));
            }
            Poll::Ready(_) => self.rest = None,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.length().map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Why no answer came, or no more of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// No connection: nothing was sent.
    Connect,
    /// The connection ended before one byte of answer.
    NoAnswer,
    /// No head within the bound; the request was sent and may be billed.
    FirstByte,
    /// The answer broke off.
    Cut,
}

/// Connections to every upstream.
#[derive(Debug)]
pub struct Client {
    connector: HttpsConnector<HttpConnector>,
    connect_timeout: Duration,
    idle: Mutex<HashMap<Origin, Vec<Idle>>>,
    shared: Mutex<HashMap<Origin, Vec<Shared>>>,
}

/// Scheme, host and port: what a connection can be reused for.
type Origin = (Option<Scheme>, Option<Authority>);

struct Idle {
    line: Box<Http1>,
    since: Instant,
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Idle(since {:?})", self.since)
    }
}

struct Http1 {
    // The body in a box: hyper keeps room for 32 requests beside each connection.
    connection: http1::Connection<Io, Box<Pieces>>,
    sender: http1::SendRequest<Box<Pieces>>,
    read: Arc<AtomicBool>,
    /// What it is polled with, by whoever has it.
    wakes: Wakes,
}

/// An HTTP/2 connection, and one count for each of its streams.
#[derive(Clone, Debug)]
struct Shared {
    sender: http2::SendRequest<Box<Pieces>>,
    streams: Arc<()>,
}

/// An answer's body, and the connection that it comes over.
pub enum Source {
    Http1(Box<Http1Body>),
    Http2(Box<Http2Body>),
    /// Made in this process.
    Local(super::demo::Local),
    /// Another source's, made into OpenAI's shape.
    Translated(Box<Translated>),
}

/// Reads a body off a connection that it owns; gives the connection back when the body has ended.
pub struct Http1Body {
    line: Option<Box<Http1>>,
    body: Incoming,
    origin: Origin,
    client: Arc<Client>,
}

/// Reads a body off a connection that others share.
pub struct Http2Body {
    body: Incoming,
    _stream: Arc<()>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Source::Http1(_) => "Source::Http1",
            Source::Http2(_) => "Source::Http2",
            Source::Local(_) => "Source::Local",
            Source::Translated(_) => "Source::Translated",
        })
    }
}

impl Client {
    /// A client that trusts the system's certificates, and those of `SSL_CERT_FILE` where it is set.
    pub fn new(connect_timeout: Duration) -> Result<Arc<Client>, std::io::Error> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect_timeout));
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(tokio_rustls::rustls::crypto::ring::default_provider())?
            .https_or_http()
            .enable_all_versions()
            .wrap_connector(tcp);
        Ok(Arc::new(Client { connector, connect_timeout, idle: Mutex::default(), shared: Mutex::default() }))
    }

    /// Sends a request with an absolute URI; the head has to come within `first_byte`. `again` makes the same request once
    /// more, for a connection that closed before one byte of answer.
    pub async fn send(
        self: &Arc<Client>,
        request: Request<Box<Pieces>>,
        again: impl FnOnce() -> Option<Request<Box<Pieces>>>,
        first_byte: Duration,
    ) -> Result<Response<Source>, Broken> {
        let origin = origin(request.uri());
        let deadline = tokio::time::Instant::now() + first_byte;
        let once = request.body().comes_once();
        let within = async {
            // Once on a pooled connection; when it closed without a byte of answer, once on a fresh one. What cannot be
            // sent twice has no pooled one; an HTTP/2 connection tells whether it is there before anything is sent.
            let pooled = if once { None } else { self.take_idle(&origin) };
            let unanswered = match (pooled, request) {
                (Some(line), request) => self.send_http1(line, request, &origin).await,
                (None, request) => match self.take_shared(&origin) {
                    Some(shared) => Box::pin(self.send_http2(shared, request, &origin, deadline)).await,
                    // Boxed: a connection is rarely made, and every request would have to keep a place for it.
                    None => return Box::pin(self.send_fresh(request, &origin, deadline)).await,
                },
            };
            match unanswered {
                Err(Broken::NoAnswer) if !once => {
                    let request = again().ok_or(Broken::NoAnswer)?;
                    Box::pin(self.send_fresh(request, &origin, deadline)).await
                }
                answered => answered,
            }
        };
        tokio::time::timeout_at(deadline, within).await.unwrap_or(Err(Broken::FirstByte))
    }

    async fn send_fresh(
        self: &Arc<Client>,
        request: Request<Box<Pieces>>,
        origin: &Origin,
        deadline: tokio::time::Instant,
    ) -> Result<Response<Source>, Broken> {
        match self.connect(request.uri().clone(), origin).await? {
            Connected::Http1(line) => self.send_http1(line, request, origin).await,
            Connected::Http2(shared) => self.send_http2(shared, request, origin, deadline).await,
        }
    }

    async fn connect(&self, uri: Uri, origin: &Origin) -> Result<Connected, Broken> {
        let connecting = hyper::service::Service::call(&TowerToHyperService::new(self.connector.clone()), uri);
        // TCP and TLS together.
        let io = tokio::time::timeout(self.connect_timeout, connecting)
            .await
            .map_err(|_| Broken::Connect)?
            .map_err(|_| Broken::Connect)?;
        let read = Arc::new(AtomicBool::new(false));
        let http2 = io.connected().is_negotiated_h2();
        let socket: Box<dyn Stream> = match io {
            MaybeHttpsStream::Http(tcp) => Box::new(tcp.into_inner()),
            MaybeHttpsStream::Https(tls) => Box::new(tls.into_inner()),
        };
        let io = TokioIo::new(Watched { socket, read: read.clone() });
        if http2 {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(PING_EVERY)
                .keep_alive_timeout(PING_TIMEOUT)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(STREAM_WINDOW_BYTES * STREAMS_MAX as u32)
                .handshake(io)
                .await
                .map_err(|_| Broken::Connect)?;
            tokio::spawn(connection);
            let shared = Shared { sender, streams: Arc::new(()) };
            lock(&self.shared).entry(origin.clone()).or_default().push(shared.clone());
            return Ok(Connected::Http2(shared));
        }
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .handshake(io)
            .await
            .map_err(|_| Broken::Connect)?;
        Ok(Connected::Http1(Box::new(Http1 { connection, sender, read, wakes: Wakes::new() })))
    }

    async fn send_http1(
        self: &Arc<Client>,
        mut line: Box<Http1>,
        mut request: Request<Box<Pieces>>,
        origin: &Origin,
    ) -> Result<Response<Source>, Broken> {
        // HTTP/1.1 wants the path alone.
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.map_or_else(Uri::default, Uri::from);
        line.read.store(false, Ordering::Relaxed);
        let Http1 { connection, sender, wakes, .. } = &mut *line;
        let mut answer = pin!(sender.send_request(request));
        let mut ended = false;
        wakes.renew();
        let head = poll_fn(|cx| {
            wakes.poll(cx, |cx| {
                // The connection does the work; whether it ended matters only if no answer came of it.
                if !ended && Pin::new(&mut *connection).poll(cx).is_ready() {
                    ended = true;
                }
                match answer.as_mut().poll(cx) {
                    Poll::Pending if ended => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(head) => Poll::Ready(Some(head)),
                }
            })
        });
        // With a byte of answer the request may have been served: it is not to be repeated here.
        let head = head.await.and_then(Result::ok);
        let answered = || if line.read.load(Ordering::Relaxed) { Broken::Cut } else { Broken::NoAnswer };
        let head = head.ok_or_else(answered)?;
        let line = (!ended).then_some(line);
        Ok(head.map(|body| {
            Source::Http1(Box::new(Http1Body { line, body, origin: origin.clone(), client: self.clone() }))
        }))
    }

    async fn send_http2(
        &self,
        mut shared: Shared,
        request: Request<Box<Pieces>>,
        origin: &Origin,
        deadline: tokio::time::Instant,
    ) -> Result<Response<Source>, Broken> {
        let sent = async {
            shared.sender.ready().await.map_err(|_| Broken::NoAnswer)?;
            shared.sender.send_request(request).await.map_err(|_| Broken::NoAnswer)
        };
        let head = match tokio::time::timeout_at(deadline, sent).await {
            Ok(head) => head?,
            Err(_) => {
                // Whatever is wrong with the connection, nobody else is to wait on it.
                if let Some(others) = lock(&self.shared).get_mut(origin) {
                    others.retain(|other| !Arc::ptr_eq(&other.streams, &shared.streams));
                }
                return Err(Broken::FirstByte);
            }
        };
        Ok(head.map(|body| Source::Http2(Box::new(Http2Body { body, _stream: shared.streams }))))
    }

    /// A connection with a free stream. One count is the list's own.
    fn take_shared(&self, origin: &Origin) -> Option<Shared> {
        let mut shared = lock(&self.shared);
        let connections = shared.get_mut(origin)?;
        connections.retain(|connection| !connection.sender.is_closed());
        connections.iter().find(|connection| Arc::strong_count(&connection.streams) <= STREAMS_MAX).cloned()
    }

    /// Closes connections that have been idle for too long, to whatever origin.
    pub fn sweep(&self) {
        lock(&self.idle).retain(|_, lines| {
            lines.retain(|idle| idle.since.elapsed() <= IDLE_MAX);
            !lines.is_empty()
        });
        lock(&self.shared).retain(|_, connections| {
            connections.retain(|connection| !connection.sender.is_closed());
            !connections.is_empty()
        });
    }

    fn take_idle(&self, origin: &Origin) -> Option<Box<Http1>> {
        loop {
            let mut idle = lock(&self.idle).get_mut(origin)?.pop()?;
            if idle.since.elapsed() > IDLE_MAX {
                lock(&self.idle).remove(origin); // the newest is too old, so all are
                return None;
            }
            // Sees a close that the reactor has heard of; no system call otherwise.
            let mut cx = Context::from_waker(Waker::noop());
            if Pin::new(&mut idle.line.connection).poll(&mut cx).is_pending() && idle.line.sender.is_ready() {
                return Some(idle.line);
            }
        }
    }

    fn put_idle(&self, origin: Origin, line: Box<Http1>) {
        let mut idle = lock(&self.idle);
        let lines = idle.entry(origin).or_default();
        let stale = lines.iter().take_while(|idle| idle.since.elapsed() > IDLE_MAX).count();
        lines.drain(..stale);
        if lines.len() < IDLE_PER_ORIGIN_MAX {
            lines.push(Idle { line, since: Instant::now() });
        }
    }
}

enum Connected {
    Http1(Box<Http1>),
    Http2(Shared),
}

fn origin(uri: &Uri) -> Origin {
    (uri.scheme().cloned(), uri.authority().cloned())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of this lock panics")
}

impl Source {
    /// The next chunk as it arrived; `None` at a clean end.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        match self {
            Source::Http1(body) => body.poll_chunk(cx),
            Source::Http2(shared) => poll_data(&mut shared.body, cx),
            Source::Local(local) => local.poll_chunk(cx).map(|chunk| chunk.map(Ok)),
            Source::Translated(translated) => translated.poll_chunk(cx),
        }
    }

    /// The next chunk, for callers that are not polled themselves.
    pub async fn chunk(&mut self) -> Option<Result<Bytes, Broken>> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }
}

impl Http1Body {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        let Http1Body { line, body, .. } = self;
        let Some(Http1 { connection, wakes, .. }) = line.as_deref_mut() else {
            return body_left(body, cx);
        };
        let mut ended = false;
        let polled = wakes.poll(cx, |cx| {
            if let Poll::Ready(data) = poll_data(body, cx) {
                return Poll::Ready(data);
            }
            // Asking the body has told the connection that there is room for a chunk; now it may read one.
            if Pin::new(&mut *connection).poll(cx).is_ready() {
                ended = true;
                return body_left(body, cx);
            }
            poll_data(body, cx)
        });
        if ended {
            self.line = None;
        }
        let Poll::Ready(data) = polled else { return Poll::Pending };
        if data.is_none() {
            self.give_back();
        }
        Poll::Ready(data.map(|data| data.map(moved)))
    }

    fn give_back(&mut self) {
        let Some(mut line) = self.line.take() else { return };
        // The connection learns here that the body is over.
        let mut cx = Context::from_waker(Waker::noop());
        if Pin::new(&mut line.connection).poll(&mut cx).is_pending() && line.sender.is_ready() {
            self.client.put_idle(std::mem::take(&mut self.origin), line);
        }
    }
}

fn moved(chunk: Bytes) -> Bytes {
    if chunk.len() > SHORT_BYTES_MAX {
        return chunk;
    }
    SHARED.with_borrow_mut(|shared| {
        shared.extend_from_slice(&chunk);
        shared.split().freeze()
    })
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.socket).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.read.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// What was read before a connection ended is still in its body.
fn body_left(body: &mut Incoming, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
    match poll_data(body, cx) {
        Poll::Pending => Poll::Ready(Some(Err(Broken::Cut))),
        left => left,
    }
}

fn poll_data(body: &mut Incoming, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
    loop {
        return match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(Err(_))) => Poll::Ready(Some(Err(Broken::Cut))),
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) if data.is_empty() => continue,
                Ok(data) => Poll::Ready(Some(Ok(data))),
                Err(_) => continue, // trailers: nothing in them is for the client
            },
        };
    }
}
