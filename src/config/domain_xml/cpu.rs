//! `<cpu>`, and what else `-cpu` says: enlightenments for Windows, what KVM offers, timers; NUMA cells; `-smp`.

use super::Story;
use crate::config::properties::{Properties, is_yes};
use crate::config::xml::Element;

/// Enlightenments that are only on or off, in libvirt's order; `-` is `_` in its names.
const ENLIGHTENMENTS: [&str; 15] = [
    "relaxed",
    "vapic",
    "vpindex",
    "runtime",
    "synic",
    "stimer",
    "reset",
    "frequencies",
    "reenlightenment",
    "tlbflush",
    "ipi",
    "evmcs",
    "avic",
    "emsr-bitmap",
    "xmm-input",
];

/// Those that stand inside others: QEMU's name, the other, its child.
const NESTED: [(&str, &str, &str); 3] = [
    ("stimer-direct", "stimer", "direct"),
    ("tlbflush-direct", "tlbflush", "direct"),
    ("tlbflush-ext", "tlbflush", "extended"),
];

/// What KVM offers: QEMU's name, libvirt's below `<kvm>`.
const OF_KVM: [(&str, &str); 3] = [
    ("kvm-hint-dedicated", "hint-dedicated"),
    ("kvm-poll-control", "poll-control"),
    ("kvm-pv-ipi", "pv-ipi"),
];

/// The longest list of NUMA distances that is told: of as many cells as QEMU has.
const MOST_CELLS: usize = 128;

