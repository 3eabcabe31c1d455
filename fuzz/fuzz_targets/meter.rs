//! However a text is cut, its running count is that of the whole; and no bytes make a reader of JSON panic.
#![no_main]

use std::time::Duration;

use gpt_cat::meter::{Meter, Reader, Running, Vocabulary, count_prompt};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&step, data)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    let characters: Vec<char> = text.chars().collect();
    for vocabulary in [Vocabulary::O200k, Vocabulary::Cl100k] {
        let mut running = Running::new(vocabulary);
        for (index, delta) in characters.chunks(usize::from(step) % 64 + 1).enumerate() {
            running.push(&delta.iter().collect::<String>());
            // Asking for the total in between must not change it.
            if index % 7 == usize::from(step) % 7 {
                running.total();
            }
        }
        // The total first: counting the rest is what may turn out to be an estimate.
        let total = running.total();
        if !running.is_estimated() {
            assert_eq!(total, vocabulary.count(&text));
        }
    }

    let mut meter = Meter::new(Vocabulary::O200k);
    if let Some(model) = Reader::new().read(data, &mut meter).and_then(|chunk| chunk.model) {
        assert!(data[model.clone()].starts_with(b"\"") && data[model].ends_with(b"\""));
    }
    assert!(meter.at_most() >= meter.total());
    // What was read before changes nothing of what is read.
    let mut used = Reader::new();
    for chunk in data.split(|byte| *byte == b'\n').take(16) {
        let (mut behind, mut alone) = (Meter::new(Vocabulary::O200k), Meter::new(Vocabulary::O200k));
        assert_eq!(used.read(chunk, &mut behind), Reader::new().read(chunk, &mut alone));
        assert_eq!(behind.total(), alone.total());
    }
    count_prompt(data, Vocabulary::O200k, Duration::from_secs(1));
});
