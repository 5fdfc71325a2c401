use proptest::prelude::*;

use super::*;

fn context() -> RestoreContext {
    RestoreContext {
        machine_type: "pc-i440fx-10.0".into(),
        qmp_socket: "/run/g/qmp.sock".into(),
        log_dir: "/run/g".into(),
        name: "web01".into(),
    }
}

fn try_restore(line: &str) -> Result<Vec<String>, ConfigError> {
    let words: Vec<&str> = std::iter::once("qemu")
        .chain(line.split_whitespace())
        .collect();
    restore_arguments(&Arguments::parse(&words).unwrap(), &context(), &[])
}

/// The restored line without what every guest of ours has at its end; checked to be a fixed point.
fn restored(line: &str) -> String {
    let once = try_restore(line).unwrap();
    let twice = restore_arguments(&Arguments::parse(&once).unwrap(), &context(), &[]).unwrap();
    assert_eq!(once, twice, "not a fixed point");
    let line = once[1..].join(" ");
    let ours = line.find(" -name guest=web01").unwrap();
    line[..ours].to_owned()
}

fn refused(line: &str) -> Vec<Reason> {
    match try_restore(line) {
        Err(ConfigError::Refused { reasons }) => reasons,
        other => panic!("{other:?}"),
    }
}

fn codes(line: &str) -> Vec<&'static str> {
    refused(line).iter().map(Reason::code).collect()
}

const PLAIN: &str = "-machine pc-i440fx-10.0 -display none";

#[test]
fn ours_come_at_the_end() {
    let words = try_restore("-machine pc -display none").unwrap();
    insta::assert_snapshot!(words.join(" "), @"qemu -machine pc-i440fx-10.0 -display none -name guest=web01 -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -chardev socket,id=vmstow-qmp,path=/run/g/qmp.sock,server=on,wait=off -mon id=vmstow-monitor,chardev=vmstow-qmp,mode=control -S -incoming defer");
}

#[test]
fn how_qemu_was_run_is_dropped() {
    for dropped in [
        "-incoming tcp:0:4444",
        "-incoming fd:3",
        "-loadvm snap",
        "-S",
        "--preconfig",
        "-daemonize",
        "-pidfile /run/x.pid",
        "-qmp unix:/q,server=on,wait=off",
        "-qmp-pretty stdio",
        "-monitor stdio",
        "-monitor telnet::4444,server",
        "-mon chardev=m -chardev stdio,id=m",
        "-chardev socket,id=m,fd=7,server=on -mon chardev=m,mode=control",
        "-chardev socket,id=m,path=/m,server=on -qmp chardev:m",
        "-D /var/log/q",
        "-dump-vmstate /x",
        "-qtest unix:/q",
        "-gdb stdio",
        "-sandbox off",
        "-name other",
        "-full-screen",
        "-sdl",
        "-curses",
        "-object memory-backend-file,id=vmstow-ram,size=1G,mem-path=/x",
    ] {
        assert_eq!(restored(&format!("{PLAIN} {dropped}")), PLAIN, "{dropped}");
    }
}

#[test]
fn a_character_device_that_serves_more_than_a_monitor_is_kept() {
    let line = "-chardev pty,id=m,mux=on -mon chardev=m -serial chardev:m";
    assert_eq!(
        restored(&format!("{PLAIN} {line}")),
        format!("{PLAIN} -chardev pty,id=m,mux=on -serial chardev:m")
    );
}

#[test]
fn what_the_guest_is_stays() {
    for kept in [
        "-uuid 8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1",
        "-m 512 -smp 2,maxcpus=4 -cpu Nehalem,+avx -accel tcg,thread=multi",
        "-kernel vmlinuz -initrd ../initrd -append console=ttyS0",
        "-drive file=a,,b.img,if=virtio disk.img",
        "-vga std -usb -device usb-tablet",
        "-rtc base=utc -no-reboot -boot order=c,menu=on",
        "-serial pty -serial null -serial vc -parallel none",
        "-blockdev {\"driver\":\"file\",\"node-name\":\"n\",\"filename\":\"/a\"}",
        "-set device.x.y=z -global PIIX4_PM.disable_s3=1",
        "-vnc 127.0.0.1:1",
        "-smbios type=1,serial=fd=3",
        "-netdev user,id=n,hostfwd=tcp::2222-:22 -device e1000,netdev=n",
    ] {
        assert_eq!(
            restored(&format!("{PLAIN} {kept}")),
            format!("{PLAIN} {kept}")
        );
    }
}

