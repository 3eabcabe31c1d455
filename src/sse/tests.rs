//! The parser against the oracle on random streams and cuts, and the cases that have a name.

use std::cell::Cell;

use proptest::prelude::*;

use super::oracle::{Dispatched, events};
use super::{EVENT_BYTES_MAX, LINE_BYTES_MAX, NAME_BYTES_MAX, Parser};

thread_local! {
    /// Bytes looked at for a line end or copied, in this thread.
    pub(super) static WORK_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// What came out of one stream.
#[derive(Debug, Default)]
struct Seen {
    dispatched: Vec<Dispatched>,
    /// The pieces of the stream, event by event; together they are the stream.
    pieces: Vec<Vec<u8>>,
    blocks_without_data: usize,
    tail: Option<Dispatched>,
    /// The stream with a comment wherever one could be put between two chunks.
    commented: Vec<u8>,
    overflowed: bool,
}

/// Reads a stream in the given chunks and asserts what holds for every stream.
fn read<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Seen {
    let mut seen = Seen::default();
    let mut parser = Parser::new();
    let mut pending = Vec::new();
    for chunk in chunks {
        if parser.at_boundary() && !seen.commented.is_empty() {
            seen.commented.extend_from_slice(b": keep-alive\n\n");
        }
        seen.commented.extend_from_slice(chunk);
        let (mut from, mut at) = (0, 0);
        while let Some(event) = parser.next(chunk, &mut at) {
            assert_eq!(event.end, at);
            assert!(at > from, "an event has an end of its own");
            if let Some(data_at) = event.data_at {
                assert_eq!(&chunk[data_at..][..event.data.len()], event.data);
            }
            if event.dispatched {
                seen.dispatched.push(dispatched(event));
            } else {
                seen.blocks_without_data += 1;
            }
            assert!(parser.at_boundary());
            pending.extend_from_slice(&chunk[from..at]);
            seen.pieces.push(std::mem::take(&mut pending));
            from = at;
        }
        assert_eq!(at, chunk.len());
        pending.extend_from_slice(&chunk[from..]);
    }
    seen.pieces.push(pending);
    seen.tail = parser.finish().filter(|event| event.dispatched).map(dispatched);
    assert_eq!(parser.finish(), None);
    seen.overflowed = parser.overflowed();
    seen
}

fn dispatched(event: super::Event<'_>) -> Dispatched {
    Dispatched { name: event.name.to_vec(), data: event.data.to_vec(), id: event.id.to_vec() }
}

/// Each event's data, for streams without types and ids.
fn data_of(chunks: &[&[u8]]) -> Vec<String> {
    let seen = read(chunks.iter().copied());
    seen.dispatched.into_iter().map(|event| String::from_utf8(event.data).expect("the test wrote UTF-8")).collect()
}

/// The stream in chunks of these lengths, and the rest of it.
fn cut<'a>(stream: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
    let mut rest = stream;
    let mut chunks = Vec::new();
    for &length in lengths {
        let (chunk, behind) = rest.split_at(length.min(rest.len()));
        chunks.push(chunk);
        rest = behind;
    }
    chunks.push(rest);
    chunks
}

/// What the random streams are made of.
const WORDS: &[&[u8]] = &[
    b"data",
    b"data: ",
    b"data:x",
    b"event",
    b"event: e",
    b"id",
    b"id: 7",
    b"id: \0",
    b"retry: 1",
    b":",
    b" ",
    b"x",
    b"\0",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\r\r",
    b"\r\n\r\n",
    b"data: x\n\n",
    b": c\n\n",
    b"\xEF\xBB\xBF",
    b"\xEF",
    b"\xBB",
    b"\xBF",
    b"\xFF",
    b"\xC3\xA9",
    b"datax: ",
    b"da",
    b"ta: ",
    b"\xE2\x80\xA8",
];

