//! Lines of finished calls: how they are stored, read, and added up.

use std::collections::HashSet;

use rusqlite::types::Type;
use rusqlite::{CachedStatement, Row, ToSql, params};

use super::{Store, collect};
use crate::store::audit::{FINDINGS_MAX, UserSums};
use crate::store::{Audit, Billed, BootId, EndReason, Line, LineCheck, LineFilter, PriceRow, StoreError};

impl Store {
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

    /// Which of these calls of a boot have a line already.
    pub async fn stored(&self, boot: BootId, sequences: Vec<u64>) -> Result<HashSet<u64>, StoreError> {
        self.job(move |connection| {
            let mut find = connection.prepare_cached("SELECT 1 FROM lines WHERE boot = ?1 AND sequence = ?2")?;
            let mut stored = HashSet::new();
            for sequence in sequences {
                if find.exists(params![boot, sequence as i64])? {
                    stored.insert(sequence);
                }
            }
            Ok(stored)
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

pub(super) fn price_row(row: &Row<'_>, first: usize) -> rusqlite::Result<PriceRow> {
    Ok(PriceRow {
        input_nano: row.get(first)?,
        cached_input_nano: row.get(first + 1)?,
        output_nano: row.get(first + 2)?,
        per_call_nano: row.get(first + 3)?,
    })
}

/// The columns of a line after its boot, in the order of [`Line`]'s fields.
const LINE_COLUMNS: &str = "lines.sequence, request_id, client_request_id, lines.user_id, key_id, ratio_micro, account_id,
    endpoint, model_asked, lines.model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries";
const LINE_FIELDS: usize = 35;

pub(super) const LINE_INSERT: &str = "INSERT INTO lines (boot, sequence, request_id, client_request_id, user_id, key_id, ratio_micro,
    account_id, endpoint, model_asked, model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24,
    ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34, ?35, ?36) ON CONFLICT DO NOTHING";

pub(super) fn insert_line(insert: &mut CachedStatement<'_>, boot: BootId, line: &Line) -> Result<bool, StoreError> {
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
    let unknown = |index: usize| rusqlite::Error::InvalidColumnType(index, "name".into(), Type::Text);
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
