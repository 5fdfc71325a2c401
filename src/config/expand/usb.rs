//! USB devices on the ports of controllers and hubs.

use std::collections::BTreeSet;

use super::edit::{add_device, device, problem, set_address};
use super::knowledge::HostKnowledge;
use crate::config::ConfigError;
use crate::config::domain::address::{Address, UsbAddress};
use crate::config::domain::chardevs::SerialTarget;
use crate::config::domain::controllers::{ControllerKind, UsbModel};
use crate::config::domain::disks::{DiskBus, in_order};
use crate::config::domain::hostdevs::HostdevSource;
use crate::config::domain::sound::SoundModel;
use crate::config::domain::usb_devices::InputBus;
use crate::config::domain::{DeviceInfo, Domain, Problems};
use crate::config::xml::{Document, Element};

/// As many ports a hub has.
const HUB_PORTS: u32 = 8;
/// As many hubs can stand one behind the other, with the controller's own.
const MOST_LEVELS: usize = 4;

pub(super) fn place(
    document: &mut Document,
    domain: &Domain,
    _knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    let with_hubs = match add_hubs(document, domain) {
        Some(Ok(reading)) => Some(reading),
        Some(Err(_)) | None => None,
    };
    let domain = with_hubs.as_ref().unwrap_or(domain);
    let devices = usb_devices(domain);
    let mut tree = Tree::new(domain);
    for one in &devices {
        let info = one.info;
        match &info.address {
            Some(Address::Usb(address)) if !address.port.is_empty() => {
                if let Err(why) = tree.take(address) {
                    problems.error(problem(&info.path, info.line, why, None));
                }
            }
            Some(Address::Usb(_)) | None => {}
            Some(_) => {
                let why = "a USB device needs an address of type usb";
                problems.error(problem(&info.path, info.line, why, None));
            }
        }
    }
    for one in devices {
        let info = one.info;
        let bus = info.usb().map(|address| address.bus);
        if info.address.is_some() && info.usb().is_none_or(|address| !address.port.is_empty()) {
            continue;
        }
        let Some(address) = tree.free(bus) else {
            let why = "there is no free USB port for it";
            let try_ = "add a USB controller or a hub";
            problems.error(problem(&info.path, info.line, why, Some(try_)));
            continue;
        };
        if let Err(why) = tree.take(&address) {
            problems.error(problem(&info.path, info.line, why, None));
        }
        if one.name == "hub" {
            tree.hubs.insert((address.bus, address.port.clone()));
        }
        if let Some(element) = device(document, one.name, one.number) {
            set_address(element, &Address::Usb(address));
        }
    }
}

/// Hubs for the devices that controllers have no ports for.
fn add_hubs(document: &mut Document, domain: &Domain) -> Option<Result<Domain, ConfigError>> {
    let is_open = |info: &DeviceInfo| info.usb().is_none_or(|address| address.port.is_empty());
    let devices = usb_devices(domain);
    if !devices.iter().any(|one| is_open(one.info)) {
        return None;
    }
    let tree = Tree::new(domain);
    let hubs = u32::try_from(domain.devices.hubs.len()).ok()?;
    let ports: u32 = tree
        .controllers
        .iter()
        .map(|(_, ports)| *ports)
        .sum::<u32>()
        + hubs * HUB_PORTS;
    let count = u32::try_from(devices.len()).ok()?;
    if count <= ports || tree.controllers.is_empty() {
        return None;
    }
    for _ in 0..(count - ports + 1).div_ceil(HUB_PORTS - 1) {
        add_device(document, Element::new("hub").attribute("type", "usb"));
    }
    Some(Domain::read(document).map(|reading| reading.domain))
}

struct UsbDevice<'a> {
    name: &'static str,
    number: usize,
    info: &'a DeviceInfo,
}

