//! What an operator changes, and what a running server reads of it: users, keys, groups, accounts, and their changes.

use super::tx::{Row, Tx, given};
use super::{
    AccountRow, Change, CodeRow, GroupRow, KeyRow, NewAccount, NewGroup, NewLimits, StoreError, UserRow, now_ms,
};

/// Rows of `changes` that are kept; a server that is further behind reads everything again.
const CHANGES_KEPT: i64 = 10_000;

pub async fn setting<T: Tx>(tx: &T, name: &'static str) -> Result<Option<String>, StoreError> {
    tx.row("SELECT value FROM settings WHERE name = $1", given![name]).await?.map(|row| row.get(0)).transpose()
}

pub async fn settle_setting<T: Tx>(tx: &T, name: &'static str, value: String) -> Result<String, StoreError> {
    let sql = "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING";
    tx.execute(sql, given![name, value]).await?;
    setting(tx, name).await?.ok_or(StoreError::Moved)
}

pub async fn first_start<T: Tx>(
    tx: &T,
    admin_token_hash: String,
    user: &'static str,
    credit_nano: i64,
    key: ([u8; 32], String),
) -> Result<bool, StoreError> {
    let sql = "INSERT INTO settings (name, value) VALUES ('admin_token_hash', $1) ON CONFLICT DO NOTHING";
    if tx.execute(sql, given![admin_token_hash]).await? == 0 {
        return Ok(false);
    }
    let user_id = insert_user(tx, user, 1).await?;
    if credit_nano > 0 {
        add_entry(tx, user_id, credit_nano, "first start").await?;
    }
    insert_key(tx, user_id, key.0, &key.1, "first").await?;
    Ok(true)
}

pub async fn change_sequence<T: Tx>(tx: &T) -> Result<i64, StoreError> {
    let row = tx.row("SELECT coalesce(max(sequence), 0) FROM changes", &[]).await?;
    row.ok_or(StoreError::Moved)?.get(0)
}

pub async fn changes_since<T: Tx>(tx: &T, sequence: i64) -> Result<(i64, Vec<Change>), StoreError> {
    let mut newest = sequence;
    let mut changes = Vec::new();
    let sql = "SELECT sequence, kind, row_id FROM changes WHERE sequence > $1 ORDER BY sequence";
    for row in tx.rows(sql, given![sequence]).await? {
        let next: i64 = row.get(0)?;
        if changes.is_empty() && next > sequence + 1 {
            changes.extend([Change::Group, Change::Account]); // some are forgotten: read everything
        }
        newest = next;
        let id: i64 = row.get(2)?;
        changes.push(match row.get::<String>(1)?.as_str() {
            "user" => Change::User(id),
            "key" => Change::Key(id),
            "account" => Change::Account,
            "balance" => Change::Balance(id),
            "short" => Change::Short(id),
            _ => Change::Group,
        });
    }
    Ok((newest, changes))
}

pub async fn forget_changes<T: Tx>(tx: &T, newest: i64) -> Result<(), StoreError> {
    tx.execute("DELETE FROM changes WHERE sequence < $1", given![newest - CHANGES_KEPT]).await?;
    Ok(())
}

pub async fn groups<T: Tx>(tx: &T) -> Result<Vec<GroupRow>, StoreError> {
    let sql = "SELECT id, name, ratio_micro, models, concurrency, requests_per_minute FROM groups ORDER BY id";
    let read = |row: &Row| {
        Ok(GroupRow {
            id: row.get(0)?,
            name: row.get(1)?,
            ratio_micro: row.get(2)?,
            models: names(row, 3)?,
            concurrency: row.get(4)?,
            requests_per_minute: row.get(5)?,
        })
    };
    tx.rows(sql, &[]).await?.iter().map(read).collect()
}

pub async fn users<T: Tx>(tx: &T, id: Option<i64>) -> Result<Vec<UserRow>, StoreError> {
    let sql = format!("{USER_SELECT} WHERE CAST($1 AS BIGINT) IS NULL OR id = $1 ORDER BY id");
    tx.rows(&sql, given![id]).await?.iter().map(user_row).collect()
}

pub async fn user<T: Tx>(tx: &T, name: String) -> Result<UserRow, StoreError> {
    find_user(tx, &name).await
}

