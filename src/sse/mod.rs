//! Cuts a byte stream into server-sent events, and gives the same events however the bytes are cut.
//!
//! The rules are WHATWG's (<https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>), but
//! for the decoding: bytes that are no UTF-8 stay as they are. The parser neither keeps nor returns the bytes of the
//! wire: it says where an event ends, and its caller passes on the `Bytes` that it got. What it copies is the data of
//! an event that lies in more than one chunk or line.

use std::mem;

use memchr::{memchr, memchr2};

/// A longer line is no event any more. A delta with an image in base64 is a few MiB; more would let one stream take the
/// memory of thousands.
pub const LINE_BYTES_MAX: usize = 8 << 20;

/// The data of one event, its lines joined: two lines of full length. More lines than that are a body, not an event.
pub const EVENT_BYTES_MAX: usize = 2 * LINE_BYTES_MAX;

/// An event's type, or an id. Both are words in every known dialect; the id stays in memory until the stream ends.
pub const NAME_BYTES_MAX: usize = 4 << 10;

/// What the carry may keep between two events, so that most cut events need no allocation and one large one does not
/// weigh on its stream for the rest of its life.
const CARRY_KEPT_BYTES: usize = 64 << 10;

const LF: u8 = b'\n';
const CR: u8 = b'\r';
const BOM: &[u8] = b"\xEF\xBB\xBF";

/// Reads one stream. It holds at most one line, one event's data and two names, in buffers that grow by doubling;
/// [`Parser::held_bytes`] tells how much that is.
///
/// Past a bound it drops what it carries and gives no more events: the bytes go on, their counting becomes an estimate.
/// It does not take up again at the next blank line, because what was lost may be the whole answer, and a client is
/// better served by a stream that nobody edits than by one that is edited in places. Nor is it an error: the client's
/// own parser may well take the line.
#[derive(Debug)]
pub struct Parser {
    state: State,
    /// The last byte read was a CR: an LF that comes next belongs to it.
    cr: bool,
    /// The last event id; it stays from event to event.
    id: Vec<u8>,
    carry: Carry,
}

/// One block of lines and the blank line behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The offset in the chunk just behind the blank line; an LF that completes a CRLF is included if it is in the chunk.
    /// Blank lines before an event belong to it.
    pub end: usize,
    /// The `event` field, empty when there is none: what WHATWG calls `message`.
    pub name: &'a [u8],
    /// The `data` lines, joined by LF.
    pub data: &'a [u8],
    /// The offset of `data` in the chunk, or `None` where it was put together from more than one chunk or line.
    pub data_at: Option<usize>,
    /// The last `id` field of the stream so far.
    pub id: &'a [u8],
    /// Whether there was a `data` line. A block without one (comments, an id) dispatches nothing by WHATWG's rules, but its
    /// bytes are as complete as those of any other.
    pub dispatched: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing read yet but so many bytes of a byte order mark.
    Start(usize),
    /// Between two events, nothing to look after.
    Between,
    /// Between two events: the carry still holds the last one, or an LF may have to be skipped.
    Ended,
    /// In an event; what is known of it is in the carry.
    Inside,
    /// Past a bound.
    Overflowed,
}

/// What is known of an event that did not end in the chunk in which it began, or that has more than one data line.
#[derive(Debug)]
struct Carry {
    /// The line whose end is still to come; empty when the last byte read ended one.
    line: Vec<u8>,
    name: Vec<u8>,
    /// The data lines from `data_from` on, joined by LF.
    data: Vec<u8>,
    data_from: usize,
    /// Tells no data from empty data.
    has_data: bool,
}

/// Where an event that has just ended is to be found.
enum Found<'c> {
    InChunk { name: &'c [u8], data: Option<&'c [u8]>, data_at: usize },
    InCarry,
}

/// A line, an event or a name is longer than its bound.
struct OverBound;

impl Parser {
    /// A parser at the start of a stream.
    pub const fn new() -> Self {
        Parser { state: State::Start(0), cr: false, id: Vec::new(), carry: Carry::new() }
    }

