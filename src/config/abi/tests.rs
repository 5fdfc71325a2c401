use super::*;
use crate::config::arguments::Arguments;
use crate::config::remap;
use crate::config::resources::ResourceTable;

const XML: &str = r#"<domain type="qemu">
  <name>web01</name>
  <uuid>8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1</uuid>
  <memory unit="b">67108864</memory>
  <vcpu placement="static">1</vcpu>
  <os>
    <type arch="x86_64" machine="pc-q35-10.0">hvm</type>
    <loader readonly="yes" type="pflash">/fw/code.fd</loader>
    <nvram>/fw/vars.fd</nvram>
  </os>
  <features><acpi/></features>
  <cpu mode="custom" match="exact" check="none"><model fallback="forbid">qemu64</model><feature policy="require" name="avx"/></cpu>
  <clock offset="utc"/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" cache="none"/>
      <source file="/a.qcow2"/>
      <target dev="vda" bus="virtio"/>
      <address type="pci" domain="0x0000" bus="0x01" slot="0x00" function="0x0"/>
    </disk>
    <disk type="file" device="cdrom">
      <source file="/a.iso"/>
      <target dev="sda" bus="sata"/>
      <readonly/>
      <alias name="ua-cd0"/>
    </disk>
    <interface type="user">
      <mac address="52:54:00:AA:BB:CC"/>
      <model type="virtio"/>
      <alias name="ua-net0"/>
    </interface>
    <serial type="pty"><target port="0"/></serial>
    <console type="pty"><target type="serial" port="0"/></console>
    <channel type="unix"><source mode="bind" path="/run/agent"/><target type="virtio" name="org.qemu.guest_agent.0"/><alias name="ua-agent"/></channel>
    <graphics type="vnc" port="5901" autoport="no"><listen type="address" address="127.0.0.1"/></graphics>
    <video><model type="vga"/></video>
    <memballoon model="none"/>
  </devices>
</domain>
"#;

const ARGUMENTS: &str = "qemu -machine pc-q35-10.0,pflash0=code,pflash1=vars \
    -blockdev driver=file,node-name=code,filename=/fw/code.fd,read-only=on \
    -blockdev driver=file,node-name=vars,filename=/fw/vars.fd \
    -blockdev driver=file,node-name=f,filename=/a.qcow2 -blockdev driver=qcow2,node-name=q,file=f \
    -device virtio-blk-pci,drive=q,id=virtio-disk0 \
    -drive file=/a.iso,if=none,id=cd,media=cdrom -device ide-cd,drive=cd,id=cd0 \
    -netdev user,id=hostnet0 -device virtio-net-pci,netdev=hostnet0,id=net0 -serial pty \
    -chardev socket,id=charagent,path=/run/agent,server=on,wait=off -device virtserialport,chardev=charagent,id=agent \
    -vnc 127.0.0.1:1";

fn compared(changes: &[(&str, &str)]) -> Comparison {
    let mut new = XML.to_owned();
    for (from, to) in changes {
        assert!(new.contains(from), "{from}");
        new = new.replacen(from, to, 1);
    }
    let parse = |xml: &str| Document::parse(xml.as_bytes()).unwrap();
    compare(&parse(XML), &parse(&new))
}

fn only_class(from: &str, to: &str) -> Class {
    let changes = compared(&[(from, to)]).changes;
    let [change] = &changes[..] else {
        panic!("{from} → {to}: {changes:#?}");
    };
    change.class
}

