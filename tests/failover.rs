//! A primary that fails under load, its replicas and three Sentinels, all real:
//! what replicas had confirmed is still true on the next primary, every node
//! holds the same in the end, its view is what a rebuild makes of that, and the
//! forwarder follows.
//!
//! `MPOOL_FAILOVER_ROUNDS` says how many primaries fail (3). The seed is printed;
//! `MPOOL_TEST_SEED=…` has what the clients send, the kinds of failure and their
//! moments, in replies, again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod proxy;
mod support;

use proxy::{Forwarder, Upstream};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use redis::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};
use support::load::{Shared, Shift, Worker, check_every_slot, check_strangers, hold_to_account};
use support::network::{Network, Place, done_in_own_network};
use support::sentinels::Sentinels;
use support::*;

const NODES: usize = 3;
const ACCOUNTS: [&str; 5] = ["a", "b", "c", "d", "e"];
/// How long a node may be silent before it counts as down.
const DOWN_AFTER: Duration = Duration::from_millis(2000);

/// How a primary fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// It is gone at once.
    Kill,
    /// It runs on with those clients that are on its side of the cut.
    CutOff,
    /// It stands still for a while and knows nothing of what happened.
    Freeze,
    /// It runs on, a Sentinel was told to promote another.
    Replace,
}

impl Failure {
    /// In this order, so that a short run has what differs most.
    const ALL: [Self; 4] = [Self::Kill, Self::CutOff, Self::Replace, Self::Freeze];
}

/// Three nodes, a Sentinel beside each.
struct Cluster {
    nodes: Vec<Server>,
    sentinels: Sentinels,
    primary: usize,
    /// Dropped after what runs in it.
    network: Option<Network>,
}

impl Cluster {
    #[track_caller]
    fn start(network: Option<Network>, options: [Options; NODES]) -> Self {
        let places: [Place; NODES] = std::array::from_fn(|number| match &network {
            Some(network) => network.place(number),
            None => Place::default(),
        });
        let options = options.into_iter().zip(&places);
        let nodes: Vec<Server> = options
            .map(|(options, place)| {
                let place = place.clone();
                let options = Options { place, ..options };
                // For clients on the node's own side of a cut.
                options.server(&["--unixsocket", "socket"]).start()
            })
            .collect();
        for node in &nodes[1..] {
            follow(node, &nodes[0]);
        }
        for node in &nodes[1..] {
            wait_for_same(&mut nodes[0].connect(), &mut node.connect());
        }
        let sentinels = Sentinels::watch(&nodes[0], NODES - 1, &places, None, DOWN_AFTER);
        Self {
            nodes,
            sentinels,
            primary: 0,
            network,
        }
    }

    fn primary(&self) -> &Server {
        &self.nodes[self.primary]
    }

    fn strike(&mut self, failure: Failure) {
        let number = self.primary;
        match (failure, &self.network) {
            (Failure::Kill, _) => self.nodes[number].kill(),
            (Failure::CutOff, Some(network)) => network.pull(number),
            (Failure::CutOff | Failure::Freeze, _) => self.primary().signal("STOP"),
            // See `wait_for_promotion`.
            (Failure::Replace, _) => {}
        }
    }

    /// Waits until the two Sentinels on the other nodes agree on another primary,
    /// and the replica that is left follows it. Answers the one before.
    #[track_caller]
    fn wait_for_promotion(&mut self, failure: Failure) -> usize {
        let old = self.primary;
        let others = [1, 2].map(|step| (old + step) % NODES);
        let mut asked: Option<Instant> = None;
        let new = wait_for("another primary", || {
            // Sentinels may give it up, or find no replica good enough.
            let ask = asked.is_none_or(|asked| asked.elapsed() > Duration::from_secs(4));
            if failure == Failure::Replace && ask {
                asked = Some(Instant::now());
                let words = ["SENTINEL", "FAILOVER", "pool"];
                let _ = self.sentinels.connect(others[0])?.try_run::<Value>(&words);
            }
            self.agreed(&others).filter(|&new| new != old)
        });
        let third = NODES - old - new;
        wait_for("the other replica to follow", || {
            follows(&self.nodes[third], &self.nodes[new])
        });
        self.primary = new;
        old
    }

    /// The primary that these Sentinels agree on, if it knows that it is.
    fn agreed(&self, sentinels: &[usize]) -> Option<usize> {
        let named = sentinels
            .iter()
            .map(|&number| self.sentinels.primary(number));
        let named: Option<Vec<(String, u16)>> = named.collect();
        let (first, others) = named.as_deref()?.split_first()?;
        let is_it = |node: &Server| (node.host(), node.port) == (first.0.as_str(), first.1);
        let number = self.nodes.iter().position(is_it)?;
        let all = others.iter().all(|other| other == first);
        (all && role(&self.nodes[number])? == "master").then_some(number)
    }

