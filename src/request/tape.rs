//! Parses a copy of the body onto a tape, in buffers that each thread reuses.

use std::cell::RefCell;
use std::{mem, str};

use serde::de::IgnoredAny;
use simd_json::tape::Value;
use simd_json::{Buffers, ErrorType, INPUT_PADDING, Tape};

use super::splice::string_end;
use crate::error::Error;

/// Nesting of objects and arrays that is accepted; a chat request needs about 10, a tool's schema some more.
pub const DEPTH_MAX: usize = 128;

/// Brackets, commas and colons outside strings. A conversation of 3,000 messages has 30,000; a body that is nothing
/// else would take 18 times its own size in memory.
pub const MARKS_MAX: usize = 1024 * 1024;

/// Bytes of scratch that a thread keeps between bodies: enough for one with a photograph. After a larger one the
/// buffers go back to the allocator.
const BYTES_KEPT_MAX: usize = 2 * 1024 * 1024;

/// Nodes of tape (24 bytes each) that a thread keeps between bodies: a conversation of 3,000 messages.
const NODES_KEPT_MAX: usize = 32 * 1024;

/// A parsed body.
#[derive(Clone, Copy)]
pub(super) struct Document<'t, 'i> {
    pub root: Value<'t, 'i>,
    /// Address of the scratch copy, to tell offsets from strings.
    base: usize,
}

impl Document<'_, '_> {
    /// Where in the original body the content of a string of this tape starts, behind its quote. simd-json un-escapes
    /// in place, which shortens a string but never moves its start.
    pub fn offset(&self, string: &str) -> usize {
        string.as_ptr() as usize - self.base
    }
}

/// Parses `body` and hands the tape to `read`.
///
/// Fails with [`Error::BodyInvalid`] where the body is not JSON, is nested deeper than [`DEPTH_MAX`] or has more than
/// [`MARKS_MAX`] brackets, commas and colons. What else the grammar allows is accepted, whatever simd-json thinks of
/// it: see [`soften`].
pub(super) fn parse<T>(body: &[u8], read: impl Fn(Document<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
    if body.len() > MARKS_MAX && marks(body) > MARKS_MAX {
        return Err(whole(format!("has too many values: more than {MARKS_MAX} brackets, commas and colons")));
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let result = match scratch.attempt(body, |_| (), &read) {
            Ok(result) => result,
            Err(refusal) if refusal.error() == &ErrorType::DepthLimitExceeded => Err(too_deep()),
            Err(_) => check_grammar(body).and_then(|()| {
                scratch.attempt(body, soften, &read).unwrap_or_else(|refusal| match refusal.error() {
                    ErrorType::DepthLimitExceeded => Err(too_deep()),
                    _ => Err(whole("is not valid JSON")),
                })
            }),
        };
        scratch.shrink();
        result
    })
}

/// A 400 about the body as a whole.
pub(super) fn whole(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::BodyInvalid { param: None, reason: reason.into() }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

struct Scratch {
    bytes: Vec<u8>,
    buffers: Buffers,
    /// Always empty between bodies; kept for its allocation.
    tape: Tape<'static>,
}

impl Scratch {
    fn new() -> Scratch {
        Scratch { bytes: Vec::new(), buffers: Buffers::with_max_depth(0, DEPTH_MAX), tape: Tape(Vec::new()) }
    }

    /// One parse of a fresh copy, after `prepare` has had its way with it. The outer error is simd-json's.
    fn attempt<T>(
        &mut self,
        body: &[u8],
        prepare: impl Fn(&mut [u8]),
        read: impl Fn(Document<'_, '_>) -> Result<T, Error>,
    ) -> Result<Result<T, Error>, simd_json::Error> {
        self.bytes.clear();
        self.bytes.reserve(body.len() + INPUT_PADDING);
        self.bytes.extend_from_slice(body);
        prepare(&mut self.bytes);
        self.bytes.resize(body.len() + INPUT_PADDING, b' ');

        let base = self.bytes.as_ptr() as usize;
        let mut tape = mem::replace(&mut self.tape, Tape(Vec::new())).reset();
        let result = simd_json::fill_tape_padded(&mut self.bytes, body.len(), &mut self.buffers, &mut tape)
            .map(|()| read(Document { root: tape.as_value(), base }));
        self.tape = tape.reset();
        result
    }

    fn shrink(&mut self) {
        if self.bytes.capacity() > BYTES_KEPT_MAX || self.tape.0.capacity() > NODES_KEPT_MAX {
            *self = Scratch::new();
        }
    }
}

/// Brackets, commas and colons outside strings, up to one more than [`MARKS_MAX`].
fn marks(body: &[u8]) -> usize {
    let (mut marks, mut at) = (0, 0);
    while let Some(&byte) = body.get(at) {
        at = if byte == b'"' { string_end(body, at + 1) } else { at + 1 };
        marks += usize::from(matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':'));
        if marks > MARKS_MAX {
            break;
        }
    }
    marks
}

