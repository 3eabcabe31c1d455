//! What was typed becomes what it means: every default beside its bounds, every mistake beside its key.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use toml::Value;

use super::decimal::{NANO, parse_nano};
use super::layers::{Places, Typed};
use super::problem::{Errors, Place, Problem, below, item};
use super::raw::{RawEndpoint, RawLedger, RawModel, RawServer, RawTier, RawTitleCatch};
use super::url::{is_blank, parse_base_url, parse_database_url};
use super::*;

const KIB: i64 = 1024;
const MIB: i64 = 1024 * KIB;
const GIB: i64 = 1024 * MIB;
const DAY_S: i64 = 24 * 60 * 60;

/// Most items of one kind (endpoints, models, patterns, proxies): tables are walked, some of them for each request.
pub(super) const ITEMS_MAX: usize = 4096;

/// Longest name of an endpoint, model or upstream model, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// Longest text of a pattern, in bytes: every request is held against each.
const PATTERN_BYTES_MAX: usize = 4096;

/// Most tokens that a model may be said to take: far above any, far below where a cost could overflow.
const TOKENS_MAX: i64 = 100_000_000;

/// A model's context and longest answer where its entry says nothing.
const CONTEXT_DEFAULT: u64 = 128_000;
const MAX_OUTPUT_DEFAULT: u64 = 16_384;

/// Where a dialect is spoken unless the endpoint says otherwise.
const BASE_URLS: [(&str, &str); 2] =
    [("openai", "https://api.openai.com/v1"), ("qianwen", "https://dashscope.aliyuncs.com/api/v1")];

/// What the prices of default.toml are in.
const BUILT_IN_CURRENCY: &str = "USD";

/// The dialect that answers by itself.
const DEMO: &str = "demo";

/// The dialect that has versions, and the one it speaks unless told otherwise: the last that is no preview.
const AZURE: &str = "azure";
const AZURE_API_VERSION: &str = "2024-10-21";

/// How the names of models begin whose reasoning is billed but not shown.
const BILLS_UNSEEN: [&str; 4] = ["o1", "o3", "o4", "gpt-5"];

