//! `<devices>`.

use super::Story;
use crate::config::properties::Properties;
use crate::config::resources::ResourceKind;
use crate::config::xml::Element;

/// A `-device` argument.
pub(super) type Device = (usize, Properties);

impl Story<'_> {
    pub(super) fn devices(&mut self) -> Element {
        let emulator = Element::with_text("emulator", &self.facts.emulator);
        let disks = self.disks();
        let controllers = self.controllers();
        let shares = self.shares();
        let interfaces = self.interfaces();
        let ports = self.ports();
        let inputs = self.simple("input", &INPUTS);
        let hubs = self.simple("hub", &HUBS);
        let tpms = self.tpms();
        let graphics = self.graphics();
        let mut sounds = self.simple("sound", &SOUNDS);
        let codecs = self.codecs();
        let audios = self.audios();
        let videos = self.videos();
        let watchdogs = self.watchdogs();
        let rngs = self.rngs();
        let panics = self.simple("panic", &PANICS);
        let vsocks = self.simple("vsock", &VSOCKS);
        let balloon = self.balloon();
        self.tell_codecs(codecs, &mut sounds);
        Element::new("devices")
            .child(emulator)
            .children(disks)
            .children(controllers)
            .children(shares)
            .children(interfaces)
            .children(ports)
            .children(hubs)
            .children(inputs)
            .children(tpms)
            .children(graphics)
            .children(sounds)
            .children(audios)
            .children(videos)
            .children(watchdogs)
            .children(rngs)
            .children(panics)
            .children(self.hyperv_panic())
            .children(vsocks)
            .children(self.stores())
            .child(balloon)
    }

    /// The `-device` arguments; where they leave the address to QEMU, with the one that QEMU chose.
    pub(super) fn all_devices(&self) -> Vec<Device> {
        let devices = self.arguments.options("device");
        let placed = devices.map(|(index, device)| {
            let mut device = device.properties();
            if let (Some(place), None) = (self.facts.places.get(&index), device.get("addr")) {
                device.set_text("bus", &place.bus);
                device.set_text("addr", &format!("{:#x}.{}", place.slot, place.function));
            }
            (index, device)
        });
        placed.collect()
    }

    pub(super) fn device_with(&self, key: &str, value: &str) -> Option<Device> {
        let mut devices = self.all_devices().into_iter();
        devices.find(|(_, device)| device.get(key).as_deref() == Some(value))
    }

    fn graphics(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut found = Vec::new();
        for resource in resources.of(ResourceKind::Display) {
            let Some(index) = resource.argument else {
                continue;
            };
            let port = resource
                .backend
                .listens
                .first()
                .and_then(|listen| listen.rsplit_once(':'));
            let element = Element::new("graphics").attribute("type", &resource.backend.kind);
            let element = match (&resource.backend.path, port) {
                (Some(path), _) => element.child(
                    Element::new("listen")
                        .attribute("type", "socket")
                        .attribute("socket", path),
                ),
                (None, Some((host, port))) => {
                    let host = host.strip_prefix("tcp:").unwrap_or(host);
                    let host = if host.is_empty() { "0.0.0.0" } else { host };
                    let listen = Element::new("listen")
                        .attribute("type", "address")
                        .attribute("address", host);
                    element
                        .attribute("port", port)
                        .attribute("autoport", "no")
                        .child(listen)
                }
                (None, None) => continue,
            };
            let Some(argument) = self.arguments.items.get(index) else {
                continue;
            };
            self.tell(
                index,
                &argument.properties(),
                &["vnc", "type", "port", "addr", "unix", "audiodev"],
            );
            let audio = argument.properties().get("audiodev");
            let audio = audio.and_then(|id| audio_id(&id));
            found.push(element.children(audio.map(|id| Element::new("audio").attribute("id", id))));
        }
        found
    }

    /// Without `-nodefaults` and `-vga` QEMU has a standard VGA, unless a VGA is among the devices.
    fn videos(&mut self) -> Vec<Element> {
        let video = |model: &str| {
            Element::new("video").child(Element::new("model").attribute("type", model))
        };
        let default = if self.arguments.has("nodefaults") {
            "none"
        } else {
            "std"
        };
        let vga = self.arguments.last_value("vga").unwrap_or(default);
        let vga = VGAS
            .iter()
            .find(|known| known.0 == vga)
            .map(|known| known.1);
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            if let Some((_, model)) = VIDEOS.iter().find(|known| known.0 == driver) {
                let is_qxl = *model == "qxl";
                let kib = |key: &str| device.get(key)?.parse::<u64>().ok()?.checked_mul(1024);
                let bytes = |key: &str| Some(device.get(key)?.parse::<u64>().ok()? / 1024);
                let (vram, vgamem, ram) = match is_qxl {
                    true => (bytes("vram_size"), kib("vgamem_mb"), bytes("ram_size")),
                    false => (kib("vgamem_mb"), None, None),
                };
                let model = Element::new("model")
                    .attribute("type", model)
                    .attribute_if("ram", ram)
                    .attribute_if("vram", vram)
                    .attribute_if("vram64", kib("vram64_size_mb"))
                    .attribute_if("vgamem", vgamem)
                    .attribute_if("heads", device.get("max_outputs"))
                    .attribute_if("blob", device.get("blob"))
                    .attribute_if("primary", (driver == "qxl-vga").then_some("yes"));
                let size = device.get("xres").zip(device.get("yres"));
                let model = model.children(size.map(|(x, y)| {
                    Element::new("resolution")
                        .attribute("x", x)
                        .attribute("y", y)
                }));
                let written = Element::new("video").child(model).children(alias(&device));
                found.push(written.children(self.address(&device)));
                let known: &[&str] = match is_qxl {
                    true => &["ram_size", "vram_size", "vram64_size_mb"],
                    false => &[],
                };
                let common = ["driver", "id", "bus", "addr", "vgamem_mb", "max_outputs"];
                let common = [&common[..], &["blob", "xres", "yres"]].concat();
                self.tell(index, &device, &[&common, known].concat());
            }
        }
        let is_given = self.arguments.has("vga");
        match vga {
            Some("none") if found.is_empty() => found.push(video("none")),
            Some("none") | None => {}
            Some(model) if is_given || found.is_empty() => found.insert(0, video(model)),
            Some(_) => {}
        }
        if is_given && vga.is_some() {
            self.take("vga");
        }
        found
    }

    fn rngs(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let object = device.get("rng").and_then(|id| self.object(&id));
            let (true, Some((object_index, object))) = (driver.starts_with("virtio-rng"), object)
            else {
                continue;
            };
            let backend = match object.get("qom-type").as_deref() {
                Some("rng-builtin") => Element::new("backend").attribute("model", "builtin"),
                Some("rng-random") => {
                    let path = object
                        .get("filename")
                        .unwrap_or_else(|| "/dev/urandom".to_owned());
                    Element::with_text("backend", path).attribute("model", "random")
                }
                _ => continue,
            };
            let rate = device.get("max-bytes").map(|bytes| {
                Element::new("rate")
                    .attribute("bytes", bytes)
                    .attribute_if("period", device.get("period"))
            });
            let rng = Element::new("rng")
                .attribute("model", virtio_model(&driver))
                .children(rate)
                .child(backend)
                .children(virtio_driver(&device));
            found.push(rng.children(alias(&device)).children(self.address(&device)));
            let known = ["driver", "id", "rng", "bus", "addr", "max-bytes", "period"];
            self.tell(index, &device, &[&known[..], &VIRTIO_PROPERTIES].concat());
            self.tell(object_index, &object, &["qom-type", "id", "filename"]);
        }
        found
    }

    pub(super) fn object(&self, id: &str) -> Option<Device> {
        let objects = self.arguments.options("object");
        let mut objects = objects.map(|(index, object)| (index, object.properties()));
        objects.find(|(_, object)| object.get("id").as_deref() == Some(id))
    }

    /// libvirt adds a balloon unless it is told not to.
    fn balloon(&mut self) -> Element {
        let found = self.simple("memballoon", &BALLOONS);
        let none = Element::new("memballoon").attribute("model", "none");
        found.into_iter().next().unwrap_or(none)
    }

    /// Devices that need no more than a row of a table.
    fn simple(&mut self, element: &'static str, table: &[Row]) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let Some(row) = table.iter().find(|row| row.0 == driver) else {
                continue;
            };
            let mut written = Element::new(element);
            for (name, value) in row.1 {
                written = written.attribute(name, value);
            }
            let mut known = vec!["driver", "id", "bus", "addr", "port"];
            for (property, child, attribute) in row.2 {
                known.push(property);
                let Some(value) = device.get(property) else {
                    continue;
                };
                match child.is_empty() {
                    true => written.set(attribute, value),
                    false => {
                        written = written.child(Element::new(*child).attribute(attribute, value))
                    }
                }
            }
            let is_virtio = driver.starts_with("virtio") || driver.starts_with("vhost");
            if is_virtio {
                known.extend(VIRTIO_PROPERTIES);
                written = written.children(virtio_driver(&device));
            }
            let ioport = device.get("ioport").filter(|_| driver == "pvpanic");
            if let Some(iobase) = ioport.and_then(|port| port.parse::<u32>().ok()) {
                known.push("ioport");
                let address = Element::new("address").attribute("type", "isa");
                written = written.child(address.attribute("iobase", format!("{iobase:#x}")));
            }
            let written = written
                .children(alias(&device))
                .children(self.address(&device));
            found.push(written);
            self.tell(index, &device, &known);
        }
        found
    }

    /// Watchdogs, the one in the chipset of q35 too, and what they do.
    fn watchdogs(&mut self) -> Vec<Element> {
        let mut found = self.simple("watchdog", &WATCHDOGS);
        let noreboot = self.take_global(&["ICH9-LPC"], "noreboot");
        if noreboot.is_some_and(|value| matches!(value.as_str(), "off" | "false" | "0")) {
            found.push(Element::new("watchdog").attribute("model", "itco"));
        }
        if !found.is_empty()
            && let Some(action) = self.take("watchdog-action")
        {
            for watchdog in &mut found {
                watchdog.set("action", &action);
            }
        }
        found
    }

    /// A TPM that another program plays: QEMU is connected to it.
    fn tpms(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let model = match device.get("driver").as_deref() {
                Some(driver @ ("tpm-tis" | "tpm-crb")) => driver.to_owned(),
                _ => continue,
            };
            let id = device.get("tpmdev").unwrap_or_default();
            let mut backends = self.arguments.options("tpmdev");
            let backend = backends.find(|(_, it)| it.properties().get("id").as_ref() == Some(&id));
            let Some((backend_index, backend)) = backend else {
                continue;
            };
            let backend = backend.properties();
            if backend.get("type").as_deref() != Some("emulator") {
                continue;
            }
            let chardev = backend.get("chardev").unwrap_or_default();
            let mut chardevs = self.arguments.options("chardev");
            let is_it =
                |it: &crate::config::Argument| it.properties().get("id").as_ref() == Some(&chardev);
            if let Some((index, _)) = chardevs.find(|(_, it)| is_it(it)) {
                self.told.insert(index);
            }
            let version = Element::new("backend")
                .attribute("type", "emulator")
                .attribute("version", "2.0");
            let written = Element::new("tpm").attribute("model", model).child(version);
            found.push(written.children(alias(&device)));
            self.tell(index, &device, &["driver", "id", "tpmdev"]);
            self.tell(backend_index, &backend, &["type", "id", "chardev"]);
        }
        found
    }

    /// The codecs of sound cards, each with its card's id: argument, device, card.
    fn codecs(&self) -> Vec<(usize, Properties, String)> {
        let devices = self.all_devices().into_iter();
        let codecs = devices.filter_map(|(index, device)| {
            let driver = device.get("driver")?;
            let is_codec = matches!(driver.as_str(), "hda-duplex" | "hda-micro" | "hda-output");
            let card = device.get("bus")?.strip_suffix(".0")?.to_owned();
            is_codec.then_some((index, device, card))
        });
        codecs.collect()
    }

    /// Tells codecs by their cards; the usual one is what a card has without being told.
    fn tell_codecs(&mut self, codecs: Vec<(usize, Properties, String)>, cards: &mut [Element]) {
        for card in cards {
            let name = card.find("alias").and_then(|it| it.get("name"));
            let Some(id) = name.and_then(|name| name.strip_prefix("ua-")) else {
                continue;
            };
            let own = codecs.iter().filter(|(_, _, card)| card == id);
            let kinds = own.clone().filter_map(|(_, codec, _)| codec.get("driver"));
            let kinds: Vec<String> = kinds.collect();
            self.told.extend(own.map(|(index, _, _)| *index));
            if kinds == ["hda-duplex"] {
                continue;
            }
            for kind in kinds {
                let kind = kind.trim_start_matches("hda-").to_owned();
                card.push(Element::new("codec").attribute("type", kind));
            }
        }
    }

    fn audios(&mut self) -> Vec<Element> {
        let audiodevs: Vec<Device> = self
            .arguments
            .options("audiodev")
            .map(|(index, argument)| (index, argument.properties()))
            .collect();
        let mut found = Vec::new();
        for (index, audio) in audiodevs {
            let kind = match audio.get("driver").as_deref() {
                Some(kind @ ("none" | "spice")) => kind.to_owned(),
                _ => continue,
            };
            let Some(id) = audio.get("id").and_then(|id| audio_id(&id)) else {
                continue;
            };
            found.push(
                Element::new("audio")
                    .attribute("id", id)
                    .attribute("type", kind),
            );
            self.tell(index, &audio, &["driver", "id"]);
        }
        found
    }

    /// The place in the order of booting. libvirt counts from 1; QEMU from where it is told.
    pub(super) fn boot_order(&self, device: &Properties) -> Option<Element> {
        let index = |device: &Properties| device.get("bootindex")?.parse::<u32>().ok();
        let begins_at_0 = self
            .all_devices()
            .iter()
            .any(|(_, device)| index(device) == Some(0));
        let order = index(device)?.saturating_add(u32::from(begins_at_0));
        Some(Element::new("boot").attribute("order", order))
    }
}