fn state(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

fn feature(name: &str, is_on: bool) -> Element {
    Element::new(name.to_owned()).attribute("state", state(is_on))
}

/// A key of `-cpu` as QEMU spells it today, and whether it is on; `None` for one that has another value.
fn switch(key: &str, value: &str) -> (String, Option<bool>) {
    let plain = key.strip_prefix(['+', '-']).unwrap_or(key);
    let is_on = match (key.chars().next(), value) {
        (Some('-'), _) | (_, "off" | "no" | "false") => Some(false),
        (Some('+'), _) | (_, "on" | "yes" | "true") => Some(true),
        _ => None,
    };
    (plain.replace('_', "-"), is_on)
}

impl Story<'_> {
    fn cpu_argument(&self) -> Option<(usize, Properties)> {
        let (index, argument) = self.arguments.options("cpu").next_back()?;
        Some((index, argument.properties()))
    }

    /// What `-cpu` says of something that is no feature of the processor.
    fn cpu_value(&self, wanted: &str) -> Option<String> {
        let (_, cpu) = self.cpu_argument()?;
        let mut leaves = cpu.leaves().into_iter();
        let (key, value) = leaves.rfind(|(key, value)| switch(key, value).0 == wanted)?;
        Some(match switch(&key, &value).1 {
            Some(is_on) => state(is_on).to_owned(),
            None => value,
        })
    }

    fn cpu_switch(&self, wanted: &str) -> Option<bool> {
        self.cpu_value(wanted)
            .filter(|value| value == "on" || value == "off")
            .map(|value| value == "on")
    }

    /// `<hyperv>`.
    pub(super) fn hyperv(&self) -> Option<Element> {
        let mut hyperv = Element::new("hyperv");
        if self.cpu_switch("hv-passthrough") == Some(true) {
            hyperv.set("mode", "passthrough");
        }
        for name in ENLIGHTENMENTS {
            let Some(is_on) = self.cpu_switch(&format!("hv-{name}")) else {
                continue;
            };
            let mut written = feature(&name.replace('-', "_"), is_on);
            for (nested, outer, child) in NESTED {
                let nested = self.cpu_switch(&format!("hv-{nested}"));
                if let Some(is_on) = nested.filter(|_| outer == name) {
                    written = written.child(feature(child, is_on));
                }
            }
            hyperv = hyperv.child(written);
        }
        let spinlocks = self.cpu_value("hv-spinlocks").and_then(|retries| {
            let retries = match retries.strip_prefix("0x") {
                Some(digits) => u32::from_str_radix(digits, 16),
                None => retries.parse(),
            };
            retries.ok()
        });
        let spinlocks =
            spinlocks.map(|retries| feature("spinlocks", true).attribute("retries", retries));
        let vendor = self.cpu_value("hv-vendor-id");
        let vendor = vendor.map(|vendor| feature("vendor_id", true).attribute("value", vendor));
        let hyperv = hyperv.children(spinlocks).children(vendor);
        let is_empty = hyperv.attributes.is_empty() && hyperv.elements().next().is_none();
        (!is_empty).then_some(hyperv)
    }

    /// `<kvm>`, and what else of KVM the features tell.
    pub(super) fn kvm_features(&self) -> Vec<Element> {
        let mut kvm = Element::new("kvm");
        if let Some(is_shown) = self.cpu_switch("kvm") {
            kvm = kvm.child(feature("hidden", !is_shown));
        }
        for (name, child) in OF_KVM {
            kvm = kvm.children(self.cpu_switch(name).map(|is_on| feature(child, is_on)));
        }
        let eoi = self.cpu_switch("kvm-pv-eoi");
        let eoi = eoi.map(|is_on| Element::new("apic").attribute("eoi", state(is_on)));
        let of = |name: &'static str, key: &str| Some(feature(name, self.cpu_switch(key)?));
        let has_kvm = kvm.elements().next().is_some();
        let all = [
            eoi,
            has_kvm.then_some(kvm),
            of("pvspinlock", "kvm-pv-unhalt"),
            of("pmu", "pmu"),
        ];
        all.into_iter().flatten().collect()
    }

    /// The timers that `-cpu` tells of.
    pub(super) fn cpu_timers(&self) -> Vec<Element> {
        let timer = |name: &str| Element::new("timer").attribute("name", name);
        let present = |name: &'static str, key: &str| {
            let is_on = self.cpu_switch(key)?;
            Some(timer(name).attribute("present", if is_on { "yes" } else { "no" }))
        };
        let frequency = self.cpu_value("tsc-frequency");
        let tsc = frequency.map(|hz| timer("tsc").attribute("frequency", hz));
        let all = [
            tsc,
            present("kvmclock", "kvmclock"),
            present("hypervclock", "hv-time"),
        ];
        all.into_iter().flatten().collect()
    }

    /// A guest of Hyper-V can tell of its end without a device.
    pub(super) fn hyperv_panic(&self) -> Option<Element> {
        let is_on = self.cpu_switch("hv-crash")?;
        is_on.then(|| Element::new("panic").attribute("model", "hyperv"))
    }

    /// Whether a key of `-cpu` is told outside `<cpu>`.
    fn is_told_elsewhere(&self, key: &str, value: &str) -> bool {
        let (name, is_on) = switch(key, value);
        if let Some(name) = name.strip_prefix("hv-") {
            let is_nested = NESTED.iter().any(|(nested, outer, _)| {
                name == *nested && self.cpu_switch(&format!("hv-{outer}")).is_some()
            });
            return is_nested
                || (ENLIGHTENMENTS.contains(&name) || name == "time") && is_on.is_some()
                || (matches!(name, "crash" | "passthrough") && is_on == Some(true))
                || matches!(name, "spinlocks" | "vendor-id");
        }
        let switches = ["kvm", "kvm-pv-eoi", "kvm-pv-unhalt", "pmu", "kvmclock"];
        let is_of_kvm = OF_KVM.iter().any(|(of_kvm, _)| name == *of_kvm);
        (is_of_kvm || switches.contains(&name.as_str())) && is_on.is_some()
            || name == "tsc-frequency"
    }

    pub(super) fn cpu(&mut self) -> Option<Element> {
        let topology = self.topology();
        let numa = self.numa();
        let Some((index, properties)) = self.cpu_argument() else {
            let has_any = topology.is_some() || numa.is_some();
            return has_any.then(|| Element::new("cpu").children(topology).children(numa));
        };
        let model = properties.get("model").unwrap_or_default();
        let is_open = matches!(model.as_str(), "host" | "max");
        let mut features = Vec::new();
        let mut known = vec!["model".to_owned()];
        for (key, value) in properties.leaves() {
            let (name, is_on) = switch(&key, &value);
            if self.is_told_elsewhere(&key, &value) {
                known.push(key);
                continue;
            }
            let Some(is_on) = is_on else { continue };
            // Switches of KVM and Hyper-V are no CPU features to libvirt.
            if is_no_feature(&name) {
                continue;
            }
            let plain = key.strip_prefix(['+', '-']).unwrap_or(&key).to_owned();
            features.push(
                Element::new("feature")
                    .attribute("policy", if is_on { "require" } else { "disable" })
                    .attribute("name", plain),
            );
            known.push(key);
        }
        let vendor = properties.get("vendor").filter(|_| !is_open);
        let vendor = vendor.as_deref().and_then(vendor_of);
        let migratable = self.cpu_switch("migratable").filter(|_| is_open);
        let cache = cache_of(&properties);
        let address = address_of(&properties);
        known.extend(vendor.iter().map(|_| "vendor".to_owned()));
        known.extend(migratable.iter().map(|_| "migratable".to_owned()));
        if cache.is_some() {
            known.extend(["l3-cache", "host-cache-info"].map(str::to_owned));
        }
        if address.is_some() {
            let keys = ["phys-bits", "host-phys-bits", "host-phys-bits-limit"];
            known.extend(keys.map(str::to_owned));
        }
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        self.tell(index, &properties, &known);
        let open = |mode: &str| {
            Element::new("cpu")
                .attribute("mode", mode)
                .attribute_if("migratable", migratable.map(state))
        };
        let cpu = match model.as_str() {
            "host" => open("host-passthrough"),
            "max" => open("maximum"),
            _ => Element::new("cpu")
                .attribute("mode", "custom")
                .attribute("match", "exact")
                .attribute("check", "none")
                .child(Element::with_text("model", &model).attribute("fallback", "forbid"))
                .children(vendor.map(|vendor| Element::with_text("vendor", vendor))),
        };
        let cpu = cpu.children(topology).children(cache).children(address);
        Some(cpu.children(features).children(numa))
    }

    fn smp(&self, key: &str) -> Option<u32> {
        let (_, smp) = self.arguments.options("smp").next_back()?;
        smp.properties().get(key)?.parse().ok()
    }

    fn topology(&self) -> Option<Element> {
        let [sockets, cores, threads] = ["sockets", "cores", "threads"].map(|key| self.smp(key));
        // Where one is left out QEMU chooses it, by rules that differ between machine types.
        let said = sockets.zip(cores).zip(threads);
        let said = said.map(|((sockets, cores), threads)| (sockets, cores, threads));
        let (sockets, cores, threads) = self.facts.topology.or(said)?;
        let several = |key: &str| self.smp(key).filter(|count| *count > 1);
        let topology = Element::new("topology")
            .attribute("sockets", sockets)
            .attribute_if("dies", several("dies"))
            .attribute_if("clusters", several("clusters"))
            .attribute("cores", cores);
        Some(topology.attribute("threads", threads))
    }

    pub(super) fn vcpu(&self) -> Element {
        let facts = self.facts;
        let max = facts.max_vcpus.max(self.smp("maxcpus").unwrap_or(0));
        let max = max.max(facts.vcpus);
        let current = (max != facts.vcpus).then_some(facts.vcpus);
        Element::with_text("vcpu", max)
            .attribute("placement", "static")
            .attribute_if("current", current)
    }

    /// Cells with memory of their own, called as libvirt calls it, and how far they are from each other.
    fn numa(&mut self) -> Option<Element> {
        let mut cells: Vec<(u32, Element)> = Vec::new();
        let mut distances: Vec<(u32, u32, u32)> = Vec::new();
        let all: Vec<(usize, Properties)> = self
            .arguments
            .options("numa")
            .map(|(index, numa)| (index, numa.properties()))
            .collect();
        for (index, numa) in all {
            let number = |key: &str| numa.get(key)?.parse::<u32>().ok();
            if numa.get("type").as_deref() == Some("dist") {
                let parts = (number("src"), number("dst"), number("val"));
                if let ((Some(from), Some(to), Some(value)), true) =
                    (parts, distances.len() <= MOST_CELLS * MOST_CELLS)
                {
                    distances.push((from, to, value));
                    self.tell(index, &numa, &["type", "src", "dst", "val"]);
                }
                continue;
            }
            let (Some(id), Some(memdev)) = (number("nodeid"), numa.get("memdev")) else {
                continue;
            };
            let Some(backend) = self
                .memory_of(&memdev)
                .filter(|_| memdev == format!("ram-node{id}"))
            else {
                continue;
            };
            let cpus = numa.leaves().into_iter();
            let cpus: Vec<String> = cpus
                .filter(|(key, _)| key == "cpus")
                .map(|(_, value)| value)
                .collect();
            let cell = Element::new("cell")
                .attribute("id", id)
                .attribute_if("cpus", (!cpus.is_empty()).then(|| cpus.join(",")))
                .attribute("memory", backend.size)
                .attribute("unit", "b")
                .attribute_if("memAccess", backend.is_shared.then_some("shared"));
            cells.push((id, cell));
            self.tell(index, &numa, &["type", "nodeid", "cpus", "memdev"]);
        }
        let cells: Vec<Element> = cells
            .into_iter()
            .map(|(id, cell)| {
                let siblings = distances.iter().filter(|(from, _, _)| *from == id);
                let siblings = siblings.map(|(_, to, value)| {
                    Element::new("sibling")
                        .attribute("id", to)
                        .attribute("value", value)
                });
                let all = Element::new("distances").children(siblings);
                cell.children(all.elements().next().is_some().then_some(all.clone()))
            })
            .collect();
        (!cells.is_empty()).then(|| Element::new("numa").children(cells))
    }
}