#[test]
fn every_way_to_name_the_machine_becomes_the_resolved_type() {
    for (line, expected) in [
        ("-M pc", "-M pc-i440fx-10.0"),
        ("-machine q35,smm=off", "-machine pc-i440fx-10.0,smm=off"),
        (
            "--machine type=pc,accel=kvm",
            "--machine type=pc-i440fx-10.0,accel=kvm",
        ),
        ("-machine accel=kvm", "-machine pc-i440fx-10.0,accel=kvm"),
        (
            "-machine smm=off -M pc",
            "-machine smm=off -M pc-i440fx-10.0",
        ),
        ("-m 64", "-machine pc-i440fx-10.0 -m 64"),
    ] {
        assert_eq!(
            restored(line),
            format!("{expected} -display none"),
            "{line}"
        );
    }
}

#[test]
fn a_terminal_becomes_a_log_file() {
    const LOG: &str = "-chardev file,id=vmstow-log-serial0,path=/run/g/serial0.log,append=on -serial chardev:vmstow-log-serial0";
    for line in ["-serial stdio", "-serial mon:stdio"] {
        assert_eq!(
            restored(&format!("{PLAIN} {line}")),
            format!("{PLAIN} {LOG}")
        );
    }
    assert_eq!(
        restored(&format!("{PLAIN} -serial pty -serial stdio")),
        format!("{PLAIN} -serial pty {}", LOG.replace("serial0", "serial1"))
    );
    assert_eq!(
        restored(&format!(
            "{PLAIN} -chardev stdio,id=c,mux=on,signal=off -device virtconsole,chardev=c -mon c"
        )),
        format!(
            "{PLAIN} -chardev file,id=vmstow-log-c,path=/run/g/c.log,append=on,mux=on -device virtconsole,chardev=vmstow-log-c"
        )
    );
}

#[test]
fn nographic_is_spelled_out() {
    assert_eq!(
        restored("-M pc -nographic"),
        "-M pc-i440fx-10.0,graphics=off -display none -chardev file,id=vmstow-log-serial0,path=/run/g/serial0.log,append=on -serial chardev:vmstow-log-serial0"
    );
    assert_eq!(
        restored("-nographic -nodefaults"),
        "-machine pc-i440fx-10.0,graphics=off -nodefaults -display none"
    );
    assert_eq!(
        restored("-nographic -serial pty"),
        "-machine pc-i440fx-10.0,graphics=off -serial pty -display none"
    );
}

#[test]
fn a_log_of_an_earlier_restore_moves_to_the_new_directory() {
    let once = try_restore("-nographic").unwrap();
    let elsewhere = RestoreContext {
        log_dir: "/run/h".into(),
        ..context()
    };
    let kept = Arguments::parse(&once).unwrap();
    let twice = restore_arguments(&kept, &elsewhere, &[]).unwrap().join(" ");
    assert!(twice.contains("path=/run/h/serial0.log"), "{twice}");
    assert!(!twice.contains("/run/g/serial0.log"), "{twice}");
}

#[test]
fn files_are_appended_to() {
    assert_eq!(
        restored(&format!("{PLAIN} -serial file:a,b.log -debugcon file:d")),
        format!(
            "{PLAIN} -chardev file,id=vmstow-serial0,path=a,,b.log,append=on -serial chardev:vmstow-serial0 \
             -chardev file,id=vmstow-debugcon0,path=d,append=on -debugcon chardev:vmstow-debugcon0"
        )
    );
    assert_eq!(
        restored(&format!(
            "{PLAIN} -chardev file,id=c,path=/x,append=off -serial chardev:c"
        )),
        format!("{PLAIN} -chardev file,id=c,path=/x,append=on -serial chardev:c")
    );
    assert_eq!(
        restored(&format!(
            "{PLAIN} -chardev pty,id=c,logfile=/x -serial chardev:c"
        )),
        format!("{PLAIN} -chardev pty,id=c,logfile=/x,logappend=on -serial chardev:c")
    );
}

