//! Lends upstream accounts, one permit at a time.
//!
//! Who finds all accounts busy waits in line; a permit that comes back goes straight to the first in line that it can
//! serve, so no account is idle while somebody waits for it.

mod account;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

pub use account::Account;

use crate::catalog::{Model, Offer};
use crate::config::PoolBounds;
use crate::error::Error;
use crate::store::{MasterKey, Store, StoreError};

/// Every account, and who waits for one.
#[derive(Debug)]
pub struct Pool {
    state: Mutex<State>,
    bounds: PoolBounds,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    waiting: VecDeque<Waiter>,
    /// Where the next choice among equals begins.
    turn: usize,
    /// When the first account that rests has rested: before it nobody in line can be served for that reason.
    next_rested: Option<Instant>,
}

#[derive(Debug)]
struct Slot {
    account: Arc<Account>,
    in_flight: u32,
    /// Not to be used before this moment, by its provider's word.
    resting_until: Option<Instant>,
    /// Gone from the table; the slot stays until its calls have ended.
    removed: bool,
}

#[derive(Debug)]
struct Waiter {
    user_id: i64,
    model: Arc<Model>,
    tried: Vec<Arc<Account>>,
    lend: oneshot::Sender<Permit>,
}

/// The right to have one call in flight on an account; ends with its drop.
#[derive(Debug)]
pub struct Permit {
    pub account: Arc<Account>,
    pub offer: Offer,
    pool: Arc<Pool>,
}

impl Pool {
    /// An empty pool; [`Pool::reload`] fills it.
    pub fn new(bounds: PoolBounds) -> Arc<Pool> {
        Arc::new(Pool { state: Mutex::default(), bounds })
    }

    /// Reads the accounts again; `keyless` are the endpoints that need no account of the operator's.
    ///
    /// Calls in flight keep what they have; whoever waits is looked after at once.
    pub async fn reload(
        self: &Arc<Pool>,
        store: &Store,
        master: &MasterKey,
        keyless: &[String],
    ) -> Result<(), StoreError> {
        let built_in = keyless.iter().map(|endpoint| Account::built_in(endpoint));
        let stored = store.accounts().await?.into_iter();
        let stored = stored.map(|row| Account::open(row, master, self.bounds.concurrency));
        self.replace(built_in.chain(stored).collect());
        Ok(())
    }

    fn replace(self: &Arc<Pool>, accounts: Vec<Account>) {
        let mut state = self.lock();
        for slot in &mut state.slots {
            slot.removed = true;
        }
        for account in accounts {
            let account = Arc::new(account);
            match state.slots.iter_mut().find(|slot| slot.account.is(&account)) {
                Some(slot) => {
                    slot.account = account;
                    slot.removed = false;
                }
                None => state.slots.push(Slot { account, in_flight: 0, resting_until: None, removed: false }),
            }
        }
        state.slots.retain(|slot| !slot.removed || slot.in_flight > 0);
        self.serve_waiting(state, true);
    }

    /// Until when a call that comes now may wait for its accounts.
    pub fn deadline(&self) -> tokio::time::Instant {
        tokio::time::Instant::now() + Duration::from_secs(self.bounds.queue_deadline_s)
    }

    /// Whether an enabled account serves the model at all, busy or not.
    pub fn serves(&self, model: &Model) -> bool {
        self.lock().slots.iter().any(|slot| !slot.removed && slot.offer(model).is_some())
    }

