//! Every path that arguments name.

use super::arguments::{Argument, Arguments};

/// A path of the host and where the arguments name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathUse {
    /// The argument, counted from 0 behind the program.
    pub argument: usize,
    /// The option without dashes; empty for an image that stands alone.
    pub option: String,
    /// The property that holds the path; `None` if the whole value is one.
    pub property: Option<String>,
    /// The path as written: relative ones belong to the directory QEMU was started in.
    pub path: String,
}

/// Options whose whole value is a file that the guest gets to see.
pub(super) const FILE_OPTIONS: [&str; 17] = [
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "cdrom",
    "fda",
    "fdb",
    "pflash",
    "sd",
    "mtdblock",
    "bios",
    "option-rom",
    "kernel",
    "initrd",
    "dtb",
    "shim",
    "mem-path",
];

/// Options whose whole value is another path.
const PATH_OPTIONS: [&str; 8] = [
    "L",
    "D",
    "pidfile",
    "readconfig",
    "writeconfig",
    "chroot",
    "dump-vmstate",
    "qtest-log",
];

/// Properties that hold a path, under whichever option.
const PATH_PROPERTIES: [&str; 27] = [
    "filename",
    "file",
    "path",
    "mem-path",
    "logfile",
    "input-path",
    "romfile",
    "script",
    "downscript",
    "helper",
    "tftp",
    "smb",
    "sock",
    "vhostdev",
    "dir",
    "x509-dir",
    "evdev",
    "sysfsdev",
    "chroot",
    "cancel-path",
    "rrfile",
    "rendernode",
    "events",
    "kernel-hashes-file",
    "uds",
    "host_device",
    "splash",
];

/// The paths in the order of the arguments.
pub fn paths(arguments: &Arguments) -> Vec<PathUse> {
    let mut found = Vec::new();
    for (index, argument) in arguments.items.iter().enumerate() {
        for (property, path) in of_argument(argument) {
            if is_path(&path) {
                found.push(PathUse {
                    argument: index,
                    option: argument.name().unwrap_or_default().to_owned(),
                    property,
                    path,
                });
            }
        }
    }
    found
}

fn of_argument(argument: &Argument) -> Vec<(Option<String>, String)> {
    let value = argument.value().unwrap_or_default();
    match argument.name() {
        None => return vec![(None, value.to_owned())],
        Some("append" | "uuid" | "cpu") => return Vec::new(),
        Some(name) if FILE_OPTIONS.contains(&name) || PATH_OPTIONS.contains(&name) => {
            return vec![(None, value.to_owned())];
        }
        Some("serial" | "parallel" | "debugcon" | "monitor" | "qmp" | "qmp-pretty" | "gdb") => {
            return of_port(value);
        }
        Some("vnc") => {
            let socket = value
                .strip_prefix("unix:")
                .map(|rest| rest.split(',').next().unwrap_or(rest));
            return socket
                .map(|path| (None, path.to_owned()))
                .into_iter()
                .collect();
        }
        Some(_) => {}
    }
    let leaves = argument.properties().leaves().into_iter();
    let named = leaves.filter(|(key, _)| {
        let last = key.rsplit('.').next().unwrap_or(key);
        let is_node = argument.name() == Some("blockdev") && key == "file";
        PATH_PROPERTIES.contains(&last) && !is_node
    });
    named.map(|(key, path)| (Some(key), path)).collect()
}

/// `file:/x`, `pipe:/x`, `unix:/s,server`, `/dev/ttyS0`.
fn of_port(value: &str) -> Vec<(Option<String>, String)> {
    let value = value.strip_prefix("mon:").unwrap_or(value);
    let path = match value.split_once(':') {
        Some(("file" | "pipe", path)) => path,
        Some(("unix", rest)) => rest.split(',').next().unwrap_or(rest),
        _ if value.starts_with("/dev/") => value,
        _ => return Vec::new(),
    };
    vec![(None, path.to_owned())]
}

/// Not empty, not `no` (a script that does not run), not another node's name or a URL.
fn is_path(path: &str) -> bool {
    let is_url =
        path.split_once("://").is_some() || path.starts_with("json:") || path.starts_with("nbd:");
    !matches!(path, "" | "no" | "none" | "on" | "off") && !is_url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_listed_and_nothing_else() {
        let line = "qemu a.img -kernel /k -drive file=/d,if=virtio -serial file:/s -serial pty \
            -chardev socket,id=c,path=/c -netdev tap,id=n,script=no,downscript=/x -vnc unix:/v \
            -blockdev driver=qcow2,node-name=q,file=f -blockdev driver=file,node-name=f,filename=/q \
            -drive file=nbd://h/e -append root=/dev/vda -device e1000,romfile=/r -qmp unix:/m,server";
        let words: Vec<&str> = line.split_whitespace().collect();
        let found = paths(&Arguments::parse(&words).unwrap());
        let found: Vec<&str> = found.iter().map(|found| found.path.as_str()).collect();
        let expected = [
            "a.img", "/k", "/d", "/s", "/c", "/x", "/v", "/q", "/r", "/m",
        ];
        assert_eq!(found, expected);
    }
}
