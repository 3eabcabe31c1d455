//! What an account is while the program runs.

use crate::config::Secret;
use crate::store::{AccountRow, MasterKey};

/// One upstream key and how it may be used.
#[derive(Debug)]
pub struct Account {
    /// `None`: the built-in account of the demo endpoint, which is in no table.
    pub id: Option<i64>,
    pub name: String,
    pub endpoint: String,
    pub key: Secret,
    /// Instead of the endpoint's.
    pub base_url: Option<String>,
    /// Models it serves; `None`: all of its endpoint's.
    pub models: Option<Vec<String>>,
    pub weight: u32,
    /// Lower tiers are used first.
    pub tier: u32,
    /// Calls in flight at most.
    pub concurrency: u32,
    pub enabled: bool,
}

/// The demo answers from memory; a bound all the same.
const DEMO_CONCURRENCY: u32 = 100_000;

impl Account {
    /// Opens a stored account; one whose key was sealed with another master key is disabled and reported.
    pub(super) fn open(row: AccountRow, master: &MasterKey, concurrency_default: u32) -> Account {
        let (key, opens) = match master.open(&row.sealed_key) {
            Ok(key) => (key, true),
            Err(error) => {
                tracing::error!(account = row.name, %error, "account disabled: its key does not open");
                (String::new(), false)
            }
        };
        Account {
            id: Some(row.id),
            name: row.name,
            endpoint: row.endpoint,
            key: Secret::new(key),
            base_url: row.base_url,
            models: row.models,
            weight: row.weight.max(1),
            tier: row.tier,
            concurrency: row.concurrency.unwrap_or(concurrency_default),
            enabled: row.enabled && opens,
        }
    }

    /// The account of an endpoint that needs no key.
    pub(super) fn built_in(endpoint: &str) -> Account {
        Account {
            id: None,
            name: endpoint.to_owned(),
            endpoint: endpoint.to_owned(),
            key: Secret::new(""),
            base_url: None,
            models: None,
            weight: 1,
            tier: 0,
            concurrency: DEMO_CONCURRENCY,
            enabled: true,
        }
    }

    /// Whether it is this one, perhaps as it was before it was changed.
    pub fn is(&self, other: &Account) -> bool {
        self.id == other.id && (self.id.is_some() || self.name == other.name)
    }

    /// Whether it may answer `model` (the name that clients use) at `endpoint`.
    pub fn serves(&self, endpoint: &str, model: &str) -> bool {
        self.enabled
            && self.endpoint == endpoint
            && self.models.as_ref().is_none_or(|models| models.iter().any(|served| served == model))
    }
}
