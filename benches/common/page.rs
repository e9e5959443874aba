//! What a benchmark prints, and its part of `benches/RESULTS.md`.
//!
//! Each part says when and on what it was measured, as parts may be run again
//! one by one. Nothing is kept unless `MPOOL_BENCH_RESULTS` names the file; then
//! the tables are there alone, and what is printed fits one page.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

const RESULTS: &str = "MPOOL_BENCH_RESULTS";

const HEAD: &str = "\
# Results of the benchmarks

`make bench` writes this file, a part of it for each benchmark. Times and rates are this machine's;
what counts are the ratios between things that were run side by side.
";

/// What a ratio is held to.
#[derive(Clone, Copy)]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar {
    pub fn judge(self, figure: f64, unit: &str) -> String {
        let (word, limit, reached) = match self {
            Self::AtLeast(limit) => ("at least", limit, figure >= limit),
            Self::AtMost(limit) => ("at most", limit, figure <= limit),
        };
        let verdict = if reached { "reached" } else { "MISSED" };
        format!("{figure:.2}{unit} ({word} {limit}{unit}: {verdict})")
    }
}

/// The lines of one benchmark: what is printed, and the tables behind it.
pub struct Page {
    name: &'static str,
    text: String,
    /// Tables are in a file; otherwise they are printed as well.
    is_kept: bool,
}

impl Page {
    /// `versions` tells of what is measured besides Redis.
    pub fn new(name: &'static str, versions: &[String]) -> Self {
        let mut page = Self {
            name,
            text: String::new(),
            is_kept: env::var_os(RESULTS).is_some(),
        };
        println!("\n{name}");
        let mut all = vec![server_version(), output("rustc", &["--version"])];
        all.extend_from_slice(versions);
        page.table(format!("{}; {}", output("date", &["-u", "+%F"]), machine()));
        page.table(all.join(", "));
        page
    }

    /// A line of the page.
    pub fn line(&mut self, text: impl AsRef<str>) {
        // A line of progress is shorter than that of the page only by chance.
        if std::io::stderr().is_terminal() {
            super::progress("");
        }
        println!("{}", text.as_ref().trim_end());
        writeln!(self.text, "{}", text.as_ref().trim_end()).unwrap();
    }

    /// A line of the tables that the page is made of.
    pub fn table(&mut self, text: impl AsRef<str>) {
        if self.is_kept {
            writeln!(self.text, "{}", text.as_ref().trim_end()).unwrap();
        } else {
            self.line(text);
        }
    }

    /// Says whether a figure of this run reaches its bar.
    pub fn bar(&mut self, what: &str, figure: f64, bar: Bar, unit: &str) {
        self.line(format!("  {what}: {}", bar.judge(figure, unit)));
    }

    /// Puts the lines in the place of what the file has under this name.
    pub fn save(self) {
        let Some(path) = env::var_os(RESULTS) else {
            return;
        };
        let path = Path::new(&path);
        let old = fs::read_to_string(path).unwrap_or_default();
        let part = format!("## {}\n\n```text\n{}```\n", self.name, self.text);
        fs::write(path, with_part(&old, self.name, &part)).unwrap();
    }
}

/// The file's parts, in the order in which each first came, this one replaced.
fn with_part(old: &str, name: &str, part: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    for line in old.split_inclusive('\n') {
        if line.starts_with("## ") {
            parts.push(String::new());
        }
        if let Some(last) = parts.last_mut() {
            last.push_str(line);
        }
    }
    let heading = format!("## {name}\n");
    match parts.iter_mut().find(|old| old.starts_with(&heading)) {
        Some(old) => *old = part.to_owned(),
        None => parts.push(part.to_owned()),
    }
    let parts = parts.iter().map(|part| format!("\n{}\n", part.trim_end()));
    HEAD.to_owned() + &parts.collect::<String>()
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let value = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split(':').nth(1));
        value.unwrap_or("unknown").trim().to_owned()
    };
    let memory = value("/proc/meminfo", "MemTotal");
    let kilobytes: f64 = memory.trim_end_matches(" kB").parse().unwrap_or_default();
    format!(
        "{cores} cores, {}, {:.0} GB",
        value("/proc/cpuinfo", "model name"),
        kilobytes / f64::from(1 << 20)
    )
}

/// Such as "Redis 7.0.15" or "Valkey 8.1.1".
fn server_version() -> String {
    let text = output(super::support::server_binary(), &["--version"]);
    let name = text.split(' ').next().unwrap_or_default();
    let version = text.split(' ').find_map(|word| word.strip_prefix("v="));
    format!("{name} {}", version.unwrap_or("unknown"))
}

/// The first line that a program prints, on stdout or else on stderr.
pub fn output(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().next().unwrap_or_default().to_owned()
}
