//! What would be started, with which QEMU and arguments, and whether it can be: all asked before anything is made.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Zoned;
use rustix::process::geteuid;

use super::making::Made;
use super::source::Source;
use super::{RunError, RunRequest, knowledge};
use crate::config::command_line::{
    CommandContext, CommandLine, QmpCommand, SideCommand, SideKind, command_line, virtiofsd_of,
};
use crate::config::domain::Domain;
use crate::config::domain::shares::ShareDriver;
use crate::config::expand::{Expanded, expand};
use crate::config::foreign::{foreign, open_networks};
use crate::config::xml::Document;
use crate::config::{
    Arguments, ConfigError, Remap, Resource, ResourceKind, ResourceTable, Unmodelled, passt, remap,
};
use crate::error::{Error, Result};
use crate::host::{
    self, HostError, Lasting, QEMU_BINARY, QemuFacts, RuntimeDir, find_program, is_name,
    sanitise_name,
};
use crate::image::Trust;
use crate::supervise::{self, Launch, SideProgram};

/// Where virtiofsd is where the XML does not say, most wanted first.
const VIRTIOFSD: [&str; 3] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd",
];

/// A guest that can be started here.
pub struct Plan {
    request: RunRequest,
    /// Whether all is used that reaches past the guest.
    is_trusted: bool,
    image: Option<PathBuf>,
    /// The guest's name here.
    name: String,
    emulator: PathBuf,
    /// Programs that share directories and take their options in the old words.
    virtiofsds_in_c: BTreeSet<String>,
    cwd: PathBuf,
    expanded: Expanded,
    /// The user's usual ones that fit, then those that were asked for.
    remaps: Vec<Remap>,
    /// Of the arguments, made for a directory that stands for the guest's own.
    command: CommandLine,
    warnings: Vec<String>,
}

impl Plan {
    /// Holds the XML against this host.
    ///
    /// # Errors
    /// Everything at once for which no guest can be made of the XML; whose image it is; a QEMU that is missing.
    pub fn check(request: &RunRequest) -> Result<Self> {
        let plan = Plan::read(request, false)?;
        plan.refuse_taken()?;
        plan.refuse_foreign_resources()?;
        Ok(plan)
    }

    /// Reads the XML and says what would be started. Nothing that it names has to be there.
    ///
    /// # Errors
    /// Everything at once for which no guest can be made of the XML.
    pub fn look(request: &RunRequest) -> Result<Self> {
        Plan::read(request, true)
    }

    fn read(request: &RunRequest, is_look: bool) -> Result<Self> {
        if let Some(name) = request.name.as_ref().filter(|name| !is_name(name)) {
            return Err(HostError::BadName { name: name.clone() }.into());
        }
        let source = Source::open(&request.source)?;
        let of_user = source.trust.is_none();
        let not_xml = |error| -> Error {
            match error {
                ConfigError::XmlNotRead { .. } if of_user => RunError::NotXml { why: error }.into(),
                error => error.into(),
            }
        };
        let document = Document::parse(&source.xml).map_err(not_xml)?;
        let reading = Domain::read(&document)?;
        let is_trusted = request.trust || source.trust.as_ref().is_some_and(Trust::is_trusted);
        refuse_own_arguments(&reading.domain, is_trusted)?;
        let mut warnings = Vec::new();
        let emulator = match is_look {
            true => named_emulator(request, &reading.domain),
            false => emulator(request, &source, &reading.domain, &mut warnings)?,
        };
        let facts = match is_look {
            true => QemuFacts::probe(&emulator).ok(),
            false => Some(QemuFacts::probe(&emulator)?),
        };
        let known = knowledge::gather(&reading.domain, facts.as_ref(), &emulator, is_look)?;
        let expanded = expand(&document, &known)?;
        let own_name = &expanded.domain.name;
        let name = request
            .name
            .clone()
            .unwrap_or_else(|| sanitise_name(own_name));
        // A program that a stranger names is not run to hear what it says.
        let virtiofsds_in_c = match source.is_trusted() || request.trust {
            true => virtiofsds_in_c(&expanded.domain),
            false => BTreeSet::new(),
        };
        let mut plan = Plan {
            is_trusted,
            virtiofsds_in_c,
            image: source.image.clone(),
            name,
            emulator,
            cwd: directory(),
            command: empty(),
            warnings,
            request: request.clone(),
            remaps: Vec::new(),
            expanded,
        };
        let arguments = Arguments::parse(&plan.command_at(&plan.place())?.argv)?;
        let table = ResourceTable::from_arguments(&arguments, plan.machine_type());
        plan.remaps = remap::fitting(&request.settings.remaps, &table);
        plan.remaps.extend(request.remaps.iter().cloned());
        plan.command = plan.command_at(&plan.place())?;
        let warned = plan.expanded.warnings.iter().chain(&plan.command.warnings);
        let warned: Vec<String> = warned.map(Unmodelled::to_string).collect();
        plan.warnings.extend(warned);
        Ok(plan)
    }

