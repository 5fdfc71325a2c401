//! What stands in for things that a domain names and the machine that runs the tests does not have.
//!
//! Every path lies below a directory of the test, every file is made there. What follows is replaced, and nothing else:
//!
//! | in the arguments | what stands in | why |
//! |---|---|---|
//! | KVM, `-cpu host` | TCG, `-cpu max` | the tests need no KVM |
//! | huge pages, memory taken at once | common pages, on demand | the host has none to spare |
//! | a block device | a file | there is none |
//! | NBD, Ceph, iSCSI, NFS, SSH, HTTP | an empty node | nobody serves them |
//! | `io_uring`, `native`, caches past the page cache | threads, the page cache | not every file system and container can |
//! | tap, bridge, vhost-user, vDPA, passt | a user network | they need privileges, or another process |
//! | a socket that QEMU connects to | one that it makes itself | nobody listens |
//! | SPICE with its channels, QXL, displays with OpenGL | nothing, `null`, VGA | modules that the tests do not install |
//! | devices of the host: VFIO, vhost, evdev, TPM, a SCSI LUN, certificates | nothing | there is none |
//! | a directory by virtiofs, memory with a doorbell | nothing | another process has to serve it |
//! | 127.0.0.1 and 0.0.0.0 | an address of the loopback net for each guest | ports are taken once |
//! | a kernel and its initrd | the Linux guest's | there is only one |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};
use vmstow::config::{Argument, Arguments};

use crate::support::{Qemu, linux_initrd, linux_kernel};

/// Paths that are the same everywhere.
const KEPT: [&str; 5] = [
    "/dev/urandom",
    "/dev/random",
    "/dev/shm/",
    "/usr/lib/ipxe/",
    "/usr/share/seabios/",
];
/// Devices that are left out.
const LEFT_OUT: [&str; 9] = [
    "vfio-pci",
    "vfio-pci-nohotplug",
    "vhost-vsock-pci",
    "vhost-scsi-pci",
    "vhost-user-fs-pci",
    "virtio-input-host-pci",
    "scsi-block",
    "ivshmem-doorbell",
    "ccid-card-emulated",
];
const SERVED_ELSEWHERE: [&str; 9] = [
    "nbd", "rbd", "iscsi", "nfs", "ssh", "http", "https", "ftp", "ftps",
];
const IMAGE_SIZE: u64 = 8 << 20;
const CODE_SIZE: u64 = 2 << 20;
const VARIABLES_SIZE: u64 = 128 << 10;

/// The stage for one guest.
pub struct Stage<'a> {
    /// Where its files are.
    pub dir: &'a Path,
    /// Another one for each guest.
    pub number: u8,
    pub qemu: Qemu,
}

type Object = Map<String, Value>;

