//! `vmstow convert`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::save::{LayoutArg, open_parent};
use super::ui::{Ui, threads};
use super::{About, Outcome};
use crate::codec;
use crate::convert::elf_core::{CoreReport, CoreRequest, elf_core};
use crate::convert::{
    self, ConvertError, ConvertReport, ConvertRequest, ExportForm, ExportReport, ExportRequest,
};
use crate::error::Error;
use crate::host::keys::SigningKey;
use crate::image::OpenedImage;
use crate::image::foreign::libvirt::SaveFormat;
use crate::image::foreign::{self, Found};
use crate::pipeline::{self, Encoding};
use crate::progress::Progress;
use crate::store::{Location, StoreError};
use crate::units::human_bytes;

/// Make an image of another layout, or from and to what libvirt and QEMU write
///
/// IN is an image, a libvirt save image (`virsh save`, all formats), or a migration stream of QEMU (`migrate file:`, also of
/// the mapped-ram layout or compressed). Every chunk of an image is verified on the way; configuration and labels stay. Of a delta
/// a full image is made, with the same digest, unless --parent names another one. The new image is signed by this host's key if the old one is signed by a key that you trust, or with --trust.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// The image or the file of libvirt or QEMU; - reads standard input
    #[arg(value_name = "IN")]
    image: Location,

    /// The new file; - writes to standard output
    out: Location,

    /// What the new file is to be
    #[arg(long, value_enum, default_value = "image")]
    to: ToArg,

    /// How a new image holds QEMU's stream [default: zstd]
    #[arg(long, value_enum)]
    layout: Option<LayoutArg>,

    /// How a new libvirt save image holds QEMU's stream [default: zstd]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,

    /// Domain XML for a guest whose file has none: a bare stream, or an image of one
    #[arg(long, value_name = "FILE")]
    xml: Option<PathBuf>,

    /// Vouch for what libvirt or somebody else wrote: the new image is signed by this host's key, and may be restored
    #[arg(long)]
    trust: bool,

    /// zstd's level, -50 (fastest) to 19 (smallest)
    #[arg(long, value_name = "N", default_value_t = codec::DEFAULT_LEVEL, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-50..=19))]
    level: i32,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,

    /// Make a delta of IMAGE: chunks that it has are not stored again. It is needed whenever the delta is read
    #[arg(long, value_name = "IMAGE")]
    parent: Option<Location>,

    /// Replace OUT if it exists
    #[arg(long, visible_alias = "force")]
    replace: bool,
}

const EXAMPLES: &str = "\
Examples:
  vmstow convert web01.stow web01.core --to core
  vmstow convert web01.stow web01.map.stow --layout mapped
  vmstow convert tuesday.stow tuesday-full.stow
  vmstow convert tuesday-full.stow tuesday.stow --parent monday.stow
  vmstow convert web01.stow - --layout raw | qemu-system-x86_64 … -incoming fd:0
  vmstow convert /var/lib/libvirt/qemu/save/web01.save web01.stow --trust
  vmstow convert web01.stow web01.save --to libvirt --format raw
  vmstow convert guest.mig web01.stow --xml web01.xml --trust";

/// What the new file is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ToArg {
    /// An image of vmstow
    Image,
    /// A libvirt save image, for `virsh restore`
    Libvirt,
    /// QEMU's migration stream alone, for `-incoming file:`
    Stream,
    /// The same with each page at a place of its own, for QEMU's capability mapped-ram. Goes to files only
    MappedRam,
    /// An ELF core: guest-physical memory and registers, for gdb, crash and Volatility. Goes to files only
    Core,
}

/// How a libvirt save image holds the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// As it is
    Raw,
    /// Compressed by gzip
    Gzip,
    /// Compressed by bzip2
    Bzip2,
    /// Compressed by xz
    Xz,
    /// Compressed by zstd; libvirt 10.4 or later
    Zstd,
    /// Each page at a place of its own; libvirt 11.2 or later. Goes to files only
    Sparse,
}

impl FormatArg {
    fn format(self) -> SaveFormat {
        match self {
            FormatArg::Raw => SaveFormat::Raw,
            FormatArg::Gzip => SaveFormat::Gzip,
            FormatArg::Bzip2 => SaveFormat::Bzip2,
            FormatArg::Xz => SaveFormat::Xz,
            FormatArg::Zstd => SaveFormat::Zstd,
            FormatArg::Sparse => SaveFormat::Sparse,
        }
    }
}

impl ConvertArgs {
    /// What is to be made that is no image.
    fn form(&self) -> Option<ExportForm> {
        let format = self.format.unwrap_or(FormatArg::Zstd).format();
        match self.to {
            ToArg::Image | ToArg::Core => None,
            ToArg::Libvirt => Some(ExportForm::Libvirt(format)),
            ToArg::Stream => Some(ExportForm::Stream),
            ToArg::MappedRam => Some(ExportForm::MappedRam),
        }
    }

    /// The first option that has no meaning for what is to be made.
    fn misplaced(&self) -> Option<&'static str> {
        let is = |to: ToArg| self.to == to;
        match () {
            () if self.layout.is_some() && !is(ToArg::Image) => Some("--layout"),
            () if self.trust && !is(ToArg::Image) => Some("--trust"),
            () if self.parent.is_some() && !is(ToArg::Image) => Some("--parent"),
            () if self.format.is_some() && !is(ToArg::Libvirt) => Some("--format"),
            () if self.xml.is_some() && !is(ToArg::Image) && !is(ToArg::Libvirt) => Some("--xml"),
            () => None,
        }
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(pipeline::default_threads)
    }
}

