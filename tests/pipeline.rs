//! Streams → images → streams, on what real QEMUs wrote: the bytes come back, the page map tells the truth, and neither
//! the number of threads nor the size of reads shows in the image.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use uuid::Uuid;
use vmstow::bytes::{PublishError, Sink};
use vmstow::container::{
    ContainerError, Head, Identity, Image, ImageWriter, Layout, PageLocation, SectionType,
};
use vmstow::pipeline::{self, Encoding, PipedImage, PipelineError, begins_with_head};
use vmstow::progress::Silent;
use vmstow::stream::{Event, Parser};
use vmstow::units::PageIndex;

/// As short as a manifest can be.
const MANIFEST: &[u8] =
    br#"{"schema":1,"tool":{"name":"test","version":"1"},"saved_at":"2026-01-01T00:00:00Z",
    "guest":{"name":"g","run_state":"running","was_running":true},
    "qemu":{"version":"10.0.2","binary":"/qemu","argv":["qemu"],"cwd":"/","uid":0,"gid":0},
    "machine":{"type":"pc-q35-10.0","accelerator":"tcg","vcpus":1,"memory_bytes":1048576}}"#;

/// Gives at most `max` bytes a read, as a pipe might.
struct Dribble<'a> {
    bytes: &'a [u8],
    max: usize,
}

impl Read for Dribble<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(self.max).min(self.bytes.len());
        buf[..len].copy_from_slice(&self.bytes[..len]);
        self.bytes = &self.bytes[len..];
        Ok(len)
    }
}

fn streams() -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/streams");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "zst") {
            let stream = zstd::decode_all(std::fs::File::open(&path).unwrap()).unwrap();
            if parses(&stream) {
                found.push((
                    path.file_name().unwrap().to_string_lossy().into_owned(),
                    stream,
                ));
            }
        }
    }
    assert!(found.len() >= 6, "only {} streams found", found.len());
    found
}

fn parses(stream: &[u8]) -> bool {
    let mut parser = Parser::new();
    let mut at = 0;
    while at < stream.len() {
        match parser.next(&stream[at..]) {
            Ok(Some(element)) => at += element.len,
            _ => return false,
        }
    }
    parser.finish().is_ok()
}

fn image_of(stream: &[u8], encoding: &Encoding, max_read: usize) -> Vec<u8> {
    let mut file: Vec<u8> = Vec::new();
    let identity = Identity {
        image_uuid: Uuid::nil(),
        guest_uuid: None,
    };
    let head = Head {
        manifest_json: b"{}",
        xml: "<domain/>",
    };
    let layout = encoding.layout;
    let mut image =
        ImageWriter::begin(&mut file, layout, identity, encoding.max_chunk_len(), head).unwrap();
    let mut source = Dribble {
        bytes: stream,
        max: max_read,
    };
    let encoded = pipeline::encode(&mut source, &mut image, encoding, &Silent).unwrap();
    image
        .append_section(SectionType::Xml, b"<domain/>")
        .unwrap();
    image
        .append_section(SectionType::Manifest, MANIFEST)
        .unwrap();
    if let Some(page_map) = encoded.page_map {
        image
            .append_section(SectionType::PageMap, &page_map.finish())
            .unwrap();
    }
    image.finish().unwrap();
    file
}

/// What a parser of its own finds: the last bytes of every page, `None` for zero.
fn pages(stream: &[u8]) -> HashMap<(usize, u64), Option<Vec<u8>>> {
    let mut parser = Parser::new();
    let mut found = HashMap::new();
    let mut at = 0;
    while let Some(element) = parser.next(&stream[at..]).unwrap() {
        if let Event::Page {
            block,
            page,
            is_zero,
            body,
        } = element.event
        {
            let data = &stream[at + body..][..if is_zero { 0 } else { 4096 }];
            found.insert((block, page.0), (!is_zero).then(|| data.to_vec()));
        }
        at += element.len;
        if at == stream.len() {
            break;
        }
    }
    found
}

fn encodings() -> Vec<Encoding> {
    let mut all = Vec::new();
    for layout in [Layout::Zstd, Layout::Raw] {
        for chunk_len in [4096, 64 << 10, 256 << 10, 1 << 20] {
            all.push(Encoding {
                layout,
                level: 1,
                chunk_len,
                threads: 2,
                twins: None,
            });
        }
    }
    all
}

