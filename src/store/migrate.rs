//! Brings a database to this binary's schema: numbered, forward only, each step in a transaction of its own, under a
//! lock, so that programs that start together do not collide. A database newer than this binary is refused.

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;
use super::postgres::Lent;
use super::tx::Tx;

/// The steps for SQLite, in order; a step is never edited once released.
static SQLITE: [&str; 6] = [
    include_str!("../../sql/sqlite/001_start.sql"),
    include_str!("../../sql/sqlite/002_changes.sql"),
    include_str!("../../sql/sqlite/003_prices.sql"),
    include_str!("../../sql/sqlite/004_days_and_limits.sql"),
    include_str!("../../sql/sqlite/005_units.sql"),
    include_str!("../../sql/sqlite/006_templates.sql"),
];
/// The same steps for PostgreSQL.
static POSTGRES: [&str; 6] = [
    include_str!("../../sql/postgres/001_start.sql"),
    include_str!("../../sql/postgres/002_changes.sql"),
    include_str!("../../sql/postgres/003_prices.sql"),
    include_str!("../../sql/postgres/004_days_and_limits.sql"),
    include_str!("../../sql/postgres/005_units.sql"),
    include_str!("../../sql/postgres/006_templates.sql"),
];
/// Locks the migration of a PostgreSQL database: "gpt-cat" in ASCII.
const LOCK: i64 = 0x67_70_74_2d_63_61_74;

fn next(steps: &[&'static str], found: i64) -> Result<Option<&'static str>, StoreError> {
    let newer = StoreError::SchemaNewer { found };
    match usize::try_from(found) {
        Ok(applied) if applied <= steps.len() => Ok(steps.get(applied).copied()),
        _ => Err(newer),
    }
}

/// Applies what is missing. `user_version` is the number of the last step applied.
pub fn sqlite(connection: &mut Connection) -> Result<(), StoreError> {
    loop {
        let step = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version: i64 = step.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let Some(sql) = next(&SQLITE, version)? else { return Ok(()) };
        step.execute_batch(sql)?;
        step.pragma_update(None, "user_version", version + 1)?;
        step.commit()?;
    }
}

/// Applies what is missing. `schema_steps` has the numbers of those applied.
pub async fn postgres(lent: &mut Lent) -> Result<(), StoreError> {
    loop {
        let step = lent.begin(true).await?;
        step.batch(&format!("SELECT pg_advisory_xact_lock({LOCK})")).await?;
        step.batch("CREATE TABLE IF NOT EXISTS schema_steps (number BIGINT PRIMARY KEY)").await?;
        let version = step.row("SELECT coalesce(max(number), 0) FROM schema_steps", &[]).await?;
        let version = version.ok_or(StoreError::Moved)?.get(0)?;
        let Some(sql) = next(&POSTGRES, version)? else { return Ok(()) };
        step.batch(sql).await?;
        step.batch(&format!("INSERT INTO schema_steps (number) VALUES ({})", version + 1)).await?;
        step.commit().await?;
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
