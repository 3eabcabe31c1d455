//! Templates: messages that stand for a word in a chat, public ones of the operator and private ones of users.

use super::tx::{Row, Tx, given};
use super::{NewTemplate, StoreError, TemplateRow, now_ms};

/// Private templates of one user.
pub const TEMPLATES_MAX: u64 = 100;

/// Templates that a user is shown.
const LISTED_MAX: u32 = 500;

const COLUMNS: &str = "name, user_id, description, messages, enabled, updated_ms";

/// All public templates, or all of one user's.
pub async fn templates<T: Tx>(tx: &T, user_id: Option<i64>) -> Result<Vec<TemplateRow>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM templates WHERE (CAST($1 AS BIGINT) IS NULL AND user_id IS NULL) OR user_id = $1
         ORDER BY name"
    );
    tx.rows(&sql, given![user_id]).await?.iter().map(row).collect()
}

/// The enabled templates that a user has, without their messages: the user's own, then public ones, some [`LISTED_MAX`].
pub async fn listed_templates<T: Tx>(tx: &T, user_id: i64) -> Result<Vec<TemplateRow>, StoreError> {
    let sql = "SELECT name, user_id, description, '', enabled, updated_ms FROM templates
               WHERE (user_id = $1 OR user_id IS NULL) AND enabled
               ORDER BY CASE WHEN user_id IS NULL THEN 1 ELSE 0 END, name LIMIT $2";
    tx.rows(sql, given![user_id, LISTED_MAX]).await?.iter().map(row).collect()
}

/// The enabled templates of these names that a user has: a private one before a public one, those that there are.
pub async fn named_templates<T: Tx>(tx: &T, user_id: i64, names: Vec<String>) -> Result<Vec<TemplateRow>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM templates WHERE name = $1 AND (user_id = $2 OR user_id IS NULL) AND enabled
         ORDER BY CASE WHEN user_id IS NULL THEN 1 ELSE 0 END LIMIT 1"
    );
    let mut found = Vec::new();
    for name in names {
        if let Some(template) = tx.row(&sql, given![name, user_id]).await? {
            found.push(row(&template)?);
        }
    }
    Ok(found)
}

/// Adds a template, or changes the one of this name; true when it was there before.
pub async fn put_template<T: Tx>(tx: &T, template: NewTemplate) -> Result<bool, StoreError> {
    let NewTemplate { user_id, name, description, messages, enabled } = template;
    let of = "((CAST($1 AS BIGINT) IS NULL AND user_id IS NULL) OR user_id = $1)";
    let changed = tx
        .execute(
            &format!(
                "UPDATE templates SET description = coalesce($3, description), messages = coalesce($4, messages),
                 enabled = coalesce(CAST($5 AS BIGINT), CASE WHEN enabled THEN 1 ELSE 0 END) = 1, updated_ms = $6
                 WHERE {of} AND name = $2"
            ),
            given![user_id, &name, description.clone(), messages.clone(), enabled.map(i64::from), now_ms()],
        )
        .await?;
    if changed > 0 {
        return Ok(true);
    }
    let Some(messages) = messages else { return Err(StoreError::Absent(format!("template '{name}'"))) };
    if let Some(user_id) = user_id {
        // The user's row is locked, so that two calls at once cannot both be the last one.
        let sql = format!("SELECT id FROM users WHERE id = $1 {}", T::FOR_UPDATE);
        tx.row(&sql, given![user_id]).await?.ok_or_else(|| StoreError::Absent("user".into()))?;
        let count = tx.row("SELECT count(*) FROM templates WHERE user_id = $1", given![user_id]).await?;
        if count.ok_or(StoreError::Moved)?.get::<u64>(0)? >= TEMPLATES_MAX {
            return Err(StoreError::Refused(format!("a user has at most {TEMPLATES_MAX} templates")));
        }
    }
    let sql = "INSERT INTO templates (user_id, name, description, messages, enabled, updated_ms)
               VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";
    let description = description.unwrap_or_default();
    match tx.execute(sql, given![user_id, &name, description, messages, enabled.unwrap_or(true), now_ms()]).await? {
        0 => Err(StoreError::Refused("somebody has saved a template of this name at the same moment".into())),
        _ => Ok(false),
    }
}

/// Removes a template; `Absent` when there is none of this name.
pub async fn remove_template<T: Tx>(tx: &T, user_id: Option<i64>, name: String) -> Result<(), StoreError> {
    let sql = "DELETE FROM templates
               WHERE ((CAST($1 AS BIGINT) IS NULL AND user_id IS NULL) OR user_id = $1) AND name = $2";
    match tx.execute(sql, given![user_id, &name]).await? {
        0 => Err(StoreError::Absent(format!("template '{name}'"))),
        _ => Ok(()),
    }
}

fn row(row: &Row) -> Result<TemplateRow, StoreError> {
    Ok(TemplateRow {
        name: row.get(0)?,
        user_id: row.get(1)?,
        description: row.get(2)?,
        messages: row.get(3)?,
        enabled: row.get(4)?,
        updated_ms: row.get(5)?,
    })
}
