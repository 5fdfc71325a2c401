//! `vmstow config`: what is changed in an image is what a restore does, and what the guest would see is not changed.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use vmstow::store::FileSource;

use support::{Guest, GuestSpec, Mark, Restored, Serial, TestDir, counter_xml, serial_into};

/// A guest that was saved to `x.stow`, and what it had said by then.
struct Saved {
    dir: TestDir,
    guest: Guest,
    before: Mark,
}

fn save(extra: &[&str], options: &[&str]) -> Saved {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: 16,
        ..GuestSpec::default().named("web01").with(extra)
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    let source = guest.source();
    dir.json(&[&["save", &source, "x.stow"], options].concat());
    guest.wait_for_exit();
    let before = guest.serial().mark();
    Saved { dir, guest, before }
}

impl Saved {
    fn xml(&self) -> String {
        self.dir.xml_in("x.stow")
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.dir.join("x.stow")).unwrap()
    }

    fn inspect(&self) -> serde_json::Value {
        self.dir.json(&["inspect", "x.stow"])
    }

    /// Edits with this command as the editor; gives the exit code and what was said.
    fn edit(&self, editor: &str) -> (Option<i32>, String) {
        let temporary = self.dir.join("tmp");
        let _ = std::fs::create_dir(&temporary);
        let mut edit = self.dir.vmstow();
        edit.env("EDITOR", editor).env_remove("VISUAL");
        edit.env("TMPDIR", &temporary);
        let output = edit.args(["config", "x.stow", "edit"]).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// The texts that were kept for the user.
    fn kept(&self) -> Vec<std::path::PathBuf> {
        let kept = std::fs::read_dir(self.dir.join("tmp")).unwrap();
        kept.map(|entry| entry.unwrap().path()).collect()
    }

    fn goes_on(&self, restored: &Restored, serial: &Path) {
        Serial::at(serial).assert_goes_on(&self.before);
        assert!(restored.qemu.is_qemu());
    }
}

#[test]
fn other_backends_in_the_xml_are_what_a_restore_uses() {
    let saved = save(&[], &[]);
    let (disk, serial) = (saved.dir.join("moved.img"), saved.dir.join("moved.serial"));
    std::fs::rename(saved.guest.disk(), &disk).unwrap();
    let xml = saved.xml();
    let new = xml
        .replace("web01.img", "moved.img")
        .replace("web01.serial", "moved.serial")
        .replace(
            "<name>web01</name>",
            "<name>web02</name>\n  <title>moved</title>",
        );
    std::fs::write(saved.dir.join("new.xml"), &new).unwrap();
    let first = saved.bytes();
    let report = saved.dir.json(&["config", "x.stow", "replace", "new.xml"]);
    assert_eq!(report["generation"], 2);
    assert_eq!(report["is_signed"], true);
    assert_eq!(report["remaps"].as_array().unwrap().len(), 2, "{report:#}");
    // Appended, never rewritten.
    assert_eq!(saved.bytes()[..first.len()], first[..]);
    assert_eq!(saved.xml(), new);
    let inspected = saved.inspect();
    assert_eq!(inspected["trust"]["state"], "trusted");
    assert_eq!(inspected["manifest"]["guest"]["name"], "web02");
    assert_eq!(saved.dir.json(&["verify", "x.stow"])["is_whole"], true);
    let restored = saved.dir.restore(&["x.stow"]);
    assert_eq!(restored.name(), "web02");
    saved.goes_on(&restored, &serial);
    assert_eq!(saved.guest.serial().text(), saved.before.text());
}

#[test]
fn xml_as_people_write_it_is_filled_in_before_it_is_compared_and_kept() {
    let dir = TestDir::new();
    let devices = "<controller type='scsi' index='0' model='virtio-scsi'/>
    <disk type='file' device='cdrom'><target dev='sda' bus='scsi'/><readonly/></disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='null'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <input type='tablet' bus='usb'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
    let written = counter_xml(&dir, &serial_into(&dir, "serial"), devices)
        .replace("machine='pc'", "machine='q35'")
        .replace("<features>", "<cpu mode='maximum'/>\n  <features>");
    dir.write("web.xml", &written);
    let guest = dir.run(&["web.xml"]);
    let serial = Serial::at(dir.join("serial"));
    serial.wait_for_tick(3);
    dir.json(&["save", "web", "x.stow"]);
    guest.qemu.wait_for_exit();
    let before = serial.mark();
    let replace = |text: &str| {
        dir.write("new.xml", text);
        dir.json(&["config", "x.stow", "replace", "new.xml"])
    };
    let kept = dir.xml_in("x.stow");
    // What it was run from says what is kept.
    assert_eq!(replace(&written)["is_changed"], false);
    let same = dir.json(&["config", "x.stow", "diff", "web.xml"]);
    assert_eq!(same["is_same"], true, "{same:#}");
    assert_eq!(dir.xml_in("x.stow"), kept);
    // What is seen is told, and nothing that was only left open.
    for (from, to, seen) in [
        ("<rng model='virtio'>", "<!-- <rng model='virtio'>", ""),
        ("bus='scsi'/>", "bus='sata'/>", "disk[2]/target/@bus"),
        ("<vcpu>1<", "<vcpu>2<", "domain/vcpu"),
    ] {
        let text = written.replace(from, to);
        let text = match seen {
            "" => text.replace("</rng>", "</rng> -->"),
            _ => text,
        };
        dir.write("new.xml", &text);
        let said = dir.refused(2, &["config", "x.stow", "replace", "new.xml"]);
        let seen = if seen.is_empty() { "devices/rng" } else { seen };
        assert!(
            said.contains(seen) && said.contains("web would see"),
            "{said}"
        );
        assert!(said.matches("domain/").count() <= 3, "{said}");
        assert!(!said.contains("line 0"), "{said}");
    }
    // Another backend, in the words of the short XML.
    let moved = dir.join("moved");
    let text = written
        .replace(
            &dir.join("serial").display().to_string(),
            moved.to_str().unwrap(),
        )
        .replace("<name>web<", "<name>web02<");
    let report = replace(&text);
    assert_eq!(report["is_changed"], true);
    let changed = dir.xml_in("x.stow");
    let count = |text: &str, what: &str| text.matches(what).count();
    for what in ["<address ", "<alias ", "<controller "] {
        assert_eq!(count(&changed, what), count(&kept, what), "{changed}");
    }
    let restored = dir.restore(&["x.stow"]);
    assert_eq!(restored.name(), "web02");
    Serial::at(&moved).assert_goes_on(&before);
}

