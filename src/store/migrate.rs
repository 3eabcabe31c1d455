//! Brings a database to this binary's schema: numbered, forward only, each step in a transaction of its own.

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// The steps for SQLite, in order; a step is never edited once released.
static SQLITE: [&str; 1] = [include_str!("../../sql/sqlite/001_start.sql")];

/// Applies what is missing. `user_version` is the number of the last step applied.
///
/// Programs that start together do not collide: each step begins with a write lock and reads the number under it.
/// A database newer than this binary is refused.
pub fn sqlite(connection: &mut Connection) -> Result<(), StoreError> {
    loop {
        let step = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version: i64 = step.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let applied = usize::try_from(version).map_err(|_| StoreError::SchemaNewer { found: version })?;
        if applied > SQLITE.len() {
            return Err(StoreError::SchemaNewer { found: version });
        }
        let Some(sql) = SQLITE.get(applied) else { return Ok(()) };
        step.execute_batch(sql)?;
        step.pragma_update(None, "user_version", version + 1)?;
        step.commit()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_newer_than_the_binary_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        sqlite(&mut connection).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        assert!(matches!(sqlite(&mut connection), Err(StoreError::SchemaNewer { found: 99 })));
    }

    #[test]
    fn migrating_twice_changes_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        sqlite(&mut connection).unwrap();
        sqlite(&mut connection).unwrap();
        let groups: i64 = connection.query_row("SELECT count(*) FROM groups", [], |row| row.get(0)).unwrap();
        assert_eq!(groups, 1);
    }
}
