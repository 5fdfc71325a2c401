//! The machine itself: features, CPU, clock, power management, memory.

use super::Story;
use crate::config::properties::{Properties, is_yes};
use crate::config::resources::is_monitor_only;
use crate::config::restore_arguments::DROPPED;
use crate::config::xml::Element;

/// The id of the backend of main memory, which is the name of its RAMBlock too.
const MAIN_MEMORY: &str = "pc.ram";

/// What is told of a memory backend.
const MEMORY_PROPERTIES: [&str; 5] = [
    "qom-type",
    "id",
    "size",
    "share",
    "x-use-canonical-path-for-ramblock-id",
];

/// A memory backend.
pub(super) struct Memory {
    /// Its bytes.
    pub(super) size: u64,
    /// Whether others see it.
    pub(super) is_shared: bool,
    /// libvirt's word for where it is; `None` for QEMU's own.
    source: Option<&'static str>,
}

impl Memory {
    fn of(object: &Properties) -> Option<Self> {
        let source = match object.get("qom-type")?.as_str() {
            "memory-backend-ram" => None,
            "memory-backend-memfd" => Some("memfd"),
            _ => return None,
        };
        Some(Memory {
            size: memory_len(&object.get("size")?)?,
            is_shared: object.is_on("share"),
            source,
        })
    }
}

/// A size as QEMU takes it, in bytes where no unit is said.
fn memory_len(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)?.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

