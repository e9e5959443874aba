//! Room for futures that is used again and again. What becomes of a request is
//! large, and to have memory for it anew each time costs more than most that is
//! done there.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

/// Empty rooms that are kept.
const SPARE: usize = 128;

type Room<F> = Pin<Box<Option<F>>>;

struct Rooms<F>(Mutex<Vec<Room<F>>>);

impl<F> Rooms<F> {
    fn spare(&self) -> MutexGuard<'_, Vec<Room<F>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A future in its room.
pub struct InRoom<F> {
    /// Nothing once it has been left.
    room: Option<Room<F>>,
    rooms: Arc<Rooms<F>>,
}

/// Has the futures that a function makes live in rooms of its own.
pub fn in_rooms<A, F>(make: impl Fn(A) -> F + Clone) -> impl Fn(A) -> InRoom<F> + Clone {
    let rooms = Arc::new(Rooms(Mutex::default()));
    move |argument| {
        let spare = rooms.spare().pop();
        let mut room = spare.unwrap_or_else(|| Box::pin(None));
        room.set(Some(make(argument)));
        InRoom {
            room: Some(room),
            rooms: Arc::clone(&rooms),
        }
    }
}

impl<F: Future> Future for InRoom<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let room = self.room.as_mut();
        let future = room.and_then(|room| room.as_mut().as_pin_mut());
        future.map_or(Poll::Pending, |future| future.poll(cx))
    }
}

impl<F> Drop for InRoom<F> {
    fn drop(&mut self) {
        if let Some(mut room) = self.room.take() {
            room.set(None);
            let mut spare = self.rooms.spare();
            if spare.len() < SPARE {
                spare.push(room);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_future_is_gone_with_its_place_and_its_room_is_used_again() {
        let held = Arc::new(());
        let serve = in_rooms(|(held, ends): (Arc<()>, bool)| async move {
            if !ends {
                std::future::pending::<()>().await;
            }
            Arc::strong_count(&held)
        });
        let mut rooms = Vec::new();
        for ends in [false, true, false] {
            let mut future = serve((Arc::clone(&held), ends));
            rooms.push(std::ptr::from_ref(&*future.room.as_ref().unwrap().as_ref()));
            assert_eq!((&mut future).now_or_never(), ends.then_some(2));
            drop(future);
            assert_eq!(Arc::strong_count(&held), 1);
        }
        assert!(rooms.iter().all(|room| *room == rooms[0]));
        let many: Vec<_> = (0..SPARE + 5)
            .map(|_| serve((Arc::clone(&held), false)))
            .collect();
        let kept = Arc::clone(&many[0].rooms);
        drop(many);
        assert_eq!(kept.spare().len(), SPARE);
    }
}
