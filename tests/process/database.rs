//! TLS on the way to PostgreSQL.

use std::path::Path;

use super::{Gateway, command};
use crate::cluster::{self, Certificate, Cluster};

/// Opens the database once; what was said against it.
fn open(folder: &Path, url: &str, trusted: Option<&Path>) -> Result<(), String> {
    let mut command = command(folder);
    command.env("GPT_CAT_DATABASE_URL", url).args(["user", "list"]);
    if let Some(trusted) = trusted {
        command.env("SSL_CERT_FILE", trusted);
    }
    let output = command.output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

#[test]
fn postgresql_is_reached_over_tls_where_sslmode_asks_for_it_and_the_certificate_is_checked() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = Certificate { cert: made.cert.pem(), key: made.signing_key.serialize_pem() };
    let Some(cluster) = Cluster::start(Some(&certificate)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let trusted = folder.path().join("trusted.pem");
    std::fs::write(&trusted, &certificate.cert).unwrap();
    let by_address = cluster.database();
    let by_name = by_address.replace("127.0.0.1", "localhost");

    for mode in ["require", "verify-full"] {
        open(folder.path(), &format!("{by_name}?sslmode={mode}"), Some(&trusted)).unwrap();
        for (url, trusted) in [(&by_name, None), (&by_address, Some(&*trusted))] {
            let refused = open(folder.path(), &format!("{url}?sslmode={mode}"), trusted).unwrap_err();
            assert!(refused.contains("certificate"), "{mode}, {url}: {refused}");
        }
    }
    // Without `sslmode` TLS is used where the server offers it, and checked all the same.
    assert!(open(folder.path(), &by_name, None).unwrap_err().contains("certificate"));
    open(folder.path(), &format!("{by_name}?sslmode=disable"), None).unwrap();

    let gateway = Gateway::start(folder.path(), |command| {
        command.env("GPT_CAT_DATABASE_URL", format!("{by_name}?sslmode=verify-full")).env("SSL_CERT_FILE", &trusted);
    });
    let sql = "SELECT ssl, count(*) > 1 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
               WHERE application_name = 'gpt-cat' GROUP BY ssl";
    assert_eq!(cluster::run(&by_address, sql), "t|t", "all of its connections, and that which listens");
    drop(gateway);
}

#[test]
fn a_server_of_postgresql_without_tls_is_refused_where_sslmode_asks_for_it() {
    let Some(url) = cluster::database() else { return };
    let folder = tempfile::tempdir().unwrap();
    for mode in ["require", "verify-full"] {
        let refused = open(folder.path(), &format!("{url}?sslmode={mode}"), None).unwrap_err();
        assert!(refused.contains("TLS"), "{mode}: {refused}");
    }
    for mode in ["disable", "prefer"] {
        open(folder.path(), &format!("{url}?sslmode={mode}"), None).unwrap();
    }
}
