//! The machine itself: its type by its full name, its emulator, its CPU as a model with features.

use super::edit::{child, devices, problem};
use super::knowledge::{CpuExpansion, HostKnowledge};
use crate::config::domain::cpu::{CpuMode, FeaturePolicy};
use crate::config::domain::{Domain, Problems};
use crate::config::xml::{Document, Element};

pub(super) fn resolve(
    document: &mut Document,
    domain: &Domain,
    knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    let os = &domain.os;
    let line = document
        .root
        .at(&["os", "type"])
        .map_or(os.line, |kind| kind.line);
    if os.arch.as_deref().is_some_and(|arch| arch != "x86_64") {
        let why = format!(
            "architecture {:?} cannot be run, only x86_64",
            os.arch.as_deref().unwrap_or_default()
        );
        problems.error(problem("domain/os/type/@arch", line, why, None));
        return;
    }
    let default = knowledge.default_machine.as_deref().unwrap_or("pc");
    let machine = os.machine.as_deref().unwrap_or(default);
    let resolved = knowledge
        .machine_aliases
        .get(machine)
        .map_or(machine, String::as_str);
    if !is_known(resolved) {
        let why = format!("machine type {resolved} is neither of the i440fx nor of the q35 family");
        problems.error(problem("domain/os/type/@machine", line, why, None));
        return;
    }
    if let Some(kind) = document
        .root
        .find_mut("os")
        .and_then(|os| os.find_mut("type"))
    {
        if kind.get("arch").is_none() {
            kind.set("arch", "x86_64");
        }
        kind.set("machine", resolved);
    }
    let emulator = domain
        .devices
        .emulator
        .is_none()
        .then_some(knowledge.default_emulator.as_ref());
    if let Some(devices) = devices(document)
        && let Some(Some(emulator)) = emulator
    {
        devices.insert(0, Element::with_text("emulator", emulator));
    }
    resolve_cpu(document, domain, knowledge);
}

fn is_known(machine: &str) -> bool {
    let families = ["pc-i440fx-", "pc-q35-", "pc-0.", "pc-1."];
    let is_alias = matches!(machine, "pc" | "q35");
    is_alias || families.iter().any(|family| machine.starts_with(family))
}

/// A mode that stands for whatever the host has becomes the model that it stands for here.
fn resolve_cpu(document: &mut Document, domain: &Domain, knowledge: &HostKnowledge) {
    let Some(cpu) = &domain.cpu else {
        return;
    };
    let expansion = match cpu.mode {
        Some(CpuMode::HostModel) => &knowledge.host_model,
        Some(CpuMode::HostPassthrough) => &knowledge.host_passthrough,
        Some(CpuMode::Maximum) => &knowledge.maximum,
        Some(CpuMode::Custom) | None => return,
    };
    let Some(expansion) = expansion else {
        return;
    };
    // What was asked for beside the mode wins over what the host has.
    let asked: Vec<(&str, FeaturePolicy)> = cpu
        .features
        .iter()
        .map(|feature| (feature.name.as_str(), feature.policy))
        .collect();
    if let Some(element) = child(&mut document.root, "cpu") {
        write_cpu(element, expansion, &asked);
    }
}

fn write_cpu(element: &mut Element, expansion: &CpuExpansion, asked: &[(&str, FeaturePolicy)]) {
    element.set("mode", "custom");
    element.set("match", "exact");
    element.set("check", "none");
    element.unset("migratable");
    element.remove(|child| matches!(&*child.name, "model" | "vendor"));
    let model = Element::with_text("model", &expansion.model).attribute("fallback", "forbid");
    element.insert(0, model);
    if let Some(vendor) = &expansion.vendor {
        element.insert(1, Element::with_text("vendor", vendor_name(vendor)));
    }
    let spelling = |name: &str| name.replace('_', "-");
    for (name, is_on) in &expansion.features {
        if asked
            .iter()
            .any(|(other, _)| spelling(other) == spelling(name))
        {
            continue;
        }
        let policy = if *is_on { "require" } else { "disable" };
        let feature = Element::new("feature")
            .attribute("policy", policy)
            .attribute("name", name);
        element.push(feature);
    }
}

/// libvirt's name of a vendor.
fn vendor_name(cpuid: &str) -> &str {
    match cpuid {
        "GenuineIntel" => "Intel",
        "AuthenticAMD" => "AMD",
        "HygonGenuine" => "Hygon",
        other => other,
    }
}
