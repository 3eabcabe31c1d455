//! Several nodes on one database: recall, fence, forfeit.

use std::time::Instant;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::*;
use crate::catalog::Model;
use crate::config::{Config, DatabaseUrl, Secret};
use crate::error::Error;
use crate::meter::Vocabulary;
use crate::request::Head;
use crate::store::tests::{Fixture, cluster, each_store};
use crate::store::{Change, EndReason, LineFilter, NewLimits, Notice};
use crate::users::{Users, hash_key};

/// What one output token costs; input is free, so that a hold is what its `max_tokens` cost.
pub const TOKEN_NANO: i64 = 1000;
pub const KEY: &str = "sk-ann";

/// A node of a cluster, as far as its books go.
pub struct Node {
    ledger: Arc<Ledger>,
    users: Users,
    store: Store,
    tasks: Vec<JoinHandle<()>>,
    folder: tempfile::TempDir,
}

async fn database(balance_nano: i64) -> Option<DatabaseUrl> {
    let url = DatabaseUrl::Postgres(Secret::new(cluster::database()?));
    let store = Store::open(&url).await.unwrap();
    let key = (hash_key(KEY), "ann".to_owned());
    store.add_user("ann".into(), "default".into(), balance_nano, Some(key)).await.unwrap();
    Some(url)
}

impl Node {
    async fn start(url: &DatabaseUrl, fence_s: u64, forfeit_s: u64) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(url).await.unwrap();
        let bounds = config::Ledger { fence_s, forfeit_s, ..Node::bounds() };
        let ledger = Ledger::start(store.clone(), folder.path(), &bounds, Counting::default()).await.unwrap();
        let users = Users::load(&store).await.unwrap();
        let (heard, by) = (store.listen().unwrap(), ledger.clone());
        let listening = tokio::spawn(async move {
            let mut heard = heard;
            while let Some(notice) = heard.recv().await {
                if let Notice::Short { user_id, asking } = notice {
                    by.asked_back(user_id, asking).await;
                }
            }
        });
        let mut node = Node { ledger, users, store, tasks: vec![listening], folder };
        node.live();
        tokio::time::sleep(Duration::from_millis(200)).await; // until it listens
        node
    }

    /// A node whose heart does not beat by itself and that hears nothing: what it does is done by hand.
    pub async fn quiet(store: &Store) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::start(store.clone(), folder.path(), &Node::bounds(), Counting::default()).await.unwrap();
        let users = Users::load(store).await.unwrap();
        Node { ledger, users, store: store.clone(), tasks: Vec::new(), folder }
    }

    fn bounds() -> config::Ledger {
        let mut bounds = Config::load(None, [], &["openai", "qianwen", "demo"]).unwrap().ledger;
        bounds.on_low_balance = LowBalance::Refuse;
        bounds
    }

    pub fn boot(&self) -> Arc<Boot> {
        self.ledger.boot.load_full()
    }

    /// `kill -9`, and a start on the same disk.
    pub async fn crash_and_start(&mut self) {
        self.boot().journal.abandon();
        self.ledger =
            Ledger::start(self.store.clone(), self.folder.path(), &Node::bounds(), Counting::default()).await.unwrap();
    }

    /// What a node does that finds itself fenced off.
    pub async fn begin_again(&mut self) {
        self.boot().retire(Duration::from_secs(1)).await.unwrap();
        self.ledger =
            Ledger::start(self.store.clone(), self.folder.path(), &Node::bounds(), Counting::default()).await.unwrap();
    }

    fn live(&mut self) {
        self.tasks.push(tokio::spawn(self.ledger.clone().keep()));
    }

    /// Stops as `SIGSTOP` does it: no heartbeat, no answer to a notice.
    async fn freeze(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
    }

    async fn open(&self, max_tokens: u64) -> Result<OpenLine, Error> {
        self.open_as("r", max_tokens).await
    }

    pub async fn open_as(&self, request_id: &str, max_tokens: u64) -> Result<OpenLine, Error> {
        self.open_with(KEY, request_id, max_tokens).await
    }

    /// Opens with one of several keys.
    async fn open_with(&self, key: &str, request_id: &str, max_tokens: u64) -> Result<OpenLine, Error> {
        let body = format!(r#"{{"model":"m","max_tokens":{max_tokens},"messages":[{{"role":"user","content":"x"}}]}}"#);
        let body = Bytes::from(body);
        let head = Head::read(&body).unwrap();
        // A fault is for the call, not for the test.
        let price_version = Store::price_version(&self.unfailing(), "m".into(), price()).await.unwrap();
        let model = Arc::new(Model {
            name: "m".into(),
            price: price(),
            price_version,
            context: 100_000,
            max_output: 50_000,
            bills_unseen: false,
            vocabulary: Vocabulary::O200k,
            offers: Vec::new(),
        });
        let key = self.users.find(key, 0).unwrap();
        let ask = Ask {
            key: &key,
            model: &model,
            model_asked: "m",
            head: &head,
            body: &body,
            request_id: request_id.into(),
            client_request_id: None,
        };
        self.ledger.open(ask).await
    }

    /// The same store, without its faults.
    fn unfailing(&self) -> Store {
        Store { faults: Arc::default(), ..self.store.clone() }
    }

    async fn balance_nano(&self) -> i64 {
        self.store.user("ann".into()).await.unwrap().balance_nano
    }

    pub async fn lines(&self) -> Vec<Line> {
        let lines = self.store.lines(LineFilter { limit: 1000, ..LineFilter::default() }).await.unwrap();
        lines.into_iter().map(|(_, line)| line).collect()
    }

    async fn assert_books(&self) {
        let audit = self.store.audit(CHECK_LINE).await.unwrap();
        assert_eq!(audit.findings, Vec::<String>::new());
        assert!(audit.users.iter().all(|user| user.difference_nano() == 0), "{:?}", audit.users);
    }
}

