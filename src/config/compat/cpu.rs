//! The features of a virtual processor, as CPUID tells the guest: compared bit by bit and told by name.
//!
//! QEMU gives the words that it shows its guest ([`CpuFeatures`]); a bit's name is the one that `-cpu` takes. A bit without
//! a name here is told by its place.
//!
//! Source: Intel's manual, volume 2, CPUID; AMD's manual, volume 3, appendix E; names seen with QEMU 7.2 and 10.0.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::Finding;

/// Feature bits by word: `0x7.0.ebx`, that is leaf, subleaf and register.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuFeatures(pub BTreeMap<String, u32>);

/// Bits of a word that nobody compares: some tell of the number of processors, which is compared as such, and some repeat
/// bits of another word.
const SKIPPED: [(&str, u32); 3] = [
    ("0x1.0.edx", 1 << 28),
    ("0x80000001.0.ecx", 1 << 1),
    ("0x80000001.0.edx", 0x0183_f3ff),
];

/// The names of bits by word, lowest bit first; `-` has none.
const NAMES: [(&str, &str); 15] = [
    (
        "0x1.0.edx",
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr sse sse2 \
         ss ht tm ia64 pbe",
    ),
    (
        "0x1.0.ecx",
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca sse4.1 sse4.2 \
         x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    ),
    ("0x6.0.eax", "- - arat"),
    (
        "0x7.0.ebx",
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - zero-fcs-fds mpx - avx512f \
         avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    ),
    (
        "0x7.0.ecx",
        "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - avx512-vpopcntdq - \
         la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks",
    ),
    (
        "0x7.0.edx",
        "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize - tsx-ldtrk - - \
         arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities core-capability \
         ssbd",
    ),
    (
        "0x7.1.eax",
        "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx-fp16 - \
         avx-ifma - - lam",
    ),
    (
        "0x7.1.edx",
        "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - - prefetchiti - - - - avx10",
    ),
    ("0xd.1.eax", "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        "0x40000001.0.eax",
        "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi kvm-pv-unhalt - kvm-pv-tlb-flush - \
         kvm-pv-ipi kvm-poll-control kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - \
         kvmclock-stable-bit",
    ),
    (
        "0x80000001.0.edx",
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (
        "0x80000001.0.ecx",
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 \
         tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    ),
    ("0x80000007.0.edx", "- - - - - - - - invtsc"),
    (
        "0x80000008.0.ebx",
        "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - - - - - - - - amd-ssbd virt-ssbd amd-no-ssb \
         - amd-psfd",
    ),
    (
        "0x8000000a.0.edx",
        "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - pause-filter - pfthreshold avic - \
         v-vmsave-vmload vgif - - - - - - - - vnmi - - svme-addr-chk",
    ),
];

impl CpuFeatures {
    /// The names of the bits that are set here and not in `other`.
    fn without(&self, other: &CpuFeatures) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for (word, bits) in &self.0 {
            let skipped = SKIPPED.iter().find(|(name, _)| name == word);
            let skipped = skipped.map_or(0, |(_, bits)| *bits);
            let others = other.0.get(word).copied().unwrap_or(0);
            let bits = bits & !others & !skipped;
            names.extend(
                (0..32)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| name(word, bit)),
            );
        }
        names
    }
}

/// `avx2`, or `bit 5 of CPUID 0x7.0.ebx`.
fn name(word: &str, bit: usize) -> String {
    let row = NAMES.iter().find(|(name, _)| *name == word);
    match row.and_then(|(_, names)| names.split_whitespace().nth(bit)) {
        Some(name) if name != "-" => name.to_owned(),
        _ => format!("bit {bit} of CPUID {word}"),
    }
}

/// Whether the processors would be what the guest saw.
pub fn check(saved: &CpuFeatures, target: &CpuFeatures, accelerator: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let missing = listed(&saved.without(target));
    if let Some(missing) = missing {
        let fact = format!("its processors would lack what the guest saw: {missing}");
        let fix = match accelerator {
            "tcg" => "--qemu PATH, naming a QEMU that offers them",
            _ => "use a host whose processor has them",
        };
        findings.push(Finding::refusal("cpu.flag.missing", fact, fix.to_owned()));
    }
    if let Some(added) = listed(&target.without(saved)) {
        let fact = format!("its processors would have what the guest did not see: {added}");
        findings.push(Finding::warning("cpu.flag.added", fact, None));
    }
    findings
}

fn listed(names: &BTreeSet<String>) -> Option<String> {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(words: &[(&str, u32)]) -> CpuFeatures {
        let words = words.iter().map(|(word, bits)| ((*word).to_owned(), *bits));
        CpuFeatures(words.collect())
    }

    #[test]
    fn each_missing_feature_is_named_and_those_of_the_topology_are_not() {
        let saved = features(&[
            ("0x7.0.ebx", 1 << 5 | 1 << 8),
            ("0x1.0.edx", 1 << 28 | 1),
            ("0x24.0.ebx", 2),
        ]);
        let target = features(&[
            ("0x7.0.ebx", 1 << 5),
            ("0x1.0.edx", 1),
            ("0x1.0.ecx", 1 << 30),
        ]);
        let findings = check(&saved, &target, "kvm");
        let codes: Vec<&str> = findings.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, ["cpu.flag.missing", "cpu.flag.added"]);
        assert!(
            findings[0]
                .fact
                .ends_with("bit 1 of CPUID 0x24.0.ebx, bmi2")
        );
        assert!(findings[1].fact.ends_with("see: rdrand"));
        assert_eq!(check(&saved, &saved, "tcg"), []);
    }

    #[test]
    fn no_word_has_more_names_than_bits() {
        for (word, names) in NAMES {
            assert!(names.split_whitespace().count() <= 32, "{word}");
        }
        assert_eq!(name("0x1.0.ecx", 31), "hypervisor");
        assert_eq!(name("0x7.0.ebx", 31), "avx512vl");
        assert_eq!(name("0x7.0.edx", 31), "ssbd");
        assert_eq!(name("0x80000001.0.edx", 31), "3dnow");
    }
}
