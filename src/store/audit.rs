//! What `gpt-cat audit` has to add up, read in one transaction so that the sums belong together.

use super::Line;
use crate::config::Price;

/// Sums of one user, in nano-units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserSums {
    pub user_id: i64,
    pub name: String,
    /// Σ credits and debits.
    pub entries_nano: i64,
    /// Σ charges of lines.
    pub charged_nano: i64,
    pub balance_nano: i64,
    /// Σ leases of all boots.
    pub leased_nano: i64,
}

impl UserSums {
    /// Credits − charges − balance − leases: zero, or money was lost or made.
    pub fn difference_nano(&self) -> i64 {
        self.entries_nano - self.charged_nano - self.balance_nano - self.leased_nano
    }
}

/// Everything an audit adds up.
#[derive(Debug)]
pub struct Audit {
    pub users: Vec<UserSums>,
    pub lines: u64,
    pub charged_nano: i64,
    pub absorbed_nano: i64,
    /// What the check of each line found wrong, at most [`FINDINGS_MAX`].
    pub findings: Vec<String>,
}

/// What lines of one user and model cost when they were billed, and would cost at another price.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recomputed {
    pub user: String,
    pub model: String,
    pub lines: u64,
    pub charged_nano: i64,
    pub absorbed_nano: i64,
    /// At the prices that the lines were billed with.
    pub cost_nano: i64,
    pub new_cost_nano: i64,
}

/// The cost of a line's tokens at a price, in nano-units; 0 where nothing was billed.
pub type LineCost = fn(&Line, &Price) -> i64;

/// Findings kept; an audit that finds more has said enough.
pub const FINDINGS_MAX: usize = 1000;

/// Recomputes a line from its tokens, price and ratio; says what is wrong with it.
pub type LineCheck = fn(&Line, &Price) -> Option<String>;
