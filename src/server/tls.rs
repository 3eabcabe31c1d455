//! TLS for clients: the certificate from two files, read again when they change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A new certificate is in use this long after its files were written, at the latest.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The certificate in use.
#[derive(Clone)]
pub struct Certificate {
    acceptor: Arc<ArcSwap<ServerConfig>>,
    cert: PathBuf,
    key: PathBuf,
}

impl Certificate {
    /// Reads the files; `None` when neither exists.
    pub fn load(cert: &Path, key: &Path) -> io::Result<Option<Certificate>> {
        if !cert.exists() && !key.exists() {
            return Ok(None);
        }
        let acceptor = Arc::new(ArcSwap::new(read(cert, key)?));
        Ok(Some(Certificate { acceptor, cert: cert.to_owned(), key: key.to_owned() }))
    }

    /// Accepts with the certificate as it is now.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.acceptor.load_full())
    }

    /// Reads the files again whenever they change; what does not read is reported and changes nothing.
    pub async fn keep(self) {
        let mut seen = self.changed();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.changed();
            if now == seen {
                continue;
            }
            match read(&self.cert, &self.key) {
                Ok(config) => {
                    self.acceptor.store(config);
                    seen = now;
                    tracing::info!("certificate read again");
                }
                Err(error) => tracing::error!(%error, "the new certificate does not read; the old one stays"),
            }
        }
    }

    fn changed(&self) -> [Option<SystemTime>; 2] {
        [&self.cert, &self.key].map(|path| path.metadata().and_then(|file| file.modified()).ok())
    }
}

fn read(cert: &Path, key: &Path) -> io::Result<Arc<ServerConfig>> {
    let bad =
        |path: &Path, why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()));
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|error| bad(cert, error.to_string()))?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(cert, error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)
        .map_err(|error| bad(cert, error.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
