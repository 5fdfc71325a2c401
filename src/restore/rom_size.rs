//! Room for the ROM of a device: as much as the guest was saved with, where this QEMU's ROM file is smaller.
//!
//! What the ROM holds comes from the stream. Source: QEMU `hw/pci/pci.c`, property `romsize`.

use std::fmt;
use std::str::FromStr;

/// `virtio-net-pci=0x40000`: all devices of a driver, and bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RomSize {
    driver: String,
    len: u32,
}

/// Why a text is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it has to be DRIVER=BYTES, such as virtio-net-pci=0x40000, the bytes a power of two")]
pub struct BadRomSize;

impl FromStr for RomSize {
    type Err = BadRomSize;

    fn from_str(text: &str) -> Result<Self, BadRomSize> {
        let (driver, len) = text.split_once('=').ok_or(BadRomSize)?;
        let is_driver = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let len = match len.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => len.parse(),
        };
        let len = len.map_err(|_| BadRomSize)?;
        let is_good = !driver.is_empty() && driver.bytes().all(is_driver) && len.is_power_of_two();
        let driver = driver.to_owned();
        is_good.then_some(RomSize { driver, len }).ok_or(BadRomSize)
    }
}

impl RomSize {
    /// The value of QEMU's `-global` that gives it.
    pub fn as_global(&self) -> String {
        format!("{}.romsize={}", self.driver, self.len)
    }
}

impl fmt::Display for RomSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={:#x}", self.driver, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rom_size_is_a_driver_and_a_power_of_two() {
        let size: RomSize = "virtio-net-pci=0x40000".parse().unwrap();
        assert_eq!(size.as_global(), "virtio-net-pci.romsize=262144");
        assert_eq!(size.to_string(), "virtio-net-pci=0x40000");
        for bad in [
            "e1000",
            "=1",
            "e1000=3",
            "a,b=4",
            "e1000=0",
            "e1000=0x100000000",
        ] {
            assert_eq!(bad.parse::<RomSize>(), Err(BadRomSize), "{bad}");
        }
    }
}
