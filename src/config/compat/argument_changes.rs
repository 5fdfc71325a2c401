//! Kept arguments held against those of a restore, where no QEMU is asked what it would make of them.
//!
//! Told is what the guest would see: processors, memory, CPU model and features, devices. Backends are not looked at. It is
//! less than [`state`](super::state) tells, and takes no time: every restore does it.
//!
//! Source: QEMU's manual of `-smp`, `-m`, `-cpu` and `-device`.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;
use super::state::other_count;
use crate::config::arguments::{Argument, Arguments};
use crate::units::human_bytes;

/// Properties of a device that say what stands behind it, not what the guest sees.
const BACKENDS: [&str; 12] = [
    "drive",
    "netdev",
    "chardev",
    "chardev2",
    "audiodev",
    "memdev",
    "iothread",
    "tpmdev",
    "fsdev",
    "rng",
    "host",
    "bootindex",
];

/// Everything in which the guest would see a difference.
pub fn check(kept: &Arguments, now: &Arguments) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (then, is) = (processors(kept), processors(now));
    if let (Some(then), Some(is)) = (then, is) {
        findings.extend(other_count("cpu.count", then.0, is.0));
        findings.extend(other_count("cpu.max", then.1, is.1));
    }
    findings.extend(other_memory(kept, now));
    findings.extend(other_cpu(kept, now));
    findings.extend(other_devices(kept, now));
    findings
}

/// How many processors there are and can be; `None` if it cannot be read.
fn processors(arguments: &Arguments) -> Option<(u32, u32)> {
    let options = arguments.options("smp");
    let mut said: BTreeMap<String, u32> = BTreeMap::new();
    for (key, value) in options.flat_map(|(_, smp)| smp.properties().leaves()) {
        said.insert(key, value.parse().ok()?);
    }
    let of_topology = [
        "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads",
    ];
    let mut product = of_topology.iter().filter_map(|key| said.get(*key));
    let product = product.try_fold(1_u32, |product, &factor| product.checked_mul(factor))?;
    let maxcpus = said.get("maxcpus").copied();
    let cpus = said.get("cpus").copied();
    let count = cpus.or(maxcpus).unwrap_or(product);
    Some((count, maxcpus.unwrap_or(count.max(product))))
}

fn other_memory(kept: &Arguments, now: &Arguments) -> Option<Finding> {
    let (then, is) = (memory(kept)?, memory(now)?);
    let fact = format!(
        "the guest was saved with {} of memory, and would have {}",
        human_bytes(then),
        human_bytes(is)
    );
    (then != is).then(|| Finding::refusal("ramblock.length", fact, None))
}

