//! `firmware='efi'`: which files that means, by firmware descriptors.

use super::edit::{child, problem};
use super::knowledge::{
    Firmware, FirmwareDescriptor, FirmwareFile, FirmwareMapping, HostKnowledge,
};
use crate::config::domain::os::{FirmwareFormat, FirmwareKind, LoaderType};
use crate::config::domain::{Domain, Problems, Word};
use crate::config::xml::{Document, Element};

pub(super) fn choose(
    document: &mut Document,
    domain: &Domain,
    knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    let os = &domain.os;
    let loader_path = os.loader.as_ref().and_then(|loader| loader.path.as_ref());
    if let Some(kind) = os.firmware
        && loader_path.is_none()
    {
        if kind == FirmwareKind::Bios {
            return;
        }
        let mut against = Vec::new();
        let mut candidates = knowledge.firmware.iter();
        let found = candidates.find(|firmware| match mismatch(domain, firmware) {
            None => true,
            Some(why) => {
                against.push(format!("{}: {why}", firmware.path));
                false
            }
        });
        match found {
            Some(firmware) => write(document, domain, &firmware.descriptor),
            None => {
                let why = if against.is_empty() {
                    "no firmware descriptor is known".to_owned()
                } else {
                    format!("no firmware descriptor fits: {}", against.join("; "))
                };
                let try_ = "install OVMF, or name the files with <loader> and <nvram>";
                problems.error(problem("domain/os/@firmware", os.line, why, Some(try_)));
                return;
            }
        }
    } else if let (Some(path), Some(nvram)) = (loader_path, &os.nvram)
        && nvram.template.is_none()
        && nvram.path.is_none()
    {
        // The template that belongs to the loader.
        let template =
            knowledge
                .firmware
                .iter()
                .find_map(|firmware| match &firmware.descriptor.mapping {
                    FirmwareMapping::Flash {
                        executable,
                        nvram_template,
                        ..
                    } if executable.filename == *path => nvram_template.clone(),
                    _ => None,
                });
        if let Some(template) = template {
            write_nvram(document, domain, &template);
        }
    }
    name_nvram(document, domain, knowledge, problems);
}

/// Why this firmware is not what the domain asks for.
fn mismatch(domain: &Domain, firmware: &Firmware) -> Option<String> {
    let descriptor = &firmware.descriptor;
    let os = &domain.os;
    if !descriptor.interface_types.iter().any(|one| one == "uefi") {
        return Some("it is no UEFI".to_owned());
    }
    let machine = os.machine.as_deref().unwrap_or_default();
    let is_target = descriptor.targets.iter().any(|target| {
        target.architecture == "x86_64"
            && target
                .machines
                .iter()
                .any(|pattern| is_match(pattern, machine))
    });
    if !is_target {
        return Some(format!("it is not for {machine}"));
    }
    let has = |name: &str| descriptor.features.iter().any(|feature| feature == name);
    for feature in &os.firmware_features {
        if has(&feature.name) != feature.enabled {
            let word = if feature.enabled { "lacks" } else { "has" };
            return Some(format!("it {word} {}", feature.name));
        }
    }
    let loader = os.loader.as_ref();
    let secure = loader.and_then(|loader| loader.secure);
    if secure.is_some_and(|secure| secure != has("secure-boot")) {
        let word = if secure == Some(true) { "lacks" } else { "has" };
        return Some(format!("it {word} secure-boot"));
    }
    if has("requires-smm") && (domain.features.smm == Some(false) || !domain.is_q35()) {
        return Some("it needs SMM".to_owned());
    }
    let wanted = loader.and_then(|loader| loader.format);
    match &descriptor.mapping {
        FirmwareMapping::Flash {
            mode,
            executable,
            nvram_template,
        } => {
            if loader.is_some_and(|loader| loader.kind == Some(LoaderType::Rom)) {
                return Some("it is flash, no ROM".to_owned());
            }
            let is_stateless = mode.as_deref() == Some("stateless");
            if mode.as_deref() == Some("combined") {
                return Some("its code and variables are one file".to_owned());
            }
            let stateless = loader.and_then(|loader| loader.stateless);
            if is_stateless != (stateless == Some(true)) {
                return Some("it keeps state otherwise than asked for".to_owned());
            }
            if !is_stateless && nvram_template.is_none() {
                return Some("it has no template for its variables".to_owned());
            }
            let format = FirmwareFormat::from_word(&executable.format);
            let default = wanted.unwrap_or(FirmwareFormat::Raw);
            if format != Some(default) {
                return Some(format!("its format is {}", executable.format));
            }
            None
        }
        FirmwareMapping::Memory { .. } => {
            let is_rom = loader.is_some_and(|loader| loader.kind == Some(LoaderType::Rom));
            (!is_rom).then(|| "it is a ROM, no flash".to_owned())
        }
        FirmwareMapping::Kernel { .. } | FirmwareMapping::Other => {
            Some("it gets into the guest in another way".to_owned())
        }
    }
}

