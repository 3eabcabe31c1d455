//! The embedded database: one thread that owns one connection, since SQLite has one writer at a time anyway.
//!
//! A job, once sent, runs to its end whether or not the asker still waits; who must know the outcome asks from a task
//! that nobody cancels.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, ToSql, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};

use super::audit::{FINDINGS_MAX, UserSums};
use super::{
    AccountRow, Audit, Billed, BootId, BootState, Change, EndReason, GroupRow, KeyRow, LeaseRow, Line, LineCheck,
    LineFilter, NewAccount, PriceRow, StoreError, UserRow, migrate, now_ms,
};

/// Jobs that wait for the thread; beyond it the asker waits.
const JOBS_MAX: usize = 1024;
/// How long a write waits for another process (a subcommand beside the server).
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Rows of `changes` that are kept; a server that is further behind reads everything again.
const CHANGES_KEPT: i64 = 10_000;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle to the database; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    path: PathBuf,
}

impl Store {
    /// Opens the file, makes it and its folder when absent, and migrates it.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let failed = |why: String| StoreError::Open(path.to_owned(), why);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| failed(error.to_string()))?;
        }
        let mut connection = Connection::open(path).map_err(|error| failed(error.to_string()))?;
        // FULL: a commit of money is on disk before anybody acts on it.
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(|error| failed(error.to_string()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        migrate::sqlite(&mut connection)?;

        let (jobs, mut queue) = mpsc::channel::<Job>(JOBS_MAX);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    job(&mut connection);
                }
            })
            .map_err(|error| failed(error.to_string()))?;
        Ok(Store { jobs, path: path.to_owned() })
    }

    /// The file behind it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    async fn job<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, waiting) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let _ = answer.send(work(connection)); // the asker may have left
        });
        let stopped = || StoreError::Database("its thread has stopped".into());
        self.jobs.send(job).await.map_err(|_| stopped())?;
        waiting.await.map_err(|_| stopped())?
    }

    /// One write transaction, which takes the write lock at its start.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.job(move |connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let result = work(&transaction)?;
            transaction.commit()?;
            Ok(result)
        })
        .await
    }

    // Settings.

    /// Reads a setting that the program stored for itself.
    pub async fn setting(&self, name: &'static str) -> Result<Option<String>, StoreError> {
        self.job(move |connection| {
            let sql = "SELECT value FROM settings WHERE name = ?1";
            Ok(connection.query_row(sql, [name], |row| row.get(0)).optional()?)
        })
        .await
    }

    /// Stores a setting unless it is there already; returns what is stored then.
    pub async fn settle_setting(&self, name: &'static str, value: String) -> Result<String, StoreError> {
        self.write(move |tx| {
            tx.execute(
                "INSERT INTO settings (name, value) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![name, value],
            )?;
            Ok(tx.query_row("SELECT value FROM settings WHERE name = ?1", [name], |row| row.get(0))?)
        })
        .await
    }

    /// The first start: stores the admin token's hash, a first user with a key, and a first credit (0: none), all or
    /// nothing. False when there was a first start before.
    pub async fn first_start(
        &self,
        admin_token_hash: String,
        user: &'static str,
        credit_nano: i64,
        key: ([u8; 32], String),
    ) -> Result<bool, StoreError> {
        self.write(move |tx| {
            let sql = "INSERT INTO settings (name, value) VALUES ('admin_token_hash', ?1) ON CONFLICT DO NOTHING";
            if tx.execute(sql, [admin_token_hash])? == 0 {
                return Ok(false);
            }
            tx.execute("INSERT INTO users (name, created_ms) VALUES (?1, ?2)", params![user, now_ms()])?;
            let user_id = tx.last_insert_rowid();
            if credit_nano > 0 {
                add_credit(tx, user_id, credit_nano, "first start")?;
            }
            insert_key(tx, user_id, &key.0, &key.1, "first")?;
            Ok(true)
        })
        .await
    }

    // Boots and leases: design.md §4b.

    /// Registers a new boot as live.
    pub async fn begin_boot(&self, boot: BootId) -> Result<(), StoreError> {
        self.write(move |tx| {
            tx.execute("INSERT INTO boots (id, started_ms, seen_ms) VALUES (?1, ?2, ?2)", params![boot, now_ms()])?;
            Ok(())
        })
        .await
    }

    /// Says that the boot lives; `BootGone` when it no longer does.
    pub async fn heartbeat(&self, boot: BootId) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE boots SET seen_ms = ?2 WHERE id = ?1 AND state = 'live'";
            if tx.execute(sql, params![boot, now_ms()])? == 0 { Err(StoreError::BootGone) } else { Ok(()) }
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

    // Prices.

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
            if let Some((version, same)) = last.filter(|(_, last)| *last == price) {
                let _ = same;
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

    // What a running server keeps in memory.

    /// The number of the newest change.
    pub async fn change_sequence(&self) -> Result<i64, StoreError> {
        self.job(|connection| {
            Ok(connection.query_row("SELECT coalesce(max(sequence), 0) FROM changes", [], |row| row.get(0))?)
        })
        .await
    }

    /// Changes after `sequence`, with the newest number; also forgets very old ones.
    pub async fn changes_since(&self, sequence: i64) -> Result<(i64, Vec<Change>), StoreError> {
        self.job(move |connection| {
            let mut newest = sequence;
            let mut changes = Vec::new();
            let mut statement = connection
                .prepare_cached("SELECT sequence, kind, row FROM changes WHERE sequence > ?1 ORDER BY sequence")?;
            let mut rows = statement.query([sequence])?;
            while let Some(row) = rows.next()? {
                newest = row.get(0)?;
                let id: i64 = row.get(2)?;
                changes.push(match row.get_ref(1)?.as_str().unwrap_or_default() {
                    "user" => Change::User(id),
                    "key" => Change::Key(id),
                    "account" => Change::Account,
                    "balance" => Change::Balance(id),
                    _ => Change::Group,
                });
            }
            drop(rows);
            drop(statement);
            if !changes.is_empty() && newest % 1000 < changes.len() as i64 {
                connection.execute("DELETE FROM changes WHERE sequence < ?1", [newest - CHANGES_KEPT])?;
            }
            Ok((newest, changes))
        })
        .await
    }

    /// All groups.
    pub async fn groups(&self) -> Result<Vec<GroupRow>, StoreError> {
        self.job(|connection| {
            let sql = "SELECT id, name, ratio_micro, models, concurrency FROM groups ORDER BY id";
            collect(connection, sql, [], |row| {
                Ok(GroupRow {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    ratio_micro: row.get(2)?,
                    models: names(row, 3)?,
                    concurrency: row.get(4)?,
                })
            })
        })
        .await
    }

    /// All users, or the one with this id.
    pub async fn users(&self, id: Option<i64>) -> Result<Vec<UserRow>, StoreError> {
        self.job(move |connection| {
            let sql = format!("{USER_SELECT} WHERE ?1 IS NULL OR id = ?1 ORDER BY id");
            collect(connection, &sql, [id], user_row)
        })
        .await
    }

    /// The user of this name.
    pub async fn user(&self, name: String) -> Result<UserRow, StoreError> {
        self.job(move |connection| find_user(connection, &name)).await
    }

    /// All keys, or the one with this id; revoked ones too.
    pub async fn keys(&self, id: Option<i64>) -> Result<Vec<KeyRow>, StoreError> {
        self.job(move |connection| {
            let sql = "SELECT id, user_id, hash, hint, name, created_ms, expires_ms, revoked_ms FROM keys
                       WHERE ?1 IS NULL OR id = ?1 ORDER BY id";
            collect(connection, sql, [id], |row| {
                Ok(KeyRow {
                    id: row.get(0)?,
                    user_id: row.get(1)?,
                    hash: row.get(2)?,
                    hint: row.get(3)?,
                    name: row.get(4)?,
                    created_ms: row.get(5)?,
                    expires_ms: row.get(6)?,
                    revoked_ms: row.get(7)?,
                })
            })
        })
        .await
    }

    /// All accounts that were not removed.
    pub async fn accounts(&self) -> Result<Vec<AccountRow>, StoreError> {
        self.job(|connection| {
            let sql =
                "SELECT id, name, endpoint, sealed_key, hint, base_url, models, weight, tier, concurrency, enabled
                       FROM accounts WHERE removed_ms IS NULL ORDER BY id";
            collect(connection, sql, [], |row| {
                Ok(AccountRow {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    endpoint: row.get(2)?,
                    sealed_key: row.get(3)?,
                    hint: row.get(4)?,
                    base_url: row.get(5)?,
                    models: names(row, 6)?,
                    weight: row.get(7)?,
                    tier: row.get(8)?,
                    concurrency: row.get(9)?,
                    enabled: row.get(10)?,
                })
            })
        })
        .await
    }

    // What an operator changes.

    /// Adds a user with a first credit (0: none) and, when given, a key.
    pub async fn add_user(
        &self,
        name: String,
        group: String,
        credit_nano: i64,
        key: Option<([u8; 32], String)>,
    ) -> Result<UserRow, StoreError> {
        self.write(move |tx| {
            let group_id: i64 = tx
                .query_row("SELECT id FROM groups WHERE name = ?1", [&group], |row| row.get(0))
                .optional()?
                .ok_or_else(|| StoreError::Absent(format!("group '{group}'")))?;
            let sql = "INSERT INTO users (name, group_id, created_ms) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";
            if tx.execute(sql, params![name, group_id, now_ms()])? == 0 {
                return Err(StoreError::Refused(format!("there is a user '{name}' already")));
            }
            let user_id = tx.last_insert_rowid();
            if credit_nano > 0 {
                add_credit(tx, user_id, credit_nano, "first credit")?;
            }
            if let Some((hash, hint)) = key {
                insert_key(tx, user_id, &hash, &hint, "")?;
            }
            find_user(tx, &name)
        })
        .await
    }

    /// Credits a user; the amount is above zero.
    pub async fn credit(&self, name: String, amount_nano: i64, note: String) -> Result<UserRow, StoreError> {
        self.write(move |tx| {
            if amount_nano <= 0 {
                return Err(StoreError::Refused("a credit must be above zero".into()));
            }
            let user = find_user(tx, &name)?;
            add_credit(tx, user.id, amount_nano, &note)?;
            find_user(tx, &name)
        })
        .await
    }

    /// Freezes or unfreezes a user.
    pub async fn set_frozen(&self, name: String, frozen: bool) -> Result<UserRow, StoreError> {
        self.write(move |tx| {
            let user = find_user(tx, &name)?;
            tx.execute("UPDATE users SET frozen = ?2 WHERE id = ?1", params![user.id, frozen])?;
            find_user(tx, &name)
        })
        .await
    }

    /// Adds a key to a user; returns its id.
    pub async fn add_key(&self, user: String, hash: [u8; 32], hint: String, name: String) -> Result<i64, StoreError> {
        self.write(move |tx| {
            let user = find_user(tx, &user)?;
            insert_key(tx, user.id, &hash, &hint, &name)?;
            Ok(tx.last_insert_rowid())
        })
        .await
    }

    /// Revokes a key for good.
    pub async fn revoke_key(&self, id: i64) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE keys SET revoked_ms = ?2 WHERE id = ?1 AND revoked_ms IS NULL";
            match tx.execute(sql, params![id, now_ms()])? {
                0 => Err(StoreError::Absent(format!("key {id} that is in use"))),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Adds an account; returns its id. The name of a removed account may be used again.
    pub async fn add_account(&self, account: NewAccount) -> Result<i64, StoreError> {
        self.write(move |tx| {
            let models = account.models.map(|models| serde_json::Value::from(models).to_string());
            let added = tx.execute(
                "INSERT INTO accounts (name, endpoint, sealed_key, hint, base_url, models, weight, tier, concurrency, created_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT DO NOTHING",
                params![
                    account.name,
                    account.endpoint,
                    account.sealed_key,
                    account.hint,
                    account.base_url,
                    models,
                    account.weight,
                    account.tier,
                    account.concurrency,
                    now_ms()
                ],
            )?;
            match added {
                0 => Err(StoreError::Refused(format!("there is an account '{}' already", account.name))),
                _ => Ok(tx.last_insert_rowid()),
            }
        })
        .await
    }

    /// Enables or disables an account.
    pub async fn set_account_enabled(&self, name: String, enabled: bool) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE accounts SET enabled = ?2 WHERE name = ?1 AND removed_ms IS NULL";
            match tx.execute(sql, params![name, enabled])? {
                0 => Err(StoreError::Absent(format!("account '{name}'"))),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Removes an account: its key is forgotten, its id stays for the lines that name it.
    pub async fn remove_account(&self, name: String) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE accounts SET removed_ms = ?2, enabled = 0, sealed_key = x'', name = name || ' #' || id
                       WHERE name = ?1 AND removed_ms IS NULL";
            match tx.execute(sql, params![name, now_ms()])? {
                0 => Err(StoreError::Absent(format!("account '{name}'"))),
                _ => Ok(()),
            }
        })
        .await
    }

    // What an operator reads.

    /// Lines with the name of their user, newest first.
    pub async fn lines(&self, filter: LineFilter) -> Result<Vec<(String, Line)>, StoreError> {
        self.job(move |connection| {
            let sql = format!(
                "SELECT {LINE_COLUMNS}, users.name FROM lines JOIN users ON users.id = lines.user_id
                 WHERE (?1 IS NULL OR users.name = ?1) AND (?2 IS NULL OR model = ?2) AND (?3 IS NULL OR started_ms >= ?3)
                 ORDER BY started_ms DESC, sequence DESC LIMIT ?4"
            );
            let given = params![filter.user, filter.model, filter.since_ms, filter.limit];
            collect(connection, &sql, given, |row| Ok((row.get(LINE_FIELDS)?, line_row(row)?)))
        })
        .await
    }

    /// Adds everything up in one transaction and lets `check` look at each line.
    pub async fn audit(&self, check: LineCheck) -> Result<Audit, StoreError> {
        self.job(move |connection| {
            let tx = connection.transaction()?;
            let users = collect(
                &tx,
                "SELECT id, name,
                        (SELECT coalesce(sum(amount_nano), 0) FROM entries WHERE user_id = users.id),
                        (SELECT coalesce(sum(charged_nano), 0) FROM lines WHERE user_id = users.id),
                        balance_nano,
                        (SELECT coalesce(sum(amount_nano), 0) FROM leases WHERE user_id = users.id)
                 FROM users ORDER BY id",
                [],
                |row| {
                    Ok(UserSums {
                        user_id: row.get(0)?,
                        name: row.get(1)?,
                        entries_nano: row.get(2)?,
                        charged_nano: row.get(3)?,
                        balance_nano: row.get(4)?,
                        leased_nano: row.get(5)?,
                    })
                },
            )?;
            let mut audit = Audit { users, lines: 0, charged_nano: 0, absorbed_nano: 0, findings: Vec::new() };
            let mut statement = tx.prepare(&format!(
                "SELECT {LINE_COLUMNS}, input_nano, cached_input_nano, output_nano, per_call_nano
                 FROM lines JOIN prices ON prices.version = lines.price_version"
            ))?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let line = line_row(row)?;
                audit.lines += 1;
                audit.charged_nano += line.charged_nano;
                audit.absorbed_nano += line.absorbed_nano;
                if let Some(finding) = check(&line, &price_row(row, LINE_FIELDS)?)
                    && audit.findings.len() < FINDINGS_MAX
                {
                    audit.findings.push(finding);
                }
            }
            Ok(audit)
        })
        .await
    }
}

