//! Lays the file over the built-in defaults and the environment over the file, and remembers where each value is from.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::problem::{Errors, Place, Problem, below, item};
use super::raw::Raw;
use super::{Files, HTTP_DEFAULT, HTTPS_DEFAULT, RETRY_TRIES_MAX};

/// The endpoints, models and patterns that are there without a file.
const BUILT_IN: &str = include_str!("default.toml");

/// Largest file, in bytes: far above any that a person writes, far below what would take long to read.
pub(super) const FILE_BYTES_MAX: usize = 1024 * 1024;

/// Most levels of tables and arrays: no setting is deeper than `title_catch.patterns[0].text`, and what walks a value
/// recurses. The parser's own limit is 80 levels of values *times* 80 of dotted keys.
const LEVELS_MAX: usize = 8;

/// What every variable of ours starts with.
const PREFIX: &str = "GPT_CAT_";

/// Variables of ours that are no settings: secrets, and the places of files. Others read them.
const RESERVED: [&str; 5] =
    ["GPT_CAT_ADMIN_TOKEN", "GPT_CAT_CONFIG", "GPT_CAT_FIRST_KEY", "GPT_CAT_MASTER_KEY", "GPT_CAT_PRICES"];

/// What was typed, all layers in one, and where each key was set.
pub struct Typed {
    pub raw: Raw,
    pub places: Places,
}

/// Where each key was set; a key that is not in here is built in.
#[derive(Default)]
pub struct Places(BTreeMap<String, Place>);

impl Places {
    pub fn of(&self, key: &str) -> Place {
        self.0.get(key).cloned().unwrap_or(Place::BuiltIn)
    }

    /// Marks `value` and all that is in it.
    fn mark(&mut self, key: String, value: &Value, place: &Place) {
        match value {
            Value::Table(table) => table.iter().for_each(|(name, value)| self.mark(below(&key, name), value, place)),
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, value)| self.mark(item(&key, i), value, place))
            }
            _ => {}
        }
        self.0.insert(key, place.clone());
    }
}

/// Reads all layers, later over earlier: built in, imported prices, file, variables' old names, `GPT_CAT_` names.
///
/// Each layer is held against [`Raw`] alone, so that an error has its place; an empty variable counts as not set.
pub fn read(files: Files<'_>, env: impl IntoIterator<Item = (String, String)>) -> Result<Typed, Errors> {
    let mut env: Vec<_> = env.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    // Sorted, so that the outcome does not depend on the process's order, and GPT_CAT_MODELS comes before its parts.
    env.sort();

    let mut layers = Layers::built_in();
    if let Some(text) = files.prices {
        layers.lay_prices(text);
    }
    if let Some(text) = files.config {
        layers.lay_file(text);
    }
    layers.lay_old_names(&env);
    layers.lay_variables(&env);
    layers.finish()
}

struct Layers {
    table: Table,
    places: Places,
    problems: Vec<Problem>,
}

impl Layers {
    fn built_in() -> Layers {
        let table = BUILT_IN.parse().expect("default.toml is TOML, as every test of this module shows");
        Layers { table, places: Places::default(), problems: Vec::new() }
    }

    fn finish(self) -> Result<Typed, Errors> {
        if !self.problems.is_empty() {
            return Err(self.problems.into());
        }
        let raw = Raw::deserialize(self.table).map_err(|error| {
            Errors::from(vec![Problem { place: Place::BuiltIn, key: String::new(), what: reword(error.message()) }])
        })?;
        Ok(Typed { raw, places: self.places })
    }

    /// What `gpt-cat prices import` wrote: models, and nothing else.
    fn lay_prices(&mut self, text: &str) {
        match read_file(text, &mut self.places, Place::Prices) {
            Ok(file) => {
                if let Some(other) = file.keys().find(|key| *key != "models") {
                    let what = "expected nothing but models in a file of prices".to_owned();
                    self.problems.push(Problem { place: self.places.of(other), key: other.clone(), what });
                    return;
                }
                forget_prices(&mut self.table, &file);
                merge(&mut self.table, file);
            }
            Err(problems) => self.problems.extend(problems),
        }
    }

    fn lay_file(&mut self, text: &str) {
        match read_file(text, &mut self.places, Place::Line) {
            Ok(file) => {
                // An operator who names endpoints wants those and no others; the built-in prices stay known.
                if file.get("endpoints").and_then(Value::as_table).is_some_and(|endpoints| !endpoints.is_empty()) {
                    self.table.remove("endpoints");
                }
                forget_prices(&mut self.table, &file);
                merge(&mut self.table, file);
            }
            Err(problems) => self.problems.extend(problems),
        }
    }