#[test]
fn what_the_user_says_at_the_restore_counts_more_than_the_xml() {
    let saved = save(&[], &[]);
    let xml = saved.xml().replace("web01.serial", "missing/serial");
    std::fs::write(saved.dir.join("new.xml"), &xml).unwrap();
    saved.dir.json(&["config", "x.stow", "replace", "new.xml"]);
    let mine = saved.dir.join("mine.serial");
    let remap = format!("chardev:serial0=file:{}", mine.display());
    let restored = saved.dir.restore(&["x.stow", "--remap", &remap]);
    saved.goes_on(&restored, &mine);
}

#[test]
fn a_pipe_that_is_restored_while_it_arrives_does_not_lose_a_change() {
    let saved = save(&[], &[]);
    let moved = saved.dir.join("moved.serial");
    let path = format!("domain/devices/serial/source/@path={}", moved.display());
    saved.dir.json(&["config", "x.stow", "set", &path]);
    let mut trusted = saved.dir.vmstow();
    let trusted = trusted
        .args(["restore", "-", "--trust"])
        .write_stdin(saved.bytes());
    let output = trusted.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("restore it without --trust"), "{said}");
    let mut whole = saved.dir.vmstow();
    let whole = whole
        .args(["--json", "restore", "-"])
        .write_stdin(saved.bytes());
    let restored = Restored::of(serde_json::from_slice(&whole.unwrap().stdout).unwrap());
    saved.goes_on(&restored, &moved);
}

#[test]
fn what_the_guest_would_see_is_refused_with_each_change_and_the_text_is_kept() {
    let saved = save(&[], &[]);
    let (before, xml) = (saved.bytes(), saved.xml());
    let (code, said) =
        saved.edit("sed -i -e s/i440fx/q35/ -e 's/16777216</33554432</' -e 's/web01/web02/'");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("web01 would see"), "{said}");
    for told in [
        "os/type/@machine is \"pc-i440fx-",
        "domain/memory is \"16777216\" and would be \"33554432\"",
        "why: line ",
    ] {
        assert!(said.contains(told), "{told}: {said}");
    }
    let kept = saved.kept();
    let [kept] = &kept[..] else {
        panic!("{kept:?}");
    };
    assert!(said.contains(&kept.display().to_string()), "{said}");
    let text = std::fs::read_to_string(kept).unwrap();
    assert!(text.contains("web02") && text.contains("q35"), "{text}");
    let again = kept.display().to_string();
    saved
        .dir
        .refused(2, &["config", "x.stow", "replace", &again]);
    assert_eq!(saved.bytes(), before);
    assert_eq!(saved.xml(), xml);
}

#[test]
fn an_edit_that_fails_or_leaves_nothing_changes_nothing() {
    let saved = save(&[], &[]);
    let before = saved.bytes();
    for (editor, code, says) in [
        ("true", 0, "nothing was changed"),
        ("false", 1, "nothing was changed"),
        ("/nonexistent/editor", 1, "nothing was changed"),
        ("truncate -s 0", 2, "the text is empty"),
        ("sed -i s/domain/x/", 3, "cannot be read"),
        ("sed -i 's/<name>.*name>//'", 2, "has none"),
        ("sed -i '1i <!-- <!DOCTYPE -->'", 2, "DOCTYPE"),
    ] {
        let (found, said) = saved.edit(editor);
        assert_eq!(found, Some(code), "{editor}: {said}");
        assert!(said.contains(says), "{editor}: {said}");
        assert_eq!(saved.bytes(), before, "{editor}");
    }
    let (code, said) = saved.edit("sed -i 's/<name>web01/<name>other/'");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(saved.inspect()["manifest"]["guest"]["name"], "other");
}

