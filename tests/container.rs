//! The image format, written and read back, edited, damaged, forged and cut.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod sample_images;

use std::alloc::{GlobalAlloc, System};
use std::cell::Cell;
use std::ops::Range;
use std::process::Command;

use proptest::prelude::*;
use sample_images::{
    IDENTITY, XML, append, decode, delta, edit, full_manifest, image_of, open_delta,
    parent_and_delta, provisional_manifest, read_all, read_image, short_manifest, small_image,
};
use vmstow::codec::compress_behind;
use vmstow::container::{
    ChunkKind, ContainerError, Edit, Head, Image, ImageWriter, Layout, Manifest, SectionType,
    layout, parse_head, working_set_payload,
};
use vmstow::digest::{Digest, crc32c};
use vmstow::error::{Blame, ErrorKind};
use vmstow::units::{ChunkIndex, StreamOffset};

/// Remembers the largest request for memory of each thread.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; the thread-local needs no memory of its own.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: std::alloc::Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Runs `act` and gives the largest piece of memory it asked for.
fn largest_allocation<T>(act: impl FnOnce() -> T) -> (T, usize) {
    LARGEST.set(0);
    let result = act();
    (result, LARGEST.get())
}

fn with_two_generations(layout: Layout) -> Vec<u8> {
    let mut file = small_image(layout);
    edit(&mut file, "<domain/>");
    file
}

/// With the chunks that a guest needed first.
fn with_working_set(layout: Layout) -> Vec<u8> {
    let mut file = small_image(layout);
    let before = file.clone();
    let image = Image::open(before.as_slice()).unwrap();
    let mut appended = Edit::begin(&image, &mut file).unwrap();
    let working_set = working_set_payload(&[ChunkIndex(0)]);
    appended
        .replace(SectionType::WorkingSet, &working_set)
        .unwrap();
    appended.finish().unwrap();
    file
}

/// Makes the checksum of the section at `at` right again.
fn fix_crc(file: &mut [u8], at: usize, len: usize) {
    let crc = crc32c(&file[at..at + len - 4]);
    file[at + len - 4..at + len].copy_from_slice(&crc.to_le_bytes());
}

/// Positions of an untouched image, kept while it is forged.
struct Forger {
    file: Vec<u8>,
    sections: Vec<(SectionType, usize, usize)>,
    directory: usize,
    footer: usize,
}

impl Forger {
    fn new(file: Vec<u8>) -> Self {
        let image = Image::open(file.as_slice()).unwrap();
        let place = |entry: &vmstow::container::DirectoryEntry| {
            let at = usize::try_from(entry.offset.0).unwrap();
            (entry.section, at, usize::try_from(entry.length).unwrap())
        };
        let sections = image.sections().iter().map(place).collect();
        let directory = usize::try_from(image.footer().directory_offset.0).unwrap();
        let footer = file.len() - layout::FOOTER_LEN;
        Forger {
            file,
            sections,
            directory,
            footer,
        }
    }

    fn start_of(&self, section: SectionType) -> usize {
        let of_all = [
            (SectionType::Directory, self.directory, 0),
            (SectionType::Footer, self.footer, 0),
        ];
        let all = self.sections.iter().chain(&of_all);
        all.filter(|(found, ..)| *found == section)
            .map(|(_, at, _)| *at)
            .next()
            .unwrap()
    }

    /// Makes every checksum and digest right again, as somebody who means harm would; the chunk table's only on demand.
    fn seal(&mut self, with_table: bool) -> &[u8] {
        if with_table {
            self.seal_table();
        }
        for (number, (_, at, len)) in self.sections.iter().enumerate() {
            fix_crc(&mut self.file, *at, *len);
            let digest = Digest::of(&self.file[*at..at + len]);
            let entry =
                self.directory + layout::DIRECTORY_FIXED_LEN + number * layout::DIRECTORY_ENTRY_LEN;
            self.file[entry + 24..entry + 56].copy_from_slice(&digest.0);
        }
        fix_crc(&mut self.file, self.directory, self.footer - self.directory);
        let digest = Digest::of(&self.file[self.directory..self.footer]);
        self.put(self.footer, layout::footer::DIRECTORY_SHA256, &digest.0);
        fix_crc(&mut self.file, self.footer, layout::FOOTER_LEN);
        &self.file
    }

    /// The digests of the one table page, the root and the image.
    fn seal_table(&mut self) {
        let at = self.start_of(SectionType::ChunkTable);
        let mut page = Vec::new();
        for entry in [at + 128, at + 192] {
            page.extend_from_slice(&self.file[entry + 20..entry + 24]);
            page.extend_from_slice(&self.file[entry + 32..entry + 64]);
        }
        self.put(at, 96..128, &Digest::of(&page).0);
        let root = Digest::of(&self.file[at + 96..at + 128]);
        self.put(at, layout::chunk_table::ROOT, &root.0);
        let mut digest = b"vmstow image digest\0".to_vec();
        digest.extend_from_slice(&self.file[at + 32..at + 36]);
        digest.extend_from_slice(&self.file[self.footer + 80..self.footer + 96]);
        digest.extend_from_slice(&self.file[at + 40..at + 48]);
        digest.extend_from_slice(&self.file[at + 56..at + 64]);
        digest.extend_from_slice(&root.0);
        self.put(
            self.footer,
            layout::footer::IMAGE_DIGEST,
            &Digest::of(&digest).0,
        );
    }

