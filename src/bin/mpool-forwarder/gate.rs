//! What is begun is finished first: of requests that have come at the same time a
//! thread takes up some, and the next when all that was ready meanwhile has had its
//! turn, answers to the first among it. With hundreds of connections, what belongs to
//! a request would otherwise leave the processor's cache before its answer comes.
//!
//! Nobody waits for an answer of anybody's, so any number of requests may be on their
//! way to a slow upstream; and beside downloads at full speed whoever comes enters.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Requests taken up in one round of all that is ready, and the part of those waiting
/// if that is more.
const MOST: usize = if cfg!(fuzzing) { 1 } else { 64 };
const PART: usize = 4;
/// An answer of which so many bytes are taken at once counts as a download at full speed. It
/// has its turn in every round, and so has a request then, lest it get less of the thread.
const LARGE: usize = 16 << 10;

#[derive(Debug, Default)]
pub struct Gate(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Requests taken up in this round.
    begun: usize,
    waiting: VecDeque<Waker>,
    /// Tickets whose turn has come; those who wait have the next numbers.
    called: u64,
    /// For how many more rounds everybody enters at once.
    free_rounds: u8,
    /// A task of its own goes with the rounds.
    is_turning: bool,
    /// There are no more rounds.
    is_open: bool,
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

    /// Ready when a request may be taken up. To be polled by one task, again and again.
    pub fn poll_enter(self: &Arc<Self>, ticket: &mut Ticket, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.inner();
        if let Some(number) = ticket.0 {
            if number >= inner.called {
                return Poll::Pending;
            }
            ticket.0 = None;
            return Poll::Ready(());
        }
        let is_free = inner.is_open || inner.free_rounds > 0;
        let enters = is_free || inner.begun < MOST && inner.waiting.is_empty();
        if enters {
            inner.begun += 1;
        } else {
            ticket.0 = Some(inner.called + inner.waiting.len() as u64);
            inner.waiting.push_back(cx.waker().clone());
        }
        let counts_rounds = !enters || inner.free_rounds > 0;
        if counts_rounds && !inner.is_turning {
            inner.is_turning = true;
            tokio::spawn(go_round(Arc::clone(self)));
        }
        if enters {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Tells of how many bytes a client has taken of an answer at once.
    pub fn passed_on(&self, count: usize) {
        if count >= LARGE {
            // The one under way, and the next until the answer's turn in it.
            self.inner().free_rounds = 2;
        }
    }

    /// Has everybody enter at once, from now on.
    pub fn open(&self) {
        let mut inner = self.inner();
        inner.is_open = true;
        inner.call(usize::MAX);
    }
}

impl Inner {
    fn call(&mut self, most: usize) {
        let next = self.waiting.len().min(most);
        self.begun = next;
        self.called += next as u64;
        self.waiting.drain(..next).for_each(Waker::wake);
    }
}

async fn go_round(gate: Arc<Gate>) {
    loop {
        // Until all that is ready has been looked at, sockets included.
        tokio::task::yield_now().await;
        let mut inner = gate.inner();
        inner.free_rounds = inner.free_rounds.saturating_sub(1);
        let part = inner.waiting.len() / PART;
        let most = if inner.free_rounds > 0 {
            usize::MAX
        } else {
            MOST.max(part)
        };
        inner.call(most);
        if inner.begun == 0 && inner.free_rounds == 0 {
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

    fn on_a_thread(work: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(work);
    }

    fn tickets(count: usize) -> Vec<Ticket> {
        (0..count).map(|_| Ticket::default()).collect()
    }

    async fn rounds_end(gate: &Arc<Gate>) {
        for _ in 0..3 {
            yield_now().await;
        }
        assert!(!gate.inner().is_turning, "nobody waits");
    }

    async fn all_enter_in_turn(gate: &Arc<Gate>, count: usize) {
        let mut waiting = tickets(count);
        let mut rounds = 0;
        while !waiting.is_empty() {
            let entered: Vec<bool> = waiting
                .iter_mut()
                .map(|ticket| enters(gate, ticket))
                .collect();
            let number = entered.iter().take_while(|entered| **entered).count();
            let most = MOST.max(waiting.len() / PART);
            assert!(number <= most, "{number} at once");
            assert!(!entered[number..].contains(&true), "out of turn");
            waiting.drain(..number);
            assert!(waiting.iter().all(Ticket::is_held));
            rounds += 1;
            assert!(rounds <= 3 * count, "{} never enter", waiting.len());
            yield_now().await;
        }
        assert!(rounds > 1 || count <= MOST);
    }

    #[test]
    fn many_who_come_at_once_enter_a_few_at_a_time_and_in_turn() {
        on_a_thread(async {
            let gate = Arc::new(Gate::default());
            for count in [1, MOST, 5 * MOST + 1, 3] {
                all_enter_in_turn(&gate, count).await;
                rounds_end(&gate).await;
                assert!(gate.inner().waiting.is_empty());
            }
        });
    }

    #[test]
    fn who_leaves_the_queue_holds_nobody_up() {
        on_a_thread(async {
            let gate = Arc::new(Gate::default());
            let mut gone = tickets(3 * MOST);
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

    #[test]
    fn beside_a_download_at_full_speed_nobody_waits_for_more_than_a_round() {
        on_a_thread(async {
            let gate = Arc::new(Gate::default());
            let all_enter = |count: usize| {
                let mut tickets = tickets(count);
                let entered = tickets.iter_mut().map(|ticket| enters(&gate, ticket));
                (entered.filter(|entered| *entered).count() == count, tickets)
            };
            // It came alone, and then others did.
            gate.passed_on(LARGE);
            assert!(all_enter(9 * MOST).0);
            rounds_end(&gate).await;

            // Others wait when it comes.
            gate.passed_on(LARGE - 1);
            let (all, mut waiting) = all_enter(9 * MOST);
            assert!(!all, "the download is over, and another one small");
            gate.passed_on(LARGE);
            yield_now().await;
            yield_now().await;
            waiting.retain_mut(|ticket| ticket.is_held() && !enters(&gate, ticket));
            assert!(waiting.is_empty(), "{} wait", waiting.len());
            for _ in 0..5 {
                gate.passed_on(LARGE);
                assert!(all_enter(9 * MOST).0, "whoever comes later");
                yield_now().await;
            }
            rounds_end(&gate).await;
            assert!(!all_enter(9 * MOST).0, "the download is over");
        });
    }

    #[test]
    fn an_open_gate_holds_nobody() {
        on_a_thread(async {
            let gate = Arc::new(Gate::default());
            let mut tickets = tickets(9 * MOST);
            let mut enter = |gate| tickets.iter_mut().all(|ticket| enters(gate, ticket));
            assert!(!enter(&gate));
            gate.open();
            assert!(enter(&gate));
            assert!(enter(&gate), "and whoever comes later");
        });
    }
}
