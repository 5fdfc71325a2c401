//! Throwaway overlays: which files a guest may write to, and arguments in which it writes to others instead.
//!
//! An overlay is a qcow2 file over the guest's own one, which QEMU then only reads. Where that cannot be arranged by a
//! change of the argument that names the file, the disk is refused by name.
//!
//! Source: QEMU's manual of `-drive` and `-blockdev`; seen with 7.2 and 10.0.

use super::arguments::{Argument, Arguments};
use super::error::Reason;
use super::properties::{Properties, escape};
use super::resources::{Resource, ResourceKind, ResourceTable};

/// The format of every overlay.
pub const FORMAT: &str = "qcow2";

/// Formats that a file below an overlay may have.
const BASE_FORMATS: [&str; 2] = ["raw", "qcow2"];

/// Properties that belong to the file as it is, so that no other can stand in its place.
const BOUND: [&str; 7] = [
    "backing",
    "backing.",
    "data-file",
    "encrypt",
    "key-secret",
    "offset",
    "size",
];

/// Properties that every block node has, whatever its driver.
const NODE_PROPERTIES: [&str; 8] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "force-share",
    "cache.direct",
    "cache.no-flush",
];

/// A file that the arguments let the guest write to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WritableDisk {
    /// Disk, floppy or firmware.
    pub kind: ResourceKind,
    /// Its id.
    pub id: String,
    /// The file, as the arguments name it.
    pub path: String,
    /// Its format, if the arguments tell it.
    pub format: Option<String>,
}

/// Whether the guest can change what stands behind this resource and finds it so later.
pub fn is_writable_disk(resource: &Resource) -> bool {
    use ResourceKind::{Disk, Firmware, Floppy};
    matches!(resource.kind, Disk | Floppy | Firmware) && !resource.read_only
}

/// The files that the arguments let the guest write to, each of which can get an overlay.
///
/// # Errors
/// A reason for every other disk.
pub fn writable_disks(
    arguments: &Arguments,
    machine_type: &str,
) -> Result<Vec<WritableDisk>, Vec<Reason>> {
    let table = ResourceTable::from_arguments(arguments, Some(machine_type));
    let (mut disks, mut reasons) = (Vec::new(), Vec::new());
    for resource in table.resources.iter().filter(|one| is_writable_disk(one)) {
        match writable_disk(arguments, resource) {
            Ok(disk) => disks.extend(disk),
            Err(why) => reasons.push(Reason::NoOverlay {
                kind: resource.kind.word(),
                id: resource.id.clone(),
                why,
            }),
        }
    }
    match reasons.is_empty() {
        true => Ok(disks),
        false => Err(reasons),
    }
}

/// The file of a resource; `None` if its drive is empty.
fn writable_disk(
    arguments: &Arguments,
    resource: &Resource,
) -> Result<Option<WritableDisk>, String> {
    let backend = &resource.backend;
    let place = Place::of(arguments, resource)?;
    let properties = arguments
        .items
        .get(place.format)
        .map(Argument::properties)
        .unwrap_or_else(|| Properties::parse("", None));
    let path = match &backend.path {
        Some(path) if matches!(backend.kind.as_str(), "file" | "host_device") => path.clone(),
        _ if backend.kind == "empty" && properties.get("file.driver").is_none() => return Ok(None),
        _ => return Err(format!("it is no file of this host but {}", backend.kind)),
    };
    let keys = properties.leaves().into_iter().map(|(key, _)| key);
    if let Some(key) = keys.into_iter().find(|key| is_bound(key)) {
        return Err(format!("{key} belongs to its own file"));
    }
    let format = match place.is_protocol_only {
        true => Some("raw".to_owned()),
        false => properties.get_any(&["format", "driver"]),
    };
    if let Some(format) = format
        .as_ref()
        .filter(|format| !BASE_FORMATS.contains(&format.as_str()))
    {
        return Err(format!("its format is {format}, not raw or qcow2"));
    }
    Ok(Some(WritableDisk {
        kind: resource.kind,
        id: resource.id.clone(),
        path,
        format,
    }))
}

fn is_bound(key: &str) -> bool {
    BOUND.iter().any(|bound| {
        key == *bound || (!matches!(*bound, "offset" | "size") && key.starts_with(bound))
    })
}

/// The arguments that make a disk: indexes among [`Arguments::items`].
struct Place {
    /// Names its format.
    format: usize,
    /// Names its file; often the same.
    file: usize,
    /// A block node that a device uses without one above it that knows a format.
    is_protocol_only: bool,
}

