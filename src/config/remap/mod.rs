//! Other host resources for a guest: `disk:vda=/srv/x.qcow2`, `cdrom:*=eject`, `net:net0=user`.
//!
//! A remap changes what stands behind a device, never what the guest sees of it. Where QEMU keeps state of a backend in
//! the stream, or a device's features follow from its backend, a [`Warning`] says so.
//!
//! | file | what it is for |
//! |---|---|
//! | `syntax` | the text of a remap ⇄ the remap; files of remaps |
//! | `change` | what becomes of the argument behind a resource |
//! | `network` | the same, of a network |

mod change;
mod network;
mod syntax;

use std::collections::BTreeMap;
use std::fmt;

use super::arguments::{Argument, Arguments};
use super::error::{ConfigError, Reason};
use super::resources::{OWN_SLIRP_PREFIX, Resource, ResourceKind, ResourceTable};

pub(super) use change::rename_chardev;
pub use syntax::parse_file;

/// One `KIND:ID=TARGET`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remap {
    /// The kind of resource; `net` in the text is [`ResourceKind::Nic`].
    pub kind: ResourceKind,
    /// Which of that kind.
    pub selector: Selector,
    /// What becomes of them.
    pub target: Target,
    /// The line of a file that it stands in; `None` for one of the command line.
    pub origin: Option<Origin>,
}

/// Where a remap was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file, as the user named it.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}", self.file, self.line)
    }
}

/// Which resources of a kind a remap means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// The one with this id or alias.
    Id(String),
    /// All whose path begins so; the rest of the path is kept.
    Prefix(String),
    /// All.
    All,
}

/// What a remapped resource becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Another file or device; with [`Selector::Prefix`] the new beginning of its path.
    Path {
        /// The path.
        path: String,
        /// The image format, where it changes.
        format: Option<String>,
    },
    /// A throwaway overlay over its file; made by a restore, no text names it.
    Overlay(String),
    /// A drive without medium.
    Eject,
    /// QEMU's user network, with further properties of `-netdev user` behind a comma.
    UserNetwork(String),
    /// An existing tap interface.
    Tap(String),
    /// A bridge, through QEMU's bridge helper.
    Bridge(String),
    /// The socket of a passt process that was started for it; empty for one that the guest shall have for itself.
    Passt(String),
    /// A character device that appends to a file.
    File(String),
    /// A pseudo terminal.
    Pty,
    /// A socket that QEMU makes.
    Unix(String),
    /// Nothing: output is thrown away, nobody looks at a display.
    Null,
    /// A display for those that connect to this address and TCP port.
    Listen(String, u16),
}

/// Something a user should know about a remap that works nonetheless, or may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// The stream holds a `slirp` section, which only a user network can load: one that nobody uses is there for it.
    #[error(
        "nic {id:?}: the guest was saved with a user network, whose open connections and forwarded ports end here"
    )]
    SlirpState {
        /// The resource.
        id: String,
    },
    /// A virtio NIC offers checksum and segmentation offloads only on a tap.
    #[error(
        "nic {id:?}: a virtio NIC that used a tap's offloads does not load on a {backend} network"
    )]
    NicOffloads {
        /// The resource.
        id: String,
        /// What it becomes: `user` or `passt`.
        backend: &'static str,
    },
}

impl Warning {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Warning::SlirpState { .. } => "remap.slirp-state",
            Warning::NicOffloads { .. } => "remap.nic-offloads",
        }
    }
}

/// Arguments with remaps applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remapped {
    /// The arguments.
    pub arguments: Arguments,
    /// What a user should know.
    pub warnings: Vec<Warning>,
}

/// Applies remaps; of two for the same resource only the last counts. Overlays come last, over what the others chose.
///
/// # Errors
/// [`ConfigError::Refused`] with a reason for every remap that fits nothing.
pub fn apply(
    arguments: &Arguments,
    machine_type: Option<&str>,
    remaps: &[Remap],
) -> Result<Remapped, ConfigError> {
    let is_overlay = |remap: &&Remap| matches!(remap.target, Target::Overlay(_));
    let (overlays, plain): (Vec<&Remap>, Vec<&Remap>) = remaps.iter().partition(is_overlay);
    let mut change = Change {
        arguments: arguments.clone(),
        machine_type,
        warnings: Vec::new(),
        reasons: Vec::new(),
    };
    change.apply(&plain);
    change.apply(&overlays);
    match change.reasons.is_empty() {
        true => Ok(Remapped {
            arguments: change.arguments,
            warnings: change.warnings,
        }),
        false => Err(ConfigError::Refused {
            reasons: change.reasons,
        }),
    }
}