impl Stage<'_> {
    /// The arguments with everything that has to be replaced.
    pub fn set(&self, argv: &[String]) -> Vec<String> {
        let mut arguments = Arguments::parse(argv).unwrap();
        arguments.program = self.qemu.program().display().to_string();
        let formats = formats(&arguments);
        let missing = missing(&arguments);
        let items = std::mem::take(&mut arguments.items).into_iter();
        arguments.items = items
            .filter_map(|item| self.replaced(item, &formats, &missing))
            .collect();
        arguments.write()
    }

    fn replaced(
        &self,
        item: Argument,
        formats: &BTreeMap<String, String>,
        missing: &[String],
    ) -> Option<Argument> {
        let name = item.name()?.to_owned();
        let Some(value) = item.value().map(str::to_owned) else {
            return Some(item);
        };
        let with = |value: String| Some(Argument::with_value(&name, value));
        if let Ok(object) = serde_json::from_str::<Object>(&value) {
            let object = self.object(&name, object, formats, missing)?;
            return with(Value::Object(object).to_string());
        }
        match name.as_str() {
            "accel" if value.starts_with("kvm") => with("tcg".to_owned()),
            "cpu" => with(
                value
                    .strip_prefix("host")
                    .map_or(value.clone(), |rest| format!("max{rest}")),
            ),
            "machine" => with(self.machine(&value)),
            "spice" => None,
            "display" if value != "none" => with("none".to_owned()),
            "kernel" => with(linux_kernel().display().to_string()),
            "initrd" => with(linux_initrd().display().to_string()),
            "append" | "smbios" | "uuid" | "name" | "fw_cfg" => with(value),
            "chardev" => with(self.chardev(&value)),
            "tpmdev" if value.starts_with("passthrough") => None,
            _ => with(self.moved_pairs(&value)),
        }
    }

    /// 7.2 has the machine types of its time.
    fn machine(&self, value: &str) -> String {
        let value = value
            .replace("kernel_irqchip=split,", "")
            .replace("kernel_irqchip=on,", "");
        let (kind, rest) = value.split_once(',').unwrap();
        let kind = match (self.qemu, kind.rsplit_once('-').unwrap()) {
            (Qemu::V7_2, (family, _)) => format!("{family}-7.2"),
            (Qemu::V10, _) => kind.to_owned(),
        };
        format!("{kind},{rest}")
    }

    fn chardev(&self, value: &str) -> String {
        let id = pair(value, "id").unwrap();
        if value.starts_with("spice") {
            return format!("null,id={id}");
        }
        let is_own = id == "vmstow-qmp" || id.starts_with("chrtpm");
        let value = self.moved_pairs(value);
        let waits_for_nobody = value.starts_with("socket,") && pair(&value, "server").is_none();
        if waits_for_nobody && !is_own {
            let parts = value
                .split(',')
                .filter(|part| !part.starts_with("reconnect"));
            let value: Vec<&str> = parts.collect();
            return format!("{},server=on,wait=off", value.join(","));
        }
        value
    }

    /// `key=value` pairs with paths and addresses of the test.
    fn moved_pairs(&self, value: &str) -> String {
        let parts = value.replace(",,", "\0");
        let parts = parts.split(',').map(|part| {
            let (key, text) = match part.split_once('=') {
                Some((key, text)) => (format!("{key}="), text),
                None => (String::new(), part),
            };
            let (prefix, text) = match text.strip_prefix("unix:") {
                Some(text) => ("unix:", text),
                None => ("", text),
            };
            format!("{key}{prefix}{}", self.moved(text))
        });
        let parts: Vec<String> = parts.collect();
        parts.join(",").replace('\0', ",,")
    }

    /// A path below the test's directory, an address of the guest's own; other text as it is.
    fn moved(&self, text: &str) -> String {
        let own = format!("127.77.0.{}", self.number);
        for address in ["127.0.0.1", "0.0.0.0"] {
            if let Some(rest) = text.strip_prefix(address) {
                return format!("{own}{rest}");
            }
        }
        let is_kept = KEPT.iter().any(|kept| text.starts_with(kept));
        if !text.starts_with('/') || is_kept || Path::new(text).starts_with(self.dir) {
            return text.to_owned();
        }
        // Where a doubled comma was taken for the sign that it stands for.
        let path = format!("{}/root{text}", self.dir.display());
        let real = path.replace('\0', ",");
        std::fs::create_dir_all(Path::new(&real).parent().unwrap()).unwrap();
        if text.starts_with("/srv/") {
            std::fs::create_dir_all(&real).unwrap();
        }
        path
    }

    fn object(
        &self,
        option: &str,
        mut object: Object,
        formats: &BTreeMap<String, String>,
        missing: &[String],
    ) -> Option<Object> {
        match option {
            "netdev" => {
                let kind = text(&object, "type");
                if !["user", "socket"].contains(&kind.as_str()) {
                    return Some(as_object(json!({ "type": "user", "id": object["id"] })));
                }
            }
            "audiodev" if text(&object, "driver") == "spice" => {
                object.insert("driver".into(), "none".into());
            }
            "object" => {
                if text(&object, "qom-type") == "input-linux" {
                    return None;
                }
                for key in ["prealloc", "prealloc-threads", "hugetlb", "hugetlbsize"] {
                    object.remove(key);
                }
            }
            "device" => return self.device(object, missing),
            "blockdev" => object = node(object, formats, missing),
            _ => {}
        }
        self.move_texts(&mut object);
        if option == "blockdev" && text(&object, "driver") == "file" {
            let name = text(&object, "node-name");
            let format = formats.get(&name).map_or("raw", String::as_str);
            self.make_image(&name, &text(&object, "filename"), format);
        }
        Some(object)
    }

    fn device(&self, mut device: Object, missing: &[String]) -> Option<Object> {
        let driver = text(&device, "driver");
        let is_gone = missing.contains(&text(&device, "tpmdev")) || device.contains_key("hostaddr");
        if is_gone || LEFT_OUT.contains(&driver.as_str()) {
            return None;
        }
        let instead = match driver.as_str() {
            "qxl-vga" => "VGA",
            "qxl" => "secondary-vga",
            "virtio-vga-gl" => "virtio-vga",
            other => other,
        };
        if driver.starts_with("qxl") {
            for key in ["ram_size", "vram_size", "vram64_size_mb", "max_outputs"] {
                device.remove(key);
            }
        }
        device.insert("driver".into(), instead.into());
        self.move_texts(&mut device);
        Some(device)
    }

    fn move_texts(&self, object: &mut Object) {
        for (key, value) in object.iter_mut() {
            match value {
                Value::String(text) if key != "sysfsdev" => *text = self.moved(text),
                Value::Object(inner) => self.move_texts(inner),
                _ => {}
            }
        }
    }

    fn make_image(&self, node: &str, path: &str, format: &str) {
        let size = match node {
            "libvirt-pflash0-storage" => CODE_SIZE,
            "libvirt-pflash1-storage" => VARIABLES_SIZE,
            _ => IMAGE_SIZE,
        };
        if format == "raw" {
            std::fs::File::create(path).unwrap().set_len(size).unwrap();
        } else {
            std::fs::copy(template(self.dir.parent().unwrap(), format, size), path).unwrap();
        }
    }
}

