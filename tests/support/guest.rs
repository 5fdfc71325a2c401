//! Guests started by hand, as a user would, and ended with the test.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::assets::{self, Qemu};
use super::dir::TestDir;
use super::qmp::Qmp;
use super::serial::Serial;
use super::wait::{PATIENCE, wait_until};

/// What runs in the guest; see `testdata/README.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// The boot sector that counts; ready half a second after its start.
    #[default]
    Counter,
    /// Linux with `content_mib` MiB of known bytes in a tmpfs; ready after some seconds.
    Linux { content_mib: u32 },
}

/// Where a guest's serial port leads to; what it writes can be read from [`Guest::serial`] with both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SerialPort {
    /// `-serial file:…`, which QEMU truncates when it starts.
    #[default]
    File,
    /// A socket with a log file, which can also be written to: [`Guest::send`].
    Socket,
}

/// A guest to start.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Its name; the files of guests in one directory begin with it.
    pub name: String,
    pub qemu: Qemu,
    /// `pc`, `q35` or a versioned machine type.
    pub machine: String,
    pub kind: Kind,
    pub memory_mib: u32,
    pub serial: SerialPort,
    /// Whether it may not write to its disk.
    pub is_disk_read_only: bool,
    /// More arguments for QEMU, behind the others.
    pub extra: Vec<String>,
}

impl Default for GuestSpec {
    fn default() -> Self {
        GuestSpec {
            name: "guest".to_owned(),
            qemu: Qemu::V10,
            machine: "pc".to_owned(),
            kind: Kind::Counter,
            memory_mib: 64,
            serial: SerialPort::File,
            is_disk_read_only: false,
            extra: Vec::new(),
        }
    }
}

impl GuestSpec {
    /// The Linux guest with 32 MiB of known content in 256 MiB of memory.
    pub fn linux() -> Self {
        GuestSpec {
            kind: Kind::Linux { content_mib: 32 },
            memory_mib: 256,
            ..GuestSpec::default()
        }
    }

    /// The same guest with more arguments for QEMU.
    pub fn with(mut self, extra: &[&str]) -> Self {
        self.extra.extend(extra.iter().map(|&word| word.to_owned()));
        self
    }

    /// The same guest under another name.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }
}

/// A guest that runs until it is dropped.
///
/// Files in its directory: `NAME.img` its disk, `NAME.qmp` the socket for the program under test, `NAME.check.qmp` a
/// second one for the test, `NAME.serial` what it wrote, `NAME.stderr` what QEMU said.
#[derive(Debug)]
pub struct Guest {
    name: String,
    dir: PathBuf,
    child: Child,
    status: Option<ExitStatus>,
}

impl Guest {
    /// Starts a guest and waits until its QMP sockets are there.
    ///
    /// Its disk is made unless it is there: a counter guest boots from it, a Linux guest writes to it.
    #[track_caller]
    pub fn start(dir: &TestDir, spec: GuestSpec) -> Self {
        let at = |suffix: &str| dir.join(&format!("{}.{suffix}", spec.name));
        make_disk(&at("img"), spec.kind);
        let child = Command::new(spec.qemu.program())
            .args(arguments(&spec, &at))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(at("stderr")).unwrap())
            .spawn()
            .expect("QEMU can be started");
        let mut guest = Guest {
            name: spec.name.clone(),
            dir: dir.path().to_owned(),
            child,
            status: None,
        };
        wait_until("QEMU to open its sockets", PATIENCE, || {
            if guest.poll_exit().is_some() {
                panic!("QEMU did not start: {}", guest.stderr());
            }
            let is_there = guest.qmp_path().exists() && guest.file("check.qmp").exists();
            is_there.then_some(()).ok_or(guest.stderr())
        });
        guest
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the program under test is told to save: `qmp:PATH`.
    pub fn source(&self) -> String {
        format!("qmp:{}", self.qmp_path().display())
    }

