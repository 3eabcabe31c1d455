//! Boots, leases and prices: the transactions that move money (design.md §4b).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::days;
use super::tx::{Row, Tx, given};
use super::{BootId, BootState, Elsewhere, LeaseOf, LeaseRow, Line, StoreError, Want, now_ms};
use crate::config::{Price, Rates};

pub async fn begin_boot<T: Tx>(tx: &T, boot: BootId) -> Result<(), StoreError> {
    let now = tx.now_ms().await?;
    tx.execute("INSERT INTO boots (id, started_ms, seen_ms) VALUES ($1, $2, $3)", given![boot, now, now]).await?;
    Ok(())
}

pub async fn heartbeat<T: Tx>(tx: &T, boot: BootId) -> Result<u64, StoreError> {
    let now = tx.now_ms().await?;
    let sql = "UPDATE boots SET seen_ms = $2 WHERE id = $1 AND state = 'live' RETURNING shipped";
    tx.row(sql, given![boot, now]).await?.ok_or(StoreError::BootGone)?.get(0)
}

pub async fn boot<T: Tx>(tx: &T, boot: BootId) -> Result<Option<BootState>, StoreError> {
    let row = tx.row("SELECT state, shipped FROM boots WHERE id = $1", given![boot]).await?;
    row.map(|row| Ok(BootState { live: row.get::<String>(0)? == "live", shipped: row.get(1)? })).transpose()
}

/// Locks a boot's row, so that what concerns one boot happens one after the other.
async fn lock_boot<T: Tx>(tx: &T, boot: BootId) -> Result<Option<String>, StoreError> {
    let sql = format!("SELECT state FROM boots WHERE id = $1{}", T::FOR_UPDATE);
    tx.row(&sql, given![boot]).await?.map(|row| row.get(0)).transpose()
}

async fn lock_live<T: Tx>(tx: &T, boot: BootId) -> Result<(), StoreError> {
    match lock_boot(tx, boot).await?.as_deref() {
        Some("live") => Ok(()),
        _ => Err(StoreError::BootGone),
    }
}

/// Gives back what a boot has leased; its row is locked.
async fn return_leases<T: Tx>(tx: &T, boot: BootId) -> Result<(), StoreError> {
    // In the order of users, as everybody locks them.
    let sql = format!(
        "SELECT id FROM users WHERE id IN (SELECT user_id FROM leases WHERE boot = $1 AND amount_nano > 0) ORDER BY id{}",
        T::FOR_UPDATE
    );
    tx.rows(&sql, given![boot]).await?;
    let sql = "UPDATE users SET balance_nano = balance_nano + leases.amount_nano FROM leases
               WHERE leases.user_id = users.id AND leases.boot = $1 AND leases.amount_nano > 0";
    tx.execute(sql, given![boot]).await?;
    tx.execute("DELETE FROM leases WHERE boot = $1", given![boot]).await?;
    Ok(())
}

pub async fn close_boot<T: Tx>(tx: &T, boot: BootId) -> Result<(), StoreError> {
    lock_boot(tx, boot).await?;
    return_leases(tx, boot).await?;
    tx.execute("UPDATE boots SET state = 'closed' WHERE id = $1 AND state <> 'closed'", given![boot]).await?;
    Ok(())
}

pub async fn grants<T: Tx>(tx: &T, boot: BootId, wants: Vec<Want>) -> Result<Vec<(i64, LeaseRow)>, StoreError> {
    lock_live(tx, boot).await?;
    // In the order of users, as everybody locks them.
    let mut balances: HashMap<i64, i64> = HashMap::new();
    let mut users: Vec<i64> = wants.iter().map(|want| want.user_id).collect();
    users.sort_unstable();
    let mut live_boots = 1;
    for (user_id, balance, live) in tx.lock_balances(users).await? {
        balances.insert(user_id, balance);
        live_boots = live.max(1);
    }
    let granted = |want: &Want| {
        let balance = *balances.get(&want.user_id)?;
        let ahead = want.ahead_nano.clamp(0, balance / (2 * live_boots));
        Some((want.user_id, balance.min(want.need_nano.max(0).saturating_add(ahead))))
    };
    let granted: HashMap<i64, i64> = wants.iter().filter_map(granted).collect();
    let rows = tx.lease_out(boot, granted.iter().map(|(user, amount)| (*user, *amount)).collect()).await?;
    let with_balance = |row: Row| {
        let user_id: i64 = row.get(3)?;
        let left = |of: &HashMap<i64, i64>| of.get(&user_id).copied().unwrap_or(0);
        Ok((user_id, lease_of(&row, left(&balances) - left(&granted))?))
    };
    rows.into_iter().map(with_balance).collect()
}

