//! Where the serial ports of a guest of ours lead to.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::SuperviseError;
use super::launch::GuestDescription;
use crate::config::{Arguments, Resource, ResourceKind, ResourceTable};
use crate::host::{GuestDir, ProcessFacts};
use crate::qmp::{Chardev, QmpClient};

/// How long the monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// Devices that are serial ports, in the order in which they are counted.
const SERIAL_DEVICES: [&str; 4] = ["isa-serial", "pci-serial", "usb-serial", "virtconsole"];

/// What one can connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialPort {
    /// A pseudo terminal.
    Terminal(PathBuf),
    /// A unix socket on which QEMU listens; it serves one at a time.
    Socket(PathBuf),
    /// A file to which the guest's output is appended. Nothing can be said to the guest.
    Log(PathBuf),
}

/// Finds what the serial port of that number, from 0, leads to.
///
/// # Errors
/// [`SuperviseError::NoSerialPort`], [`SuperviseError::NotAConsole`], [`SuperviseError::ConsoleInUse`].
pub fn serial_port(
    dir: &GuestDir,
    guest: &GuestDescription,
    number: usize,
) -> Result<SerialPort, SuperviseError> {
    let process = ProcessFacts::read(guest.process.pid)?;
    let ports = serial_ports(&process.argv);
    let count = ports.len();
    let guest_name = || dir.name().to_owned();
    let Some(port) = ports.into_iter().nth(number) else {
        return Err(SuperviseError::NoSerialPort {
            guest: guest_name(),
            number,
            count,
        });
    };
    let in_cwd = |path: &String| process.cwd.join(path);
    let backend = &port.backend;
    match (backend.kind.as_str(), &backend.path) {
        ("pty", _) => {
            if let Some(terminal) = terminal_of(dir, guest, &port) {
                return Ok(SerialPort::Terminal(terminal));
            }
        }
        ("socket", Some(path)) if backend.is_server => {
            let chardevs = chardevs(guest).unwrap_or_default();
            let known = chardevs.iter().find(|one| is_label(&port, &one.label));
            return match known.is_none_or(|one| one.filename.starts_with("disconnected:")) {
                true => Ok(SerialPort::Socket(in_cwd(path))),
                false => Err(SuperviseError::ConsoleInUse {
                    guest: guest_name(),
                    number,
                }),
            };
        }
        ("file", Some(path)) => return Ok(SerialPort::Log(in_cwd(path))),
        _ => {}
    }
    Err(SuperviseError::NotAConsole {
        guest: guest_name(),
        number,
        backend: backend.kind.clone(),
    })
}

/// What the serial ports in an argument vector are connected to.
fn serial_ports(argv: &[String]) -> Vec<Resource> {
    let Ok(arguments) = Arguments::parse(argv) else {
        return Vec::new();
    };
    let table = ResourceTable::from_arguments(&arguments, None);
    let short = (0..).map_while(|number: usize| {
        let name = format!("serial{number}");
        table.find(ResourceKind::Chardev, &name)
    });
    // Without an option QEMU may make the first one itself.
    let is_short = |one: &&Resource| {
        one.frontend
            .as_ref()
            .is_some_and(|it| it.starts_with("serial"))
    };
    let mut found: Vec<Resource> = short.filter(is_short).cloned().collect();
    for driver in SERIAL_DEVICES {
        let devices = arguments.options("device").map(|(_, it)| it.properties());
        let devices = devices.filter(|it| it.get("driver").as_deref() == Some(driver));
        let mut devices: Vec<_> = devices.collect();
        // Those with no index come in their order, which sorting keeps.
        devices.sort_by_key(|it| it.get("index").and_then(|index| index.parse::<u32>().ok()));
        let chardevs = devices.iter().filter_map(|it| it.get("chardev"));
        let ports = chardevs.filter_map(|id| table.find(ResourceKind::Chardev, &id).cloned());
        found.extend(ports);
    }
    found
}

fn is_label(port: &Resource, label: &String) -> bool {
    port.id == *label || port.aliases.contains(label)
}

fn chardevs(guest: &GuestDescription) -> Option<Vec<Chardev>> {
    let mut qmp = QmpClient::connect(&guest.qmp, ANSWER).ok()?;
    qmp.set_timeout(ANSWER);
    qmp.query_chardev().ok()
}

/// The pseudo terminal behind a port: QEMU tells it when asked, and in its log at the start.
fn terminal_of(dir: &GuestDir, guest: &GuestDescription, port: &Resource) -> Option<PathBuf> {
    let from_monitor = || {
        let chardevs = chardevs(guest)?;
        let known = chardevs.iter().find(|one| is_label(port, &one.label))?;
        known.filename.strip_prefix("pty:").map(str::to_owned)
    };
    let from_log = || {
        let log = fs::read_to_string(dir.log()).ok()?;
        let lines = log.lines().rev();
        let mut told = lines.filter_map(|line| redirected(line, &|label| is_label(port, label)));
        told.next()
    };
    let found = from_monitor().or_else(from_log).map(PathBuf::from);
    found.filter(|path| path.starts_with(Path::new("/dev")))
}

/// `char device redirected to /dev/pts/3 (label charserial0)`
fn redirected(line: &str, is_label: &dyn Fn(&String) -> bool) -> Option<String> {
    let (path, label) = line
        .split_once("char device redirected to ")?
        .1
        .split_once(" (label ")?;
    let label = label.strip_suffix(')')?.to_owned();
    is_label(&label).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(argv: &[&str]) -> Vec<String> {
        let argv: Vec<String> = std::iter::once("qemu")
            .chain(argv.iter().copied())
            .map(str::to_owned)
            .collect();
        let ports = serial_ports(&argv).into_iter();
        ports.map(|port| port.backend.kind).collect()
    }

    #[test]
    fn serial_ports_are_counted_as_the_guest_counts_them() {
        let argv = [
            "-chardev",
            "pty,id=a",
            "-chardev",
            "socket,id=b,path=/s,server=on,wait=off",
            "-chardev",
            "null,id=c",
            "-chardev",
            "file,id=d,path=/f",
            "-device",
            r#"{"driver":"virtconsole","chardev":"d","id":"console0"}"#,
            "-device",
            r#"{"driver":"isa-serial","chardev":"b","id":"serial1","index":1}"#,
            "-device",
            r#"{"driver":"isa-serial","chardev":"a","id":"serial0","index":0}"#,
            "-device",
            r#"{"driver":"virtserialport","chardev":"c","name":"org.qemu.guest_agent.0"}"#,
        ];
        assert_eq!(kinds(&argv), ["pty", "socket", "file"]);
        assert_eq!(
            kinds(&["-serial", "pty", "-serial", "null"]),
            ["pty", "null"]
        );
        assert_eq!(kinds(&["-nodefaults"]), [""; 0]);
    }

    #[test]
    fn the_log_tells_of_a_pseudo_terminal() {
        let line = "qemu: char device redirected to /dev/pts/3 (label charserial0)";
        let is = |wanted: &'static str| move |label: &String| label == wanted;
        assert_eq!(
            redirected(line, &is("charserial0")).as_deref(),
            Some("/dev/pts/3")
        );
        assert_eq!(redirected(line, &is("charserial1")), None);
        assert_eq!(redirected("something else", &is("")), None);
    }
}
