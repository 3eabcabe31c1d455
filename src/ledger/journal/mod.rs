//! The journal: what must survive this process, written before it is acted on.
//!
//! A record is in the kernel when [`Journal::open`], [`Journal::mark`] or [`Journal::end`] returns, so it survives
//! `kill -9`; a thread brings it to the disk within [`SYNC_EVERY`]. Segments are allocated ahead: every open call has
//! room for the records that it still has to write, so that a full disk refuses new calls and loses none.
//!
//! A segment stays for [`KEPT`] after all its lines are stored, should the database be set back; then the few calls that
//! are still open are copied out of it, and it goes.

mod record;
mod replay;

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use slab::Slab;
use tokio::sync::Notify;

pub use record::Mark;
use record::{End, Kind, RECORD_BYTES_MAX, decode, encode, read_back};
pub use replay::{Dead, dead_boots};

use crate::failpoint;
use crate::store::{BootId, Line, hex};

/// A MARK with every number at its longest.
const MARK_BYTES_MAX: u64 = 96;
/// Room that an open call keeps: its END, and the MARKs of its first content and of its end.
const ROOM_BYTES: u64 = RECORD_BYTES_MAX as u64 + 2 * MARK_BYTES_MAX;
/// Large enough to make a new file rare, small enough for a small machine's disk.
const SEGMENT_BYTES: u64 = 16 << 20;
/// The design's bound is 50 ms from write to disk; most of it is left to the disk.
const SYNC_EVERY: Duration = Duration::from_millis(20);
/// Segments whose lines are stored are looked through this often.
const TIDY_EVERY: Duration = Duration::from_secs(1);
/// A segment whose lines are stored stays this long, unless the journal has used half of what it may.
const KEPT: Duration = Duration::from_secs(3600);
/// Calls that are copied out of an old segment at a time, so that workers do not wait long: a millisecond's work.
const MOVED_AT_ONCE: usize = 128;
/// Lines that wait for their shipment in memory, too, so that it need not read the journal: two megabytes at most.
const FRESH_LINES_MAX: usize = if cfg!(test) { 1 } else { 4096 };
/// Wakes the shipper before its second is over.
const SHIP_AT_LINES: usize = 1000;

/// Why a new call cannot be written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalFull;

/// The journal of one boot.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    bytes_max: u64,
    writer: Mutex<Writer>,
    /// Set while something written is not known to be on disk.
    dirty: AtomicBool,
    wake_sync: Condvar,
    /// Wakes the shipper early.
    pub lines_wait: Notify,
    /// An I/O error: no new call until restart.
    failed: AtomicBool,
    /// A line did not read back: only a replay can tell what became of its call.
    damaged: AtomicBool,
    stopped: AtomicBool,
    /// Held for the life of the boot, so that nobody else replays this folder.
    _lock: File,
}

#[derive(Debug)]
struct Writer {
    segments: VecDeque<Segment>,
    /// Index in `segments` of the one that is written to; those behind it are allocated ahead.
    at: usize,
    next_number: u64,
    /// Room promised to open calls.
    reserved: u64,
    /// END records so far; the watermark counts in these.
    ended: u64,
    /// Up to which of them the store has lines.
    shipped: u64,
    unshipped: VecDeque<Unshipped>,
    calls: Slab<OpenCall>,
    unsynced: Vec<Arc<File>>,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: Arc<File>,
    number: u64,
    written: u64,
    /// Calls whose OPEN lies here and that have not ended.
    open: usize,
    /// The number of the last END in here.
    last_end: u64,
    /// When a later transaction had seen that all of its lines are stored.
    passed: Option<Instant>,
    /// Bytes that are known to be on disk.
    #[cfg(test)]
    synced: u64,
}

/// Where a record lies.
#[derive(Clone, Debug)]
struct At {
    file: Arc<File>,
    offset: u64,
    length: usize,
}

/// What a replay would need of an open call.
#[derive(Debug)]
struct OpenCall {
    /// The number of the segment with its OPEN.
    segment: u64,
    open: At,
    mark: Option<At>,
}

