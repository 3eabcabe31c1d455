//! `/redeem`, `/r`: turns a code into money.

use super::balance_inquiry::balance;
use super::{Facts, Needs, Redeemed, Row};
use crate::config::decimal::Nano;

pub(super) const ROW: Row = Row {
    name: "redeem",
    short: "r",
    does: ["turns a code into balance: `redeem <code>`", "兑换充值码：`redeem <充值码>`"],
    needs: Needs::Redeem,
    answer,
};

fn answer(facts: &Facts<'_>) -> String {
    let worth = |label: [&str; 2], nano| format!("{}: {} {}", facts.text(label), Nano(nano), facts.currency);
    let first = match facts.redeemed {
        Redeemed::Now(nano) => worth(["Added", "已充值"], nano),
        Redeemed::Before(nano) => {
            worth(["You have redeemed this code before; it added", "您已使用过此充值码，当时已充值"], nano)
        }
        Redeemed::Worthless => {
            let nothing = [
                "This code is worth nothing: it is unknown, used, expired or revoked.",
                "充值码无效：不存在、已使用、已过期或已作废。",
            ];
            return facts.text(nothing).to_owned();
        }
    };
    [Some(first), balance(facts)].into_iter().flatten().collect::<Vec<_>>().join("\n")
}
