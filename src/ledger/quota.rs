//! What a call holds against the limits of its key and the allowances of its user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::journal::Journal;
use crate::error::Error;
use crate::store::{BootId, Owner, Store, StoreError, now_ms};
use crate::users::{Key, Period, Spending, Wait};

/// A hold against the limits of a key and of its user, where they have any; dropped, it is given up.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Quota {
    of: [Option<Held>; 2],
}

/// What is held against one of them.
#[derive(Debug)]
struct Held {
    spending: Arc<Spending>,
    amount: i64,
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.spending.release(self.amount);
        }
    }
}

/// A limit that does not allow an amount.
#[derive(Debug)]
pub(super) struct Reached {
    /// What a client is told.
    pub error: Error,
    /// Its place in a [`Quota`].
    place: usize,
    spending: Arc<Spending>,
}

/// A call that waits: nobody at a limit waits for what it holds. Dropped, it waits no longer.
#[derive(Debug)]
pub(super) struct WaitingHold {
    of: [(Arc<Spending>, i64); 2],
}

impl WaitingHold {
    /// For money, by a call that holds `own` against its limits.
    pub fn for_money(key: &Key, own: [i64; 2]) -> WaitingHold {
        WaitingHold::begin(key, own, None)
    }

    /// `begun`: where the wait is counted already.
    fn begin(key: &Key, own: [i64; 2], begun: Option<usize>) -> WaitingHold {
        let of = [0, 1].map(|place| (spendings(key)[place].clone(), own[place]));
        let others = of.iter().enumerate().filter(|(place, _)| Some(*place) != begun);
        others.for_each(|(_, (spending, own))| spending.wait_elsewhere(*own));
        WaitingHold { of }
    }
}

impl Reached {
    /// Begins to wait for `amount`, for a call that holds `own` already; `None` when there is room by now. Fails when
    /// nobody is left who could give anything up.
    pub fn wait(self, key: &Key, own: [i64; 2], amount: i64) -> Result<Option<WaitingHold>, Error> {
        match self.spending.wait(own[self.place], amount, now_ms()) {
            Wait::Room => Ok(None),
            Wait::Begun => Ok(Some(WaitingHold::begin(key, own, Some(self.place)))),
            Wait::Alone => Err(self.error),
        }
    }
}

impl Drop for WaitingHold {
    fn drop(&mut self) {
        self.of.iter().for_each(|(spending, own)| spending.stop_waiting(*own));
    }
}

/// What a key is held against: its own limits, then its user's.
fn spendings(key: &Key) -> [&Arc<Spending>; 2] {
    [&key.spending, &key.user.spending]
}

/// Those of them that have limits, with their places.
fn limits(key: &Key) -> impl Iterator<Item = (usize, &Arc<Spending>)> {
    spendings(key).into_iter().enumerate().filter(|(_, spending)| spending.is_limited())
}

impl Quota {
    /// Whether the limits leave `amount` as of now.
    pub fn allows(key: &Key, amount: i64) -> Result<(), Reached> {
        for (place, spending) in limits(key) {
            if let Some((_, period)) = spending.room(now_ms()).filter(|(room, _)| amount > *room) {
                return Err(reached(place, spending, period));
            }
        }
        Ok(())
    }

    /// Holds `amount`; fails with what a client is told where a limit does not allow it.
    pub fn hold(key: &Key, amount: i64) -> Result<Quota, Reached> {
        let mut quota = Quota::default();
        for (place, spending) in limits(key) {
            // What the key holds by then goes back.
            spending.hold(amount, now_ms()).map_err(|period| reached(place, spending, period))?;
            quota.of[place] = Some(Held { spending: spending.clone(), amount });
        }
        Ok(quota)
    }

    /// What is held, in the order of its places.
    pub fn amounts(&self) -> [i64; 2] {
        [0, 1].map(|place| self.of[place].as_ref().map_or(0, |held: &Held| held.amount))
    }

