//! Writers and bars: everything a person sees comes from here.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::{Failure, hint};
use crate::progress::Progress;
use crate::store::StoreError;
use crate::units::human_bytes;

/// How the program talks.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// Print the answer as one JSON document
    #[arg(long, global = true, help_heading = "Output")]
    json: bool,

    /// Print neither progress nor warnings
    #[arg(long, short, global = true, help_heading = "Output")]
    quiet: bool,

    /// When to use colours
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "Output"
    )]
    color: Color,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

/// Bars appear only for what takes longer.
const PATIENCE: Duration = Duration::from_millis(250);

/// How often progress is told where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The schema of every `--json` answer: members may be added under the same number.
const SCHEMA: u32 = 1;

/// An answer as JSON.
#[derive(Serialize)]
struct Document<'a, T> {
    schema: u32,
    #[serde(flatten)]
    answer: &'a T,
}

/// Text with its control characters escaped, but for tabs and ends of lines: names and QEMU's words, which an image may
/// bring along, must not steer a terminal.
pub fn printable(text: &str) -> String {
    let is_harmless = |c: char| matches!(c, '\n' | '\t') || !is_steering(c);
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match is_harmless(c) {
            true => shown.push(c),
            false => shown.extend(c.escape_default()),
        }
    }
    shown
}

/// Control characters, and those that turn the direction of text.
fn is_steering(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A number of worker threads, as an argument.
pub fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=256) => Ok(threads),
        _ => Err("it has to be a number from 1 to 256".to_owned()),
    }
}

/// The terminal, or what stands in for it.
pub struct Ui {
    is_json: bool,
    is_quiet: bool,
    is_cancelled: Arc<AtomicBool>,
    phase: Mutex<Option<Phase>>,
    done: AtomicU64,
}

struct Phase {
    name: String,
    total: Option<u64>,
    since: Instant,
    told: Instant,
    bar: Option<ProgressBar>,
}

impl Ui {
    /// A Ui on this process's stdout and stderr; from now on SIGINT, SIGTERM and SIGHUP ask to stop instead of killing.
    pub fn new(args: &OutputArgs) -> Self {
        match args.color {
            Color::Auto => {}
            Color::Always => anstream::ColorChoice::Always.write_global(),
            Color::Never => anstream::ColorChoice::Never.write_global(),
        }
        let is_cancelled = Arc::new(AtomicBool::new(false));
        for signal in [
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
            signal_hook::consts::SIGHUP,
        ] {
            // Without the handler the signal kills us, and the guardian puts the guest back all the same.
            let _ = signal_hook::flag::register(signal, Arc::clone(&is_cancelled));
        }
        Ui {
            is_json: args.json,
            is_quiet: args.quiet,
            is_cancelled,
            phase: Mutex::new(None),
            done: AtomicU64::new(0),
        }
    }

    /// Whether the answer is to be one JSON document.
    pub fn is_json(&self) -> bool {
        self.is_json
    }

    /// Prints the answer: `value`, which has to be an object, as JSON, or what `human` makes of it.
    pub fn answer<T: Serialize>(
        &self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), StoreError> {
        let document = Document {
            schema: SCHEMA,
            answer: value,
        };
        let json = || serde_json::to_string_pretty(&document).map_err(std::io::Error::from);
        let text = if self.is_json {
            json().map(|json| json + "\n")
        } else {
            Ok(human(value))
        };
        self.print(&text.map_err(|source| StoreError::Pipe {
            act: "write",
            source,
        })?)
    }

    /// Writes text to stdout, to a terminal only what is [`printable`]. A reader that went away is no error.
    pub fn print(&self, text: &str) -> Result<(), StoreError> {
        match std::io::stdout().is_terminal() {
            true => self.write(printable(text).as_bytes()),
            false => self.write(text.as_bytes()),
        }
    }

