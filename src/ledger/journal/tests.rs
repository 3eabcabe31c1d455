//! Order, marks, damage, a full disk.

use super::record::{HEAD_BYTES, MAGIC};
use super::replay::Left;
use super::*;
use crate::store::{Billed, EndReason};

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
        usage_audio_input: None,
        usage_image_input: None,
        usage_audio_output: None,
        usage_image_output: None,
        units: 1,
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

fn open(journal: &Journal, sequence: u64) -> Result<Place, JournalFull> {
    journal.open(&line(sequence))
}

/// A journal whose process is gone, as the next one finds it.
fn dead(root: &Path, write: impl FnOnce(&Journal)) -> Dead {
    let journal = Journal::create(root, [7; 16], 1 << 30).unwrap();
    write(&journal);
    Dead::unlocked([7; 16], journal.folder.clone())
}

/// Opens and ends a call, or more of them until a further segment is written to.
fn roll(journal: &Journal, sequences: &mut impl Iterator<Item = u64>) -> u64 {
    let number = journal.lock().current().number;
    let mut count = 0;
    while journal.lock().current().number == number {
        let sequence = sequences.next().unwrap();
        journal.end(open(journal, sequence).unwrap(), line(sequence));
        count += 1;
    }
    count
}

fn ship_all(journal: &Journal) {
    while let Batch { from, to, lines } = journal.unshipped(10_000)
        && !lines.is_empty()
    {
        journal.shipped(from, to);
    }
    journal.confirmed(journal.watermark());
}

#[test]
fn a_stream_that_stays_open_does_not_keep_the_journal_and_is_settled_by_its_last_mark_all_the_same() {
    let root = tempfile::tempdir().unwrap();
    let dead = dead(root.path(), |journal| {
        let mut sequences = 10..;
        let mut long = open(journal, 1).unwrap();
        let silent = open(journal, 2).unwrap();
        let short = open(journal, 3).unwrap();
        journal.mark(&mut long, 1, &Mark { input: 3, output: 5, hold_nano: 100, account_id: Some(4) });
        roll(journal, &mut sequences);
        journal.mark(&mut long, 1, &Mark { input: 3, output: 70, hold_nano: 100, account_id: Some(4) });
        ship_all(journal);
        journal.tidy(KEPT);
        assert_eq!(journal.lock().segments.len(), 2, "an hour has not passed");
        journal.tidy(Duration::ZERO);
        assert_eq!(journal.lock().segments[0].number, 1, "the first segment has gone");
        assert_eq!(journal.lock().segments[0].open, 3);
        journal.end(short, line(3));
        roll(journal, &mut sequences);
        journal.mark(&mut long, 1, &Mark { input: 3, output: 80, hold_nano: 100, account_id: Some(4) });
        ship_all(journal);
        journal.tidy(Duration::ZERO);
        assert_eq!(journal.lock().segments.len(), 1);
        journal.end(silent, line(2));
    });
    let left = read(&dead);
    assert_eq!(left.crashed.iter().map(|line| (line.sequence, line.output)).collect::<Vec<_>>(), [(1, 80)]);
    assert!(left.ended.iter().any(|(_, line)| line.sequence == 2));
    assert!(left.corrupt.is_empty());
}

#[test]
fn a_copied_open_call_that_a_replay_meets_twice_keeps_its_last_mark() {
    let root = tempfile::tempdir().unwrap();
    let dead = dead(root.path(), |journal| {
        let mut place = open(journal, 1).unwrap();
        journal.mark(&mut place, 1, &Mark { input: 3, output: 5, hold_nano: 100, account_id: None });
        assert!(journal.move_calls(0), "within one segment: both copies stay");
    });
    assert_eq!(read(&dead).crashed[0].output, 5);
}

#[test]
fn a_crowded_journal_keeps_no_segment_for_an_hour() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 4 * SEGMENT_BYTES).unwrap();
    let mut sequences = 1..;
    for _ in 0..6 {
        roll(&journal, &mut sequences);
        ship_all(&journal);
        journal.tidy(KEPT);
        assert!(journal.lock().segments.len() <= 3);
    }
}

#[test]
fn lines_are_sent_again_when_the_database_has_gone_back() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    let mut sequences = 1..;
    let count = roll(&journal, &mut sequences);
    ship_all(&journal);
    let late = sequences.next().unwrap();
    journal.end(open(&journal, late).unwrap(), line(late));
    journal.rewind(count - 2);
    let batch = journal.unshipped(9);
    assert_eq!(batch, Batch { from: count - 2, to: late, lines: vec![line(count - 1), line(count), line(late)] });
    journal.confirmed(count - 2);
    assert!(journal.lock().segments[0].passed.is_none(), "what is sent again is not given up");
}

