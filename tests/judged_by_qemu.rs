//! The state of devices, judged by QEMU's own script: every field of every section has the value that
//! `analyze-migration.py` of the stream's version prints for the same stream, and none is left over on either side.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Map, Value, json};
use support::{Guest, GuestSpec, PATIENCE, Qemu, TestDir, testdata, wait_until};

/// What the script prints of a stream, as far as it is about devices: the section's name and number, and its members.
fn by_script(qemu: Qemu, stream: &Path) -> Map<String, Value> {
    let output = Command::new("python3")
        .arg(qemu.stream_reader())
        .arg("-f")
        .arg(stream)
        .output()
        .expect("python3 can be started (Debian package python3)");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    let mut state: Map<String, Value> = serde_json::from_slice(&output.stdout).unwrap();
    state.retain(|name, _| !name.starts_with("ram ("));
    state
}

/// What is found when our fields are held against the script's.
#[derive(Debug, Default)]
struct Judgement {
    /// Values that are the same.
    same: usize,
    wrong: Vec<String>,
}

/// Holds fields against the script's words, for one section.
struct Judge<'a> {
    /// The section's bytes.
    payload: &'a [u8],
    judgement: &'a mut Judgement,
}

/// One value of ours: its bytes' place in the payload, and what we say of it.
struct Ours<'a> {
    offset: usize,
    len: usize,
    value: &'a Value,
}

impl<'a> Ours<'a> {
    /// The elements of an array, or the value itself.
    fn of(field: &'a Value) -> Vec<Self> {
        let number = |name: &str| usize::try_from(field[name].as_u64().unwrap()).unwrap();
        let (offset, len, value) = (number("offset"), number("len"), &field["value"]);
        let Some(elements) = value.as_array() else {
            return vec![Ours { offset, len, value }];
        };
        let size = len / elements.len().max(1);
        let elements = elements.iter().enumerate();
        let elements = elements.map(|(index, value)| Ours {
            offset: offset + index * size,
            len: size,
            value,
        });
        elements.collect()
    }
}

fn judge(devices: &[Value], stream: &[u8], mut script: Map<String, Value>) -> Judgement {
    let mut judgement = Judgement::default();
    // The script's names have the section's number in them, ours the instance: both have the order of the stream.
    let mut names: Vec<(u32, String)> = script
        .keys()
        .map(|name| (number_of(name), name.clone()))
        .collect();
    names.sort();
    let mut sorted: Vec<&Value> = devices.iter().collect();
    sorted.sort_by_key(|device| section_number(stream, device));
    assert_eq!(sorted.len(), names.len(), "{names:?}");
    for (device, (number, name)) in sorted.into_iter().zip(names) {
        let idstr = device["idstr"].as_str().unwrap();
        assert_eq!(name, format!("{idstr} ({number})"));
        assert_eq!(section_number(stream, device), number);
        let offset = usize::try_from(device["offset"].as_u64().unwrap()).unwrap();
        let len = usize::try_from(device["len"].as_u64().unwrap()).unwrap();
        let theirs = script.remove(&name).unwrap();
        let mut judge = Judge {
            payload: &stream[offset..offset + len],
            judgement: &mut judgement,
        };
        judge.members(&name, device, theirs.as_object().unwrap());
    }
    judgement
}

/// `cpu (3)` → 3
fn number_of(name: &str) -> u32 {
    let (_, number) = name.rsplit_once(" (").unwrap();
    number.trim_end_matches(')').parse().unwrap()
}

/// The number that the stream gives the section, from the header before its payload.
fn section_number(stream: &[u8], device: &Value) -> u32 {
    let header = 4 + 1 + device["idstr"].as_str().unwrap().len() + 4 + 4;
    let at = usize::try_from(device["offset"].as_u64().unwrap()).unwrap() - header;
    u32::from_be_bytes(stream[at..at + 4].try_into().unwrap())
}

/// `regs[3]` → `regs`
fn without_index(name: &str) -> &str {
    match name.rsplit_once('[') {
        Some((base, _)) if name.ends_with(']') => base,
        _ => name,
    }
}

