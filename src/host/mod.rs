//! What this machine is and has: processes, QEMU binaries, files, the runtime directory.
//!
//! Facts in, no decisions out: whether a fact is good enough for a save or a restore is the stories' business. Nothing
//! here talks to the monitor of a guest.

pub mod keys;

mod emulator;
mod error;
mod facts;
mod facts_cache;
mod firmware;
mod interfaces;
mod lasting;
mod memory;
mod monitor;
mod overlays;
mod process;
mod process_memory;
mod runtime;
mod settings;
mod userfault;
mod virtiofsd;
mod vmstate;

pub use emulator::{CpuExpansion, expand_cpu};
pub use error::HostError;
pub use facts::{
    FileIdentity, MachineName, QEMU_BINARY, QemuFacts, Userfaultfd, Version, file_digest,
    file_digest_while, find_program, find_qemu, free_space, is_kvm_accessible, qemu_version,
    userfaultfd,
};
pub use firmware::{FirmwareDescriptor, firmware_descriptors};
pub use interfaces::has_interface;
pub use lasting::{Lasting, make_from_template, make_private_directory};
pub use memory::{available_memory, resident_bytes};
pub use monitor::{
    Monitor, has_listener, is_qemu, is_socket, listener_of, listeners_of, monitors_of, qmp_sockets,
};
pub use overlays::{OverlayRoot, Overlays, is_throwaway};
pub use process::{
    ProcessFacts, ProcessHandle, ProcessId, ProcessLock, boot_id, has_userfaultfd, processes_with,
};
pub use process_memory::{Backing, MOST_SLICES, ProcessMemory};
pub use runtime::{GuestDir, NAME_LIMIT, RuntimeDir, SOCKET_PATH_LIMIT, is_name, sanitise_name};
pub use settings::settings_files;
pub use userfault::Userfault;
pub use virtiofsd::is_virtiofsd_in_c;
pub use vmstate::{VmstateNames, vmstate_names};
