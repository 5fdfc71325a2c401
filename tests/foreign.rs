//! Files of libvirt and QEMU made into images, and images into theirs: the guest's count goes on all the way.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};
use support::{
    Libvirtd, PATIENCE, Qemu, Restored, Serial, TestDir, flip_bit, testdata, wait_until,
};
use vmstow::stream::{Event, Parser};

const HEADER_LEN: usize = 92;

/// A guest that libvirt runs, and what its serial port says.
struct Domain<'a> {
    dir: &'a TestDir,
    libvirtd: Libvirtd,
}

impl<'a> Domain<'a> {
    /// Starts one that counts.
    fn start(dir: &'a TestDir, libvirtd: Libvirtd, qemu: Qemu) -> Self {
        let xml = dir.join("domain.xml");
        std::fs::write(&xml, domain_xml(dir, qemu)).unwrap();
        let domain = Domain { dir, libvirtd };
        domain.virsh(&["create", xml.to_str().unwrap()]);
        domain
    }

    fn serial(&self) -> Serial {
        Serial::at(self.dir.join("serial"))
    }

    #[track_caller]
    fn virsh(&self, arguments: &[&str]) -> String {
        let output = self.libvirtd.virsh().args(arguments).output();
        let output = output.expect("virsh (Debian package libvirt-clients) can be started");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "virsh {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn is_there(&self) -> bool {
        let mut virsh = self.libvirtd.virsh();
        virsh
            .args(["domstate", "web01"])
            .output()
            .unwrap()
            .status
            .success()
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = self.libvirtd.virsh().args(["destroy", "web01"]).output();
        }
    }
}

