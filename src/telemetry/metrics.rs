//! What a node counts of itself, for Prometheus.

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// The bounds of a ratio of two counts of the same tokens: near one it matters.
const RATIOS: [f64; 13] = [0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.001, 1.01, 1.02, 1.05, 1.1, 1.5];

/// What is counted; a value, so that a test can have two.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    count_ratio: Family<Counted, Histogram>,
}

/// Which tokens were counted, of whose answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Counted {
    endpoint: String,
    tokens: Tokens,
}

/// The tokens that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Tokens {
    Input,
    Output,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("gpt_cat");
        let count_ratio = Family::<Counted, Histogram>::new_with_constructor(|| Histogram::new(RATIOS));
        registry.register(
            "count_ratio",
            "Tokens as counted here over tokens as the provider says, of calls with both",
            count_ratio.clone(),
        );
        Metrics { registry, count_ratio }
    }
}

impl Metrics {
    /// Notes how the local count of a call compares with the usage of its provider; nothing where that is zero.
    pub fn counted(&self, endpoint: &str, tokens: Tokens, counted: u64, usage: u64) {
        if usage > 0 {
            let labels = Counted { endpoint: endpoint.to_owned(), tokens };
            self.count_ratio.get_or_create(&labels).observe(counted as f64 / usage as f64);
        }
    }

    /// All of them in Prometheus' text format (OpenMetrics).
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_of_the_counts_is_exported_by_endpoint() {
        let metrics = Metrics::default();
        metrics.counted("openai", Tokens::Output, 99, 100);
        metrics.counted("openai", Tokens::Input, 0, 0);
        let text = metrics.text();
        assert!(text.contains("gpt_cat_count_ratio_sum{endpoint=\"openai\",tokens=\"Output\"} 0.99"), "{text}");
        assert!(!text.contains("Input"), "{text}");
    }
}