    /// Finds the next event in `chunk[*at..]` and moves `*at` to its end. `None`: the rest of the chunk is the beginning
    /// of an event, the parser has taken it in, and `*at` is the chunk's length.
    ///
    /// Time is linear in the bytes given, however they are cut. An event with one data line in one chunk is borrowed from
    /// it and nothing is allocated.
    #[inline]
    pub fn next<'a>(&'a mut self, chunk: &'a [u8], at: &mut usize) -> Option<Event<'a>> {
        match self.read(chunk, at) {
            Ok(Some(Found::InChunk { name, data, data_at })) => Some(Event {
                end: *at,
                name,
                data: data.unwrap_or_default(),
                data_at: data.map(|_| data_at),
                id: &self.id,
                dispatched: data.is_some(),
            }),
            Ok(Some(Found::InCarry)) => Some(self.carried_event(*at)),
            Ok(None) => {
                *at = chunk.len();
                None
            }
            Err(OverBound) => {
                *at = chunk.len();
                self.overflow();
                None
            }
        }
    }

    /// Whether nothing of an event is pending, so that a comment may be put here. Never again once a bound was passed.
    ///
    /// It is true before the first byte as well: whoever writes a comment there must take out a byte order mark that
    /// follows, for it marks only the very first bytes of a stream.
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Between | State::Ended | State::Start(0))
    }

    /// Takes what is left when the stream has ended without a blank line, as the event that it would have been; its `end`
    /// is 0. WHATWG drops it, but a proxy has passed it on.
    pub fn finish(&mut self) -> Option<Event<'_>> {
        match self.state {
            State::Start(seen @ 1..) => self.carry.line.extend_from_slice(&BOM[..seen]),
            State::Inside => {}
            _ => return None,
        }
        if !self.carry.line.is_empty() && self.end_line(&[]).is_err() {
            self.overflow();
            return None;
        }
        self.state = State::Ended;
        Some(self.carried_event(0))
    }

    /// Whether a bound was passed: from there on there are no events.
    pub fn overflowed(&self) -> bool {
        self.state == State::Overflowed
    }

    /// The bytes of memory that this parser has taken, itself apart: 0 as long as each event lay in one chunk, had one data
    /// line at most, and none had an id.
    pub fn held_bytes(&self) -> usize {
        self.id.capacity() + self.carry.line.capacity() + self.carry.name.capacity() + self.carry.data.capacity()
    }

    /// Reads up to the end of the next event. While an event lies in this chunk alone and has one data line, its parts are
    /// kept in local variables; otherwise `spill` moves them to the carry.
    #[inline]
    fn read<'c>(&mut self, chunk: &'c [u8], at: &mut usize) -> Result<Option<Found<'c>>, OverBound> {
        if self.state != State::Between && !self.enter(chunk, at) {
            return Ok(None);
        }
        let mut name: &[u8] = &[];
        let mut data: Option<&[u8]> = None;
        let mut data_at = 0;
        let mut open = self.state == State::Inside;
        let mut pos = *at;
        while let Some(&first) = chunk.get(pos) {
            if matches!(first, LF | CR) && self.carry.line.is_empty() {
                pos = self.behind_line_end(chunk, pos);
                if open {
                    *at = pos;
                    return Ok(Some(self.ended(name, data, data_at)));
                }
                continue; // a blank line more than needed ends nothing
            }
            let Some(line_bytes) = line_end(&chunk[pos..]) else { break };
            if line_bytes > LINE_BYTES_MAX {
                return Err(OverBound);
            }
            let end = pos + line_bytes;
            let line = &chunk[pos..end];
            pos = self.behind_line_end(chunk, end);
            open = true;
            if self.state == State::Inside {
                self.end_line(line)?;
                continue;
            }
            match Field::of(line) {
                Field::Data(value) if data.is_none() => {
                    data = Some(value);
                    data_at = end - value.len();
                }
                Field::Name(value) => name = within(value, NAME_BYTES_MAX)?,
                Field::Data(value) => {
                    self.spill(name, data);
                    self.carry.add_data(value)?;
                }
                field => self.apply(field)?, // what stays with the parser anyway
            }
        }
        self.pause(&chunk[pos..], open, name, data)?;
        Ok(None)
    }

    /// Looks after what the fast path does not: the first bytes, the LF of a cut CRLF, a carry that was given out. False
    /// when nothing is left to read.
    #[cold]
    fn enter(&mut self, chunk: &[u8], at: &mut usize) -> bool {
        match self.state {
            State::Start(seen) => return self.skip_bom(seen, chunk, at),
            State::Overflowed => return false,
            State::Ended => self.carry.clear(),
            State::Between | State::Inside => {}
        }
        if self.cr {
            let Some(&first) = chunk.get(*at) else { return false };
            self.cr = false;
            *at += usize::from(first == LF);
        }
        if self.state == State::Ended {
            self.state = State::Between;
        }
        true
    }

    /// Skips a byte order mark at the start of the stream; what only began like one is the beginning of the first line.
    fn skip_bom(&mut self, mut seen: usize, chunk: &[u8], at: &mut usize) -> bool {
        while seen < BOM.len() {
            match chunk.get(*at) {
                None => {
                    self.state = State::Start(seen);
                    return false;
                }
                Some(&byte) if byte == BOM[seen] => {
                    seen += 1;
                    *at += 1;
                }
                Some(_) if seen == 0 => break,
                Some(_) => {
                    self.carry.line.extend_from_slice(&BOM[..seen]);
                    self.state = State::Inside;
                    return true;
                }
            }
        }
        self.state = State::Between;
        true
    }

    /// The offset behind the line end at `chunk[end]`.
    #[inline]
    fn behind_line_end(&mut self, chunk: &[u8], end: usize) -> usize {
        if chunk[end] == LF {
            return end + 1;
        }
        match chunk.get(end + 1) {
            Some(&LF) => end + 2,
            Some(_) => end + 1,
            None => {
                self.cr = true;
                end + 1
            }
        }
    }

    /// A blank line was read: the event is complete.
    #[inline]
    fn ended<'c>(&mut self, name: &'c [u8], data: Option<&'c [u8]>, data_at: usize) -> Found<'c> {
        if self.state == State::Inside {
            self.state = State::Ended;
            return Found::InCarry;
        }
        if self.cr {
            self.state = State::Ended;
        }
        Found::InChunk { name, data, data_at }
    }

    /// The chunk ends here, in the middle of an event unless it is not `open` and `rest` is empty.
    fn pause(&mut self, rest: &[u8], open: bool, name: &[u8], data: Option<&[u8]>) -> Result<(), OverBound> {
        if open || !rest.is_empty() {
            self.spill(name, data);
            return self.carry.hold(rest);
        }
        if self.cr {
            self.state = State::Ended;
        }
        Ok(())
    }

    /// Moves what `read` knows of the event to the carry, unless it is there.
    fn spill(&mut self, name: &[u8], data: Option<&[u8]>) {
        if self.state == State::Inside {
            return;
        }
        self.state = State::Inside;
        self.carry.name.extend_from_slice(name);
        if let Some(data) = data {
            self.carry.data.extend_from_slice(data);
            self.carry.has_data = true;
        }
    }

    /// Takes a line of an event in the carry; `rest` is what this chunk has of it.
    fn end_line(&mut self, rest: &[u8]) -> Result<(), OverBound> {
        if self.carry.line.is_empty() {
            return self.apply(Field::of(rest));
        }
        self.carry.hold(rest)?;
        let mut line = mem::take(&mut self.carry.line);
        match Field::of(&line) {
            // The line becomes the data: a large one is not copied a second time.
            Field::Data(value) if !self.carry.has_data => {
                self.carry.data_from = line.len() - value.len();
                self.carry.has_data = true;
                mem::swap(&mut self.carry.data, &mut line);
            }
            field => self.apply(field)?,
        }
        line.clear();
        self.carry.line = line;
        Ok(())
    }

    /// Puts a field of an event into the carry.
    fn apply(&mut self, field: Field<'_>) -> Result<(), OverBound> {
        match field {
            Field::Data(value) => self.carry.add_data(value)?,
            Field::Name(value) => replace(&mut self.carry.name, within(value, NAME_BYTES_MAX)?),
            Field::Id(value) if memchr(0, value).is_none() => replace(&mut self.id, within(value, NAME_BYTES_MAX)?),
            Field::Id(_) | Field::Other => {}
        }
        Ok(())
    }

    fn carried_event(&self, end: usize) -> Event<'_> {
        Event {
            end,
            name: &self.carry.name,
            data: &self.carry.data[self.carry.data_from..],
            data_at: None,
            id: &self.id,
            dispatched: self.carry.has_data,
        }
    }

    fn overflow(&mut self) {
        *self = Parser { state: State::Overflowed, ..Parser::new() };
    }
}

