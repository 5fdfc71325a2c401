//! Disks, CD-ROMs, floppies and flash: `-drive` and its short forms, `-blockdev` graphs, and what QMP says of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Backend, Resource, ResourceKind};
use crate::config::arguments::{Argument, Arguments};
use crate::config::properties::Properties;

/// What QMP says about block devices; read from the replies as they are, unknown members ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockFacts {
    /// The reply to `query-block`.
    pub devices: Vec<BlockDevice>,
    /// The reply to `query-named-block-nodes`.
    #[serde(default)]
    pub nodes: Vec<BlockNode>,
}

/// One element of the reply to `query-block`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDevice {
    /// The drive's id; empty if the device was made with `-blockdev`.
    #[serde(default)]
    pub device: String,
    /// The id or QOM path of the device that uses it.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether its medium can be changed.
    #[serde(default)]
    pub removable: bool,
    /// Its medium.
    #[serde(default)]
    pub inserted: Option<BlockNode>,
}

/// One element of the reply to `query-named-block-nodes`, or `inserted` in `query-block`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockNode {
    /// The node's name; QEMU makes one up (`#block123`) if none was given.
    #[serde(rename = "node-name", default)]
    pub node_name: String,
    /// The file name, or a `json:` description.
    #[serde(default)]
    pub file: String,
    /// The driver: `qcow2`, `raw`.
    #[serde(default)]
    pub drv: String,
    /// Whether it is read only.
    #[serde(default)]
    pub ro: bool,
    /// The image that this one builds on.
    #[serde(default)]
    pub backing_file: Option<String>,
    /// Every file below it, from the top; not QMP's own member, whoever read the replies adds it.
    #[serde(default)]
    pub chain: Vec<String>,
}

/// The drives of `-drive`, `-hda`, `-cdrom`, `-fda`, `-pflash`, `-sd`, `-mtdblock` and an image that stands alone.
pub(super) fn drives(arguments: &Arguments, machine_type: Option<&str>) -> Vec<Resource> {
    let machine = machine_type
        .map(str::to_owned)
        .or_else(|| machine_word(arguments));
    let is_q35 = machine.is_some_and(|name| name.contains("q35"));
    let mut numbering = Numbering::new(is_q35);
    let mut found = Vec::new();
    for (index, argument) in arguments.items.iter().enumerate() {
        if let Some(drive) = Drive::read(argument) {
            let id = numbering.id_of(&drive);
            found.push(drive.resource(id, index, arguments));
        }
    }
    found
}

fn machine_word(arguments: &Arguments) -> Option<String> {
    let mut machines = arguments.options("machine");
    machines.find_map(|(_, argument)| argument.properties().get("type"))
}

/// What `-drive` and its short forms say.
struct Drive {
    id: Option<String>,
    interface: String,
    is_cdrom: bool,
    index: Option<u32>,
    bus: Option<u32>,
    unit: Option<u32>,
    properties: Properties,
    path: Option<String>,
}

impl Drive {
    fn read(argument: &Argument) -> Option<Self> {
        let path = argument.value()?.to_owned();
        let short = |interface: &str, index: Option<u32>| {
            Some(Drive {
                id: None,
                interface: interface.to_owned(),
                is_cdrom: false,
                index,
                bus: None,
                unit: None,
                properties: Properties::parse("", None),
                path: Some(path.clone()),
            })
        };
        match argument.name() {
            None | Some("hda") => short("ide", Some(0)),
            Some("hdb") => short("ide", Some(1)),
            Some("hdc") => short("ide", Some(2)),
            Some("hdd") => short("ide", Some(3)),
            Some("cdrom") => short("ide", Some(2)).map(|drive| Drive {
                is_cdrom: true,
                ..drive
            }),
            Some("fda") => short("floppy", Some(0)),
            Some("fdb") => short("floppy", Some(1)),
            Some("pflash") => short("pflash", None),
            Some("sd") => short("sd", None),
            Some("mtdblock") => short("mtd", None),
            Some("drive") => Some(Self::from_properties(argument.properties())),
            Some(_) => None,
        }
    }

