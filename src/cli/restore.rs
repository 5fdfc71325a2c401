//! `vmstow restore`

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Stdin};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::start::{GuestArgs, LazyArgs};
use super::ui::{Ui, printable, threads};
use super::{About, Failure, Outcome, this_program};
use crate::config::Arguments;
use crate::config::restore_arguments::terminal_logs;
use crate::container::{ContainerError, Manifest};
use crate::error::Error;
use crate::host::{GuestDir, ProcessFacts, RuntimeDir};
use crate::image::{self, Trust};
use crate::pipeline::{self, PipedImage, begins_with_head};
use crate::progress::Progress;
use crate::relocate;
use crate::restore::{
    self, Invocation, LazyRequest, Mapping, Origin, Plan, RestoreError, RestoreReport, Resumed,
    ServeError, Verify,
};
use crate::store::{Location, SshLocation, StoreError};
use crate::supervise::{RunningGuest, Serving};
use crate::units::FileOffset;

/// Bring a guest back from its image
///
/// A QEMU is started with the guest's own arguments and given the image; every chunk is verified before QEMU gets it,
/// and all of them before the guest runs. The guest runs on in the background: see `vmstow list`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RestoreArgs {
    /// The image; - reads standard input
    #[arg(required_unless_present = "resume")]
    image: Option<Location>,

    #[command(flatten)]
    lazy: LazyArgs,

    /// With --lazy or --resume: stay until all memory is there
    #[arg(long, requires = "late", conflicts_with_all = ["foreground", "count"])]
    wait: bool,

    /// Go on with a lazily restored guest whose memory nobody gives it any more
    ///
    /// It is restored anew, as it was restored before, if it had not come so far that it could run.
    #[arg(long, value_name = "NAME", group = "late", conflicts_with_all = [
        "image", "map", "paused", "qemu", "name", "remaps", "remap_files", "trust", "accept_changed_disks", "force", "rom_sizes", "throwaway", "count",
        "foreground", "dry_run", "print_command", "threads",
    ])]
    resume: Option<String>,

    /// Let QEMU map the guest's memory from the image: it runs at once, however much memory it has
    ///
    /// For images of layout mapped, with QEMU 8.2 or later. The image is never written to; it must stay as long as the
    /// guest runs.
    #[arg(long, conflicts_with = "lazy")]
    map: bool,

    /// With --map: when all of the image is verified
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "background",
        requires = "map"
    )]
    verify: VerifyArg,

    /// Restore it on another host, whose vmstow reads the image through your ssh
    #[arg(long, value_name = "[USER@]HOST[:PORT]", value_parser = super::check::host, conflicts_with_all = [
        "record", "resume", "map", "count", "foreground", "dry_run", "print_command", "threads",
    ])]
    on: Option<SshLocation>,

    #[command(flatten)]
    guest: GuestArgs,

    /// Let the image use resources of this host although nobody you trust signed it
    #[arg(long)]
    trust: bool,

    /// Make N guests of the image, NAME-1 to NAME-N, each with sockets and an isolated network of its own
    ///
    /// All see what the saved guest saw: MAC, UUID and all else. Needs --throwaway if the guest writes to disks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: Option<u32>,

    /// Stay, and end the guest with Ctrl-C
    #[arg(long, conflicts_with = "count")]
    foreground: bool,

    /// Only check, and say what stands against a restore
    #[arg(long)]
    dry_run: bool,

    /// Only check, and print the QEMU command
    #[arg(long)]
    print_command: bool,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum VerifyArg {
    /// Before the guest runs
    Full,
    /// While it runs; if a byte is wrong the guest is frozen, see `vmstow list`
    Background,
    /// Never; only what is not mapped
    Quick,
}

const EXAMPLES: &str = "\
Examples:
  vmstow restore web01.stow
  vmstow restore web01.stow --lazy
  vmstow restore --resume web01
  vmstow restore web01.stow --map
  vmstow restore web01.stow --remap disk:disk0=/srv/web01.qcow2 --remap net:net0=user
  vmstow restore web01.stow --throwaway --count 4
  vmstow restore web01.stow --on root@host2
  ssh host cat web01.stow | vmstow restore - --trust";