fn price() -> Price {
    Price::plain(0, TOKEN_NANO * 1_000_000)
}

/// A whole answer of so many tokens.
pub fn answered(output: u64) -> Ended {
    Ended { reason: EndReason::Complete, output, content: true, ..Ended::failed(200, true) }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(15);
    while !holds().await {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_line_that_the_database_refuses_is_set_aside_and_stops_no_other() {
    let Some(url) = database(1000 * TOKEN_NANO).await else { return };
    let DatabaseUrl::Postgres(text) = &url else { unreachable!() };
    let store = Store::open(&url).await.unwrap();
    let mut node = Node::quiet(&store).await;
    // The price that the first two were opened with goes, as with a database that is set back.
    let (lost, left) = (node.open_as("lost", 10).await.unwrap(), node.open_as("left", 10).await.unwrap());
    cluster::run(text.expose(), "DELETE FROM prices");
    cluster::run(text.expose(), "ALTER TABLE prices ALTER COLUMN version RESTART WITH 1000");
    let good = node.open_as("good", 10).await.unwrap();
    lost.end(answered(1));
    good.end(answered(2));
    node.boot().ship().await.unwrap();
    assert!(node.boot().journal.is_shipped());
    let shipped = |lines: Vec<Line>| lines.into_iter().map(|line| line.request_id).collect::<Vec<_>>();
    assert_eq!(shipped(node.lines().await), ["good"]);
    // The same at a start that settles a call which was open.
    std::mem::forget(left);
    node.open_as("late", 10).await.unwrap().end(answered(3));
    node.crash_and_start().await;
    let mut lines = shipped(node.lines().await);
    lines.sort();
    assert_eq!(lines, ["good", "late"]);
    let mut aside: Vec<Line> = std::fs::read_dir(node.folder.path().join("refused"))
        .unwrap()
        .map(|file| serde_json::from_slice(&std::fs::read(file.unwrap().path()).unwrap()).unwrap())
        .collect();
    aside.sort_by_key(|line| line.sequence);
    assert_eq!((aside[0].output, aside[0].charged_nano), (1, TOKEN_NANO));
    assert_eq!(shipped(aside), ["lost", "left"]);
    node.boot().retire(Duration::from_secs(1)).await.unwrap();
    assert_eq!(node.balance_nano().await, (1000 - 2 - 3) * TOKEN_NANO, "what was set aside is charged to nobody");
    node.assert_books().await;
}

#[tokio::test]
async fn an_empty_purse_is_forgotten_once_its_lines_are_shipped_and_begins_anew() {
    for fixture in crate::store::tests::each_store().await {
        let store = fixture.store.clone();
        let key = Some((hash_key(KEY), "ann".to_owned()));
        let ann = store.add_user("ann".into(), "default".into(), 100 * TOKEN_NANO, key).await.unwrap().id;
        let node = Node::quiet(&store).await;
        let boot = node.boot();
        for round in 0..3 {
            node.open(10).await.unwrap().end(answered(1));
            boot.asked_back(ann, [0; 16]).await; // what is free goes back
            boot.forget_empty().await;
            assert!(boot.known_purse(ann).is_some(), "it was used just now");
            boot.known_purse(ann).unwrap().age();
            boot.forget_empty().await;
            assert!(boot.known_purse(ann).is_some(), "its line is still to be charged");
            boot.ship().await.unwrap();
            if round == 1 {
                store.faults.lose_the_next_outcome();
                boot.forget_empty().await;
                assert!(boot.known_purse(ann).is_some(), "nobody heard whether its row has gone");
                continue;
            }
            boot.forget_empty().await;
            assert!(boot.known_purse(ann).is_none());
            assert_eq!(store.lease(boot.id, ann).await.unwrap().version, 0);
        }
        node.boot().retire(Duration::from_secs(1)).await.unwrap();
        assert_eq!((node.lines().await.len(), node.balance_nano().await), (3, 97 * TOKEN_NANO));
        node.assert_books().await;
    }
}

#[tokio::test]
async fn a_herd_of_first_grants_takes_a_few_transactions() {
    let Some(url) = database(100 * TOKEN_NANO).await else { return };
    let store = Store::open(&url).await.unwrap();
    let mut users = Vec::new();
    for number in 0..300 {
        let user = store.add_user(format!("user{number}"), "default".into(), 100 * TOKEN_NANO, None).await.unwrap();
        users.push(user.id);
    }
    let node = Node::quiet(&store).await;
    let boot = node.boot();
    let before = store.faults.tried.load(Ordering::Relaxed);
    let begun = Instant::now();
    let grants: Vec<_> = users
        .into_iter()
        .map(|user| {
            let boot = boot.clone();
            tokio::spawn(async move { boot.cover(&boot.purse(user), 50 * TOKEN_NANO).await.unwrap().unwrap().keep() })
        })
        .collect();
    for grant in grants {
        assert_eq!(grant.await.unwrap(), 50 * TOKEN_NANO);
    }
    let transactions = store.faults.tried.load(Ordering::Relaxed) - before;
    eprintln!("300 first grants: {transactions} transactions, {:?}", begun.elapsed());
    assert!(transactions <= 10, "{transactions}");
    node.assert_books().await;
}

#[tokio::test]
async fn a_grant_that_could_not_be_asked_for_leaves_no_doubt() {
    let Some(url) = database(100 * TOKEN_NANO).await else { return };
    let store = Store::open(&url).await.unwrap();
    let node = Node::quiet(&store).await;
    let (boot, purse) = (node.boot(), node.boot().purse(1));
    store.faults.lose_the_connection();
    assert!(matches!(boot.cover(&purse, 50 * TOKEN_NANO).await, Err(Error::NodeUnavailable { .. })));
    assert!(!purse.lease.lock().await.unknown, "nothing was sent");
    drop(boot.cover(&purse, 50 * TOKEN_NANO).await.unwrap().unwrap());
    store.faults.lose_the_connection();
    boot.asked_back(1, [0; 16]).await;
    assert_eq!((purse.room(), purse.lease.lock().await.unknown), (50 * TOKEN_NANO, false), "it did not go back");
    store.faults.lose_the_next();
    assert!(boot.cover(&purse, 60 * TOKEN_NANO).await.is_err());
    assert!(purse.lease.lock().await.unknown, "this one may have been committed");
}

#[tokio::test]
async fn money_that_another_node_has_free_is_called_back() {
    let Some(url) = database(100 * TOKEN_NANO).await else { return };
    let (one, other) = (Node::start(&url, 600, 900).await, Node::start(&url, 600, 900).await);
    one.open(100).await.unwrap().end(answered(10));
    assert_eq!(one.balance_nano().await, 0, "all of it is leased to the first node");
    let asked = Instant::now();
    let call = other.open(90).await.unwrap();
    assert!(asked.elapsed() < Duration::from_millis(900), "{:?}", asked.elapsed());
    assert!(matches!(one.open(1).await.map(drop), Err(Error::QuotaExceeded)), "there is no more");
    call.end(answered(90));
    one.ledger.stop(Duration::from_secs(1)).await.unwrap();
    other.ledger.stop(Duration::from_secs(1)).await.unwrap();
    assert_eq!((one.balance_nano().await, one.lines().await.len()), (0, 2));
    one.assert_books().await;
}

#[tokio::test]
async fn two_nodes_that_ask_each_other_do_not_both_go_away_empty() {
    for _ in 0..3 {
        let Some(url) = database(100 * TOKEN_NANO).await else { return };
        let (one, other) = (Node::start(&url, 600, 900).await, Node::start(&url, 600, 900).await);
        let (first, second) = (one.open(50).await.unwrap(), other.open(50).await.unwrap());
        first.end(answered(0));
        second.end(answered(0));
        let (first, second) = tokio::join!(one.open(100), other.open(100));
        assert!(first.is_ok() != second.is_ok(), "{:?} {:?}", first.err(), second.err());
        drop((first, second));
        one.ledger.stop(Duration::from_secs(1)).await.unwrap();
        other.ledger.stop(Duration::from_secs(1)).await.unwrap();
        assert_eq!(one.balance_nano().await, 100 * TOKEN_NANO);
        one.assert_books().await;
    }
}

#[tokio::test]
async fn a_node_behind_its_fence_takes_no_hold_and_no_slice_and_begins_again() {
    let Some(url) = database(1_000_000 * TOKEN_NANO).await else { return };
    let mut node = Node::start(&url, 1, 3).await;
    let mut running = node.open(10).await.unwrap();
    node.freeze().await;
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert!(matches!(node.open(10).await.map(drop), Err(Error::NodeUnavailable { .. })));
    assert!(running.slices(300).await.is_none(), "the room has the money, and may not give it");
    running.handed_over(10, false);
    node.live();
    eventually("it begins again", async || node.open(10).await.is_ok()).await;
    running.end(answered(10));
    eventually("the old boot is closed", async || node.ledger.retired_boots().is_empty()).await;
    node.ledger.stop(Duration::from_secs(1)).await.unwrap();
    let charged: Vec<i64> = node.lines().await.iter().map(|line| line.charged_nano).filter(|nano| *nano > 0).collect();
    assert_eq!(charged, [10 * TOKEN_NANO], "nobody had taken its money: it is charged exactly");
    node.assert_books().await;
}

#[tokio::test]
async fn what_a_silent_node_leased_is_locked_at_first_and_forfeited_in_the_end() {
    let Some(url) = database(100 * TOKEN_NANO).await else { return };
    let mut lost = Node::start(&url, 1, 3).await;
    let call = lost.open(100).await.unwrap();
    lost.freeze().await;
    let node = Node::start(&url, 1, 3).await;
    eventually("the money is locked", async || {
        matches!(node.open(100).await.map(drop), Err(Error::BalanceLocked { .. }))
    })
    .await;
    eventually("the money is back", async || node.balance_nano().await == 100 * TOKEN_NANO).await;
    node.open(100).await.unwrap().end(answered(100));
    // The lost node is found again: what its call would have charged is its operator's.
    lost.live();
    call.end(answered(70));
    eventually("its line is stored", async || node.lines().await.len() == 2).await;
    let lines = node.lines().await;
    let late = lines.iter().find(|line| line.output == 70).unwrap();
    assert_eq!((late.charged_nano, late.absorbed_nano, late.flagged), (0, 70 * TOKEN_NANO, true));
    eventually("it begins again", async || lost.ledger.ready().is_ok()).await;
    lost.ledger.stop(Duration::from_secs(1)).await.unwrap();
    node.ledger.stop(Duration::from_secs(1)).await.unwrap();
    assert_eq!(node.balance_nano().await, 0);
    node.assert_books().await;
}

#[tokio::test]
async fn a_database_that_was_away_makes_nobody_a_forfeiter() {
    let Some(url) = database(100 * TOKEN_NANO).await else { return };
    let mut nodes = [Node::start(&url, 1, 2).await, Node::start(&url, 1, 2).await];
    let call = nodes[0].open(100).await.unwrap();
    for node in &mut nodes {
        node.freeze().await; // as with a database that answers nobody
    }
    tokio::time::sleep(Duration::from_millis(2500)).await;
    nodes[1].live();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(nodes[1].balance_nano().await, 0, "its own heartbeats had a gap, so it believes nothing yet");
    call.end(answered(100));
    nodes[0].live();
    nodes[0].ledger.stop(Duration::from_secs(1)).await.unwrap();
    nodes[1].ledger.stop(Duration::from_secs(1)).await.unwrap();
    assert_eq!(nodes[0].lines().await[0].charged_nano, 100 * TOKEN_NANO);
    nodes[0].assert_books().await;
}

#[tokio::test]
async fn an_operator_releases_a_boot_that_is_silent_and_no_other() {
    let Some(url) = database(100 * TOKEN_NANO).await else { return };
    let mut node = Node::start(&url, 600, 900).await;
    let _call = node.open(100).await.unwrap();
    node.freeze().await;
    let lease = node.store.leases().await.unwrap().pop().unwrap();
    assert_eq!((lease.user.as_str(), lease.amount_nano), ("ann", 100 * TOKEN_NANO));
    let refused = node.store.release_boot(lease.boot, 60_000).await.unwrap_err();
    assert!(refused.to_string().contains("it is alive"), "{refused}");
    assert_eq!(node.store.release_boot(lease.boot, 0).await.unwrap(), 100 * TOKEN_NANO);
    assert_eq!(node.balance_nano().await, 100 * TOKEN_NANO);
    assert!(node.store.release_boot(lease.boot, 0).await.is_err(), "once");
    node.assert_books().await;
}

/// Another key of the same user.
const OTHER: &str = "sk-ann-2";

/// A user with two keys, of which the first one has limits.
async fn with_limits(store: &Store, limits: NewLimits) -> i64 {
    let key = (hash_key(KEY), "ann".to_owned());
    store.add_user("ann".into(), "default".into(), 10_000 * TOKEN_NANO, Some(key)).await.unwrap();
    let id = store.keys(None).await.unwrap()[0].id;
    store.limit_key(id, limits).await.unwrap();
    let other = (hash_key(OTHER), "hint".to_owned(), "other".to_owned());
    store.add_key("ann".into(), other.0, other.1, other.2, NewLimits::default()).await.unwrap();
    id
}

fn total(tokens: i64) -> NewLimits {
    NewLimits { limit_nano: Some(Some(tokens * TOKEN_NANO)), ..NewLimits::default() }
}

impl Node {
    async fn call(&self, tokens: u64) {
        self.open(tokens).await.unwrap().end(answered(tokens));
    }

    async fn assert_reached(&self, tokens: u64) {
        let refused = self.open(tokens).await.unwrap_err();
        assert!(matches!(refused, Error::LimitReached { .. }), "{refused:?}");
    }

    /// What a node does in two seconds in which nobody calls.
    async fn pass_seconds(&self) {
        self.boot().ship().await.unwrap();
        self.boot().ship().await.unwrap();
    }

    fn is_in_use(&self) -> bool {
        self.users.find(KEY, 0).unwrap().spending.is_in_use()
    }
}

#[tokio::test]
async fn what_other_nodes_charged_to_a_limited_key_is_known_before_its_first_call_here() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(100)).await;
        let (one, two) = (Node::quiet(store).await, Node::quiet(store).await);
        one.call(80).await;
        one.pass_seconds().await;
        two.assert_reached(21).await;
        two.call(15).await;
        two.pass_seconds().await;
        one.assert_reached(6).await;
        one.open(5).await.unwrap().end(answered(5));
        for node in [one, two] {
            node.pass_seconds().await;
            node.assert_reached(1).await;
            assert!(!node.is_in_use(), "nothing of it waits for the store");
        }
    }
}

