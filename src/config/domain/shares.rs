//! Directories of the host's that the guest mounts.

use super::address::{DeviceInfo, VirtioOptions};
use super::disks::VirtioModel;
use super::view::View;
use super::word::words;

words! {
    /// How a directory is shared.
    ShareDriver {
        /// 9p, by QEMU itself.
        Path = "path",
        Handle = "handle",
        VirtioFs = "virtiofs",
    }
}

words! {
    /// Whose rights count on the host.
    AccessMode {
        Passthrough = "passthrough",
        Mapped = "mapped",
        Squash = "squash",
    }
}

/// `<filesystem>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Alias and address.
    pub info: DeviceInfo,
    /// How it is shared; 9p without it.
    pub driver: ShareDriver,
    /// `accessmode=`.
    pub access: Option<AccessMode>,
    /// `model=`.
    pub model: Option<VirtioModel>,
    /// `<source dir>`.
    pub directory: Option<String>,
    /// `<source socket>`: of a virtiofsd that somebody else runs.
    pub socket: Option<String>,
    /// `<target dir>`: the tag that the guest mounts.
    pub tag: String,
    /// `<readonly/>`.
    pub read_only: bool,
    /// `fmode=`, octal.
    pub file_mode: Option<String>,
    /// `dmode=`, octal.
    pub directory_mode: Option<String>,
    /// `multidevs=`.
    pub multi_devices: Option<String>,
    /// `<driver wrpolicy>`.
    pub write_policy: Option<String>,
    /// `<driver queue>`.
    pub queue_size: Option<u32>,
    /// `<binary>`: how virtiofsd is run.
    pub binary: VirtioFsBinary,
    /// `<idmap>`: whether of groups, first in the guest, first on the host, how many.
    pub id_map: Vec<(bool, u32, u32, u32)>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// `<binary>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VirtioFsBinary {
    /// `path=`.
    pub path: Option<String>,
    /// `xattr=`.
    pub xattr: Option<bool>,
    /// `<cache mode>`.
    pub cache: Option<String>,
    /// `<sandbox mode>`.
    pub sandbox: Option<String>,
    /// `<lock posix>`.
    pub posix_lock: Option<bool>,
    /// `<lock flock>`.
    pub flock: Option<bool>,
    /// `<thread_pool size>`.
    pub thread_pool_size: Option<u32>,
    /// `<openfiles max>`.
    pub open_files: Option<u64>,
}

pub(super) fn read_share(view: &View<'_>) -> Option<Share> {
    let kind = view.attribute("type");
    if kind.as_deref().is_some_and(|kind| kind != "mount") {
        view.error("only filesystems of type mount are QEMU's", None);
    }
    view.refuse_elements(
        &["space_hard_limit", "space_soft_limit"],
        "limits are not QEMU's",
        None,
    );
    let driver = view.one("driver", |driver| {
        driver.ignore(&["name", "format"]);
        let kind = driver.word("type");
        (
            kind,
            driver.attribute("wrpolicy"),
            driver.number("queue"),
            driver.virtio_options(),
        )
    });
    let (driver, write_policy, queue_size, virtio) = driver.unwrap_or_default();
    let source = view.one("source", |source| {
        (source.attribute("dir"), source.attribute("socket"))
    });
    let (directory, socket) = source.unwrap_or_default();
    if directory.is_none() && socket.is_none() {
        view.error("it needs a <source> with dir= or socket=", None);
    }
    let tag = view.one("target", |target| target.required("dir"));
    if tag.is_none() {
        view.error("it needs a <target>", None);
    }
    Some(Share {
        info: view.device_info(),
        driver: driver.unwrap_or(ShareDriver::Path),
        access: view.word("accessmode"),
        model: view.word("model"),
        directory,
        socket,
        tag: tag.unwrap_or_default(),
        read_only: view.has("readonly"),
        file_mode: view.attribute("fmode"),
        directory_mode: view.attribute("dmode"),
        multi_devices: view.attribute("multidevs"),
        write_policy,
        queue_size,
        binary: view.one("binary", read_binary).unwrap_or_default(),
        id_map: view.one("idmap", read_id_map).unwrap_or_default(),
        virtio,
    })
}

fn read_binary(view: &View<'_>) -> VirtioFsBinary {
    let lock = view.one("lock", |lock| (lock.switch("posix"), lock.switch("flock")));
    let (posix_lock, flock) = lock.unwrap_or_default();
    VirtioFsBinary {
        path: view.attribute("path"),
        xattr: view.switch("xattr"),
        cache: view.one_some("cache", |cache| cache.attribute("mode")),
        sandbox: view.one_some("sandbox", |sandbox| sandbox.attribute("mode")),
        posix_lock,
        flock,
        thread_pool_size: view.one_some("thread_pool", |pool| pool.number("size")),
        open_files: view.one_some("openfiles", |files| files.number("max")),
    }
}

fn read_id_map(view: &View<'_>) -> Vec<(bool, u32, u32, u32)> {
    let read = |is_group: bool| {
        move |one: &View<'_>| {
            let part = |name| one.number(name).unwrap_or(0);
            (is_group, part("start"), part("target"), part("count"))
        }
    };
    let mut all = view.each("uid", read(false));
    all.extend(view.each("gid", read(true)));
    all
}
