//! Streams that real QEMUs wrote (`testdata/streams/README.md`), parsed whole and cut.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use vmstow::stream::{Event, Parser, StreamError, StreamSummary};

fn stream(name: &str) -> Vec<u8> {
    let path = format!(
        "{}/testdata/streams/{name}.mig.zst",
        env!("CARGO_MANIFEST_DIR")
    );
    zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap()
}

fn parse(bytes: &[u8]) -> Result<StreamSummary, StreamError> {
    let mut parser = Parser::new();
    let mut at = 0;
    while let Some(element) = parser.next(&bytes[at..])? {
        at += element.len;
    }
    parser.finish()
}

fn parsed(name: &str) -> StreamSummary {
    parse(&stream(name)).unwrap_or_else(|error| panic!("{name}: {error} {:?}", error.place()))
}

/// (idstr, instance) as the JSON has them, read by another way than the parser's.
fn described(summary: &StreamSummary) -> Vec<(String, u64)> {
    let json = &summary.vmdescription.as_ref().unwrap().json;
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    let devices = json["devices"].as_array().unwrap().iter();
    let name = |device: &serde_json::Value| device["name"].as_str().unwrap().to_owned();
    devices
        .map(|device| (name(device), device["instance_id"].as_u64().unwrap()))
        .collect()
}

const WITH_DESCRIPTION: [(&str, &str); 9] = [
    ("i440fx-10.0", "pc-i440fx-7.2"),
    ("q35-10.0", "pc-q35-10.0"),
    ("q35-10.0-file", "pc-q35-10.0"),
    ("uuid-10.0", "pc-i440fx-7.2"),
    ("live-10.0", "pc-q35-10.0"),
    ("return-path-10.0", "pc-q35-10.0"),
    ("postcopy-10.0", "pc-q35-10.0"),
    ("i440fx-7.2", "pc-i440fx-7.2"),
    ("q35-7.2", "pc-q35-7.2"),
];

#[test]
fn every_section_of_a_real_stream_is_the_one_that_the_description_names() {
    for (name, machine_type) in WITH_DESCRIPTION {
        let summary = parsed(name);
        assert_eq!(
            summary.machine_type.as_deref(),
            Some(machine_type),
            "{name}"
        );
        let sections = summary.sections.iter();
        let sections: Vec<_> = sections
            .map(|one| (one.idstr.clone(), u64::from(one.instance_id)))
            .collect();
        assert_eq!(sections, described(&summary), "{name}");
        assert!(sections.len() > 20, "{name}: {}", sections.len());
    }
}

#[test]
fn known_facts_of_real_streams_are_found() {
    for (name, _) in WITH_DESCRIPTION {
        let summary = parsed(name);
        let run_state = if name.starts_with("live") {
            "running"
        } else {
            "paused"
        };
        assert_eq!(summary.run_state.as_deref(), Some(run_state), "{name}");
        let ram = summary
            .blocks
            .iter()
            .find(|block| block.idstr == "pc.ram")
            .unwrap();
        assert_eq!(ram.used_length, 2 << 20, "{name}");
        let pages: u64 = summary
            .blocks
            .iter()
            .map(|block| block.used_length / 4096)
            .sum();
        let records = summary.data_pages + summary.zero_pages;
        assert_eq!(records - summary.repeated_pages, pages, "{name}");
        let cpu = summary
            .sections
            .iter()
            .find(|one| one.idstr == "cpu")
            .unwrap();
        assert_eq!(cpu.version_id, 12);
        assert!(cpu.len.unwrap() >= 1817, "{name}");
    }
    let uuid = parsed("uuid-10.0").uuid.unwrap().to_string();
    assert_eq!(uuid, "6b1f0e4a-52d1-4c8f-9f3e-0a1b2c3d4e5f");
    for name in ["q35-10.0", "i440fx-7.2"] {
        assert!(
            parsed(name).sections.iter().any(|one| one.idstr == "slirp"),
            "{name}"
        );
    }
}