    fn lay_old_names(&mut self, env: &[(String, String)]) {
        for old in &OLD_NAMES {
            let Some((_, text)) = env.iter().find(|(name, _)| name == old.name) else { continue };
            let below = lookup(&self.table, old.path).and_then(Value::as_str);
            let path: Vec<String> = old.path.iter().map(|key| (*key).to_owned()).collect();
            match (old.read)(below, text) {
                Ok(value) => self.lay_value(&path, value, old.name),
                Err(what) => self.refuse(old.name, &path, what),
            }
        }
    }

    fn lay_variables(&mut self, env: &[(String, String)]) {
        for (name, text) in env {
            let Some(rest) = name.strip_prefix(PREFIX).filter(|_| !RESERVED.contains(&name.as_str())) else { continue };
            match self.path_of(rest).and_then(|path| Ok((typed_as(&path, text)?, path))) {
                Ok((value, path)) => self.lay_value(&path, value, name),
                Err(what) => self.refuse(name, &[], what),
            }
        }
    }

    /// `ENDPOINTS__OPENAI__BASE_URL` → endpoints, openai, base_url.
    ///
    /// A part stands for the key that is there and looks like it in upper case with `_` for all that a variable's name
    /// cannot hold (`GPT_4_1` for `gpt-4.1`); where there is none, for itself in lower case.
    fn path_of(&self, rest: &str) -> Result<Vec<String>, String> {
        let mut path = Vec::new();
        let mut table = Some(&self.table);
        if rest.split("__").count() > LEVELS_MAX {
            return Err(format!("no such setting: expected at most {LEVELS_MAX} levels"));
        }
        for part in rest.split("__") {
            let mut alike = table.into_iter().flat_map(Table::keys).filter(|key| as_variable(key) == part);
            let key = match (alike.next(), alike.next()) {
                (Some(one), Some(other)) => return Err(format!("could mean {one:?} or {other:?}: use the file")),
                (Some(key), None) => key.clone(),
                (None, _) if part.is_empty() => return Err("no such setting: a part of the name is empty".to_owned()),
                (None, _) => part.to_lowercase(),
            };
            table = table.and_then(|table| table.get(&key)).and_then(Value::as_table);
            path.push(key);
        }
        Ok(path)
    }

    fn lay_value(&mut self, path: &[String], value: Value, variable: &str) {
        let place = Place::Variable(variable.to_owned());
        let mut key = String::new();
        for part in path {
            key = below(&key, part);
            // A table that only this variable makes is this variable's; one that is there keeps its place.
            self.places.0.entry(key.clone()).or_insert_with(|| place.clone());
        }
        self.places.mark(key, &value, &place);
        let whole_models = path.len() <= 2;
        let layer = nest(path, value);
        if whole_models {
            forget_prices(&mut self.table, &layer);
        }
        merge(&mut self.table, layer);
    }

    fn refuse(&mut self, variable: &str, path: &[String], what: String) {
        let key = path.iter().fold(String::new(), |key, part| below(&key, part));
        self.problems.push(Problem { place: Place::Variable(variable.to_owned()), key, what });
    }
}

