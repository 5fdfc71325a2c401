//! Small images for tests, the same bytes on every machine and with every version of the zstd library.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::Arc;

use serde_json::{Map, json};
use uuid::Uuid;
use vmstow::bytes::ReadAt;
use vmstow::codec::{compress_behind, decompress_behind};
use vmstow::container::manifest::{
    DeviceSection, Fingerprint, Guest, Machine, Manifest, Other, Qemu, RamBlock, Resource,
    StreamSummary, Tool,
};
use vmstow::container::{
    ChunkEntry, ChunkKind, ContainerError, Edit, Finished, Head, Identity, Image, ImageWriter,
    Layout, PageMapBuilder, ParentId, ParentReader, SectionType, Signature, StoredChunk,
    sign_payload,
};
use vmstow::digest::{Digest, crc32c};
use vmstow::units::ChunkIndex;

pub const XML: &str = "<domain type='kvm'><name>web01</name></domain>\n";
pub const IDENTITY: Identity = Identity {
    image_uuid: Uuid::from_bytes([0x11; 16]),
    guest_uuid: Some(Uuid::from_bytes([0x22; 16])),
};

/// A manifest with every member.
pub fn full_manifest() -> Manifest {
    let other = Other::new;
    Manifest {
        schema: 1,
        tool: Tool {
            name: "vmstow".into(),
            version: "0.1.0".into(),
            other: other(),
        },
        saved_at: "2026-11-22T12:00:00Z".into(),
        guest: Guest {
            name: "web01".into(),
            uuid: IDENTITY.guest_uuid,
            run_state: "running".into(),
            was_running: true,
            ran_on: false,
            has_own_xml: false,
            other: other(),
        },
        qemu: Qemu {
            version: "10.0.2".into(),
            package: Some("Debian 1:10.0.2+ds-2".into()),
            binary: "/usr/bin/qemu-system-x86_64".into(),
            binary_sha256: Some("ab".repeat(32)),
            argv: vec!["qemu-system-x86_64".into(), "-nodefaults".into()],
            cwd: "/".into(),
            uid: 64055,
            gid: 64055,
            user: Some("libvirt-qemu".into()),
            side_programs: Vec::new(),
            other: other(),
        },
        machine: Machine {
            machine_type: "pc-q35-10.0".into(),
            accelerator: "kvm".into(),
            cpu_model: Some("host".into()),
            vcpus: 2,
            max_vcpus: Some(4),
            cpu_features: Default::default(),
            memory_bytes: 1 << 30,
            other: other(),
        },
        ram_blocks: vec![RamBlock {
            idstr: "pc.ram".into(),
            used_length: 1 << 30,
            page_size: 4096,
            other: other(),
        }],
        sections: vec![DeviceSection {
            idstr: "timer".into(),
            instance_id: 0,
            version_id: 2,
            len: Some(24),
            other: other(),
        }],
        capabilities: vec!["xbzrle".into()],
        resources: vec![Resource {
            kind: "disk".into(),
            id: "disk0".into(),
            frontend: Some(json!({ "driver": "virtio-blk-pci" })),
            backend: Map::from_iter([("filename".into(), json!("/srv/web01.qcow2"))]),
            read_only: false,
            fingerprint: Some(Fingerprint {
                device: 1,
                inode: 2,
                size: 3,
                mtime_ns: -4,
                ctime_ns: 5,
                sha256: Some("cd".repeat(32)),
            }),
            other: other(),
        }],
        remaps: Vec::new(),
        libvirt_cookie: None,
        labels: [("team".into(), "web".into())].into(),
        stream: Some(StreamSummary {
            len: 56,
            data_pages: 0,
            zero_pages: 3,
            vmdescription: false,
            capture: Some("migration".into()),
            device_state_at: Some(7),
            made_from: Some("cd".repeat(32)),
            other: other(),
        }),
        other: other(),
    }
}

/// What is known before the stream begins.
pub fn provisional_manifest() -> Manifest {
    let mut manifest = full_manifest();
    (manifest.ram_blocks, manifest.sections, manifest.stream) = (vec![], vec![], None);
    manifest
        .resources
        .iter_mut()
        .for_each(|resource| resource.fingerprint = None);
    manifest
}