#[tokio::test]
async fn limits_of_days_and_months_begin_anew_with_what_the_store_has_of_the_new_one() {
    for Fixture { store, .. } in &each_store().await {
        let limits = NewLimits {
            day_nano: Some(Some(100 * TOKEN_NANO)),
            month_nano: Some(Some(150 * TOKEN_NANO)),
            ..NewLimits::default()
        };
        with_limits(store, limits).await;
        let node = Node::quiet(store).await;
        for _ in 0..2 {
            node.call(100).await;
            node.assert_reached(1).await;
            node.pass_seconds().await;
            node.assert_reached(1).await;
            // 40 days pass, which end any month.
            store.raw("UPDATE days SET day = day - 40".into()).await;
            store.raw("UPDATE lines SET started_ms = started_ms - 40 * CAST(86400000 AS BIGINT)".into()).await;
            node.pass_seconds().await;
        }
        node.call(100).await;
        node.pass_seconds().await;
        node.assert_books().await;
    }
}

#[tokio::test]
async fn a_limit_counts_what_a_crash_charged() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(100)).await;
        let mut node = Node::quiet(store).await;
        let mut line = node.open(90).await.unwrap();
        assert!(line.mark(60));
        std::mem::forget(line);
        node.crash_and_start().await;
        node.users = Users::load(store).await.unwrap();
        node.assert_reached(41).await;
        node.call(40).await;
    }
}