fn any_stream() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(WORDS), 0..40).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_stream_cut_anywhere_gives_the_events_of_the_oracle(
        stream in any_stream(),
        lengths in prop::collection::vec(0..12_usize, 0..40),
    ) {
        let expected = events(&stream);
        let seen = read(cut(&stream, &lengths));
        prop_assert_eq!(&seen.dispatched, &expected);
        prop_assert_eq!(seen.pieces.concat(), stream.clone());
        prop_assert_eq!(events(&seen.commented), expected, "a comment between two events changes nothing");

        let closed = events(&[&stream[..], b"\n\n"].concat());
        prop_assert_eq!([seen.dispatched, Vec::from_iter(seen.tail)].concat(), closed);
    }

    #[test]
    fn where_events_end_does_not_depend_on_cuts_as_long_as_no_crlf_is_cut(
        stream in any_stream().prop_filter("an LF may belong to the chunk before or behind", |s| !s.contains(&b'\r')),
        lengths in prop::collection::vec(0..12_usize, 0..40),
    ) {
        let (whole, cut) = (read([&stream[..]]), read(cut(&stream, &lengths)));
        prop_assert_eq!(whole.pieces, cut.pieces);
        prop_assert_eq!(whole.blocks_without_data, cut.blocks_without_data);
    }
}

#[test]
fn one_packet_may_end_an_event_and_begin_the_next() {
    assert_eq!(data_of(&[b"data: on", b"e\n\ndata: tw", b"o\n\n"]), ["one", "two"]);
}

#[test]
fn a_cut_between_the_two_line_feeds_glues_nothing() {
    assert_eq!(data_of(&[b"data: one\n", b"\ndata: two\n", b"\n"]), ["one", "two"]);
}

#[test]
fn crlf_ends_lines_and_events_wherever_it_is_cut() {
    assert_eq!(data_of(&[b"data: one\r\n\r\ndata: two\r\n\r\n"]), ["one", "two"]);
    assert_eq!(data_of(&[b"data: one\r", b"\n\r", b"\ndata: two\r\n", b"\r\n"]), ["one", "two"]);
    assert_eq!(data_of(&[b"data: one\r", b"", b"\n", b"", b"data: more\r\n\r", b"", b"\n"]), ["one\nmore"]);
}

#[test]
fn a_third_newline_ends_nothing() {
    assert_eq!(data_of(&[b"data: one\n\n\ndata: two\n\n\n"]), ["one", "two"]);
    assert_eq!(data_of(&[b"\n\n\n", b"data: one\n\n", b"\n", b"data: two\n\n", b"\n\n\n"]), ["one", "two"]);
}

#[test]
fn an_event_that_ends_in_a_lone_cr_is_complete_before_the_next_byte() {
    let mut parser = Parser::new();
    let mut at = 0;
    let chunk = b"data: one\r\n\r";
    assert_eq!(parser.next(chunk, &mut at).map(|event| event.end), Some(chunk.len()));
    assert_eq!(parser.next(chunk, &mut at), None);
    assert!(parser.at_boundary());

    let mut at = 0;
    assert_eq!(parser.next(b"\ndata: two\r\r", &mut at).map(|event| event.data), Some(&b"two"[..]));
}

#[test]
fn a_caller_that_asks_no_more_at_the_end_of_a_chunk_misses_nothing() {
    let mut parser = Parser::new();
    let mut data = Vec::new();
    for chunk in [&b"data: one\r\r"[..], b"\ndata: two", b"\n", b"\n", b"data: three\n\n", b"data: four\n", b"\n"] {
        let mut at = 0;
        while at < chunk.len() {
            data.extend(parser.next(chunk, &mut at).map(|event| event.data.to_vec()));
        }
    }
    assert_eq!(data, [&b"one"[..], b"two", b"three", b"four"]);
}

#[test]
fn a_byte_order_mark_is_skipped_once_and_at_the_start_only() {
    let stream = b"\xEF\xBB\xBFdata: one\n\n\xEF\xBB\xBFdata: two\n\ndata: three\n\n";
    assert_eq!(data_of(&[stream]), ["one", "three"]);
    assert_eq!(data_of(&stream.chunks(1).collect::<Vec<_>>()), ["one", "three"]);
    assert_eq!(data_of(&[b"\xEF\xBB\xBF\xEF\xBB\xBFdata: one\n\ndata: two\n\n"]), ["two"]);
}

