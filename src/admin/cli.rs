//! The subcommands. Each opens the database itself, so it works with and without a server beside it.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use super::listing::Listing;
use super::{NewKey, hint, show};
use crate::config::Config;
use crate::config::decimal::{Nano, parse_nano};
use crate::config::import;
use crate::store::{
    BootId, DayFilter, LineCheck, LineCost, LineFilter, MasterKey, NewAccount, NewGroup, NewLimits, Store, StoreError,
    UserRow, day_of, now_ms, unhex,
};
use crate::users::hash_key;

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
    /// Lines of finished calls, newest first
    Usage(UsageArgs),
    /// Add everything up and recompute every line; exit code 1 if anything does not agree
    Audit,
    /// The configuration
    #[command(subcommand)]
    Config(ConfigCommand),
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
    limit: Option<Limit>,
    /// Each day (UTC)
    #[arg(long, value_parser = limit)]
    day: Option<Limit>,
    /// Each month (UTC)
    #[arg(long, value_parser = limit)]
    month: Option<Limit>,
    /// Models that it may call, separated by commas; "all" for those of the user's group
    #[arg(long, value_delimiter = ',')]
    models: Option<Vec<String>>,
    /// When it ends, such as 2026-12-31T00:00:00Z, or none
    #[arg(long, value_name = "MOMENT", value_parser = expiry)]
    expires: Option<Limit>,
}

/// A number, or `none`.
#[derive(Clone, Copy, Debug)]
pub struct Limit(Option<i64>);

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
    endpoint: String,
    /// [default: the endpoint's name]
    #[arg(long)]
    name: Option<String>,
    /// The variable that holds the key
    #[arg(long, value_name = "VARIABLE")]
    key_env: Option<String>,
    /// Calls in flight at most [default: pool.concurrency of the configuration]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Instead of the endpoint's
    #[arg(long)]
    base_url: Option<String>,
    /// Models it serves, separated by commas [default: all of its endpoint's]
    #[arg(long, value_delimiter = ',')]
    models: Option<Vec<String>>,
    /// Its share of the calls, beside the others of its tier
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    weight: u32,
    /// Lower tiers are used up first
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000))]
    tier: u32,
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
    command: Option<UsageCommand>,
    #[command(flatten)]
    shown: ShownUsage,
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
    user: Option<String>,
    /// A key's id, as `key list` shows it
    #[arg(long)]
    key: Option<i64>,
    #[arg(long)]
    model: Option<String>,
    /// An account's name
    #[arg(long)]
    account: Option<String>,
    /// How they ended, such as complete or client_gone
    #[arg(long, value_parser = END_REASONS)]
    end_reason: Option<String>,
    /// Calls that began within so many hours
    #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "since")]
    hours: Option<u32>,
    /// Calls that began at this moment or later, such as 2026-01-31T00:00:00Z
    #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
    since: Option<i64>,
    /// Calls that began before this moment
    #[arg(long, value_name = "MOMENT", value_parser = moment_ms)]
    until: Option<i64>,
    /// At most this many lines
    #[arg(long, default_value_t = 100)]
    limit: u32,
    /// What each day (UTC) came to by user, key and model; these sums stay when lines are forgotten
    #[arg(long, conflicts_with_all = ["account", "end_reason", "hours"])]
    per_day: bool,
    /// Print CSV (RFC 4180) instead of a table
    #[arg(long, conflicts_with = "json")]
    csv: bool,
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

/// A debit asks nodes for leased money this often, and so many times.
const DEBIT_AGAIN: Duration = Duration::from_millis(500);
const DEBIT_TRIES: u32 = 6;
/// Who asks for it: no boot has this id.
const OPERATOR: BootId = [0; 16];

/// A key is no longer than this.
const KEY_BYTES_MAX: u64 = 8 << 10;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What a subcommand works on.
pub struct Desk<'a> {
    pub config: &'a Config,
    pub store: &'a Store,
    pub master: &'a MasterKey,
    pub check_line: LineCheck,
    pub line_cost: LineCost,
    pub json: bool,
}

