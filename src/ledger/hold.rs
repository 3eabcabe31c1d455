//! One call's money, from its hold to its line.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Ledger;
use super::boot::Boot;
use super::habit::Habit;
use super::journal::{Mark, Place};
use super::lease::{CallCount, Purse, Taken, Waiting};
use super::money::Dearest;
use super::prompt::PromptText;
use super::quota::{self, Quota, Reached, WaitingHold};
use crate::catalog::Model;
use crate::config::{Endpoint, LowBalance};
use crate::error::Error;
use crate::meter::Usage;
use crate::request::{Form, Head};
use crate::store::{Billed, EndReason, Line, now_ms};
use crate::telemetry::Metrics;
use crate::users::Key;

mod settle;

use settle::Settling;

/// Output tokens that a stream takes at a time once its first hold is used up.
pub const SLICE_TOKENS: u64 = 256;
/// A clamped call starts only if it can say at least this much.
const OUTPUT_CLAMPED_MIN: u64 = 16;
/// A stream that waits for money of its user's other calls looks this often, should nobody tell it.
const FREED_LOOK: Duration = Duration::from_secs(1);
/// Ids that a client sends are kept up to this length, so that a record stays within its bound.
const CLIENT_ID_BYTES_MAX: usize = 128;

/// What a call wants to hold for.
#[derive(Debug)]
pub struct Ask<'a> {
    pub key: &'a Arc<Key>,
    pub model: &'a Arc<Model>,
    /// The name that the client used.
    pub model_asked: &'a str,
    pub head: &'a Head,
    pub body: &'a Bytes,
    pub request_id: String,
    pub client_request_id: Option<&'a str>,
}

/// How a call ended, as the relay saw it.
#[derive(Debug)]
pub struct Ended {
    pub reason: EndReason,
    /// The status that the client got.
    pub status: u16,
    pub usage: Option<Usage>,
    /// The upstream gave a usage that cannot be believed.
    pub usage_invalid: bool,
    /// Output tokens that were handed over, as counted here.
    pub output: u64,
    /// The count is not exact.
    pub estimated: bool,
    /// Tool calls in the answer: each is billed some tokens that no text shows.
    pub tool_calls: u64,
    /// Whether anything of the answer was handed over.
    pub content: bool,
    /// The upstream may bill although nothing was handed over: it was called, and not heard to refuse.
    pub may_be_billed: bool,
    /// An answer that is no text: `output` says nothing of it.
    pub unmeasured: bool,
}

/// A call that is open: its hold, its place in the journal, its line so far.
///
/// Dropped without [`OpenLine::end`], it settles as a client that left, by what [`OpenLine::handed_over`] was told last.
#[derive(Debug)]
pub struct OpenLine {
    ledger: Arc<Ledger>,
    boot: Arc<Boot>,
    inner: Option<Box<Inner>>,
}

#[derive(Debug)]
struct Inner {
    purse: Arc<Purse>,
    _count: CallCount,
    place: Place,
    line: Line,
    dearest: Dearest,
    model: Arc<Model>,
    key: Arc<Key>,
    habit: Arc<Habit>,
    prompt: PromptText,
    held: i64,
    quota: Quota,
    /// Output tokens that the hold pays for.
    covered: u64,
    /// Output tokens of the last MARK.
    marked: u64,
    sliceable: bool,
    /// Tokens of output, over all choices, that the model can bill.
    output_max: u64,
    /// How often each prompt begins an answer, and is no output of the model there.
    echoes: u64,
    /// Answers that are generated and billed for each that comes back.
    unseen_answers: u64,
    /// What `max_tokens` has to be set to, because the money covers no more.
    clamp: Option<u64>,
    /// The upstream was called: it may bill.
    called: bool,
    begun: Instant,
    /// For a drop: what was handed over so far.
    output: u64,
    estimated: bool,
    content: bool,
    unmeasured: bool,
    /// The prompt is counted although nothing needs it.
    cross_checked: bool,
    metrics: Arc<Metrics>,
    /// What the upstream said of an answer that its client did not stay for.
    upstream_bills: Option<Usage>,
}

