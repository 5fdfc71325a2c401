//! What is known of a guest: gathered before it is stopped, completed when its stream is whole.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::SaveError;
use super::places::places;
use crate::config::domain_xml::{DomainFacts, PciPlace, domain_xml};
use crate::config::mapped_memory;
use crate::config::resources::{BlockDevice, BlockFacts, BlockNode};
use crate::config::{
    self, Arguments, ConfigError, ResourceKind, ResourceTable, RestoreContext, restore_arguments,
};
use crate::container::manifest::{
    DeviceSection, Fingerprint, Guest, Machine, Manifest, Qemu, RamBlock, Resource, SideProgram,
    StreamSummary as StreamFacts, Tool,
};
use crate::error::Result;
use crate::host::{self, FileIdentity, ProcessFacts, ProcessId};
use crate::pipeline::PipelineError;
use crate::progress::Progress;
use crate::qmp::{QmpClient, QomProperty, RunState};
use crate::stream::StreamSummary;
use crate::supervise;

/// Everything about a guest that its image keeps besides its stream.
#[derive(Debug, Clone)]
pub struct Description {
    /// Its name, or the process's if it has none.
    pub name: String,
    /// Its UUID, if it has one.
    pub uuid: Option<Uuid>,
    /// Bytes of memory, hotplugged memory included.
    pub memory_bytes: u64,
    /// The resolved machine type.
    pub machine_type: String,
    /// QEMU's version: `10.0.2`.
    pub qemu_version: String,
    package: Option<String>,
    run_state: RunState,
    was_running: bool,
    vcpus: u32,
    max_vcpus: Option<u32>,
    /// As the manifest keeps them.
    cpu_features: BTreeMap<String, u32>,
    accelerator: String,
    process: ProcessFacts,
    arguments: Arguments,
    resources: ResourceTable,
    /// Ids of the devices that QEMU has now, of those that have one.
    device_ids: BTreeSet<String>,
    /// How many devices without an id QEMU has now; those that belong to the machine are not counted.
    unnamed_device_count: usize,
    /// Where QEMU put devices whose arguments leave that to it.
    places: BTreeMap<usize, PciPlace>,
    /// SHA-256 of QEMU's binary; `None` if it cannot be read.
    binary_sha256: Option<String>,
    /// The domain XML that it was started from, if it is a guest of ours that was started from one.
    own_xml: Option<String>,
    /// What works for it beside QEMU, if it is a guest of ours.
    side_programs: Vec<SideProgram>,
}

impl Description {
    /// Asks QEMU and the kernel. The guest does not notice.
    pub fn gather(
        qmp: &mut QmpClient,
        pid: i32,
        run_state: &RunState,
        was_running: bool,
    ) -> Result<Self> {
        let mut process = ProcessFacts::read(pid)?;
        let mut arguments = Arguments::parse(&process.argv)?;
        mapped_memory::unmap(&mut arguments);
        process.argv = arguments.write();
        let machine_type = qmp.query_machine_type()?;
        let mut resources = ResourceTable::from_arguments(&arguments, Some(&machine_type));
        resources.apply_block_facts(&block_facts(qmp)?);
        add_backing_files(qmp, &mut resources)?;
        let memory = qmp.query_memory_size()?;
        let version = qmp.version();
        let qemu_version = format!("{}.{}.{}", version.major, version.minor, version.micro);
        let package = Some(version.package.clone()).filter(|package| !package.is_empty());
        let device_ids = children(qmp, "/machine/peripheral")?;
        let unnamed_device_count = children(qmp, "/machine/peripheral-anon")?.len();
        let name = qmp.query_name()?.unwrap_or_else(|| format!("guest-{pid}"));
        let dir = supervise::directory_of(process.id);
        let side_programs = match &dir {
            Some(dir) => supervise::side_programs_of(dir)?,
            None => Vec::new(),
        };
        let places = places(qmp, &arguments)?;
        let (cpus, max_vcpus) = (qmp.query_cpus()?, qmp.query_max_cpus()?);
        let mut cpu_features = match cpus.first() {
            Some(cpu) => qmp.query_cpu_features(&cpu.qom_path)?,
            None => BTreeMap::new(),
        };
        cpu_features.retain(|_, bits| *bits != 0);
        Ok(Description {
            places,
            own_xml: dir.and_then(|dir| std::fs::read_to_string(dir.domain_xml()).ok()),
            side_programs: side_programs.iter().filter_map(kept_program).collect(),
            name,
            uuid: qmp.query_uuid()?,
            memory_bytes: memory.base_memory + memory.plugged_memory,
            machine_type,
            qemu_version,
            package,
            run_state: run_state.clone(),
            was_running,
            vcpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
            max_vcpus: max_vcpus.map(|count| u32::try_from(count).unwrap_or(u32::MAX)),
            cpu_features,
            accelerator: if qmp.query_kvm()? { "kvm" } else { "tcg" }.to_owned(),
            binary_sha256: digest_of_running(pid),
            process,
            arguments,
            resources,
            device_ids,
            unnamed_device_count,
        })
    }

