//! The proxies that are compared, each started alone on its core in front of the same upstream.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::{self, Process};
use crate::{KEY, Outcome, drive};

/// How long nginx may take to listen, and the gateway to learn of its account (a second, by its promise).
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// What every proxy is started from.
pub struct Place<'a> {
    /// A folder of its own for configuration, data and logs.
    pub folder: &'a Path,
    pub upstream: SocketAddr,
    /// The cores that are the proxy's alone, as taskset has them.
    pub cores: Option<&'static str>,
    /// The gateway's.
    pub workers: usize,
    /// The gateway's executable.
    pub gateway: &'a Path,
    /// Further lines of the gateway's configuration.
    pub more: &'a str,
}

/// A way to start a proxy.
pub struct Kind {
    pub name: &'static str,
    start: fn(&Place) -> Outcome<(Process, SocketAddr)>,
}

/// In the order of the table's rows; the first is what the others are compared with.
pub static KINDS: [Kind; 3] = [
    Kind { name: "nginx", start: nginx },
    Kind { name: "bare hyper", start: bare },
    Kind { name: "gpt-cat", start: gateway },
];

/// A running proxy.
pub struct Proxy {
    pub address: SocketAddr,
    pub process: Process,
}

impl Kind {
    /// Starts it and waits until a request comes back through it.
    pub async fn start(&self, place: &Place<'_>) -> Outcome<Proxy> {
        let (process, address) = (self.start)(place)?;
        let patience = Instant::now() + READY_TIMEOUT;
        loop {
            match drive::ask_once(address).await {
                Ok(()) => return Ok(Proxy { address, process }),
                Err(error) if Instant::now() > patience => return Err(format!("{}: {error}", self.name).into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

fn nginx(place: &Place) -> Outcome<(Process, SocketAddr)> {
    // nginx cannot be asked which port it took; this one was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let folder = place.folder.join("nginx");
    fs::create_dir_all(&folder)?;
    let config = folder.join("nginx.conf");
    fs::write(&config, nginx_config(&folder, address, place.upstream))?;
    let mut command = process::pinned(Path::new("nginx"), place.cores);
    command.arg("-e").arg(folder.join("early.log")).arg("-p").arg(&folder).arg("-c").arg(&config);
    let log = folder.join("stderr.log");
    let process = process::start(command, &log)?;
    let patience = Instant::now() + READY_TIMEOUT;
    while TcpStream::connect(address).is_err() {
        if Instant::now() > patience {
            return Err(format!("nginx does not listen; its errors:\n{}", fs::read_to_string(&log)?).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((process, address))
}

fn nginx_config(folder: &Path, address: SocketAddr, upstream: SocketAddr) -> String {
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("    {kind}_temp_path {}/{kind};\n", folder.display()))
        .concat();
    format!(
        "daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 19900; }}
http {{
{temporary}    access_log off;
    keepalive_requests 1000000000;
    client_body_buffer_size 1m;
    upstream mock {{ server {upstream}; keepalive 256; keepalive_requests 1000000000; }}
    server {{
        listen {address};
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_buffering off;
        }}
    }}
}}
",
        folder = folder.display()
    )
}

fn bare(place: &Place) -> Outcome<(Process, SocketAddr)> {
    let mut command = process::pinned(&std::env::current_exe()?, place.cores);
    command.arg("bare").arg(place.upstream.to_string());
    process::start_listening(command, &place.folder.join("bare.log"))
}

fn gateway(place: &Place) -> Outcome<(Process, SocketAddr)> {
    let folder = place.folder.join("gateway");
    // A later start would not be a first one, and would not take the key.
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let config = folder.join("gpt-cat.toml");
    fs::write(&config, gateway_config(&folder, place) + place.more)?;
    let mut command = process::pinned(place.gateway, place.cores);
    set_apart(&mut command, &folder);
    command.arg("serve").arg("--config").arg(&config).env("GPT_CAT_FIRST_KEY", KEY);
    let started = process::start_listening(command, &folder.join("stderr.log"))?;
    add_account(place.gateway, &config, &folder)?;
    Ok(started)
}

/// The endpoint is the built-in one at another address, so that none is left which points out of this machine.
fn gateway_config(folder: &Path, place: &Place) -> String {
    format!(
        "database_url = \"sqlite:{folder}/gpt-cat.db\"
[server]
http = \"127.0.0.1:0\"
workers = {workers}
[admin]
listen = \"off\"
[ledger]
first_balance = \"1000000.00\"
[endpoints.openai]
dialect = \"openai\"
base_url = \"http://{upstream}/v1\"
models = [\"gpt-4o\", \"mapped\"]
mapping = {{ mapped = \"gpt-4o\" }}
[models.\"gpt-4o\"]
input = \"2.50\"
output = \"10.00\"
[models.mapped]
input = \"2.50\"
output = \"10.00\"
",
        folder = folder.display(),
        workers = place.workers,
        upstream = place.upstream,
    )
}

/// Keeps the gateway to its folder and its file: whoever runs the bench may have set up one of their own.
fn set_apart(command: &mut Command, folder: &Path) {
    command.current_dir(folder);
    for name in ["OPENAI_API_KEY", "DASHSCOPE_API_KEY", "DATABASE_URL", "HTTP_ADDRESS", "HTTP_PORT"] {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("GPT_CAT_")) {
            command.env_remove(name);
        }
    }
}

fn add_account(program: &Path, config: &Path, folder: &Path) -> Outcome<()> {
    let mut command = Command::new(program);
    command.args(["account", "add", "--endpoint", "openai", "--name", "mock", "--key-env", "MOCK_KEY"]);
    command.args(["--limit", "20000", "--config"]).arg(config).env("MOCK_KEY", "sk-mock");
    set_apart(&mut command, folder);
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("gpt-cat account add: {}", String::from_utf8_lossy(&output.stderr)).into())
}
