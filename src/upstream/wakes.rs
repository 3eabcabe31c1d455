//! Wake-ups of a connection that is polled by the task that reads from it.
//!
//! hyper's halves of a connection wake each other through that task: the body that asks for more wakes the connection, the
//! connection that has a chunk wakes the body. Polled one after the other they need none of it, and each such wake-up costs
//! a poll of everything around them. Here it stays within the poll that caused it; and where nothing was woken since a poll
//! that found nothing, another one finds nothing either.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};

/// Polls in one before the task itself is woken: whoever goes on waking wants others to have their turn.
const ROUNDS_MAX: usize = 3;

/// Polled, found nothing, and was not woken since.
const QUIET: u8 = 0;
/// Being polled.
const POLLED: u8 = 1;
/// Woken while it was polled or since, or never polled.
const WOKEN: u8 = 2;

/// The waker that a connection is polled with, whichever task that is.
#[derive(Debug)]
pub struct Wakes {
    bell: Arc<Bell>,
    waker: Waker,
}

#[derive(Debug)]
struct Bell {
    state: AtomicU8,
    /// Who polled last.
    task: Mutex<Waker>,
}

impl Wakes {
    pub fn new() -> Wakes {
        let bell = Arc::new(Bell { state: AtomicU8::new(WOKEN), task: Mutex::new(Waker::noop().clone()) });
        Wakes { waker: bell.clone().into(), bell }
    }

    /// Polls until there is something, or nothing more happens by itself.
    pub fn poll<T>(&self, cx: &mut Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let known = self.bell.is_asked_by(cx.waker());
        if known && self.bell.state.load(Ordering::Acquire) == QUIET {
            return Poll::Pending;
        }
        for _ in 0..ROUNDS_MAX {
            self.bell.state.swap(POLLED, Ordering::AcqRel);
            let polled = poll(&mut Context::from_waker(&self.waker));
            if polled.is_ready() {
                self.bell.state.store(WOKEN, Ordering::Release); // what comes next has to be asked for
                return polled;
            }
            let quiet = self.bell.state.compare_exchange(POLLED, QUIET, Ordering::AcqRel, Ordering::Acquire);
            if quiet.is_ok() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Forgets that nothing was found: something else is asked for now.
    pub fn renew(&self) {
        self.bell.state.store(WOKEN, Ordering::Release);
    }
}

impl Bell {
    fn task(&self) -> MutexGuard<'_, Waker> {
        self.task.lock().expect("no holder of this lock panics")
    }

    /// Whether it was the same task before; from now on it is.
    fn is_asked_by(&self, waker: &Waker) -> bool {
        let mut task = self.task();
        let known = task.will_wake(waker);
        if !known {
            task.clone_from(waker);
        }
        known
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Bell>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Bell>) {
        if self.state.swap(WOKEN, Ordering::AcqRel) == QUIET {
            self.task().wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Counted>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn task() -> (Arc<Counted>, Waker) {
        let counted = Arc::new(Counted::default());
        (counted.clone(), counted.into())
    }

    fn woken(counted: &Counted) -> usize {
        counted.0.load(Ordering::SeqCst)
    }

    #[test]
    fn what_is_woken_within_a_poll_is_polled_again_and_wakes_no_task() {
        let (wakes, (counted, task)) = (Wakes::new(), task());
        let mut polls = 0;
        let polled = wakes.poll(&mut Context::from_waker(&task), |cx| {
            polls += 1;
            match polls {
                1 => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        });
        assert_eq!((polled, polls, woken(&counted)), (Poll::Ready(()), 2, 0));
    }

    #[test]
    fn who_goes_on_waking_lets_others_have_their_turn() {
        let (wakes, (counted, task)) = (Wakes::new(), task());
        let mut polls = 0;
        let polled: Poll<()> = wakes.poll(&mut Context::from_waker(&task), |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert_eq!((polled, polls, woken(&counted)), (Poll::Pending, ROUNDS_MAX, 1));
    }

    #[test]
    fn where_nothing_was_woken_nothing_is_polled_and_a_wake_up_reaches_the_task_once() {
        let (wakes, (counted, task)) = (Wakes::new(), task());
        let mut cx = Context::from_waker(&task);
        let (mut inner, mut polls) = (None, 0);
        let mut ask = |ready: bool| {
            wakes.poll(&mut cx, |cx| {
                inner = Some(cx.waker().clone());
                polls += 1;
                if ready { Poll::Ready(()) } else { Poll::Pending }
            })
        };
        assert_eq!((ask(false), ask(true)), (Poll::Pending, Poll::Pending), "the second asks nobody");
        let woken_by = inner.take().expect("it was polled");
        woken_by.wake_by_ref();
        woken_by.wake_by_ref();
        assert_eq!(woken(&counted), 1);
        let ask = |ready: bool| {
            wakes.poll(&mut Context::from_waker(&task), |_| if ready { Poll::Ready(()) } else { Poll::Pending })
        };
        assert_eq!(ask(true), Poll::Ready(()));
        assert_eq!(ask(true), Poll::Ready(()), "behind something there may be more");
        assert_eq!(ask(false), Poll::Pending);
        wakes.renew();
        assert_eq!(ask(true), Poll::Ready(()));
    }

    #[test]
    fn another_task_polls_anew_and_is_the_one_that_is_woken() {
        let (wakes, (first, task_1), (second, task_2)) = (Wakes::new(), task(), task());
        let mut inner = None;
        for (task, polls_expected) in [(&task_1, 1), (&task_2, 1), (&task_2, 0)] {
            let mut polls = 0;
            let polled: Poll<()> = wakes.poll(&mut Context::from_waker(task), |cx| {
                inner = Some(cx.waker().clone());
                polls += 1;
                Poll::Pending
            });
            assert_eq!((polled, polls), (Poll::Pending, polls_expected));
        }
        inner.expect("it was polled").wake();
        assert_eq!((woken(&first), woken(&second)), (0, 1));
    }

    #[test]
    fn no_wake_up_is_lost_to_a_poll_that_goes_on_meanwhile() {
        for _ in 0..2000 {
            let (wakes, (counted, task)) = (Wakes::new(), task());
            let ready = Arc::new(AtomicUsize::new(0));
            let mut other = None;
            let polled = wakes.poll(&mut Context::from_waker(&task), |cx| {
                if ready.load(Ordering::SeqCst) == 1 {
                    return Poll::Ready(());
                }
                let (waker, ready) = (cx.waker().clone(), ready.clone());
                other.get_or_insert_with(|| {
                    std::thread::spawn(move || {
                        ready.store(1, Ordering::SeqCst);
                        waker.wake();
                    })
                });
                Poll::Pending
            });
            other.expect("it was polled").join().unwrap();
            assert!(polled.is_ready() || woken(&counted) == 1);
        }
    }
}
