//! Guests started from domain XML, from the first line of it to the end of everything that worked for them.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{
    Adopted, PATIENCE, Process, Qemu, Restored, Serial, TestDir, counter_xml, linux_initrd,
    linux_kernel, serial_into, wait_until,
};

const NIC: &str = "<interface type='user'><model type='virtio'/></interface>";

const TPM: &str = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>";

/// The processes of that program that know the directory.
fn programs(dir: &TestDir, name: &str) -> Vec<Process> {
    let mut found = dir.processes();
    found.retain(|process| process.program().file_name().is_some_and(|it| it == name));
    found
}

#[track_caller]
fn wait_until_nothing_runs(dir: &TestDir) {
    wait_until("everything to end", PATIENCE, || {
        let left = dir.processes();
        left.is_empty().then_some(()).ok_or(format!("{left:#?}"))
    });
}

/// What is in the runtime directory.
fn guests(dir: &TestDir) -> Vec<String> {
    let entries = std::fs::read_dir(dir.join("run")).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_guest_is_run_listed_saved_by_its_name_and_stopped() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), ""),
    );
    let guest = dir.run(&["web.xml"]);
    assert_eq!(
        (guest.name(), &guest.report["state"]),
        ("web", &json!("running"))
    );
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);

    let listed = &dir.json(&["list"])["guests"][0];
    assert_eq!(
        (&listed["name"], &listed["state"]),
        (&json!("web"), &json!("running"))
    );
    let monitor = dir.json(&["monitor", "web"]);
    assert_eq!(monitor["qmp"], guest.report["qmp"]);
    let said = dir.vmstow().args(["monitor", "web"]).assert().success();
    let said = String::from_utf8(said.get_output().stdout.clone()).unwrap();
    assert_eq!(said.trim_end(), guest.report["qmp"].as_str().unwrap());
    let said = dir.refused(2, &["run", "web.xml", "--name", "web"]);
    assert!(said.contains("web runs already"), "{said}");

    dir.json(&["save", "web", "web.stow"]);
    guest.qemu.wait_for_exit();
    let before = serial.mark();
    let xml = dir.xml_in("web.stow");
    assert!(xml.contains("<target dev='vda' bus='virtio'/>"), "{xml}");
    let restored = dir.restore(&["web.stow"]);
    serial.assert_goes_on(&before);
    let stopped = dir.json(&["stop", "web"]);
    assert_eq!(stopped["how"], "quit");
    restored.qemu.wait_for_exit();
    assert_eq!(guests(&dir), [""; 0]);
    let said = dir.refused(4, &["monitor", "web"]);
    assert!(said.contains("no guest named web"), "{said}");
}

#[test]
fn the_xml_in_an_image_starts_a_guest_afresh() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), ""),
    );
    let guest = dir.run(&["web.xml"]);
    Serial::at(dir.join("serial")).wait_for_tick(3);
    dir.json(&["save", "web", "web.stow"]);
    guest.qemu.wait_for_exit();
    std::fs::remove_file(dir.join("serial")).unwrap();
    let again = dir.run(&["web.stow", "--name", "again", "--paused"]);
    assert_eq!(
        (again.name(), &again.report["state"]),
        ("again", &json!("paused"))
    );
    assert_eq!(Serial::at(dir.join("serial")).text(), "");
    again.qmp().command("cont", json!({}));
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_line("the beginning", |line| line == "tick 1 memory ok");
    dir.json(&["stop", "again"]);
}

#[test]
fn resources_are_remapped() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), ""),
    );
    let moved = dir.join("moved.img").display().to_string();
    std::fs::rename(dir.join("web.img"), &moved).unwrap();
    let (from, to) = (dir.join("web"), dir.join("moved"));
    let remap = format!("disk:{}={}", from.display(), to.display());
    let other = dir.join("other").display().to_string();
    let chardev = format!("chardev:*=file:{other}");
    let guest = dir.run(&["web.xml", "--remap", &remap, "--remap", &chardev]);
    Serial::at(&other).wait_for_tick(2);
    drop(guest);
}

