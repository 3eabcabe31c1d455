//! Step `user_id`: may the key's user do anything at all?

use super::{Command, Draft, World};
use crate::error::Error;

pub(super) fn run(_: &World<'_>, draft: &mut Draft) -> Result<Option<Command>, Error> {
    match &draft.key {
        // Who waits for a credit may still redeem a code; no call goes past `model_filter`.
        Some(key) if key.user.is_frozen() && !key.user.thaws() => Err(Error::UserFrozen),
        Some(_) => Ok(None),
        None => Err(Error::Internal),
    }
}
