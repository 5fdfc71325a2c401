//! How much memory there is, and how much a process holds.

use std::fs;

/// Bytes of memory that a process holds at present; `None` if it cannot be looked at.
///
/// Source: proc(5), `status`, `VmRSS`.
pub fn resident_bytes(pid: i32) -> Option<u64> {
    kibibytes(
        &fs::read_to_string(format!("/proc/{pid}/status")).ok()?,
        "VmRSS:",
    )
}

/// Bytes of memory that new processes can have without swapping; `None` if the kernel does not tell.
///
/// Source: proc(5), `meminfo`, `MemAvailable`.
pub fn available_memory() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_holds_memory_and_there_is_more() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(resident_bytes(pid).unwrap() > 100_000);
        assert!(available_memory().unwrap() > 1 << 20);
        assert_eq!(resident_bytes(i32::MAX), None);
    }
}
