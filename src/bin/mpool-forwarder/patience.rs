//! Deadlines that cost next to nothing as long as they move on: a timer is set
//! anew when it fires, not each time its deadline moves.

use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};

/// Timers kept for the next request by each thread.
const SPARE: usize = 1024;

thread_local! {
    /// Timers that are set already; they belong to this thread's runtime.
    static SPARES: RefCell<Vec<Pin<Box<Sleep>>>> = const { RefCell::new(Vec::new()) };
}

/// Waits for a deadline that may move.
#[derive(Debug, Default)]
pub struct Patience {
    timer: Option<Pin<Box<Sleep>>>,
    /// Whom the timer wakes, where that is the same from one look to the next.
    wakes: Option<Waker>,
    shared: bool,
}

impl Patience {
    /// For something that lives long, such as a connection.
    pub const fn new() -> Self {
        Self {
            timer: None,
            wakes: None,
            shared: false,
        }
    }

    /// For something that is over soon and has the same bound each time: the
    /// timer is handed on to the next, which moves its deadline on.
    pub const fn shared() -> Self {
        Self {
            timer: None,
            wakes: None,
            shared: true,
        }
    }

    /// Ready once the deadline has passed.
    pub fn poll(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let shared = self.shared;
        let timer = self.timer.get_or_insert_with(|| {
            let spare = if shared {
                SPARES.with_borrow_mut(Vec::pop)
            } else {
                None
            };
            spare.unwrap_or_else(|| Box::pin(sleep_until(deadline)))
        });
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        } else if !timer.is_elapsed()
            // It wakes this task already.
            && let Some(waker) = &self.wakes
            && waker.will_wake(cx.waker())
        {
            return Poll::Pending;
        }
        // A task that has used up its budget for this turn would not be woken by it either.
        while pin!(unconstrained(timer.as_mut())).poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
        if !shared {
            self.wakes = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        if self.shared
            && let Some(timer) = self.timer.take()
        {
            // Where the thread is about to end, so is the timer.
            let _ = SPARES.try_with(|spares| {
                if let Ok(mut spares) = spares.try_borrow_mut()
                    && spares.len() < SPARE
                {
                    spares.push(timer);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio::task::coop;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_moves_on_is_waited_for() {
        for mut patience in [Patience::new(), Patience::shared(), Patience::shared()] {
            let begin = Instant::now();
            let mut deadline = begin + Duration::from_secs(10);
            let mut looks = 0;
            poll_fn(|cx| {
                looks += 1;
                if looks == 1 {
                    assert!(patience.poll(deadline, cx).is_pending());
                    deadline += Duration::from_secs(5);
                }
                patience.poll(deadline, cx)
            })
            .await;
            assert!(Instant::now() >= begin + Duration::from_secs(15));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_asked_last_is_woken() {
        for mut patience in [Patience::new(), Patience::shared()] {
            let deadline = Instant::now() + Duration::from_secs(10);
            let nobody = &mut Context::from_waker(Waker::noop());
            let mut looks = 0;
            poll_fn(|cx| {
                looks += 1;
                if looks == 1 {
                    assert!(patience.poll(deadline, nobody).is_pending());
                    assert!(patience.poll(deadline, cx).is_pending());
                    assert!(patience.poll(deadline, nobody).is_pending());
                }
                patience.poll(deadline, cx)
            })
            .await;
            assert_eq!(looks, 2);
            assert!(Instant::now() >= deadline);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_is_woken_that_had_used_up_its_turn() {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut patience = Patience::new();
        let mut looks = 0;
        let waiting = poll_fn(|cx| {
            looks += 1;
            while looks == 1 && coop::has_budget_remaining() {
                let _ = pin!(coop::consume_budget()).poll(cx);
            }
            patience.poll(deadline, cx)
        });
        let late = Duration::from_secs(99);
        assert!(tokio::time::timeout(late, waiting).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_nearer_deadline_than_the_last_ones_is_kept() {
        let far = Instant::now() + Duration::from_secs(600);
        let mut patience = Patience::shared();
        let first = poll_fn(|cx| Poll::Ready(patience.poll(far, cx).is_pending()));
        assert!(first.await);
        drop(patience);
        let near = Instant::now() + Duration::from_secs(1);
        let mut patience = Patience::shared();
        poll_fn(|cx| patience.poll(near, cx)).await;
        assert!(Instant::now() < far);
    }
}
