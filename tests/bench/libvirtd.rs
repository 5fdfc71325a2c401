//! A libvirtd of our own: its files are in the work directory, and it ends with the comparison.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::end;
use crate::support::{PATIENCE, Process, wait_until};
use crate::work_dir::WorkDir;

/// Only we talk to it, guests are root's, and nothing stands between QEMU and its files.
const LIBVIRTD_CONF: &str = r#"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:stderr"
"#;
const QEMU_CONF: &str = r#"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"#;

/// Where libvirt's paths lead to, in a mount namespace of its own: below `libvirt` in the work directory.
const BINDS: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("cache", "/var/cache/libvirt"),
    ("log", "/var/log/libvirt"),
    ("run", "/run"),
];

#[derive(Debug)]
pub struct Libvirtd {
    dir: PathBuf,
    child: Child,
}

impl Libvirtd {
    pub fn start(work: &WorkDir) -> Self {
        end::doing("starting libvirtd");
        let dir = work.subdir("libvirt");
        for (name, _) in BINDS {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        std::fs::write(dir.join("etc/libvirtd.conf"), LIBVIRTD_CONF).unwrap();
        std::fs::write(dir.join("etc/qemu.conf"), QEMU_CONF).unwrap();
        let mut script = String::from("set -e\n");
        for (name, target) in BINDS {
            script += &format!("mount --bind '{}' {target}\n", dir.join(name).display());
        }
        script += &format!(
            "exec libvirtd --config '{}'",
            dir.join("etc/libvirtd.conf").display()
        );
        let child = work
            .command("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("stderr")).unwrap())
            .spawn()
            .expect("unshare (Debian package util-linux) can be started");
        let mut libvirtd = Libvirtd { dir, child };
        wait_until("libvirtd to listen", PATIENCE, || {
            if let Some(status) = libvirtd.child.try_wait().unwrap() {
                panic!(
                    "libvirtd ended ({status}): {}; run tests/setup.sh --bench",
                    libvirtd.stderr()
                );
            }
            let is_there = libvirtd.socket().exists();
            is_there.then_some(()).ok_or_else(|| libvirtd.stderr())
        });
        libvirtd
    }

    /// `virsh`, connected to it.
    pub fn virsh(&self, work: &WorkDir) -> Command {
        let mut command = work.command("virsh");
        let socket = self.socket();
        command.arg("-q").args([
            "-c",
            &format!("qemu+unix:///system?socket={}", socket.display()),
        ]);
        command
    }

    /// The QEMU of a domain.
    #[track_caller]
    pub fn qemu(&self, domain: &str) -> Process {
        let path = self.dir.join(format!("run/libvirt/qemu/{domain}.pid"));
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Process::open(text.trim().parse().unwrap()).expect("the domain's QEMU runs")
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("run/libvirt/libvirt-sock")
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.join("stderr")).unwrap_or_default()
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
