//! Random histories of two nodes on one store against a model of a few lines: holds, slices, ends, returns, recalls,
//! crashes, forfeits, lost transactions and lost outcomes; the invariants after every step.

use std::collections::HashMap;

use proptest::prelude::*;

use super::tests::{KEY, Node, TOKEN_NANO, answered};
use super::*;
use crate::config::DatabaseUrl;

/// What happens next; numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Open { node: usize, tokens: u64 },
    Slice { call: usize, tokens: u64 },
    End { call: usize, tokens: u64 },
    Leave { call: usize, tokens: u64 },
    Ship { node: usize },
    GiveBack { node: usize },
    Forget { node: usize },
    Crash { node: usize },
    Release { node: usize },
    Credit { tokens: i64 },
    Debit { tokens: i64 },
    LoseNext,
    LoseOutcome,
}

fn step() -> impl Strategy<Value = Step> {
    let (node, call, tokens) = (0..2usize, 0..100usize, 1..400u64);
    prop_oneof![
        6 => (node.clone(), tokens.clone()).prop_map(|(node, tokens)| Step::Open { node, tokens }),
        3 => (call.clone(), tokens.clone()).prop_map(|(call, tokens)| Step::Slice { call, tokens }),
        5 => (call.clone(), 0..600u64).prop_map(|(call, tokens)| Step::End { call, tokens }),
        1 => (call, tokens).prop_map(|(call, tokens)| Step::Leave { call, tokens }),
        3 => node.clone().prop_map(|node| Step::Ship { node }),
        2 => node.clone().prop_map(|node| Step::GiveBack { node }),
        2 => node.clone().prop_map(|node| Step::Forget { node }),
        1 => node.clone().prop_map(|node| Step::Crash { node }),
        1 => node.prop_map(|node| Step::Release { node }),
        1 => (1..500i64).prop_map(|tokens| Step::Credit { tokens }),
        1 => (1..500i64).prop_map(|tokens| Step::Debit { tokens }),
        2 => Just(Step::LoseNext),
        2 => Just(Step::LoseOutcome),
    ]
}

/// The model: what the user was given, and what each call that has ended cost at the most.
#[derive(Default)]
struct Model {
    given_nano: i64,
    cost_nano: HashMap<String, i64>,
}

