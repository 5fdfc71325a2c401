//! `vmstow copy` and `vmstow serve`

use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;

use clap::Args;

use super::ui::Ui;
use super::{About, Outcome};
use crate::progress::Progress;
use crate::store::remote::Peer;
use crate::store::{Location, StoreError};
use crate::transfer::{self, CopyReport, CopyRequest};
use crate::units::human_bytes;

/// Copy an image, here or to and from another host
///
/// Every chunk is verified when it arrives, and the copy gets its name only when it is whole. Run the same command again
/// after an interruption: it goes on where it stopped. Locations on other hosts are written ssh://USER@HOST:PORT/PATH, of
/// which user and port may be left out, with /~/PATH for one in the home directory; your own ssh makes the connection, and vmstow has to be installed there.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CopyArgs {
    /// The image; - reads standard input
    source: Location,

    /// The copy
    target: Location,

    /// Replace TARGET if it exists
    #[arg(long, visible_alias = "force")]
    replace: bool,

    /// Bytes a second at most, with K, M or G for multiples of 1024
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bwlimit: Option<u64>,
}

const EXAMPLES: &str = "\
Examples:
  vmstow copy web01.stow ssh://backup/srv/images/web01.stow
  vmstow copy ssh://root@host2:2222/~/web01.stow web01.stow --bwlimit 20M

Environment:
  VMSTOW_SSH             the command that is used for ssh, with its options
  VMSTOW_REMOTE_PROGRAM  vmstow's path on the other host";

fn rate(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'k', 'm', 'g']);
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => Some(1),
        "K" => Some(1 << 10),
        "M" => Some(1 << 20),
        "G" => Some(1 << 30),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok().filter(|number| *number > 0);
    let bytes = number
        .zip(unit)
        .and_then(|(number, unit)| number.checked_mul(unit));
    bytes.ok_or_else(|| "it has to be a number, like 500K or 20M".to_owned())
}

/// Copies, and says what arrived.
pub fn run(args: &CopyArgs, ui: &Ui) -> Outcome {
    let request = CopyRequest {
        source: args.source.clone(),
        target: args.target.clone(),
        may_replace: args.replace,
        bytes_per_second: args.bwlimit,
    };
    let report = transfer::copy(&request, ui).about(&args.source)?;
    if report.lacks_parent {
        ui.warn(
            "the copy is a delta whose parent is not beside it: of its chunks only the checksums were looked at, not the digests",
        );
    }
    ui.answer(&report, human)?;
    Ok(ExitCode::SUCCESS)
}

fn human(report: &CopyReport) -> String {
    let kept = match report.kept_bytes {
        0 => String::new(),
        bytes => format!(", {} were there already", human_bytes(bytes)),
    };
    format!(
        "copied {} to {}: {} in {:.1} s{kept}\n",
        report.source,
        report.target,
        human_bytes(report.fetched_bytes),
        report.seconds
    )
}

/// Read and make images for a vmstow on another host
///
/// Started by `vmstow copy` and the like, by way of ssh. It may do what this user may.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Talk over standard input and output
    #[arg(long, required = true)]
    stdio: bool,
}

/// Serves until the other side ends.
pub fn serve(_args: &ServeArgs) -> Outcome {
    let failed = |source| StoreError::Pipe {
        act: "open",
        source,
    };
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let output = std::io::stdout().as_fd().try_clone_to_owned();
    let (input, output) = (input.map_err(failed)?, output.map_err(failed)?);
    let name = "the other side".to_owned();
    let peer = Peer::greet(name, File::from(input), File::from(output), None)?;
    transfer::serve(peer, &super::check_far::serve)?;
    Ok(ExitCode::SUCCESS)
}
