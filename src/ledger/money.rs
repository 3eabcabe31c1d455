//! What a call costs: integers only, rounded up once.

use crate::store::PriceRow;

/// Tokens by what they are billed as; `cached_input` is a part of `input`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    pub input: u64,
    pub cached_input: u64,
    pub output: u64,
}

/// Prices are per this many tokens.
const PER_TOKENS: i128 = 1_000_000;
/// More tokens than any call has; keeps tokens times price within 128 bits.
const TOKENS_MAX: u64 = 1 << 40;
/// A ratio of one, in millionths.
pub const RATIO_ONE: i64 = 1_000_000;

/// The cost in nano-units, exact in 128 bits and rounded up to the next nano-unit once; `i64::MAX` where it does not fit.
pub fn cost_nano(price: &PriceRow, tokens: Tokens, ratio_micro: i64) -> i64 {
    let (input, output) = (tokens.input.min(TOKENS_MAX), tokens.output.min(TOKENS_MAX));
    let cached = tokens.cached_input.min(input);
    let per_million = i128::from(input - cached) * i128::from(price.input_nano)
        + i128::from(cached) * i128::from(price.cached_input_nano)
        + i128::from(output) * i128::from(price.output_nano)
        + i128::from(price.per_call_nano) * PER_TOKENS;
    let divisor = PER_TOKENS * i128::from(RATIO_ONE);
    // Beyond 128 bits the cost does not fit in 64 either.
    let Some(scaled) = per_million.checked_mul(i128::from(ratio_micro)) else { return i64::MAX };
    let cost = scaled / divisor + i128::from(scaled % divisor > 0);
    i64::try_from(cost).unwrap_or(i64::MAX)
}

/// The most output tokens for which prompt and output together cost at most `money_nano`; `u64::MAX` when output is free.
pub fn output_affordable(price: &PriceRow, input: u64, money_nano: i64, ratio_micro: i64) -> u64 {
    let prompt = cost_nano(price, Tokens { input, ..Tokens::default() }, ratio_micro);
    if prompt > money_nano {
        return 0;
    }
    let one = i128::from(price.output_nano) * i128::from(ratio_micro);
    if one == 0 {
        return u64::MAX;
    }
    // The prompt's own rounding may cost one nano-unit; taking it off keeps the sum below the money.
    let left = i128::from(money_nano - prompt) * PER_TOKENS * i128::from(RATIO_ONE);
    u64::try_from(left / one).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GPT_4O: PriceRow = PriceRow {
        input_nano: 2_500_000_000,
        cached_input_nano: 1_250_000_000,
        output_nano: 10_000_000_000,
        per_call_nano: 0,
    };

    #[test]
    fn a_million_tokens_cost_the_price() {
        let tokens = Tokens { input: 1_000_000, cached_input: 0, output: 0 };
        assert_eq!(cost_nano(&GPT_4O, tokens, RATIO_ONE), 2_500_000_000);
        let tokens = Tokens { input: 1_000_000, cached_input: 1_000_000, output: 1_000_000 };
        assert_eq!(cost_nano(&GPT_4O, tokens, RATIO_ONE), 11_250_000_000);
    }

    #[test]
    fn a_fraction_of_a_nano_unit_is_rounded_up_once() {
        let price = PriceRow { input_nano: 1, cached_input_nano: 1, output_nano: 1, per_call_nano: 0 };
        assert_eq!(cost_nano(&price, Tokens { input: 1, cached_input: 0, output: 1 }, RATIO_ONE), 1);
        assert_eq!(cost_nano(&price, Tokens::default(), RATIO_ONE), 0);
    }

    #[test]
    fn a_cost_that_does_not_fit_is_the_largest_there_is() {
        let price = PriceRow { input_nano: i64::MAX, cached_input_nano: 0, output_nano: i64::MAX, per_call_nano: 0 };
        let tokens = Tokens { input: u64::MAX, cached_input: 0, output: u64::MAX };
        assert_eq!(cost_nano(&price, tokens, 1_000_000_000), i64::MAX);
    }

    proptest! {
        #[test]
        fn what_is_affordable_costs_no_more_than_the_money(
            input in 0u64..1_000_000, money in 0i64..10_000_000_000, output_nano in 1i64..50_000_000_000, ratio in 1i64..5_000_000
        ) {
            let price = PriceRow { output_nano, ..GPT_4O };
            let output = output_affordable(&price, input, money, ratio);
            if output > 0 {
                let tokens = Tokens { input, cached_input: 0, output };
                prop_assert!(cost_nano(&price, tokens, ratio) <= money);
            }
        }
    }
}