    /// Takes a section out of the directory; its bytes stay where they are.
    fn forget(mut self, section: SectionType) -> Self {
        let number = self
            .sections
            .iter()
            .position(|(found, ..)| *found == section)
            .unwrap();
        let entry =
            self.directory + layout::DIRECTORY_FIXED_LEN + number * layout::DIRECTORY_ENTRY_LEN;
        self.file.drain(entry..entry + layout::DIRECTORY_ENTRY_LEN);
        self.footer -= layout::DIRECTORY_ENTRY_LEN;
        self.sections.remove(number);
        let len = u32::try_from(self.footer - self.directory).unwrap();
        let count = u32::try_from(self.sections.len()).unwrap();
        let (directory, footer) = (self.directory, self.footer);
        self.put(
            directory,
            layout::section::FRAME_LEN,
            &(len - 8).to_le_bytes(),
        );
        self.put(
            directory,
            layout::section::PAYLOAD_LEN,
            &u64::from(len - 40).to_le_bytes(),
        );
        self.put(
            directory,
            layout::directory::ENTRY_COUNT,
            &count.to_le_bytes(),
        );
        self.put(footer - 8, 0..4, &len.to_le_bytes());
        self.put(
            footer,
            layout::footer::DIRECTORY_LEN,
            &u64::from(len).to_le_bytes(),
        );
        self.put(
            footer,
            layout::footer::SELF_OFFSET,
            &(footer as u64).to_le_bytes(),
        );
        self
    }

    fn put(&mut self, start: usize, position: Range<usize>, bytes: &[u8]) {
        self.file[start + position.start..start + position.end].copy_from_slice(bytes);
    }
}

#[test]
fn what_was_written_is_read_back() {
    for layout in Layout::ALL {
        let chunks = [vec![1u8; 100_000], b"QEVM".to_vec(), (0..=255).collect()];
        let (file, finished) = image_of(layout, &chunks);
        assert_eq!(finished.file_len, file.len() as u64);
        assert_eq!(read_all(&file).unwrap(), chunks.concat());
        let image = Image::open(file.as_slice()).unwrap();
        assert_eq!(
            (image.layout(), image.identity(), image.generation()),
            (layout, IDENTITY, 1)
        );
        assert_eq!(image.image_digest(), finished.image_digest);
        assert_eq!(image.stream_len(), 100_260);
        assert_eq!(image.xml().unwrap(), XML);
        assert_eq!(image.manifest().unwrap(), short_manifest());
        assert_eq!(image.signatures().unwrap()[0].statement, image.statement());
        assert_eq!(
            image.page_map().unwrap().unwrap().blocks()[0].idstr,
            "pc.ram"
        );
        assert_eq!(
            image
                .chunk_of_stream_offset(StreamOffset(100_003))
                .unwrap()
                .index,
            ChunkIndex(1)
        );
        assert!(image.chunk_of_stream_offset(StreamOffset(100_260)).is_err());
        assert!(image.problems().is_empty());
    }
}