/// A driver, the attributes of its element, and for properties the child (or the element itself) and its attribute.
type Row = (
    &'static str,
    &'static [(&'static str, &'static str)],
    &'static [(&'static str, &'static str, &'static str)],
);

const INPUTS: [Row; 6] = [
    ("usb-tablet", &[("type", "tablet"), ("bus", "usb")], &[]),
    ("usb-mouse", &[("type", "mouse"), ("bus", "usb")], &[]),
    ("usb-kbd", &[("type", "keyboard"), ("bus", "usb")], &[]),
    (
        "virtio-tablet-pci",
        &[("type", "tablet"), ("bus", "virtio")],
        &[],
    ),
    (
        "virtio-mouse-pci",
        &[("type", "mouse"), ("bus", "virtio")],
        &[],
    ),
    (
        "virtio-keyboard-pci",
        &[("type", "keyboard"), ("bus", "virtio")],
        &[],
    ),
];

const HUBS: [Row; 1] = [("usb-hub", &[("type", "usb")], &[])];

const BALLOONS: [Row; 2] = [
    (
        "virtio-balloon-pci",
        &[("model", "virtio")],
        &BALLOON_PROPERTIES,
    ),
    (
        "virtio-balloon",
        &[("model", "virtio")],
        &BALLOON_PROPERTIES,
    ),
];

