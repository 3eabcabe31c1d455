//! Boots, leases and prices: the transactions that move money (design.md §4b).

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::Store;
use super::lines::{LINE_INSERT, insert_line, price_row};
use crate::store::{BootId, BootState, LeaseRow, Line, PriceRow, StoreError, now_ms};

impl Store {
    /// Registers a new boot as live.
    pub async fn begin_boot(&self, boot: BootId) -> Result<(), StoreError> {
        self.write(move |tx| {
            tx.execute("INSERT INTO boots (id, started_ms, seen_ms) VALUES (?1, ?2, ?2)", params![boot, now_ms()])?;
            Ok(())
        })
        .await
    }

    /// Says that the boot lives and returns its watermark; `BootGone` when it no longer does.
    pub async fn heartbeat(&self, boot: BootId) -> Result<u64, StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE boots SET seen_ms = ?2 WHERE id = ?1 AND state = 'live' RETURNING shipped";
            let shipped: Option<i64> = tx.query_row(sql, params![boot, now_ms()], |row| row.get(0)).optional()?;
            shipped.map(|shipped| shipped as u64).ok_or(StoreError::BootGone)
        })
        .await
    }

    /// What the store knows of a boot; `None` when it was never registered.
    pub async fn boot(&self, boot: BootId) -> Result<Option<BootState>, StoreError> {
        self.job(move |connection| {
            let sql = "SELECT state = 'live', shipped FROM boots WHERE id = ?1";
            let read = |row: &Row<'_>| Ok(BootState { live: row.get(0)?, shipped: row.get::<_, i64>(1)? as u64 });
            Ok(connection.query_row(sql, [boot], read).optional()?)
        })
        .await
    }

    /// Gives all of a boot's leases back to their users and closes it.
    pub async fn close_boot(&self, boot: BootId) -> Result<(), StoreError> {
        self.write(move |tx| {
            tx.execute(
                "UPDATE users SET balance_nano = balance_nano + leases.amount_nano FROM leases
                 WHERE leases.user_id = users.id AND leases.boot = ?1 AND leases.amount_nano > 0",
                [boot],
            )?;
            tx.execute("DELETE FROM leases WHERE boot = ?1", [boot])?;
            tx.execute("UPDATE boots SET state = 'closed' WHERE id = ?1", [boot])?;
            Ok(())
        })
        .await
    }

    /// Moves money from a user's balance into a boot's lease: `need_nano` or what there is, possibly nothing, and beyond
    /// it at most `ahead_nano`, of which a boot takes no more than its half of an even share of the balance.
    pub async fn grant(
        &self,
        boot: BootId,
        user_id: i64,
        need_nano: i64,
        ahead_nano: i64,
    ) -> Result<LeaseRow, StoreError> {
        self.write(move |tx| {
            require_live(tx, boot)?;
            let sql = "SELECT balance_nano, (SELECT count(*) FROM boots WHERE state = 'live') FROM users WHERE id = ?1";
            let (balance, live): (i64, i64) = tx
                .query_row(sql, [user_id], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?
                .ok_or_else(|| StoreError::Absent("user".into()))?;
            let ahead = ahead_nano.clamp(0, balance / (2 * live.max(1)));
            let granted = balance.min(need_nano.max(0).saturating_add(ahead));
            tx.execute("UPDATE users SET balance_nano = balance_nano - ?2 WHERE id = ?1", params![user_id, granted])?;
            tx.execute(
                "INSERT INTO leases (user_id, boot, amount_nano, granted_nano) VALUES (?1, ?2, ?3, ?3)
                 ON CONFLICT DO UPDATE SET amount_nano = amount_nano + ?3, granted_nano = granted_nano + ?3,
                 version = version + 1",
                params![user_id, boot, granted],
            )?;
            lease_row(tx, boot, user_id)
        })
        .await
    }

    /// Moves money back; `Moved` when the lease is not at `version`.
    pub async fn give_back(
        &self,
        boot: BootId,
        user_id: i64,
        amount_nano: i64,
        version: i64,
    ) -> Result<LeaseRow, StoreError> {
        self.write(move |tx| {
            require_live(tx, boot)?;
            let changed = tx.execute(
                "UPDATE leases SET amount_nano = amount_nano - ?3, granted_nano = granted_nano - ?3, version = version + 1
                 WHERE user_id = ?1 AND boot = ?2 AND version = ?4",
                params![user_id, boot, amount_nano, version],
            )?;
            if changed == 0 {
                return Err(StoreError::Moved);
            }
            tx.execute("UPDATE users SET balance_nano = balance_nano + ?2 WHERE id = ?1", params![user_id, amount_nano])?;
            lease_row(tx, boot, user_id)
        })
        .await
    }

    /// Reads a lease again, after a commit whose outcome is unknown.
    pub async fn lease(&self, boot: BootId, user_id: i64) -> Result<LeaseRow, StoreError> {
        self.write(move |tx| lease_row(tx, boot, user_id)).await
    }

    /// Stores lines and takes their charges out of the boot's leases, if the watermark still is `from`; it becomes `to`.
    pub async fn ship(&self, boot: BootId, from: u64, to: u64, lines: Vec<Line>) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE boots SET shipped = ?3 WHERE id = ?1 AND shipped = ?2";
            if tx.execute(sql, params![boot, from as i64, to as i64])? == 0 {
                return Err(StoreError::Moved);
            }
            let mut insert = tx.prepare_cached(LINE_INSERT)?;
            let mut charge =
                tx.prepare_cached("UPDATE leases SET amount_nano = amount_nano - ?3 WHERE user_id = ?1 AND boot = ?2")?;
            for line in &lines {
                if !insert_line(&mut insert, boot, line)? {
                    continue; // stored before: the first END of a call counts
                }
                if line.charged_nano > 0 && charge.execute(params![line.user_id, boot, line.charged_nano])? == 0 {
                    return Err(StoreError::Refused(format!("line {} has no lease to be charged to", line.sequence)));
                }
            }
            Ok(())
        })
        .await
    }

    /// The version of a model's price: the last one stored if it is the same, else a new one.
    pub async fn price_version(&self, model: String, price: PriceRow) -> Result<i64, StoreError> {
        self.write(move |tx| {
            let last: Option<(i64, PriceRow)> = tx
                .query_row(
                    "SELECT version, input_nano, cached_input_nano, output_nano, per_call_nano FROM prices
                     WHERE model = ?1 ORDER BY version DESC LIMIT 1",
                    [&model],
                    |row| Ok((row.get(0)?, price_row(row, 1)?)),
                )
                .optional()?;
            if let Some((version, _)) = last.filter(|(_, last)| *last == price) {
                return Ok(version);
            }
            tx.execute(
                "INSERT INTO prices (model, input_nano, cached_input_nano, output_nano, per_call_nano, from_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    model,
                    price.input_nano,
                    price.cached_input_nano,
                    price.output_nano,
                    price.per_call_nano,
                    now_ms()
                ],
            )?;
            Ok(tx.last_insert_rowid())
        })
        .await
    }
}

