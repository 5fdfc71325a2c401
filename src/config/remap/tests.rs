use super::*;

fn arguments(line: &str) -> Arguments {
    let words: Vec<&str> = std::iter::once("qemu")
        .chain(line.split_whitespace())
        .collect();
    Arguments::parse(&words).unwrap()
}

fn try_remap(line: &str, remaps: &[&str]) -> Result<Remapped, ConfigError> {
    let remaps: Vec<Remap> = remaps.iter().map(|text| text.parse().unwrap()).collect();
    apply(&arguments(line), None, &remaps)
}

fn remapped(line: &str, remap: &str) -> String {
    try_remap(line, &[remap]).unwrap().arguments.write()[1..].join(" ")
}

#[test]
fn a_disk_gets_another_file_whatever_names_it() {
    for (line, remap, expected) in [
        ("disk.img", "disk:ide0-hd0=/x", "/x"),
        ("-hda /a", "disk:ide0-hd0=/x", "-hda /x"),
        (
            "-drive file=/a,id=vda,if=none",
            "disk:vda=/x,y",
            "-drive file=/x,,y,id=vda,if=none",
        ),
        (
            "-drive file=/a,if=virtio",
            "disk:virtio0=/x",
            "-drive file=/x,if=virtio",
        ),
        (
            "-drive file=/a,id=d,if=none -device ide-hd,drive=d,id=disk0",
            "disk:disk0=/x",
            "-drive file=/x,id=d,if=none -device ide-hd,drive=d,id=disk0",
        ),
        (
            "-blockdev driver=file,node-name=f,filename=/a",
            "disk:f=/dev/sdb",
            "-blockdev driver=host_device,node-name=f,filename=/dev/sdb",
        ),
        (
            r#"-blockdev {"driver":"file","filename":"/a","node-name":"f"} -blockdev {"driver":"qcow2","file":"f","node-name":"q"} -device {"drive":"q","driver":"virtio-blk-pci","id":"vda"}"#,
            "disk:vda=/x",
            r#"-blockdev {"driver":"file","filename":"/x","node-name":"f"} -blockdev {"driver":"qcow2","file":"f","node-name":"q"} -device {"drive":"q","driver":"virtio-blk-pci","id":"vda"}"#,
        ),
        ("-kernel /boot/k", "kernel:kernel=/x", "-kernel /x"),
        ("-bios /b", "firmware:bios=/x", "-bios /x"),
        (
            "-virtfs local,path=/a,mount_tag=t,security_model=none",
            "share:t=/x",
            "-virtfs local,path=/x,mount_tag=t,security_model=none",
        ),
    ] {
        assert_eq!(remapped(line, remap), expected, "{line}");
    }
}

#[test]
fn a_path_prefix_moves_all_below_it() {
    let line = "-hda /old/a -hdb /old/b -hdc /other/c";
    assert_eq!(
        remapped(line, "disk:/old/=/new/"),
        "-hda /new/a -hdb /new/b -hdc /other/c"
    );
}

#[test]
fn a_medium_is_taken_out_and_its_drive_stays() {
    for (line, expected) in [
        ("-cdrom /a.iso", "-drive if=ide,index=2,media=cdrom"),
        (
            "-drive file=/a.iso,media=cdrom,id=c,format=raw",
            "-drive media=cdrom,id=c",
        ),
        (
            "-blockdev driver=file,node-name=f,filename=/a -device ide-cd,drive=f,id=cd0",
            "-device ide-cd,id=cd0",
        ),
    ] {
        assert_eq!(remapped(line, "cdrom:*=eject"), expected);
    }
    assert_eq!(
        remapped("-fda /f", "floppy:floppy0=eject"),
        "-drive if=floppy,index=0"
    );
    assert_eq!(remapped("-m 64", "cdrom:*=eject"), "-m 64");
}

#[test]
fn a_network_gets_another_backend_and_its_nic_stays() {
    for (line, remap, expected) in [
        (
            "-netdev tap,id=n,ifname=t0 -device e1000,netdev=n,mac=52:54:00:1:2:3",
            "net:n=user",
            "-netdev user,id=n -device e1000,netdev=n,mac=52:54:00:1:2:3",
        ),
        (
            "-nic bridge,br=br0,model=e1000,mac=52:54:00:1:2:3",
            "net:nic0=user",
            "-nic user,model=e1000,mac=52:54:00:1:2:3",
        ),
        (
            "-netdev tap,id=n,vhost=on,ifname=t0",
            "net:n=tap=tap3",
            "-netdev tap,ifname=tap3,script=no,downscript=no,id=n,vhost=on",
        ),
        (
            "-netdev tap,id=n",
            "nic:n=bridge=br1",
            "-netdev bridge,br=br1,id=n",
        ),
        (
            "-netdev tap,id=n",
            "net:n=user,restrict=on",
            "-netdev user,restrict=on,id=n",
        ),
        (
            r#"-netdev {"type":"tap","id":"n"}"#,
            "net:n=user",
            "-netdev user,id=n",
        ),
        (
            "-netdev tap,id=n",
            "net:n=passt=/run/p",
            "-netdev stream,server=off,addr.type=unix,addr.path=/run/p,id=n",
        ),
        (
            "-netdev user,id=n,net=10.1.0.0/24,hostfwd=tcp::1-:2",
            "net:n=bridge=br0",
            "-netdev user,id=vmstow-slirp-n,restrict=on,net=10.1.0.0/24 -netdev bridge,br=br0,id=n",
        ),
        (
            r#"-netdev {"type":"user","id":"n"}"#,
            "net:n=tap=t",
            r#"-netdev {"id":"vmstow-slirp-n","restrict":true,"type":"user"} -netdev tap,ifname=t,script=no,downscript=no,id=n"#,
        ),
    ] {
        assert_eq!(remapped(line, remap), expected);
    }
}

