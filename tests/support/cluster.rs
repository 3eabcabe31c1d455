//! A throw-away PostgreSQL cluster, one for a test process, and a database of its own for each who asks.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Runs the server until its standard input ends, which it does when the test process does, however that ends.
const KEEPER: &str = r#"
folder=$(mktemp -d /tmp/gpt-cat-pg.XXXXXX) || exit 1
"$1/initdb" -D "$folder/data" -U test -A trust --no-sync --no-instructions >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
"$1/postgres" -D "$folder/data" -k "$folder" -p "$2" -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=300 >>"$folder/log" 2>&1 &
server=$!
cat >/dev/null
kill -INT $server
wait $server
rm -rf "$folder"
"#;

struct Cluster {
    bin: PathBuf,
    port: u16,
    _keeper: Child,
    _alive: ChildStdin,
}

/// The URL of a fresh database; `None`, said loudly, where there is no PostgreSQL. Under `CI` that is a failure.
pub fn database() -> Option<String> {
    if let Ok(url) = std::env::var("TEST_DATABASE_URL") {
        let (server, _) = url.rsplit_once('/').expect("TEST_DATABASE_URL ends in /<database>");
        let name = fresh_name();
        psql(Path::new(""), &url, &format!("CREATE DATABASE {name}"));
        return Some(format!("{server}/{name}"));
    }
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    let Some(cluster) = CLUSTER.get_or_init(Cluster::start) else {
        assert!(std::env::var_os("CI").is_none(), "no PostgreSQL found: install its server, or set TEST_DATABASE_URL");
        // Past the capture of the test's output.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no PostgreSQL found, so this test ran on SQLite alone");
        return None;
    };
    let server = format!("postgres://test@127.0.0.1:{}", cluster.port);
    let name = fresh_name();
    psql(&cluster.bin, &format!("{server}/postgres"), &format!("CREATE DATABASE {name}"));
    Some(format!("{server}/{name}"))
}

fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Runs a statement outside of the program under test; its output.
#[allow(dead_code, reason = "not every test that has a database looks into it")]
pub fn run(url: &str, sql: &str) -> String {
    psql(&bin().unwrap_or_default(), url, sql)
}

fn psql(bin: &Path, url: &str, sql: &str) -> String {
    let done =
        Command::new(bin.join("psql")).args([url, "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", sql]).output().unwrap();
    assert!(done.status.success(), "{sql}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

impl Cluster {
    fn start() -> Option<Cluster> {
        let bin = bin()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let root = rustix::process::geteuid().is_root();
        let mut keeper = if root {
            // initdb refuses root.
            let mut keeper = Command::new("setpriv");
            keeper.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "sh"]);
            keeper
        } else {
            Command::new("sh")
        };
        keeper.args(["-c", KEEPER, "keeper", bin.to_str().unwrap(), &port.to_string()]);
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).current_dir("/");
        let mut keeper = keeper.spawn().unwrap();
        let alive = keeper.stdin.take().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !is_ready(&bin, port) {
            assert!(keeper.try_wait().unwrap().is_none() && Instant::now() < until, "PostgreSQL did not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(Cluster { bin, port, _keeper: keeper, _alive: alive })
    }
}

fn is_ready(bin: &Path, port: u16) -> bool {
    let asked = Command::new(bin.join("pg_isready")).args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()]).status();
    asked.is_ok_and(|status| status.success())
}

/// The folder of the newest server's programs.
fn bin() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let packaged = versions.map(|version| version.path().join("bin")).max();
    let path = std::env::var_os("PATH").unwrap_or_default();
    packaged.into_iter().chain(std::env::split_paths(&path)).find(|bin| bin.join("initdb").exists())
}