impl Story<'_> {
    pub(super) fn machine_property(&self, key: &str) -> Option<String> {
        let mut machines = self.arguments.options("machine");
        machines
            .rfind(|(_, machine)| machine.properties().get(key).is_some())?
            .1
            .properties()
            .get(key)
    }

    pub(super) fn features(&mut self) -> Option<Element> {
        let no_acpi = self.take("no-acpi").is_some();
        let is_off = self
            .machine_property("acpi")
            .is_some_and(|acpi| !is_yes(&acpi));
        let acpi = (!no_acpi && !is_off).then(|| Element::new("acpi"));
        let switch = |name, key| {
            let state = self.machine_property(key)?;
            Some(Element::new(name).attribute("state", if is_yes(&state) { "on" } else { "off" }))
        };
        let ioapic = self.machine_property("kernel_irqchip").and_then(|chip| {
            let driver = match chip.as_str() {
                "split" => "qemu",
                "on" => "kvm",
                _ => return None,
            };
            Some(Element::new("ioapic").attribute("driver", driver))
        });
        let rest = [switch("smm", "smm"), switch("vmport", "vmport"), ioapic];
        let all = acpi.into_iter().chain(self.hyperv());
        let all = all.chain(self.kvm_features());
        let all: Vec<Element> = all.chain(rest.into_iter().flatten()).collect();
        (!all.is_empty()).then(|| Element::new("features").children(all))
    }

    pub(super) fn clock(&mut self) -> Element {
        let mut clock = Element::new("clock").attribute("offset", "utc");
        if let Some((index, argument)) = self.arguments.options("rtc").next_back() {
            let rtc = argument.properties();
            self.tell(index, &rtc, &["base", "driftfix", "clock"]);
            match rtc.get("base").as_deref() {
                Some("localtime") => clock.set("offset", "localtime"),
                Some("utc") | None => {}
                Some(_) => self.untold.push((index, "base".to_owned())),
            }
            let policy = rtc.get("driftfix").filter(|fix| fix == "slew");
            let track = match rtc.get("clock").as_deref() {
                Some("vm") => Some("guest"),
                Some("host") => Some("wall"),
                _ => None,
            };
            if policy.is_some() || track.is_some() {
                let timer = Element::new("timer")
                    .attribute("name", "rtc")
                    .attribute_if("tickpolicy", policy.map(|_| "catchup"))
                    .attribute_if("track", track);
                clock = clock.child(timer);
            }
        }
        let policy = self.take_global(&["kvm-pit"], "lost_tick_policy");
        clock = clock.children(policy.map(|policy| {
            Element::new("timer")
                .attribute("name", "pit")
                .attribute("tickpolicy", policy)
        }));
        clock = clock.children(self.cpu_timers());
        clock.children(self.machine_property("hpet").map(|hpet| {
            Element::new("timer")
                .attribute("name", "hpet")
                .attribute("present", if is_yes(&hpet) { "yes" } else { "no" })
        }))
    }

    /// Which ways of sleeping the guest is not offered.
    pub(super) fn pm(&mut self) -> Option<Element> {
        const CHIPS: [&str; 2] = ["ICH9-LPC", "PIIX4_PM"];
        let mem = self.take_global(&CHIPS, "disable_s3");
        let disk = self.take_global(&CHIPS, "disable_s4");
        let sleep = |name: &'static str, value: Option<String>| {
            let enabled = if matches!(value?.as_str(), "1" | "on") {
                "no"
            } else {
                "yes"
            };
            Some(Element::new(name).attribute("enabled", enabled))
        };
        let all = [sleep("suspend-to-mem", mem), sleep("suspend-to-disk", disk)];
        let all: Vec<Element> = all.into_iter().flatten().collect();
        (!all.is_empty()).then(|| Element::new("pm").children(all))
    }

    /// The value of a `-global` of one of these drivers, which is told then.
    pub(super) fn take_global(&mut self, drivers: &[&str], property: &str) -> Option<String> {
        let mut found = None;
        for (index, argument) in self.arguments.options("global") {
            let global = argument.properties();
            let value = match (global.get("driver"), global.get("property")) {
                (Some(driver), Some(name)) if drivers.contains(&driver.as_str()) => {
                    global.get("value").filter(|_| name == property)
                }
                _ => drivers.iter().find_map(|driver| {
                    let key = format!("{driver}.{property}");
                    // A driver's name may hold dots, so the first element is no key for certain.
                    let text = argument.value()?.strip_prefix(&key)?.strip_prefix('=')?;
                    Some(text.to_owned())
                }),
            };
            if value.is_some() {
                self.told.insert(index);
                found = value;
            }
        }
        found
    }

    /// Memory of another kind than QEMU's own; main memory in a backend of the usual name is told by its size.
    pub(super) fn memory_backing(&mut self) -> Option<Element> {
        let backend = self.machine_property("memory-backend");
        let main = backend.filter(|id| id == MAIN_MEMORY);
        let is_cell = |id: &str| {
            id.strip_prefix("ram-node")
                .is_some_and(|it| it.parse::<u32>().is_ok())
        };
        let objects: Vec<(usize, Properties)> = self
            .arguments
            .options("object")
            .map(|(index, object)| (index, object.properties()))
            .collect();
        let mut told = None;
        for (index, object) in objects {
            let id = object.get("id").unwrap_or_default();
            let is_main = main.as_ref() == Some(&id);
            let is_of_cell = is_cell(&id) && self.is_numa_memory(&id);
            if !is_main && !is_of_cell {
                continue;
            }
            let Some(memory) = Memory::of(&object) else {
                continue;
            };
            self.tell(index, &object, &MEMORY_PROPERTIES);
            for (index, argument) in self.arguments.options("machine") {
                if is_main && argument.properties().get("memory-backend").is_some() {
                    self.forgive(index, &[&format!("memory-backend={id}")]);
                }
            }
            // A cell says itself that others see it.
            let access = (memory.is_shared && is_main).then_some("shared");
            told = told.or(Some((memory.source, access)));
        }
        let (source, access) = told?;
        let of = |name: &'static str, key: &'static str, value: Option<&str>| {
            Some(Element::new(name).attribute(key, value?))
        };
        let told = [of("source", "type", source), of("access", "mode", access)];
        let told: Vec<Element> = told.into_iter().flatten().collect();
        (!told.is_empty()).then(|| Element::new("memoryBacking").children(told))
    }

    fn is_numa_memory(&self, id: &str) -> bool {
        let mut numa = self.arguments.options("numa");
        numa.any(|(_, numa)| numa.properties().get("memdev").as_deref() == Some(id))
    }

    /// The memory of this id, if it is of a kind that XML has words for.
    pub(super) fn memory_of(&self, id: &str) -> Option<Memory> {
        let mut objects = self
            .arguments
            .options("object")
            .map(|(_, it)| it.properties());
        Memory::of(&objects.find(|object| object.get("id").as_deref() == Some(id))?)
    }

    /// Threads of their own for disks, if they are called as libvirt calls them.
    pub(super) fn iothreads(&mut self) -> Option<Element> {
        let mut count = 0_u32;
        for (index, object) in self.arguments.options("object") {
            let object = object.properties();
            let name = format!("iothread{}", count + 1);
            if object.get("qom-type").as_deref() == Some("iothread")
                && object.get("id") == Some(name)
            {
                self.told.insert(index);
                count += 1;
            }
        }
        (count > 0).then(|| Element::with_text("iothreads", count))
    }

    /// How much memory there may be, with what is plugged in; libvirt wants NUMA cells for that.
    pub(super) fn max_memory(&self) -> Option<Element> {
        let (_, argument) = self.arguments.options("m").next_back()?;
        if !self.arguments.has("numa") {
            return None;
        }
        let memory = argument.properties();
        let size = memory_len(&memory.get("maxmem")?)?;
        let element = Element::with_text("maxMemory", size);
        Some(
            element
                .attribute_if("slots", memory.get("slots"))
                .attribute("unit", "b"),
        )
    }

    pub(super) fn on_reboot(&mut self) -> Option<Element> {
        self.take("no-reboot")
            .map(|_| Element::with_text("on_reboot", "destroy"))
    }

    pub(super) fn note_machine(&mut self) {
        const KNOWN: [&str; 9] = [
            "type",
            "accel",
            "acpi",
            "smm",
            "vmport",
            "pflash0",
            "pflash1",
            "hpet",
            "kernel_irqchip",
        ];
        for (index, argument) in self.arguments.options("machine") {
            self.tell(index, &argument.properties(), &KNOWN);
            // What holds without being told, and what is QEMU's own affair.
            self.forgive(
                index,
                &["usb=off", "dump-guest-core=off", "dump-guest-core=on"],
            );
        }
    }

    /// Options that the facts tell, or that say how QEMU was run.
    pub(super) fn note_known(&mut self) {
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
                "m" if self.arguments.has("numa") => {
                    self.tell(index, &argument.properties(), &["size", "slots", "maxmem"]);
                }
                "m" => self.tell(index, &argument.properties(), &["size"]),
                "accel" => self.tell(index, &argument.properties(), &["accel"]),
                "smp" => self.tell(
                    index,
                    &argument.properties(),
                    &[
                        "cpus", "maxcpus", "sockets", "dies", "clusters", "cores", "threads",
                    ],
                ),
                "overcommit" => {
                    self.tell(index, &argument.properties(), &[]);
                    self.forgive(index, &["mem-lock=off", "cpu-pm=off"]);
                }
                "display"
                    if matches!(argument.value(), Some("none" | "gtk" | "sdl" | "curses")) =>
                {
                    self.told.insert(index);
                }
                _ => {}
            }
        }
    }
}