#[test]
fn a_stream_comes_back_byte_for_byte_and_the_page_map_finds_every_page() {
    for (name, stream) in streams() {
        let expected = pages(&stream);
        for encoding in encodings() {
            let file = image_of(&stream, &encoding, usize::MAX);
            let image = Image::open(file).unwrap();
            image.verify_sections().unwrap();
            let mut back = Vec::new();
            pipeline::decode(&image, 2, &Silent, &mut |raw| {
                back.extend_from_slice(raw);
                Ok(())
            })
            .unwrap();
            assert!(back == stream, "{name} {encoding:?}");
            let page_map = image.page_map().unwrap().unwrap();
            for ((block, page), data) in &expected {
                let found = match page_map.locate(*block, PageIndex(*page)).unwrap() {
                    PageLocation::Zero => None,
                    PageLocation::Data { chunk, body } => {
                        let chunk = image.chunk(chunk).unwrap();
                        let start = usize::try_from(chunk.stream_offset.0).unwrap();
                        let at = start + body as usize;
                        Some(&stream[at..at + 4096])
                    }
                };
                assert!(
                    found == data.as_deref(),
                    "{name} {encoding:?} block {block} page {page}"
                );
            }
        }
    }
}

#[test]
fn chunks_grow_with_huge_guests_only() {
    let encoding = Encoding {
        layout: Layout::Zstd,
        level: 1,
        chunk_len: 256 << 10,
        threads: 2,
        twins: None,
    };
    let chunk_len = |gib: u64| encoding.fitting(gib << 30).chunk_len;
    assert_eq!([1, 64, 128].map(chunk_len), [256 << 10; 3]);
    assert_eq!(
        [256, 1024, 1 << 20].map(chunk_len),
        [512 << 10, 2 << 20, 8 << 20]
    );
}

#[test]
fn neither_threads_nor_the_size_of_reads_change_a_byte_of_the_image() {
    for (name, stream) in streams().into_iter().take(4) {
        for layout in [Layout::Zstd, Layout::Raw] {
            let encoding = |threads| Encoding {
                layout,
                level: 3,
                chunk_len: 64 << 10,
                threads,
                twins: None,
            };
            let one = image_of(&stream, &encoding(1), usize::MAX);
            for (threads, max_read) in [(1, 1009), (2, 65536), (7, 4097)] {
                let other = image_of(&stream, &encoding(threads), max_read);
                assert!(
                    one == other,
                    "{name} {threads} threads, reads of {max_read}"
                );
            }
        }
    }
}

#[test]
fn chunks_follow_regions_so_that_a_changed_page_changes_one_chunk() {
    let (_, stream) = streams()
        .into_iter()
        .find(|(name, _)| name.contains("i440fx"))
        .unwrap();
    let encoding = Encoding {
        layout: Layout::Zstd,
        level: 1,
        chunk_len: 64 << 10,
        threads: 2,
        twins: None,
    };
    let data_page = {
        let mut parser = Parser::new();
        let mut at = 0;
        loop {
            let element = parser.next(&stream[at..]).unwrap().unwrap();
            if let Event::Page {
                is_zero: false,
                body,
                ..
            } = element.event
            {
                break at + body;
            }
            at += element.len;
        }
    };
    let mut changed = stream.clone();
    changed[data_page + 100] ^= 1;
    let digests = |stream: &[u8]| -> Vec<_> {
        let image = Image::open(image_of(stream, &encoding, usize::MAX)).unwrap();
        image
            .chunks()
            .map(|chunk| chunk.unwrap().raw_digest)
            .collect()
    };
    let (before, after) = (digests(&stream), digests(&changed));
    assert_eq!(before.len(), after.len());
    let different = before
        .iter()
        .zip(&after)
        .filter(|(one, other)| one != other)
        .count();
    assert_eq!(different, 1);
}

/// What is wrong with each chunk, as text, and how many are right.
fn damage_seen(image: &Image<Vec<u8>>, threads: usize) -> (Vec<String>, u64) {
    let checked = pipeline::check(image, threads, &Silent).unwrap();
    assert!(checked.ended_by.is_none());
    let damaged = checked.damaged.iter().map(|error| format!("{error:?}"));
    (damaged.collect(), checked.good_bytes)
}

