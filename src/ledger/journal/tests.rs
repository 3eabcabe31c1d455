//! Order, marks, damage, a full disk.

use super::*;

fn line(sequence: u64) -> Line {
    Line {
        sequence,
        request_id: format!("r{sequence}"),
        client_request_id: None,
        user_id: 1,
        key_id: 1,
        ratio_micro: 1_000_000,
        account_id: None,
        endpoint: None,
        model_asked: "m".into(),
        model: "m".into(),
        model_upstream: None,
        price_version: 1,
        tier: 0,
        input: 0,
        cached_input: 0,
        output: 0,
        usage_input: None,
        usage_cached: None,
        usage_output: None,
        usage_reasoning: None,
        counted_input: None,
        counted_output: None,
        billed: Billed::Nothing,
        calibration_micro: 1_000_000,
        estimated: false,
        flagged: false,
        hold_nano: 100,
        charged_nano: 0,
        absorbed_nano: 0,
        started_ms: 0,
        content_after_ms: None,
        duration_ms: 0,
        end_reason: EndReason::Complete,
        status: 200,
        tries: 1,
    }
}

const FREE: PriceRow = PriceRow { input_nano: 0, cached_input_nano: 0, output_nano: 0, per_call_nano: 0 };

fn open(journal: &Journal, sequence: u64) -> Result<Place, JournalFull> {
    journal.open(&Open { line: line(sequence), price: FREE })
}

/// A journal whose process is gone, as the next one finds it.
fn dead(root: &Path, write: impl FnOnce(&Journal)) -> Dead {
    let journal = Journal::create(root, [7; 16], 1 << 30).unwrap();
    write(&journal);
    let folder = journal.folder.clone();
    // The lock goes with the process; here the file stands in for it.
    Dead { boot: [7; 16], folder, _lock: File::open(root).unwrap() }
}

fn read(dead: &Dead) -> Left {
    dead.read(|open, mark| Line::crashed(open, mark, mark.map_or(0, |mark| mark.output as i64))).unwrap()
}

#[test]
fn lines_are_shipped_in_order_and_stay_until_they_are_stored() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    let places: Vec<Place> = (1..=3).map(|sequence| open(&journal, sequence).unwrap()).collect();
    for (place, sequence) in places.into_iter().zip([2, 1, 3]) {
        journal.end(place, line(sequence));
    }
    for _ in 0..2 {
        let (from, to, lines) = journal.unshipped(2).unwrap();
        assert_eq!((from, to, lines), (0, 2, vec![line(2), line(1)]));
    }
    journal.shipped(2);
    assert_eq!(journal.unshipped(9).unwrap(), (2, 3, vec![line(3)]));
    journal.shipped(3);
    assert!(journal.is_shipped());
}

#[test]
fn a_call_without_an_end_is_settled_by_its_last_mark() {
    let root = tempfile::tempdir().unwrap();
    let dead = dead(root.path(), |journal| {
        let ended = open(journal, 1).unwrap();
        let mut place = open(journal, 2).unwrap();
        open(journal, 3).unwrap();
        journal.mark(&mut place, 2, &Mark { input: 3, output: 5, hold_nano: 100, account_id: Some(4) });
        journal.mark(&mut place, 2, &Mark { input: 3, output: 9, hold_nano: 150, account_id: Some(4) });
        journal.end(ended, line(1));
    });
    let left = read(&dead);
    assert_eq!(left.ended, vec![(1, line(1))]);
    let [marked, silent] = &left.crashed[..] else { panic!("{:?}", left.crashed) };
    assert_eq!((marked.sequence, marked.output, marked.account_id), (2, 9, Some(4)));
    assert_eq!((marked.charged_nano, marked.absorbed_nano, marked.billed), (9, 141, Billed::Mark));
    assert_eq!((silent.charged_nano, silent.absorbed_nano, silent.billed), (0, 100, Billed::Nothing));
}

