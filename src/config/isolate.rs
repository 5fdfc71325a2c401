//! Arguments that any number of guests can be started with at once.
//!
//! Clones of one guest share what they only read. What a guest has to itself is replaced, where the guest does not see
//! the difference, by something in a directory of the clone's own; the rest is refused by name.
//!
//! | of the saved guest | of each clone |
//! |---|---|
//! | network `user` | the same, cut off (`restrict=on`), without forwarded ports and shares |
//! | any other network | a cut-off user network; refused where a virtio NIC may use offloads that only a tap has |
//! | a character device into a file, its log | `ID.out` in its directory |
//! | a character device that others connect to | the socket `ID.sock` in its directory |
//! | a character device that connects to others, or a device of the host | refused |
//! | VNC, SPICE | the socket `displayN.sock` in its directory |
//! | a directory that the guest may write to, memory shared with others | refused |
//! | a debugger's port | dropped |
//!
//! Disks are not looked at here: see [`overlay`](super::overlay). What a remap of the user's names stays as it is.
//!
//! Source: QEMU's manual; seen with 7.2 and 10.0.

use super::arguments::{Argument, Arguments};
use super::error::{ConfigError, Reason};
use super::properties::{Properties, escape};
use super::remap::{self, Remap, Target};
use super::resources::{Resource, ResourceKind, ResourceTable};

/// Networks whose virtio NICs may use offloads that a user network does not have.
const WITH_OFFLOADS: [&str; 5] = ["tap", "bridge", "vhost-user", "vhost-vdpa", "netmap"];

/// Arguments of one clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolated {
    /// The arguments.
    pub arguments: Arguments,
    /// What is not as it was, a sentence each.
    pub notes: Vec<String>,
}

/// Gives a clone whose files and sockets lie in `directory` backends of its own. `is_named` tells what the user chose a
/// backend for.
///
/// # Errors
/// [`ConfigError::Refused`] with a reason for everything that cannot be shared.
pub fn isolate(
    arguments: &Arguments,
    machine_type: &str,
    directory: &str,
    is_named: &dyn Fn(&Resource) -> bool,
) -> Result<Isolated, ConfigError> {
    let table = ResourceTable::from_arguments(arguments, Some(machine_type));
    let mut clone = Clone {
        directory,
        arguments: arguments.clone(),
        notes: Vec::new(),
        reasons: Vec::new(),
    };
    for resource in table.resources.iter().filter(|one| !is_named(one)) {
        clone.isolate(resource);
    }
    for argument in &arguments.items {
        clone.refuse_shared(argument);
    }
    clone.drop_debuggers();
    match clone.reasons.is_empty() {
        true => Ok(Isolated {
            arguments: clone.arguments,
            notes: clone.notes,
        }),
        false => Err(ConfigError::Refused {
            reasons: clone.reasons,
        }),
    }
}

/// The arguments under way.
struct Clone<'a> {
    directory: &'a str,
    arguments: Arguments,
    notes: Vec<String>,
    reasons: Vec<Reason>,
}

