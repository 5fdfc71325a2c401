//! What every story test stands on: real QEMUs, guests that are witnesses, and a directory that nothing outlives.
//!
//! ```ignore
//! mod support;
//! use support::{Guest, GuestSpec, TestDir};
//!
//! let dir = TestDir::new();
//! let mut guest = Guest::start(&dir, GuestSpec::default());
//! guest.serial().wait_for_tick(5);
//! dir.vmstow().args(["save", &guest.source(), "x.stow"]).assert().success();
//! guest.wait_for_exit();
//! let before = guest.serial().mark();
//! let restored = dir.restore(&["x.stow"]);         // ended when dropped
//! guest.serial().assert_goes_on(&before);
//! ```
//!
//! A guest is started by hand, as a user would. QMP here is a client of its own, so that it judges ours. When a
//! [`TestDir`] is dropped, a process that still knows it (by an argument or by its environment) fails the test.

#![allow(dead_code, unused_imports, reason = "each test uses a part")]
#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod assets;
mod before;
mod dir;
mod domain;
mod guest;
mod guest_memory;
mod libvirtd;
mod process;
mod qmp;
mod registry;
mod restored;
mod serial;
mod servers;
mod sshd;
mod two_hosts;
mod wait;
mod wire;

pub use assets::{Qemu, linux_initrd, linux_kernel, testdata};
pub use before::{Before, Settings, wait_for_silence};
pub use dir::{TestDir, flip_bit};
pub use domain::{counter_xml, serial_into};
pub use guest::{Guest, GuestSpec, Kind, SerialPort};
pub use guest_memory::{MemoryRange, chunk_of, fill, fill_at, memory, scribbled, write_memory};
pub use libvirtd::Libvirtd;
pub use process::{Adopted, Process, processes_that_know};
pub use qmp::Qmp;
pub use registry::{Registry, RegistrySpec};
pub use restored::Restored;
pub use serial::{Mark, Serial};
pub use servers::{ACCESS_KEY, SECRET_KEY, Server};
pub use sshd::OtherHost;
pub use two_hosts::{Host, TwoHosts};
pub use wait::{PATIENCE, wait_until};
pub use wire::Wire;