// What stands against a start.

#[test]
fn a_start_that_fails_quotes_qemu_and_leaves_nothing() {
    let dir = TestDir::new();
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), TPM);
    std::fs::remove_file(dir.join("web.img")).unwrap();
    dir.write("web.xml", &xml);
    let said = dir.refused(4, &["run", "web.xml"]);
    assert!(
        said.contains("web.img") && said.contains("No such file"),
        "{said}"
    );
    assert_eq!(guests(&dir), [""; 0]);
    wait_until_nothing_runs(&dir);
    // QEMU itself makes the file behind the serial port.
    assert_eq!(dir.names(), ["serial", "web.xml"]);
    assert!(
        std::fs::read_dir(dir.join("state"))
            .unwrap()
            .next()
            .is_none()
    );
}

#[test]
fn a_missing_emulator_is_named() {
    let dir = TestDir::new();
    let xml = counter_xml(&dir, "", "");
    let emulator = Qemu::V10.program().display().to_string();
    dir.write(
        "web.xml",
        &xml.replace(&emulator, "/nonexistent/qemu-system-x86_64"),
    );
    let said = dir.refused(4, &["run", "web.xml", "--qemu", "/nonexistent/qemu"]);
    assert!(said.contains("/nonexistent/qemu"), "{said}");
    // One that the XML names and that is not here is another host's: the one in PATH does as well.
    let guest = dir.run(&["web.xml", "--paused"]);
    dir.json(&["stop", guest.name()]);
}

#[test]
fn xml_that_cannot_be_read_is_refused() {
    let dir = TestDir::new();
    for (name, xml) in [
        (
            "cut.xml",
            "<domain type='qemu'>\n  <name>web</name>\n  <memory",
        ),
        ("other.xml", "<network>\n  <name>default</name>\n</network>"),
        ("empty.xml", ""),
        (
            "doctype.xml",
            "<!DOCTYPE domain [<!ENTITY a 'b'>]>\n<domain type='qemu'><name>&a;</name></domain>",
        ),
    ] {
        dir.write(name, xml);
        let said = dir.refused(2, &["run", name]);
        assert!(said.contains("XML"), "{name}: {said}");
    }
    let said = dir.refused(1, &["run", "none.xml"]);
    assert!(said.contains("none.xml"), "{said}");
    assert_eq!(guests(&dir), [""; 0]);
}

#[test]
fn all_that_is_not_supported_is_told_at_once_with_its_lines() {
    let dir = TestDir::new();
    let devices = "<nonsense/>\n<hostdev mode='subsystem' type='scsi_host'/>\n";
    let xml = counter_xml(&dir, "", devices);
    let line_of = |text: &str| {
        let line = xml.lines().position(|line| line.contains(text)).unwrap() + 1;
        format!("line {line}")
    };
    dir.write("web.xml", &xml);
    for command in [
        &["run", "web.xml"][..],
        &["run", "web.xml", "--print-command"],
    ] {
        let said = dir.refused(2, command);
        for wanted in ["nonsense", "hostdev"] {
            assert!(
                said.contains(wanted) && said.contains(&line_of(wanted)),
                "{said}"
            );
        }
    }
}

#[test]
fn arguments_of_its_own_need_trust() {
    let dir = TestDir::new();
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), "");
    let xml = xml.replace(
        "<domain type='qemu'>",
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
    );
    let own = "<qemu:commandline><qemu:arg value='-fw_cfg'/><qemu:arg value='name=opt/x,string=y'/></qemu:commandline>";
    dir.write(
        "web.xml",
        &xml.replace("</domain>", &format!("{own}</domain>")),
    );
    let said = dir.refused(6, &["run", "web.xml"]);
    assert!(said.contains("--trust"), "{said}");
    let guest = dir.run(&["web.xml", "--trust"]);
    assert_eq!(guest.qemu.argument("-fw_cfg"), Some("name=opt/x,string=y"));
    dir.json(&["stop", "web"]);
}

