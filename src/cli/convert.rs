//! `vmstow convert`

use std::process::ExitCode;

use clap::Args;

use super::save::LayoutArg;
use super::ui::{Ui, threads};
use super::{About, Outcome};
use crate::codec;
use crate::convert::{self, ConvertReport, ConvertRequest};
use crate::host::keys::SigningKey;
use crate::image;
use crate::pipeline::{self, Encoding};
use crate::progress::Progress;
use crate::store::{Location, StoreError};
use crate::units::human_bytes;

/// Make an image of another layout
///
/// Every chunk is verified on the way; configuration and labels stay. The new image is signed by this host's key if the old
/// one is signed by a key that you trust.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// The image; - reads standard input
    image: Location,

    /// The new image; - writes to standard output
    out: Location,

    /// How the new image holds QEMU's stream
    #[arg(long, value_enum, default_value = "zstd")]
    layout: LayoutArg,

    /// zstd's level, -50 (fastest) to 19 (smallest)
    #[arg(long, value_name = "N", default_value_t = codec::DEFAULT_LEVEL, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-50..=19))]
    level: i32,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,

    /// Replace OUT if it exists
    #[arg(long, visible_alias = "force")]
    replace: bool,
}

const EXAMPLES: &str = "\
Examples:
  vmstow convert web01.stow web01.map.stow --layout mapped
  vmstow convert web01.stow - --layout raw | qemu-system-x86_64 … -incoming fd:0";

/// Converts, and says what was made.
pub fn run(args: &ConvertArgs, ui: &Ui) -> Outcome {
    let is_pipe = args.out == Location::Pipe;
    if is_pipe && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return Err(StoreError::Terminal.into());
    }
    let opened = image::open(&args.image).about(&args.image)?;
    if opened.torn().is_some() {
        ui.warn("the image's last edit was cut off; the generation before it is converted");
    }
    let request = ConvertRequest {
        target: args.out.clone(),
        may_replace: args.replace,
        encoding: Encoding {
            layout: args.layout.layout(),
            level: args.level,
            chunk_len: pipeline::DEFAULT_CHUNK_LEN,
            threads: args.threads.unwrap_or_else(pipeline::default_threads),
        },
        key: Some(SigningKey::load_or_create()?),
    };
    let report = convert::convert(&opened, &request, ui).about(&args.image)?;
    if !report.is_signed {
        ui.warn("the new image is not signed, for nobody you trust signed the old one");
    }
    match is_pipe {
        true => ui.note(&made(&report).trim_end()),
        false => ui.answer(&report, made)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn made(report: &ConvertReport) -> String {
    format!(
        "made {}, layout {}, from one of layout {}: {} of stream\n",
        report.image,
        report.layout,
        report.from_layout,
        human_bytes(report.stream_bytes)
    )
}
