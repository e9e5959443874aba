//! What the benchmark of the forwarder measures: each proxy with a configuration
//! of its own in a folder of its own, gone with its value.

use super::common::support::{Server, free_port, wait_for, wait_long};
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// LiteLLM reads a lot of Python before it listens.
const LITELLM_PATIENCE: Duration = Duration::from_secs(120);

/// A running proxy.
pub(crate) struct Proxy {
    pub(crate) name: String,
    child: Child,
    pub(crate) port: u16,
    /// Its configuration and its log.
    folder: TempDir,
}

impl Proxy {
    fn start(name: &str, patience: Duration, command: impl FnOnce(u16, &Path) -> Command) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = command(port, folder.path())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let mut proxy = Self {
            name: name.to_owned(),
            child,
            port,
            folder,
        };
        wait_long(&format!("{name} to listen"), patience, || {
            let ended = proxy.child.try_wait().unwrap();
            assert!(ended.is_none(), "{name} has ended");
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        proxy
    }

    /// nginx `proxy_pass`.
    pub(crate) fn nginx(workers: usize, upstream: u16) -> Self {
        let proxy = Self::start("nginx", Duration::from_secs(20), |port, folder| {
            let config = format!(
                "daemon off; pid nginx.pid; error_log stderr warn; worker_processes {workers};
                worker_rlimit_nofile 8192;
                events {{ worker_connections 4096; }}
                http {{
                    access_log off; keepalive_requests 1000000000; keepalive_timeout 75s;
                    client_body_temp_path client_body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
                    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
                    upstream bench {{
                        server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000;
                    }}
                    server {{
                        listen 127.0.0.1:{port} reuseport;
                        location / {{
                            proxy_pass http://bench; proxy_http_version 1.1;
                            proxy_set_header Connection ''; proxy_buffering off;
                        }}
                    }}
                }}"
            );
            nginx_command(&write(folder, "nginx.conf", &config))
        });
        // The workers are there before the first answer.
        wait_for("nginx's workers", || {
            (children(proxy.child.id()).len() == workers).then_some(())
        });
        proxy
    }

    pub(crate) fn haproxy(threads: usize, upstream: u16) -> Self {
        Self::start("HAProxy", Duration::from_secs(20), |port, folder| {
            let config = format!(
                "global
                    nbthread {threads}
                    maxconn 4096
                defaults
                    mode http
                    timeout connect 5s
                    timeout client 600s
                    timeout server 600s
                    option http-no-delay
                    http-reuse always
                frontend clients
                    bind 127.0.0.1:{port}
                    default_backend bench
                backend bench
                    server upstream 127.0.0.1:{upstream}\n"
            );
            let mut command = Command::new(haproxy_binary());
            command
                .args(["-db", "-f"])
                .arg(write(folder, "haproxy.cfg", &config));
            command
        })
    }

    /// LiteLLM's proxy with a master key; none where it is not installed.
    pub(crate) fn litellm(workers: usize, upstream: u16, key: &str) -> Option<Self> {
        let binary = venv()?.join("bin/litellm");
        let proxy = Self::start("LiteLLM", LITELLM_PATIENCE, |port, folder| {
            let config = format!(
                "model_list:
  - model_name: bench
    litellm_params:
      model: openai/bench
      api_base: http://127.0.0.1:{upstream}/v1
      api_key: token
general_settings:
  master_key: {key}
litellm_settings:
  telemetry: false\n"
            );
            let mut command = Command::new(binary);
            command
                .env_clear()
                .env("HOME", folder)
                .env("PATH", std::env::var_os("PATH").unwrap_or_default())
                // It would ask the network for prices of models.
                .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
                .env("LITELLM_LOG", "ERROR")
                .args(["--host", "127.0.0.1", "--port", &port.to_string()])
                .args(["--num_workers", &workers.to_string(), "--config"])
                .arg(write(folder, "config.yaml", &config));
            command
        });
        Some(proxy)
    }

    pub(crate) fn forwarder(
        name: &str,
        binary: &Path,
        threads: usize,
        (redis, upstream): (&Server, u16),
        more: &[&str],
    ) -> Self {
        Self::start(name, Duration::from_secs(20), |port, _| {
            let mut command = Command::new(binary);
            command
                .env_clear()
                .args(["--listen", &format!("127.0.0.1:{port}"), "--admin", "off"])
                .args(["--redis", &redis.url(), "--log-level", "warn"])
                .args(["--upstream", &format!("http://127.0.0.1:{upstream}")])
                .args(["--threads", &threads.to_string()])
                .args(more);
            command
        })
    }

    /// The processes whose CPU time and memory count.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.child.id()];
        let mut looked = 0;
        while let Some(&pid) = pids.get(looked) {
            pids.extend(children(pid));
            looked += 1;
        }
        pids
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Its children, too, would outlive it; but it would replace those that go before it.
        let children = self.pids().split_off(1);
        let _ = self.child.kill();
        for pid in children {
            let kill = ["-c", "kill -s KILL \"$0\" 2>/dev/null", &pid.to_string()];
            let _ = Command::new("bash").args(kill).status();
        }
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            eprintln!("--- {} on port {} ---\n{log}", self.name, self.port);
        }
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let pids = text.split_whitespace().map(|pid| pid.parse().unwrap());
    pids.collect()
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

/// Debian has these in a folder that not everyone's PATH names.
pub(crate) fn nginx_binary() -> PathBuf {
    system_binary("nginx")
}

pub(crate) fn haproxy_binary() -> PathBuf {
    system_binary("haproxy")
}

fn system_binary(name: &str) -> PathBuf {
    let debian = Path::new("/usr/sbin").join(name);
    if debian.exists() { debian } else { name.into() }
}

fn nginx_command(config: &Path) -> Command {
    let folder = config.parent().unwrap();
    let mut command = Command::new(nginx_binary());
    command.arg("-p").arg(folder).arg("-c").arg(config);
    command.arg("-e").arg("stderr");
    command
}

/// Where scripts/install-deps has put LiteLLM, if it could.
pub(crate) fn venv() -> Option<PathBuf> {
    let program = std::env::current_exe().unwrap();
    let venvs = program
        .ancestors()
        .map(|folder| folder.join("benches/venv"));
    // Written when all is installed.
    { venvs }.find(|venv| venv.join("requirements.txt").exists())
}
