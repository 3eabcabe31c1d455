//! Accepts sockets, within bounds, and serves HTTP/1.1 and HTTP/2 on them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::guard::{Calls, Deadlines, Guarded, InHand};
use super::relay::Broke;
use super::reply::Reply;
use super::tls::Certificate;
use super::{Gateway, journey};
use crate::config;

/// The head of a request (design.md §6).
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;
/// Streams of one HTTP/2 connection.
const HTTP2_STREAMS_MAX: u32 = 100;
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Files kept for the database, the journal, logs and listeners.
const FILES_RESERVED: u64 = 256;
/// A connection may need a second file, for its upstream.
const FILES_PER_CONNECTION: u64 = 2;
/// After an error of `accept` (no files left, say) that would come again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How every connection of HTTP/2 begins (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Read of a connection before its protocol is known: most first requests whole.
const FIRST_BYTES: usize = 4096;

/// What connections may go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Serving,
    /// They end once they have answered.
    Draining,
    /// They end as they are.
    Aborting,
}

/// What a connection has to know to be served and to be stopped.
#[derive(Clone)]
pub struct Door {
    pub gateway: Arc<Gateway>,
    pub bounds: Bounds,
    /// Held by each connection until it has ended.
    pub stage: watch::Receiver<Stage>,
}

/// Open connections of each address that has any.
type ByAddress = Arc<Mutex<HashMap<IpAddr, u32>>>;

/// Connections that are open, in all and by address.
#[derive(Clone)]
pub struct Bounds {
    all: Arc<Semaphore>,
    by_address: ByAddress,
    server: Arc<config::Server>,
}

impl Bounds {
    /// From the file limit, whose soft value is raised to the hard one.
    pub fn new(server: &config::Server) -> Bounds {
        let limit = getrlimit(Resource::Nofile);
        let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
        let files = if raised.is_ok() { limit.maximum } else { limit.current };
        let files = files.unwrap_or(u64::MAX);
        let connections = (files.saturating_sub(FILES_RESERVED) / FILES_PER_CONNECTION).max(16);
        let connections = usize::try_from(connections).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let all = Arc::new(Semaphore::new(connections));
        Bounds { all, by_address: Arc::default(), server: Arc::new(server.clone()) }
    }

    /// A place for a client of this address; `None` when it has as many as it may.
    fn place(&self, address: IpAddr) -> Option<Place> {
        let address = address.to_canonical();
        let bound = self.server.connections_per_address;
        let trusted = self.server.trusted_proxies.iter().any(|network| network.contains(address));
        if bound == 0 || trusted || address.is_loopback() {
            return Some(Place { counted: None });
        }
        let mut by_address = self.by_address.lock().expect("no holder of this lock panics");
        let count = by_address.entry(address).or_default();
        if *count >= bound {
            return None;
        }
        *count += 1;
        Some(Place { counted: Some((self.by_address.clone(), address)) })
    }

    fn deadlines(&self) -> Deadlines {
        Deadlines {
            head: Duration::from_secs(self.server.head_timeout_s),
            idle: Duration::from_secs(self.server.idle_timeout_s),
            write: Duration::from_secs(self.server.write_timeout_s),
        }
    }
}

/// One connection of an address; given back with its drop.
struct Place {
    counted: Option<(ByAddress, IpAddr)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((by_address, address)) = self.counted.take() else { return };
        let mut by_address = by_address.lock().expect("no holder of this lock panics");
        if let Some(count) = by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&address);
            }
        }
    }
}

