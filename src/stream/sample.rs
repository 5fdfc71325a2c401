//! A small hand-made stream for tests: three pages of `pc.ram`, one of `pc.bios`, two device sections.

/// The parts of a stream, to be changed by a test before [`Sample::bytes`] joins them.
pub(super) struct Sample {
    pub(super) before_ram: Vec<u8>,
    pub(super) blocks: Vec<(String, u64)>,
    pub(super) total: Option<u64>,
    pub(super) start_records: Vec<u8>,
    pub(super) has_part: bool,
    pub(super) part_records: Vec<u8>,
    pub(super) before_end: Vec<u8>,
    pub(super) has_end: bool,
    pub(super) end_records: Vec<u8>,
    pub(super) timer: Vec<u8>,
    pub(super) has_description: bool,
}

/// A page record; without a fill byte a zero page, without a block one that continues.
pub(super) fn page_bytes(page: u64, block: Option<&str>, fill: Option<u8>) -> Vec<u8> {
    let kind = if fill.is_some() { 0x08 } else { 0x02 };
    let flags = kind | if block.is_none() { 0x20 } else { 0 };
    let mut bytes = ((page * 4096) | flags).to_be_bytes().to_vec();
    bytes.extend(block.map(str8).unwrap_or_default());
    match fill {
        Some(fill) => bytes.extend([fill; 4096]),
        None => bytes.push(0),
    }
    bytes
}

fn str8(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

fn full_section(id: u32, idstr: &str, payload: &[u8]) -> Vec<u8> {
    let id = id.to_be_bytes();
    [
        &[4],
        &id[..],
        &str8(idstr),
        &[0; 4],
        &[0, 0, 0, 2],
        payload,
        &[0x7e],
        &id,
    ]
    .concat()
}

const EOS_AND_FOOTER: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";

impl Sample {
    pub(super) fn new() -> Self {
        let part_records = [
            page_bytes(0, Some("pc.ram"), Some(0x11)),
            page_bytes(1, None, None),
            page_bytes(2, None, Some(0x33)),
            page_bytes(0, Some("pc.bios"), Some(0x44)),
        ];
        Sample {
            before_ram: Vec::new(),
            blocks: vec![
                ("pc.ram".to_owned(), 0x3000),
                ("pc.bios".to_owned(), 0x1000),
            ],
            total: None,
            start_records: Vec::new(),
            has_part: true,
            part_records: part_records.concat(),
            before_end: Vec::new(),
            has_end: true,
            end_records: Vec::new(),
            timer: vec![0x7e; 24],
            has_description: true,
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x04pc-x".to_vec();
        bytes.extend(&self.before_ram);
        bytes.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
        bytes.extend(self.block_list());
        bytes.extend(&self.start_records);
        bytes.extend(EOS_AND_FOOTER);
        if self.has_part {
            bytes.extend(b"\x02\0\0\0\x01");
            bytes.extend(&self.part_records);
            bytes.extend(EOS_AND_FOOTER);
        }
        bytes.extend(&self.before_end);
        if self.has_end {
            bytes.extend(b"\x03\0\0\0\x01");
            bytes.extend(&self.end_records);
            bytes.extend(EOS_AND_FOOTER);
        }
        bytes.extend(self.device_state());
        bytes
    }

    fn block_list(&self) -> Vec<u8> {
        let sum = || self.blocks.iter().map(|(_, len)| len).sum();
        let total = self.total.unwrap_or_else(sum);
        let mut bytes = (total | 4).to_be_bytes().to_vec();
        for (idstr, used_length) in &self.blocks {
            bytes.extend(str8(idstr));
            bytes.extend(used_length.to_be_bytes());
        }
        bytes
    }

    fn device_state(&self) -> Vec<u8> {
        let mut state = b"\0\0\0\x07paused".to_vec();
        state.resize(104, 0);
        let mut bytes = full_section(0, "timer", &self.timer);
        bytes.extend(full_section(0x28, "globalstate", &state));
        bytes.push(0);
        if self.has_description {
            let json = format!(
                concat!(
                    r#"{{"page_size":4096,"devices":["#,
                    r#"{{"name":"timer","instance_id":0,"fields":[{{"name":"t","size":{}}}]}},"#,
                    r#"{{"name":"globalstate","instance_id":0,"fields":[{{"size":4}},{{"size":100}}]}}]}}"#
                ),
                self.timer.len()
            );
            bytes.push(6);
            bytes.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
            bytes.extend(json.as_bytes());
        }
        bytes
    }
}
