//! Brings a database to this binary's schema: numbered, forward only, each step in a transaction of its own, under a
//! lock, so that programs that start together do not collide. A database newer than this binary is refused.

use rusqlite::{Connection, TransactionBehavior};

use super::postgres::Lent;
use super::tx::{Tx, given};
use super::{StoreError, now_ms};

/// The steps for SQLite, in order; a step is never edited once released.
static SQLITE: [&str; 7] = [
    include_str!("../../sql/sqlite/001_start.sql"),
    include_str!("../../sql/sqlite/002_changes.sql"),
    include_str!("../../sql/sqlite/003_prices.sql"),
    include_str!("../../sql/sqlite/004_days_and_limits.sql"),
    include_str!("../../sql/sqlite/005_units.sql"),
    include_str!("../../sql/sqlite/006_templates.sql"),
    include_str!("../../sql/sqlite/007_limits.sql"),
];
/// The same steps for PostgreSQL.
static POSTGRES: [&str; 7] = [
    include_str!("../../sql/postgres/001_start.sql"),
    include_str!("../../sql/postgres/002_changes.sql"),
    include_str!("../../sql/postgres/003_prices.sql"),
    include_str!("../../sql/postgres/004_days_and_limits.sql"),
    include_str!("../../sql/postgres/005_units.sql"),
    include_str!("../../sql/postgres/006_templates.sql"),
    include_str!("../../sql/postgres/007_limits.sql"),
];
/// Locks the migration of a PostgreSQL database: "gpt-cat" in ASCII.
const LOCK: i64 = 0x67_70_74_2d_63_61_74;

/// A server that was heard of within this time runs, by a schema that it must not lose.
const HEARD_MS: i64 = 15_000;
/// Servers that run, by when they were heard of.
const RUNNING: &str = "SELECT max(seen_ms) FROM boots WHERE state = 'live' AND seen_ms > $1";

