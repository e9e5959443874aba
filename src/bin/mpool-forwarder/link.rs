//! The connection to Redis: one for each thread, looked after by a task of its
//! own. What requests ask in the same moment goes out in one write. When the
//! connection breaks it is made anew, to whichever server is the primary then;
//! until then every question is answered at once that Redis can't be asked.

use crate::config::RedisTarget;
use crate::known::{self, Known, Ticket};
use crate::lender::bytes_of;
use crate::patience::Patience;
use crate::resp;
use crate::socket_watch::SocketWatch;
use bytes::{Buf, Bytes, BytesMut};
use redis::Value;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::coop;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long questions wait for a connection that has just been lost.
const BLINK: Duration = Duration::from_millis(250);
/// The pauses between tries to connect, shortest and longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// How long a connection on which Redis tells of changes may be silent before it is
/// tried: one that is cut off tells of none either.
const SILENCE: Duration = Duration::from_secs(1);
/// What the connection is called in CLIENT LIST.
const NAME: &[u8] = b"mpool-forwarder";

/// What becomes of the connection, for those who watch.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    Up,
    /// Leases are not remembered over the connection that is up, though that is wanted,
    /// and why.
    Forgetful(&'static str),
    Lost,
    /// It can't be made, and why; said each time.
    Down(&'static str),
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable(pub &'static str);

/// A reply as it came.
type Answer = Result<Bytes, Unreachable>;

const NOT_CONNECTED: Unreachable = Unreachable("not connected");
const TOO_LATE: Unreachable = Unreachable("no answer in time");

struct Question {
    command: Vec<u8>,
    /// A whole reply: to see that it has come again costs less than to find the end of
    /// one.
    expected: Option<Bytes>,
    /// Who waits for the answer, if anyone does.
    answer: Option<oneshot::Sender<Answer>>,
    /// It went down with a connection once.
    again: bool,
}

impl Question {
    fn is_wanted(&self) -> bool {
        self.answer
            .as_ref()
            .is_none_or(|answer| !answer.is_closed())
    }

    fn answer(self, answer: Answer) {
        if let Some(waiting) = self.answer {
            let _ = waiting.send(answer);
        }
    }
}

/// A connection that mends itself.
#[derive(Clone)]
pub struct Link {
    questions: mpsc::UnboundedSender<Question>,
    outage: Arc<Outage>,
    pub known: Arc<Known>,
    said: Said,
}

type Said = Arc<dyn Fn(Event) + Send + Sync>;

/// Since when Redis has given no verdict.
#[derive(Debug, Default)]
struct Outage(Mutex<Option<Instant>>);

impl Outage {
    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// Connects in the background, for as long as there is a link. `said` is
    /// told what becomes of the connection.
    pub fn start(
        target: RedisTarget,
        patience: Duration,
        known: Known,
        said: impl Fn(Event) + Send + Sync + 'static,
    ) -> Self {
        let (questions, waiting) = mpsc::unbounded_channel();
        let outage = Arc::new(Outage::default());
        let known = Arc::new(known);
        let said: Said = Arc::new(said);
        let keeper = Keeper {
            known: Arc::clone(&known),
            outage: Arc::clone(&outage),
            patience,
            waiting,
            pending: VecDeque::new(),
            lost_at: Instant::now(),
            said: Arc::clone(&said),
        };
        tokio::spawn(keeper.run(target));
        Self {
            questions,
            outage,
            known,
            said,
        }
    }

    /// The key's end can't be asked for, by that ticket, so nothing is remembered.
    pub fn denied(&self, key: &str, ticket: Ticket) {
        if self.known.denied(key, ticket) {
            (self.said)(Event::Forgetful("it refuses MPOOL.STATUS"));
        }
    }

    /// Redis has given a verdict on this connection: whatever outage there was is over.
    pub fn heard(&self) {
        *self.outage.since() = None;
    }

    /// How long it has given none, from when the connection was lost, or from now.
    pub fn outage(&self) -> Duration {
        self.outage
            .since()
            .get_or_insert_with(Instant::now)
            .elapsed()
    }

    /// Asks Redis; the reply may be an error of Redis's. A question whose
    /// connection breaks is asked once more.
    ///
    /// # Errors
    /// [`Unreachable`], promptly.
    pub async fn ask(&self, words: &[&[u8]]) -> Answer {
        self.send(words, None).await
    }

    /// The same; the question is on its way even before the answer is waited for. The
    /// reply that is `expected` takes the least time.
    pub fn send(
        &self,
        words: &[&[u8]],
        expected: Option<Bytes>,
    ) -> impl Future<Output = Answer> + use<> {
        let (answer, answered) = oneshot::channel();
        let question = Question {
            command: resp::command(words),
            expected,
            answer: Some(answer),
            again: false,
        };
        let sent = self.questions.send(question);
        async move {
            sent.map_err(|_| NOT_CONNECTED)?;
            answered.await.unwrap_or(Err(NOT_CONNECTED))
        }
    }
}

/// The task that has the connection.
struct Keeper {
    known: Arc<Known>,
    outage: Arc<Outage>,
    patience: Duration,
    waiting: mpsc::UnboundedReceiver<Question>,
    /// Questions that wait for a connection.
    pending: VecDeque<Question>,
    lost_at: Instant,
    said: Said,
}

/// Why a phase of the keeper's life is over.
enum Over {
    Lost,
    /// Nobody can ask any more.
    Closed,
}

impl Keeper {
    async fn run(mut self, mut target: RedisTarget) {
        let mut pause = PAUSE.0;
        loop {
            match self.connect(&mut target).await {
                Err(Over::Closed) => return,
                Err(Over::Lost) => {}
                Ok(Err(why)) => {
                    (self.said)(Event::Down(why));
                }
                Ok(Ok(line)) => {
                    (self.said)(Event::Up);
                    if let Some(why) = line.forgetful {
                        (self.said)(Event::Forgetful(why));
                    }
                    let (over, answered) = self.converse(line).await;
                    self.known.end();
                    (self.said)(Event::Lost);
                    self.lost_at = Instant::now();
                    self.outage.since().get_or_insert(self.lost_at);
                    if matches!(over, Over::Closed) {
                        return;
                    }
                    // A server that takes connections and drops them is not to be hammered.
                    if answered {
                        pause = PAUSE.0;
                        continue;
                    }
                }
            }
            if matches!(self.refuse_while(sleep(pause)).await, Err(Over::Closed)) {
                return;
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// A new connection, or why there is none.
    async fn connect(
        &mut self,
        target: &mut RedisTarget,
    ) -> Result<Result<Line, &'static str>, Over> {
        let patience = self.patience;
        // Asking Sentinels takes more than one step.
        let (known, outage) = (Arc::clone(&self.known), Arc::clone(&self.outage));
        let opening = async { open(target, patience, &known, &outage).await };
        let connecting = timeout(patience * 3, opening);
        Ok(self
            .refuse_while(connecting)
            .await?
            .unwrap_or(Err("no answer in time")))
    }

    /// Waits for something other than questions, which are kept for a moment
    /// and refused then.
    async fn refuse_while<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Over> {
        let mut work = std::pin::pin!(work);
        loop {
            let hope = self.lost_at + BLINK;
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                question = self.waiting.recv() => {
                    self.pending.push_back(question.ok_or(Over::Closed)?);
                    if Instant::now() >= hope {
                        self.refuse_all();
                    }
                }
                () = sleep_until(hope), if !self.pending.is_empty() => self.refuse_all(),
            }
        }
    }

    fn refuse_all(&mut self) {
        for question in self.pending.drain(..) {
            question.answer(Err(NOT_CONNECTED));
        }
    }

    /// Asks and answers until the connection breaks. Says whether it was of any use.
    async fn converse(&mut self, line: Line) -> (Over, bool) {
        let mut talk = Talk::new(line, Arc::clone(&self.known));
        // Redis may have told of changes already.
        let begun = talk.take_in();
        let asked_before: Vec<Question> = self.pending.drain(..).collect();
        for question in asked_before {
            talk.put(question);
        }
        let over = match begun {
            Ok(()) => poll_fn(|cx| talk.poll(&mut self.waiting, self.patience, cx)).await,
            Err(end) => end,
        };
        for (question, _) in talk.asked {
            let failure = match &over {
                End::TooLate => TOO_LATE,
                End::Broke if !question.again => {
                    self.pending.push_back(Question {
                        again: true,
                        ..question
                    });
                    continue;
                }
                _ => Unreachable("the connection broke"),
            };
            question.answer(Err(failure));
        }
        let over = match over {
            End::Closed => Over::Closed,
            _ => Over::Lost,
        };
        (over, talk.answered)
    }
}

/// Why a connection is of no use any more.
enum End {
    Broke,
    TooLate,
    /// This server is no longer the primary, or not yet.
    NotPrimary,
    Closed,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Broke
    }
}

/// One connection and the questions that are out on it.
struct Talk {
    line: Line,
    out: BytesMut,
    asked: VecDeque<(Question, Instant)>,
    /// For answers.
    patience: Patience,
    /// When something came last.
    heard: Instant,
    /// For anything at all.
    silence: Patience,
    answered: bool,
    /// Bytes since all that had come was read.
    read: usize,
    known: Arc<Known>,
}

impl Talk {
    fn new(line: Line, known: Arc<Known>) -> Self {
        Self {
            line,
            out: BytesMut::new(),
            asked: VecDeque::new(),
            patience: Patience::new(),
            heard: Instant::now(),
            silence: Patience::new(),
            answered: false,
            read: 0,
            known,
        }
    }

    fn put(&mut self, question: Question) {
        if question.is_wanted() {
            self.out.extend_from_slice(&question.command);
            self.asked.push_back((question, Instant::now()));
        }
    }

    fn poll(
        &mut self,
        waiting: &mut mpsc::UnboundedReceiver<Question>,
        patience: Duration,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        while let Poll::Ready(question) = waiting.poll_recv(cx) {
            match question {
                Some(question) => self.put(question),
                None => return Poll::Ready(End::Closed),
            }
        }
        if let Err(end) = self.write(cx) {
            return Poll::Ready(end);
        }
        if let Err(end) = self.read(cx) {
            return Poll::Ready(end);
        }
        if self.is_doubtful(cx) {
            self.try_out();
            if let Err(end) = self.write(cx) {
                return Poll::Ready(end);
            }
        }
        if let Some((_, since)) = self.asked.front()
            && self.patience.poll(*since + patience, cx).is_ready()
        {
            return Poll::Ready(End::TooLate);
        }
        Poll::Pending
    }

    /// Whether nothing has come for so long that Redis may be out of reach, where that
    /// would go unnoticed.
    fn is_doubtful(&mut self, cx: &mut Context<'_>) -> bool {
        self.asked.is_empty()
            && self.known.is_told()
            && self.silence.poll(self.heard + SILENCE, cx).is_ready()
    }

    /// Asks who is there.
    fn try_out(&mut self) {
        let question = Question {
            command: resp::command(&[b"HELLO"]),
            expected: None,
            answer: None,
            // The next connection need not be asked that.
            again: true,
        };
        self.put(question);
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        while !self.out.is_empty() {
            match Pin::new(&mut self.line.stream).poll_write(cx, &self.out) {
                Poll::Ready(Ok(0)) => return Err(End::Broke),
                Poll::Ready(written) => self.out.advance(written?),
                Poll::Pending => return Ok(()),
            }
        }
        // TLS keeps what it has not been told to send.
        match Pin::new(&mut self.line.stream).poll_flush(cx) {
            Poll::Ready(flushed) => Ok(flushed?),
            Poll::Pending => Ok(()),
        }
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        loop {
            let Line { stream, came, .. } = &mut self.line;
            // A long message is looked at from its beginning each time: in few steps.
            came.reserve(came.len().max(4 << 10));
            let reading = std::pin::pin!(stream.read_buf(came));
            match reading.poll(cx) {
                Poll::Ready(Ok(0)) => return Err(End::Broke),
                Poll::Ready(read) => self.read += read?,
                Poll::Pending => {
                    // Or else this task has had its turn, and goes on in the next.
                    if coop::has_budget_remaining() {
                        self.known.caught_up(std::mem::take(&mut self.read));
                    }
                    return Ok(());
                }
            }
            self.heard = Instant::now();
            self.take_in()?;
        }
    }

    /// Has each reply that is all there where it belongs.
    fn take_in(&mut self) -> Result<(), End> {
        while let Some(reply) = self.next_reply()? {
            if reply.starts_with(b">") {
                self.known.told(&reply);
                continue;
            }
            let demoted = reply.starts_with(b"-READONLY") || reply.starts_with(b"-MASTERDOWN");
            // What nobody asked for can't be matched with a question.
            let (question, _) = self.asked.pop_front().ok_or(End::Broke)?;
            // A replica tells of no changes in time. The next request finds it out.
            if question.answer.is_none() && !is_primary(&reply) {
                self.known.forget_all();
            }
            question.answer(Ok(reply));
            self.answered |= !demoted;
            if demoted {
                return Err(End::NotPrimary);
            }
        }
        self.known.in_part(!self.line.came.is_empty());
        Ok(())
    }

    /// The next reply, once it is all there.
    fn next_reply(&mut self) -> Result<Option<Bytes>, End> {
        let asked = self.asked.front().map(|(question, _)| question);
        let expected = asked.and_then(|question| question.expected.as_ref());
        // No reply begins with another one.
        let came = &mut self.line.came;
        if let Some(expected) = expected.filter(|expected| came.starts_with(expected)) {
            came.advance(expected.len());
            return Ok(Some(expected.clone()));
        }
        let length = resp::reply_length(came).map_err(|_| End::Broke)?;
        Ok(length.map(|length| came.split_to(length).freeze()))
    }
}

/// Whether that is what a primary says of itself (HELLO).
fn is_primary(reply: &[u8]) -> bool {
    let Ok(Value::Map(fields)) = redis::parse_redis_value(reply) else {
        return false;
    };
    let role = fields
        .iter()
        .find(|(name, _)| bytes_of(name) == Some(b"role"));
    role.is_some_and(|(_, role)| bytes_of(role) == Some(b"master"))
}

/// A connection to Redis.
struct Line {
    stream: Box<dyn Transport>,
    /// What has come on it and is still to be taken in.
    came: BytesMut,
    /// Why leases are not remembered over it, though that is wanted.
    forgetful: Option<&'static str>,
}

trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// Connects and logs in. Answers why it can't, in words that hold nothing of
/// what was sent.
async fn open(
    target: &mut RedisTarget,
    patience: Duration,
    known: &Known,
    outage: &Outage,
) -> Result<Line, &'static str> {
    let (host, port) = target.address().await?;
    let connecting = tokio::net::TcpStream::connect((host.as_str(), port));
    let stream = timeout(patience, connecting)
        .await
        .map_err(|_| "no answer in time")?;
    let stream = stream.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => "nothing listens there",
        _ => "the connection can't be made",
    })?;
    let _ = stream.set_nodelay(true);
    let socket = known
        .is_wanted()
        .then(|| stream.as_fd().try_clone_to_owned());
    let stream: Box<dyn Transport> = match &target.tls {
        None => Box::new(stream),
        Some(connector) => {
            let name = rustls::pki_types::ServerName::try_from(host)
                .map_err(|_| "its name can't be checked by TLS")?;
            let secured = timeout(patience, connector.connect(name, stream))
                .await
                .map_err(|_| "no answer in time")?;
            Box::new(secured.map_err(
                |_| "TLS with it fails: a certificate is not accepted, or it speaks no TLS",
            )?)
        }
    };
    let mut line = Line {
        stream,
        came: BytesMut::with_capacity(16 << 10),
        forgetful: None,
    };
    if let Some(login) = &target.login {
        let words: Vec<&[u8]> = login.iter().map(|word| word.as_bytes()).collect();
        let reply = line.ask(patience, &words).await?;
        if reply.starts_with(b"-") {
            return Err("it refuses the login");
        }
    }
    // A user may lack the right to this; it is for those who look at CLIENT LIST.
    line.ask(patience, &[b"CLIENT", b"SETNAME", NAME]).await?;
    // The next outage is another one, also where no request comes until then. Only
    // a primary that has the pool knows that there is no such key.
    let is_out = outage.since().is_some();
    if is_out {
        let question: [&[u8]; 3] = [b"MPOOL.ACQUIRE", b"-", b"*"];
        let verdict = line.ask(patience, &question).await?;
        if verdict.starts_with(b"-NOKEY") {
            *outage.since() = None;
        } else if verdict.starts_with(b"-LOADING") {
            return Err("Redis is loading its data");
        }
    }
    if let Some(socket) = socket {
        line.forgetful = line.follow(patience, socket, known).await?;
    }
    Ok(line)
}

