//! Arguments → configuration → runtime → run → exit code.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use gpt_cat::admin::cli::{Cli, Command, ConfigCommand, PricesCommand};
use gpt_cat::admin::desk::{Desk, import_prices};
use gpt_cat::config::{Config, Files, LogFormat};
use gpt_cat::preprocess::template;
use gpt_cat::server::{Doors, Server};
use gpt_cat::store::{MasterKey, Store};
use gpt_cat::{admin, ledger, telemetry, upstream};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// A request makes some sixty allocations, and nodes run for months: see ARCHITECTURE.md, Measurements.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Read when `--config` and `GPT_CAT_CONFIG` name no other.
const CONFIG_FILE: &str = "gpt-cat.toml";
/// Read beside it when `--prices` and `GPT_CAT_PRICES` name no other.
const PRICES_FILE: &str = "prices.toml";

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpt-cat: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<bool, Failure> {
    let command = cli.command.unwrap_or(Command::Serve);
    let prices = cli.prices.clone().unwrap_or_else(|| beside(cli.config.as_deref()).join(PRICES_FILE));
    if let Command::Prices(PricesCommand::Import { list, models }) = &command {
        import_prices(list, models, &prices, cli.json)?;
        return Ok(true);
    }
    let config = read_config(cli.config.as_deref(), &prices, cli.prices.is_some())?;
    for warning in &config.warnings {
        eprintln!("gpt-cat: warning: {warning}");
    }
    if let Command::Config(ConfigCommand::Check) = command {
        print("the configuration is good\n")?;
        return Ok(true);
    }
    std::fs::create_dir_all(&config.data_dir).map_err(|error| format!("{}: {error}", config.data_dir.display()))?;
    let master = std::env::var("GPT_CAT_MASTER_KEY").ok();
    let master = MasterKey::load(master.as_deref(), &config.data_dir.join("master.key"))?;
    if let Command::Serve = command {
        let workers = config.server.workers;
        let mut runtime = match workers {
            1 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        if workers > 1 {
            runtime.worker_threads(workers);
        }
        return runtime.enable_all().build()?.block_on(serve(config, master));
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let store = Store::open(&config.database_url).await?;
        let (check_line, line_cost) = (ledger::CHECK_LINE, ledger::LINE_COST);
        let (template_names, template_messages) = (template::is_name, template::checked);
        let (config, store, master, json) = (&config, &store, &master, cli.json);
        let refused_lines = ledger::refused_lines(&config.data_dir);
        let desk = Desk {
            config,
            store,
            master,
            check_line,
            line_cost,
            refused_lines,
            template_names,
            template_messages,
            json,
        };
        desk.run(command).await
    })
}

async fn serve(config: Config, master: MasterKey) -> Result<bool, Failure> {
    let store = Store::open(&config.database_url).await?;
    let json = config.log.format == LogFormat::Json;
    let _log = telemetry::start(&config.log.level, json, config.log.file.as_deref())?;
    let mut stop = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let api = match config.admin.listen {
        Some(address) => {
            Some(TcpListener::bind(address).await.map_err(|error| format!("admin.listen {address}: {error}"))?)
        }
        None => None,
    };
    let doors = Doors::open(&config.server).await?;
    let urls = urls(&doors);
    let welcome = admin::first_start(&config, &store, &master, |name| std::env::var(name).ok()).await?;
    if let Some(welcome) = welcome {
        // At once: the secrets are stored as hashes only, so nothing may come between.
        print(&welcome.text(&urls[0]))?;
    }
    let server = Server::start(config.clone(), store.clone(), master, doors).await?;
    if let Some(address) = api.as_ref().and_then(|api| api.local_addr().ok()) {
        print(&format!("admin API on http://{address}\n"))?;
    }
    for url in &urls {
        print(&format!("listening on {url}\n"))?;
    }

    let metrics = server.metrics();
    let api = api.map(|listener| tokio::spawn(admin::serve_api(listener, config, store, ledger::CHECK_LINE, metrics)));
    let [terminate, interrupt] = &mut stop;
    server
        .run(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await?;
    if let Some(api) = api {
        api.abort();
    }
    Ok(true)
}

/// Where to call, at least one; an address of all interfaces is shown as the loopback.
fn urls(doors: &Doors) -> Vec<String> {
    let http = doors.http_address().map(|address| ("http", address));
    let https = doors.https_address().map(|address| ("https", address));
    let shown = |(scheme, mut address): (&str, SocketAddr)| {
        if address.ip().is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        format!("{scheme}://{address}")
    };
    http.into_iter().chain(https).map(shown).collect()
}

fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The folder of the configuration file.
fn beside(config: Option<&Path>) -> PathBuf {
    config.and_then(Path::parent).unwrap_or(Path::new("")).to_owned()
}

fn read_config(given: Option<&Path>, prices: &Path, prices_given: bool) -> Result<Config, Failure> {
    let path = given.unwrap_or(Path::new(CONFIG_FILE));
    let config = read_file(path, given.is_some())?;
    let prices = read_file(prices, prices_given)?;
    let files = Files { config: config.as_deref(), prices: prices.as_deref() };
    let shown = if config.is_some() { format!("{}:\n", path.display()) } else { String::new() };
    Config::load(files, std::env::vars(), &upstream::dialects()).map_err(|errors| format!("{shown}{errors}").into())
}

/// A file's text; `None` where there is none, and nobody asked for it.
fn read_file(path: &Path, asked_for: bool) -> Result<Option<String>, Failure> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if !asked_for && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display()).into()),
    }
}
