//! Two hosts on one machine: a network namespace each with a real sshd in it, joined by a cable that can be cut. Each has
//! a bridge, directories and keys of its own; they see the same files. This needs root.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use super::assets::sshd;
use super::dir::TestDir;
use super::process::Process;
use super::sshd::OtherHost;
use super::wait::{PATIENCE, wait_until};

/// What makes a host of a namespace: who sshd runs as, which bridges QEMU may use, and a bridge.
const MAKE_HOST: &str = "set -e
mkdir -p /etc/qemu /run/sshd
mount --bind \"$1/etc\" /etc/qemu
mount --bind \"$1/passwd\" /etc/passwd
chmod 755 /run/sshd
ip link set lo up
ip link add \"$2\" type bridge
ip link set \"$2\" up
touch \"$1/ready\"
exec sleep 3600";

/// Two hosts that reach each other as `a` and `b`.
#[derive(Debug)]
pub struct TwoHosts {
    pub a: Host,
    pub b: Host,
}

/// One of them.
#[derive(Debug)]
pub struct Host {
    files: OtherHost,
    namespace: Child,
    sshd: Option<Child>,
    number: u8,
}

impl TwoHosts {
    pub fn new(test: &TestDir) -> Self {
        let mut hosts = TwoHosts {
            a: Host::new(test, "a", 1),
            b: Host::new(test, "b", 2),
        };
        let peer = hosts.b.namespace.id().to_string();
        let cable = [
            "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable",
        ];
        hosts.a.does(&[&cable[..], &["netns", &peer]].concat());
        for host in [&mut hosts.a, &mut hosts.b] {
            let address = format!("{}/24", host.address());
            host.does(&["ip", "address", "add", &address, "dev", "cable"]);
            host.does(&["ip", "link", "set", "cable", "up"]);
        }
        hosts.a.listen();
        hosts.b.listen();
        hosts.a.can_reach("b", &hosts.b);
        hosts.b.can_reach("a", &hosts.a);
        hosts
    }

    /// Cuts the cable, or mends it.
    pub fn cut(&self, is_cut: bool) {
        let state = if is_cut { "down" } else { "up" };
        self.a.does(&["ip", "link", "set", "cable", state]);
    }
}

impl Host {
    fn new(test: &TestDir, name: &str, number: u8) -> Self {
        let files = OtherHost::new(test, name);
        let etc = files.path("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("bridge.conf"), "allow all\n").unwrap();
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--propagation", "private"]);
        command.args(["sh", "-c", MAKE_HOST, "sh"]);
        command.arg(files.path("")).arg(format!("lan-{name}"));
        let child = command.stdin(Stdio::null()).spawn();
        let mut host = Host {
            namespace: child.expect("unshare (Debian package util-linux) can be started"),
            files,
            sshd: None,
            number,
        };
        wait_until("a host", PATIENCE, || {
            if let Some(status) = host.namespace.try_wait().unwrap() {
                panic!("no host (Debian package iproute2): {status}");
            }
            let is_ready = host.path("ready").exists();
            is_ready.then_some(()).ok_or(String::new())
        });
        host
    }

    /// A file of its.
    pub fn path(&self, name: &str) -> PathBuf {
        self.files.path(name)
    }

    fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    fn listen(&mut self) {
        let mut command = self.command(sshd().as_os_str());
        command
            .args(["-D", "-e", "-f"])
            .arg(self.path("sshd_config"))
            .arg(format!("-oListenAddress={}", self.address()))
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        self.sshd = Some(command.spawn().unwrap());
    }

    /// Lets its ssh know another host, and waits until that answers.
    fn can_reach(&self, name: &str, other: &Host) {
        let config = format!(
            "Host {name}\n  HostName {}\n  HostKeyAlias other\n  User root\n  IdentityFile {}\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {}\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  BatchMode yes\n  LogLevel ERROR\n",
            other.address(),
            other.path("user_key").display(),
            other.path("known_hosts").display()
        );
        std::fs::write(self.path("ssh_config"), config).unwrap();
        wait_until("sshd to answer", PATIENCE, || {
            let mut command = self.command("ssh".as_ref());
            command.arg("-F").arg(self.path("ssh_config"));
            let output = command.args([name, "true"]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            output.status.success().then_some(()).ok_or(said)
        });
    }

    /// A program that runs there.
    pub fn command(&self, program: &OsStr) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.namespace.id().to_string(), "-n", "-m"])
            .arg(program);
        command
    }

    #[track_caller]
    pub fn does(&self, words: &[&str]) {
        let (program, arguments) = words.split_first().unwrap();
        let mut command = self.command(program.as_ref());
        let output = command.args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
    }

    /// The program under test, run there.
    pub fn vmstow(&self, test: &TestDir, arguments: &[&str]) -> Command {
        let plain = test.vmstow_command();
        let mut command = self.command(plain.get_program());
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap());
        }
        for (name, directory) in [
            ("VMSTOW_RUNTIME_DIR", "run"),
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_STATE_HOME", "state"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_CONFIG_HOME", "config"),
        ] {
            command.env(name, self.path(directory));
        }
        let ssh = format!("ssh -F {}", self.path("ssh_config").display());
        command
            .env("VMSTOW_SSH", ssh)
            .env("VMSTOW_REMOTE_PROGRAM", env!("CARGO_BIN_EXE_vmstow"))
            .current_dir(test.path())
            .args(arguments);
        command
    }

    /// What the program under test answers there.
    #[track_caller]
    pub fn json(&self, test: &TestDir, arguments: &[&str]) -> Value {
        let arguments = [&["--json"], arguments].concat();
        let output: Output = self.vmstow(test, &arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What the program under test says there when it fails, and its exit code.
    #[track_caller]
    pub fn refused(&self, test: &TestDir, arguments: &[&str]) -> (String, i32) {
        let output = self.vmstow(test, arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{arguments:?} succeeded");
        (said, output.status.code().expect("it was not killed"))
    }

    /// The processes that work there for another host.
    pub fn servers(&self, test: &TestDir) -> Vec<Process> {
        let mut processes = test.processes();
        processes.retain(|it| {
            let is_server = it.argv().iter().any(|word| word == "--stdio");
            is_server && self.is_of(it.pid())
        });
        processes
    }

    /// The QEMUs that were started there by the program under test.
    pub fn qemus(&self, test: &TestDir) -> Vec<Process> {
        let mut qemus = test.qemus();
        qemus.retain(|it| self.is_of(it.pid()));
        qemus
    }

    fn is_of(&self, pid: u32) -> bool {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let wanted = format!("VMSTOW_RUNTIME_DIR={}", self.path("run").display());
        environment
            .split(|byte| *byte == 0)
            .any(|variable| variable == wanted.as_bytes())
    }

    /// The records of moves that it keeps in this directory of its state.
    pub fn records(&self, directory: &str) -> Vec<PathBuf> {
        let directory = self.path("state").join("vmstow").join(directory);
        let entries = std::fs::read_dir(directory).into_iter().flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.extension() == Some(OsStr::new("json")))
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in self.sshd.iter_mut().chain([&mut self.namespace]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
