//! What a key or a user may be charged, in all, by day and by month; and how often a user may call.
//!
//! On one node a limit is exact: what is held for calls counts against it. Several nodes learn of each other's charges as
//! these are shipped, about a second later: a limit may be passed by what the other nodes hold and have just charged. The
//! balance never is.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use crate::store::{BootId, Spent, day_of, month_of};

/// Nano-units; `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub total: Option<i64>,
    /// Each day, UTC.
    pub day: Option<i64>,
    /// Each month, UTC.
    pub month: Option<i64>,
}

/// Which limit is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    Total,
    Day,
    Month,
}

/// What came of the wish to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Begun,
    /// There is room now: no need to.
    Room,
    /// All others that hold anything wait, too.
    Alone,
}

impl Limits {
    fn is_none(&self) -> bool {
        *self == Limits::default()
    }
}

/// What counts against the limits of one key or user, on this node.
#[derive(Debug, Default)]
pub struct Spending {
    /// Looked at first, so that what has no limit costs nothing.
    limited: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    limits: Limits,
    /// What the store has, of all nodes, as of `day`.
    spent: Spent,
    day: i64,
    /// Whether the store's figures were ever read.
    read: bool,
    /// For calls that are open here.
    held: i64,
    /// Of that, for calls that wait until others give up what they hold.
    waiting: i64,
    /// Charges of this node that `spent` has not got yet: boot, number of its END, nano-units.
    unshipped: VecDeque<(BootId, u64, i64)>,
}

impl Spending {
    /// Takes new limits. What counts against them is read by whoever holds against them: see [`Spending::shipped`].
    pub fn limit(&self, limits: Limits) {
        self.state().limits = limits;
        self.limited.store(!limits.is_none(), Ordering::Release);
    }

    /// Whether there is any limit.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// What may still be held, in nano-units, and which limit says so.
    pub fn room(&self, now_ms: i64) -> Option<(i64, Period)> {
        if !self.is_limited() {
            return None;
        }
        self.state().room(now_ms)
    }

    /// Holds `amount`, or says which limit does not allow it.
    pub fn hold(&self, amount: i64, now_ms: i64) -> Result<(), Period> {
        let mut state = self.state();
        match state.room(now_ms) {
            Some((room, period)) if amount > room => Err(period),
            _ => {
                state.held = state.held.saturating_add(amount);
                Ok(())
            }
        }
    }

    /// Holds as much of `amount` as the limits allow; returns how much.
    pub fn hold_up_to(&self, amount: i64, now_ms: i64) -> i64 {
        let mut state = self.state();
        let got = state.room(now_ms).map_or(amount, |(room, _)| amount.min(room));
        state.held = state.held.saturating_add(got);
        got
    }

    /// Gives up a hold.
    pub fn release(&self, amount: i64) {
        self.state().held -= amount;
    }

    /// A call that holds `own` and needs `amount` more begins to wait for others to end, unless there is room by now or
    /// nobody holds anything who does not wait: looked at and done in one step.
    pub fn wait(&self, own: i64, amount: i64, now_ms: i64) -> Wait {
        let mut state = self.state();
        if state.room(now_ms).is_none_or(|(room, _)| amount <= room) {
            return Wait::Room;
        }
        if state.held - state.waiting <= own {
            return Wait::Alone;
        }
        state.waiting += own;
        Wait::Begun
    }

    /// A call that holds `own` begins to wait for something else than this limit.
    pub fn wait_elsewhere(&self, own: i64) {
        self.state().waiting += own;
    }

    /// A call that holds `own` waits no longer.
    pub fn stop_waiting(&self, own: i64) {
        self.state().waiting -= own;
    }

    /// Whether the store's figures were ever read: without them nothing can be held.
    pub fn is_read(&self) -> bool {
        self.state().read
    }

    /// Whether anything is held, or charged and not in the store's figures.
    pub fn is_in_use(&self) -> bool {
        let state = self.state();
        state.held != 0 || !state.unshipped.is_empty()
    }

    /// A hold became the charge of a line: END `ordinal` of `boot`.
    pub fn charge(&self, held: i64, charged: i64, boot: BootId, ordinal: u64) {
        let mut state = self.state();
        state.held -= held;
        if charged > 0 {
            state.unshipped.push_back((boot, ordinal, charged));
        }
    }

