//! Kept arguments → restore arguments.
//!
//! The arguments of the saved QEMU describe the guest, and besides it how somebody once ran it: a terminal, a monitor, a
//! way to start. This replaces the second part and leaves the first as it is. The steps, in order: [`DROPPED`] goes,
//! memory that was mapped from an image becomes QEMU's own, `-nographic` is spelled out, remaps are applied, what cannot be restored is refused, terminals become log files,
//! what lay in the guest's old directory moves to its new one, files are appended to, and what every guest of ours has comes at the end.
//!
//! Restore arguments are a fixed point: kept again and restored again in the same place they stay the same. Our own
//! additions are known by ids that begin with `vmstow-`. Relative paths stay, since the directory is restored too.
//!
//! Source: QEMU's manual; that a file character device is truncated even with `-incoming`, that `-nographic` is
//! `graphics=off` in the machine with `mon:stdio` as the first serial port: seen with 7.2 and 10.0.

use super::arguments::{Argument, Arguments};
use super::error::{ConfigError, Reason};
use super::mapped_memory;
use super::passt;
use super::properties::escape;
use super::remap::{self, Remap, Remapped, rename_chardev};
use super::resources::{OWN_LOG_PREFIX, OWN_PREFIX, is_monitor_only};

/// Options that say how QEMU was run, not what the guest is.
pub const DROPPED: &[&str] = &[
    "incoming",  // ours replaces it
    "loadvm",    // the state comes from the image
    "S",         // always ours
    "preconfig", // waits for a monitor that is gone
    "daemonize", // we look after the process
    "pidfile",   // ours lies in the runtime directory
    "qmp",       // the monitors' clients are not restored
    "qmp-pretty",
    "mon",
    "monitor",
    "D",            // would be truncated
    "dump-vmstate", // ends QEMU
    "qtest",        // a test's connection
    "qtest-log",
    "sandbox",     // always ours
    "name",        // always ours
    "full-screen", // windows: nobody sits in front of a restored guest
    "sdl",
    "curses",
    "alt-grab",
    "ctrl-grab",
    "no-frame",
    "no-quit",
    "show-cursor",
];

/// Displays without a window or a terminal, which a restored guest keeps.
const KEPT_DISPLAYS: [&str; 4] = ["none", "vnc", "egl-headless", "dbus"];

/// The id of the QMP character device that restore arguments add.
pub const QMP_CHARDEV: &str = "vmstow-qmp";
/// The id of a second one, for the keeper of a guest that gets its memory while it runs.
pub const KEEPER_CHARDEV: &str = "vmstow-keeper-qmp";
/// The id of the monitor that restore arguments add.
pub const MONITOR: &str = "vmstow-monitor";

/// Where and as what a guest is restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreContext {
    /// The resolved machine type, never an alias.
    pub machine_type: String,
    /// Path of the QMP socket that QEMU shall make.
    pub qmp_socket: String,
    /// Directory for the logs that stand in for terminals: `serial0.log`.
    pub log_dir: String,
    /// The guest's name.
    pub name: String,
}

/// The arguments that bring the guest back, program first.
///
/// # Errors
/// [`ConfigError::Refused`] with every reason at once: remaps that fit nothing, temporary overlays, descriptors that
/// QEMU inherited, configuration files.
pub fn restore_arguments(
    kept: &Arguments,
    context: &RestoreContext,
    remaps: &[Remap],
) -> Result<Vec<String>, ConfigError> {
    let mut arguments = drop_run_options(kept);
    mapped_memory::unmap(&mut arguments);
    spell_out_nographic(&mut arguments);
    let mut reasons = Vec::new();
    match remap::apply(&arguments, Some(&context.machine_type), remaps) {
        Ok(remapped) => arguments = remapped.arguments,
        Err(ConfigError::Refused { reasons: more }) => reasons.extend(more),
        Err(other) => return Err(other),
    }
    reasons.extend(refusals(&arguments));
    if !reasons.is_empty() {
        return Err(ConfigError::Refused { reasons });
    }
    passt::give_sockets(&mut arguments, &context.log_dir);
    terminals_to_logs(&mut arguments, &context.log_dir);
    move_own_files(&mut arguments, kept, &context.log_dir);
    short_files_to_chardevs(&mut arguments);
    append_and_do_not_wait(&mut arguments);
    set_machine_type(&mut arguments, &context.machine_type);
    set_display(&mut arguments);
    add_ours(&mut arguments, kept, context);
    Ok(arguments.write())
}

