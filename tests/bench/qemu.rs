//! QEMU alone, told by QMP to migrate to a file and from it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::contender::{Contender, Place};
use crate::support::{Adopted, PATIENCE, Process, Qemu, Qmp};
use crate::work_dir::WorkDir;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `migrate file:`
    File,
    /// The same with the capabilities `mapped-ram` and `multifd`, two channels.
    MappedRam,
    /// `migrate exec:zstd -1 -T2`, back with `exec:zstd -dc`.
    Zstd,
}

pub struct Migration<'a> {
    pub work: &'a WorkDir,
    pub place: Place,
    pub way: Way,
}

impl Migration<'_> {
    fn set_up(&self, qmp: &mut Qmp) {
        let mut on = vec!["events"];
        if self.way == Way::MappedRam {
            on.extend(["mapped-ram", "multifd"]);
        }
        let on: Vec<_> = on
            .into_iter()
            .map(|name| json!({ "capability": name, "state": true }))
            .collect();
        qmp.command("migrate-set-capabilities", json!({ "capabilities": on }));
        let mut parameters = json!({ "max-bandwidth": 0 });
        if self.way == Way::MappedRam {
            parameters["multifd-channels"] = json!(2);
        }
        qmp.command("migrate-set-parameters", parameters);
    }

    fn connect(&self) -> Qmp {
        let path = self.place.dir.join("qmp");
        wait_for_socket(&path);
        Qmp::connect(path)
    }
}

impl Contender for Migration<'_> {
    fn boot(&mut self) -> Adopted {
        boot(self.work, &self.place)
    }

    fn save(&mut self) {
        let image = self.place.image();
        let whole = self.place.dir.join("whole");
        let _ = std::fs::remove_file(&whole);
        let uri = match self.way {
            Way::File | Way::MappedRam => format!("file:{}", image.display()),
            // QEMU does not wait for the command's end, so it leaves a sign.
            Way::Zstd => format!(
                "exec:zstd -1 -T2 -q -c > '{}' && touch '{}'",
                image.display(),
                whole.display()
            ),
        };
        let mut qmp = self.connect();
        self.set_up(&mut qmp);
        qmp.command("stop", json!({}));
        qmp.command("migrate", json!({ "uri": uri }));
        wait_for_completion(&mut qmp);
        qmp.command("quit", json!({}));
        let end = Instant::now() + PATIENCE;
        while self.way == Way::Zstd && !whole.exists() {
            assert!(Instant::now() < end, "zstd did not end well");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn restore(&mut self) -> Adopted {
        let image = self.place.image();
        let uri = match self.way {
            Way::File | Way::MappedRam => format!("file:{}", image.display()),
            Way::Zstd => format!("exec:zstd -dc '{}'", image.display()),
        };
        let qemu = start(self.work, &self.place, &["-incoming", "defer"]);
        let mut qmp = self.connect();
        self.set_up(&mut qmp);
        qmp.command("migrate-incoming", json!({ "uri": uri }));
        wait_for_completion(&mut qmp);
        qmp.command("cont", json!({}));
        qemu
    }
}

/// Starts the recipe's guest.
pub fn boot(work: &WorkDir, place: &Place) -> Adopted {
    let qemu = start(work, place, &[]);
    wait_for_socket(&place.dir.join("qmp"));
    qemu
}

fn start(work: &WorkDir, place: &Place, more: &[&str]) -> Adopted {
    let said = place.dir.join("stderr");
    let _ = std::fs::remove_file(place.dir.join("qmp"));
    let mut child = work
        .command(Qemu::V10.program())
        .args(place.recipe.arguments(&place.dir))
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(
            File::options()
                .append(true)
                .create(true)
                .open(&said)
                .unwrap(),
        )
        .spawn()
        .expect("QEMU can be started");
    // A moment after fork it has no arguments yet.
    let end = Instant::now() + PATIENCE;
    let process = loop {
        if let Some(process) = Process::open(child.id()) {
            break process;
        }
        let ended = child.try_wait().unwrap();
        let is_late = Instant::now() > end;
        assert!(
            ended.is_none() && !is_late,
            "QEMU does not start: see {}",
            said.display()
        );
        std::thread::sleep(Duration::from_millis(1));
    };
    std::thread::spawn(move || child.wait());
    Adopted(process)
}

/// Looks every millisecond: ten would be a disadvantage.
#[track_caller]
fn wait_for_socket(path: &Path) {
    let end = Instant::now() + PATIENCE;
    while UnixStream::connect(path).is_err() {
        assert!(Instant::now() < end, "no monitor at {}", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[track_caller]
fn wait_for_completion(qmp: &mut Qmp) {
    loop {
        let event = qmp.wait_for_event("MIGRATION");
        match event["data"]["status"].as_str() {
            Some("completed") => return,
            Some("failed" | "cancelled") => panic!("QEMU's migration: {event}"),
            _ => {}
        }
    }
}
