//! `-machine`, `-accel`, `-global`.

use super::json::Pairs;
use super::line::Line;
use super::memory::RAM;
use super::{boot, disk_nodes, sound};
use crate::config::domain::controllers::{ControllerKind, PciModel};
use crate::config::domain::features::{IoApic, TimerName};
use crate::config::domain::memory::MemoryModel;
use crate::config::domain::os::BootDevice;
use crate::config::domain::platform::IommuModel;
use crate::config::domain::{Domain, DomainType};

/// Adds the machine.
pub(super) fn machine(line: &mut Line<'_>, domain: &Domain) {
    let features = &domain.features;
    if !domain.is_q35() && !domain.is_i440fx() {
        let name = domain.os.machine.as_deref().unwrap_or_default();
        let why = format!("machine type {name:?} is neither of the q35 nor of the i440fx family");
        line.error_at(
            "domain/os/type/@machine",
            domain.os.line,
            why,
            Some("use q35"),
        );
    }
    let (code, vars) = disk_nodes::flash_names(&domain.os);
    let is_numa = domain.cpu.as_ref().is_some_and(|cpu| !cpu.numa.is_empty());
    let timer = |name| {
        let mut timers = domain.clock.timers.iter();
        timers
            .find(|timer| timer.name == name)
            .and_then(|timer| timer.present)
    };
    let has_nvdimm = domain
        .devices
        .memory_modules
        .iter()
        .any(|module| module.model == MemoryModel::Nvdimm);
    let machine = Pairs::new(domain.os.machine.as_deref().unwrap_or_default())
        .with("usb", "off")
        .with_switch("vmport", features.vmport)
        .with_switch("smm", smm(domain))
        .with_some("kernel_irqchip", kernel_irqchip(domain))
        .with_switch(
            "dump-guest-core",
            Some(domain.memory.dump_core == Some(true)),
        )
        .with_switch(
            "mem-merge",
            domain.memory.backing.no_share_pages.then_some(false),
        )
        .with_switch("nvdimm", has_nvdimm.then_some(true))
        .with_switch("graphics", boot::is_bios_serial(domain).then_some(false))
        .with_some("pflash0", code)
        .with_some("pflash1", vars)
        .with_some("pcspk-audiodev", sound::speaker(domain))
        .with_some("memory-backend", (!is_numa).then_some(RAM))
        .with_switch("hpet", timer(TimerName::Hpet))
        .with_switch("acpi", Some(features.acpi))
        .with_switch("i8042", features.ps2);
    line.pairs("machine", machine);
}

/// SMM as the domain says; a secure flash needs it.
fn smm(domain: &Domain) -> Option<bool> {
    let is_secure = domain
        .os
        .loader
        .as_ref()
        .is_some_and(|loader| loader.secure == Some(true));
    domain.features.smm.or(is_secure.then_some(true))
}

/// Interrupt remapping needs an interrupt controller that is QEMU's, at least in part.
fn kernel_irqchip(domain: &Domain) -> Option<&'static str> {
    if domain.kind != DomainType::Kvm {
        return None;
    }
    let is_remapped = domain.devices.iommu.as_ref().is_some_and(|iommu| {
        iommu.model == IommuModel::Intel && iommu.interrupt_remapping == Some(true)
    });
    match domain.features.ioapic {
        Some(IoApic::Kvm) => Some("on"),
        Some(IoApic::Qemu) => Some("split"),
        None => is_remapped.then_some("split"),
    }
}

/// Who runs the guest's instructions.
pub(super) fn accelerator(domain: &Domain) -> String {
    match (domain.kind, domain.features.kvm.dirty_ring) {
        (DomainType::Qemu, _) => "tcg".to_owned(),
        (DomainType::Kvm, None) => "kvm".to_owned(),
        (DomainType::Kvm, Some(size)) => format!("kvm,dirty-ring-size={size}"),
    }
}

/// Adds properties of devices that the machine itself brings.
pub(super) fn globals(line: &mut Line<'_>, domain: &Domain) {
    if let Some(tseg) = domain.features.tseg {
        line.global("mch", "extended-tseg-mbytes", tseg >> 20);
    }
    if domain
        .os
        .loader
        .as_ref()
        .is_some_and(|loader| loader.secure == Some(true))
    {
        line.option("global", "driver=cfi.pflash01,property=secure,value=on");
    }
    for controller in &domain.devices.controllers {
        let ControllerKind::Pci(pci) = &controller.kind else {
            continue;
        };
        let host = match pci.model {
            Some(PciModel::PciRoot) => "i440FX-pcihost",
            Some(PciModel::PcieRoot) => "q35-pcihost",
            _ => continue,
        };
        if let Some(size) = pci.hole64 {
            line.global(host, "pci-hole64-size", format!("{}K", size >> 10));
        }
    }
    floppy_boot(line, domain);
}

/// A floppy drive's place in the boot order is its controller's property.
fn floppy_boot(line: &mut Line<'_>, domain: &Domain) {
    let has_floppy = domain.os.boot.contains(&BootDevice::Floppy);
    for disk in &domain.devices.disks {
        let (Some(index), true) = (disk.info.boot_index, super::disks::is_floppy(disk)) else {
            continue;
        };
        let drive = match disk.info.drive() {
            Some(address) if address.unit == 1 => "bootindexB",
            _ => "bootindexA",
        };
        line.global("isa-fdc", drive, index);
    }
    if has_floppy && !domain.devices.disks.iter().any(super::disks::is_floppy) {
        line.warning_at(
            "domain/os/boot",
            domain.os.line,
            "there is no floppy to boot from",
        );
    }
}
