//! Money that a boot has leased: grants, recalls between nodes, and what goes back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{Instant, sleep};

use super::super::lease::{BROKE_MS, LeaseState, Purse, Taken};
use super::super::now_ms;
use super::{Boot, UNANSWERED};
use crate::error::Error;
use crate::failpoint;
use crate::store::{BootId, LeaseRow, StoreError, Want};

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

const FENCED: Error = Error::NodeUnavailable { reason: "it cannot reach its books", retry_after_s: 5 };

impl Boot {
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
    pub(super) async fn grant_ahead(&self) {
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
    pub(super) async fn know(&self, purse: &Purse, lease: &mut LeaseState) -> Result<(), StoreError> {
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
    pub(super) async fn return_room(&self, which: impl Fn(&Purse) -> bool) {
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

    pub(super) fn all_purses(&self) -> Vec<Arc<Purse>> {
        self.purses.read().expect("no holder of this lock panics").values().cloned().collect()
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
}

/// Books what a grant brought; how much.
fn book(purse: &Purse, lease: &mut LeaseState, row: &LeaseRow) -> i64 {
    let brought = row.granted_nano - lease.granted_nano;
    purse.granted(brought);
    purse.balance_nano.store(row.balance_nano, Ordering::Relaxed);
    (lease.version, lease.granted_nano) = (row.version, row.granted_nano);
    brought
}

/// A grant that waits for its turn.
#[derive(Debug)]
pub(super) struct Wanted {
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