fn domain_xml(dir: &TestDir, qemu: Qemu) -> String {
    let disk = dir.join("disk.img");
    std::fs::copy(testdata("guests/counter.img"), &disk).unwrap();
    let (disk, serial, qemu) = (disk.display(), dir.join("serial"), qemu.program());
    format!(
        "<domain type='qemu'>
  <name>web01</name>
  <memory unit='MiB'>16</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <devices>
    <emulator>{}</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
    <serial type='file'><source path='{}' append='on'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
",
        qemu.display(),
        serial.display()
    )
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Makes an image of `file`, and proves that it is whole.
#[track_caller]
fn import(dir: &TestDir, file: &str, image: &str, kind: &str) -> Value {
    let report = dir.json(&["convert", file, image, "--trust"]);
    assert_eq!(report["from_layout"], kind);
    assert_eq!(report.get("problems"), None, "{report}");
    assert_eq!(report["is_signed"], true);
    let verified = dir.json(&["verify", "--deep", image]);
    assert_eq!(verified["is_whole"], true, "{verified}");
    report
}

/// Ends a restored guest and waits until it is gone.
fn end(restored: Restored, dir: &TestDir) {
    dir.vmstow().args(["stop", "web01"]).assert().success();
    drop(restored);
}

#[test]
fn images_of_libvirt_11_come_and_go_in_every_format() {
    let dir = TestDir::new();
    let domain = Domain::start(&dir, Libvirtd::start(&dir.join("libvirt")), Qemu::V10);
    let serial = domain.serial();
    serial.wait_for_tick(2);
    // In what libvirt saves, in what we give it back.
    for (format, back) in [
        ("raw", "zstd"),
        ("sparse", "sparse"),
        ("zstd", "raw"),
        ("gzip", "gzip"),
        ("bzip2", "bzip2"),
        ("xz", "xz"),
        ("lzop", "raw"),
    ] {
        let save = dir.join(&format!("{format}.save"));
        domain.virsh(&["save", "web01", text(&save), "--image-format", format]);
        let before = serial.mark();
        let told = dir.json(&["inspect", text(&save)]);
        assert_eq!(told["libvirt"]["format"], format, "{told}");
        assert_eq!(told["libvirt"]["domain"], "web01");
        assert_eq!(told["libvirt"]["has_cookie"], true);
        assert_eq!(told["is_whole"], true);
        assert_eq!(
            told["contents"]["ram_blocks"][0],
            json!(["pc.ram", 16 << 20])
        );

        let image = format!("{format}.stow");
        import(&dir, text(&save), &image, &format!("libvirt {format}"));
        assert_eq!(metadata_of(&save), kept_metadata(&dir, &image));
        let restored = dir.restore(&[&image]);
        serial.assert_goes_on(&before);

        // Saved again, and given back to libvirt: its XML is the domain's own.
        dir.json(&["save", "web01", "back.stow"]);
        drop(restored);
        let before = serial.mark();
        let theirs = dir.join("back.save");
        let report = dir.json(&[
            "convert",
            "back.stow",
            text(&theirs),
            "--to",
            "libvirt",
            "--format",
            back,
        ]);
        assert_eq!(report["format"], back);
        domain.virsh(&["restore", text(&theirs)]);
        assert_eq!(domain.virsh(&["domstate", "web01"]).trim(), "running");
        serial.assert_goes_on(&before);
        for name in ["back.stow", "back.save", &image] {
            std::fs::remove_file(dir.join(name)).unwrap();
        }
    }
    domain.virsh(&["destroy", "web01"]);
    both_byte_orders_and_pipes(&dir);
    what_was_imported_goes_back_as_it_came(&dir, &domain);
    looked_at_as_they_are(&dir);
    damage_is_found(&dir);
}

/// XML and cookie of a save image, by hand.
fn metadata_of(save: &Path) -> (String, String) {
    let bytes = std::fs::read(save).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let text = |at: usize| {
        let bytes = &bytes[HEADER_LEN + at..];
        let end = bytes.iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    };
    (text(0), text(word(32)))
}

fn kept_metadata(dir: &TestDir, image: &str) -> (String, String) {
    let output = dir.vmstow().args(["inspect", "--xml", image]).unwrap();
    let manifest = dir.json(&["inspect", image])["manifest"].clone();
    let cookie = manifest["libvirt_cookie"].as_str().unwrap();
    (String::from_utf8(output.stdout).unwrap(), cookie.to_owned())
}

fn both_byte_orders_and_pipes(dir: &TestDir) {
    for format in ["raw", "zstd", "sparse"] {
        let mut bytes = std::fs::read(dir.join(&format!("{format}.save"))).unwrap();
        bytes[16..36].chunks_exact_mut(4).for_each(<[u8]>::reverse);
        std::fs::write(dir.join("swapped.save"), &bytes).unwrap();
        let told = dir.json(&["inspect", "swapped.save"]);
        assert_eq!(told["libvirt"]["byte_order"], "big");
        let ours = import(
            dir,
            "swapped.save",
            "swapped.stow",
            &format!("libvirt {format}"),
        );
        let piped = dir
            .vmstow()
            .args(["--json", "convert", "-", "piped.stow"])
            .write_stdin(bytes)
            .unwrap();
        let piped: Value = serde_json::from_slice(&piped.stdout).unwrap();
        assert_eq!(piped["image_digest"], ours["image_digest"]);
        assert_eq!(piped["is_signed"], false);
        for name in ["swapped.stow", "piped.stow"] {
            std::fs::remove_file(dir.join(name)).unwrap();
        }
    }
    // Whom nobody vouches for names nothing of this host.
    dir.vmstow()
        .args(["convert", "zstd.save", "strange.stow"])
        .assert()
        .success();
    let said = dir.refused(6, &["restore", "strange.stow", "--dry-run"]);
    assert!(said.contains("disk.img"), "{said}");
}

/// Header, XML and cookie; and the stream, which for `raw` is the same bytes.
fn what_was_imported_goes_back_as_it_came(dir: &TestDir, domain: &Domain<'_>) {
    import(dir, "raw.save", "same.stow", "libvirt raw");
    let again = dir.join("again.save");
    dir.json(&[
        "convert",
        "same.stow",
        text(&again),
        "--to",
        "libvirt",
        "--format",
        "raw",
    ]);
    assert_eq!(
        std::fs::read(dir.join("raw.save")).unwrap(),
        std::fs::read(&again).unwrap()
    );
    let shown = domain.virsh(&["save-image-dumpxml", text(&again)]);
    assert!(shown.contains("<name>web01</name>"), "{shown}");
}

/// Devices and registers, without an image.
fn looked_at_as_they_are(dir: &TestDir) {
    let registers: Vec<Value> = ["raw", "zstd", "sparse"]
        .iter()
        .map(|format| {
            let file = format!("{format}.save");
            let devices = dir.json(&["inspect", "--devices", &file]);
            assert!(devices.to_string().contains("virtio-rng"), "{devices}");
            let registers = dir.json(&["inspect", "--registers", &file]);
            assert!(registers.to_string().contains("rip"), "{registers}");
            registers
        })
        .collect();
    assert_eq!(registers.len(), 3);
    let output = dir
        .vmstow()
        .args(["inspect", "--xml", "zstd.save"])
        .unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        metadata_of(&dir.join("zstd.save")).0
    );
}