impl Desk<'_> {
    /// Runs a subcommand that is not `serve`; false when it found something wrong.
    pub async fn run(&self, command: Command) -> Result<bool, Failure> {
        let store = self.store;
        match command {
            Command::Serve | Command::Prices(_) => Err("this is not a subcommand of the desk".into()),
            Command::User(UserCommand::Add { name, balance, group }) => self.add_user(name, balance, group).await,
            Command::User(UserCommand::List) => self.print(&show::users(store).await?),
            Command::User(UserCommand::Show { name }) => self.print(&show::user(store, name).await?),
            Command::User(UserCommand::Credit { name, amount, note }) => {
                store.credit(name.clone(), amount, note).await?;
                self.print(&show::user(store, name).await?)
            }
            Command::User(UserCommand::Debit { name, amount, note }) => {
                let debit = || store.debit(name.clone(), amount, note.clone());
                self.with_leases(&name, debit).await
            }
            Command::User(UserCommand::Group { name, group }) => {
                store.set_group(name.clone(), group).await?;
                self.print(&show::user(store, name).await?)
            }
            Command::Group(GroupCommand::List) => self.print(&show::groups(store).await?),
            Command::Group(GroupCommand::Set { name, ratio, models, concurrency, requests_per_minute }) => {
                let above_zero = |limit: u32| (limit > 0).then_some(limit);
                let group = NewGroup {
                    name,
                    ratio_micro: ratio,
                    models: models.map(all_or),
                    concurrency: concurrency.map(above_zero),
                    requests_per_minute: requests_per_minute.map(above_zero),
                };
                store.put_group(group).await?;
                self.print(&show::groups(store).await?)
            }
            Command::Lease(LeaseCommand::List) => self.print(&show::leases(store).await?),
            Command::Lease(LeaseCommand::Release { boot }) => {
                let boot = unhex(&boot).ok_or("a boot is 32 hexadecimal digits, as `lease list` shows them")?;
                let released = store.release_boot(boot, self.config.ledger.silent_ms() as i64).await?;
                self.print(&Listing::one(&["released"], vec![Nano(released).to_string().into()]))
            }
            Command::User(UserCommand::EditBalance { name, amount, note }) => {
                let edit = || store.set_balance(name.clone(), amount, note.clone());
                self.with_leases(&name, edit).await
            }
            Command::User(UserCommand::Limit { name, day, month }) => {
                let limits = NewLimits {
                    day_nano: day.map(|day| day.0),
                    month_nano: month.map(|month| month.0),
                    ..NewLimits::default()
                };
                store.limit_user(name.clone(), limits).await?;
                self.print(&show::user(store, name).await?)
            }
            Command::User(UserCommand::Freeze { name, until_credit }) => self.freeze(name, true, until_credit).await,
            Command::User(UserCommand::Unfreeze { name }) => self.freeze(name, false, false).await,
            Command::Key(KeyCommand::Add { user, name, limits }) => self.add_key(user, name, limits).await,
            Command::Key(KeyCommand::Set { id, limits }) => {
                store.limit_key(id, limits.into()).await?;
                self.done("changed")
            }
            Command::Code(CodeCommand::Add { amount, count, expires, note }) => {
                self.add_codes(amount, count, expires, note).await
            }
            Command::Code(CodeCommand::List) => self.print(&show::codes(store).await?),
            Command::Code(CodeCommand::Revoke { id }) => {
                store.revoke_code(id).await?;
                self.done("revoked")
            }
            Command::Code(CodeCommand::Redeem { code, user }) => {
                let id = store.user(user.clone()).await?.id;
                store.redeem(id, hash_key(code.trim())).await?;
                self.print(&show::user(store, user).await?)
            }
            Command::Key(KeyCommand::List { user }) => self.print(&show::keys(store, user).await?),
            Command::Key(KeyCommand::Revoke { id }) => {
                store.revoke_key(id).await?;
                self.done("revoked")
            }
            Command::Account(AccountCommand::Add(args)) => self.add_account(args).await,
            Command::Account(AccountCommand::List) => self.print(&show::accounts(store).await?),
            Command::Account(AccountCommand::Enable { name }) => {
                store.set_account_enabled(name, true).await?;
                self.done("enabled")
            }
            Command::Account(AccountCommand::Disable { name }) => {
                store.set_account_enabled(name, false).await?;
                self.done("disabled")
            }
            Command::Account(AccountCommand::Remove { name }) => {
                store.remove_account(name).await?;
                self.done("removed")
            }
            Command::Model(ModelCommand::List) => self.print(&show::models(self.config)),
            Command::Usage(args) => {
                let UsageArgs { command, shown } = args;
                if let Some(UsageCommand::Recompute { user, model, since, until, .. }) = command {
                    let filter = LineFilter { user, model, since_ms: since, until_ms: until, ..LineFilter::default() };
                    return self.print(&show::recompute(store, self.config, filter, self.line_cost).await?);
                }
                let csv = shown.csv;
                let listing = match shown.per_day {
                    true => show::usage_per_day(store, shown.day_filter()).await?,
                    false => show::usage(store, shown.filter()).await?,
                };
                if csv {
                    write(listing.csv()?.trim_end())?;
                    return Ok(true);
                }
                self.print(&listing)
            }
            Command::Audit => self.audit().await,
            Command::Config(ConfigCommand::Check) => self.done("the configuration is good"),
        }
    }

    async fn add_user(&self, name: String, balance: i64, group: String) -> Result<bool, Failure> {
        let new = NewKey::random();
        self.store.add_user(name.clone(), group, balance, Some((new.hash, new.hint))).await?;
        self.print(&Listing::one(&["user", "key"], vec![name.into(), new.key.into()]))
    }

    /// Takes money; what nodes have leased and free is called back for it.
    async fn with_leases<F>(&self, name: &str, take: impl Fn() -> F) -> Result<bool, Failure>
    where
        F: Future<Output = Result<UserRow, StoreError>>,
    {
        for _ in 0..DEBIT_TRIES {
            match take().await {
                Ok(_) => return self.print(&show::user(self.store, name.to_owned()).await?),
                Err(StoreError::Refused(_)) if self.store.user(name.to_owned()).await?.leased_nano > 0 => {}
                Err(error) => return Err(error.into()),
            }
            let user = self.store.user(name.to_owned()).await?;
            self.store.ask_back(user.id, OPERATOR).await?;
            tokio::time::sleep(DEBIT_AGAIN).await;
        }
        let user = self.store.user(name.to_owned()).await?;
        let (balance, leased) = (Nano(user.balance_nano), Nano(user.leased_nano));
        Err(format!("the balance has {balance}; calls that are running have {leased} more: freeze the user, or wait")
            .into())
    }

    async fn freeze(&self, name: String, frozen: bool, until_credit: bool) -> Result<bool, Failure> {
        self.store.set_frozen(name.clone(), frozen, until_credit).await?;
        self.print(&show::user(self.store, name).await?)
    }

    async fn add_codes(&self, amount: i64, count: u32, expires: Option<i64>, note: String) -> Result<bool, Failure> {
        if amount == 0 {
            return Err("a code must be worth something".into());
        }
        let (mut texts, mut rows) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let NewKey { key, hash, hint } = NewKey::code();
            texts.push(key);
            rows.push((hash, hint));
        }
        let ids = self.store.add_codes(rows, amount, expires, note).await?;
        let amount: Value = Nano(amount).to_string().into();
        let rows = ids.into_iter().zip(texts).map(|(id, code)| vec![id.into(), code.into(), amount.clone()]);
        self.print(&Listing::list(&["id", "code", "amount"], rows.collect()))
    }

    async fn add_key(&self, user: String, name: String, limits: KeyLimits) -> Result<bool, Failure> {
        let new = NewKey::random();
        let id = self.store.add_key(user.clone(), new.hash, new.hint, name, limits.into()).await?;
        self.print(&Listing::one(&["id", "user", "key"], vec![id.into(), user.into(), new.key.into()]))
    }

    async fn add_account(&self, args: AccountArgs) -> Result<bool, Failure> {
        let AccountArgs { endpoint, name, key_env, limit, base_url, models, weight, tier } = args;
        let Some(configured) = self.config.endpoints.get(&endpoint) else {
            let known: Vec<&str> = self.config.endpoints.keys().map(String::as_str).collect();
            return Err(format!("there is no endpoint '{endpoint}'; there are: {}", known.join(", ")).into());
        };
        if let Some(unknown) = models.iter().flatten().find(|model| !configured.models.contains(model)) {
            return Err(format!("the endpoint '{endpoint}' does not serve the model '{unknown}'").into());
        }
        if let Some(url) = &base_url
            && !(url.starts_with("http://") || url.starts_with("https://"))
        {
            return Err("--base-url must begin with http:// or https://".into());
        }
        let key = match key_env {
            Some(variable) => std::env::var(&variable).map_err(|_| format!("the variable {variable} is not set"))?,
            None => key_from_input()?,
        };
        let key = key.trim();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("the key must be printable ASCII without spaces, and not empty".into());
        }
        let name = name.unwrap_or_else(|| endpoint.clone());
        let account = NewAccount {
            name: name.clone(),
            endpoint: endpoint.clone(),
            sealed_key: self.master.seal(key),
            hint: hint(key),
            base_url: base_url.map(|url| url.trim_end_matches('/').to_owned()),
            models,
            weight,
            tier,
            concurrency: limit,
        };
        let id = self.store.add_account(account).await?;
        self.print(&Listing::one(&["id", "account", "endpoint"], vec![id.into(), name.into(), endpoint.into()]))
    }

    async fn audit(&self) -> Result<bool, Failure> {
        let (listing, wrong) = show::audit(self.store, self.check_line).await?;
        if self.json {
            let findings: Value = wrong.iter().map(String::as_str).collect();
            write(&json!({ "users": listing.json(), "findings": findings }).to_string())?;
        } else {
            write(&listing.text())?;
            for finding in &wrong {
                write(&format!("WRONG: {finding}"))?;
            }
            if wrong.is_empty() {
                write("Everything adds up.")?;
            }
        }
        Ok(wrong.is_empty())
    }

    fn print(&self, listing: &Listing) -> Result<bool, Failure> {
        write(&if self.json { listing.json().to_string() } else { listing.text() })?;
        Ok(true)
    }

    fn done(&self, what: &'static str) -> Result<bool, Failure> {
        write(&if self.json { json!({ "done": what }).to_string() } else { what.to_owned() })?;
        Ok(true)
    }
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
fn all_or(models: Vec<String>) -> Option<Vec<String>> {
    (models != ["all"]).then_some(models)
}

