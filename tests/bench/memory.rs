//! How much memory vmstow needs, beside how large the guest is.
//!
//! The peak is the kernel's own count for vmstow's process (`VmHWM`), read every millisecond until it ends. The count
//! that `wait4` gives would not do: it includes QEMUs that vmstow started to ask for their version, and this process
//! before the `exec`.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::contender::{Contender, Place};
use crate::end;
use crate::guests::Recipe;
use crate::ours::Vmstow;
use crate::support::{Qmp, fill};
use crate::table::{MemoryRow, Results};
use crate::work_dir::WorkDir;

const GUESTS_MIB: [u64; 3] = [1024, 2048, 4096];

pub fn run(work: &WorkDir, results: &mut Results) {
    for memory_mib in GUESTS_MIB {
        let recipe = Recipe::small(memory_mib);
        for layout in ["zstd", "raw"] {
            let what = format!("{}, {layout}", recipe.name);
            end::doing(&format!("memory, {what}"));
            let place = Place::make(work, &recipe, &what.replace(',', ""));
            let mut vmstow = Vmstow::new(work, place.clone(), layout);
            let qemu = vmstow.boot();
            let serial = place.serial();
            serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
            fill(
                qemu.pid(),
                &mut Qmp::connect(place.dir.join("qmp")),
                memory_mib << 20,
            );
            let (save, _) = peak(&mut vmstow.save_command());
            qemu.wait_for_exit();
            let (verify, _) = peak(work.vmstow().arg("verify").arg(place.image()));
            let before = serial.mark();
            let (restore, answer) = peak(&mut vmstow.restore_command());
            let guest = vmstow.adopt(&answer);
            serial.assert_goes_on(&before);
            guest.kill();
            results.add_memory(MemoryRow {
                guest: what,
                save,
                verify,
                restore,
            });
            work.done_with(&place.dir);
        }
    }
}

/// The most bytes that a command had in memory, and what it answered. It must succeed.
#[track_caller]
pub fn peak(command: &mut Command) -> (u64, String) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmstow can be started");
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        peak = peak.max(has_peak(child.id()));
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {said}");
    (peak, String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The most bytes that a process had in memory so far; none if it is gone.
pub fn has_peak(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
