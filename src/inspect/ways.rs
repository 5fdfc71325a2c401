//! In which ways an image can be restored on this host, and what stands against the others: the answers of those that a
//! restore would ask.

use std::path::PathBuf;

use serde::Serialize;

use crate::config::compat::{Finding, QemuVersion};
use crate::config::mapped_memory::{self, BlockInFile};
use crate::config::postcopy::obstacles;
use crate::config::{Arguments, RestoreContext, restore_arguments};
use crate::container::{Layout, Manifest, SectionType};
use crate::error::Result;
use crate::host;
use crate::image::{OpenedImage, Trust};
use crate::pipeline::MappedImage;
use crate::store::Location;

/// The ways.
#[derive(Debug, Clone, Serialize)]
pub struct Ways {
    /// `restore`: all of memory before the guest runs.
    pub eager: Way,
    /// `restore --lazy`: memory as it is asked for.
    pub lazy: Way,
    /// `restore --map`: memory is a mapping of the image.
    pub map: Way,
}

/// One way.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Way {
    /// Whether nothing stands against it, as far as the image and this host tell; disks and the like are `restore --dry-run`'s
    /// business.
    pub is_possible: bool,
    /// What stands against it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

impl Way {
    fn unless(reasons: Vec<String>) -> Self {
        Way {
            is_possible: reasons.is_empty(),
            reasons,
        }
    }
}

/// In which ways the image can be restored here.
///
/// # Errors
/// What is wrong with an image of layout `mapped`.
pub fn ways(opened: &OpenedImage, manifest: &Manifest, trust: &Trust) -> Result<Ways> {
    if manifest.qemu.argv.is_empty() {
        let none = || Way::unless(vec!["its image has no configuration".to_owned()]);
        return Ok(Ways {
            eager: none(),
            lazy: none(),
            map: none(),
        });
    }
    let qemu = qemu_of(manifest, trust);
    let lacks_parent = opened.lack().map(|_| "it lacks its parent".to_owned());
    let against_all = qemu.as_ref().err().cloned().into_iter().chain(lacks_parent);
    let against_all: Vec<String> = against_all.collect();
    Ok(Ways {
        eager: Way::unless(against_all.clone()),
        lazy: Way::unless(
            against_all
                .into_iter()
                .chain(against_lazy(opened, manifest)?)
                .collect(),
        ),
        map: Way::unless(against_map(opened, manifest, qemu)?),
    })
}

/// The QEMU that a restore would take; otherwise why there is none.
fn qemu_of(manifest: &Manifest, trust: &Trust) -> Result<PathBuf, String> {
    let saved = PathBuf::from(&manifest.qemu.binary);
    match trust.is_trusted() && saved.is_file() {
        true => Ok(saved),
        false => host::find_qemu().map_err(|error| error.to_string()),
    }
}

/// What stands against serving memory to a guest that runs.
fn against_lazy(opened: &OpenedImage, manifest: &Manifest) -> Result<Vec<String>> {
    let arguments = Arguments::parse(&manifest.qemu.argv)?;
    let mut reasons: Vec<String> = obstacles(&arguments, host::userfaultfd().obstacle())
        .into_iter()
        .map(fact)
        .collect();
    let mut sections = opened.image().sections().iter();
    if !sections.any(|entry| entry.is_live && entry.section == SectionType::PageMap) {
        reasons.push("the image has no page map".to_owned());
    }
    if *opened.location() == Location::Pipe {
        reasons.push("it comes through a pipe".to_owned());
    }
    Ok(reasons)
}

/// What stands against mapping memory from the image.
fn against_map(
    opened: &OpenedImage,
    manifest: &Manifest,
    qemu: Result<PathBuf, String>,
) -> Result<Vec<String>> {
    let image = opened.image();
    if image.layout() != Layout::Mapped {
        return Ok(vec![format!("its layout is {}", image.layout())]);
    }
    let mut reasons = Vec::new();
    if opened.location().path().is_none() {
        reasons.push("it is no file of this host".to_owned());
    }
    match qemu.map(|path| (host::qemu_version(&path), path)) {
        Ok((Ok(version), path)) => {
            let version = QemuVersion(version.major, version.minor, version.micro);
            let path = path.display().to_string();
            reasons.extend(mapped_memory::check_qemu(version, &path).map(fact));
        }
        Ok((Err(error), _)) => reasons.push(error.to_string()),
        Err(reason) => reasons.push(reason),
    }
    let blocks = MappedImage::open(image)?.blocks.into_iter();
    let blocks: Vec<BlockInFile> = blocks
        .map(|block| BlockInFile {
            offset: block.pages,
            idstr: block.block.idstr,
            used_length: block.block.used_length,
        })
        .collect();
    let context = RestoreContext {
        machine_type: manifest.machine.machine_type.clone(),
        qmp_socket: String::new(),
        log_dir: String::new(),
        name: manifest.guest.name.clone(),
    };
    let kept = Arguments::parse(&manifest.qemu.argv)?;
    let arguments = Arguments::parse(&restore_arguments(&kept, &context, &[])?)?;
    if let Err(findings) = mapped_memory::map(&arguments, "", &blocks) {
        reasons.extend(findings.into_iter().map(fact));
    }
    Ok(reasons)
}

fn fact(finding: Finding) -> String {
    finding.fact
}
