//! The expanded domain as QEMU's arguments.
//!
//! In: a [`Domain`] in which nothing is left to choose, and where and as what it is started. Out: the arguments, what has
//! to run beside QEMU, what QEMU is told before the guest runs, and what is not as the domain says. An element that cannot
//! be honoured is an error that names it and its line; all of them are told at once.
//!
//! Devices, block nodes, objects and network backends are JSON objects, each device with its bus and address, so that the
//! order of arguments decides nothing. RAMBlocks and device ids are named as libvirt names them: a stream that libvirt
//! saved loads, and the other way round.
//!
//! | file | what it makes |
//! |---|---|
//! | `machine` `cpu` `memory` `clock` `boot` | the machine |
//! | `controllers` `disks` `disk_nodes` `interfaces` `chardevs` `displays` `sound` `usb_devices` `shares` `hostdevs` `stores` `platform` | devices and what stands behind them |
//! | `line` `json` | how arguments are put together |
//!
//! Source: QEMU's documentation of its options; observed behaviour of libvirt 11.3 with QEMU 10.0.

mod boot;
mod chardevs;
mod clock;
mod controllers;
mod cpu;
mod disk_nodes;
mod disks;
mod displays;
mod hostdevs;
mod interfaces;
mod json;
mod line;
mod machine;
mod memory;
mod platform;
mod shares;
mod sound;
mod stores;
mod usb_devices;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::arguments::Arguments;
use super::domain::commandline::PropertyType;
use super::domain::{Domain, DomainType, PropertyOverride};
use super::error::{ConfigError, Unmodelled};
use super::properties::escape;
use super::restore_arguments;
use line::Line;

pub use shares::virtiofsd_of;

/// Where and as what a guest is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandContext {
    /// The QEMU to run; the domain's `<emulator>` without it.
    pub emulator: Option<String>,
    /// The guest's name; the domain's own without it.
    pub name: Option<String>,
    /// The guest's runtime directory: for logs that stand in for terminals, and for sockets that have no path.
    pub directory: String,
    /// Path of the QMP socket that QEMU shall make.
    pub qmp_socket: String,
    /// The directory for what outlives a run and has no path of its own: a TPM's state.
    pub state_directory: String,
    /// The directory for memory that shall be in a file; QEMU makes the file and removes its name at once.
    pub memory_directory: String,
    /// The program that plays a TPM.
    pub swtpm: String,
    /// The program that shares directories, where the domain does not name it.
    pub virtiofsd: String,
    /// The programs among those that share directories which take the options of the virtiofsd in C.
    pub virtiofsds_in_c: BTreeSet<String>,
    /// The program that plays a user network, where the domain asks for it.
    pub passt: String,
    /// Whether QEMU and what works beside it run as root.
    pub is_root: bool,
    /// The first port for displays that shall choose one themselves.
    pub first_display_port: u16,
    /// The clock, in seconds since 1970.
    pub now: i64,
    /// What local time is ahead of UTC, in seconds.
    pub utc_offset: i64,
    /// Whether what reaches past the model is used: `<qemu:commandline>` and `<qemu:override>`.
    pub is_trusted: bool,
}

impl CommandContext {
    /// A guest whose files are in `directory`, everything else as it is where nobody said otherwise.
    pub fn new(directory: &str) -> Self {
        CommandContext {
            emulator: None,
            name: None,
            directory: directory.to_owned(),
            qmp_socket: format!("{directory}/qmp.sock"),
            state_directory: format!("{directory}/state"),
            memory_directory: directory.to_owned(),
            swtpm: "swtpm".to_owned(),
            virtiofsd: "/usr/libexec/virtiofsd".to_owned(),
            virtiofsds_in_c: BTreeSet::new(),
            passt: "passt".to_owned(),
            is_root: false,
            first_display_port: 5900,
            now: 0,
            utc_offset: 0,
            is_trusted: false,
        }
    }
}

