//! The same promises on both databases.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::config::Secret;

#[path = "../../tests/support/cluster.rs"]
pub mod cluster;

/// What goes wrong on the way to the database: the next transaction is lost before it begins, or its outcome after it
/// has committed.
#[derive(Debug, Default)]
pub struct Faults {
    unreached: AtomicBool,
    before: AtomicBool,
    after: AtomicBool,
    hangs: AtomicBool,
    /// Transactions that were tried.
    pub tried: AtomicU64,
}

impl Faults {
    pub fn lose_the_connection(&self) {
        self.unreached.store(true, Ordering::Relaxed);
    }

    pub fn lose_the_next(&self) {
        self.before.store(true, Ordering::Relaxed);
    }

    pub fn lose_the_next_outcome(&self) {
        self.after.store(true, Ordering::Relaxed);
    }

    /// Nothing that is tried comes to an end.
    pub fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }

    pub fn end(&self) {
        self.hangs.store(false, Ordering::Relaxed);
        self.before.store(false, Ordering::Relaxed);
        self.after.store(false, Ordering::Relaxed);
    }

    pub async fn before(&self) -> Result<(), StoreError> {
        self.tried.fetch_add(1, Ordering::Relaxed);
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if self.unreached.swap(false, Ordering::Relaxed) {
            return Err(StoreError::Unreached("nobody there".into()));
        }
        Faults::happen(&self.before)
    }

    pub fn after(&self) -> Result<(), StoreError> {
        Faults::happen(&self.after)
    }

    fn happen(fault: &AtomicBool) -> Result<(), StoreError> {
        match fault.swap(false, Ordering::Relaxed) {
            true => Err(StoreError::Database("lost".into())),
            false => Ok(()),
        }
    }
}

impl Store {
    /// Does what no transaction of ours does.
    pub async fn raw(&self, sql: String) {
        match &self.database {
            Database::Sqlite(sqlite) => {
                sqlite.run(true, move |tx| at_once(tx::Tx::execute(tx, &sql, &[]))).await.unwrap();
            }
            Database::Postgres(postgres) => {
                let mut lent = postgres.lend().await.unwrap();
                let tx = lent.begin(false).await.unwrap();
                tx.batch(&sql).await.unwrap();
                tx.commit().await.unwrap();
            }
        }
    }

    /// One grant of one user.
    pub async fn grant(
        &self,
        boot: BootId,
        user_id: i64,
        need_nano: i64,
        ahead_nano: i64,
    ) -> Result<LeaseRow, StoreError> {
        let granted = self.grants(boot, vec![Want { user_id, need_nano, ahead_nano }]).await?;
        granted.into_iter().next().map(|(_, row)| row).ok_or_else(|| StoreError::Absent("user".into()))
    }
}

/// A store for as long as its folder or database lives.
pub struct Fixture {
    pub store: Store,
    _folder: Option<tempfile::TempDir>,
}

pub async fn sqlite_store() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&DatabaseUrl::Sqlite(folder.path().join("x.db"))).await.unwrap();
    Fixture { store, _folder: Some(folder) }
}

/// Both, or SQLite alone where no PostgreSQL can be had.
pub async fn each_store() -> Vec<Fixture> {
    let mut all = vec![sqlite_store().await];
    if let Some(url) = cluster::database() {
        let store = Store::open(&DatabaseUrl::Postgres(Secret::new(&url))).await.unwrap();
        all.push(Fixture { store, _folder: None });
    }
    all
}

/// Each store with a live boot and a user.
async fn with_ann(balance_nano: i64) -> Vec<(Fixture, BootId, i64)> {
    let mut all = Vec::new();
    for fixture in each_store().await {
        let key = Some(([1; 32], "hint".to_owned()));
        let user = fixture.store.add_user("ann".into(), "default".into(), balance_nano, key).await.unwrap();
        let boot = random();
        fixture.store.begin_boot(boot).await.unwrap();
        all.push((fixture, boot, user.id));
    }
    all
}

