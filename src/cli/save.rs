//! `vmstow save`

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::ui::{Ui, threads};
use super::{About, Failure, Outcome};
use crate::codec;
use crate::container::Layout;
use crate::error::Error;
use crate::host::keys::SigningKey;
use crate::image::{Parent, ParentError};
use crate::pipeline::{self, Encoding, Twins};
use crate::progress::Progress;
use crate::relocate;
use crate::save::{self, Capture, Live, Plan, PlanReport, SaveReport, SaveRequest, Source, Then};
use crate::store::{Location, StoreError};
use crate::units::human_bytes;

/// Save a running guest to an image
///
/// The guest is stopped, its whole state is written to IMAGE, and its QEMU ends once the image is complete and safe on
/// the disk: from then on the image is the guest. Whatever fails before puts the guest back as it was.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SaveArgs {
    /// The guest: qmp:/path/to/monitor.sock, pid:NUMBER, or the name of a guest that vmstow runs
    source: Source,

    /// The image to write; - writes to standard output
    image: Location,

    /// How the image is laid out
    #[arg(long, default_value = "zstd")]
    layout: LayoutArg,

    /// Write a delta of IMAGE, an earlier save of the guest: only what it does not have is stored
    ///
    /// IMAGE is needed whenever the delta is read; it is looked for beside it, and in the directories that $VMSTOW_PARENTS names.
    /// `vmstow convert` makes a full image of both.
    #[arg(long, value_name = "IMAGE")]
    parent: Option<Location>,

    /// zstd's level, -50 (fastest) to 19 (smallest)
    #[arg(long, value_name = "N", default_value_t = codec::DEFAULT_LEVEL, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-50..=19))]
    level: i32,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,

    /// How the guest's state is taken
    #[arg(long, default_value = "auto")]
    capture: CaptureArg,

    /// What becomes of the guest once its image is complete [default: quit]
    #[arg(long)]
    then: Option<ThenArg>,

    /// Let the guest run on while it is saved: it stands still for some milliseconds only
    ///
    /// It must not write to disks, or --disk-snapshot has to be given. Its image is restored with --throwaway, or onto
    /// copies of its disks.
    #[arg(long)]
    live: bool,

    /// With --live: freeze all disks at the same moment; the guest goes on in new overlays beside them, DISK.live-TIME.qcow2
    #[arg(long, requires = "live")]
    disk_snapshot: bool,

    /// Keep a label in the image; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,

    /// Replace IMAGE if it exists
    #[arg(long)]
    replace: bool,

    /// Save a guest that rests after a completed migration: it is let run for a moment first
    #[arg(long)]
    from_postmigrate: bool,

    /// Read every disk to its end, so that a restore can prove that it did not change
    #[arg(long)]
    disk_digest: bool,

    /// Do not sign the image; only --trust restores it then
    #[arg(long)]
    no_sign: bool,

    /// Give up, and put the guest back, if saving takes longer
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,

    /// Only say what would be done, and what stands against it; touches nothing
    #[arg(long)]
    dry_run: bool,
}

const EXAMPLES: &str = "\
Examples:
  vmstow save qmp:/run/web01.sock web01.stow
  vmstow save pid:4711 web01.stow --then resume --label ticket=1234
  vmstow save web01 tuesday.stow --parent monday.stow
  vmstow save web01 - | ssh host 'cat > web01.stow'

A QEMU started by hand needs a monitor: -qmp unix:/path/to/monitor.sock,server=on,wait=off";

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LayoutArg {
    /// Compressed; `zstd -dc` gives QEMU's stream back
    Zstd,
    /// QEMU's stream as it is; `-incoming file:IMAGE` reads it
    Raw,
    /// Each page at a place of its own, zero pages are holes: for `restore --map`. Goes to files only
    Mapped,
}