#[derive(Debug)]
struct Unshipped {
    ordinal: u64,
    line: Kept,
}

#[derive(Clone, Debug)]
enum Kept {
    At(At),
    /// Written, and not yet read back: the first shipment takes it as it is.
    Fresh(At, Box<Line>),
    /// Could not be written: kept here, shipped from here.
    Held(Box<Line>),
}

/// Lines to ship, with the watermark before and behind them.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch {
    pub from: u64,
    pub to: u64,
    pub lines: Vec<Line>,
}

/// An open call's place in the journal, and the room for its END.
#[derive(Debug)]
pub struct Place {
    slot: usize,
    /// What is left of the call's [`ROOM_BYTES`].
    room: u64,
}

impl Journal {
    /// Makes the folder of a boot under `root`, takes its lock and allocates the first segment.
    pub fn create(root: &Path, boot: BootId, bytes_max: u64) -> io::Result<Arc<Journal>> {
        let folder = root.join(hex(&boot));
        fs::create_dir_all(&folder)?;
        let lock = replay::lock_folder(&folder)?.ok_or_else(|| io::Error::other("the journal folder is in use"))?;
        let mut writer = Writer {
            segments: VecDeque::new(),
            at: 0,
            next_number: 0,
            reserved: 0,
            ended: 0,
            shipped: 0,
            unshipped: VecDeque::new(),
            calls: Slab::new(),
            unsynced: Vec::new(),
        };
        writer.allocate(&folder)?;
        let journal = Arc::new(Journal {
            folder,
            bytes_max: bytes_max / failpoint::shrink(),
            writer: Mutex::new(writer),
            dirty: AtomicBool::new(false),
            wake_sync: Condvar::new(),
            lines_wait: Notify::new(),
            failed: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            _lock: lock,
        });
        let syncer = journal.clone();
        std::thread::Builder::new().name("journal".into()).spawn(move || syncer.keep_until_stopped())?;
        Ok(journal)
    }

