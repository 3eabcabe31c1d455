//! The built binary as a process: first start, second start, subcommands beside it, signals, `kill -9`, logs, TLS.

#[path = "../support/cluster.rs"]
mod cluster;
mod database;
mod tls;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const KEY: &str = "sk-first-key-of-the-process-tests";
const TOKEN: &str = "token-of-the-process-tests";

/// A gateway process in a folder of its own.
struct Gateway {
    child: Child,
    base: String,
    https: Option<String>,
    welcome: String,
}

fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpt-cat"));
    command.current_dir(folder).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.env("GPT_CAT_SERVER__HTTP", "127.0.0.1:0").env("GPT_CAT_ADMIN__LISTEN", "off");
    command
}

impl Gateway {
    fn start(folder: &Path, more: impl FnOnce(&mut Command)) -> Gateway {
        let mut command = command(folder);
        command.env("GPT_CAT_FIRST_KEY", KEY).env("GPT_CAT_ADMIN_TOKEN", TOKEN);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        more(&mut command);
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut welcome = String::new();
        let base = loop {
            let mut line = String::new();
            assert!(out.read_line(&mut line).unwrap() > 0, "it ended: {welcome}");
            if let Some(base) = line.trim().strip_prefix("listening on http://") {
                break base.to_owned();
            }
            welcome += &line;
        };
        let mut https = None;
        if command.get_envs().any(|(name, _)| name == "TLS_CERT_PATH") {
            let mut line = String::new();
            out.read_line(&mut line).unwrap();
            https = line.trim().strip_prefix("listening on https://").map(str::to_owned);
        }
        Gateway { child, base, https, welcome }
    }

    fn ask(&self, body: &str) -> TcpStream {
        let mut socket = TcpStream::connect(&self.base).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {KEY}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(request.as_bytes()).unwrap();
        socket
    }

    fn answer(&self, body: &str) -> String {
        let mut reply = String::new();
        self.ask(body).read_to_string(&mut reply).unwrap();
        reply
    }

    fn signal(&mut self, signal: &str) -> i32 {
        Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        let status = self.child.wait().unwrap();
        status.code().unwrap_or(-1)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a subcommand; its standard output, and whether it succeeded.
fn run(folder: &Path, arguments: &[&str]) -> (String, bool) {
    let output = command(folder).args(arguments).env("UPSTREAM_KEY", "sk-upstream-secret").output().unwrap();
    (String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(), output.status.success())
}

fn json(folder: &Path, arguments: &[&str]) -> Value {
    let (text, good) = run(folder, &[arguments, &["--json"]].concat());
    assert!(good, "{arguments:?}: {text}");
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("{arguments:?}: {text}"))
}

/// Asks until the answer is there: a server learns of a change within a second.
fn until(what: &str, mut there: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !there() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

const DEMO: &str = r#"{"model":"demo","stream":true,"max_tokens":5,"messages":[{"role":"user","content":"Hello"}]}"#;

#[test]
fn a_first_start_prints_its_secrets_once_serves_the_demo_and_charges_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::start(folder.path(), |_| {});
    assert!(gateway.welcome.contains(KEY) && gateway.welcome.contains(TOKEN), "{}", gateway.welcome);
    let curl = gateway.welcome.lines().find(|line| line.contains("curl -N")).unwrap();
    assert!(curl.contains(&gateway.base), "{curl}");
    let reply = gateway.answer(DEMO);
    assert!(reply.contains("[DONE]") && reply.contains("Hello"), "{reply}");
    let balance = r#"{"model":"demo","messages":[{"role":"user","content":"/bi"}]}"#;
    assert!(gateway.answer(balance).contains("Balance: 0.99"));
    until("the line is shipped", || json(folder.path(), &["usage"]).as_array().unwrap().len() == 1);
    let before = json(folder.path(), &["user", "show", "first"]);
    assert!(before["balance"].as_str().unwrap().starts_with("0.99"), "{before}");
    assert_eq!(gateway.signal("-TERM"), 0);

    // Everything is as it was, and nothing is said twice.
    let mut again = Gateway::start(folder.path(), |_| {});
    assert_eq!(again.welcome, "");
    assert_eq!(json(folder.path(), &["user", "show", "first"]), before);
    assert!(again.answer(DEMO).contains("[DONE]"));
    assert_eq!(again.signal("-TERM"), 0);
    assert!(run(folder.path(), &["audit"]).1);
    let database = std::fs::read(folder.path().join("data/gpt-cat.db")).unwrap();
    for secret in [KEY, TOKEN] {
        assert!(!database.windows(secret.len()).any(|window| window == secret.as_bytes()), "stored as hashes only");
    }
}

#[test]
fn a_provider_key_in_the_environment_becomes_an_account_at_the_first_start() {
    let folder = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(folder.path(), |command| {
        command.env("OPENAI_API_KEY", "sk-of-the-provider-1234");
    });
    assert!(gateway.welcome.contains("OPENAI_API_KEY") && !gateway.welcome.contains("sk-of-the-provider"));
    let accounts = json(folder.path(), &["account", "list"]);
    assert_eq!((&accounts[0]["endpoint"], &accounts[0]["key"]), (&"openai".into(), &"…1234".into()));
}

#[test]
fn a_secret_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = command(folder.path()).env("GPT_CAT_FIRST_KEY", "123456").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("GPT_CAT_FIRST_KEY"));
}