#[test]
fn what_the_user_always_wants_holds_for_guests_from_xml_too() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), ""),
    );
    std::fs::create_dir_all(dir.join("config/vmstow")).unwrap();
    let here = dir.path().display();
    let settings =
        format!("qemu = \"/opt/qemu\"\nremap = [\"disk:{here}/=/srv/\", \"net:*=bridge=br7\"]\n");
    std::fs::write(dir.join("config/vmstow/config.toml"), settings).unwrap();
    let print = |more: &[&str]| {
        let words = [&["run", "web.xml", "--print-command"], more].concat();
        let argv = dir.json(&words)["argv"].as_array().unwrap().clone();
        let argv: Vec<String> = argv
            .iter()
            .map(|it| it.as_str().unwrap().to_owned())
            .collect();
        argv
    };
    let has = |argv: &[String], word: &str| argv.iter().any(|it| it.contains(word));
    let usual = print(&[]);
    assert!(
        usual[0] == "/opt/qemu" && has(&usual, "/srv/web.img"),
        "{usual:?}"
    );
    let asked = print(&["--qemu", "/mine"]);
    assert_eq!(asked[0], "/mine");
    let asked = print(&["--remap", "disk:*=/mnt/web.img"]);
    assert!(
        has(&asked, "/mnt/web.img") && !has(&asked, "/srv/"),
        "{asked:?}"
    );
}

#[test]
fn printing_the_command_needs_and_makes_nothing() {
    let dir = TestDir::new();
    let xml = counter_xml(&dir, &serial_into(&dir, "no/serial"), TPM);
    let xml = xml.replace(
        &Qemu::V10.program().display().to_string(),
        "/no/qemu-system-x86_64",
    );
    let xml = xml.replace("machine='pc'", "machine='pc-q35-10.0'");
    let os = "<loader readonly='yes' type='pflash'>/no/code.fd</loader><nvram template='/no/vars.fd'>/no/web.fd</nvram></os>";
    dir.write("web.xml", &xml.replace("</os>", os));
    std::fs::remove_file(dir.join("web.img")).unwrap();
    // What a CPU is cannot be asked for either.
    let cpu = |xml: String| xml.replace("<features>", "<cpu mode='host-passthrough'/><features>");
    let text = std::fs::read_to_string(dir.join("web.xml")).unwrap();
    dir.write(
        "web.xml",
        &cpu(text).replace("type='qemu'>\n  <name>", "type='kvm'>\n  <name>"),
    );
    let print = || {
        let mut command = dir.vmstow();
        command
            .env("PATH", "/no")
            .args(["--json", "run", "web.xml", "--print-command"]);
        let assert = command.assert().success();
        serde_json::from_slice::<Value>(&assert.get_output().stdout).unwrap()
    };
    let printed = print();
    let argv = printed["argv"].as_array().unwrap();
    assert_eq!(argv[0], "/no/qemu-system-x86_64");
    let has = |word: &str| argv.iter().any(|it| it.as_str().unwrap().contains(word));
    assert!(
        has("/no/code.fd") && has("/no/web.fd") && has("tpm-tis"),
        "{printed:#}"
    );
    assert_eq!(print(), printed);
    let text = dir
        .vmstow()
        .args(["run", "web.xml", "--print-command"])
        .assert()
        .success();
    let text = String::from_utf8(text.get_output().stdout.clone()).unwrap();
    assert!(
        text.starts_with("/no/qemu-system-x86_64 \\\n    -"),
        "{text}"
    );
    assert_eq!(dir.names(), ["web.xml"]);
    for name in ["run", "state"] {
        assert!(
            std::fs::read_dir(dir.join(name)).unwrap().next().is_none(),
            "{name}"
        );
    }
}

// The console.

/// A terminal in which a command runs, which a test types into and reads.
struct Terminal {
    child: std::process::Child,
    shown: PathBuf,
}