    fn from_properties(properties: Properties) -> Self {
        let number = |key: &str| properties.get(key).and_then(|text| text.parse().ok());
        Drive {
            id: properties.get("id"),
            interface: properties.get("if").unwrap_or_else(|| "ide".to_owned()),
            is_cdrom: properties.get("media").as_deref() == Some("cdrom"),
            index: number("index"),
            bus: number("bus"),
            unit: number("unit"),
            path: properties.get_any(&["file", "file.filename", "filename"]),
            properties,
        }
    }

    fn resource(self, id: String, index: usize, arguments: &Arguments) -> Resource {
        let device = device_using(arguments, &id);
        let kind = kind_of(&self.interface, self.is_cdrom, device.as_ref());
        let backend = Backend {
            format: self.properties.get("format"),
            ..backend_of(self.path)
        };
        let frontend = match &device {
            Some(device) => device.get("driver"),
            None if self.interface == "none" => None,
            None => Some(self.interface),
        };
        let read_only = self
            .properties
            .get_any(&["readonly", "read-only"])
            .is_some_and(|value| crate::config::properties::is_yes(&value));
        Resource {
            frontend,
            read_only: read_only || kind == ResourceKind::Cdrom,
            aliases: device
                .and_then(|device| device.get("id"))
                .into_iter()
                .collect(),
            ..Resource::new(kind, id, index, backend)
        }
    }
}

/// A path or, if it has a scheme of QEMU's, the protocol and all of it.
fn backend_of(path: Option<String>) -> Backend {
    let Some(path) = path.filter(|path| !path.is_empty()) else {
        return Backend::of_type("empty");
    };
    if let Some((protocol, _)) = path.split_once(':')
        && !protocol.is_empty()
        && protocol
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
    {
        let protocol = protocol.to_owned();
        return match path.strip_prefix("file:") {
            Some(plain) => Backend::file(plain),
            None => Backend {
                host: Some(path),
                ..Backend::of_type(protocol)
            },
        };
    }
    let kind = if path.starts_with("/dev/") {
        "host_device"
    } else {
        "file"
    };
    Backend {
        path: Some(path),
        ..Backend::of_type(kind)
    }
}

fn kind_of(interface: &str, is_cdrom: bool, device: Option<&Properties>) -> ResourceKind {
    let driver = device
        .and_then(|device| device.get("driver"))
        .unwrap_or_default();
    match interface {
        _ if is_cdrom || driver.ends_with("-cd") => ResourceKind::Cdrom,
        _ if driver == "floppy" => ResourceKind::Floppy,
        "floppy" => ResourceKind::Floppy,
        "pflash" => ResourceKind::Firmware,
        _ => ResourceKind::Disk,
    }
}

/// The first `-device` whose `drive` is `id`.
fn device_using(arguments: &Arguments, id: &str) -> Option<Properties> {
    let devices = arguments
        .options("device")
        .map(|(_, device)| device.properties());
    devices.into_iter().find(|device| {
        device
            .get_any(&["drive", "driveA", "driveB"])
            .is_some_and(|drive| drive == id)
    })
}

/// Gives drives the ids QEMU gives them: `ide0-hd0`, `virtio0`, `floppy0`.
struct Numbering {
    /// Units on one IDE bus: 2 on i440fx, 1 on q35.
    ide_units: u32,
    taken: BTreeMap<String, Vec<(u32, u32)>>,
}

impl Numbering {
    fn new(is_q35: bool) -> Self {
        Numbering {
            ide_units: if is_q35 { 1 } else { 2 },
            taken: BTreeMap::new(),
        }
    }

    fn id_of(&mut self, drive: &Drive) -> String {
        let units = match drive.interface.as_str() {
            "ide" => self.ide_units,
            "scsi" => 7,
            _ => 0,
        };
        let taken = self.taken.entry(drive.interface.clone()).or_default();
        let place = match (drive.index, drive.bus, drive.unit) {
            (Some(index), ..) if units > 0 => (index / units, index % units),
            (Some(index), ..) => (0, index),
            (None, bus, Some(unit)) => (bus.unwrap_or(0), unit),
            (None, bus, None) => first_free(taken, bus.unwrap_or(0), units),
        };
        taken.push(place);
        drive.id.clone().unwrap_or_else(|| {
            let medium = if drive.is_cdrom { "cd" } else { "hd" };
            match units {
                0 => format!("{}{}", drive.interface, place.1),
                _ => format!("{}{}-{medium}{}", drive.interface, place.0, place.1),
            }
        })
    }
}

