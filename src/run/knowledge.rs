//! What of this host a domain is expanded with.

use std::path::Path;

use serde_json::Value;

use crate::config::domain::cpu::CpuMode;
use crate::config::domain::{Domain, DomainType};
use crate::config::expand::{CpuExpansion, Firmware, HostKnowledge};
use crate::error::Result;
use crate::host::{self, Lasting, QemuFacts};

/// What is known of this host and of the QEMU that will run the domain. Without a QEMU, as where the command is only
/// printed and there is none, aliases of machine types and modes of CPUs stay what they are. With `is_look` the modes do so too
/// where that QEMU cannot tell, since it lacks KVM here for instance.
///
/// # Errors
/// [`HostError`](crate::host::HostError) if that QEMU does not tell what the host's CPU is, and the domain asks for it.
pub fn gather(
    domain: &Domain,
    qemu: Option<&QemuFacts>,
    emulator: &Path,
    is_look: bool,
) -> Result<HostKnowledge> {
    let mut knowledge = HostKnowledge {
        default_emulator: Some(emulator.display().to_string()),
        firmware: firmware(),
        nvram_directory: Lasting::find()
            .ok()
            .map(|it| it.nvram_dir().display().to_string()),
        ..HostKnowledge::default()
    };
    let Some(qemu) = qemu else {
        return Ok(knowledge);
    };
    let aliases = qemu.machines.iter();
    let aliases = aliases.filter_map(|it| Some((it.name.clone(), it.alias_of.clone()?)));
    knowledge.machine_aliases = aliases.collect();
    let mode = domain.cpu.as_ref().and_then(|cpu| cpu.mode);
    if matches!(mode, None | Some(CpuMode::Custom)) {
        return Ok(knowledge);
    }
    let expansion = match cpu(qemu, domain.kind) {
        Ok(expansion) => Some(expansion),
        Err(_) if is_look => None,
        Err(error) => return Err(error),
    };
    match mode {
        Some(CpuMode::HostModel) => knowledge.host_model = expansion,
        Some(CpuMode::HostPassthrough) => knowledge.host_passthrough = expansion,
        _ => knowledge.maximum = expansion,
    }
    Ok(knowledge)
}

/// The firmware descriptors of this host; one that makes no sense counts for nothing, as with libvirt.
fn firmware() -> Vec<Firmware> {
    let found = host::firmware_descriptors().into_iter();
    let parsed = found.filter_map(|one| {
        Some(Firmware {
            path: one.path.display().to_string(),
            descriptor: serde_json::from_str(&one.text).ok()?,
        })
    });
    parsed.collect()
}

/// All that a guest can have here, feature by feature: of this host's CPU with KVM, of QEMU's own with TCG.
///
/// The model itself stays the one that takes whatever the host has. What it has is said one by one, what it lacks too, so
/// that the guest finds the same elsewhere, or QEMU says what is missing there.
fn cpu(qemu: &QemuFacts, kind: DomainType) -> Result<CpuExpansion> {
    let (accelerator, model) = match kind {
        DomainType::Kvm => ("kvm", "host"),
        DomainType::Qemu => ("tcg", "max"),
    };
    let expansion = host::expand_cpu(&qemu.path, accelerator, "static", model)?;
    let vendor = expansion.props.get("vendor").and_then(Value::as_str);
    let features = expansion.props.iter();
    let features = features.filter_map(|(name, value)| Some((name.clone(), value.as_bool()?)));
    Ok(CpuExpansion {
        model: model.to_owned(),
        vendor: vendor.map(str::to_owned),
        features: features.collect(),
    })
}
