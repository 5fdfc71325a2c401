//! `vmstow run`: starts a guest from domain XML.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::restore::shell_words;
use super::settings;
use super::start::StartArgs;
use super::ui::Ui;
use super::{About, Outcome};
use crate::progress::Progress;
use crate::run::{self, Plan, RunReport, RunRequest};
use crate::store::Location;

/// Start a guest from libvirt domain XML
///
/// A QEMU is started that has what the XML describes; addresses and devices that the XML leaves to libvirt are chosen as
/// libvirt chooses them. The guest runs on in the background: see `vmstow list`, `console`, `save` and `stop`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The domain XML, or an image: then the XML in it, and the guest starts afresh. - reads XML from standard input
    #[arg(value_name = "XML|IMAGE")]
    source: Location,

    #[command(flatten)]
    start: StartArgs,

    /// Use what the XML says to QEMU past libvirt (qemu:commandline), and the resources that an image names which nobody
    /// you trust signed
    #[arg(long)]
    trust: bool,

    /// Print the QEMU command and do nothing; none of the files that the XML names need exist
    #[arg(long)]
    print_command: bool,

    /// How long QEMU may take to start
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

const EXAMPLES: &str = "\
Examples:
  vmstow run web01.xml
  vmstow run web01.xml --paused --remap disk:vda=/srv/copy.qcow2
  vmstow run web01.stow --name web02
  vmstow run web01.xml --print-command
  virsh dumpxml web01 | vmstow run -";

/// Starts the guest, or prints its command.
pub fn run(args: RunArgs, ui: &Ui) -> Outcome {
    let request = RunRequest {
        source: args.source.clone(),
        paused: args.start.paused,
        qemu: args.start.qemu,
        name: args.start.name,
        remaps: args.start.remaps.all()?,
        settings: settings::read()?,
        trust: args.trust,
        timeout: Duration::from_secs(args.timeout),
    };
    if args.print_command {
        let plan = Plan::look(&request).about(&args.source)?;
        plan.warnings().iter().for_each(|warning| ui.warn(warning));
        let command = plan.command();
        let programs = plan.side_programs();
        let document = json!({ "name": plan.name(), "argv": command, "side_programs": programs });
        ui.answer(&document, |_| shell_words(command))?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = Plan::check(&request).about(&args.source)?;
    plan.warnings().iter().for_each(|warning| ui.warn(warning));
    let (report, guest) = run::run(&plan).about(&args.source)?;
    ui.answer(&report, started)?;
    guest.keep();
    Ok(ExitCode::SUCCESS)
}

fn started(report: &RunReport) -> String {
    format!(
        "{} {}, pid {}, monitor {}\n",
        report.name,
        match report.state.as_str() {
            "running" => "runs".to_owned(),
            state => format!("is {state}"),
        },
        report.pid,
        report.qmp.display()
    )
}
