//! A request's headers for more than one try: the first takes them as they are,
//! any other has them made again.

use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::Extensions;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::future::pending;
use std::sync::{Mutex, PoisonError};

/// A request's headers, for one try after another.
pub struct Tries {
    /// The client's own, for the first one: to change them costs less than to copy them.
    first: Option<(HeaderMap, Extensions)>,
    /// What any other is made of.
    fields: Vec<(HeaderName, HeaderValue)>,
    case: Case,
}

/// Where the case of the names is known from.
enum Case {
    /// From the head as it came. Nothing else is taken from there: where requests come
    /// together, it may be of another one.
    Head(Vec<u8>),
    /// It is in here.
    Known(Extensions),
}

impl Tries {
    /// With the head as it came, where that is known.
    pub fn new(headers: HeaderMap, extensions: Extensions, head: Option<Vec<u8>>) -> Self {
        Self {
            case: head.map_or_else(|| Case::Known(extensions.clone()), Case::Head),
            first: Some((headers, extensions)),
            fields: Vec::new(),
        }
    }

    /// The headers for the next try, the same each time.
    pub fn next(&mut self) -> (HeaderMap, Extensions) {
        if let Some((headers, extensions)) = self.first.take() {
            let fields = headers.iter();
            self.fields = fields
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
            return (headers, extensions);
        }
        let mut headers = HeaderMap::with_capacity(self.fields.len());
        for (name, value) in &self.fields {
            headers.append(name.clone(), value.clone());
        }
        let extensions = match &self.case {
            Case::Head(head) => read_case(head),
            Case::Known(extensions) => extensions.clone(),
        };
        (headers, extensions)
    }
}

/// The case of a head's names, in the form that the library has for it. As that can't
/// be made by others, the library has to read the head once more.
fn read_case(head: &[u8]) -> Extensions {
    let found = Mutex::default();
    let service = service_fn(|request: Request<Incoming>| {
        *found.lock().unwrap_or_else(PoisonError::into_inner) = request.into_parts().0.extensions;
        pending::<Result<Response<String>, Infallible>>()
    });
    let io = TokioIo::new(tokio::io::join(head, tokio::io::sink()));
    let mut http = http1::Builder::new();
    let reading = http
        .preserve_header_case(true)
        .serve_connection(io, service);
    // It never comes to an end, but the head is there at once.
    let _ = reading.now_or_never();
    let mut extensions = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    extensions.remove::<OnUpgrade>();
    extensions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::tests::map;

    #[test]
    fn each_try_has_the_same_headers() {
        let headers = map(&[("x-one", "1"), ("cookie", "a"), ("x-one", "2"), ("te", "x")]);
        let mut extensions = Extensions::new();
        extensions.insert("the case of names");
        let mut tries = Tries::new(headers.clone(), extensions, None);
        for _ in 0..3 {
            let (next, extensions) = tries.next();
            assert_eq!(next, headers);
            assert!(next.iter().eq(headers.iter()), "the order");
            assert_eq!(extensions.get(), Some(&"the case of names"));
        }
    }

    #[test]
    fn a_head_says_nothing_but_the_case_of_names() {
        let headers = map(&[("host", "h"), ("x-one", "1"), ("content-length", "0")]);
        let other = "POST / HTTP/1.1\r\nHost: x\r\nX-ONE: 2\r\nContent-Length: 9\r\n\r\nbody";
        let cut = "-One: 2\r\nContent-Length: 9\r\n\r\n";
        for (head, is_read) in [(other, true), (cut, false)] {
            let mut tries = Tries::new(headers.clone(), Extensions::new(), Some(head.into()));
            for number in 0..3 {
                let (next, extensions) = tries.next();
                assert_eq!(next, headers);
                assert_eq!(extensions.is_empty(), number == 0 || !is_read, "{number}");
            }
        }
    }
}
