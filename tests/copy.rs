//! Images on their way to another host and back: by a real ssh, interrupted, and with liars at the other end.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, OtherHost, PATIENCE, TestDir, fill, flip_bit, wait_until};
use vmstow::bytes::ReadAt;
use vmstow::container::Image;
use vmstow::store::FileSource;
use vmstow::store::remote::{Asker, FrameType, Peer, RemoteError, RemoteFile};

const FULL_MIB: u32 = 160;

/// A directory with the image `x.stow` of a guest, all of whose memory holds something if it `is_full`.
fn saved(is_full: bool, layout: &str) -> TestDir {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: if is_full { FULL_MIB } else { 16 },
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(5);
    if is_full {
        fill(guest.pid(), &mut guest.qmp(), u64::from(FULL_MIB) << 20);
    }
    dir.json(&["save", &guest.source(), "x.stow", "--layout", layout]);
    guest.wait_for_exit();
    dir
}

fn command(dir: &TestDir, other: &OtherHost, arguments: &[&str]) -> Command {
    let mut command = dir.vmstow_command();
    command.envs(other.environment()).args(arguments);
    command
}

fn answer(dir: &TestDir, other: &OtherHost, arguments: &[&str]) -> Value {
    let arguments = [&["--json"], arguments].concat();
    let output = command(dir, other, &arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn copied(dir: &TestDir, other: &OtherHost, arguments: &[&str]) -> Value {
    answer(dir, other, &[&["copy"], arguments].concat())
}

/// What it says when it fails, and its exit code.
fn refused(dir: &TestDir, other: &OtherHost, arguments: &[&str]) -> (String, i32) {
    let arguments = [&["copy"], arguments].concat();
    let output = command(dir, other, &arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (stderr, output.status.code().expect("it was not killed"))
}

fn assert_same(a: &Path, b: &Path) {
    let [first, second] = [a, b].map(|path| std::fs::read(path).unwrap());
    assert!(first == second, "{} and {}", a.display(), b.display());
}

#[test]
fn an_image_of_any_layout_comes_there_and_back_as_it_was_and_the_guest_counts_on() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(5);
    let other = OtherHost::new(&dir, "other");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    for layout in ["zstd", "raw", "mapped"] {
        let name = format!("{layout}.stow");
        dir.json(&["convert", "x.stow", &name, "--layout", layout]);
        let there = copied(&dir, &other, &[&name, &other.location(&name)]);
        assert_eq!(there["kept_bytes"], json!(0));
        assert_same(&dir.join(&name), &other.path(&name));
        let mode = other.path(&name).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let back = format!("back-{name}");
        let report = copied(&dir, &other, &[&other.location(&name), &back]);
        assert_eq!(report["image_digest"], there["image_digest"]);
        assert_same(&dir.join(&name), &dir.join(&back));
    }
    let holes = dir.join("back-mapped.stow").metadata().unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&holes) * 512;
    assert!(
        blocks < holes.len() / 2,
        "{blocks} of {} bytes",
        holes.len()
    );
    let before = guest.serial().mark();
    let _restored = dir.restore(&["back-zstd.stow"]);
    guest.serial().assert_goes_on(&before);
}

#[test]
fn whoever_reads_images_reads_those_of_another_host_and_restores_them_lazily_too() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(5);
    let other = OtherHost::new(&dir, "other");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    std::fs::rename(dir.join("x.stow"), other.path("x.stow")).unwrap();
    let there = other.location("x.stow");
    let answer = |arguments: &[&str]| answer(&dir, &other, arguments);
    let inspected = answer(&["inspect", &there]);
    assert_eq!(inspected["restores"]["lazy"]["is_possible"], json!(true));
    // The other host is this one, and has the guest's disk; our key is a stranger's there.
    let checked = answer(&["check", &there, "--on", "other", "--trust"]);
    assert_eq!(checked["can_run"], json!(true), "{checked}");
    assert_eq!(checked["is_compared"], json!(true), "{checked}");
    let qemu = ["--qemu", "/nowhere/qemu"];
    let output = command(&dir, &other, &["--json", "check", &there, "--on", "other"])
        .args(qemu)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    let codes = checked["findings"].as_array().unwrap().iter();
    let codes: Vec<&str> = codes.map(|it| it["code"].as_str().unwrap()).collect();
    assert!(codes.contains(&"qemu.missing"), "{checked}");
    let verified = answer(&["verify", "--deep", &there]);
    assert_eq!(verified["is_whole"], json!(true));
    answer(&["convert", &there, "y.stow", "--layout", "raw"]);

    let before = guest.serial().mark();
    let report = answer(&["restore", &there, "--lazy"]);
    guest.serial().assert_goes_on(&before);
    let name = report["name"].as_str().unwrap();
    answer(&["restore", "--resume", name, "--wait"]);
    answer(&["stop", name]);
    let report = answer(&["restore", &there]);
    assert_eq!(report["state"], json!("running"));
    answer(&["stop", report["name"].as_str().unwrap()]);

    let mut mapped = command(&dir, &other, &["restore", "--map", &there]);
    let output = mapped.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("is not on this host") || text.contains("layout"),
        "{text}"
    );
}

