//! Holds and charges money; nothing is lost.
//!
//! A call is admitted with [`Ledger::open`], which holds money and writes OPEN; the [`OpenLine`] that it returns is
//! settled exactly once, by [`OpenLine::end`] or by its drop. The protocol is design.md §4b.

mod boot;
mod habit;
mod hold;
mod journal;
mod lease;
mod money;
mod prompt;
mod quota;
mod refused;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{self, Arc, Mutex, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::time::{ClockId, clock_gettime};

use boot::{Boot, SHIP_LINES};
pub use hold::{Ask, Ended, OpenLine, SLICE_TOKENS, Slices};
pub use money::{RATIO_ONE, Tokens, cost_nano};

use crate::config::{self, LowBalance, Price};
use crate::failpoint;
use crate::store::{Billed, BootId, Line, LineCheck, LineCost, Store, StoreError, day_of};
use crate::telemetry::Metrics;

/// A node that was fenced off tries this often to begin again.
const BEGIN_AGAIN: Duration = Duration::from_secs(1);
/// Calls of a boot that was fenced off end with their slice, or when they are over: at most this long.
const RETIRE_MAX: Duration = Duration::from_secs(3700);

/// Old lines are forgotten this often, so many at a time, with a pause between.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
const PRUNE_LINES: u32 = 2000;
const PRUNE_PAUSE: Duration = Duration::from_millis(100);

/// The books of this node.
#[derive(Debug)]
pub struct Ledger {
    store: Store,
    journals: PathBuf,
    journal_bytes_max: u64,
    clocks: Clocks,
    limited: Arc<quota::Limited>,
    boot: ArcSwap<Boot>,
    /// Boots that were fenced off and have calls or lines left.
    retired: Mutex<Vec<Arc<Boot>>>,
    habits: RwLock<HashMap<String, Arc<habit::Habit>>>,
    on_low_balance: LowBalance,
    counting: Counting,
    /// The node stops: it begins no other boot.
    stopped: AtomicBool,
    /// Calls that end now were cut off by this node, not by their clients.
    cut_off: AtomicBool,
}

/// Lines that the database refused, set aside on this machine below its data folder.
pub fn refused_lines(data_dir: &Path) -> usize {
    refused::count(&data_dir.join(JOURNALS))
}

/// When prompts are counted that nothing needs, and who is told what came of it.
#[derive(Debug, Default)]
pub struct Counting {
    pub always: bool,
    /// Of so many calls one is counted; 0: none.
    pub cross_check_each: u64,
    pub metrics: Arc<Metrics>,
}

impl Counting {
    /// Whether this call is counted whatever its provider says.
    fn takes(&self, sequence: u64) -> bool {
        self.always || (self.cross_check_each > 0 && sequence.is_multiple_of(self.cross_check_each))
    }
}

/// How long a node is believed, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clocks {
    heartbeat_ms: u64,
    silent_ms: u64,
    fence_ms: u64,
    forfeit_ms: u64,
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

/// The folder of all journals, below the data folder.
pub const JOURNALS: &str = "journal";

impl Ledger {
    /// Settles what earlier boots left in `journals`, then begins a boot of its own.
    pub async fn start(
        store: Store,
        journals: &Path,
        bounds: &config::Ledger,
        counting: Counting,
    ) -> Result<Arc<Ledger>, StartError> {
        std::fs::create_dir_all(journals)?;
        for dead in journal::dead_boots(journals)? {
            settle_dead(&store, journals, dead).await?;
        }
        refused::tell(journals);
        let clocks = Clocks {
            heartbeat_ms: bounds.heartbeat_ms(),
            silent_ms: bounds.silent_ms(),
            fence_ms: bounds.fence_s * 1000,
            forfeit_ms: bounds.forfeit_s * 1000,
        };
        let limited = Arc::<quota::Limited>::default();
        let boot = Boot::begin(&store, journals, bounds.journal_bytes_max, clocks, limited.clone()).await?;
        Ok(Arc::new(Ledger {
            store,
            journals: journals.to_owned(),
            journal_bytes_max: bounds.journal_bytes_max,
            clocks,
            limited,
            boot: ArcSwap::new(boot),
            retired: Mutex::default(),
            habits: RwLock::default(),
            on_low_balance: bounds.on_low_balance,
            counting,
            stopped: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
        }))
    }