    /// Takes a further hold of the same call in, which may be against a limit that was not there before.
    pub fn add(&mut self, more: Quota) {
        for (place, more) in self.of.iter_mut().zip(more.of) {
            match (place, more) {
                (Some(held), Some(mut more)) => held.amount += std::mem::take(&mut more.amount),
                (place @ None, more) => *place = more,
                (Some(_), None) => {}
            }
        }
    }

    /// Holds as much of `amount` as the limits allow beside what is held; returns how much.
    pub fn extend(&mut self, amount: i64) -> i64 {
        let now = now_ms();
        let mut got = amount.max(0);
        let mut extended: Vec<&mut Held> = Vec::new();
        for held in self.of.iter_mut().flatten() {
            let more = held.spending.hold_up_to(got, now);
            for earlier in &mut extended {
                earlier.spending.release(got - more);
                earlier.amount -= got - more;
            }
            held.amount += more;
            got = more;
            extended.push(held);
        }
        got
    }

    /// The call has ended: its line is END `ordinal` of `boot`.
    pub fn charge(self, charged: i64, boot: BootId, ordinal: u64) {
        for mut held in self.of.into_iter().flatten() {
            held.spending.charge(std::mem::take(&mut held.amount), charged, boot, ordinal);
        }
    }
}

/// Keys and users with limits that this node holds against. Their figures are read before the first hold, and again with
/// each shipment while anything is held or on its way to the store; then they are forgotten until the next call.
#[derive(Debug, Default)]
pub(super) struct Limited {
    known: Mutex<HashMap<Owner, Arc<Spending>>>,
    /// One reads at a time, so that no older figure takes the place of a newer one.
    reading: tokio::sync::Mutex<()>,
    /// When a call's read failed last.
    failed: Mutex<Option<Instant>>,
}

/// A call waits so long for figures, others that read before it included: a database that hangs is as one that is away.
const READ_MAX: Duration = Duration::from_secs(1);
/// After a read that failed no call tries for so long.
const FAILED_FOR: Duration = Duration::from_secs(1);

impl Limited {
    /// Reads what has been charged to a key and its user, where they have limits and it is not known. Fails only where it
    /// never was: a database that is away stops nobody whose figures are there.
    pub async fn know(&self, store: &Store, key: &Key, boot: BootId, journal: &Journal) -> Result<(), StoreError> {
        let failed = || self.failed.lock().expect("no holder of this lock panics");
        let is_away = failed().is_some_and(|failed| failed.elapsed() < FAILED_FOR);
        let read = match is_away {
            true => Err(StoreError::Unreached("it did not answer a moment ago".into())),
            false => {
                let reading = tokio::time::timeout(READ_MAX, self.read_unknown(store, key, boot, journal));
                let read = reading.await.unwrap_or_else(|_| Err(StoreError::Unreached("it does not answer".into())));
                *failed() = read.is_err().then(Instant::now);
                read
            }
        };
        let Err(error) = read else { return Ok(()) };
        let unknown = self.unknown(key);
        if !unknown.iter().all(|(_, spending)| spending.is_read()) {
            return Err(error);
        }
        self.known().extend(unknown);
        Ok(())
    }

    async fn read_unknown(&self, store: &Store, key: &Key, boot: BootId, journal: &Journal) -> Result<(), StoreError> {
        let _one_at_a_time = self.reading.lock().await;
        let unknown = self.unknown(key);
        if unknown.is_empty() {
            return Ok(());
        }
        // What is stored meanwhile may be counted twice until the next shipment, and never not at all.
        let (ordinal, now) = (journal.watermark(), now_ms());
        let spent = store.spent(unknown.iter().map(|(owner, _)| *owner).collect(), now).await?;
        for (owner, spending) in &unknown {
            spending.shipped(spent.get(owner).copied().unwrap_or_default(), boot, ordinal, now);
        }
        self.known().extend(unknown);
        Ok(())
    }

    /// Whether nothing has to be read for a key.
    pub fn knows(&self, key: &Key) -> bool {
        let is_unlimited = spendings(key).iter().all(|spending| !spending.is_limited());
        is_unlimited || self.unknown(key).is_empty()
    }

