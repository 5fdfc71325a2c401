//! Hand-written domain XML, expanded: a fixed point, and with libvirt's addresses.
//!
//! `testdata/libvirt-addresses.txt` holds what libvirt 11.3 gave the domains in `testdata/domains`: another judge than
//! our own goldens.

#![allow(clippy::unwrap_used, reason = "this is a test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmstow::config::ConfigError;
use vmstow::config::expand::{Expanded, HostKnowledge, expand};
use vmstow::config::xml::{Document, Element};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

fn knowledge() -> HostKnowledge {
    let aliases = [("q35", "pc-q35-10.0"), ("pc", "pc-i440fx-10.0")];
    HostKnowledge {
        machine_aliases: aliases
            .map(|(alias, name)| (alias.to_owned(), name.to_owned()))
            .into(),
        ..HostKnowledge::default()
    }
}

/// Firmware is another matter: no descriptors are known here.
fn expanded(text: &str) -> Result<Expanded, ConfigError> {
    let text = text.replace(" firmware='efi'", "");
    expand(&Document::parse(text.as_bytes()).unwrap(), &knowledge())
}

fn domains() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = fs::read_dir(testdata().join("domains"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "xml"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect();
    all.sort();
    assert!(all.len() >= 60);
    all
}

#[test]
fn a_domain_that_is_read_and_written_is_the_same_byte_for_byte() {
    for (name, text) in domains() {
        let document = Document::parse(text.as_bytes()).unwrap();
        assert_eq!(document.write(), text, "{name}");
    }
}

#[test]
fn expanding_an_expanded_domain_changes_nothing() {
    for (name, text) in domains() {
        let once = expanded(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let again = expand(&once.document, &knowledge()).unwrap();
        assert_eq!(once.document.write(), again.document.write(), "{name}");
        assert_eq!(once.domain, again.domain, "{name}");
    }
}

#[test]
fn every_device_is_where_libvirt_would_put_it() {
    let text = fs::read_to_string(testdata().join("libvirt-addresses.txt")).unwrap();
    let mut expected: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut name = "";
    for line in text.lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("  ") {
            Some(device) => expected.entry(name).or_default().push(device.to_owned()),
            None => name = line,
        }
    }
    let domains: BTreeMap<String, String> = domains().into_iter().collect();
    let mut different = String::new();
    for (name, devices) in &expected {
        let ours = addresses(&expanded(&domains[*name]).unwrap().document.root);
        if ours != *devices {
            different += &format!("{name}: ours {ours:#?}, libvirt's {devices:#?}\n");
        }
    }
    assert!(different.is_empty(), "{different}");
    assert!(expected.len() >= 100);
}

#[test]
fn a_million_devices_are_refused_before_they_cost_much() {
    let xml = format!(
        "<domain><devices>{}</devices></domain>",
        "<hub type='usb'/>".repeat(900_000)
    );
    let began = Instant::now();
    let refused = Document::parse(xml.as_bytes()).unwrap_err().to_string();
    assert!(refused.contains("more than"), "{refused}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

/// Every device that has an address, as the file writes them.
fn addresses(root: &Element) -> Vec<String> {
    let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for device in root.find("devices").unwrap().elements() {
        let number = numbers.entry(&device.name).or_default();
        let own = *number;
        *number += 1;
        // libvirt leaves the ports of consoles to QEMU, and repeats the address of serial ports there.
        if device.name == "console" {
            continue;
        }
        let Some(address) = device.find("address").and_then(shown) else {
            continue;
        };
        let name = match &*device.name {
            "controller" => controller(device),
            "disk" => format!(
                "disk {}",
                device.at(&["target"]).unwrap().get("dev").unwrap()
            ),
            name => format!("{name} {own}"),
        };
        let target = device
            .find("target")
            .filter(|_| device.name == "controller");
        let port = target.filter(|target| target.get("port").is_some());
        let port = port.map_or(String::new(), |target| {
            let part = |name| target.get(name).unwrap();
            format!(" chassis {} port {}", part("chassis"), part("port"))
        });
        all.push(format!("{name}: {address}{port}"));
    }
    all.sort();
    all
}

fn controller(device: &Element) -> String {
    let part = |name| device.get(name).unwrap();
    let kind = part("type");
    let model = if matches!(kind, "usb" | "pci") {
        format!(" {}", part("model"))
    } else {
        String::new()
    };
    format!("controller {kind} {}{model}", part("index"))
}

fn shown(address: &Element) -> Option<String> {
    let part = |name| address.get(name).unwrap_or("0");
    let hexadecimal = |name| {
        let text = part(name);
        match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).unwrap(),
            None => text.parse().unwrap(),
        }
    };
    Some(match part("type") {
        "pci" => {
            let multifunction = if part("multifunction") == "on" {
                " multifunction"
            } else {
                ""
            };
            let (bus, slot, function) = (
                hexadecimal("bus"),
                hexadecimal("slot"),
                hexadecimal("function"),
            );
            format!("pci {bus:02x}:{slot:02x}.{function:x}{multifunction}")
        }
        "drive" => {
            let (controller, bus) = (part("controller"), part("bus"));
            format!(
                "drive {controller}-{bus}-{}-{}",
                part("target"),
                part("unit")
            )
        }
        "usb" => format!("usb {}-{}", part("bus"), part("port")),
        "virtio-serial" => format!("virtio-serial {}-{}", part("controller"), part("port")),
        "ccid" => format!("ccid {}-{}", part("controller"), part("slot")),
        "dimm" => format!("dimm {}", part("slot")),
        _ => return None,
    })
}
