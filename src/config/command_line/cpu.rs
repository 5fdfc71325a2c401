//! `-cpu`, `-smp`, I/O threads.

use super::json::{Json, on_off};
use super::line::Line;
use crate::config::domain::Domain;
use crate::config::domain::cpu::{CacheMode, Cpu, CpuMode, FeaturePolicy, IoThreads, Vcpus};
use crate::config::domain::features::{Features, HyperVMode, TimerName};
use crate::config::domain::platform::PanicModel;
use crate::config::properties::escape;

/// What a guest gets whose XML has no `<cpu>`.
const DEFAULT_MODEL: &str = "qemu64";

/// Adds the virtual CPUs.
pub(super) fn cpu(line: &mut Line<'_>, domain: &Domain) {
    let unsaid = Cpu::default();
    let cpu = domain.cpu.as_ref().unwrap_or(&unsaid);
    let mut words = vec![model(line, cpu)];
    for feature in &cpu.features {
        let name = spelling(&feature.name);
        match feature.policy {
            FeaturePolicy::Require | FeaturePolicy::Force => words.push(format!("{name}=on")),
            FeaturePolicy::Disable | FeaturePolicy::Forbid => words.push(format!("{name}=off")),
            FeaturePolicy::Optional => {}
        }
    }
    timers(&mut words, domain);
    hyperv(line, &mut words, domain);
    kvm(&mut words, &domain.features);
    cache(line, &mut words, cpu);
    line.option("cpu", words.join(","));
}

fn model(line: &mut Line<'_>, cpu: &Cpu) -> String {
    let migratable = |name: &str| match cpu.migratable {
        Some(is_migratable) => format!("{name},migratable={}", on_off(is_migratable)),
        None => name.to_owned(),
    };
    match cpu.mode {
        Some(CpuMode::HostPassthrough) if line.is_kvm => migratable("host"),
        // Without KVM the most that can be had is what QEMU itself can do.
        Some(CpuMode::HostPassthrough | CpuMode::Maximum) => migratable("max"),
        Some(CpuMode::HostModel) => {
            let why = "the host's CPU model is known only once QEMU was asked for it";
            line.error_at(
                "domain/cpu/@mode",
                cpu.line,
                why,
                Some("name a model: <cpu mode='custom'><model>…</model></cpu>"),
            );
            DEFAULT_MODEL.to_owned()
        }
        Some(CpuMode::Custom) | None => {
            let mut model = escape(cpu.model.as_deref().unwrap_or(DEFAULT_MODEL));
            if let Some(vendor) = &cpu.vendor_id {
                model.push_str(&format!(",vendor={}", escape(vendor)));
            }
            model
        }
    }
}

/// A feature's name as QEMU spells it.
fn spelling(name: &str) -> String {
    match name {
        "pclmuldq" => "pclmulqdq".to_owned(),
        name => escape(&name.replace('_', "-")),
    }
}

fn timers(words: &mut Vec<String>, domain: &Domain) {
    for timer in &domain.clock.timers {
        match (timer.name, timer.present) {
            (TimerName::HypervClock, present) => {
                words.push(format!("hv-time={}", on_off(present.unwrap_or(true))));
            }
            (TimerName::KvmClock, Some(present)) => {
                words.push(format!("kvmclock={}", on_off(present)));
            }
            (TimerName::Tsc, _) => {
                words.extend(timer.frequency.map(|hz| format!("tsc-frequency={hz}")));
            }
            _ => {}
        }
    }
}

fn hyperv(line: &mut Line<'_>, words: &mut Vec<String>, domain: &Domain) {
    let hyperv = &domain.features.hyperv;
    match hyperv.mode {
        Some(HyperVMode::Passthrough) => words.push("hv-passthrough=on".to_owned()),
        Some(HyperVMode::HostModel) => {
            let why = "which enlightenments the host has only libvirt asks for";
            line.error_at(
                "domain/features/hyperv/@mode",
                hyperv.line,
                why,
                Some("list them, with mode='custom'"),
            );
        }
        Some(HyperVMode::Custom) | None => {}
    }
    for (name, is_on) in &hyperv.switches {
        match (*name, is_on) {
            ("spinlocks", true) => {
                let retries = hyperv.spinlock_retries.unwrap_or(0xfff);
                words.push(format!("hv-spinlocks={retries:#x}"));
            }
            ("spinlocks", false) => {}
            (name, is_on) => {
                words.push(format!("hv-{}={}", name.replace('_', "-"), on_off(*is_on)))
            }
        }
    }
    let nested = [
        ("hv-stimer-direct", hyperv.stimer_direct),
        ("hv-tlbflush-direct", hyperv.tlbflush_direct),
        ("hv-tlbflush-ext", hyperv.tlbflush_extended),
    ];
    for (name, is_on) in nested {
        words.extend(is_on.map(|is_on| format!("{name}={}", on_off(is_on))));
    }
    if let Some(vendor) = &hyperv.vendor_id {
        words.push(format!("hv-vendor-id={}", escape(vendor)));
    }
    let mut panics = domain.devices.panics.iter();
    if panics.any(|panic| panic.model == Some(PanicModel::HyperV)) {
        words.push("hv-crash=on".to_owned());
    }
}

