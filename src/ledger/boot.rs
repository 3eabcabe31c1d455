//! One life of this node in the books: a boot, what it has leased, its journal, and the clock that it is fenced by.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use super::journal::Journal;
use super::lease::Purse;
use super::quota::Limited;
use super::{Clocks, StartError, now_ms};
use crate::error::Error;
use crate::failpoint;
use crate::store::{BootId, Store, StoreError, random};

mod leases;
mod shipping;

pub(super) use shipping::SHIP_LINES;

/// Finished lines reach the store this often, or sooner when many wait.
const SHIP_EVERY: Duration = Duration::from_secs(1);
const UNANSWERED: Error = Error::NodeUnavailable { reason: "the database does not answer", retry_after_s: 2 };

/// One life of one process, or a part of it: a node that was fenced off begins another.
#[derive(Debug)]
pub(super) struct Boot {
    pub id: BootId,
    pub journal: Arc<Journal>,
    journals: PathBuf,
    store: Store,
    clocks: Clocks,
    /// Numbers of calls.
    pub sequence: AtomicU64,
    purses: RwLock<HashMap<i64, Arc<Purse>>>,
    /// Grants that are wanted, and who asks for them: one at a time, for all.
    wanted: std::sync::Mutex<Vec<leases::Wanted>>,
    granting: Mutex<()>,
    /// Lines that are open.
    pub open: AtomicU64,
    pub ended: Notify,
    shipping: Mutex<()>,
    /// Shared by all boots of this process, as the limits are.
    limited: Arc<Limited>,
    /// When this boot stops taking money, on the ledger's clock: its last heartbeat, read before it was sent, and the
    /// fence's time.
    fence_ms: AtomicU64,
    /// The boot is no longer live in the store, or the node has stopped: no more holds.
    fenced: AtomicBool,
    fence_noticed: Notify,
    /// Since when its heartbeats have come without a gap.
    unbroken_since_ms: AtomicU64,
}

impl Boot {
    /// Registers a boot and makes its journal.
    pub async fn begin(
        store: &Store,
        journals: &Path,
        journal_bytes_max: u64,
        clocks: Clocks,
        limited: Arc<Limited>,
    ) -> Result<Arc<Boot>, StartError> {
        let (id, began_ms) = (random(), now_ms());
        store.begin_boot(id).await?;
        failpoint::at("boot.registered");
        let journal = match Journal::create(journals, id, journal_bytes_max) {
            Ok(journal) => journal,
            Err(error) => {
                store.close_boot(id).await?; // it never held anything
                return Err(error.into());
            }
        };
        Ok(Arc::new(Boot {
            id,
            journal,
            journals: journals.to_owned(),
            store: store.clone(),
            clocks,
            sequence: AtomicU64::new(0),
            purses: RwLock::default(),
            wanted: std::sync::Mutex::default(),
            granting: Mutex::default(),
            open: AtomicU64::new(0),
            ended: Notify::new(),
            shipping: Mutex::default(),
            limited,
            fence_ms: AtomicU64::new(began_ms + clocks.fence_ms),
            fenced: AtomicBool::new(false),
            fence_noticed: Notify::new(),
            unbroken_since_ms: AtomicU64::new(began_ms),
        }))
    }

