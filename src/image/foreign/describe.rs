//! The manifest of a guest that others saved: what the stream tells, and what its domain XML means to QEMU.
//!
//! Nobody looked at that guest for us, so nothing is said of its QEMU's version and its disks' fingerprints. The argument
//! vector is the one with which `vmstow run` would start a guest from the XML, on the machine type that the stream names and
//! with the CPU of libvirt's cookie: libvirt, too, replaces the CPU of the XML by that one.

use std::collections::BTreeMap;

use std::path::Path;
use std::time::SystemTime;

use crate::config::command_line::{
    CommandContext, CommandLine, SideCommand, SideKind, command_line,
};
use crate::config::domain::cpu::CpuMode;
use crate::config::domain::{Domain, DomainType};
use crate::config::domain_xml::read_identity;
use crate::config::expand::{HostKnowledge, expand};
use crate::config::xml::{Document, Element};
use crate::config::{Arguments, ConfigError, ResourceTable, Unmodelled};
use crate::container::Manifest;
use crate::container::manifest::{
    DeviceSection, Guest, Machine, Qemu, RamBlock, Resource, SideProgram, StreamSummary as Facts,
    Tool,
};
use crate::host::{Lasting, RuntimeDir, sanitise_name};
use crate::stream::StreamSummary;

/// What is known of a guest before its stream is read.
pub struct Known<'a> {
    /// Its domain XML.
    pub xml: Option<&'a str>,
    /// libvirt's cookie.
    pub cookie: Option<&'a str>,
    /// Whether it runs after a restore; `None` if only the stream tells.
    pub was_running: Option<bool>,
    /// What it is called if nothing tells.
    pub name: &'a str,
    /// When it was saved, as far as is known.
    pub saved_at: SystemTime,
    /// The machine type that the stream names.
    pub machine_type: Option<&'a str>,
    /// RAMBlocks and their bytes.
    pub blocks: &'a [(String, u64)],
}

/// A guest as an image describes it.
pub struct Described {
    /// Its manifest; without what only the stream's end tells until [`Described::complete`].
    pub manifest: Manifest,
    /// Its domain XML: its own, or one that says no more than the stream.
    pub xml: String,
    /// Why no arguments could be made of its XML, and what in them is not as the XML says.
    pub problems: Vec<String>,
}

/// What the XML means.
struct Configuration {
    domain: Domain,
    command: CommandLine,
}

/// Describes a guest.
pub fn describe(known: &Known<'_>) -> Described {
    let mut problems = Vec::new();
    let identity = known.xml.and_then(|xml| read_identity(xml.as_bytes()).ok());
    let identity = identity.unwrap_or_default();
    let name = identity.name.unwrap_or_else(|| known.name.to_owned());
    let configuration = known
        .xml
        .and_then(|xml| match configure(xml, &name, known) {
            Ok(configuration) => Some(configuration),
            Err(error) => {
                problems.push(format!("no QEMU arguments can be made of its XML: {error}"));
                None
            }
        });
    if let Some(configuration) = &configuration {
        let warnings = configuration.command.warnings.iter();
        problems.extend(warnings.map(Unmodelled::to_string));
    }
    let machine = machine(configuration.as_ref().map(|it| &it.domain), known);
    let xml = match known.xml {
        Some(xml) => xml.to_owned(),
        None => bare_xml(&name, &machine),
    };
    let was_running = known.was_running.unwrap_or(false);
    let manifest = Manifest {
        schema: crate::container::manifest::SCHEMA,
        tool: Tool {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            other: Default::default(),
        },
        saved_at: time(known.saved_at),
        guest: Guest {
            name,
            uuid: identity.uuid,
            run_state: run_state(was_running).to_owned(),
            was_running,
            ran_on: false,
            has_own_xml: known.xml.is_some(),
            other: Default::default(),
        },
        resources: resources(configuration.as_ref(), &machine),
        qemu: qemu(configuration),
        machine,
        ram_blocks: Vec::new(),
        sections: Vec::new(),
        capabilities: Vec::new(),
        remaps: Vec::new(),
        labels: Default::default(),
        libvirt_cookie: known.cookie.map(str::to_owned),
        stream: None,
        other: Default::default(),
    };
    Described {
        manifest,
        xml,
        problems,
    }
}