const BALLOON_PROPERTIES: [(&str, &str, &str); 2] = [
    ("deflate-on-oom", "", "autodeflate"),
    ("free-page-reporting", "", "freePageReporting"),
];

/// `audiodev` is told by the card's `<audio>`.
const SOUNDS: [Row; 4] = [
    ("ich9-intel-hda", &[("model", "ich9")], &[]),
    ("intel-hda", &[("model", "ich6")], &[]),
    ("AC97", &[("model", "ac97")], &[]),
    ("ES1370", &[("model", "es1370")], &[]),
];

const WATCHDOGS: [Row; 2] = [
    ("i6300esb", &[("model", "i6300esb")], &[]),
    ("ib700", &[("model", "ib700")], &[]),
];

const PANICS: [Row; 2] = [
    ("pvpanic", &[("model", "isa")], &[]),
    ("pvpanic-pci", &[("model", "pvpanic")], &[]),
];

const VSOCKS: [Row; 1] = [(
    "vhost-vsock-pci",
    &[("model", "virtio")],
    &[("guest-cid", "cid", "address")],
)];

/// What `<driver>` says of every virtio device.
pub(super) const VIRTIO_PROPERTIES: [&str; 4] = ["iommu_platform", "ats", "packed", "page-per-vq"];

/// `<driver>` of a virtio device, if there is something to say.
pub(super) fn virtio_driver(device: &Properties) -> Option<Element> {
    let driver = virtio_attributes(Element::new("driver"), device);
    (!driver.attributes.is_empty()).then_some(driver)
}

