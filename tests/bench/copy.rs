//! `vmstow copy` beside `scp` and `rsync`: through a real ssh to a real sshd on this machine, which shares its cores with both.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::clock::Clock;
use crate::contender::{Contender, Place, run as run_command};
use crate::end;
use crate::guests::Recipe;
use crate::memory::{has_peak, peak};
use crate::ours::Vmstow;
use crate::rounds::warm;
use crate::support::{OtherHost, Qmp, write_memory};
use crate::table::{Results, Sample};
use crate::work_dir::WorkDir;

pub const OURS: &str = "vmstow copy";
pub const SCP: &str = "scp";
pub const RSYNC: &str = "rsync -e ssh";

pub const THERE: &str = "copy there";
pub const BACK: &str = "copy back";
pub const ONE_IN_TEN: &str = "copy, 10 % of the pages changed";
pub const ONE_IN_A_HUNDRED: &str = "copy, 1 % of the pages changed";

/// What is saved of a guest: at first, and after pages were changed.
struct Saves {
    before: PathBuf,
    /// After one in a hundred, and one in ten of the filled pages.
    after: [(&'static str, PathBuf, Changed); 2],
}

/// Pages that were changed: their number, and their bytes in a file.
struct Changed {
    count: usize,
    bytes: PathBuf,
}

pub fn run(recipe: &Recipe, work: &WorkDir, pairs: u32, results: &mut Results) {
    end::doing(&format!("{}, images to copy", recipe.name));
    let other = OtherHost::new(work, &format!("{}-there", recipe.name));
    let place = Place::make(work, recipe, &format!("{} copied", recipe.name));
    let saves = save(recipe, work, &place);
    let bench = Bench {
        guest: &recipe.name,
        work,
        other: &other,
    };
    for round in 0..pairs {
        let mut sides = [OURS, SCP];
        sides.rotate_left(usize::from(round % 2 == 1));
        for side in sides {
            bench.whole(&saves.before, side, round, results);
        }
        for (what, after, _) in &saves.after {
            let mut sides = [OURS, RSYNC];
            sides.rotate_left(usize::from(round % 2 == 1));
            for side in sides {
                bench.changed(what, &saves.before, after, side, round, results);
            }
        }
    }
    for (what, after, changed) in &saves.after {
        bench.ideals(what, &saves.before, after, changed, results);
    }
    bench.peaks(&saves, results);
    work.done_with(&place.dir);
    work.done_with(&other.path("."));
}

/// The guest stands still from the first save on: only we change its pages.
fn save(recipe: &Recipe, work: &WorkDir, place: &Place) -> Saves {
    let mut vmstow = Vmstow::new(work, place.clone(), "zstd");
    let qemu = vmstow.boot();
    let serial = place.serial();
    serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
    let source = format!("qmp:{}", place.dir.join("qmp").display());
    let save = |name: &str| {
        let image = place.dir.join(name);
        let mut command = work.vmstow();
        command.args(["--json", "save", &source]).arg(&image);
        run_command(command.args(["--then", "pause"]));
        image
    };
    let before = save("before.stow");
    // What the guest filled with content it fills from below; the upper end may be empty.
    let filled = recipe.memory_mib * 256 * 6 / 10;
    let change = |name: &str, every: u64| {
        let bytes = place.dir.join(format!("{name}.pages"));
        let count = change(qemu.pid(), &place.dir, filled, filled / every, &bytes);
        Changed { count, bytes }
    };
    let few = change("few", 100);
    let after_few = save("few.stow");
    let many = change("many", 10);
    let after_many = save("many.stow");
    qemu.kill();
    Saves {
        before,
        after: [
            (ONE_IN_A_HUNDRED, after_few, few),
            (ONE_IN_TEN, after_many, many),
        ],
    }
}

/// Puts other text into `count` pages at random below page `end`; their bytes go to a file too.
fn change(pid: u32, dir: &Path, end: u64, count: u64, bytes: &Path) -> usize {
    let mut qmp = Qmp::connect(dir.join("qmp"));
    let mut text = Vec::new();
    for word in std::fs::read_dir("/usr/bin").unwrap().flatten() {
        if text.len() < 64 << 20 && word.metadata().is_ok_and(|it| it.is_file()) {
            let _ = File::open(word.path()).and_then(|mut it| it.read_to_end(&mut text));
        }
    }
    // As well compressed as text is, and not to be found in the guest, which may hold the same files.
    text.iter_mut().for_each(|byte| *byte ^= 0x15);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ count;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut pages = BTreeSet::new();
    while (pages.len() as u64) < count {
        pages.insert(256 + random(end - 256));
    }
    let mut file = std::io::BufWriter::new(File::create(bytes).unwrap());
    for page in &pages {
        let from = usize::try_from(random(text.len() as u64 - 4096)).unwrap();
        let content = &text[from..from + 4096];
        write_memory(pid, &mut qmp, page * 4096, content);
        file.write_all(content).unwrap();
    }
    file.into_inner().unwrap();
    pages.len()
}

struct Bench<'a> {
    guest: &'a str,
    work: &'a WorkDir,
    other: &'a OtherHost,
}

impl Bench<'_> {
    fn copy(&self, from: &str, to: &str) -> Command {
        let mut command = self.work.vmstow();
        command.envs(self.other.environment());
        command.args(["--json", "copy", from, to, "--replace"]);
        command
    }

