//! `-m`, memory backends, NUMA, memory modules.

use super::json::{Json, Pairs, on_off};
use super::line::{Line, id};
use crate::config::domain::cpu::NumaCell;
use crate::config::domain::memory::{
    Allocation, MemoryAccess, MemoryBacking, MemoryModel, MemoryModule, MemorySource,
};
use crate::config::domain::{DeviceInfo, Domain};

/// The id of the RAM that is not spread over NUMA cells; the name of its RAMBlock too.
pub(super) const RAM: &str = "pc.ram";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The size of huge pages where none is given, on x86-64.
const DEFAULT_HUGE_PAGE: u64 = 2 * MIB;

/// Adds memory and NUMA cells.
pub(super) fn memory(line: &mut Line<'_>, domain: &Domain) {
    let cells = cells(domain);
    let size = initial(domain);
    let mut value = Pairs::new("").with("size", format!("{}k", size / KIB));
    if let Some(max) = domain.memory.max {
        if max.slots > 0 {
            value.push("slots", max.slots);
        }
        value.push(
            "maxmem",
            format!("{}k", max.size.div_ceil(MIB) * (MIB / KIB)),
        );
        if cells.is_empty() {
            let why = "memory can be plugged only into NUMA cells";
            line.error_at(
                "domain/maxMemory",
                max.line,
                why,
                Some("put the memory into one: <cpu><numa><cell …/></numa></cpu>"),
            );
        }
    }
    line.pairs("m", value);
    let backing = &domain.memory.backing;
    if cells.is_empty() {
        let wish = Wish {
            cell: None,
            access: None,
            discards: None,
            size,
        };
        let backend = backend(line, RAM, backing, &wish);
        line.object(backend);
    }
    let is_locked = on_off(backing.is_locked);
    line.option("overcommit", format!("mem-lock={is_locked}"));
    for cell in cells {
        numa_cell(line, backing, cell);
    }
    for cell in cells {
        for (other, distance) in &cell.distances {
            line.option(
                "numa",
                format!("dist,src={},dst={other},val={distance}", cell.id),
            );
        }
    }
}

/// The memory that is there at boot: that of the NUMA cells if there are any.
fn initial(domain: &Domain) -> u64 {
    let cells = cells(domain);
    if cells.is_empty() {
        return domain.memory.initial(&domain.devices.memory_modules);
    }
    cells.iter().map(|cell| whole_mib(cell.memory)).sum()
}

fn cells(domain: &Domain) -> &[NumaCell] {
    domain.cpu.as_ref().map_or(&[], |cpu| &cpu.numa)
}

fn whole_mib(size: u64) -> u64 {
    size.div_ceil(MIB) * MIB
}

fn numa_cell(line: &mut Line<'_>, backing: &MemoryBacking, cell: &NumaCell) {
    let name = format!("ram-node{}", cell.id);
    let wish = Wish {
        cell: Some(cell.id),
        access: cell.access,
        discards: cell.discards,
        size: whole_mib(cell.memory),
    };
    let backend = backend(line, &name, backing, &wish);
    line.object(backend);
    let mut value = Pairs::new("node").with("nodeid", cell.id);
    for cpus in cell.cpus.iter().flat_map(|cpus| cpus.split(',')) {
        value.push("cpus", cpus.trim());
    }
    line.pairs("numa", value.with("memdev", name));
}

/// What a piece of memory shall be, where the domain's `<memoryBacking>` does not say.
struct Wish {
    cell: Option<u32>,
    access: Option<MemoryAccess>,
    discards: Option<bool>,
    size: u64,
}

/// Memory of the kind that the domain asks for.
///
/// Huge pages come by memfd unless a file is asked for: that needs no mounted file system. The RAMBlock of [`RAM`] has its
/// name, as anonymous memory has; those of cells and modules have the names that QEMU gives them.
fn backend(line: &Line<'_>, name: &str, backing: &MemoryBacking, wish: &Wish) -> Json {
    let huge = huge_page(backing, wish.cell);
    let access = wish.access.or(backing.access);
    let is_shared = access == Some(MemoryAccess::Shared);
    let is_file = backing.source == Some(MemorySource::File);
    let is_memfd = backing.source == Some(MemorySource::Memfd) || huge.is_some() || is_shared;
    let mut object = match (is_file, is_memfd) {
        (true, _) => Json::object("memory-backend-file", name)
            .with("mem-path", line.context.memory_directory.as_str())
            .with("share", is_shared)
            .with_some(
                "discard-data",
                wish.discards.or(backing.discards.then_some(true)),
            ),
        (false, true) => Json::object("memory-backend-memfd", name).with("share", is_shared),
        (false, false) => Json::object("memory-backend-ram", name),
    };
    if (is_file || is_memfd) && name == RAM {
        object.set("x-use-canonical-path-for-ramblock-id", false);
    }
    if let (false, Some(size)) = (is_file, huge) {
        object.set("hugetlb", true);
        if size != DEFAULT_HUGE_PAGE {
            object.set("hugetlbsize", size);
        }
    }
    let is_immediate = backing.allocation == Some(Allocation::Immediate) || huge.is_some();
    if is_immediate {
        object.set("prealloc", true);
        object.set_some("prealloc-threads", backing.allocation_threads);
    }
    object.with("size", wish.size)
}

