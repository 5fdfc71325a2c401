//! The virtual machine as data.
//!
//! In: the argument vector of a QEMU process, what QMP said about it, facts about a host. Out: the arguments that bring
//! the guest back, the table of the host resources it uses, its libvirt domain XML, and every reason why a host cannot
//! run it. Pure: no file, process, clock or environment is touched here.
//!
//! | file | what it is for |
//! |---|---|
//! | [`arguments`] [`properties`] | an argument vector ⇄ a typed sequence that loses nothing |
//! | [`resources`] [`paths`] | the host resources in it, corrected by QMP; every path it names |
//! | [`foreign`] | what of them reaches beyond the guest |
//! | [`remap`] | other backends for those resources |
//! | [`settings`] | what a user always wants: `config.toml` |
//! | [`overlay`] | arguments in which the guest writes to throwaway overlays |
//! | [`isolate`](mod@isolate) | arguments that any number of guests can be started with at once |
//! | [`inert`](mod@inert) | arguments of a QEMU that has the guest's devices and touches nothing of the host |
//! | [`restore_arguments`](mod@restore_arguments) | kept arguments → restore arguments |
//! | [`guest_physical`] | where RAMBlocks lie in guest-physical memory |
//! | [`mapped_memory`] | guest RAM as a private mapping of an image, and the way back |
//! | [`domain_xml`](mod@domain_xml) | arguments → libvirt domain XML; the name and UUID in somebody's XML |
//! | [`xml`] | XML ⇄ a tree that loses nothing |
//! | [`domain`] | domain XML → typed values, with all that is not modelled |
//! | [`expand`](mod@expand) | hand-written domain XML → domain XML in which nothing is left to choose |
//! | [`abi`] | two domain XMLs compared: what of the difference the guest would see |
//! | [`command_line`](mod@command_line) | expanded domain → QEMU's arguments |
//! | [`passt`] | user networks that are played beside QEMU |
//! | [`postcopy`] | what forbids that a guest runs before its memory is there |
//! | [`explain`](mod@explain) | what QEMU and libvirt say when a guest does not load, in other words |
//! | [`compat`] | (guest, host) → every reason it cannot run |

pub mod abi;
pub mod arguments;
pub mod command_line;
pub mod compat;
pub mod domain;
pub mod domain_xml;
pub mod expand;
pub mod explain;
pub mod foreign;
pub mod guest_physical;
pub mod inert;
pub mod isolate;
pub mod mapped_memory;
pub mod overlay;
pub mod passt;
pub mod paths;
pub mod postcopy;
pub mod properties;
pub mod remap;
pub mod resources;
pub mod restore_arguments;
pub mod settings;
pub mod xml;

mod error;

pub use arguments::{Argument, Arguments};
pub use command_line::{CommandContext, CommandLine, command_line};
pub use domain_xml::{DomainFacts, Identity, domain_xml, read_identity};
pub use error::{ConfigError, Reason, Unmodelled};
pub use explain::{Explanation, explain};
pub use inert::inert;
pub use isolate::{Isolated, isolate};
pub use remap::Remap;
pub use resources::{Resource, ResourceKind, ResourceTable};
pub use restore_arguments::{RestoreContext, restore_arguments};
pub use settings::Settings;
