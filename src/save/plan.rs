//! What would be saved and whether it can be: everything is asked here, and nothing is touched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use serde::Serialize;

use super::describe::Description;
use super::disks;
use super::{GuestLeft, SaveError, SaveRequest, Source, Then};
use crate::container::Layout;
use crate::error::Result;
use crate::host::{self, HostError, ProcessFacts, ProcessId, ProcessLock, RuntimeDir};
use crate::pipeline::PipelineError;
use crate::qmp::{DiskSnapshot, QmpClient, QmpError, RunState, SavedSettings};
use crate::store::{Location, check_target};

/// How long a monitor may take to greet.
const GREETING: Duration = Duration::from_secs(5);

/// A guest that can be saved, with an open connection to its QEMU.
pub struct Plan {
    pub(super) qmp: QmpClient,
    pub(super) monitor: PathBuf,
    pub(super) description: Description,
    pub(super) settings: SavedSettings,
    pub(super) run_state: RunState,
    pub(super) was_running: bool,
    /// Keeps other savers away; `None` where the kernel knows no such lock.
    pub(super) lock: Option<ProcessLock>,
    /// How its disks go on in overlays, if they shall.
    pub(super) snapshots: Vec<DiskSnapshot>,
    /// The disks that it may write to, by the names of their devices.
    writable: Vec<String>,
    report: PlanReport,
}

/// What a save would do, for `--dry-run`.
#[derive(Debug, Clone, Serialize)]
pub struct PlanReport {
    /// The guest's name.
    pub name: String,
    /// Its run state, in QMP's words.
    pub run_state: String,
    /// Its QEMU's version.
    pub qemu: String,
    /// Its resolved machine type.
    pub machine: String,
    /// Bytes of guest memory; the image cannot become much larger.
    pub memory_bytes: u64,
    /// Bytes of it that its QEMU process holds at present: what a `raw` image may have at the most, roughly.
    pub resident_bytes: Option<u64>,
    /// Bytes free where the image is to go; `None` for a pipe.
    pub free_bytes: Option<u64>,
    /// Why QEMU would refuse, in its own words.
    pub blockers: Vec<String>,
    /// What of the guest's arguments a restore could not use, each with the reason.
    pub not_restorable: Vec<String>,
    /// Overlays that its QEMU writes to and that end with it.
    pub throwaway_disks: Vec<PathBuf>,
}

impl Plan {
    /// Looks at the guest and its host. The guest does not notice.
    ///
    /// # Errors
    /// The first reason for which it cannot be saved.
    pub fn check(request: &SaveRequest) -> Result<Self> {
        let plan = Plan::gather(request, true)?;
        plan.judge(request)?;
        Ok(plan)
    }

    /// Refuses what cannot be saved.
    ///
    /// # Errors
    /// The first reason for which it cannot be saved.
    pub fn judge(&self, request: &SaveRequest) -> Result<()> {
        self.refuse_run_state(request.from_postmigrate)?;
        self.refuse_blockers()?;
        self.refuse_live(request)?;
        self.refuse_target(request)
    }

    /// Looks, and judges nothing but whether the guest can be looked at: `--dry-run` shows what [`Plan::report`] says.
    ///
    /// # Errors
    /// No such guest, a monitor in use, or an answer of QEMU that makes no sense.
    pub fn look(request: &SaveRequest) -> Result<Self> {
        Plan::gather(request, false)
    }

