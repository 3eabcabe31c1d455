//! Rows in and out of the database; the only SQL.
//!
//! Every method is one transaction. Money moves only here, under the constraints of the schema: no balance and no lease
//! is ever below zero, and Σ credits − Σ charges = Σ balances + Σ leases at every commit.

mod audit;
mod migrate;
mod rows;
mod seal;
mod sqlite;

use std::fmt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

pub use audit::{Audit, LineCheck, UserSums};
pub use rows::{
    AccountRow, Billed, BootId, BootState, Change, EndReason, GroupRow, KeyRow, LeaseRow, Line, LineFilter, NewAccount,
    PriceRow, UserRow,
};
pub use seal::{MasterKey, SealError, hex, random};
pub use sqlite::Store;

/// Why the store did not do what was asked.
#[derive(Debug)]
pub enum StoreError {
    /// The database was migrated by a newer binary.
    SchemaNewer { found: i64 },
    /// There is no such row; says what was looked for.
    Absent(String),
    /// A rule of the data forbids it; says which, for the operator.
    Refused(String),
    /// The boot that asks is no longer live: its leases are no longer its own.
    BootGone,
    /// The watermark or version is not what the caller believes; it has to read again.
    Moved,
    /// The file cannot be opened.
    Open(PathBuf, String),
    /// The database failed; whether a commit happened is unknown.
    Database(String),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::SchemaNewer { found } => {
                write!(f, "the database has schema {found}, which is newer than this binary knows; use a newer binary")
            }
            StoreError::Absent(what) => write!(f, "there is no {what}"),
            StoreError::Refused(why) => f.write_str(why),
            StoreError::BootGone => f.write_str("this process's boot is no longer live in the database"),
            StoreError::Moved => f.write_str("the row has moved on since it was read"),
            StoreError::Open(path, why) => write!(f, "cannot open the database {}: {why}", path.display()),
            StoreError::Database(why) => write!(f, "database: {why}"),
        }
    }
}

impl std::error::Error for StoreError {}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        StoreError::Database(error.to_string())
    }
}

/// Milliseconds since 1970 UTC.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
