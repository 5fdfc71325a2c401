//! What a guest has in its memory, as QEMU's process shows it, and where an image holds it.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
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

/// Guest memory below this address is the guest's own: its kernel puts things there that it does not look for.
const FILLED_FROM: u64 = 64 << 20;

/// Guest memory at a guest address: its length.
pub type MemoryRange = (u64, u64);

/// Where QEMU keeps what is at a guest address, asked of its human monitor by `ask`.
fn host_address_by(ask: &dyn Fn(&str) -> String, guest_address: u64) -> u64 {
    let answer = ask(&format!("gpa2hva {guest_address:#x}"));
    let (_, address) = answer
        .trim()
        .rsplit_once(" is 0x")
        .expect("QEMU tells where memory is");
    u64::from_str_radix(address, 16).unwrap()
}

/// A question to QEMU's human monitor.
fn ask(qmp: &mut Qmp, line: &str) -> String {
    let answer = qmp.command("human-monitor-command", json!({ "command-line": line }));
    answer.as_str().unwrap().to_owned()
}

fn host_address(qmp: &mut Qmp, guest_address: u64) -> u64 {
    let qmp = RefCell::new(qmp);
    host_address_by(&|line| ask(&mut qmp.borrow_mut(), line), guest_address)
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

/// Writes into a guest's memory, as the guest itself could; all of it in one piece of RAM.
pub fn write_memory(pid: u32, qmp: &mut Qmp, guest_address: u64, bytes: &[u8]) {
    let address = host_address(qmp, guest_address);
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .unwrap();
    memory.write_all_at(bytes, address).unwrap();
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

/// Puts something into every page of a guest's RAM that was never touched.
pub fn fill(pid: u32, qmp: &mut Qmp, memory_len: u64) {
    let qmp = RefCell::new(qmp);
    fill_at(pid, &|line| ask(&mut qmp.borrow_mut(), line), memory_len);
}

/// As [`fill`], asking QEMU's human monitor by `ask`.
pub fn fill_at(pid: u32, ask: &dyn Fn(&str) -> String, memory_len: u64) {
    let low_len = memory_len.min(2 << 30); // above it a q35 machine has its hole
    let mut ranges = vec![(FILLED_FROM, low_len - FILLED_FROM)];
    if memory_len > low_len {
        ranges.push((4 << 30, memory_len - low_len));
    }
    let process = ProcessId::of(i32::try_from(pid).unwrap()).unwrap();
    let pages = ProcessMemory::open(process).unwrap();
    let bytes = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut page = [0; PAGE_LEN];
    for (start, len) in ranges {
        let base = host_address_by(ask, start);
        let mut touched = vec![false; usize::try_from(len).unwrap() / PAGE_LEN];
        pages.touched(base, &mut touched).unwrap();
        for (index, _) in (0..).zip(&touched).filter(|(_, is_touched)| !**is_touched) {
            let (noise, mut text) = page.split_at_mut(PAGE_LEN / 2);
            for word in noise.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            while !text.is_empty() {
                write!(&mut text, "page {index} of a guest that is full, ").unwrap_or_default();
            }
            bytes
                .write_all_at(&page, base + index * PAGE_LEN as u64)
                .unwrap();
        }
    }
}