#[test]
fn the_image_digest_does_not_depend_on_zstd_or_raw() {
    let chunks = [vec![1u8; 1000], vec![2; 2000]];
    let digests =
        [Layout::Zstd, Layout::Raw].map(|layout| image_of(layout, &chunks).1.image_digest);
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn a_table_of_many_pages_is_read_page_by_page() {
    let chunks: Vec<Vec<u8>> = (0..10_000u32)
        .map(|n| n.to_le_bytes()[..1 + n as usize % 4].to_vec())
        .collect();
    let (file, _) = image_of(Layout::Raw, &chunks);
    let image = Image::open(file.as_slice()).unwrap();
    assert_eq!((image.table_page_count(), image.chunk_count()), (3, 10_000));
    image.verify_sections().unwrap();
    assert_eq!(image.chunks().map(Result::unwrap).count(), 10_000);
    for index in [0, 1, 4095, 4096, 8191, 8192, 9999] {
        let entry = image.chunk(ChunkIndex(index)).unwrap();
        assert_eq!(entry.index, ChunkIndex(index));
        for offset in [
            entry.stream_offset.0,
            entry.stream_offset.0 + u64::from(entry.raw_len) - 1,
        ] {
            assert_eq!(
                image.chunk_of_stream_offset(StreamOffset(offset)).unwrap(),
                entry
            );
        }
    }
    assert!(image.chunk(ChunkIndex(10_000)).is_err());
    assert!(image.table_page(3).is_err());
}

#[test]
fn stock_zstd_gives_the_stream_of_every_generation() {
    let file = with_two_generations(Layout::Zstd);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.stow");
    std::fs::write(&path, &file).unwrap();
    let output = Command::new("zstd")
        .arg("-dc")
        .arg(&path)
        .output()
        .expect("install the package zstd");
    assert!(output.status.success());
    assert_eq!(output.stdout, read_all(&file).unwrap());
}

#[test]
fn no_flipped_bit_is_accepted() {
    for layout in Layout::ALL {
        let mut file = with_two_generations(layout);
        read_all(&file).unwrap();
        for position in 0..file.len() {
            for bit in 0..8 {
                file[position] ^= 1 << bit;
                let error = read_all(&file).expect_err("a flipped bit");
                assert_eq!(
                    error.kind(),
                    ErrorKind::Image,
                    "bit {bit} of byte {position}: {error}"
                );
                file[position] ^= 1 << bit;
            }
        }
    }
}

#[test]
fn no_flipped_bit_of_a_delta_is_accepted() {
    let (parent, mut file) = parent_and_delta();
    edit(&mut file, "<domain/>");
    let read = |file: &[u8]| open_delta(&parent, file).and_then(|image| read_image(&image));
    read(&file).unwrap();
    for position in 0..file.len() {
        for bit in 0..8 {
            file[position] ^= 1 << bit;
            let error = read(&file).expect_err("a flipped bit");
            assert_eq!(
                error.kind(),
                ErrorKind::Image,
                "bit {bit} of byte {position}: {error}"
            );
            file[position] ^= 1 << bit;
        }
    }
    // Without its parent it gives out nothing.
    let error = read_all(&file).unwrap_err();
    assert!(matches!(error, ContainerError::NoParent { .. }), "{error}");
}

#[test]
fn a_delta_has_the_digest_of_its_full_image_and_a_torn_edit_of_it_is_found() {
    let (parent, first) = parent_and_delta();
    let stream = read_image(&open_delta(&parent, &first).unwrap()).unwrap();
    let second: Vec<u8> = (0..200).map(|i| if i == 100 { 0 } else { i }).collect();
    let chunks = [
        b"QEVM first chunk".to_vec(),
        second,
        b"and one of its own".to_vec(),
    ];
    assert_eq!(stream, chunks.concat());
    let full = image_of(Layout::Zstd, &chunks).1;
    let image = Image::open(first.as_slice()).unwrap();
    assert_eq!(image.image_digest(), full.image_digest);
    assert_eq!(image.parent_name(), Some("parent.stow"));
    assert_eq!(
        image.parent_id(),
        Some(Image::open(parent.as_slice()).unwrap().as_parent())
    );

    let mut file = first.clone();
    edit(&mut file, "<domain/>");
    for len in [first.len() + 1, file.len() - 1] {
        let (image, torn) = Image::open_torn(&file[..len], None).unwrap();
        assert_eq!(
            (image.generation(), torn.valid_len),
            (1, first.len() as u64)
        );
    }
    let text = zstd::decode_all(first.as_slice());
    let text = String::from_utf8(text.unwrap()).unwrap();
    assert!(
        text.contains(&image.parent_id().unwrap().to_string()),
        "{text}"
    );
}

#[test]
fn a_forged_delta_is_refused() {
    let (parent, file) = parent_and_delta();
    let read = |file: &[u8]| open_delta(&parent, file).and_then(|image| read_image(&image));
    let forged = |section: SectionType, at: usize, bytes: &[u8]| {
        let mut forger = Forger::new(file.clone());
        let start = forger.start_of(section) + at;
        forger.file[start..start + bytes.len()].copy_from_slice(bytes);
        read(forger.seal(false)).unwrap_err()
    };
    let twins = layout::TWINS_FIXED_LEN + "parent.stow".len();
    let entries = layout::CHUNK_TABLE_FIXED_LEN + 32;
    let kind = layout::chunk_entry::KIND.start;
    let (twin, table, footer) = (
        SectionType::Twins,
        SectionType::ChunkTable,
        SectionType::Footer,
    );
    // Another twin, one that is not there, none.
    for number in [1, 2, u32::MAX] {
        let error = forged(twin, twins, &number.to_le_bytes());
        assert_eq!(error.kind(), ErrorKind::Image, "{error}");
    }
    for (section, at, bytes) in [
        (twin, layout::twins::TWIN_COUNT.start, &[4][..]),
        (twin, layout::twins::NAME_LEN.start, &[10]),
        (twin, 38, &[1]),
        (twin, layout::TWINS_FIXED_LEN, b"/"),
        (twin, layout::TWINS_FIXED_LEN, &[0xff]),
        (table, entries + kind, &[3]),
        (table, entries + kind, &[2]),
        (table, entries + layout::chunk_entry::STORED_LEN.start, &[1]),
        (table, entries + layout::chunk_entry::STORED_CRC.start, &[1]),
        (table, entries + 64 + kind, &[4]),
        (table, entries + 64 + kind, &[1]),
        (footer, layout::footer::LAYOUT.start, &[2]),
        (footer, layout::footer::INCOMPATIBLE.start, &[0]),
        (footer, layout::footer::PARENT_UUID.start, &[0; 16]),
        (footer, layout::footer::PARENT_UUID.start, &[0x33; 16]),
        (footer, layout::footer::PARENT_DIGEST.start, &[0]),
        (SectionType::Head, layout::head::INCOMPATIBLE.start, &[0]),
    ] {
        let error = forged(section, at, bytes);
        assert_eq!(error.kind(), ErrorKind::Image, "{section} {at}: {error}");
    }
}

proptest! {
    #[test]
    fn a_delta_of_anything_gives_its_stream_back(
        before in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..200), 1..6),
        after in proptest::collection::vec((any::<u8>(), 0..3usize, any::<usize>()), 1..8),
    ) {
        let parent = image_of(Layout::Zstd, &before).0;
        let id = Image::open(parent.as_slice()).unwrap().as_parent();
        let chunks: Vec<_> = after.iter().map(|(byte, kind, twin)| {
            let twin = twin % before.len();
            let mut raw = before[twin].clone();
            let index = ChunkIndex(twin as u64);
            if *kind == 0 {
                return (raw, ChunkKind::Same(index), Vec::new());
            }
            let len = raw.len();
            raw[twin % len] ^= byte;
            raw.push(*byte);
            match kind {
                1 => {
                    let patch = compress_behind(&before[twin], &raw, 3).unwrap();
                    (raw, ChunkKind::Patched(index), patch)
                }
                _ => {
                    let whole = zstd::bulk::compress(&raw, 3).unwrap();
                    (raw, ChunkKind::Zstd, whole)
                }
            }
        }).collect();
        let file = delta(0x44, id, &chunks);
        let image = open_delta(&parent, &file).unwrap();
        let raw: Vec<Vec<u8>> = chunks.into_iter().map(|(raw, ..)| raw).collect();
        prop_assert_eq!(read_image(&image).unwrap(), raw.concat());
        let full = image_of(Layout::Zstd, &raw).1;
        prop_assert_eq!(image.image_digest(), full.image_digest);
        let mut stream = Vec::new();
        vmstow::pipeline::decode(&image, 2, &vmstow::progress::Silent, &mut |raw| {
            stream.extend_from_slice(raw);
            Ok(())
        }).unwrap();
        prop_assert_eq!(stream, raw.concat());
    }
}