/// Whether a name follows a pattern in which `*` is anything.
fn is_match(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    true
}

/// Writes the files where libvirt would.
fn write(document: &mut Document, domain: &Domain, descriptor: &FirmwareDescriptor) {
    let has = |name: &str| descriptor.features.iter().any(|feature| feature == name);
    let needs_smm = has("requires-smm");
    let Some(os) = document.root.find_mut("os") else {
        return;
    };
    if os.find("loader").is_none() {
        let place = os
            .elements()
            .position(|child| child.name == "type")
            .map_or(0, |at| at + 1);
        os.insert(place, Element::new("loader"));
    }
    let Some(loader) = os.find_mut("loader") else {
        return;
    };
    match &descriptor.mapping {
        FirmwareMapping::Flash {
            executable,
            nvram_template,
            ..
        } => {
            loader.set("readonly", "yes");
            if needs_smm {
                loader.set("secure", "yes");
            }
            loader.set("type", "pflash");
            loader.set("format", &executable.format);
            loader.set_text(&executable.filename);
            if let Some(template) = nvram_template {
                write_nvram(document, domain, template);
            }
        }
        FirmwareMapping::Memory { filename } => {
            loader.set("type", "rom");
            loader.set_text(filename);
        }
        FirmwareMapping::Kernel { .. } | FirmwareMapping::Other => {}
    }
    if needs_smm
        && let Some(features) = child(&mut document.root, "features")
        && features.find("smm").is_none()
    {
        features.push(Element::new("smm").attribute("state", "on"));
    }
}

fn write_nvram(document: &mut Document, domain: &Domain, template: &FirmwareFile) {
    let Some(os) = document.root.find_mut("os") else {
        return;
    };
    let is_there = domain.os.nvram.as_ref();
    if is_there.is_some_and(|nvram| nvram.template.is_some()) {
        return;
    }
    if os.find("nvram").is_none() {
        let place = os
            .elements()
            .position(|child| child.name == "loader")
            .map_or(0, |at| at + 1);
        os.insert(place, Element::new("nvram"));
    }
    if let Some(nvram) = os.find_mut("nvram") {
        nvram.set("template", &template.filename);
        nvram.set("templateFormat", &template.format);
        if nvram.get("format").is_none() {
            nvram.set("format", &template.format);
        }
    }
}

/// Variables that have no file get one.
fn name_nvram(
    document: &mut Document,
    domain: &Domain,
    knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    let Some(nvram) = document
        .root
        .find_mut("os")
        .and_then(|os| os.find_mut("nvram"))
    else {
        return;
    };
    let has_source = nvram.find("source").is_some();
    if has_source || !nvram.text().is_empty() {
        return;
    }
    let Some(directory) = &knowledge.nvram_directory else {
        return;
    };
    if domain.name.contains('/') || domain.name == ".." {
        let why = "a name with a slash cannot be the name of an NVRAM file";
        problems.error(problem(
            "domain/name",
            domain.line,
            why,
            Some("name the file in <nvram>"),
        ));
        return;
    }
    let extension = if nvram.get("format") == Some("qcow2") {
        "qcow2"
    } else {
        "fd"
    };
    let path = format!(
        "{}/{}_VARS.{extension}",
        directory.trim_end_matches('/'),
        domain.name
    );
    nvram.set_text(path);
}