    /// With `locks` other savers are kept away from before the first look on.
    fn gather(request: &SaveRequest, locks: bool) -> Result<Self> {
        let (monitor, wanted) = resolve(&request.source)?;
        let mut qmp = QmpClient::connect(&monitor, GREETING)?;
        let pid = process_behind(&qmp, &monitor)?;
        refuse_other(wanted, pid, &monitor)?;
        let lock = match locks.then(|| ProcessId::of(pid)?.lock()) {
            Some(Ok(Some(lock))) => Some(lock),
            Some(Ok(None)) => {
                let guest = name_of(&mut qmp, pid)?;
                return Err(SaveError::BeingSaved { guest }.into());
            }
            Some(Err(_)) | None => None,
        };
        let run_state = qmp.query_status()?;
        let migration = qmp.query_migrate()?;
        if migration.status.is_active() {
            let guest = name_of(&mut qmp, pid)?;
            if migration.status.is_postcopy() {
                return Err(SaveError::LacksMemory { guest }.into());
            }
            let status = migration.status.to_string();
            return Err(SaveError::MigrationActive { guest, status }.into());
        }
        let was_running = resumes(&run_state, &qmp);
        let description = Description::gather(&mut qmp, pid, &run_state, was_running)?;
        let report = PlanReport {
            name: description.name.clone(),
            run_state: run_state.to_string(),
            qemu: description.qemu_version.clone(),
            machine: description.machine_type.clone(),
            memory_bytes: description.memory_bytes,
            resident_bytes: host::resident_bytes(pid),
            free_bytes: free_bytes(&request.target),
            blockers: [migration.blocked_reasons, description.mute_shares()].concat(),
            not_restorable: description.not_restorable(),
            throwaway_disks: description.throwaway_disks(),
        };
        let settings = SavedSettings::record(&mut qmp)?;
        let writable = disks::writable(&mut qmp)?.into_iter();
        let writable = writable.map(|(name, _)| name).collect();
        let snapshots = match request.live {
            Some(live) if live.disk_snapshot => {
                let time = jiff::Timestamp::now().as_second().to_string();
                disks::snapshots(&mut qmp, &description.name, description.directory(), &time)?
            }
            _ => Vec::new(),
        };
        Ok(Plan {
            qmp,
            monitor,
            description,
            settings,
            run_state,
            was_running,
            lock,
            snapshots,
            writable,
            report,
        })
    }

    /// The overlays in which its disks will go on.
    pub(super) fn overlays(&self) -> Vec<PathBuf> {
        self.snapshots
            .iter()
            .map(|it| it.overlay.clone().into())
            .collect()
    }

    /// Its QEMU process.
    pub fn process(&self) -> ProcessId {
        self.description.process()
    }

    /// The socket of its monitor.
    pub fn monitor(&self) -> &Path {
        &self.monitor
    }

    /// Whether it is let run again when it is put back.
    pub fn was_running(&self) -> bool {
        self.was_running
    }

    /// The manifest, JSON, and the XML that an image of it would have, as far as they are known before.
    ///
    /// # Errors
    /// [`SaveError::Manifest`].
    pub fn preview(&self) -> Result<(Vec<u8>, String)> {
        let manifest = self.description.provisional(&BTreeMap::new(), false);
        Ok((super::json_of(&manifest)?, self.description.domain_xml()))
    }

    /// What a save would do.
    pub fn report(&self) -> &PlanReport {
        &self.report
    }

    fn refuse_run_state(&self, from_postmigrate: bool) -> Result<(), SaveError> {
        match &self.run_state {
            RunState::Postmigrate if from_postmigrate => Ok(()),
            RunState::Postmigrate | RunState::Inmigrate | RunState::FinishMigrate => {
                Err(self.run_state_error())
            }
            RunState::SaveVm | RunState::RestoreVm | RunState::Colo | RunState::Preconfig => {
                Err(self.run_state_error())
            }
            _ => Ok(()),
        }
    }

    fn run_state_error(&self) -> SaveError {
        SaveError::RunState {
            guest: self.report.name.clone(),
            state: self.run_state.clone(),
        }
    }

    fn refuse_blockers(&self) -> Result<(), SaveError> {
        let (guest, left) = (
            self.report.name.clone(),
            GuestLeft::AsBefore(self.run_state.clone()),
        );
        if !self.report.blockers.is_empty() {
            let reasons = self.report.blockers.clone();
            return Err(SaveError::Blocked {
                guest,
                left,
                reasons,
            });
        }
        if !self.report.throwaway_disks.is_empty() {
            let disks = self.report.throwaway_disks.clone();
            return Err(SaveError::ThrowawayDisks { guest, left, disks });
        }
        if !self.report.not_restorable.is_empty() {
            let reasons = self.report.not_restorable.clone();
            return Err(SaveError::NotRestorable {
                guest,
                left,
                reasons,
            });
        }
        Ok(())
    }

