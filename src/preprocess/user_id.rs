//! Step `user_id`: may the key's user do anything at all?

use super::{Command, Draft, World};
use crate::error::Error;

pub(super) fn run(_: &World<'_>, draft: &mut Draft) -> Result<Option<Command>, Error> {
    match &draft.key {
        Some(key) if key.user.is_frozen() => Err(Error::UserFrozen),
        Some(_) => Ok(None),
        None => Err(Error::Internal),
    }
}