/// That error says `why` leases can't be remembered, if it is not one that passes, or for
/// which nothing can be asked.
fn refusal(error: &[u8], why: &'static str) -> Result<Option<&'static str>, &'static str> {
    if error.starts_with(b"-NOAUTH") {
        Err("it wants a login")
    } else if error.starts_with(b"-BUSY") {
        Err("it is busy with a script")
    } else {
        Ok(Some(why))
    }
}

impl Line {
    /// Has Redis tell of changes, if it does; answers why it doesn't. Then every request asks.
    async fn follow(
        &mut self,
        patience: Duration,
        socket: io::Result<OwnedFd>,
        known: &Known,
    ) -> Result<Option<&'static str>, &'static str> {
        let Ok(watch) = socket.and_then(SocketWatch::new) else {
            return Ok(Some("the system allows no further descriptor or epoll"));
        };
        let hello = self.ask(patience, &[b"HELLO", b"3"]).await?;
        if !hello.starts_with(b"%") {
            return refusal(&hello, "it does not speak RESP3");
        }
        let [registration, lease] = known::NAMES.map(str::as_bytes);
        let words: [&[u8]; 8] = [
            b"CLIENT",
            b"TRACKING",
            b"ON",
            b"BCAST",
            b"PREFIX",
            registration,
            b"PREFIX",
            lease,
        ];
        let tracking = self.ask(patience, &words).await?;
        if !tracking.starts_with(b"+") {
            return refusal(&tracking, "it refuses CLIENT TRACKING");
        }
        known.begin(watch);
        Ok(None)
    }

