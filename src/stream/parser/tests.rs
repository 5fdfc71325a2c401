//! What the parser takes, refuses and gives, on streams made by hand.

use proptest::prelude::*;

use super::*;
use crate::stream::sample::{Sample, page_bytes};

/// Feeds all of `bytes` in pieces that end at `cuts`; the elements, device state joined to one.
fn feed(bytes: &[u8], cuts: &[usize]) -> Result<(Vec<Element>, StreamSummary), StreamError> {
    let mut parser = Parser::new();
    let mut elements: Vec<Element> = Vec::new();
    let mut ends = cuts.to_vec();
    ends.push(bytes.len());
    ends.sort_unstable();
    for end in ends {
        let mut at = usize::try_from(parser.position().0).unwrap();
        while let Some(element) = parser.next(&bytes[at..end.max(at)])? {
            assert!(element.len > 0 && element.len <= end - at);
            at += element.len;
            match elements.last_mut() {
                Some(last) if last.event == Event::DeviceState => last.len += element.len,
                _ => elements.push(element),
            }
        }
        let waits_in_vain = end - at >= MAX_ELEMENT_LEN;
        assert!(!waits_in_vain, "more is wanted at {at} of {end}");
    }
    Ok((elements, parser.finish()?))
}

fn whole(bytes: &[u8]) -> Result<StreamSummary, StreamError> {
    feed(bytes, &[]).map(|(_, summary)| summary)
}

fn message(bytes: &[u8]) -> String {
    let error = whole(bytes).unwrap_err();
    match crate::error::Blame::at(&error) {
        Some(at) => format!("{error} @ {at}"),
        None => error.to_string(),
    }
}

#[test]
fn a_small_stream_gives_its_pages_and_its_sections() {
    let sample = Sample::new();
    let (elements, summary) = feed(&sample.bytes(), &[]).unwrap();
    let pages = elements.iter().filter_map(|element| match element.event {
        Event::Page {
            block,
            page,
            is_zero,
            body,
        } => Some((block, page.0, is_zero, body)),
        _ => None,
    });
    let expected = [
        (0, 0, false, 15),
        (0, 1, true, 8),
        (0, 2, false, 8),
        (1, 0, false, 16),
    ];
    assert_eq!(pages.collect::<Vec<_>>(), expected);
    let total: usize = elements.iter().map(|element| element.len).sum();
    assert_eq!(total as u64, summary.len);
    assert_eq!(summary.machine_type.as_deref(), Some("pc-x"));
    assert_eq!(summary.run_state.as_deref(), Some("paused"));
    assert_eq!((summary.data_pages, summary.zero_pages), (3, 1));
    assert_eq!((summary.repeated_pages, summary.missing_pages), (0, 0));
    let names: Vec<_> = summary
        .sections
        .iter()
        .map(|one| (one.idstr.as_str(), one.len))
        .collect();
    assert_eq!(names, [("timer", Some(24)), ("globalstate", Some(104))]);
    assert!(summary.vmdescription.unwrap().json.starts_with('{'));
}

