//! A test's own directory.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use super::process::{Adopted, Process, processes_that_know};
use super::wait::{PATIENCE, wait_until};

/// A directory for one test: guests, images, and the program's own state live in it and end with it.
#[derive(Debug)]
pub struct TestDir(tempfile::TempDir);

impl TestDir {
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir(), "vmstow-test-")
    }

    /// One in `parent`, its name beginning with `prefix`.
    pub fn below(parent: &Path, prefix: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(parent)
            .expect("a temporary directory can be made");
        for name in ["run", "state", "config", "cache"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        TestDir(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves its files behind when it is dropped; processes are ended all the same.
    pub fn keep(&mut self) {
        self.0.disable_cleanup(true);
    }

    /// The path of `name` in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The names in it, sorted, without what the harness itself made.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !["run", "state", "config", "cache"].contains(&name.as_str()))
            .collect();
        names.sort();
        names
    }

    /// The program under test, run in this directory with all its state in it. It is ended after two minutes.
    pub fn vmstow(&self) -> assert_cmd::Command {
        let mut command = assert_cmd::Command::from_std(self.vmstow_command());
        command.timeout(Duration::from_secs(120));
        command
    }

    /// As [`TestDir::vmstow`], to be started and watched while it runs.
    pub fn vmstow_command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmstow"));
        command
            .current_dir(self.path())
            .env("VMSTOW_RUNTIME_DIR", self.join("run"))
            .env("XDG_RUNTIME_DIR", self.join("run"))
            .env("VMSTOW_OVERLAY_DIR", self.join("overlays"))
            .env("XDG_STATE_HOME", self.join("state"))
            .env("XDG_CACHE_HOME", self.join("cache"))
            .env("XDG_CONFIG_HOME", self.join("config"))
            .env("VMSTOW_SYSTEM_CONFIG", self.join("config/system.toml"))
            .env("NO_COLOR", "1");
        command
    }

    /// What the program says to a user who is nobody, to whom the directory and all in it is given. This needs root.
    #[track_caller]
    pub fn as_nobody(&self, arguments: &[&str]) -> Output {
        const NOBODY: u32 = 65534;
        let plain = self.vmstow_command();
        let program = self.join("vmstow");
        std::fs::copy(plain.get_program(), &program).unwrap();
        let owner = NOBODY.to_string();
        let mut give = Command::new("chown");
        give.args(["-R", &owner]).arg(self.path());
        assert!(give.status().unwrap().success());
        let mut command = Command::new(program);
        command.args(arguments).uid(NOBODY).gid(NOBODY);
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap());
        }
        command.current_dir(self.path()).output().unwrap()
    }

    /// The processes that know this directory, whoever started them: QEMUs, and helpers of ours that still run.
    pub fn processes(&self) -> Vec<Process> {
        processes_that_know(self.path())
            .into_iter()
            .filter_map(Process::open)
            .collect()
    }

    /// The QEMUs that know this directory, whoever started them.
    pub fn qemus(&self) -> Vec<Process> {
        let mut processes = self.processes();
        processes.retain(Process::is_qemu);
        processes
    }

    /// Waits for a QEMU that has `text` in its arguments and is not one of `others`, and answers for it from now on.
    #[track_caller]
    pub fn adopt_qemu(&self, text: &str, others: &[u32]) -> Adopted {
        wait_until("a QEMU to adopt", PATIENCE, || {
            let qemus = self.qemus();
            let seen = format!("there are: {qemus:#?}");
            qemus
                .into_iter()
                .filter(|qemu| !others.contains(&qemu.pid()))
                .find(|qemu| qemu.argv().iter().any(|word| word.contains(text)))
                .map(Adopted)
                .ok_or(seen)
        })
    }
}

impl Default for TestDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestDir {
    /// Fails the test if a process is left that knows this directory; helpers get two seconds to end by themselves.
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(2);
        while !processes_that_know(self.path()).is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        let left: Vec<Adopted> = self.processes().into_iter().map(Adopted).collect();
        if !left.is_empty() && !std::thread::panicking() {
            panic!("left running (and killed now): {left:#?}");
        }
    }
}

/// Flips one bit (0 is the lowest) of the byte at `offset`.
pub fn flip_bit(path: impl AsRef<Path>, offset: u64, bit: u32) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, offset).unwrap();
}