impl Clone<'_> {
    fn isolate(&mut self, resource: &Resource) {
        match resource.kind {
            ResourceKind::Nic => self.isolate_network(resource),
            ResourceKind::Chardev => self.isolate_chardev(resource),
            ResourceKind::Display => self.isolate_display(resource),
            ResourceKind::Share if !resource.read_only => {
                self.refuse(resource, "it is a directory that the guest may write to");
            }
            ResourceKind::Tpm if resource.backend.kind == "passthrough" => {
                self.refuse(resource, "it is the TPM of this host");
            }
            _ => {}
        }
    }

    fn refuse(&mut self, resource: &Resource, why: &str) {
        let what = format!("{} {:?}", resource.kind.word(), resource.id);
        let why = why.to_owned();
        self.reasons.push(Reason::NotShared { what, why });
    }

    fn note(&mut self, resource: &Resource, what: &str) {
        let (kind, id) = (resource.kind.word(), &resource.id);
        self.notes.push(format!("{kind} {id:?} {what}"));
    }

    fn edit(&mut self, resource: &Resource, change: impl FnOnce(&mut Properties)) {
        let index = resource.argument.unwrap_or(usize::MAX);
        if let Some(argument) = self.arguments.items.get_mut(index) {
            argument.edit(change);
        }
    }

    fn isolate_network(&mut self, resource: &Resource) {
        let kind = resource.backend.kind.as_str();
        let is_virtio = resource
            .frontend
            .as_deref()
            .is_some_and(|driver| driver.starts_with("virtio"));
        match kind {
            "hubport" => {}
            "user" => {
                self.edit(resource, |net| {
                    for key in ["hostfwd", "guestfwd", "smb", "smbserver"] {
                        net.remove(key);
                    }
                    net.set("restrict", "on");
                });
                self.note(resource, "reaches nothing beyond its gateway");
            }
            _ if is_virtio && WITH_OFFLOADS.contains(&kind) => self.refuse(
                resource,
                &format!(
                    "it is a {kind} network, whose offloads a virtio NIC may use, and an isolated network has none"
                ),
            ),
            _ => {
                let cut_off = Target::UserNetwork("restrict=on".to_owned());
                let remap = Remap::of(resource, cut_off);
                match remap::apply(&self.arguments, None, &[remap]) {
                    Ok(remapped) => self.arguments = remapped.arguments,
                    Err(_) => return self.refuse(resource, &format!("it is a {kind} network")),
                }
                self.note(resource, "is a user network that reaches nothing");
            }
        }
    }

    /// A path in the clone's own directory. An id is a name of letters, digits, `-`, `.` and `_`.
    fn own(&self, resource: &Resource, ending: &str) -> String {
        let name = resource.id.replace('/', "_");
        format!("{}/{name}.{ending}", self.directory)
    }

    fn isolate_chardev(&mut self, resource: &Resource) {
        let index = resource.argument.unwrap_or(usize::MAX);
        let argument = self.arguments.items.get(index);
        let is_long = argument.and_then(Argument::name) == Some("chardev");
        let (out, socket) = (self.own(resource, "out"), self.own(resource, "sock"));
        match resource.backend.kind.as_str() {
            "file" if is_long => {
                self.edit(resource, |chardev| chardev.set("path", &out));
                self.note(resource, "writes into a file in the clone's directory");
            }
            "file" => {
                self.set_short(index, format!("file:{out}"));
                self.note(resource, "writes into a file in the clone's directory");
            }
            "socket" | "telnet" | "websocket" if resource.backend.is_server => {
                if is_long {
                    self.edit(resource, |chardev| listen_at(chardev, &socket));
                } else {
                    let socket = escape(&socket);
                    self.set_short(index, format!("unix:{socket},server=on,wait=off"));
                }
                self.note(resource, "is a socket in the clone's directory");
            }
            kind @ ("socket" | "telnet" | "websocket" | "tcp" | "udp") => {
                self.refuse(resource, &format!("it is a {kind} that connects to others"));
            }
            kind @ ("pipe" | "serial" | "parallel" | "braille") => {
                self.refuse(resource, &format!("it is a {kind} of this host"));
            }
            _ => {}
        }
        if is_long {
            self.edit(resource, |chardev| {
                if chardev.get("logfile").is_some() {
                    chardev.set("logfile", &out);
                }
            });
        }
    }

    /// Changes a value of `-serial` and the like; a monitor that is muxed in goes in any case.
    fn set_short(&mut self, index: usize, value: String) {
        if let Some(argument) = self.arguments.items.get_mut(index) {
            argument.set_value(value);
        }
    }

    fn isolate_display(&mut self, resource: &Resource) {
        let socket = self.own(resource, "sock");
        let index = resource.argument.unwrap_or(usize::MAX);
        let Some(argument) = self.arguments.items.get_mut(index) else {
            return;
        };
        if argument.name() == Some("spice") {
            argument.edit(|spice| {
                for key in ["port", "tls-port", "unix", "addr", "ipv4", "ipv6"] {
                    spice.remove(key);
                }
                spice.set("unix", "on");
                spice.set("addr", &socket);
            });
        } else if argument.properties().get("vnc").as_deref() == Some("none") {
            return;
        } else {
            argument.edit(|vnc| {
                for key in ["to", "websocket", "reverse", "ipv4", "ipv6"] {
                    vnc.remove(key);
                }
                vnc.set("vnc", &format!("unix:{socket}"));
            });
        }
        self.note(resource, "is a socket in the clone's directory");
    }

    /// What no resource tells of.
    fn refuse_shared(&mut self, argument: &Argument) {
        if argument.name() != Some("object") {
            return;
        }
        let object = argument.properties();
        let kind = object.get("qom-type").unwrap_or_default();
        let path = object.get("mem-path").unwrap_or_default();
        let why = match kind.as_str() {
            // In these directories the file that QEMU makes has no name.
            "memory-backend-file" if object.is_on("share") && !is_nameless(&path) => {
                "its memory is shared with whoever opens the file"
            }
            "filter-dump" => "it writes into a file",
            _ => return,
        };
        self.reasons.push(Reason::NotShared {
            what: argument.shown(),
            why: why.to_owned(),
        });
    }

    fn drop_debuggers(&mut self) {
        let is_debugger = |argument: &Argument| matches!(argument.name(), Some("gdb" | "s"));
        if self.arguments.items.iter().any(is_debugger) {
            self.arguments.items.retain(|item| !is_debugger(item));
            self.notes.push("no clone has a debugger's port".to_owned());
        }
    }
}

