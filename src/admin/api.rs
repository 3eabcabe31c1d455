//! The admin API: what the subcommands list, as JSON, for whoever has the admin token.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::show;
use crate::config::Config;
use crate::store::{LineCheck, LineFilter, Store, StoreError, hex};
use crate::telemetry::Metrics;
use crate::users::hash_key;

/// An operator's tools need few.
const CONNECTIONS_MAX: usize = 64;
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Lines of one answer.
const LINES_MAX: u32 = 1000;

struct Api {
    config: Config,
    store: Store,
    check_line: LineCheck,
    metrics: Arc<Metrics>,
    /// Hexadecimal SHA-256 of the token. Comparing hashes tells nothing about the token, however long it takes.
    token_hash: String,
}

/// Serves until the future is dropped; ends at once where no admin token was ever made.
pub async fn serve(listener: TcpListener, config: Config, store: Store, check_line: LineCheck, metrics: Arc<Metrics>) {
    let Ok(Some(token_hash)) = store.setting("admin_token_hash").await else { return };
    let api = Arc::new(Api { config, store, check_line, metrics, token_hash });
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let api = api.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&api, request));
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
            // A client that goes away is no news.
            let _ = builder.serve_connection(TokioIo::new(socket), service).await;
            drop(place);
        });
    }
}

async fn answer(api: &Api, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let presented = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = presented.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if hex(&hash_key(token)) != api.token_hash {
        return Ok(json(StatusCode::UNAUTHORIZED, error("the admin token is missing or wrong")));
    }
    if request.method() != Method::GET {
        return Ok(json(StatusCode::METHOD_NOT_ALLOWED, error("this API is read with GET")));
    }
    let listing = match request.uri().path() {
        "/users" => show::users(&api.store).await,
        "/keys" => show::keys(&api.store, None).await,
        "/accounts" => show::accounts(&api.store).await,
        "/models" => Ok(show::models(&api.config)),
        "/usage" => show::usage(&api.store, LineFilter { limit: LINES_MAX, ..LineFilter::default() }, true).await,
        "/metrics" => return Ok(text(api.metrics.text())),
        "/audit" => return Ok(audit(api).await.unwrap_or_else(|error| failed(&error))),
        _ => {
            let message = "there are: /users, /keys, /accounts, /models, /usage, /audit, /metrics";
            return Ok(json(StatusCode::NOT_FOUND, error(message)));
        }
    };
    Ok(match listing {
        Ok(listing) => json(StatusCode::OK, listing.json()),
        Err(error) => failed(&error),
    })
}

async fn audit(api: &Api) -> Result<Response<Full<Bytes>>, StoreError> {
    let (listing, wrong) = show::audit(&api.store, api.check_line).await?;
    Ok(json(StatusCode::OK, serde_json::json!({ "users": listing.json(), "findings": wrong })))
}

fn failed(cause: &StoreError) -> Response<Full<Bytes>> {
    json(StatusCode::INTERNAL_SERVER_ERROR, error(&cause.to_string()))
}

fn error(message: &str) -> serde_json::Value {
    serde_json::json!({ "error": { "message": message } })
}

/// Metrics, as Prometheus reads them.
fn text(body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn json(status: StatusCode, body: serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
