//! What a row is, once it has left the database. Money is nano-units, times are milliseconds since 1970 UTC.

use serde::{Deserialize, Serialize};

/// One life of one process: 128 random bits.
pub type BootId = [u8; 16];

/// A row of `boots`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    pub live: bool,
    /// How many END records of this boot's journal are lines in the store.
    pub shipped: u64,
}

/// A group of users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRow {
    pub id: i64,
    pub name: String,
    /// Price ratio in millionths.
    pub ratio_micro: i64,
    /// Allowed models; `None`: all.
    pub models: Option<Vec<String>>,
    /// Calls in flight of one user.
    pub concurrency: Option<u32>,
    /// Of one user.
    pub requests_per_minute: Option<u32>,
}

/// What `group set` stores; `None` leaves what there is, or takes the default.
#[derive(Clone, Debug)]
pub struct NewGroup {
    pub name: String,
    pub ratio_micro: Option<i64>,
    /// `Some(None)`: all.
    pub models: Option<Option<Vec<String>>>,
    /// `Some(None)`: no limit.
    pub concurrency: Option<Option<u32>>,
    /// `Some(None)`: no limit.
    pub requests_per_minute: Option<Option<u32>>,
}

/// Who has limits: what is charged to a key is charged to its user, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    Key(i64),
    User(i64),
}

/// What has been charged, in nano-units: in all, in this month and on this day (UTC).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    pub total_nano: i64,
    pub month_nano: i64,
    pub day_nano: i64,
}

/// A change of limits; `None` leaves what there is, `Some(None)`: no limit.
#[derive(Clone, Debug, Default)]
pub struct NewLimits {
    /// Of keys only.
    pub limit_nano: Option<Option<i64>>,
    pub day_nano: Option<Option<i64>>,
    pub month_nano: Option<Option<i64>>,
    /// Of keys only; `Some(None)`: those of the user's group.
    pub models: Option<Option<Vec<String>>>,
    /// Of keys only; `Some(None)`: never.
    pub expires_ms: Option<Option<i64>>,
}

/// A code that is worth money once; the code itself is stored nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeRow {
    pub id: i64,
    pub hint: String,
    pub amount_nano: i64,
    pub note: String,
    pub created_ms: i64,
    pub expires_ms: Option<i64>,
    pub revoked_ms: Option<i64>,
    pub redeemed_ms: Option<i64>,
    /// The user's name.
    pub redeemed_by: Option<String>,
}

/// What the calls of a day came to, by user, key and model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DayRow {
    /// Since 1970-01-01 UTC.
    pub day: i64,
    pub user_id: i64,
    pub key_id: i64,
    pub model: String,
    pub calls: u64,
    pub input: u64,
    pub cached_input: u64,
    pub output: u64,
    pub charged_nano: i64,
    pub absorbed_nano: i64,
}

/// Which days to read; see [`LineFilter`].
#[derive(Clone, Debug, Default)]
pub struct DayFilter {
    pub user: Option<String>,
    pub key_id: Option<i64>,
    pub model: Option<String>,
    /// First and last.
    pub since: Option<i64>,
    pub until: Option<i64>,
    /// At most this many rows, newest first.
    pub limit: u32,
}

/// A user. `balance_nano` leaves out what boots have leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRow {
    pub id: i64,
    pub name: String,
    pub group_id: i64,
    pub balance_nano: i64,
    /// What live and silent boots hold from.
    pub leased_nano: i64,
    pub frozen: bool,
    /// Frozen until the next credit.
    pub thaws: bool,
    /// Allowance of a day and of a month.
    pub day_nano: Option<i64>,
    pub month_nano: Option<i64>,
    pub created_ms: i64,
}

/// A key as it is known here: its hash, never itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    pub id: i64,
    pub user_id: i64,
    pub hash: [u8; 32],
    pub hint: String,
    pub name: String,
    pub created_ms: i64,
    pub expires_ms: Option<i64>,
    pub revoked_ms: Option<i64>,
    /// Allowed models; `None`: those of its user's group.
    pub models: Option<Vec<String>>,
    /// What it may be charged in all.
    pub limit_nano: Option<i64>,
    /// And each day and month, UTC.
    pub day_nano: Option<i64>,
    pub month_nano: Option<i64>,
}

impl KeyRow {
    /// Whether it has any limit of its own.
    pub fn is_limited(&self) -> bool {
        self.limit_nano.is_some() || self.day_nano.is_some() || self.month_nano.is_some()
    }
}

/// An account; its key is sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountRow {
    pub id: i64,
    pub name: String,
    pub endpoint: String,
    pub sealed_key: Vec<u8>,
    pub hint: String,
    pub base_url: Option<String>,
    pub models: Option<Vec<String>>,
    pub weight: u32,
    pub tier: u32,
    pub concurrency: Option<u32>,
    pub enabled: bool,
}

/// What `account add` stores.
#[derive(Clone, Debug)]
pub struct NewAccount {
    pub name: String,
    pub endpoint: String,
    pub sealed_key: Vec<u8>,
    pub hint: String,
    pub base_url: Option<String>,
    pub models: Option<Vec<String>>,
    pub weight: u32,
    pub tier: u32,
    pub concurrency: Option<u32>,
}

/// What a boot wants of a user's money: what calls need, and what may come ahead of it.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    pub user_id: i64,
    pub need_nano: i64,
    pub ahead_nano: i64,
}

