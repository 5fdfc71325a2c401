//! How soon a guest goes on that is restored lazily, or whose memory is mapped, however much memory it has.
//!
//! Guests of 512 MiB to 8 GiB, all of whose memory holds something: what the guest itself did not touch is filled from
//! outside, half with what compresses and half with what does not. Each is restored again and again from the same image
//! and ended. A bare QEMU with the same arguments, which only answers its monitor, is the measure of what cannot be saved.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::contender::{Contender, Place, run};
use crate::end;
use crate::guests::Recipe;
use crate::ours::Vmstow;
use crate::rounds::{cool, use_free_memory, warm};
use crate::support::{Adopted, Libvirtd, PATIENCE, Process, Qmp, fill, fill_at};
use crate::table::Results;
use crate::virsh::Virsh;
use crate::work_dir::WorkDir;

const GUESTS_MIB: [u64; 5] = [512, 1024, 2048, 4096, 8192];

/// The guest for which the others are asked, too.
const AGAINST_VIRSH_MIB: u64 = 4096;

/// What was measured of one guest, one value a round, in seconds.
#[derive(Debug, Default)]
pub struct TickRow {
    pub guest: String,
    /// From QEMU's start until its monitor answers.
    pub bare: Vec<f64>,
    /// From the command until the guest's next tick.
    pub lazy: Vec<f64>,
    pub mapped: Vec<f64>,
    /// As `lazy`, from an image that keeps what an earlier restore asked for first.
    pub recorded: Vec<f64>,
    pub eager: Vec<f64>,
    /// Of `eager`, from when the guest ran: a tick with all memory there and nothing translated yet.
    pub cold_tick: Vec<f64>,
    /// `virsh restore` of its raw image; empty where it was not asked.
    pub virsh: Vec<f64>,
    /// From the command until all memory was there.
    pub lazy_whole: Vec<f64>,
    /// The longest that the guest waited for a page, once.
    pub stall: Vec<f64>,
}

pub fn run_all(work: &WorkDir, rounds: u32, results: &mut Results) {
    for memory_mib in GUESTS_MIB {
        results.add_ticks(measure(work, memory_mib, rounds));
    }
}

fn measure(work: &WorkDir, memory_mib: u64, rounds: u32) -> TickRow {
    let recipe = Recipe::small(memory_mib);
    let (lazy, lazy_sum) = stow(work, &recipe, "zstd");
    let (mapped, mapped_sum) = stow(work, &recipe, "mapped");
    let libvirtd =
        (memory_mib == AGAINST_VIRSH_MIB).then(|| Libvirtd::start(&work.subdir("libvirt")));
    let mut virsh = libvirtd.as_ref().map(|libvirtd| {
        let place = Place::make(work, &recipe, &format!("{} virsh", recipe.name));
        stow_by_virsh(libvirtd, place)
    });
    let mut row = TickRow {
        guest: recipe.name.clone(),
        ..TickRow::default()
    };
    let recorded = record(&lazy, &lazy_sum);
    let mut images = vec![lazy.place.image(), mapped.place.image(), recorded.clone()];
    images.extend(virsh.as_ref().map(|virsh| virsh.place.image()));
    let prepare = |image: PathBuf| prepare(&image, &images, memory_mib << 20);
    for round in 0..rounds {
        end::doing(&format!("first tick, {}, round {}", recipe.name, round + 1));
        row.bare.push(bare_start(work, &lazy));
        prepare(lazy.place.image());
        let (tick, whole, stall) =
            restore_lazily(&lazy, lazy.restore_command(), &["--lazy"], &lazy_sum);
        row.lazy.push(tick);
        row.lazy_whole.push(whole);
        row.stall.push(stall);
        prepare(recorded.clone());
        let command = lazy.command_to_restore(&recorded);
        row.recorded
            .push(restore_lazily(&lazy, command, &["--lazy"], &lazy_sum).0);
        prepare(lazy.place.image());
        let (eager, report) = restore(&lazy, &[], &lazy_sum);
        row.eager.push(eager);
        let ran_after = report["running_after_ms"].as_f64().unwrap() / 1e3;
        row.cold_tick.push((eager - ran_after).max(0.0));
        prepare(mapped.place.image());
        row.mapped.push(restore(&mapped, &["--map"], &mapped_sum).0);
        if let Some(virsh) = &mut virsh {
            prepare(virsh.place.image());
            let known = virsh.place.serial_len();
            let begin = Instant::now();
            let qemu = virsh.restore();
            let tick = virsh.place.wait_for_line_behind(known, || {});
            row.virsh.push((tick - begin).as_secs_f64());
            qemu.kill();
            std::thread::sleep(Duration::from_millis(500)); // libvirtd takes note of it
        }
        eprintln!(
            "{}, round {}: bare {:.3} s, lazy {:.3} s (all after {:.3} s), recorded {:.3} s, mapped {:.3} s, eager {:.3} s ({:.3} s of it a tick)",
            recipe.name,
            round + 1,
            row.bare[row.bare.len() - 1],
            tick,
            whole,
            row.recorded[row.recorded.len() - 1],
            row.mapped[row.mapped.len() - 1],
            eager,
            row.cold_tick[row.cold_tick.len() - 1],
        );
    }
    for place in [&lazy.place, &mapped.place] {
        work.done_with(&place.dir);
    }
    row
}

/// Has one image, and no other, in the page cache, and as much memory as a guest has at hand.
fn prepare(image: &Path, images: &[PathBuf], guest_len: u64) {
    for other in images.iter().filter(|other| *other != image) {
        cool(other);
    }
    use_free_memory(usize::try_from(guest_len).unwrap());
    warm(image);
}

