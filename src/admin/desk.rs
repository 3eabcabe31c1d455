//! Runs the subcommands. Each opens the database itself, so it works with and without a server beside it.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cli::{
    AccountArgs, AccountCommand, CodeCommand, Command, ConfigCommand, GroupCommand, KeyCommand, KeyLimits,
    LeaseCommand, ModelCommand, TemplateCommand, TemplateName, TemplateText, UsageArgs, UsageCommand, UserCommand,
    all_or,
};
use super::listing::Listing;
use super::{NewKey, hint, show};
use crate::config::Config;
use crate::config::decimal::Nano;
use crate::config::import::{self, Imported};
use crate::store::{
    BootId, LineCheck, LineCost, LineFilter, MasterKey, NewAccount, NewGroup, NewLimits, NewTemplate, Store,
    StoreError, UserRow, unhex,
};
use crate::users::hash_key;

/// A debit asks nodes for leased money this often, and so many times.
const DEBIT_AGAIN: Duration = Duration::from_millis(500);
const DEBIT_TRIES: u32 = 6;
/// Codes of one transaction, which has a few seconds.
const CODES_AT_ONCE: usize = 500;
/// Who asks for it: no boot has this id.
const OPERATOR: BootId = [0; 16];

/// A template is shorter by far.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

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
    /// Lines that the database refused, as far as they lie on this machine.
    pub refused_lines: usize,
    /// Whether a word can name a template.
    pub template_names: fn(&str) -> bool,
    /// A template's messages as they are stored, or why they cannot be.
    pub template_messages: fn(&str) -> Result<String, &'static str>,
    pub json: bool,
}

impl Desk<'_> {
    async fn template(&self, command: TemplateCommand) -> Result<bool, Failure> {
        let store = self.store;
        match command {
            TemplateCommand::List { user } => {
                let user_id = self.user_id(user).await?;
                self.print(&show::templates(store, user_id).await?)
            }
            TemplateCommand::Show(name) => {
                let user_id = self.user_id(name.user).await?;
                self.print(&show::template(store, user_id, &name.name).await?)
            }
            TemplateCommand::Add { name, text } => {
                let user_id = self.user_id(name.user.clone()).await?;
                if store.templates(user_id).await?.iter().any(|template| template.name == name.name) {
                    return Err(format!("there is a template '{}' already; edit or remove it", name.name).into());
                }
                let none = "a template needs messages: --file, --system or --prompt";
                let messages = messages_of(&text)?.ok_or(none)?;
                self.put_template(name, text.description, Some(messages), Some(true)).await
            }
            TemplateCommand::Edit { name, text } => {
                let messages = messages_of(&text)?;
                self.put_template(name, text.description, messages, None).await
            }
            TemplateCommand::Enable(name) => self.put_template(name, None, None, Some(true)).await,
            TemplateCommand::Disable(name) => self.put_template(name, None, None, Some(false)).await,
            TemplateCommand::Remove(name) => {
                let user_id = self.user_id(name.user).await?;
                store.remove_template(user_id, name.name).await?;
                self.done("removed")
            }
        }
    }

    async fn put_template(
        &self,
        TemplateName { name, user }: TemplateName,
        description: Option<String>,
        messages: Option<String>,
        enabled: Option<bool>,
    ) -> Result<bool, Failure> {
        if !(self.template_names)(&name) {
            return Err("a name has 1 to 64 characters without blanks, and is no subcommand of the chat".into());
        }
        let messages = messages.map(|messages| (self.template_messages)(&messages)).transpose()?;
        let user_id = self.user_id(user).await?;
        let template = NewTemplate { user_id, name: name.clone(), description, messages, enabled };
        self.store.put_template(template).await?;
        self.print(&show::template(self.store, user_id, &name).await?)
    }

    async fn user_id(&self, user: Option<String>) -> Result<Option<i64>, Failure> {
        Ok(match user {
            Some(user) => Some(self.store.user(user).await?.id),
            None => None,
        })
    }

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
            Command::Template(command) => self.template(command).await,
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
                    false => show::usage(store, shown.filter(), csv || self.json).await?,
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
        let mut ids = Vec::with_capacity(rows.len());
        let mut failed = None;
        for some in rows.chunks(CODES_AT_ONCE) {
            match self.store.add_codes(some.to_vec(), amount, expires, note.clone()).await {
                Ok(some) => ids.extend(some),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let amount: Value = Nano(amount).to_string().into();
        let rows = ids.into_iter().zip(texts).map(|(id, code)| vec![id.into(), code.into(), amount.clone()]);
        // Those that were made are worth money, and shown once: whatever became of the rest.
        let printed = self.print(&Listing::list(&["id", "code", "amount"], rows.collect()));
        failed.map_or(printed, |error| Err(error.into()))
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
            let refused = self.refused_lines;
            write(&json!({ "users": listing.json(), "findings": findings, "refused_lines": refused }).to_string())?;
        } else {
            write(&listing.text())?;
            if self.refused_lines > 0 {
                let (count, folder) = (self.refused_lines, self.config.data_dir.join("journal/refused"));
                write(&format!("{count} lines that the database refused are charged to nobody: {}", folder.display()))?;
            }
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
        true => {
            let Imported { skipped, ignored, .. } = &imported;
            json!({ "file": path, "models": count, "skipped": skipped, "ignored": ignored }).to_string()
        }
        false => {
            let ignored = imported.ignored.iter().map(|(field, models)| format!("\n  {field} ({models})"));
            let ignored: String = ignored.collect();
            format!(
                "{path}: prices of {count} models; {} entries of the list have none by tokens or by call{}",
                imported.skipped.len(),
                if ignored.is_empty() {
                    ignored
                } else {
                    format!("\nprices that are not charged, and of how many models:{ignored}")
                }
            )
        }
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

/// The messages that were given, as a JSON array.
fn messages_of(text: &TemplateText) -> Result<Option<String>, Failure> {
    if let Some(path) = &text.file {
        let mut read = String::new();
        if path.as_os_str() == "-" {
            io::stdin().lock().take(TEMPLATE_BYTES_MAX).read_to_string(&mut read)?;
        } else {
            File::open(path)?.take(TEMPLATE_BYTES_MAX).read_to_string(&mut read)?;
        }
        return Ok(Some(read.trim().to_owned()));
    }
    let given = [("system", &text.system), ("user", &text.prompt)];
    let messages =
        given.into_iter().filter_map(|(role, content)| Some(json!({ "role": role, "content": content.as_ref()? })));
    let messages: Vec<Value> = messages.collect();
    Ok((!messages.is_empty()).then(|| Value::from(messages).to_string()))
}
