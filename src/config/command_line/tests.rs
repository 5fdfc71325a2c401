use super::*;
use crate::config::expand::{HostKnowledge, expand};
use crate::config::xml::Document;

fn xml(domain: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n<name>g</name>\n\
         <memory>65536</memory>\n<os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\n{domain}\n\
         <devices>\n{devices}\n</devices>\n</domain>"
    )
}

fn line_of(xml: &str, context: &CommandContext) -> Result<CommandLine, ConfigError> {
    let document = Document::parse(xml.as_bytes()).unwrap();
    let expanded = expand(&document, &HostKnowledge::default())?;
    command_line(&expanded.domain, context)
}

fn made(domain: &str, devices: &str) -> CommandLine {
    line_of(&xml(domain, devices), &CommandContext::new("/run/g")).unwrap()
}

fn refused(domain: &str, devices: &str) -> Vec<String> {
    match line_of(&xml(domain, devices), &CommandContext::new("/run/g")) {
        Err(ConfigError::Unsupported { elements }) => {
            elements.iter().map(Unmodelled::to_string).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn arguments_past_the_model_need_trust() {
    let extra = "<qemu:commandline><qemu:arg value='-S'/></qemu:commandline>";
    let found = refused(extra, "");
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("line 5, domain/qemu:commandline: "),
        "{found:?}"
    );
    let trusting = CommandContext {
        is_trusted: true,
        ..CommandContext::new("/run/g")
    };
    assert!(line_of(&xml(extra, ""), &trusting).is_ok());
}

#[test]
fn an_override_that_meets_no_device_is_an_error() {
    let text = xml(
        "<qemu:override><qemu:device alias='net7'><qemu:frontend>\
         <qemu:property name='a' type='bool' value='true'/></qemu:frontend></qemu:device></qemu:override>",
        "",
    );
    let trusting = CommandContext {
        is_trusted: true,
        ..CommandContext::new("/run/g")
    };
    let error = line_of(&text, &trusting).unwrap_err().to_string();
    assert!(
        error.contains("no device with the alias \"net7\""),
        "{error}"
    );
}

#[test]
fn everything_that_cannot_be_honoured_is_told_at_once() {
    let share = "<filesystem type='mount'><driver type='virtiofs'/><source dir='/s'/><target dir='t'/></filesystem>";
    let watchdogs =
        "<watchdog model='i6300esb' action='reset'/>\n<watchdog model='itco' action='pause'/>";
    let found = refused("", &format!("{share}\n{watchdogs}"));
    assert!(found.len() >= 2, "{found:?}");
    assert!(
        found
            .iter()
            .any(|it| it.starts_with("line 7, domain/devices/filesystem")),
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .any(|it| it.starts_with("line 8, domain/devices/watchdog")),
        "{found:?}"
    );
}

#[test]
fn a_topology_that_is_not_the_number_of_cpus_is_an_error() {
    let found = refused(
        "<vcpu>4</vcpu><cpu><topology sockets='1' cores='2' threads='1'/></cpu>",
        "",
    );
    assert!(found[0].contains("4"), "{found:?}");
}

#[test]
fn a_password_is_told_by_qmp_and_is_no_argument() {
    let line = made(
        "",
        "<graphics type='vnc' port='5901' passwd='geheim' passwdValidTo='2030-01-01T00:00:00'/>",
    );
    assert!(!line.argv.join(" ").contains("geheim"));
    let names: Vec<&str> = line
        .qmp_commands
        .iter()
        .map(|command| command.name)
        .collect();
    assert_eq!(names, ["set_password", "expire_password"]);
    assert_eq!(line.qmp_commands[1].arguments["time"], "1893456000");
}

#[test]
fn a_name_cannot_become_another_argument() {
    let line = made("", "<serial type='file'><source path='/a,b=c'/></serial>");
    let chardev = line
        .argv
        .iter()
        .find(|word| word.starts_with("file,"))
        .unwrap();
    assert!(chardev.contains("path=/a,,b=c,"), "{chardev}");
}

#[test]
fn a_terminal_that_nobody_looks_at_is_logged_in_the_guests_directory() {
    let line = made("", "<serial type='pty'/><serial type='stdio'/>");
    let logged = "pty,id=charserial0,logfile=/run/g/serial0.log,logappend=on";
    assert!(
        line.argv.iter().any(|word| word == logged),
        "{:?}",
        line.argv
    );
    assert!(
        !line.argv.iter().any(|word| word.starts_with("stdio")),
        "{:?}",
        line.argv
    );
}

#[test]
fn stores_and_cryptography_are_as_libvirt_has_them() {
    let devices = "<controller type='usb' model='none'/><memballoon model='none'/>\
        <pstore backend='acpi-erst'><path>/p</path><size unit='KiB'>64</size></pstore>\
        <crypto model='virtio' type='qemu'><backend model='builtin' queues='1'/></crypto>";
    let line = made("", devices);
    for word in [
        r#"{"id":"objcrypto0","qom-type":"cryptodev-backend-builtin","queues":1}"#,
        r#"{"addr":"0x1","bus":"pci.2","cryptodev":"objcrypto0","driver":"virtio-crypto-pci","id":"crypto0"}"#,
        r#"{"id":"mempstore0","mem-path":"/p","qom-type":"memory-backend-file","share":true,"size":65536}"#,
        r#"{"addr":"0x2","bus":"pci.2","driver":"acpi-erst","id":"pstore0","memdev":"mempstore0"}"#,
    ] {
        assert!(
            line.argv.iter().any(|it| it == word),
            "{word}: {:#?}",
            line.argv
        );
    }
    // What stands against saving is told before the guest runs.
    let warned: Vec<String> = line.warnings.iter().map(Unmodelled::to_string).collect();
    assert!(
        warned.iter().any(|it| it.contains("cannot be saved")),
        "{warned:?}"
    );
}

#[test]
fn each_virtiofsd_is_told_in_its_own_words() {
    let memory = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let share = |more: &str| {
        format!(
            "<filesystem type='mount'><driver type='virtiofs'/><binary path='/v' xattr='on'>\
             <cache mode='none'/><lock posix='on'/></binary>{more}<source dir='/s'/><target dir='t'/></filesystem>"
        )
    };
    let in_c = CommandContext {
        virtiofsds_in_c: ["/v".to_owned()].into(),
        ..CommandContext::new("/run/g")
    };
    let told = |context: &CommandContext| {
        let line = line_of(&xml(memory, &share("")), context).unwrap();
        line.side_commands[0].argv.join(" ")
    };
    assert_eq!(
        told(&CommandContext::new("/run/g")),
        "/v --socket-path=/run/g/fs0.virtiofs --shared-dir=/s --cache=none --xattr"
    );
    assert_eq!(
        told(&in_c),
        "/v --socket-path=/run/g/fs0.virtiofs -f -o source=/s,cache=none,xattr,posix_lock"
    );
    let refused = line_of(&xml(memory, &share("<readonly/>")), &in_c).unwrap_err();
    assert!(
        refused.to_string().contains("has no <readonly/>"),
        "{refused}"
    );
}
