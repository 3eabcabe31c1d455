//! What a second worker brings: the gateway with one worker and with two, in turn.

use crate::Outcome;
use crate::measure::{self, Cost, SCENARIOS, Size};
use crate::proxies::{KINDS, Place};
use crate::report::{middle, ratio, value};

/// Two workers answer so many times the requests of one, with the load side on a core of its own.
const GATE: f64 = 1.7;

/// Runs both in each round and prints a table. `spare`: the load side has a core beside the two of the workers.
pub async fn run(place: &Place<'_>, mock: u32, size: Size, rounds: usize, spare: bool) -> Outcome<()> {
    let gateway = KINDS.last().expect("the gateway is the last one");
    let (one, two) = (place.folder.join("one"), place.folder.join("two"));
    let one = gateway.start(&Place { folder: &one, ..*place }).await?;
    let two = gateway.start(&Place { folder: &two, cores: place.cores.map(|_| "0,1"), workers: 2, ..*place }).await?;
    let mut costs = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for turn in 0..2 {
            let at = (turn + round) % 2;
            let proxy = [&one, &two][at];
            measure::warm_up(proxy.address, size).await?;
            costs[at].push(measure::cost(proxy, mock, &SCENARIOS[0], size).await?);
        }
        println!("round {} of {rounds} done", round + 1);
    }
    println!("\n| {} | one worker | two workers | two to one |\n| --- | --- | --- | --- |", SCENARIOS[0].name);
    let show = |name: &str, of: fn(&Cost) -> f64, decimals| {
        let [one, two] = &costs;
        println!("| {name} | {} | {} | {} |", value(one, of, decimals), value(two, of, decimals), ratio(two, one, of));
    };
    show("CPU µs a request", |cost| cost.unit_us, 1);
    show("requests/s", |cost| cost.units_per_s, 0);
    show("cores used", |cost| cost.busy, 2);
    show("cores used by driver and upstream", |cost| cost.load_busy, 2);
    if spare {
        println!("\nrequests/s are to be {GATE} times as many");
    } else {
        let ratios = costs[0].iter().zip(&costs[1]).map(|(one, two)| 2.0 * one.unit_us / two.unit_us).collect();
        let (median, least, most) = middle(ratios).ok_or("no round")?;
        println!(
            "\nThis machine has no core for the load beside the workers': requests/s say nothing here. By their CPU time two \
             cores of their own could answer {median:.2} ({least:.2}–{most:.2}) times the requests of one ({GATE} are aimed at)."
        );
    }
    Ok(())
}
