//! Small devices: balloon, random numbers, watchdog, panic, vsock, TPM, IOMMU, shared memory.

use serde_json::json;

use super::chardevs::Chardev;
use super::controllers::virtio_device;
use super::json::{Json, Pairs};
use super::line::{Line, id};
use super::{QmpCommand, SideCommand, SideKind};
use crate::config::domain::Domain;
use crate::config::domain::chardevs::{CharSource, SocketMode};
use crate::config::domain::disks::VirtioModel;
use crate::config::domain::platform::{
    Balloon, BalloonModel, Iommu, IommuModel, Panic, PanicModel, Rng, RngBackend, SharedMemory,
    Tpm, TpmBackend, TpmModel, TpmVersion, Vsock, Watchdog, WatchdogAction, WatchdogModel,
};

/// The port of a panic device where none is given.
const PANIC_PORT: u64 = 0x505;
/// As much memory is shared where nobody says how much.
const SHARED_MEMORY: u64 = 4 << 20;
/// CIDs below have a meaning of their own.
const FIRST_CID: u32 = 3;

/// Adds the IOMMU. It has to be there before the devices behind it.
pub(super) fn iommu(line: &mut Line<'_>, iommu: &Iommu) {
    let device = match iommu.model {
        IommuModel::Intel => Json::device("intel-iommu")
            .with_switch("intremap", iommu.interrupt_remapping)
            .with_some("caching-mode", iommu.caching_mode)
            .with_switch("eim", iommu.extended_interrupt_mode)
            .with_some("device-iotlb", iommu.iotlb)
            .with_some("aw-bits", iommu.address_width)
            .with_some("dma-translation", iommu.dma_translation),
        IommuModel::Amd => Json::device("amd-iommu")
            .with_switch("intremap", iommu.interrupt_remapping)
            .with_some("device-iotlb", iommu.iotlb)
            .with_some("pt", iommu.passthrough)
            .with_some("xtsup", iommu.xtsup),
        IommuModel::Virtio => Json::device("virtio-iommu-pci"),
    };
    line.device(device, &iommu.info);
}

/// Adds the TPMs, and has a swtpm run for each that is emulated.
pub(super) fn tpms(line: &mut Line<'_>, domain: &Domain) {
    for tpm in &domain.devices.tpms {
        let alias = id(&tpm.info);
        let name = format!("tpm-{alias}");
        let backend = match &tpm.backend {
            TpmBackend::Passthrough { device } => Pairs::new("passthrough")
                .with("id", &name)
                .with("path", device),
            TpmBackend::External { path } => emulator(line, tpm, &name, path),
            TpmBackend::Emulator { .. } => {
                let socket = swtpm(line, tpm);
                emulator(line, tpm, &name, &socket)
            }
        };
        line.pairs("tpmdev", backend);
        let driver = match tpm.model {
            Some(TpmModel::Crb) => "tpm-crb",
            Some(TpmModel::Tis) | None => "tpm-tis",
        };
        line.device(Json::device(driver).with("tpmdev", name), &tpm.info);
    }
}

fn emulator(line: &mut Line<'_>, tpm: &Tpm, name: &str, socket: &str) -> Pairs {
    let chardev = format!("chr{}", id(&tpm.info));
    line.pairs(
        "chardev",
        Pairs::new("socket")
            .with("id", &chardev)
            .with("path", socket),
    );
    Pairs::new("emulator")
        .with("id", name)
        .with("chardev", chardev)
}

