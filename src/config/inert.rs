//! Arguments of a QEMU that has the guest's devices and touches nothing of the host: for looking at, not for running.
//!
//! What such a QEMU would have (devices, RAMBlocks, processors) is what a restore with the same arguments would have. Only
//! what stands behind it is replaced, so that it can be asked while another QEMU runs the guest, and where files and networks
//! are missing:
//!
//! | | becomes |
//! |---|---|
//! | a disk, a medium, a flash | `null-co` of the same size: no file is opened |
//! | a network | a cut-off user network |
//! | a character device, a serial port | `null` |
//! | VNC | nothing; SPICE a socket in the given directory, if a device needs it |
//! | memory in files, of huge pages, locked, filled beforehand | anonymous memory |
//! | a shared directory | the root directory, only to be read |
//! | sound | none |
//! | a TPM | neither device nor emulator |
//! | debuggers, traces, logs, dumps of packets | nothing |
//!
//! Devices that are nothing without their backend (vhost-user, vfio, host USB, …) cannot be had so, and are named.
//!
//! Source: QEMU's manual; seen with 7.2 and 10.0.

use super::arguments::{Argument, Arguments};
use super::properties::escape;
use super::remap::{self, Remap, Target};
use super::resources::{Resource, ResourceKind, ResourceTable};
use super::restore_arguments::{KEEPER_CHARDEV, QMP_CHARDEV};

/// Options without which the guest is the same.
const DROPPED: [&str; 22] = [
    "incoming",
    "gdb",
    "s",
    "D",
    "d",
    "trace",
    "plugin",
    "vnc",
    "mem-prealloc",
    "mem-path",
    "overcommit",
    "realtime",
    "runas",
    "chroot",
    "run-with",
    "pidfile",
    "daemonize",
    "qmp",
    "mon",
    "monitor",
    "tpmdev",
    "kernel",
];

/// Options that mean something with a kernel only.
const OF_KERNEL: [&str; 4] = ["initrd", "append", "dtb", "shim"];

/// Drivers of devices that need what stands behind them; names begin with these.
const BOUND_DEVICES: [&str; 13] = [
    "vhost-user",
    "vhost-vdpa",
    "vhost-vsock",
    "vhost-scsi",
    "vfio-",
    "usb-host",
    "usb-redir",
    "ivshmem",
    "scsi-block",
    "scsi-generic",
    "virtio-pmem",
    "nvdimm",
    "xen-",
];

/// Objects that only reach out to the host.
const DROPPED_OBJECTS: [&str; 6] = [
    "filter-",
    "colo-",
    "input-",
    "tls-creds",
    "can-host",
    "qtest",
];

/// What an inert QEMU is told about a file.
pub type LengthOf<'a> = &'a dyn Fn(&Resource) -> Option<u64>;

/// Makes arguments of a restore inert. `length_of` tells the bytes of a disk's file; `directory` is for what cannot be
/// without a socket.
///
/// # Errors
/// Every device that is nothing without its backend, as it stands in the arguments.
pub fn inert(
    arguments: &Arguments,
    machine_type: &str,
    directory: &str,
    length_of: LengthOf<'_>,
) -> Result<Arguments, Vec<String>> {
    let bound = arguments.items.iter().filter(|item| is_bound(item));
    let bound: Vec<String> = bound.map(Argument::shown).collect();
    if !bound.is_empty() {
        return Err(bound);
    }
    let mut arguments = arguments.clone();
    disconnect(&mut arguments, machine_type)?;
    blank_disks(&mut arguments, machine_type, length_of);
    arguments.items.retain(is_needed);
    for item in &mut arguments.items {
        quieten(item, directory);
    }
    Ok(arguments)
}

fn is_bound(argument: &Argument) -> bool {
    let driver = argument.properties().get("driver").unwrap_or_default();
    argument.name() == Some("device") && BOUND_DEVICES.iter().any(|bound| driver.starts_with(bound))
}

fn is_needed(argument: &Argument) -> bool {
    let Some(name) = argument.name() else {
        return true;
    };
    let properties = argument.properties();
    match name {
        "device" => properties.get("tpmdev").is_none(),
        "object" => {
            let kind = properties.get("qom-type").unwrap_or_default();
            !DROPPED_OBJECTS
                .iter()
                .any(|dropped| kind.starts_with(dropped))
        }
        name => !DROPPED.contains(&name) && !OF_KERNEL.contains(&name),
    }
}

