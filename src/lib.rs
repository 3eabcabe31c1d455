//! gpt-cat: a reverse proxy for large language models. The modules, in the order of a request's journey.

pub mod config;
pub mod error;
pub mod request;
pub mod sse;
pub mod meter;
pub mod telemetry;
pub mod store;
pub mod catalog;
pub mod users;
pub mod ledger;
pub mod pool;
pub mod preprocess;
pub mod upstream;
pub mod admin;
pub mod server;
