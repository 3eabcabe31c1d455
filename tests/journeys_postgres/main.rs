//! The journeys that move money, with the books in PostgreSQL.

#![allow(dead_code, reason = "the helpers serve all journeys, of which these are a part")]

#[path = "../support/cluster.rs"]
mod cluster;
#[path = "../journeys/commands.rs"]
mod commands;
#[path = "../journeys/faults.rs"]
mod faults;
#[path = "../journeys/limits.rs"]
mod limits;
#[path = "../journeys/money.rs"]
mod money;
#[path = "../journeys/node.rs"]
mod node;
#[path = "../journeys/upstream.rs"]
mod upstream;

const POSTGRES: bool = true;