fn collect<T>(
    connection: &Connection,
    sql: &str,
    given: impl rusqlite::Params,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, StoreError> {
    Ok(connection.prepare_cached(sql)?.query_map(given, read)?.collect::<Result<_, _>>()?)
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

const USER_SELECT: &str = "SELECT id, name, group_id, balance_nano,
    (SELECT coalesce(sum(amount_nano), 0) FROM leases WHERE user_id = users.id), frozen, created_ms FROM users";

fn user_row(row: &Row<'_>) -> rusqlite::Result<UserRow> {
    Ok(UserRow {
        id: row.get(0)?,
        name: row.get(1)?,
        group_id: row.get(2)?,
        balance_nano: row.get(3)?,
        leased_nano: row.get(4)?,
        frozen: row.get(5)?,
        created_ms: row.get(6)?,
    })
}

fn find_user(connection: &Connection, name: &str) -> Result<UserRow, StoreError> {
    connection
        .query_row(&format!("{USER_SELECT} WHERE name = ?1"), [name], user_row)
        .optional()?
        .ok_or_else(|| StoreError::Absent(format!("user '{name}'")))
}

fn add_credit(tx: &Transaction<'_>, user_id: i64, amount_nano: i64, note: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE users SET balance_nano = balance_nano + ?2 WHERE id = ?1", params![user_id, amount_nano])?;
    tx.execute(
        "INSERT INTO entries (user_id, amount_nano, note, at_ms) VALUES (?1, ?2, ?3, ?4)",
        params![user_id, amount_nano, note, now_ms()],
    )?;
    Ok(())
}

fn insert_key(tx: &Transaction<'_>, user_id: i64, hash: &[u8; 32], hint: &str, name: &str) -> Result<(), StoreError> {
    let sql =
        "INSERT INTO keys (user_id, hash, hint, name, created_ms) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING";
    match tx.execute(sql, params![user_id, hash, hint, name, now_ms()])? {
        0 => Err(StoreError::Refused("this key exists already".into())),
        _ => Ok(()),
    }
}

fn price_row(row: &Row<'_>, first: usize) -> rusqlite::Result<PriceRow> {
    Ok(PriceRow {
        input_nano: row.get(first)?,
        cached_input_nano: row.get(first + 1)?,
        output_nano: row.get(first + 2)?,
        per_call_nano: row.get(first + 3)?,
    })
}

/// A JSON array of names, or NULL.
fn names(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<Vec<String>>> {
    match row.get_ref(index)? {
        ValueRef::Null => Ok(None),
        value => {
            let text = value.as_str().map_err(|error| {
                rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, Box::new(error))
            })?;
            serde_json::from_str(text).map(Some).map_err(|error| {
                rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, Box::new(error))
            })
        }
    }
}

/// The columns of a line after its boot, in the order of [`Line`]'s fields.
const LINE_COLUMNS: &str = "lines.sequence, request_id, client_request_id, lines.user_id, key_id, ratio_micro, account_id,
    endpoint, model_asked, lines.model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries";
const LINE_FIELDS: usize = 35;

const LINE_INSERT: &str = "INSERT INTO lines (boot, sequence, request_id, client_request_id, user_id, key_id, ratio_micro,
    account_id, endpoint, model_asked, model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24,
    ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34, ?35, ?36) ON CONFLICT DO NOTHING";

