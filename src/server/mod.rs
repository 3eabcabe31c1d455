//! Accepts sockets, walks each request through the stages, and stops in order.

mod accept;
mod billing;
mod body;
mod chat;
mod compress;
mod guard;
mod in_chat;
mod journey;
mod models;
mod pass;
mod receive;
mod relay;
mod reply;
mod route;
mod stop;
mod templates;
mod tls;
mod usage;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::watch;

use accept::Stage;
use stop::Stop;

use crate::catalog::Catalog;
use crate::config::{self, Config, CountPrompt};
use crate::error::Error;
use crate::ledger::{self, Counting, Ledger};
use crate::meter::Vocabulary;
use crate::pool::Pool;
use crate::store::{BootId, Change, MasterKey, Notice, Notices, Store, StoreError, random};
use crate::telemetry::{Metrics, RequestIds};
use crate::upstream::{self, Client, Upstream};
use crate::users::Users;

/// Changes that an operator made are seen this often.
const CHANGES_EVERY: Duration = Duration::from_millis(400);
/// The same where the database tells of changes by itself.
const CHANGES_ASKED_EVERY: Duration = Duration::from_secs(1);
/// Who asks for money where the database does not say who.
const NOBODY: BootId = [0; 16];
/// Old changes are forgotten after so many new ones.
const CHANGES_FORGOTTEN_EACH: i64 = 1000;
/// What streams have to send their last event, once they were told to end.
const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// Idle upstream connections are looked through this often, in [`CHANGES_EVERY`].
const SWEEP_TICKS: u64 = 25;
/// What the ledger may take to settle calls that were cut off.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// Everything that requests share.
pub struct Gateway {
    snapshot: ArcSwap<Snapshot>,
    store: Store,
    users: Users,
    pool: Arc<Pool>,
    upstream: Upstream,
    ledger: Arc<Ledger>,
    bodies: Arc<body::Bodies>,
    request_ids: RequestIds,
    draining: AtomicBool,
    /// Tells open streams that the patience with them is over.
    stop: Arc<Stop>,
}

/// What changes only as a whole; a request keeps the one that it began with.
#[derive(Debug)]
pub struct Snapshot {
    pub config: Config,
    pub catalog: Catalog,
}

impl Gateway {
    /// Whether new calls are taken.
    fn ready(&self) -> Result<(), Error> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Error::Draining);
        }
        self.ledger.ready().map_err(|reason| Error::NodeUnavailable { reason, retry_after_s: 5 })
    }
}

/// The doors of a server: bound before anything else, so that a port in use costs nothing.
pub struct Doors {
    http: Option<TcpListener>,
    https: Option<(TcpListener, tls::Certificate)>,
}

impl Doors {
    /// Binds the configured addresses and reads the certificate, where there is one.
    pub async fn open(config: &config::Server) -> Result<Doors, StartError> {
        let certificate = tls::Certificate::load(&config.tls_cert, &config.tls_key)?;
        let http = match config.http {
            Some(address) => Some(accept::bind(address).await?),
            None => None,
        };
        let https = match certificate.zip(config.https) {
            Some((certificate, address)) => Some((accept::bind(address).await?, certificate)),
            None => None,
        };
        if http.is_none() && https.is_none() {
            return Err("server.http is off, and HTTPS has no certificate: there is nowhere to listen".into());
        }
        Ok(Doors { http, https })
    }

    /// Where it listens for plain HTTP.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Where it listens for HTTPS.
    pub fn https_address(&self) -> Option<SocketAddr> {
        self.https.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }
}

/// A server that is ready to serve.
pub struct Server {
    gateway: Arc<Gateway>,
    master: MasterKey,
    doors: Doors,
    changes: i64,
    metrics: Arc<Metrics>,
}

/// Why a server does not start; a sentence for the operator.
pub type StartError = Box<dyn std::error::Error + Send + Sync>;

impl Server {
    /// Settles what earlier processes left, and reads what the store has.
    pub async fn start(config: Config, store: Store, master: MasterKey, doors: Doors) -> Result<Server, StartError> {
        let journals = config.data_dir.join(ledger::JOURNALS);
        let metrics = Arc::new(Metrics::default());
        let counting = Counting {
            always: config.meter.count_prompt == CountPrompt::Always,
            cross_check_each: config.meter.cross_check_each,
            metrics: metrics.clone(),
        };
        let ledger = Ledger::start(store.clone(), &journals, &config.ledger, counting).await?;
        let changes = store.change_sequence().await?; // before anything is read, so that no change is missed
        let catalog = Catalog::load(&config, &store).await?;
        warm(&catalog).await;
        let pool = Pool::new(config.pool.clone());
        pool.reload(&store, &master, &keyless(&config)).await?;
        let client = Client::new(Duration::from_secs(config.upstream.connect_timeout_s))?;
        let gateway = Arc::new(Gateway {
            store: store.clone(),
            users: Users::load(&store).await?,
            upstream: Upstream::new(client, pool.clone(), config.upstream.clone(), config.retry.clone()),
            pool,
            ledger,
            bodies: body::Bodies::of_machine(),
            request_ids: RequestIds::new(random()),
            draining: AtomicBool::new(false),
            stop: Arc::default(),
            snapshot: ArcSwap::from_pointee(Snapshot { config, catalog }),
        });
        Ok(Server { gateway, master, doors, changes, metrics })
    }

