//! Where a QEMU that somebody started has its monitor, and who listens on a socket.
//!
//! Source: QEMU `qemu-options.hx` (`-qmp`, `-mon`, `-chardev socket`), `util/qemu-option.c` for the doubled comma;
//! the kernel's `net/unix/af_unix.c` for `/proc/net/unix`.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::HostError;
use super::process::ProcessFacts;

/// A QMP monitor as a QEMU's arguments name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Monitor {
    /// QEMU listens on this unix socket.
    Unix(PathBuf),
    /// QEMU listens on a descriptor that it inherited.
    InheritedSocket(u32),
    /// Anything we cannot connect to by a path: TCP, a pty, an outgoing connection; in QEMU's words.
    Other(String),
}

/// The QMP monitors in an argument vector, in their order. Relative paths are resolved against `cwd`.
pub fn monitors_of(argv: &[String], cwd: &Path) -> Vec<Monitor> {
    let mut monitors = Vec::new();
    for (index, argument) in argv.iter().enumerate() {
        let option = argument.trim_start_matches('-');
        let is_option = argument.len() > option.len();
        let value = argv.get(index + 1).map(String::as_str);
        let (true, Some(value)) = (is_option, value) else {
            continue;
        };
        match option {
            "qmp" | "qmp-pretty" => monitors.push(legacy_monitor(value, cwd)),
            "mon" => monitors.extend(chardev_monitor(value, argv, cwd)),
            _ => {}
        }
    }
    monitors
}

/// The unix sockets on which this QEMU's QMP monitors listen; at least one.
///
/// # Errors
/// [`HostError::NoMonitor`] if there is none, with what there is instead.
pub fn qmp_sockets(facts: &ProcessFacts) -> Result<Vec<PathBuf>, HostError> {
    let mut sockets = Vec::new();
    let mut found = Vec::new();
    for monitor in monitors_of(&facts.argv, &facts.cwd) {
        match monitor {
            Monitor::Unix(path) if is_missing(&path) => {
                // With -daemonize QEMU leaves the directory that a relative path meant.
                found.push(format!("unix:{}, which is not there", path.display()));
            }
            Monitor::Unix(path) => sockets.push(path),
            Monitor::InheritedSocket(fd) => match path_of_inherited(facts, fd) {
                Some(path) => sockets.push(path),
                None => found.push(format!("descriptor {fd}")),
            },
            Monitor::Other(words) => found.push(words),
        }
    }
    match sockets.is_empty() {
        false => Ok(sockets),
        true => Err(HostError::NoMonitor {
            pid: facts.id.pid,
            found,
        }),
    }
}

