//! What would be restored, with which QEMU and arguments, and whether it can be: all asked before QEMU is started.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::lazy::LazyRequest;
use super::side;
use super::{HELD_VARIABLE, Mapping, RestoreError, RestoreRequest, RomSize};
use crate::config::abi::names_of_disks;
use crate::config::compat::Finding;
use crate::config::mapped_memory;
use crate::config::overlay::{self, WritableDisk, is_writable_disk, writable_disks};
use crate::config::properties::escape;
use crate::config::remap::{Selector, Target, idle_networks, kept_with};
use crate::config::restore_arguments::KEEPER_CHARDEV;
use crate::config::xml::Document;
use crate::config::{
    Arguments, ConfigError, Isolated, Remap, Resource, ResourceKind, ResourceTable, RestoreContext,
    isolate, restore_arguments,
};
use crate::container::Manifest;
use crate::error::Result;
use crate::host::{GuestDir, HostError, OverlayRoot, QemuFacts, RuntimeDir, sanitise_name};
use crate::image::resource_table;
use crate::supervise::{self, Launch};

/// A file below a throwaway overlay.
pub(super) struct Base {
    disk: WritableDisk,
    format: String,
    /// The overlay's name.
    name: String,
}

/// A guest that can be restored here.
pub struct Plan {
    image: Option<PathBuf>,
    pub(super) manifest: Manifest,
    pub(super) name: String,
    pub(super) qemu: QemuFacts,
    pub(super) cwd: PathBuf,
    pub(super) kept: Arguments,
    pub(super) remaps: Vec<Remap>,
    /// Where the guest's throwaway overlays go, and over what; `None` if it writes to its own disks.
    pub(super) throwaway: Option<(OverlayRoot, Vec<Base>)>,
    /// Whether it is a clone, which gets backends of its own where the user chose none.
    is_clone: bool,
    /// Whether the guest gets its own name and resources.
    pub(super) is_as_saved: bool,
    notes: Vec<String>,
    pub(super) warnings: Vec<Finding>,
    /// What stands against a restore and the user chose to override.
    pub(super) forced: Vec<Finding>,
    /// The codes that the user overrides.
    pub(super) force: Vec<String>,
    pub(super) accept_changed_disks: bool,
    /// Values of `-global` that QEMU gets besides.
    globals: Vec<String>,
    /// The resolved machine type that the guest would have.
    pub(super) machine_type: String,
    /// Whether the arguments are not those that the image keeps.
    pub(super) has_other_arguments: bool,
    runs_on: bool,
    held_as: Option<String>,
    threads: usize,
    timeout: Duration,
    pub(super) lazy: Option<LazyRequest>,
    pub(super) mapping: Option<Mapping>,
    /// The RAMBlocks that QEMU maps from the image.
    pub(super) mapped_blocks: Vec<String>,
}

impl Plan {
    /// A plan that nothing was held against yet.
    pub(super) fn new(
        manifest: Manifest,
        request: &RestoreRequest,
        kept: Arguments,
        remaps: Vec<Remap>,
        qemu: QemuFacts,
        machine_type: String,
        is_trusted: bool,
    ) -> Self {
        let name = request.name.clone();
        let rom_sizes = request.rom_sizes.iter();
        Plan {
            image: request
                .image
                .path()
                .and_then(|path| std::path::absolute(path).ok()),
            name: name.unwrap_or_else(|| manifest.guest.name.clone()),
            qemu,
            cwd: if is_trusted {
                PathBuf::from(&manifest.qemu.cwd)
            } else {
                PathBuf::from("/")
            },
            kept,
            is_as_saved: remaps.is_empty()
                && request.name.is_none()
                && !request.throwaway
                && request.clones.is_none(),
            remaps,
            throwaway: None,
            is_clone: request.clones.is_some(),
            notes: Vec::new(),
            warnings: Vec::new(),
            forced: Vec::new(),
            force: request.force.clone(),
            accept_changed_disks: request.accept_changed_disks,
            globals: rom_sizes.map(RomSize::as_global).collect(),
            machine_type,
            has_other_arguments: request.arguments.is_some(),
            runs_on: manifest.guest.was_running && !request.paused,
            held_as: request.held_as.clone(),
            threads: request.threads,
            timeout: request.timeout,
            lazy: request.lazy.clone(),
            mapping: request.map.clone(),
            mapped_blocks: Vec::new(),
            manifest,
        }
    }

