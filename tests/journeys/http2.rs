//! Clients that speak HTTP/2 with prior knowledge: many streams on one connection, the same journeys.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::node::{KEY, Node, Setup, streaming};
use crate::upstream::{Act, DONE, Upstream, chunk, finish, stream, stream_head, text};

async fn connect(node: &Node) -> SendRequest<Full<Bytes>> {
    let socket = tokio::net::TcpStream::connect(node.address).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Sends a chat request; status, what came of the body, and whether it ended well.
async fn chat(mut sender: SendRequest<Full<Bytes>>, key: &str, body: &str) -> (StatusCode, String, bool) {
    let request = Request::post("http://gateway/v1/chat/completions")
        .header("authorization", format!("Bearer {key}"))
        .header("content-type", "application/json")
        .body(Full::from(body.to_owned()))
        .unwrap();
    let (head, mut reply) = sender.send_request(request).await.unwrap().into_parts();
    let mut text = Vec::new();
    while let Some(frame) = reply.frame().await {
        match frame {
            Ok(frame) => text.extend_from_slice(&frame.into_data().unwrap_or_default()),
            Err(_) => return (head.status, String::from_utf8(text).unwrap(), false),
        }
    }
    (head.status, String::from_utf8(text).unwrap(), true)
}

#[tokio::test]
async fn many_streams_share_a_connection_and_each_is_charged() {
    let events = [text("Hello"), text(" world"), finish(), DONE.into()].concat();
    let sent = events.clone();
    let upstream = Upstream::start(move |_, _| stream(&sent)).await;
    let node = Setup::at(&upstream).start().await;
    let sender = connect(&node).await;
    let body = streaming("");
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let (sender, body) = (sender.clone(), body.clone());
            tokio::spawn(async move { chat(sender, KEY, &body).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), (StatusCode::OK, events.clone(), true));
    }
    assert_eq!(chat(sender.clone(), "sk-wrong", &body).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(node.lines(20).await.len(), 20);
    drop(sender);
    node.finish().await;
}

#[tokio::test]
async fn the_error_event_arrives_and_no_terminator_behind_it() {
    let upstream = Upstream::start(|_, _| vec![stream_head(), chunk(text("Hello")), Act::Close]).await;
    let node = Setup::at(&upstream).start().await;
    let sender = connect(&node).await;
    for _ in 0..20 {
        let (status, reply, _) = chat(sender.clone(), KEY, &streaming("")).await;
        assert_eq!(status, StatusCode::OK);
        assert!(
            reply.contains("Hello") && reply.contains(r#"data: {"error":"#) && !reply.contains("[DONE]"),
            "{reply}"
        );
    }
    drop(sender);
    node.finish().await;
}

#[tokio::test]
async fn a_stream_that_is_reset_cancels_its_upstream_and_not_its_neighbours() {
    let upstream = Upstream::start(|number, _| match number {
        0 => vec![stream_head(), chunk(text("Hello")), Act::AwaitClose],
        _ => stream(&[text("Hello"), finish(), DONE.into()].concat()),
    })
    .await;
    let node = Setup::at(&upstream).start().await;
    let mut sender = connect(&node).await;
    let request = Request::post("http://gateway/v1/chat/completions")
        .header("authorization", format!("Bearer {KEY}"))
        .body(Full::from(streaming("")))
        .unwrap();
    let mut reply = sender.send_request(request).await.unwrap().into_body();
    reply.frame().await.unwrap().unwrap();
    drop(reply);
    upstream.saw_close().await;
    assert!(chat(sender.clone(), KEY, &streaming("")).await.2);
    let lines = node.lines(2).await;
    assert!(lines.iter().any(|line| line.end_reason.name() == "client_gone" && line.output == 1), "{lines:?}");
    drop(sender);
    node.finish().await;
}
