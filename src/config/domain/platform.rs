//! Small devices that every machine may have: balloon, random numbers, watchdog, panic, vsock, TPM, IOMMU, shared memory.

use super::address::{DeviceInfo, VirtioOptions};
use super::chardevs::CharSource;
use super::disks::VirtioModel;
use super::view::View;
use super::word::words;

words! {
    /// A memory balloon.
    BalloonModel {
        Virtio = "virtio",
        VirtioTransitional = "virtio-transitional",
        VirtioNonTransitional = "virtio-non-transitional",
        /// The guest has none.
        None = "none",
    }
}

/// `<memballoon>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balloon {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: BalloonModel,
    /// `autodeflate=`.
    pub auto_deflate: Option<bool>,
    /// `freePageReporting=`.
    pub free_page_reporting: Option<bool>,
    /// `<stats period>` in seconds.
    pub stats_period: Option<u32>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// `<rng>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: VirtioModel,
    /// Where the numbers come from.
    pub backend: RngBackend,
    /// `<rate>`: bytes, in so many milliseconds.
    pub rate: Option<(u64, Option<u64>)>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// Where random numbers come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RngBackend {
    /// A device of the host's; `/dev/urandom` without a path.
    Random(Option<String>),
    /// QEMU itself.
    Builtin,
    /// A daemon.
    Egd(CharSource),
}

words! {
    /// A watchdog.
    WatchdogModel {
        I6300esb = "i6300esb",
        Ib700 = "ib700",
        Diag288 = "diag288",
        Itco = "itco",
    }
}

words! {
    /// What a watchdog does.
    WatchdogAction {
        Reset = "reset",
        Shutdown = "shutdown",
        PowerOff = "poweroff",
        Pause = "pause",
        None = "none",
        Dump = "dump",
        InjectNmi = "inject-nmi",
    }
}

/// `<watchdog>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watchdog {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: WatchdogModel,
    /// What it does; reset without it.
    pub action: WatchdogAction,
}

words! {
    /// How a guest tells that it panicked.
    PanicModel {
        Isa = "isa",
        Pvpanic = "pvpanic",
        HyperV = "hyperv",
        Pseries = "pseries",
        S390 = "s390",
    }
}

/// `<panic>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panic {
    /// Alias and address.
    pub info: DeviceInfo,
    /// How; ISA without it on x86. Always there once the domain is expanded.
    pub model: Option<PanicModel>,
}

/// `<vsock>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vsock {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: VirtioModel,
    /// `<cid address>`; `None` if one is to be chosen.
    pub cid: Option<u32>,
    /// `<cid auto>`.
    pub auto_cid: Option<bool>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

words! {
    /// A TPM.
    TpmModel {
        Tis = "tpm-tis",
        Crb = "tpm-crb",
    }
}

words! {
    /// The version of a TPM.
    TpmVersion {
        V1_2 = "1.2",
        V2_0 = "2.0",
    }
}

/// `<tpm>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is; always there once the domain is expanded.
    pub model: Option<TpmModel>,
    /// What stands behind it.
    pub backend: TpmBackend,
}

/// What stands behind a TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TpmBackend {
    /// swtpm, run for the guest.
    Emulator {
        /// `version=`; 2.0 without it. Always there once the domain is expanded.
        version: Option<TpmVersion>,
        /// `persistent_state=`.
        persistent_state: Option<bool>,
        /// `<active_pcr_banks>`.
        pcr_banks: Vec<String>,
        /// `<source>`: where its state is.
        state: Option<String>,
        /// Whether the state is a directory, not a file.
        is_state_directory: bool,
        /// `debug=`.
        debug: Option<u32>,
    },
    /// A TPM of the host's.
    Passthrough {
        /// `/dev/tpm0`.
        device: String,
    },
    /// A swtpm that somebody else runs.
    External {
        /// Its socket.
        path: String,
    },
}

words! {
    /// An IOMMU.
    IommuModel {
        Intel = "intel",
        Amd = "amd",
        Virtio = "virtio",
    }
}