    /// The guest's name here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest runs after it is loaded.
    pub fn runs_on(&self) -> bool {
        self.shall_run() && !self.is_held()
    }

    /// Whether it is to run in the end.
    pub fn shall_run(&self) -> bool {
        self.runs_on
    }

    /// Whether it is loaded, and let run by somebody else.
    pub fn is_held(&self) -> bool {
        self.held_as.is_some()
    }

    /// Workers.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The longest QEMU may take to begin, and to load.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The image from which memory is mapped, if it is.
    pub fn mapping(&self) -> Option<&Mapping> {
        self.mapping.as_ref()
    }

    /// The RAMBlocks that QEMU maps from the image.
    pub(super) fn mapped_blocks(&self) -> &[String] {
        &self.mapped_blocks
    }

    /// Whether the image's XML is what the guest was started from, and tells of it as it is restored.
    pub(super) fn keeps_xml(&self) -> bool {
        self.manifest.guest.has_own_xml && self.is_as_saved
    }

    /// What may go wrong although nothing speaks against a restore.
    pub fn warnings(&self) -> &[Finding] {
        &self.warnings
    }

    /// What of a clone is not as the saved guest had it, a sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The QEMU command that a restore would run; the runtime directory stands in it as it would be named.
    pub fn command(&self) -> Result<Vec<String>> {
        let name = match self.is_clone {
            true => format!("{}-1", sanitise_name(&self.name)),
            false => sanitise_name(&self.name),
        };
        let overlays = match &self.throwaway {
            Some((root, bases)) => {
                let directory = root.path().join(&name);
                let bases = bases.iter();
                bases
                    .map(|base| base.remap(&directory.join(&base.name)))
                    .collect()
            }
            None => Vec::new(),
        };
        let image = self.image.as_deref().unwrap_or(Path::new("-"));
        let image = image.display().to_string();
        self.command_at(&RuntimeDir::open()?.path().join(name), &overlays, &image)
    }

    /// `image` is where QEMU finds the image, if it maps it.
    fn command_at(&self, directory: &Path, overlays: &[Remap], image: &str) -> Result<Vec<String>> {
        let mut command = self.arguments_at(directory, overlays)?;
        if let Some(mapping) = &self.mapping {
            let arguments = Arguments::parse(&command)?;
            let mapped = mapped_memory::map(&arguments, image, &mapping.blocks);
            let mapped = mapped.map_err(|findings| self.cannot_run(findings))?;
            command = mapped.arguments.write();
        }
        if let Some(program) = command.first_mut() {
            *program = self.qemu.path.display().to_string();
        }
        Ok(command)
    }

    pub(super) fn arguments_at(&self, directory: &Path, overlays: &[Remap]) -> Result<Vec<String>> {
        let isolated = self.isolated_at(directory)?;
        let own_name = directory.file_name().map(|name| name.display().to_string());
        let context = RestoreContext {
            machine_type: self.machine_type.clone(),
            qmp_socket: directory.join("qmp.sock").display().to_string(),
            log_dir: directory.display().to_string(),
            name: match &isolated {
                Some(_) => own_name.unwrap_or_default(),
                None => self.name.clone(),
            },
        };
        let kept = isolated.as_ref().map_or(&self.kept, |it| &it.arguments);
        let remaps = [&self.remaps, overlays].concat();
        let mut arguments = restore_arguments(kept, &context, &remaps)?;
        for global in &self.globals {
            arguments.extend(["-global".to_owned(), global.clone()]);
        }
        if self.lazy.is_some() {
            arguments.extend(keeper_monitor(directory));
        }
        Ok(arguments)
    }

    /// The networks that QEMU needs only until it has loaded the state.
    pub(super) fn idle_networks(&self) -> Result<Vec<String>> {
        let arguments = self.arguments_at(Path::new(side::PLACE), &[])?;
        Ok(idle_networks(&Arguments::parse(&arguments)?))
    }

