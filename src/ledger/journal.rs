//! The journal: what must survive this process, written before it is acted on.
//!
//! A record is in the kernel when [`Journal::open`], [`Journal::mark`] or [`Journal::end`] returns, so it survives
//! `kill -9`; a thread brings it to the disk within [`SYNC_EVERY`]. Segments are allocated ahead: every open call has
//! room for the records that it still has to write, so that a full disk refuses new calls and loses none.
//!
//! Record: magic, payload length, call's sequence, kind, payload (postcard), CRC-32C of all before it.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use rustix::fs::{FallocateFlags, FlockOperation};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::store::{Billed, BootId, EndReason, Line, PriceRow, hex};

/// "gcj" and the version of the record format.
const MAGIC: u32 = u32::from_le_bytes(*b"gcj1");
/// magic, length, sequence, kind
const HEAD_BYTES: usize = 4 + 4 + 8 + 1;
const CRC_BYTES: usize = 4;
/// No record is longer: its strings are bounded where they enter (ids 128 bytes, names 256).
const RECORD_BYTES_MAX: usize = 4096;
/// A MARK with every number at its longest.
const MARK_BYTES_MAX: u64 = 96;
/// Room that an open call keeps: its END, and the MARKs of its first content and of its end.
const ROOM_BYTES: u64 = RECORD_BYTES_MAX as u64 + 2 * MARK_BYTES_MAX;
/// Large enough to make a new file rare, small enough for a small machine's disk.
const SEGMENT_BYTES: u64 = 16 << 20;
/// A record never straddles segments: a segment counts as full when the longest might not fit.
const SEGMENT_USABLE: u64 = SEGMENT_BYTES - RECORD_BYTES_MAX as u64;
/// The design's bound is 50 ms from write to disk; most of it is left to the disk.
const SYNC_EVERY: Duration = Duration::from_millis(20);
/// Wakes the shipper before its second is over.
const SHIP_AT_LINES: usize = 500;

/// OPEN: everything that is needed to settle the call if nothing else is ever heard of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The line as far as it is known; charges, tokens and end are still empty.
    pub line: Line,
    pub price: PriceRow,
}

/// MARK: what a crash would have to charge from here on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub input: u64,
    pub output: u64,
    /// What is held for the call by now.
    pub hold_nano: i64,
    pub account_id: Option<i64>,
}

/// END: the whole line, and which END it is since the boot began: the watermark counts in these.
#[derive(Debug, Serialize, Deserialize)]
struct End {
    ordinal: u64,
    line: Line,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Open = 1,
    Mark = 2,
    End = 3,
}

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
    unshipped: VecDeque<Unshipped>,
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
    /// The number of the last END in here; the segment may go when that has been shipped.
    last_end: u64,
}

#[derive(Debug)]
enum Unshipped {
    At {
        file: Arc<File>,
        offset: u64,
        length: usize,
    },
    /// Could not be written: kept here, shipped from here.
    Held(Box<Line>),
}

/// An open call's place in the journal: the segment of its OPEN, and the room for its END.
#[derive(Debug)]
pub struct Place {
    segment: u64,
    /// What is left of the call's [`ROOM_BYTES`].
    room: u64,
}

impl Journal {
    /// Makes the folder of a boot under `root`, takes its lock and allocates the first segment.
    pub fn create(root: &Path, boot: BootId, bytes_max: u64) -> io::Result<Arc<Journal>> {
        let folder = root.join(hex(&boot));
        fs::create_dir_all(&folder)?;
        let lock = lock_folder(&folder)?.ok_or_else(|| io::Error::other("the journal folder is in use"))?;
        let mut writer = Writer {
            segments: VecDeque::new(),
            at: 0,
            next_number: 0,
            reserved: 0,
            ended: 0,
            unshipped: VecDeque::new(),
            unsynced: Vec::new(),
        };
        writer.allocate(&folder)?;
        let journal = Arc::new(Journal {
            folder,
            bytes_max,
            writer: Mutex::new(writer),
            dirty: AtomicBool::new(false),
            wake_sync: Condvar::new(),
            lines_wait: Notify::new(),
            failed: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            _lock: lock,
        });
        let syncer = journal.clone();
        std::thread::Builder::new().name("journal".into()).spawn(move || syncer.sync_until_stopped())?;
        Ok(journal)
    }