#[test]
fn a_line_that_does_not_read_back_is_left_to_the_replay_and_the_others_are_shipped() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    for sequence in 1..=3 {
        journal.end(open(&journal, sequence).unwrap(), line(sequence));
    }
    let at = match &journal.lock().unshipped[1].line {
        Kept::At(at) => at.clone(),
        Kept::Fresh(..) | Kept::Held(_) => panic!("it was written, and nothing stays in memory"),
    };
    at.file.write_all_at(b"damage", at.offset + 20).unwrap();
    assert_eq!(journal.unshipped(9), Batch { from: 0, to: 3, lines: vec![line(1), line(3)] });
    assert!(journal.is_damaged() && journal.is_failed());
    let dead = Dead::unlocked([7; 16], journal.folder.clone());
    assert_eq!(read(&dead).crashed.iter().map(|line| line.sequence).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_line_that_the_disk_does_not_give_stops_no_other_and_nothing_is_given_up_any_more() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(root.path(), [7; 16], 1 << 30).unwrap();
    let mut sequences = 1..;
    let count = roll(&journal, &mut sequences);
    ship_all(&journal);
    let late = sequences.next().unwrap();
    journal.end(open(&journal, late).unwrap(), line(late));
    journal.misplace(0);
    let next = sequences.next().unwrap();
    let place = open(&journal, next);
    assert_eq!(journal.unshipped(9), Batch { from: count, to: late, lines: vec![] });
    assert!(journal.is_damaged() && journal.is_failed());
    journal.end(place.unwrap(), line(next));
    assert_eq!(journal.unshipped(9), Batch { from: count, to: next, lines: vec![line(next)] });
    let segments = journal.lock().segments.len();
    journal.confirmed(next);
    journal.tidy(Duration::ZERO);
    assert_eq!(journal.lock().segments.len(), segments);
}

#[test]
fn lost_syncs_cost_what_was_written_since_the_last_one_and_nothing_before_it() {
    use std::collections::BTreeSet;
    for seed in 0..40u64 {
        let root = tempfile::tempdir().unwrap();
        let mut durable = BTreeSet::new();
        let mut written = BTreeSet::new();
        let mut synced = 0;
        let dead = dead(root.path(), |journal| {
            // The thread ends: here it is synced by hand.
            journal.stopped.store(true, Ordering::Release);
            std::thread::sleep(3 * SYNC_EVERY);
            journal.stopped.store(false, Ordering::Release);
            for sequence in 1..=60 {
                let mut place = open(journal, sequence).unwrap();
                journal.mark(&mut place, sequence, &Mark { output: sequence, hold_nano: 100, ..Mark::default() });
                journal.end(place, line(sequence));
                written.insert(sequence);
                if (sequence * 7 + seed) % 11 == 0 {
                    journal.sync();
                    durable = written.clone();
                    synced = journal.lock().segments[0].synced;
                }
            }
        });
        // Power goes: of what was not synced any 64 bytes may be there or not.
        let path = dead.folder.join("00000000.journal");
        let mut bytes = fs::read(&path).unwrap();
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for at in (synced as usize..bytes.len().min(60 * 2048)).step_by(64) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if random % 3 == 0 {
                let end = (at + 64).min(bytes.len());
                bytes[at..end].fill(0);
            }
        }
        fs::write(&path, &bytes).unwrap();
        let left = read(&dead);
        let found: BTreeSet<u64> = left.ended.iter().map(|(_, line)| line.sequence).collect();
        assert!(found.is_superset(&durable), "seed {seed}: {durable:?} {found:?}");
        assert!(found.is_subset(&written));
        for (ordinal, found) in &left.ended {
            assert_eq!((*ordinal, found), (found.sequence, &line(found.sequence)));
        }
        assert!(left.crashed.iter().all(|line| !found.contains(&line.sequence)), "no call ends twice");
    }
}

fn read(dead: &Dead) -> Left {
    dead.read(|open, mark| Line::crashed(open, mark, |line| line.output as i64)).unwrap()
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
        let batch = journal.unshipped(2);
        assert_eq!(batch, Batch { from: 0, to: 2, lines: vec![line(2), line(1)] });
    }
    journal.shipped(0, 2);
    assert_eq!(journal.unshipped(9), Batch { from: 2, to: 3, lines: vec![line(3)] });
    journal.shipped(2, 3);
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
    while let Batch { from, to, lines } = journal.unshipped(1000)
        && !lines.is_empty()
    {
        shipped += lines.len();
        journal.shipped(from, to);
    }
    assert_eq!(shipped, count);
    // What was shipped makes room again, once a later transaction has seen it.
    journal.confirmed(shipped as u64);
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
    assert_eq!(journal.unshipped(9), Batch { from: 0, to: 1, lines: vec![line(1)] });
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

#[test]
fn a_journal_of_another_version_is_left_alone_and_said_so() {
    let folder = tempfile::tempdir().unwrap();
    let dead = dead(folder.path(), |journal| drop(open(journal, 1)));
    let segments = std::fs::read_dir(&dead.folder).unwrap().map(|entry| entry.unwrap().path());
    let segment = segments.into_iter().find(|path| path.extension().is_some()).unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[3] = b'1';
    let length = HEAD_BYTES + u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c(&bytes[..length]).to_le_bytes();
    bytes[length..length + 4].copy_from_slice(&crc);
    std::fs::write(&segment, bytes).unwrap();
    let error = dead.read(|open, mark| Line::crashed(open, mark, |_| 0)).unwrap_err();
    assert!(error.to_string().contains("another version"), "{error}");
    assert!(segment.exists());
}
