//! `config.toml` and files of remaps: found, read, and one put above the other.

use std::path::{Path, PathBuf};

use crate::config::{Remap, Settings, remap};
use crate::error::Result;
use crate::host;
use crate::store::StoreError;

/// What this host and this user always want; the user's word counts more.
pub fn read() -> Result<Settings> {
    let mut settings = Settings::default();
    for path in host::settings_files() {
        if let Some(text) = read_if_there(&path)? {
            let (file, directory) = (path.display().to_string(), directory_of(&path)?);
            settings = settings.below(Settings::parse(&file, &directory, &text)?);
        }
    }
    Ok(settings)
}

/// The remaps in these files, in their order; relative paths start where their file lies.
pub fn remaps(files: &[PathBuf]) -> Result<Vec<Remap>> {
    let mut remaps = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path).map_err(|source| unreadable(path, source))?;
        let directory = directory_of(path)?;
        for mut remap in remap::parse_file(&path.display().to_string(), &text)? {
            remap.start_paths_in(&directory);
            remaps.push(remap);
        }
    }
    Ok(remaps)
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(unreadable(path, source).into()),
    }
}

fn directory_of(path: &Path) -> Result<String> {
    let whole = std::path::absolute(path).map_err(|source| unreadable(path, source))?;
    let directory = whole.parent().unwrap_or(Path::new("/"));
    Ok(directory.display().to_string())
}

fn unreadable(path: &Path, source: std::io::Error) -> StoreError {
    StoreError::File {
        act: "read",
        path: path.to_owned(),
        source,
    }
}
