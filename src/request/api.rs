//! The calls of OpenAI's API that are forwarded, a row each.

/// One call of the API.
#[derive(Debug, PartialEq, Eq)]
pub struct Api {
    /// Behind `/v1` here, and behind the endpoint's base URL there.
    pub path: &'static str,
    pub form: Form,
    /// The model that OpenAI takes where a request names none, as its reference has it.
    pub model_default: Option<&'static str>,
    /// What the body says does not bound the tokens of the prompt: it has, or points at, images or sound.
    pub opaque: bool,
}

/// What a body is made of, and what comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Messages in, a message out.
    Chat,
    /// `prompt` in, a text out.
    Completion,
    /// `input` in, vectors out: no output tokens.
    Embedding,
    /// JSON in, anything out: JSON, sound, events.
    Json,
    /// A multipart form in, or JSON; anything out.
    Multipart,
}

impl Api {
    /// Its answers are completions, in whole or as chunks that are counted on their way.
    pub fn is_completion(&self) -> bool {
        matches!(self.form, Form::Chat | Form::Completion)
    }

    /// The tokens of a call can be counted here, should its provider not tell them.
    pub fn is_measured(&self) -> bool {
        !matches!(self.form, Form::Json | Form::Multipart)
    }
}

/// `POST /v1/chat/completions`.
pub static CHAT: Api = row("/chat/completions", Form::Chat, None, false);
/// `POST /v1/completions`.
pub static COMPLETIONS: Api = row("/completions", Form::Completion, None, false);
/// `POST /v1/embeddings`.
pub static EMBEDDINGS: Api = row("/embeddings", Form::Embedding, None, false);

/// Every call that is forwarded.
pub static APIS: [&Api; 11] = [
    &CHAT,
    &COMPLETIONS,
    &EMBEDDINGS,
    &row("/moderations", Form::Json, Some("omni-moderation-latest"), true),
    &row("/rerank", Form::Json, None, false),
    &row("/images/generations", Form::Json, Some("dall-e-2"), false),
    &row("/images/edits", Form::Multipart, Some("dall-e-2"), true),
    &row("/images/variations", Form::Multipart, Some("dall-e-2"), true),
    &row("/audio/speech", Form::Json, None, false),
    &row("/audio/transcriptions", Form::Multipart, None, true),
    &row("/audio/translations", Form::Multipart, None, true),
];

const fn row(path: &'static str, form: Form, model_default: Option<&'static str>, opaque: bool) -> Api {
    Api { path, form, model_default, opaque }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_stands_once() {
        let mut paths: Vec<&str> = APIS.iter().map(|api| api.path).collect();
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), APIS.len());
    }
}
