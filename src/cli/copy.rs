//! `vmstow copy`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use tempfile::TempDir;

use super::save::open_parent;
use super::ui::Ui;
use super::{About, Failure, Outcome};
use crate::codec;
use crate::container::Layout;
use crate::convert::{self, ConvertRequest};
use crate::host::keys::SigningKey;
use crate::image;
use crate::pipeline::{self, Encoding};
use crate::progress::Progress;
use crate::store::{Location, StoreError};
use crate::transfer::{self, CopyParent, CopyReport, CopyRequest};
use crate::units::human_bytes;

/// Copy an image, here or to and from another host or an object store
///
/// Every chunk is verified when it arrives, and the copy gets its name only when it is whole. Run the same command again
/// after an interruption: it goes on where it stopped. Locations on other hosts are written ssh://USER@HOST:PORT/PATH, of
/// which user and port may be left out, with /~/PATH for one in the home directory; your own ssh makes the connection, and vmstow has to be installed there. s3://BUCKET/KEY is an object of a store that speaks S3, http:// and https:// are files to be read.
///
/// oci://REGISTRY/NAME:TAG is an artifact in a registry of container images. Pieces that the registry has in that repository are not sent
/// again, and the tag appears at the end. You are who you are to podman, skopeo and docker: their files of credentials are read.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CopyArgs {
    /// The image; - reads standard input
    source: Location,

    /// The copy; in a directory it gets the image's name
    target: Location,

    /// Replace TARGET if it exists
    #[arg(long, visible_alias = "force")]
    replace: bool,

    /// Bytes a second at most, with K, M or G for multiples of 1024
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bwlimit: Option<u64>,

    /// An image of an earlier save of the guest, where the copy shall be: what that has does not come over
    ///
    /// A path on the host of TARGET, for another host relative to TARGET's directory, or a location there. Without this, in
    /// copies between hosts, the best one is taken that lies beside TARGET (*.stow, or what is replaced) and is of the same guest.
    #[arg(long, value_name = "IMAGE", conflicts_with = "no_parent")]
    parent: Option<Location>,

    /// Copy a delta: only what --parent lacks, which is an image here and has to lie beside the copy whenever that is read
    #[arg(long, requires = "parent")]
    as_delta: bool,

    /// Use no image of an earlier save
    #[arg(long)]
    no_parent: bool,
}

const EXAMPLES: &str = "\
Examples:
  vmstow copy web01.stow ssh://backup/srv/images/web01.stow
  vmstow copy ssh://root@host2:2222/~/web01.stow web01.stow --bwlimit 20M
  vmstow copy web01.stow ssh://backup/srv/images/tuesday.stow --parent monday.stow
  vmstow copy tuesday.stow ssh://backup/srv/images/ --parent monday.stow --as-delta
  vmstow copy web01.stow s3://images/web01.stow
  vmstow copy web01.stow oci://registry.example/lab/web01:monday

Environment:
  VMSTOW_SSH             the command that is used for ssh, with its options (AES-GCM is put before ChaCha20 where ssh allows
                         both and prefers the latter; `ssh -c CIPHER` keeps to one)
  VMSTOW_REMOTE_PROGRAM  vmstow's path on the other host
  AWS_ENDPOINT_URL       the object store, if it is not Amazon's; AWS_REGION its region
  AWS_ACCESS_KEY_ID      the key, with AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN
  AWS_PROFILE            the profile of ~/.aws/config and ~/.aws/credentials to use instead
  REGISTRY_AUTH_FILE     the file of credentials for registries, in place of the usual ones
  SSL_CERT_FILE          certificates that are trusted, in place of the system's
  VMSTOW_INSECURE_REGISTRIES  registries without TLS, HOST:PORT with commas between";

