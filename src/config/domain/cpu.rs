//! The virtual CPUs: how many, what they are, how they hang together.

use super::view::View;
use super::word::words;

/// `<vcpu>` and `<vcpus>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vcpus {
    /// The line of `<vcpu>`.
    pub line: u32,
    /// As many as there may be.
    pub max: u32,
    /// `current=`: as many as there are at boot; all without it.
    pub current: Option<u32>,
}

impl Vcpus {
    /// As many as there are at boot.
    pub fn at_boot(&self) -> u32 {
        self.current.unwrap_or(self.max)
    }
}

/// `<iothreads>` and `<iothreadids>`: the ids of all of them, and of some what they need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoThreads {
    /// One after another.
    pub threads: Vec<IoThread>,
}

/// One I/O thread; its alias is `iothread` and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoThread {
    /// From 1.
    pub id: u32,
    /// `thread_pool_min=`.
    pub thread_pool_min: Option<u32>,
    /// `thread_pool_max=`.
    pub thread_pool_max: Option<u32>,
    /// `<poll max>` in nanoseconds.
    pub poll_max: Option<u64>,
    /// `<poll grow>`.
    pub poll_grow: Option<u64>,
    /// `<poll shrink>`.
    pub poll_shrink: Option<u64>,
}

words! {
    /// Where a CPU's model comes from.
    CpuMode {
        Custom = "custom",
        HostModel = "host-model",
        HostPassthrough = "host-passthrough",
        Maximum = "maximum",
    }
}

words! {
    /// How the host's CPU has to fit the model.
    CpuMatch {
        Exact = "exact",
        Minimum = "minimum",
        Strict = "strict",
    }
}

words! {
    /// What becomes of a CPU feature.
    FeaturePolicy {
        Force = "force",
        Require = "require",
        Optional = "optional",
        Disable = "disable",
        Forbid = "forbid",
    }
}

/// `<cpu>`. Once the domain is expanded with an expansion for this host, `host-model` is `custom` with a model and its features.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    /// The line of its element.
    pub line: u32,
    /// `mode=`; custom without it.
    pub mode: Option<CpuMode>,
    /// `match=`.
    pub matching: Option<CpuMatch>,
    /// `migratable=`.
    pub migratable: Option<bool>,
    /// `<model>`, in libvirt's spelling.
    pub model: Option<String>,
    /// `<vendor>`.
    pub vendor: Option<String>,
    /// `<model vendor_id>`: what CPUID says, twelve characters.
    pub vendor_id: Option<String>,
    /// `<feature>`, in libvirt's spelling.
    pub features: Vec<CpuFeature>,
    /// `<topology>`.
    pub topology: Option<Topology>,
    /// `<cache>`.
    pub cache: Option<CpuCache>,
    /// `<maxphysaddr>`.
    pub max_phys_addr: Option<MaxPhysAddr>,
    /// `<numa>`.
    pub numa: Vec<NumaCell>,
}

/// `<cpu><feature>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuFeature {
    /// The line of its element.
    pub line: u32,
    /// Its name, in libvirt's spelling.
    pub name: String,
    /// What becomes of it; require without one.
    pub policy: FeaturePolicy,
}

/// `<topology>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// The line of its element.
    pub line: u32,
    /// At least 1.
    pub sockets: u32,
    /// For each socket.
    pub dies: u32,
    /// For each die.
    pub clusters: u32,
    /// For each cluster.
    pub cores: u32,
    /// For each core.
    pub threads: u32,
}

words! {
    /// Whose cache the guest sees.
    CacheMode {
        Emulate = "emulate",
        Passthrough = "passthrough",
        Disable = "disable",
    }
}

/// `<cache>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuCache {
    /// Whose.
    pub mode: CacheMode,
    /// Of which level.
    pub level: Option<u32>,
}

/// `<maxphysaddr>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxPhysAddr {
    /// Whether it is the host's, otherwise `bits`.
    pub is_passthrough: bool,
    /// As many bits.
    pub bits: Option<u32>,
    /// At most as many of the host's.
    pub limit: Option<u32>,
}

/// `<numa><cell>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaCell {
    /// The line of its element.
    pub line: u32,
    /// Its number.
    pub id: u32,
    /// Its virtual CPUs, `0-3,5`.
    pub cpus: Option<String>,
    /// Its memory in bytes.
    pub memory: u64,
    /// `memAccess=`.
    pub access: Option<super::memory::MemoryAccess>,
    /// `discard=`.
    pub discards: Option<bool>,
    /// How far other cells are: their number, 10 to 255.
    pub distances: Vec<(u32, u32)>,
}

pub(super) fn read_vcpus(domain: &View<'_>) -> Vcpus {
    let vcpus = domain.one("vcpu", |vcpu| {
        vcpu.ignore(&["placement"]);
        vcpu.leave_out(&["cpuset"], "virtual CPUs are not pinned to the host's");
        Vcpus {
            line: vcpu.line(),
            max: vcpu.text_number().unwrap_or(0),
            current: vcpu.number("current"),
        }
    });
    let vcpus = vcpus.unwrap_or(Vcpus {
        line: 0,
        max: 1,
        current: None,
    });
    if vcpus.max == 0 || vcpus.at_boot() == 0 || vcpus.at_boot() > vcpus.max {
        domain.error(
            format!("it has {} of {} virtual CPUs", vcpus.at_boot(), vcpus.max),
            None,
        );
    }
    domain.one("vcpus", |all| {
        let enabled = all.each("vcpu", |vcpu| {
            vcpu.number::<u32>("id");
            vcpu.ignore(&["hotpluggable", "order"]);
            vcpu.switch("enabled") != Some(false)
        });
        let count = enabled.iter().filter(|is_enabled| **is_enabled).count();
        let first = enabled.iter().take_while(|is_enabled| **is_enabled).count();
        if count != first || u32::try_from(count) != Ok(vcpus.at_boot()) {
            all.error(
                "only the first virtual CPUs can be there at boot, as many as <vcpu current> says",
                None,
            );
        }
    });
    vcpus
}

