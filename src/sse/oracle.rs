//! WHATWG's rules over a whole stream at once, slow and plain, for tests and fuzzing to compare the parser with.

/// One event as it is dispatched; the type is empty where WHATWG says `message`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dispatched {
    pub name: Vec<u8>,
    pub data: Vec<u8>,
    pub id: Vec<u8>,
}

/// The events of a stream; what comes behind the last blank line is dropped.
pub fn events(stream: &[u8]) -> Vec<Dispatched> {
    let (mut events, mut name, mut data, mut id) = (vec![], vec![], vec![], vec![]);
    for line in lines(stream.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(stream)) {
        let colon = line.iter().position(|&byte| byte == b':').unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..colon] {
            b"" if line.is_empty() => {
                let name = std::mem::take(&mut name);
                if data.pop().is_some() {
                    events.push(Dispatched { name, data: std::mem::take(&mut data), id: id.clone() });
                }
            }
            b"event" => name = value.to_vec(),
            b"data" => data.extend([value, b"\n"].concat()),
            b"id" if !value.contains(&0) => id = value.to_vec(),
            _ => {}
        }
    }
    events
}

/// The lines that have an end: LF, CR LF or CR.
fn lines(mut stream: &[u8]) -> Vec<&[u8]> {
    let mut lines = vec![];
    while let Some(end) = stream.iter().position(|byte| b"\r\n".contains(byte)) {
        lines.push(&stream[..end]);
        let line_end = if stream[end..].starts_with(b"\r\n") { 2 } else { 1 };
        stream = &stream[end + line_end..];
    }
    lines
}
