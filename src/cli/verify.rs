//! `vmstow verify`

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;

use super::ui::{Ui, threads};
use super::{About, Outcome};
use crate::error::ErrorKind;
use crate::image;
use crate::inspect::{self, Depth, VerifyReport};
use crate::pipeline;
use crate::store::Location;
use crate::units::human_bytes;

/// Prove that an image is whole
///
/// Every byte is read and held against its digest; every damaged chunk is listed. Of a delta's parents those chunks are read that it
/// needs. Exit code 3 if anything is wrong.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The image; - reads standard input
    image: Location,

    /// Look at the footer, the directory and the sections only
    #[arg(long, conflicts_with = "deep")]
    quick: bool,

    /// Also parse QEMU's stream: every page of every RAMBlock there, every device named
    #[arg(long)]
    deep: bool,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
}

/// Verifies and prints what was found.
pub fn run(args: &VerifyArgs, ui: &Ui) -> Outcome {
    let depth = match (args.quick, args.deep) {
        (true, _) => Depth::Quick,
        (_, true) => Depth::Deep,
        _ => Depth::Full,
    };
    let threads = args.threads.unwrap_or_else(pipeline::default_threads);
    let opened = image::open_alone(&args.image).about(&args.image)?;
    let report = inspect::verify(&opened, depth, threads, ui).about(&args.image)?;
    ui.answer(&report, human)?;
    Ok(if report.is_whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(ErrorKind::Image.exit_code())
    })
}

fn human(report: &VerifyReport) -> String {
    let mut text = String::new();
    if !report.is_whole {
        let _ = writeln!(text, "{} is damaged:", report.image);
        for problem in &report.problems {
            let at = problem
                .at
                .as_ref()
                .map_or(String::new(), |at| format!(" ({at})"));
            let _ = writeln!(text, "  {}{at}", problem.what);
        }
        return text;
    }
    let looked = match report.depth {
        // Nobody shall take a quick look for a proof.
        Depth::Quick => {
            "has a whole footer, directory and sections; its chunks were not read".to_owned()
        }
        _ => format!(
            "is whole: {} chunks, {} of stream, all digests match",
            report.chunks,
            human_bytes(report.stream_bytes)
        ),
    };
    let _ = writeln!(text, "{} {looked}", report.image);
    if let Some(stream) = &report.stream {
        let pages = stream.data_pages + stream.zero_pages;
        let _ = writeln!(
            text,
            "the stream is complete: {pages} pages in {} RAMBlocks, devices {}",
            stream.ram_blocks.len(),
            stream.devices.join(", ")
        );
    }
    if !report.parents.is_empty() {
        let parents = report.parents.join(", ");
        let read = match report.depth {
            Depth::Quick => "is there",
            _ => "was read as far as it is needed",
        };
        let _ = writeln!(text, "it is a delta, all of whose chain {read}: {parents}");
    }
    let _ = writeln!(text, "it {}", report.trust);
    text
}