    /// Waits until all agree on a primary. A busy machine may have looked like one
    /// more failure to the Sentinels meanwhile. The others are told to follow it,
    /// as Sentinels do some seconds later, unless `patient`.
    #[track_caller]
    fn settle(&mut self, patient: bool) {
        self.primary = wait_for("the Sentinels to agree", || self.agreed(&[0, 1, 2]));
        for node in (0..NODES).filter(|&node| node != self.primary && !patient) {
            follow(&self.nodes[node], self.primary());
        }
    }

    /// Brings the one back that failed.
    fn mend(&mut self, failure: Failure, old: usize) {
        match (failure, &self.network) {
            (Failure::Kill, _) => self.nodes[old].launch(),
            (Failure::CutOff, Some(network)) => network.plug_in(old),
            (Failure::CutOff | Failure::Freeze, _) => self.nodes[old].signal("CONT"),
            (Failure::Replace, _) => {}
        }
    }

    /// Waits until every node has what the primary has; then all must hold the
    /// same, and have the view of it that a rebuild makes.
    #[track_caller]
    fn check_all_alike(&mut self) {
        let mut primary = self.primary().connect();
        let others = (0..NODES).filter(|&number| number != self.primary);
        for number in others {
            let node = &self.nodes[number];
            wait_for("the replica to follow", || follows(node, self.primary()));
            wait_for("the replica to catch up", || {
                let offset = primary.info("replication", "master_repl_offset");
                let seen = info(node, "slave_repl_offset")?;
                (seen == offset).then_some(())
            });
            let mut replica = node.connect();
            assert_eq!(replica.traces().0, primary.traces().0, "node {number}");
            assert_eq!(replica.broken_invariant(2), None, "node {number}");
            for key in primary.run::<Vec<String>>(&["KEYS", "client_keys:*"]) {
                let key = key.strip_prefix("client_keys:").unwrap();
                let words = ["MPOOL.STATUS", "KEY", key, "NOW", "1"];
                let [one, other]: [Value; 2] = [primary.run(&words), replica.run(&words)];
                assert_eq!(one, other, "node {number}");
            }
            // A replica compares its view for those alone that may write there.
            replica.ok(&["CONFIG", "SET", "replica-read-only", "no"]);
            replica.check_repair();
            replica.ok(&["CONFIG", "SET", "replica-read-only", "yes"]);
        }
        primary.check_repair();
        for node in &mut self.nodes {
            assert!(node.is_alive());
        }
    }
}

/// What `INFO replication` of a server says, which need not be there.
fn info(server: &Server, name: &str) -> Option<String> {
    replication(server)?.get(name)
}

fn replication(server: &Server) -> Option<redis::InfoDict> {
    let client = redis::Client::open(server.url()).unwrap();
    let patience = Duration::from_secs(1);
    let mut connection = client.get_connection_with_timeout(patience).ok()?;
    connection.set_read_timeout(Some(patience)).ok()?;
    let mut command = redis::cmd("INFO");
    command.arg("replication").query(&mut connection).ok()
}

fn role(server: &Server) -> Option<String> {
    info(server, "role")
}

/// Whether it has been told to follow that one, and does, by the word of both:
/// a primary hands over to none whose acknowledgement it still awaits.
fn follows(server: &Server, primary: &Server) -> Option<()> {
    let (own, replicas) = (replication(server)?, replication(primary)?);
    let of = |name: &str| own.get::<String>(name);
    let host = of("master_host")? == primary.host();
    let port = of("master_port")? == primary.port.to_string();
    let up = of("master_link_status")? == "up";
    let as_online = format!("port={},state=online", server.port);
    let online = (0..2).any(|number| {
        let line: Option<String> = replicas.get(&format!("slave{number}"));
        line.is_some_and(|line| line.contains(&as_online))
    });
    (host && port && up && online).then_some(())
}

#[track_caller]
fn follow(server: &Server, primary: &Server) {
    let words = ["REPLICAOF", primary.host(), &primary.port.to_string()];
    server.connect().ok(&words);
}

/// A client on the node's own side of a cut.
fn nearby(server: &Server) -> Client {
    let socket = server.folder.path().join("data/socket");
    Client::open(&format!("unix://{}", socket.display()))
}

