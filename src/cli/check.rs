//! `vmstow check`: would the guest in an image run here?

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::restore::invocation;
use super::settings::{self, RemapArgs};
use super::ui::{Ui, threads};
use super::{About, Failure, Outcome};
use crate::config::compat::{Finding, Level};
use crate::error::ErrorKind;
use crate::image::{self, OpenedImage};
use crate::pipeline;
use crate::progress::Progress;
use crate::restore::{
    self, LazyOptions, LazyRequest, Mapping, RestoreRequest, RomSize, Verdict, Verify,
};
use crate::run::{self, RunRequest};
use crate::store::{Location, SshLocation};

/// Say whether the guest in an image would run here, and everything that speaks against it
///
/// The QEMU that a restore would use is started with the guest's devices and none of its files and networks, and asked what
/// it would have; nothing runs and nothing is changed. The exit code is 0 if nothing speaks against a restore but doubts.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckArgs {
    /// The image; - reads standard input
    pub(super) image: Location,

    /// Check on another host, USER@HOST:PORT or less of it, by its own vmstow and over ssh; the image stays here, and only what
    /// is needed of it is read
    #[arg(long, value_name = "HOST", value_parser = host, conflicts_with_all = ["map", "xml"])]
    on: Option<SshLocation>,

    /// Check for this QEMU instead of the one the guest was saved from
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,

    /// Would it run with this domain XML instead of the arguments that it was saved with?
    #[arg(long, value_name = "XML")]
    xml: Option<Location>,

    /// Load all of the guest on trial: by QEMU, onto throwaway overlays, cut off from networks; it never runs
    #[arg(long, conflicts_with = "xml")]
    boot: bool,

    #[command(flatten)]
    remaps: RemapArgs,

    /// Check for a restore that lets it run before its memory is there
    #[arg(long, conflicts_with = "map")]
    lazy: bool,

    /// Check for a restore that maps its memory from the image
    #[arg(long)]
    map: bool,

    /// Check as if somebody you trust had signed the image
    #[arg(long)]
    trust: bool,

    /// Check for a restore onto overlays that end with the guest
    #[arg(long)]
    throwaway: bool,

    /// Where the overlays would go [default: $VMSTOW_OVERLAY_DIR, else /var/tmp/vmstow-UID]
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,

    /// Make room for the ROM of all devices of a driver, as the guest had it. May be given several times
    #[arg(long = "romsize", value_name = "DRIVER=BYTES")]
    rom_sizes: Vec<RomSize>,

    /// Worker threads of --boot; default: one a core
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,

    /// How long QEMU may take with --boot to load the guest
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

const EXAMPLES: &str = "\
Examples:
  vmstow check web01.stow
  vmstow check web01.stow --boot
  vmstow check web01.stow --on root@host2 --remap disk:disk0=/srv/web01.qcow2
  vmstow check web01.stow --qemu /opt/qemu/bin/qemu-system-x86_64
  vmstow check web01.stow --xml other.xml
  vmstow --json check web01.stow --remap disk:disk0=/srv/web01.qcow2";

/// Checks, and prints what was found.
pub fn run(args: CheckArgs, ui: &Ui) -> Outcome {
    if let Some(there) = &args.on {
        return super::check_far::run(&args, there, ui);
    }
    let location = args.image.clone();
    let opened = image::open_any(&location, ui).about(&location)?;
    if opened.torn().is_some() {
        ui.warn("the image's last edit was cut off; the generation before it is checked");
    }
    let verdict = check(&args, opened, ui)?;
    ui.answer(&verdict, human)?;
    Ok(exit_code(verdict.can_run))
}

/// What the program says when it ends.
pub(super) fn exit_code(can_run: bool) -> ExitCode {
    match can_run {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(ErrorKind::Host.exit_code()),
    }
}

/// Holds an image against this host.
pub(super) fn check(
    args: &CheckArgs,
    opened: OpenedImage,
    progress: &dyn Progress,
) -> Result<Verdict, Failure> {
    let location = &args.image;
    let manifest = opened.image().manifest().about(location)?;
    let mut request = request(args)?;
    if !request.remaps.is_empty() {
        let xml = opened.image().xml().about(location)?;
        restore::call_disks_by_id(&mut request.remaps, &manifest, &xml).about(location)?;
    }
    if args.map {
        let program = invocation(Vec::new(), PathBuf::from("/"))?.program;
        request.map = Some(Mapping::of(&opened, Verify::Quick, program).about(location)?);
    }
    restore::check_image(opened, manifest, &request, args.boot, progress).about(location)
}

/// A host as an argument.
pub(super) fn host(text: &str) -> Result<SshLocation, String> {
    match format!("ssh://{text}/image").parse() {
        Ok(Location::Ssh(there)) if !text.contains('/') => Ok(there),
        _ => Err("it has to be [USER@]HOST[:PORT]".to_owned()),
    }
}