/// Restores, or says what a restore would do.
pub fn run(args: RestoreArgs, ui: &Ui) -> Outcome {
    let words = std::env::args_os().skip(1).collect();
    let cwd = std::env::current_dir().unwrap_or_default();
    match (&args.resume, &args.on) {
        (Some(name), _) => resume(name, &args, &invocation(words, cwd)?, ui),
        (None, Some(there)) => restore_on(&args, there, ui),
        (None, None) => restore(args, invocation(words, cwd)?, ui),
    }
}

pub(super) fn invocation(arguments: Vec<OsString>, cwd: PathBuf) -> Result<Invocation, Failure> {
    let program = this_program()?;
    Ok(Invocation {
        program,
        arguments,
        cwd,
    })
}

fn restore(args: RestoreArgs, invocation: Invocation, ui: &Ui) -> Outcome {
    let image = args.image.unwrap_or(Location::Pipe);
    let threads = args.threads.unwrap_or_else(pipeline::default_threads);
    let at_once = args.count.map_or(1, |count| {
        pipeline::default_threads().min(usize::try_from(count).unwrap_or(1))
    });
    let verify = args.map.then_some(match args.verify {
        VerifyArg::Full => Verify::Full,
        VerifyArg::Background => Verify::Background,
        VerifyArg::Quick => Verify::Quick,
    });
    let mut request = args.guest.request(image.clone(), args.trust)?;
    request.clones = args.count;
    request.threads = (threads / at_once).max(1);
    request.lazy = args.lazy.lazy.then_some(LazyRequest {
        options: args.lazy.options(),
        invocation,
    });
    if args.count.is_some() && image == Location::Pipe {
        return Err(RestoreError::ClonesOfPipe.into());
    }
    let is_trusted = request.trust && !args.lazy.lazy;
    let (manifest, trust, origin) = origin(&image, is_trusted, ui)?;
    if let (false, Origin::Image(opened)) = (request.remaps.is_empty(), &origin) {
        let xml = opened.image().xml().about(&image)?;
        restore::call_disks_by_id(&mut request.remaps, &manifest, &xml).about(&image)?;
    }
    if let Some(verify) = verify {
        request.map = Some(mapping(&origin, verify).about(&image)?);
    }
    let mut plan = Plan::check(manifest, &trust, &request).about(&image)?;
    if let Origin::Image(opened) = &origin {
        plan.check_target(opened).about(&image)?;
    }
    if args.print_command || args.dry_run {
        plan.notes().iter().for_each(|note| ui.note(note));
    }
    for warning in plan.warnings() {
        ui.warn(&format!("{} [{}]", warning.fact, warning.code));
    }
    if args.print_command || args.dry_run {
        return print_plan(&plan, args.print_command, ui);
    }
    if let Some(count) = args.count {
        return make_clones(&plan, &origin, count, ui).about(&image);
    }
    let (mut report, guest) = restore::restore(&plan, origin, ui).about(&image)?;
    if args.lazy.lazy && args.wait {
        let dir = guest.dir().clone();
        // From here on the guest is not ours to end.
        guest.keep();
        let served = restore::wait_for_memory(&dir, ui).about(&image)?;
        warn_of(&served, ui);
        report.served = Some(served);
        ui.answer(&report, restored)?;
        note_logs(&report, ui);
        return Ok(ExitCode::SUCCESS);
    }
    ui.answer(&report, restored)?;
    note_logs(&report, ui);
    if args.foreground {
        stay(guest, ui)
    } else {
        leave(guest)
    }
}