impl Terminal {
    /// `script` (Debian package bsdutils) gives the command a terminal of its own.
    fn run(dir: &TestDir, command: &str) -> Self {
        let shown = dir.join("shown");
        let mut script = Command::new("script");
        script.args(["-qefc", command, "/dev/null"]);
        let vmstow = dir.vmstow_command();
        for (name, value) in vmstow.get_envs() {
            script.env(name, value.unwrap());
        }
        script.env("SHELL", "/bin/sh").current_dir(dir.path());
        script
            .stdin(Stdio::piped())
            .stdout(File::create(&shown).unwrap());
        let child = script.spawn().expect("script (Debian package bsdutils)");
        Terminal { child, shown }
    }

    fn types(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(bytes).unwrap();
    }

    #[track_caller]
    fn wait_for(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        wait_until(what, PATIENCE, || {
            let text = std::fs::read(&self.shown).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            if wanted(&text) { Ok(text) } else { Err(text) }
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn vmstow() -> &'static str {
    env!("CARGO_BIN_EXE_vmstow")
}

/// The Linux guest, which listens on its serial port too.
fn linux_xml(serial: &str, memory_mib: u32, os: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'>
  <name>linux</name>
  <uuid>0f3b5c1e-6f0e-4b1c-9a53-2f3f4a0c7d11</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    {os}
    <kernel>{}</kernel>
    <initrd>{}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 content=32</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{}</emulator>
    {serial}
    {devices}
  </devices>
</domain>
",
        linux_kernel().display(),
        linux_initrd().display(),
        Qemu::V10.program().display(),
    )
}

#[test]
fn the_console_of_a_pseudo_terminal_talks_both_ways_and_puts_the_terminal_back() {
    let dir = TestDir::new();
    dir.write(
        "linux.xml",
        &linux_xml("<serial type='pty'/>", 256, "", NIC),
    );
    let guest = dir.run(&["linux.xml"]);
    let command = format!("stty -g; {} console linux; echo end $?; stty -g", vmstow());
    let mut terminal = Terminal::run(&dir, &command);
    terminal.wait_for("a tick", |text| text.contains("\ntick 3"));
    terminal.types(b"sum\n");
    terminal.wait_for("a sum", |text| text.contains("\nsum "));
    terminal.types(b"\x1d");
    let text = terminal.wait_for("the end", |text| {
        text.split_once("end 0")
            .is_some_and(|(_, rest)| rest.trim().contains(':') && rest.ends_with('\n'))
    });
    let settings: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| line.contains(":bf:"))
        .collect();
    assert_eq!(settings.len(), 2, "{text}");
    assert_eq!(settings[0], settings[1], "{text}");
    assert!(guest.qemu.state().is_some());
    drop(terminal);

    // It goes on behind a restore, in another terminal, and on another network.
    dir.json(&["save", "linux", "linux.stow"]);
    guest.qemu.wait_for_exit();
    let mut command = dir.vmstow();
    let output = command
        .args([
            "--json",
            "restore",
            "linux.stow",
            "--remap",
            "net:net0=passt",
        ])
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!said.contains("was a terminal"), "{said}");
    let restored = Restored::of(serde_json::from_slice(&output.stdout).unwrap());
    // It may be a build for this processor, under another name.
    let mut all = dir.processes();
    all.retain(|it| {
        it.argv()
            .first()
            .is_some_and(|name| name.ends_with("passt"))
    });
    assert_eq!(all.len(), 1, "{:#?}", dir.processes());
    let networks = json!({ "command-line": "info network" });
    let networks = restored.qmp().command("human-monitor-command", networks);
    let networks = networks.to_string();
    assert!(
        networks.contains("type=stream") && !networks.contains("slirp"),
        "{networks}"
    );
    let mut terminal = Terminal::run(&dir, &format!("{} console linux", vmstow()));
    terminal.wait_for("a tick", |text| text.contains("\ntick "));
    terminal.types(b"sum\n");
    terminal.wait_for("a sum", |text| text.contains("\nsum "));
    let log = std::fs::read_to_string(dir.join("run/linux/serial0.log")).unwrap();
    assert!(log.contains("\nsum "), "{log}");
    dir.json(&["stop", "linux"]);
    restored.qemu.wait_for_exit();
    drop(terminal);
    wait_until_nothing_runs(&dir);
}