    /// Limits of a key whose figures have to be read.
    fn unknown(&self, key: &Key) -> Vec<(Owner, Arc<Spending>)> {
        let owners = [Owner::Key(key.id), Owner::User(key.user.id)].into_iter().zip(spendings(key));
        let limited = owners.filter(|(_, spending)| spending.is_limited());
        let is_unknown = |(owner, _): &(Owner, &Arc<Spending>)| !self.known().contains_key(owner);
        limited.filter(is_unknown).map(|(owner, spending)| (owner, spending.clone())).collect()
    }

    /// Reads what has been charged, of which END `ordinal` of `boot` is the last one from here. The caller sees to it that
    /// nothing of that boot is shipped meanwhile.
    pub async fn refresh(&self, store: &Store, boot: BootId, ordinal: u64) -> Result<(), StoreError> {
        let _one_at_a_time = self.reading.lock().await;
        self.known().retain(|_, spending| spending.is_in_use());
        let known: Vec<(Owner, Arc<Spending>)> = self.known().iter().map(|(owner, of)| (*owner, of.clone())).collect();
        if known.is_empty() {
            return Ok(());
        }
        let now = now_ms();
        let spent = store.spent(known.iter().map(|(owner, _)| *owner).collect(), now).await?;
        for (owner, spending) in known {
            spending.shipped(spent.get(&owner).copied().unwrap_or_default(), boot, ordinal, now);
        }
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Owner, Arc<Spending>>> {
        self.known.lock().expect("no holder of this lock panics")
    }
}

/// What the limits of a key and its user leave, in nano-units; `None`: no limit.
pub(super) fn room(key: &Key) -> Option<i64> {
    let now = now_ms();
    let rooms = spendings(key).map(|spending| spending.room(now).map(|(room, _)| room));
    rooms.into_iter().flatten().min()
}

/// The limits of a key, and of a user, as a client is told of them: in all, of the day, of the month.
static NAMES: [[&str; 3]; 2] = [
    ["This key's limit", "This key's limit of the day (UTC)", "This key's limit of the month (UTC)"],
    ["This user's limit", "This user's allowance of the day (UTC)", "This user's allowance of the month (UTC)"],
];

fn reached(place: usize, spending: &Arc<Spending>, period: Period) -> Reached {
    let [total, day, month] = NAMES[place];
    let which = match period {
        Period::Total => total,
        Period::Day => day,
        Period::Month => month,
    };
    Reached { error: Error::LimitReached { which }, place, spending: spending.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users::Limits;

    fn limited(total: i64) -> Arc<Spending> {
        let spending = Arc::new(Spending::default());
        spending.limit(Limits { total: Some(total), ..Limits::default() });
        spending
    }

    fn held(spending: &Arc<Spending>, amount: i64) -> Option<Held> {
        spending.hold(amount, now_ms()).unwrap();
        Some(Held { spending: spending.clone(), amount })
    }

    fn room(spending: &Spending) -> i64 {
        spending.room(now_ms()).unwrap().0
    }

    #[test]
    fn a_limit_that_is_set_while_a_call_runs_gets_back_what_its_slices_held() {
        let (key, user) = (limited(100), limited(100));
        let mut quota = Quota { of: [held(&key, 10), None] };
        quota.add(Quota { of: [held(&key, 20), held(&user, 20)] });
        assert_eq!((room(&key), room(&user)), (70, 80));
        drop(quota);
        assert_eq!((room(&key), room(&user)), (100, 100));
    }

    #[test]
    fn a_cost_beyond_the_hold_is_held_as_far_as_both_limits_allow() {
        let (key, user) = (limited(100), limited(50));
        let mut quota = Quota { of: [held(&key, 10), held(&user, 10)] };
        assert_eq!(quota.extend(200), 40);
        assert_eq!((room(&key), room(&user)), (50, 0));
        quota.charge(45, [7; 16], 1);
        assert_eq!((room(&key), room(&user)), (55, 5));
        assert_eq!(Quota::default().extend(7), 7, "without a limit there is none");
    }
}
