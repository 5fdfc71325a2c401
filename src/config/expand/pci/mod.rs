//! PCI: controllers that are needed, and an address for every device.
//!
//! Addresses that stand in the domain are taken first, then those that chipsets have fixed, then all devices get the
//! first place of their kind, in the order of [`requests`](requests::requests). Where none is left a controller is added;
//! since controllers come first, all is done again with it until none is missing.

mod buses;
mod requests;

use std::collections::{BTreeMap, BTreeSet};

use super::edit::{add_device, device, problem, set_address, shown};
use super::knowledge::HostKnowledge;
use crate::config::ConfigError;
use crate::config::domain::address::{Address, PciAddress};
use crate::config::domain::controllers::{Controller, PciController, PciModel};
use crate::config::domain::{Domain, Problems, Word};
use crate::config::error::Unmodelled;
use crate::config::xml::{Document, Element};
use buses::{Buses, Connect, MOST_BUSES, Occupant};
use requests::{Request, Special, requests};

pub(super) fn place(
    document: &mut Document,
    domain: &Domain,
    _knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    if !domain.is_q35() && !domain.is_i440fx() {
        return;
    }
    if let Err(errors) = try_place(document, domain) {
        for error in errors {
            problems.error(error);
        }
    }
}

fn try_place(document: &mut Document, domain: &Domain) -> Result<(), Vec<Unmodelled>> {
    let mut domain = domain.clone();
    if add_between(document, &domain) {
        domain = reread(document)?;
    }
    let is_new = highest_index(&domain) == 0;
    let mut is_first = true;
    loop {
        let mut plan = Plan::new(&domain)?;
        plan.reserve()?;
        plan.fill(is_first)?;
        let missing = plan.missing();
        if missing.is_empty() && is_first {
            // Nothing is missing even with a place kept free: now without.
            is_first = false;
            continue;
        }
        if missing.is_empty() {
            plan.write(document);
            write_targets(document, &domain);
            return Ok(());
        }
        let mut wanted = missing;
        if is_new && is_first && domain.is_q35() && wanted.contains(&PciModel::PcieRootPort) {
            // One port stays empty, so that a device can be plugged later.
            wanted.push(PciModel::PcieRootPort);
        }
        is_first = false;
        let first = plan.buses.len() - plan.grown;
        for (index, model) in (first..).zip(wanted) {
            add_device(document, controller(index, model));
        }
        domain = reread(document)?;
    }
}

fn reread(document: &Document) -> Result<Domain, Vec<Unmodelled>> {
    match Domain::read(document) {
        Ok(reading) => Ok(reading.domain),
        Err(ConfigError::Unsupported { elements }) => Err(elements),
        Err(other) => Err(vec![problem("domain", 0, other.to_string(), None)]),
    }
}

fn pci_controllers(domain: &Domain) -> impl Iterator<Item = (usize, &Controller, &PciController)> {
    let controllers = domain.devices.controllers.iter().enumerate();
    controllers.filter_map(|(number, one)| Some((number, one, one.as_pci()?)))
}

fn highest_index(domain: &Domain) -> u32 {
    let indexes = pci_controllers(domain).filter_map(|(_, controller, _)| controller.index);
    indexes.max().unwrap_or(0)
}

/// A port or bridge for a bus that is written.
fn filler(domain: &Domain) -> PciModel {
    if domain.is_q35() {
        PciModel::PcieRootPort
    } else {
        PciModel::PciBridge
    }
}

/// Adds the controllers that are missing between those that are there; says whether there were any.
fn add_between(document: &mut Document, domain: &Domain) -> bool {
    let indexes: BTreeSet<u32> = pci_controllers(domain)
        .filter_map(|(_, controller, _)| controller.index)
        .collect();
    let highest = highest_index(domain);
    if highest as usize >= MOST_BUSES {
        return false;
    }
    let missing: Vec<u32> = (1..highest)
        .filter(|index| !indexes.contains(index))
        .collect();
    for index in &missing {
        add_device(document, controller(*index as usize, filler(domain)));
    }
    !missing.is_empty()
}

fn controller(index: usize, model: PciModel) -> Element {
    Element::new("controller")
        .attribute("type", "pci")
        .attribute("index", index)
        .attribute("model", model.word())
}

/// Who gets which place.
struct Plan<'a> {
    domain: &'a Domain,
    requests: Vec<Request<'a>>,
    buses: Buses,
    /// Request → address.
    given: BTreeMap<usize, PciAddress>,
    /// As many of the buses were added while places were given.
    grown: usize,
    errors: Vec<Unmodelled>,
}

