//! Block nodes: where the bytes of disks and of firmware are.

use serde_json::Value;

use super::disks::throttle_limits;
use super::json::Json;
use super::line::{Line, id};
use crate::config::domain::disk_source::{
    Backing, DiskImage, HostTransport, ImageFormat, Location, NetworkHost, NetworkProtocol,
    NetworkSource,
};
use crate::config::domain::disks::{CacheMode, DetectZeroes, Discard, Disk, DiskDevice, DiskIo};
use crate::config::domain::os::{FirmwareFormat, Loader, LoaderType, Os};

/// Whether firmware is put into the guest as flash.
pub(super) fn is_flash(loader: &Loader) -> bool {
    match loader.kind {
        Some(kind) => kind == LoaderType::Pflash,
        None => loader.read_only == Some(true),
    }
}

/// The nodes that the machine has as its flash: code and variables.
pub(super) fn flash_names(os: &Os) -> (Option<&'static str>, Option<&'static str>) {
    match os
        .loader
        .as_ref()
        .filter(|loader| is_flash(loader) && loader.path.is_some())
    {
        None => (None, None),
        Some(_) => (
            Some("libvirt-pflash0-format"),
            has_variables(os).then_some("libvirt-pflash1-format"),
        ),
    }
}

fn has_variables(os: &Os) -> bool {
    let is_stateless = os
        .loader
        .as_ref()
        .is_some_and(|loader| loader.stateless == Some(true));
    !is_stateless && os.nvram.as_ref().is_some_and(|nvram| nvram.path.is_some())
}

/// Adds the nodes of firmware.
pub(super) fn flash(line: &mut Line<'_>, os: &Os) {
    let Some(loader) = &os.loader else { return };
    let Some(path) = &loader.path else {
        let why = "which firmware it is is not told";
        return line.error_at(
            "domain/os/loader",
            loader.line,
            why,
            Some("name its file, or say firmware='efi'"),
        );
    };
    if !is_flash(loader) {
        return;
    }
    flash_nodes(
        line,
        0,
        path,
        loader.format,
        loader.read_only != Some(false),
    );
    if let Some(nvram) = &os.nvram {
        match &nvram.path {
            Some(path) if has_variables(os) => flash_nodes(line, 1, path, nvram.format, false),
            Some(_) => {}
            None => {
                line.error_at(
                    "domain/os/nvram",
                    nvram.line,
                    "which file it is is not told",
                    None,
                );
            }
        }
    }
}

fn flash_nodes(
    line: &mut Line<'_>,
    number: u8,
    path: &str,
    format: Option<FirmwareFormat>,
    is_read_only: bool,
) {
    let storage = format!("libvirt-pflash{number}-storage");
    line.node(
        Json::node("file")
            .with("filename", path)
            .with("node-name", storage.as_str())
            .with("auto-read-only", true)
            .with("discard", "unmap"),
    );
    let driver = match format {
        Some(FirmwareFormat::Qcow2) => "qcow2",
        Some(FirmwareFormat::Raw) | None => "raw",
    };
    let mut node = Json::node(driver)
        .with("node-name", format!("libvirt-pflash{number}-format"))
        .with("read-only", is_read_only)
        .with("file", storage);
    if driver == "qcow2" {
        node.set("backing", Value::Null);
    }
    line.node(node);
}

/// How many images there are, with all that one builds on.
pub(super) fn depth(image: &DiskImage) -> u32 {
    u32::try_from(chain(image).len()).unwrap_or(u32::MAX)
}