/// Arguments under way.
struct Change<'a> {
    arguments: Arguments,
    machine_type: Option<&'a str>,
    warnings: Vec<Warning>,
    reasons: Vec<Reason>,
}

impl Change<'_> {
    fn table(&self) -> ResourceTable {
        ResourceTable::from_arguments(&self.arguments, self.machine_type)
    }

    fn apply(&mut self, remaps: &[&Remap]) {
        let before = self.table();
        // The last remap of each resource, by the resource's place in the table.
        let mut last: BTreeMap<usize, &Remap> = BTreeMap::new();
        for remap in remaps {
            match remap.chosen(&before) {
                Ok(chosen) => last.extend(chosen.into_iter().map(|place| (place, *remap))),
                Err(reason) => self.reasons.push(reason),
            }
        }
        for (place, remap) in last {
            if let Some(resource) = before.resources.get(place) {
                self.change(resource, remap);
            }
        }
    }

    fn change(&mut self, resource: &Resource, remap: &Remap) {
        self.warnings.extend(remap.warning(resource));
        let now = self.table();
        let changed = now
            .find(resource.kind, &resource.id)
            .and_then(|resource| remap.change(&mut self.arguments, resource));
        if changed.is_none() {
            let reason = remap.impossible(resource, &self.arguments);
            self.reasons.push(reason);
        }
    }
}

/// The remaps that make kept arguments name the files QEMU had open at the save.
///
/// Drives that only QMP knew of have no argument and are left out; [`ResourceTable`] shows them.
pub fn block_graph_remaps(table: &ResourceTable) -> Vec<Remap> {
    let moved = table
        .resources
        .iter()
        .filter(|resource| resource.argument.is_some() && resource.backend.argument_path.is_some());
    let remaps = moved.map(|resource| {
        let target = match &resource.backend.path {
            Some(path) => Target::Path {
                path: path.clone(),
                format: resource.backend.format.clone(),
            },
            None => Target::Eject,
        };
        Remap::of(resource, target)
    });
    remaps.collect()
}

/// Kept arguments with the disks that the guest had at the save, and with what was chosen for it since.
///
/// # Errors
/// As [`apply`]; [`ConfigError::RemapSyntax`] for a chosen one that cannot be read.
pub fn kept_with(
    argv: &[String],
    machine_type: &str,
    resources: &ResourceTable,
    chosen: &[String],
) -> Result<Arguments, ConfigError> {
    let kept = Arguments::parse(argv)?;
    let disks = block_graph_remaps(resources);
    let kept = apply(&kept, Some(machine_type), &disks)?.arguments;
    let chosen: Result<Vec<Remap>, ConfigError> = chosen.iter().map(|it| it.parse()).collect();
    Ok(apply(&kept, Some(machine_type), &chosen?)?.arguments)
}

/// The user networks that only load the state of one that was remapped: once it is loaded they are of no use.
pub fn idle_networks(arguments: &Arguments) -> Vec<String> {
    let nets = arguments.options("netdev");
    let ids = nets.filter_map(|(_, net)| net.properties().get("id"));
    ids.filter(|id| id.starts_with(OWN_SLIRP_PREFIX)).collect()
}

/// Those of a user's usual remaps that mean something of this guest; they are for whatever guest comes.
pub fn fitting(usual: &[Remap], table: &ResourceTable) -> Vec<Remap> {
    let fits = |remap: &&Remap| remap.chosen(table).is_ok_and(|chosen| !chosen.is_empty());
    usual.iter().filter(fits).cloned().collect()
}

impl Remap {
    /// One that is written nowhere.
    pub fn new(kind: ResourceKind, selector: Selector, target: Target) -> Self {
        Remap {
            kind,
            selector,
            target,
            origin: None,
        }
    }

    /// One for this resource alone.
    pub fn of(resource: &Resource, target: Target) -> Self {
        Remap::new(resource.kind, Selector::Id(resource.id.clone()), target)
    }

    /// Whether it means all resources of this kind.
    pub fn selects_all(&self, kind: ResourceKind) -> bool {
        self.kind == kind && self.selector == Selector::All
    }

    /// Whether this resource is one of those it means.
    pub fn selects(&self, resource: &Resource) -> bool {
        let path = resource.backend.path.as_deref().unwrap_or_default();
        self.kind == resource.kind
            && match &self.selector {
                Selector::All => true,
                Selector::Id(id) => resource.id == *id || resource.aliases.contains(id),
                Selector::Prefix(prefix) => path.starts_with(prefix),
            }
    }

