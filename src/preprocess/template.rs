//! Templates: a user's message that is nothing but `/t <name>` stands for stored messages.
//!
//! It may stand anywhere in the conversation, since a front end sends the whole of it again with each turn. What is put
//! in its place is not looked at again.

use std::ops::Range;

use bytes::Bytes;
use serde_json::value::RawValue;

use super::command::{SAVED, TEMPLATE};
use crate::config::Commands;
use crate::request::{Fields, Head, STARTS_MAX};

/// Characters of a template's name.
pub const NAME_CHARS_MAX: usize = 64;
/// Characters of its description.
pub const DESCRIPTION_CHARS_MAX: usize = 256;
/// Bytes of its messages, as JSON.
pub const MESSAGES_BYTES_MAX: usize = 64 << 10;
/// Its messages.
pub const MESSAGES_MAX: usize = 256;
/// Messages of one request that may stand for others: a conversation names a handful.
const CALLS_MAX: usize = 16;

/// A message that names a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    /// Where the message stands in the body.
    pub at: Range<usize>,
    /// It is the last message: who asks for what is not there should be told.
    pub is_last: bool,
}

/// The messages that name a template; nearly always none, which costs a look at the beginning of each.
pub fn named(rule: &Commands, head: &Head, body: &Bytes) -> Vec<Named> {
    if !rule.enabled || !may_name(rule, head, body) {
        return Vec::new();
    }
    let messages = messages(body);
    let last = messages.len().saturating_sub(1);
    let found = messages.iter().enumerate().filter_map(|(index, message)| {
        let at = span(body, message)?;
        let fields = Fields::of(message).filter(|fields| fields.text("role").as_deref() == Some("user"))?;
        let name = name_in(rule, &text(&fields)?)?;
        Some(Named { name, at, is_last: index == last })
    });
    found.take(CALLS_MAX).collect()
}

/// Puts messages (JSON arrays) in the place of those that named them; `None` leaves one as it is.
pub fn expand(body: &Bytes, named: &[Named], stored: &[Option<String>]) -> Bytes {
    let mut expanded = Vec::with_capacity(body.len());
    let mut from = 0;
    for (named, stored) in named.iter().zip(stored) {
        let Some(inner) = stored.as_deref().and_then(inside) else { continue };
        expanded.extend_from_slice(&body[from..named.at.start]);
        expanded.extend_from_slice(inner.as_bytes());
        from = named.at.end;
    }
    expanded.extend_from_slice(&body[from..]);
    expanded.into()
}

/// The conversation before its last message, as a JSON array of the bytes that came; why not where it cannot be stored.
pub fn conversation(body: &Bytes) -> Result<String, &'static str> {
    let messages = messages(body);
    let before = &messages[..messages.len().saturating_sub(1)];
    let raw: Vec<&str> = before.iter().map(|message| message.get()).collect();
    checked(&format!("[{}]", raw.join(",")))
}

/// A list of messages as it is stored, each of them untouched; why not where it cannot be.
pub fn checked(messages: &str) -> Result<String, &'static str> {
    let parsed: Vec<&RawValue> = serde_json::from_str(messages).map_err(|_| "it must be a JSON array of messages")?;
    let is_message = |message: &&RawValue| {
        let role = Fields::of(message).and_then(|fields| fields.text("role"));
        role.is_some_and(|role| ["system", "developer", "user", "assistant", "tool"].contains(&role.as_str()))
    };
    match parsed.len() {
        0 => Err("it has no messages"),
        _ if messages.len() > MESSAGES_BYTES_MAX => Err("it is longer than 64 KiB"),
        count if count > MESSAGES_MAX => Err("it has more than 256 messages"),
        _ if !parsed.iter().all(is_message) => Err("each message must have a role that is known"),
        _ => Ok(messages.to_owned()),
    }
}

/// Whether a word can name a template: 1 to [`NAME_CHARS_MAX`] characters of any script, no blanks, no subcommand.
pub fn is_name(name: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&name.chars().count())
        && !name.chars().any(|character| character.is_whitespace() || character.is_control())
        && !SAVED.contains(&name)
}

/// A look that costs next to nothing: does a message that was read begin like a call? Of a conversation that is longer than
/// what is kept of its messages, the whole body is searched for one, with its slash as JSON may have it.
fn may_name(rule: &Commands, head: &Head, body: &[u8]) -> bool {
    if head.starts.iter().any(|start| name_in(rule, start).is_some()) {
        return true;
    }
    if head.prompt.messages as usize <= STARTS_MAX {
        return false;
    }
    let stands = |slash: &str, word: &str| {
        let call = format!("{}{word} ", rule.prefix.replace('/', slash));
        memchr::memmem::find(body, call.as_bytes()).is_some()
    };
    ["/", "\\/", "\\u002f", "\\u002F"].iter().any(|slash| TEMPLATE.iter().any(|word| stands(slash, word)))
}

/// The name in a text that is nothing but a call of a template.
fn name_in(rule: &Commands, text: &str) -> Option<String> {
    let mut words = text.trim().strip_prefix(rule.prefix.as_str())?.split_whitespace();
    let (word, name) = (words.next()?, words.next()?);
    let is_call =
        TEMPLATE.contains(&word) && words.next().is_none() && text.trim()[rule.prefix.len()..].starts_with(word);
    (is_call && is_name(name)).then(|| name.to_owned())
}

