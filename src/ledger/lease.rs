//! The money that this node may hold from: one atomic a user, fed by leases from the store.
//!
//! Locks and atomics are those of `super`, so that `lease_tests.rs` can put others in their place.

use std::pin::pin;
use std::sync::Arc;

use tokio::sync::futures::Notified;
use tokio::sync::{Mutex, Notify};

use super::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use super::{now_s, sync};

/// A grant ahead covers this much of the user's spending at its present rate.
const AHEAD_S: i64 = 60;
/// After this long without a call a user's room goes back to the store.
const IDLE_S: u64 = 60;
/// A refusal by the store is believed this long, so that a user without money costs no query a request.
pub(super) const BROKE_MS: u64 = 200;

/// One user's money on this node.
///
/// `room` = granted − returned − spent − held, and is never below zero: every taker compares before it takes.
#[derive(Debug)]
pub(super) struct Purse {
    pub user_id: i64,
    room: AtomicI64,
    held: AtomicI64,
    /// Calls that are open; the balance of a user without any may be taken whole by a clamped call.
    pub calls: AtomicU32,
    /// The lease's version as last read; held over a grant or return, so that these come one after the other.
    pub lease: Mutex<LeaseState>,
    /// Until when (milliseconds of the ledger's clock) the store need not be asked again.
    pub broke_until_ms: AtomicU64,
    /// Another node asks, and this one is to let it have what is free even while it asks itself.
    pub yields: AtomicBool,
    /// Another node asks: what is free goes back as soon as nobody is busy with the lease.
    pub asked: AtomicBool,
    /// Calls that wait for others of this user to give money back.
    waiting: sync::Mutex<u32>,
    /// Money came back.
    freed: Notify,
    /// What the balance had left after the last grant.
    pub balance_nano: AtomicI64,
    spent_in_window: AtomicI64,
    spent_before: AtomicI64,
    window: AtomicU64,
    used_s: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct LeaseState {
    pub version: i64,
    /// Granted − returned as this node has booked it into `room`.
    pub granted_nano: i64,
    /// The outcome of the last commit is unknown: the row has to be read before anything else.
    pub unknown: bool,
    /// And that commit was to delete the row.
    pub forgotten: bool,
}

impl Purse {
    pub fn new(user_id: i64) -> Purse {
        Purse {
            user_id,
            room: AtomicI64::new(0),
            held: AtomicI64::new(0),
            calls: AtomicU32::new(0),
            lease: Mutex::default(),
            broke_until_ms: AtomicU64::new(0),
            yields: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            waiting: sync::Mutex::new(0),
            freed: Notify::new(),
            balance_nano: AtomicI64::new(0),
            spent_in_window: AtomicI64::new(0),
            spent_before: AtomicI64::new(0),
            window: AtomicU64::new(now_s() / AHEAD_S as u64),
            used_s: AtomicU64::new(now_s()),
        }
    }

    /// Holds exactly `amount`, or nothing.
    pub fn take(&self, amount: i64) -> bool {
        debug_assert!(amount >= 0);
        let took = self
            .room
            .try_update(Ordering::AcqRel, Ordering::Acquire, |room| room.checked_sub(amount).filter(|left| *left >= 0));
        if took.is_ok() {
            self.held.fetch_add(amount, Ordering::AcqRel);
        }
        took.is_ok()
    }

    /// Holds what there is, at most `amount`; returns how much.
    fn take_up_to(&self, amount: i64) -> i64 {
        let took = |room: i64| room.min(amount).max(0);
        let before = self.room.try_update(Ordering::AcqRel, Ordering::Acquire, |room| Some(room - took(room)));
        let got = took(before.unwrap_or_else(|room| room));
        self.held.fetch_add(got, Ordering::AcqRel);
        got
    }

    /// What a call is charged: `min(cost, held + what room gives)`, and what is held for it then.
    pub fn charge(&self, held: i64, cost: i64) -> (i64, i64) {
        let held = if cost > held { held + self.take_up_to(cost - held) } else { held };
        (cost.min(held), held)
    }

    /// Ends a hold of which `charge` was spent; the rest becomes room. Only once the charge is written down: room that
    /// others spend must not be charged to this call again by whoever reads the journal.
    pub fn release(&self, held: i64, charge: i64) {
        self.held.fetch_sub(held, Ordering::AcqRel);
        self.room.fetch_add(held - charge, Ordering::AcqRel);
        self.freed.notify_waiters();
        self.note_spent(charge);
    }

    /// Money that came from the store.
    pub fn granted(&self, amount: i64) {
        self.room.fetch_add(amount, Ordering::AcqRel);
        if amount > 0 {
            self.freed.notify_waiters();
        }
    }

    /// Takes all room out, to be given back to the store.
    pub fn drain(&self) -> i64 {
        // Below zero only after the database went back; that is not given back.
        let empty = |room: i64| (room > 0).then_some(0);
        self.room.try_update(Ordering::AcqRel, Ordering::Acquire, empty).unwrap_or(0)
    }

    /// Room as of now.
    pub fn room(&self) -> i64 {
        self.room.load(Ordering::Acquire)
    }

    /// Leased and not spent: what the user still has on this node.
    pub fn unspent(&self) -> i64 {
        self.room.load(Ordering::Acquire) + self.held.load(Ordering::Acquire)
    }

    /// What a grant may bring beyond the need of the moment.
    pub fn ahead_nano(&self) -> i64 {
        self.turn_window();
        self.spent_before.load(Ordering::Relaxed).max(self.spent_in_window.load(Ordering::Relaxed))
    }

