//! Any file, and any environment, is either refused with a reason or read the same way twice.
//!
//! What stands behind the first NUL is the environment, a `NAME=value` a line.

#![no_main]

use gpt_cat::config::{Config, Errors};
use libfuzzer_sys::fuzz_target;

const DIALECTS: [&str; 4] = ["openai", "azure", "qianwen", "demo"];

fuzz_target!(|input: &str| {
    let (text, env) = input.split_once('\0').unwrap_or((input, ""));
    let first = load(text, env);
    assert_eq!(first, load(text, env), "the same text means the same");
    match first {
        Ok(config) => assert_is_checked(&config),
        Err(errors) => assert!(!errors.problems().is_empty() && !errors.to_string().is_empty()),
    }
});

fn load(text: &str, env: &str) -> Result<Config, Errors> {
    let env = env.lines().filter_map(|line| line.split_once('='));
    Config::load(Some(text), env.map(|(name, value)| (name.to_owned(), value.to_owned())), &DIALECTS)
}

/// What the rest of the program relies on without looking again.
fn assert_is_checked(config: &Config) {
    assert!((1..=10).contains(&config.retry.tries) && config.pool.concurrency > 0);
    assert!(config.server.http.is_some() || config.server.https.is_some());
    for endpoint in config.endpoints.values() {
        assert!(DIALECTS.contains(&endpoint.dialect.as_str()));
        assert!(!endpoint.base_url.ends_with('/') && !endpoint.base_url.contains(['?', '#', '@', ' ']));
        assert!(endpoint.models.iter().all(|model| config.models.contains_key(model)), "no model is free");
        assert!(endpoint.mapping.keys().all(|model| endpoint.models.contains(model)));
    }
    for model in config.models.values() {
        let price = &model.price;
        assert!(
            [price.rates.input_nano, price.rates.cached_input_nano, price.rates.output_nano, price.per_call_nano]
                .iter()
                .all(|p| *p >= 0)
        );
        assert!(model.max_output > 0 && model.max_output <= model.context);
    }
}