/// Adds the nodes of a disk, numbered from `first`; the name of the one that its device has.
pub(super) fn image(line: &mut Line<'_>, disk: &Disk, image: &DiskImage, first: u32) -> String {
    let chain = chain(image);
    let next = first.saturating_add(depth(image));
    let mut below: Option<String> = None;
    // What others build on comes first.
    for (number, image) in (first..next).zip(chain).rev() {
        let is_top = number == first;
        let layer = Layer {
            disk,
            image,
            number,
            is_top,
            below: below.take(),
        };
        below = Some(layer.add(line));
    }
    let mut name = below.unwrap_or_default();
    if !disk.io_tune.is_empty() {
        name = throttled(line, disk, first, name);
    }
    if disk.driver.copy_on_read == Some(true) {
        let node = format!("libvirt-CoR-{}", disk.target);
        let copying = Json::node("copy-on-read")
            .with("node-name", node.as_str())
            .with("discard", "unmap");
        line.node(copying.with("file", name));
        name = node;
    }
    name
}

/// The image and all that it builds on, as far as the domain tells.
fn chain(image: &DiskImage) -> Vec<&DiskImage> {
    let mut chain = vec![image];
    let mut image = image;
    while let Backing::Image(backing) = &image.backing {
        chain.push(backing);
        image = backing;
    }
    chain
}

fn throttled(line: &mut Line<'_>, disk: &Disk, number: u32, name: String) -> String {
    let group = format!("throttling-{}", id(&disk.info));
    line.object(
        Json::object("throttle-group", &group).with_json("limits", throttle_limits(&disk.io_tune)),
    );
    let node = format!("libvirt-{number}-throttle");
    line.node(
        Json::node("throttle")
            .with("node-name", node.as_str())
            .with("throttle-group", group)
            .with("file", name),
    );
    node
}

/// One image of a disk.
struct Layer<'a> {
    disk: &'a Disk,
    image: &'a DiskImage,
    number: u32,
    is_top: bool,
    below: Option<String>,
}

impl Layer<'_> {
    /// Adds its nodes; the name of the upper one.
    fn add(self, line: &mut Line<'_>) -> String {
        let storage = format!("libvirt-{}-storage", self.number);
        let is_read_only = self.disk.is_read_only() || !self.is_top;
        let needs_format = self.image.format != ImageFormat::Raw || self.image.slice.is_some();
        let mut node = self.protocol(line).with("node-name", storage.as_str());
        self.set_cache(&mut node);
        if !needs_format {
            node.set("read-only", is_read_only);
            self.set_discard(&mut node);
            line.node(node);
            return storage;
        }
        node.set("auto-read-only", true);
        node.set("discard", "unmap");
        line.node(node);
        let name = format!("libvirt-{}-format", self.number);
        let mut node = Json::node(driver(self.image.format))
            .with("node-name", name.as_str())
            .with("read-only", is_read_only)
            .with("file", storage);
        if let Some((offset, size)) = self.image.slice {
            node.set("offset", offset);
            node.set("size", size);
        }
        if self.image.format == ImageFormat::Qcow2 && self.is_top {
            node.set_some("discard-no-unref", self.disk.driver.discard_no_unref);
        }
        match (&self.below, &self.image.backing) {
            (Some(below), _) => node.set("backing", below.as_str()),
            // Said in so many words, it is no invitation to look into the image.
            (None, Backing::End) if can_have_backing(self.image.format) => {
                node.set("backing", Value::Null)
            }
            (None, _) => {}
        }
        self.set_cache(&mut node);
        self.set_discard(&mut node);
        line.node(node);
        name
    }

    fn set_cache(&self, node: &mut Json) {
        let (direct, no_flush) = match self.disk.driver.cache {
            None | Some(CacheMode::Default) => return,
            Some(CacheMode::None | CacheMode::DirectSync) => (true, false),
            Some(CacheMode::WriteThrough | CacheMode::WriteBack) => (false, false),
            Some(CacheMode::Unsafe) => (false, true),
        };
        let cache = Json::empty()
            .with("direct", direct)
            .with("no-flush", no_flush);
        node.set("cache", cache.into_value());
    }

    fn set_discard(&self, node: &mut Json) {
        if !self.is_top {
            return;
        }
        let discard = self.disk.driver.discard.map(|discard| match discard {
            Discard::Unmap => "unmap",
            Discard::Ignore => "ignore",
        });
        node.set_some("discard", discard);
        let zeroes = self
            .disk
            .driver
            .detect_zeroes
            .map(|zeroes| match (zeroes, discard) {
                (DetectZeroes::Off, _) => "off",
                // QEMU refuses to unmap zeros where nothing is unmapped.
                (DetectZeroes::Unmap, Some("unmap")) => "unmap",
                (DetectZeroes::On | DetectZeroes::Unmap, _) => "on",
            });
        node.set_some("detect-zeroes", zeroes);
    }

    fn protocol(&self, line: &mut Line<'_>) -> Json {
        let mut node = match &self.image.location {
            Location::File { path } => Json::node("file").with("filename", path.as_str()),
            Location::Block { path } => {
                let is_cdrom = self.disk.device == DiskDevice::Cdrom;
                let driver = if is_cdrom {
                    "host_cdrom"
                } else {
                    "host_device"
                };
                Json::node(driver).with("filename", path.as_str())
            }
            Location::Directory { path } => Json::node("vvfat")
                .with("dir", path.as_str())
                .with("floppy", self.disk.device == DiskDevice::Floppy)
                .with("rw", !self.disk.is_read_only()),
            Location::Nvme { address, namespace } => Json::node("nvme")
                .with("device", address.as_str())
                .with("namespace", *namespace),
            Location::Network(source) => network(line, self.disk, self.image.line, source),
        };
        let has_aio = matches!(
            self.image.location,
            Location::File { .. } | Location::Block { .. }
        );
        if has_aio {
            node.set_some(
                "aio",
                self.disk.driver.io.map(|io| match io {
                    DiskIo::Native => "native",
                    DiskIo::Threads => "threads",
                    DiskIo::IoUring => "io_uring",
                }),
            );
        }
        node
    }
}