#[tokio::test]
async fn a_grant_gives_what_there_is_and_ahead_at_most_half_of_the_balance() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        let first = store.grant(boot, user, 10, 1000).await.unwrap();
        assert_eq!((first.amount_nano, first.balance_nano), (60, 40));
        let rest = store.grant(boot, user, 500, 0).await.unwrap();
        assert_eq!((rest.amount_nano, rest.granted_nano, rest.balance_nano), (100, 100, 0));
        assert_eq!(store.grant(boot, user, 1, 1).await.unwrap().amount_nano, 100);
    }
}

#[tokio::test]
async fn grants_of_many_users_are_one_transaction_and_each_gets_its_own() {
    for (Fixture { store, _folder }, boot, ann) in with_ann(100).await {
        let bob = store.add_user("bob".into(), "default".into(), 50, None).await.unwrap().id;
        let want = |user_id, need_nano, ahead_nano| Want { user_id, need_nano, ahead_nano };
        let nobody = want(ann + bob + 7, 10, 0);
        let wants = vec![want(bob, 80, 0), nobody, want(ann, 10, 1000)];
        let mut granted = store.grants(boot, wants).await.unwrap();
        granted.sort_by_key(|(user, _)| *user);
        let seen: Vec<_> =
            granted.iter().map(|(user, row)| (*user, row.amount_nano, row.balance_nano, row.version)).collect();
        assert_eq!(seen, [(ann, 60, 40, 1), (bob, 50, 0, 1)]);
        let again = store.grants(boot, vec![want(ann, 40, 0)]).await.unwrap();
        assert_eq!((again[0].1.amount_nano, again[0].1.granted_nano, again[0].1.version), (100, 100, 2));
        store.close_boot(boot).await.unwrap();
        assert!(matches!(store.grants(boot, vec![want(ann, 1, 0)]).await, Err(StoreError::BootGone)));
        let audit = store.audit(|_, _| None).await.unwrap();
        assert!(audit.users.iter().all(|user| user.difference_nano() == 0 && user.leased_nano == 0), "{audit:?}");
    }
}

#[tokio::test]
async fn a_lease_is_forgotten_only_if_it_has_nothing() {
    for (Fixture { store, _folder }, boot, ann) in with_ann(100).await {
        let bob = store.add_user("bob".into(), "default".into(), 50, None).await.unwrap().id;
        for user in [ann, bob] {
            store.grant(boot, user, 20, 0).await.unwrap();
        }
        store.give_back(boot, bob, 20, 1).await.unwrap();
        assert_eq!(store.forget_leases(boot, vec![ann, bob, bob + 7]).await.unwrap(), [bob]);
        assert_eq!(
            (store.lease(boot, bob).await.unwrap().version, store.lease(boot, ann).await.unwrap().version),
            (0, 1)
        );
        assert_eq!(store.grant(boot, bob, 5, 0).await.unwrap().granted_nano, 5, "as if there had been none");
    }
}

#[tokio::test]
async fn lines_that_name_what_is_not_there_are_refused_and_found() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        let (key, price) = referred(&store).await;
        let lines = vec![
            line(1, user, key, price, 0),
            line(2, user, key + 9, price, 0),
            line(3, user + 9, key, price, 0),
            line(4, user, key, price + 9, 0),
        ];
        assert!(matches!(store.ship(boot, 0, 4, lines.clone()).await, Err(StoreError::Dangling)));
        assert_eq!(store.boot(boot).await.unwrap().unwrap().shipped, 0, "none of them was stored");
        assert_eq!(store.dangling(lines).await.unwrap(), [2, 3, 4]);
    }
}

