//! The connection to Redis: one, multiplexed, for each thread. It is made anew
//! whenever it breaks, to whichever server is the primary then, and says at once
//! when there is none.

use crate::config::{RedisSettings, RedisTarget};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, RedisError, Value};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

/// How long a request waits for a connection that has just been lost.
const BLINK: Duration = Duration::from_millis(250);
/// The pauses between tries to connect, shortest and longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

#[derive(Clone)]
enum State {
    Up {
        connection: MultiplexedConnection,
        epoch: u64,
    },
    Down {
        since: Instant,
    },
}

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

/// A connection that mends itself.
#[derive(Clone)]
pub struct Link {
    state: watch::Receiver<State>,
    broken: Arc<Broken>,
}

/// The word to the task that connects.
struct Broken {
    epoch: Mutex<u64>,
    notify: Notify,
}

impl Link {
    /// Connects in the background, for ever. `said` is told
    /// what becomes of it.
    ///
    /// # Errors
    /// When the settings make no client.
    pub fn start(
        settings: &RedisSettings,
        patience: Duration,
        said: impl Fn(Event) + Send + 'static,
    ) -> Result<Self, String> {
        let (sender, state) = watch::channel(State::Down {
            since: Instant::now(),
        });
        let broken = Arc::new(Broken {
            epoch: Mutex::new(0),
            notify: Notify::new(),
        });
        tokio::spawn(connect_forever(
            settings.client()?,
            patience,
            sender,
            Arc::clone(&broken),
            said,
        ));
        Ok(Self { state, broken })
    }

    /// One command.
    ///
    /// # Errors
    /// [`Failure`]; where the connection broke under it, it has been tried twice.
    pub async fn ask(&self, command: &Cmd) -> Result<Value, Failure> {
        let (mut connection, epoch) = self.connection().await?;
        let error = match connection.send_packed_command(command).await {
            Ok(Value::ServerError(error)) => RedisError::from(error),
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        match self.judge(error, epoch)? {
            Again::No(failure) => Err(failure),
            Again::Yes => {
                let (mut connection, epoch) = self.connection().await?;
                match connection.send_packed_command(command).await {
                    Ok(Value::ServerError(error)) => Err(Failure::Refused(RedisError::from(error))),
                    Ok(value) => Ok(value),
                    Err(error) => match self.judge(error, epoch)? {
                        Again::No(failure) => Err(failure),
                        Again::Yes => Err(Failure::Unreachable("the connection broke")),
                    },
                }
            }
        }
    }

    fn judge(&self, error: RedisError, epoch: u64) -> Result<Again, Failure> {
        if error.is_timeout() {
            self.lost(epoch);
            return Err(Failure::Unreachable("no answer in time"));
        }
        match error.code() {
            // This server is no longer the primary, or not yet.
            Some("READONLY" | "MASTERDOWN") => {
                self.lost(epoch);
                Ok(Again::No(Failure::Refused(error)))
            }
            Some(_) => Ok(Again::No(Failure::Refused(error))),
            None => {
                self.lost(epoch);
                Ok(Again::Yes)
            }
        }
    }

    async fn connection(&self) -> Result<(MultiplexedConnection, u64), Failure> {
        let mut state = self.state.clone();
        let since = match &*state.borrow() {
            State::Up { connection, epoch } if *epoch >= self.broken.epoch() => {
                return Ok((connection.clone(), *epoch));
            }
            // It broke this very moment; the task will say so.
            State::Up { .. } => Instant::now(),
            State::Down { since } => *since,
        };
        let left = BLINK.saturating_sub(since.elapsed());
        let floor = self.broken.epoch();
        let up =
            state.wait_for(|state| matches!(state, State::Up { epoch, .. } if *epoch >= floor));
        match timeout(left, up).await {
            Ok(Ok(state)) => match &*state {
                State::Up { connection, epoch } => Ok((connection.clone(), *epoch)),
                State::Down { .. } => Err(Failure::Unreachable("not connected")),
            },
            _ => Err(Failure::Unreachable("not connected")),
        }
    }

    /// Says that the connection of this epoch is of no use any more.
    fn lost(&self, epoch: u64) {
        let mut floor = self
            .broken
            .epoch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *floor <= epoch {
            *floor = epoch + 1;
            self.broken.notify.notify_one();
        }
    }
}

enum Again {
    Yes,
    No(Failure),
}

impl Broken {
    /// The oldest epoch whose connection may be used.
    fn epoch(&self) -> u64 {
        *self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn connect_forever(
    mut target: RedisTarget,
    patience: Duration,
    state: watch::Sender<State>,
    broken: Arc<Broken>,
    said: impl Fn(Event),
) {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(patience))
        .set_response_timeout(Some(patience));
    let mut pause = PAUSE.0;
    let mut told_down = false;
    loop {
        let connecting = async {
            match &mut target {
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
        match timeout(patience * 3, connecting).await {
            Ok(Ok(connection)) => {
                let epoch = broken.epoch();
                state.send_replace(State::Up { connection, epoch });
                said(Event::Up);
                told_down = false;
                let up_at = Instant::now();
                while broken.epoch() <= epoch {
                    broken.notify.notified().await;
                }
                said(Event::Lost);
                state.send_replace(State::Down {
                    since: Instant::now(),
                });
                // A server that takes connections and drops them is not to be hammered.
                if up_at.elapsed() > Duration::from_secs(1) {
                    pause = PAUSE.0;
                    continue;
                }
            }
            Ok(Err(error)) if !told_down => {
                told_down = true;
                said(Event::Down(reason(&error)));
            }
            Err(_) if !told_down => {
                told_down = true;
                said(Event::Down("no answer in time"));
            }
            _ => {}
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
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
