//! How the guest boots: `<os>`, firmware, `<sysinfo>`.

use super::view::View;
use super::word::words;

words! {
    /// What is booted from.
    BootDevice {
        Floppy = "fd",
        Disk = "hd",
        Cdrom = "cdrom",
        Network = "network",
    }
}

words! {
    /// How a loader is put into the guest.
    LoaderType {
        Rom = "rom",
        Pflash = "pflash",
    }
}

words! {
    /// What SMBIOS tells the guest.
    SmbiosMode {
        Emulate = "emulate",
        Host = "host",
        Sysinfo = "sysinfo",
    }
}

words! {
    /// Firmware that is chosen by descriptors.
    FirmwareKind {
        Bios = "bios",
        Efi = "efi",
    }
}

words! {
    /// The format of a firmware file.
    FirmwareFormat {
        Raw = "raw",
        Qcow2 = "qcow2",
    }
}

/// `<os>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Os {
    /// The line of its element.
    pub line: u32,
    /// `x86_64`.
    pub arch: Option<String>,
    /// The machine type; resolved, never an alias, once the domain is expanded.
    pub machine: Option<String>,
    /// `firmware=`: it is chosen by descriptors.
    pub firmware: Option<FirmwareKind>,
    /// What the firmware has to be able to do.
    pub firmware_features: Vec<FirmwareFeature>,
    /// `<loader>`.
    pub loader: Option<Loader>,
    /// `<nvram>`.
    pub nvram: Option<Nvram>,
    /// A kernel that is booted directly.
    pub kernel: Option<String>,
    /// Its initial RAM disk.
    pub initrd: Option<String>,
    /// Its command line.
    pub cmdline: Option<String>,
    /// Its EFI shim.
    pub shim: Option<String>,
    /// A device tree.
    pub dtb: Option<String>,
    /// A file with ACPI tables (`<acpi><table type='slic'>`).
    pub acpi_tables: Vec<AcpiTable>,
    /// `<boot dev>`, in order.
    pub boot: Vec<BootDevice>,
    /// `<bootmenu>`.
    pub boot_menu: Option<BootMenu>,
    /// `<bios useserial>`.
    pub bios_serial: Option<bool>,
    /// `<bios rebootTimeout>`, in milliseconds; -1 is never.
    pub reboot_timeout: Option<i32>,
    /// `<smbios mode>`.
    pub smbios: Option<SmbiosMode>,
}

/// `<firmware><feature>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareFeature {
    /// The line of its element.
    pub line: u32,
    /// `secure-boot`, `enrolled-keys`.
    pub name: String,
    /// Whether it has to be there, or must not.
    pub enabled: bool,
}

/// `<loader>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loader {
    /// The line of its element.
    pub line: u32,
    /// The file; `None` if the descriptors are to tell.
    pub path: Option<String>,
    /// `type=`; ROM without it.
    pub kind: Option<LoaderType>,
    /// `readonly=`.
    pub read_only: Option<bool>,
    /// `secure=`: only the firmware in SMM writes to the flash.
    pub secure: Option<bool>,
    /// `stateless=`: there is no NVRAM.
    pub stateless: Option<bool>,
    /// `format=`; raw without it.
    pub format: Option<FirmwareFormat>,
}

/// `<nvram>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nvram {
    /// The line of its element.
    pub line: u32,
    /// The file; `None` if one is to be made.
    pub path: Option<String>,
    /// What it is made from where it does not exist.
    pub template: Option<String>,
    /// The format of the template.
    pub template_format: Option<FirmwareFormat>,
    /// Its format; raw without it.
    pub format: Option<FirmwareFormat>,
}

/// An ACPI table in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTable {
    /// The line of its element.
    pub line: u32,
    /// `slic`, `raw` or `rawset`.
    pub kind: String,
    /// The file.
    pub path: String,
}

/// `<bootmenu>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootMenu {
    /// Whether there is one.
    pub enabled: Option<bool>,
    /// How long it is shown, in milliseconds.
    pub timeout: Option<u32>,
}

/// One `<sysinfo>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SysInfo {
    /// The line of its element.
    pub line: u32,
    /// `smbios` tables, or files that firmware reads.
    pub content: SysInfoContent,
}

/// What a `<sysinfo>` holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SysInfoContent {
    /// `type='smbios'`.
    Smbios {
        /// `-smbios type=0`.
        bios: Vec<(String, String)>,
        /// `-smbios type=1`.
        system: Vec<(String, String)>,
        /// `-smbios type=2`, for each board.
        base_board: Vec<Vec<(String, String)>>,
        /// `-smbios type=3`.
        chassis: Vec<(String, String)>,
        /// `-smbios type=11`.
        oem_strings: Vec<String>,
    },
    /// `type='fwcfg'`.
    Fwcfg {
        /// What `-fw_cfg` is given.
        entries: Vec<FwcfgEntry>,
    },
}

