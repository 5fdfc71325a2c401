//! Devices of the host's in the guest.

use super::json::Json;
use super::line::Line;
use crate::config::domain::hostdevs::{Hostdev, HostdevSource};

/// Adds the devices. A guest that has one runs, and cannot be saved.
pub(super) fn hostdevs(line: &mut Line<'_>, hostdevs: &[Hostdev]) {
    for hostdev in hostdevs {
        if hostdev.managed == Some(true) {
            line.warning(
                &hostdev.info,
                "the host's driver has to be taken off the device before",
            );
        }
        let info = &hostdev.info;
        match &hostdev.source {
            HostdevSource::Pci { address } => {
                line.device(
                    Json::device("vfio-pci").with("host", address.as_str()),
                    info,
                );
            }
            HostdevSource::Mdev { uuid, model } => {
                if model != "vfio-pci" {
                    line.error(
                        info,
                        format!("model {model:?} is not for x86"),
                        Some("use model='vfio-pci'"),
                    );
                }
                let has_ramfb = hostdev.ramfb == Some(true);
                let driver = if has_ramfb {
                    "vfio-pci-nohotplug"
                } else {
                    "vfio-pci"
                };
                let device = Json::device(driver)
                    .with("sysfsdev", format!("/sys/bus/mdev/devices/{uuid}"))
                    .with_switch("display", hostdev.display)
                    .with_some("ramfb", has_ramfb.then_some(true));
                line.device(device, info);
            }
            HostdevSource::Usb { id, place, .. } => {
                let device = match (place, id) {
                    (Some((bus, device)), _) => Json::device("usb-host")
                        .with("hostbus", *bus)
                        .with("hostaddr", *device),
                    (None, Some((vendor, product))) => Json::device("usb-host")
                        .with("vendorid", *vendor)
                        .with("productid", *product),
                    (None, None) => {
                        line.error(info, "which USB device it is is not told", None);
                        continue;
                    }
                };
                line.usb_device(device, info);
            }
            HostdevSource::Scsi { .. } => {
                let why = "which device file a SCSI device has only the host knows";
                line.error(
                    info,
                    why,
                    Some("use <disk type='block' device='lun'> with the device file"),
                );
            }
            HostdevSource::ScsiHost { wwpn } => {
                line.device(
                    Json::device("vhost-scsi-pci").with("wwpn", wwpn.as_str()),
                    info,
                );
            }
        }
    }
}