impl Judge<'_> {
    /// Fields and subsections of a section, a struct or a subsection.
    fn members(&mut self, path: &str, ours: &Value, theirs: &Map<String, Value>) {
        let mut groups: Vec<(&str, Vec<Ours<'_>>)> = Vec::new();
        for field in ours["fields"].as_array().into_iter().flatten() {
            let name = field["name"].as_str().unwrap();
            let key = match theirs.contains_key(name) {
                true => name,
                false => without_index(name),
            };
            let values = Ours::of(field);
            match groups.iter_mut().find(|(known, _)| *known == key) {
                Some((_, group)) => group.extend(values),
                None => groups.push((key, values)),
            }
        }
        let mut left: Vec<&String> = theirs.keys().collect();
        for (key, values) in groups {
            left.retain(|name| *name != key);
            self.group(&format!("{path}.{key}"), &values, theirs.get(key));
        }
        for subsection in ours["subsections"].as_array().into_iter().flatten() {
            let name = subsection["name"].as_str().unwrap();
            left.retain(|other| *other != name);
            match theirs.get(name).and_then(Value::as_object) {
                Some(theirs) => self.members(&format!("{path}.{name}"), subsection, theirs),
                None => self.wrong(&format!("{path}.{name}: the script has no such subsection")),
            }
        }
        for name in left {
            self.wrong(&format!("{path}.{name}: only the script has it"));
        }
    }

    fn wrong(&mut self, what: &str) {
        self.judgement.wrong.push(what.to_owned());
    }

    /// All values of a name: an array, or several fields.
    fn group(&mut self, path: &str, ours: &[Ours<'_>], theirs: Option<&Value>) {
        match (ours, theirs) {
            (_, None) => self.wrong(&format!("{path}: the script has it not")),
            (ours, Some(Value::Array(theirs))) if ours.len() == theirs.len() => {
                for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                    self.value(&format!("{path}[{index}]"), ours, theirs);
                }
            }
            ([ours], Some(theirs)) => self.value(path, ours, theirs),
            (ours, Some(theirs)) => {
                self.wrong(&format!(
                    "{path}: {} values, the script says {theirs}",
                    ours.len()
                ));
            }
        }
    }

    fn value(&mut self, path: &str, ours: &Ours<'_>, theirs: &Value) {
        let is_same = match theirs {
            Value::Object(members) => return self.members(path, ours.value, members),
            Value::Bool(value) => ours.value == &Value::Bool(*value),
            Value::String(text) if text == "nullptr" => ours.value == &json!("30"),
            Value::String(text) => match text.strip_prefix("0x") {
                Some(number) => Some(number_in(number)) == number_of_ours(ours),
                None => self.are_bytes(ours, text),
            },
            _ => false,
        };
        match is_same {
            true => self.judgement.same += 1,
            false => self.wrong(&format!(
                "{path}: we say {}, the script {theirs}",
                ours.value
            )),
        }
    }

    /// Whether the script's row of bytes is what lies there, and what we made of it.
    fn are_bytes(&self, ours: &Ours<'_>, text: &str) -> bool {
        let bytes = &self.payload[ours.offset..ours.offset + ours.len];
        let shown: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let is_ours = match ours.value {
            Value::String(hex) => *hex == shown.concat(),
            Value::Number(_) => number_of_ours(ours) == Some(number_in(&shown.concat())),
            // What the script does not take apart (`tmp`), we do.
            Value::Object(members) => members.contains_key("fields"),
            _ => false,
        };
        is_ours && shown.join(" ") == text
    }
}

/// `fffe (-2)` → 0xfffe, and how many digits it has.
fn number_in(text: &str) -> (u64, usize) {
    let digits = text.split(' ').next().unwrap();
    (u64::from_str_radix(digits, 16).unwrap(), digits.len())
}

/// A number of ours as the bits it has in the stream, and the digits it takes.
fn number_of_ours(ours: &Ours<'_>) -> Option<(u64, usize)> {
    let value = ours
        .value
        .as_u64()
        .or_else(|| Some(ours.value.as_i64()?.cast_unsigned()))?;
    let bits = u32::try_from(8 * ours.len).ok()?;
    let mask = u64::MAX.checked_shr(64u32.checked_sub(bits)?).unwrap_or(0);
    Some((value & mask, 2 * ours.len))
}

/// How many values there are, those of structs and subsections among them.
fn values(members: &Value) -> usize {
    // What the script does not take apart.
    fn of_field(field: &Value) -> usize {
        match field["type"] == "tmp" {
            true => 1,
            false => of(&field["value"]),
        }
    }
    fn of(value: &Value) -> usize {
        match value {
            Value::Array(elements) => elements.iter().map(of).sum(),
            Value::Object(_) => values(value),
            _ => 1,
        }
    }
    let fields = members["fields"].as_array().into_iter().flatten();
    let subsections = members["subsections"].as_array().into_iter().flatten();
    fields.map(of_field).sum::<usize>() + subsections.map(values).sum::<usize>()
}

