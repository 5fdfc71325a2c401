//! `vmstow inspect`

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::ask_qemu::AskQemuArgs;
use super::ui::{Ui, printable};
use super::{About, Outcome};
use crate::container::manifest::{Resource, StreamSummary};
use crate::image::foreign::{self, ForeignFile, Found};
use crate::image::{self, ImageError, LibvirtSave};
use crate::inspect::{self, ImageDescription, StreamDescription};
use crate::store::Location;
use crate::units::human_bytes;

/// Show what an image holds
///
/// Reads the footer, the directory and the manifest only, however large the guest is. A libvirt save image (`virsh save`) and
/// a bare migration stream of QEMU (`migrate file:`) can be inspected too; they are read to their end.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The image, a libvirt save image, or a bare migration stream
    pub(super) image: Location,

    /// Print the guest's domain XML
    #[arg(long)]
    xml: bool,

    /// Show the saved state of every device, field by field
    #[arg(long, conflicts_with = "xml")]
    pub(super) devices: bool,

    /// Show the saved state of one device: IDSTR, or IDSTR#INSTANCE where several have the same name
    #[arg(long, value_name = "NAME", conflicts_with_all = ["xml", "devices"])]
    pub(super) device: Option<String>,

    /// Write that device's bytes as they are in the stream
    #[arg(long, requires = "device")]
    pub(super) raw: bool,

    /// Show the registers of each virtual processor
    #[arg(long, conflicts_with_all = ["xml", "devices", "device"])]
    pub(super) registers: bool,

    #[command(flatten)]
    ask_qemu: AskQemuArgs,
}

impl InspectArgs {
    fn looks_at_devices(&self) -> bool {
        self.devices || self.device.is_some() || self.registers
    }
}