#[tokio::test]
async fn a_flood_of_changes_pushes_out_no_request_for_money() {
    let Some(url) = cluster::database() else { return };
    let store = Store::open(&DatabaseUrl::Postgres(Secret::new(&url))).await.unwrap();
    let mut heard = store.listen().unwrap();
    let ann = store.add_user("ann".into(), "default".into(), 0, None).await.unwrap();
    // Once it listens, it hears of this user.
    while !matches!(tokio::time::timeout(std::time::Duration::from_millis(100), heard.recv()).await, Ok(Some(_))) {
        store.set_frozen("ann".into(), false, false).await.unwrap();
    }
    // A notice each, since the same ones of one transaction are told once.
    cluster::run(&url, "SELECT pg_notify('gpt_cat', 'changes ' || number) FROM generate_series(1, 3000) AS number");
    store.ask_back(ann.id, [7; 16]).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await; // nobody reads meanwhile
    assert_eq!(heard.recv().await, Some(Notice::Short { user_id: ann.id, asking: [7; 16] }));
    assert_eq!(heard.recv().await, Some(Notice::Changes));
    let more = tokio::time::timeout(std::time::Duration::from_millis(200), heard.recv()).await;
    assert!(more.is_err(), "all of them are one: {more:?}");
}

#[tokio::test]
async fn a_return_needs_the_version_that_was_read() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        let lease = store.grant(boot, user, 80, 0).await.unwrap();
        assert!(matches!(store.give_back(boot, user, 10, lease.version + 1).await, Err(StoreError::Moved)));
        let lease = store.give_back(boot, user, 10, lease.version).await.unwrap();
        assert_eq!((lease.amount_nano, lease.granted_nano, lease.balance_nano), (70, 70, 30));
        // More than is leased violates a constraint: nothing changes.
        assert!(store.give_back(boot, user, 71, lease.version).await.is_err());
        assert_eq!(store.lease(boot, user).await.unwrap(), lease);
    }
}

#[tokio::test]
async fn a_boot_that_is_closed_gets_no_money_and_has_given_all_of_it_back() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        store.grant(boot, user, 80, 0).await.unwrap();
        store.close_boot(boot).await.unwrap();
        assert!(matches!(store.grant(boot, user, 1, 0).await, Err(StoreError::BootGone)));
        assert!(matches!(store.heartbeat(boot).await, Err(StoreError::BootGone)));
        assert_eq!(store.user("ann".into()).await.unwrap().balance_nano, 100);
    }
}

#[tokio::test]
async fn a_price_that_comes_back_gets_a_version_of_its_own_and_the_same_one_keeps_it() {
    for (Fixture { store, _folder }, ..) in with_ann(0).await {
        let price = |input_nano| Price::plain(input_nano, 0);
        let first = store.price_version("m".into(), price(1)).await.unwrap();
        assert_eq!(store.price_version("m".into(), price(1)).await.unwrap(), first);
        let second = store.price_version("m".into(), price(2)).await.unwrap();
        let third = store.price_version("m".into(), price(1)).await.unwrap();
        assert!(first < second && second < third);
    }
}

#[tokio::test]
async fn a_server_that_missed_forgotten_changes_reads_everything() {
    for Fixture { store, _folder } in each_store().await {
        for name in ["ann", "bob", "eve"] {
            store.add_user(name.into(), "default".into(), 0, None).await.unwrap();
        }
        let (newest, changes) = store.changes_since(0).await.unwrap();
        assert!(!changes.contains(&Change::Account), "{changes:?}");
        store.forget_changes(10_000 + 3).await.unwrap();
        let (_, changes) = store.changes_since(0).await.unwrap();
        assert_eq!(changes[..2], [Change::Group, Change::Account]);
        assert_eq!(store.changes_since(newest).await.unwrap(), (newest, vec![]));
    }
}

#[tokio::test]
async fn a_removed_accounts_name_can_be_used_again() {
    for Fixture { store, _folder } in each_store().await {
        let account = NewAccount {
            name: "main".into(),
            endpoint: "up".into(),
            sealed_key: b"sealed".to_vec(),
            hint: "aled".into(),
            base_url: None,
            models: Some(vec!["m".into()]),
            weight: 1,
            tier: 0,
            concurrency: None,
        };
        let first = store.add_account(account.clone()).await.unwrap();
        assert!(matches!(store.add_account(account.clone()).await, Err(StoreError::Refused(_))));
        store.remove_account("main".into()).await.unwrap();
        assert_ne!(store.add_account(account).await.unwrap(), first);
        assert_eq!(store.accounts().await.unwrap()[0].models, Some(vec!["m".into()]));
    }
}

