//! Disks, CD-ROM and floppy drives.

use super::address::{DeviceInfo, VirtioOptions};
use super::disk_source::{DiskImage, read_disk_image, read_mirror};
use super::view::View;
use super::word::words;

words! {
    /// What a disk is to the guest.
    DiskDevice {
        Disk = "disk",
        Cdrom = "cdrom",
        Floppy = "floppy",
        /// A SCSI device of the host, passed through.
        Lun = "lun",
    }
}

words! {
    /// What a disk hangs on.
    DiskBus {
        Ide = "ide",
        Scsi = "scsi",
        Virtio = "virtio",
        Usb = "usb",
        Sata = "sata",
        Fdc = "fdc",
    }
}

words! {
    /// Which virtio a device speaks.
    VirtioModel {
        Virtio = "virtio",
        VirtioTransitional = "virtio-transitional",
        VirtioNonTransitional = "virtio-non-transitional",
    }
}

words! {
    /// How a disk is cached.
    CacheMode {
        Default = "default",
        None = "none",
        WriteThrough = "writethrough",
        WriteBack = "writeback",
        DirectSync = "directsync",
        Unsafe = "unsafe",
    }
}

words! {
    /// How QEMU reads and writes.
    DiskIo {
        Native = "native",
        Threads = "threads",
        IoUring = "io_uring",
    }
}

words! {
    /// What becomes of an error.
    ErrorPolicy {
        Stop = "stop",
        Report = "report",
        Ignore = "ignore",
        Enospace = "enospace",
    }
}

words! {
    /// What becomes of a discard.
    Discard {
        Unmap = "unmap",
        Ignore = "ignore",
    }
}

words! {
    /// Whether zeros are found in what the guest writes.
    DetectZeroes {
        Off = "off",
        On = "on",
        Unmap = "unmap",
    }
}

/// `<disk>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Alias, address, place in the boot order.
    pub info: DeviceInfo,
    /// What it is to the guest; disk without it.
    pub device: DiskDevice,
    /// `model=`.
    pub model: Option<VirtioModel>,
    /// `rawio=`: whether QEMU needs the right to raw I/O.
    pub raw_io: Option<bool>,
    /// Its image; `None` for a drive without a medium.
    pub image: Option<DiskImage>,
    /// `<target dev>`: `vda`.
    pub target: String,
    /// `<target bus>`; told by the name, `vd`, `sd`, …, without it. Always there once the domain is expanded.
    pub bus: Option<DiskBus>,
    /// `<target tray>`: whether it is open.
    pub is_tray_open: bool,
    /// `<target removable>`.
    pub removable: Option<bool>,
    /// `<target rotation_rate>`.
    pub rotation_rate: Option<u32>,
    /// `<driver>`, but for the image's format.
    pub driver: DiskDriver,
    /// `<serial>`.
    pub serial: Option<String>,
    /// `<wwn>`, without `0x`.
    pub wwn: Option<String>,
    /// `<vendor>`.
    pub vendor: Option<String>,
    /// `<product>`.
    pub product: Option<String>,
    /// `<readonly/>`; a CD-ROM is read-only without it.
    pub read_only: bool,
    /// `<shareable/>`.
    pub shareable: bool,
    /// `<blockio logical_block_size>`.
    pub logical_block_size: Option<u32>,
    /// `<blockio physical_block_size>`.
    pub physical_block_size: Option<u32>,
    /// `<blockio discard_granularity>`.
    pub discard_granularity: Option<u32>,
    /// `<geometry>`.
    pub geometry: Option<Geometry>,
    /// `<iotune>`: `total_bytes_sec` and its like, with their values.
    pub io_tune: Vec<(&'static str, u64)>,
}

