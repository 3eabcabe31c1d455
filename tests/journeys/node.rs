//! A gateway in this process, and a client that sees every byte of its replies.

use std::net::SocketAddr;
use std::time::Duration;

use gpt_cat::config::Config;
use gpt_cat::ledger::CHECK_LINE;
use gpt_cat::server::{Doors, Server};
use gpt_cat::store::{Line, LineFilter, MasterKey, NewAccount, Store};
use gpt_cat::upstream::dialects;
use gpt_cat::users::hash_key;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::upstream::Upstream;

/// The key of the user that every node has.
pub const KEY: &str = "sk-test-of-the-journeys";
/// Its name.
pub const USER: &str = "ann";
/// Per token, at the prices of [`Setup`]: 1.00 and 2.00 a million.
pub const INPUT_NANO: i64 = 1000;
pub const OUTPUT_NANO: i64 = 2000;

/// How a node is set up, before it starts.
pub struct Setup {
    pub toml: String,
    /// Accounts at the endpoint `up`: name and concurrency.
    pub accounts: Vec<(&'static str, u32)>,
    pub balance_nano: i64,
}

pub struct Node {
    pub address: SocketAddr,
    pub store: Store,
    stop: oneshot::Sender<()>,
    running: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Setup {
    /// The model `m` (and `mapped`, which the upstream knows as `theirs`) at a scripted upstream, one account, plenty of money.
    pub fn at(upstream: &Upstream) -> Setup {
        let toml = format!(
            r#"
            [server]
            http = "127.0.0.1:0"
            https = "off"
            drain_s = 3
            [admin]
            listen = "off"
            [endpoints.up]
            dialect = "openai"
            base_url = "http://{}/v1"
            models = ["m", "mapped", "hidden"]
            mapping = {{ mapped = "theirs" }}
            [models.m]
            input = "1.00"
            output = "2.00"
            [models.mapped]
            input = "1.00"
            output = "2.00"
            [models.hidden]
            input = "1.00"
            output = "2.00"
            "#,
            upstream.address
        );
        Setup { toml, accounts: vec![("first", 100)], balance_nano: 1_000_000_000 }
    }

    /// Adds lines to the configuration; tables of their own, or keys of one that is named anew.
    pub fn with(mut self, toml: &str) -> Setup {
        self.toml.push_str(toml);
        self
    }

    pub fn replacing(mut self, from: &str, to: &str) -> Setup {
        assert!(self.toml.contains(from), "{from}");
        self.toml = self.toml.replace(from, to);
        self
    }

    pub fn accounts(mut self, accounts: &[(&'static str, u32)]) -> Setup {
        self.accounts = accounts.to_vec();
        self
    }

    pub fn balance_nano(mut self, balance_nano: i64) -> Setup {
        self.balance_nano = balance_nano;
        self
    }

    pub async fn start(self) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let url = if crate::POSTGRES { crate::cluster::database() } else { None };
        let url = url.unwrap_or_else(|| format!("sqlite:{}", folder.path().join("gpt-cat.db").display()));
        let data = folder.path().display();
        let toml = format!("database_url = \"{url}\"\ndata_dir = \"{data}\"\n{}", self.toml);
        let config = Config::load(Some(toml.as_str()), [], &dialects()).unwrap_or_else(|errors| panic!("{errors}"));
        let store = Store::open(&config.database_url).await.unwrap();
        let master = MasterKey::load(None, &folder.path().join("master.key")).unwrap();
        let key = (hash_key(KEY), "neys".to_owned());
        store.add_user(USER.into(), "default".into(), self.balance_nano, Some(key)).await.unwrap();
        for (name, concurrency) in &self.accounts {
            let account = NewAccount {
                name: (*name).into(),
                endpoint: "up".into(),
                sealed_key: master.seal(&format!("sk-upstream-{name}")),
                hint: "xxxx".into(),
                base_url: None,
                models: None,
                weight: 1,
                tier: self.accounts.iter().position(|other| other.0 == *name).unwrap() as u32,
                concurrency: Some(*concurrency),
            };
            store.add_account(account).await.unwrap();
        }
        let doors = Doors::open(&config.server).await.unwrap();
        let address = doors.http_address().unwrap();
        let server = Server::start(config, store.clone(), master, doors).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            server.run(stopped).await.unwrap();
        });
        Node { address, store, stop, running, _folder: folder }
    }
}

impl Node {
    /// Sends a chat request with the usual key.
    pub async fn chat(&self, body: &str) -> Reply {
        self.send(&post(KEY, body)).await.read().await
    }

    /// Sends raw bytes on a fresh connection.
    pub async fn send(&self, request: &[u8]) -> Connection {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(request).await.unwrap();
        Connection { socket, bytes: Vec::new() }
    }