/// Money for further output, on its way to its call; dropped, it goes back.
#[derive(Debug)]
pub struct Slices {
    slices: u64,
    taken: Taken,
    quota: Quota,
}

impl Ended {
    /// A call that was answered with an error and nothing else.
    pub fn failed(status: u16, may_be_billed: bool) -> Ended {
        Ended {
            may_be_billed,
            reason: EndReason::Failed,
            status,
            usage: None,
            usage_invalid: false,
            output: 0,
            estimated: false,
            tool_calls: 0,
            content: false,
            unmeasured: false,
        }
    }
}

impl Ledger {
    /// Holds money for a call and writes OPEN, before the upstream is called.
    ///
    /// Fails with 429 `insufficient_quota` when the money is not there or a limit is used up, 429 `rate_limit_exceeded`
    /// when the user calls too often or has too many calls open, 503 when this node cannot hold or write.
    pub async fn open(self: &Arc<Ledger>, ask: Ask<'_>) -> Result<OpenLine, Error> {
        if let Err(reason) = self.ready() {
            return Err(Error::NodeUnavailable { reason, retry_after_s: 5 });
        }
        let (user, model) = (&ask.key.user, ask.model);
        let group = user.group();
        user.admit(now_ms()).map_err(|retry_after_s| Error::TooManyRequests { retry_after_s })?;
        let boot = self.boot.load_full();
        let entered =
            boot.enter().ok_or(Error::NodeUnavailable { reason: "it cannot reach its books", retry_after_s: 5 })?;
        let purse = boot.purse(user.id);
        let (count, alone) =
            CallCount::enter(&purse, group.concurrency).ok_or(Error::TooManyCalls { retry_after_s: 1 })?;
        let habit = self.habit(&model.name);
        let (head, n) = (ask.head, u64::from(ask.head.generated));
        let unseen = model.bills_unseen || habit.bills_unseen.load(Ordering::Relaxed);
        let mut prompt = PromptText::new(&ask, model);
        let echoes = u64::from(head.echoes);
        let each = match (head.api.form, head.max_tokens) {
            (Form::Embedding, _) => 0,
            (Form::Json | Form::Multipart, _) => model.max_output,
            (_, Some(max_tokens)) => max_tokens.min(model.max_output.max(1)),
            (_, None) if unseen => model.max_output,
            (_, None) => habit.usual_output(model.max_output),
        };
        let wanted = each.saturating_mul(n).saturating_add(prompt.bound.saturating_mul(echoes));
        let (shape, units) = (head.prompt, head.units());
        let dearest = |input| {
            Dearest::of(&model.price, input, shape.images > 0 || shape.opaque, shape.opaque, group.ratio_micro)
                .for_units(units)
        };
        let cost = |input, output| dearest(input).cost_nano(input, output);
        let (mut covered, mut clamp) = (wanted, None);
        let mut held = hold(&boot, &purse, ask.key, cost(prompt.bound, wanted)).await?;
        if let Err(short) = held {
            if let (Short::Limit(_), Some(left)) = (&short, quota::room(ask.key)) {
                // The money was not asked for yet: what the limits leave of it comes into the room.
                drop(boot.cover(&purse, left.min(cost(prompt.bound, wanted))).await?);
            }
            // The bound did not fit; the exact count may. Without even the smallest answer's money there is no need to count.
            if room(&purse, ask.key) < cost(1, OUTPUT_CLAMPED_MIN.min(wanted)) {
                return Err(short.into());
            }
            prompt.count().await;
            held = hold(&boot, &purse, ask.key, cost(prompt.to_hold(), wanted)).await?;
        }
        if let Err(short) = held {
            let input = prompt.to_hold();
            let each = dearest(input).output_affordable(input, room(&purse, ask.key)) / n;
            let clampable = alone && self.on_low_balance == LowBalance::Clamp && !unseen && head.is_clampable();
            if !clampable || each < OUTPUT_CLAMPED_MIN.min(wanted / n) {
                return Err(short.into());
            }
            covered = each.saturating_mul(n).min(wanted);
            clamp = Some(covered / n);
            let amount = cost(input, covered);
            let quota = Quota::hold(ask.key, amount).map_err(|reached| reached.error)?;
            held = Taken::of(&purse, amount).map(|taken| (quota, taken)).ok_or(short);
        }
        let (quota, taken) = held.map_err(Error::from)?;

        let sequence = boot.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let line = Line {
            sequence,
            request_id: ask.request_id,
            client_request_id: ask.client_request_id.map(bounded),
            user_id: user.id,
            key_id: ask.key.id,
            ratio_micro: group.ratio_micro,
            account_id: None,
            endpoint: None,
            model_asked: ask.model_asked.to_owned(),
            model: model.name.clone(),
            model_upstream: None,
            price_version: model.price_version,
            tier: 0,
            input: 0,
            cached_input: 0,
            output: 0,
            usage_input: None,
            usage_cached: None,
            usage_output: None,
            usage_reasoning: None,
            usage_audio_input: None,
            usage_image_input: None,
            usage_audio_output: None,
            usage_image_output: None,
            units,
            counted_input: None,
            counted_output: None,
            billed: Billed::Nothing,
            calibration_micro: super::RATIO_ONE,
            estimated: false,
            flagged: false,
            hold_nano: taken.amount(),
            charged_nano: 0,
            absorbed_nano: 0,
            started_ms: now_ms(),
            content_after_ms: None,
            duration_ms: 0,
            end_reason: EndReason::Crashed,
            status: 0,
            tries: 0,
        };
        let full = |_| Error::NodeUnavailable { reason: "its journal is full", retry_after_s: 5 };
        let place = boot.journal.open(&line).map_err(full)?;
        entered.keep();
        let inner = Inner {
            purse,
            _count: count,
            place,
            line,
            dearest: dearest(prompt.to_hold()),
            model: model.clone(),
            key: ask.key.clone(),
            habit,
            prompt,
            held: taken.keep(),
            quota,
            covered,
            marked: 0,
            output_max: model.max_output.max(head.max_tokens.unwrap_or(0)).saturating_mul(n),
            echoes,
            unseen_answers: n.div_ceil(u64::from(head.n.max(1))),
            sliceable: !unseen && clamp.is_none(),
            clamp,
            called: false,
            begun: Instant::now(),
            output: 0,
            estimated: false,
            content: false,
            unmeasured: !head.api.is_measured(),
            cross_checked: head.api.is_measured() && self.counting.takes(sequence),
            metrics: self.counting.metrics.clone(),
            upstream_bills: None,
        };
        Ok(OpenLine { ledger: self.clone(), boot, inner: Some(Box::new(inner)) })
    }
}

