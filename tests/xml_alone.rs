//! A guest whose devices libvirt has words for comes back by the XML in its image alone: XML → arguments → guest → save →
//! XML made from what runs → arguments → the saved state loads, and the guest goes on.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use support::{PATIENCE, Qmp, Serial, TestDir, wait_until};

const Q35: &str = r#"
  <os><type arch="x86_64" machine="pc-q35-10.0">hvm</type></os>
  <features><acpi/><vmport state="off"/></features>
  <clock offset="utc"><timer name="rtc" tickpolicy="catchup"/><timer name="hpet" present="no"/></clock>
  <pm><suspend-to-mem enabled="no"/><suspend-to-disk enabled="no"/></pm>
  <devices>
    <disk type="file" device="disk"><driver name="qemu" type="raw" cache="none"/><source file="DISK"/><target dev="vda" bus="virtio"/><serial>abc</serial></disk>
    <disk type="file" device="cdrom"><target dev="sda" bus="sata"/><readonly/></disk>
    <controller type="scsi" index="0" model="virtio-scsi"/>
    <disk type="file" device="cdrom"><target dev="sdb" bus="scsi"/><readonly/></disk>
    <interface type="user"><mac address="52:54:00:00:00:07"/><model type="virtio"/></interface>
    <serial type="file"><source path="SERIAL" append="on"/></serial>
    <channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>
    <input type="tablet" bus="usb"/>
    <graphics type="vnc"><listen type="socket" socket="VNC"/></graphics>
    <sound model="ich9"/>
    <video><model type="vga" vram="32768"/></video>
    <rng model="virtio"><backend model="random">/dev/urandom</backend></rng>
    <panic model="isa"/>
  </devices>"#;

const I440FX: &str = r#"
  <os><type arch="x86_64" machine="pc-i440fx-10.0">hvm</type></os>
  <features><acpi/></features>
  <devices>
    <disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="DISK"/><target dev="hda" bus="ide"/></disk>
    <controller type="usb" index="0" model="piix3-uhci"/>
    <interface type="user"><mac address="52:54:00:00:00:07"/><model type="e1000"/></interface>
    <serial type="file"><source path="SERIAL" append="on"/></serial>
    <input type="tablet" bus="usb"/>
    <video><model type="cirrus"/></video>
    <watchdog model="i6300esb"/>
  </devices>"#;

/// What fewer guests have: NUMA cells, what Windows is told, companion USB controllers, a share, a disk on another host.
const RARE: &str = r#"
  <os><type arch="x86_64" machine="pc-q35-10.0">hvm</type></os>
  <features><acpi/><hyperv><relaxed state="on"/><spinlocks state="on" retries="8191"/><vendor_id state="on" value="vmstow"/></hyperv><pmu state="off"/></features>
  <cpu mode="custom" match="exact">
    <model>qemu64</model><topology sockets="2" cores="1" threads="1"/>
    <numa>
      <cell id="0" cpus="0" memory="32" unit="MiB"><distances><sibling id="1" value="21"/></distances></cell>
      <cell id="1" cpus="1" memory="32" unit="MiB"><distances><sibling id="0" value="21"/></distances></cell>
    </numa>
  </cpu>
  <clock offset="utc"><timer name="hypervclock" present="yes"/></clock>
  <devices>
    <disk type="network" device="disk"><driver name="qemu" type="raw" cache="writeback"/>
      <source protocol="nbd" name="counter"><host transport="unix" socket="NBD"/></source><target dev="vda" bus="virtio"/></disk>
    <controller type="usb" index="0" model="ich9-ehci1"/>
    <controller type="usb" index="0" model="ich9-uhci1"><master startport="0"/></controller>
    <controller type="usb" index="0" model="ich9-uhci2"><master startport="2"/></controller>
    <controller type="usb" index="0" model="ich9-uhci3"><master startport="4"/></controller>
    <filesystem type="mount" accessmode="mapped"><source dir="SHARE"/><target dir="files"/></filesystem>
    <serial type="file"><source path="SERIAL" append="on"/></serial>
    <input type="tablet" bus="usb"/>
    <pstore backend="acpi-erst"><path>STORE</path><size unit="KiB">64</size></pstore>
  </devices>"#;

/// A server of a disk, which ends with this.
struct Nbd(Child);