fn insert_line(insert: &mut rusqlite::CachedStatement<'_>, boot: BootId, line: &Line) -> Result<bool, StoreError> {
    let given: [&dyn ToSql; LINE_FIELDS + 1] = [
        &boot,
        &(line.sequence as i64),
        &line.request_id,
        &line.client_request_id,
        &line.user_id,
        &line.key_id,
        &line.ratio_micro,
        &line.account_id,
        &line.endpoint,
        &line.model_asked,
        &line.model,
        &line.model_upstream,
        &line.price_version,
        &line.tier,
        &(line.input as i64),
        &(line.cached_input as i64),
        &(line.output as i64),
        &line.usage_input.map(|n| n as i64),
        &line.usage_cached.map(|n| n as i64),
        &line.usage_output.map(|n| n as i64),
        &line.usage_reasoning.map(|n| n as i64),
        &line.counted_input.map(|n| n as i64),
        &line.counted_output.map(|n| n as i64),
        &line.billed.name(),
        &line.calibration_micro,
        &line.estimated,
        &line.flagged,
        &line.hold_nano,
        &line.charged_nano,
        &line.absorbed_nano,
        &line.started_ms,
        &line.content_after_ms.map(|n| n as i64),
        &(line.duration_ms as i64),
        &line.end_reason.name(),
        &line.status,
        &line.tries,
    ];
    Ok(insert.execute(given.as_slice())? > 0)
}

