//! The XML of a guest: a file of its own, or the one that an image carries.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use super::RunError;
use crate::container::layout::FRAME_MAGIC;
use crate::error::Result;
use crate::image::{self, Trust};
use crate::store::Location;
use crate::stream::is_stream_start;

/// The longest domain XML that is read.
const MOST_BYTES: u64 = 16 << 20;

/// Domain XML, and whose it is.
#[derive(Debug, Clone)]
pub struct Source {
    /// The XML as it was read.
    pub xml: Vec<u8>,
    /// Who vouches for it; `None` of a file that the user named, which is as good as the user's own words.
    pub trust: Option<Trust>,
    /// The image that it comes from.
    pub image: Option<PathBuf>,
}

impl Source {
    /// Reads the XML at `location`; standard input is always XML.
    ///
    /// # Errors
    /// [`RunError`], or what is wrong with the image.
    pub fn open(location: &Location) -> Result<Self> {
        let Location::Path(path) = location else {
            let xml = read_all(io::stdin().lock(), "standard input")?;
            return Ok(Source::of_user(xml));
        };
        let what = path.display().to_string();
        let not_read = |source| RunError::NotRead {
            what: what.clone(),
            source,
        };
        let mut file = File::open(path).map_err(not_read)?;
        let mut beginning = Vec::new();
        let read = file.by_ref().take(64).read_to_end(&mut beginning);
        read.map_err(not_read)?;
        let is_image = beginning.starts_with(&FRAME_MAGIC) || is_stream_start(&beginning);
        if !is_image {
            let xml = read_all(beginning.chain(file), &what)?;
            return Ok(Source::of_user(xml));
        }
        let opened = image::open_alone(location)?;
        Ok(Source {
            xml: opened.image().xml()?.into_bytes(),
            trust: Some(Trust::of(opened.image())?),
            image: std::path::absolute(path).ok(),
        })
    }

    fn of_user(xml: Vec<u8>) -> Self {
        Source {
            xml,
            trust: None,
            image: None,
        }
    }

    /// Whether it may name resources of this host.
    pub fn is_trusted(&self) -> bool {
        self.trust.as_ref().is_none_or(Trust::is_trusted)
    }
}

fn read_all(from: impl Read, what: &str) -> Result<Vec<u8>, RunError> {
    let mut xml = Vec::new();
    let read = from.take(MOST_BYTES + 1).read_to_end(&mut xml);
    read.map_err(|source| RunError::NotRead {
        what: what.to_owned(),
        source,
    })?;
    match xml.len() as u64 > MOST_BYTES {
        true => Err(RunError::TooLong {
            what: what.to_owned(),
            limit: MOST_BYTES,
        }),
        false => Ok(xml),
    }
}
