//! The state that a guest was saved with, held against the state that a QEMU would have with the arguments of the restore.
//!
//! QEMU itself refuses a stream with a section or a RAMBlock that it lacks. But it loads, without a word, a stream that lacks
//! what it has: one more processor, one more device. Such a guest runs with a device that was never set up. Both directions
//! are told here, and what only moved is told as that.
//!
//! Source: QEMU `migration/savevm.c`, `migration/ram.c`; seen with 7.2 and 10.0; spec/qemu-stream.md.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::cpu::{self, CpuFeatures};
use super::{Finding, codes};
use crate::units::human_bytes;

/// A device section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// QEMU's name for it, such as `0000:00:03.0/virtio-net`.
    pub idstr: String,
    /// Which of several of that name.
    pub instance_id: u32,
    /// The version of its state.
    pub version_id: u32,
}

/// A RAMBlock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name for it.
    pub idstr: String,
    /// Bytes in use.
    pub used_length: u64,
    /// Bytes that it can have; QEMU makes some blocks as long as the stream says.
    pub max_length: u64,
}

/// What a guest has, by its saved state or by a QEMU that would run it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineState {
    /// The resolved machine type.
    pub machine_type: String,
    /// `kvm`, `tcg`, ….
    pub accelerator: String,
    /// Its device sections.
    pub sections: Vec<Section>,
    /// Its RAMBlocks.
    pub blocks: Vec<Block>,
    /// Processors that are there.
    pub vcpus: u32,
    /// Processors that there can be; `None` if that is not known.
    pub max_vcpus: Option<u32>,
    /// What a processor offers; `None` if that is not known.
    pub cpu: Option<CpuFeatures>,
    /// Whether it has a TPM. Its sections and RAMBlocks are not compared: a QEMU that is only asked has none.
    pub has_tpm: bool,
}

/// The state that a QEMU can read, as far as it tells: it leaves out processors and what is no device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownState {
    /// The names of its descriptions: `i8259`.
    pub descriptions: BTreeSet<String>,
    /// The names of their subsections: `i8259/ltim`.
    pub subsections: BTreeSet<String>,
}

/// Sections of which each processor has one.
const OF_PROCESSORS: [&str; 3] = ["cpu", "cpu_common", "apic"];

/// From how many devices on they are told together.
const MOST_DEVICES: usize = 8;

/// The section of QEMU's own network, whose state another network does without.
const OF_NETWORK: &str = "slirp";

/// Everything in which they differ.
pub fn check(saved: &MachineState, target: &MachineState) -> Vec<Finding> {
    let mut findings = check_machine(saved, target);
    findings.extend(check_processors(saved, target));
    let mut devices = Devices::compare(saved, target);
    findings.append(&mut devices.findings);
    findings.extend(check_versions(saved, target));
    findings.extend(check_blocks(saved, target, &devices.told));
    findings
}

fn check_machine(saved: &MachineState, target: &MachineState) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut hold = |code, what: &str, then: &str, now: &str| {
        if then != now {
            let fact = format!("the guest was saved with {what} {then}, and would have {now}");
            findings.push(Finding::refusal(code, fact, None));
        }
    };
    let (then, now) = (&saved.machine_type, &target.machine_type);
    hold("machine.other", "machine type", then, now);
    let (then, now) = (&saved.accelerator, &target.accelerator);
    hold("accel.other", "accelerator", then, now);
    findings
}

fn check_processors(saved: &MachineState, target: &MachineState) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(other_count("cpu.count", saved.vcpus, target.vcpus));
    if let (Some(then), Some(now)) = (saved.max_vcpus, target.max_vcpus) {
        findings.extend(other_count("cpu.max", then, now));
    }
    if let (Some(then), Some(now)) = (&saved.cpu, &target.cpu) {
        findings.extend(cpu::check(then, now, &target.accelerator));
    }
    findings
}

/// Whether the number of processors differs, or how many there can be.
pub(super) fn other_count(code: &'static str, then: u32, now: u32) -> Option<Finding> {
    let fact = match code {
        "cpu.max" => {
            format!("{then} processors could be plugged in at the most, and it would be {now}")
        }
        _ => format!("the guest was saved with {then} processor(s), and would have {now}"),
    };
    (then != now).then(|| Finding::refusal(code, fact, None))
}

/// Devices that are missing, surplus or elsewhere.
#[derive(Default)]
struct Devices {
    findings: Vec<Finding>,
    /// Their places: RAMBlocks there need not be told once more.
    told: BTreeSet<String>,
}

