//! `/balance_inquiry`, `/bi`: what is left.

use super::{Facts, Needs, Row};
use crate::config::decimal::Nano;

pub(super) const ROW: Row = Row {
    name: "balance_inquiry",
    short: "bi",
    does: ["shows your balance", "查询余额"],
    needs: Needs::Balance,
    answer,
};

fn answer(facts: &Facts<'_>) -> String {
    let label = facts.text(["Balance", "余额"]);
    format!("{label}: {} {}", Nano(facts.balance_nano), facts.currency)
}
