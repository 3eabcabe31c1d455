//! What is wrong with a configuration: where it was set, which key, what was expected there.

use std::fmt;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The program's own defaults.
    BuiltIn,
    /// A line of the file of imported prices, from 1.
    Prices(usize),
    /// A line of the file, from 1.
    Line(usize),
    /// An environment variable.
    Variable(String),
}

/// One thing that is wrong. It never repeats a value that may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    /// The key as TOML writes it, `models."gpt-4.1".input`; empty where the file is no TOML at all.
    pub key: String,
    /// What was expected and what was found.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::BuiltIn => {}
            Place::Prices(line) => write!(f, "imported prices, line {line}: ")?,
            Place::Line(line) => write!(f, "line {line}: ")?,
            Place::Variable(name) => write!(f, "variable {name}: ")?,
        }
        match self.key.as_str() {
            "" => f.write_str(&self.what),
            key => write!(f, "{key}: {}", self.what),
        }
    }
}

/// Everything that is wrong with a configuration, at least one problem; `Display` gives each a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors(pub(super) Vec<Problem>);

impl Errors {
    /// The problems: those of the files first, in its order, then those of the environment, then the rest.
    pub fn problems(&self) -> &[Problem] {
        &self.0
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

impl From<Vec<Problem>> for Errors {
    fn from(mut problems: Vec<Problem>) -> Errors {
        problems.sort_by_key(|problem| match problem.place {
            Place::Prices(line) => (0, line),
            Place::Line(line) => (1, line),
            Place::Variable(_) => (2, 0),
            Place::BuiltIn => (3, 0),
        });
        Errors(problems)
    }
}

/// The path of `key` below `parent` as TOML writes it: quoted unless it may stand bare.
pub fn below(parent: &str, key: &str) -> String {
    let is_bare = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let dot = if parent.is_empty() { "" } else { "." };
    match !key.is_empty() && key.bytes().all(is_bare) {
        true => format!("{parent}{dot}{key}"),
        false => format!("{parent}{dot}{key:?}"),
    }
}

/// The path of the `index`th item, from 0, of the array `parent`.
pub fn item(parent: &str, index: usize) -> String {
    format!("{parent}[{index}]")
}
