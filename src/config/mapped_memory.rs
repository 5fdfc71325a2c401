//! Guest RAM as a private mapping of an image: the arguments for it, and the way back.
//!
//! Each large RAMBlock that the arguments can give a file is mapped: main RAM, and every `-object memory-backend-…`, such as
//! those of NUMA nodes and of plugged DIMMs. A backend becomes a `memory-backend-file` with the same id and all that the
//! guest's host was told of it, `share=off,readonly=on,rom=off`: QEMU opens the image for reading only, maps it private
//! and writable, and can neither write to it nor punch holes into it. Whatever needs shared or pinned memory is refused
//! by name.
//!
//! A guest that runs so is saved as if it had ordinary memory ([`unmap`]): all of its RAM is in its image.
//!
//! Source: QEMU `backends/hostmem-file.c`, `hw/core/machine.c` (`hw_compat_3_1`: block names of machine types up to
//! 3.1); seen with QEMU 10.0.

use super::arguments::{Argument, Arguments};
use super::compat::{Finding, QemuVersion};
use super::properties::Properties;

/// The first QEMU that maps a file private and writable which it opened for reading only.
pub const MINIMUM_QEMU: QemuVersion = QemuVersion(8, 2, 0);

/// The names that QEMU's machines give main RAM where nobody else names it.
const MAIN_RAM: [&str; 2] = ["pc.ram", "microvm.ram"];

/// What decides whether a RAMBlock's name is the backend's whole path or its id.
const CANONICAL: &str = "x-use-canonical-path-for-ramblock-id";

/// Devices that reach into guest memory from outside, or keep all of it from being given back.
const DEVICES: [&str; 7] = [
    "vhost-user",
    "vhost-vdpa",
    "vfio-",
    "ivshmem",
    "virtio-mem",
    "virtio-pmem",
    "nvdimm",
];

/// A RAMBlock, and where its pages lie in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInFile {
    /// QEMU's name for it.
    pub idstr: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// Where its first page lies.
    pub offset: u64,
}

/// Arguments with which QEMU maps memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapped {
    /// The arguments.
    pub arguments: Arguments,
    /// The names of the RAMBlocks that are mapped.
    pub blocks: Vec<String>,
}

/// Whether a QEMU is too old; `None` if not.
pub fn check_qemu(version: QemuVersion, path: &str) -> Option<Finding> {
    (version < MINIMUM_QEMU).then(|| {
        let fact = format!(
            "{path} is QEMU {version}, which could only map an image that it may write to; {MINIMUM_QEMU} or later need not"
        );
        Finding::refusal("map.qemu", fact, "--qemu PATH, or restore without --map".to_owned())
    })
}

/// Lets QEMU map what it can of `blocks` from the file `path`.
///
/// # Errors
/// Every reason that stands against it, `map.memory`.
pub fn map(
    arguments: &Arguments,
    path: &str,
    blocks: &[BlockInFile],
) -> Result<Mapped, Vec<Finding>> {
    let mut reasons: Vec<String> = arguments.items.iter().filter_map(obstacle).collect();
    let mut mapped = Mapped {
        arguments: arguments.clone(),
        blocks: Vec::new(),
    };
    for item in &mut mapped.arguments.items {
        if item.name() != Some("object") {
            continue;
        }
        let Some((id, block)) = backend(item, blocks) else {
            continue;
        };
        match obstacle_of_backend(&item.properties()) {
            Some(problem) => reasons.push(format!("its memory backend {id:?} {problem}")),
            None => {
                item.edit(|object| become_file(object, path, block, &id));
                mapped.blocks.push(block.idstr.clone());
            }
        }
    }
    if let Some(block) = unnamed_main_ram(arguments, blocks) {
        let id = &block.idstr;
        let mut object = Argument::with_value("object", format!("memory-backend-ram,id={id}"));
        object.edit(|object| {
            object.set_number("size", block.used_length);
            become_file(object, path, block, id);
        });
        mapped.arguments.items.push(object);
        let machine = Argument::with_value("machine", format!("memory-backend={id}"));
        mapped.arguments.items.push(machine);
        mapped.blocks.push(id.clone());
    }
    if reasons.is_empty() && mapped.blocks.is_empty() {
        reasons.push("none of its memory lies where QEMU could map it".to_owned());
    }
    match reasons.is_empty() {
        true => Ok(mapped),
        false => Err(reasons.into_iter().map(refusal).collect()),
    }
}

fn refusal(fact: String) -> Finding {
    Finding::refusal("map.memory", fact, None)
}