    /// The store's own figures, which have all ENDs of `boot` up to `ordinal`.
    pub fn shipped(&self, spent: Spent, boot: BootId, ordinal: u64, now_ms: i64) {
        let mut state = self.state();
        (state.spent, state.day, state.read) = (spent, day_of(now_ms), true);
        state.unshipped.retain(|(of, number, _)| *of != boot || *number > ordinal);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

impl State {
    fn room(&self, now_ms: i64) -> Option<(i64, Period)> {
        let today = day_of(now_ms);
        let of_day = if today == self.day { self.spent.day_nano } else { 0 };
        let of_month = if month_of(today) == month_of(self.day) { self.spent.month_nano } else { 0 };
        let pending = self.held.saturating_add(self.unshipped.iter().map(|(.., charged)| charged).sum());
        let limits = [
            (self.limits.total, self.spent.total_nano, Period::Total),
            (self.limits.day, of_day, Period::Day),
            (self.limits.month, of_month, Period::Month),
        ];
        let room = |(limit, spent, period): (Option<i64>, i64, Period)| {
            Some((limit?.saturating_sub(spent).saturating_sub(pending).max(0), period))
        };
        limits.into_iter().filter_map(room).min_by_key(|(room, _)| *room)
    }
}

/// How often a user calls: requests come evenly, or together up to a minute's worth (GCRA).
#[derive(Debug, Default)]
pub struct Pace {
    /// When the requests that were let in would have been even, in microseconds since 1970 UTC.
    even_us: AtomicI64,
}

const MINUTE_US: i64 = 60_000_000;

impl Pace {
    /// Lets a request in, or says after how many seconds there is room for one.
    pub fn admit(&self, per_minute: u32, now_ms: i64) -> Result<(), u64> {
        let (now, each) = (now_ms.saturating_mul(1000), MINUTE_US / i64::from(per_minute.max(1)));
        let next = |even: i64| Some(even.max(now) + each).filter(|next| *next - now <= MINUTE_US);
        match self.even_us.try_update(Ordering::AcqRel, Ordering::Acquire, next) {
            Ok(_) => Ok(()),
            Err(even) => Err(((even + each - now - MINUTE_US).max(1) as u64).div_ceil(1_000_000)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: BootId = [7; 16];
    const DAY_MS: i64 = 86_400_000;
    /// 2026-01-30, noon.
    const NOON_MS: i64 = 20_483 * DAY_MS + DAY_MS / 2;

    fn spent(total_nano: i64, month_nano: i64, day_nano: i64) -> Spent {
        Spent { total_nano, month_nano, day_nano }
    }

    fn limited(total: Option<i64>, day: Option<i64>, month: Option<i64>) -> Spending {
        let spending = Spending::default();
        spending.limit(Limits { total, day, month });
        spending.shipped(spent(50, 30, 10), BOOT, 0, NOON_MS);
        spending
    }

    #[test]
    fn what_is_held_counts_until_it_is_released_and_what_is_charged_until_it_is_in_the_store() {
        let spending = limited(Some(100), None, None);
        assert_eq!(spending.hold(30, NOON_MS), Ok(()));
        assert_eq!(spending.hold(21, NOON_MS), Err(Period::Total));
        assert_eq!(spending.hold(20, NOON_MS), Ok(()));
        spending.release(20);
        spending.charge(30, 25, BOOT, 3);
        assert_eq!(spending.room(NOON_MS), Some((25, Period::Total)));
        spending.shipped(spent(60, 30, 10), BOOT, 2, NOON_MS);
        assert_eq!(spending.room(NOON_MS), Some((15, Period::Total)), "END 3 is not among them");
        spending.shipped(spent(85, 55, 35), BOOT, 3, NOON_MS);
        assert_eq!(spending.room(NOON_MS), Some((15, Period::Total)));
        spending.shipped(spent(101, 55, 35), BOOT, 3, NOON_MS);
        assert_eq!(spending.room(NOON_MS), Some((0, Period::Total)), "other nodes went beyond it");
    }

    #[test]
    fn the_tightest_limit_decides_and_days_and_months_begin_anew() {
        let spending = limited(Some(1000), Some(15), Some(40));
        assert_eq!(spending.room(NOON_MS), Some((5, Period::Day)));
        let tomorrow = NOON_MS + DAY_MS;
        assert_eq!(spending.room(tomorrow), Some((10, Period::Month)));
        let next_month = NOON_MS + 2 * DAY_MS;
        assert_eq!(spending.room(next_month), Some((15, Period::Day)));
    }

    #[test]
    fn new_limits_leave_the_figures_as_they_are() {
        let spending = limited(Some(100), None, None);
        spending.hold(30, NOON_MS).unwrap();
        spending.charge(30, 25, BOOT, 1);
        spending.limit(Limits { total: Some(80), ..Limits::default() });
        assert_eq!(spending.room(NOON_MS), Some((5, Period::Total)), "50 before, 25 since");
    }

    #[test]
    fn of_those_that_hold_against_a_limit_one_does_not_wait() {
        let spending = limited(Some(100), None, None);
        spending.hold(20, NOON_MS).unwrap();
        let wait = |own| spending.wait(own, 31, NOON_MS);
        assert_eq!(wait(20), Wait::Alone, "nobody else holds anything");
        spending.hold(30, NOON_MS).unwrap();
        assert_eq!(wait(20), Wait::Begun, "the other one may end");
        assert_eq!(wait(30), Wait::Alone, "the other one waits");
        spending.stop_waiting(20);
        spending.wait_elsewhere(30);
        assert_eq!(wait(20), Wait::Alone, "the other one waits for something else");
        spending.stop_waiting(30);
        assert_eq!(wait(30), Wait::Begun);
        // Who gave up its hold between the look and the wait leaves room, and nobody to wait for.
        spending.stop_waiting(30);
        spending.release(20);
        assert_eq!(spending.wait(30, 20, NOON_MS), Wait::Room);
    }

    #[test]
    fn concurrent_holds_never_pass_a_limit() {
        let spending = limited(Some(1050), None, None);
        let held = AtomicI64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for amount in 1..500 {
                        if spending.hold(amount % 17, NOON_MS).is_ok() {
                            held.fetch_add(amount % 17, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(held.load(Ordering::Relaxed), 1000);
    }

    #[test]
    fn a_minutes_worth_may_come_at_once_and_then_one_at_a_time() {
        let pace = Pace::default();
        assert!((0..6).all(|_| pace.admit(6, NOON_MS).is_ok()));
        assert_eq!(pace.admit(6, NOON_MS), Err(10));
        assert_eq!(pace.admit(6, NOON_MS + 9_000), Err(1));
        assert!(pace.admit(6, NOON_MS + 10_000).is_ok());
        assert!(pace.admit(6, NOON_MS + 10_000).is_err());
        assert!((0..6).all(|_| pace.admit(6, NOON_MS + 100_000).is_ok()));
    }
}
