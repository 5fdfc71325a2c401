//! Memory modules in their slots.

use std::collections::BTreeMap;

use super::edit::{device, problem, set_address};
use super::knowledge::HostKnowledge;
use crate::config::domain::address::{Address, DimmAddress};
use crate::config::domain::memory::MemoryModel;
use crate::config::domain::{Domain, Problems};
use crate::config::xml::Document;

pub(super) fn place(
    document: &mut Document,
    domain: &Domain,
    _knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    let slots = domain.memory.max.map_or(0, |max| max.slots);
    let modules = domain.devices.memory_modules.iter().enumerate();
    let modules: Vec<_> = modules
        .filter(|(_, module)| matches!(module.model, MemoryModel::Dimm | MemoryModel::Nvdimm))
        .collect();
    let mut taken: BTreeMap<u32, u32> = BTreeMap::new();
    for (_, module) in &modules {
        let info = &module.info;
        let Some(slot) = info.dimm().and_then(|address| address.slot) else {
            continue;
        };
        if let Some(line) = taken.insert(slot, info.line) {
            let why = format!("slot {slot} is taken by line {line}");
            problems.error(problem(&info.path, info.line, why, None));
        }
    }
    for (number, module) in &modules {
        let info = &module.info;
        let given = info.dimm();
        if given.is_some_and(|address| address.slot.is_some()) {
            continue;
        }
        let Some(slot) = (0..slots).find(|slot| !taken.contains_key(slot)) else {
            let why = format!("there is no free slot for it, of {slots}");
            let try_ = "give the domain more: <maxMemory slots='16' unit='GiB'>64</maxMemory>";
            problems.error(problem(&info.path, info.line, why, Some(try_)));
            continue;
        };
        taken.insert(slot, info.line);
        let base = given.and_then(|address| address.base);
        let address = DimmAddress {
            slot: Some(slot),
            base,
        };
        if let Some(element) = device(document, "memory", *number) {
            set_address(element, &Address::Dimm(address));
        }
    }
}
