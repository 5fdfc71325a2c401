//! Stows a running QEMU guest in one portable file, and brings it back on this host or another.
//!
//! An *image* (`.stow`) holds QEMU's migration stream as its payload and, behind it, everything a restore needs to
//! know: the guest's configuration, a digest of every byte, and a signature. `spec/container.md` is its format.
//!
//! # The map
//! | module | what it is for |
//! |---|---|
//! | [`error`] [`progress`] [`bytes`] [`units`] [`codec`] [`digest`] | the ground everything stands on |
//! | [`container`] | the image format ⇄ values |
//! | [`stream`] | QEMU's migration stream ⇄ events |
//! | [`config`] | the virtual machine as data: domain XML, QEMU arguments, what a host must offer |
//! | [`qmp`] [`store`] [`host`] | the outside world: QEMU's monitor, where bytes live, this machine |
//! | [`pipeline`] [`supervise`] | threads; processes |
//! | [`image`] | an image of this host, and files of others read as images |
//! | [`run`] [`save`] [`restore`] [`transfer`] [`convert`] [`configure`] [`inspect`] [`memory`] | the stories |
//! | [`relocate`] | a story made of stories: guests that move to other hosts |
//! | [`cli`] | arguments in, words out |
//!
//! A module may use those in the rows above it, never its neighbours; `tests/architecture.rs` holds that picture.

pub mod bytes;
pub mod codec;
pub mod digest;
pub mod error;
pub mod progress;
pub mod rate;
pub mod units;

pub mod config;
pub mod container;
pub mod host;
pub mod qmp;
pub mod store;
pub mod stream;

pub mod pipeline;
pub mod supervise;

pub mod image;

pub mod configure;
pub mod convert;
pub mod inspect;
pub mod memory;
pub mod restore;
pub mod run;
pub mod save;
pub mod transfer;

pub mod relocate;

pub mod cli;