/// Networks and character devices lead nowhere.
fn disconnect(arguments: &mut Arguments, machine_type: &str) -> Result<(), Vec<String>> {
    let table = ResourceTable::from_arguments(arguments, Some(machine_type));
    let mut remaps = Vec::new();
    for resource in &table.resources {
        let target = match resource.kind {
            ResourceKind::Nic if resource.backend.kind == "hubport" => continue,
            ResourceKind::Nic => Target::UserNetwork("restrict=on".to_owned()),
            ResourceKind::Chardev => Target::Null,
            _ => continue,
        };
        remaps.push(Remap::of(resource, target));
    }
    match remap::apply(arguments, Some(machine_type), &remaps) {
        Ok(remapped) => *arguments = remapped.arguments,
        Err(error) => return Err(vec![error.to_string()]),
    }
    let is_ours = |item: &Argument| {
        let id = item.properties().get("id").unwrap_or_default();
        item.name() == Some("chardev") && (id == QMP_CHARDEV || id == KEEPER_CHARDEV)
    };
    arguments.items.retain(|item| !is_ours(item));
    // Those that no device uses are no resources.
    for item in &mut arguments.items {
        if item.name() == Some("chardev") {
            let chardev = item.properties();
            let id = escape(&chardev.get("id").unwrap_or_default());
            let mux = chardev.get("mux").map(|mux| format!(",mux={mux}"));
            if chardev.get("backend").as_deref() != Some("null") {
                item.set_value(format!("null,id={id}{}", mux.unwrap_or_default()));
            }
        }
    }
    Ok(())
}

/// Puts nothing of the same size in the place of each file.
fn blank_disks(arguments: &mut Arguments, machine_type: &str, length_of: LengthOf<'_>) {
    let table = ResourceTable::from_arguments(arguments, Some(machine_type));
    let of_disks = [
        ResourceKind::Disk,
        ResourceKind::Cdrom,
        ResourceKind::Floppy,
        ResourceKind::Firmware,
    ];
    let resources = table
        .resources
        .iter()
        .filter(|one| of_disks.contains(&one.kind));
    for resource in resources {
        let Some(index) = resource.argument else {
            continue;
        };
        let Some(item) = arguments.items.get(index) else {
            continue;
        };
        let len = length_of(resource).unwrap_or(match resource.kind {
            ResourceKind::Floppy => 1_474_560,
            _ => 1 << 30,
        });
        let is_firmware_file = matches!(item.name(), Some("bios" | "option-rom" | "L"));
        let blank = match item.name() {
            _ if is_firmware_file || resource.backend.kind == "empty" => continue,
            Some("blockdev") => continue,
            Some("drive") => blank_drive(item, len),
            _ => blank_short(item, len),
        };
        if let Some(item) = arguments.items.get_mut(index) {
            *item = blank;
        }
    }
    blank_nodes(arguments, &table, length_of);
}

/// `-drive` without a file; how it is attached stays.
fn blank_drive(argument: &Argument, len: u64) -> Argument {
    const KEPT: [&str; 10] = [
        "id",
        "if",
        "bus",
        "unit",
        "index",
        "media",
        "readonly",
        "read-only",
        "werror",
        "rerror",
    ];
    let mut value = nothing(len);
    for (key, text) in argument.properties().leaves() {
        if KEPT.contains(&key.as_str()) {
            value.push_str(&format!(",{key}={}", escape(&text)));
        }
    }
    Argument::with_value("drive", value)
}

/// A short form, or an image that stands alone.
fn blank_short(argument: &Argument, len: u64) -> Argument {
    let place = match argument.name() {
        None | Some("hda") => "if=ide,index=0,media=disk",
        Some("hdb") => "if=ide,index=1,media=disk",
        Some("hdc") => "if=ide,index=2,media=disk",
        Some("hdd") => "if=ide,index=3,media=disk",
        Some("cdrom") => "if=ide,index=2,media=cdrom",
        Some("fda") => "if=floppy,index=0",
        Some("fdb") => "if=floppy,index=1",
        Some("pflash") => "if=pflash",
        Some("sd") => "if=sd",
        Some("mtdblock") => "if=mtd",
        Some(_) => return argument.clone(),
    };
    Argument::with_value("drive", format!("{},{place}", nothing(len)))
}

fn nothing(len: u64) -> String {
    format!("driver=null-co,size={len},read-zeroes=on")
}

/// Every block node is nothing by itself, whatever stood below it.
fn blank_nodes(arguments: &mut Arguments, table: &ResourceTable, length_of: LengthOf<'_>) {
    let lengths: Vec<(Option<String>, Option<u64>)> = arguments
        .options("blockdev")
        .map(|(index, node)| {
            let node = node.properties();
            let name = node.get("node-name");
            let of_index = table
                .resources
                .iter()
                .find(|one| one.argument == Some(index));
            let is_named = |one: &&Resource| {
                name.as_ref()
                    .is_some_and(|name| one.id == *name || one.aliases.contains(name))
            };
            let resource = of_index.or_else(|| table.resources.iter().find(is_named));
            (name, resource.and_then(length_of))
        })
        .collect();
    // A node above one with a file is as long as that.
    let below = |name: Option<String>| {
        let (_, len) = lengths
            .iter()
            .find(|(other, _)| name.is_some() && *other == name)?;
        *len
    };
    let mut number = 0;
    for item in &mut arguments.items {
        if item.name() != Some("blockdev") {
            continue;
        }
        let node = item.properties();
        let own = lengths.get(number).and_then(|(_, len)| *len);
        number += 1;
        let len = own.or_else(|| below(node.get("file"))).unwrap_or(1 << 30);
        let mut value = nothing(len);
        for key in ["node-name", "read-only"] {
            if let Some(text) = node.get(key) {
                value.push_str(&format!(",{key}={}", escape(&text)));
            }
        }
        item.set_value(value);
    }
}

