//! How long a server's event loop stands still: a client of its own sends PING
//! after PING and keeps the longest round trips.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// The longest that the probe saw, in ms.
#[derive(Clone, Copy, Default)]
pub struct Stall {
    /// A round trip, with all that the machine adds to it.
    pub trip: f64,
    /// A round trip without the time in which the server's main thread, or the
    /// probe, could have run but had no processor. Waits for a thread of the
    /// module are in it.
    pub own: f64,
    /// CPU time of the server's main thread within one round trip.
    pub cpu: f64,
}

impl Stall {
    fn keep_longest(&mut self, other: Self) {
        self.trip = self.trip.max(other.trip);
        self.own = self.own.max(other.own);
        self.cpu = self.cpu.max(other.cpu);
    }
}

pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Stall>,
}

impl Probe {
    /// Begins when something listens on the port, also if it still loads.
    pub fn start(port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut longest = Stall::default();
            while !stopped.load(Ordering::Relaxed) {
                // Where nothing listens yet, a connection can meet itself.
                match TcpStream::connect(("127.0.0.1", port)) {
                    Ok(stream) if stream.local_addr().unwrap().port() != port => {
                        ping(&stream, &stopped, &mut longest);
                    }
                    _ => sleep(Duration::from_millis(5)),
                }
            }
            longest
        });
        Self { stop, thread }
    }

    pub fn stop(self) -> Stall {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// What the probe sees while that is done.
pub fn stall_of(port: u16, work: impl FnOnce()) -> Stall {
    let probe = Probe::start(port);
    work();
    probe.stop()
}

fn ping(stream: &TcpStream, stop: &AtomicBool, longest: &mut Stall) {
    stream.set_nodelay(true).unwrap();
    let mut replies = BufReader::new(stream);
    let server = format!(
        "/proc/{0}/task/{0}/schedstat",
        process_id(stream, &mut replies)
    );
    let mut line = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let before = (times(&server), times("/proc/thread-self/schedstat"));
        let start = Instant::now();
        (&mut { stream }).write_all(b"PING\r\n").unwrap();
        line.clear();
        // While it loads, the reply is an error, as quick as any.
        replies.read_until(b'\n', &mut line).unwrap();
        let trip = start.elapsed().as_nanos() as f64;
        let after = (times(&server), times("/proc/thread-self/schedstat"));
        let waited = after.0.1 - before.0.1 + after.1.1 - before.1.1;
        longest.keep_longest(Stall {
            trip: trip / 1e6,
            own: (trip - waited).max(0.0) / 1e6,
            cpu: (after.0.0 - before.0.0) / 1e6,
        });
    }
}

fn process_id(mut stream: &TcpStream, replies: &mut impl BufRead) -> u32 {
    stream.write_all(b"INFO server\r\n").unwrap();
    let mut length = String::new();
    replies.read_line(&mut length).unwrap();
    let length: u64 = length.trim_start_matches('$').trim().parse().unwrap();
    let mut text = String::new();
    replies.take(length + 2).read_to_string(&mut text).unwrap();
    let id = text
        .lines()
        .find_map(|line| line.strip_prefix("process_id:"));
    id.unwrap().parse().unwrap()
}

/// A thread's time on a processor, and waiting for one, in ns.
fn times(file: &str) -> (f64, f64) {
    let text = fs::read_to_string(file).unwrap();
    let mut numbers = text.split(' ').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}
