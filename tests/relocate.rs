//! Guests that move to another host: two network namespaces with a real sshd in each, and what is done to them meanwhile.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{
    Adopted, Guest, GuestSpec, Host, PATIENCE, Process, Serial, TestDir, TwoHosts, counter_xml,
    fill, serial_into, wait_until,
};

/// The one QEMU of a host, which the test answers for.
#[track_caller]
fn qemu_of(host: &Host, dir: &TestDir) -> Adopted {
    let mut qemus = host.qemus(dir);
    assert_eq!(qemus.len(), 1, "{qemus:#?}");
    Adopted(qemus.remove(0))
}

/// Nothing is left of a move there: no guest, no record, no image.
#[track_caller]
fn assert_nothing_of_a_move(host: &Host, dir: &TestDir) {
    let left = host.qemus(dir);
    assert!(left.is_empty(), "{left:#?}");
    assert_no_files_of_a_move(host);
}

#[track_caller]
fn assert_no_files_of_a_move(host: &Host) {
    for directory in ["moves", "arrivals"] {
        let directory = host.path("state").join("vmstow").join(directory);
        let entries = std::fs::read_dir(&directory).into_iter().flatten();
        let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        let left: Vec<_> = names.iter().filter(|name| *name != "lock").collect();
        assert!(left.is_empty(), "{}: {left:?}", directory.display());
    }
}

#[test]
fn a_linux_guest_moves_and_its_counter_and_memory_with_it() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let mut guest = Guest::start(&dir, GuestSpec::linux());
    guest
        .serial()
        .wait_for_line("its first sum", |line| line.starts_with("sum "));
    guest.serial().wait_for_tick(5);
    let there = hosts.b.path("elsewhere.img");
    std::fs::hard_link(guest.disk(), &there).unwrap();
    let remap = format!("disk:*={}", there.display());
    let image = hosts.b.path("kept.stow");
    let report = hosts.a.json(
        &dir,
        &[
            "move",
            &guest.source(),
            "b",
            "--remap",
            &remap,
            "--image",
            image.to_str().unwrap(),
        ],
    );
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let qemu = qemu_of(&hosts.b, &dir);
    assert_eq!(report["state"], json!("running"), "{report}");
    assert!(
        qemu.argv()
            .iter()
            .any(|word| word.contains("elsewhere.img")),
        "{qemu:?}"
    );
    guest.serial().assert_goes_on(&before);
    // Its checksum of its memory is the same there.
    let sums = guest.serial().sums().len();
    wait_until("another checksum", PATIENCE, || {
        let now = guest.serial().sums().len();
        (now > sums).then_some(()).ok_or(now.to_string())
    });
    guest.serial().assert_goes_on(&before);
    assert_no_files_of_a_move(&hosts.a);
    assert_no_files_of_a_move(&hosts.b);
    let verified = hosts.b.json(&dir, &["verify", image.to_str().unwrap()]);
    assert_eq!(verified["is_whole"], json!(true));
    let listed = hosts.b.json(&dir, &["list"]);
    assert_eq!(
        listed["guests"][0]["name"], report["name_there"],
        "{listed}"
    );
    drop(qemu);
}

#[test]
fn a_guest_on_a_bridge_is_streamed_to_another_bridge_and_back() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let nic = "<interface type='bridge'><source bridge='lan-a'/><model type='virtio'/></interface>";
    let xml = counter_xml(&dir, &serial_into(&dir, "serial"), nic);
    let xml = xml.replace("machine='pc'", "machine='q35'");
    let xml_file = dir.join("web.xml");
    std::fs::write(&xml_file, xml).unwrap();
    hosts.a.json(&dir, &["run", xml_file.to_str().unwrap()]);
    let mut qemu = qemu_of(&hosts.a, &dir);
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);
    for (from, to, name, bridge) in [
        (&hosts.a, &hosts.b, "b", "lan-b"),
        (&hosts.b, &hosts.a, "a", "lan-a"),
    ] {
        let remap = format!("net:net0=bridge={bridge}");
        let report = from.json(&dir, &["move", "web", name, "--stream", "--remap", &remap]);
        assert_eq!(report["sent"]["way"], json!("streamed"));
        qemu.wait_for_exit();
        let before = serial.mark();
        qemu = qemu_of(to, &dir);
        serial.assert_goes_on(&before);
        assert_no_files_of_a_move(from);
        assert_no_files_of_a_move(to);
        let ports = to
            .command("ip".as_ref())
            .args(["-o", "link", "show", "master", bridge])
            .output()
            .unwrap();
        assert!(!ports.stdout.is_empty());
    }
    hosts.a.json(&dir, &["stop", "web"]);
}

