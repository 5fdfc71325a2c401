//! The registers of an x86 processor out of its `cpu` section.
//!
//! With a vmdescription every register is read where that says it lies. Without one the places are those of version 12 of
//! the section, which QEMU has written since 1.3, and the bytes have to look like registers: [`processors`] gives none
//! rather than wrong ones.
//!
//! Source: QEMU `target/i386/machine.c`, `vmstate_x86_cpu`; held against `info registers` of QEMU 7.2 and 10.0.

use serde::Serialize;

use super::device_fields::DeviceFields;
use super::wire::QEMU_VM_SECTION_FULL;
use crate::units::StreamOffset;

/// The name of the section of each processor.
const IDSTR: &str = "cpu";
/// The only version whose layout is known without a description.
const VERSION: u32 = 12;
/// The bytes of that layout that are looked at.
const KNOWN_LEN: usize = 0x360;

/// A segment register with what the processor keeps of its descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Segment {
    /// What the register holds.
    pub selector: u32,
    /// Where the segment begins.
    pub base: u64,
    /// Its last byte.
    pub limit: u32,
    /// The second half of its descriptor.
    pub flags: u32,
}

/// The registers of one processor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct X86Cpu {
    /// Its number.
    pub index: u32,
    /// rax rcx rdx rbx rsp rbp rsi rdi r8 … r15.
    pub general: [u64; 16],
    /// Where it goes on.
    pub rip: u64,
    /// Its flags.
    pub rflags: u64,
    /// QEMU's own flags: bit 14 for long mode.
    pub hflags: u32,
    /// es cs ss ds fs gs.
    pub segments: [Segment; 6],
    /// The local descriptor table.
    pub ldt: Segment,
    /// The task register.
    pub tr: Segment,
    /// The global descriptor table.
    pub gdt: Segment,
    /// The interrupt descriptor table.
    pub idt: Segment,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The MSR of the same name.
    pub efer: u64,
    /// What `swapgs` brings.
    pub kernel_gs_base: u64,
}

impl X86Cpu {
    /// Whether it runs in long mode.
    pub fn is_in_long_mode(&self) -> bool {
        self.hflags & 1 << 14 != 0
    }
}

/// The processors of a guest, in the order of their numbers: from its device state region, which begins at `start` in the
/// stream, and the sections that were found in it.
pub fn processors(region: &[u8], start: StreamOffset, sections: &[DeviceFields]) -> Vec<X86Cpu> {
    let of_sections = sections.iter().filter(|one| one.idstr == IDSTR);
    let mut found: Vec<X86Cpu> = of_sections
        .filter_map(|section| {
            let first = usize::try_from(section.offset.checked_sub(start.0)?).ok()?;
            let payload = region.get(first..)?;
            match section.len {
                Some(_) => described(payload, section),
                None => undescribed(payload, section.instance_id, section.version_id),
            }
        })
        .collect();
    if found.is_empty() {
        found = searched(region);
    }
    found.sort_by_key(|cpu| cpu.index);
    found.dedup_by_key(|cpu| cpu.index);
    found
}

/// The payload of the section of that name that has no description and may stand anywhere in the region. For sections
/// whose beginning is known whatever follows.
pub fn payload_of<'r>(
    region: &'r [u8],
    start: StreamOffset,
    sections: &[DeviceFields],
    idstr: &str,
) -> Option<&'r [u8]> {
    let known = sections.iter().find(|one| one.idstr == idstr);
    let known = known.and_then(|section| {
        let first = usize::try_from(section.offset.checked_sub(start.0)?).ok()?;
        region.get(first..)
    });
    known.or_else(|| {
        let (_, _, payload) = headers(region, idstr).next()?;
        Some(payload)
    })
}

