//! Whether a guest can be restored here: everything that is asked before QEMU is started, all reasons at once.
//!
//! A restore refuses what was found ([`Plan::check`]); `vmstow check` only tells it ([`Plan::assess`]).

use std::path::{Path, PathBuf};

use super::plan::{Plan, kept_arguments};
use super::{RestoreError, RestoreRequest, check, side};
use crate::config::compat::{
    self, CHANGED_DISK, Finding, Level, QemuVersion, argument_changes, codes,
};
use crate::config::foreign::{foreign, open_networks};
use crate::config::mapped_memory;
use crate::config::overlay::is_writable_disk;
use crate::config::postcopy::obstacles;
use crate::config::remap::fitting;
use crate::config::restore_arguments::remap_warnings;
use crate::config::{Arguments, Resource, ResourceKind, ResourceTable};
use crate::container::Manifest;
use crate::error::{Error, Result};
use crate::host::{
    self, HostError, QEMU_BINARY, QemuFacts, RuntimeDir, Version, find_qemu, is_name,
};
use crate::image::Trust;
use crate::supervise;

/// A guest held against this host.
pub struct Assessment {
    /// What would be restored. It cannot be where a finding is a refusal.
    pub plan: Plan,
    /// Everything that was found; what the arguments alone tell of the guest's devices is in `changes`.
    pub findings: Vec<Finding>,
    /// What the guest would see differently by the arguments alone, no QEMU being asked.
    pub changes: Vec<Finding>,
    /// Why there is no QEMU.
    pub no_qemu: Option<Error>,
    /// Whose image it is, if nobody we trust signed it and it names resources of this host.
    pub stranger: Option<RestoreError>,
}

impl Plan {
    /// Holds the image against this host.
    ///
    /// # Errors
    /// Whose image it is, or every reason at once for which this host cannot run it.
    pub fn check(manifest: Manifest, trust: &Trust, request: &RestoreRequest) -> Result<Self> {
        let assessed = Plan::assess(manifest, trust, request)?;
        let mut plan = assessed.plan;
        if let Some(error) = assessed.no_qemu {
            return Err(error);
        }
        if let Some(error) = assessed.stranger {
            return Err(error.into());
        }
        if !plan.cwd.is_dir() {
            let (guest, path) = (plan.name.clone(), plan.cwd.clone());
            return Err(RestoreError::NoDirectory { guest, path }.into());
        }
        plan.settle([assessed.findings, assessed.changes].concat())?;
        Ok(plan)
    }

    /// Holds the image against this host and says everything that was found.
    ///
    /// # Errors
    /// What is wrong with the request itself; arguments that no restore can use.
    pub fn assess(
        mut manifest: Manifest,
        trust: &Trust,
        request: &RestoreRequest,
    ) -> Result<Assessment> {
        if let Some(name) = request.name.as_ref().filter(|name| !is_name(name)) {
            return Err(HostError::BadName { name: name.clone() }.into());
        }
        if let (Some(name), None) = (&request.name, request.clones) {
            refuse_taken(name)?;
        }
        refuse_unforceable(&request.force)?;
        let is_trusted = request.trust || trust.is_trusted();
        let kept = match &request.arguments {
            Some(words) => Arguments::parse(words)?,
            None => kept_arguments(&manifest, is_trusted)?,
        };
        let chosen = choose_qemu(request, &manifest, is_trusted);
        let path = chosen
            .as_deref()
            .unwrap_or(Path::new(QEMU_BINARY))
            .to_owned();
        let probed = chosen.and_then(|path| Ok(QemuFacts::probe(&path)?));
        let (qemu, no_qemu) = match probed {
            Ok(qemu) => (qemu, None),
            Err(error) => (unknown_qemu(path), Some(error)),
        };
        let machine_type = match &request.arguments {
            Some(_) => machine_type_of(&kept, &qemu),
            None => manifest.machine.machine_type.clone(),
        };
        let table = ResourceTable::from_arguments(&kept, Some(&machine_type));
        let mut remaps = fitting(&request.settings.remaps, &table);
        remaps.extend(request.remaps.iter().cloned());
        let has_remaps = !remaps.is_empty();
        let remaps = side::move_states(&mut manifest.qemu.side_programs, remaps, &table);
        let mut plan = Plan::new(
            manifest,
            request,
            kept,
            remaps,
            qemu,
            machine_type,
            is_trusted,
        );
        // A TPM's state that goes elsewhere is no remap of QEMU's, and a change all the same.
        plan.is_as_saved &= !has_remaps;
        let arguments = plan.arguments_at(Path::new(side::PLACE), &[])?;
        let mut findings = plan.choose_mapped_blocks(&arguments)?;
        let stranger = match is_trusted {
            true => None,
            false => plan.stranger(&arguments, trust, request)?,
        };
        if let Err(error) = plan.look_at_disks(&arguments, request) {
            // What comes first is told first.
            let stranger = stranger.map(Error::from);
            return Err(no_qemu.or(stranger).unwrap_or(error));
        }
        let count = request.clones.unwrap_or(1);
        findings.extend(plan.look_at_host(&arguments, count, no_qemu.is_some())?);
        findings.extend(plan.remap_doubts()?);
        let changes = plan.changes(&arguments)?;
        Ok(Assessment {
            plan,
            findings,
            changes,
            no_qemu,
            stranger,
        })
    }

