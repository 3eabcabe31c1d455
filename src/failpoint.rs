//! Where a drill lets this process die, stop or pause: at every arrow of the lease and journal protocol.
//!
//! Armed by the environment: `FAILPOINT=name[:nth][:kill|stop|pause_ms=N]`, read once; the nth time that the place is
//! reached (the first, unless said) the process kills itself, as `kill -9` does. It is no setting of the program: only builds with debug assertions have
//! any of it: in a release [`at`] is nothing.

/// Every place, in the order of the protocol. `tests/drills/` walks through all of them.
pub static ALL: [&str; 28] = [
    "boot.registered", // the row is there, the journal is not
    "grant.asked",
    "grant.answered", // committed, not booked
    "return.asked",   // taken out of room, not sent
    "return.answered",
    "recall.asked",
    "recall.told",
    "recall.heard",
    "heartbeat.asked",
    "heartbeat.answered",
    "forfeit.found",
    "forfeit.released",
    "open.due",
    "open.written",
    "mark.due",
    "mark.written",
    "end.due",
    "end.written", // what the call did not spend is still held
    "sync.due",
    "sync.done",
    "ship.read",
    "ship.committed", // the watermark has moved, the node does not know
    "segment.due",    // its open calls were copied out and synced
    "segment.removed",
    "replay.read",
    "replay.shipped", // one batch of possibly several
    "replay.closed",  // the leases went back, the folder is still there
    "stop.shipped",   // everything is shipped, the boot is not closed
];

#[cfg(debug_assertions)]
pub use armed::{at, shrink};

#[cfg(not(debug_assertions))]
mod disarmed {
    #[inline(always)]
    pub fn at(_name: &'static str) {}

    #[inline(always)]
    pub const fn shrink() -> u64 {
        1
    }
}
#[cfg(not(debug_assertions))]
pub use disarmed::{at, shrink};

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread::sleep;
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    struct Armed {
        name: &'static str,
        nth: u32,
        reached: AtomicU32,
        happens: Happens,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Happens {
        Kill,
        Stop,
        Pause(Duration),
    }

    fn armed() -> Option<&'static Armed> {
        static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
        let armed = ARMED.get_or_init(|| {
            let text = std::env::var("FAILPOINT").ok()?;
            Some(read(&text).unwrap_or_else(|| panic!("FAILPOINT: {text:?} names no failpoint")))
        });
        armed.as_ref()
    }

    /// By what the journal's segments, and all of them, are smaller: a process that is to end at one has to fill some.
    pub fn shrink() -> u64 {
        if armed().is_some_and(|armed| armed.name.starts_with("segment.")) { 256 } else { 1 }
    }

    /// A place that the process may be armed to end at.
    pub fn at(name: &'static str) {
        debug_assert!(super::ALL.contains(&name), "{name} is not in the list");
        let Some(armed) = armed().filter(|armed| armed.name == name) else { return };
        if armed.reached.fetch_add(1, Ordering::Relaxed) + 1 != armed.nth {
            return;
        }
        let signal = match armed.happens {
            Happens::Kill => Signal::KILL,
            Happens::Stop => Signal::STOP,
            Happens::Pause(time) => return sleep(time),
        };
        kill_process(getpid(), signal).expect("a process may signal itself");
        sleep(Duration::from_millis(50)); // a signal to the process may reach this thread last
    }

    fn read(text: &str) -> Option<Armed> {
        let mut parts = text.split(':').peekable();
        let name = parts.next()?;
        let name = super::ALL.iter().find(|known| **known == name)?;
        let nth = match parts.peek().and_then(|part| part.parse().ok()) {
            Some(nth) => {
                parts.next();
                nth
            }
            None => 1,
        };
        let happens = match parts.next() {
            None | Some("kill") => Happens::Kill,
            Some("stop") => Happens::Stop,
            Some(other) => Happens::Pause(Duration::from_millis(other.strip_prefix("pause_ms=")?.parse().ok()?)),
        };
        parts.next().is_none().then_some(Armed { name, nth, reached: AtomicU32::new(0), happens })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_failpoint_is_armed_by_name_count_and_what_happens() {
            let armed = |text| read(text).map(|armed| (armed.name, armed.nth, armed.happens));
            assert_eq!(armed("ship.read"), Some(("ship.read", 1, Happens::Kill)));
            assert_eq!(armed("ship.read:3"), Some(("ship.read", 3, Happens::Kill)));
            assert_eq!(armed("ship.read:stop"), Some(("ship.read", 1, Happens::Stop)));
            let pause = Happens::Pause(Duration::from_millis(20));
            assert_eq!(armed("ship.read:2:pause_ms=20"), Some(("ship.read", 2, pause)));
            for wrong in ["", "ship", "ship.read:0x", "ship.read:1:kill:more", "ship.read:pause_ms="] {
                assert!(armed(wrong).is_none(), "{wrong}");
            }
        }
    }
}
