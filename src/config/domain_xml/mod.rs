//! A guest's arguments as libvirt domain XML, for people and for libvirt's tools.
//!
//! What libvirt has a word for is written in libvirt's words. Every other argument stands verbatim under
//! `<qemu:commandline>` so that nothing is silently lost, and `<metadata>` lists it in our namespace ([`NAMESPACE`]),
//! with single properties of modelled devices that have no counterpart, and says whether QEMU's default devices are there
//! (no `-nodefaults`), which no argument names. How QEMU was run (monitors, `-daemonize`) is no part of it.
//!
//! Source: libvirt's documentation of the domain format.

mod devices;
mod disks;
mod identity;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::arguments::{Argument, Arguments};
use super::properties::{Properties, is_yes};
use super::resources::{ResourceKind, ResourceTable, is_monitor_only};
use super::restore_arguments::DROPPED;
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
}

/// The domain XML of a guest.
pub fn domain_xml(arguments: &Arguments, resources: &ResourceTable, facts: &DomainFacts) -> String {
    let resources = &with_absolute_paths(resources, &facts.directory);
    let mut story = Story::new(arguments, resources, facts);
    let os = story.os();
    let features = story.features();
    let cpu = story.cpu();
    let clock = story.clock();
    let on_reboot = story.on_reboot();
    story.note_machine();
    story.note_known();
    let devices = story.devices();
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
        .child(Element::with_text("memory", facts.memory_bytes).attribute("unit", "b"))
        .child(Element::with_text("currentMemory", facts.memory_bytes).attribute("unit", "b"))
        .child(vcpu(facts))
        .child(os)
        .children(features)
        .children(cpu)
        .child(clock)
        .children(on_reboot)
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

fn vcpu(facts: &DomainFacts) -> Element {
    let max = facts.max_vcpus.max(facts.vcpus);
    let current = (max != facts.vcpus).then_some(facts.vcpus);
    Element::with_text("vcpu", max)
        .attribute("placement", "static")
        .attribute_if("current", current)
}

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
        let is_told =
            |key: &str| known.contains(&key) && (has_address || !matches!(key, "bus" | "addr"));
        let leaves = properties.leaves().into_iter();
        let rest = leaves.filter(|(key, _)| !is_told(key));
        let rest: Vec<String> = rest.map(|(key, value)| format!("{key}={value}")).collect();
        if !rest.is_empty() {
            self.untold.push((index, rest.join(",")));
        }
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
        self.tell(index, &boot, &["order", "menu"]);
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
            Element::new("bootmenu").attribute("enable", if is_yes(&menu) { "yes" } else { "no" })
        });
        devices.chain(menu).collect()
    }

    fn machine_property(&self, key: &str) -> Option<String> {
        let mut machines = self.arguments.options("machine");
        machines
            .rfind(|(_, machine)| machine.properties().get(key).is_some())?
            .1
            .properties()
            .get(key)
    }

    fn features(&mut self) -> Option<Element> {
        let no_acpi = self.take("no-acpi").is_some();
        let is_off = self
            .machine_property("acpi")
            .is_some_and(|acpi| !is_yes(&acpi));
        let acpi = (!no_acpi && !is_off).then(|| Element::new("acpi"));
        let switch = |name, key| {
            let state = self.machine_property(key)?;
            Some(Element::new(name).attribute("state", if is_yes(&state) { "on" } else { "off" }))
        };
        let rest = [switch("smm", "smm"), switch("vmport", "vmport")];
        let all: Vec<Element> = acpi.into_iter().chain(rest.into_iter().flatten()).collect();
        (!all.is_empty()).then(|| Element::new("features").children(all))
    }

    fn cpu(&mut self) -> Option<Element> {
        let facts = self.facts;
        let topology = facts.topology.map(|(sockets, cores, threads)| {
            Element::new("topology")
                .attribute("sockets", sockets)
                .attribute("cores", cores)
                .attribute("threads", threads)
        });
        let Some((index, argument)) = self.arguments.options("cpu").next_back() else {
            return topology.map(|topology| Element::new("cpu").child(topology));
        };
        let properties = argument.properties();
        let model = properties.get("model").unwrap_or_default();
        let mut features = Vec::new();
        let mut known = vec!["model".to_owned()];
        for (key, value) in properties.leaves() {
            let plain = key.strip_prefix(['+', '-']).unwrap_or(&key).to_owned();
            let policy = match (key.chars().next(), value.as_str()) {
                (Some('-'), _) | (_, "off" | "no" | "false") => "disable",
                (Some('+'), _) | (_, "on" | "yes" | "true") => "require",
                _ => continue,
            };
            // Switches of KVM and Hyper-V are no CPU features to libvirt.
            if ["hv-", "hv_", "kvm", "migratable"]
                .iter()
                .any(|prefix| plain.starts_with(prefix))
            {
                continue;
            }
            features.push(
                Element::new("feature")
                    .attribute("policy", policy)
                    .attribute("name", plain),
            );
            known.push(key);
        }
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        self.tell(index, &properties, &known);
        let cpu = match model.as_str() {
            "host" => Element::new("cpu").attribute("mode", "host-passthrough"),
            "max" => Element::new("cpu").attribute("mode", "maximum"),
            _ => Element::new("cpu")
                .attribute("mode", "custom")
                .attribute("match", "exact")
                .attribute("check", "none")
                .child(Element::with_text("model", &model).attribute("fallback", "forbid")),
        };
        Some(cpu.children(topology).children(features))
    }

    fn clock(&mut self) -> Element {
        let Some((index, argument)) = self.arguments.options("rtc").next_back() else {
            return Element::new("clock").attribute("offset", "utc");
        };
        let rtc = argument.properties();
        self.tell(index, &rtc, &["base"]);
        match rtc.get("base").as_deref() {
            Some("localtime") => Element::new("clock").attribute("offset", "localtime"),
            Some("utc") | None => Element::new("clock").attribute("offset", "utc"),
            Some(_) => {
                self.untold.push((index, "base".to_owned()));
                Element::new("clock").attribute("offset", "utc")
            }
        }
    }

    fn on_reboot(&mut self) -> Option<Element> {
        self.take("no-reboot")
            .map(|_| Element::with_text("on_reboot", "destroy"))
    }

    fn note_machine(&mut self) {
        const KNOWN: [&str; 7] = [
            "type", "accel", "acpi", "smm", "vmport", "pflash0", "pflash1",
        ];
        for (index, argument) in self.arguments.options("machine") {
            self.tell(index, &argument.properties(), &KNOWN);
        }
    }

    /// Options that the facts tell, or that say how QEMU was run.
    fn note_known(&mut self) {
        const KNOWN: [&str; 7] = [
            "uuid",
            "nodefaults",
            "no-user-config",
            "enable-kvm",
            "no-shutdown",
            "msg",
            "nodefconfig",
        ];
        for (index, argument) in self.arguments.items.iter().enumerate() {
            let name = argument.name().unwrap_or_default();
            match name {
                _ if KNOWN.contains(&name) || DROPPED.contains(&name) => {
                    self.told.insert(index);
                }
                "chardev" => {
                    let id = argument.properties().get("id").unwrap_or_default();
                    if is_monitor_only(self.arguments, &id) {
                        self.told.insert(index);
                    }
                }
                "m" => self.tell(index, &argument.properties(), &["size"]),
                "accel" => self.tell(index, &argument.properties(), &["accel"]),
                "smp" => self.tell(
                    index,
                    &argument.properties(),
                    &["cpus", "maxcpus", "sockets", "cores", "threads"],
                ),
                "display"
                    if matches!(argument.value(), Some("none" | "gtk" | "sdl" | "curses")) =>
                {
                    self.told.insert(index);
                }
                _ => {}
            }
        }
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