    /// Refuses what was found, but for what the user overrides; keeps the rest to be told.
    ///
    /// # Errors
    /// [`RestoreError::CannotRun`].
    pub(super) fn settle(&mut self, mut findings: Vec<Finding>) -> Result<()> {
        for finding in &mut findings {
            let is_accepted = self.accept_changed_disks && CHANGED_DISK.contains(&finding.code);
            let is_forced = self.force.iter().any(|code| code == finding.code);
            if finding.level == Level::Refusal && (is_accepted || is_forced) {
                finding.level = Level::Warning;
                if is_forced {
                    self.forced.push(finding.clone());
                }
            }
        }
        let is_refusal = |finding: &Finding| finding.level == Level::Refusal;
        if findings.iter().any(is_refusal) {
            findings.retain(is_refusal);
            return Err(self.cannot_run(findings).into());
        }
        self.warnings.extend(findings);
        Ok(())
    }

    /// What a user should know about the remaps.
    fn remap_doubts(&self) -> Result<Vec<Finding>> {
        let isolated = self.isolated_at(Path::new("/nonexistent"))?;
        let kept = isolated.as_ref().map_or(&self.kept, |it| &it.arguments);
        let warnings = remap_warnings(kept, &self.machine_type, &self.remaps)?.into_iter();
        let doubts = warnings.map(|it| Finding::warning(it.code(), it.to_string(), None));
        Ok(doubts.collect())
    }

    /// Finds what can be mapped, if anything shall be; or why nothing can.
    fn choose_mapped_blocks(&mut self, arguments: &[String]) -> Result<Vec<Finding>> {
        let Some(mapping) = &self.mapping else {
            return Ok(Vec::new());
        };
        let path = self.qemu.path.display().to_string();
        let mut findings = Vec::from_iter(mapped_memory::check_qemu(self.qemu_version(), &path));
        match mapped_memory::map(&Arguments::parse(arguments)?, "", &mapping.blocks) {
            Ok(mapped) => self.mapped_blocks = mapped.blocks,
            Err(more) => findings.extend(more),
        }
        Ok(findings)
    }

    /// The version of the QEMU that would be started.
    pub(super) fn qemu_version(&self) -> QemuVersion {
        let version = &self.qemu.version;
        QemuVersion(version.major, version.minor, version.micro)
    }

    /// An image of a stranger may use only what the user named for it.
    fn stranger(
        &self,
        arguments: &[String],
        trust: &Trust,
        request: &RestoreRequest,
    ) -> Result<Option<RestoreError>> {
        let arguments = Arguments::parse(arguments)?;
        // What a restore adds itself lies in the runtime directory, for which this stands.
        let is_named = |name: &str| {
            let is_ours = name.starts_with("/nonexistent/") && !name.contains("..");
            is_ours || self.remaps.iter().any(|remap| remap.names(name))
        };
        let allow = &request.settings.allow;
        let mut resources = foreign(&arguments, &is_named, allow);
        resources.extend(side::shown(&self.manifest.qemu.side_programs));
        let is_remapped = |nic: Option<&Resource>| {
            self.remaps.iter().any(|remap| match nic {
                Some(nic) => remap.selects(nic),
                None => remap.selects_all(ResourceKind::Nic),
            })
        };
        resources.extend(open_networks(&arguments, &is_remapped, allow));
        let (guest, state) = (self.name.clone(), trust.to_string());
        Ok((!resources.is_empty()).then_some(RestoreError::Untrusted {
            guest,
            state,
            resources,
        }))
    }

    /// What this host lacks, and what is not as it was.
    fn look_at_host(
        &self,
        arguments: &[String],
        count: u32,
        lacks_qemu: bool,
    ) -> Result<Vec<Finding>> {
        let mut needs = check::needs(&self.manifest, arguments)?;
        needs.machine_type.clone_from(&self.machine_type);
        needs.accelerator = self.accelerator();
        needs.memory_bytes = needs.memory_bytes.saturating_mul(count.into());
        if self.throwaway.is_some() {
            // Below an overlay they are only read.
            let disks = needs.resources.resources.iter_mut();
            let disks = disks.filter(|one| is_writable_disk(one));
            disks.for_each(|disk| disk.read_only = true);
        }
        let mut facts = check::host_facts(&self.qemu, &needs, &self.cwd);
        facts.qemu_version = facts.qemu_version.filter(|_| !lacks_qemu);
        let mut findings = compat::check(&needs, &facts);
        if self.lazy.is_some() {
            let arguments = Arguments::parse(arguments)?;
            findings.extend(obstacles(&arguments, host::userfaultfd().obstacle()));
        }
        if !self.cwd.is_dir() {
            let fact = format!(
                "the directory {} is missing, from which the guest's relative paths start",
                self.cwd.display()
            );
            findings.push(Finding::refusal("directory.missing", fact, None));
        }
        Ok(findings)
    }

