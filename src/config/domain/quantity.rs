//! Sizes with units.

use super::view::{View, parse_number};

/// The bytes of a unit as libvirt names it.
pub(in crate::config) fn unit_len(unit: &str) -> Option<u64> {
    let len: u64 = match unit {
        "b" | "byte" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        "PB" => 1_000_000_000_000_000,
        "P" | "PiB" => 1 << 50,
        "E" | "EiB" => 1 << 60,
        _ => return None,
    };
    Some(len)
}

impl View<'_> {
    /// Its text as a number of bytes; `unit` says of what the number is, KiB without it.
    pub(super) fn size(&self) -> Option<u64> {
        self.size_in("KiB")
    }

    /// As [`View::size`], with another unit where none is given.
    pub(super) fn size_in(&self, default_unit: &str) -> Option<u64> {
        let unit = self.attribute("unit");
        let unit = unit.as_deref().unwrap_or(default_unit);
        let text = self.required_text();
        let size = self.bytes_of(&text, unit);
        if size.is_none() && !text.is_empty() && unit_len(unit).is_some() {
            self.error(format!("{text:?} {unit} is not a size"), None);
        }
        size
    }

    /// An attribute as a number of bytes, `unit` naming the attribute with the unit, KiB without it.
    pub(super) fn size_attribute(&self, name: &'static str, unit: &'static str) -> Option<u64> {
        let unit = self.attribute(unit);
        let unit = unit.as_deref().unwrap_or("KiB");
        let text = self.attribute(name)?;
        let size = self.bytes_of(&text, unit);
        if size.is_none() && unit_len(unit).is_some() {
            self.error(format!("{name} {text:?} {unit} is not a size"), None);
        }
        size
    }

    fn bytes_of(&self, text: &str, unit: &str) -> Option<u64> {
        let Some(len) = unit_len(unit) else {
            let why = format!(
                "unit {unit:?} is none of b, bytes, KB, KiB, MB, MiB, GB, GiB, TB, TiB, PB, PiB, EiB"
            );
            self.error(why, None);
            return None;
        };
        let size = parse_number(text)?.checked_mul(len)?;
        // QEMU's own sizes are signed.
        (size <= i64::MAX.unsigned_abs()).then_some(size)
    }
}
