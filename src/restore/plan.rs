//! What would be restored, with which QEMU and arguments, and whether it can be: all asked before QEMU is started.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check;
use super::{Mapping, RestoreError, RestoreRequest};
use crate::config::compat::{Finding, Level, QemuVersion};
use crate::config::foreign::{foreign, open_networks};
use crate::config::mapped_memory;
use crate::config::remap::block_graph_remaps;
use crate::config::{
    Arguments, Remap, Resource, ResourceKind, ResourceTable, RestoreContext, restore_arguments,
};
use crate::container::Manifest;
use crate::error::Result;
use crate::host::{GuestDir, HostError, QemuFacts, RuntimeDir, find_qemu, is_name, sanitise_name};
use crate::image::Trust;
use crate::supervise::{self, Launch};

/// A guest that can be restored here.
pub struct Plan {
    image: Option<PathBuf>,
    manifest: Manifest,
    name: String,
    qemu: QemuFacts,
    cwd: PathBuf,
    kept: Arguments,
    remaps: Vec<Remap>,
    warnings: Vec<Finding>,
    accept_changed_disks: bool,
    runs_on: bool,
    threads: usize,
    timeout: Duration,
    mapping: Option<Mapping>,
    /// The RAMBlocks that QEMU maps from the image.
    mapped_blocks: Vec<String>,
}

impl Plan {
    /// Holds the image against this host.
    ///
    /// # Errors
    /// Whose image it is, or every reason at once for which this host cannot run it.
    pub fn check(manifest: Manifest, trust: &Trust, request: &RestoreRequest) -> Result<Self> {
        if let Some(name) = request.name.as_ref().filter(|name| !is_name(name)) {
            return Err(HostError::BadName { name: name.clone() }.into());
        }
        if let Some(name) = &request.name {
            refuse_taken(name)?;
        }
        let name = request
            .name
            .clone()
            .unwrap_or_else(|| manifest.guest.name.clone());
        let kept = Arguments::parse(&manifest.qemu.argv)?;
        let table = resource_table(&manifest);
        let is_trusted = request.trust || trust.is_trusted();
        let mut remaps = if is_trusted {
            block_graph_remaps(&table)
        } else {
            Vec::new()
        };
        remaps.extend(request.remaps.iter().cloned());
        let qemu = QemuFacts::probe(&choose_qemu(request, &manifest, is_trusted)?)?;
        let mut plan = Plan {
            image: request
                .image
                .path()
                .and_then(|path| std::path::absolute(path).ok()),
            name,
            qemu,
            cwd: if is_trusted {
                PathBuf::from(&manifest.qemu.cwd)
            } else {
                PathBuf::from("/")
            },
            kept,
            remaps,
            warnings: Vec::new(),
            accept_changed_disks: request.accept_changed_disks,
            runs_on: manifest.guest.was_running && !request.paused,
            threads: request.threads,
            timeout: request.timeout,
            mapping: request.map.clone(),
            mapped_blocks: Vec::new(),
            manifest,
        };
        let arguments = plan.arguments_at(Path::new("/nonexistent"))?;
        plan.choose_mapped_blocks(&arguments)?;
        if !is_trusted {
            plan.refuse_foreign_resources(&arguments, trust, request)?;
        }
        plan.refuse_what_cannot_run(&arguments)?;
        Ok(plan)
    }

