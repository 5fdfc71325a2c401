//! Hand-written domain XML → domain XML in which nothing is left to choose.
//!
//! In: a document and what is known of the host. Out: the document with everything filled in that libvirt and QEMU would
//! fill in (devices that are always there, controllers, addresses, aliases, firmware, CPU), and the domain read from it.
//! What stands in it already is kept, so expanding twice is the same as expanding once. Two devices at one address are an
//! error that names both lines.
//!
//! Source: observed behaviour of libvirt 11.3 (`virsh define`, `virsh dumpxml`).

mod aliases;
mod drives;
mod edit;
mod firmware;
mod implicit;
mod inherit;
mod knowledge;
mod machine;
mod modules;
mod pci;
mod ports;
mod usb;

use super::ConfigError;
use super::domain::{Domain, Problems};
use super::error::Unmodelled;
use super::xml::Document;

pub use inherit::expand_again;
pub use knowledge::{
    CpuExpansion, Firmware, FirmwareDescriptor, FirmwareFile, FirmwareMapping, FirmwareTarget,
    HostKnowledge,
};

/// A domain in which nothing is left to choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expanded {
    /// The document, everything filled in.
    pub document: Document,
    /// The domain, read from it.
    pub domain: Domain,
    /// What is left out without the guest being another one.
    pub warnings: Vec<Unmodelled>,
}

/// Fills in everything that a domain leaves open.
///
/// # Errors
/// [`ConfigError::Unsupported`] with everything that cannot be honoured: elements that are not modelled, values that make
/// no sense, addresses that are taken, firmware that no descriptor offers.
pub fn expand(document: &Document, knowledge: &HostKnowledge) -> Result<Expanded, ConfigError> {
    let mut document = document.clone();
    // Each step sees what the ones before it filled in.
    let steps: [Step; 8] = [
        machine::resolve,
        firmware::choose,
        implicit::add,
        drives::place,
        ports::place,
        modules::place,
        pci::place,
        usb::place,
    ];
    let reading = Domain::read(&document)?;
    let warnings = reading.warnings;
    let mut domain = reading.domain;
    for step in steps {
        let mut problems = Problems::default();
        step(&mut document, &domain, knowledge, &mut problems);
        if !problems.errors.is_empty() {
            return Err(ConfigError::Unsupported {
                elements: problems.errors,
            });
        }
        domain = Domain::read(&document)?.domain;
    }
    aliases::name(&mut document, &domain)?;
    document.root.tidy();
    let domain = Domain::read(&document)?.domain;
    Ok(Expanded {
        document,
        domain,
        warnings,
    })
}

type Step = fn(&mut Document, &Domain, &HostKnowledge, &mut Problems);

#[cfg(test)]
mod tests;
