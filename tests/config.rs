//! Three guests as people start them: what is restored, what they need, what their domain XML is. QEMU itself judges
//! the restore arguments.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmstow::config::compat::{GuestNeeds, HostFacts, QemuVersion};
use vmstow::config::{
    Arguments, DomainFacts, ResourceTable, RestoreContext, compat, domain_xml, restore_arguments,
};

const BY_HAND: &[&str] = &[
    "qemu-system-x86_64",
    "-enable-kvm",
    "-m",
    "512",
    "-smp",
    "2",
    "-drive",
    "file=disk,,one.qcow2,if=virtio,format=qcow2",
    "-netdev",
    "user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22",
    "-device",
    "virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56",
    "-serial",
    "file:serial.log",
    "-monitor",
    "unix:/tmp/mon,server,nowait",
    "-qmp",
    "unix:/tmp/qmp,server=on,wait=off",
    "-daemonize",
    "-pidfile",
    "/tmp/pid",
];

const Q35_JSON: &[&str] = &[
    "/usr/bin/qemu-system-x86_64",
    "-name",
    "guest=db,debug-threads=on",
    "-machine",
    "q35,accel=tcg,smm=off",
    "-cpu",
    "Nehalem,+aes,hv-time=on",
    "-m",
    "size=1G",
    "-nodefaults",
    "-uuid",
    "8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1",
    "-blockdev",
    r#"{"driver":"file","filename":"/srv/db.raw","node-name":"store","read-only":false}"#,
    "-blockdev",
    r#"{"driver":"raw","file":"store","node-name":"fmt"}"#,
    "-device",
    r#"{"driver":"pcie-root-port","id":"rp1","bus":"pcie.0","addr":"0x2","chassis":1,"port":16}"#,
    "-device",
    r#"{"driver":"virtio-blk-pci","id":"vda","drive":"fmt","bus":"rp1","addr":"0x0","bootindex":1,"serial":"S1"}"#,
    "-object",
    r#"{"qom-type":"rng-random","id":"rng0","filename":"/dev/urandom"}"#,
    "-device",
    r#"{"driver":"virtio-rng-pci","id":"rngdev","rng":"rng0","bus":"pcie.0","addr":"0x3"}"#,
    "-chardev",
    "stdio,id=con,mux=on,signal=off",
    "-mon",
    "chardev=con",
    "-device",
    r#"{"driver":"isa-serial","chardev":"con","id":"s0"}"#,
    "-chardev",
    "socket,id=qmp,path=/tmp/qmp,server=on,wait=off",
    "-mon",
    "chardev=qmp,mode=control",
    "-vnc",
    "127.0.0.1:7",
    "-sandbox",
    "off",
];

const UEFI: &[&str] = &[
    "qemu-system-x86_64",
    "-M",
    "q35",
    "-m",
    "256",
    "-drive",
    "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
    "-drive",
    "if=pflash,format=raw,file=vars.fd",
    "-cdrom",
    "install.iso",
    "-boot",
    "order=dc,menu=on",
    "-nographic",
    "-usb",
    "-device",
    "usb-tablet",
    "-nic",
    "tap,ifname=tap0,script=no,downscript=no,model=e1000",
    "-rtc",
    "base=localtime",
    "-no-reboot",
];

fn context(machine_type: &str) -> RestoreContext {
    RestoreContext {
        machine_type: machine_type.into(),
        qmp_socket: "/run/vmstow/g/qmp.sock".into(),
        log_dir: "/run/vmstow/g".into(),
        name: "g".into(),
    }
}

/// One argument a line, as a person would break a long command.
fn restored(words: &[&str], machine_type: &str) -> String {
    let kept = Arguments::parse(words).unwrap();
    let context = context(machine_type);
    let once = restore_arguments(&kept, &context, &[]).unwrap();
    let again = Arguments::parse(&once).unwrap();
    assert_eq!(restore_arguments(&again, &context, &[]).unwrap(), once);
    let items = Arguments::parse(&once).unwrap().items;
    let lines: Vec<String> = items.iter().map(|item| item.shown()).collect();
    lines.join("\n")
}

