//! The subcommands, as they are typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::decimal::parse_nano;
use crate::store::{DayFilter, LineFilter, NewLimits, day_of, now_ms};

/// A gateway for large language models: keys, balances and a pool of accounts behind OpenAI's API.
#[derive(Debug, Parser)]
#[command(name = "gpt-cat", version)]
pub struct Cli {
    /// The configuration file [default: gpt-cat.toml, if it exists]
    #[arg(long, global = true, env = "GPT_CAT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The file of imported prices [default: prices.toml beside the configuration file, if it exists]
    #[arg(long, global = true, env = "GPT_CAT_PRICES", value_name = "FILE")]
    pub prices: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve requests (the default)
    Serve,
    /// Users and their money
    #[command(subcommand)]
    User(UserCommand),
    /// Keys of users
    #[command(subcommand)]
    Key(KeyCommand),
    /// Codes that users redeem for money
    #[command(subcommand)]
    Code(CodeCommand),
    /// Groups of users: price ratio, models, calls in flight
    #[command(subcommand)]
    Group(GroupCommand),
    /// What nodes have leased of users' money
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Accounts at providers
    #[command(subcommand)]
    Account(AccountCommand),
    /// Served models
    #[command(subcommand)]
    Model(ModelCommand),
    /// Lists of prices
    #[command(subcommand)]
    Prices(PricesCommand),
    /// Messages that stand for a word in a chat
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Lines of finished calls, newest first
    Usage(UsageArgs),
    /// Add everything up and recompute every line; exit code 1 if anything does not agree
    Audit,
    /// The configuration
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// A public template, or one of a user's own.
#[derive(Debug, Args)]
pub struct TemplateName {
    pub(super) name: String,
    /// One of this user's own, instead of a public one
    #[arg(long, value_name = "NAME")]
    pub(super) user: Option<String>,
}

/// What a template says.
#[derive(Debug, Args)]
pub struct TemplateText {
    #[arg(long)]
    pub(super) description: Option<String>,
    /// A JSON array of messages; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["system", "prompt"])]
    pub(super) file: Option<PathBuf>,
    /// The text of a system message
    #[arg(long)]
    pub(super) system: Option<String>,
    /// The text of a user's message
    #[arg(long)]
    pub(super) prompt: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    List {
        /// This user's own, instead of the public ones
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
    },
    /// A template with its messages
    Show(TemplateName),
    /// Add a template
    Add {
        #[command(flatten)]
        name: TemplateName,
        #[command(flatten)]
        text: TemplateText,
    },
    /// Change what a template says, or its description
    Edit {
        #[command(flatten)]
        name: TemplateName,
        #[command(flatten)]
        text: TemplateText,
    },
    Enable(TemplateName),
    /// Keep a template, but let nobody use it
    Disable(TemplateName),
    Remove(TemplateName),
}

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Add a user with a key, which is shown once
    Add {
        name: String,
        /// A first credit
        #[arg(long, default_value = "0", value_parser = credit)]
        balance: i64,
        #[arg(long, default_value = "default")]
        group: String,
    },
    List,
    Show {
        name: String,
    },
    /// Add money
    Credit {
        name: String,
        #[arg(value_parser = credit)]
        amount: i64,
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Take money, which running nodes give back first if it is free
    Debit {
        name: String,
        #[arg(value_parser = credit)]
        amount: i64,
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Move a user into a group
    Group {
        name: String,
        group: String,
    },
    /// Credit or debit a user so much that this is what there is, what nodes have leased included
    EditBalance {
        name: String,
        #[arg(value_parser = credit)]
        amount: i64,
        #[arg(long, default_value = "balance edited")]
        note: String,
    },
    /// Set a user's allowance: what may be charged each day and each month (UTC), all keys together
    Limit {
        name: String,
        /// An amount, or none
        #[arg(long, value_parser = limit)]
        day: Option<Limit>,
        /// An amount, or none
        #[arg(long, value_parser = limit)]
        month: Option<Limit>,
    },
    /// Refuse all requests of a user
    Freeze {
        name: String,
        /// Until the next credit or redeemed code
        #[arg(long)]
        until_credit: bool,
    },
    Unfreeze {
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Add a key to a user; it is shown once
    Add {
        user: String,
        #[arg(long, default_value = "")]
        name: String,
        #[command(flatten)]
        limits: KeyLimits,
    },
    /// Change limits, models and expiry of a key; what is not given stays
    Set {
        /// As `key list` shows it
        id: i64,
        #[command(flatten)]
        limits: KeyLimits,
    },
    List {
        /// Only this user's
        user: Option<String>,
    },
    /// Revoke a key for good
    Revoke {
        /// As `key list` shows it
        id: i64,
    },
}

#[derive(Debug, Args)]
pub struct KeyLimits {
    /// What may be charged to it in all: an amount, or none
    #[arg(long, value_parser = limit)]
    pub(super) limit: Option<Limit>,
    /// Each day (UTC)
    #[arg(long, value_parser = limit)]
    pub(super) day: Option<Limit>,
    /// Each month (UTC)
    #[arg(long, value_parser = limit)]
    pub(super) month: Option<Limit>,
    /// Models that it may call, separated by commas; "all" for those of the user's group
    #[arg(long, value_delimiter = ',')]
    pub(super) models: Option<Vec<String>>,
    /// When it ends, such as 2026-12-31T00:00:00Z, or none
    #[arg(long, value_name = "MOMENT", value_parser = expiry)]
    pub(super) expires: Option<Limit>,
}

/// A number, or `none`.
#[derive(Clone, Copy, Debug)]
pub struct Limit(pub(super) Option<i64>);

#[derive(Debug, Subcommand)]
pub enum CodeCommand {
    /// Make codes that users turn into money, each once; they are shown once
    Add {
        /// What each is worth
        #[arg(value_parser = credit)]
        amount: i64,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        count: u32,
        /// When they end, such as 2026-12-31T00:00:00Z
        #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
        expires: Option<i64>,
        #[arg(long, default_value = "")]
        note: String,
    },
    List,
    /// Make a code worthless that nobody has redeemed
    Revoke {
        /// As `code list` shows it
        id: i64,
    },
    /// Redeem a code for a user; users do it by themselves with the command redeem in a chat
    Redeem {
        code: String,
        user: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    List,
    /// Add a group, or change the one of this name; what is not given stays
    Set {
        name: String,
        /// Prices of its users are multiplied by it
        #[arg(long, value_parser = ratio)]
        ratio: Option<i64>,
        /// Models that its users may call, separated by commas; "all" for all
        #[arg(long, value_delimiter = ',')]
        models: Option<Vec<String>>,
        /// Calls in flight of one user; 0 for no limit
        #[arg(long)]
        concurrency: Option<u32>,
        /// Requests a minute of one user; 0 for no limit
        #[arg(long, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
        requests_per_minute: Option<u32>,
    },
}

#[derive(Debug, Subcommand)]
pub enum LeaseCommand {
    List,
    /// Give back what a boot has leased that is silent, now and not after ledger.forfeit_s; what its calls still cost is
    /// the operator's
    Release {
        /// As `lease list` shows it
        boot: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Add an account; its key is read from standard input, or from a variable
    Add(AccountArgs),
    List,
    Enable {
        name: String,
    },
    Disable {
        name: String,
    },
    /// Remove an account and forget its key
    Remove {
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct AccountArgs {
    /// An endpoint of the configuration
    #[arg(long)]
    pub(super) endpoint: String,
    /// [default: the endpoint's name]
    #[arg(long)]
    pub(super) name: Option<String>,
    /// The variable that holds the key
    #[arg(long, value_name = "VARIABLE")]
    pub(super) key_env: Option<String>,
    /// Calls in flight at most [default: pool.concurrency of the configuration]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) limit: Option<u32>,
    /// Instead of the endpoint's
    #[arg(long)]
    pub(super) base_url: Option<String>,
    /// Models it serves, separated by commas [default: all of its endpoint's]
    #[arg(long, value_delimiter = ',')]
    pub(super) models: Option<Vec<String>>,
    /// Its share of the calls, beside the others of its tier
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) weight: u32,
    /// Lower tiers are used up first
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub(super) tier: u32,
}

#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    List,
}

#[derive(Debug, Subcommand)]
pub enum PricesCommand {
    /// Write a file of prices from a list in LiteLLM's format (model_prices_and_context_window.json), in USD; the server
    /// reads it at its next start
    Import {
        /// The list; - for standard input
        list: PathBuf,
        /// Only these models; NAME=ENTRY takes an entry of the list under another name
        models: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration, file and environment
    Check,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct UsageArgs {
    #[command(subcommand)]
    pub(super) command: Option<UsageCommand>,
    #[command(flatten)]
    pub(super) shown: ShownUsage,
}

#[derive(Debug, Subcommand)]
pub enum UsageCommand {
    /// Compute lines anew with the prices of the configuration as it is now
    Recompute {
        /// Only show what would change: it books nothing. Credits and debits make good what was billed wrong
        #[arg(long, required = true)]
        dry_run: bool,
        #[arg(long)]
        user: Option<String>,
        #[arg(long)]
        model: Option<String>,
        /// Calls that began at this moment or later, such as 2026-01-31T00:00:00Z
        #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
        since: Option<i64>,
        /// Calls that began before this moment
        #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
        until: Option<i64>,
    },
}

#[derive(Debug, Args)]
pub struct ShownUsage {
    #[arg(long)]
    pub(super) user: Option<String>,
    /// A key's id, as `key list` shows it
    #[arg(long)]
    pub(super) key: Option<i64>,
    #[arg(long)]
    pub(super) model: Option<String>,
    /// An account's name
    #[arg(long)]
    pub(super) account: Option<String>,
    /// How they ended, such as complete or client_gone
    #[arg(long, value_parser = END_REASONS)]
    pub(super) end_reason: Option<String>,
    /// Calls that began within so many hours
    #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "since")]
    pub(super) hours: Option<u32>,
    /// Calls that began at this moment or later, such as 2026-01-31T00:00:00Z
    #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
    pub(super) since: Option<i64>,
    /// Calls that began before this moment
    #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
    pub(super) until: Option<i64>,
    /// At most this many lines
    #[arg(long, default_value_t = 100)]
    pub(super) limit: u32,
    /// What each day (UTC) came to by user, key and model; these sums stay when lines are forgotten
    #[arg(long, conflicts_with_all = ["account", "end_reason", "hours"])]
    pub(super) per_day: bool,
    /// Print CSV (RFC 4180) instead of a table
    #[arg(long, conflicts_with = "json")]
    pub(super) csv: bool,
}

const END_REASONS: [&str; 7] = ["complete", "length", "client_gone", "failed", "upstream_error", "crashed", "drained"];

fn moment_ms(text: &str) -> Result<i64, String> {
    let read = text.parse::<jiff::Timestamp>();
    read.map(|moment| moment.as_millisecond()).map_err(|_| "expected a moment such as 2026-01-31T00:00:00Z".into())
}

fn credit(text: &str) -> Result<i64, String> {
    parse_nano(text).and_then(|nano| if nano < 0 { Err("it must not be below zero".into()) } else { Ok(nano) })
}

fn limit(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit(None)) } else { credit(text).map(|nano| Limit(Some(nano))) }
}

fn expiry(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit(None)) } else { moment_ms(text).map(|moment| Limit(Some(moment))) }
}

/// A price ratio in millionths.
fn ratio(text: &str) -> Result<i64, String> {
    let micro = parse_nano(text)? / 1000;
    if (0..=1_000_000_000).contains(&micro) { Ok(micro) } else { Err("expected 0 to 1000".into()) }
}

impl From<KeyLimits> for NewLimits {
    fn from(KeyLimits { limit, day, month, models, expires }: KeyLimits) -> NewLimits {
        let number = |limit: Option<Limit>| limit.map(|limit| limit.0);
        NewLimits {
            limit_nano: number(limit),
            day_nano: number(day),
            month_nano: number(month),
            models: models.map(all_or),
            expires_ms: number(expires),
        }
    }
}

/// "all" stands for no list.
pub(super) fn all_or(models: Vec<String>) -> Option<Vec<String>> {
    (models != ["all"]).then_some(models)
}

impl ShownUsage {
    pub(super) fn day_filter(self) -> DayFilter {
        DayFilter {
            user: self.user,
            key_id: self.key,
            model: self.model,
            since: self.since.map(day_of),
            // The last one is the day of the last moment before `until`.
            until: self.until.map(|until| day_of(until - 1)),
            limit: self.limit,
        }
    }

    pub(super) fn filter(self) -> LineFilter {
        let within = self.hours.map(|hours| now_ms() - i64::from(hours) * 3_600_000);
        LineFilter {
            user: self.user,
            key_id: self.key,
            model: self.model,
            account: self.account,
            end_reason: self.end_reason,
            since_ms: self.since.or(within),
            until_ms: self.until,
            limit: self.limit,
        }
    }
}
