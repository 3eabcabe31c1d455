//! A throw-away PostgreSQL cluster, one for a test process, and a database of its own for each who asks; further clusters
//! for those who stop theirs, or want TLS.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Runs the server until its standard input ends, which it does when the test process does, however that ends. `stop` on
/// a line of it stops the server as a crash does, `start` starts it again.
const KEEPER: &str = r#"
bin=$1 port=$2
folder=$(mktemp -d /tmp/gpt-cat-pg.XXXXXX) || exit 1
"$bin/initdb" -D "$folder/data" -U test -A trust --no-sync --no-instructions >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
tls=
if [ -n "$SERVER_CERT" ]; then
    (umask 077; printf '%s' "$SERVER_KEY" >"$folder/key"; printf '%s' "$SERVER_CERT" >"$folder/cert")
    tls="-c ssl=on -c ssl_cert_file=$folder/cert -c ssl_key_file=$folder/key"
fi
run() {
    "$bin/postgres" -D "$folder/data" -k "$folder" -p "$port" -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=300 $tls $SETTINGS >>"$folder/log" 2>&1 &
    server=$!
}
run
while read -r word; do
    case $word in
        stop) kill -QUIT $server; wait $server ;;
        start) run ;;
    esac
done
kill -INT $server
wait $server
rm -rf "$folder"
"#;

/// A server that runs for as long as this lives.
pub struct Cluster {
    bin: PathBuf,
    port: u16,
    _keeper: Child,
    orders: ChildStdin,
}

/// A server's certificate and its key, as PEM.
pub struct Certificate {
    pub cert: String,
    pub key: String,
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
    Some(CLUSTER.get_or_init(|| Cluster::start(None)).as_ref()?.database())
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

#[allow(dead_code, reason = "not every test stops its server")]
impl Cluster {
    /// Starts a server of its own; `None`, said loudly, where there is none to start. Under `CI` that is a failure.
    pub fn start(certificate: Option<&Certificate>) -> Option<Cluster> {
        Cluster::start_with(certificate, "")
    }

    /// The same with further settings, as arguments of the server.
    pub fn start_with(certificate: Option<&Certificate>, settings: &str) -> Option<Cluster> {
        let Some(bin) = bin() else {
            let elsewhere = std::env::var_os("TEST_DATABASE_URL").is_some();
            assert!(
                elsewhere || std::env::var_os("CI").is_none(),
                "no PostgreSQL found: install its server, or set TEST_DATABASE_URL"
            );
            // Past the capture of the test's output.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no server of PostgreSQL found that this test could start");
            return None;
        };
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
        if let Some(Certificate { cert, key }) = certificate {
            keeper.env("SERVER_CERT", cert).env("SERVER_KEY", key);
        }
        keeper.env("SETTINGS", settings);
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).current_dir("/");
        let mut keeper = keeper.spawn().unwrap();
        let orders = keeper.stdin.take().unwrap();
        let cluster = Cluster { bin, port, _keeper: keeper, orders };
        cluster.until_ready(true);
        Some(cluster)
    }

    /// The URL of a fresh database on it.
    pub fn database(&self) -> String {
        let server = format!("postgres://test@127.0.0.1:{}", self.port);
        let name = fresh_name();
        psql(&self.bin, &format!("{server}/postgres"), &format!("CREATE DATABASE {name}"));
        format!("{server}/{name}")
    }

    /// Stops the server at once: no checkpoint, no farewell to its clients.
    pub fn stop(&mut self) {
        writeln!(self.orders, "stop").unwrap();
        self.until_ready(false);
    }

    /// Starts the server again, which recovers first.
    pub fn start_again(&mut self) {
        writeln!(self.orders, "start").unwrap();
        self.until_ready(true);
    }

    fn until_ready(&self, ready: bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while is_ready(&self.bin, self.port) != ready {
            assert!(Instant::now() < until, "PostgreSQL did not start, or did not stop");
            std::thread::sleep(Duration::from_millis(50));
        }
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