#[test]
fn another_currency_than_the_first_starts_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    Gateway::start(folder.path(), |_| {}).signal("-TERM");
    let output = command(folder.path()).env("GPT_CAT_CURRENCY", "EUR").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("currency"));
}

#[test]
fn every_subcommand_works_beside_a_running_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let gateway = Gateway::start(path, |_| {});
    let added = json(path, &["user", "add", "ann", "--balance", "2.50"]);
    let key = added["key"].as_str().unwrap().to_owned();
    let status = |key: &str| {
        let mut socket = TcpStream::connect(&gateway.base).unwrap();
        let request =
            format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\r\n");
        socket.write_all(request.as_bytes()).unwrap();
        let mut reply = String::new();
        socket.read_to_string(&mut reply).unwrap();
        reply[9..12].to_owned()
    };
    until("the new key works", || status(&key) == "200");
    assert_eq!(json(path, &["user", "credit", "ann", "0.5", "--note", "thanks"])["balance"], "3.00");
    assert_eq!(json(path, &["user", "freeze", "ann"])["frozen"], true);
    until("the user is frozen", || status(&key) == "403");
    assert_eq!(json(path, &["user", "unfreeze", "ann"])["frozen"], false);
    until("the user is unfrozen", || status(&key) == "200");
    let vip = json(path, &["group", "set", "vip", "--ratio", "0.5", "--models", "other", "--concurrency", "3"]);
    assert_eq!(
        (&vip[1]["ratio"], &vip[1]["models"][0], &vip[1]["concurrency"]),
        (&"0.50".into(), &"other".into(), &3.into())
    );
    assert_eq!(json(path, &["user", "group", "ann", "vip"])["group"], "vip");
    assert_eq!(json(path, &["group", "set", "vip", "--models", "all"])[1]["models"], Value::Null);
    // The node has leased some of the first user's money by now, and gives it back for a debit of all of it.
    assert!(gateway.answer(DEMO).contains("[DONE]"));
    assert_ne!(json(path, &["lease", "list"]), Value::Array(vec![]));
    until("the line is stored", || !json(path, &["usage"]).as_array().unwrap().is_empty());
    let (csv, good) = run(path, &["usage", "--csv", "--end-reason", "complete", "--since", "2020-01-01T00:00:00Z"]);
    assert!(good && csv.starts_with("started,user,key,model,") && csv.lines().count() == 2, "{csv}");
    assert_eq!(json(path, &["usage", "--until", "2020-01-01T00:00:00Z"]), Value::Array(vec![]));
    let all = json(path, &["user", "show", "first"])["balance"].as_str().unwrap().to_owned();
    assert_eq!(json(path, &["user", "debit", "first", &all])["balance"], "0.00");
    assert!(gateway.answer(DEMO).contains("insufficient_quota"));
    assert_eq!(json(path, &["user", "edit-balance", "ann", "7.25"])["balance"], "7.25");
    assert_eq!(json(path, &["user", "limit", "ann", "--day", "1", "--month", "20"])["month_limit"], "20.00");
    assert_eq!(json(path, &["user", "limit", "ann", "--day", "none"])["day_limit"], Value::Null);
    assert_eq!(json(path, &["user", "freeze", "ann", "--until-credit"])["frozen"], "until_credit");
    let codes = json(path, &["code", "add", "0.75", "--count", "2", "--note", "gift"]);
    let code = codes[0]["code"].as_str().unwrap();
    let redeemed = json(path, &["code", "redeem", code, "ann"]);
    assert_eq!((&redeemed["balance"], &redeemed["frozen"]), (&"8.00".into(), &false.into()));
    assert!(!run(path, &["code", "redeem", code, "ann"]).1, "once");
    assert!(run(path, &["code", "revoke", &codes[1]["id"].to_string()]).1);
    let many = json(path, &["code", "add", "0.01", "--count", "1000"]);
    let ids: std::collections::HashSet<_> = many.as_array().unwrap().iter().map(|code| code["id"].as_i64()).collect();
    assert_eq!(ids.len(), 1000, "made 500 at a time, each with its own id");
    let listed = json(path, &["code", "list"]);
    assert_eq!((&listed[0]["redeemed_by"], listed[1]["revoked"].is_null()), (&"ann".into(), false));
    let limited =
        json(path, &["key", "add", "ann", "--limit", "5", "--models", "demo", "--expires", "2100-01-01T00:00:00Z"]);
    assert!(run(path, &["key", "set", &limited["id"].to_string(), "--limit", "none", "--day", "0.10"]).1);
    let keys = json(path, &["key", "list", "ann"]);
    let key = keys.as_array().unwrap().iter().find(|key| key["id"] == limited["id"]).unwrap();
    assert_eq!((&key["limit"], &key["day_limit"], &key["models"][0]), (&Value::Null, &"0.10".into(), &"demo".into()));
    run(path, &["key", "revoke", &limited["id"].to_string()]);
    assert_eq!(json(path, &["group", "set", "vip", "--requests-per-minute", "60"])[1]["requests_per_minute"], 60);
    let template = json(path, &["template", "add", "猫", "--system", "You are a cat.", "--description", "meows"]);
    assert_eq!(template["messages"], serde_json::json!([{ "role": "system", "content": "You are a cat." }]));
    assert!(!run(path, &["template", "add", "猫", "--system", "again"]).1, "there is one already");
    assert!(!run(path, &["template", "add", "help", "--system", "x"]).1, "a word of the chat's own");
    std::fs::write(path.join("t.json"), r#"[{"role":"user","content":"hi"}]"#).unwrap();
    let edited = json(path, &["template", "edit", "猫", "--file", path.join("t.json").to_str().unwrap()]);
    assert_eq!((&edited["messages"][0]["role"], &edited["description"]), (&"user".into(), &"meows".into()));
    std::fs::write(path.join("t.json"), r#"[{"content":"hi"}]"#).unwrap();
    assert!(!run(path, &["template", "edit", "猫", "--file", path.join("t.json").to_str().unwrap()]).1);
    assert_eq!(json(path, &["template", "disable", "猫"])["enabled"], false);
    assert_eq!(json(path, &["template", "enable", "猫"])["enabled"], true);
    assert_eq!(json(path, &["template", "show", "猫"])["enabled"], true);
    json(path, &["template", "add", "own", "--prompt", "x", "--user", "ann"]);
    assert_eq!(json(path, &["template", "list", "--user", "ann"])[0]["name"], "own");
    assert!(run(path, &["template", "remove", "猫"]).1 && !run(path, &["template", "remove", "猫"]).1);
    let names = json(path, &["template", "list"]);
    let names: Vec<&str> = names.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["explain-code", "polish", "summarize", "translate"]);
    let days = json(path, &["usage", "--per-day", "--user", "first"]);
    assert_eq!((&days[0]["model"], &days[0]["calls"]), (&"demo".into(), &1.into()));
    let anew = json(path, &["usage", "recompute", "--dry-run", "--user", "first"]);
    assert_eq!((&anew[0]["lines"], &anew[0]["difference"]), (&1.into(), &"0.00".into()));
    assert!(!run(path, &["usage", "recompute"]).1, "it only shows, and has to be told so");
    let second = json(path, &["key", "add", "ann", "--name", "laptop"]);
    let second_key = second["key"].as_str().unwrap().to_owned();
    until("the second key works", || status(&second_key) == "200");
    run(path, &["key", "revoke", &second["id"].to_string()]);
    until("the second key is revoked", || status(&second_key) == "401");
    assert_eq!(json(path, &["key", "list", "ann"]).as_array().unwrap().len(), 3);
    assert!(run(path, &["account", "add", "--endpoint", "openai", "--key-env", "UPSTREAM_KEY", "--limit", "3"]).1);
    let (text, good) = run(path, &["account", "add", "--endpoint", "nowhere", "--key-env", "UPSTREAM_KEY"]);
    assert!(!good && text.contains("openai"), "{text}");
    for (verb, enabled) in [("disable", false), ("enable", true)] {
        run(path, &["account", verb, "openai"]);
        assert_eq!(json(path, &["account", "list"])[0]["enabled"], enabled);
    }
    run(path, &["account", "remove", "openai"]);
    assert_eq!(json(path, &["account", "list"]), Value::Array(vec![]));
    assert!(run(path, &["model", "list"]).0.contains("demo"));
    assert!(run(path, &["config", "check"]).1);
    assert_eq!(json(path, &["user", "list"]).as_array().unwrap().len(), 2);
    for (arguments, why) in [
        (vec!["user", "show", "nobody"], "nobody"),
        (vec!["user", "add", "ann"], "ann"),
        (vec!["user", "credit", "ann", "-1"], "-1"),
        (vec!["key", "revoke", "99"], "99"),
        (vec!["user", "debit", "ann", "100"], "the balance"),
        (vec!["code", "redeem", "code-unknown", "ann"], "no such code"),
        (vec!["user", "limit", "ann", "--day", "soon"], "soon"),
        (vec!["user", "group", "ann", "nowhere"], "nowhere"),
        (vec!["lease", "release", "00112233445566778899aabbccddeeff"], "boot"),
    ] {
        let (text, good) = run(path, &arguments);
        assert!(!good && text.contains(why), "{arguments:?}: {text}");
    }
    assert!(run(path, &["audit"]).1);
}