/// Says what is wrong with a body that simd-json refused, or that nothing is. serde_json, because its positions are
/// right (simd-json's are relative to a string, or 0), and its messages quote nothing of the body.
#[cold]
fn check_grammar(body: &[u8]) -> Result<(), Error> {
    let text = str::from_utf8(body).map_err(|e| whole(format!("is not UTF-8 at byte {}", e.valid_up_to())))?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|e| whole(format!("is not valid JSON: {e}")))?;
    Ok(())
}

fn too_deep() -> Error {
    whole(format!("is nested too deep: more than {DEPTH_MAX} objects and arrays in each other"))
}

/// Rewrites, in the scratch copy of a valid JSON text and without moving a byte, the two things that simd-json refuses
/// although the grammar allows them and some upstreams take them: half of a surrogate pair (a front end has cut a text
/// in the middle of an emoji) becomes U+FFFD, a number beyond f64 becomes `0.0`. The original goes upstream as it is.
#[cold]
fn soften(json: &mut [u8]) {
    let mut at = 0;
    while let Some(&byte) = json.get(at) {
        at = match byte {
            b'"' => soften_string(json, at + 1),
            b'-' | b'0'..=b'9' => soften_number(json, at),
            _ => at + 1,
        };
    }
}

/// From behind the opening quote to behind the closing one.
fn soften_string(json: &mut [u8], mut at: usize) -> usize {
    while let Some(&byte) = json.get(at) {
        match (byte, utf16_unit(json, at)) {
            (b'"', _) => return at + 1,
            (_, Some(0xD800..=0xDBFF)) if matches!(utf16_unit(json, at + 6), Some(0xDC00..=0xDFFF)) => at += 12,
            (_, Some(0xD800..=0xDFFF)) => {
                json[at + 2..at + 6].copy_from_slice(b"fffd");
                at += 6;
            }
            (b'\\', _) => at += 2,
            _ => at += 1,
        }
    }
    at
}

