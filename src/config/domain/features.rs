//! What the machine can do: `<features>`, `<clock>`, `<pm>`, and what becomes of the guest when it ends.

use super::view::View;
use super::word::words;

/// `<features>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// The line of its element.
    pub line: u32,
    /// `<acpi/>`: without it the guest has none.
    pub acpi: bool,
    /// `<apic eoi>`.
    pub apic_eoi: Option<bool>,
    /// `<hyperv>`.
    pub hyperv: HyperV,
    /// `<kvm>`.
    pub kvm: KvmFeatures,
    /// `<pvspinlock state>`.
    pub pvspinlock: Option<bool>,
    /// `<pmu state>`.
    pub pmu: Option<bool>,
    /// `<vmport state>`.
    pub vmport: Option<bool>,
    /// `<smm state>`; there without `state`.
    pub smm: Option<bool>,
    /// `<smm><tseg>` in bytes.
    pub tseg: Option<u64>,
    /// `<ioapic driver>`.
    pub ioapic: Option<IoApic>,
    /// `<vmcoreinfo state>`.
    pub vmcoreinfo: Option<bool>,
    /// `<ps2 state>`: whether there are a PS/2 mouse and keyboard.
    pub ps2: Option<bool>,
}

words! {
    /// Who plays the interrupt controller.
    IoApic {
        Kvm = "kvm",
        Qemu = "qemu",
    }
}

words! {
    /// Which enlightenments a Windows guest gets.
    HyperVMode {
        Custom = "custom",
        Passthrough = "passthrough",
        HostModel = "host-model",
    }
}

/// `<hyperv>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HyperV {
    /// The line of its element; 0 if there is none.
    pub line: u32,
    /// `mode=`.
    pub mode: Option<HyperVMode>,
    /// Enlightenments that are only on or off, by libvirt's name, in its order: `relaxed`, `vapic`, `vpindex`, ….
    pub switches: Vec<(&'static str, bool)>,
    /// `<spinlocks retries>`.
    pub spinlock_retries: Option<u32>,
    /// `<stimer><direct>`.
    pub stimer_direct: Option<bool>,
    /// `<tlbflush><direct>`.
    pub tlbflush_direct: Option<bool>,
    /// `<tlbflush><extended>`.
    pub tlbflush_extended: Option<bool>,
    /// `<vendor_id value>`.
    pub vendor_id: Option<String>,
}

/// Enlightenments that are only on or off.
const SWITCHES: [&str; 16] = [
    "relaxed",
    "vapic",
    "vpindex",
    "runtime",
    "synic",
    "stimer",
    "reset",
    "frequencies",
    "reenlightenment",
    "tlbflush",
    "ipi",
    "evmcs",
    "avic",
    "emsr_bitmap",
    "xmm_input",
    "spinlocks",
];

/// `<kvm>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KvmFeatures {
    /// `<hidden state>`.
    pub hidden: Option<bool>,
    /// `<hint-dedicated state>`.
    pub hint_dedicated: Option<bool>,
    /// `<poll-control state>`.
    pub poll_control: Option<bool>,
    /// `<pv-ipi state>`.
    pub pv_ipi: Option<bool>,
    /// `<dirty-ring size>` where its state is on.
    pub dirty_ring: Option<u32>,
}

words! {
    /// What the guest's clock starts from.
    ClockOffset {
        Utc = "utc",
        LocalTime = "localtime",
        Timezone = "timezone",
        Variable = "variable",
        Absolute = "absolute",
    }
}

/// `<clock>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Clock {
    /// The line of its element; 0 if there is none.
    pub line: u32,
    /// `offset=`; UTC without it.
    pub offset: Option<ClockOffset>,
    /// `timezone=`.
    pub timezone: Option<String>,
    /// `adjustment=` of a variable clock, in seconds; `reset` is 0.
    pub adjustment: Option<i64>,
    /// `basis=` of a variable clock: whether it is local time.
    pub is_local_basis: bool,
    /// `start=` of an absolute clock, in seconds since 1970.
    pub start: Option<i64>,
    /// `<timer>`.
    pub timers: Vec<Timer>,
}

words! {
    /// A timer.
    TimerName {
        Platform = "platform",
        Pit = "pit",
        Rtc = "rtc",
        Hpet = "hpet",
        Tsc = "tsc",
        KvmClock = "kvmclock",
        HypervClock = "hypervclock",
        ArmVtimer = "armvtimer",
    }
}

words! {
    /// What becomes of ticks that the guest missed.
    TickPolicy {
        Delay = "delay",
        Catchup = "catchup",
        Merge = "merge",
        Discard = "discard",
    }
}

words! {
    /// What a timer follows.
    TimerTrack {
        Boot = "boot",
        Guest = "guest",
        Wall = "wall",
        Realtime = "realtime",
    }
}

/// `<clock><timer>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    /// The line of its element.
    pub line: u32,
    /// Which.
    pub name: TimerName,
    /// `present=`.
    pub present: Option<bool>,
    /// `tickpolicy=`.
    pub tick_policy: Option<TickPolicy>,
    /// `track=`.
    pub track: Option<TimerTrack>,
    /// `frequency=` of the TSC, in Hz.
    pub frequency: Option<u64>,
}

words! {
    /// What becomes of the guest.
    LifecycleAction {
        Destroy = "destroy",
        Restart = "restart",
        RenameRestart = "rename-restart",
        Preserve = "preserve",
        CoredumpDestroy = "coredump-destroy",
        CoredumpRestart = "coredump-restart",
    }
}

/// `<on_poweroff>` and its like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lifecycle {
    /// When it powers itself off; destroy without it.
    pub on_poweroff: Option<LifecycleAction>,
    /// When it reboots; restart without it.
    pub on_reboot: Option<LifecycleAction>,
    /// When it panics; destroy without it.
    pub on_crash: Option<LifecycleAction>,
}

