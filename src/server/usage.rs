//! `GET /v1/usage`: what a key has used, and what it and its user may use.

use hyper::Response;
use jiff::civil::Date;
use serde_json::{Value, json};

use super::journey::whole;
use super::reply::Reply;
use super::{Gateway, Snapshot, billing, unanswered};
use crate::config::decimal::Nano;
use crate::error::Error;
use crate::preprocess::Admitted;
use crate::store::{DayFilter, Owner, Spent, StoreError, date_of, day_of, day_of_date, now_ms};
use crate::users::Key;

/// Days of an answer without `since`, today included.
const DAYS_DEFAULT: i64 = 30;
/// Rows of an answer: a day and a model each.
const ROWS_MAX: u32 = 1000;

/// Answers for the key that came with the request. `query` may name the first and the last day: `since=2026-01-01` and
/// `until=2026-01-31`, UTC.
pub async fn of_key(
    gateway: &Gateway,
    snapshot: &Snapshot,
    admitted: &Admitted,
    query: &str,
) -> Result<Response<Reply>, Error> {
    asked(admitted)?;
    let today = day_of(now_ms());
    let since = day_given(query, "since")?.unwrap_or(today - DAYS_DEFAULT + 1);
    let until = day_given(query, "until")?.unwrap_or(today);
    let mut body = read(gateway, admitted.key(), since, until).await.map_err(unanswered)?;
    body["currency"] = snapshot.config.currency.as_str().into();
    Ok(whole(body.to_string()))
}

/// What asks the database counts as a request of its user, as a call does.
pub(super) fn asked(admitted: &Admitted) -> Result<(), Error> {
    admitted.key().user.admit(now_ms()).map_err(|retry_after_s| Error::TooManyRequests { retry_after_s })
}

fn day_given(query: &str, name: &'static str) -> Result<Option<i64>, Error> {
    let given = query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
    let Some((_, text)) = given else { return Ok(None) };
    let date: Result<Date, _> = text.parse();
    date.map(|date| Some(day_of_date(date))).map_err(|_| Error::body(name, "must be a date such as 2026-01-31"))
}

async fn read(gateway: &Gateway, key: &Key, since: i64, until: i64) -> Result<Value, StoreError> {
    let (store, user) = (&gateway.store, &key.user);
    let row = store.keys(Some(key.id)).await?.pop().ok_or_else(|| StoreError::Absent("key".into()))?;
    let user_row = store.users(Some(user.id)).await?.pop().ok_or_else(|| StoreError::Absent("user".into()))?;
    let left = billing::account(gateway, key).await?.left_nano;
    let owners = [Owner::Key(key.id), Owner::User(user.id)];
    let spent = store.spent(owners.to_vec(), now_ms()).await?;
    let filter = DayFilter {
        key_id: Some(key.id),
        since: Some(since),
        until: Some(until),
        limit: ROWS_MAX,
        ..DayFilter::default()
    };
    let days = store.days(filter).await?.into_iter().map(|(_, day)| {
        json!({
            "date": date_of(day.day).to_string(),
            "model": day.model,
            "calls": day.calls,
            "input_tokens": day.input,
            "cached_input_tokens": day.cached_input,
            "output_tokens": day.output,
            "charged": amount(day.charged_nano),
        })
    });
    // A key with limits of its own is told of its user's other keys only what counts against it.
    let told = |limit: Option<i64>, nano: i64| (!row.is_limited() || limit.is_some()).then(|| amount(nano));
    let of_user = &spent[&owners[1]];
    let allowance = json!({
        "day_limit": limit(user_row.day_nano),
        "month_limit": limit(user_row.month_nano),
        "charged": {
            "total": told(None, of_user.total_nano),
            "month": told(user_row.month_nano, of_user.month_nano),
            "day": told(user_row.day_nano, of_user.day_nano),
        },
    });
    let expires = row.expires_ms.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()).map(|at| at.to_string());
    Ok(json!({
        "object": "usage",
        "user": user.name,
        "balance": amount(left),
        "key": {
            "id": row.id,
            "name": row.name,
            "expires": expires,
            "models": row.models,
            "limit": limit(row.limit_nano),
            "day_limit": limit(row.day_nano),
            "month_limit": limit(row.month_nano),
            "charged": charged(&spent[&owners[0]]),
        },
        "allowance": allowance,
        "days": days.collect::<Vec<_>>(),
    }))
}

fn amount(nano: i64) -> String {
    Nano(nano).to_string()
}

fn limit(nano: Option<i64>) -> Option<String> {
    nano.map(amount)
}

fn charged(spent: &Spent) -> Value {
    json!({ "total": amount(spent.total_nano), "month": amount(spent.month_nano), "day": amount(spent.day_nano) })
}