#[test]
fn a_host_that_cannot_run_the_guest_says_why_before_it_is_touched() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(3);
    let source = guest.source();
    let refused = |arguments: &[&str]| {
        let words = [&["move", &source], arguments].concat();
        let (said, code) = hosts.a.refused(&dir, &words);
        assert_eq!(guest.qmp().status(), "running", "{said}");
        assert_nothing_of_a_move(&hosts.b, &dir);
        assert_no_files_of_a_move(&hosts.a);
        (said, code)
    };
    let (said, code) = refused(&["b", "--qemu", "/nowhere/qemu"]);
    assert_eq!(code, 4, "{said}");
    let (said, code) = refused(&["b", "--stream", "--remap", "disk:*=/nowhere/disk.img"]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("/nowhere/disk.img"), "{said}");
    let (said, code) = refused(&["nobody.invalid"]);
    assert_eq!(code, 5, "{said}");
    let (said, code) = refused(&["-oProxyCommand=touch"]);
    assert_eq!(code, 2, "{said}");
    // It was not even stopped.
    guest.serial().assert_goes_on(&guest.serial().mark());
    let (said, code) = hosts.a.refused(&dir, &["move", &source, "--settle"]);
    assert_eq!(code, 2, "{said}");
}

#[test]
fn a_guest_whose_image_finds_no_room_there_runs_on_here() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let spec = GuestSpec {
        memory_mib: 128,
        ..GuestSpec::default()
    };
    let guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    fill(guest.pid(), &mut guest.qmp(), 128 << 20);
    let state = hosts.b.path("state");
    let small = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs"];
    hosts
        .b
        .does(&[&small[..], &[state.to_str().unwrap()]].concat());
    let before = guest.serial().mark();
    let (said, code) = hosts.a.refused(&dir, &["move", &guest.source(), "b"]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("not enough room"), "{said}");
    assert!(said.contains("runs on as before"), "{said}");
    guest.serial().assert_goes_on(&before);
    assert_nothing_of_a_move(&hosts.b, &dir);
    assert_no_files_of_a_move(&hosts.a);
}