impl OpenLine {
    fn inner(&self) -> &Inner {
        self.inner.as_deref().expect("only `end` and `drop` take it, and both consume the line")
    }

    fn inner_mut(&mut self) -> &mut Inner {
        self.inner.as_deref_mut().expect("only `end` and `drop` take it, and both consume the line")
    }

    /// What `max_tokens` has to be lowered to, because the money covers no more.
    pub fn clamp(&self) -> Option<u64> {
        self.inner().clamp
    }

    /// Notes a try: from here on the upstream may bill.
    pub fn called(&mut self, account_id: Option<i64>, endpoint: &Endpoint, model_upstream: &str) {
        let inner = self.inner_mut();
        inner.called = true;
        inner.line.calibration_micro = endpoint.calibration_micro;
        inner.prompt.calibration_micro = endpoint.calibration_micro;
        let endpoint = endpoint.name.as_str();
        inner.line.tries += 1;
        inner.line.account_id = account_id;
        if inner.line.endpoint.as_deref() != Some(endpoint) {
            inner.line.endpoint = Some(endpoint.to_owned());
        }
        inner.line.model_upstream = (model_upstream != inner.line.model).then(|| model_upstream.to_owned());
    }

    /// Output tokens that may be handed over: those that the hold pays for, and a slice beyond the last MARK at most, since
    /// what is beyond it is the operator's should the process die.
    pub fn covered(&self) -> u64 {
        let inner = self.inner();
        inner.covered.min(inner.marked.saturating_add(SLICE_TOKENS))
    }

