//! An image of this host: opened from where it lies, and whose it is; and files of others, read as images.
//!
//! `container` knows the format, `store` where bytes live, `host` whom the user trusts; here they meet.

mod change;
pub mod foreign;
mod open;
mod parent;
mod resources;
mod trust;

pub use change::{ChangeError, Changed, change};
pub use foreign::{ForeignError, LibvirtSave, Origin, open_any};
pub use open::{ImageError, OpenedImage, open, open_alone, open_offered, open_pipe};
pub use parent::{FoundParents, Parent, ParentError, find_parents};
pub use resources::{resource, resource_table};
pub use trust::Trust;
