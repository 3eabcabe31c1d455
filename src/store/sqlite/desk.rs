//! What an operator changes, and what a running server reads of it: users, keys, groups, accounts, and their changes.

use rusqlite::types::{Type, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::{Store, collect};
use crate::store::{AccountRow, Change, GroupRow, KeyRow, NewAccount, StoreError, UserRow, now_ms};

/// Rows of `changes` that are kept; a server that is further behind reads everything again.
const CHANGES_KEPT: i64 = 10_000;

impl Store {
    /// The first start: stores the admin token's hash, a first user with a key, and a first credit (0: none), all or
    /// nothing. False when there was a first start before.
    pub async fn first_start(
        &self,
        admin_token_hash: String,
        user: &'static str,
        credit_nano: i64,
        key: ([u8; 32], String),
    ) -> Result<bool, StoreError> {
        self.write(move |tx| {
            let sql = "INSERT INTO settings (name, value) VALUES ('admin_token_hash', ?1) ON CONFLICT DO NOTHING";
            if tx.execute(sql, [admin_token_hash])? == 0 {
                return Ok(false);
            }
            tx.execute("INSERT INTO users (name, created_ms) VALUES (?1, ?2)", params![user, now_ms()])?;
            let user_id = tx.last_insert_rowid();
            if credit_nano > 0 {
                add_credit(tx, user_id, credit_nano, "first start")?;
            }
            insert_key(tx, user_id, &key.0, &key.1, "first")?;
            Ok(true)
        })
        .await
    }

    /// The number of the newest change.
    pub async fn change_sequence(&self) -> Result<i64, StoreError> {
        self.job(|connection| {
            Ok(connection.query_row("SELECT coalesce(max(sequence), 0) FROM changes", [], |row| row.get(0))?)
        })
        .await
    }

    /// Changes after `sequence`, with the newest number; also forgets very old ones.
    pub async fn changes_since(&self, sequence: i64) -> Result<(i64, Vec<Change>), StoreError> {
        self.job(move |connection| {
            let mut newest = sequence;
            let mut changes = Vec::new();
            let mut statement = connection
                .prepare_cached("SELECT sequence, kind, row FROM changes WHERE sequence > ?1 ORDER BY sequence")?;
            let mut rows = statement.query([sequence])?;
            while let Some(row) = rows.next()? {
                let next: i64 = row.get(0)?;
                if changes.is_empty() && next > sequence + 1 {
                    changes.extend([Change::Group, Change::Account]); // some are forgotten: read everything
                }
                newest = next;
                let id: i64 = row.get(2)?;
                changes.push(match row.get_ref(1)?.as_str().unwrap_or_default() {
                    "user" => Change::User(id),
                    "key" => Change::Key(id),
                    "account" => Change::Account,
                    "balance" => Change::Balance(id),
                    _ => Change::Group,
                });
            }
            drop(rows);
            drop(statement);
            if !changes.is_empty() && newest % 1000 < changes.len() as i64 {
                connection.execute("DELETE FROM changes WHERE sequence < ?1", [newest - CHANGES_KEPT])?;
            }
            Ok((newest, changes))
        })
        .await
    }

    /// All groups.
    pub async fn groups(&self) -> Result<Vec<GroupRow>, StoreError> {
        self.job(|connection| {
            let sql = "SELECT id, name, ratio_micro, models, concurrency FROM groups ORDER BY id";
            collect(connection, sql, [], |row| {
                Ok(GroupRow {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    ratio_micro: row.get(2)?,
                    models: names(row, 3)?,
                    concurrency: row.get(4)?,
                })
            })
        })
        .await
    }

    /// All users, or the one with this id.
    pub async fn users(&self, id: Option<i64>) -> Result<Vec<UserRow>, StoreError> {
        self.job(move |connection| {
            let sql = format!("{USER_SELECT} WHERE ?1 IS NULL OR id = ?1 ORDER BY id");
            collect(connection, &sql, [id], user_row)
        })
        .await
    }

    /// The user of this name.
    pub async fn user(&self, name: String) -> Result<UserRow, StoreError> {
        self.job(move |connection| find_user(connection, &name)).await
    }

    /// All keys, or the one with this id; revoked ones too.
    pub async fn keys(&self, id: Option<i64>) -> Result<Vec<KeyRow>, StoreError> {
        self.job(move |connection| {
            let sql = "SELECT id, user_id, hash, hint, name, created_ms, expires_ms, revoked_ms FROM keys
                       WHERE ?1 IS NULL OR id = ?1 ORDER BY id";
            collect(connection, sql, [id], |row| {
                Ok(KeyRow {
                    id: row.get(0)?,
                    user_id: row.get(1)?,
                    hash: row.get(2)?,
                    hint: row.get(3)?,
                    name: row.get(4)?,
                    created_ms: row.get(5)?,
                    expires_ms: row.get(6)?,
                    revoked_ms: row.get(7)?,
                })
            })
        })
        .await
    }

    /// All accounts that were not removed.
    pub async fn accounts(&self) -> Result<Vec<AccountRow>, StoreError> {
        self.job(|connection| {
            let sql =
                "SELECT id, name, endpoint, sealed_key, hint, base_url, models, weight, tier, concurrency, enabled
                       FROM accounts WHERE removed_ms IS NULL ORDER BY id";
            collect(connection, sql, [], |row| {
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
            })
        })
        .await
    }

    /// Adds a user with a first credit (0: none) and, when given, a key.
    pub async fn add_user(
        &self,
        name: String,
        group: String,
        credit_nano: i64,
        key: Option<([u8; 32], String)>,
    ) -> Result<UserRow, StoreError> {
        self.write(move |tx| {
            let group_id: i64 = tx
                .query_row("SELECT id FROM groups WHERE name = ?1", [&group], |row| row.get(0))
                .optional()?
                .ok_or_else(|| StoreError::Absent(format!("group '{group}'")))?;
            let sql = "INSERT INTO users (name, group_id, created_ms) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";
            if tx.execute(sql, params![name, group_id, now_ms()])? == 0 {
                return Err(StoreError::Refused(format!("there is a user '{name}' already")));
            }
            let user_id = tx.last_insert_rowid();
            if credit_nano > 0 {
                add_credit(tx, user_id, credit_nano, "first credit")?;
            }
            if let Some((hash, hint)) = key {
                insert_key(tx, user_id, &hash, &hint, "")?;
            }
            find_user(tx, &name)
        })
        .await
    }

    /// Credits a user; the amount is above zero.
    pub async fn credit(&self, name: String, amount_nano: i64, note: String) -> Result<UserRow, StoreError> {
        self.write(move |tx| {
            if amount_nano <= 0 {
                return Err(StoreError::Refused("a credit must be above zero".into()));
            }
            let user = find_user(tx, &name)?;
            add_credit(tx, user.id, amount_nano, &note)?;
            find_user(tx, &name)
        })
        .await
    }

    /// Freezes or unfreezes a user.
    pub async fn set_frozen(&self, name: String, frozen: bool) -> Result<UserRow, StoreError> {
        self.write(move |tx| {
            let user = find_user(tx, &name)?;
            tx.execute("UPDATE users SET frozen = ?2 WHERE id = ?1", params![user.id, frozen])?;
            find_user(tx, &name)
        })
        .await
    }

    /// Adds a key to a user; returns its id.
    pub async fn add_key(&self, user: String, hash: [u8; 32], hint: String, name: String) -> Result<i64, StoreError> {
        self.write(move |tx| {
            let user = find_user(tx, &user)?;
            insert_key(tx, user.id, &hash, &hint, &name)?;
            Ok(tx.last_insert_rowid())
        })
        .await
    }

    /// Revokes a key for good.
    pub async fn revoke_key(&self, id: i64) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE keys SET revoked_ms = ?2 WHERE id = ?1 AND revoked_ms IS NULL";
            match tx.execute(sql, params![id, now_ms()])? {
                0 => Err(StoreError::Absent(format!("key {id} that is in use"))),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Adds an account; returns its id. The name of a removed account may be used again.
    pub async fn add_account(&self, account: NewAccount) -> Result<i64, StoreError> {
        self.write(move |tx| {
            let models = account.models.map(|models| serde_json::Value::from(models).to_string());
            let added = tx.execute(
                "INSERT INTO accounts (name, endpoint, sealed_key, hint, base_url, models, weight, tier, concurrency, created_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT DO NOTHING",
                params![
                    account.name,
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
            )?;
            match added {
                0 => Err(StoreError::Refused(format!("there is an account '{}' already", account.name))),
                _ => Ok(tx.last_insert_rowid()),
            }
        })
        .await
    }

    /// Enables or disables an account.
    pub async fn set_account_enabled(&self, name: String, enabled: bool) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE accounts SET enabled = ?2 WHERE name = ?1 AND removed_ms IS NULL";
            match tx.execute(sql, params![name, enabled])? {
                0 => Err(StoreError::Absent(format!("account '{name}'"))),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Removes an account: its key is forgotten, its id stays for the lines that name it.
    pub async fn remove_account(&self, name: String) -> Result<(), StoreError> {
        self.write(move |tx| {
            let sql = "UPDATE accounts SET removed_ms = ?2, enabled = 0, sealed_key = x'', name = name || ' #' || id
                       WHERE name = ?1 AND removed_ms IS NULL";
            match tx.execute(sql, params![name, now_ms()])? {
                0 => Err(StoreError::Absent(format!("account '{name}'"))),
                _ => Ok(()),
            }
        })
        .await
    }
}

const USER_SELECT: &str = "SELECT id, name, group_id, balance_nano,
    (SELECT coalesce(sum(amount_nano), 0) FROM leases WHERE user_id = users.id), frozen, created_ms FROM users";

fn user_row(row: &Row<'_>) -> rusqlite::Result<UserRow> {
    Ok(UserRow {
        id: row.get(0)?,
        name: row.get(1)?,
        group_id: row.get(2)?,
        balance_nano: row.get(3)?,
        leased_nano: row.get(4)?,
        frozen: row.get(5)?,
        created_ms: row.get(6)?,
    })
}

fn find_user(connection: &Connection, name: &str) -> Result<UserRow, StoreError> {
    connection
        .query_row(&format!("{USER_SELECT} WHERE name = ?1"), [name], user_row)
        .optional()?
        .ok_or_else(|| StoreError::Absent(format!("user '{name}'")))
}

fn add_credit(tx: &Transaction<'_>, user_id: i64, amount_nano: i64, note: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE users SET balance_nano = balance_nano + ?2 WHERE id = ?1", params![user_id, amount_nano])?;
    tx.execute(
        "INSERT INTO entries (user_id, amount_nano, note, at_ms) VALUES (?1, ?2, ?3, ?4)",
        params![user_id, amount_nano, note, now_ms()],
    )?;
    Ok(())
}

fn insert_key(tx: &Transaction<'_>, user_id: i64, hash: &[u8; 32], hint: &str, name: &str) -> Result<(), StoreError> {
    let sql =
        "INSERT INTO keys (user_id, hash, hint, name, created_ms) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING";
    match tx.execute(sql, params![user_id, hash, hint, name, now_ms()])? {
        0 => Err(StoreError::Refused("this key exists already".into())),
        _ => Ok(()),
    }
}

/// A JSON array of names, or NULL.
fn names(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<Vec<String>>> {
    match row.get_ref(index)? {
        ValueRef::Null => Ok(None),
        value => {
            let text = value
                .as_str()
                .map_err(|error| rusqlite::Error::FromSqlConversionFailure(index, Type::Text, Box::new(error)))?;
            serde_json::from_str(text)
                .map(Some)
                .map_err(|error| rusqlite::Error::FromSqlConversionFailure(index, Type::Text, Box::new(error)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_missed_forgotten_changes_reads_everything() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("x.db")).unwrap();
        for name in ["ann", "bob", "eve"] {
            store.add_user(name.into(), "default".into(), 0, None).await.unwrap();
        }
        let (newest, changes) = store.changes_since(0).await.unwrap();
        assert!(!changes.contains(&Change::Account), "{changes:?}");
        store.write(|tx| Ok(tx.execute("DELETE FROM changes WHERE sequence < 3", [])?)).await.unwrap();
        let (_, changes) = store.changes_since(0).await.unwrap();
        assert_eq!(changes[..2], [Change::Group, Change::Account]);
        assert_eq!(store.changes_since(newest).await.unwrap(), (newest, vec![]));
    }

    #[tokio::test]
    async fn a_removed_accounts_name_can_be_used_again_and_its_key_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("x.db")).unwrap();
        let account = NewAccount {
            name: "main".into(),
            endpoint: "up".into(),
            sealed_key: b"sealed".to_vec(),
            hint: "aled".into(),
            base_url: None,
            models: Some(vec!["m".into()]),
            weight: 1,
            tier: 0,
            concurrency: None,
        };
        let first = store.add_account(account.clone()).await.unwrap();
        assert!(matches!(store.add_account(account.clone()).await, Err(StoreError::Refused(_))));
        store.remove_account("main".into()).await.unwrap();
        assert_ne!(store.add_account(account).await.unwrap(), first);
        let kept = store.job(move |connection| {
            Ok(connection
                .query_row("SELECT sealed_key FROM accounts WHERE id = ?1", [first], |row| row.get::<_, Vec<u8>>(0))?)
        });
        assert!(kept.await.unwrap().is_empty());
        assert_eq!(store.accounts().await.unwrap()[0].models, Some(vec!["m".into()]));
    }
}
