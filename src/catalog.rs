//! Models, mappings and prices: an immutable snapshot, replaced whole when the configuration changes.
//!
//! A call keeps the snapshot's [`Model`] that it began with, so a price never changes under it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::{self, ForeignVocabulary};
use crate::meter::Vocabulary;
use crate::store::{Store, StoreError};

/// One way to have a model answered.
#[derive(Clone, Debug)]
pub struct Offer {
    pub endpoint: Arc<config::Endpoint>,
    /// The model's name there, after mapping.
    pub upstream_model: String,
}

/// A model under the name that clients use and that has the price.
#[derive(Clone, Debug)]
pub struct Model {
    pub name: String,
    pub price: config::Price,
    pub price_version: i64,
    /// Tokens of prompt and output together.
    pub context: u64,
    /// Output tokens of one choice.
    pub max_output: u64,
    /// Its upstream bills output that is not seen, such as hidden reasoning: held in full, never sliced.
    pub bills_unseen: bool,
    pub vocabulary: Vocabulary,
    /// Endpoints that serve it, by name.
    pub offers: Vec<Offer>,
}

/// Every served model, by name.
#[derive(Debug, Default)]
pub struct Catalog {
    models: BTreeMap<String, Arc<Model>>,
}

impl Catalog {
    /// Builds the snapshot; every price gets its version in the store.
    pub async fn load(config: &config::Config, store: &Store) -> Result<Catalog, StoreError> {
        let mut models = BTreeMap::new();
        for model in config.models.values() {
            let offers = offers(config, &model.name);
            if offers.is_empty() {
                continue; // priced, but served by no endpoint
            }
            let vocabulary = offers
                .iter()
                .find_map(|offer| Vocabulary::of_model(&offer.upstream_model))
                .or_else(|| Vocabulary::of_model(&model.name))
                .unwrap_or(match config.meter.vocabulary {
                    ForeignVocabulary::O200k => Vocabulary::O200k,
                    ForeignVocabulary::Cl100k => Vocabulary::Cl100k,
                });
            let made = Model {
                name: model.name.clone(),
                price: model.price.clone(),
                price_version: store.price_version(model.name.clone(), model.price.clone()).await?,
                context: model.context,
                max_output: model.max_output,
                bills_unseen: model.bills_unseen,
                vocabulary,
                offers,
            };
            models.insert(model.name.clone(), Arc::new(made));
        }
        Ok(Catalog { models })
    }

    /// The model of this name.
    pub fn find(&self, name: &str) -> Option<&Arc<Model>> {
        self.models.get(name)
    }

    /// All models, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.values()
    }
}

fn offers(config: &config::Config, model: &str) -> Vec<Offer> {
    let serves = |endpoint: &&config::Endpoint| endpoint.models.iter().any(|served| served == model);
    let offer = |endpoint: &config::Endpoint| Offer {
        endpoint: Arc::new(endpoint.clone()),
        upstream_model: endpoint.mapping.get(model).map_or(model, String::as_str).to_owned(),
    };
    config.endpoints.values().filter(serves).map(offer).collect()
}