/// One `-fw_cfg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FwcfgEntry {
    /// Its name in the guest.
    pub name: String,
    /// What it holds.
    pub value: Option<String>,
    /// The file that it holds instead.
    pub file: Option<String>,
}

pub(super) fn read_os(view: &View<'_>) -> Os {
    let kind = view.one("type", |kind| {
        if kind.required_text() != "hvm" {
            kind.error("only hvm guests can be run", None);
        }
        (kind.attribute("arch"), kind.attribute("machine"))
    });
    if kind.is_none() {
        view.error("it has no <type>", None);
    }
    let (arch, machine) = kind.unwrap_or_default();
    let bios = view.one("bios", |bios| {
        let timeout = bios.attribute("rebootTimeout");
        let number = timeout.as_deref().and_then(|timeout| timeout.parse().ok());
        if timeout.is_some() && !number.is_some_and(|number| (-1..=0xffff).contains(&number)) {
            bios.error("rebootTimeout is not a number from -1 to 65535", None);
        }
        (bios.switch("useserial"), number)
    });
    Os {
        line: view.line(),
        arch,
        machine,
        firmware: view.word("firmware"),
        firmware_features: view.one("firmware", read_features).unwrap_or_default(),
        loader: view.one("loader", read_loader),
        nvram: view.one("nvram", read_nvram),
        kernel: view.child_text("kernel"),
        initrd: view.child_text("initrd"),
        cmdline: view.child_text("cmdline"),
        shim: view.child_text("shim"),
        dtb: view.child_text("dtb"),
        acpi_tables: view
            .one("acpi", |acpi| acpi.each("table", read_table))
            .unwrap_or_default(),
        boot: view.each_some("boot", |boot| boot.required_word("dev")),
        boot_menu: view.one("bootmenu", |menu| BootMenu {
            enabled: menu.switch("enable"),
            timeout: menu.number("timeout"),
        }),
        bios_serial: bios.and_then(|bios| bios.0),
        reboot_timeout: bios.and_then(|bios| bios.1),
        smbios: view.one_some("smbios", |smbios| smbios.required_word("mode")),
    }
}

fn read_features(view: &View<'_>) -> Vec<FirmwareFeature> {
    view.each("feature", |feature| FirmwareFeature {
        line: feature.line(),
        name: feature.required("name"),
        enabled: feature.switch("enabled").unwrap_or(true),
    })
}

fn read_loader(view: &View<'_>) -> Loader {
    Loader {
        line: view.line(),
        path: view.text(),
        kind: view.word("type"),
        read_only: view.switch("readonly"),
        secure: view.switch("secure"),
        stateless: view.switch("stateless"),
        format: view.word("format"),
    }
}

fn read_nvram(view: &View<'_>) -> Nvram {
    let kind = view.attribute("type");
    if kind.as_deref().is_some_and(|kind| kind != "file") {
        view.error("only an NVRAM in a file can be used", None);
    }
    let source = view.one_some("source", |source| {
        source.ignore(&["index"]);
        source.ignore_elements(&["seclabel"]);
        source.attribute("file")
    });
    Nvram {
        line: view.line(),
        path: source.or_else(|| view.text()),
        template: view.attribute("template"),
        template_format: view.word("templateFormat"),
        format: view.word("format"),
    }
}

fn read_table(view: &View<'_>) -> AcpiTable {
    AcpiTable {
        line: view.line(),
        kind: view.required("type"),
        path: view.required_text(),
    }
}

pub(super) fn read_sysinfo(view: &View<'_>) -> Option<SysInfo> {
    let content = match view.required("type").as_str() {
        "smbios" => SysInfoContent::Smbios {
            bios: view.one("bios", read_entries).unwrap_or_default(),
            system: view.one("system", read_entries).unwrap_or_default(),
            base_board: view.each("baseBoard", read_entries),
            chassis: view.one("chassis", read_entries).unwrap_or_default(),
            oem_strings: view
                .one("oemStrings", |strings| {
                    strings.each("entry", View::required_text)
                })
                .unwrap_or_default(),
        },
        "fwcfg" => SysInfoContent::Fwcfg {
            entries: view.each("entry", |entry| FwcfgEntry {
                name: entry.required("name"),
                value: entry.text(),
                file: entry.attribute("file"),
            }),
        },
        other => {
            view.error(format!("type {other:?} is none of smbios, fwcfg"), None);
            view.skip();
            return None;
        }
    };
    Some(SysInfo {
        line: view.line(),
        content,
    })
}

fn read_entries(view: &View<'_>) -> Vec<(String, String)> {
    view.each("entry", |entry| {
        (entry.required("name"), entry.text().unwrap_or_default())
    })
}