/// Parses the file and holds it against [`Raw`], a top-level key at a time, so that one mistake does not hide another.
fn read_file(text: &str, places: &mut Places, place: fn(usize) -> Place) -> Result<Table, Vec<Problem>> {
    let at = |position: usize, key: &str, what: String| {
        let line = 1 + text.bytes().take(position).filter(|byte| *byte == b'\n').count();
        Problem { place: place(line), key: key.to_owned(), what }
    };
    if text.len() > FILE_BYTES_MAX {
        let what = format!("expected at most {FILE_BYTES_MAX} bytes, found {}", text.len());
        return Err(vec![at(0, "", what)]);
    }
    let start = |error: &toml::de::Error| error.span().map_or(0, |span| span.start);
    let no_toml = |error: toml::de::Error| vec![at(start(&error), "", reword(error.message()))];
    let document = DeTable::parse(text).map_err(no_toml)?;

    let mut found = Vec::new();
    for (key, value) in document.get_ref() {
        if is_deep(value.get_ref(), LEVELS_MAX) {
            let what = format!("expected at most {LEVELS_MAX} levels");
            return Err(vec![at(key.span().start, &below("", key.get_ref()), what)]);
        }
    }
    find_keys(document.get_ref(), "", &mut found);
    let mut problems = Vec::new();
    for (key, value) in document.into_inner() {
        let one = Spanned::new(0..0, DeTable::from_iter([(key, value)]));
        if let Err(error) = Raw::deserialize(toml::Deserializer::from(one)) {
            let start = start(&error);
            // The innermost: found is in the order in which keys contain each other.
            let key = found.iter().rev().find(|found| found.key.contains(&start) || found.value.contains(&start));
            problems.push(at(start, key.map_or("", |key| &key.path), reword(error.message())));
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // One pass for all lines: the keys come sorted by name, the lines are counted by position.
    found.sort_by_key(|found| found.key.start);
    let (mut line, mut counted) = (1, 0);
    for found in found {
        line += text.as_bytes()[counted..found.key.start].iter().filter(|byte| **byte == b'\n').count();
        counted = found.key.start;
        places.0.insert(found.path, place(line));
    }
    text.parse().map_err(no_toml)
}

/// A key of the file, or an item of an array.
struct Found {
    path: String,
    key: Range<usize>,
    value: Range<usize>,
}

fn find_keys(table: &DeTable<'_>, parent: &str, found: &mut Vec<Found>) {
    for (key, value) in table {
        find_value(below(parent, key.get_ref()), key.span(), value, found);
    }
}

/// Only for what is not deep.
fn find_value(path: String, key: Range<usize>, value: &Spanned<DeValue<'_>>, found: &mut Vec<Found>) {
    found.push(Found { path: path.clone(), key, value: value.span() });
    match value.get_ref() {
        DeValue::Table(table) => find_keys(table, &path, found),
        DeValue::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| find_value(item(&path, i), value.span(), value, found));
        }
        _ => {}
    }
}

/// Whether tables and arrays stand in each other more than `levels` times; looks no further.
fn is_deep(value: &DeValue<'_>, levels: usize) -> bool {
    match (value, levels) {
        (DeValue::Table(_) | DeValue::Array(_), 0) => true,
        (DeValue::Table(table), _) => table.values().any(|value| is_deep(value.get_ref(), levels - 1)),
        (DeValue::Array(items), _) => items.iter().any(|value| is_deep(value.get_ref(), levels - 1)),
        _ => false,
    }
}

/// The type that a variable's text has: a string where the setting takes one, otherwise what TOML reads in it.
fn typed_as(path: &[String], text: &str) -> Result<Value, String> {
    let fits = |value: Value| match Raw::deserialize(nest(path, value.clone())) {
        Ok(_) => Ok(value),
        Err(error) => Err(reword(error.message())),
    };
    fits(Value::String(text.to_owned())).or_else(|as_string| match DeValue::parse(text) {
        Ok(value) if is_deep(value.get_ref(), LEVELS_MAX) => Err(format!("expected at most {LEVELS_MAX} levels")),
        Ok(_) => text.parse().map_err(|_| as_string).and_then(fits),
        Err(_) => Err(as_string),
    })
}

/// `value` as the only leaf at `path`.
fn nest(path: &[String], value: Value) -> Table {
    match path {
        [] => Table::new(),
        [key] => Table::from_iter([(key.clone(), value)]),
        [key, rest @ ..] => Table::from_iter([(key.clone(), Value::Table(nest(rest, value)))]),
    }
}

fn lookup<'t>(table: &'t Table, path: &[&str]) -> Option<&'t Value> {
    match path {
        [] => None,
        [key] => table.get(*key),
        [key, rest @ ..] => lookup(table.get(*key)?.as_table()?, rest),
    }
}

