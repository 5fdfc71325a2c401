//! `<crypto>` and `<pstore>`.

use super::Story;
use super::devices::{Device, VIRTIO_PROPERTIES, alias, virtio_driver};
use crate::config::xml::Element;

impl Story<'_> {
    pub(super) fn stores(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        let mut stores = 0;
        for device in self.all_devices() {
            let written = match device.1.get("driver").as_deref() {
                Some("virtio-crypto-pci") => self.crypto_device(&device),
                Some("acpi-erst") => {
                    let store = self.persistent_store(&device, stores);
                    stores += usize::from(store.is_some());
                    store
                }
                _ => continue,
            };
            found.extend(written);
        }
        found
    }

    fn crypto_device(&mut self, (index, device): &Device) -> Option<Element> {
        let (backend_index, backend) = self.object(&device.get("cryptodev")?)?;
        let model = match backend.get("qom-type")?.as_str() {
            "cryptodev-backend-builtin" => "builtin",
            "cryptodev-backend-lkcf" => "lkcf",
            _ => return None,
        };
        self.tell(backend_index, &backend, &["qom-type", "id", "queues"]);
        let known = ["driver", "id", "bus", "addr", "cryptodev"];
        self.tell(*index, device, &[&known[..], &VIRTIO_PROPERTIES].concat());
        let backend = Element::new("backend")
            .attribute("model", model)
            .attribute_if("queues", backend.get("queues"));
        let written = Element::new("crypto")
            .attribute("model", "virtio")
            .attribute("type", "qemu")
            .child(backend)
            .children(virtio_driver(device))
            .children(alias(device));
        Some(written.children(self.address(device)))
    }

    /// The state knows its memory by the name that libvirt gives it, which follows from the device's: others have no words.
    fn persistent_store(&mut self, (index, device): &Device, number: usize) -> Option<Element> {
        let id = format!("pstore{number}");
        let memdev = device.get("memdev")?;
        if device.get("id")? != id || memdev != format!("mem{id}") {
            return None;
        }
        let (memory_index, memory) = self.object(&memdev)?;
        if memory.get("qom-type")? != "memory-backend-file" || !memory.is_on("share") {
            return None;
        }
        let path = super::absolute(&self.facts.directory, memory.get("mem-path")?);
        let size = memory.get("size")?.parse::<u64>().ok()?;
        let known = ["qom-type", "id", "mem-path", "size", "share"];
        self.tell(memory_index, &memory, &known);
        self.tell(*index, device, &["driver", "id", "bus", "addr", "memdev"]);
        let written = Element::new("pstore")
            .attribute("backend", "acpi-erst")
            .child(Element::with_text("path", path))
            .child(Element::with_text("size", size).attribute("unit", "b"));
        Some(written.children(self.address(device)))
    }
}
