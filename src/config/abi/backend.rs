//! Other backends in the XML → remaps of the kept arguments, which a restore goes by.

use super::normal::Plain;
use super::rules::Class;
use super::{Comparison, Pair};
use crate::config::error::Reason;
use crate::config::remap::{Remap, Target};
use crate::config::resources::{Resource, ResourceKind, ResourceTable};
use crate::config::xml::Document;

/// What of a changed XML a restore has to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Carried {
    /// Other backends for the guest's resources.
    pub remaps: Vec<Remap>,
    /// The guest's other name.
    pub name: Option<String>,
    /// The other QEMU that shall run it.
    pub emulator: Option<String>,
}

/// What of the changes in [`Class::Backend`] and of the name a restore has to know. `table` holds the resources of the
/// arguments that it goes by.
///
/// # Errors
/// [`Reason::NotCarried`] for every change for which no remap can be said.
pub fn carry_over(comparison: &Comparison, table: &ResourceTable) -> Result<Carried, Vec<Reason>> {
    let names = comparison.of(Class::Note);
    let mut names = names.filter(|change| change.path == "domain/name");
    let mut carried = Carried {
        name: names.next().and_then(|change| change.new.clone()),
        ..Carried::default()
    };
    let mut reasons = Vec::new();
    for pair in &comparison.pairs {
        let changes = comparison.changes.get(pair.changes.clone());
        let mut backends = changes.unwrap_or_default().iter();
        let is_host_name = |path: &str| path.contains("/target") && !pair.is_ethernet();
        let is_one =
            backends.any(|change| change.class == Class::Backend && !is_host_name(&change.path));
        if !is_one {
            continue;
        }
        if let ("emulator", Some(new)) = (pair.name(), &pair.new) {
            carried.emulator = Some(new.text.clone());
            continue;
        }
        match pair.remap(table, &comparison.old_devices) {
            Ok(remap) => carried.remaps.push(remap),
            Err(why) => reasons.push(Reason::NotCarried {
                path: pair.path.clone(),
                line: pair.line(),
                why,
            }),
        }
    }
    match reasons.is_empty() {
        true => Ok(carried),
        false => Err(reasons),
    }
}

/// By which names the XML knows the disks of the arguments: kind, `vda`, id.
pub fn names_of_disks(
    xml: &Document,
    table: &ResourceTable,
) -> Vec<(ResourceKind, String, String)> {
    let devices = Plain::of(&xml.root).below("devices");
    let disks = devices.iter().filter(|device| device.name == "disk");
    let named = disks.filter_map(|disk| {
        let name = disk.child("target")?.get("dev")?;
        let resource = resource_of(disk, table, &devices)?;
        Some((resource.kind, name.to_owned(), resource.id.clone()))
    });
    named.collect()
}

impl Pair {
    fn either(&self) -> Option<&Plain> {
        self.new.as_ref().or(self.old.as_ref())
    }

    fn name(&self) -> &str {
        self.either().map_or("", |element| element.name.as_str())
    }

    fn line(&self) -> u32 {
        self.either().map_or(0, |element| element.line)
    }

    fn is_ethernet(&self) -> bool {
        let both = [&self.old, &self.new].into_iter().flatten();
        both.into_iter()
            .any(|element| element.get("type") == Some("ethernet"))
    }

    fn remap(&self, table: &ResourceTable, devices: &[Plain]) -> Result<Remap, &'static str> {
        let old = self
            .old
            .as_ref()
            .ok_or("the guest was saved without it, and a restore cannot add it")?;
        let resource = resource_of(old, table, devices)
            .ok_or("it cannot be told which of QEMU's arguments stands for it")?;
        let no_remap = "a restore has no way to do this";
        let target = match &self.new {
            None if old.name == "graphics" => Target::Null,
            None => return Err(no_remap),
            Some(new) => target_of(new, old).ok_or(no_remap)?,
        };
        if Some(&target) == target_of(old, old).as_ref() {
            return Err(no_remap);
        }
        Ok(Remap::of(resource, target))
    }
}

/// The backend that an element has; `old` tells what the format was, if that is to be said at all.
fn target_of(element: &Plain, old: &Plain) -> Option<Target> {
    let path = |path: &str| Target::Path {
        path: path.to_owned(),
        format: None,
    };
    match element.name.as_str() {
        "disk" => disk_target(element, old),
        "interface" => network_target(element),
        "serial" | "parallel" | "console" | "channel" => character_target(element),
        "graphics" => display_target(element),
        "filesystem" => Some(path(element.child("source")?.get("dir")?)),
        "loader" | "nvram" | "kernel" | "initrd" | "dtb" if !element.text.is_empty() => {
            Some(path(&element.text))
        }
        _ => None,
    }
}

fn disk_target(disk: &Plain, old: &Plain) -> Option<Target> {
    let format = |disk: &Plain| {
        let format = disk.child("driver").and_then(|driver| driver.get("type"));
        format.unwrap_or("raw").to_owned()
    };
    let source = disk.child("source");
    let path = match disk.get("type") {
        Some("file") => source.and_then(|source| source.get("file")),
        Some("block") => source.and_then(|source| source.get("dev")),
        _ => return None,
    };
    match path {
        Some(path) => Some(Target::Path {
            path: path.to_owned(),
            format: Some(format(disk)).filter(|now| *now != format(old)),
        }),
        // A drive for media can be empty, a disk cannot.
        None => matches!(disk.get("device"), Some("cdrom" | "floppy")).then_some(Target::Eject),
    }
}

