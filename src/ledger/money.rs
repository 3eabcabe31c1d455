//! What a call costs: integers only, rounded up once.

use crate::config::{Price, Rates};
use crate::meter::Usage;
use crate::store::{Billed, Line};

/// Tokens by what they are billed as: those that have a kind are parts of `input` and of `output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    pub input: u64,
    pub cached_input: u64,
    pub audio_input: u64,
    pub image_input: u64,
    pub output: u64,
    pub reasoning: u64,
    pub audio_output: u64,
    pub image_output: u64,
    /// How often a price per call is charged.
    pub units: u64,
}

impl Default for Tokens {
    /// One call without tokens.
    fn default() -> Tokens {
        Tokens {
            input: 0,
            cached_input: 0,
            audio_input: 0,
            image_input: 0,
            output: 0,
            reasoning: 0,
            audio_output: 0,
            image_output: 0,
            units: 1,
        }
    }
}

/// Rates are per this many tokens.
const PER_TOKENS: i128 = 1_000_000;
/// More tokens than any call has; keeps tokens times price within 128 bits.
const TOKENS_MAX: u64 = 1 << 40;
/// More units than any call has, for the same reason.
const UNITS_MAX: u64 = 1 << 20;
/// A ratio of one, in millionths.
pub const RATIO_ONE: i64 = 1_000_000;

impl Tokens {
    /// Tokens without a kind.
    pub fn plain(input: u64, output: u64) -> Tokens {
        Tokens { input, output, ..Tokens::default() }
    }

    /// What a line was billed by: the kinds are known where the upstream told them.
    pub fn of_line(line: &Line) -> Tokens {
        let (cached_input, units) = (line.cached_input, line.units);
        let plain = Tokens { cached_input, units, ..Tokens::plain(line.input, line.output) };
        match line.billed {
            Billed::Usage => Tokens {
                audio_input: line.usage_audio_input.unwrap_or(0),
                image_input: line.usage_image_input.unwrap_or(0),
                reasoning: line.usage_reasoning.unwrap_or(0),
                audio_output: line.usage_audio_output.unwrap_or(0),
                image_output: line.usage_image_output.unwrap_or(0),
                ..plain
            },
            _ => plain,
        }
    }
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Tokens {
        let Usage { input, cached_input, audio_input, image_input, output, reasoning, audio_output, image_output } =
            usage;
        let units = 1;
        Tokens { input, cached_input, audio_input, image_input, output, reasoning, audio_output, image_output, units }
    }
}

/// The cost in nano-units, exact in 128 bits and rounded up to the next nano-unit once; `i64::MAX` where it does not fit.
///
/// The length of the prompt picks the tier. A token that has two kinds (cached audio) is billed once, as audio before
/// image before cached or reasoning.
pub fn cost_nano(price: &Price, tokens: Tokens, ratio_micro: i64) -> i64 {
    let (_, rates) = price.rates_for(tokens.input);
    let input = [
        (tokens.audio_input, rates.audio_input_nano),
        (tokens.image_input, rates.image_input_nano),
        (tokens.cached_input, rates.cached_input_nano),
    ];
    let output = [
        (tokens.audio_output, rates.audio_output_nano),
        (tokens.image_output, rates.image_output_nano),
        (tokens.reasoning, rates.reasoning_nano),
    ];
    let per_million = sum(tokens.input, input, rates.input_nano) + sum(tokens.output, output, rates.output_nano);
    rounded_up(per_million + calls(price.per_call_nano, tokens.units), ratio_micro)
}

/// A price per call for so many units, in what tokens are summed up in.
fn calls(per_call_nano: i64, units: u64) -> i128 {
    i128::from(per_call_nano) * i128::from(units.min(UNITS_MAX)) * PER_TOKENS
}

/// `whole` tokens, of which parts have rates of their own and the rest the plain one.
fn sum(whole: u64, parts: [(u64, i64); 3], plain_nano: i64) -> i128 {
    let mut left = whole.min(TOKENS_MAX);
    let mut sum = 0;
    for (part, nano) in parts {
        let part = part.min(left);
        left -= part;
        sum += i128::from(part) * i128::from(nano);
    }
    sum + i128::from(left) * i128::from(plain_nano)
}