#[test]
fn imported_prices_make_a_model_servable_that_had_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let file = "[endpoints.x]\ndialect = \"openai\"\nmodels = [\"some-chat\"]\n";
    std::fs::write(path.join("gpt-cat.toml"), file).unwrap();
    let (text, good) = run(path, &["config", "check"]);
    assert!(!good && text.contains("serves a model without a price"), "{text}");
    let list = r#"{"vendor/some-chat":{"input_cost_per_token":2.5e-06,"output_cost_per_token":1e-05,
        "max_input_tokens":64000,"max_output_tokens":8000},"by-second":{"output_cost_per_second":0.1}}"#;
    std::fs::write(path.join("list.json"), list).unwrap();
    let imported = json(path, &["prices", "import", "list.json"]);
    assert_eq!((&imported["models"], &imported["skipped"][0]), (&2.into(), &"by-second".into()));
    assert!(run(path, &["config", "check"]).1);
    let models = json(path, &["model", "list"]);
    assert_eq!((&models[0]["input"], &models[0]["output"]), (&"2.50".into(), &"10.00".into()));
    let (text, good) = run(path, &["prices", "import", "list.json", "by-second"]);
    assert!(!good && text.contains("no price for \"by-second\""), "{text}");
    assert!(run(path, &["config", "check"]).1, "a list that was refused changes nothing");
}

