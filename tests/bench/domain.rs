//! The same guests as libvirt's domain XML.

use std::path::Path;

use crate::guests::Recipe;
use crate::support::{Qemu, linux_initrd, linux_kernel};

/// The domain `name`; its serial port and what that wrote are `serial.sock` and `serial` in `dir`.
pub fn xml(recipe: &Recipe, name: &str, dir: &Path) -> String {
    let memory = recipe.memory_mib;
    let qemu = Qemu::V10.program();
    let (qemu, kernel, initrd) = (qemu.display(), linux_kernel(), linux_initrd());
    let (kernel, initrd, dir) = (kernel.display(), initrd.display(), dir.display());
    let arguments = recipe.kernel_arguments();
    let disk = recipe.disk.as_ref().map_or(String::new(), |path| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>
      <target dev='vda' bus='virtio'/><readonly/></disk>",
            path.display()
        )
    });
    format!(
        "<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{arguments}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{qemu}</emulator>
    {disk}
    <controller type='usb' model='none'/>
    <serial type='unix'>
      <source mode='bind' path='{dir}/serial.sock'/>
      <log file='{dir}/serial' append='on'/>
      <target port='0'/>
    </serial>
    <video><model type='none'/></video>
    <audio id='1' type='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"
    )
}
