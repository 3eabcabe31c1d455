//! The embedded database: one thread that owns one connection, since SQLite has one writer at a time anyway.
//!
//! A job, once sent, runs to its end whether or not the asker still waits; who must know the outcome asks from a task
//! that nobody cancels.

use std::fs;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rusqlite::ffi::SQLITE_CONSTRAINT_FOREIGNKEY;
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ToSql, Transaction, TransactionBehavior, params, params_from_iter};
use tokio::sync::{mpsc, oneshot};

use super::lines::{LINE_INSERT, fields};
use super::tx::{Cell, Row, Tx, Value};
use super::{BootId, DayRow, Line, StoreError, days, migrate, now_ms};

/// Jobs that wait for the thread; beyond it the asker waits.
const JOBS_MAX: usize = 1024;
/// How long a write waits for another process (a subcommand beside the server).
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Statements that stay prepared: all of a running server's.
const STATEMENTS: usize = 64;
type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle to the thread; cheap to clone.
#[derive(Clone, Debug)]
pub struct Sqlite {
    jobs: mpsc::Sender<Job>,
}

impl Sqlite {
    /// Opens the file, makes it and its folder when absent, and migrates it.
    pub fn open(path: &Path) -> Result<Sqlite, StoreError> {
        let failed = |why: String| StoreError::Open(path.display().to_string(), why);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| failed(error.to_string()))?;
        }
        let mut connection = Connection::open(path).map_err(|error| failed(error.to_string()))?;
        // FULL: a commit of money is on disk before anybody acts on it.
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(|error| failed(error.to_string()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
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
        Ok(Sqlite { jobs })
    }

    /// One transaction; one that writes takes the write lock at its start.
    pub async fn run<T: Send + 'static>(
        &self,
        writes: bool,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, waiting) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let behavior = if writes { TransactionBehavior::Immediate } else { TransactionBehavior::Deferred };
            let worked = connection.transaction_with_behavior(behavior).map_err(StoreError::from).and_then(|tx| {
                let result = work(&tx)?;
                tx.commit()?;
                Ok(result)
            });
            let _ = answer.send(worked); // the asker may have left
        });
        let stopped = || StoreError::Database("its thread has stopped".into());
        self.jobs.send(job).await.map_err(|_| stopped())?;
        waiting.await.map_err(|_| stopped())?
    }
}

/// Runs what never waits: a transaction of SQLite does all its work when it is polled.
pub fn at_once<T>(work: impl Future<Output = T>) -> T {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("nothing in a transaction of SQLite waits"),
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        match error.sqlite_error() {
            Some(code) if code.extended_code == SQLITE_CONSTRAINT_FOREIGNKEY => StoreError::Dangling,
            _ => StoreError::Database(error.to_string()),
        }
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match self {
            Value::Int(value) => value.to_sql(),
            Value::Text(value) => value.to_sql(),
            Value::Blob(value) => value.to_sql(),
            Value::Bool(value) => value.to_sql(),
        }
    }
}

