//! Guests as domain XML, written as people write it: without addresses, aliases, controllers.

use super::assets::{Qemu, testdata};
use super::dir::TestDir;
use super::restored::Restored;

/// The counter guest, which boots from `DIR/web.img`, with the serial port `serial` and more devices. It is called web.
pub fn counter_xml(dir: &TestDir, serial: &str, devices: &str) -> String {
    let disk = dir.join("web.img");
    if !disk.exists() {
        std::fs::copy(testdata("guests/counter.img"), &disk).unwrap();
    }
    format!(
        "<domain type='qemu'>
  <name>web</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>{}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    {serial}
    {devices}
    <memballoon model='none'/>
  </devices>
</domain>
",
        Qemu::V10.program().display(),
        disk.display()
    )
}

/// A serial port into `DIR/NAME`.
pub fn serial_into(dir: &TestDir, name: &str) -> String {
    let path = dir.join(name);
    format!(
        "<serial type='file'><source path='{}' append='on'/></serial>",
        path.display()
    )
}

impl TestDir {
    /// Writes a file in it.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.join(name), text).unwrap();
    }

    /// Runs `vmstow run`, which must succeed and leave a guest.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Restored {
        Restored::of(self.json(&[&["run"], arguments].concat()))
    }

    /// The domain XML in an image.
    #[track_caller]
    pub fn xml_in(&self, image: &str) -> String {
        let output = self.vmstow().args(["config", image, "get"]).unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}