/// The remaps that a change becomes, as text, and what becomes of the arguments.
fn carried(changes: &[(&str, &str)]) -> Result<(Vec<String>, String), Vec<String>> {
    let words: Vec<&str> = ARGUMENTS.split_whitespace().collect();
    let arguments = Arguments::parse(&words).unwrap();
    let table = ResourceTable::from_arguments(&arguments, Some("pc-q35-10.0"));
    let carried = carry_over(&compared(changes), &table);
    let carried = carried.map_err(|why| why.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let remapped = remap::apply(&arguments, Some("pc-q35-10.0"), &carried.remaps).unwrap();
    let remaps = carried.remaps.iter().map(ToString::to_string).collect();
    Ok((remaps, remapped.arguments.write().join(" ")))
}

#[test]
fn how_it_is_written_is_no_difference() {
    for (from, to) in [
        (
            "<memory unit=\"b\">67108864</memory>",
            "<memory unit='MiB'> 64 </memory>",
        ),
        (
            "<memory unit=\"b\">67108864</memory>",
            "<memory>65536</memory>",
        ),
        (" placement=\"static\"", ""),
        ("52:54:00:AA:BB:CC", "52:54:00:aa:bb:cc"),
        ("8e1c6dc5-5f4c", "8E1C6DC5-5F4C"),
        (
            " domain=\"0x0000\" bus=\"0x01\" slot=\"0x00\" function=\"0x0\"",
            " slot='0' bus='1'",
        ),
        ("type=\"file\" device=\"disk\"", "type=\"file\""),
        ("<features>", "<!-- what it can --><features>\n\n"),
        (
            "<console type=\"pty\">",
            "<console type=\"pty\" tty=\"/dev/pts/3\">",
        ),
        (
            "<domain type=\"qemu\">",
            "<domain type=\"qemu\" id='7' xmlns:x='y'>",
        ),
    ] {
        assert_eq!(compared(&[(from, to)]).changes, [], "{to}");
    }
    // Another order, of elements and of devices that have names.
    let disks = XML.find("<disk ").unwrap()..XML.find("<interface").unwrap();
    let (first, second) = XML[disks.clone()].split_at(XML[disks.clone()].rfind("<disk ").unwrap());
    let swapped = XML.replace(&XML[disks], &format!("{second}{first}"));
    let parse = |xml: &str| Document::parse(xml.as_bytes()).unwrap();
    assert_eq!(compare(&parse(XML), &parse(&swapped)).changes, []);
}

/// The reference of this table: what does not load, what loads with a guest that sees another machine.
#[test]
fn what_the_guest_would_see_is_told() {
    for (from, to) in [
        ("<domain type=\"qemu\">", "<domain type=\"kvm\">"),
        ("f6ff4d5c0a1", "f6ff4d5c0a2"),
        ("67108864", "134217728"),
        (">1</vcpu>", ">2</vcpu>"),
        ("pc-q35-10.0", "pc-q35-9.2"),
        ("<acpi/>", ""),
        ("qemu64", "Nehalem"),
        ("policy=\"require\"", "policy=\"disable\""),
        ("offset=\"utc\"", "offset=\"localtime\""),
        ("slot=\"0x00\"", "slot=\"0x04\""),
        ("dev=\"vda\" bus=\"virtio\"", "dev=\"vda\" bus=\"scsi\""),
        ("<readonly/>", ""),
        ("52:54:00:AA:BB:CC", "52:54:00:AA:BB:CD"),
        ("<model type=\"virtio\"/>", "<model type=\"e1000\"/>"),
        ("org.qemu.guest_agent.0", "org.example.0"),
        (
            "<model type=\"vga\"/>",
            "<model type=\"vga\" vram=\"32768\"/>",
        ),
        (
            "<memballoon model=\"none\"/>",
            "<memballoon model=\"virtio\"/>",
        ),
        (
            "<memballoon model=\"none\"/>",
            "<rng model=\"virtio\"/><memballoon model=\"none\"/>",
        ),
        ("readonly=\"yes\"", "readonly=\"no\""),
        ("cache=\"none\"", "cache=\"writethrough\""),
        ("</devices>", "</devices><something-new/>"),
        (
            "</devices>",
            "</devices><qemu:commandline><qemu:arg value='-s'/></qemu:commandline>",
        ),
    ] {
        assert_eq!(only_class(from, to), Class::Abi, "{to}");
    }
}

#[test]
fn a_change_is_told_with_its_place_its_line_and_both_values() {
    let changes = compared(&[("bus=\"sata\"", "bus=\"ide\""), ("<acpi/>", "")]).changes;
    let told: Vec<String> = changes.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "domain/features/acpi is \"<acpi/>\" and would be gone",
            "line 24: domain/devices/disk[2]/target/@bus is \"sata\" and would be \"ide\"",
        ]
    );
}