fn can_have_backing(format: ImageFormat) -> bool {
    matches!(
        format,
        ImageFormat::Qcow2 | ImageFormat::Qcow | ImageFormat::Qed | ImageFormat::Vmdk
    )
}

fn driver(format: ImageFormat) -> &'static str {
    match format {
        // What a directory looks like is a raw disk.
        ImageFormat::Raw | ImageFormat::Fat => "raw",
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Qcow => "qcow",
        ImageFormat::Qed => "qed",
        ImageFormat::Vmdk => "vmdk",
        ImageFormat::Vdi => "vdi",
        ImageFormat::Vpc => "vpc",
        ImageFormat::Vhdx => "vhdx",
        ImageFormat::Bochs => "bochs",
        ImageFormat::Cloop => "cloop",
        ImageFormat::Dmg => "dmg",
        ImageFormat::Parallels => "parallels",
        ImageFormat::Luks => "luks",
    }
}

fn network(line: &mut Line<'_>, disk: &Disk, at: u32, source: &NetworkSource) -> Json {
    if source.tls == Some(true) {
        let path = format!("{}/source", disk.info.path);
        line.error_at(
            &path,
            at,
            "TLS needs certificates, which are not modelled",
            None,
        );
    }
    let name = source.name.as_deref().unwrap_or_default();
    let mut refuse = |why: &str| {
        let path = format!("{}/source", disk.info.path);
        line.error_at(&path, at, why, None);
    };
    match source.protocol {
        NetworkProtocol::Nbd => {
            if source.hosts.len() != 1 {
                refuse("NBD has one host");
            }
            Json::node("nbd")
                .with_some(
                    "server",
                    source.hosts.first().map(|host| server(host, 10809)),
                )
                .with_some("export", source.name.as_deref())
                .with_some("reconnect-delay", source.reconnect_delay)
        }
        NetworkProtocol::Rbd => {
            let (pool, image) = name.split_once('/').unwrap_or((name, ""));
            if image.is_empty() {
                refuse("the name of an RBD image is POOL/IMAGE");
            }
            let servers: Vec<Value> = source.hosts.iter().map(monitor).collect();
            Json::node("rbd")
                .with("pool", pool)
                .with("image", image)
                .with_some("server", (!servers.is_empty()).then_some(servers))
                .with_some("snapshot", source.snapshot.as_deref())
                .with_some("conf", source.config.as_deref())
        }
        NetworkProtocol::Iscsi => {
            let (target, lun) = name.split_once('/').unwrap_or((name, "0"));
            let lun: Option<u64> = lun.parse().ok();
            if lun.is_none() || source.hosts.len() != 1 {
                refuse("iSCSI has one host, and a name TARGET/LUN");
            }
            Json::node("iscsi")
                .with_some(
                    "portal",
                    source.hosts.first().map(|host| address(host, 3260)),
                )
                .with("target", target)
                .with("lun", lun.unwrap_or(0))
                .with("transport", "tcp")
                .with_some("initiator-name", source.initiator.as_deref())
        }
        NetworkProtocol::Http
        | NetworkProtocol::Https
        | NetworkProtocol::Ftp
        | NetworkProtocol::Ftps => {
            if source.hosts.len() != 1 {
                refuse("a URL has one host");
            }
            url(source)
        }
        NetworkProtocol::Nfs => {
            let number = |id: &Option<String>| {
                let id = id.as_deref()?;
                id.strip_prefix('+').unwrap_or(id).parse::<u64>().ok()
            };
            let host = source.hosts.first().and_then(|host| host.name.as_deref());
            let server = Json::empty()
                .with("type", "inet")
                .with("host", host.unwrap_or_default());
            Json::node("nfs")
                .with_json("server", server)
                .with("path", name)
                .with_some("user", number(&source.user))
                .with_some("group", number(&source.group))
        }
        NetworkProtocol::Ssh => {
            if let Some(known) = &source.known_hosts {
                refuse(&format!(
                    "QEMU reads the user's own file of known hosts, not {known:?}"
                ));
            }
            Json::node("ssh")
                .with("path", name)
                .with_some("server", source.hosts.first().map(|host| inet(host, 22)))
                .with_some("user", source.user.as_deref())
        }
    }
}