/// Bytes in `path`; none if it is not there.
fn len(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

#[test]
fn a_copy_that_is_cut_twenty_times_goes_on_each_time_and_brings_hardly_a_byte_twice() {
    let dir = saved(true, "raw");
    let other = OtherHost::new(&dir, "other");
    std::fs::rename(dir.join("x.stow"), other.path("x.stow")).unwrap();
    // What comes through ssh is counted on its way.
    let log = dir.join("came");
    let ssh = format!(
        "#!/bin/sh\nssh -F '{}' \"$@\" | tee -a '{}'\n",
        other.path("ssh_config").display(),
        log.display()
    );
    std::fs::write(dir.join("counted-ssh"), ssh).unwrap();
    std::fs::set_permissions(dir.join("counted-ssh"), PermissionsExt::from_mode(0o700)).unwrap();
    let from = other.location("x.stow");
    let all = len(&other.path("x.stow"));
    let start = |limit: &str| {
        let mut command = command(
            &dir,
            &other,
            &["--json", "copy", &from, "y.stow", "--bwlimit", limit],
        );
        command
            .env("VMSTOW_SSH", dir.join("counted-ssh"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        command.spawn().unwrap()
    };
    for cut in 1..=20u64 {
        let mut child = start("64M");
        let wanted = all * cut / 24;
        wait_until("the copy to come so far", PATIENCE, || {
            let came = len(&log);
            (came >= wanted)
                .then_some(())
                .ok_or(format!("{came} of {wanted}"))
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!dir.join("y.stow").exists());
        wait_for_silence(&dir, &other);
    }
    let output = start("1G").wait_with_output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["kept_bytes"].as_u64().unwrap() > all / 2, "{report}");
    assert_same(&other.path("x.stow"), &dir.join("y.stow"));
    assert!(!dir.join("y.stow.part").exists());
    let came = len(&log);
    // What was on its way at a cut comes once more; to begin anew each time would bring nine times as much.
    let twice = 20 * (2 << 20);
    assert!(came <= all * 105 / 100 + twice, "{came} of {all}");
}

/// Until so much of a file is there that holes do not count.
fn wait_for_bytes(path: &Path, wanted: u64) {
    wait_until("some of the file", PATIENCE, || {
        let blocks = path
            .metadata()
            .map_or(0, |it| std::os::unix::fs::MetadataExt::blocks(&it));
        let bytes = blocks * 512;
        (bytes >= wanted)
            .then_some(())
            .ok_or(format!("{bytes} of {wanted}"))
    });
}

/// Until no program works for the other host any more.
fn wait_for_silence(dir: &TestDir, other: &OtherHost) {
    let config = other.path("ssh_config").display().to_string();
    wait_until("ssh to end", PATIENCE, || {
        let mut left = dir.processes();
        left.retain(|it| it.argv().iter().any(|word| word.contains(&config)));
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

#[test]
fn a_giver_that_is_killed_leaves_a_part_with_which_the_next_one_goes_on() {
    let dir = saved(true, "raw");
    let other = OtherHost::new(&dir, "other");
    let to = other.location("y.stow");
    let all = len(&dir.join("x.stow"));
    let mut child = command(&dir, &other, &["copy", "x.stow", &to, "--bwlimit", "20M"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let part = other.path("y.stow.part");
    wait_for_bytes(&part, all / 2);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for_silence(&dir, &other);
    assert!(!other.path("y.stow").exists());
    let report = copied(&dir, &other, &["x.stow", &to]);
    assert!(report["kept_bytes"].as_u64().unwrap() > all / 3, "{report}");
    assert_same(&dir.join("x.stow"), &other.path("y.stow"));
}

#[test]
fn a_connection_that_breaks_is_made_again() {
    let dir = saved(true, "raw");
    let other = OtherHost::new(&dir, "other");
    let to = other.location("y.stow");
    let all = len(&dir.join("x.stow"));
    let child = command(
        &dir,
        &other,
        &["--json", "copy", "x.stow", &to, "--bwlimit", "20M"],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let part = other.path("y.stow.part");
    wait_for_bytes(&part, all / 3);
    // The link is cut: ssh itself dies.
    let config = other.path("ssh_config").display().to_string();
    let mut cut = dir.processes();
    cut.retain(|it| it.argv().iter().any(|word| word == &config));
    assert_eq!(cut.len(), 1, "{cut:?}");
    Command::new("kill")
        .args(["-9", &cut[0].pid().to_string()])
        .status()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("trying again"), "{stderr}");
    assert_same(&dir.join("x.stow"), &other.path("y.stow"));
}

#[test]
fn what_cannot_be_copied_is_said_and_leaves_nothing() {
    let dir = saved(false, "zstd");
    let other = OtherHost::new(&dir, "other");
    let to = other.location("y.stow");
    copied(&dir, &other, &["x.stow", &to]);

    let (text, code) = refused(&dir, &other, &["x.stow", &to]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("y.stow exists"), "{text}");
    copied(&dir, &other, &["x.stow", &to, "--replace"]);

    let (text, code) = refused(&dir, &other, &[&other.location("none.stow"), "z.stow"]);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("cannot open") && text.contains("No such file"),
        "{text}"
    );

    std::fs::write(other.path("photograph"), [0xff; 5000]).unwrap();
    let (text, code) = refused(&dir, &other, &[&other.location("photograph"), "z.stow"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("it is no image of vmstow"), "{text}");

    let (text, code) = refused(&dir, &other, &["x.stow", "ssh://-oProxyCommand=touch/z"]);
    assert_eq!(code, 2, "{text}");

    let (text, code) = refused(&dir, &other, &["x.stow", "-"]);
    assert_eq!(code, 2, "{text}");

    let mut none = command(&dir, &other, &["copy", "x.stow", &other.location("z.stow")]);
    let output = none
        .env("VMSTOW_REMOTE_PROGRAM", "/nowhere/vmstow")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{text}");
    assert!(
        text.contains("no vmstow answers") && text.contains("127"),
        "{text}"
    );
    assert!(text.contains("VMSTOW_REMOTE_PROGRAM"), "{text}");

    flip_bit(other.path("y.stow"), 3000, 3);
    let (text, code) = refused(&dir, &other, &[&to, "z.stow"]);
    assert_eq!(code, 3, "{text}");
    let names = dir.names();
    let made = names.iter().any(|name| name == "z.stow");
    assert!(!made, "{names:?}");
}

/// `vmstow serve`, to be talked to by the test.
fn served(dir: &TestDir) -> Child {
    let mut command = dir.vmstow_command();
    command
        .args(["serve", "--stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command.spawn().unwrap()
}

fn peer(dir: &TestDir) -> Peer {
    let mut child = served(dir);
    let (input, output) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    Peer::greet("the test".to_owned(), input, output, Some(child)).unwrap()
}

/// An image with one byte that is another than its digest says.
struct Liar {
    image: FileSource,
    lies_at: u64,
}

impl ReadAt for Liar {
    fn len(&self) -> u64 {
        self.image.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.image.read_exact_at(buf, offset)?;
        let within = self.lies_at.checked_sub(offset);
        let place = within.and_then(|at| buf.get_mut(usize::try_from(at).unwrap()));
        if let Some(byte) = place {
            *byte ^= 1;
        }
        Ok(())
    }
}

#[test]
fn a_sender_that_lies_at_any_place_never_makes_a_good_file() {
    let dir = saved(false, "raw");
    let image = Image::open(FileSource::open(&dir.join("x.stow")).unwrap()).unwrap();
    let len = image.len();
    let mut places: Vec<u64> = (1..40).map(|part| len * part / 40).collect();
    places.extend([
        0,
        len - 1,
        len - 300,
        image.footer().directory_offset.0 + 40,
    ]);
    let order = |length: u64| {
        let path = dir.join("made.stow").display().to_string();
        let order =
            json!({ "path": path, "length": length, "replace": false, "bytes_per_second": null });
        serde_json::to_vec(&order).unwrap()
    };
    for lies_at in places {
        let liar = Liar {
            image: FileSource::open(&dir.join("x.stow")).unwrap(),
            lies_at,
        };
        let error = peer(&dir)
            .give(&liar, FrameType::Receive, &order(len), &mut |_| true)
            .unwrap_err();
        let is_damage =
            matches!(&error, RemoteError::Refused { kind, .. } if kind.exit_code() == 3);
        assert!(is_damage, "{lies_at:#x}: {error:?}");
        assert!(!dir.join("made.stow").exists());
        // With what is right of it the next one would not be asked for the byte it lies about.
        let _ = std::fs::remove_file(dir.join("made.stow.part"));
    }
    // One that promises more than it has.
    let honest = FileSource::open(&dir.join("x.stow")).unwrap();
    let error = peer(&dir).give(&honest, FrameType::Receive, &order(len + 512), &mut |_| {
        true
    });
    assert!(error.is_err());
    let error = peer(&dir)
        .give(&honest, FrameType::Receive, b"{}", &mut |_| true)
        .unwrap_err();
    assert!(error.to_string().contains("order is not clear"), "{error}");
    assert!(!dir.join("made.stow").exists());
    // What the liars left does no harm.
    peer(&dir)
        .give(&honest, FrameType::Receive, &order(len), &mut |_| true)
        .unwrap();
    assert_same(&dir.join("x.stow"), &dir.join("made.stow"));
}

#[test]
fn a_client_that_talks_nonsense_is_told_so_and_left() {
    let dir = saved(false, "zstd");
    let asker = Arc::new(Asker::new(Arc::new(peer(&dir))));
    let file = RemoteFile::open(Arc::clone(&asker), Path::new("x.stow")).unwrap();
    let mut buffer = [0; 16];
    file.read_exact_at(&mut buffer, 0).unwrap();
    let outside = RemoteFile::offered(Arc::clone(&asker), u64::MAX);
    assert!(outside.read_exact_at(&mut buffer, file.len() - 1).is_err());
    assert!(
        asker
            .ask(FrameType::Read, &[1, 2, 3], FrameType::Data)
            .is_err()
    );
    assert!(
        asker
            .ask(FrameType::Open, b"..", FrameType::Opened)
            .is_err()
    );
    // It still answers: nothing of that broke a rule of the frames.
    file.read_exact_at(&mut buffer, 0).unwrap();

    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..60u8 {
        let mut child = served(&dir);
        let mut input = child.stdin.take().unwrap();
        let mut bytes = vmstow_greeting();
        for _ in 0..200 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            bytes.push(u8::try_from(seed & 0xff).unwrap());
        }
        if round % 2 == 0 {
            // A whole header of some type, so that the body is what is nonsense.
            bytes[16..24].copy_from_slice(&[40, 0, 0, 0, 1 + round / 2 % 31, 0, 0, 0]);
        }
        if round % 5 == 0 {
            bytes[3] ^= 1;
        }
        let _ = input.write_all(&bytes);
        drop(input);
        let mut output = Vec::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut output)
            .unwrap();
        let status = child.wait().unwrap();
        assert!(
            status.code().is_some_and(|code| code != 101),
            "{round}: {status}"
        );
    }
}

fn vmstow_greeting() -> Vec<u8> {
    [b"\x89VMSTOW\n".as_slice(), &[1, 0, 0, 0, 1, 0, 0, 0]].concat()
}

#[test]
fn a_shell_that_talks_is_no_vmstow() {
    let dir = saved(false, "zstd");
    std::fs::write(
        dir.join("talk"),
        "#!/bin/sh\necho Welcome to this host, it is Tuesday\n",
    )
    .unwrap();
    std::fs::set_permissions(dir.join("talk"), PermissionsExt::from_mode(0o700)).unwrap();
    let mut command = dir.vmstow_command();
    command.env("VMSTOW_SSH", dir.join("talk"));
    let output = command
        .args(["copy", "x.stow", "ssh://a/y"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{text}");
    assert!(text.contains("Welcome to this"), "{text}");
}