/// Checks everything and reports all that is wrong at once.
pub fn config(typed: Typed, dialects: &[&str]) -> Result<Config, Errors> {
    let Typed { raw, places } = typed;
    let mut check = Check { places, problems: Vec::new(), warnings: Vec::new() };
    let c = &mut check;

    let database_url = c.database_url(raw.database_url);
    let data_dir = c.path("data_dir", raw.data_dir).unwrap_or_else(|| folder_of(&database_url));
    let served = c.served(&raw.endpoints, &raw.models);
    let config = Config {
        currency: c.currency(raw.currency),
        database_url,
        data_dir,
        language: c.choice("language", raw.language, &[("en", Language::En), ("zh", Language::Zh)]),
        log: Log {
            format: c.choice("log.format", raw.log.format, &[("text", LogFormat::Text), ("json", LogFormat::Json)]),
            level: c.log_level(raw.log.level),
            file: c.path("log.file", raw.log.file),
        },
        server: c.server(raw.server),
        admin: Admin { listen: c.listen("admin.listen", raw.admin.listen, ADMIN_DEFAULT) },
        commands: Commands {
            enabled: raw.commands.enabled.unwrap_or(true),
            prefix: c.command_prefix(raw.commands.prefix),
        },
        errors: ToldErrors { in_chat: raw.errors.in_chat.unwrap_or(false) },
        title_catch: c.title_catch(raw.title_catch, &served),
        retry: Retry {
            tries: c.number("retry.tries", raw.retry.tries, 3, 1..=RETRY_TRIES_MAX),
            budget_s: c.number("retry.budget_s", raw.retry.budget_s, 60, 1..=600),
            retry_after_timeout: raw.retry.retry_after_timeout.unwrap_or(false),
        },
        pool: PoolBounds {
            concurrency: c.number("pool.concurrency", raw.pool.concurrency, 10, 1..=100_000),
            queue_max: c.number("pool.queue_max", raw.pool.queue_max, 10_000, 0..=1_000_000),
            queue_user_max: c.number("pool.queue_user_max", raw.pool.queue_user_max, 100, 0..=1_000_000),
            queue_deadline_s: c.number("pool.queue_deadline_s", raw.pool.queue_deadline_s, 25, 1..=600),
        },
        meter: Meter {
            vocabulary: c.choice(
                "meter.vocabulary",
                raw.meter.vocabulary,
                &[("o200k", ForeignVocabulary::O200k), ("cl100k", ForeignVocabulary::Cl100k)],
            ),
            count_prompt: c.choice(
                "meter.count_prompt",
                raw.meter.count_prompt,
                &[("when_needed", CountPrompt::WhenNeeded), ("always", CountPrompt::Always)],
            ),
            cross_check_each: c.number("meter.cross_check_each", raw.meter.cross_check_each, 100, 0..=1_000_000_000),
        },
        upstream: {
            let raw = raw.upstream;
            UpstreamBounds {
                connect_timeout_s: c.number("upstream.connect_timeout_s", raw.connect_timeout_s, 5, 1..=300),
                first_byte_timeout_s: c.number(
                    "upstream.first_byte_timeout_s",
                    raw.first_byte_timeout_s,
                    120,
                    1..=DAY_S,
                ),
                answer_timeout_s: c.number("upstream.answer_timeout_s", raw.answer_timeout_s, 600, 1..=DAY_S),
                silence_timeout_s: c.number("upstream.silence_timeout_s", raw.silence_timeout_s, 300, 1..=DAY_S),
                total_timeout_s: c.number("upstream.total_timeout_s", raw.total_timeout_s, 3600, 1..=DAY_S),
                answer_bytes_max: c.number("upstream.answer_bytes_max", raw.answer_bytes_max, 64 * MIB, KIB..=GIB),
            }
        },
        ledger: c.ledger(raw.ledger),
        endpoints: c.endpoints(raw.endpoints, dialects),
        models: c.models(raw.models, &served),
        warnings: Vec::new(),
    };
    c.listeners(&config);
    c.currency_of_built_in_prices(&config);

    match check.problems.is_empty() {
        true => Ok(Config { warnings: check.warnings, ..config }),
        false => Err(check.problems.into()),
    }
}

/// Collects what is wrong. A check that refuses returns something of the right type, which is then thrown away.
struct Check {
    places: Places,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

/// A section or a group of keys each.
impl Check {
    fn currency(&mut self, typed: Option<String>) -> String {
        let currency = typed.unwrap_or_else(|| BUILT_IN_CURRENCY.to_owned());
        if !(3..=8).contains(&currency.len()) || !currency.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            self.refuse("currency", format!("expected three to eight letters such as \"USD\", found {currency:?}"));
        }
        currency.to_ascii_uppercase()
    }

    fn ledger(&mut self, raw: RawLedger) -> Ledger {
        let ledger = Ledger {
            on_low_balance: self.choice(
                "ledger.on_low_balance",
                raw.on_low_balance,
                &[("clamp", LowBalance::Clamp), ("refuse", LowBalance::Refuse)],
            ),
            journal_bytes_max: self.number(
                "ledger.journal_bytes_max",
                raw.journal_bytes_max,
                GIB,
                64 * MIB..=1024 * GIB, // four segments: fewer could never be given up
            ),
            fence_s: self.number("ledger.fence_s", raw.fence_s, 600, 1..=DAY_S),
            forfeit_s: self.number("ledger.forfeit_s", raw.forfeit_s, 900, 2..=DAY_S),
            lines_kept_days: self.number("ledger.lines_kept_days", raw.lines_kept_days, 0, 0..=36_500),
            first_balance_nano: self.amount("ledger.first_balance", raw.first_balance).unwrap_or(NANO),
        };
        // The margin is for a node whose clock runs slow, or that was stopped between looking at it and acting.
        if ledger.forfeit_s < ledger.fence_s + ledger.fence_s.div_ceil(4) {
            let least = ledger.fence_s + ledger.fence_s.div_ceil(4);
            self.refuse(
                "ledger.forfeit_s",
                format!("expected at least {least}, a quarter above ledger.fence_s, found {}", ledger.forfeit_s),
            );
        }
        ledger
    }

