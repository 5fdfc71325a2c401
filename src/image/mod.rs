//! An image of this host: opened from where it lies, and whose it is.
//!
//! `container` knows the format, `store` where bytes live, `host` whom the user trusts; here they meet.

mod open;
mod trust;

pub use open::{ImageError, OpenedImage, open, open_pipe};
pub use trust::Trust;
