//! `<disk>`.

use std::collections::BTreeMap;

use super::devices::{Device, VIRTIO_PROPERTIES, alias, iothread, virtio_attributes};
use super::{Story, network_disks};
use crate::config::resources::{Resource, ResourceKind};
use crate::config::xml::Element;

impl Story<'_> {
    /// Tells the arguments below a drive: `-drive` with its short forms, or `-blockdev` with what it builds on.
    pub(super) fn tell_block(&mut self, resource: &Resource) {
        const DRIVE: [&str; 14] = [
            "file",
            "file.filename",
            "if",
            "media",
            "index",
            "bus",
            "unit",
            "format",
            "id",
            "readonly",
            "read-only",
            "filename",
            "driver",
            "node-name",
        ];
        let Some(index) = resource.argument else {
            return;
        };
        let Some(argument) = self.arguments.items.get(index) else {
            return;
        };
        match argument.name() {
            Some("drive") => self.tell(index, &argument.properties(), &DRIVE),
            Some("blockdev") => {
                let mut names = vec![resource.id.clone()];
                names.extend(resource.aliases.clone());
                for key in ["pflash0", "pflash1"] {
                    names.extend(self.machine_property(key).filter(|_| resource.id == key));
                }
                self.tell_nodes(index, names);
            }
            _ => {
                self.told.insert(index);
            }
        }
    }

    fn tell_nodes(&mut self, protocol: usize, names: Vec<String>) {
        const NODE: [&str; 12] = [
            "driver",
            "node-name",
            "file",
            "filename",
            "read-only",
            "file.driver",
            "cache.direct",
            "cache.no-flush",
            "aio",
            "discard",
            "detect-zeroes",
            "auto-read-only",
        ];
        let nodes: Vec<Device> = self
            .arguments
            .options("blockdev")
            .map(|(index, node)| (index, node.properties()))
            .collect();
        let mut names = names;
        // Each round goes one node down; a loop in the arguments ends with the rounds.
        for _ in 0..nodes.len() {
            for (index, node) in &nodes {
                let is_it = node
                    .get("node-name")
                    .is_some_and(|name| names.contains(&name));
                if (is_it || *index == protocol) && !self.told.contains(index) {
                    let leaves = node.leaves();
                    let mut known = [&NODE[..], &["file.filename"]].concat();
                    if network_disks::source(node).is_some() {
                        known.extend(network_disks::PROPERTIES);
                        let servers = leaves.iter().map(|(key, _)| key.as_str());
                        known.extend(servers.filter(|key| network_disks::is_of_server(key)));
                    }
                    self.tell(*index, node, &known);
                    names.extend(node.get("file"));
                }
            }
        }
    }

    pub(super) fn disks(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut letters: BTreeMap<&'static str, u32> = BTreeMap::new();
        let mut found = Vec::new();
        for resource in &resources.resources {
            let device = match resource.kind {
                ResourceKind::Disk => "disk",
                ResourceKind::Cdrom => "cdrom",
                ResourceKind::Floppy => "floppy",
                _ => continue,
            };
            let Some((bus, prefix)) = self.disk_bus(resource) else {
                continue;
            };
            let Some(source) = disk_source(resource).or_else(|| self.network_source(resource))
            else {
                continue;
            };
            let letter = letters.entry(prefix).or_default();
            let target = format!("{prefix}{}", in_letters(*letter));
            *letter += 1;
            self.tell_block(resource);
            let user = self.disk_device(resource);
            let told = Told {
                driver: self.disk_driver(resource, user.as_ref()),
                boot: user.as_ref().and_then(|(_, user)| self.boot_order(user)),
                address: user.as_ref().and_then(|(_, user)| self.address(user)),
            };
            found.push(disk(
                resource,
                device,
                source,
                (&target, bus),
                user.as_ref(),
                told,
            ));
            if let Some((index, device)) = user {
                let known = [&DISK_PROPERTIES[..], &VIRTIO_PROPERTIES].concat();
                self.tell(index, &device, &known);
                let identity = device.get("device_id").unwrap_or_default();
                let serial = device.get("serial");
                // What the guest reads if nobody says otherwise.
                if serial.is_none_or(|serial| serial == identity) || identity.starts_with("drive-")
                {
                    self.forgive(index, &[&format!("device_id={identity}")]);
                }
            }
        }
        found.extend(self.empty_drives(&mut letters));
        found
    }

    /// Drives that have never had a medium: no argument but their own tells of them.
    fn empty_drives(&mut self, letters: &mut BTreeMap<&'static str, u32>) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let (kind, bus, prefix) = match device.get("driver").as_deref() {
                Some("ide-cd") if self.is_q35() => ("cdrom", "sata", "sd"),
                Some("ide-cd") => ("cdrom", "ide", "hd"),
                Some("scsi-cd") => ("cdrom", "scsi", "sd"),
                Some("floppy") => ("floppy", "fdc", "fd"),
                _ => continue,
            };
            if device.get("drive").is_some() || self.told.contains(&index) {
                continue;
            }
            let letter = letters.entry(prefix).or_default();
            let name = format!("{prefix}{}", in_letters(*letter));
            *letter += 1;
            let target = Element::new("target")
                .attribute("dev", name)
                .attribute("bus", bus);
            found.push(
                Element::new("disk")
                    .attribute("type", "file")
                    .attribute("device", kind)
                    .child(target)
                    .children((kind == "cdrom").then(|| Element::new("readonly")))
                    .children(self.boot_order(&device))
                    .children(alias(&device))
                    .children(self.address(&device)),
            );
            self.tell(index, &device, &DISK_PROPERTIES);
            let identity = device.get("device_id").unwrap_or_default();
            if identity.starts_with("drive-") {
                self.forgive(index, &[&format!("device_id={identity}")]);
            }
        }
        found
    }

    /// The source of a disk that lies on another host.
    fn network_source(&self, resource: &Resource) -> Option<(&'static str, Option<Element>)> {
        let argument = self.arguments.items.get(resource.argument?)?;
        let node = argument.properties();
        let source = network_disks::source(&node).filter(|_| argument.name() == Some("blockdev"));
        Some(("network", Some(source?)))
    }

    fn disk_device(&self, resource: &Resource) -> Option<Device> {
        let names = std::iter::once(&resource.id).chain(&resource.aliases);
        let mut found = names.filter_map(|name| {
            self.device_with("drive", name)
                .or_else(|| self.device_with("id", name))
        });
        found.next()
    }

    /// `<driver>`: the format, and how the host treats the file; nodes say that once for the format, once for the file.
    fn disk_driver(&self, resource: &Resource, user: Option<&Device>) -> Element {
        let format = resource.backend.format.as_deref();
        let format = match format {
            Some("file" | "host_device" | "host_cdrom") => Some("raw"),
            // A node that reads from another host has no format of its own.
            Some("nbd" | "http" | "https" | "ftp" | "ftps" | "iscsi" | "rbd" | "nfs" | "ssh") => {
                Some("raw")
            }
            other => other,
        };
        let file = resource
            .argument
            .and_then(|index| self.arguments.items.get(index));
        let file = file.filter(|it| it.name() == Some("blockdev"));
        let file = file.map(|it| it.properties());
        let of_file = |key: &str| file.as_ref().and_then(|file| file.get(key));
        let device = user.map(|(_, device)| device);
        let of_device = |key: &str| device.and_then(|device| device.get(key));
        let is = |value: Option<String>| value.as_deref() == Some("on");
        let has_cache = of_file("cache.direct").is_some() || of_device("write-cache").is_some();
        let has_write_cache = of_device("write-cache").as_deref() != Some("off");
        let cache = match (is(of_file("cache.direct")), is(of_file("cache.no-flush"))) {
            _ if !has_cache => None,
            (_, true) => Some("unsafe"),
            (true, false) if has_write_cache => Some("none"),
            (true, false) => Some("directsync"),
            (false, false) if has_write_cache => Some("writeback"),
            (false, false) => Some("writethrough"),
        };
        let iothread = device.and_then(iothread);
        let has_format = format.is_some();
        let driver = Element::new("driver")
            .attribute_if("name", has_format.then_some("qemu"))
            .attribute_if("type", format)
            .attribute_if("cache", cache)
            .attribute_if("error_policy", of_device("werror"))
            .attribute_if("rerror_policy", of_device("rerror"))
            .attribute_if("io", of_file("aio"))
            .attribute_if("iothread", iothread)
            .attribute_if("queues", of_device("num-queues"))
            .attribute_if("queue_size", of_device("queue-size"))
            .attribute_if("ioeventfd", of_device("ioeventfd"))
            .attribute_if("event_idx", of_device("event_idx"))
            .attribute_if("detect_zeroes", of_file("detect-zeroes"));
        match device {
            Some(device) => virtio_attributes(driver, device),
            None => driver,
        }
    }

    /// libvirt's bus and the beginning of the target's name; `None` for what libvirt has no disk for.
    fn disk_bus(&self, resource: &Resource) -> Option<(&'static str, &'static str)> {
        let ide = if self.is_q35() {
            ("sata", "sd")
        } else {
            ("ide", "hd")
        };
        Some(match resource.frontend.as_deref()? {
            "ide" | "ide-hd" | "ide-cd" | "ide-drive" => ide,
            "virtio" | "virtio-blk-pci" | "virtio-blk" => ("virtio", "vd"),
            "scsi-hd" | "scsi-cd" => ("scsi", "sd"),
            "usb-storage" => ("usb", "sd"),
            "floppy" => ("fdc", "fd"),
            _ => return None,
        })
    }
}