#[test]
fn an_audit_notices_money_that_came_from_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    Gateway::start(folder.path(), |_| {}).signal("-TERM");
    // What the database refused is told, and no fault of the books.
    std::fs::create_dir_all(folder.path().join("data/journal/refused")).unwrap();
    std::fs::write(folder.path().join("data/journal/refused/ab-1.json"), "{}").unwrap();
    let (text, good) = run(folder.path(), &["audit"]);
    assert!(good && text.contains("1 lines that the database refused"), "{text}");
    let database = rusqlite::Connection::open(folder.path().join("data/gpt-cat.db")).unwrap();
    database.execute("UPDATE users SET balance_nano = balance_nano + 1", []).unwrap();
    let (text, good) = run(folder.path(), &["audit"]);
    assert!(!good && text.contains("WRONG"), "{text}");
}

#[test]
fn a_bad_configuration_names_line_and_reason_and_nothing_starts() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("gpt-cat.toml"), "[server]\nhtp = \"127.0.0.1:0\"\n").unwrap();
    let (text, good) = run(folder.path(), &["config", "check"]);
    assert!(!good && text.contains("line 2") && text.contains("htp"), "{text}");
    assert!(!folder.path().join("data").exists());
}

/// A scripted upstream that streams a word each 5 ms until its client has gone.
fn endless_upstream() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            std::thread::spawn(move || stream_words(socket));
        }
    });
    address
}