fn rounded_up(per_million: i128, ratio_micro: i64) -> i64 {
    let divisor = PER_TOKENS * i128::from(RATIO_ONE);
    // Beyond 128 bits the cost does not fit in 64 either.
    let Some(scaled) = per_million.checked_mul(i128::from(ratio_micro)) else { return i64::MAX };
    let cost = scaled / divisor + i128::from(scaled % divisor > 0);
    i64::try_from(cost).unwrap_or(i64::MAX)
}

/// What a call is held for: the dearest that its tokens can turn out to be, whatever their kinds and their tier.
#[derive(Clone, Copy, Debug)]
pub struct Dearest {
    per_call_nano: i64,
    units: u64,
    input_nano: i64,
    output_nano: i64,
    ratio_micro: i64,
}

impl Dearest {
    /// For a prompt of at most `input` tokens. `images` and `audio` say whether it may have such parts.
    pub fn of(price: &Price, input: u64, images: bool, audio: bool, ratio_micro: i64) -> Dearest {
        let tiers = price.tiers.iter().filter(|tier| input > tier.above).map(|tier| &tier.rates);
        let per_call_nano = price.per_call_nano;
        let mut dearest = Dearest { per_call_nano, units: 1, input_nano: 0, output_nano: 0, ratio_micro };
        for rates in std::iter::once(&price.rates).chain(tiers) {
            let Rates { input_nano, cached_input_nano, audio_input_nano, image_input_nano, .. } = *rates;
            let image = if images { image_input_nano } else { 0 };
            let audio = if audio { audio_input_nano } else { 0 };
            let input = input_nano.max(cached_input_nano).max(image).max(audio);
            let Rates { output_nano, reasoning_nano, audio_output_nano, image_output_nano, .. } = *rates;
            // What an answer will be made of is not in our hands.
            let output = output_nano.max(reasoning_nano).max(audio_output_nano).max(image_output_nano);
            dearest.input_nano = dearest.input_nano.max(input);
            dearest.output_nano = dearest.output_nano.max(output);
        }
        dearest
    }

    /// The same for a call whose price per call is charged so often.
    pub fn for_units(self, units: u64) -> Dearest {
        Dearest { units, ..self }
    }

    /// Nano-units, rounded up; `i64::MAX` where it does not fit.
    pub fn cost_nano(&self, input: u64, output: u64) -> i64 {
        let tokens = sum(input, [(0, 0); 3], self.input_nano) + sum(output, [(0, 0); 3], self.output_nano);
        rounded_up(tokens + calls(self.per_call_nano, self.units), self.ratio_micro)
    }

    /// Further output of a call that is held for already.
    pub fn output_nano(&self, output: u64) -> i64 {
        rounded_up(sum(output, [(0, 0); 3], self.output_nano), self.ratio_micro)
    }