/// The first place from `bus` on that is not taken; `units` = 0 means one bus without end.
fn first_free(taken: &[(u32, u32)], bus: u32, units: u32) -> (u32, u32) {
    let mut place = (bus, 0);
    while taken.contains(&place) {
        place.1 += 1;
        if units > 0 && place.1 >= units {
            place = (place.0 + 1, 0);
        }
    }
    place
}

/// The block nodes of `-blockdev` that something uses, or that nothing else builds on.
pub(super) fn nodes(arguments: &Arguments) -> Vec<Resource> {
    let graph = Graph::read(arguments);
    let mut found = Vec::new();
    for (name, (index, node)) in &graph.nodes {
        let user = device_using(arguments, name);
        let flash = flash_using(arguments, name);
        if user.is_none() && flash.is_none() && graph.is_built_upon(name) {
            continue;
        }
        let kind = match &flash {
            Some(_) => ResourceKind::Firmware,
            None => kind_of("none", false, user.as_ref()),
        };
        let (index, backend) = graph.backend(*index, node);
        let device_id = user.as_ref().and_then(|user| user.get("id"));
        let id = flash.clone().or(device_id).unwrap_or_else(|| name.clone());
        found.push(Resource {
            aliases: if id == *name {
                Vec::new()
            } else {
                vec![name.clone()]
            },
            frontend: flash.or_else(|| user.and_then(|user| user.get("driver"))),
            read_only: node.is_on("read-only") || kind == ResourceKind::Cdrom,
            ..Resource::new(kind, id, index, backend)
        });
    }
    found.sort_by_key(|resource| resource.argument);
    found
}

/// `pflash0` or `pflash1`, if the machine has the node as its flash.
fn flash_using(arguments: &Arguments, node: &str) -> Option<String> {
    let mut machines = arguments.options("machine");
    machines.find_map(|(_, machine)| {
        let machine = machine.properties();
        let flashes = ["pflash0", "pflash1"].into_iter();
        let mut flashes = flashes.filter(|key| machine.get(key).as_deref() == Some(node));
        flashes.next().map(str::to_owned)
    })
}

/// The `-blockdev` nodes by name.
struct Graph {
    nodes: BTreeMap<String, (usize, Properties)>,
}

impl Graph {
    fn read(arguments: &Arguments) -> Self {
        let nodes = arguments
            .options("blockdev")
            .filter_map(|(index, argument)| {
                let node = argument.properties();
                Some((node.get("node-name")?, (index, node)))
            });
        Graph {
            nodes: nodes.collect(),
        }
    }

    fn is_built_upon(&self, name: &str) -> bool {
        const CHILDREN: [&str; 4] = ["file", "backing", "data-file", "image"];
        self.nodes.values().any(|(_, node)| {
            let mut children = CHILDREN.iter().filter_map(|key| node.get(key));
            children.any(|child| child == name)
        })
    }

    /// The argument that names the file below `node`, and the file.
    fn backend(&self, index: usize, node: &Properties) -> (usize, Backend) {
        // What only watches or slows what goes through it says nothing of the format.
        const FILTERS: [&str; 3] = ["copy-on-read", "throttle", "blkdebug"];
        let is_filter = |node: &Properties| {
            let driver = node.get("driver").unwrap_or_default();
            FILTERS.contains(&driver.as_str())
        };
        let mut format = node.get("driver");
        let (mut index, mut node) = (index, node);
        // A chain is at most as long as there are nodes: a loop in the arguments ends too.
        for _ in 0..self.nodes.len() {
            match node.get("file").and_then(|child| self.nodes.get(&child)) {
                Some((below, child)) => {
                    if is_filter(node) {
                        format = child.get("driver");
                    }
                    (index, node) = (*below, child);
                }
                None => break,
            }
        }
        let path = node.get_any(&["filename", "file.filename", "device", "path"]);
        let driver = node.get_any(&["file.driver", "driver"]).unwrap_or_default();
        let backend = Backend {
            path,
            format,
            host: node.get_any(&["server.host", "file.server.host", "host"]),
            port: node.get_any(&["server.port", "file.server.port", "port"]),
            ..Backend::of_type(driver)
        };
        (index, backend)
    }
}