fn stream_words(mut socket: TcpStream) {
    let mut request = [0; 65536];
    let _ = socket.read(&mut request);
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    if socket.write_all(head.as_bytes()).is_err() {
        return;
    }
    let event = r#"data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}"#;
    let chunk = format!("{:x}\r\n{event}\n\n\r\n", event.len() + 2);
    while socket.write_all(chunk.as_bytes()).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn configure(folder: &Path, upstream: &str) {
    let toml = format!(
        "[endpoints.up]\ndialect = \"openai\"\nbase_url = \"http://{upstream}/v1\"\nmodels = [\"m\"]\n\
         [models.m]\ninput = \"1.00\"\noutput = \"2.00\"\n"
    );
    std::fs::write(folder.join("gpt-cat.toml"), toml).unwrap();
    assert!(run(folder, &["account", "add", "--endpoint", "up", "--key-env", "UPSTREAM_KEY", "--limit", "100"]).1);
}

#[test]
fn a_process_that_is_killed_settles_its_open_streams_at_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), &endless_upstream());
    let mut killed = 0;
    for round in 1..=3u64 {
        let mut gateway = Gateway::start(folder.path(), |_| {});
        let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"Go on."}]}"#;
        let mut streams: Vec<TcpStream> = (0..5).map(|_| gateway.ask(body)).collect();
        // Past 256 tokens each stream has taken a slice of its own.
        std::thread::sleep(Duration::from_millis(700 * round));
        gateway.signal("-KILL");
        killed += streams.len();
        let read = streams.iter_mut().map(|stream| {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).matches(" word").count() as i64
        });
        let got: Vec<i64> = read.collect();
        assert!(got.iter().all(|words| *words > 10), "{got:?}");

        // The next start settles what was left, before it serves.
        let mut next = Gateway::start(folder.path(), |_| {});
        let lines = json(folder.path(), &["usage", "--limit", "1000"]);
        let lines: Vec<&Value> = lines.as_array().unwrap().iter().take(5).collect();
        for line in &lines {
            assert_eq!(line["end_reason"], "crashed", "{line}");
            let charged = line["output_tokens"].as_i64().unwrap();
            let most = *got.iter().max().unwrap();
            assert!(charged <= most && charged + 256 + 128 >= *got.iter().min().unwrap(), "{charged} of {got:?}");
        }
        assert_eq!(next.signal("-TERM"), 0);
        let (text, good) = run(folder.path(), &["audit"]);
        assert!(good, "{text}");
    }
    let lines = json(folder.path(), &["usage", "--limit", "1000"]);
    assert_eq!(lines.as_array().unwrap().len(), killed, "one line a call, none twice");
    assert!(
        std::fs::read_dir(folder.path().join("data/journal")).unwrap().next().is_none(),
        "nothing is left to settle"
    );
}