/// `<iommu>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iommu {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: IommuModel,
    /// `<driver intremap>`.
    pub interrupt_remapping: Option<bool>,
    /// `<driver caching_mode>`.
    pub caching_mode: Option<bool>,
    /// `<driver eim>`.
    pub extended_interrupt_mode: Option<bool>,
    /// `<driver iotlb>`.
    pub iotlb: Option<bool>,
    /// `<driver aw_bits>`.
    pub address_width: Option<u32>,
    /// `<driver dma_translation>`.
    pub dma_translation: Option<bool>,
    /// `<driver passthrough>` of AMD.
    pub passthrough: Option<bool>,
    /// `<driver xtsup>` of AMD.
    pub xtsup: Option<bool>,
}

/// `<shmem>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedMemory {
    /// Alias and address.
    pub info: DeviceInfo,
    /// `name=`.
    pub name: String,
    /// `role=`: whether it migrates (`master`).
    pub is_master: bool,
    /// `<model type>`: whether it has interrupts (`ivshmem-doorbell`).
    pub is_doorbell: bool,
    /// `<size>` in bytes; 4 MiB without it.
    pub size: Option<u64>,
    /// `<server path>`.
    pub server: Option<String>,
    /// `<msi vectors>`.
    pub vectors: Option<u32>,
    /// `<msi ioeventfd>`.
    pub ioeventfd: Option<bool>,
}

pub(super) fn read_balloon(view: &View<'_>) -> Option<Balloon> {
    let model = view.required_word("model");
    Some(Balloon {
        info: view.device_info(),
        auto_deflate: view.switch("autodeflate"),
        free_page_reporting: view.switch("freePageReporting"),
        stats_period: view.one_some("stats", |stats| stats.number("period")),
        virtio: view.virtio_driver(),
        model: model?,
    })
}

pub(super) fn read_rng(view: &View<'_>) -> Option<Rng> {
    let model = view.required_word("model");
    let backend = view.one_some("backend", |backend| {
        match backend.required("model").as_str() {
            "random" => Some(RngBackend::Random(backend.text())),
            "builtin" => Some(RngBackend::Builtin),
            "egd" => super::chardevs::read_char_source(backend).map(RngBackend::Egd),
            other => {
                backend.error(
                    format!("model {other:?} is none of random, builtin, egd"),
                    None,
                );
                backend.skip();
                None
            }
        }
    });
    if view.element().find("backend").is_none() {
        view.error("it needs a <backend>", None);
    }
    Some(Rng {
        info: view.device_info(),
        rate: view.one_some("rate", |rate| {
            Some((rate.number("bytes")?, rate.number("period")))
        }),
        virtio: view.virtio_driver(),
        backend: backend?,
        model: model?,
    })
}

pub(super) fn read_watchdog(view: &View<'_>) -> Option<Watchdog> {
    let model = view.required_word("model");
    let info = view.device_info();
    let action = view.word("action").unwrap_or(WatchdogAction::Reset);
    if model == Some(WatchdogModel::Diag288) {
        view.error("diag288 is a watchdog of s390", None);
    }
    Some(Watchdog {
        info,
        action,
        model: model?,
    })
}

pub(super) fn read_panic(view: &View<'_>) -> Panic {
    let model = view.word("model");
    if matches!(model, Some(PanicModel::Pseries | PanicModel::S390)) {
        view.error("this model is not for x86", None);
    }
    Panic {
        info: view.device_info(),
        model,
    }
}

pub(super) fn read_vsock(view: &View<'_>) -> Vsock {
    let cid = view.one("cid", |cid| (cid.switch("auto"), cid.number("address")));
    let (auto_cid, cid) = cid.unwrap_or_default();
    if cid.is_some_and(|cid| cid < 3) {
        view.error("a CID is at least 3", None);
    }
    Vsock {
        info: view.device_info(),
        model: view.word("model").unwrap_or(VirtioModel::Virtio),
        cid,
        auto_cid,
        virtio: view.virtio_driver(),
    }
}

pub(super) fn read_tpm(view: &View<'_>) -> Option<Tpm> {
    let info = view.device_info();
    let model = match view.element().get("model") {
        Some("default") => {
            view.ignore(&["model"]);
            None
        }
        _ => view.word("model"),
    };
    let backend = view.one_some("backend", read_tpm_backend);
    if view.element().find("backend").is_none() {
        view.error("it needs a <backend>", None);
    }
    Some(Tpm {
        info,
        model,
        backend: backend?,
    })
}

