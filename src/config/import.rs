//! Turns the community's list of prices into a file of prices of ours.
//!
//! The list is LiteLLM's `model_prices_and_context_window.json`: an object of models, whose prices are USD a token as
//! floats, such as `2.5e-06`. See <https://docs.litellm.ai/docs/provider_registration/add_model_pricing>.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value};

use super::check::{ITEMS_MAX, is_name};
use super::decimal::Nano;
use super::layers::FILE_BYTES_MAX;
use super::{Price, Rates, TIERS_MAX, Tier};

/// Largest list, in bytes: LiteLLM's has 1.5 MB.
pub const LIST_BYTES_MAX: usize = 64 << 20;

/// An entry that shows the format, and no model.
const SAMPLE: &str = "sample_spec";
/// Nano-units per million tokens, from units a token: ten to the power of nine and six.
const EXPONENT: i32 = 15;
/// A kind of token, the end of its name in the list, and where it goes.
type Kind = (&'static str, fn(&mut Rates) -> &mut i64);
/// Every kind but plain input and output.
const KINDS: [Kind; 6] = [
    ("cache_read_input_token_cost", |rates| &mut rates.cached_input_nano),
    ("input_cost_per_audio_token", |rates| &mut rates.audio_input_nano),
    ("input_cost_per_image_token", |rates| &mut rates.image_input_nano),
    ("output_cost_per_reasoning_token", |rates| &mut rates.reasoning_nano),
    ("output_cost_per_audio_token", |rates| &mut rates.audio_output_nano),
    ("output_cost_per_image_token", |rates| &mut rates.image_output_nano),
];
/// Prices of a call, where there is none for tokens.
const PER_CALL: [&str; 2] = ["input_cost_per_query", "input_cost_per_request"];

/// What came of an import.
#[derive(Debug, PartialEq, Eq)]
pub struct Imported {
    /// TOML: `[models]`, an entry a line.
    pub text: String,
    /// Entries in it.
    pub models: usize,
    /// Entries that have no price by tokens or by call, such as prices by the second or by the image.
    pub skipped: Vec<String>,
    /// Prices of entries that were taken which have no place in ours, such as those of writing a cache, and how many
    /// entries have each.
    pub ignored: BTreeMap<String, usize>,
}

/// A model of the list, as far as it can be said in ours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    price: Price,
    context: Option<u64>,
    max_output: Option<u64>,
    ignored: Vec<String>,
}

impl Entry {
    /// Whether it comes to the same, charged here.
    fn agrees(&self, other: &Entry) -> bool {
        (&self.price, self.context, self.max_output) == (&other.price, other.context, other.max_output)
    }
}

/// Reads a list. `wanted` names what to take, `NAME` or `NAME=ENTRY` for an entry under another name; nothing: all of it.
///
/// An entry `provider/model` stands for `model`, too, where no entry has that name and all that end in it agree.
/// Fails where the list is none, has not what is wanted, or has more than a server reads.
pub fn litellm(list: &str, wanted: &[String]) -> Result<Imported, String> {
    if list.len() > LIST_BYTES_MAX {
        return Err(format!("expected at most {LIST_BYTES_MAX} bytes"));
    }
    let list: Map<String, Value> =
        serde_json::from_str(list).map_err(|error| format!("expected a JSON object of models: {error}"))?;
    let mut skipped = Vec::new();
    let mut entries = BTreeMap::new();
    for (name, fields) in list.iter().filter(|(name, _)| *name != SAMPLE) {
        match fields.as_object().and_then(entry).filter(|_| is_name(name)) {
            Some(entry) => drop(entries.insert(name.clone(), entry)),
            None => skipped.push(name.clone()),
        }
    }
    let mut known = entries.clone();
    known.extend(short_names(&entries, &list));
    let taken = match wanted {
        [] => known,
        wanted => {
            skipped.clear();
            wanted.iter().map(|wanted| pick(&known, wanted)).collect::<Result<_, String>>()?
        }
    };
    let mut text = "# Prices in USD per million tokens, written by `gpt-cat prices import`.\n[models]\n".to_owned();
    taken.iter().for_each(|(name, entry)| write_entry(&mut text, name, entry));
    // What a server would refuse to start with.
    if taken.len() > ITEMS_MAX || text.len() > FILE_BYTES_MAX {
        return Err(format!(
            "expected at most {ITEMS_MAX} models in {FILE_BYTES_MAX} bytes, found {} in {}: name those that you serve",
            taken.len(),
            text.len()
        ));
    }
    let mut ignored = BTreeMap::new();
    for field in taken.values().flat_map(|entry| &entry.ignored) {
        *ignored.entry(field.clone()).or_insert(0) += 1;
    }
    Ok(Imported { text, models: taken.len(), skipped, ignored })
}

