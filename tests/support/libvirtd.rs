//! A libvirtd of a test's own: its directories are the test's, in a mount namespace, and it ends with the test.
//!
//! This needs root, and libvirt 11 (`tests/setup.sh`).

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::assets::libvirt_9;
use super::process::Process;
use super::wait::{PATIENCE, wait_until};

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

/// What of libvirt 9.0 has to be where libvirt's own is.
const BINDS_9: [&str; 3] = [
    "/usr/lib/libvirt",
    "/usr/lib/x86_64-linux-gnu/libvirt",
    "/usr/share/libvirt",
];

#[derive(Debug)]
pub struct Libvirtd {
    dir: PathBuf,
    child: Child,
}

impl Libvirtd {
    /// Starts one with its files below `dir`, out of reach of the terminal's Ctrl-C.
    pub fn start(dir: &Path) -> Self {
        Libvirtd::start_as(dir, "", None)
    }

    /// Debian 12's libvirt 9.0, which `tests/setup.sh` unpacks. It saves in `format`.
    pub fn start_9(dir: &Path, format: &str) -> Self {
        let conf = format!("save_image_format = \"{format}\"\n");
        Libvirtd::start_as(dir, &conf, Some(&libvirt_9()))
    }

    fn start_as(dir: &Path, conf: &str, root: Option<&Path>) -> Self {
        let dir = dir.to_owned();
        for (name, _) in BINDS {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        std::fs::write(dir.join("etc/libvirtd.conf"), LIBVIRTD_CONF).unwrap();
        let conf = format!("{QEMU_CONF}{conf}");
        std::fs::write(dir.join("etc/qemu.conf"), conf).unwrap();
        let mut script = String::from("set -e\n");
        for (name, target) in BINDS {
            // A host where libvirt never ran has not all of them.
            let own = dir.join(name);
            script += &format!(
                "mkdir -p {target}\nmount --bind '{}' {target}\n",
                own.display()
            );
        }
        let mut program = "libvirtd".to_owned();
        if let Some(root) = root {
            let root = root.display();
            for target in BINDS_9 {
                script += &format!("mount --bind '{root}{target}' {target}\n");
            }
            script += &format!("export LD_LIBRARY_PATH='{root}/usr/lib/x86_64-linux-gnu'\n");
            program = format!("'{root}/usr/sbin/libvirtd'");
        }
        script += &format!(
            "exec {program} --config '{}'",
            dir.join("etc/libvirtd.conf").display()
        );
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .process_group(0)
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("stderr")).unwrap())
            .spawn()
            .expect("unshare (Debian package util-linux) can be started");
        let mut libvirtd = Libvirtd { dir, child };
        wait_until("libvirtd to listen", PATIENCE, || {
            if let Some(status) = libvirtd.child.try_wait().unwrap() {
                panic!(
                    "libvirtd (Debian package libvirt-daemon) ended ({status}): {}",
                    libvirtd.stderr()
                );
            }
            let is_there = libvirtd.socket().exists();
            is_there.then_some(()).ok_or_else(|| libvirtd.stderr())
        });
        libvirtd
    }

    /// Where its files are: `lib` stands for /var/lib/libvirt.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `virsh`, connected to it.
    pub fn virsh(&self) -> Command {
        let mut command = Command::new("virsh");
        let uri = format!("qemu+unix:///system?socket={}", self.socket().display());
        command.args(["-q", "-c", &uri]).process_group(0);
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
