//! Other host resources for a guest: `disk:vda=/srv/x.qcow2`, `cdrom:*=eject`, `net:net0=user`.
//!
//! A remap changes what stands behind a device, never what the guest sees of it. Where QEMU keeps state of a backend in
//! the stream, or a device's features follow from its backend, a [`Warning`] says so.

use std::fmt;
use std::str::FromStr;

use super::arguments::{Argument, Arguments};
use super::error::{ConfigError, Reason};
use super::overlay;
use super::properties::{Properties, escape};
use super::resources::{OWN_LOG_PREFIX, OWN_PREFIX, Resource, ResourceKind, ResourceTable};

/// One `KIND:ID=TARGET`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remap {
    /// The kind of resource; `net` in the text is [`ResourceKind::Nic`].
    pub kind: ResourceKind,
    /// Which of that kind.
    pub selector: Selector,
    /// What becomes of them.
    pub target: Target,
}

/// Which resources of a kind a remap means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// The one with this id or alias.
    Id(String),
    /// All whose path begins so; the rest of the path is kept.
    Prefix(String),
    /// All.
    All,
}

/// What a remapped resource becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Another file or device; with [`Selector::Prefix`] the new beginning of its path.
    Path {
        /// The path.
        path: String,
        /// The image format, where it changes.
        format: Option<String>,
    },
    /// A throwaway overlay over its file; made by a restore, no text names it.
    Overlay(String),
    /// A drive without medium.
    Eject,
    /// QEMU's user network, with further properties of `-netdev user` behind a comma.
    UserNetwork(String),
    /// An existing tap interface.
    Tap(String),
    /// A bridge, through QEMU's bridge helper.
    Bridge(String),
    /// A character device that appends to a file.
    File(String),
    /// A pseudo terminal.
    Pty,
    /// A socket that QEMU makes.
    Unix(String),
    /// Nothing: output is thrown away.
    Null,
}

/// Something a user should know about a remap that works nonetheless, or may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// The stream holds a `slirp` section, which only a user network can load.
    #[error("nic {id:?}: the saved state of its user network fits no other backend")]
    SlirpState {
        /// The resource.
        id: String,
    },
    /// A virtio NIC offers checksum and segmentation offloads only on a tap.
    #[error("nic {id:?}: a virtio NIC that used a tap's offloads does not load on a user network")]
    NicOffloads {
        /// The resource.
        id: String,
    },
}

impl Warning {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Warning::SlirpState { .. } => "remap.slirp-state",
            Warning::NicOffloads { .. } => "remap.nic-offloads",
        }
    }
}

/// Arguments with remaps applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remapped {
    /// The arguments.
    pub arguments: Arguments,
    /// What a user should know.
    pub warnings: Vec<Warning>,
}

/// Applies remaps in their order; of two for the same resource the last counts.
///
/// # Errors
/// [`ConfigError::Refused`] with a reason for every remap that fits nothing.
pub fn apply(
    arguments: &Arguments,
    machine_type: Option<&str>,
    remaps: &[Remap],
) -> Result<Remapped, ConfigError> {
    let original = ResourceTable::from_arguments(arguments, machine_type);
    let mut arguments = arguments.clone();
    let (mut warnings, mut reasons) = (Vec::new(), Vec::new());
    for remap in remaps {
        let chosen = match remap.chosen(&original) {
            Ok(chosen) => chosen,
            Err(reason) => {
                reasons.push(reason);
                continue;
            }
        };
        for resource in chosen {
            warnings.extend(remap.warning(resource));
            let now = ResourceTable::from_arguments(&arguments, machine_type);
            let changed = now
                .find(resource.kind, &resource.id)
                .and_then(|resource| remap.target.apply(&mut arguments, resource, remap));
            if changed.is_none() {
                reasons.push(remap.impossible(resource, &arguments));
            }
        }
    }
    if reasons.is_empty() {
        return Ok(Remapped {
            arguments,
            warnings,
        });
    }
    Err(ConfigError::Refused { reasons })
}

