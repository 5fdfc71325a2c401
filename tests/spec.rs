//! The specification and the code say the same: tables, example, schema.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod sample_images;

use std::fmt::Write as _;
use std::ops::Range;

use sample_images::{full_manifest, provisional_manifest, short_manifest, small_image};
use serde_json::Value;
use vmstow::container::layout::{TABLES, chunk_table, footer, head, page_map, section, signature};
use vmstow::container::{Image, Layout, SectionType, layout};
use vmstow::store::remote::{FrameType, MAX_BODY_LEN};

fn spec(name: &str) -> String {
    std::fs::read_to_string(format!("{}/spec/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// A row of a table of fields: its name, if it is not `zero`, and its position.
type Row = (Option<String>, Range<usize>);

/// The tables of fields in the spec, in order; rows whose position is not a number are left out.
fn spec_tables() -> Vec<Vec<Row>> {
    let mut tables: Vec<Vec<Row>> = Vec::new();
    let mut is_inside = false;
    for line in spec("container.md").lines() {
        if line == "| offset | size | name | meaning |" {
            tables.push(Vec::new());
            is_inside = true;
        } else if !line.starts_with('|') {
            is_inside = false;
        } else if is_inside {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let (Ok(offset), Ok(size)) = (cells[1].parse::<usize>(), cells[2].parse::<usize>())
            else {
                continue;
            };
            let name = cells[3]
                .strip_prefix('`')
                .map(|name| name.trim_end_matches('`').to_owned());
            assert!(name.is_some() || cells[3] == "zero", "{line}");
            tables
                .last_mut()
                .unwrap()
                .push((name, offset..offset + size));
        }
    }
    tables
}

#[test]
fn the_code_has_the_fields_of_the_spec_at_their_places() {
    let tables = spec_tables();
    assert_eq!(tables.len(), TABLES.len());
    for (rows, structure) in tables.iter().zip(TABLES) {
        let named = rows
            .iter()
            .filter_map(|(name, position)| Some((name.as_deref()?, position.clone())));
        assert_eq!(
            named.collect::<Vec<_>>(),
            structure.fields.to_vec(),
            "{}",
            structure.name
        );
    }
}

#[test]
fn the_tables_of_the_spec_have_no_holes() {
    for rows in spec_tables() {
        for pair in rows.windows(2) {
            assert_eq!(pair[0].1.end, pair[1].1.start, "{pair:?}");
        }
        assert!([0, 32].contains(&rows[0].1.start));
    }
}

#[test]
fn the_spec_names_the_frames_of_the_code() {
    let text = spec("transfer.md");
    for frame_type in FrameType::ALL {
        let name: String = format!("{frame_type:?}")
            .chars()
            .enumerate()
            .flat_map(|(at, c)| {
                let gap = (at > 0 && c.is_uppercase()).then_some('_');
                gap.into_iter().chain(c.to_uppercase())
            })
            .collect();
        let row = format!("| {} | `{name}` |", frame_type.number());
        assert!(text.contains(&row), "{row}");
    }
    let rows = text.lines().filter(|line| line.contains("` | ")).count();
    assert_eq!(rows, FrameType::ALL.len());
    assert!(text.contains(&MAX_BODY_LEN.to_string().replace("4194304", "4,194,304")));
}

#[test]
fn the_spec_names_the_section_types_of_the_code() {
    let text = spec("container.md");
    for section in SectionType::KNOWN {
        let code = String::from_utf8(section.code().to_vec()).unwrap();
        let row = text
            .lines()
            .find(|line| line.starts_with(&format!("| `{code}` |")))
            .unwrap();
        assert_eq!(row.contains("| yes |"), section.is_critical(), "{row}");
    }
    for layout in Layout::ALL {
        assert!(text.contains(&format!("| `{layout}` | {} |", layout.number())));
    }
}

/// Lines of a hex dump with what the bytes are.
struct Dump<'a> {
    file: &'a [u8],
    text: String,
    at: usize,
}

impl Dump<'_> {
    /// The next `len` bytes, sixteen a line, the first line with `meaning`.
    fn bytes(&mut self, len: usize, meaning: &str) {
        let mut meaning = meaning;
        for line in self.file[self.at..self.at + len].chunks(16) {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            let shown = format!("{:06x}  {:47}  {meaning}", self.at, hex.join(" "));
            writeln!(self.text, "{}", shown.trim_end()).unwrap();
            self.at += line.len();
            meaning = "";
        }
    }

    /// The fields of one structure that begins at `start`, up to `end`.
    fn fields(&mut self, name: &str, start: usize, end: usize) {
        let structure = TABLES
            .iter()
            .find(|structure| structure.name == name)
            .unwrap();
        for (field, position) in structure.fields {
            self.bytes((start + position.start).saturating_sub(self.at), "zero");
            self.bytes(position.len(), field);
        }
        self.bytes((start + end).saturating_sub(self.at), "zero");
    }

    fn section(&mut self, kind: SectionType, len: usize) {
        let start = self.at;
        let code = kind.code();
        writeln!(
            self.text,
            "\n{} section, {len} bytes",
            String::from_utf8_lossy(&code)
        )
        .unwrap();
        self.fields("section", start, section::PAYLOAD_LEN.end);
        let end = start + len - 8;
        match kind {
            SectionType::Head => {
                self.fields("head", start, layout::HEAD_FIXED_LEN);
                let manifest_len = self.u32(start + head::MANIFEST_LEN.start);
                self.bytes(manifest_len, "manifest");
                self.bytes(end - self.at, "XML");
            }
            SectionType::ChunkTable => {
                self.fields("chunk_table", start, chunk_table::ROOT.end);
                self.bytes(32, "digest of table page 0");
                while self.at < end {
                    self.fields("chunk_entry", self.at, layout::CHUNK_ENTRY_LEN);
                }
            }
            SectionType::PageMap => {
                self.fields("page_map", start, page_map::BLOCKS_LEN.end);
                let blocks_len = self.u32(start + page_map::BLOCKS_LEN.start);
                self.bytes(blocks_len, "block list");
                while self.at < end {
                    self.fields("page_run", self.at, layout::PAGE_RUN_LEN);
                }
            }
            SectionType::Signature => {
                self.fields("signature", start, signature::SIGNATURE_LEN.end);
                let statement_len = self.u32(start + signature::STATEMENT_LEN.start);
                self.bytes(statement_len, "statement");
                self.bytes(end - self.at, "signature (here only its first line)");
            }
            SectionType::Directory => {
                self.fields("directory", start, layout::DIRECTORY_FIXED_LEN);
                while self.at < end {
                    self.fields("directory_entry", self.at, layout::DIRECTORY_ENTRY_LEN);
                }
            }
            SectionType::Footer => self.fields("footer", start, end - start),
            _ => self.bytes(end - self.at, "text"),
        }
        assert_eq!(self.at, end);
        self.bytes(4, "TOTAL_LEN");
        self.bytes(4, "CRC");
    }

    fn u32(&self, at: usize) -> usize {
        u32::from_le_bytes(self.file[at..at + 4].try_into().unwrap()) as usize
    }
}

/// The page that shows `small_image`, byte by byte.
fn example() -> String {
    let file = small_image(Layout::Zstd);
    let image = Image::open(file.as_slice()).unwrap();
    let mut dump = Dump {
        file: &file,
        text: String::new(),
        at: 0,
    };
    for entry in image.sections() {
        while (dump.at as u64) < entry.offset.0 {
            let chunk = image
                .chunks()
                .map(Result::unwrap)
                .find(|chunk| chunk.stored_offset.0 == dump.at as u64)
                .unwrap();
            writeln!(dump.text, "\nchunk {}, one zstd frame", chunk.index).unwrap();
            dump.bytes(6, "magic, frame header");
            dump.bytes(3, "block header: raw, last");
            dump.bytes(chunk.raw_len as usize, "the chunk's bytes");
        }
        dump.section(entry.section, usize::try_from(entry.length).unwrap());
    }
    let footer_at = file.len() - layout::FOOTER_LEN;
    dump.section(SectionType::Directory, footer_at - dump.at);
    dump.section(
        SectionType::Footer,
        footer::PREVIOUS_FOOTER_OFFSET.end + 240,
    );
    assert_eq!(dump.at, file.len());
    format!(
        "# An image, byte by byte\n\n\
         Layout `zstd`, two chunks of 16 and 40 bytes, every kind of section; the stream in it is no real one. File offset,\n\
         bytes, and the field's name in [container.md](container.md). Made by `UPDATE_EXAMPLE=1 cargo test --test spec`; the\n\
         same file is `testdata/images/version-1-zstd.stow`.\n\n```text\n{}\n```\n",
        dump.text.trim()
    )
}

#[test]
fn the_example_is_what_the_library_writes() {
    let path = format!("{}/spec/example.md", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_EXAMPLE").is_some() {
        std::fs::write(&path, example()).unwrap();
    }
    assert!(
        spec("example.md") == example(),
        "run UPDATE_EXAMPLE=1 cargo test --test spec and look at the difference"
    );
}

/// Holds `value` against the part of JSON Schema that our schema uses; gives every place where it differs.
fn differences(schema: &Value, value: &Value, root: &Value, place: &str) -> Vec<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let definition = &root["$defs"][name.trim_start_matches("#/$defs/")];
        return differences(definition, value, root, place);
    }
    let mut found = Vec::new();
    let is_right_type = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("boolean") => value.is_boolean(),
        Some(other) => panic!("type {other} is not expected in the schema"),
        None => true,
    };
    if !is_right_type
        || schema
            .get("const")
            .is_some_and(|constant| constant != value)
    {
        found.push(format!("{place}: {value} is not what {schema} asks for"));
    }
    if schema.get("minimum").is_some() && !value.is_u64() {
        found.push(format!("{place}: {value} is negative"));
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        if value.get(name.as_str().unwrap()).is_none() {
            found.push(format!("{place}: {name} is missing"));
        }
    }
    for item in value.as_array().into_iter().flatten() {
        found.extend(differences(
            &schema["items"],
            item,
            root,
            &format!("{place}[]"),
        ));
    }
    for (name, member) in value.as_object().into_iter().flatten() {
        if let Some(schema) = schema["properties"].get(name) {
            found.extend(differences(
                schema,
                member,
                root,
                &format!("{place}.{name}"),
            ));
        }
    }
    found
}

