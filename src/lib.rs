//! gpt-cat: a reverse proxy for large language models. The modules, in the order of a request's journey.
//!
//! Each module says at its top what it is for; the lines here are the same in one sentence, in plain comments, so that links
//! in a module's own documentation are resolved in the module.

// Accepts sockets and walks each request through the stages.
pub mod server;
// Reads the head of a request; leaves the body as it came.
pub mod request;
// Decides what becomes of a request: forward it, answer it here, or refuse it.
pub mod preprocess;
// Holds and charges money; nothing is lost.
pub mod ledger;
// Lends upstream accounts, one permit at a time.
pub mod pool;
// Speaks each provider's dialect, and tries accounts until one answers.
pub mod upstream;
// Cuts a byte stream into events.
pub mod sse;
// Counts tokens as they pass.
pub mod meter;
// Models, mappings and prices, as a snapshot.
pub mod catalog;
// Keys, users and groups, as a snapshot that is updated in place.
pub mod users;
// Rows in and out of the database; the only SQL.
pub mod store;
// File and environment become checked values.
pub mod config;
// Every way a request fails, and what the client is told.
pub mod error;
// Logs, metrics and request ids.
pub mod telemetry;
// Where a drill lets this process die; nothing in a release.
pub mod failpoint;
// Lets an operator look and change things.
pub mod admin;
