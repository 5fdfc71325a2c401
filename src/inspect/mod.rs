//! Looks at images and migration streams: says what they hold, whether they are whole, and in what they differ.

mod describe;
mod devices;
mod diff;
mod stream_file;
mod verify;
mod ways;

pub use describe::{ImageDescription, describe};
pub use devices::{DeviceError, Devices, Registers, registers};
pub use diff::{
    BlockDiff, ChangedDevice, ConfigurationDiff, DeviceDiff, DiffError, DiffFailure, DiffRequest,
    FactChange, FieldChange, ImageDiff, MemoryDiff, diff,
};
pub use stream_file::{StreamDescription, describe_foreign};
pub use verify::{Depth, VerifyReport, verify};
pub use ways::{Way, Ways};
