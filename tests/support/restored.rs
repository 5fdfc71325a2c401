//! Guests that the program under test restored, and its answers.

use std::path::PathBuf;

use serde_json::Value;

use super::dir::TestDir;
use super::process::{Adopted, Process};
use super::qmp::Qmp;

/// A guest that `vmstow restore` left running; its QEMU is ended when this is dropped.
#[derive(Debug)]
pub struct Restored {
    /// What `vmstow restore --json` answered.
    pub report: Value,
    pub qemu: Adopted,
}

impl Restored {
    pub fn name(&self) -> &str {
        self.report["name"].as_str().unwrap()
    }

    /// A QMP connection of the test's own; the program under test cannot talk to this guest while it is open.
    #[track_caller]
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(PathBuf::from(self.report["qmp"].as_str().unwrap()))
    }
}

impl TestDir {
    /// Runs the program, which must succeed, with `--json`; gives its answer.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.vmstow().arg("--json").args(arguments).unwrap();
        serde_json::from_slice(&output.stdout).expect("the answer is JSON")
    }

    /// Runs `vmstow restore`, which must succeed and leave a guest.
    #[track_caller]
    pub fn restore(&self, arguments: &[&str]) -> Restored {
        let mut words = vec!["restore"];
        words.extend(arguments);
        Restored::of(self.json(&words))
    }

    /// Runs the program, which must end with exit code `code` and say nothing on stdout; gives what it says on stderr.
    #[track_caller]
    pub fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let assert = self.vmstow().args(arguments).assert().code(code).stdout("");
        String::from_utf8(assert.get_output().stderr.clone()).unwrap()
    }
}

impl Restored {
    /// The guest of such an answer.
    #[track_caller]
    pub fn of(report: Value) -> Self {
        let pid = report["pid"].as_u64().expect("the answer names a process");
        let process = Process::open(u32::try_from(pid).unwrap()).expect("the guest's QEMU runs");
        assert!(process.is_qemu(), "{process:?}");
        let qemu = Adopted(process);
        Restored { report, qemu }
    }
}
