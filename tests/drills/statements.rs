//! What calls cost the database: all statements that it was sent, BEGIN and COMMIT among them, by `pg_stat_statements`.

use std::thread;
use std::time::{Duration, Instant};

use crate::cluster::{self, Cluster};
use crate::field::{self, Field, chat_as};

const USERS: usize = 100;
const PER_S: usize = 500;
const CLIENTS: usize = 25;
/// Until users have spent for a while, their leases are small.
const WARM_S: u64 = 10;

/// Makes users with a balance and a key each, `sk-user-<number>`.
fn add_users(url: &str) {
    let sql = format!(
        "WITH added AS (INSERT INTO users (name, balance_nano, created_ms)
                        SELECT 'user' || n, 1000000000000, 0 FROM generate_series(1, {USERS}) AS n RETURNING id, name),
              credited AS (INSERT INTO entries (user_id, amount_nano, at_ms) SELECT id, 1000000000000, 0 FROM added)
         INSERT INTO keys (user_id, hash, hint, created_ms)
         SELECT id, sha256(convert_to('sk-user-' || substr(name, 5), 'UTF8')), 'hint', 0 FROM added"
    );
    cluster::run(url, &sql);
}

/// Calls of all users in turn at the rate, for so long; how many there were.
fn load(address: &str, lasts: Duration) -> usize {
    let begun = Instant::now();
    let every = Duration::from_secs(1) * CLIENTS as u32 / PER_S as u32;
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                scope.spawn(move || {
                    let mut count = 0;
                    while begun.elapsed() < lasts {
                        let due = every * count as u32 + every * client as u32 / CLIENTS as u32;
                        thread::sleep(due.saturating_sub(begun.elapsed()));
                        let user = (count * CLIENTS + client) % USERS + 1;
                        let reply = chat_as(&format!("sk-user-{user}"), address, r#""max_tokens":50"#, "words=40");
                        assert_eq!((reply.status, reply.words), (200, 40), "{reply:?}");
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    })
}

#[test]
fn a_thousand_calls_cost_twenty_statements_at_most_with_all_that_a_second_costs() {
    let settings = "-c shared_preload_libraries=pg_stat_statements -c pg_stat_statements.track=top";
    let Some(cluster) = Cluster::start_with(None, settings) else { return };
    let url = cluster.database();
    cluster::run(&url, "CREATE EXTENSION pg_stat_statements");
    let mut field = Field::on(tempfile::tempdir().unwrap(), url.clone(), 1_000_000_000, "");
    add_users(&url);
    let node = field.start_node();
    let address = field.address(node);
    load(&address, Duration::from_secs(WARM_S));
    let counted = "FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid
                   WHERE datname = current_database() AND query NOT LIKE '%pg_stat%'";
    cluster::run(&url, "SELECT pg_stat_statements_reset()");
    let lasts = Duration::from_secs(field::rounds(8));
    let calls = load(&address, lasts);
    let all =
        cluster::run(&url, &format!("SELECT calls, regexp_replace(query, '\\s+', ' ', 'g') {counted} ORDER BY 1 DESC"));
    let count = |like: &str| -> u64 {
        let sql = format!("SELECT coalesce(sum(calls), 0) {counted} AND query LIKE '{like}'");
        cluster::run(&url, &sql).parse().unwrap()
    };
    let per_s = calls as f64 / lasts.as_secs_f64();
    assert!(per_s > 0.8 * PER_S as f64, "only {per_s} calls a second: too slow a machine to say anything");
    // Each of these with its BEGIN and COMMIT. More shipments than one a second would be those of many lines.
    let shipments = count("UPDATE boots SET shipped%").min(lasts.as_secs() + 1);
    let each_second = 6 * shipments
        + 4 * count("UPDATE boots SET seen_ms%")
        + count("SELECT sequence, kind, row_id FROM changes%")
        + 5 * count("WITH granted%").min(lasts.as_secs() + 1);
    let (total, checks) = (count("%"), count("SELECT $1"));
    let of_calls = (total - each_second - checks) as f64 * 1000.0 / calls as f64;
    let in_all = total as f64 * 1000.0 / calls as f64;
    eprintln!(
        "{calls} calls, {per_s:.0} a second: {in_all:.1} statements a thousand, {of_calls:.1} beside those of each second"
    );
    eprintln!("{all}");
    // A machine that was slower than the rate had more seconds a thousand calls.
    let at_rate = of_calls + each_second as f64 * 1000.0 / (lasts.as_secs() as f64 * PER_S as f64);
    assert!(at_rate <= 20.0, "{at_rate}\n{all}");
    field.stop_all();
    field.assert_sums();
}
