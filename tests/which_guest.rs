//! `pid:N` means that process, whoever listens on the socket that its arguments name.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use support::{Guest, GuestSpec, TestDir};

#[test]
fn a_monitor_that_another_qemu_took_over_is_not_used() {
    let dir = TestDir::new();
    let first = Guest::start(&dir, GuestSpec::default().named("first"));
    let taken = format!("unix:{},server=on,wait=off", first.qmp_path().display());
    let second = GuestSpec::default().named("second");
    let second = Guest::start(&dir, second.with(&["-qmp", &taken]));
    let dry_run = |source: &str| {
        let mut command = dir.vmstow();
        let output = command
            .args(["save", source, "x.stow", "--dry-run"])
            .output()
            .unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let said = dry_run(&format!("pid:{}", first.pid()));
    assert!(
        said.contains(&format!("where process {} answers", second.pid())),
        "{said}"
    );
    // By the socket's name it is the other guest, with its own arguments.
    let said = dry_run(&first.source());
    assert!(said.contains("guest: second"), "{said}");
}
