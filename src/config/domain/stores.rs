//! Devices that keep or work on data for the guest: persistent stores, virtio's cryptography.

use super::address::{DeviceInfo, VirtioOptions};
use super::view::View;

/// `<pstore>`: where a kernel keeps its last words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PersistentStore {
    /// Alias and address.
    pub info: DeviceInfo,
    /// The file.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
}

/// `<crypto>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CryptoDevice {
    /// Alias and address.
    pub info: DeviceInfo,
    /// Whether the host's kernel does the work (`lkcf`), QEMU itself otherwise.
    pub is_of_kernel: bool,
    /// `<backend queues>`.
    pub queues: Option<u32>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

pub(super) fn read_persistent_store(view: &View<'_>) -> Option<PersistentStore> {
    let backend = view.required("backend");
    if !matches!(backend.as_str(), "" | "acpi-erst") {
        view.error("its backend can be acpi-erst only", None);
    }
    let path = view.child_text("path");
    let size = view.one_some("size", View::size);
    if path.is_none() || size.is_none() {
        view.error("it needs a <path> and a <size>", None);
    }
    Some(PersistentStore {
        info: view.device_info(),
        path: path?,
        size: size?,
    })
}

pub(super) fn read_crypto_device(view: &View<'_>) -> Option<CryptoDevice> {
    for (attribute, value) in [("model", "virtio"), ("type", "qemu")] {
        let said = view.required(attribute);
        if !said.is_empty() && said != value {
            view.error(format!("its {attribute} can be {value} only"), None);
        }
    }
    let backend = view.one_some("backend", |backend| {
        let model = backend.required("model");
        let is_of_kernel = match model.as_str() {
            "builtin" | "" => false,
            "lkcf" => true,
            other => {
                backend.error(format!("model {other:?} is none of builtin, lkcf"), None);
                false
            }
        };
        Some((is_of_kernel, backend.number("queues")))
    });
    if backend.is_none() {
        view.error("it needs a <backend>", None);
    }
    let (is_of_kernel, queues) = backend?;
    Some(CryptoDevice {
        info: view.device_info(),
        is_of_kernel,
        queues,
        virtio: view.virtio_driver(),
    })
}
