//! What has ended goes into the store, in the order of its ENDs, and what the store has lost goes there again.

use super::super::journal::Batch;
use super::super::refused;
use super::{Boot, UNANSWERED};
use crate::error::Error;
use crate::failpoint;
use crate::store::StoreError;
use crate::users::Key;

/// Lines of one transaction.
pub(in crate::ledger) const SHIP_LINES: usize = 1000;

impl Boot {
    /// Ships; what fails waits in the journal.
    pub(super) async fn ship_logged(&self) {
        if let Err(error) = self.ship().await {
            tracing::error!(%error, "lines could not be shipped; they wait in the journal");
        }
    }

    /// Ships what waits, a batch at a time; then reads what has been charged against limits.
    pub async fn ship(&self) -> Result<(), StoreError> {
        let _one_at_a_time = self.shipping.lock().await;
        self.ship_waiting().await?;
        // Nothing more of this boot gets into the store until this is done.
        if let Err(error) = self.refresh_limits().await {
            tracing::warn!(%error, "what has been charged against limits could not be read");
        }
        Ok(())
    }

    /// Reads what has been charged against limits.
    pub(super) async fn refresh_limits(&self) -> Result<(), StoreError> {
        self.limited.refresh(&self.store, self.id, self.journal.watermark()).await
    }

    /// Reads what has been charged against the limits of a key, where it has any that this node does not know.
    pub async fn know_limits(&self, key: &Key) -> Result<(), Error> {
        if self.limited.knows(key) {
            return Ok(());
        }
        // Boxed: it is rarely read, and every call would have to keep a place for it.
        let known = Box::pin(self.limited.know(&self.store, key, self.id, &self.journal)).await;
        known.map_err(|error| {
            tracing::warn!(%error, "what has been charged against a limit could not be read");
            UNANSWERED
        })
    }

    async fn ship_waiting(&self) -> Result<(), StoreError> {
        loop {
            let Batch { from, to, lines } = self.journal.unshipped(SHIP_LINES);
            if to == from {
                return Ok(());
            }
            let is_last = to - from < SHIP_LINES as u64;
            failpoint::at("ship.read");
            let shipped = self.store.ship(self.id, from, to, lines).await;
            failpoint::at("ship.committed");
            match shipped {
                Ok(()) => self.journal.shipped(from, to),
                Err(StoreError::Dangling) => {
                    let Batch { from, to, lines } = self.journal.unshipped(SHIP_LINES);
                    let good = refused::set_aside(&self.store, &self.journals, self.id, lines).await?;
                    self.store.ship(self.id, from, to, good).await?;
                    self.journal.shipped(from, to);
                }
                Err(StoreError::Moved) => {
                    let boot = self.store.boot(self.id).await?.ok_or(StoreError::BootGone)?;
                    if boot.shipped > from {
                        // An earlier commit went through although nobody heard of it: the watermark knows how far.
                        self.journal.shipped(boot.shipped, boot.shipped);
                    } else {
                        self.rewind(boot.shipped).await?;
                    }
                    continue; // from where the watermark is
                }
                Err(error) => return Err(error),
            }
            // What has come since waits for its own second: under load some always has.
            if is_last {
                return Ok(());
            }
        }
    }

    /// Goes back to what the store has: lines behind it are sent again.
    pub(super) async fn rewind(&self, watermark: u64) -> Result<(), StoreError> {
        let journal = self.journal.clone();
        let rewound = tokio::task::spawn_blocking(move || journal.rewind(watermark)).await;
        rewound.map_err(|error| StoreError::Database(format!("the journal: {error}")))?;
        // Grants may be gone as well, and their money leased to others: what this node has is what the rows say.
        for purse in self.all_purses() {
            let mut lease = purse.lease.lock().await;
            lease.unknown = true;
            self.know(&purse, &mut lease).await?;
        }
        Ok(())
    }
}
