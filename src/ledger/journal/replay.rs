//! What a dead boot left behind, read from its journal.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::record::{End, Found, Kind, MAGIC, Mark, decode, is_of_another_version};
use crate::store::{BootId, Line};

/// Takes the lock of a boot's folder; `None` when its process lives.
pub(super) fn lock_folder(folder: &Path) -> io::Result<Option<File>> {
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
    /// The process passed lines over that it could not read: some behind the watermark may not be stored.
    pub passed_over: bool,
    /// The disk did not give all of it; another time it may.
    pub unreadable: bool,
}

/// In the folder of a boot that has passed lines over.
const DAMAGED: &str = "damaged";

/// Writes down that lines were passed over.
pub(super) fn mark_damaged(folder: &Path) -> io::Result<()> {
    File::create(folder.join(DAMAGED))?.sync_all()
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
    /// A folder as a replay finds it when its process is gone: here the folder itself stands in for the lock.
    #[cfg(test)]
    pub fn unlocked(boot: BootId, folder: PathBuf) -> Dead {
        let _lock = File::open(&folder).expect("the folder is there");
        Dead { boot, folder, _lock }
    }

    /// Reads all records; a torn tail is cut off, anything else that does not read is skipped and reported.
    ///
    /// `settle` makes the line of a call that was open, from its OPEN and its last MARK.
    pub fn read(&self, settle: impl Fn(Line, Option<Mark>) -> Line) -> io::Result<Left> {
        let mut left = Left { passed_over: self.folder.join(DAMAGED).exists(), ..Left::default() };
        let mut open = BTreeMap::<u64, (Line, Option<Mark>)>::new();
        let mut ended = HashSet::new();
        let mut paths: Vec<PathBuf> = fs::read_dir(&self.folder)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "journal"))
            .collect();
        paths.sort();
        for path in paths {
            let (bytes, whole) = read_all(&path)?;
            left.unreadable |= !whole;
            check_version(&path, &bytes)?;
            scan(&bytes, |found| match found {
                Ok(Found { kind, sequence, payload, .. }) if kind == Kind::Open as u8 => {
                    if let Ok(record) = postcard::from_bytes::<Line>(payload)
                        && !ended.contains(&sequence)
                    {
                        // A copy of an OPEN, from an older segment, changes nothing: what was marked since counts.
                        open.entry(sequence).or_insert((record, None));
                    }
                }
                Ok(Found { kind, sequence, payload, .. }) if kind == Kind::Mark as u8 => {
                    if let (Ok(mark), Some(call)) = (postcard::from_bytes::<Mark>(payload), open.get_mut(&sequence)) {
                        call.1 = Some(mark);
                    }
                }
                Ok(Found { sequence, payload, .. }) => {
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

    /// Keeps the folder for an operator, under a name that no start settles again.
    pub fn set_aside(self) -> io::Result<PathBuf> {
        let aside = self.folder.with_extension("unreadable");
        fs::rename(&self.folder, &aside)?;
        Ok(aside)
    }

    /// Removes the folder, once everything in it is stored.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(&self.folder)
    }
}

/// A segment's bytes, and whether the disk gave all of them: what it did not is zeros, which are no record. Fails where it
/// gave nothing, which may be another time.
fn read_all(path: &Path) -> io::Result<(Vec<u8>, bool)> {
    let error = match fs::read(path) {
        Ok(bytes) => return Ok((bytes, true)),
        Err(error) => error,
    };
    tracing::error!(file = %path.display(), %error, "journal: a segment does not read; its readable parts are");
    let file = File::open(path)?;
    let length = file.metadata()?.len() as usize;
    let bytes = read_parts(length, |part, offset| file.read_exact_at(part, offset)).ok_or(error)?;
    Ok((bytes, false))
}

fn read_parts(length: usize, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> Option<Vec<u8>> {
    const PART_BYTES: usize = 4096;
    let mut bytes = vec![0; length];
    let mut any = false;
    for (part, offset) in bytes.chunks_mut(PART_BYTES).zip((0..).step_by(PART_BYTES)) {
        match read(part, offset) {
            Ok(()) => any = true,
            Err(_) => part.fill(0),
        }
    }
    any.then_some(bytes)
}

/// Refuses a segment whose records have another format: read as damage, its lines would be lost.
fn check_version(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if !is_of_another_version(bytes) {
        return Ok(());
    }
    let what = "was written by another version of gpt-cat: start that one once, so that it settles what was open";
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} {what}", path.display())))
}

/// Gives every record of a segment, and the offset of each stretch that is none.
pub(super) fn scan<'a>(bytes: &'a [u8], mut found: impl FnMut(Result<Found<'a>, u64>)) {
    let mut at = 0;
    let mut damaged_at = None;
    while at < bytes.len() {
        if let Some(record) = decode(&bytes[at..], at as u64) {
            if let Some(offset) = damaged_at.take() {
                found(Err(offset));
            }
            at += record.length;
            found(Ok(record));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_the_disk_gives_in_parts_is_read_but_for_those() {
        let on_disk: Vec<u8> = (0..10_000u32).map(|byte| (byte % 251) as u8 + 1).collect();
        let bytes = read_parts(on_disk.len(), |part, offset| {
            let at = offset as usize;
            part.copy_from_slice(&on_disk[at..at + part.len()]);
            if offset == 4096 { Err(io::Error::from(rustix::io::Errno::IO)) } else { Ok(()) }
        });
        let bytes = bytes.expect("some of it reads");
        assert_eq!(bytes[..4096], on_disk[..4096]);
        assert!(bytes[4096..8192].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[8192..], on_disk[8192..]);
        let nothing = read_parts(on_disk.len(), |_, _| Err(io::Error::from(rustix::io::Errno::IO)));
        assert!(nothing.is_none(), "a disk that is away stops the start, and costs nothing");
    }
}
