//! QEMU's commands as methods, with the shapes of what they answer.
//!
//! Source: QEMU `qapi/run-state.json`, `machine.json`, `block-core.json`, `char.json`, `qom.json`, `misc.json`.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use uuid::Uuid;

use super::client::QmpClient;
use super::error::QmpError;
use super::name::qmp_names;

qmp_names! {
    /// What a guest is doing.
    ///
    /// Source: QEMU `qapi/run-state.json`, `RunState`.
    RunState {
        /// Stopped by a debugger.
        Debug = "debug",
        /// Waits for, or loads, an incoming migration.
        Inmigrate = "inmigrate",
        /// QEMU hit an error of its own.
        InternalError = "internal-error",
        /// A disk failed and the guest was stopped for it.
        IoError = "io-error",
        /// Stopped by `stop`.
        Paused = "paused",
        /// Stopped since a migration out of it completed; some failures leave it so too.
        Postmigrate = "postmigrate",
        /// Started with `-S` and never let run.
        Prelaunch = "prelaunch",
        /// In the last phase of a migration; transient.
        FinishMigrate = "finish-migrate",
        /// Loads a snapshot.
        RestoreVm = "restore-vm",
        /// Runs.
        Running = "running",
        /// Saves a snapshot.
        SaveVm = "save-vm",
        /// Has shut down and QEMU was told to stay.
        Shutdown = "shutdown",
        /// Sleeps (ACPI S3).
        Suspended = "suspended",
        /// Stopped by its watchdog.
        Watchdog = "watchdog",
        /// The guest's kernel panicked and told so.
        GuestPanicked = "guest-panicked",
        /// In a COLO pair.
        Colo = "colo",
        /// Before the machine is made; up to QEMU 7.
        Preconfig = "preconfig",
    }
}

/// One block node. Everything else is in `raw`.
///
/// Source: QEMU `qapi/block-core.json`, `BlockDeviceInfo`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name; `#block123` where QEMU chose it.
    #[serde(default)]
    pub node_name: String,
    /// Its driver: `qcow2`, `raw`, `file`, …
    pub drv: String,
    /// Its file as QEMU describes it: a path, or `json:{…}`, or a URL.
    pub file: String,
    /// Whether it is read-only.
    pub ro: bool,
    /// Whether it is active on this host; before QEMU 10 always `None`.
    #[serde(default)]
    pub active: Option<bool>,
    /// What its backing file is, if it has one.
    #[serde(default, rename = "backing_file")]
    pub backing_file: Option<String>,
    /// How many backing files stand behind it.
    #[serde(default, rename = "backing_file_depth")]
    pub backing_file_depth: u32,
    /// The image in it.
    pub image: NodeImage,
}

/// What QEMU knows of an image.
///
/// Source: QEMU `qapi/block-core.json`, `ImageInfo`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeImage {
    /// The file's name, without `json:` where it has a plain one.
    pub filename: String,
    /// The format.
    pub format: String,
    /// The size the guest sees, in bytes.
    pub virtual_size: u64,
    /// The backing file's name with the directory it is relative to, if there is one.
    #[serde(default)]
    pub full_backing_filename: Option<String>,
    /// The image behind it, if QEMU has one open.
    #[serde(default)]
    pub backing_image: Option<Box<NodeImage>>,
}

/// A device that can hold a medium.
///
/// Source: QEMU `qapi/block-core.json`, `BlockInfo`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockDevice {
    /// The name of `-drive id=`; empty if there is none.
    #[serde(default)]
    pub device: String,
    /// The device's id or QOM path; `None` while no device uses the drive.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether the medium can be taken out.
    #[serde(default)]
    pub removable: bool,
    /// Whether the guest locked its tray.
    #[serde(default)]
    pub locked: bool,
    /// Whether the tray is open; `None` without one.
    #[serde(default)]
    pub tray_open: Option<bool>,
    /// `ok`, `failed` or `nospace`; `None` if the device does not keep it.
    #[serde(default, rename = "io-status")]
    pub io_status: Option<String>,
    /// What is in it; `None` if it is empty.
    #[serde(default)]
    pub inserted: Option<InsertedMedium>,
}

