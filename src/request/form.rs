//! Reads the fields of a multipart form that decide something, while its bytes pass; everything else stays unread.
//!
//! RFC 7578 and RFC 2046, strictly: where two parsers could read a form in two ways it is refused, since the provider's
//! reading decides what is billed.

use std::ops::Range;

use memchr::memmem::Finder;

use super::head::{MODEL_BYTES_MAX, N_MAX};
use crate::error::Error;

/// RFC 2046's bound of a boundary.
const BOUNDARY_BYTES_MAX: usize = 70;
/// The headers of one part; real ones have two or three lines.
const HEADERS_BYTES_MAX: usize = 4 << 10;
/// Parts of one form: a dozen fields, and 16 images.
const PARTS_MAX: usize = 256;

/// What a form decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    pub model: Option<String>,
    /// Where the model's name stands in the form.
    pub model_at: Option<Range<usize>>,
    pub n: Option<u32>,
}

/// Reads a form chunk by chunk.
#[derive(Debug)]
pub struct Form {
    /// LF, two hyphens and the boundary; a CR has to stand before it.
    delimiter: Finder<'static>,
    state: State,
    /// What has been read and may belong to what comes next.
    kept: Vec<u8>,
    /// Where `kept` begins in the form.
    kept_at: usize,
    parts: usize,
    fields: Fields,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first delimiter, or in the body of a part that decides nothing.
    Skipping,
    /// Behind a delimiter.
    Delimited,
    Headers,
    /// In the body of a part that decides something.
    Value(Name),
    /// Behind the last delimiter: what comes is no part.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Model,
    N,
}

impl Name {
    fn text(self) -> &'static str {
        match self {
            Name::Model => "model",
            Name::N => "n",
        }
    }
}