#[test]
fn half_a_byte_order_mark_is_part_of_the_first_line() {
    assert_eq!(data_of(&[b"\xEF", b"\xBB", b"data: one\ndata: two\n\n"]), ["two"]);
    let mut parser = Parser::new();
    assert!(parser.at_boundary());
    assert_eq!(parser.next(b"\xEF", &mut 0), None);
    assert!(!parser.at_boundary(), "a comment in here would part the mark");
    assert_eq!(parser.finish().map(|event| event.dispatched), Some(false));
}

#[test]
fn a_block_without_data_ends_too_and_says_that_it_dispatches_nothing() {
    let seen = read([&b": OPENROUTER PROCESSING\n\nid: 7\n\ndata: x\n\n"[..]]);
    assert_eq!(seen.blocks_without_data, 2);
    assert_eq!(seen.dispatched, [Dispatched { data: b"x".to_vec(), id: b"7".to_vec(), ..Dispatched::default() }]);
    assert_eq!(seen.pieces, [&b": OPENROUTER PROCESSING\n\n"[..], b"id: 7\n\n", b"data: x\n\n", b""]);
}

#[test]
fn a_boundary_is_only_where_no_byte_of_an_event_is_pending() {
    let mut parser = Parser::new();
    for (chunk, boundary) in [
        (&b"da"[..], false),
        (b"ta: x", false),
        (b"\n", false),
        (b"\n", true),
        (b"\n", true),
        (b":", false),
        (b"\r", false),
        (b"\r", true),
        (b"\n", true),
        (b"data: x\n\ndata", false),
    ] {
        let mut at = 0;
        while parser.next(chunk, &mut at).is_some() {}
        assert_eq!(parser.at_boundary(), boundary, "behind {chunk:?}");
    }
}

#[test]
fn whole_events_in_a_chunk_are_borrowed_and_take_no_memory() {
    let chunk = b"event: delta\ndata: {\"x\":1}\n\n: comment\n\ndata:\r\n\r\n".repeat(100);
    let mut parser = Parser::new();
    let (mut at, mut events) = (0, 0);
    while let Some(event) = parser.next(&chunk, &mut at) {
        assert_eq!(event.data_at.is_some(), event.dispatched);
        events += 1;
    }
    assert_eq!((events, parser.held_bytes()), (300, 0));
}

#[test]
fn the_tail_of_a_cut_off_stream_is_given_as_the_event_that_it_would_have_been() {
    let seen = read([&b"event: end\nid: 1\ndata: one\ndata: [DO"[..], b"NE]"]);
    assert_eq!(seen.dispatched, []);
    let tail = Dispatched { name: b"end".to_vec(), data: b"one\n[DONE]".to_vec(), id: b"1".to_vec() };
    assert_eq!(seen.tail, Some(tail));
    assert_eq!(read([&b"data: one\n\n"[..], b"\n"]).tail, None);
}

#[test]
fn bytes_that_are_no_utf8_survive() {
    let seen = read([&b"event: \xFF\ndata: a\xC3"[..], b"\xA9\xFE\0\n\n"]);
    assert_eq!((&seen.dispatched[0].name[..], &seen.dispatched[0].data[..]), (&b"\xFF"[..], &b"a\xC3\xA9\xFE\0"[..]));
}

/// What comes before the bound, and nothing behind it, however it is cut.
fn overflows(block: &[u8]) -> bool {
    let stream = [b"data: before\n\n", block, b"\n\ndata: behind\n\n"].concat();
    let whole = read([&stream[..]]);
    let cut = read(stream.chunks(60_000));
    assert_eq!(whole.overflowed, cut.overflowed);
    assert_eq!(whole.dispatched, cut.dispatched);
    assert_eq!(cut.pieces.concat(), stream);
    let behind = whole.dispatched.iter().any(|event| event.data == b"behind");
    assert_eq!(whole.dispatched[0].data, b"before");
    assert_ne!(behind, whole.overflowed);
    whole.overflowed
}

