//! Images in a registry of container images: Debian's docker-registry, and skopeo as an independent reader.

#![cfg(feature = "oci")]
#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::SystemTime;

use serde_json::{Value, json};
use support::{
    Guest, GuestSpec, OtherHost, PATIENCE, Registry, RegistrySpec, TestDir, fill, flip_bit,
    wait_until, write_memory,
};
use vmstow::bytes::ReadAt;
use vmstow::store::{Location, open_far};

/// `vmstow`, which finds no credentials but those of the test.
fn command(dir: &TestDir, arguments: &[&str]) -> Command {
    let mut command = dir.vmstow_command();
    command.env("HOME", dir.path()).args(arguments);
    for name in ["REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "SSL_CERT_FILE"] {
        command.env_remove(name);
    }
    command
}

/// What it answers; it has to succeed.
#[track_caller]
fn answer(dir: &TestDir, arguments: &[&str]) -> Value {
    let arguments = [&["--json"], arguments].concat();
    let output = command(dir, &arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {text}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Asserts that it fails with this exit code and says all of `words`.
#[track_caller]
fn assert_says(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

#[track_caller]
fn assert_refused(dir: &TestDir, arguments: &[&str], code: i32, words: &[&str]) {
    assert_says(&command(dir, arguments).output().unwrap(), code, words);
}

#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let [first, second] = [a, b].map(|path| std::fs::read(path).unwrap());
    assert!(first == second, "{} and {}", a.display(), b.display());
}

/// Writes what `podman login` would.
fn log_in(dir: &TestDir, registry: &Registry, user_and_password: &str) {
    let auth = base64(user_and_password.as_bytes());
    let file = json!({ "auths": { registry.name(): { "auth": auth } } });
    std::fs::create_dir_all(dir.join("run/containers")).unwrap();
    std::fs::write(dir.join("run/containers/auth.json"), file.to_string()).unwrap();
}

/// What openssl makes of `input`.
#[track_caller]
fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("openssl");
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .expect("openssl (Debian package openssl) can be started");
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output.stdout
}

fn base64(bytes: &[u8]) -> String {
    String::from_utf8(openssl(&["base64", "-A"], bytes)).unwrap()
}

fn skopeo(arguments: &[&str]) -> Output {
    let mut skopeo = Command::new("skopeo");
    skopeo
        .args(arguments)
        .output()
        .expect("skopeo (Debian package skopeo) can be started")
}

/// An image of a guest that is saved and goes on.
#[track_caller]
fn save(dir: &TestDir, guest: &Guest, name: &str, layout: &str) {
    let source = guest.source();
    dir.json(&[
        "save", &source, name, "--then", "resume", "--layout", layout,
    ]);
}

fn full_guest(dir: &TestDir, memory_mib: u32) -> Guest {
    let spec = GuestSpec {
        memory_mib,
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(5);
    fill(guest.pid(), &mut guest.qmp(), u64::from(memory_mib) << 20);
    guest
}

fn len(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

/// The requests with which blobs and manifests were fetched since there were `before` of them, and the bytes that came.
fn fetched(registry: &Registry, before: usize) -> (usize, u64) {
    let answered = registry.answered();
    let gets = answered[before..]
        .iter()
        .filter(|it| it["http.request.method"] == "GET");
    let bytes = gets
        .clone()
        .map(|it| it["http.response.written"].as_u64().unwrap());
    (gets.count(), bytes.sum())
}

#[test]
fn two_saves_of_a_guest_share_most_of_what_the_registry_keeps_and_whoever_reads_images_reads_them_there()
 {
    let dir = TestDir::new();
    let mut guest = full_guest(&dir, 256);
    save(&dir, &guest, "a.stow", "raw");
    write_memory(guest.pid(), &mut guest.qmp(), 100 << 20, &[7; 2 << 20]);
    let before = guest.serial().mark();
    guest.serial().assert_goes_on(&before);
    dir.json(&["save", &guest.source(), "b.stow", "--layout", "raw"]);
    guest.wait_for_exit();
    let saved = guest.serial().mark();
    let spec = RegistrySpec {
        wants_password: true,
        ..RegistrySpec::default()
    };
    let registry = Registry::start(dir.join("registry"), spec);
    log_in(&dir, &registry, "tester:secret");

    let [a, b] = ["a", "b"].map(|tag| registry.location(tag));
    let report = answer(&dir, &["copy", "a.stow", &a]);
    assert_eq!(report["kept_bytes"], json!(0));
    assert_eq!(report["fetched_bytes"], json!(len(&dir.join("a.stow"))));
    let first = registry.kept_bytes();
    let report = answer(&dir, &["copy", "b.stow", &b]);
    let (sent, all) = (
        report["fetched_bytes"].as_u64().unwrap(),
        len(&dir.join("b.stow")),
    );
    println!("second save: {sent} of {all} bytes");
    assert!(sent < all / 3, "{sent} of {all}");
    let grown = registry.kept_bytes() - first;
    assert!(grown < sent + 64 * 1024, "{grown}, {sent}");

    let before = registry.answered().len();
    let inspected = answer(&dir, &["inspect", &b]);
    let (requests, bytes) = fetched(&registry, before);
    println!("inspect: {requests} requests, {bytes} bytes");
    assert_eq!(inspected["restores"]["lazy"]["is_possible"], json!(true));
    assert!(requests <= 6 && bytes < 256 << 10, "{requests}, {bytes}");
    assert_eq!(answer(&dir, &["verify", &b])["is_whole"], json!(true));
    answer(&dir, &["copy", &b, "back.stow"]);
    assert_same(&dir.join("b.stow"), &dir.join("back.stow"));

    assert_as_skopeo_sees_it(&dir, &registry, "b.stow");

    let report = answer(&dir, &["restore", &b, "--lazy"]);
    guest.serial().assert_goes_on(&saved);
    let name = report["name"].as_str().unwrap();
    answer(&dir, &["restore", "--resume", name, "--wait"]);
    answer(&dir, &["stop", name]);
}

/// An artifact that somebody else fetched has the bytes of the file in its layers.
fn assert_as_skopeo_sees_it(dir: &TestDir, registry: &Registry, file: &str) {
    let there = format!("docker://{}/lab/guest:b", registry.name());
    let access = ["--tls-verify=false", "--creds", "tester:secret"];
    let output = skopeo(&[&["inspect", "--raw"], &access[..], &[&there]].concat());
    assert!(output.status.success(), "{output:?}");
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        manifest["artifactType"],
        json!("application/vnd.vmstow.image.v1")
    );
    let inspected = dir.json(&["inspect", file]);
    let annotations = &manifest["annotations"];
    assert_eq!(
        annotations["org.vmstow.image.uuid"], inspected["image_uuid"],
        "{inspected}"
    );
    assert_eq!(annotations["org.vmstow.layout"], json!("raw"));
    assert_eq!(
        annotations["org.opencontainers.image.title"],
        json!("guest")
    );
    let output = skopeo(&[&["inspect", "--config", "--raw"], &access[..], &[&there]].concat());
    let config: Value = serde_json::from_slice(&output.stdout).expect("the config is JSON");
    assert_eq!(config["guest"]["name"], json!("guest"));

    let into = dir.join("fetched");
    let target = format!("dir:{}", into.display());
    let output = skopeo(&[
        "copy",
        "--src-tls-verify=false",
        "--src-creds",
        "tester:secret",
        &there,
        &target,
    ]);
    assert!(output.status.success(), "{output:?}");
    let mut bytes = Vec::new();
    for layer in manifest["layers"].as_array().unwrap() {
        let digest = layer["digest"].as_str().unwrap();
        let offset = layer["annotations"]["org.vmstow.offset"].as_str().unwrap();
        assert_eq!(offset, bytes.len().to_string());
        let blob = std::fs::read(into.join(digest.strip_prefix("sha256:").unwrap())).unwrap();
        assert_eq!(layer["size"], json!(blob.len()));
        bytes.extend(blob);
    }
    assert!(bytes == std::fs::read(dir.join(file)).unwrap());
}

#[test]
fn an_image_of_any_layout_comes_back_as_it_was_with_its_holes() {
    let dir = TestDir::new();
    let guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(5);
    save(&dir, &guest, "zstd.stow", "zstd");
    dir.json(&["convert", "zstd.stow", "mapped.stow", "--layout", "mapped"]);
    // One with an edit behind it.
    std::fs::copy(dir.join("zstd.stow"), dir.join("edited.stow")).unwrap();
    dir.json(&["config", "edited.stow", "set", "owner=ops"]);
    let registry = Registry::start(dir.join("registry"), RegistrySpec::default());
    for name in ["zstd", "mapped", "edited"] {
        let (file, back) = (format!("{name}.stow"), format!("back-{name}.stow"));
        let there = registry.location(name);
        let report = answer(&dir, &["copy", &file, &there]);
        if name == "mapped" {
            let blocks = dir.join(&file).metadata().unwrap().blocks() * 512;
            let sent = report["fetched_bytes"].as_u64().unwrap();
            assert!(sent < blocks + blocks / 10, "{sent} sent, {blocks} there");
        }
        if name == "edited" {
            let [sent, kept] =
                ["fetched_bytes", "kept_bytes"].map(|it| report[it].as_u64().unwrap());
            assert!(kept > sent, "{report}");
        }
        assert_eq!(answer(&dir, &["verify", &there])["is_whole"], json!(true));
        answer(&dir, &["copy", &there, &back]);
        assert_same(&dir.join(&file), &dir.join(&back));
    }
    let back = dir.join("back-mapped.stow").metadata().unwrap();
    assert!(back.blocks() * 512 < back.len() / 2, "{back:?}");
    // A tag is not taken away but on request, and the same image is the same artifact.
    let there = registry.location("mapped");
    assert_refused(
        &dir,
        &["copy", "zstd.stow", &there],
        2,
        &["mapped exists", "--replace"],
    );
    let report = answer(&dir, &["copy", "mapped.stow", &there, "--replace"]);
    assert_eq!(report["fetched_bytes"], json!(0));

    // From another host, and to one: nobody here keeps a file of it.
    let other = OtherHost::new(&dir, "other");
    std::fs::copy(dir.join("zstd.stow"), other.path("from.stow")).unwrap();
    let between = registry.location("between");
    for (from, to) in [
        (&other.location("from.stow"), &between),
        (&between, &other.location("to.stow")),
    ] {
        let mut copy = command(&dir, &["copy", from, to]);
        let output = copy.envs(other.environment()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_same(&dir.join("zstd.stow"), &other.path("to.stow"));

    // The tag moves while somebody reads: they go on with what they opened.
    let location: Location = there.parse().unwrap();
    let opened = open_far(&location).unwrap();
    let expected = std::fs::read(dir.join("mapped.stow")).unwrap();
    let mut bytes = vec![0; expected.len()];
    let (first, second) = bytes.split_at_mut(expected.len() / 2);
    opened.read_exact_at(first, 0).unwrap();
    answer(&dir, &["copy", "zstd.stow", &there, "--replace"]);
    opened.read_exact_at(second, first.len() as u64).unwrap();
    assert!(bytes == expected);
    assert_eq!(
        open_far(&location).unwrap().len(),
        len(&dir.join("zstd.stow"))
    );
    let mut buffer = [0; 2];
    assert!(opened.read_exact_at(&mut buffer, opened.len() - 1).is_err());
    assert!(opened.failure().is_none());
}

#[test]
fn a_copy_that_is_killed_goes_on_there_and_back() {
    let dir = TestDir::new();
    let guest = full_guest(&dir, 160);
    save(&dir, &guest, "x.stow", "raw");
    drop(guest);
    let registry = Registry::start(dir.join("registry"), RegistrySpec::default());
    let (there, all) = (registry.location("x"), len(&dir.join("x.stow")));
    let start = |from: &str, to: &str| {
        let mut command = command(&dir, &["copy", from, to, "--bwlimit", "20M"]);
        command
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = start("x.stow", &there);
    wait_until("a third of the image in the registry", PATIENCE, || {
        let bytes = registry.kept_bytes();
        (bytes > all / 3)
            .then_some(())
            .ok_or(format!("{bytes} of {all}"))
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert_refused(&dir, &["inspect", &there], 5, &["there is no oci://"]);
    // One that was just being taken may come twice.
    let report = answer(&dir, &["copy", "x.stow", &there]);
    assert!(report["kept_bytes"].as_u64().unwrap() > all / 6, "{report}");

    let mut child = start(&there, "y.stow");
    let part = dir.join("y.stow.part");
    wait_until("a third of the image here", PATIENCE, || {
        let bytes = part.metadata().map_or(0, |it| it.blocks() * 512);
        (bytes > all / 3)
            .then_some(())
            .ok_or(format!("{bytes} of {all}"))
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let report = answer(&dir, &["copy", &there, "y.stow"]);
    assert!(report["kept_bytes"].as_u64().unwrap() > all / 4, "{report}");
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
}

#[test]
fn what_a_registry_refuses_lacks_or_spoils_is_said() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(5);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let spec = RegistrySpec {
        wants_password: true,
        ..RegistrySpec::default()
    };
    let registry = Registry::start(dir.join("registry"), spec);
    let there = registry.location("x");

    let words = [
        "gives no access to lab/guest without credentials",
        "podman login",
    ];
    assert_refused(&dir, &["copy", "x.stow", &there], 5, &words);
    assert_refused(&dir, &["inspect", &there], 5, &words);
    log_in(&dir, &registry, "tester:wrong");
    let words = ["gives tester no access to lab/guest", "right password"];
    assert_refused(&dir, &["copy", "x.stow", &there], 5, &words);
    std::fs::write(dir.join("broken.json"), "{").unwrap();
    let mut broken = command(&dir, &["inspect", &there]);
    broken.env("REGISTRY_AUTH_FILE", dir.join("broken.json"));
    assert_says(
        &broken.output().unwrap(),
        4,
        &["broken.json cannot be used"],
    );
    let helped = json!({ "credHelpers": { registry.name(): "fake" } });
    std::fs::write(dir.join("helped.json"), helped.to_string()).unwrap();
    let helper = dir.join("docker-credential-fake");
    let words = r#"{"ServerURL": "x", "Username": "tester", "Secret": "secret"}"#;
    std::fs::write(&helper, format!("#!/bin/sh\ncat >asked\necho '{words}'\n")).unwrap();
    std::fs::set_permissions(&helper, PermissionsExt::from_mode(0o700)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut helped = command(&dir, &["inspect", &there]);
    helped.env("PATH", format!("{}:{path}", dir.path().display()));
    helped.env("REGISTRY_AUTH_FILE", dir.join("helped.json"));
    assert_says(&helped.output().unwrap(), 5, &["there is no oci://"]);
    assert_eq!(
        std::fs::read_to_string(dir.join("asked")).unwrap(),
        registry.name()
    );
    log_in(&dir, &registry, "tester:secret");

    assert_refused(
        &dir,
        &["inspect", &there],
        5,
        &["there is no oci://", "MANIFEST_UNKNOWN"],
    );
    answer(&dir, &["copy", "x.stow", &there]);
    let none = registry.location("none");
    assert_refused(
        &dir,
        &["copy", &none, "y.stow"],
        5,
        &["guest:none", "MANIFEST_UNKNOWN"],
    );
    for wrong in [
        "oci://127.0.0.1:1/UPPER:x",
        "oci://h/name:a/b",
        "oci://h/name:a?b",
        "oci://h/../x:y",
    ] {
        assert_refused(&dir, &["copy", "x.stow", wrong], 2, &[]);
    }

    put_something_else(&dir, &registry);
    let other = registry.location("other");
    assert_refused(
        &dir,
        &["inspect", &other],
        3,
        &["is no image of vmstow", "an artifact of"],
    );

    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let nowhere = format!("oci://{nobody}/lab/guest:x");
    for arguments in [["copy", "x.stow", &nowhere], ["copy", &nowhere, "y.stow"]] {
        assert_refused(&dir, &arguments, 5, &["cannot be reached", "refused"]);
    }

    let layers = layers(&registry, &dir, "x");
    let chunks = registry.blob(&layers[1]);
    let kept = std::fs::read(&chunks).unwrap();
    flip_bit(&chunks, kept.len() as u64 / 2, 3);
    assert_refused(&dir, &["copy", &there, "y.stow"], 3, &["is damaged: chunk"]);
    let verified = command(&dir, &["verify", &there]).output().unwrap();
    assert_eq!(verified.status.code(), Some(3));
    let text = String::from_utf8_lossy(&verified.stdout);
    assert!(text.contains("does not match its"), "{text}");
    std::fs::write(&chunks, &kept[..kept.len() / 2]).unwrap();
    assert_refused(&dir, &["copy", &there, "y.stow"], 3, &["gave other bytes"]);
    std::fs::remove_file(&chunks).unwrap();
    let words = ["a part of oci://", "is gone", layers[1].as_str()];
    assert_refused(&dir, &["copy", &there, "y.stow"], 5, &words);
    assert_refused(&dir, &["restore", "--lazy", &there], 5, &words);
    assert_refused(&dir, &["convert", &there, "y.stow"], 5, &words);
    std::fs::write(&chunks, &kept).unwrap();
    let sections = registry.blob(layers.last().unwrap());
    flip_bit(&sections, 100, 0);
    assert_refused(
        &dir,
        &["copy", &there, "y.stow"],
        3,
        &["another or damaged"],
    );
    flip_bit(&sections, 100, 0);
    assert!(!dir.join("y.stow").exists());
    answer(&dir, &["copy", &there, "y.stow"]);
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
}

/// The digests of an artifact's layers.
fn layers(registry: &Registry, dir: &TestDir, tag: &str) -> Vec<String> {
    let there = format!("docker://{}/lab/guest:{tag}", registry.name());
    let output = skopeo(&[
        "inspect",
        "--raw",
        "--tls-verify=false",
        "--creds",
        "tester:secret",
        &there,
    ]);
    assert!(
        output.status.success(),
        "{} {output:?}",
        dir.path().display()
    );
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// Has skopeo give the tag `other` to an artifact with an empty config and no layers.
fn put_something_else(dir: &TestDir, registry: &Registry) {
    let from = dir.join("other");
    std::fs::create_dir(&from).unwrap();
    let empty = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.example.recipe", "digest": format!("sha256:{empty}"), "size": 2 },
        "layers": [],
    });
    std::fs::write(from.join("version"), "Directory Transport Version: 1.1\n").unwrap();
    std::fs::write(from.join("manifest.json"), manifest.to_string()).unwrap();
    std::fs::write(from.join(empty), "{}").unwrap();
    let (from, to) = (
        format!("dir:{}", from.display()),
        format!("docker://{}/lab/guest:other", registry.name()),
    );
    let output = skopeo(&[
        "copy",
        "--dest-tls-verify=false",
        "--dest-creds",
        "tester:secret",
        &from,
        &to,
    ]);
    assert!(output.status.success(), "{output:?}");
}

/// An authority, and a certificate for 127.0.0.1 and its key that it signed.
fn certificates(dir: &TestDir) -> [PathBuf; 3] {
    let [
        authority,
        authority_key,
        certificate,
        key,
        request,
        extensions,
    ] = [
        "ca.pem", "ca.key", "tls.pem", "tls.key", "tls.csr", "tls.ext",
    ]
    .map(|name| dir.join(name));
    let word = |path: &PathBuf| path.display().to_string();
    let new_key = ["-newkey", "rsa:2048", "-nodes", "-keyout"];
    let made = |end: &[&str]| drop(openssl(&[&["req"], &new_key[..], end].concat(), b""));
    made(&[
        &word(&authority_key),
        "-x509",
        "-days",
        "2",
        "-subj",
        "/CN=authority",
        "-out",
        &word(&authority),
    ]);
    made(&[
        &word(&key),
        "-new",
        "-subj",
        "/CN=registry",
        "-out",
        &word(&request),
    ]);
    std::fs::write(&extensions, "subjectAltName=IP:127.0.0.1\n").unwrap();
    let ends = [
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        &word(&extensions),
        "-out",
        &word(&certificate),
    ];
    let begins = [
        "x509",
        "-req",
        "-in",
        &word(&request),
        "-CA",
        &word(&authority),
        "-CAkey",
        &word(&authority_key),
    ];
    openssl(&[&begins[..], &ends].concat(), b"");
    [authority, certificate, key]
}

#[test]
fn a_registry_with_tls_is_known_by_its_certificate() {
    let dir = TestDir::new();
    let guest = Guest::start(
        &dir,
        GuestSpec {
            memory_mib: 16,
            ..GuestSpec::default()
        },
    );
    guest.serial().wait_for_tick(5);
    save(&dir, &guest, "x.stow", "zstd");
    drop(guest);
    let [authority, certificate, key] = certificates(&dir);
    let tls = Some((certificate.as_path(), key.as_path()));
    let spec = RegistrySpec {
        wants_password: true,
        tls,
        ..RegistrySpec::default()
    };
    let registry = Registry::start(dir.join("registry"), spec);
    log_in(&dir, &registry, "tester:secret");
    let there = registry.location("x");
    let words = [
        "no registry of container images answers",
        "ertificate",
        "SSL_CERT_FILE",
    ];
    assert_refused(&dir, &["copy", "x.stow", &there], 5, &words);
    for arguments in [["copy", "x.stow", &there], ["copy", &there, "y.stow"]] {
        let mut trusting = command(&dir, &arguments);
        let output = trusting.env("SSL_CERT_FILE", &authority).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
}

/// Who gives tokens for a registry: to `tester` for whatever is asked, to `reader` for reading, to others for nothing.
struct Tokens {
    address: String,
    is_over: Arc<AtomicBool>,
    given: Arc<AtomicU32>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Tokens {
    fn start(certificate: &Path, key: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (is_over, given) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let (ends, count) = (Arc::clone(&is_over), Arc::clone(&given));
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let serve = move || {
            for stream in listener.incoming() {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                count.fetch_add(1, Ordering::Relaxed);
                give_token(stream.unwrap(), &certificate, &key);
            }
        };
        let thread = Some(std::thread::spawn(serve));
        Tokens {
            address,
            is_over,
            given,
            thread,
        }
    }

    fn realm(&self) -> String {
        format!("http://{}/token", self.address)
    }

    /// How many were asked for.
    fn given(&self) -> u32 {
        self.given.load(Ordering::Relaxed)
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(&self.address));
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Answers one request for a token: a JWT as docker-registry takes it.
fn give_token(mut stream: TcpStream, certificate: &Path, key: &Path) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let is_by = |who: &str| {
        let header = format!("basic {}", base64(who.as_bytes()));
        headers
            .iter()
            .any(|line| line.to_lowercase().ends_with(&header.to_lowercase()))
    };
    let query = request
        .split(['?', ' '])
        .nth(2)
        .unwrap_or_default()
        .replace("%3A", ":");
    let query = query.replace("%2F", "/").replace("%2C", ",");
    assert!(query.contains("service=tested"), "{query}");
    let scope = query
        .split('&')
        .find_map(|field| field.strip_prefix("scope=repository:"));
    let (name, actions) = scope.and_then(|scope| scope.split_once(':')).unwrap();
    let mut granted: Vec<&str> = actions.split(',').collect();
    match (is_by("tester:secret"), is_by("reader:secret")) {
        (true, _) => {}
        (_, true) => granted.retain(|action| *action == "pull"),
        _ => granted.clear(),
    }
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let claims = json!({
        "iss": "the test", "aud": "tested", "sub": "somebody", "jti": "1", "iat": now, "nbf": now - 10, "exp": now + 600,
        "access": [{ "type": "repository", "name": name, "actions": granted }],
    });
    let certificate = certificate.display().to_string();
    let certificate = base64(&openssl(
        &["x509", "-in", &certificate, "-outform", "DER"],
        b"",
    ));
    let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [certificate] });
    let encode = |bytes: &[u8]| {
        base64(bytes)
            .replace('+', "-")
            .replace('/', "_")
            .replace('=', "")
    };
    let [header, claims] = [header, claims].map(|json| encode(json.to_string().as_bytes()));
    let signed = format!("{header}.{claims}");
    let key = key.display().to_string();
    let signature = encode(&openssl(
        &["dgst", "-sha256", "-sign", &key],
        signed.as_bytes(),
    ));
    let answer = json!({ "access_token": format!("{signed}.{signature}") }).to_string();
    let len = answer.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n");
    stream.write_all((head + &answer).as_bytes()).unwrap();
}

#[test]
fn a_registry_that_wants_tokens_gets_them() {
    let dir = TestDir::new();
    let guest = Guest::start(
        &dir,
        GuestSpec {
            memory_mib: 16,
            ..GuestSpec::default()
        },
    );
    guest.serial().wait_for_tick(5);
    save(&dir, &guest, "x.stow", "zstd");
    drop(guest);
    let [authority, certificate, key] = certificates(&dir);
    let tokens = Tokens::start(&certificate, &key);
    let realm = tokens.realm();
    let spec = RegistrySpec {
        tokens: Some((&realm, &authority)),
        ..RegistrySpec::default()
    };
    let registry = Registry::start(dir.join("registry"), spec);
    let there = registry.location("x");
    let words = ["no access to lab/guest without credentials"];
    assert_refused(&dir, &["inspect", &there], 5, &words);
    log_in(&dir, &registry, "reader:secret");
    assert_refused(
        &dir,
        &["copy", "x.stow", &there],
        5,
        &["gives reader no access to lab/guest"],
    );
    log_in(&dir, &registry, "tester:secret");
    answer(&dir, &["copy", "x.stow", &there]);
    log_in(&dir, &registry, "reader:secret");
    let before = tokens.given();
    answer(&dir, &["copy", &there, "y.stow"]);
    assert_eq!(tokens.given(), before + 1);
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
}

/// Between a client and a registry: breaks the first connections that carry something once they carried `CARRIED` bytes.
struct BadLine {
    address: String,
    breaks_left: Arc<AtomicU32>,
    is_over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

const CARRIED: usize = 100 << 10;

impl BadLine {
    fn to(registry: &Registry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (is_over, breaks_left) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let (ends, breaks, to) = (
            Arc::clone(&is_over),
            Arc::clone(&breaks_left),
            registry.name(),
        );
        let serve = move || {
            for near in listener.incoming() {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                let (near, far) = (near.unwrap(), TcpStream::connect(&to).unwrap());
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let breaks = Arc::clone(&breaks);
                    std::thread::spawn(move || carry(from, to, &breaks));
                }
            }
        };
        let thread = Some(std::thread::spawn(serve));
        BadLine {
            address,
            breaks_left,
            is_over,
            thread,
        }
    }

    fn location(&self, tag: &str) -> String {
        format!("oci://{}/lab/guest:{tag}", self.address)
    }
}

/// Passes bytes on until either side ends or the line breaks.
fn carry(mut from: TcpStream, mut to: TcpStream, breaks_left: &AtomicU32) {
    let (mut carried, mut buffer) = (0, [0; 4096]);
    while let Ok(len) = from.read(&mut buffer) {
        carried += len;
        let one_less = |left: u32| left.checked_sub(1);
        let is_broken = carried > CARRIED
            && breaks_left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
                .is_ok();
        if len == 0 || is_broken || to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

impl Drop for BadLine {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(&self.address));
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[test]
fn connections_that_break_are_made_again() {
    let dir = TestDir::new();
    let guest = Guest::start(
        &dir,
        GuestSpec {
            memory_mib: 16,
            ..GuestSpec::default()
        },
    );
    guest.serial().wait_for_tick(5);
    save(&dir, &guest, "x.stow", "raw");
    drop(guest);
    let registry = Registry::start(dir.join("registry"), RegistrySpec::default());
    let line = BadLine::to(&registry);
    let there = line.location("x");
    for arguments in [["copy", "x.stow", &there], ["copy", &there, "y.stow"]] {
        line.breaks_left.store(3, Ordering::Relaxed);
        answer(&dir, &arguments);
        assert_eq!(line.breaks_left.load(Ordering::Relaxed), 0, "{arguments:?}");
    }
    assert_same(&dir.join("x.stow"), &dir.join("y.stow"));
}
