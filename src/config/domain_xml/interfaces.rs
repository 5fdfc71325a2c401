//! `<interface>`.

use super::Story;
use super::devices::{VIRTIO_PROPERTIES, alias, virtio_attributes};
use crate::config::properties::Properties;
use crate::config::resources::ResourceKind;
use crate::config::xml::Element;

impl Story<'_> {
    pub(super) fn interfaces(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut found = Vec::new();
        for resource in resources.of(ResourceKind::Nic) {
            let Some(index) = resource.argument else {
                continue;
            };
            let Some(argument) = self.arguments.items.get(index) else {
                continue;
            };
            let (kind, source) = match resource.backend.kind.as_str() {
                "user" => ("user", None),
                "bridge" => (
                    "bridge",
                    Some(
                        Element::new("source")
                            .attribute_if("bridge", resource.backend.interface.as_ref()),
                    ),
                ),
                "tap" => ("ethernet", None),
                "stream" => ("user", None),
                _ => continue,
            };
            let net = argument.properties();
            let is_passt = resource.backend.kind == "stream";
            // A stream to something else could be anything.
            let path = net.get("addr.path").unwrap_or_default();
            if is_passt && !path.ends_with(".passt") {
                continue;
            }
            let device = match argument.name() {
                Some("netdev") => match self.device_with("netdev", &resource.id) {
                    Some(device) => Some(device),
                    None => continue,
                },
                _ => None,
            };
            let frontend = device.as_ref().map_or(&net, |(_, device)| device);
            let model = frontend
                .get_any(&["driver", "model"])
                .map(|model| nic_model(&model).to_owned());
            let target = resource
                .backend
                .interface
                .as_ref()
                .filter(|_| kind == "ethernet");
            let mac = frontend.get_any(&["mac", "macaddr"]);
            let written = Element::new("interface")
                .attribute("type", kind)
                .children(mac.map(|mac| Element::new("mac").attribute("address", mac)))
                .children(source)
                .children(is_passt.then(|| Element::new("backend").attribute("type", "passt")))
                .children(target.map(|name| {
                    Element::new("target")
                        .attribute("dev", name)
                        .attribute("managed", "no")
                }))
                .children(model.map(|model| Element::new("model").attribute("type", model)))
                .children(nic_driver(frontend, &net))
                .children(
                    frontend
                        .get("host_mtu")
                        .map(|size| Element::new("mtu").attribute("size", size)),
                )
                .children(self.boot_order(frontend))
                .children(rom(frontend).or_else(|| rom_file(frontend)))
                .children(
                    frontend
                        .get("acpi-index")
                        .map(|index| Element::new("acpi").attribute("index", index)),
                )
                .children(alias(frontend).filter(|_| device.is_some()))
                .children(self.address(frontend).filter(|_| device.is_some()));
            found.push(written);
            self.tell(
                index,
                &net,
                &[
                    "type",
                    "id",
                    "br",
                    "ifname",
                    "model",
                    "mac",
                    "macaddr",
                    "vhost",
                    "queues",
                    "server",
                    "addr.type",
                    "addr.path",
                ],
            );
            // No script is what an interface without one has.
            self.forgive(index, &["script=no", "downscript=no"]);
            if let Some((index, device)) = device {
                let known = [&NIC_PROPERTIES[..], &VIRTIO_PROPERTIES].concat();
                self.tell(index, &device, &known);
            }
        }
        found
    }
}

const NIC_PROPERTIES: [&str; 33] = [
    "tx",
    "rombar",
    "romfile",
    "acpi-index",
    "csum",
    "gso",
    "host_tso4",
    "host_tso6",
    "host_ecn",
    "host_ufo",
    "mrg_rxbuf",
    "guest_csum",
    "guest_gso",
    "guest_tso4",
    "guest_tso6",
    "guest_ecn",
    "guest_ufo",
    "driver",
    "id",
    "netdev",
    "mac",
    "bus",
    "addr",
    "bootindex",
    "host_mtu",
    "mq",
    "vectors",
    "rx_queue_size",
    "tx_queue_size",
    "ioeventfd",
    "event_idx",
    "rss",
    "hash",
];

