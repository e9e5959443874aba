//! How long a server's event loop stands still: a client of its own sends PING
//! after PING and keeps the longest round trips. Of a server with `turns` in it (see
//! turns/), it also has what that says.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
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
    /// A turn of the server's event loop without waits for a processor; 0 where
    /// nothing tells of it, as for the next.
    pub turn: f64,
    /// The main thread's CPU time in a turn.
    pub cpu: f64,
}

impl Stall {
    fn keep_longest(&mut self, other: Self) {
        self.trip = self.trip.max(other.trip);
        self.own = self.own.max(other.own);
        self.turn = self.turn.max(other.turn);
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
    let process = process_id(stream, &mut replies);
    let server = format!("/proc/{process}/task/{process}/schedstat");
    let turns = Turns::open(process);
    let mut line = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let before = waited(&server) + waited("/proc/thread-self/schedstat");
        let start = Instant::now();
        (&mut { stream }).write_all(b"PING\r\n").unwrap();
        line.clear();
        // While it loads, the reply is an error, as quick as any.
        replies.read_until(b'\n', &mut line).unwrap();
        let trip = start.elapsed().as_nanos() as f64;
        let after = waited(&server) + waited("/proc/thread-self/schedstat");
        longest.keep_longest(Stall {
            trip: trip / 1e6,
            own: (trip - (after - before)).max(0.0) / 1e6,
            ..Stall::default()
        });
    }
    if let Some(turns) = turns {
        // Once this is answered, the turn of the last reply is over.
        (&mut { stream }).write_all(b"PING\r\n").unwrap();
        replies.read_until(b'\n', &mut line).unwrap();
        longest.keep_longest(turns.longest());
    }
}

/// The longest turns from when this is made on: not what a load begins with.
struct Turns(File);

impl Turns {
    fn open(process: u32) -> Option<Self> {
        let name = format!("/proc/{process}/cwd/turns");
        let file = File::options().read(true).write(true).open(name).ok()?;
        file.write_all_at(&[0; 16], 0).unwrap();
        Some(Self(file))
    }

    fn longest(&self) -> Stall {
        let [turn, cpu] = [0, 8].map(|offset| {
            let mut time = [0; 8];
            self.0.read_exact_at(&mut time, offset).unwrap();
            u64::from_ne_bytes(time) as f64 / 1e6
        });
        Stall {
            turn,
            cpu,
            ..Stall::default()
        }
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

/// How long a thread has waited for a processor, in ns.
fn waited(file: &str) -> f64 {
    let text = fs::read_to_string(file).unwrap();
    text.split(' ').nth(1).unwrap().parse().unwrap()
}