fn require_live(tx: &Transaction<'_>, boot: BootId) -> Result<(), StoreError> {
    let sql = "SELECT 1 FROM boots WHERE id = ?1 AND state = 'live'";
    tx.query_row(sql, [boot], |_| Ok(())).optional()?.ok_or(StoreError::BootGone)
}

fn lease_row(tx: &Transaction<'_>, boot: BootId, user_id: i64) -> Result<LeaseRow, StoreError> {
    let sql = "SELECT coalesce(amount_nano, 0), coalesce(granted_nano, 0), coalesce(version, 0),
               balance_nano FROM users LEFT JOIN leases ON leases.user_id = users.id AND leases.boot = ?2 WHERE users.id = ?1";
    let read = |row: &Row<'_>| {
        Ok(LeaseRow {
            amount_nano: row.get(0)?,
            granted_nano: row.get(1)?,
            version: row.get(2)?,
            balance_nano: row.get(3)?,
        })
    };
    Ok(tx.query_row(sql, params![user_id, boot], read)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::random;

    async fn store_with_ann(balance_nano: i64) -> (tempfile::TempDir, Store, BootId, i64) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("x.db")).unwrap();
        let user = store.add_user("ann".into(), "default".into(), balance_nano, None).await.unwrap();
        let boot = random();
        store.begin_boot(boot).await.unwrap();
        (folder, store, boot, user.id)
    }

    #[tokio::test]
    async fn a_grant_gives_what_there_is_and_ahead_at_most_half_of_the_balance() {
        let (_folder, store, boot, user) = store_with_ann(100).await;
        let first = store.grant(boot, user, 10, 1000).await.unwrap();
        assert_eq!((first.amount_nano, first.balance_nano), (60, 40));
        let rest = store.grant(boot, user, 500, 0).await.unwrap();
        assert_eq!((rest.amount_nano, rest.granted_nano, rest.balance_nano), (100, 100, 0));
        assert_eq!(store.grant(boot, user, 1, 1).await.unwrap().amount_nano, 100);
    }

    #[tokio::test]
    async fn a_return_needs_the_version_that_was_read() {
        let (_folder, store, boot, user) = store_with_ann(100).await;
        let lease = store.grant(boot, user, 80, 0).await.unwrap();
        assert!(matches!(store.give_back(boot, user, 10, lease.version + 1).await, Err(StoreError::Moved)));
        let lease = store.give_back(boot, user, 10, lease.version).await.unwrap();
        assert_eq!((lease.amount_nano, lease.granted_nano, lease.balance_nano), (70, 70, 30));
        // More than is leased violates a constraint: nothing changes.
        assert!(store.give_back(boot, user, 71, lease.version).await.is_err());
        assert_eq!(store.lease(boot, user).await.unwrap(), lease);
    }

    #[tokio::test]
    async fn a_boot_that_is_closed_gets_no_money_and_has_given_all_of_it_back() {
        let (_folder, store, boot, user) = store_with_ann(100).await;
        store.grant(boot, user, 80, 0).await.unwrap();
        store.close_boot(boot).await.unwrap();
        assert!(matches!(store.grant(boot, user, 1, 0).await, Err(StoreError::BootGone)));
        assert!(matches!(store.heartbeat(boot).await, Err(StoreError::BootGone)));
        assert_eq!(store.user("ann".into()).await.unwrap().balance_nano, 100);
    }

    #[tokio::test]
    async fn a_price_that_comes_back_gets_a_version_of_its_own_and_the_same_one_keeps_it() {
        let (_folder, store, _, _) = store_with_ann(0).await;
        let price = |input_nano| PriceRow { input_nano, cached_input_nano: 0, output_nano: 0, per_call_nano: 0 };
        let first = store.price_version("m".into(), price(1)).await.unwrap();
        assert_eq!(store.price_version("m".into(), price(1)).await.unwrap(), first);
        let second = store.price_version("m".into(), price(2)).await.unwrap();
        let third = store.price_version("m".into(), price(1)).await.unwrap();
        assert!(first < second && second < third);
    }
}