fn network_target(interface: &Plain) -> Option<Target> {
    let of = |child: &str, key: &str| interface.child(child).and_then(|child| child.get(key));
    match interface.get("type")? {
        // Which ports lead into the guest is said nowhere else.
        "user" if interface.child("portForward").is_some() => None,
        "user" if of("backend", "type") == Some("passt") => Some(Target::Passt(String::new())),
        "user" => Some(Target::UserNetwork(String::new())),
        "bridge" => Some(Target::Bridge(of("source", "bridge")?.to_owned())),
        "ethernet" => Some(Target::Tap(of("target", "dev")?.to_owned())),
        _ => None,
    }
}

fn character_target(port: &Plain) -> Option<Target> {
    let source = port.child("source");
    let path = source.and_then(|source| source.get("path"));
    match port.get("type")? {
        "pty" => Some(Target::Pty),
        "null" => Some(Target::Null),
        "file" => Some(Target::File(path?.to_owned())),
        "unix" if source?.get("mode") != Some("connect") => Some(Target::Unix(path?.to_owned())),
        _ => None,
    }
}

fn display_target(graphics: &Plain) -> Option<Target> {
    let listen = graphics.child("listen");
    let socket = listen.and_then(|listen| listen.get("socket"));
    if let Some(socket) = socket.or_else(|| graphics.get("socket")) {
        return Some(Target::Unix(socket.to_owned()));
    }
    let address = listen.and_then(|listen| listen.get("address"));
    let address = address.or_else(|| graphics.get("listen"));
    let port = graphics.get("port")?.parse().ok()?;
    Some(Target::Listen(
        address.unwrap_or("127.0.0.1").to_owned(),
        port,
    ))
}

/// The resource for which an element stands: by its alias, its name, what is behind it, or its number.
fn resource_of<'a>(
    element: &Plain,
    table: &'a ResourceTable,
    devices: &[Plain],
) -> Option<&'a Resource> {
    let kind = kind_of(element)?;
    let mut names = names_in(element).into_iter();
    if let Some(found) = names.find_map(|name| table.find(kind, &name)) {
        return Some(found);
    }
    let alike: Vec<&Plain> = devices
        .iter()
        .filter(|device| device.name == element.name && kind_of(device) == Some(kind))
        .collect();
    let number = alike.iter().position(|device| device.line == element.line);
    let all: Vec<&Resource> = table.of(kind).collect();
    let mut same = all.iter().filter(|one| is_behind(element, one));
    match (same.next(), same.next()) {
        (Some(found), None) => Some(found),
        _ if alike.len() == all.len() => all.get(number?).copied(),
        _ => None,
    }
}

fn kind_of(element: &Plain) -> Option<ResourceKind> {
    Some(match element.name.as_str() {
        "disk" => match element.get("device") {
            Some("cdrom") => ResourceKind::Cdrom,
            Some("floppy") => ResourceKind::Floppy,
            _ => ResourceKind::Disk,
        },
        "interface" => ResourceKind::Nic,
        "serial" | "parallel" | "console" | "channel" => ResourceKind::Chardev,
        "graphics" => ResourceKind::Display,
        "filesystem" => ResourceKind::Share,
        "loader" | "nvram" => ResourceKind::Firmware,
        "kernel" | "initrd" | "dtb" => ResourceKind::Kernel,
        _ => return None,
    })
}

/// The names by which the arguments may know an element.
fn names_in(element: &Plain) -> Vec<String> {
    let mut names = Vec::new();
    let alias = element.child("alias").and_then(|alias| alias.get("name"));
    if let Some(alias) = alias {
        let own = alias.strip_prefix("ua-").unwrap_or(alias);
        for prefix in ["", "host", "char", "drive-", "fsdev-"] {
            names.extend([format!("{prefix}{alias}"), format!("{prefix}{own}")]);
        }
    }
    let port = element
        .child("target")
        .and_then(|target| target.get("port"));
    match (element.name.as_str(), port) {
        ("loader", _) if element.get("type") == Some("rom") => names.push("bios".to_owned()),
        ("loader", _) => names.push("pflash0".to_owned()),
        ("nvram", _) => names.push("pflash1".to_owned()),
        ("kernel" | "initrd" | "dtb", _) => names.push(element.name.clone()),
        (name @ ("serial" | "parallel"), Some(port)) => names.push(format!("{name}{port}")),
        _ => {}
    }
    names
}

/// Whether the element has the resource's backend.
fn is_behind(element: &Plain, resource: &Resource) -> bool {
    let backend = &resource.backend;
    match target_of(element, element) {
        Some(Target::Path { path, .. } | Target::File(path) | Target::Unix(path)) => {
            backend.path.as_deref() == Some(path.as_str())
        }
        Some(Target::Bridge(name) | Target::Tap(name)) => {
            backend.interface.as_deref() == Some(name.as_str())
        }
        _ => false,
    }
}