#[test]
fn a_character_device_gets_another_backend() {
    for (line, remap, expected) in [
        ("-serial pty", "chardev:serial0=file:/x", "-serial file:/x"),
        (
            "-serial pty -serial pty",
            "chardev:serial1=null",
            "-serial pty -serial null",
        ),
        (
            "-chardev pty,id=c -serial chardev:c",
            "chardev:c=file:/x,y",
            "-chardev file,path=/x,,y,id=c -serial chardev:c",
        ),
        (
            "-chardev pty,id=c,mux=on -serial chardev:c",
            "chardev:serial0=pty",
            "-chardev pty,id=c,mux=on -serial chardev:c",
        ),
        (
            "-chardev file,id=vmstow-log-serial0,path=/l -serial chardev:vmstow-log-serial0",
            "chardev:serial0=file:/x",
            "-chardev file,path=/x,id=vmstow-serial0 -serial chardev:vmstow-serial0",
        ),
        (
            "-chardev pty,id=c -device virtconsole,chardev=c",
            "chardev:c=unix:/s",
            "-chardev socket,path=/s,server=on,wait=off,id=c -device virtconsole,chardev=c",
        ),
    ] {
        assert_eq!(remapped(line, remap), expected);
    }
}

#[test]
fn an_unknown_id_names_those_that_exist() {
    let error = try_remap(
        "-hda /a -drive file=/b,if=virtio",
        &["disk:vda=/x", "net:n=user", "disk:/c=/d"],
    );
    let text = error.unwrap_err().to_string();
    insta::assert_snapshot!(text, @r#"the guest has no disk "vda"; it has ide0-hd0, virtio0; the guest has no nic "n"; it has none; the guest has no disk "/c"; it has /a, /b"#);
}

#[test]
fn a_backend_that_cannot_have_a_path_is_a_reason() {
    let error = try_remap(
        "-blockdev driver=nbd,node-name=n,server.host=h",
        &["disk:n=/x"],
    )
    .unwrap_err();
    let ConfigError::Refused { reasons } = error else {
        panic!()
    };
    assert_eq!(reasons[0].code(), "remap.impossible");
}

#[test]
fn backends_whose_state_is_in_the_stream_are_warned_about() {
    let line =
        "-netdev user,id=u -device e1000,netdev=u -netdev tap,id=t -device virtio-net-pci,netdev=t";
    let warnings = try_remap(line, &["net:u=tap=tap0", "net:t=user"])
        .unwrap()
        .warnings;
    let expected = [
        Warning::SlirpState { id: "u".into() },
        Warning::NicOffloads {
            id: "t".into(),
            backend: "user",
        },
    ];
    assert_eq!(warnings, expected);
    assert_eq!(try_remap(line, &["net:u=user"]).unwrap().warnings, []);
}

#[test]
fn what_is_no_remap_is_refused_with_the_form_it_should_have() {
    for text in [
        "",
        "disk",
        "disk:vda",
        "disk:=x",
        "disk:vda=",
        "cpu:0=x",
        "net:n=tap",
        "net:n=tap=",
        "chardev:c=x",
        "disk:vda=eject2",
    ] {
        let result = text.parse::<Remap>();
        if text == "disk:vda=eject2" {
            assert!(result.is_ok());
            continue;
        }
        assert!(
            matches!(result, Err(ConfigError::RemapSyntax { .. })),
            "{text}"
        );
    }
}

#[test]
fn the_block_graph_wins_over_the_arguments() {
    use crate::config::resources::BlockFacts;
    let kept = arguments("-drive file=/a.raw,if=virtio,format=raw -cdrom /a.iso -hda /same");
    let mut table = ResourceTable::from_arguments(&kept, None);
    let facts: BlockFacts = serde_json::from_str(
        r##"{"devices":[
            {"device":"virtio0","inserted":{"file":"/snap.qcow2","drv":"qcow2","ro":false,"node-name":"#block9","backing_file":"/a.raw"}},
            {"device":"ide1-cd0","removable":true},
            {"device":"ide0-hd0","inserted":{"file":"/same","drv":"raw","ro":false}},
            {"device":"","qdev":"plugged","inserted":{"file":"/p","drv":"raw","ro":true}}]}"##,
    )
    .unwrap();
    table.apply_block_facts(&facts);
    let disk = table.find(ResourceKind::Disk, "virtio0").unwrap();
    assert_eq!(disk.backend.path.as_deref(), Some("/snap.qcow2"));
    assert_eq!(disk.backend.backing_file.as_deref(), Some("/a.raw"));
    assert_eq!(
        table.find(ResourceKind::Disk, "plugged").unwrap().argument,
        None
    );
    let moved = apply(&kept, None, &block_graph_remaps(&table)).unwrap();
    assert_eq!(
        moved.arguments.write()[1..].join(" "),
        "-drive file=/snap.qcow2,if=virtio,format=qcow2 -drive if=ide,index=2,media=cdrom -hda /same"
    );
}
