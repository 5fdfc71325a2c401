//! What of arguments reaches beyond the guest: files, devices, networks and programs of this host.
//!
//! The arguments of an image that nobody vouches for may describe a guest and no more. So this lists what is known to
//! stay inside QEMU, and whatever is not known counts as reaching out.
//!
//! Source: QEMU's manual, the options of 7.2 and 10.0.

use super::arguments::{Argument, Arguments};
use super::compat::remap_fix;
use super::paths::{FILE_OPTIONS, paths};
use super::resources::{Resource, ResourceKind, ResourceTable};
use super::settings::Allow;

/// Options that say something about the guest alone, whatever their values.
const GUEST_ONLY: [&str; 36] = [
    "S",
    "accel",
    "action",
    "append",
    "boot",
    "cpu",
    "enable-kvm",
    "fw_cfg",
    "icount",
    "incoming",
    "k",
    "m",
    "machine",
    "mon",
    "msg",
    "name",
    "no-acpi",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "numa",
    "only-migratable",
    "overcommit",
    "rtc",
    "sandbox",
    "smbios",
    "smp",
    "usb",
    "uuid",
    "vga",
    "watchdog",
    "watchdog-action",
    "win2k-hack",
];

/// Properties of a drive or a block node that name nothing but the one file.
const BLOCK_PROPERTIES: [&str; 31] = [
    "aio",
    "auto-read-only",
    "bus",
    "cache",
    "cache.direct",
    "cache.no-flush",
    "cache.writeback",
    "copy-on-read",
    "detect-zeroes",
    "discard",
    "driver",
    "file",
    "file.driver",
    "file.filename",
    "file.locking",
    "filename",
    "format",
    "id",
    "if",
    "index",
    "locking",
    "media",
    "node-name",
    "offset",
    "read-only",
    "readonly",
    "rerror",
    "serial",
    "size",
    "unit",
    "werror",
];

/// Drivers of block nodes that read the one file they are given, or what the user's own file names.
const BLOCK_DRIVERS: [&str; 10] = [
    "file",
    "host_device",
    "raw",
    "qcow2",
    "qed",
    "vmdk",
    "vdi",
    "vhdx",
    "vpc",
    "parallels",
];

/// Beginnings of devices that stand for something of this host.
const HOST_DEVICES: [&str; 13] = [
    "vfio",
    "vhost",
    "usb-host",
    "usb-mtp",
    "loader",
    "guest-loader",
    "u2f-",
    "ccid-card-",
    "xen",
    "virtio-input-host",
    "virtio-gpu-rutabaga",
    "virtio-vga-rutabaga",
    "x-pci-proxy",
];

/// Properties of devices that name something of this host.
const HOST_PROPERTIES: [&str; 12] = [
    "romfile",
    "rootdir",
    "host",
    "hostbus",
    "hostaddr",
    "hostport",
    "hostdevice",
    "sysfsdev",
    "vhostdev",
    "socket",
    "file",
    "evdev",
];

/// Objects that stay inside QEMU.
const OBJECTS: [&str; 11] = [
    "iothread",
    "throttle-group",
    "main-loop",
    "thread-context",
    "memory-backend-ram",
    "memory-backend-memfd",
    "memory-backend-file",
    "rng-builtin",
    "rng-random",
    "cryptodev-backend-builtin",
    "can-bus",
];

/// Properties of a user network that open no port and run no program of this host.
const USER_NETWORK: [&str; 20] = [
    "type",
    "id",
    "name",
    "net",
    "host",
    "restrict",
    "hostname",
    "dhcpstart",
    "dns",
    "domainname",
    "ipv4",
    "ipv6",
    "ipv6-net",
    "ipv6-host",
    "ipv6-dns",
    "mac",
    "macaddr",
    "model",
    "netdev",
    "addr",
];

/// Files that every process may read and that tell nothing.
const NEUTRAL_FILES: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/null"];