impl Described {
    /// Adds what the whole stream told.
    pub fn complete(&mut self, known: &Known<'_>, stream: &StreamSummary) {
        let manifest = &mut self.manifest;
        let blocks = stream.blocks.iter().map(|block| RamBlock {
            idstr: block.idstr.clone(),
            used_length: block.used_length,
            page_size: block.page_size,
            other: Default::default(),
        });
        manifest.ram_blocks = blocks.collect();
        let sections = stream.sections.iter().map(|section| DeviceSection {
            idstr: section.idstr.clone(),
            instance_id: section.instance_id,
            version_id: section.version_id,
            len: section.len,
            other: Default::default(),
        });
        manifest.sections = sections.collect();
        manifest.capabilities.clone_from(&stream.capabilities);
        let is_mapped = !stream.capabilities.is_empty();
        manifest.stream = Some(Facts {
            len: stream.len,
            data_pages: stream.data_pages,
            zero_pages: stream.zero_pages,
            vmdescription: stream.vmdescription.is_some(),
            capture: Some("migration".to_owned()),
            device_state_at: (!is_mapped).then_some(stream.device_state.0),
            made_from: None,
            other: Default::default(),
        });
        if known.was_running.is_none()
            && let Some(state) = &stream.run_state
        {
            manifest.guest.run_state.clone_from(state);
            manifest.guest.was_running = state == "running";
        }
        if manifest.guest.uuid.is_none() && known.xml.is_none() {
            manifest.guest.uuid = stream.uuid;
        }
        // What the XML says counts: it is what a restore starts.
        if known.xml.is_none() {
            let of = |idstr: &str| {
                let sections = stream.sections.iter();
                sections.filter(|section| section.idstr == idstr).count()
            };
            manifest.machine.vcpus = u32::try_from(of("cpu").max(1)).unwrap_or(1);
            if of("kvmclock") > 0 {
                manifest.machine.accelerator = "kvm".to_owned();
            }
            self.xml = bare_xml(&manifest.guest.name, &manifest.machine);
        }
    }
}

/// What QEMU is started with for this XML.
fn configure(xml: &str, name: &str, known: &Known<'_>) -> Result<Configuration, ConfigError> {
    let mut document = Document::parse(xml.as_bytes())?;
    if let Some(machine_type) = known.machine_type {
        set_machine_type(&mut document.root, machine_type);
    }
    if let Some(cookie) = known.cookie {
        let cookie = Document::parse(cookie.as_bytes())?;
        replace_cpu(&mut document.root, &cookie.root);
    }
    Domain::read(&document)?;
    let expanded = expand(&document, &HostKnowledge::default())?;
    let directory = RuntimeDir::usual_path().join(sanitise_name(name));
    let lasting = match expanded.domain.uuid {
        Some(uuid) => uuid.to_string(),
        None => sanitise_name(name),
    };
    let state = Lasting::find().ok().map(|it| it.tpm(&lasting));
    let mut context = CommandContext {
        memory_directory: "/dev/shm".to_owned(),
        now: seconds(known.saved_at),
        // Whether the image may use them is asked when it is restored.
        is_trusted: true,
        ..CommandContext::new(&directory.display().to_string())
    };
    if let Some(state) = state {
        context.state_directory = state.display().to_string();
    }
    let mut command = command_line(&expanded.domain, &context)?;
    command.warnings.extend(expanded.warnings);
    Ok(Configuration {
        domain: expanded.domain,
        command,
    })
}

fn set_machine_type(root: &mut Element, machine_type: &str) {
    let os = root.find_mut("os");
    if let Some(kind) = os.and_then(|os| os.find_mut("type")) {
        kind.set("machine", machine_type);
    }
}

