//! Step `model_filter`: is there such a model, and may the key call it, by itself and by its user's group?

use super::{Command, Draft, World};
use crate::error::Error;

pub(super) fn run(world: &World<'_>, draft: &mut Draft) -> Result<Option<Command>, Error> {
    let (key, head) = draft.parts()?;
    if key.user.is_frozen() {
        return Err(Error::UserFrozen);
    }
    let name = draft.model_name.as_deref().unwrap_or(&head.model);
    let forbidden = !key.allows(name);
    match world.catalog.find(name) {
        Some(_) if forbidden => Err(Error::ModelForbidden { model: name.to_owned() }),
        Some(model) => {
            draft.model = Some(model.clone());
            Ok(None)
        }
        None => Err(Error::ModelUnknown { model: name.to_owned() }),
    }
}