/// Accepts until the future is dropped. At the bound of connections it waits, and the kernel's queue fills.
pub async fn accept(listener: TcpListener, certificate: Option<Certificate>, door: Door) {
    loop {
        let Ok(permit) = door.bounds.all.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, address)) => {
                let Some(place) = door.bounds.place(address.ip()) else { continue };
                let (certificate, door) = (certificate.clone(), door.clone());
                tokio::spawn(serve_socket(socket, certificate, door, (permit, place)));
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_socket(
    socket: TcpStream,
    certificate: Option<Certificate>,
    door: Door,
    _bounds: (OwnedSemaphorePermit, Place),
) {
    if socket.set_nodelay(true).is_err() {
        return; // closed already
    }
    match certificate {
        None => serve(socket, door).await,
        // Boxed, so that a connection without TLS keeps no place for it.
        Some(certificate) => Box::pin(serve_tls(socket, certificate, door)).await,
    }
}

async fn serve_tls(socket: TcpStream, certificate: Certificate, door: Door) {
    let accepting = Box::pin(certificate.acceptor().accept(socket));
    if let Ok(Ok(socket)) = tokio::time::timeout(HANDSHAKE_MAX, accepting).await {
        serve(socket, door).await;
    }
}

async fn serve<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(socket: T, door: Door) {
    let calls = Arc::new(Calls::default());
    let Door { gateway, bounds, mut stage } = door;
    let mut socket = Guarded::new(socket, calls.clone(), bounds.deadlines());
    let http2 = tokio::select! {
        known = speaks_http2(&mut socket) => known,
        _ = stage.wait_for(|stage| *stage != Stage::Serving) => return, // it has asked for nothing yet
    };
    let Ok(http2) = http2 else { return };
    let service = service_fn(move |request| {
        let (gateway, in_hand) = (gateway.clone(), calls.enter());
        // hyper keeps the place of this future for as long as the connection lives, also beside a stream: a pointer is small.
        Box::pin(async move {
            let response = journey::answer(gateway, request).await;
            Ok::<_, Infallible>(response.map(|body| Held { body, _in_hand: in_hand }))
        })
    });
    let socket = TokioIo::new(socket);
    if !http2 {
        let mut builder = http1::Builder::new();
        // The guard has the deadlines; hyper's own would also end an idle connection.
        builder.header_read_timeout(None).max_headers(HEADERS_MAX).max_buf_size(HEAD_BYTES_MAX);
        let connection = Box::pin(builder.serve_connection(socket, service));
        return until_over(connection, http1::Connection::graceful_shutdown, stage).await;
    }
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32);
    let connection = Box::pin(builder.serve_connection(socket, service));
    until_over(connection, http2::Connection::graceful_shutdown, stage).await;
}

/// Reads until it is clear which protocol is spoken. What was read is given back, to be read again at once: hyper doubles a
/// buffer of 8 KiB that has anything in it when more is read.
async fn speaks_http2<T: AsyncRead + Unpin>(socket: &mut Guarded<T>) -> io::Result<bool> {
    let mut first = BytesMut::with_capacity(FIRST_BYTES);
    loop {
        if socket.read_buf(&mut first).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let seen = first.len().min(HTTP2_PREFACE.len());
        if first[..seen] != HTTP2_PREFACE[..seen] || seen == HTTP2_PREFACE.len() {
            let http2 = seen == HTTP2_PREFACE.len() && first.starts_with(HTTP2_PREFACE);
            socket.unread(first.freeze());
            return Ok(http2);
        }
    }
}

/// Serves a connection to its end; `end` asks it to end once it has answered. The connection is in a box, since a future
/// that awaits another one keeps the place of both.
async fn until_over<C: Future>(mut connection: Pin<Box<C>>, end: fn(Pin<&mut C>), mut stage: watch::Receiver<Stage>) {
    tokio::select! {
        biased;
        // What a client does to its connection is no news; what matters was settled when its reply was dropped.
        _ = connection.as_mut() => return,
        _ = stage.wait_for(|stage| *stage != Stage::Serving) => end(connection.as_mut()),
    }
    tokio::select! {
        biased;
        _ = connection => {}
        _ = stage.wait_for(|stage| *stage == Stage::Aborting) => {}
    }
}

/// A body whose request is in hand until it is dropped: a silent stream is no idle connection.
struct Held {
    body: Reply,
    _in_hand: InHand,
}

impl Body for Held {
    type Data = Bytes;
    type Error = Broke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Listens on an address.
pub async fn bind(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))
}