#[test]
fn a_line_may_have_its_full_length_and_not_one_byte_more() {
    for field in [&b"data: "[..], b": "] {
        let full = [field, &vec![b'x'; LINE_BYTES_MAX - field.len()]].concat();
        assert!(!overflows(&full));
        assert!(overflows(&[&full[..], b"x"].concat()));
    }
}

#[test]
fn an_event_may_have_its_full_length_and_not_one_byte_more() {
    let line = [b"data:", &vec![b'x'; EVENT_BYTES_MAX / 4][..]].concat();
    let three = [&line[..], b"\n", &line, b"\n", &line, b"\n"].concat();
    let full = [&three[..], &line[..line.len() - 3]].concat();
    assert!(!overflows(&full));
    assert!(overflows(&[&full[..], b"x"].concat()));
}

#[test]
fn a_name_may_have_its_full_length_and_not_one_byte_more() {
    for field in [&b"event: "[..], b"id: "] {
        let full = [b"data: x\n", field, &vec![b'x'; NAME_BYTES_MAX]].concat();
        assert!(!overflows(&full));
        assert!(overflows(&[&full[..], b"x"].concat()));
    }
}

#[test]
fn past_a_bound_nothing_is_held_and_nothing_may_be_put_in() {
    let mut parser = Parser::new();
    let chunk = vec![b'x'; 1 << 20];
    for _ in 0..9 {
        let mut at = 0;
        assert_eq!(parser.next(&chunk, &mut at), None);
        assert_eq!(at, chunk.len());
    }
    assert!(parser.overflowed() && !parser.at_boundary());
    assert_eq!(parser.held_bytes(), 0);
    assert_eq!(parser.next(b"\n\ndata: x\n\n", &mut 0), None);
    assert_eq!(parser.finish(), None);
}

#[test]
fn one_large_event_does_not_weigh_on_its_stream_for_ever() {
    let mut parser = Parser::new();
    let chunk = [b"data: ", &vec![b'x'; 1 << 20][..]].concat();
    assert_eq!(parser.next(&chunk, &mut 0), None);
    assert!(parser.held_bytes() >= 1 << 20);
    let mut at = 0;
    assert_eq!(parser.next(b"\n\n", &mut at).map(|event| event.data.len()), Some(1 << 20));
    assert_eq!(parser.next(b"\n\n", &mut at), None);
    assert!(parser.held_bytes() <= 2 * super::CARRY_KEPT_BYTES);
}

/// The bytes looked at or copied for each byte of the stream, in hundredths.
fn work_percent(stream: &[u8], chunk_bytes: usize) -> usize {
    let before = WORK_BYTES.get();
    let mut parser = Parser::new();
    for chunk in stream.chunks(chunk_bytes) {
        let mut at = 0;
        while parser.next(chunk, &mut at).is_some() {}
    }
    (WORK_BYTES.get() - before) * 100 / stream.len()
}

#[test]
fn work_is_linear_in_the_bytes_for_any_length_of_line_and_any_cut() {
    let long_line = [b"data: ", &vec![b'x'; 1 << 20][..], b"\n\n"].concat();
    let streams: [(&str, Vec<u8>); 6] = [
        ("a line of 1 MB", long_line),
        ("lines of 10 bytes, one event", b"data: 0123\n".repeat(100_000)),
        ("CR only", b"data: x\r\r".repeat(100_000)),
        ("blank lines", b"\n".repeat(1 << 20)),
        ("comments without an end", b":\n".repeat(1 << 19)),
        ("frames", [b"data: ", &[b'x'; 195][..], b"\n\n"].concat().repeat(5000)),
    ];
    for (name, stream) in &streams {
        for chunk_bytes in [1, 7, 1024, 16 << 10, stream.len()] {
            let work = work_percent(stream, chunk_bytes);
            // Scanned once; copied once into the line, and once more behind other data lines.
            assert!(work <= 300, "{name} in chunks of {chunk_bytes}: {work} %");
        }
    }
}
