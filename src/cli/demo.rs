//! `vmstow demo`: the main job, once, on a guest that the program carries with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Args;

use super::Outcome;
use super::ui::Ui;
use crate::error::{Blame, ErrorKind};
use crate::host;
use crate::progress::Progress;

/// Start a tiny guest, save it, restore it, and see it count on
///
/// The guest is a boot sector that counts on its serial port and keeps watching a pattern in its 64 MiB of memory.
/// Needs QEMU only, takes some seconds, and leaves nothing behind.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Use this QEMU instead of qemu-system-x86_64 in PATH
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
}

/// The guest's disk: a boot sector, and zeros up to one cylinder. Source: testdata/guests/counter.asm.
const COUNTER: &[u8] = include_bytes!("../../testdata/guests/counter.img");

/// How long the guest may take for one step.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ticks to see before the save, and again after the restore.
const TICKS: u64 = 8;

/// Why the demo did not come to its end.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("cannot {act} {}", path.display())]
    File {
        act: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the guest did not count to {tick} within {} s", PATIENCE.as_secs())]
    NoTick { tick: u64, log: String },
    #[error("`vmstow {command}` failed ({status})")]
    Command { command: String, status: String },
    #[error("the guest's count has a gap: {line:?} follows tick {after}")]
    Gap { after: u64, line: String },
    #[error("interrupted")]
    Interrupted,
}

impl Blame for DemoError {
    fn kind(&self) -> ErrorKind {
        match self {
            DemoError::Interrupted => ErrorKind::Interrupted,
            _ => ErrorKind::Failed,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            DemoError::NoTick { log, .. } if !log.is_empty() => vec![log.clone()],
            _ => Vec::new(),
        }
    }
}

/// Runs the demo.
pub fn run(args: &DemoArgs, ui: &Ui) -> Outcome {
    let qemu = args.qemu.clone().map_or_else(host::find_qemu, Ok)?;
    let directory = tempfile::Builder::new().prefix("vmstow-demo-").tempdir();
    let directory = directory.map_err(file_error("make a directory in", &std::env::temp_dir()))?;
    let mut demo = Demo {
        ui,
        directory: directory.path().to_owned(),
        qemu: None,
    };
    let done = demo.run(&qemu);
    demo.clean_up();
    done?;
    Ok(ExitCode::SUCCESS)
}

struct Demo<'a> {
    ui: &'a Ui,
    directory: PathBuf,
    qemu: Option<Child>,
}