impl Devices {
    fn compare(saved: &MachineState, target: &MachineState) -> Self {
        let differs = saved.vcpus != target.vcpus;
        let is_compared = |section: &&Section| {
            let name = section.idstr.as_str();
            let is_of_count = differs && OF_PROCESSORS.contains(&name);
            !(name == OF_NETWORK || is_of_tpm(name) || is_of_count)
        };
        let has = |all: &[Section], one: &Section| all.iter().any(|other| is_same(one, other));
        let sections = saved.sections.iter().filter(is_compared);
        let mut missing: Vec<&Section> =
            sections.filter(|one| !has(&target.sections, one)).collect();
        let sections = target.sections.iter().filter(is_compared);
        let mut surplus: Vec<&Section> =
            sections.filter(|one| !has(&saved.sections, one)).collect();
        let mut devices = Devices::default();
        devices.tell_tpm(saved.has_tpm, target.has_tpm);
        devices.tell_moved(&mut missing, &mut surplus);
        devices.tell("device.missing", &missing);
        devices.tell("device.surplus", &surplus);
        devices
    }

    fn tell_tpm(&mut self, was_there: bool, is_there: bool) {
        let (code, fact) = match (was_there, is_there) {
            (true, false) => (
                "device.missing",
                "the guest was saved with a TPM, which would be missing",
            ),
            (false, true) => (
                "device.surplus",
                "there would be a TPM, which the guest was saved without",
            ),
            _ => return,
        };
        self.findings
            .push(Finding::refusal(code, fact.to_owned(), None));
    }

    /// Pairs what is missing at one place with what is surplus at another.
    fn tell_moved(&mut self, missing: &mut Vec<&Section>, surplus: &mut Vec<&Section>) {
        let mut moves: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
        missing.retain(|gone| {
            let Some((from, name)) = gone.idstr.split_once('/') else {
                return true;
            };
            let there = surplus.iter().position(|new| {
                let place = new.idstr.split_once('/');
                place.is_some_and(|(_, other)| other == name) && new.instance_id == gone.instance_id
            });
            let Some(there) = there else { return true };
            let to = place_of(&surplus.remove(there).idstr).to_owned();
            let names = moves.entry((from.to_owned(), to)).or_default();
            names.push(name.to_owned());
            false
        });
        for ((from, to), names) in moves {
            let fact = format!(
                "{} was at {from}, and would be at {to}",
                names.join(" and ")
            );
            let fix = "give it the address that it had".to_owned();
            self.findings
                .push(Finding::refusal("device.moved", fact, fix));
            self.told.extend([from, to]);
        }
    }

    /// One finding for all sections of a device.
    fn tell(&mut self, code: &'static str, sections: &[&Section]) {
        let mut devices: Vec<(String, Vec<String>)> = Vec::new();
        for section in sections {
            let (place, name) = match section.idstr.split_once('/') {
                Some((place, name)) => (place.to_owned(), name.to_owned()),
                None => (
                    format!("{}#{}", section.idstr, section.instance_id),
                    String::new(),
                ),
            };
            match devices.iter_mut().find(|device| device.0 == place) {
                Some(device) => device.1.push(name),
                None => devices.push((place, vec![name])),
            }
        }
        if devices.len() > MOST_DEVICES {
            self.tell_many(code, devices);
            return;
        }
        for device in devices {
            let shown = shown(&device);
            let (fact, fix) = match code {
                "device.missing" => (
                    format!("the guest was saved with {shown}, which would be missing"),
                    "give it the device that it had",
                ),
                _ => (
                    format!("there would be {shown}, which the guest was saved without"),
                    "leave that device out",
                ),
            };
            self.findings
                .push(Finding::refusal(code, fact, fix.to_owned()));
            self.told.insert(device.0);
        }
    }
}

impl Devices {
    /// One finding for a whole machine.
    fn tell_many(&mut self, code: &'static str, devices: Vec<(String, Vec<String>)>) {
        let count = devices.len();
        let shown: Vec<String> = devices.iter().map(shown).collect();
        let list = shown.join(", ");
        let fact = match code {
            "device.missing" => format!("{count} devices of the guest would be missing: {list}"),
            _ => format!("there would be {count} devices that the guest was saved without: {list}"),
        };
        self.findings.push(Finding::refusal(code, fact, None));
        self.told
            .extend(devices.into_iter().map(|(place, _)| place));
    }
}

/// `virtio-net at 0000:00:03.0`.
fn shown((place, names): &(String, Vec<String>)) -> String {
    match names.join(" and ").as_str() {
        "" => place.clone(),
        names => format!("{names} at {place}"),
    }
}

fn is_same(one: &Section, other: &Section) -> bool {
    one.idstr == other.idstr && one.instance_id == other.instance_id
}

