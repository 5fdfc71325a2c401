//! `<devices>`.

use super::chardevs::{
    Channel, Console, Parallel, Serial, read_channel, read_console, read_parallel, read_serial,
};
use super::controllers::{Controller, read_controller};
use super::disks::{Disk, read_disk};
use super::displays::{Graphics, Video, read_graphics, read_video};
use super::hostdevs::{Hostdev, read_hostdev};
use super::interfaces::{Interface, read_interface};
use super::memory::{MemoryModule, read_module};
use super::platform::{
    Balloon, Iommu, Panic, Rng, SharedMemory, Tpm, Vsock, Watchdog, read_balloon, read_iommu,
    read_panic, read_rng, read_shared_memory, read_tpm, read_vsock, read_watchdog,
};
use super::shares::{Share, read_share};
use super::sound::{Audio, Sound, read_audio, read_sound};
use super::stores::{CryptoDevice, PersistentStore, read_crypto_device, read_persistent_store};
use super::usb_devices::{
    Hub, Input, RedirectedDevice, RedirectionFilter, Smartcard, read_hub, read_input,
    read_redirected_device, read_redirection_filter, read_smartcard,
};
use super::view::View;

/// `<devices>`: of each kind all, in the order in which they stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// The line of its element.
    pub line: u32,
    /// `<emulator>`.
    pub emulator: Option<String>,
    /// `<disk>`.
    pub disks: Vec<Disk>,
    /// `<controller>`.
    pub controllers: Vec<Controller>,
    /// `<filesystem>`.
    pub shares: Vec<Share>,
    /// `<interface>`.
    pub interfaces: Vec<Interface>,
    /// `<smartcard>`.
    pub smartcards: Vec<Smartcard>,
    /// `<serial>`.
    pub serials: Vec<Serial>,
    /// `<parallel>`.
    pub parallels: Vec<Parallel>,
    /// `<console>`.
    pub consoles: Vec<Console>,
    /// `<channel>`.
    pub channels: Vec<Channel>,
    /// `<input>`.
    pub inputs: Vec<Input>,
    /// `<tpm>`.
    pub tpms: Vec<Tpm>,
    /// `<graphics>`.
    pub graphics: Vec<Graphics>,
    /// `<sound>`.
    pub sounds: Vec<Sound>,
    /// `<audio>`.
    pub audios: Vec<Audio>,
    /// `<video>`.
    pub videos: Vec<Video>,
    /// `<hostdev>`.
    pub hostdevs: Vec<Hostdev>,
    /// `<redirdev>`.
    pub redirected: Vec<RedirectedDevice>,
    /// `<redirfilter>`.
    pub redirection_filter: Vec<RedirectionFilter>,
    /// `<hub>`.
    pub hubs: Vec<Hub>,
    /// `<watchdog>`.
    pub watchdogs: Vec<Watchdog>,
    /// `<memballoon>`; always there once the domain is expanded.
    pub balloon: Option<Balloon>,
    /// `<rng>`.
    pub rngs: Vec<Rng>,
    /// `<panic>`.
    pub panics: Vec<Panic>,
    /// `<shmem>`.
    pub shared_memories: Vec<SharedMemory>,
    /// `<memory>`.
    pub memory_modules: Vec<MemoryModule>,
    /// `<iommu>`.
    pub iommu: Option<Iommu>,
    /// `<vsock>`.
    pub vsock: Option<Vsock>,
    /// `<crypto>`.
    pub crypto_devices: Vec<CryptoDevice>,
    /// `<pstore>`.
    pub persistent_stores: Vec<PersistentStore>,
}

pub(super) fn read_devices(view: &View<'_>) -> Devices {
    view.refuse_elements(&["nvram"], "an NVRAM device is not for x86", None);
    view.leave_out_elements(&["lease"], "leases are libvirt's lock manager's");
    Devices {
        line: view.line(),
        emulator: view.child_text("emulator"),
        disks: view.each_some("disk", read_disk),
        controllers: view.each_some("controller", read_controller),
        shares: view.each_some("filesystem", read_share),
        interfaces: view.each_some("interface", read_interface),
        smartcards: view.each_some("smartcard", read_smartcard),
        serials: view.each_some("serial", read_serial),
        parallels: view.each_some("parallel", read_parallel),
        consoles: view.each_some("console", read_console),
        channels: view.each_some("channel", read_channel),
        inputs: view.each_some("input", read_input),
        tpms: view.each_some("tpm", read_tpm),
        graphics: view.each_some("graphics", read_graphics),
        sounds: view.each_some("sound", read_sound),
        audios: view.each_some("audio", read_audio),
        videos: view.each("video", read_video),
        hostdevs: view.each_some("hostdev", read_hostdev),
        redirected: view.each_some("redirdev", read_redirected_device),
        redirection_filter: view
            .one("redirfilter", read_redirection_filter)
            .unwrap_or_default(),
        hubs: view.each_some("hub", read_hub),
        watchdogs: view.each_some("watchdog", read_watchdog),
        balloon: view.one_some("memballoon", read_balloon),
        rngs: view.each_some("rng", read_rng),
        panics: view.each("panic", read_panic),
        shared_memories: view.each("shmem", read_shared_memory),
        memory_modules: view.each_some("memory", read_module),
        iommu: view.one_some("iommu", read_iommu),
        vsock: view.one("vsock", read_vsock),
        crypto_devices: view.each_some("crypto", read_crypto_device),
        persistent_stores: view.each_some("pstore", read_persistent_store),
    }
}