/// The remaps that make kept arguments name the files QEMU had open at the save.
///
/// Drives that only QMP knew of have no argument and are left out; [`ResourceTable`] shows them.
pub fn block_graph_remaps(table: &ResourceTable) -> Vec<Remap> {
    let moved = table
        .resources
        .iter()
        .filter(|resource| resource.argument.is_some() && resource.backend.argument_path.is_some());
    let remaps = moved.map(|resource| Remap {
        kind: resource.kind,
        selector: Selector::Id(resource.id.clone()),
        target: match &resource.backend.path {
            Some(path) => Target::Path {
                path: path.clone(),
                format: resource.backend.format.clone(),
            },
            None => Target::Eject,
        },
    });
    remaps.collect()
}

impl Remap {
    /// Whether it means all resources of this kind.
    pub fn selects_all(&self, kind: ResourceKind) -> bool {
        self.kind == kind && self.selector == Selector::All
    }

    /// Whether this resource is one of those it means.
    pub fn selects(&self, resource: &Resource) -> bool {
        let path = resource.backend.path.as_deref().unwrap_or_default();
        self.kind == resource.kind
            && match &self.selector {
                Selector::All => true,
                Selector::Id(id) => resource.id == *id || resource.aliases.contains(id),
                Selector::Prefix(prefix) => path.starts_with(prefix),
            }
    }

    fn chosen<'a>(&self, table: &'a ResourceTable) -> Result<Vec<&'a Resource>, Reason> {
        let chosen: Vec<&Resource> = match &self.selector {
            Selector::All => return Ok(table.of(self.kind).collect()),
            Selector::Id(id) => table.find(self.kind, id).into_iter().collect(),
            Selector::Prefix(prefix) => {
                let has_prefix = |path: &String| path.starts_with(prefix);
                let all = table.of(self.kind);
                all.filter(|r| r.backend.path.as_ref().is_some_and(has_prefix))
                    .collect()
            }
        };
        if chosen.is_empty() {
            return Err(self.unknown(table));
        }
        Ok(chosen)
    }

    fn unknown(&self, table: &ResourceTable) -> Reason {
        let all = table.of(self.kind);
        let (id, known) = match &self.selector {
            Selector::Prefix(prefix) => {
                let paths = all.filter_map(|resource| resource.backend.path.clone());
                (prefix.clone(), paths.collect())
            }
            Selector::Id(id) => (id.clone(), all.map(|r| r.id.clone()).collect()),
            Selector::All => ("*".to_owned(), Vec::new()),
        };
        Reason::UnknownResource {
            kind: self.kind.word(),
            id,
            known,
        }
    }

    fn impossible(&self, resource: &Resource, arguments: &Arguments) -> Reason {
        let argument = resource
            .argument
            .and_then(|index| arguments.items.get(index));
        Reason::NotRemappable {
            kind: self.kind.word(),
            id: resource.id.clone(),
            target: self.target.to_string(),
            argument: argument.map(Argument::shown).unwrap_or_default(),
        }
    }

    fn warning(&self, resource: &Resource) -> Option<Warning> {
        let id = resource.id.clone();
        let is_user = resource.backend.kind == "user";
        match &self.target {
            Target::UserNetwork(_)
                if !is_user && resource.frontend.as_deref().is_some_and(is_virtio) =>
            {
                Some(Warning::NicOffloads { id })
            }
            Target::Tap(_) | Target::Bridge(_) if is_user => Some(Warning::SlirpState { id }),
            _ => None,
        }
    }
}

fn is_virtio(driver: &str) -> bool {
    driver.starts_with("virtio")
}

impl Remap {
    /// Whether the remap brings in `name`: a path, a network interface, or a property of a user network.
    pub fn names(&self, name: &str) -> bool {
        match (&self.target, &self.selector) {
            (Target::Path { path, .. }, Selector::Prefix(_)) => {
                name.starts_with(path.as_str()) && !name.split('/').any(|part| part == "..")
            }
            (Target::Path { path: given, .. }, _) => given == name,
            (Target::File(given) | Target::Unix(given), _) => given == name,
            (Target::Tap(given) | Target::Bridge(given), _) => given == name,
            (Target::UserNetwork(more), _) => more
                .split(',')
                .filter_map(|property| property.split_once('='))
                .any(|(_, value)| value == name),
            _ => false,
        }
    }
}