/// An empty image; made once.
fn template(dir: &Path, format: &str, size: u64) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _held: MutexGuard<'_, ()> = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let path = dir.join(format!("empty-{size}.{format}"));
    if !path.exists() {
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&path)
            .arg(size.to_string())
            .status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "qemu-img create -f {format}"
        );
    }
    path
}

/// The formats of storage nodes, by what builds on them.
fn formats(arguments: &Arguments) -> BTreeMap<String, String> {
    let nodes = arguments
        .options("blockdev")
        .map(|(_, node)| node.properties());
    let formats = nodes.filter_map(|node| {
        let driver = node.get("driver")?;
        let is_format = !["throttle", "copy-on-read"].contains(&driver.as_str());
        is_format.then_some((node.get("file")?, driver))
    });
    formats.collect()
}

/// Nodes and TPMs that nothing stands behind.
fn missing(arguments: &Arguments) -> Vec<String> {
    let nodes = arguments
        .options("blockdev")
        .map(|(_, node)| node.properties());
    let nodes = nodes.filter(|node| {
        let driver = node.get("driver").unwrap_or_default();
        SERVED_ELSEWHERE.contains(&driver.as_str())
    });
    let tpms = arguments.options("tpmdev").map(|(_, tpm)| tpm.properties());
    let tpms = tpms.filter(|tpm| tpm.get("type").as_deref() == Some("passthrough"));
    let names = nodes.filter_map(|node| node.get("node-name"));
    names.chain(tpms.filter_map(|tpm| tpm.get("id"))).collect()
}

fn node(mut node: Object, formats: &BTreeMap<String, String>, missing: &[String]) -> Object {
    let driver = text(&node, "driver");
    let name = text(&node, "node-name");
    if SERVED_ELSEWHERE.contains(&driver.as_str()) {
        let is_below = formats.contains_key(&name);
        let read_only = node.get("read-only").cloned().unwrap_or(is_below.into());
        return as_object(json!({
            "driver": "null-co", "node-name": name, "size": IMAGE_SIZE,
            "read-only": if is_below { Value::from(false) } else { read_only }
        }));
    }
    if missing.contains(&text(&node, "file")) && driver != "throttle" && driver != "copy-on-read" {
        node.insert("driver".into(), "raw".into());
        node.remove("backing");
    }
    if ["host_device", "host_cdrom"].contains(&driver.as_str()) {
        node.insert("driver".into(), "file".into());
    }
    if node.contains_key("aio") {
        node.insert("aio".into(), "threads".into());
    }
    if let Some(Value::Object(cache)) = node.get_mut("cache") {
        cache.insert("direct".into(), false.into());
    }
    node
}

fn text(object: &Object, key: &str) -> String {
    let text = object.get(key).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn as_object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

fn pair<'a>(value: &'a str, key: &str) -> Option<&'a str> {
    let mut parts = value.split(',');
    parts.find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
}
