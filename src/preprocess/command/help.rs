//! `/help`, `/h`: lists the commands.

use super::{COMMANDS, Facts, Needs, Row};

pub(super) const ROW: Row =
    Row { name: "help", short: "h", does: ["lists the commands", "列出所有命令"], needs: Needs::Nothing, answer };

fn answer(facts: &Facts<'_>) -> String {
    let prefix = facts.prefix;
    let mut text = facts.text(["Commands:\n", "命令：\n"]).to_owned();
    for row in &COMMANDS {
        text += &format!("- `{prefix}{}` (`{prefix}{}`): {}\n", row.name, row.short, facts.text(row.does));
    }
    text
}