    /// A guest that runs on has to run, its QEMU to know how, and its disks to stay what they are or to be left behind.
    fn refuse_live(&self, request: &SaveRequest) -> Result<(), SaveError> {
        let Some(live) = request.live else {
            return Ok(());
        };
        let guest = self.report.name.clone();
        if request.then != Then::Resume {
            return Err(SaveError::LiveThen);
        }
        if self.run_state != RunState::Running {
            let state = self.run_state.clone();
            return Err(SaveError::NotRunning { guest, state });
        }
        if !self.settings.knows_live() {
            let version = self.report.qemu.clone();
            return Err(SaveError::LiveUnknown { guest, version });
        }
        if !self.writable.is_empty() && !live.disk_snapshot {
            let disks = self.writable.clone();
            return Err(SaveError::LiveDisks { guest, disks });
        }
        Ok(())
    }

    fn refuse_target(&self, request: &SaveRequest) -> Result<()> {
        let Some(path) = request.target.path() else {
            return match request.encoding.layout {
                Layout::Mapped => Err(PipelineError::NoPlaces.into()),
                _ => Ok(()),
            };
        };
        check_target(path, request.may_replace)?;
        // Zero pages take no room; a raw image holds every other page, which QEMU cannot hold without memory.
        let needed = match (request.encoding.layout, self.report.resident_bytes) {
            (Layout::Raw | Layout::Mapped, Some(resident)) => {
                resident.min(self.report.memory_bytes) / 2
            }
            _ => 1 << 20,
        };
        match self.report.free_bytes {
            Some(free) if free < needed => Err(SaveError::NoSpace {
                guest: self.report.name.clone(),
                directory: directory_of(path).to_owned(),
                free,
                needed,
            }
            .into()),
            _ => Ok(()),
        }
    }
}

fn name_of(qmp: &mut QmpClient, pid: i32) -> Result<String, QmpError> {
    Ok(qmp.query_name()?.unwrap_or_else(|| format!("pid {pid}")))
}

/// Whether the guest has to be let run on when it is put back. From QEMU 9 on `stop` holds a suspended guest too.
fn resumes(run_state: &RunState, qmp: &QmpClient) -> bool {
    match run_state {
        RunState::Running => true,
        RunState::Suspended => qmp.version().is_at_least(9, 0),
        _ => false,
    }
}

fn resolve(source: &Source) -> Result<(PathBuf, Option<i32>)> {
    Ok(match source {
        Source::Monitor(path) => (path.clone(), None),
        Source::Process(pid) => {
            let mut monitors = host::qmp_sockets(&ProcessFacts::read(*pid)?)?;
            (monitors.swap_remove(0), Some(*pid))
        }
        Source::Name(name) => (RuntimeDir::open()?.guest(name)?.qmp_socket(), None),
    })
}

/// The process that answers on this connection.
///
/// The name of a socket alone does not tell: another QEMU may have taken it over, and both listen then. The kernel says
/// who made the socket listen; if that one passed it on (libvirt), who holds it now.
fn process_behind(qmp: &QmpClient, monitor: &Path) -> Result<i32> {
    let maker = socket_peercred(qmp).map(|peer| peer.pid.as_raw_nonzero().get());
    match maker {
        Ok(pid) if host::is_qemu(pid) || host::listeners_of(monitor)?.contains(&pid) => Ok(pid),
        _ => Ok(host::listener_of(monitor)?),
    }
}

fn refuse_other(wanted: Option<i32>, found: i32, monitor: &Path) -> Result<(), HostError> {
    match wanted {
        Some(pid) if pid != found => {
            let found = format!("unix:{}, where process {found} answers", monitor.display());
            Err(HostError::NoMonitor {
                pid,
                found: vec![found],
            })
        }
        _ => Ok(()),
    }
}

fn free_bytes(target: &Location) -> Option<u64> {
    target
        .path()
        .and_then(|path| host::free_space(directory_of(path)).ok())
}

fn directory_of(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}