/// Everything in the region that has the form of a FULL section's header with that name: instance, version, and what
/// follows.
fn headers<'r>(
    region: &'r [u8],
    idstr: &str,
) -> impl Iterator<Item = (u32, u32, &'r [u8])> + use<'r> {
    let mut name = vec![u8::try_from(idstr.len()).unwrap_or(u8::MAX)];
    name.extend_from_slice(idstr.as_bytes());
    let places = 5..region.len().saturating_sub(name.len());
    places.filter_map(move |at| {
        let rest = region.get(at..)?.strip_prefix(name.as_slice())?;
        let has_type = region[at - 5] == QEMU_VM_SECTION_FULL;
        let (header, payload) = rest.split_first_chunk::<8>().filter(|_| has_type)?;
        let [instance, version] = [&header[..4], &header[4..]].map(|bytes| be(bytes, 0, 4));
        let [instance, version] = [instance, version].map(|value| u32::try_from(value).ok());
        Some((instance?, version?, payload))
    })
}

/// Processors in a region whose sections are not certain.
fn searched(region: &[u8]) -> Vec<X86Cpu> {
    let found = headers(region, IDSTR);
    let cpus =
        found.filter_map(|(instance, version, payload)| undescribed(payload, instance, version));
    cpus.collect()
}

/// By the layout of version 12, if that is it.
fn undescribed(payload: &[u8], instance: u32, version: u32) -> Option<X86Cpu> {
    let payload = payload.get(..KNOWN_LEN)?;
    let cpu = read(payload, instance, &|_, at| Some(at))?;
    (version == VERSION && is_plausible(payload, &cpu)).then_some(cpu)
}

/// By the description.
fn described(payload: &[u8], section: &DeviceFields) -> Option<X86Cpu> {
    let place = |name: &str, _| usize::try_from(section.field(name)?.offset).ok();
    read(payload, section.instance_id, &place)
}

/// What no processor has otherwise: bit 1 of rflags, the format of the floating point registers, and that hflags say of
/// long mode and protection what EFER and CR0 say.
fn is_plausible(payload: &[u8], cpu: &X86Cpu) -> bool {
    let fpu_format = be(payload, 0x9a, 2);
    let is_long = cpu.efer & 1 << 10 != 0;
    cpu.rflags & 2 != 0
        && cpu.rflags >> 22 == 0
        && fpu_format <= 1
        && cpu.is_in_long_mode() == is_long
        && cpu.cr0 >> 32 == 0
        && (cpu.cr0 & 1 == 1 || !is_long)
}

/// Reads all of them; `place` tells where a field lies, from its name and from where it lies in version 12.
fn read(
    payload: &[u8],
    index: u32,
    place: &dyn Fn(&str, usize) -> Option<usize>,
) -> Option<X86Cpu> {
    let at = |name: &str, known: usize, len: usize| {
        let at = place(name, known)?;
        let end = at.checked_add(len)?;
        payload.get(at..end)
    };
    let eight = |name, known| Some(be(at(name, known, 8)?, 0, 8));
    let four = |name, known| u32::try_from(be(at(name, known, 4)?, 0, 4)).ok();
    let segment = |name, known| Some(segment(at(name, known, SEGMENT_LEN)?));
    let general = at("env.regs", 0, 16 * 8)?;
    let segments = at("env.segs", 0xec, 6 * SEGMENT_LEN)?;
    Some(X86Cpu {
        index,
        general: std::array::from_fn(|number| be(general, 8 * number, 8)),
        rip: eight("env.eip", 0x80)?,
        rflags: eight("env.eflags", 0x88)?,
        hflags: four("env.hflags", 0x90)?,
        segments: std::array::from_fn(|number| segment_at(segments, number)),
        ldt: segment("env.ldt", 0x164)?,
        tr: segment("env.tr", 0x178)?,
        gdt: segment("env.gdt", 0x18c)?,
        idt: segment("env.idt", 0x1a0)?,
        cr0: eight("env.cr[0]", 0x1c8)?,
        cr2: eight("env.cr[2]", 0x1d0)?,
        cr3: eight("env.cr[3]", 0x1d8)?,
        cr4: eight("env.cr[4]", 0x1e0)?,
        efer: eight("env.efer", 0x330)?,
        kernel_gs_base: eight("env.kernelgsbase", 0x358)?,
    })
}

/// be32 selector, be64 base, be32 limit, be32 flags.
const SEGMENT_LEN: usize = 20;

fn segment_at(segments: &[u8], number: usize) -> Segment {
    segment(segments.get(SEGMENT_LEN * number..).unwrap_or_default())
}

fn segment(bytes: &[u8]) -> Segment {
    let four = |at| u32::try_from(be(bytes, at, 4)).unwrap_or_default();
    Segment {
        selector: four(0),
        base: be(bytes, 4, 8),
        limit: four(12),
        flags: four(16),
    }
}

/// A big-endian number of `len` bytes; what is missing is zero.
fn be(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload() -> Vec<u8> {
        let mut bytes = vec![0; 1817];
        let mut put =
            |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        put(0x20, 0x1000);
        put(0x80, 0xffff_ffff_8100_0000);
        put(0x88, 0x246);
        put(0x1c8, 0x8005_0033);
        put(0x1d8, 0x1234_5000);
        put(0x330, 0xd01);
        bytes[0x90..0x94].copy_from_slice(&(1u32 << 14).to_be_bytes());
        bytes[0xec + 20..0xec + 24].copy_from_slice(&0x10u32.to_be_bytes());
        bytes
    }

    fn region(payload: &[u8], instance: u32) -> Vec<u8> {
        let mut bytes = b"\x04\0\0\0\x07\x03cpu".to_vec();
        bytes.extend(instance.to_be_bytes());
        bytes.extend(12u32.to_be_bytes());
        bytes.extend(payload);
        bytes.extend(b"\x7e\0\0\0\x07");
        bytes
    }

    #[test]
    fn registers_are_found_without_a_description() {
        let bytes = [region(&payload(), 1), region(&payload(), 0)].concat();
        let found = processors(&bytes, StreamOffset(5), &[]);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].index, found[1].index), (0, 1));
        assert_eq!(found[0].general[4], 0x1000);
        assert_eq!(found[0].rip, 0xffff_ffff_8100_0000);
        assert_eq!(found[0].cr3, 0x1234_5000);
        assert_eq!(found[0].segments[1].selector, 0x10);
        assert!(found[0].is_in_long_mode());
    }

    #[test]
    fn what_does_not_look_like_registers_is_none() {
        for (at, value) in [(0x8f, 0), (0x9b, 7), (0x92, 0), (0x88, 1)] {
            let mut payload = payload();
            payload[at] = value;
            assert!(processors(&region(&payload, 0), StreamOffset(0), &[]).is_empty());
        }
        let whole = region(&payload(), 0);
        for len in 0..whole.len().min(KNOWN_LEN) {
            assert!(processors(&whole[..len], StreamOffset(0), &[]).is_empty());
        }
    }
}