#[test]
fn only_a_cut_behind_a_footer_is_accepted() {
    for layout in Layout::ALL {
        let first = small_image(layout).len();
        let file = with_two_generations(layout);
        for len in 0..file.len() {
            assert_eq!(
                read_all(&file[..len]).is_ok(),
                len == first,
                "{layout} cut to {len} bytes"
            );
        }
        assert_eq!(Image::open(&file[..first]).unwrap().generation(), 1);
    }
}

#[test]
fn appended_bytes_are_refused() {
    for garbage in [
        vec![0],
        vec![0; 512],
        b"x".repeat(7000),
        vec![0; 1 << 20],
        small_image(Layout::Raw),
    ] {
        let file = [small_image(Layout::Zstd), garbage].concat();
        read_all(&file).unwrap_err();
    }
}

#[test]
fn a_file_that_ends_in_zeros_says_so() {
    let file = vec![0; 4096];
    let error = Image::open(file.as_slice()).unwrap_err();
    assert_eq!(error.to_string(), "it ends without a footer");
    assert_eq!(
        error.at().unwrap(),
        "file offset 0xe00, found 512 zero bytes"
    );
    assert_eq!(
        Image::open(&file[..511]).unwrap_err().to_string(),
        "it is too short to be an image"
    );
}

#[test]
fn a_damaged_chunk_is_named_and_placed() {
    let mut forger = Forger::new(small_image(Layout::Raw));
    forger.file[20] ^= 1;
    let image = Image::open(forger.file.as_slice()).unwrap();
    image.verify_sections().unwrap();
    let entry = image.chunk(ChunkIndex(1)).unwrap();
    let error = decode(&image, &entry).unwrap_err();
    assert_eq!(error.to_string(), "chunk 1 does not match its checksum");
    assert_eq!(error.at().unwrap(), "file offset 0x10");
    let error = entry.check_raw(&forger.file[16..56]).unwrap_err();
    assert_eq!(error.to_string(), "chunk 1 does not match its hash");
    assert_eq!(error.at().unwrap(), "file offset 0x10, stream offset 0x10");
}

#[test]
fn hostile_fields_with_right_checksums_are_refused() {
    for layout in Layout::ALL {
        for file in [
            small_image(layout),
            with_two_generations(layout),
            with_working_set(layout),
        ] {
            for structure in layout::TABLES {
                for (name, position) in structure.fields {
                    for value in hostile_values(position.len()) {
                        let field = (structure.name, *name);
                        forge_and_read(&file, field, position, &value, &read_all);
                    }
                }
            }
        }
    }
    let (parent, delta) = parent_and_delta();
    let mut edited = delta.clone();
    edit(&mut edited, "<domain/>");
    let read = |file: &[u8]| open_delta(&parent, file).and_then(|image| read_image(&image));
    for file in [delta, edited] {
        for structure in layout::TABLES {
            for (name, position) in structure.fields {
                for value in hostile_values(position.len()) {
                    let field = (structure.name, *name);
                    forge_and_read(&file, field, position, &value, &read);
                }
            }
        }
    }
}

type Read<'a> = dyn Fn(&[u8]) -> Result<Vec<u8>, ContainerError> + 'a;

/// Puts `value` into a field, with and without making the chunk table's digests right again, and reads the result.
fn forge_and_read(
    file: &[u8],
    field: (&str, &str),
    position: &Range<usize>,
    value: &[u8],
    read: &Read<'_>,
) {
    for with_table in [false, true] {
        let mut forger = Forger::new(file.to_vec());
        for start in places(&forger, field.0) {
            forger.put(start, position.clone(), &value[..position.len()]);
        }
        let forged = forger.seal(with_table).to_vec();
        let (stream, largest) = largest_allocation(|| read(&forged));
        assert!(
            largest <= 4 << 20,
            "{field:?} {value:x?}: {largest} bytes asked for"
        );
        if let Ok(stream) = stream {
            assert!(
                forged == file || FREE.contains(&field),
                "{field:?} {value:x?} is accepted"
            );
            assert_eq!(stream, read(file).unwrap());
        }
        let _ = Image::open_torn(forged.as_slice(), None);
    }
}

/// Fields that may have other values without the image being less whole.
const FREE: &[(&str, &str)] = &[
    ("footer", "READONLY_COMPATIBLE"),
    ("footer", "COMPATIBLE"),
    ("head", "MAX_CHUNK_LEN"),
    ("chunk_table", "MAX_CHUNK_LEN"),
    // Another save or guest, where no HEAD and no earlier footer says otherwise.
    ("footer", "IMAGE_UUID"),
    ("footer", "GUEST_UUID"),
];

/// Values of up to 32 bytes that no writer would write.
fn hostile_values(len: usize) -> Vec<Vec<u8>> {
    let mut values = vec![vec![0; 32], vec![0xff; 32]];
    for number in [
        1u64,
        2,
        7,
        64,
        4096,
        0x7fff_ffff,
        1 << 32,
        u64::MAX - 7,
        1 << 63,
    ] {
        let mut value = number.to_le_bytes().to_vec();
        value.resize(32, 0);
        values.push(value);
    }
    values
        .iter_mut()
        .for_each(|value| value.truncate(len.max(1)));
    values.dedup();
    values
}