impl Form {
    /// A reader for the form that this `Content-Type` announces; `None` when it announces none.
    ///
    /// Fails when it is one without a boundary that can be used.
    pub fn announced(content_type: &str) -> Result<Option<Form>, Error> {
        let mut parameters = content_type.split(';');
        if !parameters.next().unwrap_or_default().trim().eq_ignore_ascii_case("multipart/form-data") {
            return Ok(None);
        }
        let mut boundaries = parameters.filter_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            // `boundary*` is one as well, for those who read RFC 2231: then there are two.
            name.trim().to_ascii_lowercase().starts_with("boundary").then_some((name.trim(), value.trim()))
        });
        let refused = || Error::body("content-type", "must have one boundary of 1 to 70 characters");
        let (Some((name, boundary)), None) = (boundaries.next(), boundaries.next()) else { return Err(refused()) };
        if name.len() != "boundary".len() {
            return Err(refused());
        }
        let boundary = boundary.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(boundary);
        let is_boundary = |byte: u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(&byte);
        if !(1..=BOUNDARY_BYTES_MAX).contains(&boundary.len()) || !boundary.bytes().all(is_boundary) {
            return Err(refused());
        }
        Ok(Some(Form {
            delimiter: Finder::new(&format!("\n--{boundary}")).into_owned(),
            state: State::Skipping,
            kept: b"\r\n".to_vec(), // the first delimiter may stand at the very beginning
            kept_at: 0usize.wrapping_sub(2),
            parts: 0,
            fields: Fields::default(),
        }))
    }

    /// Reads on. A field that decides something and is given twice is refused, as is what could be read in two ways.
    pub fn read(&mut self, chunk: &[u8]) -> Result<(), Error> {
        self.kept.extend_from_slice(chunk);
        while self.step()? {}
        Ok(())
    }

    /// What stands between its parts, behind two hyphens.
    pub fn boundary(&self) -> &str {
        std::str::from_utf8(&self.delimiter.needle()["\n--".len()..]).unwrap_or_default()
    }

    /// What has been read so far.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// Whether the last delimiter has been read.
    pub fn is_over(&self) -> bool {
        self.state == State::Ended
    }

    /// Takes one step; false when more bytes are needed for the next one.
    fn step(&mut self) -> Result<bool, Error> {
        match self.state {
            State::Ended => {
                self.drop_kept(self.kept.len());
                Ok(false)
            }
            State::Skipping => match self.delimited()? {
                // RFC 2046 allows a text there, which nobody sends and the first part would be mistaken for.
                Some(1..) if self.parts == 0 => Err(refused("does not begin with its boundary")),
                Some(at) => {
                    self.drop_kept(at + self.delimiter_bytes());
                    self.state = State::Delimited;
                    Ok(true)
                }
                None if self.parts == 0 && self.kept.len() >= self.delimiter_bytes() => {
                    Err(refused("does not begin with its boundary"))
                }
                None if self.parts == 0 => Ok(false),
                None => {
                    // The beginning of a delimiter may stand at the end.
                    let keep = self.delimiter_bytes() - 1;
                    self.drop_kept(self.kept.len().saturating_sub(keep));
                    Ok(false)
                }
            },
            State::Delimited => match self.kept.first_chunk() {
                None => Ok(false),
                Some(b"--") => {
                    self.state = State::Ended;
                    Ok(true)
                }
                Some(b"\r\n") => {
                    self.parts += 1;
                    if self.parts > PARTS_MAX {
                        return Err(refused(format!("has more than {PARTS_MAX} parts")));
                    }
                    // The CRLF stays: headers that are none end with it.
                    self.state = State::Headers;
                    Ok(true)
                }
                Some(_) => Err(refused("has a line that begins like its boundary")),
            },
            State::Headers => match memchr::memmem::find(&self.kept, b"\r\n\r\n") {
                Some(end) if end <= HEADERS_BYTES_MAX => {
                    let name = deciding(&self.kept[2..end.max(2)])?;
                    // The last CRLF stays: the delimiter behind an empty body begins with it.
                    self.drop_kept(end + 2);
                    self.state = name.map_or(State::Skipping, State::Value);
                    Ok(true)
                }
                None if self.kept.len() <= HEADERS_BYTES_MAX + 4 => Ok(false),
                _ => Err(refused(format!("has a part with more than {HEADERS_BYTES_MAX} bytes of headers"))),
            },
            State::Value(name) => match self.delimited()? {
                Some(end) => {
                    self.take(name, end)?;
                    self.drop_kept(end + self.delimiter_bytes());
                    self.state = State::Delimited;
                    Ok(true)
                }
                None if self.kept.len() <= MODEL_BYTES_MAX + self.delimiter_bytes() => Ok(false),
                None => Err(Error::body(name.text(), format!("must have at most {MODEL_BYTES_MAX} bytes"))),
            },
        }
    }

    /// Where the next delimiter begins, with its CR. One without a CR ends a part for some parsers: it is refused.
    fn delimited(&self) -> Result<Option<usize>, Error> {
        match self.delimiter.find(&self.kept) {
            None => Ok(None),
            Some(at) if at > 0 && self.kept[at - 1] == b'\r' => Ok(Some(at - 1)),
            Some(_) => Err(refused("has its boundary behind a bare line feed")),
        }
    }

    /// CR, LF, two hyphens and the boundary.
    fn delimiter_bytes(&self) -> usize {
        self.delimiter.needle().len() + 1
    }

    fn take(&mut self, name: Name, end: usize) -> Result<(), Error> {
        let invalid = |reason: &'static str| Err(Error::body(name.text(), reason));
        let value = end.min(2)..end; // behind the CRLF that ended the headers
        let Ok(text) = std::str::from_utf8(&self.kept[value.clone()]) else { return invalid("must be UTF-8") };
        match name {
            Name::Model if self.fields.model.is_some() => return invalid("is given twice"),
            Name::N if self.fields.n.is_some() => return invalid("is given twice"),
            Name::Model if text.is_empty() => return invalid("must not be empty"),
            Name::Model if text.len() > MODEL_BYTES_MAX => return invalid("is too long"),
            Name::Model => {
                self.fields.model = Some(text.to_owned());
                self.fields.model_at = Some(self.kept_at + value.start..self.kept_at + value.end);
            }
            Name::N => match text.parse::<u32>() {
                Ok(n) if (1..=N_MAX).contains(&n.into()) && !text.starts_with('+') => self.fields.n = Some(n),
                _ => return Err(Error::body("n", format!("must be an integer from 1 to {N_MAX}"))),
            },
        }
        Ok(())
    }

    fn drop_kept(&mut self, bytes: usize) {
        self.kept.drain(..bytes);
        self.kept_at = self.kept_at.wrapping_add(bytes);
    }
}