    /// Its QEMU process.
    pub fn process(&self) -> ProcessId {
        self.process.id
    }

    /// The directory that its QEMU works in, from which its relative paths start.
    pub fn directory(&self) -> &Path {
        &self.process.cwd
    }

    /// Its resolved machine type.
    pub fn machine_type(&self) -> &str {
        &self.machine_type
    }

    /// Whether its QEMU has ended.
    pub fn is_gone(&self) -> bool {
        !self.process.id.is_alive()
    }

    /// Waits until its QEMU has ended; gives up quietly after `patience`.
    pub fn wait_until_gone(&self, patience: Duration) {
        if let Ok(handle) = self.process.id.open() {
            let _ = handle.wait_gone(patience);
        }
    }

    /// Whether it has devices whose state goes through a live section of their own, as memory does.
    pub fn has_live_devices(&self) -> bool {
        let mut devices = self.arguments.options("device");
        devices.any(|(_, device)| device.value().is_some_and(|it| it.contains("vfio")))
    }

    /// What of its arguments a restore could not use, each with the reason.
    pub fn not_restorable(&self) -> Vec<String> {
        let context = RestoreContext {
            machine_type: self.machine_type.clone(),
            qmp_socket: String::new(),
            log_dir: String::new(),
            name: self.name.clone(),
        };
        let mut reasons: Vec<String> = match restore_arguments(&self.arguments, &context, &[]) {
            Ok(_) => Vec::new(),
            Err(ConfigError::Refused { reasons }) => {
                reasons.iter().map(ToString::to_string).collect()
            }
            Err(other) => vec![other.to_string()],
        };
        reasons.extend(self.changed_devices());
        reasons.extend(self.changed_unnamed_devices());
        reasons.extend(self.foreign_media());
        reasons.extend(self.lost_files());
        reasons
    }

    /// Devices plugged in or out since QEMU was started: its arguments do not tell of them.
    fn changed_devices(&self) -> Vec<String> {
        let devices = self.arguments.options("device");
        let named: BTreeSet<String> = devices
            .filter_map(|(_, argument)| argument.properties().get("id"))
            .collect();
        // QEMU gives this id itself.
        let is_own = |id: &String| id == "debugcon" && self.arguments.has("debugcon");
        let plugged = self.device_ids.difference(&named).filter(|id| !is_own(id));
        let plugged = plugged.map(|id| format!("device {id:?} was plugged in after QEMU's start"));
        let unplugged = named.difference(&self.device_ids);
        let unplugged =
            unplugged.map(|id| format!("device {id:?} was unplugged after QEMU's start"));
        plugged.chain(unplugged).collect()
    }

