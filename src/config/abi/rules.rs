//! The table: what of domain XML the guest sees, and what it does not.

use serde::Serialize;

/// Whom a difference concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The guest sees it: it is the machine that it was saved on.
    Abi,
    /// What stands behind a device on the host; a restore takes it from the XML.
    Backend,
    /// How the host runs the guest, which kept arguments say too: a restore goes by them.
    Host,
    /// Words about the guest, and its name.
    Note,
}

impl Class {
    /// The word for it where differences are listed.
    pub fn word(self) -> &'static str {
        match self {
            Abi => "the guest sees it",
            Backend => "backend",
            Host => "host",
            Note => "note",
        }
    }
}

use Class::{Abi, Backend, Host, Note};

/// What the guest does not see. Paths below `<domain>`: `*` stands for one name, `**` at the end for all below, the
/// element itself included; the first that fits counts, and what none fits the guest sees.
const RULES: [(&str, Class); 82] = [
    ("name", Note),
    ("title", Note),
    ("description", Note),
    ("metadata/**", Note),
    ("memory/@dumpCore", Host),
    ("memoryBacking/**", Host),
    ("vcpu/@placement", Host),
    ("vcpu/@cpuset", Host),
    ("iothreads", Host),
    ("iothreadids/**", Host),
    ("defaultiothread/**", Host),
    ("cputune/**", Host),
    ("memtune/**", Host),
    ("blkiotune/**", Host),
    ("numatune/**", Host),
    ("resource/**", Host),
    ("on_poweroff", Host),
    ("on_reboot", Host),
    ("on_crash", Host),
    ("on_lockfailure", Host),
    ("perf/**", Host),
    ("seclabel/**", Host),
    ("cpu/@match", Host),
    ("cpu/@check", Host),
    ("cpu/model/@fallback", Host),
    ("qemu:capabilities/**", Host),
    ("qemu:deprecation/**", Host),
    // Firmware and kernels: the image holds what was read of them, the files are read anew at the next boot.
    ("os/loader", Backend),
    ("os/loader/@format", Host),
    ("os/nvram", Backend),
    ("os/nvram/@template", Host),
    ("os/nvram/@templateFormat", Host),
    ("os/nvram/@format", Host),
    ("os/kernel", Backend),
    ("os/initrd", Backend),
    ("os/dtb", Backend),
    ("devices/emulator", Backend),
    ("devices/*/alias/**", Host),
    ("devices/disk/@type", Backend),
    ("devices/disk/@snapshot", Host),
    ("devices/disk/source/seclabel/**", Host),
    ("devices/disk/source/**", Backend),
    ("devices/disk/backingStore/**", Host),
    ("devices/disk/mirror/**", Host),
    ("devices/disk/iotune/**", Host),
    ("devices/disk/throttlefilters/**", Host),
    ("devices/disk/shareable", Host),
    ("devices/disk/driver/@type", Backend),
    ("devices/disk/driver/@io", Host),
    ("devices/disk/driver/@ioeventfd", Host),
    ("devices/disk/driver/@discard", Host),
    ("devices/disk/driver/@detect_zeroes", Host),
    ("devices/disk/driver/@error_policy", Host),
    ("devices/disk/driver/@rerror_policy", Host),
    ("devices/disk/driver/@copy_on_read", Host),
    ("devices/disk/driver/@iothread", Host),
    ("devices/disk/driver/metadata_cache/**", Host),
    ("devices/controller/driver/@iothread", Host),
    ("devices/controller/driver/@ioeventfd", Host),
    ("devices/interface/@type", Backend),
    ("devices/interface/source/**", Backend),
    ("devices/interface/target/**", Backend),
    ("devices/interface/backend/**", Backend),
    ("devices/interface/portForward/**", Backend),
    ("devices/interface/virtualport/**", Host),
    ("devices/interface/bandwidth/**", Host),
    ("devices/interface/filterref/**", Host),
    ("devices/interface/vlan/**", Host),
    ("devices/interface/script/**", Host),
    ("devices/interface/tune/**", Host),
    ("devices/interface/driver/@name", Host),
    ("devices/interface/driver/@txmode", Host),
    ("devices/interface/driver/@ioeventfd", Host),
    ("devices/filesystem/source/**", Backend),
    ("devices/filesystem/driver/**", Host),
    ("devices/filesystem/binary/**", Host),
    ("devices/filesystem/@accessmode", Host),
    ("devices/rng/backend/**", Host),
    ("devices/rng/rate/**", Host),
    ("devices/audio/**", Host),
    ("devices/memballoon/stats/**", Host),
    ("devices/watchdog/@action", Host),
];

/// As [`RULES`], for devices that are character devices on the host.
const CHARACTER_DEVICES: [&str; 6] = [
    "serial",
    "parallel",
    "console",
    "channel",
    "redirdev",
    "smartcard",
];

/// What is below `<graphics>` and can be carried over.
const GRAPHICS: [&str; 5] = ["@port", "@tlsPort", "@listen", "@socket", "@autoport"];

/// Whom a difference at this place concerns. `old` and `new` are its values, or all of an element that only one XML has.
pub(super) fn class_of(place: &[String], old: Option<&str>, new: Option<&str>) -> Class {
    let place: Vec<&str> = place.iter().map(String::as_str).collect();
    match place.as_slice() {
        ["devices", device, "@type" | "source" | "protocol", ..]
            if CHARACTER_DEVICES.contains(device) =>
        {
            return Backend;
        }
        ["devices", device, "log", ..] if CHARACTER_DEVICES.contains(device) => return Host,
        // Somebody can look at the guest at another place, or not at all.
        ["devices", "graphics"] if new.is_none() => return Backend,
        ["devices", "graphics", "listen", ..] => return Backend,
        ["devices", "graphics", attribute] if GRAPHICS.contains(attribute) => return Backend,
        ["devices", "graphics", ..] => return Host,
        ["devices", "tpm", "backend", "@version"] => return Abi,
        ["devices", "tpm", "backend", ..] => return Host,
        // The guest sees whether its disk has a write cache, not which cache the host has for it.
        ["devices", "disk", "driver", "@cache"] => {
            return match has_write_cache(old) == has_write_cache(new) {
                true => Host,
                false => Abi,
            };
        }
        _ => {}
    }
    let rule = RULES.iter().find(|(rule, _)| fits(rule, &place));
    rule.map_or(Abi, |(_, class)| *class)
}

fn has_write_cache(cache: Option<&str>) -> bool {
    !matches!(cache, Some("writethrough" | "directsync"))
}

fn fits(rule: &str, place: &[&str]) -> bool {
    let mut place = place.iter();
    for part in rule.split('/') {
        match (part, place.next()) {
            ("**", _) => return true,
            ("*", Some(_)) => {}
            (part, Some(name)) if part == *name => {}
            _ => return false,
        }
    }
    place.next().is_none()
}

/// Whether a difference inside this element is told as one.
pub(super) fn is_told_as_a_whole(place: &[String]) -> bool {
    matches!(place, [name] if name == "metadata")
}

/// Whether the order of elements of this name means something.
pub(super) fn is_ordered(name: &str) -> bool {
    matches!(
        name,
        "boot" | "qemu:arg" | "qemu:env" | "entry" | "bootmenu"
    )
}