/// The name of a part that decides something, by its headers.
fn deciding(headers: &[u8]) -> Result<Option<Name>, Error> {
    let unclear = || refused("has a part whose name cannot be read for certain");
    let headers = std::str::from_utf8(headers).map_err(|_| unclear())?;
    let mut disposition = None;
    let mut is_encoded = false;
    for line in headers.split("\r\n").filter(|line| !line.is_empty()) {
        // A folded line, or one that some parsers would split further.
        if line.starts_with([' ', '\t']) || line.contains(['\r', '\n', '\0']) {
            return Err(unclear());
        }
        let (name, value) = line.split_once(':').ok_or_else(unclear)?;
        match name.trim().to_ascii_lowercase().as_str() {
            "content-disposition" if disposition.replace(value.trim()).is_some() => return Err(unclear()),
            "content-transfer-encoding" => {
                is_encoded = !["7bit", "8bit", "binary"].contains(&value.trim().to_ascii_lowercase().as_str());
            }
            _ => {}
        }
    }
    let name = part_name(disposition.ok_or_else(unclear)?).ok_or_else(unclear)?;
    let name = match name {
        "model" => Name::Model,
        "n" => Name::N,
        // Some parsers unescape names, or drop brackets and case.
        other if is_close(other) => return Err(unclear()),
        _ => return Ok(None),
    };
    if is_encoded {
        return Err(Error::body(name.text(), "must not be encoded"));
    }
    Ok(Some(name))
}

/// Names that another parser may take for one that decides something.
fn is_close(name: &str) -> bool {
    let plain: String = name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    plain == "model" || plain == "n" || name.contains(['%', '\\', '&'])
}

/// The `name` of a `Content-Disposition`; `None` when it has none, or not for certain.
fn part_name(disposition: &str) -> Option<&str> {
    let mut rest = disposition.strip_prefix("form-data")?.trim_start();
    let mut found = None;
    while let Some(parameter) = rest.strip_prefix(';') {
        let (name, value) = parameter.split_once('=')?;
        let (value, behind) = match value.strip_prefix('"') {
            Some(quoted) => {
                let end = memchr::memchr2(b'"', b'\\', quoted.as_bytes())?;
                // An escaped quote is the file name's affair; in a name it is not clear.
                let end = if name.trim().starts_with("filename") { closing_quote(quoted)? } else { end };
                (quoted.get(..end)?, quoted.get(end..)?.strip_prefix('"')?)
            }
            None => value.split_at(value.find([';', ' ']).unwrap_or(value.len())),
        };
        match name.trim() {
            "name" if found.replace(value).is_some() => return None,
            "name" | "filename" | "filename*" => {}
            _ => return None,
        }
        rest = behind.trim_start();
    }
    found.filter(|_| rest.is_empty())
}

fn closing_quote(quoted: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += memchr::memchr2(b'"', b'\\', quoted.as_bytes().get(at..)?)?;
        if quoted.as_bytes()[at] == b'"' {
            return Some(at);
        }
        at += 2;
    }
}

