//! What there is, as listings: read by the subcommands and by the API.

use serde_json::Value;

use super::listing::{Listing, moment};
use crate::config::decimal::Nano;
use crate::config::{Config, Price, Rates};
use crate::store::{
    Audit, DayFilter, GroupRow, KeyRow, Line, LineCheck, LineCost, LineFilter, Store, StoreError, UserRow, date_of, hex,
};

fn amount(nano: i64) -> Value {
    Nano(nano).to_string().into()
}

fn limit(nano: Option<i64>) -> Value {
    nano.map_or(Value::Null, amount)
}

const USER: &[&str] = &["user", "balance", "frozen", "group", "day_limit", "month_limit", "created"];

fn user_row(user: &UserRow, groups: &[GroupRow]) -> Vec<Value> {
    let group = groups.iter().find(|group| group.id == user.group_id).map(|group| group.name.clone());
    // What a node has leased is the user's as much as what is in the balance.
    let balance = amount(user.balance_nano + user.leased_nano);
    let frozen = if user.thaws { "until_credit".into() } else { user.frozen.into() };
    let (day, month) = (limit(user.day_nano), limit(user.month_nano));
    vec![user.name.clone().into(), balance, frozen, group.into(), day, month, moment(user.created_ms)]
}

/// All users.
pub async fn users(store: &Store) -> Result<Listing, StoreError> {
    let (users, groups) = (store.users(None).await?, store.groups().await?);
    Ok(Listing::list(USER, users.iter().map(|user| user_row(user, &groups)).collect()))
}

/// One user.
pub async fn user(store: &Store, name: String) -> Result<Listing, StoreError> {
    let (user, groups) = (store.user(name).await?, store.groups().await?);
    Ok(Listing::one(USER, user_row(&user, &groups)))
}

/// All groups.
pub async fn groups(store: &Store) -> Result<Listing, StoreError> {
    let rows = store.groups().await?.into_iter().map(|group| {
        let ratio = Nano(group.ratio_micro * 1000).to_string();
        let requests = group.requests_per_minute.into();
        vec![group.name.into(), ratio.into(), group.models.into(), group.concurrency.into(), requests]
    });
    Ok(Listing::list(&["group", "ratio", "models", "concurrency", "requests_per_minute"], rows.collect()))
}

/// What nodes have leased, the oldest boot first.
pub async fn leases(store: &Store) -> Result<Listing, StoreError> {
    let rows = store.leases().await?.into_iter().map(|lease| {
        vec![hex(&lease.boot).into(), lease.user.into(), amount(lease.amount_nano), (lease.unheard_ms / 1000).into()]
    });
    Ok(Listing::list(&["boot", "user", "leased", "unheard_s"], rows.collect()))
}

/// Keys by their last four characters, all or one user's.
pub async fn keys(store: &Store, of: Option<String>) -> Result<Listing, StoreError> {
    let users = match of {
        Some(name) => vec![store.user(name).await?],
        None => store.users(None).await?,
    };
    let keys = store.keys(None).await?;
    let row = |(user, key): (&UserRow, &KeyRow)| {
        let ends = format!("…{}", key.hint);
        let revoked = key.revoked_ms.map_or(Value::Null, moment);
        vec![
            key.id.into(),
            user.name.clone().into(),
            key.name.clone().into(),
            ends.into(),
            moment(key.created_ms),
            key.expires_ms.map_or(Value::Null, moment),
            revoked,
            key.models.clone().into(),
            limit(key.limit_nano),
            limit(key.day_nano),
            limit(key.month_nano),
        ]
    };
    let of_user = |key| users.iter().find(|user| user.id == KeyRow::user_id(key)).zip(Some(key));
    let rows = keys.iter().filter_map(of_user).map(row).collect();
    let columns =
        &["id", "user", "name", "key", "created", "expires", "revoked", "models", "limit", "day_limit", "month_limit"];
    Ok(Listing::list(columns, rows))
}

