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
use crate::store::tests::cluster;
use crate::store::{EndReason, LineFilter, Notice};
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
        let key = self.users.find(KEY, 0).unwrap();
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
