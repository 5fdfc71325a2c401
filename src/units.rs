//! Integers with a unit, so that two of different kinds cannot trade places.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

unit!(
    /// A byte position in a file.
    FileOffset(u64),
    "{:#x}"
);
unit!(
    /// A byte position in QEMU's migration stream.
    StreamOffset(u64),
    "{:#x}"
);
unit!(
    /// A page's number in its RAMBlock: its byte offset divided by 4096.
    PageIndex(u64),
    "{:#x}"
);
unit!(
    /// A chunk's number in its image, from 0 in stream order.
    ChunkIndex(u64),
    "{}"
);

/// Bytes in a target page, on every x86 machine.
pub const PAGE_LEN: usize = 4096;

/// A byte count as people read it: `17 B`, `1.5 MiB`, `64 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.1}");
    format!(
        "{} {}",
        text.strip_suffix(".0").unwrap_or(&text),
        UNITS[unit]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_short_and_exact_where_they_can_be() {
        assert_eq!(human_bytes(17), "17 B");
        assert_eq!(human_bytes(1536 * 1024), "1.5 MiB");
        assert_eq!(human_bytes(64 << 30), "64 GiB");
        assert_eq!(human_bytes((1 << 20) - 1), "1 MiB");
        assert_eq!(human_bytes(u64::MAX), "16 EiB");
    }

    #[test]
    fn offsets_are_shown_in_hexadecimal() {
        assert_eq!(FileOffset(0x2a40_0000).to_string(), "0x2a400000");
    }
}