/// Other devices than those of today's guests, as old a QEMU as is tested.
#[test]
fn qemu_7_2_runs_a_guest_from_xml_and_takes_it_back() {
    let dir = TestDir::new();
    let devices = "<controller type='scsi' index='0' model='virtio-scsi'/>
    <disk type='file' device='cdrom'><target dev='sda' bus='scsi'/><readonly/></disk>
    <controller type='usb' index='0' model='ich9-ehci1'/>
    <controller type='usb' index='0' model='ich9-uhci1'><master startport='0'/></controller>
    <interface type='user'><model type='virtio'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <input type='tablet' bus='usb'/>
    <graphics type='vnc'><listen type='socket'/></graphics>
    <video><model type='vga'/></video>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), devices);
    let xml = xml.replace("machine='pc'", "machine='q35'");
    dir.write("web.xml", &xml);
    let program = Qemu::V7_2.program().display().to_string();
    let guest = dir.run(&["web.xml", "--qemu", &program]);
    let version = guest.qmp().command("query-version", json!({}));
    assert_eq!(version["qemu"]["major"], 7, "{version}");
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);
    dir.json(&["save", "web", "web.stow"]);
    guest.qemu.wait_for_exit();
    let before = serial.mark();
    let manifest = dir.json(&["inspect", "web.stow"]);
    let machine = manifest["manifest"]["machine"]["type"].clone();
    assert_eq!(machine, "pc-q35-7.2", "{manifest:#}");
    let restored = dir.restore(&["web.stow", "--qemu", &program]);
    serial.assert_goes_on(&before);
    // What 7.2 saved loads in a newer one too.
    dir.json(&["save", "web", "again.stow"]);
    restored.qemu.wait_for_exit();
    let before = serial.mark();
    let newer = Qemu::V10.program().display().to_string();
    let restored = dir.restore(&["again.stow", "--qemu", &newer]);
    serial.assert_goes_on(&before);
    let version = restored.qmp().command("query-version", json!({}));
    assert_eq!(version["qemu"]["major"], 10, "{version}");
    dir.json(&["stop", "web"]);
}

#[test]
fn the_console_reads_sockets_and_logs_and_refuses_what_is_neither() {
    let dir = TestDir::new();
    let socket = dir.join("serial.sock");
    let serials = format!(
        "<serial type='unix'><source mode='bind' path='{}'/><target port='0'/></serial>
         <serial type='null'><target port='1'/></serial>",
        socket.display()
    );
    dir.write("web.xml", &counter_xml(&dir, &serials, ""));
    let guest = dir.run(&["web.xml"]);
    let mut command = dir.vmstow_command();
    command.args(["console", "web"]).stdin(Stdio::null());
    let mut console = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = console.stdout.take().unwrap();
    let mut text = String::new();
    let mut bytes = [0; 256];
    while text.matches("tick").count() < 3 {
        let len = out.read(&mut bytes).unwrap();
        assert!(len > 0, "it ended: {text}");
        text.push_str(std::str::from_utf8(&bytes[..len]).unwrap());
    }
    let said = dir.refused(4, &["console", "web"]);
    assert!(said.contains("somebody else is connected"), "{said}");
    let said = dir.refused(4, &["console", "web", "--serial", "1"]);
    assert!(said.contains("type null"), "{said}");
    let said = dir.refused(2, &["console", "web", "--serial", "2"]);
    assert!(said.contains("it has 2"), "{said}");
    dir.json(&["stop", "web"]);
    // The guest hung up.
    assert!(console.wait().unwrap().success());
    drop(guest);

    dir.write(
        "log.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), ""),
    );
    let guest = dir.run(&["log.xml"]);
    Serial::at(dir.join("serial")).wait_for_tick(2);
    let mut command = dir.vmstow_command();
    command.args(["console", "web"]).stdin(Stdio::null());
    let mut console = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the guest to count on", PATIENCE, || {
        let tick = Serial::at(dir.join("serial")).last_tick();
        (tick > 3).then_some(()).ok_or(format!("{tick}"))
    });
    guest.qemu.kill();
    let mut text = String::new();
    console
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(console.wait().unwrap().success());
    assert_eq!(text, Serial::at(dir.join("serial")).text());
}

