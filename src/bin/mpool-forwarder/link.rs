//! The connection to Redis: one for each thread, looked after by a task of its
//! own. What requests ask in the same moment goes out as one pipeline. When the
//! connection breaks it is made anew, to whichever server is the primary then;
//! until then every question is answered at once that Redis can't be asked.

use crate::config::{RedisSettings, RedisTarget};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, Pipeline, RedisError, RedisResult, Value};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long questions wait for a connection that has just been lost.
const BLINK: Duration = Duration::from_millis(250);
/// The pauses between tries to connect, shortest and longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// Questions of one pipeline, and pipelines under way.
const BATCH: usize = 64;
const UNDER_WAY: usize = 2;

/// What becomes of the connection, for those who watch.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    Up,
    Lost,
    /// It can't be made, and why; said once until it can.
    Down(&'static str),
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// Redis can't be reached, or has not answered in time.
    Unreachable(&'static str),
    /// Redis answered with an error.
    Refused(RedisError),
}

type Answer = Result<Value, Failure>;

const NOT_CONNECTED: Failure = Failure::Unreachable("not connected");

struct Question {
    command: Cmd,
    answer: oneshot::Sender<Answer>,
    /// It went down with a connection once.
    again: bool,
}

/// A connection that mends itself.
#[derive(Clone)]
pub struct Link {
    questions: mpsc::UnboundedSender<Question>,
}

impl Link {
    /// Connects in the background, for as long as there is a link. `said` is
    /// told what becomes of the connection.
    ///
    /// # Errors
    /// When the settings make no client.
    pub fn start(
        settings: &RedisSettings,
        patience: Duration,
        said: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let (questions, waiting) = mpsc::unbounded_channel();
        let target = settings.client()?;
        let keeper = Keeper {
            patience,
            waiting,
            pending: Vec::new(),
            lost_at: Instant::now(),
            said,
        };
        tokio::spawn(keeper.run(target));
        Ok(Self { questions })
    }

    /// Asks Redis. A question whose connection breaks is asked once more.
    ///
    /// # Errors
    /// [`Failure`], promptly.
    pub async fn ask(&self, command: Cmd) -> Answer {
        let (answer, answered) = oneshot::channel();
        let question = Question {
            command,
            answer,
            again: false,
        };
        self.questions.send(question).map_err(|_| NOT_CONNECTED)?;
        answered.await.unwrap_or(Err(NOT_CONNECTED))
    }
}

/// The task that has the connection.
struct Keeper<S> {
    patience: Duration,
    waiting: mpsc::UnboundedReceiver<Question>,
    /// Questions that wait for a connection, or for their turn.
    pending: Vec<Question>,
    lost_at: Instant,
    said: S,
}

/// Why a phase of the keeper's life is over.
enum Over {
    Lost,
    /// Nobody can ask any more.
    Closed,
}

impl<S: Fn(Event) + Send + Sync + 'static> Keeper<S> {
    async fn run(mut self, mut target: RedisTarget) {
        let mut pause = PAUSE.0;
        let mut told = false;
        loop {
            match self.connect(&mut target).await {
                Err(Over::Closed) => return,
                Err(Over::Lost) => {}
                Ok(Err(why)) => {
                    if !told {
                        (self.said)(Event::Down(why));
                    }
                    told = true;
                }
                Ok(Ok(connection)) => {
                    (self.said)(Event::Up);
                    told = false;
                    let since = Instant::now();
                    let over = self.converse(connection).await;
                    (self.said)(Event::Lost);
                    self.lost_at = Instant::now();
                    if matches!(over, Over::Closed) {
                        return;
                    }
                    // A server that takes connections and drops them is not to be hammered.
                    if since.elapsed() > Duration::from_secs(1) {
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
    ) -> Result<Result<MultiplexedConnection, &'static str>, Over> {
        let patience = self.patience;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(patience))
            .set_response_timeout(Some(patience));
        let connecting = async {
            match target {
                RedisTarget::Direct(client) => {
                    client
                        .get_multiplexed_async_connection_with_config(&config)
                        .await
                }
                RedisTarget::Sentinel(client) => {
                    client.get_async_connection_with_config(&config).await
                }
            }
        };
        // Asking Sentinels takes more than one step.
        let outcome = self.refuse_while(timeout(patience * 3, connecting)).await?;
        Ok(outcome.map_or(Err("no answer in time"), |connected| {
            connected.map_err(|error| reason(&error))
        }))
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
                    self.pending.push(question.ok_or(Over::Closed)?);
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
            let _ = question.answer.send(Err(NOT_CONNECTED));
        }
    }

    /// Asks and answers until the connection breaks.
    async fn converse(&mut self, connection: MultiplexedConnection) -> Over {
        let mut under_way = FuturesUnordered::new();
        let mut over = None;
        loop {
            if over.is_none() && !self.pending.is_empty() && under_way.len() < UNDER_WAY {
                let batch = self
                    .pending
                    .drain(..self.pending.len().min(BATCH))
                    .collect();
                under_way.push(ask_all(connection.clone(), batch));
                continue;
            }
            if under_way.is_empty()
                && let Some(over) = over
            {
                return over;
            }
            tokio::select! {
                biased;
                Some(outcome) = under_way.next(), if !under_way.is_empty() => {
                    let (lost, unanswered) = outcome;
                    self.pending.extend(unanswered);
                    if lost {
                        over = Some(Over::Lost);
                    }
                }
                came = self.waiting.recv_many(&mut self.pending, BATCH), if over.is_none() && under_way.len() < UNDER_WAY => {
                    if came == 0 {
                        over = Some(Over::Closed);
                    }
                }
            }
        }
    }
}

/// Asks a batch in one pipeline and gives the answers. Says whether the
/// connection is of no use any more, and what is to be asked on the next one.
async fn ask_all(
    mut connection: MultiplexedConnection,
    batch: Vec<Question>,
) -> (bool, Vec<Question>) {
    let mut pipeline = Pipeline::with_capacity(batch.len());
    let mut answers = Vec::with_capacity(batch.len());
    for question in batch
        .into_iter()
        .filter(|question| !question.answer.is_closed())
    {
        answers.push((question.answer, question.again));
        pipeline.add_command(question.command);
    }
    if answers.is_empty() {
        return (false, Vec::new());
    }
    let outcome: RedisResult<Vec<Value>> = connection
        .send_packed_commands(&pipeline, 0, answers.len())
        .await;
    match outcome {
        Ok(values) => {
            let mut lost = false;
            for ((answer, _), value) in answers.into_iter().zip(values) {
                let _ = answer.send(match value {
                    Value::ServerError(error) => {
                        // This server is no longer the primary, or not yet.
                        lost |= matches!(error.code(), "READONLY" | "MASTERDOWN");
                        Err(Failure::Refused(RedisError::from(error)))
                    }
                    value => Ok(value),
                });
            }
            (lost, Vec::new())
        }
        Err(error) if error.is_timeout() => {
            for (answer, _) in answers {
                let _ = answer.send(Err(Failure::Unreachable("no answer in time")));
            }
            (true, Vec::new())
        }
        Err(_) => {
            let mut unanswered = Vec::new();
            for ((answer, again), command) in answers.into_iter().zip(pipeline.cmd_iter()) {
                if again {
                    let _ = answer.send(Err(Failure::Unreachable("the connection broke")));
                } else {
                    unanswered.push(Question {
                        command: command.clone(),
                        answer,
                        again: true,
                    });
                }
            }
            (true, unanswered)
        }
    }
}

/// In words that hold nothing of what was sent.
fn reason(error: &RedisError) -> &'static str {
    match error.kind() {
        redis::ErrorKind::Io if error.is_connection_refusal() => "nothing listens there",
        redis::ErrorKind::Io => "the connection can't be made",
        redis::ErrorKind::AuthenticationFailed => "it refuses the login",
        redis::ErrorKind::MasterNameNotFoundBySentinel => "the Sentinels don't know this name",
        redis::ErrorKind::InvalidClientConfig => "the settings don't fit it",
        _ => "it answers, but not as Redis does to a login",
    }
}