/// Boots the guest, fills its memory and saves it; gives its checksum too.
fn stow<'a>(work: &'a WorkDir, recipe: &Recipe, layout: &'static str) -> (Vmstow<'a>, String) {
    end::doing(&format!(
        "first tick, {}, {layout}, first save",
        recipe.name
    ));
    let place = Place::make(work, recipe, &format!("{} {layout}", recipe.name));
    let mut vmstow = Vmstow::new(work, place.clone(), layout);
    let qemu = vmstow.boot();
    let line = place
        .serial()
        .wait_for_line("the first checksum", |line| line.starts_with("sum "));
    let mut qmp = Qmp::connect(place.dir.join("qmp"));
    fill(qemu.pid(), &mut qmp, recipe.memory_mib << 20);
    drop(qmp);
    vmstow.save();
    qemu.wait_for_exit();
    (vmstow, line.trim_start_matches("sum ").to_owned())
}

fn stow_by_virsh<'a>(libvirtd: &'a Libvirtd, place: Place) -> Virsh<'a> {
    let mut virsh = Virsh {
        libvirtd,
        place: place.clone(),
        format: "raw",
    };
    let qemu = virsh.boot();
    place
        .serial()
        .wait_for_line("the first checksum", |line| line.starts_with("sum "));
    let ask = |line: &str| {
        let mut command = libvirtd.virsh();
        run(command.args(["qemu-monitor-command", "raw", "--hmp", line]))
    };
    fill_at(qemu.pid(), &ask, place.recipe.memory_mib << 20);
    virsh.save();
    qemu.wait_for_exit();
    virsh
}

/// From the start of a QEMU with the guest's arguments until its monitor answers.
fn bare_start(work: &WorkDir, vmstow: &Vmstow<'_>) -> f64 {
    let mut print = vmstow.restore_command();
    let plan: Value = serde_json::from_str(&run(print.arg("--print-command"))).unwrap();
    let words = plan["argv"].as_array().unwrap().iter();
    let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
    let socket = words.iter().find_map(|word| {
        word.split("path=")
            .nth(1)?
            .strip_suffix(",server=on,wait=off")
    });
    let socket = Path::new(socket.expect("the command names its monitor"));
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let mut command = work.command(words[0]);
    command
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let begin = Instant::now();
    let mut child = command.spawn().unwrap();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(begin.elapsed() < PATIENCE, "QEMU does not start");
        std::thread::sleep(Duration::from_micros(500));
    }
    let mut qmp = Qmp::connect(socket);
    qmp.command("query-status", json!({}));
    let seconds = begin.elapsed().as_secs_f64();
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_dir_all(socket.parent().unwrap()).unwrap();
    seconds
}

/// From the command until the guest's next tick; the guest is judged and ended. Gives what the command answered, too.
fn restore(vmstow: &Vmstow<'_>, more: &[&str], sum: &str) -> (f64, Value) {
    let (seconds, answer, qemu) = tick(vmstow, vmstow.restore_command(), more);
    end_guest(vmstow, &answer, sum, qemu);
    (seconds, answer)
}

fn tick(vmstow: &Vmstow<'_>, mut command: Command, more: &[&str]) -> (f64, Value, Adopted) {
    let place = &vmstow.place;
    let known = place.serial_len();
    command.args(more);
    let begin = Instant::now();
    let answer = std::thread::scope(|scope| {
        let command = scope.spawn(move || run(&mut command));
        let tick = place.wait_for_line_behind(known, || {});
        (tick, command.join().expect("the restore succeeds"))
    });
    let report: Value = serde_json::from_str(&answer.1).unwrap();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let qemu = Adopted(Process::open(pid).expect("the guest's QEMU runs"));
    ((answer.0 - begin).as_secs_f64(), report, qemu)
}

/// A copy of the guest's image in which a lazy restore recorded what the guest asked for.
fn record(vmstow: &Vmstow<'_>, sum: &str) -> PathBuf {
    let copy = vmstow.place.dir.join("recorded");
    std::fs::copy(vmstow.place.image(), &copy).unwrap();
    let command = vmstow.command_to_restore(&copy);
    restore_lazily(vmstow, command, &["--lazy", "--record"], sum);
    copy
}

/// As [`restore`], and until all memory was there; the worst stall.
fn restore_lazily(
    vmstow: &Vmstow<'_>,
    command: Command,
    more: &[&str],
    sum: &str,
) -> (f64, f64, f64) {
    let begin = Instant::now();
    let (seconds, report, qemu) = tick(vmstow, command, more);
    let name = report["name"].as_str().unwrap();
    let mut wait: Command = vmstow.work.vmstow();
    let served = run(wait.args(["--json", "restore", "--resume", name, "--wait"]));
    let whole = begin.elapsed().as_secs_f64();
    let served: Value = serde_json::from_str(&served).unwrap();
    let stall = served["served"]["worst_stall_us"].as_f64().unwrap() / 1e6;
    end_guest(vmstow, &report, sum, qemu);
    (seconds, whole, stall)
}

fn end_guest(vmstow: &Vmstow<'_>, report: &Value, sum: &str, qemu: Adopted) {
    assert_eq!(
        vmstow.place.ask_for_sum(),
        sum,
        "the guest's checksum of its memory"
    );
    let mut stop = vmstow.work.vmstow();
    run(stop.args(["stop", report["name"].as_str().unwrap()]));
    qemu.wait_for_exit();
}
