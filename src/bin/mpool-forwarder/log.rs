//! Log lines on stdout: `[2025-08-14T14:00:00.000Z] text`, or JSON. They are
//! collected and written by a thread of their own: a reader that is slow or
//! stuck never holds a request up.

use crate::config::{LogFormat, LogLevel};
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Lines that wait for a reader, in bytes; what comes beyond is left out and counted.
const BACKLOG: usize = 4 << 20;
/// How long lines are collected before they are written.
const COLLECT: Duration = Duration::from_millis(5);

/// ISO time in UTC with milliseconds.
struct Clock;

impl Clock {
    fn write(to: &mut impl fmt::Write) -> fmt::Result {
        static PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
        PRINTER
            .print_timestamp(&Timestamp::now(), jiff::fmt::StdFmtWrite(to))
            .map_err(|_| fmt::Error)
    }
}

impl FormatTime for Clock {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        Self::write(writer)
    }
}

/// A line of text: time and message; the fields are in the message already.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_char('[')?;
        Clock::write(&mut writer)?;
        writer.write_str("] ")?;
        match *event.metadata().level() {
            Level::ERROR => writer.write_str("ERROR ")?,
            Level::WARN => writer.write_str("WARNING ")?,
            _ => {}
        }
        let mut message = Message {
            writer: &mut writer,
            result: Ok(()),
        };
        event.record(&mut message);
        message.result?;
        writer.write_char('\n')
    }
}

struct Message<'a, 'w> {
    writer: &'a mut Writer<'w>,
    result: fmt::Result,
}

impl Visit for Message<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.result = write!(self.writer, "{value:?}");
        }
    }
}

/// Lines on their way to stdout.
#[derive(Default)]
struct Backlog {
    lines: Vec<u8>,
    lost: u64,
    closed: bool,
    written: bool,
}

#[derive(Default)]
struct Shared {
    backlog: Mutex<Backlog>,
    more: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone)]
struct Sink(Arc<Shared>);

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut backlog = self.0.lock();
        if backlog.lines.len() + line.len() > BACKLOG {
            backlog.lost += 1;
        } else {
            let first = backlog.lines.is_empty();
            backlog.lines.extend_from_slice(line);
            if first {
                self.0.more.notify_one();
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn lost_line(lost: u64, format: LogFormat) -> String {
    let text = format!("{lost} log lines were left out: nobody reads them fast enough");
    let mut now = String::new();
    let _ = Clock::write(&mut now);
    match format {
        LogFormat::Text => format!("[{now}] WARNING {text}\n"),
        LogFormat::Json => {
            format!(
                "{{\"timestamp\":\"{now}\",\"level\":\"WARN\",\"event\":\"lost\",\"message\":\"{text}\"}}\n"
            )
        }
    }
}

fn write_out(shared: &Shared, format: LogFormat) {
    let mut out = io::stdout();
    let mut spare = Vec::new();
    loop {
        let mut backlog = shared.lock();
        while backlog.lines.is_empty() && !backlog.closed {
            backlog = shared
                .more
                .wait(backlog)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let closed = backlog.closed;
        std::mem::swap(&mut backlog.lines, &mut spare);
        let lost = std::mem::take(&mut backlog.lost);
        drop(backlog);
        if lost > 0 {
            spare.extend_from_slice(lost_line(lost, format).as_bytes());
        }
        // Nobody to write to is no reason to stop serving.
        let _ = out.write_all(&spare).and_then(|()| out.flush());
        spare.clear();
        spare.shrink_to(64 << 10);
        if closed {
            shared.lock().written = true;
            shared.more.notify_all();
            return;
        }
        thread::sleep(COLLECT);
    }
}

/// The log of the process, written out when this is dropped.
pub struct Log(Arc<Shared>);

impl Log {
    /// From here on `tracing`'s events go to stdout.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(format: LogFormat, level: LogLevel) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || write_out(&writer, format))?;
        let level = match level {
            LogLevel::Error => Level::ERROR,
            LogLevel::Warn => Level::WARN,
            LogLevel::Info => Level::INFO,
        };
        let builder = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(Sink(Arc::clone(&shared)));
        match format {
            LogFormat::Text => builder.event_format(Lines).init(),
            LogFormat::Json => {
                builder
                    .json()
                    .flatten_event(true)
                    .with_target(false)
                    .with_timer(Clock)
                    .with_ansi(false)
                    .init();
            }
        }
        Ok(Self(shared))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let mut backlog = self.0.lock();
        backlog.closed = true;
        self.0.more.notify_all();
        // A reader that is stuck gets a second.
        while !backlog.written {
            let (next, late) = self
                .0
                .more
                .wait_timeout(backlog, Duration::from_secs(1))
                .unwrap_or_else(PoisonError::into_inner);
            backlog = next;
            if late.timed_out() {
                return;
            }
        }
    }
}
