//! Rows in and out of the database; the only SQL.
//!
//! Every method is one transaction. Money moves only here, under the constraints of the schema: no balance and no lease
//! is ever below zero, and Σ credits − Σ charges = Σ balances + Σ leases at every commit.

mod audit;
mod books;
mod days;
mod desk;
mod lines;
mod migrate;
mod postgres;
mod rows;
mod seal;
mod sqlite;
mod templates;
mod tx;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::{DatabaseUrl, Price};
use postgres::{Lent, Postgres};
use sqlite::{Sqlite, at_once};

pub use audit::{Audit, LineCheck, LineCost, Recomputed, UserSums};
pub use days::{date_of, day_of, day_of_date, month_of};
pub use postgres::Notices;
pub use rows::{
    AccountRow, Billed, BootId, BootState, Change, CodeRow, DayFilter, DayRow, Elsewhere, EndReason, GroupRow, KeyRow,
    LeaseOf, LeaseRow, Line, LineFilter, NewAccount, NewGroup, NewLimits, NewTemplate, Notice, Owner, Spent,
    TemplateRow, UserRow, Want,
};
pub use seal::{MasterKey, SealError, hex, random, unhex};

/// Why the store did not do what was asked.
#[derive(Clone, Debug)]
pub enum StoreError {
    /// The database was migrated by a newer binary.
    SchemaNewer { found: i64 },
    /// There is no such row; says what was looked for.
    Absent(String),
    /// A rule of the data forbids it; says which, for the operator.
    Refused(String),
    /// The boot that asks is no longer live: its leases are no longer its own.
    BootGone,
    /// The watermark or version is not what the caller believes; it has to read again.
    Moved,
    /// The database cannot be opened: which, and why.
    Open(String, String),
    /// A row that a new one refers to is not there.
    Dangling,
    /// There was no connection to be had: nothing was sent.
    Unreached(String),
    /// The database failed; whether a commit happened is unknown.
    Database(String),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::SchemaNewer { found } => {
                write!(f, "the database has schema {found}, which is newer than this binary knows; use a newer binary")
            }
            StoreError::Absent(what) => write!(f, "there is no {what}"),
            StoreError::Refused(why) => f.write_str(why),
            StoreError::BootGone => f.write_str("this process's boot is no longer live in the database"),
            StoreError::Moved => f.write_str("the row has moved on since it was read"),
            StoreError::Open(which, why) => write!(f, "cannot open the database {which}: {why}"),
            StoreError::Dangling => f.write_str("a row that it refers to is not there"),
            StoreError::Unreached(why) | StoreError::Database(why) => write!(f, "database: {why}"),
        }
    }
}

impl std::error::Error for StoreError {}

/// A handle to the database; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) database: Database,
    #[cfg(test)]
    pub(crate) faults: Arc<tests::Faults>,
}

#[derive(Clone, Debug)]
pub(crate) enum Database {
    Sqlite(Sqlite),
    Postgres(Arc<Postgres>),
}

impl Store {
    /// Opens the database and migrates it. A SQLite file and its folder are made when absent.
    pub async fn open(url: &DatabaseUrl) -> Result<Store, StoreError> {
        let database = match url {
            DatabaseUrl::Sqlite(path) => {
                let path = path.clone();
                let opening = tokio::task::spawn_blocking(move || Sqlite::open(&path));
                Database::Sqlite(opening.await.map_err(|error| StoreError::Database(error.to_string()))??)
            }
            DatabaseUrl::Postgres(url) => Database::Postgres(Arc::new(Postgres::open(url.expose()).await?)),
        };
        Ok(Store {
            database,
            #[cfg(test)]
            faults: Arc::default(),
        })
    }

    /// Tells when another node changed something, or asks for a user's money; `None` where there are no other nodes.
    pub fn listen(&self) -> Option<Notices> {
        match &self.database {
            Database::Sqlite(_) => None,
            Database::Postgres(postgres) => Some(postgres.listen()),
        }
    }
}