fn line_row(row: &Row<'_>) -> rusqlite::Result<Line> {
    let tokens = |index: usize| -> rusqlite::Result<u64> { Ok(row.get::<_, i64>(index)?.max(0) as u64) };
    let maybe = |index: usize| -> rusqlite::Result<Option<u64>> {
        Ok(row.get::<_, Option<i64>>(index)?.map(|n| n.max(0) as u64))
    };
    let unknown = |index: usize| rusqlite::Error::InvalidColumnType(index, "name".into(), rusqlite::types::Type::Text);
    Ok(Line {
        sequence: tokens(0)?,
        request_id: row.get(1)?,
        client_request_id: row.get(2)?,
        user_id: row.get(3)?,
        key_id: row.get(4)?,
        ratio_micro: row.get(5)?,
        account_id: row.get(6)?,
        endpoint: row.get(7)?,
        model_asked: row.get(8)?,
        model: row.get(9)?,
        model_upstream: row.get(10)?,
        price_version: row.get(11)?,
        tier: row.get(12)?,
        input: tokens(13)?,
        cached_input: tokens(14)?,
        output: tokens(15)?,
        usage_input: maybe(16)?,
        usage_cached: maybe(17)?,
        usage_output: maybe(18)?,
        usage_reasoning: maybe(19)?,
        counted_input: maybe(20)?,
        counted_output: maybe(21)?,
        billed: Billed::of(row.get_ref(22)?.as_str().unwrap_or_default()).ok_or_else(|| unknown(22))?,
        calibration_micro: row.get(23)?,
        estimated: row.get(24)?,
        flagged: row.get(25)?,
        hold_nano: row.get(26)?,
        charged_nano: row.get(27)?,
        absorbed_nano: row.get(28)?,
        started_ms: row.get(29)?,
        content_after_ms: maybe(30)?,
        duration_ms: tokens(31)?,
        end_reason: EndReason::of(row.get_ref(32)?.as_str().unwrap_or_default()).ok_or_else(|| unknown(32))?,
        status: row.get(33)?,
        tries: row.get(34)?,
    })
}
