//! Every parser on changed test data: whatever comes, it answers with a value or an error, and does not panic.
//!
//! Two seconds a parser; `VMSTOW_FUZZ_SECONDS=3600` makes them hours. A find prints its seed: it becomes a unit test.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod sample_images;

use std::path::Path;
use std::time::{Duration, Instant};

use sample_images::{open_delta, parent_and_delta};
use vmstow::config::domain_xml::read_identity;
use vmstow::config::{Arguments, Remap, ResourceTable, RestoreContext, restore_arguments};
use vmstow::container::Image;
use vmstow::image::foreign::compression::Encoder;
use vmstow::image::foreign::libvirt::{SaveFormat, SaveHeader, SaveMetadata};
use vmstow::image::open_any;
use vmstow::pipeline::{self, PipedImage};
use vmstow::progress::Silent;
use vmstow::store::Location;
use vmstow::stream::Parser;

/// A small generator whose every value follows from its seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let value = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(value).unwrap() % limit.max(1)
    }
}

/// Some bytes changed, a piece cut out, repeated or put elsewhere.
fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    for _ in 0..=random.below(4) {
        if changed.is_empty() {
            break;
        }
        let at = random.below(changed.len());
        let end = at + random.below((changed.len() - at).min(64) + 1);
        match random.below(6) {
            0 => changed[at] ^= 1 << random.below(8),
            1 => changed[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => drop(changed.drain(at..end)),
            3 => {
                let piece = changed[at..end].to_vec();
                let to = random.below(changed.len());
                changed.splice(to..to, piece);
            }
            4 => changed.truncate(at),
            _ => changed[at..end].fill(0xff),
        }
    }
    changed
}

fn fuzz(samples: &[Vec<u8>], mut parse: impl FnMut(&[u8])) {
    let seconds = std::env::var("VMSTOW_FUZZ_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let first = if seconds == 2 {
        1
    } else {
        u64::from(std::process::id()) << 32
    };
    for seed in first.. {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let sample = &samples[random.below(samples.len())];
        let input = mutate(sample, &mut random);
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| parse(&input)));
        assert!(told.is_ok(), "seed {seed}");
        if Instant::now() > end {
            break;
        }
    }
}

fn files(directory: &str, ending: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let entries = std::fs::read_dir(root.join(directory)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let found: Vec<_> = paths
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    assert!(!found.is_empty(), "no {ending} in {directory}");
    found
}

#[test]
fn the_stream_parser_survives_anything() {
    let streams: Vec<_> = files("streams", ".zst")
        .iter()
        .map(|packed| zstd::decode_all(packed.as_slice()).unwrap())
        .collect();
    fuzz(&streams, |bytes| {
        let mut parser = Parser::new();
        let mut at = 0;
        while at < bytes.len() {
            match parser.next(&bytes[at..]) {
                Ok(Some(element)) => at += element.len,
                Ok(None) => break,
                Err(_) => return,
            }
        }
        let _ = parser.finish();
    });
}

#[test]
fn the_image_reader_survives_anything() {
    fuzz(&files("images", ".stow"), |bytes| {
        if let Ok(image) = Image::open(bytes.to_vec()) {
            let _ = image.problems();
            let _ = image.page_map();
            let _ = pipeline::decode(&image, 1, &Silent, &mut |_| Ok(()));
        }
        let _ = Image::open_torn(bytes.to_vec(), None);
        if let Ok(piped) = PipedImage::begin(bytes) {
            let _ = piped.decode(&Silent, &mut |_| Ok(()));
        }
    });
}

#[test]
fn the_reader_of_deltas_survives_anything() {
    let (parent, delta) = parent_and_delta();
    let both = |bytes: &[u8], parent: &[u8]| {
        let Ok(image) = open_delta(parent, bytes) else {
            return;
        };
        let _ = image.problems();
        let _ = pipeline::decode(&image, 1, &Silent, &mut |_| Ok(()));
    };
    fuzz(&[delta.clone(), parent.clone()], |bytes| {
        both(bytes, &parent);
        both(&delta, bytes);
        if let Ok(image) = Image::open(bytes.to_vec()) {
            let _ = pipeline::check(&image, 1, &Silent);
        }
        let _ = Image::open_torn(bytes.to_vec(), None);
    });
}

#[test]
fn the_readers_of_what_others_write_survive_anything() {
    let metadata = SaveMetadata {
        xml: "<domain type='qemu'><name>web01</name></domain>".to_owned(),
        cookie: Some("<cookie/>".to_owned()),
    };
    let stream = |name: &str| {
        let packed = files("streams", name).remove(0);
        zstd::decode_all(packed.as_slice()).unwrap()
    };
    let mapped = stream("mapped-ram-10.0.mig.zst");
    let stream = stream("i440fx-10.0.mig.zst");
    let mut samples = Vec::new();
    for format in [
        SaveFormat::Raw,
        SaveFormat::Zstd,
        SaveFormat::Gzip,
        SaveFormat::Xz,
    ] {
        // With little padding changes hit what counts.
        let mut image = metadata.write(true, format, 1).unwrap();
        let keep = 92 + metadata.xml.len() + 20;
        image.truncate(keep);
        image[20..24].copy_from_slice(&u32::try_from(keep - 92).unwrap().to_le_bytes());
        let mut encoder = Encoder::new(format, Vec::new()).unwrap();
        std::io::Write::write_all(&mut encoder, &stream[..stream.len().min(1 << 16)]).unwrap();
        image.extend(encoder.finish().unwrap());
        samples.push(image);
    }
    // The pages of this one lie further back than changes reach.
    samples.push(mapped);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fuzz(&samples, |bytes| {
        if let Ok(header) = SaveHeader::parse(bytes) {
            let end = usize::try_from(header.stream_at()).unwrap();
            if let Some(data) = bytes.get(92..end) {
                let _ = SaveMetadata::parse(&header, data);
            }
        }
        std::fs::write(&path, bytes).unwrap();
        let location = Location::Path(path.clone());
        if let Ok(opened) = open_any(&location, &Silent) {
            let _ = opened.image().problems();
            let _ = pipeline::decode(opened.image(), 1, &Silent, &mut |_| Ok(()));
        }
    });
}

#[test]
fn the_readers_of_text_survive_anything() {
    let samples: Vec<Vec<u8>> = [
        "qemu\0-M\0q35,accel=kvm\0-device\0{\"driver\":\"virtio-net-pci\",\"netdev\":\"n\"}\0-netdev\0user,id=n,hostfwd=tcp::22-:22\0",
        "qemu\0-drive\0file=a,,b.qcow2,if=virtio\0-serial\0file:x\0-nographic\0-chardev\0socket,id=c,path=/x,server=on\0disk.img\0",
        "<domain type='kvm'><name>a &amp; b</name><uuid>5f0c8a2e-0000-4000-8000-000000000000</uuid></domain>",
        "disk:/old/prefix/=/new/",
        "net:net0=tap=tap3",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    let context = RestoreContext {
        machine_type: "pc-q35-10.0".into(),
        qmp_socket: "/run/qmp.sock".into(),
        log_dir: "/run".into(),
        name: "g".into(),
    };
    fuzz(&samples, |bytes| {
        let _ = read_identity(bytes);
        let text = String::from_utf8_lossy(bytes);
        let _ = text.parse::<Remap>();
        let words: Vec<&str> = text.split('\0').collect();
        if let Ok(arguments) = Arguments::parse(&words) {
            let _ = ResourceTable::from_arguments(&arguments, None);
            let _ = restore_arguments(&arguments, &context, &[]);
        }
    });
}