/// The top node of what a device holds, with its chain of backing images behind it.
pub type InsertedMedium = BlockNode;

/// One character device's backend.
///
/// Source: QEMU `qapi/char.json`, `ChardevInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// Where it leads, as QEMU describes it: `pty:/dev/pts/3`, `unix:/run/x.sock,server=on`, …
    pub filename: String,
    /// Whether a device or monitor uses it.
    pub frontend_open: bool,
}

/// One virtual CPU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// Its index, from 0.
    pub cpu_index: u32,
    /// Its place in the object tree.
    pub qom_path: String,
    /// Its thread's id on this host.
    pub thread_id: i32,
    /// Socket, core and thread, as far as the machine has them.
    #[serde(default)]
    pub props: Value,
}

/// The guest's memory in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// What it started with.
    pub base_memory: u64,
    /// What was plugged in later.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// A machine type that a QEMU binary offers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// Its name: `pc-q35-10.0`.
    pub name: String,
    /// Another name for it: `q35`.
    #[serde(default)]
    pub alias: Option<String>,
    /// Whether it is taken when none is named.
    #[serde(default)]
    pub is_default: bool,
    /// The most CPUs it takes.
    pub cpu_max: u32,
    /// Whether QEMU warns that it will go.
    #[serde(default)]
    pub deprecated: bool,
    /// The RAMBlock name of its main memory.
    #[serde(default)]
    pub default_ram_id: Option<String>,
}

/// A property, or child, of an object.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct QomProperty {
    /// Its name.
    pub name: String,
    /// Its type: `string`, `child<e1000>`, `link<…>`, …
    #[serde(rename = "type")]
    pub type_name: String,
}

impl QmpClient {
    /// What the guest is doing.
    pub fn query_status(&mut self) -> Result<RunState, QmpError> {
        #[derive(Deserialize)]
        struct Status {
            status: RunState,
        }
        let status: Status = self.query("query-status")?;
        Ok(status.status)
    }

