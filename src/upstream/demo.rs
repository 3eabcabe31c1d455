//! The dialect `demo`: a model that answers from memory, so that a fresh start has something to talk to.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::Sleep;

use super::openai::{DONE, chunk_event};
use super::{Adapter, Ask, Via};
use crate::meter::{Vocabulary, count_prompt};
use crate::request::Form;
use crate::store::{hex, now_ms, random};

/// One row of [`super::ADAPTERS`].
pub static ADAPTER: Adapter = Adapter { dialect: "demo", forms: &[Form::Chat], keyless: true, via: Via::Local(answer) };

/// A pause between two words, so that a stream looks like one.
const WORD_EVERY: Duration = Duration::from_millis(20);
/// CPU time for counting the prompt.
const COUNT_BUDGET: Duration = Duration::from_millis(5);

const ANSWER: &str = "Hello! I am the demo model that is built into gpt-cat. I know only this one answer, but everything \
                      around it is real: your key was checked, money was held for this call, these words are counted \
                      as they pass, and you are charged for them when I am done. Add an account of a provider and ask \
                      a model that can think.";

/// An answer that is made in this process; chunks come as they would from a provider.
#[derive(Debug)]
pub struct Local {
    chunks: VecDeque<Bytes>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Local {
    /// The next chunk, after a pause.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(pause) = &mut self.pause
            && pause.as_mut().poll(cx).is_pending()
        {
            return Poll::Pending;
        }
        let chunk = self.chunks.pop_front();
        if let (Some(pause), Some(_)) = (&mut self.pause, &chunk) {
            pause.as_mut().reset(tokio::time::Instant::now() + WORD_EVERY);
        }
        Poll::Ready(chunk)
    }
}

fn answer(ask: &Ask) -> Local {
    let words: Vec<&str> = ANSWER.split_inclusive(' ').collect();
    let limit = ask.clamp.or(ask.head.max_tokens).map_or(usize::MAX, |tokens| tokens.try_into().unwrap_or(usize::MAX));
    let mut said = String::new();
    let mut spoken = Vec::new();
    let mut finish = "stop";
    for word in words {
        let with_word = format!("{said}{word}");
        if Vocabulary::O200k.count(&with_word) as usize > limit {
            finish = "length";
            break;
        }
        spoken.push(word);
        said = with_word;
    }
    let prompt = count_prompt(&ask.body, Vocabulary::O200k, COUNT_BUDGET).tokens;
    let output = Vocabulary::O200k.count(&said);
    let usage = json!({ "prompt_tokens": prompt, "completion_tokens": output * u64::from(ask.head.n),
                        "total_tokens": prompt + output * u64::from(ask.head.n) });
    let frame = Frame { id: format!("chatcmpl-demo-{}", hex(&random::<12>())), model: &ask.model.name };
    if ask.head.stream {
        let pause = Some(Box::pin(tokio::time::sleep(WORD_EVERY)));
        return Local { chunks: frame.stream(&spoken, finish, usage, ask.head.n), pause };
    }
    Local { chunks: VecDeque::from([frame.whole(&said, finish, usage, ask.head.n)]), pause: None }
}

/// What all chunks of one answer have in common.
struct Frame<'a> {
    id: String,
    model: &'a str,
}

impl Frame<'_> {
    fn with(&self, object: &str, choices: Value, usage: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": now_ms() / 1000, "model": self.model,
                "choices": choices, "usage": usage })
    }

    fn stream(&self, words: &[&str], finish: &str, usage: Value, n: u32) -> VecDeque<Bytes> {
        let choices = |delta: Value, finish: Value| -> Value {
            (0..n).map(|index| json!({ "index": index, "delta": delta, "finish_reason": finish })).collect()
        };
        let object = "chat.completion.chunk";
        let event = |choices: Value, usage: Value| chunk_event(&self.with(object, choices, usage));
        let first = json!({ "role": "assistant", "content": "" });
        let mut chunks = VecDeque::from([event(choices(first, Value::Null), Value::Null)]);
        chunks.extend(words.iter().map(|word| event(choices(json!({ "content": word }), Value::Null), Value::Null)));
        chunks.push_back(event(choices(json!({}), finish.into()), Value::Null));
        chunks.push_back(event(json!([]), usage));
        chunks.push_back([b"data: ", DONE, b"\n\n"].concat().into());
        chunks
    }

    fn whole(&self, text: &str, finish: &str, usage: Value, n: u32) -> Bytes {
        let message = json!({ "role": "assistant", "content": text });
        let choices: Value =
            (0..n).map(|index| json!({ "index": index, "message": message, "finish_reason": finish })).collect();
        self.with("chat.completion", choices, usage).to_string().into()
    }
}
