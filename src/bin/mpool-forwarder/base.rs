//! The upstream's base URL, and what becomes of a client's target behind it. Pure.

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::uri::{Authority, Parts, PathAndQuery, Scheme};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// The upstream's base URL.
#[derive(Clone, Debug)]
pub struct Base {
    scheme: Scheme,
    authority: Authority,
    /// Comes before each request's path; empty or without a slash at its end.
    prefix: String,
    /// The `Host` of requests.
    pub host: HeaderValue,
}

impl FromStr for Base {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let form = "--upstream must be http://host[:port][/path] or https://host[:port][/path]";
        let parts = url.parse::<Uri>().map_err(|_| form)?.into_parts();
        let scheme = parts
            .scheme
            .filter(|s| *s == Scheme::HTTP || *s == Scheme::HTTPS)
            .ok_or(form)?;
        let authority = parts
            .authority
            .filter(|authority| !authority.host().is_empty())
            .ok_or(form)?;
        if authority.as_str().contains('@') {
            return Err(
                "--upstream must not hold a user or password: credentials are the accounts'".into(),
            );
        }
        let host = authority.host();
        let given = authority.as_str().strip_prefix(host).unwrap_or_default();
        if !given.is_empty() && authority.port_u16().is_none_or(|port| port == 0) {
            return Err("the port in --upstream must be from 1 to 65535".into());
        }
        let path = parts
            .path_and_query
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        if path.query().is_some() || url.contains('#') {
            return Err(format!("{form}, without a query"));
        }
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| form)?;
        let prefix = path.path().trim_end_matches('/').to_owned();
        Ok(Self {
            scheme,
            authority,
            prefix,
            host,
        })
    }
}

impl std::fmt::Display for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.prefix)
    }
}

impl Base {
    /// The same in memory of its own, for one thread ([`crate::metrics`] says why): each request
    /// counts itself among those who use it.
    pub fn apart(&self) -> Self {
        self.to_string().parse().unwrap_or_else(|_| self.clone())
    }

    /// Where to connect to.
    pub fn origin(&self) -> Uri {
        self.join(&Uri::default(), true).unwrap_or_default()
    }

    /// Whether this is certainly what listens at `address` on this machine.
    pub fn is_at(&self, address: SocketAddr) -> bool {
        let host = self.authority.host();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let ip: Option<IpAddr> = match host {
            "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
            host => host.parse().ok(),
        };
        let port = if self.is_tls() { 443 } else { 80 };
        let port = self.authority.port_u16().unwrap_or(port);
        let listening = address.ip();
        port == address.port()
            && ip
                .is_some_and(|ip| ip == listening || listening.is_unspecified() && ip.is_loopback())
    }

    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// What to ask the upstream for when a client asks for this: over HTTP/2 a
    /// whole URL, over HTTP/1 its path and query. Nothing for a target that
    /// can't be forwarded.
    pub fn join(&self, asked: &Uri, whole: bool) -> Option<Uri> {
        // Of `http://host#part` the library leaves an empty path, which would be
        // sent as nothing at all.
        let path = asked
            .path_and_query()
            .filter(|path| path.as_str() != "/")
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        let path = if self.prefix.is_empty() {
            path
        } else if path.as_str() == "*" {
            PathAndQuery::try_from(self.prefix.as_str()).ok()?
        } else {
            PathAndQuery::try_from(format!("{}{path}", self.prefix)).ok()?
        };
        let mut parts = Parts::default();
        if whole {
            parts.scheme = Some(self.scheme.clone());
            parts.authority = Some(self.authority.clone());
        }
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_keeps_every_byte_behind_the_base() {
        let cases = [
            (
                "http://h",
                "/a//b/../c%2F%zz?x=%20&y=[]{}|",
                "http://h/a//b/../c%2F%zz?x=%20&y=[]{}|",
            ),
            ("https://h:8443/", "/v1/m", "https://h:8443/v1/m"),
            ("http://h/api/", "/v1?q", "http://h/api/v1?q"),
            ("http://h/api", "http://elsewhere/v1", "http://h/api/v1"),
            ("http://[::1]:80", "/", "http://[::1]:80/"),
        ];
        for (base, asked, expected) in cases {
            let base: Base = base.parse().unwrap();
            let joined = base.join(&asked.parse().unwrap(), true).unwrap();
            assert_eq!(joined.to_string(), expected);
        }
        let base: Base = "http://h/api".parse().unwrap();
        assert_eq!(
            base.join(&"/v1?q".parse().unwrap(), false).unwrap(),
            "/api/v1?q"
        );
        assert_eq!(base.host, "h");
        let base: Base = "http://h".parse().unwrap();
        assert_eq!(base.join(&"*".parse().unwrap(), false).unwrap().path(), "*");
    }

    #[test]
    fn a_target_is_never_empty() {
        for asked in ["http://h", "http://h#part", "http://h?", "/", "/#part"] {
            for (base, whole, expected) in [
                ("http://up", false, "/"),
                ("http://up", true, "http://up/"),
                ("http://up/api", false, "/api/"),
            ] {
                let base: Base = base.parse().unwrap();
                let joined = base.join(&asked.parse().unwrap(), whole).unwrap();
                let joined = joined.to_string();
                assert_eq!(joined.trim_end_matches('?'), expected, "{asked}");
            }
        }
    }

    #[test]
    fn a_base_that_can_not_be_meant_is_refused() {
        for bad in [
            "",
            "h",
            "h:80",
            "/v1",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://h/?q=1",
            "http://h/#f",
            "http://h:99999",
            "http://h:0",
            "http://h:",
            "http://[::1]:70000",
        ] {
            assert!(bad.parse::<Base>().is_err(), "{bad}");
        }
    }
}
