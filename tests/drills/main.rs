//! Drills of the books, with processes of the built binary: overspending, `kill -9`, pauses, a database that is away.
//!
//! Each compares what clients received, counted here, with what the books say.

#[path = "../support/cluster.rs"]
mod cluster;
#[cfg(debug_assertions)] // a release has no small segments
mod disk;
mod field;
mod statements;
#[cfg(debug_assertions)] // a release has no failpoints
mod walk;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use field::{Field, Reply, Wire, chat};
use serde_json::Value;

/// What one output token costs in the drills; input is free there.
const TOKEN_NANO: i64 = 1000;

/// 200 calls, at most 200 a second, in turn to each node, on a balance worth ten of them.
fn overspend(nodes: usize, postgres: bool, stream: bool) {
    let Some(mut field) = Field::new(postgres, 10 * 100 * TOKEN_NANO, "on_low_balance = \"refuse\"") else { return };
    for _ in 0..nodes {
        field.start_node();
    }
    let replies: Vec<Reply> = thread::scope(|scope| {
        let calls: Vec<_> = (0..200)
            .map(|number| {
                let address = field.address(number % nodes);
                thread::sleep(Duration::from_millis(5));
                scope.spawn(move || chat(&address, &format!(r#""stream":{stream},"max_tokens":100"#), "words=100"))
            })
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    let whole = replies.iter().filter(|reply| reply.status == 200 && reply.whole && reply.words == 100).count();
    let refused: Vec<&Reply> = replies.iter().filter(|reply| reply.status != 200).collect();
    assert_eq!(whole, 10, "{nodes} nodes, stream {stream}: {:?}", refused.first());
    assert_eq!(refused.len(), 190);
    assert!(refused.iter().all(|reply| reply.status == 429 && reply.text.contains("insufficient_quota")));
    assert_eq!(field.upstream.calls(), 10, "the others were refused before the upstream was called");
    field.stop_all();
    assert_eq!(field.balance_nano(), 0);
    field.assert_audit();
}

#[test]
fn ten_of_two_hundred_calls_complete_on_a_balance_worth_ten() {
    overspend(1, false, true);
    overspend(1, false, false);
}

#[test]
fn ten_of_two_hundred_calls_complete_on_postgresql() {
    overspend(1, true, true);
}

#[test]
fn ten_of_two_hundred_calls_complete_on_three_nodes() {
    overspend(3, true, true);
    overspend(3, true, false);
}

#[test]
fn without_max_tokens_every_call_that_was_admitted_completes() {
    for nodes in [1, 3] {
        let Some(mut field) = Field::new(nodes > 1, 10 * 256 * TOKEN_NANO, "") else { return };
        for _ in 0..nodes {
            field.start_node();
        }
        let replies: Vec<Reply> = thread::scope(|scope| {
            let calls: Vec<_> = (0..100)
                .map(|number| {
                    let address = field.address(number % nodes);
                    thread::sleep(Duration::from_millis(5));
                    scope.spawn(move || chat(&address, r#""stream":true"#, "words=90 each_ms=3"))
                })
                .collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        let admitted: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 200).collect();
        assert!(admitted.len() >= 10, "{}", admitted.len());
        let cut = admitted.iter().filter(|reply| !reply.whole || reply.words != 90).count();
        // The last of the money may go to a call that is alone and clamped to it.
        assert!(cut <= nodes, "{cut} of {} were cut", admitted.len());
        field.stop_all();
        field.assert_audit();
    }
}

/// What clients received over some kills, to be compared with the books.
#[derive(Default)]
struct Answers {
    all: HashMap<String, Reply>,
    /// Calls that got no answer at all: killed before the head went out.
    unanswered: usize,
    kills: usize,
    /// Calls that were open when a node was stopped in order.
    drained: usize,
    whole: usize,
    cut: usize,
}

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Answers { kills, whole, cut, unanswered, .. } = self;
        write!(f, "{kills} kills: {whole} whole, {cut} cut, {unanswered} unanswered")
    }
}

impl Answers {
    fn add(&mut self, replies: Vec<Reply>) {
        for reply in replies {
            match reply.status {
                200 => drop(self.all.insert(reply.request_id.clone(), reply)),
                0 => self.unanswered += 1,
                _ => {}
            }
        }
    }

    /// Every answer that arrived whole has one line at its exact cost; one that was cut has one `crashed` line that
    /// charges no more than arrived, and at most a slice less.
    fn assert_lines(&mut self, field: &Field) {
        let lines = field.lines();
        let mut by_id: HashMap<&str, &Value> = HashMap::new();
        for line in &lines {
            let twice = by_id.insert(line["request_id"].as_str().unwrap(), line);
            assert!(twice.is_none(), "a call has two lines: {line}");
        }
        // Killed between an END and the last bytes, which a worker writes one after the other.
        let mut ended_not_sent = 0;
        for (id, reply) in &self.all {
            let line = by_id.remove(id.as_str());
            let line = line.unwrap_or_else(|| panic!("no line for an answer that arrived: {reply:?}"));
            let billed = line["output_tokens"].as_u64().unwrap() as usize;
            let complete = line["end_reason"] == "complete";
            if reply.whole {
                self.whole += 1;
                assert_eq!((billed, complete), (reply.words, true), "{line}");
                continue;
            }
            self.cut += 1;
            if complete {
                ended_not_sent += 1;
                assert_eq!(billed, reply.asked, "{line}");
                continue;
            }
            if line["end_reason"] == "drained" && self.drained > 0 {
                self.drained -= 1;
                assert_eq!(billed, reply.words, "{line}");
                continue;
            }
            assert_eq!(line["end_reason"], "crashed", "{line}");
            assert!(billed <= reply.words, "{billed} billed of {} words: {line}", reply.words);
            assert!(reply.words <= billed + 256 + 1, "{billed} billed of {} words", reply.words);
        }
        // The others are of clients that got nothing: a line each at the most, and charged only if it had ended.
        assert!(by_id.len() <= self.unanswered, "{} lines of {} calls", by_id.len(), self.unanswered);
        for line in by_id.into_values() {
            match line["end_reason"].as_str() {
                Some("complete") => ended_not_sent += 1,
                _ => assert_eq!(line["charged"], "0.00", "{line}"),
            }
        }
        let workers = thread::available_parallelism().unwrap().get();
        assert!(ended_not_sent <= workers * self.kills, "{ended_not_sent} ended and were not sent in {self:?}");
        eprintln!("{self:?}; {ended_not_sent} ended and were not sent");
    }
}

/// Kills a node `rounds` times under 20 open streams and as many whole answers, and compares every answer with its line.
fn crash(postgres: bool, rounds: u64) {
    let Some(mut field) = Field::new(postgres, 1_000_000_000_000, "") else { return };
    let node = field.start_node();
    let mut answers = Answers::default();
    for round in 0..rounds {
        let address = field.address(node);
        let done = AtomicUsize::new(0);
        let replies: Vec<Reply> = thread::scope(|scope| {
            let streams = (0..20).map(|number| {
                let (address, done) = (&address, &done);
                scope.spawn(move || {
                    // Some end before the kill, most are cut by it.
                    let words = if number % 4 == 0 { 60 } else { 100_000 };
                    let reply = chat(address, r#""stream":true"#, &format!("words={words} each_ms=1"));
                    done.fetch_add(1, Ordering::Relaxed);
                    reply
                })
            });
            let wholes = (0..20).map(|_| {
                let address = &address;
                scope.spawn(move || chat(address, r#""stream":false,"max_tokens":40"#, "words=40"))
            });
            let calls: Vec<_> = streams.chain(wholes).collect();
            thread::sleep(Duration::from_millis(300 + 173 * (round % 5)));
            field.kill(node);
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        answers.add(replies);
        answers.kills += 1;
        field.restart(node);
    }
    field.stop_all();
    answers.assert_lines(&field);
    assert!(answers.whole >= rounds as usize && answers.cut >= 10 * rounds as usize, "{answers:?}");
    field.assert_audit();
}

#[test]
fn a_node_that_is_killed_again_and_again_loses_no_line_and_charges_none_twice() {
    crash(false, field::rounds(10));
}

#[test]
fn the_same_with_postgresql() {
    crash(true, field::rounds(10));
}

#[test]
fn a_node_that_is_stopped_past_its_forfeit_charges_nobody_when_it_comes_back() {
    let Some(mut field) = Field::new(true, 2_000 * TOKEN_NANO, "fence_s = 2\nforfeit_s = 4") else { return };
    let (stopped, other) = (field.start_node(), field.start_node());
    let address = field.address(stopped);
    let running = thread::spawn(move || chat(&address, r#""stream":true,"max_tokens":2000"#, "words=2000 each_ms=5"));
    thread::sleep(Duration::from_millis(700));
    field.signal(stopped, "-STOP");
    let locked = chat(&field.address(other), r#""max_tokens":1500"#, "words=1500");
    assert!(matches!(locked.status, 429 | 503), "the money is leased elsewhere: {locked:?}");
    field.until("the money is back", |field| field.balance_nano() == 2_000 * TOKEN_NANO);
    let served = chat(&field.address(other), r#""max_tokens":1500"#, "words=1500");
    assert_eq!((served.status, served.words), (200, 1500));
    field.signal(stopped, "-CONT");
    let reply = running.join().unwrap();
    field.until("both lines are there", |field| field.lines().len() == 2);
    let lines = field.lines();
    let late = lines.iter().find(|line| line["request_id"] == reply.request_id.as_str()).unwrap();
    assert_eq!((late["charged"].as_str(), late["absorbed"].as_str()), (Some("0.00"), Some("0.002")), "{late}");
    // It begins again and serves from what is left.
    field.until("it serves again", |field| {
        chat(&field.address(stopped), r#""max_tokens":20"#, "words=20").status == 200
    });
    field.stop_all();
    field.assert_audit();
}

/// A reply, and whether its call began while the database was away.
struct Timed {
    reply: Reply,
    away: bool,
}

/// Two nodes under load whose database goes away for a while and comes back: they serve what they have leased, then refuse
/// with 503; then everything is shipped, once, without a restart.
fn outage(mut field: Field, away: Duration, goes: impl FnOnce(&Field), returns: impl FnOnce(&Field)) {
    let nodes = [field.start_node(), field.start_node()];
    let addresses = nodes.map(|node| field.address(node));
    // What a node leases ahead is what its users spent.
    for address in addresses.iter().cycle().take(60) {
        assert_eq!(chat(address, r#""max_tokens":50"#, "words=50").status, 200);
    }
    let (gone, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let replies: Vec<Timed> = thread::scope(|scope| {
        let load: Vec<_> = (0..4)
            .map(|number| {
                let (address, gone, over) = (&addresses[number % 2], &gone, &over);
                scope.spawn(move || {
                    let mut replies = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        let away = gone.load(Ordering::Relaxed);
                        let reply = chat(address, r#""stream":true,"max_tokens":50"#, "words=50 each_ms=1");
                        replies.push(Timed { reply, away: away && gone.load(Ordering::Relaxed) });
                        thread::sleep(Duration::from_millis(20));
                    }
                    replies
                })
            })
            .collect();
        thread::sleep(Duration::from_secs(1));
        goes(&field);
        gone.store(true, Ordering::Relaxed);
        thread::sleep(away);
        gone.store(false, Ordering::Relaxed);
        returns(&field);
        thread::sleep(Duration::from_secs(3));
        over.store(true, Ordering::Relaxed);
        load.into_iter().flat_map(|load| load.join().unwrap()).collect()
    });
    let refused: Vec<&Reply> = replies.iter().map(|timed| &timed.reply).filter(|reply| reply.status != 200).collect();
    assert!(refused.iter().all(|reply| reply.status == 503 && reply.text.contains("etry-after")), "{:?}", refused[0]);
    let count = |status: u16| replies.iter().filter(|timed| timed.away && timed.reply.status == status).count();
    eprintln!("away for {away:?}: {} served meanwhile, {} refused; {} in all", count(200), count(503), replies.len());
    assert!(count(200) > 0, "nodes serve what they have leased");
    assert!(count(503) > 0, "and no more than that");
    field.until("both serve again, without a restart", |_| {
        addresses.iter().all(|address| chat(address, r#""max_tokens":50"#, "words=50").status == 200)
    });
    field.stop_all();
    let lines = field.lines();
    let mut by_id: HashMap<&str, &Value> = HashMap::new();
    for line in &lines {
        assert!(by_id.insert(line["request_id"].as_str().unwrap(), line).is_none(), "doubled: {line}");
    }
    for Timed { reply, .. } in replies.iter().filter(|timed| timed.reply.status == 200) {
        let line = by_id.get(reply.request_id.as_str()).unwrap_or_else(|| panic!("not shipped: {reply:?}"));
        assert_eq!((reply.whole, line["output_tokens"].as_u64()), (true, Some(reply.words as u64)), "{line}");
    }
    field.assert_audit();
}

fn outage_on_the_way(wire: Wire, away: Duration) {
    let Some(mut field) = Field::new(true, 1_000_000_000_000, "") else { return };
    field.put_proxy_before_database();
    outage(field, away, |field| field.database(wire), |field| field.database(Wire::Open));
}

#[test]
fn a_database_that_is_down_for_a_while_costs_no_line_and_no_restart() {
    outage_on_the_way(Wire::Closed, Duration::from_secs(field::rounds(8)));
}

#[test]
fn a_network_that_swallows_what_the_database_is_sent_costs_no_line_and_no_restart() {
    outage_on_the_way(Wire::Swallowing, Duration::from_secs(field::rounds(12)));
}

#[test]
fn a_server_of_postgresql_that_crashes_under_load_and_comes_back_costs_no_line_and_no_restart() {
    let Some(cluster) = cluster::Cluster::start(None) else { return };
    let field = Field::on(tempfile::tempdir().unwrap(), cluster.database(), 1_000_000_000_000, "");
    let cluster = std::sync::Mutex::new(cluster);
    let away = Duration::from_secs(field::rounds(8));
    outage(field, away, |_| cluster.lock().unwrap().stop(), |_| cluster.lock().unwrap().start_again());
}
