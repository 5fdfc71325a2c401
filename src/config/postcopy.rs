//! What in the arguments of a QEMU forbids that its guest runs before its memory is there.
//!
//! Memory that arrives late needs a userfaultfd over anonymous memory or memory files of ordinary pages, and nobody but QEMU
//! who looks into it: a device in another process, or on real hardware, would find what is not there yet.
//!
//! | code | says |
//! |---|---|
//! | `lazy.userfaultfd` | this user may not use userfaultfd, or the kernel has none |
//! | `lazy.memory` | memory of huge pages, or in a file |
//! | `lazy.device` | a device that reaches guest memory past QEMU |
//!
//! Source: QEMU `migration/postcopy-ram.c`, `postcopy_ram_supported_by_host`; `hw/virtio/vhost-user.c`; seen with 7.2 and 10.0.

use super::arguments::{Argument, Arguments};
use super::compat::Finding;

/// Devices that share guest memory with another process or with hardware; names begin with these.
const REACHING_DEVICES: [&str; 6] = [
    "vhost-user",
    "vfio-",
    "ivshmem",
    "nvdimm",
    "virtio-pmem",
    "vhost-vdpa",
];

/// Objects whose memory cannot arrive late whatever their other properties.
const FILE_BACKENDS: [&str; 2] = ["memory-backend-file", "memory-backend-epc"];

/// Every reason against it; empty if there is none. `allows_userfaultfd` says why the host does not allow it.
pub fn obstacles(arguments: &Arguments, userfaultfd: Option<&str>) -> Vec<Finding> {
    let of_host = userfaultfd.map(|why| {
        let fix = "sysctl vm.unprivileged_userfaultfd=1, or run vmstow as root";
        finding("lazy.userfaultfd", why.to_owned(), fix)
    });
    let of_guest = arguments.items.iter().filter_map(obstacle);
    of_host.into_iter().chain(of_guest).collect()
}

fn obstacle(argument: &Argument) -> Option<Finding> {
    const EAGER: &str = "restore without --lazy";
    let memory = |what: &str| {
        let fact = format!("{} keeps guest memory in {what}", argument.shown());
        Some(finding("lazy.memory", fact, EAGER))
    };
    let properties = argument.properties();
    match argument.name()? {
        "mem-path" => memory("files"),
        "object" => {
            let kind = properties.get("qom-type")?;
            match () {
                () if FILE_BACKENDS.contains(&kind.as_str()) => memory("a file"),
                () if properties.is_on("hugetlb") => memory("huge pages"),
                () => None,
            }
        }
        "device" => {
            let driver = properties.get("driver")?;
            reaches(&driver).then(|| device(argument, EAGER))
        }
        "netdev" => {
            let kind = properties.get("type")?;
            reaches(&kind).then(|| device(argument, EAGER))
        }
        _ => None,
    }
}

fn reaches(name: &str) -> bool {
    REACHING_DEVICES
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

fn device(argument: &Argument, fix: &str) -> Finding {
    let shown = argument.shown();
    let fact = format!("{shown} reaches guest memory past QEMU, before that has arrived");
    finding("lazy.device", fact, fix)
}

fn finding(code: &'static str, fact: String, fix: &str) -> Finding {
    Finding::refusal(code, fact, fix.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(words: &[&str]) -> Vec<&'static str> {
        let words = [&["qemu-system-x86_64"], words].concat();
        let arguments = Arguments::parse(&words).unwrap();
        let found = obstacles(&arguments, None);
        found.iter().map(|finding| finding.code).collect()
    }

    #[test]
    fn ordinary_guests_have_no_obstacle() {
        let memfd = "memory-backend-memfd,id=m,size=1G,share=on";
        let words = [
            "-m",
            "1G",
            "-object",
            memfd,
            "-device",
            "virtio-net-pci,netdev=n",
            "-netdev",
            "user,id=n",
        ];
        assert_eq!(codes(&words), [""; 0]);
    }

    #[test]
    fn memory_and_devices_that_cannot_wait_are_named() {
        let file = "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages";
        assert_eq!(codes(&["-object", file]), ["lazy.memory"]);
        let huge = r#"{"qom-type":"memory-backend-memfd","id":"m","size":1,"hugetlb":true}"#;
        assert_eq!(codes(&["-object", huge]), ["lazy.memory"]);
        assert_eq!(codes(&["-mem-path", "/mnt"]), ["lazy.memory"]);
        assert_eq!(
            codes(&["-device", "vhost-user-fs-pci,chardev=c"]),
            ["lazy.device"]
        );
        assert_eq!(
            codes(&["-device", "vfio-pci,host=01:00.0"]),
            ["lazy.device"]
        );
        assert_eq!(codes(&["-netdev", "vhost-user,chardev=c"]), ["lazy.device"]);
    }

    #[test]
    fn a_host_without_userfaultfd_is_named_too() {
        let arguments = Arguments::parse(&["qemu"]).unwrap();
        let found = obstacles(&arguments, Some("no"));
        assert_eq!(found[0].code, "lazy.userfaultfd");
    }
}