pub async fn keys<T: Tx>(tx: &T, id: Option<i64>) -> Result<Vec<KeyRow>, StoreError> {
    let sql = "SELECT id, user_id, hash, hint, name, created_ms, expires_ms, revoked_ms, models, limit_nano, day_nano,
               month_nano FROM keys WHERE CAST($1 AS BIGINT) IS NULL OR id = $1 ORDER BY id";
    let read = |row: &Row| {
        Ok(KeyRow {
            id: row.get(0)?,
            user_id: row.get(1)?,
            hash: row.get(2)?,
            hint: row.get(3)?,
            name: row.get(4)?,
            created_ms: row.get(5)?,
            expires_ms: row.get(6)?,
            revoked_ms: row.get(7)?,
            models: names(row, 8)?,
            limit_nano: row.get(9)?,
            day_nano: row.get(10)?,
            month_nano: row.get(11)?,
        })
    };
    tx.rows(sql, given![id]).await?.iter().map(read).collect()
}

pub async fn accounts<T: Tx>(tx: &T) -> Result<Vec<AccountRow>, StoreError> {
    let sql = "SELECT id, name, endpoint, sealed_key, hint, base_url, models, weight, tier, concurrency, enabled
               FROM accounts WHERE removed_ms IS NULL ORDER BY id";
    let read = |row: &Row| {
        Ok(AccountRow {
            id: row.get(0)?,
            name: row.get(1)?,
            endpoint: row.get(2)?,
            sealed_key: row.get(3)?,
            hint: row.get(4)?,
            base_url: row.get(5)?,
            models: names(row, 6)?,
            weight: row.get(7)?,
            tier: row.get(8)?,
            concurrency: row.get(9)?,
            enabled: row.get(10)?,
        })
    };
    tx.rows(sql, &[]).await?.iter().map(read).collect()
}

pub async fn add_user<T: Tx>(
    tx: &T,
    name: String,
    group: String,
    credit_nano: i64,
    key: Option<([u8; 32], String)>,
) -> Result<UserRow, StoreError> {
    let found = tx.row("SELECT id FROM groups WHERE name = $1", given![&group]).await?;
    let group_id = found.ok_or_else(|| StoreError::Absent(format!("group '{group}'")))?.get(0)?;
    let user_id = insert_user(tx, &name, group_id).await?;
    if credit_nano > 0 {
        add_entry(tx, user_id, credit_nano, "first credit").await?;
    }
    if let Some((hash, hint)) = key {
        insert_key(tx, user_id, hash, &hint, "").await?;
    }
    find_user(tx, &name).await
}

pub async fn credit<T: Tx>(tx: &T, name: String, amount_nano: i64, note: String) -> Result<UserRow, StoreError> {
    if amount_nano <= 0 {
        return Err(StoreError::Refused("a credit must be above zero".into()));
    }
    let user = find_user(tx, &name).await?;
    add_entry(tx, user.id, amount_nano, &note).await?;
    find_user(tx, &name).await
}

pub async fn debit<T: Tx>(tx: &T, name: String, amount_nano: i64, note: String) -> Result<UserRow, StoreError> {
    if amount_nano <= 0 {
        return Err(StoreError::Refused("a debit must be above zero".into()));
    }
    // Locked, so that no node leases between the look and the act.
    let sql = format!("SELECT id, balance_nano FROM users WHERE name = $1{}", T::FOR_UPDATE);
    let user = tx.row(&sql, given![&name]).await?.ok_or_else(|| StoreError::Absent(format!("user '{name}'")))?;
    let (id, balance): (i64, i64) = (user.get(0)?, user.get(1)?);
    if balance < amount_nano {
        return Err(StoreError::Refused("the balance does not have so much".into()));
    }
    add_entry(tx, id, -amount_nano, &note).await?;
    find_user(tx, &name).await
}

pub async fn set_balance<T: Tx>(tx: &T, name: String, to_nano: i64, note: String) -> Result<UserRow, StoreError> {
    // Locked, so that no node leases or returns meanwhile: what it has leased is the user's, too.
    let sql = format!("SELECT id FROM users WHERE name = $1{}", T::FOR_UPDATE);
    tx.row(&sql, given![&name]).await?.ok_or_else(|| StoreError::Absent(format!("user '{name}'")))?;
    let user = find_user(tx, &name).await?;
    let difference = to_nano - (user.balance_nano + user.leased_nano);
    if user.balance_nano + difference < 0 {
        return Err(StoreError::Refused("the balance does not have so much".into()));
    }
    if difference != 0 {
        add_entry(tx, user.id, difference, &note).await?;
    }
    find_user(tx, &name).await
}

