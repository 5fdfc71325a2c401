//! Bytes for people.

use std::fmt::Write;

/// Bytes in a line.
const LINE: usize = 16;

/// A dump in the form of `hexdump -C`: equal lines are shown once, with a `*` for the others.
#[derive(Default)]
pub struct Dump {
    last: Option<Vec<u8>>,
    is_repeating: bool,
}

impl Dump {
    /// The lines of `bytes`, which lie at `address`. All but the last piece of a dump have to consist of whole lines.
    pub fn lines(&mut self, address: u64, bytes: &[u8]) -> String {
        let mut text = String::new();
        for (index, line) in (0..).zip(bytes.chunks(LINE)) {
            let is_repeated = self.last.as_deref() == Some(line);
            if is_repeated && !self.is_repeating {
                text.push_str("*\n");
            }
            self.is_repeating = is_repeated;
            if !is_repeated {
                let address = address.wrapping_add(index * LINE as u64);
                write_line(&mut text, address, line);
                self.last = Some(line.to_vec());
            }
        }
        text
    }

    /// The line behind the last one: the address where the dump ends.
    pub fn end(&self, address: u64) -> String {
        format!("{address:016x}\n")
    }
}

fn write_line(text: &mut String, address: u64, line: &[u8]) {
    let _ = write!(text, "{address:016x} ");
    for at in 0..LINE {
        if at % 8 == 0 {
            text.push(' ');
        }
        let _ = match line.get(at) {
            Some(byte) => write!(text, "{byte:02x} "),
            None => write!(text, "   "),
        };
    }
    let _ = writeln!(text, " |{}|", shown(line));
}

/// Printable characters as they are, a point for every other byte.
pub fn shown(bytes: &[u8]) -> String {
    let shown = bytes.iter().map(|byte| match byte {
        b' '..=b'~' => char::from(*byte),
        _ => '.',
    });
    shown.collect()
}

/// Two hexadecimal digits for each byte.
pub fn digits(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_looks_as_hexdump_does() {
        let mut bytes = vec![0; 64];
        bytes.extend(b"Linux version\n");
        let mut dump = Dump::default();
        let text = dump.lines(0x1000, &bytes[..32]) + &dump.lines(0x1020, &bytes[32..]);
        let expected = "\
0000000000001000  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
0000000000001040  4c 69 6e 75 78 20 76 65  72 73 69 6f 6e 0a        |Linux version.|
000000000000104e
";
        assert_eq!(text + &dump.end(0x104e), expected);
        assert_eq!(digits(b"\x00\xff"), "00ff");
    }
}
