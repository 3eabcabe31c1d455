//! The prompt of a call: its bound, and its count where something needs it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use bytes::Bytes;

use super::RATIO_ONE;
use super::hold::Ask;
use crate::catalog::Model;
use crate::meter::{self, Prompt, Vocabulary, calibrated};

/// A body up to this size lies in hyper's first read buffer, of 8 KiB.
const BODY_COPIED_BYTES_MAX: usize = 8 << 10;
/// CPU time that counting one prompt may take (design.md §6).
const COUNT_BUDGET: Duration = Duration::from_millis(20);
/// A longer prompt is counted on a blocking thread: at 20 MB/s this is below a millisecond.
const COUNT_INLINE_BYTES_MAX: usize = 16 << 10;
/// What a template or a provider's own system prompt may add to a prompt's bound.
const PROMPT_SLACK_TOKENS: u64 = 2048;
/// Bytes of text a token stands for, where a prompt has to be estimated without its text.
const BYTES_PER_TOKEN: u64 = 4;

/// What is kept of a prompt while its call is open.
#[derive(Debug)]
pub(super) struct PromptText {
    body: Bytes,
    vocabulary: Vocabulary,
    pub bound: u64,
    /// As OpenAI counts it, before any calibration.
    pub counted: Option<Prompt>,
    /// The provider's tokens for one counted here, in millionths.
    pub calibration_micro: i64,
    /// Parts whose tokens cannot be told from the body.
    opaque: bool,
}

impl PromptText {
    pub fn new(ask: &Ask<'_>, model: &Model) -> PromptText {
        let shape = ask.head.prompt;
        // Before a call it is not known which endpoint it goes to: the one that counts the most is held for.
        let calibrations = model.offers.iter().map(|offer| offer.endpoint.calibration_micro);
        let calibration_micro = calibrations.max().unwrap_or(RATIO_ONE);
        let bytes = meter::prompt_bound(shape.text_bytes, shape.messages.into(), shape.images.into(), &model.name);
        PromptText {
            body: kept(ask.body),
            vocabulary: model.vocabulary,
            bound: if shape.opaque {
                model.context
            } else {
                calibrated(bytes, calibration_micro.max(RATIO_ONE)).min(model.context)
            },
            counted: None,
            calibration_micro,
            // What nothing here can count is held for by its bytes.
            opaque: shape.opaque || !ask.head.api.is_measured(),
        }
    }

    pub fn is_long(&self) -> bool {
        self.counted.is_none() && self.body.len() > COUNT_INLINE_BYTES_MAX
    }

    /// What an upstream may claim at the most.
    pub fn usage_bound(&self) -> u64 {
        self.bound.saturating_add(PROMPT_SLACK_TOKENS)
    }

    pub async fn count(&mut self) {
        if !self.is_long() {
            return self.count_here();
        }
        let (body, vocabulary) = (self.body.clone(), self.vocabulary);
        // A runtime that ends runs it no more: then whoever needs the count counts on the spot.
        self.counted = tokio::task::spawn_blocking(move || contained(&body, vocabulary)).await.ok().flatten();
    }

    pub fn count_here(&mut self) {
        if self.counted.is_none() {
            let estimate = Prompt { tokens: self.best_guess(), estimated: true };
            self.counted = Some(contained(&self.body, self.vocabulary).unwrap_or(estimate));
        }
    }

    /// What to hold for: the count where there is one, else the bound; the bound where parts cannot be counted.
    pub fn to_hold(&self) -> u64 {
        match self.counted {
            Some(_) if !self.opaque => self.to_bill(),
            _ => self.bound,
        }
    }

    /// What to bill without a usage: the count, which parts that cannot be counted are no part of.
    pub fn to_bill(&self) -> u64 {
        let tokens = self.counted.map(|counted| calibrated(counted.tokens, self.calibration_micro));
        tokens.map_or(self.bound, |tokens| tokens.min(self.bound))
    }

    /// For a MARK: never more than the bound, and counting is not worth its time there.
    pub fn best_guess(&self) -> u64 {
        self.counted.map_or((self.bound / BYTES_PER_TOKEN).max(1), |_| self.to_bill())
    }
}

/// Counts; `None` when the count panics: a bug there must not keep a call from being settled.
fn contained(body: &[u8], vocabulary: Vocabulary) -> Option<Prompt> {
    let counted = catch_unwind(AssertUnwindSafe(|| meter::count_prompt(body, vocabulary, COUNT_BUDGET)));
    counted.inspect_err(|_| tracing::error!("counting a prompt failed; it is estimated")).ok()
}

/// The body for as long as the call is open: a small one by itself, since it came in a read buffer that its connection
/// would otherwise have to replace.
#[expect(clippy::disallowed_methods, reason = "a slice would keep the connection's whole read buffer")]
fn kept(body: &Bytes) -> Bytes {
    if body.len() > BODY_COPIED_BYTES_MAX { body.clone() } else { Bytes::copy_from_slice(body) }
}