    /// The guest's name here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The longest QEMU may take to begin.
    pub fn timeout(&self) -> Duration {
        self.request.timeout
    }

    /// Whether the guest is left paused.
    pub fn is_paused(&self) -> bool {
        self.request.paused
    }

    /// What is not as the XML says, the guest being the same; a sentence each, with its line.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What QEMU has to be told before the guest runs.
    pub(super) fn qmp_commands(&self) -> &[QmpCommand] {
        &self.command.qmp_commands
    }

    /// The QEMU command; the runtime directory stands in it as it would be named.
    pub fn command(&self) -> &[String] {
        &self.command.argv
    }

    /// What would be started beside QEMU.
    pub fn side_programs(&self) -> Vec<SideProgram> {
        self.command
            .side_commands
            .iter()
            .map(side_program)
            .collect()
    }

    /// The directory that the guest gets if nobody else takes its name.
    fn place(&self) -> PathBuf {
        RuntimeDir::usual_path().join(&self.name)
    }

    /// What starts the guest in this directory, its resources remapped.
    fn command_at(&self, directory: &Path) -> Result<CommandLine> {
        let text = |path: &Path| path.display().to_string();
        let state = Lasting::find()?.tpm(&self.lasting_name());
        let now = Zoned::now();
        let context = CommandContext {
            emulator: Some(text(&self.emulator)),
            name: self.request.name.clone(),
            qmp_socket: text(&directory.join("qmp.sock")),
            state_directory: text(&state),
            memory_directory: "/dev/shm".to_owned(),
            virtiofsd: virtiofsd(),
            virtiofsds_in_c: self.virtiofsds_in_c.clone(),
            now: now.timestamp().as_second(),
            utc_offset: now.offset().seconds().into(),
            is_trusted: self.is_trusted,
            is_root: geteuid().is_root(),
            ..CommandContext::new(&text(directory))
        };
        let mut command = command_line(&self.expanded.domain, &context)?;
        if !self.remaps.is_empty() {
            self.remap(&mut command, &context)?;
        }
        Ok(command)
    }

    /// Gives the guest the backends that were chosen for it, and starts beside it what they need and no more.
    fn remap(&self, command: &mut CommandLine, context: &CommandContext) -> Result<()> {
        let arguments = Arguments::parse(&command.argv)?;
        let table = ResourceTable::from_arguments(&arguments, self.machine_type());
        let remaps = self.remaps.iter();
        let remaps = remaps.filter(|remap| !move_state(remap, &mut command.side_commands, &table));
        let remaps: Vec<Remap> = remaps.cloned().collect();
        let remapped = remap::apply(&arguments, self.machine_type(), &remaps)?;
        let mut arguments = remapped.arguments;
        passt::give_sockets(&mut arguments, &context.directory);
        command.argv = arguments.write();
        let argv = &command.argv;
        let is_named = |socket: &str| argv.iter().any(|word| word.contains(socket));
        command.side_commands.retain(|it| is_named(&it.socket));
        for own in passt::own(&arguments, &context.directory) {
            let mut argv = passt::command(&context.passt, &own.socket, context.is_root);
            argv.extend(own.addresses);
            command.side_commands.push(SideCommand {
                kind: SideKind::Passt,
                alias: own.id,
                argv,
                socket: own.socket,
                directories: Vec::new(),
            });
        }
        Ok(())
    }

    fn machine_type(&self) -> Option<&str> {
        self.expanded.domain.os.machine.as_deref()
    }