pub async fn give_back<T: Tx>(
    tx: &T,
    boot: BootId,
    user_id: i64,
    amount_nano: i64,
    version: i64,
) -> Result<LeaseRow, StoreError> {
    lock_live(tx, boot).await?;
    let sql = "UPDATE users SET balance_nano = balance_nano + $2 WHERE id = $1 RETURNING balance_nano";
    let user = tx.row(sql, given![user_id, amount_nano]).await?.ok_or_else(|| StoreError::Absent("user".into()))?;
    let lease = tx
        .row(
            "UPDATE leases SET amount_nano = amount_nano - $3, granted_nano = granted_nano - $4, version = version + 1
             WHERE user_id = $1 AND boot = $2 AND version = $5 RETURNING amount_nano, granted_nano, version",
            given![user_id, boot, amount_nano, amount_nano, version],
        )
        .await?
        .ok_or(StoreError::Moved)?;
    lease_of(&lease, user.get(0)?)
}

pub async fn lease<T: Tx>(tx: &T, boot: BootId, user_id: i64) -> Result<LeaseRow, StoreError> {
    // Behind whatever is still going on with this boot: a commit that nobody heard the end of has happened, or will not.
    lock_boot(tx, boot).await?;
    let sql = "SELECT coalesce(amount_nano, 0), coalesce(granted_nano, 0), coalesce(version, 0), balance_nano
               FROM users LEFT JOIN leases ON leases.user_id = users.id AND leases.boot = $1 WHERE users.id = $2";
    let row = tx.row(sql, given![boot, user_id]).await?.ok_or_else(|| StoreError::Absent("user".into()))?;
    lease_of(&row, row.get(3)?)
}

fn lease_of(row: &Row, balance_nano: i64) -> Result<LeaseRow, StoreError> {
    Ok(LeaseRow { amount_nano: row.get(0)?, granted_nano: row.get(1)?, version: row.get(2)?, balance_nano })
}

pub async fn leased_elsewhere<T: Tx>(
    tx: &T,
    boot: BootId,
    user_id: i64,
    silent_ms: i64,
) -> Result<Elsewhere, StoreError> {
    let heard_ms = tx.now_ms().await? - silent_ms;
    let sum = |heard: &str| {
        format!("CAST(coalesce(sum(CASE WHEN boots.seen_ms {heard} $3 THEN amount_nano ELSE 0 END), 0) AS BIGINT)")
    };
    let sql = format!(
        "SELECT {}, {}, (SELECT balance_nano FROM users WHERE id = $1)
         FROM leases JOIN boots ON boots.id = leases.boot WHERE leases.user_id = $1 AND leases.boot <> $2",
        sum(">="),
        sum("<")
    );
    let row = tx.row(&sql, given![user_id, boot, heard_ms]).await?.ok_or(StoreError::Moved)?;
    Ok(Elsewhere { live_nano: row.get(0)?, silent_nano: row.get(1)?, balance_nano: row.get(2)? })
}

pub async fn unspent_elsewhere<T: Tx>(tx: &T, boot: BootId, user_id: i64) -> Result<i64, StoreError> {
    let sql = "SELECT CAST(balance_nano + coalesce((SELECT sum(amount_nano) FROM leases WHERE user_id = users.id AND boot <> $1), 0)
               AS BIGINT) FROM users WHERE id = $2";
    tx.row(sql, given![boot, user_id]).await?.ok_or_else(|| StoreError::Absent("user".into()))?.get(0)
}

pub async fn ask_back<T: Tx>(tx: &T, user_id: i64, asking: BootId) -> Result<(), StoreError> {
    tx.tell_short(user_id, asking).await
}

pub async fn silent_boots<T: Tx>(tx: &T, boot: BootId, silent_ms: i64) -> Result<Vec<BootId>, StoreError> {
    let seen_ms = tx.now_ms().await? - silent_ms;
    let sql = "SELECT id FROM boots WHERE state = 'live' AND seen_ms < $1 AND id <> $2";
    tx.rows(sql, given![seen_ms, boot]).await?.iter().map(|row| row.get(0)).collect()
}