/// Judges a stream; gives how many values it has.
fn assert_agrees(dir: &TestDir, qemu: Qemu, file: &str) -> usize {
    let answer = dir.json(&["inspect", file, "--devices"]);
    let devices = answer["devices"].as_array().unwrap();
    let stream = std::fs::read(dir.join(file)).unwrap();
    let judgement = judge(devices, &stream, by_script(qemu, &dir.join(file)));
    assert_eq!(judgement.wrong, [""; 0], "{file}");
    assert!(
        devices.iter().all(|device| device["is_described"] == true),
        "{file}"
    );
    judgement.same
}

/// Devices of all kinds on a machine of PCI Express; `tpm` is the socket of its emulator.
fn devices_of_q35(tpm: &str) -> Vec<String> {
    let words = format!(
        "-smp 4 -chardev socket,id=tpm,path={tpm} -tpmdev emulator,id=tpm0,chardev=tpm -device tpm-crb,tpmdev=tpm0
        -device pcie-root-port,id=port1,chassis=1 -device qemu-xhci,bus=port1 -device usb-tablet -device usb-kbd
        -device usb-hub -netdev user,id=n0 -device virtio-net-pci,netdev=n0 -netdev user,id=n1 -device e1000e,netdev=n1
        -device virtio-rng-pci -device virtio-balloon-pci -device virtio-serial-pci -chardev null,id=c0
        -chardev null,id=c1 -device virtserialport,chardev=c0,name=port -device virtconsole,chardev=c1 -device virtio-keyboard-pci
        -device virtio-scsi-pci,id=s0 -drive if=none,id=d1,driver=null-co,size=1M,read-zeroes=on
        -device scsi-hd,bus=s0.0,drive=d1 -device scsi-cd,bus=s0.0 -audiodev none,id=a0 -device intel-hda -device hda-duplex,audiodev=a0
        -drive if=none,id=d2,driver=null-co,size=1M,read-zeroes=on -device ide-hd,bus=ide.0,drive=d2
        -device ide-cd,bus=ide.1 -device ahci,id=second -device ide-cd,bus=second.0 -device vmgenid -device i6300esb
        -device pvpanic"
    );
    words.split_whitespace().map(str::to_owned).collect()
}

/// Devices of all kinds on a machine of PCI.
fn devices_of_i440fx() -> Vec<String> {
    let words = "-smp 4,maxcpus=5 -device piix3-usb-uhci -device usb-tablet -device usb-ehci -device nec-usb-xhci,id=x
        -device usb-mouse,bus=x.0 -device pci-bridge,id=b1,chassis_nr=1 -netdev user,id=n0
        -device virtio-net-pci,netdev=n0,bus=b1,addr=1 -netdev user,id=n1 -device e1000,netdev=n1 -netdev user,id=n2
        -device rtl8139,netdev=n2 -netdev user,id=n3 -device pcnet,netdev=n3 -device virtio-rng-pci
        -device virtio-balloon-pci -device virtio-serial-pci -chardev null,id=c0
        -device virtserialport,chardev=c0,name=port -device lsi53c895a,id=l0
        -drive if=none,id=d1,driver=null-co,size=1M,read-zeroes=on -device scsi-hd,bus=l0.0,drive=d1 -audiodev none,id=a0
        -device AC97,audiodev=a0 -device ES1370,audiodev=a0 -device sb16,audiodev=a0 -drive if=none,id=d2,driver=null-co,size=1M,read-zeroes=on
        -device ide-hd,bus=ide.0,drive=d2 -device ide-cd,bus=ide.1 -device secondary-vga -parallel null
        -chardev null,id=c1 -device isa-debugcon,chardev=c1 -device ib700 -device pvpanic";
    words.split_whitespace().map(str::to_owned).collect()
}

/// A TPM's emulator; it ends with its connection.
struct Tpm(Child);

