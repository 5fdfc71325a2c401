//! What was measured, as a Markdown table for people and as JSON with every single number.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::clock::Cost;
use crate::copy;
use crate::first_tick::TickRow;
use crate::machine;
use crate::rounds::{
    OURS_RAW, OURS_ZSTD, QEMU_FILE, QEMU_MAPPED, QEMU_ZSTD, VIRSH_RAW, VIRSH_SPARSE, VIRSH_ZSTD,
};
use crate::verify::{OPENSSL, ZSTD_OPENSSL};

/// Work, ours, theirs, and the highest ratio to be content with, if there is one.
type Pair = (&'static str, &'static str, &'static str, Option<f64>);

const PAIRS: [Pair; 21] = [
    ("save", OURS_ZSTD, VIRSH_ZSTD, Some(0.4)),
    ("save", OURS_ZSTD, VIRSH_RAW, Some(0.7)),
    ("save", OURS_ZSTD, QEMU_ZSTD, Some(1.0)),
    ("save", OURS_ZSTD, VIRSH_SPARSE, None),
    ("save", OURS_ZSTD, QEMU_MAPPED, None),
    ("save", OURS_RAW, QEMU_FILE, Some(1.15)),
    ("save", OURS_RAW, VIRSH_RAW, None),
    ("save", OURS_RAW, QEMU_MAPPED, None),
    ("restore", OURS_ZSTD, VIRSH_ZSTD, Some(0.6)),
    ("restore", OURS_ZSTD, QEMU_ZSTD, Some(0.8)),
    ("restore", OURS_ZSTD, VIRSH_RAW, None),
    ("restore", OURS_ZSTD, VIRSH_SPARSE, None),
    ("restore", OURS_RAW, VIRSH_RAW, None),
    ("restore", OURS_RAW, QEMU_FILE, None),
    ("restore", OURS_RAW, QEMU_MAPPED, None),
    ("verify", OURS_RAW, OPENSSL, Some(0.6)),
    ("verify", OURS_ZSTD, ZSTD_OPENSSL, Some(0.9)),
    (copy::THERE, copy::OURS, copy::SCP, Some(1.1)),
    (copy::BACK, copy::OURS, copy::SCP, Some(1.1)),
    (copy::ONE_IN_TEN, copy::OURS, copy::RSYNC, Some(0.6)),
    (copy::ONE_IN_A_HUNDRED, copy::OURS, copy::RSYNC, None),
];
const SIZE_TARGET: f64 = 1.06;
const MEMORY_TARGET: u64 = 128 << 20;

/// One work, done once by one contender.
#[derive(Debug)]
pub struct Sample {
    pub guest: String,
    pub work: &'static str,
    pub contender: &'static str,
    pub round: u32,
    pub cost: Cost,
    /// The image's.
    pub bytes: u64,
}

/// Bytes of our image and of single zstd frames at levels 3 and 1.
#[derive(Debug)]
pub struct SizeRow {
    pub guest: String,
    pub ours: u64,
    pub zstd_3: u64,
    pub zstd_1: u64,
}

/// The most bytes that vmstow had in memory.
#[derive(Debug)]
pub struct MemoryRow {
    pub guest: String,
    pub save: u64,
    pub verify: u64,
    pub restore: u64,
}

/// All that was measured, in order.
#[derive(Debug)]
pub struct Results {
    /// CPUs that were busy before anything was started.
    busy_cpus: f64,
    samples: Vec<Sample>,
    sizes: Vec<SizeRow>,
    memory: Vec<MemoryRow>,
    ticks: Vec<TickRow>,
    notes: Vec<String>,
}

impl Results {
    /// None yet; `busy_cpus` is what other work kept busy.
    pub fn new(busy_cpus: f64) -> Self {
        Results {
            busy_cpus,
            samples: Vec::new(),
            sizes: Vec::new(),
            memory: Vec::new(),
            ticks: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    pub fn add_size(&mut self, row: SizeRow) {
        self.sizes.push(row);
    }

    pub fn add_memory(&mut self, row: MemoryRow) {
        self.memory.push(row);
    }

    pub fn add_ticks(&mut self, row: TickRow) {
        self.ticks.push(row);
    }

    pub fn add_note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// The bytes of a work as a contender did it last.
    pub fn bytes_of(&self, guest: &str, work: &str, contender: &str) -> u64 {
        let mut samples = self.samples.iter().rev();
        let found = samples
            .find(|it| (it.guest.as_str(), it.work, it.contender) == (guest, work, contender));
        found.map_or(0, |sample| sample.bytes)
    }

    pub fn markdown(&self) -> String {
        let mut text = machine::describe().join("  \n");
        let _ = write!(
            text,
            "  \n{:.2} CPUs were busy with other work at the start",
            self.busy_cpus
        );
        let mut guests: Vec<&str> = self.samples.iter().map(|it| it.guest.as_str()).collect();
        guests.dedup();
        if !guests.is_empty() {
            text += "\n\n| guest | work | ours | baseline | ours / baseline: median (lowest–highest) | target \
                | seconds, median | CPU seconds | image, MB |\n|---|---|---|---|---|---|---|---|---|\n";
        }
        for guest in guests {
            for pair in PAIRS {
                self.write_pair(&mut text, guest, pair);
            }
        }
        if !self.sizes.is_empty() {
            text += "\n| guest | our zstd image, bytes | `zstd -3` of the stream | ratio | target | `zstd -1` | ratio |\n|---|---|---|---|---|---|---|\n";
        }
        for row in &self.sizes {
            let ratio = as_f64(row.ours) / as_f64(row.zstd_3);
            let ratio_1 = as_f64(row.ours) / as_f64(row.zstd_1);
            let verdict = verdict(ratio, Some(SIZE_TARGET));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {ratio:.3} | {verdict} | {} | {ratio_1:.3} |",
                row.guest, row.ours, row.zstd_3, row.zstd_1
            );
        }
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        if !self.memory.is_empty() {
            text += "\n| guest, layout | peak memory of save, MiB | verify | restore | target |\n|---|---|---|---|---|\n";
        }
        for row in &self.memory {
            let peaks = [row.save, row.verify, row.restore];
            let is_met = peaks.iter().all(|&peak| peak <= MEMORY_TARGET);
            let [save, verify, restore] = peaks.map(|peak| as_f64(peak) / f64::from(1 << 20));
            let verdict = if is_met { "met" } else { "**missed**" };
            let _ = writeln!(
                text,
                "| {} | {save:.1} | {verify:.1} | {restore:.1} | ≤ {}: {verdict} |",
                row.guest,
                MEMORY_TARGET >> 20
            );
        }
        if !self.ticks.is_empty() {
            let virsh = self.ticks.iter().find(|row| !row.virsh.is_empty());
            text += "\n| guest | bare QEMU, s | tick after an eager restore | `--lazy` to the next tick, s | / (1.5 × bare + that tick), target ≤ 1 \
                | `--lazy`, recorded | / it | `--map` | / it | eager | `--lazy` to the end / eager | target | longest wait for a page, ms \
                |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
            self.ticks
                .iter()
                .for_each(|row| write_ticks(&mut text, row));
            if let Some(row) = virsh {
                let (lazy, mapped, virsh) =
                    (median(&row.lazy), median(&row.mapped), median(&row.virsh));
                let _ = writeln!(
                    text,
                    "\n{}: `virsh restore` raw takes {virsh:.3} s to the next tick; `--lazy` / it {:.3}: {}; `--map` / it {:.3}: {}",
                    row.guest,
                    lazy / virsh,
                    verdict(lazy / virsh, Some(0.1)),
                    mapped / virsh,
                    verdict(mapped / virsh, Some(0.1)),
                );
            }
            for (way, of) in [
                ("`--lazy`", of_lazy as fn(&TickRow) -> f64),
                ("`--lazy`, recorded", of_recorded),
                ("`--map`", of_mapped),
            ] {
                let medians: Vec<f64> = self.ticks.iter().map(of).collect();
                let most = medians.iter().copied().fold(0.0, f64::max);
                let least = medians.iter().copied().fold(f64::INFINITY, f64::min);
                let spread = most / least;
                let _ = writeln!(
                    text,
                    "{way}: the slowest size / the quickest {spread:.2}: {}",
                    verdict(spread, Some(1.2))
                );
            }
        }
        text
    }

    fn write_pair(&self, text: &mut String, guest: &str, (work, ours, theirs, target): Pair) {
        let of = |contender: &str| -> Vec<&Sample> {
            let is_wanted =
                |it: &&Sample| it.guest == guest && it.work == work && it.contender == contender;
            self.samples.iter().filter(is_wanted).collect()
        };
        let (us, them) = (of(ours), of(theirs));
        if us.is_empty() || them.is_empty() {
            return;
        }
        let mut ratios: Vec<f64> = us
            .iter()
            .flat_map(|us| {
                them.iter()
                    .filter(|it| it.round == us.round)
                    .map(move |it| (us, it))
            })
            .map(|(us, them)| us.cost.seconds / them.cost.seconds)
            .collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = median(&ratios);
        let both = |of: &dyn Fn(&Sample) -> f64, digits: usize| {
            let side = |side: &[&Sample]| median(&side.iter().map(|it| of(it)).collect::<Vec<_>>());
            format!("{:.digits$} / {:.digits$}", side(&us), side(&them))
        };
        let _ = writeln!(
            text,
            "| {guest} | {work} | {ours} | {theirs} | {ratio:.2} ({:.2}–{:.2}) | {} | {} | {} | {} |",
            ratios[0],
            ratios[ratios.len() - 1],
            verdict(ratio, target),
            both(&|it| it.cost.seconds, 3),
            both(&|it| it.cost.cpu_seconds, 2),
            both(&|it| as_f64(it.bytes) / 1e6, 1),
        );
    }

    pub fn json(&self) -> Value {
        let samples = self.samples.iter().map(|it| {
            json!({ "guest": it.guest, "work": it.work, "contender": it.contender.replace('\\', ""), "round": it.round,
                "seconds": it.cost.seconds, "cpu_seconds": it.cost.cpu_seconds, "bytes": it.bytes })
        });
        let sizes = self
            .sizes
            .iter()
            .map(|it| json!({ "guest": it.guest, "ours": it.ours, "zstd_3": it.zstd_3, "zstd_1": it.zstd_1 }));
        let memory = self.memory.iter().map(|it| {
            json!({ "guest": it.guest, "save": it.save, "verify": it.verify, "restore": it.restore })
        });
        let ticks = self.ticks.iter().map(|it| {
            json!({ "guest": it.guest, "bare": it.bare, "lazy": it.lazy, "recorded": it.recorded, "mapped": it.mapped, "eager": it.eager,
                "cold_tick": it.cold_tick, "virsh": it.virsh, "lazy_whole": it.lazy_whole, "stall": it.stall })
        });
        json!({
            "machine": machine::describe(),
            "busy_cpus": self.busy_cpus,
            "samples": samples.collect::<Vec<_>>(),
            "sizes": sizes.collect::<Vec<_>>(),
            "peak_memory": memory.collect::<Vec<_>>(),
            "notes": self.notes,
            "first_ticks": ticks.collect::<Vec<_>>(),
        })
    }
}

fn of_lazy(row: &TickRow) -> f64 {
    median(&row.lazy)
}

fn of_recorded(row: &TickRow) -> f64 {
    median(&row.recorded)
}

fn of_mapped(row: &TickRow) -> f64 {
    median(&row.mapped)
}

fn write_ticks(text: &mut String, row: &TickRow) {
    let [bare, tick, lazy, recorded, mapped, eager, whole, stall] = [
        &row.bare,
        &row.cold_tick,
        &row.lazy,
        &row.recorded,
        &row.mapped,
        &row.eager,
        &row.lazy_whole,
        &row.stall,
    ]
    .map(|values| median(values));
    let allowed = 1.5 * bare + tick;
    let _ = writeln!(
        text,
        "| {} | {bare:.3} | {tick:.3} | {lazy:.3} | {:.2} | {recorded:.3} | {:.2} | {mapped:.3} | {:.2} | {eager:.3} | {:.2} | {} | {:.1} |",
        row.guest,
        lazy / allowed,
        recorded / allowed,
        mapped / allowed,
        whole / eager,
        verdict(whole / eager, Some(1.0)),
        stall * 1000.0,
    );
}

fn verdict(ratio: f64, target: Option<f64>) -> String {
    match target {
        Some(target) if ratio <= target => format!("≤ {target}: met"),
        Some(target) => format!("≤ {target}: **missed**"),
        None => String::new(),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}
