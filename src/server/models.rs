//! `GET /v1/models`: what a key may use, and somebody serves.

use std::sync::Arc;

use hyper::Response;
use serde_json::{Value, json};

use super::journey::whole;
use super::reply::Reply;
use crate::catalog::{Catalog, Model};
use crate::error::Error;
use crate::pool::Pool;
use crate::preprocess::Admitted;

/// Every model that the key may use and that an enabled account serves.
pub fn list(admitted: &Admitted, catalog: &Catalog, pool: &Arc<Pool>) -> Response<Reply> {
    let key = admitted.key();
    let models = catalog.iter().filter(|model| key.allows(&model.name) && pool.serves(model));
    let data: Vec<Value> = models.map(|model| shown(model)).collect();
    whole(json!({ "object": "list", "data": data }).to_string())
}

/// One model, if the list has it.
pub fn one(admitted: &Admitted, catalog: &Catalog, pool: &Arc<Pool>, name: &str) -> Result<Response<Reply>, Error> {
    let key = admitted.key();
    let model = catalog.find(name).filter(|model| key.allows(name) && pool.serves(model));
    let model = model.ok_or_else(|| Error::ModelUnknown { model: name.to_owned() })?;
    Ok(whole(shown(model).to_string()))
}

fn shown(model: &Model) -> Value {
    let owner = model.offers.first().map_or("", |offer| offer.endpoint.name.as_str());
    json!({ "id": model.name, "object": "model", "created": 0, "owned_by": owner, "context_length": model.context })
}