/// Bytes of base memory; `None` if it cannot be read, or QEMU's own amount counts.
fn memory(arguments: &Arguments) -> Option<u64> {
    let mut options = arguments.options("m").rev();
    let size = options.find_map(|(_, m)| m.properties().get("size"))?;
    let end = size
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(size.len());
    let (digits, unit) = size.split_at(end);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "B" => 0,
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Model and features of the last `-cpu`.
fn cpu(arguments: &Arguments) -> Option<(String, BTreeMap<String, bool>)> {
    let value = arguments.last_value("cpu")?;
    let mut words = value.split(',');
    let model = words.next()?.to_owned();
    let features = words.filter_map(|word| {
        let plain = |name: &str| name.replace(['_', '.'], "-");
        Some(match (word.split_once('='), word.split_at_checked(1)?) {
            (Some((name, "on")), _) => (plain(name), true),
            (Some((name, "off")), _) => (plain(name), false),
            (None, ("+", name)) => (plain(name), true),
            (None, ("-", name)) => (plain(name), false),
            _ => return None,
        })
    });
    Some((model, features.collect()))
}

fn other_cpu(kept: &Arguments, now: &Arguments) -> Vec<Finding> {
    let (Some(then), Some(is)) = (cpu(kept), cpu(now)) else {
        return match (kept.last_value("cpu"), now.last_value("cpu")) {
            (None, None) => Vec::new(),
            (then, is) => {
                let shown = |model: Option<&str>| model.unwrap_or("QEMU's own model").to_owned();
                vec![other_model(&shown(then), &shown(is))]
            }
        };
    };
    if then.0 != is.0 {
        return vec![other_model(&then.0, &is.0)];
    }
    // One that nobody names is as the model has it.
    let lost = then
        .1
        .iter()
        .filter(|(name, is_on)| **is_on && is.1.get(*name) != Some(&true));
    let denied =
        is.1.iter()
            .filter(|(name, is_on)| !**is_on && !then.1.contains_key(*name));
    let names: BTreeSet<&str> = lost.chain(denied).map(|(name, _)| name.as_str()).collect();
    if names.is_empty() {
        return Vec::new();
    }
    let names: Vec<&str> = names.into_iter().collect();
    let fact = format!(
        "its processors would lack what the guest saw: {}",
        names.join(", ")
    );
    vec![Finding::refusal("cpu.flag.missing", fact, None)]
}

fn other_model(then: &str, is: &str) -> Finding {
    let fact = format!("the guest was saved with CPU model {then}, and would have {is}");
    Finding::refusal("cpu.model", fact, None)
}

/// A CPU model by its name; `None` where both arguments leave it to QEMU, or name the same one.
pub fn other_cpu_model(kept: &Arguments, now: &Arguments) -> Option<Finding> {
    let (then, is) = (cpu(kept)?, cpu(now)?);
    (then.0 != is.0).then(|| other_model(&then.0, &is.0))
}

/// A device as the guest sees it.
struct Device {
    shown: String,
    id: Option<String>,
    driver: String,
    place: Option<String>,
    rest: BTreeMap<String, String>,
}

impl Device {
    fn of(argument: &Argument) -> Option<Self> {
        let properties = argument.properties();
        let driver = properties.get("driver")?;
        let mut rest: BTreeMap<String, String> = properties.leaves().into_iter().collect();
        rest.retain(|key, _| !BACKENDS.contains(&key.as_str()));
        let id = rest.remove("id");
        let (bus, addr) = (rest.remove("bus"), rest.remove("addr"));
        let place = match (bus, addr) {
            (None, None) => None,
            (bus, addr) => Some(format!(
                "{} {}",
                bus.unwrap_or_default(),
                addr.map(|addr| place(&addr)).unwrap_or_default()
            )),
        };
        rest.remove("driver");
        Some(Device {
            shown: match &id {
                Some(id) => format!("{driver} {id:?}"),
                None => driver.clone(),
            },
            id,
            driver,
            place,
            rest,
        })
    }

    /// Whether it may be the same one.
    fn is_like(&self, other: &Device) -> bool {
        self.driver == other.driver
            && match (&self.id, &other.id) {
                (Some(id), Some(other)) => id == other,
                (None, None) => self.rest == other.rest,
                _ => false,
            }
    }
}

/// `0x3` and `3.0` are the same address.
fn place(addr: &str) -> String {
    let (slot, function) = addr.split_once('.').unwrap_or((addr, "0"));
    let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16);
    match (number(slot), number(function)) {
        (Ok(slot), Ok(function)) => format!("{slot:x}.{function:x}"),
        _ => addr.to_owned(),
    }
}