/// What a user should know about these remaps.
///
/// # Errors
/// As [`restore_arguments`], for remaps that fit nothing.
pub fn remap_warnings(
    kept: &Arguments,
    machine_type: &str,
    remaps: &[Remap],
) -> Result<Vec<remap::Warning>, ConfigError> {
    let mut arguments = drop_run_options(kept);
    spell_out_nographic(&mut arguments);
    let Remapped { warnings, .. } = remap::apply(&arguments, Some(machine_type), remaps)?;
    Ok(warnings)
}

/// The logs that stand in for terminals in restore arguments: the port's name, the file.
pub fn terminal_logs(arguments: &Arguments) -> Vec<(String, String)> {
    let chardevs = arguments.options("chardev");
    let logs = chardevs.filter_map(|(_, chardev)| {
        let chardev = chardev.properties();
        let port = chardev.get("id")?.strip_prefix(OWN_LOG_PREFIX)?.to_owned();
        Some((port, chardev.get("path")?))
    });
    logs.collect()
}

/// Drops [`DROPPED`], character devices that served only monitors, and objects of ours.
fn drop_run_options(kept: &Arguments) -> Arguments {
    let is_kept = |argument: &&Argument| {
        let name = argument.name().unwrap_or_default();
        if DROPPED.contains(&name) {
            return false;
        }
        let id = argument.properties().get("id").unwrap_or_default();
        match name {
            "chardev" => !is_monitor_only(kept, &id),
            "object" => !id.starts_with(OWN_PREFIX),
            _ => true,
        }
    };
    Arguments {
        program: kept.program.clone(),
        items: kept.items.iter().filter(is_kept).cloned().collect(),
    }
}

/// `-nographic` → `graphics=off` in the machine, no display, and a first serial port on the terminal if QEMU would make one.
fn spell_out_nographic(arguments: &mut Arguments) {
    if !arguments.has("nographic") {
        return;
    }
    let has_implicit_terminal = arguments.has_implicit_terminal();
    arguments
        .items
        .retain(|item| item.name() != Some("nographic"));
    arguments
        .items
        .retain(|item| item.name() != Some("display"));
    machine(arguments).edit(|machine| machine.set("graphics", "off"));
    arguments
        .items
        .push(Argument::with_value("display", "none"));
    if has_implicit_terminal {
        arguments
            .items
            .push(Argument::with_value("serial", "mon:stdio"));
    }
}

/// The machine argument; made, as the first one, if there is none.
fn machine(arguments: &mut Arguments) -> &mut Argument {
    let found = arguments
        .items
        .iter()
        .position(|item| item.name() == Some("machine"));
    let index = found.unwrap_or_else(|| {
        arguments
            .items
            .insert(0, Argument::with_value("machine", ""));
        0
    });
    &mut arguments.items[index]
}

/// Why these arguments cannot be restored, one reason for each argument that prevents it.
pub fn refusals(arguments: &Arguments) -> Vec<Reason> {
    arguments.items.iter().filter_map(refusal).collect()
}

fn refusal(argument: &Argument) -> Option<Reason> {
    let shown = argument.shown();
    match argument.name() {
        Some("snapshot") => return Some(Reason::TemporaryOverlay { argument: shown }),
        Some("drive") if argument.properties().is_on("snapshot") => {
            return Some(Reason::TemporaryOverlay { argument: shown });
        }
        Some("readconfig" | "writeconfig") => {
            return Some(Reason::ConfigurationFile { argument: shown });
        }
        Some("add-fd") => {
            return Some(Reason::InheritedDescriptor {
                argument: shown,
                property: "-add-fd".to_owned(),
            });
        }
        // Text for the guest, not for the host.
        Some("append" | "uuid" | "smbios") => return None,
        _ => {}
    }
    let property = inherited_descriptor(argument)?;
    Some(Reason::InheritedDescriptor {
        argument: shown,
        property,
    })
}

/// The property that names a descriptor, or the path that does.
fn inherited_descriptor(argument: &Argument) -> Option<String> {
    const KEYS: [&str; 4] = ["fd", "fds", "vhostfd", "vhostfds"];
    let value = argument.value()?;
    if is_descriptor_path(value) {
        return Some(value.to_owned());
    }
    let leaves = argument.properties().leaves();
    let found = leaves.into_iter().find(|(key, value)| {
        let last = key.rsplit('.').next().unwrap_or(key);
        KEYS.contains(&last)
            || (last == "type" && key != "type" && value == "fd")
            || is_descriptor_path(value)
    });
    found.map(|(key, value)| format!("{key}={value}"))
}