/// A short one, for images that are damaged bit by bit.
pub fn short_manifest() -> Manifest {
    let mut manifest = provisional_manifest();
    (manifest.capabilities, manifest.resources) = (vec![], vec![]);
    (
        manifest.qemu.package,
        manifest.qemu.binary_sha256,
        manifest.qemu.user,
    ) = (None, None, None);
    manifest
}

/// A zstd frame of at most 255 bytes in one raw block, as any encoder may write it.
fn frame(raw: &[u8]) -> Vec<u8> {
    let len = u8::try_from(raw.len()).unwrap();
    let block = (u32::from(len) << 3 | 1).to_le_bytes();
    [&[0x28, 0xb5, 0x2f, 0xfd, 0x20, len][..], &block[..3], raw].concat()
}

fn frame_of(raw: &[u8]) -> Vec<u8> {
    match raw.len() {
        0..256 => frame(raw),
        _ => zstd::bulk::compress(raw, 3).unwrap(),
    }
}

/// Appends `raw` as the next chunk.
pub fn append(
    writer: &mut ImageWriter<'_>,
    layout: Layout,
    raw: &[u8],
) -> Result<(), ContainerError> {
    let stored = match layout {
        Layout::Zstd => frame_of(raw),
        Layout::Raw | Layout::Mapped => raw.to_vec(),
    };
    let chunk = StoredChunk {
        stored: &stored,
        raw_len: u32::try_from(raw.len()).unwrap(),
        stored_crc: crc32c(&stored),
        raw_digest: Digest::of(raw),
        kind: ChunkKind::of(layout),
    };
    writer.append_chunk(&chunk).map(drop)
}

/// An image of these chunks, with every section there is.
pub fn image_of(layout: Layout, chunks: &[Vec<u8>]) -> (Vec<u8>, Finished) {
    let mut file = Vec::new();
    let head = Head {
        manifest_json: b"{}",
        xml: "<domain/>",
    };
    let mut writer = ImageWriter::begin(&mut file, layout, IDENTITY, 1 << 20, head).unwrap();
    for chunk in chunks {
        append(&mut writer, layout, chunk).unwrap();
        if layout == Layout::Mapped {
            writer.append_zeros(16).unwrap();
        }
    }
    let mut pages = PageMapBuilder::new(&[("pc.ram".to_owned(), 3 * 4096)]);
    (0..3).for_each(|page| pages.page(0, page, 0, 8 + 9 * u32::try_from(page).unwrap(), true));
    let json = serde_json::to_vec(&short_manifest()).unwrap();
    writer
        .append_section(SectionType::Xml, XML.as_bytes())
        .unwrap();
    writer.append_section(SectionType::Manifest, &json).unwrap();
    writer
        .append_section(SectionType::PageMap, &pages.finish())
        .unwrap();
    let statement = writer.statement().unwrap();
    let signature = Signature {
        statement,
        armored: "-----BEGIN SSH SIGNATURE-----\n".into(),
    };
    writer
        .append_section(SectionType::Signature, &sign_payload(&signature).unwrap())
        .unwrap();
    let finished = writer.finish().unwrap();
    (file, finished)
}

/// A delta of `parent` whose chunks are all its own, with `uuid` for each byte of its UUID.
pub fn delta_of(uuid: u8, parent: ParentId, chunks: &[Vec<u8>]) -> Vec<u8> {
    let chunks: Vec<_> = chunks
        .iter()
        .map(|raw| (raw.clone(), ChunkKind::Zstd, frame_of(raw)))
        .collect();
    delta(uuid, parent, &chunks)
}

