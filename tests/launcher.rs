//! Domain XML in, QEMU's arguments out: golden, and a real QEMU takes them.
//!
//! `testdata/domains` holds the domains and what becomes of them.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod stand_ins;
mod support;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use stand_ins::Stage;
use support::{PATIENCE, Qemu, TestDir, testdata, wait_until};
use vmstow::config::domain::disk_source::{DiskImage, Location};
use vmstow::config::domain::disks::DiskDevice;
use vmstow::config::domain::{Domain, DomainType};
use vmstow::config::expand::{CpuExpansion, Firmware, FirmwareDescriptor, HostKnowledge, expand};
use vmstow::config::xml::Document;
use vmstow::config::{
    Arguments, CommandContext, CommandLine, ConfigError, DomainFacts, ResourceKind, ResourceTable,
    RestoreContext, command_line, domain_xml, remap, restore_arguments,
};

/// Domains that QEMU 7.2 cannot run, and why.
const NOT_7_2: [(&str, &str); 7] = [
    (
        "features-hyperv",
        "7.2 cannot give a guest under TCG a virtual processor index",
    ),
    ("windows-server-2022", "as features-hyperv"),
    ("dumpxml-windows-server-q35", "as features-hyperv"),
    ("virt-manager-windows11", "as features-hyperv"),
    (
        "iommu-intel",
        "7.2 has no extended interrupt mode under TCG",
    ),
    ("net-models", "igb came with 8.0"),
    ("sound-virtio", "virtio sound came with 8.2"),
];

/// Domains that arguments do not tell whole, and what they cannot tell or what is not written.
const NOT_TOLD: [(&str, &str); 8] = [
    ("bios-rom-loader", "that the BIOS speaks to a serial port"),
    (
        "disk-throttled",
        "throttle nodes, which are QEMU's arguments still",
    ),
    ("memory-file", "that equal pages are not merged"),
    (
        "memory-hotplug",
        "memory modules, which are QEMU's arguments still",
    ),
    (
        "memory-nvdimm",
        "memory modules, which are QEMU's arguments still",
    ),
    (
        "memory-virtio-mem",
        "memory modules, which are QEMU's arguments still",
    ),
    ("qemu-override", "properties that libvirt has no words for"),
    ("sound-cards", "that the PC speaker is heard"),
];

/// What the goldens are made for: values of no host in particular.
fn knowledge() -> HostKnowledge {
    let cpu = |model: &str| CpuExpansion {
        model: model.to_owned(),
        vendor: None,
        features: [("aes", true), ("avx", true), ("svm", false)]
            .map(|(name, is_on)| (name.to_owned(), is_on))
            .into(),
    };
    let alias = |name: &str, machine: &str| (name.to_owned(), machine.to_owned());
    HostKnowledge {
        machine_aliases: [alias("q35", "pc-q35-10.0"), alias("pc", "pc-i440fx-10.0")].into(),
        firmware: vec![
            firmware(
                "secure.json",
                "OVMF_CODE_4M.ms.fd",
                "OVMF_VARS_4M.ms.fd",
                &["enrolled-keys", "requires-smm", "secure-boot"],
            ),
            firmware("plain.json", "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", &[]),
        ],
        nvram_directory: Some("/var/lib/libvirt/qemu/nvram".to_owned()),
        host_model: Some(cpu("Skylake-Client-v4")),
        ..HostKnowledge::default()
    }
}

fn firmware(name: &str, code: &str, variables: &str, features: &[&str]) -> Firmware {
    let file =
        |name: &str| json!({ "filename": format!("/usr/share/OVMF/{name}"), "format": "raw" });
    let descriptor = json!({
        "interface-types": ["uefi"],
        "mapping": { "device": "flash", "executable": file(code), "nvram-template": file(variables) },
        "targets": [{ "architecture": "x86_64", "machines": ["pc-q35-*", "pc-i440fx-*"] }],
        "features": features
    });
    Firmware {
        path: format!("/usr/share/qemu/firmware/{name}"),
        descriptor: serde_json::from_value::<FirmwareDescriptor>(descriptor).unwrap(),
    }
}

