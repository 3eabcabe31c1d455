//! The yardstick beside nginx: a hyper server and hyper-util's pooled client with nothing between them.

use std::io;
use std::net::SocketAddr;

use hyper::body::Incoming;
use hyper::header::{CONNECTION, HOST};
use hyper::http::uri::{Authority, Scheme};
use hyper::service::service_fn;
use hyper::{Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

/// Serves until its parent has gone: every request to `upstream`, bodies streamed through both ways.
pub async fn serve(listener: TcpListener, upstream: SocketAddr) -> io::Result<()> {
    let authority: Authority = upstream.to_string().parse().expect("a socket address is an authority");
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<HttpConnector, Incoming> = Client::builder(TokioExecutor::new()).build(connector);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (client, authority) = (client.clone(), authority.clone());
        let service = service_fn(move |request| client.request(readdress(request, &authority)));
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        // An error here is a client that left; the driver notices every answer that it did not get.
        tokio::spawn(async move { connection.await.ok() });
    }
}

fn readdress(mut request: Request<Incoming>, authority: &Authority) -> Request<Incoming> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority.clone());
    *request.uri_mut() = Uri::from_parts(parts).expect("a path with scheme and authority is a whole address");
    request.headers_mut().remove(HOST);
    request.headers_mut().remove(CONNECTION);
    request
}