impl Target {
    /// Changes the argument of `resource`; `None` if this target does not fit it.
    fn apply(&self, arguments: &mut Arguments, resource: &Resource, remap: &Remap) -> Option<()> {
        let index = resource.argument?;
        match self {
            Target::Path { path, format } => {
                let path = match &remap.selector {
                    Selector::Prefix(prefix) => {
                        let rest = resource
                            .backend
                            .path
                            .as_deref()?
                            .strip_prefix(prefix.as_str())?;
                        format!("{path}{rest}")
                    }
                    Selector::Id(_) | Selector::All => path.clone(),
                };
                set_path(arguments.items.get_mut(index)?, &path, format.as_deref())?;
                set_format(arguments, resource, format.as_deref());
                Some(())
            }
            Target::Overlay(path) => overlay::put(arguments, resource, path),
            Target::Eject => eject(arguments, index, resource),
            Target::UserNetwork(_) | Target::Tap(_) | Target::Bridge(_) => {
                set_network(arguments.items.get_mut(index)?, self)
            }
            Target::File(_) | Target::Pty | Target::Unix(_) | Target::Null => {
                set_chardev(arguments, index, self)
            }
        }
    }
}

/// Puts `path` where the argument names its file.
fn set_path(argument: &mut Argument, path: &str, format: Option<&str>) -> Option<()> {
    match argument.name() {
        None => argument.set_value(path),
        Some("drive") => argument.edit(|drive| {
            let key = present(drive, &["file", "file.filename", "filename"]).unwrap_or("file");
            drive.set(key, path);
            if let Some(format) = format {
                let key = present(drive, &["format", "driver"]).unwrap_or("format");
                drive.set(key, format);
            }
        }),
        Some("blockdev") => {
            let node = argument.properties();
            let key = present(&node, &["filename", "file.filename"])?;
            argument.edit(|node| {
                node.set(key, path);
                set_protocol(node, key, path);
            });
        }
        Some("chardev" | "fsdev" | "virtfs" | "tpmdev") => {
            argument.properties().get("path")?;
            argument.edit(|properties| properties.set("path", path));
        }
        Some(
            "hda" | "hdb" | "hdc" | "hdd" | "cdrom" | "fda" | "fdb" | "pflash" | "sd" | "mtdblock"
            | "bios" | "option-rom" | "kernel" | "initrd" | "dtb" | "shim",
        ) => argument.set_value(path),
        Some(_) => return None,
    }
    Some(())
}

/// A block device is opened with `host_device`, a file with `file`.
fn set_protocol(node: &mut Properties, path_key: &str, path: &str) {
    let key = match path_key {
        "filename" => "driver",
        _ => "file.driver",
    };
    let fitting = if path.starts_with("/dev/") {
        "host_device"
    } else {
        "file"
    };
    if node.get(key).is_some_and(|driver| {
        driver != fitting && matches!(driver.as_str(), "file" | "host_device")
    }) {
        node.set(key, fitting);
    }
}

/// Gives the format node above a `-blockdev` file another driver.
fn set_format(arguments: &mut Arguments, resource: &Resource, format: Option<&str>) {
    let Some(format) = format else { return };
    for argument in &mut arguments.items {
        let node = argument.properties();
        let name = node.get("node-name").unwrap_or_default();
        let is_it = argument.name() == Some("blockdev")
            && (name == resource.id || resource.aliases.contains(&name));
        let is_format = node.get("file").is_some() || node.get("file.filename").is_some();
        if is_it && is_format {
            argument.edit(|node| node.set("driver", format));
        }
    }
}