impl Place {
    fn of(arguments: &Arguments, resource: &Resource) -> Result<Self, String> {
        let no_argument = || "no argument names it".to_owned();
        let file = resource.argument.ok_or_else(no_argument)?;
        let argument = arguments.items.get(file).ok_or_else(no_argument)?;
        if argument.name() != Some("blockdev") {
            return Ok(Place {
                format: file,
                file,
                is_protocol_only: false,
            });
        }
        let names: Vec<&String> = std::iter::once(&resource.id)
            .chain(&resource.aliases)
            .collect();
        let top = arguments.options("blockdev").find(|(_, node)| {
            let name = node.properties().get("node-name");
            name.is_some_and(|name| names.contains(&&name))
        });
        let (format, top) = top.ok_or_else(no_argument)?;
        let top = top.properties();
        if format == file {
            let is_protocol_only = top.get("filename").is_some();
            return Ok(Place {
                format,
                file,
                is_protocol_only,
            });
        }
        let below = argument.properties().get("node-name");
        match top.get("file") == below && argument.properties().get("filename").is_some() {
            true => Ok(Place {
                format,
                file,
                is_protocol_only: false,
            }),
            false => Err("there are more block nodes above its file than one".to_owned()),
        }
    }
}

/// Puts an overlay in the place of a disk's file; `None` if it cannot be, which [`writable_disks`] tells.
pub(super) fn put(arguments: &mut Arguments, resource: &Resource, overlay: &str) -> Option<()> {
    let place = Place::of(arguments, resource).ok()?;
    let argument = arguments.items.get_mut(place.file)?;
    if let Some(drive) = spelled_out(argument) {
        *argument = Argument::with_value("drive", drive);
    }
    match argument.name() {
        Some("drive") => argument.edit(|drive| {
            let path_key = present(drive, &["file", "file.filename", "filename"]).unwrap_or("file");
            let format_key = present(drive, &["format", "driver"]).unwrap_or("format");
            drive.set(path_key, overlay);
            drive.set(format_key, FORMAT);
            if drive.get("file.driver").is_some() {
                drive.set("file.driver", "file");
            }
        }),
        Some("blockdev") if place.is_protocol_only => {
            let wrapped = wrapped(&argument.properties(), overlay);
            argument.set_value(wrapped);
        }
        Some("blockdev") => {
            argument.edit(|node| {
                let path_key = present(node, &["filename", "file.filename"]).unwrap_or("filename");
                let driver_key = match path_key {
                    "filename" => "driver",
                    _ => "file.driver",
                };
                node.set(path_key, overlay);
                node.set(driver_key, "file");
            });
            let format = arguments.items.get_mut(place.format)?;
            format.edit(|node| node.set("driver", FORMAT));
        }
        _ => return None,
    }
    Some(())
}

