//! Save and restore, in rounds: every contender restores and saves its guest once in each, and the order moves on.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use crate::clock::{Clock, Cost};
use crate::contender::{Contender, Entrant, Place};
use crate::end;
use crate::guests::Recipe;
use crate::ours::Vmstow;
use crate::qemu::{Migration, Way};
use crate::support::{Adopted, Libvirtd, Mark};
use crate::table::{Results, Sample};
use crate::virsh::Virsh;
use crate::work_dir::WorkDir;

/// Held against each other; the first word is the tool.
pub const OURS_ZSTD: &str = "vmstow zstd";
pub const OURS_RAW: &str = "vmstow raw";
pub const VIRSH_RAW: &str = "virsh raw";
pub const VIRSH_ZSTD: &str = "virsh zstd";
pub const VIRSH_SPARSE: &str = "virsh sparse";
pub const QEMU_FILE: &str = "QEMU file:";
pub const QEMU_MAPPED: &str = "QEMU mapped-ram";
pub const QEMU_ZSTD: &str = "QEMU exec:zstd";

/// How long a guest runs between its restore and its save, at least.
const PAUSE: Duration = Duration::from_millis(300);

/// How many ticks a guest has to go on for, to be believed.
const TICKS: u64 = 20;

/// A contender with its guest in its image, and what that guest had said.
struct Stowed<'a> {
    entrant: Entrant<'a>,
    before: Mark,
    sum: String,
}

pub fn run(recipe: &Recipe, work: &WorkDir, rounds: u32, results: &mut Results) {
    let libvirtd = Libvirtd::start(&work.subdir("libvirt"));
    let mut stowed: Vec<Stowed> = entrants(recipe, work, &libvirtd)
        .into_iter()
        .map(|entrant| stow(entrant, &recipe.name))
        .collect();
    let memory_len = usize::try_from(recipe.memory_mib << 20).unwrap();
    for round in 0..rounds {
        for stowed in &mut stowed {
            let name = stowed.entrant.name;
            end::doing(&format!("{}, {name}, round {}", recipe.name, round + 1));
            let sample = |work, cost, bytes| Sample {
                guest: recipe.name.clone(),
                work,
                contender: name,
                round,
                cost,
                bytes,
            };
            let (restored, saved) = play(stowed, memory_len);
            let bytes = stowed.entrant.place.image_bytes();
            eprintln!(
                "{}, round {}: {name} restored in {:.3} s, saved in {:.3} s",
                recipe.name,
                round + 1,
                restored.seconds,
                saved.seconds
            );
            results.add(sample("restore", restored, bytes));
            results.add(sample("save", saved, bytes));
        }
        stowed.rotate_left(1);
    }
    for stowed in &stowed {
        let dir = &stowed.entrant.place.dir;
        work.done_with(dir);
    }
}

fn entrants<'a>(recipe: &Recipe, work: &'a WorkDir, libvirtd: &'a Libvirtd) -> Vec<Entrant<'a>> {
    let place = |name: &str| Place::make(work, recipe, &format!("{} {name}", recipe.name));
    let ours = |name, layout| {
        let contender = Vmstow::new(work, place(name), layout);
        enter(name, place(name), contender)
    };
    let virsh = |name, format| {
        let place = place(name);
        let contender = Virsh {
            libvirtd,
            place: place.clone(),
            format,
        };
        enter(name, place, contender)
    };
    let qemu = |name, way| {
        let place = place(name);
        let contender = Migration {
            work,
            place: place.clone(),
            way,
        };
        enter(name, place, contender)
    };
    vec![
        ours(OURS_ZSTD, "zstd"),
        virsh(VIRSH_ZSTD, "zstd"),
        qemu(QEMU_ZSTD, Way::Zstd),
        virsh(VIRSH_RAW, "raw"),
        ours(OURS_RAW, "raw"),
        qemu(QEMU_FILE, Way::File),
        virsh(VIRSH_SPARSE, "sparse"),
        qemu(QEMU_MAPPED, Way::MappedRam),
    ]
}

fn enter<'a>(
    name: &'static str,
    place: Place,
    contender: impl Contender + Send + 'a,
) -> Entrant<'a> {
    Entrant {
        name,
        place,
        contender: Box::new(contender),
    }
}

/// Boots a contender's guest and saves it for the first time, which does not count.
fn stow<'a>(mut entrant: Entrant<'a>, guest: &str) -> Stowed<'a> {
    end::doing(&format!("{guest}, {}, first save", entrant.name));
    let qemu = entrant.contender.boot();
    let serial = entrant.place.serial();
    let line = serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
    let sum = line.trim_start_matches("sum ").to_owned();
    std::thread::sleep(PAUSE);
    save(&mut entrant, qemu);
    let before = serial.mark();
    Stowed {
        entrant,
        before,
        sum,
    }
}

/// One contender's part of a round: restore, judge, save.
fn play(stowed: &mut Stowed, memory_len: usize) -> (Cost, Cost) {
    warm(&stowed.entrant.place.image());
    rustix::fs::sync();
    use_free_memory(2 * memory_len);
    let (qemu, restored) = restore(&mut stowed.entrant);
    let place = &stowed.entrant.place;
    assert_eq!(
        place.ask_for_sum(),
        stowed.sum,
        "the guest's checksum of its memory"
    );
    let serial = place.serial();
    serial.assert_goes_on_to(&stowed.before, stowed.before.last_tick() + TICKS);
    std::thread::sleep(PAUSE);
    std::fs::remove_file(place.image()).unwrap();
    rustix::fs::sync();
    use_free_memory(2 * memory_len);
    let saved = save(&mut stowed.entrant, qemu);
    stowed.before = serial.mark();
    (restored, saved)
}

/// From the command until the guest says something; the CPU's work until the command returned too.
fn restore(entrant: &mut Entrant) -> (Adopted, Cost) {
    let known = entrant.place.serial_len();
    let clock = Clock::start();
    std::thread::scope(|scope| {
        let contender = &mut entrant.contender;
        let command = scope.spawn(|| contender.restore());
        let mut command = Some(command);
        let mut qemu = None;
        let mut collect = |is_time: bool| {
            if let Some(command) = command.take_if(|it| is_time || it.is_finished()) {
                qemu = Some(command.join().expect("the restore succeeds"));
            }
        };
        let tick = entrant.place.wait_for_line_behind(known, || collect(false));
        collect(true);
        let cost = clock.stop_at(tick);
        (qemu.unwrap(), cost)
    })
}

/// From the command until it returned, the image is on the disk and QEMU is gone.
fn save(entrant: &mut Entrant, qemu: Adopted) -> Cost {
    let clock = Clock::start();
    entrant.contender.save();
    File::open(entrant.place.image())
        .unwrap()
        .sync_all()
        .unwrap();
    qemu.wait_for_exit();
    clock.stop()
}

/// Brings a file into the page cache anew: whoever wrote it may have left all of it there, or nothing.
pub fn warm(path: &Path) {
    cool(path);
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).unwrap() > 0 {}
}

/// Takes a file out of the page cache.
pub fn cool(path: &Path) {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Uses, and gives back, `len` bytes of memory, best twice as many as the guest has. On a host that is a virtual machine
/// itself memory costs its first user much more than the next one, and each contender would be lucky or not.
pub fn use_free_memory(len: usize) {
    let mut memory = memmap2::MmapMut::map_anon(len).unwrap();
    memory.advise(memmap2::Advice::HugePage).unwrap();
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
}
