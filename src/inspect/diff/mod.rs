//! In what two images differ: guest memory, the state of devices, the configuration.
//!
//! | file | what it compares |
//! |---|---|
//! | `memory` | pages, by the page maps and the digests of chunks |
//! | `devices` | fields, as the streams describe them, or bytes where they do not |
//! | `configuration` | domain XML, and what the manifests say |

mod configuration;
mod devices;
mod memory;

use serde::Serialize;

pub use configuration::{ConfigurationDiff, FactChange};
pub use devices::{ChangedDevice, DeviceDiff, FieldChange};
pub use memory::{BlockDiff, MemoryDiff};

use super::devices::Devices;
use crate::error::{Blame, Error, ErrorKind};
use crate::image::OpenedImage;
use crate::pipeline::Which;
use crate::progress::Progress;

/// What of two images is compared.
#[derive(Debug)]
pub struct DiffRequest {
    /// Guest memory.
    pub memory: bool,
    /// The devices of the first and of the second image, if they are compared.
    pub devices: Option<(Devices, Devices)>,
    /// Domain XML and manifest.
    pub configuration: bool,
    /// Workers.
    pub threads: usize,
}

/// In what two images differ. What was not compared is absent.
#[derive(Debug, Serialize)]
pub struct ImageDiff {
    /// The first image, as it was named.
    pub old: String,
    /// The second one.
    pub new: String,
    /// Whether no difference was found.
    pub is_same: bool,
    /// Guest memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryDiff>,
    /// The state of devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<DeviceDiff>,
    /// The configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration: Option<ConfigurationDiff>,
}

/// Why two images cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// Without a page map nothing tells where a page lies.
    #[error("{image} has no page map: its pages cannot be compared")]
    NoPageMap {
        /// The image.
        image: String,
    },
}

impl Blame for DiffError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Failed
    }
}

/// What ended a comparison, and in which of the two images; `None` if it has nothing to do with either.
#[derive(Debug)]
pub struct DiffFailure {
    /// The image.
    pub which: Option<Which>,
    /// Why.
    pub error: Error,
}

/// Names the image in which an error was met.
trait In<T> {
    fn in_image(self, which: Which) -> Result<T, DiffFailure>;
}

impl<T, E: Into<Error>> In<T> for Result<T, E> {
    fn in_image(self, which: Which) -> Result<T, DiffFailure> {
        self.map_err(|error| DiffFailure {
            which: Some(which),
            error: error.into(),
        })
    }
}

/// Compares two images.
///
/// # Errors
/// The first thing that is wrong with one of them. Chunks that do not have to be read are not verified.
pub fn diff(
    old: &OpenedImage,
    new: &OpenedImage,
    request: &DiffRequest,
    progress: &dyn Progress,
) -> Result<ImageDiff, DiffFailure> {
    let configuration = match request.configuration {
        true => Some(configuration::compare(old, new)?),
        false => None,
    };
    let devices = request.devices.as_ref();
    let devices = devices.map(|(old, new)| devices::compare(old, new));
    let memory = match request.memory {
        true => Some(memory::compare(old, new, request.threads, progress)?),
        false => None,
    };
    let mut diff = ImageDiff {
        old: old.location().to_string(),
        new: new.location().to_string(),
        is_same: false,
        memory,
        devices,
        configuration,
    };
    diff.is_same = diff.memory.as_ref().is_none_or(MemoryDiff::is_empty)
        && diff.devices.as_ref().is_none_or(DeviceDiff::is_empty)
        && diff
            .configuration
            .as_ref()
            .is_none_or(ConfigurationDiff::is_empty);
    Ok(diff)
}