/// Where the structures of this name begin.
fn places(forger: &Forger, structure: &str) -> Vec<usize> {
    let has = |section| forger.sections.iter().any(|(found, ..)| *found == section);
    match structure {
        "head" if !has(SectionType::Head) => vec![],
        "head" => vec![0],
        "section" => vec![forger.start_of(SectionType::Xml)],
        "chunk_table" => vec![forger.start_of(SectionType::ChunkTable)],
        "chunk_entry" => vec![forger.start_of(SectionType::ChunkTable) + 128 + 64],
        "page_map" | "page_run" if !has(SectionType::PageMap) => vec![],
        "signature" if !has(SectionType::Signature) => vec![],
        "twins" if !has(SectionType::Twins) => vec![],
        "twins" => vec![forger.start_of(SectionType::Twins)],
        "page_map" => vec![forger.start_of(SectionType::PageMap)],
        "page_run" => vec![forger.start_of(SectionType::PageMap) + 56 + 15],
        "directory" => vec![forger.directory],
        "directory_entry" => vec![forger.directory + 40 + 64],
        "footer" => vec![forger.footer],
        "signature" => vec![forger.start_of(SectionType::Signature)],
        "working_set" if !has(SectionType::WorkingSet) => vec![],
        "working_set" => vec![forger.start_of(SectionType::WorkingSet)],
        other => panic!("where is {other}?"),
    }
}

#[test]
fn bytes_that_no_directory_entry_names_are_refused() {
    for section in [SectionType::PageMap, SectionType::Signature] {
        let mut forger = Forger::new(small_image(Layout::Zstd)).forget(section);
        let error = Image::open(forger.seal(false)).unwrap_err();
        match section {
            SectionType::PageMap => assert!(matches!(error, ContainerError::Gap { .. }), "{error}"),
            _ => assert!(
                matches!(
                    error,
                    ContainerError::WrongField {
                        field: "DIRECTORY_OFFSET",
                        ..
                    }
                ),
                "{error}"
            ),
        }
    }
}

#[test]
fn two_chunks_may_not_share_their_bytes() {
    for layout in Layout::ALL {
        let mut forger = Forger::new(image_of(layout, &[vec![7; 40], vec![7; 40]]).0);
        let entry = forger.start_of(SectionType::ChunkTable) + 128;
        forger.file.copy_within(entry..entry + 8, entry + 64);
        let error = read_all(forger.seal(false)).unwrap_err();
        assert_eq!(error.to_string(), "chunk 1 has an impossible STORED_OFFSET");
    }
}

#[test]
fn a_section_in_two_entries_is_refused() {
    let mut forger = Forger::new(small_image(Layout::Zstd)).forget(SectionType::PageMap);
    let offset = forger.start_of(SectionType::Xml) as u64;
    let last = forger.footer - 8 - layout::DIRECTORY_ENTRY_LEN;
    forger.put(last, layout::directory_entry::OFFSET, &offset.to_le_bytes());
    let error = Image::open(forger.seal(false)).unwrap_err();
    assert!(matches!(error, ContainerError::Overlap { .. }), "{error}");
}

#[test]
fn a_section_with_a_right_checksum_but_another_digest_is_refused() {
    let mut forger = Forger::new(small_image(Layout::Zstd));
    let (_, at, len) = forger
        .sections
        .iter()
        .copied()
        .find(|(kind, ..)| *kind == SectionType::ChunkTable)
        .unwrap();
    forger.file[at + 128 + layout::chunk_entry::STORED_CRC.start] ^= 1;
    fix_crc(&mut forger.file, at, len);
    let image = Image::open(forger.file.as_slice()).unwrap();
    let error = image.verify_sections().unwrap_err();
    assert!(
        matches!(
            error,
            ContainerError::SectionDigest {
                section: SectionType::ChunkTable,
                ..
            }
        ),
        "{error}"
    );
    let (_, at, len) = forger.sections[1];
    forger.file[at + 40] ^= 1;
    fix_crc(&mut forger.file, at, len);
    let image = Image::open(forger.file.as_slice()).unwrap();
    assert!(matches!(
        image.xml().unwrap_err(),
        ContainerError::SectionDigest { .. }
    ));
    assert_eq!(image.problems().len(), 2);
}

#[test]
fn unknown_incompatible_features_are_refused_by_name_and_others_not() {
    let mut forger = Forger::new(small_image(Layout::Raw));
    forger.put(
        forger.footer,
        layout::footer::INCOMPATIBLE,
        &0x11u64.to_le_bytes(),
    );
    let error = read_all(forger.seal(false)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "it needs features this program does not have: bit 4"
    );

    let mut forger = Forger::new(small_image(Layout::Raw));
    forger.put(forger.footer, layout::footer::COMPATIBLE, &[0xff; 8]);
    forger.put(
        forger.footer,
        layout::footer::READONLY_COMPATIBLE,
        &8u64.to_le_bytes(),
    );
    read_all(forger.seal(false)).unwrap();
    let image = Image::open(forger.file.as_slice()).unwrap();
    let mut sink = Vec::new();
    let error = Edit::begin(&image, &mut sink).unwrap_err();
    assert_eq!(
        error.to_string(),
        "it has features this program must not edit: bit 3"
    );
}

#[test]
fn another_version_is_refused_before_anything_else() {
    let mut forger = Forger::new(small_image(Layout::Raw));
    forger.put(
        forger.footer,
        layout::footer::FORMAT_VERSION,
        &2u32.to_le_bytes(),
    );
    let error = read_all(&forger.file).unwrap_err();
    assert_eq!(
        error.to_string(),
        "its format version is 2, this program reads version 1"
    );
}

