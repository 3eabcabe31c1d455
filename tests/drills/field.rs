//! What a drill is held on: an upstream that says so many words, nodes, a database behind a proxy, and a client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const KEY: &str = "sk-first-key-of-the-drills";
const MASTER: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A node that is armed reaches its failpoint within this time.
const DIES_WITHIN: Duration = Duration::from_secs(20);

/// How long a drill lasts: `DRILL_ROUNDS` times as long when that is set, for a drill by hand.
pub fn rounds(usual: u64) -> u64 {
    let times = std::env::var("DRILL_ROUNDS").ok().and_then(|times| times.parse::<u64>().ok());
    usual * times.unwrap_or(1)
}

/// Answers with as many words as the prompt asks for, a token each.
pub struct Upstream {
    address: SocketAddr,
    calls: Arc<AtomicUsize>,
}

impl Upstream {
    fn start() -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let counted = counted.clone();
                thread::spawn(move || answer_all(socket, &counted));
            }
        });
        Upstream { address, calls }
    }

    /// Requests that reached it.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

/// The number behind `name` in a prompt.
fn number_in(prompt: &str, name: &str) -> Option<usize> {
    prompt.split(' ').find_map(|word| word.strip_prefix(name)).and_then(|value| value.parse().ok())
}

fn answer_all(socket: TcpStream, counted: &AtomicUsize) -> Option<()> {
    let mut socket_out = socket.try_clone().ok()?;
    let mut input = BufReader::new(socket);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if input.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        input.read_exact(&mut body).ok()?;
        counted.fetch_add(1, Ordering::Relaxed);
        let body: Value = serde_json::from_slice(&body).ok()?;
        let asked = body["messages"][0]["content"].as_str()?;
        let number = |name: &str| number_in(asked, name);
        let most = body["max_tokens"].as_u64().unwrap_or(u64::MAX) as usize;
        let words = number("words=").unwrap_or(10).min(most);
        let each = Duration::from_millis(number("each_ms=").unwrap_or(0) as u64);
        let usage =
            format!(r#""usage":{{"prompt_tokens":5,"completion_tokens":{words},"total_tokens":{}}}"#, words + 5);
        if body["stream"] != true {
            let text = " word".repeat(words);
            let whole = format!(
                r#"{{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"stop"}}],{usage}}}"#
            );
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", whole.len());
            socket_out.write_all((head + &whole).as_bytes()).ok()?;
            continue;
        }
        socket_out
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            .ok()?;
        let event = |choices: &str, usage: &str| {
            let data = format!(
                "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{choices}]{usage}}}\n\n"
            );
            format!("{:x}\r\n{data}\r\n", data.len())
        };
        let word = event(r#"{"index":0,"delta":{"content":" word"},"finish_reason":null}"#, "");
        for _ in 0..words {
            socket_out.write_all(word.as_bytes()).ok()?;
            if !each.is_zero() {
                thread::sleep(each);
            }
        }
        let end = event(r#"{"index":0,"delta":{},"finish_reason":"stop"}"#, "") + &event("", &format!(",{usage}"));
        socket_out.write_all((end + "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").as_bytes()).ok()?;
    }
}

/// What a client received.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub request_id: String,
    /// Words that were asked for.
    pub asked: usize,
    /// Complete words of the answer.
    pub words: usize,
    /// The answer came to its end.
    pub whole: bool,
    pub text: String,
}

/// Asks once, and reads for as long as something comes.
pub fn chat(address: &str, fields: &str, prompt: &str) -> Reply {
    chat_as(KEY, address, fields, prompt)
}

/// The same with another user's key.
pub fn chat_as(key: &str, address: &str, fields: &str, prompt: &str) -> Reply {
    let mut text = String::new();
    let body = format!(r#"{{"model":"m",{fields},"messages":[{{"role":"user","content":"{prompt}"}}]}}"#);
    if let Ok(mut socket) = TcpStream::connect(address) {
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        let _ = socket.write_all(request.as_bytes());
        let mut bytes = Vec::new();
        let _ = socket.read_to_end(&mut bytes);
        text = String::from_utf8_lossy(&without_chunks(bytes)).into_owned();
    }
    let header = |name: &str| {
        let head = text.split("\r\n\r\n").next().unwrap_or_default();
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(name));
        line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let stream = text.contains("text/event-stream");
    let words = if stream {
        text.matches(r#"" word"},"finish_reason":null}]}"#).count()
    } else {
        text.matches(" word").count()
    };
    Reply {
        status: text.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0),
        request_id: header("x-request-id:"),
        asked: number_in(prompt, "words=").unwrap_or(10),
        words,
        whole: if stream { text.contains("data: [DONE]") } else { text.ends_with('}') },
        text,
    }
}

/// A reply as it is without transfer coding, also one that was cut: a chunk may end in the middle of an event.
fn without_chunks(reply: Vec<u8>) -> Vec<u8> {
    let Some(body) = reply.windows(4).position(|end| end == b"\r\n\r\n").map(|at| at + 4) else { return reply };
    let (mut whole, mut rest) = (reply[..body].to_vec(), &reply[body..]);
    if !String::from_utf8_lossy(&whole).to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return reply;
    }
    while let Some(line) = rest.windows(2).position(|end| end == b"\r\n") {
        let bytes = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        rest = &rest[line + 2..];
        whole.extend_from_slice(&rest[..bytes.min(rest.len())]);
        rest = &rest[(bytes + 2).min(rest.len())..];
    }
    whole
}

/// What the way to the database does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Open,
    /// Refuses and closes connections, as a server that is stopped.
    Closed,
    /// Takes everything and passes nothing on.
    Swallowing,
}