/// Prints the description.
pub fn run(args: &InspectArgs, ui: &Ui) -> Outcome {
    if args.looks_at_devices() {
        let opened = image::open_any(&args.image, ui).about(&args.image)?;
        let devices = args.ask_qemu.devices(&opened, &args.image, ui)?;
        return super::devices::show(args, &devices, ui);
    }
    let opened = match foreign::find(&args.image).about(&args.image)? {
        Found::Image(opened) => opened,
        Found::Foreign(foreign) => return inspect_foreign(args, *foreign, ui),
    };
    if args.xml {
        ui.print(&opened.image().xml().about(&args.image)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let description = inspect::describe(&opened).about(&args.image)?;
    ui.answer(&description, human)?;
    Ok(ExitCode::SUCCESS)
}

fn inspect_foreign(args: &InspectArgs, foreign: ForeignFile, ui: &Ui) -> Outcome {
    if args.xml {
        let (_, metadata) = foreign
            .save
            .as_ref()
            .ok_or(ImageError::BareStream)
            .about(&args.image)?;
        ui.print(&metadata.xml)?;
        return Ok(ExitCode::SUCCESS);
    }
    let described = inspect::describe_foreign(foreign, &args.image, ui);
    let (description, broken) = described.about(&args.image)?;
    ui.answer(&description, human_stream)?;
    match broken {
        Some(error) => Err(error).about(&args.image),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Rows of `name: value`.
struct Rows(String);

impl Rows {
    fn row(&mut self, name: &str, value: impl std::fmt::Display) {
        let name = if name.is_empty() {
            String::new()
        } else {
            format!("{name}:")
        };
        let _ = writeln!(
            self.0,
            "{name:>10} {}",
            printable(&value.to_string()).replace('\n', "\\n")
        );
    }
}

fn human(description: &ImageDescription) -> String {
    let manifest = &description.manifest;
    let mut rows = Rows(String::new());
    let uuid = manifest
        .guest
        .uuid
        .map_or(String::new(), |uuid| format!(" ({uuid})"));
    rows.row("guest", format!("{}{uuid}", manifest.guest.name));
    rows.row(
        "saved",
        format!(
            "{}, {} at the time",
            manifest.saved_at, manifest.guest.run_state
        ),
    );
    rows.row(
        "machine",
        format!(
            "{}, {} vCPU, {}",
            manifest.machine.machine_type, manifest.machine.vcpus, manifest.machine.accelerator
        ),
    );
    rows.row("memory", memory(description));
    rows.row(
        "qemu",
        format!("{} ({})", manifest.qemu.version, manifest.qemu.binary),
    );
    for (index, resource) in manifest.resources.iter().enumerate() {
        rows.row(
            if index == 0 { "resources" } else { "" },
            resource_line(resource),
        );
    }
    rows.row("devices", format!("{} sections", manifest.sections.len()));
    rows.row("capture", capture(manifest.stream.as_ref()));
    for (index, (key, value)) in description.labels().iter().enumerate() {
        rows.row(
            if index == 0 { "labels" } else { "" },
            format!("{key}={value}"),
        );
    }
    rows.row(
        "image",
        format!(
            "{}, layout {}, format {}, generation {}, {} chunks",
            human_bytes(description.file_bytes),
            description.layout,
            description.format_version,
            description.generation,
            description.chunks
        ),
    );
    rows.row("digest", &description.image_digest);
    if let Some(parent) = &description.parent {
        let name = parent.name.as_deref().unwrap_or("of no known name");
        rows.row(
            "parent",
            format!("{name}, image {}: this is a delta", parent.image_uuid),
        );
        match &parent.problem {
            Some(problem) => rows.row("lacks", problem),
            None => rows.row("", parent.found.join(" → ")),
        }
    }
    rows.row("trust", format!("it {}", description.trust));
    let ways = &description.restores;
    for (index, (way, name)) in [
        (&ways.eager, "eager"),
        (&ways.lazy, "--lazy"),
        (&ways.map, "--map"),
    ]
    .into_iter()
    .enumerate()
    {
        let heading = if index == 0 { "restore" } else { "" };
        match way.is_possible {
            true => rows.row(heading, name),
            false => rows.row(heading, format!("not {name}: {}", way.reasons.join("; "))),
        }
    }
    if let Some(bytes) = description.torn_bytes {
        rows.row(
            "damage",
            format!(
                "its last edit was cut off: {} of no use at its end; `vmstow repair` cuts them",
                human_bytes(bytes)
            ),
        );
    }
    rows.0
}

fn memory(description: &ImageDescription) -> String {
    let total = human_bytes(description.manifest.machine.memory_bytes);
    match &description.manifest.stream {
        Some(stream) => format!(
            "{total}, {} of it not zero",
            human_bytes(stream.data_pages.saturating_mul(4096))
        ),
        None => total,
    }
}

/// How the state was taken, and what follows from it.
fn capture(stream: Option<&StreamSummary>) -> &'static str {
    match stream {
        Some(stream) if stream.capture.as_deref() == Some("memory") => {
            "from QEMU's memory, without its description of the devices"
        }
        Some(stream) if !stream.vmdescription => {
            "by migration, without a description of the devices"
        }
        _ => "by migration",
    }
}

/// `disk disk0 (virtio-blk-pci): /srv/web01.qcow2`
fn resource_line(resource: &Resource) -> String {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let frontend =
        text(resource.frontend.as_ref()).map_or(String::new(), |frontend| format!(" ({frontend})"));
    let kind = text(resource.backend.get("type")).unwrap_or_default();
    let backend = text(resource.backend.get("path")).unwrap_or(kind);
    let read_only = if resource.read_only {
        ", read-only"
    } else {
        ""
    };
    format!(
        "{} {}{frontend}: {backend}{read_only}",
        resource.kind, resource.id
    )
}

fn libvirt_rows(rows: &mut Rows, save: &LibvirtSave) {
    let uuid = save.uuid.map_or(String::new(), |uuid| format!(" ({uuid})"));
    let domain = save.domain.as_deref().unwrap_or("not named");
    rows.row("domain", format!("{domain}{uuid}"));
    let cookie = match save.has_cookie {
        true => "with a cookie",
        false => "without a cookie",
    };
    rows.row(
        "header",
        format!(
            "version {}, {}-endian, format {}, {cookie}",
            save.version, save.byte_order, save.format
        ),
    );
    let was = match save.was_running {
        true => "running",
        false => "paused",
    };
    rows.row("saved", format!("{was} at the time"));
}

fn human_stream(description: &StreamDescription) -> String {
    let contents = &description.contents;
    let mut rows = Rows(String::new());
    let what = match (&description.libvirt, description.is_mapped_ram) {
        (Some(_), _) => "a libvirt save image",
        (None, true) => "a bare migration stream of the mapped-ram layout, no image",
        (None, false) => "a bare migration stream, no image",
    };
    let bytes = human_bytes(description.bytes);
    rows.row("stream", format!("{}, {bytes}: {what}", description.stream));
    if let Some(save) = &description.libvirt {
        libvirt_rows(&mut rows, save);
    }
    rows.row(
        "machine",
        description.machine_type.as_deref().unwrap_or("not named"),
    );
    rows.row(
        "run state",
        description.run_state.as_deref().unwrap_or("not named"),
    );
    let data = human_bytes(contents.data_pages.saturating_mul(4096));
    let zero = human_bytes(contents.zero_pages.saturating_mul(4096));
    rows.row("pages", format!("{data} with bytes, {zero} zero"));
    for (index, (idstr, bytes)) in contents.ram_blocks.iter().enumerate() {
        rows.row(
            if index == 0 { "blocks" } else { "" },
            format!("{idstr} {}", human_bytes(*bytes)),
        );
    }
    if !description.is_whole {
        rows.row(
            "",
            "(the stream breaks here; nothing is known of what follows)",
        );
        return rows.0;
    }
    rows.row("devices", contents.devices.join(", "));
    if !description.vmdescription {
        rows.row(
            "",
            "(the stream has no JSON about its devices: their sizes are not known)",
        );
    }
    rows.0
}
