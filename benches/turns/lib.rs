//! How long the turns of a server's event loop take, seen from within: preloaded
//! (`LD_PRELOAD`), this stands in for `epoll_wait`, and what the main thread does
//! between two calls of it is a turn. A client's round trip has a turn or two in it, and
//! whatever keeps the client or the machine.
//!
//! The file `turns` in the server's folder has the longest since it was overwritten
//! with zeros, in ns, each as 8 bytes in the machine's order: the time of a turn without
//! waits for a processor, and the CPU time of one. Turns under 0.1 ms don't count.

#![expect(
    unsafe_code,
    reason = "it stands in for a function of the system's library"
)]

use libc::{c_int, clockid_t, epoll_event, timespec};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Turns shorter than this are not looked at, in ns.
const SHORT: u64 = 100_000;

thread_local! {
    /// The main thread's alone has anything in it.
    static TURNS: RefCell<Option<Turns>> = RefCell::new(Turns::of_main_thread());
}

struct Turns {
    /// The thread's `schedstat`, whose second number is how long it has waited for a processor.
    schedule: File,
    longest: File,
    began: Option<Times>,
}

/// In ns.
struct Times {
    clock: u64,
    cpu: u64,
    waited: u64,
}

impl Turns {
    fn of_main_thread() -> Option<Self> {
        // SAFETY: both only answer a number.
        let is_main = unsafe { libc::gettid() == libc::getpid() };
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        is_main.then_some(())?;
        Some(Self {
            schedule: File::open("/proc/thread-self/schedstat").ok()?,
            longest: options.open("turns").ok()?,
            began: None,
        })
    }

    fn times(&self) -> Option<Times> {
        let mut text = [0; 64];
        let length = self.schedule.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(text.get(..length)?).ok()?;
        Some(Times {
            clock: time(libc::CLOCK_MONOTONIC)?,
            cpu: time(libc::CLOCK_THREAD_CPUTIME_ID)?,
            waited: text.split(' ').nth(1)?.parse().ok()?,
        })
    }

    fn begin(&mut self) {
        self.began = self.times();
    }

    fn end(&mut self) -> Option<()> {
        let began = self.began.take()?;
        if time(libc::CLOCK_MONOTONIC)?.saturating_sub(began.clock) < SHORT {
            return None;
        }
        let ended = self.times()?;
        let waited = ended.waited.saturating_sub(began.waited);
        let own = ended.clock.saturating_sub(began.clock);
        let cpu = ended.cpu.saturating_sub(began.cpu);
        for (time, offset) in [(own.saturating_sub(waited), 0), (cpu, 8)] {
            let mut longest = [0; 8];
            // At first there is nothing in it.
            let _ = self.longest.read_at(&mut longest, offset).ok()?;
            if time > u64::from_ne_bytes(longest) {
                self.longest.write_at(&time.to_ne_bytes(), offset).ok()?;
            }
        }
        Some(())
    }
}

fn time(clock: clockid_t) -> Option<u64> {
    let mut time = timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it is written to while it is borrowed.
    let done = unsafe { libc::clock_gettime(clock, &raw mut time) };
    let nanoseconds = time.tv_sec * 1_000_000_000 + time.tv_nsec;
    (done == 0).then(|| nanoseconds.unsigned_abs())
}

/// # Safety
/// As for the one of the system's library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(
    epoll: c_int,
    events: *mut epoll_event,
    most: c_int,
    timeout: c_int,
) -> c_int {
    TURNS.with_borrow_mut(|turns| turns.as_mut().and_then(Turns::end));
    // SAFETY: the caller's own arguments; no signals to be held back.
    let ready = unsafe { libc::epoll_pwait(epoll, events, most, timeout, std::ptr::null()) };
    // What is asked of the system here leaves a value of its own.
    let error = std::io::Error::last_os_error().raw_os_error();
    TURNS.with_borrow_mut(|turns| {
        if let Some(turns) = turns {
            turns.begin();
        }
    });
    if let Some(error) = error {
        // SAFETY: the place where this thread's last error stands.
        unsafe { *libc::__errno_location() = error };
    }
    ready
}
