//! Whole journeys over real sockets: a client, a gateway in this process, and a scripted upstream.
//!
//! Every journey ends with the node's books adding up and no lease left ([`Node::finish`]).

#[path = "../support/cluster.rs"]
mod cluster;
mod commands;
mod corpus;
mod counting;
mod faults;
mod front_ends;
mod http2;
mod limits;
mod money;
mod node;
mod paths;
mod providers;
mod qianwen;
mod upstream;
mod wire;

/// These journeys keep their books in SQLite; `tests/journeys_postgres` has them over again with PostgreSQL.
const POSTGRES: bool = false;
