//! PCI buses and which of their places are taken.

use std::collections::BTreeMap;

use crate::config::domain::address::PciAddress;
use crate::config::domain::controllers::PciModel;

/// What a device needs of the bus it sits on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connect {
    /// A conventional slot.
    Conventional,
    /// A slot of PCI Express; on a machine without, a conventional one.
    Express,
    /// The root bus of PCI Express, as function of a slot that others of its kind share.
    RootPort,
    /// The root bus, a slot of its own.
    Root,
    /// A conventional bus, for a bridge.
    Bridge,
    /// The bus behind an upstream port.
    Downstream,
}

/// Who sits at a place.
#[derive(Debug, Clone)]
pub(super) enum Occupant {
    /// A part of the machine itself.
    Machine(&'static str),
    /// The device of this line; 0 for one that was added.
    Line(u32),
}

/// One bus.
#[derive(Debug)]
pub(super) struct Bus {
    /// What makes it.
    pub(super) model: PciModel,
    /// For each slot its functions that are taken, a bit for each.
    slots: [u8; 32],
    /// Slots whose functions are shared by root ports.
    shared: [bool; 32],
}

/// All buses of a machine; bus `n` is made by the PCI controller with index `n`.
#[derive(Debug)]
pub(super) struct Buses {
    all: Vec<Bus>,
    occupants: BTreeMap<(u32, u32, u32), Occupant>,
    has_express: bool,
}

/// As many buses there can be.
pub(super) const MOST_BUSES: usize = 256;

impl Bus {
    fn new(model: PciModel) -> Self {
        Bus {
            model,
            slots: [0; 32],
            shared: [false; 32],
        }
    }

    /// The slots that devices may sit in.
    fn range(&self) -> std::ops::RangeInclusive<usize> {
        match self.model {
            PciModel::PcieRootPort | PciModel::PcieSwitchDownstreamPort => 0..=0,
            PciModel::PcieSwitchUpstreamPort
            | PciModel::DmiToPciBridge
            | PciModel::PcieExpanderBus
            | PciModel::PciExpanderBus => 0..=31,
            PciModel::PciRoot
            | PciModel::PcieRoot
            | PciModel::PciBridge
            | PciModel::PcieToPciBridge => 1..=31,
        }
    }

    /// Whether a device that says nothing else may be put here.
    fn accepts(&self, connect: Connect, has_express: bool) -> bool {
        let is_conventional = matches!(
            self.model,
            PciModel::PciRoot | PciModel::PciBridge | PciModel::PcieToPciBridge
        );
        let is_port = matches!(
            self.model,
            PciModel::PcieRootPort | PciModel::PcieSwitchDownstreamPort
        );
        match connect {
            Connect::Conventional => is_conventional,
            Connect::Express if has_express => is_port,
            Connect::Express => is_conventional,
            Connect::RootPort => self.model == PciModel::PcieRoot,
            Connect::Root => matches!(self.model, PciModel::PcieRoot | PciModel::PciRoot),
            Connect::Bridge => is_conventional || self.model == PciModel::DmiToPciBridge,
            Connect::Downstream => self.model == PciModel::PcieSwitchUpstreamPort,
        }
    }

    fn is_taken(&self, slot: usize) -> bool {
        self.slots.get(slot).is_none_or(|functions| *functions != 0)
    }

    fn free_slot(&self) -> Option<usize> {
        self.range().find(|slot| !self.is_taken(*slot))
    }

    /// The next function of a slot that root ports share, or function 0 of a free slot.
    fn free_function(&self) -> Option<(usize, u32)> {
        self.range().find_map(|slot| {
            let functions = *self.slots.get(slot)?;
            if functions == 0 {
                return Some((slot, 0));
            }
            let is_shared = *self.shared.get(slot)?;
            let free = functions.trailing_ones();
            (is_shared && free < 8).then_some((slot, free))
        })
    }
}

impl Buses {
    /// Buses without anything on them.
    pub(super) fn new(has_express: bool) -> Self {
        Buses {
            all: Vec::new(),
            occupants: BTreeMap::new(),
            has_express,
        }
    }

    /// Adds a bus.
    pub(super) fn add(&mut self, model: PciModel) {
        self.all.push(Bus::new(model));
    }

    /// As many as there are.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// What makes a bus.
    pub(super) fn model(&self, bus: usize) -> Option<PciModel> {
        self.all.get(bus).map(|bus| bus.model)
    }

    /// Whether a whole slot is free.
    pub(super) fn is_slot_free(&self, bus: u32, slot: u32) -> bool {
        let bus = self.all.get(bus as usize);
        bus.is_some_and(|bus| !bus.is_taken(slot as usize))
    }

    /// Whether a function of a slot is free.
    pub(super) fn is_function_free(&self, address: &PciAddress) -> bool {
        let key = (address.bus, address.slot, address.function);
        !self.occupants.contains_key(&key)
    }

    /// Takes a place; `Err` holds who sits there.
    pub(super) fn take(
        &mut self,
        address: &PciAddress,
        occupant: Occupant,
        is_shared: bool,
    ) -> Result<(), Occupant> {
        let key = (address.bus, address.slot, address.function);
        if let Some(other) = self.occupants.get(&key) {
            return Err(other.clone());
        }
        let Some(bus) = self.all.get_mut(address.bus as usize) else {
            return Ok(());
        };
        if let (Some(functions), Some(shared)) = (
            bus.slots.get_mut(address.slot as usize),
            bus.shared.get_mut(address.slot as usize),
        ) {
            *shared = is_shared && (*functions == 0 || *shared);
            *functions |= 1_u8.checked_shl(address.function).unwrap_or(0);
        }
        self.occupants.insert(key, occupant);
        Ok(())
    }

    /// The first place that a device may be put at.
    pub(super) fn free(&self, connect: Connect) -> Option<PciAddress> {
        let mut buses = (0..).zip(&self.all);
        buses.find_map(|(number, bus)| {
            if !bus.accepts(connect, self.has_express) {
                return None;
            }
            let (slot, function) = match connect {
                Connect::RootPort => bus.free_function()?,
                _ => (bus.free_slot()?, 0),
            };
            Some(PciAddress {
                domain: 0,
                bus: number,
                slot: u32::try_from(slot).ok()?,
                function,
                multifunction: None,
            })
        })
    }

    /// The buses that have to be added so that such a device has a place; `None` if none helps.
    ///
    /// A bridge to conventional PCI comes with a port to sit on.
    pub(super) fn wanted(&self, connect: Connect) -> Option<&'static [PciModel]> {
        match connect {
            _ if self.all.len() + 2 > MOST_BUSES => None,
            Connect::Conventional | Connect::Bridge if self.has_express => {
                Some(&[PciModel::PcieRootPort, PciModel::PcieToPciBridge])
            }
            Connect::Express if self.has_express => Some(&[PciModel::PcieRootPort]),
            Connect::Conventional | Connect::Bridge | Connect::Express => {
                Some(&[PciModel::PciBridge])
            }
            Connect::RootPort | Connect::Root | Connect::Downstream => None,
        }
    }
}
