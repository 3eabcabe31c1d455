//! Templates in the chat: reads what a request names, and does what `/template` asks for.

use bytes::Bytes;

use super::receive::Received;
use super::{Gateway, Snapshot, unanswered};
use crate::error::Error;
use crate::preprocess::Admitted;
use crate::preprocess::command::{Asked, Outcome};
use crate::preprocess::template::{self, Named};
use crate::request::{Form, Head};
use crate::store::{NewTemplate, Store, StoreError};

/// The messages of a chat that name a template; nearly always none.
pub fn named(snapshot: &Snapshot, received: &Received) -> Vec<Named> {
    match received.head.api.form {
        Form::Chat => template::named(&snapshot.config.commands, &received.head, &received.body),
        _ => Vec::new(),
    }
}

/// Puts stored messages in the place of those that name them.
///
/// The head is read again, so everything behind this stage sees the conversation that is sent on: it is held for, counted
/// and charged.
pub async fn expand(
    gateway: &Gateway,
    snapshot: &Snapshot,
    admitted: &Admitted,
    received: Received,
    named: Vec<Named>,
) -> Result<Received, Error> {
    let names = named.iter().map(|named| named.name.clone()).collect();
    let found = gateway.store.named_templates(admitted.key().user.id, names).await.map_err(unanswered)?;
    let of = |name: &str| found.iter().find(|row| row.name == name).map(|row| row.messages.clone());
    let stored: Vec<Option<String>> = named.iter().map(|named| of(&named.name)).collect();
    let Received { head, body, upload, mut weight } = received;
    let body = template::expand(&body, &named, &stored);
    let bytes_max = snapshot.config.server.body_bytes_max;
    if body.len() > bytes_max {
        return Err(Error::BodyTooLarge { bytes_max });
    }
    weight.grow_to(body.len())?;
    let mut head = Head::read_as(head.api, &body)?;
    // What stands there now is the template's: no command of the user's.
    head.ends_with_user &= !named.iter().zip(&stored).any(|(named, stored)| named.is_last && stored.is_some());
    Ok(Received { head: Box::new(head), body, upload, weight })
}

/// Does what stands behind the command.
pub async fn run(store: &Store, user_id: i64, asked: Asked<'_>, body: &Bytes) -> Result<Outcome, StoreError> {
    let outcome = match asked {
        Asked::Help | Asked::List | Asked::Other(_) => Ok(Outcome::Nothing),
        // No such name was ever stored, and not every database takes any character.
        Asked::Show(name) | Asked::Delete(name) if !template::is_name(name) => Ok(Outcome::Nothing),
        Asked::Show(name) => {
            let found = store.named_templates(user_id, vec![name.to_owned()]).await?;
            Ok(found.into_iter().next().map_or(Outcome::Nothing, |template| Outcome::Shown(template.messages)))
        }
        Asked::Delete(name) => store.remove_template(Some(user_id), name.to_owned()).await.map(|()| Outcome::Deleted),
        Asked::Save { name, .. } if !template::is_name(name) => {
            Ok(Outcome::Refused("a name has 1 to 64 characters without blanks, and is no subcommand".into()))
        }
        Asked::Save { name, description } => match template::conversation(body) {
            Err(why) => Ok(Outcome::Refused(why.into())),
            Ok(messages) => {
                let template = NewTemplate {
                    user_id: Some(user_id),
                    name: name.to_owned(),
                    description: Some(description.replace(char::is_control, " ")),
                    messages: Some(messages),
                    enabled: Some(true),
                };
                store.put_template(template).await.map(|before| Outcome::Saved { before })
            }
        },
    };
    match outcome {
        Err(StoreError::Absent(_)) => Ok(Outcome::Nothing),
        Err(StoreError::Refused(why)) => Ok(Outcome::Refused(why)),
        outcome => outcome,
    }
}