    /// As [`Description::changed_devices`], of devices without an id, which can only be counted.
    ///
    /// Counted are machines of x86: on others a plain `-drive` may or may not make such a device.
    fn changed_unnamed_devices(&self) -> Option<String> {
        let is_x86 = ["pc", "isapc", "microvm"]
            .iter()
            .any(|name| self.machine_type.split('-').next() == Some(name));
        let named = unnamed_devices_of(&self.arguments);
        match self.unnamed_device_count.cmp(&named) {
            _ if !is_x86 => None,
            Ordering::Equal => None,
            Ordering::Greater => Some(format!(
                "{} device(s) without an id were plugged in after QEMU's start",
                self.unnamed_device_count - named
            )),
            Ordering::Less => Some(format!(
                "{} device(s) without an id were unplugged after QEMU's start",
                named - self.unnamed_device_count
            )),
        }
    }

    /// Files named by relative paths that start nowhere any more: `-daemonize` takes QEMU to another directory. QEMU
    /// itself cannot migrate a guest with such a disk.
    fn lost_files(&self) -> Vec<String> {
        use ResourceKind::{Cdrom, Disk, Floppy};
        let files = self.resources.resources.iter();
        let files = files.filter(|one| matches!(one.kind, Disk | Cdrom | Floppy));
        let paths = files.filter_map(|one| Some((one, Path::new(one.backend.path.as_ref()?))));
        let lost = paths.filter(|(_, path)| {
            path.is_relative()
                && !path.to_string_lossy().contains(':')
                && !self.process.cwd.join(path).exists()
        });
        let cwd = self.process.cwd.display();
        lost.map(|(one, path)| {
            let (kind, id, path) = (one.kind.word(), &one.id, path.display());
            format!("{kind} {id:?}: there is no {path} in {cwd}, where QEMU is; with -daemonize paths have to be absolute")
        })
        .collect()
    }

    /// The overlays among its disks that end with its QEMU.
    pub fn throwaway_disks(&self) -> Vec<PathBuf> {
        let paths = self.resources.resources.iter();
        let paths = paths.filter_map(|one| Some(self.process.cwd.join(one.backend.path.as_ref()?)));
        paths.filter(|path| host::is_throwaway(path)).collect()
    }

    /// Shares whose virtiofsd cannot hand over its state: QEMU meets that only when the guest is stopped already.
    pub fn mute_shares(&self) -> Vec<String> {
        let is_in_c = |program: &&SideProgram| {
            let mut words = program.argv.iter();
            words.any(|word| word.starts_with("source=")) && program.socket.ends_with(".virtiofs")
        };
        let mute = self.side_programs.iter().filter(is_in_c);
        mute.map(|program| {
            let (name, binary) = (&program.name, program.argv.first());
            format!(
                "share {name:?}: its virtiofsd ({}) cannot hand over its state; one of version 1.11 or later can, with QEMU 8.2 or later",
                binary.map_or("", String::as_str)
            )
        })
        .collect()
    }

    /// Media in drives that no argument names.
    fn foreign_media(&self) -> Vec<String> {
        let unnamed = self
            .resources
            .resources
            .iter()
            .filter(|one| one.argument.is_none() && one.kind != ResourceKind::Backing);
        let media = unnamed.filter_map(|one| Some((one, one.backend.path.as_ref()?)));
        media
            .map(|(one, path)| {
                let (kind, id) = (one.kind.word(), &one.id);
                format!("{kind} {id:?} holds {path}, and no argument of QEMU names that drive")
            })
            .collect()
    }

    /// Its libvirt domain XML.
    pub fn domain_xml(&self) -> String {
        if let Some(xml) = &self.own_xml {
            return xml.clone();
        }
        let facts = DomainFacts {
            name: self.name.clone(),
            uuid: self.uuid,
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            max_vcpus: self.max_vcpus.unwrap_or(self.vcpus),
            topology: None,
            machine_type: self.machine_type.clone(),
            accelerator: self.accelerator.clone(),
            emulator: self.process.exe.display().to_string(),
            directory: self.process.cwd.display().to_string(),
            places: self.places.clone(),
        };
        domain_xml(&self.arguments, &self.resources, &facts)
    }

