//! `GET /v1/models`: what a key may use, and somebody serves.

use std::sync::Arc;

use hyper::Response;
use serde_json::{Value, json};

use super::journey::whole;
use super::reply::Reply;
use crate::catalog::{Catalog, Model};
use crate::config::{Price, Rates};
use crate::error::Error;
use crate::pool::Pool;
use crate::preprocess::Admitted;

/// Decimals of nano-units (9), of a ratio (6), and of a million tokens.
const PER_TOKEN_DIGITS: usize = 21;
/// The same of a whole call.
const PER_CALL_DIGITS: usize = 15;

/// Every model that the key may use and that an enabled account serves.
pub fn list(admitted: &Admitted, catalog: &Catalog, pool: &Arc<Pool>) -> Response<Reply> {
    let key = admitted.key();
    let models = catalog.iter().filter(|model| key.allows(&model.name) && pool.serves(model));
    let ratio_micro = key.user.group().ratio_micro;
    let data: Vec<Value> = models.map(|model| shown(model, ratio_micro)).collect();
    whole(json!({ "object": "list", "data": data }).to_string())
}

/// One model, if the list has it.
pub fn one(admitted: &Admitted, catalog: &Catalog, pool: &Arc<Pool>, name: &str) -> Result<Response<Reply>, Error> {
    let key = admitted.key();
    let model = catalog.find(name).filter(|model| key.allows(name) && pool.serves(model));
    let model = model.ok_or_else(|| Error::ModelUnknown { model: name.to_owned() })?;
    Ok(whole(shown(model, key.user.group().ratio_micro).to_string()))
}

/// What OpenAI tells of a model, and what clients read beside it under the names of OpenRouter's list.
fn shown(model: &Model, ratio_micro: i64) -> Value {
    let owner = model.offers.first().map_or("", |offer| offer.endpoint.name.as_str());
    json!({
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": owner,
        "context_length": model.context,
        "max_output_tokens": model.max_output,
        "pricing": pricing(&model.price, ratio_micro),
    })
}

/// Per token and per call, in the gateway's currency, as this key is charged.
fn pricing(price: &Price, ratio_micro: i64) -> Value {
    let Rates { input_nano, cached_input_nano, output_nano, .. } = price.rates;
    json!({
        "prompt": exact(input_nano, ratio_micro, PER_TOKEN_DIGITS),
        "completion": exact(output_nano, ratio_micro, PER_TOKEN_DIGITS),
        "input_cache_read": exact(cached_input_nano, ratio_micro, PER_TOKEN_DIGITS),
        "request": exact(price.per_call_nano, ratio_micro, PER_CALL_DIGITS),
    })
}

/// Nano-units times a ratio in millionths, as decimal text.
fn exact(nano: i64, ratio_micro: i64, digits: usize) -> String {
    let scaled = (i128::from(nano) * i128::from(ratio_micro)).unsigned_abs(); // neither is below zero
    let one = 10u128.pow(digits as u32);
    let fraction = format!("{:0digits$}", scaled % one);
    let text = format!("{}.{fraction}", scaled / one);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_is_shown_exactly_per_token_and_with_the_groups_ratio() {
        assert_eq!(exact(2_500_000_000, 1_000_000, PER_TOKEN_DIGITS), "0.0000025");
        assert_eq!(exact(1, 1, PER_TOKEN_DIGITS), "0.000000000000000000001");
        assert_eq!(exact(0, 1_000_000, PER_TOKEN_DIGITS), "0");
        assert_eq!(exact(40_000_000, 1_500_000, PER_CALL_DIGITS), "0.06");
        assert_eq!(exact(10_000_000_000, 1_000_000, PER_CALL_DIGITS), "10");
        let largest = exact(i64::MAX, i64::MAX, PER_TOKEN_DIGITS);
        assert!(largest.starts_with("85070591730234615"), "{largest}");
    }
}