fn table(words: &[&str], machine_type: &str) -> ResourceTable {
    ResourceTable::from_arguments(&Arguments::parse(words).unwrap(), Some(machine_type))
}

fn xml(words: &[&str], machine_type: &str, uuid: Option<&str>) -> String {
    let facts = DomainFacts {
        name: "g".into(),
        uuid: uuid.map(|uuid| uuid.parse().unwrap()),
        memory_bytes: 512 << 20,
        vcpus: 2,
        max_vcpus: 2,
        topology: Some((2, 1, 1)),
        machine_type: machine_type.into(),
        accelerator: "tcg".into(),
        emulator: "/usr/bin/qemu-system-x86_64".into(),
        directory: "/srv/vm".into(),
        places: Default::default(),
    };
    let arguments = Arguments::parse(words).unwrap();
    domain_xml(&arguments, &table(words, machine_type), &facts)
}

/// `kind id → type path` a line.
fn resources(words: &[&str], machine_type: &str) -> String {
    let table = table(words, machine_type);
    let json = serde_json::to_string(&table).unwrap();
    assert_eq!(serde_json::from_str::<ResourceTable>(&json).unwrap(), table);
    let lines = table.resources.iter().map(|resource| {
        let path = resource.backend.path.as_deref().unwrap_or("-");
        let frontend = resource.frontend.as_deref().unwrap_or("-");
        let mode = if resource.read_only { " ro" } else { "" };
        let (kind, id) = (resource.kind.word(), &resource.id);
        format!(
            "{kind} {id} {frontend} -> {} {path}{mode}",
            resource.backend.kind
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_guest_started_by_hand_is_restored() {
    insta::assert_snapshot!(restored(BY_HAND, "pc-i440fx-10.0"), @r#"
-machine pc-i440fx-10.0
-enable-kvm
-m 512
-smp 2
-drive file=disk,,one.qcow2,if=virtio,format=qcow2
-netdev user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22
-device virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56
-chardev file,id=vmstow-serial0,path=serial.log,append=on
-serial chardev:vmstow-serial0
-display none
-name guest=g
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-chardev socket,id=vmstow-qmp,path=/run/vmstow/g/qmp.sock,server=on,wait=off
-mon id=vmstow-monitor,chardev=vmstow-qmp,mode=control
-S
-incoming defer
"#);
}

#[test]
fn a_guest_of_json_arguments_is_restored() {
    insta::assert_snapshot!(restored(Q35_JSON, "pc-q35-10.0"), @r#"
-machine pc-q35-10.0,accel=tcg,smm=off
-cpu Nehalem,+aes,hv-time=on
-m size=1G
-nodefaults
-uuid 8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1
-blockdev {"driver":"file","filename":"/srv/db.raw","node-name":"store","read-only":false}
-blockdev {"driver":"raw","file":"store","node-name":"fmt"}
-device {"driver":"pcie-root-port","id":"rp1","bus":"pcie.0","addr":"0x2","chassis":1,"port":16}
-device {"driver":"virtio-blk-pci","id":"vda","drive":"fmt","bus":"rp1","addr":"0x0","bootindex":1,"serial":"S1"}
-object {"qom-type":"rng-random","id":"rng0","filename":"/dev/urandom"}
-device {"driver":"virtio-rng-pci","id":"rngdev","rng":"rng0","bus":"pcie.0","addr":"0x3"}
-chardev file,id=vmstow-log-con,path=/run/vmstow/g/con.log,append=on,mux=on
-device {"chardev":"vmstow-log-con","driver":"isa-serial","id":"s0"}
-vnc 127.0.0.1:7
-display none
-name guest=g,debug-threads=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-chardev socket,id=vmstow-qmp,path=/run/vmstow/g/qmp.sock,server=on,wait=off
-mon id=vmstow-monitor,chardev=vmstow-qmp,mode=control
-S
-incoming defer
"#);
}

#[test]
fn a_uefi_guest_on_a_terminal_is_restored() {
    insta::assert_snapshot!(restored(UEFI, "pc-q35-10.0"), @r#"
-M pc-q35-10.0,graphics=off
-m 256
-drive if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd
-drive if=pflash,format=raw,file=vars.fd
-cdrom install.iso
-boot order=dc,menu=on
-usb
-device usb-tablet
-nic tap,ifname=tap0,script=no,downscript=no,model=e1000
-rtc base=localtime
-no-reboot
-display none
-chardev file,id=vmstow-log-serial0,path=/run/vmstow/g/serial0.log,append=on
-serial chardev:vmstow-log-serial0
-name guest=g
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-chardev socket,id=vmstow-qmp,path=/run/vmstow/g/qmp.sock,server=on,wait=off
-mon id=vmstow-monitor,chardev=vmstow-qmp,mode=control
-S
-incoming defer
"#);
}

#[test]
fn the_resources_of_all_three_are_found() {
    insta::assert_snapshot!(resources(BY_HAND, "pc-i440fx-10.0"), @r#"
disk virtio0 virtio -> file disk,one.qcow2
nic net0 virtio-net-pci -> user -
chardev serial0 serial0 -> file serial.log
"#);
    insta::assert_snapshot!(resources(Q35_JSON, "pc-q35-10.0"), @r#"
disk vda virtio-blk-pci -> file /srv/db.raw
chardev con isa-serial -> stdio -
display display0 - -> vnc -
"#);
    insta::assert_snapshot!(resources(UEFI, "pc-q35-10.0"), @r#"
firmware pflash0 pflash -> file /usr/share/OVMF/OVMF_CODE_4M.fd ro
firmware pflash1 pflash -> file vars.fd
cdrom ide2-cd0 ide -> file install.iso ro
nic nic0 e1000 -> tap -
chardev serial0 serial0 -> stdio -
"#);
}

#[test]
fn the_resource_table_is_this_json() {
    let json = serde_json::to_string_pretty(&table(Q35_JSON, "pc-q35-10.0")).unwrap();
    insta::assert_snapshot!(json, @r#"
[
  {
    "kind": "disk",
    "id": "vda",
    "aliases": [
      "fmt"
    ],
    "frontend": "virtio-blk-pci",
    "backend": {
      "type": "file",
      "path": "/srv/db.raw",
      "format": "raw",
      "is_server": false
    },
    "read_only": false,
    "argument": 6
  },
  {
    "kind": "chardev",
    "id": "con",
    "aliases": [
      "s0"
    ],
    "frontend": "isa-serial",
    "backend": {
      "type": "stdio",
      "is_server": false
    },
    "read_only": false,
    "argument": 12
  },
  {
    "kind": "display",
    "id": "display0",
    "backend": {
      "type": "vnc",
      "is_server": true,
      "listens": [
        "tcp:127.0.0.1:5907"
      ]
    },
    "read_only": false,
    "argument": 17
  }
]
"#);
}

#[test]
fn the_domain_xml_of_a_guest_started_by_hand() {
    insta::assert_snapshot!(xml(BY_HAND, "pc-i440fx-10.0", None), @r#"
<domain type="qemu">
  <name>g</name>
  <metadata>
    <vmstow:unmodelled xmlns:vmstow="urn:vmstow:1">
      <vmstow:default-devices/>
      <vmstow:property index="4">hostfwd=tcp:127.0.0.1:2222-:22</vmstow:property>
    </vmstow:unmodelled>
  </metadata>
  <memory unit="b">536870912</memory>
  <currentMemory unit="b">536870912</currentMemory>
  <vcpu placement="static">2</vcpu>
  <os>
    <type arch="x86_64" machine="pc-i440fx-10.0">hvm</type>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu>
    <topology sockets="2" cores="1" threads="1"/>
  </cpu>
  <clock offset="utc"/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2"/>
      <source file="/srv/vm/disk,one.qcow2"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <controller type="usb" index="0" model="none"/>
    <interface type="user">
      <mac address="52:54:00:12:34:56"/>
      <model type="virtio"/>
    </interface>
    <serial type="file">
      <source path="/srv/vm/serial.log" append="on"/>
      <target port="0"/>
    </serial>
    <video>
      <model type="vga"/>
    </video>
    <memballoon model="none"/>
  </devices>
</domain>
"#);
}

#[test]
fn the_domain_xml_of_a_guest_of_json_arguments() {
    let uuid = "8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1";
    insta::assert_snapshot!(xml(Q35_JSON, "pc-q35-10.0", Some(uuid)), @r#"
<domain type="qemu">
  <name>g</name>
  <uuid>8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1</uuid>
  <metadata>
    <vmstow:unmodelled xmlns:vmstow="urn:vmstow:1">
      <vmstow:property index="12">mux=on,signal=off</vmstow:property>
    </vmstow:unmodelled>
  </metadata>
  <memory unit="b">536870912</memory>
  <currentMemory unit="b">536870912</currentMemory>
  <vcpu placement="static">2</vcpu>
  <os>
    <type arch="x86_64" machine="pc-q35-10.0">hvm</type>
  </os>
  <features>
    <acpi/>
    <smm state="off"/>
  </features>
  <cpu mode="custom" match="exact" check="none">
    <model fallback="forbid">Nehalem</model>
    <topology sockets="2" cores="1" threads="1"/>
    <feature policy="require" name="aes"/>
  </cpu>
  <clock offset="utc">
    <timer name="hypervclock" present="yes"/>
  </clock>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw"/>
      <source file="/srv/db.raw"/>
      <target dev="vda" bus="virtio"/>
      <serial>S1</serial>
      <boot order="1"/>
      <alias name="ua-vda"/>
      <address type="pci" domain="0x0000" bus="0x01" slot="0x00" function="0x0"/>
    </disk>
    <controller type="pci" index="1" model="pcie-root-port">
      <target chassis="1" port="16"/>
      <alias name="ua-rp1"/>
      <address type="pci" domain="0x0000" bus="0x00" slot="0x02" function="0x0"/>
    </controller>
    <controller type="usb" index="0" model="none"/>
    <serial type="stdio">
      <target type="isa-serial"/>
      <alias name="ua-s0"/>
    </serial>
    <graphics type="vnc" port="5907" autoport="no">
      <listen type="address" address="127.0.0.1"/>
    </graphics>
    <video>
      <model type="none"/>
    </video>
    <rng model="virtio">
      <backend model="random">/dev/urandom</backend>
      <alias name="ua-rngdev"/>
      <address type="pci" domain="0x0000" bus="0x00" slot="0x03" function="0x0"/>
    </rng>
    <memballoon model="none"/>
  </devices>
</domain>
"#);
}

#[test]
fn the_domain_xml_of_a_uefi_guest() {
    insta::assert_snapshot!(xml(UEFI, "pc-q35-10.0", None), @r#"
<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>g</name>
  <metadata>
    <vmstow:unmodelled xmlns:vmstow="urn:vmstow:1">
      <vmstow:default-devices/>
      <vmstow:argument index="6">-nographic</vmstow:argument>
    </vmstow:unmodelled>
  </metadata>
  <memory unit="b">536870912</memory>
  <currentMemory unit="b">536870912</currentMemory>
  <vcpu placement="static">2</vcpu>
  <os>
    <type arch="x86_64" machine="pc-q35-10.0">hvm</type>
    <loader readonly="yes" type="pflash">/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram>/srv/vm/vars.fd</nvram>
    <boot dev="cdrom"/>
    <boot dev="hd"/>
    <bootmenu enable="yes"/>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu>
    <topology sockets="2" cores="1" threads="1"/>
  </cpu>
  <clock offset="localtime"/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="cdrom">
      <source file="/srv/vm/install.iso"/>
      <target dev="sda" bus="sata"/>
      <readonly/>
    </disk>
    <controller type="usb" index="0"/>
    <interface type="ethernet">
      <target dev="tap0" managed="no"/>
      <model type="e1000"/>
    </interface>
    <serial type="stdio">
      <target port="0"/>
    </serial>
    <input type="tablet" bus="usb"/>
    <video>
      <model type="vga"/>
    </video>
    <memballoon model="none"/>
  </devices>
  <qemu:commandline>
    <qemu:arg value="-nographic"/>
  </qemu:commandline>
</domain>
"#);
}

#[test]
fn what_a_host_lacks_is_told_at_once() {
    let guest = GuestNeeds {
        machine_type: "pc-q35-10.1".into(),
        qemu_version: QemuVersion(10, 1, 0),
        minimum_qemu: None,
        accelerator: "kvm".into(),
        memory_bytes: 1 << 30,
        resources: table(Q35_JSON, "pc-q35-10.1"),
        fingerprints: Default::default(),
        drifted: Default::default(),
    };
    let host = HostFacts {
        qemu_path: "qemu-system-x86_64".into(),
        qemu_version: Some(QemuVersion(10, 0, 2)),
        accelerators: ["tcg".to_owned()].into(),
        files: [("/srv/db.raw".to_owned(), compat::FileFact::Missing)].into(),
        busy_ports: ["tcp:127.0.0.1:5907".to_owned()].into(),
        ..HostFacts::default()
    };
    let findings = compat::check(&guest, &host);
    insta::assert_snapshot!(serde_json::to_string_pretty(&findings).unwrap(), @r#"
[
  {
    "code": "machine.unknown",
    "level": "refusal",
    "fact": "machine type \"pc-q35-10.1\" is unknown to QEMU 10.0.2 (qemu-system-x86_64)",
    "fix": "--qemu PATH, naming a QEMU of at least 10.1"
  },
  {
    "code": "accel.missing",
    "level": "refusal",
    "fact": "accelerator \"kvm\" does not work on this host"
  },
  {
    "code": "file.missing",
    "level": "refusal",
    "fact": "disk \"vda\" needs /srv/db.raw, which is missing",
    "fix": "--remap disk:vda=PATH"
  },
  {
    "code": "port.busy",
    "level": "refusal",
    "fact": "display \"display0\": tcp:127.0.0.1:5907 is in use",
    "fix": "--remap display:display0=unix:PATH"
  }
]
"#);
}

/// QEMU takes the restore arguments and waits for its stream.
#[test]
fn qemu_accepts_restore_arguments_and_waits() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let context = RestoreContext {
        machine_type: "pc-i440fx-7.2".into(),
        qmp_socket: path("qmp.sock"),
        log_dir: dir.path().to_str().unwrap().to_owned(),
        name: "a,b".into(),
    };
    std::fs::write(path("disk.img"), [0; 4096]).unwrap();
    std::fs::write(path("serial,1.log"), "before\n").unwrap();
    let (disk, serial) = (path("disk.img"), format!("file:{}", path("serial,1.log")));
    let words = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-nographic",
        "-serial",
        &serial,
        "-serial",
        "mon:stdio",
        "-m",
        "32",
        "-drive",
        &format!("file={disk},format=raw,if=virtio"),
        "-cdrom",
        &disk,
        "-netdev",
        "user,id=n",
        "-device",
        "e1000,netdev=n",
    ];
    let kept = Arguments::parse(&words).unwrap();
    let remaps = ["cdrom:*=eject".parse().unwrap()];
    let words = restore_arguments(&kept, &context, &remaps).unwrap();
    let mut qemu = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-system-x86_64: install the Debian package qemu-system-x86");
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut socket = loop {
        if let Ok(socket) = std::os::unix::net::UnixStream::connect(&context.qmp_socket) {
            break socket;
        }
        let is_alive = qemu.try_wait().unwrap().is_none();
        if !is_alive || Instant::now() > deadline {
            qemu.kill().ok();
            let output = qemu.wait_with_output().unwrap();
            panic!("{}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    use std::io::{Read, Write};
    let commands = r#"{"execute":"qmp_capabilities"}{"execute":"query-status"}{"execute":"quit"}"#;
    socket.write_all(commands.as_bytes()).unwrap();
    let mut replies = String::new();
    socket.read_to_string(&mut replies).ok();
    qemu.wait().unwrap();
    assert!(replies.contains(r#""status": "inmigrate""#), "{replies}");
    let serial = std::fs::read_to_string(path("serial,1.log")).unwrap();
    assert!(serial.starts_with("before\n"), "{serial}");
    assert!(std::path::Path::new(&path("serial1.log")).exists());
}
