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

/// The line that tells of the balance, where it is known.
pub(super) fn balance(facts: &Facts<'_>) -> Option<String> {
    let label = facts.text(["Balance", "余额"]);
    facts.balance_nano.map(|nano| format!("{label}: {} {}", Nano(nano), facts.currency))
}

fn answer(facts: &Facts<'_>) -> String {
    balance(facts).unwrap_or_default()
}