    /// Stops the guest's CPUs. A guest that does not run stays as it is.
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.order("stop", Value::Null)
    }

    /// Lets the guest's CPUs run.
    pub fn cont(&mut self) -> Result<(), QmpError> {
        self.order("cont", Value::Null)
    }

    /// Ends QEMU. That it hangs up before it answers is success.
    pub fn quit(&mut self) -> Result<(), QmpError> {
        match self.order("quit", Value::Null) {
            Err(QmpError::Disconnected) => Ok(()),
            outcome => outcome,
        }
    }

    /// Presses the guest's power button.
    pub fn system_powerdown(&mut self) -> Result<(), QmpError> {
        self.order("system_powerdown", Value::Null)
    }

    /// Gives QEMU a descriptor under a name, which must not begin with a digit.
    pub fn getfd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.execute_with_fd::<IgnoredAny>("getfd", arguments, fd)
            .map(|_| ())
    }

    /// Makes QEMU close a descriptor that it got by [`QmpClient::getfd`] and did not use.
    pub fn closefd(&mut self, name: &str) -> Result<(), QmpError> {
        self.order("closefd", json!({ "fdname": name }))
    }

    /// The guest's name (`-name`), if it has one.
    pub fn query_name(&mut self) -> Result<Option<String>, QmpError> {
        #[derive(Deserialize)]
        struct Name {
            name: Option<String>,
        }
        let name: Name = self.query("query-name")?;
        Ok(name.name)
    }

    /// The guest's UUID; `None` if it was given none, which QEMU tells as zeros.
    pub fn query_uuid(&mut self) -> Result<Option<Uuid>, QmpError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "UPPERCASE")]
        struct Answer {
            uuid: Uuid,
        }
        let answer: Answer = self.query("query-uuid")?;
        Ok(Some(answer.uuid).filter(|uuid| !uuid.is_nil()))
    }

    /// The resolved machine type, `pc-q35-10.0` for `q35`.
    pub fn query_machine_type(&mut self) -> Result<String, QmpError> {
        let name: String =
            self.execute("qom-get", json!({ "path": "/machine", "property": "type" }))?;
        Ok(name.strip_suffix("-machine").unwrap_or(&name).to_owned())
    }

    /// The virtual CPUs that are plugged in.
    pub fn query_cpus(&mut self) -> Result<Vec<Cpu>, QmpError> {
        self.query("query-cpus-fast")
    }

    /// How many virtual CPUs there can be; `None` if the machine cannot tell.
    pub fn query_max_cpus(&mut self) -> Result<Option<usize>, QmpError> {
        let slots: Result<Vec<IgnoredAny>, QmpError> = self.query("query-hotpluggable-cpus");
        match slots {
            Ok(slots) => Ok(Some(slots.len())),
            Err(QmpError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The feature bits that the CPU at this place in the object tree shows its guest, by leaf, subleaf and register:
    /// `0x7.0.ebx`. Empty for a CPU that is not x86.
    ///
    /// Source: QEMU `qapi/machine-target.json`, `X86CPUFeatureWordInfo`.
    pub fn query_cpu_features(
        &mut self,
        qom_path: &str,
    ) -> Result<BTreeMap<String, u32>, QmpError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Word {
            cpuid_input_eax: u32,
            #[serde(default)]
            cpuid_input_ecx: u32,
            cpuid_register: String,
            features: u32,
        }
        let arguments = json!({ "path": qom_path, "property": "feature-words" });
        let words: Vec<Word> = match self.execute("qom-get", arguments) {
            Err(QmpError::Refused { .. }) => return Ok(BTreeMap::new()),
            words => words?,
        };
        let words = words.into_iter().map(|word| {
            let register = word.cpuid_register.to_lowercase();
            let (leaf, subleaf) = (word.cpuid_input_eax, word.cpuid_input_ecx);
            (format!("{leaf:#x}.{subleaf:x}.{register}"), word.features)
        });
        Ok(words.collect())
    }

    /// How much memory the guest has.
    pub fn query_memory_size(&mut self) -> Result<MemorySize, QmpError> {
        self.query("query-memory-size-summary")
    }

    /// All block nodes of the guest, backing files among them.
    pub fn query_named_block_nodes(&mut self) -> Result<Vec<BlockNode>, QmpError> {
        self.execute("query-named-block-nodes", json!({ "flat": true }))
    }

    /// The devices that hold or can hold a medium.
    pub fn query_block(&mut self) -> Result<Vec<BlockDevice>, QmpError> {
        self.query("query-block")
    }

    /// The backends of all character devices.
    pub fn query_chardev(&mut self) -> Result<Vec<Chardev>, QmpError> {
        self.query("query-chardev")
    }

    /// Whether KVM runs the guest.
    pub fn query_kvm(&mut self) -> Result<bool, QmpError> {
        #[derive(Deserialize)]
        struct Kvm {
            enabled: bool,
        }
        let kvm: Kvm = self.query("query-kvm")?;
        Ok(kvm.enabled)
    }

    /// The machine types that this QEMU binary offers.
    pub fn query_machines(&mut self) -> Result<Vec<Machine>, QmpError> {
        self.query("query-machines")
    }

    /// The properties and children of an object.
    pub fn qom_list(&mut self, path: &str) -> Result<Vec<QomProperty>, QmpError> {
        self.execute("qom-list", json!({ "path": path }))
    }

    /// A property of an object.
    pub fn qom_get(&mut self, path: &str, property: &str) -> Result<Value, QmpError> {
        self.execute("qom-get", json!({ "path": path, "property": property }))
    }

    /// A command without arguments that answers something.
    pub(super) fn query<T: serde::de::DeserializeOwned>(
        &mut self,
        command: &str,
    ) -> Result<T, QmpError> {
        self.execute(command, Value::Null)
    }

    /// A command whose answer says nothing.
    pub(super) fn order(&mut self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute::<IgnoredAny>(command, arguments).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_states_have_the_names_of_qmp_and_unknown_ones_stay_what_they_are() {
        for name in ["running", "finish-migrate", "guest-panicked", "brand-new"] {
            let state: RunState = serde_json::from_value(json!(name)).unwrap();
            assert_eq!(state.as_str(), name);
            assert_eq!(serde_json::to_value(&state).unwrap(), json!(name));
        }
        assert_eq!(
            RunState::from("brand-new".to_owned()),
            RunState::Unknown("brand-new".to_owned())
        );
    }
}
