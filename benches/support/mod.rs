//! What a gateway needs in its database before a bench can call it.

use std::path::Path;

use gpt_cat::config::DatabaseUrl;
use gpt_cat::store::{MasterKey, NewAccount, Store};
use gpt_cat::users::hash_key;

/// A new database with a user that never runs out of money, who has `key`, and with accounts of `endpoint`.
pub async fn filled(
    url: &DatabaseUrl,
    folder: &Path,
    key: &str,
    endpoint: &str,
    accounts: usize,
) -> (Store, MasterKey) {
    let store = Store::open(url).await.expect("a database");
    let master = MasterKey::load(None, &folder.join("master.key")).expect("a key");
    let key = (hash_key(key), "hint".to_owned());
    store.add_user("ann".into(), "default".into(), i64::MAX / 4, Some(key)).await.expect("a user");
    for number in 0..accounts {
        let account = NewAccount {
            name: format!("account {number}"),
            endpoint: endpoint.to_owned(),
            sealed_key: master.seal("sk-upstream"),
            hint: "ream".into(),
            base_url: None,
            models: None,
            weight: 1,
            tier: 0,
            concurrency: Some(100),
        };
        store.add_account(account).await.expect("an account");
    }
    (store, master)
}