    /// Under what the state of its TPM is kept.
    fn lasting_name(&self) -> String {
        match self.expanded.domain.uuid {
            Some(uuid) => uuid.to_string(),
            None => self.name.clone(),
        }
    }

    /// Makes the guest's runtime directory and says what to start in it.
    pub(super) fn launch(&self) -> Result<Launch> {
        let runtime = RuntimeDir::open()?;
        let dir = runtime.create_guest(&self.name)?;
        let command = match self.command_at(dir.path()) {
            Ok(command) => command,
            Err(error) => {
                dir.remove()?;
                return Err(error);
            }
        };
        Ok(Launch {
            argv: command.argv.into_iter().map(Into::into).collect(),
            cwd: self.cwd.clone(),
            dir,
            image: self.image.clone(),
            inherit: Vec::new(),
            side: command.side_commands.iter().map(side_program).collect(),
            environment: command.environment,
            xml: self.xml(),
        })
    }

    /// The XML in which nothing is left to choose; `None` where other backends were chosen than it names.
    fn xml(&self) -> Option<String> {
        if !self.remaps.is_empty() {
            return None;
        }
        let mut document = self.expanded.document.clone();
        if let (Some(name), Some(element)) = (&self.request.name, document.root.find_mut("name")) {
            element.set_text(name);
        }
        Some(document.write())
    }

    /// Makes the files and directories that a guest has to find and that only it would make.
    pub(super) fn make_missing(&self) -> Result<Made> {
        let mut made = Made::default();
        if let Some(nvram) = &self.expanded.domain.os.nvram
            && let Some(path) = &nvram.path
            && !self.cwd.join(path).exists()
        {
            let path = self.cwd.join(path);
            let is_same_format = nvram
                .template_format
                .is_none_or(|it| Some(it) == nvram.format)
                || nvram.format.is_none();
            match &nvram.template {
                Some(template) if is_same_format => made.file(&path, Path::new(template))?,
                _ => return Err(RunError::NoTemplate { path }.into()),
            }
        }
        let directories = self.command.side_commands.iter();
        for directory in directories.flat_map(|it| &it.directories) {
            made.directory(Path::new(directory))?;
        }
        Ok(made)
    }

    fn refuse_taken(&self) -> Result<()> {
        let running = supervise::list(&RuntimeDir::open()?)?.running;
        match running.into_iter().find(|guest| guest.name == self.name) {
            Some(guest) => Err(RunError::NameTaken {
                name: guest.name,
                pid: guest.process.pid,
            }
            .into()),
            None => Ok(()),
        }
    }

    /// The XML of a stranger's image may use only what the user named for it.
    fn refuse_foreign_resources(&self) -> Result<()> {
        let Some(trust) = self.trust_of_stranger()? else {
            return Ok(());
        };
        let arguments = Arguments::parse(&self.command.argv)?;
        let remaps: &[Remap] = &self.remaps;
        let place = format!("{}/", self.place().display());
        let is_named = |name: &str| {
            let is_ours = name.starts_with(&place) && !name.contains("..");
            is_ours || remaps.iter().any(|remap| remap.names(name))
        };
        let allow = &self.request.settings.allow;
        let mut resources = foreign(&arguments, &is_named, allow);
        let is_remapped = |nic: Option<&Resource>| {
            remaps.iter().any(|remap| match nic {
                Some(nic) => remap.selects(nic),
                None => remap.selects_all(ResourceKind::Nic),
            })
        };
        resources.extend(open_networks(&arguments, &is_remapped, allow));
        let programs = self.command.side_commands.iter();
        resources.extend(programs.map(|it| format!("program {}", it.argv.join(" "))));
        match resources.is_empty() {
            true => Ok(()),
            false => Err(RunError::Untrusted {
                guest: self.name.clone(),
                state: trust.to_string(),
                resources,
            }
            .into()),
        }
    }

    /// Who vouches for the image, if nobody we trust does.
    fn trust_of_stranger(&self) -> Result<Option<Trust>> {
        if self.image.is_none() || self.is_trusted {
            return Ok(None);
        }
        Ok(Source::open(&self.request.source)?.trust)
    }
}