    /// Writes OPEN and keeps room for the call's other records.
    pub fn open(&self, open: &Line) -> Result<Place, JournalFull> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(JournalFull);
        }
        let record = encode(Kind::Open, open.sequence, open);
        failpoint::at("open.due");
        let mut writer = self.lock();
        if self.stopped.load(Ordering::Acquire) {
            return Err(JournalFull);
        }
        let need = record.len() as u64 + ROOM_BYTES;
        if !self.make_free(&mut writer, need) {
            return Err(JournalFull);
        }
        match writer.append(&record) {
            Ok(open) => {
                writer.reserved += ROOM_BYTES;
                let segment = writer.current();
                segment.open += 1;
                let segment = segment.number;
                let slot = writer.calls.insert(OpenCall { segment, open, mark: None });
                self.written(writer);
                failpoint::at("open.written");
                Ok(Place { slot, room: ROOM_BYTES })
            }
            Err(error) => {
                self.fail(&error);
                Err(JournalFull)
            }
        }
    }

    /// Writes MARK, in room of its own or, when there is none, in what was kept for it; false when neither is left or the
    /// disk fails: then nothing may be released on it.
    pub fn mark(&self, place: &mut Place, sequence: u64, mark: &Mark) -> bool {
        self.write_mark(place, sequence, mark, true)
    }

    /// Writes MARK, only where there is room beside what was kept.
    pub fn mark_if_room(&self, place: &mut Place, sequence: u64, mark: &Mark) -> bool {
        self.write_mark(place, sequence, mark, false)
    }

    fn write_mark(&self, place: &mut Place, sequence: u64, mark: &Mark, may_use_kept: bool) -> bool {
        let record = encode(Kind::Mark, sequence, mark);
        let bytes = record.len() as u64;
        failpoint::at("mark.due");
        let mut writer = self.lock();
        if !self.make_free(&mut writer, bytes) {
            if !may_use_kept || place.room < RECORD_BYTES_MAX as u64 + bytes {
                return false;
            }
            place.room -= bytes;
            writer.reserved -= bytes;
        }
        match writer.append(&record) {
            Ok(at) => {
                writer.calls[place.slot].mark = Some(at);
                self.written(writer);
                failpoint::at("mark.written");
                true
            }
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Writes END and hands the line to the shipper. Never refused: the room was kept, and a line that the disk does
    /// not take is kept in memory.
    ///
    /// Returns which END it is since the boot began: the watermark counts in these.
    pub fn end(&self, place: Place, line: Line) -> u64 {
        failpoint::at("end.due");
        let mut writer = self.lock();
        writer.reserved -= place.room;
        writer.ended += 1;
        let ordinal = writer.ended;
        let end = End { ordinal, line };
        let record = encode(Kind::End, end.line.sequence, &end);
        let line = match writer.append(&record) {
            Ok(at) if writer.unshipped.len() + 1 < FRESH_LINES_MAX => Kept::Fresh(at, Box::new(end.line)),
            Ok(at) => Kept::At(at),
            Err(error) => {
                self.fail(&error);
                Kept::Held(Box::new(end.line))
            }
        };
        writer.unshipped.push_back(Unshipped { ordinal, line });
        writer.current().last_end = ordinal;
        let call = writer.calls.remove(place.slot);
        if let Some(opened_in) = writer.segment(call.segment) {
            opened_in.open -= 1;
        }
        if writer.unshipped.len() >= SHIP_AT_LINES {
            self.lines_wait.notify_one();
        }
        self.written(writer);
        failpoint::at("end.written");
        ordinal
    }

    /// The next lines to ship, read back from the journal where they are not in memory. A line that does not read is left
    /// to the next replay.
    ///
    /// They stay queued until [`Journal::shipped`] says that they are stored.
    pub fn unshipped(&self, lines_max: usize) -> Batch {
        let (from, mut to, items) = {
            let mut writer = self.lock();
            let shipped = writer.shipped;
            // Another shipment of the same reads it back.
            let items = writer.unshipped.iter_mut().take(lines_max).map(|Unshipped { ordinal, line }| {
                let read_next = if let Kept::Fresh(at, _) = line { Kept::At(at.clone()) } else { line.clone() };
                (*ordinal, std::mem::replace(line, read_next))
            });
            (shipped, shipped, items.collect::<Vec<_>>())
        };
        let mut lines = Vec::with_capacity(items.len());
        for (ordinal, item) in items {
            to = ordinal;
            match item {
                Kept::Held(line) | Kept::Fresh(_, line) => lines.push(*line),
                Kept::At(at) => match read_back(&at.file, at.offset, at.length) {
                    Ok(line) => lines.push(line),
                    Err(error) => {
                        tracing::error!(%error, ordinal, offset = at.offset, "journal: a line does not read back");
                        self.damage(&error);
                    }
                },
            }
        }
        Batch { from, to, lines }
    }

    /// Forgets lines up to the watermark `to`, which a transaction has set in place of `from`.
    pub fn shipped(&self, from: u64, to: u64) {
        let mut writer = self.lock();
        while writer.unshipped.front().is_some_and(|item| item.ordinal <= to) {
            writer.unshipped.pop_front();
        }
        writer.shipped = writer.shipped.max(to);
        writer.confirm(from);
    }

    /// The watermark as this node knows it.
    pub fn watermark(&self) -> u64 {
        self.lock().shipped
    }

    /// A transaction of its own has read this watermark: what lies before it is stored for good.
    pub fn confirmed(&self, watermark: u64) {
        self.lock().confirm(watermark);
    }

    /// The store's watermark went back, since its database did: lines behind it are shipped again, as far as they are
    /// still here. Reads files; nobody else may ship meanwhile.
    pub fn rewind(&self, watermark: u64) {
        let (files, first) = {
            let mut writer = self.lock();
            writer.segments.iter_mut().for_each(|segment| segment.passed = None);
            let files: Vec<_> = writer.segments.iter().map(|segment| segment.file.clone()).collect();
            (files, writer.unshipped.front().map_or(writer.ended + 1, |item| item.ordinal))
        };
        let mut again = Vec::new();
        for file in files {
            let mut bytes = vec![0; segment_bytes() as usize];
            if let Err(error) = file.read_exact_at(&mut bytes, 0) {
                tracing::error!(%error, "journal: a segment does not read; its lines are left to the next start");
                self.damage(&error);
                continue;
            }
            replay::scan(&bytes, |found| {
                if let Ok(found) = found
                    && found.kind == Kind::End as u8
                    && let Ok(End { ordinal, .. }) = postcard::from_bytes(found.payload)
                    && (watermark + 1..first).contains(&ordinal)
                {
                    let at = At { file: file.clone(), offset: found.offset, length: found.length };
                    again.push(Unshipped { ordinal, line: Kept::At(at) });
                }
            });
        }
        again.sort_by_key(|item| item.ordinal);
        let gone = (first - watermark - 1) as usize - again.len();
        tracing::error!(again = again.len(), gone, "the database has gone back: lines are sent again");
        let mut writer = self.lock();
        for item in again.into_iter().rev() {
            writer.unshipped.push_front(item);
        }
        writer.shipped = watermark;
    }

    /// Whether every line has been shipped.
    pub fn is_shipped(&self) -> bool {
        self.lock().unshipped.is_empty()
    }

    /// Whether so many lines wait that they are shipped before their second is over.
    pub fn has_many(&self) -> bool {
        self.lock().unshipped.len() >= SHIP_AT_LINES
    }

    /// Whether new calls can be written down.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Whether a line did not read back, so that a replay has to settle its call.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Lets a line that waits lie where nothing reads: what a disk that fails gives.
    #[cfg(test)]
    pub fn misplace(&self, index: usize) {
        match &mut self.lock().unshipped[index].line {
            Kept::At(at) => at.offset = 1 << 40,
            Kept::Fresh(..) | Kept::Held(_) => panic!("it was written, and nothing stays in memory"),
        }
    }

    /// Ends as a process ends that is killed: the lock goes, everything else stays as it is.
    #[cfg(test)]
    pub fn abandon(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake_sync.notify_all();
        rustix::fs::flock(&self._lock, rustix::fs::FlockOperation::Unlock).expect("it is locked");
    }

    /// Stops the thread; with `remove` the folder goes too, which only a shipped journal may.
    pub fn close(&self, remove: bool) {
        let writer = self.lock();
        self.stopped.store(true, Ordering::Release);
        self.wake_sync.notify_all();
        drop(writer);
        if remove && let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, "journal: cannot remove the folder of a closed boot");
        }
    }

    /// Sees to it that so many bytes are free beside what is reserved, with a further segment where the bound allows it.
    fn make_free(&self, writer: &mut Writer, bytes: u64) -> bool {
        self.make_free_within(writer, bytes, self.bytes_max)
    }

    fn make_free_within(&self, writer: &mut Writer, bytes: u64, bytes_max: u64) -> bool {
        while writer.free() < writer.reserved + bytes {
            // What a replay has to settle may lie in any of them.
            let may_give_up = !self.is_damaged();
            let is_over = (writer.segments.len() as u64 + 1) * segment_bytes() > bytes_max;
            if is_over && !(may_give_up && writer.give_up_first()) {
                return false;
            }
            if let Err(error) = writer.allocate(&self.folder) {
                tracing::error!(%error, "journal: cannot allocate a segment");
                return false;
            }
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().expect("no holder of this lock panics")
    }

    fn fail(&self, error: &io::Error) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            tracing::error!(%error, "journal: it cannot be relied on; no new calls until restart");
        }
    }

    /// A line does not read: it is passed over, and a replay has to look for it behind the watermark, too.
    fn damage(&self, error: &io::Error) {
        self.fail(error);
        if !self.damaged.swap(true, Ordering::Relaxed)
            && let Err(error) = replay::mark_damaged(&self.folder)
        {
            tracing::error!(%error, "journal: that a line was passed over cannot be written down");
        }
    }

    /// Wakes the syncing thread when it sleeps.
    fn written(&self, writer: MutexGuard<'_, Writer>) {
        // Within the lock, under which the thread looks before it sleeps: no wake-up is missed.
        let was_clean = !self.dirty.swap(true, Ordering::Release);
        drop(writer);
        if was_clean {
            self.wake_sync.notify_one();
        }
    }

    fn keep_until_stopped(&self) {
        let mut tidied = Instant::now();
        while !self.stopped.load(Ordering::Acquire) {
            let is_idle = |_: &mut Writer| !self.dirty.load(Ordering::Acquire) && !self.stopped.load(Ordering::Acquire);
            let waited = self.wake_sync.wait_timeout_while(self.lock(), TIDY_EVERY, is_idle);
            drop(waited.expect("no holder of this lock panics"));
            if self.dirty.load(Ordering::Acquire) {
                std::thread::sleep(SYNC_EVERY); // gathers what else comes
                self.sync();
            }
            if tidied.elapsed() >= TIDY_EVERY {
                self.tidy(KEPT);
                tidied = Instant::now();
            }
        }
        self.sync();
    }

    fn sync(&self) {
        failpoint::at("sync.due");
        self.dirty.store(false, Ordering::Release);
        let files = {
            let mut writer = self.lock();
            let mut files = std::mem::take(&mut writer.unsynced);
            files.push(writer.current().file.clone());
            files
        };
        #[cfg(test)]
        let written: Vec<(u64, u64)> = self.lock().segments.iter().map(|s| (s.number, s.written)).collect();
        for file in files {
            if let Err(error) = file.sync_data() {
                self.fail(&error);
            }
        }
        failpoint::at("sync.done");
        #[cfg(test)]
        for (number, written) in written {
            self.lock().segment(number).into_iter().for_each(|segment| segment.synced = written);
        }
    }

    /// Gives up segments whose lines have been stored for as long as `kept`, or sooner when half of the room is used, after
    /// copying the calls that are open in them. In order only: a later segment may hold the last MARK of a call that an
    /// earlier one opened.
    fn tidy(&self, kept: Duration) {
        loop {
            // What a replay has to settle may lie in any of them.
            if self.is_damaged() {
                return;
            }
            let mut writer = self.lock();
            let crowded = writer.segments.len() as u64 * segment_bytes() > self.bytes_max / 2;
            let due = writer.first_passed().is_some_and(|passed| crowded || passed.elapsed() >= kept);
            if !due {
                return;
            }
            if writer.give_up_first() {
                continue;
            }
            let first = writer.segments[0].number;
            let passed = writer.segments[0].passed.take(); // nobody gives it up meanwhile
            drop(writer);
            let moved = self.move_calls(first);
            self.sync(); // what was copied is on disk before the first copy goes
            if let Some(segment) = self.lock().segment(first) {
                segment.passed = passed;
            }
            if !moved {
                return;
            }
        }
    }

    /// Copies what a replay needs of the calls that a segment opened to the end of the journal; false: it cannot.
    fn move_calls(&self, segment: u64) -> bool {
        loop {
            let mut writer = self.lock();
            let opened_here = writer.calls.iter().filter(|(_, call)| call.segment == segment).map(|(slot, _)| slot);
            let slots: Vec<usize> = opened_here.take(MOVED_AT_ONCE).collect();
            if slots.is_empty() {
                return true;
            }
            for slot in slots {
                let OpenCall { open, mark, .. } = &writer.calls[slot];
                let copies = (read_record(open), mark.as_ref().map(read_record).transpose());
                let (Ok(open), Ok(mark)) = copies else {
                    tracing::error!(segment, "journal: an open call does not read back; its segment stays");
                    return false;
                };
                let bytes = open.len() + mark.as_ref().map_or(0, Vec::len);
                // One segment beyond the bound, which gives up at least one.
                if !self.make_free_within(&mut writer, bytes as u64, self.bytes_max + segment_bytes()) {
                    return false;
                }
                let copied = writer.append(&open).and_then(|open| {
                    let number = writer.current().number;
                    Ok((number, open, mark.map(|mark| writer.append(&mark)).transpose()?))
                });
                match copied {
                    Ok((number, open, mark)) => {
                        writer.calls[slot] = OpenCall { segment: number, open, mark };
                        for (number, change) in [(segment, -1), (number, 1)] {
                            let counted = writer.segment(number).expect("segments with open calls stay");
                            counted.open = counted.open.wrapping_add_signed(change);
                        }
                    }
                    Err(error) => {
                        self.fail(&error);
                        return false;
                    }
                }
            }
        }
    }
}

