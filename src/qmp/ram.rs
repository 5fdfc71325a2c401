//! Where QEMU keeps the guest's RAM in its own memory, and the device state without it.
//!
//! Source: QEMU `softmmu/physmem.c`, `ram_block_format`, and `monitor/misc.c`, `hmp_gpa2hva`; seen on 7.2 and 10.0.

use std::os::fd::BorrowedFd;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::client::QmpClient;
use super::error::QmpError;

/// A RAMBlock of QEMU's, migratable or not, in the order in which QEMU would migrate them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlockAddress {
    /// Its name, such as `pc.ram`.
    pub idstr: String,
    /// The part of it in use, in bytes.
    pub used_length: u64,
    /// As long as it can become, in bytes.
    pub max_length: u64,
    /// Where it begins in QEMU's memory. Before QEMU 8.2 this is known of the block at guest address 0 only.
    pub host_address: Option<u64>,
}

impl QmpClient {
    /// The RAMBlocks and where they are; `None` if QEMU's answer is not as we know it.
    ///
    /// There is no QMP command for this; the human monitor's `info ramblock` and `gpa2hva` tell it.
    pub fn ram_blocks(&mut self) -> Result<Option<Vec<RamBlockAddress>>, QmpError> {
        let table = self.human_command("info ramblock")?;
        let Some(mut blocks) = read_table(&table) else {
            return Ok(None);
        };
        if blocks.iter().all(|block| block.host_address.is_none()) {
            let answer = self.human_command("gpa2hva 0")?;
            if let Some((idstr, address)) = read_translation(&answer) {
                let named = |block: &&mut RamBlockAddress| block.idstr == idstr;
                if let Some(block) = blocks.iter_mut().find(named) {
                    block.host_address = Some(address);
                }
            }
        }
        Ok(Some(blocks))
    }

    /// Writes the device state of a guest that does not run into an empty file, open for writing only.
    ///
    /// With `gives_up_disks` QEMU lets go of the guest's disks as at the end of a migration; `cont` takes them back.
    ///
    /// Source: QEMU `qapi/migration.json`, `xen-save-devices-state`; it works without Xen.
    pub fn save_device_state(
        &mut self,
        file: BorrowedFd<'_>,
        gives_up_disks: bool,
    ) -> Result<(), QmpError> {
        #[derive(Deserialize)]
        struct Added {
            #[serde(rename = "fdset-id")]
            fdset_id: u64,
        }
        let Added { fdset_id } = self.execute_with_fd("add-fd", json!({}), file)?;
        let arguments = json!({
            "filename": format!("/dev/fdset/{fdset_id}"),
            "live": gives_up_disks,
        });
        let saved = self.execute::<IgnoredAny>("xen-save-devices-state", arguments);
        let removed = self.execute::<IgnoredAny>("remove-fd", json!({ "fdset-id": fdset_id }));
        saved.and(removed).map(|_| ())
    }

    /// Whether a block job runs or a disk is exported: QEMU does not let go of such a disk.
    pub fn has_block_work(&mut self) -> Result<bool, QmpError> {
        let jobs: Vec<IgnoredAny> = self.execute("query-block-jobs", Value::Null)?;
        let exports: Vec<IgnoredAny> = self.execute("query-block-exports", Value::Null)?;
        Ok(!jobs.is_empty() || !exports.is_empty())
    }

    /// Runs a command of the human monitor; what it prints.
    fn human_command(&mut self, line: &str) -> Result<String, QmpError> {
        self.execute("human-monitor-command", json!({ "command-line": line }))
    }
}

/// A heading, then a line for each block: idstr, page size and its unit, offset, used length, total length, and from
/// 8.2 on host address and `ro` or `rw`. A block without an idstr is not migratable; an idstr with blanks is not read.
fn read_table(table: &str) -> Option<Vec<RamBlockAddress>> {
    let mut lines = table.lines().filter(|line| !line.trim().is_empty());
    let has_addresses = lines.next()?.contains("HVA");
    let behind_idstr = if has_addresses { 7 } else { 5 };
    let mut blocks = Vec::new();
    for line in lines {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (idstr, fields) = words.split_at_checked(words.len().checked_sub(behind_idstr)?)?;
        match idstr {
            [] => {}
            [idstr] => blocks.push(RamBlockAddress {
                idstr: (*idstr).to_owned(),
                used_length: hexadecimal(fields[3])?,
                max_length: hexadecimal(fields[4])?,
                host_address: match has_addresses {
                    true => Some(hexadecimal(fields[5])?),
                    false => None,
                },
            }),
            _ => return None,
        }
    }
    Some(blocks)
}

/// `Host virtual address for 0x0 (pc.ram) is 0x7fb25fe00000`.
fn read_translation(answer: &str) -> Option<(&str, u64)> {
    let (before, address) = answer.trim().rsplit_once(") is ")?;
    let (_, idstr) = before.split_once('(')?;
    Some((idstr, hexadecimal(address)?))
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(idstr: &str, used_length: u64, host_address: Option<u64>) -> RamBlockAddress {
        RamBlockAddress {
            idstr: idstr.to_owned(),
            used_length,
            max_length: used_length,
            host_address,
        }
    }

    #[test]
    fn the_tables_of_both_versions_are_read() {
        let with = "  Block Name    PSize   Offset   Used   Total    HVA  RO\r\n\
            pc.ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007fb25fe00000  rw\r\n\
            /rom@etc/acpi/tables    4 KiB  0x41100000 0x00020000 0x00200000 0x00007fb25fa00000  ro\r\n\
              4 KiB  0x41100000 0x00020000 0x00200000 0x00007fb25fa00000  ro\r\n";
        let tables = RamBlockAddress {
            max_length: 0x20_0000,
            ..block("/rom@etc/acpi/tables", 0x2_0000, Some(0x7fb2_5fa0_0000))
        };
        let ram = block("pc.ram", 1 << 30, Some(0x7fb2_5fe0_0000));
        assert_eq!(read_table(with), Some(vec![ram, tables]));
        let without = "  Block Name    PSize   Offset   Used   Total\r\n\
            pc.ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000\r\n";
        assert_eq!(
            read_table(without),
            Some(vec![block("pc.ram", 1 << 30, None)])
        );
    }

    #[test]
    fn a_table_of_another_shape_is_not_read() {
        assert_eq!(read_table(""), None);
        assert_eq!(
            read_table("Block Name HVA\nmy ram 4 KiB 0x0 0x1000 0x1000 0x1 rw\n"),
            None
        );
        assert_eq!(
            read_table("Block Name HVA\npc.ram 4 KiB 0x0 1000 0x1000 0x1 rw\n"),
            None
        );
        assert_eq!(read_table("Block Name HVA\npc.ram\n"), None);
    }

    #[test]
    fn a_translation_names_block_and_address() {
        let answer = "Host virtual address for 0x0 (pc.ram) is 0x7f5dcfe00000\r\n";
        assert_eq!(read_translation(answer), Some(("pc.ram", 0x7f5d_cfe0_0000)));
        assert_eq!(read_translation("No memory is mapped at address 0x0"), None);
    }
}