    /// Keeps the boot alive, and begins another when it was fenced off, until the ledger is stopped.
    pub async fn keep(self: Arc<Ledger>) {
        loop {
            let boot = self.boot.load_full();
            boot.keep().await;
            boot.fence();
            if self.stopped.load(Ordering::Acquire) {
                return;
            }
            tracing::error!("this node was fenced off from the store; it begins again");
            loop {
                let (journal_bytes_max, limited) = (self.journal_bytes_max, self.limited.clone());
                match Boot::begin(&self.store, &self.journals, journal_bytes_max, self.clocks, limited).await {
                    Ok(next) => {
                        self.boot.store(next.clone());
                        if self.stopped.load(Ordering::Acquire) {
                            drop(next.retire(Duration::ZERO).await);
                            return;
                        }
                        break;
                    }
                    Err(error) => tracing::warn!(%error, "no other boot can begin yet"),
                }
                tokio::time::sleep(BEGIN_AGAIN).await;
                if self.stopped.load(Ordering::Acquire) {
                    return;
                }
            }
            self.retired_boots().push(boot.clone());
            tokio::spawn(self.clone().retire(boot));
        }
    }

    /// Ends a boot that was fenced off, however long its calls and the database take.
    async fn retire(self: Arc<Ledger>, boot: Arc<Boot>) {
        while let Err(error) = boot.retire(RETIRE_MAX).await {
            tracing::warn!(%error, "a boot that was fenced off cannot be closed yet");
            tokio::time::sleep(BEGIN_AGAIN).await;
        }
        self.retired_boots().retain(|retired| !Arc::ptr_eq(retired, &boot));
    }

    fn retired_boots(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Boot>>> {
        self.retired.lock().expect("no holder of this lock panics")
    }

    /// Waits until every line has ended, at most `patience`; then ships, returns all leases and closes the boot.
    pub async fn stop(&self, patience: Duration) -> Result<(), StoreError> {
        self.stopped.store(true, Ordering::Release);
        let retired = std::mem::take(&mut *self.retired_boots());
        for boot in retired {
            if let Err(error) = boot.retire(patience).await {
                tracing::warn!(%error, "a boot that was fenced off is left to the next start");
            }
        }
        self.boot.load().retire(patience).await
    }

    /// Says that calls which end from now on without an end of their own were cut off by this node.
    pub fn cut_off(&self) {
        self.cut_off.store(true, Ordering::Release);
    }

    /// Lines that are open.
    pub fn open_lines(&self) -> u64 {
        self.boot.load().open_lines() + self.retired_boots().iter().map(|boot| boot.open_lines()).sum::<u64>()
    }

    /// Whether calls can be admitted, and what stands in the way.
    pub fn ready(&self) -> Result<(), &'static str> {
        let boot = self.boot.load();
        if boot.is_fenced() {
            return Err("this node is fenced off from the store");
        }
        if boot.journal.is_failed() {
            return Err("the journal cannot be written");
        }
        Ok(())
    }

    /// What a user has: balance, what other boots hold, and what is unspent here.
    pub async fn balance_nano(&self, user_id: i64) -> Result<i64, StoreError> {
        let boot = self.boot.load_full();
        let elsewhere = self.store.unspent_elsewhere(boot.id, user_id).await?;
        Ok(elsewhere + boot.known_purse(user_id).map_or(0, |purse| purse.unspent()))
    }

    /// A balance changed in the store: ask it again at the next need.
    pub fn balance_changed(&self, user_id: i64) {
        if let Some(purse) = self.boot.load().known_purse(user_id) {
            purse.broke_until_ms.store(0, Ordering::Relaxed);
        }
    }

    /// Another node, or an operator, is short of this user's money: what is free goes back at once.
    pub async fn asked_back(&self, user_id: i64, asking: BootId) {
        let retired: Vec<Arc<Boot>> = self.retired_boots().clone();
        for boot in retired.into_iter().chain([self.boot.load_full()]) {
            boot.asked_back(user_id, asking).await;
        }
    }