#[test]
fn damage_is_found_chunk_by_chunk_whether_or_not_the_bytes_are_wanted_and_by_any_number_of_threads()
{
    let (_, stream) = streams().remove(0);
    for layout in [Layout::Zstd, Layout::Raw] {
        let encoding = Encoding {
            layout,
            level: 1,
            chunk_len: 16 << 10,
            threads: 2,
            twins: None,
        };
        let mut file = image_of(&stream, &encoding, usize::MAX);
        let image = Image::open(file.clone()).unwrap();
        let chunks: Vec<_> = image.chunks().map(Result::unwrap).collect();
        assert_eq!(damage_seen(&image, 2), (Vec::new(), stream.len() as u64));
        for (number, entry) in chunks.iter().enumerate().step_by(3) {
            let at = entry.stored_offset.0 + number as u64 * 7 % u64::from(entry.stored_len);
            file[usize::try_from(at).unwrap()] ^= 1 << (number % 8);
        }
        let image = Image::open(file).unwrap();
        let (mut expected, mut good_bytes) = (Vec::new(), 0);
        pipeline::examine(&image, 1, &Silent, &mut |_, raw| {
            match raw {
                Ok(raw) => good_bytes += raw.len() as u64,
                Err(error) => expected.push(format!("{error:?}")),
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(expected.len(), chunks.len().div_ceil(3));
        for threads in [1, 2, 7] {
            assert_eq!(
                damage_seen(&image, threads),
                (expected.clone(), good_bytes),
                "{layout:?} {threads}"
            );
        }
    }
}

/// What comes out of a pipe, if the whole image was found right.
fn through_a_pipe(file: &[u8], max_read: usize) -> Option<Vec<u8>> {
    let piped = PipedImage::begin(Dribble {
        bytes: file,
        max: max_read,
    })
    .ok()?;
    let mut stream = Vec::new();
    let image = piped.decode(&Silent, &mut |raw| {
        stream.extend_from_slice(raw);
        Ok(())
    });
    image.ok().map(|_| stream)
}

#[test]
fn an_image_from_a_pipe_gives_its_stream_however_it_arrives() {
    for (name, stream) in streams() {
        let encoding = Encoding {
            layout: Layout::Zstd,
            level: 1,
            chunk_len: 64 << 10,
            threads: 2,
            twins: None,
        };
        let file = image_of(&stream, &encoding, usize::MAX);
        assert!(begins_with_head(&file));
        for max_read in [usize::MAX, 1000, 13] {
            assert!(
                through_a_pipe(&file, max_read).as_ref() == Some(&stream),
                "{name} {max_read}"
            );
        }
    }
}

#[test]
fn an_image_from_a_pipe_that_is_cut_or_changed_is_refused() {
    let (_, stream) = streams()
        .into_iter()
        .min_by_key(|(_, stream)| stream.len())
        .unwrap();
    let encoding = Encoding {
        layout: Layout::Zstd,
        level: 1,
        chunk_len: 256 << 10,
        threads: 2,
        twins: None,
    };
    let file = image_of(&stream, &encoding, usize::MAX);
    for len in (0..file.len()).step_by(61) {
        assert!(
            through_a_pipe(&file[..len], usize::MAX).is_none(),
            "cut at {len}"
        );
    }
    for bit in (0..file.len() * 8).step_by(331) {
        let mut changed = file.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(through_a_pipe(&changed, usize::MAX).is_none(), "bit {bit}");
    }
    let mut longer = file.clone();
    longer.push(0);
    assert!(through_a_pipe(&longer, usize::MAX).is_none());
}

/// A disk that is full after so many bytes.
struct FullDisk {
    left: usize,
}

impl Sink for FullDisk {
    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self.left.checked_sub(bytes.len()) {
            Some(left) => self.left = left,
            None => return Err(std::io::ErrorKind::StorageFull.into()),
        }
        Ok(())
    }

    fn sync(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        Ok(())
    }
}

#[test]
fn a_full_disk_ends_the_encoding_however_much_of_the_stream_is_still_to_come() {
    let (_, stream) = streams().remove(0);
    for threads in [1, 2, 7] {
        let encoding = Encoding {
            layout: Layout::Raw,
            level: 1,
            chunk_len: 4096,
            threads,
            twins: None,
        };
        for left in [0, 5000, stream.len() / 2, stream.len() - 1] {
            let mut disk = FullDisk { left };
            let identity = Identity {
                image_uuid: Uuid::nil(),
                guest_uuid: None,
            };
            let head = Head {
                manifest_json: b"{}",
                xml: "<domain/>",
            };
            let max = encoding.max_chunk_len();
            let mut image =
                ImageWriter::begin(&mut disk, Layout::Raw, identity, max, head).unwrap();
            let outcome = pipeline::encode(&mut stream.as_slice(), &mut image, &encoding, &Silent);
            assert!(
                matches!(
                    outcome,
                    Err(PipelineError::Container(ContainerError::Write { .. }))
                ),
                "{threads} threads, {left} bytes"
            );
        }
    }
}
