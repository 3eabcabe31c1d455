//! A node dies, or is stopped, at every failpoint of the protocol; what clients got is compared with the books.
//!
//! `every_failpoint_is_walked_to` and the walks show together that each of them is reached.

use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use gpt_cat::failpoint;
use serde_json::Value;

use crate::field::{Field, Reply, chat};
use crate::{Answers, TOKEN_NANO};

/// How a node comes to a place.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// By streams and whole answers.
    Load,
    /// By them, while an operator asks for money that is leased.
    Debit,
    /// As it starts, after a node was killed under load.
    Start,
    /// The same, with more lines left than one transaction takes.
    StartWithMany,
    /// As it is stopped in order.
    Stop,
    /// The money is on another node, which serves on.
    Short,
    /// Another node is silent.
    Silent,
}

/// Where nodes die, and at which time that they come there.
static WALK: [(&str, u32, Way); 38] = [
    ("boot.registered", 1, Way::Start),
    ("grant.asked", 1, Way::Load),
    ("grant.asked", 2, Way::Load),
    ("grant.answered", 1, Way::Load),
    ("grant.answered", 2, Way::Load),
    ("return.asked", 1, Way::Debit),
    ("return.answered", 1, Way::Debit),
    ("recall.asked", 1, Way::Short),
    ("recall.told", 1, Way::Short),
    ("recall.heard", 1, Way::Debit),
    ("heartbeat.asked", 2, Way::Load),
    ("heartbeat.answered", 2, Way::Load),
    ("forfeit.found", 1, Way::Silent),
    ("forfeit.released", 1, Way::Silent),
    ("open.due", 1, Way::Load),
    ("open.due", 30, Way::Load),
    ("open.written", 1, Way::Load),
    ("open.written", 30, Way::Load),
    ("mark.due", 1, Way::Load),
    ("mark.due", 37, Way::Load),
    ("mark.written", 1, Way::Load),
    ("mark.written", 11, Way::Load),
    ("mark.written", 38, Way::Load),
    ("end.due", 1, Way::Load),
    ("end.due", 25, Way::Load),
    ("end.written", 1, Way::Load),
    ("end.written", 25, Way::Load),
    ("sync.due", 5, Way::Load),
    ("sync.done", 5, Way::Load),
    ("ship.read", 1, Way::Load),
    ("ship.read", 2, Way::Load),
    ("ship.committed", 1, Way::Load),
    ("segment.due", 1, Way::Load),
    ("segment.removed", 1, Way::Load),
    ("replay.read", 1, Way::Start),
    ("replay.shipped", 1, Way::StartWithMany),
    ("replay.closed", 1, Way::Start),
    ("stop.shipped", 1, Way::Stop),
];

/// Clients that read streams, and clients that wait for whole answers.
const STREAMS: usize = 12;
const WHOLES: usize = 4;