    /// What the guest would see differently, by the arguments alone.
    fn changes(&self, arguments: &[String]) -> Result<Vec<Finding>> {
        let kept = Arguments::parse(&self.manifest.qemu.argv)?;
        let mut findings = argument_changes::check(&kept, &Arguments::parse(arguments)?);
        let machine = &self.manifest.machine;
        for (code, what, then, now) in [
            (
                "machine.other",
                "machine type",
                &machine.machine_type,
                &self.machine_type,
            ),
            (
                "accel.other",
                "accelerator",
                &machine.accelerator,
                &self.accelerator(),
            ),
        ] {
            if then != now {
                let fact = format!("the guest was saved with {what} {then}, and would have {now}");
                findings.push(Finding::refusal(code, fact, None));
            }
        }
        Ok(findings)
    }

    /// The accelerator that the guest would have.
    pub(super) fn accelerator(&self) -> String {
        let saved = &self.manifest.machine.accelerator;
        match self.has_other_arguments {
            true => accelerator_of(&self.kept).unwrap_or_else(|| saved.clone()),
            false => saved.clone(),
        }
    }

    /// Holds the final manifest of an image that came through a pipe against the provisional one, with which QEMU was
    /// started, and its disks against this host.
    pub(super) fn confirm(&self, manifest: &Manifest) -> Result<()> {
        let guest = self.name.clone();
        let began = &self.manifest;
        if manifest.qemu.argv != began.qemu.argv
            || manifest.machine != began.machine
            || manifest.remaps != began.remaps
            || manifest.qemu.binary != began.qemu.binary
            || manifest.guest.name != began.guest.name
        {
            return Err(RestoreError::HeadDiffers { guest }.into());
        }
        let arguments = self.arguments_at(Path::new(side::PLACE), &[])?;
        let needs = check::needs(manifest, &arguments)?;
        let facts = check::host_facts(&self.qemu, &needs, &self.cwd);
        let mut findings = compat::check(&needs, &facts);
        findings.retain(|finding| {
            let is_changed = CHANGED_DISK.contains(&finding.code) && !self.accept_changed_disks;
            let is_forced = self.force.iter().any(|code| code == finding.code);
            (is_changed || finding.code == "file.changed") && !is_forced
        });
        if findings.is_empty() {
            Ok(())
        } else {
            Err(RestoreError::CannotRun { guest, findings }.into())
        }
    }
}

/// Codes that the user may override.
fn refuse_unforceable(force: &[String]) -> Result<(), RestoreError> {
    for code in force {
        let code = code.clone();
        match codes::find(&code) {
            Some(row) if row.can_be_forced || row.level == Level::Warning => {}
            Some(row) => {
                let says = row.says;
                return Err(RestoreError::NotForced { code, says });
            }
            None => return Err(RestoreError::UnknownCode { code }),
        }
    }
    Ok(())
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
    if let Some(qemu) = &request.settings.qemu {
        return Ok(PathBuf::from(qemu));
    }
    let saved = Path::new(&manifest.qemu.binary);
    if is_trusted && saved.is_file() {
        Ok(saved.to_owned())
    } else {
        Ok(find_qemu()?)
    }
}

/// What stands for a QEMU that is not there.
fn unknown_qemu(path: PathBuf) -> QemuFacts {
    QemuFacts {
        path,
        version: Version {
            major: 0,
            minor: 0,
            micro: 0,
        },
        package: None,
        machines: Vec::new(),
        accelerators: Vec::new(),
    }
}

/// The machine type that the arguments name, resolved if QEMU knows it.
fn machine_type_of(arguments: &Arguments, qemu: &QemuFacts) -> String {
    let machines = arguments.options("machine").rev();
    let mut types = machines.filter_map(|(_, machine)| machine.properties().get("type"));
    let named = types.next().unwrap_or_else(|| "pc".to_owned());
    qemu.resolve_machine(&named).unwrap_or(&named).to_owned()
}

/// The accelerator that the arguments name first.
fn accelerator_of(arguments: &Arguments) -> Option<String> {
    arguments.items.iter().find_map(|item| match item.name()? {
        "enable-kvm" => Some("kvm".to_owned()),
        "accel" | "machine" => {
            let named = item.properties().get("accel")?;
            Some(named.split(':').next().unwrap_or_default().to_owned())
        }
        _ => None,
    })
}