    /// Waits until so many calls have their line, and returns all lines, oldest first.
    pub async fn lines(&self, count: usize) -> Vec<Line> {
        for _ in 0..100 {
            let filter = LineFilter { limit: 10_000, ..LineFilter::default() };
            let mut lines = self.store.lines(filter).await.unwrap();
            if lines.len() >= count {
                lines.reverse();
                return lines.into_iter().map(|(_, line)| line).collect();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{count} lines were awaited");
    }

    /// What the user has by the store alone.
    pub async fn balance_nano(&self) -> i64 {
        let user = self.store.user(USER.into()).await.unwrap();
        user.balance_nano + user.leased_nano
    }

    pub async fn ask_to_stop(self) -> (Store, JoinHandle<()>, tempfile::TempDir) {
        let _ = self.stop.send(());
        (self.store, self.running, self._folder)
    }

    /// Stops in order; then everything must add up, and nothing may be leased any more.
    pub async fn finish(self) {
        let (store, running, _folder) = self.ask_to_stop().await;
        tokio::time::timeout(Duration::from_secs(20), running).await.expect("the node stops").unwrap();
        assert_books(&store).await;
        let leased: i64 = store.users(None).await.unwrap().iter().map(|user| user.leased_nano).sum();
        assert_eq!(leased, 0, "a node that stopped has given its leases back");
    }
}

/// Credits − charges = balances + leases for every user, and every line recomputes.
pub async fn assert_books(store: &Store) {
    let audit = store.audit(CHECK_LINE).await.unwrap();
    assert_eq!(audit.findings, Vec::<String>::new());
    for user in &audit.users {
        assert_eq!(user.difference_nano(), 0, "{user:?}");
        assert!(user.balance_nano >= 0 && user.leased_nano >= 0, "{user:?}");
    }
}

/// A chat request as bytes.
pub fn post(key: &str, body: &str) -> Vec<u8> {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A GET with the usual key.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {KEY}\r\n\r\n").into_bytes()
}

/// A chat body for the model `m`.
pub fn asking(more: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"Say hello."}}]{more}}}"#)
}

pub fn streaming(more: &str) -> String {
    asking(&format!(r#","stream":true{more}"#))
}

pub struct Connection {
    pub socket: TcpStream,
    bytes: Vec<u8>,
}

/// A reply, as far as it came.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// The body ended as HTTP says, not by a broken connection.
    pub whole: bool,
}

impl Connection {
    /// Reads until the reply is over, one way or the other.
    pub async fn read(mut self) -> Reply {
        let within = async {
            loop {
                if let Some(reply) = parse(&self.bytes).filter(|reply| reply.whole) {
                    return reply;
                }
                if self.more().await == 0 {
                    return parse(&self.bytes).unwrap_or_else(|| panic!("no reply: {:?}", self.bytes));
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), within).await.expect("a reply comes")
    }

    /// Reads until the body so far contains `text`.
    pub async fn read_until(&mut self, text: &str) -> Reply {
        let within = async {
            loop {
                if let Some(reply) = parse(&self.bytes)
                    && reply.text().contains(text)
                {
                    return reply;
                }
                assert!(self.more().await > 0, "the reply ended without {text:?}: {:?}", parse(&self.bytes));
            }
        };
        tokio::time::timeout(Duration::from_secs(20), within).await.expect("the text comes")
    }

    async fn more(&mut self) -> usize {
        let mut chunk = vec![0; 16384];
        let read = self.socket.read(&mut chunk).await.unwrap_or(0);
        self.bytes.extend_from_slice(&chunk[..read]);
        read
    }
}

impl Reply {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// What the deltas of choice 0 say, put together.
    pub fn said(&self) -> String {
        let text = self.text();
        let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
        let chunks = events.filter_map(|data| serde_json::from_str::<serde_json::Value>(data).ok());
        chunks.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
    }
}

/// Reads what there is of a reply; `None` before its head is complete.
fn parse(bytes: &[u8]) -> Option<Reply> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1)?.parse().unwrap();
    let mut reply = Reply { status, head, body: Vec::new(), whole: false };
    let rest = &bytes[end + 4..];
    if reply.header("transfer-encoding") == Some("chunked") {
        (reply.body, reply.whole) = dechunk(rest);
    } else {
        let length: usize = reply.header("content-length").map_or(0, |length| length.parse().unwrap());
        reply.whole = rest.len() >= length;
        reply.body = rest[..rest.len().min(length)].to_vec();
    }
    Some(reply)
}

fn dechunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(line) = rest.windows(2).position(|window| window == b"\r\n") else { return (body, false) };
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        let data = &rest[line + 2..];
        if size == 0 {
            return (body, true);
        }
        body.extend_from_slice(&data[..size.min(data.len())]);
        if data.len() < size + 2 {
            return (body, false);
        }
        rest = &data[size + 2..];
    }
}
