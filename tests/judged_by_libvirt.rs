//! libvirt as judge: a domain that libvirtd starts and one that we start are the same machine, and each loads what the
//! other saved.
//!
//! The libvirtd is the test's own, in a mount namespace of its own, so that its directories are the test's: this needs
//! root, and libvirt 11.2 or later (`tests/setup.sh`).

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use support::{Libvirtd, PATIENCE, Qemu, Qmp, TestDir, testdata, wait_until};
use vmstow::config::expand::{HostKnowledge, expand};
use vmstow::config::xml::Document;
use vmstow::config::{CommandContext, command_line};

/// Domains of `testdata/domains` that need nothing of the host but files.
const DOMAINS: [&str; 20] = [
    "minimal-i440fx",
    "minimal-q35",
    "no-devices-at-all",
    "bios-rom-loader",
    "boot-order-os",
    "smbios-sysinfo",
    "cpu-topology",
    "numa-cells",
    "disk-scsi",
    "disk-ide-usb-floppy",
    "disk-iothreads",
    "console-virtio",
    "machine-of-debian-12",
    "machine-of-debian-12-i440fx",
    "usb-ich9-group",
    "usb-none-virtio-all",
    "video-virtio-heads",
    "watchdog-i6300esb",
    "panic-devices",
    "windows-xp-i440fx",
];

/// The bytes of libvirt's header before the XML, and where in it the length of the XML stands.
const SAVE_HEADER_LEN: u64 = 92;
const SAVE_XML_LEN_AT: u64 = 20;