/// What is left of the host in an argument.
fn quieten(argument: &mut Argument, directory: &str) {
    match argument.name() {
        Some("object") => argument.edit(|object| {
            let kind = object.get("qom-type").unwrap_or_default();
            if !kind.starts_with("memory-backend-") || kind == "memory-backend-epc" {
                return;
            }
            object.set("qom-type", "memory-backend-ram");
            for key in [
                "mem-path",
                "hugetlb",
                "hugetlbsize",
                "seal",
                "pmem",
                "align",
                "offset",
                "readonly",
                "rom",
                "prealloc",
                "prealloc-threads",
                "prealloc-context",
                "host-nodes",
                "policy",
                "discard-data",
            ] {
                object.remove(key);
            }
        }),
        Some("audiodev") => {
            let id = argument.properties().get("id").unwrap_or_default();
            argument.set_value(format!("none,id={}", escape(&id)));
        }
        Some("fsdev" | "virtfs") => argument.edit(|share| {
            share.set("fsdriver", "local");
            share.set("path", "/");
            share.set("security_model", "none");
            share.remove("readonly");
            share.set("readonly", "on");
        }),
        Some("spice") => {
            let socket = escape(&format!("{directory}/spice.sock"));
            argument.set_value(format!("unix=on,addr={socket},disable-ticketing=on"));
        }
        Some("display") => argument.set_value("none"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn becomes(words: &str) -> String {
        let words: Vec<&str> = std::iter::once("qemu")
            .chain(words.split_whitespace())
            .collect();
        let arguments = Arguments::parse(&words).unwrap();
        let length_of = |one: &Resource| (one.id == "d").then_some(4096);
        let inert = inert(&arguments, "pc-i440fx-10.0", "/dir", &length_of).unwrap();
        inert.write()[1..].join(" ")
    }

    #[test]
    fn no_disk_is_opened_and_each_stays_in_its_place() {
        let blank = "driver=null-co,size=4096,read-zeroes=on";
        assert_eq!(
            becomes(
                "-drive file=/a.img,format=raw,if=none,id=d,cache=none -device virtio-blk-pci,drive=d"
            ),
            format!("-drive {blank},if=none,id=d -device virtio-blk-pci,drive=d")
        );
        assert_eq!(
            becomes(
                "-blockdev file,node-name=f,filename=/a -blockdev qcow2,node-name=d,file=f,read-only=on"
            ),
            format!("-blockdev {blank},node-name=f -blockdev {blank},node-name=d,read-only=on")
        );
        let large = "driver=null-co,size=1073741824,read-zeroes=on";
        assert_eq!(
            becomes("-cdrom /c.iso /a.img -drive if=floppy,index=0"),
            format!(
                "-drive {large},if=ide,index=2,media=cdrom -drive {large},if=ide,index=0,media=disk -drive if=floppy,index=0"
            )
        );
    }

    #[test]
    fn nothing_leads_out() {
        assert_eq!(
            becomes(
                "-netdev tap,id=n -device e1000,netdev=n -serial file:/log -gdb tcp::1 -vnc :1 -mem-path /h"
            ),
            "-netdev user,restrict=on,id=n -device e1000,netdev=n -serial null"
        );
        assert_eq!(
            becomes(
                "-netdev user,id=n,hostfwd=tcp::2-:22 -chardev socket,id=c,path=/s,server=on -device isa-serial,chardev=c"
            ),
            "-netdev user,restrict=on,id=n -chardev null,id=c -device isa-serial,chardev=c"
        );
        assert_eq!(
            becomes(
                "-kernel /k -append a -tpmdev emulator,id=t,chardev=c -chardev socket,id=c,path=/s -device tpm-crb,tpmdev=t"
            ),
            "-chardev null,id=c"
        );
        assert_eq!(
            becomes(
                "-object memory-backend-file,id=m,size=1G,mem-path=/x,share=on -audiodev pa,id=a"
            ),
            "-object memory-backend-ram,id=m,size=1G,share=on -audiodev none,id=a"
        );
    }

    #[test]
    fn what_is_nothing_without_its_backend_is_named() {
        let words = ["qemu", "-device", "vhost-user-fs-pci,chardev=c"];
        let arguments = Arguments::parse(&words).unwrap();
        let refused = inert(&arguments, "pc", "/dir", &|_| None).unwrap_err();
        assert_eq!(refused, ["-device vhost-user-fs-pci,chardev=c"]);
    }
}
