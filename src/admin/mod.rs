//! Lets an operator look and change things: subcommands, and an API that shows the same.

mod api;
pub mod cli;
pub mod desk;
mod first;
mod listing;
mod show;

pub use api::serve as serve_api;
pub use first::{Welcome, first_start};

use crate::store::{hex, random};
use crate::users::hash_key;

/// A new secret and what is stored of it: 192 random bits, its hash, its last four characters.
struct NewKey {
    key: String,
    hash: [u8; 32],
    hint: String,
}

/// Random bytes of a key: nothing to guess, so a plain hash is enough to store.
const KEY_BYTES: usize = 24;
/// A key that an operator chose must be at least as long as this.
const CHOSEN_BYTES_MIN: usize = 16;
const CHOSEN_BYTES_MAX: usize = 512;

impl NewKey {
    fn random() -> NewKey {
        NewKey::of(format!("sk-{}", hex(&random::<KEY_BYTES>())))
    }

    /// A code that a user redeems; as much of a secret as a key.
    fn code() -> NewKey {
        NewKey::of(format!("code-{}", hex(&random::<KEY_BYTES>())))
    }

    /// A key from the environment; refused where it is too short to be a secret.
    fn chosen(key: String) -> Result<NewKey, String> {
        let fits = (CHOSEN_BYTES_MIN..=CHOSEN_BYTES_MAX).contains(&key.len());
        if !fits || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("it must have {CHOSEN_BYTES_MIN} to {CHOSEN_BYTES_MAX} printable ASCII characters"));
        }
        Ok(NewKey::of(key))
    }

    fn of(key: String) -> NewKey {
        NewKey { hash: hash_key(&key), hint: hint(&key), key }
    }
}

/// What may be shown of a secret: its last four characters.
fn hint(secret: &str) -> String {
    let tail: Vec<char> = secret.chars().rev().take(4).collect();
    tail.into_iter().rev().collect()
}
