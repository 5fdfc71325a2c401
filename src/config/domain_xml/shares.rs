//! `<filesystem>`: directories of the host's, by 9p or by a virtiofsd.

use super::Story;
use super::devices::{VIRTIO_PROPERTIES, alias, virtio_attributes, virtio_model};
use crate::config::properties::Properties;
use crate::config::xml::Element;

impl Story<'_> {
    pub(super) fn shares(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let written = match driver.as_str() {
                driver if driver.starts_with("virtio-9p-pci") => self.nine_p(&device),
                "vhost-user-fs-pci" => self.virtiofs(&device),
                _ => continue,
            };
            let Some(written) = written else { continue };
            let written = written.children(alias(&device));
            found.push(written.children(self.address(&device)));
            let known = [
                "driver",
                "id",
                "bus",
                "addr",
                "fsdev",
                "mount_tag",
                "chardev",
                "tag",
            ];
            let known = [&known[..], &["queue-size"], &VIRTIO_PROPERTIES].concat();
            self.tell(index, &device, &known);
        }
        found
    }

    fn nine_p(&mut self, device: &Properties) -> Option<Element> {
        let id = device.get("fsdev")?;
        let (index, backend) = self.named("fsdev", &id)?;
        let path = backend.get("path")?;
        let access = match backend.get("security_model").as_deref() {
            Some("passthrough") | None => "passthrough",
            Some("mapped" | "mapped-xattr") => "mapped",
            Some("none") => "squash",
            Some(_) => return None,
        };
        if backend.get("fsdriver").or_else(|| backend.get("type"))? != "local" {
            return None;
        }
        let known = [
            "fsdriver",
            "type",
            "id",
            "path",
            "security_model",
            "multidevs",
            "fmode",
            "dmode",
            "writeout",
            "readonly",
        ];
        self.tell(index, &backend, &known);
        let driver = Element::new("driver")
            .attribute("type", "path")
            .attribute_if("wrpolicy", backend.get("writeout"));
        let path = super::absolute(&self.facts.directory, path);
        let element = Element::new("filesystem")
            .attribute("type", "mount")
            .attribute("accessmode", access)
            .attribute_if("model", model(device))
            .attribute_if("multidevs", backend.get("multidevs"))
            .attribute_if("fmode", backend.get("fmode"))
            .attribute_if("dmode", backend.get("dmode"))
            .child(virtio_attributes(driver, device))
            .child(Element::new("source").attribute("dir", path))
            .child(Element::new("target").attribute("dir", device.get("mount_tag")?));
        Some(element.children(backend.is_on("readonly").then(|| Element::new("readonly"))))
    }

    /// Whoever serves it was started by somebody else: QEMU knows its socket alone.
    fn virtiofs(&mut self, device: &Properties) -> Option<Element> {
        let id = device.get("chardev")?;
        let (index, chardev) = self.named("chardev", &id)?;
        let path = chardev.get("path")?;
        self.tell(index, &chardev, &["backend", "id", "path"]);
        let driver = Element::new("driver")
            .attribute("type", "virtiofs")
            .attribute_if("queue", device.get("queue-size"));
        let path = super::absolute(&self.facts.directory, path);
        let element = Element::new("filesystem")
            .attribute("type", "mount")
            .child(virtio_attributes(driver, device))
            .child(Element::new("source").attribute("socket", path))
            .child(Element::new("target").attribute("dir", device.get("tag")?));
        Some(element)
    }

    /// The argument of this option that has this id.
    fn named(&self, option: &str, id: &str) -> Option<(usize, Properties)> {
        let all = self.arguments.options(option);
        let mut all = all.map(|(index, argument)| (index, argument.properties()));
        all.find(|(_, argument)| argument.get("id").as_deref() == Some(id))
    }
}

/// libvirt's model, where it is not the usual one.
fn model(device: &Properties) -> Option<&'static str> {
    let driver = device.get("driver")?;
    Some(virtio_model(&driver)).filter(|model| *model != "virtio")
}