impl Demo<'_> {
    fn run(&mut self, qemu: &Path) -> Result<(), super::Failure> {
        self.say("a guest is started by hand; it counts on its serial port:")?;
        self.start_guest(qemu)?;
        self.wait_for_tick(TICKS)?;
        self.show_last_ticks(3)?;

        self.say("it is saved; its QEMU ends, and the file is the guest now:")?;
        self.vmstow(&["save", "qmp:qmp.sock", "counter.stow"])?;
        self.wait_for_qemu();
        self.vmstow(&["inspect", "counter.stow"])?;
        self.vmstow(&["verify", "counter.stow", "--deep"])?;
        let saved_at = self.last_tick();

        self.say("it is restored, and counts on:")?;
        self.vmstow(&["restore", "counter.stow"])?;
        self.wait_for_tick(saved_at + TICKS)?;
        self.show_last_ticks(TICKS + 2)?;
        self.check_count()?;
        self.vmstow(&["stop", "counter"])?;
        let text = format!(
            "no tick is missing: {saved_at} was the last before the save, {} the first after the restore, and the guest found its memory unchanged",
            saved_at + 1
        );
        self.say(&text)
    }

    fn say(&self, text: &str) -> Result<(), super::Failure> {
        Ok(self.ui.print(&format!("# {text}\n"))?)
    }

    fn start_guest(&mut self, qemu: &Path) -> Result<(), super::Failure> {
        let disk = self.directory.join("counter.img");
        fs::write(&disk, COUNTER).map_err(file_error("write", &disk))?;
        let arguments = [
            "-name",
            "counter",
            "-machine",
            "pc,accel=tcg",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
            "-drive",
            "file=counter.img,format=raw,if=virtio",
            "-serial",
            "file:serial.log",
            "-qmp",
            "unix:qmp.sock,server=on,wait=off",
        ];
        self.ui
            .print(&format!("$ {} {} &\n", qemu.display(), arguments.join(" ")))?;
        let log = self.directory.join("qemu.log");
        let errors = fs::File::create(&log).map_err(file_error("create", &log))?;
        let mut command = Command::new(qemu);
        command.args(arguments).current_dir(&self.directory);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        self.qemu = Some(command.spawn().map_err(file_error("start", qemu))?);
        Ok(())
    }

    /// Runs this program, as the user would, and shows what it prints.
    fn vmstow(&self, arguments: &[&str]) -> Result<(), super::Failure> {
        self.ui
            .print(&format!("$ vmstow {}\n", arguments.join(" ")))?;
        let status = self.command(arguments)?.status();
        let status = status.map_err(file_error("run", Path::new("vmstow")))?;
        if status.success() {
            return Ok(());
        }
        let (command, status) = (arguments.join(" "), status.to_string());
        Err(DemoError::Command { command, status }.into())
    }

    /// The demo's guest and key stay apart from the user's own.
    fn command(&self, arguments: &[&str]) -> Result<Command, super::Failure> {
        let program = std::env::current_exe().map_err(file_error("find", Path::new("vmstow")))?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.directory);
        command.env("VMSTOW_RUNTIME_DIR", self.directory.join("run"));
        command.env("XDG_STATE_HOME", self.directory.join("state"));
        Ok(command)
    }

    /// The save has seen it end; now the system may forget it.
    fn wait_for_qemu(&mut self) {
        if let Some(mut qemu) = self.qemu.take() {
            let _ = qemu.wait();
        }
    }

    fn serial(&self) -> String {
        fs::read_to_string(self.directory.join("serial.log")).unwrap_or_default()
    }

    fn last_tick(&self) -> u64 {
        self.serial()
            .lines()
            .filter_map(tick_of)
            .next_back()
            .unwrap_or(0)
    }

    fn wait_for_tick(&self, tick: u64) -> Result<(), super::Failure> {
        let deadline = Instant::now() + PATIENCE;
        while self.last_tick() < tick {
            if self.ui.is_cancelled() {
                return Err(DemoError::Interrupted.into());
            }
            if Instant::now() > deadline {
                let log = fs::read_to_string(self.directory.join("qemu.log")).unwrap_or_default();
                return Err(DemoError::NoTick { tick, log }.into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn show_last_ticks(&self, count: u64) -> Result<(), super::Failure> {
        let serial = self.serial();
        let ticks: Vec<&str> = serial
            .lines()
            .filter(|line| tick_of(line).is_some())
            .collect();
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        for line in &ticks[ticks.len().saturating_sub(count)..] {
            self.ui.print(&format!("  {line}\n"))?;
        }
        Ok(())
    }

    /// Every tick follows the one before, and each says that the memory is as it has to be.
    fn check_count(&self) -> Result<(), DemoError> {
        let serial = self.serial();
        let complete = serial
            .rsplit_once('\n')
            .map_or("", |(complete, _)| complete);
        let lines = complete
            .lines()
            .filter(|line| line.starts_with("tick") || line.contains("BAD"));
        for (after, line) in (0..).zip(lines) {
            if tick_of(line) != Some(after + 1) {
                let line = line.to_owned();
                return Err(DemoError::Gap { after, line });
            }
        }
        Ok(())
    }

    fn clean_up(&mut self) {
        if let Some(mut qemu) = self.qemu.take() {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
        // After an error the restored guest may still run.
        if self.directory.join("run/counter").exists()
            && let Ok(mut command) = self.command(&["--quiet", "stop", "counter"])
        {
            let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

/// The number in `tick 17 memory ok`.
fn tick_of(line: &str) -> Option<u64> {
    line.strip_prefix("tick ")?
        .strip_suffix(" memory ok")?
        .parse()
        .ok()
}

fn file_error(act: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DemoError {
    let path = path.to_owned();
    move |source| DemoError::File { act, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tick_with_good_memory_counts() {
        assert_eq!(tick_of("tick 17 memory ok"), Some(17));
        assert_eq!(tick_of("tick 17 memory BAD at 0x1000"), None);
        assert_eq!(tick_of("tick 17 mem"), None);
    }
}
