//! Tests of the whole way from text and environment to checked values.

use proptest::prelude::*;

use super::*;

const DIALECTS: [&str; 4] = ["openai", "azure", "qianwen", "demo"];
const EXAMPLE: &str = include_str!("example.toml");

fn load(text: &str, env: &[(&str, &str)]) -> Result<Config, Errors> {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load(Some(text), env, &DIALECTS)
}

fn from_text(text: &str) -> Config {
    load(text, &[]).unwrap_or_else(|errors| panic!("{errors}"))
}

fn from_env(env: &[(&str, &str)]) -> Config {
    load("", env).unwrap_or_else(|errors| panic!("{errors}"))
}

/// What an operator reads.
fn refusal(text: &str, env: &[(&str, &str)]) -> String {
    load(text, env).expect_err("this must be refused").to_string()
}

fn address(text: &str) -> Option<SocketAddr> {
    Some(text.parse().unwrap())
}

// ---- without a file

#[test]
fn without_a_file_the_demo_answers_on_port_7117() {
    let config = Config::load(None, [], &DIALECTS).unwrap();
    assert_eq!(config.server.http, address("0.0.0.0:7117"));
    assert_eq!(config.server.https, address("0.0.0.0:11711"));
    assert_eq!(config.admin.listen, address("127.0.0.1:7118"));
    let demo = &config.endpoints["demo"];
    assert_eq!(
        (demo.dialect.as_str(), demo.base_url.as_str(), &demo.models[..]),
        ("demo", "", &["demo".to_owned()][..])
    );
    let model = &config.models["demo"];
    assert_eq!((model.price.rates.input_nano, model.price.rates.output_nano), (100_000_000, 400_000_000));
    assert_eq!((model.context, model.max_output), (8192, 2048));
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn the_built_in_prices_are_those_of_the_providers_list() {
    let config = from_text("");
    let nano = |text: &str| decimal::parse_nano(text).unwrap();
    let prices = [
        ("gpt-4o", "2.50", "1.25", "10.00", 128_000, 16_384),
        ("gpt-4o-mini", "0.15", "0.075", "0.60", 128_000, 16_384),
        ("gpt-4.1", "2.00", "0.50", "8.00", 1_047_576, 32_768),
        ("gpt-4.1-mini", "0.40", "0.10", "1.60", 1_047_576, 32_768),
        ("gpt-4.1-nano", "0.10", "0.025", "0.40", 1_047_576, 32_768),
        ("gpt-5", "1.25", "0.125", "10.00", 400_000, 128_000),
        ("gpt-5-mini", "0.25", "0.025", "2.00", 400_000, 128_000),
        ("gpt-5-nano", "0.05", "0.005", "0.40", 400_000, 128_000),
        ("o3", "2.00", "0.50", "8.00", 200_000, 100_000),
        ("o4-mini", "1.10", "0.275", "4.40", 200_000, 100_000),
    ];
    for (name, input, cached, output, context, max_output) in prices {
        let model = &config.models[name];
        let rates = Rates { cached_input_nano: nano(cached), ..Rates::plain(nano(input), nano(output)) };
        let price = Price { rates, ..Price::default() };
        assert_eq!((model.price.clone(), model.context, model.max_output), (price, context, max_output), "{name}");
        assert!(config.endpoints["openai"].models.contains(&name.to_owned()), "{name}");
    }
    assert_eq!(config.endpoints["openai"].base_url, "https://api.openai.com/v1");
}

#[test]
fn models_with_hidden_reasoning_are_known_by_how_their_names_begin() {
    let served = r#"models = ["o1", "o3-mini", "o4-mini", "gpt-5.1", "openai/o3", "o30", "gpt-4o", "olmo"]"#;
    let names = ["o1", "o3-mini", "gpt-5.1", "openai/o3", "o30", "olmo"];
    let prices: String = names.map(|name| format!("{name:?} = {{ input = \"1\", output = \"1\" }}\n")).concat();
    let config = from_text(&format!("[endpoints.x]\ndialect = \"openai\"\n{served}\n[models]\n{prices}"));
    let unseen: Vec<_> =
        config.models.values().filter(|model| model.bills_unseen).map(|model| &model.name[..]).collect();
    assert_eq!(unseen, ["gpt-5.1", "o1", "o3-mini", "o4-mini", "openai/o3"]);
}

#[test]
fn the_title_patterns_are_there_but_off_until_a_model_is_chosen() {
    let catch = from_text("").title_catch;
    assert_eq!((catch.model, catch.patterns.len()), (None, 10));
    let anywhere: Vec<_> = catch.patterns.iter().filter(|pattern| pattern.anywhere).collect();
    assert_eq!((anywhere.len(), anywhere[0].whose.as_str()), (1, "LobeChat old, title"));
    let tags = catch.patterns.iter().find(|pattern| pattern.whose == "Open WebUI, tags").unwrap();
    assert_eq!((tags.text.as_str(), tags.role), ("### Task:\nGenerate 1-3 broad tags", TitleRole::LastUser));
    assert!(catch.patterns.iter().all(|pattern| pattern.model.is_none()));
}

// ---- the example

#[test]
fn the_example_says_exactly_what_the_defaults_are() {
    assert_eq!(from_text(EXAMPLE), from_text(""));
}

#[test]
fn the_settings_that_the_example_holds_back_are_right_too() {
    let held_back = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => rest.to_owned(),
        _ => line.to_owned(),
    };
    let text = EXAMPLE.lines().map(held_back).collect::<Vec<_>>().join("\n");
    let config = from_text(&text);
    assert_eq!(config.title_catch.model.as_deref(), Some("gpt-4o-mini"));
    assert_eq!(config.title_catch.patterns.len(), 1);
    assert_eq!(config.endpoints["local"].models, ["my-model"]);
    assert_eq!(config.models["my-model"].price, Price { per_call_nano: 1_000_000, ..Price::default() });
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn the_example_shows_every_key_that_exists() {
    let places = ["", "log", "server", "admin", "commands", "title_catch", "retry", "pool", "upstream", "ledger"];
    for place in places.into_iter().chain(["endpoints.x", "models.x"]) {
        let header = if place.is_empty() { String::new() } else { format!("[{place}]\n") };
        let message = refusal(&format!("{header}no_such_key = 1"), &[]);
        let known = message.split_once("expected ").expect("the known keys are listed").1;
        for key in known.split('`').skip(1).step_by(2) {
            let is_shown = |line: &str| {
                let line = line.trim_start_matches(['#', '[']);
                let line = line.strip_prefix(&format!("{place}.")).unwrap_or(line);
                line.strip_prefix(key).is_some_and(|rest| rest.starts_with([' ', '.', ']']))
            };
            assert!(EXAMPLE.lines().any(is_shown), "{place}: {key} is not in the example");
        }
    }
}

// ---- the file

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_keys_that_are_known_there() {
    let text = "currency = \"USD\"\n\n[commands]\nenable = true\n";
    let expected = "line 4: commands.enable: unknown key `enable`, expected `enabled` or `prefix`";
    assert_eq!(refusal(text, &[]), expected);
}

#[test]
fn an_unknown_key_of_an_endpoint_is_refused_with_its_line() {
    let text = "[endpoints.a]\ndialect = \"openai\"\n[endpoints.b]\nbase_ulr = \"http://x\"\n";
    let message = refusal(text, &[]);
    assert!(message.starts_with("line 4: endpoints.b.base_ulr: unknown key `base_ulr`, expected one of "), "{message}");
    assert!(message.contains("`base_url`"), "{message}");
}

#[test]
fn a_value_of_the_wrong_type_is_refused_with_its_line_and_what_was_found() {
    let text = "[server]\nworkers = \"four\"\n";
    assert_eq!(refusal(text, &[]), "line 2: server.workers: expected a whole number, found string \"four\"");
    let text = "[endpoints.x]\nmodels = \"gpt-4o\"\n";
    assert_eq!(refusal(text, &[]), "line 2: endpoints.x.models: expected an array, found string \"gpt-4o\"");
    assert_eq!(refusal("\nlog = 3\n", &[]), "line 2: log: expected a table, found integer `3`");
}

#[test]
fn a_value_out_of_bounds_is_refused_with_its_line_and_the_bounds() {
    let text = "[retry]\ntries = 0\nbudget_s = 601\n[server]\nbody_bytes_max = -1";
    let lines = [
        "line 2: retry.tries: expected 1 to 10, found 0",
        "line 3: retry.budget_s: expected 1 to 600, found 601",
        "line 5: server.body_bytes_max: expected 1024 to 1073741824, found -1",
    ];
    assert_eq!(refusal(text, &[]), lines.join("\n"));
}

#[test]
fn a_text_that_is_no_toml_is_refused_with_its_line() {
    let message = refusal("[server]\nhttp = 0.0.0.0:7117\n", &[]);
    assert!(message.starts_with("line 2: "), "{message}");
    let message = refusal("language = \"en\"\nlanguage = \"zh\"\n", &[]);
    assert!(message.starts_with("line 2: ") && message.contains("duplicate"), "{message}");
}

#[test]
fn several_mistakes_are_reported_at_once_and_in_order() {
    let errors = load("[pool]\nqueue = 1\n[log]\nfmt = 1\n", &[("GPT_CAT_SERVER__WORKERS", "x")]).unwrap_err();
    let places: Vec<_> = errors.problems().iter().map(|problem| problem.place.clone()).collect();
    assert_eq!(places, [Place::Line(2), Place::Line(4), Place::Variable("GPT_CAT_SERVER__WORKERS".to_owned())]);
}

#[test]
fn bad_choices_and_texts_are_refused_with_what_is_possible() {
    let rows = [
        ("language = \"fr\"", "language: expected one of en, zh, found \"fr\""),
        ("log.format = \"xml\"", "log.format: expected one of text, json, found \"xml\""),
        ("ledger.on_low_balance = \"\"", "ledger.on_low_balance: expected one of clamp, refuse, found \"\""),
        ("currency = \"€\"", "currency: expected three to eight letters such as \"USD\", found \"€\""),
        ("currency = \"dollars12\"", "currency: expected three to eight letters such as \"USD\", found \"dollars12\""),
        ("commands.prefix = \"\"", "commands.prefix: expected one to eight characters, no blanks, found \"\""),
        ("data_dir = \"\"", "data_dir: expected a path, found \"\""),
        (
            "admin.listen = \"7118\"",
            "admin.listen: expected an address and port such as \"127.0.0.1:7118\", or \"off\", found \"7118\"",
        ),
        (
            "server.trusted_proxies = [\"10.0.0.0/33\"]",
            "server.trusted_proxies[0]: expected an IP address or a network such as 10.0.0.0/8, found \"10.0.0.0/33\"",
        ),
        (
            "log.level = \"verbose\"",
            "log.level: expected one of off, error, warn, info, debug, trace, or such as \"info,hyper=warn\", found \
             \"verbose\"",
        ),
        ("title_catch.model = \"none\"", "title_catch.model: expected a model that an endpoint serves, found \"none\""),
    ];
    for (text, expected) in rows {
        assert_eq!(refusal(text, &[]), format!("line 1: {expected}"));
    }
}

#[test]
fn a_log_level_may_name_modules() {
    for level in ["off", "debug", "info,gpt_cat::pool=trace", "warn,hyper=off"] {
        assert_eq!(from_env(&[("GPT_CAT_LOG__LEVEL", level)]).log.level, level);
    }
}

#[test]
fn listeners_can_be_switched_off_but_not_both() {
    let config = from_text("server.http = \"off\"\nadmin.listen = \"off\"");
    assert_eq!((config.server.http, config.admin.listen), (None, None));
    assert!(config.server.https.is_some());
    let message = refusal("[server]\nhttp = \"off\"\nhttps = \"off\"", &[]);
    assert_eq!(message, "line 3: server.https: expected an address, because server.http is \"off\" as well");
}

#[test]
fn two_listeners_on_one_address_are_refused() {
    let message = refusal("[server]\nhttp = \"[::1]:80\"\n[admin]\nlisten = \"[::1]:80\"", &[]);
    assert_eq!(message, "line 4: admin.listen: expected another address than that of server.http");
    from_text("server.http = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"");
}

#[test]
fn a_currency_is_the_same_in_small_letters() {
    assert_eq!(from_text("currency = \"eur\"").currency, "EUR");
}

// ---- database and folder

#[test]
fn a_database_is_a_sqlite_file_or_a_postgres_url() {
    let rows = [
        ("sqlite:a/b.db", "a/b.db", "a"),
        ("sqlite://a/b.db", "a/b.db", "a"),
        ("sqlite:///a/b.db", "/a/b.db", "/a"),
        ("sqlite:/a/b.db", "/a/b.db", "/a"),
        ("sqlite:b.db", "b.db", "."),
    ];
    for (url, file, folder) in rows {
        let config = from_env(&[("GPT_CAT_DATABASE_URL", url)]);
        assert_eq!(config.database_url, DatabaseUrl::Sqlite(file.into()), "{url}");
        assert_eq!(config.data_dir, PathBuf::from(folder), "{url}");
    }
    for url in ["postgres://cat:pw@db/cats", "postgresql:///cats?host=/run/postgresql"] {
        let config = from_env(&[("GPT_CAT_DATABASE_URL", url)]);
        assert_eq!(config.database_url, DatabaseUrl::Postgres(Secret::new(url)), "{url}");
        assert_eq!(config.data_dir, PathBuf::from("data"));
    }
}

#[test]
fn a_chosen_folder_is_not_that_of_the_database() {
    assert_eq!(from_text("database_url = \"sqlite:a/b.db\"\ndata_dir = \"c\"").data_dir, PathBuf::from("c"));
}

#[test]
fn a_database_password_is_neither_in_an_error_nor_in_debug() {
    for url in ["postgress://cat:hunter2@db/cats", "postgres:cat:hunter2@db", "hunter2", "sqlite:x?key=hunter2"] {
        let message = refusal("", &[("DATABASE_URL", url)]);
        assert!(message.starts_with("variable DATABASE_URL: database_url: expected "), "{message}");
        assert!(!message.contains("hunter2"), "{message}");
    }
    let shown = format!("{:?}", from_env(&[("DATABASE_URL", "postgres://cat:hunter2@db/cats")]));
    assert!(shown.contains("Postgres(***)") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn a_database_in_memory_is_refused_because_it_would_forget_money() {
    let message = refusal("database_url = \"sqlite::memory:\"", &[]);
    assert_eq!(message, "line 1: database_url: expected the path of a file after sqlite:");
}

// ---- old names

#[test]
fn the_old_name_database_url_chooses_the_database() {
    let config = from_env(&[("DATABASE_URL", "sqlite:old/cat.db")]);
    assert_eq!(config.database_url, DatabaseUrl::Sqlite("old/cat.db".into()));
}

#[test]
fn the_old_name_number_can_retries_counts_what_comes_after_the_first_try() {
    for (retries, tries) in [("0", 1), ("2", 3), ("9", 10)] {
        assert_eq!(from_env(&[("NUMBER_CAN_RETRIES", retries)]).retry.tries, tries);
    }
}

#[test]
fn a_number_of_retries_never_wraps() {
    for garbage in ["-1", "10", "4294967295", "18446744073709551615", "9223372036854775807", "two", "1.5", " "] {
        let message = refusal("", &[("NUMBER_CAN_RETRIES", garbage)]);
        let expected = format!("variable NUMBER_CAN_RETRIES: retry.tries: expected 0 to 9 retries, found {garbage:?}");
        assert_eq!(message, expected);
    }
}

#[test]
fn the_old_name_request_concurrency_count_is_the_limit_of_an_account_without_one() {
    assert_eq!(from_env(&[("REQUEST_CONCURRENCY_COUNT", "7")]).pool.concurrency, 7);
    for garbage in ["0", "-3", "many"] {
        let message = refusal("", &[("REQUEST_CONCURRENCY_COUNT", garbage)]);
        assert!(message.starts_with("variable REQUEST_CONCURRENCY_COUNT: pool.concurrency: expected "), "{message}");
    }
}

#[test]
fn the_old_names_http_address_and_http_port_work_together_and_alone() {
    let http = |env: &[(&str, &str)]| from_env(env).server.http;
    assert_eq!(http(&[("HTTP_ADDRESS", "127.0.0.1")]), address("127.0.0.1:7117"));
    assert_eq!(http(&[("HTTP_PORT", "80")]), address("0.0.0.0:80"));
    assert_eq!(http(&[("HTTP_PORT", "80"), ("HTTP_ADDRESS", "::1")]), address("[::1]:80"));
    assert_eq!(http(&[("HTTP_ADDRESS", "localhost")]), address("127.0.0.1:7117"));
}

#[test]
fn the_old_names_https_address_and_https_port_work_together_and_alone() {
    let https = |env: &[(&str, &str)]| from_env(env).server.https;
    assert_eq!(https(&[("HTTPS_ADDRESS", "127.0.0.1")]), address("127.0.0.1:11711"));
    assert_eq!(https(&[("HTTPS_PORT", "443")]), address("0.0.0.0:443"));
    assert_eq!(https(&[("HTTPS_ADDRESS", "10.1.2.3"), ("HTTPS_PORT", "443")]), address("10.1.2.3:443"));
}

#[test]
fn an_old_port_keeps_the_host_that_the_file_gives() {
    let config = load("server.http = \"127.0.0.1:8000\"", &[("HTTP_PORT", "9000")]).unwrap();
    assert_eq!(config.server.http, address("127.0.0.1:9000"));
    let config = load("server.http = \"off\"", &[("HTTP_PORT", "9000")]).unwrap();
    assert_eq!(config.server.http, address("0.0.0.0:9000"));
}

#[test]
fn a_bad_old_address_or_port_is_refused_with_the_variables_name() {
    for (name, value) in [("HTTP_PORT", "65536"), ("HTTPS_PORT", "x"), ("HTTP_ADDRESS", "0.0.0.0:80")] {
        let message = refusal("", &[(name, value)]);
        assert!(message.starts_with(&format!("variable {name}: server.http")), "{message}");
        assert!(message.ends_with(&format!("found {value:?}")), "{message}");
    }
    let message = refusal("server.http = \"nowhere\"", &[("HTTP_PORT", "80")]);
    assert!(message.contains("HTTP_PORT") && message.contains("nowhere"), "{message}");
}

#[test]
fn the_old_names_tls_cert_path_and_tls_key_path_choose_the_certificate() {
    let server = from_env(&[("TLS_CERT_PATH", "a.pem"), ("TLS_KEY_PATH", "b.pem")]).server;
    assert_eq!((server.tls_cert, server.tls_key), ("a.pem".into(), "b.pem".into()));
}

// ---- the environment

#[test]
fn the_environment_wins_over_the_file_and_a_new_name_over_an_old_one() {
    let file = "[retry]\ntries = 2\n[server]\nhttp = \"127.0.0.1:1\"";
    assert_eq!(load(file, &[]).unwrap().retry.tries, 2);
    assert_eq!(load(file, &[("NUMBER_CAN_RETRIES", "3")]).unwrap().retry.tries, 4);
    let both = [("GPT_CAT_RETRY__TRIES", "6"), ("NUMBER_CAN_RETRIES", "3")];
    assert_eq!(load(file, &both).unwrap().retry.tries, 6);
    let config = load(file, &[("GPT_CAT_SERVER__HTTP", "127.0.0.1:2"), ("HTTP_PORT", "3")]).unwrap();
    assert_eq!(config.server.http, address("127.0.0.1:2"));
}

#[test]
fn a_variable_has_the_type_that_its_setting_has() {
    let config = from_env(&[
        ("GPT_CAT_CURRENCY", "CNY"),
        ("GPT_CAT_SERVER__WORKERS", "4"),
        ("GPT_CAT_COMMANDS__ENABLED", "false"),
        ("GPT_CAT_COMMANDS__PREFIX", "1"),
        ("GPT_CAT_SERVER__TRUSTED_PROXIES", r#"["10.0.0.0/8", "::1"]"#),
        ("GPT_CAT_LEDGER__FIRST_BALANCE", "2.5"),
        ("GPT_CAT_LOG__FILE", "true"),
    ]);
    assert_eq!((config.currency.as_str(), config.server.workers), ("CNY", 4));
    // A prefix that looks like a number, a file that looks like a truth value: strings, because their settings are.
    assert_eq!((config.commands.enabled, config.commands.prefix.as_str()), (false, "1"));
    assert_eq!(config.log.file, Some("true".into()));
    assert_eq!(config.server.trusted_proxies.len(), 2);
    assert_eq!(config.ledger.first_balance_nano, 2_500_000_000);
}

#[test]
fn a_variable_of_the_wrong_type_is_refused_with_its_name() {
    let rows = [
        ("GPT_CAT_SERVER__WORKERS", "four", "expected a whole number, found string \"four\""),
        ("GPT_CAT_SERVER__WORKERS", "true", "expected a whole number, found boolean `true`"),
        ("GPT_CAT_COMMANDS__ENABLED", "yes", "expected true or false, found string \"yes\""),
        ("GPT_CAT_SERVER", "1", "expected a table, found integer `1`"),
    ];
    for (name, value, what) in rows {
        assert_eq!(refusal("", &[(name, value)]), format!("variable {name}: {what}"));
    }
    let message = refusal("", &[("GPT_CAT_RETRY__TRIES", "11")]);
    assert_eq!(message, "variable GPT_CAT_RETRY__TRIES: retry.tries: expected 1 to 10, found 11");
}

#[test]
fn an_unknown_variable_of_ours_is_refused_with_its_name_and_without_its_value() {
    for name in ["GPT_CAT_CURENCY", "GPT_CAT_SERVER__HTTPP", "GPT_CAT_SERVER_HTTP", "GPT_CAT_ADMIN_TOKNE"] {
        let message = refusal("", &[(name, "hunter2")]);
        assert!(message.starts_with(&format!("variable {name}: unknown key ")), "{message}");
        assert!(!message.contains("hunter2"), "{message}");
    }
    for name in ["GPT_CAT_", "GPT_CAT_SERVER__", "GPT_CAT___HTTP"] {
        let message = refusal("", &[(name, "1")]);
        assert_eq!(message, format!("variable {name}: no such setting: a part of the name is empty"));
    }
}

#[test]
fn secrets_the_files_place_and_the_variables_of_others_are_no_settings() {
    let config = from_env(&[
        ("GPT_CAT_MASTER_KEY", "x"),
        ("GPT_CAT_ADMIN_TOKEN", "x"),
        ("GPT_CAT_FIRST_KEY", "x"),
        ("GPT_CAT_CONFIG", "x"),
        ("PATH", "x"),
        ("SERVER__HTTP", "x"),
    ]);
    assert_eq!(config, from_text(""));
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    let env = [("DATABASE_URL", ""), ("NUMBER_CAN_RETRIES", ""), ("GPT_CAT_SERVER__HTTP", ""), ("HTTP_PORT", "")];
    assert_eq!(from_env(&env), from_text(""));
}

#[test]
fn a_variable_changes_one_key_of_a_built_in_endpoint_and_leaves_the_others() {
    let config = from_env(&[("GPT_CAT_ENDPOINTS__OPENAI__BASE_URL", "http://127.0.0.1:9/v1/")]);
    assert_eq!(config.endpoints["openai"].base_url, "http://127.0.0.1:9/v1");
    assert_eq!((config.endpoints.len(), config.endpoints["openai"].models.len()), (3, 10));
}

#[test]
fn variables_make_a_new_endpoint_and_its_model() {
    let config = from_env(&[
        ("GPT_CAT_ENDPOINTS__LOCAL__DIALECT", "openai"),
        ("GPT_CAT_ENDPOINTS__LOCAL__BASE_URL", "http://127.0.0.1:11434/v1"),
        ("GPT_CAT_ENDPOINTS__LOCAL__MAPPING", r#"{ "qwen3.8b" = "qwen3:8b" }"#),
        ("GPT_CAT_MODELS", r#"{ "qwen3.8b" = { input = "0", output = "0" } }"#),
    ]);
    assert_eq!(config.endpoints["local"].models, ["qwen3.8b"]);
    assert_eq!(config.endpoints["local"].mapping["qwen3.8b"], "qwen3:8b");
    assert_eq!(config.models["qwen3.8b"].price, Price::default());
}

#[test]
fn a_models_name_in_a_variable_has_underscores_for_what_no_variable_can_hold() {
    let config = from_env(&[("GPT_CAT_MODELS__GPT_4_1_MINI__OUTPUT", "1.70")]);
    let price = &config.models["gpt-4.1-mini"].price;
    assert_eq!(
        (price.rates.input_nano, price.rates.cached_input_nano, price.rates.output_nano),
        (400_000_000, 100_000_000, 1_700_000_000)
    );
}

#[test]
fn a_variable_that_could_mean_two_models_is_refused() {
    let file = "[models]\na-b = { per_call = \"1\" }\n\"a.b\" = { per_call = \"1\" }";
    let message = refusal(file, &[("GPT_CAT_MODELS__A_B__PER_CALL", "2")]);
    assert_eq!(message, "variable GPT_CAT_MODELS__A_B__PER_CALL: could mean \"a-b\" or \"a.b\": use the file");
}

#[test]
fn a_mistake_in_a_variables_value_names_the_variable_and_not_the_file() {
    let file = "[endpoints.x]\ndialect = \"openai\"\nmodels = [\"gpt-4o\"]";
    let message = refusal(file, &[("GPT_CAT_ENDPOINTS__X__MODELS", r#"["gpt-4o", "unpriced"]"#)]);
    assert!(message.starts_with("variable GPT_CAT_ENDPOINTS__X__MODELS: endpoints.x.models[1]: serves"), "{message}");
}

// ---- endpoints, models, prices

#[test]
fn a_file_with_endpoints_has_no_others_and_keeps_the_built_in_prices() {
    let config = from_text("[endpoints.mine]\ndialect = \"openai\"\nmodels = [\"gpt-4o\", \"gpt-4o\"]");
    assert_eq!(config.endpoints.keys().collect::<Vec<_>>(), ["mine"]);
    assert_eq!(config.endpoints["mine"].models, ["gpt-4o"]);
    assert_eq!(config.models.keys().collect::<Vec<_>>(), ["gpt-4o"]);
    assert_eq!(config.models["gpt-4o"].price.rates.input_nano, 2_500_000_000);
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn a_files_price_replaces_the_whole_built_in_price_and_nothing_else() {
    let config = from_text("[models.gpt-4o]\ninput = \"1\"\noutput = \"2\"");
    let model = &config.models["gpt-4o"];
    assert_eq!(model.price.rates.cached_input_nano, 1_000_000_000, "the built-in 1.25 is not half of this price");
    assert_eq!((model.context, model.max_output), (128_000, 16_384));
    let config = from_text("[models.gpt-4o]\nper_call = \"0.04\"");
    assert_eq!(config.models["gpt-4o"].price, Price { per_call_nano: 40_000_000, ..Price::default() });
    let config = from_text("[models.\"gpt-4.1\"]\nmax_output = 1000");
    let model = &config.models["gpt-4.1"];
    assert_eq!((model.max_output, model.price.rates.output_nano), (1000, 8_000_000_000));
}

#[test]
fn a_served_model_without_a_price_is_refused_at_the_endpoints_line() {
    let message = refusal("[endpoints.x]\ndialect = \"openai\"\nmodels = [\"gpt-4o\", \"a.b\"]", &[]);
    let what = "serves a model without a price: expected [models.\"a.b\"] with input and output, or per_call";
    assert_eq!(message, format!("line 3: endpoints.x.models[1]: {what}"));
}

#[test]
fn a_mapped_model_is_served_and_must_have_a_price_of_its_own() {
    let file = "[endpoints.x]\ndialect = \"openai\"\n[endpoints.x.mapping]\nmine = \"gpt-4o\"";
    let message = refusal(file, &[]);
    assert!(message.starts_with("line 4: endpoints.x.mapping.mine: serves a model without a price"), "{message}");
    let config = from_text(&format!("{file}\n[models.mine]\nper_call = \"1\""));
    assert_eq!(config.endpoints["x"].models, ["mine"]);
}

#[test]
fn a_price_that_nobody_serves_is_a_warning() {
    let config = from_text("[models.spare]\ninput = \"1\"\noutput = \"1\"");
    assert!(config.models.contains_key("spare"));
    assert_eq!(config.warnings, ["models.spare has a price, but no endpoint serves it"]);
}

#[test]
fn an_endpoint_without_models_and_a_dearer_cache_are_warnings() {
    let file =
        "[endpoints.x]\ndialect = \"openai\"\n[models.gpt-4o]\ninput = \"1\"\ncached_input = \"2\"\noutput = \"3\"";
    let warnings = from_text(file).warnings;
    assert!(warnings.contains(&"endpoints.x serves no model".to_owned()), "{warnings:?}");
    assert!(warnings.contains(&"models.gpt-4o.cached_input is dearer than input".to_owned()), "{warnings:?}");
}

#[test]
fn built_in_prices_in_another_currency_are_a_warning_that_names_the_models() {
    let file = "currency = \"CNY\"\n[endpoints.x]\ndialect = \"openai\"\nmodels = [\"gpt-4o\", \"o3\"]\n";
    assert_eq!(from_text(file).warnings, ["currency is CNY, but built-in and imported prices are in USD: gpt-4o, o3"]);
    let priced = "[models]\ngpt-4o = { input = \"18\", output = \"72\" }\no3 = { per_call = \"1\" }";
    assert_eq!(from_text(&format!("{file}{priced}")).warnings, Vec::<String>::new());
}

#[test]
fn a_price_is_a_string_and_the_error_says_how_to_write_it() {
    let rows = [
        ("2.50", "expected a string, which is exact: write \"2.5\""),
        ("2", "expected a string, which is exact: write \"2.00\""),
        ("true", "expected a string such as \"2.50\", found boolean"),
        ("\"-1\"", "expected digits and at most one point, such as 2.50, found \"-1\""),
        ("\"1e3\"", "expected digits and at most one point, such as 2.50, found \"1e3\""),
        ("\"0.0000000001\"", "expected at most 9 decimals, found 10, found \"0.0000000001\""),
    ];
    for (value, what) in rows {
        let message = refusal(&format!("[models.x]\noutput = \"1\"\ninput = {value}"), &[]);
        assert_eq!(message, format!("line 3: models.x.input: {what}"));
    }
}

#[test]
fn a_price_is_for_tokens_or_for_calls_and_never_half() {
    let whole = "models.x: expected a price: input and output, or per_call alone";
    for half in ["input = \"1\"", "output = \"1\"", "cached_input = \"1\"", "context = 1000\nmax_output = 10"] {
        let message = refusal(&format!("[models.x]\n{half}"), &[]);
        assert!(message.contains(&format!("line 1: {whole}")), "{message}");
    }
    let message = refusal("[models.x]\ninput = \"1\"\noutput = \"1\"\nper_call = \"1\"", &[]);
    assert_eq!(message, "line 4: models.x.per_call: expected no price for tokens beside it");
}

#[test]
fn a_model_without_sizes_gets_usual_ones_that_fit_each_other() {
    let config = from_text("[models]\na = { per_call = \"1\" }\nb = { per_call = \"1\", context = 4096 }");
    assert_eq!((config.models["a"].context, config.models["a"].max_output), (128_000, 16_384));
    assert_eq!((config.models["b"].context, config.models["b"].max_output), (4096, 4096));
    let message = refusal("[models.a]\nper_call = \"1\"\ncontext = 10\nmax_output = 11", &[]);
    assert_eq!(message, "line 4: models.a.max_output: expected at most the context, 10, found 11");
}

#[test]
fn an_endpoint_needs_a_dialect_that_is_known() {
    assert_eq!(
        refusal("\n[endpoints.x]\nmodels = []", &[]),
        "line 2: endpoints.x: expected a dialect, one of openai, azure, qianwen, demo"
    );
    assert_eq!(
        refusal("[endpoints.x]\ndialect = \"openia\"", &[]),
        "line 2: endpoints.x.dialect: expected one of openai, azure, qianwen, demo, found \"openia\""
    );
}

#[test]
fn only_azure_has_versions_and_they_look_like_versions() {
    let azure =
        |more: &str| format!("[endpoints.x]\ndialect = \"azure\"\nbase_url = \"https://x.openai.azure.com\"\n{more}");
    assert_eq!(from_text(&azure("")).endpoints["x"].api_version, "2024-10-21");
    assert_eq!(
        from_text(&azure("api_version = \"2025-04-01-preview\"")).endpoints["x"].api_version,
        "2025-04-01-preview"
    );
    let refused = refusal(&azure("api_version = \"1&x=y\""), &[]);
    assert!(refused.contains("expected a version such as \"2024-10-21\""), "{refused}");
    let refused = refusal("[endpoints.x]\ndialect = \"openai\"\napi_version = \"1\"", &[]);
    assert!(refused.contains("only the dialect azure has one"), "{refused}");
}

#[test]
fn an_endpoint_loses_nothing_unless_it_is_told_to() {
    assert!(!from_text("").endpoints["qianwen"].lossy);
    assert!(from_text("[endpoints.x]\ndialect = \"qianwen\"\nlossy = \"allow\"").endpoints["x"].lossy);
}

#[test]
fn a_dialect_without_a_usual_url_needs_one() {
    let text = "[endpoints.x]\ndialect = \"new\"";
    let errors = Config::load(Some(text), [], &["new"]).unwrap_err();
    assert_eq!(errors.to_string(), "line 1: endpoints.x: expected a base_url: the dialect new has no usual one");
    let message = refusal("[endpoints.x]\ndialect = \"demo\"\nbase_url = \"http://x\"", &[]);
    assert_eq!(message, "line 3: endpoints.x.base_url: expected none: the dialect demo calls nobody");
}

#[test]
fn a_base_url_is_http_with_a_host_and_without_query_or_slash_at_the_end() {
    let base_url = |url: &str| load("", &[("GPT_CAT_ENDPOINTS__OPENAI__BASE_URL", url)]);
    let rows = [
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("http://[::1]:80/a/b", "http://[::1]:80/a/b"),
        ("http://my_host-1//", "http://my_host-1"),
    ];
    for (typed, meant) in rows {
        assert_eq!(base_url(typed).unwrap().endpoints["openai"].base_url, meant);
    }
    let refused = [
        "api.openai.com/v1",
        "ftp://x",
        "https://",
        "https:///v1",
        "https://x?y=1",
        "https://x/#a",
        "https://x:0",
        "https://x:65536",
        "https://x:",
        "https://x y",
        "https://[::1",
        "https://[::1]80",
        "https://[x]",
        "https://ü",
        "HTTPS://x",
        "https://x/{y}",
    ];
    for url in refused {
        let message = base_url(url).expect_err(url).to_string();
        assert!(message.ends_with(&format!("found {url:?}")), "{message}");
    }
    let message = base_url("https://me:hunter2@x/v1").unwrap_err().to_string();
    assert!(message.ends_with("expected no user or password in it: keys belong to accounts"), "{message}");
}

#[test]
fn names_with_blanks_are_refused() {
    let message = refusal("[endpoints.\"a b\"]\ndialect = \"openai\"\nmodels = [\"\"]", &[]);
    assert!(message.contains("endpoints.\"a b\": expected a name of 1 to 256 bytes without blanks"), "{message}");
    assert!(message.contains("endpoints.\"a b\".models[0]: expected a name"), "{message}");
}

#[test]
fn title_patterns_of_the_file_replace_the_built_in_ones_and_are_checked() {
    let pattern = "[[title_catch.patterns]]\nwhose = \"me\"\nrole = \"any\"\ntext = \"Title:\"\nmodel = \"gpt-4o\"\n";
    let catch = from_text(pattern).title_catch;
    assert_eq!(catch.patterns.len(), 1);
    assert_eq!((catch.patterns[0].role, catch.patterns[0].model.as_deref()), (TitleRole::Any, Some("gpt-4o")));
    let bad = pattern.replace("any", "user").replace("\"Title", "\" Title").replace("gpt-4o", "gpt-0");
    let lines = [
        "line 8: title_catch.patterns[1].role: expected one of last_user, system, any, found \"user\"",
        "line 9: title_catch.patterns[1].text: expected 1 to 4096 bytes that do not begin with a blank",
        "line 10: title_catch.patterns[1].model: expected a model that an endpoint serves, found \"gpt-0\"",
    ];
    assert_eq!(refusal(&format!("{pattern}{bad}"), &[]), lines.join("\n"));
    let message = refusal("[[title_catch.patterns]]\nwhose = \"me\"\nrole = \"any\"", &[]);
    assert_eq!(message, "line 1: title_catch.patterns[0]: missing key `text`");
}

#[test]
fn a_network_contains_what_shares_its_first_bits() {
    let contains =
        |network: &str, address: &str| network.parse::<Network>().unwrap().contains(address.parse::<IpAddr>().unwrap());
    assert!(contains("10.0.0.0/8", "10.255.0.1") && !contains("10.0.0.0/8", "11.0.0.1"));
    assert!(contains("10.1.2.3/8", "10.9.9.9"), "bits past the prefix do not count");
    assert!(contains("0.0.0.0/0", "203.0.113.9") && !contains("0.0.0.0/0", "::1"));
    assert!(contains("127.0.0.1", "127.0.0.1") && !contains("127.0.0.1", "127.0.0.2"));
    assert!(contains("127.0.0.1", "::ffff:127.0.0.1") && contains("::ffff:127.0.0.1", "127.0.0.1"));
    assert!(contains("fd00::/8", "fdff::1") && !contains("fd00::/8", "fe00::1") && contains("::/0", "::1"));
    for text in ["", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/33", "::/129", "x/8", "10.0.0.0/8/8"] {
        assert!(text.parse::<Network>().is_err(), "{text:?}");
    }
}

// ---- what is not meant to happen

#[test]
fn a_file_of_absurd_size_or_depth_is_refused_and_does_not_overflow_the_stack() {
    let deep = 100_000;
    let dotted = format!("{}a = ", "a.".repeat(70));
    let texts = [
        "#".repeat(2 * 1024 * 1024),
        format!("{}1", "a.".repeat(deep)),
        format!("{}a = 1", "a.".repeat(deep)),
        format!("[{}a]\nb = 1", "a.".repeat(deep)),
        format!("models.{}a = 1", "a.".repeat(deep)),
        // The parser limits values and dotted keys each, not their product.
        format!("{dotted}{{ {}{dotted}1{} }}", format!("{dotted}{{ ").repeat(70), " }".repeat(70)),
        format!("models.x.input = {{ {}{dotted}1{} }}", format!("{dotted}{{ ").repeat(70), " }".repeat(70)),
        format!("a = {}1{}", "[".repeat(deep), "]".repeat(deep)),
        format!("a = {}", "{a=".repeat(deep)),
    ];
    for text in texts {
        let message = refusal(&text, &[]);
        assert!(message.starts_with("line 1: "), "{}", &message[..message.len().min(200)]);
        let value = text.split_once('=').map_or("", |(_, value)| value);
        refusal(
            "",
            &[("GPT_CAT_SERVER__HTTP", "x"), ("GPT_CAT_MODELS", value.trim()), ("GPT_CAT_POOL__QUEUE_MAX", "x")],
        );
    }
    refusal("", &[(&format!("GPT_CAT_MODELS{}", "__A".repeat(deep)), "1")]);
}

proptest! {
    #[test]
    fn no_mix_of_lines_panics_and_what_is_accepted_is_accepted_again(
        picked in prop::collection::vec(prop::sample::select(EXAMPLE.lines().collect::<Vec<_>>()), 0..12),
        name in "GPT_CAT_[A-Z_]{0,12}",
        value in "\\PC{0,12}",
    ) {
        let text = picked.join("\n");
        let alone = load(&text, &[]);
        prop_assert_eq!(&alone, &load(&text, &[]));
        if let Err(errors) = load(&text, &[(&name, &value)]) {
            prop_assert!(!errors.problems().is_empty());
            prop_assert!(!errors.to_string().is_empty());
        }
    }
}

#[test]
fn a_price_can_have_kinds_and_tiers() {
    let text = r#"
        [models."gpt-4o"]
        input = "1"
        output = "2"
        reasoning = "3"
        audio_input = "4"
        tiers = [
            { above = 1000, input = "5", output = "6", cached_input = "4.50" },
            { above = 2000, input = "7", output = "8", image_output = "9" },
        ]
    "#;
    let nano = |units: i64| units * decimal::NANO;
    let rates = Rates { reasoning_nano: nano(3), audio_input_nano: nano(4), ..Rates::plain(nano(1), nano(2)) };
    let second = Rates { cached_input_nano: 4_500_000_000, ..Rates::plain(nano(5), nano(6)) };
    let third = Rates { image_output_nano: nano(9), ..Rates::plain(nano(7), nano(8)) };
    let tiers = vec![Tier { above: 1000, rates: second }, Tier { above: 2000, rates: third }];
    assert_eq!(from_text(text).models["gpt-4o"].price, Price { per_call_nano: 0, rates, tiers });
}

#[test]
fn mistakes_in_tiers_are_named() {
    for (tiers, expected) in [
        (r#"[{ above = 10, input = "1" }]"#, "line 4: models.gpt-4o.tiers[0]: expected input and output"),
        (r#"[{ input = "1", output = "1" }]"#, "line 4: models.gpt-4o.tiers[0]: expected above, "),
        (
            r#"[{ above = 10, input = "1", output = "1" }, { above = 10, input = "1", output = "1" }]"#,
            "line 4: models.gpt-4o.tiers[1].above: expected more than in the tier before it",
        ),
        (r#"[{ above = 10, input = "1", output = "1", per_call = "1" }]"#, "unknown key `per_call`"),
        (r#"[{ above = 10, input = 1.5, output = "1" }]"#, "expected a string, which is exact: write \"1.5\""),
    ] {
        let message = refusal(&format!("[models.gpt-4o]\ninput = \"1\"\noutput = \"1\"\ntiers = {tiers}"), &[]);
        assert!(message.contains(expected), "{tiers}: {message}");
    }
    let message =
        refusal("[models.gpt-4o]\nper_call = \"1\"\ntiers = [{ above = 1, input = \"1\", output = \"1\" }]", &[]);
    assert!(message.contains("models.gpt-4o.per_call: expected no price for tokens beside it"), "{message}");
}

#[test]
fn imported_prices_lie_between_the_built_in_ones_and_the_file() {
    let prices = "[models]\n\"gpt-4o\" = { input = \"9\", output = \"9\" }\n\"o3\" = { input = \"8\", output = \"8\" }\nnew = { input = \"7\", output = \"7\" }";
    let file = "[models.gpt-4o]\ninput = \"1\"\noutput = \"1\"";
    let files = Files { config: Some(file), prices: Some(prices) };
    let config = Config::load(files, [], &DIALECTS).unwrap();
    let input = |name: &str| config.models[name].price.rates.input_nano;
    assert_eq!((input("gpt-4o"), input("o3")), (decimal::NANO, 8 * decimal::NANO));
    assert_eq!(config.models["o3"].context, 200_000, "what the list does not say stays");
    assert!(config.warnings.is_empty() && !config.models.contains_key("new"), "a list may have models of others");
}

#[test]
fn mistakes_in_imported_prices_are_named_as_theirs() {
    let refused = |prices: &str| {
        Config::load(Files { config: None, prices: Some(prices) }, [], &DIALECTS).unwrap_err().to_string()
    };
    let message = refused("[models]\n\"gpt-4o\" = { input = \"x\", output = \"9\" }");
    assert!(message.starts_with("imported prices, line 2: models.gpt-4o.input: expected digits"), "{message}");
    assert_eq!(
        refused("currency = \"EUR\""),
        "imported prices, line 1: currency: expected nothing but models in a file of prices"
    );
}