fn present(properties: &Properties, keys: &[&'static str]) -> Option<&'static str> {
    keys.iter()
        .copied()
        .find(|key| properties.get(key).is_some())
}

/// Leaves the drive in its place and takes its medium out.
fn eject(arguments: &mut Arguments, index: usize, resource: &Resource) -> Option<()> {
    let argument = arguments.items.get_mut(index)?;
    match argument.name() {
        Some("cdrom") => *argument = Argument::with_value("drive", "if=ide,index=2,media=cdrom"),
        Some("fda") => *argument = Argument::with_value("drive", "if=floppy,index=0"),
        Some("fdb") => *argument = Argument::with_value("drive", "if=floppy,index=1"),
        Some("drive") => argument.edit(|drive| {
            for key in [
                "file",
                "file.filename",
                "file.driver",
                "filename",
                "format",
                "driver",
            ] {
                drive.remove(key);
            }
        }),
        Some("blockdev") => eject_node(arguments, index, resource),
        _ => return None,
    }
    Some(())
}

fn eject_node(arguments: &mut Arguments, index: usize, resource: &Resource) {
    let below = arguments
        .items
        .get(index)
        .and_then(|node| node.properties().get("node-name"));
    let is_gone = |name: &String| {
        *name == resource.id || resource.aliases.contains(name) || below.as_ref() == Some(name)
    };
    for device in &mut arguments.items {
        if device.name() == Some("device")
            && device
                .properties()
                .get("drive")
                .as_ref()
                .is_some_and(is_gone)
        {
            device.edit(|device| device.remove("drive"));
        }
    }
    arguments.items.retain(|item| {
        let is_node = item.name() == Some("blockdev");
        !(is_node
            && item
                .properties()
                .get("node-name")
                .as_ref()
                .is_some_and(is_gone))
    });
}

/// Replaces the backend and keeps the id and all that describes the NIC.
fn set_network(argument: &mut Argument, target: &Target) -> Option<()> {
    const NIC_KEYS: [&str; 8] = [
        "id", "model", "mac", "macaddr", "name", "addr", "vectors", "netdev",
    ];
    const TAP_KEYS: [&str; 2] = ["vhost", "queues"];
    let before = argument.properties();
    let option = argument.name()?.to_owned();
    let mut value = target.to_string();
    match target {
        Target::Tap(name) => value = format!("tap,ifname={},script=no,downscript=no", escape(name)),
        Target::Bridge(name) => value = format!("bridge,br={}", escape(name)),
        _ => {}
    }
    let keeps_tap =
        matches!(target, Target::Tap(_)) && before.get("type").as_deref() == Some("tap");
    for (key, kept) in before.leaves() {
        let is_nic = NIC_KEYS.contains(&key.as_str()) && (option != "netdev" || key == "id");
        if is_nic || (keeps_tap && TAP_KEYS.contains(&key.as_str())) {
            value.push_str(&format!(",{key}={}", escape(&kept)));
        }
    }
    *argument = Argument::with_value(&option, value);
    Some(())
}

/// Replaces the backend and keeps the id; a log file of ours becomes the user's own choice.
fn set_chardev(arguments: &mut Arguments, index: usize, target: &Target) -> Option<()> {
    let argument = arguments.items.get_mut(index)?;
    let option = argument.name()?.to_owned();
    if option != "chardev" {
        argument.set_value(target.to_string());
        return Some(());
    }
    let id = argument.properties().get("id")?;
    let mux = argument.properties().get("mux");
    let backend = match target {
        Target::File(path) => format!("file,path={}", escape(path)),
        Target::Unix(path) => format!("socket,path={},server=on,wait=off", escape(path)),
        _ => target.to_string(),
    };
    let mux = mux.map(|mux| format!(",mux={mux}")).unwrap_or_default();
    argument.set_value(format!("{backend},id={}{mux}", escape(&id)));
    if let Some(name) = id.strip_prefix(OWN_LOG_PREFIX) {
        rename_chardev(arguments, &id, &format!("{OWN_PREFIX}{name}"));
    }
    Some(())
}

/// Gives a character device another id, everywhere it is named.
pub(super) fn rename_chardev(arguments: &mut Arguments, from: &str, to: &str) {
    let short = format!("chardev:{from}");
    for argument in &mut arguments.items {
        match argument.name() {
            Some("chardev") if argument.properties().get("id").as_deref() == Some(from) => {
                argument.edit(|chardev| chardev.set("id", to));
            }
            Some("serial" | "parallel" | "debugcon" | "gdb")
                if argument.value() == Some(&short) =>
            {
                argument.set_value(format!("chardev:{to}"));
            }
            Some("device" | "netdev" | "tpmdev" | "object" | "mon") => argument.edit(|user| {
                for key in ["chardev", "primary_in", "secondary_in", "outdev", "indev"] {
                    if user.get(key).as_deref() == Some(from) {
                        user.set(key, to);
                    }
                }
            }),
            _ => {}
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Path { path, .. } | Target::Overlay(path) => f.write_str(path),
            Target::Eject => f.write_str("eject"),
            Target::UserNetwork(rest) if rest.is_empty() => f.write_str("user"),
            Target::UserNetwork(rest) => write!(f, "user,{rest}"),
            Target::Tap(name) => write!(f, "tap={name}"),
            Target::Bridge(name) => write!(f, "bridge={name}"),
            Target::File(path) => write!(f, "file:{path}"),
            Target::Pty => f.write_str("pty"),
            Target::Unix(path) => write!(f, "unix:{path},server=on,wait=off"),
            Target::Null => f.write_str("null"),
        }
    }
}

impl FromStr for Remap {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |expected| ConfigError::RemapSyntax {
            text: text.to_owned(),
            expected,
        };
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| wrong("KIND:ID=TARGET"))?;
        let (id, target) = rest
            .split_once('=')
            .ok_or_else(|| wrong("KIND:ID=TARGET"))?;
        let (kind, parse, expected) = Self::grammar(kind).ok_or_else(|| {
            wrong(
                "one of the kinds disk, cdrom, floppy, net, chardev, share, firmware, kernel, tpm",
            )
        })?;
        let selector = match id {
            "" => return Err(wrong("KIND:ID=TARGET")),
            "*" => Selector::All,
            _ if id.starts_with('/') => Selector::Prefix(id.to_owned()),
            _ => Selector::Id(id.to_owned()),
        };
        let target = parse(target).ok_or_else(|| wrong(expected))?;
        Ok(Remap {
            kind,
            selector,
            target,
        })
    }
}