// Displays.

#[test]
fn a_guest_with_spice_and_qxl_is_saved_and_goes_on() {
    let dir = TestDir::new();
    let devices =
        "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <graphics type='spice'><listen type='socket'/></graphics>
    <sound model='ich9'/>
    <video><model type='qxl'/></video>";
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), devices);
    dir.write("web.xml", &xml.replace("machine='pc'", "machine='q35'"));
    let guest = dir.run(&["web.xml"]);
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);
    let spice = |guest: &Restored| guest.qmp().command("query-spice", json!({}));
    assert_eq!(spice(&guest)["enabled"], true);
    dir.json(&["save", "web", "web.stow"]);
    guest.qemu.wait_for_exit();
    let before = serial.mark();
    let manifest = dir.json(&["inspect", "web.stow"])["manifest"].to_string();
    assert!(manifest.contains("/qxl\""), "{manifest}");
    let display = dir.join("display.sock");
    let remap = format!("display:*=unix:{}", display.display());
    let restored = dir.restore(&["web.stow", "--remap", &remap]);
    serial.assert_goes_on(&before);
    assert_eq!(spice(&restored)["enabled"], true);
    assert!(display.exists());
    dir.json(&["stop", "web"]);
}

// What works for a guest beside QEMU.

#[test]
fn the_emulator_of_a_tpm_ends_with_its_guest_however_that_ends() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), TPM),
    );
    for end in ["stop", "quit", "kill"] {
        let guest = dir.run(&["web.xml", "--remap", "tpm:tpm0=its-state"]);
        let tpms = guest.qmp().command("query-tpm", json!({}));
        assert_eq!(tpms[0]["model"], "tpm-tis", "{tpms}");
        assert_eq!(programs(&dir, "swtpm").len(), 1);
        match end {
            "stop" => drop(dir.json(&["stop", "web"])),
            "quit" => drop(guest.qmp().command("quit", json!({}))),
            _ => guest.qemu.kill(),
        }
        guest.qemu.wait_for_exit();
        wait_until_nothing_runs(&dir);
        assert_eq!(dir.json(&["list"])["guests"], json!([]));
        assert_eq!(guests(&dir), [""; 0]);
        assert!(dir.join("its-state/tpm2-00.permall").exists(), "{end}");
    }
}

#[test]
fn a_tpm_goes_on_with_what_is_in_the_image_whatever_its_directory_holds() {
    let dir = TestDir::new();
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), TPM);
    dir.write("web.xml", &xml);
    let guest = dir.run(&["web.xml"]);
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(2);
    let state = dir.join("state/vmstow/tpm/web/tpm0");
    let kept = || std::fs::read(state.join("tpm2-00.permall")).unwrap_or_default();
    dir.json(&["save", "web", "web.stow"]);
    guest.qemu.wait_for_exit();
    wait_until_nothing_runs(&dir);
    let (saved, before) = (kept(), serial.mark());
    assert!(saved.len() > 1000, "{}", saved.len());

    std::fs::remove_dir_all(&state).unwrap();
    let restored = dir.restore(&["web.stow"]);
    serial.assert_goes_on(&before);
    let manifest = dir.json(&["inspect", "web.stow"]);
    let program = &manifest["manifest"]["qemu"]["side_programs"][0]["name"];
    assert_eq!(program, "tpm0", "{manifest:#}");
    assert!(kept() == saved, "the TPM is another one");
    dir.json(&["save", "web", "again.stow"]);
    restored.qemu.wait_for_exit();
    let xml = dir.xml_in("again.stow");
    assert!(xml.contains("<tpm model='tpm-tis'>"), "{xml}");

    let before = serial.mark();
    // Another directory holds what the image holds too.
    let moved = dir.join("moved");
    let remap = format!("tpm:tpm0={}", moved.display());
    let lazy = dir.restore(&["again.stow", "--lazy", "--wait", "--remap", &remap]);
    serial.assert_goes_on(&before);
    let there = std::fs::read(moved.join("tpm2-00.permall")).unwrap();
    assert!(there == saved, "the TPM is another one");
    assert_eq!(programs(&dir, "swtpm").len(), 1);
    dir.json(&["stop", "web"]);
    lazy.qemu.wait_for_exit();
    wait_until_nothing_runs(&dir);

    // Clones have TPMs of their own, from the same beginning.
    let clones = dir.json(&["restore", "again.stow", "--count", "2", "--throwaway"]);
    let clones: Vec<Restored> = clones["guests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|report| Restored::of(report.clone()))
        .collect();
    assert_eq!(programs(&dir, "swtpm").len(), 2);
    for clone in &clones {
        let tpm = dir
            .join("run")
            .join(clone.name())
            .join("tpm0.state/tpm2-00.permall");
        assert!(tpm.exists(), "{}", tpm.display());
        dir.json(&["stop", clone.name()]);
    }
    wait_until_nothing_runs(&dir);
}