impl LayoutArg {
    /// The layout.
    pub fn layout(self) -> Layout {
        match self {
            LayoutArg::Zstd => Layout::Zstd,
            LayoutArg::Raw => Layout::Raw,
            LayoutArg::Mapped => Layout::Mapped,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CaptureArg {
    /// Read from its QEMU's memory on all cores, where that is possible; otherwise as with migration
    Auto,
    /// By QEMU's migration: slower, but the image holds QEMU's description of its device state
    Migration,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ThenArg {
    /// QEMU ends: the image is the guest
    Quit,
    /// The guest runs on; its disks go on changing, so the image soon no longer fits them
    Resume,
    /// The guest stays stopped
    Pause,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is KEY=VALUE".to_owned()),
    }
}

/// Saves, or says what a save would do.
pub fn run(args: SaveArgs, ui: &Ui) -> Outcome {
    let is_pipe = args.image == Location::Pipe;
    if is_pipe && !args.dry_run && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return Err(StoreError::Terminal.into());
    }
    let key = if args.no_sign || args.dry_run {
        None
    } else {
        Some(SigningKey::load_or_create()?)
    };
    let layout = args.layout.layout();
    // Before the guest is touched.
    let twins = open_parent(args.parent.as_ref(), layout, &args.image, ui)?;
    let program = super::this_program()?;
    let request = SaveRequest {
        source: args.source,
        target: args.image.clone(),
        may_replace: args.replace,
        encoding: Encoding {
            layout,
            level: args.level,
            chunk_len: pipeline::DEFAULT_CHUNK_LEN,
            threads: args.threads.unwrap_or_else(pipeline::default_threads),
            twins,
        },
        capture: match args.capture {
            CaptureArg::Auto => Capture::Auto,
            CaptureArg::Migration => Capture::Migration,
        },
        then: match (args.then, args.live) {
            (None, false) | (Some(ThenArg::Quit), _) => Then::Quit,
            (None, true) | (Some(ThenArg::Resume), _) => Then::Resume,
            (Some(ThenArg::Pause), _) => Then::Pause,
        },
        live: args.live.then_some(Live {
            disk_snapshot: args.disk_snapshot,
        }),
        labels: args.labels.into_iter().collect::<BTreeMap<_, _>>(),
        from_postmigrate: args.from_postmigrate,
        timeout: args.timeout.map(Duration::from_secs),
        digest_disks: args.disk_digest,
        key,
        program,
    };
    if args.dry_run {
        let plan = Plan::look(&request).about(&args.image)?;
        ui.answer(plan.report(), dry_run)?;
        plan.judge(&request).about(&args.image)?;
        relocate::refuse_unsettled(&request)?;
        return Ok(ExitCode::SUCCESS);
    }
    relocate::refuse_unsettled(&request)?;
    if args_resume_writes(&request) {
        ui.warn("the guest runs on and its disks go on changing: the image fits them only as they are at this moment");
    }
    let report = save::save(&request, ui).about(&args.image)?;
    if is_pipe {
        ui.note(&saved(&report).trim_end());
    } else {
        ui.answer(&report, saved)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the image of which a delta is to be made at `target`.
pub fn open_parent(
    parent: Option<&Location>,
    layout: Layout,
    target: &Location,
    ui: &Ui,
) -> Result<Option<Arc<Twins>>, Failure> {
    let Some(location) = parent else {
        return Ok(None);
    };
    if layout != Layout::Zstd {
        let layout = layout.to_string();
        return Err(Error::from(ParentError::Layout { layout }).into());
    }
    let parent = Parent::open(location, target).about(location)?;
    if target.path().is_some() && !parent.is_beside(target) {
        ui.warn(&format!(
            "{location} lies elsewhere than the delta: readers find it only beside that, or with VMSTOW_PARENTS"
        ));
    }
    Ok(Some(parent.twins))
}

fn args_resume_writes(request: &SaveRequest) -> bool {
    request.then == Then::Resume && request.live.is_none()
}

fn saved(report: &SaveReport) -> String {
    if let Some(took_ms) = report.took_ms {
        return saved_live(report, took_ms);
    }
    let what = match report.guest {
        "quit" => "its QEMU has ended",
        "quitting" => "its QEMU was told to quit and has not ended yet",
        "running" => "it runs on",
        _ => "it stays stopped",
    };
    let delta = match report.parent_uuid {
        Some(_) => "a delta of ",
        None => "",
    };
    format!(
        "saved {} to {}: {} of memory in {delta}{}; {what} after {:.2} s\n",
        report.name,
        report.image,
        human_bytes(report.memory_bytes),
        human_bytes(report.file_bytes),
        Duration::from_millis(report.stopped_ms).as_secs_f64()
    )
}

fn saved_live(report: &SaveReport, took_ms: u64) -> String {
    let stood_still = match report.downtime_ms {
        Some(ms) => format!("it stood still for {ms:.1} ms"),
        None => "it runs on".to_owned(),
    };
    let mut text = format!(
        "saved {} live to {}: {} of memory in {}; {stood_still} of {:.2} s\n",
        report.name,
        report.image,
        human_bytes(report.memory_bytes),
        human_bytes(report.file_bytes),
        Duration::from_millis(took_ms).as_secs_f64()
    );
    for overlay in &report.overlays {
        let _ = writeln!(text, "its disk goes on in {}", overlay.display());
    }
    text
}

fn dry_run(plan: &PlanReport) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:>9}: {value}");
    };
    row("guest", &format!("{} ({})", plan.name, plan.run_state));
    row("qemu", &format!("{}, machine {}", plan.qemu, plan.machine));
    let resident = plan.resident_bytes.map_or(String::new(), |bytes| {
        format!(", {} in use by its QEMU", human_bytes(bytes))
    });
    row(
        "memory",
        &format!("{}{resident}", human_bytes(plan.memory_bytes)),
    );
    if let Some(free) = plan.free_bytes {
        row(
            "free",
            &format!("{} where the image is to go", human_bytes(free)),
        );
    }
    for blocker in &plan.blockers {
        row("blocked", blocker);
    }
    for reason in &plan.not_restorable {
        row("blocked", reason);
    }
    for disk in &plan.throwaway_disks {
        let disk = disk.display();
        row(
            "blocked",
            &format!("{disk} ends with its QEMU: the guest was restored with --throwaway"),
        );
    }
    let reasons = plan.blockers.len() + plan.not_restorable.len() + plan.throwaway_disks.len();
    if reasons == 0 {
        row("blocked", "by nothing");
    }
    text
}