    /// One question while nobody else has the connection. What comes behind the answer
    /// stays to be taken in.
    async fn ask(&mut self, patience: Duration, words: &[&[u8]]) -> Result<BytesMut, &'static str> {
        let Self { stream, came, .. } = self;
        let asking = async {
            stream
                .write_all(&resp::command(words))
                .await
                .map_err(|_| "the connection broke")?;
            stream.flush().await.map_err(|_| "the connection broke")?;
            loop {
                match resp::reply_length(came) {
                    Ok(Some(length)) => return Ok(came.split_to(length)),
                    Ok(None) => {}
                    Err(resp::Malformed) => return Err("it answers, but not as Redis does"),
                }
                if stream
                    .read_buf(came)
                    .await
                    .map_err(|_| "the connection broke")?
                    == 0
                {
                    return Err("it closes the connection");
                }
            }
        };
        timeout(patience, asking)
            .await
            .map_err(|_| "no answer in time")?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::known::Look;
    use std::pin::pin;
    use tokio::net::{TcpListener, TcpStream};

    /// A connection that tells of changes, and Redis's end of it.
    async fn talk() -> (Talk, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap());
        let (here, far) = tokio::join!(here, listener.accept());
        let here = here.unwrap();
        let known = Known::new(Duration::from_secs(3600));
        let socket = here.as_fd().try_clone_to_owned().unwrap();
        known.begin(SocketWatch::new(socket).unwrap());
        let line = Line {
            stream: Box::new(here),
            came: BytesMut::new(),
            forgetful: None,
        };
        let talk = Talk::new(line, Arc::new(known));
        (talk, far.unwrap().0)
    }

    /// Has the connection read what has come when the task may take so many steps less.
    fn read_with_less(talk: &mut Talk, steps: usize, cx: &mut Context<'_>) {
        for _ in 0..steps {
            let _ = pin!(coop::consume_budget()).poll(cx);
        }
        assert!(talk.read(cx).is_ok());
    }

    #[tokio::test]
    async fn a_task_that_has_had_its_turn_has_not_read_all() {
        // 64 bytes: what is read at once ends with a message.
        let told = |key: &str| {
            let name = format!("client_keys:{key:->20}");
            format!(">2\r\n$10\r\ninvalidate\r\n*1\r\n$32\r\n{name}\r\n")
        };
        // Several steps' worth, and then what counts.
        let news = told("other").repeat(400) + &told("k");
        let key = format!("{:->20}", "k");
        for steps in 100..140 {
            let (mut talk, mut far) = talk().await;
            let now = std::time::Instant::now();
            let known = Arc::clone(&talk.known);
            known::tests::learn(&known, &key, now);
            far.write_all(news.as_bytes()).await.unwrap();
            let Look::Behind(behind) = known.look(&key, now, 5) else {
                panic!("it has not been read");
            };
            let mut waiting = pin!(known.catch_up(behind));
            // Until the connection's readiness has been noticed, nothing is read.
            let mut rounds = 0;
            poll_fn(|cx| {
                rounds += 1;
                read_with_less(&mut talk, if rounds < 20 { steps } else { 0 }, cx);
                let over = waiting.as_mut().poll(cx);
                let stale = known.look_again(&key, now, 5).is_ok();
                assert!(over.is_pending() || !stale, "{steps} steps less");
                cx.waker().wake_by_ref();
                over
            })
            .await;
        }
    }

    #[test]
    fn a_primary_says_so() {
        for (reply, expected) in [
            (
                "%2\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n",
                true,
            ),
            ("%1\r\n$4\r\nrole\r\n$7\r\nreplica\r\n", false),
            ("%1\r\n$6\r\nserver\r\n$6\r\nmaster\r\n", false),
            ("-NOPERM\r\n", false),
        ] {
            assert_eq!(is_primary(reply.as_bytes()), expected, "{reply:?}");
        }
    }
}
