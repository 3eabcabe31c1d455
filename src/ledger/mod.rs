//! Holds and charges money; nothing is lost.
//!
//! A call is admitted with [`Ledger::open`], which holds money and writes OPEN; the [`OpenLine`] that it returns is
//! settled exactly once, by [`OpenLine::end`] or by its drop. The protocol is design.md §4b.

mod habit;
mod hold;
mod journal;
mod lease;
mod money;
mod prompt;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;

pub use hold::{Ask, Ended, OpenLine, SLICE_TOKENS, Slices};
use journal::{Batch, Journal};
use lease::{BROKE_MS, Purse, Taken};
pub use money::{RATIO_ONE, Tokens, cost_nano, output_affordable};

use crate::config::LowBalance;
use crate::error::Error;
use crate::store::{BootId, Line, LineCheck, PriceRow, Store, StoreError, random};

/// A live boot says so this often.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// Finished lines reach the store this often, or sooner when many wait.
const SHIP_EVERY: Duration = Duration::from_secs(1);
/// Lines of one transaction.
const SHIP_LINES: usize = 500;

/// The books of this node.
#[derive(Debug)]
pub struct Ledger {
    store: Store,
    journal: Arc<Journal>,
    boot: BootId,
    sequence: AtomicU64,
    purses: RwLock<HashMap<i64, Arc<Purse>>>,
    habits: RwLock<HashMap<String, Arc<habit::Habit>>>,
    on_low_balance: LowBalance,
    /// Lines that are open.
    open: AtomicU64,
    ended: Notify,
    shipping: tokio::sync::Mutex<()>,
    /// Set when the boot is no longer live in the store, or the node has stopped: no more holds.
    fenced: AtomicBool,
    /// Calls that end now were cut off by this node, not by their clients.
    cut_off: AtomicBool,
}

/// Why the ledger cannot start.
#[derive(Debug)]
pub enum StartError {
    Store(StoreError),
    Journal(io::Error),
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StartError::Store(error) => write!(f, "{error}"),
            StartError::Journal(error) => write!(f, "journal: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

impl From<StoreError> for StartError {
    fn from(error: StoreError) -> StartError {
        StartError::Store(error)
    }
}

impl From<io::Error> for StartError {
    fn from(error: io::Error) -> StartError {
        StartError::Journal(error)
    }
}

impl Ledger {
    /// Settles what earlier boots left in `journals`, then begins a boot of its own.
    pub async fn start(
        store: Store,
        journals: &Path,
        journal_bytes_max: u64,
        on_low_balance: LowBalance,
    ) -> Result<Arc<Ledger>, StartError> {
        std::fs::create_dir_all(journals)?;
        for dead in journal::dead_boots(journals)? {
            settle_dead(&store, dead).await?;
        }
        let boot = random();
        store.begin_boot(boot).await?;
        let journal = match Journal::create(journals, boot, journal_bytes_max) {
            Ok(journal) => journal,
            Err(error) => {
                store.close_boot(boot).await?; // it never held anything
                return Err(error.into());
            }
        };
        let ledger = Arc::new(Ledger {
            store,
            journal,
            boot,
            sequence: AtomicU64::new(0),
            purses: RwLock::default(),
            habits: RwLock::default(),
            on_low_balance,
            open: AtomicU64::new(0),
            ended: Notify::new(),
            shipping: tokio::sync::Mutex::default(),
            fenced: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
        });
        Ok(ledger)
    }

    /// Ships lines, says that the boot lives, and returns idle leases, until the returned future is dropped.
    pub async fn keep(self: Arc<Ledger>) {
        let mut ship = tokio::time::interval(SHIP_EVERY);
        let mut heartbeat = tokio::time::interval(HEARTBEAT_EVERY);
        ship.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ship.tick() => self.ship_logged().await,
                () = self.journal.lines_wait.notified() => self.ship_logged().await,
                _ = heartbeat.tick() => {
                    self.beat().await;
                    self.return_idle().await;
                }
            }
        }
    }

