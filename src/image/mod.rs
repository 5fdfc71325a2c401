//! An image of this host: opened from where it lies, and whose it is.
//!
//! `container` knows the format, `store` where bytes live, `host` whom the user trusts; here they meet.

mod change;
mod open;
mod resources;
mod trust;

pub use change::{ChangeError, Changed, change};
pub use open::{ImageError, OpenedImage, open, open_pipe};
pub use resources::{resource, resource_table};
pub use trust::Trust;