    /// The kept arguments for a clone with this directory; `None` for a guest that is no clone.
    pub(super) fn isolated_at(&self, directory: &Path) -> Result<Option<Isolated>> {
        if !self.is_clone {
            return Ok(None);
        }
        let machine_type = &self.machine_type;
        // Each has programs of its own beside QEMU.
        let is_side = |one: &Resource| {
            let mut programs = self.manifest.qemu.side_programs.iter();
            programs.any(|program| one.backend.path.as_ref() == Some(&program.socket))
        };
        let is_named =
            |one: &Resource| is_side(one) || self.remaps.iter().any(|remap| remap.selects(one));
        let directory = directory.display().to_string();
        Ok(Some(isolate(
            &self.kept,
            machine_type,
            &directory,
            &is_named,
        )?))
    }

    /// How the guest gets its memory while it runs; `None` if it gets it before.
    pub fn lazy(&self) -> Option<&LazyRequest> {
        self.lazy.as_ref()
    }

    pub(super) fn cannot_run(&self, findings: Vec<Finding>) -> RestoreError {
        RestoreError::CannotRun {
            guest: self.name.clone(),
            findings,
        }
    }

    /// Makes the guest's runtime directory and says what to start in it. If memory is mapped, QEMU inherits `image`: what
    /// it maps is the file that was looked at, whatever its name means by then, and the lock on it lasts.
    pub fn launch(&self, image: Option<&File>) -> Result<Launch> {
        let runtime = RuntimeDir::open()?;
        // What guests that ended left behind must not take their names; that it cannot be removed harms nobody.
        let _ = supervise::list(&runtime);
        let name = sanitise_name(&self.name);
        let dir: GuestDir = match self.is_clone {
            true => runtime.create_clone(&name)?,
            false => runtime.create_guest(&name)?,
        };
        let image = image.filter(|_| self.mapping.is_some());
        let image = image.map(File::try_clone).transpose();
        let image = image.map_err(|source| HostError::File {
            act: "keep open",
            path: self.image.clone().unwrap_or_default(),
            source,
        })?;
        let number = image.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let in_qemu = format!("/proc/self/fd/{number}");
        let command = self
            .note_forced(&dir)
            .and_then(|()| self.make_overlays(&dir))
            .and_then(|overlays| self.command_at(dir.path(), &overlays, &in_qemu));
        let command = match command {
            Ok(command) => command,
            Err(error) => {
                dir.remove()?;
                return Err(error);
            }
        };
        let is_passing = self.is_clone || self.throwaway.is_some();
        let saved = &self.manifest.qemu.side_programs;
        let environment = self.held_as.iter();
        let environment = environment.map(|name| (HELD_VARIABLE.to_owned(), name.clone()));
        let side = side::programs_for(&command, saved, dir.path(), is_passing);
        Ok(Launch {
            argv: command.into_iter().map(Into::into).collect(),
            cwd: self.cwd.clone(),
            dir,
            image: self.image.clone(),
            inherit: image.into_iter().map(OwnedFd::from).collect(),
            side,
            environment: environment.collect(),
            xml: None,
        })
    }

    /// Writes into the guest's log what the user chose to override.
    fn note_forced(&self, dir: &GuestDir) -> Result<()> {
        if self.forced.is_empty() {
            return Ok(());
        }
        let note = |finding: &Finding| {
            let (code, fact) = (finding.code, &finding.fact);
            format!("vmstow: restored with --force {code}, although {fact}\n")
        };
        let notes: String = self.forced.iter().map(note).collect();
        let path = dir.log();
        Ok(fs::write(&path, notes).map_err(|source| HostError::File {
            act: "write",
            path,
            source,
        })?)
    }

    /// Lays an overlay over each disk that the guest may write to, if it shall not write to its own; these remaps put
    /// them in their places.
    fn make_overlays(&self, dir: &GuestDir) -> Result<Vec<Remap>> {
        let Some((root, bases)) = &self.throwaway else {
            return Ok(Vec::new());
        };
        let overlays = root.create(dir)?;
        let mut remaps = Vec::with_capacity(bases.len());
        for base in bases {
            let path = self.cwd.join(&base.disk.path);
            let overlay = overlays.make(&base.name, &path, &base.format)?;
            remaps.push(base.remap(&overlay));
        }
        Ok(remaps)
    }

