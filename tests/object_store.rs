//! Images in object stores and on web servers, real ones: there and back, read in place, interrupted, replaced, refused.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use support::{
    ACCESS_KEY, Guest, GuestSpec, PATIENCE, SECRET_KEY, Server, TestDir, Wire, fill, flip_bit,
    wait_until,
};

/// A directory with the image `x.stow` of a guest, all of whose memory holds something if it `is_full`.
fn saved(dir: &TestDir, memory_mib: u32, is_full: bool, name: &str) -> Guest {
    let spec = GuestSpec {
        memory_mib,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(5);
    if is_full {
        fill(guest.pid(), &mut guest.qmp(), u64::from(memory_mib) << 20);
    }
    let layout = if is_full { "raw" } else { "zstd" };
    dir.json(&["save", &guest.source(), name, "--layout", layout]);
    guest.wait_for_exit();
    guest
}

/// The program, that finds the store at `address` and knows its keys.
fn command(dir: &TestDir, address: &str, arguments: &[&str]) -> Command {
    let mut command = dir.vmstow_command();
    for name in [
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_ENDPOINT_URL_S3",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    command
        .env("AWS_ENDPOINT_URL", format!("http://{address}"))
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        .env("AWS_CONFIG_FILE", dir.join("aws-config"))
        .env("AWS_SHARED_CREDENTIALS_FILE", dir.join("aws-credentials"))
        .args(arguments);
    command
}

#[track_caller]
fn parsed(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn answer(dir: &TestDir, address: &str, arguments: &[&str]) -> Value {
    let arguments = [&["--json"], arguments].concat();
    parsed(&command(dir, address, &arguments).output().unwrap())
}

/// What it says when it fails, and its exit code.
fn said(mut command: Command) -> (String, i32) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (stderr, output.status.code().expect("it was not killed"))
}

fn assert_same(a: &Path, b: &Path) {
    let [first, second] = [a, b].map(|path| std::fs::read(path).unwrap());
    assert!(first == second, "{} and {}", a.display(), b.display());
}

fn len(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}

/// Runs it to its end; its answer, and the most memory that it had, in bytes.
fn watched(mut command: Command) -> (Value, u64) {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let watcher = thread::spawn(move || {
        let mut peak = 0;
        while let Ok(text) = std::fs::read_to_string(&status) {
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            // What has ended has no memory any more.
            let Some(line) = line else { break };
            let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
            peak = peak.max(kib << 10);
            thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let output = child.wait_with_output().unwrap();
    (parsed(&output), watcher.join().unwrap())
}

const MOST_MEMORY: u64 = 128 << 20;

/// Starts a copy and kills it once `is_due`.
fn killed(mut command: Command, is_due: impl Fn() -> bool) {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    wait_until("the copy to come so far", PATIENCE, || {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        is_due().then_some(()).ok_or_else(String::new)
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Restores lazily from there, sees it count on from the save if it is the first time, and ends it.
fn restores_lazily(dir: &TestDir, address: &str, there: &str, first: Option<&Guest>) {
    let before = first.map(|guest| guest.serial().mark());
    let report = answer(dir, address, &["restore", there, "--lazy"]);
    if let Some((guest, before)) = first.zip(before) {
        guest.serial().assert_goes_on(&before);
    }
    let name = report["name"].as_str().unwrap();
    answer(dir, address, &["restore", "--resume", name, "--wait"]);
    answer(dir, address, &["stop", name]);
}

/// All that can be done with an image in a store, and the store's own words for what cannot.
fn there_and_back(dir: &TestDir, store: &Server, first: Option<&Guest>) {
    let at = store.address();
    let there = "s3://bucket/some dir/web+01.stow";
    let copied = answer(dir, at, &["copy", "x.stow", there]);
    assert_eq!(copied["kept_bytes"], json!(0));
    assert_eq!(copied["fetched_bytes"], json!(len(&dir.join("x.stow"))));
    assert_same(&dir.join("x.stow"), &store.path("some dir/web+01.stow"));
    let (text, code) = said(command(dir, at, &["copy", "x.stow", there]));
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("web+01.stow exists"), "{text}");
    assert!(text.contains("--replace"), "{text}");
    answer(dir, at, &["copy", "x.stow", there, "--replace"]);

    let inspected = answer(dir, at, &["inspect", there]);
    assert_eq!(inspected["restores"]["lazy"]["is_possible"], json!(true));
    let verified = answer(dir, at, &["verify", "--deep", there]);
    assert_eq!(verified["is_whole"], json!(true));
    let raw = ["convert", there, "s3://bucket/raw.stow", "--layout", "raw"];
    answer(dir, at, &raw);
    let (text, code) = said(command(dir, at, &raw));
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("s3://bucket/raw.stow exists"), "{text}");
    let verified = answer(dir, at, &["verify", "s3://bucket/raw.stow"]);
    assert_eq!(verified["is_whole"], json!(true));
    let mapped = [
        "convert",
        there,
        "s3://bucket/mapped.stow",
        "--layout",
        "mapped",
    ];
    let (text, code) = said(command(dir, at, &mapped));
    assert_eq!(code, 2, "{text}");
    let other = "s3://bucket/other.stow";
    answer(dir, at, &["copy", there, other]);
    let back = answer(dir, at, &["copy", other, "back.stow"]);
    assert_eq!(back["image_digest"], copied["image_digest"]);
    assert_same(&dir.join("x.stow"), &dir.join("back.stow"));
    restores_lazily(dir, at, other, first);

    // Never a bad image under a good name, and nothing left of it.
    std::fs::copy(dir.join("x.stow"), dir.join("bad.stow")).unwrap();
    flip_bit(dir.join("bad.stow"), len(&dir.join("bad.stow")) / 2, 3);
    let bad = ["copy", "bad.stow", "s3://bucket/bad.stow"];
    let (text, code) = said(command(dir, at, &bad));
    assert_eq!(code, 3, "{text}");
    assert!(!store.path("bad.stow").exists());
    for name in ["back.stow", "bad.stow"] {
        std::fs::remove_file(dir.join(name)).unwrap();
    }
}

#[test]
fn an_image_goes_to_a_store_and_back_and_is_read_and_restored_where_it_lies() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: 16,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(5);
    {
        let store = Server::s3s_fs(&dir);
        let at = store.address();
        let direct = "s3://bucket/direct.stow";
        // What cannot be is said before the guest is touched.
        let off = command(&dir, "127.0.0.1:1", &["save", &guest.source(), direct]);
        let (text, code) = said(off);
        assert_eq!(code, 5, "{text}");
        assert!(text.contains("cannot reach http://127.0.0.1:1"), "{text}");
        answer(&dir, at, &["save", &guest.source(), direct]);
        guest.wait_for_exit();
        answer(&dir, at, &["copy", direct, "x.stow"]);
        assert_same(&dir.join("x.stow"), &store.path("direct.stow"));
        there_and_back(&dir, &store, Some(&guest));
        let left = std::fs::read_dir(store.root()).unwrap();
        let names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<String> = names.filter(|name| name.contains("upload")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let store = Server::rclone_s3(&dir, true);
    there_and_back(&dir, &store, None);
    cannot(&dir, &store);
}

/// What a store refuses, and what stands in between.
fn cannot(dir: &TestDir, store: &Server) {
    let at = store.address();
    let there = "s3://bucket/other.stow";
    let mut with_profile = command(dir, at, &["--json", "inspect", there]);
    let keys = "[lab]\naws_access_key_id = KEY\naws_secret_access_key = SECRET\n";
    let keys = keys
        .replace("KEY", ACCESS_KEY)
        .replace("SECRET", SECRET_KEY);
    std::fs::write(dir.join("aws-credentials"), keys).unwrap();
    let config = format!("[profile lab]\nendpoint_url = http://{at}\n");
    std::fs::write(dir.join("aws-config"), config).unwrap();
    with_profile
        .env("AWS_PROFILE", "lab")
        .env_remove("AWS_ENDPOINT_URL")
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY");
    parsed(&with_profile.output().unwrap());

    let inspect = |address: &str, location: &str, set: &[(&str, &str)]| {
        let mut command = command(dir, address, &["inspect", location]);
        command.envs(set.iter().copied());
        said(command)
    };
    /// Address, location, variables, exit code, words.
    type Refusal<'a> = (
        &'a str,
        &'a str,
        &'a [(&'a str, &'a str)],
        i32,
        &'a [&'a str],
    );
    let cases: [Refusal<'_>; 7] = [
        (
            at,
            there,
            &[("AWS_SECRET_ACCESS_KEY", "wrong")],
            5,
            &[
                "does not give access to s3://bucket/other.stow",
                "SignatureDoesNotMatch",
                "AWS_SECRET_ACCESS_KEY",
            ],
        ),
        (
            at,
            there,
            &[("AWS_ACCESS_KEY_ID", "nobody")],
            5,
            &[
                "does not give access",
                "InvalidAccessKeyId",
                "AWS_ACCESS_KEY_ID",
            ],
        ),
        (
            at,
            there,
            &[("AWS_ACCESS_KEY_ID", "")],
            2,
            &[
                "there are no credentials for s3://",
                "profile \"default\"",
                "AWS_PROFILE",
            ],
        ),
        (
            at,
            "s3://nowhere/other.stow",
            &[],
            5,
            &["there is no bucket nowhere at http://127.0.0.1:"],
        ),
        (
            at,
            "s3://bucket/nothing.stow",
            &[],
            5,
            &["there is no s3://bucket/nothing.stow", "NoSuchKey"],
        ),
        (
            "127.0.0.1:1",
            there,
            &[],
            5,
            &[
                "cannot reach http://127.0.0.1:1",
                "refused",
                "AWS_ENDPOINT_URL",
            ],
        ),
        (
            at,
            there,
            &[("AWS_ENDPOINT_URL", "nonsense")],
            2,
            &["the address \"nonsense\" of the object store cannot be used"],
        ),
    ];
    for (address, location, set, expected, words) in cases {
        let (text, code) = inspect(address, location, set);
        assert_eq!(code, expected, "{text}");
        for word in words {
            assert!(text.contains(word), "no {word:?} in: {text}");
        }
    }
    let to_nowhere = ["copy", "x.stow", "s3://nowhere/x.stow"];
    let (text, code) = said(command(dir, at, &to_nowhere));
    assert_eq!(code, 5, "{text}");
    assert!(text.contains("there is no bucket nowhere"), "{text}");

    for len in [0, 100, 5000, 400_000] {
        std::fs::write(store.path("photograph"), vec![0xff; len]).unwrap();
        let (text, code) = inspect(at, "s3://bucket/photograph", &[]);
        assert_eq!(code, 3, "{text}");
        let is_said = text.contains("it is no image of vmstow") || len == 0;
        assert!(is_said, "{text}");
        assert!(text.contains("s3://bucket/photograph"), "{text}");
    }
}

#[test]
fn an_object_that_is_replaced_or_vanishes_while_it_is_read_is_said_and_never_mixed() {
    let dir = TestDir::new();
    let _guest = saved(&dir, 160, true, "x.stow");
    let store = Server::rclone_s3(&dir, true);
    let wire = Wire::to(store.address());
    let place = store.path("web01.stow");
    std::fs::copy(dir.join("x.stow"), &place).unwrap();
    // The same length, and another image in all but that.
    std::fs::copy(dir.join("x.stow"), dir.join("other.stow")).unwrap();
    flip_bit(dir.join("other.stow"), len(&place) / 2, 1);
    let slowly = [
        "copy",
        "s3://bucket/web01.stow",
        "y.stow",
        "--bwlimit",
        "10M",
    ];
    let meanwhile = |act: &dyn Fn()| {
        let before = wire.down();
        let mut command = command(&dir, wire.address(), &slowly);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        wait_until("some of the image to come", PATIENCE, || {
            let came = wire.down() - before;
            (came > 4 << 20).then_some(()).ok_or(came.to_string())
        });
        act();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{text}");
        assert!(!dir.join("y.stow").exists());
        std::fs::remove_file(dir.join("y.stow.part")).unwrap();
        text
    };
    let text = meanwhile(&|| std::fs::rename(dir.join("other.stow"), &place).unwrap());
    assert!(
        text.contains("s3://bucket/web01.stow changed while it was being read"),
        "{text}"
    );
    assert!(text.contains("its ETag was \""), "{text}");
    assert!(text.contains("run the command again"), "{text}");
    std::fs::copy(dir.join("x.stow"), &place).unwrap();
    let text = meanwhile(&|| std::fs::remove_file(&place).unwrap());
    assert!(
        text.contains("s3://bucket/web01.stow vanished while it was being read"),
        "{text}"
    );
}

#[test]
fn a_large_image_is_looked_at_cheaply_and_a_copy_goes_on_after_any_interruption() {
    let dir = TestDir::new();
    let _guest = saved(&dir, 160, true, "x.stow");
    let store = Server::rclone_s3(&dir, false);
    let wire = Wire::to(store.address());
    let copy = |from: &str, to: &str, rate: &str| {
        let arguments = ["--json", "copy", from, to, "--bwlimit", rate];
        command(&dir, wire.address(), &arguments)
    };

    // As long as guest memory, its holes included.
    dir.json(&["convert", "x.stow", "long.stow", "--layout", "mapped"]);
    let all = len(&dir.join("long.stow"));
    assert!(all > 160 << 20, "{all}");
    let there = "s3://bucket/long.stow";
    killed(copy("long.stow", there, "64M"), || wire.up() > all / 2);
    assert!(!store.path("long.stow").exists());
    let before = wire.up();
    let (report, peak) = watched(copy("long.stow", there, "10G"));
    let (sent, kept) = (wire.up() - before, report["kept_bytes"].as_u64().unwrap());
    assert!(kept > all / 4, "{report}");
    assert_eq!(report["fetched_bytes"].as_u64().unwrap() + kept, all);
    // This store may refuse a part that it was getting when the first copy was killed, and take it a moment later.
    assert!(sent < all - kept + (34 << 20), "{sent} of {all}, {report}");
    assert!(peak < MOST_MEMORY, "{peak}");
    assert_same(&dir.join("long.stow"), &store.path("long.stow"));

    let (requests, before) = (wire.requests(), wire.down());
    answer(&dir, wire.address(), &["inspect", there]);
    let (requests, came) = (wire.requests() - requests, wire.down() - before);
    assert!(
        requests <= 16 && came < 1 << 20,
        "{requests} requests, {came} bytes"
    );

    std::fs::copy(dir.join("x.stow"), store.path("x.stow")).unwrap();
    let there = "s3://bucket/x.stow";
    let all = len(&dir.join("x.stow"));
    let start = wire.down();
    killed(copy(there, "y.stow", "32M"), || {
        wire.down() - start > all * 2 / 3
    });
    let before = wire.down();
    let mut rest = copy(there, "y.stow", "8M");
    rest.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = rest.spawn().unwrap();
    wait_until("the copy to go on", PATIENCE, || {
        let came = wire.down() - before;
        (came > 2 << 20).then_some(()).ok_or(came.to_string())
    });
    assert!(wire.cut() > 0, "nothing was connected");
    let report = parsed(&child.wait_with_output().unwrap());
    let (came, kept) = (wire.down() - before, report["kept_bytes"].as_u64().unwrap());
    assert!(kept > all / 4, "{report}");
    // What was on its way when it was cut comes twice.
    assert!(came < all - kept + (18 << 20), "{came} of {all}, {report}");
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
    std::fs::remove_file(dir.join("y.stow")).unwrap();
    let (_, peak) = watched(copy(there, "y.stow", "10G"));
    assert!(peak < MOST_MEMORY, "{peak}");
}

#[test]
fn a_copy_to_a_store_that_lists_no_uploads_goes_on_all_the_same() {
    let dir = TestDir::new();
    let _guest = saved(&dir, 96, false, "x.stow");
    dir.json(&["convert", "x.stow", "long.stow", "--layout", "mapped"]);
    let all = len(&dir.join("long.stow"));
    let store = Server::s3s_fs(&dir);
    let wire = Wire::to(store.address());
    let there = "s3://bucket/web01.stow";
    let copy = |rate: &str| {
        let arguments = ["--json", "copy", "long.stow", there, "--bwlimit", rate];
        command(&dir, wire.address(), &arguments)
    };
    killed(copy("32M"), || wire.up() > all * 2 / 3);
    let before = wire.up();
    let mut rest = copy("20M");
    rest.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = rest.spawn().unwrap();
    wait_until("the copy to go on", PATIENCE, || {
        let went = wire.up() - before;
        (went > 4 << 20).then_some(()).ok_or(went.to_string())
    });
    assert!(wire.cut() > 0, "nothing was connected");
    let report = parsed(&child.wait_with_output().unwrap());
    let (sent, kept) = (wire.up() - before, report["kept_bytes"].as_u64().unwrap());
    assert!(kept > all / 4, "{report}");
    // Four parts may be on their way when it is cut.
    assert!(sent < all - kept + (34 << 20), "{sent} of {all}, {report}");
    assert_same(&dir.join("long.stow"), &store.path("web01.stow"));
    let notes = dir.join("state/vmstow/uploads");
    assert_eq!(std::fs::read_dir(notes).unwrap().count(), 0);
}

#[test]
fn an_image_on_a_web_server_is_read_restored_and_copied() {
    let dir = TestDir::new();
    let guest = saved(&dir, 16, false, "x.stow");
    let server = Server::rclone_http(&dir);
    let there = format!("http://{}/bucket/x.stow", server.address());
    std::fs::copy(dir.join("x.stow"), server.path("x.stow")).unwrap();
    let answer = |arguments: &[&str]| answer(&dir, "127.0.0.1:1", arguments);
    answer(&["inspect", &there]);
    let verified = answer(&["verify", "--deep", &there]);
    assert_eq!(verified["is_whole"], json!(true));
    answer(&["copy", &there, "y.stow"]);
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
    answer(&["diff", "x.stow", &there]);
    answer(&["mem", &there, "map"]);
    restores_lazily(&dir, "127.0.0.1:1", &there, Some(&guest));
    let report = answer(&["restore", &there]);
    assert_eq!(report["state"], json!("running"));
    answer(&["stop", report["name"].as_str().unwrap()]);

    let refused = |arguments: &[&str], expected: i32, words: &[&str]| {
        let (text, code) = said(command(&dir, "127.0.0.1:1", arguments));
        assert_eq!(code, expected, "{text}");
        for word in words {
            assert!(text.contains(word), "no {word:?} in: {text}");
        }
    };
    let nothing = format!("http://{}/bucket/nothing.stow", server.address());
    let there_is_no = format!("there is no {nothing}");
    refused(&["inspect", &nothing], 5, &[&there_is_no]);
    refused(&["copy", "x.stow", &nothing], 2, &["is not on this host"]);
    refused(
        &["inspect", "http://127.0.0.1:1/x.stow"],
        5,
        &["cannot reach http://127.0.0.1:1", "refused"],
    );

    let plain = Server::python_http(&dir);
    std::fs::copy(dir.join("x.stow"), plain.path("x.stow")).unwrap();
    let whole = format!("http://{}/bucket/x.stow", plain.address());
    refused(
        &["inspect", &whole],
        5,
        &["gives whole files only", "curl -o FILE"],
    );
}