/// Has swtpm run; its socket.
fn swtpm(line: &mut Line<'_>, tpm: &Tpm) -> String {
    let alias = id(&tpm.info).to_owned();
    let socket = format!("{}/{alias}.swtpm", line.context.directory);
    let TpmBackend::Emulator {
        version,
        pcr_banks,
        state,
        is_state_directory,
        debug,
        ..
    } = &tpm.backend
    else {
        return socket;
    };
    let is_v2 = *version != Some(TpmVersion::V1_2);
    let made_up = format!("{}/{alias}", line.context.state_directory);
    let (place, directories) = match state {
        Some(path) if !is_state_directory => (format!("backend-uri=file://{path}"), Vec::new()),
        path => {
            let path = path.as_ref().unwrap_or(&made_up);
            (format!("dir={path},mode=0600"), vec![path.clone()])
        }
    };
    let is_plain = |path: &str| !path.contains(',');
    if !is_plain(&socket) || !state.as_deref().is_none_or(is_plain) {
        line.error(
            &tpm.info,
            "swtpm cannot be told a path with a comma in it",
            None,
        );
    }
    if !pcr_banks.is_empty() {
        line.warning(
            &tpm.info,
            "which banks of PCRs are active is left to the TPM's state",
        );
    }
    let mut argv: Vec<String> = [
        &line.context.swtpm,
        "socket",
        "--terminate",
        "--tpmstate",
        &place,
        "--ctrl",
    ]
    .map(str::to_owned)
    .into();
    argv.push(format!("type=unixio,path={socket},mode=0600"));
    if is_v2 {
        argv.push("--tpm2".to_owned());
    }
    if let Some(level) = debug {
        argv.extend([
            "--log".to_owned(),
            format!("file={}/{alias}.log,level={level}", line.context.directory),
        ]);
    }
    line.side_commands.push(SideCommand {
        kind: SideKind::Swtpm,
        alias,
        argv,
        socket: socket.clone(),
        directories,
    });
    socket
}

/// Adds the watchdogs. All of them do the same.
pub(super) fn watchdogs(line: &mut Line<'_>, watchdogs: &[Watchdog]) {
    for watchdog in watchdogs {
        match watchdog.model {
            WatchdogModel::I6300esb => line.device(Json::device("i6300esb"), &watchdog.info),
            WatchdogModel::Ib700 => line.device(Json::device("ib700"), &watchdog.info),
            // Part of the chipset, where it only has to be let loose.
            WatchdogModel::Itco if line.is_q35 => line.global("ICH9-LPC", "noreboot", "off"),
            WatchdogModel::Itco | WatchdogModel::Diag288 => {
                line.error(
                    &watchdog.info,
                    "this machine has no such watchdog",
                    Some("use model='i6300esb'"),
                );
            }
        }
        if watchdogs
            .iter()
            .any(|other| other.action != watchdog.action)
        {
            line.error(
                &watchdog.info,
                "all watchdogs of a guest have to have the same action",
                None,
            );
        }
    }
    if let Some(watchdog) = watchdogs.first() {
        let action = match watchdog.action {
            WatchdogAction::Reset => "reset",
            WatchdogAction::Shutdown => "shutdown",
            WatchdogAction::PowerOff => "poweroff",
            WatchdogAction::None => "none",
            WatchdogAction::InjectNmi => "inject-nmi",
            WatchdogAction::Pause => "pause",
            WatchdogAction::Dump => {
                line.warning(
                    &watchdog.info,
                    "the guest is paused, and its memory is not dumped",
                );
                "pause"
            }
        };
        line.option("watchdog-action", action);
    }
}

/// Adds the balloon, random numbers, panic devices, shared memory and the vsock.
pub(super) fn others(line: &mut Line<'_>, domain: &Domain) {
    let devices = &domain.devices;
    if let Some(balloon) = &devices.balloon {
        add_balloon(line, domain, balloon);
    }
    for rng in &devices.rngs {
        add_rng(line, rng);
    }
    for panic in &devices.panics {
        add_panic(line, panic);
    }
    for memory in &devices.shared_memories {
        add_shared_memory(line, memory);
    }
    if let Some(vsock) = &devices.vsock {
        add_vsock(line, domain, vsock);
    }
}

fn add_balloon(line: &mut Line<'_>, domain: &Domain, balloon: &Balloon) {
    let model = match balloon.model {
        BalloonModel::None => return,
        BalloonModel::Virtio => VirtioModel::Virtio,
        BalloonModel::VirtioTransitional => VirtioModel::VirtioTransitional,
        BalloonModel::VirtioNonTransitional => VirtioModel::VirtioNonTransitional,
    };
    let device = virtio_device("virtio-balloon", Some(model), balloon.virtio)
        .with_some("deflate-on-oom", balloon.auto_deflate)
        .with_some("free-page-reporting", balloon.free_page_reporting);
    line.device(device, &balloon.info);
    if let Some(period) = balloon.stats_period.filter(|period| *period > 0) {
        let path = format!("/machine/peripheral/{}", id(&balloon.info));
        line.qmp_commands.push(QmpCommand {
            name: "qom-set",
            arguments: json!({ "path": path, "property": "guest-stats-polling-interval", "value": period }),
        });
    }
    if let Some(current) = domain
        .memory
        .current
        .filter(|current| *current < domain.memory.total)
    {
        line.qmp_commands.push(QmpCommand {
            name: "balloon",
            arguments: json!({ "value": current }),
        });
    }
}