/// A delta of these chunks: raw bytes, kind, stored bytes.
pub fn delta(uuid: u8, parent: ParentId, chunks: &[(Vec<u8>, ChunkKind, Vec<u8>)]) -> Vec<u8> {
    let mut file = Vec::new();
    let head = Head {
        manifest_json: b"{}",
        xml: "<domain/>",
    };
    let identity = Identity {
        image_uuid: Uuid::from_bytes([uuid; 16]),
        ..IDENTITY
    };
    let name = Some("parent.stow".to_owned());
    let mut writer =
        ImageWriter::begin_delta(&mut file, identity, parent, name, 1 << 20, head).unwrap();
    for (raw, kind, stored) in chunks {
        let chunk = StoredChunk {
            stored,
            raw_len: u32::try_from(raw.len()).unwrap(),
            stored_crc: crc32c(stored),
            raw_digest: Digest::of(raw),
            kind: *kind,
        };
        writer.append_chunk(&chunk).unwrap();
    }
    let json = serde_json::to_vec(&short_manifest()).unwrap();
    writer
        .append_section(SectionType::Xml, XML.as_bytes())
        .unwrap();
    writer.append_section(SectionType::Manifest, &json).unwrap();
    writer.finish().unwrap();
    file
}

/// A parent, and a delta that has a chunk of each kind: the parent's, one that follows the parent's, one of its own.
pub fn parent_and_delta() -> (Vec<u8>, Vec<u8>) {
    let first = b"QEVM first chunk".to_vec();
    let second: Vec<u8> = (0..200).collect();
    let parent = image_of(Layout::Zstd, &[first.clone(), second.clone()]).0;
    let id = Image::open(parent.as_slice()).unwrap().as_parent();
    let mut changed = second.clone();
    changed[100] = 0;
    let patch = compress_behind(&second, &changed, 3).unwrap();
    let own = b"and one of its own".to_vec();
    let chunks = [
        (first, ChunkKind::Same(ChunkIndex(0)), Vec::new()),
        (changed, ChunkKind::Patched(ChunkIndex(1)), patch),
        (own.clone(), ChunkKind::Zstd, frame(&own)),
    ];
    (parent, delta(0x33, id, &chunks))
}

/// Opens the delta with its parent.
pub fn open_delta<'a>(parent: &[u8], file: &'a [u8]) -> Result<Image<&'a [u8]>, ContainerError> {
    let mut image = Image::open(file)?;
    let parent = Image::open(ParentReader::new(parent.to_vec()))?;
    image.set_parent(Arc::new(parent))?;
    Ok(image)
}

/// Two chunks, about two kilobytes in all.
pub fn small_image(layout: Layout) -> Vec<u8> {
    image_of(layout, &[b"QEVM first chunk".to_vec(), vec![7; 40]]).0
}

/// Appends a generation with other XML.
pub fn edit(file: &mut Vec<u8>, xml: &str) -> Finished {
    let before = file.clone();
    let image = Image::open(before.as_slice()).unwrap();
    let mut edit = Edit::begin(&image, file).unwrap();
    edit.replace(SectionType::Xml, xml.as_bytes()).unwrap();
    edit.finish().unwrap()
}

/// The chunk's raw bytes, or why they are not to be trusted.
pub fn decode<R: ReadAt>(image: &Image<R>, entry: &ChunkEntry) -> Result<Vec<u8>, ContainerError> {
    let mut stored = Vec::new();
    image.read_stored(entry, &mut stored)?;
    let raw = match entry.kind {
        ChunkKind::Plain => stored,
        ChunkKind::Zstd => {
            zstd::bulk::decompress(&stored, entry.raw_len as usize).unwrap_or_default()
        }
        ChunkKind::Patched(_) | ChunkKind::Same(_) => {
            let (parent, twin) = image.twin(entry)?.unwrap();
            let twin = decode(parent.as_ref(), &twin)?;
            match entry.kind {
                ChunkKind::Same(_) => twin,
                _ => {
                    let mut raw = vec![0; entry.raw_len as usize];
                    let made = decompress_behind(&twin, &stored, &mut raw);
                    made.map(|()| raw).unwrap_or_default()
                }
            }
        }
    };
    entry.check_raw(&raw)?;
    Ok(raw)
}

/// All a careful reader does: open, sections, every chunk. Gives the stream.
pub fn read_all(file: &[u8]) -> Result<Vec<u8>, ContainerError> {
    let image = Image::open(file)?;
    read_image(&image)
}

/// As [`read_all`], of an open image.
pub fn read_image<R: ReadAt>(image: &Image<R>) -> Result<Vec<u8>, ContainerError> {
    image.verify_sections()?;
    let mut stream = Vec::new();
    for entry in image.chunks() {
        stream.extend(decode(image, &entry?)?);
    }
    Ok(stream)
}