/// Refuses a step while a server of an earlier version runs on the database; `seen_ms`: when one was heard of last.
fn alone(seen_ms: Option<i64>, now_ms: i64) -> Result<(), StoreError> {
    let Some(seen_ms) = seen_ms else { return Ok(()) };
    let left_s = (seen_ms + HEARD_MS - now_ms).max(0).div_euclid(1000) + 1;
    Err(StoreError::Refused(format!(
        "the database has to be migrated, and a server of an earlier version runs on it: stop it first (one that was \
         killed counts as running for another {left_s} s)"
    )))
}

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
        if version > 0 {
            let now = now_ms();
            alone(step.query_row(RUNNING, [now - HEARD_MS], |row| row.get(0))?, now)?;
        }
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
        if version > 0 {
            let now = step.now_ms().await?;
            let running = step.row(RUNNING, given![now - HEARD_MS]).await?.ok_or(StoreError::Moved)?;
            alone(running.get(0)?, now)?;
        }
        step.batch(sql).await?;
        step.batch(&format!("INSERT INTO schema_steps (number) VALUES ({})", version + 1)).await?;
        step.commit().await?;
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::LINE_INSERT;
    use super::super::tests::cluster;
    use super::super::{DayFilter, LineFilter, Store};
    use super::*;
    use crate::config::{DatabaseUrl, Price};

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

    #[test]
    fn a_line_is_checked_and_no_table_is_made_for_its_check() {
        let mut connection = Connection::open_in_memory().unwrap();
        sqlite(&mut connection).unwrap();
        let mut explained = connection.prepare(&format!("EXPLAIN {LINE_INSERT}")).unwrap();
        let (mut rows, mut steps) = (explained.raw_query(), Vec::<String>::new());
        while let Some(row) = rows.next().unwrap() {
            steps.push(row.get("opcode").unwrap());
        }
        assert!(steps.iter().any(|step| step == "IdxInsert"), "{steps:?}");
        assert!(!steps.iter().any(|step| step.starts_with("OpenEphemeral")), "{steps:?}");
        for sql in left(now_ms(), |hex| format!("x'{hex}'")) {
            connection.execute(&sql, []).unwrap();
        }
        let failed = connection.execute("UPDATE lines SET billed = 'other'", []).unwrap_err().to_string();
        assert!(failed.contains("CHECK constraint failed: billed"), "{failed}");
        let sound: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(sound, "ok");
    }

    /// What a server of the first version left: a user with a lease, a price, and a line. Both databases take it.
    const LEFT: [&str; 9] = [
        "INSERT INTO users (name, balance_nano, created_ms) VALUES ('ann', 60, 0)",
        "INSERT INTO entries (user_id, amount_nano, at_ms) VALUES (1, 100, 0)",
        "INSERT INTO keys (user_id, hash, hint, created_ms) VALUES (1, HASH, 'hint', 0)",
        "INSERT INTO boots (id, state, started_ms, seen_ms, shipped) VALUES (BOOT, 'live', 0, SEEN, 1)",
        "INSERT INTO leases (user_id, boot, amount_nano, granted_nano) VALUES (1, BOOT, 30, 40)",
        "INSERT INTO prices (model, input_nano, cached_input_nano, output_nano, per_call_nano, from_ms)
         VALUES ('m', 1000000, 1000000, 2000000, 0, 0)",
        "INSERT INTO lines (boot, sequence, request_id, user_id, key_id, ratio_micro, model_asked, model, price_version,
         input, cached_input, output, billed, hold_nano, charged_nano, absorbed_nano, started_ms, duration_ms, end_reason,
         status, tries) VALUES (BOOT, 1, 'r', 1, 1, 1000000, 'm', 'm', 1, 4, 0, 3, 'usage', 20, 10, 0, 5, 1, 'complete',
         200, 1)",
        "INSERT INTO accounts (name, endpoint, sealed_key, hint, created_ms) VALUES ('a', 'e', HASH, 'hint', 0)",
        "INSERT INTO settings (name, value) VALUES ('currency', 'USD')",
    ];

    fn left(seen_ms: i64, blob: impl Fn(&str) -> String) -> Vec<String> {
        let fill = |sql: &str| {
            let sql = sql.replace("HASH", &blob(&"11".repeat(32))).replace("BOOT", &blob(&"22".repeat(16)));
            sql.replace("SEEN", &seen_ms.to_string())
        };
        LEFT.iter().map(|sql| fill(sql)).collect()
    }

    async fn assert_kept(store: &Store) {
        let audit = store.audit(|_, _| None).await.unwrap();
        assert_eq!((audit.findings, audit.lines, audit.users[0].difference_nano()), (vec![], 1, 0));
        let days = store.days(DayFilter { limit: 9, ..DayFilter::default() }).await.unwrap();
        assert_eq!((days.len(), days[0].1.charged_nano, days[0].1.output), (1, 10, 3), "days were added up");
        let line = store.lines(LineFilter { limit: 9, ..LineFilter::default() }).await.unwrap().pop().unwrap().1;
        assert_eq!((line.charged_nano, line.units, line.usage_audio_input), (10, 1, None));
        assert_eq!(store.prices().await.unwrap()[&1], Price::plain(1_000_000, 2_000_000));
        assert_eq!(store.keys(None).await.unwrap()[0].limit_nano, None);
        assert_eq!(store.accounts().await.unwrap()[0].name, "a");
        // It goes on from there: the boot is settled, and its lease goes back.
        store.close_boot([0x22; 16]).await.unwrap();
        assert_eq!(store.user("ann".into()).await.unwrap().balance_nano, 90);
    }

    #[tokio::test]
    async fn a_database_with_data_is_migrated_once_its_server_has_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.db");
        let url = DatabaseUrl::Sqlite(path.clone());
        let blob = |hex: &str| format!("x'{hex}'");
        {
            let connection = Connection::open(&path).unwrap();
            connection.execute_batch(SQLITE[0]).unwrap();
            connection.pragma_update(None, "user_version", 1).unwrap();
            for sql in left(now_ms(), blob) {
                connection.execute(&sql, []).unwrap();
            }
        }
        let refused = Store::open(&url).await.unwrap_err().to_string();
        assert!(refused.contains("a server of an earlier version runs on it: stop it first"), "{refused}");
        Connection::open(&path).unwrap().execute("UPDATE boots SET seen_ms = seen_ms - 15001", []).unwrap();
        assert_kept(&Store::open(&url).await.unwrap()).await;

        let Some(text) = cluster::database() else { return };
        let url = DatabaseUrl::Postgres(crate::config::Secret::new(&text));
        cluster::run(&text, POSTGRES[0]);
        cluster::run(&text, "CREATE TABLE schema_steps (number BIGINT PRIMARY KEY)");
        cluster::run(&text, "INSERT INTO schema_steps VALUES (1)");
        let blob = |hex: &str| format!("'\\x{hex}'::bytea");
        for sql in left(now_ms(), blob) {
            cluster::run(&text, &sql);
        }
        let refused = Store::open(&url).await.unwrap_err().to_string();
        assert!(refused.contains("a server of an earlier version runs on it: stop it first"), "{refused}");
        cluster::run(&text, "UPDATE boots SET seen_ms = seen_ms - 15001");
        assert_kept(&Store::open(&url).await.unwrap()).await;
    }
}