fn line(sequence: u64, user_id: i64, key_id: i64, price_version: i64, charged_nano: i64) -> Line {
    Line {
        sequence,
        request_id: format!("r{sequence}"),
        client_request_id: Some("theirs".into()),
        user_id,
        key_id,
        ratio_micro: 1_000_000,
        account_id: None,
        endpoint: Some("up".into()),
        model_asked: "m".into(),
        model: "m".into(),
        model_upstream: None,
        price_version,
        tier: 0,
        input: 1,
        cached_input: 0,
        output: 2,
        usage_input: Some(1),
        usage_cached: None,
        usage_output: Some(2),
        usage_reasoning: None,
        usage_audio_input: None,
        usage_image_input: None,
        usage_audio_output: None,
        usage_image_output: None,
        units: 1,
        counted_input: None,
        counted_output: Some(3),
        billed: Billed::Usage,
        calibration_micro: 1_000_000,
        estimated: true,
        flagged: false,
        hold_nano: 100,
        charged_nano,
        absorbed_nano: 0,
        started_ms: sequence as i64,
        content_after_ms: Some(5),
        duration_ms: 6,
        end_reason: EndReason::Complete,
        status: 200,
        tries: 1,
    }
}

/// What a line refers to: its key and price.
async fn referred(store: &Store) -> (i64, i64) {
    let free = Price::default();
    let price_version = store.price_version("m".into(), free).await.unwrap();
    (store.keys(None).await.unwrap()[0].id, price_version)
}

#[tokio::test]
async fn a_line_comes_back_as_it_was_shipped_and_once() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        let (key, price) = referred(&store).await;
        store.grant(boot, user, 100, 0).await.unwrap();
        let shipped: Vec<Line> = (1..=3).map(|sequence| line(sequence, user, key, price, 10)).collect();
        store.ship(boot, 0, 2, shipped[..2].to_vec()).await.unwrap();
        assert!(matches!(store.ship(boot, 0, 3, shipped.clone()).await, Err(StoreError::Moved)));
        store.ship(boot, 2, 3, shipped[1..].to_vec()).await.unwrap(); // the second one again
        let mut stored = store.lines(LineFilter { limit: 9, ..LineFilter::default() }).await.unwrap();
        stored.reverse();
        assert_eq!(stored.into_iter().map(|(_, line)| line).collect::<Vec<_>>(), shipped);
        assert_eq!(store.lease(boot, user).await.unwrap().amount_nano, 70);
        assert_eq!(store.boot(boot).await.unwrap(), Some(BootState { live: true, shipped: 3 }));
        let all = LineFilter { limit: 9, ..LineFilter::default() };
        let some = LineFilter { user: Some("ann".into()), model: Some("m".into()), key_id: Some(key), ..all.clone() };
        let complete = LineFilter { end_reason: Some("complete".into()), since_ms: Some(2), ..some.clone() };
        for (filter, count) in [
            (some, 3),
            (complete.clone(), 2),
            (LineFilter { until_ms: Some(3), ..complete }, 1),
            (LineFilter { user: Some("bob".into()), ..all.clone() }, 0),
            (LineFilter { key_id: Some(key + 1), ..all.clone() }, 0),
            (LineFilter { account: Some("main".into()), ..all.clone() }, 0),
            (LineFilter { end_reason: Some("crashed".into()), ..all }, 0),
        ] {
            assert_eq!(store.lines(filter.clone()).await.unwrap().len(), count, "{filter:?}");
        }
        let audit = store.audit(|_, _| None).await.unwrap();
        assert_eq!((audit.lines, audit.charged_nano, audit.users[0].difference_nano()), (3, 30, 0));
    }
}