/// A client that gives an answer up after a while.
fn impatient(server: &Server) -> Client {
    let client = server.connect();
    let patience = Some(Duration::from_secs(3));
    client.connection.set_read_timeout(patience).unwrap();
    client
}

fn unix_ms() -> i64 {
    let elapsed = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    elapsed.as_millis().try_into().unwrap()
}

/// An upstream that answers with the credential it was sent.
fn echo() -> Upstream {
    Upstream::start(|exchange| {
        let token = exchange.token().unwrap();
        exchange.respond(200, &[], token.as_bytes());
    })
}

type Counts = BTreeMap<String, u64>;

fn count(counts: &mut Counts, what: impl Into<String>, number: usize) {
    *counts.entry(what.into()).or_default() += number as u64;
}

/// Lets everybody stop, by way of a panic too.
struct Ends<'a>(&'a Shift);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Looks at a node, whatever becomes of it, again and again: whenever it answers,
/// its counters must agree with its leases. Answers how often it has.
#[track_caller]
fn keep_looking(url: &str, shift: &Shift) -> usize {
    let client = redis::Client::open(url).unwrap();
    let patience = Duration::from_secs(1);
    let mut looks = 0;
    while !shift.is_over() {
        let connection = client.get_connection_with_timeout(patience);
        if let Ok(connection) = connection {
            connection.set_read_timeout(Some(patience)).unwrap();
            let mut client = Client { connection };
            while let (false, Ok(broken)) = (shift.is_over(), client.try_broken_invariant(2)) {
                assert_eq!(broken, None, "{url}");
                looks += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    looks
}

/// Clients of a forwarder that knows Redis by its Sentinels alone. Their keys
/// are bound: the real clock that a forwarder goes by is not the workers'.
struct Guests<'a> {
    forwarder: Forwarder,
    keys: Vec<String>,
    upstream: &'a Upstream,
}

impl<'a> Guests<'a> {
    #[track_caller]
    fn new(cluster: &Cluster, upstream: &'a Upstream) -> Self {
        let forwarder = Forwarder::between(cluster.sentinels.url().as_str(), upstream).start();
        let mut guests = Self {
            forwarder,
            keys: Vec::new(),
            upstream,
        };
        guests.admit_another(cluster);
        guests
    }

    /// Asks again and again; one that has been served goes on to be.
    #[track_caller]
    fn keep_asking(&self, shift: &Shift) -> usize {
        let mut answers = 0;
        while !shift.is_over() {
            let answer = self.forwarder.client().get("/", &self.keys[0]);
            assert_eq!(answer.status(), 200, "{answer:?}");
            answers += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        answers
    }

    #[track_caller]
    fn wait_for_good(&self, key: &str) {
        wait_for("a good answer", || {
            let answer = self.forwarder.client().get("/", key);
            let good = answer.status() == 200;
            assert!(
                good || answer.status() == 503 || answer.status() == 401,
                "{answer:?}"
            );
            good.then(|| assert_eq!(answer.text(), "token-of-h"))
        });
    }

    /// A key that nobody but this primary knows is served, by the same process.
    #[track_caller]
    fn admit_another(&mut self, cluster: &Cluster) {
        let key = cluster.primary().connect().bound_key("high/h");
        self.wait_for_good(&key);
        self.keys.push(key);
        assert!(self.forwarder.is_alive());
        self.upstream.forget();
    }
}

/// One failure of the primary, under load.
struct Trial<'a> {
    cluster: &'a mut Cluster,
    workers: &'a mut [Worker],
    shared: &'a Shared,
    guests: &'a Guests<'a>,
    /// A primary without replicas refuses writes.
    fenced: bool,
    /// The Sentinels have the time to see to the one that was cut off.
    patient: bool,
}

impl Trial<'_> {
    #[track_caller]
    fn run(self, failure: Failure, rng: &mut SmallRng, counts: &mut Counts) {
        let Self {
            cluster,
            workers,
            shared,
            guests,
            fenced,
            patient,
        } = self;
        let (shift, told) = Shift::new(rng.random_range(100..1500));
        let clients: Vec<Client> = (0..workers.len())
            .map(|number| match number % 2 {
                0 => nearby(cluster.primary()),
                _ => impatient(cluster.primary()),
            })
            .collect();
        let urls: Vec<String> = cluster.nodes.iter().map(Server::url).collect();
        std::thread::scope(|scope| {
            let shift = &shift;
            let ends = Ends(shift);
            for (worker, client) in workers.iter_mut().zip(clients) {
                scope.spawn(move || worker.work(client, shared, shift));
            }
            let looks = urls
                .iter()
                .map(|url| scope.spawn(|| keep_looking(url, shift)));
            let looks: Vec<_> = looks.collect();
            let answers = scope.spawn(|| guests.keep_asking(shift));
            told.recv_timeout(PATIENCE).unwrap();
            cluster.strike(failure);
            let old = cluster.wait_for_promotion(failure);
            if failure == Failure::CutOff && cluster.network.is_some() {
                let mut island = nearby(&cluster.nodes[old]);
                if fenced {
                    let words = ["MPOOL.KEYGEN", "medium", "POOL"];
                    wait_for("the primary to find itself alone", || {
                        let error = island.try_run::<Value>(&words).err()?;
                        (error.code() == Some("NOREPLICAS")).then_some(())
                    });
                    count(counts, "fenced", 1);
                } else {
                    // Two primaries: what this one is told now is lost.
                    island.pool_key();
                    count(counts, "two primaries", 1);
                }
            }
            cluster.mend(failure, old);
            std::thread::sleep(Duration::from_millis(rng.random_range(0..300)));
            cluster.settle(patient && failure == Failure::CutOff);
            drop(ends);
            for looks in looks {
                count(counts, "looks", looks.join().unwrap());
            }
            count(counts, "requests", answers.join().unwrap());
        });
        let mut client = cluster.primary().connect();
        if fenced {
            wait_for("a replica", || {
                (client.info("replication", "min_slaves_good_slaves") != "0").then_some(())
            });
        }
        client.check_invariants(2);
        client.check_repair();
        count(
            counts,
            "unanswered",
            check_strangers(workers, &guests.keys, &mut client),
        );
        let loss = hold_to_account(workers, &mut client, shared);
        count(counts, "told", loss.told);
        count(counts, "lost", loss.lost);
        count(counts, "unanswered", loss.unanswered);
        println!("{failure:?}: {loss:?}");
        check_every_slot(workers, &mut client, shared, 2 * ACCOUNTS.len());
    }
}

#[test]
fn what_replicas_have_confirmed_outlives_the_primary() {
    if done_in_own_network("what_replicas_have_confirmed_outlives_the_primary") {
        return;
    }
    let rounds: usize =
        std::env::var("MPOOL_FAILOVER_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    let mut rng = SmallRng::seed_from_u64(seed());
    let upstream = echo();
    let mut counts = Counts::new();
    let mut network = Network::new(NODES);
    let mut done = 0;
    while done < rounds {
        let fenced = rng.random_bool(0.5);
        let load = ["disabled", "on-empty-db", "swapdb"][rng.random_range(0..3)];
        let mut settings = vec!["--appendonly", "yes", "--repl-diskless-load", load];
        if fenced {
            settings.extend([
                "--min-replicas-to-write",
                "1",
                "--min-replicas-max-lag",
                "2",
            ]);
        }
        println!("{settings:?}");
        let options = std::array::from_fn(|_| {
            let options = Options::default().accounts(&ACCOUNTS);
            options.file("high/h", &bearer("h")).server(&settings)
        });
        let mut cluster = Cluster::start(network.take(), options);
        let mut guests = Guests::new(&cluster, &upstream);
        // Those that have each write confirmed, and those that don't wait.
        let waits = [NODES - 1, NODES - 1, NODES - 1, NODES - 1, 0, 0, 0, 0];
        let mut workers = waits.map(|wait| Worker::new(rng.random(), wait));
        let shared = Shared::new(&[]);
        cluster.check_all_alike();
        for failure in Failure::ALL.into_iter().take(rounds - done) {
            let begun = Instant::now();
            let trial = Trial {
                cluster: &mut cluster,
                workers: &mut workers,
                shared: &shared,
                guests: &guests,
                fenced,
                patient: rounds > Failure::ALL.len(),
            };
            trial.run(failure, &mut rng, &mut counts);
            guests.admit_another(&cluster);
            cluster.check_all_alike();
            cluster.sentinels.wait_until_complete(NODES - 1);
            println!("{failure:?} took {:?}", begun.elapsed());
            count(&mut counts, format!("{failure:?}"), 1);
            done += 1;
        }
        for worker in workers {
            for (what, number) in worker.counts {
                *counts.entry(what).or_default() += number;
            }
        }
        network = cluster.network.take();
    }
    println!("{rounds} failures: {counts:#?}");
    for what in [
        "told",
        "confirmed",
        "current",
        "assigned",
        "looks",
        "requests",
    ] {
        let often = counts.get(what).is_some_and(|&count| count > 0);
        assert!(often, "{what} never happened: {counts:?}");
    }
}

#[test]
fn a_replica_without_account_files_takes_over() {
    let accounts = ["a", "b"];
    let upstream = echo();
    let mut cluster = Cluster::start(
        None,
        std::array::from_fn(|number| match number {
            0 => Options::default().accounts(&accounts),
            _ => Options::default(),
        }),
    );
    let forwarder = Forwarder::between(cluster.sentinels.url().as_str(), &upstream).start();
    let mut client = cluster.primary().connect();
    let keys: [String; 4] = std::array::from_fn(|_| client.pool_key());
    let leases = [0, 1, 2].map(|at| client.acquire(&keys[at], unix_ms()));
    wait_for_same(&mut client, &mut cluster.nodes[1].connect());
    wait_for_same(&mut client, &mut cluster.nodes[2].connect());
    let digest = client.traces().0;
    cluster.strike(Failure::Kill);
    let old = cluster.wait_for_promotion(Failure::Kill);
    let mut client = cluster.primary().connect();
    for _ in 0..3 {
        client.ok(&["MPOOL.RELOAD"]);
        let now = unix_ms();
        for (key, lease) in keys.iter().zip(&leases) {
            let current = client.acquire(key, now);
            assert_eq!(current.state, "current");
            assert_eq!(
                (&current.account, current.next),
                (&lease.account, lease.next)
            );
            client.refused(
                "NOTOKEN",
                &["MPOOL.ACQUIRE", key, &now.to_string(), "WITHTOKEN"],
            );
            // The forwarder has come here too, and says so.
            wait_for("the forwarder to follow", || {
                let answer = forwarder.client().get("/", key);
                (answer.code() == Some("NOTOKEN")).then_some(())
            });
        }
        client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &keys[3], &now.to_string()]);
        // Time for the watcher, which must release nothing.
        std::thread::sleep(Duration::from_millis(500));
        client.check_repair();
        assert_eq!(client.traces().0, digest);
    }
    // The one before returns, with its files, and changes nothing either.
    cluster.mend(Failure::Kill, old);
    cluster.settle(false);
    cluster.check_all_alike();
    assert_eq!(client.traces().0, digest);
    for account in accounts {
        let file = format!("medium/{account}");
        cluster.primary().write_account(&file, &bearer(account));
    }
    for (key, lease) in keys.iter().zip(&leases) {
        wait_for("a good answer", || {
            let answer = forwarder.client().get("/", key);
            (answer.status() == 200)
                .then(|| assert_eq!(answer.text(), format!("token-of-{}", lease.account)))
        });
    }
    assert_eq!(client.acquire(&keys[3], unix_ms()).state, "assigned");
    cluster.check_all_alike();
}

