//! The table: medians over the rounds, and medians of the ratios within each round.

use std::time::Duration;

use crate::measure::Cost;

/// All that was measured of one proxy.
pub struct Row {
    pub name: &'static str,
    /// One a round.
    pub costs: Vec<Cost>,
    /// All rounds together.
    pub latencies: Vec<Duration>,
    pub resident_per_stream_kib: Option<f64>,
}

/// Prints the rows as a Markdown table; `direct` are latencies without a proxy.
pub fn print(rows: &[Row], direct: &[Duration]) {
    println!(
        "| proxy | request, CPU µs | /nginx | /bare | 64-chunk stream, CPU µs | /nginx | /bare | paced chunk, CPU µs \
         | requests/s | of its core used | added p50, µs | added p99, µs | RSS per open stream, KiB |"
    );
    println!("|{}", " --- |".repeat(13));
    for row in rows {
        let mut cells = vec![row.name.to_owned()];
        for of in [(|cost| cost.request_us) as fn(&Cost) -> f64, |cost| cost.stream_us] {
            cells.push(value(row, of, 1));
            cells.push(ratio(row, rows.first(), of));
            cells.push(ratio(row, rows.get(1), of));
        }
        cells.push(value(row, |cost| cost.paced_chunk_us, 1));
        cells.push(value(row, |cost| cost.requests_per_s, 0));
        cells.push(value(row, |cost| cost.busy, 2));
        cells.push(added(&row.latencies, direct, 0.50));
        cells.push(added(&row.latencies, direct, 0.99));
        cells.push(row.resident_per_stream_kib.map_or_else(absent, |kib| format!("{kib:.1}")));
        println!("| {} |", cells.join(" | "));
    }
}

fn value(row: &Row, of: fn(&Cost) -> f64, decimals: usize) -> String {
    middle(row.costs.iter().map(of).collect()).map_or_else(absent, |(median, ..)| format!("{median:.decimals$}"))
}

/// The median of the rounds' ratios, with the smallest and the largest.
fn ratio(row: &Row, to: Option<&Row>, of: fn(&Cost) -> f64) -> String {
    let ratios = to.into_iter().flat_map(|to| row.costs.iter().zip(&to.costs)).map(|(a, b)| of(a) / of(b)).collect();
    middle(ratios).map_or_else(absent, |(median, least, most)| format!("{median:.2} ({least:.2}–{most:.2})"))
}

fn added(latencies: &[Duration], direct: &[Duration], share: f64) -> String {
    match (quantile(latencies, share), quantile(direct, share)) {
        (Some(through), Some(direct)) => format!("{:.0}", (through.as_secs_f64() - direct.as_secs_f64()) * 1e6),
        _ => absent(),
    }
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
fn middle(mut values: Vec<f64>) -> Option<(f64, f64, f64)> {
    values.sort_unstable_by(f64::total_cmp);
    let (least, most) = (*values.first()?, *values.last()?);
    let half = values.len() / 2;
    let median = if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 };
    Some((median, least, most))
}