    /// The most output tokens for which prompt and output together cost at most `money_nano`; `u64::MAX` when output is
    /// free.
    pub fn output_affordable(&self, input: u64, money_nano: i64) -> u64 {
        let prompt = self.cost_nano(input, 0);
        if prompt > money_nano {
            return 0;
        }
        let one = i128::from(self.output_nano) * i128::from(self.ratio_micro);
        if one == 0 {
            return u64::MAX;
        }
        // The prompt's own rounding may cost one nano-unit; taking it off keeps the sum below the money.
        let left = i128::from(money_nano - prompt) * PER_TOKENS * i128::from(RATIO_ONE);
        u64::try_from(left / one).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Tier;

    fn gpt_4o() -> Price {
        let rates = Rates { cached_input_nano: 1_250_000_000, ..Rates::plain(2_500_000_000, 10_000_000_000) };
        Price { rates, ..Price::default() }
    }

    #[test]
    fn a_million_tokens_cost_the_price() {
        assert_eq!(cost_nano(&gpt_4o(), Tokens::plain(1_000_000, 0), RATIO_ONE), 2_500_000_000);
        let tokens = Tokens { cached_input: 1_000_000, ..Tokens::plain(1_000_000, 1_000_000) };
        assert_eq!(cost_nano(&gpt_4o(), tokens, RATIO_ONE), 11_250_000_000);
    }

    #[test]
    fn a_fraction_of_a_nano_unit_is_rounded_up_once() {
        let price = Price::plain(1, 1);
        assert_eq!(cost_nano(&price, Tokens::plain(1, 1), RATIO_ONE), 1);
        assert_eq!(cost_nano(&price, Tokens::default(), RATIO_ONE), 0);
    }

    #[test]
    fn a_cost_that_does_not_fit_is_the_largest_there_is() {
        let price = Price::plain(i64::MAX, i64::MAX);
        assert_eq!(cost_nano(&price, Tokens::plain(u64::MAX, u64::MAX), 1_000_000_000), i64::MAX);
    }

    #[test]
    fn every_kind_of_token_has_its_own_rate_and_is_billed_once() {
        let rates = Rates {
            input_nano: 1_000_000,
            cached_input_nano: 2_000_000,
            audio_input_nano: 3_000_000,
            image_input_nano: 4_000_000,
            output_nano: 5_000_000,
            reasoning_nano: 6_000_000,
            audio_output_nano: 7_000_000,
            image_output_nano: 8_000_000,
        };
        let price = Price { rates, ..Price::default() };
        let tokens = Tokens {
            input: 10,
            cached_input: 1,
            audio_input: 2,
            image_input: 3,
            output: 10,
            reasoning: 1,
            audio_output: 2,
            image_output: 3,
            units: 1,
        };
        let (input, output) = (4 + 2 + 2 * 3 + 3 * 4, 4 * 5 + 6 + 2 * 7 + 3 * 8);
        assert_eq!(cost_nano(&price, tokens, RATIO_ONE), input + output);
        // Parts that are more than the whole are cut to it.
        let tokens = Tokens { input: 4, cached_input: 9, audio_input: 3, ..Tokens::default() };
        assert_eq!(cost_nano(&price, tokens, RATIO_ONE), 3 * 3 + 2);
    }

    #[test]
    fn a_longer_prompt_is_billed_whole_at_its_tiers_rates() {
        let tiers = vec![Tier { above: 100, rates: Rates::plain(2_000_000, 3_000_000) }];
        let price = Price { tiers, ..Price::plain(1_000_000, 1_000_000) };
        assert_eq!(cost_nano(&price, Tokens::plain(100, 10), RATIO_ONE), 110);
        assert_eq!(cost_nano(&price, Tokens::plain(101, 10), RATIO_ONE), 202 + 30);
    }

    prop_compose! {
        fn rates()(nano in prop::array::uniform8(0i64..50_000_000_000)) -> Rates {
            let [input_nano, cached_input_nano, audio_input_nano, image_input_nano, ..] = nano;
            let [.., output_nano, reasoning_nano, audio_output_nano, image_output_nano] = nano;
            Rates {
                input_nano, cached_input_nano, audio_input_nano, image_input_nano,
                output_nano, reasoning_nano, audio_output_nano, image_output_nano,
            }
        }
    }

    prop_compose! {
        fn price()(per_call_nano in 0i64..1000, base in rates(), tiers in prop::collection::vec(rates(), 0..3)) -> Price {
            let tiers = (1..).zip(tiers).map(|(number, rates)| Tier { above: number * 1000, rates }).collect();
            Price { per_call_nano, rates: base, tiers }
        }
    }

    proptest! {
        #[test]
        fn what_is_affordable_costs_no_more_than_the_money(
            price in price(), input in 0u64..1_000_000, money in 0i64..10_000_000_000, ratio in 1i64..5_000_000
        ) {
            let dearest = Dearest::of(&price, input, true, true, ratio);
            let output = dearest.output_affordable(input, money);
            if output > 0 && output < u64::MAX {
                prop_assert!(dearest.cost_nano(input, output) <= money);
            }
        }

        #[test]
        fn no_call_costs_more_than_what_it_was_held_for(
            price in price(), bound in 0u64..5000, parts in prop::array::uniform8(0u64..5000), ratio in 0i64..5_000_000,
            units in 1u64..20
        ) {
            let [input, cached_input, audio_input, image_input, output, reasoning, audio_output, image_output] = parts;
            let input = input.min(bound);
            let held = Dearest::of(&price, bound, true, true, ratio).for_units(units).cost_nano(bound, output);
            let tokens = Tokens {
                input, cached_input, audio_input, image_input, output, reasoning, audio_output, image_output, units,
            };
            prop_assert!(cost_nano(&price, tokens, ratio) <= held);
        }
    }
}