/// Each argument that reaches out, in words, with the remap that would answer it. `is_named` says whether the user
/// himself named a file, an interface or a port forwarding for this guest, `allow` what any guest may use.
pub fn foreign(
    arguments: &Arguments,
    is_named: &dyn Fn(&str) -> bool,
    allow: &Allow,
) -> Vec<String> {
    let table = ResourceTable::from_arguments(arguments, None);
    let items = arguments.items.iter().enumerate();
    let found = items.filter_map(|(index, argument)| {
        let reach = reach(argument, is_named, allow)?;
        let mut resources = table.resources.iter();
        let resource = resources.find(|resource| resource.argument == Some(index));
        Some(match resource.and_then(|it| remap_fix(it, "PATH")) {
            Some(fix) => format!("{reach} ({fix})"),
            None => reach,
        })
    });
    found.collect()
}

/// Each network that leads out of the guest through QEMU's user network, to this host's own services too.
/// `is_remapped` says whether the user himself asked for it; `None` stands for QEMU's default network.
pub fn open_networks(
    arguments: &Arguments,
    is_remapped: &dyn Fn(Option<&Resource>) -> bool,
    allow: &Allow,
) -> Vec<String> {
    if allow.user_network {
        return Vec::new();
    }
    let is_restricted = |resource: &Resource| {
        let argument = resource
            .argument
            .and_then(|index| arguments.items.get(index));
        argument.is_some_and(|argument| argument.properties().is_on("restrict"))
    };
    let table = ResourceTable::from_arguments(arguments, None);
    let nics = table.of(ResourceKind::Nic);
    let open = nics
        .filter(|nic| nic.backend.kind == "user")
        .filter(|nic| !is_restricted(nic) && !is_remapped(Some(nic)));
    let mut found: Vec<String> = open
        .map(|nic| {
            let id = &nic.id;
            format!("net {id:?} leads to this host and beyond (--remap net:{id}=user)")
        })
        .collect();
    let has_network = ["nodefaults", "net", "nic", "netdev"]
        .iter()
        .any(|name| arguments.has(name));
    if !has_network && !is_remapped(None) {
        let text = "QEMU's default network leads to this host and beyond (--remap net:*=user)";
        found.push(text.to_owned());
    }
    found
}

fn reach(argument: &Argument, is_named: &dyn Fn(&str) -> bool, allow: &Allow) -> Option<String> {
    let alone = Arguments {
        program: String::new(),
        items: vec![argument.clone()],
    };
    // A user network does more with a directory than read it: it runs programs.
    let is_network = matches!(argument.name(), Some("netdev" | "nic" | "net"));
    let is_allowed = |path: &str| !is_network && allow.has_path(path);
    let is_file = |path: &str| is_named(path) || is_allowed(path);
    let unknown = |path: &str| !is_file(path) && !NEUTRAL_FILES.contains(&path);
    if let Some(used) = paths(&alone).into_iter().find(|used| unknown(&used.path)) {
        return Some(match argument.name() {
            Some(name) => format!("-{name} names {}", used.path),
            None => format!("the disk image {}", used.path),
        });
    }
    let is_interface = |name: &str| is_named(name) || allow.has_interface(name);
    let reaches_out = match argument.properties().get("type").as_deref() {
        Some("tap" | "bridge") if is_network => !stays_inside(argument, &is_interface),
        _ => !stays_inside(argument, &is_file),
    };
    reaches_out.then(|| format!("{} would be used", argument.shown()))
}