/// What starts a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// The arguments of QEMU, program first. It waits for `cont`.
    pub argv: Vec<String>,
    /// Environment variables of QEMU.
    pub environment: Vec<(String, String)>,
    /// What has to run before QEMU starts, and ends with it.
    pub side_commands: Vec<SideCommand>,
    /// What QEMU has to be told before the guest runs, in order. None of it is part of a restore.
    pub qmp_commands: Vec<QmpCommand>,
    /// What is not as the domain says, the guest being the same.
    pub warnings: Vec<Unmodelled>,
}

/// What a side process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SideKind {
    /// A TPM.
    Swtpm,
    /// A shared directory.
    Virtiofsd,
    /// A user network.
    Passt,
}

/// A process that serves the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideCommand {
    /// What it is for.
    pub kind: SideKind,
    /// The alias of its device: `tpm0`.
    pub alias: String,
    /// Its arguments, program first.
    pub argv: Vec<String>,
    /// The socket that it makes and QEMU connects to.
    pub socket: String,
    /// Directories that have to be there before.
    pub directories: Vec<String>,
}

/// A QMP command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpCommand {
    /// Its name.
    pub name: &'static str,
    /// Its arguments, an object.
    pub arguments: Value,
}

/// What starts an expanded domain.
///
/// # Errors
/// [`ConfigError::Unsupported`] with everything that cannot be honoured.
pub fn command_line(domain: &Domain, context: &CommandContext) -> Result<CommandLine, ConfigError> {
    let mut line = Line {
        context,
        is_q35: domain.is_q35(),
        is_kvm: domain.kind == DomainType::Kvm,
        buses: controllers::buses(domain),
        serial_controllers: controllers::serial_controllers(domain),
        overrides: BTreeMap::new(),
        items: Vec::new(),
        side_commands: Vec::new(),
        environment: Vec::new(),
        qmp_commands: Vec::new(),
        warnings: Vec::new(),
        errors: Vec::new(),
    };
    overrides(&mut line, &domain.overrides);
    frame(&mut line, domain);
    devices(&mut line, domain);
    extra_arguments(&mut line, domain);
    unused_overrides(&mut line, &domain.overrides);
    if !line.errors.is_empty() {
        return Err(ConfigError::Unsupported {
            elements: line.errors,
        });
    }
    Ok(finish(line, domain))
}

/// What every guest has.
fn frame(line: &mut Line<'_>, domain: &Domain) {
    disk_nodes::flash(line, &domain.os);
    machine::machine(line, domain);
    line.option("accel", machine::accelerator(domain));
    cpu::cpu(line, domain);
    memory::memory(line, domain);
    cpu::smp(line, &domain.vcpus, domain.cpu.as_ref());
    cpu::iothreads(line, &domain.iothreads);
    if let Some(uuid) = domain.uuid {
        line.option("uuid", uuid.to_string());
    }
    boot::firmware_tables(line, domain);
    line.option("display", displays::display(domain));
    line.switch("no-user-config");
    line.switch("nodefaults");
    clock::clock(line, &domain.clock);
    clock::power_management(line, domain);
    clock::lifecycle(line, domain);
    machine::globals(line, domain);
    boot::boot(line, domain);
    boot::kernel(line, &domain.os);
}

fn devices(line: &mut Line<'_>, domain: &Domain) {
    let devices = &domain.devices;
    if let Some(iommu) = &devices.iommu {
        platform::iommu(line, iommu);
    }
    controllers::controllers(line, domain);
    for module in &devices.memory_modules {
        memory::module(line, &domain.memory.backing, module);
    }
    usb_devices::hubs(line, &devices.hubs);
    disks::disks(line, domain);
    shares::shares(line, domain);
    interfaces::interfaces(line, domain);
    usb_devices::smartcards(line, &devices.smartcards);
    chardevs::ports(line, devices);
    platform::tpms(line, domain);
    usb_devices::inputs(line, &devices.inputs);
    sound::audios(line, domain);
    displays::graphics(line, domain);
    displays::videos(line, &devices.videos);
    sound::sounds(line, domain);
    platform::watchdogs(line, &devices.watchdogs);
    usb_devices::redirected(line, devices);
    hostdevs::hostdevs(line, &devices.hostdevs);
    platform::others(line, domain);
    stores::crypto_devices(line, devices);
    stores::persistent_stores(line, devices);
}