#[test]
fn a_server_does_not_hold_up_the_restore() {
    assert_eq!(
        restored(&format!(
            "{PLAIN} -serial unix:/s,server -serial tcp::4444,server=on,wait=on"
        )),
        format!("{PLAIN} -serial unix:/s,server,wait=off -serial tcp::4444,server=on,wait=off")
    );
    assert_eq!(
        restored(&format!(
            "{PLAIN} -chardev socket,id=c,path=/s,server -serial chardev:c"
        )),
        format!("{PLAIN} -chardev socket,id=c,path=/s,server,wait=off -serial chardev:c")
    );
    for line in [
        "-serial unix:/s,server,nowait",
        "-chardev socket,id=v,path=/v,server=on -netdev vhost-user,chardev=v,id=n",
    ] {
        assert_eq!(
            restored(&format!("{PLAIN} {line}")),
            format!("{PLAIN} {line}")
        );
    }
}

#[test]
fn a_monitor_muxed_with_a_port_is_taken_out() {
    assert_eq!(
        restored(&format!("{PLAIN} -serial mon:pty")),
        format!("{PLAIN} -serial pty")
    );
}

#[test]
fn a_window_becomes_no_display() {
    for window in ["curses", "gtk,gl=on", "sdl", "spice-app", "none"] {
        assert_eq!(
            restored(&format!("-M pc -display {window}")),
            "-M pc-i440fx-10.0 -display none"
        );
    }
    for kept in ["vnc=:1", "egl-headless", "dbus"] {
        let line = format!("-M pc-i440fx-10.0 -display {kept}");
        assert_eq!(restored(&line), line);
    }
}

#[test]
fn the_name_keeps_its_other_properties() {
    let line = try_restore("-name old,process=p,debug-threads=on")
        .unwrap()
        .join(" ");
    assert!(
        line.contains(" -name guest=web01,process=p,debug-threads=on "),
        "{line}"
    );
}

#[test]
fn the_sandbox_leaves_out_what_the_arguments_need() {
    let sandbox = |line: &str| {
        let words = try_restore(line).unwrap();
        Arguments::parse(&words)
            .unwrap()
            .last_value("sandbox")
            .unwrap()
            .to_owned()
    };
    const ALL: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    assert_eq!(sandbox("-sandbox on"), ALL);
    assert_eq!(sandbox("-netdev tap,id=n,script=no,downscript=no"), ALL);
    for line in [
        "-netdev tap,id=n",
        "-nic tap,script=/x",
        "-netdev user,id=n,smb=/srv",
        "-netdev user,id=n,guestfwd=tcp:10.0.2.100:7-cmd:cat",
        "-netdev {\"type\":\"tap\",\"id\":\"n\"}",
    ] {
        assert_eq!(sandbox(line), ALL.replace(",spawn=deny", ""), "{line}");
    }
    for line in ["-runas nobody", "-run-with user=nobody"] {
        assert_eq!(sandbox(line), ALL.replace(",elevateprivileges=deny", ""));
    }
    let pinned = "-object thread-context,id=t,cpu-affinity=0";
    assert_eq!(sandbox(pinned), ALL.replace(",resourcecontrol=deny", ""));
    for line in [
        "-netdev bridge,id=n,br=br0",
        "-nic tap,helper=/usr/lib/qemu/qemu-bridge-helper",
    ] {
        assert_eq!(sandbox(line), "off");
    }
}

#[test]
fn temporary_overlays_are_refused() {
    assert_eq!(codes("-snapshot"), ["argument.temporary-overlay"]);
    assert_eq!(
        codes("-drive file=/a,snapshot=on"),
        ["argument.temporary-overlay"]
    );
}

#[test]
fn configuration_files_are_refused() {
    for line in ["-readconfig /x", "-writeconfig /x"] {
        assert_eq!(codes(line), ["argument.configuration-file"]);
    }
}

#[test]
fn inherited_descriptors_are_refused() {
    for line in [
        "-add-fd fd=3,set=2",
        "-netdev tap,id=n,fd=3",
        "-netdev tap,id=n,fds=3:4,vhost=on",
        "-netdev {\"type\":\"tap\",\"id\":\"n\",\"vhostfd\":\"4\"}",
        "-netdev stream,id=n,addr.type=fd,addr.str=5",
        "-nic tap,fd=3",
        "-chardev socket,id=c,fd=3 -serial chardev:c",
        "-drive file=/dev/fdset/2",
        "-hda /dev/fd/7",
        "-serial file:/dev/fdset/1",
        "-blockdev {\"driver\":\"qcow2\",\"node-name\":\"n\",\"file\":{\"driver\":\"file\",\"filename\":\"/dev/fdset/1\"}}",
        "-device vhost-vsock-pci,guest-cid=3,vhostfd=9",
    ] {
        assert_eq!(codes(line), ["argument.inherited-descriptor"], "{line}");
    }
}