pub async fn limit_user<T: Tx>(tx: &T, name: String, limits: NewLimits) -> Result<UserRow, StoreError> {
    let user = find_user(tx, &name).await?;
    for (column, limit) in [("day_nano", limits.day_nano), ("month_nano", limits.month_nano)] {
        if let Some(limit) = limit {
            tx.execute(&format!("UPDATE users SET {column} = $2 WHERE id = $1"), given![user.id, limit]).await?;
        }
    }
    find_user(tx, &name).await
}

pub async fn limit_key<T: Tx>(tx: &T, id: i64, limits: NewLimits) -> Result<(), StoreError> {
    let found = tx.row("SELECT id FROM keys WHERE id = $1 AND revoked_ms IS NULL", given![id]).await?;
    found.ok_or_else(|| StoreError::Absent(format!("key {id} that is in use")))?;
    let NewLimits { limit_nano, day_nano, month_nano, models, expires_ms } = limits;
    let numbers =
        [("limit_nano", limit_nano), ("day_nano", day_nano), ("month_nano", month_nano), ("expires_ms", expires_ms)];
    for (column, number) in numbers {
        if let Some(number) = number {
            tx.execute(&format!("UPDATE keys SET {column} = $2 WHERE id = $1"), given![id, number]).await?;
        }
    }
    if let Some(models) = models {
        let models = models.map(|models| serde_json::Value::from(models).to_string());
        tx.execute("UPDATE keys SET models = $2 WHERE id = $1", given![id, models]).await?;
    }
    Ok(())
}

pub async fn add_codes<T: Tx>(
    tx: &T,
    codes: Vec<([u8; 32], String)>,
    amount_nano: i64,
    expires_ms: Option<i64>,
    note: String,
) -> Result<Vec<i64>, StoreError> {
    let sql = "INSERT INTO codes (hash, hint, amount_nano, expires_ms, note, created_ms)
               VALUES ($1, $2, $3, $4, $5, $6) RETURNING id";
    let mut ids = Vec::with_capacity(codes.len());
    for (hash, hint) in codes {
        let row = tx.row(sql, given![hash, hint, amount_nano, expires_ms, &note, now_ms()]).await?;
        ids.push(row.ok_or(StoreError::Moved)?.get(0)?);
    }
    Ok(ids)
}

pub async fn codes<T: Tx>(tx: &T) -> Result<Vec<CodeRow>, StoreError> {
    let sql =
        "SELECT codes.id, hint, amount_nano, note, codes.created_ms, expires_ms, revoked_ms, redeemed_ms, users.name
               FROM codes LEFT JOIN users ON users.id = redeemed_by ORDER BY codes.id";
    let read = |row: &Row| {
        Ok(CodeRow {
            id: row.get(0)?,
            hint: row.get(1)?,
            amount_nano: row.get(2)?,
            note: row.get(3)?,
            created_ms: row.get(4)?,
            expires_ms: row.get(5)?,
            revoked_ms: row.get(6)?,
            redeemed_ms: row.get(7)?,
            redeemed_by: row.get(8)?,
        })
    };
    tx.rows(sql, &[]).await?.iter().map(read).collect()
}

pub async fn revoke_code<T: Tx>(tx: &T, id: i64) -> Result<(), StoreError> {
    let sql = "UPDATE codes SET revoked_ms = $2 WHERE id = $1 AND revoked_ms IS NULL AND redeemed_ms IS NULL";
    match tx.execute(sql, given![id, now_ms()]).await? {
        0 => Err(StoreError::Absent(format!("code {id} that could be redeemed"))),
        _ => Ok(()),
    }
}

