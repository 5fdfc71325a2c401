//! What QEMU and libvirt write, taken for images: bare migration streams and libvirt save images.
//!
//! | file | what it is for |
//! |---|---|
//! | [`libvirt`] | the beginning of a save image ⇄ values |
//! | [`compression`] | how streams are compressed |
//! | `source` | what a file is, and its stream |
//! | [`describe`] | the manifest that a stream and domain XML give |
//! | `open` | a file of others as an image |
//! | `origin` | what kind of file an image was opened from |

pub mod compression;
pub mod describe;
mod error;
pub mod libvirt;
mod open;
mod origin;
mod source;

pub use error::ForeignError;
pub use open::{About, Found, append_sections, find, open_any};
pub use origin::{LibvirtSave, Origin};
pub use source::{ForeignFile, ForeignStream};