    fn database_url(&mut self, typed: Option<String>) -> DatabaseUrl {
        let text = typed.as_deref().unwrap_or("sqlite:data/gpt-cat.db");
        parse_database_url(text).unwrap_or_else(|what| {
            self.refuse("database_url", what);
            DatabaseUrl::Sqlite(PathBuf::new())
        })
    }

    fn log_level(&mut self, typed: Option<String>) -> String {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let level = typed.unwrap_or_else(|| "info".to_owned());
        let is_directive = |directive: &str| {
            let (target, level) = directive.split_once('=').unwrap_or(("gpt_cat", directive));
            let is_target = |byte: u8| byte.is_ascii_alphanumeric() || b"_:-".contains(&byte);
            LEVELS.contains(&level) && !target.is_empty() && target.bytes().all(is_target)
        };
        if !level.split(',').all(is_directive) {
            let levels = LEVELS.join(", ");
            self.refuse(
                "log.level",
                format!("expected one of {levels}, or such as \"info,hyper=warn\", found {level:?}"),
            );
        }
        level
    }

    fn server(&mut self, raw: RawServer) -> Server {
        Server {
            http: self.listen("server.http", raw.http, HTTP_DEFAULT),
            https: self.listen("server.https", raw.https, HTTPS_DEFAULT),
            tls_cert: self.path("server.tls_cert", raw.tls_cert).unwrap_or_else(|| "ssl/fullchain.pem".into()),
            tls_key: self.path("server.tls_key", raw.tls_key).unwrap_or_else(|| "ssl/key.pem".into()),
            workers: self.number("server.workers", raw.workers, 0, 0..=1024),
            body_bytes_max: self.number("server.body_bytes_max", raw.body_bytes_max, 20 * MIB, KIB..=GIB),
            head_timeout_s: self.number("server.head_timeout_s", raw.head_timeout_s, 10, 1..=600),
            body_timeout_s: self.number("server.body_timeout_s", raw.body_timeout_s, 60, 1..=3600),
            idle_timeout_s: self.number("server.idle_timeout_s", raw.idle_timeout_s, 75, 1..=3600),
            write_timeout_s: self.number("server.write_timeout_s", raw.write_timeout_s, 60, 1..=3600),
            keep_alive_s: self.number("server.keep_alive_s", raw.keep_alive_s, 15, 1..=300),
            drain_s: self.number("server.drain_s", raw.drain_s, 30, 0..=3600),
            connections_per_address: self.number(
                "server.connections_per_address",
                raw.connections_per_address,
                1024,
                0..=1_000_000,
            ),
            trusted_proxies: self.networks("server.trusted_proxies", raw.trusted_proxies),
        }
    }

    /// Two listeners on one address would fail at the start, with less to go by.
    fn listeners(&mut self, config: &Config) {
        let (http, https, admin) = (config.server.http, config.server.https, config.admin.listen);
        if http.is_none() && https.is_none() {
            self.refuse("server.https", "expected an address, because server.http is \"off\" as well".to_owned());
        }
        let is_same = |one: Option<SocketAddr>, other| one == other && one.is_some_and(|address| address.port() != 0);
        let pairs = [("server.https", https, "server.http", http), ("admin.listen", admin, "server.http", http)];
        for (key, one, other_key, other) in pairs.into_iter().chain([("admin.listen", admin, "server.https", https)]) {
            if is_same(one, other) {
                self.refuse(key, format!("expected another address than that of {other_key}"));
            }
        }
    }

    /// Numbers that were meant as dollars would be charged as something else.
    fn currency_of_built_in_prices(&mut self, config: &Config) {
        let is_built_in = |name: &&String| {
            let key = below("models", name);
            let is_ours = |place| matches!(place, Place::BuiltIn | Place::Prices(_));
            ["input", "output", "per_call"].iter().all(|price| is_ours(self.places.of(&below(&key, price))))
        };
        let names: Vec<&str> = config.models.keys().filter(is_built_in).map(String::as_str).collect();
        if config.currency != BUILT_IN_CURRENCY && !names.is_empty() {
            let what = format!("is {}, but built-in and imported prices are in {BUILT_IN_CURRENCY}: ", config.currency);
            self.warn("currency", &(what + &names.join(", ")));
        }
    }

