//! Lines of finished calls: how they are stored, read, and added up.

use std::collections::{BTreeMap, HashMap};

use super::audit::{FINDINGS_MAX, UserSums};
use super::books::{PRICE_COLUMNS, PRICE_FIELDS, price_row};
use super::days;
use super::tx::{Row, Tx, Value, given};
use super::{Audit, Billed, BootId, EndReason, Line, LineCheck, LineCost, LineFilter, Recomputed, StoreError};
use crate::config::Price;

/// Lines that an audit reads at a time.
const AUDIT_PAGE: i64 = 5000;

/// The conditions of a [`LineFilter`] but its limit, in the order of [`filter_values`].
const FILTER: &str = "(CAST($1 AS TEXT) IS NULL OR users.name = $1) AND (CAST($2 AS TEXT) IS NULL OR lines.model = $2)
    AND (CAST($3 AS BIGINT) IS NULL OR started_ms >= $3) AND (CAST($4 AS BIGINT) IS NULL OR started_ms < $4)
    AND (CAST($5 AS BIGINT) IS NULL OR key_id = $5) AND (CAST($6 AS TEXT) IS NULL OR end_reason = $6)
    AND (CAST($7 AS TEXT) IS NULL OR account_id IN (SELECT id FROM accounts WHERE name = $7))";

fn filter_values(filter: &LineFilter) -> Vec<Value> {
    let LineFilter { user, key_id, model, account, end_reason, since_ms, until_ms, .. } = filter.clone();
    given![user, model, since_ms, until_ms, key_id, end_reason, account].to_vec()
}

pub async fn lines<T: Tx>(tx: &T, filter: LineFilter) -> Result<Vec<(String, Line)>, StoreError> {
    let sql = format!(
        "SELECT {LINE_COLUMNS}, users.name FROM lines JOIN users ON users.id = lines.user_id
         WHERE {FILTER} ORDER BY started_ms DESC, sequence DESC LIMIT $8"
    );
    let mut given = filter_values(&filter);
    given.push(filter.limit.into());
    tx.rows(&sql, &given).await?.iter().map(|row| Ok((row.get(LINE_FIELDS)?, line_row(row)?))).collect()
}

pub async fn recompute<T: Tx>(
    tx: &T,
    filter: LineFilter,
    prices: HashMap<String, Price>,
    cost: LineCost,
) -> Result<Vec<Recomputed>, StoreError> {
    let sql = format!(
        "SELECT {LINE_COLUMNS}, {PRICE_COLUMNS}, boot, users.name
         FROM lines JOIN prices ON prices.version = lines.price_version JOIN users ON users.id = lines.user_id
         WHERE {FILTER} AND (boot, sequence) > ($8, $9) ORDER BY boot, sequence LIMIT $10"
    );
    let mut found = BTreeMap::<(String, String), Recomputed>::new();
    let (mut boot, mut sequence) = (Vec::<u8>::new(), -1_i64);
    loop {
        let mut given = filter_values(&filter);
        given.extend([boot.clone().into(), sequence.into(), AUDIT_PAGE.into()]);
        let page = tx.rows(&sql, &given).await?;
        for row in &page {
            let line = line_row(row)?;
            // A model that is not served any more has no other price.
            let Some(price) = prices.get(&line.model) else { continue };
            let user: String = row.get(LINE_FIELDS + PRICE_FIELDS + 1)?;
            let sums = found.entry((user.clone(), line.model.clone())).or_insert_with(|| Recomputed {
                user,
                model: line.model.clone(),
                lines: 0,
                charged_nano: 0,
                absorbed_nano: 0,
                cost_nano: 0,
                new_cost_nano: 0,
            });
            sums.lines += 1;
            sums.charged_nano = sums.charged_nano.saturating_add(line.charged_nano);
            sums.absorbed_nano = sums.absorbed_nano.saturating_add(line.absorbed_nano);
            sums.cost_nano = sums.cost_nano.saturating_add(cost(&line, &price_row(row, LINE_FIELDS)?));
            sums.new_cost_nano = sums.new_cost_nano.saturating_add(cost(&line, price));
        }
        let Some(last) = page.last() else { break };
        (sequence, boot) = (last.get(0)?, last.get(LINE_FIELDS + PRICE_FIELDS)?);
    }
    Ok(found.into_values().collect())
}

