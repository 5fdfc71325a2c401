//! The machine itself: features, CPU, clock, power management, memory.

use super::Story;
use crate::config::properties::{Properties, is_yes};
use crate::config::resources::is_monitor_only;
use crate::config::restore_arguments::DROPPED;
use crate::config::xml::Element;

/// The id of the backend of main memory, which is the name of its RAMBlock too.
const MAIN_MEMORY: &str = "pc.ram";

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
        let rest = [switch("smm", "smm"), switch("vmport", "vmport")];
        let all: Vec<Element> = acpi.into_iter().chain(rest.into_iter().flatten()).collect();
        (!all.is_empty()).then(|| Element::new("features").children(all))
    }

    pub(super) fn cpu(&mut self) -> Option<Element> {
        let topology = self.topology().map(|(sockets, cores, threads)| {
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

    fn smp(&self, key: &str) -> Option<u32> {
        let (_, smp) = self.arguments.options("smp").next_back()?;
        smp.properties().get(key)?.parse().ok()
    }

    fn topology(&self) -> Option<(u32, u32, u32)> {
        let said = ["sockets", "cores", "threads"].map(|key| self.smp(key));
        let [sockets, cores, threads] = said;
        // Where one is left out QEMU chooses it, by rules that differ between machine types.
        let all = sockets.zip(cores).zip(threads);
        let all = all.map(|((sockets, cores), threads)| (sockets, cores, threads));
        self.facts.topology.or(all)
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

    /// Memory of another kind than QEMU's own; main memory in a backend of the usual name is told by its size.
    pub(super) fn memory_backing(&mut self) -> Option<Element> {
        let backend = self.machine_property("memory-backend");
        let id = backend.filter(|id| id == MAIN_MEMORY)?;
        let objects: Vec<(usize, Properties)> = self
            .arguments
            .options("object")
            .map(|(index, object)| (index, object.properties()))
            .collect();
        let (index, object) = objects
            .into_iter()
            .find(|(_, object)| object.get("id").as_ref() == Some(&id))?;
        let source = match object.get("qom-type")?.as_str() {
            "memory-backend-ram" => None,
            "memory-backend-memfd" => Some("memfd"),
            _ => return None,
        };
        let access = object.is_on("share").then_some("shared");
        let known = [
            "qom-type",
            "id",
            "size",
            "share",
            "x-use-canonical-path-for-ramblock-id",
        ];
        self.tell(index, &object, &known);
        for (index, argument) in self.arguments.options("machine") {
            if argument.properties().get("memory-backend").is_some() {
                self.forgive(index, &[&format!("memory-backend={id}")]);
            }
        }
        let of = |name: &'static str, key: &'static str, value: Option<&str>| {
            Some(Element::new(name).attribute(key, value?))
        };
        let told = [of("source", "type", source), of("access", "mode", access)];
        let told: Vec<Element> = told.into_iter().flatten().collect();
        (!told.is_empty()).then(|| Element::new("memoryBacking").children(told))
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

    pub(super) fn on_reboot(&mut self) -> Option<Element> {
        self.take("no-reboot")
            .map(|_| Element::with_text("on_reboot", "destroy"))
    }

    pub(super) fn note_machine(&mut self) {
        const KNOWN: [&str; 8] = [
            "type", "accel", "acpi", "smm", "vmport", "pflash0", "pflash1", "hpet",
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
                "m" => self.tell(index, &argument.properties(), &["size"]),
                "accel" => self.tell(index, &argument.properties(), &["accel"]),
                "smp" => self.tell(
                    index,
                    &argument.properties(),
                    &["cpus", "maxcpus", "sockets", "cores", "threads"],
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
