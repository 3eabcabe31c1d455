//! What a record of the journal is, as a value and as bytes.
//!
//! Record: magic, payload length, call's sequence, kind, payload (postcard), CRC-32C of all before it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::store::{Billed, EndReason, Line};

/// "gcj" and the version of the record format.
pub const MAGIC: u32 = u32::from_le_bytes(*b"gcj3");
/// magic, length, sequence, kind
pub const HEAD_BYTES: usize = 4 + 4 + 8 + 1;
const CRC_BYTES: usize = 4;
/// No record is longer: its strings are bounded where they enter (ids 128 bytes, names 256).
pub const RECORD_BYTES_MAX: usize = 4096;

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
pub struct End {
    pub ordinal: u64,
    pub line: Line,
}

/// Which record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Open = 1,
    Mark = 2,
    End = 3,
}

/// A record in its bytes.
pub fn encode(kind: Kind, sequence: u64, payload: &impl Serialize) -> Vec<u8> {
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

/// A record as it lies in a segment.
#[derive(Debug)]
pub struct Found<'a> {
    pub kind: u8,
    pub sequence: u64,
    pub payload: &'a [u8],
    pub offset: u64,
    /// Of the whole record.
    pub length: usize,
}

/// The record at the start of `bytes`, which lie at `offset`.
pub fn decode(bytes: &[u8], offset: u64) -> Option<Found<'_>> {
    decode_marked(MAGIC, bytes, offset)
}

/// Whether a record of another version stands at the start: whole, so that it is no damaged one of ours.
pub fn is_of_another_version(bytes: &[u8]) -> bool {
    let Some(magic) = bytes.first_chunk().map(|magic| u32::from_le_bytes(*magic)) else { return false };
    let (ours, theirs) = (MAGIC.to_le_bytes(), magic.to_le_bytes());
    theirs[..3] == ours[..3] && magic != MAGIC && decode_marked(magic, bytes, 0).is_some()
}

fn decode_marked(magic: u32, bytes: &[u8], offset: u64) -> Option<Found<'_>> {
    let head = bytes.get(..HEAD_BYTES)?;
    if head[..4] != magic.to_le_bytes() {
        return None;
    }
    let length = u32::from_le_bytes(head[4..8].try_into().ok()?) as usize;
    let whole = HEAD_BYTES.checked_add(length)?.checked_add(CRC_BYTES)?;
    let record = bytes.get(..whole)?;
    let (body, crc) = record.split_at(whole - CRC_BYTES);
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return None;
    }
    let sequence = u64::from_le_bytes(head[8..16].try_into().ok()?);
    Some(Found { kind: head[16], sequence, payload: &body[HEAD_BYTES..], offset, length: whole })
}

/// The line of an END; `InvalidData` when there is none any more.
pub fn read_back(file: &File, offset: u64, length: usize) -> io::Result<Line> {
    let mut record = vec![0; length];
    file.read_exact_at(&mut record, offset)?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a line of the journal does not read back");
    let found = decode(&record, offset).ok_or_else(damaged)?;
    postcard::from_bytes::<End>(found.payload).map(|end| end.line).map_err(|_| damaged())
}

impl Line {
    /// The line of a call that nothing more is known of but its OPEN and its last MARK: charged what `cost_nano` says of
    /// the marked tokens, the rest of its hold absorbed as an estimate.
    pub fn crashed(open: Line, mark: Option<Mark>, cost_nano: impl Fn(&Line) -> i64) -> Line {
        let mut line = open;
        let hold_nano = mark.map_or(line.hold_nano, |mark| mark.hold_nano.max(line.hold_nano));
        line.hold_nano = hold_nano;
        line.absorbed_nano = hold_nano;
        line.end_reason = EndReason::Crashed;
        line.billed = Billed::Nothing;
        line.estimated = true;
        if let Some(mark) = mark {
            line.billed = Billed::Mark;
            line.input = mark.input;
            line.output = mark.output;
            line.counted_output = Some(mark.output);
            line.account_id = mark.account_id;
            line.charged_nano = cost_nano(&line).min(hold_nano);
            line.absorbed_nano -= line.charged_nano;
        }
        line
    }
}