/// Whether a section or a RAMBlock belongs to a TPM or its emulator.
pub fn is_of_tpm(idstr: &str) -> bool {
    idstr.starts_with("tpm-")
}

/// `0000:00:03.0` of `0000:00:03.0/virtio-net`.
fn place_of(idstr: &str) -> &str {
    idstr.split_once('/').map_or(idstr, |(place, _)| place)
}

fn check_versions(saved: &MachineState, target: &MachineState) -> Vec<Finding> {
    let pairs = saved.sections.iter().filter_map(|then| {
        let now = target.sections.iter().find(|now| is_same(then, now))?;
        (then.version_id > now.version_id).then_some((then, now))
    });
    let findings = pairs.map(|(then, now)| {
        let fact = format!(
            "the state of {} is of version {}, and this QEMU reads up to {}",
            then.idstr, then.version_id, now.version_id
        );
        Finding::refusal("section.version", fact, newer())
    });
    findings.collect()
}

/// Subsections of the saved state that a QEMU does not know, of what it told of.
pub fn check_subsections(saved: &BTreeSet<String>, known: &KnownState) -> Vec<Finding> {
    let is_told_of = |name: &str| {
        let ends = name.match_indices('/').map(|(end, _)| end);
        ends.filter_map(|end| name.get(..end))
            .any(|parent| known.descriptions.contains(parent))
    };
    let unknown = saved
        .iter()
        .filter(|name| !known.subsections.contains(*name) && is_told_of(name));
    let findings = unknown.map(|name| {
        let fact = format!("the saved state has a part {name}, which this QEMU does not know");
        Finding::refusal("section.unknown", fact, newer())
    });
    findings.collect()
}

fn newer() -> String {
    "--qemu PATH, naming the QEMU that saved it, or a newer one".to_owned()
}

fn check_blocks(
    saved: &MachineState,
    target: &MachineState,
    told: &BTreeSet<String>,
) -> Vec<Finding> {
    let is_told = |block: &Block| {
        let name = block.idstr.as_str();
        told.contains(place_of(name)) || is_of_tpm(name)
    };
    let mut findings = Vec::new();
    for then in saved.blocks.iter().filter(|block| !is_told(block)) {
        match target.blocks.iter().find(|now| now.idstr == then.idstr) {
            Some(now) => findings.extend(other_length(then, now)),
            None => {
                let fact = format!("RAMBlock {:?} would be missing", then.idstr);
                findings.push(Finding::refusal("ramblock.missing", fact, None));
            }
        }
    }
    for now in target.blocks.iter().filter(|block| !is_told(block)) {
        if saved.blocks.iter().all(|then| then.idstr != now.idstr) {
            let fact = format!(
                "there would be a RAMBlock {:?}, which the guest did not have",
                now.idstr
            );
            findings.push(Finding::refusal("ramblock.surplus", fact, None));
        }
    }
    findings
}

fn other_length(then: &Block, now: &Block) -> Option<Finding> {
    let is_grown = then.idstr.starts_with("/rom@") && then.used_length <= now.max_length;
    if then.used_length == now.used_length || is_grown {
        return None;
    }
    let fact = format!(
        "RAMBlock {:?} has {} in the image, and would have {}",
        then.idstr,
        human_bytes(then.used_length),
        human_bytes(now.used_length)
    );
    Some(match is_rom(&then.idstr) {
        true => Finding::refusal("rom.length", fact, rom_fix(then, now)),
        false => Finding::refusal("ramblock.length", fact, None),
    })
}

fn is_rom(idstr: &str) -> bool {
    idstr.ends_with(".rom") || idstr.starts_with("/rom@") || idstr.ends_with(".bios")
}

/// A device makes room for a ROM that is larger than its file.
fn rom_fix(then: &Block, now: &Block) -> String {
    let device = then.idstr.split_once('/').map(|(_, name)| name);
    let driver = device.and_then(|name| name.strip_suffix(".rom"));
    match driver {
        Some(driver) if then.used_length > now.used_length => {
            format!("--romsize {driver}={:#x}", then.used_length)
        }
        _ => "--qemu PATH, naming a QEMU with ROMs of that size".to_owned(),
    }
}