#[tokio::test]
async fn a_boot_that_was_fenced_off_leaves_nothing_pending_against_a_limit() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(100)).await;
        let node = Node::quiet(store).await;
        let line = node.open(60).await.unwrap();
        let boot = node.boot();
        boot.fence();
        line.end(answered(60));
        assert!(node.is_in_use());
        boot.retire(Duration::from_secs(1)).await.unwrap();
        assert!(!node.is_in_use());
    }
}

#[tokio::test]
async fn a_stream_at_the_limit_of_its_key_ends_although_another_key_of_the_user_is_busy() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(300)).await;
        let node = Node::quiet(store).await;
        let busy = node.open_with(OTHER, "busy", 50).await.unwrap();
        let mut stream = node.open(40).await.unwrap();
        assert!(stream.mark(40));
        let slices = tokio::time::timeout(Duration::from_secs(5), stream.slices(300)).await;
        assert!(slices.expect("it waits for nobody").is_none());
        // With another call that holds against the same limit, it waits until that one gives up.
        let other = node.open(50).await.unwrap();
        let asking = tokio::spawn(stream.slices(200));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!asking.is_finished(), "256 and 50 and 40 are more than 300");
        other.end(answered(4));
        let slices = tokio::time::timeout(Duration::from_secs(5), asking).await.unwrap().unwrap();
        assert!(slices.is_some() == (256 + 40 + 4 <= 300));
        drop((slices, busy));
    }
}