impl Tx for Transaction<'_> {
    const FOR_UPDATE: &'static str = ""; // the whole database is locked

    fn ids(parameter: &str) -> String {
        format!("SELECT value FROM json_each({parameter})")
    }

    async fn execute(&self, sql: &str, given: &[Value]) -> Result<u64, StoreError> {
        Ok(self.prepare_cached(&numbered(sql))?.execute(params_from_iter(given))? as u64)
    }

    async fn rows(&self, sql: &str, given: &[Value]) -> Result<Vec<Row>, StoreError> {
        let mut statement = self.prepare_cached(&numbered(sql))?;
        let columns = statement.column_count();
        let read = |row: &rusqlite::Row<'_>| {
            (0..columns).map(|index| Ok(cell(row.get_ref(index)?))).collect::<rusqlite::Result<Vec<_>>>().map(Row)
        };
        Ok(statement.query_map(params_from_iter(given), read)?.collect::<Result<_, _>>()?)
    }

    async fn now_ms(&self) -> Result<i64, StoreError> {
        Ok(now_ms())
    }

    async fn snapshot(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn tell_short(&self, user_id: i64, _asking: BootId) -> Result<(), StoreError> {
        self.execute("INSERT INTO changes (kind, row_id) VALUES ('short', $1)", &[user_id.into()]).await?;
        Ok(())
    }

    async fn insert_lines(&self, boot: BootId, lines: &[Line]) -> Result<Vec<u64>, StoreError> {
        let mut insert = self.prepare_cached(LINE_INSERT)?;
        let mut inserted = Vec::with_capacity(lines.len());
        let mut bound = None;
        for line in lines {
            let values = fields(boot, line);
            // Most of what a line says the one before it said as well, and what was bound for that one still is.
            for (index, value) in values.iter().enumerate() {
                if bound.as_ref().is_none_or(|bound: &[Value; _]| bound[index] != *value) {
                    insert.raw_bind_parameter(index + 1, value)?;
                }
            }
            bound = Some(values);
            if insert.raw_execute()? > 0 {
                inserted.push(line.sequence);
            }
        }
        Ok(inserted)
    }

    async fn add_days(&self, rows: &[DayRow]) -> Result<(), StoreError> {
        let mut add = self.prepare_cached(&days::upsert("VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"))?;
        for row in rows {
            add.execute(params_from_iter(days::fields(row)))?;
        }
        Ok(())
    }

    async fn lease_amounts(&self, boot: BootId, users: Vec<i64>) -> Result<Vec<(i64, i64)>, StoreError> {
        let mut find = self.prepare_cached("SELECT amount_nano FROM leases WHERE user_id = ?1 AND boot = ?2")?;
        let mut amounts = Vec::with_capacity(users.len());
        for user in users {
            for amount in find.query_map(params![user, boot], |row| row.get(0))? {
                amounts.push((user, amount?));
            }
        }
        Ok(amounts)
    }

    async fn lock_balances(&self, users: Vec<i64>) -> Result<Vec<(i64, i64, i64)>, StoreError> {
        let sql = "SELECT id, balance_nano, (SELECT count(*) FROM boots WHERE state = 'live') FROM users WHERE id = ?1";
        let mut find = self.prepare_cached(sql)?;
        let mut balances = Vec::with_capacity(users.len());
        for user in users {
            for row in find.query_map(params![user], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))? {
                balances.push(row?);
            }
        }
        Ok(balances)
    }

    async fn lease_out(&self, boot: BootId, amounts: Vec<(i64, i64)>) -> Result<Vec<Row>, StoreError> {
        let mut rows = Vec::with_capacity(amounts.len());
        for (user, amount) in amounts {
            let taken = "UPDATE users SET balance_nano = balance_nano - $2 WHERE id = $1";
            self.execute(taken, &[user.into(), amount.into()]).await?;
            let leased = "INSERT INTO leases (user_id, boot, amount_nano, granted_nano) VALUES ($1, $2, $3, $3)
                          ON CONFLICT (user_id, boot) DO UPDATE SET amount_nano = leases.amount_nano + excluded.amount_nano,
                          granted_nano = leases.granted_nano + excluded.granted_nano, version = leases.version + 1
                          RETURNING amount_nano, granted_nano, version, user_id";
            rows.extend(self.rows(leased, &[user.into(), boot.into(), amount.into()]).await?);
        }
        Ok(rows)
    }

    async fn forget_leases(&self, boot: BootId, users: Vec<i64>) -> Result<Vec<i64>, StoreError> {
        let sql = "DELETE FROM leases WHERE user_id = ?1 AND boot = ?2 AND amount_nano = 0";
        let mut forget = self.prepare_cached(sql)?;
        let mut forgotten = Vec::new();
        for user in users {
            if forget.execute(params![user, boot])? > 0 {
                forgotten.push(user);
            }
        }
        Ok(forgotten)
    }

    async fn cap_lines(&self, boot: BootId, capped: Vec<(u64, i64, i64)>) -> Result<(), StoreError> {
        let sql = "UPDATE lines SET charged_nano = ?3, absorbed_nano = absorbed_nano + ?4, flagged = TRUE
                   WHERE boot = ?1 AND sequence = ?2";
        let mut cap = self.prepare_cached(sql)?;
        for (sequence, charged, absorbed) in capped {
            cap.execute(params![boot, sequence as i64, charged, absorbed])?;
        }
        Ok(())
    }

    async fn charge_leases(&self, boot: BootId, charges: Vec<(i64, i64)>) -> Result<Vec<i64>, StoreError> {
        let sql =
            "UPDATE leases SET amount_nano = amount_nano - ?3 WHERE user_id = ?1 AND boot = ?2 AND amount_nano >= ?3";
        let mut charge = self.prepare_cached(sql)?;
        let mut charged = Vec::with_capacity(charges.len());
        for (user, amount) in charges {
            if charge.execute(params![user, boot, amount])? == 1 {
                charged.push(user);
            }
        }
        Ok(charged)
    }
}

fn cell(value: ValueRef<'_>) -> Cell {
    match value {
        ValueRef::Null => Cell::Null,
        ValueRef::Integer(value) => Cell::Int(value),
        ValueRef::Real(value) => Cell::Int(value as i64), // no column holds one
        ValueRef::Text(value) => Cell::Text(String::from_utf8_lossy(value).into_owned()),
        ValueRef::Blob(value) => Cell::Blob(value.to_vec()),
    }
}

/// SQLite takes `$1` for a name and numbers names as they come; `?1` is a number.
fn numbered(sql: &str) -> String {
    sql.replace('$', "?")
}