struct Node {
    process: Option<Child>,
    address: String,
    data: PathBuf,
}

/// Nodes on one database, an upstream, and a user with a balance.
pub struct Field {
    folder: tempfile::TempDir,
    pub upstream: Upstream,
    database_url: String,
    nodes: Vec<Node>,
    wire: Arc<AtomicU8>,
}

impl Field {
    /// `None` where PostgreSQL is asked for and there is none.
    pub fn new(postgres: bool, balance_nano: i64, ledger: &str) -> Option<Field> {
        let folder = tempfile::tempdir().unwrap();
        let database_url = if postgres {
            crate::cluster::database()?
        } else {
            format!("sqlite:{}", folder.path().join("books.db").display())
        };
        Some(Field::on(folder, database_url, balance_nano, ledger))
    }

    /// On a database that is already there, with everything else in a folder.
    pub fn on(folder: tempfile::TempDir, database_url: String, balance_nano: i64, ledger: &str) -> Field {
        let upstream = Upstream::start();
        let balance = format!("{}.{:09}", balance_nano / 1_000_000_000, balance_nano % 1_000_000_000);
        let toml = format!(
            "[ledger]\nfirst_balance = \"{balance}\"\n{ledger}\n[pool]\nconcurrency = 500\n\
             [endpoints.up]\ndialect = \"openai\"\nbase_url = \"http://{}/v1\"\nmodels = [\"m\"]\n\
             [models.m]\ninput = \"0\"\noutput = \"1.00\"\n",
            upstream.address
        );
        std::fs::write(folder.path().join("gpt-cat.toml"), toml).unwrap();
        let wire = Arc::new(AtomicU8::new(Wire::Open as u8));
        let mut field = Field { folder, upstream, database_url, nodes: Vec::new(), wire };
        let account = ["account", "add", "--endpoint", "up", "--key-env", "UPSTREAM_KEY"];
        assert!(field.command(&field.folder.path().join("desk"), &account).status().unwrap().success());
        field.nodes.clear();
        field
    }

    fn command(&self, data: &std::path::Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gpt-cat"));
        command.current_dir(self.folder.path()).env_clear().args(arguments).stdout(Stdio::null());
        command.env("GPT_CAT_SERVER__HTTP", "127.0.0.1:0").env("GPT_CAT_ADMIN__LISTEN", "off");
        command.env("GPT_CAT_DATABASE_URL", &self.database_url).env("GPT_CAT_DATA_DIR", data);
        command.env("GPT_CAT_MASTER_KEY", MASTER).env("GPT_CAT_FIRST_KEY", KEY).env("UPSTREAM_KEY", "sk-up");
        command
    }

    /// Starts a further node; its number.
    pub fn start_node(&mut self) -> usize {
        let node = self.add_node();
        self.restart(node);
        node
    }

    /// A further node, that is not started yet.
    pub fn add_node(&mut self) -> usize {
        let data = self.folder.path().join(format!("node{}", self.nodes.len()));
        self.nodes.push(Node { process: None, address: String::new(), data });
        self.nodes.len() - 1
    }

    /// Starts a node again, on its own disk.
    pub fn restart(&mut self, node: usize) {
        assert!(self.restart_armed(node, ""), "nobody killed it");
    }

    /// Starts a node again, which is to end at a failpoint; false when it did before it served.
    pub fn restart_armed(&mut self, node: usize, failpoint: &str) -> bool {
        let mut command = self.command(&self.nodes[node].data, &["serve"]);
        if !failpoint.is_empty() {
            command.env("FAILPOINT", failpoint);
        }
        let log = self.folder.path().join(format!("node{node}.log"));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        loop {
            let mut line = String::new();
            if out.read_line(&mut line).unwrap() == 0 {
                assert_eq!(process.wait().unwrap().signal(), Some(9), "{}", self.log(node));
                return false;
            }
            if let Some(address) = line.trim().strip_prefix("listening on http://") {
                self.nodes[node].address = address.to_owned();
                break;
            }
        }
        self.nodes[node].process = Some(process);
        true
    }