/// What the guest sees of a command line, an argument a line: names of things on the host's side are left out.
fn seen(line: &CommandLine) -> Vec<String> {
    const GUESTS: [&str; 8] = [
        "device", "cpu", "smp", "numa", "m", "machine", "global", "smbios",
    ];
    const NAMES: [&str; 9] = [
        "id",
        "drive",
        "netdev",
        "chardev",
        "memdev",
        "audiodev",
        "fsdev",
        "rng",
        "device_id",
    ];
    let arguments = Arguments::parse(&line.argv).unwrap().items.into_iter();
    let guests = arguments.filter(|item| GUESTS.contains(&item.name().unwrap_or_default()));
    let mut seen: Vec<String> = guests
        .map(|item| {
            let leaves = item.properties().leaves().into_iter();
            let mut leaves: Vec<String> = leaves
                .filter(|(key, _)| !NAMES.contains(&key.as_str()))
                // One of which nothing was said.
                .filter(|(key, value)| {
                    !(["dies", "clusters"].contains(&key.as_str()) && value == "1")
                })
                .map(|(key, value)| format!("{key}={}", value.replace("ua-", "")))
                .collect();
            leaves.sort();
            format!("-{} {}", item.name().unwrap(), leaves.join(","))
        })
        .collect();
    seen.sort();
    seen
}

/// The XML that is made of a domain's arguments, as a save makes it.
fn told(domain: &Domain, line: &CommandLine) -> String {
    let arguments = Arguments::parse(&line.argv).unwrap();
    let machine_type = domain.os.machine.clone().unwrap();
    let resources = ResourceTable::from_arguments(&arguments, Some(&machine_type));
    let facts = DomainFacts {
        name: domain.name.clone(),
        uuid: domain.uuid,
        memory_bytes: domain.memory.total,
        vcpus: domain.vcpus.at_boot(),
        max_vcpus: domain.vcpus.max,
        topology: None,
        machine_type,
        accelerator: if domain.kind == DomainType::Kvm {
            "kvm"
        } else {
            "tcg"
        }
        .to_owned(),
        emulator: line.argv[0].clone(),
        directory: "/".to_owned(),
        places: Default::default(),
    };
    domain_xml(&arguments, &resources, &facts)
}

#[test]
fn the_arguments_of_a_domain_tell_that_domain() {
    let context = CommandContext {
        is_trusted: true,
        ..CommandContext::new("/run/g")
    };
    let mut wrong = String::new();
    for name in domain_names() {
        if NOT_TOLD.iter().any(|(not_told, _)| *not_told == name) {
            continue;
        }
        let Ok(first) = line(&name, "/run/g") else {
            continue;
        };
        let xml = told(&domain(&name).unwrap(), &first);
        let document = Document::parse(xml.as_bytes()).unwrap();
        let second =
            expand(&document, &knowledge()).and_then(|again| command_line(&again.domain, &context));
        let second = match second {
            Ok(second) => second,
            Err(error) => {
                writeln!(wrong, "{name}: {error}").unwrap();
                continue;
            }
        };
        let (first, second) = (seen(&first), seen(&second));
        for lost in first.iter().filter(|it| !second.contains(it)) {
            writeln!(wrong, "{name}: lost {lost}").unwrap();
        }
        for new in second.iter().filter(|it| !first.contains(it)) {
            writeln!(wrong, "{name}: new {new}").unwrap();
        }
    }
    assert_eq!(wrong, "", "\n{wrong}");
}

fn domain_names() -> Vec<String> {
    let entries = std::fs::read_dir(testdata("domains")).unwrap();
    let names = entries.filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        Some(name.strip_suffix(".xml")?.to_owned())
    });
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn domain_path(name: &str, extension: &str) -> PathBuf {
    testdata("domains").join(format!("{name}.{extension}"))
}

fn domain(name: &str) -> Result<Domain, ConfigError> {
    let xml = std::fs::read(domain_path(name, "xml")).unwrap();
    let document = Document::parse(&xml)?;
    Ok(expand(&document, &knowledge())?.domain)
}

fn line(name: &str, directory: &str) -> Result<CommandLine, String> {
    let context = CommandContext {
        is_trusted: true,
        now: 1_700_000_000,
        ..CommandContext::new(directory)
    };
    let line = domain(name).and_then(|domain| command_line(&domain, &context));
    line.map_err(|error| error.to_string())
}

/// The arguments, an option with its value in each line; then what else there is.
fn written(line: &CommandLine) -> String {
    let mut text = String::new();
    for item in Arguments::parse(&line.argv).unwrap().items {
        writeln!(text, "{}", item.shown()).unwrap();
    }
    for (name, value) in &line.environment {
        writeln!(text, "# environment: {name}={value}").unwrap();
    }
    for side in &line.side_commands {
        writeln!(text, "# beside it: {}", side.argv.join(" ")).unwrap();
    }
    for command in &line.qmp_commands {
        writeln!(text, "# QMP: {} {}", command.name, command.arguments).unwrap();
    }
    for warning in &line.warnings {
        writeln!(text, "# warning: {warning}").unwrap();
    }
    text
}