impl Default for Parser {
    fn default() -> Self {
        Parser::new()
    }
}

impl Carry {
    const fn new() -> Self {
        Carry { line: Vec::new(), name: Vec::new(), data: Vec::new(), data_from: 0, has_data: false }
    }

    /// Appends to the line whose end is still to come.
    fn hold(&mut self, bytes: &[u8]) -> Result<(), OverBound> {
        if self.line.len() + bytes.len() > LINE_BYTES_MAX {
            return Err(OverBound);
        }
        count_work(bytes.len());
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn add_data(&mut self, line: &[u8]) -> Result<(), OverBound> {
        if self.has_data {
            if self.data.len() - self.data_from + 1 + line.len() > EVENT_BYTES_MAX {
                return Err(OverBound);
            }
            self.data.push(LF);
        }
        count_work(line.len());
        self.data.extend_from_slice(line);
        self.has_data = true;
        Ok(())
    }

    fn clear(&mut self) {
        for buffer in [&mut self.line, &mut self.name, &mut self.data] {
            buffer.clear();
            buffer.shrink_to(CARRY_KEPT_BYTES);
        }
        self.data_from = 0;
        self.has_data = false;
    }
}

/// One line, read.
enum Field<'l> {
    Data(&'l [u8]),
    Name(&'l [u8]),
    Id(&'l [u8]),
    /// A comment, `retry`, or what WHATWG ignores.
    Other,
}

impl<'l> Field<'l> {
    #[inline]
    fn of(line: &'l [u8]) -> Self {
        let (kind, rest): (fn(&'l [u8]) -> Self, _) = match line {
            [b'd', b'a', b't', b'a', rest @ ..] => (Field::Data, rest),
            [b'e', b'v', b'e', b'n', b't', rest @ ..] => (Field::Name, rest),
            [b'i', b'd', rest @ ..] => (Field::Id, rest),
            _ => return Field::Other,
        };
        match rest {
            [b':', b' ', value @ ..] | [b':', value @ ..] => kind(value),
            [] => kind(rest),
            _ => Field::Other, // another field, whose name only begins so
        }
    }
}

/// The offset of the first line end.
#[inline]
fn line_end(bytes: &[u8]) -> Option<usize> {
    let found = memchr2(LF, CR, bytes);
    count_work(found.unwrap_or(bytes.len()));
    found
}

fn within(value: &[u8], bytes_max: usize) -> Result<&[u8], OverBound> {
    if value.len() > bytes_max { Err(OverBound) } else { Ok(value) }
}

fn replace(buffer: &mut Vec<u8>, value: &[u8]) {
    buffer.clear();
    buffer.extend_from_slice(value);
}

/// Lets a test see that the work is linear; nothing outside of tests.
#[inline]
fn count_work(_bytes: usize) {
    #[cfg(test)]
    tests::WORK_BYTES.set(tests::WORK_BYTES.get() + _bytes);
}

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
