use super::*;

fn table(line: &str, machine_type: &str) -> ResourceTable {
    let words: Vec<&str> = std::iter::once("qemu")
        .chain(line.split_whitespace())
        .collect();
    ResourceTable::from_arguments(&Arguments::parse(&words).unwrap(), Some(machine_type))
}

fn ids(line: &str, machine_type: &str) -> Vec<String> {
    let table = table(line, machine_type);
    table
        .resources
        .iter()
        .map(|r| format!("{}:{}", r.kind.word(), r.id))
        .collect()
}

#[test]
fn drives_without_an_id_are_named_as_qemu_names_them() {
    let line = "-drive file=a,if=virtio -drive file=b,media=cdrom -cdrom c -drive file=d -fda e -drive file=f,if=virtio,index=3";
    assert_eq!(
        ids(line, "pc-i440fx-10.0"),
        [
            "disk:virtio0",
            "cdrom:ide0-cd0",
            "cdrom:ide1-cd0",
            "disk:ide0-hd1",
            "floppy:floppy0",
            "disk:virtio3"
        ]
    );
    assert_eq!(
        ids(line, "pc-q35-10.0"),
        [
            "disk:virtio0",
            "cdrom:ide0-cd0",
            "cdrom:ide2-cd0",
            "disk:ide1-hd0",
            "floppy:floppy0",
            "disk:virtio3"
        ]
    );
}

#[test]
fn every_kind_is_found() {
    let line = "-hda /d -netdev user,id=n -serial pty -virtfs local,path=/s,mount_tag=t,security_model=none -bios /b \
        -kernel /k -initrd /i -chardev socket,id=c,path=/t -tpmdev emulator,id=tpm0,chardev=c -spice port=5930";
    assert_eq!(
        ids(line, "pc"),
        [
            "disk:ide0-hd0",
            "nic:n",
            "chardev:serial0",
            "share:t",
            "firmware:bios",
            "kernel:kernel",
            "kernel:initrd",
            "tpm:tpm0",
            "display:display0"
        ]
    );
}

#[test]
fn sockets_and_ports_that_qemu_takes_are_known() {
    let table = table(
        "-nic user,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:53-:53 -serial tcp:127.0.0.1:4444,server,nowait -vnc :1 -serial unix:/s,server",
        "pc",
    );
    let listens: Vec<&String> = table
        .resources
        .iter()
        .flat_map(|r| &r.backend.listens)
        .collect();
    assert_eq!(
        listens,
        [
            "tcp::2222",
            "udp:127.0.0.1:53",
            "tcp:127.0.0.1:4444",
            "tcp::5901"
        ]
    );
    let socket = table.find(ResourceKind::Chardev, "serial1").unwrap();
    assert!(socket.backend.is_server);
    assert_eq!(socket.backend.path.as_deref(), Some("/s"));
}

#[test]
fn a_monitors_character_device_is_no_resource() {
    assert!(
        ids(
            "-chardev pty,id=m -mon m -chardev pty,id=q -qmp chardev:q",
            "pc"
        )
        .is_empty()
    );
}

#[test]
fn remote_disks_have_no_path() {
    let table = table("-drive file=nbd://host/export,if=virtio", "pc");
    assert_eq!(table.resources[0].backend.kind, "nbd");
    assert_eq!(table.resources[0].backend.path, None);
}

#[test]
fn a_graph_that_loops_ends() {
    let table = table(
        "-blockdev driver=raw,node-name=a,file=b -blockdev driver=raw,node-name=b,file=a -device ide-hd,drive=a",
        "pc",
    );
    assert_eq!(table.resources.len(), 1);
}

#[test]
fn media_that_only_qmp_knows_are_added() {
    let mut table = table("-drive file=/a,if=virtio,format=raw", "pc");
    let facts = serde_json::from_str(
        r##"{"devices":[
            {"device":"ide1-cd0","removable":true,"inserted":{"file":"/x.iso","drv":"raw","ro":true,"node-name":"#block1"}},
            {"device":"virtio0","inserted":{"file":"json:{\"driver\":\"raw\"}","drv":"raw","ro":false}},
            {"device":"floppy0","removable":true}]}"##,
    );
    table.apply_block_facts(&facts.unwrap());
    let cdrom = table.find(ResourceKind::Cdrom, "ide1-cd0").unwrap();
    assert_eq!(
        (cdrom.argument, cdrom.backend.path.as_deref()),
        (None, Some("/x.iso"))
    );
    let disk = table.find(ResourceKind::Disk, "virtio0").unwrap();
    assert_eq!(disk.backend.path.as_deref(), Some("/a"));
    assert_eq!(table.resources.len(), 2);
}