fn is_missing(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The processes that listen on a unix socket. Several share it where it was inherited; those that we may not look
/// at are missing.
pub fn listeners_of(socket: &Path) -> Result<Vec<i32>, HostError> {
    let wanted = resolved(socket);
    let entries = listening_sockets()?;
    let candidates = entries
        .iter()
        .filter(|entry| entry.path.file_name() == wanted.file_name());
    let mut pids = Vec::new();
    for entry in candidates {
        for pid in holders_of(entry.inode) {
            // The kernel keeps the path as it was bound, relative ones too.
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            if resolved(&cwd.join(&entry.path)) == wanted {
                pids.push(pid);
            }
        }
    }
    Ok(pids)
}

/// Whether somebody listens on a unix socket that was bound by its absolute path, be it one that we may not look at.
pub fn has_listener(socket: &Path) -> bool {
    let wanted = resolved(socket);
    let entries = listening_sockets().unwrap_or_default();
    let mut names = entries
        .iter()
        .filter(|it| it.path.file_name() == wanted.file_name());
    names.any(|entry| entry.path.is_absolute() && resolved(&entry.path) == wanted)
}

/// Whether a unix socket is there, whoever may listen on it.
pub fn is_socket(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// The QEMU that listens on a unix socket; the first listener if none looks like a QEMU.
///
/// # Errors
/// [`HostError::NoListener`] if there is none that we may see.
pub fn listener_of(socket: &Path) -> Result<i32, HostError> {
    let pids = listeners_of(socket)?;
    let qemu = pids.iter().find(|pid| is_qemu(**pid));
    let found = qemu.or(pids.first()).copied();
    found.ok_or_else(|| HostError::NoListener {
        path: socket.to_owned(),
    })
}

/// Whether the process runs a program named like QEMU's; also for one that may not be looked at, no.
pub fn is_qemu(pid: i32) -> bool {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("qemu")
}

/// `unix:PATH,server=on,wait=off`, `tcp:…`, `stdio`, …
fn legacy_monitor(value: &str, cwd: &Path) -> Monitor {
    let Some(rest) = value.strip_prefix("unix:") else {
        return Monitor::Other(value.to_owned());
    };
    let mut fields = split_fields(rest).into_iter();
    let path = fields.next().unwrap_or_default();
    let fields: Vec<(String, String)> = fields.map(|field| key_and_value(&field)).collect();
    match is_on(&fields, "server") && !is_on(&fields, "abstract") {
        true => Monitor::Unix(cwd.join(path)),
        false => Monitor::Other(value.to_owned()),
    }
}

/// The chardev that `-mon chardev=X,mode=control` names; `None` for a human monitor.
fn chardev_monitor(value: &str, argv: &[String], cwd: &Path) -> Option<Monitor> {
    let fields = fields_of(value, "chardev");
    if lookup(&fields, "mode") != Some("control") {
        return None;
    }
    let id = lookup(&fields, "chardev")?;
    let is_chardev = |pair: &&[String]| {
        let [option, _] = pair else { return false };
        matches!(option.as_str(), "-chardev" | "--chardev")
    };
    let values = argv
        .windows(2)
        .filter(is_chardev)
        .filter_map(|it| it.get(1));
    let mut chardevs = values.map(|value| (value, fields_of(value, "backend")));
    let (words, fields) = chardevs.find(|(_, fields)| lookup(fields, "id") == Some(id))?;
    Some(socket_chardev(words, &fields, cwd))
}

fn socket_chardev(words: &str, fields: &[(String, String)], cwd: &Path) -> Monitor {
    let listens = lookup(fields, "backend") == Some("socket")
        && is_on(fields, "server")
        && !is_on(fields, "abstract");
    let path = lookup(fields, "path").map(|path| Monitor::Unix(cwd.join(path)));
    let fd = lookup(fields, "fd").and_then(|fd| fd.parse().ok());
    let monitor = path.or(fd.map(Monitor::InheritedSocket));
    monitor
        .filter(|_| listens)
        .unwrap_or_else(|| Monitor::Other(words.to_owned()))
}

/// The fields of an option value, in QEMU's own `key=value,…` form or as JSON.
fn fields_of(value: &str, implied_key: &str) -> Vec<(String, String)> {
    if value.trim_start().starts_with('{') {
        return fields_of_json(value);
    }
    let mut fields = split_fields(value);
    if let Some(first) = fields.first_mut().filter(|first| !first.contains('=')) {
        *first = format!("{implied_key}={first}");
    }
    fields.iter().map(|field| key_and_value(field)).collect()
}

/// `{"id": …, "backend": {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": …}}, "server": true}}}`
/// and its flat forms: every scalar under its own key, a `type` directly below `backend` as `backend`.
fn fields_of_json(text: &str) -> Vec<(String, String)> {
    fn gather(value: &Value, key: &str, parent: &str, into: &mut Vec<(String, String)>) {
        let key = match (parent, key) {
            ("backend", "type") => "backend",
            ("addr", "type") => "address",
            (_, "str") => "fd",
            (_, key) => key,
        };
        match value {
            Value::Object(fields) => {
                let parent = if key == "data" { parent } else { key };
                for (name, value) in fields {
                    gather(value, name, parent, into);
                }
            }
            Value::String(text) => into.push((key.to_owned(), text.clone())),
            Value::Bool(true) => into.push((key.to_owned(), "on".to_owned())),
            Value::Bool(false) => into.push((key.to_owned(), "off".to_owned())),
            Value::Number(number) => into.push((key.to_owned(), number.to_string())),
            Value::Null | Value::Array(_) => {}
        }
    }
    let mut fields = Vec::new();
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        gather(&value, "", "", &mut fields);
    }
    fields
}

/// Splits at commas; a doubled comma is one that belongs to the text.
fn split_fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let is_doubled = letter == ',' && letters.next_if_eq(&',').is_some();
        match fields.last_mut() {
            Some(field) if letter != ',' || is_doubled => field.push(letter),
            _ => fields.push(String::new()),
        }
    }
    fields
}

/// `key=value`; `key` alone is `key=on`, `nokey` is `key=off`.
fn key_and_value(field: &str) -> (String, String) {
    match field.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => match field.strip_prefix("no") {
            Some(key) => (key.to_owned(), "off".to_owned()),
            None => (field.to_owned(), "on".to_owned()),
        },
    }
}

/// As in QEMU the last of several wins.
fn lookup<'fields>(fields: &'fields [(String, String)], key: &str) -> Option<&'fields str> {
    let mut found = fields.iter().rev().filter(|(name, _)| name == key);
    found.next().map(|(_, value)| value.as_str())
}

fn is_on(fields: &[(String, String)], key: &str) -> bool {
    matches!(lookup(fields, key), Some("on" | "yes" | "true" | "y"))
}

/// A line of `/proc/net/unix` of a socket that listens.
struct ListeningSocket {
    inode: u64,
    path: PathBuf,
}

