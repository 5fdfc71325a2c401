//! What expansion needs to know of the host: plain data, gathered by the caller.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is known of the host that a domain is expanded for. Whatever is not known is left as it stands in the domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostKnowledge {
    /// Alias of a machine type → the machine type: `q35` → `pc-q35-10.0`.
    pub machine_aliases: BTreeMap<String, String>,
    /// The machine type where the domain names none; `pc` without it.
    pub default_machine: Option<String>,
    /// The emulator where the domain names none.
    pub default_emulator: Option<String>,
    /// Firmware descriptors, the most wanted first.
    pub firmware: Vec<Firmware>,
    /// The directory for NVRAM files that have no path: `NAME_VARS.fd` in it.
    pub nvram_directory: Option<String>,
    /// What `host-model` stands for.
    pub host_model: Option<CpuExpansion>,
    /// What `host-passthrough` stands for.
    pub host_passthrough: Option<CpuExpansion>,
    /// What `maximum` stands for.
    pub maximum: Option<CpuExpansion>,
}

/// A CPU as QMP `query-cpu-model-expansion` tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuExpansion {
    /// The model.
    pub model: String,
    /// The vendor, by CPUID's name.
    pub vendor: Option<String>,
    /// Features by QEMU's name, and whether they are on.
    pub features: Vec<(String, bool)>,
}

/// A firmware descriptor with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firmware {
    /// Its path, for messages.
    pub path: String,
    /// What it says.
    pub descriptor: FirmwareDescriptor,
}

/// A firmware descriptor: one JSON file in the firmware directory.
///
/// Source: QEMU `docs/interop/firmware.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FirmwareDescriptor {
    /// `bios`, `uefi`, ….
    pub interface_types: Vec<String>,
    /// How it gets into the guest.
    pub mapping: FirmwareMapping,
    /// For which machines it is.
    pub targets: Vec<FirmwareTarget>,
    /// `secure-boot`, `enrolled-keys`, `requires-smm`, ….
    #[serde(default)]
    pub features: Vec<String>,
}

/// How firmware gets into the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "device", rename_all = "kebab-case")]
pub enum FirmwareMapping {
    /// As flash.
    #[serde(rename_all = "kebab-case")]
    Flash {
        /// `split`, `stateless` or `combined`; split without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<String>,
        /// The code.
        executable: FirmwareFile,
        /// What the variables start from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nvram_template: Option<FirmwareFile>,
    },
    /// As a BIOS.
    Memory {
        /// The file.
        filename: String,
    },
    /// As a kernel.
    Kernel {
        /// The file.
        filename: String,
    },
    /// In a way that is not known.
    #[serde(other)]
    Other,
}

/// A file of firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareFile {
    /// Its path.
    pub filename: String,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// For which machines firmware is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareTarget {
    /// `x86_64`.
    pub architecture: String,
    /// Patterns: `pc-q35-*`.
    pub machines: Vec<String>,
}