    /// Writes OPEN and keeps room for the call's other records.
    pub fn open(&self, open: &Open) -> Result<Place, JournalFull> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(JournalFull);
        }
        let record = encode(Kind::Open, open.line.sequence, open);
        let mut writer = self.lock();
        let need = record.len() as u64 + ROOM_BYTES;
        if !self.make_free(&mut writer, need) {
            return Err(JournalFull);
        }
        writer.reserved += ROOM_BYTES;
        match writer.append(&record) {
            Ok(_) => {
                let segment = writer.current();
                segment.open += 1;
                let place = Place { segment: segment.number, room: ROOM_BYTES };
                self.written(writer);
                Ok(place)
            }
            Err(error) => {
                writer.reserved -= ROOM_BYTES;
                self.fail(&error);
                Err(JournalFull)
            }
        }
    }

    /// Writes MARK, in room of its own or, when there is none, in what was kept for it; false when neither is left or the
    /// disk fails: then nothing may be released on it.
    pub fn mark(&self, place: &mut Place, sequence: u64, mark: &Mark) -> bool {
        let record = encode(Kind::Mark, sequence, mark);
        let bytes = record.len() as u64;
        let mut writer = self.lock();
        if !self.make_free(&mut writer, bytes) {
            if place.room < RECORD_BYTES_MAX as u64 + bytes {
                return false;
            }
            place.room -= bytes;
            writer.reserved -= bytes;
        }
        match writer.append(&record) {
            Ok(_) => {
                self.written(writer);
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
    pub fn end(&self, place: Place, line: Line) {
        let mut writer = self.lock();
        writer.reserved -= place.room;
        writer.ended += 1;
        let ended = writer.ended;
        let end = End { ordinal: ended, line };
        let record = encode(Kind::End, end.line.sequence, &end);
        match writer.append(&record) {
            Ok((file, offset)) => {
                writer.unshipped.push_back(Unshipped::At { file, offset, length: record.len() });
            }
            Err(error) => {
                self.fail(&error);
                writer.unshipped.push_back(Unshipped::Held(Box::new(end.line)));
            }
        }
        writer.current().last_end = ended;
        if let Some(opened_in) = writer.segments.iter_mut().find(|segment| segment.number == place.segment) {
            opened_in.open -= 1;
        }
        if writer.unshipped.len() >= SHIP_AT_LINES {
            self.lines_wait.notify_one();
        }
        self.written(writer);
    }

    /// The next lines to ship, read back from the journal, with the watermark before and behind them.
    ///
    /// They stay queued until [`Journal::shipped`] says that they are stored.
    pub fn unshipped(&self, lines_max: usize) -> io::Result<(u64, u64, Vec<Line>)> {
        let (from, items) = {
            let writer = self.lock();
            let from = writer.ended - writer.unshipped.len() as u64;
            let items: Vec<_> = writer
                .unshipped
                .iter()
                .take(lines_max)
                .map(|item| match item {
                    Unshipped::At { file, offset, length } => Ok((file.clone(), *offset, *length)),
                    Unshipped::Held(line) => Err(line.clone()),
                })
                .collect();
            (from, items)
        };
        let to = from + items.len() as u64;
        let lines = items.into_iter().map(|item| match item {
            Ok((file, offset, length)) => read_back(&file, offset, length),
            Err(line) => Ok(*line),
        });
        Ok((from, to, lines.collect::<io::Result<_>>()?))
    }

    /// Forgets lines up to the watermark, and segments that nothing needs any more.
    pub fn shipped(&self, watermark: u64) {
        let mut writer = self.lock();
        while writer.ended - (writer.unshipped.len() as u64) < watermark {
            writer.unshipped.pop_front();
        }
        // In order only: a later segment may hold the last MARK of a call that an earlier one opened.
        while writer.at > 0 {
            let first = &writer.segments[0];
            if first.open > 0 || first.last_end > watermark {
                break;
            }
            if let Err(error) = fs::remove_file(&first.path) {
                tracing::warn!(%error, "journal: cannot remove a segment");
            }
            writer.segments.pop_front();
            writer.at -= 1;
        }
    }

    /// Whether every line has been shipped.
    pub fn is_shipped(&self) -> bool {
        self.lock().unshipped.is_empty()
    }

    /// Whether new calls can be written down.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Stops the thread; with `remove` the folder goes too, which only a shipped journal may.
    pub fn close(&self, remove: bool) {
        self.stopped.store(true, Ordering::Release);
        let writer = self.lock();
        self.wake_sync.notify_all();
        drop(writer);
        if remove && let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, "journal: cannot remove the folder of a closed boot");
        }
    }

    /// Sees to it that so many bytes are free beside what is reserved, with a further segment where the bound allows it.
    fn make_free(&self, writer: &mut Writer, bytes: u64) -> bool {
        while writer.free() < writer.reserved + bytes {
            if (writer.segments.len() as u64 + 1) * SEGMENT_BYTES > self.bytes_max {
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
            tracing::error!(%error, "journal: write failed; no new calls until restart");
        }
    }

    /// Wakes the syncing thread when it sleeps.
    fn written(&self, writer: MutexGuard<'_, Writer>) {
        drop(writer);
        if !self.dirty.swap(true, Ordering::Release) {
            self.wake_sync.notify_one();
        }
    }

    fn sync_until_stopped(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            let mut writer = self.lock();
            while !self.dirty.load(Ordering::Acquire) && !self.stopped.load(Ordering::Acquire) {
                // The flag is set outside the lock, so a wake-up may be missed; the timeout bounds the delay.
                writer = self.wake_sync.wait_timeout(writer, SYNC_EVERY).expect("no holder of this lock panics").0;
            }
            drop(writer);
            std::thread::sleep(SYNC_EVERY); // gathers what else comes
            self.sync();
        }
        self.sync();
    }

    fn sync(&self) {
        self.dirty.store(false, Ordering::Release);
        let files = {
            let mut writer = self.lock();
            let mut files = std::mem::take(&mut writer.unsynced);
            files.push(writer.current().file.clone());
            files
        };
        for file in files {
            if let Err(error) = file.sync_data() {
                self.fail(&error);
            }
        }
    }
}