    fn command_prefix(&mut self, typed: Option<String>) -> String {
        let prefix = typed.unwrap_or_else(|| "/".to_owned());
        if !(1..=8).contains(&prefix.chars().count()) || prefix.contains(is_blank) {
            self.refuse("commands.prefix", format!("expected one to eight characters, no blanks, found {prefix:?}"));
        }
        prefix
    }

    fn title_catch(&mut self, raw: RawTitleCatch, served: &BTreeSet<String>) -> TitleCatch {
        const ROLES: [(&str, TitleRole); 3] =
            [("last_user", TitleRole::LastUser), ("system", TitleRole::System), ("any", TitleRole::Any)];
        self.served_model("title_catch.model", raw.model.as_deref(), served);
        self.count("title_catch.patterns", raw.patterns.len());
        let patterns = raw.patterns.into_iter().enumerate().map(|(index, raw)| {
            let key = item("title_catch.patterns", index);
            // The message is trimmed before it is compared, so a blank at the start would never match.
            if raw.text.is_empty() || raw.text.starts_with(is_blank) || raw.text.len() > PATTERN_BYTES_MAX {
                let what = format!("expected 1 to {PATTERN_BYTES_MAX} bytes that do not begin with a blank");
                self.refuse(&below(&key, "text"), what);
            }
            self.served_model(&below(&key, "model"), raw.model.as_deref(), served);
            TitlePattern {
                whose: raw.whose,
                role: self.choice(&below(&key, "role"), Some(raw.role), &ROLES),
                anywhere: raw.anywhere,
                text: raw.text,
                model: raw.model,
                output_max: raw
                    .output_max
                    .map(|max| self.number(&below(&key, "output_max"), Some(max), 1, 1..=TOKENS_MAX)),
            }
        });
        let patterns = patterns.collect();
        let output_max = self.number("title_catch.output_max", raw.output_max, 512, 1..=TOKENS_MAX);
        TitleCatch { model: raw.model, output_max, patterns }
    }

    fn served_model(&mut self, key: &str, model: Option<&str>, served: &BTreeSet<String>) {
        if let Some(model) = model.filter(|model| !served.contains(*model)) {
            self.refuse(key, format!("expected a model that an endpoint serves, found {model:?}"));
        }
    }

    /// All models that endpoints serve, each of which must have a price.
    fn served(
        &mut self,
        endpoints: &BTreeMap<String, RawEndpoint>,
        models: &BTreeMap<String, RawModel>,
    ) -> BTreeSet<String> {
        let mut served = BTreeSet::new();
        for (name, endpoint) in endpoints {
            let key = below("endpoints", name);
            let listed = endpoint.models.iter().enumerate();
            let listed = listed.map(|(index, model)| (item(&below(&key, "models"), index), model));
            let mapped = endpoint.mapping.keys().map(|model| (below(&below(&key, "mapping"), model), model));
            for (key, model) in listed.chain(mapped) {
                self.name(&key, model);
                if served.insert(model.clone()) && !models.contains_key(model) {
                    let model = below("models", model);
                    self.refuse(
                        &key,
                        format!(
                            "serves a model without a price: expected [{model}] with input and output, or per_call"
                        ),
                    );
                }
            }
        }
        served
    }

    fn endpoints(&mut self, raw: BTreeMap<String, RawEndpoint>, dialects: &[&str]) -> BTreeMap<String, Endpoint> {
        self.count("endpoints", raw.len());
        raw.into_iter().map(|(name, raw)| (name.clone(), self.endpoint(name, raw, dialects))).collect()
    }