fn pick(known: &BTreeMap<String, Entry>, wanted: &str) -> Result<(String, Entry), String> {
    let (name, entry) = wanted.split_once('=').unwrap_or((wanted, wanted));
    if !is_name(name) {
        return Err(format!("expected a model's name without blanks, found {name:?}"));
    }
    let found = known.get(entry).ok_or_else(|| {
        let likely = known.keys().filter(|key| key.contains(entry)).take(5).map(String::as_str).collect::<Vec<_>>();
        match likely.as_slice() {
            [] => format!("the list has no price for {entry:?}"),
            likely => format!(
                "the list has no price for {entry:?}, or several; NAME=ENTRY picks one, such as {}",
                likely.join(", ")
            ),
        }
    })?;
    Ok((name.to_owned(), found.clone()))
}

/// `model` for every `provider/model`, where that is one price, and the list has no entry of that name.
fn short_names(entries: &BTreeMap<String, Entry>, list: &Map<String, Value>) -> BTreeMap<String, Entry> {
    let mut short = BTreeMap::<String, Option<Entry>>::new();
    for (name, entry) in entries {
        let Some((_, model)) = name.rsplit_once('/').filter(|(_, model)| !list.contains_key(*model)) else {
            continue;
        };
        let agreed = short.entry(model.to_owned()).or_insert_with(|| Some(entry.clone()));
        if !agreed.as_ref().is_some_and(|agreed| agreed.agrees(entry)) {
            *agreed = None;
        }
    }
    short.into_iter().filter(|(name, _)| is_name(name)).filter_map(|(name, entry)| Some((name, entry?))).collect()
}

fn entry(fields: &Map<String, Value>) -> Option<Entry> {
    let tokens =
        |name: &str| fields.get(name).and_then(Value::as_f64).filter(|n| (1.0..1e12).contains(n)).map(|n| n as u64);
    let context = tokens("max_input_tokens").or_else(|| tokens("max_tokens"));
    let max_output = tokens("max_output_tokens").map(|most| most.min(context.unwrap_or(most)));
    let price = price(fields)?;
    let ignored =
        fields.iter().filter(|(name, value)| is_price(value) && name.contains("cost") && !is_read(name, &price));
    let ignored = ignored.map(|(name, _)| name.clone()).collect();
    Some(Entry { price, context, max_output, ignored })
}

/// Whether a field is one: a number above zero, or several.
fn is_price(value: &Value) -> bool {
    value.as_f64().is_some_and(|units| units > 0.0) || value.is_object() || value.is_array()
}

/// Whether a price of this name is among those that `price` was made of.
fn is_read(name: &str, price: &Price) -> bool {
    let what = if above_of(name).is_some() { name.split_once("_above_").map_or(name, |(what, _)| what) } else { name };
    let of_tokens = ["input_cost_per_token", "output_cost_per_token"].contains(&what)
        || KINDS.iter().any(|(kind, _)| what == *kind);
    if price.per_call_nano > 0 { PER_CALL.contains(&name) } else { of_tokens }
}

