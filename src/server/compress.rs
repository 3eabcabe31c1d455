//! Makes whole JSON replies smaller for clients that say that they can read it; a stream of events never is.

use std::io::Write;

use bytes::Bytes;
use hyper::Response;
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, VARY};

use super::reply::Reply;
use crate::upstream::Pieces;

/// A smaller reply fits into one or two packets either way.
const BYTES_MIN: usize = 2 << 10;
/// A larger one is compressed on a blocking thread: at 100 MB/s this takes 2 ms.
const INLINE_BYTES_MAX: usize = 256 << 10;
/// Of 0 to 11: about as fast as gzip's 6 and a tenth smaller.
const BROTLI_QUALITY: u32 = 4;
/// 4 MiB, what brotli's own tool takes by default.
const BROTLI_WINDOW_BITS: u32 = 22;
const BROTLI_BUFFER_BYTES: usize = 16 << 10;
/// Of 0 to 9: beyond it JSON gets hardly smaller and takes twice the time.
const GZIP_LEVEL: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Brotli,
    Gzip,
}

impl Encoding {
    fn name(self) -> &'static str {
        match self {
            Encoding::Brotli => "br",
            Encoding::Gzip => "gzip",
        }
    }

    fn run(self, pieces: &[Bytes]) -> std::io::Result<Vec<u8>> {
        let mut out = Vec::new();
        match self {
            Encoding::Brotli => {
                let (quality, window) = (BROTLI_QUALITY, BROTLI_WINDOW_BITS);
                let mut writer = brotli::CompressorWriter::new(&mut out, BROTLI_BUFFER_BYTES, quality, window);
                pieces.iter().try_for_each(|piece| writer.write_all(piece))?;
                writer.flush()?;
                drop(writer); // writes the end
            }
            Encoding::Gzip => {
                let mut writer = flate2::write::GzEncoder::new(&mut out, flate2::Compression::new(GZIP_LEVEL));
                pieces.iter().try_for_each(|piece| writer.write_all(piece))?;
                writer.finish()?;
            }
        }
        Ok(out)
    }
}

/// Compresses the reply where the client accepts it and it pays; otherwise it stays as it is.
pub async fn compress(response: &mut Response<Reply>, request: &HeaderMap) {
    let is_json = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    let Reply::Whole(pieces) = response.body() else { return };
    if !is_json || pieces.len() < BYTES_MIN {
        return;
    }
    let encoding = accepted(request);
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("accept-encoding"));
    let Some(encoding) = encoding else { return };
    let Reply::Whole(pieces) = response.body() else { return };
    let (bytes, pieces) = (pieces.len(), pieces.left().to_vec());
    let made = match bytes <= INLINE_BYTES_MAX {
        true => encoding.run(&pieces),
        false => tokio::task::spawn_blocking(move || encoding.run(&pieces)).await.unwrap_or_else(|_| Ok(Vec::new())),
    };
    let Ok(made) = made else { return };
    if made.is_empty() || made.len() >= bytes {
        return;
    }
    *response.body_mut() = Reply::Whole(Pieces::new([Bytes::from(made)]));
    response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static(encoding.name()));
}

/// The encoding that the client likes best (RFC 9110, 12.5.3); of two that it likes the same, the smaller one.
fn accepted(headers: &HeaderMap) -> Option<Encoding> {
    let given = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let mut best: Option<(f32, Encoding)> = None;
    for item in given.flat_map(|value| value.split(',')) {
        let mut parts = item.split(';').map(str::trim);
        let encoding = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
            "br" => Encoding::Brotli,
            "gzip" | "x-gzip" => Encoding::Gzip,
            _ => continue, // `*` may mean an encoding that the client never heard of
        };
        let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
        let weight = weight.map_or(1.0, |weight| weight.trim().parse::<f32>().unwrap_or(0.0));
        let is_better = best.is_none_or(|(other, _)| weight > other || weight == other && encoding == Encoding::Brotli);
        if weight > 0.0 && is_better {
            best = Some((weight, encoding));
        }
    }
    best.map(|(_, encoding)| encoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(accept: &str) -> Option<Encoding> {
        accepted(&HeaderMap::from_iter([(ACCEPT_ENCODING, accept.parse().unwrap())]))
    }

    #[test]
    fn what_the_client_likes_best_is_taken_and_what_it_refuses_is_not() {
        assert_eq!(of("gzip, deflate, br"), Some(Encoding::Brotli));
        assert_eq!(of("br;q=0.5, GZIP"), Some(Encoding::Gzip));
        assert_eq!(of("gzip;q=0, br; q=0.001"), Some(Encoding::Brotli));
        for none in ["", "identity", "*", "gzip;q=0", "br;q=x", "deflate, zstd"] {
            assert_eq!(of(none), None, "{none}");
        }
        assert_eq!(accepted(&HeaderMap::new()), None);
    }

    #[tokio::test]
    async fn a_reply_that_is_short_or_no_json_stays_as_it_is() {
        let request = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("gzip"))]);
        let text = Bytes::from("{\"a\":1}".repeat(1000));
        let encoded = async |mut response: Response<Reply>| {
            compress(&mut response, &request).await;
            response.headers().contains_key(CONTENT_ENCODING)
        };
        assert!(encoded(super::super::reply::json([text.clone()])).await);
        assert!(!encoded(super::super::reply::json([text.slice(..2000)])).await);
        assert!(!encoded(super::super::reply::stream(Reply::Whole(Pieces::new([text])))).await);
    }
}