/// What comes of a load for as long as `during` lasts.
fn load<T>(address: &str, during: impl FnOnce() -> T) -> (Vec<Reply>, T) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..STREAMS + WHOLES)
            .map(|number| {
                let over = &over;
                scope.spawn(move || {
                    let mut replies: Vec<Reply> = Vec::new();
                    while !over.load(Ordering::Relaxed) && replies.last().is_none_or(|reply| reply.status != 0) {
                        replies.push(match number {
                            STREAMS.. => chat(address, r#""stream":false,"max_tokens":40"#, "words=40"),
                            // In large chunks, past several slices.
                            number if number % 4 == 0 => chat(address, r#""stream":true"#, "words=700"),
                            number if number % 4 == 1 => chat(address, r#""stream":true"#, "words=60 each_ms=1"),
                            _ => chat(address, r#""stream":true"#, "words=20000 each_ms=1"),
                        });
                    }
                    replies
                })
            })
            .collect();
        let came = during();
        over.store(true, Ordering::Relaxed);
        (clients.into_iter().flat_map(|client| client.join().unwrap()).collect(), came)
    })
}

/// Takes one node after the other to a place and lets it die there, on one database.
fn walk(postgres: bool, chosen: impl Fn(&str, Way) -> bool) {
    let Some(mut field) = Field::new(
        postgres,
        1_000_000_000_000,
        "fence_s = 15\nforfeit_s = 20\njournal_bytes_max = 67108864\n[server]\ndrain_s = 1",
    ) else {
        return;
    };
    let node = field.add_node();
    let mut answers = Answers::default();
    for (name, nth, way) in WALK.iter().filter(|(name, _, way)| chosen(name, *way)) {
        let armed = format!("{name}:{nth}");
        let died = match way {
            Way::Start | Way::StartWithMany => {
                let many = *way == Way::StartWithMany;
                assert!(field.restart_armed(node, if many { "ship.read:1:pause_ms=60000" } else { "" }));
                let address = field.address(node);
                let before = field.upstream.calls();
                let (replies, ()) = load(&address, || {
                    thread::sleep(Duration::from_millis(200));
                    while many && field.upstream.calls() < before + 700 {
                        thread::sleep(Duration::from_millis(10));
                    }
                    field.kill(node);
                });
                answers.add(replies);
                !field.restart_armed(node, &armed)
            }
            Way::Load | Way::Debit | Way::Stop => {
                assert!(field.restart_armed(node, &armed), "{armed}: {}", field.log(node));
                let address = field.address(node);
                let (replies, died) = load(&address, || {
                    let mut debit: Option<Child> = None;
                    match way {
                        Way::Debit => {
                            thread::sleep(Duration::from_millis(200));
                            debit = Some(field.begin_debit(1000));
                        }
                        Way::Stop => {
                            thread::sleep(Duration::from_millis(200));
                            field.signal(node, "-TERM");
                            answers.drained += STREAMS + WHOLES;
                        }
                        _ => {}
                    }
                    let died = field.has_died(node);
                    if let Some(mut debit) = debit {
                        let _ = debit.kill();
                        let _ = debit.wait();
                    }
                    died || {
                        field.kill(node);
                        false
                    }
                });
                answers.add(replies);
                died
            }
            Way::Short | Way::Silent => unreachable!("two nodes: walked to apart"),
        };
        assert!(died, "{armed} was not reached");
        answers.kills += 1;
        field.assert_sums();
    }
    field.restart(node);
    field.stop_all();
    answers.assert_lines(&field);
    field.assert_audit();
}

#[test]
fn a_node_that_dies_at_any_arrow_of_the_protocol_loses_no_line_and_charges_none_twice() {
    walk(false, |_, way| !matches!(way, Way::Short | Way::Silent));
}

#[test]
fn a_kill_costs_at_most_a_slice_of_a_stream_whose_whole_answer_is_held() {
    let Some(mut field) = Field::new(false, 1_000_000_000_000, "") else { return };
    let node = field.start_node();
    let address = field.address(node);
    let stream = thread::spawn(move || chat(&address, r#""stream":true,"max_tokens":20000"#, "words=20000 each_ms=1"));
    thread::sleep(Duration::from_secs(2));
    field.kill(node);
    let reply = stream.join().unwrap();
    field.restart(node);
    let lines = field.lines();
    let billed = lines[0]["output_tokens"].as_u64().unwrap() as usize;
    assert!(reply.words > 2 * 257, "there were slices to lose: {}", reply.words);
    assert!((billed..=billed + 257).contains(&reply.words), "{billed} billed of {} words", reply.words);
}

#[test]
fn a_kill_at_the_end_of_a_stream_charges_nothing_that_was_not_written() {
    let Some(mut field) = Field::new(false, 1_000_000_000_000, "") else { return };
    let node = field.add_node();
    assert!(field.restart_armed(node, "mark.written:2"), "the second MARK is that of the end");
    // All words come in one piece, with the end right behind them.
    let reply = chat(&field.address(node), r#""stream":true"#, "words=200");
    assert!(field.has_died(node));
    field.restart(node);
    let lines = field.lines();
    assert_eq!((lines[0]["output_tokens"].as_u64(), reply.words), (Some(200), 200), "{}", lines[0]);
}

/// The arrows at which PostgreSQL is another database than SQLite.
const ON_POSTGRESQL: [&str; 9] = [
    "grant.answered",
    "return.asked",
    "return.answered",
    "recall.heard",
    "heartbeat.answered",
    "mark.written",
    "ship.committed",
    "replay.shipped",
    "replay.closed",
];

#[test]
fn the_same_with_postgresql() {
    walk(true, |name, way| ON_POSTGRESQL.contains(&name) && !matches!(way, Way::Short | Way::Silent));
}

fn walked(way: Way) -> impl Iterator<Item = String> {
    WALK.iter().filter(move |walked| walked.2 == way).map(|(name, nth, _)| format!("{name}:{nth}"))
}

/// A balance of so many tokens, which one call can hold whole.
const BALANCE: i64 = 2000 * TOKEN_NANO;

#[test]
fn a_node_that_dies_while_it_asks_another_for_money_takes_none_with_it() {
    for armed in walked(Way::Short) {
        let Some(mut field) = Field::new(true, BALANCE, "fence_s = 5\nforfeit_s = 7") else { return };
        let (holder, asking) = (field.start_node(), field.add_node());
        assert!(field.restart_armed(asking, &armed));
        let address = field.address(holder);
        let held = thread::spawn(move || chat(&address, r#""stream":true,"max_tokens":2000"#, "words=500 each_ms=2"));
        thread::sleep(Duration::from_millis(300));
        let lost = chat(&field.address(asking), r#""max_tokens":1000"#, "words=1000");
        assert_eq!((lost.status, field.has_died(asking)), (0, true), "{armed}");
        let held = held.join().unwrap();
        assert_eq!((held.words, held.whole), (500, true), "{armed}");
        field.assert_sums();
        field.restart(asking);
        let served = chat(&field.address(asking), r#""max_tokens":1500"#, "words=1500");
        assert_eq!((served.status, served.words), (200, 1500), "{armed}: the holder gives back what it has free");
        field.stop_all();
        assert_eq!((field.lines().len(), field.balance_nano()), (2, 0), "{armed}");
        field.assert_audit();
    }
}

#[test]
fn a_node_that_dies_while_it_forfeits_another_gives_the_money_back_once() {
    for armed in walked(Way::Silent) {
        let Some(mut field) = Field::new(true, BALANCE, "fence_s = 2\nforfeit_s = 4") else { return };
        let (silent, node) = (field.start_node(), field.add_node());
        assert!(field.restart_armed(node, &armed));
        let address = field.address(silent);
        let running =
            thread::spawn(move || chat(&address, r#""stream":true,"max_tokens":2000"#, "words=2000 each_ms=5"));
        thread::sleep(Duration::from_millis(300));
        field.signal(silent, "-STOP");
        assert!(field.has_died(node), "{armed}");
        field.assert_sums();
        field.restart(node);
        field.until("the money is back", |field| field.balance_nano() == BALANCE);
        field.signal(silent, "-CONT");
        running.join().unwrap();
        field.until("it serves again", |field| {
            chat(&field.address(silent), r#""max_tokens":20"#, "words=20").status == 200
        });
        field.stop_all();
        assert_eq!(field.balance_nano(), BALANCE - 20 * TOKEN_NANO, "{armed}: what was forfeited is charged to nobody");
        field.assert_audit();
    }
}

/// A node is stopped at a place until its leases were forfeited and their money spent elsewhere, and goes on there; the
/// first call's reply, its line as charged and absorbed, and what was charged before the money went back.
fn stopped_past_its_forfeit(name: &str, status: u16, line: Option<(&str, &str)>, charged_before: i64) {
    let Some(mut field) = Field::new(true, BALANCE, "fence_s = 2\nforfeit_s = 4") else { return };
    let (stopped, other) = (field.add_node(), field.start_node());
    assert!(field.restart_armed(stopped, &format!("{name}:1:stop")));
    let address = field.address(stopped);
    let first = thread::spawn(move || chat(&address, r#""max_tokens":2000"#, "words=100"));
    assert!(field.has_stopped(stopped), "{name}");
    thread::sleep(Duration::from_secs(7));
    // Longer where the machine is busy: a node whose own beats were late forfeits nobody for a while.
    field.until("the money is back", |field| field.balance_nano() == BALANCE - charged_before);
    let served = chat(&field.address(other), r#""max_tokens":1800"#, "words=1800");
    assert_eq!((served.status, served.words), (200, 1800), "{name}");
    field.signal(stopped, "-CONT");
    let first = first.join().unwrap();
    assert_eq!(first.status, status, "{name}: {first:?}");
    let again = |field: &Field| chat(&field.address(stopped), r#""max_tokens":20"#, "words=20").status == 200;
    field.until("it serves again", again);
    field.stop_all();
    let lines = field.lines();
    let of_first: Vec<_> = lines.iter().filter(|line| line["request_id"] == first.request_id.as_str()).collect();
    let charged = |line: &&Value| (line["charged"].clone(), line["absorbed"].clone());
    let expected: Vec<(Value, Value)> = line.iter().map(|(one, other)| ((*one).into(), (*other).into())).collect();
    assert_eq!(of_first.iter().map(charged).collect::<Vec<_>>(), expected, "{name}");
    assert_eq!(lines.len(), 2 + of_first.len(), "{name}");
    assert_eq!(field.upstream.calls(), lines.len(), "{name}: nobody else called the upstream");
    assert_eq!(field.balance_nano(), BALANCE - charged_before - 1820 * TOKEN_NANO, "{name}");
    field.assert_audit();
}

#[test]
fn a_node_that_is_stopped_at_a_grant_past_its_forfeit_takes_no_hold_on_it() {
    stopped_past_its_forfeit("grant.asked", 503, None, 0);
    stopped_past_its_forfeit("grant.answered", 503, None, 0);
}

#[test]
fn a_node_that_is_stopped_at_a_shipment_past_its_forfeit_charges_nobody_twice() {
    stopped_past_its_forfeit("ship.read", 200, Some(("0.00", "0.0001")), 0);
    stopped_past_its_forfeit("ship.committed", 200, Some(("0.0001", "0.00")), 100 * TOKEN_NANO);
}

#[test]
fn every_failpoint_is_walked_to() {
    for name in failpoint::ALL {
        assert!(WALK.iter().any(|(walked, ..)| *walked == name), "{name}");
    }
}
