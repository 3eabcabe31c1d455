//! The tables: medians over the rounds, and medians of the ratios within each round.

use std::time::Duration;

use crate::measure::{Cost, SCENARIOS};

/// The most that the gateway may add to a request's time, and keep for a stream, in terms of nginx and in KiB.
const GATE_ADDED_P50: f64 = 1.3;
const GATE_RESIDENT_KIB: f64 = 32.0;

/// All that was measured of one proxy.
pub struct Row {
    pub name: &'static str,
    /// One a round, of each scenario.
    pub costs: Vec<Vec<Cost>>,
    /// All rounds together.
    pub latencies: Vec<Duration>,
    pub resident_per_stream_kib: Option<f64>,
}

/// Prints a row for each scenario as a Markdown table; `direct` are latencies without a proxy.
pub fn print(rows: &[Row], direct: &[Duration]) {
    let names: Vec<_> = rows.iter().map(|row| row.name).collect();
    println!("| CPU time in µs, each | {} | last to first | to second | gate |", names.join(" | "));
    println!("|{}", " --- |".repeat(rows.len() + 4));
    let last = rows.len() - 1;
    for (at, scenario) in SCENARIOS.iter().enumerate() {
        let mut cells = vec![scenario.name.to_owned()];
        cells.extend(rows.iter().map(|row| value(&row.costs[at], |cost| cost.unit_us, 1)));
        cells.extend(
            [0, 1].map(|other| ratio(&rows[last].costs[at], &rows[other.min(last)].costs[at], |cost| cost.unit_us)),
        );
        cells.push(scenario.gate.map_or_else(absent, |gate| format!("{gate:.2}")));
        println!("| {} |", cells.join(" | "));
    }
    let other = |name: &str, values: Vec<Option<f64>>, gate: String| {
        let to = |other: usize| match (values[last], values[other.min(last)]) {
            (Some(value), Some(other)) => format!("{:.2}", value / other),
            _ => absent(),
        };
        let shown = values.iter().map(|value| value.map_or_else(absent, |value| format!("{value:.1}")));
        println!("| {name} | {} | {} | {} | {gate} |", shown.collect::<Vec<_>>().join(" | "), to(0), to(1));
    };
    for (name, share, gate) in
        [("added p50, µs", 0.5, format!("{GATE_ADDED_P50:.2}")), ("added p99, µs", 0.99, absent())]
    {
        other(name, rows.iter().map(|row| added(&row.latencies, direct, share)).collect(), gate);
    }
    let resident = rows.iter().map(|row| row.resident_per_stream_kib).collect();
    other("RSS of an open stream, KiB", resident, format!("{GATE_RESIDENT_KIB:.0} KiB"));

    println!(
        "\nUnits a second, share of its core that the proxy used, share of theirs that driver and upstream used:\n"
    );
    println!("| | {} |", names.join(" | "));
    println!("|{}", " --- |".repeat(rows.len() + 1));
    for (at, scenario) in SCENARIOS.iter().enumerate() {
        let speed = |row: &Row| {
            let of = |of: fn(&Cost) -> f64, decimals| value(&row.costs[at], of, decimals);
            format!("{}, {}, {}", of(|cost| cost.units_per_s, 0), of(|cost| cost.busy, 2), of(|cost| cost.load_busy, 2))
        };
        println!("| {} | {} |", scenario.name, rows.iter().map(speed).collect::<Vec<_>>().join(" | "));
    }
}

/// The median of the rounds, to be shown.
pub fn value(costs: &[Cost], of: fn(&Cost) -> f64, decimals: usize) -> String {
    middle(costs.iter().map(of).collect()).map_or_else(absent, |(median, ..)| format!("{median:.decimals$}"))
}

/// The median of the rounds' ratios, with the smallest and the largest.
pub fn ratio(costs: &[Cost], others: &[Cost], of: fn(&Cost) -> f64) -> String {
    let ratios = costs.iter().zip(others).map(|(cost, other)| of(cost) / of(other)).collect();
    middle(ratios).map_or_else(absent, |(median, least, most)| format!("{median:.2} ({least:.2}–{most:.2})"))
}

/// What a proxy adds to a request's time, in microseconds.
fn added(latencies: &[Duration], direct: &[Duration], share: f64) -> Option<f64> {
    let (through, direct) = (quantile(latencies, share)?, quantile(direct, share)?);
    Some((through.as_secs_f64() - direct.as_secs_f64()) * 1e6)
}

fn absent() -> String {
    "–".to_owned()
}

fn quantile(times: &[Duration], share: f64) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().checked_sub(1)?;
    Some(sorted[(last as f64 * share).round() as usize])
}

/// Median, least and most.
pub fn middle(mut values: Vec<f64>) -> Option<(f64, f64, f64)> {
    values.sort_unstable_by(f64::total_cmp);
    let (least, most) = (*values.first()?, *values.last()?);
    let half = values.len() / 2;
    let median = if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 };
    Some((median, least, most))
}
