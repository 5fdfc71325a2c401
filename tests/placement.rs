//! Guest memory is put in its place and the rest of the stream passed on: held against what a parser finds in streams of
//! real QEMUs, with this process's own memory in QEMU's part.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

use std::path::Path;

use memmap2::MmapMut;
use uuid::Uuid;
use vmstow::container::{
    ChunkKind, Head, Identity, Image, ImageWriter, Layout, PageMapBuilder, SectionType, StoredChunk,
};
use vmstow::digest::{Digest, crc32c};
use vmstow::host::{ProcessId, ProcessMemory};
use vmstow::pipeline::{self, Destination, Encoding, PipelineError, Placement};
use vmstow::progress::Silent;
use vmstow::stream::{Event, Parser, RamBlock};

const PAGE: usize = 4096;

/// What a parser of its own finds: the elements with their places in the stream, and the RAMBlocks.
struct Parsed {
    elements: Vec<(usize, usize, Event)>,
    blocks: Vec<RamBlock>,
}

fn parse(stream: &[u8]) -> Option<Parsed> {
    let mut parser = Parser::new();
    let mut elements = Vec::new();
    let mut at = 0;
    while at < stream.len() {
        let element = parser.next(&stream[at..]).ok()??;
        elements.push((at, at + element.len, element.event));
        at += element.len;
    }
    let blocks = parser.finish().ok()?.blocks;
    Some(Parsed { elements, blocks })
}

fn streams() -> Vec<(String, Vec<u8>, Parsed)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/streams");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "zst") {
            let stream = zstd::decode_all(std::fs::File::open(&path).unwrap()).unwrap();
            if let Some(parsed) = parse(&stream) {
                found.push((path.display().to_string(), stream, parsed));
            }
        }
    }
    assert!(found.len() >= 6, "only {} streams found", found.len());
    found
}

