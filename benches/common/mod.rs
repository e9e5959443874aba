//! What the benchmarks share: servers, a client that sends pipelines, figures'
//! medians, and the page of results.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each benchmark uses a part of it"
)]

pub mod page;
pub mod probe;
#[path = "../../tests/support/mod.rs"]
pub mod support;

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::str::FromStr;
use std::time::Instant;

/// Calls that are sent before their answers are read.
pub const PIPELINE: usize = 32;

pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

pub fn extreme(figures: &[f64], pick: fn(f64, f64) -> f64) -> f64 {
    figures.iter().copied().reduce(pick).unwrap_or_default()
}

/// Says what is going on: on a terminal in a line that the page then replaces.
pub fn progress(text: &str) {
    if !std::io::stderr().is_terminal() {
        eprintln!("{text}");
    } else {
        eprint!("\r\x1b[K{text}\r");
    }
}

/// The median, with the least and the most.
pub fn spread(figures: &[f64]) -> String {
    format!("{} {}", short(median(figures)), range(figures))
}

/// The least and the most.
pub fn range(figures: &[f64]) -> String {
    let (least, most) = (extreme(figures, f64::min), extreme(figures, f64::max));
    format!("({}-{})", short(least), short(most))
}

/// Three digits that count.
pub fn short(figure: f64) -> String {
    let digits = figure.abs().max(1e-9).log10().floor();
    let decimals = (2.0 - digits).clamp(0.0, 2.0) as usize;
    format!("{figure:.decimals$}")
}

/// Two lists' figures put together, pair by pair: one round's with the same round's.
pub fn pairs(one: &[f64], other: &[f64], put: fn(f64, f64) -> f64) -> Vec<f64> {
    let both = one.iter().zip(other);
    both.map(|(one, other)| put(*one, *other)).collect()
}

/// Numbers that look scattered, the same in each run (splitmix64's finish).
pub fn mix(number: u64) -> u64 {
    let mut mixed = number
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(0x1234_5678);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// What the environment says under `MPOOL_BENCH_…`.
pub fn setting<T: FromStr>(name: &str, default: T) -> T {
    let name = format!("MPOOL_BENCH_{name}");
    match std::env::var(&name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is wrong: {text}")),
        Err(_) => default,
    }
}

pub fn pack(words: &[&str]) -> Vec<u8> {
    let mut command = redis::Cmd::new();
    for word in words {
        command.arg(*word);
    }
    command.get_packed_command()
}

/// Registers a client key that ends in the year 5138.
pub fn registration(key: &str) -> Vec<u8> {
    let name = format!("client_keys:{key}");
    let words = ["HSET", &name, "tier", "medium", "use_pool", "true"];
    let rest = ["active", "true", "expires_at", "99999999999999"];
    pack(&[&words[..], &rest].concat())
}

/// Writes a key's lease as the module does: of the first account, the second one being the
/// one before, from `last` to `next`.
pub fn plain_lease(key: &str, [account, before]: [&str; 2], last: &str, next: &str) -> Vec<u8> {
    let name = format!("key_rotation:{key}");
    let words = ["HSET", &name, "account", account, "next_rotation", next];
    let rest = ["last_rotation", last, "previous_account", before];
    pack(&[&words[..], &rest].concat())
}

/// The name of an account's counter.
pub fn slots_key(account: &str) -> String {
    format!("medium_pool:slots:{account}")
}

/// Writes an account's counter.
pub fn plain_slots(account: &str, used: &str) -> Vec<u8> {
    pack(&["SET", &slots_key(account), used])
}

/// A connection that sends pipelines and reads past replies as fast as it can.
pub struct Link {
    stream: TcpStream,
    replies: BufReader<TcpStream>,
}

impl Link {
    pub fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        let replies = BufReader::with_capacity(1 << 16, stream.try_clone().unwrap());
        Self { stream, replies }
    }

    pub fn run(&mut self, calls: impl IntoIterator<Item = Vec<u8>>) {
        self.run_each(calls, 1);
    }

    /// Sends pipelines of calls that are answered with so many replies each.
    fn run_each(&mut self, calls: impl IntoIterator<Item = Vec<u8>>, replies: usize) {
        let mut batch = Vec::new();
        let mut waiting = 0;
        for call in calls {
            batch.extend(call);
            waiting += replies;
            if waiting >= PIPELINE {
                self.flush(&mut batch, &mut waiting);
            }
        }
        self.flush(&mut batch, &mut waiting);
    }

    fn flush(&mut self, batch: &mut Vec<u8>, waiting: &mut usize) {
        self.stream.write_all(batch).unwrap();
        batch.clear();
        for _ in 0..std::mem::take(waiting) {
            self.skip_reply();
        }
    }

    fn skip_reply(&mut self) {
        let mut line = Vec::new();
        self.replies.read_until(b'\n', &mut line).unwrap();
        let text = String::from_utf8_lossy(&line);
        let number = || text[1..].trim().parse::<i64>().unwrap();
        match line[0] {
            b'*' => (0..number()).for_each(|_| self.skip_reply()),
            b'$' if number() >= 0 => {
                let length = number() as u64 + 2;
                std::io::copy(&mut (&mut self.replies).take(length), &mut std::io::sink()).unwrap();
            }
            b'-' => panic!("{text}"),
            _ => {}
        }
    }

    /// CPU time of the process for the calls in pipelines, in ns.
    pub fn piped(&mut self, pid: u32, calls: Vec<Vec<u8>>) -> f64 {
        self.piped_each(pid, calls, 1)
    }

    pub fn piped_each(&mut self, pid: u32, calls: Vec<Vec<u8>>, replies: usize) -> f64 {
        let before = cpu_time(pid);
        self.run_each(calls, replies);
        (cpu_time(pid) - before) as f64
    }

    /// Time for the calls, in ns, of a client that waits for each answer: the
    /// median call's for each, as a pause of the machine's would cost many.
    pub fn awaited(&mut self, calls: Vec<Vec<u8>>) -> f64 {
        self.awaited_each(calls, 1)
    }

    pub fn awaited_each(&mut self, calls: Vec<Vec<u8>>, replies: usize) -> f64 {
        let mut times = Vec::with_capacity(calls.len());
        for mut call in calls {
            let start = Instant::now();
            self.flush(&mut call, &mut { replies });
            times.push(start.elapsed().as_nanos() as f64);
        }
        median(&times) * times.len() as f64
    }
}

/// CPU time of a process's main thread, in ns.
pub fn cpu_time(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}
