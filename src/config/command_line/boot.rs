//! How the guest boots: firmware tables, the boot order, a kernel of its own.

use super::json::{Json, Pairs, on_off};
use super::line::Line;
use crate::config::domain::Domain;
use crate::config::domain::os::{Os, SmbiosMode, SysInfoContent};
use crate::config::properties::escape;

/// Adds SMBIOS tables, files of firmware, ACPI tables and the generation id.
pub(super) fn firmware_tables(line: &mut Line<'_>, domain: &Domain) {
    let is_told = match domain.os.smbios {
        Some(SmbiosMode::Host) => {
            let why = "the tables of the host are not read";
            line.error_at(
                "domain/os/smbios",
                domain.os.line,
                why,
                Some("write them down as <sysinfo>, with mode='sysinfo'"),
            );
            false
        }
        Some(SmbiosMode::Sysinfo) => true,
        Some(SmbiosMode::Emulate) | None => false,
    };
    for sysinfo in &domain.sysinfo {
        match &sysinfo.content {
            SysInfoContent::Smbios {
                bios,
                system,
                base_board,
                chassis,
                oem_strings,
            } => {
                if !is_told {
                    line.warning_at(
                        "domain/sysinfo",
                        sysinfo.line,
                        "the guest is not told of it without <smbios mode='sysinfo'/>",
                    );
                    continue;
                }
                table(line, 0, bios);
                table(line, 1, system);
                for board in base_board {
                    table(line, 2, board);
                }
                table(line, 3, chassis);
                if !oem_strings.is_empty() {
                    let strings = oem_strings.iter();
                    let table = strings.fold(Pairs::new("type=11"), |table, text| {
                        table.with("value", text)
                    });
                    line.pairs("smbios", table);
                }
            }
            SysInfoContent::Fwcfg { entries } => {
                for entry in entries {
                    let file = Pairs::new("")
                        .with("name", &entry.name)
                        .with_some("file", entry.file.as_deref());
                    let string = entry.value.as_deref().filter(|_| entry.file.is_none());
                    line.pairs("fw_cfg", file.with_some("string", string));
                }
            }
        }
    }
    for table in &domain.os.acpi_tables {
        match table.kind.as_str() {
            "slic" => line.option(
                "acpitable",
                format!("sig=SLIC,file={}", escape(&table.path)),
            ),
            "raw" | "rawset" => line.option("acpitable", format!("file={}", escape(&table.path))),
            other => {
                let why = format!("type {other:?} is none of slic, raw, rawset");
                line.error_at("domain/os/acpi/table", table.line, why, None);
            }
        }
    }
    if let Some(generation) = domain.generation {
        let guid = generation.map_or_else(|| "auto".to_owned(), |guid| guid.to_string());
        line.plain_device(
            Json::device("vmgenid")
                .with("guid", guid)
                .with("id", "vmgenid0"),
        );
    }
    if domain.features.vmcoreinfo == Some(true) {
        line.plain_device(Json::device("vmcoreinfo"));
    }
}

fn table(line: &mut Line<'_>, kind: u8, entries: &[(String, String)]) {
    if entries.is_empty() {
        return;
    }
    let mut value = Pairs::new(&format!("type={kind}"));
    for (name, text) in entries {
        value.push(name, text);
    }
    line.pairs("smbios", value);
}

/// Adds the boot menu and the like; the order is in the devices.
pub(super) fn boot(line: &mut Line<'_>, domain: &Domain) {
    let os = &domain.os;
    let mut value = Pairs::new("");
    if let Some(menu) = &os.boot_menu {
        if let Some(is_shown) = menu.enabled {
            value.push("menu", on_off(is_shown));
        }
        if let Some(timeout) = menu.timeout {
            value.push("splash-time", timeout);
        }
    }
    if let Some(timeout) = os.reboot_timeout {
        value.push("reboot-timeout", timeout);
    }
    line.pairs("boot", value.with("strict", "on"));
}

/// Whether the BIOS talks on the first serial port: it does so when there is no graphics.
pub(super) fn is_bios_serial(domain: &Domain) -> bool {
    domain.os.bios_serial == Some(true)
}

/// Adds a kernel that is booted directly, and a BIOS of the domain's own.
pub(super) fn kernel(line: &mut Line<'_>, os: &Os) {
    if let Some(loader) = &os.loader
        && !super::disk_nodes::is_flash(loader)
        && let Some(path) = &loader.path
    {
        line.option("bios", path.as_str());
    }
    let files = [
        ("kernel", &os.kernel),
        ("initrd", &os.initrd),
        ("append", &os.cmdline),
        ("shim", &os.shim),
        ("dtb", &os.dtb),
    ];
    for (name, value) in files {
        if let Some(value) = value {
            line.option(name, value.as_str());
        }
    }
}