#[tokio::test]
async fn lines_charge_no_more_than_the_lease_has_and_the_rest_is_absorbed() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        let (key, price) = referred(&store).await;
        store.grant(boot, user, 50, 0).await.unwrap();
        let lines = [(1, 40), (2, 30), (3, 5)].map(|(sequence, charge)| line(sequence, user, key, price, charge));
        store.ship(boot, 0, 3, lines.to_vec()).await.unwrap();
        let mut stored = store.lines(LineFilter { limit: 9, ..LineFilter::default() }).await.unwrap();
        stored.reverse();
        let seen: Vec<_> =
            stored.iter().map(|(_, line)| (line.charged_nano, line.absorbed_nano, line.flagged)).collect();
        assert_eq!(seen, [(40, 0, false), (10, 20, true), (0, 5, true)]);
        assert_eq!(store.audit(|_, _| None).await.unwrap().users[0].difference_nano(), 0);
    }
}

#[tokio::test]
async fn nodes_that_start_together_migrate_once() {
    let Some(url) = cluster::database() else { return };
    let url = DatabaseUrl::Postgres(Secret::new(&url));
    let opening = (0..6).map(|_| {
        let url = url.clone();
        tokio::spawn(async move { Store::open(&url).await.map(|_| ()) })
    });
    for opened in opening.collect::<Vec<_>>() {
        opened.await.unwrap().unwrap();
    }
    let store = Store::open(&url).await.unwrap();
    assert_eq!(store.groups().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_binary_older_than_the_schema_refuses_to_serve() {
    let Some(text) = cluster::database() else { return };
    let url = DatabaseUrl::Postgres(Secret::new(&text));
    Store::open(&url).await.unwrap();
    cluster::run(&text, "INSERT INTO schema_steps (number) VALUES (99)");
    let refused = Store::open(&url).await.unwrap_err();
    assert!(matches!(refused, StoreError::SchemaNewer { found: 99 }), "{refused}");
}

#[tokio::test]
async fn an_error_of_postgresql_says_no_password() {
    let url = DatabaseUrl::Postgres(Secret::new("postgres://cat:hunter2@127.0.0.1:1/cats"));
    let refused = Store::open(&url).await.unwrap_err().to_string();
    assert!(refused.starts_with("cannot open the database PostgreSQL: ") && !refused.contains("hunter2"), "{refused}");
}

#[tokio::test]
async fn a_debit_takes_what_is_there_and_nothing_that_is_leased() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        store.grant(boot, user, 60, 0).await.unwrap();
        let refused = store.debit("ann".into(), 50, "too much".into()).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
        assert_eq!(store.debit("ann".into(), 40, "all".into()).await.unwrap().balance_nano, 0);
        assert_eq!(store.audit(|_, _| None).await.unwrap().users[0].difference_nano(), 0);
    }
}

#[tokio::test]
async fn a_group_is_made_and_changed_in_parts_and_users_move_into_it() {
    for (Fixture { store, _folder }, ..) in with_ann(0).await {
        let group = |ratio_micro, models, concurrency| NewGroup {
            name: "vip".into(),
            ratio_micro,
            models,
            concurrency,
            requests_per_minute: None,
        };
        store.put_group(group(Some(500_000), Some(Some(vec!["m".into()])), None)).await.unwrap();
        store.put_group(group(None, None, Some(Some(3)))).await.unwrap();
        let vip = store.groups().await.unwrap().pop().unwrap();
        let seen = (vip.name.as_str(), vip.ratio_micro, vip.models.clone(), vip.concurrency);
        assert_eq!(seen, ("vip", 500_000, Some(vec!["m".to_owned()]), Some(3)));
        assert_eq!(store.set_group("ann".into(), "vip".into()).await.unwrap().group_id, vip.id);
        assert!(store.set_group("ann".into(), "none".into()).await.is_err());
    }
}

const DAY_MS: i64 = 86_400_000;