    fn ssh(&self) -> String {
        format!("ssh -F {}", self.other.path("ssh_config").display())
    }

    fn there(&self, name: &str) -> String {
        format!("other:{}", self.other.path(name).display())
    }

    /// From nothing to the copy's end; gives what the command said.
    fn timed(
        &self,
        work: &'static str,
        contender: &'static str,
        round: u32,
        (mut command, bytes): (Command, u64),
        results: &mut Results,
    ) -> String {
        end::doing(&format!(
            "{}, {work}, {contender}, pair {}",
            self.guest,
            round + 1
        ));
        rustix::fs::sync();
        let clock = Clock::start();
        let said = run_command(&mut command);
        let cost = clock.stop();
        eprintln!("{}, {work}: {contender} {:.3} s", self.guest, cost.seconds);
        let bytes = crossed(contender, &said).unwrap_or(bytes);
        let guest = self.guest.to_owned();
        results.add(Sample {
            guest,
            work,
            contender,
            round,
            cost,
            bytes,
        });
        said
    }

    /// The image there and back, with nothing at the other end.
    fn whole(&self, image: &Path, side: &'static str, round: u32, results: &mut Results) {
        let local = image.display().to_string();
        let back = self.work.join("back.stow");
        let back_name = back.display().to_string();
        let len = image.metadata().unwrap().len();
        let commands = if side == OURS {
            let there = self.other.location("x.stow");
            [self.copy(&local, &there), self.copy(&there, &back_name)].map(|mut command| {
                command.arg("--no-parent");
                command
            })
        } else {
            let there = self.there("x.stow");
            [(local.clone(), there.clone()), (there, back_name)].map(|(from, to)| {
                let mut command = self.work.command("scp");
                command
                    .arg("-q")
                    .arg("-F")
                    .arg(self.other.path("ssh_config"));
                command.args([from, to]);
                command
            })
        };
        let there = self.other.path("x.stow");
        let _ = std::fs::remove_file(&there);
        warm(image);
        for (what, command) in [THERE, BACK].into_iter().zip(commands) {
            self.timed(what, side, round, (command, len), results);
        }
        assert_same(image, &back);
        std::fs::remove_file(&there).unwrap();
        std::fs::remove_file(&back).unwrap();
    }

    /// To where the earlier save is, under the name of the copy.
    fn changed(
        &self,
        work: &'static str,
        before: &Path,
        after: &Path,
        side: &'static str,
        round: u32,
        results: &mut Results,
    ) {
        let there = self.other.path("x.stow");
        std::fs::copy(before, &there).unwrap();
        warm(&there);
        warm(after);
        let command = if side == OURS {
            self.copy(&after.display().to_string(), &self.other.location("x.stow"))
        } else {
            let mut command = self.work.command("rsync");
            command.args(["-e", &self.ssh(), "--stats", "--no-human-readable"]);
            command.arg(after).arg(self.there("x.stow"));
            command
        };
        self.timed(work, side, round, (command, 0), results);
        assert_same(after, &there);
        std::fs::remove_file(&there).unwrap();
    }