// Fault 11 of product.md: prompts, answers and upstream keys go to the log.
#[test]
fn nothing_of_a_prompt_an_answer_or_a_key_is_logged() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), &endless_upstream());
    let log = folder.path().join("log.txt");
    let mut gateway = Gateway::start(folder.path(), |command| {
        command.env("RUST_LOG", "gpt_cat=trace").stderr(std::fs::File::create(&log).unwrap());
    });
    let body =
        r#"{"model":"m","stream":true,"max_tokens":30,"messages":[{"role":"user","content":"My-secret-prompt"}]}"#;
    let mut stream = gateway.ask(body);
    stream.read_exact(&mut [0; 2000]).unwrap();
    drop(stream);
    let broken = r#"{"model":"m","messages":"My-secret-prompt"}"#;
    assert!(gateway.answer(broken).contains("400"));
    assert!(gateway.answer(&body.replace("\"m\"", "\"unknown\"")).contains("404"));
    assert_eq!(gateway.signal("-TERM"), 0);
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("answered") && log.contains("refused"), "{log}");
    for secret in ["secret-prompt", " word", KEY, TOKEN, "sk-upstream-secret"] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[test]
fn the_admin_api_wants_the_token_and_shows_what_the_subcommands_show() {
    let folder = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(folder.path(), |command| {
        command.env("GPT_CAT_ADMIN__LISTEN", "127.0.0.1:0");
    });
    let line = gateway.welcome.lines().find_map(|line| line.strip_prefix("admin API on http://"));
    let admin = line.unwrap().to_owned();
    let get = |path: &str, token: &str| {
        let mut socket = TcpStream::connect(&admin).unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\r\n");
        socket.write_all(request.as_bytes()).unwrap();
        let mut reply = String::new();
        socket.read_to_string(&mut reply).unwrap();
        reply
    };
    for token in ["", "wrong", KEY] {
        assert!(get("/users", token).starts_with("HTTP/1.1 401"));
    }
    for path in ["/users", "/keys", "/accounts", "/models", "/usage", "/audit", "/metrics"] {
        assert!(get(path, TOKEN).starts_with("HTTP/1.1 200"), "{path}");
    }
    assert!(get("/users", TOKEN).contains(r#""user":"first""#));
    assert!(get("/nothing", TOKEN).starts_with("HTTP/1.1 404"));
}

#[test]
fn a_port_in_use_costs_the_first_start_none_of_its_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let _holder = TcpListener::bind(&taken).unwrap();
    let output = command(folder.path()).env("GPT_CAT_SERVER__HTTP", &taken).output().unwrap();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(&taken));
    assert!(Gateway::start(folder.path(), |_| {}).welcome.contains(KEY));
}

/// Reads all of a request: what lies unread when a socket is closed resets it.
fn read_request(socket: &mut TcpStream) {
    let mut reader = BufReader::new(socket);
    let (mut line, mut length) = (String::new(), 0);
    while reader.read_line(&mut line).is_ok_and(|bytes| bytes > 2) {
        if let Some(given) = line.to_lowercase().strip_prefix("content-length:") {
            length = given.trim().parse().unwrap();
        }
        line.clear();
    }
    let _ = reader.read_exact(&mut vec![0; length]);
}

/// A scripted upstream that answers with so many tokens, as it says itself.
fn upstream_of(prompt: u64, output: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            read_request(&mut socket);
            let words = " word".repeat(output as usize);
            let body = format!(
                r#"{{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{words}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{output},"total_tokens":{}}}}}"#,
                prompt + output
            );
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let _ = socket.write_all((head + &body).as_bytes());
        }
    });
    address
}

