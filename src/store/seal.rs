//! Seals upstream keys with the master key, so that a copy of the database alone gives none of them away.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use chacha20poly1305::aead::Aead;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Nonce};

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;

/// The key that seals; ChaCha20-Poly1305 (RFC 8439) with a random nonce a seal.
pub struct MasterKey(ChaCha20Poly1305);

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey(***)")
    }
}

/// Why there is no master key, or why it opens nothing.
#[derive(Debug)]
pub enum SealError {
    /// `GPT_CAT_MASTER_KEY` is not 64 hexadecimal digits.
    NotHex,
    /// The key file cannot be read or made.
    File(String, io::Error),
    /// Sealed with another master key, or damaged.
    WrongKey,
}

impl std::fmt::Display for SealError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SealError::NotHex => f.write_str("the master key must be 64 hexadecimal digits (openssl rand -hex 32)"),
            SealError::File(path, error) => write!(f, "master key file {path}: {error}"),
            SealError::WrongKey => f.write_str("sealed with another master key, or damaged"),
        }
    }
}

impl std::error::Error for SealError {}

impl MasterKey {
    /// Takes the key from `given` (`GPT_CAT_MASTER_KEY`), else from `file`, which is made (mode 0600) when absent.
    pub fn load(given: Option<&str>, file: &Path) -> Result<MasterKey, SealError> {
        let hex = match given {
            Some(hex) => hex.to_owned(),
            None => read_or_make(file).map_err(|error| SealError::File(file.display().to_string(), error))?,
        };
        let key: [u8; KEY_BYTES] = unhex(hex.trim()).ok_or(SealError::NotHex)?;
        Ok(MasterKey(ChaCha20Poly1305::new(&key.into())))
    }

    /// Nonce, then ciphertext and tag.
    pub fn seal(&self, secret: &str) -> Vec<u8> {
        let nonce: [u8; NONCE_BYTES] = random();
        let sealed = self.0.encrypt(&Nonce::from(nonce), secret.as_bytes()).expect("a key is far below 256 GiB");
        [&nonce[..], &sealed].concat()
    }

    /// Undoes [`MasterKey::seal`].
    pub fn open(&self, sealed: &[u8]) -> Result<String, SealError> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE_BYTES).ok_or(SealError::WrongKey)?;
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().map_err(|_| SealError::WrongKey)?;
        let secret = self.0.decrypt(&Nonce::from(nonce), sealed).map_err(|_| SealError::WrongKey)?;
        String::from_utf8(secret).map_err(|_| SealError::WrongKey)
    }
}

/// Random bytes from the operating system.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[digit as usize]))
        .collect()
}

fn read_or_make(file: &Path) -> io::Result<String> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(file) {
        Ok(mut made) => {
            let hex = hex(&random::<KEY_BYTES>());
            made.write_all(hex.as_bytes())?;
            made.sync_all()?;
            Ok(hex)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut hex = String::new();
            // A bound, so that a wrong path cannot fill memory.
            File::open(file)?.take(1024).read_to_string(&mut hex)?;
            Ok(hex)
        }
        Err(error) => Err(error),
    }
}

/// Undoes [`hex()`]; `None` when there are not exactly so many digits.
pub fn unhex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let digits: Vec<u8> =
        hex.chars().map(|digit| digit.to_digit(16).map(|value| value as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    if digits.len().is_multiple_of(2) { bytes.try_into().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_the_same_key_only() {
        let folder = tempfile::tempdir().unwrap();
        let key = MasterKey::load(None, &folder.path().join("master.key")).unwrap();
        let again = MasterKey::load(None, &folder.path().join("master.key")).unwrap();
        let other = MasterKey::load(Some(&hex(&random::<32>())), Path::new("")).unwrap();
        let sealed = key.seal("sk-upstream");
        assert_eq!(again.open(&sealed).unwrap(), "sk-upstream");
        assert!(matches!(other.open(&sealed), Err(SealError::WrongKey)));
        assert!(matches!(key.open(&sealed[..5]), Err(SealError::WrongKey)));
        assert!(!sealed.windows(8).any(|window| window == b"upstream"));
    }

    #[test]
    fn a_master_key_that_is_no_key_is_refused() {
        assert!(matches!(MasterKey::load(Some("hunter2"), Path::new("")), Err(SealError::NotHex)));
        assert!(matches!(MasterKey::load(Some(&"0".repeat(63)), Path::new("")), Err(SealError::NotHex)));
    }
}