fn listening_sockets() -> Result<Vec<ListeningSocket>, HostError> {
    let table = "/proc/net/unix";
    let bytes = fs::read(table).map_err(|source| HostError::File {
        act: "read",
        path: table.into(),
        source,
    })?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().filter_map(listening_socket).collect())
}

/// `0000000000000000: 00000002 00000000 00010000 0001 01 24309 /run/x.sock`: the fourth is the flags, the seventh the
/// inode; the path may hold blanks.
fn listening_socket(line: &str) -> Option<ListeningSocket> {
    const ACCEPTS_CONNECTIONS: u32 = 1 << 16;
    let mut fields = line.splitn(8, ' ').filter(|field| !field.is_empty());
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    let rest = line.split_ascii_whitespace().nth(6)?;
    let inode = rest.parse().ok()?;
    let after = line.find(&format!(" {rest} "))? + rest.len() + 2;
    let path = PathBuf::from(line.get(after..)?);
    (flags & ACCEPTS_CONNECTIONS != 0).then_some(ListeningSocket { inode, path })
}

fn holders_of(inode: u64) -> Vec<i32> {
    let wanted = PathBuf::from(format!("socket:[{inode}]"));
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| holds(*pid, &wanted)).collect()
}

fn holds(pid: i32, wanted: &Path) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let mut targets = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    targets.any(|target| target == wanted)
}

fn path_of_inherited(facts: &ProcessFacts, fd: u32) -> Option<PathBuf> {
    let target = fs::read_link(format!("/proc/{}/fd/{fd}", facts.id.pid)).ok()?;
    let sockets = listening_sockets().ok()?;
    let found = sockets
        .into_iter()
        .find(|one| target == Path::new(&format!("socket:[{}]", one.inode)))?;
    found.path.is_absolute().then_some(found.path)
}

/// The path with its directory's symbolic links followed, as far as that can be seen.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().and_then(|it| it.canonicalize().ok());
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn monitors(arguments: &[&str]) -> Vec<Monitor> {
        let argv: Vec<String> = arguments.iter().map(|&it| it.to_owned()).collect();
        monitors_of(&argv, Path::new("/srv"))
    }

    #[test]
    fn a_qmp_option_names_a_socket_relative_to_the_directory_of_qemu() {
        for value in [
            "unix:q.sock,server,nowait",
            "unix:q.sock,server=on,wait=off",
        ] {
            let expected = vec![Monitor::Unix("/srv/q.sock".into())];
            assert_eq!(monitors(&["qemu", "-qmp", value]), expected);
            assert_eq!(monitors(&["qemu", "--qmp", value]), expected);
        }
        assert_eq!(
            monitors(&["qemu", "-qmp", "unix:/run/a,,b,server=on"]),
            [Monitor::Unix("/run/a,b".into())]
        );
    }

    #[test]
    fn what_cannot_be_connected_to_is_told_in_the_words_of_qemu() {
        for value in ["tcp:localhost:4444,server=on", "stdio", "unix:/run/q.sock"] {
            let found = monitors(&["qemu", "-qmp", value]);
            assert_eq!(found, [Monitor::Other(value.to_owned())]);
        }
    }

    #[test]
    fn a_monitor_is_found_through_its_chardev() {
        let chardev = "socket,id=m,path=/run/q.sock,server=on,wait=off";
        let expected = [Monitor::Unix("/run/q.sock".into())];
        for mon in ["chardev=m,mode=control", "m,mode=control,pretty=on"] {
            assert_eq!(
                monitors(&["qemu", "-chardev", chardev, "-mon", mon]),
                expected
            );
        }
        assert!(monitors(&["qemu", "-chardev", chardev, "-mon", "chardev=m"]).is_empty());
        let inherited = "socket,id=m,fd=25,server=on,wait=off";
        assert_eq!(
            monitors(&["qemu", "-chardev", inherited, "-mon", "m,mode=control"]),
            [Monitor::InheritedSocket(25)]
        );
    }

    #[test]
    fn json_arguments_are_read_too() {
        let chardev = r#"{"id":"m","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/run/q.sock"}},"server":true,"wait":false}}}"#;
        let mon = r#"{"chardev":"m","mode":"control"}"#;
        assert_eq!(
            monitors(&["qemu", "-chardev", chardev, "-mon", mon]),
            [Monitor::Unix("/run/q.sock".into())]
        );
    }

    #[test]
    fn the_listener_of_a_socket_is_found_by_any_path_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let us = i32::try_from(std::process::id()).unwrap();
        assert_eq!(listener_of(&path).unwrap(), us);
        assert_eq!(listener_of(&link.join("a socket")).unwrap(), us);
        let nobody = dir.path().join("nobody");
        assert!(matches!(
            listener_of(&nobody),
            Err(HostError::NoListener { .. })
        ));
    }
}
