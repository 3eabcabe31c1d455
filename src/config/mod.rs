//! File and environment become checked values: what was typed (`Raw`) turns into what it means (`Config`).
//!
//! Later layers win: built-in defaults, imported prices, the file, the old names of variables (`HTTP_PORT`, …), `GPT_CAT_` names. A
//! setting's variable is `GPT_CAT_` and its path in upper case, two underscores between levels: `server.http` is
//! `GPT_CAT_SERVER__HTTP`, `endpoints.openai.base_url` is `GPT_CAT_ENDPOINTS__OPENAI__BASE_URL`. Its value is a string
//! where the setting takes one and TOML otherwise (`8`, `true`, `["a", "b"]`, `{ a = "b" }`).

mod check;
pub mod decimal;
pub mod import;
mod layers;
mod price;
mod problem;
mod raw;
#[cfg(test)]
mod tests;
mod url;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

pub use price::{Price, Rates, TIERS_MAX, Tier};
pub use problem::{Errors, Place, Problem};

/// Where plain HTTP is served unless told otherwise.
pub const HTTP_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 7117);

/// Where HTTPS is served unless told otherwise, once there is a certificate.
pub const HTTPS_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 11711);

/// Where the admin API listens unless told otherwise: on this machine only.
pub const ADMIN_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7118);

/// Most tries of one call, the first included: each is an account taken from others.
pub const RETRY_TRIES_MAX: i64 = 10;

/// Everything that can be set, checked: every default is filled in, every number is within its bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Three to eight upper-case ASCII letters; fixed at the first start.
    pub currency: String,
    pub database_url: DatabaseUrl,
    /// Holds the journal and the key file.
    pub data_dir: PathBuf,
    /// Of answers to commands.
    pub language: Language,
    pub log: Log,
    pub server: Server,
    pub admin: Admin,
    pub commands: Commands,
    pub errors: ToldErrors,
    pub title_catch: TitleCatch,
    pub retry: Retry,
    pub pool: PoolBounds,
    pub meter: Meter,
    pub upstream: UpstreamBounds,
    pub ledger: Ledger,
    /// By name.
    pub endpoints: BTreeMap<String, Endpoint>,
    /// By name, before mapping: every model that an endpoint serves, and those the operator priced beside them.
    pub models: BTreeMap<String, Model>,
    /// What is allowed but probably not meant, a sentence each, for the log.
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads the files' texts, as far as there are any, and the environment over them.
    ///
    /// `dialects` are those that an endpoint may speak. Nothing outside the arguments is looked at; variables that are
    /// not ours are skipped, and so are ours that hold nothing. The errors are all that could be found in one pass.
    pub fn load<'a>(
        files: impl Into<Files<'a>>,
        env: impl IntoIterator<Item = (String, String)>,
        dialects: &[&str],
    ) -> Result<Config, Errors> {
        check::config(layers::read(files.into(), env)?, dialects)
    }
}

/// The texts that a configuration is read from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Files<'a> {
    /// `gpt-cat.toml`.
    pub config: Option<&'a str>,
    /// What `gpt-cat prices import` wrote: prices of models, over the built-in ones.
    pub prices: Option<&'a str>,
}

impl<'a> From<Option<&'a str>> for Files<'a> {
    fn from(config: Option<&'a str>) -> Files<'a> {
        Files { config, prices: None }
    }
}

/// A string that must not be shown: `Debug` prints `***`, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(secret: impl Into<String>) -> Secret {
        Secret(secret.into())
    }

    /// The secret itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Which database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// The path of the file.
    Sqlite(PathBuf),
    /// The whole URL, which may hold a password.
    Postgres(Secret),
}

/// The language of answers to commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    En,
    Zh,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    /// `info`, or comma-separated `target=level` beside it: `info,gpt_cat::pool=debug`.
    pub level: String,
    /// Standard error where it is not given.
    pub file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// `None`: switched off.
    pub http: Option<SocketAddr>,
    /// Used where the certificate exists; `None`: switched off.
    pub https: Option<SocketAddr>,
    /// PEM, leaf first.
    pub tls_cert: PathBuf,
    /// PEM.
    pub tls_key: PathBuf,
    /// Threads; 0: one a core.
    pub workers: usize,
    /// Largest request body.
    pub body_bytes_max: usize,
    /// For the whole head of a request.
    pub head_timeout_s: u64,
    /// For each 64 KiB of a request's body.
    pub body_timeout_s: u64,
    /// For a connection between two requests.
    pub idle_timeout_s: u64,
    /// For a client that does not read.
    pub write_timeout_s: u64,
    /// Silence in a stream after which a comment goes out.
    pub keep_alive_s: u64,
    /// For calls in flight when the node is told to stop.
    pub drain_s: u64,
    /// Open connections of one client address; 0: no limit.
    pub connections_per_address: u32,
    /// Who may name another address than its own.
    pub trusted_proxies: Vec<Network>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// The admin API; `None`: switched off.
    pub listen: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commands {
    pub enabled: bool,
    /// One to eight characters, no blanks.
    pub prefix: String,
}

/// How a failure is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToldErrors {
    /// As the text of an answer with status 200, for front ends that show nothing else.
    pub in_chat: bool,
}

