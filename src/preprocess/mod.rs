//! Decides what becomes of a request: forward it, answer it here, or refuse it.
//!
//! [`STEPS`] is the policy, in its order. A step sees snapshots in memory and the draft, and does no I/O; what needs the
//! store is returned as a value (a [`Command`]) and run by the journey.

pub mod command;
mod model_filter;
pub mod template;
mod title_catch;
mod user_id;
mod user_key;

use std::sync::Arc;

use bytes::Bytes;

pub use command::Command;

use crate::catalog::{Catalog, Model};
use crate::config::Config;
use crate::error::Error;
use crate::pool::Pool;
use crate::request::Head;
use crate::users::{Key, Users};

/// The snapshots that steps may look at.
#[derive(Clone, Copy, Debug)]
pub struct World<'a> {
    pub config: &'a Config,
    pub catalog: &'a Catalog,
    pub users: &'a Users,
    pub pool: &'a Pool,
    /// Milliseconds since 1970 UTC, for keys that expire.
    pub now_ms: i64,
}

/// A request on its way through the steps; what is still `None` has not been decided.
#[derive(Debug)]
pub struct Draft {
    /// What came as the key.
    presented: Option<String>,
    key: Option<Arc<Key>>,
    head: Option<Box<Head>>,
    /// The model to use, once a step has chosen another one than the client did.
    model_name: Option<String>,
    model: Option<Arc<Model>>,
    /// A bound of the output that the client did not ask for.
    output_max: Option<u64>,
}

/// A request that is to be forwarded: everything that the later stages need, nothing optional.
#[derive(Debug)]
pub struct Call {
    pub key: Arc<Key>,
    pub head: Box<Head>,
    pub body: Bytes,
    pub model: Arc<Model>,
    /// What bounds each answer beside what the client said: the cap of a caught title.
    pub output_max: Option<u64>,
}

/// What the steps came to.
#[derive(Debug)]
pub enum Decision {
    Forward(Call),
    Answer(Command),
}

/// What a step needs to have been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// The request's headers: such a step runs before the body is read, so that a stranger cannot make us read one.
    Headers,
    /// The body's head.
    Body,
}

/// One row of the policy.
#[derive(Debug)]
pub struct Step {
    pub name: &'static str,
    needs: Needs,
    run: fn(&World<'_>, &mut Draft) -> Result<Option<Command>, Error>,
}

/// Every step, in the order in which they run.
pub static STEPS: [Step; 5] = [
    Step { name: "user_key", needs: Needs::Headers, run: user_key::run },
    Step { name: "user_id", needs: Needs::Headers, run: user_id::run },
    Step { name: "title_catch", needs: Needs::Body, run: title_catch::run },
    Step { name: "command", needs: Needs::Body, run: command::run },
    Step { name: "model_filter", needs: Needs::Body, run: model_filter::run },
];

/// Who has been let in; the body has not been read yet.
#[derive(Debug)]
pub struct Admitted(Draft);

impl Admitted {
    /// The key that came with the request.
    pub fn key(&self) -> &Arc<Key> {
        self.0.key.as_ref().expect("the step user_key sets it or fails")
    }
}

/// Runs the steps that need no body. `presented` is the key as the client sent it.
pub fn admit(world: &World<'_>, presented: Option<String>) -> Result<Admitted, Error> {
    let mut draft = Draft { presented, key: None, head: None, model_name: None, model: None, output_max: None };
    for step in STEPS.iter().filter(|step| step.needs == Needs::Headers) {
        (step.run)(world, &mut draft)?;
    }
    Ok(Admitted(draft))
}

/// Runs the other steps: the one place where a draft becomes a call.
pub fn decide(
    world: &World<'_>,
    Admitted(mut draft): Admitted,
    head: Box<Head>,
    body: Bytes,
) -> Result<Decision, Error> {
    draft.head = Some(head);
    for step in STEPS.iter().filter(|step| step.needs == Needs::Body) {
        if let Some(command) = (step.run)(world, &mut draft)? {
            return Ok(Decision::Answer(command));
        }
    }
    match draft {
        Draft { key: Some(key), head: Some(mut head), model: Some(model), output_max, .. } => {
            // Lowered, never raised: what is held for it is what it can cost.
            let output_max = output_max.filter(|max| head.max_tokens.is_none_or(|asked| asked > *max));
            head.max_tokens = output_max.or(head.max_tokens);
            Ok(Decision::Forward(Call { key, head, body, model, output_max }))
        }
        _ => Err(Error::Internal),
    }
}

impl Draft {
    /// Key and head, for the steps behind those that set them.
    fn parts(&self) -> Result<(&Arc<Key>, &Head), Error> {
        self.key.as_ref().zip(self.head.as_deref()).ok_or(Error::Internal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_need_no_body_come_first() {
        assert!(STEPS.is_sorted_by_key(|step| step.needs == Needs::Body));
    }
}
