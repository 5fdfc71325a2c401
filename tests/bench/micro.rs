//! How fast the parts are, one core each: `cargo bench --bench micro`, or `cargo bench --bench micro -- PART` for one.
//!
//! The stream is a real one: a QEMU whose memory holds its own program, saved by this very vmstow. Only the page map of a
//! large guest is made here, record by record, since such a guest does not fit everywhere.

#![allow(clippy::unwrap_used, reason = "this measures; what goes wrong ends it")]

#[path = "../support/mod.rs"]
mod support;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use uuid::Uuid;
use vmstow::codec::{Compressor, DEFAULT_LEVEL, Decompressor};
use vmstow::container::{
    ChunkKind, Head, Identity, Image, ImageWriter, Layout, PageMapBuilder, SectionType, StoredChunk,
};
use vmstow::digest::{Digest, crc32c};
use vmstow::pipeline::{self, DEFAULT_CHUNK_LEN};
use vmstow::progress::Silent;
use vmstow::stream::{Event, Parser};
use vmstow::units::PageIndex;

use support::{Guest, GuestSpec, Qemu, TestDir};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let saved = Saved::make();
    parse(&mut criterion, &saved.stream);
    encode_chunks(&mut criterion, &saved.raw);
    decode_chunks(&mut criterion, &saved);
    map_pages(&mut criterion);
    criterion.final_summary();
}

/// One guest, stowed in both layouts.
struct Saved {
    stream: Vec<u8>,
    raw: Image<Vec<u8>>,
    zstd: Image<Vec<u8>>,
}

impl Saved {
    fn make() -> Self {
        let dir = TestDir::new();
        let image = |layout: &str| {
            let program = Qemu::V10.program();
            let loader = format!(
                "loader,file={},addr=0x1000000,force-raw=on",
                program.display()
            );
            let spec = GuestSpec {
                memory_mib: 128,
                ..GuestSpec::default().named(layout)
            };
            let guest = Guest::start(&dir, spec.with(&["-S", "-device", &loader]));
            let words = ["save", &guest.source(), layout, "--layout", layout];
            dir.vmstow().args(words).assert().success();
            Image::open(std::fs::read(dir.join(layout)).unwrap()).unwrap()
        };
        let (raw, zstd) = (image("raw"), image("zstd"));
        let mut stream = Vec::new();
        pipeline::decode(&raw, 1, &Silent, &mut |piece| {
            stream.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
        Saved { stream, raw, zstd }
    }
}

/// The stream parser; "elements" are pages.
fn parse(criterion: &mut Criterion, stream: &[u8]) {
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(page_count(stream)));
    group.bench_function("pages", |bencher| bencher.iter(|| page_count(stream)));
    group.finish();
}

fn page_count(stream: &[u8]) -> u64 {
    let (mut parser, mut at, mut pages) = (Parser::new(), 0, 0);
    while at < stream.len() {
        let element = parser.next(&stream[at..]).unwrap().unwrap();
        pages += u64::from(matches!(element.event, Event::Page { .. }));
        at += element.len;
    }
    pages
}

/// Raw bytes of chunks.
type Chunks = Vec<Vec<u8>>;

/// Chunks of one kind of content each, all of about the usual length.
fn contents(raw: &Image<Vec<u8>>) -> [(&'static str, Chunks); 3] {
    let mut real = Vec::new();
    for entry in raw.chunks().map(Result::unwrap) {
        if entry.raw_len as usize > DEFAULT_CHUNK_LEN {
            let mut chunk = Vec::new();
            raw.read_stored(&entry, &mut chunk).unwrap();
            real.push(chunk);
        }
    }
    real.truncate(32);
    let mut state = 1_u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    let noise = (0..8).map(|_| (0..DEFAULT_CHUNK_LEN / 8).flat_map(|_| noise()).collect());
    let zeros = vec![vec![0; DEFAULT_CHUNK_LEN]; 8];
    [
        ("memory", real),
        ("noise", noise.collect()),
        ("zeros", zeros),
    ]
}

fn byte_count(chunks: &[Vec<u8>]) -> Throughput {
    Throughput::Bytes(chunks.iter().map(|chunk| chunk.len() as u64).sum())
}

/// What a save does for each chunk, and its parts.
fn encode_chunks(criterion: &mut Criterion, raw: &Image<Vec<u8>>) {
    for (content, chunks) in contents(raw) {
        let mut group = criterion.benchmark_group(format!("encode/{content}"));
        group.throughput(byte_count(&chunks));
        group.bench_function("digest one by one", |bencher| {
            bencher.iter(|| {
                for chunk in &chunks {
                    black_box(Digest::of(chunk));
                }
            });
        });
        let pieces: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
        group.bench_function("digest side by side", |bencher| {
            bencher.iter(|| {
                pieces
                    .chunks(4)
                    .for_each(|four| drop(Digest::of_each(four)))
            });
        });
        group.bench_function("crc", |bencher| {
            bencher.iter(|| {
                chunks
                    .iter()
                    .map(|chunk| crc32c(chunk))
                    .fold(0, |a, b| a ^ b)
            });
        });
        for level in [1, DEFAULT_LEVEL, 3] {
            let mut compressor = Compressor::new(level).unwrap();
            let mut frame = Vec::new();
            group.bench_function(format!("compress, level {level}"), |bencher| {
                bencher.iter(|| {
                    for chunk in &chunks {
                        compressor.compress(chunk, &mut frame).unwrap();
                    }
                });
            });
        }
        group.finish();
    }
}

/// What a restore and a verify do, of the whole image by one worker; then decoding alone.
fn decode_chunks(criterion: &mut Criterion, saved: &Saved) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Bytes(saved.stream.len() as u64));
    for (layout, image) in [("raw", &saved.raw), ("zstd", &saved.zstd)] {
        group.bench_function(format!("verify {layout}"), |bencher| {
            bencher.iter(|| pipeline::check(image, 1, &Silent).unwrap());
        });
        group.bench_function(format!("decode {layout}"), |bencher| {
            bencher.iter(|| pipeline::decode(image, 1, &Silent, &mut |_| Ok(())).unwrap());
        });
    }
    let mut decompressor = Decompressor::new().unwrap();
    let (mut stored, mut chunk) = (Vec::new(), Vec::new());
    group.bench_function("decompress alone", |bencher| {
        bencher.iter(|| {
            for entry in saved.zstd.chunks().map(Result::unwrap) {
                saved.zstd.read_stored(&entry, &mut stored).unwrap();
                let raw_len = entry.raw_len as usize;
                decompressor
                    .decompress(&stored, raw_len, &mut chunk)
                    .unwrap();
            }
        });
    });
    group.finish();
}