fn present(properties: &Properties, keys: &[&'static str]) -> Option<&'static str> {
    keys.iter()
        .copied()
        .find(|key| properties.get(key).is_some())
}

/// A short form, or an image that stands alone, as a value of `-drive`; its format has to be said.
///
/// Source: QEMU `system/vl.c`, `drive_add`.
fn spelled_out(argument: &Argument) -> Option<String> {
    let place = match argument.name() {
        None | Some("hda") => "index=0,media=disk",
        Some("hdb") => "index=1,media=disk",
        Some("hdc") => "index=2,media=disk",
        Some("hdd") => "index=3,media=disk",
        Some("fda") => "if=floppy,index=0",
        Some("fdb") => "if=floppy,index=1",
        Some("pflash") => "if=pflash",
        Some("sd") => "if=sd",
        Some("mtdblock") => "if=mtd",
        Some(_) => return None,
    };
    Some(format!("{place},file={}", escape(argument.value()?)))
}

/// A node of the overlay's format over a node of the overlay's file, under the name of the one node that was there.
fn wrapped(node: &Properties, overlay: &str) -> String {
    let mut value = format!(
        "driver={FORMAT},file.driver=file,file.filename={}",
        escape(overlay)
    );
    for (key, text) in node.leaves() {
        match key.as_str() {
            "driver" | "filename" => {}
            key if NODE_PROPERTIES.contains(&key) => {
                value.push_str(&format!(",{key}={}", escape(&text)));
            }
            key => value.push_str(&format!(",file.{key}={}", escape(&text))),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: &str = "pc-i440fx-10.0";

    fn arguments(words: &[&str]) -> Arguments {
        let mut all = vec!["qemu"];
        all.extend(words);
        Arguments::parse(&all).unwrap()
    }

    /// The arguments with an overlay `/o/ID` over each disk that the guest may write to.
    fn overlaid(words: &[&str]) -> String {
        let mut arguments = arguments(words);
        for disk in writable_disks(&arguments, MACHINE).unwrap() {
            let table = ResourceTable::from_arguments(&arguments, Some(MACHINE));
            let resource = table.find(disk.kind, &disk.id).unwrap();
            put(&mut arguments, resource, &format!("/o/{}", disk.id)).unwrap();
        }
        arguments.write()[1..].join(" ")
    }

    fn refused(words: &[&str]) -> String {
        let reasons = writable_disks(&arguments(words), MACHINE).unwrap_err();
        let reasons: Vec<String> = reasons.iter().map(Reason::to_string).collect();
        reasons.join("; ")
    }

    #[test]
    fn a_drive_gets_another_file_of_another_format() {
        assert_eq!(
            overlaid(&["-drive", "file=/a.img,format=raw,if=virtio,cache=none"]),
            "-drive file=/o/virtio0,format=qcow2,if=virtio,cache=none"
        );
        assert_eq!(
            overlaid(&[
                "-drive",
                "file=/a,,b.img,if=none,id=d",
                "-device",
                "x,drive=d"
            ]),
            "-drive file=/o/d,if=none,id=d,format=qcow2 -device x,drive=d"
        );
        assert_eq!(
            overlaid(&[
                "-drive",
                "driver=raw,file.driver=host_device,file.filename=/dev/sdx"
            ]),
            "-drive driver=qcow2,file.driver=file,file.filename=/o/ide0-hd0"
        );
    }

    #[test]
    fn a_short_form_is_spelled_out_so_that_its_format_is_not_guessed() {
        assert_eq!(
            overlaid(&["-hdb", "/b.img", "/a.img", "-fda", "/f", "-pflash", "/v"]),
            "-drive index=1,media=disk,file=/o/ide0-hd1,format=qcow2 \
             -drive index=0,media=disk,file=/o/ide0-hd0,format=qcow2 \
             -drive if=floppy,index=0,file=/o/floppy0,format=qcow2 \
             -drive if=pflash,file=/o/pflash0,format=qcow2"
        );
    }

    #[test]
    fn block_nodes_of_all_forms_get_an_overlay() {
        let device = ["-device", "virtio-blk-pci,drive=d,id=v"];
        let with = |nodes: &[&str]| overlaid(&[nodes, &device].concat());
        assert_eq!(
            with(&[
                "-blockdev",
                "qcow2,node-name=d,file.driver=file,file.filename=/a"
            ]),
            "-blockdev qcow2,node-name=d,file.driver=file,file.filename=/o/v -device virtio-blk-pci,drive=d,id=v"
        );
        assert_eq!(
            with(&[
                "-blockdev",
                r#"{"driver":"host_device","node-name":"f","filename":"/dev/sdx"}"#,
                "-blockdev",
                r#"{"driver":"raw","node-name":"d","file":"f"}"#,
            ]),
            r#"-blockdev {"driver":"file","filename":"/o/v","node-name":"f"} -blockdev {"driver":"qcow2","file":"f","node-name":"d"} -device virtio-blk-pci,drive=d,id=v"#
        );
        assert_eq!(
            with(&[
                "-blockdev",
                "file,node-name=d,filename=/a,aio=native,cache.direct=on"
            ]),
            "-blockdev driver=qcow2,file.driver=file,file.filename=/o/v,node-name=d,file.aio=native,cache.direct=on -device virtio-blk-pci,drive=d,id=v"
        );
    }

    #[test]
    fn what_the_guest_cannot_write_to_stays() {
        let words = [
            "-cdrom",
            "/c.iso",
            "-drive",
            "file=/a.img,format=raw,readonly=on",
            "-bios",
            "/b",
            "-drive",
            "if=floppy,index=0",
        ];
        assert_eq!(overlaid(&words), words.join(" "));
    }

    #[test]
    fn a_disk_that_cannot_get_an_overlay_is_named() {
        let network = refused(&["-drive", "file=nbd:127.0.0.1:10809,if=none,id=d"]);
        assert!(
            network.contains("\"d\"") && network.contains("nbd"),
            "{network}"
        );
        let nested = refused(&["-drive", "driver=raw,file.driver=nbd,file.host=h,id=d"]);
        assert!(nested.contains("\"d\""), "{nested}");
        let throttled = refused(&[
            "-blockdev",
            "file,node-name=f,filename=/a",
            "-blockdev",
            "qcow2,node-name=q,file=f",
            "-blockdev",
            "throttle,node-name=t,file=q,throttle-group=g",
        ]);
        assert!(throttled.contains("more block nodes"), "{throttled}");
        for bound in ["backing=b", "encrypt.format=luks", "offset=512"] {
            let words = format!("file=/a,format=qcow2,id=d,{bound}");
            assert!(refused(&["-drive", &words]).contains("belongs"), "{bound}");
        }
        assert!(refused(&["-drive", "file=/a,format=vmdk"]).contains("vmdk"));
    }
}