#[test]
fn a_torn_tail_is_cut_off_and_a_corrupt_middle_is_reported_and_skipped() {
    let root = tempfile::tempdir().unwrap();
    let dead = dead(root.path(), |journal| {
        for sequence in 1..=4 {
            let place = open(journal, sequence).unwrap();
            journal.end(place, line(sequence));
        }
    });
    let path = dead.folder.join("00000000.journal");
    let mut bytes = fs::read(&path).unwrap();
    let starts: Vec<usize> = memchr::memmem::find_iter(&bytes, &MAGIC.to_le_bytes()).collect();
    assert_eq!(starts.len(), 8);
    bytes[starts[3] + HEAD_BYTES + 2] ^= 1; // the END of call 2
    let torn = starts[7] + 20; // within the END of call 4
    bytes[torn..].fill(0);
    fs::write(&path, &bytes).unwrap();
    let left = read(&dead);
    assert_eq!(
        left.ended.iter().map(|(ordinal, line)| (*ordinal, line.sequence)).collect::<Vec<_>>(),
        [(1, 1), (3, 3)]
    );
    assert_eq!(left.corrupt, vec![(path, starts[3] as u64)]);
    assert_eq!(left.crashed.iter().map(|line| line.sequence).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn a_full_journal_refuses_new_calls_and_takes_every_end_of_those_that_are_open() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 2 * SEGMENT_BYTES).unwrap();
    let mut places = Vec::new();
    while let Ok(place) = open(&journal, places.len() as u64 + 1) {
        places.push(place);
    }
    assert!(places.len() > 5000, "{}", places.len());
    let count = places.len();
    let largest = Mark { input: u64::MAX, output: u64::MAX, hold_nano: i64::MIN, account_id: Some(i64::MIN) };
    assert!(encode(Kind::Mark, u64::MAX, &largest).len() as u64 <= MARK_BYTES_MAX);
    for (place, sequence) in places.iter_mut().zip(1..) {
        for _ in 0..2 {
            assert!(journal.mark(place, sequence, &largest), "two are never refused");
        }
    }
    assert!((0..100).any(|_| !journal.mark(&mut places[0], 1, &largest)), "further ones are, in the end");
    for (place, sequence) in places.into_iter().zip(1..) {
        journal.end(place, line(sequence));
    }
    assert!(!journal.is_failed());
    let mut shipped = 0;
    while let (_, to, lines) = journal.unshipped(1000).unwrap()
        && !lines.is_empty()
    {
        shipped += lines.len();
        journal.shipped(to);
    }
    assert_eq!(shipped, count);
    // What was shipped makes room again.
    assert!(open(&journal, 1).is_ok());
}

#[test]
fn marks_go_on_into_further_segments() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    let mut place = open(&journal, 1).unwrap();
    let largest = Mark { input: u64::MAX, output: u64::MAX, hold_nano: i64::MIN, account_id: Some(i64::MIN) };
    while journal.lock().segments.len() < 3 {
        assert!(journal.mark(&mut place, 1, &largest));
    }
}

#[test]
fn a_line_that_cannot_be_written_is_kept_and_shipped_from_memory() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    let place = open(&journal, 1).unwrap();
    let read_only = File::open(&journal.lock().segments[0].path).unwrap();
    journal.lock().segments[0].file = Arc::new(read_only);
    journal.end(place, line(1));
    assert!(journal.is_failed());
    assert!(open(&journal, 2).is_err());
    assert_eq!(journal.unshipped(9).unwrap(), (0, 1, vec![line(1)]));
}

#[test]
fn a_folder_whose_process_lives_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let _journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    assert!(dead_boots(root.path()).unwrap().is_empty());
}

#[test]
fn damaged_bytes_anywhere_never_panic_and_never_invent_a_line() {
    let root = tempfile::tempdir().unwrap();
    let dead = dead(root.path(), |journal| {
        for sequence in 1..=3 {
            let place = open(journal, sequence).unwrap();
            journal.end(place, line(sequence));
        }
    });
    let path = dead.folder.join("00000000.journal");
    let bytes = fs::read(&path).unwrap()[..2048].to_vec();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] = damaged[at].wrapping_add(1);
        fs::write(&path, &damaged).unwrap();
        for (_, found) in read(&dead).ended {
            assert_eq!(found, line(found.sequence));
        }
    }
}

#[tokio::test]
async fn what_a_dead_boot_left_charges_no_more_than_its_lease_has() {
    // With an END lost, its call is charged by its MARK although another call has spent what it gave back.
    let folder = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open(&folder.path().join("x.db")).unwrap();
    let user = store.add_user("ann".into(), "default".into(), 100, None).await.unwrap();
    store.begin_boot([7; 16]).await.unwrap();
    store.grant([7; 16], user.id, 50, 0).await.unwrap();
    let charging = |sequence, charged_nano| Line { user_id: user.id, charged_nano, ..line(sequence) };
    let lines = vec![charging(1, 40), charging(2, 30), charging(3, 5)];
    let bounded = crate::ledger::within_leases(&store, [7; 16], lines).await.unwrap();
    let seen: Vec<_> = bounded.iter().map(|line| (line.charged_nano, line.absorbed_nano, line.flagged)).collect();
    assert_eq!(seen, [(40, 0, false), (10, 20, true), (0, 5, true)]);
}

#[tokio::test]
async fn a_replay_that_was_cut_off_charges_the_rest_as_if_it_had_not_been() {
    let folder = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open(&folder.path().join("x.db")).unwrap();
    let key = Some(([1; 32], "hint".to_owned()));
    let user = store.add_user("ann".into(), "default".into(), 100, key).await.unwrap();
    let boot = [7; 16];
    store.begin_boot(boot).await.unwrap();
    store.grant(boot, user.id, 100, 0).await.unwrap();
    let price_version = store.price_version("m".into(), FREE).await.unwrap();
    let key_id = store.keys(None).await.unwrap()[0].id;
    let charging = |sequence| Line { user_id: user.id, key_id, price_version, charged_nano: 50, ..line(sequence) };
    store.ship(boot, 0, 1, vec![charging(1)]).await.unwrap();
    let rest = crate::ledger::within_leases(&store, boot, vec![charging(1), charging(2)]).await.unwrap();
    assert_eq!(rest.iter().map(|line| (line.sequence, line.charged_nano)).collect::<Vec<_>>(), [(2, 50)]);
}
