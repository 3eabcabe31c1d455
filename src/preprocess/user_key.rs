//! Step `user_key`: who sends this?

use super::{Command, Draft, World};
use crate::error::Error;

/// No key is longer; what is, is not hashed.
const KEY_BYTES_MAX: usize = 512;

pub(super) fn run(world: &World<'_>, draft: &mut Draft) -> Result<Option<Command>, Error> {
    let presented = draft.presented.take().ok_or(Error::KeyMissing)?;
    if presented.is_empty() || presented.len() > KEY_BYTES_MAX {
        return Err(Error::KeyInvalid);
    }
    draft.key = Some(world.users.find(&presented, world.now_ms).ok_or(Error::KeyInvalid)?);
    Ok(None)
}
