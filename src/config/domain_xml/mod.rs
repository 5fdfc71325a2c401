//! A guest's arguments as libvirt domain XML, for people and for libvirt's tools.
//!
//! What libvirt has a word for is written in libvirt's words. Every other argument stands verbatim under
//! `<qemu:commandline>` so that nothing is silently lost, and `<metadata>` lists it in our namespace ([`NAMESPACE`]),
//! with single properties of modelled devices that have no counterpart, and says whether QEMU's default devices are there
//! (no `-nodefaults`), which no argument names. How QEMU was run (monitors, `-daemonize`) is no part of it.
//!
//! Source: libvirt's documentation of the domain format.

mod controllers;
mod cpu;
mod devices;
mod disks;
mod identity;
mod interfaces;
mod machine;
mod network_disks;
mod ports;
mod shares;
mod stores;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::arguments::{Argument, Arguments};
use super::properties::{Properties, is_yes};
use super::resources::{ResourceKind, ResourceTable};
use super::xml::{Document, Element};

pub use identity::{Identity, read_identity};

/// The namespace of our elements in `<metadata>`.
pub const NAMESPACE: &str = "urn:vmstow:1";
const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// What is known of a guest beside its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainFacts {
    /// Its name.
    pub name: String,
    /// Its UUID; `None` if it has none, for none is invented.
    pub uuid: Option<uuid::Uuid>,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its virtual CPUs at the save.
    pub vcpus: u32,
    /// As many as it may get; at least `vcpus`.
    pub max_vcpus: u32,
    /// Sockets, cores for each, threads for each, where known.
    pub topology: Option<(u32, u32, u32)>,
    /// The resolved machine type.
    pub machine_type: String,
    /// `kvm`, `tcg`, ….
    pub accelerator: String,
    /// The path of the QEMU that ran it.
    pub emulator: String,
    /// The directory that relative paths start from; libvirt takes absolute ones only.
    pub directory: String,
    /// Where QEMU put devices whose arguments leave that to it, by argument.
    #[serde(default)]
    pub places: BTreeMap<usize, PciPlace>,
}

/// A place on a PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciPlace {
    /// The bus's name: `pcie.0`, or the id of the bridge whose it is.
    pub bus: String,
    /// The slot.
    pub slot: u8,
    /// The function.
    pub function: u8,
}

/// The domain XML of a guest.
pub fn domain_xml(arguments: &Arguments, resources: &ResourceTable, facts: &DomainFacts) -> String {
    let resources = &with_absolute_paths(resources, &facts.directory);
    let mut story = Story::new(arguments, resources, facts);
    let os = story.os();
    let features = story.features();
    let cpu = story.cpu();
    let clock = story.clock();
    let pm = story.pm();
    let on_reboot = story.on_reboot();
    story.note_machine();
    story.note_known();
    let devices = story.devices();
    let memory_backing = story.memory_backing();
    let iothreads = story.iothreads();
    let vcpu = story.vcpu();
    let commandline = story.commandline();
    let domain_type = if facts.accelerator == "kvm" {
        "kvm"
    } else {
        "qemu"
    };
    let mut domain = Element::new("domain").attribute("type", domain_type);
    if commandline.is_some() {
        domain = domain.attribute("xmlns:qemu", QEMU_NAMESPACE);
    }
    let uuid = facts.uuid.map(|uuid| Element::with_text("uuid", uuid));
    let domain = domain
        .child(Element::with_text("name", &facts.name))
        .children(uuid)
        .children(story.metadata())
        .children(story.max_memory())
        .child(Element::with_text("memory", facts.memory_bytes).attribute("unit", "b"))
        .child(Element::with_text("currentMemory", facts.memory_bytes).attribute("unit", "b"))
        .children(memory_backing)
        .child(vcpu)
        .children(iothreads)
        .child(os)
        .children(features)
        .children(cpu)
        .child(clock)
        .children(on_reboot)
        .children(pm)
        .child(devices)
        .children(commandline);
    Document::new(domain).write_indented()
}

fn with_absolute_paths(resources: &ResourceTable, directory: &str) -> ResourceTable {
    let mut resources = resources.clone();
    for resource in &mut resources.resources {
        let backend = &mut resource.backend;
        backend.path = backend.path.take().map(|path| absolute(directory, path));
    }
    resources
}

fn absolute(directory: &str, path: String) -> String {
    match path.as_str() {
        "" => path,
        name if name.starts_with('/') || directory.is_empty() => path,
        name => format!("{}/{name}", directory.trim_end_matches('/')),
    }
}

/// Properties that an address tells, if it can be told.
const PLACES: [&str; 4] = ["bus", "addr", "nr", "lun"];

/// What the arguments say, and which of them have been told in XML so far.
struct Story<'a> {
    arguments: &'a Arguments,
    resources: &'a ResourceTable,
    facts: &'a DomainFacts,
    told: BTreeSet<usize>,
    /// Single properties without counterpart: argument, `key=value,…`.
    untold: Vec<(usize, String)>,
}

impl<'a> Story<'a> {
    fn new(arguments: &'a Arguments, resources: &'a ResourceTable, facts: &'a DomainFacts) -> Self {
        Story {
            arguments,
            resources,
            facts,
            told: BTreeSet::new(),
            untold: Vec::new(),
        }
    }

    fn is_q35(&self) -> bool {
        self.facts.machine_type.contains("q35")
    }

