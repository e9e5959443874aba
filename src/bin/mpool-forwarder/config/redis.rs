//! Where Redis is: read from a URL and what is set beside it, and the way there,
//! through Sentinels where they know.

use super::{read, tls};
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{ClientTlsConfig, ConnectionAddr, IntoConnectionInfo, TlsCertificates, TlsMode};
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsConnector;

/// How to reach the Redis that has the pool.
pub struct RedisTarget {
    /// Those who know where the primary is; without them it is at the address.
    sentinel: Option<Box<SentinelClient>>,
    address: (String, u16),
    pub tls: Option<TlsConnector>,
    /// The AUTH command.
    pub login: Option<Vec<String>>,
}

impl RedisTarget {
    /// Where the primary is now.
    ///
    /// # Errors
    /// Why nobody can tell.
    pub async fn address(&mut self) -> Result<(String, u16), &'static str> {
        let Some(sentinel) = &mut self.sentinel else {
            return Ok(self.address.clone());
        };
        match sentinel.async_get_client().await {
            Ok(client) => host_and_port(client.get_connection_info().addr())
                .ok_or("the Sentinels name no address"),
            Err(error) if error.kind() == redis::ErrorKind::MasterNameNotFoundBySentinel => {
                Err("the Sentinels don't know this name, or no server that is up")
            }
            Err(error) if error.is_connection_refusal() => {
                Err("no Sentinel, or not the primary that they name, listens there")
            }
            Err(_) => Err("the Sentinels can't be asked"),
        }
    }
}

fn host_and_port(address: &ConnectionAddr) -> Option<(String, u16)> {
    match address {
        ConnectionAddr::Tcp(host, port) => Some((host.clone(), *port)),
        ConnectionAddr::TcpTls { host, port, .. } => Some((host.clone(), *port)),
        _ => None,
    }
}

/// Where Redis is, ready to make a client from.
#[derive(Clone)]
pub struct RedisSettings {
    addresses: Vec<ConnectionAddr>,
    sentinel: Option<SentinelSettings>,
    certificates: Option<TlsCertificates>,
    tls: Option<rustls::ClientConfig>,
    user: Option<String>,
    password: Option<String>,
}

#[derive(Clone)]
struct SentinelSettings {
    master: String,
    user: Option<String>,
    password: Option<String>,
}

/// What the environment and flags say beside the URL.
pub struct Beside<'a> {
    pub user: Option<String>,
    pub password: Option<String>,
    pub sentinel_user: Option<String>,
    pub sentinel_password: Option<String>,
    pub cacert: Option<&'a Path>,
    /// Client certificate and its key.
    pub identity: Option<(&'a Path, &'a Path)>,
}

const REDIS_FORMS: &str = "--redis must be redis://[user:password@]host:port, rediss:// for TLS, \
                           or redis+sentinel://host:26379,host:26379/master-name";