/// Starts a move, to be watched.
fn start(from: &Host, dir: &TestDir, arguments: &[&str]) -> Child {
    let mut command = from.vmstow(dir, arguments);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until all that worked for a move is gone: who holds a guest, and who looks after it.
fn wait_for_silence(dir: &TestDir) {
    wait_until("all to be silent", PATIENCE, || {
        let mut left = dir.processes();
        left.retain(|it| {
            let is_ours = |word: &String| word == "--stdio" || word.starts_with("__");
            it.argv().iter().any(is_ours)
        });
        left.is_empty().then_some(()).ok_or(format!("{left:#?}"))
    });
}

#[test]
fn a_cable_that_is_cut_leaves_the_guest_here_until_it_is_mended() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let spec = GuestSpec {
        memory_mib: 128,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    fill(guest.pid(), &mut guest.qmp(), 128 << 20);
    let before = guest.serial().mark();
    let source = guest.source();
    let child = start(&hosts.a, &dir, &["move", &source, "b", "--bwlimit", "20M"]);
    wait_until("some of the image", PATIENCE, || {
        let arrivals = hosts.b.path("state/vmstow/arrivals");
        let entries = std::fs::read_dir(arrivals).into_iter().flatten().flatten();
        let parts = entries.filter(|entry| entry.path().extension() == Some("part".as_ref()));
        let count = parts.count();
        (count > 0).then_some(()).ok_or(count.to_string())
    });
    hosts.cut(true);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("runs on as before"), "{said}");
    guest.serial().assert_goes_on(&before);
    hosts.cut(false);
    wait_for_silence(&dir);
    assert!(hosts.b.qemus(&dir).is_empty());
    hosts.a.json(&dir, &["move", &source, "b"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let _qemu = qemu_of(&hosts.b, &dir);
    guest.serial().assert_goes_on(&before);
}

#[test]
fn a_guest_that_moves_lazily_runs_at_once_and_gets_its_memory_behind_although_the_connection_is_lost()
 {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let spec = GuestSpec {
        memory_mib: 128,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    fill(guest.pid(), &mut guest.qmp(), 128 << 20);
    let source = guest.source();
    let words = ["move", &source, "b", "--lazy", "--fill-rate", "4"];
    let child = start(&hosts.a, &dir, &words);
    // It ends here while most of its memory has not gone there yet.
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let qemu = qemu_of(&hosts.b, &dir);
    guest.serial().assert_goes_on(&before);
    for server in hosts.b.servers(&dir) {
        server.kill();
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("trying again"), "{said}");
    guest.serial().assert_goes_on(&guest.serial().mark());
    assert_no_files_of_a_move(&hosts.a);
    assert_no_files_of_a_move(&hosts.b);
    drop(qemu);
}

#[test]
fn a_lazy_move_whose_mover_is_killed_goes_on_when_it_is_started_again() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let spec = GuestSpec {
        memory_mib: 128,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    fill(guest.pid(), &mut guest.qmp(), 128 << 20);
    let source = guest.source();
    let words = ["move", &source, "b", "--lazy", "--fill-rate", "8"];
    let mut child = start(&hosts.a, &dir, &words);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let _qemu = qemu_of(&hosts.b, &dir);
    guest.serial().assert_goes_on(&before);
    child.kill().unwrap();
    child.wait().unwrap();
    let report = hosts.a.json(&dir, &words);
    assert_eq!(report["sent"], json!(null));
    guest.serial().assert_goes_on(&guest.serial().mark());
    assert_no_files_of_a_move(&hosts.a);
    assert_no_files_of_a_move(&hosts.b);
}

/// Who is killed.
#[derive(Debug, Clone, Copy)]
enum Kill {
    Mover,
    Servers,
}

/// Starts a guest by the name of web, which counts.
fn run_web(host: &Host, dir: &TestDir) -> Serial {
    let xml = counter_xml(dir, &serial_into(dir, "serial"), "");
    let xml_file = dir.join("web.xml");
    std::fs::write(&xml_file, xml).unwrap();
    host.json(dir, &["run", xml_file.to_str().unwrap(), "--name", "web"]);
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);
    serial
}

/// Moves to and fro until somebody was killed in ten of them.
fn moves_although_killed(kill: Kill) {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let serial = run_web(&hosts.a, &dir);
    let (mut from, mut to, mut name) = (&hosts.a, &hosts.b, "b");
    let mut hit = 0;
    for round in 0..40u64 {
        if hit == 10 {
            break;
        }
        let way: &[&str] = if round % 2 == 0 { &["--stream"] } else { &[] };
        let words = [&["move", "web", name], way].concat();
        let mut child = start(from, &dir, &words);
        // Some of them right behind GO, where it matters; the others at moments that wander over all of the move.
        if round % 3 == 0 {
            let _ = (0..4000).find(|_| {
                std::thread::sleep(Duration::from_millis(1));
                !from.records("moves").is_empty() || child.try_wait().unwrap().is_some()
            });
        } else {
            std::thread::sleep(Duration::from_millis(40 + round * 100 % 900));
        }
        let servers = to.servers(&dir);
        hit += u32::from(match kill {
            Kill::Mover => child.try_wait().unwrap().is_none(),
            Kill::Servers => !servers.is_empty(),
        });
        match kill {
            Kill::Mover => child.kill().unwrap(),
            Kill::Servers => servers.iter().for_each(Process::kill),
        }
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        wait_for_silence(&dir);
        let (here, there) = (from.qemus(&dir).len(), to.qemus(&dir).len());
        assert!(here + there >= 1, "round {round}: it is nowhere: {said}");
        if here > 0 || !from.records("moves").is_empty() {
            from.json(&dir, &["move", "web", name]);
            wait_for_silence(&dir);
        }
        let (here, there) = (from.qemus(&dir).len(), to.qemus(&dir).len());
        assert_eq!((here, there), (0, 1), "round {round} {kill:?}: {said}");
        // Two that count would write the same number twice.
        let before = serial.mark();
        serial.assert_goes_on_to(&before, before.last_tick() + 2);
        (from, to) = (to, from);
        name = if name == "b" { "a" } else { "b" };
    }
    assert_eq!(hit, 10, "too many kills came too early or too late");
    for host in [&hosts.a, &hosts.b] {
        assert!(host.records("moves").is_empty());
        // Whoever was killed before it could say that all is over leaves a note that it is.
        for record in host.records("arrivals") {
            let record: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
            assert!(
                record["state"] == "runs" || record["state"] == "refused",
                "{record}"
            );
        }
    }
    from.json(&dir, &["stop", "web"]);
}

#[test]
fn a_mover_that_is_killed_at_whatever_moment_leaves_the_guest_at_one_place_in_the_end() {
    moves_although_killed(Kill::Mover);
}

#[test]
fn a_peer_that_is_killed_at_whatever_moment_leaves_the_guest_at_one_place_in_the_end() {
    moves_although_killed(Kill::Servers);
}

/// Starts a move whose QEMU here stands still right behind GO, and kills the mover once the guest is known to run there.
/// QEMU here gets this signal then. `false` if the move was over before QEMU could be held.
fn killed_before_its_end_here(from: &Host, to: &str, dir: &TestDir, then: Signal) -> bool {
    let qemu = from.qemus(dir).remove(0);
    let mut child = start(from, dir, &["move", "web", to, "--stream"]);
    let begin = Instant::now();
    while from.records("moves").is_empty() && child.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    qemu.signal(Signal::STOP);
    let is_over = wait_until("the guest to run there", PATIENCE, || {
        if child.try_wait().unwrap().is_some() {
            return Ok(true);
        }
        let records = from.records("moves").into_iter();
        let mut records = records.map(|path| std::fs::read_to_string(path).unwrap_or_default());
        let runs = records.any(|text| {
            serde_json::from_str(&text).is_ok_and(|record: Value| !record["there"].is_null())
        });
        runs.then_some(false).ok_or("it does not".to_string())
    });
    if !is_over {
        child.kill().unwrap();
    }
    child.wait().unwrap();
    qemu.signal(then);
    wait_for_silence(dir);
    !from.records("moves").is_empty()
}

#[test]
fn a_guest_that_runs_there_ends_here_however_its_mover_was_killed() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let serial = run_web(&hosts.a, &dir);
    let (mut from, mut to, mut name) = (&hosts.a, &hosts.b, "b");
    let mut caught = 0;
    for _ in 0..10 {
        // Once it is still here, once it has ended, and once it is still here and the other host is gone.
        let then = [Signal::CONT, Signal::KILL, Signal::CONT][caught];
        if killed_before_its_end_here(from, name, &dir, then) {
            if caught == 0 {
                let listed = from.json(&dir, &["list"]);
                assert_eq!(listed["guests"][0]["moving_to"], json!(name), "{listed}");
                let (said, code) =
                    from.refused(&dir, &["save", "web", "x.stow", "--from-postmigrate"]);
                assert_eq!(code, 2, "{said}");
                assert!(said.contains("is not settled"), "{said}");
            }
            if caught == 2 {
                to.qemus(&dir).iter().for_each(Process::kill);
                let before = serial.mark();
                from.json(&dir, &["move", "web", "--settle", "--stays-here"]);
                assert!(from.records("moves").is_empty());
                serial.wait_for_new_line(&before, "a tick", |line| line.starts_with("tick "));
                from.json(&dir, &["stop", "web"]);
                // What is over and forgotten is no move.
                let (said, _) = from.refused(&dir, &["move", "web", name]);
                assert!(said.contains("no guest named web"), "{said}");
                return;
            }
            let report = from.json(&dir, &["move", "web", name]);
            assert_eq!(report["sent"], json!(null), "{report}");
            assert!(from.records("moves").is_empty());
            caught += 1;
        }
        assert_eq!((from.qemus(&dir).len(), to.qemus(&dir).len()), (0, 1));
        let before = serial.mark();
        serial.assert_goes_on_to(&before, before.last_tick() + 2);
        (from, to) = (to, from);
        name = if name == "b" { "a" } else { "b" };
    }
    panic!("it was never held in time: {caught} of 3");
}

/// Whether a guest is loaded there and waits for GO.
fn is_held(host: &Host) -> bool {
    let records = host.records("arrivals").into_iter();
    let mut records = records.filter_map(|path| std::fs::read(path).ok());
    records.any(|bytes| {
        serde_json::from_slice(&bytes)
            .is_ok_and(|record: Value| record["state"] == "held" && !record["guest"].is_null())
    })
}

#[test]
fn a_guest_whose_qemu_there_stands_still_at_go_is_ended_there_and_kept_here() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(3);
    let source = guest.source();
    let mut before = guest.serial().mark();
    let mut said = None;
    // The moment between the load and GO is short: most moves are caught in it, not all.
    for _ in 0..10 {
        let mut child = start(&hosts.a, &dir, &["move", &source, "b", "--stream"]);
        let mut qemus = Vec::new();
        while !is_held(&hosts.b) && child.try_wait().unwrap().is_none() {
            if qemus.is_empty() {
                qemus = hosts.b.qemus(&dir);
            }
            std::thread::yield_now();
        }
        for qemu in &qemus {
            qemu.signal(Signal::STOP);
        }
        let output = child.wait_with_output().unwrap();
        wait_for_silence(&dir);
        if !output.status.success() {
            assert_eq!(output.status.code(), Some(5));
            said = Some(String::from_utf8_lossy(&output.stderr).into_owned());
            break;
        }
        // It was let run before; now it is there, and another one takes its place here.
        hosts.b.qemus(&dir).iter().for_each(Process::kill);
        guest.wait_for_exit();
        std::fs::remove_file(guest.serial().path()).unwrap();
        guest = Guest::start(&dir, GuestSpec::default());
        guest.serial().wait_for_tick(3);
        before = guest.serial().mark();
    }
    let said = said.expect("QEMU there was never stopped in time");
    assert!(hosts.b.qemus(&dir).is_empty());
    // Whether it was told to run before it stood still decides who may say where the guest goes on.
    if said.contains("b could not let it run") {
        assert!(said.contains("runs on as before"), "{said}");
    } else {
        assert!(said.contains("is not there any more"), "{said}");
        assert!(said.contains("stays stopped here"), "{said}");
        let (again, code) = hosts.a.refused(&dir, &["move", &source, "b"]);
        assert_eq!(code, 5, "{again}");
        assert!(again.contains("is not there any more"), "{again}");
        hosts
            .a
            .json(&dir, &["move", &source, "--settle", "--stays-here"]);
    }
    guest.serial().assert_goes_on(&before);
    hosts.a.json(&dir, &["move", &source, "b"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let _qemu = qemu_of(&hosts.b, &dir);
    guest.serial().assert_goes_on(&before);
}

#[test]
fn an_image_is_restored_on_another_host_that_reads_it_here() {
    let dir = TestDir::new();
    let hosts = TwoHosts::new(&dir);
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(3);
    let image = dir.join("x.stow");
    let image = image.to_str().unwrap();
    hosts.a.json(&dir, &["save", &guest.source(), image]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    // Nobody there trusts this host's key.
    let (said, code) = hosts.a.refused(&dir, &["restore", image, "--on", "b"]);
    assert_eq!(code, 6, "{said}");
    for way in [&["one"][..], &["two", "--lazy"]] {
        let words = ["restore", image, "--on", "b", "--trust", "--name"];
        let report = hosts.a.json(&dir, &[&words[..], way].concat());
        assert_eq!(report["name"], json!(way[0]), "{report}");
        assert_eq!(report["state"], json!("running"), "{report}");
        let qemu = qemu_of(&hosts.b, &dir);
        // Both begin where the image ends.
        guest
            .serial()
            .wait_for_new_line(&before, "a tick", |line| line.starts_with("tick "));
        hosts.b.json(&dir, &["stop", way[0]]);
        drop(qemu);
        std::fs::write(guest.serial().path(), before.text()).unwrap();
    }
    assert_no_files_of_a_move(&hosts.b);
}
