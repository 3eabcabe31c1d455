//! Step `command`: the last user message names a command of ours.
//!
//! Only a message that ends the conversation is looked at, and only if its first word is in [`COMMANDS`]; anything else
//! that starts with the prefix (a path, a regular expression) goes to the model unchanged.

mod balance_inquiry;
mod help;
mod price;
mod redeem;
mod say_hi;
mod template;

use std::sync::Arc;

pub use template::{Asked, SAVED, TEMPLATE};

use super::{Draft, World};
use crate::config::{Language, Price};
use crate::error::Error;
use crate::store::TemplateRow;
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
    /// The models that the key may use, with their prices.
    Models,
    /// The user's templates and the public ones, after what was asked for has been done to them.
    Templates,
}

/// What became of a change that a command asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    #[default]
    Nothing,
    /// Messages, as JSON.
    Shown(String),
    Saved {
        /// There was a template of this name before.
        before: bool,
    },
    Deleted,
    Refused(String),
}

/// Every command, in the order in which `/help` lists them.
pub static COMMANDS: [Row; 6] = [help::ROW, say_hi::ROW, balance_inquiry::ROW, redeem::ROW, price::ROW, template::ROW];

/// What an answer is made of.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    pub language: Language,
    pub prefix: &'a str,
    pub currency: &'a str,
    /// What stands behind the command's name.
    pub argument: &'a str,
    /// The price ratio of the key's group, in millionths.
    pub ratio_micro: i64,
    /// Empty where the command does not need them, as all that follows.
    pub models: Vec<(String, Price)>,
    /// Enabled ones, the user's own before the public ones.
    pub templates: Vec<TemplateRow>,
    pub outcome: Outcome,
    /// What the key may spend; `None` where the command does not need it, or it could not be read.
    pub balance_nano: Option<i64>,
    pub redeemed: Redeemed,
}

/// What came of a code, in nano-units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redeemed {
    Now(i64),
    /// By the same user.
    Before(i64),
    Worthless,
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

    fn facts(language: Language, argument: &str) -> Facts<'_> {
        Facts {
            language,
            prefix: "!",
            currency: "USD",
            argument,
            ratio_micro: 1_500_000,
            models: vec![
                ("gpt-4o".into(), Price::plain(2_000_000_000, 4_000_000_000)),
                ("call".into(), Price { per_call_nano: 10_000_000, ..Price::default() }),
            ],
            templates: Vec::new(),
            outcome: Outcome::Nothing,
            balance_nano: None,
            redeemed: Redeemed::Worthless,
        }
    }

    fn said(name: &str, language: Language, argument: &str) -> String {
        let row = COMMANDS.iter().find(|row| row.name == name).unwrap();
        (row.answer)(&facts(language, argument))
    }

    #[test]
    fn what_a_code_brought_is_told_although_the_balance_could_not_be_read() {
        let row = COMMANDS.iter().find(|row| row.name == "redeem").unwrap();
        let redeemed = |redeemed, balance_nano, language| {
            (row.answer)(&Facts { redeemed, balance_nano, ..facts(language, "code") })
        };
        assert_eq!(redeemed(Redeemed::Now(500_000_000), None, Language::En), "Added: 0.50 USD");
        let both = redeemed(Redeemed::Now(500_000_000), Some(2_000_000_000), Language::Zh);
        assert_eq!(both, "已充值: 0.50 USD\n余额: 2.00 USD");
        let before = redeemed(Redeemed::Before(500_000_000), None, Language::Zh);
        assert_eq!(before, "您已使用过此充值码，当时已充值: 0.50 USD");
    }

    #[test]
    fn prices_are_those_that_the_group_pays() {
        let both = said("price", Language::En, "");
        assert_eq!(both, "USD per million tokens:\n- `gpt-4o`: input 3.00, output 6.00\n- `call`: 0.015 per call\n");
        assert!(
            said("price", Language::Zh, "GPT").contains("输入 3.00")
                && !said("price", Language::Zh, "GPT").contains("call")
        );
        assert!(said("price", Language::En, "nope").starts_with("No model"));
    }

    #[test]
    fn hi_is_said_in_both_languages() {
        assert_eq!(said("say_hi", Language::En, "Ann"), "Hi, Ann!");
        assert_eq!(said("say_hi", Language::Zh, ""), "你好！");
    }

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
            let facts = facts(language, "");
            let help = (help::ROW.answer)(&facts);
            for row in &COMMANDS {
                assert!(help.contains(&format!("!{}", row.name)), "{help}");
            }
        }
    }
}