#[test]
fn an_unknown_section_is_kept_through_an_edit_unless_it_is_critical() {
    let mut file = small_image(Layout::Zstd);
    let before = file.clone();
    let image = Image::open(before.as_slice()).unwrap();
    let mut appended = Edit::begin(&image, &mut file).unwrap();
    appended
        .add(SectionType::Other(*b"NOTE"), b"some note..")
        .unwrap();
    appended.finish().unwrap();
    edit(&mut file, "<domain/>");
    let image = Image::open(file.as_slice()).unwrap();
    let kept = image
        .sections()
        .iter()
        .find(|entry| entry.section == SectionType::Other(*b"NOTE"))
        .unwrap();
    assert!(kept.is_live);
    assert_eq!(image.section_payload(kept, 100).unwrap(), b"some note..");
    image.section_payload(kept, 10).unwrap_err();
    read_all(&file).unwrap();

    let mut forger = Forger::new(file);
    let at = forger.start_of(SectionType::Other(*b"NOTE"));
    forger.put(at, layout::section::FLAGS, &1u16.to_le_bytes());
    let error = Image::open(forger.seal(false)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "it needs section \"NOTE\", which this program does not know"
    );
}

#[test]
fn edits_pile_up_and_change_only_what_they_name() {
    for layout in Layout::ALL {
        let (mut file, first) = image_of(layout, &[vec![3; 50]]);
        let signed = Image::open(file.clone()).unwrap().statement();
        for generation in 2..6 {
            let xml = format!("<domain id='{generation}'/>");
            let finished = edit(&mut file, &xml);
            assert_eq!(
                (finished.generation, finished.file_len),
                (generation, file.len() as u64)
            );
            assert_eq!(
                (finished.image_digest, finished.chunk_count),
                (first.image_digest, 1)
            );
            assert_eq!(read_all(&file).unwrap(), vec![3; 50]);
            let image = Image::open(file.as_slice()).unwrap();
            assert_eq!(image.xml().unwrap(), xml);
            assert_ne!(image.statement(), signed);
            assert_eq!(
                image.signatures().unwrap()[0].statement,
                signed,
                "stale, but still there"
            );
        }
    }
}

#[test]
fn a_signature_that_is_added_leaves_the_statement_as_it_was() {
    let mut file = small_image(Layout::Zstd);
    let before = file.clone();
    let image = Image::open(before.as_slice()).unwrap();
    let mut edit = Edit::begin(&image, &mut file).unwrap();
    assert_eq!(edit.statement(), image.statement());
    edit.add(SectionType::Signature, &[0; 8]).unwrap();
    edit.finish().unwrap();
    let edited = Image::open(file.as_slice()).unwrap();
    assert_eq!(
        (edited.statement(), edited.signatures().unwrap().len()),
        (image.statement(), 2)
    );
    read_all(&file).unwrap();
}

#[test]
fn edits_may_not_touch_what_an_image_is_made_of() {
    let file = small_image(Layout::Zstd);
    let image = Image::open(file.as_slice()).unwrap();
    let mut sink = Vec::new();
    let mut edit = Edit::begin(&image, &mut sink).unwrap();
    for section in [
        SectionType::Head,
        SectionType::ChunkTable,
        SectionType::Directory,
        SectionType::Footer,
    ] {
        edit.replace(section, b"").unwrap_err();
        edit.add(section, b"").unwrap_err();
    }
    edit.remove(SectionType::Xml).unwrap_err();
    edit.add(SectionType::PageMap, b"").unwrap_err();
    edit.remove(SectionType::PageMap).unwrap();
}

#[test]
fn a_torn_append_falls_back_to_the_generation_before() {
    for layout in Layout::ALL {
        let first = small_image(layout);
        let second = with_two_generations(layout);
        let payload_end = Image::open(first.as_slice()).unwrap();
        let payload_end = payload_end.footer().payload_offset.0 + payload_end.footer().payload_len;
        let given = (layout != Layout::Zstd).then_some(payload_end);
        for len in first.len()..=second.len() {
            let (image, torn) = Image::open_torn(&second[..len], given).unwrap();
            let generation = if len == second.len() { 2 } else { 1 };
            assert_eq!(image.generation(), generation);
            assert_eq!(
                torn.valid_len,
                if generation == 2 { len } else { first.len() } as u64
            );
            assert_eq!(torn.cause.is_some(), torn.valid_len != torn.file_len);
            image.verify_sections().unwrap();
            let mut sink = Vec::new();
            assert_eq!(
                Edit::begin(&image, &mut sink).is_err(),
                torn.valid_len != torn.file_len
            );
        }
        for len in 0..first.len() {
            Image::open_torn(&first[..len], given).unwrap_err();
        }
    }
}

#[test]
fn a_newer_generation_that_is_whole_is_not_passed_over() {
    let mut forger = Forger::new(with_two_generations(Layout::Zstd));
    forger.put(
        forger.footer,
        layout::footer::INCOMPATIBLE,
        &2u64.to_le_bytes(),
    );
    let torn = [forger.seal(false), b"torn"].concat();
    let error = Image::open_torn(torn.as_slice(), None).unwrap_err();
    assert!(matches!(error, ContainerError::UnknownIncompatible { .. }));
}

#[test]
fn where_a_torn_raw_payload_ends_has_to_be_told() {
    let file = small_image(Layout::Raw);
    let error = Image::open_torn(&file[..file.len() - 1], None).unwrap_err();
    assert!(matches!(error, ContainerError::PayloadEndUnknown { .. }));
    assert_eq!(
        Image::open_torn(file.as_slice(), Some(16))
            .unwrap_err()
            .kind(),
        ErrorKind::Image
    );
}