fn url(source: &NetworkSource) -> Json {
    let (scheme, port) = match source.protocol {
        NetworkProtocol::Https => ("https", 443),
        NetworkProtocol::Ftp => ("ftp", 21),
        NetworkProtocol::Ftps => ("ftps", 990),
        _ => ("http", 80),
    };
    let host = source
        .hosts
        .first()
        .map(|host| address(host, port))
        .unwrap_or_default();
    let name = source.name.as_deref().unwrap_or_default();
    let query = source
        .query
        .as_ref()
        .map(|query| format!("?{query}"))
        .unwrap_or_default();
    Json::node(scheme)
        .with(
            "url",
            format!("{scheme}://{host}/{}{query}", name.trim_start_matches('/')),
        )
        .with_some("sslverify", source.ssl_verify)
        .with_some("readahead", source.readahead)
        .with_some("timeout", source.timeout)
}

/// `host:port`, an IPv6 address in brackets.
fn address(host: &NetworkHost, default_port: u16) -> String {
    let name = host.name.as_deref().unwrap_or_default();
    let port = host.port.unwrap_or(default_port);
    if name.contains(':') {
        return format!("[{name}]:{port}");
    }
    format!("{name}:{port}")
}

fn server(host: &NetworkHost, default_port: u16) -> Value {
    match host.transport {
        HostTransport::Unix => Json::empty()
            .with("type", "unix")
            .with("path", host.socket.as_deref().unwrap_or_default())
            .into_value(),
        HostTransport::Tcp | HostTransport::Rdma => {
            let port = host.port.unwrap_or(default_port).to_string();
            Json::empty()
                .with("type", "inet")
                .with("host", host.name.as_deref().unwrap_or_default())
                .with("port", port)
                .into_value()
        }
    }
}

fn inet(host: &NetworkHost, default_port: u16) -> Value {
    let port = host.port.unwrap_or(default_port).to_string();
    Json::empty()
        .with("host", host.name.as_deref().unwrap_or_default())
        .with("port", port)
        .into_value()
}

fn monitor(host: &NetworkHost) -> Value {
    inet(host, 6789)
}