#[test]
fn the_arguments_of_every_domain_are_golden() {
    let names = domain_names();
    assert!(names.len() >= 60, "{} domains", names.len());
    let mut different = Vec::new();
    for name in &names {
        let found = match line(name, &format!("/run/vmstow/{name}")) {
            Ok(line) => written(&line),
            Err(why) => {
                different.push(format!("{name}: {why}"));
                continue;
            }
        };
        let path = domain_path(name, "args");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &found).unwrap();
        }
        if std::fs::read_to_string(&path).unwrap_or_default() != found {
            different.push(name.clone());
        }
    }
    assert!(
        different.is_empty(),
        "{different:#?}: run UPDATE_GOLDEN=1 cargo test --test launcher golden and look at the difference"
    );
}

#[test]
fn a_line_of_the_readme_says_what_each_domain_shows() {
    let readme = std::fs::read_to_string(testdata("domains/README.md")).unwrap();
    for name in domain_names() {
        assert!(readme.contains(&format!("| `{name}` | ")), "{name}");
    }
}

#[test]
fn qemu_10_takes_the_arguments_of_every_domain() {
    let names: Vec<String> = domain_names();
    assert_all_start(Qemu::V10, &names);
}

#[test]
fn qemu_7_2_takes_the_arguments_of_every_domain_it_can_run() {
    let can = |name: &String| NOT_7_2.iter().all(|(cannot, _)| cannot != name);
    let names: Vec<String> = domain_names().into_iter().filter(can).collect();
    assert_all_start(Qemu::V7_2, &names);
}

#[test]
fn the_arguments_of_every_domain_can_be_restored_as_they_are_and_again() {
    for name in domain_names() {
        let line = line(&name, "/run/vmstow/first").unwrap();
        let kept = Arguments::parse(&line.argv).unwrap();
        let domain = domain(&name).unwrap();
        let context = |directory: &str| RestoreContext {
            machine_type: domain.os.machine.clone().unwrap(),
            qmp_socket: format!("{directory}/qmp.sock"),
            log_dir: directory.to_owned(),
            name: name.clone(),
        };
        let once = restore_arguments(&kept, &context("/run/vmstow/second"), &[]);
        let once = once.unwrap_or_else(|error| panic!("{name}: {error}"));
        let again = Arguments::parse(&once).unwrap();
        let third = restore_arguments(&again, &context("/run/vmstow/second"), &[]).unwrap();
        assert_eq!(once, third, "{name}");
        // What the guest sees is not touched, nor are its disks.
        for option in [
            "device", "object", "blockdev", "machine", "cpu", "smp", "m", "smbios",
        ] {
            let of = |arguments: &Arguments| {
                let values = arguments.options(option);
                let values = values.map(|(_, item)| item.shown().replace("/first", "/second"));
                values.collect::<Vec<_>>()
            };
            assert_eq!(of(&kept), of(&again), "{name}");
        }
        assert!(
            !once.join(" ").contains("/run/vmstow/first"),
            "{name}: {once:?}"
        );
    }
}

#[test]
fn every_disk_of_every_domain_is_a_resource_by_its_alias_and_can_be_remapped() {
    for name in domain_names() {
        let line = line(&name, "/run/vmstow/first").unwrap();
        let arguments = Arguments::parse(&line.argv).unwrap();
        let domain = domain(&name).unwrap();
        let machine = domain.os.machine.as_deref();
        let table = ResourceTable::from_arguments(&arguments, machine);
        for disk in &domain.devices.disks {
            let Some(path) = disk.image.as_ref().and_then(file_of) else {
                continue;
            };
            let alias = disk.info.alias.as_deref().unwrap();
            let kind = match disk.device {
                DiskDevice::Cdrom => ResourceKind::Cdrom,
                DiskDevice::Floppy => ResourceKind::Floppy,
                DiskDevice::Disk | DiskDevice::Lun => ResourceKind::Disk,
            };
            let found = table.find(kind, alias);
            let found = found.unwrap_or_else(|| panic!("{name}: {alias} in {table:#?}"));
            assert_eq!(found.backend.path.as_deref(), Some(path), "{name}");
            let remap = format!("{}:{alias}=/other/image", kind.word());
            let remapped = remap::apply(&arguments, machine, &[remap.parse().unwrap()]).unwrap();
            let table = ResourceTable::from_arguments(&remapped.arguments, machine);
            let found = table.find(kind, alias).unwrap();
            assert_eq!(
                found.backend.path.as_deref(),
                Some("/other/image"),
                "{name}"
            );
        }
    }
}