pub async fn redeem<T: Tx>(tx: &T, user_id: i64, hash: [u8; 32]) -> Result<i64, StoreError> {
    let now = tx.now_ms().await?;
    // One guarded update: of two that come at once the second finds it redeemed.
    let sql = "UPDATE codes SET redeemed_ms = $2, redeemed_by = $3 WHERE hash = $1 AND redeemed_ms IS NULL
               AND revoked_ms IS NULL AND (expires_ms IS NULL OR expires_ms > $2) RETURNING id, amount_nano";
    let row = tx.row(sql, given![hash, now, user_id]).await?;
    let row = row.ok_or_else(|| StoreError::Absent("such code, or it was used, has expired or was revoked".into()))?;
    let (id, amount_nano): (i64, i64) = (row.get(0)?, row.get(1)?);
    add_entry(tx, user_id, amount_nano, &format!("code {id}")).await?;
    Ok(amount_nano)
}

pub async fn redeemed<T: Tx>(tx: &T, user_id: i64, hash: [u8; 32]) -> Result<Option<i64>, StoreError> {
    let sql = "SELECT amount_nano FROM codes WHERE hash = $1 AND redeemed_by = $2";
    tx.row(sql, given![hash, user_id]).await?.map(|row| row.get(0)).transpose()
}

pub async fn put_group<T: Tx>(tx: &T, group: NewGroup) -> Result<(), StoreError> {
    tx.execute("INSERT INTO groups (name) VALUES ($1) ON CONFLICT DO NOTHING", given![&group.name]).await?;
    if let Some(ratio_micro) = group.ratio_micro {
        tx.execute("UPDATE groups SET ratio_micro = $2 WHERE name = $1", given![&group.name, ratio_micro]).await?;
    }
    if let Some(models) = group.models {
        let models = models.map(|models| serde_json::Value::from(models).to_string());
        tx.execute("UPDATE groups SET models = $2 WHERE name = $1", given![&group.name, models]).await?;
    }
    if let Some(concurrency) = group.concurrency {
        tx.execute("UPDATE groups SET concurrency = $2 WHERE name = $1", given![&group.name, concurrency]).await?;
    }
    if let Some(requests) = group.requests_per_minute {
        let sql = "UPDATE groups SET requests_per_minute = $2 WHERE name = $1";
        tx.execute(sql, given![&group.name, requests]).await?;
    }
    Ok(())
}

pub async fn set_group<T: Tx>(tx: &T, name: String, group: String) -> Result<UserRow, StoreError> {
    let found = tx.row("SELECT id FROM groups WHERE name = $1", given![&group]).await?;
    let group_id: i64 = found.ok_or_else(|| StoreError::Absent(format!("group '{group}'")))?.get(0)?;
    if tx.execute("UPDATE users SET group_id = $2 WHERE name = $1", given![&name, group_id]).await? == 0 {
        return Err(StoreError::Absent(format!("user '{name}'")));
    }
    find_user(tx, &name).await
}

pub async fn set_frozen<T: Tx>(tx: &T, name: String, frozen: bool, thaws: bool) -> Result<UserRow, StoreError> {
    let user = find_user(tx, &name).await?;
    let sql = "UPDATE users SET frozen = $2, thaws = $3 WHERE id = $1";
    tx.execute(sql, given![user.id, frozen, frozen && thaws]).await?;
    find_user(tx, &name).await
}

pub async fn add_key<T: Tx>(
    tx: &T,
    user: String,
    hash: [u8; 32],
    hint: String,
    name: String,
    limits: NewLimits,
) -> Result<i64, StoreError> {
    let user = find_user(tx, &user).await?;
    let id = insert_key(tx, user.id, hash, &hint, &name).await?;
    limit_key(tx, id, limits).await?;
    Ok(id)
}

pub async fn revoke_key<T: Tx>(tx: &T, id: i64) -> Result<(), StoreError> {
    let sql = "UPDATE keys SET revoked_ms = $2 WHERE id = $1 AND revoked_ms IS NULL";
    match tx.execute(sql, given![id, now_ms()]).await? {
        0 => Err(StoreError::Absent(format!("key {id} that is in use"))),
        _ => Ok(()),
    }
}

pub async fn add_account<T: Tx>(tx: &T, account: NewAccount) -> Result<i64, StoreError> {
    let models = account.models.map(|models| serde_json::Value::from(models).to_string());
    let added = tx
        .row(
            "INSERT INTO accounts (name, endpoint, sealed_key, hint, base_url, models, weight, tier, concurrency, created_ms)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING RETURNING id",
            given![
                &account.name,
                account.endpoint,
                account.sealed_key,
                account.hint,
                account.base_url,
                models,
                account.weight,
                account.tier,
                account.concurrency,
                now_ms()
            ],
        )
        .await?;
    added.ok_or_else(|| StoreError::Refused(format!("there is an account '{}' already", account.name)))?.get(0)
}

