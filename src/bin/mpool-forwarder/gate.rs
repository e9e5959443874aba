//! What is begun is finished first: of requests that have come at the same time a
//! thread takes up a few at once, and the rest when the answers to those have had
//! their turn. With hundreds of connections, what belongs to a request would
//! otherwise leave the processor's cache before its answer comes.
//!
//! Nobody is held up for longer than it takes to look at everything that is ready,
//! so any number of requests may wait for a slow upstream.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Requests taken up in one round of all that is ready.
const MOST: usize = 64;

#[derive(Debug, Default)]
pub struct Gate(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Requests taken up in this round.
    begun: usize,
    waiting: VecDeque<Waker>,
    /// Tickets given out, and those of them whose turn has come.
    given: u64,
    called: u64,
    /// A task of its own goes with the rounds.
    is_turning: bool,
}

/// A place in the queue.
#[derive(Debug, Default)]
pub struct Ticket(Option<u64>);

impl Ticket {
    pub const fn is_held(&self) -> bool {
        self.0.is_some()
    }
}

impl Gate {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready when a request may be taken up.
    pub fn poll_enter(self: &Arc<Self>, ticket: &mut Ticket, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.inner();
        if let Some(number) = ticket.0 {
            if number >= inner.called {
                return Poll::Pending;
            }
            ticket.0 = None;
            return Poll::Ready(());
        }
        if inner.begun < MOST && inner.waiting.is_empty() {
            inner.begun += 1;
            return Poll::Ready(());
        }
        ticket.0 = Some(inner.given);
        inner.given += 1;
        inner.waiting.push_back(cx.waker().clone());
        if !inner.is_turning {
            inner.is_turning = true;
            tokio::spawn(go_round(Arc::clone(self)));
        }
        Poll::Pending
    }
}

async fn go_round(gate: Arc<Gate>) {
    loop {
        // Until all that is ready has been looked at, sockets included.
        tokio::task::yield_now().await;
        let mut inner = gate.inner();
        let next = inner.waiting.len().min(MOST);
        inner.begun = next;
        inner.called += next as u64;
        inner.waiting.drain(..next).for_each(Waker::wake);
        if next == 0 {
            inner.is_turning = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::yield_now;

    fn enters(gate: &Arc<Gate>, ticket: &mut Ticket) -> bool {
        let cx = &mut Context::from_waker(Waker::noop());
        gate.poll_enter(ticket, cx).is_ready()
    }

    async fn all_enter_in_turn(gate: &Arc<Gate>, count: usize) {
        let mut waiting: Vec<Ticket> = (0..count).map(|_| Ticket::default()).collect();
        let mut rounds = 0;
        while !waiting.is_empty() {
            let entered: Vec<bool> = waiting
                .iter_mut()
                .map(|ticket| enters(gate, ticket))
                .collect();
            let number = entered.iter().take_while(|entered| **entered).count();
            assert!(number <= MOST, "{number} at once");
            assert!(!entered[number..].contains(&true), "out of turn");
            waiting.drain(..number);
            assert!(waiting.iter().all(Ticket::is_held));
            rounds += 1;
            assert!(rounds <= 3 * count, "{} never enter", waiting.len());
            yield_now().await;
        }
        assert!(rounds >= count.div_ceil(MOST));
    }

    #[test]
    fn many_who_come_at_once_enter_a_few_at_a_time_and_in_turn() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let gate = Arc::new(Gate::default());
            for count in [1, MOST, 5 * MOST + 1, 3] {
                all_enter_in_turn(&gate, count).await;
                for _ in 0..3 {
                    yield_now().await;
                }
                assert!(gate.inner().waiting.is_empty());
                assert!(!gate.inner().is_turning, "nobody waits");
            }
        });
    }

    #[test]
    fn who_leaves_the_queue_holds_nobody_up() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let gate = Arc::new(Gate::default());
            let mut gone: Vec<Ticket> = (0..3 * MOST).map(|_| Ticket::default()).collect();
            let entered = gone.iter_mut().map(|ticket| enters(&gate, ticket));
            assert_eq!(entered.filter(|entered| *entered).count(), MOST);
            let mut last = Ticket::default();
            assert!(!enters(&gate, &mut last));
            drop(gone);
            for _ in 0..10 {
                yield_now().await;
            }
            assert!(enters(&gate, &mut last));
        });
    }
}
