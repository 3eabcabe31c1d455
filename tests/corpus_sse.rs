//! Every recorded stream gives its recorded events, however it is cut.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gpt_cat::sse::Parser;
use serde::Deserialize;

/// As the corpus has it: the type defaults to `message`, bytes that are no UTF-8 are replaced.
#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Dispatched {
    event: String,
    data: String,
    id: String,
}

#[test]
fn recorded_streams_give_their_recorded_events_whole_byte_by_byte_and_cut_at_random() {
    let Some(streams) = streams() else { return };
    assert!(streams.len() > 100, "the corpus has more than {} streams", streams.len());
    let mut random = Lcg(42);
    for path in streams {
        let name = path.display();
        let stream = fs::read(&path).unwrap();
        let expected: Vec<Dispatched> =
            serde_json::from_slice(&fs::read(path.with_extension("json")).unwrap()).unwrap();

        assert_eq!(read([&stream[..]]), expected, "{name}, whole");
        assert_eq!(read(stream.chunks(1)), expected, "{name}, byte by byte");
        for longest in [3, 40, 1500] {
            assert_eq!(read(random.cut(&stream, longest)), expected, "{name}, cut at random, {longest} bytes at most");
        }
    }
}

#[test]
fn a_recorded_stream_that_breaks_off_within_data_leaves_it_as_a_tail_and_no_other_does() {
    let Some(streams) = streams() else { return };
    let manifest = fs::read(streams[0].with_file_name("MANIFEST.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for path in streams {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let mut parser = Parser::new();
        let (stream, mut at) = (fs::read(&path).unwrap(), 0);
        while parser.next(&stream, &mut at).is_some() {}
        let broken_off = manifest[name]["unterminated_tail"].as_bool().unwrap();
        // One more ends in bytes that are no field (Gemini's bare JSON error): a tail, but without data.
        assert_eq!(parser.finish().is_some_and(|tail| tail.dispatched), broken_off, "{name}");
    }
}

fn read<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<Dispatched> {
    let mut parser = Parser::new();
    let mut events = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    for chunk in chunks {
        let mut at = 0;
        while let Some(event) = parser.next(chunk, &mut at) {
            if event.dispatched {
                let kind = if event.name.is_empty() { b"message" } else { event.name };
                events.push(Dispatched { event: text(kind), data: text(event.data), id: text(event.id) });
            }
        }
    }
    assert!(!parser.overflowed());
    events
}

/// The streams of the corpus; `None`, and loudly so, where there is no corpus.
fn streams() -> Option<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus/sse");
    let Ok(entries) = fs::read_dir(&folder) else {
        let mut stderr = io::stderr(); // not eprintln!, which the test harness swallows
        writeln!(stderr, "SKIPPED: no recorded streams at {}", folder.display()).unwrap();
        return None;
    };
    let mut streams: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    streams.retain(|path| path.extension().is_some_and(|extension| extension == "sse"));
    streams.sort();
    Some(streams)
}

/// Knuth's MMIX generator: the same cuts in every run.
struct Lcg(u64);

impl Lcg {
    fn cut<'a>(&mut self, mut stream: &'a [u8], longest: usize) -> Vec<&'a [u8]> {
        let mut chunks = Vec::new();
        while !stream.is_empty() {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let length = (self.0 >> 33) as usize % (longest + 1);
            let (chunk, rest) = stream.split_at(length.min(stream.len()));
            chunks.push(chunk);
            stream = rest;
        }
        chunks
    }
}
