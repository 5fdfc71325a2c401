//! The QMP client against real QEMUs.

#![expect(clippy::unwrap_used, reason = "a test fails by its panic")]

mod support;

use std::io::{Read, pipe};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmstow::qmp::{MigrationStatus, QmpClient, QmpError, RunState, SavedSettings};

/// A QEMU that ends with the test.
struct Qemu {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Qemu {
    fn start(mut command: Command, arguments: &str) -> Qemu {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let child = command
            .args(arguments.split_whitespace())
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU (Debian package qemu-system-x86)");
        Qemu {
            child,
            socket,
            _dir: dir,
        }
    }

    fn connect(&self) -> QmpClient {
        let give_up = Instant::now() + Duration::from_secs(20);
        loop {
            match QmpClient::connect(&self.socket, Duration::from_secs(20)) {
                Err(QmpError::Connect { .. }) if Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                client => return client.unwrap(),
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command for each QEMU that is supported.
fn qemus() -> Vec<Command> {
    support::Qemu::ALL
        .map(|qemu| Command::new(qemu.program()))
        .into()
}

fn each_qemu(arguments: &str, story: impl Fn(&Qemu, &mut QmpClient)) {
    for command in qemus() {
        let qemu = Qemu::start(command, arguments);
        let mut qmp = qemu.connect();
        story(&qemu, &mut qmp);
    }
}

#[test]
fn typed_queries_read_what_a_real_qemu_answers() {
    let uuid = "6f1c7f4e-9d2a-4b7e-8a55-0d7f5b1c2e3a";
    let arguments = format!(
        "-machine pc -m 16 -smp 2 -S -name web01 -uuid {uuid} -serial null -drive if=ide,file=null-co://,format=raw,id=d0,read-only=off"
    );
    each_qemu(&arguments, |_, qmp| {
        assert!(qmp.version().is_at_least(7, 2));
        assert_eq!(qmp.query_status().unwrap(), RunState::Prelaunch);
        assert_eq!(qmp.query_name().unwrap().as_deref(), Some("web01"));
        assert_eq!(qmp.query_uuid().unwrap().unwrap().to_string(), uuid);
        let machine = qmp.query_machine_type().unwrap();
        assert!(machine.starts_with("pc-i440fx-"), "{machine}");
        let machines = qmp.query_machines().unwrap();
        let found = machines.iter().find(|one| one.name == machine).unwrap();
        assert_eq!(found.alias.as_deref(), Some("pc"));
        assert_eq!(qmp.query_cpus().unwrap().len(), 2);
        assert_eq!(qmp.query_memory_size().unwrap().base_memory, 16 << 20);
        let nodes = qmp.query_named_block_nodes().unwrap();
        assert!(nodes.iter().any(|node| node.drv == "null-co"));
        let blocks = qmp.query_block().unwrap();
        assert_eq!(blocks[0].device, "d0");
        assert!(blocks[0].inserted.is_some());
        assert!(!qmp.query_chardev().unwrap().is_empty());
        assert!(!qmp.query_kvm().unwrap());
        assert!(!qmp.qom_list("/machine").unwrap().is_empty());
        assert!(qmp.qom_get("/machine", "type").unwrap().is_string());
        assert!(qmp.query_migrate().unwrap().blocked_reasons.is_empty());
    });
}

#[test]
fn a_guest_without_uuid_and_name_has_none() {
    each_qemu("-machine none -S", |_, qmp| {
        assert_eq!(qmp.query_uuid().unwrap(), None);
        assert_eq!(qmp.query_name().unwrap(), None);
    });
}

#[test]
fn a_refused_command_keeps_the_words_of_qemu_and_the_connection() {
    each_qemu("-machine none", |_, qmp| {
        let error = qmp.execute::<Value>("no-such", json!({})).unwrap_err();
        let QmpError::Refused { class, desc, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(class, "CommandNotFound");
        assert_eq!(desc, "The command no-such has not been found");
        qmp.query_status().unwrap();
    });
}

#[test]
fn a_monitor_serves_one_client_at_a_time() {
    for command in qemus() {
        let qemu = Qemu::start(command, "-machine none");
        let first = qemu.connect();
        let second = QmpClient::connect(&qemu.socket, Duration::from_millis(150));
        assert!(matches!(second, Err(QmpError::MonitorBusy { .. })));
        drop(first);
        qemu.connect().query_status().unwrap();
    }
}

#[test]
fn a_killed_qemu_is_a_lost_connection() {
    for command in qemus() {
        let mut qemu = Qemu::start(command, "-machine none");
        let mut qmp = qemu.connect();
        qemu.child.kill().unwrap();
        qemu.child.wait().unwrap();
        assert!(matches!(qmp.query_status(), Err(QmpError::Disconnected)));
    }
}

#[test]
fn quit_ends_qemu_and_its_event_is_kept() {
    for command in qemus() {
        let mut qemu = Qemu::start(command, "-machine none");
        let mut qmp = qemu.connect();
        qmp.quit().unwrap();
        let event = qmp.wait_event("SHUTDOWN", Duration::from_secs(10)).unwrap();
        assert_eq!(event.data["reason"], "host-qmp-quit");
        assert!(qemu.child.wait().unwrap().success());
    }
}

#[test]
fn a_stream_comes_through_a_descriptor_that_we_passed() {
    each_qemu("-machine pc -m 16", |_, qmp| {
        qmp.stop().unwrap();
        qmp.wait_event("STOP", Duration::from_secs(10)).unwrap();
        assert_eq!(qmp.query_status().unwrap(), RunState::Paused);
        let settings = SavedSettings::record(qmp).unwrap();
        settings.set_for_save(qmp).unwrap();
        let (mut reader, writer) = pipe().unwrap();
        qmp.getfd("stream", writer.as_fd()).unwrap();
        drop(writer);
        qmp.migrate("fd:stream").unwrap();
        let mut stream = Vec::new();
        reader.read_to_end(&mut stream).unwrap();
        assert_eq!(stream.get(..4), Some(b"QEVM".as_slice()));
        wait_until_ended(qmp, &MigrationStatus::Completed);
        settings.put_back(qmp).unwrap();
        assert_eq!(SavedSettings::record(qmp).unwrap(), settings);
    });
}

fn wait_until_ended(qmp: &mut QmpClient, expected: &MigrationStatus) {
    loop {
        let info = qmp.query_migrate().unwrap();
        if !info.status.is_active() {
            assert_eq!(&info.status, expected, "{:?}", info.error_desc);
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn settings_for_a_save_turn_off_what_would_hang_it_and_are_put_back() {
    each_qemu("-machine none", |_, qmp| {
        let on = ["postcopy-ram", "return-path", "xbzrle"].map(|name| (name.to_owned(), true));
        qmp.set_capabilities(&on.clone().into()).unwrap();
        qmp.set_parameters(json!({ "max-bandwidth": 12345 }))
            .unwrap();
        let settings = SavedSettings::record(qmp).unwrap();
        settings.set_for_save(qmp).unwrap();
        let capabilities = qmp.capabilities().unwrap();
        let is_on: Vec<&String> = capabilities
            .iter()
            .filter_map(|(name, is_on)| is_on.then_some(name))
            .collect();
        assert_eq!(is_on, ["events"]);
        assert_eq!(qmp.parameters().unwrap()["max-bandwidth"], 0);
        settings.put_back(qmp).unwrap();
        assert_eq!(SavedSettings::record(qmp).unwrap(), settings);
        assert_eq!(settings.max_bandwidth, Some(12345));
        assert!(on.iter().all(|(name, _)| settings.capabilities[name]));
    });
}