impl Writer {
    fn current(&mut self) -> &mut Segment {
        &mut self.segments[self.at]
    }

    /// Bytes that can still be written without a new segment.
    fn free(&self) -> u64 {
        let ahead = (self.segments.len() - self.at - 1) as u64;
        SEGMENT_USABLE.saturating_sub(self.segments[self.at].written) + ahead * SEGMENT_USABLE
    }

    fn allocate(&mut self, folder: &Path) -> io::Result<()> {
        let path = folder.join(format!("{:08}.journal", self.next_number));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        if let Err(error) = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, SEGMENT_BYTES) {
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
        });
        self.next_number += 1;
        Ok(())
    }

    fn append(&mut self, record: &[u8]) -> io::Result<(Arc<File>, u64)> {
        if self.segments[self.at].written > SEGMENT_USABLE && self.at + 1 < self.segments.len() {
            let full = self.segments[self.at].file.clone();
            self.unsynced.push(full);
            self.at += 1;
        }
        let segment = self.current();
        if segment.written + record.len() as u64 > SEGMENT_BYTES {
            return Err(io::Error::other("the journal has no segment left"));
        }
        let offset = segment.written;
        segment.file.write_all_at(record, offset)?;
        segment.written += record.len() as u64;
        Ok((segment.file.clone(), offset))
    }
}

fn encode(kind: Kind, sequence: u64, payload: &impl Serialize) -> Vec<u8> {
    let mut record = Vec::with_capacity(512);
    record.extend_from_slice(&MAGIC.to_le_bytes());
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&sequence.to_le_bytes());
    record.push(kind as u8);
    let mut record = postcard::to_extend(payload, record).expect("plain data encodes");
    let length = (record.len() - HEAD_BYTES) as u32;
    record[4..8].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c::crc32c(&record);
    record.extend_from_slice(&crc.to_le_bytes());
    debug_assert!(record.len() <= RECORD_BYTES_MAX, "strings are bounded where they enter");
    record
}

/// The record at the start of `bytes`: kind, sequence, payload and its whole length.
fn decode(bytes: &[u8]) -> Option<(u8, u64, &[u8], usize)> {
    let head = bytes.get(..HEAD_BYTES)?;
    if head[..4] != MAGIC.to_le_bytes() {
        return None;
    }
    let length = u32::from_le_bytes(head[4..8].try_into().ok()?) as usize;
    let whole = HEAD_BYTES.checked_add(length)?.checked_add(CRC_BYTES)?;
    let record = bytes.get(..whole)?;
    let (body, crc) = record.split_at(whole - CRC_BYTES);
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return None;
    }
    Some((head[16], u64::from_le_bytes(head[8..16].try_into().ok()?), &body[HEAD_BYTES..], whole))
}

fn read_back(file: &File, offset: u64, length: usize) -> io::Result<Line> {
    let mut record = vec![0; length];
    file.read_exact_at(&mut record, offset)?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a line of the journal does not read back");
    let (_, _, payload, _) = decode(&record).ok_or_else(damaged)?;
    postcard::from_bytes::<End>(payload).map(|end| end.line).map_err(|_| damaged())
}