    /// Whether a node killed itself, which it has some time for.
    pub fn has_died(&mut self, node: usize) -> bool {
        let until = Instant::now() + DIES_WITHIN;
        while Instant::now() < until {
            let Some(process) = &mut self.nodes[node].process else { return true };
            if let Some(status) = process.try_wait().unwrap() {
                assert_eq!(status.signal(), Some(9), "{status}: {}", self.log(node));
                self.nodes[node].process = None;
                return true;
            }
            thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Whether a node stopped itself, as `SIGSTOP` does it.
    pub fn has_stopped(&self, node: usize) -> bool {
        let id = self.nodes[node].process.as_ref().unwrap().id();
        let until = Instant::now() + DIES_WITHIN;
        while Instant::now() < until {
            let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
            if state.rsplit(") ").next().is_some_and(|state| state.starts_with('T')) {
                return true;
            }
            thread::sleep(Duration::from_millis(10));
        }
        false
    }

    pub fn log(&self, node: usize) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("node{node}.log"))).unwrap_or_default()
    }

    pub fn address(&self, node: usize) -> String {
        self.nodes[node].address.clone()
    }

    pub fn signal(&self, node: usize, signal: &str) {
        let id = self.nodes[node].process.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// `kill -9`.
    pub fn kill(&mut self, node: usize) {
        self.signal(node, "-KILL");
        self.nodes[node].process.take().unwrap().wait().unwrap();
    }

    /// Ends all nodes in order.
    pub fn stop_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.signal(node, "-TERM");
            let status = self.nodes[node].process.take().unwrap().wait().unwrap();
            assert!(status.success(), "{status}: {}", self.log(node));
        }
    }

    /// Begins to take so many units from the user's balance, which asks nodes for what they have free.
    pub fn begin_debit(&self, units: u64) -> Child {
        let arguments = ["user", "debit", "first", &units.to_string()];
        self.command(&self.folder.path().join("desk"), &arguments).stderr(Stdio::null()).spawn().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let mut command = self.command(&self.folder.path().join("desk"), arguments);
        let output = command.arg("--json").stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn lines(&self) -> Vec<Value> {
        self.json(&["usage", "--limit", "100000"]).as_array().unwrap().clone()
    }

    /// The user's balance, without what nodes have leased.
    pub fn balance_nano(&self) -> i64 {
        let audit = self.json(&["audit"]);
        let text = audit["users"][0]["balance"].as_str().unwrap().to_owned();
        let (units, nano) = text.split_once('.').unwrap_or((&text, "0"));
        units.parse::<i64>().unwrap() * 1_000_000_000 + format!("{nano:0<9}").parse::<i64>().unwrap()
    }

    /// Everything adds up.
    pub fn assert_sums(&self) -> Value {
        let audit = self.json(&["audit"]);
        assert_eq!(audit["findings"].as_array().unwrap().len(), 0, "{audit}");
        audit
    }

    /// Everything adds up, and no lease is left.
    pub fn assert_audit(&self) {
        let audit = self.assert_sums();
        assert_eq!(audit["users"][0]["leases"], "0.00", "{audit}");
    }

    /// Looks until it holds.
    pub fn until(&self, what: &str, mut holds: impl FnMut(&Field) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            let logs: Vec<String> = (0..self.nodes.len()).map(|node| self.log(node)).collect();
            assert!(begun.elapsed() < Duration::from_secs(60), "not so: {what}\n{}", logs.join("\n"));
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Nodes that start from now on reach the database through a proxy, which [`Field::database`] commands. The
    /// subcommands of the drill go through it, too.
    pub fn put_proxy_before_database(&mut self) {
        let (scheme_and_user, rest) = self.database_url.split_once('@').unwrap();
        let (server, name) = rest.split_once('/').unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("{scheme_and_user}@{}/{name}", listener.local_addr().unwrap());
        let (server, wire) = (server.to_owned(), self.wire.clone());
        thread::spawn(move || {
            let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
            let (watched, closing) = (open.clone(), wire.clone());
            thread::spawn(move || {
                loop {
                    if closing.load(Ordering::Relaxed) == Wire::Closed as u8 {
                        for socket in watched.lock().unwrap().drain(..) {
                            let _ = socket.shutdown(std::net::Shutdown::Both);
                        }
                    }
                    thread::sleep(Duration::from_millis(10));
                }
            });
            for client in listener.incoming().flatten() {
                if wire.load(Ordering::Relaxed) == Wire::Closed as u8 {
                    continue;
                }
                let Ok(database) = TcpStream::connect(&server) else { continue };
                let ends = [client.try_clone().unwrap(), database.try_clone().unwrap()];
                open.lock().unwrap().extend(ends);
                for (from, to) in [(client.try_clone().unwrap(), database.try_clone().unwrap()), (database, client)] {
                    let wire = wire.clone();
                    thread::spawn(move || pass_on(from, to, &wire));
                }
            }
        });
        self.database_url = url;
    }

    pub fn database(&self, wire: Wire) {
        self.wire.store(wire as u8, Ordering::Relaxed);
    }
}

/// Passes bytes on; what is swallowed once is gone for good, and its connection with it.
fn pass_on(mut from: TcpStream, mut to: TcpStream, wire: &AtomicU8) {
    let mut bytes = vec![0; 64 << 10];
    let mut swallowed = false;
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        swallowed |= wire.load(Ordering::Relaxed) == Wire::Swallowing as u8;
        if !swallowed && to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

impl Drop for Field {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(process) = &mut node.process {
                let _ = process.kill();
                let _ = process.wait();
            }
        }
    }
}
