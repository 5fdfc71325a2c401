//! What the QEMU of a restore would have, asked of that QEMU itself, held against what the guest was saved with.
//!
//! QEMU is started with the arguments of the restore, all that reaches the host taken out of them, and with `-S`: it runs
//! nothing, opens no disk and no port, and touches no page of the memory that it reserves. It tells its RAMBlocks and
//! processors and writes its device state, whose sections are those that it would load. That takes as long as QEMU's start,
//! some 100 ms, however much memory the guest has.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use super::plan::Plan;
use super::side;
use crate::config::compat::cpu::CpuFeatures;
use crate::config::compat::state::{self, Block, KnownState, MachineState, Section, is_of_tpm};
use crate::config::compat::{Finding, argument_changes};
use crate::config::{Arguments, Resource, explain, inert};
use crate::container::Manifest;
use crate::error::Result;
use crate::host::{self, HostError};
use crate::image::{OpenedImage, resource_table};
use crate::pipeline;
use crate::stream::{DeviceSection, likely_sections, subsection_names, writer};
use crate::supervise::{Probe, ProbePlace, SuperviseError};
use crate::units::StreamOffset;

/// The longest that QEMU may take to start, and then to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a QEMU that is asked has come to.
pub enum Target {
    /// It told; everything in which it differs from the guest.
    Compared(Vec<Finding>),
    /// It could not be asked, which is a finding too.
    Unknown(Finding),
}

impl Plan {
    /// Holds the guest in the image against what the QEMU of this plan would have.
    ///
    /// # Errors
    /// A damaged image; what the file system says.
    pub fn compare_target(&self, image: &OpenedImage) -> Result<Target> {
        let words = self.arguments_at(Path::new(side::PLACE), &[])?;
        let arguments = Arguments::parse(&words)?;
        let place = ProbePlace::make()?;
        let length_of = |resource: &Resource| self.length_of(resource);
        let directory = place.path().display().to_string();
        let quiet = match inert(&arguments, &self.machine_type, &directory, &length_of) {
            Ok(quiet) => quiet,
            Err(bound) => {
                return Ok(unknown(&format!(
                    "it cannot be asked without {}",
                    bound.join(", ")
                )));
            }
        };
        let mut argv = quiet.write();
        if let Some(program) = argv.first_mut() {
            *program = self.qemu.path.display().to_string();
        }
        let socket = place.qmp_socket().display().to_string();
        argv.extend([
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", socket.replace(',', ",,")),
        ]);
        let cwd = match self.cwd.is_dir() {
            true => self.cwd.as_path(),
            false => Path::new("/"),
        };
        let mut probe = match place.start(&argv, cwd, PATIENCE) {
            Ok(probe) => probe,
            Err(SuperviseError::EarlyExit { log, .. }) => {
                return Ok(Target::Compared(vec![self.refused(&log)]));
            }
            Err(error) => return Ok(unknown(&error.to_string())),
        };
        let has_tpm = arguments.has("tpmdev");
        let target = match ask(&mut probe, &place, has_tpm) {
            Ok(Some(target)) => target,
            Ok(None) => return Ok(unknown("what it answers is not as we know it")),
            Err(error) => return Ok(unknown(&error.to_string())),
        };
        drop(probe);
        let (saved, parts) = saved_state(&self.manifest, image)?;
        let mut findings = state::check(&saved, &target);
        let kept = Arguments::parse(&self.manifest.qemu.argv)?;
        findings.extend(argument_changes::other_cpu_model(&kept, &arguments));
        if self.is_older_qemu() {
            // A QEMU that does not tell is judged by its sections alone.
            let known = host::vmstate_names(&self.qemu.path, &target.machine_type).ok();
            let known = known.map(|names| KnownState {
                descriptions: names.descriptions,
                subsections: names.subsections,
            });
            findings.extend(
                known
                    .iter()
                    .flat_map(|known| state::check_subsections(&parts, known)),
            );
        }
        Ok(Target::Compared(findings))
    }

    /// Refuses a guest that this plan's QEMU would not have as it was saved; asks it only where it is another version than
    /// the guest was saved by, and the guest does not have to run at once.
    ///
    /// # Errors
    /// [`RestoreError::CannotRun`](super::RestoreError::CannotRun); as [`Plan::compare_target`].
    pub fn check_target(&mut self, image: &OpenedImage) -> Result<()> {
        let is_in_a_hurry = self.lazy.is_some() || self.mapping.is_some();
        if is_in_a_hurry || self.is_qemu_of_the_save() {
            return Ok(());
        }
        match self.compare_target(image)? {
            Target::Compared(findings) => self.settle(findings),
            Target::Unknown(doubt) => self.settle(vec![doubt]),
        }
    }

    fn is_qemu_of_the_save(&self) -> bool {
        let saved = &self.manifest.qemu;
        saved.version == self.qemu.version.to_string() && saved.package == self.qemu.package
    }

    fn is_older_qemu(&self) -> bool {
        let saved = super::check::version(&self.manifest.qemu.version);
        self.qemu_version() < saved
    }