fn is_descriptor_path(path: &str) -> bool {
    let path = path.strip_prefix("mon:").unwrap_or(path);
    let path = path.strip_prefix("file:").unwrap_or(path);
    let path = path.strip_prefix("unix:").unwrap_or(path);
    ["/dev/fdset/", "/dev/fd/", "/proc/self/fd/"]
        .iter()
        .any(|prefix| path.starts_with(prefix))
        || ["/dev/stdin", "/dev/stdout", "/dev/stderr"].contains(&path)
        || path
            .strip_prefix("fd:")
            .is_some_and(|number| number.parse::<u32>().is_ok())
}

/// `stdio` → a file in the log directory, wherever it stands; logs of an earlier restore move to this directory.
pub(super) fn terminals_to_logs(arguments: &mut Arguments, log_dir: &str) {
    let mut renamed = Vec::new();
    for argument in arguments
        .items
        .iter_mut()
        .filter(|item| item.name() == Some("chardev"))
    {
        let chardev = argument.properties();
        let id = chardev.get("id").unwrap_or_default();
        let is_terminal = chardev.get("backend").as_deref() == Some("stdio");
        let port = id.strip_prefix(OWN_LOG_PREFIX).unwrap_or(&id).to_owned();
        if !is_terminal && port == id {
            continue;
        }
        let mux = chardev
            .get("mux")
            .map(|mux| format!(",mux={mux}"))
            .unwrap_or_default();
        argument.set_value(format!("{}{mux}", log_chardev(log_dir, &port)));
        renamed.push((id, format!("{OWN_LOG_PREFIX}{port}")));
    }
    for (from, to) in renamed {
        rename_chardev(arguments, &from, &to);
    }
    for_each_port(arguments, |port, value| {
        let terminal = matches!(value, "stdio" | "mon:stdio");
        terminal.then(|| {
            (
                log_chardev(log_dir, port),
                format!("{OWN_LOG_PREFIX}{port}"),
            )
        })
    });
    arguments
        .items
        .retain(|item| !(item.name() == Some("gdb") && item.value() == Some("stdio")));
}

/// What lay in the directory that the guest had moves to the one that it has now: logs beside a terminal, sockets that
/// nobody gave a path, those of swtpm and its like, memory in a file.
fn move_own_files(arguments: &mut Arguments, kept: &Arguments, directory: &str) {
    let Some(old) = own_directory(kept) else {
        return;
    };
    let moved = |path: String| {
        let file = path.strip_prefix(old.as_str())?;
        (file.is_empty() || file.starts_with('/')).then(|| format!("{directory}{file}"))
    };
    for argument in &mut arguments.items {
        let keys: &[&str] = match argument.name() {
            Some("chardev") => &["path", "logfile"],
            Some("netdev") => &["addr.path"],
            Some("object") => &["mem-path"],
            Some("spice") => &["addr"],
            Some("vnc") => &["vnc"],
            _ => continue,
        };
        argument.edit(|properties| {
            for key in keys {
                let value = properties.get(key).unwrap_or_default();
                let (prefix, path) = match value.strip_prefix("unix:") {
                    Some(path) => ("unix:", path.to_owned()),
                    None => ("", value),
                };
                if let Some(path) = moved(path) {
                    properties.set(key, &format!("{prefix}{path}"));
                }
            }
        });
    }
}

/// The directory of the guest that these are the arguments of, if it was one of ours: where our monitor's socket was.
fn own_directory(kept: &Arguments) -> Option<String> {
    let mut chardevs = kept
        .options("chardev")
        .map(|(_, chardev)| chardev.properties());
    let ours = chardevs.find(|chardev| chardev.get("id").as_deref() == Some(QMP_CHARDEV))?;
    let path = ours.get("path")?;
    path.rsplit_once('/')
        .map(|(directory, _)| directory.to_owned())
}

/// `file,id=vmstow-log-serial0,path=DIR/serial0.log,append=on`
fn log_chardev(log_dir: &str, port: &str) -> String {
    // An id is a name of letters, digits, `-`, `.` and `_`, so it cannot leave the directory.
    let file: String = port
        .chars()
        .map(|c| if c == '/' { '_' } else { c })
        .collect();
    let path = format!("{log_dir}/{file}.log");
    format!(
        "file,id={OWN_LOG_PREFIX}{},path={},append=on",
        escape(port),
        escape(&path)
    )
}

