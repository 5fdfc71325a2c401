use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const AT: FileOffset = FileOffset(0);

fn parse(payload: &[u8]) -> Result<PageMap, ContainerError> {
    PageMap::parse(payload, AT, 100, 1 << 20)
}

fn blocks(lengths: &[u64]) -> Vec<(String, u64)> {
    let block = |(number, length): (usize, &u64)| (format!("block{number}"), length * PAGE_LEN_U64);
    lengths.iter().enumerate().map(block).collect()
}

/// Feeds records that follow each other in chunk 0.
fn follow(builder: &mut PageMapBuilder, pages: impl IntoIterator<Item = (u64, bool)>) {
    let mut body = 8;
    for (page, is_zero) in pages {
        builder.page(0, page, 0, body, is_zero);
        body += 8 + if is_zero { 1 } else { PAGE_LEN_U32 };
    }
}

#[test]
fn pages_in_a_row_become_one_run() {
    let mut builder = PageMapBuilder::new(&blocks(&[64]));
    follow(&mut builder, (0..64).map(|page| (page, page % 3 == 0)));
    let map = parse(&builder.finish()).unwrap();
    assert_eq!(map.run_count(), 1);
    assert_eq!(map.locate(0, PageIndex(0)), Some(PageLocation::Zero));
    let data = |body| {
        Some(PageLocation::Data {
            chunk: ChunkIndex(0),
            body,
        })
    };
    assert_eq!(map.locate(0, PageIndex(1)), data(17));
    assert_eq!(map.locate(0, PageIndex(4)), data(8 + 2 * 9 + 2 * 4104));
    assert_eq!(map.locate(0, PageIndex(64)), None);
    assert_eq!(map.locate(1, PageIndex(0)), None);
    assert_eq!(map.locate_range(0, PageIndex(60), 10).count(), 4);
}

#[test]
fn zero_pages_in_a_row_become_one_run_however_many() {
    let mut builder = PageMapBuilder::new(&blocks(&[10_000]));
    (0..10_000u32).for_each(|page| builder.page(0, page.into(), page / 500, page % 500 * 9, true));
    assert_eq!(parse(&builder.finish()).unwrap().run_count(), 1);
}

#[test]
fn a_page_that_was_never_sent_is_missed() {
    let mut builder = PageMapBuilder::new(&blocks(&[4, 2]));
    follow(&mut builder, [(0, true), (1, false), (3, false)]);
    assert_eq!(
        builder.first_missing(),
        Some(("block0".into(), PageIndex(2)))
    );
    follow(&mut builder, [(2, true)]);
    assert_eq!(
        builder.first_missing(),
        Some(("block1".into(), PageIndex(0)))
    );
    let error = parse(&builder.finish()).unwrap_err();
    assert!(matches!(
        error,
        ContainerError::PageMissing {
            page: PageIndex(0),
            ..
        }
    ));
}

#[test]
fn a_run_is_held_against_the_length_of_its_chunk() {
    let mut builder = PageMapBuilder::new(&blocks(&[2]));
    follow(&mut builder, [(0, false), (1, false)]);
    let map = parse(&builder.finish()).unwrap();
    map.check_chunks(&[8 + 4096 + 8 + 4096], AT).unwrap();
    map.check_chunks(&[8 + 4096 + 8 + 4095], AT).unwrap_err();
    map.check_chunks(&[], AT).unwrap_err();
}

proptest! {
    #[test]
    fn the_last_record_of_a_page_holds(
        records in prop::collection::vec((0usize..2, 0u64..40, 1u64..20, 0u32..4, any::<u32>()), 1..60),
    ) {
        let mut builder = PageMapBuilder::new(&blocks(&[60, 60]));
        let mut expected = HashMap::new();
        (0..2).for_each(|block| (0..60).for_each(|page| {
            builder.page(block, page, 0, 0, true);
            expected.insert((block, page), PageLocation::Zero);
        }));
        for (block, first, count, chunk, zeros) in records {
            let mut body = 8 + (zeros & 0xff);
            for page in first..first + count {
                let is_zero = zeros >> (page % 32) & 1 == 1;
                builder.page(block, page, chunk, body, is_zero);
                let data = PageLocation::Data { chunk: ChunkIndex(chunk.into()), body };
                expected.insert((block, page), if is_zero { PageLocation::Zero } else { data });
                body += 8 + if is_zero { 1 } else { PAGE_LEN_U32 };
            }
        }
        prop_assert_eq!(builder.first_missing(), None);
        let map = parse(&builder.finish()).unwrap();
        for ((block, page), location) in expected {
            prop_assert_eq!(map.locate(block, PageIndex(page)), Some(location));
        }
    }

    #[test]
    fn any_bytes_are_refused_or_read(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&payload);
    }
}