    /// Writes MARK: what a crash has to charge, the tokens handed over so far, before anything beyond them is. False: nothing may be.
    pub fn mark(&mut self, output: u64) -> bool {
        self.write_mark(output, true)
    }

    fn write_mark(&mut self, output: u64, needed: bool) -> bool {
        let boot = self.boot.clone();
        let inner = self.inner_mut();
        if inner.line.content_after_ms.is_none() {
            inner.line.content_after_ms = Some(elapsed_ms(inner.begun));
        }
        let mark = Mark {
            input: inner.prompt.best_guess(),
            output: inner.said(output, inner.prompt.bound),
            hold_nano: inner.held,
            account_id: inner.line.account_id,
        };
        inner.marked = output;
        match needed {
            true => boot.journal.mark(&mut inner.place, inner.line.sequence, &mark),
            false => boot.journal.mark_if_room(&mut inner.place, inner.line.sequence, &mark),
        }
    }

    /// Takes as many further slices as `output` needs from the room that there is, or asks the store for their money;
    /// none where the hold pays for it already. `None` when the money is not there.
    pub fn slices(&self, output: u64) -> impl Future<Output = Option<Slices>> + Send + 'static {
        let (boot, inner) = (self.boot.clone(), self.inner());
        let (purse, slices, may) = (inner.purse.clone(), inner.slices_missing(output), inner.may_slice());
        let (key, amount, own) = (inner.key.clone(), inner.slices_nano(slices), inner.quota.amounts());
        async move {
            if slices == 0 {
                return Some(Slices { slices, taken: Taken::of(&purse, 0)?, quota: Quota::default() });
            }
            if !may {
                return None;
            }
            let look = || tokio::time::sleep(FREED_LOOK);
            // At its limit a call waits for those that hold against the same one and do not wait, and for nobody else.
            let waits = std::sync::Mutex::new(None);
            let wait = |hold| *waits.lock().expect("no holder of this lock panics") = hold;
            let held = || async {
                wait(None);
                loop {
                    match hold(&boot, &purse, &key, amount).await? {
                        Ok(held) => return Ok::<_, Error>(Some(held)),
                        Err(Short::Money) => wait(Some(WaitingHold::for_money(&key, own))),
                        Err(Short::Limit(reached)) => match reached.wait(&key, own, amount)? {
                            Some(hold) => wait(Some(hold)),
                            None => continue,
                        },
                    }
                    return Ok(None);
                }
            };
            let (quota, taken) = Waiting::new(&purse).cover(held, look).await?;
            Some(Slices { slices, taken, quota })
        }
    }

    /// Adds slices, and writes MARK; false when it has to be written and cannot be. What the hold paid for before needs
    /// none: a full disk ends no call whose money is there.
    pub fn add_slices(&mut self, Slices { slices, taken, quota }: Slices, handed_over: u64) -> bool {
        let inner = self.inner_mut();
        inner.held += taken.keep();
        inner.quota.add(quota);
        inner.covered += slices * SLICE_TOKENS;
        self.write_mark(handed_over, slices > 0) || slices == 0
    }

    /// Tells what a drop has to settle: output tokens handed over so far, and whether that count is exact.
    pub fn handed_over(&mut self, output: u64, estimated: bool) {
        let inner = self.inner_mut();
        inner.output = output;
        inner.estimated |= estimated;
        inner.content = true;
    }

    /// Tells what the upstream bills for an answer that its client left: what the charge does not cover is absorbed.
    pub fn upstream_bills(&mut self, usage: Option<Usage>) {
        self.inner_mut().upstream_bills = usage;
    }

    /// Whether the end needs the prompt counted, and counting would take too long for a worker: then
    /// [`OpenLine::prepare`] has to be awaited before it.
    pub fn needs_time(&self, usage: Option<Usage>) -> bool {
        let Inner { prompt, unmeasured, cross_checked, .. } = self.inner();
        let needs = *cross_checked || usage.is_none_or(|usage| usage.input > prompt.usage_bound());
        !unmeasured && needs && prompt.is_long()
    }

    /// Counts a long prompt on a blocking thread, where the end needs it; otherwise returns at once.
    pub async fn prepare(&mut self, usage: Option<Usage>) {
        if self.needs_time(usage) {
            self.inner_mut().prompt.count().await;
        }
    }

    /// Settles the call: END is in the kernel when this returns.
    pub fn end(mut self, ended: Ended) {
        if let Some(inner) = self.inner.take() {
            inner.settle(&self.boot, ended);
        }
    }
}

