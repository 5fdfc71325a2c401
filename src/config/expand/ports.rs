//! Channels and consoles on virtio-serial controllers, smartcards on their readers.

use std::collections::{BTreeMap, BTreeSet};

use super::drives::add_controllers;
use super::edit::{device, problem, set_address};
use super::knowledge::HostKnowledge;
use crate::config::domain::address::{Address, CcidAddress, VirtioSerialAddress};
use crate::config::domain::chardevs::{ChannelTarget, ConsoleTarget};
use crate::config::domain::controllers::{ControllerKind, ControllerType};
use crate::config::domain::{DeviceInfo, Domain, Problems};
use crate::config::xml::Document;

/// As many ports a virtio-serial controller has if nothing else is said.
const DEFAULT_PORTS: u32 = 31;

pub(super) fn place(
    document: &mut Document,
    domain: &Domain,
    _knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    place_virtio(document, domain, problems);
    place_smartcards(document, domain, problems);
}

/// A port of virtio-serial in the document.
struct Port<'a> {
    name: &'static str,
    number: usize,
    info: &'a DeviceInfo,
    /// Port 0 is kept for consoles.
    first: u32,
}

fn place_virtio(document: &mut Document, domain: &Domain, problems: &mut Problems) {
    let channels = domain.devices.channels.iter().enumerate();
    let channels = channels
        .filter(|(_, channel)| matches!(channel.target, ChannelTarget::Virtio { .. }))
        .map(|(number, channel)| Port {
            name: "channel",
            number,
            info: &channel.device.info,
            first: 1,
        });
    let consoles = domain.devices.consoles.iter().enumerate();
    let consoles = consoles
        .filter(|(_, console)| console.target == Some(ConsoleTarget::Virtio))
        .map(|(number, console)| Port {
            name: "console",
            number,
            info: &console.device.info,
            first: 0,
        });
    let ports: Vec<Port<'_>> = channels.chain(consoles).collect();
    if ports.is_empty() {
        return;
    }
    let mut taken: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    for port in &ports {
        let info = port.info;
        match info.address {
            Some(Address::VirtioSerial(address)) => {
                let Some(number) = address.port.filter(|number| *number >= port.first) else {
                    continue;
                };
                if let Some(line) = taken.insert((address.controller, number), info.line) {
                    let why = format!(
                        "port {number} of virtio-serial controller {} is taken by line {line}",
                        address.controller
                    );
                    problems.error(problem(&info.path, info.line, why, None));
                }
            }
            Some(_) => {
                let why = "it needs an address of type virtio-serial";
                problems.error(problem(&info.path, info.line, why, None));
            }
            None => {}
        }
    }
    let mut most = 0;
    let mut next: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    for port in &ports {
        let given = port.info.virtio_serial();
        let controller = given.map(|address| address.controller);
        most = most.max(controller.unwrap_or(0));
        if given
            .and_then(|address| address.port)
            .is_some_and(|number| number >= port.first)
        {
            continue;
        }
        let mut index = controller.unwrap_or(0);
        let address = loop {
            let from = next
                .get(&(index, port.first))
                .copied()
                .unwrap_or(port.first);
            let free = (from..ports_of(domain, index))
                .find(|number| !taken.contains_key(&(index, *number)));
            match free {
                Some(number) => {
                    next.insert((index, port.first), number + 1);
                    break Some((index, number));
                }
                None if controller.is_some() => break None,
                None => index += 1,
            }
        };
        let Some((index, number)) = address else {
            let why = format!("virtio-serial controller {index} has no free port");
            problems.error(problem(&port.info.path, port.info.line, why, None));
            continue;
        };
        taken.insert((index, number), port.info.line);
        most = most.max(index);
        let address = VirtioSerialAddress {
            controller: index,
            bus: 0,
            port: Some(number),
        };
        if let Some(element) = device(document, port.name, port.number) {
            set_address(element, &Address::VirtioSerial(address));
        }
    }
    add_controllers(
        document,
        domain,
        ControllerType::VirtioSerial,
        most,
        problems,
    );
}

fn ports_of(domain: &Domain, index: u32) -> u32 {
    let mut controllers = domain.devices.controllers.iter();
    let ports = controllers.find_map(|controller| match controller.kind {
        ControllerKind::VirtioSerial { ports, .. } if controller.index == Some(index) => {
            Some(ports)
        }
        _ => None,
    });
    ports.flatten().unwrap_or(DEFAULT_PORTS)
}

/// A reader has one slot.
fn place_smartcards(document: &mut Document, domain: &Domain, problems: &mut Problems) {
    let mut taken: BTreeSet<u32> = BTreeSet::new();
    let cards = &domain.devices.smartcards;
    for card in cards {
        let info = &card.info;
        match info.address {
            Some(Address::Ccid(address)) => {
                let is_free = taken.insert(address.controller);
                if !is_free {
                    let why = format!("smartcard reader {} is taken", address.controller);
                    problems.error(problem(&info.path, info.line, why, None));
                }
            }
            Some(_) => {
                let why = "it needs an address of type ccid";
                problems.error(problem(&info.path, info.line, why, None));
            }
            None => {}
        }
    }
    for (number, card) in cards.iter().enumerate() {
        if card.info.address.is_some() {
            continue;
        }
        let free = (0..).find(|index| !taken.contains(index)).unwrap_or(0);
        taken.insert(free);
        let address = CcidAddress {
            controller: free,
            slot: 0,
        };
        if let Some(element) = device(document, "smartcard", number) {
            set_address(element, &Address::Ccid(address));
        }
    }
    if let Some(most) = taken.last() {
        add_controllers(document, domain, ControllerType::Ccid, *most, problems);
    }
}