/// Whether an argument reaches nothing of the host besides the paths in it.
fn stays_inside(argument: &Argument, is_named: &dyn Fn(&str) -> bool) -> bool {
    let value = argument.value().unwrap_or_default();
    let Some(name) = argument.name() else {
        return is_named(value);
    };
    let properties = argument.properties();
    let get = |key: &str| properties.get(key).unwrap_or_default();
    let keys_are = |known: &[&str]| {
        let leaves = properties.leaves();
        leaves.iter().all(|(key, _)| known.contains(&key.as_str()))
    };
    match name {
        "machine" => !["dumpdtb", "firmware", "kernel", "initrd", "dtb", "shim"]
            .iter()
            .any(|key| properties.get(key).is_some()),
        _ if GUEST_ONLY.contains(&name) => true,
        _ if FILE_OPTIONS.contains(&name) => is_named(value),
        "vnc" if keys_are(&["vnc", "password", "share"]) => {
            let address = get("vnc");
            address == "none" || is_named(address.strip_prefix("unix:").unwrap_or(&address))
        }
        "display" | "vnc" | "audiodev" | "audio" => value == "none" || value.starts_with("none,"),
        "usbdevice" => ["tablet", "mouse", "keyboard"].contains(&value),
        "serial" | "parallel" | "debugcon" => port_stays_inside(value),
        "global" | "device" => device_stays_inside(&get("driver"), &properties.leaves()),
        "object" => OBJECTS.contains(&get("qom-type").as_str()) || is_secret_in_itself(argument),
        "chardev" => chardev_stays_inside(argument),
        "drive" | "blockdev" => {
            keys_are(&BLOCK_PROPERTIES)
                && ["driver", "file.driver", "format"]
                    .iter()
                    .filter_map(|key| properties.get(key))
                    .all(|driver| BLOCK_DRIVERS.contains(&driver.as_str()))
                && (name == "blockdev"
                    || properties
                        .get("file")
                        .is_none_or(|file| file.is_empty() || is_named(&file)))
        }
        "netdev" | "nic" | "net" => match get("type").as_str() {
            "none" | "nic" | "hubport" => true,
            "tap" => {
                is_named(&get("ifname"))
                    && keys_are(&["type", "id", "ifname", "script", "downscript"])
            }
            "bridge" => is_named(&get("br")) && keys_are(&["type", "id", "br"]),
            "stream" => {
                let known = ["type", "id", "server", "addr.type", "addr.path"];
                is_named(&get("addr.path")) && !properties.is_on("server") && keys_are(&known)
            }
            "user" => {
                let leaves = properties.leaves();
                let is_known =
                    |key: &str, value: &str| USER_NETWORK.contains(&key) || is_named(value);
                leaves.iter().all(|(key, value)| is_known(key, value))
            }
            _ => false,
        },
        "tpmdev" => get("type") == "emulator",
        _ => false,
    }
}

fn port_stays_inside(value: &str) -> bool {
    let value = value.strip_prefix("mon:").unwrap_or(value);
    let backend = value.split([':', ',']).next().unwrap_or_default();
    // The paths of a file or a socket are judged with all others.
    [
        "none", "null", "vc", "msmouse", "pty", "stdio", "chardev", "file", "unix",
    ]
    .contains(&backend)
}

fn device_stays_inside(driver: &str, leaves: &[(String, String)]) -> bool {
    let is_host = |word: &str| {
        let last = word.rsplit('.').next().unwrap_or(word);
        HOST_PROPERTIES.contains(&last)
    };
    !HOST_DEVICES
        .iter()
        .any(|beginning| driver.starts_with(beginning))
        && !leaves.iter().any(|(key, value)| {
            // An empty value takes a file away, as in `romfile=`.
            (is_host(key) && !value.is_empty())
                || (key == "property" && is_host(value))
                || value.contains('/')
        })
}

fn chardev_stays_inside(argument: &Argument) -> bool {
    let properties = argument.properties();
    match properties.get("backend").unwrap_or_default().as_str() {
        "null" | "ringbuf" | "memory" | "pty" | "vc" | "stdio" | "msmouse" | "file" => true,
        "socket" => {
            let reaches_out = |key: &str| properties.get(key).is_some();
            properties.get("path").is_some()
                && !["host", "port", "fd"].iter().any(|key| reaches_out(key))
        }
        _ => false,
    }
}