impl<'a> Plan<'a> {
    fn new(domain: &'a Domain) -> Result<Self, Vec<Unmodelled>> {
        let mut buses = Buses::new(domain.is_q35());
        let mut by_index: BTreeMap<usize, (PciModel, u32)> = BTreeMap::new();
        let mut errors = Vec::new();
        for (_, controller, pci) in pci_controllers(domain) {
            let (Some(index), Some(model)) = (controller.index, pci.model) else {
                continue;
            };
            let info = &controller.info;
            let index = index as usize;
            let is_root = matches!(model, PciModel::PciRoot | PciModel::PcieRoot);
            if index >= MOST_BUSES || is_root != (index == 0) {
                let why = format!("index {index} is none for a {}", model.word());
                errors.push(problem(&info.path, info.line, why, None));
            }
            if let Some((_, line)) = by_index.insert(index, (model, info.line)) {
                let why = format!("PCI controller {index} is that of line {line} too");
                errors.push(problem(&info.path, info.line, why, None));
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let filler = filler(domain);
        let requests = requests(domain);
        let named = requests.iter().filter_map(|request| request.info.pci());
        let used = named.map(|address| address.bus as usize).max().unwrap_or(0);
        let highest = by_index.keys().copied().max().unwrap_or(0);
        let mut grown = 0;
        for index in 0..=highest.max(used) {
            match by_index.get(&index) {
                Some((model, _)) => buses.add(*model),
                None if index == 0 => buses.add(if domain.is_q35() {
                    PciModel::PcieRoot
                } else {
                    PciModel::PciRoot
                }),
                None => {
                    buses.add(filler);
                    grown += usize::from(index > highest);
                }
            }
        }
        Ok(Plan {
            domain,
            requests,
            buses,
            given: BTreeMap::new(),
            grown,
            errors,
        })
    }

    /// Takes the places that are not free: the machine's own, those that stand in the domain, those of chipsets.
    fn reserve(&mut self) -> Result<(), Vec<Unmodelled>> {
        let own: &[(u32, u32, &'static str)] = if self.domain.is_q35() {
            &[
                (0, 0, "host bridge"),
                (0x1f, 0, "LPC bridge"),
                (0x1f, 3, "SMBus controller"),
            ]
        } else {
            &[
                (0, 0, "host bridge"),
                (1, 0, "ISA bridge"),
                (1, 3, "power management controller"),
            ]
        };
        for (slot, function, name) in own {
            let address = at(*slot, *function);
            let _ = self.buses.take(&address, Occupant::Machine(name), false);
        }
        for (number, request) in self.requests.clone().iter().enumerate() {
            let Some(address) = request.info.pci() else {
                continue;
            };
            let info = request.info;
            let is_shared = request.connect == Connect::RootPort;
            if let Err(other) = self
                .buses
                .take(&address, Occupant::Line(info.line), is_shared)
            {
                let why = match other {
                    Occupant::Machine(name) => format!(
                        "PCI address {} is that of the machine's {name}",
                        shown(&address)
                    ),
                    Occupant::Line(line) => {
                        format!("PCI address {} is taken by line {line}", shown(&address))
                    }
                };
                self.errors.push(problem(&info.path, info.line, why, None));
            }
            self.check_slot(request, &address);
            self.given.insert(number, address);
        }
        if !self.errors.is_empty() {
            return Err(std::mem::take(&mut self.errors));
        }
        for number in 0..self.requests.len() {
            self.reserve_special(number);
        }
        if self.errors.is_empty() {
            return Ok(());
        }
        Err(std::mem::take(&mut self.errors))
    }

    /// A port has one slot, and slot 0 of a bridge is its own.
    fn check_slot(&mut self, request: &Request<'_>, address: &PciAddress) {
        let model = self.buses.model(address.bus as usize);
        let is_fine = match model {
            Some(PciModel::PcieRootPort | PciModel::PcieSwitchDownstreamPort) => address.slot == 0,
            Some(PciModel::PciBridge | PciModel::PcieToPciBridge) => address.slot != 0,
            _ => true,
        };
        if let (false, Some(model)) = (is_fine, model) {
            let info = request.info;
            let why = format!("slot {} does not exist on a {}", address.slot, model.word());
            self.errors.push(problem(&info.path, info.line, why, None));
        }
    }

    /// Gives a device the place that the chipset has for it.
    fn reserve_special(&mut self, number: usize) {
        let Some(request) = self.requests.get(number).copied() else {
            return;
        };
        let is_q35 = self.domain.is_q35();
        let fixed = match request.special {
            Special::Ide if !is_q35 => Some(at(1, 1)),
            Special::Sata if is_q35 => Some(at(0x1f, 2)),
            _ => None,
        };
        if let Some(fixed) = fixed {
            match self.given.get(&number) {
                Some(given)
                    if (given.bus, given.slot, given.function)
                        != (0, fixed.slot, fixed.function) =>
                {
                    let info = request.info;
                    let why = format!("the first controller of this type is at {}", shown(&fixed));
                    self.errors.push(problem(&info.path, info.line, why, None));
                }
                Some(_) => {}
                None => self.give_or_fail(number, fixed),
            }
            return;
        }
        if self.given.contains_key(&number) {
            return;
        }
        let wanted = match request.special {
            Special::Uhci if !is_q35 => vec![at(1, 2)],
            Special::Video if is_q35 => vec![at(1, 0)],
            Special::Video => vec![at(2, 0)],
            Special::Ich9Sound if is_q35 => vec![at(0x1b, 0)],
            Special::DmiBridge if is_q35 => vec![at(0x1e, 0)],
            Special::Ich9Usb(index, function) => self.ich9_places(index, function),
            _ => return,
        };
        let is_function = matches!(request.special, Special::Uhci | Special::Ich9Usb(..));
        let free = wanted.into_iter().find(|address| match is_function {
            true => self.buses.is_function_free(address),
            false => self.buses.is_slot_free(address.bus, address.slot),
        });
        let free = free.or_else(|| match request.special {
            Special::Video => self.buses.free(Connect::Root),
            _ => None,
        });
        if let Some(address) = free {
            self.give_or_fail(number, address);
        }
    }

    /// Where a function of an ICH9 USB controller may be: beside the others of its controller; else on q35 in one of two slots.
    fn ich9_places(&self, index: u32, function: u32) -> Vec<PciAddress> {
        let multifunction = (function == 0).then_some(true);
        let siblings = self.given.iter().find_map(|(number, address)| {
            let other = self.requests.get(*number)?;
            matches!(other.special, Special::Ich9Usb(other, _) if other == index)
                .then_some(*address)
        });
        match siblings {
            Some(sibling) => vec![PciAddress {
                function,
                multifunction,
                ..sibling
            }],
            None if self.domain.is_q35() => [0x1d, 0x1a]
                .into_iter()
                .filter(|slot| self.buses.is_slot_free(0, *slot))
                .map(|slot| PciAddress {
                    multifunction,
                    ..at(slot, function)
                })
                .collect(),
            None => Vec::new(),
        }
    }

    fn give_or_fail(&mut self, number: usize, address: PciAddress) {
        let Some(request) = self.requests.get(number).copied() else {
            return;
        };
        let is_shared = request.connect == Connect::RootPort;
        match self
            .buses
            .take(&address, Occupant::Line(request.info.line), is_shared)
        {
            Ok(()) => {
                self.given.insert(number, address);
            }
            Err(other) => {
                let by = match other {
                    Occupant::Machine(name) => format!("the machine's {name}"),
                    Occupant::Line(line) => format!("line {line}"),
                };
                let info = request.info;
                let why = format!(
                    "it has to be at PCI address {}, which is taken by {by}",
                    shown(&address)
                );
                self.errors.push(problem(&info.path, info.line, why, None));
            }
        }
    }

    /// Gives every other device a place, on buses that are added where none is left.
    fn fill(&mut self, is_first: bool) -> Result<(), Vec<Unmodelled>> {
        if is_first && !self.domain.is_q35() {
            // A place for a bridge that may come later.
            if let Some(address) = self.buses.free(Connect::Conventional) {
                let _ = self.buses.take(&address, Occupant::Line(0), false);
            }
        }
        for number in 0..self.requests.len() {
            if self.given.contains_key(&number) {
                continue;
            }
            let Some(request) = self.requests.get(number).copied() else {
                continue;
            };
            if let Special::Ich9Usb(index, function) = request.special
                && let Some(address) = self.ich9_places(index, function).first().copied()
            {
                self.give_or_fail(number, address);
                continue;
            }
            let Some(mut address) = self.free(request.connect) else {
                let info = request.info;
                let why = "there is no free place for it on the PCI buses";
                return Err(vec![problem(&info.path, info.line, why, None)]);
            };
            if let Special::Ich9Usb(_, function) = request.special {
                address.function = function;
            }
            self.give_or_fail(number, address);
        }
        if self.errors.is_empty() {
            return Ok(());
        }
        Err(std::mem::take(&mut self.errors))
    }

    fn free(&mut self, connect: Connect) -> Option<PciAddress> {
        loop {
            if let Some(address) = self.buses.free(connect) {
                return Some(address);
            }
            for model in self.buses.wanted(connect)? {
                if *model == PciModel::PcieToPciBridge {
                    // The port before it is its own.
                    let port = u32::try_from(self.buses.len()).ok()?.checked_sub(1)?;
                    let address = PciAddress {
                        bus: port,
                        ..at(0, 0)
                    };
                    let _ = self.buses.take(&address, Occupant::Line(0), false);
                }
                self.buses.add(*model);
                self.grown += 1;
            }
        }
    }

    /// The models of the buses that were added.
    fn missing(&self) -> Vec<PciModel> {
        let first = self.buses.len() - self.grown;
        (first..self.buses.len())
            .filter_map(|bus| self.buses.model(bus))
            .collect()
    }

    /// Whether other functions of its slot are taken.
    fn is_shared(&self, address: &PciAddress) -> bool {
        let mut others = self.given.values();
        others.any(|other| {
            (other.bus, other.slot) == (address.bus, address.slot)
                && other.function != address.function
        })
    }

    fn write(&self, document: &mut Document) {
        for (number, request) in self.requests.iter().enumerate() {
            if request.info.address.is_some() {
                continue;
            }
            let Some(mut address) = self.given.get(&number).copied() else {
                continue;
            };
            if request.connect == Connect::RootPort
                && address.function == 0
                && self.is_shared(&address)
            {
                address.multifunction = Some(true);
            }
            if let Some(element) = device(document, request.name, request.number) {
                set_address(element, &Address::Pci(address));
            }
        }
    }
}

fn at(slot: u32, function: u32) -> PciAddress {
    PciAddress {
        domain: 0,
        bus: 0,
        slot,
        function,
        multifunction: None,
    }
}

/// Chassis and ports: what a bridge or port tells the guest about itself.
fn write_targets(document: &mut Document, domain: &Domain) {
    let mut written = Vec::new();
    for (number, controller, pci) in pci_controllers(domain) {
        let (Some(index), Some(model)) = (controller.index, pci.model) else {
            continue;
        };
        written.push((number, index, model, pci.clone()));
    }
    for (number, index, model, pci) in written {
        let Some(element) = device(document, "controller", number) else {
            continue;
        };
        let address = element.find("address").cloned();
        let part = |name: &str| {
            let text = address.as_ref().and_then(|address| address.get(name))?;
            let digits = text.strip_prefix("0x");
            digits.map_or_else(
                || text.parse().ok(),
                |digits| u32::from_str_radix(digits, 16).ok(),
            )
        };
        let mut values: Vec<(&'static str, String)> = Vec::new();
        match model {
            PciModel::PciBridge if pci.chassis_nr.is_none() => {
                values.push(("chassisNr", index.to_string()))
            }
            PciModel::PcieRootPort | PciModel::PcieSwitchDownstreamPort => {
                if pci.chassis.is_none() {
                    values.push(("chassis", index.to_string()));
                }
                if pci.port.is_none() {
                    let slot = part("slot").unwrap_or(0);
                    let port = match model {
                        PciModel::PcieRootPort => slot * 8 + part("function").unwrap_or(0),
                        _ => slot,
                    };
                    values.push(("port", format!("{port:#x}")));
                }
            }
            _ => {}
        }
        if pci.device.is_none()
            && let Some(name) = device_name(model)
        {
            match element.find_mut("model") {
                Some(old) => old.set("name", name),
                None => element.insert(0, Element::new("model").attribute("name", name)),
            }
        }
        if values.is_empty() {
            continue;
        }
        if element.find("target").is_none() {
            let place = element
                .elements()
                .position(|child| child.name == "model")
                .map_or(0, |at| at + 1);
            element.insert(place, Element::new("target"));
        }
        if let Some(target) = element.find_mut("target") {
            for (name, value) in values {
                target.set(name, value);
            }
        }
    }
}

/// QEMU's device for a controller.
fn device_name(model: PciModel) -> Option<&'static str> {
    match model {
        PciModel::PciRoot | PciModel::PcieRoot => None,
        PciModel::PciBridge => Some("pci-bridge"),
        PciModel::DmiToPciBridge => Some("i82801b11-bridge"),
        PciModel::PcieToPciBridge => Some("pcie-pci-bridge"),
        PciModel::PcieRootPort => Some("pcie-root-port"),
        PciModel::PcieSwitchUpstreamPort => Some("x3130-upstream"),
        PciModel::PcieSwitchDownstreamPort => Some("xio3130-downstream"),
        PciModel::PciExpanderBus => Some("pxb"),
        PciModel::PcieExpanderBus => Some("pxb-pcie"),
    }
}
