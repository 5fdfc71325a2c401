//! How a guest is before a save, to be held against how it is after one that failed.

use std::time::Duration;

use serde_json::{Value, json};

use super::dir::TestDir;
use super::guest::Guest;
use super::qmp::Qmp;
use super::serial::Mark;
use super::wait::{PATIENCE, wait_until};

/// A guest's run state, count and migration settings, and the files beside it.
#[derive(Debug)]
pub struct Before {
    status: String,
    count: Mark,
    settings: Settings,
    names: Vec<String>,
}

/// QEMU's migration capabilities and parameters.
#[derive(Debug, PartialEq)]
pub struct Settings {
    capabilities: Value,
    parameters: Value,
}

impl Settings {
    pub fn of(qmp: &mut Qmp) -> Self {
        Settings {
            capabilities: qmp.command("query-migrate-capabilities", json!({})),
            parameters: qmp.command("query-migrate-parameters", json!({})),
        }
    }

    /// Sets some that are no QEMU's defaults and that a save has to change.
    pub fn make_unusual(guest: &Guest) {
        let mut qmp = guest.qmp();
        let names = ["xbzrle", "return-path", "auto-converge"];
        let on = names.map(|name| json!({ "capability": name, "state": true }));
        qmp.command("migrate-set-capabilities", json!({ "capabilities": on }));
        let parameters = json!({ "max-bandwidth": 5_000_000, "downtime-limit": 77 });
        qmp.command("migrate-set-parameters", parameters);
    }
}

impl Before {
    pub fn of(dir: &TestDir, guest: &Guest) -> Self {
        let mut qmp = guest.qmp();
        Before {
            status: qmp.status(),
            count: guest.serial().mark(),
            settings: Settings::of(&mut qmp),
            names: dir.names(),
        }
    }

    /// Nothing was lost and nothing is left: the guest runs or rests as before, counts on if it did, has its settings,
    /// and no file appeared or went.
    #[track_caller]
    pub fn assert_is_back(&self, dir: &TestDir, guest: &Guest) {
        assert_eq!(dir.names(), self.names, "files beside the guest");
        self.assert_guest_is_back(guest);
    }

    /// As [`Before::assert_is_back`], whatever files there are.
    #[track_caller]
    pub fn assert_guest_is_back(&self, guest: &Guest) {
        let mut qmp = guest.qmp();
        assert_eq!(Settings::of(&mut qmp), self.settings, "migration settings");
        let status = qmp.status();
        if self.status == "running" {
            assert_eq!(status, "running");
            self.assert_counts_on(guest);
        } else {
            // QEMU 7.2 has no way back from a migration's end that does not let the guest run.
            let rests = ["paused", "postmigrate"].contains(&status.as_str());
            assert!(rests, "{status} after {}", self.status);
            self.assert_rests(guest);
        }
    }

    /// The guest counts on from where it was.
    #[track_caller]
    pub fn assert_counts_on(&self, guest: &Guest) {
        let now = guest.serial().last_tick();
        let serial = guest.serial();
        serial.assert_goes_on_to(&self.count, now.max(self.count.last_tick()) + 2);
    }

    /// The guest does not run.
    #[track_caller]
    pub fn assert_rests(&self, guest: &Guest) {
        let tick = guest.serial().last_tick();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(guest.serial().last_tick(), tick, "the guest counts");
    }
}

/// Waits until no program under test knows the directory, and no guardian of one.
#[track_caller]
pub fn wait_for_silence(dir: &TestDir) {
    wait_until("the programs under test to end", PATIENCE, || {
        let mut processes = dir.processes();
        processes.retain(|process| process.program().ends_with("vmstow") && !process.has_ended());
        let seen = format!("{processes:?}");
        processes.is_empty().then_some(()).ok_or(seen)
    });
}