/// A secret that stands in the arguments themselves.
fn is_secret_in_itself(argument: &Argument) -> bool {
    let properties = argument.properties();
    properties.get("qom-type").as_deref() == Some("secret") && properties.get("file").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_leads_out_unless_it_is_restricted_or_asked_for() {
        let networks = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let is_remapped = |nic: Option<&Resource>| nic.is_some_and(|nic| nic.id == "asked");
            let arguments = Arguments::parse(&words).unwrap();
            let found = open_networks(&arguments, &is_remapped, &Allow::default()).len();
            let allow = Allow {
                user_network: true,
                ..Allow::default()
            };
            assert!(open_networks(&arguments, &is_remapped, &allow).is_empty());
            found
        };
        assert_eq!(networks("qemu -netdev user,id=n -device e1000,netdev=n"), 1);
        assert_eq!(networks("qemu -nic user,model=e1000 -nic user"), 2);
        assert_eq!(networks("qemu -net nic -net user"), 1);
        assert_eq!(networks("qemu -m 64"), 1);
        assert_eq!(networks("qemu -netdev user,id=n,restrict=on"), 0);
        assert_eq!(networks("qemu -netdev user,id=asked"), 0);
        assert_eq!(networks("qemu -nodefaults"), 0);
    }

    fn judge(line: &str) -> Vec<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_named = |name: &str| ["/mine", "tap0", "tcp::2222-:22"].contains(&name);
        let allow = Allow {
            paths: vec!["/allowed/".to_owned()],
            interfaces: vec!["br9".to_owned()],
            user_network: false,
        };
        foreign(&Arguments::parse(&words).unwrap(), &is_named, &allow)
    }

    #[test]
    fn what_the_user_allows_any_guest_reaches_no_further() {
        for line in [
            "-drive file=/allowed/x,id=x,format=raw",
            "-hda /allowed/x",
            "/allowed/x",
            "-blockdev driver=file,node-name=f,filename=/allowed/x",
            "-serial file:/allowed/x",
            "-netdev bridge,id=n,br=br9",
        ] {
            assert_eq!(judge(&format!("qemu {line}")), [""; 0]);
        }
        for line in [
            "-drive file=/allowed/../etc/shadow,id=x",
            "-netdev user,id=n,smb=/allowed/x",
            "-netdev user,id=n,tftp=/allowed/x",
            "-netdev bridge,id=n,br=br8",
            "-netdev tap,id=n,ifname=br9,script=/allowed/x,downscript=no",
            "-vnc 127.0.0.1:1",
        ] {
            assert_eq!(judge(&format!("qemu {line}")).len(), 1, "{line}");
        }
    }

    #[test]
    fn a_guest_with_nothing_of_this_host_reaches_nothing() {
        let line = "qemu -machine pc-q35-10.0,memory-backend=ram -accel tcg -cpu max -m 64 -smp 2 -nodefaults \
            -object memory-backend-ram,id=ram,size=64M -object rng-random,id=r,filename=/dev/urandom \
            -drive file=/mine,format=raw,if=none,id=disk0,cache=none -device virtio-blk-pci,drive=disk0,addr=0x4 \
            -blockdev driver=file,node-name=f,filename=/mine -blockdev driver=qcow2,node-name=q,file=f \
            -netdev user,id=n,hostname=x -device e1000,netdev=n,romfile=,mac=52:54:00:00:00:01 \
            -netdev user,id=u,hostfwd=tcp::2222-:22 -netdev tap,id=t,ifname=tap0,script=no,downscript=no \
            -chardev file,id=c,path=/mine,append=on -serial chardev:c -serial null -display none -vga std \
            -global ICH9-LPC.disable_s3=1 -boot order=c -rtc base=utc -append root=/dev/vda -S -incoming defer";
        assert_eq!(judge(line), [""; 0]);
    }

    #[test]
    fn what_reaches_out_is_shown() {
        for (line, shown) in [
            (
                "-drive file=/etc/shadow,id=x",
                "-drive names /etc/shadow (--remap disk:x=PATH)",
            ),
            (
                "-drive file=nbd://h/x,id=x",
                "-drive file=nbd://h/x,id=x would be used (--remap disk:x=PATH)",
            ),
            (
                "-drive file.driver=nbd,file.host=h",
                "-drive file.driver=nbd,file.host=h would be used (--remap disk:ide0-hd0=PATH)",
            ),
            (
                "-vnc 0.0.0.0:7",
                "-vnc 0.0.0.0:7 would be used (--remap display:display0=unix:PATH)",
            ),
            (
                "-set drive.disk0.aio=native",
                "-set drive.disk0.aio=native would be used",
            ),
            ("-semihosting", "-semihosting would be used"),
            (
                "-machine pc,dumpdtb=x",
                "-machine pc,dumpdtb=x would be used",
            ),
            ("-global e1000.romfile=x", "-global names x"),
            ("-something-new", "-something-new would be used"),
            ("a.img", "the disk image a.img (--remap disk:ide0-hd0=PATH)"),
        ] {
            assert_eq!(judge(&format!("qemu {line}")), [shown]);
        }
    }
}