impl KeyRow {
    fn user_id(&self) -> i64 {
        self.user_id
    }
}

/// All codes by their last four characters.
pub async fn codes(store: &Store) -> Result<Listing, StoreError> {
    let rows = store.codes().await?.into_iter().map(|code| {
        vec![
            code.id.into(),
            format!("…{}", code.hint).into(),
            amount(code.amount_nano),
            moment(code.created_ms),
            code.expires_ms.map_or(Value::Null, moment),
            code.revoked_ms.map_or(Value::Null, moment),
            code.redeemed_ms.map_or(Value::Null, moment),
            code.redeemed_by.into(),
            code.note.into(),
        ]
    });
    let columns = &["id", "code", "amount", "created", "expires", "revoked", "redeemed", "redeemed_by", "note"];
    Ok(Listing::list(columns, rows.collect()))
}

/// Public templates, or one user's, without their messages.
pub async fn templates(store: &Store, user_id: Option<i64>) -> Result<Listing, StoreError> {
    let rows = store.templates(user_id).await?.into_iter().map(|template| {
        let size = template.messages.len();
        let changed = if template.updated_ms == 0 { Value::Null } else { moment(template.updated_ms) };
        vec![template.name.into(), template.description.into(), template.enabled.into(), size.into(), changed]
    });
    Ok(Listing::list(&["name", "description", "enabled", "bytes", "changed"], rows.collect()))
}

/// A template with its messages.
pub async fn template(store: &Store, user_id: Option<i64>, name: &str) -> Result<Listing, StoreError> {
    let found = store.templates(user_id).await?.into_iter().find(|template| template.name == name);
    let template = found.ok_or_else(|| StoreError::Absent(format!("template '{name}'")))?;
    let messages = serde_json::from_str(&template.messages).unwrap_or(Value::Null);
    let columns = &["name", "description", "enabled", "messages"];
    let row = vec![template.name.into(), template.description.into(), template.enabled.into(), messages];
    Ok(Listing::one(columns, row))
}

/// All accounts, without their keys.
pub async fn accounts(store: &Store) -> Result<Listing, StoreError> {
    let rows = store.accounts().await?.into_iter().map(|account| {
        vec![
            account.name.into(),
            account.endpoint.into(),
            format!("…{}", account.hint).into(),
            account.enabled.into(),
            account.tier.into(),
            account.weight.into(),
            account.concurrency.into(),
            account.models.into(),
            account.base_url.into(),
        ]
    });
    let columns = &["name", "endpoint", "key", "enabled", "tier", "weight", "concurrency", "models", "base_url"];
    Ok(Listing::list(columns, rows.collect()))
}

/// Served models with their prices.
pub fn models(config: &Config) -> Listing {
    let rows = config.models.values().map(|model| {
        let serving = config.endpoints.values().filter(|endpoint| endpoint.models.contains(&model.name));
        let endpoints: Vec<String> = serving
            .map(|endpoint| match endpoint.mapping.get(&model.name) {
                Some(mapped) => format!("{} as {mapped}", endpoint.name),
                None => endpoint.name.clone(),
            })
            .collect();
        let Price { per_call_nano, rates, tiers } = &model.price;
        let tiers = tiers.iter().map(|tier| format!("above {}: {}", tier.above, rates_text(&tier.rates)));
        vec![
            model.name.clone().into(),
            amount(rates.input_nano),
            amount(rates.cached_input_nano),
            amount(rates.output_nano),
            amount(*per_call_nano),
            kinds(rates).map(|(name, nano)| format!("{name} {}", Nano(nano))).collect::<Vec<_>>().into(),
            tiers.collect::<Vec<_>>().into(),
            model.context.into(),
            model.max_output.into(),
            endpoints.into(),
        ]
    });
    let columns = &[
        "model",
        "input",
        "cached_input",
        "output",
        "per_call",
        "kinds",
        "tiers",
        "context",
        "max_output",
        "endpoints",
    ];
    let served = |row: &Vec<Value>| row.last() != Some(&Value::Array(vec![]));
    Listing::list(columns, rows.filter(served).collect())
}