/// Makes a method of each transaction, which runs it on the database that there is: a `read`, which may see
/// each of its rows at another moment, and a `write` within seconds, a `report` for as long as it takes, over one state of
/// the database.
macro_rules! transactions {
    ($($(#[$doc:meta])* $mode:ident $room:ident::$name:ident($($given:ident: $type:ty),*) -> $result:ty;)*) => {
        impl Store { $(
            $(#[$doc])*
            pub async fn $name(&self, $($given: $type),*) -> Result<$result, StoreError> {
                let (writes, long) = (matches!(stringify!($mode), "write"), matches!(stringify!($mode), "report"));
                #[cfg(test)]
                self.faults.before().await?;
                let worked = match &self.database {
                    Database::Sqlite(sqlite) => sqlite.run(writes, move |tx| at_once($room::$name(tx, $($given),*))).await,
                    Database::Postgres(postgres) => {
                        let mut lent = postgres.lend().await?;
                        let worked = Lent::within(long, async {
                            let tx = if writes || long { lent.begin(long).await? } else { lent.look() };
                            let result = $room::$name(&tx, $($given),*).await?;
                            tx.commit().await?;
                            Ok(result)
                        });
                        let worked = worked.await;
                        match worked {
                            Err(StoreError::Database(_)) => lent.close(),
                            _ => lent.give_back(),
                        }
                        worked
                    }
                };
                #[cfg(test)]
                self.faults.after()?;
                worked
            }
        )* }
    };
}

transactions! {
    /// Registers a new boot as live.
    write books::begin_boot(boot: BootId) -> ();
    /// Says that the boot lives and returns its watermark; `BootGone` when it no longer does.
    write books::heartbeat(boot: BootId) -> u64;
    /// What the store knows of a boot; `None` when it was never registered.
    read books::boot(boot: BootId) -> Option<BootState>;
    /// Gives all of a boot's leases back to their users and closes it.
    write books::close_boot(boot: BootId) -> ();
    /// Moves money from users' balances into a boot's leases: of each `need_nano` or what there is, possibly nothing, and
    /// beyond it at most `ahead_nano`, of which a boot takes no more than its half of an even share of the balance. A user
    /// that is not there gets no answer.
    write books::grants(boot: BootId, wants: Vec<Want>) -> Vec<(i64, LeaseRow)>;
    /// Moves money back; `Moved` when the lease is not at `version`.
    write books::give_back(boot: BootId, user_id: i64, amount_nano: i64, version: i64) -> LeaseRow;
    /// Reads a lease again, after a commit whose outcome is unknown.
    write books::lease(boot: BootId, user_id: i64) -> LeaseRow;
    /// What other boots have leased of a user's money, by whether they were heard of within `silent_ms`.
    read books::leased_elsewhere(boot: BootId, user_id: i64, silent_ms: i64) -> Elsewhere;
    /// What a user has apart from what one boot has leased of it: the balance, and what other boots have, in nano-units.
    read books::unspent_elsewhere(boot: BootId, user_id: i64) -> i64;
    /// Asks every other node to give back what it has free of a user's money.
    write books::ask_back(user_id: i64, asking: BootId) -> ();
    /// Other boots that were not heard of for `silent_ms`, by the database's clock.
    read books::silent_boots(boot: BootId, silent_ms: i64) -> Vec<BootId>;
    /// Gives back what one boot has leased, if it was not heard of for `silent_ms`; how much, in nano-units.
    write books::release_boot(boot: BootId, silent_ms: i64) -> i64;
    /// All leases, the oldest boot first.
    read books::leases() -> Vec<LeaseOf>;
    /// Stores lines and takes their charges out of the boot's leases, if the watermark still is `from`; it becomes `to`.
    /// What a lease does not have is absorbed.
    write books::ship(boot: BootId, from: u64, to: u64, lines: Vec<Line>) -> ();
    /// Which of these lines name a user, a key or a price that is not there, by their sequence.
    read books::dangling(lines: Vec<Line>) -> Vec<u64>;
    /// Deletes leases of a boot that have nothing, neither money nor charges to come; whose they were.
    write books::forget_leases(boot: BootId, users: Vec<i64>) -> Vec<i64>;
    /// The version of a model's price: the last one stored if it is the same, else a new one.
    write books::price_version(model: String, price: Price) -> i64;
    /// Every price that was ever in force, by version.
    read books::prices() -> HashMap<i64, Price>;

    /// What has been charged to these, as of `now_ms`.
    read days::spent(owners: Vec<Owner>, now_ms: i64) -> HashMap<Owner, Spent>;
    /// Before which day lines may have been forgotten.
    read days::pruned_before() -> i64;
    /// What days came to, with the name of the user, newest first.
    read days::days(filter: DayFilter) -> Vec<(String, DayRow)>;
    /// Forgets at most `most` lines of calls that began more than `kept_days` before today, by the database's clock; how
    /// many. What their days came to stays.
    write days::prune_lines(kept_days: u32, most: u32) -> u64;
    /// Lines with the name of their user, newest first.
    read lines::lines(filter: LineFilter) -> Vec<(String, Line)>;
    /// Computes lines anew with the prices that their models have in `prices`.
    report lines::recompute(filter: LineFilter, prices: HashMap<String, Price>, cost: LineCost) -> Vec<Recomputed>;
    /// Adds everything up in one transaction and lets `check` look at each line.
    report lines::audit(check: LineCheck) -> Audit;

    /// Reads a setting that the program stored for itself.
    read desk::setting(name: &'static str) -> Option<String>;
    /// Stores a setting unless it is there already; returns what is stored then.
    write desk::settle_setting(name: &'static str, value: String) -> String;
    /// The first start: stores the admin token's hash, a first user with a key, and a first credit (0: none), all or
    /// nothing. False when there was a first start before.
    write desk::first_start(admin_token_hash: String, user: &'static str, credit_nano: i64, key: ([u8; 32], String)) -> bool;
    /// The number of the newest change.
    read desk::change_sequence() -> i64;
    /// Changes after `sequence`, with the newest number.
    read desk::changes_since(sequence: i64) -> (i64, Vec<Change>);
    /// Forgets changes that are far behind `newest`; a server that has not seen them reads everything again.
    write desk::forget_changes(newest: i64) -> ();
    /// All groups.
    read desk::groups() -> Vec<GroupRow>;
    /// All users, or the one with this id.
    read desk::users(id: Option<i64>) -> Vec<UserRow>;
    /// The user of this name.
    read desk::user(name: String) -> UserRow;
    /// All keys, or the one with this id; revoked ones too.
    read desk::keys(id: Option<i64>) -> Vec<KeyRow>;
    /// All accounts that were not removed.
    read desk::accounts() -> Vec<AccountRow>;
    /// Adds a user with a first credit (0: none) and, when given, a key.
    write desk::add_user(name: String, group: String, credit_nano: i64, key: Option<([u8; 32], String)>) -> UserRow;
    /// Credits a user; the amount is above zero.
    write desk::credit(name: String, amount_nano: i64, note: String) -> UserRow;
    /// Takes money from a user's balance; `Refused` when it is not there, which it is not while nodes have leased it.
    write desk::debit(name: String, amount_nano: i64, note: String) -> UserRow;
    /// Adds a group, or changes the one of this name.
    write desk::put_group(group: NewGroup) -> ();
    /// Moves a user into a group.
    write desk::set_group(name: String, group: String) -> UserRow;
    /// Freezes or unfreezes a user; one that `thaws` is frozen until the next credit.
    write desk::set_frozen(name: String, frozen: bool, thaws: bool) -> UserRow;
    /// Credits or debits a user so much that the money, what nodes have leased included, is `to_nano`; `Refused` when a
    /// debit is not there, which it is not while nodes have leased it.
    write desk::set_balance(name: String, to_nano: i64, note: String) -> UserRow;
    /// Sets allowances of a user.
    write desk::limit_user(name: String, limits: NewLimits) -> UserRow;
    /// Sets limits, models and expiry of a key.
    write desk::limit_key(id: i64, limits: NewLimits) -> ();
    /// Adds codes, by hash and hint, each worth `amount_nano`; returns their ids.
    write desk::add_codes(codes: Vec<([u8; 32], String)>, amount_nano: i64, expires_ms: Option<i64>, note: String) -> Vec<i64>;
    /// All codes.
    read desk::codes() -> Vec<CodeRow>;
    /// Makes a code worthless that nobody has redeemed.
    write desk::revoke_code(id: i64) -> ();
    /// Credits a user with a code's amount, which is returned, and uses the code up; `Absent` when it is worth nothing.
    write desk::redeem(user_id: i64, hash: [u8; 32]) -> i64;
    /// What a code was worth that this user has redeemed.
    read desk::redeemed(user_id: i64, hash: [u8; 32]) -> Option<i64>;
    /// All public templates, or all of one user's, by name.
    read templates::templates(user_id: Option<i64>) -> Vec<TemplateRow>;
    /// The enabled templates that a user has, without their messages: the user's own, then public ones, 500 at most.
    read templates::listed_templates(user_id: i64) -> Vec<TemplateRow>;
    /// The enabled templates of these names that a user has: a private one before a public one, those that there are.
    read templates::named_templates(user_id: i64, names: Vec<String>) -> Vec<TemplateRow>;
    /// Adds a template, or changes the one of this name; true when it was there before. `Refused` past a user's number.
    write templates::put_template(template: NewTemplate) -> bool;
    /// Removes a template; `Absent` when there is none of this name.
    write templates::remove_template(user_id: Option<i64>, name: String) -> ();
    /// Adds a key to a user; returns its id.
    write desk::add_key(user: String, hash: [u8; 32], hint: String, name: String, limits: NewLimits) -> i64;
    /// Revokes a key for good.
    write desk::revoke_key(id: i64) -> ();
    /// Adds an account; returns its id. The name of a removed account may be used again.
    write desk::add_account(account: NewAccount) -> i64;
    /// Enables or disables an account.
    write desk::set_account_enabled(name: String, enabled: bool) -> ();
    /// Removes an account: its key is forgotten, its id stays for the lines that name it.
    write desk::remove_account(name: String) -> ();
}

/// Milliseconds since 1970 UTC.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
pub(crate) mod tests;