#[tokio::test]
async fn of_two_streams_at_the_limit_of_their_key_one_ends() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(300)).await;
        let node = Node::quiet(store).await;
        let busy = node.open_with(OTHER, "busy", 50).await.unwrap();
        let (one, two) = (node.open(40).await.unwrap(), node.open(40).await.unwrap());
        let ask = |line: OpenLine| {
            tokio::spawn(async move {
                let slices = line.slices(41).await;
                if slices.is_none() {
                    line.end(answered(0)); // it ends with what it has
                    return false;
                }
                true
            })
        };
        let both = [ask(one), ask(two)];
        let mut went_on = 0;
        for asking in both {
            let asking = tokio::time::timeout(Duration::from_secs(5), asking).await;
            went_on += usize::from(asking.expect("they do not wait for each other").unwrap());
        }
        assert_eq!(went_on, 1);
        drop(busy);
    }
}

#[tokio::test]
async fn a_limit_that_is_set_while_calls_run_counts_them_as_they_end() {
    for Fixture { store, .. } in &each_store().await {
        let id = with_limits(store, NewLimits::default()).await;
        let node = Node::quiet(store).await;
        let running = node.open(50).await.unwrap();
        node.call(30).await;
        store.limit_key(id, total(100)).await.unwrap();
        node.users.apply(store, &Change::Key(id)).await.unwrap();
        running.end(answered(50));
        node.boot().ship().await.unwrap();
        node.assert_reached(21).await;
        node.call(20).await;
    }
}

