//! Three Sentinels around servers of a test.

use super::network::Place;
use super::{Client, Server, free_port, server_binary, wait_for};
use std::collections::BTreeMap;
use std::fs;
use std::process::Child;
use std::time::Duration;
use tempfile::TempDir;

/// Three that watch a primary and see to it that there is one.
#[derive(Debug)]
pub struct Sentinels {
    pub children: Vec<Child>,
    addresses: Vec<(String, u16)>,
    password: Option<&'static str>,
    folder: TempDir,
}

impl Sentinels {
    /// For a primary with that many replicas; each in its own place.
    #[track_caller]
    pub fn watch(
        primary: &Server,
        replicas: usize,
        places: &[Place; 3],
        password: Option<&'static str>,
        down_after: Duration,
    ) -> Self {
        let mut sentinels = Self {
            children: Vec::new(),
            addresses: Vec::new(),
            password,
            folder: tempfile::tempdir().unwrap(),
        };
        for (number, place) in places.iter().enumerate() {
            let port = free_port();
            let own = sentinels.folder.path().join(number.to_string());
            fs::create_dir(&own).unwrap();
            let mut settings = format!(
                "port {port}\nbind {}\nprotected-mode no\ndir {}\n\
                 sentinel monitor pool {} {} 2\nsentinel down-after-milliseconds pool {}\n\
                 sentinel failover-timeout pool 2000\nsentinel parallel-syncs pool 2\n",
                place.host,
                own.display(),
                primary.host(),
                primary.port,
                down_after.as_millis()
            );
            if let Some(password) = password {
                settings += &format!("requirepass {password}\nsentinel sentinel-pass {password}\n");
            }
            let file = own.join("sentinel.conf");
            fs::write(&file, settings).unwrap();
            let child = place
                .command(server_binary())
                .arg(&file)
                .arg("--sentinel")
                .stdout(fs::File::create(own.join("log")).unwrap())
                .spawn()
                .unwrap();
            sentinels.children.push(child);
            sentinels.addresses.push((place.host.clone(), port));
        }
        sentinels.wait_until_complete(replicas);
        sentinels
    }

    /// Waits until each knows the others and that many replicas, all of them well.
    #[track_caller]
    pub fn wait_until_complete(&self, replicas: usize) {
        for number in 0..self.children.len() {
            let mut sentinel = wait_for("a Sentinel", || self.connect(number));
            wait_for("the Sentinels to know each other", || {
                let mut list = |list: &str| -> Option<Vec<BTreeMap<String, String>>> {
                    sentinel.try_run(&["SENTINEL", list, "pool"]).ok()
                };
                let (others, known) = (list("SENTINELS")?, list("REPLICAS")?);
                let well = known.iter().all(|known| known["flags"] == "slave");
                (others.len() == 2 && known.len() == replicas && well).then_some(())
            });
        }
    }

    pub fn connect(&self, number: usize) -> Option<Client> {
        let (host, port) = &self.addresses[number];
        let login = self
            .password
            .map_or(String::new(), |password| format!(":{password}@"));
        let client = redis::Client::open(format!("redis://{login}{host}:{port}/")).unwrap();
        let patience = Duration::from_secs(1);
        let connection = client.get_connection_with_timeout(patience).ok()?;
        connection.set_read_timeout(Some(patience)).ok()?;
        Some(Client { connection })
    }

    /// What that Sentinel takes for the primary.
    pub fn primary(&self, number: usize) -> Option<(String, u16)> {
        let words = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "pool"];
        self.connect(number)?.try_run(&words).ok()
    }

    pub fn url(&self) -> String {
        let addresses = self.addresses.iter();
        let hosts: Vec<String> = addresses
            .map(|(host, port)| format!("{host}:{port}"))
            .collect();
        format!("redis+sentinel://{}/pool", hosts.join(","))
    }

    /// What one of them has logged.
    pub fn log(&self, number: usize) -> String {
        let file = self.folder.path().join(number.to_string()).join("log");
        fs::read_to_string(file).unwrap_or_default()
    }
}

impl Drop for Sentinels {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            (0..self.children.len()).for_each(|number| {
                eprintln!("--- log of Sentinel {number} ---\n{}", self.log(number));
            });
        }
    }
}
