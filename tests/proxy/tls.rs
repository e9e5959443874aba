//! TLS for the tests: an authority that issues certificates, a client that
//! trusts it, and an upstream that has one.

use super::Target;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConnection, StreamOwned};
use std::convert::Infallible;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// An authority with its certificate, and those that it issues, as PEM files.
pub struct Authority {
    folder: TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

/// The files of a certificate and its key.
pub struct Identity {
    pub cert: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        // OpenSSL takes a certificate with its issuer's name for its own issuer.
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "authority");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.path().join("ca.pem"), certificate.pem()).unwrap();
        let issuer = rcgen::Issuer::new(params, key);
        Self { folder, issuer }
    }

    fn path(&self, file: &str) -> String {
        let path = self.folder.path().join(file);
        path.into_os_string().into_string().unwrap()
    }

    /// The file with its own certificate.
    pub fn file(&self) -> String {
        self.path("ca.pem")
    }

    /// A certificate for a host name or an address.
    pub fn issue(&self, name: &str) -> Identity {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let identity = Identity {
            cert: self.path(&format!("{name}.pem")),
            key: self.path(&format!("{name}.key")),
        };
        std::fs::write(&identity.cert, certificate.pem()).unwrap();
        std::fs::write(&identity.key, key.serialize_pem()).unwrap();
        identity
    }

    fn trust(&self, offered: &[&str]) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        let own = CertificateDer::from_pem_file(self.file()).unwrap();
        roots.add(own).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = offered
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        config
    }

    /// A connection to 127.0.0.1, for HTTP/1.1.
    #[track_caller]
    pub fn connect(&self, port: u16) -> StreamOwned<ClientConnection, TcpStream> {
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let connection = ClientConnection::new(Arc::new(self.trust(&[])), name).unwrap();
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        StreamOwned::new(connection, stream)
    }

    /// A GET over TLS to 127.0.0.1, in the HTTP version that is agreed on of
    /// those offered: that version, the status and the body.
    #[track_caller]
    pub fn get(
        &self,
        port: u16,
        offered: &[&str],
        target: &str,
        key: &str,
    ) -> (String, u16, String) {
        let config = self.trust(offered);
        let request = Request::get(format!("https://127.0.0.1:{port}{target}"))
            .header("authorization", format!("Bearer {key}"))
            .header("host", "front")
            .body(Empty::<Bytes>::new())
            .unwrap();
        runtime().block_on(async move {
            let stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .unwrap();
            let name = ServerName::try_from("127.0.0.1").unwrap();
            let stream = TlsConnector::from(Arc::new(config))
                .connect(name, stream)
                .await
                .unwrap();
            let agreed = stream.get_ref().1.alpn_protocol().unwrap_or_default();
            let agreed = String::from_utf8_lossy(agreed).into_owned();
            let stream = TokioIo::new(stream);
            let response = if agreed == "h2" {
                let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream);
                let (mut sender, connection) = handshake.await.unwrap();
                tokio::spawn(connection);
                sender.send_request(request).await.unwrap()
            } else {
                let handshake = hyper::client::conn::http1::handshake(stream);
                let (mut sender, connection) = handshake.await.unwrap();
                tokio::spawn(connection);
                sender.send_request(request).await.unwrap()
            };
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            (agreed, status, String::from_utf8_lossy(&body).into_owned())
        })
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

/// An upstream behind TLS, HTTP/2 and HTTP/1.1. It answers with the version that
/// a request came in, and with its credential.
pub struct TlsUpstream {
    pub port: u16,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TlsUpstream {
    pub fn start(identity: &Identity) -> Self {
        let chain = vec![CertificateDer::from_pem_file(&identity.cert).unwrap()];
        let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = serve(listener, acceptor) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            port,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

async fn serve(listener: tokio::net::TcpListener, acceptor: TlsAcceptor) {
    let answer = |request: Request<hyper::body::Incoming>| async move {
        let credential = request.headers().get("authorization");
        let credential = credential.map(|value| value.to_str().unwrap().to_owned());
        let text = format!("{:?} {}", request.version(), credential.unwrap_or_default());
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
    };
    while let Ok((stream, _)) = listener.accept().await {
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            // Clients that don't trust it leave here.
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let stream = TokioIo::new(stream);
            let _ = http.serve_connection(stream, service_fn(answer)).await;
        });
    }
}

impl Target for TlsUpstream {
    fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

impl Drop for TlsUpstream {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