#[test]
fn libvirt_and_we_start_the_same_machine_and_load_what_the_other_saved() {
    let dir = TestDir::new();
    let libvirtd = Judge(Libvirtd::start(&dir.join("libvirt")));
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(2, |count| count.get().min(4));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(name) = DOMAINS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = judge(&dir, &libvirtd, name) {
                        failures.lock().unwrap().push(format!("{name}: {why}"));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn judge(dir: &TestDir, libvirtd: &Judge, name: &str) -> Result<(), String> {
    let own = dir.join(name);
    std::fs::create_dir_all(&own).unwrap();
    let xml = own.join("domain.xml");
    // Each domain has files of its own.
    let text = std::fs::read_to_string(testdata("domains").join(format!("{name}.xml"))).unwrap();
    let images = format!("/var/lib/libvirt/images/{name}");
    let text = text
        .replace("/var/lib/libvirt/images", &images)
        .replace("/run/vmstow/", &format!("{images}/"));
    std::fs::write(&xml, &text).unwrap();
    let images = libvirtd.0.dir().join("lib/images").join(name);
    make_images(&images, &text);

    libvirtd.virsh(&["create", xml.to_str().unwrap(), "--paused"])?;
    let theirs = View::of(|command| libvirtd.monitor(name, command))?;
    let saved = images.join("theirs.save");
    libvirtd.virsh(&["resume", name])?;
    libvirtd.virsh(&[
        "save",
        name,
        &format!("/var/lib/libvirt/images/{name}/theirs.save"),
        "--image-format",
        "raw",
    ])?;
    let stream_at = stream_offset(&saved);

    let mut ours = Ours::start(&own, &text, libvirtd, &[])?;
    let view = View::of(|command| ours.monitor(command))?;
    view.must_equal(&theirs)?;
    let stream = own.join("ours.stream");
    ours.qmp.command("cont", json!({}));
    ours.qmp.command("stop", json!({}));
    ours.qmp.migrate(&format!("file:{}", stream.display()));
    drop(ours);
    let (our_sections, their_sections) = (sections(&stream), sections(&saved));
    if our_sections != their_sections {
        let difference = our_sections.symmetric_difference(&their_sections);
        return Err(format!(
            "sections differ in {:?}",
            difference.collect::<Vec<_>>()
        ));
    }

    let mut ours = Ours::start(&own, &text, libvirtd, &["-incoming", "defer"])?;
    ours.load(&format!("file:{},offset={stream_at}", saved.display()))?;
    drop(ours);

    // libvirt's own header before our stream.
    let image = images.join("ours.save");
    let mut head = vec![0; usize::try_from(stream_at).unwrap()];
    File::open(&saved).unwrap().read_exact(&mut head).unwrap();
    head.extend(std::fs::read(&stream).unwrap());
    std::fs::write(&image, head).unwrap();
    libvirtd.virsh(&[
        "restore",
        &format!("/var/lib/libvirt/images/{name}/ours.save"),
    ])?;
    let state = libvirtd.virsh(&["domstate", name])?;
    libvirtd.virsh(&["destroy", name])?;
    match state.trim() {
        "running" => Ok(()),
        other => Err(format!("after its restore from our stream it is {other}")),
    }
}

/// The files that the XML names, empty.
fn make_images(dir: &Path, text: &str) {
    std::fs::create_dir_all(dir).unwrap();
    for line in text.lines() {
        let Some((_, rest)) = line.split_once("<source file='") else {
            continue;
        };
        let path = dir.join(
            Path::new(rest.split('\'').next().unwrap())
                .file_name()
                .unwrap(),
        );
        let format = if path.extension().is_some_and(|it| it == "qcow2") {
            "qcow2"
        } else {
            "raw"
        };
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&path)
            .arg("1474560")
            .status();
        assert!(status.unwrap().success());
    }
}

/// What a guest is, as its monitor tells it.
struct View {
    tree: Vec<String>,
    pci: Value,
}

impl View {
    fn of(mut monitor: impl FnMut(&Value) -> Result<Value, String>) -> Result<Self, String> {
        let tree = monitor(&json!({
            "execute": "human-monitor-command", "arguments": { "command-line": "info qtree" }
        }))?;
        let tree = tree.as_str().ok_or("no tree")?;
        Ok(View {
            // What stands behind a device is the host's.
            tree: tree
                .lines()
                .map(|line| line.trim_end().to_owned())
                .filter(|line| {
                    let property = line.trim().split(" = ").next().unwrap_or_default();
                    !["chardev", "netdev", "drive", "audiodev"].contains(&property)
                })
                .collect(),
            pci: monitor(&json!({ "execute": "query-pci" }))?,
        })
    }

    fn must_equal(&self, other: &View) -> Result<(), String> {
        if self.tree != other.tree {
            let lines = |one: &View, two: &View| {
                let two: BTreeSet<&String> = two.tree.iter().collect();
                one.tree
                    .iter()
                    .filter(|line| !two.contains(line))
                    .cloned()
                    .collect::<Vec<_>>()
            };
            return Err(format!(
                "trees differ: ours {:#?}, libvirt's {:#?}",
                lines(self, other),
                lines(other, self)
            ));
        }
        if self.pci != other.pci {
            return Err(format!(
                "PCI differs: ours {}, libvirt's {}",
                self.pci, other.pci
            ));
        }
        Ok(())
    }
}

/// Where the stream starts in an image of libvirt's.
fn stream_offset(image: &Path) -> u64 {
    let mut file = File::open(image).unwrap();
    file.seek(SeekFrom::Start(SAVE_XML_LEN_AT)).unwrap();
    let mut len = [0; 4];
    file.read_exact(&mut len).unwrap();
    SAVE_HEADER_LEN + u64::from(u32::from_le_bytes(len))
}

/// The device sections that a stream's own description lists, at its end.
fn sections(stream: &Path) -> BTreeSet<String> {
    let bytes = std::fs::read(stream).unwrap();
    let start = bytes
        .windows(17)
        .rposition(|window| window == br#"{"configuration":"#)
        .unwrap();
    let description = serde_json::Deserializer::from_slice(&bytes[start..])
        .into_iter::<Value>()
        .next();
    let description = description.unwrap().unwrap();
    let devices = description["devices"].as_array().unwrap();
    devices
        .iter()
        .map(|device| format!("{}/{}", device["name"], device["instance_id"]))
        .collect()
}

/// A QEMU with our arguments.
struct Ours {
    child: Child,
    qmp: Qmp,
}

impl Ours {
    fn start(own: &Path, text: &str, libvirtd: &Judge, more: &[&str]) -> Result<Self, String> {
        let document = Document::parse(text.as_bytes()).unwrap();
        let knowledge = HostKnowledge::default();
        let domain = expand(&document, &knowledge)
            .map_err(|error| error.to_string())?
            .domain;
        let context = CommandContext {
            emulator: Some(Qemu::V10.program().display().to_string()),
            ..CommandContext::new(own.to_str().unwrap())
        };
        let line = command_line(&domain, &context).map_err(|error| error.to_string())?;
        let lib = libvirtd.0.dir().join("lib");
        let argv: Vec<String> = line
            .argv
            .iter()
            .map(|word| word.replace("/var/lib/libvirt", lib.to_str().unwrap()))
            .collect();
        let _ = std::fs::remove_file(own.join("qmp.sock"));
        let log = File::create(own.join("qemu.log")).unwrap();
        let mut child = Command::new(&argv[0])
            .args(&argv[1..])
            .args(more)
            .current_dir(own)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let is_up = wait_until("QEMU to listen", PATIENCE, || {
            let has_ended = child.try_wait().unwrap().is_some();
            // The monitor answers when all devices are there.
            match std::os::unix::net::UnixStream::connect(own.join("qmp.sock")) {
                _ if has_ended => Ok(false),
                Ok(_) => Ok(true),
                Err(error) => Err(error.to_string()),
            }
        });
        if !is_up {
            return Err(std::fs::read_to_string(own.join("qemu.log")).unwrap_or_default());
        }
        let qmp = Qmp::connect(own.join("qmp.sock"));
        Ok(Ours { child, qmp })
    }

    fn monitor(&mut self, command: &Value) -> Result<Value, String> {
        let name = command["execute"].as_str().unwrap();
        let arguments = command.get("arguments").cloned().unwrap_or(json!({}));
        self.qmp
            .try_command(name, arguments)
            .map_err(|error| error.to_string())
    }

    /// Loads a stream to its end.
    fn load(&mut self, uri: &str) -> Result<(), String> {
        self.qmp.command("migrate-incoming", json!({ "uri": uri }));
        wait_until("a stream to be loaded", PATIENCE, || {
            let migration = self.qmp.command("query-migrate", json!({}));
            match migration["status"].as_str() {
                Some("completed") => Ok(Ok(())),
                Some("failed") => Ok(Err(migration.to_string())),
                _ => Err(migration.to_string()),
            }
        })
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The libvirtd that judges; its guests end with it.
struct Judge(Libvirtd);

impl Judge {
    fn virsh(&self, arguments: &[&str]) -> Result<String, String> {
        let mut virsh = self.0.virsh();
        let output = virsh.args(arguments).output();
        let output = output.expect("virsh (Debian package libvirt-clients) can be started");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(text),
            false => Err(format!(
                "virsh {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }

    fn monitor(&self, domain: &str, command: &Value) -> Result<Value, String> {
        let answer = self.virsh(&["qemu-monitor-command", domain, &command.to_string()])?;
        let answer: Value = serde_json::from_str(&answer).map_err(|error| error.to_string())?;
        Ok(answer["return"].clone())
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        for domain in DOMAINS {
            let _ = self.virsh(&["destroy", domain]);
        }
    }
}
