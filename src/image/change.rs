//! Changes an image: appends a generation, never rewrites.

use std::io;
use std::path::{Path, PathBuf};

use crate::bytes::Sink;
use crate::container::{Edit, Image, SectionType, Signature, sign_payload};
use crate::error::{Blame, ErrorKind, Result};
use crate::host::keys::SigningKey;
use crate::image::Trust;
use crate::store::{AnyFile, FileAppender};

/// Why an image was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It is not the image any more that was looked at.
    #[error("{} was changed by another program meanwhile", path.display())]
    ChangedMeanwhile {
        /// The image.
        path: PathBuf,
    },
    /// The new generation could not be written; what of it was is cut off again.
    #[error("{} could not be written; it is as it was", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Blame for ChangeError {
    fn kind(&self) -> ErrorKind {
        match self {
            ChangeError::ChangedMeanwhile { .. } => ErrorKind::Host,
            ChangeError::Write { .. } => ErrorKind::Failed,
        }
    }
}

/// What a change made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    /// The new generation.
    pub generation: u32,
    /// Whether it is signed: if, and only if, the image was by somebody this user trusts.
    pub is_signed: bool,
}

/// Appends the generation that `write` fills, and signs it with this host's key if the image was ours before.
///
/// `seen` is the statement of the image that was looked at; it has to be that still. Nobody can use the image meanwhile.
/// Whatever fails, the image is as it was.
///
/// # Errors
/// [`StoreError::InUse`](crate::store::StoreError::InUse) if somebody uses it; [`ChangeError`]; what `write` says.
pub fn change(
    path: &Path,
    seen: Option<&str>,
    write: impl FnOnce(&mut Edit<'_>) -> Result<()>,
) -> Result<Changed> {
    let mut appender = FileAppender::open(path)?;
    let failed = |source| ChangeError::Write {
        path: path.to_owned(),
        source,
    };
    let copy = || appender.file().try_clone().map_err(failed);
    let (copy, file) = (copy()?, copy()?);
    let image = Image::open(AnyFile::from(copy))?;
    if seen.is_some_and(|seen| seen != image.statement()) {
        let path = path.to_owned();
        return Err(ChangeError::ChangedMeanwhile { path }.into());
    }
    let appended = append(&image, &mut appender, write)
        .and_then(|changed| Ok(appender.sync().map(|()| changed).map_err(failed)?));
    if appended.is_err() {
        // The first error counts; what cannot be cut off is found as a torn edit.
        let _ = file.set_len(image.len()).and_then(|()| file.sync_data());
    }
    appended
}

fn append(
    image: &Image<AnyFile>,
    appender: &mut FileAppender,
    write: impl FnOnce(&mut Edit<'_>) -> Result<()>,
) -> Result<Changed> {
    let is_ours = Trust::of(image)?.is_trusted();
    let mut edit = Edit::begin(image, appender)?;
    write(&mut edit)?;
    if is_ours {
        edit.remove(SectionType::Signature)?;
        let statement = edit.statement();
        let armored = SigningKey::load_or_create()?.sign(&statement)?;
        let signature = sign_payload(&Signature { statement, armored })?;
        edit.add(SectionType::Signature, &signature)?;
    }
    edit.finish()?;
    Ok(Changed {
        generation: image.generation().saturating_add(1),
        is_signed: is_ours,
    })
}