    /// Tells an argument whose properties are all in `known`; others are noted.
    fn tell(&mut self, index: usize, properties: &Properties, known: &[&str]) {
        self.told.insert(index);
        let has_address = self.address(properties).is_some();
        let is_told = |key: &str| known.contains(&key) && (has_address || !PLACES.contains(&key));
        let leaves = properties.leaves().into_iter();
        let rest = leaves.filter(|(key, _)| !is_told(key));
        let rest: Vec<String> = rest.map(|(key, value)| format!("{key}={value}")).collect();
        if !rest.is_empty() {
            self.untold.push((index, rest.join(",")));
        }
    }

    /// Takes properties off those that have no counterpart: what they say holds without being told.
    fn forgive(&mut self, index: usize, properties: &[&str]) {
        for (of, rest) in &mut self.untold {
            if *of == index {
                let kept: Vec<&str> = rest.split(',').collect();
                let kept = kept.into_iter().filter(|it| !properties.contains(it));
                *rest = kept.collect::<Vec<_>>().join(",");
            }
        }
        self.untold.retain(|(_, rest)| !rest.is_empty());
    }

    /// The value of an option that is told as a whole.
    fn take(&mut self, name: &str) -> Option<String> {
        let found: Vec<(usize, &Argument)> = self.arguments.options(name).collect();
        self.told.extend(found.iter().map(|(index, _)| *index));
        Some(found.last()?.1.value().unwrap_or_default().to_owned())
    }

    fn os(&mut self) -> Element {
        let kind = Element::with_text("type", "hvm")
            .attribute("arch", "x86_64")
            .attribute("machine", &self.facts.machine_type);
        let mut os = Element::new("os").child(kind).children(self.firmware());
        for (option, name) in [
            ("kernel", "kernel"),
            ("initrd", "initrd"),
            ("append", "cmdline"),
            ("dtb", "dtb"),
        ] {
            let directory = &self.facts.directory;
            let value = self.take(option).map(|value| match option {
                "append" => value,
                _ => absolute(directory, value),
            });
            os = os.children(value.map(|value| Element::with_text(name, value)));
        }
        os.children(self.boot())
    }

    /// `-bios`, or flash: the first one the code, the second one the variables.
    fn firmware(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut found = Vec::new();
        for resource in resources.of(ResourceKind::Firmware) {
            let Some(path) = &resource.backend.path else {
                continue;
            };
            let element = match resource.id.as_str() {
                "bios" => Element::with_text("loader", path).attribute("type", "rom"),
                "pflash0" => Element::with_text("loader", path)
                    .attribute("readonly", if resource.read_only { "yes" } else { "no" })
                    .attribute("type", "pflash"),
                "pflash1" => Element::with_text("nvram", path),
                _ => continue,
            };
            self.tell_block(resource);
            found.push(element.attribute_if("format", flash_format(resource)));
        }
        found
    }

    fn boot(&mut self) -> Vec<Element> {
        let Some((index, argument)) = self.arguments.options("boot").next_back() else {
            return Vec::new();
        };
        let boot = argument.properties();
        self.tell(index, &boot, &["order", "menu", "strict", "splash-time"]);
        let order = boot.get("order").unwrap_or_default();
        let device = |drive| match drive {
            'a' => Some("fd"),
            'c' => Some("hd"),
            'd' => Some("cdrom"),
            'n' => Some("network"),
            _ => None,
        };
        let devices = order
            .chars()
            .filter_map(device)
            .map(|name| Element::new("boot").attribute("dev", name));
        let menu = boot.get("menu").map(|menu| {
            Element::new("bootmenu")
                .attribute("enable", if is_yes(&menu) { "yes" } else { "no" })
                .attribute_if("timeout", boot.get("splash-time"))
        });
        devices.chain(menu).collect()
    }

    fn rest(&self) -> impl Iterator<Item = (usize, &'a Argument)> + '_ {
        let items = self.arguments.items.iter().enumerate();
        items.filter(|(index, _)| !self.told.contains(index))
    }

    fn commandline(&self) -> Option<Element> {
        let mut words = Vec::new();
        for (_, argument) in self.rest() {
            if let Argument::Option { word, .. } = argument {
                words.push(word.clone());
            }
            words.extend(argument.value().map(str::to_owned));
        }
        let arguments = words
            .into_iter()
            .map(|word| Element::new("qemu:arg").attribute("value", word));
        let commandline = Element::new("qemu:commandline").children(arguments);
        self.rest().next().map(|_| commandline)
    }

    fn metadata(&self) -> Option<Element> {
        let whole = self.rest().map(|(index, argument)| {
            Element::with_text("vmstow:argument", argument.shown()).attribute("index", index)
        });
        let parts = self.untold.iter().map(|(index, properties)| {
            Element::with_text("vmstow:property", properties).attribute("index", index)
        });
        let defaults =
            (!self.arguments.has("nodefaults")).then(|| Element::new("vmstow:default-devices"));
        let notes: Vec<Element> = defaults.into_iter().chain(parts).chain(whole).collect();
        if notes.is_empty() {
            return None;
        }
        let ours = Element::new("vmstow:unmodelled")
            .attribute("xmlns:vmstow", NAMESPACE)
            .children(notes);
        Some(Element::new("metadata").child(ours))
    }
}

fn flash_format(resource: &super::Resource) -> Option<String> {
    resource
        .backend
        .format
        .clone()
        .filter(|format| format == "qcow2")
}

#[cfg(test)]
mod tests;
