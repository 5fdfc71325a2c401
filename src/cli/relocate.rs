//! `vmstow move`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::start::GuestArgs;
use super::ui::{Ui, printable, threads};
use super::{Outcome, check, copy, this_program};
use crate::codec;
use crate::container::Layout;
use crate::host::keys::SigningKey;
use crate::pipeline::{self, Encoding};
use crate::relocate::{self, MoveReport, MoveRequest, Way};
use crate::save::{Capture, SaveRequest, Source, Then};
use crate::store::{Location, SshLocation};
use crate::units::human_bytes;

/// Move a running guest to another host
///
/// The guest is stopped and saved, its image goes to the other host and is loaded there, and only then does the guest run there and end here. Whatever
/// fails before leaves it running here and nothing there. If the connection is lost at the very moment of the change,
/// the guest stays stopped here until you run the same command again, which asks the other host: it is never at both places.
///
/// vmstow has to be installed there, and your own ssh makes the connection. Disks are not copied: they have to be there,
/// under the same paths or those that --remap gives.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MoveArgs {
    /// The guest: qmp:/path/to/monitor.sock, pid:NUMBER, or the name of a guest that vmstow runs
    source: Source,

    /// Where to: a host, with USER@ before it and :PORT behind it if need be
    #[arg(value_parser = check::host, required_unless_present = "settle")]
    host: Option<SshLocation>,

    /// Send the guest straight from its QEMU here into one there; its image is kept nowhere
    ///
    /// The guest stands still for a shorter time; nothing is left to go on with if the connection is lost meanwhile.
    #[arg(long)]
    stream: bool,

    /// Let the guest run there before its memory is there; this command stays and gives it what it asks for first, and all
    /// the rest behind
    ///
    /// If the connection is lost meanwhile the guest stands still as soon as it needs what it lacks, until the same
    /// command is run again.
    #[arg(long, conflicts_with_all = ["stream", "image", "bwlimit", "spool"])]
    lazy: bool,

    /// With --lazy: give at most so many MiB a second of what the guest does not ask for
    #[arg(long, value_name = "MIB", requires = "lazy", value_parser = clap::value_parser!(u64).range(1..))]
    fill_rate: Option<u64>,

    /// Only settle a move that was cut off: the guest ends here if it runs there, and runs on here if it does not
    #[arg(long, conflicts_with = "host")]
    settle: bool,

    /// With --settle: let the guest run on here without asking the other host. Only you know then that it does not run there
    #[arg(long, requires = "settle")]
    stays_here: bool,

    /// Keep the image on the other host, as this file
    #[arg(long, value_name = "PATH", conflicts_with = "stream")]
    image: Option<PathBuf>,

    /// Replace that file if it exists
    #[arg(long, requires = "image")]
    replace: bool,

    /// Bytes a second at most, with K, M or G for multiples of 1024
    #[arg(long, value_name = "RATE", value_parser = copy::rate, conflicts_with = "stream")]
    bwlimit: Option<u64>,

    /// Where the image is kept here until it is there [default: $XDG_STATE_HOME/vmstow/moves]
    #[arg(long, value_name = "DIR", conflicts_with = "stream")]
    spool: Option<PathBuf>,

    /// zstd's level, -50 (fastest) to 19 (smallest)
    #[arg(long, value_name = "N", default_value_t = codec::DEFAULT_LEVEL, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-50..=19))]
    level: i32,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,

    /// Move a guest that rests after a completed migration: it is let run for a moment first
    #[arg(long)]
    from_postmigrate: bool,

    /// Read every disk to its end, so that the other host can prove that it is the same
    #[arg(long)]
    disk_digest: bool,

    /// Give up, and let the guest run on here, if saving takes longer
    #[arg(long, value_name = "SECONDS")]
    save_timeout: Option<u64>,

    /// How it is restored there; paths are those of the other host
    #[command(flatten)]
    guest: GuestArgs,
}

const EXAMPLES: &str = "\
Examples:
  vmstow move web01 root@host2
  vmstow move pid:4711 host2 --stream --remap disk:vda=/srv/web01.qcow2 --remap net:net0=bridge=br1
  vmstow move web01 host2 --image /srv/images/web01.stow
  vmstow move web01 --settle";

/// Moves, and says where the guest is.
pub fn run(args: MoveArgs, ui: &Ui) -> Outcome {
    let saving = SaveRequest {
        source: args.source,
        target: Location::Pipe,
        may_replace: false,
        capture: Capture::Auto,
        encoding: Encoding {
            layout: Layout::Zstd,
            level: args.level,
            chunk_len: pipeline::DEFAULT_CHUNK_LEN,
            threads: args.threads.unwrap_or_else(pipeline::default_threads),
            twins: None,
        },
        then: Then::Pause,
        live: None,
        labels: BTreeMap::new(),
        from_postmigrate: args.from_postmigrate,
        timeout: args.save_timeout.map(Duration::from_secs),
        digest_disks: args.disk_digest,
        key: Some(SigningKey::load_or_create()?),
        program: this_program()?,
    };
    let Some(host) = args.host.filter(|_| !args.settle) else {
        let (name, report) = relocate::settle_move(&saving, args.stays_here, ui)?;
        match report {
            Some(report) => ui.answer(&report, moved)?,
            None => ui.answer(
                &serde_json::json!({ "name": name, "taken_back": true }),
                |_| {
                    printable(&format!(
                        "the move of {name} was taken back: it is here, as it was\n"
                    ))
                },
            )?,
        }
        return Ok(ExitCode::SUCCESS);
    };
    let mut arguments = args.guest.words()?;
    // Who may log in there may start guests there, and this one was just saved here.
    arguments.push("--trust".to_owned());
    if args.lazy {
        arguments.push("--lazy".to_owned());
        arguments.extend(args.fill_rate.map(|mib| format!("--fill-rate={mib}")));
    }
    let request = MoveRequest {
        saving,
        host,
        arguments,
        way: match (args.stream, args.lazy) {
            (true, _) => Way::Streamed,
            (false, true) => Way::Lazy,
            (false, false) => Way::Copied,
        },
        image: args.image,
        may_replace: args.replace,
        spool: args.spool,
        bytes_per_second: args.bwlimit,
    };
    let report = relocate::move_guest(&request, ui)?;
    ui.answer(&report, moved)?;
    Ok(ExitCode::SUCCESS)
}

fn moved(report: &MoveReport) -> String {
    let mut text = format!("moved {} to {}", report.name, report.host);
    if report.name_there != report.name {
        text.push_str(&format!(", where it is called {}", report.name_there));
    }
    match &report.sent {
        Some(sent) => text.push_str(&format!(
            ": {} of memory in {}, it stood still for {:.2} s\n",
            human_bytes(sent.memory_bytes),
            human_bytes(sent.image_bytes),
            Duration::from_millis(sent.stopped_ms).as_secs_f64()
        )),
        None => text.push_str(" by the earlier move, which is settled now\n"),
    }
    if report.state != "running" {
        text.push_str(&format!("it is {} there\n", report.state));
    }
    if let Some(image) = &report.image {
        text.push_str(&format!("its image is {} there\n", image.display()));
    }
    printable(&text)
}