pub(super) fn rate(text: &str) -> Result<u64, String> {
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
    let mut request = CopyRequest {
        source: args.source.clone(),
        target: args.target.clone(),
        may_replace: args.replace,
        bytes_per_second: args.bwlimit,
        parent: match (&args.parent, args.no_parent) {
            (Some(parent), _) => CopyParent::Named(parent.clone()),
            (None, true) => CopyParent::None,
            (None, false) => CopyParent::Found,
        },
    };
    let delta = match &args.parent {
        Some(parent) if args.as_delta => Some(delta(args, parent, ui)?),
        _ => None,
    };
    if let Some((_, delta)) = &delta {
        request.source.clone_from(delta);
        request.parent = CopyParent::None;
    }
    let report = transfer::copy(&request, ui).about(&args.source)?;
    let report = CopyReport {
        source: args.source.to_string(),
        ..report
    };
    if report.lacks_parent {
        ui.warn(
            "the copy is a delta whose parent is not beside it: of its chunks only the checksums were looked at, not the digests",
        );
    }
    ui.answer(&report, human)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes a delta of the image in a directory that ends with what is given.
fn delta(args: &CopyArgs, parent: &Location, ui: &Ui) -> Result<(TempDir, Location), Failure> {
    let near = args.target.path().or_else(|| args.source.path());
    let near = near.map(|path| match path.is_dir() {
        true => path,
        false => path.parent().unwrap_or(Path::new("")),
    });
    let near = match near {
        Some(near) if near.as_os_str().is_empty() => PathBuf::from("."),
        Some(near) => near.to_owned(),
        None => std::env::temp_dir(),
    };
    let dir = tempfile::tempdir_in(&near).map_err(|source| StoreError::File {
        act: "create",
        path: near,
        source,
    })?;
    let mut full = args.source.clone();
    if full.is_far() {
        // What the parent has does not come over.
        full = Location::Path(dir.path().join("full.stow"));
        let request = CopyRequest {
            source: args.source.clone(),
            target: full.clone(),
            may_replace: false,
            bytes_per_second: args.bwlimit,
            parent: CopyParent::Named(parent.clone()),
        };
        transfer::copy(&request, ui).about(&args.source)?;
    }
    let name = args.source.file_name();
    let name = name.unwrap_or_else(|| "delta.stow".into());
    let made = dir.path().join("made");
    std::fs::create_dir(&made).map_err(|source| StoreError::File {
        act: "create",
        path: made.clone(),
        source,
    })?;
    let made = Location::Path(made.join(&name));
    let target = match args.target.path().filter(|path| path.is_dir()) {
        Some(directory) => Location::Path(directory.join(&name)),
        None => args.target.clone(),
    };
    let request = ConvertRequest {
        target: made.clone(),
        may_replace: false,
        encoding: Encoding {
            layout: Layout::Zstd,
            level: codec::DEFAULT_LEVEL,
            chunk_len: pipeline::DEFAULT_CHUNK_LEN,
            threads: pipeline::default_threads(),
            twins: open_parent(Some(parent), Layout::Zstd, &target, ui)?,
        },
        key: Some(SigningKey::load_or_create()?),
        is_vouched: false,
        xml: None,
    };
    let opened = image::open(&full).about(&args.source)?;
    convert::convert(&opened, &request, ui).about(&args.source)?;
    Ok((dir, made))
}

fn human(report: &CopyReport) -> String {
    let kept = match report.kept_bytes {
        0 => String::new(),
        bytes => format!(", {} were there already", human_bytes(bytes)),
    };
    let parent = report.parent.as_deref().unwrap_or_default();
    let made = match report.from_parent_bytes {
        0 => String::new(),
        bytes => format!(
            ", {} were made with {}; {} crossed the connection",
            human_bytes(bytes),
            parent.escape_debug(),
            human_bytes(report.crossed_bytes)
        ),
    };
    format!(
        "copied {} to {}: {} in {:.1} s{kept}{made}\n",
        report.source,
        report.target,
        human_bytes(report.fetched_bytes),
        report.seconds
    )
}
