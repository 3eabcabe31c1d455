//! Accepts sockets, within bounds, and serves HTTP/1.1 and HTTP/2 on them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
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

/// What a connection has to know to be served and to be stopped.
#[derive(Clone)]
pub struct Door {
    pub gateway: Arc<Gateway>,
    pub bounds: Bounds,
    /// Ends them as they are.
    pub abort: watch::Receiver<bool>,
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
///
/// `graceful` asks connections to end once they have answered.
pub async fn accept(
    listener: TcpListener,
    certificate: Option<Certificate>,
    door: Door,
    graceful: Arc<GracefulShutdown>,
) {
    loop {
        let Ok(permit) = door.bounds.all.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, address)) => {
                let Some(place) = door.bounds.place(address.ip()) else { continue };
                let (certificate, door) = (certificate.clone(), door.clone());
                tokio::spawn(serve_socket(socket, certificate, door, graceful.watcher(), (permit, place)));
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
    watcher: Watcher,
    _bounds: (OwnedSemaphorePermit, Place),
) {
    if socket.set_nodelay(true).is_err() {
        return; // closed already
    }
    match certificate {
        None => serve(socket, door, watcher).await,
        Some(certificate) => {
            let accepting = Box::pin(certificate.acceptor().accept(socket));
            if let Ok(Ok(socket)) = tokio::time::timeout(HANDSHAKE_MAX, accepting).await {
                Box::pin(serve(socket, door, watcher)).await;
            }
        }
    }
}

async fn serve<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(socket: T, door: Door, watcher: Watcher) {
    let calls = Arc::new(Calls::default());
    let socket = Guarded::new(socket, calls.clone(), door.bounds.deadlines());
    let gateway = door.gateway;
    let service = service_fn(move |request| {
        let (gateway, in_hand) = (gateway.clone(), calls.enter());
        // hyper keeps the place of this future for as long as the connection lives, also beside a stream: a pointer is small.
        Box::pin(async move {
            let response = journey::answer(gateway, request).await;
            Ok::<_, Infallible>(response.map(|body| Held { body, _in_hand: in_hand }))
        })
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // The guard has the deadlines; hyper's own would also end an idle connection.
    builder.http1().header_read_timeout(None).max_headers(HEADERS_MAX).max_buf_size(HEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32);
    let connection = builder.serve_connection(TokioIo::new(socket), service).into_owned();
    let mut abort = door.abort;
    tokio::select! {
        // What a client does to its connection is no news; what matters was settled when its reply was dropped.
        _ = watcher.watch(connection) => {}
        _ = abort.wait_for(|abort| *abort) => {}
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
