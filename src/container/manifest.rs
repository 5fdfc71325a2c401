//! The manifest: what a restore needs to know about the guest, its QEMU and its host, as JSON.
//!
//! Members this version does not know are kept where a manifest is read and written again. The manifest in `HEAD` is
//! *provisional*: what is known only at the end of the save is left out of it.
//!
//! Source: spec/container.md §10, spec/manifest.schema.json.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The schema this program writes, and the only one it reads.
pub const SCHEMA: u32 = 1;

/// Members of an object that this version does not know.
pub type Other = Map<String, Value>;

/// All of `MANI`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The program that wrote it.
    pub tool: Tool,
    /// When the save began, RFC 3339 with an offset.
    pub saved_at: String,
    /// Who was saved.
    pub guest: Guest,
    /// The program that ran the guest.
    pub qemu: Qemu,
    /// What kind of machine the guest saw.
    pub machine: Machine,
    /// Named blocks of guest memory, in stream order; empty in a provisional manifest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ram_blocks: Vec<RamBlock>,
    /// Every device section of the stream, in stream order; empty in a provisional manifest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sections: Vec<DeviceSection>,
    /// Migration capabilities that were on, under QEMU's names.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// What the guest uses of its host.
    #[serde(default)]
    pub resources: Vec<Resource>,
    /// Other backends for the resources, chosen since the save, each as `vmstow restore --remap` takes it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remaps: Vec<String>,
    /// The user's own words about the image.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The cookie of the libvirt save image that this one was made from, as it stood there: XML, with the CPU that the guest
    /// really had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub libvirt_cookie: Option<String>,
    /// What the stream holds; absent in a provisional manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamSummary>,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// The program that wrote an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// `vmstow`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// Who was saved, and in which state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Its name; empty if QEMU was given none.
    pub name: String,
    /// As the guest sees it in SMBIOS; absent if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<uuid::Uuid>,
    /// QMP's name for the run state before the save: `running`, `paused`, ….
    pub run_state: String,
    /// Whether a restore lets it run.
    pub was_running: bool,
    /// Whether it ran on after the moment that the image shows: its disks, unless it could only read them, went on without
    /// the image.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ran_on: bool,
    /// Whether the domain XML is what the guest was started from, and not made from its arguments.
    #[serde(default, skip_serializing_if = "is_false")]
    pub has_own_xml: bool,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// The QEMU process that ran the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Qemu {
    /// `major.minor.micro`.
    pub version: String,
    /// The distribution's own addition to the version, as QMP `query-version` gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// Path of the program.
    pub binary: String,
    /// SHA-256 of the program, 64 hexadecimal digits, if it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary_sha256: Option<String>,
    /// Its argument vector, the program's own name first.
    pub argv: Vec<String>,
    /// Its working directory.
    pub cwd: String,
    /// The user it ran as.
    pub uid: u32,
    /// The group it ran as.
    pub gid: u32,
    /// That user's name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What worked for the guest beside QEMU and is started anew with it: the emulator of its TPM, for instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub side_programs: Vec<SideProgram>,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// A program that worked for the guest beside QEMU, which was connected to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SideProgram {
    /// What it was for: `tpm0`.
    pub name: String,
    /// The program and its arguments, `socket` and `state` in them as they stand here.
    pub argv: Vec<String>,
    /// The unix socket on which it listened, which the argument vector of QEMU names too.
    pub socket: String,
    /// The directory of what it keeps, if it keeps anything. The stream holds all of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// What kind of machine the guest saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The resolved machine type, never an alias: `pc-q35-9.2`.
    #[serde(rename = "type")]
    pub machine_type: String,
    /// `kvm`, `tcg`, ….
    pub accelerator: String,
    /// The CPU model, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// CPUs that were present.
    pub vcpus: u32,
    /// CPUs that could be plugged, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// The feature bits that a CPU showed its guest, by leaf, subleaf and register of CPUID: `0x7.0.ebx`. Words without any
    /// are left out; empty if they were not asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cpu_features: BTreeMap<String, u32>,
    /// Bytes of base memory.
    pub memory_bytes: u64,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// A named block of guest memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RamBlock {
    /// QEMU's name for it.
    pub idstr: String,
    /// Bytes in use.
    pub used_length: u64,
    /// Bytes of a host page behind it.
    pub page_size: u64,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// A device section of the stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceSection {
    /// QEMU's name for it.
    pub idstr: String,
    /// Which of several of that name.
    pub instance_id: u32,
    /// Version of its state.
    pub version_id: u32,
    /// Bytes in the stream, if they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len: Option<u64>,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// Something of its host that the guest uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resource {
    /// `disk`, `cdrom`, `nic`, `chardev`, `share`, `firmware`, `tpm`.
    pub kind: String,
    /// The name a `--remap` uses.
    pub id: String,
    /// What the guest sees, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontend: Option<Value>,
    /// What lies behind it on the host, as QEMU names it.
    #[serde(default)]
    pub backend: Map<String, Value>,
    /// Whether the guest cannot change it.
    #[serde(default)]
    pub read_only: bool,
    /// How to recognise it; absent if it is no file, and in a provisional manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

/// By what a file is recognised; all but `sha256` equal means unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Of all its bytes, 64 hexadecimal digits, if it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// What the stream holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamSummary {
    /// Bytes.
    pub len: u64,
    /// Page records with bytes.
    pub data_pages: u64,
    /// Page records without.
    pub zero_pages: u64,
    /// Whether the JSON about the device sections follows them.
    pub vmdescription: bool,
    /// `migration`: QEMU wrote the stream. `memory`: it was made from the memory of QEMU and its device state. `live`: QEMU
    /// wrote it while the guest ran on. Absent if that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<String>,
    /// Where in the stream the device state begins, in bytes. Absent in images of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_state_at: Option<u64>,
    /// The image digest of the image that this one was made from, if that had another stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_from: Option<String>,
    /// Members this version does not know.
    #[serde(flatten)]
    pub other: Other,
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Manifest {
    /// The JSON that goes into `MANI` or `HEAD`: indented, with an LF at the end.
    ///
    /// # Errors
    /// None that is known: every value here can be written.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }

    /// Parses the JSON of `MANI` or `HEAD`. The schema is not judged.
    ///
    /// # Errors
    /// What is wrong with the JSON, with its line and column.
    pub fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }
}
