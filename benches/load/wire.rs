//! Just enough HTTP/1.1 to send a request and to check its whole answer, at a fraction of the cost of what is measured.

use std::io;
use std::net::SocketAddr;

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest head that either end of the bench sends, with room for what a proxy adds.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// One end of a connection, with what was read from it and not yet used.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    used: usize,
}

/// The first line of a message and how long its body is.
pub struct Head {
    pub first: String,
    pub body: Length,
}

/// How a body's end is found.
#[derive(Clone, Copy)]
pub enum Length {
    Bytes(usize),
    Chunked,
}

impl Connection {
    /// Connects to a server.
    pub async fn open(address: SocketAddr) -> io::Result<Connection> {
        Connection::over(TcpStream::connect(address).await?)
    }

    /// Takes over an accepted socket.
    pub fn over(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        Ok(Connection { stream, buffer: Vec::with_capacity(HEAD_BYTES_MAX), used: 0 })
    }

    /// Writes all of `bytes`: one system call while the socket has room.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Reads a message's head; `None` when the other end closed before the first byte of one.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(end) = memmem::find(self.unused(), b"\r\n\r\n") {
                let head = parse(&self.unused()[..end])?;
                self.used += end + 4;
                return Ok(Some(head));
            }
            if self.unused().len() > HEAD_BYTES_MAX {
                return Err(invalid("a head without an end"));
            }
            if self.fill().await? == 0 {
                return if self.unused().is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Reads a whole body, chunked or not, onto the end of `body`.
    pub async fn body(&mut self, length: Length, body: &mut Vec<u8>) -> io::Result<()> {
        match length {
            Length::Bytes(bytes) => self.exactly(bytes, body).await,
            Length::Chunked => {
                while self.chunk(body).await? {}
                Ok(())
            }
        }
    }

    /// Reads one chunk of a chunked body onto the end of `body`; false when it was the last, empty one.
    pub async fn chunk(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        let size = loop {
            if let Some(end) = memmem::find(self.unused(), b"\r\n") {
                let digits = std::str::from_utf8(&self.unused()[..end]).map_err(|_| invalid("a chunk's size"))?;
                let size = usize::from_str_radix(digits.trim(), 16).map_err(|_| invalid("a chunk's size"))?;
                self.used += end + 2;
                break size;
            }
            self.fill_or_fail().await?;
        };
        self.exactly(size, body).await?;
        while self.unused().len() < 2 {
            self.fill_or_fail().await?;
        }
        self.used += 2;
        Ok(size > 0)
    }

    async fn exactly(&mut self, bytes: usize, body: &mut Vec<u8>) -> io::Result<()> {
        let mut missing = bytes;
        while missing > 0 {
            if self.unused().is_empty() {
                self.fill_or_fail().await?;
            }
            let taken = missing.min(self.unused().len());
            body.extend_from_slice(&self.unused()[..taken]);
            self.used += taken;
            missing -= taken;
        }
        Ok(())
    }

    fn unused(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    async fn fill_or_fail(&mut self) -> io::Result<()> {
        if self.fill().await? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        if self.used == self.buffer.len() {
            self.buffer.clear();
        } else {
            self.buffer.drain(..self.used);
        }
        self.used = 0;
        self.buffer.reserve(HEAD_BYTES_MAX);
        self.stream.read_buf(&mut self.buffer).await
    }
}

fn parse(head: &[u8]) -> io::Result<Head> {
    let text = std::str::from_utf8(head).map_err(|_| invalid("a head that is not text"))?;
    let (first, fields) = text.split_once("\r\n").unwrap_or((text, ""));
    let mut body = Length::Bytes(0);
    for (name, value) in fields.split("\r\n").filter_map(|field| field.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            body = Length::Bytes(value.trim().parse().map_err(|_| invalid("a content-length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            body = Length::Chunked;
        }
    }
    Ok(Head { first: first.to_owned(), body })
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
