//! `/template`, `/t`: lists, shows, saves and deletes templates. `/t <name>` alone is no command: its message is replaced
//! before the steps run, so it comes here only where there is no template of this name.

use super::super::template::DESCRIPTION_CHARS_MAX;
use super::{Facts, Needs, Outcome, Row};
use crate::store::TemplateRow;

pub(super) const ROW: Row = Row {
    name: "template",
    short: "t",
    does: [
        "puts stored messages into the conversation: `t <name>`; `t help` tells more",
        "在对话中插入模板：`t <名称>`；详见 `t help`",
    ],
    needs: Needs::Templates,
    answer,
};

/// Both names of the command.
pub const TEMPLATE: [&str; 2] = [ROW.name, ROW.short];
/// Words that are subcommands, and so no names.
pub const SAVED: [&str; 5] = ["help", "list", "show", "delete", "end-template"];

/// Templates that are listed; more are told by their number.
const LISTED_MAX: usize = 200;

/// What stands behind the command, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    Help,
    List,
    Show(&'a str),
    Delete(&'a str),
    Save {
        name: &'a str,
        description: &'a str,
    },
    /// Anything else: a name that is not there.
    Other(&'a str),
}

impl<'a> Asked<'a> {
    pub fn of(argument: &'a str) -> Asked<'a> {
        let (word, rest) = split(argument);
        let (name, behind) = split(rest);
        match word {
            "" | "help" => Asked::Help,
            "list" if rest.is_empty() => Asked::List,
            "show" => Asked::Show(name),
            "delete" => Asked::Delete(name),
            "end-template" => Asked::Save { name, description: cut(behind) },
            _ => Asked::Other(word),
        }
    }
}

fn split(text: &str) -> (&str, &str) {
    text.split_once(char::is_whitespace).map_or((text, ""), |(word, rest)| (word, rest.trim()))
}

fn cut(description: &str) -> &str {
    description.char_indices().nth(DESCRIPTION_CHARS_MAX).map_or(description, |(end, _)| &description[..end])
}

fn answer(facts: &Facts<'_>) -> String {
    let prefix = facts.prefix;
    match (Asked::of(facts.argument), &facts.outcome) {
        (_, Outcome::Refused(why)) => format!("{}: {why}", facts.text(["Not done", "未完成"])),
        (Asked::Help, _) => {
            let help = facts.text([
                "A message that is only `{p}t <name>` is replaced by the template's messages.\n\
                 - `{p}t list`: your templates and the public ones\n\
                 - `{p}t show <name>`: its messages\n\
                 - `{p}t end-template <name> <description>`: saves the conversation so far as a template of yours\n\
                 - `{p}t delete <name>`: deletes one of yours\n",
                "只含 `{p}t <名称>` 的消息会被替换为模板中的消息。\n\
                 - `{p}t list`：列出你的模板和公共模板\n\
                 - `{p}t show <名称>`：显示模板内容\n\
                 - `{p}t end-template <名称> <描述>`：把当前对话保存为你的模板\n\
                 - `{p}t delete <名称>`：删除你的模板\n",
            ]);
            help.replace("{p}", prefix) + &listed(facts)
        }
        (Asked::List, _) => listed(facts),
        (Asked::Show(_), Outcome::Shown(messages)) => format!("```json\n{messages}\n```"),
        (Asked::Save { name, .. }, Outcome::Saved { before }) => {
            let texts = match before {
                false => ["Saved. Use it with", "已保存。使用方法："],
                true => ["Saved over the template that had this name. Use it with", "已覆盖同名模板。使用方法："],
            };
            format!("{} `{prefix}t {name}`", facts.text(texts))
        }
        (Asked::Delete(_), Outcome::Deleted) => facts.text(["Deleted.", "已删除。"]).to_owned(),
        (Asked::Show(name) | Asked::Delete(name) | Asked::Save { name, .. } | Asked::Other(name), _) => {
            let none = facts.text(["There is no template of this name", "没有这个模板"]);
            format!("{none}: `{name}`\n{}", listed(facts))
        }
    }
}

fn listed(facts: &Facts<'_>) -> String {
    let mut text = String::new();
    let (own, public): (Vec<_>, Vec<_>) = facts.templates.iter().partition(|template| template.user_id.is_some());
    for (title, templates) in [(["Yours:", "你的模板："], own), (["Public:", "公共模板："], public)] {
        if templates.is_empty() {
            continue;
        }
        text += &format!("{}\n", facts.text(title));
        templates.iter().take(LISTED_MAX).for_each(|template| text += &line(facts.prefix, template));
        if let Some(more) = templates.len().checked_sub(LISTED_MAX + 1) {
            text += &format!("- … +{}\n", more + 1);
        }
    }
    if text.is_empty() { facts.text(["There are no templates.", "目前没有模板。"]).to_owned() } else { text }
}

fn line(prefix: &str, template: &TemplateRow) -> String {
    format!("- `{prefix}t {}` {}\n", template.name, template.description)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_behind_the_command_is_taken_apart() {
        assert_eq!(Asked::of(""), Asked::Help);
        assert_eq!(Asked::of("show  翻译 x"), Asked::Show("翻译"));
        assert_eq!(Asked::of("end-template a  some words "), Asked::Save { name: "a", description: "some words" });
        assert_eq!(Asked::of("nope x"), Asked::Other("nope"));
        let long = format!("end-template a {}", "é".repeat(300));
        assert!(matches!(Asked::of(&long), Asked::Save { description, .. } if description.chars().count() == 256));
    }
}