#[test]
fn labels_and_values_are_set_and_got() {
    let saved = save(&[], &["--label", "owner=web"]);
    let config = |words: &[&str]| {
        let output = saved
            .dir
            .vmstow()
            .args(["config", "x.stow"])
            .args(words)
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(config(&["get", "owner"]), "web\n");
    config(&["set", "owner=ops", "tier=a=b", "domain/title=the <server>"]);
    assert_eq!(config(&["get", "--labels"]), "owner=ops\ntier=a=b\n");
    assert_eq!(config(&["get", "domain/title"]), "the <server>\n");
    assert_eq!(
        config(&["get", "/domain/devices/disk[1]/target/@bus"]),
        "virtio\n"
    );
    assert_eq!(saved.inspect()["generation"], 2);
    config(&["set", "--remove", "tier"]);
    assert_eq!(config(&["get", "--labels"]), "owner=ops\n");
    assert!(config(&["set", "owner=ops"]).contains("nothing was changed"));
    assert_eq!(saved.inspect()["generation"], 3);
    for words in [
        &["get", "tier"][..],
        &["get", "domain/nothing"],
        &["set", "--remove", "tier"],
        &["set", "domain/a/b=c"],
        &["set", "domain/vcpu=7"],
    ] {
        let said = saved
            .dir
            .refused(2, &[&["config", "x.stow"], words].concat());
        assert!(said.contains("try:"), "{said}");
    }
    let restored = saved.dir.restore(&["x.stow"]);
    saved.goes_on(&restored, saved.guest.serial().path());
}

#[test]
fn differences_are_told_between_images_and_files() {
    let saved = save(&[], &["--label", "owner=web"]);
    std::fs::copy(saved.dir.join("x.stow"), saved.dir.join("y.stow")).unwrap();
    let same = saved.dir.json(&["config", "x.stow", "diff", "y.stow"]);
    assert_eq!(same["is_same"], true);
    saved
        .dir
        .json(&["config", "y.stow", "set", "owner=ops", "domain/title=t"]);
    let output = saved
        .dir
        .vmstow()
        .args(["config", "x.stow", "diff", "y.stow"])
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(
        lines,
        [
            "+ domain/title: \"<title>t</title>\"",
            "~ label owner: \"web\" → \"ops\""
        ]
    );
    let xml = saved.xml().replace("i440fx", "q35");
    let mut diff = saved.dir.vmstow();
    let diff = diff
        .args(["--json", "config", "x.stow", "diff", "-"])
        .write_stdin(xml);
    let told: serde_json::Value = serde_json::from_slice(&diff.unwrap().stdout).unwrap();
    assert_eq!(told["changes"][0]["path"], "domain/os/type/@machine");
    assert_eq!(told["changes"][0]["class"], "abi");
}

#[test]
fn a_change_that_a_restore_does_not_heed_is_told() {
    let saved = save(&[], &[]);
    let xml = saved
        .xml()
        .replace("<devices>", "<on_crash>destroy</on_crash>\n  <devices>");
    let mut replace = saved.dir.vmstow();
    let replace = replace
        .args(["config", "x.stow", "replace", "-"])
        .write_stdin(xml);
    let output = replace.output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("domain/on_crash differs now"), "{said}");
}

#[test]
fn an_image_in_use_damaged_or_cut_off_is_not_changed() {
    let saved = save(&[], &[]);
    let path = saved.dir.join("x.stow");
    let user = FileSource::open(&path).unwrap();
    user.lock_shared(&path).unwrap();
    let set = ["config", "x.stow", "set", "a=b"];
    let said = saved.dir.refused(4, &set);
    assert!(said.contains("a guest runs on it"), "{said}");
    drop(user);
    let whole = saved.bytes();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(&whole[whole.len() - 700..whole.len() - 600])
        .unwrap();
    let said = saved.dir.refused(3, &set);
    assert!(said.contains("vmstow repair x.stow"), "{said}");
    saved.dir.json(&["repair", "x.stow"]);
    assert_eq!(saved.bytes(), whole);
    let xml = whole.windows(8).position(|it| it == b"<domain ").unwrap();
    support::flip_bit(&path, xml as u64 + 4, 0);
    let said = saved.dir.refused(3, &set);
    assert!(said.contains("x.stow is damaged"), "{said}");
    support::flip_bit(&path, xml as u64 + 4, 0);
    saved.dir.json(&set);
    let mut pipe = saved.dir.vmstow();
    pipe.args(["config", "-", "set", "a=b"])
        .write_stdin(whole)
        .assert()
        .code(2);
}

#[test]
fn a_strangers_image_is_not_vouched_for_by_a_change() {
    let saved = save(&[], &[]);
    std::fs::rename(saved.dir.join("state"), saved.dir.join("state.old")).unwrap();
    assert_eq!(saved.inspect()["trust"]["state"], "stranger");
    let report = saved.dir.json(&["config", "x.stow", "set", "a=b"]);
    assert_eq!(report["is_signed"], false);
    assert_eq!(saved.inspect()["trust"]["state"], "stale");
    saved.dir.refused(6, &["restore", "x.stow"]);
}