/// Days to keep, so that all before this one go.
fn keeping(before_day: i64) -> u32 {
    (day_of(now_ms()) - before_day) as u32
}

/// Ships a line for each of these days, with its charge.
async fn ship_days(store: &Store, boot: BootId, user: i64, days: &[(i64, i64)]) {
    let (key, price) = referred(store).await;
    store.grant(boot, user, 100, 0).await.unwrap();
    let lines = (1..).zip(days).map(|(sequence, (day, charged))| Line {
        started_ms: day * DAY_MS + 5,
        ..line(sequence, user, key, price, *charged)
    });
    store.ship(boot, 0, days.len() as u64, lines.collect()).await.unwrap();
}

#[tokio::test]
async fn days_add_up_what_lines_say_and_stay_when_these_are_forgotten() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        // 2026-01-30, 2026-01-31, 2026-02-01
        ship_days(&store, boot, user, &[(20_483, 10), (20_484, 20), (20_485, 5), (20_485, 7)]).await;
        let (key, _) = referred(&store).await;
        let owners = vec![Owner::Key(key), Owner::User(user), Owner::Key(key + 1)];
        let spent = store.spent(owners, 20_485 * DAY_MS).await.unwrap();
        let expected = Spent { total_nano: 42, month_nano: 12, day_nano: 12 };
        assert_eq!((spent[&Owner::Key(key)], spent[&Owner::User(user)]), (expected, expected));
        assert_eq!(spent[&Owner::Key(key + 1)], Spent::default());
        let of_days = |filter: DayFilter| {
            let store = store.clone();
            async move {
                let days = store.days(DayFilter { limit: 9, ..filter }).await.unwrap();
                days.into_iter()
                    .map(|(user, day)| (user, day.day, day.calls, day.output, day.charged_nano))
                    .collect::<Vec<_>>()
            }
        };
        let all = [("ann", 20_485, 2, 4, 12), ("ann", 20_484, 1, 2, 20), ("ann", 20_483, 1, 2, 10)];
        let all = all.map(|(user, day, calls, output, charged)| (user.to_owned(), day, calls, output, charged));
        assert_eq!(of_days(DayFilter::default()).await, all);
        let between = DayFilter { since: Some(20_484), until: Some(20_484), key_id: Some(key), ..DayFilter::default() };
        assert_eq!(of_days(between).await, all[1..2]);

        let clean = |audit: Audit| (audit.findings, audit.users[0].difference_nano(), audit.lines);
        assert_eq!(clean(store.audit(|_, _| None).await.unwrap()), (vec![], 0, 4));
        assert_eq!(store.prune_lines(keeping(20_485), 1).await.unwrap(), 1);
        assert_eq!(store.prune_lines(keeping(20_485), 9).await.unwrap(), 1);
        assert_eq!(store.prune_lines(keeping(20_485), 9).await.unwrap(), 0);
        assert_eq!(clean(store.audit(|_, _| None).await.unwrap()), (vec![], 0, 2));
        assert_eq!(of_days(DayFilter::default()).await, all);
        let user = store.user("ann".into()).await.unwrap();
        assert_eq!(user.balance_nano + user.leased_nano, 58);
    }
}

#[tokio::test]
async fn lines_of_a_boot_that_may_come_back_are_not_forgotten() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        ship_days(&store, boot, user, &[(20_483, 10)]).await;
        for gone in ["seen_ms = seen_ms - 61000", "state = 'forfeited', seen_ms = seen_ms + 61000"] {
            store.raw(format!("UPDATE boots SET {gone}")).await;
            assert_eq!(store.prune_lines(keeping(20_484), 9).await.unwrap(), 0, "{gone}");
        }
        // Forfeited, and settled since: it brings nothing any more.
        store.close_boot(boot).await.unwrap();
        assert_eq!(store.prune_lines(keeping(20_484), 9).await.unwrap(), 1);
    }
}