#[tokio::test]
async fn several_keys_at_their_limits_at_once_each_keep_their_own() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(100)).await;
        let other = store.keys(None).await.unwrap().into_iter().find(|key| key.name == "other").unwrap().id;
        store.limit_key(other, total(60)).await.unwrap();
        let day = NewLimits { day_nano: Some(Some(140 * TOKEN_NANO)), ..NewLimits::default() };
        store.limit_user("ann".into(), day).await.unwrap();
        let node = Arc::new(Node::quiet(store).await);
        let calls = (0..40).map(|number| {
            let node = node.clone();
            tokio::spawn(async move {
                let key = if number % 2 == 0 { KEY } else { OTHER };
                let Ok(line) = node.open_with(key, "r", 10).await else { return (key, 0) };
                tokio::task::yield_now().await;
                line.end(answered(10));
                (key, 1)
            })
        });
        let mut done = HashMap::from([(KEY, 0), (OTHER, 0)]);
        for call in calls.collect::<Vec<_>>() {
            let (key, ended) = call.await.unwrap();
            *done.get_mut(key).unwrap() += ended;
        }
        assert!(done[KEY] <= 10 && done[OTHER] <= 6, "{done:?}");
        assert_eq!(done[KEY] + done[OTHER], 14, "all that the user's allowance leaves: {done:?}");
        node.boot().ship().await.unwrap();
        node.assert_books().await;
    }
}