/// Pages of a guest with 16 GiB.
const PAGES: u64 = 4 << 20;
const PAGES_IN_A_CHUNK: u64 = 64;

/// Page map and chunk table of a large guest; "elements" are pages, or chunks.
fn map_pages(criterion: &mut Criterion) {
    // A live save sends pages again and in no order; here each region of 64 pages comes at another place.
    let regions = PAGES / PAGES_IN_A_CHUNK;
    for (name, stride) in [("in order", 1), ("out of order", 40_503)] {
        let mut group = criterion.benchmark_group(format!("page map/{name}"));
        group
            .throughput(Throughput::Elements(PAGES))
            .sample_size(10);
        let build = || built(|region| region * stride % regions);
        group.bench_function("build", |bencher| {
            bencher.iter(|| {
                let mut builder = build();
                assert!(builder.first_missing().is_none());
                builder.finish()
            });
        });
        let image = Image::open(image_with(&build().finish())).unwrap();
        let map = image.page_map().unwrap().unwrap();
        group.bench_function("open", |bencher| bencher.iter(|| image.page_map().unwrap()));
        group.bench_function("locate every page", |bencher| {
            bencher.iter(|| map.locate_range(0, PageIndex(0), PAGES).count());
        });
        group.throughput(Throughput::Elements(regions));
        group.bench_function("read the chunk table", |bencher| {
            bencher.iter(|| image.chunks().map(Result::unwrap).count());
        });
        group.finish();
    }
}

/// Every third page is zero.
fn built(order: impl Fn(u64) -> u64) -> PageMapBuilder {
    let mut builder = PageMapBuilder::new(&[("pc.ram".to_owned(), PAGES * 4096)]);
    for chunk in 0..PAGES / PAGES_IN_A_CHUNK {
        let first = order(chunk) * PAGES_IN_A_CHUNK;
        let mut body = 8;
        for page in first..first + PAGES_IN_A_CHUNK {
            let is_zero = page % 3 == 0;
            builder.page(0, page, u32::try_from(chunk).unwrap(), body, is_zero);
            body += if is_zero { 9 } else { 4104 };
        }
    }
    builder
}

/// An image with this page map and as many chunks as it names, of one byte each.
fn image_with(page_map: &[u8]) -> Vec<u8> {
    let mut file: Vec<u8> = Vec::new();
    let identity = Identity {
        image_uuid: Uuid::nil(),
        guest_uuid: None,
    };
    let head = Head {
        manifest_json: b"{}",
        xml: "<domain/>",
    };
    let mut image = ImageWriter::begin(&mut file, Layout::Raw, identity, 1 << 20, head).unwrap();
    for _ in 0..PAGES / PAGES_IN_A_CHUNK {
        let chunk = StoredChunk {
            stored: b"Q",
            raw_len: 1,
            stored_crc: crc32c(b"Q"),
            raw_digest: Digest::of(b"Q"),
            kind: ChunkKind::Plain,
        };
        image.append_chunk(&chunk).unwrap();
    }
    let sections = [
        (SectionType::Xml, b"<domain/>".as_slice()),
        (SectionType::Manifest, b"{}"),
        (SectionType::PageMap, page_map),
    ];
    for (section, payload) in sections {
        image.append_section(section, payload).unwrap();
    }
    image.finish().unwrap();
    file
}