    /// Writes bytes as they are.
    ///
    /// # Errors
    /// As [`Ui::print`].
    pub fn write(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut out = std::io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|source| StoreError::Pipe {
                act: "write",
                source,
            }),
        }
    }

    /// Tells on stderr why the program fails, and gives its exit code.
    pub fn fail(&self, failure: &Failure) -> ExitCode {
        self.end();
        let error = &failure.error;
        self.tell(
            "error",
            AnsiColor::Red,
            &hint::headline(error, failure.image.as_deref()),
        );
        if let Some(at) = hint::place(error) {
            self.more("at", &at);
        }
        for fact in hint::facts(error) {
            self.more("why", &fact);
        }
        if let Some(advice) = hint::advice(error, failure.image.as_deref()) {
            self.more("try", &advice);
        }
        ExitCode::from(error.kind().exit_code())
    }

    /// One line on stderr, not shown with `--quiet`.
    pub fn note(&self, text: &dyn Display) {
        if !self.is_quiet {
            self.line(&printable(&text.to_string()));
        }
    }

    fn tell(&self, word: &str, color: AnsiColor, text: &str) {
        let style = Style::new().bold().fg_color(Some(color.into()));
        self.line(&format!("{style}{word}:{style:#} {}", printable(text)));
    }

    fn more(&self, word: &str, text: &str) {
        let style = Style::new().bold();
        self.line(&format!(
            "{style}{word:>5}:{style:#} {}",
            printable(text).replace('\n', "\n       ")
        ));
    }

    fn line(&self, text: &str) {
        let write = || {
            let _ = writeln!(anstream::stderr().lock(), "{text}");
        };
        match self.phase.lock().ok().as_deref() {
            Some(Some(Phase { bar: Some(bar), .. })) => bar.suspend(write),
            _ => write(),
        }
    }
}

impl Progress for Ui {
    fn begin(&self, phase: &str, total: Option<u64>) {
        self.end();
        self.done.store(0, Ordering::Relaxed);
        let now = Instant::now();
        if let (false, Ok(mut slot)) = (self.is_quiet, self.phase.lock()) {
            *slot = Some(Phase {
                name: phase.to_owned(),
                total,
                since: now,
                told: now,
                bar: None,
            });
        }
    }

    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Ok(mut slot) = self.phase.try_lock()
            && let Some(phase) = slot.as_mut()
        {
            phase.show(done);
        }
    }

    fn end(&self) {
        let phase = self.phase.lock().ok().and_then(|mut slot| slot.take());
        if let Some(Phase { bar: Some(bar), .. }) = phase {
            bar.finish_and_clear();
        }
    }

    fn warn(&self, text: &str) {
        if !self.is_quiet {
            self.tell("warning", AnsiColor::Yellow, text);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }
}

impl Phase {
    fn show(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if std::io::stderr().is_terminal() {
            if self.since.elapsed() > PATIENCE {
                self.bar = Some(new_bar(&self.name, self.total, done));
            }
        } else if self.told.elapsed() > LINE_EVERY {
            self.told = Instant::now();
            let _ = writeln!(std::io::stderr().lock(), "{}", self.as_line(done));
        }
    }

    /// `saving: 1.2 GiB of 4 GiB, 310 MiB/s, 9 s left`
    fn as_line(&self, done: u64) -> String {
        let millis = u64::try_from(self.since.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        let rate = done.saturating_mul(1000) / millis;
        let left = self
            .total
            .map(|total| total.saturating_sub(done) / rate.max(1));
        let of = self
            .total
            .map_or(String::new(), |total| format!(" of {}", human_bytes(total)));
        let eta = left.map_or(String::new(), |seconds| format!(", {seconds} s left"));
        format!(
            "{}: {}{of}, {}/s{eta}",
            self.name,
            human_bytes(done),
            human_bytes(rate)
        )
    }
}

fn new_bar(name: &str, total: Option<u64>, done: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    let template = match total {
        Some(_) => {
            "{msg:>10} {wide_bar} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta}"
        }
        None => "{msg:>10} {spinner} {elapsed}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(name.to_owned());
    bar.set_position(done);
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_an_image_does_not_steer_the_terminal() {
        assert_eq!(
            printable("\u{1b}[2Jw\u{f6}b\u{9b}1\u{202e}\r\n\tx"),
            "\\u{1b}[2Jw\u{f6}b\\u{9b}1\\u{202e}\\r\n\tx"
        );
    }

    #[test]
    fn a_line_of_progress_says_how_much_how_fast_and_how_long() {
        let since = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        let phase = Phase {
            name: "saving".into(),
            total: Some(4 << 30),
            since,
            told: since,
            bar: None,
        };
        let line = phase.as_line(1 << 30);
        assert!(line.starts_with("saving: 1 GiB of 4 GiB, 51"), "{line}");
        assert!(line.ends_with(" s left"), "{line}");
    }
}