const ASK: &str =
    r#"{"model":"m","max_tokens":40,"messages":[{"role":"user","content":"Count to forty, a word each."}]}"#;

fn wait_for_lines(folder: &Path, count: usize) -> Vec<Value> {
    let lines = || json(folder, &["usage"]).as_array().unwrap().clone();
    until("the lines are shipped", || lines().len() == count);
    lines()
}

#[test]
fn a_price_that_changes_over_a_restart_is_charged_from_then_on_and_the_old_lines_still_recompute() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    configure(path, &upstream_of(14, 40));
    let config = std::fs::read_to_string(path.join("gpt-cat.toml")).unwrap();
    let mut gateway = Gateway::start(path, |_| {});
    assert!(gateway.answer(ASK).contains("200 OK"));
    wait_for_lines(path, 1);
    assert_eq!(gateway.signal("-TERM"), 0);
    // Dearer, and dearer still beyond eight tokens of prompt: the hold covers the tier that the prompt is in.
    let dearer = config.replace(
        "input = \"1.00\"\noutput = \"2.00\"",
        "input = \"3.00\"\noutput = \"6.00\"\ntiers = [{ above = 8, input = \"30.00\", output = \"60.00\" }]",
    );
    assert_ne!(dearer, config);
    std::fs::write(path.join("gpt-cat.toml"), dearer).unwrap();
    let mut gateway = Gateway::start(path, |_| {});
    assert!(gateway.answer(ASK).contains("200 OK"));
    let lines = wait_for_lines(path, 2);
    let seen: Vec<_> = lines.iter().map(|line| (line["charged"].as_str().unwrap(), line["tier"].as_u64())).collect();
    assert_eq!(seen, [("0.00282", Some(1)), ("0.000094", Some(0))], "newest first");
    assert_ne!(lines[0]["price_version"], lines[1]["price_version"]);
    assert!(run(path, &["audit"]).1);
    let amount = |line: &Value, name: &str| line[name].as_str().unwrap().parse::<f64>().unwrap();
    assert!(lines.iter().all(|line| amount(line, "hold") >= amount(line, "charged")), "{lines:?}");
    assert_eq!(gateway.signal("-TERM"), 0);
}

#[test]
fn a_server_forgets_lines_beyond_the_days_that_are_kept_and_what_they_came_to_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    configure(path, &upstream_of(14, 40));
    let mut gateway = Gateway::start(path, |_| {});
    assert!(gateway.answer(ASK).contains("200 OK"));
    wait_for_lines(path, 1);
    assert_eq!(gateway.signal("-KILL"), -1);
    let balance = |path: &Path| json(path, &["user", "show", "first"])["balance"].clone();
    {
        let database = rusqlite::Connection::open(path.join("data/gpt-cat.db")).unwrap();
        database.execute("UPDATE lines SET started_ms = started_ms - 3 * 86400000", []).unwrap();
        database.execute("UPDATE days SET day = day - 3", []).unwrap();
    }
    // The journal of the boot that was killed still has the line: replayed, and then pruned, it comes up once.
    let before = json(path, &["usage", "--per-day"]);
    let mut gateway = Gateway::start(path, |command| {
        command.env("GPT_CAT_LEDGER__LINES_KEPT_DAYS", "1");
    });
    until("the line is forgotten", || json(path, &["usage"]).as_array().unwrap().is_empty());
    assert_eq!(json(path, &["usage", "--per-day"]), before);
    assert_eq!((&before[0]["calls"], before.as_array().unwrap().len()), (&1.into(), 1));
    assert!(gateway.answer(ASK).contains("200 OK"));
    wait_for_lines(path, 1);
    let (text, good) = run(path, &["audit"]);
    assert!(good, "{text}");
    assert_eq!(gateway.signal("-TERM"), 0);
    assert_eq!(balance(path), "0.999812");
}

