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
    /// Only those that are limited.
    of: [Option<Arc<Spending>>; 2],
    amount: i64,
}

impl Quota {
    /// Holds `amount`; fails with what a client is told where a limit does not allow it.
    pub fn hold(key: &Key, amount: i64) -> Result<Quota, Error> {
        let (now, mut quota) = (now_ms(), Quota { of: [None, None], amount });
        let owners = [(&key.spending, &OF_KEY), (&key.user.spending, &OF_USER)];
        for (place, (spending, names)) in quota.of.iter_mut().zip(owners) {
            if spending.is_limited() {
                // What the key holds by then goes back.
                spending.hold(amount, now).map_err(|period| reached(names, period))?;
                *place = Some(spending.clone());
            }
        }
        Ok(quota)
    }

    /// Takes another hold of the same call in.
    pub fn add(&mut self, mut more: Quota) {
        self.amount += std::mem::take(&mut more.amount);
    }

    /// Holds as much of `amount` as the limits allow beside what is held; returns how much.
    pub fn extend(&mut self, amount: i64) -> i64 {
        let (now, mut got) = (now_ms(), amount.max(0));
        let mut before = Vec::new();
        for spending in self.of.iter().flatten() {
            let held = spending.hold_up_to(got, now);
            before.iter().for_each(|earlier: &&Arc<Spending>| earlier.release(got - held));
            before.push(spending);
            got = held;
        }
        self.amount += got;
        got
    }

    /// The call has ended: its line is END `ordinal` of `boot`.
    pub fn charge(mut self, charged: i64, boot: BootId, ordinal: u64) {
        let held = std::mem::take(&mut self.amount);
        for spending in self.of.iter().flatten() {
            spending.charge(held, charged, boot, ordinal);
        }
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        if self.amount > 0 {
            for spending in self.of.iter().flatten() {
                spending.release(self.amount);
            }
        }
    }
}

/// Keys and users with limits that have called: what has been charged to them is read again with each shipment.
#[derive(Debug, Default)]
pub(super) struct Limited(Mutex<HashMap<Owner, Arc<Spending>>>);

impl Limited {
    /// Remembers whoever `quota` is held against.
    pub fn note(&self, user_id: i64, key_id: i64, quota: &Quota) {
        for (spending, owner) in quota.of.iter().zip([Owner::Key(key_id), Owner::User(user_id)]) {
            if let Some(spending) = spending {
                self.lock().entry(owner).or_insert_with(|| spending.clone());
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
