//! What an ended call is billed and charged: design.md §4 (7).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::boot::Boot;
use super::super::prompt::PromptText;
use super::super::{Tokens, cost_nano};
use super::{Ended, Inner, elapsed_ms};
use crate::meter::Usage;
use crate::store::{Billed, EndReason, Line};
use crate::telemetry;

/// Usage is believed up to this far from the count: within half and double, give or take these tokens.
const SANE_SLACK_TOKENS: u64 = 64;
/// OpenAI frames a tool call with about 18 tokens that no text shows.
const TOOL_CALL_SLACK_TOKENS: u64 = 24;

/// A call that settles when this is dropped: also when the runtime ends and drops the task that it was handed to.
pub(super) struct Settling(Option<(Box<Inner>, Arc<Boot>, Ended)>);

impl Settling {
    pub fn new(call: Box<Inner>, boot: Arc<Boot>, ended: Ended) -> Settling {
        Settling(Some((call, boot, ended)))
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        if let Some((inner, boot, ended)) = self.0.take() {
            inner.settle(&boot, ended);
        }
    }
}

impl Inner {
    /// Charges what the call comes to, writes its END, and gives back what is left of its hold.
    pub(super) fn settle(mut self: Box<Self>, boot: &Boot, ended: Ended) {
        self.fill_tokens(&ended);
        let Inner { purse, line, model, held, quota, called, begun, upstream_bills, prompt, output_max, .. } =
            &mut *self;
        line.hold_nano = *held;
        line.status = ended.status;
        line.end_reason = ended.reason;
        line.duration_ms = elapsed_ms(*begun);
        let tokens = Tokens::of_line(line);
        line.tier = model.price.rates_for(tokens.input).0 as u32;
        let cost = match line.billed {
            Billed::Nothing => 0,
            Billed::Hold => *held,
            _ => cost_nano(&model.price, tokens, line.ratio_micro),
        };
        let held_before = *held;
        let allowed = held_before + quota.extend(cost - held_before);
        (line.charged_nano, *held) = purse.charge(held_before, cost.min(allowed));
        line.absorbed_nano = cost - line.charged_nano;
        let believed =
            upstream_bills.filter(|usage| usage.input <= prompt.usage_bound() && usage.output <= *output_max);
        if let Some(usage) = believed {
            let billed = Tokens { units: line.units, ..usage.into() };
            let billed = cost_nano(&model.price, billed, line.ratio_micro);
            line.absorbed_nano = line.absorbed_nano.max(billed - line.charged_nano);
            note_usage(line, usage);
        }
        if line.billed == Billed::Nothing && *called && ended.may_be_billed {
            // A call that was cancelled, or waited for in vain; the hold is the most that it can come to.
            line.absorbed_nano = held_before;
            line.estimated = true;
        }
        if matches!(ended.reason, EndReason::Complete) && ended.content {
            self.habit.note(self.line.output);
        }
        let Inner { line, place, _count, purse, held, quota, .. } = *self;
        let charged = line.charged_nano;
        let ordinal = boot.journal.end(place, line);
        quota.charge(charged, boot.id, ordinal);
        purse.release(held, charged);
        boot.leave();
    }

    /// Decides what is billed: the upstream's usage when it is there and sane, the count otherwise, nothing without content.
    fn fill_tokens(&mut self, ended: &Ended) {
        let line = &mut self.line;
        line.estimated = ended.estimated;
        line.flagged = ended.usage_invalid;
        line.counted_output = Some(ended.output);
        if let Some(usage) = ended.usage {
            note_usage(line, usage);
            if usage.reasoning > 0 && usage.output > ended.output.saturating_add(SANE_SLACK_TOKENS) {
                self.habit.bills_unseen.store(true, Ordering::Relaxed);
            }
        }
        if !ended.content {
            return; // no content, no charge
        }
        let echoed = self.prompt.bound.saturating_mul(self.echoes);
        match ended
            .usage
            .filter(|usage| is_sane(usage, &self.prompt, ended, self.output_max, echoed, self.unseen_answers))
        {
            Some(usage) => {
                line.billed = Billed::Usage;
                (line.input, line.cached_input, line.output) = (usage.input, usage.cached_input, usage.output);
            }
            // Nothing here tells its tokens: none where the price is per call, else the most that was held for.
            None if ended.unmeasured => {
                let is_known = !self.model.price.is_by_tokens();
                line.flagged |= !is_known;
                line.estimated |= !is_known;
                line.counted_output = None;
                line.billed = if is_known { Billed::Count } else { Billed::Hold };
            }
            None => {
                line.flagged |= ended.usage.is_some();
                line.billed = Billed::Count;
                self.prompt.count_here();
                line.counted_input = Some(self.prompt.to_bill());
                let echoed = self.prompt.to_bill().saturating_mul(self.echoes);
                // Of the best of several only the best is seen; the others are taken to be as long.
                let said = ended.output.saturating_sub(echoed).saturating_mul(self.unseen_answers);
                (line.input, line.output) = (self.prompt.to_bill(), said);
                line.estimated |= self.unseen_answers > 1;
                line.estimated |= self.prompt.counted.is_some_and(|counted| counted.estimated);
            }
        }
        if self.cross_checked && line.billed == Billed::Usage {
            self.prompt.count_here();
            self.compare(ended);
        }
        if self.prompt.counted.is_some() {
            self.line.counted_input = Some(self.prompt.to_bill());
        }
    }

    /// Tells how the count made here compares with the provider's usage.
    fn compare(&self, ended: &Ended) {
        let (Some(usage), Some(endpoint)) = (ended.usage, &self.line.endpoint) else { return };
        let metrics = &self.metrics;
        metrics.counted(endpoint, telemetry::Tokens::Input, self.prompt.to_bill(), usage.input);
        metrics.counted(endpoint, telemetry::Tokens::Output, ended.output, usage.output);
    }
}

/// Notes what the upstream said it bills.
fn note_usage(line: &mut Line, usage: Usage) {
    (line.usage_input, line.usage_cached) = (Some(usage.input), Some(usage.cached_input));
    (line.usage_output, line.usage_reasoning) = (Some(usage.output), Some(usage.reasoning));
    (line.usage_audio_input, line.usage_image_input) = (Some(usage.audio_input), Some(usage.image_input));
    (line.usage_audio_output, line.usage_image_output) = (Some(usage.audio_output), Some(usage.image_output));
}

/// Design.md §4 (7): prompt within its bound, output within half and double of the count, unseen reasoning excepted.
/// `echoed` tokens at most of what was counted are the prompt's; `answers` are billed for each that was seen.
fn is_sane(usage: &Usage, prompt: &PromptText, ended: &Ended, output_max: u64, echoed: u64, answers: u64) -> bool {
    let counted = ended.output;
    let slack = SANE_SLACK_TOKENS + ended.tool_calls * TOOL_CALL_SLACK_TOKENS;
    let near = |output: u64| {
        output.saturating_add(slack) >= counted.saturating_sub(echoed) / 2
            && output <= counted.saturating_mul(2 * answers).saturating_add(slack)
    };
    let seen = usage.output.saturating_sub(usage.reasoning);
    // A placeholder of zeros is no usage, and nobody reasons beyond what the model can say.
    usage.input > 0
        && (usage.output > 0 || counted == 0)
        && usage.output <= output_max.saturating_mul(2).saturating_add(slack)
        && usage.input <= prompt.usage_bound()
        && usage.cached_input <= usage.input
        && usage.reasoning <= usage.output
        && (ended.unmeasured || near(usage.output) || near(seen))
}
