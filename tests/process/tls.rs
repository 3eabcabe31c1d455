//! TLS on both sides: clients that come over HTTPS, and upstreams that are reached over it, by HTTP/1.1 and HTTP/2.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};

use super::{Gateway, KEY, json, run, until};

/// A certificate for `localhost` that signs itself, in two files.
struct Files {
    cert: PathBuf,
    key: PathBuf,
}

fn certificate(folder: &Path, name: &str) -> Files {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let files = Files { cert: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
    std::fs::write(&files.cert, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    files
}

/// What an upstream has seen.
#[derive(Default)]
struct Seen {
    versions: Mutex<Vec<Version>>,
    connections: AtomicUsize,
}

const ANSWER: &str = r#"{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"over TLS"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#;

#[expect(clippy::disallowed_methods, reason = "the body is the gateway's, and the test knows it")]
async fn answer(seen: Arc<Seen>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    seen.versions.lock().unwrap().push(request.version());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    if body.windows(4).any(|window| window == b"slow") {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(Response::new(Full::from(ANSWER)))
}

/// An upstream that speaks the given protocols over TLS, on a runtime of its own.
fn upstream(files: &Files, protocols: &[&str]) -> (u16, Arc<Seen>) {
    let chain = CertificateDer::pem_file_iter(&files.cert).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(Seen::default());
    let serving = seen.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                serving.connections.fetch_add(1, Ordering::SeqCst);
                let (acceptor, seen) = (acceptor.clone(), serving.clone());
                tokio::spawn(async move {
                    let Ok(socket) = acceptor.accept(socket).await else { return };
                    let service = service_fn(move |request| answer(seen.clone(), request));
                    let _ =
                        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
    });
    (port, seen)
}

fn configure(folder: &Path, port: u16) {
    let toml = format!(
        "[endpoints.up]\ndialect = \"openai\"\nbase_url = \"https://localhost:{port}/v1\"\nmodels = [\"m\"]\n\
         [models.m]\ninput = \"1.00\"\noutput = \"2.00\"\n"
    );
    std::fs::write(folder.join("gpt-cat.toml"), toml).unwrap();
    assert!(run(folder, &["account", "add", "--endpoint", "up", "--key-env", "UPSTREAM_KEY"]).1);
}

fn body(text: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#)
}

#[test]
fn an_upstream_over_https_is_reached_by_http_1_and_by_http_2_over_few_connections() {
    for (protocols, version) in [(vec!["http/1.1"], Version::HTTP_11), (vec!["h2", "http/1.1"], Version::HTTP_2)] {
        let folder = tempfile::tempdir().unwrap();
        let files = certificate(folder.path(), "upstream");
        let (port, seen) = upstream(&files, &protocols);
        configure(folder.path(), port);
        let mut gateway = Gateway::start(folder.path(), |command| {
            command.env("SSL_CERT_FILE", &files.cert);
        });
        for _ in 0..5 {
            let reply = gateway.answer(&body("hello"));
            assert!(reply.contains("over TLS"), "{reply}");
        }
        assert_eq!(seen.connections.load(Ordering::SeqCst), 1);
        let waiting: Vec<TcpStream> = (0..5).map(|_| gateway.ask(&body("slow"))).collect();
        for mut stream in waiting {
            let mut reply = String::new();
            stream.read_to_string(&mut reply).unwrap();
            assert!(reply.contains("over TLS"), "{reply}");
        }
        assert!(seen.versions.lock().unwrap().iter().all(|seen| *seen == version), "{version:?}");
        let connections = seen.connections.load(Ordering::SeqCst);
        assert_eq!(connections, if version == Version::HTTP_2 { 1 } else { 5 }, "{version:?}");
        assert_eq!(gateway.signal("-TERM"), 0);
        assert_eq!(json(folder.path(), &["usage"]).as_array().unwrap().len(), 10);
    }
}

#[test]
fn an_upstream_whose_certificate_nobody_vouches_for_is_not_talked_to() {
    let folder = tempfile::tempdir().unwrap();
    let files = certificate(folder.path(), "upstream");
    let (port, seen) = upstream(&files, &["h2", "http/1.1"]);
    configure(folder.path(), port);
    let other = certificate(folder.path(), "other");
    let gateway = Gateway::start(folder.path(), |command| {
        command.env("SSL_CERT_FILE", &other.cert);
    });
    assert!(gateway.answer(&body("hello")).starts_with("HTTP/1.1 502"));
    assert!(seen.versions.lock().unwrap().is_empty(), "no request, and no key, went there");
}

fn get_over_tls(address: SocketAddr, trusted: &Path) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(trusted).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(connection, TcpStream::connect(address)?);
    let request = format!(
        "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {KEY}\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut reply = Vec::new();
    let mut chunk = [0; 4096];
    while !String::from_utf8_lossy(&reply).contains("\"list\"") {
        match stream.read(&mut chunk)? {
            0 => break,
            read => reply.extend_from_slice(&chunk[..read]),
        }
    }
    Ok(String::from_utf8(reply).unwrap())
}

#[test]
fn https_is_served_where_there_is_a_certificate_and_a_new_one_is_used_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let first = certificate(folder.path(), "first");
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
    std::fs::copy(&first.cert, &cert).unwrap();
    std::fs::copy(&first.key, &key).unwrap();
    // The old names of the variables.
    let gateway = Gateway::start(folder.path(), |command| {
        command.env("GPT_CAT_SERVER__HTTPS", "127.0.0.1:0").env("TLS_CERT_PATH", &cert).env("TLS_KEY_PATH", &key);
    });
    let address = gateway.https.as_ref().unwrap().parse().unwrap();
    assert!(get_over_tls(address, &first.cert).unwrap().contains("demo"));
    let second = certificate(folder.path(), "second");
    std::fs::copy(&second.cert, &cert).unwrap();
    std::fs::copy(&second.key, &key).unwrap();
    until("the new certificate is used", || get_over_tls(address, &second.cert).is_ok());
    assert!(get_over_tls(address, &first.cert).is_err());
}
