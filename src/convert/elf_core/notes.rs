//! The notes of an ELF core: registers as Linux's own cores have them, registers as QEMU's cores have them, and what a
//! Linux guest tells about itself.
//!
//! Source: QEMU `target/i386/arch_dump.c`, `dump/dump.c`; Linux `struct elf_prstatus` of x86-64 and
//! `kernel/crash_core.c` (`update_vmcoreinfo_note`).

use object::elf::NT_PRSTATUS;

use crate::stream::x86_cpu::{Segment, X86Cpu};

/// Name and length of the fields of `struct elf_prstatus` before the registers.
const PRSTATUS_LEN: usize = 336;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;

/// The version of QEMU's own structure.
const QEMU_STATE_VERSION: u32 = 1;

/// Longer than any that Linux makes: a page of text, its name, its header.
pub const LONGEST_VMCOREINFO: usize = 12 + 12 + 4096 + 4;

const VMCOREINFO: &[u8] = b"VMCOREINFO\0";
/// What the text begins with.
const FIRST_LINE: &[u8] = b"OSRELEASE=";

/// The notes about all processors: first Linux's, then QEMU's.
pub fn of_cpus(cpus: &[X86Cpu]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (number, cpu) in (1..).zip(cpus) {
        append(&mut notes, b"CORE\0", NT_PRSTATUS.0, &prstatus(cpu, number));
    }
    for cpu in cpus {
        append(&mut notes, b"QEMU\0", 0, &qemu_state(cpu));
    }
    notes
}

/// Name and content each padded to four bytes.
fn append(notes: &mut Vec<u8>, name: &[u8], kind: u32, content: &[u8]) {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    for number in [len(name), len(content), kind] {
        notes.extend_from_slice(&number.to_le_bytes());
    }
    for part in [name, content] {
        notes.extend_from_slice(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus`; `number` stands for the thread.
fn prstatus(cpu: &X86Cpu, number: u32) -> Vec<u8> {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = cpu.general;
    let [es, cs, ss, ds, fs, gs] = cpu.segments;
    let selector = |segment: Segment| u64::from(segment.selector);
    // What the kernel keeps for system calls to begin anew.
    let orig_rax = 0;
    let registers = [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        cpu.rip,
        selector(cs),
        cpu.rflags,
        rsp,
        selector(ss),
        fs.base,
        gs.base,
        selector(ds),
        selector(es),
        selector(fs),
        selector(gs),
    ];
    let mut content = vec![0; PRSTATUS_LEN];
    content[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&number.to_le_bytes());
    let places = content[PRSTATUS_REGISTERS..].chunks_exact_mut(8);
    for (place, value) in places.zip(registers) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    content
}

/// `QEMUCPUState`.
fn qemu_state(cpu: &X86Cpu) -> Vec<u8> {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, upper @ ..] = cpu.general;
    let [es, cs, ss, ds, fs, gs] = cpu.segments;
    let mut content = Vec::new();
    let eight = |values: &[u64]| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        bytes.collect::<Vec<u8>>()
    };
    content.extend(eight(&[rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp]));
    content.extend(eight(&upper));
    content.extend(eight(&[cpu.rip, cpu.rflags]));
    for segment in [cs, ds, es, fs, gs, ss, cpu.ldt, cpu.tr, cpu.gdt, cpu.idt] {
        for number in [segment.selector, segment.limit, segment.flags, 0] {
            content.extend_from_slice(&number.to_le_bytes());
        }
        content.extend_from_slice(&segment.base.to_le_bytes());
    }
    // There is no CR1.
    content.extend(eight(&[cpu.cr0, 0, cpu.cr2, cpu.cr3, cpu.cr4]));
    content.extend(eight(&[cpu.kernel_gs_base]));
    let len = u32::try_from(content.len() + 8).unwrap_or(u32::MAX);
    let head = [QEMU_STATE_VERSION, len].map(u32::to_le_bytes).concat();
    [head, content].concat()
}

/// Whether a page begins with the note that a Linux guest keeps about itself.
pub fn is_vmcoreinfo(page: &[u8]) -> bool {
    let name_len = u32::try_from(VMCOREINFO.len()).unwrap_or(0).to_le_bytes();
    page.starts_with(&name_len) && vmcoreinfo_text(page).is_some()
}

/// Where the note's text begins, and how long it is.
fn vmcoreinfo_text(bytes: &[u8]) -> Option<(usize, usize)> {
    const TEXT: usize = 12 + 12;
    let number = |at: usize| {
        let four = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(four.try_into().ok()?))
    };
    let is_named = number(0)? as usize == VMCOREINFO.len()
        && number(8)? == 0
        && bytes.get(12..)?.starts_with(VMCOREINFO)
        && bytes.get(TEXT..)?.starts_with(FIRST_LINE);
    let len = usize::try_from(number(4)?).ok()?;
    (is_named && TEXT + len <= LONGEST_VMCOREINFO).then_some((TEXT, len))
}

/// The whole note, padded, that `bytes` begin with.
pub fn vmcoreinfo_in(bytes: &[u8]) -> Option<&[u8]> {
    let (start, len) = vmcoreinfo_text(bytes)?;
    bytes.get(..(start + len).next_multiple_of(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_has_two_notes() {
        let mut cpu = X86Cpu {
            rip: 0xffff_ffff_8100_0042,
            kernel_gs_base: 7,
            ..X86Cpu::default()
        };
        cpu.general[15] = 15;
        let notes = of_cpus(&[cpu.clone(), cpu]);
        let linux = 12 + 8 + PRSTATUS_LEN;
        let qemu = 12 + 8 + 440;
        assert_eq!(notes.len(), 2 * linux + 2 * qemu);
        assert_eq!(notes[20 + PRSTATUS_PID], 1);
        assert_eq!(notes[linux + 20 + PRSTATUS_PID], 2);
        let r15 = 20 + PRSTATUS_REGISTERS;
        assert_eq!(notes[r15], 15);
        let rip = r15 + 16 * 8;
        assert_eq!(notes[rip..rip + 8], 0xffff_ffff_8100_0042u64.to_le_bytes());
        let state = 2 * linux + 20;
        assert_eq!(notes[state..state + 8], [1, 0, 0, 0, 0xb8, 1, 0, 0]);
        assert_eq!(notes[state + 440 - 8], 7);
    }

    #[test]
    fn the_note_of_a_linux_guest_is_known_by_its_form() {
        let mut page = Vec::new();
        append(&mut page, VMCOREINFO, 0, b"OSRELEASE=6.1\nX=1\n");
        let whole = page.len();
        page.resize(4096, 0);
        assert!(is_vmcoreinfo(&page));
        assert_eq!(vmcoreinfo_in(&page).map(<[u8]>::len), Some(whole));
        for at in [0, 5, 8, 12, 24] {
            let mut other = page.clone();
            other[at] ^= 0x40;
            assert_eq!(vmcoreinfo_in(&other), None, "{at}");
        }
        assert!(!is_vmcoreinfo(&page[..20]));
    }
}