/// Takes the lock of a boot's folder; `None` when its process lives.
fn lock_folder(folder: &Path) -> io::Result<Option<File>> {
    let lock = OpenOptions::new().write(true).create(true).truncate(false).open(folder.join("lock"))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a dead boot left behind.
#[derive(Debug, Default)]
pub struct Left {
    /// Every END that is still here, in order, with its ordinal.
    pub ended: Vec<(u64, Line)>,
    /// A line for every OPEN without an END.
    pub crashed: Vec<Line>,
    /// Records that do not read: file and offset.
    pub corrupt: Vec<(PathBuf, u64)>,
}

/// A dead boot's folder, locked against other readers.
#[derive(Debug)]
pub struct Dead {
    pub boot: BootId,
    pub folder: PathBuf,
    _lock: File,
}

/// The journals under `root` whose process is gone.
pub fn dead_boots(root: &Path) -> io::Result<Vec<Dead>> {
    let mut dead = Vec::new();
    for entry in fs::read_dir(root)? {
        let folder = entry?.path();
        let Some(boot) = folder.file_name().and_then(|name| name.to_str()).and_then(boot_of) else { continue };
        if let Some(lock) = lock_folder(&folder)? {
            dead.push(Dead { boot, folder, _lock: lock });
        }
    }
    Ok(dead)
}

fn boot_of(name: &str) -> Option<BootId> {
    (name.len() == 32).then(|| u128::from_str_radix(name, 16).ok()).flatten().map(u128::to_be_bytes)
}

impl Dead {
    /// Reads all records; a torn tail is cut off, anything else that does not read is skipped and reported.
    ///
    /// `settle` makes the line of a call that was open, from its OPEN and its last MARK.
    pub fn read(&self, settle: impl Fn(Open, Option<Mark>) -> Line) -> io::Result<Left> {
        let mut left = Left::default();
        let mut open = BTreeMap::<u64, (Open, Option<Mark>)>::new();
        let mut ended = HashSet::new();
        let mut paths: Vec<PathBuf> = fs::read_dir(&self.folder)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "journal"))
            .collect();
        paths.sort();
        for path in paths {
            let bytes = fs::read(&path)?;
            scan(&bytes, |found| match found {
                Ok((kind, sequence, payload)) if kind == Kind::Open as u8 => {
                    if let Ok(record) = postcard::from_bytes::<Open>(payload)
                        && !ended.contains(&sequence)
                    {
                        open.insert(sequence, (record, None));
                    }
                }
                Ok((kind, sequence, payload)) if kind == Kind::Mark as u8 => {
                    if let (Ok(mark), Some(call)) = (postcard::from_bytes::<Mark>(payload), open.get_mut(&sequence)) {
                        call.1 = Some(mark);
                    }
                }
                Ok((_, sequence, payload)) => {
                    // The first END of an id counts. One that another version wrote leaves its call open: settled by MARK.
                    if let Ok(end) = postcard::from_bytes::<End>(payload) {
                        open.remove(&sequence);
                        if ended.insert(sequence) {
                            left.ended.push((end.ordinal, end.line));
                        }
                    } else {
                        tracing::error!(sequence, "journal: an END does not read");
                    }
                }
                Err(offset) => left.corrupt.push((path.clone(), offset)),
            });
        }
        left.crashed.extend(open.into_values().map(|(open, mark)| settle(open, mark)));
        Ok(left)
    }

    /// Removes the folder, once everything in it is stored.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(&self.folder)
    }
}

/// Gives every record of a segment, and the offset of each stretch that is none.
fn scan<'a>(bytes: &'a [u8], mut found: impl FnMut(Result<(u8, u64, &'a [u8]), u64>)) {
    let mut at = 0;
    let mut damaged_at = None;
    while at < bytes.len() {
        if let Some((kind, sequence, payload, length)) = decode(&bytes[at..]) {
            if let Some(offset) = damaged_at.take() {
                found(Err(offset));
            }
            found(Ok((kind, sequence, payload)));
            at += length;
            continue;
        }
        if damaged_at.is_none() {
            if bytes[at..].iter().all(|byte| *byte == 0) {
                return; // allocated, never written
            }
            damaged_at = Some(at as u64);
        }
        at += 1;
        // Straight to the next place that could begin a record.
        at += memchr::memmem::find(&bytes[at..], &MAGIC.to_le_bytes()).unwrap_or(bytes.len() - at);
    }
    // Damage with no record behind it is the torn tail of the last write: cut off, since nothing was acted on it.
}

impl Line {
    /// The line of a call that nothing more is known of: what its last MARK says, the rest of its hold absorbed as an
    /// estimate. `charged` is what those tokens cost.
    pub(super) fn crashed(open: Open, mark: Option<Mark>, charged_nano: i64) -> Line {
        let mut line = open.line;
        let hold_nano = mark.map_or(line.hold_nano, |mark| mark.hold_nano.max(line.hold_nano));
        line.hold_nano = hold_nano;
        line.charged_nano = charged_nano.min(hold_nano);
        line.absorbed_nano = hold_nano - line.charged_nano;
        line.end_reason = EndReason::Crashed;
        line.billed = Billed::Nothing;
        line.estimated = true;
        if let Some(mark) = mark {
            line.billed = Billed::Mark;
            line.input = mark.input;
            line.output = mark.output;
            line.counted_output = Some(mark.output);
            line.account_id = mark.account_id;
        }
        line
    }
}

#[cfg(test)]
mod tests;
