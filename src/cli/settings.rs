//! `config.toml` and files of remaps: found, read, and one put above the other.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::{ConfigError, Remap, Settings, remap};
use crate::error::Result;
use crate::host;
use crate::store::StoreError;

/// Other backends for a guest's resources.
#[derive(Debug, Clone, Default, Args)]
pub struct RemapArgs {
    /// Give a resource another backend; the guest does not notice. May be given several times
    ///
    /// disk:ID=PATH, disk:ID=FORMAT:PATH, disk:/old/prefix/=/new/, cdrom:ID=PATH|eject,
    /// net:ID=user|tap=NAME|bridge=NAME|passt|passt=SOCKET, chardev:ID=file:PATH|unix:PATH|pty|null,
    /// display:ID=HOST:PORT|unix:PATH|none, firmware:ID=PATH, share:ID=PATH, tpm:ID=DIR.
    /// `vmstow inspect` lists the ids; * means all. The last one for a resource counts.
    #[arg(long = "remap", value_name = "KIND:ID=TARGET", value_parser = parse_remap)]
    remaps: Vec<Remap>,

    /// Take remaps from a file, one a line; those of the command line count more. May be given several times
    ///
    /// Lines that begin with # are skipped. What config.toml says counts less.
    #[arg(long = "remap-file", value_name = "FILE")]
    remap_files: Vec<PathBuf>,
}

impl RemapArgs {
    /// Those of files, then those of the command line, which count more.
    pub fn all(self) -> Result<Vec<Remap>> {
        let mut all = remaps(&self.remap_files)?;
        all.extend(self.remaps);
        Ok(all)
    }
}

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
fn remaps(files: &[PathBuf]) -> Result<Vec<Remap>> {
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

/// A remap as an argument; paths in it are made absolute.
fn parse_remap(text: &str) -> Result<Remap, String> {
    let parsed: Result<Remap, ConfigError> = text.parse();
    let mut remap = parsed.map_err(|error| error.to_string())?;
    // The guest's own relative paths start where its QEMU was started; what the user names starts here.
    let here = std::env::current_dir().map_err(|error| error.to_string())?;
    remap.start_paths_in(&here.display().to_string());
    Ok(remap)
}