/// A message's text: a string, or a single part of text.
fn text(message: &Fields<'_>) -> Option<String> {
    if let Some(text) = message.text("content") {
        return Some(text);
    }
    let parts: Vec<&RawValue> = serde_json::from_str(message.last("content")?.get()).ok()?;
    let [only] = parts[..] else { return None };
    Fields::of(only)?.text("text")
}

fn messages(body: &Bytes) -> Vec<&RawValue> {
    let messages = Fields::read(body).and_then(|fields| fields.last("messages"));
    messages.and_then(|messages| serde_json::from_str(messages.get()).ok()).unwrap_or_default()
}

fn span(body: &Bytes, value: &RawValue) -> Option<Range<usize>> {
    let start = (value.get().as_ptr() as usize).checked_sub(body.as_ptr() as usize)?;
    Some(start..start + value.get().len()).filter(|span| span.end <= body.len())
}

/// What stands between the brackets of an array that is not empty.
fn inside(messages: &str) -> Option<&str> {
    let inner = messages.trim().strip_prefix('[')?.strip_suffix(']')?.trim();
    (!inner.is_empty()).then_some(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Commands {
        Commands { enabled: true, prefix: "/".into() }
    }

    fn found(messages: &str) -> Vec<(String, bool)> {
        let body = Bytes::from(format!(r#"{{"model":"m","messages":[{messages}],"x":"/t y "}}"#));
        let head = Head::read(&body).unwrap();
        named(&rule(), &head, &body).into_iter().map(|named| (named.name, named.is_last)).collect()
    }

    fn user(text: &str) -> String {
        format!(r#"{{"role":"user","content":"{text}"}}"#)
    }

    #[test]
    fn only_a_users_message_that_is_nothing_else_names_a_template() {
        assert_eq!(found(&user("/t translate")), [("translate".into(), true)]);
        assert_eq!(found(&user(r"\n\/template  翻译 ")), [("翻译".into(), true)]);
        let parts = r#"{"role":"user","content":[{"type":"text","text":"/t a"}]}"#;
        assert_eq!(found(&format!("{parts},{}", user("hi"))), [("a".into(), false)]);
        for other in
            ["/t", "/t help", "/t list", "/t show x", "/t a b", "say /t a", "/ t a", "/translate a", "/T a", ""]
        {
            assert_eq!(found(&user(other)), [], "{other}");
        }
        let system = r#"{"role":"system","content":"/t a"}"#;
        assert_eq!(found(&format!("{system},{}", user("hi"))), []);
    }

    #[test]
    fn a_template_at_the_beginning_of_a_long_conversation_is_seen() {
        let mut messages = vec![user("\\u002ft a")];
        messages.extend((0..100).map(|n| user(&n.to_string())));
        assert_eq!(found(&messages.join(",")), [("a".into(), false)]);
    }

    #[test]
    fn stored_messages_take_the_place_and_every_other_byte_stays() {
        let body = Bytes::from(
            r#"{ "model":"m", "messages" : [ {"role":"user","content":"/t a"} , {"role":"assistant","content":"ok"},{"role":"user","content":"/t b"},{"role":"user","content":"hi"} ], "n":1.0e0 }"#,
        );
        let body_n = Bytes::from(String::from_utf8(body.to_vec()).unwrap().replace("1.0e0", "1"));
        let named = named(&rule(), &Head::read(&body_n).unwrap(), &body_n);
        let stored =
            [Some(r#" [ {"role":"system","content":"/t b"},{"role":"user","content":"x"} ] "#.to_owned()), None];
        let expanded = expand(&body_n, &named, &stored);
        let expected = String::from_utf8(body_n.to_vec()).unwrap().replacen(
            r#"{"role":"user","content":"/t a"}"#,
            r#"{"role":"system","content":"/t b"},{"role":"user","content":"x"}"#,
            1,
        );
        assert_eq!(String::from_utf8(expanded.to_vec()).unwrap(), expected);
    }

    #[test]
    fn a_conversation_is_stored_without_its_last_message_and_within_its_bounds() {
        let body = |messages: &str| Bytes::from(format!(r#"{{"messages":[{messages}]}}"#));
        let kept =
            conversation(&body(&format!(r#"{{"role":"system", "content":"\u0061"}},{}"#, user("/t end-template x"))))
                .unwrap();
        assert_eq!(kept, r#"[{"role":"system", "content":"\u0061"}]"#);
        assert_eq!(conversation(&body(&user("/t end-template x"))), Err("it has no messages"));
        let long = user(&"x".repeat(MESSAGES_BYTES_MAX));
        assert!(conversation(&body(&format!("{long},{long}"))).is_err());
        let many = vec![user("x"); MESSAGES_MAX + 2].join(",");
        assert!(conversation(&body(&many)).is_err());
        assert!(checked(r#"[{"role":"root","content":"x"}]"#).is_err());
        assert!(checked(r#"{"role":"user"}"#).is_err());
    }

    #[test]
    fn names_are_words_of_any_script() {
        for good in ["a", "翻译", "explain-code", "été", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "a b", "a\u{3000}b", "help", "end-template", "delete", "\u{7}", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
