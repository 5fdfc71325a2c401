//! What a guest has in its memory, as QEMU's process shows it, and where an image holds it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::json;
use vmstow::container::{Image, PageLocation, PageMap};
use vmstow::digest::{Digest, Hasher};
use vmstow::host::{ProcessId, ProcessMemory};
use vmstow::store::FileSource;
use vmstow::units::{ChunkIndex, PAGE_LEN, PageIndex};

use super::assets::Qemu;
use super::dir::TestDir;
use super::guest::{Guest, GuestSpec};
use super::qmp::Qmp;

const PAGE: u64 = PAGE_LEN as u64;

/// Guest memory at a guest address: its length.
pub type MemoryRange = (u64, u64);

/// Where QEMU keeps what is at a guest address.
fn host_address(qmp: &mut Qmp, guest_address: u64) -> u64 {
    let line = json!({ "command-line": format!("gpa2hva {guest_address:#x}") });
    let answer = qmp.command("human-monitor-command", line);
    let (_, address) = answer
        .as_str()
        .unwrap()
        .trim()
        .rsplit_once(" is 0x")
        .unwrap();
    u64::from_str_radix(address, 16).unwrap()
}

/// A digest of all that the guest has in these ranges; it reads only pages that are there.
pub fn memory(pid: u32, qmp: &mut Qmp, ranges: &[MemoryRange]) -> Digest {
    let process = ProcessId::of(i32::try_from(pid).unwrap()).unwrap();
    let pages = ProcessMemory::open(process).unwrap();
    let bytes = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut hasher = Hasher::new();
    for (start, len) in ranges {
        let base = host_address(qmp, *start);
        let mut touched = vec![false; usize::try_from(len / PAGE).unwrap()];
        pages.touched(base, &mut touched).unwrap();
        for (index, _) in (0..).zip(&touched).filter(|(_, is_touched)| **is_touched) {
            let mut page = [0; PAGE_LEN];
            bytes.read_exact_at(&mut page, base + index * PAGE).unwrap();
            if page != [0; PAGE_LEN] {
                hasher.update(&(start + index * PAGE).to_le_bytes());
                hasher.update(&page);
            }
        }
    }
    hasher.finish()
}

/// Puts something into the first and the last pages of the ranges, and here and there between.
fn scribble(pid: u32, qmp: &mut Qmp, ranges: &[MemoryRange]) {
    let bytes = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .unwrap();
    for (start, len) in ranges {
        let base = host_address(qmp, *start);
        let steps = (0..*len).step_by(usize::try_from(len / 97 / PAGE * PAGE + PAGE).unwrap());
        let edges = [PAGE, 2 * PAGE, 3 * PAGE, len - 3 * PAGE, len - PAGE];
        for at in steps.chain(edges) {
            let text = format!("page at {:#x} ", start + at).repeat(100);
            bytes
                .write_all_at(&text.as_bytes()[..1000], base + at + 77)
                .unwrap();
        }
    }
}

/// A guest that never ran, with known bytes in its memory.
pub fn scribbled(
    dir: &TestDir,
    qemu: Qemu,
    memory_mib: u32,
    extra: &[&str],
    ranges: &[MemoryRange],
) -> Guest {
    let spec = GuestSpec {
        qemu,
        memory_mib,
        machine: "q35".to_owned(),
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec.with(&["-S"]).with(extra));
    scribble(guest.pid(), &mut guest.qmp(), ranges);
    guest
}

/// The chunk that holds this page of the guest's RAM, and where in the file.
pub fn chunk_of(dir: &TestDir, page: u64) -> (ChunkIndex, u64) {
    let image = Image::open(FileSource::open(&dir.join("x.stow")).unwrap()).unwrap();
    let page_map: PageMap = image.page_map().unwrap().unwrap();
    let ram = page_map
        .blocks()
        .iter()
        .position(|block| block.idstr == "pc.ram");
    let mut pages = page_map.locate_range(ram.unwrap(), PageIndex(page), 4096);
    let chunk = pages.find_map(|(_, location)| match location {
        PageLocation::Data { chunk, .. } => Some(chunk),
        PageLocation::Zero => None,
    });
    let chunk = chunk.unwrap();
    let entry = image.chunk(chunk).unwrap();
    (
        chunk,
        entry.stored_offset.0 + u64::from(entry.stored_len) / 2,
    )
}