#[test]
fn what_the_guest_does_not_see_may_change() {
    for (from, to, class) in [
        ("web01", "web02", Class::Note),
        ("<memory ", "<title>t</title><memory ", Class::Note),
        ("<memory ", "<metadata><x/></metadata><memory ", Class::Note),
        ("/usr/bin/qemu-system-x86_64", "/opt/qemu", Class::Backend),
        ("/fw/vars.fd", "/other/vars.fd", Class::Backend),
        ("/a.qcow2", "/b.qcow2", Class::Backend),
        ("<source file=\"/a.iso\"/>", "", Class::Backend),
        ("cache=\"none\"", "cache=\"writeback\"", Class::Host),
        (
            "cache=\"none\"",
            "cache=\"none\" io=\"native\"",
            Class::Host,
        ),
        (
            "<clock",
            "<on_reboot>destroy</on_reboot><clock",
            Class::Host,
        ),
        (
            "<clock",
            "<cputune><shares>7</shares></cputune><clock",
            Class::Host,
        ),
        ("ua-cd0", "ua-other", Class::Host),
        ("port=\"5901\"", "port=\"5907\"", Class::Backend),
        ("<video>", "<audio id='1' type='none'/><video>", Class::Host),
    ] {
        assert_eq!(only_class(from, to), class, "{to}");
    }
}

#[test]
fn other_backends_become_remaps_that_change_the_arguments() {
    for (from, to, remap, argument) in [
        ("/a.qcow2", "/b", "disk:virtio-disk0=/b", "filename=/b"),
        (
            "type=\"qcow2\"",
            "type=\"raw\"",
            "disk:virtio-disk0=raw:/a.qcow2",
            "driver=raw,node-name=q",
        ),
        (
            "<source file=\"/a.iso\"/>",
            "",
            "cdrom:cd=eject",
            "-drive if=none,id=cd,media=cdrom",
        ),
        ("/a.iso", "/b.iso", "cdrom:cd=/b.iso", "file=/b.iso"),
        (
            "<interface type=\"user\">",
            "<interface type=\"bridge\"><source bridge=\"br1\"/>",
            "net:hostnet0=bridge=br1",
            "-netdev bridge,br=br1,id=hostnet0",
        ),
        (
            "<interface type=\"user\">",
            "<interface type=\"ethernet\"><target dev=\"tap3\" managed=\"no\"/>",
            "net:hostnet0=tap=tap3",
            "ifname=tap3",
        ),
        (
            "<serial type=\"pty\">",
            "<serial type=\"file\"><source path=\"/s\"/>",
            "chardev:serial0=file:/s",
            "-serial file:/s",
        ),
        (
            "/run/agent",
            "/run/agent2",
            "chardev:charagent=unix:/run/agent2",
            "path=/run/agent2",
        ),
        (
            "port=\"5901\"",
            "port=\"5907\"",
            "display:display0=127.0.0.1:5907",
            "-vnc 127.0.0.1:7",
        ),
        (
            "<graphics type=\"vnc\" port=\"5901\" autoport=\"no\"><listen type=\"address\" address=\"127.0.0.1\"/></graphics>",
            "",
            "display:display0=none",
            "",
        ),
        (
            "/fw/vars.fd",
            "/v",
            "firmware:pflash1=/v",
            "node-name=vars,filename=/v",
        ),
        (
            "/fw/code.fd",
            "/c",
            "firmware:pflash0=/c",
            "node-name=code,filename=/c",
        ),
    ] {
        let (remaps, arguments) = carried(&[(from, to)]).unwrap();
        assert_eq!(remaps, [remap]);
        assert!(arguments.contains(argument), "{remap}: {arguments}");
    }
    assert_eq!(carried(&[("web01", "web02")]).unwrap().0, [""; 0]);
}

#[test]
fn a_backend_that_no_remap_can_say_is_refused() {
    for (from, to) in [
        (
            "<interface type=\"user\">",
            "<interface type=\"network\"><source network=\"default\"/>",
        ),
        ("<source file=\"/a.qcow2\"/>", ""),
        (
            "<disk type=\"file\" device=\"disk\">",
            "<disk type=\"network\" device=\"disk\">",
        ),
        (
            "<serial type=\"pty\">",
            "<serial type=\"tcp\"><source mode=\"connect\" host=\"h\" service=\"1\"/>",
        ),
    ] {
        let reasons = carried(&[(from, to)]).unwrap_err();
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert!(reasons[0].starts_with("line "), "{reasons:?}");
    }
}

#[test]
fn the_xml_knows_its_disks_by_other_names() {
    let words: Vec<&str> = ARGUMENTS.split_whitespace().collect();
    let table = ResourceTable::from_arguments(&Arguments::parse(&words).unwrap(), None);
    let names = names_of_disks(&Document::parse(XML.as_bytes()).unwrap(), &table);
    let names: Vec<(&str, &str)> = names
        .iter()
        .map(|(_, name, id)| (name.as_str(), id.as_str()))
        .collect();
    assert_eq!(names, [("vda", "virtio-disk0"), ("sda", "cd")]);
}
