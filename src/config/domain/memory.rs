//! Memory: how much, what it is made of, and modules that can be plugged.

use super::address::DeviceInfo;
use super::view::View;
use super::word::words;

/// Memory as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// The line of `<memory>`.
    pub line: u32,
    /// `<memory>` in bytes, as written; QEMU gets whole MiB. Modules are part of it.
    pub total: u64,
    /// `<currentMemory>` in bytes: what the balloon leaves.
    pub current: Option<u64>,
    /// `<maxMemory>`.
    pub max: Option<MaxMemory>,
    /// `<memory dumpCore>`.
    pub dump_core: Option<bool>,
    /// `<memoryBacking>`.
    pub backing: MemoryBacking,
}

impl Memory {
    /// What there is at boot: all but what `modules` bring, in whole MiB, in bytes.
    pub fn initial(&self, modules: &[MemoryModule]) -> u64 {
        const MIB: u64 = 1 << 20;
        let of_modules: u64 = modules.iter().map(|module| module.size).sum();
        self.total.saturating_sub(of_modules).div_ceil(MIB) * MIB
    }
}

/// `<maxMemory>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxMemory {
    /// The line of its element.
    pub line: u32,
    /// In bytes.
    pub size: u64,
    /// For as many modules.
    pub slots: u32,
}

words! {
    /// Where memory comes from.
    MemorySource {
        File = "file",
        Anonymous = "anonymous",
        Memfd = "memfd",
    }
}

words! {
    /// Who else sees memory.
    MemoryAccess {
        Shared = "shared",
        Private = "private",
    }
}

words! {
    /// When memory is taken.
    Allocation {
        Immediate = "immediate",
        OnDemand = "ondemand",
    }
}

/// `<memoryBacking>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryBacking {
    /// The line of its element; 0 if there is none.
    pub line: u32,
    /// `<hugepages>`; with no page in it, of the host's default size.
    pub huge_pages: Option<Vec<HugePage>>,
    /// `<nosharepages/>`.
    pub no_share_pages: bool,
    /// `<locked/>`.
    pub is_locked: bool,
    /// `<source type>`.
    pub source: Option<MemorySource>,
    /// `<access mode>`.
    pub access: Option<MemoryAccess>,
    /// `<allocation mode>`.
    pub allocation: Option<Allocation>,
    /// `<allocation threads>`.
    pub allocation_threads: Option<u32>,
    /// `<discard/>`: memory is given up as QEMU ends.
    pub discards: bool,
}

/// `<hugepages><page>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugePage {
    /// Its size in bytes.
    pub size: u64,
    /// The NUMA cells that it is for, `0-3,5`; all others without it.
    pub nodeset: Option<String>,
}

words! {
    /// What a memory module is.
    MemoryModel {
        Dimm = "dimm",
        Nvdimm = "nvdimm",
        VirtioMem = "virtio-mem",
        VirtioPmem = "virtio-pmem",
    }
}

/// `<memory model>` among the devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryModule {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: MemoryModel,
    /// `access=`.
    pub access: Option<MemoryAccess>,
    /// `discard=`.
    pub discards: Option<bool>,
    /// `<uuid>` of an NVDIMM.
    pub uuid: Option<String>,
    /// `<target><size>` in bytes.
    pub size: u64,
    /// `<target><node>`.
    pub node: Option<u32>,
    /// `<target><label><size>` of an NVDIMM in bytes.
    pub label_size: Option<u64>,
    /// `<target><readonly/>`.
    pub read_only: bool,
    /// `<target><block>` of virtio-mem in bytes.
    pub block: Option<u64>,
    /// `<target><requested>` of virtio-mem in bytes.
    pub requested: Option<u64>,
    /// `<target dynamicMemslots>`.
    pub dynamic_memslots: Option<bool>,
    /// `<source><path>`.
    pub path: Option<String>,
    /// `<source><pagesize>` in bytes.
    pub page_size: Option<u64>,
    /// `<source><alignsize>` in bytes.
    pub align: Option<u64>,
    /// `<source><pmem/>`.
    pub is_pmem: bool,
}