fn nic_driver(frontend: &Properties, net: &Properties) -> Option<Element> {
    let tx_mode = frontend.get("tx").map(|tx| match tx.as_str() {
        "timer" => "timer",
        _ => "iothread",
    });
    let is_vhost = net.is_on("vhost").then_some("vhost");
    let driver = Element::new("driver")
        .attribute_if("name", is_vhost)
        .attribute_if("txmode", tx_mode)
        .attribute_if("ioeventfd", frontend.get("ioeventfd"))
        .attribute_if("event_idx", frontend.get("event_idx"))
        .attribute_if("queues", nic_queues(frontend, net))
        .attribute_if("rx_queue_size", frontend.get("rx_queue_size"))
        .attribute_if("tx_queue_size", frontend.get("tx_queue_size"))
        .attribute_if("rss", frontend.get("rss"))
        .attribute_if("rss_hash_report", frontend.get("hash"));
    let driver = virtio_attributes(driver, frontend).children(offloads(frontend));
    let is_empty = driver.attributes.is_empty() && driver.elements().next().is_none();
    (!is_empty).then_some(driver)
}

/// The option ROM of a device, if something was said of it.
fn rom(device: &Properties) -> Option<Element> {
    let bar = device.get("rombar")?;
    let bar = matches!(bar.as_str(), "1" | "on" | "true");
    let rom = Element::new("rom").attribute("bar", if bar { "on" } else { "off" });
    Some(rom.attribute_if(
        "file",
        device.get("romfile").filter(|file| !file.is_empty()),
    ))
}

/// As [`rom`], for a device that is to have none, or another file.
fn rom_file(device: &Properties) -> Option<Element> {
    let file = device.get("romfile")?;
    let rom = Element::new("rom");
    Some(match file.is_empty() {
        true => rom.attribute("enabled", "no"),
        false => rom.attribute("file", file),
    })
}

/// What of its offloads a NIC was told: libvirt's name, QEMU's on the host's side.
const OFFLOADS: [(&str, &str); 7] = [
    ("csum", "csum"),
    ("gso", "gso"),
    ("tso4", "host_tso4"),
    ("tso6", "host_tso6"),
    ("ecn", "host_ecn"),
    ("ufo", "host_ufo"),
    ("mrg_rxbuf", "mrg_rxbuf"),
];

fn offloads(device: &Properties) -> Vec<Element> {
    let mut host = Element::new("host");
    let mut guest = Element::new("guest");
    for (name, of_host) in OFFLOADS {
        if let Some(value) = device.get(of_host) {
            host.set(name, value);
        }
        if let Some(value) = device.get(&format!("guest_{name}")) {
            guest.set(name, value);
        }
    }
    let told = [host, guest].into_iter();
    told.filter(|it| !it.attributes.is_empty()).collect()
}

/// As many queues as a NIC has: those of its network, or as its interrupts tell.
fn nic_queues(frontend: &Properties, net: &Properties) -> Option<u32> {
    let number = |text: Option<String>| text?.parse::<u32>().ok();
    number(net.get("queues")).or_else(|| {
        let vectors = number(frontend.get("vectors")).filter(|_| frontend.is_on("mq"))?;
        // Two for each, one for control, one for the configuration.
        Some(vectors.checked_sub(2)? / 2).filter(|queues| *queues > 1)
    })
}

fn nic_model(driver: &str) -> &str {
    match driver {
        "virtio-net-pci" | "virtio-net" => "virtio",
        "virtio-net-pci-transitional" => "virtio-transitional",
        "virtio-net-pci-non-transitional" => "virtio-non-transitional",
        other => other,
    }
}