fn kvm(words: &mut Vec<String>, features: &Features) {
    let switches = [
        ("kvm-pv-eoi", features.apic_eoi),
        ("kvm-pv-unhalt", features.pvspinlock),
        ("kvm", features.kvm.hidden.map(|is_hidden| !is_hidden)),
        ("kvm-hint-dedicated", features.kvm.hint_dedicated),
        ("kvm-poll-control", features.kvm.poll_control),
        ("kvm-pv-ipi", features.kvm.pv_ipi),
        ("pmu", features.pmu),
    ];
    for (name, is_on) in switches {
        words.extend(is_on.map(|is_on| format!("{name}={}", on_off(is_on))));
    }
}

fn cache(line: &mut Line<'_>, words: &mut Vec<String>, cpu: &Cpu) {
    if let Some(cache) = cpu.cache {
        // Only the host's own CPU has a cache of the host's to show.
        let is_named = matches!(cpu.mode, None | Some(CpuMode::Custom | CpuMode::HostModel));
        match (cache.mode, cache.level) {
            (CacheMode::Passthrough, _) => words.push("host-cache-info=on,l3-cache=off".to_owned()),
            (CacheMode::Emulate, Some(3)) if is_named => words.push("l3-cache=on".to_owned()),
            (CacheMode::Emulate, Some(3)) => {
                words.push("l3-cache=on,host-cache-info=off".to_owned())
            }
            (CacheMode::Disable, _) if is_named => words.push("l3-cache=off".to_owned()),
            (CacheMode::Disable, _) => words.push("host-cache-info=off,l3-cache=off".to_owned()),
            (CacheMode::Emulate, _) => {
                line.error_at(
                    "domain/cpu/cache",
                    cpu.line,
                    "QEMU emulates a cache of level 3 only",
                    None,
                );
            }
        }
    }
    if let Some(addr) = cpu.max_phys_addr {
        if addr.is_passthrough {
            words.push("host-phys-bits=on".to_owned());
            words.extend(
                addr.limit
                    .map(|limit| format!("host-phys-bits-limit={limit}")),
            );
        } else {
            words.extend(addr.bits.map(|bits| format!("phys-bits={bits}")));
        }
    }
}

/// Adds how many there are and how they hang together.
pub(super) fn smp(line: &mut Line<'_>, vcpus: &Vcpus, cpu: Option<&Cpu>) {
    let topology = cpu.and_then(|cpu| cpu.topology);
    let at_boot = vcpus.at_boot();
    let mut value = at_boot.to_string();
    if at_boot < vcpus.max {
        value.push_str(&format!(",maxcpus={}", vcpus.max));
    }
    value.push_str(&match topology {
        Some(it) => format!(
            ",sockets={},dies={},clusters={},cores={},threads={}",
            it.sockets, it.dies, it.clusters, it.cores, it.threads
        ),
        None => format!(",sockets={},cores=1,threads=1", vcpus.max),
    });
    if let Some(it) = topology {
        let all = [it.sockets, it.dies, it.clusters, it.cores, it.threads];
        let product = all
            .iter()
            .try_fold(1_u32, |product, part| product.checked_mul(*part));
        if product != Some(vcpus.max) {
            let why = format!(
                "its product is not the number of virtual CPUs, {}",
                vcpus.max
            );
            line.error_at("domain/cpu/topology", it.line, why, None);
        }
    }
    line.option("smp", value);
}

/// Adds I/O threads.
pub(super) fn iothreads(line: &mut Line<'_>, iothreads: &IoThreads) {
    for thread in &iothreads.threads {
        let object = Json::object("iothread", &format!("iothread{}", thread.id))
            .with_some("thread-pool-min", thread.thread_pool_min)
            .with_some("thread-pool-max", thread.thread_pool_max)
            .with_some("poll-max-ns", thread.poll_max)
            .with_some("poll-grow", thread.poll_grow)
            .with_some("poll-shrink", thread.poll_shrink);
        line.object(object);
    }
}