impl RedisSettings {
    /// # Errors
    /// What is wrong with it. A URL may hold a password, so no error repeats
    /// any of it.
    pub fn read(url: &str, beside: Beside<'_>) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or(REDIS_FORMS)?;
        let (tls, through_sentinel) = match scheme {
            "redis" => (false, false),
            "rediss" => (true, false),
            "redis+sentinel" => (false, true),
            "rediss+sentinel" => (true, true),
            _ => return Err(REDIS_FORMS.into()),
        };
        if !tls && (beside.cacert.is_some() || beside.identity.is_some()) {
            return Err(
                "--redis-cacert, --redis-cert and --redis-key need a --redis with rediss://".into(),
            );
        }
        let parse = |url: &str| {
            url.into_connection_info()
                .map_err(|_| REDIS_FORMS.to_owned())
        };
        let scheme = if tls { "rediss" } else { "redis" };
        let (user_part, rest) = rest.rsplit_once('@').unwrap_or(("", rest));
        let at = if user_part.is_empty() { "" } else { "@" };
        let (hosts, master) = match rest.split_once('/') {
            Some((hosts, master))
                if through_sentinel && !master.is_empty() && !master.contains('/') =>
            {
                (hosts, Some(master.to_owned()))
            }
            _ if through_sentinel => return Err(REDIS_FORMS.into()),
            _ => (rest, None),
        };
        let infos = if through_sentinel {
            let hosts = hosts.split(',').map(|host| {
                if host.contains(':') {
                    host.to_owned()
                } else {
                    format!("{host}:26379")
                }
            });
            hosts
                .map(|host| parse(&format!("{scheme}://{user_part}{at}{host}")))
                .collect::<Result<Vec<_>, _>>()?
        } else {
            vec![parse(url)?]
        };
        let first = infos.first().ok_or(REDIS_FORMS)?;
        if first.redis_settings().db() != 0 {
            return Err("--redis must not name a database: the pool is in database 0".into());
        }
        let user = first
            .redis_settings()
            .username()
            .map(str::to_owned)
            .or(beside.user);
        let password = first
            .redis_settings()
            .password()
            .map(str::to_owned)
            .or(beside.password);
        if user.is_some() && password.is_none() {
            return Err("a user of Redis needs a password: set MPOOL_REDIS_PASSWORD".into());
        }
        let own = beside
            .identity
            .map(|(cert, key)| [("--redis-cert", cert), ("--redis-key", key)]);
        let trusted = || match own {
            None => tls::trust("--redis-cacert", beside.cacert),
            Some(own) => tls::trust_as("--redis-cacert", beside.cacert, own),
        };
        let settings = Self {
            addresses: infos.iter().map(|info| info.addr().clone()).collect(),
            sentinel: master.map(|master| SentinelSettings {
                master,
                user: beside.sentinel_user,
                password: beside.sentinel_password,
            }),
            tls: tls.then(trusted).transpose()?,
            certificates: certificates(beside.cacert, beside.identity)?,
            user,
            password,
        };
        settings.target()?;
        Ok(settings)
    }

    /// The way there; nothing is connected to yet.
    ///
    /// # Errors
    /// When the Sentinels' client can't be made.
    pub fn target(&self) -> Result<RedisTarget, String> {
        let sentinel = self
            .sentinel
            .as_ref()
            .map(|sentinel| self.through(sentinel))
            .transpose()?;
        let login = self.password.as_ref().map(|password| {
            let words = [Some("AUTH"), self.user.as_deref(), Some(password)];
            words.into_iter().flatten().map(str::to_owned).collect()
        });
        Ok(RedisTarget {
            sentinel: sentinel.map(Box::new),
            address: self
                .addresses
                .first()
                .and_then(host_and_port)
                .ok_or(REDIS_FORMS)?,
            tls: self
                .tls
                .clone()
                .map(|config| TlsConnector::from(Arc::new(config))),
            login,
        })
    }

    fn through(&self, sentinel: &SentinelSettings) -> Result<SentinelClient, String> {
        let made = |error| format!("--redis: {error}");
        let mut builder = SentinelClientBuilder::new(
            self.addresses.clone(),
            &sentinel.master,
            SentinelServerType::Master,
        )
        .map_err(made)?;
        if self.tls.is_some() {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_tls_mode(TlsMode::Secure);
        }
        if let Some(certificates) = &self.certificates {
            builder = builder
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates.clone());
        }
        if let Some(user) = &self.user {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = &self.password {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(user) = &sentinel.user {
            builder = builder.set_client_to_sentinel_username(user);
        }
        if let Some(password) = &sentinel.password {
            builder = builder.set_client_to_sentinel_password(password);
        }
        builder.build().map_err(made)
    }

    /// Where it is, for a person, without user or password.
    pub fn shown(&self) -> String {
        let hosts: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        match &self.sentinel {
            None => hosts.join(","),
            Some(sentinel) => format!("{} (Sentinels of {})", hosts.join(","), sentinel.master),
        }
    }
}

/// The certificates as the Sentinels' client takes them.
fn certificates(
    cacert: Option<&Path>,
    identity: Option<(&Path, &Path)>,
) -> Result<Option<TlsCertificates>, String> {
    let client_tls = match identity {
        Some((cert, key)) => Some(ClientTlsConfig {
            client_cert: read("--redis-cert", cert)?,
            client_key: read("--redis-key", key)?,
        }),
        None => None,
    };
    let root_cert = cacert
        .map(|path| read("--redis-cacert", path))
        .transpose()?;
    let any = client_tls.is_some() || root_cert.is_some();
    Ok(any.then_some(TlsCertificates {
        client_tls,
        root_cert,
    }))
}
