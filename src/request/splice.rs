//! Makes the few edits that a call needs, and leaves every other byte of the body alone.

use std::ops::Range;

use bytes::Bytes;
use memchr::memchr2;
use smallvec::SmallVec;

use super::Head;

/// Four edits at most (the model, the usage, both bounds), each with a slice of the original before it, and the rest.
const PIECES_MAX: usize = 9;

/// One edit of a body. Of two edits of the same kind the last counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit<'a> {
    /// Another name in `model`.
    Model(&'a str),
    /// `stream_options.include_usage` becomes true; nothing happens where it is.
    IncludeUsage,
    /// The bound of the output becomes `value` in each of the two fields that the client used, else in `absent`.
    MaxTokens { value: u64, absent: MaxField },
}

/// The names that the bound of the output has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxField {
    /// `max_tokens`: what every compatible upstream knows.
    MaxTokens,
    /// `max_completion_tokens`: what OpenAI's reasoning models ask for.
    MaxCompletionTokens,
}

impl MaxField {
    /// Its name in a body.
    pub fn name(self) -> &'static str {
        match self {
            MaxField::MaxTokens => "max_tokens",
            MaxField::MaxCompletionTokens => "max_completion_tokens",
        }
    }
}

/// The body with the edits made, as slices of the original and small inserts; nothing of the body is copied.
///
/// `head` must have been read from this very body.
pub fn splice(body: &Bytes, head: &Head, edits: &[Edit<'_>]) -> Body {
    let mut cuts = Cuts::new();
    for (index, edit) in edits.iter().enumerate() {
        let kind = std::mem::discriminant(edit);
        if !edits[index + 1..].iter().any(|later| std::mem::discriminant(later) == kind) {
            cut(head, *edit, &mut cuts);
        }
    }
    // Stable: two inserts at one place keep their order.
    cuts.sort_by_key(|cut| cut.range.start);

    let mut pieces = SmallVec::new();
    let mut from = 0;
    for Cut { range, insert } in cuts {
        push(&mut pieces, body.slice(from..range.start));
        push(&mut pieces, insert);
        from = range.end;
    }
    push(&mut pieces, body.slice(from..));
    Body { pieces }
}

/// A body in pieces, for one vectored write.
#[derive(Clone, Debug)]
pub struct Body {
    pieces: SmallVec<[Bytes; PIECES_MAX]>,
}

impl Body {
    /// Bytes in all, for `Content-Length`.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces in order; none is empty.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// One copy of it all; without one where there is a single piece.
    pub fn to_bytes(&self) -> Bytes {
        match &self.pieces[..] {
            [only] => only.clone(),
            pieces => pieces.concat().into(),
        }
    }
}

impl From<Bytes> for Body {
    /// A body without edits.
    fn from(body: Bytes) -> Body {
        let mut pieces = SmallVec::new();
        push(&mut pieces, body);
        Body { pieces }
    }
}

impl IntoIterator for Body {
    type Item = Bytes;
    type IntoIter = smallvec::IntoIter<[Bytes; PIECES_MAX]>;

    fn into_iter(self) -> Self::IntoIter {
        self.pieces.into_iter()
    }
}

/// A form with another name in `model`; a part of its own in front of all others where it named none. `boundary` is that
/// of the form.
///
/// `head` must have been read from this very form, of which `begun` is as much as has come, the model included.
pub fn rename(begun: &Bytes, head: &Head, boundary: &str, name: &str) -> Body {
    let mut pieces = SmallVec::new();
    match &head.spans.model {
        Some(span) => {
            push(&mut pieces, begun.slice(..span.start));
            push(&mut pieces, name.to_owned().into());
            push(&mut pieces, begun.slice(span.end..));
        }
        None => {
            let part = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{name}\r\n");
            push(&mut pieces, part.into());
            push(&mut pieces, begun.clone());
        }
    }
    Body { pieces }
}

/// Where the edits go in the original body.
#[derive(Clone, Debug)]
pub(super) struct Spans {
    /// Behind the root's `{`.
    pub root: usize,
    pub root_empty: bool,
    /// The value, quotes included; `None` where the body names no model.
    pub model: Option<Range<usize>>,
    pub usage: UsageSpan,
    pub max_tokens: Option<MaxSpan>,
    pub max_completion_tokens: Option<MaxSpan>,
}

/// Where to ask for the usage.
#[derive(Clone, Debug)]
pub(super) enum UsageSpan {
    /// No `stream_options`.
    Absent,
    /// `stream_options` is null, here.
    Null(Range<usize>),
    /// `stream_options` is an object without `include_usage`; `inside` is behind its `{`.
    Object { inside: usize, empty: bool },
    /// The value of `include_usage`.
    Value(Range<usize>),
}

/// A bound that the client gave; or null, which says nothing but holds the key's place.
#[derive(Clone, Debug)]
pub(super) struct MaxSpan {
    pub value: Range<usize>,
    pub null: bool,
}

/// Where in `body` the value of a key stands, whose literal begins (behind the quote) at `key_at`. Of an object or an
/// array only the start is right. The body is valid JSON: somebody has parsed it.
pub(super) fn value_span(body: &[u8], key_at: usize) -> Range<usize> {
    let colon = skip_space(body, string_end(body, key_at));
    let start = skip_space(body, colon + 1);
    let end = match body[start] {
        b'"' => string_end(body, start + 1),
        _ => body[start..].iter().position(|b| b",]} \t\r\n".contains(b)).map_or(body.len(), |len| start + len),
    };
    start..end
}

struct Cut {
    range: Range<usize>,
    insert: Bytes,
}

type Cuts = SmallVec<[Cut; 4]>;

fn cut(head: &Head, edit: Edit<'_>, cuts: &mut Cuts) {
    let spans = &head.spans;
    let mut replace = |range: &Range<usize>, insert: Bytes| cuts.push(Cut { range: range.clone(), insert });
    let at = |place: usize| place..place;
    match edit {
        // The same name stays as the client wrote it.
        Edit::Model(name) if name == head.model && spans.model.is_some() => {}
        Edit::Model(name) => match &spans.model {
            Some(span) => replace(span, serde_json::Value::from(name).to_string().into()),
            None => {
                let comma = if spans.root_empty { "" } else { "," };
                let field = format!("\"model\":{}{comma}", serde_json::Value::from(name));
                replace(&at(spans.root), field.into());
            }
        },
        Edit::IncludeUsage if head.include_usage => {}
        Edit::IncludeUsage => match &spans.usage {
            UsageSpan::Absent => {
                replace(&at(spans.root), Bytes::from_static(br#""stream_options":{"include_usage":true},"#));
            }
            UsageSpan::Null(null) => replace(null, Bytes::from_static(br#"{"include_usage":true}"#)),
            UsageSpan::Object { inside, empty: true } => {
                replace(&at(*inside), Bytes::from_static(br#""include_usage":true"#));
            }
            UsageSpan::Object { inside, empty: false } => {
                replace(&at(*inside), Bytes::from_static(br#""include_usage":true,"#));
            }
            UsageSpan::Value(value) => replace(value, Bytes::from_static(b"true")),
        },
        Edit::MaxTokens { value, absent } => {
            let number = Bytes::from(value.to_string());
            let both = [&spans.max_tokens, &spans.max_completion_tokens];
            let mut used = both.into_iter().flatten().filter(|span| !span.null).peekable();
            let key = match absent {
                MaxField::MaxTokens => &spans.max_tokens,
                MaxField::MaxCompletionTokens => &spans.max_completion_tokens,
            };
            if used.peek().is_some() {
                used.for_each(|span| replace(&span.value, number.clone()));
            } else if let Some(null) = key {
                // A second key of this name would be refused upstream, or win by accident.
                replace(&null.value, number);
            } else {
                // The root is never empty, it has a model: the comma is right.
                replace(&at(spans.root), format!("\"{}\":{value},", absent.name()).into());
            }
        }
    }
}

fn push(pieces: &mut SmallVec<[Bytes; PIECES_MAX]>, piece: Bytes) {
    if !piece.is_empty() {
        pieces.push(piece);
    }
}

/// Behind the closing quote of the literal whose content begins at `at`.
pub(super) fn string_end(body: &[u8], mut at: usize) -> usize {
    while let Some(found) = memchr2(b'"', b'\\', body.get(at..).unwrap_or_default()) {
        if body[at + found] == b'"' {
            return at + found + 1;
        }
        at += found + 2;
    }
    body.len()
}

fn skip_space(body: &[u8], from: usize) -> usize {
    body[from..].iter().position(|b| !b" \t\r\n".contains(b)).map_or(body.len(), |len| from + len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGES: &str = r#""messages":[{"role":"user","content":"hi"}]"#;

    /// A body with these fields before its messages, after the edits.
    fn spliced(fields: &str, edits: &[Edit]) -> String {
        let body = Bytes::from(format!("{{{fields},{MESSAGES}}}"));
        let head = Head::read(&body).unwrap();
        let text = String::from_utf8(splice(&body, &head, edits).to_bytes().to_vec()).unwrap();
        text.strip_suffix(&format!(",{MESSAGES}}}")).and_then(|text| text.strip_prefix('{')).unwrap().to_owned()
    }

    fn max(value: u64) -> Edit<'static> {
        Edit::MaxTokens { value, absent: MaxField::MaxTokens }
    }

    #[test]
    fn a_body_without_edits_is_the_same_allocation() {
        let body = Bytes::from(format!("{{\"model\":\"m\",{MESSAGES}}}"));
        let head = Head::read(&body).unwrap();
        let pieces: Vec<Bytes> = splice(&body, &head, &[]).into_iter().collect();
        assert_eq!((pieces.len(), pieces[0].as_ptr()), (1, body.as_ptr()));
        assert_eq!(Body::from(body.clone()).to_bytes().as_ptr(), body.as_ptr());
    }

    #[test]
    fn the_model_is_replaced_with_its_quotes_and_nothing_else_moves() {
        let fields = "\"a\": 1.50 ,\n \"model\"\t: \"old\" , \"b\":1e400";
        assert_eq!(spliced(fields, &[Edit::Model("new")]), "\"a\": 1.50 ,\n \"model\"\t: \"new\" , \"b\":1e400");
    }

    #[test]
    fn a_mapped_name_is_escaped() {
        assert_eq!(spliced(r#""model":"m""#, &[Edit::Model("a\"\\\n/é")]), r#""model":"a\"\\\n/é""#);
    }

    #[test]
    fn the_same_name_keeps_the_clients_spelling() {
        assert_eq!(spliced(r#""model":"\u006d""#, &[Edit::Model("m")]), r#""model":"\u006d""#);
    }

    #[test]
    fn an_escaped_key_and_an_escaped_value_are_found_whole() {
        let fields = r#""m\u006fdel" : "a\"\\","max\u005Ftokens":9"#;
        assert_eq!(spliced(fields, &[Edit::Model("b"), max(5)]), r#""m\u006fdel" : "b","max\u005Ftokens":5"#);
    }

    #[test]
    fn usage_is_asked_for_wherever_the_client_left_room() {
        let model = r#""model":"m""#;
        for (before, after) in [
            (model.to_owned(), format!(r#""stream_options":{{"include_usage":true}},{model}"#)),
            (
                format!(r#""stream_options": null ,{model}"#),
                format!(r#""stream_options": {{"include_usage":true}} ,{model}"#),
            ),
            (
                format!(r#""stream_options":{{}},{model}"#),
                format!(r#""stream_options":{{"include_usage":true}},{model}"#),
            ),
            (
                format!(r#""stream_options":{{ }},{model}"#),
                format!(r#""stream_options":{{"include_usage":true }},{model}"#),
            ),
            (
                format!(r#""stream_options":{{ "x":{{}}}},{model}"#),
                format!(r#""stream_options":{{"include_usage":true, "x":{{}}}},{model}"#),
            ),
            (
                format!(r#""stream_options":{{"include_usage" :false}},{model}"#),
                format!(r#""stream_options":{{"include_usage" :true}},{model}"#),
            ),
            (
                format!(r#""stream_options":{{"include_usage":null,"x":1}},{model}"#),
                format!(r#""stream_options":{{"include_usage":true,"x":1}},{model}"#),
            ),
        ] {
            assert_eq!(spliced(&before, &[Edit::IncludeUsage]), after);
        }
    }

    #[test]
    fn usage_that_the_client_asked_for_is_left_as_it_is() {
        let fields = r#""stream_options":{"include_usage": true},"model":"m""#;
        assert_eq!(spliced(fields, &[Edit::IncludeUsage]), fields);
    }

    #[test]
    fn the_bound_goes_into_the_fields_that_the_client_used() {
        for (before, after) in [
            (r#""max_tokens":900"#, r#""max_tokens":5"#),
            (r#""max_completion_tokens": 900 "#, r#""max_completion_tokens": 5 "#),
            (r#""max_completion_tokens":900,"max_tokens":80"#, r#""max_completion_tokens":5,"max_tokens":5"#),
            (r#""max_completion_tokens":900,"max_tokens":null"#, r#""max_completion_tokens":5,"max_tokens":null"#),
        ] {
            assert_eq!(spliced(&format!(r#"{before},"model":"m""#), &[max(5)]), format!(r#"{after},"model":"m""#));
        }
    }

    #[test]
    fn an_absent_bound_is_inserted_under_the_name_that_the_caller_chose() {
        assert_eq!(spliced(r#" "model":"m""#, &[max(16)]), r#""max_tokens":16, "model":"m""#);
        let edit = Edit::MaxTokens { value: 16, absent: MaxField::MaxCompletionTokens };
        assert_eq!(spliced(r#""model":"m""#, &[edit]), r#""max_completion_tokens":16,"model":"m""#);
    }

    #[test]
    fn a_bound_of_null_is_replaced_so_that_no_key_stands_twice() {
        assert_eq!(spliced(r#""max_tokens":null,"model":"m""#, &[max(16)]), r#""max_tokens":16,"model":"m""#);
    }

    #[test]
    fn of_two_edits_of_a_kind_the_last_counts() {
        assert_eq!(
            spliced(r#""model":"m""#, &[Edit::Model("a"), max(1), Edit::Model("b"), max(2)]),
            r#""max_tokens":2,"model":"b""#
        );
    }

    #[test]
    fn all_edits_together_fit_into_the_pieces_that_are_reserved() {
        let fields = r#""max_tokens":1,"model":"m","stream_options":{"include_usage":false},"max_completion_tokens":1"#;
        let body = Bytes::from(format!("{{{fields},{MESSAGES}}}"));
        let edits = [Edit::Model("other"), Edit::IncludeUsage, max(7)];
        let body = splice(&body, &Head::read(&body).unwrap(), &edits);
        assert_eq!(body.pieces().len(), PIECES_MAX);
        assert!(!body.pieces.spilled());
    }
}
