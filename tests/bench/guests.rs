//! The guests: what they hold and how a QEMU is told to run them.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::end;
use crate::options::GuestName;
use crate::support::{linux_initrd, linux_kernel};
use crate::work_dir::WorkDir;

/// A guest that can be made again and again, always with the same content.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub name: String,
    pub memory_mib: u64,
    /// The known bytes that it keeps in a tmpfs.
    content_mib: u64,
    /// As its init knows it.
    from: &'static str,
    /// The read-only disk that the content is copied from.
    pub disk: Option<PathBuf>,
}

impl Recipe {
    /// The named guest; its payload is written now.
    pub fn prepare(name: GuestName, dir: &mut WorkDir) -> Self {
        let (name, memory_mib, content_mib, from) = match name {
            GuestName::Idle => ("idle", 4096, 16, "random"),
            GuestName::Text => ("text", 2048, 1228, "vda"),
            GuestName::Random => ("random", 1024, 800, "random"),
        };
        end::doing(&format!("{name}, making its payload"));
        let mut recipe = Recipe {
            name: name.to_owned(),
            memory_mib,
            content_mib,
            from,
            disk: None,
        };
        if from == "vda" {
            let path = dir.payload().to_owned();
            let bytes = write_files(Path::new("/usr"), &path, content_mib << 20);
            recipe.content_mib = bytes >> 20;
            recipe.disk = Some(path);
        }
        eprintln!(
            "{name}: {memory_mib} MiB, {} MiB of them content",
            recipe.content_mib
        );
        recipe
    }

    /// A guest of that size with little known content.
    pub fn small(memory_mib: u64) -> Self {
        Recipe {
            name: format!("full {memory_mib} MiB"),
            memory_mib,
            content_mib: 16,
            from: "mixed",
            disk: None,
        }
    }

    pub fn kernel_arguments(&self) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 content={} from={} witness",
            self.content_mib, self.from
        )
    }

    /// QEMU's arguments. Its monitor, serial port and what that wrote are `qmp`, `serial.sock` and `serial` in `dir`.
    pub fn arguments(&self, dir: &Path) -> Vec<String> {
        let at = |name: &str| dir.join(name).display().to_string();
        let mut words: Vec<String> = ["-no-user-config", "-nodefaults", "-display", "none"]
            .map(str::to_owned)
            .into();
        let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
        add("-name", "bench".to_owned());
        add("-machine", "q35".to_owned());
        add("-accel", "tcg".to_owned());
        add("-m", self.memory_mib.to_string());
        add("-qmp", format!("unix:{},server=on,wait=off", at("qmp")));
        add("-kernel", linux_kernel().display().to_string());
        add("-initrd", linux_initrd().display().to_string());
        add("-append", self.kernel_arguments());
        if let Some(disk) = &self.disk {
            let disk = disk.display();
            add(
                "-drive",
                format!("file={disk},format=raw,if=none,id=disk0,readonly=on"),
            );
            add("-device", "virtio-blk-pci,drive=disk0".to_owned());
        }
        add(
            "-chardev",
            format!(
                "socket,id=serial0,path={},server=on,wait=off,logfile={},logappend=on",
                at("serial.sock"),
                at("serial")
            ),
        );
        add("-serial", "chardev:serial0".to_owned());
        words
    }
}

/// Writes the files below `root`, one behind the other in the order of their paths, until there are `len` bytes; gives
/// how many whole MiB there are, in bytes.
fn write_files(root: &Path, target: &Path, len: u64) -> u64 {
    let mut paths = Vec::new();
    collect(root, &mut paths);
    paths.sort();
    let mut file = BufWriter::new(File::create(target).unwrap());
    let mut hash = Sha256::new();
    let mut left = len;
    let mut buffer = vec![0; 1 << 20];
    for path in paths {
        let Ok(source) = File::open(&path) else {
            continue;
        };
        let mut source = source.take(left);
        loop {
            let count = source.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count]).unwrap();
            hash.update(&buffer[..count]);
            left -= u64::try_from(count).unwrap();
        }
    }
    let file = file.into_inner().unwrap();
    let bytes = (len - left) >> 20 << 20;
    assert!(
        bytes > 0,
        "there is nothing to read below {}",
        root.display()
    );
    file.set_len(bytes).unwrap();
    file.sync_all().unwrap();
    let digest: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    eprintln!(
        "payload: {} bytes of {}, sha256 {digest}",
        len - left,
        root.display()
    );
    bytes
}

/// All regular files below `dir`, links not followed.
fn collect(dir: &Path, paths: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(&entry.path(), paths),
            Ok(kind) if kind.is_file() => paths.push(entry.path()),
            _ => {}
        }
    }
}
