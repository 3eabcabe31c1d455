//! Keeps the map true: which module may use which, which crate may be used where, and the documents that show both.
//!
//! Every path in `src/` is read, of tests as well: a test that needs a module above its own is a journey, and journeys
//! are in `tests/`. The first half of this file is the map; the checker and its own tests follow.

use std::fs;
use std::path::Path;

/// A module of `lib.rs` and its line on the map. It may use modules of lower lines only: not those of its own line.
struct Module {
    name: &'static str,
    line: u8,
}

/// In the order of a request's journey, which is the order of `lib.rs`. To change the map, change this table in the
/// same commit and say why.
///
/// `pool` stands above `catalog` (design.md had them on one line): it matches the offers of a model to accounts.
/// `failpoint` stands at the bottom: whatever is written, sent or committed may be a place for a drill to end at.
#[rustfmt::skip]
static MAP: [Module; 16] = [
    Module { name: "server",     line: 7 },
    Module { name: "request",    line: 2 },
    Module { name: "preprocess", line: 6 },
    Module { name: "ledger",     line: 6 },
    Module { name: "pool",       line: 5 },
    Module { name: "upstream",   line: 6 },
    Module { name: "sse",        line: 2 },
    Module { name: "meter",      line: 2 },
    Module { name: "catalog",    line: 4 },
    Module { name: "users",      line: 4 },
    Module { name: "store",      line: 3 },
    Module { name: "config",     line: 2 },
    Module { name: "error",      line: 1 },
    Module { name: "telemetry",  line: 2 },
    Module { name: "failpoint",  line: 1 },
    Module { name: "admin",      line: 6 },
];

/// Crates that only some modules may use; `main` is `main.rs`. A crate in no row may be used anywhere.
struct Fence {
    crates: &'static [&'static str],
    within: &'static [&'static str],
    why: &'static str,
}

/// `tokio` names who may wait: all but those that handle bytes and values.
static FENCES: [Fence; 10] = [
    Fence {
        crates: &["rusqlite", "tokio_postgres", "deadpool", "deadpool_postgres", "tokio_postgres_rustls", "sqlx"],
        within: &["store"],
        why: "SQL is in the store only",
    },
    Fence {
        crates: &["hyper", "hyper_util", "hyper_rustls", "http_body_util", "http_body", "http"],
        within: &["server", "upstream", "admin"],
        why: "HTTP is spoken at the two ends and by the operator's API; what is between them takes values",
    },
    Fence {
        crates: &["tokio_rustls", "rustls"],
        within: &["server", "upstream", "store"],
        why: "TLS belongs to the sockets of clients, upstreams and the database",
    },
    Fence {
        crates: &["tokio"],
        within: &["server", "preprocess", "ledger", "pool", "upstream", "catalog", "users", "store", "admin", "main"],
        why: "bytes and values need no runtime: they are tested and benchmarked without one",
    },
    Fence { crates: &["simd_json"], within: &["request", "meter"], why: "its in-place parsing needs a scratch copy" },
    Fence {
        crates: &["tiktoken_rs", "bpe_openai"],
        within: &["meter"],
        why: "the meter keeps user's text away from what panics or is superlinear",
    },
    Fence { crates: &["toml"], within: &["config"], why: "a setting is a checked value everywhere else" },
    Fence { crates: &["clap", "comfy_table"], within: &["admin", "main"], why: "the terminal is the operator's" },
    Fence { crates: &["chacha20poly1305"], within: &["store"], why: "secrets are sealed where they are stored" },
    Fence {
        crates: &["tracing_subscriber", "tracing_appender"],
        within: &["telemetry"],
        why: "logging is set up once; `tracing` itself may be used anywhere",
    },
];

#[test]
fn modules_and_crates_are_used_as_the_map_has_it() {
    let mut wrong = Vec::new();
    for file in sources() {
        wrong.extend(check(&file));
    }
    tell(&wrong);
}

#[test]
fn lib_rs_lists_every_module_in_the_order_of_the_journey_with_a_line_about_each() {
    let mut wrong = check_list(&read("src/lib.rs"));
    let files: Vec<String> = sources().into_iter().map(|file| file.path).collect();
    wrong.extend(check_folder(&files));
    tell(&wrong);
}