/// `-serial file:X` truncates X, and its short form has no way to say otherwise; a monitor muxed in is taken out.
fn short_files_to_chardevs(arguments: &mut Arguments) {
    for_each_port(arguments, |port, value| {
        let plain = value.strip_prefix("mon:").unwrap_or(value);
        let path = plain.strip_prefix("file:")?;
        let id = format!("{OWN_PREFIX}{port}");
        Some((format!("file,id={id},path={},append=on", escape(path)), id))
    });
    for argument in &mut arguments.items {
        if is_port(argument)
            && let Some(plain) = argument
                .value()
                .and_then(|value| value.strip_prefix("mon:"))
        {
            let plain = plain.to_owned();
            argument.set_value(plain);
        }
    }
}

fn is_port(argument: &Argument) -> bool {
    matches!(argument.name(), Some("serial" | "parallel" | "debugcon"))
}

/// Calls `change` with each port's name (`serial0`) and value; where it gives a character device and its id, the device
/// is put before the port and the port connected to it.
fn for_each_port(
    arguments: &mut Arguments,
    change: impl Fn(&str, &str) -> Option<(String, String)>,
) {
    for option in ["serial", "parallel", "debugcon"] {
        let mut number = 0;
        let mut items = Vec::with_capacity(arguments.items.len());
        for mut item in std::mem::take(&mut arguments.items) {
            if item.name() == Some(option) {
                let port = format!("{option}{number}");
                number += 1;
                if let Some((chardev, id)) = change(&port, item.value().unwrap_or_default()) {
                    items.push(Argument::with_value("chardev", chardev));
                    item.set_value(format!("chardev:{id}"));
                }
            }
            items.push(item);
        }
        arguments.items = items;
    }
}

/// Files are appended to, never truncated; a server does not hold up the restore until somebody connects.
fn append_and_do_not_wait(arguments: &mut Arguments) {
    let vhost_user: Vec<String> = arguments
        .items
        .iter()
        .filter_map(vhost_user_chardev)
        .collect();
    for argument in &mut arguments.items {
        if is_port(argument) {
            do_not_wait_short(argument);
        }
        if argument.name() != Some("chardev") {
            continue;
        }
        argument.edit(|chardev| {
            if chardev.get("backend").as_deref() == Some("file") && !chardev.is_on("append") {
                chardev.set("append", "on");
            }
            let id = chardev.get("id").unwrap_or_default();
            let waits = chardev.get("wait").is_none_or(|wait| wait != "off");
            if chardev.is_on("server") && waits && !vhost_user.contains(&id) {
                chardev.remove("wait");
                chardev.set("wait", "off");
            }
            if chardev.get("logfile").is_some() && !chardev.is_on("logappend") {
                chardev.set("logappend", "on");
            }
        });
    }
}

/// The character device of a vhost-user device, whose connection QEMU cannot do without.
fn vhost_user_chardev(argument: &Argument) -> Option<String> {
    let user = argument.properties();
    let is_vhost_user = match argument.name()? {
        "netdev" => user.get("type")? == "vhost-user",
        "device" => user.get("driver")?.starts_with("vhost-user"),
        _ => false,
    };
    user.get("chardev").filter(|_| is_vhost_user)
}

fn do_not_wait_short(argument: &mut Argument) {
    let Some(value) = argument.value().map(str::to_owned) else {
        return;
    };
    let is_socket = ["unix:", "tcp:", "telnet:", "websocket:"]
        .iter()
        .any(|p| value.starts_with(p));
    let mut socket = super::properties::Properties::parse(&value, Some("address"));
    let waits = socket.get("wait").is_none_or(|wait| wait != "off");
    if is_socket && socket.is_on("server") && waits {
        socket.remove("wait");
        socket.set("wait", "off");
        argument.set_value(socket.write());
    }
}