/// Puts what QEMU has open in place of what the arguments name; adds drives that only QMP knows.
pub(super) fn apply(resources: &mut Vec<Resource>, facts: &BlockFacts) {
    for device in &facts.devices {
        let node_name = device.inserted.as_ref().map(|node| node.node_name.as_str());
        let by_name = resources.iter().position(|resource| {
            let names = std::iter::once(&resource.id).chain(&resource.aliases);
            let mut names = names.map(String::as_str);
            is_block(resource.kind)
                && names.any(|name| {
                    name == device.device
                        || device.qdev.as_deref() == Some(name)
                        || node_name == Some(name)
                })
        });
        let known = by_name.or_else(|| below(resources, device.inserted.as_ref()?));
        let known = known.and_then(|index| resources.get_mut(index));
        match (known, &device.inserted) {
            (Some(resource), Some(node)) => insert(resource, node),
            (Some(resource), None) => eject(resource),
            (None, Some(node)) => resources.extend(unknown_drive(device, node)),
            (None, None) => {}
        }
    }
    name_backing_files(resources, &facts.nodes);
}

/// The resource whose file lies below this node: a device without an id whose disk went on in an overlay can be told by
/// nothing else.
fn below(resources: &[Resource], node: &BlockNode) -> Option<usize> {
    resources.iter().position(|resource| {
        let path = resource.backend.path.as_ref();
        is_block(resource.kind) && path.is_some_and(|path| node.chain.contains(path))
    })
}

fn is_block(kind: ResourceKind) -> bool {
    matches!(
        kind,
        ResourceKind::Disk | ResourceKind::Cdrom | ResourceKind::Floppy | ResourceKind::Firmware
    )
}

fn insert(resource: &mut Resource, node: &BlockNode) {
    resource.read_only = node.ro;
    resource.backend.backing_file.clone_from(&node.backing_file);
    if !node.drv.is_empty() {
        resource.backend.format = Some(node.drv.clone());
    }
    let now = backend_of(Some(node.file.clone()));
    let same = now.path == resource.backend.path && now.path.is_some();
    if now.kind == "json" || same {
        return; // a description of the graph as it was given
    }
    let before = resource.backend.path.take().unwrap_or_default();
    resource.backend.argument_path = Some(before);
    resource.backend.path = now.path;
    resource.backend.host = now.host;
    resource.backend.kind = now.kind;
}

fn eject(resource: &mut Resource) {
    if let Some(path) = resource.backend.path.take() {
        resource.backend = Backend {
            argument_path: Some(path),
            ..Backend::of_type("empty")
        };
    }
}

fn unknown_drive(device: &BlockDevice, node: &BlockNode) -> Option<Resource> {
    let names = [
        Some(&device.device),
        device.qdev.as_ref(),
        Some(&node.node_name),
    ];
    let id = names.into_iter().flatten().find(|name| !name.is_empty())?;
    let kind = match id {
        id if id.contains("-cd") => ResourceKind::Cdrom,
        id if id.starts_with("floppy") => ResourceKind::Floppy,
        _ => ResourceKind::Disk,
    };
    Some(Resource {
        kind,
        id: id.clone(),
        aliases: device
            .qdev
            .iter()
            .filter(|name| *name != id)
            .cloned()
            .collect(),
        frontend: None,
        backend: Backend {
            format: Some(node.drv.clone()).filter(|drv| !drv.is_empty()),
            backing_file: node.backing_file.clone(),
            argument_path: Some(String::new()),
            ..backend_of(Some(node.file.clone()))
        },
        read_only: node.ro,
        argument: None,
    })
}

/// Nodes that `query-block` does not show, such as flash, are found by their name.
fn name_backing_files(resources: &mut [Resource], nodes: &[BlockNode]) {
    for resource in resources {
        let node = nodes.iter().find(|node| {
            node.node_name == resource.id || resource.aliases.contains(&node.node_name)
        });
        if let Some(node) = node
            && resource.backend.backing_file.is_none()
        {
            resource.backend.backing_file.clone_from(&node.backing_file);
        }
    }
}