/// Members of the schema's objects that `value` lacks, to see that the schema describes nothing that is never written.
fn unused(schema: &Value, value: &Value, place: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in schema["properties"].as_object().into_iter().flatten() {
        match value.get(name) {
            Some(value) => found.extend(unused(member, value, &format!("{place}.{name}"))),
            None => found.push(format!("{place}.{name}")),
        }
    }
    if let (Some(items), Some(item)) = (schema.get("items"), value.get(0)) {
        found.extend(unused(items, item, &format!("{place}[]")));
    }
    found
}

/// Members of `value` that the schema does not describe, outside of free-form objects.
fn undescribed(schema: &Value, value: &Value, place: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in value
        .as_object()
        .into_iter()
        .flatten()
        .filter(|_| schema.get("properties").is_some())
    {
        match schema["properties"].get(name) {
            Some(schema) => found.extend(undescribed(schema, member, &format!("{place}.{name}"))),
            None => found.push(format!("{place}.{name}")),
        }
    }
    for item in value.as_array().into_iter().flatten() {
        found.extend(undescribed(&schema["items"], item, &format!("{place}[]")));
    }
    found
}

#[test]
fn manifests_are_as_the_schema_says() {
    let schema: Value = serde_json::from_str(&spec("manifest.schema.json")).unwrap();
    for manifest in [full_manifest(), provisional_manifest(), short_manifest()] {
        let value: Value = serde_json::from_slice(&manifest.to_json().unwrap()).unwrap();
        assert_eq!(
            differences(&schema, &value, &schema, "manifest"),
            Vec::<String>::new()
        );
        assert_eq!(
            undescribed(&schema, &value, "manifest"),
            Vec::<String>::new()
        );
    }
    let mut full = full_manifest();
    full.remaps = vec!["disk:disk0=/srv/new.qcow2".into()];
    full.guest.ran_on = true;
    full.guest.has_own_xml = true;
    full.libvirt_cookie = Some("<cookie/>".into());
    full.machine.cpu_features = [("0x7.0.ebx".to_owned(), 0x20)].into();
    let side =
        serde_json::json!([{ "name": "tpm0", "argv": ["swtpm"], "socket": "/s", "state": "/t" }]);
    full.qemu.side_programs = serde_json::from_value(side).unwrap();
    let full = serde_json::to_value(full).unwrap();
    assert_eq!(unused(&schema, &full, "manifest"), Vec::<String>::new());
}

#[test]
fn the_check_against_the_schema_sees_what_is_wrong() {
    let schema: Value = serde_json::from_str(&spec("manifest.schema.json")).unwrap();
    for (pointer, wrong) in [
        ("/schema", 2.into()),
        ("/guest/name", 5.into()),
        ("/ram_blocks/0", "x".into()),
    ] {
        let mut value = serde_json::to_value(full_manifest()).unwrap();
        *value.pointer_mut(pointer).unwrap() = wrong;
        assert!(
            !differences(&schema, &value, &schema, "manifest").is_empty(),
            "{pointer}"
        );
    }
}