fn other_devices(kept: &Arguments, now: &Arguments) -> Vec<Finding> {
    let devices = |arguments: &Arguments| -> Vec<Device> {
        let options = arguments.options("device");
        options
            .filter_map(|(_, argument)| Device::of(argument))
            .collect()
    };
    let (then, mut left) = (devices(kept), devices(now));
    let mut findings = Vec::new();
    for device in &then {
        let exact = |other: &Device| device.is_like(other) && device.place == other.place;
        let found = left.iter().position(exact);
        let found = found.or_else(|| left.iter().position(|other| device.is_like(other)));
        let shown = &device.shown;
        match found.map(|index| left.remove(index)) {
            None => {
                let fact = format!("the guest was saved with {shown}, which would be missing");
                findings.push(Finding::refusal("device.missing", fact, None));
            }
            Some(other) if other.place != device.place => {
                let place = |device: &Device| {
                    let place = device.place.clone().unwrap_or_default();
                    match place.trim() {
                        "" => "where QEMU puts it".to_owned(),
                        place => place.to_owned(),
                    }
                };
                let (from, to) = (place(device), place(&other));
                let fact = format!("{shown} was at {from}, and would be at {to}");
                findings.push(Finding::refusal("device.moved", fact, None));
            }
            Some(other) if other.rest != device.rest => {
                let fact = format!("{shown} would have other properties than it was saved with");
                findings.push(Finding::refusal("device.other", fact, None));
            }
            Some(_) => {}
        }
    }
    for device in left {
        let shown = device.shown;
        let fact = format!("there would be {shown}, which the guest was saved without");
        findings.push(Finding::refusal("device.surplus", fact, None));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: &str = "-m 1G -smp 2,maxcpus=4 -cpu Nehalem,+avx2,x2apic=off \
        -device virtio-net-pci,netdev=n,id=net0,addr=0x3 -device virtio-rng-pci";

    fn arguments(words: &str) -> Arguments {
        let words: Vec<&str> = std::iter::once("qemu")
            .chain(words.split_whitespace())
            .collect();
        Arguments::parse(&words).unwrap()
    }

    fn found(now: &str) -> Vec<&'static str> {
        let findings = check(&arguments(KEPT), &arguments(now));
        findings.into_iter().map(|finding| finding.code).collect()
    }

    fn with(from: &str, to: &str) -> Vec<&'static str> {
        assert!(KEPT.contains(from), "{from}");
        found(&KEPT.replacen(from, to, 1))
    }

    #[test]
    fn what_the_guest_does_not_see_may_change() {
        assert_eq!(found(KEPT), [""; 0]);
        assert_eq!(with("netdev=n", "netdev=other"), [""; 0]);
        assert_eq!(with("addr=0x3", "addr=3.0"), [""; 0]);
        assert_eq!(with("1G", "1024M"), [""; 0]);
        assert_eq!(with("+avx2", "avx2=on"), [""; 0]);
    }

    #[test]
    fn each_difference_has_its_code() {
        for (from, to, code) in [
            ("-smp 2", "-smp 3", "cpu.count"),
            ("maxcpus=4", "maxcpus=8", "cpu.max"),
            ("-m 1G", "-m 2G", "ramblock.length"),
            ("Nehalem", "Westmere", "cpu.model"),
            (",+avx2", "", "cpu.flag.missing"),
            ("+avx2", "+avx2,-sse4.1", "cpu.flag.missing"),
            ("addr=0x3", "addr=0x5", "device.moved"),
            ("-device virtio-rng-pci", "", "device.missing"),
            ("-m", "-device e1000 -m", "device.surplus"),
            ("addr=0x3", "addr=0x3,mq=on", "device.other"),
        ] {
            assert_eq!(with(from, to), [code], "{from} → {to}");
        }
    }

    #[test]
    fn a_topology_says_how_many_processors_there_are() {
        for (words, expected) in [
            ("", Some((1, 1))),
            ("-smp 4", Some((4, 4))),
            ("-smp sockets=2,cores=2,threads=2", Some((8, 8))),
            ("-smp 2,sockets=2,cores=2", Some((2, 4))),
            ("-smp cpus=2,maxcpus=8,sockets=8", Some((2, 8))),
            ("-smp sockets=4294967295,cores=4294967295", None),
            ("-smp many", None),
        ] {
            assert_eq!(processors(&arguments(words)), expected, "{words}");
        }
    }
}
