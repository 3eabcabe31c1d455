//! `GET /v1/dashboard/billing/subscription` and `…/usage`: the balance, as front ends ask for it.
//!
//! OpenAI's own dashboard had these, and NextChat and others still read two numbers: `hard_limit_usd`, in the currency of
//! this gateway, and `total_usage`, in its hundredths. What they show is the one less the other. They ask for the usage
//! of very different times (a month, 90 days, 100 days), so both count from the beginning: only then the difference is
//! the balance, whoever asks.

use hyper::Response;
use serde_json::{Value, json};

use super::journey::whole;
use super::reply::Reply;
use super::{Gateway, unanswered, usage};
use crate::error::Error;
use crate::preprocess::Admitted;
use crate::store::{Owner, StoreError, now_ms};
use crate::users::Key;

/// Nano-units in a unit of the currency.
const NANO: f64 = 1e9;
/// 9999-12-31: OpenAI tells when an access ends, ours has no end.
const ACCESS_UNTIL_S: i64 = 253_402_214_400;

/// What a key has left and what was charged, in nano-units: of itself where it has a limit of its own, else of its user.
pub(super) struct Account {
    pub left_nano: i64,
    pub charged_nano: i64,
}

/// `subscription`: what there was to begin with.
pub async fn subscription(gateway: &Gateway, admitted: &Admitted) -> Result<Response<Reply>, Error> {
    usage::asked(admitted)?;
    let Account { left_nano, charged_nano } = account(gateway, admitted.key()).await.map_err(unanswered)?;
    let limit = units(left_nano.saturating_add(charged_nano));
    let body = json!({
        "object": "billing_subscription",
        "has_payment_method": true,
        "soft_limit_usd": limit,
        "hard_limit_usd": limit,
        "system_hard_limit_usd": limit,
        "access_until": ACCESS_UNTIL_S,
    });
    Ok(whole(body.to_string()))
}

/// `usage`: what was charged of it.
pub async fn billed(gateway: &Gateway, admitted: &Admitted) -> Result<Response<Reply>, Error> {
    usage::asked(admitted)?;
    let Account { charged_nano, .. } = account(gateway, admitted.key()).await.map_err(unanswered)?;
    let hundredths: Value = units(charged_nano.saturating_mul(100));
    Ok(whole(json!({ "object": "list", "total_usage": hundredths }).to_string()))
}

/// Reads what a key has left. A key with a limit of its own is not told of more than the limit leaves.
pub(super) async fn account(gateway: &Gateway, key: &Key) -> Result<Account, StoreError> {
    let row = gateway.store.keys(Some(key.id)).await?.pop().ok_or_else(|| StoreError::Absent("key".into()))?;
    let balance_nano = gateway.ledger.balance_nano(key.user.id).await?;
    let owner = if row.is_limited() { Owner::Key(key.id) } else { Owner::User(key.user.id) };
    let spent = gateway.store.spent(vec![owner], now_ms()).await?[&owner];
    let limits =
        [(row.limit_nano, spent.total_nano), (row.day_nano, spent.day_nano), (row.month_nano, spent.month_nano)];
    let left = limits.into_iter().filter_map(|(limit, spent)| Some(limit?.saturating_sub(spent).max(0)));
    Ok(Account { left_nano: left.fold(balance_nano, i64::min), charged_nano: spent.total_nano })
}

/// A number as those clients read it: the one place where money is a float, and only to be shown.
fn units(nano: i64) -> Value {
    json!(nano as f64 / NANO)
}