    fn endpoint(&mut self, name: String, raw: RawEndpoint, dialects: &[&str]) -> Endpoint {
        let key = below("endpoints", &name);
        self.name(&key, &name);
        self.count(&below(&key, "models"), raw.models.len() + raw.mapping.len());
        for (model, upstream) in &raw.mapping {
            self.name(&below(&below(&key, "mapping"), model), upstream);
        }
        let mut seen = BTreeSet::new();
        let models: Vec<String> = raw
            .models
            .into_iter()
            .chain(raw.mapping.keys().cloned())
            .filter(|model| seen.insert(model.clone()))
            .collect();
        if models.is_empty() {
            self.warn(&key, "serves no model");
        }
        let dialect = self.dialect(&key, raw.dialect, dialects);
        Endpoint {
            base_url: self.base_url(&key, raw.base_url, &dialect),
            models,
            mapping: raw.mapping,
            stream_options: raw.stream_options.unwrap_or(true),
            api_version: self.api_version(&key, raw.api_version, &dialect),
            on_disconnect: self.choice(
                &below(&key, "on_disconnect"),
                raw.on_disconnect,
                &[("cancel", OnDisconnect::Cancel), ("drain", OnDisconnect::Drain)],
            ),
            calibration_micro: self.calibration(&below(&key, "calibration"), raw.calibration),
            lossy: self.choice(&below(&key, "lossy"), raw.lossy, &[("refuse", false), ("allow", true)]),
            dialect,
            name,
        }
    }

    fn dialect(&mut self, endpoint: &str, typed: Option<String>, dialects: &[&str]) -> String {
        match typed {
            Some(dialect) if dialects.contains(&dialect.as_str()) => return dialect,
            Some(dialect) => {
                let what = format!("expected one of {}, found {dialect:?}", dialects.join(", "));
                self.refuse(&below(endpoint, "dialect"), what);
            }
            None => self.refuse(endpoint, format!("expected a dialect, one of {}", dialects.join(", "))),
        }
        String::new()
    }

    /// A factor from a tenth to ten, in millionths: beyond it the vocabulary is the wrong one.
    fn calibration(&mut self, key: &str, typed: Option<Value>) -> i64 {
        const MICRO: i64 = NANO / 1_000_000;
        let nano = self.amount(key, typed).unwrap_or(NANO);
        if !(NANO / 10..=10 * NANO).contains(&nano) || nano % MICRO != 0 {
            self.refuse(key, "expected \"0.1\" to \"10\", of at most six decimals".to_owned());
        }
        nano / MICRO
    }

