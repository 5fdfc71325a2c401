//! Takes over from a process that gave a guest its memory and was killed: a new connection to QEMU, and what it has.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::ServeError;
use super::received::Received;
use super::task::Task;
use crate::container::PageMap;
use crate::error::Result;
use crate::host::{GuestDir, ProcessMemory};
use crate::qmp::QmpClient;
use crate::stream::postcopy::{self, Message, ReturnPath};
use crate::supervise::{SuperviseError, ask_keeper};
use crate::units::{PAGE_LEN, PageIndex};

/// How long QEMU may take to notice that its connection broke.
const NOTICE: Duration = Duration::from_secs(10);

/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

const TRY_EVERY: Duration = Duration::from_millis(20);

/// Pages looked at in one go.
const LOOK_PAGES: usize = 1 << 16;

/// Connects to QEMU anew, which the keeper lets listen; without a keeper, by a monitor connection of our own, which
/// QEMU answers only if it does not wait for a page just then.
pub fn connect(dir: &GuestDir) -> Result<UnixStream> {
    let socket = dir.path().join("recover.sock");
    let since = Instant::now();
    loop {
        // A listener that was left from an earlier attempt would be in the way.
        let _ = std::fs::remove_file(&socket);
        let asked = match ask_keeper(dir, &socket) {
            Err(SuperviseError::NoKeeper(_)) => ask_qemu(dir, &socket),
            other => other,
        };
        match asked {
            Ok(()) => break,
            Err(SuperviseError::NotRecovered { .. }) if since.elapsed() < NOTICE => {
                std::thread::sleep(TRY_EVERY);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::connect(&socket).map_err(ServeError::Socket)?;
    let _ = std::fs::remove_file(&socket);
    Ok(stream)
}

fn ask_qemu(dir: &GuestDir, socket: &Path) -> Result<(), SuperviseError> {
    let monitors: [PathBuf; 2] = [dir.keeper_monitor(), dir.qmp_socket()];
    let mut failed = None;
    for monitor in monitors {
        let asked = QmpClient::connect_oob(&monitor, ANSWER / 4)
            .and_then(|mut qmp| qmp.migrate_recover(&format!("unix:{}", socket.display())));
        match asked {
            Ok(()) => return Ok(()),
            Err(crate::qmp::QmpError::Refused { desc, .. }) => {
                return Err(SuperviseError::NotRecovered { words: desc });
            }
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None => Err(SuperviseError::NoKeeper(None)),
    }
}

/// Asks QEMU what it has, and tells it to go on.
///
/// What was put straight into its memory QEMU does not know of: the kernel does.
pub fn received(
    stream: &UnixStream,
    path: &mut ReturnPath,
    task: &Task,
    page_map: &PageMap,
) -> Result<Received> {
    let mut received = Received::nothing(page_map);
    for (index, block) in page_map.blocks().iter().enumerate() {
        let mut talk = Talk { stream, path };
        talk.send(&postcopy::ask_received(&block.idstr))?;
        let bitmap = talk.wait_for(
            "it does not say which pages it has",
            |message| match message {
                Message::Received {
                    block: named,
                    bitmap,
                } if named == block.idstr => Some(bitmap),
                _ => None,
            },
        )?;
        let bytes = (0..).step_by(8).zip(&bitmap);
        for (first, byte) in bytes.filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                received.add(index, PageIndex(first + bit), 1);
            }
        }
        note_touched(&mut received, index, task);
    }
    let mut talk = Talk { stream, path };
    talk.send(&postcopy::resume())?;
    talk.wait_for("it does not go on", |message| match message {
        Message::ResumeAck(1) => Some(()),
        _ => None,
    })?;
    stream.set_read_timeout(None).map_err(ServeError::Socket)?;
    Ok(received)
}

/// What is in the memory of a block that pages were put into directly.
fn note_touched(received: &mut Received, index: usize, task: &Task) {
    let place = task.blocks.get(index);
    let Some((address, used_length)) =
        place.and_then(|place| Some((place.address?, place.used_length)))
    else {
        return;
    };
    // Where we may not look, nothing was put directly either.
    let Ok(memory) = ProcessMemory::open(task.qemu) else {
        return;
    };
    let mut touched = vec![false; LOOK_PAGES];
    let page_count = used_length / PAGE_LEN as u64;
    for first in (0..page_count).step_by(LOOK_PAGES) {
        let left = usize::try_from(page_count - first).unwrap_or(LOOK_PAGES);
        let looked = &mut touched[..left.min(LOOK_PAGES)];
        if memory
            .touched(address + first * PAGE_LEN as u64, looked)
            .is_err()
        {
            return;
        }
        for (page, _) in (first..).zip(&*looked).filter(|(_, is_there)| **is_there) {
            received.add(index, PageIndex(page), 1);
        }
    }
}

/// Question and answer on the new connection.
struct Talk<'a> {
    stream: &'a UnixStream,
    path: &'a mut ReturnPath,
}

impl Talk<'_> {
    fn send(&mut self, bytes: &[u8]) -> Result<(), ServeError> {
        self.stream.write_all(bytes).map_err(ServeError::Socket)
    }

    /// The first message that `wanted` takes. Requests before it come again when QEMU goes on.
    fn wait_for<T>(
        &mut self,
        what: &'static str,
        mut wanted: impl FnMut(Message) -> Option<T>,
    ) -> Result<T, ServeError> {
        let timeout = self.stream.set_read_timeout(Some(ANSWER));
        timeout.map_err(ServeError::Socket)?;
        loop {
            while let Some(message) = self.path.next_message()? {
                if let Some(found) = wanted(message) {
                    return Ok(found);
                }
            }
            let mut bytes = [0; 1 << 14];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(ServeError::HungUp),
                Ok(len) => self.path.push(&bytes[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(ServeError::NotResumed { what });
                }
                Err(error) => return Err(ServeError::Socket(error)),
            }
        }
    }
}
