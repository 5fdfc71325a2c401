//! The other host: a real sshd at the other end of a real ssh, with keys, home and configuration of a test's own.
//!
//! ssh starts it for each connection (`sshd -i`), so it needs no port, and ends with it. As root it runs in a mount namespace, where
//! its user and its directory exist.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use super::assets::sshd;
use super::dir::TestDir;

/// Another host, which is this one.
#[derive(Debug)]
pub struct OtherHost {
    dir: PathBuf,
}

impl OtherHost {
    /// One whose files are below `name` in the test's directory.
    pub fn new(test: &TestDir, name: &str) -> Self {
        let dir = test.join(name);
        std::fs::create_dir(&dir).unwrap();
        for name in ["run", "state", "config", "cache"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        let host = OtherHost { dir };
        for key in ["host_key", "user_key"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(host.path(key))
                .status()
                .expect("ssh-keygen (Debian package openssh-client) can be started");
            assert!(made.success());
        }
        std::fs::copy(host.path("user_key.pub"), host.path("authorized_keys")).unwrap();
        let public = std::fs::read_to_string(host.path("host_key.pub")).unwrap();
        host.write("known_hosts", &format!("other {public}"));
        host.write("sshd_config", &host.sshd_config());
        host.write("start", &host.start_script());
        std::fs::set_permissions(host.path("start"), Permissions::from_mode(0o700)).unwrap();
        host.write("ssh_config", &host.ssh_config());
        host
    }

    /// A file of its.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The location of a file of its, for `vmstow`.
    pub fn location(&self, name: &str) -> String {
        format!("ssh://other{}", self.path(name).display())
    }

    /// What `vmstow` has to find in its environment to reach it.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [
            (
                "VMSTOW_SSH",
                format!("ssh -F {}", self.path("ssh_config").display()),
            ),
            (
                "VMSTOW_REMOTE_PROGRAM",
                env!("CARGO_BIN_EXE_vmstow").to_owned(),
            ),
        ]
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn sshd_config(&self) -> String {
        let dir = self.dir.display();
        format!(
            "HostKey {dir}/host_key\nAuthorizedKeysFile {dir}/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\nLogLevel ERROR\n\
             Subsystem sftp internal-sftp\nSetEnv VMSTOW_RUNTIME_DIR={dir}/run XDG_RUNTIME_DIR={dir}/run XDG_STATE_HOME={dir}/state \
             XDG_CACHE_HOME={dir}/cache XDG_CONFIG_HOME={dir}/config VMSTOW_SYSTEM_CONFIG={dir}/config/system.toml\n"
        )
    }

    fn start_script(&self) -> String {
        let (sshd, dir) = (sshd(), self.dir.display());
        let start = format!("exec '{}' -i -e -f '{dir}/sshd_config'", sshd.display());
        if !rustix::process::geteuid().is_root() {
            return format!("#!/bin/sh\n{start}\n");
        }
        let mut users = std::fs::read_to_string("/etc/passwd").unwrap();
        if !users.contains("\nsshd:") {
            users += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n";
        }
        self.write("passwd", &users);
        format!(
            "#!/bin/sh\nexec unshare --mount --propagation private sh -c \"mount --bind '{dir}/passwd' /etc/passwd && \
             mkdir -p /run/sshd && chmod 755 /run/sshd && {start}\"\n"
        )
    }

    fn ssh_config(&self) -> String {
        let dir = self.dir.display();
        format!(
            "Host other\n  HostName other\n  ProxyCommand {dir}/start\n  IdentityFile {dir}/user_key\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {dir}/known_hosts\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  BatchMode yes\n  \
             LogLevel ERROR\n"
        )
    }
}