    /// Waits until every line has ended, at most `patience`; then ships, returns all leases and closes the boot.
    pub async fn stop(&self, patience: Duration) -> Result<(), StoreError> {
        let all_ended = async {
            while self.open_lines() > 0 {
                let ended = self.ended.notified();
                if self.open_lines() > 0 {
                    ended.await;
                }
            }
        };
        let settled = tokio::time::timeout(patience, all_ended).await.is_ok();
        self.fenced.store(true, Ordering::Release);
        while !self.journal.is_shipped() {
            self.ship().await?;
        }
        let settled = settled && !self.journal.is_damaged();
        if settled {
            self.store.close_boot(self.boot).await?;
        } else {
            tracing::warn!(open = self.open_lines(), "calls were still open; the next start settles them");
        }
        self.journal.close(settled);
        Ok(())
    }

    /// Says that calls which end from now on without an end of their own were cut off by this node.
    pub fn cut_off(&self) {
        self.cut_off.store(true, Ordering::Release);
    }

    /// Lines that are open.
    pub fn open_lines(&self) -> u64 {
        self.open.load(Ordering::Acquire)
    }

    /// Whether calls can be admitted, and what stands in the way.
    pub fn ready(&self) -> Result<(), &'static str> {
        if self.fenced.load(Ordering::Acquire) {
            return Err("this node is fenced off from the store");
        }
        if self.journal.is_failed() {
            return Err("the journal cannot be written");
        }
        Ok(())
    }

    /// What a user has: balance, what other boots hold, and what is unspent here.
    pub async fn balance_nano(&self, user_id: i64) -> Result<i64, StoreError> {
        let user = self.store.users(Some(user_id)).await?.pop().ok_or_else(|| StoreError::Absent("user".into()))?;
        let own = self.store.lease(self.boot, user_id).await?;
        let unspent = self.known_purse(user_id).map_or(0, |purse| purse.unspent());
        Ok(own.balance_nano + user.leased_nano - own.amount_nano + unspent)
    }

    /// A balance changed in the store: ask it again at the next need.
    pub fn balance_changed(&self, user_id: i64) {
        if let Some(purse) = self.known_purse(user_id) {
            purse.broke_until_ms.store(0, Ordering::Relaxed);
        }
    }

    fn known_purse(&self, user_id: i64) -> Option<Arc<Purse>> {
        self.purses.read().expect("no holder of this lock panics").get(&user_id).cloned()
    }

    fn purse(&self, user_id: i64) -> Arc<Purse> {
        if let Some(purse) = self.known_purse(user_id) {
            return purse;
        }
        let mut purses = self.purses.write().expect("no holder of this lock panics");
        purses.entry(user_id).or_insert_with(|| Arc::new(Purse::new(user_id))).clone()
    }

    fn habit(&self, model: &str) -> Arc<habit::Habit> {
        if let Some(habit) = self.habits.read().expect("no holder of this lock panics").get(model) {
            return habit.clone();
        }
        self.habits.write().expect("no holder of this lock panics").entry(model.to_owned()).or_default().clone()
    }

    /// Holds `amount`, asking the store where room is short; `None` when the money is not there.
    async fn cover(self: &Arc<Ledger>, purse: &Arc<Purse>, amount: i64) -> Result<Option<Taken>, Error> {
        if let Some(taken) = Taken::of(purse, amount) {
            return Ok(Some(taken));
        }
        if self.ready().is_err() {
            return Err(Error::NodeUnavailable { reason: "it cannot reach its books", retry_after_s: 5 });
        }
        // A task of its own: a client that leaves must not leave a grant unbooked, and what was taken for it goes back.
        let (ledger, purse) = (self.clone(), purse.clone());
        tokio::spawn(async move { ledger.refill_and_take(&purse, amount).await }).await.map_err(|_| Error::Internal)?
    }

    async fn refill_and_take(&self, purse: &Arc<Purse>, amount: i64) -> Result<Option<Taken>, Error> {
        let mut lease = purse.lease.lock().await;
        let unavailable = || Error::NodeUnavailable { reason: "the database does not answer", retry_after_s: 2 };
        if lease.unknown {
            let row = self.store.lease(self.boot, purse.user_id).await.map_err(|_| unavailable())?;
            purse.granted(row.granted_nano - lease.granted_nano);
            *lease = lease::LeaseState { version: row.version, granted_nano: row.granted_nano, unknown: false };
        }
        // What a grant brings others may take before this call does: only an empty balance means that there is no money.
        // Each round takes the amount or moves more of the balance into the room, so it ends.
        loop {
            if let Some(taken) = Taken::of(purse, amount) {
                return Ok(Some(taken));
            }
            if now_ms() < purse.broke_until_ms.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let need = amount.saturating_sub(purse.room()).max(1);
            match self.store.grant(self.boot, purse.user_id, need, purse.ahead_nano()).await {
                Ok(row) => {
                    purse.granted(row.granted_nano - lease.granted_nano);
                    lease.version = row.version;
                    lease.granted_nano = row.granted_nano;
                    if row.balance_nano == 0 {
                        let taken = Taken::of(purse, amount);
                        if taken.is_none() {
                            purse.broke_until_ms.store(now_ms() + BROKE_MS, Ordering::Relaxed);
                        }
                        return Ok(taken);
                    }
                }
                Err(StoreError::BootGone) => {
                    self.fence();
                    return Err(unavailable());
                }
                Err(error) => {
                    tracing::error!(%error, "a grant failed; its outcome is unknown until the lease is read again");
                    lease.unknown = true;
                    return Err(unavailable());
                }
            }
        }
    }

    async fn return_idle(&self) {
        let idle: Vec<Arc<Purse>> = {
            let purses = self.purses.read().expect("no holder of this lock panics");
            purses.values().filter(|purse| purse.is_idle()).cloned().collect()
        };
        for purse in idle {
            self.return_room(&purse).await;
        }
    }

    async fn return_room(&self, purse: &Purse) {
        let mut lease = purse.lease.lock().await;
        if lease.unknown {
            return; // the next refill reads the row first
        }
        let amount = purse.drain();
        if amount == 0 {
            return;
        }
        match self.store.give_back(self.boot, purse.user_id, amount, lease.version).await {
            Ok(row) => {
                lease.version = row.version;
                lease.granted_nano -= amount;
                debug_assert_eq!(lease.granted_nano, row.granted_nano);
            }
            Err(error) => {
                tracing::warn!(%error, "a return failed; its outcome is unknown until the lease is read again");
                // If it was not committed, the next read of the row books the amount as granted again.
                lease.granted_nano -= amount;
                lease.unknown = true;
            }
        }
    }

    async fn ship_logged(&self) {
        if let Err(error) = self.ship().await {
            tracing::error!(%error, "lines could not be shipped; they wait in the journal");
        }
    }

    /// Ships what waits, a batch at a time.
    async fn ship(&self) -> Result<(), StoreError> {
        let _one_at_a_time = self.shipping.lock().await;
        loop {
            let unreadable = |error: std::io::Error| StoreError::Database(format!("the journal: {error}"));
            let Batch { from, to, lines } = self.journal.unshipped(SHIP_LINES).map_err(unreadable)?;
            if to == from {
                return Ok(());
            }
            match self.store.ship(self.boot, from, to, lines).await {
                Ok(()) => self.journal.shipped(from, to),
                Err(StoreError::Moved) => {
                    let boot = self.store.boot(self.boot).await?.ok_or(StoreError::BootGone)?;
                    if boot.shipped > from {
                        // An earlier commit went through although nobody heard of it: the watermark knows how far.
                        self.journal.shipped(boot.shipped, boot.shipped);
                    } else {
                        self.rewind(boot.shipped).await?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn rewind(&self, watermark: u64) -> Result<(), StoreError> {
        let journal = self.journal.clone();
        let rewound = tokio::task::spawn_blocking(move || journal.rewind(watermark)).await;
        rewound
            .map_err(|error| StoreError::Database(error.to_string()))?
            .map_err(|error| StoreError::Database(error.to_string()))
    }

    async fn beat(&self) {
        let known = self.journal.watermark();
        match self.store.heartbeat(self.boot).await {
            Ok(shipped) if shipped < known => {
                let _nobody_ships = self.shipping.lock().await;
                if let Err(error) = self.rewind(shipped).await {
                    tracing::error!(%error, "lines could not be read again");
                }
            }
            Ok(shipped) => self.journal.confirmed(shipped),
            Err(StoreError::BootGone) => self.fence(),
            Err(error) => tracing::warn!(%error, "heartbeat failed"),
        }
    }

    fn fence(&self) {
        if !self.fenced.swap(true, Ordering::AcqRel) {
            tracing::error!("this boot is no longer live in the store: no more calls until restart");
        }
    }
}

/// Stores what a dead boot's journal says, gives its leases back and forgets it.
async fn settle_dead(store: &Store, dead: journal::Dead) -> Result<(), StartError> {
    let left = dead.read(|open, mark| {
        let (price, ratio) = (open.price, open.line.ratio_micro);
        let charged = mark.map_or(0, |mark| {
            cost_nano(&price, Tokens { input: mark.input, cached_input: 0, output: mark.output }, ratio)
        });
        Line::crashed(open, mark, charged)
    })?;
    for (file, offset) in &left.corrupt {
        tracing::error!(file = %file.display(), offset, "journal: a record does not read; what follows it was recovered");
    }
    let Some(boot) = store.boot(dead.boot).await? else {
        tracing::error!(folder = %dead.folder.display(), "journal of a boot that the database does not know: left alone");
        return Ok(());
    };
    let mut watermark = boot.shipped;
    let ended: Vec<Line> =
        left.ended.into_iter().filter(|(ordinal, _)| *ordinal > boot.shipped).map(|(_, line)| line).collect();
    let (ended_count, crashed_count) = (ended.len(), left.crashed.len());
    let lines: Vec<Line> = ended.into_iter().chain(left.crashed).collect();
    for batch in lines.chunks(SHIP_LINES) {
        let to = watermark + batch.len() as u64;
        store.ship(dead.boot, watermark, to, batch.to_vec()).await?;
        watermark = to;
    }
    store.close_boot(dead.boot).await?;
    if ended_count + crashed_count > 0 {
        tracing::warn!(ended = ended_count, crashed = crashed_count, "settled what an earlier process left behind");
    }
    dead.remove()?;
    Ok(())
}

/// Recomputes a line from its tokens, price version and ratio; says what does not agree.
pub static CHECK_LINE: LineCheck = check_line;

fn check_line(line: &Line, price: &PriceRow) -> Option<String> {
    use crate::store::Billed;
    let tokens = Tokens { input: line.input, cached_input: line.cached_input, output: line.output };
    let cost = cost_nano(price, tokens, line.ratio_micro);
    let wrong = match line.billed {
        Billed::Nothing => line.charged_nano != 0,
        Billed::Hold => line.charged_nano > line.hold_nano,
        Billed::Mark => line.charged_nano > cost,
        Billed::Usage | Billed::Count => line.charged_nano > cost || line.charged_nano + line.absorbed_nano < cost,
    };
    wrong.then(|| {
        format!(
            "line {}: charged {} and absorbed {}, but its tokens cost {cost} (billed by {})",
            line.request_id,
            line.charged_nano,
            line.absorbed_nano,
            line.billed.name()
        )
    })
}

/// Milliseconds of a clock that only goes forward.
fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Seconds of the same clock.
fn now_s() -> u64 {
    now_ms() / 1000
}