/// Every USB device, in the order in which ports are given.
fn usb_devices(domain: &Domain) -> Vec<UsbDevice<'_>> {
    let mut all = Vec::new();
    let devices = &domain.devices;
    let mut push = |name, number, info| all.push(UsbDevice { name, number, info });
    for (number, hub) in devices.hubs.iter().enumerate() {
        push("hub", number, &hub.info);
    }
    for (number, hostdev) in devices.hostdevs.iter().enumerate() {
        if matches!(hostdev.source, HostdevSource::Usb { .. }) {
            push("hostdev", number, &hostdev.info);
        }
    }
    for number in in_order(&devices.disks) {
        if let Some(disk) = devices.disks.get(number)
            && disk.bus == Some(DiskBus::Usb)
        {
            push("disk", number, &disk.info);
        }
    }
    for (number, controller) in devices.controllers.iter().enumerate() {
        if matches!(controller.kind, ControllerKind::Ccid) {
            push("controller", number, &controller.info);
        }
    }
    for (number, input) in devices.inputs.iter().enumerate() {
        if input.bus == Some(InputBus::Usb) {
            push("input", number, &input.info);
        }
    }
    for (number, serial) in devices.serials.iter().enumerate() {
        if serial.target == Some(SerialTarget::Usb) {
            push("serial", number, &serial.device.info);
        }
    }
    for (number, sound) in devices.sounds.iter().enumerate() {
        if sound.model == SoundModel::Usb {
            push("sound", number, &sound.info);
        }
    }
    for (number, redirected) in devices.redirected.iter().enumerate() {
        push("redirdev", number, &redirected.info);
    }
    all
}

/// Controllers, hubs, and which of their ports are taken.
struct Tree {
    /// Index and number of ports.
    controllers: Vec<(u32, u32)>,
    hubs: BTreeSet<(u32, Vec<u32>)>,
    taken: BTreeSet<(u32, Vec<u32>)>,
}

impl Tree {
    fn new(domain: &Domain) -> Self {
        let mut controllers: Vec<(u32, u32)> = Vec::new();
        for controller in &domain.devices.controllers {
            let ControllerKind::Usb {
                model,
                ports,
                master,
            } = controller.kind
            else {
                continue;
            };
            let index = controller.index.unwrap_or(0);
            let ports = match model {
                // A companion has the ports of its master.
                _ if master.is_some() => continue,
                Some(UsbModel::None) => continue,
                Some(UsbModel::NecXhci | UsbModel::QemuXhci) => ports.unwrap_or(4),
                Some(UsbModel::Ehci | UsbModel::Ich9Ehci1) => 6,
                Some(UsbModel::PciOhci) => 3,
                _ => 2,
            };
            controllers.push((index, ports));
        }
        controllers.sort_unstable();
        controllers.dedup_by_key(|(index, _)| *index);
        let hubs = domain.devices.hubs.iter().filter_map(|hub| hub.info.usb());
        let hubs = hubs
            .filter(|address| !address.port.is_empty())
            .map(|address| (address.bus, address.port.clone()))
            .collect();
        Tree {
            controllers,
            hubs,
            taken: BTreeSet::new(),
        }
    }

    fn take(&mut self, address: &UsbAddress) -> Result<(), String> {
        let Some((_, ports)) = self
            .controllers
            .iter()
            .find(|(index, _)| *index == address.bus)
        else {
            return Err(format!("there is no USB controller {}", address.bus));
        };
        let mut on = Vec::new();
        for (level, port) in address.port.iter().enumerate() {
            let most = if level == 0 { *ports } else { HUB_PORTS };
            if level > 0 && !self.hubs.contains(&(address.bus, on.clone())) {
                return Err(format!(
                    "there is no USB hub before port {}",
                    address.port_name()
                ));
            }
            if *port > most {
                return Err(format!(
                    "port {} does not exist, there are {most}",
                    address.port_name()
                ));
            }
            on.push(*port);
        }
        if !self.taken.insert((address.bus, on)) {
            return Err(format!(
                "port {} of USB controller {} is taken",
                address.port_name(),
                address.bus
            ));
        }
        Ok(())
    }

    /// The first free port, of controllers before those of hubs.
    fn free(&self, bus: Option<u32>) -> Option<UsbAddress> {
        let mut controllers = self.controllers.iter();
        controllers.find_map(|(index, ports)| {
            if bus.is_some_and(|bus| bus != *index) {
                return None;
            }
            let port = self.free_port(*index, &[], *ports)?;
            Some(UsbAddress { bus: *index, port })
        })
    }

    fn free_port(&self, bus: u32, on: &[u32], ports: u32) -> Option<Vec<u32>> {
        if on.len() >= MOST_LEVELS {
            return None;
        }
        let port = |number: u32| [on, &[number]].concat();
        let own = (1..=ports)
            .map(port)
            .find(|port| !self.taken.contains(&(bus, port.clone())));
        own.or_else(|| {
            let mut hubs = (1..=ports)
                .map(port)
                .filter(|port| self.hubs.contains(&(bus, port.clone())));
            hubs.find_map(|hub| self.free_port(bus, &hub, HUB_PORTS))
        })
    }
}