    /// The socket for the program under test.
    pub fn qmp_path(&self) -> PathBuf {
        self.file("qmp")
    }

    /// A QMP connection of the test's own, through the second socket.
    #[track_caller]
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(self.file("check.qmp"))
    }

    pub fn serial(&self) -> Serial {
        Serial::at(self.file("serial"))
    }

    /// The disk's file.
    pub fn disk(&self) -> PathBuf {
        self.file("img")
    }

    /// What QEMU wrote to stderr.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.file("stderr")).unwrap_or_default()
    }

    /// Writes a line to the serial port, which must be a [`SerialPort::Socket`].
    pub fn send(&self, line: &str) {
        let mut socket = UnixStream::connect(self.file("serial.sock")).unwrap();
        writeln!(socket, "{line}").unwrap();
        std::thread::sleep(Duration::from_millis(200)); // QEMU drops what it has not read when we hang up
    }

    /// How QEMU ended, if it did; after this the pid is free.
    pub fn poll_exit(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap();
        }
        self.status
    }

    pub fn is_running(&mut self) -> bool {
        self.poll_exit().is_none()
    }

    /// Waits until QEMU ends by itself.
    #[track_caller]
    pub fn wait_for_exit(&mut self) -> ExitStatus {
        wait_until("QEMU to end", PATIENCE, || {
            self.poll_exit().ok_or_else(|| "it runs".to_owned())
        })
    }

    /// Ends it with SIGKILL.
    pub fn kill(&mut self) {
        if self.poll_exit().is_none() {
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.dir.join(format!("{}.{suffix}", self.name))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}

fn make_disk(path: &Path, kind: Kind) {
    if path.exists() {
        return;
    }
    match kind {
        Kind::Counter => {
            std::fs::copy(assets::testdata("guests/counter.img"), path).unwrap();
        }
        Kind::Linux { .. } => File::create(path).unwrap().set_len(8 << 20).unwrap(),
    }
}

fn arguments(spec: &GuestSpec, at: &dyn Fn(&str) -> PathBuf) -> Vec<String> {
    let at = |suffix: &str| at(suffix).display().to_string();
    let mut words: Vec<String> = Vec::new();
    let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
    add("-name", spec.name.clone());
    add("-machine", spec.machine.clone());
    add("-accel", "tcg".to_owned());
    add("-m", spec.memory_mib.to_string());
    add("-display", "none".to_owned());
    for socket in ["qmp", "check.qmp"] {
        add("-qmp", format!("unix:{},server=on,wait=off", at(socket)));
    }
    let disk = at("img");
    let read_only = if spec.is_disk_read_only { "on" } else { "off" };
    let drive = format!("file={disk},format=raw,if=none,id=disk0,readonly={read_only}");
    add("-drive", drive);
    add("-device", "virtio-blk-pci,drive=disk0".to_owned());
    match spec.serial {
        SerialPort::File => add("-serial", format!("file:{}", at("serial"))),
        SerialPort::Socket => {
            let (socket, log) = (at("serial.sock"), at("serial"));
            add(
                "-chardev",
                format!(
                    "socket,id=serial0,path={socket},server=on,wait=off,logfile={log},logappend=on"
                ),
            );
            add("-serial", "chardev:serial0".to_owned());
        }
    }
    if let Kind::Linux { content_mib } = spec.kind {
        add("-netdev", "user,id=net0".to_owned());
        add("-device", "virtio-net-pci,netdev=net0".to_owned());
        add("-device", "virtio-rng-pci".to_owned());
        add("-device", "virtio-balloon-pci".to_owned());
        add("-kernel", assets::linux_kernel().display().to_string());
        add("-initrd", assets::linux_initrd().display().to_string());
        add(
            "-append",
            format!("console=ttyS0 quiet panic=-1 content={content_mib}"),
        );
    }
    words.extend(spec.extra.iter().cloned());
    words
}
