//! `<disk>`.

use std::collections::BTreeMap;

use super::Story;
use super::devices::{Device, alias, boot_order};
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
        const NODE: [&str; 6] = [
            "driver",
            "node-name",
            "file",
            "filename",
            "read-only",
            "file.driver",
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
                    self.tell(*index, node, &[&NODE[..], &["file.filename"]].concat());
                    names.extend(node.get("file"));
                }
            }
        }
    }

    pub(super) fn disks(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut letters: BTreeMap<&'static str, u8> = BTreeMap::new();
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
            let Some(source) = disk_source(resource) else {
                continue;
            };
            let letter = letters.entry(prefix).or_default();
            let target = format!("{prefix}{}", char::from(b'a' + (*letter).min(25)));
            *letter += 1;
            self.tell_block(resource);
            let user = self.disk_device(resource);
            let address = user.as_ref().and_then(|(_, user)| self.address(user));
            found.push(disk(
                resource,
                device,
                source,
                (&target, bus),
                user.as_ref(),
                address,
            ));
            if let Some((index, device)) = user {
                self.tell(index, &device, &DISK_PROPERTIES);
            }
        }
        found
    }

    fn disk_device(&self, resource: &Resource) -> Option<Device> {
        let names = std::iter::once(&resource.id).chain(&resource.aliases);
        let mut found = names.filter_map(|name| {
            self.device_with("drive", name)
                .or_else(|| self.device_with("id", name))
        });
        found.next()
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

const DISK_PROPERTIES: [&str; 8] = [
    "driver",
    "id",
    "drive",
    "bus",
    "addr",
    "bootindex",
    "serial",
    "unit",
];

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
    address: Option<Element>,
) -> Element {
    let format = resource.backend.format.as_deref();
    let format = match format {
        Some("file" | "host_device" | "host_cdrom") => Some("raw"),
        other => other,
    };
    let driver = format.map(|format| {
        Element::new("driver")
            .attribute("name", "qemu")
            .attribute("type", format)
    });
    let user = user.map(|(_, device)| device);
    let serial = user.and_then(|device| device.get("serial"));
    let written = Element::new("disk")
        .attribute("type", kind)
        .attribute("device", device)
        .children(driver)
        .children(source)
        .child(
            Element::new("target")
                .attribute("dev", target)
                .attribute("bus", bus),
        );
    written
        .children((resource.read_only || device == "cdrom").then(|| Element::new("readonly")))
        .children(serial.map(|serial| Element::with_text("serial", serial)))
        .children(user.and_then(boot_order))
        .children(user.and_then(alias))
        .children(address)
}