#[tokio::test]
async fn an_audit_finds_a_day_that_its_lines_do_not_come_to() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        ship_days(&store, boot, user, &[(20_483, 10), (20_484, 10)]).await;
        store.raw("UPDATE days SET charged_nano = charged_nano + 1 WHERE day = 20484".into()).await;
        let audit = store.audit(|_, _| None).await.unwrap();
        assert_eq!(audit.findings.len(), 1);
        assert!(audit.findings[0].starts_with("2026-01-31: the lines of user"), "{:?}", audit.findings);
        assert_eq!(audit.users[0].difference_nano(), -1);
    }
}

#[tokio::test]
async fn of_many_who_redeem_a_code_at_once_one_gets_its_money() {
    for (Fixture { store, _folder }, _, user) in with_ann(0).await {
        let ids = store.add_codes(vec![([7; 32], "last".into())], 50, None, "gift".into()).await.unwrap();
        let redeeming = (0..8).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.redeem(user, [7; 32]).await })
        });
        let mut won = 0;
        for redeeming in redeeming.collect::<Vec<_>>() {
            match redeeming.await.unwrap() {
                Ok(nano) => won += nano,
                Err(StoreError::Absent(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((won, store.user("ann".into()).await.unwrap().balance_nano), (50, 50));
        let code = store.codes().await.unwrap().pop().unwrap();
        assert_eq!((code.id, code.redeemed_by.as_deref(), code.note.as_str()), (ids[0], Some("ann"), "gift"));
        assert!(matches!(store.revoke_code(ids[0]).await, Err(StoreError::Absent(_))));
        assert_eq!(store.audit(|_, _| None).await.unwrap().users[0].difference_nano(), 0);
    }
}

#[tokio::test]
async fn a_code_that_has_expired_or_was_revoked_is_worth_nothing() {
    for (Fixture { store, _folder }, _, user) in with_ann(0).await {
        let past = Some(now_ms() - 1000);
        store.add_codes(vec![([1; 32], "a".into())], 50, past, String::new()).await.unwrap();
        let revoked = store.add_codes(vec![([2; 32], "b".into())], 50, None, String::new()).await.unwrap();
        store.revoke_code(revoked[0]).await.unwrap();
        let future = Some(now_ms() + 60_000);
        store.add_codes(vec![([3; 32], "c".into())], 7, future, String::new()).await.unwrap();
        for hash in [[1; 32], [2; 32], [9; 32]] {
            assert!(matches!(store.redeem(user, hash).await, Err(StoreError::Absent(_))));
        }
        assert_eq!(store.redeem(user, [3; 32]).await.unwrap(), 7);
    }
}

#[tokio::test]
async fn a_user_that_was_frozen_for_money_thaws_with_the_next_credit_and_no_other_does() {
    for (Fixture { store, _folder }, ..) in with_ann(0).await {
        let frozen = |store: Store| async move { store.user("ann".into()).await.unwrap().frozen };
        store.set_frozen("ann".into(), true, false).await.unwrap();
        store.credit("ann".into(), 5, String::new()).await.unwrap();
        assert!(frozen(store.clone()).await, "by the operator, for another reason");
        store.set_frozen("ann".into(), true, true).await.unwrap();
        store.debit("ann".into(), 5, String::new()).await.unwrap();
        assert!(frozen(store.clone()).await);
        let since = store.change_sequence().await.unwrap();
        store.credit("ann".into(), 5, String::new()).await.unwrap();
        assert!(!frozen(store.clone()).await);
        let changes = store.changes_since(since).await.unwrap().1;
        assert!(
            changes.iter().any(|change| matches!(change, Change::User(_))),
            "running servers learn of it: {changes:?}"
        );
    }
}

#[tokio::test]
async fn a_balance_that_is_edited_books_the_difference_to_what_nodes_have_leased_as_well() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        store.grant(boot, user, 60, 0).await.unwrap();
        assert_eq!(store.set_balance("ann".into(), 130, "more".into()).await.unwrap().balance_nano, 70);
        assert_eq!(store.set_balance("ann".into(), 60, "less".into()).await.unwrap().balance_nano, 0);
        assert_eq!(store.set_balance("ann".into(), 60, "same".into()).await.unwrap().balance_nano, 0);
        let refused = store.set_balance("ann".into(), 59, "leased".into()).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
        assert_eq!(store.audit(|_, _| None).await.unwrap().users[0].difference_nano(), 0);
    }
}

