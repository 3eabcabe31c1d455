//! What a model costs.

use serde::{Deserialize, Serialize};

/// What a model costs: by tokens or by call, the other kind is 0. All at least 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// Nano-units per call.
    pub per_call_nano: i64,
    pub rates: Rates,
    /// Rates of longer prompts, the shortest first; at most [`TIERS_MAX`].
    pub tiers: Vec<Tier>,
}

/// Most tiers of a price: providers have two to four.
pub const TIERS_MAX: usize = 8;

/// Nano-units per million tokens, by kind of token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    pub input_nano: i64,
    pub cached_input_nano: i64,
    pub audio_input_nano: i64,
    pub image_input_nano: i64,
    pub output_nano: i64,
    pub reasoning_nano: i64,
    pub audio_output_nano: i64,
    pub image_output_nano: i64,
}

/// What calls cost whose prompt is longer than `above` tokens, the whole call at these rates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tier {
    /// Tokens.
    pub above: u64,
    #[serde(flatten)]
    pub rates: Rates,
}

impl Rates {
    /// One rate for all that goes in, one for all that comes out.
    pub fn plain(input_nano: i64, output_nano: i64) -> Rates {
        Rates {
            input_nano,
            cached_input_nano: input_nano,
            audio_input_nano: input_nano,
            image_input_nano: input_nano,
            output_nano,
            reasoning_nano: output_nano,
            audio_output_nano: output_nano,
            image_output_nano: output_nano,
        }
    }
}

impl Price {
    /// A price without tiers; see [`Rates::plain`].
    pub fn plain(input_nano: i64, output_nano: i64) -> Price {
        Price { rates: Rates::plain(input_nano, output_nano), ..Price::default() }
    }

    /// Whether it depends on tokens.
    pub fn is_by_tokens(&self) -> bool {
        self.rates != Rates::default() || !self.tiers.is_empty()
    }

    /// The rates for a prompt of so many tokens, and which tier that is: 0 is the first, without a bound.
    pub fn rates_for(&self, input: u64) -> (usize, &Rates) {
        let tier = self.tiers.iter().take_while(|tier| input > tier.above).count();
        (tier, tier.checked_sub(1).map_or(&self.rates, |last| &self.tiers[last].rates))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_as_long_as_a_tiers_bound_is_below_it() {
        let tiers = [(100, 2), (200, 3)].map(|(above, nano)| Tier { above, rates: Rates::plain(nano, nano) }).to_vec();
        let price = Price { tiers, ..Price::plain(1, 1) };
        let found =
            [0, 100, 101, 200, 201].map(|input| (price.rates_for(input).0, price.rates_for(input).1.input_nano));
        assert_eq!(found, [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3)]);
    }
}
