//! `/price`, `/p`: what models cost, as the key is charged.

use super::{Facts, Needs, Row};
use crate::config::decimal::Nano;
use crate::config::{Price, Rates};

pub(super) const ROW: Row = Row {
    name: "price",
    short: "p",
    does: ["shows prices of models: `price <part of a name>`", "查询模型价格：`price <模型名的一部分>`"],
    needs: Needs::Models,
    answer,
};

/// Models that are listed; more are told by their number.
const LISTED_MAX: usize = 50;

fn answer(facts: &Facts<'_>) -> String {
    let part = facts.argument.to_lowercase();
    let matching = facts.models.iter().filter(|(name, _)| name.to_lowercase().contains(&part));
    let matching: Vec<&(String, Price)> = matching.collect();
    if matching.is_empty() {
        return facts
            .text(["No model that you may use has this in its name.", "没有名称匹配且可用的模型。"])
            .to_owned();
    }
    let unit = facts.text(["per million tokens", "每百万 token"]);
    let mut text = format!("{} {unit}:\n", facts.currency);
    matching.iter().take(LISTED_MAX).for_each(|(name, price)| text += &line(facts, name, price));
    if matching.len() > LISTED_MAX {
        let more = facts.text(["more; give more of the name", "个未列出，请输入更多字符"]);
        text += &format!("- … +{} {more}\n", matching.len() - LISTED_MAX);
    }
    text
}

fn line(facts: &Facts<'_>, name: &str, price: &Price) -> String {
    let amount = |nano: i64| scaled(nano, facts.ratio_micro);
    if !price.is_by_tokens() {
        return format!("- `{name}`: {} {}\n", amount(price.per_call_nano), facts.text(["per call", "每次"]));
    }
    let rates = |rates: &Rates| {
        let (input, output) = (amount(rates.input_nano), amount(rates.output_nano));
        let cached = match rates.cached_input_nano == rates.input_nano {
            true => String::new(),
            false => format!(", {} {}", facts.text(["cached", "缓存输入"]), amount(rates.cached_input_nano)),
        };
        format!("{} {input}{cached}, {} {output}", facts.text(["input", "输入"]), facts.text(["output", "输出"]))
    };
    let mut line = format!("- `{name}`: {}", rates(&price.rates));
    for tier in &price.tiers {
        let above = facts.text(["above", "输入超过"]);
        line += &format!("; {above} {}: {}", tier.above, rates(&tier.rates));
    }
    line + "\n"
}

/// A price times the group's ratio, in decimals; what is below a nano-unit is cut off, it is only shown.
fn scaled(nano: i64, ratio_micro: i64) -> String {
    let scaled = i128::from(nano) * i128::from(ratio_micro) / 1_000_000;
    Nano(i64::try_from(scaled).unwrap_or(i64::MAX)).to_string()
}
