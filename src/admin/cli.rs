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
use crate::store::{BootId, LineCheck, LineFilter, MasterKey, NewAccount, NewGroup, Store, StoreError, now_ms, unhex};

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
    /// Refuse all requests of a user
    Freeze {
        name: String,
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
pub struct UsageArgs {
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
            Command::User(UserCommand::Debit { name, amount, note }) => self.debit(name, amount, note).await,
            Command::User(UserCommand::Group { name, group }) => {
                store.set_group(name.clone(), group).await?;
                self.print(&show::user(store, name).await?)
            }
            Command::Group(GroupCommand::List) => self.print(&show::groups(store).await?),
            Command::Group(GroupCommand::Set { name, ratio, models, concurrency }) => {
                let models = models.map(|models| (models != ["all"]).then_some(models));
                let concurrency = concurrency.map(|limit| (limit > 0).then_some(limit));
                store.put_group(NewGroup { name, ratio_micro: ratio, models, concurrency }).await?;
                self.print(&show::groups(store).await?)
            }
            Command::Lease(LeaseCommand::List) => self.print(&show::leases(store).await?),
            Command::Lease(LeaseCommand::Release { boot }) => {
                let boot = unhex(&boot).ok_or("a boot is 32 hexadecimal digits, as `lease list` shows them")?;
                let released = store.release_boot(boot, self.config.ledger.silent_ms() as i64).await?;
                self.print(&Listing::one(&["released"], vec![Nano(released).to_string().into()]))
            }
            Command::User(UserCommand::Freeze { name }) => self.freeze(name, true).await,
            Command::User(UserCommand::Unfreeze { name }) => self.freeze(name, false).await,
            Command::Key(KeyCommand::Add { user, name }) => self.add_key(user, name).await,
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
                let csv = args.csv;
                let listing = show::usage(store, args.filter()).await?;
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
    async fn debit(&self, name: String, amount: i64, note: String) -> Result<bool, Failure> {
        for _ in 0..DEBIT_TRIES {
            match self.store.debit(name.clone(), amount, note.clone()).await {
                Ok(_) => return self.print(&show::user(self.store, name).await?),
                Err(StoreError::Refused(_)) if self.store.user(name.clone()).await?.leased_nano > 0 => {}
                Err(error) => return Err(error.into()),
            }
            let user = self.store.user(name.clone()).await?;
            self.store.ask_back(user.id, OPERATOR).await?;
            tokio::time::sleep(DEBIT_AGAIN).await;
        }
        let user = self.store.user(name).await?;
        let (balance, leased) = (Nano(user.balance_nano), Nano(user.leased_nano));
        Err(format!("the balance has {balance}; calls that are running have {leased} more: freeze the user, or wait")
            .into())
    }

    async fn freeze(&self, name: String, frozen: bool) -> Result<bool, Failure> {
        self.store.set_frozen(name.clone(), frozen).await?;
        self.print(&show::user(self.store, name).await?)
    }

    async fn add_key(&self, user: String, name: String) -> Result<bool, Failure> {
        let new = NewKey::random();
        let id = self.store.add_key(user.clone(), new.hash, new.hint, name).await?;
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

impl UsageArgs {
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