type Grammar = (ResourceKind, fn(&str) -> Option<Target>, &'static str);

impl Remap {
    /// A kind's word → the kind, the reader of its targets, their form.
    fn grammar(word: &str) -> Option<Grammar> {
        const MEDIUM: &str = "KIND:ID=PATH or KIND:ID=eject";
        const PATH: &str = "KIND:ID=PATH";
        Some(match word {
            "disk" => (ResourceKind::Disk, path_target, PATH),
            "cdrom" => (ResourceKind::Cdrom, medium_target, MEDIUM),
            "floppy" => (ResourceKind::Floppy, medium_target, MEDIUM),
            "net" | "nic" => (
                ResourceKind::Nic,
                network_target,
                "net:ID=user, net:ID=tap=NAME or net:ID=bridge=NAME",
            ),
            "chardev" => (
                ResourceKind::Chardev,
                chardev_target,
                "chardev:ID=file:PATH, chardev:ID=unix:PATH, chardev:ID=pty or chardev:ID=null",
            ),
            "share" => (ResourceKind::Share, path_target, PATH),
            "firmware" => (ResourceKind::Firmware, path_target, PATH),
            "kernel" => (ResourceKind::Kernel, path_target, PATH),
            "tpm" => (ResourceKind::Tpm, path_target, PATH),
            _ => return None,
        })
    }
}

fn path_target(text: &str) -> Option<Target> {
    (!text.is_empty()).then(|| Target::Path {
        path: text.to_owned(),
        format: None,
    })
}

fn medium_target(text: &str) -> Option<Target> {
    match text {
        "eject" => Some(Target::Eject),
        _ => path_target(text),
    }
}

fn network_target(text: &str) -> Option<Target> {
    let named = |prefix: &str| text.strip_prefix(prefix).filter(|name| !name.is_empty());
    if text == "user" {
        return Some(Target::UserNetwork(String::new()));
    }
    if let Some(rest) = named("user,") {
        return Some(Target::UserNetwork(rest.to_owned()));
    }
    if let Some(name) = named("tap=") {
        return Some(Target::Tap(name.to_owned()));
    }
    named("bridge=").map(|name| Target::Bridge(name.to_owned()))
}

fn chardev_target(text: &str) -> Option<Target> {
    let path = |prefix: &str| text.strip_prefix(prefix).filter(|path| !path.is_empty());
    match text {
        "pty" => return Some(Target::Pty),
        "null" => return Some(Target::Null),
        _ => {}
    }
    if let Some(path) = path("file:") {
        return Some(Target::File(path.to_owned()));
    }
    path("unix:").map(|path| Target::Unix(path.to_owned()))
}

#[cfg(test)]
mod tests;
