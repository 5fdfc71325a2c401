//! What becomes of the argument behind a resource.

use super::network::set_network;
use super::{Remap, Selector, Target};
use crate::config::arguments::{Argument, Arguments};
use crate::config::overlay;
use crate::config::properties::{Properties, escape};
use crate::config::resources::{OWN_LOG_PREFIX, OWN_PREFIX, Resource, ResourceKind};

impl Remap {
    /// Changes the argument of `resource`; `None` if the target does not fit it.
    pub(super) fn change(&self, arguments: &mut Arguments, resource: &Resource) -> Option<()> {
        let index = resource.argument?;
        match &self.target {
            Target::Path { path, format } => {
                let path = self.path_of(path, resource)?;
                let index = path_argument(arguments, resource, index);
                set_path(arguments.items.get_mut(index)?, &path, format.as_deref())?;
                set_format(arguments, resource, format.as_deref());
                Some(())
            }
            Target::Overlay(path) => overlay::put(arguments, resource, path),
            Target::Eject => eject(arguments, index, resource),
            Target::UserNetwork(_) | Target::Tap(_) | Target::Bridge(_) | Target::Passt(_) => {
                set_network(arguments, index, resource, &self.target)
            }
            target if resource.kind == ResourceKind::Display => {
                set_display(arguments, index, target)
            }
            target => set_chardev(arguments, index, target),
        }
    }

    /// The path that the resource gets: with a prefix the rest of its own stays.
    fn path_of(&self, path: &str, resource: &Resource) -> Option<String> {
        let Selector::Prefix(prefix) = &self.selector else {
            return Some(path.to_owned());
        };
        let own = resource.backend.path.as_deref()?;
        let rest = own.strip_prefix(prefix.as_str())?;
        Some(format!("{path}{rest}"))
    }
}

/// The argument that names the path: a TPM emulator's is its character device's.
fn path_argument(arguments: &Arguments, resource: &Resource, index: usize) -> usize {
    let chardev = resource
        .backend
        .host
        .as_deref()
        .filter(|_| resource.kind == ResourceKind::Tpm);
    let found = chardev.and_then(|id| {
        let mut chardevs = arguments.options("chardev");
        chardevs.find(|(_, chardev)| chardev.properties().get("id").as_deref() == Some(id))
    });
    found.map_or(index, |(index, _)| index)
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
        Target::Pty | Target::Null => target.to_string(),
        _ => return None,
    };
    let mux = mux.map(|mux| format!(",mux={mux}")).unwrap_or_default();
    argument.set_value(format!("{backend},id={}{mux}", escape(&id)));
    if let Some(name) = id.strip_prefix(OWN_LOG_PREFIX) {
        rename_chardev(arguments, &id, &format!("{OWN_PREFIX}{name}"));
    }
    Some(())
}

/// Lets a display be looked at elsewhere, or nowhere; how it looks stays.
fn set_display(arguments: &mut Arguments, index: usize, target: &Target) -> Option<()> {
    let argument = arguments.items.get_mut(index)?;
    if *target == Target::Null {
        arguments.items.remove(index);
        return Some(());
    }
    if argument.name() == Some("spice") {
        argument.edit(|spice| {
            for key in ["port", "tls-port", "unix", "addr", "ipv4", "ipv6"] {
                spice.remove(key);
            }
        });
        let (address, more) = match target {
            Target::Unix(path) => (path, ("unix", "on".to_owned())),
            Target::Listen(host, port) => (host, ("port", port.to_string())),
            _ => return None,
        };
        argument.edit(|spice| {
            spice.set("addr", address);
            spice.set(more.0, &more.1);
        });
        return Some(());
    }
    // A VNC display is a port counted from 5900.
    let address = match target {
        Target::Unix(path) => format!("unix:{path}"),
        Target::Listen(host, port) => format!("{host}:{}", port.checked_sub(5900)?),
        _ => return None,
    };
    argument.edit(|vnc| {
        for key in ["to", "websocket", "reverse", "ipv4", "ipv6"] {
            vnc.remove(key);
        }
        vnc.set("vnc", &address);
    });
    Some(())
}

/// Gives a character device another id, everywhere it is named.
pub(in crate::config) fn rename_chardev(arguments: &mut Arguments, from: &str, to: &str) {
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
