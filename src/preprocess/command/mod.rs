//! Step `command`: the last user message names a command of ours.
//!
//! Only a message that ends the conversation is looked at, and only if its first word is in [`COMMANDS`]; anything else
//! that starts with the prefix (a path, a regular expression) goes to the model unchanged.

mod balance_inquiry;
mod help;
mod redeem;

use std::sync::Arc;

use super::{Draft, World};
use crate::config::Language;
use crate::error::Error;
use crate::users::Key;

/// One row of the table of commands.
#[derive(Debug)]
pub struct Row {
    pub name: &'static str,
    pub short: &'static str,
    /// What it does, in English and in Chinese.
    pub does: [&'static str; 2],
    pub needs: Needs,
    answer: fn(&Facts<'_>) -> String,
}

/// What the journey has to read from the store for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    Balance,
    /// The code that stands behind the command redeemed, then the balance.
    Redeem,
}

/// Every command, in the order in which `/help` lists them.
pub static COMMANDS: [Row; 3] = [help::ROW, balance_inquiry::ROW, redeem::ROW];

/// What an answer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    pub language: Language,
    pub prefix: &'a str,
    pub currency: &'a str,
    /// 0 where the command does not need it.
    pub balance_nano: i64,
    /// What a code was worth, if the command redeemed one.
    pub redeemed_nano: Option<i64>,
}

/// A command that a user gave, to be answered without an upstream and without a charge.
#[derive(Debug)]
pub struct Command {
    pub row: &'static Row,
    /// What stands behind the command's name, trimmed.
    pub argument: String,
    pub key: Arc<Key>,
    /// The model that was asked for, to be named in the answer.
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
}

impl Command {
    /// The answer's text.
    pub fn answer(&self, facts: &Facts<'_>) -> String {
        (self.row.answer)(facts)
    }
}

impl Facts<'_> {
    /// The one of two texts that is in the configured language.
    pub fn text<'t>(&self, [en, zh]: [&'t str; 2]) -> &'t str {
        match self.language {
            Language::En => en,
            Language::Zh => zh,
        }
    }
}

pub(super) fn run(world: &World<'_>, draft: &mut Draft) -> Result<Option<Command>, Error> {
    let rule = &world.config.commands;
    let (key, head) = draft.parts()?;
    let Some(text) = head.last_user.as_ref().filter(|text| rule.enabled && head.ends_with_user && !text.cut) else {
        return Ok(None);
    };
    let found = text.start.trim().strip_prefix(rule.prefix.as_str()).and_then(find);
    Ok(found.map(|(row, argument)| Command {
        row,
        argument: argument.to_owned(),
        key: key.clone(),
        model: head.model.clone(),
        stream: head.stream,
        include_usage: head.include_usage,
    }))
}

/// The command that is named, and what stands behind its name.
fn find(given: &str) -> Option<(&'static Row, &str)> {
    let word = given.split_whitespace().next()?;
    // `/ help` is no command: the word follows the prefix at once.
    let row = COMMANDS.iter().find(|row| (word == row.name || word == row.short) && given.starts_with(word))?;
    Some((row, given[word.len()..].trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_word_is_a_command() {
        let named = |given| find(given).map(|(row, argument)| (row.name, argument));
        assert_eq!(named("help"), Some(("help", "")));
        assert_eq!(named("bi  now\nor then "), Some(("balance_inquiry", "now\nor then")));
        for other in ["", " help", "usr/bin/env", "helpme", "^/h$/", "HELP"] {
            assert!(find(other).is_none(), "{other:?}");
        }
    }

    #[test]
    fn names_and_short_names_are_all_different() {
        let mut words: Vec<_> = COMMANDS.iter().flat_map(|row| [row.name, row.short]).collect();
        words.sort();
        let count = words.len();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    #[test]
    fn help_lists_every_command_in_both_languages() {
        for language in [Language::En, Language::Zh] {
            let facts = Facts { language, prefix: "!", currency: "USD", balance_nano: 0, redeemed_nano: None };
            let help = (help::ROW.answer)(&facts);
            for row in &COMMANDS {
                assert!(help.contains(&format!("!{}", row.name)), "{help}");
            }
        }
    }
}