/// `<driver>` of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskDriver {
    /// `cache=`.
    pub cache: Option<CacheMode>,
    /// `io=`.
    pub io: Option<DiskIo>,
    /// `error_policy=`.
    pub error_policy: Option<ErrorPolicy>,
    /// `rerror_policy=`.
    pub read_error_policy: Option<ErrorPolicy>,
    /// `ioeventfd=`.
    pub ioeventfd: Option<bool>,
    /// `event_idx=`.
    pub event_idx: Option<bool>,
    /// `copy_on_read=`.
    pub copy_on_read: Option<bool>,
    /// `discard=`.
    pub discard: Option<Discard>,
    /// `detect_zeroes=`.
    pub detect_zeroes: Option<DetectZeroes>,
    /// `discard_no_unref=`.
    pub discard_no_unref: Option<bool>,
    /// `iothread=`.
    pub iothread: Option<u32>,
    /// `queues=`.
    pub queues: Option<u32>,
    /// `queue_size=`.
    pub queue_size: Option<u32>,
    /// `<iothreads>`: the threads, and the queues of each; QEMU 9.0 or later.
    pub iothreads: Vec<(u32, Vec<u32>)>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// `<geometry>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u32,
    /// Heads.
    pub heads: u32,
    /// Sectors.
    pub sectors: u32,
    /// `auto`, `none`, `lba`, `large`, ….
    pub translation: Option<String>,
}

/// What a disk can be throttled by.
const IO_TUNE: [&str; 19] = [
    "total_bytes_sec",
    "read_bytes_sec",
    "write_bytes_sec",
    "total_iops_sec",
    "read_iops_sec",
    "write_iops_sec",
    "total_bytes_sec_max",
    "read_bytes_sec_max",
    "write_bytes_sec_max",
    "total_iops_sec_max",
    "read_iops_sec_max",
    "write_iops_sec_max",
    "size_iops_sec",
    "total_bytes_sec_max_length",
    "read_bytes_sec_max_length",
    "write_bytes_sec_max_length",
    "total_iops_sec_max_length",
    "read_iops_sec_max_length",
    "write_iops_sec_max_length",
];

impl Disk {
    /// Whether QEMU may only read it.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.device == DiskDevice::Cdrom
    }

    /// The number that the name of its target stands for: 0 for `vda`, 26 for `vdaa`; `None` if it follows another form.
    pub fn target_number(&self) -> Option<u32> {
        let letters = ["vd", "sd", "hd", "fd", "xvd", "ubd"]
            .iter()
            .find_map(|prefix| self.target.strip_prefix(prefix))?;
        let letters = letters.trim_end_matches(|c: char| c.is_ascii_digit());
        if letters.is_empty() || letters.len() > 4 {
            return None;
        }
        let mut number = 0_u32;
        for letter in letters.bytes() {
            if !letter.is_ascii_lowercase() {
                return None;
            }
            number = number * 26 + u32::from(letter - b'a') + 1;
        }
        Some(number - 1)
    }
}

/// The places of disks in their list, in the order in which libvirt would have them: by bus, then by the names of targets.
pub fn in_order(disks: &[Disk]) -> Vec<usize> {
    let mut ordered: Vec<usize> = Vec::with_capacity(disks.len());
    for (number, disk) in disks.iter().enumerate() {
        let mut place = ordered.len();
        for (at, other) in ordered.iter().enumerate().rev() {
            let Some(other) = disks.get(*other).filter(|other| other.bus == disk.bus) else {
                continue;
            };
            if other.target_number() < disk.target_number() {
                place = at + 1;
                break;
            }
            place = at;
        }
        ordered.insert(place, number);
    }
    ordered
}

