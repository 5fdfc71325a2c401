//! Where the bytes of a disk are: files, block devices, network storage, and what lies behind an overlay.

use super::view::View;
use super::word::words;

/// An image, and what it builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// The line of its `<source>`.
    pub line: u32,
    /// Where it is.
    pub location: Location,
    /// `raw`, `qcow2`, …; raw without it.
    pub format: ImageFormat,
    /// What it builds on.
    pub backing: Backing,
    /// The part of the file that holds the image: offset and length in bytes.
    pub slice: Option<(u64, u64)>,
}

/// What an image builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// The XML does not tell; the image itself knows.
    Unknown,
    /// On nothing: `<backingStore/>`.
    End,
    /// On this image.
    Image(Box<DiskImage>),
}

words! {
    /// The format of an image.
    ImageFormat {
        Raw = "raw",
        Qcow2 = "qcow2",
        Qcow = "qcow",
        Qed = "qed",
        Vmdk = "vmdk",
        Vdi = "vdi",
        Vpc = "vpc",
        Vhdx = "vhdx",
        Bochs = "bochs",
        Cloop = "cloop",
        Dmg = "dmg",
        Parallels = "ploop",
        Luks = "luks",
        Fat = "fat",
    }
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "a domain has few disks, and patterns read better without a box"
)]
pub enum Location {
    /// In a file.
    File {
        /// Its path.
        path: String,
    },
    /// On a block device.
    Block {
        /// Its path.
        path: String,
    },
    /// A directory that looks like a FAT disk.
    Directory {
        /// Its path.
        path: String,
    },
    /// On an NVMe device of the host, which QEMU drives itself.
    Nvme {
        /// `0000:01:00.0`.
        address: String,
        /// The namespace.
        namespace: u64,
    },
    /// On network storage.
    Network(NetworkSource),
}

words! {
    /// How network storage is spoken to.
    NetworkProtocol {
        Nbd = "nbd",
        Rbd = "rbd",
        Iscsi = "iscsi",
        Http = "http",
        Https = "https",
        Ftp = "ftp",
        Ftps = "ftps",
        Nfs = "nfs",
        Ssh = "ssh",
    }
}

words! {
    /// How a host is reached.
    HostTransport {
        Tcp = "tcp",
        Unix = "unix",
        Rdma = "rdma",
    }
}

/// Network storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSource {
    /// How it is spoken to.
    pub protocol: NetworkProtocol,
    /// The export, pool and image, target, path; its form depends on the protocol.
    pub name: Option<String>,
    /// `query=` of a URL.
    pub query: Option<String>,
    /// Where it is.
    pub hosts: Vec<NetworkHost>,
    /// `tls=`.
    pub tls: Option<bool>,
    /// `<config file>` of RBD.
    pub config: Option<String>,
    /// `<snapshot name>` of RBD.
    pub snapshot: Option<String>,
    /// `<initiator><iqn name>` of iSCSI.
    pub initiator: Option<String>,
    /// `<reconnect delay>` of NBD in seconds.
    pub reconnect_delay: Option<u32>,
    /// `<ssl verify>`.
    pub ssl_verify: Option<bool>,
    /// `<readahead size>`.
    pub readahead: Option<u64>,
    /// `<timeout seconds>`.
    pub timeout: Option<u64>,
    /// `<identity user>` and `group` of NFS; `username` of SSH.
    pub user: Option<String>,
    /// `<identity group>` of NFS.
    pub group: Option<String>,
    /// `<knownHosts path>` of SSH.
    pub known_hosts: Option<String>,
}

/// One host of network storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkHost {
    /// How it is reached.
    pub transport: HostTransport,
    /// Its name or address.
    pub name: Option<String>,
    /// The port; the protocol's own without it.
    pub port: Option<u16>,
    /// The socket of a unix transport.
    pub socket: Option<String>,
}

words! {
    /// The kinds of source that are read.
    SourceType {
        File = "file",
        Block = "block",
        Dir = "dir",
        Network = "network",
        Nvme = "nvme",
        Volume = "volume",
        VhostUser = "vhostuser",
        VhostVdpa = "vhostvdpa",
    }
}

/// Reads the image of a disk: `type=`, `<source>`, `<driver type>`, `<backingStore>`.
pub(super) fn read_disk_image(disk: &View<'_>) -> Option<DiskImage> {
    let format = disk
        .element()
        .find("driver")
        .and_then(|driver| driver.get("type"));
    let format = match format {
        Some(word) => super::word::Word::from_word(word).or_else(|| {
            let words = <ImageFormat as super::word::Word>::words().join(", ");
            disk.error(format!("format {word:?} is none of {words}"), None);
            None
        }),
        None => Some(ImageFormat::Raw),
    };
    read_image(disk, format, true)
}

/// An image that is being written elsewhere is one that cannot be taken over.
pub(super) fn read_mirror(disk: &View<'_>) {
    disk.refuse_elements(
        &["mirror"],
        "a block job was running",
        Some("end the job, with `virsh blockjob --abort` or `--pivot`, and take the XML again"),
    );
}

fn read_backing_image(view: &View<'_>) -> Backing {
    view.ignore(&["index"]);
    if view.element().get("type").is_none() {
        view.ignore(&["type"]);
        return Backing::End;
    }
    let format = view.one_some("format", |format| {
        format.ignore_elements(&["metadata_cache"]);
        format.required_word("type")
    });
    match read_image(view, format, false) {
        Some(image) => Backing::Image(Box::new(image)),
        None => Backing::Unknown,
    }
}