    /// The manifest as far as it is known before the stream.
    ///
    /// With `runs_on` the guest goes on with its disks once it is saved.
    pub fn provisional(&self, labels: &BTreeMap<String, String>, runs_on: bool) -> Manifest {
        Manifest {
            schema: 1,
            tool: Tool {
                name: env!("CARGO_PKG_NAME").to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                other: Default::default(),
            },
            saved_at: now(),
            guest: Guest {
                name: self.name.clone(),
                uuid: self.uuid,
                run_state: self.run_state.to_string(),
                was_running: self.was_running,
                ran_on: self.was_running && runs_on,
                has_own_xml: self.own_xml.is_some(),
                other: Default::default(),
            },
            qemu: self.qemu(),
            machine: Machine {
                machine_type: self.machine_type.clone(),
                accelerator: self.accelerator.clone(),
                cpu_model: self.arguments.last_value("cpu").map(ToOwned::to_owned),
                vcpus: self.vcpus,
                max_vcpus: self.max_vcpus,
                cpu_features: self.cpu_features.clone(),
                memory_bytes: self.memory_bytes,
                other: Default::default(),
            },
            ram_blocks: Vec::new(),
            sections: Vec::new(),
            capabilities: Vec::new(),
            resources: self.resources.resources.iter().filter_map(kept).collect(),
            remaps: Vec::new(),
            libvirt_cookie: None,
            labels: labels.clone(),
            stream: None,
            other: Default::default(),
        }
    }

    fn qemu(&self) -> Qemu {
        Qemu {
            version: self.qemu_version.clone(),
            package: self.package.clone(),
            binary: self.process.exe.display().to_string(),
            binary_sha256: self.binary_sha256.clone(),
            argv: self.process.argv.clone(),
            cwd: self.process.cwd.display().to_string(),
            uid: self.process.uid,
            gid: self.process.gid,
            user: None,
            side_programs: self.side_programs.clone(),
            other: Default::default(),
        }
    }

    /// The whole manifest. Disks are looked at now, when QEMU has let go of them; with `digest_disks` they are read.
    pub fn complete(
        &self,
        mut manifest: Manifest,
        stream: &StreamSummary,
        capture: &str,
        digest_disks: bool,
        progress: &dyn Progress,
    ) -> Result<Manifest> {
        let blocks = stream.blocks.iter().map(|block| RamBlock {
            idstr: block.idstr.clone(),
            used_length: block.used_length,
            page_size: block.page_size,
            other: Default::default(),
        });
        manifest.ram_blocks = blocks.collect();
        let sections = stream.sections.iter().map(|section| DeviceSection {
            idstr: section.idstr.clone(),
            instance_id: section.instance_id,
            version_id: section.version_id,
            len: section.len,
            other: Default::default(),
        });
        manifest.sections = sections.collect();
        manifest.capabilities = stream.capabilities.clone();
        manifest.stream = Some(StreamFacts {
            len: stream.len,
            data_pages: stream.data_pages,
            zero_pages: stream.zero_pages,
            vmdescription: stream.vmdescription.is_some(),
            made_from: None,
            capture: Some(capture.to_owned()),
            device_state_at: Some(stream.device_state.0),
            other: Default::default(),
        });
        for resource in &mut manifest.resources {
            resource.fingerprint = self.fingerprint(resource, digest_disks, progress)?;
        }
        Ok(manifest)
    }

    /// By what the resource's file is recognised; `None` if it has none, or one that cannot be looked at.
    fn fingerprint(
        &self,
        resource: &Resource,
        with_digest: bool,
        progress: &dyn Progress,
    ) -> Result<Option<Fingerprint>> {
        let Some(Value::String(path)) = resource.backend.get("path") else {
            return Ok(None);
        };
        let path = self.process.cwd.join(path);
        if !path.is_file() {
            return Ok(None);
        }
        let Ok(identity) = FileIdentity::of(&path) else {
            return Ok(None);
        };
        let is_medium = matches!(
            resource.kind.as_str(),
            "disk" | "backing" | "cdrom" | "floppy" | "firmware"
        );
        let sha256 = if with_digest && is_medium {
            let digest = host::file_digest_while(&path, &|| !progress.is_cancelled());
            let digest = digest.map_err(|source| SaveError::Disk { path, source })?;
            Some(digest.ok_or(PipelineError::Cancelled)?.to_string())
        } else {
            None
        };
        Ok(Some(Fingerprint {
            device: identity.dev,
            inode: identity.inode,
            size: identity.len,
            mtime_ns: identity.mtime_ns,
            ctime_ns: identity.ctime_ns,
            sha256,
        }))
    }
}