    fn habit(&self, model: &str) -> Arc<habit::Habit> {
        if let Some(habit) = self.habits.read().expect("no holder of this lock panics").get(model) {
            return habit.clone();
        }
        self.habits.write().expect("no holder of this lock panics").entry(model.to_owned()).or_default().clone()
    }
}

/// Stores what a dead boot's journal says, gives its leases back and forgets it.
async fn settle_dead(store: &Store, journals: &Path, dead: journal::Dead) -> Result<(), StartError> {
    let prices = store.prices().await?;
    let left = dead.read(|open, mark| {
        // A line whose price is lost is charged nothing; the database refuses it, too.
        let Some(price) = prices.get(&open.price_version) else { return Line::crashed(open, mark, |_| 0) };
        let mut line = Line::crashed(open, mark, |line| cost_nano(price, Tokens::of_line(line), line.ratio_micro));
        line.tier = price.rates_for(line.input).0 as u32;
        line
    })?;
    for (file, offset) in &left.corrupt {
        tracing::error!(file = %file.display(), offset, "journal: a record does not read; what follows it was recovered");
    }
    let Some(boot) = store.boot(dead.boot).await? else {
        tracing::error!(folder = %dead.folder.display(), "journal of a boot that the database does not know: left alone");
        return Ok(());
    };
    failpoint::at("replay.read");
    let mut watermark = boot.shipped;
    let (ended, mut behind): (Vec<_>, Vec<_>) =
        left.ended.into_iter().partition(|(ordinal, _)| *ordinal > boot.shipped);
    // Lines that were passed over lie behind the watermark. Those that are stored are told by their number; those that may
    // have been forgotten since are not sent again.
    let pruned_before = if left.passed_over { store.pruned_before().await? } else { i64::MAX };
    behind.retain(|(_, line)| day_of(line.started_ms) >= pruned_before);
    let (ended_count, crashed_count) = (ended.len(), left.crashed.len());
    let lines: Vec<Line> = ended
        .into_iter()
        .map(|(_, line)| line)
        .chain(left.crashed)
        .chain(behind.into_iter().map(|(_, line)| line))
        .collect();
    for batch in lines.chunks(SHIP_LINES) {
        let to = watermark + batch.len() as u64;
        match store.ship(dead.boot, watermark, to, batch.to_vec()).await {
            Err(StoreError::Dangling) => {
                let good = refused::set_aside(store, journals, dead.boot, batch.to_vec()).await?;
                store.ship(dead.boot, watermark, to, good).await?;
            }
            shipped => shipped?,
        }
        watermark = to;
        failpoint::at("replay.shipped");
    }
    store.close_boot(dead.boot).await?;
    failpoint::at("replay.closed");
    if ended_count + crashed_count > 0 {
        tracing::warn!(ended = ended_count, crashed = crashed_count, "settled what an earlier process left behind");
    }
    if left.unreadable {
        let folder = dead.set_aside()?;
        tracing::error!(folder = %folder.display(), "journal: what the disk gave is settled; the folder is kept for what it did not");
        return Ok(());
    }
    dead.remove()?;
    Ok(())
}

/// Forgets lines of calls that began more than `kept_days` before today (UTC; 0: none), each hour, until it is dropped.
pub async fn prune(store: Store, kept_days: u32) {
    if kept_days == 0 {
        return;
    }
    let mut hours = tokio::time::interval(PRUNE_EVERY);
    hours.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        hours.tick().await;
        match prune_all(&store, kept_days).await {
            Ok(0) => {}
            Ok(lines) => tracing::info!(lines, "lines were forgotten; what their days came to stays"),
            Err(error) => tracing::warn!(%error, "lines could not be forgotten; it is tried again"),
        }
    }
}

/// Forgets lines a few at a time, so that nobody waits long for the database.
async fn prune_all(store: &Store, kept_days: u32) -> Result<u64, StoreError> {
    let mut forgotten = 0;
    loop {
        match store.prune_lines(kept_days, PRUNE_LINES).await? {
            0 => return Ok(forgotten),
            lines => forgotten += lines,
        }
        tokio::time::sleep(PRUNE_PAUSE).await;
    }
}

/// What a line's tokens cost at a price; for [`Store::recompute`].
pub static LINE_COST: LineCost = |line, price| match line.billed {
    Billed::Nothing => 0,
    Billed::Hold => line.charged_nano,
    _ => cost_nano(price, Tokens::of_line(line), line.ratio_micro),
};

/// Recomputes a line from its tokens, price version and ratio; says what does not agree.
pub static CHECK_LINE: LineCheck = check_line;

fn check_line(line: &Line, price: &Price) -> Option<String> {
    let cost = cost_nano(price, Tokens::of_line(line), line.ratio_micro);
    let tier = price.rates_for(line.input).0 as u32;
    let of_tokens = !matches!(line.billed, Billed::Nothing | Billed::Hold);
    let wrong = of_tokens && line.tier != tier
        || match line.billed {
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

/// Milliseconds of a clock that only goes forward, also while the machine sleeps.
fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Seconds of the same clock.
fn now_s() -> u64 {
    now_ms() / 1000
}

#[cfg(test)]
mod lease_tests;
#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;