#[test]
fn a_guest_whose_starter_was_killed_is_stopped_with_all_that_works_for_it() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), TPM),
    );
    // A QEMU that never answers, but tells what it is.
    let qemu = Qemu::V10.program();
    let wait = dir.join("wait");
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *tpm*) touch {wait}; exec sleep 600;; esac\nexec {qemu} \"$@\"\n",
        wait = wait.display(),
        qemu = qemu.display()
    );
    let slow = write_program(&dir, "slow-qemu", &text);
    let mut command = dir.vmstow_command();
    command.args(["run", "web.xml", "--qemu", slow.to_str().unwrap()]);
    let mut starter = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let noted = dir.join("run/web/guest.json");
    wait_until("the guest to be noted", PATIENCE, || {
        let is_there = noted.exists() && wait.exists();
        is_there
            .then_some(())
            .ok_or_else(|| format!("{:?}", guests(&dir)))
    });
    starter.kill().unwrap();
    starter.wait().unwrap();
    assert_eq!(programs(&dir, "swtpm").len(), 1);
    let stopped = dir.json(&["stop", "web"]);
    assert_eq!(stopped["how"], "terminated");
    wait_until_nothing_runs(&dir);
    assert_eq!(guests(&dir), [""; 0]);
}

#[test]
fn a_killed_attendant_takes_its_programs_along() {
    let dir = TestDir::new();
    dir.write(
        "web.xml",
        &counter_xml(&dir, &serial_into(&dir, "serial"), TPM),
    );
    let guest = dir.run(&["web.xml"]);
    let swtpm = Adopted(programs(&dir, "swtpm").remove(0));
    let attendants = programs(&dir, "vmstow");
    assert_eq!(attendants.len(), 1, "{attendants:#?}");
    attendants[0].signal(Signal::KILL);
    swtpm.wait_for_exit();
    dir.json(&["stop", "web"]);
    guest.qemu.wait_for_exit();
}

/// The one in C, which Debian 12 has with QEMU 7.2.
fn virtiofsd() -> PathBuf {
    let program = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/test-assets/qemu-7.2/usr/lib/qemu/virtiofsd");
    assert!(
        program.exists(),
        "{} is missing: run tests/setup.sh",
        program.display()
    );
    program
}

/// Makes a program of a script.
fn write_program(dir: &TestDir, name: &str, script: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_share_has_a_virtiofsd_that_ends_with_its_guest() {
    let dir = TestDir::new();
    std::fs::create_dir(dir.join("share")).unwrap();
    let share = format!(
        "<filesystem type='mount'>
           <driver type='virtiofs'/>
           <binary path='{}' xattr='on'><sandbox mode='chroot'/></binary>
           <source dir='{}'/>
           <target dir='tag'/>
         </filesystem>",
        virtiofsd().display(),
        dir.join("share").display()
    );
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), &share);
    let memory =
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><vcpu>";
    dir.write("web.xml", &xml.replace("<vcpu>", memory));
    let guest = dir.run(&["web.xml"]);
    Serial::at(dir.join("serial")).wait_for_tick(2);
    assert!(!programs(&dir, "virtiofsd").is_empty());
    // This one cannot hand over its state, which is told before the guest is stopped.
    let said = dir.refused(4, &["save", "web", "web.stow"]);
    assert!(
        said.contains("runs on as before") && said.contains("share \"fs0\""),
        "{said}"
    );
    guest.qemu.kill();
    wait_until_nothing_runs(&dir);
}