#[test]
fn a_footer_forged_in_guest_memory_is_not_taken() {
    let inner = with_two_generations(Layout::Raw);
    for layout in [Layout::Zstd, Layout::Raw] {
        let (file, _) = image_of(layout, &[inner.clone(), inner.clone()]);
        let image = Image::open(file.as_slice()).unwrap();
        assert_eq!(image.chunk_count(), 2);
        let payload_end = image.footer().payload_offset.0 + image.footer().payload_len;
        let given = (layout == Layout::Raw).then_some(payload_end);
        let torn = [file.as_slice(), &inner[..100]].concat();
        let (found, tail) = Image::open_torn(torn.as_slice(), given).unwrap();
        assert_eq!((found.generation(), found.chunk_count()), (1, 2));
        assert_eq!(tail.valid_len, file.len() as u64);
    }
    // Cut right behind the forged footer of the second chunk: it does not stand where it says.
    let (file, _) = image_of(Layout::Raw, &[inner.clone(), inner.clone()]);
    let error = Image::open(&file[..2 * inner.len()]).unwrap_err();
    assert!(matches!(
        error,
        ContainerError::WrongField {
            field: "SELF_OFFSET",
            ..
        }
    ));
}

#[test]
fn a_pipe_can_read_the_head_before_the_end() {
    let mut file = Vec::new();
    let json = provisional_manifest().to_json().unwrap();
    let head = Head {
        manifest_json: &json,
        xml: XML,
    };
    ImageWriter::begin(&mut file, Layout::Zstd, IDENTITY, 1 << 18, head).unwrap();
    let (fields, read) = parse_head(&file).unwrap();
    assert_eq!((fields.identity, fields.max_chunk_len), (IDENTITY, 1 << 18));
    assert_eq!(read, head);
    assert_eq!(
        Manifest::from_json(read.manifest_json).unwrap(),
        provisional_manifest()
    );
    assert!(
        read.manifest_json.is_ascii()
            && !String::from_utf8_lossy(read.manifest_json).contains("ram_blocks")
    );
}

#[test]
fn what_does_not_belong_is_not_written() {
    let mut file = Vec::new();
    let mut writer =
        ImageWriter::begin(&mut file, Layout::Raw, IDENTITY, 100, Head::default()).unwrap();
    writer.append_section(SectionType::Xml, b"").unwrap_err();
    append(&mut writer, Layout::Zstd, b"a frame").unwrap_err();
    append(&mut writer, Layout::Raw, b"").unwrap_err();
    append(&mut writer, Layout::Raw, &[0; 101]).unwrap_err();
    writer.append_zeros(1).unwrap_err();
    append(&mut writer, Layout::Raw, &[0; 100]).unwrap();
    writer
        .append_section(SectionType::Xml, b"<domain/>")
        .unwrap();
    writer
        .append_section(SectionType::Xml, b"<domain/>")
        .unwrap_err();
    append(&mut writer, Layout::Raw, b"late").unwrap_err();
    writer.append_section(SectionType::Footer, b"").unwrap_err();
    let error = writer.finish().unwrap_err();
    assert!(matches!(
        error,
        ContainerError::WrongCount {
            section: SectionType::Manifest,
            count: 0
        }
    ));
}

/// A disk that is full after so many bytes.
struct FullAfter(usize);

impl vmstow::bytes::Sink for FullAfter {
    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let left = self.0.checked_sub(bytes.len());
        self.0 = left.ok_or(std::io::ErrorKind::StorageFull)?;
        Ok(())
    }

    fn sync(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn publish(&mut self) -> Result<(), vmstow::bytes::PublishError> {
        Ok(())
    }
}

#[test]
fn a_sink_that_fails_at_any_byte_is_reported_with_its_place() {
    let write = |room: usize| -> Result<u64, ContainerError> {
        let mut sink = FullAfter(room);
        let head = Head::default();
        let mut writer = ImageWriter::begin(&mut sink, Layout::Zstd, IDENTITY, 100, head)?;
        append(&mut writer, Layout::Zstd, b"QEVM")?;
        writer.append_section(SectionType::Xml, XML.as_bytes())?;
        writer.append_section(SectionType::Manifest, b"{}")?;
        Ok(writer.finish()?.file_len)
    };
    let file_len = usize::try_from(write(usize::MAX).unwrap()).unwrap();
    assert!(write(file_len).is_ok());
    for room in 0..file_len {
        let error = write(room).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed);
        let at = error.offset().unwrap().0;
        assert!(
            at <= room as u64,
            "{error} at {at:#x} with room for {room:#x}"
        );
    }
}

#[test]
fn xml_with_a_doctype_is_refused() {
    let mut file = small_image(Layout::Raw);
    edit(&mut file, "<!DOCTYPE x [<!ENTITY a 'b'>]><domain/>");
    let error = read_all(&file).unwrap_err();
    assert!(matches!(error, ContainerError::NotXml { .. }));
}

#[test]
fn members_a_reader_does_not_know_survive_it() {
    let mut json = serde_json::to_value(full_manifest()).unwrap();
    json["guest"]["mood"] = "good".into();
    json["new"] = serde_json::json!([1, 2]);
    let read = Manifest::from_json(json.to_string().as_bytes()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), json);
}

/// Runs the reader that was written from the spec alone; gives stdout.
fn independent_reader(arguments: &[&std::ffi::OsStr]) -> Vec<u8> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/independent_reader.py");
    let output = Command::new("python3")
        .arg(script)
        .args(arguments)
        .output()
        .expect("install the package python3");
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