pub(super) fn read_iothreads(domain: &View<'_>) -> IoThreads {
    let count: u32 = domain.one_some("iothreads", View::text_number).unwrap_or(0);
    const MOST: u32 = 4096;
    if count > MOST {
        domain.error(format!("{count} I/O threads are more than {MOST}"), None);
        return IoThreads::default();
    }
    let mut threads = domain
        .one("iothreadids", |ids| ids.each("iothread", read_iothread))
        .unwrap_or_default();
    let mut next = 1;
    while threads.len() < count as usize {
        if threads.iter().all(|thread| thread.id != next) {
            threads.push(IoThread::new(next));
        }
        next += 1;
    }
    IoThreads { threads }
}

impl IoThread {
    fn new(id: u32) -> Self {
        IoThread {
            id,
            thread_pool_min: None,
            thread_pool_max: None,
            poll_max: None,
            poll_grow: None,
            poll_shrink: None,
        }
    }
}

fn read_iothread(view: &View<'_>) -> IoThread {
    let mut thread = IoThread::new(view.number("id").unwrap_or(0));
    if thread.id == 0 {
        view.error("an I/O thread needs an id from 1", None);
    }
    thread.thread_pool_min = view.number("thread_pool_min");
    thread.thread_pool_max = view.number("thread_pool_max");
    view.one("poll", |poll| {
        (
            poll.number("max"),
            poll.number("grow"),
            poll.number("shrink"),
        )
    })
    .map_or(thread.clone(), |(poll_max, poll_grow, poll_shrink)| {
        IoThread {
            poll_max,
            poll_grow,
            poll_shrink,
            ..thread
        }
    })
}

pub(super) fn read_cpu(view: &View<'_>) -> Cpu {
    // How libvirt checks the host's CPU; we ask QEMU.
    view.ignore(&["check", "deprecated_features"]);
    let model = view.one("model", |model| {
        model.ignore(&["fallback"]);
        (model.text(), model.attribute("vendor_id"))
    });
    let (model, vendor_id) = model.unwrap_or_default();
    let cpu = Cpu {
        line: view.line(),
        mode: view.word("mode"),
        matching: view.word("match"),
        migratable: view.switch("migratable"),
        model,
        vendor: view.child_text("vendor"),
        vendor_id,
        features: view.each("feature", |feature| CpuFeature {
            line: feature.line(),
            name: feature.required("name"),
            policy: feature.word("policy").unwrap_or(FeaturePolicy::Require),
        }),
        topology: view.one("topology", read_topology),
        cache: view.one_some("cache", |cache| {
            Some(CpuCache {
                level: cache.number("level"),
                mode: cache.required_word("mode")?,
            })
        }),
        max_phys_addr: view.one("maxphysaddr", |addr| MaxPhysAddr {
            is_passthrough: match addr.required("mode").as_str() {
                "passthrough" => true,
                "emulate" | "" => false,
                other => {
                    addr.error(
                        format!("mode {other:?} is none of passthrough, emulate"),
                        None,
                    );
                    false
                }
            },
            bits: addr.number("bits"),
            limit: addr.number("limit"),
        }),
        numa: view.one("numa", read_numa).unwrap_or_default(),
    };
    if cpu.mode == Some(CpuMode::Custom) && cpu.model.is_none() {
        view.error("mode custom needs a <model>", None);
    }
    cpu
}

fn read_topology(view: &View<'_>) -> Topology {
    let at_least_one = |name| {
        let number: u32 = view.number(name).unwrap_or(1);
        if number == 0 {
            view.error(format!("there cannot be 0 {name}"), None);
        }
        number
    };
    Topology {
        line: view.line(),
        sockets: at_least_one("sockets"),
        dies: at_least_one("dies"),
        clusters: at_least_one("clusters"),
        cores: at_least_one("cores"),
        threads: at_least_one("threads"),
    }
}

fn read_numa(view: &View<'_>) -> Vec<NumaCell> {
    view.refuse_elements(
        &["interconnects"],
        "latencies between cells are not modelled",
        None,
    );
    let mut cells = view.each("cell", |cell| {
        cell.refuse_elements(&["cache"], "caches of memory are not modelled", None);
        cell.required("memory");
        NumaCell {
            line: cell.line(),
            id: cell.number("id").unwrap_or(u32::MAX),
            cpus: cell.attribute("cpus"),
            memory: cell.size_attribute("memory", "unit").unwrap_or(0),
            access: cell.word("memAccess"),
            discards: cell.switch("discard"),
            distances: cell
                .one("distances", |distances| {
                    distances.each("sibling", |sibling| {
                        (
                            sibling.number("id").unwrap_or(0),
                            sibling.number("value").unwrap_or(10),
                        )
                    })
                })
                .unwrap_or_default(),
        }
    });
    for (number, cell) in (0..).zip(&mut cells) {
        if cell.id == u32::MAX {
            cell.id = number;
        }
    }
    cells
}