/// The alias, or no type at all, becomes the resolved type; all else the machine was told stays.
fn set_machine_type(arguments: &mut Arguments, machine_type: &str) {
    let mut is_typed = false;
    for argument in arguments
        .items
        .iter_mut()
        .filter(|item| item.name() == Some("machine"))
    {
        if argument
            .properties()
            .get("type")
            .is_some_and(|name| !name.is_empty())
        {
            argument.edit(|machine| machine.set("type", machine_type));
            is_typed = true;
        }
    }
    if is_typed {
        return;
    }
    let argument = machine(arguments);
    let value = match argument.value().unwrap_or_default() {
        "" => machine_type.to_owned(),
        rest => format!("{machine_type},{}", rest.trim_start_matches(',')),
    };
    argument.set_value(value);
}

/// A window or a terminal becomes no display at all.
fn set_display(arguments: &mut Arguments) {
    arguments.items.retain(|item| {
        let display = item.properties().get("type").unwrap_or_default();
        item.name() != Some("display")
            || KEPT_DISPLAYS.contains(&display.as_str())
            || display.starts_with("vnc=")
            || item.properties().get("vnc").is_some()
    });
    if !arguments.has("display") {
        arguments
            .items
            .push(Argument::with_value("display", "none"));
    }
}

fn add_ours(arguments: &mut Arguments, kept: &Arguments, context: &RestoreContext) {
    add_control(arguments, name(kept, &context.name), &context.qmp_socket);
    let incoming = Argument::with_value("incoming", "defer");
    arguments.items.push(incoming);
}

/// What every guest of ours has: its name, a sandbox, a monitor for us; and it waits until we let it run.
pub(super) fn add_control(arguments: &mut Arguments, name: String, qmp_socket: &str) {
    let chardev = format!(
        "socket,id={QMP_CHARDEV},path={},server=on,wait=off",
        escape(qmp_socket)
    );
    let sandbox = sandbox(arguments);
    arguments.items.extend([
        Argument::with_value("name", name),
        Argument::with_value("sandbox", sandbox),
        Argument::with_value("chardev", chardev),
        Argument::with_value(
            "mon",
            format!("id={MONITOR},chardev={QMP_CHARDEV},mode=control"),
        ),
        Argument::switch("S"),
    ]);
}

/// The name with what else `-name` said: `process=`, `debug-threads=`.
fn name(kept: &Arguments, name: &str) -> String {
    let mut value = format!("guest={}", escape(name));
    if let Some((_, argument)) = kept.options("name").next_back() {
        for (key, text) in argument.properties().leaves() {
            if key != "guest" {
                value.push_str(&format!(",{key}={}", escape(&text)));
            }
        }
    }
    value
}

/// All that QEMU's sandbox can deny, less what the arguments need.
///
/// A bridge helper is set-user-id, which no sandbox lets through: seccomp takes new privileges from every child.
fn sandbox(arguments: &Arguments) -> String {
    if arguments.items.iter().any(needs_set_user_id_helper) {
        return "off".to_owned();
    }
    let mut value = "on,obsolete=deny".to_owned();
    if !arguments.items.iter().any(changes_user) {
        value.push_str(",elevateprivileges=deny");
    }
    if !arguments.items.iter().any(starts_a_program) {
        value.push_str(",spawn=deny");
    }
    if !arguments.items.iter().any(pins_threads) {
        value.push_str(",resourcecontrol=deny");
    }
    value
}

fn is_network(argument: &Argument) -> bool {
    matches!(argument.name(), Some("netdev" | "nic" | "net"))
}

fn needs_set_user_id_helper(argument: &Argument) -> bool {
    let net = argument.properties();
    is_network(argument)
        && (net.get("type").as_deref() == Some("bridge") || net.get("helper").is_some())
}

fn changes_user(argument: &Argument) -> bool {
    match argument.name() {
        Some("runas") => true,
        Some("run-with") => argument.properties().get("user").is_some(),
        _ => false,
    }
}

fn starts_a_program(argument: &Argument) -> bool {
    let net = argument.properties();
    let script = |key: &str| net.get(key).is_none_or(|script| script != "no");
    match net.get("type").as_deref() {
        _ if !is_network(argument) => false,
        Some("tap") => script("script") || script("downscript"),
        Some("user") => {
            let is_command = |(key, rule): &(String, String)| {
                key.starts_with("guestfwd") && rule.contains("-cmd:")
            };
            net.get("smb").is_some() || net.leaves().iter().any(is_command)
        }
        Some("passt") => true,
        _ => false,
    }
}

fn pins_threads(argument: &Argument) -> bool {
    let kind = argument.properties().get("qom-type");
    argument.name() == Some("object") && kind.as_deref() == Some("thread-context")
}

#[cfg(test)]
mod tests;