/// Why an argument keeps memory from being mapped.
fn obstacle(argument: &Argument) -> Option<String> {
    let value = argument.properties();
    let driver = value.get("driver").unwrap_or_default();
    let kind = value.get("type").unwrap_or_default();
    let problem = match argument.name()? {
        "mem-path" | "mem-prealloc" => "says where its memory lies",
        "overcommit" | "realtime" if value.is_on("mem-lock") || value.is_on("mlock") => {
            "locks all of its memory"
        }
        "netdev" if kind == "vhost-user" || kind == "vhost-vdpa" => {
            "lets others into its memory, which must be shared or stay where it is"
        }
        "device" if DEVICES.iter().any(|prefix| driver.starts_with(prefix)) => {
            "needs memory that is shared, stays where it is, or is a file of its own"
        }
        _ => return None,
    };
    Some(format!("{} {problem}", argument.shown()))
}

/// The RAMBlock of a memory backend, with the backend's id; `None` if it has none or is no backend.
fn backend<'b>(object: &Argument, blocks: &'b [BlockInFile]) -> Option<(String, &'b BlockInFile)> {
    let object = object.properties();
    let is_backend = object.get("qom-type")?.starts_with("memory-backend-");
    let id = object.get("id").filter(|_| is_backend)?;
    let path = format!("/objects/{id}");
    let mut blocks = blocks.iter();
    let block = blocks.find(|block| block.idstr == id || block.idstr == path)?;
    Some((id, block))
}

fn obstacle_of_backend(object: &Properties) -> Option<&'static str> {
    let kind = object.get("qom-type").unwrap_or_default();
    let share = object.get("share");
    // Of these two nobody says that they are shared.
    let is_shared_unsaid = share.is_none() && kind == "memory-backend-memfd";
    let path = object.get("mem-path").unwrap_or_default();
    if object.is_on("share") || is_shared_unsaid || kind == "memory-backend-shm" {
        Some("is shared with other processes")
    } else if object.is_on("hugetlb") || path.contains("hugepages") {
        Some("has huge pages, which no image has")
    } else if object.is_on("prealloc") {
        Some("wants all of its pages at once (prealloc)")
    } else if object.is_on("pmem") || object.is_on("readonly") {
        Some("is a file that outlives the guest")
    } else {
        None
    }
}

/// Main RAM that no argument names, and that QEMU would make itself.
fn unnamed_main_ram<'b>(
    arguments: &Arguments,
    blocks: &'b [BlockInFile],
) -> Option<&'b BlockInFile> {
    let names_backend =
        |(_, machine): (usize, &Argument)| machine.properties().get("memory-backend").is_some();
    let names_nodes = |(_, node): (usize, &Argument)| node.properties().get("memdev").is_some();
    let is_named = arguments.options("machine").any(names_backend)
        || arguments.options("numa").any(names_nodes);
    let mut blocks = blocks.iter().filter(|_| !is_named);
    blocks.find(|block| MAIN_RAM.contains(&block.idstr.as_str()))
}

fn become_file(object: &mut Properties, path: &str, block: &BlockInFile, id: &str) {
    for key in [
        "hugetlb",
        "hugetlbsize",
        "seal",
        "discard-data",
        "align",
        "pmem",
    ] {
        object.remove(key);
    }
    object.set("qom-type", "memory-backend-file");
    object.set("mem-path", path);
    object.set_number("offset", block.offset);
    object.set("share", "off");
    object.set("readonly", "on");
    object.set_text("rom", "off");
    // Up to 3.1 the machine type decides by the kind of the backend, which is another one now.
    object.set(CANONICAL, if block.idstr == id { "off" } else { "on" });
}

/// Gives memory that is mapped from an image back to QEMU's own: the guest's next image has all of it.
pub fn unmap(arguments: &mut Arguments) {
    let objects = arguments.items.iter_mut();
    for item in objects.filter(|item| item.name() == Some("object")) {
        item.edit(|object| {
            if is_mapped(object) {
                become_ram(object);
            }
        });
    }
}

fn is_mapped(object: &Properties) -> bool {
    let is_off = |key| object.get(key).is_some_and(|value| value == "off");
    object.get("qom-type").as_deref() == Some("memory-backend-file")
        && object.is_on("readonly")
        && is_off("rom")
        && is_off("share")
}

