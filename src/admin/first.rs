//! The first start: makes what a fresh install needs, and says it once.

use super::{NewKey, hint};
use crate::config::Config;
use crate::config::decimal::Nano;
use crate::store::{MasterKey, NewAccount, Store, hex};

/// The name of the user that a first start makes.
const FIRST_USER: &str = "first";
/// Variables whose key becomes an account of the endpoint beside it.
const PROVIDER_KEYS: [(&str, &str); 2] = [("OPENAI_API_KEY", "openai"), ("DASHSCOPE_API_KEY", "qianwen")];

/// What is printed once, to standard output, and never again.
pub struct Welcome {
    key: String,
    admin_token: String,
    balance_nano: i64,
    currency: String,
    accounts: Vec<String>,
}

/// Fixes the currency; at the first start also makes an admin token, a user with a key, and accounts from the environment.
///
/// `env` looks a variable up: `GPT_CAT_ADMIN_TOKEN` and `GPT_CAT_FIRST_KEY` choose the secrets. Fails with a sentence.
pub async fn first_start(
    config: &Config,
    store: &Store,
    master: &MasterKey,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Option<Welcome>, Box<dyn std::error::Error + Send + Sync>> {
    let currency = store.settle_setting("currency", config.currency.clone()).await?;
    if currency != config.currency {
        let configured = &config.currency;
        return Err(
            format!("currency: the database counts in {currency} since its first start, not in {configured}").into()
        );
    }
    let secret = |name: &str| match env(name).filter(|given| !given.is_empty()) {
        Some(given) => NewKey::chosen(given).map_err(|why| format!("{name}: {why}")),
        None => Ok(NewKey::random()),
    };
    let (token, key) = (secret("GPT_CAT_ADMIN_TOKEN")?, secret("GPT_CAT_FIRST_KEY")?);
    let balance_nano = config.ledger.first_balance_nano;
    if !store.first_start(hex(&token.hash), FIRST_USER, balance_nano, (key.hash, key.hint)).await? {
        return Ok(None);
    }
    let mut accounts = Vec::new();
    for (variable, endpoint) in PROVIDER_KEYS {
        let Some(secret) = env(variable).filter(|given| !given.is_empty()) else { continue };
        if !config.endpoints.contains_key(endpoint) {
            continue;
        }
        let account = NewAccount {
            name: endpoint.to_owned(),
            endpoint: endpoint.to_owned(),
            sealed_key: master.seal(&secret),
            hint: hint(&secret),
            base_url: None,
            models: None,
            weight: 1,
            tier: 0,
            concurrency: None,
        };
        store.add_account(account).await?;
        accounts.push(format!("account '{endpoint}' from {variable}"));
    }
    Ok(Some(Welcome { key: key.key, admin_token: token.key, balance_nano, currency, accounts }))
}

impl Welcome {
    /// The text to print; `base` is where the server listens.
    pub fn text(&self, base: &str) -> String {
        let Welcome { key, admin_token, balance_nano, currency, accounts } = self;
        let accounts: String = accounts.iter().map(|account| format!("  made:        {account}\n")).collect();
        format!(
            "First start. These secrets are shown once, here:\n  admin token: {admin_token}\n  first key:   {key}  \
             (user '{FIRST_USER}', balance {} {currency})\n{accounts}Try it:\n  curl -N {base}/v1/chat/completions \
             -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d \
             '{{\"model\":\"demo\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n",
            Nano(*balance_nano)
        )
    }
}
