//! Looks at images and migration streams: says what they hold and whether they are whole.

mod describe;
mod devices;
mod stream_file;
mod verify;
mod ways;

pub use describe::{ImageDescription, describe};
pub use devices::{DeviceError, Devices, Registers, registers};
pub use stream_file::{StreamDescription, describe_stream};
pub use verify::{Depth, VerifyReport, verify};
pub use ways::{Way, Ways};