fn image_of(
    layout: Layout,
    write: impl FnOnce(&mut ImageWriter<'_>) -> PageMapBuilder,
) -> Image<Vec<u8>> {
    let mut file: Vec<u8> = Vec::new();
    let identity = Identity {
        image_uuid: Uuid::nil(),
        guest_uuid: None,
    };
    let head = Head {
        manifest_json: b"{}",
        xml: "<domain/>",
    };
    let mut image = ImageWriter::begin(&mut file, layout, identity, 2 << 20, head).unwrap();
    let page_map = write(&mut image).finish();
    for (section, payload) in [
        (SectionType::Xml, b"<domain/>".as_slice()),
        (SectionType::Manifest, b"{}"),
        (SectionType::PageMap, &page_map),
    ] {
        image.append_section(section, payload).unwrap();
    }
    image.finish().unwrap();
    Image::open(file).unwrap()
}

/// As a save makes it.
fn saved(stream: &[u8], encoding: &Encoding) -> Image<Vec<u8>> {
    image_of(encoding.layout, |image| {
        let mut source = stream;
        let encoded = pipeline::encode(&mut source, image, encoding, &Silent).unwrap();
        encoded.page_map.unwrap()
    })
}

/// With chunks that end where `cuts` says, and a page map in which the blocks change places if `are_swapped`.
fn cut(stream: &[u8], parsed: &Parsed, cuts: &[usize], are_swapped: bool) -> Image<Vec<u8>> {
    image_of(Layout::Raw, |image| {
        let blocks = parsed.blocks.iter();
        let mut blocks: Vec<_> = blocks
            .map(|block| (block.idstr.clone(), block.used_length))
            .collect();
        if are_swapped {
            blocks.reverse();
        }
        let mut page_map = PageMapBuilder::new(&blocks);
        let mut elements = parsed.elements.iter().peekable();
        let mut start = 0;
        for (chunk, end) in (0..).zip(cuts.iter().copied().chain([stream.len()])) {
            let raw = &stream[start..end];
            let chunk_of = StoredChunk {
                stored: raw,
                raw_len: u32::try_from(raw.len()).unwrap(),
                stored_crc: crc32c(raw),
                raw_digest: Digest::of(raw),
                kind: ChunkKind::Plain,
            };
            image.append_chunk(&chunk_of).unwrap();
            while let Some((at, _, event)) = elements.next_if(|element| element.1 <= end) {
                if let Event::Page {
                    block,
                    page,
                    is_zero,
                    body,
                } = event
                {
                    let body = u32::try_from(at + body - start).unwrap();
                    page_map.page(*block, page.0, chunk, body, *is_zero);
                }
            }
            start = end;
        }
        page_map
    })
}

/// RAMBlocks by their idstr.
type Memory = Vec<(String, MmapMut)>;

/// Places every RAMBlock that can be into memory full of something else. Gives what came out, and each block's memory.
fn place(image: &Image<Vec<u8>>, largest_only: bool) -> (Result<Vec<u8>, PipelineError>, Memory) {
    let page_map = image.page_map().unwrap().unwrap();
    let pid = i32::try_from(std::process::id()).unwrap();
    let memory = ProcessMemory::open(ProcessId::of(pid).unwrap()).unwrap();
    let largest = page_map
        .blocks()
        .iter()
        .map(|block| block.used_length)
        .max();
    let mut maps = Vec::new();
    for (index, block) in page_map.blocks().iter().enumerate() {
        let is_wanted = !largest_only || Some(block.used_length) == largest;
        if page_map.names_once(index) && is_wanted {
            let len = usize::try_from(block.used_length).unwrap();
            let mut map = MmapMut::map_anon(len).unwrap();
            map.fill(0xa5);
            maps.push((block.idstr.clone(), map));
        }
    }
    let destinations = maps.iter().map(|(idstr, map)| Destination {
        idstr: idstr.clone(),
        used_length: map.len() as u64,
        address: map.as_ptr() as u64,
        touched: vec![0..7, 7..(map.len() / PAGE) as u64],
    });
    let placement = Placement::new(&memory, destinations.collect(), &page_map);
    let mut rest = Vec::new();
    let placed = pipeline::place(image, 2, &Silent, &placement, &mut |raw| {
        rest.extend_from_slice(raw);
        Ok(())
    });
    (placed.map(|()| rest), maps)
}

/// Memory is as the stream says, and what came out is all else.
fn assert_placed(name: &str, stream: &[u8], parsed: &Parsed, rest: &[u8], maps: &Memory) {
    let mut expected = Vec::new();
    let mut count = 0;
    for (start, end, event) in &parsed.elements {
        let placed = match event {
            Event::Page { block, page, .. } => {
                let idstr = &parsed.blocks[*block].idstr;
                let map = maps.iter().find(|(name, _)| name == idstr);
                map.map(|(_, map)| &map[usize::try_from(page.0).unwrap() * PAGE..][..PAGE])
            }
            _ => None,
        };
        match (placed, event) {
            (Some(placed), Event::Page { is_zero: true, .. }) => {
                assert!(placed.iter().all(|byte| *byte == 0), "{name}: {event:?}");
                count += 1;
            }
            (Some(placed), Event::Page { body, .. }) => {
                assert!(placed == &stream[start + body..*end], "{name}: {event:?}");
                count += 1;
            }
            _ => expected.extend_from_slice(&stream[*start..*end]),
        }
    }
    assert!(rest == expected, "{name}: another rest");
    let pages: usize = maps.iter().map(|(_, map)| map.len() / PAGE).sum();
    assert_eq!(count, pages, "{name}");
}

#[test]
fn every_page_is_in_its_place_and_all_else_passed_on() {
    let mut placed_blocks = 0;
    for (name, stream, parsed) in streams() {
        for layout in [Layout::Zstd, Layout::Raw] {
            for chunk_len in [4096, 64 << 10, 256 << 10, 1 << 20] {
                for largest_only in [true, false] {
                    let encoding = Encoding {
                        layout,
                        level: 1,
                        chunk_len,
                        threads: 2,
                        twins: None,
                    };
                    let image = saved(&stream, &encoding);
                    let (rest, maps) = place(&image, largest_only);
                    placed_blocks += maps.len();
                    assert_placed(&name, &stream, &parsed, &rest.unwrap(), &maps);
                }
            }
        }
    }
    assert!(placed_blocks > 100);
}

#[test]
fn chunks_that_end_anywhere_give_the_same() {
    for (name, stream, parsed) in streams() {
        let in_headers = parsed.elements.iter().step_by(5).map(|(at, ..)| at + 3);
        let in_headers: Vec<usize> = in_headers.filter(|cut| *cut < stream.len()).collect();
        let image = cut(&stream, &parsed, &in_headers, false);
        let (rest, maps) = place(&image, false);
        assert_placed(&name, &stream, &parsed, &rest.unwrap(), &maps);
    }
}

/// A stream of two blocks, each of two pages with bytes.
fn two_blocks() -> Vec<u8> {
    const CONTINUE: u64 = 0x20;
    const PAGE_FLAG: u64 = 0x08;
    let named = |idstr: &[u8]| [&[1], idstr].concat();
    let word = |word: u64| word.to_be_bytes().to_vec();
    let end = [word(0x10), b"\x7e\0\0\0\x01".to_vec()].concat();
    let mut parts = vec![b"QEVM\0\0\0\x03".to_vec()];
    parts.push(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec());
    parts.push(word((4 * PAGE as u64) | 0x04));
    for idstr in [b"a", b"b"] {
        parts.extend([named(idstr), word(2 * PAGE as u64)]);
    }
    for (fill, idstr) in [(1, b"a"), (3, b"b")] {
        parts.extend([word(PAGE_FLAG), named(idstr), vec![fill; PAGE]]);
        let second = PAGE as u64 | PAGE_FLAG | CONTINUE;
        parts.extend([word(second), vec![fill + 1; PAGE]]);
    }
    parts.extend([end.clone(), b"\x03\0\0\0\x01".to_vec(), end, vec![0]]);
    parts.concat()
}

#[test]
fn a_page_map_that_lies_about_a_block_is_noticed() {
    let stream = two_blocks();
    let parsed = parse(&stream).unwrap();
    let starts = parsed.elements.iter().map(|(at, ..)| *at);
    let cuts: Vec<usize> = starts.skip(1).collect();
    let (rest, maps) = place(&cut(&stream, &parsed, &cuts, false), false);
    assert_placed("two blocks", &stream, &parsed, &rest.unwrap(), &maps);
    let (placed, _) = place(&cut(&stream, &parsed, &cuts, true), false);
    assert!(
        matches!(placed, Err(PipelineError::PageMap { .. })),
        "{placed:?}"
    );
}
