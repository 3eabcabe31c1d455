//! Reads the two kinds of URL that a configuration holds.

use std::net::Ipv6Addr;

use super::{DatabaseUrl, Secret};

/// `sqlite:path`, `sqlite://path`, `postgres://…` or `postgresql://…`. An error never repeats the text, which may hold a
/// password.
pub fn parse_database_url(text: &str) -> Result<DatabaseUrl, String> {
    let expected = |found: &str| Err(format!("expected sqlite:<path> or postgres://<user>@<host>/<database>{found}"));
    let Some((scheme, rest)) = text.split_once(':') else { return expected(", found no scheme") };
    match (scheme, rest.strip_prefix("//")) {
        ("sqlite", below) => match below.unwrap_or(rest) {
            "" | ":memory:" => Err("expected the path of a file after sqlite:".to_owned()),
            path if path.contains(['?', '#', '\0']) => Err("expected a path alone after sqlite:".to_owned()),
            path => Ok(DatabaseUrl::Sqlite(path.into())),
        },
        ("postgres" | "postgresql", Some(rest)) if !rest.is_empty() && !rest.contains(is_blank) => {
            Ok(DatabaseUrl::Postgres(Secret::new(text)))
        }
        ("postgres" | "postgresql", _) => expected(", found a part of it"),
        _ => expected(", found another scheme"),
    }
}

/// `http` or `https`, a host, perhaps a port and a path; slashes at the end are taken off. An error never repeats a text
/// that holds credentials.
pub fn parse_base_url(text: &str) -> Result<String, String> {
    if text.contains('@') {
        return Err("expected no user or password in it: keys belong to accounts".to_owned());
    }
    let expected = |what: &str| format!("expected {what}, such as \"https://api.openai.com/v1\", found {text:?}");
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let rest = rest.ok_or_else(|| expected("http:// or https://"))?;
    if rest.contains(['?', '#']) {
        return Err(expected("no query and no fragment"));
    }
    if !rest.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte)) {
        return Err(expected("only characters that a URL may hold"));
    }
    if !is_authority(rest.split('/').next().unwrap_or_default()) {
        return Err(expected("a host, and perhaps a port"));
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn is_authority(text: &str) -> bool {
    let is_port = |port: &str| port.strip_prefix(':').is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    if let Some((address, port)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address.parse::<Ipv6Addr>().is_ok() && (port.is_empty() || port.starts_with(':')) && is_port(port);
    }
    let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    !host.is_empty() && host.bytes().all(is_host) && is_port(port)
}

/// What no name and no URL may hold.
pub fn is_blank(c: char) -> bool {
    c.is_whitespace() || c.is_control()
}
