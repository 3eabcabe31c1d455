//! `/say_hi`, `/sh`: says hi, so that a user sees that commands work.

use super::{Facts, Needs, Row};

pub(super) const ROW: Row = Row {
    name: "say_hi",
    short: "sh",
    does: ["says hi: `say_hi [name]`", "打个招呼：`say_hi [名字]`"],
    needs: Needs::Nothing,
    answer,
};

fn answer(facts: &Facts<'_>) -> String {
    match (facts.argument, facts.text(["en", "zh"])) {
        ("", "en") => "Hi!".to_owned(),
        ("", _) => "你好！".to_owned(),
        (name, "en") => format!("Hi, {name}!"),
        (name, _) => format!("你好，{name}！"),
    }
}