/// 0 is `a`, 25 `z`, 26 `aa`.
fn in_letters(number: u32) -> String {
    let letter = |number: u32| (b'a'..=b'z').nth((number % 26) as usize).map(char::from);
    let before = (number / 26).checked_sub(1).map(in_letters);
    let mut letters = before.unwrap_or_default();
    letters.extend(letter(number));
    letters
}

const DISK_PROPERTIES: [&str; 29] = [
    "werror",
    "rerror",
    "share-rw",
    "wwn",
    "driver",
    "id",
    "drive",
    "bus",
    "addr",
    "bootindex",
    "serial",
    "unit",
    "channel",
    "scsi-id",
    "lun",
    "port",
    "removable",
    "write-cache",
    "num-queues",
    "queue-size",
    "ioeventfd",
    "event_idx",
    "iothread",
    "logical_block_size",
    "physical_block_size",
    "discard_granularity",
    "rotation_rate",
    "vendor",
    "product",
];

/// What is told of a disk's device.
struct Told {
    driver: Element,
    boot: Option<Element>,
    address: Option<Element>,
}

/// `type` of the disk and its source; `None` for what is neither a file nor a device here.
fn disk_source(resource: &Resource) -> Option<(&'static str, Option<Element>)> {
    let path = resource.backend.path.as_ref();
    Some(match (resource.backend.kind.as_str(), path) {
        ("empty", _) => ("file", None),
        ("file", Some(path)) => ("file", Some(Element::new("source").attribute("file", path))),
        ("host_device" | "host_cdrom", Some(path)) => {
            ("block", Some(Element::new("source").attribute("dev", path)))
        }
        _ => return None,
    })
}