fn damage_is_found(dir: &TestDir) {
    let len = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
    let convert = |name: &str| {
        let said = dir.refused(3, &["convert", name, "never.stow"]);
        assert!(!dir.join("never.stow").exists());
        said
    };
    for format in ["gzip", "bzip2", "xz", "zstd", "lzop"] {
        let name = format!("{format}.save");
        let (len, damaged) = (len(&name), dir.join("damaged.save"));
        std::fs::copy(dir.join(&name), &damaged).unwrap();
        flip_bit(&damaged, len - len / 16, 2);
        let said = convert("damaged.save");
        assert!(said.contains("damaged.save "), "{format}: {said}");
        for part in [len - 3, len - len / 16] {
            std::fs::copy(dir.join(&name), &damaged).unwrap();
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&damaged)
                .unwrap();
            file.set_len(part).unwrap();
            let said = convert("damaged.save");
            assert!(said.contains("damaged.save "), "{format}: {said}");
        }
    }
    let at = |offset: u64, bytes: &[u8]| {
        let damaged = dir.join("damaged.save");
        std::fs::copy(dir.join("raw.save"), &damaged).unwrap();
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&damaged)
            .unwrap();
        file.write_all_at(bytes, offset).unwrap();
        convert("damaged.save")
    };
    assert!(at(0, b"LibvirtQemudPart").contains("LibvirtQemudPart"));
    assert!(at(16, &[3, 0, 0, 0]).contains("version 3"));
    assert!(at(28, &[7, 0, 0, 0]).contains("format 7"));
    assert!(at(28, &[5, 0, 0, 0]).contains("not compressed so"));
    assert!(at(20, &[0, 0, 0, 0]).contains("length"));
    assert!(at(20, &[100, 0, 0, 0]).contains("cookie"));
    assert!(at(32, &[0xff, 0xff, 0xff, 0xff]).contains("cookie"));
    for name in ["raw.save", "sparse.save"] {
        let damaged = dir.join("damaged.save");
        std::fs::copy(dir.join(name), &damaged).unwrap();
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&damaged)
            .unwrap();
        file.set_len(len(name) * 3 / 4).unwrap();
        convert("damaged.save");
    }
    let restore = dir.refused(3, &["restore", "raw.save"]);
    assert!(
        restore.contains("vmstow convert raw.save NEW.stow"),
        "{restore}"
    );
}

#[test]
fn images_of_libvirt_9_come_in_every_format() {
    for (number, format) in ["raw", "gzip", "bzip2", "xz", "lzop"].iter().enumerate() {
        let dir = TestDir::new();
        let qemu = match number % 2 {
            0 => Qemu::V7_2,
            _ => Qemu::V10,
        };
        let save = dir.join("web01.save");
        let serial = Serial::at(dir.join("serial"));
        {
            let libvirtd = Libvirtd::start_9(&dir.join("libvirt"), format);
            let domain = Domain::start(&dir, libvirtd, qemu);
            serial.wait_for_tick(2);
            domain.virsh(&["save", "web01", text(&save)]);
        }
        let before = serial.mark();
        import(
            &dir,
            "web01.save",
            "web01.stow",
            &format!("libvirt {format}"),
        );
        let restored = dir.restore(&["web01.stow"]);
        serial.assert_goes_on(&before);
        end(restored, &dir);
    }
}