/// Switches of `-cpu` that are no features of a processor.
fn is_no_feature(name: &str) -> bool {
    let prefixes = [
        "hv-",
        "kvm",
        "migratable",
        "l3-cache",
        "host-",
        "enforce",
        "check",
    ];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// libvirt's name of a vendor.
fn vendor_of(cpuid: &str) -> Option<&'static str> {
    Some(match cpuid {
        "GenuineIntel" => "Intel",
        "AuthenticAMD" => "AMD",
        "HygonGenuine" => "Hygon",
        _ => return None,
    })
}

fn cache_of(cpu: &Properties) -> Option<Element> {
    let is_on = |key: &str| cpu.get(key).map(|value| is_yes(&value));
    let mode = |mode: &str| Element::new("cache").attribute("mode", mode);
    Some(match (is_on("l3-cache"), is_on("host-cache-info")) {
        (Some(false), Some(true)) => mode("passthrough"),
        (Some(true), None | Some(false)) => Element::new("cache")
            .attribute("level", 3)
            .attribute("mode", "emulate"),
        (Some(false), None | Some(false)) => mode("disable"),
        _ => return None,
    })
}

fn address_of(cpu: &Properties) -> Option<Element> {
    let address = |mode: &str| Element::new("maxphysaddr").attribute("mode", mode);
    if cpu.is_on("host-phys-bits") {
        return Some(address("passthrough").attribute_if("limit", cpu.get("host-phys-bits-limit")));
    }
    Some(address("emulate").attribute("bits", cpu.get("phys-bits")?))
}
