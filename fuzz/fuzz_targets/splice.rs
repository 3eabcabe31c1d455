//! Any readable body, any edits: the result says what the edits say, and every other byte is the original's.
#![no_main]

use bytes::Bytes;
use gpt_cat::request::{Edit, Head, MaxField, splice};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // The first byte chooses the edits.
    let Some((&chosen, body)) = input.split_first() else { return };
    let body = Bytes::copy_from_slice(body);
    let Ok(head) = Head::read(&body) else { return };
    let absent = if chosen & 8 == 0 { MaxField::MaxTokens } else { MaxField::MaxCompletionTokens };
    let all = [Edit::Model("a \"mapped\" name"), Edit::IncludeUsage, Edit::MaxTokens { value: 77, absent }];
    let edits: Vec<Edit> = (0..3).filter(|bit| chosen & (1 << bit) != 0).map(|bit| all[bit]).collect();

    let spliced = splice(&body, &head, &edits);
    let bytes = spliced.to_bytes();
    assert_eq!(spliced.len(), bytes.len());
    let again = Head::read(&bytes).expect("an edited body is as readable as it was");
    let model = if chosen & 1 == 0 { head.model.as_str() } else { "a \"mapped\" name" };
    assert_eq!(again.model, model);
    assert_eq!(again.include_usage, head.include_usage || chosen & 2 != 0);
    assert_eq!(again.max_tokens, if chosen & 4 == 0 { head.max_tokens } else { Some(77) });
    assert_eq!((again.stream, again.n, &again.user), (head.stream, head.n, &head.user));
    assert_eq!((again.prompt.messages, &again.last_user), (head.prompt.messages, &head.last_user));

    // The slices of the original stand in order, and what is missing between two of them is one scalar.
    let inside = body.as_ptr_range();
    let mut from = 0;
    for piece in spliced.into_iter().filter(|piece| inside.contains(&piece.as_ptr())) {
        let at = piece.as_ptr() as usize - inside.start as usize;
        let gone = &body[from..at];
        assert!(
            gone.is_empty() || !gone.starts_with(b"{") && serde_json::from_slice::<serde::de::IgnoredAny>(gone).is_ok()
        );
        from = at + piece.len();
    }
    assert_eq!(from, body.len());
});