impl ShownUsage {
    fn day_filter(self) -> DayFilter {
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

    fn filter(self) -> LineFilter {
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

/// Writes a file of prices, whole or not at all. Needs no configuration: a model may have no price but the one in it.
pub fn import_prices(list: &Path, models: &[String], to: &Path, json: bool) -> Result<(), Failure> {
    let mut text = String::new();
    let mut from: Box<dyn Read> = match list.as_os_str() == "-" {
        true => Box::new(io::stdin()),
        false => Box::new(File::open(list).map_err(|error| format!("{}: {error}", list.display()))?),
    };
    from.by_ref().take(import::LIST_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
    let imported = import::litellm(&text, models).map_err(|what| format!("{}: {what}", list.display()))?;
    let unfinished = to.with_extension("toml.new");
    let written = std::fs::write(&unfinished, &imported.text).and_then(|()| std::fs::rename(&unfinished, to));
    written.map_err(|error| format!("{}: {error}", to.display()))?;
    let (path, count) = (to.display().to_string(), imported.models);
    write(&match json {
        true => json!({ "file": path, "models": count, "skipped": imported.skipped }).to_string(),
        false => format!(
            "{path}: prices of {count} models; {} entries of the list have none by tokens or by call",
            imported.skipped.len()
        ),
    })?;
    Ok(())
}

/// A reader that has gone (`| head`) is an error like any other, and no panic.
fn write(text: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

/// Not an argument, which every user of the machine could read.
fn key_from_input() -> io::Result<String> {
    let mut key = String::new();
    if io::stdin().is_terminal() {
        eprint!("key: ");
    }
    io::stdin().lock().take(KEY_BYTES_MAX).read_line(&mut key)?;
    Ok(key)
}