#[test]
fn an_independent_reader_gives_the_same_stream() {
    let directory = tempfile::tempdir().unwrap();
    for layout in Layout::ALL {
        for file in [
            small_image(layout),
            with_two_generations(layout),
            image_of(layout, &[vec![9; 70_000]]).0,
        ] {
            let path = directory.path().join("x.stow");
            std::fs::write(&path, &file).unwrap();
            assert_eq!(
                independent_reader(&["extract".as_ref(), path.as_ref()]),
                read_all(&file).unwrap()
            );
            let list =
                String::from_utf8(independent_reader(&["list".as_ref(), path.as_ref()])).unwrap();
            let image = Image::open(file.as_slice()).unwrap();
            assert_eq!(list.lines().count(), 1 + image.sections().len());
            assert!(list.contains(&image.image_digest().to_string()));
        }
    }
}

#[test]
fn an_independent_reader_finds_the_parent_of_a_delta() {
    let directory = tempfile::tempdir().unwrap();
    let (parent, file) = parent_and_delta();
    let path = directory.path().join("delta.stow");
    std::fs::write(&path, &file).unwrap();
    std::fs::write(directory.path().join("other name.stow"), &parent).unwrap();
    let stream = read_image(&open_delta(&parent, &file).unwrap()).unwrap();
    assert_eq!(
        independent_reader(&["extract".as_ref(), path.as_ref()]),
        stream
    );
}

#[test]
fn an_independent_reader_accepts_and_refuses_the_same_files() {
    let mut files = Vec::new();
    let (parent, mut delta) = parent_and_delta();
    edit(&mut delta, "<domain/>");
    for good in Layout::ALL
        .map(with_two_generations)
        .into_iter()
        .chain([delta])
    {
        for position in (0..good.len()).step_by(79) {
            let mut flipped = good.clone();
            flipped[position] ^= 1 << (position % 8);
            files.push(flipped);
            files.push(good[..position].to_vec());
        }
        for structure in layout::TABLES {
            for (_, position) in structure.fields {
                for value in hostile_values(position.len()).into_iter().take(3) {
                    let mut forger = Forger::new(good.clone());
                    for start in places(&forger, structure.name) {
                        forger.put(start, position.clone(), &value);
                    }
                    files.push(forger.seal(false).to_vec());
                }
            }
        }
        files.push(good);
    }
    files.extend(Layout::ALL.map(small_image));
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("any name.stow"), &parent).unwrap();
    let paths: Vec<_> = (0..files.len())
        .map(|n| directory.path().join(n.to_string()))
        .collect();
    for (file, path) in files.iter().zip(&paths) {
        std::fs::write(path, file).unwrap();
    }
    let arguments: Vec<_> = std::iter::once("verify".as_ref())
        .chain(paths.iter().map(|path| path.as_ref()))
        .collect();
    let answer = String::from_utf8(independent_reader(&arguments)).unwrap();
    assert_eq!(answer.lines().count(), files.len());
    for (file, line) in files.iter().zip(answer.lines()) {
        let is_delta = Image::open(file.as_slice()).is_ok_and(|it| it.parent_id().is_some());
        let ours = match is_delta {
            true => open_delta(&parent, file).and_then(|image| read_image(&image)),
            false => read_all(file),
        };
        assert_eq!(
            ours.is_ok(),
            line.ends_with(": good"),
            "we: {:?}, it: {line}",
            ours.err()
        );
    }
}

#[test]
fn every_image_ever_released_is_still_read() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/images");
    for layout in Layout::ALL {
        for (name, made) in [
            ("", small_image(layout)),
            ("-edited", with_two_generations(layout)),
        ] {
            let path = format!("{directory}/version-1-{layout}{name}.stow");
            if std::env::var_os("UPDATE_EXAMPLE").is_some() {
                std::fs::write(&path, &made).unwrap();
            }
            let released = std::fs::read(&path).unwrap();
            assert_eq!(
                read_all(&released).unwrap(),
                [&b"QEVM first chunk"[..], &[7; 40]].concat()
            );
            assert!(
                released == made,
                "{path} would be written in another way today"
            );
        }
    }
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![Just(Layout::Zstd), Just(Layout::Raw), Just(Layout::Mapped)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_chunks_and_edits_come_back(
        layout in layouts(),
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..2000), 1..20),
        edits in prop::collection::vec("[a-z]{0,40}", 0..4),
    ) {
        let (mut file, _) = image_of(layout, &chunks);
        for xml in &edits {
            edit(&mut file, xml);
        }
        prop_assert_eq!(read_all(&file).unwrap(), chunks.concat());
        let image = Image::open(file.as_slice()).unwrap();
        prop_assert_eq!(image.generation() as usize, edits.len() + 1);
        prop_assert_eq!(image.xml().unwrap(), edits.last().map_or(XML, String::as_str));
    }

    #[test]
    fn any_bytes_are_refused_or_read_without_panic(
        layout in layouts(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        noise in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        prop_assert!(Image::open(noise.as_slice()).is_err());
        let _ = parse_head(&noise);
        let mut forger = Forger::new(with_two_generations(layout));
        for (index, byte) in damage {
            let position = index.index(forger.file.len());
            forger.file[position] = byte;
        }
        let sealed = forger.seal(true).to_vec();
        for file in [&sealed, &[sealed.clone(), noise].concat()] {
            let _ = read_all(file);
            if let Ok(image) = Image::open(file.as_slice()) {
                let _ = (image.problems(), image.signatures(), image.page_map(), image.manifest());
            }
            let _ = Image::open_torn(file.as_slice(), None);
            let _ = Image::open_torn(file.as_slice(), Some(56));
        }
    }
}
