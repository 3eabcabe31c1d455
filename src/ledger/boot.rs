//! One life of this node in the books: a boot, what it has leased, its journal, and the clock that it is fenced by.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Mutex, Notify, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use super::journal::{Batch, Journal};
use super::lease::{BROKE_MS, LeaseState, Purse, Taken};
use super::quota::Limited;
use super::{Clocks, StartError, now_ms, refused};
use crate::error::Error;
use crate::failpoint;
use crate::store::{BootId, LeaseRow, Store, StoreError, Want, random};
use crate::users::Key;

/// Finished lines reach the store this often, or sooner when many wait.
const SHIP_EVERY: Duration = Duration::from_secs(1);
/// Lines of one transaction.
pub(super) const SHIP_LINES: usize = 1000;
/// Users of one transaction of grants: as many as keep it well under its time.
const GRANT_USERS: usize = 200;
/// A node that is short of money asks others for it so long.
const RECALL_MAX: Duration = Duration::from_secs(1);
/// How often it looks whether they have given some back, and after how many looks in vain it gives up early.
const RECALL_EVERY: Duration = Duration::from_millis(60);
const RECALL_IN_VAIN: u32 = 6;
/// It asks at the first look, and again after so many.
const RECALL_ASKS_EACH: u32 = 3;
/// A node that yields looks again after this: the other one has looked several times.
const YIELD: Duration = Duration::from_millis(200);