#[test]
fn every_command_that_a_file_may_hold_is_framing() {
    let mut sample = Sample::new();
    sample.before_ram = [
        &b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01"[..],
        b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0",
    ]
    .concat();
    sample.before_end = b"\x08\0\x0b\0\0".to_vec();
    assert!(whole(&sample.bytes()).is_ok());
    for (command, expected) in [
        (
            &b"\x08\0\x04\0\0"[..],
            "command POSTCOPY_LISTEN does not belong",
        ),
        (
            b"\x08\0\x63\0\0",
            "unknown command 0x63 @ stream offset 0x11",
        ),
        (b"\x08\0\x02\0\x05", "command PING has 5 bytes"),
        (
            b"\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0",
            "huge pages",
        ),
    ] {
        sample.before_ram = command.to_vec();
        let found = message(&sample.bytes());
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn all_pages_may_come_in_the_start_section() {
    let mut sample = Sample::new();
    sample.start_records = std::mem::take(&mut sample.part_records);
    sample.has_part = false;
    assert!(whole(&sample.bytes()).is_ok());
    sample.has_end = false;
    assert!(whole(&sample.bytes()).is_ok());
    let last = page_bytes(0, Some("pc.bios"), Some(0x44)).len();
    sample
        .start_records
        .truncate(sample.start_records.len() - last);
    let found = message(&sample.bytes());
    assert!(
        found.starts_with("section \"timer\" comes before the end of the RAM"),
        "{found}"
    );
}

#[test]
fn the_current_block_lives_on_across_sections() {
    let mut sample = Sample::new();
    sample.end_records = page_bytes(0, None, None);
    assert_eq!(whole(&sample.bytes()).unwrap().repeated_pages, 1);
    sample.part_records = page_bytes(0, None, None);
    let found = message(&sample.bytes());
    assert!(found.starts_with("a page names no RAMBlock"), "{found}");
}

#[test]
fn a_page_that_never_comes_is_missed_by_name() {
    let mut sample = Sample::new();
    sample.part_records = page_bytes(0, Some("pc.ram"), Some(7));
    let found = message(&sample.bytes());
    assert_eq!(
        found,
        "2 pages of RAMBlock \"pc.ram\" are missing, the first is 0x1"
    );
}

#[test]
fn records_that_cannot_be_are_refused() {
    let record = |word: u64, rest: &[u8]| [&word.to_be_bytes()[..], rest].concat();
    for (records, expected) in [
        (
            record(0x48, b"\x06pc.ram"),
            "unknown combination of RAM flags 0x48 @ stream offset",
        ),
        (
            record(0x40, b""),
            "RAM record of kind XBZRLE cannot be read",
        ),
        (
            record(0x220, b""),
            "RAM record of kind MULTIFD_FLUSH cannot be read",
        ),
        (
            record(0x100, b""),
            "RAM record of kind COMPRESS_PAGE cannot be read",
        ),
        (
            record(0x1004, b""),
            "the list of RAMBlocks comes a second time",
        ),
        (
            record(0x3008, b"\x06pc.ram"),
            "a page at 0x3000 lies outside of RAMBlock \"pc.ram\" of 0x3000 bytes",
        ),
        (record(0x08, b"\x03foo"), "unknown RAMBlock \"foo\""),
        (
            record(0x1002, b"\x06pc.ram\xff"),
            "zero page 0x1 of RAMBlock \"pc.ram\" is filled with 0xff",
        ),
    ] {
        let mut sample = Sample::new();
        sample.part_records = records;
        let found = message(&sample.bytes());
        assert!(found.starts_with(expected), "{found}");
        assert!(found.ends_with("in section 1 \"ram\""), "{found}");
    }
}

#[test]
fn a_block_list_that_cannot_be_is_refused() {
    for (total, blocks, expected) in [
        (
            Some(u64::MAX - 0xfff),
            vec![],
            "RAM of 0xfffffffffffff000 bytes is more",
        ),
        (
            Some(0x2000),
            vec![("a", 0x3000)],
            "RAMBlock \"a\" has 0x3000 bytes where the list has 0x2000 left",
        ),
        (
            None,
            vec![("a", 0x1000), ("a", 0x1000)],
            "RAMBlock \"a\" is listed twice",
        ),
        (
            Some(0x1000),
            vec![("a", 0x10)],
            "the length of RAMBlock \"a\", 0x10 bytes",
        ),
        (Some(0), vec![], "there is no list of RAMBlocks"),
    ] {
        let mut sample = Sample::new();
        sample.blocks = blocks
            .into_iter()
            .map(|(name, len)| (name.to_owned(), len))
            .collect();
        sample.total = total;
        let found = message(&sample.bytes());
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn sections_that_cannot_be_read_are_refused_by_name() {
    let live = b"\x01\0\0\0\x09\x05block\0\0\0\0\0\0\0\x01";
    let early = b"\x04\0\0\0\x09\x05early\0\0\0\0\0\0\0\x01";
    for (bytes, expected) in [
        (&live[..], "live section \"block\" cannot be read"),
        (
            &early[..],
            "section \"early\" comes before the end of the RAM",
        ),
        (b"\x02\0\0\0\x05", "no section with number 5 has begun"),
        (b"\x42", "unknown section type 0x42 @ stream offset 0x11"),
        (b"\x07", "section type CONFIGURATION does not belong here"),
    ] {
        let mut sample = Sample::new();
        sample.before_ram = bytes.to_vec();
        let found = message(&sample.bytes());
        assert!(found.starts_with(expected), "{found}");
        sample.before_end = std::mem::take(&mut sample.before_ram);
        let found = message(&sample.bytes());
        assert!(found.contains("after section 1 \"ram\""), "{found}");
    }
}

#[test]
fn what_is_no_stream_is_told_at_once() {
    assert_eq!(
        message(b""),
        "not a migration stream: it does not begin with \"QEVM\""
    );
    assert!(Parser::new().next(b"X").is_err());
    assert!(message(b"QEVM\0\0\0\x02").starts_with("unsupported migration stream version 2"));
    assert!(is_stream_start(&Sample::new().bytes()));
    assert!(!is_stream_start(b"QEVM\0\0\0") && !is_stream_start(b"QEVM\0\0\0\x02"));
}

#[test]
fn a_forged_vmdescription_in_device_state_changes_nothing() {
    let mut sample = Sample::new();
    let forged = br#"{"devices":[{"name":"timer","instance_id":0,"fields":[]}]}"#;
    let len = u32::try_from(forged.len()).unwrap().to_be_bytes();
    let footer = b"\x7e\0\0\0\0";
    sample.timer = [&footer[..], b"\0\x06", &len, forged].concat();
    let summary = whole(&sample.bytes()).unwrap();
    assert_eq!(summary.sections[0].len, Some(sample.timer.len() as u64));
    assert_eq!(summary.sections.len(), 2);
}

#[test]
fn bytes_behind_the_end_are_refused() {
    for tail in [&b"x"[..], b"\0", b"{}", b"\0\x06\0\0\0\x02{}"] {
        let bytes = [&Sample::new().bytes(), tail].concat();
        let found = message(&bytes);
        assert!(
            found.starts_with(&format!("{} bytes follow the end", tail.len())),
            "{found}"
        );
    }
}

#[test]
fn without_a_vmdescription_sections_are_found_and_measured_by_their_footers() {
    let mut sample = Sample::new();
    sample.has_description = false;
    for tail in [&b""[..], b"\x06\0\0\0\0"] {
        let summary = whole(&[&sample.bytes(), tail].concat()).unwrap();
        let lens = summary.sections.iter().map(|section| section.len);
        let expected = [sample.timer.len() as u64, 104].map(Some);
        assert_eq!(lens.collect::<Vec<_>>(), expected);
        assert_eq!(summary.run_state.as_deref(), Some("paused"));
        assert_eq!(summary.vmdescription, None);
    }
}

#[test]
fn a_wrong_footer_or_length_in_device_state_is_found() {
    let good = Sample::new().bytes();
    let find = |what: &[u8]| {
        good.windows(what.len())
            .position(|found| found == what)
            .unwrap()
    };
    let footer = find(b"\x7e\0\0\0\x28");
    let mut bytes = good.clone();
    bytes[footer] = 0x7f;
    assert!(message(&bytes).starts_with("0x7f instead of a section footer"));
    bytes[footer] = 0x7e;
    bytes[footer + 4] = 0x29;
    let found = message(&bytes);
    assert!(
        found.starts_with("section footer of section 41 instead of 40"),
        "{found}"
    );
    let mut bytes = good.clone();
    bytes[find(b"\"size\":24") + 8] = b'1';
    let found = message(&bytes);
    assert!(
        found.starts_with("section footer of section 2122219008 instead of 0"),
        "{found}"
    );
}

#[test]
fn a_stream_cut_anywhere_is_refused() {
    let bytes = Sample::new().bytes();
    let eof = bytes.windows(2).rposition(|pair| pair == [0, 6]).unwrap();
    for len in 0..bytes.len() {
        // Cut right behind the EOF byte it is a whole stream of suppress-vmdesc=on.
        assert_eq!(whole(&bytes[..len]).is_ok(), len == eof + 1, "{len}");
    }
}

proptest! {
    #[test]
    fn where_the_input_is_cut_makes_no_difference(
        cuts in proptest::collection::vec(0..20_000usize, 0..30),
    ) {
        let bytes = Sample::new().bytes();
        let cuts: Vec<_> = cuts.into_iter().filter(|cut| *cut < bytes.len()).collect();
        let (expected, _) = feed(&bytes, &[]).unwrap();
        prop_assert_eq!(feed(&bytes, &cuts).unwrap().0, expected);
    }

    #[test]
    fn changed_bytes_never_panic(
        changes in proptest::collection::vec((0..20_000usize, any::<u8>()), 1..8),
    ) {
        let mut bytes = Sample::new().bytes();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let _ = feed(&bytes, &[]);
    }

    #[test]
    fn changed_framing_never_panics(
        changes in proptest::collection::vec((0..400usize, any::<u8>()), 1..4),
    ) {
        let mut bytes = Sample::new().bytes();
        for (at, value) in changes {
            // The bytes at both ends: no page data lies there.
            let at = if at < 100 { at } else { bytes.len() - at };
            bytes[at] = value;
        }
        let _ = feed(&bytes, &[]);
    }
}

#[test]
fn one_byte_at_a_time_gives_the_same_elements() {
    let bytes = Sample::new().bytes();
    let cuts: Vec<_> = (0..bytes.len()).collect();
    assert_eq!(feed(&bytes, &cuts).unwrap().0, feed(&bytes, &[]).unwrap().0);
}
