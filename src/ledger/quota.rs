//! What a call holds against the limits of its key and the allowances of its user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::Error;
use crate::store::{BootId, Owner, Store, StoreError, now_ms};
use crate::users::{Key, Period, Spending};

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

impl Quota {
    /// Holds `amount`; fails with what a client is told where a limit does not allow it.
    pub fn hold(key: &Key, amount: i64) -> Result<Quota, Error> {
        let (now, mut quota) = (now_ms(), Quota::default());
        let owners = [(&key.spending, &OF_KEY), (&key.user.spending, &OF_USER)];
        for (place, (spending, names)) in quota.of.iter_mut().zip(owners) {
            if spending.is_limited() {
                // What the key holds by then goes back.
                spending.hold(amount, now).map_err(|period| reached(names, period))?;
                *place = Some(Held { spending: spending.clone(), amount });
            }
        }
        Ok(quota)
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

/// Keys and users with limits that have called: what has been charged to them is read again with each shipment.
#[derive(Debug, Default)]
pub(super) struct Limited(Mutex<HashMap<Owner, Arc<Spending>>>);

impl Limited {
    /// Remembers whoever `quota` is held against.
    pub fn note(&self, key: &Key, quota: &Quota) {
        for (held, owner) in quota.of.iter().zip([Owner::Key(key.id), Owner::User(key.user.id)]) {
            if let Some(held) = held {
                self.lock().entry(owner).or_insert_with(|| held.spending.clone());
            }
        }
    }

    /// Reads what has been charged, of which END `ordinal` of `boot` is the last one from here. The caller sees to it that
    /// nothing is shipped meanwhile.
    pub async fn refresh(&self, store: &Store, boot: BootId, ordinal: u64) -> Result<(), StoreError> {
        // A key that is gone, or has no limit any more, is forgotten.
        self.lock().retain(|_, spending| spending.is_limited() && Arc::strong_count(spending) > 1);
        let owners: Vec<Owner> = self.lock().keys().copied().collect();
        if owners.is_empty() {
            return Ok(());
        }
        let now = now_ms();
        let spent = store.spent(owners, now).await?;
        for (owner, spending) in self.lock().iter() {
            if let Some(spent) = spent.get(owner) {
                spending.shipped(*spent, boot, ordinal, now);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Owner, Arc<Spending>>> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

/// What the limits of a key and its user leave, in nano-units; `None`: no limit.
pub(super) fn room(key: &Key) -> Option<i64> {
    let now = now_ms();
    let rooms = [&key.spending, &key.user.spending].map(|spending| spending.room(now).map(|(room, _)| room));
    rooms.into_iter().flatten().min()
}

/// The limits of a key, and of a user, as a client is told of them: in all, of the day, of the month.
static OF_KEY: [&str; 3] =
    ["This key's limit", "This key's limit of the day (UTC)", "This key's limit of the month (UTC)"];
static OF_USER: [&str; 3] =
    ["This user's limit", "This user's allowance of the day (UTC)", "This user's allowance of the month (UTC)"];

fn reached([total, day, month]: &[&'static str; 3], period: Period) -> Error {
    let which = match period {
        Period::Total => total,
        Period::Day => day,
        Period::Month => month,
    };
    Error::LimitReached { which }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Spent;
    use crate::users::Limits;

    fn limited(total: i64) -> Arc<Spending> {
        let spending = Arc::new(Spending::default());
        spending.limit(Limits { total: Some(total), ..Limits::default() }, Spent::default(), now_ms());
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