fn read_image(view: &View<'_>, format: Option<ImageFormat>, is_top: bool) -> Option<DiskImage> {
    let kind = match view.element().get("type") {
        None => {
            view.ignore(&["type"]);
            Some(SourceType::File)
        }
        Some(_) => view.word("type"),
    };
    let source = view.one_some("source", |source| {
        source.ignore(&["index", "startupPolicy", "fdgroup"]);
        if source.element().get("fdgroup").is_some() {
            source.error("an image that comes as a descriptor cannot be opened", None);
        }
        source.ignore_elements(&["seclabel", "privateData"]);
        source.refuse_elements(
            &["encryption", "auth", "cookies"],
            "its key or password is libvirt's secret, which nobody else can ask for",
            Some("open it on the host (cryptsetup open, rbd map), and name the device with type='block'"),
        );
        source.refuse_elements(
            &["reservations"],
            "persistent reservations are not modelled",
            None,
        );
        source.refuse_elements(
            &["dataStore"],
            "data in a file of its own is not modelled",
            None,
        );
        let slice = source.one_some("slices", |slices| slices.one_some("slice", read_slice));
        let location = read_location(source, kind?)?;
        Some((source.line(), location, slice))
    });
    let backing = view
        .one("backingStore", read_backing_image)
        .unwrap_or(Backing::Unknown);
    let Some((line, location, slice)) = source else {
        if !is_top {
            view.error("a backing image needs a <source>", None);
        }
        return None;
    };
    Some(DiskImage {
        line,
        location,
        format: format.unwrap_or(ImageFormat::Raw),
        backing,
        slice,
    })
}

fn read_slice(view: &View<'_>) -> Option<(u64, u64)> {
    if view.required("type") != "storage" {
        view.error("only slices of type storage exist", None);
    }
    Some((view.number("offset")?, view.number("size")?))
}

/// `None` for a drive without a medium, and for what is refused.
fn read_location(source: &View<'_>, kind: SourceType) -> Option<Location> {
    match kind {
        SourceType::File => {
            let path = source.attribute("file")?;
            Some(Location::File { path })
        }
        SourceType::Block => {
            let path = source.attribute("dev")?;
            Some(Location::Block { path })
        }
        SourceType::Dir => {
            let path = source.attribute("dir")?;
            Some(Location::Directory { path })
        }
        SourceType::Nvme => read_nvme(source),
        SourceType::Network => read_network(source).map(Location::Network),
        SourceType::Volume => refused(
            source,
            "where a volume of a storage pool lies only libvirt knows",
        ),
        SourceType::VhostUser => refused(source, "vhost-user disks are not modelled"),
        SourceType::VhostVdpa => refused(source, "vDPA disks are not modelled"),
    }
}

fn refused(source: &View<'_>, why: &str) -> Option<Location> {
    source.error(why, Some("use type='file' or type='block' with the path"));
    source.skip();
    None
}

fn read_nvme(source: &View<'_>) -> Option<Location> {
    source.ignore(&["type", "managed"]);
    let address = source.one("address", |address| {
        address.ignore(&["type"]);
        let part = |name| address.number::<u32>(name).unwrap_or(0);
        let (domain, bus, slot, function) =
            (part("domain"), part("bus"), part("slot"), part("function"));
        format!("{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")
    });
    if address.is_none() {
        source.error("it needs an <address>", None);
    }
    Some(Location::Nvme {
        address: address?,
        namespace: source.number("namespace")?,
    })
}

fn read_network(source: &View<'_>) -> Option<NetworkSource> {
    let protocol = source.required_word("protocol");
    source.ignore(&["tlsFromConfig", "tlsHostname"]);
    let identity = source.one("identity", |identity| {
        identity.leave_out(&["keyfile", "agentsock"], "keys of SSH are the user's own");
        (
            identity
                .attribute("user")
                .or_else(|| identity.attribute("username")),
            identity.attribute("group"),
        )
    });
    let (user, group) = identity.unwrap_or_default();
    Some(NetworkSource {
        name: source.attribute("name"),
        query: source.attribute("query"),
        hosts: source.each("host", |host| NetworkHost {
            transport: host.word("transport").unwrap_or(HostTransport::Tcp),
            name: host.attribute("name"),
            port: host.number("port"),
            socket: host.attribute("socket"),
        }),
        tls: source.switch("tls"),
        config: source.one_some("config", |config| config.attribute("file")),
        snapshot: source.one_some("snapshot", |snapshot| snapshot.attribute("name")),
        initiator: source.one_some("initiator", |initiator| {
            initiator.one_some("iqn", |iqn| iqn.attribute("name"))
        }),
        reconnect_delay: source.one_some("reconnect", |reconnect| reconnect.number("delay")),
        ssl_verify: source.one_some("ssl", |ssl| ssl.switch("verify")),
        readahead: source.one_some("readahead", |readahead| readahead.number("size")),
        timeout: source.one_some("timeout", |timeout| timeout.number("seconds")),
        user,
        group,
        known_hosts: source.one_some("knownHosts", |hosts| hosts.attribute("path")),
        protocol: protocol?,
    })
}