/// Puts the CPU of the cookie in the place of the XML's, where libvirt does so: not where the guest has the host's CPU or
/// all that QEMU knows, nor where the XML says no more than how the CPUs hang together.
///
/// Source: libvirt 11.3 `src/qemu/qemu_domain.c`, `qemuDomainUpdateCPU`.
fn replace_cpu(root: &mut Element, cookie: &Element) {
    let Some(real) = cookie.find("cpu") else {
        return;
    };
    let Some(cpu) = root.find_mut("cpu") else {
        return;
    };
    let mode = cpu.get("mode").unwrap_or("custom");
    let is_kept = match mode {
        "host-passthrough" | "maximum" => true,
        "custom" => cpu.find("model").is_none(),
        _ => false,
    };
    if !is_kept {
        *cpu = real.clone();
    }
}

fn machine(domain: Option<&Domain>, known: &Known<'_>) -> Machine {
    let of_stream = || {
        let main = known.blocks.iter().find(|(idstr, _)| idstr == "pc.ram");
        main.or(known.blocks.first()).map_or(0, |(_, len)| *len)
    };
    let named = domain.and_then(|domain| domain.os.machine.as_deref());
    Machine {
        machine_type: known.machine_type.or(named).unwrap_or_default().to_owned(),
        accelerator: match domain.map(|domain| domain.kind) {
            Some(DomainType::Kvm) => "kvm".to_owned(),
            _ => "tcg".to_owned(),
        },
        cpu_model: domain.and_then(|domain| {
            let cpu = domain.cpu.as_ref()?;
            match cpu.mode {
                Some(CpuMode::HostPassthrough) => Some("host".to_owned()),
                Some(CpuMode::Maximum) => Some("max".to_owned()),
                _ => cpu.model.clone(),
            }
        }),
        cpu_features: BTreeMap::new(),
        vcpus: domain.map_or(1, |domain| domain.vcpus.at_boot()),
        max_vcpus: domain.map(|domain| domain.vcpus.max),
        memory_bytes: match domain {
            Some(domain) => domain.memory.initial(&domain.devices.memory_modules),
            None => of_stream(),
        },
        other: Default::default(),
    }
}

fn resources(configuration: Option<&Configuration>, machine: &Machine) -> Vec<Resource> {
    let arguments = configuration.and_then(|it| Arguments::parse(&it.command.argv).ok());
    let Some(arguments) = arguments else {
        return Vec::new();
    };
    let table = ResourceTable::from_arguments(&arguments, Some(&machine.machine_type));
    // Both are the same JSON.
    let kept = table.resources.iter();
    kept.filter_map(|one| serde_json::from_value(serde_json::to_value(one).ok()?).ok())
        .collect()
}

fn qemu(configuration: Option<Configuration>) -> Qemu {
    let mut qemu = Qemu {
        version: String::new(),
        package: None,
        binary: String::new(),
        binary_sha256: None,
        argv: Vec::new(),
        cwd: "/".to_owned(),
        uid: 0,
        gid: 0,
        user: None,
        side_programs: Vec::new(),
        other: Default::default(),
    };
    if let Some(Configuration { domain, command }) = configuration {
        qemu.binary = domain.devices.emulator.unwrap_or_default();
        qemu.side_programs = command.side_commands.iter().map(side_program).collect();
        qemu.argv = command.argv;
    }
    qemu
}

fn side_program(command: &SideCommand) -> SideProgram {
    SideProgram {
        name: command.alias.clone(),
        argv: command.argv.clone(),
        socket: command.socket.clone(),
        state: match command.kind {
            SideKind::Swtpm => command.directories.first().cloned(),
            SideKind::Virtiofsd | SideKind::Passt => None,
        },
        other: Default::default(),
    }
}

/// What a stream alone tells, as domain XML.
fn bare_xml(name: &str, machine: &Machine) -> String {
    let kind = match machine.accelerator.as_str() {
        "kvm" => "kvm",
        _ => "qemu",
    };
    let os = Element::with_text("type", "hvm")
        .attribute("arch", "x86_64")
        .attribute("machine", &machine.machine_type);
    let domain = Element::new("domain")
        .attribute("type", kind)
        .child(Element::with_text("name", name))
        .child(Element::with_text("memory", machine.memory_bytes).attribute("unit", "b"))
        .child(Element::with_text("vcpu", machine.vcpus))
        .child(Element::new("os").child(os));
    Document::new(domain).write_indented()
}