impl Nbd {
    fn serve(dir: &TestDir, disk: &str) -> Self {
        let socket = dir.join("nbd.sock");
        let child = Command::new("qemu-nbd")
            .args([
                "--persistent",
                "--shared=4",
                "--format=raw",
                "--export-name=counter",
            ])
            .arg(format!("--socket={}", socket.display()))
            .arg(dir.join(disk))
            .spawn()
            .expect("qemu-nbd (Debian package qemu-utils)");
        wait_until("the server of the disk", PATIENCE, || {
            socket.exists().then_some(()).ok_or("no socket".to_owned())
        });
        Nbd(child)
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU started by hand, which ends with this.
struct Hand {
    child: Child,
    socket: PathBuf,
}

impl Hand {
    /// Starts the command that `vmstow run` prints for this XML or image, `extra` behind it.
    fn start(dir: &TestDir, source: &str, extra: &[&str]) -> Self {
        let printed = dir.json(&["run", source, "--print-command", "--trust"]);
        let words = printed["argv"].as_array().unwrap().iter();
        let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
        let home = dir.join("run/web01");
        std::fs::create_dir_all(&home).unwrap();
        let (socket, log) = (home.join("qmp.sock"), dir.join("qemu.log"));
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(extra)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        wait_until("QEMU to open its socket", PATIENCE, || {
            let said = std::fs::read_to_string(&log).unwrap();
            if child.try_wait().unwrap().is_some() {
                panic!("QEMU did not start: {said}\n{words:#?}");
            }
            socket.exists().then_some(()).ok_or(said)
        });
        Hand { child, socket }
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(self.socket.clone())
    }

    /// Saves it; its QEMU ends.
    fn save(mut self, dir: &TestDir, image: &str) -> Value {
        let source = format!("qmp:{}", self.socket.display());
        dir.json(&["save", &source, image, "--layout", "raw"]);
        self.child.wait().unwrap();
        dir.json(&["inspect", image])["manifest"].clone()
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sections(manifest: &Value) -> Vec<String> {
    let sections = manifest["sections"].as_array().unwrap().iter();
    let mut names: Vec<String> = sections
        .map(|section| format!("{} {}", section["idstr"], section["instance_id"]))
        .collect();
    names.sort();
    names
}

fn comes_back_by_its_xml_alone(devices: &str, vcpus: u32) {
    let dir = TestDir::new();
    std::fs::create_dir(dir.join("share")).unwrap();
    std::fs::copy(
        support::testdata("guests/counter.img"),
        dir.join("disk.img"),
    )
    .unwrap();
    let _server = devices
        .contains("NBD")
        .then(|| Nbd::serve(&dir, "disk.img"));
    let at = |name: &str| dir.join(name).display().to_string();
    let xml = format!(
        "<domain type=\"qemu\"><name>web01</name><memory unit=\"MiB\">64</memory><vcpu>{vcpus}</vcpu>{devices}</domain>"
    );
    let xml = xml
        .replace("DISK", &at("disk.img"))
        .replace("SERIAL", &at("serial"))
        .replace("VNC", &at("vnc.sock"))
        .replace("NBD", &at("nbd.sock"))
        .replace("SHARE", &at("share"))
        .replace("STORE", &at("store"));
    std::fs::write(dir.join("web01.xml"), xml).unwrap();
    let guest = Hand::start(&dir, "web01.xml", &[]);
    guest.qmp().command("cont", json!({}));
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);
    let first = guest.save(&dir, "x.stow");
    let before = serial.mark();
    // The XML was made from the arguments, and has a word for all of them.
    let output = dir.vmstow().args(["config", "x.stow", "get"]).unwrap();
    let made = String::from_utf8(output.stdout).unwrap();
    assert!(!made.contains("qemu:commandline"), "{made}");
    assert!(!made.contains("vmstow:unmodelled"), "{made}");
    let guest = Hand::start(&dir, "x.stow", &["-incoming", "defer"]);
    let mut qmp = guest.qmp();
    // QEMU ignores what follows its stream in a file.
    let uri = format!("file:{}", dir.join("x.stow").display());
    qmp.command("migrate-incoming", json!({ "uri": uri }));
    wait_until("the state to be loaded", PATIENCE, || {
        let state = qmp.command("query-migrate", json!({}));
        match state["status"].as_str() {
            Some("completed") => Ok(()),
            Some("failed") => panic!("{state}\n{made}"),
            _ => Err(state.to_string()),
        }
    });
    qmp.command("cont", json!({}));
    serial.assert_goes_on(&before);
    drop(qmp);
    let second = guest.save(&dir, "y.stow");
    assert_eq!(sections(&first), sections(&second), "{made}");
    assert_eq!(first["ram_blocks"], second["ram_blocks"]);
}

#[test]
fn a_q35_guest_comes_back_by_its_xml_alone() {
    comes_back_by_its_xml_alone(Q35, 1);
}

#[test]
fn an_i440fx_guest_comes_back_by_its_xml_alone() {
    comes_back_by_its_xml_alone(I440FX, 1);
}

#[test]
fn a_guest_with_rare_devices_comes_back_by_its_xml_alone() {
    comes_back_by_its_xml_alone(RARE, 2);
}