/// Saves a guest that `vmstow run` started as QEMU itself does: `migrate file:`, without mapped-ram and with it.
fn migrate(dir: &TestDir) {
    let devices = "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='DISK'/><target dev='vda' bus='virtio'/></disk>
    <serial type='file'><source path='SERIAL' append='on'/></serial>";
    let devices = devices
        .replace("DISK", text(&dir.join("disk.img")))
        .replace("SERIAL", text(&dir.join("serial")));
    let xml = format!(
        "<domain type='qemu'><name>web01</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-i440fx-10.0'>hvm</type></os>
  <devices>{devices}</devices></domain>"
    );
    std::fs::copy(testdata("guests/counter.img"), dir.join("disk.img")).unwrap();
    std::fs::write(dir.join("web01.xml"), xml).unwrap();
    let guest = Restored::of(dir.json(&["run", "web01.xml"]));
    Serial::at(dir.join("serial")).wait_for_tick(3);
    let mut qmp = guest.qmp();
    qmp.command("stop", json!({}));
    qmp.migrate(&format!("file:{}", dir.join("guest.mig").display()));
    qmp.command("cont", json!({}));
    // QEMU leaves the bytes of pages that become zero while the guest runs.
    let capabilities = json!([{ "capability": "mapped-ram", "state": true }]);
    qmp.command(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    );
    qmp.migrate(&format!("file:{}", dir.join("mapped.mig").display()));
    drop(qmp);
    end(guest, dir);
}