#[tokio::test]
async fn limits_of_keys_and_users_are_set_and_taken_away_one_by_one() {
    for (Fixture { store, _folder }, ..) in with_ann(0).await {
        let some = NewLimits {
            limit_nano: Some(Some(9)),
            day_nano: Some(Some(1)),
            models: Some(Some(vec!["m".into()])),
            expires_ms: Some(Some(77)),
            ..NewLimits::default()
        };
        let id = store.add_key("ann".into(), [5; 32], "hint".into(), "laptop".into(), some).await.unwrap();
        let no_day = NewLimits { day_nano: Some(None), month_nano: Some(Some(3)), ..NewLimits::default() };
        store.limit_key(id, no_day.clone()).await.unwrap();
        let key = store.keys(Some(id)).await.unwrap().pop().unwrap();
        assert_eq!((key.limit_nano, key.day_nano, key.month_nano), (Some(9), None, Some(3)));
        assert_eq!((key.models, key.expires_ms), (Some(vec!["m".to_owned()]), Some(77)));
        let user = store.limit_user("ann".into(), no_day).await.unwrap();
        assert_eq!((user.day_nano, user.month_nano), (None, Some(3)));
        store.revoke_key(id).await.unwrap();
        assert!(matches!(store.limit_key(id, NewLimits::default()).await, Err(StoreError::Absent(_))));
    }
}

#[tokio::test]
async fn lines_are_computed_anew_by_user_and_model() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        ship_days(&store, boot, user, &[(20_483, 10), (20_484, 20)]).await;
        let cost: LineCost = |line, price| line.output as i64 * price.rates.output_nano;
        let prices = HashMap::from([("m".to_owned(), Price::plain(0, 4))]);
        let filter = LineFilter { since_ms: Some(20_484 * DAY_MS), ..LineFilter::default() };
        let found = store.recompute(filter, prices.clone(), cost).await.unwrap();
        assert_eq!((found[0].lines, found[0].charged_nano, found[0].cost_nano, found[0].new_cost_nano), (1, 20, 0, 8));
        let all = store.recompute(LineFilter::default(), prices, cost).await.unwrap();
        assert_eq!((all.len(), all[0].user.as_str(), all[0].new_cost_nano), (1, "ann", 16));
        assert!(store.recompute(LineFilter::default(), HashMap::new(), cost).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn an_audit_names_a_line_that_charges_more_than_its_tokens_cost() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        ship_days(&store, boot, user, &[(20_483, 10)]).await;
        let check: LineCheck = |line, _| (line.charged_nano != 10).then(|| format!("line {}", line.request_id));
        assert_eq!(store.audit(check).await.unwrap().findings, Vec::<String>::new());
        store.raw("UPDATE lines SET charged_nano = 11".into()).await;
        let findings = store.audit(check).await.unwrap().findings;
        assert!(findings.iter().any(|finding| finding.starts_with("line ")), "{findings:?}");
    }
}

#[tokio::test]
async fn what_a_user_has_elsewhere_is_read_past_a_boot_that_is_busy() {
    for (Fixture { store, _folder }, boot, user) in with_ann(100).await {
        store.grant(boot, user, 30, 0).await.unwrap();
        let other = random();
        store.begin_boot(other).await.unwrap();
        store.grant(other, user, 20, 0).await.unwrap();
        assert_eq!(store.unspent_elsewhere(boot, user).await.unwrap(), 70);
        assert_eq!(store.unspent_elsewhere(random(), user).await.unwrap(), 100);
        assert!(matches!(store.unspent_elsewhere(boot, user + 7).await, Err(StoreError::Absent(_))));
    }
}
