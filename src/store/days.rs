//! What each day came to: written with the lines that it adds up, so that these may be forgotten.

use std::collections::{BTreeMap, HashMap};

use jiff::civil::Date;

use super::tx::{Row, Tx, Value, given};
use super::{DayFilter, DayRow, Line, Owner, Spent, StoreError};

const DAY_MS: i64 = 86_400_000;
/// 1970-01-01.
const EPOCH: Date = Date::constant(1970, 1, 1);
/// The setting that says before which day lines may have been forgotten.
pub const PRUNED_BEFORE: &str = "lines_pruned_before_day";
/// A boot that was not heard of for so long may have died, and its journal may be replayed: its lines stay.
const HEARD_MS: i64 = 60_000;

/// The day of a moment, since 1970-01-01 UTC.
pub fn day_of(ms: i64) -> i64 {
    ms.div_euclid(DAY_MS)
}

/// The month of a day, as a number that differs from that of any other month.
pub fn month_of(day: i64) -> i64 {
    let date = date_of(day);
    i64::from(date.year()) * 12 + i64::from(date.month())
}

/// The date of a day; the first one of all where there is none.
pub fn date_of(day: i64) -> Date {
    EPOCH.checked_add(jiff::Span::new().try_days(day).unwrap_or_default()).unwrap_or(EPOCH)
}

/// The day of a date.
pub fn day_of_date(date: Date) -> i64 {
    EPOCH.until(date).map_or(0, |span| span.get_days().into())
}

/// Adds lines up by day, user, key and model; in the order in which everybody locks the rows.
pub fn added_up<'a>(lines: impl Iterator<Item = &'a Line>) -> Vec<DayRow> {
    let mut days = BTreeMap::<(i64, i64, i64, &str), DayRow>::new();
    for line in lines {
        let day = day_of(line.started_ms);
        let row = days.entry((day, line.user_id, line.key_id, &line.model)).or_insert_with(|| DayRow {
            day,
            user_id: line.user_id,
            key_id: line.key_id,
            model: line.model.clone(),
            calls: 0,
            input: 0,
            cached_input: 0,
            output: 0,
            charged_nano: 0,
            absorbed_nano: 0,
        });
        row.calls += 1;
        row.input = row.input.saturating_add(line.input);
        row.cached_input = row.cached_input.saturating_add(line.cached_input);
        row.output = row.output.saturating_add(line.output);
        row.charged_nano = row.charged_nano.saturating_add(line.charged_nano);
        row.absorbed_nano = row.absorbed_nano.saturating_add(line.absorbed_nano);
    }
    days.into_values().collect()
}

const COLUMNS: &str = "day, user_id, key_id, model, calls, input, cached_input, output, charged_nano, absorbed_nano";
const FIELDS: usize = 10;

/// A row as the values of its columns.
pub fn fields(row: &DayRow) -> [Value; FIELDS] {
    [
        row.day.into(),
        row.user_id.into(),
        row.key_id.into(),
        (&row.model).into(),
        row.calls.into(),
        row.input.into(),
        row.cached_input.into(),
        row.output.into(),
        row.charged_nano.into(),
        row.absorbed_nano.into(),
    ]
}

/// Adds rows to what the days already have; `source` gives them.
pub fn upsert(source: &str) -> String {
    let sums = ["calls", "input", "cached_input", "output", "charged_nano", "absorbed_nano"];
    let sums: Vec<String> = sums.iter().map(|column| format!("{column} = days.{column} + excluded.{column}")).collect();
    format!(
        "INSERT INTO days ({COLUMNS}) {source} ON CONFLICT (day, user_id, key_id, model) DO UPDATE SET {}",
        sums.join(", ")
    )
}

pub async fn spent<T: Tx>(tx: &T, owners: Vec<Owner>, now_ms: i64) -> Result<HashMap<Owner, Spent>, StoreError> {
    let today = day_of(now_ms);
    let month_began = day_of_date(date_of(today).first_of_month());
    let mut spent: HashMap<Owner, Spent> = owners.iter().map(|owner| (*owner, Spent::default())).collect();
    for (column, owner) in [("key_id", Owner::Key as fn(i64) -> Owner), ("user_id", Owner::User)] {
        let ids = owners.iter().filter_map(|of| match *of {
            Owner::Key(id) | Owner::User(id) => (owner(id) == *of).then_some(id),
        });
        let ids: Vec<i64> = ids.collect();
        if ids.is_empty() {
            continue;
        }
        let sum = |when: &str| format!("CAST(sum(CASE WHEN {when} THEN charged_nano ELSE 0 END) AS BIGINT)");
        let sql = format!(
            "SELECT {column}, CAST(sum(charged_nano) AS BIGINT), {}, {} FROM days WHERE {column} IN ({}) GROUP BY 1",
            sum("day >= $1"),
            sum("day = $2"),
            T::ids("$3")
        );
        for row in tx.rows(&sql, given![month_began, today, serde_json::json!(ids).to_string()]).await? {
            let found = Spent { total_nano: row.get(1)?, month_nano: row.get(2)?, day_nano: row.get(3)? };
            spent.insert(owner(row.get(0)?), found);
        }
    }
    Ok(spent)
}