fn price(fields: &Map<String, Value>) -> Option<Price> {
    match rates(fields, "") {
        Some(rates) => Some(Price { per_call_nano: 0, rates, tiers: tiers(fields, &rates) }),
        // `tiered_pricing` alone: the first tier is for the shortest prompts.
        None => match tiered(fields).split_first() {
            Some((first, rest)) => Some(Price { per_call_nano: 0, rates: first.rates, tiers: rest.to_vec() }),
            None => {
                // A millionth of what a million would cost.
                let per_call = PER_CALL.iter().find_map(|name| nano_per_million(fields.get(*name)?))? / 1_000_000;
                (per_call > 0).then(|| Price { per_call_nano: per_call, ..Price::default() })
            }
        },
    }
}

/// The rates whose names end in `suffix`; `None` without one for input and one for output, or where both are zero: the
/// list says so of models whose price it does not know.
fn rates(fields: &Map<String, Value>, suffix: &str) -> Option<Rates> {
    let given = |name: &str| nano_per_million(fields.get(&format!("{name}{suffix}"))?);
    let embeds = fields.get("mode").and_then(Value::as_str) == Some("embedding");
    let input = given("input_cost_per_token")?;
    let output = given("output_cost_per_token").or(embeds.then_some(0))?;
    let mut rates = Rates::plain(input, output);
    for (name, rate) in KINDS {
        if let Some(nano) = given(name) {
            *rate(&mut rates) = nano;
        }
    }
    (suffix.is_empty() && input == 0 && output == 0).then_some(()).map_or(Some(rates), |()| None)
}

/// `input_cost_per_token_above_128k_tokens` and its kind, or `tiered_pricing`.
fn tiers(fields: &Map<String, Value>, base: &Rates) -> Vec<Tier> {
    let mut bounds: Vec<u64> = fields.keys().filter_map(|name| above_of(name)).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let mut tiers: Vec<Tier> = Vec::new();
    for above in bounds.into_iter().take(TIERS_MAX) {
        let suffix = format!("_above_{}k_tokens", above / 1000);
        // What a tier does not change stays as it was below it.
        let mut rates = tiers.last().map_or(*base, |last| last.rates);
        let given = |name: &str| nano_per_million(fields.get(&format!("{name}{suffix}"))?);
        if let Some(input) = given("input_cost_per_token") {
            let before = rates.input_nano;
            for rate in [&mut rates.cached_input_nano, &mut rates.audio_input_nano, &mut rates.image_input_nano] {
                *rate = if *rate == before { input } else { *rate };
            }
            rates.input_nano = input;
        }
        if let Some(output) = given("output_cost_per_token") {
            let before = rates.output_nano;
            for rate in [&mut rates.reasoning_nano, &mut rates.audio_output_nano, &mut rates.image_output_nano] {
                *rate = if *rate == before { output } else { *rate };
            }
            rates.output_nano = output;
        }
        for (name, rate) in KINDS {
            if let Some(nano) = given(name) {
                *rate(&mut rates) = nano;
            }
        }
        tiers.push(Tier { above, rates });
    }
    if tiers.is_empty() { tiered(fields).into_iter().filter(|tier| tier.above > 0).collect() } else { tiers }
}

/// The bound in a name such as `input_cost_per_token_above_128k_tokens`.
fn above_of(name: &str) -> Option<u64> {
    let (what, bound) = name.split_once("_above_")?;
    let is_price = what.ends_with("cost_per_token") || KINDS.iter().any(|(kind, _)| what == *kind);
    let thousands: u64 = bound.strip_suffix("k_tokens")?.parse().ok()?;
    is_price.then_some(thousands.checked_mul(1000)?)
}