pub(super) fn read_disk(view: &View<'_>) -> Option<Disk> {
    view.ignore(&["snapshot", "sgio"]);
    view.ignore_elements(&["privateData"]);
    view.refuse_elements(
        &["transient"],
        "writes that are lost at the end are not modelled",
        Some("run it with --throwaway"),
    );
    view.refuse_elements(
        &["encryption"],
        "its key is libvirt's secret, which nobody else can ask for",
        Some("decrypt it on the host (cryptsetup open), and name the device with type='block'"),
    );
    view.refuse_elements(
        &["auth"],
        "its password is libvirt's secret, which nobody else can ask for",
        Some("let the host connect (rbd map, iscsiadm), and name the device with type='block'"),
    );
    view.refuse_elements(
        &["throttlefilters"],
        "throttle groups are not modelled",
        None,
    );
    read_mirror(view);
    let device = match view.element().get("device") {
        None => {
            view.ignore(&["device"]);
            Some(DiskDevice::Disk)
        }
        Some(_) => view.word("device"),
    };
    let target = view.one("target", read_target);
    if target.is_none() {
        view.error("a disk needs a <target>", None);
    }
    let target = target.unwrap_or_default();
    let image = read_disk_image(view);
    let block_io = view.one("blockio", |block_io| {
        [
            block_io.number("logical_block_size"),
            block_io.number("physical_block_size"),
            block_io.number("discard_granularity"),
        ]
    });
    let [logical_block_size, physical_block_size, discard_granularity] =
        block_io.unwrap_or_default();
    Some(Disk {
        info: view.device_info(),
        device: device?,
        model: view.word("model"),
        raw_io: view.switch("rawio"),
        image,
        target: target.name,
        bus: target.bus,
        is_tray_open: target.is_tray_open,
        removable: target.removable,
        rotation_rate: target.rotation_rate,
        driver: view.one("driver", read_driver).unwrap_or_default(),
        serial: view.child_text("serial"),
        wwn: view.child_text("wwn"),
        vendor: view.child_text("vendor"),
        product: view.child_text("product"),
        read_only: view.has("readonly"),
        shareable: view.has("shareable"),
        logical_block_size,
        physical_block_size,
        discard_granularity,
        geometry: view.one("geometry", |geometry| Geometry {
            cylinders: geometry.number("cyls").unwrap_or(0),
            heads: geometry.number("heads").unwrap_or(0),
            sectors: geometry.number("secs").unwrap_or(0),
            translation: geometry.attribute("trans"),
        }),
        io_tune: view.one("iotune", read_io_tune).unwrap_or_default(),
    })
}

#[derive(Default)]
struct Target {
    name: String,
    bus: Option<DiskBus>,
    is_tray_open: bool,
    removable: Option<bool>,
    rotation_rate: Option<u32>,
}

fn read_target(view: &View<'_>) -> Target {
    let name = view.required("dev");
    let bus = view.word("bus");
    let told = match name.get(..2) {
        _ if view.element().get("bus").is_some() => bus,
        Some("vd") => Some(DiskBus::Virtio),
        Some("sd") => Some(DiskBus::Scsi),
        Some("hd") => Some(DiskBus::Ide),
        Some("fd") => Some(DiskBus::Fdc),
        _ => {
            view.error(
                format!("target {name:?} tells no bus, and there is no bus="),
                None,
            );
            None
        }
    };
    let tray = view.attribute("tray");
    if tray
        .as_deref()
        .is_some_and(|tray| !matches!(tray, "open" | "closed"))
    {
        view.error("tray is none of open, closed", None);
    }
    Target {
        name,
        bus: told,
        is_tray_open: tray.as_deref() == Some("open"),
        removable: view.switch("removable"),
        rotation_rate: view.number("rotation_rate"),
    }
}

fn read_driver(view: &View<'_>) -> DiskDriver {
    // The format is read with the image.
    view.ignore(&["name", "type"]);
    view.ignore_elements(&["metadata_cache"]);
    view.refuse_elements(
        &["statistics"],
        "statistics of latencies are not modelled",
        None,
    );
    DiskDriver {
        cache: view.word("cache"),
        io: view.word("io"),
        error_policy: view.word("error_policy"),
        read_error_policy: view.word("rerror_policy"),
        ioeventfd: view.switch("ioeventfd"),
        event_idx: view.switch("event_idx"),
        copy_on_read: view.switch("copy_on_read"),
        discard: view.word("discard"),
        detect_zeroes: view.word("detect_zeroes"),
        discard_no_unref: view.switch("discard_no_unref"),
        iothread: view.number("iothread"),
        queues: view.number("queues"),
        queue_size: view.number("queue_size"),
        iothreads: view
            .one("iothreads", |threads| {
                threads.each("iothread", |thread| {
                    let queues = thread.each_some("queue", |queue| queue.number("id"));
                    (thread.number("id").unwrap_or(0), queues)
                })
            })
            .unwrap_or_default(),
        virtio: view.virtio_options(),
    }
}

fn read_io_tune(view: &View<'_>) -> Vec<(&'static str, u64)> {
    view.leave_out_elements(
        &["group_name"],
        "disks that are throttled together are throttled each alone",
    );
    let mut all = Vec::new();
    for name in IO_TUNE {
        if let Some(value) = view.one_some(name, View::text_number::<u64>)
            && value != 0
        {
            all.push((name, value));
        }
    }
    all
}