fn run_state(was_running: bool) -> &'static str {
    match was_running {
        true => "running",
        false => "paused",
    }
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0))
}

/// In whole seconds, in UTC: `2026-11-22T20:20:59Z`.
fn time(time: SystemTime) -> String {
    let time = jiff::Timestamp::from_second(seconds(time)).unwrap_or_default();
    time.to_string()
}

/// A name for a guest of which only its file's name is known: that without its ending.
pub fn name_of_file(path: Option<&Path>) -> String {
    let stem = path.and_then(Path::file_stem);
    stem.map_or("guest".to_owned(), |stem| {
        sanitise_name(&stem.to_string_lossy())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: &str = "<cookie><cpu mode='custom' match='exact' check='full'><model fallback='forbid'>Nehalem</model>\
        <feature policy='require' name='x2apic'/></cpu><slirpHelper/></cookie>";

    fn described(cpu: &str, cookie: Option<&str>) -> Described {
        let xml = format!(
            "<domain type='qemu'><name>web01</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>{cpu}\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>/bin/q</emulator></devices></domain>"
        );
        describe(&Known {
            xml: Some(&xml),
            cookie,
            was_running: Some(true),
            name: "file",
            saved_at: SystemTime::UNIX_EPOCH,
            machine_type: Some("pc-i440fx-9.2"),
            blocks: &[],
        })
    }

    fn cpu_of(described: &Described) -> String {
        let argv = &described.manifest.qemu.argv;
        let at = argv.iter().position(|word| word == "-cpu");
        at.map_or(String::new(), |at| argv[at + 1].clone())
    }

    #[test]
    fn the_cpu_is_the_cookies_where_libvirt_takes_it_from_there() {
        for cpu in [
            "<cpu mode='host-model'/>",
            "<cpu mode='custom' match='minimum'><model>qemu64</model></cpu>",
        ] {
            let described = described(cpu, Some(COOKIE));
            assert_eq!(described.problems, Vec::<String>::new());
            let cpu = cpu_of(&described);
            assert!(
                cpu.starts_with("Nehalem,") && cpu.contains("x2apic=on"),
                "{cpu}"
            );
            assert_eq!(
                described.manifest.machine.cpu_model.as_deref(),
                Some("Nehalem")
            );
        }
        for (cpu, wanted) in [
            ("<cpu mode='host-passthrough'/>", "max"), // with TCG
            (
                "<cpu><topology sockets='1' cores='2' threads='1'/></cpu>",
                "",
            ),
            ("", ""),
        ] {
            let cpu = cpu_of(&described(cpu, Some(COOKIE)));
            assert!(cpu.starts_with(wanted) && !cpu.contains("Nehalem"), "{cpu}");
        }
    }

    #[test]
    fn the_machine_type_is_the_streams_and_the_xml_stays() {
        let described = described("", None);
        let manifest = &described.manifest;
        assert_eq!(manifest.machine.machine_type, "pc-i440fx-9.2");
        assert!(
            manifest
                .qemu
                .argv
                .iter()
                .any(|word| word.contains("pc-i440fx-9.2"))
        );
        assert!(described.xml.contains("machine='pc'"));
        assert_eq!(
            (manifest.machine.vcpus, manifest.machine.memory_bytes),
            (2, 64 << 20)
        );
        assert_eq!(manifest.qemu.binary, "/bin/q");
    }

    #[test]
    fn without_arguments_it_is_said_why() {
        let described = described("<cpu mode='host-model'/>", None);
        assert!(described.manifest.qemu.argv.is_empty());
        let [problem] = described.problems.as_slice() else {
            panic!("{:?}", described.problems);
        };
        assert!(problem.contains("CPU model"), "{problem}");
        assert_eq!(described.manifest.guest.name, "web01");
    }
}
