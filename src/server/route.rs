//! Which paths there are; each also without its `/v1`.

use hyper::Method;

use crate::error::Error;
use crate::request::{Api, api};

/// What a path is for.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// A browser asks what it may send.
    Preflight,
    Health,
    Ready,
    Models,
    Model(String),
    /// A call that is forwarded.
    Call(&'static Api),
    Usage,
    /// The balance, as front ends ask for it.
    Subscription,
    Billed,
}

/// A path in an error is cut to this.
const PATH_SHOWN_BYTES_MAX: usize = 256;

/// The route of a method and path.
pub fn of(method: &Method, path: &str) -> Result<Route, Error> {
    if method == Method::OPTIONS {
        return Ok(Route::Preflight);
    }
    // A base URL that ends in a slash is the commonest mistake in a front end's settings.
    let path = path.strip_suffix('/').unwrap_or(path);
    let path = path.strip_prefix('/').map_or(path, |rest| if rest.starts_with('/') { rest } else { path });
    let within = path.strip_prefix("/v1").filter(|rest| rest.starts_with('/')).unwrap_or(path);
    if let Some(api) = api::APIS.iter().find(|api| api.path == within) {
        return match method {
            &Method::POST => Ok(Route::Call(api)),
            _ => Err(Error::MethodNotAllowed { allowed: "POST" }),
        };
    }
    let (route, allowed) = match within {
        "/models" => (Route::Models, "GET"),
        "/usage" => (Route::Usage, "GET"),
        "/dashboard/billing/subscription" => (Route::Subscription, "GET"),
        "/dashboard/billing/usage" => (Route::Billed, "GET"),
        _ => match (within.strip_prefix("/models/"), path) {
            (Some(name), _) if !name.is_empty() => (Route::Model(unescaped(name)), "GET"),
            (_, "/healthz") => (Route::Health, "GET"),
            (_, "/readyz") => (Route::Ready, "GET"),
            _ => {
                let shown = &path[..path.floor_char_boundary(PATH_SHOWN_BYTES_MAX)];
                return Err(Error::PathUnknown { path: shown.to_owned() });
            }
        },
    };
    let allows = method.as_str() == allowed || (method == Method::HEAD && allowed == "GET");
    if allows { Ok(route) } else { Err(Error::MethodNotAllowed { allowed }) }
}

/// Undoes percent-encoding: SDKs encode the `/` and `:` of a model's name. What is no encoding stays.
fn unescaped(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let digit = |index: usize| tail.get(index).and_then(|digit| char::from(*digit).to_digit(16));
        match (byte, digit(0).zip(digit(1))) {
            (b'%', Some((high, low))) => {
                bytes.push((high << 4 | low) as u8);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_there_with_and_without_v1() {
        for prefix in ["", "/v1"] {
            assert_eq!(of(&Method::POST, &format!("{prefix}/chat/completions")), Ok(Route::Call(&api::CHAT)));
            assert_eq!(of(&Method::GET, &format!("{prefix}/models")), Ok(Route::Models));
            assert_eq!(of(&Method::GET, &format!("{prefix}/usage")), Ok(Route::Usage));
            for (what, route) in [("subscription", Route::Subscription), ("usage", Route::Billed)] {
                assert_eq!(of(&Method::GET, &format!("{prefix}/dashboard/billing/{what}")), Ok(route));
            }
            for api in api::APIS {
                assert_eq!(of(&Method::POST, &format!("{prefix}{}", api.path)), Ok(Route::Call(api)));
            }
            let one = of(&Method::GET, &format!("{prefix}/models/qwen%2Fqwen3%3A8b"));
            assert_eq!(one, Ok(Route::Model("qwen/qwen3:8b".into())));
        }
    }

    #[test]
    fn another_path_is_unknown_and_another_method_is_told_the_right_one() {
        for path in ["/", "/v1", "/v1/", "/v2/models", "/v1models", "/v1/healthz/x", ""] {
            assert!(matches!(of(&Method::GET, path), Err(Error::PathUnknown { .. })), "{path}");
        }
        let wrong = of(&Method::GET, "/v1/chat/completions");
        assert_eq!(wrong, Err(Error::MethodNotAllowed { allowed: "POST" }));
    }

    #[test]
    fn a_slash_too_many_at_either_end_is_forgiven() {
        assert_eq!(of(&Method::POST, "//v1/chat/completions"), Ok(Route::Call(&api::CHAT)));
        assert_eq!(of(&Method::GET, "/v1/models/"), Ok(Route::Models));
    }

    #[test]
    fn a_broken_escape_stays_as_it_is() {
        assert_eq!(unescaped("a%2"), "a%2");
        assert_eq!(unescaped("%zz%41"), "%zzA");
    }
}