pub async fn release_boot<T: Tx>(tx: &T, boot: BootId, silent_ms: i64) -> Result<i64, StoreError> {
    let sql = format!("SELECT seen_ms FROM boots WHERE id = $1 AND state = 'live'{}", T::FOR_UPDATE);
    let found = tx.row(&sql, given![boot]).await?.ok_or_else(|| StoreError::Absent("live boot of this id".into()))?;
    let unheard_ms = tx.now_ms().await? - found.get::<i64>(0)?;
    if unheard_ms < silent_ms {
        let heard_s = unheard_ms / 1000;
        return Err(StoreError::Refused(format!("that boot was heard of {heard_s} s ago: it is alive, stop it first")));
    }
    let sql = "SELECT CAST(coalesce(sum(amount_nano), 0) AS BIGINT) FROM leases WHERE boot = $1";
    let amount = tx.row(sql, given![boot]).await?.ok_or(StoreError::Moved)?.get(0)?;
    return_leases(tx, boot).await?;
    tx.execute("UPDATE boots SET state = 'forfeited' WHERE id = $1", given![boot]).await?;
    Ok(amount)
}

pub async fn leases<T: Tx>(tx: &T) -> Result<Vec<LeaseOf>, StoreError> {
    let now = tx.now_ms().await?;
    let sql = "SELECT leases.boot, users.name, amount_nano, boots.seen_ms FROM leases
               JOIN boots ON boots.id = leases.boot JOIN users ON users.id = leases.user_id
               ORDER BY boots.started_ms, leases.boot, users.name";
    let read = |row: &Row| {
        let unheard_ms = now - row.get::<i64>(3)?;
        Ok(LeaseOf { boot: row.get(0)?, user: row.get(1)?, amount_nano: row.get(2)?, unheard_ms })
    };
    tx.rows(sql, &[]).await?.iter().map(read).collect()
}

pub async fn ship<T: Tx>(tx: &T, boot: BootId, from: u64, to: u64, mut lines: Vec<Line>) -> Result<(), StoreError> {
    let sql = "UPDATE boots SET shipped = $3 WHERE id = $1 AND shipped = $2";
    if tx.execute(sql, given![boot, from, to]).await? == 0 {
        return Err(StoreError::Moved);
    }
    // Stored before, by a replay that was cut off: the first END of a call counts.
    let inserted: HashSet<u64> = tx.insert_lines(boot, &lines).await?.into_iter().collect();
    lines.retain(|line| inserted.contains(&line.sequence));
    charge(tx, boot, &mut lines).await?;
    tx.add_days(&days::added_up(lines.iter())).await
}

/// Takes what new lines charge out of their leases; what these do not have, the lines no longer charge.
async fn charge<T: Tx>(tx: &T, boot: BootId, lines: &mut [Line]) -> Result<(), StoreError> {
    let mut charges: HashMap<i64, i64> = HashMap::new();
    for line in lines.iter().filter(|line| line.charged_nano > 0) {
        let charge = charges.entry(line.user_id).or_default();
        *charge = charge.saturating_add(line.charged_nano);
    }
    if charges.is_empty() {
        return Ok(());
    }
    let charged: HashSet<i64> = tx.charge_leases(boot, in_order(&charges)).await?.into_iter().collect();
    charges.retain(|user_id, _| !charged.contains(user_id));
    if charges.is_empty() {
        return Ok(());
    }
    // A lease has less than its lines charge: it was forfeited, or its database was set back. Then what is left is
    // charged, and the rest is the operator's.
    let users = in_order(&charges).into_iter().map(|(user_id, _)| user_id).collect();
    let leased: HashMap<i64, i64> = tx.lease_amounts(boot, users).await?.into_iter().collect();
    let mut capped = Vec::new();
    charges.values_mut().for_each(|charge| *charge = 0);
    for line in lines.iter_mut().filter(|line| line.charged_nano > 0) {
        let Some(charge) = charges.get_mut(&line.user_id) else { continue };
        let left = leased.get(&line.user_id).copied().unwrap_or(0) - *charge;
        let charged = line.charged_nano.min(left);
        *charge += charged;
        if charged < line.charged_nano {
            capped.push((line.sequence, charged, line.charged_nano - charged));
            line.absorbed_nano += line.charged_nano - charged;
            line.charged_nano = charged;
        }
    }
    tx.cap_lines(boot, capped).await?;
    charges.retain(|_, charge| *charge > 0);
    let charged = tx.charge_leases(boot, in_order(&charges)).await?;
    if charged.len() == charges.len() { Ok(()) } else { Err(StoreError::Moved) }
}

