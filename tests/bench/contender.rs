//! What every way of saving and restoring has to be able to do.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::guests::Recipe;
use crate::support::{Adopted, PATIENCE, Serial};
use crate::work_dir::WorkDir;

/// A way of saving a guest and of bringing it back. It has a directory of its own with one guest's files.
pub trait Contender {
    /// Starts the recipe's guest.
    fn boot(&mut self) -> Adopted;

    /// Saves the running guest and ends it; returns when the tool's work is done, though QEMU may still be ending.
    fn save(&mut self);

    /// Brings the guest back from the image; returns when the tool's work is done. Runs beside the watch for its tick.
    fn restore(&mut self) -> Adopted;
}

/// A contender and its guest's files.
pub struct Entrant<'a> {
    pub name: &'static str,
    pub place: Place,
    pub contender: Box<dyn Contender + Send + 'a>,
}

/// Where the files of one contender's guest are.
#[derive(Debug, Clone)]
pub struct Place {
    pub dir: PathBuf,
    pub recipe: Recipe,
}

impl Place {
    pub fn make(work: &WorkDir, recipe: &Recipe, name: &str) -> Self {
        let dir = work.subdir(&name.replace([' ', ':'], "-"));
        Place {
            dir,
            recipe: recipe.clone(),
        }
    }

    pub fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// The bytes that the image takes on the disk: holes do not count.
    pub fn image_bytes(&self) -> u64 {
        let metadata = std::fs::metadata(self.image()).unwrap();
        metadata.len().min(metadata.blocks() * 512)
    }

    pub fn serial(&self) -> Serial {
        Serial::at(self.dir.join("serial"))
    }

    /// Asks the guest for its checksum and waits until it said it.
    #[track_caller]
    pub fn ask_for_sum(&self) -> String {
        let mut socket = UnixStream::connect(self.dir.join("serial.sock")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(b"sum\n").unwrap();
        BufReader::new(socket)
            .lines()
            .map(|line| line.expect("the guest says its checksum"))
            .find_map(|line| Some(line.trim_end().strip_prefix("sum ")?.to_owned()))
            .expect("the guest says its checksum before its serial port closes")
    }

    /// Waits until a whole line was added to the first `known` bytes of what the guest said; gives the moment. Looks
    /// every millisecond, and does `meanwhile` as often.
    #[track_caller]
    pub fn wait_for_line_behind(&self, known: u64, mut meanwhile: impl FnMut()) -> Instant {
        let path = self.dir.join("serial");
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if self.serial_len() > known && has_line_behind(&path, known) {
                return Instant::now();
            }
            meanwhile();
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the guest says nothing for {PATIENCE:?}");
    }

    /// How many bytes the guest said.
    pub fn serial_len(&self) -> u64 {
        std::fs::metadata(self.dir.join("serial")).map_or(0, |metadata| metadata.len())
    }
}

fn has_line_behind(path: &Path, known: u64) -> bool {
    let bytes = std::fs::read(path).unwrap_or_default();
    let new = usize::try_from(known)
        .ok()
        .and_then(|known| bytes.get(known..));
    new.is_some_and(|new| new.contains(&b'\n'))
}

/// Runs a command that must succeed; gives what it wrote to stdout.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let program = command.get_program().to_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?} failed ({}): {said}",
        output.status
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