async fn history(steps: Vec<Step>) {
    let folder = tempfile::tempdir().unwrap();
    let url = DatabaseUrl::Sqlite(folder.path().join("x.db"));
    let store = Store::open(&url).await.unwrap();
    store
        .add_user("ann".into(), "default".into(), 1000 * TOKEN_NANO, Some((crate::users::hash_key(KEY), "ann".into())))
        .await
        .unwrap();
    let mut nodes = [Node::quiet(&store).await, Node::quiet(&store).await];
    let mut model = Model { given_nano: 1000 * TOKEN_NANO, ..Model::default() };
    let mut open: Vec<(usize, String, OpenLine)> = Vec::new();
    let mut calls = 0;
    for step in steps {
        match step {
            Step::Open { node, tokens } => {
                calls += 1;
                let id = format!("call-{calls}");
                if let Ok(line) = nodes[node].open_as(&id, tokens).await {
                    open.push((node, id, line));
                }
            }
            Step::Slice { call, tokens } if !open.is_empty() => {
                let at = call % open.len();
                let (_, _, line) = &mut open[at];
                let output = line.covered() + tokens;
                // It would wait for other calls, which go on only when this step is over.
                let asking = tokio::time::timeout(Duration::from_millis(100), line.slices(output));
                if let Ok(Some(slices)) = asking.await {
                    line.add_slices(slices, 0);
                }
            }
            Step::End { call, tokens } if !open.is_empty() => {
                let (_, id, line) = open.swap_remove(call % open.len());
                model.cost_nano.insert(id, tokens as i64 * TOKEN_NANO);
                line.end(answered(tokens));
            }
            Step::Leave { call, tokens } if !open.is_empty() => {
                let (_, id, mut line) = open.swap_remove(call % open.len());
                model.cost_nano.insert(id, tokens as i64 * TOKEN_NANO);
                line.handed_over(tokens, false);
            }
            Step::Ship { node } => drop(nodes[node].boot().ship().await),
            Step::GiveBack { node } => nodes[node].boot().asked_back(1, [0; 16]).await,
            Step::Forget { node } => {
                let boot = nodes[node].boot();
                boot.known_purse(1).into_iter().for_each(|purse| purse.age());
                boot.forget_empty().await;
            }
            Step::Crash { node } => {
                for at in (0..open.len()).rev().filter(|at| open[*at].0 == node).collect::<Vec<_>>() {
                    let (_, id, line) = open.swap_remove(at);
                    // Whatever was marked; never more than was held.
                    model.cost_nano.insert(id, i64::MAX);
                    std::mem::forget(line);
                }
                store.faults.end();
                nodes[node].crash_and_start().await;
            }
            Step::Release { node } => {
                let boot = nodes[node].boot();
                let _ = store.release_boot(boot.id, 0).await;
                for at in (0..open.len()).rev().filter(|at| open[*at].0 == node).collect::<Vec<_>>() {
                    let (_, id, line) = open.swap_remove(at);
                    model.cost_nano.insert(id, 0);
                    drop(line);
                }
                store.faults.end();
                nodes[node].begin_again().await;
            }
            Step::Credit { tokens } => {
                let credited = store.credit("ann".into(), tokens * TOKEN_NANO, String::new()).await;
                store.faults.end();
                let entries = store.audit(CHECK_LINE).await.unwrap().users[0].entries_nano;
                assert!(credited.is_err() || entries == model.given_nano + tokens * TOKEN_NANO);
                model.given_nano = entries;
            }
            Step::Debit { tokens } => {
                let debited = store.debit("ann".into(), tokens * TOKEN_NANO, String::new()).await;
                store.faults.end();
                let entries = store.audit(CHECK_LINE).await.unwrap().users[0].entries_nano;
                assert!(debited.is_err() || entries == model.given_nano - tokens * TOKEN_NANO);
                model.given_nano = entries;
            }
            Step::LoseNext => store.faults.lose_the_next(),
            Step::LoseOutcome => store.faults.lose_the_next_outcome(),
            Step::Slice { .. } | Step::End { .. } | Step::Leave { .. } => {}
        }
        if !matches!(step, Step::LoseNext | Step::LoseOutcome) {
            store.faults.end();
            check(&store, &nodes, &model).await;
        }
    }
    store.faults.end();
    drop(open);
    for node in &nodes {
        node.boot().retire(Duration::from_secs(1)).await.unwrap();
    }
    check(&store, &nodes, &model).await;
    let audit = store.audit(CHECK_LINE).await.unwrap();
    assert_eq!(audit.users[0].leased_nano, 0, "nothing stays leased");
    // Every call that ended has its line: one.
    let lines = nodes[0].lines().await;
    for id in model.cost_nano.keys() {
        assert_eq!(lines.iter().filter(|line| line.request_id == *id).count(), 1, "{id}");
    }
}

/// Every invariant of the protocol that can be seen from outside.
async fn check(store: &Store, nodes: &[Node; 2], model: &Model) {
    let audit = store.audit(CHECK_LINE).await.unwrap();
    let user = &audit.users[0];
    assert_eq!(user.difference_nano(), 0, "{user:?}");
    assert_eq!(audit.findings, Vec::<String>::new());
    assert_eq!(user.entries_nano, model.given_nano);
    assert!(user.balance_nano >= 0 && user.charged_nano <= model.given_nano, "{user:?}");
    for node in nodes {
        let boot = node.boot();
        let lease = store.lease(boot.id, 1).await.unwrap();
        assert!(lease.amount_nano >= 0);
        if let Some(purse) = boot.known_purse(1) {
            assert!(purse.room() >= 0);
        }
    }
    for line in nodes[0].lines().await {
        if let Some(most) = model.cost_nano.get(&line.request_id) {
            assert!(line.charged_nano <= *most, "{line:?}");
        }
        assert!(
            line.charged_nano <= line.hold_nano.max(line.charged_nano.min(line.hold_nano)) || line.charged_nano >= 0
        );
    }
}

/// More of them by hand: `PROPTEST_CASES`.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_history_of_two_nodes_adds_up(steps in prop::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(history(steps));
    }
}