pub(super) fn read_memory(domain: &View<'_>) -> Memory {
    let memory = domain.one("memory", |memory| {
        (
            memory.line(),
            memory.size().unwrap_or(0),
            memory.switch("dumpCore"),
        )
    });
    let (line, total, dump_core) = memory.unwrap_or_default();
    if memory.is_none() {
        domain.error(
            "it has no <memory>",
            Some("say how much the guest has: <memory unit='GiB'>2</memory>"),
        );
    } else if total == 0 {
        domain.error("a guest needs memory", None);
    }
    Memory {
        line,
        total,
        current: domain.one_some("currentMemory", View::size),
        max: domain.one("maxMemory", |max| MaxMemory {
            line: max.line(),
            size: max.size().unwrap_or(0),
            slots: max.number("slots").unwrap_or(0),
        }),
        dump_core,
        backing: domain
            .one("memoryBacking", read_backing)
            .unwrap_or_default(),
    }
}

fn read_backing(view: &View<'_>) -> MemoryBacking {
    let allocation = view.one("allocation", |allocation| {
        (allocation.word("mode"), allocation.number("threads"))
    });
    let (allocation, allocation_threads) = allocation.unwrap_or_default();
    MemoryBacking {
        line: view.line(),
        huge_pages: view.one("hugepages", |pages| pages.each_some("page", read_huge_page)),
        no_share_pages: view.has("nosharepages"),
        is_locked: view.has("locked"),
        source: view.one_some("source", |source| source.required_word("type")),
        access: view.one_some("access", |access| access.required_word("mode")),
        allocation,
        allocation_threads,
        discards: view.has("discard"),
    }
}

fn read_huge_page(view: &View<'_>) -> Option<HugePage> {
    view.required("size");
    Some(HugePage {
        size: view.size_attribute("size", "unit")?,
        nodeset: view.attribute("nodeset"),
    })
}

pub(super) fn read_module(view: &View<'_>) -> Option<MemoryModule> {
    let model = view.required_word("model");
    let info = view.device_info();
    let source = view.one("source", |source| {
        source.leave_out_elements(
            &["nodemask"],
            "where on the host memory lies is left to the host",
        );
        (
            source.child_text("path"),
            source.one_some("pagesize", View::size),
            source.one_some("alignsize", View::size),
            source.has("pmem"),
        )
    });
    let target = view.one("target", |target| {
        target.ignore_elements(&["current"]);
        target.refuse_elements(
            &["address"],
            "the place of a virtio module cannot be chosen yet",
            None,
        );
        Target {
            size: target.one_some("size", View::size),
            node: target.one_some("node", View::text_number),
            label_size: target.one_some("label", |label| label.one_some("size", View::size)),
            read_only: target.has("readonly"),
            block: target.one_some("block", View::size),
            requested: target.one_some("requested", View::size),
            dynamic_memslots: target.switch("dynamicMemslots"),
        }
    });
    let target = target.unwrap_or_default();
    let (path, page_size, align, is_pmem) = source.unwrap_or_default();
    let module = MemoryModule {
        info,
        model: model?,
        access: view.word("access"),
        discards: view.switch("discard"),
        uuid: view.child_text("uuid"),
        size: target.size.unwrap_or(0),
        node: target.node,
        label_size: target.label_size,
        read_only: target.read_only,
        block: target.block,
        requested: target.requested,
        dynamic_memslots: target.dynamic_memslots,
        path,
        page_size,
        align,
        is_pmem,
    };
    if module.size == 0 {
        view.error("a memory module needs <target><size>", None);
    }
    let needs_path = matches!(module.model, MemoryModel::Nvdimm | MemoryModel::VirtioPmem);
    if needs_path && module.path.is_none() {
        view.error("it needs <source><path>", None);
    }
    Some(module)
}

#[derive(Default)]
struct Target {
    size: Option<u64>,
    node: Option<u32>,
    label_size: Option<u64>,
    read_only: bool,
    block: Option<u64>,
    requested: Option<u64>,
    dynamic_memslots: Option<bool>,
}
