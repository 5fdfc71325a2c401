//! A guest on a bridge of the host is restored onto another one: bridges and all else are in namespaces of the test's own.
//! This needs root.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use support::{PATIENCE, Restored, Serial, TestDir, counter_xml, serial_into, wait_until};

/// Who may use which bridge is QEMU's helper's business.
const MAKE_BRIDGES: &str = "set -e
mkdir -p /etc/qemu
mount --bind \"$1\" /etc/qemu
for bridge in here there; do
    ip link add $bridge type bridge
    ip link set $bridge up
done
touch \"$1/ready\"
exec sleep 600";

/// A network and a view of the files that only the test has.
struct Namespaces(Child);

impl Namespaces {
    fn with_bridges(dir: &TestDir) -> Self {
        let etc = dir.join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("bridge.conf"), "allow all\n").unwrap();
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--propagation", "private"]);
        command.args(["sh", "-c", MAKE_BRIDGES, "sh"]).arg(&etc);
        let child = command.stdin(Stdio::null()).spawn();
        let mut namespaces = Namespaces(child.expect("unshare (Debian package util-linux)"));
        wait_until("the bridges", PATIENCE, || {
            if let Some(status) = namespaces.0.try_wait().unwrap() {
                panic!("no bridges (Debian package iproute2): {status}");
            }
            etc.join("ready")
                .exists()
                .then_some(())
                .ok_or(String::new())
        });
        namespaces
    }

    fn command(&self, program: &std::ffi::OsStr) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.0.id().to_string(), "-n", "-m"])
            .arg(program);
        command
    }

    /// What `vmstow` answers there.
    #[track_caller]
    fn vmstow(&self, dir: &TestDir, arguments: &[&str]) -> Value {
        let plain = dir.vmstow_command();
        let mut command = self.command(plain.get_program());
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap());
        }
        let output: Output = command.arg("--json").args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Whether a tap interface is on that bridge.
    fn has_port(&self, bridge: &str) -> bool {
        let mut command = self.command("ip".as_ref());
        let output = command
            .args(["-o", "link", "show", "master", bridge])
            .output()
            .unwrap();
        assert!(output.status.success());
        !output.stdout.is_empty()
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_moves_from_one_bridge_to_another() {
    let dir = TestDir::new();
    let serial = dir.join("serial");
    let nic = "<interface type='bridge'><source bridge='here'/><model type='virtio'/></interface>";
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), nic);
    let xml = xml.replace("machine='pc'", "machine='q35'");
    let (xml_file, image) = (dir.join("web.xml"), dir.join("web.stow"));
    std::fs::write(&xml_file, xml).unwrap();
    let (xml_file, image) = (xml_file.to_str().unwrap(), image.to_str().unwrap());
    let net = Namespaces::with_bridges(&dir);
    let started = Restored::of(net.vmstow(&dir, &["run", xml_file]));
    let serial = Serial::at(serial);
    serial.wait_for_tick(3);
    assert!(net.has_port("here") && !net.has_port("there"));
    net.vmstow(&dir, &["save", "web", image]);
    started.qemu.wait_for_exit();
    let before = serial.mark();
    let remap = ["restore", image, "--remap", "net:net0=bridge=there"];
    let _restored = Restored::of(net.vmstow(&dir, &remap));
    serial.assert_goes_on(&before);
    assert!(net.has_port("there") && !net.has_port("here"));
    net.vmstow(&dir, &["stop", "web"]);
}