/// The name, the sandbox, our monitor; logs in place of terminals.
fn finish(line: Line<'_>, domain: &Domain) -> CommandLine {
    let context = line.context;
    let emulator = context
        .emulator
        .clone()
        .or_else(|| domain.devices.emulator.clone());
    let mut arguments = Arguments {
        program: emulator.unwrap_or_else(|| "qemu-system-x86_64".to_owned()),
        items: line.items,
    };
    restore_arguments::terminals_to_logs(&mut arguments, &context.directory);
    let name = context.name.as_ref().unwrap_or(&domain.name);
    let name = format!("guest={},debug-threads=on", escape(name));
    restore_arguments::add_control(&mut arguments, name, &context.qmp_socket);
    CommandLine {
        argv: arguments.write(),
        environment: line.environment,
        side_commands: line.side_commands,
        qmp_commands: line.qmp_commands,
        warnings: line.warnings,
    }
}

const TRUST: &str = "say --trust if you know whose domain it is";

fn extra_arguments(line: &mut Line<'_>, domain: &Domain) {
    let extra = &domain.extra;
    if extra.arguments.is_empty() && extra.environment.is_empty() {
        return;
    }
    if !line.context.is_trusted {
        let why = "arguments that are handed to QEMU as they are can reach everything on the host";
        return line.error_at("domain/qemu:commandline", extra.line, why, Some(TRUST));
    }
    line.environment.extend(extra.environment.iter().cloned());
    match Arguments::parse(&[&[String::new()], extra.arguments.as_slice()].concat()) {
        Ok(arguments) => line.items.extend(arguments.items),
        Err(error) => line.error_at(
            "domain/qemu:commandline",
            extra.line,
            error.to_string(),
            None,
        ),
    }
}

fn overrides(line: &mut Line<'_>, overrides: &[PropertyOverride]) {
    for one in overrides {
        if !line.context.is_trusted {
            let why = "a property that is set past the model can name anything on the host";
            line.error_at("domain/qemu:override", one.line, why, Some(TRUST));
            continue;
        }
        let text = one.value.clone().unwrap_or_default();
        let value = match one.kind {
            PropertyType::Remove => Ok(None),
            PropertyType::String => Ok(Some(Value::from(text))),
            PropertyType::Unsigned => text
                .parse::<u64>()
                .map(|value| Some(value.into()))
                .map_err(drop),
            PropertyType::Signed => text
                .parse::<i64>()
                .map(|value| Some(value.into()))
                .map_err(drop),
            PropertyType::Bool => text
                .parse::<bool>()
                .map(|value| Some(value.into()))
                .map_err(drop),
        };
        match value {
            Ok(value) => {
                let all = line.overrides.entry(one.alias.clone()).or_default();
                all.push((one.name.clone(), value));
            }
            Err(()) => {
                let why = format!(
                    "{:?} is no value of that type",
                    one.value.as_deref().unwrap_or_default()
                );
                line.error_at("domain/qemu:override", one.line, why, None);
            }
        }
    }
}

/// An override of a device that is not there does nothing, which nobody wants.
fn unused_overrides(line: &mut Line<'_>, overrides: &[PropertyOverride]) {
    for alias in std::mem::take(&mut line.overrides).into_keys() {
        let at = overrides
            .iter()
            .find(|one| one.alias == alias)
            .map_or(0, |one| one.line);
        let why = format!("there is no device with the alias {alias:?}");
        line.error_at("domain/qemu:override", at, why, None);
    }
}

#[cfg(test)]
mod tests;
