//! The way of a request: whose it is, which account it gets, up to the upstream
//! and back; and once more on another account when the first one is refused.

use crate::accounts::{Account, DOUBT};
use crate::answers::Code;
use crate::base::Base;
use crate::client_io::{Active, Exchange, Turn};
use crate::config::Limits;
use crate::headers::{self, GivenKey, Names, Overview};
use crate::known::{Asking, Look};
use crate::lender::{self, Denied, Grant, Lender, State};
use crate::metrics::Tally;
use crate::relay::{Bounds, Relay, Reply};
use crate::report::{Report, log_lease};
use crate::tries::Tries;
use crate::upload::{self, Fault, Rules, Upload, UploadBody};
use crate::upstream::{Download, SendError, Upstream};
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, EXPECT, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Tries to find a connection that is open.
const MOST_UNSENT: usize = 8;

/// What one thread needs to serve requests.
pub struct Proxy {
    pub base: Base,
    pub upstream: Upstream,
    pub lender: Lender,
    pub tally: Arc<Tally>,
    pub limits: Limits,
    pub uploads: Rules,
    pub stream_timeout: Duration,
    pub send_timeout: Duration,
    pub cooldown: Duration,
    pub began: Instant,
    /// When the log last said that there is no account, in ms.
    pub complained_at: AtomicU64,
}

/// A request that is ready for any account.
struct Order {
    method: Method,
    target: Uri,
    /// Of the headers as the client sent them.
    overview: Overview,
    takes_trailers: bool,
    upload: Upload,
    key: Box<str>,
    expects_continue: bool,
    /// How the client asked.
    over_http2: bool,
}

/// Whose a request is, and what it got at what time.
struct Admitted {
    grant: Grant,
    key: Box<str>,
    at: Instant,
}

/// An answer of the forwarder's own.
#[derive(Clone, Copy)]
struct Own {
    code: Code,
    retry_after: Option<u64>,
}

impl From<Code> for Own {
    fn from(code: Code) -> Self {
        Self {
            code,
            retry_after: code.retry_after(),
        }
    }
}

impl From<Denied> for Own {
    fn from(denied: Denied) -> Self {
        Self {
            code: denied.code,
            retry_after: denied.retry_after,
        }
    }
}

