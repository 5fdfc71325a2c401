//! What kind of file was opened as an image.

use std::fmt;

use serde::Serialize;

use super::libvirt::SaveFormat;

/// What kind of file was opened as an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Origin {
    /// An image.
    Image,
    /// A bare migration stream, as QEMU's `migrate` wrote it or compressed since.
    Stream,
    /// A bare stream of the mapped-ram layout.
    MappedRam,
    /// What `virsh save` wrote.
    LibvirtSave(LibvirtSave),
}

impl Origin {
    /// Whether it is an image, whose digests are as old as the image and not as old as this process.
    pub fn is_image(&self) -> bool {
        *self == Origin::Image
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Image => "an image",
            Origin::Stream => "a bare migration stream",
            Origin::MappedRam => "a bare migration stream of the mapped-ram layout",
            Origin::LibvirtSave(_) => "a libvirt save image",
        })
    }
}

/// What a libvirt save image says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LibvirtSave {
    /// 0 to 2.
    pub version: u32,
    /// `little` or `big`.
    pub byte_order: &'static str,
    /// How the stream is stored.
    pub format: SaveFormat,
    /// Whether the guest runs after a restore.
    pub was_running: bool,
    /// Whether libvirt's cookie is there, which has the CPU that the guest really had.
    pub has_cookie: bool,
    /// The domain's name, if its XML can be read.
    pub domain: Option<String>,
    /// The domain's UUID, likewise.
    pub uuid: Option<uuid::Uuid>,
    /// Where in the file the stream begins.
    pub stream_at: u64,
}