/// Whether a code is one that only a QEMU's answer tells, so that it need not be told twice.
pub fn is_of_state(code: &str) -> bool {
    let of_state = [
        "machine.other",
        "accel.other",
        "cpu.",
        "device.",
        "ramblock.",
        "rom.",
    ];
    codes::find(code).is_some() && of_state.iter().any(|prefix| code.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(idstr: &str, version_id: u32) -> Section {
        Section {
            idstr: idstr.to_owned(),
            instance_id: 0,
            version_id,
        }
    }

    fn block(idstr: &str, used_length: u64) -> Block {
        Block {
            idstr: idstr.to_owned(),
            used_length,
            max_length: used_length,
        }
    }

    fn machine() -> MachineState {
        MachineState {
            machine_type: "pc".to_owned(),
            accelerator: "tcg".to_owned(),
            sections: vec![
                section("cpu", 12),
                section("0000:00:03.0/virtio-net", 11),
                section("0000:00:04.0/virtio-blk", 2),
            ],
            blocks: vec![
                block("pc.ram", 1 << 30),
                block("0000:00:03.0/virtio-net-pci.rom", 0x4_0000),
                block("/rom@etc/acpi/tables", 0x2_0000),
            ],
            vcpus: 1,
            max_vcpus: Some(4),
            cpu: None,
            has_tpm: false,
        }
    }

    /// Codes and facts.
    fn found(change: impl FnOnce(&mut MachineState)) -> Vec<(&'static str, String)> {
        let mut target = machine();
        change(&mut target);
        let findings = check(&machine(), &target).into_iter();
        findings
            .map(|finding| (finding.code, finding.fact))
            .collect()
    }

    fn codes_of(change: impl FnOnce(&mut MachineState)) -> Vec<&'static str> {
        found(change).into_iter().map(|(code, _)| code).collect()
    }

    #[test]
    fn the_same_machine_is_without_findings() {
        assert_eq!(codes_of(|_| {}), [""; 0]);
    }

    #[test]
    fn a_device_is_missing_surplus_or_moved_and_its_ram_is_not_told_again() {
        let gone = codes_of(|it| {
            it.sections.remove(1);
            it.blocks.remove(1);
        });
        assert_eq!(gone, ["device.missing"]);
        let more = codes_of(|it| {
            it.sections.push(section("0000:00:05.0/virtio-rng", 1));
            it.sections.push(section("slirp", 4));
        });
        assert_eq!(more, ["device.surplus"]);
        let moved = found(|it| {
            it.sections[1].idstr = "0000:00:07.0/virtio-net".to_owned();
            it.blocks[1].idstr = "0000:00:07.0/virtio-net-pci.rom".to_owned();
        });
        assert_eq!(moved.len(), 1);
        assert_eq!(moved[0].0, "device.moved");
        assert!(
            moved[0]
                .1
                .contains("0000:00:03.0, and would be at 0000:00:07.0")
        );
    }

    #[test]
    fn one_more_processor_is_told_once() {
        let more = codes_of(|it| {
            it.vcpus = 2;
            let second = Section {
                instance_id: 1,
                ..section("cpu", 12)
            };
            it.sections.push(second);
        });
        assert_eq!(more, ["cpu.count"]);
        assert_eq!(codes_of(|it| it.max_vcpus = Some(8)), ["cpu.max"]);
        assert_eq!(codes_of(|it| it.max_vcpus = None), [""; 0]);
    }

    #[test]
    fn memory_and_roms_have_to_be_as_long_and_tables_only_as_long_as_can_be() {
        assert_eq!(
            codes_of(|it| it.blocks[0].used_length = 2 << 30),
            ["ramblock.length"]
        );
        let mut target = machine();
        target.blocks[1].used_length = 0x1_0000;
        target.blocks[2].used_length = 0x1_0000;
        let findings = check(&machine(), &target);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].code, "rom.length");
        let fix = "--romsize virtio-net-pci=0x40000";
        assert_eq!(findings[0].fix.as_deref(), Some(fix));
        let tables = codes_of(|it| {
            it.blocks[2].used_length = 0x1000;
            it.blocks[2].max_length = 0x1000;
        });
        assert_eq!(tables, ["rom.length"]);
    }

    #[test]
    fn newer_state_is_found_by_its_version_and_by_its_parts() {
        assert_eq!(
            codes_of(|it| it.sections[2].version_id = 1),
            ["section.version"]
        );
        assert_eq!(codes_of(|it| it.sections[2].version_id = 3), [""; 0]);
        let saved = ["i8259/ltim".to_owned(), "cpu/tsc_khz".to_owned()].into();
        let mut known = KnownState::default();
        assert_eq!(check_subsections(&saved, &known), []);
        known.descriptions.insert("i8259".to_owned());
        let findings = check_subsections(&saved, &known);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].code, "section.unknown");
        known.subsections.insert("i8259/ltim".to_owned());
        assert_eq!(check_subsections(&saved, &known), []);
    }

    #[test]
    fn another_machine_and_accelerator_are_told() {
        let other = codes_of(|it| {
            it.machine_type = "q35".to_owned();
            it.accelerator = "kvm".to_owned();
        });
        assert_eq!(other, ["machine.other", "accel.other"]);
    }
}