#[test]
fn architecture_md_names_every_file_and_the_readme_shows_the_configuration_as_it_is() {
    let (architecture, readme) = (read("ARCHITECTURE.md"), read("README.md"));
    let mut wrong = Vec::new();
    for file in sources() {
        let name = file.path.trim_start_matches("src/");
        if !architecture.contains(&format!("`{name}`")) {
            wrong.push(format!("{}: ARCHITECTURE.md does not name `{name}`: add it to the map there.", file.path));
        }
    }
    if !readme.contains(&read("src/config/example.toml")) {
        wrong.push("README.md: its configuration is not that of src/config/example.toml: copy it anew.".to_owned());
    }
    tell(&wrong);
}

fn tell(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A source file, by its path from the project's folder.
struct Source {
    path: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let (mut folders, mut found) = (vec!["src".to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(&folder));
        for entry in entries.unwrap_or_else(|error| panic!("{folder}: {error}")) {
            let entry = entry.unwrap_or_else(|error| panic!("{folder}: {error}"));
            let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
            match entry.path().is_dir() {
                true => folders.push(path),
                false if path.ends_with(".rs") => found.push(Source { text: read(&path), path }),
                false => {}
            }
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    assert!(found.len() > MAP.len(), "src/ has fewer files than modules: the checker looks in the wrong place");
    found
}

// The rules.

/// What is wrong with the paths of one file, a sentence each.
fn check(file: &Source) -> Vec<String> {
    let module = module_of(&file.path);
    let home = module.first().map_or("lib", String::as_str);
    let mut wrong = Vec::new();
    for path in paths(&file.text) {
        let at = format!("{}:{}", file.path, path.line);
        match root(&path, &module) {
            Root::Crate(Some(target)) if home != "main" => wrong.extend(check_line(&at, home, target)),
            Root::Crate(None) => wrong
                .push(format!("{at}: `{}` names no module: write out which one is used.", path.segments.join("::"))),
            Root::Extern(name) => wrong.extend(check_fence(&at, home, name)),
            _ => {}
        }
    }
    wrong.dedup();
    wrong
}

fn check_line(at: &str, home: &str, target: &str) -> Option<String> {
    let line = |name: &str| MAP.iter().find(|module| module.name == name).map(|module| module.line);
    let Some(theirs) = line(target) else {
        return Some(format!("{at}: `{target}` is no module of the map: items of lib.rs are not to be used."));
    };
    let ours = line(home).unwrap_or(0);
    (target != home && theirs >= ours).then(|| {
        format!(
            "{at}: `{home}` (line {ours} of the map) uses `{target}` (line {theirs}). A module uses lower lines only: \
             hand the value over as an argument, move the item to where both may reach it, or change MAP in \
             tests/architecture.rs in the same commit and say why."
        )
    })
}

fn check_fence(at: &str, home: &str, name: &str) -> Option<String> {
    let fence = FENCES.iter().find(|fence| fence.crates.contains(&name))?;
    (!fence.within.contains(&home)).then(|| {
        format!(
            "{at}: `{home}` uses the crate `{name}`, which is for {} only: {}. Move the code there, or change FENCES in \
             tests/architecture.rs in the same commit and say why.",
            fence.within.join(", "),
            fence.why
        )
    })
}

/// What is wrong with the list of modules in `lib.rs`.
fn check_list(lib: &str) -> Vec<String> {
    let lines: Vec<&str> = lib.lines().map(str::trim).collect();
    let mut wrong = Vec::new();
    let mut listed = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(name) = module_listed(line) else { continue };
        let at = format!("src/lib.rs:{}", index + 1);
        listed.push(name);
        if index == 0 || !lines[index - 1].starts_with("// ") {
            wrong.push(format!("{at}: `{name}` has no line about it: say above it in one sentence what it is for."));
        }
        if !MAP.iter().any(|module| module.name == name) {
            wrong
                .push(format!("{at}: `{name}` is not on the map: add it to MAP in tests/architecture.rs and say why."));
        }
    }
    for module in MAP.iter().filter(|module| !listed.contains(&module.name)) {
        let name = module.name;
        wrong.push(format!("src/lib.rs: `{name}` is on the map, but not here: add it, or take it out of MAP."));
    }
    let order: Vec<&str> = MAP.iter().map(|module| module.name).filter(|name| listed.contains(name)).collect();
    let found: Vec<&str> = listed.into_iter().filter(|name| order.contains(name)).collect();
    if found != order {
        let order = order.join(", ");
        wrong.push(format!("src/lib.rs: the modules are not in the order of the journey, which is: {order}."));
    }
    wrong
}

fn module_listed(line: &str) -> Option<&str> {
    let name = line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod "))?;
    name.strip_suffix(';').or_else(|| name.split_whitespace().next())
}

/// `ls src` shows each module once, and nothing else.
fn check_folder(files: &[String]) -> Vec<String> {
    let mut wrong = Vec::new();
    for Module { name, .. } in &MAP {
        let [file, folder] = [format!("src/{name}.rs"), format!("src/{name}/mod.rs")];
        let count = files.iter().filter(|path| **path == file || **path == folder).count();
        if count != 1 {
            wrong.push(format!("src: `{name}` is to be either {file} or {folder}; found {count} of them."));
        }
    }
    for path in files {
        let home = module_of(path).first().cloned().unwrap_or_else(|| "lib".to_owned());
        if !["lib", "main"].contains(&home.as_str()) && !MAP.iter().any(|module| module.name == home) {
            wrong.push(format!("{path}: belongs to no module of the map: move it into one."));
        }
    }
    wrong
}

/// `src/ledger/hold.rs` → ledger, hold; `src/ledger/mod.rs` → ledger; `src/lib.rs` → nothing.
fn module_of(path: &str) -> Vec<String> {
    let path = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    match path {
        "lib" => vec![],
        path => path.split('/').map(str::to_owned).collect(),
    }
}

/// Where a path begins.
enum Root<'p> {
    /// At this crate, with the module that comes next; `None` where that is left open.
    Crate(Option<&'p str>),
    /// With a name that may be a crate.
    Extern(&'p str),
    /// In the module itself.
    Here,
}

fn root<'p>(path: &Found<'p>, module: &[String]) -> Root<'p> {
    let open = |next: Option<&&'p str>| Root::Crate(next.copied().filter(|next| !["*", "self"].contains(next)));
    let ups = path.segments.iter().take_while(|segment| ["self", "super"].contains(segment)).count();
    let supers = path.segments[..ups].iter().filter(|segment| **segment == "super").count();
    match path.segments[0] {
        "crate" | "gpt_cat" => open(path.segments.get(1)),
        // `super` out of the top-level module is another way to say `crate`.
        "self" | "super" if supers > 0 && supers == module.len() + path.inline => open(path.segments.get(ups)),
        "self" | "super" => Root::Here,
        name => Root::Extern(name),
    }
}

// The reader: tokens of Rust, as far as paths need them.

/// A path as it stands in a file, or one branch of a `use`.
#[derive(Debug, PartialEq)]
struct Found<'t> {
    line: usize,
    segments: Vec<&'t str>,
    /// How many inline modules it stands in.
    inline: usize,
}

