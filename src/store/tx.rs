//! One transaction of either database: the same statements, the same values.
//!
//! Statements are written once, in the SQL that SQLite and PostgreSQL share: `$1` for parameters (first used in order),
//! `CAST` where PostgreSQL must be told a type, `RETURNING`, `ON CONFLICT`. What only one of them knows is behind [`Tx`].

use super::{BootId, DayRow, Line, StoreError};

/// A parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Int(Option<i64>),
    Text(Option<String>),
    Blob(Vec<u8>),
    Bool(bool),
}

/// What a column gave.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Null,
    Int(i64),
    Text(String),
    Blob(Vec<u8>),
    Bool(bool),
}

/// A row that has left the database.
#[derive(Clone, Debug)]
pub struct Row(pub Vec<Cell>);

impl Row {
    /// The column at `index`; an error where it is of another type, or does not fit.
    pub fn get<T: FromCell>(&self, index: usize) -> Result<T, StoreError> {
        let cell = self.0.get(index).unwrap_or(&Cell::Null);
        T::from_cell(cell).ok_or_else(|| StoreError::Database(format!("column {index} is not what was expected")))
    }
}

/// A type that a column can be read as.
pub trait FromCell: Sized {
    fn from_cell(cell: &Cell) -> Option<Self>;
}

impl FromCell for i64 {
    fn from_cell(cell: &Cell) -> Option<i64> {
        match cell {
            Cell::Int(value) => Some(*value),
            _ => None,
        }
    }
}

impl FromCell for bool {
    fn from_cell(cell: &Cell) -> Option<bool> {
        match cell {
            Cell::Bool(value) => Some(*value),
            Cell::Int(value) => Some(*value != 0), // SQLite has no type of its own for it
            _ => None,
        }
    }
}

impl FromCell for String {
    fn from_cell(cell: &Cell) -> Option<String> {
        match cell {
            Cell::Text(value) => Some(value.clone()),
            _ => None,
        }
    }
}

impl FromCell for Vec<u8> {
    fn from_cell(cell: &Cell) -> Option<Vec<u8>> {
        match cell {
            Cell::Blob(value) => Some(value.clone()),
            _ => None,
        }
    }
}

impl<const N: usize> FromCell for [u8; N] {
    fn from_cell(cell: &Cell) -> Option<[u8; N]> {
        Vec::from_cell(cell)?.try_into().ok()
    }
}

impl<T: FromCell> FromCell for Option<T> {
    fn from_cell(cell: &Cell) -> Option<Option<T>> {
        match cell {
            Cell::Null => Some(None),
            cell => T::from_cell(cell).map(Some),
        }
    }
}

macro_rules! small_integers {
    ($($type:ty)*) => { $(
        impl FromCell for $type {
            fn from_cell(cell: &Cell) -> Option<$type> {
                i64::from_cell(cell)?.try_into().ok()
            }
        }
    )* };
}
small_integers!(u16 u32 u64);

macro_rules! values {
    ($($type:ty: |$value:ident| $made:expr;)*) => { $(
        impl From<$type> for Value {
            fn from($value: $type) -> Value {
                $made
            }
        }
    )* };
}
values! {
    i64: |value| Value::Int(Some(value));
    Option<i64>: |value| Value::Int(value);
    u64: |value| Value::Int(Some(i64::try_from(value).unwrap_or(i64::MAX)));
    Option<u64>: |value| Value::Int(value.map(|value| i64::try_from(value).unwrap_or(i64::MAX)));
    u32: |value| Value::Int(Some(value.into()));
    Option<u32>: |value| Value::Int(value.map(i64::from));
    u16: |value| Value::Int(Some(value.into()));
    bool: |value| Value::Bool(value);
    &str: |value| Value::Text(Some(value.to_owned()));
    String: |value| Value::Text(Some(value));
    &String: |value| Value::Text(Some(value.clone()));
    Option<String>: |value| Value::Text(value);
    Option<&str>: |value| Value::Text(value.map(str::to_owned));
    [u8; 16]: |value| Value::Blob(value.to_vec());
    [u8; 32]: |value| Value::Blob(value.to_vec());
    Vec<u8>: |value| Value::Blob(value);
}

/// Parameters of a statement, each turned into a [`Value`].
macro_rules! given {
    ($($value:expr),* $(,)?) => { &[$($crate::store::tx::Value::from($value)),*] };
}
pub(super) use given;

/// A transaction.
pub trait Tx {
    /// Behind a SELECT whose row nobody else may change until this transaction ends.
    const FOR_UPDATE: &'static str;

    /// A subquery of the ids in a parameter that is a JSON array.
    fn ids(parameter: &str) -> String;

    /// Runs a statement; the number of rows that it changed.
    async fn execute(&self, sql: &str, given: &[Value]) -> Result<u64, StoreError>;

    /// Runs a statement that gives rows.
    async fn rows(&self, sql: &str, given: &[Value]) -> Result<Vec<Row>, StoreError>;

    /// Milliseconds since 1970 UTC, by the database's clock.
    async fn now_ms(&self) -> Result<i64, StoreError>;

    /// From here on every statement of the transaction sees the same state, and none is cut short for its duration.
    async fn snapshot(&self) -> Result<(), StoreError>;

    /// Inserts lines that are not there yet; the sequences of those that were inserted.
    async fn insert_lines(&self, boot: BootId, lines: &[Line]) -> Result<Vec<u64>, StoreError>;

    /// Adds to what days came to.
    async fn add_days(&self, rows: &[DayRow]) -> Result<(), StoreError>;

    /// What a boot has leased of these users' money.
    async fn lease_amounts(&self, boot: BootId, users: Vec<i64>) -> Result<Vec<(i64, i64)>, StoreError>;

    /// Takes charges, by user, out of those of a boot's leases that have so much; whose they are.
    async fn charge_leases(&self, boot: BootId, charges: Vec<(i64, i64)>) -> Result<Vec<i64>, StoreError>;

    /// Balances of these users, which nobody else may change until this transaction ends, with the number of live boots;
    /// the users come in order.
    async fn lock_balances(&self, users: Vec<i64>) -> Result<Vec<(i64, i64, i64)>, StoreError>;

    /// Moves amounts, by user, from balances into a boot's leases; of each lease amount, granted, version and user.
    async fn lease_out(&self, boot: BootId, amounts: Vec<(i64, i64)>) -> Result<Vec<Row>, StoreError>;

    /// Deletes those of these users' leases that have nothing; whose they were.
    async fn forget_leases(&self, boot: BootId, users: Vec<i64>) -> Result<Vec<i64>, StoreError>;

    /// Sets what lines are charged, by sequence, and absorbs the rest beside it; flags them.
    async fn cap_lines(&self, boot: BootId, capped: Vec<(u64, i64, i64)>) -> Result<(), StoreError>;

    /// Tells every node that `asking` is short of a user's money, once this transaction has committed.
    async fn tell_short(&self, user_id: i64, asking: BootId) -> Result<(), StoreError>;

    /// The first row of a statement.
    async fn row(&self, sql: &str, given: &[Value]) -> Result<Option<Row>, StoreError> {
        Ok(self.rows(sql, given).await?.into_iter().next())
    }
}
