//! The file as it may be typed: every table and key that exists, nothing checked but its TOML type.
//!
//! Numbers are `i64` and choices are strings here, so that the checks (which know the bounds) word the error.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct Raw {
    pub currency: Option<String>,
    pub database_url: Option<String>,
    pub data_dir: Option<String>,
    pub language: Option<String>,
    pub log: RawLog,
    pub server: RawServer,
    pub admin: RawAdmin,
    pub commands: RawCommands,
    pub errors: RawErrors,
    pub title_catch: RawTitleCatch,
    pub retry: RawRetry,
    pub pool: RawPool,
    pub meter: RawMeter,
    pub upstream: RawUpstream,
    pub ledger: RawLedger,
    pub endpoints: BTreeMap<String, RawEndpoint>,
    pub models: BTreeMap<String, RawModel>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawLog {
    pub format: Option<String>,
    pub level: Option<String>,
    pub file: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawServer {
    pub http: Option<String>,
    pub https: Option<String>,
    pub tls_cert: Option<String>,
    pub tls_key: Option<String>,
    pub workers: Option<i64>,
    pub body_bytes_max: Option<i64>,
    pub head_timeout_s: Option<i64>,
    pub body_timeout_s: Option<i64>,
    pub idle_timeout_s: Option<i64>,
    pub write_timeout_s: Option<i64>,
    pub keep_alive_s: Option<i64>,
    pub drain_s: Option<i64>,
    pub connections_per_address: Option<i64>,
    pub trusted_proxies: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawAdmin {
    pub listen: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawCommands {
    pub enabled: Option<bool>,
    pub prefix: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawErrors {
    pub in_chat: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawTitleCatch {
    pub model: Option<String>,
    pub output_max: Option<i64>,
    pub patterns: Vec<RawTitlePattern>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct RawTitlePattern {
    pub whose: String,
    pub role: String,
    #[serde(default)]
    pub anywhere: bool,
    pub text: String,
    #[serde(default)]
    pub model: Option<String>,
    #[serde(default)]
    pub output_max: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawRetry {
    pub tries: Option<i64>,
    pub budget_s: Option<i64>,
    pub retry_after_timeout: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawPool {
    pub concurrency: Option<i64>,
    pub queue_max: Option<i64>,
    pub queue_user_max: Option<i64>,
    pub queue_deadline_s: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawMeter {
    pub vocabulary: Option<String>,
    pub count_prompt: Option<String>,
    pub cross_check_each: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawUpstream {
    pub connect_timeout_s: Option<i64>,
    pub first_byte_timeout_s: Option<i64>,
    pub answer_timeout_s: Option<i64>,
    pub silence_timeout_s: Option<i64>,
    pub total_timeout_s: Option<i64>,
    pub answer_bytes_max: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawLedger {
    pub on_low_balance: Option<String>,
    pub journal_bytes_max: Option<i64>,
    pub fence_s: Option<i64>,
    pub forfeit_s: Option<i64>,
    pub lines_kept_days: Option<i64>,
    pub first_balance: Option<toml::Value>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct RawEndpoint {
    pub dialect: Option<String>,
    pub base_url: Option<String>,
    pub models: Vec<String>,
    pub mapping: BTreeMap<String, String>,
    pub stream_options: Option<bool>,
    pub api_version: Option<String>,
    pub lossy: Option<String>,
    pub calibration: Option<toml::Value>,
    pub on_disconnect: Option<String>,
}

/// Gives a struct the rates of tokens, by kind. (`serde(flatten)` would let unknown keys pass.)
///
/// They are any value here, because an error about a float should say how to write it instead.
macro_rules! with_rates {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Default, Deserialize)]
        #[serde(default, deny_unknown_fields, expecting = "a table")]
        pub struct $name {
            pub input: Option<toml::Value>,
            pub cached_input: Option<toml::Value>,
            pub audio_input: Option<toml::Value>,
            pub image_input: Option<toml::Value>,
            pub output: Option<toml::Value>,
            pub reasoning: Option<toml::Value>,
            pub audio_output: Option<toml::Value>,
            pub image_output: Option<toml::Value>,
            $(pub $field: $type,)*
        }

        impl $name {
            /// Takes the rates out.
            pub fn take_rates(&mut self) -> [(&'static str, Option<toml::Value>); 8] {
                [
                    ("input", self.input.take()),
                    ("cached_input", self.cached_input.take()),
                    ("audio_input", self.audio_input.take()),
                    ("image_input", self.image_input.take()),
                    ("output", self.output.take()),
                    ("reasoning", self.reasoning.take()),
                    ("audio_output", self.audio_output.take()),
                    ("image_output", self.image_output.take()),
                ]
            }
        }
    };
}

with_rates! {
    RawModel {
        per_call: Option<toml::Value>,
        tiers: Vec<RawTier>,
        context: Option<i64>,
        max_output: Option<i64>,
        bills_unseen: Option<bool>,
    }
}

with_rates! {
    RawTier {
        above: Option<i64>,
    }
}
