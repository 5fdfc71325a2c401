//! Persistent stores and virtio's cryptography.

use super::controllers::virtio_device;
use super::json::Json;
use super::line::{Line, id};
use crate::config::domain::Devices;
use crate::config::domain::stores::{CryptoDevice, PersistentStore};

/// Adds cryptographic devices.
pub(super) fn crypto_devices(line: &mut Line<'_>, devices: &Devices) {
    for device in &devices.crypto_devices {
        crypto_device(line, device);
    }
}

fn crypto_device(line: &mut Line<'_>, device: &CryptoDevice) {
    let backend = format!("obj{}", id(&device.info));
    let kind = if device.is_of_kernel {
        "cryptodev-backend-lkcf"
    } else {
        "cryptodev-backend-builtin"
    };
    line.object(Json::object(kind, &backend).with_some("queues", device.queues));
    line.warning(
        &device.info,
        "QEMU cannot migrate such a device, so the guest cannot be saved",
    );
    let virtio = virtio_device("virtio-crypto", None, device.virtio).with("cryptodev", backend);
    line.device(virtio, &device.info);
}

/// Adds persistent stores; their contents are part of the guest's saved memory.
pub(super) fn persistent_stores(line: &mut Line<'_>, devices: &Devices) {
    for store in &devices.persistent_stores {
        persistent_store(line, store);
    }
}

fn persistent_store(line: &mut Line<'_>, store: &PersistentStore) {
    let memory = format!("mem{}", id(&store.info));
    let object = Json::object("memory-backend-file", &memory)
        .with("mem-path", store.path.as_str())
        .with("size", store.size)
        .with("share", true);
    line.object(object);
    line.device(
        Json::device("acpi-erst").with("memdev", memory),
        &store.info,
    );
}