#[test]
fn all_reasons_come_at_once_and_name_their_arguments() {
    let words = [
        "qemu",
        "-snapshot",
        "-netdev",
        "tap,id=n,fd=3",
        "-readconfig",
        "/c",
    ];
    let remap: Remap = "disk:vdz=/x".parse().unwrap();
    let kept = Arguments::parse(&words).unwrap();
    let error = restore_arguments(&kept, &context(), &[remap]).unwrap_err();
    insta::assert_snapshot!(error, @r#"the guest has no disk "vdz"; it has none; -snapshot: the guest's writes go to a temporary overlay that ends with QEMU; -netdev tap,id=n,fd=3: fd=3 is a descriptor that QEMU inherited; -readconfig /c: the file's content is not part of the arguments"#);
}

#[test]
fn a_remap_takes_the_reason_away() {
    let kept = Arguments::parse(&[
        "qemu",
        "-netdev",
        "tap,id=n,fd=3",
        "-device",
        "e1000,netdev=n",
    ])
    .unwrap();
    let remap: Remap = "net:n=tap=tap3".parse().unwrap();
    let line = restore_arguments(&kept, &context(), &[remap])
        .unwrap()
        .join(" ");
    assert!(
        line.contains("-netdev tap,ifname=tap3,script=no,downscript=no,id=n"),
        "{line}"
    );
}

#[test]
fn the_terminal_of_nographic_can_be_remapped() {
    let kept = Arguments::parse(&["qemu", "-nographic"]).unwrap();
    let remap: Remap = "chardev:serial0=unix:/s".parse().unwrap();
    let line = restore_arguments(&kept, &context(), &[remap])
        .unwrap()
        .join(" ");
    assert!(
        line.contains("-serial unix:/s,server=on,wait=off"),
        "{line}"
    );
}

proptest! {
    #[test]
    fn restore_arguments_are_a_fixed_point(words in proptest::collection::vec(prop_oneof![
        Just("-nographic"), Just("-serial"), Just("stdio"), Just("file:/a,b"), Just("-chardev"), Just("stdio,id=a"),
        Just("file,id=b,path=/x"), Just("chardev:a"), Just("chardev:b"), Just("-mon"), Just("a"), Just("-device"),
        Just("virtconsole,chardev=a"), Just("-M"), Just("pc,accel=tcg"), Just("-display"), Just("gtk"), Just("-S"),
        Just("-nodefaults"), Just("mon:unix:/s,server"), Just("disk.img"), Just("-name"), Just("-parallel"),
    ], 0..14)) {
        let words: Vec<&str> = std::iter::once("qemu").chain(words).collect();
        if let Ok(kept) = Arguments::parse(&words)
            && let Ok(once) = restore_arguments(&kept, &context(), &[])
        {
            let twice = restore_arguments(&Arguments::parse(&once).unwrap(), &context(), &[]).unwrap();
            prop_assert_eq!(once, twice);
        }
    }
}

#[test]
fn what_lay_in_the_guests_old_directory_moves_and_other_files_stay() {
    let line = restored(
        "-machine pc-i440fx-10.0 -display none -chardev socket,id=vmstow-qmp,path=/run/old/qmp.sock,server=on \
         -mon chardev=vmstow-qmp,mode=control -chardev pty,id=c0,logfile=/run/old/serial0.log,logappend=on \
         -chardev socket,id=chrtpm0,path=/run/old/tpm0.swtpm -vnc unix:/run/old/vnc.sock \
         -chardev file,id=c1,path=/run/older/x,append=on",
    );
    assert_eq!(
        line,
        format!(
            "{PLAIN} -chardev pty,id=c0,logfile=/run/g/serial0.log,logappend=on \
             -chardev socket,id=chrtpm0,path=/run/g/tpm0.swtpm -vnc unix:/run/g/vnc.sock \
             -chardev file,id=c1,path=/run/older/x,append=on"
        )
    );
}