    /// What crossed, beside what has to cross at least: as one who knows both images does it, and the changed pages alone.
    fn ideals(
        &self,
        work: &'static str,
        before: &Path,
        after: &Path,
        changed: &Changed,
        results: &mut Results,
    ) {
        end::doing(&format!("{}, {work}, ideals", self.guest));
        let count = |script: &str, files: &[&Path]| -> u64 {
            let mut command = self.work.command("bash");
            command.args(["-c", &format!("set -o pipefail; {script}")]);
            let said = run_command(command.args(files));
            said.trim().parse().expect("wc says a number")
        };
        let pages = count("zstd -3 -cq \"$0\" | wc -c", &[&changed.bytes]);
        let [old, new] = ["old", "new"].map(|name| self.work.join(&format!("stream-{name}")));
        let patch = count(
            "zstd -dcq \"$0\" >\"$2\" && zstd -dcq \"$1\" >\"$3\" && \
             zstd -3 -cq --long=31 --patch-from=\"$2\" \"$3\" | wc -c && rm \"$2\" \"$3\"",
            &[before, after, &old, &new],
        );
        let crossed = results.bytes_of(self.guest, work, OURS);
        let all = after.metadata().unwrap().len();
        let ratio = |a: u64, b: u64| a as f64 / b as f64;
        results.add_note(format!(
            "{}, {work} ({} pages): {crossed} bytes crossed, {:.4} of the image (aim 0.05); the changed pages alone, \
             `zstd -3`: {pages} ({:.2}, aim 1.3); `zstd -3 --patch-from` of the streams: {patch} ({:.2}); rsync: {}",
            self.guest,
            changed.count,
            ratio(crossed, all),
            ratio(crossed, pages),
            ratio(crossed, patch),
            results.bytes_of(self.guest, work, RSYNC),
        ));
    }

    /// How much memory both sides need.
    fn peaks(&self, saves: &Saves, results: &mut Results) {
        let there = self.other.path("x.stow");
        let location = self.other.location("x.stow");
        let (what, after, _) = &saves.after[1];
        let after = after.display().to_string();
        for (what, with_parent) in [(THERE, false), (*what, true)] {
            let _ = std::fs::remove_file(&there);
            if with_parent {
                std::fs::copy(&saves.before, &there).unwrap();
            }
            let (here, far) = std::thread::scope(|scope| {
                let mut command = self.copy(&after, &location);
                let done = scope.spawn(move || peak(&mut command).0);
                let mut far = 0;
                while !done.is_finished() {
                    let processes = self.work.processes();
                    let serving = processes.iter().filter(|it| {
                        let argv = it.argv();
                        argv.iter().any(|word| word == "serve") && argv.len() == 3
                    });
                    far = serving.map(|it| has_peak(it.pid())).fold(far, u64::max);
                }
                (done.join().unwrap(), far)
            });
            results.add_note(format!(
                "{}, {what}: peak memory {:.1} MiB here, {:.1} MiB there (aim 128)",
                self.guest,
                here as f64 / f64::from(1 << 20),
                far as f64 / f64::from(1 << 20)
            ));
        }
        let _ = std::fs::remove_file(&there);
    }
}

/// The bytes that crossed, as a contender tells.
fn crossed(contender: &str, said: &str) -> Option<u64> {
    if contender == OURS {
        let report: Value = serde_json::from_str(said).ok()?;
        return report["crossed_bytes"].as_u64();
    }
    let of = |name: &str| -> Option<u64> {
        let line = said.lines().find_map(|line| line.strip_prefix(name))?;
        line.replace(',', "").trim().parse().ok()
    };
    Some(of("Total bytes sent:")? + of("Total bytes received:")?)
}

#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let equal = Command::new("cmp").arg("-s").args([a, b]).status().unwrap();
    assert!(
        equal.success(),
        "{} and {} differ",
        a.display(),
        b.display()
    );
}