    /// Ships lines, says that the boot lives, returns idle leases and looks after boots that died, until it is fenced.
    pub async fn keep(self: &Arc<Boot>) {
        let shipping = async {
            let mut ticks = interval(SHIP_EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = self.journal.lines_wait.notified() => match self.journal.has_many() {
                        true => ticks.reset(),
                        false => continue, // shipped meanwhile
                    },
                }
                self.ship_logged().await;
                self.grant_ahead().await;
            }
        };
        let living = async {
            let mut ticks = interval(Duration::from_millis(self.clocks.heartbeat_ms));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.beat().await;
            }
        };
        // Apart from the heartbeat, which must not wait for it.
        let tidying = async {
            let mut ticks = interval(Duration::from_millis(self.clocks.heartbeat_ms));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.return_room(Purse::is_idle).await;
                self.forget_empty().await;
                self.forfeit_dead().await;
            }
        };
        let fencing = async {
            while !self.is_fenced() {
                let left = self.fence_ms.load(Ordering::Acquire).saturating_sub(now_ms());
                tokio::select! {
                    () = sleep(Duration::from_millis(left.max(1))) => {}
                    () = self.fence_noticed.notified() => {}
                }
            }
        };
        tokio::select! {
            () = shipping => {}
            () = living => {}
            () = tidying => {}
            () = fencing => {}
        }
    }

    /// Ends a boot that takes no more calls: ships and returns what is free until those that are open have ended, at most
    /// for `patience`; then returns what is leased. A boot whose calls have not ended, or whose journal is damaged, is
    /// left to a replay.
    pub async fn retire(&self, patience: Duration) -> Result<(), StoreError> {
        self.fence();
        let until = Instant::now() + patience;
        loop {
            let mut ended = pin!(self.ended.notified());
            ended.as_mut().enable();
            if self.open_lines() == 0 || Instant::now() >= until {
                break;
            }
            self.ship_logged().await;
            self.return_room(|purse| purse.room() > 0).await;
            let _ = self.store.heartbeat(self.id).await; // while it ships, nobody needs to forfeit it
            tokio::select! {
                () = ended => {}
                () = sleep_until(until.min(Instant::now() + SHIP_EVERY)) => {}
            }
        }
        while !self.journal.is_shipped() {
            self.ship().await?;
        }
        // What this boot has charged against limits is in the store: nobody reads it on its behalf any more.
        self.refresh_limits().await?;
        failpoint::at("stop.shipped");
        let settled = self.open_lines() == 0 && !self.journal.is_damaged();
        if settled {
            self.store.close_boot(self.id).await?;
        } else {
            tracing::warn!(open = self.open_lines(), "calls were still open; the next start settles them");
        }
        self.journal.close(settled);
        Ok(())
    }

    /// Counts a call that is about to open, unless the boot takes none: whoever retires it waits for all that came before.
    pub fn enter(self: &Arc<Boot>) -> Option<Entered> {
        self.open.fetch_add(1, Ordering::SeqCst);
        let entered = Entered(Some(self.clone()));
        (!self.is_fenced()).then_some(entered)
    }

    /// Counts a call that has ended.
    pub fn leave(&self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
        self.ended.notify_waiters();
    }

    /// Lines that are open.
    pub fn open_lines(&self) -> u64 {
        self.open.load(Ordering::SeqCst)
    }

    /// Whether it may take no more money.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst) || now_ms() >= self.fence_ms.load(Ordering::Acquire)
    }

    /// Takes no more money from here on.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
        self.fence_noticed.notify_waiters();
    }

    pub fn known_purse(&self, user_id: i64) -> Option<Arc<Purse>> {
        self.purses.read().expect("no holder of this lock panics").get(&user_id).cloned()
    }

    pub fn purse(&self, user_id: i64) -> Arc<Purse> {
        if let Some(purse) = self.known_purse(user_id) {
            return purse;
        }
        let mut purses = self.purses.write().expect("no holder of this lock panics");
        purses.entry(user_id).or_insert_with(|| Arc::new(Purse::new(user_id))).clone()
    }

    fn gone(&self) {
        tracing::error!("this boot is no longer live in the store");
        self.fence();
    }

    /// Says that the boot lives, which moves its fence.
    async fn beat(&self) {
        let (sent_ms, known) = (now_ms(), self.journal.watermark());
        failpoint::at("heartbeat.asked");
        let beaten = self.store.heartbeat(self.id).await;
        failpoint::at("heartbeat.answered");
        match beaten {
            Ok(shipped) => {
                let before = self.fence_ms.swap(sent_ms + self.clocks.fence_ms, Ordering::AcqRel);
                if sent_ms.saturating_sub(before.saturating_sub(self.clocks.fence_ms)) > self.clocks.silent_ms {
                    self.unbroken_since_ms.store(sent_ms, Ordering::Relaxed);
                }
                if shipped >= known {
                    return self.journal.confirmed(shipped);
                }
                let _nobody_ships = self.shipping.lock().await;
                if let Err(error) = self.rewind(shipped).await {
                    tracing::error!(%error, "lines could not be read again");
                }
            }
            Err(StoreError::BootGone) => self.gone(),
            Err(error) => tracing::warn!(%error, "heartbeat failed"),
        }
    }

    /// Gives back what boots have leased that nobody has heard of for too long, if this node was there all the time: a
    /// database that was away makes nobody a forfeiter.
    async fn forfeit_dead(&self) {
        let unbroken_ms = now_ms().saturating_sub(self.unbroken_since_ms.load(Ordering::Relaxed));
        let beaten_ms = self.fence_ms.load(Ordering::Acquire).saturating_sub(self.clocks.fence_ms);
        let gap_ms = now_ms().saturating_sub(beaten_ms);
        if unbroken_ms < self.clocks.forfeit_ms || gap_ms > self.clocks.silent_ms {
            return;
        }
        let forfeit_ms = self.clocks.forfeit_ms as i64;
        let silent = match self.store.silent_boots(self.id, forfeit_ms).await {
            Ok(silent) => silent,
            Err(error) => return tracing::warn!(%error, "silent boots could not be looked for"),
        };
        for boot in silent {
            failpoint::at("forfeit.found");
            let released = self.store.release_boot(boot, forfeit_ms).await;
            failpoint::at("forfeit.released");
            match released {
                Ok(nano) => {
                    let boot = crate::store::hex(&boot);
                    tracing::error!(boot, nano, "a silent boot was forfeited: its leases went back");
                }
                Err(StoreError::Absent(_) | StoreError::Refused(_)) => {} // another node was faster, or it lives
                Err(error) => tracing::warn!(%error, "a silent boot could not be forfeited"),
            }
        }
    }
}

/// A call that is being opened; counted until [`Entered::keep`] hands the count to its line.
#[derive(Debug)]
pub(super) struct Entered(Option<Arc<Boot>>);

impl Entered {
    /// Who has it now calls [`Boot::leave`].
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(boot) = self.0.take() {
            boot.leave();
        }
    }
}
