//! Step `title_catch`: what a front end asks behind its user's back goes to a cheap model.
//!
//! The prompts that are recognised are data in the configuration, and so is the model; without one the step is off.

use super::{Command, Draft, World};
use crate::config::{TitlePattern, TitleRole};
use crate::error::Error;
use crate::request::Head;

pub(super) fn run(world: &World<'_>, draft: &mut Draft) -> Result<Option<Command>, Error> {
    let (key, head) = draft.parts()?;
    let rule = &world.config.title_catch;
    let target = rule.patterns.iter().find_map(|pattern| {
        let target = pattern.model.as_ref().or(rule.model.as_ref())?;
        let output_max = pattern.output_max.unwrap_or(rule.output_max);
        matches(pattern, head).then_some((target, &pattern.whose, output_max))
    });
    // Never to a model that the key may not use, or that nobody serves: the call then goes where it was meant to go.
    if let Some((target, whose, output_max)) = target
        && world.catalog.find(target).is_some_and(|model| world.pool.serves(model))
        && key.allows(target)
    {
        tracing::debug!(whose, target, "title caught");
        draft.model_name = Some(target.clone());
        draft.output_max = Some(output_max);
    }
    Ok(None)
}

fn matches(pattern: &TitlePattern, head: &Head) -> bool {
    let found = |text: &str| match pattern.anywhere {
        true => text.contains(&pattern.text),
        false => text.trim_start().starts_with(&pattern.text),
    };
    match pattern.role {
        TitleRole::LastUser => head.last_user.as_ref().is_some_and(|text| found(&text.start)),
        TitleRole::System => head.system.as_ref().is_some_and(|text| found(&text.start)),
        TitleRole::Any => head.starts.iter().any(found),
    }
}