impl Drop for OpenLine {
    fn drop(&mut self) {
        let Some(inner) = self.inner.take() else { return };
        let cut_off = self.ledger.cut_off.load(Ordering::Acquire);
        let ended = Ended {
            reason: if cut_off { EndReason::Drained } else { EndReason::ClientGone },
            status: 499, // nginx's number for a client that closed its request
            usage: None,
            usage_invalid: false,
            output: inner.output,
            estimated: inner.estimated,
            tool_calls: 0,
            content: inner.content,
            may_be_billed: inner.called,
            unmeasured: inner.unmeasured,
        };
        let boot = self.boot.clone();
        let counts = inner.content && !inner.unmeasured && inner.prompt.counted.is_none() && inner.prompt.is_long();
        let settling = Settling::new(inner, boot, ended);
        match tokio::runtime::Handle::try_current() {
            // A hand-over: a worker must not count a long prompt in a drop.
            Ok(runtime) if counts => drop(runtime.spawn_blocking(move || drop(settling))),
            _ => drop(settling),
        }
    }
}

impl Inner {
    /// What of `output` the model said, where its answers begin with a prompt of so many tokens.
    fn said(&self, output: u64, prompt: u64) -> u64 {
        output.saturating_sub(prompt.saturating_mul(self.echoes))
    }

    fn may_slice(&self) -> bool {
        self.sliceable && !self.key.user.is_frozen() && !self.key.is_revoked()
    }

    /// Slices that are missing for `output`.
    fn slices_missing(&self, output: u64) -> u64 {
        output.saturating_sub(self.covered).div_ceil(SLICE_TOKENS)
    }

    fn slices_nano(&self, slices: u64) -> i64 {
        self.dearest.output_nano(slices.saturating_mul(SLICE_TOKENS))
    }
}

/// Why an amount cannot be held.
#[derive(Debug)]
enum Short {
    /// The purse does not have it, nor does the store.
    Money,
    Limit(Reached),
}

impl From<Short> for Error {
    fn from(short: Short) -> Error {
        match short {
            Short::Money => Error::QuotaExceeded,
            Short::Limit(reached) => reached.error,
        }
    }
}

/// Holds `amount` from the purse and within the limits; the inner error says which of them does not have it.
async fn hold(
    boot: &Arc<Boot>,
    purse: &Arc<Purse>,
    key: &Key,
    amount: i64,
) -> Result<Result<(Quota, Taken), Short>, Error> {
    boot.know_limits(key).await?;
    if let Err(reached) = Quota::allows(key, amount) {
        return Ok(Err(Short::Limit(reached)));
    }
    // Money first: it may take a while to come, and until then nothing of the limits is taken from others.
    let Some(taken) = boot.cover(purse, amount).await? else { return Ok(Err(Short::Money)) };
    // It may have taken so long that the figures were forgotten.
    boot.know_limits(key).await?;
    Ok(Quota::hold(key, amount).map(|quota| (quota, taken)).map_err(Short::Limit))
}

/// What a call can hold now: what the limits leave of what the purse has.
fn room(purse: &Purse, key: &Key) -> i64 {
    quota::room(key).map_or(purse.room(), |left| left.min(purse.room()))
}

fn elapsed_ms(begun: Instant) -> u64 {
    begun.elapsed().as_millis() as u64
}

fn bounded(id: &str) -> String {
    id.chars().filter(|c| c.is_ascii_graphic()).take(CLIENT_ID_BYTES_MAX).collect()
}