/// A boot's lease of a user's money.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRow {
    pub amount_nano: i64,
    /// Granted − returned, ever.
    pub granted_nano: i64,
    /// Counts grants and returns, so that a commit whose outcome is unknown can be told from one that failed.
    pub version: i64,
    /// What is left in the user's balance.
    pub balance_nano: i64,
}

/// What other boots have leased of a user's money, in nano-units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    pub live_nano: i64,
    /// Of boots that nobody has heard of lately.
    pub silent_nano: i64,
    /// What is in the balance by now.
    pub balance_nano: i64,
}

/// A lease, as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseOf {
    pub boot: BootId,
    pub user: String,
    pub amount_nano: i64,
    /// Since the boot was heard of, by the database's clock.
    pub unheard_ms: i64,
}

/// What the database tells its nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// There are new rows in `changes`.
    Changes,
    /// A boot is short of a user's money.
    Short { user_id: i64, asking: BootId },
}

/// A template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRow {
    pub name: String,
    /// `None`: a public one.
    pub user_id: Option<i64>,
    pub description: String,
    /// A JSON array, each message as its sender wrote it.
    pub messages: String,
    pub enabled: bool,
    pub updated_ms: i64,
}

/// What is stored of a template; of one that is there already, `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct NewTemplate {
    /// `None`: a public one.
    pub user_id: Option<i64>,
    pub name: String,
    pub description: Option<String>,
    pub messages: Option<String>,
    pub enabled: Option<bool>,
}

/// One row of `changes`: what a running server has to read again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Group,
    User(i64),
    Key(i64),
    Account,
    Balance(i64),
    /// An operator is short of this user's money, on a database that has no other way to say so.
    Short(i64),
}

/// What a charge was computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Billed {
    /// The upstream's usage.
    Usage,
    /// The tokens counted here.
    Count,
    /// The last MARK of a call that a crash ended.
    Mark,
    /// The hold: the cost could not be computed.
    Hold,
    /// No content, no charge.
    Nothing,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// The upstream's whole answer was handed over.
    Complete,
    /// The money ran out; cut with `finish_reason: "length"`.
    Length,
    /// The client left.
    ClientGone,
    /// The upstream failed before content: nothing was answered but an error.
    Failed,
    /// The upstream broke off after content.
    UpstreamError,
    /// The process died; found in its journal.
    Crashed,
    /// The node shut down before the answer was whole.
    Drained,
}

impl Billed {
    /// Its name in the schema and everywhere else.
    pub fn name(self) -> &'static str {
        match self {
            Billed::Usage => "usage",
            Billed::Count => "count",
            Billed::Mark => "mark",
            Billed::Hold => "hold",
            Billed::Nothing => "nothing",
        }
    }

    pub(super) fn of(name: &str) -> Option<Billed> {
        [Billed::Usage, Billed::Count, Billed::Mark, Billed::Hold, Billed::Nothing]
            .into_iter()
            .find(|b| b.name() == name)
    }
}

impl EndReason {
    const ALL: [EndReason; 7] = [
        EndReason::Complete,
        EndReason::Length,
        EndReason::ClientGone,
        EndReason::Failed,
        EndReason::UpstreamError,
        EndReason::Crashed,
        EndReason::Drained,
    ];

    /// Its name in the schema and everywhere else.
    pub fn name(self) -> &'static str {
        match self {
            EndReason::Complete => "complete",
            EndReason::Length => "length",
            EndReason::ClientGone => "client_gone",
            EndReason::Failed => "failed",
            EndReason::UpstreamError => "upstream_error",
            EndReason::Crashed => "crashed",
            EndReason::Drained => "drained",
        }
    }

    pub(super) fn of(name: &str) -> Option<EndReason> {
        EndReason::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

/// The record of one call, as the journal and the store keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Counts calls within a boot; with the boot it is the call's id.
    pub sequence: u64,
    pub request_id: String,
    pub client_request_id: Option<String>,
    pub user_id: i64,
    pub key_id: i64,
    pub ratio_micro: i64,
    pub account_id: Option<i64>,
    pub endpoint: Option<String>,
    pub model_asked: String,
    pub model: String,
    pub model_upstream: Option<String>,
    pub price_version: i64,
    /// Of the price: 0, or which of its tiers.
    pub tier: u32,
    pub input: u64,
    pub cached_input: u64,
    pub output: u64,
    pub usage_input: Option<u64>,
    pub usage_cached: Option<u64>,
    pub usage_output: Option<u64>,
    pub usage_reasoning: Option<u64>,
    pub usage_audio_input: Option<u64>,
    pub usage_image_input: Option<u64>,
    pub usage_audio_output: Option<u64>,
    pub usage_image_output: Option<u64>,
    /// How often a price per call is charged.
    pub units: u64,
    pub counted_input: Option<u64>,
    pub counted_output: Option<u64>,
    pub billed: Billed,
    pub calibration_micro: i64,
    pub estimated: bool,
    pub flagged: bool,
    pub hold_nano: i64,
    pub charged_nano: i64,
    pub absorbed_nano: i64,
    pub started_ms: i64,
    pub content_after_ms: Option<u64>,
    pub duration_ms: u64,
    pub end_reason: EndReason,
    pub status: u16,
    pub tries: u32,
}

/// Which lines to read.
#[derive(Clone, Debug, Default)]
pub struct LineFilter {
    pub user: Option<String>,
    /// As `key list` shows it.
    pub key_id: Option<i64>,
    pub model: Option<String>,
    /// The account's name.
    pub account: Option<String>,
    pub end_reason: Option<String>,
    pub since_ms: Option<i64>,
    pub until_ms: Option<i64>,
    /// At most this many, newest first.
    pub limit: u32,
}