/// Moves what the emulators of TPMs keep, if the remap says so; whether it does.
fn move_state(remap: &Remap, commands: &mut [SideCommand], table: &ResourceTable) -> bool {
    let mut is_moved = false;
    for command in commands {
        let mut tpms = table.of(ResourceKind::Tpm);
        let tpm = tpms.find(|tpm| tpm.backend.path.as_ref() == Some(&command.socket));
        let (Some(tpm), Some(state)) = (tpm, command.directories.first().cloned()) else {
            continue;
        };
        if let Some(moved) = remap.moved_state(tpm, &state, &host::is_socket) {
            for word in command.argv.iter_mut().skip(1) {
                *word = word.replace(&state, &moved);
            }
            command.directories = vec![moved];
            is_moved = true;
        }
    }
    is_moved
}

/// Before it is known.
fn empty() -> CommandLine {
    CommandLine {
        argv: Vec::new(),
        environment: Vec::new(),
        side_commands: Vec::new(),
        qmp_commands: Vec::new(),
        warnings: Vec::new(),
    }
}

fn refuse_own_arguments(domain: &Domain, is_trusted: bool) -> Result<(), RunError> {
    let extra = &domain.extra;
    let has_none = extra.arguments.is_empty() && extra.environment.is_empty();
    match is_trusted || (has_none && domain.overrides.is_empty()) {
        true => Ok(()),
        false => Err(RunError::OwnArguments {
            guest: domain.name.clone(),
            line: extra.line,
        }),
    }
}

/// The QEMU that the user names, now or for all guests.
fn wanted_emulator(request: &RunRequest) -> Option<PathBuf> {
    let usual = request.settings.qemu.as_ref().map(PathBuf::from);
    request.qemu.clone().or(usual)
}

/// The QEMU that is asked for, whether it is here or not.
fn named_emulator(request: &RunRequest, domain: &Domain) -> PathBuf {
    let named = domain.devices.emulator.as_ref().map(PathBuf::from);
    let named = wanted_emulator(request).or(named);
    named.unwrap_or_else(|| find_program(QEMU_BINARY).unwrap_or_else(|| QEMU_BINARY.into()))
}

/// The QEMU to use: the one asked for; else the one that the XML names, if it may and it is here; else the one in `PATH`,
/// since distributions have it in different places under different names.
fn emulator(
    request: &RunRequest,
    source: &Source,
    domain: &Domain,
    warnings: &mut Vec<String>,
) -> Result<PathBuf> {
    if let Some(qemu) = wanted_emulator(request) {
        return Ok(qemu);
    }
    let named = domain.devices.emulator.as_deref().map(Path::new);
    let may_name = source.is_trusted() || request.trust;
    if let Some(named) = named.filter(|named| may_name && named.is_file()) {
        return Ok(named.to_owned());
    }
    let found = host::find_qemu()?;
    if let Some(named) = named.filter(|named| may_name && *named != found) {
        let (named, found) = (named.display(), found.display());
        warnings.push(format!("the emulator {named} is not here; {found} is used"));
    }
    Ok(found)
}

/// Where the relative paths of the XML start: where the user stands.
fn directory() -> PathBuf {
    std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"))
}

fn virtiofsd() -> String {
    let known = VIRTIOFSD.iter().find(|path| Path::new(path).is_file());
    let found = known
        .map(PathBuf::from)
        .or_else(|| find_program("virtiofsd"));
    found.map_or(VIRTIOFSD[0].to_owned(), |path| path.display().to_string())
}

/// Those of the programs that share directories which take their options as the virtiofsd in C did.
fn virtiofsds_in_c(domain: &Domain) -> BTreeSet<String> {
    let usual = virtiofsd();
    let shares = domain.devices.shares.iter();
    let shares = shares.filter(|it| it.driver == ShareDriver::VirtioFs && it.socket.is_none());
    let programs: BTreeSet<&str> = shares.map(|it| virtiofsd_of(it, &usual)).collect();
    let programs = programs.into_iter();
    let programs = programs.filter(|program| host::is_virtiofsd_in_c(Path::new(program)));
    programs.map(str::to_owned).collect()
}

fn side_program(command: &SideCommand) -> SideProgram {
    let state = match command.kind {
        SideKind::Swtpm => command.directories.first().map(PathBuf::from),
        SideKind::Virtiofsd | SideKind::Passt => None,
    };
    SideProgram {
        name: command.alias.clone(),
        argv: command.argv.clone(),
        socket: PathBuf::from(&command.socket),
        state,
    }
}