/// Sends the calls that front ends make behind the user's back to a cheap model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TitleCatch {
    /// `None`: only patterns with a model of their own catch anything.
    pub model: Option<String>,
    /// Output tokens of a caught call at most.
    pub output_max: u64,
    /// The first that matches decides.
    pub patterns: Vec<TitlePattern>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TitlePattern {
    /// The front end and what it wants, for the log.
    pub whose: String,
    pub role: TitleRole,
    /// True: somewhere in the message; false: at its start, after trimming.
    pub anywhere: bool,
    pub text: String,
    /// Instead of [`TitleCatch::model`].
    pub model: Option<String>,
    /// Instead of [`TitleCatch::output_max`].
    pub output_max: Option<u64>,
}

/// Which message a pattern is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TitleRole {
    LastUser,
    System,
    Any,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Accounts tried for one call, 1 to [`RETRY_TRIES_MAX`].
    pub tries: u32,
    /// No further try begins later than this after the first.
    pub budget_s: u64,
    /// Whether to try again after a first-byte timeout, which may have been billed.
    pub retry_after_timeout: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolBounds {
    /// Calls in flight on an account that has no limit of its own.
    pub concurrency: u32,
    /// Calls that wait, all users together.
    pub queue_max: usize,
    /// Calls of one user that wait.
    pub queue_user_max: usize,
    /// How long a call waits.
    pub queue_deadline_s: u64,
}

/// How tokens are counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meter {
    /// Counts models whose own vocabulary is not known.
    pub vocabulary: ForeignVocabulary,
    pub count_prompt: CountPrompt,
    /// Of so many calls the prompt of one is counted beside the provider's usage; 0: of none.
    pub cross_check_each: u64,
}

/// A vocabulary that models are counted with whose own is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignVocabulary {
    O200k,
    Cl100k,
}

/// When a prompt is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountPrompt {
    /// When something needs it: a hold that the bound does not fit, an answer without a usage, a cross-check.
    WhenNeeded,
    Always,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamBounds {
    pub connect_timeout_s: u64,
    /// For the first byte of a stream.
    pub first_byte_timeout_s: u64,
    /// For the first byte of an answer that is no stream.
    pub answer_timeout_s: u64,
    /// Between two reads of an answer.
    pub silence_timeout_s: u64,
    /// For the whole call.
    pub total_timeout_s: u64,
    /// Largest answer that is no stream.
    pub answer_bytes_max: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    pub on_low_balance: LowBalance,
    /// Of the journal on disk, past which new calls are refused.
    pub journal_bytes_max: u64,
    /// A node that the database has not heard of for so long takes no more calls.
    pub fence_s: u64,
    /// And after so long its leases go back to their users.
    pub forfeit_s: u64,
    /// Days after which lines are forgotten, of which the day's sums stay; 0: never.
    pub lines_kept_days: u32,
    /// Of the user that the first start makes.
    pub first_balance_nano: i64,
}

impl Ledger {
    /// A live boot says so this often: several times before its fence, and at least each 5 s.
    pub fn heartbeat_ms(&self) -> u64 {
        (self.fence_s * 200).min(5000)
    }

    /// A boot that missed three heartbeats is silent.
    pub fn silent_ms(&self) -> u64 {
        3 * self.heartbeat_ms()
    }
}

/// What happens to a call whose usual cost is above the balance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowBalance {
    /// It starts, with as many output tokens as the balance pays for.
    Clamp,
    Refuse,
}

/// A named upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub name: String,
    /// One of those given to [`Config::load`].
    pub dialect: String,
    /// `http` or `https`, a host, perhaps a port and a path; no slash at the end, no query, no credentials. Empty for
    /// the dialect `demo`, which calls nobody.
    pub base_url: String,
    /// Served models, as clients name them, each once; the left sides of `mapping` included.
    pub models: Vec<String>,
    /// A client's name for a model → the upstream's.
    pub mapping: BTreeMap<String, String>,
    /// Whether the upstream knows `stream_options.include_usage`.
    pub stream_options: bool,
    /// Whether fields that another dialect cannot represent are left out, instead of refused.
    pub lossy: bool,
    /// What a token counted here is worth of the provider's own, in millionths.
    pub calibration_micro: i64,
    /// Of Azure's API; empty for other dialects.
    pub api_version: String,
    pub on_disconnect: OnDisconnect,
}

/// What happens upstream when a client hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    Cancel,
    /// Read on, for upstreams that bill the whole answer anyway.
    Drain,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub name: String,
    pub price: Price,
    /// Tokens of prompt and answer together.
    pub context: u64,
    /// Tokens of the longest answer, at most `context`.
    pub max_output: u64,
    /// Whether the upstream bills output that is not seen (hidden reasoning).
    pub bills_unseen: bool,
}

/// An address, or all that share its first bits: `10.0.0.1`, `10.0.0.0/8`, `fd00::/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    /// Whether `address` is in it; an IPv4 address mapped into IPv6 counts as what it is.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                (ours.to_bits() ^ theirs.to_bits()).checked_shr(32 - self.bits).unwrap_or(0) == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                (ours.to_bits() ^ theirs.to_bits()).checked_shr(128 - self.bits).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Network, String> {
        let refused = || format!("expected an IP address or a network such as 10.0.0.0/8, found {text:?}");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| refused())?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(bits_max), |bits| bits.parse().map_err(|_| refused()))?;
        if bits > bits_max {
            return Err(refused());
        }
        // ::ffff:10.0.0.1 alone means 10.0.0.1; with bits it stays IPv6, whose bits were counted.
        match address.to_canonical() {
            IpAddr::V4(mapped) if bits == bits_max => Ok(Network { address: IpAddr::V4(mapped), bits: 32 }),
            _ => Ok(Network { address, bits }),
        }
    }
}