fn add_rng(line: &mut Line<'_>, rng: &Rng) {
    let name = format!("obj{}", id(&rng.info));
    let object = match &rng.backend {
        RngBackend::Random(path) => Json::object("rng-random", &name)
            .with("filename", path.as_deref().unwrap_or("/dev/urandom")),
        RngBackend::Builtin => Json::object("rng-builtin", &name),
        RngBackend::Egd(source) => {
            let chardev = Chardev::new(&rng.info, source).add(line);
            Json::object("rng-egd", &name).with("chardev", chardev)
        }
    };
    line.object(object);
    let device = virtio_device("virtio-rng", Some(rng.model), rng.virtio)
        .with("rng", name)
        .with_some("max-bytes", rng.rate.map(|(bytes, _)| bytes))
        .with_some("period", rng.rate.map(|(_, period)| period.unwrap_or(1000)));
    line.device(device, &rng.info);
}

fn add_panic(line: &mut Line<'_>, panic: &Panic) {
    match panic.model {
        Some(PanicModel::Isa) | None => {
            let port = panic
                .info
                .isa()
                .and_then(|isa| isa.iobase)
                .unwrap_or(PANIC_PORT);
            line.companion(Json::device("pvpanic").with("ioport", port), &panic.info);
        }
        Some(PanicModel::Pvpanic) => line.companion(Json::device("pvpanic-pci"), &panic.info),
        // It is the CPU's.
        Some(PanicModel::HyperV) => {}
        Some(PanicModel::Pseries | PanicModel::S390) => {
            line.error(&panic.info, "this model is not for x86", None);
        }
    }
}

fn add_shared_memory(line: &mut Line<'_>, memory: &SharedMemory) {
    let alias = id(&memory.info);
    if memory.name.contains('/') {
        return line.error(&memory.info, "its name cannot have a slash in it", None);
    }
    if memory.is_doorbell {
        let path = memory
            .server
            .clone()
            .unwrap_or_else(|| format!("/var/lib/libvirt/shmem-{}-sock", memory.name));
        let source = CharSource::Unix {
            path: Some(path),
            mode: SocketMode::Connect,
            reconnect: None,
        };
        let chardev = Chardev::new(&memory.info, &source).add(line);
        let device = Json::device("ivshmem-doorbell")
            .with("chardev", chardev)
            .with_some("vectors", memory.vectors)
            .with_some("ioeventfd", memory.ioeventfd)
            .with_switch("master", memory.is_master.then_some(true));
        return line.device(device, &memory.info);
    }
    let backend = format!("shmmem-{alias}");
    let object = Json::object("memory-backend-file", &backend)
        .with("mem-path", format!("/dev/shm/{}", memory.name))
        .with("size", memory.size.unwrap_or(SHARED_MEMORY))
        .with("share", true);
    line.object(object);
    let device = Json::device("ivshmem-plain")
        .with("memdev", backend)
        .with_switch("master", Some(memory.is_master));
    line.device(device, &memory.info);
}

fn add_vsock(line: &mut Line<'_>, domain: &Domain, vsock: &Vsock) {
    let is_chosen = vsock.auto_cid == Some(true) || vsock.cid.is_none();
    let cid = match (vsock.cid, domain.uuid) {
        (Some(cid), _) if !is_chosen => cid,
        // One that no other guest has, and that is the same each time.
        (_, Some(uuid)) => {
            let (head, ..) = uuid.as_fields();
            (head >> 1).max(FIRST_CID)
        }
        (_, None) => {
            return line.error(
                &vsock.info,
                "without a UUID there is nothing to choose a CID by",
                Some("give it one: <cid auto='no' address='42'/>"),
            );
        }
    };
    let device =
        virtio_device("vhost-vsock", Some(vsock.model), vsock.virtio).with("guest-cid", cid);
    line.device(device, &vsock.info);
}