/// Converts, and says what was made.
pub fn run(args: &ConvertArgs, ui: &Ui) -> Outcome {
    let is_pipe = args.out == Location::Pipe;
    if is_pipe && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return Err(StoreError::Terminal.into());
    }
    if let Some(option) = args.misplaced() {
        return Err(ConvertError::Misplaced { option }.into());
    }
    let xml = args.xml.as_deref().map(read_xml).transpose()?;
    if args.to == ToArg::Core {
        return to_core(args, ui);
    }
    if let Some(form) = args.form() {
        return export(args, form, xml, ui);
    }
    let layout = args.layout.unwrap_or(LayoutArg::Zstd).layout();
    let request = ConvertRequest {
        target: args.out.clone(),
        may_replace: args.replace,
        encoding: Encoding {
            layout,
            level: args.level,
            chunk_len: pipeline::DEFAULT_CHUNK_LEN,
            threads: args.threads(),
            twins: open_parent(args.parent.as_ref(), layout, &args.out, ui)?,
        },
        key: Some(SigningKey::load_or_create()?),
        is_vouched: args.trust,
        xml,
    };
    let report = match foreign::find(&args.image).about(&args.image)? {
        Found::Image(opened) => {
            let opened = opened.whole().about(&args.image)?;
            warn_of_torn(&opened, ui);
            convert::convert(&opened, &request, ui)
        }
        Found::Foreign(foreign) => convert::import(*foreign, &args.image, &request, ui),
    };
    let report = report.about(&args.image)?;
    for problem in &report.problems {
        ui.warn(problem);
    }
    match (report.is_signed, report.from_digest.is_some()) {
        (true, _) => {}
        (false, true) => {
            ui.warn("the new image is not signed, for nobody you trust signed the old one");
        }
        (false, false) => {
            ui.warn(
                "the new image is not signed, for nobody vouches for the old file; --trust does",
            );
        }
    }
    match is_pipe {
        true => ui.note(&made(&report).trim_end()),
        false => ui.answer(&report, made)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn warn_of_torn(opened: &OpenedImage, ui: &Ui) {
    if opened.torn().is_some() {
        ui.warn("the image's last edit was cut off; the generation before it is converted");
    }
}

fn export(args: &ConvertArgs, form: ExportForm, xml: Option<String>, ui: &Ui) -> Outcome {
    let opened = crate::image::open_any(&args.image, ui).about(&args.image)?;
    warn_of_torn(&opened, ui);
    let request = ExportRequest {
        target: args.out.clone(),
        may_replace: args.replace,
        form,
        threads: args.threads(),
        xml,
    };
    let report = convert::export(&opened, &request, ui).about(&args.image)?;
    for warning in &report.warnings {
        ui.warn(warning);
    }
    match args.out == Location::Pipe {
        true => ui.note(&exported(&report).trim_end()),
        false => ui.answer(&report, exported)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn read_xml(path: &Path) -> Result<String, Error> {
    let read = std::fs::read_to_string(path);
    read.map_err(|source| {
        let what = path.display().to_string();
        ConvertError::XmlNotRead { what, source }.into()
    })
}

fn to_core(args: &ConvertArgs, ui: &Ui) -> Outcome {
    let opened = crate::image::open_any(&args.image, ui).about(&args.image)?;
    warn_of_torn(&opened, ui);
    let Location::Path(target) = args.out.clone() else {
        return Err(ConvertError::CoreToPipe.into());
    };
    let request = CoreRequest {
        target,
        may_replace: args.replace,
        threads: args.threads.unwrap_or_else(pipeline::default_threads),
    };
    let report = elf_core(&opened, &request, ui).about(&args.image)?;
    if report.instruction_pointers.is_empty() {
        ui.warn(
            "the image does not tell the registers of the guest's processors: the core has none",
        );
    }
    ui.answer(&report, made_core)?;
    Ok(ExitCode::SUCCESS)
}

fn made_core(report: &CoreReport) -> String {
    let lens = report.memory.iter().map(|(_, len)| *len);
    let bytes = lens.fold(0, u64::saturating_add);
    format!(
        "made {}, an ELF core: {} of guest-physical memory in {} ranges, {} processors\n",
        report.core,
        human_bytes(bytes),
        report.memory.len(),
        report.instruction_pointers.len()
    )
}

fn made(report: &ConvertReport) -> String {
    let from = match report.from_digest {
        Some(_) => format!("one of layout {}", report.from_layout),
        None => format!("a file of kind {}", report.from_layout),
    };
    format!(
        "made {}, layout {}, from {from}: {} of stream\n",
        report.image,
        report.layout,
        human_bytes(report.stream_bytes)
    )
}

fn exported(report: &ExportReport) -> String {
    let format = report
        .format
        .map_or(String::new(), |format| format!(", format {format}"));
    format!(
        "made {}, {}{format}: {} of stream\n",
        report.file,
        match report.form {
            "libvirt" => "a libvirt save image",
            "stream" => "a migration stream",
            _ => "a migration stream of the mapped-ram layout",
        },
        human_bytes(report.stream_bytes)
    )
}
