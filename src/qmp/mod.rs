//! QEMU's monitor: our own small QMP client over a unix socket.
//!
//! In goes a socket's path, out come QEMU's answers as values. The client blocks, owns no thread and knows nothing of
//! images. What a command means for a save or a restore is the stories' business.
//!
//! Source: QEMU `docs/interop/qmp-spec.rst` and `qapi/*.json`.

mod client;
mod command;
mod error;
mod event;
mod line;
mod migration;
mod name;
mod ram;
mod settings;
mod snapshot;
mod socket;

pub use client::{DEFAULT_TIMEOUT, QemuVersion, QmpClient};
pub use command::{
    BlockDevice, BlockNode, Chardev, Cpu, InsertedMedium, Machine, MemorySize, NodeImage,
    QomProperty, RunState,
};
pub use error::QmpError;
pub use event::{EVENT_LIMIT, Event, EventTime};
pub use line::LINE_LIMIT;
pub use migration::{MigrationInfo, MigrationStatus, RamProgress};
pub use ram::RamBlockAddress;
pub use settings::SavedSettings;
pub use snapshot::DiskSnapshot;