const UNANSWERED: Error = Error::NodeUnavailable { reason: "the database does not answer", retry_after_s: 2 };
const FENCED: Error = Error::NodeUnavailable { reason: "it cannot reach its books", retry_after_s: 5 };

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
    wanted: std::sync::Mutex<Vec<Wanted>>,
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

    /// Holds `amount`, asking the store and other nodes where room is short; `None` when the money is not there.
    pub async fn cover(self: &Arc<Boot>, purse: &Arc<Purse>, amount: i64) -> Result<Option<Taken>, Error> {
        if self.is_fenced() {
            return Err(FENCED);
        }
        if let Some(taken) = Taken::of(purse, amount) {
            return Ok(Some(taken));
        }
        // A task of its own: a client that leaves must not leave a grant unbooked, and what was taken for it goes back.
        let (boot, purse) = (self.clone(), purse.clone());
        let asking = tokio::spawn(async move { boot.refill_and_take(&purse, amount).await });
        let taken = asking.await.map_err(|_| Error::Internal)?;
        // Asking takes time, and a process that is stopped takes any: the lease may have been forfeited meanwhile.
        if self.is_fenced() { Err(FENCED) } else { taken }
    }

    async fn refill_and_take(&self, purse: &Arc<Purse>, amount: i64) -> Result<Option<Taken>, Error> {
        let mut lease = purse.lease.lock().await;
        let taken = self.refill(purse, &mut lease, amount).await;
        // Another node asked while this one was busy: what is free now is its.
        if purse.asked.swap(false, Ordering::AcqRel) {
            purse.yields.store(false, Ordering::Release);
            self.give_back(purse, &mut lease).await;
        }
        taken
    }

    async fn refill(&self, purse: &Arc<Purse>, lease: &mut LeaseState, amount: i64) -> Result<Option<Taken>, Error> {
        self.know(purse, lease).await.map_err(|_| UNANSWERED)?;
        let mut recall = Recall::default();
        // What a grant brings others may take before this call does: only an empty balance means that there is no money.
        // Each round takes the amount or moves more of the balance into the room, so it ends.
        loop {
            if self.is_fenced() {
                return Err(UNANSWERED);
            }
            if let Some(taken) = Taken::of(purse, amount) {
                return Ok(Some(taken));
            }
            if now_ms() < purse.broke_until_ms.load(Ordering::Relaxed) && recall.since.is_none() {
                return Ok(None);
            }
            let need = amount.saturating_sub(purse.room()).max(1);
            failpoint::at("grant.asked");
            let want = Want { user_id: purse.user_id, need_nano: need, ahead_nano: purse.ahead_nano() };
            let granted = self.grant(want).await;
            failpoint::at("grant.answered");
            let row = match granted {
                Ok(row) => row,
                Err(StoreError::BootGone) => {
                    self.gone();
                    return Err(UNANSWERED);
                }
                Err(error @ StoreError::Unreached(_)) => {
                    tracing::error!(%error, "a grant could not be asked for");
                    return Err(UNANSWERED);
                }
                Err(error) => {
                    tracing::error!(%error, "a grant failed; its outcome is unknown until the lease is read again");
                    lease.unknown = true;
                    return Err(UNANSWERED);
                }
            };
            let brought = book(purse, lease, &row);
            if row.balance_nano > 0 {
                continue;
            }
            if let Some(taken) = Taken::of(purse, amount) {
                return Ok(Some(taken));
            }
            let elsewhere = self.store.leased_elsewhere(self.id, purse.user_id, self.clocks.silent_ms as i64).await;
            let elsewhere = elsewhere.map_err(|_| UNANSWERED)?;
            if elsewhere.balance_nano > 0 {
                continue; // given back since
            }
            if elsewhere.live_nano > 0 && self.recall(purse, lease, &mut recall, brought).await? {
                continue;
            }
            // Money that a silent node has comes back, later; money that nobody has does not.
            if amount.saturating_sub(purse.room()) <= elsewhere.silent_nano {
                return Err(Error::BalanceLocked { retry_after_s: self.clocks.forfeit_ms.div_ceil(1000).min(60) });
            }
            purse.broke_until_ms.store(now_ms() + BROKE_MS, Ordering::Relaxed);
            return Ok(None);
        }
    }

    /// Asks the store for a grant, together with all that are wanted by then: each transaction of a boot waits for the one
    /// before it, so that of a herd all but the first few share one.
    async fn grant(&self, want: Want) -> Result<LeaseRow, StoreError> {
        let (answer, mut answered) = oneshot::channel();
        self.wanted().push(Wanted { want, answer });
        let _turn = self.granting.lock().await;
        loop {
            match answered.try_recv() {
                Ok(answer) => return answer, // somebody asked for this one, too
                Err(TryRecvError::Closed) => return Err(StoreError::Database("whoever asked has left".into())),
                Err(TryRecvError::Empty) => {}
            }
            let asked: Vec<Wanted> = {
                let mut wanted = self.wanted();
                let count = wanted.len().min(GRANT_USERS);
                wanted.drain(..count).collect()
            };
            let granted = self.store.grants(self.id, asked.iter().map(|asked| asked.want).collect()).await;
            for Wanted { want, answer } in asked {
                let of_user = |rows: &Vec<(i64, LeaseRow)>| {
                    let found = rows.iter().find(|(user_id, _)| *user_id == want.user_id);
                    found.map(|(_, row)| *row).ok_or_else(|| StoreError::Absent("user".into()))
                };
                let _ = answer.send(granted.as_ref().map_err(Clone::clone).and_then(of_user)); // it may have left
            }
        }
    }

    /// Grants, in one transaction, to all whose room is low, once that of one will not last: a call that finds room asks
    /// for nothing, and most seconds bring no grant.
    async fn grant_ahead(&self) {
        if !self.all_purses().iter().any(|purse| purse.is_nearly_out()) {
            return;
        }
        let purses: Vec<Arc<Purse>> = self.all_purses().into_iter().filter(|p| p.low_nano().is_some()).collect();
        for some in purses.chunks(GRANT_USERS) {
            let locked = some.iter().filter_map(|purse| Some((purse, purse.lease.try_lock().ok()?)));
            let mut locked: Vec<_> = locked.filter(|(_, lease)| !lease.unknown).collect();
            let want = |purse: &Arc<Purse>| Want {
                user_id: purse.user_id,
                need_nano: 0,
                ahead_nano: purse.low_nano().unwrap_or(0),
            };
            let wants: Vec<Want> = locked.iter().map(|(purse, _)| want(purse)).collect();
            if wants.is_empty() || self.is_fenced() {
                return;
            }
            match self.store.grants(self.id, wants).await {
                Ok(rows) => {
                    let rows: HashMap<i64, LeaseRow> = rows.into_iter().collect();
                    for (purse, lease) in &mut locked {
                        if let Some(row) = rows.get(&purse.user_id) {
                            book(purse, lease, row);
                        }
                    }
                }
                Err(StoreError::BootGone) => return self.gone(),
                Err(StoreError::Unreached(_)) => return,
                Err(error) => {
                    tracing::warn!(%error, "grants ahead failed; their outcome is unknown until the leases are read again");
                    return locked.iter_mut().for_each(|(_, lease)| lease.unknown = true);
                }
            }
        }
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, Vec<Wanted>> {
        self.wanted.lock().expect("no holder of this lock panics")
    }

    /// Asks other nodes for a user's free room and waits a little; false when that has lasted long enough.
    async fn recall(
        &self,
        purse: &Purse,
        lease: &mut LeaseState,
        recall: &mut Recall,
        brought: i64,
    ) -> Result<bool, Error> {
        let since = *recall.since.get_or_insert_with(Instant::now);
        if since.elapsed() >= RECALL_MAX || recall.in_vain > RECALL_IN_VAIN {
            return Ok(false);
        }
        // A notice may be lost, or meet a node that is busy with this very user.
        if recall.in_vain.is_multiple_of(RECALL_ASKS_EACH) {
            failpoint::at("recall.asked");
            self.store.ask_back(purse.user_id, self.id).await.map_err(|_| UNANSWERED)?;
            failpoint::at("recall.told");
        }
        recall.in_vain = if brought > 0 { 1 } else { recall.in_vain + 1 };
        // Two nodes that ask each other would both keep what they have: the one that is told to yields.
        if purse.yields.swap(false, Ordering::AcqRel) {
            self.give_back(purse, lease).await;
            sleep(YIELD).await; // the other one comes first
        }
        sleep(RECALL_EVERY).await;
        Ok(true)
    }

    /// Another node asks for this user's money: what is free goes back at once.
    pub async fn asked_back(&self, user_id: i64, asking: BootId) {
        if asking == self.id {
            return;
        }
        let Some(purse) = self.known_purse(user_id) else { return };
        failpoint::at("recall.heard");
        // Whoever is busy with the lease looks at these when it is done, or while it asks others itself.
        purse.asked.store(true, Ordering::Release);
        if asking > self.id {
            purse.yields.store(true, Ordering::Release);
        }
        if let Ok(mut lease) = purse.lease.try_lock() {
            purse.asked.store(false, Ordering::Release);
            purse.yields.store(false, Ordering::Release);
            self.give_back(&purse, &mut lease).await;
        }
    }

    /// Reads a lease again whose last commit nobody heard the end of.
    async fn know(&self, purse: &Purse, lease: &mut LeaseState) -> Result<(), StoreError> {
        if lease.unknown {
            let row = self.store.lease(self.id, purse.user_id).await?;
            if !(lease.forgotten && row.version == 0) {
                purse.granted(row.granted_nano - lease.granted_nano);
            }
            let (version, granted_nano) = (row.version, row.granted_nano);
            *lease = LeaseState { version, granted_nano, unknown: false, forgotten: false };
        }
        Ok(())
    }

    /// Returns the free room of the purses that `which` picks.
    async fn return_room(&self, which: impl Fn(&Purse) -> bool) {
        for purse in self.all_purses().into_iter().filter(|purse| which(purse)) {
            let mut lease = purse.lease.lock().await;
            self.give_back(&purse, &mut lease).await;
        }
    }

    /// Forgets purses that are empty and not used, and their rows, so that neither grows with every user that ever came.
    pub async fn forget_empty(&self) {
        let empty: Vec<Arc<Purse>> = self.all_purses().into_iter().filter(|purse| purse.is_empty()).collect();
        for some in empty.chunks(GRANT_USERS) {
            // Nobody is granted anything meanwhile, which would be to a row that goes.
            let locked = some.iter().filter_map(|purse| Some((purse, purse.lease.try_lock().ok()?)));
            let mut locked: Vec<_> = locked.filter(|(_, lease)| !lease.unknown).collect();
            let users: Vec<i64> = locked.iter().map(|(purse, _)| purse.user_id).collect();
            if users.is_empty() {
                continue;
            }
            let forgotten = match self.store.forget_leases(self.id, users).await {
                Ok(forgotten) => forgotten,
                Err(error) => {
                    tracing::warn!(%error, "empty leases could not be forgotten");
                    if !matches!(error, StoreError::Unreached(_)) {
                        locked.iter_mut().for_each(|(_, lease)| (lease.unknown, lease.forgotten) = (true, true));
                    }
                    return;
                }
            };
            let mut purses = self.purses.write().expect("no holder of this lock panics");
            for (purse, mut lease) in locked {
                if forgotten.contains(&purse.user_id) {
                    *lease = LeaseState::default();
                }
                // One that has no row has had none, or it has just gone. Whoever has the purse already goes on with it.
                if lease.version == 0 && Arc::strong_count(purse) == 2 {
                    purses.remove(&purse.user_id);
                }
            }
        }
    }

    fn all_purses(&self) -> Vec<Arc<Purse>> {
        self.purses.read().expect("no holder of this lock panics").values().cloned().collect()
    }

    fn gone(&self) {
        tracing::error!("this boot is no longer live in the store");
        self.fence();
    }

    /// Returns all free room.
    async fn give_back(&self, purse: &Purse, lease: &mut LeaseState) {
        if self.know(purse, lease).await.is_err() {
            return; // the next one reads it
        }
        let amount = purse.drain();
        if amount == 0 {
            return;
        }
        // If it is not committed, the next read of the row books the amount as granted again.
        lease.granted_nano -= amount;
        failpoint::at("return.asked");
        let returned = self.store.give_back(self.id, purse.user_id, amount, lease.version).await;
        failpoint::at("return.answered");
        match returned {
            Ok(row) => {
                lease.version = row.version;
                debug_assert_eq!(lease.granted_nano, row.granted_nano);
            }
            Err(StoreError::BootGone) => {
                lease.unknown = true;
                self.gone();
            }
            Err(error @ StoreError::Unreached(_)) => {
                tracing::warn!(%error, "a return could not be sent");
                lease.granted_nano += amount;
                purse.granted(amount);
            }
            Err(error) => {
                tracing::warn!(%error, "a return failed; its outcome is unknown until the lease is read again");
                lease.unknown = true;
            }
        }
    }

    async fn ship_logged(&self) {
        if let Err(error) = self.ship().await {
            tracing::error!(%error, "lines could not be shipped; they wait in the journal");
        }
    }

    /// Ships what waits, a batch at a time; then reads what has been charged against limits.
    pub async fn ship(&self) -> Result<(), StoreError> {
        let _one_at_a_time = self.shipping.lock().await;
        self.ship_waiting().await?;
        // Nothing more of this boot gets into the store until this is done.
        if let Err(error) = self.refresh_limits().await {
            tracing::warn!(%error, "what has been charged against limits could not be read");
        }
        Ok(())
    }

    async fn refresh_limits(&self) -> Result<(), StoreError> {
        self.limited.refresh(&self.store, self.id, self.journal.watermark()).await
    }

    /// Reads what has been charged against the limits of a key, where it has any that this node does not know.
    pub async fn know_limits(&self, key: &Key) -> Result<(), Error> {
        if self.limited.knows(key) {
            return Ok(());
        }
        // Boxed: it is rarely read, and every call would have to keep a place for it.
        let known = Box::pin(self.limited.know(&self.store, key, self.id, &self.journal)).await;
        known.map_err(|error| {
            tracing::warn!(%error, "what has been charged against a limit could not be read");
            UNANSWERED
        })
    }

    async fn ship_waiting(&self) -> Result<(), StoreError> {
        loop {
            let Batch { from, to, lines } = self.journal.unshipped(SHIP_LINES);
            if to == from {
                return Ok(());
            }
            let is_last = to - from < SHIP_LINES as u64;
            failpoint::at("ship.read");
            let shipped = self.store.ship(self.id, from, to, lines).await;
            failpoint::at("ship.committed");
            match shipped {
                Ok(()) => self.journal.shipped(from, to),
                Err(StoreError::Dangling) => {
                    let Batch { from, to, lines } = self.journal.unshipped(SHIP_LINES);
                    let good = refused::set_aside(&self.store, &self.journals, self.id, lines).await?;
                    self.store.ship(self.id, from, to, good).await?;
                    self.journal.shipped(from, to);
                }
                Err(StoreError::Moved) => {
                    let boot = self.store.boot(self.id).await?.ok_or(StoreError::BootGone)?;
                    if boot.shipped > from {
                        // An earlier commit went through although nobody heard of it: the watermark knows how far.
                        self.journal.shipped(boot.shipped, boot.shipped);
                    } else {
                        self.rewind(boot.shipped).await?;
                    }
                    continue; // from where the watermark is
                }
                Err(error) => return Err(error),
            }
            // What has come since waits for its own second: under load some always has.
            if is_last {
                return Ok(());
            }
        }
    }

    async fn rewind(&self, watermark: u64) -> Result<(), StoreError> {
        let journal = self.journal.clone();
        let rewound = tokio::task::spawn_blocking(move || journal.rewind(watermark)).await;
        rewound.map_err(|error| StoreError::Database(format!("the journal: {error}")))?;
        // Grants may be gone as well, and their money leased to others: what this node has is what the rows say.
        for purse in self.all_purses() {
            let mut lease = purse.lease.lock().await;
            lease.unknown = true;
            self.know(&purse, &mut lease).await?;
        }
        Ok(())
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

/// Books what a grant brought; how much.
fn book(purse: &Purse, lease: &mut LeaseState, row: &LeaseRow) -> i64 {
    let brought = row.granted_nano - lease.granted_nano;
    purse.granted(brought);
    purse.balance_nano.store(row.balance_nano, Ordering::Relaxed);
    (lease.version, lease.granted_nano) = (row.version, row.granted_nano);
    brought
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

/// A grant that waits for its turn.
#[derive(Debug)]
struct Wanted {
    want: Want,
    answer: oneshot::Sender<Result<LeaseRow, StoreError>>,
}

/// A recall that is going on.
#[derive(Debug, Default)]
struct Recall {
    since: Option<Instant>,
    /// Looks since the last one that brought something.
    in_vain: u32,
}
