//! Certificates and keys, read from PEM files and found to be of use.

use super::read;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::path::Path;

fn certificate_list(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(flag, path)?;
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let list = list.unwrap_or_default();
    if list.is_empty() {
        return Err(format!(
            "{flag} {} holds no PEM certificate",
            path.display()
        ));
    }
    Ok(list)
}

/// Certificate authorities: those of a file, or the system's.
fn roots(flag: &str, cacert: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = cacert {
        for certificate in certificate_list(flag, path)? {
            let added = roots.add(certificate);
            added.map_err(|error| format!("{flag} {}: {error}", path.display()))?;
        }
        return Ok(roots);
    }
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(format!(
            "this system has no CA certificates (Debian: ca-certificates); or give {flag}"
        ));
    }
    Ok(roots)
}

/// What a server is checked against.
pub(super) fn trust(flag: &str, cacert: Option<&Path>) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder().with_root_certificates(roots(flag, cacert)?);
    Ok(builder.with_no_client_auth())
}

/// The same, for a server that wants to know who its client is.
pub(super) fn trust_as(
    flag: &str,
    cacert: Option<&Path>,
    own: [(&str, &Path); 2],
) -> Result<ClientConfig, String> {
    let (chain, private) = pair(own)?;
    let builder = ClientConfig::builder().with_root_certificates(roots(flag, cacert)?);
    builder
        .with_client_auth_cert(chain, private)
        .map_err(|error| not_a_pair(own, &error))
}

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn pair([(cert_flag, cert), (key_flag, key)]: [(&str, &Path); 2]) -> Result<Pair, String> {
    let chain = certificate_list(cert_flag, cert)?;
    let private = PrivateKeyDer::from_pem_slice(&read(key_flag, key)?);
    let private =
        private.map_err(|_| format!("{key_flag} {} holds no PEM private key", key.display()))?;
    Ok((chain, private))
}

fn not_a_pair([(cert, _), (key, _)]: [(&str, &Path); 2], error: &rustls::Error) -> String {
    format!("{cert} and {key} don't go together: {error}")
}

/// TLS on --listen.
pub(super) fn identity(cert: &Path, key: &Path) -> Result<ServerConfig, String> {
    let own = [("--tls-cert", cert), ("--tls-key", key)];
    let (chain, private) = pair(own)?;
    let builder = ServerConfig::builder().with_no_client_auth();
    let mut config = builder
        .with_single_cert(chain, private)
        .map_err(|error| not_a_pair(own, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
