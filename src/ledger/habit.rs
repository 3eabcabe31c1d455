//! What a model usually answers: how much to hold for a call that does not say.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A call without a bound of its own holds at least this much output.
const OUTPUT_USUAL_MIN: u64 = 256;

/// What a model usually answers, and whether its upstream was seen to bill what is not seen. Kept per node, in memory.
#[derive(Debug, Default)]
pub(super) struct Habit {
    /// Calls by the bit length of their output.
    lengths: [AtomicU64; Habit::LENGTHS],
    pub bills_unseen: AtomicBool,
}

impl Habit {
    const LENGTHS: usize = 32;
    /// Calls that are remembered; at twice as many each count is halved, so that old habits fade.
    const MEMORY: u64 = 512;

    pub fn note(&self, output: u64) {
        let length = (u64::BITS - output.leading_zeros()) as usize;
        self.lengths[length.min(Self::LENGTHS - 1)].fetch_add(1, Ordering::Relaxed);
        if self.calls() > 2 * Self::MEMORY {
            for count in &self.lengths {
                count.store(count.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
            }
        }
    }

    fn calls(&self) -> u64 {
        self.lengths.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The 95th percentile of recent outputs, rounded up to a power of two, within [`OUTPUT_USUAL_MIN`] and `max_output`.
    pub fn usual_output(&self, max_output: u64) -> u64 {
        let rank = self.calls() * 95 / 100;
        let mut seen = 0;
        let length = self.lengths.iter().position(|count| {
            seen += count.load(Ordering::Relaxed);
            seen > rank
        });
        let usual = length.map_or(0, |length| 1u64 << length);
        usual.max(OUTPUT_USUAL_MIN).min(max_output.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_nobody_has_asked_is_held_at_the_least_and_within_what_it_can_say() {
        assert_eq!(Habit::default().usual_output(16_000), OUTPUT_USUAL_MIN);
        assert_eq!(Habit::default().usual_output(100), 100);
    }

    #[test]
    fn one_long_answer_in_twenty_is_covered_and_one_in_a_hundred_is_not() {
        for (long, usual) in [(10, 4096), (1, OUTPUT_USUAL_MIN)] {
            let habit = Habit::default();
            (0..100 - long).for_each(|_| habit.note(40));
            (0..long).for_each(|_| habit.note(3000));
            assert_eq!(habit.usual_output(100_000), usual);
        }
    }

    #[test]
    fn old_habits_fade() {
        let habit = Habit::default();
        (0..900).for_each(|_| habit.note(8000));
        (0..12_000).for_each(|_| habit.note(10));
        assert_eq!(habit.usual_output(100_000), OUTPUT_USUAL_MIN);
    }
}