/// Restores on another host, and says what its vmstow says of it.
fn restore_on(args: &RestoreArgs, there: &SshLocation, ui: &Ui) -> Outcome {
    let image = args.image.clone().unwrap_or(Location::Pipe);
    let opened = image::open(&image).about(&image)?;
    let mut words = args.guest.words()?;
    words.extend(args.trust.then(|| "--trust".to_owned()));
    words.extend(args.lazy.words());
    let report = relocate::restore_on(there, &opened, words, args.lazy.lazy, ui).about(&image)?;
    ui.answer(&report, |report| {
        let word = |key: &str| report[key].as_str().unwrap_or_default().to_owned();
        printable(&format!(
            "{} is {} on {}\n",
            word("name"),
            word("state"),
            there.host
        ))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What QEMU is to map.
fn mapping<R: std::io::Read>(origin: &Origin<R>, verify: Verify) -> crate::error::Result<Mapping> {
    let program = this_program()?;
    match origin {
        Origin::Image(opened) => Mapping::of(opened, verify, program),
        Origin::Pipe(_) => Err(RestoreError::MappedPipe.into()),
    }
}

/// Opens the image. One from a pipe is passed on to QEMU while it arrives, if the user trusts it; otherwise it has to be
/// read to its end first, since its signature stands there.
fn origin(
    location: &Location,
    is_trusted: bool,
    ui: &Ui,
) -> Result<(Manifest, Trust, Origin<BufReader<Stdin>>), Failure> {
    let mut stdin = BufReader::with_capacity(1 << 16, std::io::stdin());
    let opened = match location {
        Location::Pipe => {
            let begins = stdin.fill_buf().map_err(|source| StoreError::Pipe {
                act: "read",
                source,
            })?;
            if is_trusted && begins_with_head(begins) {
                let piped = PipedImage::begin(stdin).about(location)?;
                let manifest = Manifest::from_json(piped.head().about(location)?.manifest_json);
                let at = FileOffset(0);
                let manifest = manifest.map_err(|source| ContainerError::Manifest { at, source });
                return Ok((
                    manifest.about(location)?,
                    Trust::Unsigned,
                    Origin::Pipe(piped),
                ));
            }
            image::open_pipe(&mut stdin).about(location)?
        }
        _ => image::open(location).about(location)?,
    };
    if opened.torn().is_some() {
        ui.warn("the image's last edit was cut off; the generation before it is restored");
    }
    let manifest = opened.image().manifest().about(location)?;
    let trust = Trust::of(opened.image()).about(location)?;
    Ok((manifest, trust, Origin::Image(Box::new(opened))))
}

/// Restores clones, which run on in the background.
fn make_clones(
    plan: &Plan,
    origin: &Origin<BufReader<Stdin>>,
    count: u32,
    ui: &Ui,
) -> Result<ExitCode, Error> {
    let Origin::Image(image) = origin else {
        return Err(RestoreError::ClonesOfPipe.into());
    };
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let (reports, guests): (Vec<_>, Vec<_>) = restore::restore_clones(plan, image, count, ui)?
        .into_iter()
        .unzip();
    ui.answer(&json!({ "guests": reports }), |_| {
        reports.iter().map(restored).collect()
    })?;
    for note in plan.notes() {
        ui.note(note);
    }
    guests.into_iter().for_each(|guest| drop(guest.keep()));
    Ok(ExitCode::SUCCESS)
}

fn print_plan(plan: &Plan, with_command: bool, ui: &Ui) -> Outcome {
    let command = plan.command()?;
    let document = json!({ "name": plan.name(), "argv": command, "warnings": plan.warnings() });
    ui.answer(&document, |_| {
        if with_command {
            shell_words(&command)
        } else {
            format!("{} can be restored here\n", plan.name())
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn restored(report: &RestoreReport) -> String {
    let state = match report.running_after_ms {
        Some(ms) => format!("runs after {ms} ms"),
        None => format!("is {}", report.state),
    };
    let memory = report.served.as_ref().map(all_there).unwrap_or_default();
    format!(
        "restored {}: it {state}, pid {}, monitor {}{memory}\n",
        report.name,
        report.pid,
        report.qmp.display()
    )
}

fn warn_of(served: &Serving, ui: &Ui) {
    if let Some(problem) = &served.problem {
        ui.warn(problem);
    }
}

/// How the guest got its memory.
fn all_there(served: &Serving) -> String {
    format!(
        "; giving it all its memory took {} ms; it waited {} times for a page, {:.1} ms at the most",
        served.elapsed_ms,
        served.requests,
        Duration::from_micros(served.worst_stall_us).as_secs_f64() * 1000.0
    )
}

/// Goes on with a guest whose memory nobody gives it any more.
fn resume(name: &str, args: &RestoreArgs, invocation: &Invocation, ui: &Ui) -> Outcome {
    let runtime = RuntimeDir::open()?;
    let dir = runtime.guest(name)?;
    let resumed = restore::resume(&dir, invocation, Duration::from_secs(args.guest.timeout))?;
    let (act, state) = match resumed {
        Resumed::StartOver(words, cwd) => {
            ui.note(&format!(
                "{name} was cut off before it could run: it is restored anew"
            ));
            return start_over(&dir, words, cwd, args.wait, ui);
        }
        Resumed::Already(_) => ("already", None),
        Resumed::Served(state) => ("resumed", state),
    };
    let served = match args.wait {
        true => Some(restore::wait_for_memory(&dir, ui)?),
        false => Serving::of(&dir)?,
    };
    if let Some(served) = &served {
        warn_of(served, ui);
    }
    let document = json!({ "name": name, "act": act, "state": state, "served": served });
    ui.answer(&document, |_| resumed_text(name, act, served.as_ref()))?;
    Ok(ExitCode::SUCCESS)
}

fn resumed_text(name: &str, act: &str, served: Option<&Serving>) -> String {
    let percent = served.map_or(0, Serving::percent);
    match act {
        "already" if percent == 100 => format!("all memory of {name} is there\n"),
        "already" => format!("{name} is being given its memory: {percent} % is there\n"),
        _ => format!("{name} goes on: {percent} % of its memory is there\n"),
    }
}

/// Restores a guest anew as it was restored before.
fn start_over(dir: &GuestDir, words: Vec<OsString>, cwd: PathBuf, waits: bool, ui: &Ui) -> Outcome {
    // The paths among its words start there.
    std::env::set_current_dir(&cwd).map_err(|source| StoreError::File {
        act: "enter",
        path: cwd.clone(),
        source,
    })?;
    let Some(mut args) = super::parse_restore(&words) else {
        return Err(ServeError::NoTask.into());
    };
    let name = dir.name().to_owned();
    if args.count.is_some() {
        return Err(RestoreError::CutOffClone { guest: name }.into());
    }
    dir.remove()?;
    args.guest.start.name = Some(name);
    args.wait |= waits;
    restore(args, invocation(words, cwd)?, ui)
}

/// Says where the consoles went that were somebody's terminal: they are logs beside QEMU's own now.
fn note_logs(report: &RestoreReport, ui: &Ui) {
    // A guest that has ended by now tells nothing, and needs no note.
    let process = ProcessFacts::read(report.pid).ok();
    let arguments = process.and_then(|process| Arguments::parse(&process.argv).ok());
    let logs = arguments.as_ref().map(terminal_logs).unwrap_or_default();
    for (name, path) in logs {
        ui.note(&format!("{name} was a terminal; it goes to {path} now"));
    }
}

fn leave(guest: RunningGuest) -> Outcome {
    guest.keep();
    Ok(ExitCode::SUCCESS)
}

/// Waits until the guest ends by itself, or ends it when the user interrupts.
fn stay(mut guest: RunningGuest, ui: &Ui) -> Outcome {
    while guest.check_runs().is_ok() {
        if ui.is_cancelled() {
            guest.kill()?;
            return Ok(ExitCode::from(130));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    guest.kill()?;
    Ok(ExitCode::SUCCESS)
}

/// The words of a command as a POSIX shell takes them, one option a line.
pub(super) fn shell_words(command: &[String]) -> String {
    let is_plain = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_./:=,@%+".contains(&b))
    };
    let quoted = |word: &String| {
        if is_plain(word) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    let mut text = String::new();
    for (index, word) in command.iter().enumerate() {
        let separator = match (index, word.starts_with('-')) {
            (0, _) => "",
            (_, true) => " \\\n    ",
            (_, false) => " ",
        };
        text.push_str(separator);
        text.push_str(&quoted(word));
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_command_can_be_pasted_into_a_shell() {
        let command = ["qemu", "-name", "it's", "-append", "a b", "-S"].map(str::to_owned);
        assert_eq!(
            shell_words(&command),
            "qemu \\\n    -name 'it'\\''s' \\\n    -append 'a b' \\\n    -S\n"
        );
    }
}
