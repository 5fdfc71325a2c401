//! What a person writes where an image is asked for.

use std::path::PathBuf;

use super::StoreError;

/// A path, or `-` for standard input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of this host.
    Path(PathBuf),
    /// `-`
    Pipe,
}

impl Location {
    /// The path, if it is one.
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            Location::Path(path) => Some(path),
            Location::Pipe => None,
        }
    }
}

impl std::str::FromStr for Location {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        let is_scheme = |scheme: &str| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
        match text {
            "-" => Ok(Location::Pipe),
            "" => Err(StoreError::NotALocation {
                text: text.to_owned(),
            }),
            _ if scheme.is_some_and(is_scheme) => Err(StoreError::NotALocation {
                text: text.to_owned(),
            }),
            path => Ok(Location::Path(PathBuf::from(path))),
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Location::Path(path) => path.display().fmt(f),
            Location::Pipe => f.write_str("-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_hold_anything_but_a_scheme() {
        assert_eq!("-".parse::<Location>().unwrap(), Location::Pipe);
        for path in ["a.stow", "/x/y", "./-", "a b://c"] {
            assert_eq!(
                path.parse::<Location>().unwrap(),
                Location::Path(path.into())
            );
        }
        for text in ["", "s3://bucket/x", "ssh://host/x"] {
            assert!(matches!(
                text.parse::<Location>(),
                Err(StoreError::NotALocation { .. })
            ));
        }
    }
}