pub async fn audit<T: Tx>(tx: &T, check: LineCheck) -> Result<Audit, StoreError> {
    tx.snapshot().await?;
    let sql = "SELECT id, name,
                      (SELECT CAST(coalesce(sum(amount_nano), 0) AS BIGINT) FROM entries WHERE user_id = users.id),
                      (SELECT CAST(coalesce(sum(charged_nano), 0) AS BIGINT) FROM days WHERE user_id = users.id),
                      balance_nano,
                      (SELECT CAST(coalesce(sum(amount_nano), 0) AS BIGINT) FROM leases WHERE user_id = users.id)
               FROM users ORDER BY id";
    let sums = |row: &Row| {
        Ok(UserSums {
            user_id: row.get(0)?,
            name: row.get(1)?,
            entries_nano: row.get(2)?,
            charged_nano: row.get(3)?,
            balance_nano: row.get(4)?,
            leased_nano: row.get(5)?,
        })
    };
    let users = tx.rows(sql, &[]).await?.iter().map(sums).collect::<Result<_, StoreError>>()?;
    let findings = days::disagreeing(tx, FINDINGS_MAX as u32).await?;
    let mut audit = Audit { users, lines: 0, charged_nano: 0, absorbed_nano: 0, findings };
    let sql = format!(
        "SELECT {LINE_COLUMNS}, {PRICE_COLUMNS}, boot
         FROM lines JOIN prices ON prices.version = lines.price_version
         WHERE (boot, sequence) > ($1, $2) ORDER BY boot, sequence LIMIT $3"
    );
    let (mut boot, mut sequence) = (Vec::<u8>::new(), -1_i64);
    loop {
        let page = tx.rows(&sql, given![boot.clone(), sequence, AUDIT_PAGE]).await?;
        for row in &page {
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
        let Some(last) = page.last() else { break };
        (sequence, boot) = (last.get(0)?, last.get(LINE_FIELDS + PRICE_FIELDS)?);
    }
    let all: u64 = tx.row("SELECT count(*) FROM lines", &[]).await?.ok_or(StoreError::Moved)?.get(0)?;
    if all != audit.lines {
        audit.findings.push(format!("{} lines name a price that does not exist", all - audit.lines));
    }
    Ok(audit)
}

/// The columns of a line after its boot, in the order of [`Line`]'s fields.
const LINE_COLUMNS: &str = "lines.sequence, request_id, client_request_id, lines.user_id, key_id, ratio_micro, account_id,
    endpoint, model_asked, lines.model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries,
    usage_audio_input, usage_image_input, usage_audio_output, usage_image_output, units";
const LINE_FIELDS: usize = 40;

/// All of them, in the order of [`fields`].
pub const LINE_COLUMNS_ALL: &str = "boot, sequence, request_id, client_request_id, user_id, key_id, ratio_micro,
    account_id, endpoint, model_asked, model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries,
    usage_audio_input, usage_image_input, usage_audio_output, usage_image_output, units";

/// Inserts a line unless it is there, for SQLite.
pub const LINE_INSERT: &str = "INSERT INTO lines (boot, sequence, request_id, client_request_id, user_id, key_id, ratio_micro,
    account_id, endpoint, model_asked, model, model_upstream, price_version, tier, input, cached_input, output, usage_input,
    usage_cached, usage_output, usage_reasoning, counted_input, counted_output, billed, calibration_micro, estimated,
    flagged, hold_nano, charged_nano, absorbed_nano, started_ms, content_after_ms, duration_ms, end_reason, status, tries,
    usage_audio_input, usage_image_input, usage_audio_output, usage_image_output, units)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24,
    ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34, ?35, ?36, ?37, ?38, ?39, ?40, ?41) ON CONFLICT DO NOTHING";

/// A line as the values of its columns.
pub fn fields(boot: BootId, line: &Line) -> [Value; LINE_FIELDS + 1] {
    [
        boot.into(),
        line.sequence.into(),
        (&line.request_id).into(),
        line.client_request_id.as_deref().into(),
        line.user_id.into(),
        line.key_id.into(),
        line.ratio_micro.into(),
        line.account_id.into(),
        line.endpoint.as_deref().into(),
        (&line.model_asked).into(),
        (&line.model).into(),
        line.model_upstream.as_deref().into(),
        line.price_version.into(),
        line.tier.into(),
        line.input.into(),
        line.cached_input.into(),
        line.output.into(),
        line.usage_input.into(),
        line.usage_cached.into(),
        line.usage_output.into(),
        line.usage_reasoning.into(),
        line.counted_input.into(),
        line.counted_output.into(),
        line.billed.name().into(),
        line.calibration_micro.into(),
        line.estimated.into(),
        line.flagged.into(),
        line.hold_nano.into(),
        line.charged_nano.into(),
        line.absorbed_nano.into(),
        line.started_ms.into(),
        line.content_after_ms.into(),
        line.duration_ms.into(),
        line.end_reason.name().into(),
        line.status.into(),
        line.tries.into(),
        line.usage_audio_input.into(),
        line.usage_image_input.into(),
        line.usage_audio_output.into(),
        line.usage_image_output.into(),
        line.units.into(),
    ]
}

fn line_row(row: &Row) -> Result<Line, StoreError> {
    let unknown = || StoreError::Database("a line has a name that this binary does not know".into());
    Ok(Line {
        sequence: row.get(0)?,
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
        input: row.get(13)?,
        cached_input: row.get(14)?,
        output: row.get(15)?,
        usage_input: row.get(16)?,
        usage_cached: row.get(17)?,
        usage_output: row.get(18)?,
        usage_reasoning: row.get(19)?,
        counted_input: row.get(20)?,
        counted_output: row.get(21)?,
        billed: Billed::of(&row.get::<String>(22)?).ok_or_else(unknown)?,
        calibration_micro: row.get(23)?,
        estimated: row.get(24)?,
        flagged: row.get(25)?,
        hold_nano: row.get(26)?,
        charged_nano: row.get(27)?,
        absorbed_nano: row.get(28)?,
        started_ms: row.get(29)?,
        content_after_ms: row.get(30)?,
        duration_ms: row.get(31)?,
        end_reason: EndReason::of(&row.get::<String>(32)?).ok_or_else(unknown)?,
        status: row.get(33)?,
        tries: row.get(34)?,
        usage_audio_input: row.get(35)?,
        usage_image_input: row.get(36)?,
        usage_audio_output: row.get(37)?,
        usage_image_output: row.get(38)?,
        units: row.get(39)?,
    })
}
