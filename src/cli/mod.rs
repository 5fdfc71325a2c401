//! The command line: one file a subcommand, with its arguments, the call, and what it prints.
//!
//! Answers go to stdout, everything else to stderr through `Ui`. Nobody imports this module but `main`.

mod ask_qemu;
mod check;
mod check_far;
mod completion;
mod config;
mod console;
mod convert;
mod copy;
mod demo;
mod devices;
mod diff;
mod doctor;
mod explain;
mod hexdump;
mod hint;
mod inspect;
mod list;
mod mem;
mod monitor;
mod repair;
mod restore;
mod run;
mod save;
mod settings;
mod start;
mod stop;
mod ui;
mod verify;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::host::ProcessId;
use ui::Ui;

/// Stows a running QEMU guest in one file and brings it back, here or on another host.
///
/// An image (.stow) holds QEMU's migration stream, the guest's configuration and a digest of every byte. Stock tools
/// read it: `zstd -dc x.stow` gives QEMU's stream back.
#[derive(Debug, Parser)]
#[command(name = "vmstow", version, max_term_width = 110, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    output: ui::OutputArgs,

    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0 done, 1 failed, 2 usage, 3 image damaged or incomplete, 4 this host, its QEMU or a changed
  resource, 5 remote, 6 refused for trust, 130 interrupted (the guest was put back)";

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Save(save::SaveArgs),
    Restore(restore::RestoreArgs),
    Check(check::CheckArgs),
    Convert(convert::ConvertArgs),
    Copy(copy::CopyArgs),
    Inspect(inspect::InspectArgs),
    Verify(verify::VerifyArgs),
    Diff(diff::DiffArgs),
    Config(config::ConfigArgs),
    Mem(mem::MemArgs),
    Repair(repair::RepairArgs),
    List(list::ListArgs),
    Stop(stop::StopArgs),
    Explain(explain::ExplainArgs),
    Console(console::ConsoleArgs),
    Monitor(monitor::MonitorArgs),
    #[command(name = "serve")]
    ServePeer(copy::ServeArgs),
    Doctor(doctor::DoctorArgs),
    Demo(demo::DemoArgs),
    Completion(completion::CompletionArgs),
    Man(completion::ManArgs),
    /// Watches over a save; started by `vmstow save` itself.
    #[command(name = "__guardian", hide = true)]
    Guardian,
    /// Holds a monitor of a lazily restored guest; started by `vmstow restore` itself.
    #[command(name = "__keeper", hide = true)]
    Keeper {
        directory: PathBuf,
    },
    /// Attends to the programs that work for a guest beside QEMU; started by `vmstow` itself.
    #[command(name = "__attend", hide = true)]
    Attend {
        directory: PathBuf,
    },
    /// Gives a lazily restored guest its memory; started by `vmstow restore` itself.
    #[command(name = "__serve", hide = true)]
    Serve {
        #[arg(long)]
        recover: bool,
        directory: PathBuf,
    },
    /// Verifies an image that a guest runs on; started by `vmstow restore --map` itself.
    #[command(name = "__verify", hide = true)]
    Verifier(VerifierArgs),
}

#[derive(Debug, clap::Args)]
struct VerifierArgs {
    /// The guest's directory
    dir: PathBuf,
    /// Its QEMU's process id
    pid: i32,
    /// When that was started
    start_time: u64,
    /// The descriptor of the image
    image: i32,
}

/// Runs the program and gives its exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match &cli.command {
        Command::Guardian => return crate::supervise::run_guardian(),
        Command::Keeper { directory } => return crate::supervise::run_keeper(directory),
        Command::Attend { directory } => return crate::supervise::run_attendant(directory),
        Command::Serve { recover, directory } => {
            return crate::restore::run_server(directory, *recover);
        }
        _ => {}
    }
    if let Command::Verifier(args) = &cli.command {
        let (pid, start_time) = (args.pid, args.start_time);
        return crate::restore::run_verifier(&args.dir, ProcessId { pid, start_time }, args.image);
    }
    let ui = Ui::new(&cli.output);
    let done = match cli.command {
        Command::Run(args) => run::run(args, &ui),
        Command::Save(args) => save::run(args, &ui),
        Command::Restore(args) => restore::run(args, &ui),
        Command::Check(args) => check::run(args, &ui),
        Command::Convert(args) => convert::run(&args, &ui),
        Command::Copy(args) => copy::run(&args, &ui),
        Command::ServePeer(args) => copy::serve(&args),
        Command::Inspect(args) => inspect::run(&args, &ui),
        Command::Verify(args) => verify::run(&args, &ui),
        Command::Diff(args) => diff::run(&args, &ui),
        Command::Config(args) => config::run(args, &ui),
        Command::Mem(args) => mem::run(&args, &ui),
        Command::Repair(args) => repair::run(&args, &ui),
        Command::List(args) => list::run(&args, &ui),
        Command::Stop(args) => stop::run(&args, &ui),
        Command::Explain(args) => explain::run(&args, &ui),
        Command::Console(args) => console::run(&args, &ui),
        Command::Monitor(args) => monitor::run(&args, &ui),
        Command::Doctor(args) => doctor::run(&args, &ui),
        Command::Demo(args) => demo::run(&args, &ui),
        Command::Completion(args) => completion::run(&args, Cli::command()),
        Command::Man(args) => completion::run_man(&args, Cli::command()),
        Command::Guardian
        | Command::Verifier(_)
        | Command::Keeper { .. }
        | Command::Attend { .. }
        | Command::Serve { .. } => Ok(ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|failure| ui.fail(&failure.at_its_root()))
}

/// The arguments of a `restore` as they were given, the program's name not among them.
fn parse_restore(words: &[OsString]) -> Option<restore::RestoreArgs> {
    let program = std::iter::once(OsStr::new("vmstow"));
    let words = program.chain(words.iter().map(OsString::as_os_str));
    match Cli::try_parse_from(words).ok()?.command {
        Command::Restore(args) => Some(args),
        _ => None,
    }
}

/// What a subcommand gives: an exit code, or what to tell the user.
type Outcome = Result<ExitCode, Failure>;

/// An error together with what it is about.
#[derive(Debug)]
struct Failure {
    error: crate::error::Error,
    /// The image the error is about, as the user named it.
    image: Option<String>,
}

impl Failure {
    /// An image is not damaged because it cannot be reached.
    fn at_its_root(self) -> Failure {
        Failure {
            error: crate::store::far_cause(&self.error).unwrap_or(self.error),
            image: self.image,
        }
    }
}

impl<E: Into<crate::error::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure {
            error: error.into(),
            image: None,
        }
    }
}

/// Says which image an error is about.
trait About<T> {
    fn about(self, image: &dyn std::fmt::Display) -> Result<T, Failure>;
}

impl<T, E: Into<crate::error::Error>> About<T> for Result<T, E> {
    fn about(self, image: &dyn std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure {
            error: error.into(),
            image: Some(image.to_string()),
        })
    }
}
