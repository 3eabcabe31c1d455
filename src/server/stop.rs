//! The end of the patience with open answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// Tells open answers that the patience with them is over.
#[derive(Debug, Default)]
pub struct Stop {
    told: AtomicBool,
    notify: Arc<Notify>,
}

impl Stop {
    /// Tells all that are open now.
    pub fn tell(&self) {
        self.told.store(true, Ordering::Release);
        self.notify.notify_waiters();
    }

    /// Whether [`Stop::tell`] was called: cheaper than to ask the future that waits for it.
    pub fn is_told(&self) -> bool {
        self.told.load(Ordering::Acquire)
    }

    /// Ready with the next [`Stop::tell`].
    pub fn wait(&self) -> OwnedNotified {
        self.notify.clone().notified_owned()
    }
}
