//! Reads the head of a request; leaves the body as it came.
//!
//! `Head::read_as` says what the body of a request decides (model, stream, bounds, how large the prompt can be);
//! `splice` makes the few edits that a call needs without copying or rebuilding the rest. Unknown fields, key order,
//! big numbers and escapes reach the upstream because nobody here touches them.

pub mod api;
mod fields;
pub mod form;
mod head;
mod splice;
mod tape;

pub use api::{Api, Form};
pub use fields::Fields;
pub use head::{
    ANSWERS_MAX, Head, MODEL_BYTES_MAX, N_MAX, PROMPTS_MAX, PromptShape, START_BYTES_MAX, STARTS_MAX, Starts,
    TEXT_BYTES_MAX, Text, USER_BYTES_MAX,
};
pub use splice::{Body, Edit, MaxField, rename, splice};
pub use tape::{DEPTH_MAX, MARKS_MAX};

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::{Value, json};

    use super::*;

    /// A JSON text before it is written; `Raw` is a number, a literal, or a string that is written as it is.
    #[derive(Clone, Debug)]
    enum Tree {
        Raw(String),
        Text(String),
        Array(Vec<Tree>),
        Object(Vec<(String, Tree)>),
    }

    impl Tree {
        /// Writes it with white space (`pretty`) and escapes strewn in as `seed` has it.
        fn write(&self, seed: &mut u64, pretty: bool, out: &mut String) {
            gap(seed, pretty, out);
            match self {
                Tree::Raw(raw) => out.push_str(raw),
                Tree::Text(text) => write_text(text, seed, out),
                Tree::Array(items) => list('[', ']', items, seed, pretty, out, |item, seed, out| {
                    item.write(seed, pretty, out);
                }),
                Tree::Object(fields) => list('{', '}', fields, seed, pretty, out, |(key, value), seed, out| {
                    gap(seed, pretty, out);
                    write_text(key, seed, out);
                    gap(seed, pretty, out);
                    out.push(':');
                    value.write(seed, pretty, out);
                }),
            }
            gap(seed, pretty, out);
        }
    }

    fn list<T>(
        open: char,
        close: char,
        items: &[T],
        seed: &mut u64,
        pretty: bool,
        out: &mut String,
        write: impl Fn(&T, &mut u64, &mut String),
    ) {
        out.push(open);
        gap(seed, pretty, out);
        for (index, item) in items.iter().enumerate() {
            out.push_str(if index == 0 { "" } else { "," });
            write(item, seed, out);
        }
        out.push(close);
    }

    fn write_text(text: &str, seed: &mut u64, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                _ if roll(seed, 12) == 0 => {
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
                }
                '"' | '\\' => out.extend(['\\', c]),
                '/' if roll(seed, 2) == 0 => out.push_str("\\/"),
                '\n' => out.push_str("\\n"),
                c if c < ' ' => out.push_str(&format!("\\u{:04X}", c as u32)),
                c => out.push(c),
            }
        }
        out.push('"');
    }

    fn gap(seed: &mut u64, pretty: bool, out: &mut String) {
        if pretty {
            out.push_str(["", "", " ", "\n", "\r\n\t", "        "][roll(seed, 6)]);
        }
    }

    /// Xorshift, so that one number decides how a tree is written.
    fn roll(seed: &mut u64, sides: u64) -> usize {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        (*seed % sides) as usize
    }

    fn raw() -> impl Strategy<Value = Tree> {
        let number = "-?(0|[1-9][0-9]{0,24})(\\.[0-9]{1,22})?([eE][+-]?[0-9]{1,2})?";
        prop_oneof![
            number.prop_map(Tree::Raw),
            "(true|false|null)".prop_map(Tree::Raw),
            any::<String>().prop_map(Tree::Text)
        ]
    }

    fn tree(leaf: impl Strategy<Value = Tree> + 'static) -> impl Strategy<Value = Tree> {
        leaf.prop_recursive(4, 24, 4, |inner| {
            let key = prop_oneof!["[a-z_]{0,9}", "model|include_usage|role|content|type", any::<String>()];
            prop_oneof![vec(inner.clone(), 0..4).prop_map(Tree::Array), vec((key, inner), 0..4).prop_map(Tree::Object),]
        })
    }

    fn field(name: &'static str, value: impl Strategy<Value = Tree>) -> impl Strategy<Value = Vec<(String, Tree)>> {
        option::weighted(0.7, value)
            .prop_map(move |value| value.map(|value| (name.into(), value)).into_iter().collect())
    }

    /// Mostly `good`, now and then anything.
    fn mostly(good: impl Strategy<Value = Tree> + 'static) -> impl Strategy<Value = Tree> {
        prop_oneof![30 => good, 1 => tree(raw())]
    }

    fn message() -> impl Strategy<Value = Tree> {
        let part = (any::<String>(), "(text|image_url|file)")
            .prop_map(|(text, kind)| object([("type", Tree::Text(kind)), ("text", Tree::Text(text))]));
        let content = prop_oneof![
            any::<String>().prop_map(Tree::Text),
            vec(part, 0..3).prop_map(Tree::Array),
            Just(Tree::Raw("null".into())),
        ];
        let role = "(user|user|assistant|system|tool)".prop_map(Tree::Text);
        (mostly(role), option::weighted(0.9, mostly(content)), tree(raw())).prop_map(|(role, content, calls)| {
            let content = content.into_iter().map(|content| ("content".to_owned(), content));
            Tree::Object([("role".into(), role), ("tool_calls".into(), calls)].into_iter().chain(content).collect())
        })
    }

    fn object<const N: usize>(fields: [(&str, Tree); N]) -> Tree {
        Tree::Object(fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// A chat request as text, mostly valid, in any order, with unknown fields and now and then a field given twice.
    fn body() -> impl Strategy<Value = String> {
        let number = || mostly("(null|1|7|128|4096|18446744073709551615)".prop_map(Tree::Raw));
        let flag = || mostly("(true|false|null)".prop_map(Tree::Raw));
        let options = prop_oneof![
            3 => option::of(flag()).prop_map(|usage| Tree::Object(usage.map(|usage| ("include_usage".into(), usage)).into_iter().collect())),
            1 => flag().prop_map(|usage| object([("x", Tree::Raw("1.50".into())), ("include_usage", usage)])),
            1 => Just(Tree::Raw("null".into())),
        ];
        let known = (
            prop_oneof![20 => mostly("[a-z0-9./:\"\\\\-]{1,12}".prop_map(Tree::Text)), 1 => Just(Tree::Raw("null".into()))],
            mostly(vec(message(), 1..5).prop_map(Tree::Array)),
            field("stream", flag()),
            field("stream_options", mostly(options)),
            field("max_tokens", number()),
            field("max_completion_tokens", number()),
            field("n", mostly("(null|1|2|128)".prop_map(Tree::Raw))),
            field("user", mostly("[a-z]{0,9}".prop_map(Tree::Text))),
            vec(("[a-z]{1,3}|tools|temperature", tree(raw())), 0..4),
        );
        let written = (any::<u64>(), any::<bool>(), 0..40usize);
        (known, written).prop_map(|((model, messages, a, b, c, d, e, f, unknown), (seed, pretty, again))| {
            let mut fields = vec![("model".to_owned(), model), ("messages".to_owned(), messages)];
            fields.extend([a, b, c, d, e, f, unknown].into_iter().flatten());
            fields.extend(fields.get(again).cloned());
            let mut seed = seed | 1;
            for index in (1..fields.len()).rev() {
                fields.swap(index, roll(&mut seed, index as u64 + 1));
            }
            let mut text = String::new();
            Tree::Object(fields).write(&mut seed, pretty, &mut text);
            text
        })
    }

    /// What a body says, in the plainest words; nothing where it must be refused (but for a field given twice).
    fn oracle(body: &Value) -> Option<Value> {
        let integer = |name: &str, max: u64| match &body[name] {
            Value::Null => Some(None),
            value => value.as_u64().filter(|n| (1..=max).contains(n)).map(Some),
        };
        let flag = |value: &Value| value.is_null().then_some(false).or(value.as_bool());
        let options = &body["stream_options"];
        let messages = body["messages"].as_array().filter(|messages| !messages.is_empty())?;
        let content = |m: &Value| m["content"].as_array().is_none_or(|parts| parts.iter().all(Value::is_object));
        let fine = |m: &Value| {
            m["role"].is_string()
                && content(m)
                && matches!(m["content"], Value::Null | Value::String(_) | Value::Array(_))
        };
        let last_user = messages.iter().rfind(|m| m["role"] == "user").map(words);
        let bounds = [integer("max_tokens", u64::MAX)?, integer("max_completion_tokens", u64::MAX)?];
        let ok = messages.iter().all(fine)
            && (options.is_null() || options.is_object())
            && (body["user"].is_null() || body["user"].is_string());
        ok.then_some(json!({
            "model": body["model"].as_str().filter(|model| (1..=256).contains(&model.len()))?, "user": body["user"],
            "stream": flag(&body["stream"])?, "usage": flag(&options["include_usage"])?, "n": integer("n", 128)?.unwrap_or(1),
            "max": bounds.into_iter().flatten().min(), "last_user": last_user, "ends": messages.last()?["role"] == "user",
        }))
    }

    fn words(message: &Value) -> String {
        let parts = message["content"].as_array().into_iter().flatten().filter(|part| part["type"] == "text");
        let parts: Vec<&str> = parts.filter_map(|part| part["text"].as_str()).collect();
        message["content"].as_str().map_or(parts.join("\n"), str::to_owned)
    }

    fn said(head: &Head) -> Value {
        json!({
            "model": head.model, "user": head.user, "stream": head.stream, "usage": head.include_usage, "n": head.n,
            "max": head.max_tokens, "last_user": head.last_user.as_ref().map(|text| &text.start), "ends": head.ends_with_user,
        })
    }

    fn edited(mut body: Value, edits: &[Edit]) -> Value {
        for edit in edits {
            match *edit {
                Edit::Model(name) => body["model"] = name.into(),
                Edit::IncludeUsage => body["stream_options"]["include_usage"] = true.into(),
                Edit::MaxTokens { value, absent } => {
                    let used =
                        ["max_tokens", "max_completion_tokens"].into_iter().filter(|name| !body[*name].is_null());
                    let used: Vec<&str> = used.collect();
                    let names = if used.is_empty() { &[absent.name()][..] } else { &used[..] };
                    names.iter().for_each(|name| body[*name] = value.into());
                }
            }
        }
        body
    }

    /// Every byte of the original is there, in order, but for single JSON values that were replaced.
    fn only_values_differ(original: &Bytes, spliced: &Body) {
        let inside = original.as_ptr_range();
        let mut from = 0;
        for piece in spliced.pieces().iter().filter(|piece| inside.contains(&piece.as_ptr())) {
            let at = piece.as_ptr() as usize - inside.start as usize;
            assert_eq!(&original[at..at + piece.len()], &piece[..]);
            if at > from {
                let gone: Value = serde_json::from_slice(&original[from..at]).unwrap();
                assert!(!gone.is_object() && !gone.is_array());
            }
            from = at + piece.len();
        }
        assert_eq!(from, original.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_head_says_what_a_plain_reading_of_the_body_says(text in body()) {
            let value: Value = serde_json::from_str(&text).unwrap();
            match Head::read(text.as_bytes()) {
                Ok(head) => prop_assert_eq!(Some(said(&head)), oracle(&value), "{}", text),
                Err(error) if error.to_string().ends_with("is given twice.") => {}
                Err(error) => prop_assert_eq!(None, oracle(&value), "{}: {}", error, text),
            }
        }

        #[test]
        fn a_spliced_body_says_what_the_edited_body_says_and_no_other_byte_differs(
            text in body(), name in "[a-z\"\\\\é]{1,9}", value in 1..9000u64, chosen in 0..8u8, late in any::<bool>(),
        ) {
            let body = Bytes::from(text);
            let Ok(head) = Head::read(&body) else { return Ok(()) };
            let absent = if late { MaxField::MaxCompletionTokens } else { MaxField::MaxTokens };
            let all = [Edit::Model(&name), Edit::IncludeUsage, Edit::MaxTokens { value, absent }];
            let edits: Vec<Edit> = (0..3).filter(|bit| chosen & (1 << bit) != 0).map(|bit| all[bit]).collect();
            let spliced = splice(&body, &head, &edits);
            let bytes = spliced.to_bytes();
            prop_assert_eq!(spliced.len(), bytes.len());
            let read: Value = serde_json::from_slice(&bytes).unwrap();
            prop_assert_eq!(read, edited(serde_json::from_slice(&body).unwrap(), &edits));
            only_values_differ(&body, &spliced);
            // And the edit is what the next reader sees.
            let again = Head::read(&bytes).unwrap();
            prop_assert_eq!(again.include_usage, head.include_usage || edits.contains(&Edit::IncludeUsage));
        }

        #[test]
        fn whatever_the_grammar_allows_in_an_unread_field_is_accepted(
            number in "-?(0|[1-9][0-9]{0,400})(\\.[0-9]{1,40})?([eE][+-]?[0-9]{1,12})?",
            string in "\"([ -!#-\\[\\]-~é😀]|\\\\[\"\\\\/bfnrt]|\\\\u[0-9a-fA-F]{4}|\\\\u[dD][89aAbBcCdDeEfF][0-9a-fA-F]{2}){0,40}\"",
            seed in any::<u64>(), pretty in any::<bool>(),
        ) {
            let (number, string) = (Tree::Raw(number), Tree::Raw(string));
            let hidden = Tree::Array(vec![number.clone(), string.clone(), object([("a", number.clone()), ("b", string)]), number]);
            let message = object([("role", Tree::Text("user".into())), ("content", Tree::Text("hi".into()))]);
            let body = object([("x", hidden), ("model", Tree::Text("m".into())), ("messages", Tree::Array(vec![message]))]);
            let mut text = String::new();
            body.write(&mut (seed | 1), pretty, &mut text);
            prop_assert!(serde_json::from_str::<IgnoredAny>(&text).is_ok(), "{}", text);
            let head = Head::read(text.as_bytes());
            prop_assert!(head.is_ok(), "{:?}: {}", head.unwrap_err(), text);
            let text = Bytes::from(text);
            only_values_differ(&text, &splice(&text, &head.unwrap(), &[Edit::Model("other"), Edit::IncludeUsage]));
        }

        #[test]
        fn what_is_accepted_is_json_however_a_body_is_damaged(
            text in body(), at in any::<prop::sample::Index>(), byte in any::<u8>(), how in 0..3,
        ) {
            let mut bytes = text.into_bytes();
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, b"\"\\{}[],:0"[usize::from(byte) % 9]),
            }
            let json = std::str::from_utf8(&bytes).is_ok_and(|text| serde_json::from_str::<IgnoredAny>(text).is_ok());
            match Head::read(&bytes) {
                Ok(_) => prop_assert!(json),
                Err(error) if error.to_string().contains("is not ") => prop_assert!(!json, "{}", error),
                Err(_) => {}
            }
        }
    }
}
