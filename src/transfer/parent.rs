//! The image of an earlier save that the receiver has: named, or found beside the destination.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::TransferError;
use crate::bytes::ReadAt;
use crate::container::{ContainerError, Image};
use crate::error::Error;
use crate::image::find_parents;
use crate::store::{FileSource, Location};

/// Files that are looked at for the guest they are of, and those of the guest that are held against the image.
const MOST_LOOKED_AT: usize = 256;
const MOST_COMPARED: usize = 8;

/// Which image of an earlier save shall help.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ParentChoice {
    /// The best that lies beside the destination, if there is one.
    #[default]
    Found,
    /// This one.
    Named(PathBuf),
    /// None.
    None,
}

/// An image of an earlier save. None of its bytes is believed.
#[derive(Debug)]
pub struct Parent {
    /// Its name.
    pub path: PathBuf,
    /// What it holds.
    pub image: Image<FileSource>,
}

impl Parent {
    /// The chosen image, which is to help with `offered` on its way to `target`.
    ///
    /// # Errors
    /// [`TransferError::Parent`] if it was named and is none.
    pub fn choose<S: ReadAt>(
        choice: &ParentChoice,
        offered: &Image<S>,
        target: &Path,
    ) -> Result<Option<Self>, TransferError> {
        match choice {
            ParentChoice::None => Ok(None),
            ParentChoice::Found => Ok(find(offered, target)),
            ParentChoice::Named(path) => match open(path) {
                Ok(image) => Ok(Some(Parent {
                    path: path.clone(),
                    image,
                })),
                Err(error) => Err(TransferError::Parent {
                    path: path.clone(),
                    why: error,
                }),
            },
        }
    }
}

fn open(path: &Path) -> Result<Image<FileSource>, Error> {
    let file = FileSource::open(path)?;
    file.lock_shared(path)?;
    let mut image = Image::open(file)?;
    // A delta is of use if it has its own.
    find_parents(&mut image, &Location::Path(path.to_owned()));
    Ok(image)
}

/// The image of the same guest beside `target` that has most of the chunks; the newest of several.
fn find<S: ReadAt>(offered: &Image<S>, target: &Path) -> Option<Parent> {
    let guest = Guest::of(offered)?;
    let wanted = digests(offered).ok()?;
    let of_guest = candidates(target).into_iter().filter_map(|path| {
        let image = open(&path).ok()?;
        (Guest::of(&image)? == guest).then_some(Parent { path, image })
    });
    let with_common = of_guest.take(MOST_COMPARED).filter_map(|parent| {
        let common = digests(&parent.image).ok()?;
        let common = common.iter().filter(|it| wanted.binary_search(it).is_ok());
        Some((common.count(), parent))
    });
    // The newest comes first, and stays unless another has more.
    let best = with_common.reduce(|best, next| match next.0 > best.0 {
        true => next,
        false => best,
    });
    best.map(|(_, parent)| parent)
}

/// Images beside `target`, and what it replaces; the newest first.
fn candidates(target: &Path) -> Vec<PathBuf> {
    let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty());
    let entries = std::fs::read_dir(dir.unwrap_or(Path::new(".")));
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in entries.into_iter().flatten().flatten() {
        let path = entry.path();
        let is_image = path.extension().is_some_and(|it| it == "stow");
        if !is_image && path.file_name() != target.file_name() {
            continue;
        }
        let metadata = entry.metadata().ok().filter(|it| it.is_file());
        if let Some(changed) = metadata.and_then(|it| it.modified().ok()) {
            found.push((changed, path));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    let newest = found.into_iter().take(MOST_LOOKED_AT);
    newest.map(|(_, path)| path).collect()
}

/// By what a guest is known: its UUID, or its name if it has none.
#[derive(PartialEq)]
enum Guest {
    Uuid(uuid::Uuid),
    Name(String),
}

impl Guest {
    fn of<R: ReadAt>(image: &Image<R>) -> Option<Self> {
        if let Some(uuid) = image.identity().guest_uuid {
            return Some(Guest::Uuid(uuid));
        }
        let name = image.manifest().ok()?.guest.name;
        (!name.is_empty()).then_some(Guest::Name(name))
    }
}

/// The beginnings of the digests of all chunks, sorted.
fn digests<R: ReadAt>(image: &Image<R>) -> Result<Vec<u64>, ContainerError> {
    let mut digests = Vec::new();
    for entry in image.chunks() {
        let digest = entry?.raw_digest.0;
        let first = digest.split_first_chunk::<8>();
        digests.extend(first.map(|(first, _)| u64::from_be_bytes(*first)));
    }
    digests.sort_unstable();
    Ok(digests)
}
