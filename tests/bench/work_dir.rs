//! Where everything of one run lies: `target/bench/RUN`, on the file system of the build.

use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::end;
use crate::options::Options;
use crate::support::TestDir;

/// Enough for the images of the largest recipe in all formats, and its payload.
const NEEDED_BYTES: u64 = 20 << 30;

#[derive(Debug)]
pub struct WorkDir {
    dir: TestDir,
    payload: Option<PathBuf>,
    keeps_all: bool,
}

impl WorkDir {
    pub fn create(options: &Options) -> Self {
        end::doing("the work directory");
        let parent = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
        std::fs::create_dir_all(&parent).unwrap();
        let file_system = rustix::fs::statvfs(&parent).unwrap();
        let free = file_system.f_bavail * file_system.f_frsize;
        assert!(
            free >= NEEDED_BYTES,
            "{} has {} GiB free, {} GiB are needed",
            parent.display(),
            free >> 30,
            NEEDED_BYTES >> 30
        );
        let mut dir = TestDir::below(&parent, "run-");
        if options.keep {
            dir.keep();
            eprintln!("everything stays in {}", dir.path().display());
        }
        WorkDir {
            dir,
            payload: None,
            keeps_all: options.keep,
        }
    }

    /// The payload of a recipe; removed by [`WorkDir::forget_payload`].
    pub fn payload(&mut self) -> &Path {
        self.payload.insert(self.dir.join("payload"))
    }

    pub fn forget_payload(&mut self) {
        if let Some(path) = self.payload.take() {
            let _ = std::fs::remove_file(path);
        }
    }

    /// A new directory in it.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Removes one that is not needed any more, unless all are to be kept.
    pub fn done_with(&self, subdir: &Path) {
        if !self.keeps_all {
            let _ = std::fs::remove_dir_all(subdir);
        }
    }

    /// The program under test, out of reach of the terminal's Ctrl-C, which is answered here.
    pub fn vmstow(&self) -> Command {
        let mut command = self.dir.vmstow_command();
        command.process_group(0);
        command
    }

    /// Another program, run in it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir.path()).process_group(0);
        command
    }
}

impl Deref for WorkDir {
    type Target = TestDir;

    fn deref(&self) -> &TestDir {
        &self.dir
    }
}

impl Drop for WorkDir {
    /// A panic may have left some.
    fn drop(&mut self) {
        if std::thread::panicking() {
            end::end_processes(self.dir.path());
        }
    }
}