/// The size of a segment; smaller where a drill is about many of them.
fn segment_bytes() -> u64 {
    SEGMENT_BYTES / failpoint::shrink()
}

/// A record never straddles segments: a segment counts as full when the longest might not fit.
fn segment_usable() -> u64 {
    segment_bytes() - RECORD_BYTES_MAX as u64
}

impl Writer {
    fn current(&mut self) -> &mut Segment {
        &mut self.segments[self.at]
    }

    fn segment(&mut self, number: u64) -> Option<&mut Segment> {
        self.segments.iter_mut().find(|segment| segment.number == number)
    }

    /// Bytes that can still be written without a new segment.
    fn free(&self) -> u64 {
        let ahead = (self.segments.len() - self.at - 1) as u64;
        segment_usable().saturating_sub(self.segments[self.at].written) + ahead * segment_usable()
    }

    fn allocate(&mut self, folder: &Path) -> io::Result<()> {
        let path = folder.join(format!("{:08}.journal", self.next_number));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        if let Err(error) = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, segment_bytes()) {
            let _ = fs::remove_file(&path);
            return Err(error.into());
        }
        self.segments.push_back(Segment {
            path,
            file: Arc::new(file),
            number: self.next_number,
            written: 0,
            open: 0,
            last_end: self.ended,
            passed: None,
            #[cfg(test)]
            synced: 0,
        });
        self.next_number += 1;
        Ok(())
    }

    fn append(&mut self, record: &[u8]) -> io::Result<At> {
        if self.segments[self.at].written > segment_usable() && self.at + 1 < self.segments.len() {
            let full = self.segments[self.at].file.clone();
            self.unsynced.push(full);
            self.at += 1;
            self.current().last_end = self.ended;
        }
        let segment = self.current();
        if segment.written + record.len() as u64 > segment_bytes() {
            return Err(io::Error::other("the journal has no segment left"));
        }
        let offset = segment.written;
        segment.file.write_all_at(record, offset)?;
        segment.written += record.len() as u64;
        Ok(At { file: segment.file.clone(), offset, length: record.len() })
    }

    fn confirm(&mut self, watermark: u64) {
        let now = Instant::now();
        for segment in self.segments.iter_mut().take(self.at).filter(|segment| segment.last_end <= watermark) {
            segment.passed.get_or_insert(now);
        }
    }

    /// Since when nobody needs the lines of the first segment.
    fn first_passed(&self) -> Option<Instant> {
        self.segments[0].passed.filter(|_| self.at > 0)
    }

    /// Removes the first segment if nothing needs it any more.
    fn give_up_first(&mut self) -> bool {
        if self.first_passed().is_none() || self.segments[0].open > 0 {
            return false;
        }
        failpoint::at("segment.due");
        if let Err(error) = fs::remove_file(&self.segments[0].path) {
            tracing::warn!(%error, "journal: cannot remove a segment");
        }
        failpoint::at("segment.removed");
        self.segments.pop_front();
        self.at -= 1;
        true
    }
}

/// The bytes of a record, if they still are one.
fn read_record(at: &At) -> io::Result<Vec<u8>> {
    let mut record = vec![0; at.length];
    at.file.read_exact_at(&mut record, at.offset)?;
    decode(&record, at.offset).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(record)
}

#[cfg(test)]
mod tests;
