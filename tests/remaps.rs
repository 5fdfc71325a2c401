//! Other host resources: from the command line, from files, from `config.toml`; what is missing, all of it at once.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::os::unix::net::UnixListener;

use support::{Guest, GuestSpec, Restored, TestDir};

fn start(dir: &TestDir, extra: &[&str]) -> Guest {
    let spec = GuestSpec {
        memory_mib: 16,
        ..GuestSpec::default().named("web01").with(extra)
    };
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(3);
    guest
}

/// A counter guest, saved to `x.stow` and ended.
fn saved(dir: &TestDir, extra: &[&str]) -> Guest {
    let mut guest = start(dir, extra);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    guest
}

/// The QEMU command that a restore would run.
fn command(dir: &TestDir, options: &[&str]) -> Vec<String> {
    let words = [&["restore", "x.stow", "--print-command"], options].concat();
    let answer = dir.json(&words);
    let words = answer["argv"].as_array().unwrap().iter();
    words
        .map(|word| word.as_str().unwrap().to_owned())
        .collect()
}

fn write(dir: &TestDir, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[test]
fn all_that_is_missing_is_listed_each_with_the_flag_that_answers_it() {
    let dir = TestDir::new();
    for name in ["data.img", "cd.iso"] {
        std::fs::write(dir.join(name), vec![0; 1 << 20]).unwrap();
    }
    let guest = saved(
        &dir,
        &[
            "-drive",
            "file=data.img,format=raw,if=virtio,id=data",
            "-cdrom",
            "cd.iso",
        ],
    );
    for name in ["data.img", "cd.iso", "web01.img"] {
        std::fs::rename(dir.join(name), dir.join(&format!("new-{name}"))).unwrap();
    }
    let said = dir.refused(4, &["restore", "x.stow"]);
    for flag in [
        "give --remap disk:disk0=PATH",
        "give --remap disk:data=PATH",
        "give --remap cdrom:ide1-cd0=PATH",
    ] {
        assert!(said.contains(flag), "{flag}: {said}");
    }
    assert_eq!(said.matches("[file.missing]").count(), 3, "{said}");
    write(
        &dir,
        "remaps",
        "# where they went\ndisk:disk0=new-web01.img\n\ndisk:data=new-data.img\n  cdrom:*=eject\n",
    );
    let before = guest.serial().mark();
    let restored = dir.restore(&["x.stow", "--remap-file", "remaps"]);
    guest.serial().assert_goes_on(&before);
    drop(restored);
}

#[test]
fn the_command_line_counts_more_than_files_and_those_more_than_settings() {
    let dir = TestDir::new();
    saved(
        &dir,
        &[
            "-netdev",
            "user,id=hostnet0",
            "-device",
            "e1000,netdev=hostnet0,id=net0",
        ],
    );
    let serial = |options: &[&str]| {
        let words = command(&dir, options);
        let path = words
            .iter()
            .find_map(|word| word.strip_prefix("file,id=vmstow-serial0,path="));
        let path = path.unwrap().strip_suffix(",append=on").unwrap();
        path.strip_prefix(&format!("{}/", dir.path().display()))
            .unwrap_or(path)
            .to_owned()
    };
    assert_eq!(serial(&[]), "web01.serial");
    // What fits no resource of this guest means nothing among the settings.
    write(
        &dir,
        "config/system.toml",
        "remap = ['chardev:serial0=file:/system', 'disk:no-such=/x']",
    );
    assert_eq!(serial(&[]), "/system");
    write(
        &dir,
        "config/vmstow/config.toml",
        "remap = ['chardev:*=file:user']",
    );
    assert_eq!(serial(&[]), "config/vmstow/user");
    write(&dir, "remaps", "chardev:serial0=file:from-file");
    assert_eq!(serial(&["--remap-file", "remaps"]), "from-file");
    let all = [
        "--remap",
        "chardev:serial0=file:mine",
        "--remap-file",
        "remaps",
    ];
    assert_eq!(serial(&all), "mine");
    // A network can be called by its device.
    let words = command(&dir, &["--remap", "net:net0=tap=tap7"]);
    assert!(
        words
            .iter()
            .any(|word| word.starts_with("tap,ifname=tap7,")),
        "{words:?}"
    );
}

#[test]
fn the_settings_name_a_qemu() {
    let dir = TestDir::new();
    saved(&dir, &[]);
    write(
        &dir,
        "config/vmstow/config.toml",
        "qemu = '/nonexistent/qemu'",
    );
    let said = dir.refused(4, &["restore", "x.stow", "--dry-run"]);
    assert!(said.contains("/nonexistent/qemu"), "{said}");
    let qemu = support::Qemu::V10.program().display().to_string();
    dir.json(&["restore", "x.stow", "--dry-run", "--qemu", &qemu]);
}

#[test]
fn a_file_that_is_wrong_is_told_with_its_line() {
    let dir = TestDir::new();
    saved(&dir, &[]);
    let remap_file = ["restore", "x.stow", "--dry-run", "--remap-file", "remaps"];
    for (text, says) in [
        (
            "# fine\nnet:*=user\nchardev:serial0=nowhere\n",
            "remaps line 3: remap \"chardev:serial0=nowhere\"",
        ),
        (
            "disk:vdx=/x",
            "remaps line 1: the guest has no disk \"vdx\"; it has disk0",
        ),
    ] {
        write(&dir, "remaps", text);
        let said = dir.refused(2, &remap_file);
        assert!(said.contains(says), "{said}");
    }
    write(&dir, "config/vmstow/config.toml", "qemu = '/x'\nrempa = []");
    let said = dir.refused(2, &["restore", "x.stow", "--dry-run"]);
    assert!(
        said.contains("config.toml line 2: unknown field `rempa`"),
        "{said}"
    );
    std::fs::remove_file(dir.join("config/vmstow/config.toml")).unwrap();
    let said = dir.refused(1, &["restore", "x.stow", "--remap-file", "missing"]);
    assert!(said.contains("cannot read missing"), "{said}");
}

#[test]
fn a_guest_with_a_user_network_goes_on_with_another_one_and_says_what_it_loses() {
    let dir = TestDir::new();
    let network = [
        "-netdev",
        "user,id=net0,net=10.7.0.0/24",
        "-device",
        "e1000,netdev=net0",
    ];
    let guest = saved(&dir, &network);
    let socket = dir.join("switch").display().to_string();
    let listener = UnixListener::bind(&socket).unwrap();
    let remap = format!("net:net0=passt={socket}");
    let before = guest.serial().mark();
    let run = |words: &[&str]| {
        let output = dir.vmstow().arg("--json").args(words).unwrap();
        (
            serde_json::from_slice(&output.stdout).unwrap(),
            String::from_utf8(output.stderr.clone()).unwrap(),
        )
    };
    let (answer, said): (serde_json::Value, _) =
        run(&["restore", "x.stow", "--dry-run", "--remap", &remap]);
    assert_eq!(answer["warnings"][0]["code"], "remap.slirp-state");
    assert!(said.contains("was saved with a user network"), "{said}");
    let (answer, said) = run(&["restore", "x.stow", "--remap", &remap]);
    assert!(said.contains("was saved with a user network"), "{said}");
    let restored = Restored::of(answer);
    guest.serial().assert_goes_on(&before);
    listener.accept().unwrap();
    // It can be saved as it is now, restored so, and have its old network back.
    let name = restored.name().to_owned();
    dir.json(&["save", &name, "y.stow"]);
    drop(restored);
    let before = guest.serial().mark();
    let again = dir.restore(&["y.stow"]);
    guest.serial().assert_goes_on(&before);
    listener.accept().unwrap();
    dir.json(&["save", again.name(), "z.stow"]);
    drop(again);
    let before = guest.serial().mark();
    let back = dir.restore(&["z.stow", "--remap", "net:net0=user"]);
    guest.serial().assert_goes_on(&before);
    drop(back);
}

#[test]
fn a_display_is_moved_or_taken_away() {
    let dir = TestDir::new();
    let socket = dir.join("vnc.sock").display().to_string();
    let guest = saved(&dir, &["-vnc", &format!("unix:{socket}")]);
    let other = dir.join("other.sock");
    let _taken = UnixListener::bind(dir.join("busy.sock")).unwrap();
    let busy = format!("display:display0=unix:{}", dir.join("busy.sock").display());
    let said = dir.refused(4, &["restore", "x.stow", "--remap", &busy]);
    assert!(
        said.contains("--remap display:display0=unix:PATH"),
        "{said}"
    );
    let before = guest.serial().mark();
    let remap = format!("display:*=unix:{}", other.display());
    let restored = dir.restore(&["x.stow", "--remap", &remap]);
    guest.serial().assert_goes_on(&before);
    assert!(other.exists());
    drop(restored);
    let words = command(&dir, &["--remap", "display:display0=none"]);
    assert!(!words.contains(&"-vnc".to_owned()), "{words:?}");
}

#[test]
fn a_strangers_image_may_use_what_the_settings_allow_and_no_more() {
    let dir = TestDir::new();
    let guest = saved(&dir, &["-nic", "none"]);
    std::fs::rename(dir.join("state"), dir.join("state.old")).unwrap();
    let said = dir.refused(6, &["restore", "x.stow"]);
    assert!(said.contains("(--remap disk:disk0=PATH)"), "{said}");
    let here = dir.path().display();
    let disk = guest.disk().display().to_string();
    write(
        &dir,
        "config/vmstow/config.toml",
        &format!("[allow]\npaths = ['{disk}']"),
    );
    let said = dir.refused(6, &["restore", "x.stow"]);
    assert!(
        !said.contains("web01.img") && said.contains("web01.serial"),
        "{said}"
    );
    write(
        &dir,
        "config/system.toml",
        &format!("[allow]\npaths = ['{here}/']"),
    );
    let before = guest.serial().mark();
    let restored = dir.restore(&["x.stow"]);
    guest.serial().assert_goes_on(&before);
    drop(restored);
}

#[test]
fn another_format_of_the_same_disk_is_named_with_its_path() {
    let dir = TestDir::new();
    let guest = saved(&dir, &[]);
    let convert = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(guest.disk())
        .arg(dir.join("disk.qcow2"))
        .status();
    assert!(
        convert
            .expect("qemu-img (Debian package qemu-utils)")
            .success()
    );
    std::fs::remove_file(guest.disk()).unwrap();
    let before = guest.serial().mark();
    // As the XML calls it.
    let restored = dir.restore(&["x.stow", "--remap", "disk:vda=qcow2:disk.qcow2"]);
    guest.serial().assert_goes_on(&before);
    let blocks = restored.qmp().command("query-block", serde_json::json!({}));
    assert!(blocks.to_string().contains("\"drv\":\"qcow2\""), "{blocks}");
}
