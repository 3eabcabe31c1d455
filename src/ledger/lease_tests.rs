//! A purse alone, and in many of the orders that threads may come in.

use std::sync::Arc;

use shuttle::sync;
use shuttle::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use super::lease as real;
use real::{Purse, Taken};

/// The same source with locks and atomics at each use of which another thread may go on.
#[path = "lease.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "it is meant to be there twice, and not all of it is tried")]
mod switched;

fn now_s() -> u64 {
    0
}

impl Purse {
    fn settle(&self, held: i64, cost: i64) -> i64 {
        let (charge, held) = self.charge(held, cost);
        self.release(held, charge);
        charge
    }
}

#[test]
fn a_hold_takes_all_of_its_amount_or_nothing() {
    let purse = Purse::new(1);
    purse.granted(100);
    assert!(!purse.take(101));
    assert!(purse.take(100));
    assert!(!purse.take(1));
    assert_eq!(purse.room(), 0);
}

#[test]
fn money_that_was_taken_for_somebody_who_left_goes_back() {
    let purse = Arc::new(Purse::new(1));
    purse.granted(100);
    drop(Taken::of(&purse, 60).unwrap());
    assert_eq!((purse.room(), purse.unspent()), (100, 100));
    assert_eq!(Taken::of(&purse, 60).unwrap().keep(), 60);
    assert_eq!((purse.room(), purse.unspent()), (40, 100));
}

#[test]
fn settling_beyond_the_hold_takes_what_room_gives_and_no_more() {
    let purse = Purse::new(1);
    purse.granted(100);
    assert!(purse.take(60));
    assert_eq!(purse.settle(60, 500), 100);
    assert_eq!((purse.room(), purse.unspent()), (0, 0));
}

#[test]
fn settling_below_the_hold_makes_room() {
    let purse = Purse::new(1);
    purse.granted(100);
    assert!(purse.take(60));
    assert_eq!(purse.settle(60, 10), 10);
    assert_eq!((purse.room(), purse.unspent()), (90, 90));
}

#[test]
fn concurrent_holds_never_take_more_than_there_is() {
    let purse = Purse::new(1);
    purse.granted(10_000);
    let taken = std::sync::atomic::AtomicI64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for amount in 1..2000 {
                    if purse.take(amount % 37) {
                        taken.fetch_add(amount % 37, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(purse.room() >= 0);
    assert_eq!(purse.room() + taken.load(Ordering::Relaxed), 10_000);
}

/// Orders that are tried of each scene: at random, and so that few switches make the difference.
const ORDERS: usize = 8000;

fn in_many_orders(scene: impl Fn() + Send + Sync + Clone + 'static) {
    shuttle::check_random(scene.clone(), ORDERS);
    shuttle::check_pct(scene, ORDERS, 3);
}

#[test]
fn money_is_neither_made_nor_lost_and_room_is_never_below_zero_in_any_order() {
    in_many_orders(|| {
        let purse = Arc::new(switched::Purse::new(1));
        let (spent, returned) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
        let call = |hold: i64, cost: i64| {
            let (purse, spent) = (purse.clone(), spent.clone());
            shuttle::thread::spawn(move || {
                if purse.take(hold) {
                    let (charge, held) = purse.charge(hold, cost);
                    assert!(charge <= cost && charge <= held && held >= hold);
                    spent.fetch_add(charge, Ordering::Relaxed);
                    purse.release(held, charge);
                }
            })
        };
        let others = [
            call(60, 90), // beyond its hold
            call(50, 10),
            shuttle::thread::spawn({
                let (purse, returned) = (purse.clone(), returned.clone());
                move || {
                    returned.fetch_add(purse.drain(), Ordering::Relaxed);
                }
            }),
            shuttle::thread::spawn({
                let purse = purse.clone();
                move || drop(switched::Taken::of(&purse, 30)) // whoever wanted it has left
            }),
            shuttle::thread::spawn({
                let purse = purse.clone();
                move || (0..6).for_each(|_| assert!(purse.room() >= 0))
            }),
        ];
        purse.granted(70);
        purse.granted(50);
        others.into_iter().for_each(|other| other.join().unwrap());
        let (spent, returned) = (spent.load(Ordering::Relaxed), returned.load(Ordering::Relaxed));
        assert_eq!(purse.room() + spent + returned, 120);
        assert_eq!(purse.unspent(), purse.room(), "nothing is held");
    });
}

#[test]
fn calls_beyond_a_users_limit_are_refused_in_any_order() {
    in_many_orders(|| {
        let purse = Arc::new(switched::Purse::new(1));
        let (open, alone) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let calls = [(); 4].map(|()| {
            let (purse, open, alone) = (purse.clone(), open.clone(), alone.clone());
            shuttle::thread::spawn(move || {
                if let Some((count, only)) = switched::CallCount::enter(&purse, Some(2)) {
                    assert!(open.fetch_add(1, Ordering::Relaxed) < 2);
                    alone.fetch_add(u32::from(only), Ordering::Relaxed);
                    open.fetch_sub(1, Ordering::Relaxed);
                    drop(count);
                }
            })
        });
        calls.into_iter().for_each(|call| call.join().unwrap());
        assert!(alone.load(Ordering::Relaxed) >= 1, "the first one was the only one");
        assert_eq!(purse.calls.load(Ordering::Relaxed), 0);
    });
}

/// Each of `calls` streams holds 30 of what was granted and wants 30 more, waiting for the others; none of them looks
/// again by itself, so a wake-up that is lost is a deadlock, which the scheduler finds.
fn streams_that_wait(calls: usize, granted: i64, cut_max: u32) {
    in_many_orders(move || {
        let purse = Arc::new(switched::Purse::new(1));
        purse.granted(granted);
        let (spent, cut) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicU32::new(0)));
        let streams: Vec<_> = (0..calls)
            .map(|_| {
                let (purse, spent, cut) = (purse.clone(), spent.clone(), cut.clone());
                shuttle::future::spawn(async move {
                    let (_count, _) = switched::CallCount::enter(&purse, None).unwrap();
                    let Some(taken) = switched::Taken::of(&purse, 30) else { return };
                    let mut held = taken.keep();
                    let cover = || std::future::ready(Ok::<_, ()>(switched::Taken::of(&purse, 30)));
                    match switched::Waiting::new(&purse).cover(cover, std::future::pending).await {
                        Some(taken) => held += taken.keep(),
                        None => {
                            cut.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    let (charge, held) = purse.charge(held, 5);
                    spent.fetch_add(charge, Ordering::Relaxed);
                    purse.release(held, charge);
                })
            })
            .collect();
        shuttle::future::block_on(async {
            for stream in streams {
                stream.await.unwrap();
            }
        });
        assert_eq!(purse.room() + spent.load(Ordering::Relaxed), granted);
        assert!(cut.load(Ordering::Relaxed) <= cut_max, "one was cut that another could have given money to");
    });
}

#[test]
fn a_stream_is_not_cut_while_another_of_its_user_could_give_it_money() {
    // What the first one that is cut gives back is enough for the others.
    streams_that_wait(2, 70, 1);
    streams_that_wait(3, 100, 1);
}

#[test]
fn streams_of_one_user_never_all_wait_for_each_other() {
    // What one gives back is not enough: whoever waits is told that nobody is left.
    streams_that_wait(2, 60, 2);
}