#[derive(Clone, Copy, Debug)]
struct Token<'t> {
    line: usize,
    /// An identifier, `::`, `->`, or one other character. Comments, strings and numbers are none.
    text: &'t str,
    /// Nothing is between it and the token before it.
    glued: bool,
}

impl Token<'_> {
    fn is_name(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// Every path of a file: those of `use`, and all others with `::` in them.
fn paths(text: &str) -> Vec<Found<'_>> {
    let tokens = tokens(text);
    let (mut found, mut depth, mut inline) = (Vec::new(), 0, Vec::new());
    let text_at = |at: usize| tokens.get(at).map_or("", |token| token.text);
    let mut at = 0;
    while at < tokens.len() {
        let token = tokens[at];
        match token.text {
            "{" => depth += 1,
            "}" => {
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
                depth -= 1;
            }
            "mod" if text_at(at + 2) == "{" => inline.push(depth + 1),
            // `use<'a>` is a bound, not an import.
            "use" if text_at(at + 1) != "<" => {
                at = read_use(&tokens, at + 1, &[], inline.len(), &mut found);
                continue;
            }
            "extern" if text_at(at + 1) == "crate" => {
                found.push(Found { line: token.line, segments: vec![text_at(at + 2)], inline: inline.len() });
                at += 3;
                continue;
            }
            _ if begins_path(&tokens, at) => {
                let (segments, next) = read_path(&tokens, at);
                found.push(Found { line: token.line, segments, inline: inline.len() });
                at = next;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    found
}

/// A name with `::` behind it and none before it, or a `::` that follows nothing. rustfmt keeps paths in one piece.
fn begins_path(tokens: &[Token<'_>], at: usize) -> bool {
    let (token, next) = (tokens[at], tokens.get(at + 1));
    let before = at.checked_sub(1).map(|before| tokens[before]);
    if token.text == "::" {
        let follows = token.glued && before.is_some_and(|before| before.is_name() || before.text == ">");
        return !follows && next.is_some_and(Token::is_name);
    }
    token.is_name() && next.is_some_and(|next| next.text == "::") && before.is_none_or(|before| before.text != "::")
}

fn read_path<'t>(tokens: &[Token<'t>], mut at: usize) -> (Vec<&'t str>, usize) {
    let mut segments = Vec::new();
    if tokens[at].text == "::" {
        at += 1;
    }
    while let Some(name) = tokens.get(at).filter(|token| token.is_name() || token.text == "*") {
        segments.push(name.text);
        at += 1;
        match tokens.get(at) {
            Some(colons) if colons.text == "::" => at += 1,
            _ => break,
        }
    }
    (segments, at)
}

/// Reads one tree of a `use` from `at` on, below `above`; returns where it ends.
fn read_use<'t>(
    tokens: &[Token<'t>],
    at: usize,
    above: &[&'t str],
    inline: usize,
    found: &mut Vec<Found<'t>>,
) -> usize {
    let Some(first) = tokens.get(at) else { return at };
    let (more, mut at) = match first.text {
        "{" => (vec![], at),
        _ => read_path(tokens, at),
    };
    let segments: Vec<&str> = above.iter().copied().chain(more).collect();
    if tokens.get(at).is_none_or(|token| token.text != "{") {
        if !segments.is_empty() {
            found.push(Found { line: first.line, segments, inline });
        }
        // `as name`, then `,` or `}` or `;`, which are the caller's.
        while tokens.get(at).is_some_and(|token| ![",", "}", ";"].contains(&token.text)) {
            at += 1;
        }
        return at;
    }
    at += 1;
    while tokens.get(at).is_some_and(|token| token.text != "}") {
        let next = read_use(tokens, at, &segments, inline, found);
        at = next + usize::from(tokens.get(next).is_some_and(|token| token.text == ","));
        if at == next && tokens.get(at).is_some_and(|token| token.text != "}") {
            at += 1; // what no `use` holds
        }
    }
    at + 1
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let (mut found, mut at, mut line, mut glued) = (Vec::new(), 0, 1, false);
    while at < bytes.len() {
        let rest = &text[at..];
        let length = skipped(rest).unwrap_or(0);
        if length > 0 {
            line += bytes[at..at + length].iter().filter(|byte| **byte == b'\n').count();
            at += length;
            glued = false;
            continue;
        }
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let length = match word {
            0 if rest.starts_with("::") || rest.starts_with("->") || rest.starts_with("=>") => 2,
            0 => rest.chars().next().map_or(1, char::len_utf8),
            word => word,
        };
        if !bytes[at].is_ascii_digit() {
            found.push(Token { line, text: &rest[..length], glued });
        }
        at += length;
        glued = true;
    }
    found
}

/// The length of what is no token at the start of `rest`: white space, a comment, a string, a character, a lifetime.
fn skipped(rest: &str) -> Option<usize> {
    let bytes = rest.as_bytes();
    let first = *bytes.first()?;
    match first {
        b' ' | b'\t' | b'\r' | b'\n' => Some(1),
        b'/' if rest.starts_with("//") => Some(rest.find('\n').unwrap_or(rest.len())),
        b'/' if rest.starts_with("/*") => Some(block_comment(bytes)),
        b'"' => Some(quoted(bytes, 0)),
        b'\'' => Some(character(rest)),
        b'b' | b'c' | b'r' => {
            let letters = bytes.iter().take_while(|byte| b"bcr".contains(byte)).count();
            let hashes = bytes[letters..].iter().take_while(|byte| **byte == b'#').count();
            let raw = bytes[..letters].contains(&b'r');
            match bytes.get(letters + hashes) {
                _ if letters > 2 => None,
                Some(b'"') if raw => {
                    let end = format!("\"{}", "#".repeat(hashes));
                    let start = letters + hashes + 1;
                    Some(rest[start..].find(&end).map_or(rest.len(), |length| start + length + end.len()))
                }
                Some(b'"') if hashes == 0 => Some(quoted(bytes, letters)),
                Some(b'\'') if first == b'b' && letters == 1 && hashes == 0 => Some(1 + character(&rest[1..])),
                Some(_) if letters == 1 && first == b'r' && hashes == 1 => Some(2), // r#name: the name is what counts
                _ => None,
            }
        }
        _ => None,
    }
}

fn block_comment(bytes: &[u8]) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < bytes.len() {
        match bytes.get(at..at + 2) {
            Some(b"/*") => (at, depth) = (at + 2, depth + 1),
            Some(b"*/") => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The end of a string whose quote is at `quote`.
fn quoted(bytes: &[u8], quote: usize) -> usize {
    let mut at = quote + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// A character in quotes, or the quote of a lifetime with its name.
fn character(rest: &str) -> usize {
    let mut inside = rest[1..].char_indices();
    match (inside.next(), inside.next()) {
        (Some((_, '\\')), _) => {
            let from = 3; // behind the quote, the backslash and what it escapes, which may be a quote
            rest.get(from..).and_then(|rest| rest.find('\'')).map_or(rest.len(), |length| from + length + 1)
        }
        (Some((_, one)), Some((_, '\''))) => 2 + one.len_utf8(),
        _ => 1 + rest[1..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len() - 1),
    }
}

// The checker itself: each rule on something that breaks it, and on what only looks so.

fn findings(path: &str, text: &str) -> Vec<String> {
    check(&Source { path: path.to_owned(), text: text.to_owned() })
}

#[track_caller]
fn assert_found(path: &str, text: &str, line: usize, parts: &[&str]) {
    let found = findings(path, text);
    let at = format!("{path}:{line}:");
    let is_it = |finding: &String| finding.starts_with(&at) && parts.iter().all(|part| finding.contains(part));
    assert!(found.iter().any(is_it), "expected {at} {parts:?}, found {found:#?}");
}

#[track_caller]
fn assert_clean(path: &str, text: &str) {
    assert_eq!(findings(path, text), Vec::<String>::new());
}

#[test]
fn a_lower_line_that_uses_a_higher_one_is_found_with_file_and_line() {
    let text = "//! What it is.\n\nuse crate::error::Error;\nuse crate::ledger::Ledger;\n";
    assert_found("src/store/mod.rs", text, 4, &["`store` (line 3", "`ledger` (line 6)", "tests/architecture.rs"]);
    assert_eq!(findings("src/store/mod.rs", text).len(), 1);
}

#[test]
fn modules_of_one_line_do_not_know_each_other() {
    assert_found("src/users.rs", "use crate::catalog::Model;", 1, &["`users`", "`catalog`"]);
    assert_found("src/upstream/openai.rs", "use crate::ledger::Ended;", 1, &["`upstream`", "`ledger`"]);
    assert_clean("src/upstream/openai.rs", "use crate::upstream::Ask;\nuse crate::pool::Permit;");
}

#[test]
fn nested_braces_over_several_lines_are_read_branch_by_branch() {
    let text = "use crate::{\n    error::{Error, Row as R},\n    meter::{self, chunk::{Chunk}},\n    server::journey::{\n        answer,\n    },\n};\n";
    assert_found("src/pool/mod.rs", text, 5, &["`pool`", "`server`"]);
    assert_eq!(findings("src/pool/mod.rs", text).len(), 1);
    assert_clean("src/pool/mod.rs", "use crate::{error::Error, catalog::{Model, Offer}, config as c};");
}

#[test]
fn a_path_in_the_middle_of_code_is_found() {
    assert_found("src/meter/mod.rs", "fn now() -> i64 {\n    crate::store::now_ms()\n}", 2, &["`meter`", "`store`"]);
    assert_found("src/sse/mod.rs", "fn f(_: &crate::server::Gateway) {}", 1, &["`server`"]);
    assert_found("src/sse/mod.rs", "macro_rules! m { () => { $crate::server::x() } }", 1, &["`server`"]);
    assert_found("src/config/mod.rs", "fn f() -> Vec<crate::store::Line> { vec![] }", 1, &["`store`"]);
}

#[test]
fn super_out_of_a_module_is_a_way_to_say_crate() {
    assert_found("src/users.rs", "use super::server::Server;", 1, &["`users`", "`server`"]);
    assert_found("src/ledger/hold.rs", "fn f() {\n    super::super::server::x();\n}", 2, &["`ledger`", "`server`"]);
    assert_found("src/users.rs", "mod inner {\n    use super::super::admin::x;\n}", 2, &["`users`", "`admin`"]);
    assert_found("src/users.rs", "use self::super::pool::Pool;", 1, &["`pool`"]);
    assert_clean("src/ledger/hold.rs", "use super::journal::Mark;\nmod tests { use super::super::server; }");
    assert_clean("src/users.rs", "mod a { use super::Users; } mod tests { use super::*; }");
}

#[test]
fn what_is_left_open_or_unknown_is_found() {
    assert_found("src/pool/mod.rs", "use crate::*;", 1, &["`crate::*` names no module"]);
    assert_found("src/pool/mod.rs", "use crate as c;", 1, &["names no module"]);
    assert_found("src/pool/mod.rs", "use crate::{self as c};", 1, &["names no module"]);
    assert_found("src/users.rs", "use super::*;", 1, &["names no module"]);
    assert_found("src/pool/mod.rs", "use crate::helpers::x;", 1, &["`helpers` is no module of the map"]);
}

#[test]
fn tests_within_src_keep_the_map_too() {
    let text = "#[cfg(test)]\nmod tests {\n    use super::*;\n    use crate::server::Server;\n}";
    assert_found("src/ledger/mod.rs", text, 4, &["`server`"]);
}

#[test]
fn comments_strings_characters_and_lifetimes_are_no_paths() {
    assert_clean(
        "src/sse/mod.rs",
        r####"
        //! See [`crate::server::journey`], or use crate::server::x;
        /* use crate::server::a; /* nested: use tokio::x; */ use crate::server::b; */
        const A: &str = "use crate::server::c; \" crate::server::d";
        const B: &str = r#"crate::server::e "quoted" tokio::f"#;
        const C: &[u8] = b"hyper::g";
        const D: [char; 3] = ['"', '\'', '\\'];
        const E: u8 = b'"';
        fn f<'a>(x: &'a str) -> impl Iterator<Item = &'a str> + use<'a> { x.split('"') }
        "####,
    );
    // Each of those must end where it ends, or what follows it would be lost.
    for before in
        ["'\"'", "b'\"'", "'\\''", "'\\u{7f}'", "\"\\\\\"", "r#\"\"\"#", "br\"\\\"", "/* \" */ 1", "f::<'static>()"]
    {
        let text = format!("fn f() {{\n    let x = {before};\n    crate::server::x();\n}}");
        assert_found("src/sse/mod.rs", &text, 3, &["`server`"]);
    }
}

#[test]
fn a_crate_outside_its_fence_is_found_however_it_is_named() {
    assert_found("src/ledger/mod.rs", "use rusqlite::Connection;", 1, &["`rusqlite`", "store only", "FENCES"]);
    assert_found("src/pool/mod.rs", "fn f(_: hyper::Uri) {}", 1, &["`hyper`", "server, upstream, admin"]);
    assert_found("src/pool/mod.rs", "fn f() -> ::hyper::Uri { x }", 1, &["`hyper`"]);
    assert_found("src/pool/mod.rs", "use ::{hyper_util::rt, std::io};", 1, &["`hyper_util`"]);
    assert_found("src/pool/mod.rs", "use {std::io, hyper::Uri};", 1, &["`hyper`"]);
    assert_found("src/pool/mod.rs", "use http_body_util as h;", 1, &["`http_body_util`"]);
    assert_found("src/pool/mod.rs", "extern crate hyper_rustls;", 1, &["`hyper_rustls`"]);
    assert_found("src/sse/tests.rs", "#[tokio::test]\nasync fn t() {}", 1, &["`sse`", "`tokio`"]);
    assert_found("src/main.rs", "use hyper::Uri;", 1, &["`main`", "`hyper`"]);
    assert_found("src/lib.rs", "pub use tokio::net::TcpStream;", 1, &["`lib`", "`tokio`"]);
}

#[test]
fn every_fence_keeps_its_crates_in_and_lets_them_be_used_within() {
    let names: Vec<&str> = MAP.iter().map(|module| module.name).chain(["main"]).collect();
    for fence in &FENCES {
        assert!(fence.within.iter().all(|name| names.contains(name)), "{:?}", fence.within);
        for (name, home) in fence.crates.iter().flat_map(|name| names.iter().map(move |home| (name, home))) {
            let found = findings(&format!("src/{home}.rs"), &format!("use {name}::X;"));
            assert_eq!(found.is_empty(), fence.within.contains(home), "{home} uses {name}: {found:?}");
        }
    }
    for name in ["sse", "meter", "request", "error", "config", "telemetry"] {
        assert_found(&format!("src/{name}/mod.rs"), "use tokio::time::sleep;", 1, &["`tokio`"]);
    }
    assert_clean("src/sse/mod.rs", "use tracing::info;\nuse memchr::memchr;");
}

#[test]
fn main_knows_every_module() {
    assert_clean(
        "src/main.rs",
        "use gpt_cat::{admin, server::Server};\nuse clap::Parser;\nuse tokio::net::TcpListener;",
    );
}

#[test]
fn a_list_of_modules_that_is_not_the_map_is_found() {
    let good: String = MAP.iter().map(|module| format!("// What it does.\npub mod {};\n", module.name)).collect();
    assert_eq!(check_list(&good), Vec::<String>::new());
    let wrong = |list: &str, parts: &[&str]| {
        let found = check_list(list);
        assert!(found.iter().any(|finding| parts.iter().all(|part| finding.contains(part))), "{parts:?}: {found:#?}");
    };
    wrong(&good.replacen("// What it does.\n", "", 1), &["src/lib.rs:1:", "`server` has no line about it"]);
    wrong(&good.replace("pub mod sse;\n", ""), &["`sse` is on the map, but not here"]);
    let added = format!("src/lib.rs:{}:", good.lines().count() + 2);
    wrong(&format!("{good}/// Odds and ends.\npub mod utils;\n"), &[&added, "`utils` is not on the map"]);
    wrong(&format!("{good}/// Inline.\nmod helpers {{\n}}\n"), &["`helpers` is not on the map"]);
    let swapped = good.replace("pool;", "x;").replace("sse;", "pool;").replace("x;", "sse;");
    wrong(&swapped, &["not in the order of the journey"]);
}

#[test]
fn a_file_that_belongs_to_no_module_and_a_module_that_is_there_twice_are_found() {
    let mut files: Vec<String> = MAP.iter().map(|module| format!("src/{}/mod.rs", module.name)).collect();
    files.extend(["src/lib.rs".to_owned(), "src/main.rs".to_owned(), "src/sse/oracle.rs".to_owned()]);
    assert_eq!(check_folder(&files), Vec::<String>::new());
    files.extend(["src/sse.rs".to_owned(), "src/common.rs".to_owned()]);
    let found = check_folder(&files);
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].contains("`sse` is to be either"));
    assert!(found[1].starts_with("src/common.rs: belongs to no module"));
}

#[test]
fn no_line_of_the_map_is_left_out_and_only_the_server_is_on_the_last() {
    let last = MAP.iter().map(|module| module.line).max().unwrap_or(0);
    assert!((1..=last).all(|line| MAP.iter().any(|module| module.line == line)));
    let on_last: Vec<&str> = MAP.iter().filter(|module| module.line == last).map(|module| module.name).collect();
    assert_eq!(on_last, ["server"]);
}
