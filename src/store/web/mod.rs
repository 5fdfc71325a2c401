//! Files of the web, to be read: `http://` and `https://`.
//!
//! The server has to give parts of files. Name and password may stand in the address.

#[cfg(feature = "http")]
mod client;
mod error;
#[cfg(feature = "http")]
mod file;
#[cfg(feature = "http")]
mod ranged;

pub use error::{WebError, Words};
#[cfg(feature = "http")]
pub use file::open_web;

#[cfg(feature = "s3")]
pub(super) use client::{Answer, Ask, Client, Fault, may_pass, persist, server_of};
#[cfg(feature = "s3")]
pub(super) use ranged::{Origin, RangedFile, Version};