    /// Finds what throwaway overlays have to be laid over, and refuses clones without them that would share a disk.
    pub(super) fn look_at_disks(
        &mut self,
        arguments: &[String],
        request: &RestoreRequest,
    ) -> Result<()> {
        if let Some(isolated) = self.isolated_at(Path::new(side::PLACE))? {
            self.notes = isolated.notes;
        }
        let machine_type = &self.machine_type;
        let arguments = Arguments::parse(arguments)?;
        if !request.throwaway {
            let table = ResourceTable::from_arguments(&arguments, Some(machine_type));
            let disks = table.resources.iter().filter(|one| is_writable_disk(one));
            let disks = disks.filter(|one| one.backend.kind != "empty");
            let disks: Vec<String> = disks.map(|one| format!("{:?}", one.id)).collect();
            return match request.clones.is_some() && !disks.is_empty() {
                true => Err(RestoreError::SharedDisks {
                    guest: self.name.clone(),
                    disks,
                }
                .into()),
                false => Ok(()),
            };
        }
        let root = OverlayRoot::find(request.overlay_dir.as_deref())?;
        let disks = writable_disks(&arguments, machine_type)
            .map_err(|reasons| ConfigError::Refused { reasons })?;
        let saved = resource_table(&self.manifest);
        let bases = (0..).zip(disks).map(|(number, disk): (u32, WritableDisk)| {
            let format = disk.format.clone().or_else(|| {
                let saved = saved.find(disk.kind, &disk.id)?;
                saved.backend.format.clone()
            });
            match format {
                Some(format) => Ok(Base {
                    name: format!("{}-{number}.{}", sanitise_name(&disk.id), overlay::FORMAT),
                    disk,
                    format,
                }),
                None => Err(RestoreError::UnknownFormat {
                    guest: self.name.clone(),
                    disk: disk.id,
                }),
            }
        });
        self.throwaway = Some((root, bases.collect::<Result<_, _>>()?));
        Ok(())
    }
}

/// A second monitor, for the keeper of a guest that gets its memory while it runs.
fn keeper_monitor(directory: &Path) -> [String; 4] {
    let path = escape(&directory.join("keeper.qmp").display().to_string());
    [
        "-chardev".to_owned(),
        format!("socket,id={KEEPER_CHARDEV},path={path},server=on,wait=off"),
        "-mon".to_owned(),
        format!("id=vmstow-keeper,chardev={KEEPER_CHARDEV},mode=control"),
    ]
}

impl Base {
    fn remap(&self, overlay: &Path) -> Remap {
        Remap::new(
            self.disk.kind,
            Selector::Id(self.disk.id.clone()),
            Target::Overlay(overlay.display().to_string()),
        )
    }
}

/// Lets remaps call disks as the image's XML calls them, `disk:vda`, where no resource has that name.
pub fn call_disks_by_id(remaps: &mut [Remap], manifest: &Manifest, xml: &str) -> Result<()> {
    let kept = kept_arguments(manifest, true)?;
    let table = ResourceTable::from_arguments(&kept, Some(&manifest.machine.machine_type));
    // XML that cannot be read names nothing.
    let Ok(document) = Document::parse(xml.as_bytes()) else {
        return Ok(());
    };
    let names = names_of_disks(&document, &table);
    for remap in remaps {
        let Selector::Id(name) = &remap.selector else {
            continue;
        };
        let is_it = |one: &&(ResourceKind, String, String)| one.0 == remap.kind && one.1 == *name;
        if table.find(remap.kind, name).is_none()
            && let Some((_, _, id)) = names.iter().find(is_it)
        {
            remap.selector = Selector::Id(id.clone());
        }
    }
    Ok(())
}

/// The kept arguments with the disks that the guest had at the save and what was chosen since, if its image is trusted
/// to name any.
pub(super) fn kept_arguments(manifest: &Manifest, is_trusted: bool) -> Result<Arguments> {
    if manifest.qemu.argv.is_empty() {
        let guest = manifest.guest.name.clone();
        return Err(RestoreError::NoConfiguration { guest }.into());
    }
    if !is_trusted {
        return Ok(Arguments::parse(&manifest.qemu.argv)?);
    }
    let machine_type = &manifest.machine.machine_type;
    let resources = resource_table(manifest);
    let kept = kept_with(
        &manifest.qemu.argv,
        machine_type,
        &resources,
        &manifest.remaps,
    );
    Ok(kept?)
}
