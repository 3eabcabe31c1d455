//! `/redeem`, `/r`: turns a code into money.

use super::{Facts, Needs, Row};
use crate::config::decimal::Nano;

pub(super) const ROW: Row = Row {
    name: "redeem",
    short: "r",
    does: ["turns a code into balance: `redeem <code>`", "兑换充值码：`redeem <充值码>`"],
    needs: Needs::Redeem,
    answer,
};

fn answer(facts: &Facts<'_>) -> String {
    let balance = Nano(facts.balance_nano);
    match facts.redeemed_nano {
        Some(nano) => {
            let (added, balance_is) = (facts.text(["Added", "已充值"]), facts.text(["Balance", "余额"]));
            format!("{added}: {} {currency}\n{balance_is}: {balance} {currency}", Nano(nano), currency = facts.currency)
        }
        None => facts
            .text([
                "This code is worth nothing: it is unknown, used, expired or revoked.",
                "充值码无效：不存在、已使用、已过期或已作废。",
            ])
            .to_owned(),
    }
}