/// The names of the devices below an object.
fn children(qmp: &mut QmpClient, path: &str) -> Result<BTreeSet<String>> {
    let is_child = |property: &QomProperty| property.type_name.starts_with("child<");
    let found = qmp.qom_list(path)?.into_iter();
    Ok(found.filter(is_child).map(|child| child.name).collect())
}

/// How many devices without an id QEMU makes from its arguments. Source: QEMU `softmmu/vl.c`, `blockdev.c`: whatever
/// becomes a `-device` option, which `-drive if=virtio` and `-virtfs` do.
fn unnamed_devices_of(arguments: &Arguments) -> usize {
    let with = |option: &str, key: &str, value: Option<&str>| {
        let all = arguments.options(option);
        all.filter(|(_, argument)| argument.properties().get(key).as_deref() == value)
            .count()
    };
    with("device", "id", None)
        + with("drive", "if", Some("virtio"))
        + arguments.options("virtfs").count()
}

/// Adds the files behind each disk's overlay.
fn add_backing_files(qmp: &mut QmpClient, resources: &mut ResourceTable) -> Result<()> {
    let mut found = Vec::new();
    for medium in qmp
        .query_block()?
        .into_iter()
        .filter_map(|device| device.inserted)
    {
        let path = Some(&medium.file);
        let disk = resources
            .resources
            .iter()
            .find(|one| one.backend.path.as_ref() == path);
        let first = medium.image.backing_image.as_deref();
        let chain = std::iter::successors(first, |image| image.backing_image.as_deref());
        for (number, image) in (1..).zip(chain) {
            let is_file = !image.filename.starts_with("json:") && !image.filename.contains("://");
            if let Some(disk) = disk.filter(|_| is_file) {
                found.push(config::Resource::backing(
                    disk,
                    number,
                    image.filename.clone(),
                ));
            }
        }
    }
    resources.resources.extend(found);
    Ok(())
}

fn block_facts(qmp: &mut QmpClient) -> Result<BlockFacts> {
    let node = |node: crate::qmp::BlockNode| BlockNode {
        node_name: node.node_name,
        file: node.file,
        drv: node.drv,
        ro: node.ro,
        backing_file: node.backing_file,
        chain: {
            let first = node.image.backing_image.as_deref();
            let chain = std::iter::successors(first, |image| image.backing_image.as_deref());
            chain.map(|image| image.filename.clone()).collect()
        },
    };
    let devices = qmp.query_block()?.into_iter().map(|device| BlockDevice {
        device: device.device,
        qdev: device.qdev,
        removable: device.removable,
        inserted: device.inserted.map(node),
    });
    let devices = devices.collect();
    Ok(BlockFacts {
        devices,
        nodes: qmp
            .query_named_block_nodes()?
            .into_iter()
            .map(node)
            .collect(),
    })
}

/// The time in whole seconds, in UTC: `2026-11-22T20:20:59Z`.
fn now() -> String {
    let now = jiff::Timestamp::now();
    now.round(jiff::Unit::Second).unwrap_or(now).to_string()
}

/// A resource as the manifest keeps it; both are the same JSON.
fn kept(resource: &config::Resource) -> Option<Resource> {
    serde_json::from_value(serde_json::to_value(resource).ok()?).ok()
}

/// A program beside QEMU as the manifest keeps it; both are the same JSON.
fn kept_program(program: &supervise::SideProgram) -> Option<SideProgram> {
    serde_json::from_value(serde_json::to_value(program).ok()?).ok()
}

/// The digest of the binary that a process runs, also when its file was replaced since.
fn digest_of_running(pid: i32) -> Option<String> {
    let digest = host::file_digest(Path::new(&format!("/proc/{pid}/exe"))).ok()?;
    Some(digest.to_string())
}