#[tokio::test]
async fn a_line_that_was_changed_does_not_recompute() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, NewLimits::default()).await;
        let node = Node::quiet(store).await;
        node.call(30).await;
        node.boot().ship().await.unwrap();
        node.assert_books().await;
        for change in [
            "charged_nano = charged_nano + 1",
            "charged_nano = charged_nano - 2",
            "output = output + 1",
            "tier = 1",
            "billed = 'nothing'",
            "ratio_micro = 500000",
        ] {
            let before = node.lines().await;
            store.raw(format!("UPDATE lines SET {change}")).await;
            let findings = store.audit(CHECK_LINE).await.unwrap().findings;
            assert!(findings.iter().any(|finding| finding.starts_with("line r:")), "{change}: {findings:?}");
            let [line] = &before[..] else { panic!("{before:?}") };
            let Line { charged_nano, output, tier, ratio_micro, .. } = line;
            let back = format!(
                "charged_nano = {charged_nano}, output = {output}, tier = {tier}, ratio_micro = {ratio_micro}, billed = '{}'",
                line.billed.name()
            );
            store.raw(format!("UPDATE lines SET {back}")).await;
            node.assert_books().await;
        }
    }
}

#[tokio::test]
async fn a_key_whose_figures_were_read_goes_on_without_the_database_and_another_is_told_to_wait() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(100)).await;
        let mut node = Node::quiet(store).await;
        node.store = Store { faults: Arc::default(), ..store.clone() };
        let faults = node.ledger.store.faults.clone();
        node.call(10).await;
        node.pass_seconds().await;
        // Nothing of it is held, so that it is read before the next call; that fails, and what is known serves.
        faults.lose_the_connection();
        node.call(10).await;
        let other = store.keys(None).await.unwrap().into_iter().find(|key| key.name == "other").unwrap().id;
        store.limit_key(other, total(50)).await.unwrap();
        node.users.apply(store, &Change::Key(other)).await.unwrap();
        for _ in 0..3 {
            // Within a second of that failure nobody tries again.
            let refused = node.open_with(OTHER, "r", 5).await.unwrap_err();
            assert!(matches!(refused, Error::NodeUnavailable { .. }), "{refused:?}");
        }
        tokio::time::sleep(Duration::from_millis(1100)).await;
        node.open_with(OTHER, "r", 5).await.unwrap().end(answered(5));
        node.pass_seconds().await;
        node.assert_books().await;
    }
}