pub async fn set_account_enabled<T: Tx>(tx: &T, name: String, enabled: bool) -> Result<(), StoreError> {
    let sql = "UPDATE accounts SET enabled = $2 WHERE name = $1 AND removed_ms IS NULL";
    match tx.execute(sql, given![&name, enabled]).await? {
        0 => Err(StoreError::Absent(format!("account '{name}'"))),
        _ => Ok(()),
    }
}

pub async fn remove_account<T: Tx>(tx: &T, name: String) -> Result<(), StoreError> {
    let sql = "UPDATE accounts SET removed_ms = $2, enabled = FALSE, sealed_key = $3, name = name || ' #' || id
               WHERE name = $1 AND removed_ms IS NULL";
    match tx.execute(sql, given![&name, now_ms(), Vec::<u8>::new()]).await? {
        0 => Err(StoreError::Absent(format!("account '{name}'"))),
        _ => Ok(()),
    }
}

const USER_SELECT: &str = "SELECT id, name, group_id, balance_nano,
    (SELECT CAST(coalesce(sum(amount_nano), 0) AS BIGINT) FROM leases WHERE user_id = users.id), frozen, created_ms,
    thaws, day_nano, month_nano FROM users";

fn user_row(row: &Row) -> Result<UserRow, StoreError> {
    Ok(UserRow {
        id: row.get(0)?,
        name: row.get(1)?,
        group_id: row.get(2)?,
        balance_nano: row.get(3)?,
        leased_nano: row.get(4)?,
        frozen: row.get(5)?,
        created_ms: row.get(6)?,
        thaws: row.get(7)?,
        day_nano: row.get(8)?,
        month_nano: row.get(9)?,
    })
}

async fn find_user<T: Tx>(tx: &T, name: &str) -> Result<UserRow, StoreError> {
    let row = tx.row(&format!("{USER_SELECT} WHERE name = $1"), given![name]).await?;
    user_row(&row.ok_or_else(|| StoreError::Absent(format!("user '{name}'")))?)
}

async fn insert_user<T: Tx>(tx: &T, name: &str, group_id: i64) -> Result<i64, StoreError> {
    let sql = "INSERT INTO users (name, group_id, created_ms) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING id";
    let added = tx.row(sql, given![name, group_id, now_ms()]).await?;
    added.ok_or_else(|| StoreError::Refused(format!("there is a user '{name}' already")))?.get(0)
}

async fn add_entry<T: Tx>(tx: &T, user_id: i64, amount_nano: i64, note: &str) -> Result<(), StoreError> {
    let sql = "UPDATE users SET balance_nano = balance_nano + $2 WHERE id = $1";
    tx.execute(sql, given![user_id, amount_nano]).await?;
    if amount_nano > 0 {
        let sql = "UPDATE users SET frozen = FALSE, thaws = FALSE WHERE id = $1 AND frozen AND thaws";
        tx.execute(sql, given![user_id]).await?;
    }
    let sql = "INSERT INTO entries (user_id, amount_nano, note, at_ms) VALUES ($1, $2, $3, $4)";
    tx.execute(sql, given![user_id, amount_nano, note, now_ms()]).await?;
    Ok(())
}

async fn insert_key<T: Tx>(tx: &T, user_id: i64, hash: [u8; 32], hint: &str, name: &str) -> Result<i64, StoreError> {
    let sql = "INSERT INTO keys (user_id, hash, hint, name, created_ms) VALUES ($1, $2, $3, $4, $5)
               ON CONFLICT DO NOTHING RETURNING id";
    let added = tx.row(sql, given![user_id, hash, hint, name, now_ms()]).await?;
    added.ok_or_else(|| StoreError::Refused("this key exists already".into()))?.get(0)
}

/// A JSON array of names, or NULL.
fn names(row: &Row, index: usize) -> Result<Option<Vec<String>>, StoreError> {
    let text: Option<String> = row.get(index)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| StoreError::Database(error.to_string()))).transpose()
}
