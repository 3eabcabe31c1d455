//! gpt-cat: a reverse proxy for large language models. The modules, in the order of a request's journey.

pub mod error;