fn read_tpm_backend(view: &View<'_>) -> Option<TpmBackend> {
    match view.required("type").as_str() {
        "emulator" => {
            view.refuse_elements(
                &["encryption"],
                "an encrypted TPM needs a secret, which is not modelled",
                None,
            );
            view.ignore_elements(&["profile"]);
            let version = match view.element().get("version") {
                Some("default") => {
                    view.ignore(&["version"]);
                    None
                }
                _ => view.word("version"),
            };
            let banks = view.one("active_pcr_banks", |banks| {
                const BANKS: [&str; 4] = ["sha1", "sha256", "sha384", "sha512"];
                let named = BANKS.into_iter().filter(|bank| banks.has(bank));
                named.map(str::to_owned).collect()
            });
            let source = view.one("source", |source| {
                let is_directory = source.required("type") == "dir";
                (source.attribute("path"), is_directory)
            });
            let (state, is_state_directory) = source.unwrap_or_default();
            Some(TpmBackend::Emulator {
                version,
                persistent_state: view.switch("persistent_state"),
                pcr_banks: banks.unwrap_or_default(),
                state,
                is_state_directory,
                debug: view.number("debug"),
            })
        }
        "passthrough" => Some(TpmBackend::Passthrough {
            device: view
                .one_some("device", |device| device.attribute("path"))
                .unwrap_or_else(|| "/dev/tpm0".to_owned()),
        }),
        "external" => {
            let source = view.one("source", CharSource::read_unix);
            if source.is_none() {
                view.error("it needs a <source>", None);
            }
            let (path, ..) = source?;
            Some(TpmBackend::External { path })
        }
        other => {
            view.error(
                format!("type {other:?} is none of emulator, passthrough, external"),
                None,
            );
            view.skip();
            None
        }
    }
}

pub(super) fn read_iommu(view: &View<'_>) -> Option<Iommu> {
    let model = view.required_word("model");
    let mut iommu = Iommu {
        info: view.device_info(),
        model: model?,
        interrupt_remapping: None,
        caching_mode: None,
        extended_interrupt_mode: None,
        iotlb: None,
        address_width: None,
        dma_translation: None,
        passthrough: None,
        xtsup: None,
    };
    let driver = view.one("driver", |driver| {
        let names = [
            "intremap",
            "caching_mode",
            "eim",
            "iotlb",
            "dma_translation",
            "passthrough",
            "xtsup",
        ];
        (
            names.map(|name| driver.switch(name)),
            driver.number("aw_bits"),
        )
    });
    if let Some((switches, address_width)) = driver {
        let [remapping, caching, eim, iotlb, dma, passthrough, xtsup] = switches;
        iommu = Iommu {
            interrupt_remapping: remapping,
            caching_mode: caching,
            extended_interrupt_mode: eim,
            iotlb,
            address_width,
            dma_translation: dma,
            passthrough,
            xtsup,
            ..iommu
        };
    }
    Some(iommu)
}

pub(super) fn read_shared_memory(view: &View<'_>) -> SharedMemory {
    let model = view.one_some("model", |model| model.attribute("type"));
    if model
        .as_deref()
        .is_some_and(|model| !matches!(model, "ivshmem-plain" | "ivshmem-doorbell"))
    {
        view.error("its model is none of ivshmem-plain, ivshmem-doorbell", None);
    }
    let role = view.attribute("role");
    if role
        .as_deref()
        .is_some_and(|role| !matches!(role, "master" | "peer"))
    {
        view.error("its role is none of master, peer", None);
    }
    let msi = view.one("msi", |msi| {
        msi.ignore(&["enabled"]);
        (msi.number("vectors"), msi.switch("ioeventfd"))
    });
    let (vectors, ioeventfd) = msi.unwrap_or_default();
    SharedMemory {
        info: view.device_info(),
        name: view.required("name"),
        is_master: role.as_deref() == Some("master"),
        is_doorbell: model.as_deref() == Some("ivshmem-doorbell"),
        size: view.one_some("size", View::size),
        server: view.one_some("server", |server| server.attribute("path")),
        vectors,
        ioeventfd,
    }
}