/// `tiered_pricing`: an array of `{"range": [above, to], "input_cost_per_token": …}`, the shortest first.
fn tiered(fields: &Map<String, Value>) -> Vec<Tier> {
    let listed = fields.get("tiered_pricing").and_then(Value::as_array).into_iter().flatten();
    let read = |tier: &Value| {
        let fields = tier.as_object()?;
        let above = fields.get("range")?.as_array()?.first()?.as_f64().filter(|n| (0.0..1e12).contains(n))?;
        Some(Tier { above: above as u64, rates: rates(fields, "")? })
    };
    let tiers: Option<Vec<Tier>> = listed.take(TIERS_MAX).map(read).collect();
    tiers.filter(|tiers| tiers.is_sorted_by(|one, other| one.above < other.above)).unwrap_or_default()
}

/// Units a token as nano-units per million tokens: exactly what was typed, since the shortest text of a float is that.
fn nano_per_million(typed: &Value) -> Option<i64> {
    let units = typed.as_f64().filter(|units| *units >= 0.0)?;
    let shortest = format!("{units:e}");
    let (digits, exponent) = shortest.split_once('e')?;
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let mantissa: i128 = digits.replace('.', "").parse().ok()?;
    let exponent = exponent.parse::<i32>().ok()? - i32::try_from(decimals).ok()? + EXPONENT;
    let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
    // Beyond a nano-unit per million tokens: rounded up, as costs are.
    let nano = if exponent >= 0 { mantissa.checked_mul(power)? } else { (mantissa + power - 1) / power };
    i64::try_from(nano).ok()
}

fn write_entry(text: &mut String, name: &str, entry: &Entry) {
    let Entry { price, context, max_output, .. } = entry;
    let mut fields = match price.per_call_nano {
        0 => rates_text(&price.rates),
        per_call => vec![format!("per_call = \"{}\"", Nano(per_call))],
    };
    if !price.tiers.is_empty() {
        let tier = |tier: &Tier| format!("{{ above = {}, {} }}", tier.above, rates_text(&tier.rates).join(", "));
        fields.push(format!("tiers = [{}]", price.tiers.iter().map(tier).collect::<Vec<_>>().join(", ")));
    }
    fields.extend(context.map(|tokens| format!("context = {tokens}")));
    fields.extend(max_output.map(|tokens| format!("max_output = {tokens}")));
    // A name has no blanks and no control characters, so JSON's quotes are TOML's.
    let _ = writeln!(text, "{} = {{ {} }}", Value::from(name), fields.join(", "));
}