    /// Lends an account for `model` that is not among `tried`, waiting in line when all are busy.
    ///
    /// Waits until `deadline` at most. `NoAccount` when none could ever serve it, `UpstreamBusy` when all that could rest
    /// beyond the deadline, `QueueFull` and `QueueTimeout` by the bounds of the configuration.
    pub async fn permit(
        self: &Arc<Pool>,
        model: &Arc<Model>,
        user_id: i64,
        tried: &[Arc<Account>],
        deadline: tokio::time::Instant,
    ) -> Result<Permit, Error> {
        let waiting = {
            let mut state = self.lock();
            if !state.slots.iter().any(|slot| !slot.removed && slot.may_serve(model, tried)) {
                return Err(Error::NoAccount { model: model.name.clone() });
            }
            if let Some(permit) = self.lend(&mut state, model, tried) {
                return Ok(permit);
            }
            if let Some(retry_after_s) = state.resting_past(model, tried, deadline.into_std()) {
                return Err(Error::UpstreamBusy { retry_after_s });
            }
            state.waiting.retain(|waiter| !waiter.lend.is_closed());
            let of_user = state.waiting.iter().filter(|waiter| waiter.user_id == user_id).count();
            if state.waiting.len() >= self.bounds.queue_max || of_user >= self.bounds.queue_user_max {
                return Err(Error::QueueFull { retry_after_s: self.bounds.queue_deadline_s });
            }
            let (lend, waiting) = oneshot::channel();
            state.waiting.push_back(Waiter { user_id, model: model.clone(), tried: tried.to_vec(), lend });
            waiting
        };
        let deadline = tokio::time::sleep_until(deadline);
        let mut rested = tokio::time::interval(RESTED_EVERY);
        tokio::pin!(deadline, waiting);
        loop {
            tokio::select! {
                lent = &mut waiting => return lent.map_err(|_| Error::NoAccount { model: model.name.clone() }),
                () = &mut deadline => {
                    // A permit may have been lent in this very moment: then it goes to the next in line by its drop.
                    return Err(Error::QueueTimeout { retry_after_s: 1 });
                }
                _ = rested.tick() => self.serve_rested(),
            }
        }
    }

    /// Does not lend the account again for `pause`; never shortens a pause.
    pub fn rest(&self, account: &Account, pause: Duration) {
        let until = Instant::now() + pause.min(REST_MAX);
        let mut state = self.lock();
        if let Some(slot) = state.slots.iter_mut().find(|slot| slot.account.is(account)) {
            slot.resting_until = slot.resting_until.max(Some(until));
        }
        state.next_rested = state.first_rested();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// The best account that is free: lowest tier, then the least loaded for its weight, then in turn.
    fn lend(self: &Arc<Pool>, state: &mut State, model: &Model, tried: &[Arc<Account>]) -> Option<Permit> {
        let now = Instant::now();
        let (count, turn) = (state.slots.len(), state.turn);
        let best = (0..count)
            .map(|step| (turn + step) % count)
            .filter(|index| state.slots[*index].is_free(now) && state.slots[*index].may_serve(model, tried))
            .min_by(|a, b| state.slots[*a].rank().cmp(&state.slots[*b].rank()))?;
        state.turn = best + 1;
        let slot = &mut state.slots[best];
        let offer = slot.offer(model)?.clone();
        slot.in_flight += 1;
        Some(Permit { account: slot.account.clone(), offer, pool: self.clone() })
    }

    /// Lends to whoever waits for an account that has rested by now. Everybody in line asks, so it walks the line only
    /// when there is one.
    fn serve_rested(self: &Arc<Pool>) {
        let mut state = self.lock();
        if state.next_rested.is_some_and(|rested| rested <= Instant::now()) {
            state.next_rested = state.first_rested();
            self.serve_waiting(state, false);
        }
    }

    /// Lends to whoever can be served, in the order of their coming. With `replaced` accounts whoever none can serve any
    /// more is told so.
    fn serve_waiting(self: &Arc<Pool>, mut state: MutexGuard<'_, State>, replaced: bool) {
        let mut lent = Vec::new();
        let mut waiting = std::mem::take(&mut state.waiting);
        waiting.retain(|waiter| !waiter.lend.is_closed());
        let mut still = VecDeque::with_capacity(waiting.len());
        let now = Instant::now();
        let mut free = state.slots.iter().filter(|slot| !slot.removed && slot.is_free(now)).count();
        for waiter in waiting {
            if free == 0 && !replaced {
                still.push_back(waiter);
                continue;
            }
            if !state.slots.iter().any(|slot| !slot.removed && slot.may_serve(&waiter.model, &waiter.tried)) {
                continue; // its last account was disabled: dropping the sender tells it
            }
            match self.lend(&mut state, &waiter.model, &waiter.tried) {
                Some(permit) => {
                    lent.push((waiter.lend, permit));
                    free = state.slots.iter().filter(|slot| !slot.removed && slot.is_free(now)).count();
                }
                None => still.push_back(waiter),
            }
        }
        state.waiting = still;
        drop(state);
        for (lend, permit) in lent {
            // Who has left meanwhile gives the permit back by this very drop, which serves the next in line.
            drop(lend.send(permit));
        }
    }

    fn give_back(self: &Arc<Pool>, account: &Account) {
        let mut state = self.lock();
        let Some(index) = state.slots.iter().position(|slot| slot.account.is(account)) else { return };
        state.slots[index].in_flight = state.slots[index].in_flight.saturating_sub(1);
        if state.slots[index].removed && state.slots[index].in_flight == 0 {
            state.slots.remove(index);
        }
        if !state.waiting.is_empty() {
            self.serve_waiting(state, false);
        }
    }
}

/// While somebody waits, accounts whose rest is over are looked for this often.
const RESTED_EVERY: Duration = Duration::from_millis(250);
/// A provider's longest believable pause.
const REST_MAX: Duration = Duration::from_secs(24 * 3600);

impl State {
    fn first_rested(&self) -> Option<Instant> {
        let now = Instant::now();
        self.slots.iter().filter_map(|slot| slot.resting_until).filter(|until| *until > now).min()
    }