#[test]
fn bare_streams_come_and_go() {
    let dir = TestDir::new();
    migrate(&dir);
    let serial = Serial::at(dir.join("serial"));
    let plain = import(&dir, "guest.mig", "plain.stow", "stream");
    import(&dir, "mapped.mig", "mapped.stow", "mapped-ram");
    bytes_of_zero_pages_are_no_pages(&dir);
    // Without a configuration there is nothing to start.
    let said = dir.refused(2, &["restore", "plain.stow"]);
    assert!(said.contains("has no configuration"), "{said}");
    assert!(said.contains("--xml FILE"), "{said}");
    let ways = &dir.json(&["inspect", "plain.stow"])["restores"];
    assert_eq!(ways["eager"]["is_possible"], false);
    let [shown, mapped] = ["guest.mig", "mapped.mig"].map(|file| dir.json(&["inspect", file]));
    assert_eq!(
        (&shown["is_mapped_ram"], &mapped["is_mapped_ram"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(
        shown["contents"]["ram_blocks"],
        mapped["contents"]["ram_blocks"]
    );

    // There and back the stream is the same, compressed by others and through a pipe too.
    dir.json(&["convert", "plain.stow", "again.mig", "--to", "stream"]);
    let bytes = |name: &str| std::fs::read(dir.join(name)).unwrap();
    assert_eq!(bytes("again.mig"), bytes("guest.mig"));
    let packed = zstd::encode_all(bytes("guest.mig").as_slice(), 1).unwrap();
    std::fs::write(dir.join("guest.mig.zst"), packed).unwrap();
    let again = import(&dir, "guest.mig.zst", "packed.stow", "stream");
    assert_eq!(again["image_digest"], plain["image_digest"]);
    let piped = dir
        .vmstow()
        .args(["--json", "convert", "-", "piped.stow"])
        .write_stdin(bytes("guest.mig"))
        .unwrap();
    let piped: Value = serde_json::from_slice(&piped.stdout).unwrap();
    assert_eq!(piped["image_digest"], plain["image_digest"]);

    // QEMU takes what we make of either, and XML gives an image what it lacks: the guest's count goes on.
    for (source, form, extra) in [
        ("plain.stow", "stream", None),
        ("mapped.stow", "mapped-ram", Some("mapped-ram")),
    ] {
        dir.json(&["convert", source, "back.mig", "--to", form, "--replace"]);
        load_by_hand(&dir, extra);
        let convert = [
            "convert",
            "back.mig",
            "web01.stow",
            "--xml",
            "web01.xml",
            "--trust",
        ];
        let report = dir.json(&[&convert[..], &["--replace"]].concat());
        assert_eq!(report.get("problems"), None, "{report}");
        assert_eq!(report["from_layout"], form);
        let before = serial.mark();
        let restored = dir.restore(&["web01.stow"]);
        if form == "stream" {
            // It was stopped before it was saved.
            restored.qmp().command("cont", json!({}));
        }
        wait_until("the guest to count again", PATIENCE, || {
            let new = serial.text();
            let new = &new[before.text().len()..];
            let tick = new.lines().find(|line| line.ends_with("memory ok"));
            tick.map(drop).ok_or(new.to_owned())
        });
        end(restored, &dir);
    }
    dir.json(&[
        "convert",
        "plain.stow",
        "late.stow",
        "--xml",
        "web01.xml",
        "--trust",
    ]);
    assert_eq!(
        dir.json(&["inspect", "late.stow"])["manifest"]["guest"]["name"],
        "web01"
    );
    let said = dir.refused(
        2,
        &["convert", "late.stow", "later.stow", "--xml", "web01.xml"],
    );
    assert!(said.contains("vmstow config"), "{said}");
}

/// QEMU leaves the bytes of a page that became zero while it saved a running guest; the bitmap counts.
fn bytes_of_zero_pages_are_no_pages(dir: &TestDir) {
    let path = dir.join("mapped.mig");
    let mut bytes = std::fs::read(&path).unwrap();
    let mut parser = Parser::mapped_ram();
    let (bitmap, pages) = loop {
        let at = usize::try_from(parser.position().0).unwrap();
        let element = parser.next(&bytes[at..]).unwrap().unwrap();
        if let Event::MappedBlock { bitmap, pages, .. } = element.event {
            let place = |at: u64| usize::try_from(at).unwrap();
            break (place(bitmap), place(pages));
        }
    };
    // A zero page between two others, in one region.
    let is_there = |page: usize| bytes[bitmap + page / 8] >> (page % 8) & 1 == 1;
    let mut zero = (1..8191).filter(|page| {
        let is_between = is_there(page - 1) && is_there(page + 1);
        !is_there(*page) && is_between
    });
    let zero = match zero.next() {
        Some(page) => page,
        None => {
            // There is none: one of three becomes zero.
            let page = (1..8191).find(|page| (page - 1..=page + 1).all(is_there));
            let page = page.unwrap();
            bytes[bitmap + page / 8] &= !(1 << (page % 8));
            page
        }
    };
    for (name, byte) in [("clean", 0), ("stale", 0xaa)] {
        bytes[pages + zero * 4096..][..4096].fill(byte);
        std::fs::write(dir.join(&format!("{name}.mig")), &bytes).unwrap();
    }
    let digests = ["clean", "stale"].map(|name| {
        let (file, image) = (format!("{name}.mig"), format!("{name}.stow"));
        import(dir, &file, &image, "mapped-ram")["image_digest"].clone()
    });
    assert_eq!(digests[0], digests[1]);
}

/// Loads `back.mig` into a QEMU that nobody of us started.
fn load_by_hand(dir: &TestDir, capability: Option<&str>) {
    let printed = dir.json(&["run", "web01.xml", "--print-command", "--trust"]);
    let words = printed["argv"].as_array().unwrap().iter();
    let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
    let home = dir.join("run/web01");
    std::fs::create_dir_all(&home).unwrap();
    let socket = home.join("qmp.sock");
    let _ = std::fs::remove_file(&socket);
    let mut child = std::process::Command::new(words[0])
        .args(&words[1..])
        .args(["-incoming", "defer"])
        .current_dir(dir.path())
        .spawn()
        .unwrap();
    wait_until("QEMU to listen", PATIENCE, || {
        assert!(child.try_wait().unwrap().is_none(), "QEMU has ended");
        socket.exists().then_some(()).ok_or("no socket".to_owned())
    });
    let mut qmp = support::Qmp::connect(&socket);
    if let Some(capability) = capability {
        let capabilities = json!([{ "capability": capability, "state": true }]);
        qmp.command(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
        );
    }
    let uri = format!("file:{}", dir.join("back.mig").display());
    qmp.command("migrate-incoming", json!({ "uri": uri }));
    wait_until("the stream to be loaded", PATIENCE, || {
        let state = qmp.command("query-migrate", json!({}));
        match state["status"].as_str() {
            Some("completed") => Ok(()),
            Some("failed") => panic!("{state}"),
            _ => Err(state.to_string()),
        }
    });
    let _ = child.kill();
    let _ = child.wait();
    let _ = std::fs::remove_dir_all(&home);
}