#[test]
fn usage_is_filtered_by_account_key_and_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    configure(path, &upstream_of(14, 40));
    let config = std::fs::read_to_string(path.join("gpt-cat.toml")).unwrap();
    let config = config.replace("[\"m\"]", "[\"m\", \"n\"]") + "[models.n]\ninput = \"1\"\noutput = \"2\"\n";
    std::fs::write(path.join("gpt-cat.toml"), config).unwrap();
    let mut gateway = Gateway::start(path, |_| {});
    for body in [ASK, &ASK.replace("\"m\"", "\"n\"")] {
        let reply = gateway.answer(body);
        assert!(reply.contains("200 OK"), "{reply}");
    }
    wait_for_lines(path, 2);
    let key = json(path, &["key", "list", "first"])[0]["id"].to_string();
    for (filter, models) in [
        (vec!["--account", "up"], vec!["n", "m"]),
        (vec!["--account", "down"], vec![]),
        (vec!["--model", "n"], vec!["n"]),
        (vec!["--model", "m", "--key", &key], vec!["m"]),
        (vec!["--key", "99"], vec![]),
        (vec!["--user", "first", "--limit", "1"], vec!["n"]),
    ] {
        let found = json(path, &[vec!["usage"], filter.clone()].concat());
        let found: Vec<_> = found.as_array().unwrap().iter().map(|line| line["model"].as_str().unwrap()).collect();
        assert_eq!(found, models, "{filter:?}");
    }
    assert_eq!(gateway.signal("-TERM"), 0);
}

#[test]
fn an_audit_names_a_line_that_charges_another_amount_than_its_tokens_cost() {
    let folder = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::start(folder.path(), |_| {});
    assert!(gateway.answer(DEMO).contains("[DONE]"));
    assert_eq!(gateway.signal("-TERM"), 0);
    let database = rusqlite::Connection::open(folder.path().join("data/gpt-cat.db")).unwrap();
    database.execute("UPDATE lines SET charged_nano = charged_nano + 1", []).unwrap();
    database.execute("UPDATE days SET charged_nano = charged_nano + 1", []).unwrap();
    database.execute("UPDATE users SET balance_nano = balance_nano - 1", []).unwrap();
    let (text, good) = run(folder.path(), &["audit"]);
    assert!(!good && text.contains("but its tokens cost"), "{text}");
}

#[test]
fn a_debit_gets_the_money_of_a_user_whose_calls_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    configure(path, &endless_upstream());
    let mut gateway = Gateway::start(path, |_| {});
    json(path, &["user", "credit", "first", "9"]);
    let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"Go on."}]}"#;
    let mut streams: Vec<TcpStream> = (0..20).map(|_| gateway.ask(body)).collect();
    streams.iter_mut().for_each(|stream| stream.read_exact(&mut [0; 100]).unwrap());
    // All but what the streams hold, which is a few hundred tokens each.
    let left = json(path, &["user", "debit", "first", "9.5"])["balance"].as_str().unwrap().parse::<f64>().unwrap();
    assert!((0.0..=0.5).contains(&left), "{left}");
    streams.iter_mut().for_each(|stream| stream.read_exact(&mut [0; 100]).unwrap());
    drop(streams);
    assert_eq!(gateway.signal("-TERM"), 0);
    let (text, good) = run(path, &["audit"]);
    assert!(good, "{text}");
}

#[test]
fn one_worker_serves_ships_and_stops_like_several() {
    let folder = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::start(folder.path(), |command| {
        command.env("GPT_CAT_SERVER__WORKERS", "1");
    });
    let calls: Vec<TcpStream> = (0..8).map(|_| gateway.ask(DEMO)).collect();
    for mut call in calls {
        let mut reply = String::new();
        call.read_to_string(&mut reply).unwrap();
        assert!(reply.contains("[DONE]"), "{reply}");
    }
    wait_for_lines(folder.path(), 8);
    assert_eq!(gateway.signal("-TERM"), 0);
    assert!(run(folder.path(), &["audit"]).1);
}