    /// Seconds until the first of the accounts that may serve has rested, if all of them rest beyond `deadline`.
    fn resting_past(&self, model: &Model, tried: &[Arc<Account>], deadline: Instant) -> Option<u64> {
        let serving = self.slots.iter().filter(|slot| slot.may_serve(model, tried));
        let first = serving.map(|slot| slot.resting_until).min()??;
        (first > deadline).then(|| first.saturating_duration_since(Instant::now()).as_secs().max(1))
    }
}

impl Slot {
    fn offer<'m>(&self, model: &'m Model) -> Option<&'m Offer> {
        model.offers.iter().find(|offer| self.account.serves(&offer.endpoint.name, &model.name))
    }

    fn may_serve(&self, model: &Model, tried: &[Arc<Account>]) -> bool {
        !self.removed && !tried.iter().any(|tried| tried.is(&self.account)) && self.offer(model).is_some()
    }

    fn is_free(&self, now: Instant) -> bool {
        self.in_flight < self.account.concurrency && self.resting_until.is_none_or(|until| until <= now)
    }

    /// Calls in flight for each unit of weight, in 32.32 fixed point.
    fn rank(&self) -> (u32, u64) {
        (self.account.tier, (u64::from(self.in_flight) << 32) / u64::from(self.account.weight))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.pool.give_back(&self.account);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Price;
    use crate::config::{Config, Secret};
    use crate::meter::Vocabulary;

    fn model() -> Arc<Model> {
        let config = Config::load(None, [], &["openai", "qianwen", "demo"]).unwrap();
        let endpoint = Arc::new(config.endpoints["openai"].clone());
        Arc::new(Model {
            name: "m".into(),
            price: Price::plain(1, 1),
            price_version: 1,
            context: 1000,
            max_output: 100,
            bills_unseen: false,
            vocabulary: Vocabulary::O200k,
            offers: vec![Offer { endpoint, upstream_model: "m".into() }],
        })
    }

    fn account(id: i64, tier: u32, concurrency: u32) -> Account {
        Account {
            id: Some(id),
            name: format!("a{id}"),
            endpoint: "openai".into(),
            key: Secret::new("sk"),
            base_url: None,
            models: None,
            weight: 1,
            tier,
            concurrency,
            enabled: true,
        }
    }

    fn pool(accounts: Vec<Account>) -> Arc<Pool> {
        let config = Config::load(None, [], &["openai", "qianwen", "demo"]).unwrap();
        let pool = Pool::new(config.pool);
        pool.replace(accounts);
        pool
    }

    fn soon() -> tokio::time::Instant {
        tokio::time::Instant::now() + Duration::from_secs(25)
    }

    #[tokio::test]
    async fn a_call_does_not_wait_for_an_account_that_rests_beyond_its_deadline() {
        let pool = pool(vec![account(1, 0, 5)]);
        pool.rest(&account(1, 0, 5), Duration::from_secs(600));
        let error = pool.permit(&model(), 1, &[], soon()).await.unwrap_err();
        assert!(matches!(error, Error::UpstreamBusy { retry_after_s: 598..=600 }), "{error:?}");
    }

    #[tokio::test]
    async fn who_waits_is_served_when_an_account_has_rested() {
        let pool = pool(vec![account(1, 0, 1)]);
        let held = pool.permit(&model(), 1, &[], soon()).await.unwrap();
        let waits = tokio::spawn({
            let pool = pool.clone();
            async move { pool.permit(&model(), 2, &[], soon()).await.map(|_| ()) }
        });
        tokio::task::yield_now().await;
        pool.rest(&account(1, 0, 1), Duration::from_millis(300));
        drop(held);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!waits.is_finished());
        assert_eq!(tokio::time::timeout(Duration::from_secs(5), waits).await.unwrap().unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn an_empty_pool_is_an_error_and_no_panic() {
        let error = pool(vec![]).permit(&model(), 1, &[], soon()).await.unwrap_err();
        assert_eq!(error, Error::NoAccount { model: "m".into() });
    }

    #[tokio::test]
    async fn the_lowest_tier_is_used_up_first_and_the_least_loaded_within_it() {
        let pool = pool(vec![account(1, 1, 9), account(2, 0, 2), account(3, 0, 2)]);
        let mut lent = Vec::new();
        for _ in 0..5 {
            lent.push(pool.permit(&model(), 1, &[], soon()).await.unwrap());
        }
        let mut ids: Vec<_> = lent.iter().map(|permit| permit.account.id.unwrap()).collect();
        assert_ne!(ids[0], ids[1], "two idle accounts take turns");
        ids.sort();
        assert_eq!(ids, [1, 2, 2, 3, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_gets_the_permit_that_comes_back_first_come_first_served() {
        let pool = pool(vec![account(1, 0, 1)]);
        let model = model();
        let held = pool.permit(&model, 1, &[], pool.deadline()).await.unwrap();
        let wait = |order: usize| {
            let (pool, model) = (pool.clone(), model.clone());
            tokio::spawn(async move { (order, pool.permit(&model, 1, &[], pool.deadline()).await.map(|_| ())) })
        };
        let first = wait(1);
        tokio::task::yield_now().await;
        let second = wait(2);
        tokio::task::yield_now().await;
        assert!(!first.is_finished());
        drop(held);
        assert_eq!(first.await.unwrap(), (1, Ok(())));
        assert_eq!(second.await.unwrap(), (2, Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_at_the_deadline() {
        let pool = pool(vec![account(1, 0, 1)]);
        let _held = pool.permit(&model(), 1, &[], soon()).await.unwrap();
        let error = pool.permit(&model(), 1, &[], soon()).await.unwrap_err();
        assert_eq!(error, Error::QueueTimeout { retry_after_s: 1 });
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_left_does_not_keep_the_permit() {
        let pool = pool(vec![account(1, 0, 1)]);
        let model = model();
        let held = pool.permit(&model, 1, &[], pool.deadline()).await.unwrap();
        {
            let left = pool.permit(&model, 1, &[], pool.deadline());
            tokio::pin!(left);
            assert!(tokio::time::timeout(Duration::from_millis(1), &mut left).await.is_err());
        }
        drop(held);
        assert!(pool.permit(&model, 1, &[], pool.deadline()).await.is_ok());
    }

    #[tokio::test]
    async fn a_disabled_account_finishes_its_calls_and_is_lent_no_more() {
        let pool = pool(vec![account(1, 0, 5)]);
        let held = pool.permit(&model(), 1, &[], soon()).await.unwrap();
        pool.replace(vec![Account { enabled: false, ..account(1, 0, 5) }]);
        assert!(matches!(pool.permit(&model(), 1, &[], soon()).await, Err(Error::NoAccount { .. })));
        drop(held);
        pool.replace(vec![account(1, 0, 1)]);
        assert!(pool.permit(&model(), 1, &[], soon()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn in_flight_never_exceeds_the_limit_under_concurrent_use() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let pool = pool(vec![account(1, 0, 3), account(2, 0, 2)]);
        let model = model();
        let (now, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let (pool, model, now, most) = (pool.clone(), model.clone(), now.clone(), most.clone());
                tokio::spawn(async move {
                    let permit = pool.permit(&model, 1, &[], pool.deadline()).await.unwrap();
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    now.fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(most.load(Ordering::SeqCst), 5);
    }
}