fn rates_text(rates: &Rates) -> Vec<String> {
    let plain = Rates::plain(rates.input_nano, rates.output_nano);
    let all = |rates: &Rates| {
        [
            ("input", rates.input_nano),
            ("cached_input", rates.cached_input_nano),
            ("audio_input", rates.audio_input_nano),
            ("image_input", rates.image_input_nano),
            ("output", rates.output_nano),
            ("reasoning", rates.reasoning_nano),
            ("audio_output", rates.audio_output_nano),
            ("image_output", rates.image_output_nano),
        ]
    };
    let own =
        |((name, nano), (_, plain)): &((&str, i64), (&str, i64))| ["input", "output"].contains(name) || nano != plain;
    let told = all(rates).into_iter().zip(all(&plain)).filter(own);
    told.map(|((name, nano), _)| format!("{name} = \"{}\"", Nano(nano))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Files};
    use super::*;

    fn imported(list: &str, wanted: &[&str]) -> Imported {
        litellm(list, &wanted.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    /// The price that a server has that was given the imported file.
    fn loaded(list: &str, model: &str) -> (Price, u64, u64) {
        let prices = imported(list, &[]).text;
        let file = format!("[endpoints.x]\ndialect = \"openai\"\nmodels = [{model:?}]");
        let files = Files { config: Some(&file), prices: Some(&prices) };
        let config = Config::load(files, [], &["openai"]).unwrap_or_else(|errors| panic!("{errors}\n{prices}"));
        let model = &config.models[model];
        (model.price.clone(), model.context, model.max_output)
    }

    #[test]
    fn floats_a_token_become_exact_prices_a_million() {
        for (typed, nano) in [
            ("2.5e-06", 2_500_000_000),
            ("1.5e-7", 150_000_000),
            ("0.00003", 30_000_000_000),
            ("7.5e-08", 75_000_000),
            ("1e-15", 1),
            ("1e-16", 1),
            ("0", 0),
            ("0.0", 0),
        ] {
            assert_eq!(nano_per_million(&serde_json::from_str(typed).unwrap()), Some(nano), "{typed}");
        }
        for typed in ["-1e-6", "\"2.5e-06\"", "null", "1e300"] {
            assert_eq!(nano_per_million(&serde_json::from_str(typed).unwrap()), None, "{typed}");
        }
    }

    #[test]
    fn kinds_and_sizes_are_read() {
        let list = r#"{"sample_spec":{"input_cost_per_token":0},"gpt-4o-audio":{"input_cost_per_token":2.5e-06,
            "output_cost_per_token":1e-05,"cache_read_input_token_cost":1.25e-06,"input_cost_per_audio_token":4e-05,
            "output_cost_per_audio_token":8e-05,"max_input_tokens":128000,"max_output_tokens":16384,"max_tokens":16384,
            "litellm_provider":"openai","mode":"chat","supports_vision":true}}"#;
        let rates = Rates {
            cached_input_nano: 1_250_000_000,
            audio_input_nano: 40_000_000_000,
            audio_output_nano: 80_000_000_000,
            ..Rates::plain(2_500_000_000, 10_000_000_000)
        };
        assert_eq!(loaded(list, "gpt-4o-audio"), (Price { rates, ..Price::default() }, 128_000, 16_384));
    }

    #[test]
    fn tiers_by_suffix_keep_what_they_do_not_change() {
        let list = r#"{"gemini":{"input_cost_per_token":1.25e-06,"output_cost_per_token":1e-05,
            "cache_read_input_token_cost":1.25e-07,"input_cost_per_token_above_200k_tokens":2.5e-06,
            "output_cost_per_token_above_200k_tokens":1.5e-05,"max_input_tokens":1048576,"max_output_tokens":65535}}"#;
        let rates = Rates { cached_input_nano: 125_000_000, ..Rates::plain(1_250_000_000, 10_000_000_000) };
        let above = Rates { cached_input_nano: 125_000_000, ..Rates::plain(2_500_000_000, 15_000_000_000) };
        let price = Price { per_call_nano: 0, rates, tiers: vec![Tier { above: 200_000, rates: above }] };
        assert_eq!(loaded(list, "gemini"), (price, 1_048_576, 65_535));
    }

    #[test]
    fn tiered_pricing_is_read_without_a_price_beside_it() {
        let list = r#"{"dashscope/qwen-flash":{"mode":"chat","max_input_tokens":997952,"max_output_tokens":32768,
            "tiered_pricing":[{"input_cost_per_token":5e-08,"output_cost_per_token":4e-07,"range":[0,256000.0]},
            {"input_cost_per_token":2.5e-07,"output_cost_per_token":2e-06,"output_cost_per_reasoning_token":4e-06,
            "range":[256000.0,1000000.0]}]}}"#;
        let above = Rates { reasoning_nano: 4_000_000_000, ..Rates::plain(250_000_000, 2_000_000_000) };
        let tiers = vec![Tier { above: 256_000, rates: above }];
        let price = Price { tiers, ..Price::plain(50_000_000, 400_000_000) };
        assert_eq!(loaded(list, "qwen-flash"), (price, 997_952, 32_768), "under the short name, too");
    }

    #[test]
    fn what_has_no_price_by_tokens_or_by_call_is_named() {
        let list = r#"{"dall-e":{"input_cost_per_pixel":1e-8,"mode":"image_generation"},"free":{"input_cost_per_token":0,
            "output_cost_per_token":0},"odd":3,"rerank":{"input_cost_per_query":0.002,"input_cost_per_token":0.0,
            "output_cost_per_token":0.0},"emb":{"mode":"embedding","input_cost_per_token":2e-8}}"#;
        let found = imported(list, &[]);
        assert_eq!((found.models, found.skipped), (2, vec!["dall-e".to_owned(), "free".to_owned(), "odd".to_owned()]));
        assert_eq!(loaded(list, "rerank").0, Price { per_call_nano: 2_000_000, ..Price::default() });
        assert_eq!(loaded(list, "emb").0, Price::plain(20_000_000, 0));
    }

    #[test]
    fn a_short_name_that_could_be_two_prices_has_to_be_picked() {
        let list = r#"{"a/m":{"input_cost_per_token":1e-6,"output_cost_per_token":1e-6},
            "b/m":{"input_cost_per_token":2e-6,"output_cost_per_token":2e-6}}"#;
        assert_eq!(imported(list, &[]).models, 2);
        assert!(litellm(list, &["m".to_owned()]).unwrap_err().contains("such as a/m, b/m"));
        let picked = imported(list, &["m=b/m"]);
        assert!(picked.text.ends_with("\"m\" = { input = \"2.00\", output = \"2.00\" }\n"), "{}", picked.text);
    }

    #[test]
    fn an_entry_without_a_price_of_ours_lends_its_name_to_no_other() {
        let list = r#"{"m":{"input_cost_per_second":1e-6},
            "b/m":{"input_cost_per_token":2e-6,"output_cost_per_token":2e-6}}"#;
        let found = imported(list, &[]);
        assert_eq!((found.models, found.skipped), (1, vec!["m".to_owned()]));
        assert!(!found.text.contains("\"m\" ="), "{}", found.text);
    }

    #[test]
    fn prices_that_are_not_charged_are_named_for_what_is_taken() {
        let list = r#"{"m":{"input_cost_per_token":1e-6,"output_cost_per_token":2e-6,"cache_creation_input_token_cost":3e-6,
            "input_cost_per_token_batches":5e-7,"output_cost_per_image":0,"input_cost_per_token_above_200k_tokens":2e-6,
            "cache_creation_input_token_cost_above_200k_tokens":6e-6,"max_input_tokens":300000,
            "search_context_cost_per_query":{"search_context_size_high":0.05}},
            "n":{"input_cost_per_token":1e-6,"output_cost_per_token":2e-6,"cache_creation_input_token_cost":3e-6}}"#;
        let names = |wanted: &[&str]| imported(list, wanted).ignored.into_iter().collect::<Vec<_>>();
        let told = |name: &str, models| (name.to_owned(), models);
        let of_m = [
            told("cache_creation_input_token_cost", 2),
            told("cache_creation_input_token_cost_above_200k_tokens", 1),
            told("input_cost_per_token_batches", 1),
            told("search_context_cost_per_query", 1),
        ];
        assert_eq!(names(&[]), of_m);
        assert_eq!(names(&["n"]), [told("cache_creation_input_token_cost", 1)]);
    }

    #[test]
    fn more_than_a_server_reads_is_refused_before_anything_is_written() {
        let entries = |count: usize| {
            let entry = |i| format!("\"m{i}\":{{\"input_cost_per_token\":1e-6,\"output_cost_per_token\":1e-6}}");
            format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","))
        };
        assert_eq!(imported(&entries(ITEMS_MAX), &[]).models, ITEMS_MAX);
        let list = entries(ITEMS_MAX + 1);
        assert!(litellm(&list, &[]).unwrap_err().contains("name those that you serve"));
        assert_eq!(imported(&list, &["m7"]).models, 1);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for list in ["", "[]", "{", "3"] {
            assert!(litellm(list, &[]).unwrap_err().starts_with("expected a JSON object of models"), "{list}");
        }
    }
}