// All of it.

/// Devices of a desktop of today; its files lie in `at`.
fn everything_xml(at: &Path, serial: &str) -> String {
    let at = |name: &str| at.join(name).display().to_string();
    let os = format!(
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{}</nvram>",
        at("vars.fd")
    );
    let devices = format!(
        "<disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='{}'/>
      <target dev='sda' bus='scsi'/>
      <readonly/>
    </disk>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <interface type='user'><mac address='52:54:00:12:34:56'/><model type='virtio'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <input type='tablet' bus='usb'/>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='{}'/></backend></tpm>
    <graphics type='vnc' socket='{}'/>
    <video><model type='vga' vram='16384'/></video>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'/>",
        at("disk.img"),
        at("cd.iso"),
        at("tpm"),
        at("vnc.sock"),
    );
    linux_xml(serial, 512, &os, &devices)
}

#[test]
fn a_guest_with_everything_is_saved_and_goes_on_from_other_places() {
    let dir = TestDir::new();
    let (old, new) = (dir.join("old"), dir.join("new"));
    std::fs::create_dir(&old).unwrap();
    File::create(old.join("disk.img"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    File::create(old.join("cd.iso"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    dir.write(
        "all.xml",
        &everything_xml(&old, &serial_into(&dir, "serial")),
    );
    let guest = dir.run(&["all.xml"]);
    let serial = Serial::at(dir.join("serial"));
    // The firmware takes its time, more so on a busy machine.
    wait_until("Linux to begin", PATIENCE * 3, || {
        let text = serial.text();
        if text.contains("vmstow linux guest") {
            Ok(())
        } else {
            Err(text)
        }
    });
    serial.wait_for_line("the network", |line| line == "net ok");
    serial.wait_for_line("the disk", |line| line == "disk ok");
    serial.wait_for_tick(12);
    assert_eq!(
        std::fs::metadata(old.join("vars.fd")).unwrap().len(),
        540_672
    );
    assert_eq!(
        guest.qmp().command("query-tpm", json!({}))[0]["model"],
        "tpm-crb"
    );

    dir.json(&["save", "linux", "all.stow"]);
    guest.qemu.wait_for_exit();
    wait_until_nothing_runs(&dir);
    let before = serial.mark();
    std::fs::rename(&old, &new).unwrap();
    let said = dir.refused(4, &["restore", "all.stow"]);
    assert!(said.contains("disk.img"), "{said}");
    let remaps = ["disk", "cdrom", "firmware"]
        .map(|kind| format!("{kind}:{}/={}/", old.display(), new.display()));
    let mut arguments = vec!["restore", "all.stow", "--remap", "net:*=user"];
    arguments.extend(remaps.iter().flat_map(|remap| ["--remap", remap]));
    let vnc = old.clone();
    std::fs::create_dir(&vnc).unwrap(); // where its VNC socket goes
    let restored = Restored::of(dir.json(&arguments));
    serial.assert_goes_on_to(&before, before.last_tick() + 12);
    serial.wait_for_new_line(&before, "the network", |line| line == "net ok");
    serial.wait_for_new_line(&before, "the disk", |line| line == "disk ok");
    assert_eq!(
        restored.qmp().command("query-tpm", json!({}))[0]["model"],
        "tpm-crb"
    );
    assert_eq!(programs(&dir, "swtpm").len(), 1);
    let opened = restored.qmp().command("query-named-block-nodes", json!({}));
    assert!(
        !opened
            .to_string()
            .contains(&old.join("disk.img").display().to_string())
    );
    dir.json(&["stop", "linux"]);
    restored.qemu.wait_for_exit();
    wait_until_nothing_runs(&dir);
}
