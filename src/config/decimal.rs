//! Reads and writes decimal amounts as whole nano-units (10⁻⁹), never by way of a float.

use std::fmt;
use std::str::FromStr;

/// Nano-units in one unit of the currency.
pub const NANO: i64 = 1_000_000_000;

/// The largest amount, in units, either side of zero: the most round number whose nano-units fit an `i64`.
pub const UNITS_MAX: i64 = 9_000_000_000;

/// The digits after the point that a nano-unit can hold.
const DECIMALS_MAX: usize = 9;

/// An amount in nano-units; shown in units with at least two decimals: `1.25`, `-0.10`, `0.000000001`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nano(pub i64);

impl fmt::Display for Nano {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (units, rest) = (self.0.unsigned_abs() / NANO as u64, self.0.unsigned_abs() % NANO as u64);
        let decimals = format!("{rest:09}");
        let shown = decimals.trim_end_matches('0').len().max(2);
        f.pad_integral(self.0 >= 0, "", &format!("{units}.{}", &decimals[..shown]))
    }
}

impl FromStr for Nano {
    type Err = String;

    /// Reads what `Display` writes: a decimal as [`parse_nano`] takes it, with an optional `-` before it.
    fn from_str(text: &str) -> Result<Nano, String> {
        match text.strip_prefix('-') {
            Some(amount) => parse_nano(amount).map(|nano| Nano(-nano)),
            None => parse_nano(text).map(Nano),
        }
    }
}

/// Reads `2.50` as 2,500,000,000 nano-units, exactly.
///
/// Takes ASCII digits, then at most one point with one to nine digits after it, up to [`UNITS_MAX`]. A sign, an
/// exponent, a blank or a tenth decimal is an error, which says what is wrong without repeating the text.
pub fn parse_nano(text: &str) -> Result<i64, String> {
    let (units, decimals) = match text.split_once('.') {
        Some((units, decimals)) => (units, Some(decimals)),
        None => (text, None),
    };
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(units) || !decimals.is_none_or(is_digits) {
        return Err("expected digits and at most one point, such as 2.50".to_owned());
    }
    let decimals = decimals.unwrap_or_default();
    if decimals.len() > DECIMALS_MAX {
        return Err(format!("expected at most {DECIMALS_MAX} decimals, found {}", decimals.len()));
    }
    let too_large = || format!("expected at most {UNITS_MAX}");
    let units: i64 = units.parse().ok().filter(|units| *units <= UNITS_MAX).ok_or_else(too_large)?;
    let rest = decimals.bytes().chain(std::iter::repeat(b'0')).take(DECIMALS_MAX);
    let rest = rest.fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'));
    if units == UNITS_MAX && rest > 0 {
        return Err(too_large());
    }
    Ok(units * NANO + rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_price_is_held_to_the_last_nano_unit() {
        assert_eq!(parse_nano("2.50"), Ok(2_500_000_000));
        assert_eq!(parse_nano("0.000000001"), Ok(1));
        assert_eq!(parse_nano("0"), Ok(0));
        assert_eq!(parse_nano("007"), Ok(7 * NANO));
        assert_eq!(parse_nano("9000000000.000000000"), Ok(UNITS_MAX * NANO));
    }

    #[test]
    fn signs_exponents_blanks_and_half_numbers_are_refused() {
        for text in ["", ".", ".5", "5.", "+1", "-1", "1e3", "1_000", "1,5", " 1", "1 ", "1.2.3", "0x1", "NaN", "١"] {
            assert!(parse_nano(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_tenth_decimal_is_refused_even_if_it_is_zero() {
        assert_eq!(parse_nano("0.0000000010"), Err("expected at most 9 decimals, found 10".to_owned()));
    }

    #[test]
    fn an_amount_past_the_bound_is_refused() {
        for text in ["9000000000.000000001", "9000000001", "99999999999999999999999999"] {
            assert_eq!(parse_nano(text), Err("expected at most 9000000000".to_owned()), "{text}");
        }
    }

    #[test]
    fn an_amount_shows_two_decimals_or_as_many_as_it_needs() {
        let shown = [(1_250_000_000, "1.25"), (0, "0.00"), (1, "0.000000001"), (-100_000_000, "-0.10"), (NANO, "1.00")];
        for (nano, text) in shown {
            assert_eq!(Nano(nano).to_string(), text);
        }
        assert_eq!(Nano(i64::MIN).to_string(), "-9223372036.854775808");
        assert_eq!(format!("{:>8}", Nano(-NANO)), "   -1.00");
    }

    proptest! {
        #[test]
        fn every_amount_within_bounds_reads_back_as_it_was(nano in -UNITS_MAX * NANO..=UNITS_MAX * NANO) {
            prop_assert_eq!(Nano(nano).to_string().parse(), Ok(Nano(nano)));
        }

        #[test]
        fn no_text_panics_and_what_is_read_is_within_bounds(text in "[-+0-9.eE_ ]{0,30}") {
            if let Ok(Nano(nano)) = text.parse() {
                prop_assert!(nano.abs() <= UNITS_MAX * NANO);
            }
        }
    }
}