/// The size of the huge pages that the cell shall have, or the memory as a whole.
fn huge_page(backing: &MemoryBacking, cell: Option<u32>) -> Option<u64> {
    let pages = backing.huge_pages.as_ref()?;
    if pages.is_empty() {
        return Some(DEFAULT_HUGE_PAGE);
    }
    let named = pages.iter().find(|page| {
        let nodes = page.nodeset.as_deref();
        nodes.is_some_and(|nodes| cell.is_some_and(|cell| is_in(nodes, cell)))
    });
    let page = named.or_else(|| pages.iter().find(|page| page.nodeset.is_none()));
    page.map(|page| page.size)
}

/// Whether a number is in a list like `0-3,5`.
fn is_in(list: &str, number: u32) -> bool {
    list.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let bounds = (first.trim().parse::<u32>(), last.trim().parse::<u32>());
        matches!(bounds, (Ok(first), Ok(last)) if (first..=last).contains(&number))
    })
}

/// Adds a memory module.
pub(super) fn module(line: &mut Line<'_>, backing: &MemoryBacking, module: &MemoryModule) {
    let memdev = format!("mem{}", id(&module.info));
    let size = whole_mib(module.size);
    let mut object = match &module.path {
        Some(path) => Json::object("memory-backend-file", &memdev)
            .with("mem-path", path.as_str())
            .with("share", module.access == Some(MemoryAccess::Shared))
            .with_some("pmem", module.is_pmem.then_some(true))
            .with_some("readonly", module.read_only.then_some(true))
            .with_some("prealloc", (!module.read_only).then_some(true))
            .with("size", size),
        None => {
            let wish = Wish {
                cell: module.node,
                access: module.access,
                discards: module.discards,
                size,
            };
            backend(line, &memdev, backing, &wish)
        }
    };
    object.set_some("align", module.align);
    if module.model == MemoryModel::VirtioMem {
        // What is not plugged in takes no room.
        object.set("reserve", false);
        object.remove("prealloc");
        object.remove("prealloc-threads");
    }
    line.object(object);
    let device = match module.model {
        MemoryModel::Dimm => Json::device("pc-dimm"),
        MemoryModel::Nvdimm => Json::device("nvdimm")
            .with_some("label-size", module.label_size)
            .with_some("uuid", module.uuid.as_deref())
            .with_switch("unarmed", module.read_only.then_some(true)),
        MemoryModel::VirtioMem => Json::device("virtio-mem-pci")
            .with_some("block-size", module.block)
            .with("requested-size", module.requested.unwrap_or(0))
            .with_some("dynamic-memslots", module.dynamic_memslots),
        MemoryModel::VirtioPmem => Json::device("virtio-pmem-pci"),
    };
    let dimm = module.info.dimm();
    let device = device
        .with("memdev", memdev)
        .with_some("node", module.node)
        .with_some("slot", dimm.and_then(|dimm| dimm.slot))
        .with_some("addr", dimm.and_then(|dimm| dimm.base));
    line.device(device, &module.info);
}

/// A process that serves the guest has to see its memory.
pub(super) fn needs_sharing(line: &mut Line<'_>, domain: &Domain, info: &DeviceInfo) {
    let is_shared = domain.memory.backing.access == Some(MemoryAccess::Shared);
    let cells = cells(domain);
    let are_shared = !cells.is_empty()
        && cells
            .iter()
            .all(|cell| cell.access == Some(MemoryAccess::Shared));
    if !is_shared && !are_shared {
        let try_ =
            "add <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
        line.error(
            info,
            "another process serves it, which has to see the guest's memory",
            Some(try_),
        );
    }
}