/// Kinds of tokens whose rate is not that of the whole that they are a part of.
fn kinds(rates: &Rates) -> impl Iterator<Item = (&'static str, i64)> {
    let own = [
        ("audio_input", rates.audio_input_nano, rates.input_nano),
        ("image_input", rates.image_input_nano, rates.input_nano),
        ("reasoning", rates.reasoning_nano, rates.output_nano),
        ("audio_output", rates.audio_output_nano, rates.output_nano),
        ("image_output", rates.image_output_nano, rates.output_nano),
    ];
    own.into_iter().filter(|(_, own, whole)| own != whole).map(|(name, own, _)| (name, own))
}

fn rates_text(rates: &Rates) -> String {
    let usual = [("input", rates.input_nano), ("cached_input", rates.cached_input_nano), ("output", rates.output_nano)];
    let all = usual.into_iter().chain(kinds(rates)).map(|(name, nano)| format!("{name} {}", Nano(nano)));
    all.collect::<Vec<_>>().join(", ")
}

/// A column of lines, and whether a table on a terminal has it: JSON and CSV have all.
type LineColumn = (&'static str, bool, fn(&str, &Line) -> Value);

static LINE_COLUMNS: [LineColumn; 39] = [
    ("started", true, |_, line| moment(line.started_ms)),
    ("user", true, |user, _| user.into()),
    ("key", false, |_, line| line.key_id.into()),
    ("model", true, |_, line| line.model.clone().into()),
    ("model_asked", false, |_, line| line.model_asked.clone().into()),
    ("model_upstream", false, |_, line| line.model_upstream.clone().into()),
    ("endpoint", true, |_, line| line.endpoint.clone().into()),
    ("account", false, |_, line| line.account_id.into()),
    ("input_tokens", true, |_, line| line.input.into()),
    ("cached_input_tokens", true, |_, line| line.cached_input.into()),
    ("output_tokens", true, |_, line| line.output.into()),
    ("billed", true, |_, line| line.billed.name().into()),
    ("price_version", false, |_, line| line.price_version.into()),
    ("tier", false, |_, line| line.tier.into()),
    ("ratio", false, |_, line| Nano(line.ratio_micro.saturating_mul(1000)).to_string().into()),
    ("calls", false, |_, line| line.units.into()),
    ("hold", false, |_, line| amount(line.hold_nano)),
    ("charged", true, |_, line| amount(line.charged_nano)),
    ("absorbed", true, |_, line| amount(line.absorbed_nano)),
    ("usage_input_tokens", false, |_, line| line.usage_input.into()),
    ("usage_cached_input_tokens", false, |_, line| line.usage_cached.into()),
    ("usage_audio_input_tokens", false, |_, line| line.usage_audio_input.into()),
    ("usage_image_input_tokens", false, |_, line| line.usage_image_input.into()),
    ("usage_output_tokens", false, |_, line| line.usage_output.into()),
    ("usage_reasoning_tokens", false, |_, line| line.usage_reasoning.into()),
    ("usage_audio_output_tokens", false, |_, line| line.usage_audio_output.into()),
    ("usage_image_output_tokens", false, |_, line| line.usage_image_output.into()),
    ("counted_input_tokens", false, |_, line| line.counted_input.into()),
    ("counted_output_tokens", false, |_, line| line.counted_output.into()),
    ("calibration", false, |_, line| Nano(line.calibration_micro.saturating_mul(1000)).to_string().into()),
    ("estimated", false, |_, line| line.estimated.into()),
    ("flagged", false, |_, line| line.flagged.into()),
    ("end_reason", true, |_, line| line.end_reason.name().into()),
    ("status", true, |_, line| line.status.into()),
    ("tries", true, |_, line| line.tries.into()),
    ("content_after_ms", true, |_, line| line.content_after_ms.into()),
    ("duration_ms", true, |_, line| line.duration_ms.into()),
    ("request_id", true, |_, line| line.request_id.clone().into()),
    ("client_request_id", false, |_, line| line.client_request_id.clone().into()),
];

/// Lines, newest first; `whole`: with every column.
pub async fn usage(store: &Store, filter: LineFilter, whole: bool) -> Result<Listing, StoreError> {
    let columns: Vec<&LineColumn> = LINE_COLUMNS.iter().filter(|(_, brief, _)| whole || *brief).collect();
    let lines = store.lines(filter).await?;
    let rows = lines.iter().map(|(user, line)| columns.iter().map(|(.., value)| value(user, line)).collect());
    Ok(Listing::list_of(columns.iter().map(|(name, ..)| *name).collect(), rows.collect()))
}

/// What days came to, newest first.
pub async fn usage_per_day(store: &Store, filter: DayFilter) -> Result<Listing, StoreError> {
    let rows = store.days(filter).await?.into_iter().map(|(user, day)| {
        vec![
            date_of(day.day).to_string().into(),
            user.into(),
            day.key_id.into(),
            day.model.into(),
            day.calls.into(),
            day.input.into(),
            day.cached_input.into(),
            day.output.into(),
            amount(day.charged_nano),
            amount(day.absorbed_nano),
        ]
    });
    let columns = &[
        "day",
        "user",
        "key",
        "model",
        "calls",
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "charged",
        "absorbed",
    ];
    Ok(Listing::list(columns, rows.collect()))
}

/// What lines would cost at the prices of the configuration, by user and model.
pub async fn recompute(
    store: &Store,
    config: &Config,
    filter: LineFilter,
    cost: LineCost,
) -> Result<Listing, StoreError> {
    let prices = config.models.values().map(|model| (model.name.clone(), model.price.clone())).collect();
    let rows = store.recompute(filter, prices, cost).await?.into_iter().map(|found| {
        vec![
            found.user.into(),
            found.model.into(),
            found.lines.into(),
            amount(found.charged_nano),
            amount(found.absorbed_nano),
            amount(found.cost_nano),
            amount(found.new_cost_nano),
            amount(found.new_cost_nano.saturating_sub(found.cost_nano)),
        ]
    });
    let columns = &["user", "model", "lines", "charged", "absorbed", "cost", "new_cost", "difference"];
    Ok(Listing::list(columns, rows.collect()))
}

/// The sums of every user; beside it what does not agree, nothing if all does.
pub async fn audit(store: &Store, check: LineCheck) -> Result<(Listing, Vec<String>), StoreError> {
    let audit = store.audit(check).await?;
    let wrong = findings(&audit);
    let rows = audit.users.iter().map(|user| {
        vec![
            user.name.clone().into(),
            amount(user.entries_nano),
            amount(user.charged_nano),
            amount(user.balance_nano),
            amount(user.leased_nano),
            amount(user.difference_nano()),
        ]
    });
    let total = |pick: fn(&crate::store::UserSums) -> i64| amount(audit.users.iter().map(pick).sum());
    let all = vec![
        format!("(all: {} lines, {} absorbed)", audit.lines, Nano(audit.absorbed_nano)).into(),
        total(|user| user.entries_nano),
        total(|user| user.charged_nano),
        total(|user| user.balance_nano),
        total(|user| user.leased_nano),
        total(|user| user.difference_nano()),
    ];
    let columns = &["user", "credits", "charges", "balance", "leases", "difference"];
    Ok((Listing::list(columns, rows.chain([all]).collect()), wrong))
}

fn findings(audit: &Audit) -> Vec<String> {
    let mut wrong = audit.findings.clone();
    for user in audit.users.iter().filter(|user| user.difference_nano() != 0) {
        wrong.push(format!("user '{}': credits, charges, balance and leases do not add up", user.name));
    }
    wrong
}
