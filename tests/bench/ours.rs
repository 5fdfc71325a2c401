//! `vmstow save` and `vmstow restore`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::contender::{Contender, Place, run};
use crate::qemu;
use crate::support::{Adopted, Process};
use crate::work_dir::WorkDir;

pub struct Vmstow<'a> {
    pub work: &'a WorkDir,
    pub place: Place,
    pub layout: &'static str,
    /// What `vmstow save` is told to save.
    source: String,
}

impl<'a> Vmstow<'a> {
    pub fn new(work: &'a WorkDir, place: Place, layout: &'static str) -> Self {
        Vmstow {
            work,
            place,
            layout,
            source: String::new(),
        }
    }

    /// The command that saves the running guest.
    pub fn save_command(&self) -> Command {
        let mut command = self.work.vmstow();
        command
            .args(["--json", "save", &self.source])
            .arg(self.place.image())
            .args(["--layout", self.layout]);
        command
    }

    pub fn restore_command(&self) -> Command {
        self.command_to_restore(&self.place.image())
    }

    pub fn command_to_restore(&self, image: &Path) -> Command {
        let mut command = self.work.vmstow();
        command.args(["--json", "restore"]).arg(image);
        command
    }

    /// Takes over the guest that `vmstow restore --json` told of.
    #[track_caller]
    pub fn adopt(&mut self, answer: &str) -> Adopted {
        let report: Value = serde_json::from_str(answer).expect("the answer is JSON");
        self.source = report["name"].as_str().unwrap().to_owned();
        let pid = report["pid"].as_u64().expect("the answer names a process");
        let process = Process::open(u32::try_from(pid).unwrap());
        Adopted(process.expect("the guest's QEMU runs"))
    }
}

impl Contender for Vmstow<'_> {
    fn boot(&mut self) -> Adopted {
        self.source = format!("qmp:{}", self.place.dir.join("qmp").display());
        qemu::boot(self.work, &self.place)
    }

    fn save(&mut self) {
        run(&mut self.save_command());
    }

    fn restore(&mut self) -> Adopted {
        let answer = run(&mut self.restore_command());
        self.adopt(&answer)
    }
}