impl Tpm {
    fn start(dir: &TestDir, socket: &str) -> Self {
        let state = dir.join("tpm");
        std::fs::create_dir(&state).unwrap();
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--terminate"])
            .arg("--tpmstate")
            .arg(format!("dir={}", state.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={socket}"))
            .stdin(Stdio::null())
            .spawn()
            .expect("swtpm can be started (Debian package swtpm)");
        let tpm = Tpm(child);
        wait_until("swtpm to listen", PATIENCE, || {
            let is_there = Path::new(socket).exists();
            is_there.then_some(()).ok_or_else(|| "no socket".to_owned())
        });
        tpm
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets the guest run some ticks, with its disk read, its screen written and its timers armed, and migrates it to a file.
fn migrate_to(guest: &mut Guest, stream: &Path) {
    wait_until("the guest to count", PATIENCE, || {
        assert!(guest.is_running(), "{}", guest.stderr());
        let ticks = guest.serial().last_tick();
        (ticks > 1).then_some(()).ok_or_else(|| guest.stderr())
    });
    let mut qmp = guest.qmp();
    qmp.command("stop", json!({}));
    qmp.migrate(&format!("exec:cat > {}", stream.display()));
    drop(qmp);
    guest.kill();
}

fn judge_guest(qemu: Qemu, machine: &str, vga: &str, with_tpm: bool) {
    let dir = TestDir::new();
    let socket = dir.join("tpm.sock").display().to_string();
    let tpm = with_tpm.then(|| Tpm::start(&dir, &socket));
    let mut spec = GuestSpec {
        qemu,
        machine: machine.to_owned(),
        ..GuestSpec::default()
    };
    // The disks of the other controllers hold nothing to boot from.
    let global = "virtio-blk-pci.bootindex=0";
    spec = spec.with(&["-vga", vga, "-global", global]);
    spec.extra.extend(match machine {
        "q35" => devices_of_q35(&socket),
        _ => devices_of_i440fx(),
    });
    let mut guest = Guest::start(&dir, spec);
    migrate_to(&mut guest, &dir.join("guest.mig"));
    drop(tpm);
    let count = assert_agrees(&dir, qemu, "guest.mig");
    assert!(count > 20_000, "{count}");
}

#[test]
fn every_device_of_q35_with_qemu_10() {
    judge_guest(Qemu::V10, "q35", "std", true);
}

#[test]
fn every_device_of_q35_with_qemu_7_2() {
    judge_guest(Qemu::V7_2, "q35", "virtio", true);
}

#[test]
fn every_device_of_i440fx_with_qemu_10() {
    judge_guest(Qemu::V10, "pc", "cirrus", false);
}

#[test]
fn every_device_of_i440fx_with_qemu_7_2() {
    judge_guest(Qemu::V7_2, "pc", "vmware", false);
}

#[test]
fn a_value_that_is_not_the_scripts_is_found() {
    let dir = TestDir::new();
    let packed = std::fs::read(testdata("streams/i440fx-10.0.mig.zst")).unwrap();
    let mut stream = zstd::decode_all(&*packed).unwrap();
    std::fs::write(dir.join("x.mig"), &stream).unwrap();
    let script = by_script(Qemu::V10, &dir.join("x.mig"));
    let answer = dir.json(&["inspect", "x.mig", "--devices"]);
    let devices = answer["devices"].as_array().unwrap();
    let judgement = judge(devices, &stream, script.clone());
    assert_eq!(judgement.wrong, [""; 0]);
    let all: usize = devices.iter().map(values).sum();
    assert_eq!(judgement.same, all);
    // One bit in each of some devices: found, and nothing else.
    for (number, device) in devices.iter().enumerate() {
        let offset = usize::try_from(device["offset"].as_u64().unwrap()).unwrap();
        if device["fields"][0]["type"] == "struct" || device["len"] == 0 || number % 4 != 0 {
            continue;
        }
        stream[offset] ^= 1;
        std::fs::write(dir.join("y.mig"), &stream).unwrap();
        let answer = dir.json(&["inspect", "y.mig", "--devices"]);
        let judgement = judge(
            answer["devices"].as_array().unwrap(),
            &stream,
            script.clone(),
        );
        assert_eq!(
            (judgement.wrong.len(), judgement.same),
            (1, all - 1),
            "{device}"
        );
        stream[offset] ^= 1;
    }
    let mut less = script.clone();
    less.values_mut()
        .next()
        .unwrap()
        .as_object_mut()
        .unwrap()
        .remove("name");
    let other = less.values_mut().last().unwrap().as_object_mut().unwrap();
    other.insert("more".to_owned(), json!("0x00"));
    let judgement = judge(devices, &stream, less);
    assert!(!judgement.wrong.is_empty(), "{judgement:?}");
}

#[test]
fn nvme_cannot_be_migrated() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::default()
        };
        let drive = "if=none,id=d1,driver=null-co,size=1M,read-zeroes=on";
        let spec = spec.with(&["-S", "-drive", drive, "-device", "nvme,drive=d1,serial=x"]);
        let guest = Guest::start(&dir, spec);
        let said = dir.refused(4, &["save", &guest.source(), "x.stow"]);
        assert!(said.contains("nvme"), "{said}");
    }
}