fn become_ram(object: &mut Properties) {
    for key in ["mem-path", "offset", "share", "readonly", "rom"] {
        object.remove(key);
    }
    if !object.is_on(CANONICAL) {
        object.remove(CANONICAL);
    }
    object.set("qom-type", "memory-backend-ram");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Arguments {
        Arguments::parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    fn block(idstr: &str, offset: u64) -> BlockInFile {
        BlockInFile {
            idstr: idstr.to_owned(),
            used_length: 512 << 20,
            offset,
        }
    }

    fn mapped(line: &str, blocks: &[BlockInFile]) -> (String, Vec<String>) {
        let mapped = map(&arguments(line), "/x.stow", blocks).unwrap();
        (mapped.arguments.write().join(" "), mapped.blocks)
    }

    fn refused(line: &str) -> String {
        let blocks = [block("pc.ram", 4096), block("m0", 8192)];
        let findings = map(&arguments(line), "/x.stow", &blocks).unwrap_err();
        let facts: Vec<_> = findings.into_iter().map(|finding| finding.fact).collect();
        facts.join("; ")
    }

    const FILE: &str = "mem-path=/x.stow,offset=4096,share=off,readonly=on,rom=off,\
        x-use-canonical-path-for-ramblock-id=off";

    #[test]
    fn main_ram_gets_a_backend_of_its_name() {
        let (line, blocks) = mapped("qemu -machine pc -m 512", &[block("pc.ram", 4096)]);
        let object = format!("memory-backend-file,id=pc.ram,size=536870912,{FILE}");
        let wanted =
            format!("qemu -machine pc -m 512 -object {object} -machine memory-backend=pc.ram");
        assert_eq!(
            (line.as_str(), blocks.as_slice()),
            (wanted.as_str(), &["pc.ram".to_owned()][..])
        );
    }

    #[test]
    fn a_backend_keeps_its_id_and_policy() {
        let numa = "qemu -object memory-backend-ram,id=m0,size=512M,host-nodes=0,policy=bind -numa node,memdev=m0";
        let (line, blocks) = mapped(numa, &[block("m0", 4096)]);
        let object = format!("memory-backend-file,id=m0,size=512M,host-nodes=0,policy=bind,{FILE}");
        assert_eq!(line, format!("qemu -object {object} -numa node,memdev=m0"));
        assert_eq!(blocks, ["m0"]);
        let json =
            r#"qemu -object {"qom-type":"memory-backend-memfd","id":"m0","share":false,"size":5}"#;
        let (line, _) = mapped(json, &[block("/objects/m0", 4096)]);
        let json = line.strip_prefix("qemu -object ").unwrap();
        let object: serde_json::Value = serde_json::from_str(json).unwrap();
        let wanted = serde_json::json!({
            "qom-type": "memory-backend-file", "id": "m0", "size": 5, "mem-path": "/x.stow", "offset": 4096,
            "share": false, "readonly": true, "rom": "off", CANONICAL: true,
        });
        assert_eq!(object, wanted);
    }

    #[test]
    fn the_way_back_names_no_image_and_is_a_fixed_point() {
        let numa =
            "qemu -object memory-backend-ram,id=m0,size=512M,policy=bind -numa node,memdev=m0";
        for line in [numa, "qemu -m 512"] {
            let blocks = [block("m0", 4096), block("pc.ram", 4096)];
            let mut back = map(&arguments(line), "/x.stow", &blocks).unwrap().arguments;
            unmap(&mut back);
            let text = back.write().join(" ");
            assert!(
                !text.contains("x.stow") && !text.contains("readonly"),
                "{text}"
            );
            let mut again = map(&back, "/y.stow", &blocks).unwrap().arguments;
            unmap(&mut again);
            assert_eq!(again, back);
        }
    }

    #[test]
    fn memory_that_is_shared_pinned_or_huge_is_refused_by_name() {
        for (line, says) in [
            (
                "qemu -object memory-backend-ram,id=m0,share=on",
                "\"m0\" is shared",
            ),
            (
                "qemu -object memory-backend-memfd,id=m0",
                "\"m0\" is shared",
            ),
            (
                "qemu -object memory-backend-file,id=m0,mem-path=/dev/hugepages",
                "huge pages",
            ),
            (
                "qemu -object memory-backend-ram,id=m0,prealloc=on",
                "prealloc",
            ),
            (
                "qemu -device vfio-pci,host=01:00.0",
                "vfio-pci,host=01:00.0 needs",
            ),
            (
                "qemu -netdev vhost-user,id=n,chardev=c",
                "-netdev vhost-user",
            ),
            ("qemu -overcommit mem-lock=on", "locks all"),
            ("qemu -mem-path /dev/shm", "-mem-path /dev/shm"),
        ] {
            let said = refused(line);
            assert!(said.contains(says), "{line}: {said}");
        }
        let nothing = map(
            &arguments("qemu -m 512"),
            "/x",
            &[block("0:2/vga.vram", 4096)],
        );
        assert!(nothing.unwrap_err()[0].fact.contains("none of its memory"));
    }
}
