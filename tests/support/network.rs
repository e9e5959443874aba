//! Machines for servers, as network namespaces on one bridge, whose cables can
//! be pulled. All of it is in a namespace of the test's own, which takes no
//! rights that a user mayn't have, and is gone with its processes.

use std::process::{Child, Command, Stdio};

/// Where a server runs: its address, and what puts its process there.
#[derive(Clone, Debug)]
pub struct Place {
    pub host: String,
    pub within: Vec<String>,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            within: Vec::new(),
        }
    }
}

impl Place {
    /// The command that runs the program there.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self.within.split_first() {
            None => Command::new(program),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        }
    }
}

/// Set in a test that runs in a network of its own.
const INSIDE: &str = "MPOOL_TEST_INSIDE_NETWORK";

/// The program and its arguments, which must succeed.
#[track_caller]
fn run(line: &str) {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status();
    assert!(status.is_ok_and(|status| status.success()), "{line}");
}

/// Runs the calling test in a network of its own: true where that has been done,
/// and nothing is left to do. False in there, and where the machine allows none.
#[track_caller]
pub fn done_in_own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let own = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", program]);
        command
    };
    let all = "ip link add name switch type bridge && ip link add name near type veth peer name far \
               && unshare --net true && nsenter --net=/proc/self/ns/net true";
    let probe = own("sh")
        .args(["-c", all])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("no network namespaces here: nodes that are cut off are frozen instead");
        return false;
    }
    let this = std::env::current_exe().unwrap();
    let status = own(this.to_str().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status();
    assert!(status.unwrap().success(), "{test} failed, see above");
    true
}

/// A switch, and machines that are plugged into it. Gone with this value.
#[derive(Debug)]
pub struct Network {
    /// Each keeps a namespace there until its standard input ends, which it does
    /// with this process, whatever way.
    machines: Vec<Child>,
}

impl Network {
    /// None where the machine allows none, see [`done_in_own_network`].
    pub fn new(machines: usize) -> Option<Self> {
        std::env::var_os(INSIDE)?;
        run("ip link set lo up");
        run("ip link add name switch type bridge");
        run("ip address add 10.77.0.254/24 dev switch");
        run("ip link set switch up");
        let mut network = Self {
            machines: Vec::new(),
        };
        for number in 0..machines {
            let holder = Command::new("unshare")
                .args(["--net", "sh", "-c", "echo up; exec cat"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn();
            let mut holder = holder.unwrap();
            // It is there once it has said so.
            let mut word = [0; 3];
            let stdout = holder.stdout.as_mut().unwrap();
            std::io::Read::read_exact(stdout, &mut word).unwrap();
            let (pid, host) = (holder.id(), host(number));
            network.machines.push(holder);
            let inside = format!("nsenter --net=/proc/{pid}/ns/net ip");
            run(&format!(
                "ip link add name cable{number} type veth peer name eth0 netns {pid}"
            ));
            run(&format!("ip link set cable{number} master switch up"));
            run(&format!("{inside} address add {host}/24 dev eth0"));
            run(&format!("{inside} link set eth0 up"));
            run(&format!("{inside} link set lo up"));
        }
        Some(network)
    }

    pub fn place(&self, number: usize) -> Place {
        let pid = self.machines[number].id();
        Place {
            host: host(number),
            within: vec!["nsenter".to_owned(), format!("--net=/proc/{pid}/ns/net")],
        }
    }

    /// Nothing comes or goes any more, and nobody is told.
    pub fn pull(&self, number: usize) {
        run(&format!("ip link set cable{number} down"));
    }

    pub fn plug_in(&self, number: usize) {
        run(&format!("ip link set cable{number} up"));
    }
}

fn host(number: usize) -> String {
    format!("10.77.0.{}", number + 1)
}

impl Drop for Network {
    fn drop(&mut self) {
        for machine in &mut self.machines {
            let _ = machine.kill();
            let _ = machine.wait();
        }
        let _ = Command::new("ip")
            .args(["link", "delete", "switch"])
            .status();
    }
}