/// By user, in the order in which everybody locks them.
fn in_order(charges: &HashMap<i64, i64>) -> Vec<(i64, i64)> {
    let mut charges: Vec<(i64, i64)> = charges.iter().map(|(user_id, charge)| (*user_id, *charge)).collect();
    charges.sort_unstable();
    charges
}

pub async fn dangling<T: Tx>(tx: &T, lines: Vec<Line>) -> Result<Vec<u64>, StoreError> {
    type Named = fn(&Line) -> i64;
    const LOOKS: [(&str, Named); 3] = [
        ("SELECT 1 FROM users WHERE id = $1", |line| line.user_id),
        ("SELECT 1 FROM keys WHERE id = $1", |line| line.key_id),
        ("SELECT 1 FROM prices WHERE version = $1", |line| line.price_version),
    ];
    let mut found: Vec<u64> = Vec::new();
    for (sql, named) in LOOKS {
        let mut there: HashMap<i64, bool> = HashMap::new();
        for line in &lines {
            let id = named(line);
            if let Entry::Vacant(unseen) = there.entry(id) {
                unseen.insert(tx.row(sql, given![id]).await?.is_some());
            }
            if !there[&id] {
                found.push(line.sequence);
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

pub async fn forget_leases<T: Tx>(tx: &T, boot: BootId, users: Vec<i64>) -> Result<Vec<i64>, StoreError> {
    lock_live(tx, boot).await?;
    tx.forget_leases(boot, users).await
}

pub async fn price_version<T: Tx>(tx: &T, model: String, price: Price) -> Result<i64, StoreError> {
    let sql = format!("SELECT {PRICE_COLUMNS}, version FROM prices WHERE model = $1 ORDER BY version DESC LIMIT 1");
    let last = tx.row(&sql, given![&model]).await?;
    if let Some(last) = last
        && price_row(&last, 0)? == price
    {
        return last.get(PRICE_FIELDS);
    }
    let Price { per_call_nano, rates, tiers } = price;
    let tiers = (!tiers.is_empty()).then(|| serde_json::json!(tiers).to_string());
    let inserted = tx
        .row(
            &format!(
                "INSERT INTO prices ({PRICE_COLUMNS}, model, from_ms)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) RETURNING version"
            ),
            given![
                per_call_nano,
                rates.input_nano,
                rates.cached_input_nano,
                rates.audio_input_nano,
                rates.image_input_nano,
                rates.output_nano,
                rates.reasoning_nano,
                rates.audio_output_nano,
                rates.image_output_nano,
                tiers,
                model,
                now_ms()
            ],
        )
        .await?;
    inserted.ok_or(StoreError::Moved)?.get(0)
}

pub async fn prices<T: Tx>(tx: &T) -> Result<HashMap<i64, Price>, StoreError> {
    let sql = format!("SELECT {PRICE_COLUMNS}, version FROM prices");
    let read = |row: &Row| Ok((row.get(PRICE_FIELDS)?, price_row(row, 0)?));
    tx.rows(&sql, &[]).await?.iter().map(read).collect()
}

/// A price, in the order of [`price_row`].
pub const PRICE_COLUMNS: &str = "per_call_nano, input_nano, cached_input_nano, audio_input_nano, image_input_nano,
    output_nano, reasoning_nano, audio_output_nano, image_output_nano, tiers";
pub const PRICE_FIELDS: usize = 10;

pub fn price_row(row: &Row, first: usize) -> Result<Price, StoreError> {
    let tiers: Option<String> = row.get(first + 9)?;
    let tiers =
        tiers.map(|tiers| serde_json::from_str(&tiers).map_err(|error| StoreError::Database(error.to_string())));
    Ok(Price {
        per_call_nano: row.get(first)?,
        rates: Rates {
            input_nano: row.get(first + 1)?,
            cached_input_nano: row.get(first + 2)?,
            audio_input_nano: row.get(first + 3)?,
            image_input_nano: row.get(first + 4)?,
            output_nano: row.get(first + 5)?,
            reasoning_nano: row.get(first + 6)?,
            audio_output_nano: row.get(first + 7)?,
            image_output_nano: row.get(first + 8)?,
        },
        tiers: tiers.transpose()?.unwrap_or_default(),
    })
}
