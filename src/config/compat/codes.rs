//! The codes of all findings: what they say, how bad they are, and whether a user may override them.
//!
//! The table in `spec/findings.md` is this one; a test holds the two against each other.

use super::Level;

/// A kind of finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// Its name, which never changes.
    pub code: &'static str,
    /// How bad it is.
    pub level: Level,
    /// Whether `restore --force` may override it: only where QEMU could load the guest all the same.
    pub can_be_forced: bool,
    /// What it says.
    pub says: &'static str,
}

/// A row: a reason that a user may override.
const fn may(code: &'static str, says: &'static str) -> Code {
    let (level, can_be_forced) = (Level::Refusal, true);
    Code {
        code,
        level,
        can_be_forced,
        says,
    }
}

/// A row: a reason that stands.
const fn must(code: &'static str, says: &'static str) -> Code {
    let can_be_forced = false;
    Code {
        can_be_forced,
        ..may(code, says)
    }
}

/// A row: a doubt.
const fn doubt(code: &'static str, says: &'static str) -> Code {
    let level = Level::Warning;
    Code {
        level,
        ..must(code, says)
    }
}

/// Every code.
pub const CODES: &[Code] = &[
    must(
        "qemu.missing",
        "there is no QEMU, or what was named is none",
    ),
    must("qemu.too-old", "this kind of restore needs a newer QEMU"),
    doubt(
        "qemu.older",
        "QEMU is older than the one that the guest was saved by",
    ),
    must(
        "qemu.refuses",
        "QEMU does not start with the guest's arguments: it lacks a device, a CPU model or a property",
    ),
    must("machine.unknown", "QEMU lacks the machine type"),
    may("machine.other", "the machine would be of another type"),
    must("accel.missing", "the accelerator does not work here"),
    may("accel.other", "the guest would have another accelerator"),
    may("cpu.model", "the guest would have another CPU model"),
    may(
        "cpu.flag.missing",
        "its processors would lack features that the guest saw",
    ),
    doubt(
        "cpu.flag.added",
        "its processors would have features that the guest did not see",
    ),
    may(
        "cpu.count",
        "it would have more or fewer processors; QEMU loads more in silence",
    ),
    may(
        "cpu.max",
        "another number of processors could be plugged in; QEMU says nothing",
    ),
    may(
        "device.missing",
        "it would lack a device that the guest was saved with",
    ),
    may(
        "device.surplus",
        "it would have a device that the guest never saw; QEMU says nothing",
    ),
    may("device.moved", "a device would have another address"),
    may("device.other", "a device would have other properties"),
    may(
        "ramblock.length",
        "a RAMBlock would have another size: the guest's memory, a video card's",
    ),
    may("ramblock.missing", "a RAMBlock would not be there"),
    may(
        "ramblock.surplus",
        "there would be a RAMBlock that the guest did not have",
    ),
    may("rom.length", "a ROM has another size in this QEMU"),
    may(
        "section.version",
        "a device's state is of a newer version than this QEMU reads",
    ),
    may(
        "section.unknown",
        "a device's state has a part that this QEMU does not know",
    ),
    doubt(
        "target.unknown",
        "what this QEMU would have could not be compared",
    ),
    may("file.missing", "a file that the guest uses is not there"),
    may("file.permission", "a file may not be read or written"),
    may(
        "file.changed",
        "a firmware or kernel has another size or digest",
    ),
    must(
        "directory.missing",
        "the directory is not there from which the guest's relative paths start",
    ),
    may("disk.changed", "a disk has another size or digest"),
    may("disk.written", "a disk was written to since the save"),
    may(
        "disk.replaced",
        "another file, written later, lies in the disk's place",
    ),
    may("disk.rolled-back", "a disk is older than at the save"),
    doubt(
        "disk.unproven",
        "nothing proves that a disk is what it was: it was copied from elsewhere, or its inode was changed",
    ),
    must(
        "disk.drifted",
        "the guest ran on with the disk after the save",
    ),
    may("socket.busy", "somebody listens on a socket of the guest"),
    may("port.busy", "a port of the guest is in use"),
    may("interface.missing", "a bridge is not there"),
    must("map.qemu", "this QEMU cannot map memory from an image"),
    must("map.memory", "the guest's memory cannot be mapped"),
    must(
        "lazy.userfaultfd",
        "this user may not use userfaultfd, or the kernel has none",
    ),
    must(
        "lazy.memory",
        "memory of huge pages, or in a file, cannot arrive late",
    ),
    must("lazy.device", "a device reaches guest memory past QEMU"),
    doubt("memory.short", "less memory is free than the guest has"),
    must(
        "image.untrusted",
        "nobody you trust signed the image, and it names resources of this host",
    ),
    must("boot.failed", "QEMU did not load the guest in a trial"),
    doubt("boot.untried", "the guest could not be loaded on trial"),
    doubt(
        "remap.slirp-state",
        "another network than QEMU's own loses its open connections",
    ),
    doubt(
        "remap.nic-offloads",
        "a NIC may have used what its other network does not offer",
    ),
];

/// The row of a code.
pub fn find(code: &str) -> Option<&'static Code> {
    CODES.iter().find(|row| row.code == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_stands_once_in_the_table_and_no_doubt_needs_force() {
        for (index, row) in CODES.iter().enumerate() {
            let others = CODES.iter().skip(index + 1);
            assert!(
                others.clone().all(|other| other.code != row.code),
                "{row:?}"
            );
            assert!(row.level == Level::Refusal || !row.can_be_forced, "{row:?}");
        }
    }
}