    /// The places of the resources it means.
    fn chosen(&self, table: &ResourceTable) -> Result<Vec<usize>, Reason> {
        let all = table.resources.iter().enumerate();
        let mut chosen: Vec<usize> = all
            .filter(|(_, resource)| self.selects(resource))
            .map(|(place, _)| place)
            .collect();
        if let Selector::Id(id) = &self.selector {
            // An id comes before the alias of another.
            let is_it = |place: &usize| {
                let resource = table.resources.get(*place);
                resource.is_some_and(|resource| resource.id == *id)
            };
            let wanted = chosen.iter().copied().find(is_it);
            chosen = wanted.or(chosen.first().copied()).into_iter().collect();
        }
        match chosen.is_empty() && self.selector != Selector::All {
            true => Err(self.unknown(table)),
            false => Ok(chosen),
        }
    }

    fn unknown(&self, table: &ResourceTable) -> Reason {
        let all = table.of(self.kind);
        let (id, known) = match &self.selector {
            Selector::Prefix(prefix) => {
                let paths = all.filter_map(|resource| resource.backend.path.clone());
                (prefix.clone(), paths.collect())
            }
            Selector::Id(id) => (id.clone(), all.map(|r| r.id.clone()).collect()),
            Selector::All => ("*".to_owned(), Vec::new()),
        };
        Reason::UnknownResource {
            kind: self.kind.word(),
            id,
            known,
            origin: self.origin.clone(),
        }
    }

    fn impossible(&self, resource: &Resource, arguments: &Arguments) -> Reason {
        let argument = resource
            .argument
            .and_then(|index| arguments.items.get(index));
        Reason::NotRemappable {
            kind: self.kind.word(),
            id: resource.id.clone(),
            target: self.target.to_string(),
            argument: argument.map(Argument::shown).unwrap_or_default(),
            origin: self.origin.clone(),
        }
    }

    fn warning(&self, resource: &Resource) -> Option<Warning> {
        let id = resource.id.clone();
        let is_user = resource.backend.kind == "user";
        let is_virtio = resource
            .frontend
            .as_deref()
            .is_some_and(|driver| driver.starts_with("virtio"));
        let may_have_offloads =
            is_virtio && !is_user && !matches!(resource.backend.kind.as_str(), "stream");
        match &self.target {
            Target::UserNetwork(_) if may_have_offloads => Some(Warning::NicOffloads {
                id,
                backend: "user",
            }),
            Target::Passt(_) if may_have_offloads => Some(Warning::NicOffloads {
                id,
                backend: "passt",
            }),
            Target::Tap(_) | Target::Bridge(_) | Target::Passt(_) if is_user => {
                Some(Warning::SlirpState { id })
            }
            _ => None,
        }
    }

    /// Where what the emulator of this TPM keeps in `state` moves: a path is the directory for that, unless a socket is
    /// there, on which another emulator listens. `None` if the remap says nothing of it.
    pub fn moved_state(
        &self,
        tpm: &Resource,
        state: &str,
        is_socket: &dyn Fn(&str) -> bool,
    ) -> Option<String> {
        let Target::Path { path, .. } = &self.target else {
            return None;
        };
        match &self.selector {
            Selector::Prefix(prefix) if self.kind == tpm.kind => {
                Some(format!("{path}{}", state.strip_prefix(prefix.as_str())?))
            }
            _ => (self.selects(tpm) && !is_socket(path)).then(|| path.clone()),
        }
    }

    /// Whether the remap brings in `name`: a path, a network interface, or a property of a user network.
    pub fn names(&self, name: &str) -> bool {
        match (&self.target, &self.selector) {
            (Target::Path { path, .. }, Selector::Prefix(_)) => {
                name.starts_with(path.as_str()) && !name.split('/').any(|part| part == "..")
            }
            (Target::Path { path: given, .. }, _) => given == name,
            (Target::File(given) | Target::Unix(given) | Target::Passt(given), _) => given == name,
            (Target::Tap(given) | Target::Bridge(given), _) => given == name,
            (Target::Listen(host, port), _) => {
                let display = port.checked_sub(5900);
                display.is_some_and(|display| name == format!("{host}:{display}"))
            }
            (Target::UserNetwork(more), _) => more
                .split(',')
                .filter_map(|property| property.split_once('='))
                .any(|(_, value)| value == name),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests;