    /// What a grant ahead of need would bring, where room is down to half of what the user spends in [`AHEAD_S`]. None
    /// where the balance is short of it: other nodes and calls may need that.
    pub fn low_nano(&self) -> Option<i64> {
        let (ahead, room) = (self.ahead_nano(), self.room());
        let low = room < ahead / 2 && self.balance_nano.load(Ordering::Relaxed) / 4 > ahead;
        low.then_some(ahead - room)
    }

    /// Whether room is down to a quarter of what the user spends in [`AHEAD_S`], and a grant ahead would bring some.
    pub fn is_nearly_out(&self) -> bool {
        self.low_nano().is_some_and(|_| self.room() < self.ahead_nano() / 4)
    }

    /// Whether no call has touched it for a while.
    pub fn is_idle(&self) -> bool {
        self.calls.load(Ordering::Acquire) == 0
            && self.room() > 0
            && now_s().saturating_sub(self.used_s.load(Ordering::Relaxed)) > IDLE_S
    }

    /// Whether nothing of it is needed, and has not been for a while.
    pub fn is_empty(&self) -> bool {
        self.calls.load(Ordering::Acquire) == 0
            && self.unspent() == 0
            && now_s().saturating_sub(self.used_s.load(Ordering::Relaxed)) > IDLE_S
    }

    /// Lets it be long ago that a call used it.
    #[cfg(test)]
    pub fn age(&self) {
        self.used_s.store(0, Ordering::Relaxed);
    }

    pub fn note_used(&self) {
        self.used_s.store(now_s(), Ordering::Relaxed);
    }

    fn note_spent(&self, charge: i64) {
        self.turn_window();
        self.spent_in_window.fetch_add(charge, Ordering::Relaxed);
        self.note_used();
    }

    /// Spending is kept per window of [`AHEAD_S`]; two racing turns lose at most one window's figure, which is an estimate.
    fn turn_window(&self) {
        let window = now_s() / AHEAD_S as u64;
        let before = self.window.swap(window, Ordering::Relaxed);
        if before != window {
            let spent = self.spent_in_window.swap(0, Ordering::Relaxed);
            self.spent_before.store(if before + 1 == window { spent } else { 0 }, Ordering::Relaxed);
        }
    }
}

/// Money that was taken out of room for somebody: it goes back unless it is kept, so a taker that has left loses none.
#[derive(Debug)]
#[must_use]
pub(super) struct Taken {
    purse: Arc<Purse>,
    amount: i64,
}

impl Taken {
    /// Holds exactly `amount`, or nothing.
    pub fn of(purse: &Arc<Purse>, amount: i64) -> Option<Taken> {
        purse.take(amount).then(|| Taken { purse: purse.clone(), amount })
    }

    /// Nano-units.
    pub fn amount(&self) -> i64 {
        self.amount
    }

    /// Hands the hold over to whoever settles it.
    pub fn keep(mut self) -> i64 {
        std::mem::take(&mut self.amount)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.purse.release(self.amount, 0);
        }
    }
}

/// A call that waits for others of its user to give money back. Not all of them can wait: the last one that would is the
/// one to end, with what it has.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    purse: &'a Purse,
    counted: bool,
}

impl Purse {
    /// Is told of money that comes back from now on.
    fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    fn waiting(&self) -> sync::MutexGuard<'_, u32> {
        self.waiting.lock().expect("no holder of this lock panics")
    }
}

impl<'a> Waiting<'a> {
    pub fn new(purse: &'a Purse) -> Waiting<'a> {
        Waiting { purse, counted: false }
    }

    /// Asks `cover` again each time that money came back, or that `look` says so, until it has some; `None` when it fails,
    /// or when nobody is left who could give any back.
    pub async fn cover<T, C, E, L>(&mut self, mut cover: impl FnMut() -> C, look: impl Fn() -> L) -> Option<T>
    where
        C: Future<Output = Result<Option<T>, E>>,
        L: Future<Output = ()>,
    {
        loop {
            let mut freed = pin!(self.purse.freed());
            freed.as_mut().enable();
            if let Some(taken) = cover().await.ok()? {
                return Some(taken);
            }
            // Calls of one user do not cut each other short while one of them could finish.
            let others = self.others_may_finish();
            tokio::select! {
                biased;
                // Also when nobody is left: the last one may have given money back since this one asked.
                () = freed => {}
                () = std::future::ready(()), if !others => return None,
                () = look() => {}
            }
            // Who asks does not wait: one that has just got its money must not count, or another is cut for nothing.
            self.stop();
        }
    }

    /// Whether another call of this user is not waiting, so that it may finish; if not, this one stops to wait.
    fn others_may_finish(&mut self) -> bool {
        let mut waiting = self.purse.waiting();
        if !std::mem::replace(&mut self.counted, true) {
            *waiting += 1;
        }
        if *waiting < self.purse.calls.load(Ordering::Acquire) {
            return true;
        }
        *waiting -= 1;
        self.counted = false;
        false
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.counted) {
            *self.purse.waiting() -= 1;
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Counts an open call of a purse; the count ends with it.
#[derive(Debug)]
pub(super) struct CallCount(pub Arc<Purse>);

impl CallCount {
    /// Enters, unless `limit` calls are open; also says whether it is the only one.
    pub fn enter(purse: &Arc<Purse>, limit: Option<u32>) -> Option<(CallCount, bool)> {
        let limit = limit.unwrap_or(u32::MAX);
        let before = purse
            .calls
            .try_update(Ordering::AcqRel, Ordering::Acquire, |calls| (calls < limit).then_some(calls + 1))
            .ok()?;
        Some((CallCount(purse.clone()), before == 0))
    }
}

impl Drop for CallCount {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
        self.0.freed.notify_waiters(); // those that wait may be all that are left
    }
}