pub async fn days<T: Tx>(tx: &T, filter: DayFilter) -> Result<Vec<(String, DayRow)>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS}, users.name FROM days JOIN users ON users.id = days.user_id
         WHERE (CAST($1 AS TEXT) IS NULL OR users.name = $1) AND (CAST($2 AS BIGINT) IS NULL OR key_id = $2)
         AND (CAST($3 AS TEXT) IS NULL OR model = $3) AND (CAST($4 AS BIGINT) IS NULL OR day >= $4)
         AND (CAST($5 AS BIGINT) IS NULL OR day <= $5) ORDER BY day DESC, users.name, key_id, model LIMIT $6"
    );
    let DayFilter { user, key_id, model, since, until, limit } = filter;
    let read = |row: &Row| {
        let found = DayRow {
            day: row.get(0)?,
            user_id: row.get(1)?,
            key_id: row.get(2)?,
            model: row.get(3)?,
            calls: row.get(4)?,
            input: row.get(5)?,
            cached_input: row.get(6)?,
            output: row.get(7)?,
            charged_nano: row.get(8)?,
            absorbed_nano: row.get(9)?,
        };
        Ok((row.get(FIELDS)?, found))
    };
    tx.rows(&sql, given![user, key_id, model, since, until, limit]).await?.iter().map(read).collect()
}

pub async fn prune_lines<T: Tx>(tx: &T, kept_days: u32, most: u32) -> Result<u64, StoreError> {
    let now_ms = tx.now_ms().await?;
    let before_day = day_of(now_ms) - i64::from(kept_days);
    // Said first, and for good: an audit must not miss lines that are gone.
    let sql =
        "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value
               WHERE CAST(settings.value AS BIGINT) < CAST(excluded.value AS BIGINT)";
    tx.execute(sql, given![PRUNED_BEFORE, before_day.to_string()]).await?;
    // The lines of a boot that may come back stay, so that none of them is stored a second time: one that is closed will
    // not, and one that lives ships behind its watermark alone.
    let sql = "DELETE FROM lines WHERE (boot, sequence) IN (
                   SELECT boot, sequence FROM lines WHERE started_ms < $1 AND boot NOT IN (
                       SELECT id FROM boots WHERE state = 'forfeited' OR state = 'live' AND seen_ms < $2) LIMIT $3)";
    tx.execute(sql, given![before_day * DAY_MS, now_ms - HEARD_MS, most]).await
}

/// Before which day lines may have been forgotten.
pub async fn pruned_before<T: Tx>(tx: &T) -> Result<i64, StoreError> {
    let row = tx.row("SELECT value FROM settings WHERE name = $1", given![PRUNED_BEFORE]).await?;
    Ok(row.map(|row| row.get::<String>(0)).transpose()?.and_then(|day| day.parse().ok()).unwrap_or(i64::MIN))
}

/// Days whose lines come to something else; says which.
pub async fn disagreeing<T: Tx>(tx: &T, most: u32) -> Result<Vec<String>, StoreError> {
    // Kept well within 64 bits of milliseconds.
    let from_day = pruned_before(tx).await?.max(-1_000_000);
    let sql = format!(
        "SELECT day, user_id, key_id, model FROM (
             SELECT day, user_id, key_id, model, calls, input, cached_input, output, charged_nano, absorbed_nano
             FROM days WHERE day >= $1
             UNION ALL
             SELECT started_ms / {DAY_MS}, user_id, key_id, model, -1, -input, -cached_input, -output, -charged_nano,
                    -absorbed_nano
             FROM lines WHERE started_ms >= $2) AS sums
         GROUP BY day, user_id, key_id, model
         HAVING sum(calls) <> 0 OR sum(input) <> 0 OR sum(cached_input) <> 0 OR sum(output) <> 0
                OR sum(charged_nano) <> 0 OR sum(absorbed_nano) <> 0
         ORDER BY day, user_id, key_id, model LIMIT $3"
    );
    let said = |row: &Row| {
        let (day, user, key, model) = (row.get(0)?, row.get::<i64>(1)?, row.get::<i64>(2)?, row.get::<String>(3)?);
        let day = date_of(day);
        Ok(format!("{day}: the lines of user {user}, key {key} and model {model} do not come to what the day has"))
    };
    tx.rows(&sql, given![from_day, from_day * DAY_MS, most]).await?.iter().map(said).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_months_and_dates_belong_together() {
        let date = Date::constant(2026, 2, 28);
        let day = day_of_date(date);
        assert_eq!((date_of(day), date_of(day + 1)), (date, Date::constant(2026, 3, 1)));
        assert_eq!(month_of(day) + 1, month_of(day + 1));
        assert_eq!((day_of(0), day_of(DAY_MS - 1), day_of(DAY_MS), day_of(-1)), (0, 0, 1, -1));
        assert_eq!((day_of_date(EPOCH), date_of(0)), (0, EPOCH));
        for odd in [i64::MIN, i64::MAX] {
            assert_eq!(date_of(odd), EPOCH);
        }
    }
}