    /// What this node counts of itself.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Serves until `stop` is ready; then lets calls finish within the configured time, settles, and returns.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), StoreError> {
        let Server { gateway, master, doors: Doors { http, https }, changes, .. } = self;
        let config = gateway.snapshot.load_full();
        let (stages, stage) = watch::channel(Stage::Serving);
        let bounds = accept::Bounds::new(&config.config.server);
        let door = accept::Door { gateway: gateway.clone(), bounds, stage };

        let mut tasks = tokio::task::JoinSet::new();
        if let Some(listener) = http {
            tasks.spawn(accept::accept(listener, None, door.clone()));
        }
        if let Some((listener, certificate)) = https {
            tasks.spawn(certificate.clone().keep());
            tasks.spawn(accept::accept(listener, Some(certificate), door.clone()));
        }
        let books = tokio::spawn(gateway.ledger.clone().keep());
        let watching = tokio::spawn(watch_changes(gateway.clone(), gateway.store.clone(), master, changes));
        let pruning = tokio::spawn(ledger::prune(gateway.store.clone(), config.config.ledger.lines_kept_days));
        stop.await;

        let patience = Duration::from_secs(config.config.server.drain_s);
        tracing::info!(open = gateway.ledger.open_lines(), ?patience, "draining");
        tasks.shutdown().await; // the doors close
        drop(door);
        gateway.draining.store(true, Ordering::Release);
        stages.send_replace(Stage::Draining);
        // Each connection has a receiver for as long as it lives.
        if tokio::time::timeout(patience, stages.closed()).await.is_err() {
            gateway.ledger.cut_off();
            gateway.stop.tell(); // an error event for every stream that is open
            let _ = tokio::time::timeout(FAREWELL_MAX, stages.closed()).await;
            stages.send_replace(Stage::Aborting);
        }
        gateway.stop.tell(); // answers that are read on for nobody
        let stopped = gateway.ledger.stop(SETTLE_MAX).await;
        books.abort();
        watching.abort();
        pruning.abort();
        stopped
    }
}

/// What a request is told that needs the database.
fn unanswered(error: StoreError) -> Error {
    tracing::error!(%error, "the database does not answer a request");
    Error::NodeUnavailable { reason: "the database does not answer", retry_after_s: 2 }
}

fn keyless(config: &Config) -> Vec<String> {
    let keyless = config.endpoints.values().filter(|endpoint| upstream::is_keyless(&endpoint.dialect));
    keyless.map(|endpoint| endpoint.name.clone()).collect()
}

/// Loads the vocabularies before the first request waits for them.
async fn warm(catalog: &Catalog) {
    let mut vocabularies: Vec<Vocabulary> = catalog.iter().map(|model| model.vocabulary).collect();
    vocabularies.dedup();
    let loading = tokio::task::spawn_blocking(move || vocabularies.into_iter().for_each(Vocabulary::warm));
    if loading.await.is_err() {
        tracing::error!("a vocabulary could not be loaded");
    }
}

/// Applies what operators change beside the server, until it is aborted.
async fn watch_changes(gateway: Arc<Gateway>, store: Store, master: MasterKey, mut sequence: i64) {
    let mut told = store.listen();
    // Where the database tells of changes, asking is for those that it could not tell.
    let every = if told.is_some() { CHANGES_ASKED_EVERY } else { CHANGES_EVERY };
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for tick in 1u64.. {
        tokio::select! {
            _ = ticks.tick() => {}
            notice = hear(&mut told) => if let Notice::Short { user_id, asking } = notice {
                let ledger = gateway.ledger.clone();
                tokio::spawn(async move { ledger.asked_back(user_id, asking).await });
                continue;
            }
        }
        if tick.is_multiple_of(SWEEP_TICKS) {
            gateway.upstream.sweep();
        }
        match apply_changes(&gateway, &store, &master, sequence).await {
            Ok(newest) => sequence = newest,
            Err(error) => tracing::error!(%error, "changes could not be read; they are tried again"),
        }
    }
}

async fn apply_changes(gateway: &Gateway, store: &Store, master: &MasterKey, sequence: i64) -> Result<i64, StoreError> {
    let (newest, changes) = store.changes_since(sequence).await?;
    for change in &changes {
        match change {
            Change::Account => {
                let keyless = keyless(&gateway.snapshot.load().config);
                gateway.pool.reload(store, master, &keyless).await?;
            }
            Change::Balance(user_id) => gateway.ledger.balance_changed(*user_id),
            Change::Short(user_id) => gateway.ledger.asked_back(*user_id, NOBODY).await,
            change => gateway.users.apply(store, change).await?,
        }
    }
    // Once in a while, by whichever server meets the number.
    if !changes.is_empty() && newest % CHANGES_FORGOTTEN_EACH < changes.len() as i64 {
        store.forget_changes(newest).await?;
    }
    Ok(newest)
}

/// What the database tells; never ready where it does not.
async fn hear(told: &mut Option<Notices>) -> Notice {
    match told {
        Some(notices) => match notices.recv().await {
            Some(notice) => notice,
            None => std::future::pending().await, // its task has ended with the runtime
        },
        None => std::future::pending().await,
    }
}