/// `<pm>`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PowerManagement {
    /// `<suspend-to-mem enabled>`.
    pub suspend_to_mem: Option<bool>,
    /// `<suspend-to-disk enabled>`.
    pub suspend_to_disk: Option<bool>,
}

pub(super) fn read_features(view: &View<'_>) -> Features {
    // Nothing on x86-64, or for other hypervisors.
    view.ignore_elements(&["pae", "hap", "viridian", "privnet", "nonacpi"]);
    let state = |name| {
        view.one_some(name, |feature| {
            Some(feature.switch("state").unwrap_or(true))
        })
    };
    let smm = view.one("smm", |smm| {
        (
            smm.switch("state").unwrap_or(true),
            smm.one_some("tseg", |tseg| tseg.size_in("MiB")),
        )
    });
    Features {
        line: view.line(),
        acpi: view.has("acpi"),
        apic_eoi: view.one_some("apic", |apic| apic.switch("eoi")),
        hyperv: view.one("hyperv", read_hyperv).unwrap_or_default(),
        kvm: view.one("kvm", read_kvm).unwrap_or_default(),
        pvspinlock: state("pvspinlock"),
        pmu: state("pmu"),
        vmport: state("vmport"),
        smm: smm.map(|smm| smm.0),
        tseg: smm.and_then(|smm| smm.1),
        ioapic: view.one_some("ioapic", |ioapic| ioapic.required_word("driver")),
        vmcoreinfo: state("vmcoreinfo"),
        ps2: state("ps2"),
    }
}

fn read_hyperv(view: &View<'_>) -> HyperV {
    let mut hyperv = HyperV {
        line: view.line(),
        mode: view.word("mode"),
        ..HyperV::default()
    };
    for name in SWITCHES {
        let read = view.one(name, |feature| {
            let nested =
                |name| feature.one_some(name, |one| Some(one.switch("state").unwrap_or(true)));
            let parts = match name {
                "stimer" => [nested("direct"), None, None],
                "tlbflush" => [None, nested("direct"), nested("extended")],
                _ => [None; 3],
            };
            let retries = if name == "spinlocks" {
                feature.number("retries")
            } else {
                None
            };
            (feature.switch("state").unwrap_or(true), parts, retries)
        });
        let Some((state, [stimer_direct, direct, extended], retries)) = read else {
            continue;
        };
        hyperv.switches.push((name, state));
        hyperv.stimer_direct = hyperv.stimer_direct.or(stimer_direct);
        hyperv.tlbflush_direct = hyperv.tlbflush_direct.or(direct);
        hyperv.tlbflush_extended = hyperv.tlbflush_extended.or(extended);
        hyperv.spinlock_retries = hyperv.spinlock_retries.or(retries);
    }
    hyperv.vendor_id = view.one_some("vendor_id", |vendor| {
        let value = vendor.attribute("value");
        value.filter(|_| vendor.switch("state").unwrap_or(true))
    });
    hyperv
}

fn read_kvm(view: &View<'_>) -> KvmFeatures {
    let state = |name| {
        view.one_some(name, |feature| {
            Some(feature.switch("state").unwrap_or(true))
        })
    };
    KvmFeatures {
        hidden: state("hidden"),
        hint_dedicated: state("hint-dedicated"),
        poll_control: state("poll-control"),
        pv_ipi: state("pv-ipi"),
        dirty_ring: view.one_some("dirty-ring", |ring| {
            let size = ring.number("size").unwrap_or(4096);
            (ring.switch("state") != Some(false)).then_some(size)
        }),
    }
}

pub(super) fn read_clock(view: &View<'_>) -> Clock {
    let signed = |name: &'static str| {
        let text = view.attribute(name)?;
        let number = match text.as_str() {
            "reset" => Some(0),
            text => text.parse().ok(),
        };
        if number.is_none() {
            view.error(format!("{name} {text:?} is not a number of seconds"), None);
        }
        number
    };
    Clock {
        line: view.line(),
        offset: view.word("offset"),
        timezone: view.attribute("timezone"),
        adjustment: signed("adjustment"),
        is_local_basis: match view.attribute("basis").as_deref() {
            Some("localtime") => true,
            Some("utc") | None => false,
            Some(other) => {
                view.error(format!("basis {other:?} is none of utc, localtime"), None);
                false
            }
        },
        start: signed("start"),
        timers: view.each_some("timer", read_timer),
    }
}

fn read_timer(view: &View<'_>) -> Option<Timer> {
    let name = view.required_word("name");
    view.leave_out_elements(
        &["catchup"],
        "how fast missed ticks are made up for is left to QEMU",
    );
    view.ignore(&["mode"]);
    Some(Timer {
        line: view.line(),
        present: view.switch("present"),
        tick_policy: view.word("tickpolicy"),
        track: view.word("track"),
        frequency: view.number("frequency"),
        name: name?,
    })
}

pub(super) fn read_lifecycle(domain: &View<'_>) -> Lifecycle {
    domain.ignore_elements(&["on_lockfailure"]);
    Lifecycle {
        on_poweroff: domain.one_some("on_poweroff", View::text_word),
        on_reboot: domain.one_some("on_reboot", View::text_word),
        on_crash: domain.one_some("on_crash", View::text_word),
    }
}

pub(super) fn read_power_management(view: &View<'_>) -> PowerManagement {
    PowerManagement {
        suspend_to_mem: view.one_some("suspend-to-mem", |one| one.switch("enabled")),
        suspend_to_disk: view.one_some("suspend-to-disk", |one| one.switch("enabled")),
    }
}