fn is_nameless(mem_path: &str) -> bool {
    ["/dev/hugepages", "/dev/shm"].contains(&mem_path.trim_end_matches('/'))
}

/// Lets a character device that listens do so at a unix socket; what it is to its device stays.
fn listen_at(chardev: &mut Properties, socket: &str) {
    const OF_THE_ADDRESS: [&str; 12] = [
        "host",
        "port",
        "to",
        "ipv4",
        "ipv6",
        "nodelay",
        "telnet",
        "tn3270",
        "websocket",
        "tls-creds",
        "tls-authz",
        "abstract",
    ];
    for key in OF_THE_ADDRESS {
        chardev.remove(key);
    }
    chardev.set("path", socket);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isolated(words: &[&str]) -> Result<Isolated, ConfigError> {
        let mut all = vec!["qemu"];
        all.extend(words);
        let arguments = Arguments::parse(&all).unwrap();
        isolate(&arguments, "pc-i440fx-10.0", "/c", &|one| one.id == "named")
    }

    fn becomes(words: &[&str]) -> String {
        isolated(words).unwrap().arguments.write()[1..].join(" ")
    }

    fn refused(words: &[&str]) -> String {
        isolated(words).unwrap_err().to_string()
    }

    #[test]
    fn networks_are_cut_off() {
        assert_eq!(
            becomes(&[
                "-netdev",
                "user,id=n,hostfwd=tcp::2222-:22,hostname=g,hostfwd=::1-:2"
            ]),
            "-netdev user,id=n,hostname=g,restrict=on"
        );
        assert_eq!(
            becomes(&["-netdev", "tap,id=n,ifname=t0", "-device", "e1000,netdev=n"]),
            "-netdev user,restrict=on,id=n -device e1000,netdev=n"
        );
        let virtio = ["-netdev", "tap,id=n", "-device", "virtio-net-pci,netdev=n"];
        assert!(refused(&virtio).contains("nic \"n\""));
        assert_eq!(
            becomes(&[
                "-netdev",
                "tap,id=named",
                "-device",
                "virtio-net-pci,netdev=named"
            ]),
            "-netdev tap,id=named -device virtio-net-pci,netdev=named"
        );
    }

    #[test]
    fn files_and_sockets_move_into_the_clones_directory() {
        assert_eq!(
            becomes(&[
                "-serial",
                "file:/a",
                "-serial",
                "unix:/b,server=on",
                "-serial",
                "pty"
            ]),
            "-serial file:/c/serial0.out -serial unix:/c/serial1.sock,server=on,wait=off -serial pty"
        );
        assert_eq!(
            becomes(&[
                "-chardev",
                "socket,id=s,host=::1,port=4,server=on,logfile=/l",
                "-serial",
                "chardev:s",
                "-chardev",
                "file,id=f,path=/f",
                "-vnc",
                ":1,password=on",
            ]),
            "-chardev socket,id=s,server=on,logfile=/c/s.out,path=/c/s.sock -serial chardev:s \
             -chardev file,id=f,path=/c/f.out -vnc unix:/c/display0.sock,password=on"
        );
        assert_eq!(becomes(&["-s", "-gdb", "tcp::1"]), "");
    }

    #[test]
    fn what_cannot_be_shared_is_named() {
        for words in [
            ["-serial", "tcp:host:4"],
            ["-chardev", "socket,id=x,path=/s"],
            ["-serial", "/dev/ttyS0"],
            [
                "-virtfs",
                "local,path=/d,mount_tag=t,security_model=none,id=x",
            ],
            [
                "-object",
                "memory-backend-file,id=m,mem-path=/m,size=1M,share=on",
            ],
            ["-object", "filter-dump,id=f,netdev=n,file=/p"],
        ] {
            assert!(refused(&words).contains("several guests"), "{words:?}");
        }
        let private = "memory-backend-file,id=m,mem-path=/m,size=1M,share=off";
        assert_eq!(becomes(&["-object", private]), format!("-object {private}"));
    }
}