/// Tables merge, everything else is replaced.
fn merge(base: &mut Table, layer: Table) {
    for (key, value) in layer {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(layer)) => merge(base, layer),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// A model whose entry in `layer` says anything about its price loses the price that it has in `base`: half of an old
/// price beside half of a new one is nobody's price.
fn forget_prices(base: &mut Table, layer: &Table) {
    const PRICES: [&str; 10] = [
        "input",
        "cached_input",
        "audio_input",
        "image_input",
        "output",
        "reasoning",
        "audio_output",
        "image_output",
        "per_call",
        "tiers",
    ];
    let Some(models) = layer.get("models").and_then(Value::as_table) else { return };
    let Some(base) = base.get_mut("models").and_then(Value::as_table_mut) else { return };
    for (name, model) in models {
        let is_priced = model.as_table().is_some_and(|model| PRICES.iter().any(|price| model.contains_key(*price)));
        if let (true, Some(Value::Table(base))) = (is_priced, base.get_mut(name)) {
            base.retain(|key, _| !PRICES.contains(&key));
        }
    }
}

fn as_variable(key: &str) -> String {
    key.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

/// serde's words in ours: *expected … , found …*, and TOML's names for types.
fn reword(message: &str) -> String {
    let message = message.replace("unknown field", "unknown key").replace("missing field", "missing key");
    for kind in ["invalid type: ", "invalid value: "] {
        if let Some((found, expected)) = message.strip_prefix(kind).and_then(|rest| rest.rsplit_once(", expected ")) {
            let expected = match expected {
                "i64" => "a whole number",
                "a sequence" => "an array",
                "a boolean" => "true or false",
                "a map" => "a table",
                other => other,
            };
            return format!("expected {expected}, found {found}");
        }
    }
    message
}

/// A variable's name from before there was a file, and the setting that it stands for.
struct OldName {
    name: &'static str,
    path: &'static [&'static str],
    /// Takes the setting's text in the layers below, if it has any, and the variable's.
    read: fn(Option<&str>, &str) -> Result<Value, String>,
}

#[rustfmt::skip]
static OLD_NAMES: [OldName; 9] = [
    OldName { name: "DATABASE_URL",              path: &["database_url"],        read: string },
    OldName { name: "NUMBER_CAN_RETRIES",        path: &["retry", "tries"],      read: tries },
    OldName { name: "REQUEST_CONCURRENCY_COUNT", path: &["pool", "concurrency"], read: whole_number },
    OldName { name: "HTTP_ADDRESS",              path: &["server", "http"],      read: |below, text| host(below, text, HTTP_DEFAULT) },
    OldName { name: "HTTP_PORT",                 path: &["server", "http"],      read: |below, text| port(below, text, HTTP_DEFAULT) },
    OldName { name: "HTTPS_ADDRESS",             path: &["server", "https"],     read: |below, text| host(below, text, HTTPS_DEFAULT) },
    OldName { name: "HTTPS_PORT",                path: &["server", "https"],     read: |below, text| port(below, text, HTTPS_DEFAULT) },
    OldName { name: "TLS_CERT_PATH",             path: &["server", "tls_cert"],  read: string },
    OldName { name: "TLS_KEY_PATH",              path: &["server", "tls_key"],   read: string },
];

fn string(_: Option<&str>, text: &str) -> Result<Value, String> {
    Ok(Value::String(text.to_owned()))
}

fn whole_number(_: Option<&str>, text: &str) -> Result<Value, String> {
    let number = text.trim().parse().map_err(|_| format!("expected a whole number, found {text:?}"))?;
    Ok(Value::Integer(number))
}

/// Retries count what comes after the first try: none is one try.
fn tries(_: Option<&str>, text: &str) -> Result<Value, String> {
    let retries_max = RETRY_TRIES_MAX - 1;
    match text.trim().parse() {
        Ok(retries) if (0..=retries_max).contains(&retries) => Ok(Value::Integer(retries + 1)),
        _ => Err(format!("expected 0 to {retries_max} retries, found {text:?}")),
    }
}

fn host(below: Option<&str>, text: &str, default: SocketAddr) -> Result<Value, String> {
    let host = match text.trim() {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        text => text.parse().map_err(|_| format!("expected an IP address such as 0.0.0.0, found {text:?}"))?,
    };
    Ok(Value::String(SocketAddr::new(host, listens_on(below, default)?.port()).to_string()))
}

fn port(below: Option<&str>, text: &str, default: SocketAddr) -> Result<Value, String> {
    let port = text.trim().parse().map_err(|_| format!("expected a port, 0 to 65535, found {text:?}"))?;
    Ok(Value::String(SocketAddr::new(listens_on(below, default)?.ip(), port).to_string()))
}

/// The address whose other half an old name keeps.
fn listens_on(below: Option<&str>, default: SocketAddr) -> Result<SocketAddr, String> {
    match below {
        None | Some("off") => Ok(default),
        Some(text) => text.parse().map_err(|_| format!("expected an address and port below it, found {text:?}")),
    }
}