#[test]
fn a_description_that_is_taken_away_leaves_the_same_sections() {
    for (name, _) in WITH_DESCRIPTION {
        let bytes = stream(name);
        let expected = parsed(name);
        let end = usize::try_from(expected.vmdescription.as_ref().unwrap().offset.0).unwrap() - 5;
        let found = parse(&bytes[..end]).unwrap();
        assert_eq!(found.sections, expected.sections, "{name}");
        assert_eq!(found.run_state, expected.run_state, "{name}");
    }
}

#[test]
fn a_stream_written_without_a_description_is_read() {
    let summary = parsed("suppress-vmdesc-10.0");
    assert!(summary.vmdescription.is_none());
    assert!(summary.sections.len() > 20);
    assert!(summary.sections.iter().all(|section| section.len.is_some()));
    assert_eq!(summary.run_state.as_deref(), Some("paused"));
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let error = parse(&stream("mapped-ram-10.0")).unwrap_err();
    let StreamError::MappedRam { machine_type, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(machine_type.as_deref(), Some("pc-i440fx-7.2"));
    let error = parse(&stream("virtio-mem-10.0")).unwrap_err();
    let StreamError::EarlySection { idstr, .. } = &error else {
        panic!("{error}");
    };
    assert!(idstr.ends_with("/virtio-mem-device-early"), "{idstr}");
    let error = parse(&stream("ignore-shared-10.0")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the stream was written with capability \"x-ignore-shared\""
    );
}

#[test]
fn commands_of_a_return_path_and_of_postcopy_are_framing() {
    let bytes = stream("postcopy-10.0");
    let advise = b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0";
    let switchover_start = b"\x7e\0\0\0\x01\x08\0\x0b\0\0\x03";
    let holds = |what: &[u8]| bytes.windows(what.len()).any(|found| found == what);
    assert!(holds(advise) && holds(switchover_start));
    assert_eq!(parsed("postcopy-10.0").run_state.as_deref(), Some("paused"));
}

#[test]
fn a_real_stream_cut_anywhere_is_refused() {
    let bytes = stream("q35-7.2");
    let summary = parsed("q35-7.2");
    let whole = usize::try_from(summary.vmdescription.unwrap().offset.0).unwrap() - 5;
    let step = 997;
    for len in (0..bytes.len()).step_by(step).chain(whole - 20..whole + 20) {
        assert_eq!(parse(&bytes[..len]).is_ok(), len == whole, "{len}");
    }
}

#[test]
fn one_byte_at_a_time_gives_the_same_pages() {
    let bytes = stream("i440fx-7.2");
    let pages = |step: usize| {
        let mut parser = Parser::new();
        let mut pages = Vec::new();
        let mut at = 0;
        for end in (step..bytes.len() + step).step_by(step) {
            let end = end.min(bytes.len());
            while let Some(element) = parser.next(&bytes[at..end]).unwrap() {
                if let Event::Page { .. } = element.event {
                    pages.push((at, element));
                }
                at += element.len;
            }
        }
        parser.finish().unwrap();
        pages
    };
    assert_eq!(pages(1), pages(bytes.len()));
    assert_eq!(pages(1 << 15), pages(bytes.len()));
}

/// A cheap generator, so that a failure comes again.
fn random(state: &mut u64) -> usize {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 33).unwrap()
}

#[test]
fn a_real_stream_with_changed_bytes_never_panics() {
    let bytes = stream("i440fx-10.0");
    let device_state = usize::try_from(parsed("i440fx-10.0").sections[0].offset.0).unwrap();
    let mut state = 1;
    let mut refused = 0;
    for round in 0..300 {
        let mut changed = bytes.clone();
        let range = match round % 3 {
            0 => 0..200,
            1 => device_state..device_state + 20_000,
            _ => 0..bytes.len(),
        };
        for _ in 0..=random(&mut state) % 4 {
            let at = range.start + random(&mut state) % range.len();
            changed[at] = random(&mut state).to_le_bytes()[0];
        }
        refused += usize::from(parse(&changed).is_err());
    }
    assert!(refused > 50, "{refused}");
}