    /// Bytes of a disk's file, as QEMU would find it; those at the save if it is not there.
    fn length_of(&self, resource: &Resource) -> Option<u64> {
        let path = resource.backend.path.as_ref()?;
        let found = disk_len(&self.cwd.join(path));
        let at_the_save = || {
            let saved = resource_table(&self.manifest);
            let place = saved.resources.iter().position(|one| {
                one.kind == resource.kind && one.backend.path.as_ref() == Some(path)
            });
            let fingerprint = self.manifest.resources.get(place?)?.fingerprint.as_ref()?;
            Some(fingerprint.size)
        };
        // QEMU counts sectors.
        found
            .or_else(at_the_save)
            .map(|len| len.next_multiple_of(512))
    }

    /// QEMU does not even start.
    fn refused(&self, words: &str) -> Finding {
        let told = explain(words).into_iter().next();
        let line = match &told {
            Some(told) => told.line.clone(),
            None => words.lines().last().unwrap_or("it says nothing").to_owned(),
        };
        let fact = format!(
            "QEMU {} does not start with the guest's arguments: {line}",
            self.qemu.version
        );
        let newer = || "--qemu PATH, naming the QEMU that saved it, or a newer one".to_owned();
        let fix = told.map_or_else(newer, |told| told.remedy);
        Finding::refusal("qemu.refuses", fact, fix)
    }
}

fn unknown(why: &str) -> Target {
    let fact = format!("what this QEMU would have was not compared: {why}");
    let fix = "--boot, which loads the guest on trial".to_owned();
    Target::Unknown(Finding::warning("target.unknown", fact, fix))
}

/// The bytes that a guest sees of a disk: a qcow2 file tells them in its header.
///
/// Source: QEMU `docs/interop/qcow2.rst`.
fn disk_len(path: &Path) -> Option<u64> {
    let mut file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    let mut header = [0; 32];
    match file.read_exact(&mut header) {
        Ok(()) if header.starts_with(b"QFI\xfb") => {
            let (_, size) = header.split_last_chunk::<8>()?;
            Some(u64::from_be_bytes(*size))
        }
        _ => Some(len).filter(|len| *len > 0),
    }
}

/// What QEMU has; `None` if its answers are not as we know them.
fn ask(probe: &mut Probe, place: &ProbePlace, has_tpm: bool) -> Result<Option<MachineState>> {
    let qmp = probe.qmp();
    qmp.set_timeout(PATIENCE);
    let Some(blocks) = qmp.ram_blocks()? else {
        return Ok(None);
    };
    let (cpus, max_vcpus) = (qmp.query_cpus()?, qmp.query_max_cpus()?);
    let cpu = match cpus.first() {
        Some(cpu) => qmp.query_cpu_features(&cpu.qom_path)?,
        None => Default::default(),
    };
    let path = place.path().join("state");
    let failed = |source| HostError::File {
        act: "write",
        path: path.clone(),
        source,
    };
    let file = File::create(&path).map_err(failed)?;
    qmp.save_device_state(file.as_fd(), false)?;
    let saved = fs::read(&path).map_err(failed)?;
    let Some(region) = writer::sections_behind_header(&saved) else {
        return Ok(None);
    };
    let accelerator = if qmp.query_kvm()? { "kvm" } else { "tcg" }.to_owned();
    Ok(Some(MachineState {
        machine_type: qmp.query_machine_type()?,
        accelerator,
        sections: likely_sections(region, StreamOffset(0))
            .into_iter()
            .map(section)
            .collect(),
        blocks: blocks
            .into_iter()
            .map(|block| Block {
                idstr: block.idstr,
                used_length: block.used_length,
                max_length: block.max_length,
            })
            .collect(),
        vcpus: count(cpus.len()),
        max_vcpus: max_vcpus.map(count),
        cpu: (!cpu.is_empty()).then_some(CpuFeatures(cpu)),
        has_tpm,
    }))
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn section(section: DeviceSection) -> Section {
    Section {
        idstr: section.idstr,
        instance_id: section.instance_id,
        version_id: section.version_id,
    }
}

/// What the guest was saved with, and the names of the parts of its state.
fn saved_state(
    manifest: &Manifest,
    opened: &OpenedImage,
) -> Result<(MachineState, BTreeSet<String>)> {
    let stream = manifest.stream.as_ref();
    let begins_at = stream.and_then(|stream| stream.device_state_at);
    let (start, region) = pipeline::device_region(opened.image(), begins_at)?;
    let sections = match stream.is_some_and(|stream| stream.vmdescription) {
        true => manifest
            .sections
            .iter()
            .map(|one| Section {
                idstr: one.idstr.clone(),
                instance_id: one.instance_id,
                version_id: one.version_id,
            })
            .collect(),
        // Without a description the manifest lists what is certain.
        false => likely_sections(&region, start)
            .into_iter()
            .map(section)
            .collect::<Vec<_>>(),
    };
    let machine = &manifest.machine;
    let blocks = manifest.ram_blocks.iter().map(|block| Block {
        idstr: block.idstr.clone(),
        used_length: block.used_length,
        max_length: block.used_length,
    });
    let features = &machine.cpu_features;
    let state = MachineState {
        machine_type: machine.machine_type.clone(),
        accelerator: machine.accelerator.clone(),
        blocks: blocks.collect(),
        vcpus: machine.vcpus,
        max_vcpus: machine.max_vcpus,
        cpu: (!features.is_empty()).then(|| CpuFeatures(features.clone())),
        has_tpm: sections.iter().any(|one| is_of_tpm(&one.idstr)),
        sections,
    };
    Ok((state, subsection_names(&region)))
}