#[tokio::test]
async fn calls_wait_a_second_for_a_database_that_hangs_all_of_them_together() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(1000)).await;
        let mut node = Node::quiet(store).await;
        node.store = Store { faults: Arc::default(), ..store.clone() };
        let faults = node.ledger.store.faults.clone();
        let busy = node.open(10).await.unwrap();
        node.open(500).await.unwrap().end(answered(10)); // there is money here for more calls
        let other = store.keys(None).await.unwrap().into_iter().find(|key| key.name == "other").unwrap().id;
        node.store.limit_key(other, total(500)).await.unwrap();
        node.users.apply(&node.store, &Change::Key(other)).await.unwrap();
        faults.hang();
        let began = Instant::now();
        let unknown = || node.open_with(OTHER, "r", 5);
        let (a, b, c, known) = tokio::join!(unknown(), unknown(), unknown(), node.open(10));
        for refused in [a, b, c] {
            assert!(matches!(refused, Err(Error::NodeUnavailable { .. })), "its figures were never read");
        }
        let known = known.expect("its figures are there");
        assert!(began.elapsed() < Duration::from_millis(1900), "one after the other: {:?}", began.elapsed());
        let began = Instant::now();
        unknown().await.unwrap_err();
        assert!(began.elapsed() < Duration::from_millis(500), "it hung a moment ago");
        faults.end();
        known.end(answered(10));
        busy.end(answered(10));
        tokio::time::sleep(Duration::from_millis(1100)).await;
        unknown().await.unwrap().end(answered(5));
        node.pass_seconds().await;
        node.assert_books().await;
    }
}

#[tokio::test]
async fn a_line_that_was_passed_over_is_charged_at_the_next_start_and_once() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, NewLimits::default()).await;
        let mut node = Node::quiet(store).await;
        for tokens in [10, 20, 30] {
            node.call(tokens).await;
        }
        node.boot().journal.misplace(1);
        node.boot().ship().await.unwrap();
        assert_eq!(node.lines().await.len(), 2, "the others are not held up");
        for _ in 0..2 {
            node.crash_and_start().await;
            let mut charged: Vec<i64> = node.lines().await.iter().map(|line| line.charged_nano / TOKEN_NANO).collect();
            charged.sort_unstable();
            assert_eq!(charged, [10, 20, 30]);
            node.assert_books().await;
        }
    }
}

#[tokio::test]
async fn nobody_at_a_limit_waits_for_a_call_that_waits_for_money() {
    for Fixture { store, .. } in &each_store().await {
        with_limits(store, total(400)).await;
        let node = Node::quiet(store).await;
        let rich = node.open_with(OTHER, "rich", 9800).await.unwrap();
        let (at_limit, poor) = (node.open(40).await.unwrap(), node.open(40).await.unwrap());
        let asking = tokio::spawn(poor.slices(41));
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!asking.is_finished(), "it waits for the money of the long call");
        let slices = tokio::time::timeout(Duration::from_secs(5), at_limit.slices(40 + 2 * SLICE_TOKENS)).await;
        assert!(slices.expect("it does not wait for one that waits").is_none());
        rich.end(answered(10));
        assert!(asking.await.unwrap().is_some());
    }
}