    /// The guest's name here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest runs after it is loaded.
    pub fn runs_on(&self) -> bool {
        self.runs_on
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

    /// What may go wrong although nothing speaks against a restore.
    pub fn warnings(&self) -> &[Finding] {
        &self.warnings
    }

    /// The QEMU command that a restore would run; the runtime directory stands in it as it would be named.
    pub fn command(&self) -> Result<Vec<String>> {
        let directory = RuntimeDir::open()?.path().join(sanitise_name(&self.name));
        let image = self.image.as_deref().unwrap_or(Path::new("-"));
        self.command_at(&directory, &image.display().to_string())
    }

    /// `image` is where QEMU finds the image, if it maps it.
    fn command_at(&self, directory: &Path, image: &str) -> Result<Vec<String>> {
        let mut command = self.arguments_at(directory)?;
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

    fn arguments_at(&self, directory: &Path) -> Result<Vec<String>> {
        let context = RestoreContext {
            machine_type: self.manifest.machine.machine_type.clone(),
            qmp_socket: directory.join("qmp.sock").display().to_string(),
            log_dir: directory.display().to_string(),
            name: self.name.clone(),
        };
        Ok(restore_arguments(&self.kept, &context, &self.remaps)?)
    }

    /// Finds what can be mapped, if anything shall be.
    fn choose_mapped_blocks(&mut self, arguments: &[String]) -> Result<()> {
        let Some(mapping) = &self.mapping else {
            return Ok(());
        };
        let version = &self.qemu.version;
        let version = QemuVersion(version.major, version.minor, version.micro);
        let path = self.qemu.path.display().to_string();
        let mut findings = Vec::from_iter(mapped_memory::check_qemu(version, &path));
        let mapped = mapped_memory::map(&Arguments::parse(arguments)?, "", &mapping.blocks);
        match mapped {
            Ok(mapped) if findings.is_empty() => {
                self.mapped_blocks = mapped.blocks;
                return Ok(());
            }
            Ok(_) => {}
            Err(more) => findings.extend(more),
        }
        Err(self.cannot_run(findings).into())
    }

    fn cannot_run(&self, findings: Vec<Finding>) -> RestoreError {
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
        let dir: GuestDir = runtime.create_guest(&sanitise_name(&self.name))?;
        let image = image.filter(|_| self.mapping.is_some());
        let image = image.map(File::try_clone).transpose();
        let image = image.map_err(|source| HostError::File {
            act: "keep open",
            path: self.image.clone().unwrap_or_default(),
            source,
        })?;
        let number = image.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let command = self.command_at(dir.path(), &format!("/proc/self/fd/{number}"));
        let command = match command {
            Ok(command) => command,
            Err(error) => {
                dir.remove()?;
                return Err(error);
            }
        };
        Ok(Launch {
            argv: command.into_iter().map(Into::into).collect(),
            cwd: self.cwd.clone(),
            dir,
            image: self.image.clone(),
            inherit: image.into_iter().map(OwnedFd::from).collect(),
        })
    }

    /// Holds the final manifest of an image that came through a pipe against the provisional one, with which QEMU was
    /// started, and its disks against this host.
    pub(super) fn confirm(&self, manifest: Manifest) -> Result<()> {
        let guest = self.name.clone();
        if manifest.qemu.argv != self.manifest.qemu.argv
            || manifest.machine != self.manifest.machine
        {
            return Err(RestoreError::HeadDiffers { guest }.into());
        }
        let needs = check::needs(&manifest, &self.arguments_at(Path::new("/nonexistent"))?)?;
        let facts = check::host_facts(&self.qemu, &needs, &self.cwd);
        let mut findings = crate::config::compat::check(&needs, &facts);
        findings.retain(|finding| match finding.code {
            "disk.changed" => !self.accept_changed_disks,
            code => code == "file.changed",
        });
        if findings.is_empty() {
            Ok(())
        } else {
            Err(RestoreError::CannotRun { guest, findings }.into())
        }
    }

    /// An image of a stranger may use only what the user named for it.
    fn refuse_foreign_resources(
        &self,
        arguments: &[String],
        trust: &Trust,
        request: &RestoreRequest,
    ) -> Result<()> {
        let arguments = Arguments::parse(arguments)?;
        // What a restore adds itself lies in the runtime directory, for which this stands.
        let is_named = |name: &str| {
            let is_ours = name.starts_with("/nonexistent/") && !name.contains("..");
            is_ours || request.remaps.iter().any(|remap| remap.names(name))
        };
        let mut resources = foreign(&arguments, &is_named);
        resources.extend(open_networks(&arguments, &|nic| {
            request.remaps.iter().any(|remap| match nic {
                Some(nic) => remap.selects(nic),
                None => remap.selects_all(ResourceKind::Nic),
            })
        }));
        if resources.is_empty() {
            return Ok(());
        }
        let (guest, state) = (self.name.clone(), trust.to_string());
        Err(RestoreError::Untrusted {
            guest,
            state,
            resources,
        }
        .into())
    }

    fn refuse_what_cannot_run(&mut self, arguments: &[String]) -> Result<()> {
        let needs = check::needs(&self.manifest, arguments)?;
        let facts = check::host_facts(&self.qemu, &needs, &self.cwd);
        let mut findings = crate::config::compat::check(&needs, &facts);
        if self.accept_changed_disks {
            for finding in findings
                .iter_mut()
                .filter(|finding| finding.code == "disk.changed")
            {
                finding.level = Level::Warning;
            }
        }
        if !self.cwd.is_dir() {
            let (guest, path) = (self.name.clone(), self.cwd.clone());
            return Err(RestoreError::NoDirectory { guest, path }.into());
        }
        if findings
            .iter()
            .any(|finding| finding.level == Level::Refusal)
        {
            findings.retain(|finding| finding.level == Level::Refusal);
            return Err(self.cannot_run(findings).into());
        }
        self.warnings = findings;
        Ok(())
    }
}

/// A name that the user chose is the guest's, or there is no guest.
fn refuse_taken(name: &str) -> Result<()> {
    let running = supervise::list(&RuntimeDir::open()?)?.running;
    match running.into_iter().find(|guest| guest.name == name) {
        Some(guest) => Err(RestoreError::NameTaken {
            name: guest.name,
            pid: guest.process.pid,
        }
        .into()),
        None => Ok(()),
    }
}

/// The QEMU asked for; else the one that ran the guest, if the image is trusted and it is there; else the one in PATH.
fn choose_qemu(request: &RestoreRequest, manifest: &Manifest, is_trusted: bool) -> Result<PathBuf> {
    if let Some(qemu) = &request.qemu {
        return Ok(qemu.clone());
    }
    let saved = Path::new(&manifest.qemu.binary);
    if is_trusted && saved.is_file() {
        Ok(saved.to_owned())
    } else {
        Ok(find_qemu()?)
    }
}

/// The manifest's resources.
fn resource_table(manifest: &Manifest) -> ResourceTable {
    ResourceTable {
        resources: manifest.resources.iter().filter_map(resource).collect(),
    }
}

/// A resource of the manifest; both sides are the same JSON.
pub(super) fn resource(kept: &crate::container::manifest::Resource) -> Option<Resource> {
    serde_json::from_value(serde_json::to_value(kept).ok()?).ok()
}