    fn api_version(&mut self, endpoint: &str, typed: Option<String>, dialect: &str) -> String {
        let key = below(endpoint, "api_version");
        let is_version = |text: &str| {
            (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        match typed {
            None if dialect == AZURE => AZURE_API_VERSION.to_owned(),
            None => String::new(),
            Some(version) if dialect != AZURE => {
                self.refuse(&key, format!("expected none: only the dialect {AZURE} has one, found {version:?}"));
                String::new()
            }
            Some(version) if is_version(&version) => version,
            Some(version) => {
                self.refuse(&key, format!("expected a version such as {AZURE_API_VERSION:?}, found {version:?}"));
                String::new()
            }
        }
    }

    fn base_url(&mut self, endpoint: &str, typed: Option<String>, dialect: &str) -> String {
        let key = below(endpoint, "base_url");
        match (typed, dialect) {
            (Some(_), DEMO) => self.refuse(&key, "expected none: the dialect demo calls nobody".to_owned()),
            (Some(text), _) => match parse_base_url(&text) {
                Ok(url) => return url,
                Err(what) => self.refuse(&key, what),
            },
            // An unknown dialect has been reported, and one without a usual URL needs to be told.
            (None, "" | DEMO) => {}
            (None, _) => match BASE_URLS.iter().find(|(known, _)| *known == dialect) {
                Some((_, url)) => return (*url).to_owned(),
                None => self.refuse(endpoint, format!("expected a base_url: the dialect {dialect} has no usual one")),
            },
        }
        String::new()
    }

    fn models(&mut self, raw: BTreeMap<String, RawModel>, served: &BTreeSet<String>) -> BTreeMap<String, Model> {
        self.count("models", raw.len());
        let mut models = BTreeMap::new();
        for (name, raw) in raw {
            let key = below("models", &name);
            let is_typed = !matches!(self.places.of(&key), Place::BuiltIn | Place::Prices(_));
            match (served.contains(&name), is_typed) {
                // Prices that come with the program, or from a list, are there to be used, not to be explained away.
                (false, false) => continue,
                (false, true) => self.warn(&key, "has a price, but no endpoint serves it"),
                (true, _) => {}
            }
            models.insert(name.clone(), self.model(&key, name, raw));
        }
        models
    }

    fn model(&mut self, key: &str, name: String, raw: RawModel) -> Model {
        self.name(key, &name);
        let bills_unseen = raw.bills_unseen.unwrap_or_else(|| is_known_to_bill_unseen(&name));
        let tokens = 1..=TOKENS_MAX;
        let context = self.number(&below(key, "context"), raw.context, CONTEXT_DEFAULT as i64, tokens.clone());
        let usual = MAX_OUTPUT_DEFAULT.min(context) as i64;
        let max_output = self.number(&below(key, "max_output"), raw.max_output, usual, tokens);
        if max_output > context {
            self.refuse(
                &below(key, "max_output"),
                format!("expected at most the context, {context}, found {max_output}"),
            );
        }
        Model { price: self.price(key, raw), name, context, max_output, bills_unseen }
    }

    fn price(&mut self, key: &str, mut raw: RawModel) -> Price {
        let typed = raw.take_rates();
        let has_rates = !raw.tiers.is_empty() || typed.iter().any(|(_, rate)| rate.is_some());
        if let Some(per_call) = raw.per_call {
            let per_call_key = below(key, "per_call");
            if has_rates {
                self.refuse(&per_call_key, "expected no price for tokens beside it".to_owned());
            }
            let per_call_nano = self.amount(&per_call_key, Some(per_call)).unwrap_or(0);
            return Price { per_call_nano, ..Price::default() };
        }
        let rates = self.rates(key, typed, "a price: input and output, or per_call alone");
        Price { per_call_nano: 0, rates, tiers: self.tiers(&below(key, "tiers"), raw.tiers) }
    }

    /// A kind without a rate of its own costs as the whole that it is a part of.
    fn rates(&mut self, key: &str, typed: [(&str, Option<Value>); 8], expected: &str) -> Rates {
        let [input, _, _, _, output, ..] = &typed;
        if input.1.is_none() || output.1.is_none() {
            self.refuse(key, format!("expected {expected}"));
        }
        let typed = typed.map(|(name, rate)| self.amount(&below(key, name), rate));
        let [input, cached_input, audio_input, image_input, output, reasoning, audio_output, image_output] = typed;
        let (input_nano, output_nano) = (input.unwrap_or(0), output.unwrap_or(0));
        let rates = Rates {
            input_nano,
            cached_input_nano: cached_input.unwrap_or(input_nano),
            audio_input_nano: audio_input.unwrap_or(input_nano),
            image_input_nano: image_input.unwrap_or(input_nano),
            output_nano,
            reasoning_nano: reasoning.unwrap_or(output_nano),
            audio_output_nano: audio_output.unwrap_or(output_nano),
            image_output_nano: image_output.unwrap_or(output_nano),
        };
        if rates.cached_input_nano > rates.input_nano {
            self.warn(&below(key, "cached_input"), "is dearer than input");
        }
        rates
    }

    fn tiers(&mut self, key: &str, typed: Vec<RawTier>) -> Vec<Tier> {
        if typed.len() > TIERS_MAX {
            self.refuse(key, format!("expected at most {TIERS_MAX}, found {}", typed.len()));
        }
        let mut tiers: Vec<Tier> = Vec::new();
        for (index, mut raw) in typed.into_iter().take(TIERS_MAX).enumerate() {
            let key = item(key, index);
            if raw.above.is_none() {
                self.refuse(&key, "expected above, the tokens of the prompt beyond which it holds".to_owned());
            }
            let above = self.number(&below(&key, "above"), raw.above, 1, 1..=TOKENS_MAX);
            if tiers.last().is_some_and(|last| last.above >= above) {
                self.refuse(&below(&key, "above"), "expected more than in the tier before it".to_owned());
            }
            let rates = self.rates(&key, raw.take_rates(), "input and output");
            tiers.push(Tier { above, rates });
        }
        tiers
    }
}

/// A kind of value each.
impl Check {
    fn refuse(&mut self, key: &str, what: String) {
        self.problems.push(Problem { place: self.places.of(key), key: key.to_owned(), what });
    }

    fn warn(&mut self, key: &str, what: &str) {
        self.warnings.push(format!("{key} {what}"));
    }

    fn number<T: TryFrom<i64> + Default>(
        &mut self,
        key: &str,
        typed: Option<i64>,
        default: i64,
        bounds: RangeInclusive<i64>,
    ) -> T {
        let number = typed.unwrap_or(default);
        match T::try_from(number) {
            Ok(number_as_t) if bounds.contains(&number) => number_as_t,
            _ => {
                self.refuse(key, format!("expected {} to {}, found {number}", bounds.start(), bounds.end()));
                T::default()
            }
        }
    }

    /// The first of `all` is the default.
    fn choice<T: Copy>(&mut self, key: &str, typed: Option<String>, all: &[(&str, T)]) -> T {
        let Some(typed) = typed else { return all[0].1 };
        match all.iter().find(|(name, _)| *name == typed) {
            Some((_, choice)) => *choice,
            None => {
                let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
                self.refuse(key, format!("expected one of {}, found {typed:?}", names.join(", ")));
                all[0].1
            }
        }
    }

    fn listen(&mut self, key: &str, typed: Option<String>, default: SocketAddr) -> Option<SocketAddr> {
        let Some(typed) = typed else { return Some(default) };
        if typed == "off" {
            return None;
        }
        let address = typed.parse().ok();
        if address.is_none() {
            let what = format!("expected an address and port such as \"{default}\", or \"off\", found {typed:?}");
            self.refuse(key, what);
        }
        // A default, so that a mistake here is not taken for "off" as well.
        Some(address.unwrap_or(SocketAddr::new(default.ip(), 0)))
    }

    fn networks(&mut self, key: &str, typed: Vec<String>) -> Vec<Network> {
        self.count(key, typed.len());
        let mut networks = Vec::new();
        for (index, text) in typed.iter().enumerate() {
            match text.parse() {
                Ok(network) => networks.push(network),
                Err(what) => self.refuse(&item(key, index), what),
            }
        }
        networks
    }

    fn path(&mut self, key: &str, typed: Option<String>) -> Option<PathBuf> {
        let path = typed?;
        if path.is_empty() || path.contains('\0') {
            self.refuse(key, format!("expected a path, found {path:?}"));
        }
        Some(path.into())
    }

    fn amount(&mut self, key: &str, typed: Option<Value>) -> Option<i64> {
        let read = match typed? {
            Value::String(text) => parse_nano(&text).map_err(|what| format!("{what}, found {text:?}")),
            // A float cannot hold 0.15; what is printed here is the shortest text that reads back as it.
            Value::Float(number) => Err(format!("expected a string, which is exact: write \"{number:?}\"")),
            Value::Integer(number) => Err(format!("expected a string, which is exact: write \"{number}.00\"")),
            other => Err(format!("expected a string such as \"2.50\", found {}", other.type_str())),
        };
        read.map_err(|what| self.refuse(key, what)).ok()
    }

    fn name(&mut self, key: &str, name: &str) {
        if !is_name(name) {
            let what = format!("expected a name of 1 to {NAME_BYTES_MAX} bytes without blanks, found {name:?}");
            self.refuse(key, what);
        }
    }

    fn count(&mut self, key: &str, count: usize) {
        if count > ITEMS_MAX {
            self.refuse(key, format!("expected at most {ITEMS_MAX}, found {count}"));
        }
    }
}

/// Of a model or an endpoint.
pub fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(is_blank)
}

fn folder_of(database: &DatabaseUrl) -> PathBuf {
    match database {
        DatabaseUrl::Sqlite(path) => match path.parent() {
            None => PathBuf::from("."),
            Some(folder) if folder == Path::new("") => PathBuf::from("."),
            Some(folder) => folder.to_owned(),
        },
        DatabaseUrl::Postgres(_) => PathBuf::from("data"),
    }
}

/// `o3`, `o3-mini`, `openai/gpt-5.1`, not `o30`.
fn is_known_to_bill_unseen(model: &str) -> bool {
    let name = model.rsplit('/').next().unwrap_or(model);
    let rest = BILLS_UNSEEN.iter().find_map(|prefix| name.strip_prefix(prefix));
    rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
}