#[test]
fn a_handover_under_load_loses_nothing() {
    let mut rng = seeded();
    let pool = || Options::default().accounts(&ACCOUNTS).start();
    let mut nodes = [pool(), pool()];
    follow(&nodes[1], &nodes[0]);
    let mut workers: [Worker; 6] = std::array::from_fn(|_| Worker::new(rng.random(), 0));
    let shared = Shared::new(&[]);
    let mut told = 0;
    for _ in 0..4 {
        let [old, new] = &nodes;
        wait_for("the replica to follow", || follows(new, old));
        let (shift, quota) = Shift::new(rng.random_range(100..1500));
        let clients: [Client; 6] = std::array::from_fn(|_| old.connect());
        std::thread::scope(|scope| {
            let (shift, shared) = (&shift, &shared);
            let ends = Ends(shift);
            for (worker, client) in workers.iter_mut().zip(clients) {
                scope.spawn(move || worker.work(client, shared, shift));
            }
            quota.recv_timeout(PATIENCE).unwrap();
            let to = ["FAILOVER", "TO", new.host(), &new.port.to_string()];
            old.connect().ok(&to);
            wait_for("the handover", || (role(new)? == "master").then_some(()));
            wait_for("the old one to follow", || follows(old, new));
            drop(ends);
        });
        let mut client = new.connect();
        client.check_invariants(2);
        client.check_repair();
        check_strangers(&mut workers, &[], &mut client);
        let loss = hold_to_account(&mut workers, &mut client, &shared);
        assert_eq!(loss.lost, 0, "{loss:?}");
        told += loss.told;
        check_every_slot(&workers, &mut client, &shared, 2 * ACCOUNTS.len());
        wait_for_same(&mut client, &mut old.connect());
        nodes.reverse();
    }
    assert!(told > 0);
}