fn file_of(image: &DiskImage) -> Option<&str> {
    match &image.location {
        Location::File { path } | Location::Block { path } => Some(path),
        _ => None,
    }
}

/// Starts each domain, some at a time, and fails with what QEMU said of those that did not.
fn assert_all_start(qemu: Qemu, names: &[String]) {
    let dir = TestDir::new();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(2, |count| count.get().min(4));
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (next, failures, dir) = (&next, &failures, &dir);
            scope.spawn(move || {
                let number =
                    u8::try_from(worker).unwrap() + 1 + if qemu == Qemu::V10 { 0 } else { 10 };
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(name) = names.get(index) else {
                        break;
                    };
                    // A short path: sockets lie below it.
                    let dir = dir.join(&index.to_string());
                    if let Err(why) = start(qemu, &dir, name, number) {
                        failures.lock().unwrap().push(format!("{name}: {why}"));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    assert!(
        failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        names.len(),
        failures.join("\n")
    );
}

/// Starts one domain, tells QEMU what it has to be told, and ends it.
fn start(qemu: Qemu, dir: &Path, name: &str, number: u8) -> Result<(), String> {
    std::fs::create_dir_all(dir).unwrap();
    let line = line(name, dir.to_str().unwrap())?;
    let argv = Stage { dir, number, qemu }.set(&line.argv);
    let side: Vec<Ended> = line
        .side_commands
        .iter()
        .filter(|side| side.argv[0] == "swtpm")
        .map(|side| {
            for directory in &side.directories {
                std::fs::create_dir_all(directory).unwrap();
            }
            let child = Ended(spawn(&side.argv, dir, "side"));
            wait_until("a socket", PATIENCE, || {
                let is_there = Path::new(&side.socket).exists();
                is_there.then_some(()).ok_or_else(|| side.socket.clone())
            });
            child
        })
        .collect();
    let mut child = Ended(spawn(&argv, dir, "qemu"));
    let result = talk(&mut child.0, dir, &line);
    drop(side);
    let words = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
    let result = result.map_err(|why| format!("{why}\n{words}"));
    if result.is_ok() {
        std::fs::remove_dir_all(dir).unwrap();
    }
    result
}

fn spawn(argv: &[String], dir: &Path, log: &str) -> Child {
    let log = File::create(dir.join(format!("{log}.log"))).unwrap();
    Command::new(&argv[0])
        .args(&argv[1..])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; run tests/setup.sh", argv[0]))
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn talk(child: &mut Child, dir: &Path, line: &CommandLine) -> Result<(), String> {
    let socket = dir.join("qmp.sock");
    let stream = wait_until("QEMU to listen", PATIENCE, || {
        if let Some(status) = child.try_wait().unwrap() {
            return Ok(Err(format!("QEMU ended: {status}")));
        }
        let stream = UnixStream::connect(&socket);
        stream.map(Ok).map_err(|error| error.to_string())
    })?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut qmp = Monitor(BufReader::new(stream));
    qmp.read()?;
    qmp.command("qmp_capabilities", &json!({}))?;
    let status = qmp.command("query-status", &json!({}))?;
    if status["status"] != "prelaunch" {
        return Err(format!("it is {status}"));
    }
    for command in &line.qmp_commands {
        if command.arguments["protocol"] != "spice" {
            qmp.command(command.name, &command.arguments)?;
        }
    }
    qmp.command("quit", &json!({}))?;
    let status = wait_until("QEMU to end", PATIENCE, || {
        child
            .try_wait()
            .unwrap()
            .ok_or_else(|| "it runs".to_owned())
    });
    if !ExitStatus::success(&status) {
        return Err(format!("it ended with {status}"));
    }
    Ok(())
}

/// A QMP connection to a QEMU that may end at any moment: then that is an answer too.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn command(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        // In one piece: QEMU may end as soon as it has read the object.
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        let sent = self.0.get_mut().write_all(line.as_bytes());
        sent.map_err(|error| format!("{name}: {error}"))?;
        loop {
            let answer = self.read().map_err(|error| format!("{name}: {error}"))?;
            if let Some(error) = answer.get("error") {
                return Err(format!("{name}: {error}"));
            }
            if let Some(answer) = answer.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    fn read(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Err("QEMU closed its monitor".to_owned()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