fn disk(
    resource: &Resource,
    device: &str,
    (kind, source): (&str, Option<Element>),
    (target, bus): (&str, &str),
    user: Option<&Device>,
    told: Told,
) -> Element {
    let user = user.map(|(_, device)| device);
    let get = |key: &str| user.and_then(|device| device.get(key));
    let removable = get("removable").filter(|_| bus == "usb");
    let target = Element::new("target")
        .attribute("dev", target)
        .attribute("bus", bus)
        .attribute_if("removable", removable)
        .attribute_if("rotation_rate", get("rotation_rate"));
    let block = Element::new("blockio")
        .attribute_if("logical_block_size", get("logical_block_size"))
        .attribute_if("physical_block_size", get("physical_block_size"))
        .attribute_if("discard_granularity", get("discard_granularity"));
    let wwn = get("wwn").and_then(|wwn| match wwn.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => wwn.parse().ok(),
    });
    let text = |name: &'static str| get(name).map(|text| Element::with_text(name, text));
    Element::new("disk")
        .attribute("type", kind)
        .attribute("device", device)
        .children((!told.driver.attributes.is_empty()).then_some(told.driver))
        .children(source)
        .children((!block.attributes.is_empty()).then_some(block))
        .child(target)
        .children((resource.read_only || device == "cdrom").then(|| Element::new("readonly")))
        .children((get("share-rw").as_deref() == Some("on")).then(|| Element::new("shareable")))
        .children(text("serial"))
        .children(wwn.map(|wwn| Element::with_text("wwn", format!("{wwn:016x}"))))
        .children(text("vendor"))
        .children(text("product"))
        .children(told.boot)
        .children(user.and_then(alias))
        .children(told.address)
}
