//! The embedded database: one thread that owns one connection, since SQLite has one writer at a time anyway.
//!
//! A job, once sent, runs to its end whether or not the asker still waits; who must know the outcome asks from a task
//! that nobody cancels.

mod books;
mod desk;
mod lines;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};

use super::{StoreError, migrate};

/// Jobs that wait for the thread; beyond it the asker waits.
const JOBS_MAX: usize = 1024;
/// How long a write waits for another process (a subcommand beside the server).
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
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
}

fn collect<T>(
    connection: &Connection,
    sql: &str,
    given: impl rusqlite::Params,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, StoreError> {
    Ok(connection.prepare_cached(sql)?.query_map(given, read)?.collect::<Result<_, _>>()?)
}