impl CheckArgs {
    /// The words that ask the same of another host.
    pub(super) fn words(&self) -> Result<Vec<String>, Failure> {
        let mut words = Vec::new();
        let mut option = |name: &str, value: String| words.push(format!("--{name}={value}"));
        if let Some(qemu) = &self.qemu {
            option("qemu", qemu.display().to_string());
        }
        for remap in self.remaps.clone().all()? {
            option("remap", remap.to_string());
        }
        if let Some(dir) = &self.overlay_dir {
            option("overlay-dir", dir.display().to_string());
        }
        for rom_size in &self.rom_sizes {
            option("romsize", rom_size.to_string());
        }
        option("timeout", self.timeout.to_string());
        let switches = [
            ("--boot", self.boot),
            ("--lazy", self.lazy),
            ("--trust", self.trust),
            ("--throwaway", self.throwaway),
        ];
        let switches = switches.into_iter().filter(|(_, is_given)| *is_given);
        words.extend(switches.map(|(word, _)| word.to_owned()));
        Ok(words)
    }
}

fn request(args: &CheckArgs) -> Result<RestoreRequest, Failure> {
    let settings = settings::read()?;
    let arguments = match &args.xml {
        Some(xml) => Some(arguments_of(xml, args)?),
        None => None,
    };
    let lazy = LazyOptions {
        fill_rate: None,
        through_qemu: false,
        records: false,
    };
    let lazy = match args.lazy {
        true => Some(LazyRequest {
            options: lazy,
            invocation: invocation(Vec::new(), PathBuf::from("/"))?,
        }),
        false => None,
    };
    Ok(RestoreRequest {
        image: args.image.clone(),
        qemu: args.qemu.clone(),
        name: None,
        paused: false,
        remaps: args.remaps.clone().all()?,
        settings,
        trust: args.trust,
        accept_changed_disks: false,
        force: Vec::new(),
        rom_sizes: args.rom_sizes.clone(),
        arguments,
        map: None,
        throwaway: args.throwaway,
        overlay_dir: args.overlay_dir.clone(),
        clones: None,
        threads: args.threads.unwrap_or_else(pipeline::default_threads),
        timeout: Duration::from_secs(args.timeout),
        lazy,
        held_as: None,
    })
}

/// The arguments that `vmstow run` would start a guest with from this XML.
fn arguments_of(xml: &Location, args: &CheckArgs) -> Result<Vec<String>, Failure> {
    let request = RunRequest {
        source: xml.clone(),
        paused: false,
        qemu: args.qemu.clone(),
        name: None,
        remaps: Vec::new(),
        settings: Default::default(),
        trust: args.trust,
        timeout: Duration::from_secs(args.timeout),
    };
    let plan = run::Plan::look(&request).about(xml)?;
    Ok(plan.command().to_vec())
}

/// `web01 cannot run here:` and a line or two for each finding.
pub(super) fn human(verdict: &Verdict) -> String {
    let count = |level| {
        verdict
            .findings
            .iter()
            .filter(|one| one.level == level)
            .count()
    };
    let (reasons, doubts) = (count(Level::Refusal), count(Level::Warning));
    let plural = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    };
    let guest = &verdict.guest;
    let version = verdict
        .qemu_version
        .as_ref()
        .map(|version| format!(" (QEMU {version})"));
    let with = format!("{}{}", verdict.qemu, version.unwrap_or_default());
    let mut text = match (reasons, doubts) {
        (0, 0) => format!("{guest} can run here, with {with}\n"),
        (0, _) => format!(
            "{guest} can run here, with {with}; {}:\n",
            plural(doubts, "doubt")
        ),
        (_, 0) => format!(
            "{guest} cannot run here, with {with}; {}:\n",
            plural(reasons, "reason")
        ),
        _ => format!(
            "{guest} cannot run here, with {with}; {}, {}:\n",
            plural(reasons, "reason"),
            plural(doubts, "doubt")
        ),
    };
    for finding in &verdict.findings {
        text.push_str(&line(finding));
    }
    if let Some(boot) = &verdict.boot {
        let ms = boot.loaded_after_ms;
        text.push_str(&format!(
            "loaded on trial: QEMU had all of it after {ms} ms\n"
        ));
    }
    text
}

fn line(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Refusal => "reason",
        Level::Warning => "doubt",
    };
    let (code, fact) = (finding.code, &finding.fact);
    let advice = finding.advice();
    let advice = advice.map(|advice| format!("{:9}{advice}\n", ""));
    format!("  {level:6} {code}: {fact}\n{}", advice.unwrap_or_default())
}