pub(super) fn virtio_attributes(driver: Element, device: &Properties) -> Element {
    driver
        .attribute_if("iommu", device.get("iommu_platform"))
        .attribute_if("ats", device.get("ats"))
        .attribute_if("packed", device.get("packed"))
        .attribute_if("page_per_vq", device.get("page-per-vq"))
}

/// The number of the I/O thread of a device, if that is called as libvirt calls it.
pub(super) fn iothread(device: &Properties) -> Option<u32> {
    let id = device.get("iothread")?;
    id.strip_prefix("iothread")?.parse().ok()
}

/// `audio1` → 1.
fn audio_id(id: &str) -> Option<u32> {
    id.strip_prefix("audio")?.parse().ok()
}

/// libvirt's model of a virtio device.
pub(super) fn virtio_model(driver: &str) -> &'static str {
    match driver {
        driver if driver.ends_with("-non-transitional") => "virtio-non-transitional",
        driver if driver.ends_with("-transitional") => "virtio-transitional",
        _ => "virtio",
    }
}

const VGAS: [(&str, &str); 6] = [
    ("std", "vga"),
    ("cirrus", "cirrus"),
    ("vmware", "vmvga"),
    ("qxl", "qxl"),
    ("virtio", "virtio"),
    ("none", "none"),
];

const VIDEOS: [(&str, &str); 9] = [
    ("VGA", "vga"),
    ("cirrus-vga", "cirrus"),
    ("vmware-svga", "vmvga"),
    ("qxl-vga", "qxl"),
    ("virtio-vga", "virtio"),
    ("virtio-gpu-pci", "virtio"),
    ("bochs-display", "bochs"),
    ("ramfb", "ramfb"),
    ("qxl", "qxl"),
];

/// libvirt takes an id of somebody else's choice only with this prefix.
pub(super) fn alias(device: &Properties) -> Option<Element> {
    let id = device.get("id")?;
    let legal = id
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    legal.then(|| Element::new("alias").attribute("name", format!("ua-{id}")))
}