fn refused(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::BodyInvalid { param: None, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn form() -> Form {
        Form::announced("multipart/form-data; boundary=xyz").unwrap().expect("a form")
    }

    fn part(headers: &str, body: &str) -> String {
        format!("--xyz\r\nContent-Disposition: form-data; {headers}\r\n\r\n{body}\r\n")
    }

    fn read(text: &str) -> Result<Form, Error> {
        let mut form = form();
        form.read(text.as_bytes()).map(|()| form)
    }

    #[test]
    fn a_content_type_announces_a_form_or_none() {
        assert!(Form::announced("application/json").unwrap().is_none());
        assert!(Form::announced("Multipart/Form-Data; charset=utf-8; boundary=\"a b\"").unwrap().is_some());
        let long = format!("multipart/form-data; boundary={}", "x".repeat(71));
        for bad in [
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=a; boundary=b",
            &long,
        ] {
            assert!(Form::announced(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn model_and_n_are_found_behind_a_file() {
        let file = part("name=\"file\"; filename=\"a\\\"b.mp3\"\r\nContent-Type: audio/mpeg", "--xy\r\n-\r\n--xy");
        let text = format!("{file}{}{}--xyz--\r\n", part("name=\"model\"", "whisper-1"), part("name=n", "3"));
        let form = read(&text).unwrap();
        assert!(form.is_over());
        assert_eq!((form.fields().model.as_deref(), form.fields().n), (Some("whisper-1"), Some(3)));
        assert_eq!(&text[form.fields().model_at.clone().unwrap()], "whisper-1");
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let model = part("name=\"model\"", "cheap");
        for bad in [
            format!("{model}{model}"),
            format!("{model}{}", part("name=\"Model\"", "dear")),
            format!("{model}{}", part("name=\"model[]\"", "dear")),
            format!("{model}{}", part("name=\"mo%64el\"", "dear")),
            format!("{model}{}", part("name=\"x\"; name=\"model\"", "dear")),
            format!("{model}{}", part("name*=utf-8''model", "dear")),
            format!("{model}{}", part("name=\"mo\\del\"", "dear")),
            format!("{model}{}", part("name=\"x\"\r\nContent-Disposition: form-data; name=\"model\"", "dear")),
            format!("{model}{}", part("name=\"x\"\r\n y: z", "dear")),
            format!("{model}--xyzz\r\n\r\n"),
            format!("{model}--xyz\r\n\r\ndear\r\n"),
            part("name=\"model\"\r\nContent-Transfer-Encoding: base64", "Y2hlYXA="),
            part("name=\"model\"", ""),
            part("name=\"n\"", "0"),
            part("name=\"n\"", "+1"),
            part("name=\"n\"", "129"),
            part("name=\"model\"", &"m".repeat(300)),
            part(&format!("name=\"x\"\r\nx: {}", "h".repeat(5000)), ""),
            part("name=\"x\"", "").repeat(257),
            format!("a preamble\r\n{model}"),
            format!("\r\n{model}"),
            format!(
                "{model}--xyz\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx\n--xyz\nContent-Disposition: form-data; name=\"model\"\n\ndear\n"
            ),
        ] {
            assert!(read(&format!("{bad}--xyz--\r\n")).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_preamble_is_refused_however_it_is_cut_and_so_is_a_second_boundary() {
        let model = part("name=\"model\"", "cheap");
        let mut form = form();
        let text = format!("a preamble\r\n{model}--xyz--");
        assert!(text.bytes().any(|byte| form.read(&[byte]).is_err()));
        assert!(Form::announced("multipart/form-data; boundary=a; boundary*=utf-8''b").is_err());
        assert!(Form::announced("multipart/form-data; boundary*=utf-8''b").is_err());
    }

    #[test]
    fn an_empty_part_ends_at_its_delimiter() {
        let text = format!("{}{}--xyz--", part("name=\"prompt\"", ""), part("name=\"model\"", "m"));
        assert_eq!(read(&text).unwrap().fields().model.as_deref(), Some("m"));
    }

    proptest! {
        #[test]
        fn it_reads_the_same_however_it_is_cut(file in prop::collection::vec(prop::sample::select(b"\r\n-xyz a".to_vec()), 0..200), cuts in prop::collection::vec(1usize..40, 0..30)) {
            let mut text = Vec::new();
            text.extend_from_slice(b"--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n");
            text.extend_from_slice(&file);
            text.extend_from_slice(b"\r\n--xyz\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nm1\r\n--xyz--\r\n");
            let mut whole = form();
            let read = whole.read(&text);
            let (mut cut, mut at, mut result) = (form(), 0, Ok(()));
            for bytes in cuts.into_iter().chain(std::iter::repeat(7)) {
                let end = (at + bytes).min(text.len());
                result = result.and_then(|()| cut.read(&text[at..end]));
                at = end;
                if at == text.len() { break }
            }
            prop_assert_eq!(read.is_ok(), result.is_ok());
            if read.is_ok() {
                prop_assert_eq!(whole.fields(), cut.fields());
                prop_assert_eq!(whole.is_over(), cut.is_over());
                prop_assert!(cut.kept.len() < 100);
            }
        }
    }
}
