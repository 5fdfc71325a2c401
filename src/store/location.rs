//! What a person writes where an image is asked for.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::StoreError;

/// A path, `-` for standard input or output, or a file of another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of this host.
    Path(PathBuf),
    /// `-`
    Pipe,
    /// `ssh://[USER@]HOST[:PORT]/PATH`
    Ssh(SshLocation),
}

/// A file of another host, which is reached by `ssh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshLocation {
    /// The user there; `None` leaves it to ssh's configuration.
    pub user: Option<String>,
    /// A name that ssh knows, or an address.
    pub host: String,
    /// `None` leaves it to ssh's configuration.
    pub port: Option<u16>,
    /// The path there; a relative one starts in the home directory.
    pub path: PathBuf,
}

impl Location {
    /// The path, if it is a file of this host.
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            Location::Path(path) => Some(path),
            Location::Pipe | Location::Ssh(_) => None,
        }
    }
}

impl SshLocation {
    /// For whom only takes files of this host.
    pub fn refused(&self) -> StoreError {
        StoreError::FarAway {
            there: self.to_string(),
        }
    }
}

impl FromStr for Location {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let wrong = || StoreError::NotALocation {
            text: text.to_owned(),
        };
        let is_scheme = |scheme: &str| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let scheme = text.split_once("://").filter(|(it, _)| is_scheme(it));
        match (text, scheme) {
            ("-", _) => Ok(Location::Pipe),
            ("", _) => Err(wrong()),
            (_, Some(("ssh", rest))) => parse_ssh(rest).map(Location::Ssh).ok_or_else(wrong),
            (_, Some(_)) => Err(wrong()),
            (path, None) => Ok(Location::Path(PathBuf::from(path))),
        }
    }
}

/// What stands behind `ssh://`; `None` if it is not clear.
fn parse_ssh(text: &str) -> Option<SshLocation> {
    let (authority, path) = text.split_once('/')?;
    let (user, address) = match authority.rsplit_once('@') {
        Some((user, address)) => (Some(user.to_owned()), address),
        None => (None, authority),
    };
    let (host, port) = host_and_port(address)?;
    // ssh would take such words for options.
    let may_stand = |word: &str| {
        !word.is_empty()
            && !word.starts_with('-')
            && !word.contains(|c: char| c.is_control() || c.is_whitespace())
    };
    let path = match path.strip_prefix("~/") {
        Some("") => ".".to_owned(),
        Some(in_home) => in_home.to_owned(),
        None => format!("/{path}"),
    };
    let is_clear = may_stand(host) && user.as_deref().is_none_or(may_stand) && !path.contains('\0');
    is_clear.then(|| SshLocation {
        user,
        host: host.to_owned(),
        port,
        path: PathBuf::from(path),
    })
}

/// `HOST`, `HOST:PORT`, `[ADDRESS]` or `[ADDRESS]:PORT`.
fn host_and_port(address: &str) -> Option<(&str, Option<u16>)> {
    let (host, rest) = match address.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => address.split_at(address.find(':').unwrap_or(address.len())),
    };
    let port = match rest {
        "" => None,
        rest => Some(
            rest.strip_prefix(':')?
                .parse()
                .ok()
                .filter(|port| *port != 0)?,
        ),
    };
    Some((host, port))
}

impl fmt::Display for SshLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ssh://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match self.host.contains(':') {
            true => write!(f, "[{}]", self.host)?,
            false => f.write_str(&self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        match self.path.is_absolute() {
            true => self.path.display().fmt(f),
            false => write!(f, "/~/{}", self.path.display()),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Path(path) => path.display().fmt(f),
            Location::Pipe => f.write_str("-"),
            Location::Ssh(there) => there.fmt(f),
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
        for text in ["", "s3://bucket/x", "ftp://host/x"] {
            assert!(matches!(
                text.parse::<Location>(),
                Err(StoreError::NotALocation { .. })
            ));
        }
    }

    #[test]
    fn a_file_of_another_host_is_said_in_one_way() {
        for (text, user, host, port, path) in [
            ("ssh://a/x.stow", None, "a", None, "/x.stow"),
            ("ssh://me@a:22/v/x y", Some("me"), "a", Some(22), "/v/x y"),
            ("ssh://[fe80::1]:2222/~/x", None, "fe80::1", Some(2222), "x"),
            ("ssh://a/dir/", None, "a", None, "/dir/"),
            ("ssh://a/", None, "a", None, "/"),
        ] {
            let location: Location = text.parse().unwrap();
            let expected = SshLocation {
                user: user.map(str::to_owned),
                host: host.to_owned(),
                port,
                path: path.into(),
            };
            assert_eq!(location, Location::Ssh(expected));
            assert_eq!(location.to_string(), text);
        }
    }

    #[test]
    fn what_ssh_would_take_for_an_option_is_no_host() {
        for text in [
            "ssh://-oProxyCommand=x/y",
            "ssh://-l@host/y",
            "ssh://host",
            "ssh:///x",
            "ssh://host:0/x",
            "ssh://host:ssh/x",
            "ssh://a b/x",
            "ssh://[::1/x",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