impl Proxy {
    /// Answers a request. Dropping the future drops the upstream's part too.
    ///
    /// No async fn, here and in `forward`: it would keep room for its arguments
    /// beside what becomes of them.
    pub fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
        exchange: Arc<Exchange>,
    ) -> impl Future<Output = Response<Reply>> + Send {
        let may_have_length = exchange.take_may_have_length();
        let head = exchange.take_head();
        let active = exchange.begin();
        let (parts, body) = request.into_parts();
        let over_http2 = parts.version == Version::HTTP_2;
        let mut report = Report::begin(&self.tally, &parts.method, &parts.uri);
        let overview = Overview::of(&parts.headers);
        let plain = headers::framing_is_plain(&parts.headers, &overview);
        // RFC 9112 section 6.1: where a length came with a coding, nothing that
        // follows on the connection is to be trusted.
        let mut last = !plain || may_have_length && overview.has(Names::TRANSFER_ENCODING);
        async move {
            let most = self.limits.connections;
            let admitted = if self.tally.is_crowded(most, over_http2) {
                // One connection of HTTP/2 may carry many.
                Err(Code::Connections.into())
            } else if plain {
                self.admit(&parts, &overview, &body, &mut report).await
            } else {
                Err(Code::BadRequest.into())
            };
            let mut response = match admitted {
                Ok(admitted) => {
                    let request = (parts, overview, head, body);
                    self.forward(request, admitted, report, active, &exchange)
                        .await
                }
                Err(own) => {
                    // A client that waits for leave to send its body will not send it,
                    // nor can it be told whether it does.
                    if overview.has(Names::EXPECT) {
                        last |= !over_http2 && !body.is_end_stream();
                    } else {
                        upload::discard(body, Some(exchange.hold()));
                    }
                    let turn = over_http2.then(|| Turn::begin(&exchange));
                    answer(own, report, active, turn)
                }
            };
            if last {
                response
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    }

    /// What can be said before any of the body has been read.
    async fn admit(
        &self,
        parts: &Parts,
        overview: &Overview,
        body: &Incoming,
        report: &mut Report,
    ) -> Result<Admitted, Own> {
        let target = parts
            .uri
            .path_and_query()
            .map_or(0, |target| target.as_str().len());
        if target + 16 + overview.size > self.limits.header {
            return Err(Code::HeadersTooLarge.into());
        }
        // RFC 9110 section 9.3.8: TRACE would show the credential to the client.
        if matches!(parts.method, Method::CONNECT | Method::TRACE) {
            return Err(Code::Unsupported.into());
        }
        // `GET host` is CONNECT's form of a target.
        if parts.uri.authority().is_some() && parts.uri.scheme().is_none() {
            return Err(Code::BadRequest.into());
        }
        let key = match headers::client_key(&parts.headers, overview) {
            GivenKey::One(key) => key,
            GivenKey::None => return Err(Code::NoKeyGiven.into()),
            GivenKey::Two => return Err(Code::TwoKeys.into()),
        };
        report.key(key);
        if body.size_hint().lower() > self.limits.body {
            return Err(Code::BodyTooLarge.into());
        }
        let key: Box<str> = lender::client_key(key).ok_or(Code::NoKey)?.into();
        // The clock is not read for a look: it takes no time.
        let mut at = report.started();
        let found = match self.lender.look(&key, at) {
            Look::Lease(grant) => Ok(grant),
            Look::Ask(asking) => Err(asking),
            Look::Behind(behind) => {
                let found = self.lender.look_again(&key, behind).await;
                at = Instant::now();
                found
            }
        };
        let (grant, at) = match found {
            Ok(grant) => {
                self.tally.known();
                log_lease(&grant);
                (grant, at)
            }
            Err(asking) => {
                let grant = self.acquire(&key, asking, at).await?;
                (grant, Instant::now())
            }
        };
        Ok(Admitted { grant, key, at })
    }

    /// The account for a key, as Redis has it now.
    async fn ask(&self, key: &str) -> Result<Grant, Own> {
        self.lender.forget(key);
        self.acquire(key, Asking::Once, Instant::now()).await
    }

    async fn acquire(&self, key: &str, asking: Asking, asked: Instant) -> Result<Grant, Own> {
        let outcome = self.lender.acquire(key, asking).await;
        self.tally.acquire(asked.elapsed());
        match outcome {
            Ok(grant) => {
                if grant.state == State::Grace {
                    self.tally.all.grace.inc();
                }
                log_lease(&grant);
                Ok(grant)
            }
            Err(denied) => {
                if denied.retry_after.is_some() && self.may_complain() {
                    tracing::warn!(
                        event = "denied",
                        code = denied.code.name(),
                        "No account: {} ({})",
                        denied.why,
                        denied.code.name()
                    );
                }
                Err(denied.into())
            }
        }
    }

    fn forward<'a>(
        &'a self,
        (parts, overview, head, body): (Parts, Overview, Option<Vec<u8>>, Incoming),
        Admitted { grant, key, at }: Admitted,
        mut report: Report,
        active: Active,
        exchange: &'a Arc<Exchange>,
    ) -> impl Future<Output = Response<Reply>> + Send + use<'a> {
        report.granted(&grant);
        let (mut headers, mut extensions) = (parts.headers, parts.extensions);
        let expects_continue = overview.has(Names::EXPECT) && expects_continue(&headers);
        if overview.has(Names::OTHER_HOP_BY_HOP) {
            extensions.remove::<hyper::upgrade::OnUpgrade>();
        }
        let order = Order {
            method: parts.method,
            target: parts.uri,
            takes_trailers: headers::prepare(&mut headers, &overview),
            overview,
            upload: Upload::new(body, &self.uploads, exchange),
            key,
            expects_continue,
            over_http2: parts.version == Version::HTTP_2,
        };
        let mut tries = Tries::new(headers, extensions, head);
        report.upload(&order.upload);
        async move {
            let outcome = self
                .exchange(&order, &mut tries, grant, at, &mut report)
                .await;
            let turn = order.over_http2.then(|| Turn::begin(exchange));
            let withheld = order.expects_continue && order.upload.is_withheld();
            let mut response = match outcome {
                Ok(response) => self.relay(response, &order, report, active, turn),
                Err(own) => answer(own, report, active, turn),
            };
            if withheld && !order.over_http2 {
                // As the body may come or not, the connection ends here.
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
            response
        }
    }

    fn relay(
        &self,
        response: Response<Download>,
        order: &Order,
        mut report: Report,
        active: Active,
        turn: Option<Turn>,
    ) -> Response<Reply> {
        order.upload.forget();
        report.answered(response.status().as_u16(), response.body().headed());
        let (mut parts, body) = response.into_parts();
        parts.version = Version::HTTP_11;
        let bounds = Bounds {
            silence: self.stream_timeout,
            untaken: order.over_http2.then_some(self.send_timeout),
        };
        let relay = Relay::new(body, report, bounds);
        Response::from_parts(parts, Reply::upstream(relay, active, turn))
    }

    /// Sends the request; once more on another account where the first is
    /// refused, and once more where the connection to the upstream was of no use.
    async fn exchange(
        &self,
        order: &Order,
        tries: &mut Tries,
        grant: Grant,
        at: Instant,
        report: &mut Report,
    ) -> Result<Response<Download>, Own> {
        match self.attempt(order, tries, &grant, at).await {
            Outcome::Answered(response) => Ok(response),
            // Seldom, so boxed: its room would be carried from step to step.
            outcome => {
                let again = self.exchange_again(order, tries, grant, at, report, outcome);
                Box::pin(again).await
            }
        }
    }

    /// The same after a first try that has not brought an answer.
    async fn exchange_again(
        &self,
        order: &Order,
        tries: &mut Tries,
        mut grant: Grant,
        mut at: Instant,
        report: &mut Report,
        mut outcome: Outcome,
    ) -> Result<Response<Download>, Own> {
        let mut tried = Tried::default();
        loop {
            let account = Arc::clone(&grant.lease.account);
            match outcome {
                Outcome::Answered(response) => {
                    if let Some(charge) = tried.charge {
                        charge.prove(self.who(order));
                    }
                    return Ok(response);
                }
                Outcome::Unfit => return Err(Code::Upstream.into()),
                Outcome::Refused(response) => {
                    self.tally.all.upstream_error(&account.name, "401");
                    if tried.another_account {
                        self.refused_by_two(order, &account, tried.charge);
                        return Ok(response);
                    }
                    match Box::pin(self.replace(order, &grant, self.ms(at))).await {
                        Replacement::Grant(next, charge) => {
                            tried.another_account = true;
                            tried.charge = charge;
                            grant = next;
                        }
                        Replacement::None(own) => return Err(own),
                        Replacement::Innocent => return Ok(response),
                    }
                    upload::discard(response.into_body(), None);
                    if let Some(fault) = order.upload.fault() {
                        return Err(of_fault(fault).into());
                    }
                    if !order.upload.in_hand() {
                        if let Some(charge) = tried.charge {
                            self.leave_unproved(order, charge);
                        }
                        return Err(Code::Account.into());
                    }
                    self.tally.all.failovers.inc();
                }
                Outcome::Failed(SendError::Upload(fault)) => return Err(of_fault(fault).into()),
                Outcome::Failed(SendError::Target) => return Err(Code::BadRequest.into()),
                Outcome::Failed(error) => {
                    self.tally.all.upstream_error(&account.name, error.name());
                    let failed = self.connection_failed(order, &grant, error);
                    let cooled = Box::pin(failed).await;
                    // Only what had no effect, or may be sent twice (RFC 9110 section 9.2.2).
                    let may_repeat = match error {
                        SendError::Connect | SendError::Unprocessed => true,
                        SendError::Broke => order.method.is_idempotent(),
                        _ => false,
                    };
                    if tried.another_connection || !may_repeat || !order.upload.in_hand() {
                        return Err(match error {
                            SendError::Timeout | SendError::ConnectTimeout => {
                                Code::UpstreamTimeout.into()
                            }
                            _ => Code::Upstream.into(),
                        });
                    }
                    tried.another_connection = true;
                    if cooled {
                        grant = Box::pin(self.ask(&order.key)).await?;
                    }
                }
            }
            report.granted(&grant);
            at = Instant::now();
            outcome = self.attempt(order, tries, &grant, at).await;
        }
    }

    /// Sends the request once, now, that is `at`.
    async fn attempt(
        &self,
        order: &Order,
        tries: &mut Tries,
        grant: &Grant,
        at: Instant,
    ) -> Outcome {
        let mut response = match self.send(order, tries, grant, at).await {
            Ok(response) => response,
            Err(error) => return Outcome::Failed(error),
        };
        let plain = headers::prepare_answer(response.headers_mut());
        match response.status() {
            // No upgrade was asked for, nor a coding that would be lost on the way.
            _ if !plain => Outcome::Unfit,
            StatusCode::SWITCHING_PROTOCOLS => Outcome::Unfit,
            StatusCode::UNAUTHORIZED if !grant.lease.bound => Outcome::Refused(response),
            _ => {
                grant.lease.account.well(self.ms(response.body().headed()));
                Outcome::Answered(response)
            }
        }
    }

    async fn send(
        &self,
        order: &Order,
        tries: &mut Tries,
        grant: &Grant,
        at: Instant,
    ) -> Result<Response<Download>, SendError> {
        // A connection that was closed while it was idle is found out on use.
        for unsent in 0..MOST_UNSENT {
            let at = if unsent == 0 { at } else { Instant::now() };
            let channel = self.upstream.channel(unsent > 0, at).await?;
            let request = |http2| self.request(order, tries, grant, http2);
            match self.upstream.send(channel, request, &order.upload).await {
                Err(SendError::Unsent) => {}
                outcome => return outcome,
            }
        }
        Err(SendError::Connect)
    }

    /// The request as the upstream gets it.
    fn request(
        &self,
        order: &Order,
        tries: &mut Tries,
        grant: &Grant,
        http2: bool,
    ) -> Result<Request<UploadBody>, SendError> {
        let body = order.upload.body().ok_or(SendError::Broke)?;
        let announced = body.size_hint().exact().is_some() || body.is_end_stream();
        let mut request = Request::new(body);
        *request.method_mut() = order.method.clone();
        *request.uri_mut() = self
            .base
            .join(&order.target, http2)
            .ok_or(SendError::Target)?;
        let (headers, extensions) = tries.next();
        *request.headers_mut() = headers;
        *request.extensions_mut() = extensions;
        let headers = request.headers_mut();
        let (overview, takes_trailers) = (&order.overview, order.takes_trailers);
        if http2 {
            headers::for_http2(headers, overview, takes_trailers);
        } else {
            headers::for_http1(headers, overview, &self.base.host, takes_trailers);
        }
        headers::put_credential(headers, grant.lease.scheme, grant.lease.credential.clone());
        // The library sends the body of a GET only where something announces it.
        if !http2 && !announced {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        if order.expects_continue {
            order.upload.withhold();
            let upload = order.upload.clone();
            hyper::ext::on_informational(&mut request, move |informational| {
                if informational.status() == StatusCode::CONTINUE {
                    upload.let_go();
                }
            });
        }
        Ok(request)
    }

    /// The upstream has refused the account: finds another for the request.
    async fn replace(&self, order: &Order, refused: &Grant, sent_at: u64) -> Replacement {
        let account = &refused.lease.account;
        let _turn = account.turn.lock().await;
        // Another request may have been quicker, or the file has a new token.
        match self.ask(&order.key).await {
            Ok(grant) if grant.state == State::Grace => {
                return Replacement::None(Code::Redis.into());
            }
            Ok(grant) if grant.lease.credential != refused.lease.credential => {
                return Replacement::Grant(grant, None);
            }
            Ok(_) => {}
            Err(own) => return Replacement::None(own),
        }
        // Or it has been found that the account is not at fault.
        let now = self.now();
        let who = self.who(order);
        if account.cooled_since(sent_at) || self.lender.accounts.is_suspect(who, now) {
            return Replacement::Innocent;
        }
        let units = account.refused(who, now);
        self.lender.accounts.doubt(who, DOUBT, now);
        let charge = Charge {
            lender: self.lender.clone(),
            account: Some(Arc::clone(account)),
        };
        if !self.cool(account, units, "the upstream answered 401").await {
            charge.stand();
            return Replacement::Innocent;
        }
        match self.ask(&order.key).await {
            Ok(grant) if grant.lease.credential != refused.lease.credential => {
                Replacement::Grant(grant, Some(charge))
            }
            Ok(_) => {
                charge.stand();
                Replacement::Innocent
            }
            Err(_) if account.may_be_innocent() => {
                charge.drop_now().await;
                Replacement::Innocent
            }
            Err(own) => {
                charge.stand();
                Replacement::None(own)
            }
        }
    }

    /// A second account has refused the request too: it may well be the request.
    fn refused_by_two(&self, order: &Order, second: &Account, charge: Option<Charge>) {
        let who = self.who(order);
        second.refused_too(who);
        match charge {
            // Without a verdict, it falls.
            Some(charge) => drop(charge),
            None => self.lender.accounts.doubt(who, DOUBT, self.now()),
        }
    }

    /// The request can't be sent again, so no other account can say whether it
    /// is at fault. The key is not to cost another account as long as this one is out.
    fn leave_unproved(&self, order: &Order, charge: Charge) {
        let span = self.cooldown_ms().max(DOUBT);
        self.lender
            .accounts
            .doubt(self.who(order), span, self.now());
        charge.stand();
    }

    /// Answers whether the account has been cooled down.
    async fn connection_failed(&self, order: &Order, grant: &Grant, error: SendError) -> bool {
        let (account, accounts) = (&grant.lease.account, &self.lender.accounts);
        let (who, now) = (self.who(order), self.now());
        // A key that has cost one account must have got an answer before it costs the next.
        // What happens before anything is sent, or for want of time, is no account's doing.
        let its_own = matches!(error, SendError::Broke | SendError::Garbage);
        if grant.lease.bound || !its_own || accounts.is_suspect(who, now) {
            return false;
        }
        let Some(units) = accounts.failed(account, self.cooldown_ms(), now) else {
            return false;
        };
        accounts.doubt(who, self.cooldown_ms(), now);
        self.cool(account, units, "connections to the upstream keep failing")
            .await
    }

    async fn cool(&self, account: &Account, units: u32, reason: &str) -> bool {
        let span = self.cooldown * units;
        let cooled = self
            .lender
            .cooldown(&account.name, span.as_millis(), reason)
            .await;
        if cooled {
            let (name, seconds) = (&*account.name, span.as_secs_f64());
            tracing::warn!(
                event = "cooldown",
                account = name,
                seconds,
                reason,
                "Account {name} is out of the pool for {seconds} s: {reason}"
            );
        }
        cooled
    }

    fn cooldown_ms(&self) -> u64 {
        u64::try_from(self.cooldown.as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether the log may have one more line that says what each request's line
    /// says too: once a second.
    fn may_complain(&self) -> bool {
        let now = self.now();
        let last = self.complained_at.load(Ordering::Relaxed);
        let may = now >= last.saturating_add(1000) || last == 0;
        if may {
            self.complained_at.store(now.max(1), Ordering::Relaxed);
        }
        may
    }

    /// A request's key, as the rules for accounts tell keys apart.
    fn who(&self, order: &Order) -> u64 {
        self.lender.accounts.key(order.key.as_bytes())
    }

    fn now(&self) -> u64 {
        self.ms(Instant::now())
    }

    /// An instant as [`Self::now`] has it.
    fn ms(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.began);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// What one try has come to.
enum Outcome {
    Answered(Response<Download>),
    /// With 401, which speaks against the account.
    Refused(Response<Download>),
    /// The answer can't be passed on.
    Unfit,
    Failed(SendError),
}

/// What has been done for a request already.
#[derive(Default)]
struct Tried {
    another_account: bool,
    another_connection: bool,
    /// Against the account that this request has had taken out of the pool.
    charge: Option<Charge>,
}

/// What a request says of an account that it has had taken out of the pool. It
/// falls when no other account has borne it out, also when the client has left
/// meanwhile: then the account is put back, unless other keys' requests say the
/// same.
struct Charge {
    lender: Lender,
    /// Nothing once that is settled.
    account: Option<Arc<Account>>,
}

impl Charge {
    /// Another account has answered the same request well.
    fn prove(self, key: u64) {
        self.lender.accounts.believe(key);
        self.stand();
    }

    /// The account stays out.
    fn stand(mut self) {
        self.account = None;
    }

    async fn drop_now(mut self) {
        if let Some(account) = self.account.take() {
            put_back(self.lender.clone(), account).await;
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let account = self.account.take();
        if let Some(account) = account.filter(|account| account.is_innocent_beside_another()) {
            tokio::spawn(put_back(self.lender.clone(), account));
        }
    }
}

async fn put_back(lender: Lender, account: Arc<Account>) {
    if lender.cooldown(&account.name, 0, "").await {
        account.put_back();
        let name = &*account.name;
        tracing::warn!(
            event = "put-back",
            account = name,
            "Account {name} is back in the pool: it seems to be the request that is refused"
        );
    }
}

/// What becomes of a request whose account was refused.
enum Replacement {
    /// Another account, and what is held against the first one.
    Grant(Grant, Option<Charge>),
    None(Own),
    /// The refusal is the client's to see.
    Innocent,
}

fn of_fault(fault: Fault) -> Code {
    match fault {
        Fault::TooLarge => Code::BodyTooLarge,
        Fault::Silent => Code::RequestTimeout,
        Fault::Broken => Code::BadRequest,
        Fault::Superseded => Code::Upstream,
    }
}

fn expects_continue(headers: &HeaderMap) -> bool {
    headers
        .get(EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn answer(own: Own, mut report: Report, active: Active, turn: Option<Turn>) -> Response<Reply> {
    let response = own.code.response(own.retry_after);
    report.own(own.code, response.body().size_hint().exact().unwrap_or(0));
    response.map(|body| Reply::own(body, active, turn))
}