/// The unit that an escape `\uXXXX` at this place stands for.
fn utf16_unit(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u16::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

fn soften_number(json: &mut [u8], start: usize) -> usize {
    let rest = &mut json[start..];
    let len = rest.iter().position(|b| b",]} \t\r\n".contains(b)).unwrap_or(rest.len());
    let number = &mut rest[..len];
    let value = str::from_utf8(number).ok().and_then(|n| n.parse::<f64>().ok());
    // A number that is too large has at least five characters (1e309).
    if value.is_some_and(f64::is_infinite) && len >= 3 {
        number.fill(b' ');
        // With a point, so that it does not pass for an integer where one is read.
        number[..3].copy_from_slice(b"0.0");
    }
    start + len
}

#[cfg(test)]
mod tests {
    use super::super::Head;
    use super::*;

    fn refusal(body: impl AsRef<[u8]>) -> String {
        Head::read(body.as_ref()).unwrap_err().to_string()
    }

    fn nested(depth: usize) -> String {
        // The root is the first level.
        let (open, close) = ("[".repeat(depth - 1), "]".repeat(depth - 1));
        format!(r#"{{"x":{open}{close},"model":"m","messages":[{{"role":"user"}}]}}"#)
    }

    #[test]
    fn nesting_is_accepted_up_to_the_bound_even_in_fields_that_nobody_reads() {
        assert!(Head::read(nested(DEPTH_MAX).as_bytes()).is_ok());
        assert!(refusal(nested(DEPTH_MAX + 1)).contains("nested too deep: more than 128"));
        assert!(refusal(nested(100_000)).contains("nested too deep"));
        assert!(refusal("[".repeat(1_000_000)).contains("nested too deep"));
    }

    #[test]
    fn a_body_that_is_not_json_is_told_where() {
        assert_eq!(refusal(r#"{"model" "m"}"#), "The body is not valid JSON: expected `:` at line 1 column 10.");
        assert!(refusal("{\"model\":\n tru}").ends_with("expected ident at line 2 column 5."));
        assert!(refusal(" \n ").contains("is not valid JSON: EOF"));
        assert!(refusal(r#"{"model":"m"} {}"#).contains("trailing characters"));
        assert!(refusal(b"{\"model\":\"\xff\"}").contains("is not UTF-8 at byte 10"));
        // A code point beyond Unicode, an overlong form and a surrogate in UTF-8.
        for bad in [&b"\xf4\x90\x80\x80"[..], b"\xc0\x80", b"\xed\xa0\x80"] {
            let body = [br#"{"x":""#, bad, br#"","model":"m","messages":[{"role":"user"}]}"#].concat();
            assert!(refusal(body).contains("is not UTF-8 at byte 6"));
        }
    }

    #[test]
    fn a_refusal_quotes_nothing_of_the_body() {
        for body in [r#"{"secret":"secret" "secret"}"#, r#""secret"#, r#"{"secret":secret}"#, r#"{"model":["secret"]}"#]
        {
            assert!(!refusal(body).contains("secret"));
        }
    }

    #[test]
    fn half_a_surrogate_pair_and_a_number_beyond_f64_are_no_reason_to_refuse() {
        let body = r#"{"model":"m\ud800","seed":1e400,"x":[-1E+999,"\udc00\ud83d\ude00\\ud800"],
            "messages":[{"role":"user","content":"cut \ud83d"}]}"#;
        let head = Head::read(body.as_bytes()).unwrap();
        assert_eq!(head.model, "m\u{fffd}");
        assert_eq!(head.last_user.unwrap().start, "cut \u{fffd}");
    }

    #[test]
    fn softening_moves_no_byte_and_leaves_whole_pairs_alone() {
        let mut json =
            br#"["\ud83d\ude00","\ud83d\ud83d\ude00","\ude00\ud83d","\\ud83d","1e999",1e999,2, 1e-999 ]"#.to_vec();
        soften(&mut json);
        let softened = r#"["\ud83d\ude00","\ufffd\ud83d\ude00","\ufffd\ufffd","\\ud83d","1e999",0.0  ,2, 1e-999 ]"#;
        assert_eq!(str::from_utf8(&json), Ok(softened));
    }

    #[test]
    fn a_number_beyond_f64_does_not_pass_for_an_integer() {
        let body = r#"{"model":"m","max_tokens":1e400,"messages":[{"role":"user"}]}"#;
        assert_eq!(refusal(body), "'max_tokens': must be an integer of at least 1, found a number.");
    }

    #[test]
    fn a_body_of_nothing_but_structure_is_refused_before_it_takes_memory() {
        let with = |filler: String| format!(r#"{{"x":{filler},"model":"m","messages":[{{"role":"user"}}]}}"#);
        let zeros = |commas| with(format!("[{}0]", "0,".repeat(commas)));
        // The rest of the body has 14 marks.
        assert!(Head::read(zeros(MARKS_MAX - 14).as_bytes()).is_ok());
        assert!(refusal(zeros(MARKS_MAX - 13)).contains("has too many values: more than 1048576 brackets"));
        assert!(Head::read(with(format!("\"{}\"", "\\\",".repeat(MARKS_MAX))).as_bytes()).is_ok());
    }

    #[test]
    fn a_thread_does_not_keep_the_buffers_of_an_enormous_body() {
        for filler in [format!("[{}0]", "0,".repeat(NODES_KEPT_MAX)), format!("\"{}\"", "x".repeat(BYTES_KEPT_MAX))] {
            let body = format!(r#"{{"x":{filler},"model":"m","messages":[{{"role":"user"}}]}}"#);
            assert!(Head::read(body.as_bytes()).is_ok());
            SCRATCH.with_borrow(|scratch| assert_eq!((scratch.bytes.capacity(), scratch.tape.0.capacity()), (0, 0)));
        }
        assert!(Head::read(nested(2).as_bytes()).is_ok());
        SCRATCH.with_borrow(|scratch| assert!(scratch.bytes.capacity() > 0));
    }

    #[test]
    fn a_refused_body_leaves_nothing_behind_for_the_next_one() {
        assert!(Head::read(br#"{"model":"first","messages":[{"role":"user"},"#).is_err());
        let head = Head::read(br#"{"messages":[{"role":"system"}],"model":"second"}"#).unwrap();
        assert_eq!((head.model.as_str(), head.last_user), ("second", None));
    }
}
